"""Attention against a loop that a reader can check, and against torch; masks; the backends' refusals; the TPU kernel,
interpreted, against the reference, on one device and cut over a mesh."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import NamedSharding, PartitionSpec

from mentalglm_jax.errors import InputError
from mentalglm_jax.model import attention as room
from mentalglm_jax.model.attention import attention, causal_segment_mask, chosen_backend
from mentalglm_jax.model.layout import BATCH_AXES, on_mesh
from mentalglm_jax.model.sharding import make_mesh
from tests.mentalglm_jax.tiny import on_eight_devices


def by_hand(q, k, v, visible):
    """Softmax attention one query at a time in float64; ``visible(row, query, slot)``."""
    batch, length, heads, width = q.shape
    groups = heads // k.shape[2]
    out = np.zeros(q.shape)
    for row, query, head in np.ndindex(batch, length, heads):
        slots = [slot for slot in range(k.shape[1]) if visible(row, query, slot)]
        if slots:
            keys, values = k[row, slots, head // groups], v[row, slots, head // groups]
            scores = np.exp(keys.astype(np.float64) @ q[row, query, head] / np.sqrt(width))
            out[row, query, head] = scores @ values / scores.sum()
    return out


def random_qkv(length=7, slots=7, heads=4, groups=2, width=6):
    rng = np.random.default_rng(0)
    shapes = (2, length, heads, width), (2, slots, groups, width), (2, slots, groups, width)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 1), (4, 4), (6, 2)])
def test_segments_and_groups(heads, groups):
    q, k, v = random_qkv(heads=heads, groups=groups)
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [0, 3, 3, 3, 1, 1, 1]], np.int32)
    found = attention(
        *map(jnp.asarray, (q, k, v)), segment_ids=jnp.asarray(segments), kv_segment_ids=jnp.asarray(segments)
    )
    expected = by_hand(q, k, v, lambda b, i, t: t <= i and segments[b, i] == segments[b, t] != 0)
    real = segments != 0
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], rtol=1e-5, atol=1e-6)
    assert np.isfinite(found).all()  # padding means nothing, but must not poison gradients


@pytest.mark.parametrize(("length", "queries"), [(385, 192), (99, 40), (100, 4)])  # the last: at most 16 parts
def test_long_rows_in_parts_are_the_whole(monkeypatch, length, queries):
    monkeypatch.setattr(room, "_QUERIES", queries)
    q, k, v = map(jnp.asarray, random_qkv(length=length, slots=length, heads=2, groups=1, width=4))
    segments = jnp.sort(jnp.asarray(np.random.default_rng(1).integers(1, 5, (2, length))), axis=1).at[:, -9:].set(0)
    real = np.asarray(segments) != 0

    def parts(q, k, v):
        out = attention(q, k, v, segment_ids=segments, kv_segment_ids=segments, backend="xla")
        return jnp.where(real[..., None, None], out, 0)

    def whole(q, k, v):
        out = room._xla(q, k, v, causal_segment_mask(segments, segments, None))
        return jnp.where(real[..., None, None], out, 0)

    def results(function):
        def loss(*qkv):
            out = function(*qkv)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    (gradients, out), (wanted, reference) = results(parts), results(whole)
    np.testing.assert_allclose(out, reference, rtol=1e-5, atol=1e-6)
    for found, one in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-4, atol=1e-5)


def test_offset_places_the_queries_in_the_cache():
    q, k, v = random_qkv(length=2, slots=9)
    kv_segments = np.array([[1] * 6 + [0] * 3, [0] * 2 + [1] * 4 + [0] * 3], np.int32)
    found = attention(
        *map(jnp.asarray, (q, k, v)), segment_ids=jnp.ones((2, 2), jnp.int32), kv_segment_ids=jnp.asarray(kv_segments),
        offset=jnp.int32(4),
    )  # fmt: skip
    expected = by_hand(q, k, v, lambda b, i, t: t <= i + 4 and kv_segments[b, t] == 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_agrees_with_torch():
    q, k, v = random_qkv(heads=4, groups=2)
    ones = jnp.ones((2, 7), jnp.int32)
    found = attention(*map(jnp.asarray, (q, k, v)), segment_ids=ones, kv_segment_ids=ones)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(x).transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    np.testing.assert_allclose(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_the_softmax_is_in_float32_for_bfloat16():
    """200 equal scores: a bfloat16 sum would stop growing at 256 times its last step and the weights would be off."""
    q = jnp.zeros((1, 200, 2, 8), jnp.bfloat16)
    v = jnp.ones((1, 200, 2, 8), jnp.bfloat16)
    ones = jnp.ones((1, 200), jnp.int32)
    found = attention(q, q, v, segment_ids=ones, kv_segment_ids=ones)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), 1.0, atol=0.01)


def test_mask_of_packed_rows():
    mask = causal_segment_mask(jnp.array([[1, 1, 2, 0]]), jnp.array([[1, 1, 2, 0]]), None)
    assert mask[0].astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_gradients_are_finite_when_a_row_is_all_padding():
    q, k, v = map(jnp.asarray, random_qkv())
    zeros = jnp.zeros((2, 7), jnp.int32)
    gradient = jax.grad(lambda q: attention(q, k, v, segment_ids=zeros, kv_segment_ids=zeros).sum())(q)
    assert jnp.isfinite(gradient).all()


def test_unknown_backend_is_refused():
    q, k, v = map(jnp.asarray, random_qkv())
    ones = jnp.ones((2, 7), jnp.int32)
    with pytest.raises(InputError, match=r"flash.*auto, xla, cudnn, splash"):
        attention(q, k, v, segment_ids=ones, kv_segment_ids=ones, backend="flash")


def test_the_platform_decides(monkeypatch):
    found = {}
    for platform in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        found[platform] = [chosen_backend("auto", dtype) for dtype in ("bfloat16", "float32")]
    assert found == {"cpu": ["xla", "xla"], "gpu": ["cudnn", "xla"], "tpu": ["splash", "xla"]}
    assert chosen_backend("splash", "bfloat16") == "splash"  # what a plan for a TPU asks for on a CPU


def interpreted(monkeypatch):
    """Splash in Pallas's interpreter, in blocks of 128: three by three of them below."""
    monkeypatch.setattr(room, "_BLOCK", 128)
    kernel = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", kernel)


def packed(rows=2):
    """Rows of 300 tokens (no multiple of 128) with segments that end inside and at the edge of a block, and padding."""
    segments = np.ones((rows, 300), np.int32)
    segments[0, 70:256], segments[0, 256:] = 2, 3
    segments[1, :40], segments[1, 200:] = 0, 0
    return jnp.asarray(segments)


def value_and_gradients(q, k, v, segments, backend):
    """The output of real tokens, and gradients of a random projection of it."""
    weights = jax.random.normal(jax.random.key(1), q.shape) * (segments != 0)[..., None, None]

    def projected(q, k, v):
        out = attention(q, k, v, segment_ids=segments, kv_segment_ids=segments, backend=backend)
        return (out * weights).sum(), out * (segments != 0)[..., None, None]

    (_, out), gradients = jax.value_and_grad(projected, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


def test_splash_agrees_with_xla(monkeypatch):
    interpreted(monkeypatch)
    q, k, v = map(jnp.asarray, random_qkv(length=300, slots=300, heads=4, groups=2, width=16))
    both = [jax.jit(value_and_gradients, static_argnums=4)(q, k, v, packed(), b) for b in ("splash", "xla")]
    for name, found, wanted in zip(("out", "dq", "dk", "dv"), *both, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=5e-6, err_msg=name)


def test_splash_leaves_the_cache_to_xla(monkeypatch):
    monkeypatch.setattr(room, "_splash", None)
    q, k, v = map(jnp.asarray, random_qkv(length=2, slots=9))
    segments = {"segment_ids": jnp.ones((2, 2), jnp.int32), "kv_segment_ids": jnp.ones((2, 9), jnp.int32)}
    found = [attention(q, k, v, **segments, offset=jnp.int32(4), backend=b) for b in ("splash", "xla")]
    np.testing.assert_array_equal(*found)


@pytest.mark.slow
def test_splash_on_a_mesh_agrees_with_one_device():
    """Two by two rows and heads, and four ways where two key/value heads must be shared out among four devices."""
    found = on_eight_devices(__file__)
    assert all(largest < 5e-6 for largest in found["differences"].values()), found["differences"]
    assert found["refused"] == ("mesh tensor = 8 does not divide 4 attention heads over 2 key/value heads evenly")


def main() -> None:
    """Prints the largest differences to XLA on one device, of the output and each gradient, by mesh."""
    monkeypatch = pytest.MonkeyPatch()
    interpreted(monkeypatch)
    q, k, v = map(jnp.asarray, random_qkv(length=300, slots=300, heads=4, groups=2, width=16))
    wanted = jax.jit(value_and_gradients, static_argnums=4)(q, k, v, packed(), "xla")
    differences: dict[str, float] = {}
    for sizes in ((2, 2, 2), (1, 2, 4)):
        parts, mesh = sizes[0] * sizes[1] // 2, make_mesh(*sizes)  # rows are repeated until every device has one
        placed = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        many = [jax.device_put(jnp.concatenate([x] * parts), placed) for x in (q, k, v, packed())]
        with on_mesh(mesh):
            found = jax.jit(lambda *inputs: value_and_gradients(*inputs, "splash"))(*many)
        for name, left, right in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
            differences[f"{sizes} {name}"] = float(jnp.abs(left[:2] - right).max())
    refused = ""
    try:
        with on_mesh(make_mesh(1, 1, 8)):
            attention(q, k, v, segment_ids=packed(), kv_segment_ids=packed(), backend="splash")
    except InputError as error:
        refused = str(error)
    sys.stdout.write(json.dumps({"differences": differences, "refused": refused}))


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
def test_cudnn_agrees_with_xla(padded):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in random_qkv(length=128, slots=128, heads=32, groups=2, width=128))
    segments = jnp.ones((2, 128), jnp.int32).at[1, :40].set(0 if padded else 2)
    calls = [
        attention(q, k, v, segment_ids=segments, kv_segment_ids=segments, backend=backend)
        for backend in ("xla", "cudnn")
    ]
    found, expected = (np.asarray(call, np.float32)[np.asarray(segments) != 0] for call in calls)
    np.testing.assert_allclose(found, expected, atol=0.03)


if __name__ == "__main__":
    main()
