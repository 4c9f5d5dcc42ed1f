"""Reading a model directory and a PEFT adapter, refusing whatever would load wrongly without saying so."""

import warnings
from pathlib import Path
from typing import Any

from probes.errors import ProbeInputError

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def load_tokenizer(model_dir: str | Path) -> Any:
    """The model directory's fast tokenizer.

    Raises:
        ProbeInputError: there is none, or it needs remote code.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ProbeInputError(f"{model_dir}: no usable tokenizer ({_first_line(error)})") from error
    if not tokenizer.is_fast:
        raise ProbeInputError(f"{model_dir}: only a slow tokenizer; save a tokenizer.json beside the model")
    return tokenizer


def load_model(
    model_dir: str | Path, adapter: str | Path | None = None, dtype: str = "float32", merge: bool = True
) -> tuple[Any, dict[str, list[str]]]:
    """Loads a causal LM and optionally a PEFT adapter, in evaluation mode, on the CPU.

    Returns:
        the model and ``{"missing_keys", "unexpected_keys"}``, both empty (anything else raises).
    Raises:
        ProbeInputError: the directory is missing, not a causal LM, incomplete, or holds tensors nobody takes; so for
            the adapter, which PEFT itself would load silently as no adapter at all.
    """
    import torch
    import transformers

    if dtype not in _DTYPES:
        raise ProbeInputError(f"dtype {dtype!r}: not one of {', '.join(_DTYPES)}")
    config = _config(model_dir, adapter)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model_dir,
            config=config,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, info = loaded
    except Exception as error:  # transformers and safetensors raise a dozen types for a bad directory
        raise ProbeInputError(f"{model_dir}: cannot load a causal LM ({_first_line(error)})") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    keys = {name: sorted(str(key) for key in info.get(name, ())) for name in ("missing_keys", "unexpected_keys")}
    _refuse_keys(model_dir, keys)
    if adapter is not None:
        model, keys = _with_adapter(model, adapter)
        if merge:
            model = model.merge_and_unload(safe_merge=True)
    return model.eval(), keys


def _config(model_dir: str | Path, adapter: str | Path | None) -> Any:
    """The model's configuration, with the rotary base that the adapter's file says it was trained with.

    PEFT does not look: a base whose config.json says another one would answer, and be explained, as another model.
    """
    import transformers
    from safetensors import SafetensorError, safe_open

    try:
        config = transformers.AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    except Exception as error:  # as below
        raise ProbeInputError(f"{model_dir}: cannot load a causal LM ({_first_line(error)})") from error
    file = Path(adapter) / "adapter_model.safetensors" if adapter is not None else None
    if file is None or not file.exists():
        return config
    try:
        with safe_open(file, framework="pt") as opened:
            stated = (opened.metadata() or {}).get("rope_theta")
        theta = None if stated is None else float(stated)
    except (SafetensorError, OSError, ValueError) as error:
        raise ProbeInputError(f"{adapter}: cannot load this PEFT adapter ({_first_line(error)})") from error
    if theta is None:
        return config
    if not isinstance(getattr(config, "rope_parameters", None), dict):
        raise ProbeInputError(f"{adapter}: trained with rope_theta {theta}, but {model_dir} has no rotary positions")
    config.rope_parameters["rope_theta"] = theta
    return config


def _with_adapter(model: Any, adapter: str | Path) -> tuple[Any, dict[str, list[str]]]:
    import peft
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT only warns about missing keys; the comparison below refuses them
            wrapped = peft.PeftModel.from_pretrained(model, str(adapter))
            stored = peft.load_peft_weights(str(adapter), device="cpu")
    except Exception as error:  # as above: KeyError, ValueError, RuntimeError, OSError, SafetensorError ...
        raise ProbeInputError(f"{adapter}: cannot load this PEFT adapter ({_first_line(error)})") from error
    loaded = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    keys = {
        "missing_keys": sorted(set(loaded) - set(stored)),
        "unexpected_keys": sorted(set(stored) - set(loaded)),
    }
    _refuse_keys(adapter, keys)
    changed = [key for key in stored if not torch.equal(loaded[key].float().cpu(), stored[key].float())]
    if changed:
        raise ProbeInputError(f"{adapter}: PEFT did not take {len(changed)} tensors as stored, first {changed[0]}")
    return wrapped, keys


def _refuse_keys(where: str | Path, keys: dict[str, list[str]]) -> None:
    for kind, names in keys.items():
        if names:
            what = kind.removesuffix("_keys")
            raise ProbeInputError(f"{where}: {len(names)} {what} tensors, first {names[0]}; export it again")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
