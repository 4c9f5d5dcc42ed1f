"""What the compiled step moves between eight (virtual) devices: weights, never other devices' logits."""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.layout import BATCH_AXES, gather_projection, mesh_in_force, on_mesh, spread_hidden, spread_rows
from mentalglm_jax.model.lora import LoraConfig, LoraParam, add_lora
from mentalglm_jax.model.sharding import make_mesh, shard_model
from mentalglm_jax.train import loss as loss_room
from mentalglm_jax.train.loss import answer_loss
from tests.mentalglm_jax.tiny import on_eight_devices

ROWS, LENGTH, TARGETS, CHUNK, VOCAB = 8, 32, 16, 4, 512


def test_nothing_happens_without_a_mesh():
    x = jnp.ones((2, 4, 8))
    assert mesh_in_force() is None and spread_hidden(x) is x and spread_rows(x) is x
    with on_mesh(None):
        assert mesh_in_force() is None
    with on_mesh(make_mesh()):  # of one device
        assert mesh_in_force() is None and spread_hidden(x) is x


def test_logits_stay_where_their_rows_are():
    found = on_eight_devices(__file__)
    assert [64, VOCAB] in found["gathered"]  # the projection
    assert not [shape for shape in found["gathered"] if shape[0] == ROWS and shape[-1] == VOCAB]
    # What XLA does on its own, or this test would prove nothing.
    assert [shape for shape in found["left alone"] if shape[0] == ROWS and shape[-1] == VOCAB]


def gathered_shapes(gather: Callable[..., Any]) -> list[list[int]]:
    """Shapes of what the compiled gradient of the loss gathers; as ``make_step`` builds it, ``gather`` aside."""
    mesh = make_mesh(1, 8, 1)
    config = GlmConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
                       num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = Glm(config, rngs=nnx.Rngs(0), remat="full")
    add_lora(model, LoraConfig(rank=4), nnx.Rngs(0))
    shard_model(model, mesh)
    graph, train, frozen = nnx.split(model, LoraParam, ...)
    placed = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    tokens, targets = jnp.ones((ROWS, LENGTH), jnp.int32), jnp.ones((ROWS, TARGETS), jnp.int32)
    batch = {"tokens": tokens, "positions": tokens, "segment_ids": tokens, "target_index": targets,
             "target_ids": targets, "target_weights": targets.astype(jnp.float32)}  # fmt: skip
    batch = jax.device_put(batch, placed)

    def loss(train, frozen, batch):
        with on_mesh(mesh):
            return answer_loss(nnx.merge(graph, train, gather(frozen)), batch, chunk=CHUNK).nll

    text = jax.jit(jax.grad(loss)).lower(train, frozen, batch).compile().as_text()
    return [[int(n) for n in dims.split(",")] for dims in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)]


def main() -> None:
    found = {"gathered": gathered_shapes(gather_projection)}
    pytest.MonkeyPatch().setattr(loss_room, "spread_rows", lambda hidden: hidden)
    found["left alone"] = gathered_shapes(lambda frozen: frozen)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
