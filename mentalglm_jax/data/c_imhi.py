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
_PART = re.compile(r"[，,；;]")
_SENTENCE = re.compile(r"[^。！!？?\n]*[。！!？?\n]*")
# The words of a label sentence that change nothing of what it says. It is read only if it consists of these and of the
# labels' names, so no word that denies or doubts one (没有, 难以, 未必, and those nobody thought of) can be overlooked.
_PLAIN = (
    "答案|回答|结果|结论|标签|类型|类别|等级|级别|水平|程度|状态|情况|特征|表现|迹象|帖子|帖子中|博文|博文中|"
    "微博|微博中|推文|内容|内容中|文本|文本中|文章|文中|其中|话|用户|发帖人|作者|博主|我|认为|判断|判定|评估|"
    "预测|归类|分类|识别|这个|该|此|本|这条|这则|这篇|这段|其|所|体现|显示|显现|反映|呈现|表明|表达|透露|展现|"
    "包含|包括|涉及|属于|处于|存在|具有|出现|出|出来|有|是|为|即|了|着|的|主要|非常|明显|明确|显著|十分|毫无疑问|"
    "显然|确实|一种|一个|一些|这些|这种|以下|如下|几种|多种|两种|三种|不仅|不但|不只|不光|而且|并且|并|而|还|也|"
    "又|既|同时|以及|和|与|及|跟|等|根据|从|来看|可以看出|看出|上"
)
_MARKS = r"[\s：:、“”「」\"'《》【】\[\]*_#>.·—-]"
# Words of the question, which an answer repeats.
_TOPICS = {
    "suicide_risk": ("自杀风险", "风险"),
    "cognitive_distortion": ("认知歪曲", "认知扭曲"),
    "cognitive_pathway": ("认知路径", *(parent.name("zh") for parent in tasks.TASKS["cognitive_pathway"].parents)),
}
_DOUBTS = "难以|难说|可能|也许|或许|似乎|好像|疑似|大概|恐怕|不确定|未必|不一定|说不|存疑|无法|待定|[?？]"
_DOUBT = re.compile(_DOUBTS)
_UNDECIDED = re.compile(r"(?:难以|很难|无法|不能|不好|未能)\w{0,3}?(?:判断|判定|确定|断定)|不确定")
_WORD = re.compile(r"\S+")
_DENIAL = re.compile(rf"{_DOUBTS}|没|不(?![仅但只光])|非(?!常)|无(?!疑)|未(?!来)|否|难")
_RISK_LEVELS = {"高": "high", "低": "low"}
_RISK_NAMED = re.compile(r"[高低]度?的?(?:自杀)?风险|风险.{0,8}?[高低]")


def iter_c_imhi(path: str | Path) -> Iterator[Record]:
    """C-IMHI's instruction files: JSON lists of objects with ``instruction``, ``input`` and ``output``.

    What ``mentalglm data build`` wrote is read back exactly. Of the authors' files (suicide risk, distortions,
    pathways) the question and the place of the post are known: it stands in quotation marks inside the prompt, or alone
    in ``input`` (whole, its own quotation marks included). The wording of their answers is not: of what stands before
    the reason a label sentence is read as a whole, and an answer that states no label, or denies or doubts one, is
    refused.

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
    task = tasks.TASKS[found[0]]
    labels, doubt = _stated(task.name, head[0])
    if doubt:
        raise InputError(f"{path}:{line}, column 'output': {shown(doubt)} stands beside a label and may deny it; "
                         "name only labels that hold before the reason")  # fmt: skip
    if not labels or (task.arity == "single" and len(labels) > 1):
        raise InputError(f"{path}:{line}, column 'output': no label of task {task.name} before the reason; fix the row")
    explanation = head[1].strip() if len(head) > 1 else ""
    return found[0], "zh", Row(line, post, task.ordered(labels), explanation or None)


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


def _stated(task: str, text: str) -> tuple[tuple[str, ...], str]:
    """Keys of the labels that ``text`` states; or none, and the word that keeps it from stating one, if there is one.

    A part of a sentence states a label if it consists of labels' names and plain words. In the first sentence that
    names a label every part that names one must do so; a later sentence, which may explain, must not deny or doubt one.
    """
    keys, first = set[str](), True
    # 高 and 低 are in many words: such a name is of a risk where its sentence says so, or where nothing else is said.
    alone = task != "suicide_risk" or not _read_part(task, text.strip("。！!\n "))[1]
    for sentence in _SENTENCE.findall(_QUOTES.sub(lambda quote: f" {_only_names(task, quote[0])} ", text)):
        parts, said = _PART.split(sentence.rstrip("。！!\n")), set[str]()
        for part in parts:
            found, rest = _read_part(task, part)
            if found and not rest and (alone or "风险" in sentence):
                said |= found
            elif _names_one(task, part, found) and (doubt := (_DENIAL.search(rest) or (first and _WORD.search(rest)))):
                return (), doubt[0]
        doubt = next((doubt for part in parts if (doubt := (_DOUBT if said else _UNDECIDED).search(part))), None)
        if doubt:
            return (), doubt[0]
        keys, first = keys | said, first and not said
    return tuple(keys), ""


def _read_part(task: str, part: str) -> tuple[set[str], str]:
    """Keys of the labels that are named in it, and what else stands there but plain words."""
    names, found = _label_names(task), set[str]()

    def take(word: re.Match[str]) -> str:
        found.update({names[word[0]]} if word[0] in names else ())
        return " "

    return found, _tokens(task).sub(take, part).strip()


def _names_one(task: str, part: str, found: set[str]) -> bool:
    """Whether a part of a sentence speaks of a label, in whatever words."""
    return bool(_RISK_NAMED.search(part)) if task == "suicide_risk" else bool(found)


def _only_names(task: str, quote: str) -> str:
    """A quotation that holds nothing but label names, else nothing: it is of the post."""
    found, rest = _read_part(task, quote)
    return quote if found and not rest else ""


@functools.cache
def _tokens(task: str) -> re.Pattern[str]:
    words = {*_label_names(task), *_PLAIN.split("|"), *_TOPICS[task]}
    return re.compile("|".join([*map(re.escape, sorted(words, key=len, reverse=True)), _MARKS]))


@functools.cache
def _label_names(task: str) -> dict[str, str]:
    if task == "suicide_risk":
        return {f"{more}{name}{degree}": key for name, key in _RISK_LEVELS.items()
                for more in ("", "较", "很", "极") for degree in ("", "度")}  # fmt: skip
    known = tasks.TASKS[task]
    return {name: key for name, key in known.spellings("zh").items() if not name.isascii()}


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
