"""llama.cpp on what is written here: its converters, its runtime, log-probabilities beside those of transformers."""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mentalglm_jax.checkpoints.adapters import save_adapter
from mentalglm_jax.checkpoints.directories import save_pretrained
from mentalglm_jax.errors import InputError
from mentalglm_jax.model.rope import Yarn
from mentalglm_jax.text.tokenizer import BUILTIN
from tests.clients.cells import (
    BASES,
    CELLS,
    KINDS,
    LAYOUTS,
    ROUTES,
    TOKENS,
    Base,
    Cell,
    by_transformers,
    expected,
    with_adapter,
    write_base,
)
from tests.clients.llama import Llama

pytestmark = pytest.mark.timeout(1800)  # the first test waits for all conversions
CLOSE = 1e-4  # of a log-probability, at every position and token; both sides compute in float32
PLAIN = Base()


def written(cell: Cell, directory: Path, format: str) -> Path | str:
    """The directory a client gets for ``cell``, or why there is none."""
    where = directory / f"{format.replace('.', '')}-{cell.name}"
    model = with_adapter(cell.layout, cell.kind, cell.base)
    try:
        if cell.route == "merged":
            layout = "chatglm" if cell.layout == "chatglm" else "glm"
            save_pretrained(model, where, layout=layout, tokenizer=BUILTIN)
        else:
            save_adapter(model, where, format=format)
    except InputError as error:
        return str(error)
    return where


def format_of(layout: str) -> str:
    """The adapter format for llama.cpp, by the layout that its GGUF was made from."""
    return "chatglm" if layout == "chatglm" else "llama.cpp"


# Formats that do not fit: what the documentation says of them stays true, or is corrected.
MISFITS = [
    *((Cell("glm", kind, "adapter", PLAIN), "peft") for kind in ("lora", "rslora", "alphas")),
    *((Cell("glm4", kind, "adapter", PLAIN), "peft") for kind in ("lora", "rslora")),
    *((Cell(layout, "lora", "adapter", PLAIN), "vllm-split") for layout in ("glm", "glm4")),
    (Cell("chatglm", "lora", "adapter", PLAIN), "llama.cpp"),
]
YARN = ("rope_scaling", Yarn(factor=4.0, original_max_position_embeddings=128))
BARE = {
    "edge": ("glm", Base(eps=1e-5, bias=False, more=(("partial_rotary_factor", 1.0),))),
    "wide heads": ("glm", Base(more=(("head_dim", 32),))),
    "yarn glm": ("glm", Base(more=(YARN,))),
    "yarn glm4": ("glm4", Base(more=(YARN,))),
}


@pytest.fixture(scope="module")
def world(llama_cpp: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Everything written and converted, in one process of the converters."""
    directory = tmp_path_factory.mktemp("llama")
    jobs: dict[str, dict[str, str]] = {}
    refused: dict[str, str] = {}

    def job(out: str, **paths: Path) -> str:
        out = str(directory / out)
        jobs.setdefault(out, {"out": out, **{name: str(path) for name, path in paths.items()}})
        return out

    ggufs: dict[tuple[str, str], tuple[str, str | None]] = {}
    for cell, format in [*((cell, format_of(cell.layout)) for cell in CELLS), *MISFITS]:
        found = written(cell, directory, format)
        key = (cell.name, format)
        if isinstance(found, str):
            refused[cell.name] = found
        elif cell.route == "merged":
            ggufs[key] = job(f"{cell.name}.gguf", model=found), None
        else:
            base = write_base(cell.layout, cell.base, directory)
            ggufs[key] = job(f"{base.name}.gguf", model=base), job(f"{found.name}.gguf", adapter=found, base=base)
    for name, (layout, base) in BARE.items():
        ggufs[name, ""] = job(f"{name}.gguf", model=write_base(layout, base, directory)), None
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("convert.py")), str(llama_cpp / "converters")],
        input=json.dumps(list(jobs.values())), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return SimpleNamespace(directory=directory, ggufs=ggufs, refused=refused, failed=json.loads(done.stdout),
                           llama=Llama(llama_cpp / "runtime"))  # fmt: skip


def compared(world: SimpleNamespace, key: tuple[str, str], wanted: np.ndarray) -> tuple[float, int]:
    """Largest difference of a log-probability, and at how many positions the most probable token is another."""
    model, adapter = world.ggufs[key]
    assert model not in world.failed, world.failed[model]
    assert adapter not in world.failed, world.failed[adapter]
    found = world.llama.log_probabilities(Path(model), TOKENS, Path(adapter) if adapter else None)
    assert found.shape == wanted.shape == (len(TOKENS), wanted.shape[1])
    return float(np.abs(found - wanted).max()), int((found.argmax(1) != wanted.argmax(1)).sum())


def test_the_design_covers_every_pair():
    """Each two properties meet in all their values, but for a head's adapter on tied embeddings."""
    assert len(CELLS) == len(set(CELLS)) == len(LAYOUTS) * len(KINDS) * len(ROUTES) >= 40
    axes: dict[str, Callable[[Cell], Any]] = {
        "layout": lambda c: c.layout, "kind": lambda c: c.kind, "route": lambda c: c.route,
        "theta": lambda c: c.base.theta, "eps": lambda c: c.base.eps, "tied": lambda c: c.base.tied,
        "bias": lambda c: c.base.bias,
    }  # fmt: skip
    for one, other in itertools.combinations(axes, 2):
        met = {(axes[one](cell), axes[other](cell)) for cell in CELLS}
        wanted = set(itertools.product(*({axis(cell) for cell in CELLS} for axis in (axes[one], axes[other]))))
        assert wanted - met <= {("head", True)}, (one, other)
    assert len(BASES) == 8


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_log_probabilities_equal_those_of_transformers(world, cell, figure):
    """Or the refusal that docs/adapters.md names."""
    if cell.kind == "dora" and cell.route == "adapter":
        if cell.layout == "chatglm":  # written for PEFT on the remote code; llama.cpp's converter refuses it
            _, adapter = world.ggufs[cell.name, "chatglm"]
            assert "exit" in world.failed[adapter] or "lora_magnitude_vector" in world.failed[adapter]
        else:
            assert "llama.cpp does not convert DoRA" in world.refused[cell.name]
        return
    wanted = expected(cell, world.directory)
    difference, other = compared(world, (cell.name, format_of(cell.layout)), wanted)
    native = "glm" if cell.layout == "chatglm" else cell.layout
    bare = by_transformers(write_base(native, cell.base, world.directory))
    changed = int((bare.argmax(1) != wanted.argmax(1)).sum())
    figure(f"{difference:.1e}, {len(TOKENS) - other}/{len(TOKENS)}, {changed} changed")
    assert changed > len(TOKENS) // 2  # so that equal means something
    assert difference <= CLOSE
    assert other == 0


@pytest.mark.parametrize(("cell", "format"), MISFITS, ids=[f"{format}-{cell.name}" for cell, format in MISFITS])
def test_what_the_documentation_says_of_formats_that_do_not_fit(world, cell, format, figure):
    """peft: right without rsLoRA and alpha_pattern, silently wrong with them. vllm-split, and llama.cpp on a chatglm
    GGUF: refused, by the converter or by the runtime."""
    if format != "peft":
        model, adapter = world.ggufs[cell.name, format]
        if adapter not in world.failed:
            with pytest.raises(RuntimeError, match=r"LoRA|lora"):
                world.llama.log_probabilities(Path(model), TOKENS, Path(adapter))
        return
    difference, other = compared(world, (cell.name, format), expected(cell, world.directory))
    figure(f"{difference:.1e}, {len(TOKENS) - other}/{len(TOKENS)}")
    assert (difference <= CLOSE) == (cell.kind == "lora")


@pytest.mark.parametrize("name", ["edge", "yarn glm4", "yarn glm"])
def test_other_rotations(world, name, figure):
    """All dimensions (GLM-Edge), and YaRN, which llama.cpp's converter drops for Glm; docs/adapters.md says so."""
    wanted = by_transformers(write_base(*BARE[name], world.directory))
    difference, other = compared(world, (name, ""), wanted)
    figure(f"{difference:.1e}, {len(TOKENS) - other}/{len(TOKENS)}")
    assert (difference <= CLOSE) == (name != "yarn glm")


def test_heads_of_another_size_are_refused_by_llama_cpp(world):
    """Its ChatGLM code takes hidden_size / heads; loudly, as documented."""
    model, _ = world.ggufs["wide heads", ""]
    assert model not in world.failed
    with pytest.raises(RuntimeError, match="wrong shape"):
        world.llama.log_probabilities(Path(model), TOKENS)


def test_without_the_names_llama_cpp_reads_it_is_another_model(world, llama_cpp, tmp_path):
    """What writing rope_ratio and layernorm_epsilon is for: without them, the same weights give other answers."""
    base = dataclasses.replace(PLAIN, theta=5e6)
    source = write_base("glm", base, world.directory)
    wanted = by_transformers(source)
    outs = []
    for name in ("rope_ratio", "layernorm_epsilon"):
        where = tmp_path / name
        where.mkdir()
        for file in source.iterdir():
            (where / file.name).write_bytes(file.read_bytes())
        config = json.loads((where / "config.json").read_text())
        del config[name]
        (where / "config.json").write_text(json.dumps(config))
        assert np.array_equal(by_transformers(where), wanted)  # transformers reads its own names
        outs.append({"out": str(tmp_path / f"{name}.gguf"), "model": str(where)})
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("convert.py")), str(llama_cpp / "converters")],
        input=json.dumps(outs), capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == {}, done.stderr[-2000:]
    for out in outs:
        found = world.llama.log_probabilities(Path(out["out"]), TOKENS)
        assert np.abs(found - wanted).max() > 10 * CLOSE, out
