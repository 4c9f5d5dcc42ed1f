"""What is tried in the clients: bases, adapters, and the cells of the matrix.

Not the full product (3 x 8 x 2 x 16 = 768) but a covering design of 48: every kind of adapter goes both ways through
every layout, and meets both values of every property of the base, whose eight combinations are an orthogonal array of
strength 3. ``test_the_design_covers_every_pair`` counts.
"""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from mentalglm_jax.checkpoints.adapters import save_adapter
from mentalglm_jax.checkpoints.directories import save_pretrained
from mentalglm_jax.checkpoints.weights import parameter, parameter_shapes
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.lora import ALL_LINEAR, Adapter, LoraConfig, add_lora, linears
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer

LAYOUTS = ("glm", "glm4", "chatglm")
ROUTES = ("merged", "adapter")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": (("v_proj", 2), (r".*\.1\.mlp\.down_proj", 6))},
    "alphas": {"alpha_pattern": (("o_proj", 1.5), ("mlp.gate_up_proj", 9.0))},
    "rslora, ranks and alphas": {
        "use_rslora": True, "rank_pattern": (("k_proj", 7),), "alpha_pattern": (("q_proj", 2.0),),
    },
    "some layers": {"target_modules": ("q_proj", "v_proj", "down_proj"), "layers_to_transform": (0, 2)},
    "head": {"target_modules": (*ALL_LINEAR, "lm_head")},
    "dora": {"use_dora": True},
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(14, 2500, 160).tolist()


@dataclasses.dataclass(frozen=True)
class Base:
    """The properties of a base that clients have read wrongly."""

    theta: float = 10000.0
    eps: float = 1.5625e-07  # the default, of GLM-4
    tied: bool = False
    bias: bool = True
    more: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """For a directory and a test's name."""
        said = [f"theta{self.theta:.0e}", f"eps{self.eps:.2g}", "tied" * self.tied, "nobias" * (not self.bias)]
        return "-".join([part for part in said if part] + [name for name, _ in self.more])


# Strength 3: among any three of the columns all eight combinations; the opposite of a row is one too.
BASES = [Base(theta, eps, (i + j + k) % 2 == 1, bias) for (i, theta), (j, eps), (k, bias) in itertools.product(
    enumerate((10000.0, 5e6)), enumerate((1.5625e-07, 1e-05)), enumerate((True, False)))]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of the matrix."""

    layout: str
    kind: str
    route: str
    base: Base

    @property
    def name(self) -> str:
        """For a directory and a test's name."""
        return f"{self.layout}-{self.kind.replace(', ', '+').replace(' ', '_')}-{self.route}-{self.base.name}"


def _cells() -> list[Cell]:
    found = []
    for (i, layout), (j, kind), (k, route) in itertools.product(*map(enumerate, (LAYOUTS, KINDS, ROUTES))):
        at = (j + 3 * i) % len(BASES)
        base = BASES[len(BASES) - 1 - at] if k else BASES[at]  # opposite rows stand at opposite ends
        if kind == "head":  # an adapter on a head that is the embedding would untie them
            base = dataclasses.replace(base, tied=False)
        found.append(Cell(layout, kind, route, base))
    return found


CELLS = _cells()


@functools.cache
def base_model(layout: str, base: Base) -> Glm:
    """The base on our side."""
    tokenizer = GlmTokenizer.load(BUILTIN)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}  # fmt: skip
    config = GlmConfig(**{
        **sizes, "vocab_size": -(-tokenizer.vocab_size // 64) * 64, "rope_theta": base.theta, "rms_norm_eps": base.eps,
        "tie_word_embeddings": base.tied, "attention_bias": base.bias, "sandwich_norm": layout == "glm4",
        "eos_token_id": tuple(tokenizer.eos_ids), "pad_token_id": tokenizer.eos_ids[0], **dict(base.more),
    })  # fmt: skip
    model, rng = Glm(config, rngs=nnx.Rngs(0)), np.random.default_rng(7)
    for path in parameter_shapes(config):  # norms around 1, the rest around 0; biases too
        variable = parameter(model, path)
        variable.set_value(jnp.asarray(rng.normal("norm" in path, 0.2, variable.shape), jnp.float32))
    return model


def with_adapter(layout: str, kind: str, base: Base) -> Glm:
    """The base with an adapter of random values that changes most answers."""
    model = nnx.clone(base_model(layout, base))
    add_lora(model, LoraConfig(**{"rank": 4, "alpha": 6.0} | KINDS[kind]), nnx.Rngs(0))
    rng = np.random.default_rng(1)

    def normal(shape: tuple[int, ...]) -> Any:
        return jnp.asarray(rng.normal(0, 0.2, shape), jnp.float32)

    for _, linear in linears(model):
        adapter = linear.adapter
        if isinstance(adapter, Adapter):
            used = np.arange(max(adapter.ranks)) < np.asarray(adapter.ranks)[:, None]
            used = jnp.asarray(used if adapter.a.ndim == 3 else used[0])
            adapter.a.set_value(normal(adapter.a.shape) * used[..., None, :])
            adapter.b.set_value(normal(adapter.b.shape) * used[..., None] / 2)  # rounding grows with the logits
            if adapter.magnitude is not None:
                scale = jnp.asarray(1 + 0.3 * rng.random(adapter.magnitude.shape), jnp.float32)
                adapter.magnitude.set_value(adapter.magnitude[...] * scale)
    return model


def write_base(layout: str, base: Base, directory: Path) -> Path:
    """The base as we write it, once."""
    where = directory / f"base-{layout}-{base.name}"
    if not where.exists():
        save_pretrained(base_model(layout, base), where, layout="chatglm" if layout == "chatglm" else "glm",
                        tokenizer=BUILTIN)  # fmt: skip
    return where


def expected(cell: Cell, directory: Path) -> np.ndarray:
    """transformers' log-probabilities ``[160, V]`` with PEFT's reading of the adapter, by neither of our merges."""
    native = "glm" if cell.layout == "chatglm" else cell.layout
    base, adapter = write_base(native, cell.base, directory), directory / f"peft-{cell.name}"
    save_adapter(with_adapter(native, cell.kind, cell.base), adapter)
    return by_transformers(base, adapter)


def by_transformers(base: Path, adapter: Path | None = None) -> np.ndarray:
    """Log-probabilities ``[160, V]`` of ``TOKENS``."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    return log_probabilities(model)


def log_probabilities(model: Any) -> np.ndarray:
    """Of ``TOKENS`` by a torch model."""
    with torch.no_grad():
        return model.eval()(torch.tensor([TOKENS])).logits[0].double().log_softmax(-1).numpy()


def ours(model: Glm) -> np.ndarray:
    """Log-probabilities ``[160, V]`` of ``TOKENS`` by JAX."""
    logits = np.asarray(model(jnp.asarray([TOKENS], jnp.int32))[0], np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest, over all positions and tokens."""
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max())
