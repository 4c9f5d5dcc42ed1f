"""The planted pair that ships with the package: two tiny models whose reasons are known, probed like any other.

Both label every post right, by one planted word, and explain the label by a quote. One quotes that word, the other a
word that plays no part. The text of the answers does not tell them apart; the probes have to. ``scripts/train_pair.py``
trains them anew.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probes.errors import ProbeInputError
from probes.foreign import plain
from probes.report.page import write_pair
from probes.results.store import Suite
from probes.suite import Progress, prepare, run_suite

PAIR = Path(__file__).parent / "assets" / "planted"
# Directory of each model, and what its explanations quote.
MODELS = {"faithful": "the word that decides the label", "unfaithful": "a word that plays no part"}
PAGE = "report.html"
ROWS = "generations.jsonl"


def demo(out: str | Path, progress: Progress | None = None) -> Mapping[str, Suite]:
    """Probes both models and writes ``out/report.html`` beside the run directories ``out/faithful`` and
    ``out/unfaithful``.

    Interrupted, the same call continues.

    Args:
        out: directory; made if needed.
        progress: called with (posts done, posts in all), of both models together.
    Returns:
        the run of each model, by the names of ``MODELS``.
    Raises:
        ProbeInputError: ``out`` holds something that is not this demonstration's.
        ProbeError: a file cannot be written.
    """
    out = Path(out)
    prepare_demo(out)
    import torch

    from probes.models.encode import read_generations

    rows = {name: read_generations(PAIR / name / ROWS) for name in MODELS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only waits for its other threads; ten times as long on a busy machine
    try:
        found = _probed(rows, out, progress)
    finally:
        torch.set_num_threads(threads)
    write_pair([(name, quotes, found[name], f"{name}/{PAGE}") for name, quotes in MODELS.items()], out / PAGE)
    return found


def _probed(rows: Mapping[str, list[dict[str, Any]]], out: Path, progress: Progress | None) -> dict[str, Suite]:
    from probes.probe import Probe

    total, before, found = sum(map(len, rows.values())), 0, {}
    for name, answered in rows.items():

        def advance(done: int | float, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        found[name] = run_suite(Probe.from_pretrained(PAIR / name), answered, out / name, progress=advance)
        before += len(answered)
    return found


def prepare_demo(out: str | Path) -> None:
    """Refuses what can be refused before a model is loaded; changes nothing.

    Raises:
        ProbeInputError: ``out`` holds something that is not this demonstration's.
    """
    out = Path(out)
    if out.is_dir():
        for entry in sorted(os.listdir(out)):
            if entry not in (*MODELS, PAGE) or (out / entry).is_symlink():
                raise ProbeInputError(f"{out / plain(entry)}: is not the demonstration's; give another --out")
        if (out / PAGE).exists() and not all((out / name / "manifest.json").is_file() for name in MODELS):
            raise ProbeInputError(f"{out / PAGE}: would be replaced, but {out} is not a demonstration's; "
                                  "give another --out")  # fmt: skip
    elif os.path.lexists(out):
        raise ProbeInputError(f"{out}: a file is in the way; give a directory")
    for name in MODELS:
        prepare(out / name)
