"""What the finished stages of a run left, by digest: what was changed since is not taken for theirs."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mentalglm_jax.checkpoints.adapters import CONFIG, WEIGHTS
from mentalglm_jax.checkpoints.hf_files import ADAPTER_FILES, CALIBRATION, INDEX, TOKENIZER_FILES, locate
from mentalglm_jax.data.records import SPLITS
from mentalglm_jax.evaluate.noted import check_same
from mentalglm_jax.evaluate.noted import digests as file_digests
from mentalglm_jax.foreign import at_home
from mentalglm_jax.text.tasks import TASKS_FILE
from mentalglm_jax.train.recipe import Recipe

DEV_GENERATIONS = "dev_generations.jsonl"  # of a model that explains first, for its calibration
# What a later stage, or another command, reads of a stage. Weights of whole models are told by their fingerprint; of
# the page of scores see ``evaluate.leaderboard``, for it may be made again with more in it.
_READ = {
    "data": (*(f"data/{variant}/{split}.jsonl" for variant in ("faithful", "unfaithful") for split in SPLITS),
             TASKS_FILE, *(f"tokenizer/{name}" for name in (*TOKENIZER_FILES, "generation_config.json"))),
    "export": (f"adapter/{CONFIG}", f"adapter/{WEIGHTS}", "reference_logits.npz"),
    "generate": ("generations.jsonl",), "evaluate": ("label_scores.jsonl", CALIBRATION),
    "pretrain": ("base/config.json", "base/model.safetensors"), "summary": ("summary.json",),
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
    return file_digests(directory, _names(directory, stage, adapter))


def talks_and_pairs(recipe: Recipe) -> dict[str, Path]:
    """The key of every file of conversations or pairs that a recipe names, and where it is."""
    stages = [*recipe.stages, *(recipe.pretrain.then if recipe.pretrain else ())]
    found = {}
    for stage in [*stages, *([recipe.probe.control] if recipe.probe.control else [])]:
        found[f"stages.{stage.name}.conversations"] = stage.conversations
        found[f"stages.{stage.name}.objective.pairs"] = stage.objective.pairs if stage.objective else None
    return {key: at_home(path) for key, path in found.items() if path is not None}


def read_in_place(recipe: Recipe) -> dict[str, str | None]:
    """SHA-256 of the files that later stages read where they lie, by their key in the recipe and their name: those of
    the base, of the adapter begun from, of conversations and pairs. Raises: InputError."""
    files = {key: (path.parent, [path.name]) for key, path in talks_and_pairs(recipe).items()}
    if recipe.model.path is not None:
        # Weights are told by the fingerprint that is taken where they are loaded: gigabytes are not read twice.
        files["model.path"] = locate(recipe.model.path), ["config.json", INDEX]
    if recipe.model.adapter is not None:
        files["model.adapter"] = locate(recipe.model.adapter, ADAPTER_FILES), [CONFIG, WEIGHTS]
    return {f"{key}/{name}": found for key, (place, names) in files.items()
            for name, found in sorted(file_digests(place, names).items())}  # fmt: skip


def _names(directory: Path, stage: str, adapter: Path | None) -> tuple[str, ...]:
    if adapter is not None:
        return tuple((adapter / name).relative_to(directory).as_posix() for name in (CONFIG, WEIGHTS))
    return _READ.get(stage, ())


def remove(directory: Path, names: Iterable[str]) -> None:
    """Deletes those of these files of a run that are there."""
    for name in names:
        (directory / name).unlink(missing_ok=True)


def check_unchanged(
    directory: Path, stage: str, adapter: Path | None, result: Mapping[str, Any],
    read: Callable[[str], bool] | None = None,
) -> None:  # fmt: skip
    """Whether what ``stage`` left is what it was when it was finished.

    Args:
        result: what run.json says that the stage found.
        read: which of its files, by their path, are read now; of the others nothing is asked, nor may they be gone.
            None is all, and none may be gone.

    Raises:
        InputError: a file is another one, is gone, or has come.
    """
    noted = result.get("files")
    if not isinstance(noted, dict):  # of a version that did not note them
        return
    names = [name for name in _names(directory, stage, adapter) if read is None or read(name)]
    check_same(directory, stage, noted, file_digests(directory, names), gone=read is None)
