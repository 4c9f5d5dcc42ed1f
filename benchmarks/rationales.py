"""People's rationales against maps of one model: IRF, every map with a vote beside LIME, SHAP, Inseq and random words.

    python -m benchmarks.rationales --data irf-acl/data [--posts 40] [--model DIR [--adapter DIR]] [--json]
    python -m benchmarks.rationales --twin [--posts 40]

IRF (Garg et al., ACL Findings 2023; the repository am-shb/irf-acl, folder data) marks one phrase of each post that
shows thwarted belongingness or perceived burdensomeness. A small GLM is trained on its train split to answer both
questions (``--keep DIR`` keeps it), or MODEL is taken as it is: any causal model's directory or Hub id, asked in the
package's words by its own chat template. ``--twin`` writes a table of the same columns in made-up words, in which a
phrase decides: it shows that the benchmark works, and says nothing about people.

Explained is the log-odds of yes, on posts of the test split that people marked, whatever the model answers. LIME and
SHAP are their own packages, with as many calls of the model (``--samples``) as Shapley values of words get here; Inseq
is its integrated gradients of the answer. Without a package (``pip install lime shap inseq``) its row is left out.

As in the paper's code, the ten words with the largest weight stand against the phrase, ROUGE-1 over sets of words. Word
F1 takes as many words as the phrase has; AUPRC ranks all. Words of one clause have its value, and equals are ranked at
random. Random words, and a random stretch as long as the phrase, stand beside. Intervals are BCa over posts (95 %); the
difference from SHAP's F on the same posts has one too, and p is a sign-flip test of it, by Holm over the maps.

The second table: what hiding as many of a map's first words as the phrase has costs the label (nats, the mean over
three ways to hide: from attention, by pad token, by other posts' words; each is one map's own way), and whether it goes
with agreement: Spearman's rank correlation of the cost with AUPRC, over the posts of each map, and over the maps of
each post.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats as scipy_stats

from benchmarks.irf import QUESTIONS, Asked, encoded, trained, twin, words_of
from mentalglm_jax.data.rationales import iter_irf
from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError, MentalGLMError
from probes.checks.verdict import FAMILIES
from probes.citations.clauses import pieces
from probes.errors import ProbeError
from probes.intake.rows import Reader
from probes.probe import Probe
from probes.records import Attribution, Span
from probes.saliency.attribute import Settings, attribute
from probes.stats import auroc, average_precision, bootstrap_ci, holm

PUBLISHED = {  # of MentalBERT, in their paper: other models, so metrics may be compared, numbers not
    "belong": {"LIME": (14.24, 53.05, 20.88), "SHAP": (15.74, 50.16, 22.27)},
    "burden": {"LIME": (18.47, 46.83, 25.18), "SHAP": (20.77, 49.89, 27.92)},
}
TOP = 10
GRADIENT = tuple(name for name, family in FAMILIES.items() if family == "gradient")
ERASURE = tuple(name for name, family in FAMILIES.items() if family == "erasure")
PEERS = ("LIME", "SHAP", "Inseq")
RANDOM = ("random words", "random stretch")
PEOPLE = "people's words"
Scores = dict[str, np.ndarray]


# --- Maps of words ---


def lime_scores(one: Asked, samples: int, seed: int) -> np.ndarray:
    """LIME's weight of each word, its own defaults; words that are equal share one weight."""
    from lime.lime_text import LimeTextExplainer

    def chances(texts: Sequence[str]) -> np.ndarray:
        yes = 1 / (1 + np.exp(-one.odds(texts)))
        return np.stack([1 - yes, yes], 1)

    explainer = LimeTextExplainer(split_expression=r"\s+", random_state=seed)
    found = explainer.explain_instance(one.example.post, chances, num_features=len(one.words), num_samples=samples)
    weights = dict(found.as_list())
    return np.array([weights.get(one.example.post[a:b], 0.0) for a, b in one.words])


def shap_scores(one: Asked, samples: int, seed: int) -> np.ndarray:
    """shap's partition explainer with its text masker over the same words."""
    import shap

    def cut(text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": [text[a:b] for a, b in words_of(text)], "offset_mapping": words_of(text)}

    masker = shap.maskers.Text(cut, mask_token="... ", collapse_mask_token=False)  # apart from the word after it
    explain = shap.Explainer(lambda texts: one.odds(list(texts)), masker, seed=seed)
    evaluations = max(samples, 2 * len(one.words) + 1)
    values = np.asarray(explain([one.example.post], max_evals=evaluations, silent=True).values[0]).ravel()
    if len(values) != len(one.words):
        raise RuntimeError(f"shap gave {len(values)} values for {len(one.words)} words")
    return values


def inseq_scores(one: Asked, samples: int, seed: int) -> np.ndarray:
    """Inseq's integrated gradients of the answer's tokens, its own defaults: not contrasted with the other answer."""
    import inseq

    example, config = one.example, one.probe.model.config
    if config.bos_token_id is None:
        config.bos_token_id = config.eos_token_id  # without one it does not load GLM
    model = inseq.load_model(one.probe.model, "integrated_gradients", tokenizer=one.probe.tokenizer)
    prompt = example.text[: sum(at < example.byte_spans[example.prompt_len][0] for at in example.char_bytes[:-1])]
    out = model.attribute(prompt, example.text, show_progress=False)
    found = out.sequence_attributions[0].target_attributions.detach().double().sum(-1).cpu().numpy()
    values = found[slice(*example.post_tok)].sum(1)
    return by_words(example.post_chars(values), one.words)


def by_words(char_values: np.ndarray, words: Sequence[Span]) -> np.ndarray:
    """Sums over the characters of each word."""
    return np.array([char_values[a:b].sum() for a, b in words])


def map_scores(one: Asked, fillers: tuple[str, ...], samples: int, seed: int) -> Scores:
    """Every map with a vote: gradients by tokens, erasure by clauses as ``probes run`` makes it, and by words."""
    permutations = max(1, samples // len(one.words))
    found: Scores = {}
    for units, methods, draws in (
        ("clause", (*GRADIENT, *ERASURE), Settings.shap_samples), ("word", ERASURE, permutations)
    ):  # fmt: skip
        settings = Settings(units=units, shap_samples=draws, seed=seed)
        for made in attribute(one.probe, one.example, methods, ("label",), settings, fillers):
            name = made.method if made.method in GRADIENT else f"{made.method}, {units}s"
            found[name] = of_units(made, one.words)
    return found


def of_units(made: Attribution, words: Sequence[Span]) -> np.ndarray:
    """A map's value of each word: of the unit in which the word begins, or the sum over its characters."""
    if made.unit == "char":
        return by_words(made.char_values, words)
    starts = [a for a, _ in made.unit_spans]
    return np.array([made.values[np.searchsorted(starts, a, "right") - 1] for a, _ in words])


# --- What is measured ---


def rouge1(said: str, wanted: str) -> tuple[float, float, float]:
    """Precision, recall and F of the sets of words, without punctuation around them and in one case."""
    ours, theirs = (set(re.findall(r"\w+(?:['’-]\w+)*", text.casefold())) for text in (said, wanted))
    both = len(ours & theirs)
    precision, recall = (both / len(side) if side else 0.0 for side in (ours, theirs))
    return precision, recall, 2 * precision * recall / (precision + recall) if both else 0.0


def costs(one: Asked, chosen: Sequence[np.ndarray], fillers: tuple[str, ...], seed: int) -> np.ndarray:
    """Nats of the label lost when the words ``chosen`` are hidden, the mean over three ways: float64 ``[chosen]``."""
    forward = one.probe.scorer.forward(one.example, ("label",))
    hidden = [one.example.touched([one.words[at] for at in words]) for words in chosen]
    keep = ~torch.as_tensor(np.stack([np.zeros_like(hidden[0]), *hidden]))
    filler = forward.filler_ids(fillers, Settings.draws, seed)
    ways = [forward.kept(keep), forward.kept(keep, "neutral"), forward.kept(keep, "resample", filler)]
    scores = torch.stack([way[:, 0] for way in ways]).numpy()
    return (scores[:, :1] - scores[:, 1:]).mean(0)


def measured(one: Asked, scores: Scores, fillers: tuple[str, ...], seed: int) -> dict[str, dict[str, float]]:
    """All numbers of all maps of one post, and of what people marked."""
    rng, post, marked = np.random.default_rng(seed), one.example.post, one.marked
    wanted = " ".join(post[a:b] for a, b in one.example.rationales or ())
    table, chosen = {}, []
    for name, values in {**scores, PEOPLE: marked.astype(float)}.items():
        order = np.lexsort((rng.permutation(len(values)), -values))  # equals at random
        p, r, f = rouge1(" ".join(post[slice(*one.words[at])] for at in order[:TOP]), wanted)
        chosen.append(order[: int(marked.sum())])
        table[name] = {"P": p, "R": r, "F": f, "word F1": float(marked[chosen[-1]].mean()),
                       "AUPRC": average_precision(values, marked)}  # fmt: skip
    for row, cost in zip(table.values(), costs(one, chosen, fillers, seed), strict=True):
        row["cost"] = float(cost)
    return table


def of_posts(probe: Probe, reader: Reader, records: Sequence[Record], samples: int, seed: int) -> list[dict[str, Any]]:
    """``measured`` of every post, its maps made."""
    peers: dict[str, Callable[..., np.ndarray]] = {
        name: run for name, run in zip(PEERS, (lime_scores, shap_scores, inseq_scores), strict=True)
        if find_spec(name.lower()) is not None
    }  # fmt: skip
    examples = encoded(probe, reader, records)
    texts = [[example.post[a:b] for a, b in pieces(example.post)] for example in examples]
    found = []
    for at, example in enumerate(examples):
        one, rng = Asked(probe, example), np.random.default_rng([seed, at])
        if not one.marked.any():
            continue
        fillers = tuple(text for other, part in enumerate(texts) if other != at for text in part)
        scores = map_scores(one, fillers, samples, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scores |= {name: run(one, samples, seed) for name, run in peers.items()}
        count, size = len(one.words), int(one.marked.sum())
        scores["random words"] = rng.random(count)
        inside = (np.arange(count) - rng.integers(count - size + 1)) % count < size
        scores["random stretch"] = inside.astype(float)
        found.append(measured(one, scores, fillers, seed + at))
        print(f"{at + 1} of {len(examples)} posts", end="\r", file=sys.stderr)
    return found


def study(
    probe: Probe, reader: Reader, records: Sequence[Record], posts: int, samples: int, tested: int, seed: int
) -> dict[str, Any]:
    """Both tables for both questions."""
    result: dict[str, Any] = {}
    for question, words in QUESTIONS.items():
        about = [one for one in records if one.split == "test" and one.question == words]
        random.Random(seed).shuffle(about)
        marked = [one for one in about if one.label == "yes" and one.rationales][:posts]
        if len(marked) < 3:
            raise InputError(f"{question}: {len(marked)} marked posts in the test split; at least 3 are needed")
        result[question] = {**classified(probe, reader, about[:tested]), "posts": len(marked)}
        result[question] |= tables(of_posts(probe, reader, marked, samples, seed), seed)
    return result


def classified(probe: Probe, reader: Reader, records: Sequence[Record]) -> dict[str, float]:
    """How the model answers: F1 of yes, of always saying yes, AUROC, and how often it says yes."""
    from sklearn.metrics import f1_score

    truth = {one.id: one.label == "yes" for one in records}
    examples = encoded(probe, reader, records)
    odds = np.array([Asked(probe, one).odds([one.post])[0] for one in examples])
    yes = np.array([truth[one.id] for one in examples])
    f1, always = (float(f1_score(yes, said, zero_division=0.0)) for said in (odds > 0, np.ones_like(yes)))
    return {"tested": len(yes), "F1": f1, "F1 of always yes": always, "AUROC": auroc(odds, yes),
            "says yes": float((odds > 0).mean())}  # fmt: skip


def tables(found: Sequence[dict[str, dict[str, float]]], seed: int) -> dict[str, Any]:
    """Means over posts with intervals, tests against SHAP, and rank correlations of agreement and cost."""
    names = list(found[0])
    columns = {name: {key: np.array([post[name][key] for post in found]) for key in found[0][name]} for name in names}
    maps = [name for name in names if name not in (*RANDOM, PEOPLE)]
    ours = [name for name in maps if name not in PEERS]
    rows: dict[str, Any] = {}
    for name, column in columns.items():
        rows[name] = {key: (float(values.mean()), *(bootstrap_ci(values, seed=seed) or (math.nan, math.nan)))
                      for key, values in column.items()}  # fmt: skip
        if name != PEOPLE:
            rows[name]["over posts"] = rank_correlation(column["AUPRC"], column["cost"], seed)
        if "SHAP" in columns and name not in ("SHAP", PEOPLE):
            apart = column["F"] - columns["SHAP"]["F"]
            rows[name]["less SHAP"] = (float(apart.mean()), *(bootstrap_ci(apart, seed=seed) or (math.nan, math.nan)))
            rows[name]["p"] = sign_flip(apart, seed)
    if "SHAP" in columns:
        for name, p in zip(ours, holm([rows[name]["p"] for name in ours]), strict=True):
            rows[name]["p by Holm"] = p
    table = np.array([[[post[name][key] for name in maps] for key in ("AUPRC", "cost")] for post in found])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy_stats.ConstantInputWarning)
        ranks = np.array([scipy_stats.spearmanr(*post).statistic for post in table])
    kept = ranks[np.isfinite(ranks)]
    low, high = bootstrap_ci(kept, seed=seed) or (math.nan, math.nan)
    mean = float(kept.mean()) if len(kept) else math.nan
    return {"methods": rows, "over maps": (mean, low, high), "over maps, posts": len(kept)}


def rank_correlation(a: np.ndarray, b: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Spearman's, with a 95 % bootstrap interval over posts; NaN where one side is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan, math.nan, math.nan

    def statistic(x: np.ndarray, y: np.ndarray) -> float:
        return scipy_stats.spearmanr(x, y).statistic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a draw may hold one post many times
        ends = scipy_stats.bootstrap(
            (a, b), statistic, paired=True, vectorized=False, n_resamples=1000, method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    return float(statistic(a, b)), float(ends.low), float(ends.high)


def sign_flip(apart: np.ndarray, seed: int) -> float:
    """Two-sided p-value of a mean difference of pairs."""
    found = scipy_stats.permutation_test(
        (apart,), np.mean, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(seed)
    )
    return float(found.pvalue)


# --- Output ---


def cell(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """A mean and its interval."""
    shown = [f"{scale * value:.{digits}f}" if math.isfinite(value) else "–" for value in values]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def show(result: dict[str, Any]) -> None:
    """Both tables in Markdown."""
    for question, one in result.items():
        print(f"\n## {question}: {one['posts']} posts\n\nThe model: F1 {100 * one['F1']:.1f} over {one['tested']} "
              f"posts (always yes: {100 * one['F1 of always yes']:.1f}), AUROC {one['AUROC']:.3f}, says yes to "
              f"{100 * one['says yes']:.0f} %.\n")  # fmt: skip
        print("| map | ROUGE-1 P | R | F | less SHAP's F | p (Holm) | word F1 | AUPRC |\n|---|" + "--:|" * 7)
        for name, row in one["methods"].items():
            apart = cell(row["less SHAP"], 100) if "less SHAP" in row else ""
            p = f"{row['p']:.4f}" + (f" ({row['p by Holm']:.4f})" if "p by Holm" in row else "") if "p" in row else ""
            print(f"| {name} | {100 * row['P'][0]:.1f} | {100 * row['R'][0]:.1f} | {cell(row['F'], 100)} | {apart} | "
                  f"{p} | {cell(row['word F1'], 100)} | {cell(row['AUPRC'], 100)} |")  # fmt: skip
        for name, (p, r, f) in PUBLISHED[question].items():
            print(f"| *{name} of MentalBERT on IRF, published* | *{p:.1f}* | *{r:.1f}* | *{f:.1f}* | | | | |")
        print("\n| map | nats that hiding its words costs | with AUPRC, over posts |\n|---|--:|--:|")
        for name, row in one["methods"].items():
            ranks = cell(row["over posts"], digits=2) if "over posts" in row else ""
            print(f"| {name} | {cell(row['cost'], digits=2)} | {ranks} |")
        print(f"\nOver the maps of a post, agreement and cost: {cell(one['over maps'], digits=2)}, "
              f"mean of {one['over maps, posts']} posts.")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--data", type=Path, help="IRF's folder with train.csv, val.csv, test.csv")
    where.add_argument("--twin", action="store_true", help="made-up words instead")
    parser.add_argument("--model", help="any model directory or Hub id, instead of a small GLM trained here")
    parser.add_argument("--adapter", help="a PEFT adapter of it")
    parser.add_argument("--keep", type=Path, help="where the small GLM is saved")
    for name, value, said in (
        ("posts", 40, "explained, of each question"), ("samples", 500, "calls of the model for LIME, SHAP and Shapley "
        "values of words"), ("tested", 10**6, "posts that the classifier's F1 is of, at most"),
        ("steps", 400, "of training"), ("seed", 0, "of all that is drawn"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=said)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    try:
        result = carried_out(given)
    except (MentalGLMError, ProbeError) as error:
        print(f"rationales: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(result)) if given.json else show(result)


def carried_out(given: argparse.Namespace) -> dict[str, Any]:
    """Data, model and both tables, by the command's options."""
    with tempfile.TemporaryDirectory() as made:
        records = list(iter_irf(twin(Path(made), seed=given.seed) if given.twin else given.data))
        model = given.model or trained([one for one in records if one.split == "train"],
                                       given.keep or Path(made) / "model", given.steps, given.seed)  # fmt: skip
        probe, reader = Probe.from_pretrained(model, given.adapter), Reader(model)
        return study(probe, reader, records, given.posts, given.samples, given.tested, given.seed)


if __name__ == "__main__":
    main()
