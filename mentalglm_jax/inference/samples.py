"""Several answers to every post, drawn: what `probes rank` chooses among."""

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mentalglm_jax.data.records import Post
from mentalglm_jax.devices.together import held_by_primary, on_primary, stopping_together
from mentalglm_jax.errors import InputError
from mentalglm_jax.files import working_on
from mentalglm_jax.inference.decode import Progress, Sampling, batches
from mentalglm_jax.inference.generate import (
    answer_text,
    append_rows,
    check_unfinished,
    forget_partial,
    generation_row,
    open_partial,
    partial_file,
    prompts_of,
    write_rows,
)
from mentalglm_jax.model.fingerprint import model_fingerprint
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import GlmTokenizer

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the samples: ``duplicates`` said word for word what an earlier one of their post says;
    ``other_label`` stated, with ``keep_label``, another label than the greedy answer; ``unlabelled`` are posts whose
    greedy answer states none, so that there was nothing to keep."""

    posts: int
    rows: int
    duplicates: int
    other_label: int
    unlabelled: int


def generate_samples(
    model: Glm, tokenizer: GlmTokenizer, posts: Sequence[Post], *, out_path: str | Path, samples: int,
    temperature: float, min_p: float | None = None, keep_label: bool = False, max_new_tokens: int | None = None,
    seed: int = 0, batch_size: int = 32, system: str | None = None, progress: Progress | None = None
) -> tuple[list[Row], Counts]:  # fmt: skip
    """``samples`` answers to every post, written to ``out_path`` as rows of generations.jsonl: ``sample`` is the number
    of an answer, and stands in its id (``r1#2``); ``drawn`` is how often it came, as repetitions are not written. A
    prompt is run once for all its answers.

    With ``keep_label`` answer 0 is the greedy one and the others go on from its label; where the explanation comes
    first, they are drawn whole and dropped where their label is another. The draws of an answer depend on ``seed`` and
    its id only. Finished batches are kept as by ``generate_records``; the same call goes on after an interruption.

    Args:
        temperature: above 0.
        min_p: tokens less probable than this share of the most probable one are never drawn.
        batch_size: answers decoded together.

    Returns:
        The rows written, and how many were not.

    Raises:
        InputError, RunError: as ``generate_records``; nothing would be drawn; or there are finished answers.
    """
    if samples < 1:
        raise InputError(f"samples must be at least 1, got {samples}")
    sampling = Sampling(temperature=temperature, min_p=min_p)
    if temperature == 0:
        raise InputError("samples need a temperature above 0: at 0 all answers to a post are one")
    prompts, max_new_tokens = prompts_of(model, tokenizer, posts, system, max_new_tokens)
    out_path = Path(out_path)
    by = model_fingerprint(model)
    made_by = {"model": by, "sampling": dataclasses.asdict(sampling), "seed": seed,
               "max_new_tokens": max_new_tokens, "eos_ids": list(tokenizer.eos_ids), "samples": samples,
               "keep_label": keep_label}  # fmt: skip
    common: dict[str, Any] = {"eos_ids": tokenizer.eos_ids, "seed": seed, "vocab_limit": tokenizer.vocab_size}
    total = len(posts) * (samples + keep_label)

    def row(post: Post, number: int, ids: list[int]) -> Row:
        named = dataclasses.replace(post, id=_id(post, number))
        return {**generation_row(named, tokenizer, prompts[post.id], ids), "sample": number, "answered_by": by}

    with held_by_primary(lambda: working_on(out_path)), stopping_together("generating") as check:
        partial = partial_file(out_path)
        on_primary(lambda: check_unfinished(out_path))
        left = on_primary(lambda: open_partial(partial, made_by, tokenizer.vocab_size))
        rows = {name: row(post, number, left[name]["output_ids"]) for post in posts for number in range(samples + 1)
                if (name := _id(post, number)) in left and left[name]["prompt_ids"] == prompts[post.id]}  # fmt: skip

        def add(fresh: list[Row]) -> None:
            on_primary(lambda: append_rows(partial, fresh))
            rows.update((row["id"], row) for row in fresh)
            if progress is not None:
                progress(min(len(rows), total), total)
            check()

        if keep_label:
            todo = [post for post in posts if _id(post, 0) not in rows]
            for batch in batches(
                model, [prompts[post.id] for post in todo], [f"record {post.id!r}" for post in todo],
                [0] * len(todo), max_new_tokens=max_new_tokens, sampling=Sampling(), batch_size=batch_size, **common
            ):  # fmt: skip
                add([row(todo[i], 0, ids) for i, ids in batch])
        begun = {post.id: kept_ids(tokenizer, rows[_id(post, 0)]) if keep_label else [] for post in posts}
        drawn = [post for post in posts if begun[post.id] is not None]
        for name in [name for post in posts for k in range(1, samples + 1) if (name := _id(post, k)) in rows
                     and not _goes_on(rows[name], begun[post.id])]:  # fmt: skip
            del rows[name]  # the label was read otherwise when it was drawn
        for length in sorted({len(begun[post.id] or ()) for post in drawn}):
            todo = [post for post in drawn if len(begun[post.id] or ()) == length
                    and not all(_id(post, k) in rows for k in range(1, samples + 1))]  # fmt: skip
            if length >= max_new_tokens:
                continue  # the label alone fills the answer
            for batch in batches(
                model, [[*prompts[post.id], *(begun[post.id] or ())] for post in todo],
                [f"record {post.id!r}" for post in todo],
                [zlib.crc32(_id(post, k).encode()) for post in todo for k in range(1, samples + 1)], answers=samples,
                max_new_tokens=max_new_tokens - length, sampling=sampling, batch_size=batch_size, **common
            ):  # fmt: skip
                add([row(todo[i // samples], i % samples + 1, [*(begun[todo[i // samples].id] or ()), *ids])
                     for i, ids in batch])  # fmt: skip
        kept, duplicates, other = _different(posts, rows, samples, keep_label)
        on_primary(lambda: write_rows(out_path, kept))
        forget_partial(out_path)
    unlabelled = sum(value is None for value in begun.values())
    return kept, Counts(len(posts), len(kept), duplicates, other, unlabelled)


def kept_ids(tokenizer: GlmTokenizer, row: Mapping[str, Any]) -> list[int] | None:
    """What of a greedy answer its samples go on from: all up to the end of its label, a token that reaches beyond it
    whole; nothing where the explanation comes first; None where it states no label."""
    if row["parsed_label"] is None:
        return None
    text, ids = row["output_text"], row["output_ids"]
    if tasks.explains_first(row["task"], row["language"], text):
        return []
    span = tasks.parse(row["task"], row["language"], text).label_span
    end = len(text) if span is None else span[1]
    for count in range(1, len(ids)):
        begun = answer_text(tokenizer, ids[:count])
        if len(begun) >= end and begun[:end] == text[:end]:
            return list(ids[:count])
    return list(ids)


def _different(
    posts: Iterable[Post], rows: Mapping[str, Row], samples: int, keep_label: bool
) -> tuple[list[Row], int, int]:
    """The rows to keep, in the order of the posts; and how many are repetitions, and of another label."""
    kept: list[Row] = []
    duplicates = other = 0
    for post in posts:
        seen: dict[tuple[str, str], Row] = {}
        for row in (rows[name] for k in range(samples + 1) if (name := _id(post, k)) in rows):
            said = row["output_text"], row["finish"]
            if keep_label and row["parsed_label"] != rows[_id(post, 0)]["parsed_label"]:
                other += 1
            elif said in seen:
                seen[said]["drawn"] += 1
                duplicates += 1
            else:
                seen[said] = {**row, "drawn": 1}
        kept += seen.values()
    return kept, duplicates, other


def _id(post: Post, number: int) -> str:
    return f"{post.id}#{number}"


def _goes_on(row: Row, begun: list[int] | None) -> bool:
    return begun is not None and row["output_ids"][: len(begun)] == begun
