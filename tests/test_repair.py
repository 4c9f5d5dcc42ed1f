"""`make repair`: what is sampled from carries no mark, the null turns pairs and nothing else, and the table counts."""

import json

import pytest

from mentalglm_jax.data.records import read_records, write_records
from mentalglm_jax.data.synthetic import SyntheticConfig, make_corpus
from scripts import repair


@pytest.fixture
def demo(tmp_path):
    """What `make demo` leaves of its records."""
    for variant in ("faithful", "unfaithful"):
        config = SyntheticConfig(n_train=20, n_dev=0, n_test=4, n_clauses=(4, 6), fillings=1, templates=2,
                                 tasks=("suicide_risk",), variant=variant)  # fmt: skip
        for split in ("train", "test"):
            records = [record for record in make_corpus(config) if record.split == split]
            write_records(tmp_path / "demo" / "data" / variant / f"{split}.jsonl", records)
    return tmp_path / "demo"


def rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_posts_say_nothing_of_their_label_or_cue(demo, tmp_path):
    work = repair.Repair(tmp_path / "out", demo, 12)
    sealed = read_records(work.make_posts())
    parts = {name: rows(tmp_path / "out" / f"{name}.jsonl") for name in ("posts-1", "posts-2", "fresh-posts")}
    assert all(set(row) == {"id", "task", "language", "post"} for part in parts.values() for row in part)
    assert [len(part) for part in parts.values()] == [12, 12, repair.FRESH]
    assert {row["language"] for row in parts["posts-1"]} == {"en", "zh"}
    posts = [{row["post"] for row in part} for part in parts.values()]
    known = {record.post for split in ("train", "test")
             for record in read_records(demo / "data" / "faithful" / f"{split}.jsonl")}  # fmt: skip
    for at, some in enumerate(posts):
        assert not some & known and not any(some & other for other in posts[:at])
    assert [record.post for record in sealed] == [row["post"] for row in parts["fresh-posts"]]
    assert all(record.cues and record.decoys for record in sealed)


def test_the_null_turns_about_half_of_the_pairs(tmp_path):
    given = [{"id": f"p{n}", "prompt_ids": [1], "chosen_ids": [2, n], "rejected_ids": [3, n]} for n in range(100)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    work = repair.Repair(tmp_path, tmp_path, 1)
    found = rows(work.turned(tmp_path / "pairs.jsonl", tmp_path / "null"))
    turned = [row["chosen_ids"][0] == 3 for row in found]
    assert 35 < sum(turned) < 65
    for row, was, other in zip(found, given, turned, strict=True):
        assert row == (was | {"chosen_ids": was["rejected_ids"], "rejected_ids": was["chosen_ids"]} if other else was)


def test_the_table_counts_what_is_cited(demo):
    truth = read_records(demo / "data" / "faithful" / "test.jsonl")
    said = {record.id: "cue" if n < 3 else "decoy" if n < 5 else "nothing" for n, record in enumerate(truth)}
    answers = []
    for record in truth:
        (a, b), (c, d) = (record.cues or ())[0], (record.decoys or ())[0]
        text = {"cue": record.post[a:b], "decoy": record.post[c:d], "nothing": "x"}[said[record.id]]
        answers.append({"id": record.id, "parsed_explanation": f'It says "{text}".', "parsed_label": record.label,
                        "parse_status": "ok", "output_ids": [1, 2]})  # fmt: skip
    answers[0] |= {"parsed_label": None, "parse_status": "no_label"}
    probes = {"conclusion": "supported", "verdicts": {"supported": 3}, "mass_ratio": {"ig": 0.5}, "n_quotes": 8,
              "mass_ratio_null": {"erase": 0.25}, "fabricated_quote_rate": 0.0}  # fmt: skip
    found = repair.measured({"rows": answers, "probes": probes}, truth)
    assert found["cites_cue"]["mean"] == 3 / 8 and found["cites_decoy"]["mean"] == 2 / 8
    assert 0.1 < found["cites_cue"]["low"] < 3 / 8 < found["cites_cue"]["high"] < 0.75
    assert found["unreadable"] == 1 / 8 and 0.8 < found["label_f1"] < 1 and found["tokens"] == 2
    table = repair.table({"before": found})
    assert "| before | 0.38 (" in table and "| 3/0/0 | supported | 0.50 | – | 0.25 | 8 |" in table


def test_without_a_demo_one_line_says_what_to_run(tmp_path):
    with pytest.raises(SystemExit, match=r"control/adapter is missing; `make demo` makes it"):
        repair.main(["--demo", str(tmp_path), "--out", str(tmp_path / "out")])
