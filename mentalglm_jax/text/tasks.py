"""What the model is asked and how it answers: label sets, questions, label sentences, parsing.

The label sets follow the data the model is trained on: SOS-HL-1K (suicide risk), SOS-1K (its eleven levels; 6 and above
count as high), SocialCD-3K (twelve cognitive distortions, Burns), the ABCD cognitive pathway of rational emotive
behaviour therapy (four parents, nineteen children), and the IMHI sets of MentaLLaMA, whose questions and label
sentences are kept verbatim. A label sentence is the whole sentence that states the label; it is matched as a whole, so
that "No, ..." inside an explanation or "life" inside "lifeless" can never decide a score.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mentalglm_jax.errors import InputError

Language = Literal["en", "zh"]
Order = Literal["label_first", "explanation_first"]
Status = Literal["ok", "no_label", "unknown_label", "no_explanation"]

LANGUAGES: tuple[Language, ...] = ("en", "zh")
_PROMPT = {
    "en": 'Consider this post: "{post}" Question: {question}',
    "zh": '考虑以下这个帖子："{post}" 问题：{question}',
}
# How labels are joined in a sentence, and the words that introduce the explanation and (explanation first) the label.
_JOIN = {"en": ", ", "zh": "、"}
_REASONING = {"en": "Reasoning: ", "zh": "推理："}
_ANSWER = {"en": "Answer: ", "zh": "回答："}
# Either may stand in Markdown's bold or italics, colon inside or outside.
_MARKER = r"(?P<mark>\*{{1,3}}|_{{1,3}}){0}(?:[：:](?P=mark)|(?P=mark)[：:])\s*|{0}[：:]\s*"
_REASONING_RE = {"en": re.compile(_MARKER.format("Reasoning")), "zh": re.compile(_MARKER.format("推理"))}
_ANSWER_RE = {"en": re.compile(_MARKER.format("Answer")), "zh": re.compile(_MARKER.format("回答"))}
# What may stand before and around a label without changing what it says. No strike-through, bracket or question mark.
_LEAD = re.compile(r"[\s#>*_`-]*(?:(?:answer|回答|答案)[\s*_`]*[：:])?[\s#>*_`\"'“”‘’「」『』《》-]*", re.IGNORECASE)
_TAIL = " \t\r\n*_`\"'“”‘’「」『』《》"
_ENDS = ".。!！"
_SEPARATORS = re.compile(r"\s*[,，、;；]\s*")


@dataclass(frozen=True)
class Label:
    """One class. ``en`` and ``zh`` are its names inside the task's template; ``whole`` replaces template and name where
    upstream's wording does not follow one pattern. ``parent`` is the parent's key (cognitive pathway only)."""

    key: str
    en: str
    zh: str = ""
    whole: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None

    def name(self, language: str) -> str:
        return self.en if language == "en" else self.zh


@dataclass(frozen=True)
class Task:
    """A question with its closed label set.

    ``questions`` holds the question per language; a language absent there is not available for the task. ``variants``
    lists further questions that upstream files ask with the same answers (one per dimension or risk). ``templates``
    turns label names into the label sentence.
    """

    name: str
    kind: Literal["single", "multi"]
    labels: tuple[Label, ...]
    questions: Mapping[str, str]
    templates: Mapping[str, str]
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(label.key for label in self.labels)

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.questions)

    def all_questions(self, language: str) -> tuple[str, ...]:
        """Every question of this task in ``language``, the default first."""
        return (self.question(language), *self.variants.get(language, ()))

    def question(self, language: str) -> str:
        """Raises: InputError if the task is not available in ``language``."""
        if language not in self.questions:
            raise InputError(f"task {self.name}: no language {language!r}; available: {', '.join(self.questions)}")
        return self.questions[language]

    def ordered(self, labels: Iterable[str]) -> tuple[str, ...]:
        """``labels`` in label-table order. Raises: InputError on an unknown or repeated key, none at all, or two for a
        "single" task.
        """
        given = list(labels)
        unknown = [key for key in given if key not in self.keys]
        if unknown:
            raise InputError(f"task {self.name}: unknown label {unknown[0]!r}{_nearest(unknown[0], self.keys)}")
        if not given:
            raise InputError(f"task {self.name}: no label; give at least one of: {', '.join(self.keys)}")
        if len(set(given)) != len(given):
            raise InputError(f"task {self.name}: a label is given twice: {', '.join(given)}")
        if self.kind == "single" and len(given) > 1:
            raise InputError(f"task {self.name}: takes one label, got {len(given)}: {', '.join(given)}")
        return tuple(key for key in self.keys if key in given)

    def sentence(self, labels: Iterable[str], language: str) -> str:
        """The sentence that states ``labels`` (keys) in the order given. Raises: InputError as ``ordered``."""
        self.question(language)
        labels = list(labels)
        self.ordered(labels)
        chosen = [label for key in labels for label in self.labels if label.key == key]
        if language in chosen[0].whole:
            return chosen[0].whole[language]
        return self.templates[language].format(_JOIN[language].join(label.name(language) for label in chosen))

    def candidates(self, language: str) -> dict[str, str]:
        """Label key to the sentence that states this label alone, in label-table order."""
        return {key: self.sentence([key], language) for key in self.keys}

    def read_sentence(self, sentence: str, language: str) -> tuple[str, ...] | None:
        """The label keys a sentence states, or None unless the whole of it (white space apart) is a sentence of the
        table. A label named twice is stated once: the sentence states a set.
        """
        self.question(language)
        text = _squeeze(sentence)
        if self.kind == "single":
            return next(((key,) for key, known in self.candidates(language).items() if known == text), None)
        head, tail = self.templates[language].split("{}")
        if not (text.startswith(head) and text.endswith(tail) and len(text) > len(head) + len(tail)):
            return None
        by_name = {label.name(language): label.key for label in self.labels}
        keys = [by_name.get(name) for name in text[len(head) : len(text) - len(tail)].split(_JOIN[language])]
        return None if None in keys else self.ordered({key for key in keys if key is not None})

    def read_short(self, text: str, language: str) -> tuple[str, ...] | None:
        """The label keys that ``text`` states in another dress than ``read_sentence`` knows, or None.

        Case, width and Markdown's marks do not count, nor do marks and full stops at the ends. What is left must, as a
        whole, be a label sentence, or for labels that are names in a sentence (high, 乱贴标签) the names alone or with
        an end of what stands before and all or nothing of what stands behind them ("high suicide risk"). So no word
        that denies a label can be overlooked: nothing is.
        """
        self.question(language)
        said = _fold(text)
        for label in self.labels:
            if language in label.whole and _fold(label.whole[language]) == said:
                return (label.key,)
        if language not in self.templates or any(language in label.whole for label in self.labels):
            return None
        head, tail = (_fold(part, ends=False) for part in self.templates[language].split("{}"))
        tail = tail.rstrip(_ENDS)
        by_name = {_fold(label.name(language)): label.key for label in self.labels}
        for body in _without_head(said, head, language):
            for names in {body, body.removesuffix(tail).rstrip()}:
                parts = _SEPARATORS.split(names) if self.kind == "multi" else [names]
                keys = {by_name.get(part.strip()) for part in parts}
                if None not in keys:
                    return self.ordered({key for key in keys if key is not None})
        return None


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


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _fold(text: str, *, ends: bool = True) -> str:
    """One dress for what says the same: width, case, white space, Markdown's marks; with ``ends`` full stops too."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _squeeze("".join(character for character in text if character not in "*_`"))
    return text.rstrip(_ENDS + " ") if ends else text


def _without_head(said: str, head: str, language: str) -> list[str]:
    """``said`` without each end of ``head`` (of its words in English) that it begins with, the longest first."""
    cuts = range(len(head) + 1)
    if language == "en":
        cuts = [cut for cut in cuts if cut in (0, len(head)) or head[cut - 1] == " "]
    return [said[len(head) - cut :].lstrip() for cut in cuts if said.startswith(head[cut:])]


def _nearest(word: object, known: Iterable[str]) -> str:
    known = tuple(known)
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


_DISTORTIONS = (
    Label("all_or_nothing", "all-or-nothing thinking", "非此即彼"),
    Label("over_generalization", "over-generalization", "以偏概全"),
    Label("mental_filter", "mental filter", "心理过滤"),
    Label("disqualifying_positive", "disqualifying the positive", "否定正面思考"),
    Label("mind_reading", "mind reading", "读心术"),
    Label("fortune_telling", "fortune teller error", "先知错误"),
    Label("magnification", "magnification", "放大"),
    Label("emotional_reasoning", "emotional reasoning", "情绪化推理"),
    Label("should_statements", "should statements", "应该式"),
    Label("labeling", "labeling", "乱贴标签"),
    Label("blaming_oneself", "blaming oneself", "罪责归己"),
    Label("blaming_others", "blaming others", "罪责归他"),
)

# Parent key -> upstream spelling per language; child key -> upstream English spelling (names as in the authors' label
# files).
PATHWAY_PARENTS: dict[str, dict[str, str]] = {
    "A": {"en": "Activating_Event", "zh": "触发性事件"},
    "B": {"en": "Belief", "zh": "认知歪曲"},
    "C": {"en": "Consequence", "zh": "情绪反应"},
    "D": {"en": "Disputation", "zh": "驳斥"},
}
_PATHWAY = (
    ("A1", "Disease_symptom", "疾病症状"),
    ("A2", "Social_relation", "社会关系"),
    ("A3", "Life", "生活"),
    ("A4", "Study_and_work", "学习工作"),
    ("A5", "Emotional", "情感"),
    ("B1", "All_or_nothing_thinking", "非此即彼"),
    ("B2", "Over_generalization", "以偏概全"),
    ("B3", "Mental_filter", "心理过滤"),
    ("B4", "Disqualifying_the_positive", "否定正面思考"),
    ("B5", "Jumping_to_conclusions", "妄下结论"),
    ("B6", "Magnification_and_minimization", "放大和缩小"),
    ("B7", "Emotional_reasoning", "情绪化推理"),
    ("B8", "Should_statements", "应该句式"),
    ("B9", "Labeling_and_mislabeling", "乱贴标签"),
    ("B10", "Blaming_oneself_others", "罪责归己/他"),
    ("C1", "Emotional_effect", "情感效应"),
    ("C2", "Behavioral_effect", "行为效应"),
    ("D1", "Habitual_disputation", "习惯性驳斥"),
    ("D2", "Effective_disputation", "有效驳斥"),
)


def _whole(*rows: tuple[str, str]) -> tuple[Label, ...]:
    """Labels of an English upstream set from (key, verbatim label sentence)."""
    return tuple(Label(key, key, whole={"en": sentence}) for key, sentence in rows)


def _imhi(name: str, questions: tuple[str, ...], *labels: tuple[str, str]) -> Task:
    return Task(f"imhi_{name}", "single", _whole(*labels), {"en": questions[0]}, {"en": "{}"}, {"en": questions[1:]})


def _yes_no(condition: str) -> tuple[tuple[str, str], tuple[str, str]]:
    yes, no = f"Yes, the poster suffers from {condition}.", f"No, the poster does not suffer from {condition}."
    return ("yes", yes), ("no", no)


def _named(template: str, names: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((key, template.format(name)) for key, name in names.items())


_SAD = {
    "work": "work",
    "health": "health issues",
    "financial": "financial problem",
    "school": "school",
    "family": "family issues",
    "emotion": "emotion turmoil",
    "social": "social relationships",
    "decisions": "everyday decision making",
}
_CAMS = {"alienation": "alienation", "relationship": "relationship", "career": "jobs and career"}
_CAMS |= {"medication": "medication", "bias_or_abuse": "bias or abuse"}
_TSID = {
    "none": "no mental disorders",
    "suicide": "suicide or self-harm tendency",
    "depression": "depression",
    "ptsd": "PTSD",
}
_SWMH = {"anxiety": "anxiety", "bipolar": "bipolar disorder", "depression": "depression", "suicide": "suicide"}
_WELLNESS = ("spiritual", "physical", "intellectual", "social", "vocational", "emotional")

_TASKS = (
    Task(
        "suicide_risk",
        "single",
        (Label("high", "high", "高"), Label("low", "low", "低")),
        {"en": "Does the post show high or low suicide risk?", "zh": "这个帖子体现的自杀风险是高还是低？"},
        {"en": "This post shows {} suicide risk.", "zh": "这个帖子体现了{}自杀风险。"},
    ),
    Task(
        "suicide_level",
        "single",
        tuple(Label(str(level), str(level), str(level)) for level in range(11)),
        {
            "en": "Which level of suicide risk, from 0 to 10, does the post show?",
            "zh": "这个帖子体现的自杀风险等级是多少（0到10）？",
        },
        {"en": "This post shows suicide risk level {}.", "zh": "这个帖子体现的自杀风险等级是{}级。"},
    ),
    Task(
        "cognitive_distortion",
        "multi",
        _DISTORTIONS,
        {"en": "What cognitive distortions does the post show?", "zh": "这个帖子体现了什么认知歪曲？"},
        {"en": "This post shows these cognitive distortions: {}.", "zh": "这个帖子体现的认知歪曲有：{}。"},
    ),
    Task(
        "cognitive_pathway",
        "multi",
        tuple(Label(key, en.replace("_", " ").lower(), zh, parent=key[0]) for key, en, zh in _PATHWAY),
        {"en": "What cognitive pathway does the post show?", "zh": "这个帖子体现了什么认知路径？"},
        {"en": "This post shows this cognitive pathway: {}.", "zh": "这个帖子体现的认知路径有：{}。"},
    ),
    Task(
        "depression_risk",
        "single",
        (
            Label("yes", "yes", "是", whole={"zh": "是，这些帖子体现了抑郁风险。"}),
            Label("no", "no", "否", whole={"zh": "否，这些帖子没有体现抑郁风险。"}),
        ),
        {"zh": "这些帖子是否体现了抑郁风险？"},
        {"zh": "{}"},
    ),
    _imhi("dr", ("Does the poster suffer from depression?",), *_yes_no("depression")),
    _imhi("clp", ("Does the poster suffer from depression?",), *_yes_no("depression")),
    _imhi("dreaddit", ("Does the poster suffer from stress?",), *_yes_no("stress")),
    _imhi("loneliness", ("Does the poster suffer from loneliness?",), *_yes_no("loneliness")),
    _imhi(
        "sad",
        ("What is the stress cause of this post?",),
        *_named("This post shows the stress cause related to {}.", _SAD),
        ("other", "This post shows other stress causes."),
    ),
    _imhi(
        "irf",
        ("Does the post show risk of thwarted belongingness?", "Does the post show risk of perceived burdensomeness?"),
        ("yes", "Yes, the post shows this risk."),
        ("no", "No, the post does not show this risk."),
    ),
    _imhi(
        "multiwd",
        tuple(f"Does the {dimension} wellness dimension exist in the post?" for dimension in _WELLNESS),
        ("yes", "Yes, this wellness dimension exists in the post."),
        ("no", "No, this wellness dimension does not exist in the post."),
    ),
    _imhi(
        "cams",
        ("What cause of depression does this post show?",),
        *_named("This post shows causes of depression related to {}.", _CAMS),
        ("none", "This post shows no causes of depression."),
    ),
    _imhi("tsid", ("What mental disorder does this post show?",), *_named("This post shows {}.", _TSID)),
    _imhi(
        "swmh",
        ("What mental disorder symptoms does this post show?",),
        *_named("This post shows mental disorder symptoms related to {}.", _SWMH),
        ("none", "This post shows no mental disorder symptoms."),
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def get_task(task: str | Task) -> Task:
    """The task of this name. Raises: InputError naming the nearest known task."""
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise InputError(f"unknown task {task!r}{_nearest(task, TASKS)}")
    return TASKS[task]


def pathway_name(key: str, language: str) -> str:
    """Upstream's ``parent##child`` spelling of a cognitive pathway label, e.g. "Belief##Mental_filter"."""
    for child, en, zh in _PATHWAY:
        if child == key:
            return f"{PATHWAY_PARENTS[key[0]][language]}##{en if language == 'en' else zh}"
    raise InputError(f"cognitive pathway: unknown label {key!r}{_nearest(key, (row[0] for row in _PATHWAY))}")


def pathway_key(name: str, language: str) -> str:
    """The label key of a ``parent##child`` spelling. Raises: InputError if parent and child do not belong together."""
    for child, _, _ in _PATHWAY:
        if pathway_name(child, language) == name.strip():
            return child
    known = (pathway_name(child, language) for child, _, _ in _PATHWAY)
    raise InputError(f"cognitive pathway: unknown label {name!r}{_nearest(name, known)}")


def prompt(post: str, question: str, language: str) -> str:
    """The user turn: IMHI's ``Consider this post: "..." Question: ...`` or its Chinese counterpart."""
    if language not in _PROMPT:
        raise InputError(f"unknown language {language!r}; known: {', '.join(LANGUAGES)}")
    return _PROMPT[language].format(post=post, question=question)


def answer(
    task: str | Task, labels: Iterable[str], explanation: str | None, language: str, order: Order = "label_first"
) -> str:
    """The assistant turn: label sentence and explanation (white space at its ends dropped), or the label sentence
    alone.

    Raises: InputError on labels the task does not have, or an explanation that is empty (pass None for no explanation).
    """
    sentence = get_task(task).sentence(labels, language)
    if explanation is None:
        return sentence
    explanation = explanation.strip()
    if not explanation:
        raise InputError(f"task {get_task(task).name}: the explanation is empty; give text, or null for none")
    if order == "label_first":
        return f"{sentence} {_REASONING[language]}{explanation}"
    if order == "explanation_first":
        return f"{_REASONING[language]}{explanation} {_ANSWER[language]}{sentence}"
    raise InputError(f"unknown answer order {order!r}; known: label_first, explanation_first")


def before_label(explanation: str, language: str) -> tuple[str, str]:
    """An explanation-first answer up to its label sentence, cut before the colon: a tokenizer may join the colon with
    what follows it, never with the word before it.
    """
    word = _ANSWER[language].rstrip("： :")
    return f"{_REASONING[language]}{explanation.strip()} {word}", _ANSWER[language][len(word) :]


def parse(task: str | Task, language: str, text: str) -> Parsed:
    """Reads an answer in either order; the inverse of ``answer``.

    The label is what stands before the explanation, or behind it: a label sentence, or one in another dress
    (``Task.read_short``): bold, in quotation marks, behind "Answer:", in another case, its label alone. It is matched
    as a whole, never by substring: "not high" and 没有高自杀风险 state no label.

    Status: "ok"; "no_explanation" (the label is known, nothing explains it); "no_label" (nothing stands where the label
    belongs); "unknown_label" (what stands there is not, as a whole, a label sentence of the task).
    """
    task = get_task(task)
    label_span, explanation_span = _parts(language, text)
    explanation = text[slice(*explanation_span)] if explanation_span else None
    if label_span is None:
        return Parsed(None, explanation, None, explanation_span, "no_label")
    labels = task.read_sentence(text[slice(*label_span)], language)
    if labels is None:
        label_span = _undressed(text, label_span)
        labels = task.read_short(text[slice(*label_span)], language)
    if labels is None:
        return Parsed(None, explanation, None, explanation_span, "unknown_label")
    return Parsed(labels, explanation, label_span, explanation_span, "ok" if explanation_span else "no_explanation")


def _undressed(text: str, span: tuple[int, int]) -> tuple[int, int]:
    """The span without what stands around the label: "Answer:", marks, quotation marks."""
    start, end = span
    lead = _LEAD.match(text, start, end)
    start = lead.end() if lead else start
    return start, max(start, start + len(text[start:end].rstrip(_TAIL)))


def explains_first(language: str, text: str) -> bool:
    """Whether an answer begins with its explanation."""
    return _REASONING_RE[language].match(text.lstrip()) is not None


def _parts(language: str, text: str) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Character spans of (label sentence, explanation), stripped; None for an empty part."""
    marker = _REASONING_RE[language].search(text)
    if marker is None:
        return _strip(text, 0, len(text)), None
    if text[: marker.start()].strip(" \t\r\n#>*_"):  # no label sentence holds the marker, so the first one ends it
        return _strip(text, 0, marker.start()), _strip(text, marker.end(), len(text))
    # An explanation may say "Answer:" itself; the label sentence never does, so the last one counts.
    ends = list(_ANSWER_RE[language].finditer(text, marker.end()))
    if not ends:
        return None, _strip(text, marker.end(), len(text))
    return _strip(text, ends[-1].end(), len(text)), _strip(text, marker.end(), ends[-1].start())


def _strip(text: str, start: int, end: int) -> tuple[int, int] | None:
    part = text[start:end]
    if not part.strip():
        return None
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())
