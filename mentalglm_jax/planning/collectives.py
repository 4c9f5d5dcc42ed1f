"""What a compiled program sends between devices, and whether that depends on the order in which they are named."""

import re
from collections import Counter

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_OPERATION = re.compile(rf"= (.+?) ({_KINDS})(?:-start)?\(")
_LAYOUT = re.compile(r"\{[^{}]*\}")


def collectives(program: str) -> Counter[str]:
    """Kind and result shape of every collective in a program's text (HLO), with how often it is written there; one in
    a loop counts once."""
    return Counter(f"{kind} {_LAYOUT.sub('', shape)}" for shape, kind in _OPERATION.findall(program))


def by_kind(found: Counter[str]) -> dict[str, int]:
    """How many there are of every kind."""
    kinds: Counter[str] = Counter()
    for name, count in found.items():
        kinds[name.partition(" ")[0]] += count
    return dict(sorted(kinds.items()))
