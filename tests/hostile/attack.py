"""How an attack is carried out and judged. One test item under ``tests/hostile`` is one attack; its name says which.

A command is run in this process (``run``, fast) or in one of its own (``child``: working directory, signals, memory).
``refused`` is what almost every attack must end in: one line that says what is wrong and where, and the exit code.
"""

from __future__ import annotations

import importlib
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ENTRIES = {"mentalglm": "mentalglm_jax.cli.main", "probes": "probes.cli"}
FOREIGN = re.compile(r"\b(?!RuntimeWarning)[A-Z]\w+(Error|Exception|Panic)\b: |Traceback|--debug shows where")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code, what it printed, seconds, and the most memory it held (a child only, MiB)."""

    code: int
    out: str
    err: str
    seconds: float
    peak_mib: float = 0.0


def run(command: Sequence[object], capsys: pytest.CaptureFixture[str]) -> Outcome:
    """``["probes", "run", ...]`` in this process, through the function that the console script calls."""
    name, *arguments = map(str, command)
    capsys.readouterr()
    began = time.monotonic()
    code: object = 0
    try:
        importlib.import_module(ENTRIES[name]).main(arguments)
    except SystemExit as end:
        code = end.code or 0
    captured = capsys.readouterr()
    return Outcome(int(str(code)), captured.out, captured.err, time.monotonic() - began)


def child(
    command: Sequence[object], cwd: Path, limit: float = 600.0, environment: dict[str, str] | None = None
) -> Outcome:
    """The console script itself in a process of its own, started as a user starts it in the directory ``cwd``.

    A command that outlives ``limit`` seconds is a failure.
    """
    name, *arguments = map(str, command)
    program = [str(Path(sys.executable).with_name(name)), *arguments]

    began = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = subprocess.run(
        program, cwd=cwd, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, errors="replace", timeout=limit, check=False,
    )  # fmt: skip
    peak = max(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, before) / 1024
    return Outcome(done.returncode, done.stdout, done.stderr, time.monotonic() - began, peak)


def refused(outcome: Outcome, says: str, code: int = 2, seconds: float = 250.0) -> str:
    """Asserts a refusal in one line; gives that line back.

    Args:
        says: a regular expression that the line must match: the file, row or key, and what is wrong with it.
        code: 2 for bad input, 1 for work that failed.
        seconds: what the refusal may take at most, on a machine that stands still for minutes.
    """
    lines = [line for line in outcome.err.splitlines() if line and not line.startswith("warning: ")]
    assert outcome.code == code, f"exit code {outcome.code}, wanted {code}: {outcome.err[-1500:]}"
    assert len(lines) == 1, f"not one line: {outcome.err[-1500:]}"
    assert not FOREIGN.search(lines[0]), f"a foreign error: {lines[0]}"
    assert not CONTROL.search(lines[0]), f"control characters: {lines[0]!r}"
    assert len(lines[0]) <= 1000, f"{len(lines[0])} characters: {lines[0][:300]}"
    assert re.search(says, lines[0]), f"{lines[0]!r} does not say {says!r}"
    assert outcome.seconds <= seconds, f"{outcome.seconds:.1f} s"
    return lines[0]
