"""What ``data.root`` may name: every layout of record files, in a folder or alone, and what is refused."""

import json
import re
from pathlib import Path

import pytest

from mentalglm_jax.cli.main import main
from mentalglm_jax.data.held_out import records_split
from mentalglm_jax.data.records import Record, load_datasets, write_records
from mentalglm_jax.data.roots import iter_root, record_files
from mentalglm_jax.errors import InputError

QUESTION = "Does the poster suffer from stress?"
TOPICS = {"a": "the library closes early", "b": "my brother plays chess", "c": "rain fell on the hills all night"}


def record(name, split="train"):
    return Record(name, "imhi_dreaddit", "en", TOPICS[name], QUESTION, label="yes", source="own", split=split)


RECORDS = [record("a"), record("b", "dev"), record("c", "test")]


def saved(folder: Path, layout: str) -> Path:
    """The three records in ``layout``; the rows of a layout that names splits all say "train"."""
    datasets = load_datasets()
    rows = {r.split: [r.to_dict() | {"split": "train"}] for r in RECORDS}
    names = {"train": "train", "dev": "validation", "test": "test"}
    if layout == "jsonl":
        for split, (row,) in rows.items():
            write_records(folder / f"{split}.jsonl", [Record.from_dict(row)])
    elif layout == "one jsonl":
        write_records(folder / "mine.jsonl", RECORDS)
        return folder / "mine.jsonl"
    elif layout == "dataset dict":
        datasets.DatasetDict({names[s]: datasets.Dataset.from_list(r) for s, r in rows.items()}).save_to_disk(folder)
    elif layout == "dataset":
        datasets.Dataset.from_list([r.to_dict() for r in RECORDS]).save_to_disk(folder, num_shards=2)
    elif layout == "its state.json":
        return saved(folder, "dataset") / "state.json"
    elif layout == "parquet shards":
        for split, (row,) in rows.items():
            for number in range(2):
                shard = folder / "data" / f"{names[split]}-0000{number}-of-00002.parquet"
                shard.parent.mkdir(exist_ok=True, parents=True)
                part = [row] if number == 0 else [row | {"id": row["id"] + "2", "post": row["post"] + " once more"}]
                datasets.Dataset.from_list(part).to_parquet(shard)
    elif layout == "split folders":
        for split, (row,) in rows.items():
            (folder / names[split]).mkdir(parents=True)
            datasets.Dataset.from_list([row]).to_parquet(folder / names[split] / "0000.parquet")
    elif layout == "build":
        for r in RECORDS:
            write_records(folder / "records" / f"{r.split}.jsonl", [r])
            write_records(folder / "data" / f"{r.split}.parquet", [r])
    return folder


LAYOUTS = (
    "jsonl",
    "one jsonl",
    "dataset dict",
    "dataset",
    "its state.json",
    "parquet shards",
    "split folders",
    "build",
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_records(tmp_path, layout, capsys):
    root = saved(tmp_path / "data", layout)
    found = [r for r in iter_root(root) if not r.id.endswith("2")]
    assert found == RECORDS
    assert [r.id for r in records_split(root).records if not r.id.endswith("2")] == ["a", "b", "c"]
    with pytest.raises(SystemExit, match="0"):
        main(["data", "inspect", str(root), "--no-near", "--json"])
    report = json.loads(capsys.readouterr().out)["tasks"]["imhi_dreaddit"]["own"]
    assert {split: entry["records"] > 0 for split, entry in report.items()} == dict.fromkeys(
        ("train", "dev", "test"), 1
    )


def test_pictures_beside_a_record_are_never_decoded(tmp_path):
    """Rows that hold an image or sound are records with their other columns; the bytes are no picture at all."""
    datasets = load_datasets()
    for kind in ("arrow", "parquet"):
        rows = [r.to_dict() | {"picture": {"bytes": b"no picture", "path": None}} for r in RECORDS[:1]]
        table = datasets.Dataset.from_list(rows).cast_column("picture", datasets.Image())
        if kind == "arrow":
            table.save_to_disk(tmp_path / kind)
        else:
            (tmp_path / kind).mkdir()
            table.to_parquet(tmp_path / kind / "train.parquet")
        assert list(iter_root(tmp_path / kind)) == RECORDS[:1]


def test_a_file_of_an_upstream_data_set_stands_for_its_folder(tmp_path):
    table = tmp_path / "sos_hl_1k" / "suicide_train_LLM.csv"
    table.parent.mkdir()
    table.write_text("id\tlabel\tcomment\n0\t1\t今天我把东西都交代好了\n", encoding="utf-8")
    for root in (tmp_path, table.parent, table):
        assert [r.label for r in iter_root(root)] == ["high"]
        assert record_files(root) == []


def break_shard(root):
    next(root.rglob("*-00001-of-00002.*")).unlink()


def break_arrow(root):
    file = next(root.rglob("*.arrow"))
    file.write_bytes(file.read_bytes()[:100])


def break_row(root):
    file = root / "dev.jsonl"
    file.write_text(file.read_text().replace('"post"', '"pst"'))


def lead_outside(root):
    state = json.loads((root / "state.json").read_text())
    state["_data_files"] = [{"filename": "../../outside.arrow"}]
    (root / "state.json").write_text(json.dumps(state))


def lose_split(root):
    for file in (root / "test").iterdir():
        file.unlink()


def name_split(root):
    (root / "dataset_dict.json").write_text('{"splits": ["train", "secret"]}')


def link_out(root):
    """The last file of the layout is a link to one outside."""
    file = sorted(path for path in root.rglob("*") if path.suffix in (".parquet", ".jsonl"))[-1]
    file.rename(root.parent / f"outside{file.suffix}")
    file.symlink_to(root.parent / f"outside{file.suffix}")


def link_folder_out(root):
    (root / "test").rename(root.parent / "elsewhere")
    (root / "test").symlink_to(root.parent / "elsewhere")


@pytest.mark.parametrize(
    ("layout", "spoil", "says"),
    [
        ("parquet shards", break_shard, r"1 of 2 files of split 'train' are here"),
        ("dataset", break_arrow, r"data-00000-of-00002.arrow: not an Arrow file that can be read"),
        ("jsonl", break_row, r"dev.jsonl:1: unknown field 'pst'"),
        ("dataset", lead_outside, r"outside the directory"),
        ("dataset dict", lose_split, r"split 'test' is missing \(test/state.json\)"),
        ("dataset dict", name_split, r"dataset_dict.json: split 'secret' is none of train"),
        ("jsonl", lambda root: (root / "test.jsonl").write_text((root / "dev.jsonl").read_text() * 2),
         r"id 'b' stands twice among the test records"),
        ("split folders", link_out, r"is a link to a file outside"),
        ("jsonl", link_out, r"is a link to a file outside"),
        ("parquet shards", link_out, r"is a link to a file outside"),
        ("split folders", link_folder_out, r"is a link to a file outside"),
    ],
    ids=["missing-shard", "cut-arrow", "wrong-field", "link-outside", "missing-split", "unknown-split", "two-ids",
         "linked-file-of-a-folder", "linked-file", "linked-shard", "linked-folder"],
)  # fmt: skip
def test_a_damaged_layout_is_one_line(tmp_path, layout, spoil, says):
    root = saved(tmp_path / "data", layout)
    spoil(root)
    with pytest.raises(InputError, match=says):
        records_split(root)


def test_links_inside_the_hubs_cache_are_followed(tmp_path):
    """A snapshot holds links to the blobs beside it; a file that is named alone may be a link, too."""
    snapshot = saved(tmp_path / "datasets--a--b" / "snapshots" / "0123", "parquet shards")
    for number, file in enumerate(sorted(snapshot.rglob("*.parquet"))):
        blob = tmp_path / "datasets--a--b" / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        file.symlink_to(blob)
    assert len(list(iter_root(snapshot))) == len(list(iter_root(snapshot / "data"))) == 6
    (tmp_path / "link.jsonl").symlink_to(saved(tmp_path / "other", "one jsonl"))
    assert list(iter_root(tmp_path / "link.jsonl")) == RECORDS


@pytest.mark.parametrize(
    ("root", "sets", "says"),
    [("nowhere", (), "nowhere: no such file or folder"), (".", ("imhi",), "holds records .*leave out"),
     ("empty", (), "none of the known data sets is there .*; `mentalglm data import` makes")],
    ids=["nowhere", "names", "empty"],
)  # fmt: skip
def test_what_cannot_be_found_is_said(tmp_path, root, sets, says):
    saved(tmp_path, "jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=says):
        list(iter_root(tmp_path / root, sets))
    with pytest.raises(InputError, match=r"no records here; .*source: upstream"):
        records_split(tmp_path / "empty")


@pytest.mark.parametrize("names", [("Train", "DEV", "Test"), ("train", "Valid", "TEST")])
@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL"])
def test_a_split_is_found_in_any_case(tmp_path, names, suffix):
    """The guard of held-out posts would not see them, and a run would train on what it is tested with."""
    for name, one in zip(names, RECORDS, strict=True):
        write_records(tmp_path / "data.jsonl", [one])
        (tmp_path / "data.jsonl").rename(tmp_path / f"{name}{suffix}")
    assert list(iter_root(tmp_path)) == RECORDS
    assert records_split(tmp_path).records == RECORDS
    assert [r.id for r in iter_root(tmp_path / f"{names[2]}{suffix}")] == ["c"]


@pytest.mark.parametrize("suffix", [".PARQUET", ".Parquet"])
def test_a_table_is_one_in_any_case(tmp_path, suffix):
    write_records(tmp_path / "train.parquet", RECORDS[:1])
    write_records(tmp_path / "t.parquet", RECORDS[2:])
    (tmp_path / "t.parquet").rename(tmp_path / f"Test{suffix}")
    assert [(r.id, r.split) for r in iter_root(tmp_path)] == [("a", "train"), ("c", "test")]


@pytest.mark.parametrize("name", ["train_1", "test2", "Test (1)", "training", "testset", "dev-old", "development"])
def test_a_file_that_begins_as_a_split_is_not_left_aside_without_a_word(tmp_path, name):
    write_records(tmp_path / "train.jsonl", RECORDS[:1])
    write_records(tmp_path / f"{name}.jsonl", RECORDS[1:])
    with pytest.raises(InputError, match=rf"{re.escape(name)}\.jsonl begins as a split's name, and only train, dev"):
        record_files(tmp_path)


@pytest.mark.parametrize("name", ["values", "testimony", "devices", "trainers"])
def test_a_word_that_goes_on_is_no_split_s_name(tmp_path, name):
    write_records(tmp_path / "train.jsonl", RECORDS[:1])
    write_records(tmp_path / f"{name}.jsonl", RECORDS[1:])
    assert list(iter_root(tmp_path)) == RECORDS[:1]
