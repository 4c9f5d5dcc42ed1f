"""Text in tables that people open in a spreadsheet: it stays text, and comes back as it was."""

import re

# What a spreadsheet takes for a formula (the wide ones in East Asian settings); the mark itself is marked too, so that
# taking one away is exact. Names are also kept from becoming a number, a date or a truth value: they would come back
# changed. Read by Python and by the review form's script.
MARK = "'"
FORMULA = r"^\s*[=+\-@＝＋－＠']|^[\t\r\n]"
VALUE = (
    r"^\s*[0-9.(]|^(?:true|false|nan|inf)$|^\s*(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*[-./ ]?[0-9]"
)
# Where ; stands between columns (Excel in much of Europe), quotation marks after a comma protect nothing: what follows
# a ;, a tab or a line end inside a cell begins a cell there. It is marked, too.
_FOLLOWS = r"""(?=(?:"|[^\S\t\r\n])*[=+\-@＝＋－＠'])"""
INNER = rf"([;\t\r\n]){_FOLLOWS}"
_MARKED = re.compile(rf"([;\t\r\n]){MARK}{_FOLLOWS}")

# What a spreadsheet writes into a cell that it could not compute: no post, label or name.
ERRORS = ("#DIV/0!", "#N/A", "#NAME?", "#NULL!", "#NUM!", "#REF!", "#VALUE!", "#SPILL!", "#CALC!", "#GETTING_DATA")


def without_error(cell: str) -> str:
    """The cell; empty where a spreadsheet says that it could not compute it."""
    return "" if cell.strip() in ERRORS else cell


def to_cell(text: str, *, name: bool = False) -> str:
    """``text`` so that a spreadsheet takes it for text: an apostrophe before what it would take for a formula; before
    a ``name`` (an id) also where it would make a number or a date of it."""
    marked = re.search(f"{FORMULA}|{VALUE}" if name else FORMULA, text, re.IGNORECASE)
    text = re.sub(INNER, rf"\1{MARK}", text)
    return MARK + text if marked else text


def from_cell(cell: str) -> str:
    """What ``to_cell`` was given. Of a cell that was typed in by hand marks in the same places go, too."""
    return _MARKED.sub(r"\1", cell.removeprefix(MARK))
