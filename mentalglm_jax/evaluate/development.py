"""What development records say of a model's label probabilities: the scalings that make them believable."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mentalglm_jax.data.records import Record
from mentalglm_jax.data.selection import limited
from mentalglm_jax.evaluate.calibrated import fit_scalings
from mentalglm_jax.evaluate.readings import score_records
from mentalglm_jax.inference.generate import forget_partial, generate_records
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.text.tokenizer import GlmTokenizer

MOST_EXPLAINED = 200  # records of each task and language whose explanations are written for it: an answer costs more


def fit_on_development(
    model: Glm,
    tokenizer: GlmTokenizer,
    records: Sequence[Record],
    *,
    explains_first: bool,
    out_path: Path,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    fingerprint: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """``fit_scalings`` of ``records``, of the development split.

    Args:
        explains_first: the model writes its explanation first. Its labels are scored after explanations, so it answers
            up to ``MOST_EXPLAINED`` records of each task and language first.
        out_path: these answers, a file like ``generations.jsonl``. After an interruption the same call goes on.
        fingerprint: see ``generate_records``; so are the other arguments.

    Raises:
        InputError, RunError, Interrupted, Preempted: as ``generate_records`` and ``score_records``.
    """
    if not explains_first:
        return fit_scalings(score_records(model, tokenizer, records, batch_size=batch_size))
    records = limited(records, MOST_EXPLAINED)
    written = generate_records(model, tokenizer, records, out_path=out_path, max_new_tokens=max_new_tokens,
                               batch_size=batch_size, fingerprint=fingerprint, keep_partial=True,
                               progress=progress)  # fmt: skip
    scores = score_records(model, tokenizer, records, written=written, batch_size=batch_size)
    forget_partial(out_path)
    return fit_scalings(scores)


def errors_said(entry: Mapping[str, Any] | None) -> str:
    """Of a task's result (``evaluate``): what its scaling made of the expected calibration error; nothing without."""
    reading = (entry or {}).get("label_reading") or {}
    if not reading.get("calibrated"):
        return ""
    return f"; expected calibration error {reading['calibration']['ece']:.3f} → {reading['calibrated']['ece']:.3f}"
