"""The leaderboard on models that can be worked out by hand; a metric of one's own, as docs/planted.md shows it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from probes.probe import Probe
from probes.records import Example
from probes.validation import leaderboard as board
from probes.validation.leaderboard import Side, measure, page
from probes.validation.metrics import CHAIN, POST_HOC, Case, Score
from probes.validation.selftest import closed_form_probe
from probes.validation.soft import soft_maps


def planted(probe: Probe, at: int, chain: str) -> Example:
    """A post of four words, one of which weighs; its explanation quotes it after the label, or in the chain."""
    label, cue = ("A", "x") if at % 2 else ("B", "z")
    words = ["mmm", cue * 3, "kkk", "nnn"][at % 3 :] + ["mmm", cue * 3, "kkk", "nnn"][: at % 3]
    post, ids = ", ".join(words), probe.token_bytes.encode
    said = f' it says "{cue * 3 if chain else "kkk"}".'
    example = probe.encode({
        "id": str(at), "post": post, "prompt_ids": ids(f"g {post} ?"), "label_text": label, "parsed_label": label,
        "output_ids": ids(f"<think>{said}</think>{label}" if chain == "chain" else f"{label}{said}"),
        "parsed_explanation": None if chain == "chain" else said, "candidates": {"A": "A", "B": "B"},
    })  # fmt: skip
    return example.asked("reasoning") if chain == "chain" else example


@pytest.fixture(scope="module")
def bag() -> Probe:
    return closed_form_probe({"x": [2.0], "z": [-2.0]}, lambda seen: seen[..., 0])


def test_metrics_on_a_bag_of_letters(bag: Probe) -> None:
    """Six nats of the cue, wherever it stands."""
    chains = measure(bag, [planted(bag, at, "chain") for at in range(4)], [m for m in CHAIN if m.__name__ != "cc_shap"])
    assert chains["early_answering"].values == pytest.approx([5.5] * 4, abs=1e-4)  # 1 x of 3 stands in 3/4
    assert chains["filler_tokens"].values == pytest.approx([6.0] * 4, abs=1e-4)
    assert chains["adding_mistakes"].values == pytest.approx([12.0] * 4, abs=1e-4)
    assert chains["paraphrasing"].values == pytest.approx([0.0] * 4, abs=1e-4)
    assert chains["early_answering"].nulls[0] == pytest.approx([-5.5 + 0.05 * 12], abs=1e-4)
    chosen = [m for m in POST_HOC if m.__name__ in ("mass_ratio", "necessity", "sufficiency", "simulatability")]
    cited, other = (measure(bag, [planted(bag, at, kind) for at in range(6)], chosen) for kind in ("cue", ""))
    assert cited["mass_ratio"].values == pytest.approx([1.0] * 6)
    assert other["mass_ratio"].values == pytest.approx([0.0] * 6)
    assert cited["necessity"].values == pytest.approx([6.0] * 6, abs=1e-4)
    assert other["sufficiency"].values == pytest.approx([-6.0] * 6, abs=1e-4)
    assert min(cited["simulatability"].values) > max(other["simulatability"].values)
    assert cited["simulatability"].forwards == 0 < cited["necessity"].forwards


def test_anyones_metric_plugs_in(bag: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    def length(case: Case) -> float:
        """How long the explanation is (nobody 2026).

        More is said here.
        """
        return math.nan if case.example.id == "0" else float(len(case.example.explanation or ""))

    def model(setting: str, world: Any, true: bool, posts: int) -> tuple[Probe, list[Example]]:
        kind = "chain" if setting == "chain" else "cue" if true else ""
        return bag, [planted(bag, at, kind) for at in range(posts)]

    monkeypatch.setattr(board, "_model", model)
    lines = board.leaderboard([length], [length], posts=4, worlds=2)
    assert [(line.setting, line.name, line.what) for line in lines] == [
        (setting, "length", "How long the explanation is (nobody 2026).") for setting in ("post hoc", "chain")
    ]
    assert lines[0].value == 0.5 and lines[0].n == 6 and lines[0].forwards == 0 and lines[0].type_one is None
    assert list(lines[0].by_world) == list(board.POST_HOC_WORLDS)[:2]
    text = page(lines, soft_maps(), "probes leaderboard")
    assert "| length | .500 | .500 | **.500** (" in text and "| *Filler Tokens* |" in text and "*.948*" in text
    assert "* *length*: How long the explanation is (nobody 2026)." in text
    table = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(set(table[:4])) == 1  # every row of a table has as many cells


def test_a_line_has_its_interval_and_its_type_one_error() -> None:
    def metric(case: Case) -> float | Score:
        """M."""
        return 0.0

    null = tuple(float(at) for at in range(9))
    true = Side((1.0,) * 20, ((),) * 20, 3.0)
    wild, calm = (Side((value,) * 20, (null,) * 20, 5.0) for value in (100.0, 0.0))
    line = board._line(metric, "post hoc", {"a": (true, calm), "b": (true, wild)}, 0)
    assert line.by_world == {"a": 1.0, "b": 0.0} and line.value == 0.5 and line.n == 40 and line.low < 0.5 < line.high
    assert line.type_one == 0.5 and line.forwards == 4.0


def test_worlds_are_of_six_architectures_and_every_metric_has_a_docstring() -> None:
    for worlds in (board.POST_HOC_WORLDS, board.CHAIN_WORLDS):
        assert len({world.architecture for world in worlds.values()}) >= 6
    assert {world.rule for world in board.POST_HOC_WORLDS.values()} == {"one", "twice", "and", "or"}
    assert all(metric.__doc__ for metric in (*POST_HOC, *CHAIN))


def test_soft_comprehensiveness_counts_what_it_erases() -> None:
    """As published the map that says nothing wins; at equal expected retention the true one does."""
    true, flat, unrelated = soft_maps()
    assert flat["published"] > 2 * true["published"] and flat["published_share"] == 1.0 > 2 * true["published_share"]
    assert [one["share"] for one in (true, flat, unrelated)] == pytest.approx([0.2] * 3)
    assert true["value"] > 2 * max(flat["value"], unrelated["value"])
