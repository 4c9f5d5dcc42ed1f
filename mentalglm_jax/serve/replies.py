"""What a client gets: OpenAI's objects for an answer, whole or in pieces, and for the list of models."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from mentalglm_jax.inference.continuous import Token
from mentalglm_jax.serve.engine import Said
from mentalglm_jax.serve.requests import ChatRequest
from mentalglm_jax.text.tokenizer import GlmTokenizer


def model_object(name: str, since: int) -> dict[str, Any]:
    """One entry of the list of models."""
    return {"id": name, "object": "model", "created": since, "owned_by": "mentalglm-jax"}


class Reply:
    """The objects of one answer, which share an id.

    Args:
        name: of the model.
        prompt_tokens: tokens of the messages.
    """

    def __init__(self, asked: ChatRequest, tokenizer: GlmTokenizer, name: str, prompt_tokens: int):
        self._told, self._tokenizer, self._prompt = asked.logprobs, tokenizer, prompt_tokens  # not its messages
        self._counts = asked.stream_options is not None and asked.stream_options.include_usage
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}

    def whole(self, said: Sequence[Said]) -> dict[str, Any]:
        """``chat.completion`` of all that was said."""
        text = "".join(one.text for one in said)
        choice = {
            "index": 0, "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs([token for one in said for token in one.tokens]),
            "finish_reason": said[-1].finish,
        }  # fmt: skip
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self._usage(said[-1].count)}

    def opening(self) -> dict[str, Any]:
        """The first ``chat.completion.chunk``."""
        return self._chunk({"role": "assistant", "content": ""}, None, None)

    def chunks(self, said: Said) -> list[dict[str, Any]]:
        """A chunk with what was said, and at the end one with the reason and, if asked for, one with the usage."""
        found = []
        if said.text or said.tokens:
            found.append(self._chunk({"content": said.text}, self._logprobs(said.tokens), None))
        if said.finish is not None:
            found.append(self._chunk({}, None, said.finish))
            if self._counts:
                found.append(self._piece([], self._usage(said.count)))
        return found

    def _chunk(self, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._piece([choice], None)

    def _piece(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        said = {"usage": usage} if self._counts else {}  # where it is asked for every chunk has the key, as OpenAI's
        return {**self._head, "object": "chat.completion.chunk", "choices": choices, **said}

    def _usage(self, count: int) -> dict[str, int]:
        return {"prompt_tokens": self._prompt, "completion_tokens": count, "total_tokens": self._prompt + count}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._told:
            return None
        content = [
            {**self._entry(one.id, one.logprob or 0.0), "top_logprobs": [self._entry(*other) for other in one.others]}
            for one in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self._tokenizer.bytes_of(token)
        return {"token": spelled.decode(errors="replace"), "logprob": logprob, "bytes": [*spelled]}
