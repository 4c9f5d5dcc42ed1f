"""Adapters of random values, PEFT's and ours: what the tests of both directions compare."""

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
from flax import nnx

from mentalglm_jax.model.lora import (
    Adapter,
    LoraConfig,
    Replacement,
    add_lora,
    linears,
)

TOKENS = np.random.default_rng(0).integers(4, 96, (2, 19)).astype(np.int32)


def randomise(model, seed=1):
    """A and B of a PEFT model at a size where every term counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                weight.normal_(0, 0.2, generator=generator)
            elif "modules_to_save" in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
            elif "magnitude" in name:
                weight.mul_(1 + 0.3 * torch.rand(weight.shape, generator=generator))
    return model.eval()


def by_peft(hf, directory, variant="glm", **options) -> Any:
    """A PEFT model with random weights, and its directory."""
    options = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options
    model = randomise(peft.get_peft_model(hf.variant(variant), peft.LoraConfig(**options)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        model.save_pretrained(directory)
    return model


def trained(base, seed=0, **options):
    """Our model with an adapter of random values."""
    model = nnx.clone(base)
    add_lora(model, LoraConfig(**{"rank": 4, "alpha": 6.0} | options), nnx.Rngs(0))
    rng = np.random.default_rng(seed)

    def normal(shape):
        return jnp.asarray(rng.normal(0, 0.2, shape), jnp.float32)

    for _, linear in linears(model):
        adapter = linear.adapter
        if isinstance(adapter, Adapter):
            used = np.arange(max(adapter.ranks)) < np.asarray(adapter.ranks)[:, None]  # the rest is zero and stays so
            used = jnp.asarray(used if adapter.a.ndim == 3 else used[0])
            adapter.a.set_value(normal(adapter.a.shape) * used[..., None, :])
            adapter.b.set_value(normal(adapter.b.shape) * used[..., None])
            if adapter.magnitude is not None:
                scale = jnp.asarray(1 + 0.3 * rng.random(adapter.magnitude.shape), jnp.float32)
                adapter.magnitude.set_value(adapter.magnitude[...] * scale)
    for module in (model.embed_tokens, model.lm_head):
        if isinstance(module.adapter, Replacement):
            module.adapter.weight.set_value(module.adapter.weight[...] + normal(module.adapter.weight.shape))
    return model


def same_adapter(one, other):
    for (path, ours), (_, theirs) in zip(linears(one), linears(other), strict=True):
        assert (ours.adapter is None) == (theirs.adapter is None), path
        if ours.adapter is not None:
            states = [jax.tree.leaves_with_path(nnx.state(linear.adapter)) for linear in (ours, theirs)]
            for (where, found), (_, wanted) in zip(*states, strict=True):
                np.testing.assert_array_equal(found, wanted, err_msg=f"{path} {where}")


def edit_config(directory: Path, **changes):
    path = directory / "adapter_config.json"
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))
