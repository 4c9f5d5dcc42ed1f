"""V4: an independent implementation. GLM and its attributions in JAX from the weights, against engine and Captum.

Shares no code with the package but the layout of the row: rotations are complex numbers, gradients are JAX's, one
sequence per candidate, no packing, no Captum. Test-only: the package imports no JAX.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probes.citations.clauses import unit_tokens
from probes.probe import Probe
from probes.records import Example
from probes.saliency.attribute import Settings, attribute
from probes.saliency.erase import MaskTable

HEADS, KV_HEADS, HEAD, LAYERS = 4, 2, 16, 2


def norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x: jax.Array) -> jax.Array:
    """Neighbouring pairs of the first half of each head, as complex numbers, turned by position. x: [S, H, D]."""
    half = HEAD // 2
    pairs = x[..., :half].reshape(*x.shape[:-1], half // 2, 2)
    angle = jnp.arange(len(x))[:, None, None] / 10000.0 ** (jnp.arange(half // 2) * 2 / half)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * jnp.exp(1j * angle)
    return jnp.concatenate([jnp.stack([turned.real, turned.imag], -1).reshape(*x.shape[:-1], half), x[..., half:]], -1)


def log_probs(w: dict[str, jax.Array], eps: float, embeds: jax.Array, keep: jax.Array) -> jax.Array:
    """float32 [S, V] for embeddings [S, D]; ``keep`` bool [S]: what others may attend to."""
    x, size = embeds, len(embeds)
    allow = jnp.tril(jnp.ones((size, size), bool)) & (keep[None, :] | jnp.eye(size, dtype=bool))
    for i in range(LAYERS):
        p = partial("model.layers.{}.{}".format, i)
        h = norm(x, w[p("input_layernorm.weight")], eps)
        q, k, v = (
            (h @ w[p(f"self_attn.{n}_proj.weight")].T + w[p(f"self_attn.{n}_proj.bias")]).reshape(size, -1, HEAD)
            for n in "qkv"
        )
        q, k, v = rotate(q), *(jnp.repeat(a, HEADS // KV_HEADS, 1) for a in (rotate(k), v))
        scores = jnp.einsum("shd,thd->hst", q, k) / HEAD**0.5
        seen = jnp.einsum("hst,thd->shd", jax.nn.softmax(jnp.where(allow, scores, -jnp.inf), -1), v)
        x = x + seen.reshape(size, -1) @ w[p("self_attn.o_proj.weight")].T
        gate, up = jnp.split(
            norm(x, w[p("post_attention_layernorm.weight")], eps) @ w[p("mlp.gate_up_proj.weight")].T, 2, -1
        )
        x = x + (jax.nn.silu(gate) * up) @ w[p("mlp.down_proj.weight")].T
    return jax.nn.log_softmax(norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T, -1)


class Oracle:
    """Scores of one row as functions of its post, in JAX."""

    def __init__(self, probe: Probe, example: Example) -> None:
        self.w = {name: jnp.asarray(tensor.numpy()) for name, tensor in probe.model.state_dict().items()}
        self.embed, self.eps, self.example = (
            self.w["model.embed_tokens.weight"],
            probe.model.config.rms_norm_eps,
            example,
        )
        (self.first, self.last), self.encode = example.post_tok, probe.token_bytes.encode
        self.post = self.embed[jnp.array(example.ids[self.first : self.last])]
        self.neutral = jnp.broadcast_to(self.embed[probe.pad_id], self.post.shape)

    def score(self, target: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """(post [n, D], keep bool [n]) -> nats."""
        segment = self.example.segment(target)
        assert segment is not None
        start, end = segment.tok

        def one(ids: list[int], post: jax.Array, keep: jax.Array) -> jax.Array:
            embeds = self.embed[jnp.array(ids)].at[self.first : self.last].set(post)
            mask = jnp.ones(len(ids), bool).at[self.first : self.last].set(keep)
            found = log_probs(self.w, self.eps, embeds, mask)
            return found[jnp.arange(start - 1, len(ids) - 1), jnp.array(ids[start:])].sum()

        if target == "explanation":
            return jax.jit(partial(one, list(self.example.ids[:end])))
        head = list(self.example.ids[:start])
        others = [self.encode(t) for t in self.example.candidates.values() if t != self.example.label_text]

        def odds(post: jax.Array, keep: jax.Array) -> jax.Array:
            rivals = jnp.stack([one([*head, *ids], post, keep) for ids in others])
            return one([*head, *self.example.ids[start:end]], post, keep) - jax.nn.logsumexp(rivals)

        return jax.jit(odds)


def error(found: Any, wanted: Any) -> float:
    found, wanted = np.asarray(found), np.asarray(wanted)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("target", ["label", "explanation"])
def test_jax_agrees_with_engine_and_captum(tiny_probe: Probe, tiny_rows: list[dict[str, Any]], target: str) -> None:
    example = tiny_probe.encode(tiny_rows[0])
    oracle = Oracle(tiny_probe, example)
    score, whole = oracle.score(target), jnp.ones(len(oracle.post), bool)
    gradient = jax.jit(jax.grad(score))
    names = ("ig", "erase", "gradnorm", "gxi", "erase_neutral")
    maps = {m.method: m for m in attribute(tiny_probe, example, names, (target,), Settings(max_steps=64))}

    assert error(maps["ig"].f_input, score(oracle.post, whole)) <= 1e-5
    assert error(maps["ig"].f_baseline, score(oracle.neutral, whole)) <= 1e-4
    total, edges = jnp.zeros_like(oracle.post), maps["ig"].params["edges"]
    for a, b in itertools.pairwise(edges):
        for place, weight in ((a, 1 / 6), ((a + b) / 2, 4 / 6), (b, 1 / 6)):
            total += weight * (b - a) * gradient(oracle.neutral + place * (oracle.post - oracle.neutral), whole)
    integrated = example.post_chars(np.asarray((total * (oracle.post - oracle.neutral)).sum(-1)))
    assert error(maps["ig"].values, integrated) <= 1e-4
    slope = gradient(oracle.post, whole)
    assert error(maps["gradnorm"].values, example.post_chars(np.asarray(jnp.linalg.norm(slope, axis=-1)))) <= 1e-4
    assert error(maps["gxi"].values, example.post_chars(np.asarray((slope * oracle.post).sum(-1)))) <= 1e-4

    _, unit = unit_tokens(example, "clause")
    full = score(oracle.post, whole)
    masks = [jnp.asarray(unit != index) for index in range(unit.max() + 1)]
    assert error(maps["erase"].values, [full - score(oracle.post, keep) for keep in masks]) <= 1e-4
    padded = [jnp.where(keep[:, None], oracle.post, oracle.neutral) for keep in masks]
    assert error(maps["erase_neutral"].values, [full - score(post, whole) for post in padded]) <= 1e-4


def test_every_mask_agrees(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    """All 32 subsets of five clauses: whatever erasure, Shapley values and gates are computed from."""
    example = tiny_probe.encode(tiny_rows[0])
    oracle = Oracle(tiny_probe, example)
    table = MaskTable.of(tiny_probe.scorer.forward(example, ("label",)), Settings())
    masks = np.array([[(code >> bit) & 1 for bit in range(table.count)] for code in range(2**table.count)], dtype=float)
    score, owner = jax.jit(jax.vmap(oracle.score("label"), (None, 0))), table.owner.numpy()
    wanted = score(oracle.post, jnp.asarray(masks.astype(bool)[:, owner]))
    import torch

    assert error(table(torch.as_tensor(masks))[:, 0], wanted) <= 1e-4
