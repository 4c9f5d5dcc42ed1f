"""Settings of every test: on the CPU, offline, seeded, on one thread, compiled programs kept; which files are heavy.

The environment is set at import, before JAX or torch is, and child processes inherit it. The one JAX device of a CPU is
left as it is; a test that needs eight fake ones starts a child process with its own XLA_FLAGS.
"""

import gc
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping._import_hook
import numpy as np
import pytest

from tests.checked import checked

ROOT = Path(__file__).parents[1]

gc.disable()  # until everything is imported, see `pytest_collection`

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
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: threads would only wait for each other
if os.environ["JAX_PLATFORMS"] == "cpu":
    # The same operations from code generators that take a third of the time; `make test-all` runs the usual ones.
    # A flag that XLA does not know ends the process: since jaxlib 0.11 there are fusion emitters alone.
    flags = ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"]
    old = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
    os.environ.setdefault("XLA_FLAGS", " ".join(flags if old else flags[:1]))

# Bytecode is kept, whatever the shell says: each of a hundred child processes would compile our sources anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# What JAX compiles is kept on disk, for all workers, child processes and later runs: a training step takes seconds to
# compile and milliseconds to run. `pytest --cache-clear` and `make clean` empty it.
COMPILED = ROOT / ".pytest_cache" / "d" / "compiled"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Two workers may meet at one program, and JAX does not write it in one step: who reads half of it compiles it again.
UNFINISHED = "ignore:Error reading persistent compilation cache entry"
os.environ["PYTHONWARNINGS"] = UNFINISHED
if "PYTEST_XDIST_WORKER" not in os.environ and sum(f.stat().st_size for f in COMPILED.glob("*")) > 1 << 30:
    shutil.rmtree(COMPILED)  # programs of many commits: begin anew

# The import hook that checks shapes and types gives the modules it changes bytecode files of their own. It does so for
# everything imported meanwhile, so that JAX and torch would be compiled from source whenever our modules import them.
_renamed = jaxtyping._import_hook._optimized_cache_from_source
_OURS = tuple(f"{ROOT / package}{os.sep}" for package in ("mentalglm_jax", "probes"))


def _bytecode_file(typechecker: str, /, path: str, debug_override: None = None) -> str:
    return _renamed(typechecker, path) if path.startswith(_OURS) else cache_from_source(path)


jaxtyping._import_hook._optimized_cache_from_source = _bytecode_file

jaxtyping.jaxtyped = checked

# Files whose tests train or compile models, or start processes: the longest first, for that is the order in which
# workers take them. `make test-quick` leaves them out, and the attacks too.
HEAVY = (
    "mentalglm_jax/pipeline/test_own_tasks.py", "mentalglm_jax/pipeline/test_own_training.py",
    "mentalglm_jax/evaluate/test_posts.py", "mentalglm_jax/evaluate/test_calibrated.py",
    "mentalglm_jax/model/test_quantize.py", "probes/saliency/test_attribute.py", "mentalglm_jax/pipeline/test_job.py",
    "mentalglm_jax/train/test_loop.py", "probes/validation/test_validate.py", "test_notebooks.py",
    "mentalglm_jax/train/test_interrupted.py", "mentalglm_jax/pipeline/test_changes.py",
    "hostile/test_swapped_state.py", "hostile/test_orbax_files.py", "hostile/test_saved_steps.py",
    "hostile/test_kept_models.py", "hostile/test_finished_answers.py", "hostile/test_over_directories.py",
    "mentalglm_jax/pipeline/test_evaluate_run.py", "mentalglm_jax/pipeline/test_sweep.py",
    "mentalglm_jax/pipeline/test_search.py",
    "mentalglm_jax/train/test_early_stopping.py", "mentalglm_jax/evaluate/test_cli.py",
    "mentalglm_jax/model/test_lora.py",
    "mentalglm_jax/checkpoints/test_adapters.py", "mentalglm_jax/checkpoints/test_relative_adapters.py",
    "mentalglm_jax/checkpoints/test_relatives.py", "mentalglm_jax/train/test_train_notebook.py", "probes/test_cli.py",
    "mentalglm_jax/serve/test_endpoint.py", "mentalglm_jax/serve/test_commands.py",
    "mentalglm_jax/inference/test_generate.py", "mentalglm_jax/inference/test_continuous.py",
    "test_project.py", "mentalglm_jax/planning/test_plan.py",
    "mentalglm_jax/pipeline/test_pod.py", "mentalglm_jax/inference/test_on_mesh.py",
    "mentalglm_jax/train/test_device_order.py",
    "mentalglm_jax/model/test_sharding.py", "mentalglm_jax/checkpoints/test_convert.py", "probes/models/test_verify.py",
    "mentalglm_jax/train/test_bad_steps.py", "mentalglm_jax/train/test_checkpoint.py",
    "mentalglm_jax/train/test_step.py", "mentalglm_jax/train/test_loss.py", "mentalglm_jax/model/test_attention.py",
    "probes/test_suite.py", "probes/test_demo.py", "test_docs.py",
    "probes/validation/test_selftest.py", "probes/report/test_page_chromium.py",
    "probes/test_stats.py", "probes/test_nulls.py", "mentalglm_jax/checkpoints/test_adapter_formats.py",
    "mentalglm_jax/checkpoints/test_weights.py", "mentalglm_jax/data/explain/test_teacher_models.py",
    "mentalglm_jax/evaluate/test_report_chromium.py", "mentalglm_jax/data/explain/test_review_chromium.py",
    "mentalglm_jax/checkpoints/test_gguf.py",
    "mentalglm_jax/text/test_chat_formats.py", "mentalglm_jax/model/test_layout.py",
    "mentalglm_jax/devices/test_distributed.py", "mentalglm_jax/test_init.py",
    "test_walls.py", "mentalglm_jax/inference/test_finish.py", "mentalglm_jax/data/test_splits.py",
    "test_command_lines.py", "mentalglm_jax/bench/test_bench.py",
    "mentalglm_jax/train/test_preference.py", "mentalglm_jax/train/test_preference_trl.py",
    "mentalglm_jax/inference/test_samples.py", "probes/test_ranking.py", "test_repair.py",
    "mentalglm_jax/pipeline/test_preference_stage.py",
    "probes/intake/test_rows.py", "probes/intake/test_answer.py", "probes/intake/test_template.py",
    "probes/models/test_merge.py",
    "probes/models/test_prefix.py", "probes/checks/test_chain.py", "probes/validation/test_chains.py",
    "probes/validation/test_leaderboard.py", "test_rationales.py", "probes/test_workers.py",
)  # fmt: skip

# No deadline: the first example of a property may compile. No complaint that examples are drawn too slowly either: a
# second in all is the limit, and a busy machine may stand still for that long. Derandomised: the same commit gives the
# same answer on every machine; `pytest --hypothesis-profile explore` searches on.
UNHURRIED: dict[str, Any] = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("default", derandomize=True, database=None, print_blob=True, **UNHURRIED)
hypothesis.settings.register_profile("explore", max_examples=1000, print_blob=True, **UNHURRIED)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same state of the global generators, and its child processes with the same filter of
    warnings, whatever ran before it: at the end of a long run the filter was gone."""
    os.environ["PYTHONWARNINGS"] = UNFINISHED
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(0)
        if torch.cuda.is_initialized():  # else `torch.manual_seed` notes the whole stack, in every test
            torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True)
def only_the_tasks_of_the_package() -> Iterator[None]:
    """Tasks that a test makes known are unknown to the next one."""
    yield
    if known := sys.modules.get("mentalglm_jax.text.tasks"):
        known.forget_added()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the heavy files and put them first; skip what the chosen platform cannot run."""
    rank = {ROOT / "tests" / name: number for number, name in enumerate(HEAVY)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    platforms = os.environ["JAX_PLATFORMS"]
    for item in items:
        if item.path in rank:
            item.add_marker(pytest.mark.heavy)
        for marker, names in (("gpu", ("cuda", "gpu")), ("tpu", ("tpu",))):
            if item.get_closest_marker(marker) and not any(name in platforms for name in names):
                item.add_marker(pytest.mark.skip(reason=f"needs JAX_PLATFORMS={names[0]} and the device"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Leave what is imported out of every later search for garbage, and search less often: a tenth of the time."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)
        gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """``hostile: 231 attacks, 231 held`` at the end of a run that had any."""
    reports = [
        (outcome, report)
        for outcome in ("passed", "failed", "error")
        for report in terminalreporter.stats.get(outcome, ())
        if getattr(report, "nodeid", "").startswith("tests/hostile/")
        and "test_harness" not in report.nodeid
        and getattr(report, "when", "call") == "call"
    ]
    if reports:
        held = sum(outcome == "passed" for outcome, _ in reports)
        terminalreporter.write_line(f"hostile: {len(reports)} attacks, {held} held")
