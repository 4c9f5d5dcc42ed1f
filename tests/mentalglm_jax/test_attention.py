"""Attention against a loop that a reader can check, and against torch; masks; the backends' refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mentalglm_jax.attention import attention, causal_segment_mask
from mentalglm_jax.errors import InputError


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
    with pytest.raises(InputError, match=r"flash.*auto, xla, cudnn"):
        attention(q, k, v, segment_ids=ones, kv_segment_ids=ones, backend="flash")


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
