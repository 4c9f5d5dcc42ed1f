"""Who may import whom: the wall between the two packages, the order of rooms inside one, and no work at import.

The first half reads the source (also imports inside functions, which no run is sure to reach). The second half imports
every module in a child process where the other side's packages are absent, and a slow test does it in two environments
that really lack them.
"""

import ast
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TORCH_SIDE = {"torch", "transformers", "peft", "captum", "accelerate", "bitsandbytes", "probes"}
JAX_SIDE = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "mentalglm_jax"}
FORBIDDEN = {"mentalglm_jax": TORCH_SIDE, "probes": JAX_SIDE}
# The same by distribution name; our own two packages come in one distribution.
OTHER_DISTRIBUTIONS = {p: names - set(FORBIDDEN) | {"orbax_checkpoint"} for p, names in FORBIDDEN.items()}
OTHER_DISTRIBUTIONS["mentalglm_jax"] -= {"orbax_checkpoint"}

# Modules behind an extra of their own, imported by the function that needs them.
OPTIONAL = {"fastapi": "serve", "gguf": "gguf", "h11": "serve", "optuna": "sweep", "starlette": "serve",
            "uvicorn": "serve", "wandb": "track"}  # fmt: skip


@cache
def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file of every module of `package`; a package's `__init__` goes by the package's name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def all_modules() -> dict[str, Path]:
    return modules("mentalglm_jax") | modules("probes")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


@pytest.fixture(scope="module", autouse=True)
def trees() -> Iterator[None]:
    """A million objects, which no test of another file is to carry along."""
    yield
    tree.cache_clear()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def walk(node: ast.AST, runtime_only: bool, import_time_only: bool) -> Iterator[ast.AST]:
    """Like `ast.walk`, without `if TYPE_CHECKING` blocks and, when `import_time_only`, without function bodies."""
    for child in ast.iter_child_nodes(node):
        if runtime_only and is_type_checking(child):
            yield from (n for branch in child.orelse for n in walk(branch, runtime_only, import_time_only))
            continue
        if import_time_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from walk(child, runtime_only, import_time_only)


@cache
def imports(
    name: str, path: Path, *, runtime_only: bool = False, import_time_only: bool = False
) -> tuple[tuple[str, int], ...]:
    """(dotted name, line) of everything that the module imports, by statement or by `import_module("...")`."""
    return tuple(_imports(name, path, runtime_only, import_time_only))


def _imports(name: str, path: Path, runtime_only: bool, import_time_only: bool) -> Iterator[tuple[str, int]]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in walk(tree(path), runtime_only, import_time_only):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([node.module] if node.module else [])])
            full = {name if (name := f"{base}.{alias.name}") in all_modules() else base for alias in node.names}
            yield from ((name, node.lineno) for name in sorted(full))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


def lint_imports(config: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`lint-imports`, which imports the packages found from `cwd`."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    environment = {**os.environ, "PYTHONPATH": str(cwd)}
    return subprocess.run(
        [*command, "--no-cache", str(config)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_imports_only_go_down_and_never_over_the_wall():
    result = lint_imports(ROOT / "pyproject.toml", ROOT)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "4 kept, 0 broken" in result.stdout


def test_no_contract_looks_away():
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]:
        assert not {"ignore_imports", "unmatched_ignore_imports_alerting", "exhaustive_ignores"} & set(contract)


def copied(directory: Path) -> Path:
    """Both packages and their contracts, to be broken."""
    for package in FORBIDDEN:
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    return Path(shutil.copy(ROOT / "pyproject.toml", directory))


def test_wrong_imports_are_seen(tmp_path):
    """One of each kind, inside functions; all at once, for each is named."""
    config = copied(tmp_path)
    for file, line in {
        "mentalglm_jax/text/tasks.py": "import mentalglm_jax.train.step",
        "probes/records.py": "from probes.report import display",
        "probes/stats.py": "import jax",
        "mentalglm_jax/files.py": "from torch import nn",
    }.items():
        with (tmp_path / file).open("a") as source:
            source.write(f"def wrong():\n    {line}\n")
    result = lint_imports(config, tmp_path)
    assert result.returncode != 0 and "0 kept, 4 broken" in result.stdout, result.stdout[-3000:]
    for found in ("mentalglm_jax.text.tasks -> mentalglm_jax.train.step", "probes.records -> probes.report.display",
                  "probes.stats -> jax", "mentalglm_jax.files -> torch"):  # fmt: skip
        assert found in result.stdout, result.stdout[-3000:]


def test_a_folder_without_a_place_is_seen(tmp_path):
    config = copied(tmp_path)
    (tmp_path / "mentalglm_jax" / "attic").mkdir()
    (tmp_path / "mentalglm_jax" / "attic" / "__init__.py").touch()
    result = lint_imports(config, tmp_path)
    assert result.returncode != 0 and "attic" in result.stdout, result.stdout[-3000:]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_import_cycle(package):
    """Over all imports, those inside functions and those for type checkers included."""
    graph = {
        name: {imported for imported, _ in imports(name, path) if imported in modules(package) and imported != name}
        for name, path in modules(package).items()
    }
    done, stack = set(), []

    def visit(name: str) -> None:
        assert name not in stack, "import cycle: " + " -> ".join([*stack[stack.index(name) :], name])
        if name not in done:
            stack.append(name)
            for imported in sorted(graph[name]):
                visit(imported)
            done.add(stack.pop())

    for name in graph:
        visit(name)


def test_nothing_runs_code_that_comes_with_a_checkpoint():
    faults = [
        f"{path.relative_to(ROOT)}:{node.value.lineno}"
        for path in all_modules().values()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.keyword)
        and node.arg == "trust_remote_code"
        and not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]
    assert not faults, faults


# Run in a child process. Filters what the import system can find, so that a blocked package is exactly as absent as one
# that was never installed: `import` raises ModuleNotFoundError, `find_spec` returns None, `importlib.metadata` knows no
# such distribution.
IMPORT_ALL = """
import importlib, json, logging, os, signal, sys, threading, warnings

blocked, first, ours = (json.loads(a) for a in sys.argv[1:])

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in blocked else self.finder.find_spec(name, path, target)
    def find_distributions(self, context=None):
        find = getattr(self.finder, "find_distributions", None)
        found = (find(context) if context is not None else find()) if find else ()
        return (d for d in found if d.name == "mentalglm-jax" or d.name.replace("-", "_") not in blocked)
    def invalidate_caches(self):
        getattr(self.finder, "invalidate_caches", lambda: None)()

sys.meta_path[:] = [Without(f) for f in sys.meta_path]
warnings.simplefilter("error")

def state():
    # what an import must leave as it found it
    return {
        **{f"environment variable {k}": v for k, v in os.environ.items()},
        "log handlers": [repr(h) for h in logging.getLogger().handlers],
        "log level": logging.getLogger().level,
        "signals": [repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "threads": sorted(t.name for t in threading.enumerate()),
        "directory": os.getcwd(),
    }

for name in first:  # third parties' own side effects are not ours
    importlib.import_module(name)
before = state()
for name in ours:
    importlib.import_module(name)
after = state()
said = {"environment variable TPU_WORKER_HOSTNAMES", "environment variable TPU_ACCELERATOR_TYPE"}  # quiet_off_tpu()
changed = sorted(k for k in {**before, **after} if before.get(k) != after.get(k) and k not in said)
assert not changed, f"importing the package changed: {changed}"
present = sorted(b for b in blocked if b in sys.modules)
assert not present, present
if "jax" in sys.modules:
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized(), "a JAX device was initialised at import"
if "torch" in sys.modules:
    assert not sys.modules["torch"].cuda.is_initialized(), "CUDA was initialised at import"
"""


def third_party(package: str) -> list[str]:
    """Modules of other projects that `package` imports anywhere, as written, without those of its optional extras."""
    own = set(sys.stdlib_module_names) | set(FORBIDDEN) | set(OPTIONAL)
    names = {i for name, path in modules(package).items() for i, _ in imports(name, path, runtime_only=True)}
    return sorted(name for name in names if name.split(".")[0] not in own)


def import_all(python: str | Path, package: str, blocked: set[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Import every module of `package` with `python`, without the modules named in `blocked`."""
    ours = [name for name in modules(package) if not name.endswith("__main__")]
    arguments = [json.dumps(a) for a in (sorted(blocked), third_party(package), ours)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [python, "-c", IMPORT_ALL, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_without_the_other_side_and_without_work(package):
    absent = [name for name in third_party(package) if importlib.util.find_spec(name.split(".")[0]) is None]
    if absent:
        pytest.skip(f"an environment without {absent}: install the extras [probes,dev]")
    result = import_all(sys.executable, package, FORBIDDEN[package], ROOT)
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_filter_makes_packages_absent():
    """The test above would prove nothing if the filter let things through."""
    probe = textwrap.dedent("""
        import importlib.util, importlib.metadata
        assert importlib.util.find_spec("numpy") is None
        assert importlib.util.find_spec("json") is not None
        assert "numpy" not in {d.name for d in importlib.metadata.distributions()}
        try:
            import numpy
        except ModuleNotFoundError:
            pass
        else:
            raise SystemExit("numpy was imported")
    """)
    arguments = [json.dumps(a) for a in (["numpy"], [], [])]
    command = [sys.executable, "-c", IMPORT_ALL + probe, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


# ---- which packages the two sides need -------------------------------------------------------------------------------


@pytest.mark.parametrize("module", OPTIONAL)
def test_an_optional_module_is_imported_only_where_it_is_asked_for(module):
    extra = project()["optional-dependencies"][OPTIONAL[module]]
    assert module in {canonicalize_name(Requirement(r).name) for r in extra}
    at_import = {i for name, path in all_modules().items() for i, _ in imports(name, path, import_time_only=True)}
    assert module not in {name.split(".")[0] for name in at_import}


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def declared(package: str) -> list[str]:
    """Requirements of an environment for `package` alone, with the extras its code knows."""
    extras = project()["optional-dependencies"]
    return [*project()["dependencies"], *extras["data"]] if package == "mentalglm_jax" else extras["probes"]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_dependencies_are_what_is_imported(package):
    """Nothing imported that is not declared for this side alone, nothing declared that is not imported."""
    wanted = {canonicalize_name(Requirement(r).name) for r in declared(package)}
    providers = importlib.metadata.packages_distributions()
    undeclared, used = [], set()
    for module in third_party(package):
        top = module.split(".")[0]
        distributions = {canonicalize_name(d) for d in providers.get(top, [top])}
        used |= distributions
        if not wanted & distributions:
            undeclared.append(module)
    assert not undeclared, f"{package} imports {undeclared}, which pyproject.toml does not list for it"
    assert not wanted - used, f"pyproject.toml lists {wanted - used} for {package}, which it does not import"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_dependency_reaches_over_the_wall(package):
    names = {canonicalize_name(Requirement(r).name).replace("-", "_") for r in declared(package)}
    assert not names & OTHER_DISTRIBUTIONS[package]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("package", FORBIDDEN)
def test_works_in_an_environment_of_its_own(package, tmp_path):
    """A fresh environment with only this side's packages and the wheel, built by way of the source archive as a release
    is: what a TPU host, or a probes user, may have."""

    def pip(*arguments: str) -> None:
        command = [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]

    def there(*command: str | Path) -> None:
        (tmp_path / "empty").mkdir(exist_ok=True)
        result = subprocess.run(command, cwd=tmp_path / "empty", capture_output=True, text=True, check=False)
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]

    there(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = str(tmp_path / "env" / "bin" / "python")
    pip(*declared(package))
    pip("--no-deps", str(wheel))
    installed = subprocess.run(
        [python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True
    ).stdout.lower()
    present = {line.split("==")[0].replace("-", "_") for line in installed.splitlines()}
    assert not present & OTHER_DISTRIBUTIONS[package]
    result = import_all(python, package, set(), tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    there(tmp_path / "env" / "bin" / {"mentalglm_jax": "mentalglm", "probes": "probes"}[package], "--help")
    if package == "probes":
        there(tmp_path / "env" / "bin" / "probes", "demo")
        assert (tmp_path / "empty" / "probes-demo" / "report.html").is_file()
