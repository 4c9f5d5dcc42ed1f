"""Attribution: known truths, and proof that the tests would notice the usual mistakes."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients

import probes.models.pack
import probes.saliency.attribute
import probes.saliency.gradients
from probes.citations.clauses import clauses
from probes.errors import ProbeInputError
from probes.models.forward import Forward
from probes.probe import Probe
from probes.records import Attribution, Example
from probes.saliency.attribute import Settings, attribute
from probes.validation.selftest import closed_form_probe
from tests.probes.planted import planted_rows, train_planted

TARGETS = ("label", "explanation")


@pytest.fixture(scope="module")
def planted() -> Probe:
    return train_planted(steps=80)


@pytest.fixture(scope="module")
def examples(planted: Probe) -> list[Example]:
    return [planted.encode(row) for row in planted_rows(planted.tokenizer, 6, seed=9)]


def clause_auroc(found: Attribution, example: Example) -> float:
    """Share of (cue clause, other clause) pairs in which the cue clause has more attribution."""
    spans = clauses(example.post)
    values = np.array([found.char_values[a:b].sum() for a, b in spans])
    assert example.cues is not None
    hit = np.array([any(a < end and start < b for start, end in example.cues) for a, b in spans])
    differences = values[hit][:, None] - values[~hit]
    return float(((differences > 0) + 0.5 * (differences == 0)).mean())


def mean_auroc(probe: Probe, examples: list[Example], method: str, target: str) -> float:
    return float(np.mean([clause_auroc(attribute(probe, e, (method,), (target,))[0], e) for e in examples]))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", ["ig", "erase"])
def test_planted_cue_is_found(planted: Probe, examples: list[Example], method: str, target: str) -> None:
    assert mean_auroc(planted, examples, method, target) >= 0.95


def test_shifted_post_is_noticed(planted: Probe, examples: list[Example]) -> None:
    """With every token taken for the one seven places on, a clause, the planted cue is no longer found."""
    shifted = []
    for example in examples:
        first, last = example.post_tok
        moved = [dataclasses.replace(s, tok=(first - 7, last - 7)) if s.name == "post" else s for s in example.segments]
        spans = (*example.byte_spans[7:], *example.byte_spans[-7:])
        shifted.append(dataclasses.replace(example, segments=tuple(moved), byte_spans=spans))
    assert mean_auroc(planted, shifted, "ig", "label") < 0.8


def test_erasure_without_a_mask_is_noticed(
    planted: Probe, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = probes.models.pack.attention_mask
    monkeypatch.setattr("probes.models.forward.attention_mask", lambda plan, keep, *rest: whole(plan, None, *rest))
    assert mean_auroc(planted, examples, "erase", "label") < 0.95


def completeness_error(probe: Probe, example: Example, settings: Settings) -> float:
    """IG's sum against the score change of really replacing the post's tokens by the pad token."""
    first, last = example.post_tok
    blank = (*example.ids[:first], *[probe.pad_id] * (last - first), *example.ids[last:])
    scores = []
    for ids in (example.ids, blank):
        start, label, others, _ = probe.scorer.label_ids(example)
        found = probe.scorer.logprobs([[*ids[:start], *rest] for rest in (label, *others)], [start] * (1 + len(others)))
        scores.append(float(found[0] - found[1:].logsumexp(-1)))
    found = attribute(probe, example, ("ig",), ("label",), settings)[0]
    return abs(found.values.sum() - (scores[0] - scores[1])) / abs(scores[0] - scores[1])


def test_completeness_against_replaced_tokens(planted: Probe, examples: list[Example]) -> None:
    # an untrained pad row is zero, where no wrong baseline could be told from the right one
    pad = planted.model.get_input_embeddings().weight.data[planted.pad_id]
    pad.copy_(torch.randn_like(pad) * 0.05)
    try:
        errors = [completeness_error(planted, example, Settings()) for example in examples]
        wrong = [completeness_error(planted, example, Settings(baseline="zero")) for example in examples]
    finally:
        pad.zero_()
    assert max(errors) <= 0.05
    assert max(wrong) > 0.05


def test_converged_means_within_tolerance(planted: Probe, examples: list[Example]) -> None:
    for example in examples:
        for found in attribute(planted, example, ("ig",)):
            assert found.converged and found.delta is not None and found.rel_delta is not None
            change = found.f_input - found.f_baseline
            assert found.delta == pytest.approx(found.values.sum() - change, abs=1e-9)
            assert found.rel_delta == pytest.approx(abs(found.delta) / max(abs(change), 0.1))
            assert found.rel_delta <= 0.05 and found.params["error"] <= 0.05 * max(abs(change), 0.1) + 1e-9
            assert 16 <= found.params["n_steps"] == found.n_bwd <= 256


def test_tighter_tolerance_takes_more_steps_and_gets_closer(planted: Probe, examples: list[Example]) -> None:
    fine = attribute(planted, examples[0], ("ig",), ("label",), Settings(tolerance=0.001, max_steps=2048))[0]
    coarse = attribute(planted, examples[0], ("ig",), ("label",))[0]
    assert fine.n_bwd > coarse.n_bwd and fine.rel_delta is not None and fine.rel_delta <= 0.001
    # the tolerance bounds what the errors come to together; single values may be off by more
    assert np.abs(fine.values - coarse.values).sum() < 0.2 * np.abs(fine.values).sum()
    assert np.corrcoef(fine.values, coarse.values)[0, 1] > 0.98


def test_errors_count_whether_they_cancel_or_add_up() -> None:
    """Of two that cancel the squares, of many that add up the sum."""
    size = probes.saliency.gradients._size
    assert size([0.3, -0.3]) == pytest.approx(0.3 * 2**0.5) and size([0.1] * 9) == pytest.approx(0.9)
    worst = probes.saliency.gradients._worst
    assert worst({(0.0, 0.5): 0.3, (0.5, 1.0): -0.3}, 0.4) == [(0.0, 0.5), (0.5, 1.0)]
    assert worst({(0.0, 0.5): 0.5, (0.5, 1.0): 0.1}, 0.4) == [(0.0, 0.5)] and worst({(0.0, 1.0): 0.3}, 0.4) == []


def test_steps_run_out(planted: Probe, examples: list[Example]) -> None:
    found = attribute(planted, examples[0], ("ig",), ("label",), Settings(tolerance=1e-6, max_steps=40))[0]
    assert found.converged is False and found.n_bwd <= 40


def test_equals_one_captum_call_over_the_same_nodes(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    """Simpson over stretches cut where they must be, Captum over the whole path with many steps: the same integral."""
    example = tiny_probe.encode(tiny_rows[3])
    forward = tiny_probe.scorer.forward(example, ("label",))
    whole = IntegratedGradients(lambda post: forward(post)[:, 0]).attribute(
        forward.post[None], forward.neutral[None], n_steps=400, internal_batch_size=64
    )
    wanted = example.post_chars(whole[0].sum(-1).double().numpy())
    found = attribute(tiny_probe, example, ("ig",), ("label",), Settings(tolerance=0.002, max_steps=2048))[0]
    assert np.abs(found.values - wanted).max() < 0.01 * np.abs(wanted).max()


def test_erasure_is_the_drop_of_the_score(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    example = tiny_probe.encode(tiny_rows[0])
    forward = tiny_probe.scorer.forward(example, TARGETS)
    spans, unit = probes.saliency.attribute.clause_tokens(example)
    keep = torch.as_tensor(np.stack([unit != index for index in range(-1, len(spans))]))
    scores = torch.cat([forward.kept(row[None]) for row in keep]).double().numpy()
    for column, found in enumerate(attribute(tiny_probe, example, ("erase",), TARGETS)):
        assert found.target == TARGETS[column] and found.unit_spans == tuple(spans) and found.unit == "clause"
        assert found.values == pytest.approx(scores[0, column] - scores[1:, column], abs=2e-4)
        for (a, b), value in zip(found.unit_spans, found.values, strict=True):
            assert found.char_values[a:b] == pytest.approx(value / (b - a))
        assert found.delta is None and found.converged is None and found.n_bwd == 0
    fine = attribute(tiny_probe, example, ("erase",), ("label",), Settings(units="token"))[0]
    assert fine.unit == "char" and len(fine.values) == len(example.post)
    assert fine.n_fwd == example.post_tok[1] - example.post_tok[0] + 2


def test_gradient_norm(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    example = tiny_probe.encode(tiny_rows[3])
    forward = tiny_probe.scorer.forward(example, ("explanation",))
    post = forward.post[None].clone().requires_grad_()
    gradient = torch.autograd.grad(forward(post)[0, 0], post)[0][0].norm(dim=-1)
    found = attribute(tiny_probe, example, ("gradnorm",), ("explanation",))[0]
    assert found.values == pytest.approx(example.post_chars(gradient.double().numpy()), rel=1e-5)
    assert found.values.min() > 0


def test_results_do_not_depend_on_what_else_is_asked(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    example = tiny_probe.encode(tiny_rows[1])
    together = attribute(tiny_probe, example)
    assert [(found.method, found.target) for found in together] == [
        (method, target) for method in ("ig", "erase", "gradnorm") for target in TARGETS
    ]
    for found in together:
        alone = attribute(tiny_probe, example, (found.method,), (found.target,))[0]
        # erasure of both targets runs longer sequences than that of one: equal up to the order of additions
        assert alone.values == pytest.approx(found.values, rel=1e-4, abs=2e-4)
    again = attribute(tiny_probe, example)
    assert all(np.array_equal(a.values, b.values) for a, b in zip(together, again, strict=True))


def test_batch_size_does_not_matter(
    tiny_probe: Probe, tiny_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = tiny_probe.encode(tiny_rows[3])
    large = attribute(tiny_probe, example)
    monkeypatch.setattr(tiny_probe.scorer, "token_budget", 1)
    for a, b in zip(large, attribute(tiny_probe, example), strict=True):
        assert b.values == pytest.approx(a.values, rel=1e-4, abs=2e-4)


def test_memory_running_out_mid_way_changes_nothing(
    tiny_probe: Probe, tiny_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = tiny_probe.encode(tiny_rows[3])
    wanted = attribute(tiny_probe, example)
    groups = Forward.groups

    def tight(self: Forward, post: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        if len(post) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return groups(self, post, keep)

    monkeypatch.setattr(Forward, "groups", tight)
    monkeypatch.setattr(tiny_probe.scorer, "token_budget", tiny_probe.scorer.token_budget)
    for a, b in zip(wanted, attribute(tiny_probe, example), strict=True):
        assert b.values == pytest.approx(a.values, rel=1e-4, abs=2e-4)


def test_sums_are_conserved(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    for row in tiny_rows[:2]:
        example = tiny_probe.encode(row)
        for found in attribute(tiny_probe, example):
            assert found.char_values.shape == (len(example.post),) and found.char_values.dtype == np.float64
            assert found.char_values.sum() == pytest.approx(found.values.sum(), abs=1e-9)
            assert [b for _, b in found.unit_spans[:-1]] == [a for a, _ in found.unit_spans[1:]]
            assert found.unit_spans[0][0] == 0 and found.unit_spans[-1][1] == len(example.post)
            assert found.model_fp == tiny_probe.fingerprint and found.dtype == "float32"


def test_redundant_evidence_is_invisible_to_erasure() -> None:
    """A documented limit: of two sufficient words, leaving one out changes nothing; integrated gradients share."""
    probe = closed_form_probe({"x": [1.0, 0.0], "y": [0.0, 1.0]}, lambda seen: seen.sum(-1).clamp(max=1.0))
    encode = probe.token_bytes.encode
    row = {"id": "or", "post": "x，y", "prompt_ids": encode("p x，y ?"), "output_ids": encode("A")}
    example = probe.encode(row | {"label_text": "A", "candidates": {"a": "A", "b": "B"}})
    ig, erase = attribute(probe, example, ("ig", "erase"), ("label",), Settings(tolerance=1e-6))
    assert ig.values == pytest.approx([0.5, 0, 0.5], abs=1e-6)
    assert erase.values == pytest.approx([0, 0], abs=1e-6)


def test_half_precision_keeps_the_path_in_float32(tiny_model_dir, tiny_probe, tiny_rows) -> None:
    half = Probe.from_pretrained(tiny_model_dir, dtype="bfloat16")
    values = [attribute(probe, probe.encode(tiny_rows[3]), ("gradnorm",))[0] for probe in (half, tiny_probe)]
    assert values[0].dtype == "bfloat16"
    assert np.corrcoef(values[0].values, values[1].values)[0, 1] > 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "mean"}, "baseline 'mean': not one of pad, zero"),
        ({"units": "sentence"}, "units 'sentence': not one of clause, word, char, token"),
        ({"draws": 0}, "draws and shap_samples"),
        ({"tolerance": 0.0}, "tolerance must be in"),
        ({"max_steps": 8}, "max_steps at least 16"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProbeInputError, match=message):
        Settings(**change)


def test_bad_method_and_eraser(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    example = tiny_probe.encode(tiny_rows[1])
    with pytest.raises(ProbeInputError, match="method 'lime': not one of ig, "):
        attribute(tiny_probe, example, ("lime",))
    with pytest.raises(ProbeInputError, match="eraser 'drop'"):
        attribute(tiny_probe, example, ("erase",), ("label",), Settings(eraser="drop"))
