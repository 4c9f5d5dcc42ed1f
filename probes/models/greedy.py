"""Greedy decoding, whatever the checkpoint's ``generation_config.json`` says.

transformers takes every setting that a call leaves open from that file: penalties on repetition, forbidden tokens,
beams, a limit on time. An answer is then not what the model finds likeliest, and the file is in no fingerprint. Of it
only the tokens that end an answer are taken (``stops_of``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def stops_of(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer: those of the generation config, else the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = tokenizer.eos_token_id if own is None else own
    return list(found) if isinstance(found, (list, tuple)) else [] if found is None else [found]


def continued(model: Any, ids: Any, mask: Any, most: int, stops: Sequence[int], pad_id: int) -> Any:
    """What a model writes after each row, greedily.

    Args:
        ids, mask: int ``[rows, tokens]``, padded on the left where the mask is 0.
        most: tokens of an answer. stops: ids that end one. pad_id: stands behind those that ended earlier.

    Returns:
        int ``[rows, tokens + answer]``.
    """
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False, max_new_tokens=most, eos_token_id=list(stops) or None, pad_token_id=pad_id
    )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, inner.generation_config = inner.generation_config, config
    try:
        with torch.no_grad():
            return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    finally:
        inner.generation_config = own
