"""The Chinese data sets, read row by row: SOS-HL-1K, SOS-1K, SocialCD-3K and pathways (C-IMHI: ``c_imhi.py``).

SOS-HL-1K     HongzhiQ/SupervisedVsLLM-EfficacyEval  data/suicide/suicide_{train,val}{_LLM.csv,_BERT.tsv,.jsonl}
SocialCD-3K   the same repository                    data/SocialCD-3k/{train,test}_data_with_header.tsv
SOS-1K        HongzhiQ/FineGrainedSuicideDetection   ModelTrain/data/{train_dataK,val_dataK,test_data}.tsv
pathways      JiangMeng-JM/Cognitive-Pathways        {train,dev,test}.txt (withdrawn by its authors: own files only)
"""

import re
from collections.abc import Iterator
from pathlib import Path

from mentalglm_jax.data.records import Record
from mentalglm_jax.data.rows import Row, make_records, shown
from mentalglm_jax.data.surrogates import whole_texts
from mentalglm_jax.data.tables import check_width, read_lines, read_named_rows, read_table
from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import parse_json
from mentalglm_jax.text import tasks
from mentalglm_jax.text.labels import nearest

SOS_HL_1K, SOS_1K, SOCIALCD_3K, PATHWAYS = "sos_hl_1k", "sos_1k", "socialcd_3k", "pathways"

# Best first: the tab file with an id is the only one that lost no character (GB18030 has no zero-width space).
_SOS_FORMATS = ("_LLM.csv", "_BERT.tsv", ".jsonl")
_SOS_SPLITS = {"train": "train", "val": "test"}  # 999 + 250: the authors' "val" is the published test part
SOS_CHAT_FILES = ("suicide_train.jsonl", "suicide_val.jsonl")  # chats, not records
_SOS_CHAT = {"高自杀风险": "high", "低自杀风险": "low"}
_CD_FILES = {"train": "train_data_with_header.tsv", "test": "test_data_with_header.tsv"}
CD_POST = "内容"
_LEVEL_COLUMNS = ("comment", "myLabel")
_PATHWAY_FILES = {"train": "train.txt", "dev": "dev.txt", "test": "test.txt"}


# --- SOS-HL-1K ---


def iter_sos_hl_1k(path: str | Path) -> Iterator[Record]:
    """Suicide risk, high or low. ``path``: one file in any of the three formats, or a folder (of each part the best
    format there is read).

    Raises: InputError naming file, line and column.
    """
    path = Path(path)
    files = [path] if path.is_file() else sos_files(path)
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


def sos_files(folder: Path) -> list[Path]:
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
            found = whole_texts(
                parse_json(text, f"{path}:{line}", "fix or delete the line", half_pairs=True), text, f"{path}:{line}"
            )
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
        rows = cd_rows(file)
        yield from make_records(file, rows, source=SOCIALCD_3K, task="cognitive_distortion", language="zh", split=split)


def load_socialcd_3k(path: str | Path) -> list[Record]:
    """``iter_socialcd_3k`` as a list."""
    return list(iter_socialcd_3k(path))


def cd_rows(path: Path) -> Iterator[Row]:
    """Rows of a table with a header: the twelve labels' columns and the post's."""
    task = tasks.TASKS["cognitive_distortion"]
    labels, spelt = task.labels, task.spellings("zh")
    names = [label.name("zh") for label in labels]
    same = {other: names[task.keys.index(key)] for other, key in spelt.items() if other not in names}
    for line, row in read_named_rows(path, (*names, CD_POST), "\t", same):
        for name in names:
            if row[name].strip() not in ("0", "1"):
                raise InputError(
                    f"{path}:{line}, column {name!r}: expected 0 or 1, found {shown(row[name])}; fix the label"
                )
        chosen = tuple(label.key for label, name in zip(labels, names, strict=True) if row[name].strip() == "1")
        if not chosen:
            raise InputError(f"{path}:{line}: no label, all twelve columns are 0; set at least one or delete the row")
        yield Row(line, row[CD_POST], chosen)


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
            return (
                "zh"
                if any(parent.name("zh") + "##" in text for parent in tasks.TASKS["cognitive_pathway"].parents)
                else "en"
            )
    return "zh"


def _pathway_rows(path: Path, language: str) -> Iterator[Row]:
    order = tasks.TASKS["cognitive_pathway"]
    parents = {parent.name(language): parent.key for parent in order.parents}
    for line, text in read_lines(path):
        cells = text.split("\t")
        check_width(path, line, cells, ("text", "labels"))
        names = [name.strip() for name in cells[1].split(",") if name.strip()]
        alone = {parents[name] for name in names if name in parents}
        try:
            keys = {pathway_key(name, language) for name in names if name not in parents}
        except InputError:
            wrong = next(name for name in names if name not in parents and not _is_pathway(name, language))
            raise InputError(
                f"{path}:{line}, column 'labels': {shown(wrong)} is no parent##child label; fix the label"
            ) from None
        if childless := alone - {key[0] for key in keys}:
            name = next(name for name, key in parents.items() if key == min(childless))
            raise InputError(f"{path}:{line}, column 'labels': {name!r} stands without any of its children; add one")
        if not keys:
            raise InputError(f"{path}:{line}, column 'labels': no label; give at least one or delete the row")
        yield Row(line, cells[0], order.ordered(keys))


def _is_pathway(name: str, language: str) -> bool:
    try:
        pathway_key(name, language)
    except InputError:
        return False
    return True


def pathway_name(key: str, language: str) -> str:
    """Upstream's ``parent##child`` spelling of a cognitive pathway label, e.g. "Belief##Mental_filter"."""
    task = tasks.TASKS["cognitive_pathway"]
    for label in task.labels:
        if label.key == key:
            parent = next(one for one in task.parents if one.key == label.parent).name(language)
            child = label.name(language)
            return f"{parent}##{child.capitalize().replace(' ', '_') if language == 'en' else child}"
    raise InputError(f"cognitive pathway: unknown label {key!r}{nearest(key, task.keys)}")


def pathway_key(name: str, language: str) -> str:
    """The label key of a ``parent##child`` spelling. Raises: InputError if parent and child do not belong together."""
    keys = tasks.TASKS["cognitive_pathway"].keys
    known = {pathway_name(key, language): key for key in keys}
    if name.strip() not in known:
        raise InputError(f"cognitive pathway: unknown label {name!r}{nearest(name, known)}")
    return known[name.strip()]
