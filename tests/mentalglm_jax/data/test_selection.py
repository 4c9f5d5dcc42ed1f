"""Weights by label: what an epoch has, how it is told, and what is refused; which records of a file a limit keeps."""

from collections import Counter

import pytest

from mentalglm_jax.data.records import Record
from mentalglm_jax.data.selection import evenly, limited, mixture, weighted
from mentalglm_jax.errors import InputError
from mentalglm_jax.text.tasks import get_task


def risk(number: int, label: str, source: str = "s") -> Record:
    return Record(f"{source}{label}{number}", "suicide_risk", "zh", f"帖子{number}", "？", label=label, source=source)


def thoughts(number: int, *labels: str) -> Record:
    return Record(f"t{number}", "cognitive_distortion", "zh", f"帖子{number}", "？", labels=labels)


RISK = [risk(n, "high" if n % 5 == 0 else "low") for n in range(50)]  # 10 high, 40 low


def counts(records):
    return Counter(record.label for record in records)


def test_labels_are_weighed_one_by_one():
    found = weighted(RISK, {"suicide_risk": {"high": 2.5, "low": 0.5}}, 0)
    assert counts(found) == {"high": 25, "low": 20}
    times = Counter(record.id for record in found)
    assert sorted(times[r.id] for r in RISK if r.label == "high") == [2] * 5 + [3] * 5
    assert sorted(times[r.id] for r in RISK if r.label == "low") == [0] * 20 + [1] * 20
    assert [r.id for r in found] == [r.id for r in RISK for _ in range(times[r.id])]  # the order stays
    assert found == weighted(RISK, {"suicide_risk": {"low": 0.5, "high": 2.5}}, 0)  # whatever order they are named in
    assert found != weighted(RISK, {"suicide_risk": {"high": 2.5, "low": 0.5}}, 1)
    assert counts(weighted(RISK, {"s": {"high": 3.0}}, 0)) == {"high": 30, "low": 40}  # what is not named counts once
    assert counts(weighted(RISK, {"s": {"high": 0.0}}, 0)) == {"low": 40}


@pytest.mark.parametrize("high", [1, 3, 7, 10, 40, 49])
def test_balanced_makes_labels_equally_many(high):
    records = [risk(n, "high" if n < high else "low") for n in range(50)]
    found = weighted(records, {"suicide_risk": "balanced"}, 3)
    assert set(counts(found).values()) == {max(high, 50 - high)}
    assert {r.id for r in found} == {r.id for r in records}  # none is left out


def test_balanced_is_within_the_data_set_that_is_named():
    others = [risk(n, "high", "other") for n in range(7)]
    found = weighted([*RISK, *others], {"s": "balanced"}, 0)
    assert counts([r for r in found if r.source == "s"]) == {"high": 40, "low": 40}
    assert [r for r in found if r.source == "other"] == others


def test_of_several_labels_the_heaviest_counts():
    records = [thoughts(0, "labeling"), thoughts(1, "labeling", "mental_filter"), thoughts(2, "mental_filter")]
    found = weighted(records, {"cognitive_distortion": {"mental_filter": 3.0, "labeling": 0.0}}, 0)
    assert [r.id for r in found] == ["t1"] * 3 + ["t2"] * 3
    assert [r.id for r in weighted(records, {"cognitive_distortion": {"labeling": 2.0}}, 0)] == [
        "t0",
        "t0",
        "t1",
        "t1",
        "t2",
    ]


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"suicide_risk": {"hihg": 2.0}}, r"weights\.suicide_risk: 'hihg' is no label of it \(did you mean 'high'\?\)"),
        ({"s": {"zzz": 2.0}}, r"weights\.s: 'zzz' is no label of it; its labels: "),
        ({"nobody": "balanced"}, "no record of data set 'nobody'"),
    ],
)
def test_a_name_that_fits_nothing(weights, says):
    with pytest.raises(InputError, match=says):
        weighted(RISK, weights, 0)


def test_the_mix_is_told():
    found = weighted(RISK, {"suicide_risk": {"high": 2.0, "low": 0.5}}, 0)
    records = [*RISK, thoughts(0, "labeling", "mental_filter")]
    assert mixture(records, [*found, records[-1]]) == [
        "an epoch has 40 records of suicide_risk: high 20 (10 different), low 20 of 40",
        "an epoch has 1 records of cognitive_distortion: mental_filter 1 of 1, labeling 1 of 1",
    ]


@pytest.mark.parametrize(("limit", "kept"), [(2, 4), ({"suicide_risk": 3}, 13), (10, 20), (50, 20), (None, 20)])
def test_a_limit_takes_from_the_whole_of_a_sorted_file(limit, kept):
    records = [
        Record(id=f"{task}-{i}", task=task, language="zh", post=f"帖子{i}", question="？", label=label, labels=labels,
               source="test", split="dev")
        for task, label, labels in (("suicide_risk", "high", None), ("cognitive_distortion", None, ("labeling",)))
        for i in range(10)
    ]  # fmt: skip
    chosen = limited(records, limit)
    assert len(chosen) == kept
    assert [r for r in records if r in chosen] == chosen  # the order stays
    if limit == 2:
        parts = [(r.task, int(r.id[-1]) // 5) for r in chosen]
        assert parts == [(task, half) for task in ("suicide_risk", "cognitive_distortion") for half in (0, 1)]


@pytest.mark.parametrize("count", [1, 7, 60, 600])
def test_one_of_each_part_is_kept(count):
    for most in {1, 2, 3, count // 2 or 1, count - 1 or 1, count, count + 5}:
        kept = evenly(count, most)
        assert kept == evenly(count, most) and len(kept) == min(most, count)
        ends = [part * count // most for part in range(most + 1)]
        assert most >= count or all(a <= k < b for k, a, b in zip(kept, ends, ends[1:], strict=False))


@pytest.mark.parametrize("period", [2, 3, 6])
def test_labels_that_take_turns_are_all_kept(period):
    """Every n-th record of such a file has one label, or is one question of several about a post."""
    keys = get_task("cognitive_distortion").keys
    records = [thoughts(n, keys[n % period]) for n in range(100 * period)]
    kept = Counter(record.gold for record in limited(records, 100))
    assert len(kept) == period and min(kept.values()) > 50 / period


def test_what_is_kept_of_a_task_does_not_depend_on_the_others():
    others = [thoughts(n, "labeling") for n in range(33)]
    mixed = limited([x for pair in zip(RISK, others, strict=False) for x in pair], 7)
    assert [r for r in mixed if r.task == "suicide_risk"] == limited(RISK[:33], 7)
    assert [r for r in mixed if r.task == "cognitive_distortion"] == limited(others, {"cognitive_distortion": 7})
