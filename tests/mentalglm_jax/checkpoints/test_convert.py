"""Conversions that never build the model: Orbax in and out, what goes along, what is refused, and the command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from mentalglm_jax.checkpoints import directories as checkpoints
from mentalglm_jax.checkpoints import orbax_files
from mentalglm_jax.checkpoints.directories import convert, load, save_pretrained
from mentalglm_jax.checkpoints.hf_files import Checkpoint
from mentalglm_jax.checkpoints.reopened import reopen_with_transformers
from mentalglm_jax.checkpoints.weights import generation_config
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.model.glm import Glm, GlmConfig

ROOT = Path(__file__).parents[3]
SIZES = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": (1, 2, 3), "pad_token_id": 0,
         "initializer_range": 0.2, "max_position_embeddings": 4096}  # fmt: skip


def model(dtype=jnp.float32, **changes) -> Glm:
    return Glm(GlmConfig(**{**SIZES, **changes}), rngs=nnx.Rngs(0), param_dtype=dtype)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A native directory in bfloat16."""
    directory = tmp_path_factory.mktemp("native") / "model"
    save_pretrained(model(jnp.bfloat16), directory)
    return directory


@pytest.fixture(scope="module")
def tree(native, tmp_path_factory):
    """The same in Orbax form."""
    directory = tmp_path_factory.mktemp("orbax") / "model"
    convert(native, directory, "orbax")
    return directory


@pytest.fixture
def copy(tree, tmp_path):
    """A copy of the Orbax directory that a test may damage."""
    return Path(shutil.copytree(tree, tmp_path / "copy"))


def weights(directory: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint(directory)
    return {name: checkpoint.read(name).tobytes() for name in checkpoint.tensors}


def same_tree(one: Glm, other: Glm) -> None:
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(module))) for module in (one, other))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype
        np.testing.assert_array_equal(leaf[...], theirs[path][...], err_msg=str(path))


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (jnp.bfloat16, {}),
        (jnp.float32, {"sandwich_norm": True}),
        (jnp.bfloat16, {"attention_bias": False, "partial_rotary_factor": 1.0, "tie_word_embeddings": True}),
        (jnp.bfloat16, {"num_hidden_layers": 16, "hidden_size": 4, "head_dim": 4}),  # more layers than arrays
    ],
    ids=["glm", "glm4", "edge-tied", "deep"],
)
def test_orbax_and_back_keeps_every_bit(tmp_path, monkeypatch, dtype, changes):
    monkeypatch.setattr(orbax_files, "CHUNK_BYTES", 900)  # several chunks in every matrix, rows that do not divide
    monkeypatch.setattr(checkpoints, "CHUNK_BYTES", 700)
    save_pretrained(model(dtype, **changes), tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "orbax")
    convert(tmp_path / "b", tmp_path / "c")
    assert weights(tmp_path / "c") == weights(tmp_path / "a")
    assert (tmp_path / "c" / "config.json").read_text() == (tmp_path / "a" / "config.json").read_text()
    if dtype == jnp.bfloat16 and "hidden_size" not in changes:
        same_tree(load(tmp_path / "b", dtype=dtype), load(tmp_path / "a", dtype=dtype))


def test_orbax_and_chatglm(native, tree, tmp_path):
    convert(tree, tmp_path / "old", "chatglm")
    convert(tmp_path / "old", tmp_path / "tree", "orbax")
    convert(tmp_path / "tree", tmp_path / "new")
    assert weights(tmp_path / "new") == weights(native)


def test_orbax_restores_the_tree_without_us(native, tree):
    """And what Orbax itself saves (in its own storage format) is read by us."""
    state = nnx.to_pure_dict(nnx.state(load(native, dtype="bfloat16"), nnx.Param))
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tree / "params", jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_a_tree_that_orbax_saved_itself_is_read(native, tree, tmp_path):
    state = nnx.to_pure_dict(nnx.state(load(native, dtype="bfloat16"), nnx.Param))
    (tmp_path / "own").mkdir()
    shutil.copy(tree / "config.json", tmp_path / "own")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "own" / "params", state)
    assert (tmp_path / "own" / "params" / "manifest.ocdbt").exists()
    convert(tmp_path / "own", tmp_path / "out")
    assert weights(tmp_path / "out") == weights(native)
    same_tree(load(tmp_path / "own", dtype="bfloat16"), load(native, dtype="bfloat16"))


def lost_chunk(directory: Path) -> None:
    (directory / "params" / "layers.mlp.down_proj.kernel" / "1.0.0").unlink()


def short_chunk(directory: Path) -> None:
    path = directory / "params" / "layers.mlp.down_proj.kernel" / "1.0.0"
    path.write_bytes(path.read_bytes()[:-3])


def nan_chunk(directory: Path) -> None:
    path = directory / "params" / "layers.mlp.down_proj.kernel" / "1.0.0"
    path.write_bytes(b"\xff" * path.stat().st_size)


def linked_chunk(directory: Path) -> None:
    path = directory / "params" / "norm.weight" / "0"
    path.rename(directory.parent / "elsewhere")
    path.symlink_to(directory.parent / "elsewhere")


def shape(directory: Path) -> None:
    path = directory / "params" / "norm.weight" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": [17]}))


def layers(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))


ORBAX_FAULTS = {
    "a chunk is lost": (lost_chunk, r"cannot read parameter layers\.mlp\.down_proj\.kernel"),
    "a chunk is cut": (short_chunk, r"cannot read parameter layers\.mlp\.down_proj\.kernel"),
    "NaN": (nan_chunk, r"NaN or infinity.*layers\.mlp\.down_proj"),
    "a link": (linked_chunk, "is a link; put the file itself there"),
    "an array is lost": (lambda d: shutil.rmtree(d / "params" / "norm.weight"), "not a readable Orbax checkpoint"),
    "no tree": (lambda d: (d / "params" / "_METADATA").unlink(), "_METADATA: missing or unreadable"),
    "the tree is not JSON": (lambda d: (d / "params" / "_METADATA").write_text("{"), "_METADATA: not JSON"),
    "shape": (shape, r"norm\.weight \[17\] instead of \[16\]"),
    "layers": (layers, r"wrong shape: .* \[3, .* instead of \[2, "),
}


@pytest.mark.parametrize("fault", ORBAX_FAULTS)
def test_a_damaged_tree_is_refused_in_one_line(copy, fault, tmp_path):
    damage, message = ORBAX_FAULTS[fault]
    damage(copy)
    for refused in (lambda: load(copy), lambda: convert(copy, tmp_path / "out")):
        with pytest.raises(InputError, match=message) as caught:
            refused()
        assert "\n" not in str(caught.value)
        assert str(copy) in str(caught.value)
    assert not (tmp_path / "out").exists()


# ---- what goes along ----


@pytest.mark.parametrize(
    ("own", "stated", "expected"),
    [
        ((151329, 151336, 151338), {}, [151329, 151336, 151338]),
        ((151329,), {}, [151329, 151336, 151338]),  # who tuned the model decides which one ends a turn
        ((151336,), {"eos_token_id": 5}, [151336, 5, 151329, 151338]),
        ((1, 2), {"eos_token_id": [2, 9]}, [1, 2, 9]),
    ],
)
def test_every_token_that_may_end_an_answer_is_written(own, stated, expected):
    written = generation_config(GlmConfig(eos_token_id=own), stated | {"temperature": 0.8})
    assert written["eos_token_id"] == expected
    assert (written["temperature"], written["pad_token_id"]) == (0.8, 151329)


@pytest.mark.parametrize("eos", ["7", [1.5], {"a": 1}, [None]])
def test_eos_that_are_no_tokens_are_refused(native, tmp_path, eos):
    shutil.copytree(native, tmp_path / "in")
    (tmp_path / "in" / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id must be integers from 0 to 2"):
        convert(tmp_path / "in", tmp_path / "out")


def test_nan_is_refused_before_anything_is_replaced(tmp_path):
    broken = model()
    kernel = broken.layers.mlp.down_proj.kernel
    kernel.set_value(kernel[...].at[2, 3, 5].set(-jnp.inf))
    save_pretrained(broken, tmp_path / "in")
    with pytest.raises(InputError, match=r"NaN or infinity in model\.layers\.2\.mlp\.down_proj\.weight"):
        convert(tmp_path / "in", tmp_path / "out", "orbax")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@hypothesis.given(st.binary(min_size=4, max_size=64), st.sampled_from([np.float32, jnp.bfloat16, np.float16]))
def test_the_fast_look_at_exponents_is_isfinite(data, dtype):
    value = np.frombuffer(data[: len(data) // 4 * 4], dtype)
    assert checkpoints._finite(value) == bool(np.isfinite(value.astype(np.float32)).all())


# ---- interrupted ----


@pytest.mark.parametrize("layout", ["glm", "orbax"])
def test_an_interrupted_conversion_leaves_what_was_there(native, tmp_path, monkeypatch, layout):
    convert(native, tmp_path / "out", layout)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    calls = []

    def read(self, name, *index, original=Checkpoint.read):
        calls.append(name)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return original(self, name, *index)

    monkeypatch.setattr(Checkpoint, "read", read)
    with pytest.raises(KeyboardInterrupt):
        convert(native, tmp_path / "out", layout)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_check_that_fails_keeps_the_old_directory(native, tmp_path):
    convert(native, tmp_path / "out")

    def refuse(directory: Path) -> bool:
        assert (directory / "model.safetensors").exists()
        raise RunError("no")

    with pytest.raises(RunError, match="no"):
        convert(native, tmp_path / "out", "chatglm", check=refuse)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "glm"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- the command ----


def command(*arguments: object, limit: int = 1 << 40) -> subprocess.CompletedProcess[str]:
    """``mentalglm convert`` in a process that may write files of ``limit`` bytes at most; it keeps no bytecode, which
    Python would cut short without a word and trip over later."""
    program = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (int(sys.argv[1]),)); "
    program += "os.execv(sys.executable, [sys.executable, '-m', 'mentalglm_jax', 'convert', *sys.argv[2:]])"
    return subprocess.run(
        [sys.executable, "-c", program, str(limit), *map(str, arguments)], capture_output=True, text=True,
        check=False, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["glm", "orbax"])
def test_a_full_disk_gives_one_line(native, tmp_path, layout):
    """A limit on the size of files stands in for the full disk: the system refuses a write in the middle."""
    result = command(native, tmp_path / "out", "--to", layout, limit=700)
    assert result.returncode == 1, result.stderr
    assert result.stderr.count("\n") == 1
    assert "cannot write" in result.stderr
    assert "unchanged" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_has_transformers_open_the_result(native, tmp_path):
    result = command(native, tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {
        "out": str(tmp_path / "out"), "layout": "glm", "opened_with_transformers": True
    }  # fmt: skip
    assert weights(tmp_path / "out") == weights(native)


@pytest.mark.slow
def test_what_transformers_does_not_open_is_not_kept(native, tmp_path):
    """Here a padding id outside the vocabulary, which no rule of ours forbids."""
    shutil.copytree(native, tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 999}))
    with pytest.raises(RunError, match=r"does not open in transformers.*Padding_idx"):
        convert(tmp_path / "in", tmp_path / "out", check=reopen_with_transformers)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.slow
def test_the_benchmark_at_its_small_size(tmp_path):
    """chatglm -> glm -> Orbax -> glm by the command, every tensor compared by a table of its own."""
    result = subprocess.run(
        [sys.executable, "benchmarks/convert.py", "--json", "--dir", str(tmp_path)], capture_output=True, text=True,
        check=False, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["identical_tensors"] == found["tensors"] == 36
    assert found["peak_gib"] <= 3
    assert not list(tmp_path.iterdir())
