"""Compiled programs are kept from one start to the next, where only their owner can put any."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mentalglm_jax.devices import compiled
from mentalglm_jax.errors import InputError
from mentalglm_jax.train.recipe import load_recipe

ROOT = Path(__file__).parents[3]
# What a command does first, then work of many small programs and a larger one. It prints how many were compiled.
_WORK = """
import os
from mentalglm_jax.devices.compiled import keep_from_start
keep_from_start(os.environ)
import jax, jax.monitoring, jax.numpy as jnp
missed = []
def listen(event, **_):
    if event.endswith("cache_misses"):
        missed.append(event)
jax.monitoring.register_event_listener(listen)
x = jnp.arange(12.0).reshape(3, 4) / 7 - jnp.ones(4)
jax.jit(jax.grad(lambda x: jnp.tanh(x @ x.T).sum()))(x).block_until_ready()
print(len(missed))
"""


def _start(home: Path, **environment: str) -> tuple[int, str]:
    inherited = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _WORK], capture_output=True, text=True, timeout=600, check=True,
        env={**inherited, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(home), **environment},
    )  # fmt: skip
    return int(done.stdout), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
def test_the_second_start_compiles_nothing(tmp_path: Path) -> None:
    first, _ = _start(tmp_path)
    assert first > 3
    (directory,) = (tmp_path / "mentalglm-jax" / "compiled").iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert _start(tmp_path) == (0, "")
    directory.chmod(0o770)  # others may have put a program there
    found, said = _start(tmp_path)
    assert "can be written by other users, whose programs would be run here (chmod go-w)" in said
    assert found == 0  # nothing was kept, so nothing was missed


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root gives a directory away")
@pytest.mark.parametrize("above", ["mentalglm-jax", "mentalglm-jax/compiled", "mentalglm-jax/compiled/cpu"])
def test_who_owns_a_directory_above_may_put_another_there(tmp_path: Path, above: str) -> None:
    directory = tmp_path / "mentalglm-jax" / "compiled" / "cpu"
    compiled._make_private(directory)
    os.chown(tmp_path / above, 4242, -1)
    with pytest.raises(InputError, match=f"{above} belongs to another user, whose programs would be run here"):
        compiled._make_private(directory)


@pytest.fixture
def settings():
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size",
             "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")  # fmt: skip
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_off_keeps_nothing(settings: None) -> None:
    assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert load_recipe(ROOT / "configs" / "demo.yaml", ["compile_cache=off"]).compile_cache == "off"
    compiled.keep_nothing()
    assert jax.config.jax_compilation_cache_dir is None
    assert compiled.described() == "not kept"


@pytest.mark.parametrize("place", ["cache", "/tmp/cache", "gs://bucket/programs", "file:///tmp/x", "~"])
def test_a_recipe_names_no_place_of_programs(place: str) -> None:
    """They are machine code: a recipe that came with a directory of them, or an address, would run it."""
    with pytest.raises(InputError, match="compile_cache: Input should be 'auto' or 'off'"):
        load_recipe(ROOT / "configs" / "demo.yaml", [f"compile_cache={place}"])


def test_a_directory_that_is_named_already_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment = {"JAX_COMPILATION_CACHE_DIR": "/theirs"}
    compiled.keep_from_start(environment)
    assert environment == {"JAX_COMPILATION_CACHE_DIR": "/theirs"}
    assert not list(tmp_path.iterdir())
