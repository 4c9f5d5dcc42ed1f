"""Whether files of a run are still those that its stages left: run.json has their digests.

Tables and cards read a run's answers and scores without knowing how a run is made; what was put there from another run
must not become a line of them.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mentalglm_jax.checkpoints.hf_files import CALIBRATION
from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import open_file, read_json, there

_LEFT = {"generate": ("generations.jsonl",), "evaluate": ("label_scores.jsonl", CALIBRATION)}


def check_noted(directory: Path) -> None:
    """Whether answers, label scores and calibration in ``directory`` are what the stages of its run left, where it is a
    run's. What is gone is no matter: posts may be deleted, and scores kept.

    Raises:
        InputError: a file is another one, or has come.
    """
    try:
        stages = read_json(directory / "run.json").get("stages")
    except InputError:  # no run, or none that can be read
        return
    if not isinstance(stages, dict):
        return
    for stage, names in _LEFT.items():
        said = stages.get(stage)
        noted = said.get("files") if isinstance(said, dict) else None
        if isinstance(noted, dict):
            check_same(directory, stage, noted, digests(directory, names), gone=False)


def final_adapter(stages: Mapping[str, Any]) -> str | None:
    """SHA-256 of the adapter that training left, by ``stages`` of a run.json, whose order is that of the work; None
    where it is not noted, or training was not finished."""
    found = None
    for stage, said in stages.items():
        files = said.get("files") if isinstance(said, dict) else None
        if stage.startswith("train ") and stage != "train control":
            place = f"stages/{stage.removeprefix('train ')}/adapter/adapter_model.safetensors"
            found = files.get(place) if isinstance(files, dict) else None
    return found if isinstance(found, str) else None


def with_adapter(result: dict[str, Any], stages: Mapping[str, Any]) -> dict[str, Any]:
    """``result`` of ``evaluate`` on answers of a run, with the adapter that gave them, where it is noted: by task."""
    adapter = final_adapter(stages)
    return result if adapter is None else {task: entry | {"adapter": adapter} for task, entry in result.items()}


def digests(directory: Path, names: Iterable[str]) -> dict[str, str | None]:
    """Name to SHA-256 of each file; None of one that is not there. Raises: InputError."""
    return {name: _digest(directory / name) if there(directory / name) else None for name in names}


def check_same(
    directory: Path, stage: str, noted: Mapping[str, Any], found: Mapping[str, str | None], *, gone: bool = True
) -> None:
    """Whether what ``stage`` left in ``directory`` is what it was when it was finished.

    Args:
        noted: name to digest at that time; None is a file that was not there.
        found: the same now. What is not in it was not looked at.
        gone: a file that is no longer there counts as changed.

    Raises:
        InputError: a file is another one, is gone, or has come.
    """
    names = sorted(name for name in noted if name in found and noted[name] != found[name])
    if changed := [name for name in names if gone or found[name] is not None]:
        how = "is gone" if found[changed[0]] is None else "has come" if noted[changed[0]] is None else "was changed"
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
