"""Runs the notebooks and keeps their outputs: python scripts/run_notebooks.py [NAME ...]     (or: make notebooks)

They run on what `make demo` left in runs/demo, others on what `make study` and `make repair` leave, minutes in all.
Each then holds its outputs, a picture of its last figure on top, and in its metadata what it was run with.
tests/test_notebooks.py fails when its code has changed since, or what a function or class must be given that it names.
`--stale` runs those of which such a function or class itself has changed. Without names: all studies (`train_on_tpu`
needs a TPU and is kept without outputs).
"""

import argparse
import ast
import datetime
import hashlib
import importlib
import inspect
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

import mentalglm_jax

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
DEMO, REPAIR = ("runs/demo/summary.json", "make demo"), ("runs/repair/summary.json", "make repair")
MODEL = ("runs/study/smollm2/config.json", "make study")
# Each study with a file that must be there, and what writes it.
STUDIES = {
    "explain_one_post": DEMO,
    "do_explanations_match_saliency": DEMO,
    "what_did_the_adapter_learn": DEMO,
    "compare_two_models": DEMO,
    "probe_a_real_model": MODEL,
    "repair_explanations": REPAIR,
}
FIGURE = "figure.png"
SHOWN = f"\n\n![The figure this notebook ends in](attachment:{FIGURE})"
OURS = ("probes", "mentalglm_jax")


def code_of(notebook: Any) -> str:
    """A digest of what the notebook runs: its own code, and how what it names of our packages is called. As long as it
    is the same, the code that is there runs what is shown."""
    return _digest(notebook, how_called)


def bodies_of(notebook: Any) -> str:
    """The same with the sources of what it names: when that differs, the outputs may."""
    return _digest(notebook, bare)


def _digest(notebook: Any, part: Callable[[Any], str]) -> str:
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    named = called("\n".join(cells))
    parts = [*cells, *(f"{name}{part(named[name])}" for name in sorted(named))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def called(code: str) -> dict[str, Any]:
    """The functions and classes of our packages that a piece of code imports, or takes from a module it imports."""
    tree, found, modules = ast.parse(code), {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in OURS:
            for name in node.names:
                one = getattr(importlib.import_module(str(node.module)), name.name)
                if inspect.ismodule(one):
                    modules[name.asname or name.name] = one
                else:
                    found[f"{node.module}.{name.name}"] = one
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            module = modules[node.value.id]
            found[f"{module.__name__}.{node.attr}"] = getattr(module, node.attr)
    return {name: one for name, one in found.items() if inspect.isfunction(one) or inspect.isclass(one)}


def how_called(one: Any) -> str:
    """What a function or class must be given."""
    parameters = inspect.signature(one).parameters.values()
    return ", ".join(f"{each.name}:{each.kind.name}" for each in parameters if each.default is each.empty)


def bare(one: Any) -> str:
    """The source of a function or class without docstrings, comments and empty lines."""
    source = textwrap.dedent(inspect.getsource(one))
    words: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))
            and ast.get_docstring(node) is not None
        ):
            words.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = [line.rstrip() for number, line in enumerate(source.splitlines(), start=1) if number not in words]
    return "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))


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
        "bodies": bodies_of(notebook),
        "version": mentalglm_jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "on": f"{Path(STUDIES[path.stem][0]).parent}, as `{STUDIES[path.stem][1]}` writes it",
    }
    text = nbformat.writes(notebook)
    if any(place in text for place in (str(ROOT), sys.prefix, str(Path.home()) + os.sep)):
        raise ValueError(f"{path}: an output names a directory of this machine")
    path.write_text(text + "\n", "utf-8")


def stale(notebook: Any) -> bool:
    """Whether a notebook was never run, or something that it names has changed since."""
    ran = notebook.metadata.get("run", {})
    return (ran.get("code"), ran.get("bodies")) != (code_of(notebook), bodies_of(notebook))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", choices=[*STUDIES, []], default=[], help="which (default: all studies)")
    parser.add_argument("--stale", action="store_true", help="those only that name a function that has changed")
    given = parser.parse_args()
    names = given.name or list(STUDIES)
    if given.stale:
        names = [name for name in names if stale(nbformat.read(FOLDER / f"{name}.ipynb", as_version=4))]
    missing = {name: made for name, made in STUDIES.items() if not (ROOT / made[0]).is_file()}
    for name in names:
        if name in missing:
            line = "{}: {} is not there; run `{}` first".format(name, *missing[name])
            if name in given.name or missing[name] == DEMO:
                sys.exit(f"run_notebooks: {line}")
            sys.stderr.write(f"left out: {line}\n")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: on a busy machine threads only wait for each other
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # a progress bar that nobody would see
    for name in (name for name in names if name not in missing):
        run(FOLDER / f"{name}.ipynb")
        sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    main()
