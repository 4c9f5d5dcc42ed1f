"""C-IMHI: the instruction files of MentalGLM's repository, or what `mentalglm data build` wrote, and its raw parts.

    instructions   Instruct data/Instruct*.json, alpaca/{train,dev,test}.json    JSON list of instruction, input, output
    raw parts      Raw data/Suiside/{train,val,test}_set.tsv                     label, tab, post; no header
                   Raw data/CD/*.tsv                                             SocialCD-3K's columns

The authors' instruction files hold whole data sets, posts of their published test parts included; what may be trained
on of them is decided in ``held_out.py``. Their raw parts are known to us from others' code only, not seen.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

from mentalglm_jax.data.chinese import CD_POST, PATHWAYS, SOCIALCD_3K, SOS_HL_1K, cd_rows
from mentalglm_jax.data.records import Record
from mentalglm_jax.data.rows import Row, make_records, shown
from mentalglm_jax.data.surrogates import replacing_surrogates
from mentalglm_jax.data.tables import check_width, read_json_list, read_table
from mentalglm_jax.errors import InputError
from mentalglm_jax.text import tasks

C_IMHI, C_IMHI_RAW = "c_imhi", "c_imhi_raw"
# Task -> the data set whose posts, test part included, the authors' instruction files repeat.
ORIGINALS = {"suicide_risk": SOS_HL_1K, "cognitive_distortion": SOCIALCD_3K, "cognitive_pathway": PATHWAYS}
_ALPACA_COLUMNS = ("instruction", "input", "output")
_RISK_FOLDERS = ("Suiside", "Suicide")
_RISK_PARTS = {"train": "train", "val": "dev", "test": "test"}
_RISK_LABELS = {"1": "high", "0": "low", "高": "high", "低": "low", "高自杀风险": "high", "低自杀风险": "low",
                "高风险": "high", "低风险": "low", "high": "high", "low": "low"}  # fmt: skip
_CD_FOLDER = "CD"


_PROMPT = re.compile(r"\s*考虑以下这个帖子\s*[：:]\s*[“\"「](.+)[”\"」]", re.DOTALL)
_ASKED = {"suicide_risk": "自杀风险", "cognitive_distortion": "认知歪曲", "cognitive_pathway": "认知路径"}
_REASONS = re.compile(r"(?:推理|解释|理由|原因|分析)\s*[：:]|(?:因为|理由是)")
_QUOTES = re.compile(r'“[^“”]*”|「[^「」]*」|"[^"]*"')
_PART = re.compile(r"[，,。；;！!？?\n]")
# What denies a label; not "非常", "不仅", "毫无疑问", "未来".
_NOT = re.compile(r"没|不(?![仅但只光])|非(?!常)|无(?!疑)|未(?!来)|否")
_RISK = re.compile(r"(高|低)(?:自杀风险|风险)|自杀风险(?:是|为|等级为|较|很)?(高|低)")


def iter_c_imhi(path: str | Path) -> Iterator[Record]:
    """C-IMHI's instruction files: JSON lists of objects with ``instruction``, ``input`` and ``output``.

    What ``mentalglm data build`` wrote is read back exactly. Of the authors' files (suicide risk, distortions,
    pathways) the question and the place of the post are known: it stands in quotation marks inside the prompt, or alone
    in ``input`` (whole, its own quotation marks included). The wording of their answers is not: the label names before
    the reason are read, and an answer that names none, or denies one, is refused.

    Args:
        path: one file, a folder with ``Instruct*.json``, or one with ``{train,dev,test}.json``.

    Raises: InputError naming file, line and column.
    """
    path = Path(path)
    files = [(path, path.stem if path.stem in ("train", "dev", "test") else "train")]
    if not path.is_file():
        files = c_imhi_files(path)
    if not files:
        raise InputError(f"{path}: no C-IMHI file here; expected Instruct_*.json or train.json")
    for file, split in files:
        counts: dict[tuple[str, str], int] = {}
        empty = True
        for line, item in read_json_list(file):
            empty = False
            task, language, row = _alpaca_row(file, line, item)
            number = counts[task, language] = counts.get((task, language), -1) + 1
            found = make_records(file, [row], source=C_IMHI, task=task, language=language, split=split)
            record = next(found)
            yield Record.from_dict(record.to_dict() | {"id": f"{C_IMHI}-{file.stem}-{task}-{language}-{number:05d}"})
        if empty:
            raise InputError(f"{file}: holds no row; is the download complete?")


def c_imhi_files(folder: Path) -> list[tuple[Path, str]]:
    """(file, split) of the instruction files in ``folder``."""
    splits = [(file, split) for split in ("train", "dev", "test") if (file := folder / f"{split}.json").is_file()]
    return splits or [(file, "train") for file in sorted(folder.glob("Instruct*.json"))]


def c_imhi_here(folder: Path) -> bool:
    """Whether the folder holds such a file: the names alone are too common to tell."""
    files = c_imhi_files(folder)
    try:
        with replacing_surrogates():  # what is wrong with a text is said when it is read
            item = next(read_json_list(files[0][0]), (0, None))[1] if files else None
    except InputError:
        return files[0][0].name.startswith("Instruct")  # damaged: to be read, and named
    return isinstance(item, dict) and set(_ALPACA_COLUMNS) <= set(item)


def _alpaca_row(path: Path, line: int, item: object) -> tuple[str, str, Row]:
    """(task, language, row) of one object."""
    if not isinstance(item, dict):
        raise InputError(f"{path}:{line}: expected an object with {', '.join(_ALPACA_COLUMNS)}")
    for column in _ALPACA_COLUMNS:
        if not isinstance(item.get(column), str):
            fault = "is missing" if column not in item else "is not text"
            raise InputError(
                f"{path}:{line}: column {column!r} {fault}; each object needs {', '.join(_ALPACA_COLUMNS)}"
            )
    asked, given, said = (item[column] for column in _ALPACA_COLUMNS)
    if own := _own_row(line, asked, given, said):
        return own
    prompt, post = _prompt_and_post(asked, given)
    found = [task for task, words in _ASKED.items() if words in prompt]
    if "cognitive_pathway" in found:  # its question may name the parents, and "认知歪曲" is one
        found = ["cognitive_pathway"]
    if len(found) != 1:
        known = ", ".join(_ASKED.values())
        raise InputError(f"{path}:{line}, column 'instruction': expected a question about one of {known}")
    head = _REASONS.split(said, maxsplit=1)
    labels = _named_labels(found[0], head[0])
    if not labels:
        raise InputError(f"{path}:{line}, column 'output': no label of task {found[0]} before the reason; fix the row")
    if denial := _denial(found[0], head[0]):
        raise InputError(f"{path}:{line}, column 'output': {denial!r} stands beside a label and may deny it; "
                         "name only labels that hold before the reason")  # fmt: skip
    explanation = head[1].strip() if len(head) > 1 else ""
    return found[0], "zh", Row(line, post, labels, explanation or None)


def _prompt_and_post(asked: str, given: str) -> tuple[str, str]:
    """What asks, and the post. Quotation marks hold the post only where the prompt stands before them."""
    if not given.strip():
        start, end = _quoted(asked)
        return asked[:start] + asked[end:], asked[start + 1 : end - 1] if end else ""
    asks = any(words in asked for words in _ASKED.values())
    quoted = _PROMPT.match(given) if asks else None
    start, end = _quoted(given) if not asks else quoted.span() if quoted else (0, 0)
    if start < end:
        post = quoted[1] if quoted else given[start + 1 : end - 1]
        return f"{asked}\n{given[:start]}{given[end:]}", post
    return asked, given


def _quoted(text: str) -> tuple[int, int]:
    """From the first opening quotation mark to the last closing one, marks included; (0, 0) without such a pair."""
    start = min((at for mark in '“"「' if (at := text.find(mark)) >= 0), default=-1)
    end = max(text.rfind(mark) for mark in '”"」')
    return (start, end + 1) if 0 <= start < end - 1 else (0, 0)


def _own_row(line: int, asked: str, given: str, said: str) -> tuple[str, str, Row] | None:
    """What our builder wrote: the task's question, the post alone, an answer that parses."""
    for task, language in _askers().get(asked, ()):
        parsed = tasks.parse(task, language, said)
        span = parsed.label_span
        if span is not None and task.read_sentence(said[slice(*span)], language) is not None:
            return task.name, language, Row(line, given, parsed.labels or (), parsed.explanation, asked)
    return None


@functools.cache
def _askers() -> dict[str, list[tuple[tasks.Task, str]]]:
    """Question -> (task, language) that ask it; two IMHI sets share one."""
    found: dict[str, list[tuple[tasks.Task, str]]] = {}
    for task in map(tasks.get_task, tasks.BUILT_IN):
        for language in task.languages:
            for question in task.all_questions(language):
                found.setdefault(question, []).append((task, language))
    return found


def _named_labels(task: str, text: str) -> tuple[str, ...]:
    """Keys of the labels ``text`` names. A name inside a longer one that is also there does not count."""
    if task == "suicide_risk":
        said = {match[1] or match[2] for match in _RISK.finditer(text)}
        return ({"高": "high", "低": "low"}[said.pop()],) if len(said) == 1 else ()
    names = _label_names(task)
    found = _any_name(task).finditer(text)
    return tasks.TASKS[task].ordered(keys) if (keys := {names[match[0]] for match in found}) else ()


def _label_names(task: str) -> dict[str, str]:
    names = {label.name("zh"): label.key for label in tasks.TASKS[task].labels}
    return names | (_CD_NAMES if task == "cognitive_distortion" else {})


def _any_name(task: str) -> re.Pattern[str]:
    if task == "suicide_risk":
        return _RISK
    return re.compile("|".join(map(re.escape, sorted(_label_names(task), key=len, reverse=True))))


def _denial(task: str, text: str) -> str:
    """The first word of ``text`` that may deny a label: it stands in one part of a sentence with the label's name, in
    neither name nor quotation marks. Empty if there is none."""
    for part in _PART.split(_QUOTES.sub(lambda quote: f" {_names_only(task, quote[0])} ", text)):
        rest, names = _any_name(task).subn(" ", part)
        if names and (found := _NOT.search(rest)):
            return found[0]
    return ""


def _names_only(task: str, text: str) -> str:
    """The label names in ``text``."""
    return " ".join(match[0] for match in _any_name(task).finditer(text))


_CD_NAMES = {"应该句式": "should_statements"}


def authors_tasks(folder: Path) -> list[str]:
    """Tasks of the authors' own instruction files in ``folder``: not of what `mentalglm data build` wrote."""
    found: dict[str, None] = {}
    for file, _ in c_imhi_files(folder):
        for line, item in read_json_list(file):
            task, _, _ = _alpaca_row(file, line, item)
            asked, given, said = (item[column] for column in _ALPACA_COLUMNS)
            if file.name.startswith("Instruct") or _own_row(line, asked, given, said) is None:
                found[task] = None
    return [task for task in ORIGINALS if task in found]


# --- raw parts ---


def c_imhi_raw_files(folder: Path) -> list[tuple[Path, str, str]]:
    """(file, task, split) of the raw parts in ``folder``."""
    found = [(file, "suicide_risk", split) for name in _RISK_FOLDERS for part, split in _RISK_PARTS.items()
             if (file := folder / name / f"{part}_set.tsv").is_file()]  # fmt: skip
    for file in sorted((folder / _CD_FOLDER).glob("*.tsv")):
        split = next((split for part, split in {**_RISK_PARTS, "dev": "dev"}.items() if part in file.stem), "train")
        found.append((file, "cognitive_distortion", split))
    return found


def iter_c_imhi_raw(path: str | Path) -> Iterator[Record]:
    """The posts with their labels, without explanation. ``path``: the folder ``Raw data``.

    A risk label is 1 or 0 (1 is high, as in SOS-HL-1K) or its Chinese or English name. A table of distortions has
    SocialCD-3K's header, or no header and its columns in that order; its name says whether it is a test part.

    Raises: InputError naming file, line and column.
    """
    path = Path(path)
    files = c_imhi_raw_files(path)
    if not files:
        raise InputError(f"{path}: no raw part of C-IMHI here; expected Suiside/train_set.tsv or CD/*.tsv")
    for file, task, split in files:
        rows = _risk_rows(file) if task == "suicide_risk" else _distortion_rows(file)
        records = make_records(file, rows, source=C_IMHI_RAW, task=task, language="zh", split=split)
        for number, record in enumerate(records):
            part = f"{C_IMHI_RAW}-{file.parent.name.lower()}-{file.stem}-{number:05d}"
            yield Record.from_dict(record.to_dict() | {"id": part})


def _risk_rows(path: Path) -> Iterator[Row]:
    for line, cells in read_table(path, ("utf-8-sig", "gb18030"), "\t"):
        check_width(path, line, cells, ("label", "text"))
        label = _RISK_LABELS.get(cells[0].strip().lower())
        if label is None:
            raise InputError(f"{path}:{line}, column 1: expected 1 (high) or 0 (low) before the post, found "
                             f"{shown(cells[0])}; fix the label")  # fmt: skip
        yield Row(line, cells[1], (label,))


def _distortion_rows(path: Path) -> Iterator[Row]:
    first = next((cells for _, cells in read_table(path, ("utf-8-sig",), "\t")), [])
    if any(cell.strip() == CD_POST for cell in first) or not _is_bare(first):
        yield from cd_rows(path)
        return
    labels = tasks.TASKS["cognitive_distortion"].labels
    for line, cells in read_table(path, ("utf-8-sig",), "\t"):
        check_width(path, line, cells, (*(label.name("zh") for label in labels), CD_POST))
        if not _is_bare(cells):
            raise InputError(f"{path}:{line}, columns 1-12: expected 0 or 1; fix the label")
        chosen = tuple(label.key for label, cell in zip(labels, cells, strict=False) if cell.strip() == "1")
        if not chosen:
            raise InputError(f"{path}:{line}: no label, all twelve columns are 0; set at least one or delete the row")
        yield Row(line, cells[-1], chosen)


def _is_bare(cells: list[str]) -> bool:
    """A row without header: twelve zeros and ones, then the post."""
    return len(cells) == 13 and all(cell.strip() in ("0", "1") for cell in cells[:12])
