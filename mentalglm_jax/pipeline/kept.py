"""What the finished stages of a run left, by digest: what was changed since is not taken for theirs."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mentalglm_jax.checkpoints.adapters import CONFIG, WEIGHTS
from mentalglm_jax.checkpoints.hf_files import CALIBRATION, TOKENIZER_FILES
from mentalglm_jax.data.records import SPLITS
from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import open_file, there
from mentalglm_jax.text.tasks import TASKS_FILE

DEV_GENERATIONS = "dev_generations.jsonl"  # of a model that explains first, for its calibration
# What a later stage, or another command, reads of a stage. Weights of whole models are told by their fingerprint; of
# the page of scores see ``evaluate.leaderboard``, for it may be made again with more in it.
_READ = {
    "data": (*(f"data/{variant}/{split}.jsonl" for variant in ("faithful", "unfaithful") for split in SPLITS),
             TASKS_FILE, *(f"tokenizer/{name}" for name in (*TOKENIZER_FILES, "generation_config.json"))),
    "export": (f"adapter/{CONFIG}", f"adapter/{WEIGHTS}", "reference_logits.npz"),
    "generate": ("generations.jsonl",), "evaluate": ("label_scores.jsonl", CALIBRATION),
}  # fmt: skip
# What goes when a stage is to be done again: read later, it would be taken for that of the new model.
OUTDATED = {
    "generate": ("generations.jsonl", "generations.jsonl.partial"),
    "evaluate": ("label_scores.jsonl", CALIBRATION, "evaluation.json", "evaluation.csv", "evaluation.html",
                 f"{DEV_GENERATIONS}.partial"),
    "summary": ("summary.json",),
}  # fmt: skip


def digests(directory: Path, stage: str, adapter: Path | None) -> dict[str, str | None]:
    """Path below the run directory to SHA-256 of what ``stage`` left, None of what it did not. ``adapter``: of a
    training stage, its folder."""
    names = _READ.get(stage, ())
    if adapter is not None:
        names = tuple((adapter / name).relative_to(directory).as_posix() for name in (CONFIG, WEIGHTS))
    return {name: _digest(directory / name) if there(directory / name) else None for name in names}


def remove(directory: Path, names: Iterable[str]) -> None:
    """Deletes those of these files of a run that are there."""
    for name in names:
        (directory / name).unlink(missing_ok=True)


def check_unchanged(directory: Path, stage: str, adapter: Path | None, result: Mapping[str, Any]) -> None:
    """Whether what ``stage`` left is what it was when it was finished.

    Args:
        result: what run.json says that the stage found.

    Raises:
        InputError: a file is another one, is gone, or has come.
    """
    noted = result.get("files")
    if not isinstance(noted, dict):  # of a version that did not note them
        return
    found = digests(directory, stage, adapter)  # what an earlier version did not look at is not in ``noted``
    if changed := sorted(name for name in noted if noted[name] != found.get(name)):
        how = "is gone" if found.get(changed[0]) is None else "has come" if noted[changed[0]] is None else "was changed"
        raise InputError(f"{directory / changed[0]}: {how} since stage {stage!r} was finished, and what later stages "
                         "found would not be of it; put back what was there, or begin anew with --restart")  # fmt: skip


def _digest(path: Path) -> str:
    try:
        found = hashlib.sha256()
        with open_file(path) as file:
            while block := file.read(1 << 20):
                found.update(block)
        return found.hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror or error})") from None
