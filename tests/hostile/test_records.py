"""Records, answers and evaluations from strangers: one line with file and row, before any model is loaded."""

import json
import os

import pytest

from mentalglm_jax.data.records import read_records
from mentalglm_jax.data.tables import read_json_list
from mentalglm_jax.evaluate.answers import read_generations
from tests.hostile.attack import refused, run
from tests.hostile.foreign_files import JSON_ATTACKS, RECORD, called

ANSWER = RECORD | {"parsed_label": "high", "parsed_explanation": "x", "parse_status": "ok", "output_text": "x"}
LINES: dict[str, tuple[bytes, str]] = {
    **{name: (raw if isinstance(raw, bytes) else raw.encode(), "") for name, (raw, _) in JSON_ATTACKS.items()
       if name not in ("empty", "a byte order mark")},
    "id a number": (json.dumps(RECORD | {"id": 1}).encode(), ":2: id: expected text"),
    "post null": (json.dumps(RECORD | {"post": None}).encode(), ":2: post: expected text"),
    "task unknown": (json.dumps(RECORD | {"task": "\x1b[31m\n"}).encode(), r":2: .*\\x1b\[31m\\n"),
    "language unknown": (json.dumps(RECORD | {"language": "xx"}).encode(), ":2: .*xx"),
    "label unknown": (json.dumps(RECORD | {"label": "x\x1b"}).encode(), ":2: "),
    "label a list": (json.dumps(RECORD | {"label": ["high"]}).encode(), ":2: label: expected text"),
    "cues beyond the post": (json.dumps(RECORD | {"cues": [[0, 10**15]]}).encode(), ":2: .*not inside the post"),
    "cues of true": (json.dumps(RECORD | {"cues": [[True, 3]]}).encode(), ":2: cues: expected a list"),
    "the same id": (json.dumps(RECORD | {"id": "r0"}).encode(), ":2: id 'r0' already stands in line 1"),
    "an unknown field": (json.dumps(RECORD | {"\x07": 1}).encode(), r":2: unknown field '\\x07'"),
    "a line of 5 million characters": (b'"' + b"x" * 5_000_000 + b'"', ":2: a line of 4194304 characters or more"),
}  # fmt: skip


@pytest.mark.parametrize("attack", LINES)
def test_records_line(tmp_path, attack):
    raw, says = LINES[attack]
    file = tmp_path / "records.jsonl"
    file.write_bytes(json.dumps(RECORD | {"id": "r0"}).encode() + b"\n" + raw + b"\n")
    refused(called(lambda: read_records(file)), rf"records\.jsonl.*{says}")


@pytest.mark.parametrize("attack", [name for name in LINES if name not in ("the same id", "an unknown field")])
def test_generations_line(tmp_path, capsys, attack):
    raw, _ = LINES[attack]
    file = tmp_path / "generations.jsonl"
    file.write_bytes(json.dumps(ANSWER | {"id": "r0"}).encode() + b"\n" + raw + b"\n")
    refused(run(["mentalglm", "evaluate", file], capsys), r"generations\.jsonl")


@pytest.mark.parametrize("attack", JSON_ATTACKS)
def test_evaluation(tmp_path, capsys, attack):
    raw, _ = JSON_ATTACKS[attack]
    (tmp_path / "evaluation.json").write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    refused(run(["mentalglm", "leaderboard", tmp_path], capsys), r"evaluation\.json")


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "nothing"])
@pytest.mark.parametrize("name", ["records.jsonl", "records.parquet", "generations.jsonl"])
def test_no_file(tmp_path, name, kind):
    file = tmp_path / name
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "device":
        file.symlink_to("/dev/zero")
    read = read_generations if "gen" in name else read_records
    says = "no such file" if kind == "nothing" else "not a file but a directory, a pipe or a device"
    refused(called(lambda: read(file)), rf"{name}.*{says}")


@pytest.mark.parametrize("attack", ["deep", "5,000 digits", "NaN", "half a surrogate pair", "a key twice"])
def test_list_item(tmp_path, attack):
    file = tmp_path / "train.json"
    raw = JSON_ATTACKS[attack][0]
    file.write_text("[{}, " + str(raw) + "]")
    says = r"field 'a': .*half of a UTF-16" if attack == "half a surrogate pair" else "not JSON"
    refused(called(lambda: list(read_json_list(file))), rf"train\.json:1[:,] {says}")
