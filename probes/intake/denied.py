"""Does an answer deny or doubt the label that it names? A rule of letters for English and Chinese, as
``probes.citations.claims`` is one. In doubt a label counts as denied: that one is not read is seen, that one is misread
is not."""

from __future__ import annotations

import re

from probes.citations.claims import NEGATION, simplified
from probes.records import Span

_LOOK = 400  # characters before a label
_FAR = 24  # two for each Chinese character and three for each word between a denial and the label
_BEHIND = 60  # characters after a label
# Beside the negations of a quote (``NEGATION``): what denies or doubts a label.
_DENIES = re.compile(
    r"\b(?:cannot|non|neither|nor|unlikely|improbable|doubt\w*|un(?:clear|sure|certain|true)|whether|unless|false"
    r"|(?:in)?sufficient|lack\w*|absen(?:ce|t)|free|den(?:y|ies|ied)|reject\w*|exclud\w*|contradict\w*|wrong|incorrect"
    r"|(?:do|does|did|is|are|was|were|ca|could|wo|would|should|have|has|had|ai|need|must)n[^\w\s]?t"
    r"|ruled? out|rul(?:es|ing) out|(?:anything|all) but|far from|short of|(?:rather|less|other) than|instead of"
    r"|(?<!a )(?:little|few|minimal|scant|weak|slight) (?:\w+ )?(?:evidence|signs?|indications?|symptoms?|reasons?"
    r"|basis|proof|support|suggests?|points?|chance|for)"
    r"|(?:fail|refuse|hesitate)\w* to|opposite of|contrary (?:of|to)|if)\b"
    r"|[不没沒无未勿莫甭否]|非|并非|别是|缺乏|缺少|排除|怀疑|难以|难说|很难|如果|假如|若[是为]|错误"
)
# What holds a negation and denies nothing.
_HARMLESS = re.compile(
    r"\b(?:no|without(?: an?y?)?|beyond|undoubted\w*|not?) (?:doubt|question|wonder|matter)\b|\bnot (?:only|just|merely"
    r"|simply|surprising(?:ly)?|without|unlikely)\b|\bundoubted(?:ly)?\b|\bnot (?:un|in)(?:common|frequent)ly\b"
    r"|非常|无疑问?|毋庸置疑|不容置疑|毫不怀疑|不[仅但只单光]|不管|无论|不论|不过|未来|不得不|不禁|不断|不久|无非|莫过于"
)
# Where a new clause begins.
_CLAUSE = re.compile(
    r"[。！？!?；;\n…:：]|\.(?=\s|$)|\s[-–—]+\s|——"
    r"|\b(?:because|therefore|hence|thus|(?<!anything )(?<!all )but|however|although|though|while|which"
    r"|so (?=the|it|this|that|he|she|they|i\b)"
    r"|and (?=is|the|it|this|that|he|she|they|i\b|so|thus|therefore|hence))\b|因此|所以|因为|从而|但|而是|故|却"
)
# Words between two commas, behind which the clause goes on: any behind a negation ("does not, in my view, show").
_ASIDE = re.compile(
    r"(?P<kept>\b(?:not|never|cannot)|n['’]?t|不|并非|没有)\s*[,，][^,，.。!?！？;；\n]{1,60}[,，]"
    r"|[,，]\s*(?:(?:in|to) (?:my|our) \w+|in fact|i (?:think|believe|feel|guess|suppose|would say)|it seems|at least"
    r"|however|therefore|of course|overall|(?:who|which|based on|given|despite)\b[^,，.。!?！？;；\n]{1,60}"
    r"|(?:在|依)我看来?|我认为|总体(?:而言|来看|上))\s*[,，]"
)
_COMMA = re.compile(r"[,，]")
_LISTED = re.compile(r"\bn?or\b|[或、及]")
_QUOTED = re.compile(r"[\"“「『‘][^\"“”「」『』‘\n]*\s[^\"“”「」『』‘\n]*[\"”」』]|[“「『][^“”「」『』\n]{3,}[”」』]")
_UNIT = re.compile(r"(?P<han>[\u2e80-\u9fff])|[^\W_]+(?:['’][^\W_]+)*")
_AFTER = re.compile(
    r"[\"'”’」』*_\s]*(?:(?:suicid\w+|risk|level|label|class|category|answer|option|ideation|mood|state)\s+){0,2}"
    r"(?:(?:is|are|was|were|do|does|did|can|could|may|might|would|should|has|seems?|appears?|looks?)\s*(?:be\s+)?"
    r"(?:n[^\w\s]?t|not(?!\s+(?:only|just|surprising))|never|unlikely|absent|excluded|ruled out|wrong|incorrect"
    r"|doubtful|unclear|out of the question)|can ?not)\b"
    r"|[\"'”’」』*_\s]*[(（]\s*(?:very |highly )?(?:unlikely|improbable|absent|excluded|ruled out)\b"
    r"|[\"'”’」』*_)\s]*(?:[:：=|]|\s[-–—]+\s)[\"'“*_\s]*(?:not?\b|none\b|never\b|absent|false\b|negative\b|unlikely"
    r"|n/a|0(?![\d.])|excluded|ruled out|[否无没未不非✗✘❌✖☒])"
    r"|[”’」』\s]*(?:的?(?:风险|程度|可能性?|证据|迹象|标签|情绪|倾向))*(?:并?不(?!仅|但|只|过|容|可忽)"
    r"|并非|没有|未必|未见|(?:[很极偏太]|较为?|比较|非常|相对)[低小]|可以?排除"
    r"|被排除|存疑|可疑)",
    re.IGNORECASE,
)


def denied(answer: str, place: Span) -> bool:
    """Whether the words before ``answer[place]`` in its clause deny or doubt it, or those that follow at once do."""
    text = simplified(answer[max(0, place[0] - _LOOK) : place[0]]).lower().replace("_", " ").replace("*", " ")
    text = _QUOTED.sub(" ", _HARMLESS.sub(" ", text))
    before = _clause(_ASIDE.sub(lambda found: f"{found['kept'] or ''} ", text))
    units = list(_UNIT.finditer(before))
    near, cost = 0, 0
    for unit in reversed(units):
        cost += 2 if unit["han"] else 3
        if cost > _FAR:
            near = unit.start()
            break
    if any(match.end() > near for pattern in (NEGATION, _DENIES) for match in pattern.finditer(before)):
        return True
    return _AFTER.match(simplified(answer[place[1] : place[1] + _BEHIND])) is not None


def _clause(text: str) -> str:
    """The clause that ``text`` ends in; a list ("not anxious, tired or sad") is of one clause."""
    start = max((match.end() for match in _CLAUSE.finditer(text)), default=0)
    text = text[start:]
    parts = _COMMA.split(text)
    return text if _LISTED.search(parts[-1]) else parts[-1]
