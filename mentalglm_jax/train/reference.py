"""What the model says of every answer of a preference stage when the stage begins: computed once, kept beside the run.

One file, written as a whole or not at all: the log-probabilities of all targets in the order of the pairs, what they
were made by, and a digest of both. A file that is damaged, or made by something else, is computed again: the stage
always begins by loading the adapter that it starts from.
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from mentalglm_jax.data.batches import Example, PackedBatches, fingerprint
from mentalglm_jax.devices.distributed import barrier, gathered, is_primary, spread
from mentalglm_jax.files import write_bytes
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.model.layout import gather_projection, on_mesh
from mentalglm_jax.train.loss import answer_scores
from mentalglm_jax.train.recipe import TrainConfig

FILE = "reference.safetensors"
_NAME = "log_probabilities"
_log = logging.getLogger(__name__)


def with_reference(
    model: Glm, examples: Sequence[Example], config: TrainConfig, path: Path, *, start: str, seed: int,
    mesh: Mesh | None, progress: Callable[[int, int, str], None] | None
) -> list[Example]:  # fmt: skip
    """``examples`` (pairs) with ``reference``: the log-probability (nats) of each target under ``model``.

    Args:
        model: as the stage starts, on ``mesh``.
        examples: what the stage trains on.
        config: rows, length and loss chunk are those of training.
        path: the file they are kept in.
        start: says which model it is (a fingerprint).
        seed: of packing, so that the rows are those of training.
        mesh: as in training.
        progress: called after every batch as ``progress(done, total, text)``.

    Raises:
        InputError: an example does not fit into a row.
        RunError: the file cannot be written.
    """
    made_by = f"{start} {fingerprint(examples)}"
    sizes = [len(item["target_ids"]) for item in examples]
    values = _kept(path, made_by, sum(sizes))
    if values is None:
        values = _computed(model, examples, config, seed, mesh, progress)
        if is_primary():
            write_bytes(path, safetensors.numpy.save({_NAME: values}, _note(made_by, values)), private=True)
        barrier("the reference is kept")
    parts = np.split(values, np.cumsum(sizes)[:-1])
    return [{**item, "reference": part} for item, part in zip(examples, parts, strict=True)]


def _note(made_by: str, values: np.ndarray) -> dict[str, str]:
    return {"made_by": made_by, "sha256": hashlib.sha256(made_by.encode() + values.tobytes()).hexdigest()}


def _kept(path: Path, made_by: str, count: int) -> Float[np.ndarray, " n"] | None:
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            note, values = file.metadata(), file.get_tensor(_NAME)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError):
        note, values = {}, np.empty(0, np.float32)
    if values.dtype == np.float32 and values.shape == (count,) and note == _note(made_by, values):
        return values
    _log.warning("%s: is damaged, or of another start or other pairs; computed again", path)
    return None


def _computed(
    model: Glm, examples: Sequence[Example], config: TrainConfig, seed: int, mesh: Mesh | None,
    progress: Callable[[int, int, str], None] | None
) -> Float[np.ndarray, " n"]:  # fmt: skip
    rows = config.rows // config.accumulate
    # Every process makes all rows: they are few beside those of training, and all are to be known everywhere.
    batches = PackedBatches(examples, rows=rows, sequence_length=config.sequence_length,
                            targets_per_row=config.targets_per_row, seed=seed)  # fmt: skip
    graph, state = nnx.split(model)
    log_probabilities = _compiled(graph, config.loss_chunk, mesh)
    found: dict[int, np.ndarray] = {}
    iterator, total = iter(batches), batches.steps_per_epoch()
    for step in range(total):
        batch: Any = next(iterator)
        arrays = {name: x[None] for name, x in batch.items()}
        if mesh is not None:
            arrays = spread(batch, rows, 1, mesh, None if jax.process_count() == 1 else range(rows))
        values = np.asarray(gathered(log_probabilities(state, arrays)), np.float32)
        for line, numbers in enumerate(batches.rows_of(step)):
            used = 0
            for number in numbers:
                size = len(examples[number]["target_ids"])
                found[number] = values[line, used : used + size]
                used += size
        if progress is not None:
            progress(step + 1, total, "log-probabilities at the start")
    return np.concatenate([found[number] for number in range(len(examples))])


@functools.lru_cache(maxsize=1)  # as of the step
def _compiled(graph: Any, chunk: int, mesh: Mesh | None) -> jax.stages.Wrapped:
    @jax.jit
    def log_probabilities(state: Any, batch: Any) -> jax.Array:
        with on_mesh(mesh):
            whole = nnx.merge(graph, gather_projection(state))
            return answer_scores(whole, jax.tree.map(lambda x: x[0], batch), chunk=chunk).log_p

    return log_probabilities
