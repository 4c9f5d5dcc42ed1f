"""SentencePiece's BPE as a ``tokenizer.json`` keeps it (Llama 2, Mistral 7B): spaces are ``▁``, rare letters bytes.

Such a file may also put a space before texts and take it away from what it decodes. Which spaces there are is then said
in two places, here and in the chat format. So both are switched off, and ``Spaces`` says what the file did: the texts
between special tokens, spaces included, are the template's, letter for letter.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers

from mentalglm_jax.errors import InputError

MARK = "▁"
_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
_FROM_MARK = {"type": "Replace", "pattern": {"String": MARK}, "content": " "}
_PREPEND = {"type": "Prepend", "prepend": MARK}
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_BYTES, _FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
# The only parts of these kinds that a file may have: others can multiply a text, or change it.
EXACT = {"normalizer": (_TO_MARK, _PREPEND), "decoder": (_FROM_MARK, _STRIP)}


@dataclass(frozen=True)
class Spaces:
    """What a file said of spaces before texts. ``before``: the text after a special token (or the beginning) gets one,
    "always", or where it does not begin with one ("missing"); None: it does not. ``parts`` is what the file held, for
    saving it as it was."""

    before: str | None
    parts: dict[str, Any]

    def opened(self, text: str) -> str:
        """``text`` as it stands after a special token."""
        wanted = self.before == "always" or (self.before == "missing" and not text.startswith(" "))
        return f" {text}" if wanted and text else text


def take_spaces(backend: Tokenizer, where: str) -> Spaces | None:
    """Switches off what ``backend`` does about spaces at the ends of texts; None if it is a tokenizer of another kind.

    Raises:
        InputError: it is one, with parts that would change a text in another way, or bytes without a token.
    """
    raw = json.loads(backend.to_str())
    model, parts = raw["model"], {key: raw[key] for key in ("normalizer", "pre_tokenizer", "decoder")}
    if model.get("type") != "BPE" or not model.get("byte_fallback") or "ByteLevel" in json.dumps(parts):
        return None
    hint = "take the tokenizer of the original release"
    steps = _listed(parts["normalizer"], "normalizers")
    before, cut = parts["pre_tokenizer"], None
    if steps == [_PREPEND, _TO_MARK] and before is None:
        cut = "always"
    elif not steps and isinstance(before, dict) and before.get("type") == "Metaspace":
        scheme = before.get("prepend_scheme")
        known = before.get("replacement") == MARK and before.get("split") is False
        # "first": only at the very beginning of a text, and a conversation begins with a special token.
        cut = {"always": "missing", "first": "", "never": ""}.get(str(scheme)) if known else None
    elif steps == [_TO_MARK] and before is None:
        cut = ""
    decoder = _listed(parts["decoder"], "decoders")
    if cut is None or decoder not in ([_FROM_MARK, _BYTES, _FUSE, _STRIP], [_FROM_MARK, _BYTES, _FUSE]):
        raise InputError(f"{where}: writes spaces otherwise than SentencePiece's tokenizers of Llama 2 and Mistral, so "
                         f"that a text would not come back as it was; {hint}")  # fmt: skip
    missing = [byte for byte in range(256) if backend.token_to_id(f"<0x{byte:02X}>") is None]
    if missing:
        raise InputError(f"{where}: {len(missing)} of the 256 bytes have no token, so that letters of a post would "
                         f"vanish; {hint}")  # fmt: skip
    backend.normalizer = normalizers.Replace(" ", MARK)
    backend.pre_tokenizer = None  # type: ignore[assignment]
    backend.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    return Spaces(cut or None, parts)


GAPS = re.compile(MARK)
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def bytes_of_token(token: str) -> bytes:
    """The bytes that a token stands for: the byte it names, or its letters, ``▁`` being a space."""
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(MARK, " ").encode()


def _listed(part: Any, key: str) -> list[Any]:
    return [] if part is None else part[key] if part.get("type") == "Sequence" else [part]
