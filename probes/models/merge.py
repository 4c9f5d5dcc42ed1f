"""A PEFT adapter folded into the weights it is on, and into those alone.

Where a model's head is its table of embeddings, an adapter on one of them is an adapter on that use. PEFT writes it
into the table that both use, where it acts twice. So such uses get a table of their own first. Whatever else merging
might change is told by what the model says before and after.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from probes.errors import ProbeInputError
from probes.foreign import foreign_code

# How far a logit may move, of the largest. Merging rounds each sum of weights once: tiny random models moved by 3e-6 in
# float32, 0.009 in float16 and 0.07 in bfloat16; where an adapter acted twice, by 0.05 to 10.
ROUNDING = {"float64": 1e-3, "float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
_TOKENS = 6


def merged(wrapped: Any, directory: Path) -> Any:
    """The model with its adapter in its weights; ``wrapped`` is used up.

    Raises:
        ProbeInputError: PEFT cannot merge it, or the merged model says something else.
    """
    with foreign_code(directory, "cannot merge this PEFT adapter"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tables that two use, which are apart by then; the logits are compared
        before = _logits(wrapped.eval())
        _untie(wrapped)
        model = wrapped.merge_and_unload(safe_merge=True).eval()
        after = _logits(model)
    moved, largest = float((after - before).abs().max()), float(before.abs().max())
    bound = ROUNDING[str(model.dtype).removeprefix("torch.")]
    # A model that says NaN by itself is told of by whoever asks it.
    if bool(before.isfinite().all()) and not moved <= bound * largest:
        raise ProbeInputError(
            f"{directory}: merged into the weights it gives other logits (by {moved:.2g} of {largest:.2g}); merge it "
            "with PEFT, compare, and give the merged model"
        )
    return model


def _untie(wrapped: Any) -> None:
    """Gives each adapted use of a shared weight a copy of its own, unless all uses share the adapter as well."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters: dict[int, set[int]] = {}
    for module in wrapped.modules():
        if isinstance(module, BaseTunerLayer):
            tied = getattr(module, "tied_adapter", None)
            adapters.setdefault(id(module.get_base_layer()), set()).add(id(module if tied is None else tied))
    uses: dict[int, list[tuple[Any, str]]] = {}
    for module in wrapped.modules():
        for name, weight in module.named_parameters(recurse=False):
            uses.setdefault(weight.data_ptr(), []).append((module, name))
    for shared in uses.values():
        owners = {frozenset(adapters.get(id(module), ())) for module, _ in shared}
        if len(shared) < 2 or len(owners) < 2:
            continue
        for module, name in shared:
            if id(module) in adapters:
                setattr(module, name, torch.nn.Parameter(getattr(module, name).detach().clone(), requires_grad=False))


def _logits(model: Any) -> Any:
    import torch

    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, size - 1, _TOKENS).long()[None]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
