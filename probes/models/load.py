"""Reading a model directory and a PEFT adapter, refusing whatever would load wrongly without saying so."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probes.errors import ProbeInputError
from probes.foreign import Fields, foreign_code, plain
from probes.models.adapter import refuse_keys, with_adapter
from probes.models.directory import (
    ADAPTER_FILES,
    ADAPTER_WEIGHTS,
    DTYPES,
    Tensor,
    check_computed,
    check_model,
    check_size,
    locate,
)
from probes.models.merge import merged

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def load_model(
    model_dir: str | Path, adapter: str | Path | None = None, dtype: str = "float32", merge: bool = True
) -> tuple[Any, dict[str, list[str]]]:
    """Loads a causal LM and optionally a PEFT adapter, in evaluation mode, on the CPU.

    Returns:
        the model and ``{"missing_keys", "unexpected_keys"}``, both empty (anything else raises).
    Raises:
        ProbeInputError: the directory is missing, unsafe (``probes.models.directory``), not a causal LM, incomplete, or
            holds tensors nobody takes; so for the adapter, which PEFT itself would load silently as no adapter at all.
    """
    import torch
    import transformers
    from transformers.utils import logging

    if dtype not in _DTYPES:
        raise ProbeInputError(f"dtype {dtype!r}: not one of {', '.join(_DTYPES)}")
    directory = locate(model_dir)
    adapter = None if adapter is None else locate(adapter, ADAPTER_FILES)
    tensors = check_model(directory)
    config = _config(directory, tensors, adapter)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with foreign_code(model_dir, "cannot load a causal LM"):
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
            model, info = loaded
    finally:
        if bars:
            logging.enable_progress_bar()
    keys = {name: sorted(str(key) for key in info.get(name, ())) for name in ("missing_keys", "unexpected_keys")}
    refuse_keys(model_dir, keys)
    _check_weights(directory, model, tensors)
    if adapter is not None:
        model, keys = with_adapter(model, adapter)
        if merge:
            model = merged(model, adapter)
    return model.eval(), keys


def _check_weights(directory: Path, model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raises ``ProbeInputError`` where two tensors of the files are one weight of the model, or one holds no weights.

    transformers reads ``norm.weight``, ``model.norm.weight`` and ``model.model.norm.weight`` as one, and older names as
    newer ones; which of them it takes it does not say.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    prefix = f"{model.base_model_prefix}."

    def bare(name: str) -> str:
        while len(prefix) > 1 and name.startswith(prefix):
            name = name.removeprefix(prefix)
        return name

    with foreign_code(directory, "cannot tell which tensor is which weight"):
        # What a converter joins (experts, halves of a matrix) is several tensors by right.
        rules = [one for one in get_model_conversion_mapping(model) if not isinstance(one, WeightConverter)]
        own, parameters = Counter(map(bare, model.state_dict())), {bare(name) for name, _ in model.named_parameters()}
        found: dict[str, str] = {}
        for name in tensors:
            weight = name
            for rule in rules:
                weight, _ = rule.rename_source_key(weight)
            weight = bare(weight) if own[bare(weight)] < 2 else weight
            if (other := found.setdefault(weight, name)) != name:
                said = f"{plain(other, 120)} and {plain(name, 120)} are one weight of this model"
                raise ProbeInputError(f"{directory}: {said}; remove the one that is not meant")
            if (kind := tensors[name].dtype) not in DTYPES and bare(weight) in parameters:
                raise ProbeInputError(f"{directory}: {plain(name, 120)} holds {kind}, which are no weights")


def _config(directory: Path, tensors: dict[str, Tensor], adapter: Path | None) -> Any:
    """The model's configuration, with the rotary base that the adapter's file says it was trained with.

    PEFT does not look: a base whose config.json says another one would answer, and be explained, as another model. A
    model of these sizes is built without memory first, so that sizes no file has are refused and not allocated.
    """
    import torch
    import transformers

    with foreign_code(directory, "cannot load a causal LM"):
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        config._attn_implementation = None  # flex_attention answers as another model than it scores as
        check_computed(directory, config)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    check_size(directory, model, tensors)
    theta = None if adapter is None else _trained_theta(adapter)
    if theta is None:
        return config
    if not isinstance(getattr(config, "rope_parameters", None), dict):
        raise ProbeInputError(f"{adapter}: trained with rope_theta {theta}, but {directory} has no rotary positions")
    config.rope_parameters["rope_theta"] = theta
    return config


def _trained_theta(adapter: Path) -> float | None:
    """The rotary base that an adapter of ours states; what else is wrong with the directory is said when it is read."""
    from safetensors import safe_open

    file = adapter / ADAPTER_WEIGHTS
    if not file.is_file():
        return None
    with foreign_code(adapter, "cannot load this PEFT adapter"), safe_open(file, framework="pt") as opened:
        stated = (opened.metadata() or {}).get("rope_theta")
    try:
        value = None if stated is None else float(stated)
    except ValueError:
        value = stated
    return Fields({"rope_theta": value}, file).number("rope_theta", 1.0, 1e12)
