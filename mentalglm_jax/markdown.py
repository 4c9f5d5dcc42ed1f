"""Text from outside where others read it, in Markdown and on pages: it is shown as it is, whatever it says; it makes no
link, picture, tag or heading, and hides or moves nothing.

Label names, questions and system turns come from task files of strangers and stand in model cards, datasheets and
leaderboards that others open.
"""

import re
import unicodedata

_JOINERS = "\u200c\u200d"  # Persian, the scripts of India and emoji need them
# They look like nothing, whatever their category says.
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")

# Those in common use of what Unicode calls confusables.
_LOOK = str.maketrans("АВЕКМНОРСТУХІЈЅӀаеорсухкіјѕһӏԁԛԝΑΒΕΖΗΙΚΜΝΟΡΤΥΧοανρκι",
                      "ABEKMHOPCTYXIJSIaeopcyxkijshldqwABEZHIKMNOPTYXoavpki")  # fmt: skip

# What means something to CommonMark or to GitHub's extensions of it; an underscore inside a word does not.
_MARKS = re.compile(r"[\\`*\[\]<>#|~!&$]|(?<![^\W_])_|_(?![^\W_])")
_ADDRESS = re.compile(r"://|(?<=www)\.", re.IGNORECASE)  # from which a link is made without any mark


def escaped(text: str) -> str:
    """``text`` as one line, also within a table."""
    marked = _MARKS.sub(lambda found: f"\\{found[0]}", _line(text))
    return _ADDRESS.sub(lambda found: "".join(f"\\{one}" for one in found[0]), marked)


def code(text: str) -> str:
    """``text`` as one line of code; not for a table, whose cells end at a bar."""
    line = _line(text)
    marks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{marks}{space}{line}{space}{marks}"


def fenced(*texts: str) -> str:
    """Texts as one block, each from a line of its own."""
    marks = "`" * max(3, 1 + max((len(run) for text in texts for run in re.findall("`+", text)), default=0))
    return "\n".join([f"{marks}text", *texts, marks])


def _line(text: str) -> str:
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())


def hidden(one: str) -> bool:
    """Whether a character is seen by nobody or moves others: controls, direction marks, spaces of no width, halves of
    surrogate pairs. Line ends, tabs and joiners are none of them."""
    return unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp") and one not in f"\n\t{_JOINERS}"


def look(text: str) -> str:
    """``text`` with letters of Cyrillic and Greek as the Latin ones that they look like: two texts of one look cannot
    be told apart by who reads them."""
    return text.translate(_LOOK)


def seen(text: str) -> str:
    """``text`` for a page, with hidden characters by their numbers: a direction mark moves nothing on it."""
    if text.isprintable():
        return text
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(f"[U+{ord(one):04X}]" if hidden(one) else one for one in lines)


def without_blanks(text: str) -> str:
    """``text`` without what no reader could tell that it is there: hidden characters, joiners, blanks."""
    if text.isascii():
        return "".join(one for one in text if not hidden(one)) if not text.isprintable() else text
    return _BLANK.sub("", "".join(one for one in text if not (hidden(one) or one in _JOINERS)))
