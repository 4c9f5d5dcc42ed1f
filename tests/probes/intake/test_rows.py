"""From prompts and answers to rows: the model's own tokens, the post where it was said to be, label and explanation."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from probes import cli
from probes.errors import ProbeInputError, ProbeWarning
from probes.intake.rows import MADE, Reader, lay, read_records, rows
from probes.intake.template import render
from probes.models.encode import OPTIONAL, encode, read_generations
from probes.probe import Probe

LABELS = {"high": "The risk is high.", "low": "The risk is low."}
POST = "I fed the dog, it rained."
CHAT = (
    "{{ '[gMASK]<sop>' }}{% for turn in messages %}<|{{ turn.role }}|>\n{{ turn.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model_dir, found)
    (found / "chat_template.jinja").write_text(CHAT)
    return found


@pytest.fixture(scope="module")
def reader(chat_dir: Path) -> Reader:
    return Reader(chat_dir)


def record(**changes: Any) -> dict[str, Any]:
    return {
        "prompt": f'Post: "{POST}" Risk?',
        "answer": ' The risk is low. It says "fed the dog".',
        "post": POST,
    } | changes


def one(reader: Reader, **changes: Any) -> dict[str, Any]:
    laid = lay(reader, [record(**changes)], LABELS)
    return laid.rows[0]


def test_a_prompt_and_an_answer_become_a_row_that_can_be_probed(reader: Reader) -> None:
    row = one(reader)
    example = encode(row, reader.token_bytes)
    assert example.post == POST and example.text[slice(*example.post_char)] == POST
    assert (row["parsed_label"], row["label_text"]) == ("low", "The risk is low.")
    assert row["parsed_explanation"] == 'It says "fed the dog".'
    assert example.text == record()["prompt"] + record()["answer"]


def test_a_conversation_is_written_by_the_models_own_template(reader: Reader) -> None:
    turns = [
        {"role": "system", "content": "You judge."},
        {"role": "user", "content": f"  Post: {POST} Risk?\n"},
        {"role": "assistant", "content": "The risk is high."},
    ]
    at = turns[1]["content"].index(POST)
    laid = lay(
        reader,
        [
            {"messages": turns, "post": POST},
            {"messages": turns[:2], "answer": "The risk is high.", "post": [at, at + len(POST)]},
        ],
        LABELS,
    )
    texts = [encode(row, reader.token_bytes).text for row in laid.rows]
    wanted = f"[gMASK]<sop><|system|>\nYou judge.<|user|>\nPost: {POST} Risk?<|assistant|>The risk is high."
    assert texts == [wanted, wanted]
    assert laid.rows[0]["post_span"] == laid.rows[1]["post_span"]
    assert laid.rows[0]["label_text"] == "The risk is high."


def test_of_several_places_the_one_that_was_meant_is_taken(reader: Reader) -> None:
    prompt = 'Say "rain" or not. Post: "rain and rain" Say "rain".'
    at = prompt.index("rain and rain")
    row = one(reader, prompt=prompt, post=[at + 9, at + 13])
    assert row["post"] == "rain" and encode(row, reader.token_bytes).post_char[0] == at + 9
    laid = lay(reader, [record(), record(prompt=prompt, post="rain")], LABELS)
    assert [one["reason"] for one in laid.left_out] == ["the post stands several times in the prompt"]


@pytest.mark.parametrize(
    ("answer", "label", "explanation"),
    [
        ("low", "low", None),
        ("LOW - he is fine", "low", "he is fine"),
        ("He is fine and says so. The risk is low.", "low", "He is fine and says so."),
        ("<think>high? The risk is high.</think>\nThe risk is low: he ate", "low", "he ate"),
        ("Not high but low", None, None),
        ("following the highway", None, None),
        ("the risk is low\nIf it were high he would say so", "low", "If it were high he would say so"),
        ("**The risk is high.** He says goodbye.", "high", "He says goodbye."),
    ],
)
def test_label_and_explanation_by_rule(reader: Reader, answer: str, label: str | None, explanation: str | None) -> None:
    row = one(reader, answer=answer)
    assert (row["parsed_label"], row["parsed_explanation"]) == (label, explanation)


def test_what_is_given_goes_before_the_rule(reader: Reader) -> None:
    row = one(reader, answer="Not high but low, he ate", label="high", explanation="he ate")
    assert (row["parsed_label"], row["label_text"], row["parsed_explanation"]) == ("high", "high", "he ate")
    row = one(reader, answer="I would say so", label="high", label_text="say so")
    assert (row["parsed_label"], row["label_text"]) == ("high", "say so")
    assert one(reader, answer="low", label=None)["label_text"] is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"post": "I fed the cat"}, "the post stands not in the prompt"),
        ({"label": "middle"}, "the label is not in the answer"),
        ({"label_text": "moderate"}, "label_text is not in the answer"),
        ({"answer": "<think>The risk is low.", "label_text": "The risk is low."}, "the reasoning never ends"),
        ({"post": [1, 2]}, "no token wholly inside the post"),
    ],
)
def test_a_record_that_cannot_be_used_is_left_out_by_reason(
    reader: Reader, changes: dict[str, Any], reason: str
) -> None:
    laid = lay(reader, [record(), record(**changes)], LABELS)
    assert len(laid.rows) == 1 and [one["reason"] for one in laid.left_out] == [reason]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "give 'prompt' or 'messages'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "give 'prompt' or 'messages'"),
        ({"prompt": None, "messages": [{"role": "user"}]}, "a list of objects with 'role' and 'content'"),
        ({"prompt": None, "messages": [{"role": "system", "content": "a"}]}, "no turn of the user"),
        ({"answer": ""}, "'answer' is missing"),
        ({"answer": 3}, "'answer' has type int"),
        ({"hint": ["low"]}, "'hint' has type list"),
        ({"post": ""}, "'post' must be a text"),
        ({"post": [3, 400]}, "not inside the text of"),
        ({"post": [3, True]}, "'post' must be a text"),
        ({"candidates": {"a": 3}}, "'candidates' must map"),
    ],
)
def test_a_record_of_another_format_is_refused(reader: Reader, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProbeInputError, match=r"record '1': .*") as caught:
        lay(reader, [record(**changes)], LABELS)
    assert message in str(caught.value)


def test_what_a_row_may_hold_beside_is_taken_as_it_is(reader: Reader) -> None:
    """All keys of a row but those that are made of prompt and answer: the hint, which tests of the chain hide, too."""
    said = "<think>It rained, they say.</think> The risk is low."
    given = {
        "task": "risk", "question": "Risk?", "user": "ana", "pair": "p", "finish": "stop", "hint": "they say low",
        "cues": [[2, 5]], "decoys": [[6, 9]], "rationales": [[10, 13]], "reasoning": "It rained, they say.", "drawn": 3,
    }  # fmt: skip
    row = one(reader, prompt=f'Post: "{POST}" (they say low) Risk?', answer=said, **given)
    assert {key: row[key] for key in given} == given
    assert set(row) == set(given) | {"id", "post", "prompt_ids", "output_ids"} | set(MADE) and set(OPTIONAL) <= set(row)
    found = encode(row, reader.token_bytes)
    assert found.hint is not None and found.text[slice(*found.hint)] == "they say low"
    laid = lay(reader, [record(), record(hint="nobody says")], LABELS)
    assert [one["reason"] for one in laid.left_out] == ["the hint is not in the prompt"]


def test_ids_are_unique(reader: Reader) -> None:
    with pytest.raises(ProbeInputError, match="id 'a' is used 2 times"):
        lay(reader, [record(id="a"), record(id="a")], LABELS)


def test_python_warns_of_what_it_leaves_out(chat_dir: Path) -> None:
    with pytest.warns(ProbeWarning, match=r"1 records left out: the post stands not in the prompt \(1\)"):
        assert len(rows(chat_dir, [record(), record(post="cat")], LABELS)) == 1


def test_without_a_template_conversations_are_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ProbeInputError, match="no chat template; give prompts as text"):
        rows(tiny_model_dir, [{"messages": [{"role": "user", "content": POST}], "answer": "low", "post": POST}], LABELS)


def test_probes_rows_and_probes_run_go_together(chat_dir: Path, tmp_path: Path, capsys: Any) -> None:
    given = [record(id=f"r{i}", post=post, prompt=f"Post: {post} Risk?") for i, post in enumerate(("I ate.", "I ran."))]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*given, record(post="cat")]))
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    out = tmp_path / "rows.jsonl"
    arguments = ["rows", chat_dir, "--in", tmp_path / "in.jsonl", "--out", out, "--json"]
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, arguments), "--candidates", str(tmp_path / "labels.json")])
    assert end.value.code == 3
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "rows": 2, "labelled": 2, "left_out": {"the post stands not in the prompt": 1}, "out": str(out)
    }  # fmt: skip
    assert out.stat().st_mode & 0o777 == 0o600
    probe = Probe.from_pretrained(chat_dir)
    assert [probe.encode(row).label for row in read_generations(out)] == ["low", "low"]
    with pytest.raises(SystemExit) as end:
        cli.main(list(map(str, arguments)))
    assert end.value.code == 2 and "is there already" in capsys.readouterr().err


# ---- files of records ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.txt", "I ate.\r\n\n  \nIt rained. \n", [{"id": "1", "post": "I ate."}, {"id": "4", "post": "It rained."}]),
        ("a.txt", "I ate.\rIt rained.\r", [{"id": "1", "post": "I ate."}, {"id": "2", "post": "It rained."}]),
        ("a.csv", "post,label\na,#N/A\n#REF!,b\n#NA,c\n", [
            {"id": "1", "post": "a"}, {"id": "2", "label": "b"}, {"id": "3", "post": "#NA", "label": "c"}]),
        ("a.txt", "one\u2028line", [{"id": "1", "post": "one\u2028line"}]),
        ("a.csv", 'post,user\n"I ate, well.\nTwice.",ana\nb,\n\n', [
            {"id": "1", "post": "I ate, well.\nTwice.", "user": "ana"}, {"id": "2", "post": "b"}]),
        ("A.CSV", "\ufeffid,post\nx,a\n,b\n", [{"id": "x", "post": "a"}, {"id": "2", "post": "b"}]),
        ("a.csv", "\ufeffsep=;\r\npost;user\r\na, b;ana\r\n", [{"id": "1", "post": "a, b", "user": "ana"}]),
        ("a.csv", "sep=,\npost,user\na,ana\n", [{"id": "1", "post": "a", "user": "ana"}]),
        ("a.tsv", "sep=\t\npost\tuser\na\tana\n", [{"id": "1", "post": "a", "user": "ana"}]),
        ("a.tsv", "post\tplace\na, b\tUr\n", [{"id": "1", "post": "a, b", "place": "Ur"}]),
        ("a.jsonl", '\n{"post": "a"}\n', [{"id": "2", "post": "a"}]),
    ],
)  # fmt: skip
def test_posts_may_come_as_a_table_or_as_lines(tmp_path: Path, name: str, text: str, found: list[Any]) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read_records(tmp_path / name) == found


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"post,user\na,b,c\n", r"a.csv:2: row 1 has 3 cells, the header 2"),
        ("a.csv", b"post,post\na,b\n", r"a.csv:1: every column needs a name of its own"),
        ("a.csv", b"post,\na,b\n", r"a.csv:1: every column needs a name of its own"),
        ("a.csv", b'post\n"a\n', r"a.csv:2: no table separated by ','"),
        ("a.csv", b"post\n\xff\n", "a.csv: is no UTF-8 text"),
        ("a.txt", b"\xff\xfea\x00", "a.txt: is no UTF-8 text"),
        ("a.csv", b"post\n\n", "a.csv: no records"),
        ("a.csv", b"", "a.csv: no records|a.csv:1"),
        ("a.txt", b" \n", "a.txt: no records"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ProbeInputError, match=message):
        read_records(tmp_path / name)


def test_a_column_may_have_any_name() -> None:
    assert render("{{ post }}", [{"self": "x", "post": "y", "args": 1}], "here", strict=True) == ["y"]


@pytest.mark.parametrize("nobody", ["", " ", "\u3000", "\u200b\t", None])
def test_an_empty_name_is_nobody_and_not_one_author(reader: Reader, nobody: str | None) -> None:
    made = encode(one(reader, user=nobody, pair=nobody), reader.token_bytes)
    assert (made.user, made.pair) == (None, None)
    made = encode(one(reader, user="Ana ", pair=0), reader.token_bytes)
    assert (made.user, made.pair) == ("Ana ", "0")


def test_another_column_can_hold_the_post(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nI ate.,low\n,high\n", "utf-8")
    assert read_records(tmp_path / "a.csv", "text") == [
        {"id": "1", "label": "low", "post": "I ate."}, {"id": "2", "label": "high"}]  # fmt: skip
    (tmp_path / "b.jsonl").write_text('{"post": "a", "text": "b"}', "utf-8")
    with pytest.raises(ProbeInputError, match=r"b.jsonl:1: has a key 'post' beside 'text'; leave one out"):
        read_records(tmp_path / "b.jsonl", "text")


def test_a_record_without_a_post_says_what_it_has(reader: Reader) -> None:
    with pytest.raises(ProbeInputError, match=r"key 'post' must .*; it has prompt, answer, text"):
        lay(reader, [{"prompt": POST, "answer": "low", "text": POST}], LABELS)
