"""What a task is: its labels, what it asks, the sentences that state its labels, and how such a sentence is read.

A label sentence is the whole sentence that states the label; it is matched as a whole, so that "No, ..." inside an
explanation or "life" inside "lifeless" can never decide a score.
"""

import difflib
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mentalglm_jax.errors import InputError
from mentalglm_jax.markdown import look, without_blanks

Kind = Literal["single", "multi", "hierarchy", "ordinal"]
KINDS: tuple[Kind, ...] = ("single", "multi", "hierarchy", "ordinal")
_ENDS = ".。!！"
_SEPARATORS = re.compile(r"\s*[,，、;；]\s*")
UNSPACED = ("zh", "ja", "th", "lo", "km", "my", "bo", "yue")  # languages written without spaces between words


@dataclass(frozen=True)
class Markers:
    """The words that introduce the explanation and, in an answer that explains first, the label: "Reasoning: "."""

    explanation: str
    label: str


# What a task has where it says nothing else: IMHI's prompt and its Chinese counterpart.
WRAPPERS = {
    "en": 'Consider this post: "{post}" Question: {question}',
    "zh": '考虑以下这个帖子："{post}" 问题：{question}',
}
MARKERS = {"en": Markers("Reasoning: ", "Answer: "), "zh": Markers("推理：", "回答：")}
JOINERS = {"zh": "、", "ja": "、"}


def base_language(language: str) -> str:
    """The language of a code without region and script: zh of zh-Hant."""
    return language.partition("-")[0]


@dataclass(frozen=True)
class Label:
    """One class. ``names`` (language to name; the key where there is none) stand in the task's template; ``whole``
    replaces template and name where a label has a sentence of its own. ``parent`` is the parent's key (hierarchy only);
    ``aliases`` are further names in data files, never in answers."""

    key: str
    names: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None
    aliases: tuple[str, ...] = ()

    def name(self, language: str) -> str:
        """Its name in ``language``."""
        return self.names.get(language, self.key)


@dataclass(frozen=True)
class _Reading:
    """How label sentences are read in one language: names and whole sentences to keys as they are written and folded;
    what stands before and behind a name, folded."""

    names: dict[str, str]
    wholes: dict[str, str]
    head: str
    tail: str
    named: dict[str, str]
    whole: dict[str, str]


@dataclass(frozen=True)
class Task:
    """A question with its closed label set.

    ``kind``: an answer states one label ("single"), one of ordered levels, the lowest first ("ordinal"), several labels
    ("multi"), or several of which each belongs to one of ``parents`` ("hierarchy"). ``questions`` holds the question
    per language; a language absent there is not available for the task. ``variants`` lists further questions that are
    asked with the same answers (one per dimension or risk). ``templates`` turns label names into the label sentence;
    ``wrappers`` puts post and question together, ``systems`` is what stands before them, ``joiners`` what stands
    between two names, ``markers`` what stands before the explanation, all per language. ``positive`` is the class whose
    F1 and AUROC are reported.
    """

    name: str
    kind: Kind
    labels: tuple[Label, ...]
    questions: Mapping[str, str]
    templates: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    wrappers: Mapping[str, str] = field(default_factory=dict)
    systems: Mapping[str, str] = field(default_factory=dict)
    joiners: Mapping[str, str] = field(default_factory=dict)
    markers: Mapping[str, Markers] = field(default_factory=dict)
    parents: tuple[Label, ...] = ()
    positive: str | None = None
    description: str = ""

    @functools.cached_property
    def keys(self) -> tuple[str, ...]:
        """The labels' keys, in label-table order."""
        return tuple(label.key for label in self.labels)

    @functools.cached_property
    def _by_key(self) -> dict[str, Label]:
        return {label.key: label for label in self.labels}

    @property
    def arity(self) -> Literal["single", "multi"]:
        """Whether an answer states exactly one label or at least one."""
        return "single" if self.kind in ("single", "ordinal") else "multi"

    @property
    def languages(self) -> tuple[str, ...]:
        """Those it can be asked in."""
        return tuple(self.questions)

    def all_questions(self, language: str) -> tuple[str, ...]:
        """Every question of this task in ``language``, the default first."""
        return (self.question(language), *self.variants.get(language, ()))

    def question(self, language: str) -> str:
        """Raises: InputError if the task is not available in ``language``."""
        if language not in self.questions:
            raise InputError(f"task {self.name}: no language {language!r}; available: {', '.join(self.questions)}")
        return self.questions[language]

    def prompt(self, post: str, question: str, language: str) -> str:
        """The user turn. Raises: InputError if the task is not available in ``language``."""
        self.question(language)
        return wrapped(self.wrappers.get(language) or WRAPPERS[base_language(language)], post, question)

    def system(self, language: str) -> str | None:
        """The system turn, if the task has one."""
        return self.systems.get(language)

    def joiner(self, language: str) -> str:
        """What stands between two labels' names."""
        return self.joiners.get(language) or JOINERS.get(base_language(language), ", ")

    def marked(self, language: str) -> Markers:
        """What introduces explanation and label. Raises: InputError if the task is not available in ``language``."""
        self.question(language)
        return self.markers.get(language) or MARKERS[base_language(language)]

    def spellings(self, language: str | None = None) -> dict[str, str]:
        """Every way in which a data file may name a label, to its key: names (those in ``language`` first), keys,
        aliases, in a hierarchy ``parent##child``. A key means its label whatever else has that name."""
        spoken = (*([language] if language in self.languages else ()), *(x for x in self.languages if x != language))
        found: dict[str, str] = {}
        for one in spoken:
            found |= {name: label.key for label in self.labels if (name := label.name(one)) not in found}
        parents = {parent.key: parent for parent in self.parents}
        for one, label in itertools.product(spoken, self.labels):
            if label.parent is not None:
                found.setdefault(f"{parents[label.parent].name(one)}##{label.name(one)}", label.key)
        found |= {key: key for key in self.keys}
        for label in self.labels:
            for alias in label.aliases:
                found.setdefault(alias, label.key)
        return found

    def ordered(self, labels: Iterable[str]) -> tuple[str, ...]:
        """``labels`` in label-table order. Raises: InputError on an unknown or repeated key, none at all, or two where
        one must stand alone.
        """
        given = list(labels)
        unknown = [key for key in given if key not in self._by_key]
        if unknown:
            raise InputError(f"task {self.name}: unknown label {unknown[0]!r}{nearest(unknown[0], self.keys)}")
        if not given:
            raise InputError(f"task {self.name}: no label; give at least one of: {', '.join(self.keys)}")
        if len(set(given)) != len(given):
            raise InputError(f"task {self.name}: a label is given twice: {', '.join(given)}")
        if len(given) > 1:
            if self.arity == "single":
                raise InputError(f"task {self.name}: takes one label, got {len(given)}: {', '.join(given)}")
            if alone := [key for key in given if self._by_key[key].whole]:
                raise InputError(f"task {self.name}: label {alone[0]!r} stands alone, got {', '.join(given)}")
        chosen = set(given)
        return tuple(key for key in self.keys if key in chosen) if len(chosen) > 1 else tuple(given)

    def sentence(self, labels: Iterable[str], language: str) -> str:
        """The sentence that states ``labels`` (keys) in the order given. Raises: InputError as ``ordered``."""
        self.question(language)
        labels = list(labels)
        self.ordered(labels)
        chosen = [self._by_key[key] for key in labels]
        if language in chosen[0].whole:
            return chosen[0].whole[language]
        head, _, tail = self.templates[language].partition("{}")
        return head + self.joiner(language).join(label.name(language) for label in chosen) + tail

    def candidates(self, language: str) -> dict[str, str]:
        """Label key to the sentence that states this label alone, in label-table order."""
        return {key: self.sentence([key], language) for key in self.keys}

    def read_sentence(self, sentence: str, language: str) -> tuple[str, ...] | None:
        """The label keys a sentence states, or None unless the whole of it (white space apart) is a sentence of the
        table. A label named twice is stated once: the sentence states a set.
        """
        self.question(language)
        text, reading = squeeze(sentence), self._reading(language)
        if text in reading.wholes:
            return (reading.wholes[text],)
        head, _, tail = self.templates.get(language, "").partition("{}")
        if not (text.startswith(head) and text.endswith(tail) and len(text) > len(head) + len(tail)):
            return None
        inside = text[len(head) : len(text) - len(tail)]
        parts = [inside] if self.arity == "single" else inside.split(self.joiner(language))
        keys = [reading.names.get(name) for name in parts]
        return None if None in keys else self.ordered({key for key in keys if key is not None})

    def read_short(self, text: str, language: str) -> tuple[str, ...] | None:
        """The label keys that ``text`` states in another dress than ``read_sentence`` knows, or None.

        Case, width and Markdown's marks do not count, nor do marks and full stops at the ends. What is left must, as a
        whole, be a label sentence, or for labels that are names in a sentence (high, 乱贴标签) the names alone or with
        an end of what stands before and all or nothing of what stands behind them ("high suicide risk"). So no word
        that denies a label can be overlooked: nothing is. What could state two things states none.
        """
        self.question(language)
        said, reading = fold(text), self._reading(language)
        if said in reading.whole:
            return (reading.whole[said],)
        found: set[tuple[str, ...]] = set()
        for body in _without_head(said, reading.head, language) if reading.named else ():
            for names in (body, body.removesuffix(reading.tail).rstrip()):
                parts = [names] if self.arity == "single" or names in reading.named else _SEPARATORS.split(names)
                keys = {reading.named.get(part.strip()) for part in parts}
                if None not in keys:
                    found.add(self.ordered({key for key in keys if key is not None}))
        return found.pop() if len(found) == 1 else None

    @functools.cached_property
    def _readings(self) -> dict[str, _Reading]:
        return {}

    def _reading(self, language: str) -> _Reading:
        if language not in self._readings:
            head, _, tail = self.templates.get(language, "").partition("{}")
            wholes = {label.whole[language]: label.key for label in self.labels if language in label.whole}
            names = {label.name(language): label.key for label in self.labels if language not in label.whole}
            self._readings[language] = _Reading(
                names, wholes, fold(head, ends=False), fold(tail, ends=False).rstrip(_ENDS),
                {fold(name): key for name, key in names.items()}, {fold(text): key for text, key in wholes.items()},
            )  # fmt: skip
        return self._readings[language]

    def check_told_apart(self) -> None:
        """Whether every label, however an answer is dressed, is read back as itself and as no other.

        Raises:
            InputError: two labels have one sentence once case, width, marks and full stops are set aside, or one look;
                a name is made of two others and what joins them; or a sentence cannot be read back. Both sentences are
                named.
        """
        keys = {look(key): key for key in self.keys}
        if alike := next((key for key in self.keys if keys[look(key)] != key), None):
            raise InputError(f"task {self.name}: the labels {alike!r} and {keys[look(alike)]!r} look the same, of "
                             "letters of two scripts; change one of them")  # fmt: skip
        for language in self.languages:
            seen: dict[str, str] = {}
            for sentence in self.candidates(language).values():
                if (other := seen.setdefault(fold(look(sentence)), sentence)) is not sentence:
                    raise self._alike(language, other, sentence, "are one sentence, or look like it, once case, width "
                                      "and marks are left out")  # fmt: skip
            if self.arity == "multi":
                self._check_names(language)
            for key, sentence in self.candidates(language).items():
                if self.read_sentence(sentence, language) != (key,):
                    raise InputError(f"task {self.name}, language {language}: the sentence {sentence!r} of label "
                                     f"{key!r} is not read back as this label; change the sentence")  # fmt: skip
                if (said := self.read_short(sentence, language)) not in (None, (key,)):
                    other = self.sentence(said or (), language)
                    raise self._alike(language, sentence, other, "are read as each other in a short answer")

    def _check_names(self, language: str) -> None:
        joiner = self.joiner(language)
        named = {label.name(language): label for label in self.labels if language not in label.whole}
        folded = {fold(name) for name in named}
        for name, label in named.items():
            if (joiner.strip() and joiner.strip() in name) or joiner in name:
                others = [part for part in name.split(joiner.strip() or joiner) if part.strip()]
                two = self.sentence([label.key], language)
                raise InputError(f"task {self.name}, language {language}: {two!r} would be read as {len(others)} "
                                 f"labels, for {joiner!r} stands between labels; change name or joiner")  # fmt: skip
            parts = [part for part in _SEPARATORS.split(fold(name)) if part]
            if len(parts) > 1 and folded.issuperset(parts):
                by_name = {fold(other): one.key for other, one in named.items()}
                raise self._alike(language, self.sentence([label.key], language),
                                  self.sentence(list(dict.fromkeys(by_name[part] for part in parts)), language),
                                  "cannot be told apart: the one name is made of the others")  # fmt: skip

    def _alike(self, language: str, one: str, other: str, why: str) -> InputError:
        return InputError(f"task {self.name}, language {language}: the label sentences {one!r} and {other!r} {why}; "
                          "change one of the names")  # fmt: skip


def wrapped(wrapper: str, post: str, question: str) -> str:
    """``wrapper`` with ``{post}`` and ``{question}`` filled in; braces in what is filled in stay text."""
    values = {"{post}": post, "{question}": question}
    return "".join(values.get(part, part) for part in re.split(r"(\{post\}|\{question\})", wrapper))


def squeeze(text: str) -> str:
    """``text`` with single spaces between words and none at its ends."""
    return " ".join(text.split())


def fold(text: str, *, ends: bool = True) -> str:
    """One dress for what says the same: width, case, white space, Markdown's marks, what nobody sees; with ``ends``
    full stops too."""
    text = unicodedata.normalize("NFKC", without_blanks(text)).casefold()
    text = squeeze("".join(character for character in text if character not in "*_`"))
    return text.rstrip(_ENDS + " ") if ends else text


def _without_head(said: str, head: str, language: str) -> list[str]:
    """``said`` without each end of ``head`` (of its words, where the language has spaces) that it begins with, the
    longest first."""
    cuts = range(len(head) + 1)
    if base_language(language) not in UNSPACED:
        cuts = [cut for cut in cuts if cut in (0, len(head)) or head[cut - 1] == " "]
    return [said[len(head) - cut :].lstrip() for cut in cuts if said.startswith(head[cut:])]


def nearest(word: object, known: Iterable[str]) -> str:
    """What to say beside an unknown word: the nearest known one, or all of them."""
    known = tuple(known)
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
