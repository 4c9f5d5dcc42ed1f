"""The engineering base itself: style, types, the wheel, the pinned environment, the recipes' form."""

import importlib.metadata
import itertools
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("mentalglm_jax", "probes")


def run(*command: str | Path) -> str:
    """Run a command in the repository root; its output on success, a failed test with that output otherwise."""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return result.stdout


# ---- style and types -------------------------------------------------------------------------------------------------


def test_ruff_finds_nothing():
    run(sys.executable, "-m", "ruff", "check", "--output-format", "concise", ".")


def test_ruff_would_format_nothing():
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


def pyrefly(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyrefly", "check", "--python-interpreter-path", sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_pyrefly_finds_nothing():
    found = pyrefly()
    assert found.returncode == 0 and " 0 errors" in found.stderr, found.stdout + found.stderr


def test_pyrefly_knows_the_types_of_both_packages_and_of_what_they_stand_on(tmp_path):
    calls = ("probes.stats.holm(3)", "mentalglm_jax.model.glm.GlmConfig(vocab_size='8')", "optax.adamw(0.1, b3=0.9)")
    lines = [f"import {call.partition('(')[0].rpartition('.')[0]}\n{call}\n" for call in calls]
    (tmp_path / "wrong.py").write_text("".join(lines))
    found = pyrefly("--config", ROOT / "pyproject.toml", tmp_path / "wrong.py")
    assert found.returncode == 1 and " 3 errors" in found.stderr, found.stdout + found.stderr


def test_files_are_short_enough_to_read():
    folders = (*PACKAGES, "tests", "benchmarks", "scripts")
    lengths = {p: len(p.read_text("utf-8").splitlines()) for d in folders for p in (ROOT / d).rglob("*.py")}
    too_long = {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > 500}
    assert not too_long, too_long


# ---- the environment -------------------------------------------------------------------------------------------------


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def pins() -> dict[str, Requirement]:
    """Pinned requirement of each distribution on this interpreter."""
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r for r in requirements if r.marker is None or r.marker.evaluate()}


def installed_closure(requirements: list[str]) -> dict[str, str]:
    """Name -> version of everything installed that the requirements bring with them."""
    todo, seen, found = [Requirement(r) for r in requirements], set(), {}
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that this environment was made without
        found[name] = distribution.version
        for extra in {"", *requirement.extras} - {e for n, e in seen if n == name}:
            seen.add((name, extra))
            needed = (Requirement(r) for r in distribution.requires or ())
            todo.extend(r for r in needed if r.marker is None or r.marker.evaluate({"extra": extra}))
    return found


def test_every_dependency_is_pinned_and_installed_at_its_pin():
    groups = project()["optional-dependencies"]
    found = installed_closure([*project()["dependencies"], *groups["probes"], *groups["dev"]])
    assert {"jax", "flax", "numpy"} <= set(found)
    accelerator = re.compile(r"nvidia-|jax-cuda|cuda-|triton|libtpu")  # pinned by jax and torch themselves
    unpinned = sorted(n for n in found if n not in pins() and not accelerator.match(n))
    assert not unpinned, f"constraints.txt lacks {unpinned}"
    other = [f"{n} {v} ({r})" for n, v in found.items() if (r := pins().get(n)) and not r.specifier.contains(v, True)]
    assert not other, f"installed differently from constraints.txt: {other}; remove .venv or run make again"


def test_constraints_are_exact_and_from_no_particular_index():
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        assert re.fullmatch(r"#.*|[a-z0-9._-]+==[\w.]+( ; python_version (<|>=) '3\.\d+')?", line), line


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_pins_satisfy_the_declared_ranges(python):
    environment = {"python_version": python, "python_full_version": python + ".1", "extra": ""}
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    pinned = {
        canonicalize_name(r.name): next(iter(r.specifier)).version
        for r in map(Requirement, lines)
        if r.marker is None or r.marker.evaluate(environment)
    }
    groups = project()["optional-dependencies"]
    for text in [*project()["dependencies"], *groups["probes"], *groups["dev"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text


# ---- what is shipped -------------------------------------------------------------------------------------------------


def test_wheel_holds_both_packages_with_their_data_and_nothing_else(tmp_path):
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    sizes = {one.filename: one.compress_size for one in zipfile.ZipFile(wheel).infolist()}
    names = {n for n in sizes if ".dist-info/" not in n}
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    pair = sum(sizes[name] for name in names if name.startswith("probes/assets/planted/"))
    assert pair < 1_100_000 and sum(sizes.values()) - pair < 1_200_000  # as compressed


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_directory(tmp_path):
    """Built as `pip wheel .` does; put into an environment with this one's other packages and no source of ours."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env"))
    python = tmp_path / "env" / "bin" / "python"
    (own,) = (tmp_path / "env").rglob("site-packages")
    run(*pip, "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (own / "others.pth").write_text("".join(f"{path}\n" for path in others))  # their .pth files are not read

    def there(*command: str) -> str:
        (tmp_path / "empty").mkdir(exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run([tmp_path / "env" / "bin" / command[0], *command[1:]], cwd=tmp_path / "empty",
                              env=environment, capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert there("mentalglm", "--version").strip() == f"mentalglm-jax {project()['version']}"
    assert there("probes", "--version").strip().endswith(f"mentalglm-jax {project()['version']}")
    assert "Example" in there("mentalglm", "run", "--help") and "backend" in there("mentalglm", "doctor", "--json")
    program = """
import importlib.metadata, pathlib, sys
import mentalglm_jax as mg, probes
from mentalglm_jax.data.explain.review import render_form
from mentalglm_jax.data.records import Record
from mentalglm_jax.evaluate import evaluate
from mentalglm_jax.evaluate.published import published
from mentalglm_jax.evaluate.report import render
from mentalglm_jax.text.tokenizer import BUILTIN
from probes.report.page import write_report
for package in (mg, probes):
    home = pathlib.Path(package.__file__).parent
    assert str(home).startswith(sys.prefix), home
    assert (home / "py.typed").is_file() and (home / "__init__.pyi").is_file()
assert mg.__version__ == importlib.metadata.version("mentalglm-jax")
record = Record("a", "suicide_risk", "en", "A post.", "Which?", label="low", explanation="A reason.")
assert mg.GlmTokenizer.load(BUILTIN).encode("words") and published() and "A post." in render_form([record], "en")
assert (pathlib.Path(probes.__file__).parent / "report" / "templates" / "report.html").is_file()
"""
    there("python", "-P", "-c", program)
    checked = subprocess.run([*pip, "--python", python, "check"], capture_output=True, text=True, check=False)
    assert not [line for line in checked.stdout.splitlines() if line.startswith("mentalglm")], checked.stdout
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"{package}/{file}" for package in PACKAGES for file in ("py.typed", "__init__.pyi")} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_commands_exist():
    for script, target in project()["scripts"].items():
        module, function = target.split(":")
        run(sys.executable, "-c", f"import {module} as m; assert callable(m.{function}), {script!r}")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_recipe_starts_with_its_usage(path):
    """The comment on top of a recipe holds the command that runs it."""
    head = "".join(itertools.takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines(True)))
    assert re.search(rf"mentalglm (run|train|plan) configs/{re.escape(path.name)}", head), head
    assert isinstance(yaml.safe_load(path.read_text("utf-8")), dict)


def test_pre_commit_hooks_need_no_network():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}


# ---- make ------------------------------------------------------------------------------------------------------------


def make(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make` in a directory that has only the Makefile, so that nothing can be installed by mistake."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (directory / name).write_bytes((ROOT / name).read_bytes())
    # Under `make test` this is a make inside a make, which would print the directories it enters.
    outer = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *arguments], cwd=directory, env=outer, capture_output=True, text=True, check=False)


def fake_python(directory: Path, version: str) -> Path:
    """An executable that says it is an old Python."""
    path = directory / "python"
    path.write_text(f'#!/bin/sh\n[ "$1" = -V ] && echo "Python {version}" && exit 0\nexit 1\n', "utf-8")
    path.chmod(0o755)
    return path


def test_make_refuses_an_old_python_in_one_line(tmp_path):
    result = make(tmp_path, "demo", f"PYTHON={fake_python(tmp_path, '3.9.18')}")
    assert result.returncode != 0
    assert "Python 3.11 or newer is needed" in result.stderr and "is Python 3.9.18" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_names_a_python_it_can_not_find(tmp_path):
    result = make(tmp_path, "test", "PYTHON=no-such-python")
    assert result.returncode != 0
    assert "no-such-python not found" in result.stderr


def test_make_help_lists_every_target(tmp_path):
    result = make(tmp_path, "help")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert {line.split()[1] for line in result.stdout.splitlines()} == set(phony.split())


def test_ci_runs_exactly_what_a_newcomer_runs():
    lines = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert [line for line in lines if line.startswith("make ") and "--version" not in line] == ["make test"]
