"""Maps that cut: who has a vote, and what V18 is made of, in seconds."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from probes.checks import verdict
from probes.checks.crosscheck import examine
from probes.checks.swaps import LeftOut, swap
from probes.checks.verdict import FAMILIES, barred, gate
from probes.citations.align import align
from probes.citations.clauses import pieces
from probes.errors import ProbeError
from probes.probe import Probe
from probes.saliency.attribute import attribute
from probes.validation import cutting
from probes.validation.planted import Planted, World, make_model, make_tokenizer
from probes.validation.selftest import closed_form_probe
from probes.validation.validate import PANEL

WORLD = World(clauses=(5, 6), words=2, hidden=32)


def test_a_method_that_did_not_pass_cut_has_no_vote_where_it_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    letters = "abcdefgh"
    probe = cutting.deaf(closed_form_probe({c: [5.0 if c == "c" else 0.1] for c in letters}, lambda seen: seen[..., 0]))
    ids, post = probe.token_bytes.encode, ", ".join(letter * 3 for letter in letters)
    said = 'A because "ccc".'
    given = {"id": "r", "post": post, "prompt_ids": ids(f"p {post} ?"), "output_ids": ids(said), "label_text": "A"}
    example = probe.encode(given | {"candidates": {"a": "A", "b": "B"}, "parsed_explanation": said[2:]})
    maps = attribute(probe, example, ("ig", "erase"), ("label",))
    assert [a.baseline for a in maps] == ["pad", "cut"]

    def found() -> tuple[str, tuple[str, ...], Any]:
        units = pieces(post)
        report = examine(maps, align(example), example_id="r", length=len(post), units=units).report
        other = dataclasses.replace(maps[1], char_values=maps[1].char_values * 2, values=maps[1].values * 2)
        moved = post.replace("ccc", "hhh")
        return report.verdict, report.notes, swap(maps[1], other, (post, moved), (units, units), "pair")

    word, _, pair = found()
    assert word == "supported" and not isinstance(pair, LeftOut) and gate(maps[1]) is None
    monkeypatch.setattr(verdict, "CUT", ("shap", "kernelshap"))
    word, notes, pair = found()
    assert word == "inconclusive" and any(note.startswith("erasure: tokens were cut out") for note in notes)
    assert isinstance(pair, LeftOut) and pair.why == "a map may not speak"
    assert barred(dataclasses.replace(maps[1], baseline="attention")) is None  # hidden, it is another map


def test_all_that_hides_in_the_panel_is_tried_cut() -> None:
    assert set(cutting.CUTTING) < set(PANEL) and set(verdict.CUT) <= set(cutting.CUTTING)
    assert {FAMILIES[method] for method in cutting.PANEL} == {"gradient", "erasure"}


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("probes.validation.planted.answers_right", lambda probe, examples, **_: [True] * len(examples))

    def made(world: World) -> Planted:
        tokenizer = make_tokenizer(world)
        model = make_model(world, tokenizer)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.2 * torch.randn_like(weight))
        return Planted(world, Probe(model.eval(), tokenizer, "untrained"), 1.0, 0.0)

    return made


def test_the_rows_of_a_pair(untrained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "CUTTING", ("erase",))
    monkeypatch.setattr(cutting, "PANEL", ("ig", "erase"))
    monkeypatch.setattr(cutting, "SET", 2)
    rows = {one["id"]: one for one in cutting.cutting([WORLD], count=1, trained=untrained, draws=(3, 1))}
    sides = [f"V18.erase.glm.{side}" for side in ("faithful", "unfaithful")]
    assert {*sides, "V18.mass_ratio.erase", "V18.vote.erase", "V18.wrong", "V18.supported",
            "V18.contradicted", "V18.null.excess", "V18.null.necessity", "V18.null.sufficiency", "V18.necessity.posts",
            "V18.necessity.sets", "V18.gate.length"} <= rows.keys()  # fmt: skip
    assert all(rows[name]["bound"] == 0.95 for name in (*sides, "V18.mass_ratio.erase"))
    assert rows["V18.vote.erase"]["value"] == 1 and rows["V18.wrong"]["bound"] == 0.05
    assert all(np.isfinite(one["value"]) for one in rows.values())


def test_a_method_without_a_vote_has_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "CUT", ("shap",))
    rows = {one["id"]: one for one in cutting._apart([])}
    assert (rows["V18.mass_ratio.erase"]["bound"], rows["V18.mass_ratio.shap"]["bound"]) == (None, 0.95)
    assert (rows["V18.vote.erase"]["value"], rows["V18.vote.shap"]["value"]) == (0, 1)
    assert not rows["V18.mass_ratio.shap"]["ok"]  # nothing seen is nothing passed


def test_maps_that_were_not_cut_are_not_reported_as_cut(untrained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "deaf", lambda probe: probe)
    monkeypatch.setattr(cutting, "PANEL", ("erase",))
    with pytest.raises(ProbeError, match=r"glm.faithful: a deaf model was not cut"):
        cutting.cutting([WORLD], count=1, trained=untrained)
