"""Upstream files are read a piece at a time: the same at every size of it, in bounded memory."""

import json
import subprocess
import sys

import pytest

from mentalglm_jax.data import tables
from mentalglm_jax.data.sources import (
    load_sos_hl_1k,
    load_upstream,
)
from mentalglm_jax.errors import InputError
from tests.mentalglm_jax.upstream import CD_HEADER, GOOD, alpaca, imhi_row, posts, put, sos_onehot


@pytest.mark.parametrize("chunk", [7, 64])
def test_files_are_read_alike_whatever_the_size_of_a_chunk(tmp_path, monkeypatch, chunk):
    """Characters, rows and JSON items that lie across the end of a chunk."""
    posts = [f"第{number}个\n\u2028帖子" + "很长" * number for number in range(40)]
    rows = [("high", post) for post in posts]
    put(tmp_path / "suicide_train_BERT.tsv", sos_onehot(rows))
    put(tmp_path / "Instruct_a.json", alpaca(*((GOOD[0], post, GOOD[2]) for post in posts)))
    damaged = put(tmp_path / "damaged_BERT.tsv", sos_onehot(rows) + b"1\t0\t\xff\xff\n")
    whole = load_upstream(tmp_path, ["sos_hl_1k", "c_imhi"])
    with pytest.raises(InputError) as before:
        load_sos_hl_1k(damaged)
    monkeypatch.setattr(tables, "_CHUNK", chunk)
    assert load_upstream(tmp_path, ["sos_hl_1k", "c_imhi"]) == whole
    with pytest.raises(InputError) as after:
        load_sos_hl_1k(damaged)
    assert str(after.value) == str(before.value) and ":81: wrong encoding" in str(after.value)


MILLION = """
import itertools, json, resource, sys
from collections import deque
from pathlib import Path
from mentalglm_jax.data.records import iter_records
from mentalglm_jax.data.sources import iter_upstream

root, name = Path(sys.argv[1]), sys.argv[2]
records = iter_records(root / "records.jsonl") if name == "records" else iter_upstream(root, [name])
next(records)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = 1 + sum(1 for _ in records)
print(json.dumps({"rows": count, "more_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before}))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", ["sos_hl_1k", "sos_1k", "socialcd_3k", "pathways", "imhi_dreaddit", "c_imhi", "records"]
)
def test_a_million_rows_are_read_in_bounded_memory(tmp_path, name):
    rows, post = 1_000_000, "这是第{}个帖子，没有什么特别的内容"
    row = {
        "sos_hl_1k": ("suicide_train_BERT.tsv", "", "1\t0\t" + post + "\n", "gb18030"),
        "sos_1k": ("train_data1.tsv", "comment\tmyLabel\n", post + "\t7\n", "utf-8"),
        "socialcd_3k": ("train_data_with_header.tsv", "\t".join([*CD_HEADER, "内容"]) + "\n",
                        "0\t" * 11 + "1\t" + post + "\n", "utf-8"),
        "pathways": ("train.txt", "", post + "\t情绪反应##情感效应\n", "utf-8"),
        "imhi_dreaddit": ("instruction_data/dreaddit/train.csv", "query,gpt-3.5-turbo\n",
                          '"' + imhi_row("post {}")[0].replace('"', '""') + '","' + imhi_row("")[1] + '"\n', "utf-8"),
        "c_imhi": ("Instruct_a.json", "[", json.dumps(dict(zip(("instruction", "input", "output"), GOOD, strict=True)),
                   ensure_ascii=False).replace("{", "{{").replace("}", "}}") + ",\n", "utf-8"),
        "records": ("records.jsonl", "", json.dumps(posts(1)[0].to_dict()).replace("{", "{{").replace("}", "}}")
                    + "\n", "utf-8"),
    }[name]  # fmt: skip
    path = put(tmp_path / row[0], b"")
    with path.open("w", encoding=row[3], newline="") as file:
        file.write(row[1])
        file.writelines(row[2].format(number) for number in range(rows - 1))
        file.write(row[2].format(rows).rstrip("\n,") + ("]" if name == "c_imhi" else "\n"))
    result = subprocess.run(
        [sys.executable, "-c", MILLION, tmp_path, name], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert found["rows"] == rows and found["more_kib"] < 32 * 1024, found
