"""A downloaded directory runs none of its own code, whatever command is given inside it.

The directory holds a module of every name that Python could be asked for: all of the standard library and all that is
installed, with our own packages. Each writes its name down when it is executed. Two processes go through all commands
(one for each command line), then import every module of the package: what is imported late is imported, too.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from mentalglm_jax import interpreter
from tests.hostile.attack import ENTRIES
from tests.hostile.commands import IDS

ROOT = Path(__file__).parents[2]
OWN = {"mentalglm_jax", "probes"}
# What Python itself looks for while it starts, before any line of ours.
START = {
    "sitecustomize",
    "usercustomize",
    "encodings",
    "site",
    "os",
    "io",
    "abc",
    "codecs",
    "stat",
    "posixpath",
    "_distutils_hack",
}  # the last by a .pth file of setuptools
NAMES = {name for name in (*sys.stdlib_module_names, *packages_distributions()) if name.isidentifier()} | START | OWN
ARGUMENTS = {
    "mentalglm run": ["recipe.yaml"], "mentalglm train": ["recipe.yaml"],
    "mentalglm plan": ["recipe.yaml", "--topology", "v5e:1x1"],
    "mentalglm sweep": ["recipe.yaml", "--out", "swept"],
    "mentalglm generate": ["nowhere", "--in", "records.jsonl", "--out", "answers.jsonl"],
    "mentalglm evaluate": ["nowhere", "--data", "records.jsonl", "--out", "evaluated"],
    "mentalglm bench": ["nowhere.yaml"],
    "mentalglm chat": ["nowhere"],
    "mentalglm serve": ["nowhere", "--port", "0"],
    "mentalglm leaderboard": ["nowhere"],
    "mentalglm convert": ["model", "converted"],
    "mentalglm export": ["nowhere", "--to", "peft"],
    "mentalglm doctor": ["--json"],
    "mentalglm tasks list": ["--json"], "mentalglm tasks show": ["suicide_risk"], "mentalglm tasks check": ["."],
    "mentalglm data inspect": ["records.jsonl", "--out", "scrubbed"],
    "mentalglm data import": ["records.jsonl", "--text", "post", "--label", "label", "--task", "suicide_risk",
                              "--out", "m"],
    "mentalglm data build": ["build.yaml"],
    "mentalglm data review export": ["records.jsonl", "--out", "review"],
    "mentalglm data review import": ["review", "ratings.json"],
    "probes run": ["nowhere", "--in", "records.jsonl", "--out", "probed"],
    "probes check": ["nowhere"], "probes report": ["nowhere"],
    "probes rows": ["model", "--in", "asked.jsonl", "--out", "rows.jsonl"],
    "probes answer": ["model", "--in", "records.jsonl", "--prompt", "ask.jinja", "--out", "answered.jsonl",
                      "--max-new-tokens", "1"],
    "probes demo": ["--out", "records.jsonl"],
    "probes randomise": ["nowhere", "--in", "records.jsonl"],
    "probes rank": ["nowhere", "--in", "records.jsonl", "--out", "pairs.jsonl"],
    "probes verify": ["model"],
    "probes selftest": ["--help"], "probes validate": ["--help"],  # their modules are imported at the end
    "probes leaderboard": ["--help"],
}  # fmt: skip
RECORD = {"id": "a", "task": "suicide_risk", "language": "en", "post": "I like rain.", "label": "low",
          "question": "Q?", "source": "test", "explanation": "It says rain."}  # fmt: skip
DRIVER = """import sys
from {module} import main
import importlib, json, pathlib, pkgutil
codes = dict()
for command in json.loads(sys.argv[1]):
    try:
        main(command)
        codes[" ".join(command)] = 0
    except SystemExit as end:
        codes[" ".join(command)] = end.code or 0
import {package}
for found in pkgutil.walk_packages({package}.__path__, "{package}."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
pathlib.Path(sys.argv[2]).write_text(json.dumps(codes))
"""


def lay_traps(directory: Path, names: set[str]) -> Path:
    """Modules of these names in ``directory``; returns the file they would write to."""
    marks = directory.parent / "executed"
    for name in names:
        (directory / f"{name}.py").write_text(
            f"open({str(marks)!r}, 'a').write({name!r} + '\\n')\nraise SystemExit(99)\n"
        )
    for name in OWN & names:  # a package goes before a module
        (directory / name).mkdir()
        (directory / name / "__init__.py").write_text((directory / f"{name}.py").read_text())
    return marks


def executed(marks: Path) -> set[str]:
    return set(marks.read_text().split()) if marks.exists() else set()


@pytest.fixture(scope="module")
def trapped(tmp_path_factory):
    """A directory with a real model and records, and traps around them."""
    from flax import nnx

    from mentalglm_jax.checkpoints.directories import save_pretrained
    from mentalglm_jax.model.glm import Glm, GlmConfig
    from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer

    directory, tokenizer = tmp_path_factory.mktemp("downloaded") / "checkpoint", GlmTokenizer.load(BUILTIN)
    directory.mkdir()
    config = GlmConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                       head_dim=8, num_attention_heads=2, num_key_value_heads=2,
                       pad_token_id=tokenizer.pad_id)  # fmt: skip
    save_pretrained(Glm(config, rngs=nnx.Rngs(0)), directory / "model", tokenizer=tokenizer)
    (directory / "records.jsonl").write_text(json.dumps(RECORD) + "\n")
    asked = {"messages": [{"role": "user", "content": RECORD["post"]}], "post": RECORD["post"], "answer": "low"}
    (directory / "asked.jsonl").write_text(json.dumps(asked) + "\n")
    (directory / "ask.jinja").write_text("{{ post }} High or low?")
    recipe = {"run_dir": "run", "model": {"path": "nowhere"}, "data": {"source": "jsonl", "root": "nowhere"},
              "stages": [{"name": "a", "train": {"steps": 1, "rows": 1, "sequence_length": 64}}]}  # fmt: skip
    (directory / "recipe.yaml").write_text(json.dumps(recipe))
    return directory, lay_traps(directory, NAMES)


@pytest.fixture(scope="module")
def driven(trapped, tmp_path_factory):
    """Exit codes of all commands, each command line in one process that was started as its console script is."""
    directory, _ = trapped
    bin_dir, codes = tmp_path_factory.mktemp("bin"), {}
    for entry, module in ENTRIES.items():
        script, found = bin_dir / entry, bin_dir / f"{entry}.json"
        script.write_text(DRIVER.format(module=module, package=module.partition(".")[0]))
        asked = [[*name.split()[1:], *given] for name, given in ARGUMENTS.items() if name.split()[0] == entry]
        command = [sys.executable, script, json.dumps(asked), found]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
        assert found.exists(), done.stderr[-2000:]
        codes |= {f"{entry} {name}": code for name, code in json.loads(found.read_text()).items()}
    return codes


@pytest.mark.parametrize("command", IDS)
def test_no_command_imports_from_the_directory_it_is_given_in(trapped, driven, command):
    assert command in ARGUMENTS, "a new command: say in ARGUMENTS with what it is to be tried"
    code = driven[" ".join([command, *ARGUMENTS[command]])]
    assert not executed(trapped[1])
    assert code in (0, 1, 2)


def test_the_conversion_was_opened_by_the_real_transformers(trapped, driven):
    """The one that began it: the child that vouches for a conversion."""
    directory, marks = trapped
    assert driven["mentalglm convert model converted"] == 0 and (directory / "converted" / "config.json").exists()
    assert driven["probes verify model"] == 0
    assert not executed(marks)


@pytest.mark.parametrize("package", sorted(OWN))
@pytest.mark.parametrize("option", ["-m", "-um", "-P -m"])
def test_python_m_imports_nothing_else_from_there(tmp_path, package, option):
    """The package, and of the standard library what finds it, are looked up before a line of ours runs: only -P is
    against that. All else is not taken from there."""
    (tmp_path / "here").mkdir()
    marks = lay_traps(tmp_path / "here", NAMES if "-P" in option else NAMES - OWN - set(sys.stdlib_module_names))
    command = [sys.executable, *option.split(), package, "--help"]
    done = subprocess.run(command, cwd=tmp_path / "here", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not executed(marks)


@pytest.mark.parametrize(
    "value", [":/nowhere", "/nowhere:", ".", "sub/.."], ids=["empty", "trailing", "dot", "relative"]
)
@pytest.mark.parametrize("entry", list(ENTRIES))
def test_a_relative_pythonpath_is_not_the_directory(tmp_path, entry, value):
    """``export PYTHONPATH=/my/code:$PYTHONPATH`` means the working directory, too, where that was empty."""
    (tmp_path / "here" / "sub").mkdir(parents=True)
    marks = lay_traps(tmp_path / "here", NAMES - set(sys.stdlib_module_names) - START - OWN)
    script = Path(sys.executable).with_name(entry)
    done = subprocess.run([script, "--help"], cwd=tmp_path / "here", env={**os.environ, "PYTHONPATH": value},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not executed(marks)


@pytest.mark.parametrize("variable", ["nothing", "PYTHONPATH=.", "PYTHONPATH=/nowhere:"])
@pytest.mark.parametrize("module", ["probes", "multiprocessing.resource_tracker"])
def test_a_child_of_ours_does_not_look_there(tmp_path, monkeypatch, module, variable):
    """``module_command`` with ``environment`` is how `convert`, `run` and `verify` start their children."""
    (tmp_path / "here").mkdir()
    marks = lay_traps(tmp_path / "here", NAMES)
    monkeypatch.chdir(tmp_path / "here")
    name, _, value = variable.partition("=")
    if value:
        monkeypatch.setenv(name, value)
    command = interpreter.module_command(module, "--help")
    done = subprocess.run(command, env=interpreter.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not executed(marks)


def test_children_that_libraries_start_do_not_look_there(tmp_path):
    """multiprocessing, joblib and the like start ``python -c``, which looks into the working directory first; a command
    of ours leaves them an environment in which Python does not."""
    (tmp_path / "here").mkdir()
    marks = lay_traps(tmp_path / "here", NAMES)
    script = tmp_path / "mentalglm"
    child = "subprocess.run([sys.executable, '-c', 'import multiprocessing, yaml'], check=True)"
    script.write_text(f"import subprocess, sys, mentalglm_jax\n{child}\n")
    command = [sys.executable, script]
    done = subprocess.run(command, cwd=tmp_path / "here", capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not executed(marks), done.stderr


def test_search_paths_lose_what_means_the_working_directory(monkeypatch):
    for name in interpreter.SEARCH_PATHS:
        monkeypatch.setenv(name, os.pathsep.join(["", "/usr/bin", ".", "bin", "/bin", ""]))
    found = interpreter.environment(MORE="1")
    assert {found[name] for name in interpreter.SEARCH_PATHS} == {"/usr/bin:/bin"}
    assert found["PYTHONSAFEPATH"] == "1" and found["MORE"] == "1"
    monkeypatch.setenv("PYTHONPATH", ":.")
    assert "PYTHONPATH" not in interpreter.environment()


def test_a_library_user_keeps_his_path():
    """Imported by a notebook or script, the packages change neither path nor environment."""
    program = ("import os, sys; before = sys.path[:], dict(os.environ)\nimport mentalglm_jax, probes\n"
               "assert before == (sys.path, dict(os.environ))")  # fmt: skip
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


SOURCES = [path for folder in ("mentalglm_jax", "probes", "scripts", "benchmarks", "notebooks")
           for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".py", ".ipynb")]  # fmt: skip
SAFE = re.compile(r'\[\s*sys\.executable,\s*\\?"-P\\?"')
NO_CHILD = "os.execve(sys.executable, [sys.executable, "  # its first argument is a file to run, not a command line


def test_every_child_in_the_sources_is_started_safely():
    texts = {path: path.read_text("utf-8").replace(NO_CHILD, "[sys.executable, ") for path in SOURCES}
    assert sum(text.count("sys.executable") for text in texts.values()) >= 5
    assert not [path for path, text in texts.items() if text.count("sys.executable") != len(SAFE.findall(text))]


@pytest.mark.parametrize("package", ["mentalglm_jax", "probes"])
def test_an_empty_search_path_is_none(package, monkeypatch):
    """As to Python. A clone that is installed where it lies stays importable for commands that are given in it."""
    module = importlib.import_module(f"{package}.interpreter")
    monkeypatch.setattr(module, "_is_command", lambda *_: True)
    monkeypatch.chdir(ROOT)
    for name, value in {"PYTHONPATH": "", "PYTHONSAFEPATH": "1", "PATH": os.environ["PATH"]}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    module.guard(package, package)
    assert str(ROOT) in sys.path
    monkeypatch.setenv("PYTHONPATH", ":/somewhere")  # an empty entry is the working directory
    module.guard(package, package)
    assert str(ROOT) not in sys.path


LAUNCH = re.compile(r"^.*(?:torchrun|accelerate launch|python3? +-\S*m +(?:mentalglm_jax|probes)).*$", re.MULTILINE)


def test_every_launch_line_of_the_docs_is_safe():
    texts = [path for folder in ("docs", "configs", "notebooks") for path in (ROOT / folder).rglob("*.*")
             if "reference" not in path.parts]  # pages that `make docs` copies and makes  # fmt: skip
    lines = [line for path in texts if path.suffix in (".md", ".yaml", ".sh", ".ipynb")
             for line in LAUNCH.findall(path.read_text("utf-8"))]  # fmt: skip
    assert lines and not [line for line in lines if "PYTHONSAFEPATH=1" not in line and " -P " not in line]
