"""The probed model: loaded from files, able to lay out a generated row and to score it. What checks and maps take."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from probes.errors import ProbeInputError, RowRefused
from probes.models.directory import locate
from probes.models.encode import encode
from probes.models.load import load_model
from probes.models.loaded import LoadedModel
from probes.models.score import Scorer
from probes.models.tokenizer import load_tokenizer
from probes.records import Example

P = TypeVar("P", bound="Probed")


class Probed(LoadedModel):
    """A loaded model with its scoring engine.

    Attributes:
        scorer: the batched scoring engine over ``model``.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "model") -> None:
        """Takes a model already in memory.

        Raises:
            ProbeError: the model is in training mode (dropout would make every attribution noise).
        """
        super().__init__(model, tokenizer, name)
        self.scorer = Scorer(self)

    @classmethod
    def from_pretrained(
        cls: type[P],
        model_dir: str | Path,
        adapter: str | Path | None = None,
        dtype: str = "float32",
        merge: bool = True,
        device: str = "cpu",
    ) -> P:
        """Loads a Hugging Face causal LM, safetensors only and never with remote code.

        Args:
            model_dir: directory or Hub name with config, weights and tokenizer.
            adapter: PEFT adapter over it, directory or Hub id; every tensor it should have must be there and no other.
            dtype: float32 | bfloat16 | float16 | float64, of weights and computation.
            merge: fold the adapter into the weights (same outputs, faster).
            device: torch device name.
        Raises:
            ProbeInputError: files missing, unreadable or incomplete, unknown dtype.
        """
        model, _ = load_model(model_dir, adapter, dtype, merge)
        name = str(model_dir) if adapter is None else f"{model_dir} + {adapter}"
        return cls(model.to(device), load_tokenizer(locate(model_dir)), name)

    def encode(self, row: dict[str, Any]) -> Example:
        """Lays out one row of generations.jsonl (``probes.models.encode.encode``).

        Raises:
            RowRefused: nothing can be done with this row; it does not fit the model's context.
            ProbeInputError: it is no such row, or of another model (ids that this one does not have).
        """
        example = encode(row, self.token_bytes)
        vocab = self.model.get_input_embeddings().weight.shape[0]  # an adapter on them has no num_embeddings
        if max(example.ids) >= vocab:
            raise ProbeInputError(
                f"row {example.id!r}: token id {max(example.ids)} but the model has {vocab} embeddings"
            )
        context = getattr(self.model.config, "max_position_embeddings", None)
        if isinstance(context, int) and 0 < context < len(example.ids):  # XLNet says -1: there is no limit
            said = f"{len(example.ids)} tokens but the model's context is {context}"
            raise RowRefused(example.id, said, "longer than the model's context")
        return example
