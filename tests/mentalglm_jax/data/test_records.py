import json

import pytest

from mentalglm_jax.data.records import Record, iter_records, read_records, write_records
from mentalglm_jax.errors import InputError

SINGLE = {
    "id": "a1",
    "task": "suicide_risk",
    "language": "en",
    "post": "I had soup. I see a way on.",
    "question": "Does the post show high or low suicide risk?",
    "label": "low",
    "explanation": 'The post says "I see a way on".',
    "source": "test",
    "split": "dev",
    "cues": [[12, 26]],
    "decoys": None,
}
MULTI = {
    **{key: SINGLE[key] for key in ("language", "post", "question")},
    "id": "a2",
    "task": "cognitive_distortion",
    "labels": ["labeling", "mind_reading"],
}


def test_round_trip_through_a_file(tmp_path):
    path = tmp_path / "records.jsonl"
    records = [Record.from_dict(SINGLE), Record.from_dict(MULTI), Record.from_dict({**SINGLE, "id": "中"})]
    write_records(path, records)
    assert read_records(path) == records
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == SINGLE
    assert "label" not in rows[1]
    assert "中" in path.read_text(encoding="utf-8")


def test_gold_prompt_and_answer():
    single, multi = Record.from_dict(SINGLE), Record.from_dict(MULTI)
    assert single.gold == ("low",)
    assert multi.gold == ("labeling", "mind_reading")  # as given
    assert single.prompt.startswith('Consider this post: "I had soup. I see a way on." Question: Does')
    assert single.answer() == 'This post shows low suicide risk. Reasoning: The post says "I see a way on".'
    assert multi.answer() == "This post shows these cognitive distortions: labeling, mind reading."


def test_a_byte_order_mark_and_blank_lines_are_tolerated(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(SINGLE).encode() + b"\n\n" + json.dumps(MULTI).encode())
    assert [record.id for record in read_records(path)] == ["a1", "a2"]


def test_further_fields_are_read_only_on_request(tmp_path):
    path = tmp_path / "generations.jsonl"
    path.write_text(json.dumps({**SINGLE, "output_text": "x"}))
    assert read_records(path, allow_extra=True)[0].id == "a1"
    with pytest.raises(InputError, match=r"generations.jsonl:1: unknown field 'output_text'"):
        read_records(path)


def without(name):
    return {key: value for key, value in SINGLE.items() if key != name}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**SINGLE, "post": " \n"}, "record 'a1': post: is empty"),
        (without("post"), "field 'post' is missing"),
        (without("label"), "label: no label; give 'label' from: high, low"),
        ({**SINGLE, "label": "hgh"}, "unknown label 'hgh'; did you mean 'high'"),
        ({**SINGLE, "labels": ["low"]}, "labels: task suicide_risk takes 'label'"),
        ({**MULTI, "labels": []}, "no label"),
        ({**MULTI, "labels": "labeling"}, "labels: expected a list"),
        ({**MULTI, "labels": [1]}, "labels: expected a list of text"),
        ({**SINGLE, "task": "suicide"}, "unknown task 'suicide'"),
        ({**SINGLE, "language": "fr"}, "no language 'fr'"),
        ({**SINGLE, "split": "val"}, "split: 'val' is none of train, dev, test"),
        ({**SINGLE, "explanation": ""}, "explanation: is empty"),
        ({**SINGLE, "post": 5}, "post: expected text, got int"),
        ({**SINGLE, "cues": [[20, 40]]}, r"cues: \[20, 40\] is not inside the post"),
        ({**SINGLE, "decoys": [3]}, "decoys: expected a list of .start, end."),
        ({**SINGLE, "cues": [["a", 3]]}, "cues: expected a list of .start, end."),
        ({**SINGLE, "cues": "0-3"}, "cues: expected a list, got str"),
        ({**SINGLE, "source": None}, "source: expected text, got NoneType"),
        ([1], "expected a JSON object, got list"),
    ],
)
def test_a_wrong_row_is_named_by_line_and_field(tmp_path, row, message):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({**SINGLE, "id": "first"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=rf"records.jsonl:2: .*{message}"):
        read_records(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no record"),
        (b'{"id": ', ":1: not JSON"),
        (b"\xd7\xd4", "not UTF-8"),
        ((json.dumps(SINGLE) + "\n" + json.dumps(SINGLE)).encode(), ":2: id 'a1' already stands in line 1"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    path = tmp_path / "records.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_records(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no such file"):
        read_records(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        read_records(tmp_path)


def test_parquet_holds_the_same_records(tmp_path):
    records = [
        Record("a", "suicide_risk", "zh", "一个帖子\n第二行", "问？", label="high", cues=((0, 2),), decoys=()),
        Record("b", "cognitive_distortion", "zh", "又一个", "问？", labels=("labeling",), explanation="因为"),
    ]
    path = tmp_path / "train.parquet"
    write_records(path, records)
    assert read_records(path) == records == list(iter_records(path))
    write_records(tmp_path / "train.jsonl", iter_records(path))
    assert read_records(tmp_path / "train.jsonl") == records
    write_records(path, [records[0], records[0]])
    with pytest.raises(InputError, match=r"train.parquet:2: id 'a' already stands in line 1"):
        read_records(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"train.parquet: not a Parquet file that can be read"):
        read_records(path)
    with pytest.raises(InputError, match=r"gone.parquet: no such file"):
        read_records(tmp_path / "gone.parquet")
