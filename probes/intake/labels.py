"""The label and the explanation of an answer, read by rule where nobody gives them."""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping

from probes.intake.denied import denied
from probes.models.encode import after_reasoning, inside_word, places_of
from probes.records import Span

_OPENING = " \t\r\n.,:;!?-–—*#|。，：；！？、>）)」』”\"'"  # what may stand between a label and its explanation

_ASKED = re.compile(r"[*_\"'”’」 ]{0,4}[?？]")
_MOST_PLACES = 8  # of a label, that are looked at for a denial
_BESIDE = 80  # characters before and after a word that say whether it states a label
_WRAPS, _CLOSES, _BULLETS = " \t\r\xa0\u3000*_`\"'“‘「『(（[【{<", "*_`\"'”’」』】>", " \t\r\xa0\u3000#>*-–•·|"
_STOPS = ".!。！ \t\r\n*_`\"'”’」』)）]}"
# What may stand between a label and the end of its clause.
_NAMED = re.compile(
    r"(?:[ \t]+(?:suicid\w+|self-harm))?(?:[ \t]+(?:risk|level|severity|label|class|category)\b)+"
    r"|[ \t]+(?:out of|of)[ \t]+\d+\b|的?(?:自杀)?(?:风险|程度|水平|等级|级别)|的(?=[，。,.\n]|$)"
)
_ENDS = re.compile(
    r"[ \t\r]*(?:$|[\n!?;:。！？；：…)）\]}|]|\.(?!\w)|——|因为)|[ \t]+[-–—(（/]"
    r"|[ \t]*[,，]?[ \t]*(?:\b(?:because|since|given|due to|as (?:he|she|they|the|it|there|this)|but|or|nor|so"
    r"|rather than)\b|因为|因此|但|或)"
)
_PAUSES = re.compile(r"[ \t]*[,，、]|[ \t]+and (?:he|she|they|the|it|there|i|this)\b")
_NEGATED = re.compile(r"(?:\b(?:not|never|neither|non|no longer|cannot)|n['’]?t|不|非|并非|没有)[\s-]*$")
_VERY = (
    r"(?:\s*(?:\b(?:a|an|the|very|clearly|rather|quite|likely|probably|also|still)\b|很|较|比较|非常|极|偏|相对))*\s*$"
)
_OPENS = re.compile(r"(?:[.!?。！？;；…:：=|→>]|(?:^|\s)[-–—])$")
_SUBJECT = re.compile(
    r"(?:\b(?:answer|label|class(?:ification)?|category|risk|level|score|rating|verdict|conclusion|severity|choice|option"
    r"|prediction|result|it|this|that)\b[^.!?,，。]{0,30}\b(?:is|was|be|as|seems|appears)"
    r"|\b(?:wait|correction|on second thoughts?|on reflection)\b[,，:]?(?:\s*actually)?[,，]?"
    r"|(?:答案|标签|结论|判断|分类|类别|结果|风险|程度|等级|级别|可能性)[是为為]?)" + _VERY
)
_INTRODUCES = re.compile(
    r"(?:\b(?:is|are|was|were|be|as|but|or|nor|say|choose|pick|select|with|rated?|label(?:led)?|answer|level|risk|class"
    r"|category|score|grade|stage|therefore|thus|hence|overall)[,，]?"
    r"|(?:是|(?<!因)为|為|属于|归于|选择?|体现了?|表现出|患有|存在|呈现|即|但|或|因此|所以|综上)[，,]?)" + _VERY
)
# Words that end many a sentence which states no label.
_COMMON = frozenset((
    "yes", "no", "none", "not", "nothing", "high", "low", "medium", "moderate", "mild", "severe", "good", "bad", "true",
    "false", "other", "normal", "any", "all", "some",
))  # fmt: skip
_SENTENCE = re.compile(
    r"[!?。！？;；\n]+|\.+(?=\s|$)|([,，]\s*(?:(?:and )?(?:so|thus|hence|therefore)\b|因此|所以|故|从而|由此|综上))"
)
_HEADING = re.compile(r"(?:^|(?<=[\n.!?。！？]))[^\n.!?。！？]{0,40}[:：]$|```\w*$")
# A letter or number that counts off a list, not a label of that name; one that counts off before a label.
_COUNTS = re.compile(r"[.)、）:：][ \t]*\S")
_COUNTED = re.compile(r"^(?:\w{1,2}[.)、）:：][ \t]*)?$")
# How likely a label is, in numbers: behind its name as a list has it, or beside it.
_WEIGHED = re.compile(
    r"[*_`\"'”’」』】]*[ \t]*(?:(?P<list>[:：=|])|[-–—(（])[*_`\"'“ \t]*\d+(?:[.,]\d+)?[ \t]*"
    r"(?:[%％‰]|/[ \t]*\d|[,，;；})）\]|\n]|\.?[ \t]*$)"
)
# What makes the digits behind it, or before it, a part of another number.
_NUMBER_BEFORE = re.compile(r"(?:\d|\d[.,:/٫٬–~～-]|(?<!\w)[-−.])$")
_NUMBER_AFTER = re.compile(r"\d|[.,:/٫٬–~～-]\d|[\s'’]\d{3}(?!\d)|\s?[%％‰]")


def read_label(answer: str, candidates: Mapping[str, str]) -> tuple[str | None, Span | None]:
    """The one candidate that an answer states, and where.

    The rule: after the reasoning, the candidate whose sentence stands in the first line that is not empty, else in all
    of the answer; where no sentence does, whose key does. Case and the last punctuation do not count. A text of one
    word counts only where it is stated (``states``). Several are none: a rule cannot tell "not high but low" from its
    opposite. Nor is one that is denied or doubted anywhere in those lines (``denied``), or asked for where it stands
    first, or stated more often than is looked at; it does not make another one the answer either. Where the rest of the
    answer states another one as well, in a clause of its own, or where labels are weighed ("high: 0.1, low: 0.9"), an
    answer goes through them one by one: none.

    Returns:
        key and span in ``answer``; (None, None) where no candidate or several are stated, or one is denied.
    """
    begin = after_reasoning(answer)
    line = _first_line(answer, begin)
    scopes = [(begin, len(answer))] if line is None else [line, (begin, len(answer))]
    keys = {key: key for key in candidates}
    for wanted, scope in itertools.product((candidates, keys), scopes):
        found = _stated(answer, wanted, scope)
        if not found:
            continue
        # A sentence further down, and the key of another label stated in the first line, contradict each other.
        ahead = _stated(answer, keys, scopes[0]) if wanted is candidates and scope is not scopes[0] else {}
        if len(found | ahead) > 1:
            return None, None
        ((key, places),) = found.items()
        asked = _ASKED.match(answer, places[0][1])
        if asked or len(places) > _MOST_PLACES or any(denied(answer, place) for place in places):
            return None, None
        if _weighed(answer, places[0], begin, candidates) or _goes_on(answer, key, begin, candidates):
            return None, None
        return key, places[0]
    return None, None


def _weighed(answer: str, place: Span, begin: int, candidates: Mapping[str, str]) -> bool:
    """Whether the label there has a number for its likelihood. In brackets one label may have it: "High (90 %)"."""
    found = _WEIGHED.match(answer, place[1])
    if found is None or found["list"]:
        return found is not None
    whole = (begin, len(answer))
    weighed = (
        key
        for key, text in candidates.items()
        if any(_WEIGHED.match(answer, at[1]) for name in {key, text} for at in _places(answer, name, whole))
    )
    return len(set(itertools.islice(weighed, 2))) > 1


def _goes_on(answer: str, key: str, begin: int, candidates: Mapping[str, str]) -> bool:
    """Whether another label than ``key`` is stated, and not denied, in a clause of its own anywhere in the answer."""
    whole = (begin, len(answer))
    for wanted in (candidates, {name: name for name in candidates}):
        for other, places in _stated(answer, wanted, whole).items():
            if other != key and any(_own_clause(answer, p) and not denied(answer, p) for p in places):
                return True
    return False


def _own_clause(answer: str, place: Span) -> bool:
    """Whether a label stands where a line, a sentence or an answer begins; not as the first words of a quote, and not
    as the number of an item."""
    raw = answer[max(0, place[0] - _BESIDE) : place[0]]
    raw = raw[raw.rfind("\n") + 1 :].lower()
    before = raw.rstrip(_WRAPS)
    opened = not before.strip(_BULLETS)
    if opened and place[1] - place[0] == 1 and _COUNTS.match(answer, place[1]):
        return False
    quoted = raw.rstrip(" \t")[len(before) :]
    if not opened and any(mark in quoted for mark in "\"'“‘「『"):
        return False
    return bool(opened or _COUNTED.match(before.lstrip(_BULLETS)) or _OPENS.search(before) or _SUBJECT.search(before))


def _stated(answer: str, wanted: Mapping[str, str], scope: Span) -> dict[str, list[Span]]:
    """The first places in which each text is stated. One inside another's is none: "risk" in "no risk"."""
    found = {}
    for key, text in wanted.items():
        places, one_word = _places(answer, text, scope), _one_word(text)
        found[key] = list(itertools.islice((p for p in places if not one_word or states(answer, p)), _MOST_PLACES + 1))
    inner, end = set(), -1
    for place in sorted({one for places in found.values() for one in places}, key=lambda one: (one[0], -one[1])):
        if place[1] <= end:
            inner.add(place)
        end = max(end, place[1])
    outer = {key: [place for place in places if place not in inner] for key, places in found.items()}
    return {key: places for key, places in outer.items() if places}


def _one_word(text: str) -> bool:
    """Whether a text is one word, or one or two characters of a script without spaces."""
    kept = [char for char in text if char.isalnum()]
    if any(unicodedata.east_asian_width(char) in "WF" and not char.isascii() for char in kept):
        return len(kept) <= 2
    return len(text.split()) == 1


def states(answer: str, place: Span) -> bool:
    """Whether one word of an answer states a label there, by what stands beside it in its line: it is a clause of its
    own ("High. The author", "Answer: high"), or ends one behind words that introduce a label ("the risk is high")."""
    before = answer[max(0, place[0] - _BESIDE) : place[0]]
    word = answer[slice(*place)].lower()
    before = before[before.rfind("\n") + 1 :].lower().rstrip(_WRAPS)
    after = answer[place[1] : place[1] + _BESIDE].lower().lstrip(_CLOSES)
    after = after[named.end() :].lstrip(_CLOSES) if (named := _NAMED.match(after)) else after
    firm = _ENDS.match(after) is not None
    if not firm and not _PAUSES.match(after):
        return False
    before = _NEGATED.sub("", before).rstrip(_WRAPS)
    if not before.strip(_BULLETS) or _OPENS.search(before) or _SUBJECT.search(before):
        return True
    if not firm:
        return False
    return _INTRODUCES.search(before) is not None or (
        len(word) > 1 and word.isalpha() and word not in _COMMON and word[0] < "\u2e80" and not after.strip(_STOPS)
    )


def _first_line(text: str, begin: int) -> Span | None:
    """The first line that is not empty."""
    while begin < len(text):
        end = text.find("\n", begin)
        end = len(text) if end < 0 else end
        if text[begin:end].strip():
            return begin, end
        begin = end + 1
    return None


def find_label(answer: str, text: str, scope: Span) -> Span | None:
    """The first place of a label's text in ``answer[scope]`` that is not inside a longer word or number; in any case.
    Of one word, the first that states it, if one does."""
    first = next(_places(answer, text, scope), None)
    if first is None or not _one_word(text):
        return first
    return next((place for place in _places(answer, text, scope) if states(answer, place)), first)


def find_text(answer: str, text: str) -> Span | None:
    """As ``find_label``, letter for letter: behind the reasoning, else before its end."""
    begin, first, one_word = after_reasoning(answer), None, _one_word(text)
    for start, part in ((begin, answer[begin:]), (0, answer[: begin + len(text) - 1])):
        if not text.strip() or text not in part:
            continue
        for at in places_of(text, part):
            place = start + at, start + at + len(text)
            if inside_word(answer, *place) or _inside_number(answer, *place):
                continue
            first = first or place
            if not one_word or states(answer, place):
                return place
        if first:
            return first
    return None


def _places(answer: str, text: str, scope: Span) -> Iterator[Span]:
    """Every place, with the text's last punctuation; where it has none with it, without."""
    end = len(text)
    while end and unicodedata.category(text[end - 1]).startswith("P"):
        end -= 1
    said = _one_case(answer[scope[0] : scope[1]])
    for part in dict.fromkeys((text, text[:end])):
        wanted, found = _one_case(part), False
        if not part.strip() or wanted not in said:
            continue
        for at in places_of(wanted, said):
            span = scope[0] + at, scope[0] + at + len(part)
            if not inside_word(answer, *span) and not _inside_number(answer, *span):
                found = True
                yield span
        if found:
            return


def _inside_number(text: str, start: int, end: int) -> bool:
    """Whether the digits that ``text[start:end]`` begins or ends with go on: 1 in 1.5, 10, 1,000, 1/2 or -1."""
    before = text[start].isdigit() and _NUMBER_BEFORE.search(text[max(0, start - 3) : start])
    return bool(before or (text[end - 1].isdigit() and _NUMBER_AFTER.match(text, end)))


@functools.lru_cache(maxsize=4)  # of an answer every candidate is looked for
def _one_case(text: str) -> str:
    """In lower case, every character at its place."""
    return text.lower() if text.isascii() else "".join(low if len(low := c.lower()) == 1 else c for c in text)


def read_explanation(answer: str, label: Span | None) -> str | None:
    """What follows the label; where nothing does, what stands before the sentence that states it, after the reasoning.
    None without a label, and where there is not a word of it."""
    if label is None:
        return None
    named = _NAMED.match(answer[label[1] : label[1] + _BESIDE].lower())
    after = answer[label[1] + (named.end() if named else 0) :].lstrip(_OPENING).rstrip()
    before = answer[after_reasoning(answer) : label[0]]
    ends = [match.end() if match[1] is None else match.start() for match in _SENTENCE.finditer(before)]
    before = _HEADING.sub("", before[: ends[-1] if ends else 0].rstrip(" \t\r\n*_#")).strip()
    found = after if any(char.isalnum() for char in after) else before
    return found if sum(char.isalnum() for char in found) > 1 else None
