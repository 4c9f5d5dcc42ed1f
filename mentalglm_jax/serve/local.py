"""Chats with a model in this process, several at a time and without a server."""

import asyncio
from collections.abc import Mapping, Sequence

from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.inference.continuous import ContinuousBatch, Wanted
from mentalglm_jax.inference.decode import check_ids
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.serve.engine import Engine
from mentalglm_jax.serve.requests import ApiError
from mentalglm_jax.text.tokenizer import GlmTokenizer


class LocalChats:
    """Answers chats that are asked at the same time in one batch, each as if it were asked alone.

    Args:
        model: without LoRA, or with its LoRA merged.
        rows: chats answered at a time, at most; others wait.
        max_tokens: of an answer. temperature: 0 is greedy.

    Attributes:
        room: tokens that a prompt may have. stops: ids that end an answer.

    Raises:
        InputError: ``max_tokens`` leaves no room for a prompt.
    """

    def __init__(self, model: Glm, tokenizer: GlmTokenizer, *, rows: int, max_tokens: int, temperature: float):
        self._model, self._tokenizer = model, tokenizer
        self._batch = ContinuousBatch(model, rows=rows, vocab_limit=tokenizer.vocab_size)
        self._max_tokens, self._temperature = max_tokens, temperature
        self.room, self.stops = model.config.max_position_embeddings - max_tokens, tokenizer.eos_ids
        if self.room < 1:
            raise InputError(f"max_tokens {max_tokens}: leaves no room for a prompt in the model's context of "
                             f"{model.config.max_position_embeddings} tokens")  # fmt: skip
        self._engine: Engine | None = None
        self._work: asyncio.Task[None] | None = None

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a chat that asks for an answer."""
        return self._tokenizer.ask_ids(messages)

    async def complete(self, prompt: Sequence[int], seed: int) -> tuple[str, str, int]:
        """Text of the answer, why it ended ("stop" or "length"), and its tokens.

        Raises:
            InputError: the prompt has more tokens than ``room``. RunError: the device has no memory left, or worse.
        """
        check_ids(self._model, "the prompt", prompt, self._max_tokens, "max_tokens")
        asked = self._running().ask(Wanted([*prompt], self._max_tokens, self._temperature, seed=seed))
        try:
            said = [one async for one in asked]
        except ApiError as error:
            raise RunError(f"{error.message}; a smaller concurrency takes less memory") from error
        finally:
            asked.cancel()  # where nobody waits for it any more
        return "".join(one.text for one in said), str(said[-1].finish), said[-1].count

    def _running(self) -> Engine:
        """The engine at work in this event loop; one that another loop left is done."""
        if self._engine is None or self._work is None or self._work.done():
            self._batch.clear()
            self._engine = Engine(self._batch, self._tokenizer, most_waiting=1 << 20)
            self._work = asyncio.get_running_loop().create_task(self._engine.work(), name="decoder")
        return self._engine
