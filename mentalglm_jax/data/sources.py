"""Upstream data sets, read from the files their authors publish: SOS-HL-1K, SocialCD-3K, and the IMHI sets of
MentaLLaMA.

None of them is shipped (the Chinese ones carry no licence). The user names a folder: a clone of the authors'
repository, one of its folders, or a folder that holds several. What is wrong with a file is reported with file, line
and column, and never with the post itself.

    SOS-HL-1K     HongzhiQ/SupervisedVsLLM-EfficacyEval  data/suicide/suicide_{train,val}{_LLM.csv,_BERT.tsv,.jsonl}
    SocialCD-3K   the same repository                    data/SocialCD-3k/{train,test}_data_with_header.tsv
    IMHI          SteveKGYang/MentalLLaMA                train_data/instruction_data/SET/{train,val}.csv,
    test_data/test_instruction/SET.csv
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mentalglm_jax import tasks
from mentalglm_jax.data.records import Record
from mentalglm_jax.data.tables import check_width, read_named_rows, read_table, read_text
from mentalglm_jax.errors import InputError

SOS_HL_1K, SOCIALCD_3K = "sos_hl_1k", "socialcd_3k"
IMHI_DEFAULT = ("DR", "dreaddit", "SAD")
# Name of a set in IMHI's paths -> task.
IMHI_TASKS = {
    "DR": "imhi_dr",
    "dreaddit": "imhi_dreaddit",
    "SAD": "imhi_sad",
    "Irf": "imhi_irf",
    "MultiWD": "imhi_multiwd",
    "CAMS": "imhi_cams",
    "loneliness": "imhi_loneliness",
    "t-sid": "imhi_tsid",
    "swmh": "imhi_swmh",
}
SOURCES = (SOS_HL_1K, SOCIALCD_3K, "imhi", *IMHI_TASKS.values())

# Best first: the tab file with an id is the only one that lost no character (GB18030 has no zero-width space).
_SOS_FORMATS = ("_LLM.csv", "_BERT.tsv", ".jsonl")
_SOS_SPLITS = {"train": "train", "val": "test"}  # 999 + 250: the authors' "val" is the published test part
_SOS_CHAT = {"高自杀风险": "high", "低自杀风险": "low"}
_CD_FILES = {"train": "train_data_with_header.tsv", "test": "test_data_with_header.tsv"}
_CD_ALIASES = {"应该句式": "应该式"}
_CD_POST = "内容"
_IMHI_OPEN, _IMHI_QUESTION = 'Consider this post: "', '" Question: '
_IMHI_COLUMNS = ("query", "gpt-3.5-turbo")


# --- SOS-HL-1K ---


def load_sos_hl_1k(path: str | Path) -> list[Record]:
    """Suicide risk, high or low, Chinese. ``path``: one file in any of the three formats, or a folder (the best format
    there is read).

    Raises: InputError naming file, line and column.
    """
    path = Path(path)
    if path.is_file():
        return _sos_file(path)
    for ending in _SOS_FORMATS:
        files = [path / f"suicide_{part}{ending}" for part in _SOS_SPLITS]
        if any(file.is_file() for file in files):
            return [record for file in files if file.is_file() for record in _sos_file(file)]
    raise InputError(
        f"{path}: no SOS-HL-1K file here; expected suicide_train_LLM.csv, suicide_train_BERT.tsv or suicide_train.jsonl"
    )


def _sos_file(path: Path) -> list[Record]:
    if path.name.endswith(".jsonl"):
        rows = _sos_chat_rows(path)
    elif path.name.endswith(".csv"):
        rows = _sos_table_rows(path)
    else:
        rows = _sos_onehot_rows(path)
    split = next((split for part, split in _SOS_SPLITS.items() if f"_{part}" in path.stem), "train")
    return _records(
        path, SOS_HL_1K, "suicide_risk", "zh", split, ((line, post, (label,), None, None) for line, post, label in rows)
    )


def _sos_onehot_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """No header; columns high, low, post. GB18030 as published; a copy saved as UTF-8 is told apart by its bytes."""
    for line, cells in read_table(path, ("utf-8-sig", "gb18030"), "\t"):
        check_width(path, line, cells, ("high", "low", "post"))
        onehot = (cells[0].strip(), cells[1].strip())
        if onehot not in (("1", "0"), ("0", "1")):
            raise InputError(
                f"{path}:{line}, columns 1-2: expected '1 0' (high) or '0 1' (low), found "
                f"{_short(' '.join(onehot))}; fix the label"
            )
        yield line, cells[2], "high" if onehot == ("1", "0") else "low"


def _sos_table_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Header id, label, comment; separated by tabs although the file is called .csv. Label 1 = high."""
    for line, row in read_named_rows(path, ("id", "label", "comment"), "\t"):
        label = {"1": "high", "0": "low"}.get(row["label"].strip())
        if label is None:
            raise InputError(
                f"{path}:{line}, column 'label': expected 1 (high) or 0 (low), "
                f"found {_short(row['label'])}; fix the label"
            )
        yield line, row["comment"], label


def _sos_chat_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """One chat a line: the last user message is the post, the assistant's answer the label."""
    for line, text in enumerate(read_text(path, ("utf-8-sig",)).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            by_role = {message["role"]: message["content"] for message in json.loads(text)["messages"]}
            post, said = by_role["user"], by_role["assistant"]
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}:{line}: not JSON ({error.msg}, column {error.colno}); fix or delete the line"
            ) from None
        except (KeyError, TypeError):
            raise InputError(
                f"{path}:{line}: expected {{'messages': [...]}} with a user and an assistant message; fix the line"
            ) from None
        if not isinstance(said, str) or said.strip() not in _SOS_CHAT:
            raise InputError(
                f"{path}:{line}, assistant message: expected one of {', '.join(_SOS_CHAT)}, "
                f"found {_short(said)}; fix the label"
            )
        if not isinstance(post, str):
            raise InputError(f"{path}:{line}, user message: expected text; fix the line")
        yield line, post, _SOS_CHAT[said.strip()]


# --- SocialCD-3K ---


def load_socialcd_3k(path: str | Path) -> list[Record]:
    """Cognitive distortions, twelve labels, several per post, Chinese. ``path``: one file, or the folder with the train
    and test file.

    Raises: InputError naming file, line and column.
    """
    path = Path(path)
    if path.is_file():
        return _cd_file(path, "test" if path.stem.startswith("test") else "train")
    found = [(path / name, split) for split, name in _CD_FILES.items() if (path / name).is_file()]
    if not found:
        raise InputError(f"{path}: no SocialCD-3K file here; expected {' or '.join(_CD_FILES.values())}")
    return [record for file, split in found for record in _cd_file(file, split)]


def _cd_file(path: Path, split: str) -> list[Record]:
    labels = tasks.TASKS["cognitive_distortion"].labels

    def rows() -> Iterator[tuple[int, str, tuple[str, ...], str | None, None]]:
        for line, row in read_named_rows(path, (*(label.zh for label in labels), _CD_POST), "\t", _CD_ALIASES):
            for label in labels:
                if row[label.zh].strip() not in ("0", "1"):
                    raise InputError(
                        f"{path}:{line}, column {label.zh!r}: expected 0 or 1, "
                        f"found {_short(row[label.zh])}; fix the label"
                    )
            chosen = tuple(label.key for label in labels if row[label.zh].strip() == "1")
            if not chosen:
                raise InputError(
                    f"{path}:{line}: no label, all twelve columns are 0; set at least one or delete the row"
                )
            yield line, row[_CD_POST], chosen, None, None

    return _records(path, SOCIALCD_3K, "cognitive_distortion", "zh", split, rows())


# --- IMHI ---


def load_imhi(path: str | Path, sets: Sequence[str] = IMHI_DEFAULT) -> list[Record]:
    """The instruction files of IMHI, English, each with the explanation upstream gives.

    Args:
        path: a clone of the repository, its ``train_data/instruction_data`` (``SET/train.csv`` and ``SET/val.csv``), or
            ``test_data/test_instruction`` (``SET.csv``). Of a clone both parts are read.
        sets: names as in the paths (``IMHI_TASKS``).

    Raises:
        InputError: an unknown set, no file of a set, or a damaged file (file, line and column are named).
    """
    path = Path(path)
    records: list[Record] = []
    for name in sets:
        if name not in IMHI_TASKS:
            raise InputError(f"IMHI: unknown set {name!r}; known: {', '.join(IMHI_TASKS)}")
        files = _imhi_files(path, name)
        if not files:
            raise InputError(
                f"{path}: no file of IMHI set {name}; expected {name}/train.csv, {name}/val.csv or {name}.csv"
            )
        records += [record for file, split in files for record in _imhi_file(file, name, split)]
    return records


def _imhi_files(path: Path, name: str) -> list[tuple[Path, str]]:
    train = (path, path / "train_data" / "instruction_data", path / "instruction_data")
    test = (path, path / "test_data" / "test_instruction", path / "test_instruction")
    files = [
        (base / name / f"{part}.csv", split) for base in train for part, split in (("train", "train"), ("val", "dev"))
    ]
    files += [(base / f"{name}.csv", "test") for base in test]
    return [(file, split) for file, split in files if file.is_file()]


def _imhi_file(path: Path, name: str, split: str) -> list[Record]:
    task = tasks.TASKS[IMHI_TASKS[name]]
    query, response = _IMHI_COLUMNS

    def rows() -> Iterator[tuple[int, str, tuple[str, ...], str | None, str]]:
        for line, row in read_named_rows(path, _IMHI_COLUMNS, ","):
            head, found, question = row[query].rpartition(_IMHI_QUESTION)
            if not found or not head.startswith(_IMHI_OPEN):
                raise InputError(
                    f"{path}:{line}, column {query!r}: expected "
                    "'Consider this post: \"...\" Question: ...'; fix or delete the row"
                )
            if question.strip() not in task.all_questions("en"):
                raise InputError(
                    f"{path}:{line}, column {query!r}: the question is not one of set {name}; "
                    "is the file in the right folder?"
                )
            parsed = tasks.parse(task, "en", row[response])
            if parsed.labels is None:
                wanted = next(iter(task.candidates("en").values()))
                fault = "no label" if parsed.status == "no_label" else f"unknown label for set {name}"
                raise InputError(
                    f"{path}:{line}, column {response!r}: {fault}; "
                    f"expected a label sentence such as {wanted!r} before 'Reasoning:'"
                )
            yield line, head[len(_IMHI_OPEN) :], parsed.labels, parsed.explanation, question.strip()

    return _records(path, task.name, task.name, "en", split, rows())


# --- all together ---


def load_upstream(root: str | Path, names: Sequence[str]) -> list[Record]:
    """Finds the named data sets below ``root`` and reads them, in the order of ``names``.

    Args:
        root: a clone, or a folder that holds clones or the folders ``sos_hl_1k``, ``socialcd_3k``, ``imhi``.
        names: of ``SOURCES``; "imhi" stands for DR, dreaddit and SAD.

    Raises:
        InputError: ``root`` or a data set is missing, a name is unknown, or a file is damaged.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the folder that holds the upstream data sets")
    by_task = {task: name for name, task in IMHI_TASKS.items()}
    records: list[Record] = []
    for name in names:
        if name not in SOURCES:
            raise InputError(f"unknown data set {name!r}; known: {', '.join(SOURCES)}")
        if name == SOS_HL_1K:
            folder = _find(
                root, name, ("", "sos_hl_1k", "data/suicide"), lambda path: any(path.glob("suicide_train*.*"))
            )
            records += load_sos_hl_1k(folder)
        elif name == SOCIALCD_3K:
            folder = _find(
                root,
                name,
                ("", "socialcd_3k", "data/SocialCD-3k"),
                lambda path: any(path.glob("*_data_with_header.tsv")),
            )
            records += load_socialcd_3k(folder)
        else:
            sets = IMHI_DEFAULT if name == "imhi" else (by_task[name],)
            folder = _find(
                root, name, ("", "imhi", "train_data"), lambda path, sets=sets: bool(_imhi_files(path, sets[0]))
            )
            records += load_imhi(folder, sets)
    return records


def count_records(records: Iterable[Record]) -> dict[str, dict[str, dict[str, Any]]]:
    """Per task and split: ``records`` and, by frequency, ``labels`` (each label of a multi-label record counts)."""
    found: dict[str, dict[str, tuple[int, Counter[str]]]] = {}
    for record in records:
        splits = found.setdefault(record.task, {})
        number, labels = splits.get(record.split, (0, Counter()))
        labels.update(record.gold)
        splits[record.split] = (number + 1, labels)
    return {
        task: {split: {"records": n, "labels": dict(labels.most_common())} for split, (n, labels) in splits.items()}
        for task, splits in found.items()
    }


def _find(root: Path, name: str, places: Sequence[str], holds: Callable[[Path], bool]) -> Path:
    """The first of ``places`` that holds the data set, below ``root`` or below a folder of it (a clone)."""
    bases = [root, *sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))]
    for base in bases:
        for place in places:
            if (base / place).is_dir() and holds(base / place):
                return base / place
    raise InputError(
        f"{root}: data set {name} not found; looked here and one folder down for {', '.join(p for p in places if p)}"
    )


def normalize_post(text: str) -> str:
    """One spelling for posts that differ only in width, case or white space (NFKC, casefold, single spaces)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def dev_split(records: Iterable[Record], fraction: float = 0.2) -> list[Record]:
    """Moves about ``fraction`` of the training records to "dev", by a hash of the normalised post; the order stays.

    The choice depends on the post alone, so the same post falls on the same side in every file, run and version. A
    training post that also stands in a published dev or test part goes to "dev" whatever its hash, so that it is never
    trained on.

    Raises: InputError if ``fraction`` is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise InputError(f"development fraction: {fraction} is not in [0, 1); try 0.2")
    records = list(records)
    published = {normalize_post(record.post) for record in records if record.split != "train"}

    def side(post: str) -> str:
        text = normalize_post(post)
        number = int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")
        return "dev" if text in published or number < fraction * 2**64 else "train"

    return [replace(record, split=side(record.post)) if record.split == "train" else record for record in records]


# --- building ---


def _records(
    path: Path,
    source: str,
    task: str,
    language: str,
    split: str,
    rows: Iterable[tuple[int, str, tuple[str, ...], str | None, str | None]],
) -> list[Record]:
    """Records from (line, post, labels, explanation, question or None for the task's own)."""
    single = tasks.TASKS[task].kind == "single"
    records = []
    for number, (line, post, labels, explanation, question) in enumerate(rows):
        if not post.strip():
            raise InputError(f"{path}:{line}: the post is empty; fill it in or delete the row")
        records.append(
            Record(
                id=f"{source}-{split}-{number:05d}",
                task=task,
                language=language,
                post=post.strip(),
                question=question or tasks.TASKS[task].question(language),
                label=labels[0] if single else None,
                labels=None if single else labels,
                explanation=explanation,
                source=source,
                split=split,
            )
        )
    if not records:
        raise InputError(f"{path}: holds no row; is the download complete?")
    return records


def _short(value: object) -> str:
    """A label as found; anything long may be a post in the wrong column, which is not shown."""
    text = str(value).strip()
    if not text:
        return "nothing (a row with no label)"
    return repr(text) if len(text) <= 12 else f"text of {len(text)} characters"
