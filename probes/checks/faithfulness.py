"""Do the words an explanation cites matter to the label, and do they suffice for it?

Comprehensiveness and sufficiency (DeYoung et al. 2020, ERASER), of the cited spans instead of a method's top tokens, in
nats of the label's log-odds, each against the same spans moved elsewhere in the same post.
"""

from collections.abc import Sequence

import numpy as np
import torch

from probes import stats
from probes.citations.clauses import clause_tokens, saying_tokens
from probes.errors import ProbeInputError
from probes.models.probed import Probed
from probes.records import Check, Example, Span


def cited_effects(
    probe: Probed,
    example: Example,
    spans: Sequence[Span],
    target: str = "label",
    n_null: int = 20,
    eraser: str = "attention",
) -> tuple[Check, Check]:
    """Necessity and sufficiency of spans of the post.

    * necessity = s(x) - s(x without the spans): high if the score needs them.
    * sufficiency = s(x with only the spans) - s(x): near 0 if they are enough, negative if the rest was needed too.

    The null moves the spans round the post by clauses (evenly spaced rotations): what is cited of a clause, a third of
    it or all, is put at the same place of another. Shifts by tokens would straddle clauses and take in punctuation,
    which citations do not, and reject true nulls (``probes validate``, V10). Punctuation is neither erased nor kept.

    Args:
        spans: characters of the post; tokens overlapping them are meant, without those of only punctuation or space.
        target: "label" or another target of ``Scorer.forward``.
        n_null: most rotations; there are one fewer than clauses.
        eraser: "attention" or "neutral" (``Forward.kept``).
    Returns:
        the checks "necessity" and "sufficiency"; p = (1 + null values at least as large) / (1 + rotations), so never
        below 1 / (1 + n_null), nor below 1 / clauses. Below 3 clauses there is a value and no null.
    Raises:
        ProbeInputError: a span outside the post, or the row lacks the target.
    """
    if any(not 0 <= a < b <= len(example.post) for a, b in spans):
        raise ProbeInputError(f"{example.id}: a cited span is outside the post of {len(example.post)} characters")
    first, last = example.post_tok
    size = last - first
    cited = example.touched(spans)  # nothing, where all that is cited lies in border tokens, which stay
    holds = saying_tokens(example)
    cited &= holds
    owner = clause_tokens(example)[1]
    places = [found for clause in range(owner.max() + 1) if len(found := np.flatnonzero(holds & (owner == clause)))]
    clauses = len(places)
    if not cited.any() or cited[holds].all():
        return _check("necessity", None, np.empty(0)), _check("sufficiency", None, np.empty(0))
    count = min(n_null, clauses - 1) if clauses >= 3 else 0
    shifts = [round(clauses * (index + 1) / (count + 1)) for index in range(count)]
    masks = np.stack([cited, *(_moved(cited, places, shift) for shift in shifts)])
    keep = torch.as_tensor(np.concatenate([np.ones((1, size), dtype=bool), ~masks, masks]))
    scores = probe.scorer.forward(example, (target,)).kept(keep, eraser)[:, 0].double().cpu().numpy()
    without, only = scores[0] - scores[1 : len(masks) + 1], scores[len(masks) + 1 :] - scores[0]
    return _check("necessity", without[0], without[1:]), _check("sufficiency", only[0], only[1:])


def _moved(cited: np.ndarray, places: Sequence[np.ndarray], shift: int) -> np.ndarray:
    """The citation some clauses on: what it held of each, at the same place of the other. bool [post tokens].

    Args:
        places: per clause, the tokens that say something.
    """
    moved = np.zeros(len(cited), dtype=bool)
    for clause, tokens in enumerate(places):
        onto = places[(clause + shift) % len(places)]
        starts, ends = stats.runs(cited[tokens])
        for a, b in zip(starts, ends, strict=True):
            low = min(round(a * len(onto) / len(tokens)), len(onto) - 1)
            moved[onto[low : max(low + 1, round(b * len(onto) / len(tokens)))]] = True
    return moved


def _check(name: str, value: float | None, null: np.ndarray) -> Check:
    if value is None:
        return Check(name, "erase", None, None, None, None, None, None, 0, "abstain", ())
    if not len(null):
        return Check(name, "erase", float(value), None, None, None, None, None, 1, "ok", ())
    low, high = (float(number) for number in np.quantile(null, [0.05, 0.95]))
    p = (1 + int((null >= value).sum())) / (1 + len(null))
    draws = tuple(null.tolist())
    return Check(name, "erase", float(value), float(null.mean()), low, high, p, None, len(null), "ok", (), draws)
