"""The IMHI sets of MentaLLaMA, English, each row with the explanation upstream gives, in both published forms.

    instruction   query = 'Consider this post: "POST" Question: QUESTION'     answer = 'LABEL SENTENCE Reasoning: ...'
    completion    post = 'Post: POST', question = ' Question: STEM'           answer = 'SHORT LABEL. Reasoning: ...'
                  (test files: one column 'Post: POST Question: STEM')

A record asks the question of the instruction form, whichever form it was read from. The answer column is called
``gpt-3.5-turbo`` or, in the completion training files, ``response``; in the experts' files it has the first name
although people wrote it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mentalglm_jax.data.records import Record
from mentalglm_jax.data.rows import Row, make_records
from mentalglm_jax.data.tables import read_header, read_named_rows
from mentalglm_jax.errors import InputError
from mentalglm_jax.text import tasks

# Name of a set in IMHI's paths -> task. CLP's rows are not published; who has them keeps them like the others.
IMHI_TASKS = {
    "DR": "imhi_dr",
    "CLP": "imhi_clp",
    "dreaddit": "imhi_dreaddit",
    "SAD": "imhi_sad",
    "Irf": "imhi_irf",
    "MultiWD": "imhi_multiwd",
    "CAMS": "imhi_cams",
    "loneliness": "imhi_loneliness",
    "t-sid": "imhi_tsid",
    "swmh": "imhi_swmh",
}
IMHI_DEFAULT = ("DR", "dreaddit", "SAD")

_OPEN, _QUESTION = 'Consider this post: "', '" Question: '
_POST, _STEM = "Post: ", " Question: "
_ANSWERS = ("gpt-3.5-turbo", "response")
_TRAIN_FOLDERS = {"instruction": "instruction_data", "completion": "complete_data"}
_TEST_FOLDERS = {"instruction": "test_instruction", "completion": "test_complete"}
_EXPERT_FOLDER = "test_instruction_expert"
# Their SET.csv are the experts' few-shot examples, no part of a set.
_EXPERT_FOLDERS = (_EXPERT_FOLDER, "expert", "human_evaluation")
# Names of the parts in either form, as published: DR/reddit_train.csv, dreaddit/dreaddit-train.csv, SAD/val.csv.
_PARTS = {"train": "train", "val": "dev", "valid": "dev"}

# What the stem of the completion form asks about -> the question of the instruction form.
_STEMS = {
    "imhi_sad": "This post shows the stress cause of",
    "imhi_cams": "This post shows the mental disorder cause of",
    "imhi_tsid": "This post shows the mental disorder symptoms of",
    "imhi_swmh": "This post shows the mental disorder symptoms of",
}
# Short labels of the completion form that are not the words of the label sentence.
_SHORT = {
    "imhi_sad": {"other causes": "other", "emotional turmoil": "emotion"},
    "imhi_cams": {"none": "none", "no causes": "none"},
    "imhi_swmh": {"no mental disorders": "none"},
}
_ASKED = re.compile(r'The answer to the question:? "(.+?)" is')
# Upstream's third-person forms -> ours ("Does the poster suffers from stress?").
_VERBS = ((" suffers from ", " suffer from "), (" shows risk ", " show risk "), (" exists in ", " exist in "))
_YES_NO = re.compile(r"(yes|no)\b")


def iter_imhi(path: str | Path, sets: Sequence[str] = IMHI_DEFAULT) -> Iterator[Record]:
    """Records of the named sets, read as they are asked for.

    Args:
        path: a clone of the repository, its ``train_data``, ``test_data`` or one of their folders. Of a clone all parts
            are read. Where a set is there in both forms, the instruction form is read.
        sets: names as in the paths (``IMHI_TASKS``).

    Raises:
        InputError: an unknown set, no file of a set, or a damaged file (file, line and column are named).
    """
    path = Path(path)
    for name in sets:
        if name not in IMHI_TASKS:
            raise InputError(f"IMHI: unknown set {name!r}; known: {', '.join(IMHI_TASKS)}")
        files = imhi_files(path, name)
        if not files:
            raise InputError(
                f"{path}: no file of IMHI set {name}; expected {name}/train.csv, {name}/val.csv or {name}.csv"
            )
        for file, split in files:
            yield from _imhi_file(file, name, split)


def load_imhi(path: str | Path, sets: Sequence[str] = IMHI_DEFAULT) -> list[Record]:
    """``iter_imhi`` as a list."""
    return list(iter_imhi(path, sets))


def load_imhi_experts(path: str | Path, sets: Sequence[str] = ()) -> list[Record]:
    """The experts' explanations (35 a set): few-shot examples, never training data. ``path``: the clone, its
    ``human_evaluation/test_instruction_expert``, or a folder with the same files; no ``sets`` means those it holds.

    Raises: InputError as ``iter_imhi``.
    """
    path = Path(path)
    places = (path / "human_evaluation" / _EXPERT_FOLDER, path / _EXPERT_FOLDER, path / "expert", path)
    folder = next((place for place in places if any((place / f"{name}.csv").is_file() for name in IMHI_TASKS)), None)
    if folder is None:
        raise InputError(f"{path}: no expert file here; expected {_EXPERT_FOLDER}/SET.csv")
    names = sets or [name for name in IMHI_TASKS if (folder / f"{name}.csv").is_file()]
    return [
        record
        for name in names
        for record in _imhi_file(folder / f"{name}.csv", name, "test", source=f"{IMHI_TASKS[name]}-expert")
    ]


def imhi_files(path: Path, name: str) -> list[tuple[Path, str]]:
    """(file, split) of one set below ``path``, of the best form there is for each split."""
    found: dict[str, Path] = {}
    for form in ("instruction", "completion"):
        train, test = _TRAIN_FOLDERS[form], _TEST_FOLDERS[form]
        bases = [path / train, path / "train_data" / train, *([path] if _is_form(path, train) else [])]
        for part, split in _PARTS.items():
            for base in bases:
                for stem in (part, f"reddit_{part}", f"{name}-{part}"):
                    if split not in found and (base / name / f"{stem}.csv").is_file():
                        found[split] = base / name / f"{stem}.csv"
        for base in (path / test, path / "test_data" / test, *([path] if _is_form(path, test) else [])):
            if "test" not in found and (base / f"{name}.csv").is_file():
                found["test"] = base / f"{name}.csv"
    return [(found[split], split) for split in ("train", "dev", "test") if split in found]


def _is_form(path: Path, folder: str) -> bool:
    """Whether ``path`` may itself be ``folder``: it has that name, or none of the names that mean something else."""
    others = {*_TRAIN_FOLDERS.values(), *_TEST_FOLDERS.values(), *_EXPERT_FOLDERS} - {folder}
    return path.resolve().name not in others


def _imhi_file(path: Path, name: str, split: str, source: str | None = None) -> Iterator[Record]:
    task = tasks.TASKS[IMHI_TASKS[name]]
    header = read_header(path, ",")
    answer = next((column for column in _ANSWERS if column in header), _ANSWERS[0])
    rows = _three_columns(path, name, task, answer) if "post" in header else _two_columns(path, name, task, answer)
    return make_records(path, rows, source=source or task.name, task=task.name, language="en", split=split)


def _two_columns(path: Path, name: str, task: tasks.Task, answer: str) -> Iterator[Row]:
    for line, row in read_named_rows(path, ("query", answer), ","):
        query = row["query"]
        if query.startswith(_POST):
            post, found, stem = query[len(_POST) :].rpartition(_STEM)
            if not found:
                raise InputError(f"{path}:{line}, column 'query': expected 'Post: ... Question: ...'; fix the row")
            yield _completion(path, line, "query", name, task, (post, stem), (answer, row[answer]))
            continue
        head, found, question = query.rpartition(_QUESTION)
        if not found or not head.startswith(_OPEN):
            raise InputError(
                f"{path}:{line}, column 'query': expected 'Consider this post: \"...\" Question: ...'; "
                "fix or delete the row"
            )
        if question.strip() not in task.all_questions("en"):
            raise _wrong_question(path, line, "query", name)
        parsed = tasks.parse(task, "en", row[answer])
        if parsed.labels is None:
            wanted = next(iter(task.candidates("en").values()))
            fault = "no label" if parsed.status == "no_label" else f"unknown label for set {name}"
            raise InputError(
                f"{path}:{line}, column {answer!r}: {fault}; "
                f"expected a label sentence such as {wanted!r} before 'Reasoning:'"
            )
        yield Row(line, head[len(_OPEN) :], parsed.labels, parsed.explanation, question.strip())


def _three_columns(path: Path, name: str, task: tasks.Task, answer: str) -> Iterator[Row]:
    for line, row in read_named_rows(path, ("post", "question", answer), ","):
        if not row["post"].startswith(_POST):
            raise InputError(f"{path}:{line}, column 'post': expected 'Post: ...'; fix or delete the row")
        asked = row["question"].strip().removeprefix(_STEM.strip())
        said = (answer, row[answer])
        yield _completion(path, line, "question", name, task, (row["post"][len(_POST) :], asked), said)


def _completion(
    path: Path, line: int, column: str, name: str, task: tasks.Task, asked: tuple[str, str], said: tuple[str, str]
) -> Row:
    """``asked``: post and stem; ``said``: the answer's column and text."""
    post, stem = asked
    question = _question_of(task, stem.strip())
    if question is None:
        raise _wrong_question(path, line, column, name)
    label, _, explanation = said[1].partition("Reasoning:")
    key = _short_labels(task).get(label.strip().rstrip(".").lower())
    if key is None and (found := _YES_NO.match(label.strip().lower())) and found[1] in task.keys:
        key = found[1]  # "yes, the poster suffers from depression."
    if key is None:
        known = ", ".join(_short_labels(task))
        fault = f"unknown label for set {name}" if label.strip() else "no label"
        raise InputError(f"{path}:{line}, column {said[0]!r}: {fault}; expected before 'Reasoning:' one of: {known}")
    return Row(line, post, (key,), explanation.strip() or None, question)


def _question_of(task: tasks.Task, stem: str) -> str | None:
    if asked := _ASKED.fullmatch(stem):
        question = asked[1]
        for theirs, ours in _VERBS:
            question = question.replace(theirs, ours)
        return question if question in task.all_questions("en") else None
    return task.question("en") if stem == _STEMS.get(task.name) else None


def _short_labels(task: tasks.Task) -> Mapping[str, str]:
    """Words the completion form answers with, lower case -> key: what tells the label sentences of a set apart."""
    if set(task.keys) == {"yes", "no"}:
        return {"yes": "yes", "no": "no"}
    short = dict(_SHORT.get(task.name, {}))
    for key, sentence in task.candidates("en").items():
        words = sentence.rstrip(".").lower().removeprefix("this post shows ")
        short.setdefault(words.rpartition(" related to ")[2], key)
    return short


def _wrong_question(path: Path, line: int, column: str, name: str) -> InputError:
    return InputError(
        f"{path}:{line}, column {column!r}: the question is not one of set {name}; is the file in the right folder?"
    )
