"""Posts that a model is to answer, as they come: a line, a cell or a JSON object each; no label is needed."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mentalglm_jax.data.arrow import SUFFIXES, arrow_rows
from mentalglm_jax.data.cells import without_error
from mentalglm_jax.data.intake.languages import told_language
from mentalglm_jax.data.intake.tabular import TABLES, as_text, open_tables
from mentalglm_jax.data.records import COLUMNS as OF_A_RECORD
from mentalglm_jax.data.records import Post, Record, json_rows
from mentalglm_jax.data.tables import read_lines
from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import no_file
from mentalglm_jax.text import tasks

COLUMNS = ("post", "text")
KINDS = (".txt", *TABLES, ".jsonl", *SUFFIXES)


def read_posts(
    path: str | Path, *, task: str | None = None, language: str | None = None, column: str | None = None,
    limit: int | None = None,
) -> list[Post]:  # fmt: skip
    """Posts of a file: ``.txt`` (one a line), ``.csv``, ``.tsv``, ``.xlsx`` (with a header), ``.jsonl``, ``.parquet``.

    A row needs a post. It may have ``id`` (made from the file's name and the row's number where there is none),
    ``language``, ``task`` and ``question``; other columns are not looked at. A row that is a record of the task asked
    (``Record``) keeps its gold label. Tasks of a ``tasks.yaml`` beside the file become known.

    Args:
        task: what all posts are asked; None: what each row says.
        language: of rows that do not say; None: the task's, where it has one only, else the one that the post is in.
        column: where the post stands; None: ``post`` or ``text``.
        limit: only so many, from the top.

    Raises:
        InputError: the file is missing, of another kind or damaged; a row has no post, or does not say its task; its
            language cannot be told; an unknown task; or two rows have one id. File and row are named.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise InputError(f"limit: {limit} is below 1")
    tasks.add_tasks_beside(path)
    if task is not None:
        tasks.get_task(task)
    posts: list[Post] = []
    places: dict[str, int] = {}
    for number, (place, row) in enumerate(_rows(path, column), start=1):
        if limit is not None and len(posts) == limit:
            break
        where = f"{path}:{place}"
        try:
            post = _post(row, f"{path.stem}-{number:05d}", task, language, column)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if post.id in places:
            raise InputError(f"{where}: id {post.id!r} already stands in row {places[post.id]}; ids must differ")
        places[post.id] = place
        posts.append(post)
    if not posts:
        raise InputError(f"{path}: holds no post; give at least one")
    return posts


def typed_post(text: str, *, task: str, language: str | None = None) -> Post:
    """A post that somebody types, asked what ``task`` asks; its language is told like that of a file's row.

    Raises: InputError: an unknown task, or a language that cannot be told or is not one of the task's.
    """
    return _post({"post": text}, "typed", task, language, None)


def _rows(path: Path, column: str | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line or row, its values by name)."""
    kind = path.suffix.lower()
    if path.is_dir():
        raise InputError(f"{path}: is a directory; give one file of posts ({', '.join(KINDS)})")
    if path.exists() and not path.is_file():
        raise no_file(path)
    if kind == ".txt":
        if column is not None:
            raise InputError(f"{path}: has no columns, one line is one post; leave out --text")
        yield from _lines(path)
    elif kind in TABLES:
        yield from _table(path, COLUMNS if column is None else (column,))
    elif kind == ".jsonl":
        yield from json_rows(path)
    elif kind in SUFFIXES:
        yield from arrow_rows(path, tuple(dict.fromkeys((*OF_A_RECORD, *COLUMNS, *([column] if column else ())))))
    else:
        raise InputError(f"{path}: not a kind of file that posts come in; known: {', '.join(KINDS)}")


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """A post on each line; of old Macs a carriage return ends one."""
    more = 0
    for line, text in read_lines(path):
        parts = text.split("\r")
        yield from ((line + more + at, {"post": part}) for at, part in enumerate(parts) if part.strip())
        more += len(parts) - 1


def _table(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    (table,) = open_tables(path, wanted)
    table.warn()
    for number, row in table.rows([name for name in table.columns if name]):
        if "" in row:
            raise InputError(f"{path}:{number}: {row['']}; check the separators in this row")
        yield number, {name: without_error(as_text(value)) for name, value in row.items()}


def _post(row: Any, made_id: str, task: str | None, language: str | None, column: str | None) -> Post:
    if not isinstance(row, Mapping):
        raise InputError(f"expected a JSON object, got {type(row).__name__}")
    name = task or _text(row, "task")
    if name is None:
        own = ", ".join(task.name for task in tasks.added_tasks())
        raise InputError(f"says no task; say what the posts are asked with --task{f' (here: {own})' if own else ''}")
    given = _text(row, "task")
    labelled = row.get("label") is not None or row.get("labels") is not None
    if given == name and labelled and "post" in row and column is None:
        return Record.from_dict({"id": made_id, **row}, allow_extra=True)
    tasks.add_row_definition(row)
    asked = tasks.get_task(name)
    said = _said(row, column)
    spoken = _text(row, "language") or language or _told(said, asked)
    question = _text(row, "question") if given in (None, name) else None
    return Post(_text(row, "id") or made_id, name, spoken, said, question or asked.question(spoken))


def _told(post: str, task: tasks.Task) -> str:
    """The language that a post is to be asked about in: the task's only one, else the post's own."""
    if len(task.languages) == 1:
        return task.languages[0]
    told = told_language(post)
    if told not in task.languages:
        found = "cannot be told" if told is None else f"is {told}, it seems"
        raise InputError(f"the language of the post {found}; say in which to ask with --language "
                         f"({', '.join(task.languages)})")  # fmt: skip
    return told


def _said(row: Mapping[str, Any], column: str | None) -> str:
    """The post itself."""
    names = COLUMNS if column is None else (column,)
    found = next((name for name in names if name in row), None)
    if found is None:
        wanted = " or ".join(map(repr, names))
        raise InputError(f"has no {wanted}; there is {', '.join(map(str, row)) or 'nothing'}; name the post's column "
                         "with --text")  # fmt: skip
    text = row[found]
    if not isinstance(text, str):
        raise InputError(f"{found}: expected text, got {type(text).__name__}")
    if not text.strip():
        raise InputError(f"{found}: the post is empty; fill it in or delete the row")
    return text.strip()


def _text(row: Mapping[str, Any], name: str) -> str | None:
    """A value beside the post; an empty cell is none, and an id may be a number."""
    value = row.get(name)
    if name == "id" and type(value) is int:
        return str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise InputError(f"{name}: expected text, got {type(value).__name__}")
    return value.strip()
