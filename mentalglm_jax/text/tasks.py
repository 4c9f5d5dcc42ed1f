"""What the model is asked and how it answers: the known tasks, prompts, answers, and how an answer is read.

Every task is a task file (``task_files``). Those that come with the package follow the data the model is trained on:
SOS-HL-1K (suicide risk), SOS-1K (its eleven levels; 6 and above count as high), SocialCD-3K (twelve cognitive
distortions, Burns), the ABCD cognitive pathway of rational emotive behaviour therapy (four parents, nineteen children),
and the IMHI sets of MentaLLaMA, whose questions and label sentences are kept verbatim. Others are made known by
``add_tasks``.
"""

import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from mentalglm_jax.errors import InputError
from mentalglm_jax.markdown import look
from mentalglm_jax.text.labels import WRAPPERS, Label, Markers, Task, nearest, wrapped
from mentalglm_jax.text.task_files import (
    TASKS_FILE,
    keep_tasks,
    read_tasks,
    task_of,
    task_record,
    tasks_in,
    tasks_of,
    tasks_text,
    write_tasks,
)
from mentalglm_jax.text.thinking import spoken_span

__all__ = [
    "BUILT_IN", "LANGUAGES", "TASKS", "TASKS_FILE", "Label", "Language", "Markers", "Order", "Parsed", "Status", "Task",
    "add_row_definition", "add_tasks", "add_tasks_beside", "added_tasks", "answer", "before_label", "explains_first",
    "forget_added", "get_task", "keep_tasks", "parse", "prompt", "read_tasks", "row_definition", "task_of",
    "task_record", "tasks_in", "tasks_of", "tasks_text", "write_tasks",
]  # fmt: skip

Language = Literal["en", "zh"]
Order = Literal["label_first", "explanation_first"]
Status = Literal["ok", "no_label", "unknown_label", "no_explanation"]

LANGUAGES: tuple[Language, ...] = ("en", "zh")  # of the tasks that come with the package
# Files of assets/tasks, in table order.
BUILT_IN = (
    "suicide_risk", "suicide_level", "cognitive_distortion", "cognitive_pathway", "depression_risk", "imhi_dr",
    "imhi_clp", "imhi_dreaddit", "imhi_loneliness", "imhi_sad", "imhi_irf", "imhi_multiwd", "imhi_cams", "imhi_tsid",
    "imhi_swmh",
)  # fmt: skip
_ASSETS = Path(__file__).parents[1] / "assets" / "tasks"
# A marker may stand in Markdown's bold or italics, colon inside or outside.
_MARKER = r"(?P<mark>\*{{1,3}}|_{{1,3}}){0}(?:[：:](?P=mark)|(?P=mark)[：:])\s*|{0}[：:]\s*"
# What may stand before and around a label without changing what it says. No strike-through, bracket or question mark.
# A dash or ``>`` is one only before a space: "- high", but not "-1" or ">5".
_LEAD = (
    r"(?:[\s#*_`]|[>-]+(?=\s))*(?:(?:{0}|(?:final )?answer|label|回答|(?:最终)?答案|答|标签|结论)[\s*_`]*[：:])?"
    r"(?:[\s#*_`\"'“”‘’「」『』《》]|[>-]+(?=\s))*"
)
_TAIL = " \t\r\n*_`\"'“”‘’「」『』《》"
# What may stand between the end of a sentence and a marker that is not written as it should be.
_BETWEEN = " \t>#*_`-\"'“”‘’「」『』《》)）"
_LOOK_BACK = 16  # characters


class _Known(Mapping[str, Task]):
    """The tasks that come with the package, read when they are asked for, and those that were added."""

    def __init__(self) -> None:
        self.added: dict[str, Task] = {}

    def __getitem__(self, name: str) -> Task:
        return self.added[name] if name not in BUILT_IN else _built_in(name)

    def __iter__(self) -> Iterator[str]:
        return iter((*BUILT_IN, *self.added))

    def __len__(self) -> int:
        return len(BUILT_IN) + len(self.added)


_known = _Known()
TASKS: Mapping[str, Task] = _known


@functools.cache
def _built_in(name: str) -> Task:
    """Our own files, so the parser in C reads them (20 times as fast); what it gives is checked as any other."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    path = _ASSETS / f"{name}.yaml"
    (task,) = tasks_of(yaml.load(path.read_bytes(), loader)["tasks"], str(path))  # noqa: S506 - a safe loader
    return task


def get_task(task: str | Task) -> Task:
    """The task of this name. Raises: InputError naming the nearest known task."""
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        own = "" if _known.added else "; a task of your own is made known by --tasks FILE"
        raise InputError(f"unknown task {task!r}{nearest(task, TASKS)}{own}")
    return TASKS[task]


def add_tasks(tasks: Iterable[Task], where: str = "") -> None:
    """Makes tasks known in this process; one that is known already may be added again.

    Args:
        where: the file they come from, for messages.

    Raises:
        InputError: a name is known with another definition, or looks like another name. None is added then.
    """
    tasks = list(tasks)
    fresh: dict[str, Task] = {}
    for task in tasks:
        known = fresh.get(task.name) or TASKS.get(task.name)
        if known is None and (alike := [one for one in (*TASKS, *fresh) if look(one) == look(task.name)]):
            raise InputError(f"{where}{': ' if where else ''}task {task.name!r} looks like {alike[0]!r}, which is "
                             "another name; write it in letters of one script")  # fmt: skip
        if known is not None and known != task:
            differing = [
                field.name for field in fields(Task) if getattr(known, field.name) != getattr(task, field.name)
            ]
            kind = "comes with this package" if task.name in BUILT_IN else "is known"
            raise InputError(f"{where}{': ' if where else ''}task {task.name!r} {kind} with another definition (other "
                             f"{', '.join(differing)}); give yours another name, or use one for both")  # fmt: skip
        fresh[task.name] = task
    _known.added |= {name: task for name, task in fresh.items() if name not in BUILT_IN}


def added_tasks(names: Iterable[str] | None = None) -> tuple[Task, ...]:
    """The known tasks that do not come with the package, those of ``names`` only: what has to travel with a file."""
    wanted = None if names is None else set(names)
    return tuple(task for name, task in _known.added.items() if wanted is None or name in wanted)


def forget_added() -> None:
    """Leaves only the tasks that come with the package."""
    _known.added.clear()


def add_tasks_beside(path: str | Path) -> None:
    """Makes the tasks known that travel with a directory, or with the directory a file is in: its ``tasks.yaml``, if
    there is one; of a directory called records or data also the one above.

    Raises:
        InputError: it is a link to elsewhere; or as ``read_tasks`` and ``add_tasks``.
    """
    directory = Path(path) if Path(path).is_dir() else Path(path).parent
    if not os.path.lexists(directory / TASKS_FILE) and directory.name in ("records", "data"):
        directory = directory.parent
    add_tasks(tasks_in(directory), str(directory / TASKS_FILE))


def row_definition(name: str) -> dict[str, Any]:
    """What a row of answers has beside its task's name, so that the row can be read anywhere: nothing for a task that
    comes with the package, else ``task_definition``."""
    return {} if name in BUILT_IN else {"task_definition": task_record(get_task(name))}


def add_row_definition(row: Mapping[str, Any]) -> None:
    """Makes the task known that a row defines (``row_definition``), if it does. Raises: InputError as ``add_tasks``."""
    if (definition := row.get("task_definition")) is not None:
        name = row.get("task")
        if not isinstance(name, str):
            raise InputError(f"task: expected text, got {type(name).__name__}")
        add_tasks([_defined(name, json.dumps(definition))])


@functools.lru_cache(maxsize=1000)
def _defined(name: str, definition: str) -> Task:
    return task_of(name, json.loads(definition), "task_definition")


@dataclass(frozen=True)
class Parsed:
    """What a model's answer says. Spans are [start, end) characters of the parsed text; None where the part is
    absent.
    """

    labels: tuple[str, ...] | None
    explanation: str | None
    label_span: tuple[int, int] | None
    explanation_span: tuple[int, int] | None
    status: Status


def prompt(post: str, question: str, language: str) -> str:
    """The user turn where a task says nothing else: IMHI's ``Consider this post: "..." Question: ...`` or its Chinese
    counterpart. Of a task: ``Task.prompt``."""
    if language not in WRAPPERS:
        raise InputError(f"unknown language {language!r}; known: {', '.join(WRAPPERS)}")
    return wrapped(WRAPPERS[language], post, question)


def answer(
    task: str | Task, labels: Iterable[str], explanation: str | None, language: str, order: Order = "label_first"
) -> str:
    """The assistant turn: label sentence and explanation (white space at its ends dropped), or the label sentence
    alone.

    Raises: InputError on labels the task does not have, or an explanation that is empty (pass None for no explanation).
    """
    task = get_task(task)
    sentence = task.sentence(labels, language)
    if explanation is None:
        return sentence
    explanation = explanation.strip()
    if not explanation:
        raise InputError(f"task {task.name}: the explanation is empty; give text, or null for none")
    marks = task.marked(language)
    if order == "label_first":
        return f"{sentence} {marks.explanation}{explanation}"
    if order == "explanation_first":
        return f"{marks.explanation}{explanation} {marks.label}{sentence}"
    raise InputError(f"unknown answer order {order!r}; known: label_first, explanation_first")


def before_label(task: str | Task, explanation: str, language: str) -> tuple[str, str]:
    """An explanation-first answer up to its label sentence, cut before the colon: a tokenizer may join the colon with
    what follows it, never with the word before it.
    """
    marks = get_task(task).marked(language)
    word = _word(marks.label)
    return f"{marks.explanation}{explanation.strip()} {word}", marks.label[len(word) :]


def parse(task: str | Task, language: str, text: str) -> Parsed:
    """Reads an answer in either order; the inverse of ``answer``.

    The label is what stands before the explanation, or behind it: a label sentence, or one in another dress
    (``Task.read_short``): bold, in quotation marks, behind "Answer:", in another case, its label alone. It is matched
    as a whole, never by substring: "not high" and 没有高自杀风险 state no label. What a model thinks before it answers
    (``thinking``) states nothing, whatever labels it names.

    Status: "ok"; "no_explanation" (the label is known, nothing explains it); "no_label" (nothing stands where the label
    belongs); "unknown_label" (what stands there is not, as a whole, a label sentence of the task).
    """
    task = get_task(task)
    marks = task.marked(language)
    label_span, explanation_span = _parts(marks, text, *spoken_span(text))
    explanation = text[slice(*explanation_span)] if explanation_span else None
    if label_span is None:
        return Parsed(None, explanation, None, explanation_span, "no_label")
    labels = task.read_sentence(text[slice(*label_span)], language)
    if labels is None:
        label_span = _undressed(marks, text, label_span)
        labels = task.read_short(text[slice(*label_span)], language)
    if labels is None:
        return Parsed(None, explanation, None, explanation_span, "unknown_label")
    return Parsed(labels, explanation, label_span, explanation_span, "ok" if explanation_span else "no_explanation")


def explains_first(task: str | Task, language: str, text: str) -> bool:
    """Whether an answer begins with its explanation."""
    stripped = text.lstrip()
    found = _marked(get_task(task).marked(language).explanation, stripped)
    return bool(found) and found[0].start() == 0


def _word(marker: str) -> str:
    return marker.rstrip("： :")


@functools.lru_cache(maxsize=256)
def _patterns(marker: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """The marker as it is written, and in any case."""
    expression = _MARKER.format(re.escape(_word(marker)))
    return re.compile(expression), re.compile(expression, re.IGNORECASE)


@functools.lru_cache(maxsize=256)
def _lead(marker: str) -> re.Pattern[str]:
    return re.compile(_LEAD.format(re.escape(_word(marker))), re.IGNORECASE)


def _marked(marker: str, text: str, start: int = 0) -> list[re.Match[str]]:
    """Where the marker stands; if it is nowhere written as it should be, in another case where a sentence begins (in
    the midst of one, "the answer: no" is what an explanation says)."""
    exact, loose = _patterns(marker)
    found = list(exact.finditer(text, start))
    return found or [match for match in loose.finditer(text, start) if _begins(text, start, match.start())]


def _begins(text: str, start: int, at: int) -> bool:
    first = max(start, at - _LOOK_BACK)
    before = text[first:at].rstrip(_BETWEEN)
    return before[-1] in "\n.。!！?？…" if before else first == start


def _undressed(marks: Markers, text: str, span: tuple[int, int]) -> tuple[int, int]:
    """The span without what stands around the label: "Answer:", marks, quotation marks."""
    start, end = span
    lead = _lead(marks.label).match(text, start, end)
    start = lead.end() if lead else start
    return start, max(start, start + len(text[start:end].rstrip(_TAIL)))


def _parts(marks: Markers, text: str, start: int, end: int) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Character spans of (label sentence, explanation) between the two, stripped; None for an empty part."""
    text = text[:end]
    found = _marked(marks.explanation, text, start)
    if not found:
        return _strip(text, start, end), None
    marker = found[0]
    if text[start : marker.start()].strip(" \t\r\n#>*_"):  # no label sentence holds the marker: the first one ends it
        return _strip(text, start, marker.start()), _strip(text, marker.end(), end)
    # An explanation may say "Answer:" itself; the label sentence never does, so the last one counts.
    ends = _marked(marks.label, text, marker.end())
    if not ends:
        return None, _strip(text, marker.end(), end)
    return _strip(text, ends[-1].end(), end), _strip(text, marker.end(), ends[-1].start())


def _strip(text: str, start: int, end: int) -> tuple[int, int] | None:
    part = text[start:end]
    if not part.strip():
        return None
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())
