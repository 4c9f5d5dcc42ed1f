"""The loss on development examples while a run goes on."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from mentalglm_jax.data.batches import Example, PackedBatches
from mentalglm_jax.devices.distributed import local_rows, spread
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.model.layout import gather_projection, on_mesh
from mentalglm_jax.train.loss import LossSums, answer_loss
from mentalglm_jax.train.recipe import TrainConfig

# Given the model as it is now: rows to keep beside the loss, e.g. answers to a few development posts.
Sampler = Callable[[Glm], list[dict[str, Any]]]
# Given the same: one number about the development records, for ``early_stopping.metric: label_f1``.
Measure = Callable[[Glm], float]


class Evaluation:
    """Loss and accuracy of held-out examples, without dropout and masking; every example counts once.

    Args:
        examples: what to score.
        config: rows, length and loss chunk are those of training.
        graph: the model's structure (``nnx.split``).
        mesh: as in training.

    Raises:
        InputError: an example does not fit into a row.
    """

    def __init__(self, examples: Sequence[Example], config: TrainConfig, graph: Any, mesh: Mesh | None):
        rows = config.rows // config.accumulate
        self._held, self._rows, self._mesh = local_rows(mesh, rows, 1), rows, mesh
        self._batches = PackedBatches(examples, rows=rows, sequence_length=config.sequence_length, targets_per_row=None,
                                      seed=0, local_rows=self._held)  # fmt: skip
        self._sums = _compiled(graph, config.loss_chunk, mesh)

    def __call__(self, train: nnx.State, frozen: nnx.State) -> dict[str, float]:
        """``loss`` (nats per answer token) and ``accuracy`` of these parameters."""
        nll = correct = weight = 0.0
        batches = iter(self._batches)
        for _ in range(self._batches.steps_per_epoch()):
            batch: Any = next(batches)
            if self._mesh is None:
                batch = {name: x[None] for name, x in batch.items()}
            else:
                batch = spread(batch, self._rows, 1, self._mesh, self._held)
            sums = self._sums(train, frozen, batch)
            nll, correct, weight = nll + float(sums.nll), correct + float(sums.correct), weight + float(sums.weight)
        return {"loss": nll / weight, "accuracy": correct / weight}


@functools.lru_cache(maxsize=1)  # as of the step
def _compiled(graph: Any, chunk: int, mesh: Mesh | None) -> jax.stages.Wrapped:
    @jax.jit
    def sums(train: nnx.State, frozen: nnx.State, batch: Any) -> LossSums:
        with on_mesh(mesh):  # attention kernels ask which mesh they run on
            model = nnx.merge(graph, train, gather_projection(frozen))
            return answer_loss(model, jax.tree.map(lambda x: x[0], batch), chunk=chunk)

    return sums
