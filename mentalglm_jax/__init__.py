"""GLM-4 in JAX for interpretable mental-health analysis: load, fine-tune with LoRA, generate, export.

    import mentalglm_jax as mg
    model = mg.load("path/to/glm-4-9b-chat-hf", adapter="path/to/adapter")

Names are imported on first use, so that importing the package costs nothing and touches no device.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mentalglm_jax.adapters import load_adapter, save_adapter
    from mentalglm_jax.checkpoints import convert, load, save_pretrained
    from mentalglm_jax.errors import InputError, MentalGLMError, RunError
    from mentalglm_jax.generate import generate
    from mentalglm_jax.glm import Glm, GlmConfig
    from mentalglm_jax.lora import LoraConfig, LoraParam, add_lora, has_lora, merge_lora, remove_lora
    from mentalglm_jax.tokenizer import GlmTokenizer
    from mentalglm_jax.weights import RopeThetaWarning

__version__ = "0.1.0"

_ROOMS = {
    "adapters": ("load_adapter", "save_adapter"),
    "checkpoints": ("convert", "load", "save_pretrained"),
    "errors": ("InputError", "MentalGLMError", "RunError"),
    "generate": ("generate",),
    "glm": ("Glm", "GlmConfig"),
    "lora": ("LoraConfig", "LoraParam", "add_lora", "has_lora", "merge_lora", "remove_lora"),
    "tokenizer": ("GlmTokenizer",),
    "weights": ("RopeThetaWarning",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "Glm", "GlmConfig", "GlmTokenizer", "InputError", "LoraConfig", "LoraParam", "MentalGLMError", "RopeThetaWarning",
    "RunError", "add_lora", "convert", "generate", "has_lora", "load", "load_adapter", "merge_lora", "remove_lora",
    "save_adapter", "save_pretrained",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Face(types.ModuleType):
    """Importing the room ``generate`` would put the module where the function ``generate`` belongs; it may not."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _ROOM_OF and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
