"""What makes the tests quick is in force: bytecode and compiled programs are found again, by child processes too."""

import gc
import os
import subprocess
import sys
from importlib.util import cache_from_source

import jax
import jaxtyping._import_hook
import torch

import mentalglm_jax.files
from tests.conftest import HEAVY, ROOT

COMPILE = """
import jax, os, sys
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
jax.jit(lambda x: x * float(sys.argv[1]) + 1)(1.0)
print(sum("cache_hits" in event for event in hits), sum("cache_misses" in event for event in hits))
"""


def test_compiled_programs_are_kept_for_child_processes(monkeypatch, tmp_path):
    def child() -> list[int]:
        done = subprocess.run([sys.executable, "-c", COMPILE, "3"], capture_output=True, text=True, check=True)
        assert not done.stderr
        return [int(number) for number in done.stdout.split()]

    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    hits, misses = child()
    assert not hits and misses
    assert child() == [misses, 0]


def test_searches_for_garbage_are_rare_and_leave_out_what_is_imported():
    assert gc.isenabled() and gc.get_freeze_count() > 100_000 and gc.get_threshold()[0] >= 10_000


def test_bytecode_is_written_here_and_by_child_processes():
    assert not sys.dont_write_bytecode and "PYTHONDONTWRITEBYTECODE" not in os.environ


def test_this_process_keeps_them_too():
    assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.0
    assert jax.config.jax_persistent_cache_min_entry_size_bytes == -1


def test_only_our_bytecode_is_under_another_name():
    name = jaxtyping._import_hook._optimized_cache_from_source
    assert name("0", torch.__file__) == cache_from_source(torch.__file__)
    assert name("0", mentalglm_jax.files.__file__) != cache_from_source(mentalglm_jax.files.__file__)


def test_heavy_files_exist_and_stand_once():
    assert len(HEAVY) == len(set(HEAVY)) and all((ROOT / "tests" / name).is_file() for name in HEAVY)
