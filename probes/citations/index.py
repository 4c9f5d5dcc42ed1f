"""Finding any string in one text: built once in linear time, asked in time linear in the question."""

from __future__ import annotations

from collections.abc import Sequence


class Index:
    """The suffix automaton of a text (Blumer et al. 1985): every substring is a path from its first state.

    ``places`` of a string and the longest common run at every place of another text (``runs``) take time linear in the
    string and the answer, whatever the text repeats.
    """

    def __init__(self, text: str) -> None:
        """Takes O(len(text)) steps; about two states per character."""
        self._steps: list[dict[str, int]] = [{}]
        self._length, self._link, self._end = [0], [-1], [0]
        self._children: list[list[int]] | None = None
        self._original = [False]
        last = 0
        for at, char in enumerate(text):
            last = self._extend(last, char, at + 1)

    def _add(self, steps: dict[str, int], length: int, link: int, end: int, original: bool) -> int:
        self._steps.append(steps)
        self._length.append(length)
        self._link.append(link)
        self._end.append(end)
        self._original.append(original)
        return len(self._steps) - 1

    def _extend(self, last: int, char: str, end: int) -> int:
        state = self._add({}, self._length[last] + 1, 0, end, True)
        at = last
        while at != -1 and char not in self._steps[at]:
            self._steps[at][char] = state
            at = self._link[at]
        if at == -1:
            return state
        after = self._steps[at][char]
        if self._length[at] + 1 == self._length[after]:
            self._link[state] = after
            return state
        copy = self._add(
            dict(self._steps[after]), self._length[at] + 1, self._link[after], self._end[after], original=False
        )
        while at != -1 and self._steps[at].get(char) == after:
            self._steps[at][char] = copy
            at = self._link[at]
        self._link[after] = self._link[state] = copy
        return state

    def places(self, query: str) -> Sequence[int]:
        """Every start of ``query`` in the text, ascending, overlapping ones too; none for an empty one."""
        state = 0
        for char in query:
            if (after := self._steps[state].get(char)) is None:
                return []
            state = after
        if not query:
            return []
        if self._children is None:
            self._children = [[] for _ in self._steps]
            for one, parent in enumerate(self._link):
                if parent >= 0:
                    self._children[parent].append(one)
        found, stack = [], [state]
        while stack:
            one = stack.pop()
            if self._original[one]:
                found.append(self._end[one] - len(query))
            stack += self._children[one]
        return sorted(found)

    def runs(self, other: Sequence[str]) -> list[int]:
        """For each character of ``other``: how long the longest string that ends there and stands in the text is."""
        lengths, state, length = [], 0, 0
        for char in other:
            while state and char not in self._steps[state]:
                state = self._link[state]
                length = self._length[state]
            if char in self._steps[state]:
                state, length = self._steps[state][char], length + 1
            lengths.append(length)
        return lengths
