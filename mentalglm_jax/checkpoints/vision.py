"""What a vision-language directory holds besides the text decoder: never run here, kept bit for bit in what is written.

The vision tower's tensors, its part of ``config.json``, and the configurations of the image and video processors.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mentalglm_jax.checkpoints.hf_files import (
    DTYPES,
    Checkpoint,
    ModelFiles,
    TensorInfo,
    TensorSource,
    locate,
)
from mentalglm_jax.checkpoints.orbax_files import CHUNK_BYTES
from mentalglm_jax.errors import InputError
from mentalglm_jax.files import write_json
from mentalglm_jax.foreign import read_json, some, there
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.relatives import VISION

TOWER = "model.visual."
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


def tower_tensors(checkpoint: ModelFiles, layout: str) -> dict[str, TensorInfo]:
    """The tensors of the vision tower; none in a layout without one."""
    if layout not in VISION:
        return {}
    return {name: info for name, info in checkpoint.tensors.items() if name.startswith(TOWER)}


def tower_sources(checkpoint: ModelFiles | None, layout: str) -> list[TensorSource]:
    """The same, to be written as they are. Raises: InputError where one is no array of numbers that is read here."""
    if not isinstance(checkpoint, Checkpoint):
        return []
    found = tower_tensors(checkpoint, layout)
    if odd := [name for name, info in found.items() if info.dtype not in DTYPES or not info.shape]:
        raise InputError(f"{checkpoint.directory}: {some(odd)} of its vision tower cannot be copied (only arrays of "
                         f"{', '.join(DTYPES)} are)")  # fmt: skip
    return [
        TensorSource(name, info.dtype, info.shape, functools.partial(_blocks, checkpoint, name))
        for name, info in found.items()
    ]


def _blocks(checkpoint: Checkpoint, name: str) -> Iterator[np.ndarray]:
    info = checkpoint.tensors[name]
    rows, *rest = info.shape
    step = max(1, CHUNK_BYTES // max(1, math.prod(rest) * DTYPES[info.dtype].itemsize))
    for start in range(0, rows, step):
        yield checkpoint.read(name, slice(start, min(start + step, rows)), *(slice(None),) * len(rest))


def tower_of(model: Glm, layout: str) -> Checkpoint | None:
    """The directory that a vision tower is copied from, where ``layout`` has one and ``model`` came from a directory.

    Raises:
        InputError: it is not there any more.
    """
    if layout not in VISION or model.source is None:
        return None
    try:
        return Checkpoint(locate(model.source.name))
    except InputError as error:
        raise InputError(f"the vision tower is copied from where the model was loaded: {error}") from error


def vision_config(config: GlmConfig, source: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """``source``, the ``config.json`` of a vision-language model, for the text decoder that ``config`` describes."""
    text = dict(source["text_config"])
    if GlmConfig.from_dict(source).rope_theta != config.rope_theta:  # it was overridden on loading
        text["rope_theta"] = config.rope_theta
        for place in ("rope_parameters", "rope_scaling"):
            if text.get(place):
                text[place] = {**text[place], "rope_theta": config.rope_theta}
    written = {**source, "text_config": text}
    for place in (written, text):
        place.update({key: dtype for key in ("dtype", "torch_dtype") if key in place})
    return written


def copy_processors(source: Path, target: Path) -> None:
    """Copies the configurations of image and video processors that exist."""
    for name in PROCESSOR_FILES:
        if there(source / name):
            write_json(target / name, read_json(source / name))
