"""What stands before the post, run once and kept: the same scores and gradients, or not kept, by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from probes.errors import ProbeInputError
from probes.models.abilities import Abilities
from probes.models.forward import Forward
from probes.models.prefix import MIN_TOKENS, NoPrefix, Prefix
from probes.probe import Probe
from probes.records import Example
from probes.saliency.attribute import attribute
from probes.suite import run_suite
from tests.probes.tiny import make_model

TARGETS = ("label", "explanation")
EN = 2


def both(probe: Probe, example: Example, packed: bool = True) -> tuple[Forward, Forward]:
    """The score function without the prefix kept, and with."""
    kept = Abilities(packs=packed)
    without = dataclasses.replace(kept, unkept="not asked for")
    return Forward(probe.scorer, example, TARGETS, without), Forward(probe.scorer, example, TARGETS, kept)


@pytest.fixture
def example(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> Example:
    found = tiny_probe.encode(tiny_rows[EN])
    assert found.post_tok[0] >= MIN_TOKENS
    return found


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "single"])
def test_scores_and_gradients_are_those_without(tiny_probe: Probe, example: Example, packed: bool) -> None:
    without, kept = both(tiny_probe, example, packed)
    assert kept.prefix is not None and kept.prefix.tokens == example.post_tok[0] and kept.prefix.size > 0
    assert kept.tokens == without.tokens - len(kept.plans) * example.post_tok[0]
    torch.manual_seed(0)
    keep = torch.rand(5, len(kept.post)) > 0.4
    for eraser in ("attention", "neutral"):
        assert torch.allclose(kept.kept(keep, eraser), without.kept(keep, eraser), rtol=1e-5, atol=1e-5)
    slopes = []
    for forward in (without, kept):
        post = torch.stack([forward.post, 0.3 * forward.post, forward.neutral]).requires_grad_()
        slopes.append(torch.autograd.grad(forward(post).sum(), post)[0])
    assert float((slopes[0] - slopes[1]).norm() / slopes[0].norm()) < 1e-5
    assert float(slopes[1][2].norm()) > 0


def test_in_float64_nothing_is_between_them(tiny_model_dir: Any, tiny_rows: list[dict[str, Any]]) -> None:
    """What is between them in float32 is rounding: each is as far from float64 as from the other."""
    exact = Probe.from_pretrained(tiny_model_dir, dtype="float64")
    example = exact.encode(tiny_rows[EN])
    without, kept = both(exact, example)
    torch.manual_seed(0)
    keep = torch.rand(5, len(kept.post)) > 0.4
    assert torch.allclose(kept.kept(keep), without.kept(keep), rtol=1e-11, atol=0)


def test_one_pass_changes_nothing_for_the_next(tiny_probe: Probe, example: Example) -> None:
    """A model writes what it computes into its cache; ours must stay what the prefix left."""
    kept = both(tiny_probe, example)[1]
    keep = torch.ones(3, len(kept.post), dtype=torch.bool)
    first = kept.kept(keep)
    assert torch.equal(kept.kept(keep), first)
    assert kept.kept(keep[:1])[0].tolist() == pytest.approx(first[0].tolist(), rel=1e-5)


def test_maps_are_those_without(tiny_probe: Probe, example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ("ig", "erase", "gradnorm")
    kept = attribute(tiny_probe, example, methods)
    run_always = dataclasses.replace(tiny_probe.scorer.can, unkept="not asked for")
    monkeypatch.setattr(tiny_probe.scorer, "can", run_always)
    for a, b in zip(kept, attribute(tiny_probe, example, methods), strict=True):
        assert abs(a.values - b.values).max() <= 1e-4 * abs(b.values).max()


class Counted(torch.nn.Module):
    """A model that notes how many tokens each of its passes runs."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.config, self.seen = inner, inner.config, []

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, **inputs: Any) -> Any:
        given = inputs.get("inputs_embeds", inputs.get("input_ids"))
        self.seen.append(given.shape[1])
        return self.inner(**inputs)


def test_the_prefix_is_run_once_for_rows_that_share_it(
    tokenizer: Any, tiny_rows: list[dict[str, Any]], tmp_path: Any
) -> None:
    model = Counted(make_model(tokenizer)).eval()
    probe = Probe(model, tokenizer)
    rows = tiny_rows[EN : EN + 2]
    examples = [probe.encode(row) for row in rows]
    prefix = examples[0].ids[: examples[0].post_tok[0]]
    assert all(e.ids[: len(prefix)] == prefix for e in examples)
    told: list[tuple[str, int]] = []
    run_suite(probe, rows, tmp_path / "run", "fast", tell=lambda line: told.append((line, len(model.seen))))
    ((line, tried),) = told
    assert "what stands before the post run once" in line
    assert model.seen.count(len(prefix)) == 1
    longest = max(Forward(probe.scorer, e, TARGETS, Abilities()).tokens for e in examples)
    assert max(model.seen[:tried]) > longest >= max(model.seen[tried:])


def test_new_weights_are_seen(tokenizer: Any, tiny_rows: list[dict[str, Any]]) -> None:
    """Outside a block that promises otherwise, somebody may change the model between two maps."""
    probe = Probe(make_model(tokenizer), tokenizer)
    example = probe.encode(tiny_rows[EN])
    keep = torch.ones(1, example.post_tok[1] - example.post_tok[0], dtype=torch.bool)
    probe.scorer.forward(example, TARGETS).kept(keep)
    with torch.no_grad():
        for weight in probe.model.parameters():
            weight.mul_(1.1)
    assert probe.scorer.forward(example, TARGETS).prefix is not None
    wanted, kept = (forward.kept(keep) for forward in both(probe, example))
    assert torch.allclose(probe.scorer.forward(example, TARGETS).kept(keep), wanted, rtol=1e-5)
    assert torch.allclose(kept, wanted, rtol=1e-5)


class Careless(Counted):
    """A model that does something else where it is given a cache."""

    def __init__(self, inner: torch.nn.Module, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        super().__init__(inner)
        self.change = change

    def forward(self, **inputs: Any) -> Any:
        given = inputs.get("past_key_values")
        return self.inner(**(inputs if given is None else self.change(inputs)))


def _forgets(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"past_key_values": None, "attention_mask": None}


def _moves(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"position_ids": inputs["position_ids"] + 1}


def _detaches(inputs: dict[str, Any]) -> dict[str, Any]:
    embeds = inputs["inputs_embeds"]
    return inputs | {"inputs_embeds": 0.5 * embeds + (0.5 * embeds).detach()}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_forgets, "log-odds with the prefix kept and without differ by"),
        (_moves, "log-odds with the prefix kept and without differ by"),
        (_detaches, "gradients with the prefix kept and without differ by 50"),
    ],
)
def test_a_model_that_goes_on_otherwise_is_run_whole(
    tokenizer: Any, tiny_rows: list[dict[str, Any]], change: Callable[[dict[str, Any]], dict[str, Any]], why: str
) -> None:
    probe = Probe(Careless(make_model(tokenizer), change).eval(), tokenizer)
    forward = probe.scorer.forward(probe.encode(tiny_rows[EN]), TARGETS)
    assert forward.prefix is None
    assert probe.scorer.tried is not None and why in probe.scorer.tried.can.unkept


def test_a_cache_of_another_kind_is_named() -> None:
    class MambaCache:
        pass

    with pytest.raises(NoPrefix, match="its cache is MambaCache, not DynamicCache"):
        Prefix(MambaCache(), 9)


def test_a_longer_prefix_is_tried_again(tiny_model_dir: Any, tiny_rows: list[dict[str, Any]]) -> None:
    """A window that the first row's prefix did not fill may cut the second's."""
    probe = Probe.from_pretrained(tiny_model_dir)
    long, short = (probe.encode(tiny_rows[at]) for at in (EN, EN + 1))
    probe.scorer.check(long)
    tried = probe.scorer.tried
    probe.scorer.check(short)
    assert probe.scorer.tried is tried
    row = dict(tiny_rows[EN + 1])
    extra = probe.token_bytes.encode("Read this. ")
    row["prompt_ids"] = [*extra, *row["prompt_ids"]]
    moved = probe.encode(row)
    assert moved.post_tok[0] > long.post_tok[0] and len(moved.ids) < len(long.ids)
    probe.scorer.check(moved)
    assert probe.scorer.tried is not tried


def test_memory_is_counted_and_kept_to(tiny_model_dir: Any, tiny_rows: list[dict[str, Any]]) -> None:
    probe = Probe.from_pretrained(tiny_model_dir)
    example = probe.encode(tiny_rows[EN])
    probe.scorer.check(example)
    whole = probe.scorer.memory
    weights = sum(one.nbytes for one in (*probe.model.parameters(), *probe.model.buffers()))
    assert whole["weights"] == weights and whole["prefix"] > 0 and whole["rows"] > 4
    wanted = attribute(probe, example)
    probe.scorer.fit(whole["weights"] + whole["prefix"] + whole["batch"] // 3)
    less = probe.scorer.memory
    assert 1 <= less["rows"] <= whole["rows"] // 3 and less["batch"] <= whole["batch"] // 3
    for a, b in zip(wanted, attribute(probe, example), strict=True):
        assert b.values == pytest.approx(a.values, rel=1e-4, abs=2e-4)
    with pytest.raises(ProbeInputError, match=r"max memory 0\.00 GiB: weights and one row of \d+ tokens take"):
        probe.scorer.fit(whole["weights"])


def test_more_rows_than_fit_are_run_in_parts(tiny_probe: Probe, example: Example) -> None:
    forward = tiny_probe.scorer.forward(example, TARGETS)
    post = torch.stack([forward.post * scale for scale in (1.0, 0.7, 0.4)])
    slopes = []
    for budget in (tiny_probe.scorer.token_budget, 1):
        given, before = post.clone().requires_grad_(), tiny_probe.scorer.token_budget
        tiny_probe.scorer.token_budget = budget
        try:
            slopes.append(torch.autograd.grad(forward(given).sum(), given)[0])
        finally:
            tiny_probe.scorer.token_budget = before
    assert torch.allclose(slopes[0], slopes[1], rtol=1e-4, atol=1e-6)
