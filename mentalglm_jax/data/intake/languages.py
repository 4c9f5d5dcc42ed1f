"""Which language a post is in, told from its text alone, offline.

Chinese and English are told by their scripts, which is right for a post of two characters too, and where one is mixed
with words of the other. What is neither is told by py3langid, and believed where the text is long enough.
"""

import functools
import re
from typing import Any

from mentalglm_jax.errors import InputError, install

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_WORD = re.compile(r"[^\W\d_]+")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f\uff21-\uff3a\uff41-\uff5a]")
_NO_TEXT = re.compile(r"(?:https?://|www\.)[!-~]+|[@#][A-Za-z0-9_]+")  # addresses and names are in no language
_OTHER = 0.2  # share of letters of a third script from which the post is in it: Japanese is half Han
_ENOUGH = 400  # characters that a detector is given
_LETTERS, _SURE = 24, 0.9  # from which another language in Latin letters is believed: "lol omg" is none to tell


@functools.cache
def _detector() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise InputError(f"telling languages needs the data extra: {install('data')}; or name the "
                         "language") from None  # fmt: skip
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def told_language(text: str) -> str | None:
    """``en``, ``zh``, or the ISO 639-1 code of another language; None where the text holds no word at all."""
    text = _NO_TEXT.sub(" ", text)
    han = len(_HAN.findall(text))
    words = _WORD.findall(_HAN.sub(" ", text))
    letters = "".join(words)
    if not han and not words:
        return None
    other = len(letters) - len(_LATIN.findall(letters))
    if other >= _OTHER * (han + len(letters)):
        return _detected(text)[0]
    if han >= len(words):  # a Chinese character says about as much as an English word
        return "zh"
    if len(letters) < _LETTERS:
        return "en"
    language, sure = _detected(text)
    return language if sure >= _SURE else "en"


def _detected(text: str) -> tuple[str, float]:
    language, sure = _detector().classify(text[:_ENOUGH])
    return str(language), float(sure)
