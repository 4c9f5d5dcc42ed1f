"""A causal language model in memory, frozen, with its tokenizer: what it is, not what it computes."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

from probes.errors import ProbeError, ProbeInputError
from probes.models.token_bytes import TokenBytes
from probes.models.tokenizer import tokenizer_digest


class LoadedModel:
    """Weights frozen, evaluation mode, fast tokenizer.

    Attributes:
        model: a transformers causal LM (or a PEFT model over one); nothing in it requires a gradient.
        tokenizer: a transformers fast tokenizer.
        token_bytes: the bytes of each of its ids.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "model") -> None:
        """Takes a model already in memory.

        Raises:
            ProbeError: the model is in training mode (dropout would make every attribution noise).
        """
        if any(module.training for module in model.modules()):
            raise ProbeError(f"{name}: the model is in training mode; call model.eval() first")
        # Frozen weights save a third of the activations a backward pass keeps.
        model.requires_grad_(False)
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.token_bytes = TokenBytes(tokenizer)

    @property
    def device(self) -> Any:
        """The torch device the weights are on."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> Any:
        """The torch dtype the model computes in."""
        return self.model.get_input_embeddings().weight.dtype

    @functools.cached_property
    def pad_id(self) -> int:
        """The neutral token of baselines and erasure: the pad token, else the first end-of-sequence token."""
        if (found := self._pad_id()) is not None:
            return found
        raise ProbeInputError(
            f"{self.name}: no pad or end-of-sequence token to erase with; set pad_token in the tokenizer"
        )

    def _pad_id(self) -> int | None:
        for owner in (self.tokenizer, self.model.config):
            for name in ("pad_token_id", "eos_token_id"):
                value = getattr(owner, name, None)
                value = value[0] if isinstance(value, (list, tuple)) and value else value
                if isinstance(value, int):
                    return value
        return None

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits over the configuration and every weight as it is in memory (adapter included), and over the
        tokenizer: it says which ids the other candidates and the fillers are, and which one erases."""
        import torch

        digest = hashlib.blake2b(digest_size=8)
        config = self.model.config.to_json_string(use_diff=True)
        digest.update(config.encode())
        digest.update(f"{self._pad_id()} {tokenizer_digest(self.tokenizer)}".encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()
