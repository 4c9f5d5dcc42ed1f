"""A chain of reasoning on a model that can be worked out by hand: the log-odds are the weights of the letters seen.

What docs/reasoning.md shows, with both things that can be asked.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probes.checks.chain import CHAIN, MARGIN, VOTES, blocks, clusters, decided_at, examine_chain
from probes.checks.chain_edits import adverbs, cited_places, deny, mentioned, paraphrase, swapped
from probes.errors import ProbeInputError
from probes.probe import Probe
from probes.records import Check, Example
from probes.suite import run_suite
from probes.validation.selftest import closed_form_probe

WEIGHTS = {"x": [2.0], "z": [-2.0], "q": [0.5], "o": [0.25]}


def made(probe: Probe, cue: str, label: str, name: str = "r", **changes: Any) -> Example:
    """A post of five words, the third its cue; the chain quotes two of them."""
    post, ids = f"mmm, nnn, {cue * 3}, kkk, jjj", probe.token_bytes.encode
    output = changes.pop("output", f'<think> it says "nnn" and "{cue * 3}".</think>{label}')
    row = {
        "id": name,
        "task": "t",
        "post": post,
        "prompt_ids": ids(f"g {post} hint qqqq ?"),
        "output_ids": ids(output),
        "label_text": label,
        "parsed_label": label,
        "candidates": {"A": "A", "B": "B"},
        "hint": "qqqq",
    }
    return probe.encode(row | changes)


@pytest.fixture(scope="module")
def bag() -> Probe:
    """Adds up what every letter weighs, wherever it stands: the chain counts as much as the post."""
    return closed_form_probe(WEIGHTS, lambda seen: seen[..., 0])


def of(checks: tuple[Check, ...], name: str) -> Check:
    return next(c for c in checks if c.name == name)


def test_the_arithmetic_of_every_check(bag: Probe) -> None:
    example = made(bag, "x", "A")
    lenders = [made(bag, "x", "A", "a"), made(bag, "z", "B", "b"), made(bag, "z", "B", "c")]
    found = examine_chain(bag, example, lenders, "7")
    whole = 2 * 3 + 2 * 3 + 4 * 0.5  # cue in post and chain, and the hint
    shares, values = zip(*found.curve, strict=True)
    assert shares == tuple(step / 8 for step in range(9)) and len(example.ids[slice(*example.chain.tok)]) == 24
    # The cue's three letters are tokens 19 to 21 of the 24.
    assert values == pytest.approx([whole - 6] * 7 + [whole - 2, whole], abs=1e-4)
    margin = MARGIN * whole
    early = of(found.checks, "chain_early")
    assert early.value == pytest.approx(6, abs=1e-4) and early.inputs == ("7",)
    assert early.draws == pytest.approx([-6 + margin] * 2, abs=1e-4)  # a chain of z, as it grows
    filler = of(found.checks, "chain_filler")
    assert filler.value == pytest.approx(6, abs=1e-4) and filler.draws == pytest.approx([-6 + margin] * 2, abs=1e-4)
    mistake = of(found.checks, "chain_mistake")
    assert mistake.value == pytest.approx(12, abs=1e-4) and mistake.draws == pytest.approx([margin], abs=1e-4)
    negation = of(found.checks, "chain_negation")
    assert negation.value == pytest.approx(-0.5, abs=1e-4)  # the o of "not", twice: a bag of letters denies nothing
    assert sorted(negation.draws) == pytest.approx([margin - 0.5, margin, margin], abs=1e-4)  # also, again, then
    hint = of(found.checks, "hint_unmentioned")
    moved = {round(draw - margin, 3) for draw in hint.draws}  # four tokens of the post hidden: so many x among them
    assert hint.value == pytest.approx(2, abs=1e-4) and {0.0, 4.0} <= moved <= {0.0, 2.0, 4.0, 6.0}
    assert of(found.checks, "chain_decided").value == 0.0  # the post alone was enough
    assert {c.name for c in found.checks} == set(CHAIN)


def test_a_mentioned_hint_counts_for_nothing(bag: Probe) -> None:
    example = made(bag, "x", "A", output='<think> it says "xxx", the hint "qqqq".</think>A')
    hint = of(examine_chain(bag, example, []).checks, "hint_unmentioned")
    assert hint.value == 0.0 and set(hint.draws) == {hint.draws[0]} and hint.p == 1.0


def test_what_cannot_be_asked_is_not(bag: Probe) -> None:
    plain = dataclasses.replace(made(bag, "x", "A", output="A"), hint=None)
    assert plain.chain is None and examine_chain(bag, plain, []).checks == ()
    alone = examine_chain(bag, made(bag, "x", "A"), [])
    assert of(alone.checks, "chain_mistake").status == "abstain" and of(alone.checks, "chain_early").p is None
    silent = examine_chain(bag, made(bag, "x", "A", output="<think> well.</think>A"), [made(bag, "z", "B")])
    assert {c.name for c in silent.checks if c.status == "abstain"} >= {"chain_mistake", "chain_negation"}


def test_when_a_label_is_decided() -> None:
    assert decided_at([(0.0, 1.0), (0.5, -1.0), (1.0, 2.0)]) == 1.0
    assert decided_at([(0.0, 1.0), (0.5, 0.1), (1.0, 2.0)]) == 0.0
    assert decided_at([(0.0, 1.0), (1.0, -2.0)]) is None


def test_blocks_hold_two_labels_and_are_one_cluster(bag: Probe) -> None:
    examples = [made(bag, "x" if label == "A" else "z", label, str(at)) for at, label in enumerate("AAABABBABAAAA")]
    examples.append(dataclasses.replace(examples[0], segments=examples[0].segments[:3]))  # no chain
    found = blocks(examples)
    assert sorted(at for one in found for at in one) == list(range(13))
    assert all(len({examples[at].label for at in one}) == 2 for one in found) and len(found) == 2
    checks = [Check("c", "model", 1.0, None, None, None, None, None, 1, "ok", (name,)) for name in ("0", "1", "0", "2")]
    one, two, three, four = clusters(checks, ["p", "q", "r", "q"])
    assert one == three and two == four and one != two


@pytest.mark.parametrize(
    ("text", "post", "denied", "kept", "other"),
    [
        (
            'It says "I cannot sleep", so it is high.',
            "I cannot sleep. I ate.",
            'It says not "I cannot sleep", so it is high.',
            'It says also "I cannot sleep", so it is high.',
            'It states "I cannot sleep"; hence it is high.',
        ),
        ("帖子提到“活着没意思”，所以高。", "我觉得活着没意思。", "帖子提到没有“活着没意思”，所以高。",
         "帖子提到也“活着没意思”，所以高。", "帖子说到“活着没意思”、因此高。"),
        ('It does say not "I ate well".', "I ate well. Fine.", 'It does say "I ate well".',
         'It does say not also "I ate well".', 'It does say not "I ate well".'),
    ],
    ids=["en", "zh", "denied already"],
)  # fmt: skip
def test_edits_by_rule(text: str, post: str, denied: str, kept: str, other: str) -> None:
    places = cited_places(text, post)
    assert len(places) == 1
    assert deny(text, places) == denied and deny(denied, cited_places(denied, post)) == text
    assert adverbs(text, places)[0] == kept and paraphrase(text, places) == other


def test_what_is_cited_is_swapped_and_nothing_else(bag: Probe) -> None:
    donor = made(bag, "z", "B")
    text = ' it says "nnn" and "xxx".'
    places = cited_places(text, "mmm, nnn, xxx, kkk")
    assert swapped(text, places, donor) == ' it says "nnn" and "zzz".'
    assert swapped(text, places, made(bag, "z", "B", output="<think> hm.</think>B")) == text
    assert mentioned('the hint "qqqq" says so', "qqqq") and not mentioned("it says so", "qqqq")


def test_only_what_passed_has_a_vote() -> None:
    assert set(VOTES) < set(CHAIN) and "chain_paraphrase" not in VOTES and np.isfinite(MARGIN)


def test_a_run_asks_the_reasoning_and_tests_the_chain(bag: Probe, tmp_path: Path) -> None:
    def row(at: int) -> dict[str, Any]:
        label, cue = ("A", "x") if at % 2 else ("B", "z")
        post, ids = f"{'mn'[at // 2 % 2] * 3}, {cue * 3}, {'kjl'[at % 3] * 4}, nnn", bag.token_bytes.encode
        output = f'<think> it says "{cue * 3}".</think>{label} since "nnn"'
        return {
            "id": f"r{at}",
            "post": post,
            "prompt_ids": ids(f"g {post} ?"),
            "output_ids": ids(output),
            "label_text": label,
            "parsed_label": label,
            "parsed_explanation": ' since "nnn"',
            "candidates": {"A": "A", "B": "B"},
        }

    rows = [row(at) for at in range(8)]
    summaries = {ask: run_suite(bag, rows, tmp_path / ask, n_boot=50, ask=ask) for ask in ("explanation", "reasoning")}
    for ask, cited in (("explanation", 0.0), ("reasoning", 1.0)):  # what is asked cites "nnn", or the cue
        assert summaries[ask]["mass_ratio"]["erase"] == pytest.approx(cited, abs=1e-3)
        assert summaries[ask]["chain_decided"]["model"] == 0.0
        tested = {one["check"]: one for one in summaries[ask]["tests"]}
        assert set(VOTES) - set(tested) == {"hint_unmentioned"} and tested["chain_mistake"]["p_holm"] is not None
        assert "chain_paraphrase" not in tested
        assert tested["chain_mistake"]["p"] > 0.2  # two blocks: not enough to be sure of anything
        page = (tmp_path / ask / "report.html").read_text()
        assert "When was the label decided? · as the chain grows" in page and "<h3" in page
        assert "It was ahead of the others before the chain began." in page
    again = run_suite(bag, rows, tmp_path / "reasoning", n_boot=50, ask="reasoning")
    assert again == summaries["reasoning"] and again.run.results[0].chain[-1][0] == 1.0
    assert "reasoning" in again.run.manifest["ask"]
    plain = [one | {"output_ids": bag.token_bytes.encode("A"), "label_text": "A", "parsed_label": "A",
                    "parsed_explanation": None} for one in rows]  # fmt: skip
    with pytest.raises(ProbeInputError, match="8 no reasoning before the label"):
        run_suite(bag, plain, tmp_path / "none", ask="reasoning")
