"""A bilingual corpus whose right answers, and the reasons for them, are known by construction.

Every post is a handful of clauses: distractors that say nothing about the label, cue phrases the label depends on, and
one decoy phrase that looks weighty and is not. The gold explanation quotes the cues. Whoever fine-tunes on it can
therefore test not only the label a model gives but whether the words it cites are the words that decided (cue spans are
kept), and what happens when cues are repeated, combined by AND / OR, accompanied by a correlated decoy, or when
explanations are trained to cite the decoy instead ("unfaithful").

All phrases are invented and non-graphic (``assets/phrases_en.yaml``, ``assets/phrases_zh.yaml``); no real post went
into them.
"""

import functools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from mentalglm_jax.data.records import Record, Span
from mentalglm_jax.errors import InputError
from mentalglm_jax.settings import Settings
from mentalglm_jax.text import tasks

SYNTHETIC_TASKS = ("suicide_risk", "cognitive_distortion", "cognitive_pathway")
TWO_LABELS = 0.3  # share of "multi" posts that carry two labels
# The belief part of the pathway names the same distortions, some merged (reference: the authors' decision rules and
# Burns's list).
_BELIEFS = {
    "B1": ("all_or_nothing",),
    "B2": ("over_generalization",),
    "B3": ("mental_filter",),
    "B4": ("disqualifying_positive",),
    "B5": ("mind_reading", "fortune_telling"),
    "B6": ("magnification",),
    "B7": ("emotional_reasoning",),
    "B8": ("should_statements",),
    "B9": ("labeling",),
    "B10": ("blaming_oneself", "blaming_others"),
}
_SEPARATORS = {"en": (". ", ", "), "zh": ("。", "，")}
_END = {"en": ".", "zh": "。"}
_UNCUED = {"en": "The post says nothing that points either way.", "zh": "帖子里没有说明问题的话。"}
QUOTES = {"en": ('"', '"'), "zh": ("“", "”")}


class SyntheticConfig(Settings):
    """What corpus to make. Sizes are numbers of posts per task and language.

    ``n_clauses``: smallest and largest number of clauses in a post, cues and decoy included (a post whose cues need
    more gets more). ``fillings``: each template's slots are filled in at most so many ways in the whole corpus (None:
    freely); with few, a small model can know the phrases by heart and learns to quote sooner. ``templates``: only the
    first so many cue templates of each label, or facet of one, are used (None: all). ``uncued``: share of the
    suicide-risk training posts without any cue, their label drawn by lot; without them "no high cue" is as good a sign
    of low risk as a low cue, and a model may rightly ignore the low cues.
    ``redundancy``: every cue stands twice, word for word. ``logic``: "single" (one cue decides), or
    for suicide risk "and" / "or" over two facets that each post shows in their high or low form: high if both (and) or
    at least one (or) is high. ``decoy_correlation``: share of posts whose decoy is picked by the label; in the rest it
    is picked without looking. ``variant``: "faithful" explanations quote the cues, "unfaithful" ones the decoy; ids,
    posts and labels are the same in both.

    Raises:
        InputError: options that contradict each other. (pydantic's ValidationError: a key or value that does not
        exist.)
    """

    seed: int = 0
    languages: tuple[Literal["en", "zh"], ...] = ("en", "zh")
    tasks: tuple[Literal["suicide_risk", "cognitive_distortion", "cognitive_pathway"], ...] = SYNTHETIC_TASKS
    n_train: Annotated[int, Field(ge=0)] = 1000
    n_dev: Annotated[int, Field(ge=0)] = 100
    n_test: Annotated[int, Field(ge=0)] = 200
    n_clauses: tuple[int, int] = (4, 7)
    fillings: Annotated[int, Field(ge=1)] | None = None
    templates: Annotated[int, Field(ge=1)] | None = None
    uncued: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    redundancy: bool = False
    logic: Literal["single", "and", "or"] = "single"
    decoy_correlation: Annotated[float, Field(ge=0, le=1)] = 0.0
    variant: Literal["faithful", "unfaithful"] = "faithful"

    @model_validator(mode="after")
    def _consistent(self) -> "SyntheticConfig":
        low, high = self.n_clauses
        if not 3 <= low <= high <= 16:
            raise InputError(f"n_clauses: ({low}, {high}) must be a range inside 3..16; try (4, 7)")
        for name in ("languages", "tasks"):
            if not getattr(self, name) or len(set(getattr(self, name))) != len(getattr(self, name)):
                raise InputError(f"{name}: give at least one, each once")
        if self.logic != "single" and self.uncued:
            raise InputError(f"uncued: cannot be combined with logic {self.logic!r}; set it to 0")
        if self.logic != "single" and set(self.tasks) != {"suicide_risk"}:
            other = next(name for name in self.tasks if name != "suicide_risk")
            raise InputError(
                f"logic: {self.logic!r} is defined for suicide_risk only; remove {other} from tasks or use 'single'"
            )
        return self


@dataclass(frozen=True)
class Phrase:
    """A filled template: what it says, and the bank and template it came from."""

    text: str
    bank: str
    template: str


@dataclass(frozen=True)
class Post:
    """Clauses in order, the text they make and the span of each."""

    clauses: tuple[Phrase, ...]
    text: str
    spans: tuple[Span, ...]

    def spans_of(self, bank: str) -> tuple[Span, ...]:
        return tuple(
            span for clause, span in zip(self.clauses, self.spans, strict=True) if clause.bank.startswith(bank)
        )


@functools.cache
def load_phrases(language: str) -> Mapping[str, Any]:
    """The phrase banks of a language, as their YAML file holds them."""
    path = resources.files("mentalglm_jax") / "assets" / f"phrases_{language}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def cue_templates(
    task: str, key: str, language: str, facet: str | None = None, most: int | None = None
) -> tuple[str, ...]:
    """Templates of the cue phrases of one label, the first ``most`` of each of its banks; ``facet`` "a" or "b" narrows
    suicide risk to one of its two facets."""
    phrases = load_phrases(language)
    if task == "suicide_risk":
        banks = [phrases[task][key][one] for one in (facet or "ab")]
    elif task == "cognitive_pathway":
        banks = [*(phrases["cognitive_distortion"][name] for name in _BELIEFS.get(key, ())), phrases[task].get(key, ())]
    else:
        banks = [phrases[task][key]]
    return tuple(template for bank in banks for template in bank[:most])


def _fill(template: str, bank: str, language: str, rng: random.Random, fillings: int | None = None) -> Phrase:
    """The template with its slots filled at random, or in one of ``fillings`` ways that depend on the template only."""
    slots = load_phrases(language)["slots"]
    if fillings is not None:
        rng = random.Random(f"{template}/{rng.randrange(fillings)}")
    text = re.sub(r"\{(\w+)\}", lambda match: rng.choice(slots[match[1]]), template)
    return Phrase(text, bank, template)


def _distractors(count: int, language: str, rng: random.Random, fillings: int | None) -> list[Phrase]:
    """``count`` phrases, topics distinct as far as there are enough of them."""
    topics = load_phrases(language)["distractors"]
    names: list[str] = []
    while len(names) < count:
        names += rng.sample(sorted(topics), min(count - len(names), len(topics)))
    return [_fill(rng.choice(topics[name]["phrases"]), f"topic/{name}", language, rng, fillings) for name in names]


def _decoy(config: SyntheticConfig, task: str, key: str, language: str, rng: random.Random) -> Phrase:
    """One decoy; with probability ``decoy_correlation`` from the part of the bank that belongs to label ``key``."""
    templates = load_phrases(language)["decoys"]
    if rng.random() < config.decoy_correlation:
        keys = tasks.TASKS[task].keys
        groups = min(len(keys), len(templates))
        templates = templates[keys.index(key) % groups :: groups]
    return _fill(rng.choice(templates), "decoy", language, rng, config.fillings)


def _join(clauses: Sequence[Phrase], language: str, rng: random.Random) -> Post:
    text, spans = "", []
    for number, clause in enumerate(clauses):
        spans.append((len(text), len(text) + len(clause.text)))
        last = number == len(clauses) - 1
        text += clause.text + (_END[language] if last else rng.choice(_SEPARATORS[language]))
    return Post(tuple(clauses), text, tuple(spans))


def _cues(
    config: SyntheticConfig, task: str, labels: Sequence[str], facets: Sequence[str], language: str, rng: random.Random
) -> list[Phrase]:
    # AND / OR: facet a in the form facets[0], facet b in the form facets[1]
    pairs = [("a", facets[0]), ("b", facets[1])] if facets else [(None, key) for key in labels]
    return [
        _fill(rng.choice(cue_templates(task, key, language, facet, config.templates)), f"cue/{key}", language, rng,
              config.fillings)
        for facet, key in pairs
    ]  # fmt: skip


def _draw(
    config: SyntheticConfig, task: str, labels: Sequence[str], facets: Sequence[str], language: str, rng: random.Random
) -> Post:
    cues = _cues(config, task, labels, facets, language, rng) * (2 if config.redundancy else 1)
    fixed = [*cues, _decoy(config, task, labels[0] if labels else "low", language, rng)]
    count = max(rng.randint(*config.n_clauses), len(fixed) + 1)
    clauses = fixed + _distractors(count - len(fixed), language, rng, config.fillings)
    rng.shuffle(clauses)
    return _join(clauses, language, rng)


def _explain(task: str, labels: Sequence[str], quotes: Mapping[str, Sequence[str]], language: str) -> str:
    """One clause per label, in the order of ``labels``, each quoting the phrases in ``quotes[label]``."""
    opening, closing = QUOTES[language]
    names = {label.key: label.name(language) for label in tasks.TASKS[task].labels}
    risk = task == "suicide_risk"
    parts = []
    for key in labels:
        said = (" and " if language == "en" else "和").join(f"{opening}{text}{closing}" for text in quotes[key])
        if language == "en":
            parts.append(f"The post says {said}, which points to {names[key]}{' suicide risk' if risk else ''}.")
        else:
            parts.append(f"帖子里说{said}，这体现了{names[key]}{'自杀风险' if risk else ''}。")
    return (" " if language == "en" else "").join(parts)


def _quotes(post: Post, labels: Sequence[str], facets: Sequence[str], variant: str) -> dict[str, list[str]]:
    if variant == "unfaithful":
        decoy = [clause.text for clause in post.clauses if clause.bank == "decoy"]
        return dict.fromkeys(labels, decoy)
    if facets:  # both facets decide, whichever form they take; quoted in the order of the post
        return {labels[0]: list(dict.fromkeys(c.text for c in post.clauses if c.bank.startswith("cue/")))}
    return {key: list(dict.fromkeys(c.text for c in post.clauses if c.bank == f"cue/{key}")) for key in labels}


def _plan(
    config: SyntheticConfig, task: str, count: int, rng: random.Random
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(labels, facets) of each post: classes take turns, so they are as even as the count allows; then shuffled."""
    keys = tasks.TASKS[task].keys
    high_low: dict[str, list[tuple[str, str]]] = {
        "and": [("high", "low"), ("low", "high"), ("low", "low")],
        "or": [("high", "low"), ("low", "high"), ("high", "high")],
    }
    plan: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    for number in range(count):
        key = keys[number % len(keys)]
        if config.logic != "single":
            mixed_label = "low" if config.logic == "and" else "high"
            turn = high_low[config.logic][number // len(keys) % 3]
            plan.append(((key,), turn if key == mixed_label else (key, key)))
        elif tasks.TASKS[task].arity == "multi" and rng.random() < TWO_LABELS:
            other = rng.choice([other for other in keys if other != key])
            plan.append((tasks.TASKS[task].ordered([key, other]), ()))
        else:
            plan.append(((key,), ()))
    rng.shuffle(plan)
    return plan


def make_corpus(config: SyntheticConfig) -> list[Record]:
    """All records, ordered by task, language, split. The same ``config`` always gives the same list; no two posts are
    equal.

    ``cues`` and ``decoys`` of each record hold the exact spans, in the order of the post.
    Raises: InputError if so many posts are asked for that no new one can be made.
    """
    records: list[Record] = []
    seen: set[str] = set()
    sizes = {"train": config.n_train, "dev": config.n_dev, "test": config.n_test}
    source = "synthetic" if config.variant == "faithful" else "synthetic-unfaithful"
    for task in config.tasks:
        for language in config.languages:
            for split, size in sizes.items():
                # A stream of its own per part: changing one size leaves the other parts' posts as they were.
                rng = random.Random(f"{config.seed}/{task}/{language}/{split}")
                for number, (labels, facets) in enumerate(_plan(config, task, size, rng)):
                    cued = not (task == "suicide_risk" and split == "train" and rng.random() < config.uncued)
                    post = _new_post(config, task, labels if cued else (), facets, language, rng, seen)
                    if (
                        cued and not facets
                    ):  # labels are stated, and explained, in the order in which the post shows them
                        labels = tuple(dict.fromkeys(c.bank[4:] for c in post.clauses if c.bank.startswith("cue/")))
                    single = tasks.TASKS[task].arity == "single"
                    records.append(
                        Record(
                            id=f"{task}-{language}-{split}-{number:05d}",
                            task=task,
                            language=language,
                            post=post.text,
                            question=tasks.TASKS[task].question(language),
                            label=labels[0] if single else None,
                            labels=None if single else labels,
                            explanation=_explain(task, labels, _quotes(post, labels, facets, config.variant), language)
                            if cued
                            else _UNCUED[language],
                            source=source,
                            split=split,
                            cues=post.spans_of("cue/"),
                            decoys=post.spans_of("decoy"),
                        )
                    )
    return records


def _new_post(
    config: SyntheticConfig,
    task: str,
    labels: Sequence[str],
    facets: Sequence[str],
    language: str,
    rng: random.Random,
    seen: set[str],
) -> Post:
    for _ in range(100):
        post = _draw(config, task, labels, facets, language, rng)
        if post.text not in seen:
            seen.add(post.text)
            return post
    raise InputError(
        f"synthetic corpus: no new {task} post in {language} left; ask for fewer posts or longer ones (n_clauses)"
    )


# --- Reading exercises: what a small base model learns before it sees any label ---

_READING = {
    "en": {
        "topic": "Which part of the post mentions {}?",
        "similar": 'Which part of the post is most like "{}"?',
        "first": "What is the first part of the post?",
        "last": "What is the last part of the post?",
        "topics": "What does the post mention?",
        "whole": "Write the post again.",
        "words": "Write these words again: {}.",
        "says": "The post says {}.",
        "mentions": "The post mentions {}.",
        "join": ", ",
    },
    "zh": {
        "topic": "帖子里哪一句提到了{}？",
        "similar": "帖子里哪一句最像“{}”？",
        "first": "帖子的第一句是什么？",
        "last": "帖子的最后一句是什么？",
        "topics": "帖子提到了什么？",
        "whole": "把帖子再写一遍。",
        "words": "把这些词再写一遍：{}。",
        "says": "帖子里说{}。",
        "mentions": "帖子提到了{}。",
        "join": "、",
    },
}
# A whole post written again is the exercise with the most answer tokens, so the one that teaches reading soonest.
_KINDS = (*["whole"] * 5, "topic", "topics", "similar", "similar", "first", "last", "words")


def pretraining_chats(config: SyntheticConfig, n: int, seed: int | None = None) -> Iterator[tuple[str, str, str]]:
    """Yields ``n`` (user turn, assistant turn, language) reading exercises over posts like those of
    ``make_corpus(config)``.

    They ask for the post or a part of it, quoted word for word, or ask what everyday topics it mentions. "Most like"
    questions name another phrase of the same kind: they teach what means the same, as pre-training does for a real
    model. Label names occur as words to copy, drawn without looking at the post; no label sentence or label question
    does, so that which post has which label is left to fine-tuning. Deterministic in ``config`` and ``seed`` (default:
    the config's).
    """
    rng = random.Random(f"{config.seed if seed is None else seed}/reading")
    for _ in range(n):
        language, task = rng.choice(config.languages), rng.choice(config.tasks)
        labels, facets = rng.choice(_plan(config, task, 2 * len(tasks.TASKS[task].keys), rng))
        post = _draw(config, task, labels, facets, language, rng)
        question, answer = _exercise(config, task, post, language, rng)
        yield tasks.prompt(post.text, question, language), answer, language


def _exercise(config: SyntheticConfig, task: str, post: Post, language: str, rng: random.Random) -> tuple[str, str]:
    """(question, answer); kinds whose answer would be ambiguous in this post are passed over."""
    words, names = _READING[language], load_phrases(language)["distractors"]
    topics = [c.bank.removeprefix("topic/") for c in post.clauses if c.bank.startswith("topic/")]

    def says(clause: Phrase) -> str:
        return words["says"].format(clause.text.join(QUOTES[language]))

    for kind in rng.sample(_KINDS, len(_KINDS)):
        clause = rng.choice(post.clauses)
        alone = sum(other.bank == clause.bank for other in post.clauses) == 1
        if kind == "whole":
            return words[kind], post.text
        if kind in ("first", "last"):
            return words[kind], says(post.clauses[0 if kind == "first" else -1])
        if kind == "words":
            vocabulary = [label.name(language) for name in config.tasks for label in tasks.TASKS[name].labels]
            listed = words["join"].join(rng.sample(vocabulary, min(3, len(vocabulary))))
            return words[kind].format(listed), listed
        if kind == "topics" and topics:
            return words[kind], words["mentions"].format(words["join"].join(names[topic]["name"] for topic in topics))
        if kind == "topic" and alone and clause.bank.startswith("topic/"):
            return words[kind].format(names[clause.bank.removeprefix("topic/")]["name"]), says(clause)
        if kind == "similar" and alone and (others := _same_kind(config, clause, task, language)):
            other = _fill(rng.choice(others), clause.bank, language, rng, config.fillings)
            return words[kind].format(other.text), says(clause)
    return words["first"], says(post.clauses[0])


def _same_kind(config: SyntheticConfig, clause: Phrase, task: str, language: str) -> list[str]:
    """The other templates of the bank a clause came from; decoys have nothing in common and give none."""
    bank, _, key = clause.bank.partition("/")
    if bank == "decoy":
        return []
    topics = load_phrases(language)["distractors"]
    templates = (
        topics[key]["phrases"] if bank == "topic" else cue_templates(task, key, language, None, config.templates)
    )
    return [template for template in templates if template != clause.template]
