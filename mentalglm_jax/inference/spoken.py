"""An answer as text while it is generated: token by token in, whole characters out."""

from collections.abc import Sequence
from typing import NamedTuple

from mentalglm_jax.text.tokenizer import GlmTokenizer

_LONGEST = 8  # tokens that are waited for: a character has four bytes at most


class Piece(NamedTuple):
    """The next part of an answer. ``tokens`` are the numbers (in the order of ``add``, from 0) of those that begin in
    it and before it, and were not named yet; a token without text of its own is in none."""

    text: str
    tokens: tuple[int, ...]


class Spoken:
    """Text of an answer under way. Its pieces together are ``answer_text`` of all its tokens, up to a stop text.

    A piece holds whole characters; what opens and closes an answer (GLM's line break, Llama 2's spaces) is left out;
    what may be the beginning of a stop text, or what closes the answer, is held back until it is known whether it is.

    Attributes:
        stopped: a stop text was found; what follows it is not said.
    """

    def __init__(self, tokenizer: GlmTokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._lead, self._trail = tokenizer.answer_lead, tokenizer.answer_trail
        self.stopped = False
        self._count = 0  # tokens so far
        self._open: list[int] = []  # tokens whose bytes do not end a character yet
        self._text = ""  # not passed on yet
        self._said = 0  # characters passed on
        self._begins: list[tuple[int, int]] = []  # (number of a token, character at which it begins), not named yet

    def add(self, token: int) -> Piece:
        """What can be said after one more token; often nothing."""
        number, self._count = self._count, self._count + 1
        if token in self._tokenizer.special_ids:  # decoding skips it: a character may go on behind it
            return Piece("", ())
        self._open.append(token)
        text = self._tokenizer.decode(self._open)
        if text.endswith("\ufffd"):  # the bytes end within a character
            self._begins.append((number, self._end))
            return self._overdue(text) if len(self._open) >= _LONGEST else Piece("", ())
        if text:
            self._begins.append((number, self._end))
            self._open = []
        else:
            self._open.pop()
        return self._take(text, last=False)

    def end(self) -> Piece:
        """The rest, when there is no further token."""
        text, self._open = self._tokenizer.decode(self._open), []
        return self._take(text, last=True)

    def _overdue(self, text: str) -> Piece:
        """What of the open tokens is no character, however the answer goes on: all but those that may begin one."""
        for kept in (1, 2, 3):
            first, rest = self._open[:-kept], self._open[-kept:]
            said = self._tokenizer.decode(first)
            if said + self._tokenizer.decode(rest) == text:
                begun = [number for number, _ in self._begins[-kept:]]
                self._begins = self._begins[:-kept]
                piece, self._open = self._take(said, last=False), rest
                self._begins += [(number, self._end) for number in begun]
                return piece
        return Piece("", ())

    @property
    def _end(self) -> int:
        return self._said + len(self._text)

    def _take(self, text: str, last: bool) -> Piece:
        if self.stopped:
            return Piece("", ())
        self._text += text
        if self._lead:
            if self._lead.startswith(self._text) and self._text != self._lead and not last:
                return Piece("", ())
            if self._text.startswith(self._lead):
                self._text = self._text[len(self._lead) :]
                ended = [at for _, at in self._begins[1:]] + [len(self._lead) + len(self._text)]
                self._begins = [(number, max(0, at - len(self._lead))) for (number, at), end in
                                zip(self._begins, ended, strict=True) if end > len(self._lead)]  # fmt: skip
            self._lead = ""
        found = min((at for stop in self._stops if (at := self._text.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped, keep = True, found
        elif last:
            keep = len(self._text.removesuffix(self._trail))
        else:
            keep = len(self._text) - self._held_back()
        piece, self._text = self._text[:keep], self._text[keep:]
        self._said += len(piece)
        told = tuple(number for number, at in self._begins if at < self._said)
        self._begins = self._begins[len(told) :]
        return Piece(piece, told)

    def _held_back(self) -> int:
        """How many of the last characters may be the beginning of a stop text, or all that closes the answer."""
        longest = max([len(self._trail), *(len(stop) - 1 for stop in self._stops)])
        for count in range(min(longest, len(self._text)), 0, -1):
            if any(one.startswith(self._text[-count:]) for one in (*self._stops, self._trail)):
                return count
        return 0
