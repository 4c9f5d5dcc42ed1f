"""The training loop: data in, steps, metrics and checkpoints out; stops cleanly and resumes exactly."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mentalglm_jax.data.batches import Batch, Example, Lengths, PackedBatches, fingerprint
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.glm import Glm
from mentalglm_jax.sharding import batch_sharding, shard_model
from mentalglm_jax.train.checkpoint import Checkpoints, arrays, fill
from mentalglm_jax.train.metrics import MetricsLog
from mentalglm_jax.train.recipe import TrainConfig
from mentalglm_jax.train.step import learning_rate_schedule, make_optimizer, make_step

Progress = Callable[[int, int, str], None]


class Interrupted(RunError):
    """Ctrl-C or SIGTERM: the state was saved; the same command continues."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a finished run did. ``loss`` (nats per target) and ``accuracy`` are those of the last logged step;
    ``tokens_per_second`` counts real (not padding) tokens since the last resume, compilation left out."""

    steps: int
    loss: float
    accuracy: float
    tokens_per_second: float
    skipped_steps: int
    lengths: Lengths


class StopSignal:
    """Turns SIGINT and SIGTERM into a flag while the ``with`` block runs; a second SIGINT acts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> "StopSignal":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:  # not in the main thread (a notebook kernel's helper): signals stay as they are
            pass
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def train(
    model: Glm,
    examples: Sequence[Example],
    config: TrainConfig,
    directory: Path,
    *,
    trainable: str,
    seed: int,
    identity: dict[str, Any] | None = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
) -> TrainResult:
    """Trains ``model`` in place, from its newest checkpoint under ``directory`` if there is one.

    Args:
        model: its ``LoraParam``s ("lora") or all parameters ("all") are trained. When the run stops early, it holds the
            parameters of the last step.
        examples: encoded conversations.
        config: the run.
        directory: receives ``checkpoints/``, ``metrics.jsonl`` and ``tensorboard/``.
        trainable: "lora" or "all".
        seed: of shuffling and dropout.
        identity: what, beside ``config``, ``seed`` and ``examples``, makes this run this run (JSON-able); guards
            against resuming another.
        progress: called as ``progress(done, total, text)``.
        mesh: devices to spread model, optimiser and rows over, by the rules of ``sharding.py``; None is one device.

    Raises:
        Interrupted: a signal arrived; everything up to the last step is saved.
        RunError: ``max_bad_steps`` steps in a row had no finite gradient, or ``directory`` cannot be written or read.
        InputError: the checkpoint there belongs to another recipe, or ``config`` does not fit the examples or the mesh.
    """
    batches = PackedBatches(examples, rows=config.rows, sequence_length=config.sequence_length,
                            targets_per_row=config.targets_per_row, seed=seed, mask_posts=config.mask_posts,
                            neutral_id=model.config.pad_token_id)  # fmt: skip
    steps = config.steps or max(1, round((config.epochs or 1) * batches.steps_per_epoch()))
    if mesh is not None:
        _check_rows(config, mesh)
        shard_model(model, mesh)
    step_function, state, frozen = make_step(model, make_optimizer(config, steps), config, trainable, mesh)
    identity = {
        "train": config.model_dump(), "seed": seed, "steps": steps, "trainable": trainable,
        "parameters": jax.tree.map(lambda leaf: list(leaf.shape), arrays(state.trainable)),
        "examples": {"count": len(examples), "sha256": fingerprint(examples)}, **(identity or {}),
    }  # fmt: skip
    iterator, schedule, key = iter(batches), learning_rate_schedule(config, steps), jax.random.key(seed)
    done, tally = 0, _Tally()
    first, started, real_tokens, stopping = 1, time.perf_counter(), 0, False
    try:
        with StopSignal() as stop, contextlib.ExitStack() as cleanup:
            checkpoints = Checkpoints(directory / "checkpoints", identity)
            cleanup.callback(checkpoints.close)
            restored = checkpoints.restore({"trainable": arrays(state.trainable), "optimizer": state.optimizer})
            if restored is not None:
                done, tree, data = restored
                state.trainable, state.optimizer = fill(state.trainable, tree["trainable"]), tree["optimizer"]
                iterator.set_state(data["iterator"])
                tally = _Tally(**data["tally"])
                first = done + 1
            cleanup.callback(lambda: nnx.update(model, state.trainable))  # the step took the model's own arrays
            log = MetricsLog(directory, done)
            cleanup.callback(log.close)
            while done < steps and not stopping:
                batch, updates = next(iterator), done - tally.skipped
                state.trainable, state.optimizer, out = step_function(
                    state.trainable, state.optimizer, frozen, _micro_batches(batch, config.accumulate, mesh),
                    jax.random.fold_in(key, done)
                )  # fmt: skip
                done += 1
                finite = bool(out["finite"])
                tally.count(finite)
                if tally.bad_in_a_row >= config.max_bad_steps:
                    raise RunError(
                        f"{directory}: {tally.bad_in_a_row} steps in a row had no finite gradient (last: step {done}, "
                        f"loss {float(out['loss'])}); lower learning_rate. The last good checkpoint is kept"
                    )
                if done == first:
                    started = time.perf_counter()  # the first step holds the compilation
                else:
                    real_tokens += int((batch["segment_ids"] > 0).sum())
                if done % config.log_every == 0 or done == steps:
                    metrics = {name: float(out[name]) for name in ("loss", "accuracy", "targets", "grad_norm")}
                    tally.metrics = metrics if finite else tally.metrics
                    speed = real_tokens / max(time.perf_counter() - started, 1e-9)
                    rate = float(jnp.asarray(schedule(updates)))
                    log.write(done, {**metrics, "learning_rate": rate, "tokens_per_second": speed,
                                     "skipped_steps": tally.skipped})  # fmt: skip
                if progress is not None:
                    progress(done, steps, f"loss {tally.metrics['loss']:.3f}" if tally.metrics else "")
                stopping = stop.requested  # read once: a signal after this line stops the run one step later
                if done % config.save_every == 0 or done == steps or stopping:
                    tree = {"trainable": arrays(state.trainable), "optimizer": state.optimizer}
                    checkpoints.save(done, tree, {"iterator": iterator.get_state(), "tally": dataclasses.asdict(tally)})
            elapsed = max(time.perf_counter() - started, 1e-9)
    except OSError as error:
        raise RunError(f"{directory}: cannot write there ({error.strerror or error})") from error
    if stop.requested:
        raise Interrupted(f"interrupted at step {done} of {steps}; saved in {directory}, "
                          "the same command continues from there")  # fmt: skip
    if not tally.metrics:
        raise RunError(f"{directory}: none of {steps} steps had a finite gradient; lower learning_rate")
    return TrainResult(done, tally.metrics["loss"], tally.metrics["accuracy"], real_tokens / elapsed, tally.skipped,
                       batches.lengths)  # fmt: skip


@dataclasses.dataclass
class _Tally:
    """What a run has counted so far; part of its checkpoints, so that a resumed run tells the same story."""

    skipped: int = 0
    bad_in_a_row: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # of the last logged step that was finite

    def count(self, finite: bool) -> None:
        self.skipped += not finite
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1


def _micro_batches(batch: Batch, count: int, mesh: Mesh | None) -> dict[str, Any]:
    """Splits the rows into ``count`` micro-batches on a new leading axis, spread over ``mesh`` where there is one."""
    arrays: dict[str, Any] = {**batch}
    split = {name: x.reshape(count, x.shape[0] // count, *x.shape[1:]) for name, x in arrays.items()}
    return split if mesh is None else jax.device_put(split, batch_sharding(mesh))


def _check_rows(config: TrainConfig, mesh: Mesh) -> None:
    rows, parts = config.rows // config.accumulate, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise InputError(
            f"rows / accumulate = {rows} rows cannot be spread evenly over data x fsdp = {parts} devices; "
            f"make rows a multiple of {parts * config.accumulate}"
        )
