"""`mentalglm evaluate`: from a model directory, from finished answers, from anybody's labelled table."""

import json
import random
import re
from dataclasses import replace

import jax
import pytest
from flax import nnx

from mentalglm_jax.checkpoints.adapters import save_adapter
from mentalglm_jax.checkpoints.directories import save_pretrained
from mentalglm_jax.cli.main import main
from mentalglm_jax.data.explain.review import SCALES, form_id
from mentalglm_jax.data.records import Record, load_datasets, read_records, write_records
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate import inputs
from mentalglm_jax.evaluate.inputs import read_answers, read_data
from mentalglm_jax.inference import decode
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.lora import LoraConfig, LoraParam, add_lora
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer

QUESTION = tasks.TASKS["suicide_risk"].question("zh")


@pytest.fixture(scope="module")
def records() -> list[Record]:
    posts = ["睡不着。", "下雨了。", "很累。", "喝了汤。"]
    found = [
        Record(f"r{i}", "suicide_risk", "zh", post, QUESTION, "high" if i % 2 else "low")
        for i, post in enumerate(posts)
    ]
    sad = tasks.TASKS["imhi_sad"].question("en")
    return [*found, Record("s0", "imhi_sad", "en", "My boss shouted.", sad, "work", explanation="Work is named.")]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A one-layer model with an adapter that changes its answers."""
    directory, tokenizer = tmp_path_factory.mktemp("model"), GlmTokenizer.load(BUILTIN)
    config = GlmConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                       head_dim=8, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.4,
                       max_position_embeddings=2048)  # fmt: skip
    model = Glm(config, rngs=nnx.Rngs(0))
    save_pretrained(model, directory / "base", tokenizer=tokenizer)
    add_lora(model, LoraConfig(rank=2, alpha=4.0), nnx.Rngs(1))
    state = nnx.state(model, LoraParam)
    nnx.update(model, jax.tree.map(lambda x: x + 0.3, state))
    save_adapter(model, directory / "adapter", base_model_name_or_path=str(directory / "base"))
    return directory


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


def printed(capfd, *arguments):
    assert run(*arguments, "--json") == 0
    return json.loads(capfd.readouterr().out)


def test_from_model_to_report_and_back(tmp_path, capfd, records, model_dir):
    data, out = tmp_path / "posts.jsonl", tmp_path / "out"
    write_records(data, records)
    train = tmp_path / "train.jsonl"
    write_records(train, [replace(r, id=f"t-{r.id}", post=f"{r.post} {r.id}") for r in records])
    command = ("evaluate", model_dir / "base", "--data", data, "--max-new-tokens", 4, "--batch-size", 4)
    plain = printed(capfd, *command, "--task", "suicide_risk", "--out", out / "plain")
    assert list(plain) == ["suicide_risk"]
    assert (plain["suicide_risk"]["n"], plain["suicide_risk"]["label_reading"]["n"]) == (4, 4)
    assert json.loads((out / "plain" / "evaluation.json").read_text(encoding="utf-8")) == plain
    assert printed(capfd, "evaluate", out / "plain") == plain  # the written answers say the same

    adapted = printed(capfd, *command, "--adapter", model_dir / "adapter", "--out", out / "adapted", "--train", train)
    assert list(adapted) == ["suicide_risk", "imhi_sad"]
    assert set(adapted["imhi_sad"]["floors"]) == {"majority", "tfidf_logreg"}
    risk = adapted["suicide_risk"]
    for reading in (risk, risk["label_reading"]):
        tests, floor = reading["against_tfidf"]["metrics"], risk["floors"]["tfidf_logreg"]
        assert set(tests) == {"weighted_f1", "micro_f1", "macro_f1", "positive_f1"}
        for name, test in tests.items():
            assert test["difference"] == pytest.approx(reading[name] - floor[name])
    both = [read_answers(out / name).label_scores[0]["label_logprobs"]["high"] for name in ("plain", "adapted")]
    assert abs(both[0] - both[1]) > 0.01  # the adapter was used

    found = printed(capfd, "evaluate", out / "adapted", "--task", "suicide_risk", "--against", out / "plain")
    assert set(found) == {"tasks", "comparison"}
    assert set(found["comparison"]["suicide_risk"]) == {"text", "label"}
    assert found["comparison"]["suicide_risk"]["label"]["n"] == 4

    board = printed(capfd, "leaderboard", out / "plain", out / "adapted", "--out", tmp_path / "board.md")
    assert {row["system"] for row in board if row["kind"] == "run"} == {"plain", "adapted"}
    assert (tmp_path / "board.md").read_text(encoding="utf-8").startswith("| task |")
    assert run("evaluate", out / "adapted", "--against", out / "adapted", "--out", out / "again") == 0
    shown = capfd.readouterr().out
    assert "Evaluation" in shown and "First minus second" in shown and "not a diagnosis" in shown


def test_interrupted_while_labels_are_scored(tmp_path, capfd, records, model_dir, monkeypatch):
    """With --out the answers are not generated again; without, nothing is said to be kept."""

    def pull_the_plug(*arguments, **options):
        raise KeyboardInterrupt

    data, out = tmp_path / "posts.jsonl", tmp_path / "out"
    write_records(data, records)
    command = ("evaluate", model_dir / "base", "--data", data, "--max-new-tokens", 4, "--batch-size", 4, "--task",
               "suicide_risk")  # fmt: skip
    with monkeypatch.context() as during:
        during.setattr(inputs, "score_records", pull_the_plug)
        for more, message in (((), "nothing is kept: with --out"), (("--out", out), "what was finished is kept")):
            assert run(*command, *more) == 1
            assert message in capfd.readouterr().err
    kept = (out / "generations.jsonl").read_bytes()
    with monkeypatch.context() as after:
        after.setattr(decode, "first_token", pull_the_plug)
        found = printed(capfd, *command, "--out", out)
    assert found["suicide_risk"]["n"] == found["suicide_risk"]["label_reading"]["n"] == 4
    assert (out / "generations.jsonl").read_bytes() == kept
    assert not list(out.glob("*.partial"))


def test_generations_alone_are_enough(tmp_path, capfd, records):
    rows = [r.to_dict() | {"parsed_label": r.label, "parsed_explanation": None} for r in records]
    path = tmp_path / "generations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = printed(capfd, "evaluate", path)
    assert [entry["weighted_f1"] for entry in found.values()] == [1.0, 1.0]
    assert all(entry["label_reading"] is None for entry in found.values())


def answer_files(folder, records, said):
    """A directory of finished answers in both readings: what was parsed, and the same as log-probabilities."""
    folder.mkdir()
    rows = [r.to_dict() | {"parsed_label": a, "parsed_explanation": None} for r, a in zip(records, said, strict=True)]
    values = [r.to_dict() | {"label_logprobs": {key: 0.0 if key == a else -9.0 for key in ("high", "low")}}
              for r, a in zip(records, said, strict=True)]  # fmt: skip
    for name, lines in (("generations", rows), ("label_scores", values)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return rows, values


def risk_records(count, **more):
    return [Record(f"q{i}", "suicide_risk", "zh", f"帖子 {i}", QUESTION, "high" if i % 2 else "low", **more)
            for i in range(count)]  # fmt: skip


def test_rows_that_were_deleted_are_wrong_answers(tmp_path, capfd):
    """Deleting the wrong answers does not help: the other reading has them, and so has --data."""
    records = risk_records(8, split="test")
    said = ["high"] * 8  # half of them wrong
    rows, values = answer_files(tmp_path / "run", records, said)
    whole = printed(capfd, "evaluate", tmp_path / "run")["suicide_risk"]
    assert (whole["accuracy"], whole["label_reading"]["accuracy"]) == (0.5, 0.5)
    file = tmp_path / "run" / "generations.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows if row["label"] == "high"), encoding="utf-8")
    short = printed(capfd, "evaluate", tmp_path / "run", "--against", tmp_path / "run")
    entry, compared = short["tasks"]["suicide_risk"], short["comparison"]["suicide_risk"]
    assert (entry["n"], entry["accuracy"], entry["parse_status"]["missing"]) == (8, 0.5, 4)
    assert entry["label_reading"] == whole["label_reading"]
    assert compared["text"]["n"] == compared["label"]["n"] == 8
    (tmp_path / "run" / "label_scores.jsonl").unlink()
    assert printed(capfd, "evaluate", file)["suicide_risk"]["n"] == 4  # nobody knows of the others
    data = tmp_path / "all.jsonl"
    write_records(
        data, [*records, replace(records[0], id="d", split="dev"), replace(records[0], id="t", split="train")]
    )
    assert printed(capfd, "evaluate", file, "--data", data, "--split", "test")["suicide_risk"]["accuracy"] == 0.5
    write_records(data, [replace(record, post="别的") for record in records])
    assert run("evaluate", file, "--data", data) == 2
    assert "record 'q1': the answer is to another task or post" in capfd.readouterr().err
    write_records(data, records[:3])
    assert run("evaluate", file, "--data", data) == 2
    assert "'q3' is answered but not among" in capfd.readouterr().err
    values[0] |= {"label": "high"}
    for name, lines in (("generations", rows), ("label_scores", values)):
        (tmp_path / "run" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("evaluate", tmp_path / "run") == 2
    assert "record 'q0': its parsed and its label-scored answer have different" in capfd.readouterr().err
    file.write_text("{not json\n")
    assert run("evaluate", file) == 2
    assert "make this generations.jsonl again: its record is to be answered" in capfd.readouterr().err


# --- files that hold several splits ---


def test_only_the_split_that_is_meant_is_read(tmp_path):
    path = tmp_path / "all.jsonl"
    parts = {"train": 5, "dev": 3, "test": 2}
    records = [replace(r, id=f"{split}{i}", split=split)
               for split, count in parts.items() for i, r in enumerate(risk_records(count))]  # fmt: skip
    write_records(path, records)
    for split, count in parts.items():
        assert [r.id for r in read_data(path, None, split)] == [f"{split}{i}" for i in range(count)]
    with pytest.warns(UserWarning, match="holds 5 train, 3 dev, 2 test records; the dev ones are taken"):
        assert len(read_data(path, "suicide_risk")) == 3
    write_records(path, [r for r in records if r.split != "dev"])
    with pytest.raises(InputError, match="no dev record; there are: 5 train, 2 test; name another file, or another"):
        read_data(path, None)
    write_records(path, [r for r in records if r.split == "test"])
    assert len(read_data(path, None)) == 2  # there is nothing to choose
    with pytest.raises(InputError, match="no train record; there are: 2 test"):
        read_data(path, None, "train")


@pytest.mark.filterwarnings("always::UserWarning")  # on the command line a warning is a line on stderr
def test_floors_never_see_the_posts_that_are_evaluated(tmp_path, capfd):
    """Labels are drawn, so that only a floor that has seen a post knows its label."""
    draw = random.Random(0)
    records = [replace(r, label=draw.choice(["high", "low"]), post=f"{r.post} {draw.random()}", split="test")
               for r in risk_records(40)]  # fmt: skip
    train = [replace(r, id=f"t{i}", label=draw.choice(["high", "low"]), post=f"{draw.random()}", split="train")
             for i, r in enumerate(records)]  # fmt: skip
    answer_files(tmp_path / "run", records, ["high"] * 40)
    write_records(tmp_path / "train.jsonl", train)
    clean = printed(capfd, "evaluate", tmp_path / "run", "--train", tmp_path / "train.jsonl")["suicide_risk"]["floors"]
    copies = [replace(r, id=f"c-{r.id}", post=f"  {r.post} ", split="train") for r in records]
    for name, more in (("splits", records), ("copies", copies)):
        write_records(tmp_path / f"{name}.jsonl", [*train, *more])
        assert run("evaluate", tmp_path / "run", "--train", tmp_path / f"{name}.jsonl", "--json") == 0
        said = capfd.readouterr()
        assert json.loads(said.out)["suicide_risk"]["floors"] == clean
        warned = "warning: 40 of 80 training records have posts that are evaluated" in said.err
        assert warned == (name == "copies")


def test_what_people_said_stands_beside_the_scores(tmp_path, capfd, records):
    """The form is made from a run's answers (its label and reason, not the gold ones), filled in by two, imported,
    and read into the evaluation of the same run; never into that of another."""
    rows = [r.to_dict() | {"parsed_label": "high", "parsed_explanation": f"说了“{r.post}”。"} for r in records[:4]]
    rows += [records[4].to_dict() | {"parsed_label": "work", "parsed_explanation": "He shouts."}]
    rows[3]["parsed_explanation"] = None  # nothing to rate
    run_dir, form = tmp_path / "run", tmp_path / "form"
    run_dir.mkdir()
    (run_dir / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert printed(capfd, "data", "review", "export", run_dir, "--out", form)["items"] == 4
    sample = read_records(form / "sample.jsonl")
    said = {r.id: (r.gold, r.explanation) for r in sample}
    assert said == {row["id"]: ((row["parsed_label"],), row["parsed_explanation"]) for row in rows if row["id"] != "r3"}
    assert run("evaluate", run_dir, "--ratings", form) == 2
    assert "data review import" in capfd.readouterr().err
    files = []
    for rater, points in (("a", (3, 2, 1, 0)), ("b", (3, 2, 2, 0))):
        ratings = {r.id: dict.fromkeys(SCALES, point) for r, point in zip(sample, points, strict=True)}
        files.append(tmp_path / f"{rater}.json")
        files[-1].write_text(json.dumps({"form": form_id(sample), "rater": rater, "ratings": ratings}))
    imported = printed(capfd, "data", "review", "import", form, *files)
    found = printed(capfd, "evaluate", run_dir, "--ratings", form, "--out", tmp_path / "out")
    human = found["suicide_risk"]["explanation"]["human"]
    assert (human["raters"], human["items"], human["rated"]) == (2, 3, 3)
    assert human["agreement"] == imported["tasks"]["suicide_risk"]["agreement"]
    assert found["imhi_sad"]["explanation"]["human"]["items"] == 1
    only = printed(capfd, "evaluate", run_dir, "--ratings", form, "--task", "suicide_risk")
    assert only["suicide_risk"]["explanation"]["human"] == human  # although the form has another task's answer, too
    page = (tmp_path / "out" / "evaluation.html").read_text(encoding="utf-8")
    assert "people, 0 to 3" in page and f"{human['agreement']['overall']['krippendorff_alpha']:.3f}" in page
    assert "explanation.human.agreement.overall.fleiss_kappa" in (tmp_path / "out" / "evaluation.csv").read_text()
    rows[0]["parsed_explanation"] = "别的理由。"
    (run_dir / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert run("evaluate", run_dir, "--ratings", form) == 2
    assert "record 'r0' was rated with another answer" in capfd.readouterr().err
    answer_files(tmp_path / "other", risk_records(2), ["high"] * 2)
    assert run("evaluate", tmp_path / "other", "--ratings", form) == 2
    assert "was rated with another answer" in capfd.readouterr().err
    dr = Record("d", "imhi_dr", "en", "post", tasks.TASKS["imhi_dr"].question("en"), "yes").to_dict()
    (run_dir / "generations.jsonl").write_text(json.dumps(dr | {"parsed_label": "yes"}), encoding="utf-8")
    assert run("evaluate", run_dir, "--ratings", form) == 2
    assert "nothing was rated of imhi_dr" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{model}",), "say what it is to answer with --data"),
        (("{answers}", "--adapter", "{folder}"), "holds finished answers; --adapter goes with a model"),
        (("{answers}", "--data", "{data}", "--split", "dev"), "no dev record; there are: 5 train; name another"),
        (("{answers}", "--data", "{data}", "--split", "all"), "--split 'all' is none of train, dev, test"),
        (
            ("{answers}", "--train", "{answers}"),
            "task suicide_risk: all training records have posts that are evaluated",
        ),
        (("{answers}", "--task", "imhi_dr"), "no answer to task 'imhi_dr'; there are: suicide_risk"),
        (("{answers}", "--task", "suicide"), "unknown task 'suicide'"),
        (("{model}", "--data", "{data}", "--task", "imhi_dr"), "no record of task 'imhi_dr'; there are: imhi_sad"),
        (("{model}", "--data", "{folder}"), "folder: no file of records"),
        (("{model}", "--data", "{data}", "--set-name", "irf"), "holds records .*not upstream files"),
        (("{model}", "--data", "{folder}x"), "folderx: no such file or folder"),
        (("{answers}", "--against", "{folder}"), "neither a .jsonl file nor a directory with"),
    ],
)
def test_bad_usage_is_one_line(tmp_path, capfd, records, model_dir, arguments, message):
    places = {"model": model_dir / "base", "answers": tmp_path / "generations.jsonl", "data": tmp_path / "posts.jsonl",
              "folder": tmp_path / "folder"}  # fmt: skip
    places["folder"].mkdir()
    write_records(places["data"], records)
    places["answers"].write_text(json.dumps(records[0].to_dict() | {"parsed_label": None}) + "\n", encoding="utf-8")
    assert run("evaluate", *(a.format(**places) for a in arguments), "--json") == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert re.search(message, said.err)
    assert len(said.err.strip().splitlines()) == 1


# --- labelled tables ---


def test_anybodys_table(tmp_path):
    path = tmp_path / "clinic.csv"
    path.write_text('﻿note,label,post\na,高,"睡不着，\n很累"\nb,low,下雨了\n', encoding="utf-8")
    found = read_data(path, "suicide_risk", language="zh")
    assert [(r.label, r.post, r.question, r.split) for r in found] == [
        ("high", "睡不着，\n很累", QUESTION, "test"), ("low", "下雨了", QUESTION, "test")
    ]  # fmt: skip
    path = tmp_path / "clinic.tsv"
    path.write_text("post\tlabel\n很累\t乱贴标签; 心理过滤\n难过\tmagnification\n", encoding="utf-8")
    found = read_data(path, "cognitive_distortion", language="zh")
    assert [r.labels for r in found] == [("mental_filter", "labeling"), ("magnification",)]
    assert len({r.id for r in found}) == 2
    path.write_text("post\tlabel\n很累\tmental filter; 应该句式\n难过\t应该式\n", encoding="utf-8")
    for language in ("zh", "en"):  # of the question; the names may be of either
        found = read_data(path, "cognitive_distortion", language=language)
        assert [r.labels for r in found] == [("mental_filter", "should_statements"), ("should_statements",)]


def test_a_bilingual_table_is_asked_in_the_language_of_each_post(tmp_path):
    path = tmp_path / "clinic.csv"
    path.write_text("post;label\n睡不着，很累;高\nI slept well.;low\n", encoding="utf-16")
    found = read_data(path, "suicide_risk")
    assert [(r.language, r.question, r.label) for r in found] == [
        ("zh", QUESTION, "high"), ("en", tasks.TASKS["suicide_risk"].question("en"), "low")
    ]  # fmt: skip
    assert {r.language for r in read_data(path, "suicide_risk", language="en")} == {"en"}


@pytest.mark.parametrize("layout", ["folder", "parquet", "datasets", "state.json", "upstream file", "set name"])
def test_data_takes_what_data_root_takes(tmp_path, layout):
    records = [replace(r, split="test") for r in risk_records(3)]
    if layout == "folder":
        write_records(tmp_path / "records" / "test.jsonl", records)
        path = tmp_path
    elif layout == "parquet":
        write_records(path := tmp_path / "a.parquet", records)
    elif layout in ("datasets", "state.json"):
        load_datasets().Dataset.from_list([r.to_dict() for r in records]).save_to_disk(tmp_path / "saved")
        path = tmp_path / "saved" / ("state.json" if layout == "state.json" else "")
    else:
        path = tmp_path / "sos_hl_1k" / "suicide_val_LLM.csv"
        path.parent.mkdir()
        path.write_text("id\tlabel\tcomment\n" + "".join(f"{r.id}\t1\t{r.post}\n" for r in records), encoding="utf-8")
        raw = tmp_path / "Raw data" / "Suiside" / "test_set.tsv"
        raw.parent.mkdir(parents=True)
        raw.write_text("1\t面条\n", encoding="utf-8")
        if layout == "set name":
            assert [r.post for r in read_data(tmp_path, "suicide_risk", "test", sets=("c_imhi_raw",))] == ["面条"]
            path = tmp_path
    assert [r.post for r in read_data(path, "suicide_risk", "test")] == [r.post for r in records]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "post,label\n很累,中\n",
            r"clinic.csv: 1 of 1 rows cannot be taken: 1 .*unknown label '中'.*\(row 2\)",
        ),
        ("post,label\n ,高\n", r"clinic.csv: 1 of 1 .*1 without a post \(row 2\); mend them or delete the rows"),
        ("post,label\n很累,高;低\n", r"clinic.csv: 1 of 1 .*takes one label.*\(row 2\)"),
        ("text,label\n很累,高\n", r"clinic.csv: no column 'post'; there are: text, label"),
        ("post,label\n", "clinic.csv: holds no row"),
        ("post,label\n很累,高,x\n", r"clinic.csv: 1 of 1 .*1 with 3 cells, the header has 2 \(row 2\)"),
    ],
)
def test_damaged_tables_are_named(tmp_path, text, message):
    path = tmp_path / "clinic.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(Exception, match=message):
        read_data(path, "suicide_risk", language="zh")


def test_upstream_folders_are_split_by_post(tmp_path):
    folder = tmp_path / "sos_hl_1k"
    folder.mkdir()
    lines = "".join(f"{i}\t{i % 2}\t帖子 {i}\n" for i in range(60))
    (folder / "suicide_train_LLM.csv").write_text("id\tlabel\tcomment\n" + lines, encoding="utf-8")
    found = read_data(tmp_path, "suicide_risk")
    assert 3 < len(found) < 30
    assert {r.split for r in found} == {"dev"}
    with pytest.raises(Exception, match="no test record; there are: 49 train, 11 dev; name"):
        read_data(tmp_path, "suicide_risk", split="test")
    levels = tmp_path / "sos_1k"
    levels.mkdir()
    for name in ("train_data4", "val_data4", "test_data"):
        lines = "".join(f"{name} 帖子 {i}\t{i % 11}\n" for i in range(20))
        (levels / f"{name}.tsv").write_text("comment\tmyLabel\n" + lines, encoding="utf-8")
    assert {r.source for r in read_data(tmp_path, "suicide_level")} == {"sos_1k"}
    assert [r.label for r in read_data(tmp_path, "suicide_level", "test")][:3] == ["0", "1", "2"]
