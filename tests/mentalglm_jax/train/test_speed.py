"""The FLOP formula against the compiler's own count and a hand count; the clock leaves out what does not count."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mentalglm_jax.model.glm import GlmConfig, abstract_model
from mentalglm_jax.train import speed
from mentalglm_jax.train.speed import Speedometer, matrix_parameters, peak_flops, train_flops
from tests.mentalglm_jax.tiny import tiny_model

NINE_B = GlmConfig()


def test_matrix_parameters_are_those_of_the_model():
    for config in (NINE_B, tiny_model().config):
        model = abstract_model(config)
        kernels = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
        sizes = {name: int(np.prod(leaf.shape)) for name, leaf in kernels.items() if name.endswith(".kernel")}
        body = sum(size for name, size in sizes.items() if "layers" in name)
        assert matrix_parameters(config) == (body, sizes["lm_head.kernel"])


def test_flops_by_hand():
    body, head = matrix_parameters(NINE_B)
    found = train_flops(NINE_B, tokens=2048.0, targets=512.0, pairs=2048 * 2049 / 2, frozen=True)
    attention = 40 * 32 * 128 * 12 * 2048 * 2049 / 2
    assert found == pytest.approx(4 * (body * 2048 + head * 512) + attention)
    assert 0.05 < attention / found < 0.1  # what a count of 4N alone leaves out at 2,048 tokens
    everything = train_flops(NINE_B, tokens=2048.0, targets=512.0, pairs=0.0, frozen=False)
    assert everything == 1.5 * (found - attention)


def test_forward_flops_are_the_compilers():
    """A third of the count for a trained base is its forward pass: what XLA counts in the program, up to the small."""
    config = GlmConfig(vocab_size=512, hidden_size=128, intermediate_size=320, num_hidden_layers=1, head_dim=32,
                       num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    graph, state = nnx.split(abstract_model(config))
    tokens = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    program = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens)).lower(state, tokens)
    cost = program.cost_analysis()
    assert cost is not None
    # The program computes all query-key pairs, not only those that see each other.
    counted = train_flops(config, tokens=256.0, targets=256.0, pairs=256.0**2, frozen=False) / 3
    assert cost["flops"] == pytest.approx(counted, rel=0.08)


def test_the_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Speedometer(NINE_B, True, 1e15)
    meter.count(1000.0, 100.0, 5000.0)  # the step that compiled: the clock starts as it ends
    assert meter.rates()["tokens_per_second"] == 0
    now[0] += 2
    meter.count(1000.0, 100.0, 5000.0)
    with meter.pause():
        now[0] += 50  # an evaluation
    rates = meter.rates()
    assert (rates["tokens_per_second"], rates["answer_tokens_per_second"]) == (500, 50)
    flops = train_flops(NINE_B, tokens=1000.0, targets=100.0, pairs=5000.0, frozen=True)
    assert rates["mfu"] == pytest.approx(flops / 2 / 1e15)
    assert meter.text() == f"500 tokens/s (50 answer, MFU {rates['mfu']:.1%})"
    without = Speedometer(NINE_B, True, None)
    assert "mfu" not in without.rates() and "MFU" not in without.text()


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12), ("TPU v4", 275e12), ("TPU7x", 1153.5e12),
     ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA L40S", 362e12), ("cpu", None)],
)  # fmt: skip
def test_peaks(monkeypatch, kind, peak):
    class Device:
        device_kind = kind

    monkeypatch.setattr(speed.jax, "devices", lambda: [Device()] * 2)
    monkeypatch.setattr(speed.jax, "device_count", lambda: 2)
    assert peak_flops() == (None if peak is None else np.float64(2 * peak))
