"""The bytes of every token, and text from bytes with the way back."""

from __future__ import annotations

import re
from typing import Any

from probes.errors import ProbeInputError
from probes.foreign import plain
from probes.models.reading import Reading, read
from probes.models.tokenizer import normalisers, text_ids

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_WINDOW = 512  # bytes decoded at a time


def _byte_decoder() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: stand-in character -> byte."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    decoder = {chr(byte): byte for byte in kept}
    rest = [byte for byte in range(256) if byte not in kept]
    return decoder | {chr(256 + index): byte for index, byte in enumerate(rest)}


class TokenBytes:
    """The bytes of each token id.

    Exact for byte-level BPE (GLM, Llama 3, Qwen ...), byte-fallback BPE (Llama 2) and SentencePiece (a marker stands
    for the space). WordLevel and WordPiece keep words and lose what is between them: one space is put before every
    word, and a post that does not read like that is refused when it is looked for (``encode``).

    Attributes:
        kind: byte-level | SentencePiece | WordLevel | WordPiece.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Takes a transformers fast tokenizer.

        Raises:
            ProbeInputError: none of these kinds, so that the text of a token cannot be known.
        """
        self.tokenizer = tokenizer
        self.added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        core = getattr(tokenizer, "backend_tokenizer", None)
        model = type(getattr(core, "model", None)).__name__
        parts = f"{getattr(core, 'decoder', None)!r} {getattr(core, 'pre_tokenizer', None)!r}"
        if "ByteLevel" in parts:
            self.kind = "byte-level"
        elif "ByteFallback" in parts or "Metaspace" in parts:
            self.kind = "SentencePiece"
        elif model in ("WordLevel", "WordPiece"):
            self.kind = model
        else:
            raise ProbeInputError(
                f"the tokenizer ({type(tokenizer).__name__}, {model}) is neither byte-level, byte-fallback, "
                "SentencePiece, WordLevel nor WordPiece: what its tokens stand for in the text cannot be known"
            )
        self._decoder = _byte_decoder()
        self._joined = str(getattr(getattr(core, "model", None), "continuing_subword_prefix", None) or "##")

    def __call__(self, index: int) -> bytes:
        """Bytes of one id; empty for an id without a token (padding rows of the embedding)."""
        if index in self.added:
            return self.added[index].encode()
        token = self.tokenizer.convert_ids_to_tokens(index)
        if token is None:
            return b""
        if self.kind == "byte-level":
            if not all(char in self._decoder for char in token):
                raise ProbeInputError(
                    f"the tokenizer is byte-level, but its token {index} ({plain(repr(token), 40)}) stands for no bytes"
                )
            return bytes(self._decoder[char] for char in token)
        if self.kind in ("WordLevel", "WordPiece"):
            joined = self.kind == "WordPiece" and token.startswith(self._joined)
            return (token.removeprefix(self._joined) if joined else f" {token}").encode()
        if (byte := _BYTE_TOKEN.fullmatch(token)) is not None:
            return bytes([int(byte[1], 16)])
        return token.replace("\u2581", " ").encode()

    def encode(self, text: str) -> list[int]:
        """Ids of a text without any prefix.

        Many SentencePiece tokenizers put a space before whatever they are given; that one is taken out again.
        """
        ids = self.plain(text)
        if self.kind != "SentencePiece" or self._holds(ids, text):
            return ids
        front, whole = self.plain("\n"), self.plain("\n" + text)
        tries = [self.plain(text[1:])] * text.startswith(" ") + [whole[len(front) :]] * (whole[: len(front)] == front)
        return next((found for found in tries if self._holds(found, text)), ids)

    def plain(self, text: str) -> list[int]:
        """Ids of a text as clients of the tokenizer get them, without special tokens that it does not spell out."""
        return text_ids(self.tokenizer, text)

    def rules(self) -> str:
        """The rules by which the tokenizer changes a text, in words; empty when it keeps what it is given."""
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        return "" if core is None else ", ".join(normalisers(core))

    def reads(self, text: str) -> Reading | None:
        """``text`` as a tokenizer with ``rules`` reads it; None where its characters cannot be followed."""
        return read(self.tokenizer.backend_tokenizer, text)

    def _holds(self, ids: list[int], text: str) -> bool:
        return b"".join(map(self, ids)) == text.encode()


def decode_bytes(data: bytes) -> tuple[str, list[int]]:
    """UTF-8 with every invalid run as one U+FFFD (Python's ``errors="replace"``), keeping the way back.

    Returns:
        the text, and the byte offset of each of its characters followed by ``len(data)``.
    """
    text, offsets, at = [], [], 0
    while at < len(data):
        window, bad = data[at : at + _WINDOW], 0
        try:
            good = window.decode()
        except UnicodeDecodeError as error:
            good = window[: error.start].decode()
            if error.end < len(window) or at + len(window) == len(data):  # else only the window cuts a character
                bad = error.end - error.start
        for char in good:
            offsets.append(at)
            at += len(char.encode())
        text.append(good)
        if bad:
            offsets.append(at)
            at += bad
            text.append("\ufffd")
    return "".join(text), [*offsets, len(data)]
