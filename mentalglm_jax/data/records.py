"""One example, and the JSONL files that hold many."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mentalglm_jax.data.arrow import SUFFIXES, arrow_rows
from mentalglm_jax.data.surrogates import half_pair, whole_texts
from mentalglm_jax.data.tables import read_lines
from mentalglm_jax.errors import InputError, install
from mentalglm_jax.files import write_bytes, write_text
from mentalglm_jax.foreign import parse_json
from mentalglm_jax.text import tasks

Span = tuple[int, int]
SPLITS = ("train", "dev", "test")
MOST_SPANS, MOST_MARKED = 1000, 100  # cues and the like of a post: how many, and how often they may cover it
_TEXTS = ("id", "task", "language", "post", "question", "source", "split")


@dataclass(frozen=True)
class Post:
    """A post and what is asked about it.

    Raises:
        InputError: from the constructor, naming the id and the field that is wrong.
    """

    id: str
    task: str
    language: str
    post: str
    question: str

    def __post_init__(self) -> None:
        try:
            self._check()
        except InputError as error:
            raise InputError(f"record {self.id!r}: {error}") from None

    def _check(self) -> None:
        for name in (name for name in (*_TEXTS, "explanation") if hasattr(self, name)):
            text = getattr(self, name) or ""
            if not text.strip() and name not in ("source", "explanation"):
                raise InputError(f"{name}: is empty; remove the record or fill it in")
            if (place := half_pair(text)) is not None:
                raise InputError(f"{name}: character {place + 1} is half of a UTF-16 surrogate pair; mend the text")
        tasks.get_task(self.task).question(self.language)

    @property
    def prompt(self) -> str:
        """The user turn."""
        return tasks.get_task(self.task).prompt(self.post, self.question, self.language)

    @property
    def system(self) -> str | None:
        """The system turn of its task, if there is one."""
        return tasks.get_task(self.task).system(self.language)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: all fields."""
        return asdict(self)


@dataclass(frozen=True)
class Record(Post):
    """A post, what is asked about it, and the gold answer.

    ``label`` (one key, "single" tasks) or ``labels`` (keys, in the order in which the answer states them, "multi"
    tasks), never both. ``cues`` and ``decoys`` are [start, end) character spans of ``post``: the phrases the label
    depends on, and those it does not although they may look so; ``rationales`` those that people marked as decisive
    (empty: what they marked is not in the post).

    Raises:
        InputError: from the constructor, naming the record's id and the field that is wrong.
    """

    label: str | None = None
    labels: tuple[str, ...] | None = None
    explanation: str | None = None
    source: str = ""
    split: str = "train"
    cues: tuple[Span, ...] | None = None
    decoys: tuple[Span, ...] | None = None
    rationales: tuple[Span, ...] | None = None

    def _check(self) -> None:
        super()._check()
        task = tasks.get_task(self.task)
        if self.split not in SPLITS:
            raise InputError(f"split: {self.split!r} is none of {', '.join(SPLITS)}")
        wanted, other = ("label", "labels") if task.arity == "single" else ("labels", "label")
        if getattr(self, other) is not None:
            raise InputError(f"{other}: task {task.name} takes {wanted!r} instead")
        if getattr(self, wanted) is None:
            raise InputError(f"{wanted}: no label; give {wanted!r} from: {', '.join(task.keys)}")
        task.ordered(self.gold)
        if self.explanation is not None and not self.explanation.strip():
            raise InputError("explanation: is empty; give text, or null for none")
        for name in ("cues", "decoys", "rationales"):
            for start, end in getattr(self, name) or ():
                if not 0 <= start < end <= len(self.post):
                    raise InputError(f"{name}: [{start}, {end}] is not inside the post of {len(self.post)} characters")
            spans = getattr(self, name) or ()
            if len(spans) > MOST_SPANS or sum(end - start for start, end in spans) > MOST_MARKED * len(self.post):
                raise InputError(f"{name}: {len(spans)} spans; at most {MOST_SPANS} may mark a post, and all together "
                                 f"{MOST_MARKED} times its length")  # fmt: skip

    @property
    def gold(self) -> tuple[str, ...]:
        """The label keys, also for a single-label task."""
        return self.labels if self.labels is not None else (str(self.label),)

    def answer(self, order: tasks.Order = "label_first") -> str:
        """The assistant turn the model is trained to give."""
        return tasks.answer(self.task, self.gold, self.explanation, self.language, order)

    def chat(self, order: tasks.Order = "label_first") -> list[dict[str, str]]:
        """The conversation the model is trained on: the task's system turn, if it has one, the post, the answer."""
        turns = [("system", self.system), ("user", self.prompt), ("assistant", self.answer(order))]
        return [{"role": role, "content": text} for role, text in turns if text is not None]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: all fields, except that ``label``, ``labels`` and ``rationales`` appear only where in use."""
        row = {name: value for name, value in asdict(self).items()
               if name not in ("label", "labels", "rationales") or value is not None}  # fmt: skip
        return json.loads(json.dumps(row))

    @classmethod
    def from_dict(cls, row: Any, *, allow_extra: bool = False) -> "Record":
        """Reads what ``to_dict`` wrote. ``allow_extra`` ignores other keys (``generations.jsonl`` has more); a
        ``task_definition`` makes its task known.

        Raises: InputError on a missing, unknown or wrong field, or a task that is known with another definition.
        """
        if not isinstance(row, Mapping):
            raise InputError(f"expected a JSON object, got {type(row).__name__}")
        known = [field.name for field in fields(cls)]
        unknown = [key for key in row if key not in known]
        if unknown and not allow_extra:
            raise InputError(f"unknown field {unknown[0]!r}; a record has: {', '.join(known)}")
        missing = [name for name in ("id", "task", "language", "post", "question") if name not in row]
        if missing:
            raise InputError(f"field {missing[0]!r} is missing")
        tasks.add_row_definition(row)
        return cls(**{name: _typed(name, row[name]) for name in known if name in row})


def _typed(name: str, value: Any) -> Any:
    """A JSON value as the type of field ``name``; lists become tuples. Raises: InputError."""
    if value is None and name not in _TEXTS:
        return None
    if name in (*_TEXTS, "label", "explanation"):
        if not isinstance(value, str):
            raise InputError(f"{name}: expected text, got {type(value).__name__}")
        return value
    if not isinstance(value, list | tuple):
        raise InputError(f"{name}: expected a list, got {type(value).__name__}")
    if name == "labels":
        if not all(isinstance(key, str) for key in value):
            raise InputError("labels: expected a list of text")
        return tuple(value)
    for span in value:
        if not (isinstance(span, list | tuple) and len(span) == 2 and all(type(place) is int for place in span)):
            raise InputError(f"{name}: expected a list of [start, end] character positions")
    return tuple((span[0], span[1]) for span in value)


COLUMNS = tuple(field.name for field in fields(Record))


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Writes JSONL (UTF-8, one record per line), atomically; Parquet where the name ends in ``.parquet``. A new file is
    its owner's only."""
    if Path(path).suffix == ".parquet":
        _write_parquet(Path(path), records)
    else:
        write_text(path, records_text(records), private=True)


def records_text(records: Iterable[Record]) -> str:
    """What ``write_records`` writes as JSONL."""
    return "".join(json.dumps(record.to_dict(), ensure_ascii=False) + "\n" for record in records)


def read_records(path: str | Path, *, allow_extra: bool = False) -> list[Record]:
    """Reads what ``write_records`` or ``datasets`` wrote (JSONL, Parquet, Arrow), or JSONL written by hand; blank lines
    are skipped, a BOM is tolerated. Tasks of a ``tasks.yaml`` beside the file become known.

    Raises:
        InputError: the file is missing, not UTF-8, empty, or a line is not a record; the message names file and line.
    """
    path = Path(path)
    records: list[Record] = []
    seen: dict[str, int] = {}
    for number, record in _numbered(path, allow_extra):
        if record.id in seen:
            raise InputError(
                f"{path}:{number}: id {record.id!r} already stands in line {seen[record.id]}; ids must differ"
            )
        seen[record.id] = number
        records.append(record)
    return records


def iter_records(path: str | Path, *, allow_extra: bool = False) -> Iterator[Record]:
    """``read_records`` one record at a time, in bounded memory: whether ids differ is not checked."""
    return (record for _, record in _numbered(Path(path), allow_extra))


def _numbered(path: Path, allow_extra: bool) -> Iterator[tuple[int, Record]]:
    """(line of JSONL or row of a table, record)."""
    tasks.add_tasks_beside(path)
    number, table = 0, path.suffix.lower() in SUFFIXES
    for number, row in arrow_rows(path, COLUMNS, allow_extra) if table else json_rows(path):
        try:
            record = Record.from_dict(row, allow_extra=allow_extra)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        yield number, record
    if not number:
        raise InputError(f"{path}: holds no record; give at least one {'row' if table else 'line'}")


def json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of each line that is not blank. Raises: InputError naming file and line."""
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        yield number, whole_texts(parse_json(line, where, "fix or delete the line", half_pairs=True), line, where)


def _write_parquet(path: Path, records: Iterable[Record]) -> None:
    datasets = load_datasets()
    blank = {field.name: None for field in fields(Record)}
    rows = datasets.Dataset.from_list([blank | record.to_dict() for record in records], features=_features(datasets))
    buffer = io.BytesIO()
    rows.to_parquet(buffer)
    write_bytes(path, buffer.getvalue(), private=True)


def _features(datasets: Any) -> Any:
    """The columns of a record file, the same whatever its records use."""
    text, spans = datasets.Value("string"), datasets.List(datasets.List(datasets.Value("int64")))
    kinds = {"labels": datasets.List(text), "cues": spans, "decoys": spans, "rationales": spans}
    return datasets.Features({field.name: kinds.get(field.name, text) for field in fields(Record)})


def load_datasets() -> Any:
    """The ``datasets`` package, without its progress bars and log lines.

    Raises: InputError if the [data] extra is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f"Parquet needs the data extra: {install('data')}") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the user hears of a fault once, from us
    return datasets
