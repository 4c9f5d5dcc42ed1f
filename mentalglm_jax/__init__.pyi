from .checkpoints.adapters import load_adapter as load_adapter
from .checkpoints.adapters import save_adapter as save_adapter
from .checkpoints.directories import convert as convert
from .checkpoints.directories import load as load
from .checkpoints.directories import save_pretrained as save_pretrained
from .checkpoints.weights import RopeThetaWarning as RopeThetaWarning
from .errors import InputError as InputError
from .errors import MentalGLMError as MentalGLMError
from .errors import RunError as RunError
from .inference.generate import generate as generate
from .inference.scoring import label_ids as label_ids
from .inference.scoring import score_labels as score_labels
from .model.glm import Glm as Glm
from .model.glm import GlmConfig as GlmConfig
from .model.lora import LoraConfig as LoraConfig
from .model.lora import LoraParam as LoraParam
from .model.lora import add_lora as add_lora
from .model.lora import has_lora as has_lora
from .model.lora import merge_lora as merge_lora
from .model.lora import remove_lora as remove_lora
from .text.tokenizer import GlmTokenizer as GlmTokenizer

__version__: str
__all__ = [
    "Glm", "GlmConfig", "GlmTokenizer", "InputError", "LoraConfig", "LoraParam", "MentalGLMError", "RopeThetaWarning",
    "RunError", "add_lora", "convert", "generate", "has_lora", "label_ids", "load", "load_adapter", "merge_lora",
    "remove_lora", "save_adapter", "save_pretrained", "score_labels",
]  # fmt: skip
