"""Quotes corrupted on purpose, with the span they came from: what the aligner is measured on (V12)."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from probes.citations.align import align
from probes.citations.normalise import SIMPLER
from probes.records import Span

_ZH = "最近一直睡得少缺乏胃口白天坐在窗边看云朋友约我去公园散步说改天吧晚上又翻来覆去想很多事情楼下的猫叫了一夜觉得累"
_LINE = (
    "lately the kettle hums while rain taps windows buses pass my street slow grey rows before morning nobody answers "
    "letters pile beside unopened parcels and dinner stays cold until neighbours knock asking whether everything helps"
)
# Neither holds a negation: to change one is another kind of corruption (``polarity``).
_EN = _LINE.split()
_DENIED = {
    "zh": (("我", "不想", "想", "再去上班"), ("晚上", "没有", "有", "胃口吃饭"), ("他们", "从不", "都", "接我的电话"),
           ("朋友", "别", "快", "来打扰我")),
    "en": (("I", "do not", "do", "want to see anyone"), ("she", "never", "often", "answers my calls"),
           ("there is", "no", "some", "reason to get up"), ("we", "can't", "can", "sleep at night")),
}  # fmt: skip
_TERMS = {
    "zh": (("属于“{}”", ("非黑即白", "情绪推理", "自杀意念")), ("“{}”的思维模式", ("灾难化", "读心术", "反刍")),
           ("符合《{}》的标准", ("贝克抑郁量表", "抑郁自评问卷", "精神障碍诊断手册"))),
    "en": (('a form of "{}"', ("emotional reasoning", "mind reading", "passive ideation")),
           ('the "{}" pattern', ("all or nothing", "rumination", "learned helplessness")),
           ("classified as '{}'", ("labelling", "magnification", "avoidance"))),
}  # fmt: skip
_TRADITIONAL = {simple: old for old, simple in SIMPLER.items()}
KINDS = ("exact", "insert", "delete", "substitute", "mixed", "traditional", "full width", "emoji", "punctuation")


@dataclass(frozen=True)
class Quote:
    """A post, an explanation that quotes ``span`` of it with some characters changed, and the kind of change."""

    post: str
    explanation: str
    span: Span
    kind: str


def quote(rng: random.Random, kind: str, language: str, rate: float) -> Quote:
    """One corrupted quotation of a whole clause.

    Args:
        rate: at most this share of the quote's characters is edited (insert, delete, substitute, mixed).
    """
    joint, stops = ("", "，。！") if language == "zh" else (" ", ",.!")
    clauses = []
    for _ in range(rng.randint(4, 8)):
        words = rng.sample(_ZH, rng.randint(8, 16)) if language == "zh" else rng.sample(_EN, rng.randint(4, 8))
        clauses.append(joint.join(words))
    post, spans = "", []
    for clause in clauses:
        post += joint if post else ""
        spans.append((len(post), len(post) + len(clause)))
        post += clause + rng.choice(stops)
    at = rng.randrange(len(clauses))
    said = _change(rng, clauses[at], kind, language, rate)
    explanation = (
        f"帖子提到“{said}”，说明心情低落。" if language == "zh" else f'They wrote "{said}", which shows low mood.'
    )
    return Quote(post, explanation, spans[at], kind)


def _change(rng: random.Random, text: str, kind: str, language: str, rate: float) -> str:
    if kind == "traditional":
        return "".join(_TRADITIONAL.get(char, char) for char in text)
    if kind == "full width":
        return "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text).upper()
    if kind in ("emoji", "punctuation"):
        extra = "😭💔🙃" if kind == "emoji" else "…～、!"
        return "".join(char + (rng.choice(extra) if rng.random() < 0.1 else "") for char in text)
    letters = _ZH if language == "zh" else "abcdefghijklmnopqrstuvwxyz"
    chars = list(text)
    for _ in range(int(rate * len(text) + 1e-9) if kind != "exact" else 0):
        edit = rng.choice(("insert", "delete", "substitute")) if kind == "mixed" else kind
        where = rng.randrange(len(chars))
        if edit == "insert":
            chars.insert(where, rng.choice(letters))
        elif edit == "delete":
            del chars[where]
        else:
            chars[where] = rng.choice(letters)
    return "".join(chars)


def span_f1(count: int, rate: float, seed: int = 0) -> dict[str, float]:
    """Mean F1, over characters, of the aligned post spans against the true one, per kind of change; and "all".

    A quote that is not found counts 0; what is found besides it counts against precision.
    """
    rng = random.Random(seed)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for index in range(count):
        one = quote(rng, KINDS[index % len(KINDS)], "zh" if index // len(KINDS) % 2 else "en", rate)
        truth, seen = np.zeros(len(one.post), bool), np.zeros(len(one.post), bool)
        truth[slice(*one.span)] = True
        for citation in align(one.explanation, one.post):
            for a, b in citation.post_char:
                seen[a:b] = True
        both = float((truth & seen).sum())
        found[one.kind].append(2 * both / float(truth.sum() + seen.sum()))
    means = {kind: float(np.mean(values)) for kind, values in found.items() if values}
    return means | {"all": float(np.mean([value for values in found.values() for value in values]))}


def polarity(count: int, seed: int = 0) -> dict[str, float]:
    """Quotes of a clause that the post denies, or affirms.

    Returns:
        ``kept``: share of right quotes that are found in the post; ``left out``, ``put in``: share of quotes without
        the post's negation (the word taken out, replaced, or the quote begun behind it), or with one it has not, that
        are not.
    """
    rng = random.Random(seed)
    found: dict[str, list[bool]] = {"kept": [], "left out": [], "put in": []}
    for index in range(count):
        language = "zh" if index % 2 else "en"
        joint = "" if language == "zh" else " "
        who, no, yes, what = rng.choice(_DENIED[language])
        around = [quote(rng, "exact", language, 0.0).post for _ in range(2)]
        denied, affirmed = joint.join((who, no, what)), joint.join((who, yes, what))
        for kind, said, quoted in (
            ("kept", denied, denied), ("kept", affirmed, affirmed), ("kept", denied, joint.join((no, what))),
            ("left out", denied, joint.join((who, what))), ("left out", denied, affirmed), ("left out", denied, what),
            ("put in", affirmed, denied),
        ):  # fmt: skip
            post = f"{around[0]}{joint}{said}{'。' if language == 'zh' else '. '}{around[1]}"
            citations = align(f"帖子提到“{quoted}”。" if language == "zh" else f'They wrote "{quoted}".', post)
            is_found = any(c.kind == "quote" and c.post_char for c in citations)
            found[kind].append(is_found == (kind == "kept"))
    return {kind: float(np.mean(values)) for kind, values in found.items()}


def terms(count: int, seed: int = 0) -> dict[str, float]:
    """Titles and terms between marks, and invented quotes as short as those.

    Returns:
        ``named``: share of titles and terms that count as quotes; ``invented``: share of invented quotes that do.
    """
    rng = random.Random(seed)
    found: dict[str, list[bool]] = {"named": [], "invented": []}
    for index in range(count):
        language = "zh" if index % 2 else "en"
        post = quote(rng, "exact", language, 0.0).post
        frame, names = rng.choice(_TERMS[language])
        name = rng.choice(names)
        told = f"帖子{frame.format(name)}。" if language == "zh" else f"It shows {frame.format(name)}."
        said = f"帖子写道“{name}”。" if language == "zh" else f'They wrote "{name}".'
        for kind, explanation in (("named", told), ("invented", said)):
            found[kind].append(any(c.kind == "quote" for c in align(explanation, post)))
    return {kind: float(np.mean(values)) for kind, values in found.items()}


def false_alarms(count: int, seed: int = 0) -> float:
    """Share of quotes of a clause of *another* post that the aligner claims to have found in this one."""
    rng, claimed = random.Random(seed), 0
    for index in range(count):
        language = "zh" if index % 2 else "en"
        here, there = (quote(rng, "exact", language, 0.0) for _ in range(2))
        claimed += any(c.kind == "quote" and c.post_char for c in align(there.explanation, here.post))
    return claimed / count
