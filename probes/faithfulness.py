"""Do the words an explanation cites matter to the label, and do they suffice for it?

Comprehensiveness and sufficiency (DeYoung et al. 2020, ERASER), of the cited spans instead of a method's top tokens, in
nats of the label's log-odds, each against the same spans moved elsewhere in the same post.
"""

from collections.abc import Sequence

import numpy as np
import torch

from probes.errors import ProbeInputError
from probes.model import Check, Example, Probe, Span


def cited_effects(
    probe: Probe,
    example: Example,
    spans: Sequence[Span],
    target: str = "label",
    n_null: int = 20,
    eraser: str = "attention",
) -> tuple[Check, Check]:
    """Necessity and sufficiency of spans of the post.

    * necessity = s(x) - s(x without the spans): high if the score needs them.
    * sufficiency = s(x with only the spans) - s(x): near 0 if they are enough, negative if the rest was needed too.

    The null moves the spans round the post: circular shifts, evenly spaced, keep their lengths and gaps, which random
    tokens would not; a text is smooth, and scattered tokens are an easy null to beat.

    Args:
        spans: characters of the post; tokens overlapping them are meant.
        target: "label" or another target of ``Scorer.forward``.
        n_null: most shifts. Fewer are used where the post is short; under 5 leave no test, and the checks abstain.
        eraser: "attention" or "neutral" (``Forward.kept``).
    Returns:
        the checks "necessity" and "sufficiency"; p = (1 + null values at least as large) / (1 + shifts), so never
        below 1 / (1 + n_null).
    Raises:
        ProbeInputError: a span outside the post, or the row lacks the target.
    """
    if any(not 0 <= a < b <= len(example.post) for a, b in spans):
        raise ProbeInputError(f"{example.id}: a cited span is outside the post of {len(example.post)} characters")
    first, last = example.post_tok
    size = last - first
    cited = np.zeros(size, dtype=bool)
    for a, b in spans:
        low, high = example.tokens_of((example.post_char[0] + a, example.post_char[0] + b), within=(first, last))
        cited[low - first : high - first] = True
    count = min(n_null, size - 1)
    if not cited.any() or cited.all() or count < 5:
        return _check("necessity", None, np.empty(0)), _check("sufficiency", None, np.empty(0))
    shifts = [round(size * (index + 1) / (count + 1)) for index in range(count)]
    masks = np.stack([cited, *(np.roll(cited, shift) for shift in shifts)])
    keep = torch.as_tensor(np.concatenate([np.ones((1, size), dtype=bool), ~masks, masks]))
    scores = probe.scorer.forward(example, (target,)).kept(keep, eraser)[:, 0].double().cpu().numpy()
    without, only = scores[0] - scores[1 : len(masks) + 1], scores[len(masks) + 1 :] - scores[0]
    return _check("necessity", without[0], without[1:]), _check("sufficiency", only[0], only[1:])


def _check(name: str, value: float | None, null: np.ndarray) -> Check:
    if value is None:
        return Check(name, "erase", None, None, None, None, None, None, 0, "abstain", ())
    low, high = (float(number) for number in np.quantile(null, [0.05, 0.95]))
    p = (1 + int((null >= value).sum())) / (1 + len(null))
    draws = tuple(null.tolist())
    return Check(name, "erase", float(value), float(null.mean()), low, high, p, None, len(null), "ok", (), draws)
