"""Swap pairs: exact on a model whose reasons are known, honest where nothing is true, and refused where no pair is."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from probes.checks.swaps import Swap, counterpart, pairs, phrase, summarise_swaps, swap
from probes.citations.clauses import pieces
from probes.errors import ProbeInputError
from probes.probe import Probe
from probes.records import Example
from probes.saliency.attribute import attribute
from probes.validation.selftest import closed_form_probe

WEIGHTS = {"a": 0.5, "b": -0.3, "x": 2.0, "y": -1.0}


@pytest.fixture(scope="module")
def linear() -> Probe:
    return closed_form_probe({letter: [w] for letter, w in WEIGHTS.items()} | {"": [0.0]}, lambda seen: seen[..., 0])


def example(probe: Probe, name: str, post: str, label: str = "a", **changes: Any) -> Example:
    ids = probe.token_bytes.encode
    said = {"a": "A", "b": "B"}
    row = {"id": name, "post": post, "prompt_ids": ids(f"p {post} ?"), "output_ids": ids(said[label] + " so")}
    row |= {"parsed_label": label, "label_text": said[label], "candidates": said, "pair": "1"}
    return probe.encode(row | changes)


def test_a_linear_model_is_read_exactly(linear: Probe) -> None:
    first, second = example(linear, "1", "ab, ax, ba."), example(linear, "2", "ab, ay, ba.", "b")
    moved = counterpart(first, second)
    assert (moved.label, moved.ids[: moved.prompt_len]) == ("a", second.ids[: second.prompt_len])
    assert moved.text == second.text[: second.text.index("?") + 1] + "A so"
    assert moved.segment("label") is not None and moved.text[slice(*moved.segment("label").char)] == "A"
    assert moved.byte_spans[-1][1] == moved.char_bytes[-1] == len(moved.text.encode())
    for method in ("ig", "erase"):
        maps = [attribute(linear, e, (method,), ("label",))[0] for e in (first, moved)]
        found = swap(*maps, (first.post, second.post), (pieces(first.post), pieces(second.post)), "1")
        assert found is not None
        # sum of the weights seen: 2.0 less -1.0; the label turns from 0.5 - 0.3 + 0.5 + 2 - 0.3 + 0.5 to -0.1
        assert found.moved == pytest.approx(3.0, abs=1e-5) and found.said == pytest.approx(3.0, abs=1e-4)
        assert found.turned and found.shares[0] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("first", "second", "spans"),
    [
        ("I am sad.", "I am glad.", ((5, 6), (5, 7))),
        ("aa", "aaa", ((2, 2), (2, 3))),
        ("abc", "xyz", ((0, 3), (0, 3))),
        ("今天很好", "今天很不好", ((3, 3), (3, 4))),
    ],
)
def test_phrase(first: str, second: str, spans: Any) -> None:
    assert phrase(first, second) == spans
    assert phrase(second, first) == spans[::-1]


@pytest.mark.parametrize(
    ("posts", "changes", "message"),
    [
        (["ab, ax"], {}, "pair '1': 1 rows with a label"),
        (["ab, ax", "ab, ay", "ab, aa"], {}, "pair '1': 3 rows"),
        (["ab, ax", "ab, ax"], {}, "have the same post"),
        (["ab, ax", "ab, ay"], {"task": "other"}, "differ in task or candidates"),
    ],
    ids=["alone", "three", "same post", "other task"],
)
def test_what_is_no_pair_is_refused(linear: Probe, posts: list[str], changes: dict[str, Any], message: str) -> None:
    made = [example(linear, str(i), post) for i, post in enumerate(posts)]
    made[0] = dataclasses.replace(made[0], **changes)
    with pytest.raises(ProbeInputError, match=message):
        pairs(made)


def test_rows_without_a_pair_are_none(linear: Probe) -> None:
    assert pairs([example(linear, "1", "ab, ax", pair=None)]) == []
    assert summarise_swaps([]) is None


def worlds(rng: np.random.Generator, count: int, true: bool, authors: int = 0) -> list[Swap]:
    """Pairs whose maps differ anywhere and say anything, or at the phrase and what the label does."""
    made = []
    for i in range(count):
        k = int(rng.integers(4, 12))
        moved = float(rng.normal() * rng.pareto(1.5))
        said = moved + float(rng.normal() * 0.3) if true else float(rng.normal() * rng.pareto(1.5))
        at, differences = int(rng.integers(k)), rng.pareto(1.5, k)
        differences[at] += 3.0 * true
        user = f"u{i % authors}" if authors else None
        made.append(Swap(str(i), "erase", user, moved, bool(rng.integers(2)), said, tuple(differences.tolist()), at))
    return made


@pytest.mark.parametrize("authors", [0, 6], ids=["independent", "two pairs by each of six authors"])
def test_error_rates(authors: int) -> None:
    """P(p <= 0.05) where nothing is true, over 400 data sets of 12 pairs (standard error 1.1 %)."""
    rng = np.random.default_rng(5)
    hits = {"p_share": 0, "p_cosine": 0}
    for at in range(400):
        found = summarise_swaps(worlds(rng, 12, False, authors), draws=199, seed=at)
        assert found is not None
        for name in hits:
            hits[name] += found["by_method"]["erase"][name] <= 0.05
    assert all(count / 400 <= 0.075 for count in hits.values()), hits
    assert all(count > 0 for count in hits.values())  # a test that never rejects would pass the line above


def test_what_is_true_is_found() -> None:
    found = summarise_swaps(worlds(np.random.default_rng(1), 12, True), draws=999)
    assert found is not None
    one = found["by_method"]["erase"]
    assert (
        one["p_share"] <= 0.01 and one["p_cosine"] <= 0.01 and one["cosine"] > 0.9 and one["share"] > one["share_null"]
    )
    few = summarise_swaps(worlds(np.random.default_rng(1), 4, True))
    assert few is not None and few["by_method"]["erase"]["p_share"] is None and few["n"] == 4
