"""Decoding a batch that prompts join and leave between two tokens.

All rows write their next key and value into the same column of one cache, as in ``decode``. A prompt that joins is
computed alone; its part of the cache is laid so that its last token stands right before that column. Rotations go by a
token's position, not by its column, and a row sees nothing but its own columns, so an answer is what ``generate_ids``
gives, whoever shares the batch. Programs are compiled per (rows, columns), both from short lists.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from mentalglm_jax.inference.decode import bucket, check_ids, laid_apart, left_pad, nucleus, prefill, with_room
from mentalglm_jax.model.glm import Glm, KVCache

MOST_TOLD = 20  # most probable tokens that can be asked for beside the one that was picked


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a row is asked for: at most ``room`` tokens after ``prompt`` (token ids, at least one).

    ``temperature``, ``top_p`` and ``seed`` are as in ``generate_ids``, of which this is the only prompt. ``told``: also
    the log-probability of every token and of the ``told`` most probable ones (0 to ``MOST_TOLD``); None: neither.
    """

    prompt: Sequence[int]
    room: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    told: int | None = None


class Token(NamedTuple):
    """A token that was picked. ``logprob`` (natural, of the model's own distribution, before temperature) and
    ``others``, (token, log-probability) of the most probable ones, are there where they were asked for."""

    id: int
    logprob: float | None
    others: tuple[tuple[int, float], ...]


class _Picks(NamedTuple):
    """How each row picks its next token, the ``step``-th of its answer."""

    seed: UInt32[Array, " B"]
    step: Int[Array, " B"]
    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]


def _picked(
    model: Glm, hidden: Float[Array, "B D"], picks: _Picks, vocab_limit: Array, drawn: bool, told: bool
) -> tuple[Array, tuple[Array, Array, Array] | None]:
    """The next token of every row and, with ``told``, its log-probability and the ``MOST_TOLD`` most probable ones.
    Without ``drawn`` every row is greedy."""
    logits = model.unembed(hidden)
    logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_limit, logits, -jnp.inf)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if drawn:
        warm = picks.temperature > 0
        scaled = logits / jnp.where(warm, picks.temperature, 1.0)[:, None]
        kept = jnp.where((picks.top_p < 1)[:, None], nucleus(scaled, picks.top_p[:, None]), scaled)
        keys = jax.vmap(_key)(picks.seed, picks.step)
        token = jnp.where(warm, jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32), token)
    if not told:
        return token, None
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    return token, (chosen, *jax.lax.top_k(logprobs, min(MOST_TOLD, logprobs.shape[-1])))


def _key(seed: Array, step: Array) -> Array:
    """The key by which ``generate_ids`` draws the ``step``-th token of its first prompt."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), step)


@functools.partial(jax.jit, static_argnames=("graph", "drawn", "told"))
def _first(
    graph: Any, state: Any, hidden: Float[Array, "B D"], picks: _Picks, vocab_limit: Array, *, drawn: bool, told: bool
) -> tuple[Array, Any]:
    return _picked(nnx.merge(graph, state), hidden, picks, vocab_limit, drawn, told)


@functools.partial(jax.jit, static_argnames=("graph", "drawn", "told"), donate_argnames=("cache",))
def _next(
    graph: Any, state: Any, apart: list[Any] | None, cache: KVCache, token: Int[Array, " B"],
    running: Bool[Array, " B"], picks: _Picks, vocab_limit: Array, *, drawn: bool, told: bool
) -> tuple[KVCache, Array, Any]:  # fmt: skip
    """Writes ``token`` into the next column and picks the one that follows. Rows that do not run write padding."""
    model: Glm = nnx.merge(graph, state)
    if apart is not None:
        one_layer = nnx.graphdef(model.layers)
        layers: Any = nnx.List([nnx.merge(one_layer, parameters) for parameters in apart])
        model.layers = layers
    positions = jnp.sum(cache.segment_ids, axis=1, keepdims=True, dtype=jnp.int32)
    hidden, filled = model.hidden_states(token[:, None], positions, running.astype(jnp.int32)[:, None], cache)
    assert filled is not None
    return filled, *_picked(model, hidden[:, 0], picks, vocab_limit, drawn, told)


@functools.partial(jax.jit, static_argnames=("rows", "slots"))
def _laid_anew(cache: KVCache, length: Int[Array, ""], *, rows: int, slots: int) -> KVCache:
    """The cache with at least as many rows and columns, moved so that ``length`` is the next column to be written."""
    more = rows - cache.segment_ids.shape[0]
    k, v = (jnp.pad(x, [(0, 0), (0, more), (0, 0), (0, 0), (0, 0)]) for x in (cache.k, cache.v))
    segment_ids = jnp.pad(cache.segment_ids, [(0, more), (0, 0)])
    wide = with_room(KVCache(k, v, segment_ids, cache.length), slots)
    by = length - cache.length
    # What comes back at the other edge is of rows that were left: a row's own tokens stand right before ``length``.
    k, v, segment_ids = (jnp.roll(x, by, axis) for x, axis in ((wide.k, 2), (wide.v, 2), (wide.segment_ids, 1)))
    return KVCache(k, v, segment_ids, length)


@functools.partial(jax.jit, donate_argnames=("cache",))
def _joined(cache: KVCache, prompt: KVCache, row: Int[Array, ""]) -> KVCache:
    """The cache with a prompt's own in ``row``, its last token in the last column that is written."""
    start = cache.length - prompt.segment_ids.shape[1]
    k, v = (
        jax.lax.dynamic_update_slice(old, new, (0, row, start, 0, 0))
        for old, new in ((cache.k, prompt.k), (cache.v, prompt.v))
    )
    own = jax.lax.dynamic_update_slice(jnp.zeros_like(cache.segment_ids[:1]), prompt.segment_ids, (0, start))
    return cache._replace(k=k, v=v, segment_ids=jax.lax.dynamic_update_slice(cache.segment_ids, own, (row, 0)))


@dataclasses.dataclass
class _Row:
    wanted: Wanted
    token: int  # picked last, not in the cache yet
    used: int  # tokens in the cache
    step: int = 1  # of the token to be picked next


class ContinuousBatch:
    """Rows under way. Not for several threads at a time.

    Args:
        model: see ``generate_ids``.
        rows: answered at a time, at most.
        vocab_limit: see ``generate_ids``.

    Attributes:
        most: ``rows``.
    """

    def __init__(self, model: Glm, *, rows: int, vocab_limit: int | None = None):
        self._model, self.most = model, rows
        self._graph, self._state = nnx.split(model)
        self._apart = laid_apart(self._state)
        self._limit = np.int32(model.config.vocab_size if vocab_limit is None else vocab_limit)
        self._rows: dict[int, _Row] = {}
        self._cache: KVCache | None = None
        self._length = 0  # of the cache, known without asking the device

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def full(self) -> bool:
        """Whether none can join."""
        return len(self._rows) >= self.most

    def join(self, wanted: Wanted) -> tuple[int, Token]:
        """Takes a prompt in: the number of its row and its first token.

        Raises:
            InputError: as ``check_ids``.
        """
        check_ids(self._model, "the prompt", wanted.prompt, wanted.room, "max_tokens")
        count = len(wanted.prompt)
        hidden, prompt = prefill(self._graph, self._state, *left_pad([wanted.prompt], 1, bucket(count)))
        told = wanted.told is not None
        picked = _first(self._graph, self._state, hidden, _picks([(wanted, 0)]), self._limit,
                        drawn=wanted.temperature > 0, told=told)  # fmt: skip
        row = next(number for number in range(self.most) if number not in self._rows)
        self._make_room(row, prompt.segment_ids.shape[1], count + wanted.room)
        assert self._cache is not None
        self._cache = _joined(self._cache, prompt, np.int32(row))
        token = _read(picked, [(0, wanted)])[0]
        self._rows[row] = _Row(wanted, token.id, count)
        return row, token

    def _make_room(self, row: int, width: int, needed: int) -> None:
        """Room for ``width`` columns before the next one in ``row``, and for ``needed`` tokens of it."""
        rows, length = 1 << row.bit_length(), max([width, *(one.used for one in self._rows.values())])
        ends = [one.used + one.wanted.room - one.step for one in self._rows.values()]
        slots = bucket(max([width + 1, needed, *ends]))
        if (cache := self._cache) is None:
            config, dtype = self._model.config, self._model.dtype
            self._cache = KVCache.empty(config, rows, slots, dtype)._replace(length=jnp.int32(length))
            self._length = length
            return
        rows, slots = max(rows, cache.segment_ids.shape[0]), max(slots, cache.segment_ids.shape[1])
        if (rows, slots) != cache.segment_ids.shape or not width <= self._length < slots:
            self._cache = _laid_anew(cache, np.int32(length), rows=rows, slots=slots)
            self._length = length

    def step(self) -> dict[int, Token]:
        """The next token of every row."""
        assert self._cache is not None
        rows, slots = self._cache.segment_ids.shape
        if self._length == slots:  # there is room before the longest row, as much as it still needs
            self._length = max(one.used for one in self._rows.values())
            self._cache = _laid_anew(self._cache, np.int32(self._length), rows=rows, slots=slots)
        token, running = np.zeros(rows, np.int32), np.zeros(rows, bool)
        for number, one in self._rows.items():
            token[number], running[number] = one.token, True
        picks = [(self._rows[i].wanted, self._rows[i].step) if i in self._rows else None for i in range(rows)]
        under_way = [(number, one.wanted) for number, one in self._rows.items()]
        self._cache, *picked = _next(
            self._graph, self._state, self._apart, self._cache, token, running, _picks(picks), self._limit,
            drawn=any(one.temperature > 0 for _, one in under_way),
            told=any(one.told is not None for _, one in under_way),
        )  # fmt: skip
        self._length += 1
        found = _read(picked, under_way)
        for number, one in self._rows.items():
            one.token, one.used, one.step = found[number].id, one.used + 1, one.step + 1
        return found

    def leave(self, row: int) -> None:
        """Ends a row; its place is free."""
        del self._rows[row]
        if not self._rows:
            self._cache = None

    def clear(self) -> None:
        """Ends all rows, also after a step that failed."""
        self._rows, self._cache = {}, None


def cache_bytes(model: Glm, rows: int, context: int) -> int:
    """Bytes of the largest cache that a ``ContinuousBatch`` of ``rows`` can come to hold, no prompt with its room being
    longer than ``context`` tokens (at least 2). While it grows, or moves its columns, there are two."""
    slots = bucket(max(bucket(context - 1) + 1, context))
    empty = functools.partial(KVCache.empty, model.config, 1 << (rows - 1).bit_length(), slots, model.dtype)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(empty)))


def _picks(rows: Sequence[tuple[Wanted, int] | None]) -> _Picks:
    idle = (Wanted((0,), 1), 0)
    given = [row or idle for row in rows]
    return _Picks(
        jnp.asarray([wanted.seed for wanted, _ in given], jnp.uint32),
        jnp.asarray([step for _, step in given], jnp.int32),
        jnp.asarray([wanted.temperature for wanted, _ in given], jnp.float32),
        jnp.asarray([wanted.top_p for wanted, _ in given], jnp.float32),
    )


def _read(picked: Sequence[Any], rows: Sequence[tuple[int, Wanted]]) -> dict[int, Token]:
    """What the device says of ``rows``."""
    ids, told = np.asarray(picked[0]), picked[1]
    if told is None:
        return {row: Token(int(ids[row]), None, ()) for row, _ in rows}
    chosen, values, tokens = (np.asarray(one) for one in told)
    found = {}
    for row, wanted in rows:
        best = zip(tokens[row].tolist(), values[row].tolist(), strict=True)
        others = tuple((one, value) for one, value in best if math.isfinite(value))[: wanted.told or 0]
        found[row] = Token(int(ids[row]), float(chosen[row]) if wanted.told is not None else None, others)
    return found
