"""The arithmetic of a step against sums done by hand for glm-4-9b, and against the arrays of a small model."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mentalglm_jax.devices.hardware import TPUS
from mentalglm_jax.model.glm import Glm, GlmConfig, abstract_model
from mentalglm_jax.model.lora import LoraConfig, add_lora
from mentalglm_jax.model.quantize import abstract_quantized
from mentalglm_jax.planning.cost import (
    PASSES,
    abstract_mesh,
    bound,
    bytes_per_device,
    estimate_memory,
    shape_of,
    weight_bytes,
)
from tests.mentalglm_jax.tiny import tiny_config

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
EIGHT = {"data": 1, "fsdp": 8, "tensor": 1}
# Adapter parameters per layer and unit of rank: inputs plus outputs of q, k, v, o, gate_up, down.
ADAPTER = 40 * 16 * ((4096 + 4096) + 2 * (4096 + 256) + (4096 + 4096) + (4096 + 27392) + (13696 + 4096))


def trainee(quantize: str | None = None, remat: str = "full") -> Glm:
    def build() -> Glm:
        model = abstract_quantized(GlmConfig(), quantize, param_dtype=jnp.bfloat16, remat=remat)
        add_lora(model, LoraConfig(rank=16), nnx.Rngs(0))
        return model

    return nnx.eval_shape(build)


def a_step(**changes):
    return tiny_config(**({"rows": 8, "accumulate": 1, "sequence_length": 2048, "targets_per_row": 1024,
                           "loss_chunk": 256} | changes))  # fmt: skip


def test_weights_are_counted_exactly():
    frozen, adapter = bytes_per_device(trainee(), abstract_mesh(ONE))
    scales = 6 * 40 * 4  # one factor per adapter and layer
    assert frozen == 2 * 9_399_951_360 + scales
    assert adapter == 4 * ADAPTER
    eighth, _ = bytes_per_device(trainee(), abstract_mesh(EIGHT))
    whole = 2 * 40 * (2 * 4096 + 4096 + 2 * 256) + 2 * 4096 + scales  # norms and biases are on every device
    assert eighth == (frozen - whole) / 8 + whole
    kernels = 40 * (4096 * (4096 + 2 * 256) + 4096 * 4096 + 3 * 4096 * 13696)
    for method, bits in (("int8", 8), ("int4", 4.25), ("nf4", 4.25)):  # a bfloat16 scale per block of 64
        quantised, _ = bytes_per_device(trainee(method), abstract_mesh(ONE))
        outputs = 40 * (4096 + 2 * 256 + 4096 + 2 * 13696 + 4096)
        expected = frozen - 2 * kernels + kernels * bits / 8 + (4 * outputs if method == "int8" else 0)
        assert quantised == expected, method


def test_tied_embeddings_are_read_as_the_projection_they_are():
    sizes = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    apart, tied = (abstract_model(GlmConfig(**sizes, tie_word_embeddings=tie)) for tie in (False, True))
    assert weight_bytes(tied) == weight_bytes(apart) and weight_bytes(tied)[1] == 4 * 64 * 1000
    shape = shape_of(a_step(), EIGHT)
    one, other = (bound(model, shape, TPUS["v5e"]) for model in (apart, tied))
    assert (one.bandwidth, one.links, one.compute) == (other.bandwidth, other.links, other.compute)


def test_the_step_as_sizes():
    shape = shape_of(a_step(rows=64, accumulate=4), EIGHT)
    assert (shape.rows, shape.accumulate, shape.length, shape.targets, shape.chunk) == (2, 4, 2048, 1024, 256)
    assert shape_of(a_step(targets_per_row=None), ONE).targets == 2048
    assert shape_of(a_step(targets_per_row=300), ONE).chunk == 150  # as the loss cuts them: evenly


def test_flops_by_hand():
    least = bound(trainee(), shape_of(a_step(), EIGHT), TPUS["v5e"])
    tokens, body = 8 * 2048, 40 * (4096 * (4096 + 2 * 256) + 4096 * 4096 + 3 * 4096 * 13696)
    pairs = 8 * 2048 * 2049 / 2
    model = 4 * body * tokens + 4 * 4096 * 151552 * 8 * 1024 + 12 * 40 * 32 * 128 * pairs
    assert least.model_flops == pytest.approx(model, rel=1e-12)
    executed = (
        model + 6 * ADAPTER * tokens + 2 * 4096 * 151552 * 8 * 1024
        + 2 * (body + ADAPTER) * tokens + 4 * 40 * 32 * 128 * pairs
    )  # fmt: skip
    assert least.executed_flops == pytest.approx(executed, rel=1e-12)
    assert least.compute == pytest.approx(executed / 8 / 197e12)
    assert least.tokens == tokens and least.tokens_per_second == tokens / least.seconds
    assert least.limit == "compute"


def test_links_by_hand():
    model, chip = trainee(), TPUS["v5e"]
    assert bound(model, shape_of(a_step(), ONE), chip).links == 0
    stored = 2 * (40 * (4096 * (4096 + 2 * 256) + 4096 * 4096 + 3 * 4096 * 13696) + 4096 * 151552)
    gathered, reduced = 2 * stored * 7 / 8, 2 * 4 * ADAPTER * 7 / 8
    eight = bound(model, shape_of(a_step(), EIGHT), chip)
    assert eight.links == pytest.approx((gathered + reduced) / 200e9)
    twice = bound(model, shape_of(a_step(rows=16, accumulate=2), EIGHT), chip)
    assert twice.links == pytest.approx(2 * eight.links)  # every micro-batch gathers the weights anew
    cut = bound(model, shape_of(a_step(), {"data": 1, "fsdp": 1, "tensor": 8}), chip)
    residual = 8 * 2048 * 4096 * 2 * 7 / 8
    assert cut.links == pytest.approx(4 * 3 * 40 * residual / 200e9)


def test_more_of_anything_takes_more_memory():
    def total(sizes=ONE, quantize=None, remat="full", **changes):
        return estimate_memory(trainee(quantize, remat), shape_of(a_step(**changes), sizes)).total

    base = total(EIGHT)
    assert total(EIGHT, rows=16) > base and total(EIGHT, loss_chunk=512) > base
    assert total(EIGHT, rows=16, sequence_length=4096) > total(EIGHT, rows=16)
    assert total(EIGHT, remat="dots") > base and total(EIGHT, remat="none") > total(EIGHT, remat="dots")
    assert total(quantize="int4") < total(quantize="int8") < total()
    assert total({"data": 8, "fsdp": 1, "tensor": 1}) > base
    assert total(EIGHT, rows=16, accumulate=2) < total(EIGHT, rows=16)


def test_a_kept_activation_is_counted_where_it_is_kept():
    """What the estimate says remat saves is what the residuals of a real gradient weigh."""
    config = GlmConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=6,
                       num_attention_heads=4, num_key_value_heads=2, head_dim=16)  # fmt: skip
    graph, state = nnx.split(Glm(config, rngs=nnx.Rngs(0), remat="full"))
    tokens = jnp.zeros((4, 128), jnp.int32)
    _, pullback = jax.eval_shape(
        lambda state: jax.vjp(lambda s: nnx.merge(graph, s).hidden_states(tokens)[0], state), state
    )
    kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape == (6, 4, 128, 64)]
    assert sum(math.prod(leaf.shape) * 4 for leaf in kept) == 6 * 4 * 128 * 64 * 4
    assert PASSES["full"] == 3
