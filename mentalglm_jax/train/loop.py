"""The training loop: data in, steps, metrics and checkpoints out; stops cleanly and resumes exactly."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mentalglm_jax.data.batches import Batch, Example, Lengths, PackedBatches, fingerprint
from mentalglm_jax.devices.distributed import any_process, gathered, is_primary, local_rows, spread
from mentalglm_jax.devices.stopping import StopSignal
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.foreign import Fields
from mentalglm_jax.model.fingerprint import base_fingerprint, model_fingerprint
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.model.sharding import shard_model
from mentalglm_jax.train.checkpoint import Checkpoints, arrays, fill
from mentalglm_jax.train.evaluation import Evaluation, Measure, Sampler
from mentalglm_jax.train.metrics import MetricsLog
from mentalglm_jax.train.preference import MEASURES, Objective
from mentalglm_jax.train.recipe import TrainConfig
from mentalglm_jax.train.reference import FILE as REFERENCE
from mentalglm_jax.train.reference import with_reference
from mentalglm_jax.train.saved import check_form
from mentalglm_jax.train.speed import Speedometer, peak_flops
from mentalglm_jax.train.step import TrainState, averaged, learning_rate_schedule, make_optimizer, make_step

_log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]
_PROFILED = range(3, 6)  # steps since the start: past compilation, few enough for a trace that opens


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a finished run did. ``loss`` (nats per target) and ``accuracy`` are those of the last logged step; speeds
    (real tokens, answer tokens, share of the hardware's FLOP/s where that is known) are since the last resume,
    compilation and evaluation left out. ``best`` is the best step by ``TrainConfig.best_by`` with its value, where one
    was taken. ``steps`` is less than ``planned`` where early stopping ended the run.
    """

    steps: int
    loss: float
    accuracy: float
    tokens_per_second: float
    answer_tokens_per_second: float
    mfu: float | None
    skipped_steps: int
    lengths: Lengths
    best: tuple[int, float] | None = None
    planned: int = 0


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a run has around it that changes none of its numbers.

    Attributes:
        progress: called as ``progress(done, total, text)``.
        say: called with one line before the first step: what packing made of the data.
        mesh: devices to spread model, optimiser and rows over, by the rules of ``sharding.py``; None is one device.
        wandb: project and name of a Weights & Biases run.
        sample: rows to keep at every evaluation, e.g. answers; called on every process.
        profile: write a trace of three steps to ``directory/profile``.
        allow_changed: go on from a checkpoint of another recipe, where its arrays fit.
    """

    progress: Progress | None = None
    say: Callable[[str], None] | None = None
    mesh: Mesh | None = None
    wandb: tuple[str, str | None] | None = None
    sample: Sampler | None = None
    profile: bool = False
    allow_changed: bool = False


def train(
    model: Glm,
    examples: Sequence[Example],
    config: TrainConfig,
    directory: Path,
    *,
    trainable: str,
    seed: int,
    identity: dict[str, Any] | None = None,
    evaluation: Sequence[Example] = (),
    label_f1: Measure | None = None,
    objective: Objective | None = None,
    around: Surroundings = Surroundings(),
) -> TrainResult:
    """Trains ``model`` in place, from its newest checkpoint under ``directory`` if there is one.

    Args:
        model: its ``LoraParam``s ("lora") or all parameters ("all") are trained. When the run stops early, it holds the
            parameters of the last step; else those that ``config`` says it ends with. In a run of several processes
            what was trained comes back whole, as host arrays.
        examples: encoded conversations.
        config: the run.
        directory: receives ``checkpoints/``, ``metrics.jsonl``, ``evaluation.jsonl`` and ``tensorboard/``; with
            ``objective`` also the log-probabilities at the start (``reference.py``).
        trainable: "lora" or "all".
        seed: of shuffling and dropout.
        identity: what, beside ``config``, ``seed`` and ``examples``, makes this run this run (JSON-able); guards
            against resuming another.
        evaluation: development examples, for ``config.eval_every``.
        label_f1: for ``config.early_stopping.metric`` of that name; every process calls it at the same steps.
        objective: of a stage whose examples are pairs of answers; None is next-token loss.
        around: progress, devices and the like.

    Raises:
        Interrupted, Preempted: a signal arrived; everything up to the last step is saved.
        RunError: ``max_bad_steps`` steps in a row had no finite gradient, or ``directory`` cannot be written or read.
        InputError: the checkpoint there belongs to another recipe, ``config`` does not fit the examples or the mesh, or
            an example is longer than the model's context.
    """
    mesh = around.mesh
    _check_context(model.config.max_position_embeddings, [*examples, *evaluation])
    if mesh is not None:
        _check_rows(config, mesh)
        shard_model(model, mesh)
    # A checkpoint holds what is trained; all else comes from the model, which must be the one it began with.
    begun_from: dict[str, Any] = {"base": base_fingerprint(model)} if trainable == "lora" else {}
    if objective is not None:
        begun_from |= {"start": model_fingerprint(model), "objective": objective.model_dump(mode="json")}
        examples = with_reference(model, examples, config, directory / REFERENCE, start=begun_from["start"], seed=seed,
                                  mesh=mesh, progress=around.progress)  # fmt: skip
    held = local_rows(mesh, config.rows, config.accumulate)
    batches = PackedBatches(examples, rows=config.rows, sequence_length=config.sequence_length,
                            targets_per_row=config.targets_per_row, seed=seed, mask_posts=config.mask_posts,
                            neutral_id=model.config.filler_id, local_rows=held)  # fmt: skip
    if config.eval_every is not None and not evaluation:
        raise InputError("eval_every is set, but there are no development examples; give some, or leave it out")
    if config.best_by == "label_f1" and label_f1 is None:
        raise InputError("early_stopping.metric label_f1 needs records with labels, there are examples only; use loss")
    scored = Evaluation(evaluation, config, nnx.split(model)[0], mesh) if config.eval_every is not None else None
    steps = config.steps or max(1, round((config.epochs or 1) * batches.steps_per_epoch()))
    if around.say is not None:
        around.say(f"{batches.lengths}; {steps:,} steps of {config.rows} rows")
    step_function, state, frozen = make_step(model, make_optimizer(config, steps), config, trainable, mesh, objective)
    identity = {
        "train": config.model_dump(), "seed": seed, "steps": steps, "trainable": trainable,
        "parameters": jax.tree.map(lambda leaf: list(leaf.shape), arrays(state.trainable)),
        "optimizer": {jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
                      for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer)},
        "examples": {"count": len(examples), "sha256": fingerprint(examples)}, **begun_from, **(identity or {}),
    }  # fmt: skip
    iterator, schedule = iter(batches), learning_rate_schedule(config, steps)
    keys = _keys(seed, mesh)
    done, tally, stopping = 0, _Tally(), False
    speed = Speedometer(model.config, trainable == "lora", peak_flops())
    try:
        with StopSignal() as stop, contextlib.ExitStack() as cleanup:
            checkpoints = Checkpoints(directory / "checkpoints", identity, config.keep_last,
                                      best_by=None if scored is None else config.best_by,
                                      allow_changed=around.allow_changed)  # fmt: skip
            cleanup.callback(checkpoints.close)
            restored = checkpoints.restore(_tree(state))
            if restored is not None:
                done, tree, data = restored
                where = f"{checkpoints.directory / str(done)}/data/metadata"
                check_form(data.get("iterator"), iterator.get_state(), f"{where}: iterator")
                tally = _Tally.read(Fields(data, where).mapping("tally"), where)
                state = _filled(state, tree)
                iterator.set_state(data["iterator"])
            first = done + 1
            cleanup.callback(lambda: nnx.update(model, gathered(state.trainable)))  # the step took the model's arrays
            log = MetricsLog(directory, done, around.wandb) if is_primary() else None
            if log is not None:
                cleanup.callback(log.close)
            profile = _Profile(directory / "profile" if around.profile else None, first)
            cleanup.callback(profile.stop)
            while done < steps and not stopping and not tally.out_of_patience(config):
                batch, updates = next(iterator), done - tally.skipped
                profile.before(done + 1)
                state.trainable, state.optimizer, out = step_function(
                    state.trainable, state.optimizer, frozen, _micro_batches(batch, config, mesh, held), keys(done)
                )
                done += 1
                finite = bool(out["finite"])
                tally.count(finite)
                if tally.bad_in_a_row >= config.max_bad_steps:
                    raise RunError(
                        f"{directory}: {tally.bad_in_a_row} steps in a row had no finite gradient (last: step {done}, "
                        f"loss {float(out['loss'])}, examples {_named(examples, batches.examples_of(done - 1))}); look "
                        "at those examples or lower learning_rate. The last good checkpoint is kept"
                    )
                speed.count(*(float(out[name]) for name in ("tokens", "targets", "pairs")))
                names = ("loss", "accuracy", *(() if objective is None else MEASURES), "targets", "grad_norm")
                metrics = {name: float(out[name]) for name in names}
                tally.metrics = metrics if finite and all(map(math.isfinite, metrics.values())) else tally.metrics
                if done % config.log_every == 0 or done == steps:
                    rate = float(jnp.asarray(schedule(updates)))
                    if log is not None:
                        log.write(done, {**metrics, "learning_rate": rate, **speed.rates(),
                                         "skipped_steps": tally.skipped})  # fmt: skip
                if around.progress is not None:
                    loss = f"loss {tally.metrics['loss']:.3f}" if tally.metrics else ""
                    around.progress(done, steps, ", ".join(filter(None, (loss, speed.text()))))
                stopping = any_process(stop.requested)  # a signal after this line stops the run one step later
                found = None
                if scored is not None and (done % (config.eval_every or 1) == 0 or done == steps):
                    with speed.pause():
                        found = scored(averaged(state.trainable, state.optimizer), frozen)
                        if config.best_by == "label_f1" and label_f1 is not None:
                            found["label_f1"] = label_f1(_as_it_is(model, state))
                        tally.note(done, found, config)
                        answers = _samples(around.sample, model, state)
                        if log is not None:
                            log.write_evaluation(done, found, answers)
                if done % config.save_every == 0 or done == steps or stopping or found is not None:
                    data = {"iterator": iterator.get_state(), "tally": dataclasses.asdict(tally)}
                    checkpoints.save(done, _tree(state), data, found)
            rates = speed.rates()
            if not stopping and tally.metrics:
                state = _last(config, checkpoints, state)
    except OSError as error:
        raise RunError(f"{directory}: cannot write there ({error.strerror or error})") from error
    if stopping or stop.requested:
        raise stop.error(f"interrupted at step {done} of {steps}; saved in {directory}, "
                         "the same command continues from there")  # fmt: skip
    if not tally.metrics:
        raise RunError(f"{directory}: none of {steps} steps had a finite gradient; lower learning_rate")
    return TrainResult(
        done, tally.metrics["loss"], tally.metrics["accuracy"], rates["tokens_per_second"],
        rates["answer_tokens_per_second"], rates.get("mfu"), tally.skipped, batches.lengths,
        None if tally.best_step is None or tally.best is None else (tally.best_step, tally.best), steps,
    )  # fmt: skip


@dataclasses.dataclass
class _Tally:
    """What a run has counted so far; part of its checkpoints, so that a resumed run tells the same story."""

    skipped: int = 0
    bad_in_a_row: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # of the last step that was finite
    best_step: int | None = None
    best: float | None = None  # what ``TrainConfig.best_by`` was there
    reference: float | None = None  # the last value that bettered the one before by more than ``min_delta``
    stale: int = 0  # evaluations since then

    @classmethod
    def read(cls, data: Mapping[str, Any], where: str = "a checkpoint") -> "_Tally":
        """From a checkpoint, also of a version that counted other things. Raises: InputError: these are no counts."""
        found = Fields(data, f"{where}: tally")
        metrics = Fields(found.mapping("metrics", {}), f"{where}: tally.metrics")
        numbers = {name: metrics.number(name) for name in ({"loss", "accuracy", *metrics.raw} if metrics.raw else ())}
        counts = {name: found.integer(name, 0, 2**53, 0) for name in ("skipped", "bad_in_a_row", "stale")}
        values = {name: found.number(name, default=None) for name in ("best", "reference")}
        return cls(**counts, **values, metrics=numbers, best_step=found.integer("best_step", 0, 2**53, None))

    def count(self, finite: bool) -> None:
        self.skipped += not finite
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1

    def note(self, step: int, found: dict[str, float], config: TrainConfig) -> None:
        """An evaluation; one that is not finite is no better than any."""
        value, sign = found[config.best_by], 1 if config.best_by == "loss" else -1
        usable = all(map(math.isfinite, found.values()))
        if usable and (self.best is None or sign * value <= sign * self.best):  # the later of two equals, as in Orbax
            self.best_step, self.best = step, value
        delta = 0.0 if config.early_stopping is None else config.early_stopping.min_delta
        if usable and (self.reference is None or sign * value < sign * self.reference - delta):
            self.reference, self.stale = value, 0
        else:
            self.stale += 1

    def out_of_patience(self, config: TrainConfig) -> bool:
        return config.early_stopping is not None and self.stale >= config.early_stopping.patience


class _Profile:
    """A trace of a few steps; does nothing without a directory."""

    def __init__(self, directory: Path | None, first: int):
        self._directory, self._first, self._running = directory, first, False

    def before(self, step: int) -> None:
        """Called before ``step`` is taken, so the steps before it are done."""
        if self._directory is None:
            return
        if step - self._first == _PROFILED.start:
            jax.profiler.start_trace(self._directory)
            self._running = True
        elif step - self._first == _PROFILED.stop:
            self.stop()

    def stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            _log.warning("%s: profile written (tensorboard --logdir, or xprof)", self._directory)


def _keys(seed: int, mesh: Mesh | None) -> Callable[[int], jax.Array]:
    """The dropout key of a step (counted from 0); on a mesh of several processes every device needs it."""
    if mesh is None or jax.process_count() == 1:
        key = jax.random.key(seed)
        return lambda step: jax.random.fold_in(key, step)
    everywhere = NamedSharding(mesh, PartitionSpec())
    fold = jax.jit(lambda step: jax.random.fold_in(jax.random.key(seed), step), out_shardings=everywhere)
    return lambda step: fold(jnp.uint32(step))


def _tree(state: TrainState) -> dict[str, Any]:
    return {"trainable": arrays(state.trainable), "optimizer": state.optimizer}


def _filled(state: TrainState, tree: dict[str, Any]) -> TrainState:
    return TrainState(fill(state.trainable, tree["trainable"]), tree["optimizer"])


def _last(config: TrainConfig, checkpoints: Checkpoints, state: TrainState) -> TrainState:
    """The state whose parameters a finished run ends with."""
    if config.final == "best" and (best := checkpoints.restore_best(_tree(state))) is not None:
        state = _filled(state, best[1])
    return TrainState(averaged(state.trainable, state.optimizer), state.optimizer)


def _samples(sample: Sampler | None, model: Glm, state: TrainState) -> list[dict[str, Any]]:
    if sample is None:
        return []
    return sample(_as_it_is(model, state))


def _as_it_is(model: Glm, state: TrainState) -> Glm:
    """``model`` with the parameters that the run would end with now."""
    nnx.update(model, averaged(state.trainable, state.optimizer))
    return model


def _named(examples: Sequence[Example], numbers: Sequence[int], most: int = 8) -> str:
    names = [examples[number].get("id", f"number {number}") for number in numbers]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _micro_batches(batch: Batch, config: TrainConfig, mesh: Mesh | None, held: list[int] | None) -> dict[str, Any]:
    """Splits the rows into micro-batches on a new leading axis, spread over ``mesh`` where there is one."""
    arrays: dict[str, Any] = {**batch}
    if mesh is not None:
        return spread(arrays, config.rows, config.accumulate, mesh, held)
    count = config.accumulate
    return {name: x.reshape(count, x.shape[0] // count, *x.shape[1:]) for name, x in arrays.items()}


def _check_context(context: int, examples: Sequence[Example]) -> None:
    """Beyond its context a model computes what nobody trained, and one with windows of attention something else."""
    for number, one in enumerate(examples):
        first = one.get("split", len(one["tokens"]))  # each answer of a pair begins at position 0
        if (length := max(first, len(one["tokens"]) - first)) > context:
            raise InputError(
                f"example {one.get('id', number)!r}: has {length} tokens, the model's context is {context}; set "
                f"sequence_length to at most {context}, so that it is left out"
            )


def _check_rows(config: TrainConfig, mesh: Mesh) -> None:
    rows, parts = config.rows // config.accumulate, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise InputError(
            f"rows / accumulate = {rows} rows cannot be spread evenly over data x fsdp = {parts} devices; "
            f"make rows a multiple of {parts * config.accumulate}"
        )
