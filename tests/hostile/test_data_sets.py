"""Data sets made to be expensive: thousands of posts that differ in a number are all near one another. Who stands with
whom is found without comparing each with all."""

import datasketch
import pytest

from mentalglm_jax.data.inspection import Inspection
from mentalglm_jax.data.records import Record
from mentalglm_jax.data.splits import clusters

POST = "I feel so sad today that I cannot do anything at all and nobody sees it, for the {:05d}th time"
COUNT = 300


@pytest.fixture
def compared(monkeypatch):
    """One entry for each comparison of two texts."""
    calls, jaccard = [], datasketch.MinHash.jaccard
    monkeypatch.setattr(datasketch.MinHash, "jaccard", lambda one, other: (calls.append(1), jaccard(one, other))[1])
    return calls


def alike() -> list[Record]:
    return [
        Record(f"r{i}", "suicide_risk", "en", POST.format(i), "High or low?", "low", split=("train", "test")[i % 2])
        for i in range(COUNT)
    ]


def test_posts_that_are_all_near_are_one_cluster(compared):
    assert len(set(clusters(alike()))) == 1 == len(set(clusters(alike()[::-1])))
    assert len(compared) < 2 * 10 * COUNT


def test_posts_that_are_all_near_are_inspected(compared):
    inspection = Inspection()
    for record in alike():
        inspection.add(record)
    (overlap,) = inspection.report()["overlap"]
    assert overlap["near"] == COUNT // 2 and len(overlap["near_ids"]) == 20
    assert len(compared) < 10 * COUNT
