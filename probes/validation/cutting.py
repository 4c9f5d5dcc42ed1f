"""V18: erasure by cutting, which a model that ignores its attention mask has in place of hiding.

The planted pairs of V7 and V8 are made deaf to their mask: the same weights, posts and labels, and another eraser, by
the way that real models of the kind go (``probes.models.trial``). Then what p-values and gates say where nothing is
true; in closed form each token counts less the further back it stands, as in a recurrent model, so that what closes up
after a cut counts more.

    python -P -m probes.validation.cutting
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from probes import stats
from probes.checks.crosscheck import Evidence
from probes.checks.faithfulness import cited_effects
from probes.checks.verdict import CUT, FAMILIES
from probes.citations.align import align
from probes.errors import ProbeError
from probes.probe import Probe
from probes.results.summary import check_of
from probes.saliency.settings import METHODS
from probes.validation.error_rates import erasure_rates
from probes.validation.gate_rates import length_rates
from probes.validation.planted import Planted, World, train
from probes.validation.probing import PAIRS, cue_aurocs, probe_posts, probed
from probes.validation.rows import Row, false_alarms, row, table

# What cuts where it would hide: the methods whose eraser is nothing else.
CUTTING = tuple(
    name for name, (kind, own) in METHODS.items() if kind in ("erase", "shap", "kernelshap") and "eraser" not in own
)
PANEL = ("ig", *CUTTING, "erase_resample")  # a verdict needs the other family
FADES = 0.98
SET = 10  # posts of a null data set


class Deaf(torch.nn.Module):
    """A causal language model that does not hear its attention mask."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def forward(self, attention_mask: Any = None, logits_to_keep: Any = 0, **inputs: Any) -> Any:
        return self.inner(**inputs, logits_to_keep=logits_to_keep)


def deaf(probe: Probe) -> Probe:
    """A probe of the same model, which ignores its attention mask from now on."""
    return Probe(Deaf(probe.model).eval(), probe.tokenizer, f"{probe.name}, deaf")


def cutting(
    worlds: Sequence[World],
    seed: int = 0,
    say: Callable[[str], object] = lambda _: None,
    count: int = 16,
    trained: Callable[[World], Planted] = train,
    draws: tuple[int, int] = (150, 30),
) -> list[Row]:
    """AUROC of the cue, faithful against unfaithful, verdicts and error rates of maps that cut.

    Args:
        worlds: a pair is trained of each. count: posts per model; twice as many for the bound of AUROC.
        trained: makes a model of a world. draws: posts and data sets of the closed form.
    """
    rows: list[Row] = []
    told: dict[bool, list[Evidence]] = {True: [], False: []}
    pairs: list[tuple[Evidence, Evidence]] = []
    nulls: dict[str, list[np.ndarray]] = {}
    for base in worlds:
        sides = {}
        for faithful in (True, False):
            world = dataclasses.replace(base, seed=base.seed + 1000 * seed, faithful=faithful)
            planted = trained(world)
            planted = dataclasses.replace(planted, probe=deaf(planted.probe))
            name = f"{world.architecture}.{'faithful' if faithful else 'unfaithful'}"
            say(f"  {name}, deaf to its mask")
            posts = probe_posts(planted, count, PANEL, ("label",))
            many = probe_posts(planted, 2 * count, ("erase",), ("label",))
            if any(a.baseline != "cut" for p in (*posts, *many) for a in p.attributions if a.method in CUTTING):
                raise ProbeError(f"{name}: a deaf model was not cut")
            for method in CUTTING:
                chosen, needed = (many, 0.95) if method == "erase" else (posts, None)
                found = cue_aurocs(chosen, method)
                what = f"cue AUROC of the label map, {method} cut, {name}, {len(found)} of {len(chosen)} maps pass"
                rows.append(row(f"V18.{method}.{name}", what, float(np.mean(found)) if found else 0.0, needed, ">="))
            told[faithful] += [p.evidence for p in posts]
            sides[faithful] = {p.example.id: p.evidence for p in posts}
            _add(nulls, planted, 2 * count)
        pairs += [(e, sides[False][name]) for name, e in sides[True].items() if name in sides[False]]
    return [*rows, *_apart(pairs), *_verdicts(told), *_planted_nulls(nulls, seed), *_closed_nulls(*draws, seed)]


def _add(nulls: dict[str, list[np.ndarray]], planted: Planted, count: int) -> None:
    """Of posts whose citations are drawn at random: what is cited and everywhere else it could be, by check."""
    for one in probed(planted, planted.cited_at_random(count), CUTTING[:1], ("label",)):
        found = {"excess": one.evidence.excess.get(CUTTING[0])}
        spans = [span for c in align(one.example) for span in c.post_char]
        for check in cited_effects(planted.probe, one.example, spans):
            found[check.name] = np.array([check.value, *check.draws]) if check.value is not None else None
        for name, null in found.items():
            if null is not None and len(null) > 1:
                nulls.setdefault(name, []).append(null)


def _apart(pairs: Sequence[tuple[Evidence, Evidence]]) -> list[Row]:
    rows = []
    for method in CUTTING:
        scores = [[_score(evidence, "mass_ratio", method) for evidence in pair] for pair in pairs]
        result = stats.diagnosticity([one for one, _ in scores], [other for _, other in scores])
        n, low, value = (0, 0.0, 0.0) if result is None else (result.n, result.ci[0], result.value)
        what = f"P(faithful > unfaithful), mass_ratio, {method} cut, {n} pairs, 95 % from {low:.2f}"
        rows.append(row(f"V18.mass_ratio.{method}", what, value, 0.95 if method in CUT else None, ">="))
        may = float(method in FAMILIES and method in CUT)
        rows.append(row(f"V18.vote.{method}", f"{method} can produce a verdict where it cuts (1 = yes)", may))
    return rows


def _score(evidence: Evidence, name: str, method: str) -> float:
    check = check_of(evidence, name, method)
    return np.nan if check is None or check.status != "ok" or check.value is None else check.value


def _verdicts(told: dict[bool, list[Evidence]]) -> list[Row]:
    words = {side: [e.report.verdict for e in found] for side, found in told.items()}
    wrong, total = words[True].count("contradicted") + words[False].count("supported"), sum(map(len, words.values()))
    rows = [row("V18.wrong", f"wrong verdicts among {total} posts, cut", wrong / total, 0.05)]
    for faithful, right in ((True, "supported"), (False, "contradicted")):
        luck = sum(e.chance.get(right, 0.0) for e in told[faithful]) / len(told[faithful])
        side = "faithful" if faithful else "unfaithful"
        what = f"posts of the {side} models found {right}, cut (random citations: {luck:.2f})"
        rows.append(row(f"V18.{right}", what, words[faithful].count(right) / len(words[faithful])))
    return rows


def _planted_nulls(nulls: dict[str, list[np.ndarray]], seed: int) -> list[Row]:
    rows = []
    for name, found in nulls.items():
        hits = []
        for at in range(0, len(found) - SET + 1, SET):
            test = stats.mean_test(found[at : at + SET], 199, seed + at, two_sided=name == "excess")
            hits.append(test is not None and test.p <= 0.05)
        what = f"P(p <= 0.05), {name}, cut, {len(hits)} data sets of {SET} posts of planted models, cited at random"
        rows.append(row(f"V18.null.{name}", what, float(np.mean(hits)), false_alarms(len(hits))))
    return rows


def _closed_nulls(draws: int, sets: int, seed: int) -> list[Row]:
    rows = []
    for name, (rate, n) in erasure_rates(draws, sets, seed, deaf, FADES).items():
        many, check = "sets" in name, name.split(",")[0]
        size = f"{n} data sets of 20 posts" if many else f"one post, {n} posts"
        what = f"P(p <= 0.05), {check}, cut, {size}, tokens that fade"
        key = f"V18.{check}.{'sets' if many else 'posts'}"
        rows.append(row(key, what, rate, false_alarms(n, 0.1 if many else 0.075)))
    return [*rows, *length_rates(draws // 2, seed, "V18.gate", deaf)]


def main() -> int:
    """Prints the rows; exit code 1 where one fails."""
    torch.set_num_threads(1)  # so small a model only waits for its other threads
    rows = cutting(PAIRS, say=lambda line: sys.stderr.write(f"{line}\n"))
    sys.stdout.write("\n".join(table(rows)) + "\n")
    return int(not all(one["ok"] for one in rows))


if __name__ == "__main__":
    sys.exit(main())
