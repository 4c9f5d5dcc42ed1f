"""The notebooks: they run from top to bottom on a tiny model, have one cell to change, and outputs of their code."""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import mentalglm_jax
from probes.demo import PAIR
from probes.models.encode import read_generations
from scripts import run_notebooks
from scripts.run_notebooks import FIGURE, SHOWN, STUDIES, bodies_of, called, code_of
from tests.probes.planted import planted_rows
from tests.probes.tiny import boilerplate, make_model, make_tokenizer, save_adapter

ROOT = Path(__file__).parents[1]
FIRST = next(iter(STUDIES))
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}


def parameters(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]


@pytest.mark.parametrize("name", STUDIES)
def test_outputs_are_of_the_code_that_is_there(name):
    """`make notebooks` runs them again; until then a change of their code, or a new version, leaves old outputs."""
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    ran, code = notebook.metadata.get("run"), [cell for cell in notebook.cells if cell.cell_type == "code"]
    if ran is None:  # not run yet: then nothing stands in it that could be of other code
        assert name != FIRST and not any(cell.outputs or cell.execution_count for cell in code)
        return
    assert ran["code"] == code_of(notebook), "the code has changed since it ran: make notebooks"
    assert ran["version"] == mentalglm_jax.__version__, "it ran with another version: make notebooks"
    assert all(cell.execution_count for cell in code) and any(cell.outputs for cell in code)
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert notebook.cells[0].source.endswith(SHOWN) and FIGURE in notebook.cells[0].attachments
    assert NOTEBOOKS[name].stat().st_size < 1 << 20


def test_a_change_of_code_is_noticed():
    notebook = nbformat.read(NOTEBOOKS[FIRST], as_version=4)
    before = code_of(notebook)
    notebook.cells[0].source += " Words may change."
    assert code_of(notebook) == before
    next(cell for cell in notebook.cells if cell.cell_type == "code").source += "\nLIMIT = 3"
    assert code_of(notebook) != before


def test_a_change_of_what_it_calls_is_noticed(monkeypatch):
    """Functions that are imported, and those of a module that is; their words may change."""
    notebook = nbformat.read(NOTEBOOKS["explain_one_post"], as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert {"probes.saliency.attribute.attribute", "probes.report.figures.clauses"} <= set(called(code))
    before, source = bodies_of(notebook), inspect.getsource
    for name in ("attribute", "clauses"):
        for change, counts in (("# words\n    ", False), ("assert True\n    ", True)):
            with monkeypatch.context() as patched:
                patched.setattr(inspect, "getsource", lambda one, n=name, c=change: changed(source(one), n, c))
                assert (bodies_of(notebook) != before) == counts, (name, change)
    before = code_of(notebook)
    with monkeypatch.context() as patched:
        patched.setattr("probes.report.figures.clauses", lambda result, method, other: None)
        assert code_of(notebook) != before


def changed(source: str, name: str, change: str) -> str:
    """``change`` put before the last return of the function ``name``."""
    before, found, after = source.rpartition("return ")
    return before + change + found + after if source.startswith(f"def {name}(") else source


@pytest.mark.parametrize("given", [[], [FIRST]])
@pytest.mark.parametrize("old", [[], [FIRST], list(STUDIES)])
def test_the_stale_ones_alone_are_run_again(given, old, monkeypatch):
    ran: list[str] = []
    monkeypatch.setattr("sys.argv", ["run_notebooks", "--stale", *given])
    monkeypatch.setattr(run_notebooks, "STUDIES", dict.fromkeys(STUDIES, ("README.md", "make demo")))
    monkeypatch.setattr(run_notebooks, "run", lambda path: ran.append(path.stem))
    stale = iter([name in old for name in given or STUDIES])
    monkeypatch.setattr(run_notebooks, "stale", lambda notebook: next(stale))
    run_notebooks.main()
    assert ran == [name for name in given or STUDIES if name in old]


@pytest.mark.parametrize("name", STUDIES)
def test_files_have_one_cell_to_change(name):
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    nbformat.validate(notebook)
    (cell,) = parameters(notebook)
    assert cell.source.startswith("# Change only this cell")
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert notebook.cells[0].source.startswith("# ") and "not a diagnosis" in text
    assert "\nTo run it: " in notebook.cells[0].source


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict[str, Any]:
    """A random GLM with a random adapter and six answered posts: nothing can be found in it, and nothing should be."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer([boilerplate("zh") + "".join(row["post"] for row in _rows(None))], 400)
    make_model(tokenizer).save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    save_adapter(path / "base", path / "adapter")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(tokenizer)]
    (path / "generations.jsonl").write_text("".join(lines), encoding="utf-8")
    given = {"MODEL": path / "base", "ADAPTER": path / "adapter", "GENERATIONS": path / "generations.jsonl"}
    given = {name: str(value) for name, value in given.items()}
    one = (given["MODEL"], given["ADAPTER"], given["GENERATIONS"])
    given["REPAIR"] = str(_repair(path / "repair", _rows(tokenizer)))
    return given | {"A": one, "B": (one[0], None, one[2]), "LIMIT": 2, "INDEX": 1}


def _repair(path: Path, answered: list[dict[str, Any]]) -> Path:
    """What `make repair` leaves that a notebook looks at: two answers to each post, two pairs, a curve, a table."""
    stage = path / "round1" / "run" / "stages" / "repair"
    stage.mkdir(parents=True)
    candidates = [row | {"id": f"{row['id']}#{n}"} for row in answered for n in range(2)]
    common = {"margin": 0.5, "scores": {"erasure": [0.5, 0.0]}}
    pairs = [{"id": f"{n} > b", "prompt_ids": candidates[n]["prompt_ids"]} | common for n in (0, 2)]
    steps = [{"step": n, "margin": 0.1 * n, "kl": 0.0, "accuracy": 1.0, "chosen_loss": 1.0} for n in range(3)]
    for file, rows in ((path / "round1" / "candidates.jsonl", candidates), (path / "round1" / "pairs.jsonl", pairs),
                       (stage / "metrics.jsonl", steps)):  # fmt: skip
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    (path / "table.md").write_text("| a |\n| --- |\n| 1 |\n")
    return path


def _rows(tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of generations.jsonl; without a tokenizer only their text is of use."""
    tokenizer = tokenizer or make_tokenizer([boilerplate("zh")], 300)
    return planted_rows(tokenizer, 6, seed=3)


@pytest.fixture(scope="module")
def asked() -> dict[str, Any]:
    """A model of the pair that ships, which is to answer itself."""
    rows = read_generations(PAIR / "faithful" / "generations.jsonl")[:2]
    question = "[gMASK]<sop><|user|>post: {{ post }} risk?<|assistant|>"
    posts = {row["id"]: row["post"] for row in rows}
    return {"MODEL": str(PAIR / "faithful"), "POSTS": posts, "QUESTION": question, "LABELS": rows[0]["candidates"]}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Iterator[NotebookClient]:
    """One kernel for all, for each would import torch anew; what a notebook names is gone before the next begins."""
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=800, kernel_name="python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")  # tiny matrices: threads would only wait for each other
        with client.setup_kernel(cwd=str(tmp_path_factory.mktemp("kernel"))):
            yield client


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", STUDIES)
def test_runs_from_top_to_bottom(name, kernel, model, asked, tmp_path):
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    (cell,) = parameters(notebook)
    if "\nQUESTION = " in cell.source:
        model = asked
    changed = {variable: value for variable, value in model.items() if f"\n{variable} = " in cell.source}
    assert changed
    cell.source += "\n" + "\n".join(f"{variable} = {value!r}" for variable, value in changed.items())
    if "\nOUT = " in cell.source:
        cell.source += f"\nOUT = {str(tmp_path / 'out')!r}"
    forget = nbformat.v4.new_code_cell(f"%reset -f\nimport os\nos.chdir({str(tmp_path)!r})\ndel os")
    notebook.cells.insert(0, forget)
    kernel.nb = notebook
    for at, one in enumerate(notebook.cells):
        kernel.execute_cell(one, at)
    outputs = [output for c in notebook.cells for output in c.get("outputs", ())]
    assert not [o for o in outputs if o.output_type == "error"]
    kinds = {kind for o in outputs if o.output_type in ("display_data", "execute_result") for kind in o.data}
    assert "image/png" in kinds or "text/html" in kinds
