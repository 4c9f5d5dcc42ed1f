"""vLLM on the directories written here: `make test-vllm`. By hand, for its environment is 3.4 GB."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mentalglm_jax.checkpoints.adapter_formats import Source
from mentalglm_jax.checkpoints.adapters import save_adapter
from mentalglm_jax.checkpoints.directories import load, save_pretrained
from mentalglm_jax.text.tokenizer import BUILTIN
from tests.clients.cells import TOKENS, Base, difference, ours, with_adapter, write_base

# Nats. vLLM sums in an order of its own: without any adapter it is 0.9e-4 to 1.4e-4 from JAX (2026-11-29). A format
# that it reads as another model moves a log-probability by more than one nat.
CLOSE = 5e-4
KINDS = ("lora", "rslora", "ranks", "alphas", "some layers")
BASE = Base(theta=5e6, more=(("head_dim", 32), ("hidden_size", 128)))  # its CPU attention has no smaller heads


def ask(directory: Path, base: Path, adapters: dict[str, Path]) -> tuple[int, str, dict[str, np.ndarray]]:
    """Exit code, what was said, log-probabilities by adapter."""
    tokens, out = directory / "tokens.json", directory / f"{'-'.join(adapters) or 'base'}.npz".replace(" ", "_")
    tokens.write_text(json.dumps(TOKENS))
    command = [sys.executable, str(Path(__file__).with_name("ask_vllm.py")), str(base), str(tokens), str(out)]
    done = subprocess.run([*command, *(f"{name}={path}" for name, path in adapters.items())], capture_output=True,
                          text=True, timeout=900)  # fmt: skip
    return done.returncode, done.stdout + done.stderr, dict(np.load(out)) if out.exists() else {}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", ["glm", "glm4", "chatglm"])
def test_vllm_computes_what_jax_does(tmp_path, layout, figure):
    """The base and every kind of adapter in the format that `--to vllm` chooses."""
    base = write_base(layout, BASE, tmp_path)
    adapters, wanted = {}, {"base": ours(load(base))}
    for kind in KINDS:
        model = with_adapter(layout, kind, BASE)
        model.source = Source(str(base), "chatglm" if layout == "chatglm" else "glm")
        adapters[kind] = tmp_path / kind.replace(" ", "_")
        save_adapter(model, adapters[kind], format="vllm")
        wanted[kind] = ours(model)
    code, said, found = ask(tmp_path, base, adapters)
    assert code == 0, said[-3000:]
    errors = {name: difference(found[name], values[:-1]) for name, values in wanted.items()}
    figure(", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    assert max(errors.values()) <= CLOSE
    assert all(difference(wanted[kind], wanted["base"]) > 1 for kind in KINDS)


@pytest.mark.timeout(1800)
def test_a_merged_model_with_dora_and_a_changed_head(tmp_path, figure):
    """What vLLM has no adapter for."""
    for kind in ("dora", "head"):
        model = with_adapter("glm", kind, BASE)
        (tmp_path / kind).mkdir()
        save_pretrained(model, tmp_path / kind / "merged", tokenizer=BUILTIN)
        code, said, found = ask(tmp_path / kind, tmp_path / kind / "merged", {})
        assert code == 0, said[-3000:]
        error = difference(found["base"], ours(model)[:-1])
        figure(f"{kind} {error:.1e}")
        assert error <= CLOSE


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("layout", "format"), [("glm", "vllm-split"), ("glm4", "peft")])
def test_what_the_documentation_says_of_formats_that_do_not_fit(tmp_path, layout, format):
    """Refused, loudly. When this fails, vLLM has learnt it: correct docs/adapters.md and ``vllm_format``."""
    base = write_base(layout, BASE, tmp_path)
    save_adapter(with_adapter(layout, "lora", BASE), tmp_path / "adapter", format=format)
    code, said, _ = ask(tmp_path, base, {"adapter": tmp_path / "adapter"})
    assert code != 0
    assert "expected target modules" in said
