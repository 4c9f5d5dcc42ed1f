"""PEFT's ``adapter_config.json`` <-> ``LoraConfig``. What PEFT can say and this model cannot is refused by name."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import FLOAT32_MAX, Fields, short, some
from mentalglm_jax.model.lora import MAX_ENTRIES, MAX_RANK, LoraConfig, matches, selects

PEFT_VERSION = "0.21.2"
# Every key of PEFT's LoraConfig that this model has no counterpart for, with the values that switch it off.
SWITCHED_OFF: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none",),
    "corda_config": (None,),
    "ensure_weight_tying": (False,),
    "fan_in_fan_out": (False,),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "layers_pattern": (None, [], "", "layers", ["layers"]),
    "loftq_config": (None, {}),
    "lora_bias": (False,),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "velora_config": (None,),
}
# Keys that mean nothing for the weights, or that are read below. auto_mapping is the base's class, which PEFT writes
# when no task_type was given; eva_config says how A was initialised, with the base left as it is.
UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode",
    "init_lora_weights",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_dora", "use_rslora",
}  # fmt: skip
# These initialisations change the base weights too, so the adapter alone is not the update PEFT trained.
BASE_CHANGING_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga")


def to_peft(config: LoraConfig, base: str | None) -> dict[str, Any]:
    """``adapter_config.json`` with every key PEFT writes."""

    def number(value: float) -> int | float:
        return int(value) if value == int(value) else value

    def rule(value: tuple[str, ...] | str) -> list[str] | str | None:
        return value if isinstance(value, str) and value else list(value) or None

    off = {key: values[0] for key, values in SWITCHED_OFF.items()} | {"loftq_config": {}}
    off |= {"auto_mapping": None, "eva_config": None}
    layers = config.layers_to_transform
    written = off | {
        "alpha_pattern": {name: number(value) for name, value in config.alpha_pattern},
        "base_model_name_or_path": base,
        "exclude_modules": rule(config.exclude_modules),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None if layers is None else list(layers),
        "lora_alpha": number(config.alpha),
        "lora_dropout": config.dropout,
        "megatron_core": "megatron.core",
        "modules_to_save": list(config.modules_to_save) or None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "qalora_group_size": 16,
        "r": config.rank,
        "rank_pattern": dict(config.rank_pattern),
        "revision": None,
        "target_modules": rule(config.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }
    return dict(sorted(written.items()))


def from_peft(
    raw: Mapping[str, Any], file: Path, kind: type[LoraConfig] = LoraConfig, modules: Collection[str] | None = None
) -> LoraConfig:
    """The ``LoraConfig`` (or one of its subclasses) that says the same as ``raw``, the content of ``file``.

    PEFT passes over listed names that nothing in the model has, as long as there are others: the usual lists are for
    many models. So do we where ``modules``, the names of the model's modules, is given.

    Raises:
        InputError: keys are missing or of the wrong type, or ask for what this model does not have.
    """

    def refuse(reason: str) -> InputError:
        return InputError(f"{file}: {reason}")

    if raw.get("peft_type") != "LORA":
        raise refuse(f"peft_type is {short(raw.get('peft_type'))}; only LORA adapters can be loaded")
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if raw.get(key) is None]:
        raise refuse(f"{some(missing)} missing; PEFT's defaults differ between versions, so they must be stated")
    unsupported = [
        f"{short(key)[1:-1]}={short(value)}"
        for key, value in raw.items()
        if (key in SWITCHED_OFF and value is not None and value not in SWITCHED_OFF[key])
        or (key not in SWITCHED_OFF and key not in UNDERSTOOD and value not in (None, False, [], {}))
    ]
    init = str(raw.get("init_lora_weights", True)).lower()
    if init.startswith(BASE_CHANGING_INIT):
        unsupported.append(f"init_lora_weights={short(init)}")
    if unsupported:
        raise refuse(f"not supported: {some(unsupported, 8)}; merge the adapter with PEFT and load the merged model")
    read = Fields(raw, str(file))
    rank, alpha = read.integer("r", 1, MAX_RANK), read.number("lora_alpha")
    dropout = read.number("lora_dropout", 0.0, 1.0, 0.0)
    rslora, dora = read.flag("use_rslora", False), read.flag("use_dora", False)
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if not isinstance(raw.get(key), str) or key == "modules_to_save":
            read.texts(key, None, MAX_ENTRIES)
    layers = read.integers("layers_to_transform", -(1 << 31), 1 << 31, None)
    for key, low, high, kinds in (("rank_pattern", 1, MAX_RANK, (int,)),
                                  ("alpha_pattern", -FLOAT32_MAX, FLOAT32_MAX, (int, float))):  # fmt: skip
        for name, value in read.mapping(key, {}, MAX_ENTRIES).items():
            if type(value) not in kinds or not low <= value <= high:
                raise refuse(f"{key} for {short(name)} is {short(value)}, not a number from {low:g} to {high:g}")

    def rule(value: list[str] | str | None) -> tuple[str, ...] | str:
        if isinstance(value, str):
            return value
        here = [item for item in value or () if modules is None or any(selects((item,), name) for name in modules)]
        return tuple(here)

    def table(key: str) -> list[tuple[str, Any]]:
        pairs = list((raw.get(key) or {}).items())
        if modules is None:
            return pairs
        return [pair for pair in pairs if not pair[0].isidentifier() or any(matches(pair[0], name) for name in modules)]

    if raw["target_modules"] and not rule(raw["target_modules"]):
        raise refuse(f"target_modules {some(raw['target_modules'])} selects nothing in this model")
    try:
        return kind(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            target_modules=rule(raw["target_modules"]),
            exclude_modules=rule(raw.get("exclude_modules")),
            layers_to_transform=layers or None,
            modules_to_save=tuple(name.rpartition(".")[2] for name in raw.get("modules_to_save") or ()),
            use_rslora=rslora,
            use_dora=dora,
            rank_pattern=tuple(table("rank_pattern")),
            alpha_pattern=tuple((name, float(value)) for name, value in table("alpha_pattern")),
        )
    except InputError as error:
        raise refuse(str(error)) from error
