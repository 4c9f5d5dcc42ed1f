"""Tables written without a convention of quotation marks, told from those that quote their cells.

Where nobody doubled marks, a post that begins with one and a later post that ends with one read as a single cell: the
rows between them are gone, and a post has another one's label. Honest cells of several lines stay what they are.
"""

from collections.abc import Iterator, Sequence

_LONGEST, _MOST_VALUES = 60, 1000  # of a value that repeats, and of different ones in a column of such
_MOST_DOUBTS = 1000


class QuotedRows:
    """The lines of a table for ``csv.reader``, which notes what each row was made of (``took``)."""

    def __init__(self, lines: Iterator[str], delimiter: str):
        self._lines, self._delimiter = lines, delimiter
        self._row: list[str] = []
        self._width = 0
        self._convention = False  # whether some cell needed its marks and had them
        self._values: list[set[str] | None] = []  # by column, of rows of one line; None: too many to be labels
        self._doubts: list[tuple[int, int, bool, list[tuple[str, ...] | None]]] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._row.append(line)
        return line

    def took(self, number: int, cells: Sequence[str]) -> None:
        """Notes the row that begins in line ``number``."""
        lines, self._row = [line.rstrip("\r\n") for line in self._row], []
        if not any(cell.strip() for cell in cells):
            return
        if not self._width:
            self._width = len(cells)
            self._values = [set() for _ in cells]
            if len(lines) == 1 or not self._doubted(number, lines, cells):  # the first row may be no header
                self._convention = lines[0].lstrip("\ufeff").startswith('"')
        elif len(lines) == 1:
            self._took_line(lines[0], cells)
        elif not self._doubted(number, lines, cells):
            self._convention |= len(cells) == self._width

    def _took_line(self, line: str, cells: Sequence[str]) -> None:
        if len(cells) != self._width:
            return
        doubled = '""' in line and any('"' in cell for cell in cells)
        self._convention |= doubled or line.count(self._delimiter) + 1 != self._width
        for place, (known, cell) in enumerate(zip(self._values, cells, strict=True)):
            if known is not None and (value := cell.strip()) and len(value) <= _LONGEST:
                known.add(value)
                if len(known) > _MOST_VALUES:
                    self._values[place] = None

    def _doubted(self, number: int, lines: Sequence[str], cells: Sequence[str]) -> bool:
        """Whether most lines of the row have as many cells as the header, were the marks but characters. Of these the
        cells are noted that stood inside the marks from end to end."""
        inside = [place for place, cell in enumerate(cells) if "\n" in cell or "\r" in cell]
        if self._width < 2 or not any(self._delimiter in cells[place] for place in inside):
            return False
        noted: list[tuple[str, ...] | None] = []
        spaced, last = False, len(lines) - 1
        for at, line in enumerate(lines):
            parts = line.split(self._delimiter)
            if len(parts) != self._width:
                noted.append(None)
                continue
            first, end = inside[0] + 1 if at == 0 else 0, inside[-1] if at == last else self._width
            edges = [parts[place][:1] for place in range(max(1, first), min(end + 1, self._width))]
            edges += [parts[place - 1][-1:] for place in range(max(1, first), min(end + 1, self._width))]
            spaced |= any(edge.isspace() for edge in edges)
            noted.append(tuple(part.strip()[: _LONGEST + 1] for part in parts[first:end]))
        if 2 * sum(one is not None for one in noted) <= len(noted):
            return False
        if len(self._doubts) < _MOST_DOUBTS:
            self._doubts.append((number, len(lines), spaced, noted))
        return True

    def swallowed(self) -> str | None:
        """Once all are read: which row is several, and what to do. Most of its lines have a value where that column has
        it in other rows; or all have as many cells as the header, no separator stands beside a space as in a sentence,
        and no other cell of the table needed its marks."""
        for number, count, spaced, noted in self._doubts:
            told = sum(one is not None and (not one or self._known(one, at)) for at, one in enumerate(noted))
            if 2 * told > count or (None not in noted and not spaced and not self._convention):
                return (f"{number}: a cell in quotation marks takes in {count} lines that are rows of their own (does "
                        "a post begin with a mark?); double the marks in cells and quote those cells, or save the "
                        "table as .jsonl")  # fmt: skip
        return None

    def _known(self, parts: Sequence[str], at: int) -> bool:
        first = self._width - len(parts) if at == 0 else 0  # of the row's first line they are the last cells
        return any(part in (self._values[place] or ()) for place, part in enumerate(parts, start=first))
