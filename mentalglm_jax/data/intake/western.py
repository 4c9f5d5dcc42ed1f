"""Whether old text of single bytes is what Windows saved in the West, told by where its letters and signs stand."""

WINDOWS = "cp1252"
RIVALS = ("mac_roman", "cp437", "cp850")  # of old Macs, and of DOS: no byte says which of these a text is in
_MOST_LOOKED_AT = 20_000
_MOST = 0.05  # share of characters that may stand where no word has them
_LOWER = frozenset("àáâãäåæçèéêëìíîïñòóôõöøùúûüÿßœ")
_ALONE = frozenset("àéèåÀÉÈÅ")  # words of one letter
_NEVER_FIRST, _NEVER_LAST = frozenset("ãëìïñòôõùûÿß"), frozenset("æîïñœ")
_FIRST = frozenset("ÀÁÂÄÅÆÇÈÉÊÍÎÓÖØÚÜŒ")
_ONLY_LAST = frozenset("ìù")  # più, così, où
_ENDINGS = frozenset(("t", "m", "d", "ve", "re", "ll"))  # what follows an apostrophe in English; and s
_LAST_A = ("là", "jà", "çà", "già", "ttà", "cità", "lità")
_ELIDED = frozenset(("l", "d", "j", "m", "t", "s", "n", "c", "qu"))  # what precedes one in French
_ANYWHERE, _QUOTES = frozenset("–—…\xa0\xad’·"), frozenset("“”«»‹›•")
_APART = frozenset("½¼¾×÷±§¶©£€¥¢¬")  # not beside a letter


def fits(data: bytes, codec: str) -> bool:
    """Whether nearly all characters of ``data`` beyond ASCII stand where those of a Western language do."""
    text = f" {data.decode(codec, 'replace')} "
    places = [at for at, char in enumerate(text) if char > "\x7f"]
    places = places[:: len(places) // _MOST_LOOKED_AT + 1]
    odd = sum(not _at_home(text, at) or (codec != WINDOWS and _of_windows(text, at)) for at in places)
    return odd <= _MOST * len(places)


def rivals(data: bytes) -> list[str]:
    """Those of ``RIVALS`` that ``data`` fits as another text than Windows would read."""
    return [codec for codec in RIVALS
            if data.decode(codec, "replace") != data.decode(WINDOWS, "replace") and fits(data, codec)]  # fmt: skip


def _at_home(text: str, at: int) -> bool:
    char, before, after = text[at], text[at - 1], text[at + 1]
    if char.isalpha() and char not in "ªºµƒˆ":
        return _letter(text, at)
    inside = before.isalpha() and after.isalpha()
    if char in _ANYWHERE:
        return True
    if char in _QUOTES:
        return not (before.isalnum() and after.isalnum())
    if char in "‘´":
        head, tail = _word(text, at)
        had = tail == "ve" and not head.endswith(("i", "we", "you", "they", "d", "t"))  # naïve in DOS
        return not inside or (tail in {*_ENDINGS, "s"} and not had) or head in _ELIDED
    if char in "„‚¿¡":  # these open
        return not before.isalnum() and not after.isspace()
    if char in _APART:
        return not before.isalpha() and not after.isalpha()
    if char in "®™ªº":
        return not after.isalpha()
    if char == "°":
        return before.isdigit() or after in "CF" or (not inside and before in " nN")
    if char in "²³":
        return not after.isalpha() and (before.isdigit() or before in "mM)")
    if char == "‰":
        return before.isdigit() or text[at - 2].isdigit()
    if char == "µ":
        return not before.isalpha()
    return char == "¯" and bool({before, after} & {*"\\/"})


def _letter(text: str, at: int) -> bool:
    char, before, after = text[at], text[at - 1], text[at + 1]
    first, last = not before.isalpha(), not after.isalpha()
    if char.lower() not in _LOWER:
        return False
    if first and last:
        return char in _ALONE
    if before > "\x7f" and after > "\x7f" and not (first or last):
        return False  # other alphabets, byte by byte
    if char.isupper():
        return char in _FIRST or after.isupper() if first else before.isupper() and (last or after.isupper())
    if after.isupper() or (first and char in _NEVER_FIRST) or (last and char in _NEVER_LAST):
        return False
    head, tail = _word(text, at)
    if (head + tail).isalpha() and len(head + tail) > 1 and min(head + tail) > "\x7f":
        return False
    if char == "õ":
        return after == "e"  # Portuguese; elsewhere it is Hungarian
    return last or char not in _ONLY_LAST


def _of_windows(text: str, at: int) -> bool:
    """Whether a letter stands where Windows has the apostrophe of "don’t" (``í`` of a Mac), or an ellipsis (``à`` of
    DOS)."""
    head, tail = _word(text, at)
    if text[at] == "í":
        return tail in _ENDINGS or (tail == "s" and head[-1:] not in tuple("aeiou"))
    return text[at] == "à" and bool(head) and not tail and not (head + "à").endswith(_LAST_A)


def _word(text: str, at: int) -> tuple[str, str]:
    """The letters right before and right after a place, at most 20 each."""
    start, end = at, at + 1
    while start > max(0, at - 20) and text[start - 1].isalpha():
        start -= 1
    while end < min(len(text), at + 20) and text[end].isalpha():
        end += 1
    return text[start:at].lower(), text[at + 1 : end].lower()
