"""Runs the parts one after another, each in a process and a time box of its own; the report is valid at any moment."""

import datetime
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.files import write_json
from mentalglm_jax.foreign import read_json
from mentalglm_jax.interpreter import environment, module_command

# Shares of the time; what a part leaves goes to those after it.
SHARES = {"device": 0.06, "step": 0.28, "generate": 0.24, "logits": 0.12, "peft": 0.18, "probes": 0.12}
PARTS = tuple(SHARES)
_GRACE = 15.0  # seconds beyond its box in which a part may end by itself, if the whole has them
_OURS = "mentalglm_jax.bench.child"
_THEIRS = "probes.bench"  # by name: the PyTorch side is reached through files and a process only


def bench(
    recipe: dict[str, Any] | None, *, parts: Sequence[str] = PARTS, minutes: float = 8.0, out: Path,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Measures this machine and returns the report, which ``out`` (JSON) holds from the first part on.

    Args:
        recipe: as plain values; its first stage is measured. None is the default for the device.
        parts: of ``PARTS``, in their order.
        minutes: for all of them together. One that is not done in its share is stopped; what it had measured stays.

    Raises:
        InputError: an unknown part, none, or a part that needs another's files.
        RunError: nothing could be measured.
        KeyboardInterrupt: the report says which part was interrupted.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise InputError(f"part {unknown[0] if unknown else ''!r} is not one of {', '.join(PARTS)}")
    if "peft" in parts and "step" not in parts:
        raise InputError("part 'peft' trains on the rows that part 'step' packs; ask for both")
    chosen = [part for part in PARTS if part in parts]
    report: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "parts": {}}
    write_json(out, report)  # what cannot be written is said before anything is measured
    folder, ends = Path(tempfile.mkdtemp(prefix="mentalglm-bench-")), time.monotonic() + 60 * minutes
    try:
        for number, part in enumerate(chosen):
            share = SHARES[part] / sum(SHARES[later] for later in chosen[number:])
            seconds = max(share * (ends - time.monotonic()), 1.0)
            say(f"{part}: {seconds:.0f} s at most")
            began = time.monotonic()
            entry: dict[str, Any] = {"state": "interrupted", "found": None}
            report["parts"][part] = entry
            try:
                entry["state"] = _measure(part, recipe, seconds, min(seconds + _GRACE, ends - time.monotonic()), folder)
            finally:
                entry["found"] = _read(folder / f"{part}.json")
                entry["seconds"] = round(time.monotonic() - began, 1)
                write_json(out, report)
            if entry["state"] != "done":
                say(f"  {entry['state']}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if all(entry["found"] is None for entry in report["parts"].values()):
        raise RunError(f"nothing could be measured; {out} says why")
    return report


def _measure(part: str, recipe: dict[str, Any] | None, seconds: float, most: float, folder: Path) -> str:
    """Runs a part that is to take ``seconds`` and may take ``most``; "done", or why it ended."""
    ends = time.monotonic() + most
    if part in ("device", "step", "generate", "logits"):
        name = "jax.json" if part == "logits" else f"{part}.json"
        spec = {"kind": part, "recipe": recipe, "seconds": 0.8 * seconds, "folder": str(folder)}
        state = _child(_OURS, spec, folder, name, most)
        if part != "logits" or state != "done":
            return state
        theirs: dict[str, Any] = {"directory": str(folder)}
    else:
        theirs = {"rows": str(folder / "rows.npz")}
    about = _read(folder / "target.json")
    if about is None or (part == "peft" and not (folder / "rows.npz").exists()):
        return "skipped: the step was not measured"
    left = ends - time.monotonic()
    spec = {**about, **theirs, "kind": part, "seconds": 0.8 * min(seconds, left)}
    return _child(_THEIRS, spec, folder, f"{part}.json", left)


def _child(module: str, spec: dict[str, Any], folder: Path, out: str, seconds: float) -> str:
    write_json(folder / "spec.json", spec)
    with (folder / "errors.txt").open("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            module_command(module, folder / "spec.json", folder / out), stdout=subprocess.DEVNULL, stderr=errors,
            env=environment(XLA_PYTHON_CLIENT_PREALLOCATE="false", HF_HUB_OFFLINE="1", TF_CPP_MIN_LOG_LEVEL="2"),
        )  # fmt: skip
        try:
            code = process.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        errors.seek(0)
        lines = [line.strip() for line in errors if line.strip()]
    return "done" if code == 0 else f"failed: {lines[-1][:500] if lines else f'exit code {code}'}"


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None
