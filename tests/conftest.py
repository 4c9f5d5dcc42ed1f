"""Settings of every test: on the CPU, offline, seeded, one thread pool per worker sized to its share of the cores,
compiled programs kept.

The environment is set at import, before JAX or torch is, and child processes inherit it. The one JAX device of a CPU is
left as it is; a test that needs eight fake ones starts a child process with its own XLA_FLAGS.
"""

import os
import random
import shutil
import signal
import sys
from importlib.util import cache_from_source
from pathlib import Path

import hypothesis
import jaxtyping._import_hook
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch picks a GPU on its own otherwise
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails at once, also where there is one
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its thread pool does not survive the fork of a data worker
os.environ["NO_COLOR"] = "1"  # what commands print must not depend on the terminal the tests run in
os.environ["COLUMNS"] = "160"
os.environ.pop("FORCE_COLOR", None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts its background jobs; tests interrupt runs
    signal.signal(signal.SIGINT, signal.default_int_handler)
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

# What JAX compiles is kept on disk, for all workers, child processes and later runs: a training step takes seconds to
# compile and milliseconds to run. `pytest --cache-clear` and `make clean` empty it.
COMPILED = ROOT / ".pytest_cache" / "d" / "compiled"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
if "PYTEST_XDIST_WORKER" not in os.environ and sum(f.stat().st_size for f in COMPILED.glob("*")) > 1 << 30:
    shutil.rmtree(COMPILED)  # programs of many commits: begin anew

# The import hook that checks shapes and types gives the modules it changes bytecode files of their own. It does so for
# everything imported meanwhile, so that JAX and torch would be compiled from source whenever our modules import them.
_renamed = jaxtyping._import_hook._optimized_cache_from_source
_OURS = tuple(f"{ROOT / package}{os.sep}" for package in ("mentalglm_jax", "probes"))


def _bytecode_file(typechecker: str, /, path: str, debug_override: None = None) -> str:
    return _renamed(typechecker, path) if path.startswith(_OURS) else cache_from_source(path)


jaxtyping._import_hook._optimized_cache_from_source = _bytecode_file

# No deadline: the first example of a property may compile. Derandomised: the same commit gives the same answer on every
# machine; `pytest --hypothesis-profile explore` searches on.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same state of the global generators, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what the chosen platform can not run, so that plain `pytest` works everywhere."""
    platforms = os.environ["JAX_PLATFORMS"]
    for item in items:
        for marker, names in (("gpu", ("cuda", "gpu")), ("tpu", ("tpu",))):
            if item.get_closest_marker(marker) and not any(name in platforms for name in names):
                item.add_marker(pytest.mark.skip(reason=f"needs JAX_PLATFORMS={names[0]} and the device"))
