"""Data sets made to be expensive: thousands of posts that are all near one another, the same post thousands of times,
one post without end. Who stands with whom is found without comparing each with all."""

import random
import time

import pytest

from mentalglm_jax.data import near
from mentalglm_jax.data.inspection import Inspection
from mentalglm_jax.data.near import NearIndex, near_duplicates
from mentalglm_jax.data.records import Record
from mentalglm_jax.data.splits import clusters

POST = "I feel so sad today that I cannot do anything at all and nobody sees it, for the {:05d}th time"
COUNT = 300


@pytest.fixture
def compared(monkeypatch):
    """How many signatures each text was compared with, where a bucket has room for eight."""
    calls, agreement = [], near.agreement
    monkeypatch.setattr(near, "MOST", 8)
    monkeypatch.setattr(near, "agreement", lambda many, one: (calls.append(len(many)), agreement(many, one))[1])
    return calls


def alike(count=COUNT, post=POST) -> list[Record]:
    return [
        Record(f"r{i}", "suicide_risk", "en", post.format(i), "High or low?", "low", split=("train", "test")[i % 2])
        for i in range(count)
    ]


def most_compared() -> int:
    """A bucket of each band, all full: fewer than there are texts."""
    return near.MOST * NearIndex(0.8)._count


def test_posts_that_are_all_near_are_one_cluster(compared):
    assert len(set(clusters(alike()))) == 1 == len(set(clusters(alike()[::-1])))
    assert max(compared) <= most_compared() < COUNT // 3


def test_posts_that_are_all_near_are_inspected(compared):
    inspection = Inspection()
    for record in alike():
        inspection.add(record)
    (overlap,) = inspection.report()["overlap"]
    assert overlap["near"] > 0.95 * COUNT / 2 and len(overlap["near_ids"]) == 20
    assert max(compared) <= most_compared()


def test_one_post_thousands_of_times_is_inspected():
    """Half of them in the training part: each pair would be 16 million."""
    inspection, began = Inspection(near=False), time.process_time()
    for record in alike(8000, "always the same words"):
        inspection.add(record)
    (overlap,) = inspection.report()["overlap"]
    assert overlap["exact"] == 4000 and overlap["exact_ids"][:2] == [["r0", "r1"], ["r0", "r3"]]
    assert len(overlap["exact_ids"]) == 20 and time.process_time() - began < 5


def test_posts_that_share_a_band_and_are_not_near(compared):
    """More than half of each is the same: many share a band of their signatures, none is near another."""
    draw = random.Random(0)
    texts = [(f"{POST[:50]} {draw.getrandbits(64):x}", "en") for _ in range(COUNT)]
    assert set(near_duplicates(texts, 0.8)) == {None}
    assert COUNT // 15 < max(compared) <= most_compared()


def test_a_long_post_is_signed_in_little_memory(monkeypatch):
    sizes, blank = [], near._blank()
    update = type(blank).update_batch
    monkeypatch.setattr(type(blank), "update_batch", lambda self, some: (sizes.append(len(some)), update(self, some)))
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))
    whole = blank.copy()
    update(whole, list(near.shingles(text, "zh")))
    assert (near.signature(text, "zh") == whole.hashvalues).all() and max(sizes) <= near._AT_ONCE < sum(sizes)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_time_grows_with_the_number_of_posts():
    """200,000 near-identical posts: four times as many take less than six times as long (each with all: sixteen)."""
    seconds = {}
    for count in (12_500, 50_000, 200_000):
        records, began = alike(count), time.process_time()
        assert len(set(clusters(records))) == 1
        seconds[count] = time.process_time() - began
    assert seconds[50_000] < 6 * seconds[12_500] and seconds[200_000] < 6 * seconds[50_000], seconds
