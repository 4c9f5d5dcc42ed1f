"""One Orbax step holds everything a run needs to continue: parameters, optimiser, data iterator, step, recipe.

Dropout keys are derived from the recipe's seed and the step number, so the random state needs no array of its own.
"""

import contextlib
import functools
import json
import logging
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mentalglm_jax.checkpoints.orbax_files import reason
from mentalglm_jax.devices.distributed import barrier, is_primary
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.train.recipe import Metric
from mentalglm_jax.train.saved import check_state, check_steps, read_noted

_log = logging.getLogger(__name__)
_MOST_SHOWN = 80  # characters of a value in ``differences``
_ADDED = ("base",)  # keys that checkpoints of an earlier version do not have
FIXED = ("trainable", "parameters", "optimizer")  # keys of an identity that say which arrays there are, causes first


class Checkpoints:
    """The checkpoints of one training run, kept under ``directory/<step>``; saving is asynchronous and atomic.

    Args:
        directory: created when missing.
        identity: JSON-able description of the run. A checkpoint of another identity is refused on restore.
        keep: how many of the latest steps to keep.
        best_by: also keep the one saved with the lowest "loss" or the highest of another metric; None keeps no such.
        allow_changed: take a checkpoint of another identity, with a warning that names the keys; those of ``FIXED``
            are refused all the same, for the arrays would not fit.

    Raises:
        InputError: there is something in the directory that Orbax should not read.
        RunError: the directory cannot be created or read.
    """

    def __init__(
        self, directory: Path, identity: dict[str, Any], keep: int = 2, *,
        best_by: Metric | None = None, allow_changed: bool = False,
    ):  # fmt: skip
        self.directory = directory.resolve()
        self._identity = json.loads(json.dumps(identity))  # as it will be read back: lists for tuples
        self._allow_changed = allow_changed
        self._saving = self.directory  # what a failure to write is a failure of
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        if best_by is not None:
            cost = functools.partial(_cost, best_by)
            latest = preservation_policy.LatestN(n=keep)
            best = preservation_policy.BestN(
                get_metric_fn=cost, reverse=True, n=1, keep_checkpoints_without_metrics=False
            )
            options = ocp.CheckpointManagerOptions(
                create=True, cleanup_tmp_directories=True, best_fn=cost, best_mode="min",
                preservation_policy=preservation_policy.AnyPreservationPolicy([latest, best]),
            )  # fmt: skip
        try:
            check_steps(self.directory)
            barrier("the checkpoints are looked through")  # Orbax removes what is not finished
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise RunError(f"{self.directory}: cannot keep checkpoints there ({error.strerror or error})") from error

    def save(
        self, step: int, state: dict[str, Any], data: dict[str, Any], found: Mapping[str, float] | None = None
    ) -> None:
        """Starts saving; returns once the arrays are copied. Does nothing when that step is there already.

        Args:
            step: optimiser steps done, more than any saved before.
            state: tree of arrays.
            data: JSON-able state of the data iterator and counters.
            found: loss, accuracy and the like on development data, where they were taken; what ``best_by`` goes by.
                Where one is not finite, this step is never the best.

        Raises:
            RunError: this save could not start, or the one before failed.
        """
        if step in self._manager.all_steps():
            return
        self.wait()  # Orbax would, too, but then its failure looks like one of this step
        self._saving = self.directory / str(step)
        try:
            # Orbax makes the step's directory in one of several threads, and the others wait minutes for one that
            # cannot be made; a disk without room or a directory that is gone is better found here.
            if is_primary():
                with tempfile.TemporaryFile(dir=self.directory) as file:
                    file.write(b"room")
            started = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(data),
                    identity=ocp.args.JsonSave(self._identity),
                ),
                metrics=dict(found) if found is not None and all(map(math.isfinite, found.values())) else None,
            )
        except Exception as error:  # of many kinds, as in wait
            raise RunError(f"{self._saving}: cannot save the checkpoint ({reason(error)})") from error
        if not started:
            raise RunError(f"{self._saving}: not saved, a later checkpoint is there")

    def restore(self, like: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """The newest readable checkpoint as (step, state, data), or None when there is none.

        Newer ones that are damaged are reported and renamed to ``<step>.damaged``, so that saving can go on from here.

        Args:
            like: tree with the shapes, dtypes and shardings to restore into.

        Raises:
            InputError: the checkpoint was made by a run with another recipe; names the keys that differ.
            RunError: there are checkpoints, but none can be read, or no process can be started to look.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                noted = [read_noted(self.directory / str(step), name) for name in ("identity", "data")]
            except InputError as error:
                damaged[step] = self._why(step, error)
                continue
            self._check_identity(step, noted[0])
            try:
                with _quiet_stragglers():
                    found = self._read(step, abstract)
            except RunError:  # nothing could be looked at
                raise
            except Exception as error:  # Orbax raises many kinds for a damaged step: ValueError, OSError, KeyError, ...
                damaged[step] = self._why(step, error)
            else:
                self._set_aside(damaged, step)
                return step, found, noted[1]
        if damaged:
            step, why = next(iter(damaged.items()))
            raise RunError(
                f"{self.directory}: none of the checkpoints {', '.join(map(str, sorted(steps)))} can be read "
                f"({step}: {why}); delete that directory to train this stage again from its start"
            )
        return None

    def restore_best(self, like: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """The best checkpoint (see ``best_by``) as (step, state); None when there is none."""
        self.wait()
        step = self._manager.best_step()
        if step is None or self._manager.metrics(step) is None:
            return None
        self._check_identity(step, read_noted(self.directory / str(step), "identity"))
        return step, self._read(step, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))

    def _read(self, step: int, abstract: dict[str, Any]) -> Any:
        check_state(self.directory / str(step))
        return self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)),
        )["state"]

    def _why(self, step: int, error: Exception) -> str:
        if isinstance(error, InputError):
            return str(error).replace(f"{self.directory / str(step)}/", "")
        return reason(error)

    def _set_aside(self, damaged: dict[int, str], good: int) -> None:
        for step, why in damaged.items():
            aside = self.directory / f"{step}.damaged"
            if is_primary():
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(step)).rename(aside)
            _log.warning("%s/%d: damaged checkpoint (%s), renamed to %s; going on from step %d",
                         self.directory, step, why, aside.name, good)  # fmt: skip
        if damaged:
            barrier("damaged checkpoints are out of the way")
            self._manager.reload()

    def _check_identity(self, step: int, saved: dict[str, Any]) -> None:
        saved = {**{key: self._identity[key] for key in _ADDED if key in self._identity}, **saved}
        differing = differences(saved, self._identity)
        if not differing:
            return
        place = {line: 1 + FIXED.index(key) for line in differing if (key := re.split(r"[.:]", line)[0]) in FIXED}
        differing.sort(key=lambda line: (place.get(line, 0), line.partition(":")[0].count(".")))
        text = f"{self.directory}/{step} was made with another recipe: {few(differing)}"
        if place:
            raise InputError(f"{text}. Its arrays do not fit this one: restore those values, or choose another run_dir")
        if not self._allow_changed:
            raise InputError(f"{text}. Restore those values, choose another run_dir, or go on with --allow-changed")
        _log.warning("%s; going on with the new values", text)

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
            RunError: that save failed.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # OSError, or what TensorStore raised in one of its threads: ValueError and others
            raise RunError(f"{self._saving}: the checkpoint could not be written ({reason(error)})") from error

    def close(self) -> None:
        """Waits for the last save, as ``wait``, and releases the manager's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()


def _cost(best_by: str, found: dict[str, float]) -> float:
    """What is lowest at the best step. A checkpoint of an earlier version knows its loss only."""
    return found["loss"] if best_by == "loss" else -found.get(best_by, -math.inf)


@contextlib.contextmanager
def _quiet_stragglers() -> Iterator[None]:
    """When one read of a damaged checkpoint fails, Orbax closes its event loop under the reads still on their way, and
    Python prints a traceback for each. They are of no use to anyone; everything else is still printed."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """``a.b: old -> new`` for every leaf at which two JSON values differ. Items of a list that have names are told
    apart by them; a long value is shortened."""
    if isinstance(old, list) and isinstance(new, list) and old != new:
        before, after = _by_name(old), _by_name(new)
        if before is not None and after is not None:
            inside = differences(before, after, path)
            return inside or [f"{path}: order {', '.join(before)} -> {', '.join(after)}"]
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*old, *new})
            for line in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _by_name(items: list[Any]) -> dict[str, Any] | None:
    found = {item["name"]: item for item in items if isinstance(item, dict) and isinstance(item.get("name"), str)}
    return found if len(found) == len(items) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 1]}…"


def few(lines: Sequence[str], most: int = 4) -> str:
    """The first of ``differences`` in one line, and how many more there are."""
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return f"{'; '.join(lines[:most])}{more}"


def arrays(state: nnx.State) -> dict[str, Any]:
    """The plain dictionary of arrays in an NNX state: what is written, free of Flax classes."""
    return nnx.to_pure_dict(state)


def fill(state: nnx.State, values: dict[str, Any]) -> nnx.State:
    """``state`` with its arrays replaced by ``values`` (as made by ``arrays``)."""
    nnx.replace_by_pure_dict(state, values)
    return state
