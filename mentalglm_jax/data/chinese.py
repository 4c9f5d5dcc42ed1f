"""The Chinese data sets, read row by row: SOS-HL-1K, SOS-1K, SocialCD-3K, cognitive pathways and C-IMHI's instruction
files.

    SOS-HL-1K     HongzhiQ/SupervisedVsLLM-EfficacyEval  data/suicide/suicide_{train,val}{_LLM.csv,_BERT.tsv,.jsonl}
    SocialCD-3K   the same repository                    data/SocialCD-3k/{train,test}_data_with_header.tsv
    SOS-1K        HongzhiQ/FineGrainedSuicideDetection   ModelTrain/data/{train_dataK,val_dataK,test_data}.tsv
    pathways      JiangMeng-JM/Cognitive-Pathways        {train,dev,test}.txt (withdrawn by its authors: own files only)
    C-IMHI        MentalGLM, or `mentalglm data build`   Instruct*.json, alpaca/{train,dev,test}.json
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

from mentalglm_jax.data.records import Record
from mentalglm_jax.data.rows import Row, make_records, shown
from mentalglm_jax.data.tables import check_width, read_json_list, read_lines, read_named_rows, read_table
from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import parse_json
from mentalglm_jax.text import tasks

SOS_HL_1K, SOS_1K, SOCIALCD_3K, PATHWAYS, C_IMHI = "sos_hl_1k", "sos_1k", "socialcd_3k", "pathways", "c_imhi"

# Best first: the tab file with an id is the only one that lost no character (GB18030 has no zero-width space).
_SOS_FORMATS = ("_LLM.csv", "_BERT.tsv", ".jsonl")
_SOS_SPLITS = {"train": "train", "val": "test"}  # 999 + 250: the authors' "val" is the published test part
_SOS_CHAT = {"高自杀风险": "high", "低自杀风险": "low"}
_CD_FILES = {"train": "train_data_with_header.tsv", "test": "test_data_with_header.tsv"}
_CD_ALIASES = {"应该句式": "应该式"}
_CD_POST = "内容"
_LEVEL_COLUMNS = ("comment", "myLabel")
_PATHWAY_FILES = {"train": "train.txt", "dev": "dev.txt", "test": "test.txt"}
_ALPACA_COLUMNS = ("instruction", "input", "output")


# --- SOS-HL-1K ---


def iter_sos_hl_1k(path: str | Path) -> Iterator[Record]:
    """Suicide risk, high or low. ``path``: one file in any of the three formats, or a folder (of each part the best
    format there is read).

    Raises: InputError naming file, line and column.
    """
    path = Path(path)
    files = [path] if path.is_file() else _sos_files(path)
    if not files:
        raise InputError(
            f"{path}: no SOS-HL-1K file here; expected suicide_train_LLM.csv, suicide_train_BERT.tsv or "
            "suicide_train.jsonl"
        )
    for file in files:
        if file.name.endswith(".jsonl"):
            rows = _sos_chat_rows(file)
        elif file.name.endswith(".csv"):
            rows = _sos_table_rows(file)
        else:
            rows = _sos_onehot_rows(file)
        split = next((split for part, split in _SOS_SPLITS.items() if f"_{part}" in file.stem), "train")
        yield from make_records(file, rows, source=SOS_HL_1K, task="suicide_risk", language="zh", split=split)


def load_sos_hl_1k(path: str | Path) -> list[Record]:
    """``iter_sos_hl_1k`` as a list."""
    return list(iter_sos_hl_1k(path))


def _sos_files(folder: Path) -> list[Path]:
    """Of each part the file in the best format that it is there in."""
    found = [[f for ending in _SOS_FORMATS if (f := folder / f"suicide_{part}{ending}").is_file()]
             for part in _SOS_SPLITS]  # fmt: skip
    return [files[0] for files in found if files]


def _sos_onehot_rows(path: Path) -> Iterator[Row]:
    """No header; columns high, low, post. GB18030 as published; a copy saved as UTF-8 is told apart by its bytes."""
    for line, cells in read_table(path, ("utf-8-sig", "gb18030"), "\t"):
        check_width(path, line, cells, ("high", "low", "post"))
        onehot = (cells[0].strip(), cells[1].strip())
        if onehot not in (("1", "0"), ("0", "1")):
            raise InputError(
                f"{path}:{line}, columns 1-2: expected '1 0' (high) or '0 1' (low), found "
                f"{shown(' '.join(onehot))}; fix the label"
            )
        yield Row(line, cells[2], ("high" if onehot == ("1", "0") else "low",))


def _sos_table_rows(path: Path) -> Iterator[Row]:
    """Header id, label, comment; separated by tabs although the file is called .csv. Label 1 = high."""
    for line, row in read_named_rows(path, ("id", "label", "comment"), "\t"):
        label = {"1": "high", "0": "low"}.get(row["label"].strip())
        if label is None:
            raise InputError(
                f"{path}:{line}, column 'label': expected 1 (high) or 0 (low), "
                f"found {shown(row['label'])}; fix the label"
            )
        yield Row(line, row["comment"], (label,))


def _sos_chat_rows(path: Path) -> Iterator[Row]:
    """One chat a line: the last user message is the post, the assistant's answer the label."""
    for line, text in read_lines(path):
        try:
            found = parse_json(text, f"{path}:{line}", "fix or delete the line")
            by_role = {message["role"]: message["content"] for message in found["messages"]}
            post, said = by_role["user"], by_role["assistant"]
        except (KeyError, TypeError):
            raise InputError(
                f"{path}:{line}: expected {{'messages': [...]}} with a user and an assistant message; fix the line"
            ) from None
        if not isinstance(said, str) or said.strip() not in _SOS_CHAT:
            raise InputError(
                f"{path}:{line}, assistant message: expected one of {', '.join(_SOS_CHAT)}, "
                f"found {shown(said)}; fix the label"
            )
        if not isinstance(post, str):
            raise InputError(f"{path}:{line}, user message: expected text; fix the line")
        yield Row(line, post, (_SOS_CHAT[said.strip()],))


# --- SOS-1K ---


def iter_sos_1k(path: str | Path) -> Iterator[Record]:
    """Suicide risk in eleven levels. ``path``: one file, or the folder with ``test_data.tsv`` and the folds. Of several
    folds the first is read: in the others the same posts change sides.

    Raises: InputError naming file, line and column.
    """
    path = Path(path)
    files = [(path, _level_split(path.stem))] if path.is_file() else sos_1k_files(path)
    if not files:
        raise InputError(f"{path}: no SOS-1K file here; expected train_data4.tsv, val_data4.tsv or test_data.tsv")
    for file, split in files:
        rows = _level_rows(file)
        yield from make_records(file, rows, source=SOS_1K, task="suicide_level", language="zh", split=split)


def sos_1k_files(folder: Path) -> list[tuple[Path, str]]:
    """(file, split) of the first fold and the test part."""
    folds = sorted(folder.glob("train_data*.tsv")) or sorted(folder.glob("val_data*.tsv"))
    first = re.sub(r"^\D+", "", folds[0].stem) if folds else ""
    names = (f"train_data{first}.tsv", f"val_data{first}.tsv", "test_data.tsv")
    return [(file, _level_split(file.stem)) for name in names if (file := folder / name).is_file()]


def _level_split(stem: str) -> str:
    return {"val": "dev", "tes": "test"}.get(stem[:3], "train")


def _level_rows(path: Path) -> Iterator[Row]:
    for line, row in read_named_rows(path, _LEVEL_COLUMNS, "\t"):
        level = row["myLabel"].strip()
        if level not in tasks.TASKS["suicide_level"].keys:
            raise InputError(
                f"{path}:{line}, column 'myLabel': expected a level from 0 to 10, found {shown(level)}; fix the label"
            )
        yield Row(line, row["comment"], (level,))


# --- SocialCD-3K ---


def iter_socialcd_3k(path: str | Path) -> Iterator[Record]:
    """Cognitive distortions, twelve labels, several per post. ``path``: one file, or the folder with the train and test
    file.

    Raises: InputError naming file, line and column.
    """
    path = Path(path)
    if path.is_file():
        files = [(path, "test" if path.stem.startswith("test") else "train")]
    else:
        files = [(path / name, split) for split, name in _CD_FILES.items() if (path / name).is_file()]
    if not files:
        raise InputError(f"{path}: no SocialCD-3K file here; expected {' or '.join(_CD_FILES.values())}")
    for file, split in files:
        rows = _cd_rows(file)
        yield from make_records(file, rows, source=SOCIALCD_3K, task="cognitive_distortion", language="zh", split=split)


def load_socialcd_3k(path: str | Path) -> list[Record]:
    """``iter_socialcd_3k`` as a list."""
    return list(iter_socialcd_3k(path))


def _cd_rows(path: Path) -> Iterator[Row]:
    labels = tasks.TASKS["cognitive_distortion"].labels
    for line, row in read_named_rows(path, (*(label.zh for label in labels), _CD_POST), "\t", _CD_ALIASES):
        for label in labels:
            if row[label.zh].strip() not in ("0", "1"):
                raise InputError(
                    f"{path}:{line}, column {label.zh!r}: expected 0 or 1, found {shown(row[label.zh])}; fix the label"
                )
        chosen = tuple(label.key for label in labels if row[label.zh].strip() == "1")
        if not chosen:
            raise InputError(f"{path}:{line}: no label, all twelve columns are 0; set at least one or delete the row")
        yield Row(line, row[_CD_POST], chosen)


# --- cognitive pathways ---


def iter_pathways(path: str | Path) -> Iterator[Record]:
    """Sentences with the cognitive pathway labels they show. One line a sentence: the text, a tab, labels joined by
    commas, each ``parent##child`` (a parent may also stand on its own beside its children). The language is that of the
    labels.

    Raises: InputError naming file and line.
    """
    path = Path(path)
    files = [(path, "train")] if path.is_file() else []
    for split, name in _PATHWAY_FILES.items():
        if path.name == name:
            files = [(path, split)]
        elif (path / name).is_file():
            files.append((path / name, split))
    if not files:
        raise InputError(f"{path}: no cognitive pathway file here; expected {', '.join(_PATHWAY_FILES.values())}")
    for file, split in files:
        language = _pathway_language(file)
        rows = _pathway_rows(file, language)
        yield from make_records(file, rows, source=PATHWAYS, task="cognitive_pathway", language=language, split=split)


def pathways_here(folder: Path) -> bool:
    """Whether the folder holds such a file: the names alone are too common to tell."""
    files = [file for name in _PATHWAY_FILES.values() if (file := folder / name).is_file()]
    try:
        return bool(files) and "##" in next(read_lines(files[0]), (0, ""))[1]
    except InputError:
        return False


def _pathway_language(path: Path) -> str:
    for _, text in read_lines(path):
        if "##" in text:
            return "zh" if any(name["zh"] + "##" in text for name in tasks.PATHWAY_PARENTS.values()) else "en"
    return "zh"


def _pathway_rows(path: Path, language: str) -> Iterator[Row]:
    parents = {names[language]: key for key, names in tasks.PATHWAY_PARENTS.items()}
    order = tasks.TASKS["cognitive_pathway"]
    for line, text in read_lines(path):
        cells = text.split("\t")
        check_width(path, line, cells, ("text", "labels"))
        names = [name.strip() for name in cells[1].split(",") if name.strip()]
        alone = {parents[name] for name in names if name in parents}
        try:
            keys = {tasks.pathway_key(name, language) for name in names if name not in parents}
        except InputError:
            wrong = next(name for name in names if name not in parents and not _is_pathway(name, language))
            raise InputError(
                f"{path}:{line}, column 'labels': {shown(wrong)} is no parent##child label; fix the label"
            ) from None
        if childless := alone - {key[0] for key in keys}:
            name = tasks.PATHWAY_PARENTS[min(childless)][language]
            raise InputError(f"{path}:{line}, column 'labels': {name!r} stands without any of its children; add one")
        if not keys:
            raise InputError(f"{path}:{line}, column 'labels': no label; give at least one or delete the row")
        yield Row(line, cells[0], order.ordered(keys))


def _is_pathway(name: str, language: str) -> bool:
    try:
        tasks.pathway_key(name, language)
    except InputError:
        return False
    return True


# --- C-IMHI ---

_PROMPT = re.compile(r"\s*考虑以下这个帖子\s*[：:]\s*[“\"「](.+)[”\"」]", re.DOTALL)
_ASKED = {"suicide_risk": "自杀风险", "cognitive_distortion": "认知歪曲"}
_REASONS = re.compile(r"(?:推理|解释|理由|原因|分析)\s*[：:]|(?:因为|理由是)")
_QUOTES = re.compile(r'“[^“”]*”|「[^「」]*」|"[^"]*"')
_PART = re.compile(r"[，,。；;！!？?\n]")
# What denies a label; not "非常", "不仅", "毫无疑问", "未来".
_NOT = re.compile(r"没|不(?![仅但只光])|非(?!常)|无(?!疑)|未(?!来)|否")
_RISK = re.compile(r"(高|低)(?:自杀风险|风险)|自杀风险(?:是|为|等级为|较|很)?(高|低)")


def iter_c_imhi(path: str | Path) -> Iterator[Record]:
    """C-IMHI's instruction files: JSON lists of objects with ``instruction``, ``input`` and ``output``.

    What ``mentalglm data build`` wrote is read back exactly. Of the authors' files (suicide risk, distortions) the
    question and the place of the post are known: it stands in quotation marks inside the prompt, or alone in ``input``
    (whole, its own quotation marks included). The wording of their answers is not: the label names before the reason
    are read, and an answer that names none, or denies one, is refused.

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
        return asked[:start] + asked[end:], asked[start + 1 : end - 1]
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
        if parsed.labels is not None:
            return task.name, language, Row(line, given, parsed.labels, parsed.explanation, asked)
    return None


@functools.cache
def _askers() -> dict[str, list[tuple[tasks.Task, str]]]:
    """Question -> (task, language) that ask it; two IMHI sets share one."""
    found: dict[str, list[tuple[tasks.Task, str]]] = {}
    for task in tasks.TASKS.values():
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
    names = {label.zh: label.key for label in tasks.TASKS[task].labels}
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
