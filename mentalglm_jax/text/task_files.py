"""Task files: tasks as YAML that people write and that travels with runs, exports and answers (docs/tasks.md).

A file holds ``tasks:``, a mapping of names to definitions; so does a recipe. Whoever wrote it, it is read strictly:
every value has its type, an unknown key is refused with the nearest known one, and so is a label set that cannot be
told apart in an answer.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mentalglm_jax.errors import InputError
from mentalglm_jax.files import write_text
from mentalglm_jax.foreign import MAX_YAML_BYTES, inside, read_text, read_yaml, short
from mentalglm_jax.markdown import hidden
from mentalglm_jax.text.labels import KINDS, MARKERS, WRAPPERS, Label, Markers, Task, base_language, nearest, squeeze

TASKS_FILE = "tasks.yaml"
MOST_TASKS, MOST_LABELS, MOST_LANGUAGES = 100, 500, 20
_NAME, _LINE, _TEXT = 200, 2000, 20_000  # characters of a name, of a sentence or question, of a system prompt
_TASK_NAME = re.compile(r"\w[\w-]{0,63}")
_KEY = re.compile(r"[^\s,;#](?:[^\t\r\n,;#]{0,62}[^\s,;#])?")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z0-9]{2,8}){0,3}")
_TASK_KEYS = ("description", "kind", "question", "sentence", "labels", "parents", "prompt", "system", "joiner",
              "markers", "positive")  # fmt: skip
_LABEL_KEYS = ("name", "sentence", "parent", "aliases")
_QUOTES = "put it in quotes (YAML takes yes, no, on, off and numbers for something else than text)"


def read_tasks(path: str | Path) -> tuple[Task, ...]:
    """The tasks of a file, or of the ``tasks.yaml`` in a directory.

    Raises:
        InputError: the file is missing or not YAML; or as ``tasks_of``.
    """
    path = Path(path)
    path = path / TASKS_FILE if os.path.isdir(path) else path  # also of a name that no file can have
    raw, _ = read_yaml(path)
    if unknown := [key for key in raw if key != "tasks"]:
        raise InputError(f"{path}: unknown key {short(unknown[0])}; a task file has one key, tasks, with a mapping of "
                         "names to definitions")  # fmt: skip
    return tasks_of(raw.get("tasks"), str(path))


def tasks_in(directory: Path) -> tuple[Task, ...]:
    """The tasks that travel with ``directory`` in its ``tasks.yaml``, if there is one.

    Raises:
        InputError: it is a link to elsewhere; or as ``read_tasks``.
    """
    return read_tasks(inside(directory, TASKS_FILE)) if os.path.lexists(directory / TASKS_FILE) else ()


def write_tasks(path: str | Path, tasks: Iterable[Task]) -> None:
    """Writes a task file, atomically; ``read_tasks`` gives equal tasks back."""
    write_text(path, tasks_text(tasks))


def keep_tasks(directory: Path, tasks: Iterable[Task], write: bool = True) -> None:
    """Sees to it that the ``tasks.yaml`` of a directory holds ``tasks``, and all that it held before. One that people
    wrote is never written anew: their comments would be gone.

    Args:
        write: only find out whether that can be done.

    Raises:
        InputError: it defines one of ``tasks`` otherwise, lacks one and was written by hand, or as ``tasks_in``.
        RunError: the file system refused.
    """
    path, tasks = directory / TASKS_FILE, list(tasks)
    if not tasks:
        return
    there = {task.name: task for task in tasks_in(directory)}
    if other := next((task.name for task in tasks if there.get(task.name, task) != task), None):
        raise InputError(
            f"{path}: defines task {other!r} otherwise; name another place, or use one definition for both"
        )
    lacking = [task for task in tasks if task.name not in there]
    if lacking and there and read_text(path, MAX_YAML_BYTES) != tasks_text(there.values()):
        raise InputError(
            f"{path}: lacks task {lacking[0].name!r} and was written by hand; add it, or name another place"
        )
    if lacking and write:
        write_tasks(path, [*there.values(), *lacking])


def tasks_text(tasks: Iterable[Task]) -> str:
    """What ``write_tasks`` writes."""
    records = {task.name: task_record(task) for task in tasks}
    return yaml.dump({"tasks": records}, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=118,
                     default_flow_style=None)  # fmt: skip


class _Dumper(yaml.SafeDumper):
    """No aliases: every value stands where it is meant."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def tasks_of(raw: Any, where: str) -> tuple[Task, ...]:
    """Tasks from a mapping of names to definitions.

    Args:
        where: the file, for messages.

    Raises:
        InputError: a definition is not one; or as ``task_of``.
    """
    if not isinstance(raw, Mapping) or not 0 < len(raw) <= MOST_TASKS:
        raise InputError(
            f"{where}: tasks must be a mapping of 1 to {MOST_TASKS} names to definitions, got {short(raw)}"
        )
    return tuple(task_of(name, definition, where) for name, definition in raw.items())


def task_record(task: Task) -> dict[str, Any]:
    """The definition of ``task`` as JSON and YAML have it, without its name; ``task_of`` gives an equal task back."""
    questions = {language: text if language not in task.variants else [text, *task.variants[language]]
                 for language, text in task.questions.items()}  # fmt: skip
    markers = {language: {"explanation": marks.explanation.rstrip(), "label": marks.label.rstrip()}
               for language, marks in task.markers.items()}  # fmt: skip
    record = {
        "description": task.description,
        "kind": task.kind,
        "question": questions,
        "sentence": dict(task.templates),
        "prompt": dict(task.wrappers),
        "system": dict(task.systems),
        "joiner": dict(task.joiners),
        "markers": markers,
        "positive": task.positive,
        "parents": {parent.key: _filled({"name": dict(parent.names)}) for parent in task.parents},
        "labels": {
            label.key: _filled({"name": dict(label.names), "sentence": dict(label.whole), "parent": label.parent,
                                "aliases": list(label.aliases)})
            for label in task.labels
        },
    }  # fmt: skip
    return _filled(record)


def _filled(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if value not in (None, "", {}, [])}


def task_of(name: Any, raw: Any, where: str) -> Task:
    """One task from its definition.

    Raises:
        InputError: a wrong name, kind, key or type; a language without question, sentence, prompt or markers; labels
            that cannot be told apart in an answer. File, task and key are named.
    """
    if not isinstance(name, str) or not _TASK_NAME.fullmatch(name):
        raise InputError(f"{where}: the task name {short(name)} must be text of letters, digits, _ and -, at most 64 "
                         "characters")  # fmt: skip
    fields = _Fields(raw, f"{where}: task {name!r}", "", _TASK_KEYS)
    kind = fields.one_of("kind", KINDS)
    asked = fields.by_language("question", _questions, languages=None)
    languages = tuple(asked)
    templates = fields.by_language("sentence", _template, languages)
    labels = _labels(fields, languages)
    parents = tuple(Label(key, one.by_language("name", _name, languages))
                    for key, one in fields.entries("parents", ("name",), least=0))  # fmt: skip
    for language in languages:
        fields.check_wording(language, templates, labels)
    markers = {
        language: Markers(*(_marker(one.text(part, _LINE), language) for part in ("explanation", "label")))
        for language, one in fields.markers(languages).items()
    }
    task = Task(
        name=name, kind=kind, labels=labels, questions={language: texts[0] for language, texts in asked.items()},
        templates=templates, variants={language: texts[1:] for language, texts in asked.items() if texts[1:]},
        wrappers=fields.by_language("prompt", _wrapper, languages),
        systems=fields.by_language("system", _system, languages),
        joiners=fields.by_language("joiner", _joiner, languages), markers=markers, parents=parents,
        positive=fields.key_of("positive", labels), description=fields.text("description", _LINE, ""),
    )  # fmt: skip
    _check_whole(task, fields)
    try:
        task.check_told_apart()
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return task


def _labels(fields: "_Fields", languages: tuple[str, ...]) -> tuple[Label, ...]:
    found = []
    for key, one in fields.entries("labels", _LABEL_KEYS, least=2):
        found.append(
            Label(key, one.by_language("name", _name, languages), one.by_language("sentence", _line, languages),
                  one.text("parent", 64, None), one.texts("aliases"))
        )  # fmt: skip
    return tuple(found)


def _check_whole(task: Task, fields: "_Fields") -> None:
    """What no single value shows: languages without words of their own, parents, markers inside sentences, names."""
    for language in task.languages:
        base, example = base_language(language), f"such as {{{language}: "
        if language not in task.wrappers and base not in WRAPPERS:
            raise fields.wrong("prompt", f"is missing for language {language}; give it {example}{WRAPPERS['en']!r}}}")
        if language not in task.markers and base not in MARKERS:
            raise fields.wrong("markers", f"are missing for language {language}; give them {example}{{explanation: "
                               "'Reasoning:', label: 'Answer:'}}")  # fmt: skip
        if task.variants.get(language) and "{question}" not in task.wrappers.get(language, "{question}"):
            raise fields.wrong(f"prompt.{language}", "must hold {question}: several questions are asked")
        marks = task.marked(language)
        words = [mark.rstrip(" :：") for mark in (marks.explanation, marks.label)]
        if words[0].casefold() == words[1].casefold():
            raise fields.wrong(f"markers.{language}", f"must be two different words, got {words[0]!r} twice")
        for key, sentence in task.candidates(language).items():
            for word in words:
                if re.search(re.escape(word) + r"[*_]*\s*[:：]", sentence, re.IGNORECASE):
                    raise fields.wrong(f"labels.{key}", f"the sentence {sentence!r} holds {word!r} with a colon, which "
                                       "introduces the explanation or the label; change the sentence")  # fmt: skip
    known = [parent.key for parent in task.parents]
    if (task.kind == "hierarchy") != bool(known):
        raise fields.wrong("parents", "go with kind hierarchy, and only with it")
    for label in task.labels:
        if (label.parent is not None) != bool(known) or (known and label.parent not in known):
            hint = nearest(label.parent, known) if known and label.parent else ""
            raise fields.wrong(f"labels.{label.key}.parent", f"must be one of parents in a hierarchy and stand nowhere "
                               f"else, got {label.parent!r}{hint}")  # fmt: skip
        if label.whole and task.arity == "multi" and set(label.whole) != set(task.languages):
            raise fields.wrong(f"labels.{label.key}.sentence", "must be given in every language of the task, for a "
                               "label with a sentence of its own stands alone")  # fmt: skip
    if task.joiners and task.arity == "single":
        raise fields.wrong("joiner", f"stands between several labels; kind {task.kind} states one")
    means = {said: label.key for label in task.labels
             for said in (label.key, *(label.name(language) for language in task.languages))}  # fmt: skip
    for label in task.labels:
        for alias in label.aliases:
            if (other := means.setdefault(alias, label.key)) != label.key:
                raise fields.wrong(f"labels.{label.key}.aliases", f"{alias!r} also means label {other!r}")


class _Fields:
    """A mapping of a task file whose keys are known; ``where`` names file and task, ``place`` the keys above it."""

    def __init__(self, raw: Any, where: str, place: str, known: tuple[str, ...]):
        self._where, self._place, self._raw = where, place, {} if raw is None else raw
        if not isinstance(self._raw, Mapping):
            raise self._wrong(place, f"must be a mapping of {', '.join(known)}, got {short(raw)}")
        for key in self._raw:
            if key not in known:
                raise self._wrong("", f"unknown key {self._at(str(key))!r}{nearest(key, known)}")

    def _at(self, key: str) -> str:
        return f"{self._place}.{key}" if self._place else key

    def _wrong(self, place: str, what: str) -> InputError:
        return InputError(f"{self._where}: {place}{' ' if place else ''}{what}")

    def wrong(self, key: str, what: str) -> InputError:
        """The refusal of what stands at ``key``."""
        return self._wrong(self._at(key), what)

    def text(self, key: str, most: int, *default: Any) -> Any:
        """One line of text."""
        value = self._raw.get(key)
        if value is None and default:
            return default[0]
        return self._checked(key, value, most, _line)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of names."""
        value = self._raw.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or len(value) > MOST_LABELS:
            raise self.wrong(key, f"must be a list of at most {MOST_LABELS} texts, got {short(value)}")
        return tuple(dict.fromkeys(self._checked(f"{key}.{at}", one, _NAME, _line) for at, one in enumerate(value)))

    def one_of(self, key: str, known: tuple[Any, ...]) -> Any:
        """One of ``known`` texts."""
        value = self._raw.get(key)
        if value not in known:
            hint = nearest(value, known) if value is not None else f"; known: {', '.join(known)}"
            raise self.wrong(key, (f"{short(value)} is unknown" if value is not None else "is missing") + hint)
        return value

    def key_of(self, key: str, labels: Iterable[Label]) -> str | None:
        """The key of a label, or None."""
        known = tuple(label.key for label in labels)
        return None if self._raw.get(key) is None else self.one_of(key, known)

    def entries(self, key: str, known: tuple[str, ...], least: int) -> list[tuple[str, "_Fields"]]:
        """The items of a mapping of keys, in its order."""
        value = self._raw.get(key)
        value = {} if value is None and not least else value
        if not isinstance(value, Mapping) or not least <= len(value) <= MOST_LABELS:
            raise self.wrong(key, f"must be a mapping of {least} to {MOST_LABELS} keys to names, got {short(value)}")
        for one in value:
            if not isinstance(one, str):
                raise self.wrong(key, f"the key {short(one)} must be text; {_QUOTES}")
            if not _KEY.fullmatch(one) or any(map(hidden, one)):
                raise self.wrong(key, f"the key {short(one)} must be at most 64 characters without tab, comma, "
                                 "semicolon, #, what nobody sees, and spaces at its ends")  # fmt: skip
        return [(one, _Fields(entry, self._where, self._at(f"{key}.{one}"), known)) for one, entry in value.items()]

    def by_language(self, key: str, check: Callable[[Any], Any], languages: tuple[str, ...] | None) -> dict[str, Any]:
        """A mapping of languages to values; None: what languages there are is said here."""
        value = self._raw.get(key)
        if value is None and languages is not None:
            return {}
        if not isinstance(value, Mapping) or not (languages is None) <= len(value) <= MOST_LANGUAGES:
            raise self.wrong(key, f"must be a mapping of languages to text, such as {{en: ...}}, got {short(value)}")
        for one in value:
            if not isinstance(one, str):
                raise self.wrong(key, f"the language {short(one)} must be text; {_QUOTES}")
            if languages is None and not _LANGUAGE.fullmatch(one):
                raise self.wrong(key, f"{short(one)} is no language code such as en, zh, zh-Hant")
            if languages is not None and one not in languages:
                raise self.wrong(key, f"language {one!r} has no question; languages of the task: "
                                 f"{', '.join(languages)}")  # fmt: skip
        return {one: self._checked(f"{key}.{one}", given, _TEXT, check) for one, given in value.items()}

    def markers(self, languages: tuple[str, ...]) -> dict[str, "_Fields"]:
        """Per language the two words that introduce explanation and label."""
        given = self.by_language("markers", lambda value: value, languages)
        return {one: _Fields(value, self._where, self._at(f"markers.{one}"), ("explanation", "label"))
                for one, value in given.items()}  # fmt: skip

    def check_wording(self, language: str, templates: Mapping[str, str], labels: Iterable[Label]) -> None:
        """A language needs a sentence for every label."""
        if bare := [label.key for label in labels if language not in label.whole]:
            if language not in templates:
                raise self.wrong("sentence", f"is missing for language {language}: label {bare[0]!r} has no sentence "
                                 f"of its own; give one such as {{{language}: 'This post shows {{}}.'}}")  # fmt: skip
        elif language in templates:
            raise self.wrong(f"sentence.{language}", "is not used: every label has a sentence of its own")

    def _checked(self, key: str, value: Any, most: int, check: Callable[[Any], Any]) -> Any:
        try:
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and len(text) > most:
                    raise ValueError(f"must be at most {most} characters, got {len(text)}")
            return check(value)
        except ValueError as error:
            raise self.wrong(key, str(error)) from None


def _text(value: Any) -> str:
    """Text that is some and can be written."""
    if not isinstance(value, str):
        raise ValueError("is missing" if value is None else f"must be text, got {short(value)}; {_QUOTES}"
                         if isinstance(value, bool | int | float) else f"must be text, got {short(value)}")  # fmt: skip
    if not value.strip():
        raise ValueError("is empty; give text or leave the key out")
    if any("\ud800" <= one <= "\udfff" or (ord(one) < 32 and one not in "\t\n") or one == "\x7f" for one in value):
        raise ValueError("holds a control character or half of a surrogate pair")
    return value


def _line(value: Any) -> str:
    text = squeeze(_text(value))
    if strange := [one for one in text if hidden(one)]:
        raise ValueError(f"holds U+{ord(strange[0]):04X}, which nobody sees; labels and questions are shown to readers")
    if len(text) > _LINE:
        raise ValueError(f"must be at most {_LINE} characters, got {len(text)}")
    return text


def _name(value: Any) -> str:
    text = _line(value)
    if len(text) > _NAME:
        raise ValueError(f"must be at most {_NAME} characters, got {len(text)}")
    return text


def _questions(value: Any) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    if not 0 < len(listed) <= 100:
        raise ValueError("must be one question or a list of 1 to 100")
    texts = tuple(_line(one) for one in listed)
    if len(set(texts)) < len(texts):
        raise ValueError("asks one question twice")
    return texts


def _template(value: Any) -> str:
    text = _line(value)
    if text.count("{}") != 1:
        raise ValueError(f"must hold {{}} once, where the label's name goes, got {short(text)}")
    return text


def _wrapper(value: Any) -> str:
    text = _text(value).strip()
    if text.count("{post}") != 1 or text.count("{question}") > 1:
        raise ValueError(f"must hold {{post}} once and {{question}} at most once, got {short(text)}")
    return text


def _system(value: Any) -> str:
    return _text(value).strip()


def _joiner(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 20 or squeeze(f"a{value}b") != f"a{value}b":
        raise ValueError(f"must be 1 to 20 characters on one line, got {short(value)}")
    return value


def _marker(text: str, language: str) -> str:
    """A marker as it stands in an answer: with its colon, and a space after a narrow one."""
    word = text.rstrip(" :：")
    if not word:
        raise InputError(f"markers.{language}: {text!r} is no word")
    wide = text.endswith("：") or (not text.endswith(":") and base_language(language) in ("zh", "ja"))
    return f"{word}：" if wide else f"{word}: "
