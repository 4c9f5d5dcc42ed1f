"""The forward pass against transformers, at an initialisation (std 0.2) where mistakes show; then named mutations, each
of which must fail the same check. Tolerance everywhere: max |Δ| <= 1e-5 * max |reference| in float32."""

import dataclasses
import gc
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from mentalglm_jax.errors import InputError
from mentalglm_jax.model import attention, glm
from mentalglm_jax.model.glm import Glm, GlmConfig, KVCache, abstract_model, restarting_positions
from mentalglm_jax.model.rope import rope_frequencies

TOLERANCE = 1e-5


VARIANTS = ["glm", "glm4", "glm4-yarn", "edge", "tied", "wide-heads", "theta-5e6", "theta-1e8"]


TOKENS = np.random.default_rng(0).integers(4, 96, (2, 19)).astype(np.int32)


@pytest.fixture(scope="module")
def pairs(hf):
    """Every variant: the transformers model, the same in ours, and the reference logits."""
    found = {}
    for name in VARIANTS:
        model = hf.variant(name)
        found[name] = model, hf.to_jax(model), hf.logits(model, TOKENS)
    return found


def layer_outputs(model: Glm, tokens: np.ndarray, positions: np.ndarray | None = None) -> list[jax.Array]:
    """The residual stream after every layer, run one by one outside the scan; the last one normed, as transformers
    reports it."""
    segments = jnp.ones(tokens.shape, jnp.int32)
    places = restarting_positions(segments) if positions is None else jnp.asarray(positions)
    rope = glm.rope_tables(model.config, places, model.dtype)
    graph, parameters = nnx.split(model.layers)
    outputs = [model.embed_tokens.embedding[...][tokens]]
    with jax.disable_jit():
        for layer in range(model.config.num_hidden_layers):
            module = nnx.merge(graph, jax.tree.map(lambda leaf, layer=layer: leaf[layer], parameters))
            outputs.append(module(outputs[-1], rope, segments, None, 0, None, "xla")[0])
        return [*outputs[1:-1], model.norm(outputs[-1])]


def layers_match(hf, model, ours: Glm, tokens: np.ndarray, positions: np.ndarray | None = None) -> None:
    """Every layer's output against transformers'."""
    places = None if positions is None else torch.tensor(positions)
    with torch.no_grad():
        expected = model(torch.tensor(tokens), position_ids=places, output_hidden_states=True).hidden_states[1:]
    for found, wanted in zip(layer_outputs(ours, tokens, positions), expected, strict=True):
        assert hf.error(found, wanted.numpy()) <= TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layer_and_the_logits_match_transformers(hf, pairs, name):
    model, ours, reference = pairs[name]
    layers_match(hf, model, ours, TOKENS)
    logits = hf.run(ours, TOKENS, jit=True)
    assert logits.dtype == jnp.float32
    assert hf.error(logits, reference) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "start"),
    [("glm", 4077), ("glm4", 32749), ("glm4-yarn", 4077), ("theta-5e6", 131053), ("edge", 131053),
     ("theta-1e8", 1048557)],
)  # fmt: skip
def test_positions_far_from_zero(hf, pairs, name, start):
    """Under jit, where a compiled power would be some ulp off and turn the pairs visibly this far out."""
    model, ours, _ = pairs[name]
    # Attention sees differences of positions only: one row is far from zero, the other spread over the whole range.
    length = TOKENS.shape[1]
    positions = np.stack([np.arange(start, start + length), np.linspace(0, start, length)]).astype(np.int32)
    reference = hf.logits(model, TOKENS, position_ids=torch.tensor(positions))
    assert hf.error(hf.run(ours, TOKENS, positions, jit=True), reference) <= TOLERANCE
    layers_match(hf, model, ours, TOKENS, positions)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glm", "glm4"])
def test_every_position_of_a_long_row(hf, pairs, name):
    """Positions 0 to 4095 in one row."""
    model, ours, _ = pairs[name]
    tokens = np.random.default_rng(2).integers(4, 96, (1, 4096)).astype(np.int32)
    layers_match(hf, model, ours, tokens)
    assert hf.error(hf.run(ours, tokens), hf.logits(model, tokens)) <= TOLERANCE


@pytest.mark.parametrize("theta", [1e4, 5e6, 1e8])
def test_rotary_frequencies_are_rounded_as_in_torch(theta):
    expected = 1.0 / (theta ** (torch.arange(0, 64, 2, dtype=torch.int64).float() / 64))
    found, scale = rope_frequencies(64, theta, None)
    assert scale == 1.0
    np.testing.assert_allclose(found, expected.numpy(), rtol=1.2e-7)
    assert (found != expected.numpy()).sum() <= 1


@pytest.mark.parametrize("name", ["glm", "glm4"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(hf, pairs, name, side):
    model, ours, _ = pairs[name]
    mask = np.ones_like(TOKENS)
    mask[1, :6] = 0
    if side == "right":
        mask = mask[:, ::-1].copy()
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    tokens = np.where(mask, TOKENS, 0)
    reference = hf.logits(model, tokens, attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions))
    found = hf.run(ours, tokens, segment_ids=mask)
    assert np.isfinite(found).all()
    assert hf.error(found[mask == 1], reference[mask == 1]) <= TOLERANCE


SEGMENTS = np.array([[1] * 7 + [2] * 9 + [0] * 3, [4] * 4 + [1] * 15], np.int32)


def packed_error(hf, model, ours) -> float:
    """The worst deviation of packed rows from their parts run alone in transformers."""
    found = hf.run(ours, TOKENS, segment_ids=SEGMENTS)
    parts = [(row, SEGMENTS[row] == number) for row, number in ((0, 1), (0, 2), (1, 4), (1, 1))]
    return max(hf.error(found[row][mine], hf.logits(model, TOKENS[row][mine][None])[0]) for row, mine in parts)


@pytest.mark.parametrize("name", ["glm", "glm4"])
def test_a_packed_row_equals_its_parts_alone(hf, pairs, name):
    model, ours, _ = pairs[name]
    assert packed_error(hf, model, ours) <= TOLERANCE
    alone = hf.run(ours, TOKENS[:1, 7:16], jit=True)
    assert hf.error(hf.run(ours, TOKENS, segment_ids=SEGMENTS)[0, 7:16], alone[0]) <= 2e-6


def test_positions_restart_at_every_change_of_segment():
    segments = jnp.array([[0, 0, 1, 1, 2, 2, 2, 0], [5, 5, 5, 5, 0, 0, 0, 0]])
    expected = [[0, 1, 0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert restarting_positions(segments).tolist() == expected


def cached_logits(compiled, ours: Glm, tokens: np.ndarray, mask: np.ndarray, prefill: int) -> np.ndarray:
    """The prompt at once, then token by token through the cache."""
    cache = KVCache.empty(ours.config, len(tokens), tokens.shape[1] + 3, jnp.float32)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    tokens, positions, mask = (jnp.asarray(value, jnp.int32) for value in (tokens, positions, mask))
    graph, state = nnx.split(ours)
    step = compiled(lambda state, *inputs: nnx.merge(graph, state).hidden_states(*inputs))
    outputs = []
    for part in [slice(0, prefill), *(slice(i, i + 1) for i in range(prefill, tokens.shape[1]))]:
        hidden, cache = step(state, tokens[:, part], positions[:, part], mask[:, part], cache)
        outputs.append(hidden)
    assert int(cache.length) == tokens.shape[1]
    return np.asarray(ours.unembed(jnp.concatenate(outputs, axis=1)))


@pytest.mark.parametrize("name", ["glm", "glm4-yarn"])
def test_the_cache_gives_the_logits_of_the_full_row(hf, pairs, name):
    _, ours, reference = pairs[name]
    assert hf.error(cached_logits(hf.compiled, ours, TOKENS, np.ones_like(TOKENS), 15), reference) <= TOLERANCE


def test_the_cache_holds_left_padded_rows(hf, pairs):
    _, ours, _ = pairs["glm"]
    mask = np.ones_like(TOKENS)
    mask[1, :5] = 0
    found = cached_logits(hf.compiled, ours, TOKENS, mask, 15)
    assert hf.error(found[mask == 1], hf.run(ours, TOKENS, segment_ids=mask)[mask == 1]) <= TOLERANCE


@pytest.mark.parametrize(("name", "remat"), [("glm", "full"), ("glm4", "none"), ("tied", "dots")])
def test_gradients_match_transformers(hf, name, remat):
    model = hf.variant(name)
    tokens = TOKENS.copy()
    tokens[0, 3] = tokens[1, 5] = 0  # the padding token inside a row: transformers never moves its embedding
    weight = np.random.default_rng(1).normal(size=(*TOKENS.shape, 96)).astype(np.float32)
    (model(torch.tensor(tokens)).logits.log_softmax(-1) * torch.tensor(weight)).mean().backward()
    ours = hf.to_jax(model, remat=remat)
    graph, state = nnx.split(ours)

    def loss(state):
        return (jax.nn.log_softmax(nnx.merge(graph, state)(jnp.asarray(tokens))) * weight).mean()

    gradients = hf.compiled(jax.grad(loss))(state)
    theirs = {key: value.grad.numpy() for key, value in model.named_parameters() if value.grad is not None}
    for found, wanted in (
        (gradients.embed_tokens.embedding, theirs["model.embed_tokens.weight"]),
        (gradients.layers.self_attn.k_proj.bias[0], theirs["model.layers.0.self_attn.k_proj.bias"]),
        (gradients.layers.mlp.gate_up_proj.kernel[1].T, theirs["model.layers.1.mlp.gate_up_proj.weight"]),
        (gradients.layers.input_layernorm.weight[2], theirs["model.layers.2.input_layernorm.weight"]),
    ):
        found, wanted = np.asarray(found[...], np.float64).ravel(), wanted.astype(np.float64).ravel()
        cosine = found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted)
        assert cosine >= 0.99999
        assert np.linalg.norm(found - wanted) <= 1e-4 * np.linalg.norm(wanted)


def test_bfloat16_is_as_close_to_float32_as_transformers_is(hf, pairs):
    """Errors over several seeds: one comparison alone would be luck."""
    ratios = []
    for seed, kind in enumerate(["glm", "glm", "glm4", "glm4"]):
        model = hf.model(kind, seed=seed)
        reference = hf.logits(model, TOKENS)
        ours = hf.to_jax(model, param_dtype=jnp.bfloat16)
        theirs = np.sqrt(((hf.logits(model.bfloat16(), TOKENS) - reference) ** 2).mean())
        ratios.append(np.sqrt(((hf.run(ours, TOKENS) - reference) ** 2).mean()) / theirs)
    assert np.mean(ratios) <= 1.25, ratios


# ---- mutations: each is a mistake somebody made, and the parity check must see it ----


def half_split(x, cos, sin):
    rotated, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    first, second = jnp.split(rotated, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def with_config(**changes):
    def mutate(patch, ours):
        ours.config = dataclasses.replace(ours.config, **changes)

    return mutate


def patched(target, name, replacement):
    return lambda patch, ours: patch.setattr(target, name, replacement)


def shifted_mask(shift):
    original = attention.causal_segment_mask

    def mask(segment_ids, kv_segment_ids, offset):
        return original(segment_ids, kv_segment_ids, jnp.int32(shift))

    return patched(attention, "causal_segment_mask", mask)


def scaled_queries(factor):
    original = attention._xla
    return patched(attention, "_xla", lambda q, k, v, mask: original(q * factor, k, v, mask))


def tiled_heads(patch, ours):
    """Query head j reads key head j % K instead of j // (H / K)."""
    original = attention._xla

    def tiled(q, k, v, mask):
        order = np.arange(q.shape[2]).reshape(-1, k.shape[2]).T.ravel()
        return original(q[:, :, order], k, v, mask)[:, :, np.argsort(order)]

    patch.setattr(attention, "_xla", tiled)


def without_bias(name):
    def mutate(patch, ours):
        bias = getattr(ours.layers.self_attn, name).bias
        bias.set_value(jnp.zeros_like(bias[...]))

    return mutate


def all_norms(eps):
    def mutate(patch, ours):
        for _, module in nnx.iter_modules(ours):
            if isinstance(module, glm.RMSNorm):
                module.eps = eps

    return mutate


def swapped_gate(patch, ours):
    def call(self, x, key):
        up, gate = jnp.split(self.gate_up_proj(x, key), 2, axis=-1)
        return self.down_proj(up * jax.nn.silu(gate), key)

    patch.setattr(glm.MLP, "__call__", call)


def gelu(patch, ours):
    def call(self, x, key):
        gate, up = jnp.split(self.gate_up_proj(x, key), 2, axis=-1)
        return self.down_proj(up * jax.nn.gelu(gate), key)

    patch.setattr(glm.MLP, "__call__", call)


def weight_plus_one(patch, ours):
    original = glm.RMSNorm.__call__
    patch.setattr(glm.RMSNorm, "__call__", lambda self, x: original(self, x) * (1 + 1 / self.weight[...]))


def swapped(first, second):
    def mutate(patch, ours):
        one, other = getattr(ours.layers, first), getattr(ours.layers, second)
        weights = one.weight[...], other.weight[...]
        one.weight.set_value(weights[1])
        other.weight.set_value(weights[0])

    return mutate


def norm_before_residual_only(patch, ours):
    """Glm4 read as Glm: the two extra norms skipped."""
    ours.layers.post_self_attn_layernorm = ours.layers.post_mlp_layernorm = None


def head_not_tied(patch, ours):
    original = Glm.unembed
    patch.setattr(Glm, "unembed", lambda self, hidden: original(self, hidden[..., ::-1]))


def without_final_norm(patch, ours):
    weight = ours.norm.weight[...]
    patch.setattr(type(ours.norm), "__call__", glm.RMSNorm.__call__)
    ours.norm.weight.set_value(jnp.ones_like(weight))


def yarn_without(**changes):
    def mutate(patch, ours):
        scaling = dataclasses.replace(ours.config.rope_scaling, **changes)
        ours.config = dataclasses.replace(ours.config, rope_scaling=scaling)

    return mutate


MUTATIONS = {
    "NeoX rotation": ("glm", patched(glm, "apply_rope", half_split)),
    "rotation backwards": (
        "glm", patched(glm, "apply_rope", lambda x, cos, sin, original=glm.apply_rope: original(x, cos, -sin))
    ),
    "rope base": ("theta-5e6", with_config(rope_theta=10000.0)),
    "all dimensions rotated": ("glm", with_config(partial_rotary_factor=1.0)),
    "half of GLM-Edge rotated": ("edge", with_config(partial_rotary_factor=0.5)),
    "YaRN ignored": ("glm4-yarn", with_config(rope_scaling=None)),
    "YaRN attention factor dropped": ("glm4-yarn", yarn_without(attention_factor=1.0)),
    "YaRN ramp moved": ("glm4-yarn", yarn_without(beta_slow=0.1)),
    "gate and up swapped": ("glm", swapped_gate),
    "gelu for silu": ("glm", gelu),
    "norm eps of Glm4 in Glm": ("glm", all_norms(1e-5)),
    "norm eps of Glm in Edge": ("edge", all_norms(1.5625e-7)),
    "norm weight plus one": ("glm", weight_plus_one),
    "norms in the wrong order": ("glm4", swapped("post_self_attn_layernorm", "post_attention_layernorm")),
    "extra norms swapped": ("glm4", swapped("post_self_attn_layernorm", "post_mlp_layernorm")),
    "extra norms skipped": ("glm4", norm_before_residual_only),
    "final norm weight dropped": ("glm", without_final_norm),
    "scale dropped": ("glm", scaled_queries(8**0.5)),
    "scale from hidden / heads": ("wide-heads", scaled_queries(2**0.5)),
    "key heads tiled, not repeated": ("glm", tiled_heads),
    "q bias dropped": ("glm", without_bias("q_proj")),
    "k bias dropped": ("glm", without_bias("k_proj")),
    "v bias dropped": ("glm", without_bias("v_proj")),
    "mask one too wide": ("glm", shifted_mask(1)),
    "mask one too narrow": ("glm", shifted_mask(-1)),
    "head not the embedding": ("tied", head_not_tied),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_parity_check_sees(hf, pairs, monkeypatch, mutation):
    name, mutate = MUTATIONS[mutation]
    _, ours, reference = pairs[name]
    ours = nnx.clone(ours)
    assert hf.error(hf.run(ours, TOKENS), reference) <= TOLERANCE
    mutate(monkeypatch, ours)
    assert hf.error(hf.run(ours, TOKENS), reference) > 2 * TOLERANCE


def one_segment(segment_ids, kv_segment_ids, offset, original=attention.causal_segment_mask):
    return original(jnp.ones_like(segment_ids), jnp.ones_like(kv_segment_ids), offset)


@pytest.mark.parametrize(
    ("target", "name", "replacement"),
    [(glm, "restarting_positions", jnp.zeros_like), (attention, "causal_segment_mask", one_segment)],
    ids=["positions missing", "segments ignored"],
)
def test_the_packing_check_sees(hf, pairs, monkeypatch, target, name, replacement):
    model, ours, _ = pairs["glm"]
    monkeypatch.setattr(target, name, replacement)
    assert packed_error(hf, model, ours) > 2 * TOLERANCE


def test_the_cache_check_sees_a_forgotten_offset(hf, pairs, monkeypatch):
    original = attention.causal_segment_mask
    monkeypatch.setattr(attention, "causal_segment_mask", lambda s, kv, offset: original(s, kv, None))
    _, ours, reference = pairs["glm"]
    assert hf.error(cached_logits(hf.compiled, ours, TOKENS, np.ones_like(TOKENS), 15), reference) > 2 * TOLERANCE


def test_tracing_does_not_grow_with_depth():
    """One scan: lowering 40 layers takes as many calls of Python as lowering 2, and the program is as long."""

    def lower(layers: int):
        sizes = {"num_hidden_layers": layers, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
                 "head_dim": 8, "vocab_size": 96}  # fmt: skip
        graph, state = nnx.split(abstract_model(GlmConfig(**sizes)))
        function = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
        calls = Counter()
        gc.collect()  # what other tests left would call its finalizers here
        gc.disable()
        sys.setprofile(lambda frame, event, value: calls.update([event]))
        try:
            text = function.lower(state, jax.ShapeDtypeStruct((2, 16), jnp.int32)).as_text()
        finally:
            sys.setprofile(None)
            gc.enable()
        return calls["call"] + calls["c_call"], len(text.splitlines())

    lower(3)
    (shallow, short), (deep, long) = lower(2), lower(40)
    assert long == short and shallow > 10_000 and deep <= 1.2 * shallow, (shallow, deep)


def test_float16_is_refused():
    with pytest.raises(InputError, match="float16"):
        Glm(GlmConfig(num_hidden_layers=1, hidden_size=8, vocab_size=8, intermediate_size=8), rngs=nnx.Rngs(0),
            param_dtype=jnp.float16)  # fmt: skip
