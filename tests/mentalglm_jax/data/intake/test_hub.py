"""`mentalglm data import ORG/NAME`: the real `datasets` library, and a server that speaks the Hub's protocol."""

import io
import json
import os
import subprocess
import sys

import pytest

from mentalglm_jax.data.records import load_datasets, read_records
from tests.hub import hub

POSTS = [f"{what} {where}" for what in ("I like rain", "I like wind", "We saw snow", "They made soup", "Tea is fine")
         for where in ("at home.", "in the yard.", "by the sea.", "on the hill.")]  # fmt: skip
LABELS = ("good", "bad")
# One process for all, as one takes seconds to import what it needs: [arguments] in, [code, out, err] out.
DRIVER = """import contextlib, io, json, sys
from mentalglm_jax.cli.main import main
found = {}
for name, arguments in json.loads(sys.argv[1]).items():
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(["data", "import", *arguments])
        except SystemExit as end:
            code = end.code or 0
    found[name] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(found))
"""
COLUMNS = ["--text", "post", "--label", "label", "--task", "liking", "--language", "en"]
ASKED = {
    "csv": ["org/csv", *COLUMNS, "--out", "csv"],
    "splits": ["org/splits", *COLUMNS, "--out", "splits"],
    "two configurations": ["org/configs", *COLUMNS, "--out", "none"],
    "one of two": ["org/configs", *COLUMNS, "--config", "second", "--out", "second"],
    "a script": ["org/script", *COLUMNS, "--out", "none"],
    "unknown": ["org/absent", *COLUMNS, "--out", "none"],
    "gated": ["org/gated", *COLUMNS, "--out", "none"],
    "a file of this machine": ["org/outside", *COLUMNS, "--out", "none"],
    "another kind": ["org/kind", *COLUMNS, "--out", "none"],
    "a damaged one": ["org/damaged", *COLUMNS, "--out", "none"],
    "no column": ["org/csv", "--text", "text", "--label", "label", "--task", "liking", "--out", "none"],
}
CONFIGS = b"""---
configs:
- config_name: first
  data_files: first.csv
- config_name: second
  data_files: second.csv
---
"""


def table(posts=POSTS) -> bytes:
    return ("post,label\n" + "".join(f"{post},{LABELS[n % 2]}\n" for n, post in enumerate(posts))).encode()


def parquet(posts, mark: str) -> bytes:
    datasets = load_datasets()
    features = datasets.Features({"post": datasets.Value("string"), "label": datasets.ClassLabel(names=list(LABELS))})
    rows = [{"post": f"{post} {mark}", "label": n % 2} for n, post in enumerate(posts)]
    buffer = io.BytesIO()
    datasets.Dataset.from_list(rows, features=features).to_parquet(buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """What each command of ``ASKED`` did, and the directory it was given in."""
    directory = tmp_path_factory.mktemp("imported")
    with hub() as state:
        state.datasets = {
            "org/csv": {"posts.csv": table()},
            "org/splits": {f"data/{split}-00000-of-00001.parquet": parquet(POSTS, mark) for split, mark in
                           (("train", "One day."), ("validation", "Perhaps tomorrow, who knows?"),
                            ("test", "Never did it end so well for all of us."))},
            "org/configs": {"README.md": CONFIGS, "first.csv": table(POSTS[:8]), "second.csv": table(POSTS[8:])},
            "org/script": {"script.py": b"open('executed', 'w').write('x')\n", "posts.csv": table()},
            "org/outside": {"README.md": CONFIGS.replace(b"first.csv", b"/etc/passwd"), "second.csv": table()},
            "org/kind": {"posts.h5": b"\x89HDF\r\n\x1a\n" + bytes(100)},
            "org/damaged": {"posts.parquet": b"PAR1" + bytes(100) + b"PAR1"},
        }  # fmt: skip
        state.refuses["GET /api/datasets/org/gated"] = 403
        state.refuses["HEAD /datasets/org/gated"] = 403
        environment = {
            **os.environ, "HF_ENDPOINT": state.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(directory / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        done = subprocess.run([sys.executable, "-c", DRIVER, json.dumps(ASKED)], cwd=directory, env=environment,
                              capture_output=True, text=True, timeout=600)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        requests = [path for _, path, _ in state.requests]
    return json.loads(done.stdout.splitlines()[-1]), directory, requests


def test_a_table_of_the_hub_comes_in(imported):
    said, directory, requests = imported
    code, out, err = said["csv"]
    assert code == 0, err
    records = [one for split in ("train", "dev", "test") for one in read_records(directory / "csv" / f"{split}.jsonl")]
    assert sorted(record.post for record in records) == sorted(POSTS)
    assert {record.source for record in records} == {"org/csv"} and {record.label for record in records} == set(LABELS)
    assert "mentalglm train csv/recipe.yaml" in out
    assert any(path.startswith("/datasets/org/csv/resolve/") and path.endswith("posts.csv") for path in requests)


def test_its_splits_and_the_names_of_its_classes_are_kept(imported):
    said, directory, _ = imported
    assert said["splits"][0] == 0, said["splits"][2]
    for split, mark in (("train", "One day."), ("dev", "Perhaps"), ("test", "Never")):
        found = read_records(directory / "splits" / f"{split}.jsonl")
        assert len(found) == len(POSTS) and all(mark in record.post for record in found)
        assert {record.label for record in found} == set(LABELS)


def test_one_of_several_configurations_is_named(imported):
    said, directory, _ = imported
    code, _, err = said["two configurations"]
    assert code == 2 and len(err.splitlines()) == 1 and "first" in err and "second" in err and "--config" in err
    assert said["one of two"][0] == 0, said["one of two"][2]
    found = [one for split in ("train", "dev", "test") for one in read_records(directory / "second" / f"{split}.jsonl")]
    assert sorted(record.post for record in found) == sorted(POSTS[8:])


def test_a_script_is_not_run(imported):
    said, directory, _ = imported
    code, _, err = said["a script"]
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("mentalglm: org/script: ")
    assert not (directory / "executed").exists()


@pytest.mark.parametrize(("name", "says"), [("unknown", "org/absent: no such file or folder"),
                                            ("gated", "org/gated: no such file or folder"),
                                            ("a file of this machine", "org/outside: "),
                                            ("another kind", "org/kind: posts.h5 is none of the tables"),
                                            ("a damaged one", "posts.parquet: not a Parquet file that can be read"),
                                            ("no column", "no column 'text'")])  # fmt: skip
def test_what_cannot_be_had_is_refused_in_one_line(imported, name, says):
    said, directory, _ = imported
    code, _, err = said[name]
    assert code == 2 and len(err.splitlines()) == 1 and says in err, err
    assert not (directory / "none").exists()


def test_datasets_reads_no_file_itself(imported):
    """It would, without bounds and in this process."""
    _, directory, _ = imported
    assert not list((directory / "hf" / "datasets").rglob("*.arrow"))
