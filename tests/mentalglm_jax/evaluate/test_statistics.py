"""Paired tests against their definitions; the comparison of two runs never mixes up rows."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate import compare, evaluate
from mentalglm_jax.evaluate.metrics import METRICS
from mentalglm_jax.evaluate.statistics import holm, mcnemar, paired_bootstrap
from mentalglm_jax.text import tasks


def rows(gold: Sequence[str], said: Sequence[str | None], post=lambda i: f"post {i}") -> list[dict]:
    question = tasks.TASKS["suicide_risk"].question("en")
    records = [Record(f"r{i}", "suicide_risk", "en", post(i), question, label=g) for i, g in enumerate(gold)]
    return [r.to_dict() | {"parsed_label": s, "parse_status": "ok"} for r, s in zip(records, said, strict=True)]


def drawn(seed: int, count: int, right: float, gold=None) -> tuple[list[str], list[str]]:
    rng = random.Random(seed)
    gold = gold or [rng.choice(["high", "low"]) for _ in range(count)]
    other = {"high": "low", "low": "high"}
    return gold, [g if rng.random() < right else other[g] for g in gold]


def test_mcnemar_is_the_exact_binomial():
    first = np.array([True] * 8 + [False] * 1 + [True] * 5 + [False] * 3)
    second = np.array([False] * 8 + [True] * 1 + [True] * 5 + [False] * 3)
    posts = [f"p{i}" for i in range(17)]
    found = mcnemar(first, second, posts)
    assert (found["only_first"], found["only_second"]) == (8, 1)
    assert found["p"] == pytest.approx(2 * (1 + 9) / 2**9)  # two-sided: at most 1 of 9 fair coins
    assert mcnemar(first, first, posts) == {"only_first": 0, "only_second": 0, "p": 1.0}
    # Of the last three rows, all of one post, each system has one right that the other has not.
    shared = mcnemar(first[5:10], second[5:10], ["a", "b", "c", "c", "c"])
    assert (shared["only_first"], shared["only_second"]) == (2, 0)


def test_copies_of_posts_narrow_no_interval():
    gold, said = drawn(4, 30, 0.7)
    once = evaluate(rows(gold, said), draws=200)["suicide_risk"]
    marks = ["", " ", "!", " \u3000", "…", "\n"]

    def post(i: int) -> str:
        return f"post {i % 30}{marks[i // 30]}"

    many = evaluate(rows(gold * 6, said * 6, post), draws=200)["suicide_risk"]
    width, wide = (one["ci95"][1] - one["ci95"][0] for one in (once, many))
    assert many["n"] == 180 and wide == pytest.approx(width, rel=0.2)
    other = [g if i % 30 else None for i, g in enumerate(gold * 6)]
    found = compare((rows(gold * 6, gold * 6, post), []), (rows(gold * 6, other, post), []), draws=50)["suicide_risk"]
    assert found["text"]["mcnemar"] | {"p_holm": 1.0} == {"only_first": 1, "only_second": 0, "p": 1.0, "p_holm": 1.0}


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_paired_differences_come_from_the_same_posts():
    gold, a = drawn(0, 60, 0.9)
    _, b = drawn(1, 60, 0.6, gold)
    posts = [f"p{i % 20}" for i in range(60)]
    keys = tasks.TASKS["suicide_risk"].keys
    g, x, y = (np.array([[label == key for key in keys] for label in labels]) for labels in (gold, a, b))
    found = paired_bootstrap("single", posts, g, x, y, draws=50, seed=3)
    _, post_of = np.unique(posts, return_inverse=True)
    times = np.random.default_rng(3).multinomial(20, [1 / 20] * 20, size=50)
    differences = []
    for counts in times:
        sample = np.repeat(np.arange(60), counts[post_of])
        differences.append((g & x)[sample].any(1).mean() - (g & y)[sample].any(1).mean())
    micro = found["micro_f1"]
    assert micro["ci95"] == pytest.approx(np.percentile(differences, [2.5, 97.5]).tolist())
    assert micro["difference"] == pytest.approx((g & x).any(1).mean() - (g & y).any(1).mean())
    below = min(sum(d <= 0 for d in differences), sum(d >= 0 for d in differences))
    assert micro["p"] == pytest.approx(min(1, 2 * (1 + below) / 51))


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6])
def test_few_posts_are_no_evidence(count):
    """One post, right in one system and wrong in the other, had p = 0.002 and an interval of no width."""
    gold = ["high", "low", "high", "low", "low", "high"][:count]
    wrong = ["low" if one == "high" else "high" for one in gold]
    for copies in (1, 3):  # what repeats a post says nothing new
        right, bad = ((rows(gold * copies, said * copies, lambda i: f"post {i % count}"), []) for said in (gold, wrong))
        found = compare(right, bad, draws=500)["suicide_risk"]["text"]["metrics"]["micro_f1"]
        assert found["difference"] == 1.0 and found["p"] == pytest.approx(2.0 ** (1 - count))
        one = evaluate(right[0], draws=50)["suicide_risk"]["ci95_by_metric"]["micro_f1"]
        assert (found["ci95"], one) == (([-1.0, 1.0], [0.0, 1.0]) if count < 5 else ([1.0, 1.0], [1.0, 1.0]))


def test_comparison_is_antisymmetric_and_finds_a_real_difference():
    gold, good = drawn(2, 200, 0.9)
    _, bad = drawn(3, 200, 0.6, gold)
    one, two = (rows(gold, good), []), (random.Random(0).sample(rows(gold, bad), 200), [])
    there, back = compare(one, two, draws=200)["suicide_risk"], compare(two, one, draws=200)["suicide_risk"]
    assert set(there) == {"text"}
    there, back = there["text"], back["text"]
    assert there["mcnemar"]["only_first"] == back["mcnemar"]["only_second"] > 40
    assert there["mcnemar"]["p_holm"] == there["mcnemar"]["p"] < 1e-6
    scores = [evaluate(part[0], draws=2)["suicide_risk"] for part in (one, two)]
    for name in METRICS:
        assert there["metrics"][name]["difference"] == pytest.approx(-back["metrics"][name]["difference"])
        assert there["metrics"][name]["difference"] == pytest.approx(scores[0][name] - scores[1][name])
        assert there["metrics"][name]["p"] == pytest.approx(2 / 201)
        assert there["metrics"][name]["ci95"][0] > 0.1
    same = compare(one, one, draws=50)["suicide_risk"]["text"]
    assert same["mcnemar"]["p"] == same["metrics"]["weighted_f1"]["p"] == 1.0


def test_unread_answers_count_in_comparisons():
    gold = ["high", "low"] * 10
    found = compare((rows(gold, gold), []), (rows(gold, [None, *gold[1:]]), []), draws=20)["suicide_risk"]["text"]
    assert found["mcnemar"]["only_first"] == 1
    assert found["metrics"]["micro_f1"]["difference"] == pytest.approx(1 / 20)


def test_only_the_same_records_are_compared():
    gold = ["high", "low", "high", "low"]
    whole = (rows(gold, gold), [])
    for other, message in (
        ((rows(gold, gold)[:3], []), r"'r3' \(1 in all\) has no row in the second run"),
        ((rows(["low", *gold[1:]], gold), []), "'r0': post or gold label differ"),
        ((rows(gold, gold, post=lambda i: f"other {i}"), []), "'r0': post or gold label differ"),
        (([], []), "share no task"),
    ):
        with pytest.raises(InputError, match=message):
            compare(whole, other)
    with pytest.raises(InputError, match="no row in the first run"):
        compare((rows(gold, gold)[:3], []), whole)


def test_the_positive_class_has_an_interval_and_a_paired_test():
    """F1 of "high" by drawing posts, against the same statistics written out; a task without such a class has none."""
    rng = random.Random(7)
    gold = [rng.choice(["high", "low"]) for _ in range(60)]
    said = [rng.choice([key, "high", None]) for key in gold]
    answers, pairs = rows(gold, said), list(zip(gold, said, strict=True))
    entry = evaluate(answers, draws=400)["suicide_risk"]

    def high(chosen: list) -> float:
        hit = sum(pair == ("high", "high") for pair in chosen)
        return 2 * hit / (sum(gold == "high" for gold, _ in chosen) + sum(said == "high" for _, said in chosen))

    assert entry["positive_f1"] == pytest.approx(high(pairs))
    many = [high(rng.choices(pairs, k=60)) for _ in range(4000)]
    assert entry["ci95_by_metric"]["positive_f1"] == pytest.approx(np.percentile(many, [2.5, 97.5]), abs=0.025)
    test = compare((answers, ()), (rows(gold, list(gold)), ()), draws=200)["suicide_risk"]["text"]["metrics"]
    assert test["positive_f1"]["difference"] == pytest.approx(entry["positive_f1"] - 1)
    assert test["positive_f1"]["p_holm"] == test["positive_f1"]["p"] < 0.02
    levels = [item | {"task": "suicide_level", "label": "3", "parsed_label": "3"} for item in answers]
    assert "positive_f1" not in evaluate(levels, draws=5)["suicide_level"]["ci95_by_metric"]
