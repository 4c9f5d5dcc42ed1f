"""Methods beyond the default three: equal to Captum on the plain model, row by row; and what they promise."""

import time
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    GradientShap,
    IntegratedGradients,
    KernelShap,
    LayerIntegratedGradients,
    ShapleyValueSampling,
)

from probes.citations.clauses import pieces, unit_tokens, words
from probes.errors import ProbeInputError
from probes.probe import Probe
from probes.records import Example
from probes.saliency.attribute import METHODS, Settings, attribute, expand_targets
from probes.saliency.erase import LeastSquares, MaskTable, erasure_maps, seeded, subset_masks
from probes.validation.selftest import closed_form_probe

FILLERS = ("昨晚下了雨，", "外面风很大。", "we had dinner, ", "the dog barked.")


@pytest.fixture(scope="module")
def example(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> Example:
    return tiny_probe.encode(tiny_rows[0])


class Plain:
    """log p of the explanation by the model alone: one sequence at a time, whole logits, no engine."""

    def __init__(self, probe: Probe, example: Example) -> None:
        segment = example.segment("explanation")
        assert segment is not None
        self.model, self.example, (self.start, self.end) = probe.model, example, segment.tok
        self.ids = torch.tensor([example.ids[: self.end]])

    def score(self, mask: torch.Tensor | None = None, **inputs: torch.Tensor) -> torch.Tensor:
        """float32 [B] for ``input_ids`` or ``inputs_embeds`` [B, S]."""
        logits = self.model(**inputs, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
        at = torch.arange(self.start, self.end)
        return logits[:, at - 1, self.ids[0, at]].sum(-1)

    def spliced(self, post: torch.Tensor) -> torch.Tensor:
        first, last = self.example.post_tok
        around = self.model.get_input_embeddings()(self.ids).expand(len(post), -1, -1)
        return self.score(inputs_embeds=torch.cat([around[:, :first], post, around[:, last:]], 1))

    def masked(self, owner: torch.Tensor) -> Any:
        first, last = self.example.post_tok

        def score(units: torch.Tensor) -> torch.Tensor:
            rows = []
            for row in units:
                mask = torch.ones_like(self.ids)
                mask[0, first:last] = row.bool()[owner].long()
                rows.append(self.score(mask, input_ids=self.ids))
            return torch.cat(rows).detach()

        return score


def error(found: Any, wanted: Any) -> float:
    found, wanted = np.asarray(found), np.asarray(wanted)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_perturbation_methods_equal_captum_on_the_plain_model(tiny_probe: Probe, example: Example) -> None:
    spans, unit = unit_tokens(example, "clause")
    plain = Plain(tiny_probe, example).masked(torch.as_tensor(unit))
    ones = torch.ones(1, len(spans), dtype=torch.float64)
    kernel = KernelShap(plain)
    kernel.interpretable_model = LeastSquares()
    settings = Settings(shap_samples=3)
    maps = attribute(tiny_probe, example, ("erase", "shap", "kernelshap"), ("explanation",), settings)
    assert len(spans) > 4  # sampled, not enumerated
    with seeded(0):
        erase = FeatureAblation(plain).attribute(ones, baselines=0)
    with seeded(0):
        shap = ShapleyValueSampling(plain).attribute(ones, baselines=0, n_samples=3)
    with seeded(0):
        fitted = kernel.attribute(ones, baselines=0, n_samples=maps[2].params["n_units"] * 2 + 64)
    for found, wanted in zip(maps, (erase, shap, fitted), strict=True):
        assert error(found.values, wanted[0]) <= 1e-4, found.method


def test_gradient_methods_equal_captum_on_the_plain_model(tiny_probe: Probe, example: Example) -> None:
    plain = Plain(tiny_probe, example)
    first, last = example.post_tok
    embed = tiny_probe.model.get_input_embeddings()
    blank = plain.ids.clone()
    blank[0, first:last] = tiny_probe.pad_id
    layer = LayerIntegratedGradients(lambda ids: plain.score(input_ids=ids), embed)
    wanted = layer.attribute(plain.ids, blank, n_steps=16)[0, first:last].sum(-1)
    forward = tiny_probe.scorer.forward(example, ("explanation",))
    engine = IntegratedGradients(lambda post: forward(post)[:, 0])
    ours = engine.attribute(forward.post[None], forward.neutral[None], n_steps=16)[0].sum(-1)
    assert error(ours, wanted) <= 1e-4

    gxi, shap = attribute(tiny_probe, example, ("gxi", "gradshap"), ("explanation",), fillers=FILLERS)
    post = forward.post[None].clone().requires_grad_()
    gradient = torch.autograd.grad(plain.spliced(post)[0], post)[0]
    assert error(gxi.values, example.post_chars((gradient * post)[0].sum(-1).detach().numpy())) <= 1e-4

    starts = torch.cat([forward.neutral[None], torch.zeros_like(post), forward.filler(FILLERS, 4)])
    total = torch.zeros(last - first, dtype=torch.float64)
    with seeded(0):
        for rows in (8, 8, 8, 1):
            total += rows * GradientShap(plain.spliced).attribute(post, starts, n_samples=rows, stdevs=0.0)[0].sum(-1)
    assert error(shap.values, example.post_chars(total.detach().numpy() / 25)) <= 1e-4


def test_nothing_depends_on_batches_or_leaves_a_trace(tiny_probe: Probe, example: Example) -> None:
    names = ("gradshap", "erase_resample", "shap", "kernelshap")
    settings = Settings(shap_samples=3, draws=2)
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    once = attribute(tiny_probe, example, names, ("label",), settings, FILLERS)
    assert torch.equal(states[0], torch.random.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])
    budget = tiny_probe.scorer.token_budget
    tiny_probe.scorer.token_budget = 1
    torch.manual_seed(77)
    try:
        again = attribute(tiny_probe, example, names, ("label",), settings, FILLERS)
    finally:
        tiny_probe.scorer.token_budget = budget
    for a, b in zip(once, again, strict=True):
        assert error(a.values, b.values) <= 1e-4, a.method


def test_every_method_is_a_row_of_its_own_and_conserves_the_sum(tiny_probe: Probe, example: Example) -> None:
    settings = Settings(shap_samples=2, draws=1, max_steps=16)
    maps = attribute(tiny_probe, example, tuple(METHODS), ("label",), settings, FILLERS)
    assert [m.method for m in maps] == list(METHODS)
    for found in maps:
        assert found.char_values.sum() == pytest.approx(found.values.sum(), abs=1e-9)
        assert np.isfinite(found.values).all() and len(found.char_values) == len(example.post)
    by_name = {found.method: found for found in maps}
    for name in ("shap", "kernelshap"):
        assert by_name[name].rel_delta == pytest.approx(0.0, abs=1e-3)  # they share out the whole change
    assert by_name["ig_zero"].baseline == "zero" and by_name["ig_filler"].baseline == "filler"
    assert by_name["erase_neutral"].baseline == "neutral" and by_name["erase_resample"].baseline == "resample"


@pytest.mark.parametrize("kind", ["clause", "word", "char", "token"])
def test_units_are_a_partition_of_the_tokens(tiny_probe: Probe, example: Example, kind: str) -> None:
    spans, unit = unit_tokens(example, kind)
    assert sorted(set(unit.tolist())) == list(range(int(unit.max()) + 1)) and (np.diff(unit) >= 0).all()
    assert not spans or (len(spans) == unit.max() + 1 and spans[0][0] == 0 and spans[-1][1] == len(example.post))
    found = attribute(tiny_probe, example, ("erase",), ("label",), Settings(units=kind))[0]
    assert found.unit == ("char" if kind in ("char", "token") else kind)
    assert found.char_values.sum() == pytest.approx(found.values.sum(), abs=1e-9)
    counts = {k: unit_tokens(example, k)[1].max() + 1 for k in ("clause", "word", "char", "token")}
    assert counts["clause"] < counts["word"] <= counts["char"] < counts["token"]


def test_a_post_without_punctuation_is_cut_into_words() -> None:
    post = "tok1 tok2 tok3 tok4 tok5 tok6"
    assert [post[a:b] for a, b in pieces(post)] == ["tok1 ", "tok2 ", "tok3 ", "tok4 ", "tok5 ", "tok6"]
    assert len(pieces(" ".join(["word"] * 90))) == 30
    assert [len("感觉活着没有意义"[a:b]) for a, b in words("感觉活着没有意义")] == [2, 2, 2, 2]
    assert pieces("很累") == [(0, 2)]


def test_cited_segments_are_targets(tiny_probe: Probe, example: Example) -> None:
    assert example.explanation is not None
    (target,) = expand_targets(example, ("citations",))
    a, b = (int(x) for x in target[len("explanation[") : -1].split(":"))
    assert example.explanation[a:b] == "感觉活着没有意义"
    found = attribute(tiny_probe, example, ("gradnorm",), ("label", "citations", target))
    assert [m.target for m in found] == ["label", target]


def test_redundant_cues_share_in_shapley_values_and_vanish_in_erasure() -> None:
    probe = closed_form_probe({"x": [2.0]}, lambda seen: seen[..., 0].clamp(max=2.0))
    ids = probe.token_bytes.encode
    row = {"id": "r", "post": "aa，xx，bb，cx，dd，ee", "prompt_ids": ids("p aa，xx，bb，cx，dd，ee ?")}
    example = probe.encode(row | {"output_ids": ids("A"), "label_text": "A", "candidates": {"a": "A", "b": "B"}})
    maps = attribute(probe, example, ("erase", "shap", "kernelshap"), ("label",), Settings(shap_samples=200))
    erase, shap, kernel = (m.values for m in maps)
    assert np.abs(erase).max() < 1e-6
    for found in (shap, kernel):  # both are sampled
        assert found == pytest.approx([0, 1, 0, 1, 0, 0], abs=0.15)


def test_masks_are_never_scored_twice(tiny_probe: Probe, example: Example) -> None:
    forward = tiny_probe.scorer.forward(example, ("label",))
    table = MaskTable.of(forward, Settings())
    masks = torch.ones(3, table.count)
    masks[1, 0] = 0
    before = forward.rows_run
    first = table(masks)
    assert forward.rows_run - before == 2 and torch.equal(first[0], first[2])
    table(masks.flip(0))
    assert forward.rows_run - before == 2


def test_a_post_from_which_nothing_is_erased_is_not_resampled(tiny_probe: Probe, example: Example) -> None:
    forward = tiny_probe.scorer.forward(example, ("label", "explanation"))
    texts = ("另一条", "帖子")
    filler = forward.filler_ids(texts, 5)
    keep = torch.ones(3, len(forward.post), dtype=torch.bool)
    keep[1, :2] = False
    before = forward.rows_run
    found = forward.kept(keep, "resample", filler)
    assert forward.rows_run - before == (1 + 5) * len(forward.plans)
    whole = forward.kept(keep[:1])
    torch.testing.assert_close(found[[0, 2]], whole.expand(2, -1), rtol=1e-6, atol=1e-6)
    draws = [torch.where(keep[1:2, :, None], forward.post, drawn) for drawn in forward.filler(texts, 5)]
    with torch.no_grad():
        wanted = torch.cat([forward(post) for post in draws]).quantile(0.5, 0)
    torch.testing.assert_close(found[1], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["erase", "shap"])
def test_shared_passes_are_booked_once(tiny_probe: Probe, example: Example, kind: str) -> None:
    """All targets are read from the passes of the first; what is booked adds up to what was run, and to the time."""
    half = len(example.explanation or "") // 2
    targets = ("label", "explanation", f"explanation[0:{half}]", f"explanation[{half}:{2 * half}]")
    alone = attribute(tiny_probe, example, (kind,), ("label",))[0]
    forward = tiny_probe.scorer.forward(example, targets)
    began = time.perf_counter()
    maps = erasure_maps(forward, kind, kind, Settings(), ())
    took = time.perf_counter() - began
    assert len(maps) == 4 and sum(m.n_fwd for m in maps) == forward.rows_run
    assert maps[0].n_fwd >= alone.n_fwd > 0 and not any(m.n_fwd for m in maps[1:])
    assert 0 < sum(m.seconds for m in maps) <= took


def test_subsets() -> None:
    masks = subset_masks(20, 64, seed=1)
    assert masks.shape == (64, 20) and masks.sum(1).min() >= 1 and masks.sum(1).max() <= 19
    assert len(subset_masks(3, 64, seed=1)) == 6  # all there are
    assert torch.equal(subset_masks(20, 8, 5), subset_masks(20, 8, 5))


@pytest.mark.parametrize("seed", range(4))
def test_a_few_other_posts_with_cues_of_their_own_do_not_speak_for_a_clause(seed: int) -> None:
    """One filler in six decides the label by itself: what it does is not what the clause it replaces did."""
    probe = closed_form_probe({"x": [2.0], "z": [-20.0]}, lambda seen: seen[..., 0])
    post, ids = "abc, dex, fgh, ijk.", probe.token_bytes.encode
    row = {"id": "r", "post": post, "prompt_ids": ids(f"p {post} ?"), "output_ids": ids("A"), "label_text": "A"}
    example = probe.encode(row | {"candidates": {"a": "A", "b": "B"}})
    fillers = ("zbcd, ", *(f"{letters}, " for letters in ("bcde", "cdef", "defg", "efgh", "fghi")))
    (found,) = attribute(probe, example, ("erase_resample",), ("label",), Settings(seed=seed), fillers)
    assert found.values.tolist() == pytest.approx([0.0, 2.0, 0.0, 0.0], abs=1e-5)


def test_what_needs_fillers_says_so(tiny_probe: Probe, example: Example) -> None:
    with pytest.raises(ProbeInputError, match="needs fillers: clauses of other posts"):
        attribute(tiny_probe, example, ("erase_resample",), ("label",))
    with pytest.raises(ProbeInputError, match="units 'sentence'"):
        Settings(units="sentence")
    with pytest.raises(ProbeInputError, match="filler rows are for resampling"):
        tiny_probe.scorer.forward(example, ("label",)).kept(torch.ones(1, 1, dtype=torch.bool), "resample")
