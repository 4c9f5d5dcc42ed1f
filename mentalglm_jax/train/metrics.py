"""Training metrics to JSONL (one object a line) and TensorBoard."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter

from mentalglm_jax.files import write_text


class MetricsLog:
    """Appends to ``directory/metrics.jsonl`` and ``directory/tensorboard``.

    After a resume from step n, rows beyond n are dropped first, so that the file reads as one uninterrupted run.

    Args:
        directory: created when missing.
        resume_step: n; 0 starts anew.

    Raises:
        RunError, OSError: the directory cannot be written.
    """

    def __init__(self, directory: Path, resume_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    keep = json.loads(line)["step"] <= resume_step
                except (ValueError, TypeError, KeyError):  # the line a killed process was writing
                    continue
                if keep:
                    kept.append(line + "\n")
        write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1, flush_secs=30)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records ``values`` at ``step``. NaN and infinity, which JSON does not have, become null."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **dict.fromkeys(values), **finite}) + "\n")
        self._file.flush()
        for name, value in finite.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both files."""
        self._file.close()
        self._board.close()
