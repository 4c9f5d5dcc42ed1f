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
    "lately the kettle hums while rain taps windows buses pass my street slow grey rows before morning somebody "
    "answers letters pile beside unopened parcels and dinner stays cold until neighbours knock asking whether "
    "everything helps"
)
# Neither holds a negation: to change one is another kind of corruption (``polarity``).
_EN = _LINE.split()
# Who, a negation, what stands in its place where the clause is affirmed, and what is denied.
_DENIED = {
    "zh": (("我", "不想", "想", "再去上班"), ("晚上", "没有", "有", "胃口吃饭"),
           ("他们", "从不", "都", "接我的电话"),
           ("朋友", "别", "快", "来打扰我"), ("我", "很难", "容易", "相信身边的人"), ("她", "拒绝", "愿意", "去看医生"),
           ("我", "无法", "可以", "集中精神做事"), ("这里", "没人", "有人", "在意我的死活"),
           ("我", "很少", "经常", "跟家里联系"),
           ("我", "不觉得", "觉得", "自己值得被爱"), ("我", "难以", "能够", "原谅当年的自己"),
           ("弟弟", "从来不", "总是", "听我说话"),
           ("我", "并没有", "已经", "放弃治疗"), ("我", "再也不", "还是", "期待明天")),
    "en": (("I", "do not", "do", "want to see anyone"), ("she", "never", "often", "answers my calls"),
           ("there is", "no", "some", "reason to get up"), ("we", "can't", "can", "sleep at night"),
           ("I", "hardly", "usually", "sleep before sunrise"), ("he", "rarely", "often", "visits his daughter"),
           ("today", "nobody", "somebody", "asked how it went"), ("at home", "nothing", "something", "cheers her up"),
           ("so", "none of", "all of", "our neighbours came"), ("I", "refuse to", "want to", "see the doctor"),
           ("I", "failed to", "managed to", "finish the course"), ("I am", "unable to", "able to", "leave the house"),
           ("I", "stopped", "started", "answering the phone"), ("I can", "no longer", "still", "face my family"),
           ("we", "don't believe", "believe", "that anybody cares"), ("he came", "without", "with", "any hope left")),
}  # fmt: skip
# Words that negate the same word by a prefix or an ending.
_MADE = (("I feel unsafe around him", "I feel safe around him"),
         ("she was unhappy at school", "she was happy at school"),
         ("my days are meaningless now", "my days are meaningful now"),
         ("they dislike my cooking", "they like my cooking"),
         ("I was powerless that night", "I was powerful that night"))  # fmt: skip
_TERMS = {
    "zh": (("属于“{}”", ("非黑即白", "情绪推理", "自杀意念")), ("“{}”的思维模式", ("灾难化", "读心术", "反刍")),
           ("符合《{}》的标准", ("贝克抑郁量表", "抑郁自评问卷", "精神障碍诊断手册")),
           ("正如《{}》所写", ("活着", "皮囊")),
           ("出现“{}”现象", ("贴标签", "过度概括")), ("是一种「{}」陈述", ("应该", "绝对化")),
           ("心理学上的『{}』", ("反刍", "投射")),
           ("存在“{}”", ("习得性无助", "完美主义")), ("与“{}”的认知歪曲一致", ("全或无", "选择性注意"))),
    "en": (('a form of "{}"', ("emotional reasoning", "mind reading", "passive ideation")),
           ('the "{}" pattern', ("all or nothing", "rumination", "learned helplessness")),
           ("classified as '{}'", ("labelling", "magnification", "avoidance")),
           ("an example of “{}”", ("catastrophizing", "fortune telling")),
           ('the concept of "{}"', ("burnout", "grief")),
           ('consistent with "{}"', ("major depression", "anhedonia")),
           ("the term «{}» fits", ("burnout", "labelling")),
           ('signs of the "{}" effect', ("spiral of silence", "contagion")), ('some "{}"', ("mind-reading bias",))),
}  # fmt: skip
_SAID = {
    "zh": (
        "帖子写道“{}”",
        "用户用“{}”来形容自己",
        "“{}”这句话",
        "使用了「{}」一词",
        "作者自称“{}”",
        "文中的“{}”",
        "例如“{}”",
    ),
    "en": (
        'They wrote "{}"',
        'the word "{}" is used',
        'the author calls himself "{}"',
        'as seen in "{}"',
        "mentions '{}'",
    ),
}
# Marks around a quote, a quote within it, and an elision.
_MARKS = ("“{}”", '"{}"', "「{}」", "『{}』", "＂{}＂", "｢{}｣", "〝{}〞", "‘{}’", "„{}“", "«{}»", "‹{}›", "`{}`")
_INNER = ("‘{}’", "「{}」", "『{}』", "({})", "“{}”")
_ELISIONS = ("…", "……", "...", " [...] ", "（……）", "。。。")
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
    """Quotes of a clause that the post denies, or affirms; a third of the posts in traditional characters.

    Returns:
        ``kept``: share of right quotes that are found in the post; ``left out``, ``put in``: share of quotes without
        the post's negation (the word taken out, replaced, elided, or the quote begun behind it; unhappy quoted as
        happy), or with one it has not, that are not.
    """
    rng = random.Random(seed)
    found: dict[str, list[bool]] = {"kept": [], "left out": [], "put in": []}
    for index in range(count):
        language = "zh" if index % 2 else "en"
        joint = "" if language == "zh" else " "
        who, no, yes, what = rng.choice(_DENIED[language])
        around = [quote(rng, "exact", language, 0.0).post for _ in range(2)]
        denied, affirmed = joint.join((who, no, what)), joint.join((who, yes, what))
        unmade, made = rng.choice(_MADE)
        for kind, said, quoted in (
            ("kept", denied, denied), ("kept", affirmed, affirmed), ("kept", denied, joint.join((no, what))),
            ("kept", unmade, unmade), ("kept", made, made),
            ("left out", denied, joint.join((who, what))), ("left out", denied, affirmed), ("left out", denied, what),
            ("left out", denied, f"{who}{rng.choice(_ELISIONS)}{what}"), ("left out", unmade, made),
            ("put in", affirmed, denied), ("put in", made, unmade),
        ):  # fmt: skip
            said = "".join(_TRADITIONAL.get(char, char) for char in said) if index % 6 == 1 else said
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
        said = rng.choice(_SAID[language]).format(name) + ("。" if language == "zh" else ".")
        for kind, explanation in (("named", told), ("invented", said)):
            found[kind].append(any(c.kind == "quote" for c in align(explanation, post)))
    return {kind: float(np.mean(values)) for kind, values in found.items()}


def marks(count: int, seed: int = 0) -> dict[str, float]:
    """Quotes of two clauses between marks of every kind.

    Returns:
        mean F1 of their characters, found as a quote: ``plain``; ``nested`` (a word of them between other marks);
        ``elided`` (what stands between two words left out, of which nothing need be found); ``wide`` (punctuation and
        spaces of another width).
    """
    rng = random.Random(seed)
    found: dict[str, list[float]] = {"plain": [], "nested": [], "elided": [], "wide": []}
    for index in range(count):
        language = "zh" if index % 2 else "en"
        one = quote(rng, "exact", language, 0.0)
        a, b = one.span
        text, size = one.post[a:b], 6 if language == "zh" else 2
        words = list(text) if language == "zh" else text.split(" ")
        joint, outer = "" if language == "zh" else " ", rng.choice(_MARKS)
        head, inner, tail = (joint.join(part) for part in (words[:2], words[2:-2], words[-2:]))
        wrapped = rng.choice([one for one in _INNER if not set(one) & set(outer) - set("{}")]).format(inner)
        front, back = text[: len(joint.join(words[: len(words) // 2]))], joint.join(words[-len(words) // 2 :])
        for kind, said, parts in (
            ("plain", text, [text]), ("nested", joint.join(one for one in (head, wrapped, tail) if one), [text]),
            ("elided", f"{front}{rng.choice(_ELISIONS)}{back}", [front, back]),
            ("wide", f"{text.replace(' ', chr(0x3000))}{rng.choice('，。！,.!')}", [text]),
        ):  # fmt: skip
            if kind == "nested" and len(inner) < size:
                continue
            citations = align(
                f"帖子提到{outer.format(said)}。" if joint == "" else f"They wrote {outer.format(said)}.", one.post
            )
            truth, seen = np.zeros(len(one.post), bool), np.zeros(len(one.post), bool)
            for part in parts:
                at = one.post.index(part, a, b)
                truth[at : at + len(part)] = True
            for c in citations:
                for x, y in c.post_char if c.kind == "quote" else ():
                    seen[x:y] = True
            found[kind].append(2 * float((truth & seen).sum()) / float(truth.sum() + seen.sum()))
    return {kind: float(np.mean(values)) for kind, values in found.items()}


def false_alarms(count: int, seed: int = 0) -> float:
    """Share of quotes of a clause of *another* post that the aligner claims to have found in this one."""
    rng, claimed = random.Random(seed), 0
    for index in range(count):
        language = "zh" if index % 2 else "en"
        here, there = (quote(rng, "exact", language, 0.0) for _ in range(2))
        claimed += any(c.kind == "quote" and c.post_char for c in align(there.explanation, here.post))
    return claimed / count
