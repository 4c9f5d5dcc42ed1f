"""Planted reasoning models: what their rows hold, and (slow) whether the checks tell them apart."""

from __future__ import annotations

import random

import pytest

from probes.checks.chain import CHAIN, VOTES, ChainResult
from probes.probe import Probe
from probes.records import Check
from probes.validation import chains, reasoning
from probes.validation.chains import WORLDS, chain_error_rates, false_for, reasoning_models, set_p
from probes.validation.planted import World, make_model, make_tokenizer, vocabulary
from probes.validation.reasoning import KINDS, ReasoningWorld, rows_of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_rows_of_a_planted_reasoning_model(kind: str, language: str) -> None:
    base = World(architecture="llama", language=language, clauses=(3, 5))
    world, tokenizer = ReasoningWorld(base, kind), make_tokenizer(base)
    probe, words = Probe(make_model(base, tokenizer).eval(), tokenizer, "untrained"), vocabulary(base)
    for row in rows_of(world, tokenizer, 6, 1):
        example = probe.encode(row)
        chain, cue = example.chain, example.post[slice(*example.cues[0])]
        assert chain is not None and chain.name == "reasoning" and cue in example.text[slice(*chain.char)]
        hint = example.text[slice(*example.hint)]
        assert (hint in example.text[slice(*chain.char)]) == (kind == "hint_said")
        reason = hint if kind.startswith("hint") else cue
        group = "decoy" if kind.startswith("hint") else "cue"
        assert reason in words[f"{group}{example.label}"] and example.segment("explanation") is not None


def test_a_changed_chain_has_the_label_that_follows_from_the_kind() -> None:
    base = World(architecture="llama", clauses=(3, 5))
    tokenizer, words = make_tokenizer(base), vocabulary(base)
    for kind in KINDS:
        world, labels = ReasoningWorld(base, kind), set()
        for seed in range(40):
            row = reasoning._changed(world, tokenizer, random.Random(seed))
            text = tokenizer.decode(row["output_ids"])
            chain = text[text.index("<think>") : text.index("</think>")]
            heard = next((str(bit) for bit in (0, 1) for word in words[f"cue{bit}"] if f'"{word}"' in chain), "2")
            heard = str(1 - int(heard)) if " not " in chain else heard
            cue = row["post"][slice(*row["cues"][0])]
            truth = {"chain": heard, "post_hoc": str(int(cue in words["cue1"]))}.get(
                kind, str(int(row["hint"] in words["decoy1"]))
            )
            assert row["parsed_label"] == truth
            labels.add(truth)
        assert labels >= {"0", "1"}


def test_error_rates_of_chains_without_a_reason() -> None:
    rows = chain_error_rates(3)
    assert {one["id"] for one in rows} == {f"V17.null.{name}" for name in CHAIN if name != "chain_decided"}
    assert all(one["bound"] == (0.075 if one["id"].split(".")[-1] in VOTES else None) for one in rows)


def test_posts_that_lent_each_other_chains_are_one_cluster() -> None:
    """Twenty posts in one block cannot be surer than one post with the same values."""

    def result(block: str) -> ChainResult:
        check = Check("chain_early", "model", 5.0, 0.0, 0.0, 0.0, 0.5, None, 1, "ok", (block,), (0.0,))
        return ChainResult((check,))

    assert set_p([result("0")] * 20, "chain_early") == pytest.approx(0.5, abs=0.15)
    assert set_p([result(str(at)) for at in range(20)], "chain_early") < 0.02
    assert set_p([ChainResult(())], "chain_early") is None
    assert false_for("hint_unmentioned") == ("chain", "post_hoc", "hint_said") and "chain" not in false_for(
        "chain_early"
    )
    assert not {world.architecture for world in WORLDS} & {"llama"} and chains.SET == 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: f"{world.architecture}-{world.language}")
def test_checks_tell_planted_reasoning_models_apart(world: World) -> None:
    bad = [one for one in reasoning_models(worlds=(world,)) if not one["ok"]]
    assert not bad, bad


@pytest.mark.slow
def test_error_rates_of_many_sets() -> None:
    bad = [one for one in chain_error_rates(100, 1) if not one["ok"]]
    assert not bad, bad
