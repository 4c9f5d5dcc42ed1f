"""The order in which a mesh names its devices changes no loss by a bit, and any mesh trains as one device does."""

import json
import sys
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from mentalglm_jax.data.batches import PackedBatches
from mentalglm_jax.devices.distributed import spread
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.lora import LoraConfig, add_lora
from mentalglm_jax.model.sharding import make_mesh, shard_model
from mentalglm_jax.train.step import make_optimizer, make_step
from tests.mentalglm_jax.tiny import VOCAB, on_eight_devices, tiny_config, tiny_examples

STEPS = 12
METHODS: dict[str, dict[str, Any]] = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
ORDERS = {"given": [*range(8)], "reversed": [*reversed(range(8))], "shuffled": [3, 6, 0, 5, 1, 7, 2, 4]}


def losses(method: str, mesh: Any) -> list[float]:
    """Of a fresh adapter, B = 0, without a warm-up: the start at which rounding has the most to say."""
    config = GlmConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
                       num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)  # fmt: skip
    model = Glm(config, rngs=nnx.Rngs(0))
    add_lora(model, LoraConfig(rank=4, alpha=8.0, dropout=0.2, **METHODS[method]), nnx.Rngs(1))
    settings = tiny_config(steps=STEPS, rows=8, accumulate=1, warmup_ratio=0.0, schedule="constant")
    if mesh is not None:
        shard_model(model, mesh)
    step: Any
    step, state, frozen = make_step(model, make_optimizer(settings, STEPS), settings, "lora", mesh)
    packed = iter(PackedBatches(tiny_examples(60), rows=8, sequence_length=32, targets_per_row=None, seed=1))
    train, optimizer, found = state.trainable, state.optimizer, []
    for number in range(STEPS):
        batch: Any = {**next(packed)}
        batch = {name: x[None] for name, x in batch.items()} if mesh is None else spread(batch, 8, 1, mesh, None)
        train, optimizer, out = step(train, optimizer, frozen, batch, jax.random.fold_in(jax.random.key(0), number))
        found.append(float(out["loss"]))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", METHODS)
def test_any_order_of_devices_trains_the_same(method):
    found = on_eight_devices(__file__, method)
    wanted = losses(method, None)
    assert len(set(wanted)) == STEPS and wanted[-1] < wanted[0]
    for sizes, orders in found.items():
        assert orders["reversed"] == orders["given"] == orders["shuffled"], sizes
        np.testing.assert_allclose(orders["given"], wanted, rtol=0, atol=1e-5, err_msg=sizes)


def main(method: str) -> None:
    found: dict[str, dict[str, list[float]]] = {}
    for sizes in ((2, 2, 2), (1, 2, 4)):
        found[str(sizes)] = {}
        for name, order in ORDERS.items():
            devices = [jax.devices()[number] for number in order]
            found[str(sizes)][name] = losses(method, make_mesh(*sizes, devices=devices))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
