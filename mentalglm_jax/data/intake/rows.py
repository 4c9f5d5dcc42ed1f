"""From the rows of a table to records of one task. A row that cannot be taken is noted with the reason, not mended."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import NamedTuple

from mentalglm_jax.data.cells import without_error
from mentalglm_jax.data.intake.languages import told_language
from mentalglm_jax.data.intake.tabular import Table, as_text
from mentalglm_jax.data.records import Record
from mentalglm_jax.data.rows import shown
from mentalglm_jax.data.splits import normalize_post, one_name
from mentalglm_jax.errors import InputError
from mentalglm_jax.text import tasks
from mentalglm_jax.text.labels import nearest

# Of all rows together: they are split in memory, and take 3 kB a row and 4 bytes a character (of Chinese about 8).
MOST_ROWS, MOST_CHARACTERS = 300_000, 1 << 26
_ROWS_SHOWN, _REASONS_SHOWN = 5, 6


@dataclass(frozen=True)
class Columns:
    """Which column holds what."""

    text: str
    label: str
    explanation: str | None = None
    id: str | None = None
    user: str | None = None

    @property
    def named(self) -> list[str]:
        """Those that are to be read, each once."""
        names = (self.text, self.label, self.explanation, self.id, self.user)
        return list(dict.fromkeys(name for name in names if name is not None))


class Row(NamedTuple):
    """A row with post and label. ``place``: where it stands, for messages; ``names``: labels as they are written;
    ``user``: ``one_name`` of the author."""

    place: str
    id: str
    post: str
    names: tuple[str, ...]
    explanation: str | None
    user: str | None
    split: str | None
    language: str = ""
    part: str = ""  # what stands before its id, if ids of several files are the same


@dataclass
class Faults:
    """Rows that cannot be taken: reason -> where they stand; and, of an unknown name, that and those that are known."""

    places: dict[str, list[str]] = field(default_factory=dict)
    unknown: dict[str, tuple[str, Iterable[str]]] = field(default_factory=dict)

    def add(self, reason: str, place: str, name: str = "", known: Iterable[str] = ()) -> None:
        """Notes one row. ``name`` is likened to those ``known`` only where it is shown, as that takes its time."""
        self.places.setdefault(reason, []).append(place)
        if name and self.unknown.setdefault(reason, (name, known))[0] != name:
            self.unknown[reason] = ("", known)  # of several names that are shown alike none is likened

    @property
    def total(self) -> int:
        """How many rows."""
        return sum(map(len, self.places.values()))

    def line(self) -> str:
        """The reasons with their first rows, the most frequent first."""
        said = []
        for reason, places in sorted(self.places.items(), key=lambda one: -len(one[1]))[:_REASONS_SHOWN]:
            what = "" if not places[0].isdigit() else "row " if len(places) == 1 else "rows "
            first = ", ".join(places[:_ROWS_SHOWN]) + (", …" if len(places) > _ROWS_SHOWN else "")
            more = nearest(*self.unknown[reason]) if reason in self.unknown else ""
            said.append(f"{len(places)} {reason}{more} ({what}{first})")
        if (rest := len(self.places) - _REASONS_SHOWN) > 0:
            said.append(f"and {rest} reasons more")
        return "; ".join(said)

    def refuse(self, source: str, total: int, cure: str) -> None:
        """Raises: InputError if there is any."""
        if self.places:
            raise InputError(f"{source}: {self.total} of {total} rows cannot be taken: {self.line()}; {cure}")


def fold(name: str) -> str:
    """One spelling for label names that differ in width, case or white space only."""
    return normalize_post(name)


def read_rows(tables: Sequence[Table], columns: Columns, separator: str | None, faults: Faults) -> list[Row]:
    """The rows that have a post, a label and an id of their own in their file; the others are noted.

    Args:
        separator: between several labels of one cell; None: a cell is one label (a list in JSON is several).

    Raises:
        InputError: a column is missing, a file is damaged, or there are more rows or characters than the bounds above.
    """
    rows: list[Row] = []
    splits = [table.split for table in tables]
    total = characters = 0
    for table in tables:
        stem, where = _stem(table, tables), f"{PurePath(table.name).name}:" if len(tables) > 1 else ""
        seen: set[str] = set()
        part = stem if table.split is None or splits.count(table.split) > 1 else table.split
        for number, values in table.rows(columns.named):
            if (total := total + 1) > MOST_ROWS or characters > MOST_CHARACTERS:
                raise InputError(f"{table.name}: more than {MOST_ROWS} rows, or {MOST_CHARACTERS} characters, are not "
                                 "taken at once; import it in parts")  # fmt: skip
            place = f"{where}{number}"
            try:
                row = _row(values, columns, separator, table, place, f"{stem}-{number:05d}")
                if row.id in seen:
                    raise ValueError(f"with an id that stood before ({shown(row.id)})")
            except ValueError as error:
                faults.add(str(error), place)
                continue
            seen.add(row.id)
            rows.append(row._replace(part=part))
            characters += len(row.post) + len(row.explanation or "")
    return rows


def with_own_ids(rows: Sequence[Row], notes: list[str]) -> list[Row]:
    """The rows, their ids with the split or file before them where several files have the same ids: each of them may
    count from nought. It is noted."""
    counts = Counter(row.id for row in rows)
    if not (twice := [one for one, count in counts.items() if count > 1]):
        return list(rows)
    named = [row._replace(id=f"{row.part}-{row.id}") for row in rows]
    places = Counter(row.id for row in named)
    if again := [row for row in named if places[row.id] > 1]:
        raise InputError(f"id {shown(again[0].id)} stands for two rows once its file is named in it; change the ids of "
                         "one of the files")  # fmt: skip
    notes.append(f"ids that stand in several files: {len(twice)}; the id of each row begins with its split or file, "
                 f"as {shown(named[0].id)}")  # fmt: skip
    return named


def _stem(table: Table, tables: Sequence[Table]) -> str:
    """What ids of its rows begin with: its name, with a number where others have it too."""
    names = [PurePath(one.name).stem for one in tables]
    name, place = PurePath(table.name).stem, tables.index(table)
    return name if names.count(name) == 1 else f"{name}-{place}"


def _row(
    values: Mapping[str, object], columns: Columns, separator: str | None, table: Table, place: str, own_id: str
) -> Row:  # fmt: skip
    """Raises: ValueError with what is wrong, as it is counted."""
    if "" in values:
        raise ValueError(f"with {values['']}")

    def text(column: str | None) -> str:
        try:
            return without_error(as_text(values[column]).strip()) if column is not None else ""
        except ValueError as error:
            raise ValueError(f"whose column {column!r} {error}") from None

    if not (post := text(columns.text)):
        raise ValueError("without a post")
    given = values[columns.label]
    if (names := table.classes.get(columns.label)) is not None:
        given = _named(given, names)
    if isinstance(given, list | tuple):
        found = [as_text(one).strip() for one in given]
    else:
        whole = text(columns.label) if given is values[columns.label] else str(given)
        whole = whole.replace("；", ";").replace("，", ",") if separator in (";", ",") else whole
        found = [part.strip() for part in (whole.split(separator) if separator else [whole])]
    if not (found := [name for name in dict.fromkeys(found) if name]):
        raise ValueError("without a label")
    if columns.id is not None and not text(columns.id):
        raise ValueError("without an id")
    return Row(place, text(columns.id) or own_id, post, tuple(found), text(columns.explanation) or None,
               one_name(text(columns.user)) or None, table.split)  # fmt: skip


def _named(given: object, names: Sequence[str]) -> object:
    """The names of the numbers in a cell, or in a list; -1, by which ``datasets`` says that nobody labelled, none."""
    if isinstance(given, list | tuple):
        return [named for one in given if (named := _named(one, names)) != ""]
    if type(given) is not int or given >= len(names):
        return given
    return names[given] if given >= 0 else ""


def with_languages(rows: Sequence[Row], language: str | None) -> list[Row]:
    """The rows, each with its language: ``language``, or the one it is told to be in. A post without a word is taken to
    be in that of most others."""
    if language is not None:
        return [row._replace(language=language) for row in rows]
    told = [told_language(row.post) for row in rows]
    most = Counter(one for one in told if one is not None).most_common(1)
    usual = most[0][0] if most else "en"
    return [row._replace(language=one or usual) for row, one in zip(rows, told, strict=True)]


def records_of(rows: Iterable[Row], task: tasks.Task, source: str, faults: Faults) -> list[tuple[Record, Row]]:
    """A training record for each row whose labels and language the task has; the others are noted."""
    known = {language: task.spellings(language) for language in task.languages}
    folded = {language: {fold(name): key for name, key in names.items()} for language, names in known.items()}
    found = []
    for row in rows:
        if row.language not in task.languages:
            faults.add(f"in a language that {task.name} is not asked in, {row.language}", row.place)
            continue
        spellings = known[row.language]
        keys = {spellings.get(name) or folded[row.language].get(fold(name)): name for name in row.names}
        if None in keys:
            label = keys[None]
            faults.add(f"with the unknown label {shown(label)}", row.place, label, spellings)
            continue
        try:
            record = _record(row, task, [key for key in keys if key is not None], source)
        except InputError as error:
            faults.add(f"that make no record ({error})", row.place)
            continue
        found.append((record, row))
    return found


def _record(row: Row, task: tasks.Task, keys: Sequence[str], source: str) -> Record:
    labels = task.ordered(keys)
    single = task.arity == "single"
    return Record(
        id=row.id, task=task.name, language=row.language, post=row.post, question=task.question(row.language),
        label=labels[0] if single else None, labels=None if single else labels, explanation=row.explanation,
        source=source,
    )  # fmt: skip
