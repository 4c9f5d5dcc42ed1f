"""BARTScore with a local BART (Yuan et al. 2021, arXiv 2106.11520), computed in JAX.

How probable one text is after another, for an encoder-decoder the user has (bart-base, fnlp/bart-base-chinese, ...):
``config.json``, ``model.safetensors`` and ``tokenizer.json`` or ``vocab.txt``. Natural logarithm, mean over the tokens
of the text that is scored, its special tokens included, as the authors' code has it; weights of 1, no prompt.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.answers import Answer
from mentalglm_jax.evaluate.bertscore import LENGTHS, check_shapes, read_model, read_tokenizer, rows_for
from mentalglm_jax.foreign import Fields

_SHARED = ("model.shared.weight", "lm_head.weight", "model.encoder.embed_tokens.weight")
_OFFSET = 2  # BART's learned positions begin at 2
_EPS = 1e-5


class Bart:
    """A BART encoder-decoder, float32.

    Args:
        directory: a Hugging Face BART directory.

    Raises:
        InputError: a file is missing or damaged, or another architecture.
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        config, self._tensors = read_model(directory, "bart", "activation_function")
        read = Fields(config, str(directory / "config.json"))
        self._start = read.integer("decoder_start_token_id", 0, 1 << 24)
        self._shape = tuple(read.integer(name, 1, 1000) for name in (
            "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"))  # fmt: skip
        self._scale = read.integer("d_model", 1, 1 << 24) ** 0.5 if read.flag("scale_embedding", False) else 1.0
        self._longest = min(read.integer("max_position_embeddings", 2, 1 << 31), LENGTHS[-1])
        self._tokenizer = read_tokenizer(directory, self._longest)
        words = next((name for name in _SHARED if name in self._tensors), _SHARED[0])
        rows = {f"model.{side}.embed_positions.weight": self._longest + _OFFSET for side in ("encoder", "decoder")}
        rows[words] = max(rows_for(self._tokenizer), self._start + 1)
        for heads in self._shape[2:]:
            check_shapes(directory, self._tensors, _wanted(*self._shape[:2]), words, rows, heads)
        shared = self._tensors[words]
        used = {name: self._tensors[name] for name in _wanted(*self._shape[:2])}
        bias = self._tensors.get("final_logits_bias", jnp.zeros((1, shared.shape[0])))
        if bias.shape != (1, shared.shape[0]):
            raise InputError(f"{directory / 'model.safetensors'}: tensor 'final_logits_bias' does not fit {words!r}")
        self._tensors = used | {"shared": shared, "final_logits_bias": bias}

    def tokens(self, text: str) -> list[int]:
        """Ids of the text with the tokenizer's special tokens, cut to the longest input."""
        return list(self._tokenizer.encode(text).ids)

    def __call__(self, source: str, target: str) -> float:
        """Mean log-probability of the tokens of ``target`` after ``source``."""
        given, wanted = self.tokens(source), self.tokens(target)
        before = [self._start, *wanted[:-1]]
        rows = [self._padded(ids) for ids in (given, before, wanted)]
        lengths = np.asarray([len(given), len(wanted)], np.int32)
        return float(_log_probability(self._tensors, *rows, lengths, shape=self._shape, scale=self._scale))

    def _padded(self, ids: Sequence[int]) -> Int[np.ndarray, " S"]:
        size = min(next(length for length in LENGTHS if length >= len(ids)), self._longest)
        row = np.zeros(size, np.int32)
        row[: len(ids)] = ids
        return row


def bart_score(bart: Bart, answers: Sequence[Answer]) -> dict[str, dict[str, float | int]]:
    """Per language, over the explanations that are there (``missing`` counts the others: a text that is not there has
    no probability):

    ``from_post``: of the explanation after the post. Over the ``n`` that have a reference explanation also
    ``from_reference`` (the authors' precision), ``to_reference`` (recall) and ``f`` (the mean of both).
    """
    found: dict[str, dict[str, float | int]] = {}
    for language in sorted({answer.record.language for answer in answers}):
        said = [a for a in answers if a.record.language == language]
        there = [(a.record, a.explanation) for a in said if a.explanation]
        if not there:
            continue
        entry: dict[str, float | int] = {"missing": len(said) - len(there)}
        entry["from_post"] = float(np.mean([bart(record.post, text) for record, text in there]))
        pairs = [(record.explanation, text) for record, text in there if record.explanation is not None]
        if pairs:
            precision = float(np.mean([bart(reference, text) for reference, text in pairs]))
            recall = float(np.mean([bart(text, reference) for reference, text in pairs]))
            entry |= {"n": len(pairs), "from_reference": precision, "to_reference": recall,
                      "f": (precision + recall) / 2}  # fmt: skip
        found[language] = entry
    return found


def _wanted(encoder: int, decoder: int) -> list[str]:
    parts = []
    for side, layers in (("encoder", encoder), ("decoder", decoder)):
        parts.append(f"model.{side}.layernorm_embedding")
        blocks = ("self_attn",) if side == "encoder" else ("self_attn", "encoder_attn")
        for number in range(layers):
            at = f"model.{side}.layers.{number}"
            parts += [f"{at}.{block}.{part}_proj" for block in blocks for part in ("q", "k", "v", "out")]
            parts += [f"{at}.{part}" for part in ("fc1", "fc2", "final_layer_norm")]
            parts += [f"{at}.{block}_layer_norm" for block in blocks]
    names = [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    return [*names, *(f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder"))]


@functools.partial(jax.jit, static_argnames=("shape", "scale"))
def _log_probability(
    tensors: Mapping[str, Array], source: Int[Array, " S"], before: Int[Array, " T"], wanted: Int[Array, " T"],
    lengths: Int[Array, "2"], *, shape: tuple[int, ...], scale: float,
) -> Float[Array, ""]:  # fmt: skip
    """Mean log-probability of the first ``lengths[1]`` of ``wanted``; the source ends at ``lengths[0]``."""

    def norm(x: Array, name: str) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + _EPS)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def dense(x: Array, name: str) -> Array:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def attend(x: Array, to: Array, name: str, heads: int, hidden: Array) -> Array:
        q, k, v = (dense(y, f"{name}.{part}_proj").reshape(len(y), heads, -1)
                   for y, part in ((x, "q"), (to, "k"), (to, "v")))  # fmt: skip
        scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1]) + hidden
        mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores, axis=-1), v).reshape(len(x), -1)
        return dense(mixed, f"{name}.out_proj")

    def embed(ids: Array, side: str) -> Array:
        x = tensors["shared"][ids] * scale
        x = x + tensors[f"model.{side}.embed_positions.weight"][_OFFSET : _OFFSET + len(ids)]
        return norm(x, f"model.{side}.layernorm_embedding")

    def feed(x: Array, at: str) -> Array:
        wide: Any = jax.nn.gelu(dense(x, f"{at}.fc1"), approximate=False)
        return norm(x + dense(wide, f"{at}.fc2"), f"{at}.final_layer_norm")

    padding = jnp.where(jnp.arange(len(source)) < lengths[0], 0.0, -jnp.inf)
    x = embed(source, "encoder")
    for number in range(shape[0]):
        at = f"model.encoder.layers.{number}"
        x = norm(x + attend(x, x, f"{at}.self_attn", shape[2], padding), f"{at}.self_attn_layer_norm")
        x = feed(x, at)
    later = jnp.where(jnp.tri(len(before), dtype=bool), 0.0, -jnp.inf)
    y = embed(before, "decoder")
    for number in range(shape[1]):
        at = f"model.decoder.layers.{number}"
        y = norm(y + attend(y, y, f"{at}.self_attn", shape[3], later), f"{at}.self_attn_layer_norm")
        y = norm(y + attend(y, x, f"{at}.encoder_attn", shape[3], padding), f"{at}.encoder_attn_layer_norm")
        y = feed(y, at)
    logits = y @ tensors["shared"].T + tensors["final_logits_bias"][0]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), wanted[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.arange(len(wanted)) < lengths[1], chosen, 0.0).sum() / lengths[1]
