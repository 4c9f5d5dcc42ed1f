"""A small model behind the real endpoint, in a thread of the tests' own process."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
from flax import nnx

from mentalglm_jax.checkpoints.directories import save_pretrained
from mentalglm_jax.inference.generate import answer_text, generate_ids
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.serve.server import address, listen, make_server
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer

CONTEXT = 3000


def small_model(tokenizer: GlmTokenizer, std: float = 0.4) -> Glm:
    config = GlmConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                       head_dim=8, num_attention_heads=2, num_key_value_heads=2, initializer_range=std,
                       max_position_embeddings=4096, eos_token_id=tokenizer.eos_ids,
                       pad_token_id=tokenizer.pad_id)  # fmt: skip
    return Glm(config, rngs=nnx.Rngs(3))


def save_small_model(directory: Path) -> None:
    tokenizer = GlmTokenizer.load(BUILTIN)
    save_pretrained(small_model(tokenizer), directory, tokenizer=tokenizer)


class Served:
    """``url`` ends in ``/v1``; ``engine`` is the one behind it."""

    def __init__(self, model: Glm, tokenizer: GlmTokenizer, url: str, key: str | None):
        self.model, self.tokenizer, self.url, self.key = model, tokenizer, url, key
        self.clients: list[openai.OpenAI] = []

    def client(self, **options: Any) -> openai.OpenAI:
        given: dict[str, Any] = {"api_key": self.key or "none", "max_retries": 0, **options}
        self.clients.append(openai.OpenAI(base_url=self.url, **given))
        return self.clients[-1]

    def said(self, messages: list[dict[str, str]], room: int, **options: Any) -> tuple[list[int], str]:
        """The ids and the text of the answer by ``generate_ids``, on which `mentalglm generate` rests."""
        (ids,) = generate_ids(self.model, [self.tokenizer.ask_ids(messages)], max_new_tokens=room,
                              eos_ids=self.tokenizer.eos_ids, vocab_limit=self.tokenizer.vocab_size,
                              **options)  # fmt: skip
        return ids, answer_text(self.tokenizer, ids)


@contextlib.contextmanager
def serving(*, rows: int = 4, waiting: int = 8, key: str | None = None, model: Glm | None = None) -> Iterator[Served]:
    """The endpoint of a small model, with the name "small"."""
    tokenizer = GlmTokenizer.load(BUILTIN)
    model = model or small_model(tokenizer)
    with listen(0) as at:
        server = make_server(model, tokenizer, name="small", rows=rows, waiting=waiting, context=CONTEXT, key=key)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield (served := Served(model, tokenizer, address(at), key))
            for client in served.clients:
                client.close()
        finally:
            server.should_exit = True
            thread.join(300)
            assert not thread.is_alive()
