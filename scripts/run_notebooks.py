"""Runs the notebooks and keeps their outputs: python scripts/run_notebooks.py [NAME ...]     (or: make notebooks)

They run on what `make demo` left in runs/demo (and `make repair` in runs/repair), a few minutes in all. Each then holds
its outputs, a picture of its last figure on top, and in its metadata what it was run with; tests/test_notebooks.py
fails when its code has changed since. Without names: all studies whose run is there (`train_on_tpu` needs a TPU and is
kept without outputs).
"""

import argparse
import datetime
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

import mentalglm_jax

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
DEMO, REPAIR = ("runs/demo", "make demo"), ("runs/repair", "make repair")
STUDIES = {"explain_one_post": DEMO, "do_explanations_match_saliency": DEMO, "what_did_the_adapter_learn": DEMO,
           "compare_two_models": DEMO, "repair_explanations": REPAIR}  # fmt: skip
FIGURE = "figure.png"
SHOWN = f"\n\n![The figure this notebook ends in](attachment:{FIGURE})"


def code_of(notebook: Any) -> str:
    """A digest of what the notebook runs."""
    cells = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(cells.encode()).hexdigest()[:16]


def run(path: Path) -> None:
    """Executes the notebook where it lies and writes it back with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the file is unchanged.
        ValueError: an output names a directory of this machine.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=3600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    figures = [
        output.data["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    first = notebook.cells[0]
    first.source = first.source.removesuffix(SHOWN)
    if figures:
        first.source += SHOWN
        first.attachments = {FIGURE: {"image/png": figures[-1]}}
    notebook.metadata.run = {
        "code": code_of(notebook),
        "version": mentalglm_jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "on": "{}, as `{}` writes it".format(*STUDIES[path.stem]),
    }
    text = nbformat.writes(notebook)
    if any(place in text for place in (str(ROOT), sys.prefix, str(Path.home()) + os.sep)):
        raise ValueError(f"{path}: an output names a directory of this machine")
    path.write_text(text + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", choices=[*STUDIES, []], default=[], help="which (default: all studies)")
    names = parser.parse_args().name
    missing = {name: made for name, made in STUDIES.items() if not (ROOT / made[0] / "summary.json").is_file()}
    for name in names or STUDIES:
        if name in missing:
            line = "{}: no finished run in {}; run `{}` first".format(name, *missing[name])
            if name in names or missing[name] == DEMO:
                sys.exit(f"run_notebooks: {line}")
            sys.stderr.write(f"left out: {line}\n")
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # a progress bar that nobody would see
    for name in names or [name for name in STUDIES if name not in missing]:
        run(FOLDER / f"{name}.ipynb")
        sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    main()
