"""Worlds whose evidence is spread, denied, or one character: what is planted is what is said; the power of a test."""

import numpy as np
import pytest

from probes.validation.hard import power_interval, power_of
from probes.validation.planted import World, make_tokenizer, planted_rows, vocabulary


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
    assert power_of([high], 5, 5) == 1.0 == power_of([low], 5, 5, more=False)
    assert power_of([high], 5, 5, more=False) == 0.0 == power_of([low], 5, 5) == power_of([none], 5, 5)
    assert power_of([], 5, 5) == 0.0


def test_an_interval_of_power_is_over_posts() -> None:
    """Where a few posts decide, another draw of posts has another power; where all agree, 24 posts are no certainty."""
    null = np.linspace(-0.2, 0.2, 21)
    some = [np.concatenate([[0.16 if at < 6 else 0.0], null]) for at in range(24)]
    low, high = power_interval(some, 20, 20, again=20)
    assert low < power_of(some, 20, 40) < high and high - low > 0.2
    always = [np.concatenate([[0.5], null])] * 24
    assert power_interval(always, 5, 5, again=5) == (1 - 3 / 24, 1.0)
    assert power_interval(always, 5, 5, more=False, again=5) == (0.0, 3 / 24)
    assert power_interval([], 5, 5) == (0.0, 1.0)
