"""Batched decoding with a key/value cache, label scoring, and the ``generations.jsonl`` file.

Prompts are sorted by length, padded on the left to one of a few lengths (buckets) and decoded in lock step: one
``prefill`` program per (rows, bucket), one ``decode`` program per (rows, cache slots). Padding has segment id 0, so a
prompt's answer does not depend on the prompts beside it; nor do its random draws, which are keyed by prompt.
"""

import dataclasses
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from mentalglm_jax import tasks
from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.files import write_text
from mentalglm_jax.glm import Glm, KVCache
from mentalglm_jax.tokenizer import GlmTokenizer

Progress = Callable[[int, int], None]  # (prompts done, prompts in all)

# Prompt tokens prefilled at once, padding included: bounds the attention scores of long prompts (rows * bucket ** 2).
BATCH_TOKENS = 16384


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is picked: the most probable one at temperature 0, else a draw from what the filters leave.

    ``top_k`` keeps the k most probable tokens; ``top_p`` then keeps the fewest most probable ones that together reach
    this probability (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751).

    Raises:
        InputError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def pick(self, logits: Float[Array, "B V"], keys: Array, step: Int[Array, ""]) -> Int[Array, " B"]:
        """One token per row; row ``i`` draws with ``fold_in(keys[i], step)``."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = filter_logits(logits / self.temperature, self.top_k, self.top_p)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def filter_logits(logits: Float[Array, "B V"], top_k: int | None, top_p: float | None) -> Float[Array, "B V"]:
    """``logits`` with -inf for the tokens that ``top_k``, then ``top_p`` exclude, as in transformers; tokens exactly as
    probable as the last one kept are kept too."""
    if top_k is not None and top_k < logits.shape[-1]:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][:, -1:], -jnp.inf, logits)
    if top_p is not None and top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        last = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < last, -jnp.inf, logits)
    return logits


def bucket(length: int) -> int:
    """The padded length of ``length`` tokens: 32, 64, 128, 192, 256, 384, 512, 768, ...; few programs, little waste."""
    size = 32
    while size < length:
        size *= 2
    return size * 3 // 4 if size >= 256 and size * 3 // 4 >= length else size


@functools.partial(jax.jit, static_argnames=("graph",))
def _prefill(
    graph: Any, state: Any, tokens: Int[Array, "B P"], segment_ids: Int[Array, "B P"]
) -> tuple[Array, KVCache]:
    """The last token's hidden state [B, D] and a cache of exactly P slots. Every prompt ends in the last column."""
    model: Glm = nnx.merge(graph, state)
    cache = KVCache.empty(model.config, tokens.shape[0], tokens.shape[1], model.dtype)
    hidden, filled = model.hidden_states(tokens, segment_ids=segment_ids, cache=cache)
    assert filled is not None
    return hidden[:, -1], filled


def _with_room(cache: KVCache, slots: int) -> KVCache:
    """The cache with zeros behind it up to ``slots``; prefilling into the longer one would attend to them in vain."""
    more = slots - cache.segment_ids.shape[1]
    wide = [(0, 0), (0, 0), (0, more), (0, 0), (0, 0)]
    return cache._replace(
        k=jnp.pad(cache.k, wide), v=jnp.pad(cache.v, wide), segment_ids=jnp.pad(cache.segment_ids, [(0, 0), (0, more)])
    )


@functools.partial(jax.jit, static_argnames=("graph", "sampling", "slots"))
def _decode(
    graph: Any, state: Any, hidden: Float[Array, "B D"], cache: KVCache, key: Array, rows: UInt32[Array, " B"],
    finished: Bool[Array, " B"], limit: Int[Array, ""], eos_ids: Int[Array, " E"], vocab_limit: Int[Array, ""], *,
    sampling: Sampling, slots: int
) -> tuple[Int[Array, "B N"], Int[Array, " B"]]:  # fmt: skip
    """Up to ``limit`` tokens per row, and how many of them belong to it; ends when every row has met a stop token.

    ``slots`` is the size of the cache; ``rows`` numbers the prompts for their random keys; rows that are ``finished``
    from the start are filling.
    """
    model: Glm = nnx.merge(graph, state)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    lengths = jnp.sum(cache.segment_ids, axis=1, dtype=jnp.int32)
    room = slots - cache.segment_ids.shape[1]
    cache = _with_room(cache, slots)

    def pick(hidden: Array, step: Array) -> tuple[Array, Array]:
        logits = model.unembed(hidden)
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_limit, logits, -jnp.inf)
        token = sampling.pick(logits, keys, step)
        return token, jnp.isin(token, eos_ids)

    def running(carry: tuple[Any, ...]) -> Array:
        step, done = carry[0], carry[3]
        return (step < limit) & ~jnp.all(done)

    def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, cache, done, output, count = carry
        positions = lengths + step - 1  # of the token picked last
        hidden, cache = model.hidden_states(token[:, None], positions[:, None], jnp.ones_like(token)[:, None], cache)
        token, stops = pick(hidden[:, 0], step)
        output = jax.lax.dynamic_update_slice(output, token[:, None], (0, step))
        return step + 1, token, cache, done | stops, output, jnp.where(done, count, step + 1)

    token, stops = pick(hidden, jnp.int32(0))
    output = jnp.zeros((token.shape[0], room), jnp.int32).at[:, 0].set(token)
    carry = (jnp.int32(1), token, cache, finished | stops, output, jnp.where(finished, 0, 1))
    *_, output, count = jax.lax.while_loop(running, advance, carry)
    return output, count


def generate_ids(
    model: Glm,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    vocab_limit: int | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Continues token id prompts of any lengths; the model may carry an adapter that is not merged.

    Args:
        prompts: token ids, each prompt at least one.
        max_new_tokens: generated per prompt at most.
        eos_ids: generation of a prompt stops after any of these; the stop token is part of the result.
        temperature, top_k, top_p: see ``Sampling``; 0 is greedy.
        seed: of the draws. Prompt ``i`` has its own random key, whatever batch it is decoded in.
        batch_size: prompts decoded together.
        vocab_limit: ids from here on (padding rows of the embedding) are never generated; default: none are excluded.
        progress: called after every batch with the numbers of prompts done and in all.

    Returns:
        The generated ids of each prompt, in the order of ``prompts``.

    Raises:
        InputError: an option out of range, an empty prompt, an id the model does not have, or a prompt that with
            ``max_new_tokens`` exceeds the model's context.
    """
    sampling, numbers = Sampling(temperature=temperature, top_k=top_k, top_p=top_p), range(len(prompts))
    results: dict[int, list[int]] = {}
    for batch in _batches(
        model, prompts, [f"prompt {i}" for i in numbers], numbers, max_new_tokens=max_new_tokens, eos_ids=eos_ids,
        sampling=sampling, seed=seed, batch_size=batch_size, vocab_limit=vocab_limit
    ):  # fmt: skip
        results |= dict(batch)
        if progress is not None:
            progress(len(results), len(prompts))
    return [results[i] for i in numbers]


def generate(
    model: Glm,
    tokenizer: GlmTokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    system: str | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Answers of the model as ``answer_text``, each prompt being a user turn of its own chat; see ``generate_ids``."""
    outputs = generate_ids(
        model, [tokenizer.prompt_ids(prompt, system) for prompt in prompts], max_new_tokens=max_new_tokens,
        eos_ids=tokenizer.eos_ids, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, batch_size=batch_size,
        vocab_limit=tokenizer.vocab_size, progress=progress
    )  # fmt: skip
    return [answer_text(tokenizer, ids) for ids in outputs]


def answer_text(tokenizer: GlmTokenizer, ids: Sequence[int]) -> str:
    """The text of generated ids without special tokens and without the line break that opens an assistant turn."""
    return tokenizer.decode(ids).removeprefix("\n")


def _batches(
    model: Glm, prompts: Sequence[Sequence[int]], names: Sequence[str], rows: Sequence[int], *, max_new_tokens: int,
    eos_ids: Sequence[int], sampling: Sampling, seed: int, batch_size: int, vocab_limit: int | None
) -> Iterator[list[tuple[int, list[int]]]]:  # fmt: skip
    """(number of the prompt, its generated ids) per batch, the longest prompts first: lack of memory shows at once."""
    vocab = model.config.vocab_size
    if max_new_tokens < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}")
    if not 0 < (vocab_limit := vocab if vocab_limit is None else vocab_limit) <= vocab:
        raise InputError(f"the tokenizer has {vocab_limit} tokens, the model {vocab}: they do not belong together")
    for name, prompt in zip(names, prompts, strict=True):
        _check_ids(model, name, prompt, max_new_tokens, "max_new_tokens")
    graph, state = nnx.split(model)
    key, stops = jax.random.key(seed), np.asarray([*eos_ids], np.int32)
    for numbers, size, length in _plan([len(prompt) for prompt in prompts], batch_size):
        tokens, segment_ids = left_pad([prompts[i] for i in numbers], size, length)
        salts = np.asarray([rows[i] for i in numbers] + [0] * (size - len(numbers)), np.uint32)
        hidden, cache = _prefill(graph, state, tokens, segment_ids)
        output, count = _decode(
            graph, state, hidden, cache, key, salts, np.arange(size) >= len(numbers), np.int32(max_new_tokens), stops,
            np.int32(vocab_limit), sampling=sampling, slots=bucket(length + max_new_tokens)
        )  # fmt: skip
        output, count = np.asarray(output), np.asarray(count)
        yield [(number, output[i, : count[i]].tolist()) for i, number in enumerate(numbers)]


def _check_ids(model: Glm, name: str, ids: Sequence[int], more: int = 0, what: str = "") -> None:
    limit, vocab = model.config.max_position_embeddings, model.config.vocab_size
    if not len(ids):
        raise InputError(f"{name}: is empty; at least one token is needed")
    if not 0 <= min(ids) <= max(ids) < vocab:
        raise InputError(f"{name}: token ids must be in 0..{vocab - 1}; is this the model's own tokenizer?")
    if more and len(ids) + more > limit:
        raise InputError(
            f"{name}: its prompt has {len(ids)} tokens and needs room for {more} more ({what}), the model's context is "
            f"{limit}; shorten the post so that the prompt has at most {max(limit - more, 0)}, or leave it out"
        )


def _plan(lengths: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], int, int]]:
    """(numbers of the prompts, rows of the batch, padded length), the longest prompts first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    whole = min(batch_size, 1 << (len(lengths) - 1).bit_length()) if lengths else 1
    while order:
        length = bucket(lengths[order[0]])
        rows = whole
        while rows > 1 and rows * length > BATCH_TOKENS:
            rows = (rows + 1) // 2
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


@functools.partial(jax.jit, static_argnames=("graph",))
def _score(
    graph: Any, state: Any, tokens: Int[Array, "B P"], segment_ids: Int[Array, "B P"], candidates: Int[Array, "K C"],
    lengths: Int[Array, " K"]
) -> Float[Array, "B K"]:  # fmt: skip
    """The scores of ``score_labels`` for one batch; candidates are padded on the right, ``lengths`` are their own."""
    model: Glm = nnx.merge(graph, state)
    last, cache = _prefill(graph, state, tokens, segment_ids)
    width = candidates.shape[1]
    cache = _with_room(cache, tokens.shape[1] + width)
    positions = jnp.sum(segment_ids, axis=1, keepdims=True, dtype=jnp.int32) + jnp.arange(width)

    def one(candidate: tuple[Array, Array]) -> Array:
        ids, length = candidate
        used = jnp.arange(width) < length
        row, segments = (jnp.broadcast_to(x, positions.shape) for x in (ids, used.astype(jnp.int32)))
        hidden, _ = model.hidden_states(row, positions, segments, cache)  # each one starts from the prompt's cache
        before = jnp.concatenate([last[:, None], hidden[:, :-1]], axis=1)
        log_probabilities = jax.nn.log_softmax(model.unembed(before), axis=-1)
        chosen = jnp.take_along_axis(log_probabilities, row[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(used, chosen, 0.0), axis=1)

    return jax.lax.map(one, (candidates, lengths)).T


def score_labels(
    model: Glm, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]], *, batch_size: int = 32,
    progress: Progress | None = None
) -> Float[np.ndarray, "N K"]:  # fmt: skip
    """Log-probability (natural, summed over its tokens) of every candidate as the continuation of every prompt.

    The prompt is run once, each candidate goes on from its cache. Memory: logits of batch_size * longest candidate.

    Args:
        prompts: N prompts as token ids, e.g. ``tokenizer.prompt_ids(record.prompt)``.
        candidates: K continuations as token ids, e.g. the values of ``label_ids``; at least one token each.

    Raises:
        InputError: an empty prompt or candidate, an id the model does not have, or a text beyond the context.
    """
    if not candidates:
        raise InputError("score_labels: no candidate to score; give at least one")
    for number, candidate in enumerate(candidates):
        _check_ids(model, f"candidate {number}", candidate)
    widest = max(len(candidate) for candidate in candidates)
    for number, prompt in enumerate(prompts):
        _check_ids(model, f"prompt {number}", prompt, widest, "the longest candidate")
    padded = np.zeros((len(candidates), -(-widest // 8) * 8), np.int32)
    for row, candidate in zip(padded, candidates, strict=True):
        row[: len(candidate)] = candidate
    lengths = np.asarray([len(candidate) for candidate in candidates], np.int32)
    graph, state = nnx.split(model)
    scores = np.zeros((len(prompts), len(candidates)))
    done = 0
    for numbers, size, length in _plan([len(prompt) for prompt in prompts], batch_size):
        tokens, segment_ids = left_pad([prompts[i] for i in numbers], size, length)
        scores[numbers] = np.asarray(_score(graph, state, tokens, segment_ids, padded, lengths))[: len(numbers)]
        done += len(numbers)
        if progress is not None:
            progress(done, len(prompts))
    return scores


def label_ids(tokenizer: GlmTokenizer, task: str | tasks.Task, language: str) -> dict[str, list[int]]:
    """Label key to the ids of its label sentence as an answer begins: a line break, then the sentence."""
    candidates = tasks.get_task(task).candidates(language)
    return {key: tokenizer.encode("\n" + sentence) for key, sentence in candidates.items()}


def generation_row(
    record: Record, tokenizer: GlmTokenizer, prompt_ids: list[int], output_ids: list[int]
) -> dict[str, Any]:
    """One row of ``generations.jsonl``: the record, what the model was given and gave, and what that says.

    ``output_ids`` are as generated, stop token included; ``output_text`` is their text without it. ``candidates`` are
    the label sentences of the task, ``label_text`` the one that stands in the output.
    """
    text = answer_text(tokenizer, output_ids)
    task = tasks.get_task(record.task)
    parsed = tasks.parse(task, record.language, text)
    label: str | list[str] | None = None
    if parsed.labels is not None:
        label = parsed.labels[0] if task.kind == "single" else list(parsed.labels)
    return record.to_dict() | {
        "prompt_ids": prompt_ids,
        "output_ids": output_ids,
        "output_text": text,
        "parsed_label": label,
        "parsed_explanation": parsed.explanation,
        "parse_status": parsed.status,
        "label_text": text[slice(*parsed.label_span)] if parsed.label_span is not None else None,
        "candidates": task.candidates(record.language),
    }


def generate_records(
    model: Glm,
    tokenizer: GlmTokenizer,
    records: Sequence[Record],
    *,
    out_path: str | Path,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    system: str | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Answers every record and writes ``out_path`` (``generations.jsonl``), rows in the order of ``records``.

    Finished batches are kept in ``<out_path>.partial``; after an interruption the same call goes on from there.
    A record's draws depend on ``seed`` and its id only.

    Returns:
        The rows written.

    Raises:
        InputError: as ``generate_ids``, naming the record; two records with one id; or the partial file was left by
            another model or other options, or is damaged.
        RunError: the file system refused.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    prompts = {record.id: tokenizer.prompt_ids(record.prompt, system) for record in records}
    if len(prompts) != len(records):
        ids = [record.id for record in records]
        raise InputError(f"record {next(i for i in ids if ids.count(i) > 1)!r} is given twice; ids must differ")
    for record_id, prompt in prompts.items():
        _check_ids(model, f"record {record_id!r}", prompt, max_new_tokens, "max_new_tokens")
    out_path = Path(out_path)
    made_by = {"model": model_fingerprint(model), "sampling": dataclasses.asdict(sampling), "seed": seed,
               "max_new_tokens": max_new_tokens, "eos_ids": list(tokenizer.eos_ids)}  # fmt: skip
    partial = out_path.with_name(out_path.name + ".partial")
    rows = {i: row for i, row in _open_partial(partial, made_by).items() if prompts.get(i) == row["prompt_ids"]}
    todo = [record for record in records if record.id not in rows]
    if progress is not None and rows:
        progress(len(rows), len(records))
    for batch in _batches(
        model, [prompts[record.id] for record in todo], [f"record {record.id!r}" for record in todo],
        [zlib.crc32(record.id.encode()) for record in todo], max_new_tokens=max_new_tokens, eos_ids=tokenizer.eos_ids,
        sampling=sampling, seed=seed, batch_size=batch_size, vocab_limit=tokenizer.vocab_size
    ):  # fmt: skip
        fresh = [generation_row(todo[i], tokenizer, prompts[todo[i].id], ids) for i, ids in batch]
        _append(partial, fresh)
        rows |= {row["id"]: row for row in fresh}
        if progress is not None:
            progress(len(rows), len(records))
    ordered = [rows[record.id] for record in records]
    write_text(out_path, _jsonl(ordered))
    partial.unlink(missing_ok=True)
    return ordered


def _open_partial(path: Path, made_by: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows, by id, of an unfinished ``generate_records``; the first line of its file says what made them."""
    header = (json.dumps({"made_by": made_by}) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]  # what a crash cut short is generated again
        if not whole:
            path.write_bytes(header)
        elif len(whole) < len(data):
            os.truncate(path, len(whole))
    except OSError as error:
        raise _cannot_write(path, error) from error
    first, *lines = (whole or header).splitlines()
    if first != header.rstrip():
        raise InputError(
            f"{path}: was left by another model or other options; delete it to start over, "
            "or go on with the model and options it was begun with"
        )
    try:
        return {row["id"]: row for row in map(json.loads, lines) if row["prompt_ids"]}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: is damaged ({error}); delete it to start over") from None


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(_jsonl(rows))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: cannot write ({error.strerror or error}); rows written before are kept")


def _jsonl(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def model_fingerprint(model: Glm) -> str:
    """A hash of configuration and weights, adapter included: bits are summed, so that it is exact on every device."""
    sums = jax.tree.leaves_with_path(_bit_sums(nnx.split(model)[1]))
    parts = [(jax.tree_util.keystr(path), int(value)) for path, value in sums]
    return hashlib.sha256(repr((model.config, str(model.dtype), parts)).encode()).hexdigest()[:16]


@jax.jit
def _bit_sums(state: Any) -> Any:
    def bit_sum(x: Array) -> Array:
        bits = x.view(f"uint{8 * x.dtype.itemsize}") if jnp.issubdtype(x.dtype, jnp.floating) else x
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(bit_sum, state)
