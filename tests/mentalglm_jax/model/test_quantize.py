"""Quantised bases: what they round, that nothing else changes, that adapters train on them, that they stay small."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mentalglm_jax.checkpoints.adapters import load_adapter, save_adapter
from mentalglm_jax.checkpoints.directories import load, save_pretrained
from mentalglm_jax.errors import InputError
from mentalglm_jax.model import quantize
from mentalglm_jax.model.glm import Glm, GlmConfig, abstract_model
from mentalglm_jax.model.lora import Adapter, LoraConfig, LoraParam, add_lora, linears, merge_lora, parameter_count
from mentalglm_jax.model.quantize import (
    METHODS,
    NF4,
    abstract_quantized,
    decoded,
    encode,
    layer_linears,
    quantization,
    quantize_model,
)
from mentalglm_jax.train.step import make_optimizer, make_step
from tests.mentalglm_jax.tiny import parameters, same, tiny_config

CONFIG = GlmConfig(vocab_size=96, hidden_size=128, intermediate_size=96, num_hidden_layers=3, head_dim=32,
                   num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 11)), jnp.int32)
# Of normal weights: root mean square of what is lost, relative to that of the weights; and the same of the logits of
# the random model below, three layers deep.
WEIGHT_ERROR = {"int8": 0.010, "int4": 0.115, "nf4": 0.100}
LOGIT_ERROR = {"int8": 0.03, "int4": 0.40, "nf4": 0.35}
# Of the quantised kernels of glm-4-9b, scales included.
BYTES_PER_WEIGHT = {"int8": 1.001, "int4": 0.53125, "nf4": 0.53125}


@pytest.fixture(scope="module")
def base() -> Glm:
    return Glm(CONFIG, rngs=nnx.Rngs(0))


def quantized(base: Glm, method: str) -> Glm:
    model = nnx.clone(base)
    quantize_model(model, method)
    return model


def dequantized(model: Glm) -> Glm:
    """The same values in plain parameters."""
    model = nnx.clone(model)
    for linear in layer_linears(model).values():
        linear.kernel = nnx.Param(linear.kernel[...])
    return model


def logits(model: Glm) -> np.ndarray:
    with jax.disable_jit():
        return np.asarray(model(TOKENS))


def relative(found, wanted) -> float:
    return float(np.linalg.norm(np.asarray(found) - np.asarray(wanted)) / np.linalg.norm(np.asarray(wanted)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inputs", [192, 40])
def test_a_kernel_is_rounded_to_its_nearest_levels(method, inputs):
    kernel = np.random.default_rng(0).normal(0, 0.05, (2, inputs, 33)).astype(np.float32)
    kernel[1, :, 7] = 0
    kernel[0, 3, 5] = 4.0  # an outlier spoils its own channel or block only
    first, second = encode(jnp.asarray(kernel), method)
    found = np.asarray(decoded(first, second, method, jnp.float32)[...])
    block = {192: 64, 48: 16, 40: 8}[inputs] if method != "int8" else inputs
    blocks = kernel.reshape(2, inputs // block, block, 33)
    scales = np.abs(blocks).max(2, keepdims=True) / {"int8": 127, "int4": 7, "nf4": 1}[method]
    if method != "int8":
        scales = np.array(jnp.asarray(scales).astype(jnp.bfloat16).astype(jnp.float32))
    scales[scales == 0] = 1
    levels = {"int8": np.arange(-127, 128), "int4": np.arange(-7, 8), "nf4": np.asarray(NF4)}[method]
    nearest = np.abs((blocks / scales)[..., None] - levels.astype(np.float32)).argmin(-1)
    wanted = (levels.astype(np.float32)[nearest] * scales).reshape(kernel.shape)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=0)
    assert not found[1, :, 7].any()
    error = relative(np.delete(found, 5, 2), np.delete(kernel, 5, 2))
    assert error <= WEIGHT_ERROR[method] * (1 if inputs == 192 else 1.02)


def test_the_levels_of_nf4_are_those_of_its_definition():
    """Dettmers et al. 2023: normal quantiles evenly spaced in probability, eight positive and seven negative, and 0."""
    from statistics import NormalDist

    offset, inverse = 0.9677083, NormalDist().inv_cdf
    positive = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.sort(np.asarray([*positive, 0.0, *negative]))
    np.testing.assert_allclose(NF4, levels / levels.max(), atol=1e-6)
    assert all(low < high for low, high in itertools.pairwise(NF4))


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_the_one_with_the_rounded_weights(base, method):
    model = quantized(base, method)
    assert quantization(model) == method
    assert quantization(base) is None
    plain = dequantized(model)
    found = logits(model)
    assert relative(found, logits(plain)) <= 1e-5
    for path, linear in layer_linears(base).items():
        kernel, rounded = np.asarray(linear.kernel[...]), np.asarray(layer_linears(plain)[path].kernel[...])
        assert layer_linears(model)[path].kernel.shape == kernel.shape
        for layer in range(CONFIG.num_hidden_layers):
            assert 0 < relative(rounded[layer], kernel[layer]) <= WEIGHT_ERROR[method], (path, layer)
    assert WEIGHT_ERROR["int8"] / 3 < relative(found, logits(base)) <= LOGIT_ERROR[method]
    kept = {name: value for name, value in parameters(model).items() if ".kernel." not in name}
    assert same(kept, {name: value for name, value in parameters(base).items() if name in kept})
    assert {"embed_tokens.embedding", "lm_head.kernel", "norm.weight", "layers.self_attn.q_proj.bias"} <= kept.keys()


@pytest.mark.parametrize(("method", "dora"), [("int8", False), ("int4", False), ("nf4", True)])
def test_adapters_get_the_gradients_of_the_rounded_weights(base, method, dora):
    model = quantized(base, method)
    plain = dequantized(model)
    found = []
    for each in (model, plain):
        add_lora(each, LoraConfig(rank=4, use_dora=dora), nnx.Rngs(0))
        for number, (_, linear) in enumerate(linears(each)):
            if isinstance(linear.adapter, Adapter):
                b = linear.adapter.b
                b.set_value(0.1 * jax.random.normal(jax.random.key(number), b.shape))
        graph, adapter, rest = nnx.split(each, LoraParam, ...)

        def loss(adapter, rest, graph=graph):
            return jax.nn.log_softmax(nnx.merge(graph, adapter, rest)(TOKENS))[..., 1].sum()

        with jax.disable_jit():
            found.append(jax.tree.leaves_with_path(jax.grad(loss)(adapter, rest)))
    for (path, ours), (_, wanted) in zip(*found, strict=True):
        assert relative(ours, wanted) <= 1e-4, jax.tree_util.keystr(path)


@pytest.mark.parametrize(("method", "remat"), [("int8", "none"), ("int4", "none"), ("nf4", "dots")])
def test_no_program_holds_the_base_dequantised(method, remat):
    """Forward, backward and the addition of an adapter: floating arrays as large as one kernel of all layers."""

    def build(dora: bool) -> Glm:
        model = Glm(CONFIG, rngs=nnx.Rngs(0), remat=remat)
        quantize_model(model, method)
        add_lora(model, LoraConfig(rank=2, use_dora=dora), nnx.Rngs(0))
        return model

    graph, adapter, rest = nnx.split(nnx.eval_shape(lambda: build(False)), LoraParam, ...)

    def loss(adapter, rest):
        return nnx.merge(graph, adapter, rest)(TOKENS).sum()

    assert not stacked(jax.make_jaxpr(jax.grad(loss))(adapter, rest))
    kernel = rest["layers"]["self_attn"]["q_proj"]["kernel"]
    graph_of_kernel = nnx.graphdef(nnx.eval_shape(lambda: build(False)).layers.self_attn.q_proj.kernel)
    from mentalglm_jax.model.lora import _norms_of

    assert not stacked(jax.make_jaxpr(lambda arrays: _norms_of(nnx.merge(graph_of_kernel, arrays)))(kernel))
    # the check sees what it is for
    assert stacked(jax.make_jaxpr(lambda arrays: nnx.merge(graph_of_kernel, arrays)[...])(kernel))


def stacked(jaxpr) -> list[str]:
    shapes = {(CONFIG.num_hidden_layers, *shape) for shape in ((128, 128), (128, 64), (128, 192), (96, 128))}
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                aval = variable.aval
                if getattr(aval, "shape", None) in shapes and jnp.issubdtype(aval.dtype, jnp.floating):
                    found.append(f"{equation.primitive} {aval}")
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(inner, "eqns"):
                    walk(getattr(inner, "jaxpr", inner))

    walk(jaxpr.jaxpr)
    return found


def test_the_memory_check_sees_what_jax_would_keep(monkeypatch):
    """Without the backward pass of its own, the scan keeps every layer's dequantised kernel."""

    def naive(method, x, codes, scales):
        return quantize.matmul(x, quantize._dequantise(method, codes, scales, x.dtype))

    monkeypatch.setattr(quantize, "_block_matmul", naive)
    with pytest.raises(AssertionError):
        test_no_program_holds_the_base_dequantised("int4", "none")


@pytest.mark.parametrize(("method", "layout", "dtype"), [("int8", "glm", "float32"), ("nf4", "chatglm", "bfloat16")])
def test_loading_quantises_as_it_reads(base, tmp_path, method, layout, dtype):
    save_pretrained(base, tmp_path / "base", layout=layout, dtype=dtype)
    model = load(tmp_path / "base", dtype=dtype, quantize=method, rope_theta=1e4)
    whole = load(tmp_path / "base", dtype=dtype, rope_theta=1e4)
    assert same(parameters(model), parameters(quantized(whole, method)))
    assert model.layers.mlp.down_proj.kernel[...].dtype == jnp.dtype(dtype)
    # an adapter trained on it is PEFT's like any other, and goes on the base as it is too
    add_lora(model, LoraConfig(rank=2), nnx.Rngs(0))
    save_adapter(model, tmp_path / "adapter")
    load_adapter(whole, tmp_path / "adapter")
    again = load(tmp_path / "base", adapter=tmp_path / "adapter", dtype=dtype, quantize=method, rope_theta=1e4)
    assert same(parameters(again), parameters(model))


def test_a_quantised_base_is_as_small_as_stated():
    config = GlmConfig()
    whole = {path: linear.kernel for path, linear in layer_linears(abstract_model(config)).items()}
    weights = sum(kernel.size for kernel in whole.values())
    for method in METHODS:
        model = abstract_quantized(config, method, param_dtype=jnp.bfloat16)
        assert {path: linear.kernel.shape for path, linear in layer_linears(model).items()} == {
            path: kernel.shape for path, kernel in whole.items()
        }
        size = sum(
            leaf.size * leaf.dtype.itemsize
            for linear in layer_linears(model).values() for leaf in jax.tree.leaves(nnx.state(linear.kernel))
        )  # fmt: skip
        assert size / weights == pytest.approx(BYTES_PER_WEIGHT[method], abs=1e-3)
        assert model.lm_head is not None
        assert model.lm_head.kernel.dtype == model.embed_tokens.embedding.dtype == jnp.bfloat16


def test_parameters_are_counted_as_the_weights_they_stand_for(base):
    count = parameter_count(base)
    assert count == sum(value.size for value in parameters(base).values())
    assert [parameter_count(abstract_quantized(CONFIG, method)) for method in METHODS] == [count] * 3
    assert parameter_count(nnx.state(base)) == count


def test_what_does_not_go_is_refused(base, tmp_path):
    with pytest.raises(InputError, match=r"quantize='int3' is not one of int8, int4, nf4"):
        load(tmp_path, quantize="int3")
    model = quantized(base, "int8")
    with pytest.raises(InputError, match=r"already quantised \(int8\)"):
        quantize_model(model, "nf4")
    for merge in (True, False):
        with pytest.raises(
            InputError, match=r"save_pretrained: the base is quantised .*load the base without quantize"
        ):
            save_pretrained(model, tmp_path / "out", merge=merge)
    add_lora(model, LoraConfig(rank=2), nnx.Rngs(0))
    with pytest.raises(InputError, match=r"merge_lora: the base is quantised \(int8\)"):
        merge_lora(model)
    adapted = nnx.clone(base)
    add_lora(adapted, LoraConfig(rank=2), nnx.Rngs(0))
    with pytest.raises(InputError, match="quantise the base first"):
        quantize_model(adapted, "int8")
    abstract, config = abstract_quantized(CONFIG, "int8"), tiny_config()
    with pytest.raises(InputError, match=r"'all', but the base is quantised \(int8\) and frozen"):
        make_step(abstract, make_optimizer(config, 1), config, "all")
    with pytest.raises(InputError, match="33 inputs has no even block; use int8"):
        encode(jnp.zeros((33, 4)), "nf4")
