"""Does a map of erasure show the text that was there, or that text is missing?

Taking any clause away may move a label: the post gets shorter, and a weak model answers short posts otherwise. That
shift is common to all clauses and says nothing about one of them. Replacing a clause by a clause of another post
(``erase_resample``) leaves the post as long as it was; what both maps differ in, over all clauses, is the offset.
"""

from __future__ import annotations

import numpy as np

from probes.records import Check

MAX_OFFSET = 0.5  # of the largest effect beyond the offset
CONTRAST = {"erase": "erase_resample"}  # method that leaves a hole -> the one that puts other text there


def offset(hole: np.ndarray, replaced: np.ndarray, method: str = "erase") -> Check:
    """The check ``erasure_offset`` of one post, in nats per clause.

    Args:
        hole, replaced: float64 ``[clauses]``, signed: score lost when each is hidden, and when other text takes its
            place.
    Returns:
        the median difference; "failed_gate" where it is at least half of the largest effect beyond it: then the map
        with the hole may not speak. Abstains below 3 clauses or where a value is not finite.
    """
    name = "erasure_offset"
    if len(hole) < 3 or not np.isfinite(hole).all() or not np.isfinite(replaced).all():
        return Check(name, method, None, None, None, None, None, None, 0, "abstain", ())
    value = float(np.median(hole - replaced))
    beyond = float(np.abs(hole - value).max())
    status = "failed_gate" if abs(value) >= MAX_OFFSET * beyond and value != 0 else "ok"
    return Check(name, method, value, None, None, None, None, None, len(hole), status, ())
