"""People's rationales against maps of one model: IRF, every map with a vote beside LIME, SHAP and random words.

    python -P benchmarks/rationales.py --data irf-acl/data [--posts 40] [--model DIR [--adapter DIR]] [--json]
    python -P benchmarks/rationales.py --twin [--posts 12]

(-P keeps this folder, whose probes.py is called like the package, out of the import path.)

IRF (Garg et al., ACL Findings 2023; the repository am-shb/irf-acl, folder data) marks one phrase of each post that
shows thwarted belongingness (TBe) or perceived burdensomeness (PBu). A small GLM is trained on its train split to
answer both questions, or MODEL is taken as it is, asked by the same prompt; posts are those of the test split that have
a phrase and that it answers with yes. ``--twin`` writes a table of the same columns in made-up words, where a phrase
decides.

LIME and SHAP are their own packages (``pip install lime shap``; without them their rows are left out). As in the
paper's code, the ten words with the largest weight stand against the phrase, ROUGE-1 over sets of words; random words
and random stretches as long as the phrase stand beside. Word F1 takes as many words as the phrase has; AUPRC ranks all.
Intervals are bootstrap over posts (95 %); p is a sign-flip test of ROUGE-1 F against SHAP's on the same posts.
The second table: what hiding each method's words costs the label (nats), and its rank correlation with word F1.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probes.probe import Probe
from probes.records import Example
from probes.saliency.attribute import Settings, attribute

WORD = re.compile(r"\S+")
MAPS = ("ig", "erase", "erase_resample")
ANSWERS = {"yes": " yes", "no": " no"}
QUESTIONS = {"belong": "Does it show thwarted belongingness?", "burden": "Does it show perceived burdensomeness?"}
PUBLISHED = {  # of MentalBERT, in their paper: other models, so metrics may be compared, numbers not
    "belong": {"LIME": (14.24, 53.05, 20.88), "SHAP": (15.74, 50.16, 22.27)},
    "burden": {"LIME": (18.47, 46.83, 25.18), "SHAP": (20.77, 49.89, 27.92)},
}
TOP = 10
PROMPT = "[gMASK]<sop><|user|>post: {} {}<|assistant|>"


@dataclass(frozen=True)
class Marked:
    """One question about one post: the answer, and the span that people marked."""

    post: str
    question: str
    label: str
    span: tuple[int, int] | None
    split: str


def read(data: Path) -> list[Marked]:
    """IRF by the package's own loader."""
    from mentalglm_jax.data.rationales import iter_irf

    found, order = [], list(QUESTIONS)
    for at, one in enumerate(iter_irf(data)):
        span = one.rationales[0] if one.rationales else None
        found.append(Marked(one.post, order[at % 2], str(one.label), None if span is None else tuple(span), one.split))
    return found


def twin(directory: Path, count: int = 600, seed: int = 0) -> Path:
    """IRF's columns in made-up words: a phrase of three words, the first of which decides; nothing else is real."""
    import csv

    rng = random.Random(seed)
    words = [
        "".join(rng.choice("bdgklmnprstv") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))) for _ in range(60)
    ]
    keys = {"belong": words[:4], "burden": words[4:8]}
    for part, size in (("train", count), ("val", count // 10), ("test", count // 4)):
        with open(directory / f"{part}.csv", "w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(["text", "belong", "belong_exp", "burden", "burden_exp"])
            for _ in range(size):
                parts = [[rng.choice(words[8:]) for _ in range(rng.randint(3, 5))] for _ in range(rng.randint(4, 7))]
                row: dict[str, str] = {}
                for name, places in zip(keys, (0, 1), strict=True):
                    shows = rng.random() < 0.5
                    if shows:
                        parts[places] = [rng.choice(keys[name]), *parts[places][:2]]
                    row |= {name: str(int(shows)), f"{name}_exp": " ".join(parts[places]) if shows else ""}
                rng.shuffle(parts)
                text = ", ".join(" ".join(part) for part in parts)
                out.writerow([text, row["belong"], row["belong_exp"], row["burden"], row["burden_exp"]])
    return directory


def row_of(probe: Any, one: Marked, label: str, name: str = "a") -> dict[str, Any]:
    """A row of generations.jsonl that answers ``label``."""
    encode = probe.token_bytes.encode
    return {
        "id": name, "post": one.post, "prompt_ids": encode(PROMPT.format(one.post, QUESTIONS[one.question])),
        "output_ids": encode(ANSWERS[label]), "label_text": ANSWERS[label], "parsed_label": label,
        "candidates": ANSWERS, "rationales": None if one.span is None else [list(one.span)],
    }  # fmt: skip


def trained(rows: Sequence[Marked], steps: int, seed: int) -> Probe:
    """A GLM of two layers that answers both questions, trained from scratch."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [PROMPT.format(one.post, QUESTIONS[one.question]) for one in rows]
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    )
    specials = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"]
    core.add_special_tokens(specials)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=specials[0], pad_token=specials[0]
    )
    torch.manual_seed(seed)
    config = transformers.GlmConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, attention_bias=True, max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model: Any = transformers.GlmForCausalLM(config).train()
    probe = Probe(model.eval(), tokenizer, "small GLM")
    for weight in model.train().parameters():
        weight.requires_grad_(True)
    made = [row_of(probe, one, one.label) for one in rows if one.label in ANSWERS]
    ids = [[*row["prompt_ids"], *row["output_ids"]] for row in made if len(row["prompt_ids"]) < 400]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    rng = random.Random(seed)
    for _ in range(steps):
        chosen = rng.sample(ids, 16)
        size = max(map(len, chosen))
        batch = torch.zeros(16, size, dtype=torch.long)
        for at, one in enumerate(chosen):  # padded on the left: the answer is the last token of all
            batch[at, size - len(one) :] = torch.tensor(one)
        mask = (torch.arange(size) >= size - torch.tensor([len(one) for one in chosen])[:, None]).long()
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=batch[:, :-1], attention_mask=mask[:, :-1], position_ids=places[:, :-1]).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, batch[:, -1])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return Probe(model.eval(), tokenizer, "small GLM")


def odds(probe: Probe, texts: Sequence[str], question: str) -> np.ndarray:
    """Log-odds of yes for each text, float64 ``[texts]``, nats."""
    encode = probe.token_bytes.encode
    prompts = [encode(PROMPT.format(text, QUESTIONS[question])) for text in texts]
    sequences = [[*prompt, *encode(answer)] for prompt in prompts for answer in ANSWERS.values()]
    found = probe.scorer.logprobs(sequences, [len(prompt) for prompt in prompts for _ in ANSWERS]).numpy()
    return found[0::2] - found[1::2]


def words_of(post: str) -> list[tuple[int, int]]:
    """Character spans of what spaces part."""
    return [match.span() for match in WORD.finditer(post)]


def lime_scores(probe: Probe, one: Marked, samples: int, seed: int) -> np.ndarray:
    """LIME's weight of each word, its own defaults; words that are equal share one weight."""
    from lime.lime_text import LimeTextExplainer  # pyright: ignore[reportMissingImports]

    def chances(texts: Sequence[str]) -> np.ndarray:
        yes = 1 / (1 + np.exp(-odds(probe, texts, one.question)))
        return np.stack([1 - yes, yes], 1)

    found = LimeTextExplainer(split_expression=r"\s+", random_state=seed).explain_instance(
        one.post, chances, num_features=len(words_of(one.post)), num_samples=samples
    )
    weights = dict(found.as_list())
    return np.array([weights.get(one.post[a:b], 0.0) for a, b in words_of(one.post)])


def shap_scores(probe: Probe, one: Marked, samples: int, seed: int) -> np.ndarray:
    """shap's partition explainer with its text masker over the same words."""
    import shap  # pyright: ignore[reportMissingImports]

    spans = words_of(one.post)

    def cut(text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": [text[a:b] for a, b in words_of(text)], "offset_mapping": words_of(text)}

    masker = shap.maskers.Text(cut, mask_token="...", collapse_mask_token=False)
    explain = shap.Explainer(lambda texts: odds(probe, list(texts), one.question), masker, seed=seed)
    values = np.asarray(explain([one.post], max_evals=max(samples, 2 * len(spans) + 1), silent=True).values[0]).ravel()
    return values[: len(spans)]


def map_scores(probe: Probe, example: Example, fillers: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Each map's net value of each word."""
    maps = attribute(probe, example, MAPS, ("label",), Settings(), fillers)
    return {one.method: np.array([one.char_values[a:b].sum() for a, b in words_of(example.post)]) for one in maps}


def rouge1(said: str, wanted: str) -> tuple[float, float, float]:
    """Precision, recall and F of the sets of words, as the paper's package counts: a full stop parts words too."""
    ours, theirs = (set(text.replace(".", " ").split()) for text in (said, wanted))
    both = len(ours & theirs)
    precision, recall = (both / len(side) if side else 0.0 for side in (ours, theirs))
    return precision, recall, 2 * precision * recall / (precision + recall) if both else 0.0


def measure(probe: Probe, example: Example, one: Marked, scores: np.ndarray) -> dict[str, float]:
    """All numbers of one map of one post."""
    from sklearn.metrics import average_precision_score

    assert one.span is not None
    spans, (low, high) = words_of(one.post), one.span
    marked = np.array([a < high and b > low for a, b in spans])
    order = np.argsort(-scores, kind="stable")
    p, r, f = rouge1(" ".join(one.post[slice(*spans[at])] for at in order[:TOP]), one.post[low:high])
    chosen = order[: int(marked.sum())]
    forward = probe.scorer.forward(example, ("label",))
    keep = torch.ones(2, len(forward.post), dtype=torch.bool)
    keep[1] = ~torch.as_tensor(example.touched([spans[at] for at in chosen]))
    kept = forward.kept(keep)[:, 0]
    return {
        "P": p, "R": r, "F": f, "word F1": float(marked[chosen].mean()),
        "AUPRC": float(average_precision_score(marked, scores)), "comprehensiveness": float(kept[0] - kept[1]),
    }  # fmt: skip


def interval(values: np.ndarray, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def paired(a: np.ndarray, b: np.ndarray, seed: int = 0, draws: int = 9999) -> float:
    """Two-sided sign-flip p-value of the mean difference."""
    rng, apart = np.random.default_rng(seed), a - b
    flips = (rng.choice((-1.0, 1.0), size=(draws, len(apart))) * apart).mean(1)
    return float((1 + (np.abs(flips) >= abs(apart.mean()) - 1e-12).sum()) / (1 + draws))


def study(probe: Probe, rows: Sequence[Marked], posts: int, samples: int, seed: int) -> dict[str, Any]:
    """Both tables for both questions."""
    from sklearn.metrics import f1_score

    from probes.citations.clauses import pieces

    result: dict[str, Any] = {}
    peers: dict[str, Callable[..., np.ndarray]] = {}
    if find_spec("lime") is not None:
        peers["LIME"] = lime_scores
    if find_spec("shap") is not None:
        peers["SHAP"] = shap_scores
    for question in QUESTIONS:
        tested = [one for one in rows if one.split == "test" and one.question == question and one.label in ANSWERS]
        said = odds(probe, [one.post for one in tested], question) > 0
        f1 = float(f1_score([one.label == "yes" for one in tested], said))
        usable = [one for one, yes in zip(tested, said, strict=True) if yes and one.span and one.label == "yes"][:posts]
        texts = [[one.post[a:b] for a, b in pieces(one.post)] for one in usable]
        found: dict[str, list[dict[str, float]]] = {}
        for at, one in enumerate(usable):
            rng, spans = np.random.default_rng(seed + at), words_of(one.post)
            example = probe.encode(row_of(probe, one, "yes", str(at)))
            scores = map_scores(
                probe, example, tuple(t for other, part in enumerate(texts) if other != at for t in part)
            )
            for name, run in peers.items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    scores[name] = run(probe, one, samples, seed)
            size = sum(a < one.span[1] and b > one.span[0] for a, b in spans) if one.span else 1
            begin = int(rng.integers(len(spans) - size + 1))
            scores["random words"] = rng.random(len(spans))
            scores["random stretch"] = ((np.arange(len(spans)) - begin) % len(spans) < size) + 1e-3 * rng.random(
                len(spans)
            )
            for name, values in scores.items():
                found.setdefault(name, []).append(measure(probe, example, one, values))
        result[question] = {"classifier F1": f1, "posts": len(usable), "methods": _tables(found)}
    return result


def _tables(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    from scipy.stats import spearmanr

    columns = {name: {key: np.array([one[key] for one in rows]) for key in rows[0]} for name, rows in found.items()}
    tables: dict[str, Any] = {}
    for name, one in columns.items():
        tables[name] = {key: (float(values.mean()), *interval(values)) for key, values in one.items()}
        if "SHAP" in columns and name != "SHAP":
            tables[name]["p against SHAP"] = paired(one["F"], columns["SHAP"]["F"])
        rank = spearmanr(one["word F1"], one["comprehensiveness"]).statistic if len(one["F"]) > 2 else np.nan
        tables[name]["rank correlation"] = float(rank)
    return tables


def show(result: dict[str, Any]) -> None:
    """Both tables in plain text."""
    for question, one in result.items():
        print(f"\n{question}: {one['posts']} posts, classifier F1 {100 * one['classifier F1']:.1f}")
        for name, row in one["methods"].items():
            cells = [f"{key} {100 * row[key][0]:.1f} ({100 * row[key][1]:.1f} to {100 * row[key][2]:.1f})"
                     for key in ("P", "R", "F", "word F1", "AUPRC")]  # fmt: skip
            p = f"; p against SHAP {row['p against SHAP']:.4f}" if "p against SHAP" in row else ""
            print(f"  {name:15} {', '.join(cells)}{p}")
        for name, numbers in PUBLISHED[question].items():
            print(f"  {name} of MentalBERT, published: P {numbers[0]}, R {numbers[1]}, F {numbers[2]}")
        print("  agreement and faithfulness:")
        for name, row in one["methods"].items():
            cost = row["comprehensiveness"]
            print(f"  {name:15} hiding its words costs {cost[0]:.2f} nats ({cost[1]:.2f} to {cost[2]:.2f}), rank "
                  f"correlation with word F1 {row['rank correlation']:+.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--data", type=Path, help="IRF's folder with train.csv, val.csv, test.csv")
    where.add_argument("--twin", action="store_true", help="made-up words instead")
    parser.add_argument("--model", help="a model directory, instead of a small GLM trained here")
    parser.add_argument("--adapter")
    for name, value in (("posts", 40), ("samples", 500), ("steps", 400), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        rows = read(twin(Path(made), seed=given.seed) if given.twin else given.data)
    train = [one for one in rows if one.split == "train"]
    probe = (
        Probe.from_pretrained(given.model, given.adapter) if given.model else trained(train, given.steps, given.seed)
    )
    result = study(probe, rows, given.posts, given.samples, given.seed)
    print(json.dumps(result)) if given.json else show(result)


if __name__ == "__main__":
    main()
