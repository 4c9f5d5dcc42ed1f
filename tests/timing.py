"""How the time of a piece of work grows with its input, whatever else the machine does meanwhile."""

import math
import time
from collections.abc import Callable

TRIES = 6


def grows_at_most(work: Callable[[int], object], short: int, long: int, times: float, spare: float = 0.1) -> None:
    """Asserts that ``work(long)`` takes at most ``times`` as long as ``work(short)`` and ``spare`` seconds more,
    and ten seconds in all.

    Other programs only ever add to a measured time. So the two are measured in turns, six times at most, and the least
    time of each counts: work that grows faster fails every time.

    Args:
        work: what is measured, by the size of its input.
    """

    def seconds(size: int) -> float:
        began = time.process_time()
        work(size)
        return time.process_time() - began

    least = dict.fromkeys((short, long), math.inf)
    for _ in range(TRIES):
        least = {size: min(before, seconds(size)) for size, before in least.items()}
        if least[long] <= times * least[short] + spare and least[long] < 10:
            return
    raise AssertionError(
        f"{long / short:g} times the input took {least[long] / least[short]:.1f} times the time: {least}"
    )
