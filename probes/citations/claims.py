"""What a quotation claims: does it keep the polarity of what it quotes, and does it claim to quote the post at all?

Two rules of letters, for English and Chinese; neither understands a sentence.

* *Turned*: the post negates what is quoted and the quote does not, or the other way round. The post says "I do not want
  to die", the quote "want to die" (the word before it was left out), or "I do want to die" (a word inside it was). As
  negations count: not, no, never and their contractions; nobody, nothing, none, nowhere, without; words that nearly
  negate (hardly, rarely, 很少); verbs that negate what they govern (refuse to, fail to, stop doing, unable to, 拒绝,
  无法); and words made of one another by un-, dis-, -less against -ful. What one claims not to think, believe or feel
  is denied with it. A question (想不想) is no negation, nor is "not only"; one letter of a negation may be wrong.
* *Term*: a title in 《》, or a few words that are named and not attributed: “自杀意念”的特征, so-called "rumination".
"""

from __future__ import annotations

import re
import unicodedata
from difflib import SequenceMatcher

from probes.citations.normalise import SIMPLER, is_cjk, normalise
from probes.records import Span

NEGATION = re.compile(
    r"(?:\b(?:not(?!\s+(?:only|just|merely|simply)\b)|never|no(?!\s+(?:wonder|doubt|matter)\b)|cannot|without|neither"
    r"|nor|none|nobody|nothing(?!\s+but\b)|nowhere|hardly|barely|scarcely|rarely|seldom)\b"
    r"|\b(?:do|does|did|is|are|was|were|ca|could|wo|would|should|have|has|had|ai|need|must)n['’]?t\b"
    r"|没有|并非|并不|从不|从未|不再|不是|(?<![是有])没(?!关系|事|准)|(?<![是差忍对了怪说恨巴要得])不(?![但仅过管论禁得])"
    r"|别(?![人的处])|未(?![来必])|无(?![论])|非(?![常])|勿|莫|甭|[很极甚]少(?!数))",
    re.IGNORECASE,
)
# Verbs and adjectives that negate what they govern; denied themselves ("can't stop crying"), they do not.
_DENYING = re.compile(
    r"(?:\b(?:unable|refus(?:e|es|ed|ing)|fail(?:s|ed|ing)?)(?=\s+to\b)"
    r"|\b(?:stop(?:s|ped|ping)?|quit|avoid(?:s|ed|ing)?)(?=\s+[a-z]+ing\b)|拒绝|难以|很难)",
    re.IGNORECASE,
)
# Those that take a noun: it may be quoted alone ("lost my job"), but not with the contrary in their place.
_LACKING = re.compile(
    r"(?:\black(?:s|ed|ing)?\b|(?:(?<=\bis )|(?<=\bwas )|(?<=\bhas )|(?<=\bhad )|(?<=\bhave ))little\b"
    r"|\bfar\s+from\b|失去|缺乏|缺少|丧失)",
    re.IGNORECASE,
)
# What may stand between a negation and what it negates; a verb of wishing, being able or believing only before more
# than a word.
_BETWEEN = (
    r"(?:(?:really|even|ever|always|just|very|so|too|that|at all|actually|any|a|an|the|of|to|longer|more|one|once"
    r"|my|been|再|太|很|怎么|人|曾|法|能)\s*){0,3}"
)
_WISH = (
    r"(?:(?:(?:want|like|able|going|willing|trying)\s+to|(?:think|believe|feel|say|mean|claim)(?:\s+(?:that|like))?"
    r"|想要?|要|会|能|敢|愿意?|肯|觉得|认为|相信|感觉|以为)\s*)?"
)
_BELIEF = re.compile("觉得|认为|相信|感觉|以为|愿意")
_ADJACENT = re.compile(rf"\s*{_BETWEEN}$", re.IGNORECASE)
_WISHED = re.compile(rf"\s*{_BETWEEN}{_WISH}{_BETWEEN}$", re.IGNORECASE)
_PREFIXES = ("un", "dis", "non", "in", "im", "ir")  # of a word of at least four letters more
_SHORTEST = 4
# A word, or a character of a script without spaces.
_TOKEN = re.compile(r"[^\W\d_a-zA-Z]|[a-zA-Z]+(?:['’][a-zA-Z]+)*")
_DENIES = frozenset("不没别未无非勿莫甭")
_ALL = (NEGATION, _DENYING, _LACKING)
_FEW = 4  # words exchanged for one another that are compared for being contrary
# Words that a negated word is left as when it is affirmed, though one letter short of it.
_AFFIRMED = {"can", "do", "does", "did", "is", "are", "was", "were", "could", "will", "would", "should", "have", "has",
             "had", "need", "must", "now", "on", "so", "one", "ever", "or", "either"}  # fmt: skip
_MAX_COMPARED = 300  # characters of a quote that is not exact
_LOOK = 40  # characters of a clause before a quote
_CLAUSE = re.compile(r"[。！？!?；;，,、\n.…]")

_MAX_TERM = (10, 5)  # CJK characters, words
# What names: before the marks, after them, or as the last word between them. The nouns are of kinds of thing.
_NOUN_ZH = (
    "思维|认知|推理|倾向|症状|量表|歪曲|扭曲|模式|障碍|问卷|标准|类型|现象|错误|谬误|陈述|特质|特征|效应|偏差|偏见|理论|概念|机制|综合征|意念"
    "|信念|主义|行为|诊断|人格|风格|概括|症"
)
_NOUN_EN = (
    r"(?:thinking|ideations?|bias(?:es)?|distortions?|scales?|criteri(?:on|a)|patterns?|symptoms?|syndromes?|disorders?"
    r"|questionnaires?|inventor(?:y|ies)|categor(?:y|ies)|labels?|errors?|fallac(?:y|ies)|effects?|phenomen(?:on|a)"
    r"|theor(?:y|ies)|concepts?|triads?|mindsets?|styles?|reasoning|schemas?|traits?|tendenc(?:y|ies)|mechanisms?"
    r"|diagnos[ei]s|episodes?|behaviou?rs?|statements?|filters?|helplessness)"
)
_NAMED = re.compile(
    rf"(?:所谓的?|称为|称之为|称作|叫做?|名为|归为|归类为|归入|归于|属于|符合|典型的?|即|心理学[上中里]的?|参考|是一种|存在|表现出"
    rf"|so-called|called|calls?|termed|named|known as|referred to as|labell?ed(?: as)?|classified as|categori[sz]ed as"
    rf"|diagnosed (?:as|with)|consistent with|classic|typical|the term|"
    rf"\b(?:forms?|types?|kinds?|cases?|examples?|instances?|notion|idea|definition|{_NOUN_EN}) (?:of|for)"
    rf"|\b(?:the|a|an|this) (?:[a-z]+ )?{_NOUN_EN}"
    rf"|\b(?:book|novel|film|movie|song|album|poem|scale))\s*$",
    re.IGNORECASE,
)
_NOUN = re.compile(rf"\s*(?:式的|[的式]?(?:{_NOUN_ZH})|(?:[a-z]+ )?{_NOUN_EN}\b)", re.IGNORECASE)
_KIND = re.compile(rf"(?:{_NOUN_ZH}|\b{_NOUN_EN})[.,。，]?$", re.IGNORECASE)
_SELF = re.compile(r"(?<!自)我|咱|\b(?:i|i['’]?m|me|my)\b", re.IGNORECASE)
_SAID = re.compile(
    r"(?:提到|提及|写|说|自述|自称|声称|表示|表达|流露|例如|比如|诸如|如|原文|原话|原句|文中|帖子[里中]|语句|话语|引用|形容|使用|[用以]$"
    r"|mention\w*|sa(?:ys?|id|ying)|stat(?:es?|ed|ing)|writ(?:es?|ing)|wrote|express\w*|describ\w*|such as|for example"
    r"|e\.g\.|phrases?|words?|quot\w*|seen in|the line|(?:calls?|called|calling) (?:him|her|them|my|it)sel(?:f|ves))",
    re.IGNORECASE,
)
_SAID_AFTER = re.compile(
    r"\s*(?:[这那]?[句些]?|一)?的?(?:话|词|句|字眼|表述|说法|想法|念头|描述|言论|感受|感觉|文字|语句|表达)"
)


def turned(quote: str, post: str, span: Span) -> bool:
    """Whether a quote has lost or gained a negation against the place of the post that it was found at."""
    a, b = span
    quote, before = simplified(quote), _CLAUSE.split(simplified(post[max(0, a - _LOOK) : a]))[-1]
    before, found = _apart(before, simplified(post[a:b]))
    quote, found = _lettered(quote), _lettered(found)
    if _negated(before, found) and not _begins_negated(quote):
        return True
    if normalise(quote).text == normalise(found).text or max(len(quote), len(found)) > _MAX_COMPARED:
        return False
    return _left_out(found, quote) or _left_out(quote, found)


def _apart(before: str, found: str) -> tuple[str, str]:
    """The two with a word that their border cuts in two, a negation or what may follow one, wholly in the second."""
    text, border = before + found[:_LOOK], len(before)
    cut = [m.start() for p in (*_ALL, _BELIEF) for m in p.finditer(text) if m.start() < border < m.end()]
    border = min(cut, default=border)
    return before[:border], before[border:] + found


def simplified(text: str) -> str:
    """Letters in their usual width and the simplified script, one for one."""
    return "".join(SIMPLER.get(c, c) if c > "\x7f" and not "！" <= c <= "～" else _narrow(c) for c in text)


def _lettered(text: str) -> str:
    """Without emoji and invisible characters, which may stand in the middle of a negation."""
    return "".join(char for char in text if char < "\x7f" or unicodedata.category(char) not in ("So", "Sk", "Cf", "Mn"))


def _narrow(char: str) -> str:
    return chr(ord(char) - 0xFEE0) if "！" <= char <= "～" and char not in "，！？；：" else char


def _begins_negated(quote: str) -> bool:
    match = NEGATION.search(quote)
    return match is not None and not quote[: match.start()].strip("\"'“”‘’「」『』 ")


def _negated(before: str, found: str) -> bool:
    """Whether the last words of ``before`` negate what follows."""
    gap = _WISHED if len(_TOKEN.findall(found)) > (1 if found[:1].isascii() else 2) else _ADJACENT
    for match in NEGATION.finditer(before):
        asked = match.end() == len(before) and before[: match.start()].endswith(found[:1])  # 想不想
        if gap.match(before, match.end()) and not asked:
            return True
    return any(
        gap.match(before, match.end()) and not _negated(before[: match.start()], match.group())
        for match in _DENYING.finditer(before + found)
        if match.end() <= len(before)
    )


def _left_out(negated: str, plain: str) -> bool:
    """Whether a negation of one text has nothing in the other that could be it.

    Where the two differ in nothing but negated words, words are compared. Where they differ elsewhere too, say in
    letters, a word may be a negation misspelled: then the other has to be liker without it.
    """
    ours, theirs = (list(_TOKEN.finditer(text)) for text in (negated, plain))
    words, others = ([_folded(match.group()) for match in found] for found in (ours, theirs))
    blocks = SequenceMatcher(None, words, others, autojunk=False).get_opcodes()
    if any(
        _contrary(word, other)
        for kind, a, b, low, high in blocks
        if kind == "replace" and b - a <= _FEW and high - low <= _FEW
        for word in words[a:b]
        for other in others[low:high]
    ):
        return True
    missing, at_fault = [], set()
    for match in sorted((m for p in _ALL for m in p.finditer(negated)), key=lambda m: m.start()):
        for at, token in enumerate(ours):
            inside = match.start() <= token.start() and token.end() <= match.end()
            if not inside or (len(token.group()) == 1 and not _denies(token.group(), match.group())):
                continue  # of 没有 the first character denies
            block = next(block for block in blocks if block[1] <= at < block[2])
            kind, _, _, low, high = block
            if kind == "equal" or any(_spelled_alike(words[at], other) for other in others[low:high]):
                break
            if high > low and any(p.search(plain, theirs[low].start(), theirs[high - 1].end()) for p in _ALL):
                break
            at_fault.add(block)
        else:
            missing.append(match)
    if all(block[0] == "equal" or block in at_fault for block in blocks):
        return bool(missing)
    here, whole = normalise(plain).text, _likeness(normalise(plain).text, normalise(negated).text)
    rest = (normalise(f"{negated[: match.start()]} {negated[match.end() :]}").text for match in missing)
    return any(text and _likeness(here, text) > whole + 1e-9 for text in rest)


def _denies(char: str, negation: str) -> bool:
    return char in _DENIES if any(one in _DENIES for one in negation) else True


def _contrary(word: str, other: str) -> bool:
    """Whether one word is the other with a negating prefix, or ends in -less where it ends in -ful or not at all."""
    for one, two in ((word, other), (other, word)):
        if len(two) >= _SHORTEST and any(one == prefix + two for prefix in _PREFIXES):
            return True
        stem = one.removesuffix("less")
        if stem != one and len(stem) >= _SHORTEST - 1 and two in (stem, f"{stem}ful"):
            return True
    return False


def _likeness(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b, autojunk=False).ratio()


def _folded(word: str) -> str:
    return word.casefold().replace("'", "").replace("’", "")


def _spelled_alike(word: str, other: str) -> bool:
    """Whether one letter more, less or other makes a word of three letters or more the other."""
    if len(word) < 3 or other in _AFFIRMED or abs(len(word) - len(other)) > 1:
        return False
    same = sum(block.size for block in SequenceMatcher(None, word, other, autojunk=False).get_matching_blocks())
    return same >= max(len(word), len(other)) - 1


def term(explanation: str, span: Span) -> bool:
    """Whether the text between quotation marks, which the post does not hold, does not claim to be of the post."""
    a, b = span
    if explanation[a - 1 : a] in ("《", "〈"):
        return True
    inside = explanation[a:b]
    cjk = sum(map(is_cjk, inside))
    words = len(re.findall(r"[^\W\d_]+", inside)) if not cjk else 0
    if cjk > _MAX_TERM[0] or words > _MAX_TERM[1] or _CLAUSE.search(inside.strip(".,")) or _SELF.search(inside):
        return False
    before = _CLAUSE.split(explanation[max(0, a - 1 - _LOOK) : a - 1])[-1]
    if _SAID.search(before) or _SAID_AFTER.match(explanation, b + 1):
        return False
    return bool(_NAMED.search(before) or _NOUN.match(explanation, b + 1) or _KIND.search(inside.strip()))
