"""How probable each label is: scores of label sentences."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mentalglm_jax.devices.distributed import on_host, placed
from mentalglm_jax.devices.together import check_same
from mentalglm_jax.errors import InputError
from mentalglm_jax.inference.decode import (
    Progress,
    check_ids,
    copies,
    left_pad,
    on_rows,
    plan,
    prefill,
    shared_prefix,
    with_room,
)
from mentalglm_jax.model.glm import Glm, KVCache
from mentalglm_jax.model.sharding import mesh_of
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import GlmTokenizer


@functools.partial(jax.jit, static_argnames=("graph",))
def score_batch(
    graph: Any, state: Any, tokens: Int[Array, "B P"], segment_ids: Int[Array, "B P"], candidates: Int[Array, "K C"],
    lengths: Int[Array, " K"], prefix: KVCache | None
) -> Float[Array, "B K"]:  # fmt: skip
    """The scores of ``score_labels`` for one batch; candidates are padded on the right, ``lengths`` are their own."""
    model: Glm = nnx.merge(graph, state)
    last, cache = prefill(graph, state, tokens, segment_ids, prefix)
    width = candidates.shape[1]
    positions = jnp.sum(cache.segment_ids, axis=1, keepdims=True, dtype=jnp.int32) + jnp.arange(width)
    cache = with_room(cache, cache.segment_ids.shape[1] + width)

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
    share_prefix: bool = False, progress: Progress | None = None
) -> Float[np.ndarray, "N K"]:  # fmt: skip
    """Log-probability (natural, summed over its tokens) of every candidate as the continuation of every prompt.

    The prompt is run once, each candidate goes on from its cache. Memory: logits of batch_size * longest candidate.

    Args:
        prompts: N prompts as token ids, e.g. ``tokenizer.prompt_ids(record.prompt)``.
        candidates: K continuations as token ids, e.g. the values of ``label_ids``; at least one token each.
        share_prefix: see ``generate_ids``.

    Raises:
        InputError: an empty prompt or candidate, an id the model does not have, or a text beyond the context.
    """
    check_same("posts", [*map(list, prompts), *map(list, candidates)])
    if not candidates:
        raise InputError("score_labels: no candidate to score; give at least one")
    for number, candidate in enumerate(candidates):
        check_ids(model, f"candidate {number}", candidate)
    widest = max(len(candidate) for candidate in candidates)
    for number, prompt in enumerate(prompts):
        check_ids(model, f"prompt {number}", prompt, widest, "the longest candidate")
    padded = np.zeros((len(candidates), -(-widest // 8) * 8), np.int32)
    for row, candidate in zip(padded, candidates, strict=True):
        row[: len(candidate)] = candidate
    lengths = np.asarray([len(candidate) for candidate in candidates], np.int32)
    graph, state = nnx.split(model)
    mesh = mesh_of(model)
    padded, lengths = placed((padded, lengths), mesh)
    scores = np.zeros((len(prompts), len(candidates)))
    done = 0
    skip, prefix = shared_prefix(graph, state, prompts, mesh) if share_prefix else (0, None)
    for numbers, size, length in plan([len(prompt) - skip for prompt in prompts], batch_size, copies(mesh)):
        tokens, segment_ids = on_rows(left_pad([prompts[i][skip:] for i in numbers], size, length), mesh)
        found = score_batch(graph, state, tokens, segment_ids, padded, lengths, prefix)
        scores[numbers] = on_host(found)[: len(numbers)]
        done += len(numbers)
        if progress is not None:
            progress(done, len(prompts))
    return scores


def label_ids(
    tokenizer: GlmTokenizer, task: str | tasks.Task, language: str, order: tasks.Order = "label_first"
) -> dict[str, list[int]]:
    """Label key to the ids of its label sentence with what leads to it: what begins an answer (GLM's line break), or
    (explanation first) the colon that follows ``explanation_ids``.

    Raises:
        InputError: the ids of one are how another's begin, which could then never be the more probable of the two.
    """
    task = tasks.get_task(task)
    lead = tokenizer.answer_lead if order == "label_first" else tasks.before_label(task, "", language)[1]
    candidates = task.candidates(language)
    found = {key: tokenizer.encode(lead + sentence) for key, sentence in candidates.items()}
    for key, other in itertools.permutations(found, 2):
        if found[key] == found[other][: len(found[key])]:
            raise InputError(
                f"task {task.name}, language {language}: in this model's tokens {candidates[key]!r} is how "
                f"{candidates[other]!r} begins, so label {other!r} could never be the more probable one; end the "
                "sentences in the task file with a full stop, or do without label scores (generate.label_scores=false)"
            )
    return found


def explanation_ids(tokenizer: GlmTokenizer, task: str | tasks.Task, explanation: str, language: str) -> list[int]:
    """Ids of an explanation-first answer from its beginning up to the label's colon."""
    return tokenizer.encode(tokenizer.answer_lead + tasks.before_label(task, explanation, language)[0])
