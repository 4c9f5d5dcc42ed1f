"""What other trainers write into adapters that does not change what they compute: left out before they are read.

``probes.models.adapter`` has the same two tables (the packages do not import each other; a test compares them).
"""

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

# Keys of adapter_config.json that say only how it was trained.
TRAINING_ONLY = frozenset({"lora_dtype", "lorap_emb_lr", "lorap_lr_ratio"})  # ms-swift 2
# Tensors that repeat the base, by the end of their name: taken when equal to it. ``save_embedding_layers=True`` stores
# the embeddings, an adapter on one of them its base layer.
_NAMES = ("embed_tokens", "lm_head", "word_embeddings", "output_layer", "wte", "embed_in", "embed_out", "embeddings")
BASE_COPIES = tuple(f"{name}.{end}" for name in _NAMES for end in ("weight", "base_layer.weight"))


def as_computed(raw: Mapping[str, Any], names: Collection[str], file: Path) -> dict[str, Any]:
    """``adapter_config.json`` without what has no say in the weights: training-only keys, ranks written as ``4.0``.

    Args:
        names: the tensors of the adapter.
    Warns:
        UserWarning: trained biases were not saved with it (PEFT 0.13); the base's are used, as PEFT itself does.
    """

    def whole(value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    read = {key: value for key, value in raw.items() if key not in TRAINING_ONLY}
    if "r" in read:
        read["r"] = whole(read["r"])
    if isinstance(read.get("rank_pattern"), dict):
        read["rank_pattern"] = {name: whole(value) for name, value in read["rank_pattern"].items()}
    biases = any(name.endswith(".bias") and ".lora_" not in name for name in names)
    if read.get("bias") == "lora_only" and not biases:
        said = f"{file}: bias is lora_only, but PEFT did not save the biases (as 0.13 did); the base's are used"
        warnings.warn(said, stacklevel=3)
        read["bias"] = "none"
    return read


def base_copies(names: Collection[str], saved: Any) -> list[str]:
    """The tensors that repeat the base, but for those of modules that were trained whole (``modules_to_save``)."""
    whole = {str(name).rpartition(".")[2] for name in saved} if isinstance(saved, list) else set()
    copies = [name for name in names if name.endswith(BASE_COPIES) and ".lora_" not in name]
    return [name for name in copies if not whole & set(name.split("."))]
