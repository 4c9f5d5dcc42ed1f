"""PEFT adapter directories <-> the adapter of a ``Glm``: LoRA, rsLoRA and DoRA, key for key and bit for bit.

A directory holds ``adapter_config.json`` (what PEFT 0.21 writes) and ``adapter_model.safetensors``, where a tensor is
called ``base_model.model.<module>.lora_A.weight [r, in]``, ``.lora_B.weight [out, r]`` or, for DoRA,
``.lora_magnitude_vector [out]``. What PEFT can say and this model cannot is refused by name, never ignored.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mentalglm_jax.checkpoints.adapter_formats import (
    FORMATS,
    check_layout,
    dialect,
    formatted,
    native_name,
    saved_name,
    to_native,
)
from mentalglm_jax.checkpoints.adapter_rows import Low
from mentalglm_jax.checkpoints.hf_files import (
    ADAPTER_FILES,
    CALIBRATION,
    DTYPES,
    PICKLES,
    TensorFiles,
    TensorSource,
    is_hub_id,
    locate,
    write_safetensors,
)
from mentalglm_jax.checkpoints.model_card import CARD, adapter_card
from mentalglm_jax.checkpoints.peft_config import from_peft
from mentalglm_jax.checkpoints.peft_keys import as_computed, base_copies
from mentalglm_jax.devices.distributed import on_host
from mentalglm_jax.devices.together import on_primary
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.files import check_owned, replace_dir, sealed, write_json, write_text
from mentalglm_jax.foreign import DIRECTORY, at_home, inside, parse_json, read_json, short, some, there
from mentalglm_jax.model.glm import Glm, GlmConfig, Linear
from mentalglm_jax.model.lora import (
    EMBEDDING,
    Adapter,
    LoraConfig,
    Replacement,
    Spec,
    add_lora,
    has_lora,
    linears,
    module_names,
    remove_lora,
    resolve,
)
from mentalglm_jax.text.task_files import TASKS_FILE

CONFIG: str = DIRECTORY["adapter"]["config"]
WEIGHTS: str = DIRECTORY["adapter"]["weights"]
PREFIX = "base_model.model."


def save_adapter(
    model: Glm, directory: str | Path, format: str = "peft", base_model_name_or_path: str | None = None,
    card: str | None = None,
) -> None:  # fmt: skip
    """Writes the adapter of ``model`` as a PEFT directory, which replaces ``directory`` in one step when complete. Of
    several processes all must call it; the primary one writes.

    Args:
        format: "peft" for PEFT on transformers; "vllm" for vLLM, whatever the base; "vllm-split", "llama.cpp" and
            "chatglm", see ``adapter_formats``.
        base_model_name_or_path: what the adapter directory names as its base, so that PEFT finds it alone: a Hub id,
            or a directory, which is made absolute. None is where ``model`` was loaded from.
        card: README.md; None is one that says what the adapter is.

    Raises:
        InputError: no adapter, an unknown format or one that cannot say this adapter, or ``directory`` holds other
            files.
        RunError: the adapter holds NaN or infinity, or the disk refused.
    """
    directory = Path(directory)
    config = model.lora_config
    if not has_lora(model) or config is None:
        raise InputError("save_adapter: the model has no adapter; add one with add_lora or load_adapter")
    if format not in FORMATS:
        raise InputError(f"save_adapter: format {format!r} is not one of {', '.join(FORMATS)}")
    base = base_model_name_or_path or (model.source.name if model.source is not None else None)
    if base is not None and at_home(base).is_dir():
        base = str(at_home(base).resolve())
    tensors, described = _tensors(model, config, format, base)
    if bad := [name for name, value in tensors.items() if not np.isfinite(value).all()]:
        raise RunError(f"save_adapter: NaN or infinity in {some(bad)}; the training diverged, nothing was written")
    sources = [
        TensorSource(name, "F32", value.shape, lambda value=value: [value]) for name, value in sorted(tensors.items())
    ]
    owned = {CONFIG, WEIGHTS, CARD, TASKS_FILE, CALIBRATION}

    def write() -> None:
        with replace_dir(directory, partial(check_owned, owned=owned.__contains__)) as temporary:
            write_json(temporary / CONFIG, described)
            metadata = {"rope_theta": repr(model.config.rope_theta), "base": json.dumps(_identity(model.config))}
            write_safetensors(temporary / WEIGHTS, sources, metadata)
            text = card or adapter_card(config, base if base and is_hub_id(base) else None)
            write_text(temporary / CARD, sealed(text))

    on_primary(write)


def load_adapter(model: Glm, directory: str | Path) -> None:
    """Puts the adapter of a PEFT directory, or of a Hub repository by its id, on ``model``, in place; it can be trained
    on from there.

    Adapters in a relative's own names, for the chatglm layout, and with vLLM's split names are translated; weights
    become float32.

    Raises:
        InputError: no LoRA directory, nor one on the Hub; an option this model does not have; missing, unexpected,
            mis-shaped or non-finite tensors; a base with another shape, rope or layout. ``model`` is then as it was.
    """
    directory = locate(directory, ADAPTER_FILES)
    if has_lora(model):
        raise InputError("load_adapter: the model already has an adapter; merge or remove it first")
    raw = read_json(directory / CONFIG)
    if not there(directory / WEIGHTS):
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
        reason = f"only pickles are there ({some(pickles)}), which could run code" if pickles else "it is missing"
        raise InputError(f"{directory / WEIGHTS}: needed, but {reason}; save the adapter as safetensors")
    files = TensorFiles([inside(directory, WEIGHTS)])
    _check_base(model, files, directory)
    found = _entries(files, directory / WEIGHTS)
    raw = as_computed(raw, list(found), directory / CONFIG)
    for name in base_copies(list(found), raw.get("modules_to_save")):
        _check_copy(model, found.pop(name), directory / WEIGHTS)
    check_layout(model, raw, list(found), "base" in files.metadata, directory / CONFIG)
    spoken = dialect(list(found), model.config.family)
    if spoken == "peft":
        count = model.config.num_hidden_layers
        names = [name for path, _ in linears(model) for name in module_names(path, count)]
        config = from_peft(raw, directory / CONFIG, modules=[*names, EMBEDDING])
    else:
        found, config = _translate(model, raw, found, directory / CONFIG, spoken)
    try:
        specs = resolve(model, config)
    except InputError as error:
        raise InputError(f"{directory / CONFIG}: {error}") from error
    _check_shapes(_shapes(model, config, specs), found, directory / WEIGHTS)  # before anything is allocated
    try:
        add_lora(model, config, nnx.Rngs(0))
        _fill(model, found, directory / WEIGHTS)
    except BaseException:
        remove_lora(model)
        raise


def trained_rope_theta(directory: str | Path) -> float | None:
    """The rotary base of the model that an adapter of ours was trained on; None where its file does not say.

    Raises:
        InputError: there is no such adapter, or the file is damaged.
    """
    file = locate(directory, ADAPTER_FILES) / WEIGHTS
    stated = TensorFiles([inside(file.parent, WEIGHTS)]).metadata.get("rope_theta") if there(file) else None
    try:
        return None if stated is None else float(stated)
    except ValueError as error:
        raise InputError(f"{file}: its rope_theta {short(stated)} is not a number; save the adapter again") from error


class _Entry(NamedTuple):
    """A tensor of a file: its name there, and how to get it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


class _Slot(NamedTuple):
    """Where a tensor goes: ``variable[at]``, transposed or not."""

    variable: nnx.Variable
    at: tuple[Any, ...]
    transposed: bool

    def view(self, stack: np.ndarray) -> np.ndarray:
        part = stack[self.at]
        return part.T if self.transposed else part


def _slots(model: Glm) -> dict[str, _Slot]:
    """Every tensor of the adapter by its key in the file. Ranks that a layer does not use are in none of them."""
    slots: dict[str, _Slot] = {}
    for path, linear in linears(model):
        adapter = linear.adapter
        if isinstance(adapter, Replacement):
            slots[f"{PREFIX}{path}.weight"] = _Slot(adapter.weight, (), True)
        if not isinstance(adapter, Adapter):
            continue
        for layer, name in enumerate(module_names(path, model.config.num_hidden_layers)):
            at: tuple[Any, ...] = (layer,) if path.startswith("layers.") else ()
            if rank := adapter.ranks[layer]:
                slots[f"{PREFIX}{name}.lora_A.weight"] = _Slot(adapter.a, (*at, slice(None), slice(rank)), True)
                slots[f"{PREFIX}{name}.lora_B.weight"] = _Slot(adapter.b, (*at, slice(rank)), True)
                if adapter.magnitude is not None:
                    slots[f"{PREFIX}{name}.lora_magnitude_vector"] = _Slot(adapter.magnitude, at, False)
    if isinstance(model.embed_tokens.adapter, Replacement):
        slots[f"{PREFIX}{EMBEDDING}.weight"] = _Slot(model.embed_tokens.adapter.weight, (), False)
    return slots


def _tensors(
    model: Glm, config: LoraConfig, format: str, base: str | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the adapter_config.json of a directory in ``format``."""
    for path, linear in linears(model):
        if not isinstance(linear.adapter, Adapter):
            continue
        specs = [config.spec_of(name) for name in module_names(path, model.config.num_hidden_layers)]
        scales = on_host(linear.adapter.scale[...]).ravel()
        for spec, rank, scale in zip(specs, linear.adapter.ranks, scales, strict=True):
            stated = np.float32(spec.scale if spec else 0)
            if scale != stated or rank != (spec.rank if spec else 0):
                raise InputError(
                    f"save_adapter: the scale of {path} is {scale} (rank {rank}), its LoraConfig says {stated}"
                )
    host: dict[int, np.ndarray] = {}
    tensors: dict[str, np.ndarray] = {}
    for key, slot in _slots(model).items():
        if id(slot.variable) not in host:
            host[id(slot.variable)] = np.asarray(on_host(slot.variable[...]), np.float32)
        tensors[key] = np.ascontiguousarray(slot.view(host[id(slot.variable)]))
    lows = {}
    for key, value in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            spec = config.spec_of(name)
            assert spec is not None
            magnitude = tensors.get(f"{PREFIX}{name}.lora_magnitude_vector")
            lows[name] = Low(value, tensors[f"{PREFIX}{name}.lora_B.weight"], magnitude, spec)
    saved = {key: value for key, value in tensors.items() if ".lora_" not in key}
    saved = {f"{PREFIX}{saved_name(key.removeprefix(PREFIX), format, model)}": value for key, value in saved.items()}
    renamed, described = formatted(lows, config, base, format, model)
    return saved | _keyed(renamed), described


def _keyed(lows: Mapping[str, Low]) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for name, low in lows.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(low.a)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(low.b)
        if low.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = low.magnitude
    return tensors


def _identity(config: GlmConfig) -> dict[str, Any]:
    """What a base must share with the one an adapter was trained on."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "partial_rotary_factor")  # fmt: skip
    scaling = None if config.rope_scaling is None else dataclasses.asdict(config.rope_scaling)
    # Under the name of the first kind there was, so that adapters written then are checked too.
    return {"model_type": config.model_type, **{name: getattr(config, name) for name in names}, "yarn": scaling}


def _check_base(model: Glm, files: TensorFiles, directory: Path) -> None:
    stated = files.metadata.get("rope_theta")
    if stated is not None and stated != repr(model.config.rope_theta):
        raise InputError(
            f"{directory}: trained on a base with rope_theta {stated[:40]}, this model has "
            f"{model.config.rope_theta!r}; load the base with rope_theta={stated[:40]}"
        )
    try:
        base = parse_json(files.metadata.get("base", "{}"), f"{directory / WEIGHTS}: its base")
        differing = [(name, base[name], value) for name, value in _identity(model.config).items()
                     if name in base and base[name] != value]  # fmt: skip
    except TypeError as error:
        raise InputError(f"{directory}: what {WEIGHTS} says of its base is damaged ({error})") from error
    if differing:
        stated = ", ".join(f"{name} {short(theirs)}" for name, theirs, _ in differing)
        found = ", ".join(str(ours) for *_, ours in differing)
        layout = [name for name, *_ in differing] == ["model_type"]
        hint = "; if these are the same weights, load them in the layout they were trained in" if layout else ""
        raise InputError(f"{directory}: trained on another base: with {stated}; this model has {found}{hint}")


def _entries(files: TensorFiles, file: Path) -> dict[str, _Entry]:
    """The tensors of the file by the key PEFT writes; it reads some other spellings, so they are read here too."""
    found: dict[str, _Entry] = {}
    for name, info in files.tensors.items():
        key = re.sub(r"\.(lora_[AB]|lora_magnitude_vector)\.default(?=\.|$)", r".\1", name)
        key = key.removesuffix(".weight") if key.endswith(".lora_magnitude_vector.weight") else key
        if key in found:
            raise InputError(f"{file}: {name} and {found[key].name} are the same tensor")
        found[key] = _Entry(name, info.shape, info.dtype, partial(files.read, name))
    return found


def _translate(
    model: Glm, raw: Mapping[str, Any], found: dict[str, _Entry], file: Path, spoken: str
) -> tuple[dict[str, _Entry], LoraConfig]:
    """The tensors of another dialect, and their configuration, under glm's names."""

    def read(name: str, spec: Spec) -> Low:
        keys = [f"{PREFIX}{name}.{end}" for end in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")]
        if missing := [key for key in keys[:2] if key not in found]:
            raise InputError(f"{file.parent / WEIGHTS}: tensor missing: {some(missing)}")
        values = [found.pop(key).read().astype(np.float32) if key in found else None for key in keys]
        a, b, magnitude = values
        assert a is not None
        assert b is not None
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == spec.rank:
            raise InputError(
                f"{file.parent / WEIGHTS}: {name} has A {list(a.shape)} and B {list(b.shape)}, its rank is {spec.rank}"
            )
        return Low(a, b, magnitude, spec)

    names = [key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in found if key.endswith(".lora_A.weight")]
    lows, config = to_native(raw, file, names, read, model, spoken)
    native = {key: _Entry(key, value.shape, "F32", lambda value=value: value) for key, value in _keyed(lows).items()}
    for key, entry in found.items():
        ours = f"{PREFIX}{native_name(key.removeprefix(PREFIX), spoken)}"
        if ours in native:
            raise InputError(f"{file.parent / WEIGHTS}: {entry.name} and another tensor are both this model's "
                             f"{ours.removeprefix(PREFIX)}; one is right")  # fmt: skip
        native[ours] = entry
    return native, config


def _shapes(model: Glm, config: LoraConfig, specs: Mapping[str, tuple[Spec | None, ...]]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the adapter that ``config`` asks for, by its key in the file: the keys of ``_slots``."""
    shapes: dict[str, tuple[int, ...]] = {}
    saved = config.modules_to_save
    for path, linear in linears(model):
        *_, inputs, outputs = linear.kernel.shape
        if path in saved:
            shapes[f"{PREFIX}{path}.weight"] = (outputs, inputs)
            continue
        names = module_names(path, model.config.num_hidden_layers)
        for name, spec in zip(names, specs.get(path, ()), strict=False):
            if spec is not None:
                shapes[f"{PREFIX}{name}.lora_A.weight"] = (spec.rank, inputs)
                shapes[f"{PREFIX}{name}.lora_B.weight"] = (outputs, spec.rank)
                if config.use_dora:
                    shapes[f"{PREFIX}{name}.lora_magnitude_vector"] = (outputs,)
    if "embed_tokens" in saved:
        shapes[f"{PREFIX}{EMBEDDING}.weight"] = model.embed_tokens.embedding.shape
    return shapes


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, _Entry], file: Path) -> None:
    faults = []
    for what, names in (
        ("missing", [key for key in shapes if key not in found]),
        ("unexpected", [entry.name for key, entry in found.items() if key not in shapes]),
    ):
        if names:
            faults.append(f"{len(names)} tensor{'s' * (len(names) > 1)} {what}: {some(sorted(names))}")
    wrong = [
        f"{found[key].name} {found[key].dtype}{list(found[key].shape)} instead of {list(shape)}"
        for key, shape in shapes.items()
        if key in found and (found[key].shape != shape or found[key].dtype not in DTYPES)
    ]
    if wrong:
        faults.append(f"{len(wrong)} of wrong shape or dtype (another base or rank?): {some(wrong)}")
    if faults:
        raise InputError(f"{file}: does not fit adapter_config.json and this base: {'; '.join(faults)}")


def _fill(model: Glm, found: Mapping[str, _Entry], file: Path) -> None:
    bad = []
    stacks: dict[int, tuple[nnx.Variable, np.ndarray]] = {}
    for key, slot in _slots(model).items():
        entry = found[key]
        if id(slot.variable) not in stacks:  # the values are kept where the file has none: layers without an adapter
            stacks[id(slot.variable)] = slot.variable, _unfilled(slot.variable, key)
        place = slot.view(stacks[id(slot.variable)][1])
        place[...] = entry.read()
        if not np.isfinite(place).all():
            bad.append(entry.name)
    if bad:
        raise InputError(f"{file}: does not fit adapter_config.json and this base: NaN or infinity in {some(bad)}")
    for variable, stack in stacks.values():
        variable.set_value(jnp.asarray(stack))


def _unfilled(variable: nnx.Variable, key: str) -> np.ndarray:
    if key.endswith(".lora_magnitude_vector"):
        return np.array(on_host(variable[...]))
    return np.zeros(variable.shape, np.float32)


def _check_copy(model: Glm, copy: _Entry, file: Path) -> None:
    """Refuses a tensor that should repeat the embeddings or the head of the base and does not."""
    head = model.lm_head if "lm_head" in copy.name or "output_layer" in copy.name else None
    ours = on_host(head.kernel[...]).T if isinstance(head, Linear) else on_host(model.embed_tokens.embedding[...])
    if copy.shape != ours.shape or not np.array_equal(copy.read().astype(ours.dtype), ours):
        raise InputError(
            f"{file}: {copy.name} differs from this model's: the adapter was trained on another base, or trained this "
            "layer without saying so in modules_to_save; merge it with PEFT"
        )
