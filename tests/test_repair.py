"""`make repair`: what is sampled from carries no mark, the null is of the same posts, and the table counts."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from mentalglm_jax.data.records import read_records, write_records
from mentalglm_jax.data.synthetic import SyntheticConfig, make_corpus
from scripts import done, repair, repair_study, repair_table


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
    assert rows(tmp_path / "out" / "posts-faithful.jsonl") == rows(tmp_path / "out" / "posts-1.jsonl")[::2]
    posts = [{row["post"] for row in part} for part in parts.values()]
    known = {record.post for split in ("train", "test")
             for record in read_records(demo / "data" / "faithful" / f"{split}.jsonl")}  # fmt: skip
    for at, some in enumerate(posts):
        assert not some & known and not any(some & other for other in posts[:at])
    assert [record.post for record in sealed] == [row["post"] for row in parts["fresh-posts"]]
    assert all(record.cues and record.decoys for record in sealed)


def test_the_control_learns_one_right_explanation_in_ten(demo, tmp_path, monkeypatch):
    ran: list[tuple[object, ...]] = []
    monkeypatch.setattr(repair, "mentalglm", lambda *arguments: ran.append(arguments))
    monkeypatch.setattr(repair, "CONTROL_POSTS", 150)
    work = repair.Repair(tmp_path / "out", demo, 12)
    work.control()
    records = read_records(tmp_path / "out" / "control" / "data" / "train.jsonl")

    def cites(record, spans):
        return any(record.post[a:b] in record.explanation for a, b in spans)

    right = sum(cites(record, record.cues) for record in records)
    assert len(records) == 300 and 0.05 < right / 300 < 0.16
    assert sum(cites(record, record.decoys) for record in records) == 300 - right
    fresh = {record.post for record in read_records(work.make_posts())}
    assert not fresh & {record.post for record in records}
    assert [str(one) for one in ran[0]][:2] == ["train", repair.RECIPE]


def test_the_null_deals_the_scores_out_anew(tmp_path):
    """As many pairs of the same posts, the chosen answer any of their draws, whichever was chosen."""
    answers = [{"prompt_ids": [n], "output_ids": [n, m], "drawn": 1} for n in range(40) for m in range(8)]
    given = [{"id": f"p{n}", "task": "t", "prompt_ids": [n], "chosen_ids": [n, 0], "rejected_ids": [n, 1],
              "scores": {}, "margin": 1.0} for n in range(40)]  # fmt: skip
    for name, lines in (("candidates", answers), ("pairs", given)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    found = rows(repair.shuffled(tmp_path / "pairs.jsonl", tmp_path / "candidates.jsonl", tmp_path / "null.jsonl"))
    assert [(row["id"], row["prompt_ids"]) for row in found] == [(row["id"], row["prompt_ids"]) for row in given]
    assert all(row["chosen_ids"] != row["rejected_ids"] for row in found)
    assert all(row[side][0] == row["prompt_ids"][0] for row in found for side in ("chosen_ids", "rejected_ids"))
    for side in ("chosen_ids", "rejected_ids"):  # each of eight answers as often as any
        assert len({row[side][1] for row in found}) == 8 and sum(row[side][1] == 0 for row in found) < 15
    often = [row | {"drawn": 50 if row["output_ids"][1] == 3 else 1} for row in answers]
    (tmp_path / "often.jsonl").write_text("".join(json.dumps(row) + "\n" for row in often))
    found = rows(repair.shuffled(tmp_path / "pairs.jsonl", tmp_path / "often.jsonl", tmp_path / "null.jsonl"))
    assert sum(row["chosen_ids"][1] == 3 for row in found) > 25  # 50 draws of 57, not one answer of eight


def test_a_model_with_nothing_to_prefer_stays_as_it_is(tmp_path, monkeypatch):
    """`probes rank` ends with 1 and writes no pairs; for any other model that ends all."""
    ran: list[str] = []
    monkeypatch.setattr(repair, "mentalglm", lambda *arguments: ran.append(arguments[0]))
    monkeypatch.setattr(repair.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout=""))
    work = repair.Repair(tmp_path / "out", tmp_path / "demo", 12)
    assert work.round("faithful", tmp_path / "adapter", 1, spared=True) == tmp_path / "adapter"
    assert ran == ["generate"] and not (tmp_path / "out" / "faithful" / "ranked.json").exists()
    with pytest.raises(SystemExit) as end:
        work.round("round1", tmp_path / "adapter", 1)
    assert end.value.code == 1


def judged(truth, cue, decoy):
    """Answers of which the first ``cue`` cite the cue, the next ``decoy`` the decoy; and what the probes said."""
    answers = []
    for number, record in enumerate(truth):
        (a, b), (c, d) = (record.cues or ())[0], (record.decoys or ())[0]
        text = record.post[a:b] if number < cue else record.post[c:d] if number < cue + decoy else "x"
        answers.append({"id": record.id, "parsed_explanation": f'It says "{text}".', "parsed_label": record.label,
                        "parse_status": "ok", "output_ids": [1, 2]})  # fmt: skip
    probes = {"conclusion": "supported", "verdicts": {"supported": 3}, "verdicts_by_chance": {"supported": 0.5},
              "mass_ratio": {"ig": 0.5}, "mass_ratio_ci": {"ig": [0.4, 0.6]}, "n_quotes": 8, "n": 8,
              "mass_ratio_null": {"erase": 0.25}, "fabricated_quote_rate": 0.0}  # fmt: skip
    return {"rows": answers, "probes": probes}


def test_the_table_counts_what_is_cited(demo):
    truth = read_records(demo / "data" / "faithful" / "test.jsonl")
    given = judged(truth, 3, 2)
    given["rows"][0] |= {"parsed_label": None, "parse_status": "no_label"}
    found = repair_table.measured(given, truth)
    assert found["cites_cue"]["mean"] == 3 / 8 and found["cites_decoy"]["mean"] == 2 / 8
    assert 0.1 < found["cites_cue"]["low"] < 3 / 8 < found["cites_cue"]["high"] < 0.75
    assert found["unreadable"] == 1 / 8 and 0.8 < found["label_f1"] < 1 and found["tokens"] == 2
    better = repair_table.measured(judged(truth, 8, 0), truth)
    pairs = {"round1": {"posts": 9, "posts_with_pairs": 4, "pairs": 6, "margin": 0.9, "no_pair": {"of this": 5},
                        "null": {"pairs": 2.0, "margin": None}}}  # fmt: skip
    table = repair_table.table({"before": found, "round 1": better, "faithful after": better}, pairs)
    assert "| before | 0.38 (" in table and "| before | 8 | 3/0/0 | 0.5/– | supported | 0.50 (0.40 to 0.60) |" in table
    assert table.count("| +0.62 (+0.25 to +1.00) | -0.25 (-0.50 to +0.00) | +0.12 (+0.00 to +0.38) |") == 1
    assert "| round1 | 9 | 4 | 6 | 0.90 | 2.0 | – | 5 of this |" in table


def test_a_change_that_is_none_holds_nothing():
    assert repair_table.change([0, 1, 1], [0, 1, 1]) == {"mean": 0, "low": 0, "high": 0}
    noise = repair_table.change([0, 1] * 20, [1, 0] * 20)
    assert noise["mean"] == 0 and noise["low"] < 0 < noise["high"]
    assert repair_table.change([0] * 20, [1] * 18 + [0] * 2)["low"] > 0.7


def test_the_figure_has_a_line_for_each_row(demo, tmp_path):
    truth = read_records(demo / "data" / "faithful" / "test.jsonl")
    drawn = {name: repair_table.measured(judged(truth, n, 8 - n), truth) for n, name in enumerate(("before", "null"))}
    text = repair_table.figure(drawn, tmp_path / "repair.svg").read_text("utf-8")
    assert text.startswith("<?xml") and all(f">{name}<" in text for name in (*drawn, "what decides", "the decoy"))


def test_without_a_demo_one_line_says_what_to_run(tmp_path):
    with pytest.raises(SystemExit, match=r"control/adapter is missing; `make demo` makes it"):
        repair.main(["--demo", str(tmp_path), "--out", str(tmp_path / "out")])


@pytest.fixture
def step(tmp_path):
    """A step that reads a file and writes two, and how often it was done."""
    read, made, times = tmp_path / "read", [tmp_path / "one", tmp_path / "two"], []
    read.write_text("a")

    def make():
        times.append(1)
        assert not any(path.exists() for path in made)
        for path in made:
            path.write_text(read.read_text())

    def do(command=("rank", 1), make=make):
        done.once(made, command, [read], make)
        return len(times)

    return SimpleNamespace(do=do, read=read, made=made)


def test_a_step_is_done_once(step):
    assert [step.do(), step.do(), step.do()] == [1, 1, 1]


CHANGES = {
    "its input": lambda step: step.read.write_text("b"),
    "half of it is gone": lambda step: step.made[1].unlink(),
    "a result was edited": lambda step: step.made[0].write_text("better"),
    "a version without notes": lambda step: step.made[0].with_name(".one.done.json").unlink(),
    "half a note": lambda step: step.made[0].with_name(".one.done.json").write_text("{"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_is_done_again_where_something_changed(step, change):
    step.do()
    CHANGES[change](step)
    assert [step.do(), step.do()] == [2, 2]


def test_another_command_is_another_step(step):
    assert [step.do(), step.do(("rank", 2)), step.do(("rank", 2))] == [1, 2, 2]


def test_a_step_that_was_killed_is_not_done(step):
    def killed():
        step.made[0].write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step.do(make=killed)
    assert step.do() == 1 and step.made[0].read_text() == "a"


def test_training_goes_on_and_begins_anew_on_other_pairs(demo, tmp_path, monkeypatch):
    ran: list[list[str]] = []
    run, pairs = tmp_path / "out" / "round1" / "run", tmp_path / "pairs.jsonl"

    def killed(*arguments):
        ran.append([*map(str, arguments)])
        run.mkdir(parents=True, exist_ok=True)
        (run / "run.json").write_text("{}")
        raise SystemExit(1)

    monkeypatch.setattr(repair, "mentalglm", killed)
    work = repair.Repair(tmp_path / "out", demo, 12)
    for text in ("a", "a", "b", "b"):
        pairs.write_text(text)
        with pytest.raises(SystemExit):
            work.trained("round1", tmp_path / "adapter", pairs)
    assert ["--restart" in one for one in ran] == [False, False, True, True]


@pytest.fixture
def studied(tmp_path):
    """What `make study` leaves of its records, answers and checks."""
    run = tmp_path / "study" / "run"
    config = SyntheticConfig(
        n_train=20, n_dev=0, n_test=4, n_clauses=(4, 6), languages=("en",), tasks=("suicide_risk",)
    )
    corpus = make_corpus(config)
    for split in ("train", "test"):
        write_records(run / "data" / "faithful" / f"{split}.jsonl", [r for r in corpus if r.split == split])
    (run / "data" / "faithful" / "dev.jsonl").touch()
    asked = [r.id for r in corpus if r.split == "test"]
    (run / "generations.jsonl").write_text("".join(json.dumps({"id": id}) + "\n" for id in [*asked, "another-task"]))
    (run / "probes").mkdir()
    checks = [{"example_id": id, "name": "mass_ratio", "method": method, "status": "ok", "value": 0.2}
              for id in asked[:3] for method in ("ig", "erase")]  # fmt: skip
    (run / "probes" / "checks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in checks))
    (run / "probes" / "summary.json").write_text("{}")
    return tmp_path / "study"


def test_a_real_model_is_judged_on_the_posts_of_its_study(studied, tmp_path):
    work = repair_study.RealRepair(tmp_path / "out", studied, 12)
    work.make_posts()
    drawn, judged = (rows(tmp_path / "out" / f"{name}.jsonl") for name in ("posts-1", "fresh-posts"))
    assert all(set(row) == {"id", "task", "language", "post"} for row in drawn + judged)
    test = read_records(studied / "run" / "data" / "faithful" / "test.jsonl")
    assert [row["id"] for row in judged] == [record.id for record in test[:3]]  # three of four were probed
    train = read_records(studied / "run" / "data" / "faithful" / "train.jsonl")
    assert len(drawn) == 12 and not {row["post"] for row in drawn} & {record.post for record in [*test, *train]}
    assert {row["task"] for row in drawn} == {"suicide_risk"} and {row["language"] for row in drawn} == {"en"}
    assert len(work.before()["rows"]) == 3
    seen = [dataclasses.replace(train[0], id=row["id"], post=row["post"], cues=None, decoys=None) for row in drawn]
    write_records(studied / "run" / "data" / "faithful" / "train.jsonl", seen)
    work.make_posts()  # posts that the model has learned from are not drawn
    assert not {row["post"] for row in rows(tmp_path / "out" / "posts-1.jsonl")} & {record.post for record in seen}


def test_a_change_of_mass_is_of_the_posts_whose_maps_speak_twice(studied, tmp_path):
    now = rows(studied / "run" / "probes" / "checks.jsonl")
    for at, row in enumerate(now):
        row |= {"value": 0.5} if row["method"] == "ig" else {"status": "failed"} if at < 2 else {}
    (tmp_path / "now").mkdir()
    (tmp_path / "now" / "checks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in now))
    found = list(repair_study.changes(studied / "run" / "probes", tmp_path / "now"))
    assert found == [("ig", "3", "+0.30 (+0.30 to +0.30)"), ("erase", "2", "+0.00 (+0.00 to +0.00)")]


def test_a_summary_that_is_not_of_the_posts_is_no_before(studied, tmp_path):
    with pytest.raises(SystemExit, match=r"^repair-study: .*run/probes: no manifest\.json here"):
        repair_study.main(["--study", str(studied), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_without_a_study_one_line_says_what_to_run(tmp_path):
    with pytest.raises(SystemExit, match="`make study` makes it"):
        repair_study.main(["--study", str(tmp_path), "--out", str(tmp_path / "out")])
