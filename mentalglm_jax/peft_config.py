"""PEFT's ``adapter_config.json`` <-> ``LoraConfig``. What PEFT can say and this model can not is refused by name."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mentalglm_jax.errors import InputError
from mentalglm_jax.glm import Glm
from mentalglm_jax.hf_files import some
from mentalglm_jax.lora import ALL_LINEAR, LoraConfig, linears

PEFT_VERSION = "0.21.2"
# Every key of PEFT's LoraConfig that this model has no counterpart for, with the values that switch it off.
SWITCHED_OFF: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "auto_mapping": (None,),
    "bias": ("none",),
    "corda_config": (None,),
    "ensure_weight_tying": (False,),
    "eva_config": (None,),
    "fan_in_fan_out": (False,),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "layers_pattern": (None, [], ""),
    "layers_to_transform": (None, []),
    "loftq_config": (None, {}),
    "lora_bias": (False,),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "velora_config": (None,),
}
# Keys that mean nothing for the weights, or that are read below.
UNDERSTOOD = {
    "alpha_pattern", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
# These initialisations change the base weights too, so the adapter alone is not the update PEFT trained.
BASE_CHANGING_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga")


def module_names(path: str, layers: int) -> list[str]:
    """transformers' names of one of our linears, layer by layer: ``model.layers.0.self_attn.q_proj`` ..."""
    if not path.startswith("layers."):
        return [path]
    return [f"model.layers.{layer}.{path.removeprefix('layers.')}" for layer in range(layers)]


def to_peft(config: LoraConfig, format: str, base: str | None) -> dict[str, Any]:
    """``adapter_config.json`` with every key PEFT writes; "vllm-split" names the two halves of ``gate_up_proj``."""

    def names(name: str) -> tuple[str, ...]:
        return ("gate_proj", "up_proj") if name == "gate_up_proj" and format == "vllm-split" else (name,)

    def number(value: float) -> int | float:
        return int(value) if value == int(value) else value

    off = {key: values[0] for key, values in SWITCHED_OFF.items()} | {"loftq_config": {}}
    written = off | {
        "alpha_pattern": {new: number(value) for name, value in config.alpha_pattern for new in names(name)},
        "base_model_name_or_path": base,
        "exclude_modules": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": number(config.alpha),
        "lora_dropout": config.dropout,
        "megatron_core": "megatron.core",
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "qalora_group_size": 16,
        "r": config.rank,
        "rank_pattern": {new: rank for name, rank in config.rank_pattern for new in names(name)},
        "revision": None,
        "target_modules": [new for name in config.target_modules for new in names(name)],
        "task_type": "CAUSAL_LM",
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }
    return dict(sorted(written.items()))


def from_peft(model: Glm, raw: Mapping[str, Any], file: Path) -> LoraConfig:
    """The ``LoraConfig`` that means the same on ``model`` as ``raw``, the content of ``file``.

    Raises:
        InputError: keys are missing or of the wrong type, ask for what this model does not have, or select modules,
            ranks or alphas that differ from layer to layer.
    """

    def refuse(reason: str) -> InputError:
        return InputError(f"{file}: {reason}")

    if raw.get("peft_type") != "LORA":
        raise refuse(f"peft_type is {raw.get('peft_type')!r}; only LORA adapters can be loaded")
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if raw.get(key) is None]:
        raise refuse(f"{some(missing)} missing; PEFT's defaults differ between versions, so they must be stated")
    unsupported = [
        f"{key}={value!r}"
        for key, value in raw.items()
        if (key in SWITCHED_OFF and value is not None and value not in SWITCHED_OFF[key])
        or (key not in SWITCHED_OFF and key not in UNDERSTOOD and value not in (None, False, [], {}))
    ]
    init = str(raw.get("init_lora_weights", True)).lower()
    if init.startswith(BASE_CHANGING_INIT):
        unsupported.append(f"init_lora_weights={init!r}")
    if unsupported:
        raise refuse(f"not supported: {some(unsupported, 8)}; merge the adapter with PEFT and load the merged model")
    for key, kinds in (("r", int), ("lora_alpha", int | float), ("lora_dropout", int | float), ("use_rslora", bool),
                       ("use_dora", bool), ("rank_pattern", dict), ("alpha_pattern", dict)):  # fmt: skip
        value = raw.get(key)
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool)):
            raise refuse(f"{key} has the wrong type, found {value!r}")
    try:
        targets = _targets(model, raw, refuse)
        ranks = {name: _pattern(raw.get("rank_pattern"), modules, raw["r"]) for name, modules in targets.items()}
        alphas = {
            name: _pattern(raw.get("alpha_pattern"), modules, raw["lora_alpha"]) for name, modules in targets.items()
        }
    except re.error as error:
        raise refuse(f"a pattern is not a regular expression ({error})") from error
    for what, found in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        kinds = int if what == "rank_pattern" else int | float
        for name, values in found.items():
            if len(values) > 1:
                raise refuse(f"{what} gives {name} different values in different layers ({some(map(str, values))})")
            if not all(isinstance(value, kinds) and math.isfinite(value) for value in values):
                raise refuse(f"{what} for {name} is {values.pop()!r}, not a number")
    rank, alpha = raw["r"], float(raw["lora_alpha"])
    listed = raw["target_modules"] if isinstance(raw["target_modules"], list) else []
    order = dict.fromkeys([name for name in listed if name in targets] + list(targets))
    rank_of = {name: min(values) for name, values in ranks.items()}
    alpha_of = {name: float(min(values)) for name, values in alphas.items()}
    try:
        return LoraConfig(
            rank=rank,
            alpha=alpha,
            dropout=float(raw.get("lora_dropout") or 0.0),
            target_modules=tuple(order),
            use_rslora=bool(raw.get("use_rslora")),
            use_dora=bool(raw.get("use_dora")),
            rank_pattern=tuple((name, rank_of[name]) for name in order if rank_of[name] != rank),
            alpha_pattern=tuple((name, alpha_of[name]) for name in order if alpha_of[name] != alpha),
        )
    except InputError as error:
        raise refuse(str(error)) from error


def _targets(model: Glm, raw: Mapping[str, Any], refuse: Callable[[str], InputError]) -> dict[str, list[str]]:
    """Our module name to all its names in transformers, for every module that the configuration selects."""
    wanted: Any = raw["target_modules"]
    excluded: Any = raw.get("exclude_modules")
    for key, value in (("target_modules", wanted), ("exclude_modules", excluded)):
        listed = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if not (listed or isinstance(value, str) or (value is None and key == "exclude_modules")):
            raise refuse(f"{key} must be a list of names or a regular expression, found {value!r}")
    if wanted == "all-linear":
        wanted = list(ALL_LINEAR)
    every = {path.rpartition(".")[2]: module_names(path, model.config.num_hidden_layers) for path, _ in linears(model)}
    if isinstance(wanted, list):
        modules = [*(module for names in every.values() for module in names), "model.embed_tokens"]
        if nowhere := [item for item in wanted if not any(_selects([item], module) for module in modules)]:
            hint = "; it was written for the chatglm layout" if "query_key_value" in nowhere else ""
            if {"gate_proj", "up_proj"} & set(nowhere):
                hint = "; it was written for vLLM, save it again with format='peft'"
            raise refuse(f"target_modules {some(nowhere)} not found in this model ({', '.join(every)}){hint}")
    if _selects(wanted, "model.embed_tokens") and not _selects(excluded, "model.embed_tokens"):
        raise refuse("target_modules selects embed_tokens; adapters on embeddings are not supported")
    targets = {}
    for name, modules in every.items():
        hits = [_selects(wanted, module) and not _selects(excluded, module) for module in modules]
        if any(hits) and not all(hits):
            raise refuse(
                f"target_modules selects {name} in {sum(hits)} of {len(hits)} layers; all or none is supported"
            )
        if all(hits):
            targets[name] = modules
    if not targets:
        raise refuse(f"target_modules {wanted!r} selects nothing in this model")
    return targets


def _selects(rule: list[str] | str | None, module: str) -> bool:
    """PEFT's matching: a string is a regular expression for the whole name, a list holds names or endings of names."""
    if not rule:
        return False
    if isinstance(rule, str):
        return re.fullmatch(rule, module) is not None
    return any(module == item or module.endswith(f".{item}") for item in rule)


def _pattern(patterns: Mapping[str, Any] | None, modules: list[str], default: Any) -> set[Any]:
    """The values that PEFT's pattern tables give to ``modules``: the first pattern that matches the end of a name."""
    values = set()
    for module in modules:
        hits = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
        values.add(next(hits, default))
    return values
