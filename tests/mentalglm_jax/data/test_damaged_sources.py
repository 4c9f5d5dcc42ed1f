"""A damaged or missing upstream file is named by row and column, in one line."""

import pytest

from mentalglm_jax.data.c_imhi import iter_c_imhi
from mentalglm_jax.data.sources import (
    load_imhi,
    load_socialcd_3k,
    load_sos_hl_1k,
    load_upstream,
)
from mentalglm_jax.errors import InputError
from tests.mentalglm_jax.upstream import (
    CD,
    GOOD,
    LEVELS,
    alpaca,
    cd_rows,
    cd_table,
    imhi_row,
    imhi_table,
    put,
    sos_chat,
    sos_table,
    table,
)

# --- damage ---


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a_BERT.tsv", "1\t0\t好\n2\t0\t好".encode("gb18030"), r"a_BERT.tsv:2, columns 1-2: expected '1 0'"),
        ("a_BERT.tsv", "1\t0\t好\n0\t0\t好".encode("gb18030"), "a_BERT.tsv:2, columns 1-2: .* found '0 0'"),
        ("a_BERT.tsv", b"1\t0\tok\n0\t1\n", r":2: 2 columns, expected 3 \(high, low, post\)"),
        ("a_BERT.tsv", b"1\t0\tok\n0\t1\t  \n", ":2: the post is empty"),
        ("a_BERT.tsv", "1\t0\t好\n".encode("utf-16"), ":1: wrong encoding, not UTF-8 or GB18030"),
        ("a_BERT.tsv", b'1\t0\tok\n0\t1\t"open\n1\t0\tx\n', ":2: not a readable row .*quotation marks"),
        ("a_BERT.tsv", b"", "holds no row"),
        ("a.csv", sos_table().replace(b"label", b"lable"), ":1: column 'label' is missing; .*separated by tabs"),
        ("a.csv", sos_table().replace(b"\t", b","), ":1: column 'id' is missing"),
        ("a.csv", b"id\tlabel\tcomment\n0\t1\tok\n1\t\tok\n", ":3, column 'label': .*row with no label"),
        ("a.csv", b"id\tlabel\tcomment\n0\thigh\tok\n", ":2, column 'label': expected 1 .*found 'high'"),
        ("a.csv", b"id\tlabel\tcomment\n0\t1\tok\textra\n", ":2: 4 columns, expected 3"),
        ("a.csv", sos_table().decode().encode("gb18030"), ":2: wrong encoding, not UTF-8"),
        ("a.csv", b"id\tlabel\tcomment\n", "holds no row"),
        ("a.jsonl", b'{"messages": []}', ":1: expected .*user and an assistant message"),
        ("a.jsonl", b"[]", ":1: expected .*user and an assistant message"),
        ("a.jsonl", sos_chat() + b"\n{", ":4: not JSON"),
        ("a.jsonl", sos_chat().replace("高自杀风险".encode(), "未知".encode()), ":1, assistant message: .*'未知'"),
    ],
)  # fmt: skip
def test_a_damaged_sos_file_is_named_by_row_and_column(tmp_path, name, data, message):
    with pytest.raises(InputError, match=message):
        load_sos_hl_1k(put(tmp_path / name, data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (cd_table([*CD, *cd_rows(("好", set()))]), ":4: no label, all twelve columns are 0"),
        (cd_table([["2", *CD[0][1:]]]), ":2, column '非此即彼': expected 0 or 1, found '2'"),
        (cd_table([["", *CD[0][1:]]]), ":2, column '非此即彼': expected 0 or 1, found nothing"),
        (cd_table([CD[0][:-1]]), ":2: 12 columns, expected 13"),
        (cd_table(cd_rows(("", {1}))), ":2: the post is empty"),
        (cd_table(CD).replace("读心术".encode(), "读心".encode()), ":1: column '读心术' is missing"),
        (cd_table(CD).replace("内容".encode(), b"text"), ":1: column '内容' is missing"),
        (cd_table(CD).decode().encode("gb18030"), ":1: wrong encoding, not UTF-8"),
    ],
)
def test_a_damaged_socialcd_file_is_named_by_row_and_column(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        load_socialcd_3k(put(tmp_path / "train_data_with_header.tsv", data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (imhi_table(imhi_row("x"), ["a post alone", "y"]), ":3, column 'query': expected 'Consider this post"),
        (imhi_table(imhi_row("x", question="Is it?")), ":2, column 'query': the question is not one of set dreaddit"),
        (imhi_table(imhi_row("x", answer="Maybe. Reasoning: y")), ":2, column 'gpt-3.5-turbo': unknown label"),
        (imhi_table(imhi_row("x", answer="Reasoning: y")), ":2, column 'gpt-3.5-turbo': no label"),
        (imhi_table(imhi_row("x", answer="")), ":2, column 'gpt-3.5-turbo': no label"),
        (imhi_table(imhi_row("  ")), ":2: the post is empty"),
        (imhi_table(imhi_row("a\nb\nc"), imhi_row("x", answer="?")), ":5, column 'gpt-3.5-turbo'"),
        (imhi_table(imhi_row("x")).replace(b"gpt-3.5-turbo", b"gpt"), ":1: column 'gpt-3.5-turbo' is missing"),
        (imhi_table(imhi_row("x")) + b'"cut off', ":3: not a readable row"),
        ("query,gpt-3.5-turbo\né".encode("latin-1"), ":2: wrong encoding"),
    ],
)
def test_a_damaged_imhi_file_is_named_by_row_and_column(tmp_path, data, message):
    put(tmp_path / "dreaddit" / "train.csv", data)
    with pytest.raises(InputError, match=message):
        load_imhi(tmp_path, ["dreaddit"])


STEM = ' Question: The answer to the question "Does the poster suffers from stress?" is '


COMPLETION = [["post", "question", "response"], ["Post: x", STEM, "yes. Reasoning: y"]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([COMPLETION[0], ["x", STEM, "yes."]], ":2, column 'post': expected 'Post: ...'"),
        ([COMPLETION[0], ["Post: x", " Question: why?", "yes."]], ":2, column 'question': the question is not one of"),
        ([*COMPLETION, ["Post: x", STEM, "maybe. Reasoning: y"]], ":3, column 'response': unknown label"),
        ([*COMPLETION, ["Post: x", STEM, " Reasoning: y"]], ":3, column 'response': no label"),
        ([*COMPLETION, ["Post: x", STEM]], ":3: 2 columns, expected 3"),
        ([["post", "response"], ["Post: x", "yes."]], ":1: column 'question' is missing"),
        ([["post", "question", "answer"], ["Post: x", STEM, "yes."]], ":1: column 'gpt-3.5-turbo' is missing"),
        ([["query", "gpt-3.5-turbo"], ["Post: x", "yes."]], ":2, column 'query': expected 'Post: ... Question: ...'"),
        ([["post", "post", "question", "response"], ["a", "b", STEM, "yes."]], ":1: column 'post' stands twice"),
    ],
)
def test_a_damaged_completion_file_is_named_by_row_and_column(tmp_path, rows, message):
    put(tmp_path / "complete_data" / "dreaddit" / "train.csv", table(rows, ","))
    with pytest.raises(InputError, match=message):
        load_imhi(tmp_path, ["dreaddit"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (table([LEVELS[0], ["好", "11"]], "\t"), ":2, column 'myLabel': expected a level from 0 to 10, found '11'"),
        (table([LEVELS[0], ["好", ""]], "\t"), ":2, column 'myLabel': .*found nothing"),
        (table([*LEVELS, ["好", "1", ""]], "\t"), ":4: 3 columns, expected 2"),
        (table([["comment", "level"], ["好", "1"]], "\t"), ":1: column 'myLabel' is missing"),
        (table(LEVELS, "\t", "gb18030"), ":2: wrong encoding, not UTF-8"),
        (table(LEVELS[:1], "\t"), "holds no row"),
        (b"", "holds no row"),
    ],
)
def test_a_damaged_sos_1k_file_is_named_by_row_and_column(tmp_path, data, message):
    put(tmp_path / "test_data.tsv", data)
    with pytest.raises(InputError, match=message):
        load_upstream(tmp_path, ["sos_1k"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "好\t情绪反应##情感效应\n坏\t情绪反应##生活\n",
            ":2, column 'labels': '情绪反应##生活' is no parent",
        ),
        (
            "好\t情绪反应##情感效应\n坏\t情绪反应\n",
            ":2, column 'labels': '情绪反应' stands without",
        ),
        ("好\t情绪反应##情感效应\n坏\t \n", ":2, column 'labels': no label"),
        ("好\t情绪反应##情感效应\n坏\n", ":2: 1 columns, expected 2"),
        ("好\t情绪反应##情感效应\n坏\t坏\t情绪反应##情感效应\n", ":2: 3 columns, expected 2"),
        ("好\t情绪反应##情感效应\n\t情绪反应##情感效应\n", ":2: the post is empty"),
    ],
)
def test_a_damaged_pathway_file_is_named_by_row_and_column(tmp_path, text, message):
    put(tmp_path / "train.txt", text.encode())
    with pytest.raises(InputError, match=message):
        load_upstream(tmp_path, ["pathways"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (alpaca(GOOD)[:-2], ":6: not JSON"),
        (alpaca(GOOD)[:-1], ":7: not JSON .*expected ',' or"),
        (alpaca(GOOD)[:29], ":3: not JSON .*is the download complete"),
        (alpaca(GOOD) + b"x", ":7: there is text after the JSON list"),
        (b'{"instruction": ""}', ":1: expected a JSON list"),
        (alpaca(GOOD, GOOD).replace(b'"output"', b'"answer"', 1), ":2: column 'output' is missing"),
        (alpaca(GOOD).replace("都怪我".encode(), b"").replace(b'""', b"3"), ":2: column 'input' is not text"),
        (b"[[]]", ":1: expected an object with instruction, input, output"),
        (b"[]", "holds no row"),
        (b"", "holds no row"),
        (alpaca(GOOD).decode().encode("gb18030"), ":3: wrong encoding"),
        (alpaca(GOOD, (GOOD[0], " ", GOOD[2])), ":7: the post is empty"),
        (alpaca(("这个帖子好吗？", "都怪我", "好")), ":2, column 'instruction': expected a question about one of"),
        (
            alpaca((GOOD[0], "都怪我", "说不清。推理：读心术")),
            ":2, column 'output': no label",
        ),
        (
            alpaca(("自杀风险？", "都怪我", "高自杀风险，低自杀风险")),
            ":2, column 'output': no label",
        ),
    ],
)
def test_a_damaged_c_imhi_file_is_named_by_row_and_column(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        list(iter_c_imhi(put(tmp_path / "Instruct_CD.json", data)))


def test_a_post_in_the_label_column_is_not_printed(tmp_path):
    secret = "something long and private that nobody should see"
    with pytest.raises(InputError, match=f"found text of {len(secret)} characters") as caught:
        load_sos_hl_1k(put(tmp_path / "a.csv", f"id\tlabel\tcomment\n0\t{secret}\t1\n".encode()))
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: load_upstream(path / "nowhere", ["imhi"]), "nowhere: no such folder"),
        (
            lambda path: load_upstream(path, ["sos"]),
            r"unknown data set 'sos' \(did you mean 'sos_1k'.\); known: sos_hl_1k",
        ),
        (lambda path: load_upstream(path, ["sos_hl_1k"]), "data set sos_hl_1k not found; .*data/suicide"),
        (lambda path: load_upstream(path, ["socialcd_3k"]), "data set socialcd_3k not found"),
        (lambda path: load_upstream(path, ["imhi"]), "data set imhi not found"),
        (lambda path: load_sos_hl_1k(path), "no SOS-HL-1K file here"),
        (lambda path: load_sos_hl_1k(path / "gone.jsonl"), "gone.jsonl: no SOS-HL-1K file here"),
        (lambda path: load_socialcd_3k(path), "no SocialCD-3K file here"),
        (lambda path: load_imhi(path, ["DR"]), "no file of IMHI set DR; expected DR/train.csv"),
        (lambda path: load_imhi(path, ["Dr"]), "unknown set 'Dr'"),
    ],
)
def test_what_is_missing_is_named(tmp_path, call, message):
    with pytest.raises(InputError, match=message):
        call(tmp_path)
