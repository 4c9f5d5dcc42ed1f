"""Batched decoding with a key/value cache.

Prompts are sorted by length, padded on the left to one of a few lengths (buckets) and decoded in lock step: one
``prefill`` program per (rows, bucket), one ``first_token`` and one ``advance`` program per (rows, cache slots). Padding
has segment id 0, so a prompt's answer does not depend on the prompts beside it; nor do its random draws, which are
keyed by prompt.

A model whose parameters lie on a mesh decodes there, on several hosts too: the rows of a batch are cut over ``data``,
so that each copy of the model answers its own prompts. Over ``fsdp`` and ``tensor`` a batch's few activations are
exchanged, and the weights stay where they are: gathering them, as training does, would read all of them per token.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt32

from mentalglm_jax.devices.distributed import on_host, placed
from mentalglm_jax.devices.hardware import free_memory
from mentalglm_jax.devices.together import check_same
from mentalglm_jax.errors import InputError
from mentalglm_jax.model.glm import Glm, KVCache
from mentalglm_jax.model.sharding import mesh_of

Progress = Callable[[int, int], None]  # (prompts done, prompts in all)

# Prompt tokens prefilled at once by each copy of the model, padding included: bounds the attention scores of long
# prompts (rows * bucket ** 2).
BATCH_TOKENS = 16384
SHORTEST_PREFIX = 32
# Tokens of an answer where the caller names no limit: the longest explanation that `mentalglm data build` keeps (300
# English words, 400 Chinese characters) at 2 tokens a word and 1.5 a character, and 40 for the label sentence.
MAX_NEW_TOKENS = 640
LEAST_NEW_TOKENS = 256  # in a short context; a post that leaves less is refused by name
# On a CPU, layers are laid apart for decoding, which holds them twice, where they take up to this share of the memory
# that is free (of this many bytes where the system does not say, and on several hosts); see ``laid_apart``.
APART_SHARE, FREE_UNSAID = 0.25, 4 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is picked: the most probable one at temperature 0, else a draw from what the filters leave.

    ``top_k`` keeps the k most probable tokens; ``top_p`` then keeps the fewest most probable ones that together reach
    this probability (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751), and ``min_p`` those that are at least
    this many times as probable as the most probable one (Nguyen et al. 2024, arXiv 2407.01082). Before all of that,
    greedy or not, ``repetition_penalty`` p divides the positive logits and multiplies the negative ones of every token
    that stands in the prompt or the answer so far (Keskar et al. 2019, arXiv 1909.05858); 1 is none. Padding is no
    token of a prompt.

    Raises:
        InputError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p < 1:
            raise InputError(f"min_p must be from 0 to below 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise InputError(f"repetition_penalty must be a positive number, got {self.repetition_penalty}")

    def pick(
        self, logits: Float[Array, "B V"], keys: Array, step: Int[Array, ""], seen: Bool[Array, "B V"] | None = None
    ) -> Int[Array, " B"]:
        """One token per row; row ``i`` draws with ``fold_in(keys[i], step)``. ``seen`` are the tokens to penalise."""
        if seen is not None:
            logits = penalise(logits, seen, self.repetition_penalty)
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = filter_logits(logits / self.temperature, self.top_k, self.top_p, self.min_p)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def penalise(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float) -> Float[Array, "B V"]:
    """``logits`` after the repetition penalty, as in transformers."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_logits(
    logits: Float[Array, "B V"], top_k: int | None, top_p: float | None, min_p: float | None
) -> Float[Array, "B V"]:
    """``logits`` with -inf for the tokens that ``top_k``, then ``top_p``, then ``min_p`` exclude, as in transformers;
    tokens exactly as probable as the last one kept are kept too."""
    if top_k is not None and top_k < logits.shape[-1]:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][:, -1:], -jnp.inf, logits)
    if top_p is not None and top_p < 1:
        logits = nucleus(logits, top_p)
    if min_p:
        logits = jnp.where(logits < logits.max(axis=-1, keepdims=True) + math.log(min_p), -jnp.inf, logits)
    return logits


def nucleus(logits: Float[Array, "B V"], top_p: float | Float[Array, "B 1"]) -> Float[Array, "B V"]:
    """``logits`` with -inf but for the fewest most probable tokens that together reach ``top_p``."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    last = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < last, -jnp.inf, logits)


def bucket(length: int) -> int:
    """The padded length of ``length`` tokens: 32, 64, 128, 192, 256, 384, 512, 768, ...; few programs, little waste."""
    size = 32
    while size < length:
        size *= 2
    return size * 3 // 4 if size >= 256 and size * 3 // 4 >= length else size


@functools.partial(jax.jit, static_argnames=("graph",))
def prefill(
    graph: Any, state: Any, tokens: Int[Array, "B P"], segment_ids: Int[Array, "B P"], prefix: KVCache | None = None
) -> tuple[Array, KVCache]:
    """The last token's hidden state [B, D] and a cache of exactly P slots. Every prompt ends in the last column.

    ``prefix`` is the cache of one row, what all prompts begin with; its slots then come before the P.
    """
    model: Glm = nnx.merge(graph, state)
    rows, length = tokens.shape
    if prefix is None:
        cache = KVCache.empty(model.config, rows, length, model.dtype)
        hidden, filled = model.hidden_states(tokens, segment_ids=segment_ids, cache=cache)
    else:
        count = jnp.sum(prefix.segment_ids, dtype=jnp.int32)
        k, v = (jnp.repeat(x, rows, axis=1) for x in (prefix.k, prefix.v))
        cache = prefix._replace(k=k, v=v, segment_ids=jnp.repeat(prefix.segment_ids, rows, axis=0))
        positions = count + jnp.maximum(jnp.cumsum(segment_ids, axis=1, dtype=jnp.int32) - 1, 0)
        cache = with_room(cache, prefix.segment_ids.shape[1] + length)
        hidden, filled = model.hidden_states(tokens, positions, segment_ids, cache)
    assert filled is not None
    return hidden[:, -1], filled


@functools.partial(jax.jit, static_argnames=("answers",))
def repeated(hidden: Float[Array, "B D"], cache: KVCache, answers: int) -> tuple[Array, KVCache]:
    """Every row ``answers`` times, one beside the other."""
    k, v = (jnp.repeat(x, answers, axis=1) for x in (cache.k, cache.v))
    segments = jnp.repeat(cache.segment_ids, answers, axis=0)
    return jnp.repeat(hidden, answers, axis=0), cache._replace(k=k, v=v, segment_ids=segments)


def with_room(cache: KVCache, slots: int) -> KVCache:
    """The cache with zeros behind it up to ``slots``; prefilling into the longer one would attend to them in vain."""
    more = slots - cache.segment_ids.shape[1]
    wide = [(0, 0), (0, 0), (0, more), (0, 0), (0, 0)]
    return cache._replace(
        k=jnp.pad(cache.k, wide), v=jnp.pad(cache.v, wide), segment_ids=jnp.pad(cache.segment_ids, [(0, 0), (0, more)])
    )


class Decoding(NamedTuple):
    """A batch on its way. ``token`` was picked last and is not in the cache yet; ``output[:, :lengths]`` holds answers;
    ``seen`` (with a repetition penalty) holds the tokens of prompt and answer."""

    step: Int[Array, ""]
    token: Int[Array, " B"]
    cache: KVCache
    done: Bool[Array, " B"]
    output: Int[Array, "B N"]
    lengths: Int[Array, " B"]
    seen: Bool[Array, "B V"] | None


class Rules(NamedTuple):
    """What does not change while a batch is decoded. ``rows`` numbers the prompts for their random keys; ``key`` is the
    data of the key that all of those are made of."""

    key: UInt32[Array, " W"]
    rows: UInt32[Array, " B"]
    eos_ids: Int[Array, " E"]
    vocab_limit: Int[Array, ""]


def _pick(model: Glm, hidden: Array, step: Array, seen: Array | None, rules: Rules, sampling: Sampling) -> Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.wrap_key_data(rules.key), rules.rows)
    logits = model.unembed(hidden)
    logits = jnp.where(jnp.arange(logits.shape[-1]) < rules.vocab_limit, logits, -jnp.inf)
    return sampling.pick(logits, keys, step, seen)


def _noted(seen: Array | None, token: Array) -> Array | None:
    return None if seen is None else seen.at[jnp.arange(token.shape[0]), token].set(True)


@functools.partial(jax.jit, static_argnames=("graph", "sampling", "slots"))
def first_token(
    graph: Any, state: Any, hidden: Float[Array, "B D"], cache: KVCache, finished: Bool[Array, " B"],
    seen: Bool[Array, "B V"] | None, rules: Rules, *, sampling: Sampling, slots: int
) -> Decoding:  # fmt: skip
    """Picks the first token of every row and makes room for ``slots`` in all; ``finished`` rows are filling."""
    token = _pick(nnx.merge(graph, state), hidden, jnp.int32(0), seen, rules, sampling)
    output = jnp.zeros((token.shape[0], slots - cache.segment_ids.shape[1]), jnp.int32).at[:, 0].set(token)
    done, count = finished | jnp.isin(token, rules.eos_ids), jnp.where(finished, 0, 1)
    return Decoding(jnp.int32(1), token, with_room(cache, slots), done, output, count, _noted(seen, token))


def laid_apart(state: Any) -> list[Any] | None:
    """The parameters of every layer as arrays of their own, or None where the stacked ones serve as well, or where the
    memory is too small for both.

    XLA's CPU backend copies a layer out of its stack before it multiplies by it. With one token at a time that is most
    of the work: the products read every weight once, the copies read and write it once more.
    """
    return _cut(state["layers"]) if apart_bytes(state) else None


def apart_bytes(state: Any) -> int:
    """Bytes that ``laid_apart`` takes beside ``state``; 0 where it lays nothing apart."""
    if jax.default_backend() != "cpu":
        return 0
    size = sum(x.nbytes for x in jax.tree.leaves(state["layers"]))
    # Several hosts run the same program, and each may have another amount of memory that is free.
    free = free_memory(jax.devices()[0]) if jax.process_count() == 1 else None
    return size if size <= APART_SHARE * (FREE_UNSAID if free is None else free) else 0


@jax.jit
def _cut(layers: Any) -> list[Any]:
    count = jax.tree.leaves(layers)[0].shape[0]
    return [jax.tree.map(lambda x, layer=layer: x[layer], layers) for layer in range(count)]


@functools.partial(jax.jit, static_argnames=("graph", "sampling"), donate_argnames=("decoding",))
def advance(
    graph: Any, state: Any, decoding: Decoding, rules: Rules, until: Int[Array, ""], apart: list[Any] | None = None, *,
    sampling: Sampling
) -> Decoding:  # fmt: skip
    """Goes on until every row has ``until`` tokens or has met a stop token. ``apart`` is from ``laid_apart``."""
    model: Glm = nnx.merge(graph, state)
    if apart is not None:
        one_layer = nnx.graphdef(model.layers)
        layers: Any = nnx.List([nnx.merge(one_layer, parameters) for parameters in apart])
        model.layers = layers

    def running(now: Decoding) -> Array:
        return (now.step < until) & ~jnp.all(now.done)

    def one(now: Decoding) -> Decoding:
        # Rows differ in length: the next position is the number of their tokens, not of their slots.
        positions = jnp.sum(now.cache.segment_ids, axis=1, keepdims=True, dtype=jnp.int32)
        ones = jnp.ones_like(now.token)[:, None]
        hidden, cache = model.hidden_states(now.token[:, None], positions, ones, now.cache)
        token = _pick(model, hidden[:, 0], now.step, now.seen, rules, sampling)
        output = jax.lax.dynamic_update_slice(now.output, token[:, None], (0, now.step))
        done, count = now.done | jnp.isin(token, rules.eos_ids), jnp.where(now.done, now.lengths, now.step + 1)
        assert cache is not None
        return Decoding(now.step + 1, token, cache, done, output, count, _noted(now.seen, token))

    return jax.lax.while_loop(running, one, decoding)


def generate_ids(
    model: Glm,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | None,
    eos_ids: Sequence[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    vocab_limit: int | None = None,
    share_prefix: bool = False,
    stream: Callable[[int, int], None] | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Continues token id prompts of any lengths; the model may carry an adapter that is not merged.

    Args:
        prompts: token ids, each prompt at least one.
        max_new_tokens: generated per prompt at most; None is ``default_room``.
        eos_ids: generation of a prompt stops after any of these; the stop token is part of the result.
        temperature, top_k, top_p, min_p, repetition_penalty: see ``Sampling``; 0 is greedy.
        seed: of the draws. Prompt ``i`` has its own random key, whatever batch it is decoded in.
        batch_size: prompts decoded together; on a mesh the next multiple of ``data``.
        vocab_limit: ids from here on (padding rows of the embedding) are never generated; default: none are excluded.
        share_prefix: compute what all prompts begin with once. The same mathematics in another order of summation,
            which depends on the set of prompts: two tokens within rounding of each other may swap.
        stream: called with the number of a prompt and each of its tokens as soon as it is there, stop token included.
        progress: called after every batch with the numbers of prompts done and in all.

    Returns:
        The generated ids of each prompt, in the order of ``prompts``.

    Raises:
        InputError: an option out of range, an empty prompt, an id the model does not have, or a prompt that with
            ``max_new_tokens`` exceeds the model's context.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                        repetition_penalty=repetition_penalty)  # fmt: skip
    numbers = range(len(prompts))
    results: dict[int, list[int]] = {}
    for batch in batches(
        model, prompts, [f"prompt {i}" for i in numbers], numbers, max_new_tokens=max_new_tokens, eos_ids=eos_ids,
        sampling=sampling, seed=seed, batch_size=batch_size, vocab_limit=vocab_limit,
        share_prefix=share_prefix, stream=stream
    ):  # fmt: skip
        results |= dict(batch)
        if progress is not None:
            progress(len(results), len(prompts))
    return [results[i] for i in numbers]


def batches(
    model: Glm, prompts: Sequence[Sequence[int]], names: Sequence[str], rows: Sequence[int], *,
    max_new_tokens: int | None, eos_ids: Sequence[int], sampling: Sampling, seed: int, batch_size: int,
    vocab_limit: int | None, answers: int = 1,
    share_prefix: bool = False, stream: Callable[[int, int], None] | None = None
) -> Iterator[list[tuple[int, list[int]]]]:  # fmt: skip
    """(number of the prompt, its generated ids) per batch, the longest prompts first: lack of memory shows at once.

    Args:
        rows: what keys the draws of each prompt; with ``answers``, of each answer.
        answers: answers per prompt, which is run once for all of them; answer ``k`` of prompt ``i`` has the number
            ``i * answers + k``. They are decoded in one batch, of at most ``batch_size`` answers where that is more.

    The others as in ``generate_ids``.
    """
    check_same("posts", [*map(list, prompts)])
    vocab = model.config.vocab_size
    max_new_tokens = default_room(model, prompts) if max_new_tokens is None else max_new_tokens
    if max_new_tokens < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}")
    if not 0 < (vocab_limit := vocab if vocab_limit is None else vocab_limit) <= vocab:
        raise InputError(f"the tokenizer has {vocab_limit} tokens, the model {vocab}: they do not belong together")
    for name, prompt in zip(names, prompts, strict=True):
        check_ids(model, name, prompt, max_new_tokens, "max_new_tokens")
    graph, state = nnx.split(model)
    mesh = mesh_of(model)
    key, stops = np.asarray(jax.random.key_data(jax.random.key(seed))), np.asarray([*eos_ids], np.int32)
    skip, prefix = shared_prefix(graph, state, prompts, mesh) if share_prefix else (0, None)
    before = 0 if prefix is None else prefix.segment_ids.shape[1]
    apart = laid_apart(state)
    lengths, at_once = [len(prompt) - skip for prompt in prompts], max(1, batch_size // answers)
    for alone, size, length in plan(lengths, at_once, copies(mesh)):
        tokens, segment_ids = on_rows(left_pad([prompts[i][skip:] for i in alone], size, length), mesh)
        hidden, cache = prefill(graph, state, tokens, segment_ids, prefix)
        if answers > 1:
            size, (hidden, cache) = size * answers, repeated(hidden, cache, answers)
        numbers = [i * answers + k for i in alone for k in range(answers)]
        salts = np.asarray([rows[i] for i in numbers] + [0] * (size - len(numbers)), np.uint32)
        seen = None
        if sampling.repetition_penalty != 1:
            seen = np.zeros((size, vocab), bool)
            for row, number in zip(seen, numbers, strict=False):
                row[list(prompts[number // answers])] = True
        salts, seen, filling = on_rows((salts, seen, np.arange(size) >= len(numbers)), mesh)
        whole = placed((key, stops, np.int32(vocab_limit)), mesh)
        rules = Rules(key=whole[0], rows=salts, eos_ids=whole[1], vocab_limit=whole[2])
        now = first_token(
            graph, state, hidden, cache, filling, seen, rules, sampling=sampling,
            slots=bucket(before + length + max_new_tokens)
        )  # fmt: skip
        if stream is None:
            now = advance(graph, state, now, rules, np.int32(max_new_tokens), apart, sampling=sampling)
        else:
            now = _streamed(graph, state, now, rules, apart, sampling, max_new_tokens, numbers, stream)
        output, count = on_host(now.output), on_host(now.lengths)
        yield [(number, output[i, : count[i]].tolist()) for i, number in enumerate(numbers)]


def copies(mesh: Mesh | None) -> int:
    """How many copies of the model answer, each its own rows of a batch."""
    return 1 if mesh is None else mesh.shape["data"]


def on_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Host arrays ``[B, ...]``, the same on every process, with the rows over the copies of the model."""
    return placed(tree, mesh, "data")


def _streamed(
    graph: Any, state: Any, now: Decoding, rules: Rules, apart: list[Any] | None, sampling: Sampling, limit: int,
    numbers: Sequence[int], stream: Callable[[int, int], None]
) -> Decoding:  # fmt: skip
    """The same program, one token at a time."""
    for step in range(1, limit + 1):
        token, count, done = (on_host(x) for x in (now.token, now.lengths, now.done))
        for i, number in enumerate(numbers):
            if count[i] == step:
                stream(number, int(token[i]))
        if step == limit or done.all():
            break
        now = advance(graph, state, now, rules, np.int32(step + 1), apart, sampling=sampling)
    return now


def shared_prefix(
    graph: Any, state: Any, prompts: Sequence[Sequence[int]], mesh: Mesh | None = None
) -> tuple[int, KVCache | None]:
    """How many tokens all prompts begin with, and their cache; (0, None) when that is not worth a program of its own.
    Every prompt keeps at least its last token."""
    if len(prompts) < 2:
        return 0, None
    low, high = min(prompts, key=list), max(prompts, key=list)  # all others lie between: what these two share, all do
    longest = min(len(prompt) for prompt in prompts) - 1
    count = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), longest)
    if (count := min(count, longest)) < SHORTEST_PREFIX:
        return 0, None
    tokens, segment_ids = placed(left_pad([prompts[0][:count]], 1, bucket(count)), mesh)
    return count, prefill(graph, state, tokens, segment_ids)[1]


def default_room(model: Glm, prompts: Sequence[Sequence[int]]) -> int:
    """Tokens of an answer where nobody says how many: ``MAX_NEW_TOKENS``, or what the longest prompt leaves of the
    model's context, but no less than ``LEAST_NEW_TOKENS``."""
    left = model.config.max_position_embeddings - max(map(len, prompts), default=0)
    return min(MAX_NEW_TOKENS, max(LEAST_NEW_TOKENS, left))


def check_ids(model: Glm, name: str, ids: Sequence[int], more: int = 0, what: str = "") -> None:
    limit, vocab = model.config.max_position_embeddings, model.config.vocab_size
    if isinstance(ids, str) or (len(ids) and isinstance(ids[0], str)):
        raise InputError(f"{name}: is text where token ids are expected; give tokenizer.prompt_ids(text) for a prompt, "
                         "tokenizer.encode(text) for what follows it")  # fmt: skip
    if not len(ids):
        raise InputError(f"{name}: is empty; at least one token is needed")
    if not 0 <= min(ids) <= max(ids) < vocab:
        raise InputError(f"{name}: token ids must be in 0..{vocab - 1}; is this the model's own tokenizer?")
    if more and len(ids) + more > limit:
        raise InputError(
            f"{name}: its prompt has {len(ids)} tokens and needs room for {more} more ({what}), the model's context is "
            f"{limit}; shorten the post so that the prompt has at most {max(limit - more, 0)}, or leave it out"
        )


def plan(lengths: Sequence[int], batch_size: int, parts: int = 1) -> Iterator[tuple[list[int], int, int]]:
    """(numbers of the prompts, rows of the batch, padded length), the longest prompts first; the rows can be cut into
    ``parts``."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    whole = min(batch_size, 1 << (len(lengths) - 1).bit_length()) if lengths else 1
    while order:
        length = bucket(lengths[order[0]])
        each = -(-whole // parts)
        while each > 1 and each * length > BATCH_TOKENS:
            each = (each + 1) // 2
        rows = each * parts
        yield order[:rows], rows, length
        order = order[rows:]


def left_pad(prompts: Sequence[Sequence[int]], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids (0 = padding), int32 [rows, length], prompts to the right; spare rows hold one token."""
    tokens, segment_ids = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    segment_ids[:, -1] = 1
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segment_ids[row, length - len(prompt) :] = 1
    return tokens, segment_ids
