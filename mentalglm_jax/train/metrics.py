"""Training metrics to JSONL (one object a line), TensorBoard and, when asked, Weights & Biases."""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mentalglm_jax.errors import InputError, install
from mentalglm_jax.files import write_text
from mentalglm_jax.foreign import parse_json, read_bytes


@contextmanager
def _without_torch() -> Iterator[None]:
    """An import in here finds no torch, unless it is there already. tensorboardX would import it wherever it is
    installed, for plots that we do not make: two seconds and a few hundred MB of every process that trains."""
    modules: dict[str, Any] = sys.modules
    if "torch" in modules:
        yield
        return
    modules["torch"] = None  # Python's own sign that there is no such module
    try:
        yield
    finally:
        del modules["torch"]


with _without_torch():
    from tensorboardX import SummaryWriter

MAX_BYTES = 1 << 30
# W&B takes more than it is given: what the command prints (it names records), its arguments and path, the host, the
# user, the repository, what is installed. A version that does not know one of these refuses, and so do we.
_METRICS_ONLY = {"console": "off", "disable_git": True, "save_code": False, "x_disable_meta": True,
                 "x_save_requirements": False, "symlink": False}  # fmt: skip


class MetricsLog:
    """Appends to ``metrics.jsonl``, ``evaluation.jsonl`` (once there is one) and ``tensorboard`` in ``directory``.

    After a resume from step n, rows beyond n are dropped first, so that the files read as one uninterrupted run.

    Args:
        directory: created when missing.
        resume_step: n; 0 starts anew.
        wandb: project and name of a Weights & Biases run that gets the same values; None is none.

    Raises:
        RunError, OSError: the directory cannot be written.
        InputError: ``wandb`` is not installed, or refused.
    """

    def __init__(self, directory: Path, resume_step: int, wandb: tuple[str, str | None] | None = None):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._wandb = None if wandb is None else _wandb_run(directory, *wandb)
        self._file = _continued(directory / "metrics.jsonl", resume_step)
        self._evaluations: IO[str] | None = None
        if (directory / "evaluation.jsonl").exists():
            self._evaluations = _continued(directory / "evaluation.jsonl", resume_step)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1, flush_secs=30)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records ``values`` at ``step``. NaN and infinity, which JSON does not have, become null."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **dict.fromkeys(values), **finite}) + "\n")
        self._file.flush()
        self._scalars(step, finite)

    def write_evaluation(self, step: int, values: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
        """Records development ``values``, as ``write`` does, and ``samples`` (JSON-able rows) at ``step``."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if self._evaluations is None:
            self._evaluations = _continued(self._directory / "evaluation.jsonl", step)
        row = {"step": step, **dict.fromkeys(values), **finite, "samples": samples}
        self._evaluations.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._evaluations.flush()
        self._scalars(step, {f"eval/{name}": value for name, value in finite.items()})

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**values, "step": step})

    def close(self) -> None:
        """Flushes all of it."""
        self._file.close()
        if self._evaluations is not None:
            self._evaluations.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _continued(path: Path, resume_step: int) -> IO[str]:
    """``path`` opened for appending, without rows beyond ``resume_step`` and what is not a row."""
    kept = []
    if path.exists():
        text = read_bytes(path, MAX_BYTES).decode("utf-8", errors="replace")
        for line in text.split("\n"):  # an answer may hold other line separators
            try:
                keep = parse_json(line, "a row")["step"] <= resume_step
            except (InputError, TypeError, KeyError):  # the line a killed process was writing
                continue
            if keep:
                kept.append(line + "\n")
    write_text(path, "".join(kept), private=True)  # evaluation.jsonl holds answers
    return path.open("a", encoding="utf-8")


def _wandb_run(directory: Path, project: str, name: str | None) -> Any:
    try:
        import wandb  # pyrefly: ignore[missing-import]
    except ImportError:
        raise InputError(f"wandb: is not installed; {install('track')}, or remove the section") from None
    try:
        # Its own step counter only rises, but a resumed run writes steps again: ours is a value beside the others.
        run = wandb.init(project=project, name=name, dir=str(directory), resume="allow",
                         settings=wandb.Settings(**_METRICS_ONLY))  # fmt: skip
    except Exception as error:  # wandb raises its own classes for a missing login, no network and the like
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(f"wandb: {type(error).__name__}: {reason[:160]}; WANDB_MODE=offline needs no login") from error
    run.define_metric("*", step_metric="step")
    return run
