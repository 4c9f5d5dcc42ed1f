"""Next-token loss on answer tokens only, without ever holding all logits.

Hidden states of the target positions are gathered first, so that prompt and padding positions never reach the
vocabulary projection; the projection then runs chunk by chunk and is computed again in the backward pass.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mentalglm_jax.data.batches import Batch
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.model.layout import spread_rows


class LossSums(NamedTuple):
    """Sums, not means: they add up exactly over micro-batches and devices. Divide by ``weight`` at the end."""

    nll: Float[Array, ""]
    correct: Float[Array, ""]
    weight: Float[Array, ""]

    @property
    def total(self) -> Float[Array, ""]:
        """What is minimised, times ``weight``."""
        return self.nll

    def means(self) -> dict[str, Float[Array, ""]]:
        """What a step tells: ``loss`` (nats per target), ``accuracy``, ``targets``."""
        weight = jnp.maximum(self.weight, 1)
        return {"loss": self.nll / weight, "accuracy": self.correct / weight, "targets": self.weight}


class TargetScores(NamedTuple):
    """Of every target slot: its log-probability (nats), and 1.0 where it is the likeliest token."""

    log_p: Float[Array, "B M"]
    correct: Float[Array, "B M"]


def answer_loss(model: Glm, batch: Batch, *, chunk: int, key: Array | None = None) -> LossSums:
    """Summed negative log-likelihood (nats), correct argmax predictions and number of the batch's targets.

    Args:
        model: the model, with or without adapter.
        batch: packed rows.
        chunk: target positions per row projected onto the vocabulary at once, at most.
        key: turns adapter dropout on.
    """
    return weighed(answer_scores(model, batch, chunk=chunk, key=key), jnp.asarray(batch["target_weights"]))


def answer_scores(model: Glm, batch: Batch, *, chunk: int, key: Array | None = None) -> TargetScores:
    """The scores of the batch's targets; arguments as of ``answer_loss``."""
    hidden, _ = model.hidden_states(
        jnp.asarray(batch["tokens"]), jnp.asarray(batch["positions"]), jnp.asarray(batch["segment_ids"]), key=key
    )
    hidden = jnp.take_along_axis(hidden, jnp.asarray(batch["target_index"])[..., None], axis=1)
    hidden = spread_rows(hidden)
    adapted = model.lm_head is not None and model.lm_head.adapter is not None
    return chunked_scores(model, hidden, jnp.asarray(batch["target_ids"]), chunk, key if adapted else None)


def weighed(scores: TargetScores, weights: Float[Array, "B M"]) -> LossSums:
    """The sums of scores, each times its weight; 0 for an unused slot."""
    return LossSums(-(scores.log_p * weights).sum(), (scores.correct * weights).sum(), weights.sum())


def chunked_scores(
    model: Glm, hidden: Float[Array, "B M D"], ids: Int[Array, "B M"], chunk: int, key: Array | None = None
) -> TargetScores:
    """``TargetScores`` of hidden states that predict ``ids``; logits exist for ``B * chunk`` positions at a time.

    Args:
        hidden: normed hidden states.
        ids: the token each one predicts.
        chunk: positions per row in one chunk, at most; all chunks get the same size, with as little padding as that
            allows.
        key: turns the dropout of an adapter on lm_head on; every chunk has a mask of its own, the same when it is
            computed again.
    """
    rows, count = ids.shape
    chunks = -(-count // chunk)
    chunk = -(-count // chunks)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk - count), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(rows, chunks, chunk, *x.shape[2:]), 1, 0)

    def body(carry: None, inputs: Any) -> tuple[None, TargetScores]:
        h, target, number = inputs
        logits = model.unembed(h, None if key is None else jax.random.fold_in(key, number))
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        correct = (jnp.argmax(logits, axis=-1) == target).astype(jnp.float32)
        return None, TargetScores(chosen - jax.nn.logsumexp(logits, axis=-1), correct)

    parts = split(hidden), split(ids), None if key is None else jnp.arange(chunks)
    _, found = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), None, parts)  # a scan already prevents CSE
    whole = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, chunks * chunk)[:, :count], found)
    return TargetScores(*whole)
