"""`mentalglm data import`: from somebody's table to records, a task, a recipe that is read as it is."""

import csv
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from mentalglm_jax.cli.main import main
from mentalglm_jax.data.intake.importing import Choices, import_table, read_shares
from mentalglm_jax.data.intake.rows import Columns
from mentalglm_jax.data.records import SPLITS, load_datasets, read_records
from mentalglm_jax.data.splits import clusters, grouped_split, joined
from mentalglm_jax.errors import InputError
from mentalglm_jax.text import tasks

EXAMPLE = Path(__file__).resolve().parents[4] / "docs" / "examples" / "posts.csv"
COLUMNS = Columns("text", "label", "why", "id", "author")
PLAIN = Columns("post", "label")


def table(path: Path, rows, header=("post", "label")) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def run(*arguments, capfd) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(one) for one in arguments])
    said = capfd.readouterr()
    return int(stop.value.code or 0), said.out, said.err


def records(folder: Path):
    return [record for split in SPLITS if (folder / f"{split}.jsonl").is_file()
            for record in read_records(folder / f"{split}.jsonl")]  # fmt: skip


@pytest.fixture(autouse=True)
def known_tasks():
    """Tasks that were made are of one import."""
    yield
    tasks.forget_added()


# --- the example of the docs ---


@pytest.fixture
def imported(tmp_path):
    out = tmp_path / "import" / "mine"
    return out, import_table(EXAMPLE, out, COLUMNS, Choices(task="week"))


def test_the_example_becomes_records(imported):
    out, manifest = imported
    found = records(out)
    assert len(found) == 60 and manifest["rows"] == 60 and not manifest["bad_rows"]
    with EXAMPLE.open(encoding="utf-8", newline="") as file:
        given = {row["id"]: row for row in csv.DictReader(file)}
    for record in found:
        row = given[record.id]
        assert (record.post, record.label, record.explanation) == (row["text"], row["label"], row["why"])
        assert record.language == ("zh" if int(record.id[1:]) > 30 else "en")
        assert record.question == tasks.get_task("week").question(record.language)
    authors = {split: {given[r.id]["author"] for r in found if r.split == split} for split in SPLITS}
    assert not authors["train"] & authors["dev"] and not authors["train"] & authors["test"]
    assert Counter(r.split for r in found)["train"] in range(46, 51)
    near = clusters(found)
    assert all(len({r.split for r, n in zip(found, near, strict=True) if n == one}) == 1 for one in near)


def test_the_same_table_gives_the_same_files_and_another_seed_another_split(imported, tmp_path):
    _, manifest = imported
    again = import_table(EXAMPLE, tmp_path / "mine", COLUMNS, Choices(task="week"))
    same = {"train.jsonl", "dev.jsonl", "test.jsonl", "tasks.yaml"}
    assert {k: v for k, v in again["files"].items() if k in same} == {
        k: v for k, v in manifest["files"].items() if k in same
    }
    other = import_table(EXAMPLE, tmp_path / "other", COLUMNS, Choices(task="week", seed=1))
    assert other["files"]["test.jsonl"] != manifest["files"]["test.jsonl"]


# --- rows that cannot be taken ---

GOOD = [(f"post number {n} tells of {word}", "a" if n % 2 else "b")
        for n, word in enumerate(("rain", "work", "sleep", "friends", "food", "music"))]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("", "a")], r"1 of 7 rows cannot be taken: 1 without a post \(row 8\)"),
        ([("#REF!", "a"), ("x", "#N/A")], r"2 of 8 .*1 without a label \(row 9\); 1 without a post \(row 8\)|"
                                          r"2 of 8 .*1 without a post \(row 8\); 1 without a label \(row 9\)"),
        ([(" ", "a"), ("x", ""), ("y", " ")], r"3 of 9 .*2 without a label \(rows 9, 10\); 1 without a post \(row 8\)"),
        ([("x", "a", "more")], r"1 with 3 cells, the header has 2 \(row 8\)"),
        ([("x",)] * 7, r"7 with 1 cells, the header has 2 \(rows 8, 9, 10, 11, 12, …\)"),
        ([("Ich kann seit Wochen kaum noch schlafen.", "a")], r"a language that t is not asked in, de \(row 8\)"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_taken_are_named_and_nothing_is_written(tmp_path, rows, says):
    source = table(tmp_path / "t.csv", [*GOOD, *rows])
    with pytest.raises(InputError, match=rf"t.csv: .*{says}"):
        import_table(source, tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()
    manifest = import_table(source, tmp_path / "out", PLAIN, Choices(skip=True))
    assert sum(manifest["bad_rows"].values()) == len(rows) and len(records(tmp_path / "out")) == len(GOOD)


def test_an_id_that_stands_twice(tmp_path):
    source = table(tmp_path / "t.csv", [(f"i{n % 5}", *row) for n, row in enumerate(GOOD)], ("id", "post", "label"))
    with pytest.raises(InputError, match=r"1 with an id that stood before \('i0'\) \(row 7\)"):
        import_table(source, tmp_path / "out", Columns("post", "label", id="id"))


def test_labels_of_a_known_task_are_read_by_any_name_and_unknown_ones_named(tmp_path):
    names = ["high", "低", " HIGH ", "low", "高", "Low"]
    rows = [(post, name) for (post, _), name in zip(GOOD, names, strict=True)]
    import_table(table(tmp_path / "t.csv", rows), tmp_path / "out", PLAIN, Choices(task="suicide_risk"))
    assert sorted(r.label or "" for r in records(tmp_path / "out")) == ["high"] * 3 + ["low"] * 3
    assert not (tmp_path / "out" / "tasks.yaml").exists()
    rows = [*rows, ("another one", "hihg"), ("and another", "中")]
    with pytest.raises(
        InputError, match=r"with the unknown label 'hihg'.*'high'.* \(row 8\); 1 with .*'中'.*\(row 9\)"
    ):
        import_table(table(tmp_path / "t.csv", rows), tmp_path / "new", PLAIN, Choices(task="suicide_risk"))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([(post, "a") for post, _ in GOOD], r"all rows have one label \('a'\); a task needs two"),
        ([(f"post {n}", f"label {n}") for n in range(150)], "150 different labels; is that the column with the labels"),
        ([("x", "a"), ("y", "z" * 90)], "a label of 90 characters; is that the column"),
        ([], "holds no row below its header"),
        (
            [("", "a")],
            "none of its 1 rows can be taken: 1 without a post|1 of 1 rows cannot be taken|all rows have one",
        ),
    ],
)
def test_labels_that_make_no_task(tmp_path, rows, says):
    with pytest.raises(InputError, match=says):
        import_table(table(tmp_path / "t.csv", rows), tmp_path / "out", PLAIN)


# --- the task ---


def test_several_labels_make_a_task_of_several(tmp_path):
    rows = [(post, both) for (post, _), both in zip(GOOD, ("a;b", "a", "b；c", "c; a", "b", "c"), strict=True)]
    manifest = import_table(
        table(tmp_path / "t.csv", rows), tmp_path / "out", PLAIN, Choices(separator=";", task="many")
    )
    assert manifest["own_task"]
    made = yaml.safe_load((tmp_path / "out" / "tasks.yaml").read_text("utf-8"))["tasks"]["many"]
    assert made["kind"] == "multi" and list(made["labels"]) == ["a", "b", "c"]
    assert sorted(r.labels or () for r in records(tmp_path / "out")) == [
        ("a",), ("a", "b"), ("a", "c"), ("b",), ("b", "c"), ("c",)
    ]  # fmt: skip


def test_lists_of_labels_and_names_that_stand_for_numbers(tmp_path):
    rows = [{"post": post, "label": both} for (post, _), both in zip(GOOD, (["a", "b"], ["b"], ["a"]) * 2, strict=True)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    import_table(tmp_path / "t.json", tmp_path / "out", PLAIN, Choices(task="lists"))
    assert Counter(r.labels for r in records(tmp_path / "out")) == {("a", "b"): 2, ("b",): 2, ("a",): 2}
    datasets = load_datasets()
    features = datasets.Features({"post": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"post": post, "label": number % 2} for number, (post, _) in enumerate(GOOD)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    import_table(tmp_path / "saved", tmp_path / "new", PLAIN, Choices(task="names"))
    assert Counter(r.label for r in records(tmp_path / "new")) == {"no": 3, "yes": 3}


@pytest.mark.parametrize("kind", ["List", "Sequence", "a list of one"])
def test_names_of_lists_of_numbers_and_rows_that_nobody_labelled(tmp_path, kind):
    """As GoEmotions has them; ``datasets`` has noted a list in three ways."""
    each = {"names": ["no", "yes", "so"], "_type": "ClassLabel"}
    noted = [each] if kind == "a list of one" else {"feature": each, "_type": kind}
    features = {"post": {"dtype": "string", "_type": "Value"}, "label": noted}
    numbers = [[0, 1], [1], [-1], [0, -1], [1], [2, 0]]
    made = pyarrow.table({"post": [post for post, _ in GOOD], "label": numbers})
    said = json.dumps({"info": {"features": features}})
    pyarrow.parquet.write_table(made.replace_schema_metadata({"huggingface": said}), tmp_path / "t.parquet")
    choices = Choices(task="lists", skip=True)
    import_table(tmp_path / "t.parquet", tmp_path / "out", PLAIN, choices)
    found = {r.post: r.labels for r in records(tmp_path / "out")}
    assert sorted(map(sorted, found.values())) == [["no"], ["no", "so"], ["no", "yes"], ["yes"], ["yes"]]
    assert GOOD[2][0] not in found


def test_spellings_of_one_label_are_one(tmp_path):
    rows = [
        (post, name) for (post, _), name in zip(GOOD, ("Bad", "bad ", "Bad", "good", "ＧＯＯＤ", "good"), strict=True)
    ]
    import_table(table(tmp_path / "t.csv", rows), tmp_path / "out", PLAIN, Choices(task="two"))
    assert Counter(r.label for r in records(tmp_path / "out")) == {"Bad": 3, "good": 3}


# --- the split ---


@pytest.mark.parametrize("shares", [(80, 10, 10), (60, 20, 20), (70, 30, 0)])
def test_every_label_is_split_in_the_wanted_shares(shares):
    draw = random.Random(0)
    labels = draw.choices(["a", "b", "c"], [6, 3, 1], k=1000)
    users = [draw.randrange(400) for _ in labels]
    parts = dict(zip(SPLITS, (share / 100 for share in shares), strict=True))
    keys = [f"post {n}" for n in range(len(labels))]
    sides = grouped_split(users, [[one] for one in labels], parts, keys, 0)
    for label in "abc":
        found = Counter(side for side, one in zip(sides, labels, strict=True) if one == label)
        for side, share in parts.items():
            assert abs(found[side] - share * found.total()) <= max(3, 0.05 * found.total())
    assert all(len({s for s, u in zip(sides, users, strict=True) if u == user}) == 1 for user in set(users))
    order = list(range(len(labels)))
    draw.shuffle(order)
    again = grouped_split([users[n] for n in order], [[labels[n]] for n in order], parts, [keys[n] for n in order], 0)
    assert again == [sides[n] for n in order]


def test_parts_are_joined_across_partitions():
    found = joined([0, 0, 1, 2, 3], ["x", None, None, "x", None], [None, None, None, None, None])
    assert found[0] == found[1] == found[3] and len(set(found)) == 3


def test_splits_that_files_name_are_kept_unless_others_are_asked_for(tmp_path):
    for split, rows in (("train", GOOD[:4]), ("test", [GOOD[4], GOOD[5], (GOOD[0][0] + "!", "b")])):
        (tmp_path / "in").mkdir(exist_ok=True)
        table(tmp_path / "in" / f"{split}.csv", rows)
    manifest = import_table(tmp_path / "in", tmp_path / "out", PLAIN)
    assert {split: entry["records"] for split, entry in manifest["splits"].items()} == {"train": 3, "test": 3}
    assert "training posts left out, for they stand, or nearly, in dev or test too: 1" in manifest["notes"]
    manifest = import_table(tmp_path / "in", tmp_path / "new", PLAIN, Choices(shares=(50.0, 50.0, 0.0)))
    assert sum(entry["records"] for entry in manifest["splits"].values()) == 7 and "test" not in manifest["splits"]


@pytest.mark.parametrize("text", ["80/10", "80/10/20", "a/b/c", "0/50/50", "-10/60/50", "nan/50/50", ""])
def test_shares_that_are_none(text):
    with pytest.raises(InputError, match="--split"):
        read_shares(text)


# --- what is written ---


def test_what_a_person_changed_is_not_replaced(tmp_path):
    source, out = table(tmp_path / "t.csv", GOOD), tmp_path / "out"
    import_table(source, out, PLAIN)
    import_table(source, out, PLAIN)
    recipe = out / "recipe.yaml"
    recipe.write_text(recipe.read_text("utf-8").replace("epochs: ", "epochs: 1"), encoding="utf-8")
    with pytest.raises(InputError, match=r"recipe.yaml: was changed since it was written"):
        import_table(source, out, PLAIN)
    with pytest.raises(InputError, match="not empty and not written by this command"):
        import_table(source, tmp_path, PLAIN)


@pytest.mark.parametrize("noted", [True, False])
def test_a_datasheet_that_was_completed_is_not_written_over(tmp_path, noted):
    """It asks for that; what people wrote there was gone with the next import. Earlier versions did not note it."""
    source, out = table(tmp_path / "t.csv", GOOD), tmp_path / "out"
    import_table(source, out, PLAIN)
    (out / "README.md").write_text((out / "README.md").read_text("utf-8") + "Labelled by two nurses.\n", "utf-8")
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    if noted:
        with pytest.raises(InputError, match=r"README.md: was changed since it was written, and would be lost"):
            import_table(source, out, PLAIN)
        assert "two nurses" in (out / "README.md").read_text("utf-8")
    else:
        del manifest["datasheet_sha256"]
        (out / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        import_table(source, out, PLAIN)


def test_nothing_written_names_where_it_was_made_and_posts_are_private(imported):
    out, _ = imported
    for file in out.iterdir():
        text = file.read_text("utf-8")
        assert str(EXAMPLE.parent) not in text
        if file.name in ("README.md", "manifest.json"):
            assert str(out) not in text and "garden" not in text
    assert out.stat().st_mode & 0o077 == 0


def test_contact_details_are_counted_and_replaced_where_asked(tmp_path):
    rows = [*GOOD, ("call me: 13812345678, really", "a")]
    manifest = import_table(table(tmp_path / "t.csv", rows), tmp_path / "out", PLAIN)
    assert manifest["contact_rows"] == 1 and any("--scrub-contacts replaces them" in note for note in manifest["notes"])
    import_table(tmp_path / "t.csv", tmp_path / "new", PLAIN, Choices(scrub=True))
    assert any("[phone]" in r.post for r in records(tmp_path / "new"))


# --- the command ---


def test_the_command_says_what_it_did_and_what_comes_next(tmp_path, capfd):
    out = tmp_path / "mine"
    code, said, err = run("data", "import", EXAMPLE, "--text", "text", "--label", "label", "--explanation", "why",
                          "--id", "id", "--user", "author", "--task", "week", "--out", out, capfd=capfd)  # fmt: skip
    assert (code, err) == (0, "")
    for part in ("posts.csv: UTF-8, separated by commas", "languages: en 30, zh 30; with an explanation: 60",
                 f"mentalglm data inspect {out}", f"mentalglm train {out / 'recipe.yaml'}"):  # fmt: skip
        assert part in said
    assert "garden" not in said
    code, said, _ = run("data", "inspect", out, "--json", "--no-near", capfd=capfd)
    assert code == 0
    report = json.loads(said)
    assert sum(entry["records"] for entry in report["tasks"]["week"]["posts"].values()) == 60
    assert report["overlap"] == [] and report["conflicts"]["same_task"] == 0


# --- what would be one without a word ---


@pytest.mark.parametrize("pair", [("very low", "very_low"), ("#1", "1"), ("a, b", "a_b"), ("A b", "a_b")])
@pytest.mark.parametrize("more", [(), ("very_low_2", "1_2")])
def test_labels_whose_keys_would_be_one_stay_two(tmp_path, pair, more):
    names = [*pair, *more, "high"]
    rows = [(f"{word} is what I saw, {name} says", names[(one + two) % len(names)])
            for one, word in enumerate(("A boat", "Two hills", "Our lamp", "That river", "My coat", "Some milk"))
            for two, name in enumerate(("Ann", "Bob", "Cy"))]  # fmt: skip
    import_table(table(tmp_path / "t.csv", rows), tmp_path / "out", PLAIN, Choices(task="own"))
    task = tasks.get_task("own")
    assert len(task.keys) == len(names)
    by_post = dict(rows)
    for record in records(tmp_path / "out"):
        (label,) = [one for one in task.labels if one.key == record.label]
        assert label.name("en") == by_post[record.post]
        assert task.read_sentence(f"The label of this post is {by_post[record.post]}.", "en") == (record.label,)
        assert task.read_short(by_post[record.post], "en") == (record.label,)


@pytest.mark.parametrize("names", [("train.csv", "test.csv"), ("train-00000-of-00002.csv", "train-00001-of-00002.csv")])
def test_ids_that_begin_anew_in_each_file_are_told_apart(tmp_path, names):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, words in zip(names, ("boat hill lamp river", "coat milk bird door"), strict=True):
        rows = [(number, f"{word} and nothing but a {word}", "ab"[number % 2])
                for number, word in enumerate(words.split())]  # fmt: skip
        table(folder / name, rows, ("id", "post", "label"))
    manifest = import_table(folder, tmp_path / "out", Columns("post", "label", id="id"), Choices(task="own"))
    parts = ("train", "test") if "test.csv" in names else [Path(name).stem for name in names]
    assert {r.id for r in records(tmp_path / "out")} == {f"{part}-{number}" for part in parts for number in range(4)}
    assert any(note.startswith("ids that stand in several files: 4; ") for note in manifest["notes"])
    with (folder / names[0]).open("a") as file:
        file.write("0,the same once more,a\n")
    with pytest.raises(InputError, match=rf"1 with an id that stood before \('0'\) \({names[0]}:6\)"):
        import_table(folder, tmp_path / "out", Columns("post", "label", id="id"), Choices(task="other"))
