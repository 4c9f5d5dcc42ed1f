"""Answers to posts for people who want answers: what the model says, and how probable it finds each label."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mentalglm_jax.data.records import Post
from mentalglm_jax.devices.together import on_primary
from mentalglm_jax.evaluate.answers import softmax
from mentalglm_jax.evaluate.calibrated import Scaling, scaling_of
from mentalglm_jax.evaluate.readings import score_records
from mentalglm_jax.inference.generate import forget_partial, generate_records, write_rows
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import GlmTokenizer


def answer_posts(
    model: Glm, tokenizer: GlmTokenizer, posts: Sequence[Post], out: str | Path, *, probabilities: bool = True,
    scalings: Mapping[str, Scaling] | None = None, max_new_tokens: int | None = None, temperature: float = 0.0,
    seed: int = 0, batch_size: int = 32, system: str | None = None,
    progress: Callable[[str], Callable[..., None]] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of ``generations.jsonl`` for ``posts``, written to ``out`` (``write_rows``); after an interruption the same
    call goes on.

    Args:
        probabilities: adds ``label_probabilities``, label key to the probability of the sentence that states this label
            alone, as a share of all labels' (``score_records``): after the post, or after the explanation where the
            model gave one first. ``probabilities_calibrated`` says whether they are calibrated; calibrated ones of a
            task with several labels are each for itself, no shares.
        scalings: of tasks, which calibrate the probabilities (``calibrated.scalings_of``).
        seed: of the draws.
        system: a system turn instead of the task's own.
        progress: starts a stage and returns its ``progress(done, total)``.

    Raises:
        InputError, RunError: as ``generate_records`` and ``score_records``.
    """
    stage = progress if progress is not None else lambda name: None
    out = Path(out)
    rows = generate_records(model, tokenizer, posts, out_path=out, max_new_tokens=max_new_tokens,
                            temperature=temperature, seed=seed, batch_size=batch_size, system=system,
                            keep_partial=probabilities, replace=False, progress=stage("generate"))  # fmt: skip
    if not probabilities:
        return rows
    first = any(tasks.explains_first(row["task"], row["language"], row["output_text"]) for row in rows)
    scores = score_records(model, tokenizer, posts, written=rows if first else None, batch_size=batch_size,
                           system=system, scalings=scalings, progress=stage("label probabilities"))  # fmt: skip
    for row, score in zip(rows, scores, strict=True):
        values = np.asarray(list(score["label_logprobs"].values()), float)
        row["probabilities_calibrated"] = (by := scaling_of(score)) is not None
        chances = (softmax if by is None else by.probabilities)(values).tolist()
        row["label_probabilities"] = dict(zip(score["label_logprobs"], chances, strict=True))
    on_primary(lambda: write_rows(out, rows))
    forget_partial(out)
    return rows
