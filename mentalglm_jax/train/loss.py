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


def answer_loss(model: Glm, batch: Batch, *, chunk: int, key: Array | None = None) -> LossSums:
    """Summed negative log-likelihood (nats), correct argmax predictions and number of the batch's targets.

    Args:
        model: the model, with or without adapter.
        batch: packed rows.
        chunk: target positions per row projected onto the vocabulary at once, at most.
        key: turns adapter dropout on.
    """
    hidden, _ = model.hidden_states(
        jnp.asarray(batch["tokens"]), jnp.asarray(batch["positions"]), jnp.asarray(batch["segment_ids"]), key=key
    )
    hidden = jnp.take_along_axis(hidden, jnp.asarray(batch["target_index"])[..., None], axis=1)
    hidden = spread_rows(hidden)
    ids, weights = jnp.asarray(batch["target_ids"]), jnp.asarray(batch["target_weights"])
    adapted = model.lm_head is not None and model.lm_head.adapter is not None
    return chunked_sums(model, hidden, ids, weights, chunk, key if adapted else None)


def chunked_sums(
    model: Glm, hidden: Float[Array, "B M D"], ids: Int[Array, "B M"], weights: Float[Array, "B M"], chunk: int,
    key: Array | None = None,
) -> LossSums:  # fmt: skip
    """``LossSums`` of hidden states that predict ``ids``; logits exist for ``B * chunk`` positions at a time.

    Args:
        hidden: normed hidden states.
        ids: the token each one predicts.
        weights: of each prediction in all three sums; 0 for an unused slot.
        chunk: positions per row in one chunk, at most; all chunks get the same size, with as little padding as that
            allows.
        key: turns the dropout of an adapter on lm_head on; every chunk has a mask of its own, the same when it is
            computed again.
    """
    count = hidden.shape[1]
    chunks = -(-count // chunk)
    chunk = -(-count // chunks)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk - count), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)

    def body(sums: LossSums, inputs: Any) -> tuple[LossSums, None]:
        h, target, weight, number = inputs
        logits = model.unembed(h, None if key is None else jax.random.fold_in(key, number))
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - chosen
        correct = (jnp.argmax(logits, axis=-1) == target) * weight
        return LossSums(sums.nll + (nll * weight).sum(), sums.correct + correct.sum(), sums.weight + weight.sum()), None

    zero = LossSums(*(jnp.float32(0) for _ in range(3)))
    parts = split(hidden), split(ids), split(weights), None if key is None else jnp.arange(chunks)
    sums, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), zero, parts)  # a scan already prevents CSE
    return sums
