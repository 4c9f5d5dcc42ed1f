"""Text from outside in Markdown: it is shown as it is, whatever it says; it makes no link, picture, tag or heading.

Label names, questions and system turns come from task files of strangers and stand in model cards, datasheets and
leaderboards that others open.
"""

import re

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
