"""Parquet and Arrow files from strangers: small ones that stand for gigabytes, damage, columns that name addresses."""

import json
import os
import random
import struct
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mentalglm_jax.data.arrow import arrow_rows
from mentalglm_jax.data.bounded import MEMORY
from mentalglm_jax.data.records import COLUMNS, read_records, write_records
from mentalglm_jax.data.roots import iter_root
from tests.hostile.attack import refused
from tests.hostile.foreign_files import RECORD, called

# A file of ever more batches of no rows: each is cheap, and without a bound for all of them it takes half a minute.
ENDLESS = """
import itertools
from mentalglm_jax.data import bounded
bounded.WHOLE = 1
def batches():
    bounded.bound()
    yield from itertools.repeat([], 50_000_000)
bounded.serve(batches(), str)
"""
READ = """
import re, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from mentalglm_jax.data.records import read_records
from mentalglm_jax.errors import InputError
try:
    read_records(sys.argv[1])
except InputError as error:
    print(error)
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
"""


def same(value, rows, kind=None):
    """A column of one value, which the file holds once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value], kind))


def table(rows, **columns):
    """Records that differ in their ids; ``columns`` in place of theirs."""
    plain = {name: same(value, rows) for name, value in RECORD.items()}
    return pa.table(plain | {"id": pa.array([f"r{number}" for number in range(rows)])} | columns)


def endless_list(count):
    """One row with a list of ``count`` times the same text."""
    return pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), same("x" * 1000, count))


def parquet(path, found, groups=1, **options):
    with pq.ParquetWriter(path, found.schema, **{"compression": "zstd"} | options) as writer:
        for number in range(groups):
            ids = pa.array([f"{number}-{row}" for row in range(len(found))])
            writer.write_table(found if groups == 1 else found.set_column(0, "id", ids))


def arrow(path, found, **options):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(
        sink, found.schema, options=pa.ipc.IpcWriteOptions(**options)
    ) as writer:  # fmt: skip
        writer.write_table(found)


GROWS = {
    "one value in every row": (parquet, lambda: table(2000, post=same("x" * 1_000_000, 2000)), {}),
    "a value of 40 MB in 64 rows": (parquet, lambda: table(64, post=same("x" * 40_000_000, 64)), {}),
    "a list of two million": (parquet, lambda: table(1, labels=endless_list(2_000_000)), {}),
    "pages of zeros": (
        parquet, lambda: table(10, post=pa.array(["x" * 4_000_000] * 10)), {"groups": 2, "use_dictionary": False}),
    "nothing in a million rows": (parquet, lambda: pa.table({"id": pa.nulls(1_000_000, pa.string())}), {}),
    "Arrow: one value in every row": (arrow, lambda: table(2000, post=same("x" * 1_000_000, 2000)), {}),
    "Arrow: one run": (
        arrow, lambda: table(2000, post=pa.RunEndEncodedArray.from_arrays([2000], ["x" * 1_000_000])), {}),
    "Arrow: zeros": (arrow, lambda: table(20, post=pa.array(["x" * 4_000_000] * 20)), {"compression": "zstd"}),
}  # fmt: skip
SAYS = (r"grows to more than 100 times its size; write its rows as JSONL|takes more than 1024 MiB of memory"
        r"|row 1 has more than 4194304 characters|field 'id' is missing")  # fmt: skip


@pytest.mark.parametrize("attack", GROWS)
def test_a_small_file_that_grows(tmp_path, attack):
    write, make, options = GROWS[attack]
    file = tmp_path / ("r.arrow" if write is arrow else "r.parquet")
    write(file, make(), **options)
    assert file.stat().st_size < 2_000_000
    refused(called(lambda: read_records(file)), rf"{file.name}.*({SAYS})")


@pytest.mark.parametrize("attack", ["a value of 40 MB in 64 rows", "one value in every row"])
def test_what_a_file_that_grows_may_take(tmp_path, attack):
    """Measured where it is read: in a process with a limit of 4 GiB, and in the one it starts for the file."""
    write, make, options = GROWS[attack]
    write(tmp_path / "r.parquet", make(), **options)
    command = [sys.executable, "-P", "-c", READ, tmp_path / "r.parquet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said, here, there = done.stdout.splitlines()
    assert "r.parquet: not a Parquet file that can be read (" in said
    assert int(here) < 700 and int(there) < 1.3 * (MEMORY >> 20), (here, there)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "data set"])
def test_a_large_file_that_is_sound(tmp_path, kind):
    """What repeats is not refused: labels, questions and short posts of a data set are the same in every row."""
    found = table(2000)
    if kind == "data set":
        (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "r.arrow"}]}))
    (parquet if kind == "parquet" else arrow)(tmp_path / f"r.{'parquet' if kind == 'parquet' else 'arrow'}", found)
    root = tmp_path if kind == "data set" else next(tmp_path.glob("r.*"))
    assert sum(record.post == RECORD["post"] for record in iter_root(root)) == 2000


def test_who_stops_reading_leaves_no_process(tmp_path, monkeypatch):
    parquet(tmp_path / "r.parquet", table(2000))
    started, real = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **more: started.append(real(*given, **more)) or started[-1])
    rows = arrow_rows(tmp_path / "r.parquet", COLUMNS)
    assert next(rows)[1]["id"] == "r0"
    rows.close()
    (child,) = started
    with pytest.raises(ChildProcessError):  # ended, and waited for
        os.waitpid(child.pid, os.WNOHANG)


def test_a_reader_that_falls_over_is_a_refusal(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mentalglm_jax.data.bounded.module_command", lambda *_: [sys.executable, "-c", "import os; os.abort()"]
    )
    parquet(tmp_path / "r.parquet", table(1))
    refused(called(lambda: read_records(tmp_path / "r.parquet")), "not a Parquet file .*or breaks the reader")


def test_a_reader_that_never_ends_is_stopped(tmp_path, monkeypatch):
    spin = "import signal; signal.setitimer(signal.ITIMER_PROF, 0.2)\nwhile True: pass"
    monkeypatch.setattr("mentalglm_jax.data.bounded.module_command", lambda *_: [sys.executable, "-c", spin])
    parquet(tmp_path / "r.parquet", table(1))
    refused(
        called(lambda: read_records(tmp_path / "r.parquet")), "not a Parquet file .*seconds of processor time|60 s of"
    )


def test_a_file_that_never_ends_in_small_steps_is_stopped(tmp_path, monkeypatch):
    """Two rows of a Parquet file each take 700 bytes and 200 MB to unpack: a third of a second, a thousand times."""
    monkeypatch.setattr("mentalglm_jax.data.bounded.module_command", lambda *_: [sys.executable, "-c", ENDLESS])
    parquet(tmp_path / "r.parquet", table(1))
    refused(called(lambda: read_records(tmp_path / "r.parquet")), "not a Parquet file .*takes more than 60 s of proc")


@pytest.mark.parametrize(
    ("kind", "seeds"), [(kind, range(2)) for kind in ("parquet", "arrow")]
    + [pytest.param(kind, range(2, 30), marks=pytest.mark.slow) for kind in ("parquet", "arrow")],
)  # fmt: skip
def test_damage_is_read_or_refused(tmp_path, kind, seeds):
    file = tmp_path / f"r.{kind}"
    {"parquet": parquet, "arrow": arrow}[kind](file, table(50).cast(pa.schema([(n, pa.string()) for n in RECORD])))
    data = file.read_bytes()
    for seed in seeds:
        draw, broken = random.Random(seed), bytearray(data)
        for _ in range(draw.randint(1, 6)):
            broken[draw.randrange(len(broken))] = draw.choice([0, 1, 127, 255, draw.randrange(256)])
        file.write_bytes(broken)
        outcome = called(lambda: read_records(file))
        assert outcome.code in (0, 2) and outcome.err.count("\n") <= 1


def test_offsets_that_lead_outside(tmp_path):
    """The reader of Arrow files does not look at them by itself: it would read what lies beside in memory."""
    file = tmp_path / "r.arrow"
    arrow(file, table(1, post=pa.array(["x" * 77_777])))
    right, wrong = struct.pack("<ii", 0, 77_777), struct.pack("<ii", 0, 1 << 30)
    before, _, after = file.read_bytes().rpartition(right)  # it stands in the description of the buffers, too
    file.write_bytes(before + wrong + after)
    refused(called(lambda: read_records(file)), "not an Arrow file that can be read")


def image_table(source):
    """What ``datasets`` takes for images and sounds to fetch and decode."""
    columns = {name: [value] for name, value in RECORD.items()}
    columns |= {"source": [{"bytes": None, "path": source}]}
    features = {name: {"dtype": "string", "_type": "Value"} for name in RECORD} | {"source": {"_type": "Image"}}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


@pytest.mark.parametrize("source", ["/etc/passwd", "http://127.0.0.1:9/x.png", "hf://datasets/a/b/c.png"])
def test_parquet_that_names_files_and_addresses(tmp_path, source, monkeypatch):
    file = tmp_path / "records.parquet"
    pq.write_table(image_table(source), file)
    opened = []
    monkeypatch.setattr("builtins.open", lambda *a, **k: opened.append(a))
    outcome = called(lambda: read_records(file))
    assert opened == []
    refused(outcome, "records.parquet:1: source: expected text, got dict")


def test_parquet_metadata_is_not_looked_at(tmp_path):
    pq.write_table(table(1).replace_schema_metadata({"huggingface": "[" * 10_000}), tmp_path / "r.parquet")
    assert read_records(tmp_path / "r.parquet")[0].to_dict()["id"] == "r0"


def test_parquet_round_trip(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps(RECORD) + "\n")
    records = read_records(tmp_path / "r.jsonl")
    write_records(tmp_path / "r.parquet", records)
    assert read_records(tmp_path / "r.parquet") == records


PARQUETS = {
    "empty": b"", "text": b"x" * 100, "marks only": b"PAR1PAR1",
    "footer beyond": b"PAR1" + struct.pack("<I", 1 << 30) + b"PAR1",
    "footer of noise": b"PAR1" + bytes(range(200)) + struct.pack("<I", 200) + b"PAR1",
}  # fmt: skip


@pytest.mark.parametrize("attack", PARQUETS)
def test_parquet_damaged(tmp_path, attack):
    (tmp_path / "r.parquet").write_bytes(PARQUETS[attack])
    refused(called(lambda: read_records(tmp_path / "r.parquet")), "not a Parquet file that can be read")


def test_a_column_that_is_no_record_s(tmp_path):
    parquet(tmp_path / "r.parquet", table(1, **{"\x07": pa.array([1])}))
    refused(
        called(lambda: read_records(tmp_path / "r.parquet")), r"r\.parquet: unknown column '\\x07'; known: id, task"
    )
    assert len(read_records(tmp_path / "r.parquet", allow_extra=True)) == 1


def test_a_column_twice(tmp_path):
    found = table(1)
    parquet(tmp_path / "r.parquet", found.append_column("post", same("another", 1)))
    refused(called(lambda: read_records(tmp_path / "r.parquet")), r"column 'post' stands more than once")


@pytest.mark.parametrize("value", [pa.array([b"\xff"]), pa.array([b"\xff"]).cast(pa.string(), safe=False),
                                   pa.array([0], pa.timestamp("s")), pa.array([1.5]), pa.array([{"a": 1}])],
                         ids=["bytes", "not UTF-8", "a date", "a number", "a struct"])  # fmt: skip
def test_a_post_that_is_no_text(tmp_path, value):
    parquet(tmp_path / "r.parquet", table(1, post=value))
    refused(called(lambda: read_records(tmp_path / "r.parquet")), r"r\.parquet")
