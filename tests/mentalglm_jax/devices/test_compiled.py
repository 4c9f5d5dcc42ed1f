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
        [sys.executable, "-P", "-c", _WORK], capture_output=True, text=True, timeout=120, check=True,
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


@pytest.fixture
def settings():
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size",
             "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")  # fmt: skip
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_the_place_is_a_recipe_key(tmp_path: Path, settings: None) -> None:
    compiled.keep_in("auto")
    assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"]
    compiled.keep_in(str(tmp_path / "kept"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "kept")
    jax.jit(lambda x: x * 3.25 + 0.125)(jax.numpy.ones(7)).block_until_ready()
    assert list((tmp_path / "kept").glob("*-cache"))
    assert compiled.described().endswith(f"MiB, in {tmp_path / 'kept'}")
    compiled.keep_in("off")
    assert jax.config.jax_compilation_cache_dir is None
    assert compiled.described() == "not kept"
    compiled.keep_in("gs://bucket/programs")
    assert jax.config.jax_compilation_cache_dir == "gs://bucket/programs"
    assert load_recipe(ROOT / "configs" / "demo.yaml", ["compile_cache=off"]).compile_cache == "off"


def test_a_place_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^compile_cache: .*file/x: Not a directory; choose another"):
        compiled.keep_in(str(tmp_path / "file" / "x"))
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(InputError, match=r"compile_cache: .*shared can be written by other users"):
        compiled.keep_in(str(tmp_path / "shared"))


def test_a_directory_that_is_named_already_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment = {"JAX_COMPILATION_CACHE_DIR": "/theirs"}
    compiled.keep_from_start(environment)
    assert environment == {"JAX_COMPILATION_CACHE_DIR": "/theirs"}
    assert not list(tmp_path.iterdir())
