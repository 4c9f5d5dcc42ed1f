"""Tables of text (CSV, TSV) of which nobody said how they were saved: their encoding, and what stands between cells."""

import codecs
import csv
from collections.abc import Sequence
from pathlib import Path

from mentalglm_jax.data.tables import can_decode, find_encoding, opened
from mentalglm_jax.errors import InputError, install
from mentalglm_jax.foreign import open_file

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SAMPLE = 1 << 20  # bytes looked at
_BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16",
         b"\xfe\xff": "utf-16"}  # fmt: skip
_OLD = ("gb18030", "big5", "cp1252")  # what English and Chinese were saved in before Unicode, as Windows still does
_FEW = 0.1  # share of zero bytes below which they are dirt in a text of single bytes


def told_encoding(path: Path) -> str:
    """The codec of a text: by its byte order mark; UTF-16 where it holds many zero bytes; UTF-8 where all of it is; or
    else which of ``_OLD`` charset-normalizer takes it for.

    Raises:
        InputError: the file cannot be read, or is text in none of these.
    """
    try:
        with open_file(path) as file:
            head = file.read(_SAMPLE)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror})") from None
    for mark, codec in _BOMS.items():
        if head.startswith(mark):
            return find_encoding(path, (codec,))
    whole = can_decode(path, "utf-8")
    if b"\0" in head and not (whole and head.count(0) < _FEW * len(head)):
        wide = ["utf-16-le", "utf-16-be"]  # of a Latin letter the zero byte stands behind, or before
        wide = wide if head[1::2].count(0) >= head[::2].count(0) else wide[::-1]
        if codec := next((codec for codec in wide if _is_text(head, codec) and can_decode(path, codec)), None):
            return codec
    elif whole:
        return "utf-8"
    elif (codec := _guessed(head)) and can_decode(path, codec):
        return codec
    raise InputError(f"{path}: its encoding cannot be told; save it as UTF-8, or name it: --encoding gb18030")


def checked_encoding(path: Path, name: str) -> str:
    """``name``, of which the user said that the file is in it.

    Raises:
        InputError: no encoding of text has this name, or the file is not in it (the first line that is not is named).
    """
    try:
        codec = codecs.lookup(name)
        "a".encode(codec.name)  # refuses codecs that make bytes of bytes, which lookup finds too
    except (LookupError, ValueError):  # UnicodeError is a ValueError, and so is a NUL in the name
        raise InputError(
            f"encoding {name!r}: none of this name is for text; try utf-8, gb18030, big5 or cp1252"
        ) from None
    return find_encoding(path, (codec.name,))


def _is_text(head: bytes, codec: str) -> bool:
    """Whether bytes with zeros among them are lines of text in UTF-16, not anything else that happens to decode."""
    found = head[: len(head) // 2 * 2].decode(codec, "replace")
    return "\n" in found and "\0" not in found


def _guessed(head: bytes) -> str | None:
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        raise InputError(f"text that is not UTF-8 needs the data extra: {install('data')}; or save it "
                         "as UTF-8, or name its encoding") from None  # fmt: skip
    end = head.rfind(b"\n") + 1 if len(head) == _SAMPLE else 0  # no character is cut
    best = from_bytes(head[: end or None], cp_isolation=list(_OLD)).best()
    return None if best is None or _of_another_language(head, best.encoding) else best.encoding


def _of_another_language(head: bytes, codec: str) -> bool:
    """Whether text that could be in ``codec`` is Korean or Turkish of its day: nearly all syllables of the one; of the
    other the letters in the places of those that Icelandic alone has."""
    if codec == "cp1252":
        letters = [char for char in head.decode(codec, "ignore") if char > "\x7f" and char.isalpha()]
        return sum(char in "ðýþÐÝÞ" for char in letters) > max(2, len(letters) // 5)
    letters = [char for char in head.decode("cp949", "ignore") if char > "\x7f" and char.isalpha()]
    return len(letters) >= 20 and sum("가" <= char <= "힣" for char in letters) > 0.95 * len(letters)


def told_delimiter(path: Path, encoding: str, columns: Sequence[str]) -> str:
    """What separates the cells: what Excel's first line says (``sep=;``). Or that of ``DELIMITERS`` by which the first
    row has all ``columns``; if there is none, the one that makes most of it."""
    with opened(path, encoding, "") as file:
        first = file.readline(16).strip("\ufeff\r\n")
    if first.startswith("sep=") and first[4:] in DELIMITERS:
        return first[4:]
    order = ["\t", *DELIMITERS] if path.suffix.lower() == ".tsv" else list(DELIMITERS)
    headers = {delimiter: _header(path, encoding, delimiter) for delimiter in order}
    return max(order, key=lambda one: (len({*columns} & {*headers[one]}), len(headers[one]), -order.index(one)))


def _header(path: Path, encoding: str, delimiter: str) -> list[str]:
    """The first row that is not blank; empty if it cannot be read by this delimiter."""
    with opened(path, encoding, "") as file:
        try:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            found = next((cells for cells in rows if any(cell.strip() for cell in cells)), [])
        except csv.Error:
            return []
    return [cell.strip().removeprefix("\ufeff").strip() for cell in found]
