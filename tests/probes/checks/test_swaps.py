"""Swap pairs: exact on a model whose reasons are known, honest where nothing is true, and refused where no pair is."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probes.checks.swaps import LeftOut, Swap, counterpart, pairs, phrase, summarise_swaps, swap
from probes.citations.clauses import pieces
from probes.errors import ProbeInputError
from probes.models.abilities import Abilities
from probes.post import swap_pair
from probes.probe import Probe
from probes.records import Example
from probes.results.cache import Cache
from probes.results.posts import PostResult
from probes.saliency.attribute import attribute
from probes.saliency.settings import Settings
from probes.suite import run_suite
from probes.terminal import print_summary
from probes.validation.selftest import closed_form_probe
from tests.probes.worlds import attribution

WEIGHTS = {"a": 0.5, "b": -0.3, "x": 2.0, "y": -1.0}


@pytest.fixture(scope="module")
def linear() -> Probe:
    return closed_form_probe({letter: [w] for letter, w in WEIGHTS.items()} | {"": [0.0]}, lambda seen: seen[..., 0])


def example(probe: Probe, name: str, post: str, label: str = "a", **changes: Any) -> Example:
    return probe.encode(row(probe, name, post, label, **changes))


def row(probe: Probe, name: str, post: str, label: str = "a", **changes: Any) -> dict[str, Any]:
    ids = probe.token_bytes.encode
    said = {"a": "A", "b": "B"}
    made = {"id": name, "post": post, "prompt_ids": ids(f"p {post} ?"), "output_ids": ids(said[label] + " so")}
    made |= {"parsed_label": label, "label_text": said[label], "candidates": said, "pair": "1"}
    return made | changes


def test_a_linear_model_is_read_exactly(linear: Probe) -> None:
    first, second = example(linear, "1", "ab, ax, ba."), example(linear, "2", "ab, ay, ba.", "b")
    moved = counterpart(first, second)
    assert (moved.label, moved.ids[: moved.prompt_len]) == ("a", second.ids[: second.prompt_len])
    assert moved.text == second.text[: second.text.index("?") + 1] + "A so"
    assert moved.segment("label") is not None and moved.text[slice(*moved.segment("label").char)] == "A"
    assert moved.byte_spans[-1][1] == moved.char_bytes[-1] == len(moved.text.encode())
    for method in ("ig", "erase"):
        maps = [attribute(linear, e, (method,), ("label",))[0] for e in (first, moved)]
        found = swap(*maps, (first.post, second.post), (pieces(first.post), pieces(second.post)), "1", None, True)
        assert isinstance(found, Swap)
        # sum of the weights seen: 2.0 less -1.0; the label turns from 0.5 - 0.3 + 0.5 + 2 - 0.3 + 0.5 to -0.1
        assert found.moved == pytest.approx(3.0, abs=1e-5) and found.said == pytest.approx(3.0, abs=1e-4)
        assert found.turned and found.shares[0] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("answer", ["a", "b"])
def test_a_pair_of_a_run(linear: Probe, answer: str, tmp_path: Path) -> None:
    """Labels of both answers decide whether the label turned, however the scores stand; kept maps give the same."""
    both = example(linear, "1", "ab, ax, ba."), example(linear, "2", "ab, ay, ba.", answer)
    maps = [attribute(linear, e, ("ig", "erase"), ("label",)) for e in both]
    results = [PostResult.of(e, (), found, tuple(pieces(e.post))) for e, found in zip(both, maps, strict=True)]
    made = [swap_pair(linear, both, (), (results[0], results[1]), Settings(), Cache(tmp_path)) for _ in range(2)]
    assert made[0] == made[1] and [s.method for s in made[0]] == ["ig", "erase"]
    for one in made[0]:
        assert isinstance(one, Swap) and one.turned == (answer == "b")
        assert one.moved == pytest.approx(3.0, abs=1e-5) and one.said == pytest.approx(3.0, abs=1e-4)


def test_two_rows_by_hand(linear: Probe) -> None:
    """``Probe.swap`` says what a run says; two rows that are no pair are refused."""
    posts = {"1": "ab, ax, ba.", "2": "ab, ay, ba."}
    first, second = (example(linear, name, post, pair=None) for name, post in posts.items())
    found = linear.swap(first, second, methods=("ig", "erase", "gradnorm"))
    assert [(s.method, s.pair, s.posts) for s in found] == [(m, "1 / 2", ("1", "2")) for m in ("ig", "erase")]
    assert all(isinstance(s, Swap) and s.said == pytest.approx(3.0, abs=1e-4) for s in found)
    with pytest.raises(ProbeInputError, match="rows '1' and '3' are no swap pair: one post twice"):
        linear.swap(first, example(linear, "3", "ab, ax, ba."))


PAIRS = ("ab, ax, ba.", "ab, ay, ba.", "b"), ("ab, b, xa, a.", "ab, b, ya, a.", "a"), ("ab, ax.", "ab, ba, ax.", "a")


def pair_rows(probe: Probe) -> list[dict[str, Any]]:
    """Three pairs, of whose last the second has a clause more: nobody's to compare."""
    return [row(probe, f"{n}{half}", pair[half], ("a", pair[2])[half], pair=f"secret {n}")
            for half in (0, 1) for n, pair in enumerate(PAIRS)]  # fmt: skip


@pytest.mark.parametrize("redact", [False, True], ids=["open", "redacted"])
def test_pairs_of_a_run_stand_in_summary_and_report(linear: Probe, tmp_path: Path, redact: bool) -> None:
    summary = run_suite(linear, pair_rows(linear), tmp_path, redact=redact)
    swaps = summary["swaps"]
    assert (swaps["pairs"], swaps["n"], swaps["turned"]) == (3, 2, 1) and summary["no_pair"] == {}
    first, second, third = swaps["each"]
    assert [one["pair"] for one in swaps["each"]] == [f"{'pair' if redact else 'secret'} {n}" for n in range(3)]
    assert first["posts"] == ["00", "01"] and (first["turned"], second["turned"], third["turned"]) == (
        True,
        False,
        None,
    )
    assert set(first["by_method"]) == {"ig", "erase", "erase_resample"}
    for method in ("ig", "erase"):
        assert first["moved"] == pytest.approx(3.0, abs=1e-4)
        assert first["by_method"][method]["said"] == pytest.approx(3.0, abs=1e-3)
        assert first["by_method"][method]["share"] == pytest.approx(1.0, abs=1e-3)
        assert third["by_method"][method] == {"left_out": "the phrase is not as many units in both posts"}
    page = (tmp_path / "report.html").read_text("utf-8")
    table = page[page.index("Pairs of posts that differ in one phrase") :].partition("</table>")[0]
    assert re.findall(r'<a href="#post-[0-9]+">(0[01])</a>', table) == ["00", "01"]
    assert "turns" in table and "stays" in table and "+3.0, 100% at the phrase" in table
    assert "the phrase is not as many units" in table
    everything = "".join(p.read_bytes().decode("utf-8", "replace") for p in tmp_path.rglob("*") if p.is_file())
    assert ("secret" in everything) != redact


def test_pairs_are_told_in_the_terminal(linear: Probe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(run_suite(linear, pair_rows(linear), tmp_path))
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "labels that turn with a swapped phrase 1 of 2" in out
    assert "difference of swapped posts' maps at the phrase, erasure 100%" in out


def test_killed_in_a_pair_nothing_is_made_twice(linear: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, made = attribute, list[tuple[str, str, tuple[int, ...]]]()
    stop = 0

    def counted(probe: Any, one: Example, methods: Any, *given: Any, **named: Any) -> Any:
        if len(made) == stop:
            raise KeyboardInterrupt
        made.append((one.id, methods[0], one.ids))
        return whole(probe, one, methods, *given, **named)

    monkeypatch.setattr("probes.saliency.attribute.attribute", counted)
    summary = None
    while summary is None and len(made) < 40:
        stop = len(made) + 1
        with contextlib.suppress(KeyboardInterrupt):
            summary = run_suite(linear, pair_rows(linear), tmp_path / "cut")
    assert len(made) == len(set(made)) == 6 * 4 + 3  # each map once, and three of the pair with two answers
    assert not list((tmp_path / "cut" / "cache").glob("*.part-*"))
    stop = -1
    assert summary == run_suite(linear, pair_rows(linear), tmp_path / "whole")


def test_a_run_whose_posts_are_kept_is_settled_before_its_pairs(
    linear: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept of a pair is named by how the model is called, which the rows of the run decide, not the pair's."""
    first = run_suite(linear, pair_rows(linear), tmp_path)
    done: list[str] = []
    settle = linear.scorer.settle
    monkeypatch.setattr(linear.scorer, "settle", lambda rows: done.append("settled") or settle(rows))
    monkeypatch.setattr("probes.suite.swap_pair", lambda *given: done.append("a pair") or swap_pair(*given))
    assert run_suite(linear, pair_rows(linear), tmp_path) == first
    assert done[:2] == ["settled", "a pair"] and done.count("settled") == 1


WAYS: dict[str, dict[str, Any]] = {
    "packed": {},
    "one at a time": {"packs": False},
    "own positions": {"counts": True},
    "ids": {"on_ids": "it looks at them"},
    "no gradients": {"ungraded": "it has none"},
    "cut": {"unmasked": "it hears no mask"},
    "prefix every time": {"unkept": "of another kind"},
}


def test_maps_of_a_pair_are_kept_by_how_the_model_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that were made in one way are not taken for those of another."""
    probe = closed_form_probe({letter: [w] for letter, w in WEIGHTS.items()} | {"": [0.0]}, lambda seen: seen[..., 0])
    both = example(probe, "0", "ab，xa，bb。"), example(probe, "1", "ab，ya，bb。", "b")
    made: list[str] = []

    def map_of(one: Example) -> Any:
        return attribution("erase", "label", np.ones(len(one.post)), pieces(one.post), example_id=one.id)

    def attribute(_: Any, one: Example, *given: Any) -> list[Any]:
        made.append(one.id)
        return [map_of(one)]

    monkeypatch.setattr("probes.saliency.attribute.attribute", attribute)
    results = tuple(PostResult.of(one, (), [map_of(one)], tuple(pieces(one.post))) for one in both)
    cache = Cache(tmp_path)

    def compare() -> int:
        before = len(made)
        swap_pair(probe, both, (), results, Settings(), cache)
        return len(made) - before

    monkeypatch.setattr(probe.scorer, "check", lambda one: None)
    for name, changes in WAYS.items():
        probe.scorer.can = Abilities(**changes)
        assert probe.scorer.can.way == ((name,) if changes else ())
        assert (compare(), compare()) == (1, 0), name
    found = Abilities(packs=False, unmasked="it hears no mask")
    monkeypatch.setattr(probe.scorer, "check", lambda one: setattr(probe.scorer, "can", found))
    probe.scorer.can = Abilities()
    assert (compare(), compare()) == (1, 0)  # the row itself is tried before its maps are named


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
        (["ab, ax"], {}, "one row only"),
        (["ab, ax", "ab, ay", "ab, aa"], {}, "more than two rows"),
        (["ab, ax", "ab, ax"], {}, "one post twice"),
        (["ab, ax", "ab, ay"], {"task": "other"}, "two tasks, or two sets of candidates"),
    ],
    ids=["alone", "three", "same post", "other task"],
)
def test_what_is_no_pair_is_left_out(linear: Probe, posts: list[str], changes: dict[str, Any], message: str) -> None:
    made = [example(linear, str(i), post) for i, post in enumerate(posts)]
    made[0] = dataclasses.replace(made[0], **changes)
    good = [example(linear, name, post, pair="2") for name, post in (("x", "ab, ax"), ("y", "ab, ay"))]
    assert pairs([good[0], *made, good[1]]) == ([(0, len(made) + 1)], {message: 1})


def test_rows_without_a_pair_are_none(linear: Probe) -> None:
    assert pairs([example(linear, "1", "ab, ax", pair=None)]) == ([], {})
    assert summarise_swaps([]) is None


def clause_map(post: str, cut: str = "clause", method: str = "erase", **changes: Any) -> Any:
    """A map that gives every unit the sum of its characters' code points, so that equal text has an equal value."""
    units = pieces(post, cut=cut)
    values = np.zeros(len(post))
    for a, b in units:
        values[a:b] = sum(map(ord, post[a:b])) / (b - a)
    return attribution(method, "label", values, units, **changes), units


def compared(first: str, second: str, cut: str = "clause", **changes: Any) -> Swap | LeftOut:
    (a, units_a), (b, units_b) = clause_map(first, cut), clause_map(second, cut, **changes)
    return swap(a, b, (first, second), (units_a, units_b), "1")


@pytest.mark.parametrize(
    ("first", "second", "cut", "units", "at", "width"),
    [
        ("I fed it. It is wet. We ate. We go.", "I fed it. It is dry. We ate. We go.", "clause", 4, 1, 1),
        ("I fed it. It is wet. We ate. We go.", "I fed it. It is. We ate. We go.", "clause", 4, 1, 1),
        ("It is wet. I fed it. We ate.", "It is not wet. I fed it. We ate.", "clause", 3, 0, 1),
        ("a big red dog ran off to us", "a very old cat ran off to us", "word", 8, 1, 3),
        ("I fed it. We ate. We go.", "I fed it. We ate. We run.", "clause", 3, 2, 1),
        ("今天我们去山上玩吧", "今年我们去山上玩吧", "word", 5, 0, 1),
        ("它们说过今天晚上我和朋友", "它们说过今日夜我和朋友", "word", 6, 2, 4),
    ],
    ids=["one clause", "shorter", "at the start", "three words", "at the end", "half a word", "words cut otherwise"],
)
def test_only_equal_text_is_compared(first: str, second: str, cut: str, units: int, at: int, width: int) -> None:
    found = compared(first, second, cut)
    assert isinstance(found, Swap)
    assert (len(found.differences), found.at, found.width) == (units, at, width)
    outside = np.delete(found.differences, range(at, at + width))
    assert not np.any(np.abs(outside) > 1e-6)  # equal text has an equal value


def test_clauses_joined_otherwise_are_not_compared() -> None:
    """45 clauses are joined to 30, by length: another phrase joins others. No unit outside may hold other text."""
    rng = np.random.default_rng(0)
    count = 0
    for _ in range(20):
        texts = [" ".join(rng.choice(["aa", "bbb", "cccc", "d"], rng.integers(1, 6))) for _ in range(45)]
        at = int(rng.integers(45))
        others = [*texts[:at], "zzzzz zzzz zzzz zzzzz zzzz", *texts[at + 1 :]]
        found = compared(". ".join(texts) + ".", ". ".join(others) + ".")
        if isinstance(found, Swap):
            count += 1
            outside = np.delete(found.differences, range(found.at, found.at + found.width))
            assert not np.any(np.abs(outside) > 1e-6)
    assert count >= 5


def test_a_pair_is_left_out_with_its_reason() -> None:
    inserted = compared("I fed it. We ate. We go.", "I fed it. It is wet. We ate. We go.")
    unlike = compared("a red dog ran off to us now", "a very red dog ran off to us now", "word")
    whole = compared("abc", "xyz")
    shut = compared("I fed it. It is wet. We go.", "I fed it. It is dry. We go.", converged=False)
    found = [inserted, unlike, whole, shut]
    assert all(isinstance(one, LeftOut) for one in found)
    found = [dataclasses.replace(one, pair=str(i)) for i, one in enumerate(found)]
    summary = summarise_swaps(found)
    assert summary is not None and (summary["pairs"], summary["n"], summary["moved"]) == (4, 0, None)
    one = summary["by_method"]["erase"]
    assert one["n"] == 0 and one["p_share"] is None and one["p_cosine"] is None and one["cosine"] is None
    assert one["left_out"] == {
        "the phrase is not as many units in both posts": 2,
        "no unit without the phrase": 1,
        "a map may not speak": 1,
    }


def worlds(rng: np.random.Generator, count: int, kind: str, authors: int = 0, widest: int = 3) -> list[Swap]:
    """Pairs whose phrase is 1 to ``widest`` units.

    Their maps differ anywhere ("noise"), add up to what the label does alike everywhere ("flat") or anywhere
    ("complete"), or say what it does at the phrase ("true").
    """
    made = []
    for i in range(count):
        width = int(rng.integers(1, widest + 1))
        k = int(rng.integers(width + 4, width + 9))
        moved = float(rng.normal(2, 1))
        at = int(rng.integers(k - width + 1))
        differences = rng.normal(size=k) * (0.3 if kind == "true" else 1.0)
        if kind == "flat":
            differences = np.full(k, moved / k)
        elif kind == "complete":
            differences = rng.dirichlet(np.ones(k)) * moved
        differences[at : at + width] += (kind == "true") * moved / width
        user = f"u{i % authors}" if authors else None
        made.append(Swap(str(i), "erase", user, moved, False, tuple(differences.tolist()), at, width))
    return made


@pytest.mark.parametrize("kind", ["noise", "complete", "flat"])
@pytest.mark.parametrize("authors", [0, 6], ids=["independent", "two pairs by each of six authors"])
def test_error_rates(authors: int, kind: str) -> None:
    """P(p <= 0.05) where nothing is true, over 400 data sets of 12 pairs (standard error 1.1 %)."""
    rng = np.random.default_rng(5)
    hits = {"p_share": 0, "p_cosine": 0}
    for at in range(400):
        found = summarise_swaps(worlds(rng, 12, kind, authors), draws=199, seed=at)
        assert found is not None
        for name in hits:
            hits[name] += found["by_method"]["erase"][name] <= 0.05
    assert all(count / 400 <= 0.075 for count in hits.values()), hits
    if kind == "flat":
        assert hits == {"p_share": 0, "p_cosine": 0}  # it knows nothing of where
    else:
        assert all(count > 0 for count in hits.values())  # a test that never rejects would pass the line above


def test_what_is_true_is_found() -> None:
    found = summarise_swaps(worlds(np.random.default_rng(1), 12, "true"), draws=999)
    assert found is not None
    one = found["by_method"]["erase"]
    assert (
        one["p_share"] <= 0.01 and one["p_cosine"] <= 0.01 and one["cosine"] > 0.9 and one["share"] > one["share_null"]
    )
    few = summarise_swaps(worlds(np.random.default_rng(1), 4, "true"))
    assert few is not None and few["by_method"]["erase"]["p_share"] is None and few["n"] == 4
    assert few["by_method"]["erase"]["p_cosine"] is None and few["turned"] == 0
