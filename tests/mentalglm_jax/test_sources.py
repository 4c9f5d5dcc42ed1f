"""Readers of upstream files: on tiny invented ones in their formats, and on the real ones where they are at hand."""

import csv
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from mentalglm_jax import tasks
from mentalglm_jax.data.records import Record
from mentalglm_jax.data.sources import (
    IMHI_TASKS,
    dev_split,
    load_imhi,
    load_socialcd_3k,
    load_sos_hl_1k,
    load_upstream,
    normalize_post,
)
from mentalglm_jax.errors import InputError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
SOS = [("high", "今天我把东西都交代好了"), ("low", "面条不错，我还想再吃"), ("low", '他说"好"，我就去了')]
CD_HEADER = [label.zh for label in tasks.TASKS["cognitive_distortion"].labels]


def table(rows, delimiter, encoding="utf-8"):
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue().encode(encoding)


def sos_onehot(rows=SOS, encoding="gb18030"):
    return table([["1", "0", post] if label == "high" else ["0", "1", post] for label, post in rows], "\t", encoding)


def sos_table(rows=SOS):
    body = [[str(i), str(int(label == "high")), post] for i, (label, post) in enumerate(rows)]
    return table([["id", "label", "comment"], *body], "\t")


def sos_chat(rows=SOS):
    lines = []
    for label, post in rows:
        said = "高自杀风险" if label == "high" else "低自杀风险"
        turns = [("system", "你是心理学家"), ("user", post), ("assistant", said)]
        lines.append(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}, ensure_ascii=False))
    return "\n".join(lines).encode()


def cd_rows(*posts_and_columns):
    return [[str(int(column in columns)) for column in range(12)] + [post] for post, columns in posts_and_columns]


def cd_table(rows):
    return table([[*CD_HEADER, "内容"], *rows], "\t")


CD = cd_rows(("我就是个笨蛋", {9}), ("都怪我，明天一定会砸", {5, 10}))
STRESS = "Does the poster suffer from stress?"


def imhi_row(post, question=STRESS, answer="Yes, the poster suffers from stress. Reasoning: the bus was late"):
    return [f'Consider this post: "{post}" Question: {question}', answer]


def imhi_table(*rows):
    return table([["query", "gpt-3.5-turbo"], *rows], ",")


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# --- formats ---


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("suicide_train_BERT.tsv", sos_onehot()),
        ("suicide_train_BERT.tsv", sos_onehot(encoding="utf-8")),
        ("suicide_train_LLM.csv", sos_table()),
        ("suicide_train_LLM.csv", b"\xef\xbb\xbf" + sos_table()),
        ("suicide_train.jsonl", sos_chat()),
        ("suicide_train.jsonl", b"\xef\xbb\xbf" + sos_chat() + b"\n\n"),
    ],
    ids=["gb18030", "onehot-utf8", "table", "table-bom", "chat", "chat-bom"],
)
def test_sos_reads_its_three_formats_alike(tmp_path, name, data):
    records = load_sos_hl_1k(put(tmp_path / name, data))
    assert [(record.label, record.post) for record in records] == SOS
    first = records[0]
    assert (first.task, first.language, first.split, first.source, first.explanation) == (
        "suicide_risk",
        "zh",
        "train",
        "sos_hl_1k",
        None,
    )
    assert first.question == tasks.TASKS["suicide_risk"].question("zh")


def test_sos_folder_takes_one_format_and_val_is_the_test_part(tmp_path):
    put(tmp_path / "suicide_train_BERT.tsv", sos_onehot(SOS[:1]))
    put(tmp_path / "suicide_train_LLM.csv", sos_table())
    put(tmp_path / "suicide_val_LLM.csv", sos_table(SOS[1:2]))
    assert [record.split for record in load_sos_hl_1k(tmp_path)] == ["train"] * 3 + ["test"]


def test_socialcd_reads_several_labels_and_both_parts(tmp_path):
    put(tmp_path / "train_data_with_header.tsv", b"\xef\xbb\xbf" + cd_table(CD))
    renamed = cd_table(CD[:1]).replace("应该式".encode(), "应该句式".encode())
    put(tmp_path / "test_data_with_header.tsv", renamed)
    records = load_socialcd_3k(tmp_path)
    assert [(record.labels, record.split) for record in records] == [
        (("labeling",), "train"),
        (("fortune_telling", "blaming_oneself"), "train"),
        (("labeling",), "test"),
    ]
    assert len({record.id for record in records}) == 3
    assert load_socialcd_3k(tmp_path / "test_data_with_header.tsv")[0].split == "test"


def test_imhi_takes_post_question_label_and_explanation_apart(tmp_path):
    tricky = 'She asked "why?" Question: no, "really" Question: me?\nI left, Reasoning: none.'
    answer = "No, the poster does not suffer from stress. Reasoning: they are calm. Reasoning: twice."
    put(tmp_path / "dreaddit" / "train.csv", imhi_table(imhi_row(tricky, answer=answer), imhi_row("the bus")))
    put(tmp_path / "dreaddit" / "val.csv", imhi_table(imhi_row("a dev post")))
    first, second, third = load_imhi(tmp_path, ["dreaddit"])
    assert (first.post, first.label, first.explanation) == (tricky, "no", "they are calm. Reasoning: twice.")
    assert (first.question, first.task, first.language, first.split) == (STRESS, "imhi_dreaddit", "en", "train")
    assert (second.label, third.split, third.post) == ("yes", "dev", "a dev post")
    assert first.prompt == imhi_row(tricky)[0]  # what upstream asks is what we ask


@pytest.mark.parametrize("name", list(IMHI_TASKS))
def test_every_imhi_label_sentence_is_read_back(tmp_path, name):
    task = tasks.TASKS[IMHI_TASKS[name]]
    rows = [
        imhi_row(f"post {key} {number}", question, f"{sentence} Reasoning: x")
        for key, sentence in task.candidates("en").items()
        for number, question in enumerate(task.all_questions("en"))
    ]
    put(tmp_path / "test_data" / "test_instruction" / f"{name}.csv", imhi_table(*rows))
    records = load_imhi(tmp_path, [name])
    assert [record.label for record in records] == [record.post.split()[1] for record in records]
    assert {record.question for record in records} == set(task.all_questions("en"))
    assert {record.split for record in records} == {"test"}


def test_upstream_is_found_in_clones_and_in_plain_folders(tmp_path):
    clones = tmp_path / "clones"
    put(clones / "SupervisedVsLLM" / "data" / "suicide" / "suicide_train_BERT.tsv", sos_onehot())
    put(clones / "SupervisedVsLLM" / "data" / "SocialCD-3k" / "train_data_with_header.tsv", cd_table(CD))
    train = clones / "MentalLLaMA" / "train_data" / "instruction_data" / "dreaddit" / "train.csv"
    put(train, imhi_table(imhi_row("one")))
    put(clones / "MentalLLaMA" / "test_data" / "test_instruction" / "dreaddit.csv", imhi_table(imhi_row("two")))
    names = ["sos_hl_1k", "socialcd_3k", "imhi_dreaddit"]
    records = load_upstream(clones, names)
    sources = [("sos_hl_1k", "train")] * 3 + [("socialcd_3k", "train")] * 2
    assert [(r.source, r.split) for r in records] == [*sources, ("imhi_dreaddit", "train"), ("imhi_dreaddit", "test")]
    assert len({record.id for record in records}) == len(records)
    assert load_upstream(clones / "SupervisedVsLLM", names[:2]) == records[:5]

    plain = tmp_path / "plain"
    put(plain / "sos_hl_1k" / "suicide_train.jsonl", sos_chat())
    put(plain / "socialcd_3k" / "train_data_with_header.tsv", cd_table(CD))
    put(plain / "imhi" / "instruction_data" / "dreaddit" / "train.csv", imhi_table(imhi_row("one")))
    assert load_upstream(plain, names) == records[:6]


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


def test_a_post_in_the_label_column_is_not_printed(tmp_path):
    secret = "something long and private that nobody should see"
    with pytest.raises(InputError, match=f"found text of {len(secret)} characters") as caught:
        load_sos_hl_1k(put(tmp_path / "a.csv", f"id\tlabel\tcomment\n0\t{secret}\t1\n".encode()))
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: load_upstream(path / "nowhere", ["imhi"]), "nowhere: no such folder"),
        (lambda path: load_upstream(path, ["sos"]), "unknown data set 'sos'; known: sos_hl_1k"),
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


# --- split ---


def posts(count, split="train"):
    return [
        Record(
            id=f"{split}{number}",
            task="imhi_dreaddit",
            language="en",
            post=f"post number {number}",
            question=STRESS,
            label="yes",
            split=split,
        )
        for number in range(count)
    ]


def test_dev_split_is_fixed_and_follows_the_post():
    records = posts(500)
    sides = [record.split for record in dev_split(records)]
    assert 70 <= Counter(sides)["dev"] <= 130
    assert [record.split for record in dev_split(records[::-1])] == sides[::-1]
    spaced = [replace(record, post=f"  POST　number {number}\n") for number, record in enumerate(records)]
    assert [record.split for record in dev_split(spaced)] == sides
    # Pinned: a change of the rule would move posts between train and dev of runs already published.
    assert [i for i, side in enumerate(sides[:30]) if side == "dev"] == [0, 5, 7, 13, 19, 23, 25]
    bigger = [record.split for record in dev_split(records, 0.4)]
    assert all(new == "dev" for old, new in zip(sides, bigger, strict=True) if old == "dev")


def test_dev_split_never_trains_on_a_published_dev_or_test_post():
    records = [
        *posts(50),
        *(replace(r, id="t" + r.id, split="test") for r in posts(3)),
        *(replace(r, id="d" + r.id, split="dev", post="only in dev") for r in posts(2)),
    ]
    split = dev_split(records, 0.0)
    assert [r.split for r in split] == ["dev"] * 3 + ["train"] * 47 + ["test"] * 3 + ["dev"] * 2
    with pytest.raises(InputError, match=r"fraction: 1.0"):
        dev_split(records, 1.0)


def test_normalize_post():
    assert normalize_post(" Ａ  b\n\tＣ ") == "a b c"


# --- the published files ---


@pytest.fixture(scope="module")
def real():
    if not REAL.is_dir():
        pytest.skip("the upstream data sets are not on this machine")
    return load_upstream(REAL, ["sos_hl_1k", "socialcd_3k", "imhi"])


def test_published_files_have_the_published_counts(real):
    """Training parts without the rows that named people (999 -> 993, 2725 -> 2720, 1003 -> 968, 2837 -> 2835)."""
    counts = Counter((record.source, record.split) for record in real)
    assert counts == {
        ("sos_hl_1k", "train"): 993,
        ("socialcd_3k", "train"): 2720,
        ("imhi_dr", "train"): 968,
        ("imhi_dr", "dev"): 423,
        ("imhi_dreaddit", "train"): 2835,
        ("imhi_dreaddit", "dev"): 300,
        ("imhi_sad", "train"): 5547,
        ("imhi_sad", "dev"): 616,
    }
    labels = Counter(record.label for record in real if record.source == "sos_hl_1k")
    assert labels == {"high": 474, "low": 519}
    assert all(record.explanation for record in real if record.language == "en")
    assert len({record.id for record in real}) == len(real)


def test_published_sos_formats_agree(real):
    by_format = [
        {normalize_post(r.post): r.label for r in load_sos_hl_1k(REAL / "sos_hl_1k" / f"suicide_train{ending}")}
        for ending in ("_LLM.csv", "_BERT.tsv", ".jsonl")
    ]
    assert by_format[0] == by_format[2]
    assert len(set(by_format[0].items()) ^ set(by_format[1].items())) <= 2  # GB18030 lost a zero-width space


def test_no_published_post_is_on_both_sides_of_the_split(real):
    split = dev_split(real)
    train = {normalize_post(record.post) for record in split if record.split == "train"}
    assert not train & {normalize_post(record.post) for record in split if record.split == "dev"}
    moved = Counter(r.split for r, s in zip(real, split, strict=True) if r.split == "train" and s.split == "dev")
    assert 0.17 < moved["train"] / sum(record.split == "train" for record in real) < 0.23
