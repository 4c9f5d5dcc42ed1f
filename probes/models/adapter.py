"""A PEFT LoRA adapter over a model: read strictly, given to PEFT without anything that could surprise it.

PEFT itself loads a half or an empty adapter with a warning at most, ignores keys it does not know, and runs regular
expressions of the file on a backtracking engine. So the configuration is read and checked here, expressions are matched
in linear time and become lists of names, ranks are compared with the shapes in the file before anything is allocated,
and every tensor is accounted for both ways.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from probes.errors import ProbeInputError, ProbeWarning
from probes.foreign import Fields, foreign_code, plain, some
from probes.models.directory import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DTYPES, Tensor, check_adapter
from probes.models.patterns import ending, linear

PREFIX = "base_model.model."
# Two tables that mentalglm_jax.checkpoints.peft_keys has as well (the packages do not import each other; a test
# compares them). Keys of adapter_config.json that say only how it was trained.
TRAINING_ONLY = frozenset({"lora_dtype", "lorap_emb_lr", "lorap_lr_ratio"})  # ms-swift 2
# Tensors that repeat the base, by the end of their name: taken when equal to it. ``save_embedding_layers=True`` stores
# the embeddings, an adapter on one of them its base layer.
_NAMES = ("embed_tokens", "lm_head", "word_embeddings", "output_layer", "wte", "embed_in", "embed_out", "embeddings")
BASE_COPIES = tuple(f"{name}.{end}" for name in _NAMES for end in ("weight", "base_layer.weight"))

# As PEFT names them; what is probed is a causal model whatever it says.
_TASKS = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_MAX_RANK = 1 << 16
_MAX_ALPHA = 1e6
_MAX_PATTERNS = 10_000
_PLAIN = re.compile(r"[\w.-]{1,300}")
# What PEFT can say and is not offered here: code by name, or another computation than the weights alone. With the
# values that switch it off.
_SWITCHED_OFF: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "velora_config": (None,),
}
_EMBEDDED = ".lora_embedding_A"  # LoRA's A where it is on embeddings: no module of its own
_SWITCHES = ("ensure_weight_tying", "fan_in_fan_out", "lora_bias", "use_dora", "use_rslora")
# Keys without a say in the loaded weights.
_IGNORED = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "init_lora_weights",
    "loftq_config", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
})  # fmt: skip
_READ = frozenset({
    "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "r", "rank_pattern", "target_modules",
    "target_parameters", "trainable_token_indices", "use_dora", "use_rslora",
})  # fmt: skip


def with_adapter(model: Any, directory: Path) -> tuple[Any, dict[str, list[str]]]:
    """The model with the adapter on it, not merged.

    Returns:
        the PEFT model and ``{"missing_keys", "unexpected_keys"}``, both empty (anything else raises).
    Warns:
        ProbeWarning: trained biases were not saved with it (PEFT 0.13).
    Raises:
        ProbeInputError: the directory or a key is not usable, or tensors do not fit the model and each other.
    """
    import peft
    import torch
    from safetensors.torch import load_file

    raw, tensors = check_adapter(directory)
    copies = _base_copies(model, directory, tensors, _saved(model, Fields(raw, directory / ADAPTER_CONFIG)))
    tensors = {name: one for name, one in tensors.items() if name not in copies}
    settings = read_config(raw, directory / ADAPTER_CONFIG, [name for name, _ in model.named_modules()], tensors)
    if odd := [name for name, one in tensors.items() if one.dtype not in DTYPES]:
        raise ProbeInputError(f"{directory / ADAPTER_WEIGHTS}: {some(odd)}: dtype {tensors[odd[0]].dtype}")
    with foreign_code(directory, "cannot load this PEFT adapter"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT only warns about missing keys; the comparison below refuses them
        config = peft.LoraConfig(**settings)
        wrapped = peft.PeftModel.from_pretrained(model, str(directory), config=config)
        stored = {k: v for k, v in load_file(directory / ADAPTER_WEIGHTS).items() if k not in copies}
        loaded = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    keys = {
        "missing_keys": sorted(set(loaded) - set(stored)),
        "unexpected_keys": sorted(set(stored) - set(loaded)),
    }
    refuse_keys(directory, keys)
    if bad := [key for key, value in stored.items() if not torch.isfinite(value).all()]:
        raise ProbeInputError(f"{directory / ADAPTER_WEIGHTS}: NaN or infinity in {some(bad)}; its training diverged")
    # Layers saved whole are in the model's precision, as the model is.
    changed = [k for k, v in stored.items() if not torch.equal(loaded[k].float().cpu(), v.to(loaded[k].dtype).float())]
    if changed:
        raise ProbeInputError(f"{directory}: PEFT did not take {len(changed)} tensors as stored, first {changed[0]}")
    return wrapped, keys


def refuse_keys(where: str | Path, keys: dict[str, list[str]]) -> None:
    """Raises ``ProbeInputError`` when any tensor is missing or nobody's."""
    for kind, names in keys.items():
        if names:
            what = kind.removesuffix("_keys")
            raise ProbeInputError(f"{where}: {len(names)} {what} tensors, first {plain(names[0])}; export it again")


def read_config(
    raw: dict[str, Any], path: Path, modules: Collection[str], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """The arguments of ``peft.LoraConfig`` that say the same as ``raw``, with expressions resolved to names.

    Args:
        modules: the names of all modules of the model.
        tensors: what the adapter's file holds, copies of the base left out.
    Raises:
        ProbeInputError: a key is unknown, of the wrong type or out of range, or does not fit ``tensors``.
    """
    fields = Fields(raw, path)
    if raw.get("peft_type") != "LORA":
        fields.refuse("peft_type", "only LORA adapters can be probed; merge it with PEFT and give the merged model")
    task = fields.text("task_type")
    if task is not None and task not in _TASKS:
        fields.refuse("task_type", "none that PEFT knows: the adapter is for another program")
    off = [key for key, values in _SWITCHED_OFF.items() if raw.get(key) is not None and raw[key] not in values]
    known = _SWITCHED_OFF.keys() | _IGNORED | _READ | TRAINING_ONLY
    off += [key for key, value in raw.items() if key not in known and value not in (None, False, [], {})]
    if off:
        raise ProbeInputError(f"{path}: not supported: {some(off, 8)}; merge it with PEFT and give the merged model")
    bias = fields.text("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        fields.refuse("bias", "must be none, all or lora_only")
    if bias == "lora_only" and not any(name.endswith(".bias") and ".lora_" not in name for name in tensors):
        said = f"{path}: bias is lora_only, but PEFT did not save the biases (as 0.13 did); the base's are used"
        warnings.warn(said, ProbeWarning, stacklevel=3)
        bias = "none"
    settings: dict[str, Any] = {"bias": bias, "init_lora_weights": _initialised(fields), "inference_mode": True}
    settings |= {key: fields.boolean(key) for key in _SWITCHES}
    settings |= {key: _names(fields, key, modules) for key in ("target_modules", "exclude_modules")}
    settings |= {key: _plain(fields, key) or None for key in ("modules_to_save", "target_parameters")}
    layers = raw.get("layers_pattern")
    settings["layers_pattern"] = _plain(Fields({"layers_pattern": [layers]}, path), "layers_pattern") if isinstance(
        layers, str) and layers else _plain(fields, "layers_pattern") or None  # fmt: skip
    settings["layers_to_transform"] = _integers(fields, "layers_to_transform")
    tokens = raw.get("trainable_token_indices")
    for part in tokens.values() if isinstance(tokens, dict) else [tokens]:
        _integers(Fields({"trainable_token_indices": part}, path), "trainable_token_indices")
    settings["trainable_token_indices"] = tokens or None
    settings["lora_alpha"] = fields.number("lora_alpha", 0, _MAX_ALPHA, 8)
    settings |= _ranks(fields, modules, tensors)
    for name, value in fields.table("alpha_pattern").items():
        Fields({name: value}, f"{path}: alpha_pattern").number(name, 0, _MAX_ALPHA, None)
    settings["alpha_pattern"] = _resolved(fields, "alpha_pattern", modules)
    settings["task_type"] = "CAUSAL_LM"
    return settings


def _initialised(fields: Fields) -> bool | str:
    """How the adapter began matters only where that changes the base as well, which PEFT then does again."""
    value = fields.values.get("init_lora_weights", True)
    if not isinstance(value, (str, bool, type(None))):
        fields.refuse("init_lora_weights", "must be true, false or a name")
    name = str(value).lower()
    if name.startswith(("pissa", "olora")):
        if not re.fullmatch(r"pissa(_niter_\d{1,3})?|olora", name):
            fields.refuse("init_lora_weights", "no initialisation that PEFT knows")
        return name
    if name.startswith(("corda", "loftq", "lora_ga")):
        fields.refuse("init_lora_weights", "changes the base, too; merge it with PEFT and give the merged model")
    return True


def _names(fields: Fields, key: str, modules: Collection[str]) -> list[str] | str | None:
    """A list of names as it is; an expression as the list of the modules that it matches whole."""
    value = fields.values.get(key)
    if isinstance(value, str) and value.lower() != "all-linear" and value:
        matches = linear(value, f"{fields.where}: {key}").fullmatch
        found = [name for name in modules if name and matches(name)]
        if not found and key == "target_modules":
            fields.refuse(key, "matches no module of this model")
        return found or None
    return value if isinstance(value, str) and value else list(fields.texts(key)) or None


def _plain(fields: Fields, key: str) -> list[str]:
    """Names that PEFT puts into expressions of its own."""
    names = fields.texts(key)
    if not all(_PLAIN.fullmatch(name) for name in names):
        fields.refuse(key, "must hold module names only")
    return list(names)


def _integers(fields: Fields, key: str) -> list[int] | None:
    value: Any = fields.values.get(key)
    listed = [value] if type(value) is int else [] if value is None else value
    if not (isinstance(listed, list) and all(type(one) is int and 0 <= one < 2**31 for one in listed)):
        fields.refuse(key, "must be a list of whole numbers")
    return listed or None


def _ranks(fields: Fields, modules: Collection[str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """``r`` and ``rank_pattern``, compared with the shapes in the file: PEFT allocates what they say."""
    rank = fields.integer("r", 1, _MAX_RANK, 8) or 8
    pattern = fields.table("rank_pattern")
    ranks = {n: Fields({n: v}, f"{fields.where}: rank_pattern").integer(n, 1, _MAX_RANK, 8) for n, v in pattern.items()}
    rules = [(ending(key, f"{fields.where}: rank_pattern"), value) for key, value in ranks.items()]
    if len(rules) > _MAX_PATTERNS:
        fields.refuse("rank_pattern", f"has more than {_MAX_PATTERNS} rules")
    # PEFT gives a tied head the rank of the embeddings, whatever its own is said to be.
    tied = {one.shape[0] for name, one in tensors.items() if name.endswith(_EMBEDDED) and one.shape}
    tied = tied if fields.boolean("ensure_weight_tying") else set()
    held = set()
    for key, tensor in tensors.items():
        name, found, _ = key.removeprefix(PREFIX).replace(_EMBEDDED, ".lora_A.").partition(".lora_A.")
        if not found or len(tensor.shape) != 2:
            continue
        stated = next((value for rule, value in rules if rule.fullmatch(name)), rank)
        if stated != tensor.shape[0] and tensor.shape[0] not in tied:
            raise ProbeInputError(
                f"{fields.where}: says rank {stated} for {plain(name)}, the file has {tensor.shape[0]}: not the same "
                "adapter"
            )
        held.add(tensor.shape[0])
    wrong = [value for value in ranks.values() if held and value is not None and value > max(held)]
    if wrong:
        fields.refuse("rank_pattern", f"says rank {wrong[0]}, the largest in the file is {max(held)}")
    # A rank that no tensor has is nobody's (all are in rank_pattern); PEFT must not allocate it for a module it finds.
    return {"r": min(rank, max(held, default=rank)), "rank_pattern": _resolved(fields, "rank_pattern", modules, ranks)}


def _resolved(
    fields: Fields, key: str, modules: Collection[str], values: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A table of expressions as PEFT may have it: names alone, or one entry per module that an expression matches."""
    table = fields.table(key) if values is None else values
    if len(table) > _MAX_PATTERNS:
        fields.refuse(key, f"has more than {_MAX_PATTERNS} rules")
    if all(_PLAIN.fullmatch(name) for name in table):
        return dict(table)
    rules = [(ending(name, f"{fields.where}: {key}"), value) for name, value in table.items()]
    found = ((name, next((v for rule, v in rules if rule.fullmatch(name)), None)) for name in modules if name)
    return {re.escape(name): value for name, value in found if value is not None}


def _saved(model: Any, fields: Fields) -> set[str]:
    """The last parts of the names that are trained and stored whole, with those that PEFT ties to them."""
    saved = {name.rpartition(".")[2] for name in fields.texts("modules_to_save")}
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {name.split(".")[-2] for pair in pairs.items() for name in pair if "." in name}
    return saved | tied if fields.boolean("ensure_weight_tying") and saved & tied else saved


def _base_copies(model: Any, directory: Path, tensors: dict[str, Tensor], saved: set[str]) -> set[str]:
    """The tensors that repeat the base.

    Raises:
        ProbeInputError: one differs from it: another base, or a change that the configuration does not tell of.
    """
    import torch
    from safetensors import safe_open

    base, found = model.state_dict(), set()
    for name, tensor in tensors.items():
        inner = name.removeprefix(PREFIX)
        if not inner.endswith(BASE_COPIES) or ".lora_" in inner or saved & set(inner.split(".")):
            continue
        ours = base.get(inner.replace(".base_layer.", "."))
        if ours is None:
            continue
        with foreign_code(tensor.file, "cannot read"), safe_open(tensor.file, framework="pt") as opened:
            theirs = opened.get_tensor(name)
        if theirs.shape != ours.shape or not torch.equal(theirs.to(ours.dtype), ours.cpu()):
            raise ProbeInputError(
                f"{tensor.file}: {plain(name)} differs from this model's: the adapter was trained on another base, or "
                "trained this layer without saying so in modules_to_save; merge it with PEFT"
            )
        found.add(name)
    return found
