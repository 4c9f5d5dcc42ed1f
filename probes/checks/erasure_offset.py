"""Does a map of erasure show the text that was there, or that text is missing?

Taking any clause away may move a label: the post gets shorter, and a weak model answers short posts otherwise. That
shift is common to all clauses and says nothing about one of them. Replacing a clause by a clause of another post
(``erase_resample``) leaves the post as long as it was; what both maps differ in, over all clauses, is the offset. It
may lie on either side: clauses of other posts that speak for one label move every clause as a hole does. The map whose
own median over clauses is larger in size carries it, and may not speak.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from probes.records import Check

MAX_OFFSET = 0.5  # of the largest effect beyond the offset
HOLES = ("erase", "shap", "kernelshap")  # methods that leave a hole where a clause was; the first there is judged
REPLACED = "erase_resample"  # the one that puts other text there
_NAME = "erasure_offset"


def offsets(nets: Mapping[str, np.ndarray]) -> list[Check]:
    """The checks ``erasure_offset`` of one post, in nats per clause; none without a map of each kind.

    Args:
        nets: method -> float64 ``[clauses]``, signed: score lost when each is hidden, or when other text takes its
            place. Other methods than these are ignored.
    Returns:
        for each method, the median by which its kind exceeds the other. "failed_gate" where that is at least half of
        the largest effect beyond it and the fault lies with its kind: all that leave holes, or ``erase_resample``.
        Abstains below 3 clauses or where a value is not finite.
    """
    hidden = [method for method in HOLES if method in nets]
    if not hidden or REPLACED not in nets:
        return []
    hole, replaced = nets[hidden[0]], nets[REPLACED]
    if len(hole) < 3 or not np.isfinite(hole).all() or not np.isfinite(replaced).all():
        return [_check(method, None, 0, "abstain") for method in (*hidden, REPLACED)]
    value = float(np.median(hole - replaced))
    holes_fault = bool(abs(np.median(hole)) >= abs(np.median(replaced)))
    beyond = float(np.abs(hole - value if holes_fault else replaced + value).max())
    failed = value != 0 and abs(value) >= MAX_OFFSET * beyond
    status = {True: "failed_gate", False: "ok"}
    checks = [_check(method, value, len(hole), status[failed and holes_fault]) for method in hidden]
    return [*checks, _check(REPLACED, 0.0 - value, len(hole), status[failed and not holes_fault])]


def _check(method: str, value: float | None, n: int, status: str) -> Check:
    return Check(_NAME, method, value, None, None, None, None, None, n, status, ())
