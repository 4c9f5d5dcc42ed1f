"""Data sets in which people marked the words that decide: records with ``rationales``, spans of the post.

    IRF              am-shb/irf-acl         data/{train,val,test}.csv    text, belong, belong_exp, burden, burden_exp
    CNSocialDepress  jytal/CNSocialDepress  CNSD_dataset.json            user -> inpput (text_1: …), output (text_1[…])

IRF (Garg et al., ACL Findings 2023): whether a post shows thwarted belongingness and perceived burdensomeness, with one
phrase copied from it. CNSocialDepress (2025): whether a user's posts show a risk of depression, with an analysis that
names posts and, in brackets, what in them speaks for it, mostly in other words. Both layouts were seen, of the second
its documentation only. A phrase is looked for as it is written, then by its letters and digits; what is not found is
counted and left out.
"""

import functools
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mentalglm_jax.data.records import Record, Span
from mentalglm_jax.data.rows import Row, make_records, shown
from mentalglm_jax.data.surrogates import whole_texts
from mentalglm_jax.data.tables import read_header, read_named_rows
from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import parse_json, read_text
from mentalglm_jax.text import tasks

IRF, CNSD = "irf", "cnsocialdepress"
_IRF_FILES = {"train": "train", "val": "dev", "test": "test"}
_IRF_COLUMNS = ("text", "belong", "belong_exp", "burden", "burden_exp")
_CNSD_FILE = "CNSD_dataset.json"
_MOST_BYTES = 256 << 20
_POST = re.compile(r"(?:^|\n)[ \t]*text_(\d+)[ \t]*[:：]")
# In linear time, whatever the text: what may repeat is bounded, or does not give back what it took.
_EVIDENCE = re.compile(r"text_(\d{1,9})\s*+[\[［【]([^\]］】]{0,2000})[\]］】]")
_VERDICT = re.compile(r"答案\s*+[：:]\s*+(?:[“\"「]\s*+)?(是|否)")
_MOST_PHRASES = 1000  # of one user
_ANALYSIS = re.compile(r"总结和分析\s*[：:]")
_PARTS = re.compile(r"[、，,；;]")


def find_rationale(post: str, phrase: str, within: Span | None = None) -> tuple[Span | None, str]:
    """Where ``phrase`` stands in ``post`` (in [start, end) ``within``), first place, and how it was found: "exact",
    "normalised" (letters and digits in one width and case), or "not_found"."""
    start, end = within or (0, len(post))
    phrase = phrase.strip()
    if phrase and (at := post.find(phrase, start, end)) >= 0:
        return (at, at + len(phrase)), "exact"
    wanted = "".join(letter for letter, _ in _letters(phrase, 0, len(phrase)))
    letters, places = _lettered(post, start, end)
    at = letters.find(wanted)
    if not wanted or at < 0:
        return None, "not_found"
    return (places[at], places[at + len(wanted) - 1] + 1), "normalised"


@functools.lru_cache(maxsize=16)  # of a post many phrases are looked for
def _lettered(text: str, start: int, end: int) -> tuple[str, tuple[int, ...]]:
    letters = list(_letters(text, start, end))
    return "".join(letter for letter, _ in letters), tuple(place for _, place in letters)


def _letters(text: str, start: int, end: int) -> Iterator[tuple[str, int]]:
    """(letter or digit in one width and case, its place)."""
    for place in range(start, end):
        for letter in unicodedata.normalize("NFKC", text[place]).casefold():
            if letter.isalnum():
                yield letter, place


def _say(path: Path, found: Counter[str]) -> None:
    if found:
        warnings.warn(f"{path}: of {found.total()} rationales {found['exact']} stand in their posts as they "
                      f"are, {found['normalised']} by their letters and digits, {found['not_found']} not (left out)",
                      stacklevel=3)  # fmt: skip


# --- IRF ---


def irf_here(folder: Path) -> bool:
    """Whether the folder holds IRF's tables: the names alone are too common to tell."""
    files = [file for part in _IRF_FILES if (file := folder / f"{part}.csv").is_file()]
    try:
        return bool(files) and set(_IRF_COLUMNS) <= set(read_header(files[0], ","))
    except InputError:
        return False


def iter_irf(path: str | Path) -> Iterator[Record]:
    """Two records a post, one for each question of ``imhi_irf``. ``path``: the folder ``data``.

    Raises: InputError naming file, line and column.
    """
    files = [(file, split) for part, split in _IRF_FILES.items() if (file := Path(path) / f"{part}.csv").is_file()]
    if not files:
        raise InputError(f"{path}: no IRF file here; expected train.csv, val.csv, test.csv")
    found = Counter[str]()
    for file, split in files:
        yield from make_records(file, _irf_rows(file, found), source=IRF, task="imhi_irf", language="en", split=split)
    _say(Path(path), found)


def _irf_rows(path: Path, found: Counter[str]) -> Iterator[Row]:
    questions = tasks.TASKS["imhi_irf"].all_questions("en")
    for line, row in read_named_rows(path, _IRF_COLUMNS, ","):
        post = row["text"].strip()
        for column, question in zip(("belong", "burden"), questions, strict=True):
            label = {"1": "yes", "0": "no"}.get(row[column].strip())
            if label is None:
                raise InputError(f"{path}:{line}, column {column!r}: expected 0 or 1, found {shown(row[column])}; "
                                 "fix the label")  # fmt: skip
            spans = None
            if row[f"{column}_exp"].strip():
                span, how = find_rationale(post, row[f"{column}_exp"])
                found[how] += 1
                spans = (span,) if span is not None else ()
            yield Row(line, post, (label,), None, question, spans)


# --- CNSocialDepress ---


def cnsd_here(folder: Path) -> bool:
    """Whether the folder holds CNSocialDepress."""
    return (folder / _CNSD_FILE).is_file()


def iter_cnsd(path: str | Path) -> Iterator[Record]:
    """One record a user: all posts, one a line, with their numbers. ``path``: the folder with ``CNSD_dataset.json``.

    Raises: InputError naming file, user and field.
    """
    file = Path(path) / _CNSD_FILE
    text = read_text(file, _MOST_BYTES)
    users = whole_texts(parse_json(text, str(file), half_pairs=True), text, str(file))
    if not isinstance(users, dict):
        raise InputError(f"{file}: must hold an object, a user's number to what is known of them")
    found = Counter[str]()
    rows = [_cnsd_row(file, number, user, one, found) for number, (user, one) in enumerate(users.items(), start=1)]
    yield from make_records(file, rows, source=CNSD, task="depression_risk", language="zh", split="train")
    _say(file, found)


def _cnsd_row(path: Path, number: int, user: str, one: object, found: Counter[str]) -> Row:
    where = f"{path}, user {user!r}"
    if not isinstance(one, dict):
        raise InputError(f"{where}: expected an object with 'inpput' and 'output'")
    given = one.get("inpput", one.get("input"))
    said = one.get("output")
    if not isinstance(given, str) or not isinstance(said, str):
        raise InputError(f"{where}: field {'output' if isinstance(given, str) else 'inpput'!r} is missing or not text")
    verdict = _VERDICT.search(said)
    if verdict is None:
        raise InputError(f"{where}, field 'output': expected 答案：“是” or “否”; fix the label")
    post, spans = given.strip(), []
    starts = list(_POST.finditer(post))
    ends = [*(match.start() for match in starts[1:]), len(post)][: len(starts)]
    places = {match[1]: (match.end(), end) for match, end in zip(starts, ends, strict=True)}
    looked = 0
    for which, phrase in _EVIDENCE.findall(said):
        if which not in places:
            found["not_found"] += 1
            continue
        tries = [find_rationale(post, phrase, places[which])]
        looked += 1
        if tries[0][0] is None and len(parts := [part for part in _PARTS.split(phrase) if part.strip()]) > 1:
            tries = [find_rationale(post, part, places[which]) for part in parts[:_MOST_PHRASES]]
            looked += len(parts)
        if looked > _MOST_PHRASES:
            raise InputError(f"{where}, field 'output': names more than {_MOST_PHRASES} phrases, which is no analysis")
        found.update(how for _, how in tries)
        spans += [span for span, _ in tries if span is not None]
    analysis = _ANALYSIS.split(said, maxsplit=1)
    explanation = analysis[1].strip() if len(analysis) > 1 else ""
    label = "yes" if verdict[1] == "是" else "no"
    return Row(number, post, (label,), explanation or None, None, tuple(dict.fromkeys(spans)))
