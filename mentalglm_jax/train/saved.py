"""What a directory of checkpoints may hold, looked at before Orbax reads it.

A run directory may be somebody else's. Orbax reads its JSON whole, waits for a pipe, follows links, and hands what its
database says about itself to TensorStore.
"""

from pathlib import Path
from typing import Any

from mentalglm_jax.checkpoints.orbax_files import check_files, check_saved
from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import MAX_JSON_BYTES, Fields, read_json

STATE = "state"  # of a step: the tree of arrays; all else in it is JSON
_ABOUT = ("_METADATA", "_sharding", "array_metadatas")  # JSON there, too


def check_steps(directory: Path) -> None:
    """Whether Orbax may look which steps are in ``directory``: files and directories only, JSON of a sane size, metrics
    that are numbers. What is wrong with one step's arrays is found when it is read.

    Raises:
        InputError: naming the file.
    """
    if not directory.is_dir():
        return
    check_files(directory)
    for file in directory.rglob("*"):
        inside = file.relative_to(directory).parts
        array = len(inside) > 2 and inside[1] == STATE and inside[2] not in _ABOUT
        if not array and file.is_file() and file.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{file}: more than {MAX_JSON_BYTES} bytes are too large for this file")
    for file in directory.glob("*/metrics/metrics"):
        step = file.parent.parent
        fields = Fields(found := read_json(file, f"delete {step} to do without it"), str(file))
        fields.number("loss")
        for key in found:
            fields.number(key)


def read_noted(step: Path, name: str) -> dict[str, Any]:
    """The JSON object that a step keeps under ``name``.

    Raises:
        InputError: it is missing or damaged.
    """
    return read_json(step / name / "metadata")


def check_state(step: Path) -> None:
    """``check_saved`` of the arrays of a step.

    Raises: InputError.
    """
    check_saved((step / STATE).absolute())


def check_form(found: Any, like: Any, where: str) -> None:
    """Whether what was kept of counters has the form of ``like``: the same keys, and whole numbers for such.

    Raises: InputError.
    """
    if isinstance(like, dict) and isinstance(found, dict) and found.keys() == like.keys():
        for key in like:
            check_form(found[key], like[key], where)
    elif not (type(found) is type(like) and (type(found) is not int or 0 <= found < 2**53)) or isinstance(like, dict):
        raise InputError(f"{where}: does not say where in the data it was")
