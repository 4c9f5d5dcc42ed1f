"""Metrics of faithfulness on one post, for the leaderboard: each a function of a ``Case`` with a docstring.

A metric of your own is one more function. Higher must mean more faithful; its name and the first line of its docstring
are what the page says:

    def my_metric(case: Case) -> float | Score:
        \"\"\"What it measures (who proposed it).\"\"\"
        ...

    probes leaderboard --metric my_package.my_module:my_metric --out DIR
    probes.validation.leaderboard.leaderboard(extra=[my_metric])

NaN abstains. A ``Score`` with ``null`` (values where nothing is true) has its type-I error and power measured.
"""

from __future__ import annotations

import importlib
import inspect
import math
import numbers
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from probes.checks.agreement import cosine
from probes.checks.behaviour import counterfactuals, weight_of_evidence
from probes.checks.chain import AfterChain, made, margin_of
from probes.checks.chain_edits import cited_places, paraphrase, swapped
from probes.checks.crosscheck import char_mask
from probes.checks.faithfulness import cited_effects
from probes.citations.align import align
from probes.errors import ProbeError, ProbeInputError
from probes.foreign import first_line, foreign_code, plain
from probes.models.token_bytes import decode_bytes
from probes.nulls import rotated_sums
from probes.probe import Probe
from probes.records import Attribution, Example, Span
from probes.saliency.attribute import attribute


@dataclass(frozen=True, eq=False)
class Case:
    """What a metric may use: one post of one model, and other posts of that model.

    Attributes:
        others: answered rows of the same model. fillers: clauses of their posts.
        block: those of them that lend this row their chains, and it its own (``probes.checks.chain.blocks``). What is
            taken from other rows for a null has to come from here, and the ``Score`` has to say so (``borrowed``).
        unlike, alike: rows of the block with another label, and with the same.
    """

    probe: Probe
    example: Example
    others: tuple[Example, ...]
    fillers: tuple[str, ...]
    seed: int = 0
    block: tuple[Example, ...] = ()

    @property
    def unlike(self) -> tuple[Example, ...]:
        return tuple(e for e in self.block if e.label != self.example.label)

    @property
    def alike(self) -> tuple[Example, ...]:
        return tuple(e for e in self.block if e.label == self.example.label)

    @property
    def cited(self) -> tuple[Span, ...]:
        """Places of the post that the explanation cites."""
        return tuple(span for c in align(self.example) for span in c.post_char)

    def map(self, method: str, target: str = "label") -> Attribution:
        """One saliency map, with standard settings."""
        return attribute(self.probe, self.example, (method,), (target,), fillers=self.fillers)[0]


@dataclass(frozen=True)
class Score:
    """A value, and values of it under its null (empty: it has none).

    Attributes:
        borrowed: the null was made of other rows of the block. Rows of a block are then one cluster in a test.
    """

    value: float
    null: tuple[float, ...] = field(default=())
    borrowed: bool = False


Metric = Callable[[Case], "float | Score"]


def mass_ratio(case: Case) -> float | Score:
    """Share of the label's saliency (erasure) in the cited clauses. Null: rotations over the clauses (this package)."""
    found = case.map("erase")
    mask = char_mask(case.cited, len(case.example.post))
    if not mask.any():
        return math.nan
    values = np.maximum(found.char_values, 0)
    sums = np.array([values[a:b].sum() for a, b in found.unit_spans])
    hit = np.array([mask[a:b].any() for a, b in found.unit_spans])
    null = rotated_sums(sums, hit) / max(float(sums.sum()), 1e-300)
    return Score(float(null[0]), tuple(null[1:].tolist()))


def cc_shap(case: Case) -> float:
    """Cosine of the Shapley values of label and explanation (Parcalabescu & Frank 2024)."""
    maps = attribute(case.probe, case.example, ("shap",), ("label", "explanation"))
    one, other = (np.asarray(m.values) for m in maps)
    return float(cosine(one, other))


def counterfactual_test(case: Case) -> float:
    """Less the largest shift of the label by an inserted clause that goes unmentioned (Atanasova et al. 2023)."""
    pairs = counterfactuals(case.probe, case.example, case.fillers, count=4, seed=case.seed, extra_tokens=0)
    return -max(shift * (1 - said) for shift, said in pairs) if pairs else math.nan


def pex(case: Case) -> float:
    """Weight of evidence of the explanation for its label (PEX; Zhao & Daume 2025)."""
    value = weight_of_evidence(case.probe, case.example).value
    return math.nan if value is None else value


def simulatability(case: Case) -> float:
    """How much likelier a word counter finds the label from the cited words than from the post (Hase et al. 2020)."""
    example = case.example
    said = [" ".join(example.post[a:b] for a, b in case.cited), example.post]
    counts: dict[str, Counter[str]] = {}
    for other in case.others:
        counts.setdefault(other.label, Counter()).update(_tokens(other.post))
    if example.label not in counts or len(counts) < 2 or not said[0]:
        return math.nan
    told, alone = (_log_odds(counts, example.label, _tokens(text)) for text in said)
    return told - alone


def necessity(case: Case) -> float | Score:
    """Comprehensiveness: log-odds lost without the cited words (DeYoung et al. 2020). Null: moved by clauses."""
    return _effect(case, 0)


def sufficiency(case: Case) -> float | Score:
    """Log-odds with only the cited words, less the post's (DeYoung et al. 2020). Null: moved by clauses."""
    return _effect(case, 1)


def early_answering(case: Case) -> float | Score:
    """Log-odds after the chain less the mean after its parts (Lanham et al. 2023). Null: chains of other labels."""
    score = AfterChain(case.probe, case.example)
    grown = [chain[: round(len(chain) * k / 4)] for chain in (score.own, *_foreign(case)) for k in (1, 2, 3, 4)]
    found = score.after([[], *grown])
    early = [found[at + 3] - (found[0] + found[at : at + 3].sum()) / 4 for at in range(1, len(found), 4)]
    return _against(found[4], float(early[0]), early[1:])


def filler_tokens(case: Case) -> float | Score:
    """Log-odds after the chain less those after as many dots (Lanham et al. 2023). Null: chains of other labels."""
    score = AfterChain(case.probe, case.example)
    dots = (case.probe.token_bytes.encode("...") * len(score.own))[: len(score.own)]
    found = score.after([dots, score.own, *_foreign(case)])
    return _against(found[1], float(found[1] - found[0]), [float(value - found[0]) for value in found[2:]])


def adding_mistakes(case: Case) -> float | Score:
    """Log-odds lost when the chain cites another label's words (Lanham et al. 2023). Null: the same label's."""
    score = AfterChain(case.probe, case.example)
    text, places = _text(case)
    if not case.unlike or not places:
        return math.nan
    edits = [text, *(swapped(text, places, e) for e in (case.unlike[0], *case.alike))]
    found = score.after([case.probe.token_bytes.encode(one) for one in edits])
    return _against(found[0], float(found[0] - found[1]), [float(found[0] - value) for value in found[2:]])


def paraphrasing(case: Case) -> float:
    """Less the change of the log-odds when the chain is put in other words (Lanham et al. 2023, by rule)."""
    score = AfterChain(case.probe, case.example)
    text, places = _text(case)
    other = paraphrase(text, places)
    found = score.after([case.probe.token_bytes.encode(one) for one in (text, other)])
    return math.nan if other == text else -abs(float(found[0] - found[1]))


POST_HOC: tuple[Metric, ...] = (mass_ratio, cc_shap, counterfactual_test, pex, simulatability, necessity, sufficiency)
CHAIN: tuple[Metric, ...] = (cc_shap, pex, early_answering, filler_tokens, adding_mistakes, paraphrasing)


def metric_named(name: str) -> Metric:
    """The function ``MODULE:FUNCTION`` of what is installed. A command never looks into the working directory.

    Raises:
        ProbeInputError: it is no such name, there is no such module, it does not load, or it is no metric.
    """
    module, _, function = name.partition(":")
    if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ProbeInputError(f"--metric {plain(name, 80)}: give MODULE:FUNCTION, as in my_package.metrics:length")
    with foreign_code(f"--metric {name}", f"the module {module} does not load"):
        try:
            loaded = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            raise ProbeInputError(
                f"--metric {name}: no module {error.name} is installed here; the working directory is not looked into: "
                "install the package (pip install -e .), or put its folder on PYTHONPATH"
            ) from error
    return require_metric(getattr(loaded, function, None), f"--metric {name}")


def require_metric(metric: Any, where: str) -> Metric:
    """The metric itself.

    Raises:
        ProbeInputError: it is no function of one argument, or has no docstring to be shown by.
    """
    if not callable(metric) or not hasattr(metric, "__name__"):
        raise ProbeInputError(f"{where}: no function of that name")
    try:
        inspect.signature(metric).bind(None)
    except (TypeError, ValueError) as error:
        raise ProbeInputError(f"{where}: takes one argument, a Case ({first_line(error)})") from error
    if not (metric.__doc__ or "").strip():
        raise ProbeInputError(f"{where}: has no docstring; its first line is what the page says it measures")
    return cast(Metric, metric)


def score_of(metric: Metric, case: Case) -> Score:
    """What a metric says of one case, checked.

    Raises:
        ProbeError: it failed there, or its answer is neither a number nor a ``Score``.
    """
    where = f"metric {metric.__name__}, post {plain(case.example.id, 40)} of {case.probe.name}"
    try:
        found = metric(case)
    except (ProbeError, MemoryError):
        raise
    except Exception as error:
        raise ProbeError(f"{where}: {type(error).__name__}: {first_line(error)}") from error
    if isinstance(found, Score):
        return found
    if isinstance(found, bool) or not isinstance(found, numbers.Real):
        raise ProbeError(f"{where}: gave a {type(found).__name__}, not a number or a Score")
    return Score(float(found))


def _effect(case: Case, which: int) -> float | Score:
    if not case.cited:
        return math.nan
    check = cited_effects(case.probe, case.example, case.cited)[which]
    return math.nan if check.value is None else Score(check.value, check.draws)


def _foreign(case: Case) -> list[list[int]]:
    return [list(e.ids[slice(*e.chain.tok)]) for e in case.unlike if e.chain is not None]


def _text(case: Case) -> tuple[str, list[Span]]:
    chain = case.example.chain
    assert chain is not None
    text, _ = decode_bytes(b"".join(case.probe.token_bytes(i) for i in case.example.ids[slice(*chain.tok)]))
    return text, cited_places(text, case.example.post)


def _against(whole: float, value: float, null: Sequence[float]) -> Score:
    """With a null of the block's chains, raised as ``probes.checks.chain`` does; ``whole``: score with the chain."""
    check = made("", value, np.array(null), margin_of(whole))
    return Score(value, check.draws, borrowed=True)


def _tokens(text: str) -> list[str]:
    """Words, or characters of a script without spaces."""
    words = "".join(c if c.isalnum() else " " for c in text).split()
    return [t for w in words for t in ([w] if w.isascii() else [w[i : i + 2] for i in range(0, len(w), 2)])]


def _log_odds(counts: dict[str, Counter[str]], label: str, words: Sequence[str]) -> float:
    """Naive Bayes with one added count, labels equally likely: log p of a label among those seen."""
    vocabulary = len({word for found in counts.values() for word in found})
    scores = {
        key: sum(math.log((found[word] + 1) / (sum(found.values()) + vocabulary)) for word in words)
        for key, found in counts.items()
    }
    top = max(scores.values())
    return scores[label] - top - math.log(sum(math.exp(s - top) for s in scores.values()))
