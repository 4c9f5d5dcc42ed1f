"""Worlds whose evidence is spread, denied, or one character: what is planted is what is said; the power of a test."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from probes.checks.crosscheck import Evidence
from probes.checks.verdict import FAMILIES
from probes.citations.align import align
from probes.citations.clauses import pieces
from probes.errors import ProbeError, ProbeInputError
from probes.probe import Probe
from probes.records import Attribution, Example
from probes.suite import BUDGETS
from probes.validation.error_rates import null_evidence
from probes.validation.hard import (
    HARD,
    STANDARD,
    VOTING,
    Judged,
    _told,
    conclusions_of,
    hard_worlds,
    most_share,
    power_interval,
    power_of,
)
from probes.validation.planted import (
    ROUNDS,
    Planted,
    World,
    make_model,
    make_tokenizer,
    planted_rows,
    train,
    vocabulary,
)
from probes.validation.probing import examined
from probes.validation.reasoning import Reasoner, ReasoningWorld, train_reasoner


@pytest.mark.parametrize("language", ["en", "zh"])
def test_three_cues_decide_only_together(language: str) -> None:
    world = World(language=language, rule="three")
    ones = vocabulary(world)["cue1"]
    made = planted_rows(world, make_tokenizer(world), 60, 0)
    seen = [[row["post"][a:b] in ones for a, b in row["cues"]] for row in made]
    for bits, row in zip(seen, made, strict=True):
        assert len(bits) == 3 and row["parsed_label"] == str(int(all(bits)))
    assert sum(map(any, seen)) > sum(map(all, seen)) and 15 < sum(map(all, seen)) < 45


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_denied_cue_says_the_contrary(language: str) -> None:
    world = World(language=language, rule="not", letters=1)
    groups, no = vocabulary(world), "不" if language == "zh" else "not "
    denied = 0
    for row in planted_rows(world, make_tokenizer(world), 60, 0):
        ((a, b),) = row["cues"]
        cue = row["post"][a:b]
        word = cue.removeprefix(no)
        denied += word != cue
        assert word in groups["cue0"] + groups["cue1"] and (language == "en" or len(word) == 1)
        assert row["parsed_label"] == str(int((word in groups["cue1"]) != (word != cue)))
        assert cue in row["parsed_explanation"]
    assert 15 < denied < 45


def test_power_is_of_the_right_side() -> None:
    null = np.linspace(-0.2, 0.2, 21)
    high, low, none = (np.concatenate([[value], null]) for value in (0.5, -0.5, 0.0))
    assert power_of([[high]], 5, 5) == 1.0 == power_of([[low]], 5, 5, more=False)
    assert power_of([[high]], 5, 5, more=False) == 0.0 == power_of([[low]], 5, 5) == power_of([[none]], 5, 5)
    assert power_of([], 5, 5) == 0.0 == power_of([[]], 5, 5)


def test_a_post_whose_map_may_not_speak_stays_a_post() -> None:
    """Of data sets of five, with half of the maps shut, hardly any has five that speak."""
    high, shut = np.array([0.5, *np.linspace(-0.2, 0.2, 21)]), np.array([np.nan])
    assert power_of([[high, shut]], 5, 40) < 0.2 < 0.8 < power_of([[high, shut]], 20, 40)
    assert power_of([[shut]], 20, 5) == 0.0


def test_the_most_that_a_share_may_be() -> None:
    from scipy.stats import binomtest

    for hits, count in ((0, 24), (2, 24), (23, 24)):
        theirs = binomtest(hits, count, alternative="less").proportion_ci(0.95, "exact").high
        assert most_share(hits, count) == pytest.approx(theirs)
    assert most_share(0, 24) > 0.1 and most_share(5, 5) == 1.0  # 24 posts show no rate below a tenth


def test_conclusions_and_what_is_told_of_a_model() -> None:
    rng = np.random.default_rng(0)
    true = [null_evidence(rng, None, 0.9) for _ in range(12)]
    share = conclusions_of([[dataclasses.replace(e, excess=e.excess | {"erase_resample": e.excess["erase"]},
                                                mass=e.mass | {"erase_resample": e.mass["erase"]}) for e in true]],
                           12, 5)  # fmt: skip
    assert share == {"supported": 1.0, "contradicted": 0.0}
    effects = {which: [np.array([3.0, *np.zeros(20)])] * 12 for which in ("necessity", "sufficiency")}
    maps = {method: [e.excess.get(method, np.array([np.nan])) for e in true] for method in VOTING}
    rows = {r["id"]: r for r in _told("one character", True, [Judged(true, maps, effects)] * 2, 2, 0)}
    assert rows["V16.one_character.faithful.contradicted"]["bound"] == 0.05
    assert (
        rows["V16.one_character.faithful.ig.20"]["value"]
        == 1.0
        == rows["V16.one_character.faithful.necessity.10"]["value"]
    )
    assert rows["V16.one_character.faithful.erase_resample.20"]["value"] == 0.0
    assert "(0 of 24 maps may speak)" in rows["V16.one_character.faithful.erase_resample.20"]["what"]
    said = rows["V16.one_character.faithful.ig.20"]["what"]
    assert "95 %" not in said and said.endswith(" drawn anew 0.88 to 1.00")  # two models are no interval for others
    assert rows["V16.one_character.faithful.conclusion.contradicted.10"]["bound"] == 0.05


def test_one_hard_world_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[World] = []

    def stop(world: World) -> Planted:
        asked.append(world)
        raise KeyboardInterrupt

    monkeypatch.setattr("probes.validation.hard.train", stop)
    for name, world in HARD.items():
        with pytest.raises(KeyboardInterrupt):
            hard_worlds(names=(name,))
        assert asked.pop() == world
    with pytest.raises(ProbeInputError, match="spread"):
        hard_worlds(names=("nowhere",))
    assert not asked


def test_each_pair_is_a_world_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every map that can enter a verdict is there, while the verdicts are those of the budget "standard"."""
    trained: list[World] = []

    def untrained(world: World) -> Planted:
        trained.append(world)
        tokenizer = make_tokenizer(world)
        return Planted(world, Probe(make_model(world, tokenizer).eval(), tokenizer, "untrained"), 0.0, 0.0)

    monkeypatch.setattr("probes.validation.hard.train", untrained)
    monkeypatch.setattr("probes.validation.planted.answers_right", lambda probe, examples, **_: [True] * len(examples))
    judged: set[str] = set()

    def seen(example: Example, maps: Sequence[Attribution]) -> Evidence:
        judged.update(one.method for one in maps)
        return examined(example, maps)

    monkeypatch.setattr("probes.validation.hard.examined", seen)
    monkeypatch.setitem(HARD, "small", World(layers=1, hidden=32, clauses=(3, 3), seed=9))
    rows = {r["id"]: r["what"] for r in hard_worlds(seed=2, count=2, draws=1, names=("small",), pairs=2)}
    assert [(world.seed, world.faithful) for world in trained] == [
        (2009 + 100 * at, yes) for yes in (1, 0) for at in (0, 1)
    ]
    for method in FAMILIES:
        assert "of 4 maps may speak" in rows[f"V16.small.faithful.{method}.5"]
    assert judged == set(STANDARD) == set(BUDGETS["standard"][0]) & set(FAMILIES)


def test_a_data_set_is_of_one_model() -> None:
    """Of two models of which one shows it always, half of the data sets show it, and the interval says how little that
    is; a mixture of both would show it always."""
    null = np.linspace(-0.2, 0.2, 21)
    always, never = ([np.concatenate([[value], null])] * 24 for value in (0.5, 0.0))
    assert power_of([always, never], 20, 10) == 0.5
    assert power_of([always + never], 20, 10) > 0.9
    assert power_interval([always, never], 20, 4, again=30) == (pytest.approx(0.0), pytest.approx(1.0, abs=3 / 48))


@pytest.mark.parametrize("module", ["planted", "reasoning"])
@pytest.mark.parametrize("needed", [1, 4, 9])
def test_a_world_that_is_learned_late_gets_more_rounds(
    module: str, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three weak cues that only together decide need four rounds; each round has posts of its own."""
    seen: list[tuple[int, ...]] = []
    where = f"probes.validation.{module}"
    made = "_training_rows" if module == "planted" else "_training"
    monkeypatch.setattr(f"{where}.{made}", lambda world, tokenizer, count, seed: [([seed], 0)])
    monkeypatch.setattr(f"{where}.fit", lambda model, rows, *_: seen.append(tuple(rows[0][0])))
    monkeypatch.setattr(f"{where}.answers_right", lambda probe, rows, **_: [len(seen) >= needed] * len(rows))
    world = World(layers=1, hidden=32)
    learn = train if module == "planted" else lambda one, steps: train_reasoner(ReasoningWorld(one, "chain"), steps)
    if needed > ROUNDS:
        with pytest.raises(ProbeError, match=f"0% right answers after {7 * ROUNDS} steps"):
            learn(world, 7)
    else:
        assert learn(world, 7).accuracy == 1.0
    assert len(seen) == len(set(seen)) == min(needed, ROUNDS)


def test_an_interval_of_power_is_over_posts() -> None:
    """Where a few posts decide, another draw of posts has another power; where all agree, 24 posts are no certainty."""
    null = np.linspace(-0.2, 0.2, 21)
    some = [np.concatenate([[0.16 if at < 6 else 0.0], null]) for at in range(24)]
    low, high = power_interval([some], 20, 20, again=20)
    assert low < power_of([some], 20, 40) < high and high - low > 0.2
    always = [np.concatenate([[0.5], null])] * 24
    assert power_interval([always], 5, 5, again=5) == (1 - 3 / 24, 1.0)
    assert power_interval([always], 5, 5, more=False, again=5) == (0.0, 3 / 24)
    assert power_interval([], 5, 5) == (0.0, 1.0)


def test_worlds_share_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the posts of eight worlds, and what is quoted of them at random, are one draw in eight vocabularies, and 64
    data sets are eight. The two models of a pair do share their posts."""
    for module in ("planted", "reasoning"):
        name = f"probes.validation.{module}.answers_right"
        monkeypatch.setattr(name, lambda probe, examples, **_: [True] * len(examples))

    def drawn(world: World) -> tuple[list[str], list[int], list[int], list[int]]:
        """Posts; which clause holds the cue, and which is quoted; the same of the cue for a reasoning model."""
        tokenizer = make_tokenizer(world)
        probe = Probe(make_model(world, tokenizer).eval(), tokenizer, "untrained")
        quoted = Planted(world, probe, 0.0, 0.0).cited_at_random(40)
        thought = Reasoner(ReasoningWorld(world, "chain"), probe, 0.0, 0.0).examples(40)

        def clause(post: str, at: int) -> int:
            return next(i for i, (_, b) in enumerate(pieces(post)) if at < b)

        said = [clause(e.post, align(e)[0].post_char[0][0]) for e in quoted]
        cues = [[clause(e.post, e.cues[0][0]) for e in examples if e.cues] for examples in (quoted, thought)]
        return [e.post for e in quoted], cues[0], said, cues[1]

    base = World(clauses=(6, 6), seed=201)
    one, liar, other = (drawn(dataclasses.replace(base, **new)) for new in ({}, {"faithful": False}, {"seed": 205}))
    assert one[:3] == liar[:3]
    for column in (1, 2, 3):  # of 40 places among six seven are alike by chance
        assert sum(a == b for a, b in zip(one[column], other[column], strict=True)) < 20
    assert sum(a == b for a, b in zip(one[1], one[2], strict=True)) < 20
