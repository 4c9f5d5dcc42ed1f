"""What a quotation claims: does it keep the polarity of what it quotes, and does it claim to quote the post at all?

Two rules of letters, for English and Chinese; neither understands a sentence.

* *Turned*: the post negates what is quoted and the quote does not, or the other way round. The post says "I do not want
  to die", the quote "want to die" (the word before it was left out), or "I do want to die" (a word inside it was). A
  question (想不想) is no negation, nor is "not only"; one letter of a negation may be wrong.
* *Term*: a title in 《》, or a few words that are named and not attributed: “自杀意念”的特征, so-called "rumination".
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from probes.citations.normalise import is_cjk, normalise
from probes.records import Span

_NEGATION = re.compile(
    r"(?:\b(?:not(?!\s+only\b)|never|no(?!\s+(?:wonder|doubt)\b)|cannot|without|neither|nor)\b"
    r"|\b(?:do|does|did|is|are|was|were|ca|could|wo|would|should|have|has|had|ai|need|must)n['’]?t\b"
    r"|没有|并非|并不|从不|从未|不再|不是|(?<![是有])没(?!关系|事|准)|(?<![是差忍对了怪说恨巴要得])不(?![但仅过管论禁得])"
    r"|别(?![人的处])|未(?![来必])|无(?![论])|非(?![常])|勿|莫|甭)",
    re.IGNORECASE,
)
# What may stand between a negation and what it negates; a verb of wishing or being able only before more than a word.
_BETWEEN = r"(?:(?:really|even|ever|always|just|very|so|too|that|at all|actually|any|a|an|the|再|太|很|怎么)\s*)?"
_WISH = r"(?:(?:(?:want|like|able|going|willing|trying)\s+to|想要?|要|会|能|敢|愿意?|肯)\s*)?"
_ADJACENT = re.compile(rf"\s*{_BETWEEN}$", re.IGNORECASE)
_WISHED = re.compile(rf"\s*{_BETWEEN}{_WISH}$", re.IGNORECASE)
# A word, or a character of a script without spaces.
_TOKEN = re.compile(r"[^\W\d_a-zA-Z]|[a-zA-Z]+(?:['’][a-zA-Z]+)*")
_DENIES = frozenset("不没别未无非勿莫甭")
# Words that a negated word is left as when it is affirmed, though one letter short of it.
_AFFIRMED = {"can", "do", "does", "did", "is", "are", "was", "were", "could", "will", "would", "should", "have", "has",
             "had", "need", "must", "now", "on", "so"}  # fmt: skip
_MAX_COMPARED = 300  # characters of a quote that is not exact
_LOOK = 40  # characters of a clause before a quote
_CLAUSE = re.compile(r"[。！？!?；;，,、\n.…]")

_MAX_TERM = (10, 5)  # CJK characters, words
_NAMED = re.compile(
    r"(?:所谓的?|称为|称之为|叫做|名为|归为|属于|符合|典型的"
    r"|so-called|called|termed|named|known as|labell?ed(?: as)?|classified as|form of|type of|kind of"
    r"|criteri(?:on|a) (?:of|for))\s*$",
    re.IGNORECASE,
)
_NOUN = re.compile(
    r"\s*(?:的?(?:思维|倾向|症状|量表|歪曲|扭曲|模式|障碍|问卷|标准|类型)"
    r"|(?:thinking|ideation|bias|distortions?|scales?|criteri(?:on|a)|patterns?|symptoms?|syndrome|disorders?|"
    r"questionnaire|inventory|category|label)\b)",
    re.IGNORECASE,
)
_SELF = re.compile(r"我|咱|\b(?:i|i['’]?m|me|my)\b", re.IGNORECASE)
_SAID = re.compile(
    r"(?:提到|提及|写|说|自述|声称|表示|表达|流露|例如|比如|诸如|如|原文|原话|语句|话语"
    r"|mention\w*|sa(?:ys?|id|ying)|stat(?:es?|ed|ing)|writ(?:es?|ing)|wrote|express\w*|describ\w*|such as|for example"
    r"|e\.g\.|phrases?|words?|quot\w*)",
    re.IGNORECASE,
)


def turned(quote: str, post: str, span: Span) -> bool:
    """Whether a quote has lost or gained a negation against the place of the post that it was found at."""
    a, b = span
    found = post[a:b]
    before = _CLAUSE.split(post[max(0, a - _LOOK) : a])[-1]
    if _negated(before, found) and not _begins_negated(quote):
        return True
    if normalise(quote).text == normalise(found).text or max(len(quote), len(found)) > _MAX_COMPARED:
        return False
    return _left_out(found, quote) or _left_out(quote, found)


def _begins_negated(quote: str) -> bool:
    match = _NEGATION.search(quote)
    return match is not None and not quote[: match.start()].strip("\"'“”‘’「」『』 ")


def _negated(before: str, found: str) -> bool:
    """Whether the last words of ``before`` negate what follows."""
    gap = _WISHED if len(_TOKEN.findall(found)) > (1 if found[:1].isascii() else 2) else _ADJACENT
    for match in _NEGATION.finditer(before):
        asked = match.start() > 0 and before[match.start() - 1] == found[:1]  # 想不想
        if gap.match(before, match.end()) and not asked:
            return True
    return False


def _left_out(negated: str, plain: str) -> bool:
    """Whether a negation of one text has nothing in the other that could be it.

    Where the two differ in nothing but negated words, words are compared. Where they differ elsewhere too, say in
    letters, a word may be a negation misspelled: then the other has to be liker without it.
    """
    ours, theirs = (list(_TOKEN.finditer(text)) for text in (negated, plain))
    words, others = ([_folded(match.group()) for match in found] for found in (ours, theirs))
    blocks = SequenceMatcher(None, words, others, autojunk=False).get_opcodes()
    missing, at_fault = [], set()
    for match in _NEGATION.finditer(negated):
        for at, token in enumerate(ours):
            inside = match.start() <= token.start() and token.end() <= match.end()
            if not inside or (len(token.group()) == 1 and token.group() not in _DENIES):
                continue  # of 没有 the first character denies
            block = next(block for block in blocks if block[1] <= at < block[2])
            kind, _, _, low, high = block
            if kind == "equal" or any(_spelled_alike(words[at], other) for other in others[low:high]):
                break
            if high > low and _NEGATION.search(plain, theirs[low].start(), theirs[high - 1].end()):
                break
            at_fault.add(block)
        else:
            missing.append(match)
    if all(block[0] == "equal" or block in at_fault for block in blocks):
        return bool(missing)
    here, whole = normalise(plain).text, _likeness(normalise(plain).text, normalise(negated).text)
    rest = (normalise(f"{negated[: match.start()]} {negated[match.end() :]}").text for match in missing)
    return any(text and _likeness(here, text) > whole + 1e-9 for text in rest)


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
    if _SAID.search(before):
        return False
    return bool(_NAMED.search(before) or _NOUN.match(explanation, b + 1))
