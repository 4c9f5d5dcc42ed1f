"""PEFT adapter directories <-> the adapter of a ``Glm``: LoRA, rsLoRA and DoRA, key for key and bit for bit.

A directory holds ``adapter_config.json`` (what PEFT 0.21 writes) and ``adapter_model.safetensors``, where a tensor is
called ``base_model.model.<module>.lora_A.weight [r, in]``, ``.lora_B.weight [out, r]`` or, for DoRA,
``.lora_magnitude_vector [out]``. What PEFT can say and this model can not is refused by name, never ignored.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.files import replace_dir, write_json, write_text
from mentalglm_jax.glm import Glm, Linear
from mentalglm_jax.hf_files import (
    DTYPES,
    PICKLES,
    TensorFiles,
    TensorSource,
    check_replaceable,
    inside,
    read_json,
    some,
    write_safetensors,
)
from mentalglm_jax.lora import Adapter, LoraConfig, add_lora, has_lora, linears, remove_lora
from mentalglm_jax.peft_config import from_peft, module_names, to_peft

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FORMATS = ("peft", "vllm-split")
PREFIX = "base_model.model."


def save_adapter(
    model: Glm, directory: str | Path, format: str = "peft", base_model_name_or_path: str | None = None
) -> None:
    """Writes the adapter of ``model`` as a PEFT directory, which replaces ``directory`` in one step when complete.

    Args:
        format: "peft" keeps GLM's fused ``gate_up_proj``, as PEFT on transformers needs it. "vllm-split" says the same
            with ``gate_proj`` and ``up_proj`` (A twice, rows of B split), which vLLM's own GLM code needs.
        base_model_name_or_path: what the adapter directory names as its base; PEFT can then find it alone.

    Raises:
        InputError: no adapter, an unknown format, DoRA in "vllm-split" (vLLM has none), or ``directory`` holds other
            files.
        RunError: the adapter holds NaN or infinity, or the disk refused.
    """
    directory = Path(directory)
    config = model.lora_config
    if not has_lora(model) or config is None:
        raise InputError("save_adapter: the model has no adapter; add one with add_lora or load_adapter")
    if format not in FORMATS:
        raise InputError(f"save_adapter: format {format!r} is not one of {', '.join(FORMATS)}")
    if config.use_dora and format == "vllm-split":
        raise InputError("save_adapter: vLLM does not load DoRA; save format 'peft' or a merged model")
    tensors = _tensors(model, config, split=format == "vllm-split")
    if bad := [name for name, value in tensors.items() if not np.isfinite(value).all()]:
        raise RunError(f"save_adapter: NaN or infinity in {some(bad)}; the training diverged, nothing was written")
    sources = [
        TensorSource(name, "F32", value.shape, lambda value=value: [value]) for name, value in sorted(tensors.items())
    ]
    owned = {CONFIG, WEIGHTS, "README.md"}
    check_replaceable(directory, owned.__contains__)
    with replace_dir(directory) as temporary:
        write_json(temporary / CONFIG, to_peft(config, format, base_model_name_or_path))
        write_safetensors(temporary / WEIGHTS, sources, {"rope_theta": repr(model.config.rope_theta)})
        write_text(temporary / "README.md", _model_card(config, base_model_name_or_path))


def load_adapter(model: Glm, directory: str | Path) -> None:
    """Puts the adapter of a PEFT directory on ``model``, in place; it can be trained on from there.

    ``target_modules`` and ``exclude_modules`` may be lists, regular expressions or "all-linear" as in PEFT, as long as
    they mean the same modules, ranks and alphas in every layer. Weights become float32.

    Raises:
        InputError: not a LoRA directory; an option this model does not have; missing, unexpected, mis-shaped or
            non-finite tensors; a base with another shape or rope_theta. ``model`` is then as it was.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise InputError(f"{directory}: no such adapter directory")
    if has_lora(model):
        raise InputError("load_adapter: the model already has an adapter; merge or remove it first")
    config = from_peft(model, read_json(directory / CONFIG), directory / CONFIG)
    if not (directory / WEIGHTS).exists():
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
        reason = f"only pickles are there ({some(pickles)}), which could run code" if pickles else "it is missing"
        raise InputError(f"{directory / WEIGHTS}: needed, but {reason}; save the adapter as safetensors")
    files = TensorFiles([inside(directory, WEIGHTS)])
    _check_base(model, files, directory)
    add_lora(model, config, nnx.Rngs(0))
    try:
        _fill(model, files, directory / WEIGHTS)
    except BaseException:
        remove_lora(model)
        raise


def _parameters(model: Glm) -> Iterator[tuple[str, int | None, str, nnx.Variable]]:
    """(key in the file, layer, transposed?, variable) of every adapter tensor."""
    for path, linear in linears(model):
        adapter = linear.adapter
        if not isinstance(adapter, Adapter):
            continue
        names = module_names(path, model.config.num_hidden_layers)
        for layer, name in enumerate(names):
            index = layer if path.startswith("layers.") else None
            yield f"{PREFIX}{name}.lora_A.weight", index, "transposed", adapter.a
            yield f"{PREFIX}{name}.lora_B.weight", index, "transposed", adapter.b
            if adapter.magnitude is not None:
                yield f"{PREFIX}{name}.lora_magnitude_vector", index, "", adapter.magnitude


def _tensors(model: Glm, config: LoraConfig, split: bool) -> dict[str, np.ndarray]:
    for path, linear in linears(model):
        if isinstance(linear.adapter, Adapter):
            scale, stated = np.asarray(linear.adapter.scale[...]), np.float32(config.scale_of(path.rpartition(".")[2]))
            if (scale != stated).any():
                raise InputError(
                    f"save_adapter: the scale of {path} is {scale.ravel()[0]}, its LoraConfig says {stated}"
                )
    host: dict[int, np.ndarray] = {}
    tensors: dict[str, np.ndarray] = {}
    for key, layer, transposed, variable in _parameters(model):
        if id(variable) not in host:
            host[id(variable)] = np.asarray(jax.device_get(variable[...]), np.float32)
        value = host[id(variable)] if layer is None else host[id(variable)][layer]
        value = np.ascontiguousarray(value.T if transposed else value)
        if split and ".gate_up_proj." in key:
            gate, up = (value, value) if ".lora_A." in key else np.split(value, 2)
            tensors[key.replace("gate_up_proj", "gate_proj")] = gate
            tensors[key.replace("gate_up_proj", "up_proj")] = up
        else:
            tensors[key] = value
    return tensors


def _check_base(model: Glm, files: TensorFiles, directory: Path) -> None:
    stated = files.metadata.get("rope_theta")
    if stated is not None and stated != repr(model.config.rope_theta):
        raise InputError(
            f"{directory}: trained on a base with rope_theta {stated}, this model has {model.config.rope_theta!r}; "
            f"load the base with rope_theta={stated}"
        )


def _fill(model: Glm, files: TensorFiles, file: Path) -> None:
    found: dict[str, str] = {}
    for name in files.tensors:
        key = re.sub(r"\.(lora_[AB]|lora_magnitude_vector)\.default(?=\.|$)", r".\1", name)
        key = key.removesuffix(".weight") if key.endswith(".lora_magnitude_vector.weight") else key
        if key in found:
            raise InputError(f"{file}: {name} and {found[key]} are the same tensor")
        found[key] = name
    head = found.pop(f"{PREFIX}lm_head.base_layer.weight", None)  # PEFT adds the base when lm_head is targeted
    if head is not None:
        _check_head(model, files, head, file)
    expected = list(_parameters(model))
    keys = {key for key, *_ in expected}
    faults = []
    for what, names in (
        ("missing", [key for key in keys if key not in found]),
        ("unexpected", [name for key, name in found.items() if key not in keys]),
    ):
        if names:
            faults.append(f"{len(names)} tensor{'s' * (len(names) > 1)} {what}: {some(sorted(names))}")
    wrong, bad = [], []
    stacks: dict[int, tuple[nnx.Variable, np.ndarray]] = {}
    for key, layer, transposed, variable in expected:
        if key not in found:
            continue
        info = files.tensors[found[key]]
        stack = stacks.setdefault(id(variable), (variable, np.empty(variable.shape, np.float32)))[1]
        place = stack if layer is None else stack[layer]
        place = place.T if transposed else place
        if info.shape != place.shape or info.dtype not in DTYPES:
            wrong.append(f"{found[key]} {info.dtype}{list(info.shape)} instead of {list(place.shape)}")
            continue
        place[...] = files.read(found[key])
        if not np.isfinite(place).all():
            bad.append(found[key])
    if wrong:
        faults.append(f"{len(wrong)} of wrong shape or dtype (another base or rank?): {some(wrong)}")
    if bad:
        faults.append(f"NaN or infinity in {some(bad)}")
    if faults:
        raise InputError(f"{file}: does not fit adapter_config.json and this base: {'; '.join(faults)}")
    for variable, stack in stacks.values():
        variable.set_value(jnp.asarray(stack))


def _check_head(model: Glm, files: TensorFiles, name: str, file: Path) -> None:
    linear = model.lm_head
    if isinstance(linear, Linear) and files.tensors[name].shape == linear.kernel.shape[::-1]:
        ours = np.asarray(jax.device_get(linear.kernel[...]))
        if np.array_equal(files.read(name).astype(ours.dtype), ours.T):
            return
    raise InputError(f"{file}: {name} differs from this model's lm_head; the adapter was trained on another base")


def _model_card(config: LoraConfig, base: str | None) -> str:
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    front = f"base_model: {base}\n" if base else ""
    return f"""---
{front}library_name: peft
pipeline_tag: text-generation
tags:
- lora
- mental-health
- mentalglm-jax
---

# {kind} adapter for {base or "a GLM-4 model"}

Rank {config.rank}, alpha {config.alpha:g}, dropout {config.dropout:g}, on {", ".join(config.target_modules)}.
It is valid only with the base model, and the rope_theta, it was trained with.

## Safety

A research instrument for studying language about mental health. It is not a diagnosis and not a medical device; its
labels and explanations can be wrong in ways that read convincingly. Do not act on them without a qualified person. If
someone may be in danger, contact local emergency services or a crisis line.
"""
