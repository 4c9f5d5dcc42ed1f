"""The trial of a model before the first post: how far two ways to one number may differ, wherever they do."""

import itertools
from typing import Any

import pytest
import torch

from probes.errors import ProbeInputError
from probes.models.trial import BOUND, HALF_BOUND, STRETCH, _tried, stretches
from probes.probe import Probe
from probes.records import Example
from probes.saliency.settings import SMALLEST_CHANGE
from tests.probes.tiny import LABELS, make_model, make_row


class Drifting(torch.nn.Module):
    """A model whose logits at some positions are others when it is given embeddings."""

    def __init__(self, inner: torch.nn.Module, positions: range, by: float) -> None:
        super().__init__()
        self.inner, self.config, self.positions, self.by = inner, inner.config, positions, by

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, **inputs: Any) -> Any:
        out = self.inner(**inputs)
        if "inputs_embeds" in inputs:
            here = [at for at in self.positions if at < out.logits.shape[1]]
            out.logits[:, here] *= self.by
        return out


@pytest.fixture(scope="module")
def long(tiny_probe: Probe, tokenizer: Any) -> Example:
    """A row with an explanation of some hundred tokens."""
    row = make_row(tokenizer, 0, "en", "We had dinner. It was fine", "fine")
    said = " ".join(f"Sentence {n} of it says why 我." for n in range(20))
    output = f"\n{LABELS['en']['high']} Reasoning: {said}<|user|>"
    found = tiny_probe.encode(row | {"output_ids": tokenizer(output)["input_ids"], "parsed_explanation": said})
    segment = found.segment("explanation")
    assert segment is not None and segment.tok[1] - segment.tok[0] > 300
    return found


def test_stretches_cover_the_explanation_in_pieces_of_one_size(tiny_probe: Probe, long: Example) -> None:
    segment = long.segment("explanation")
    assert segment is not None
    names = stretches(long)
    spans = [tuple(map(int, name.removeprefix("explanation[").removesuffix("]").split(":"))) for name in names]
    assert spans[0][0] == 0 and spans[-1][1] == len(long.explanation or "")
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    sizes = []
    for a, b in spans:
        low, high = long.tokens_of((segment.char[0] + a, segment.char[0] + b), within=segment.tok)
        sizes.append(high - low)
    assert max(sizes) <= STRETCH + 4 and sum(sizes) >= segment.tok[1] - segment.tok[0]
    assert stretches(tiny_probe.encode({**_bare(long), "parsed_explanation": None})) == []


def _bare(example: Example) -> dict[str, Any]:
    return {"id": "x", "post": example.post, "prompt_ids": list(example.ids[: example.prompt_len]),
            "output_ids": list(example.ids[example.prompt_len :]), "label_text": example.label_text}  # fmt: skip


@pytest.mark.parametrize("at", [0, 150, -1])
def test_one_wrong_place_is_not_averaged_away(tokenizer: Any, long: Example, at: int) -> None:
    """One token of three hundred is off by some hundredths of a nat: its cited phrase would be another's."""
    segment = long.segment("explanation")
    assert segment is not None
    where = range(*segment.tok)[at] - 1
    probe = Probe(Drifting(make_model(tokenizer), range(where, where + 1), 1.01).eval(), tokenizer)
    probe.scorer.check(long)
    assert "log-odds from embeddings and from token ids differ by 0.0" in probe.scorer.can.on_ids


def test_what_is_spread_evenly_may_add_up(tokenizer: Any, long: Example) -> None:
    """Rounding in every token of a long explanation is no other computation, though its sum is beyond the bound."""
    segment = long.segment("explanation")
    assert segment is not None
    probe = Probe(Drifting(make_model(tokenizer), range(segment.tok[0], segment.tok[1]), 1 + 2e-6).eval(), tokenizer)
    probe.scorer.check(long)
    assert probe.scorer._checked == len(long.ids)


def test_the_bounds_mean_something() -> None:
    assert HALF_BOUND == 0.5 * SMALLEST_CHANGE and max(BOUND.values()) <= 0.01 * SMALLEST_CHANGE


def test_a_longer_row_that_can_only_be_probed_otherwise_is_refused_in_a_run(tokenizer: Any, long: Example) -> None:
    """The posts before it have maps of another kind, and the manifest and the report say how those were made."""
    probe = Probe(Drifting(make_model(tokenizer), range(200, 201), 1.01).eval(), tokenizer)
    probe.scorer.settle([probe.encode(make_row(tokenizer, 0, "en", "We had dinner. It was fine", "fine"))])
    assert not probe.scorer.can.limits
    with pytest.raises(ProbeInputError, match=r"this longer row can only be probed otherwise .*no maps from gradients"):
        probe.scorer.check(long)
    assert not probe.scorer.can.limits
    probe.scorer.settle([long])  # another run of the same model, from Python, may be of the other kind
    assert "gradients" in probe.scorer.can.limits


def test_a_run_is_settled_on_its_longest_row_and_on_its_longest_prefix(tokenizer: Any, long: Example) -> None:
    """No later row is tried any more: what it found would be of another kind than the maps before it."""
    probe = Probe(make_model(tokenizer), tokenizer)
    row = make_row(tokenizer, 0, "en", "We had dinner. It was fine", "fine")
    late = probe.encode(row | {"prompt_ids": [*row["prompt_ids"][:2] * 3, *row["prompt_ids"]]})
    assert len(late.ids) < len(long.ids) and late.post_tok[0] > long.post_tok[0]
    probe.scorer.settle([late, long])
    tried = probe.scorer.tried
    probe.scorer.check(late)
    probe.scorer.check(long)
    assert probe.scorer.tried is tried is not None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no room"), torch.AcceleratorError("an illegal access"), MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)  # fmt: skip
def test_what_fails_on_the_machine_is_not_the_models(error: Exception) -> None:
    def run() -> None:
        raise error

    with pytest.raises(type(error)):
        _tried("be scored", run)
    assert _tried("be scored", lambda: 1 // 0)[1].startswith("it cannot be scored (integer division")
