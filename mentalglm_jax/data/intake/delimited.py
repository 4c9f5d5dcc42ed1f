"""Tables of text (CSV, TSV) of which nobody said how they were saved: their encoding, and what stands between cells."""

import codecs
import csv
from collections.abc import Sequence
from pathlib import Path

from mentalglm_jax.data.intake import western
from mentalglm_jax.data.tables import can_decode, find_encoding, opened
from mentalglm_jax.errors import InputError, install
from mentalglm_jax.foreign import open_file

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SAMPLE = 1 << 20  # bytes looked at
_BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16",
         b"\xfe\xff": "utf-16"}  # fmt: skip
_BIG5 = ("cp950", "big5hkscs")  # of Taiwan, as Windows has it, and of Hong Kong
_OLD = ("gb18030", *_BIG5, "cp1252")  # what English and Chinese were saved in before Unicode, as Windows still does
_RARE = range(0xC7, 0xF9)  # first bytes of the rare characters of Big5; of GB18030 many common ones have them
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
    else:
        best = _guessed(head)
        tried = _BIG5 if best in _BIG5 else () if best is None else (best,)
        if codec := next((codec for codec in tried if can_decode(path, codec)), None):
            return codec
    raise InputError(f"{path}: its encoding cannot be told; save it as UTF-8, or name it: --encoding {_hint(head)}")


def guess_said(codec: str) -> tuple[str, ...]:
    """What a user must know if ``told_encoding`` gave ``codec``: a note if only the look of the text speaks for it."""
    if codec not in _OLD:
        return ()
    return (f"not UTF-8, read as {codec.upper()} by the look of it; if words come out wrong, save it as UTF-8",)


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
    head = _whole_lines(head)
    best = from_bytes(head, cp_isolation=list(_OLD)).best()
    return None if best is None or _of_another_language(head, best.encoding) else best.encoding


def _whole_lines(head: bytes) -> bytes:
    """``head`` without a character that is cut."""
    return head[: (head.rfind(b"\n") + 1 if len(head) == _SAMPLE else 0) or None]


def _of_another_language(head: bytes, codec: str) -> bool:
    """Whether text that could be in ``codec`` is Korean or Japanese of its day, or for cp1252 of a Mac, of DOS, or of
    a language that is not Western (Turkish, Czech)."""
    fits, others = western.fits(head, western.WINDOWS), western.rivals(head)
    if codec == western.WINDOWS:
        return not fits or bool(others)
    return fits or bool(others) or _is_korean(head) or _is_japanese(head)


def _is_korean(head: bytes) -> bool:
    letters = [char for char in head.decode("cp949", "ignore") if char > "\x7f" and char.isalpha()]
    return len(letters) >= 20 and sum("가" <= char <= "힣" for char in letters) > 0.95 * len(letters)


def _is_japanese(head: bytes, codec: str = "euc_jp") -> bool:
    """Kana among the letters, and hardly a byte that is none of it; of Big5 many are."""
    text = [char for char in head.decode(codec, "replace") if char > "\x7f"]
    kana = sum("ぁ" <= char <= "ヿ" for char in text)
    return kana > 0.2 * len(text) and text.count("\ufffd") <= 0.01 * len(text)


def _is_big5(head: bytes) -> bool:
    """Nearly all of it decodes, and few are rare characters."""
    text = [char for char in head.decode("big5hkscs", "replace") if char > "\x7f"]
    rare = sum(char.encode("big5hkscs", "replace")[0] in _RARE for char in text if char.isalpha())
    return text.count("\ufffd") <= 0.05 * len(text) and rare < 0.2 * sum(char.isalpha() for char in text)


def _hint(head: bytes) -> str:
    """Names of encodings to try."""
    head = _whole_lines(head)
    if found := [*([western.WINDOWS] if western.fits(head, western.WINDOWS) else []), *western.rivals(head)]:
        return " or ".join(found)
    for codec in ("euc_jp", "cp932"):
        if _is_japanese(head, codec):
            return codec
    for codec, is_it in {"cp949": _is_korean, "big5hkscs": _is_big5}.items():
        text = head.decode(codec, "replace")
        if is_it(head) and text.count("\ufffd") <= 0.05 * sum(char > "\x7f" for char in text):
            return codec
    return "gb18030, big5hkscs, mac_roman, cp850 or cp1250"


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
