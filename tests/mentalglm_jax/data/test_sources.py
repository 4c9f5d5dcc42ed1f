"""Readers of upstream files: on tiny invented ones in their formats, and on the real ones where they are at hand."""

import csv
import io
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from mentalglm_jax.data import tables
from mentalglm_jax.data.c_imhi import iter_c_imhi
from mentalglm_jax.data.imhi import load_imhi_experts
from mentalglm_jax.data.records import Record
from mentalglm_jax.data.sources import (
    IMHI_TASKS,
    load_imhi,
    load_socialcd_3k,
    load_sos_hl_1k,
    load_upstream,
    present,
)
from mentalglm_jax.data.splits import dev_split, normalize_post
from mentalglm_jax.errors import InputError
from mentalglm_jax.text import tasks

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"
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


def test_sos_folder_takes_the_best_format_of_each_part(tmp_path):
    put(tmp_path / "suicide_train_LLM.csv", sos_table())
    put(tmp_path / "suicide_train.jsonl", sos_chat(SOS[:1]))
    put(tmp_path / "suicide_val_BERT.tsv", sos_onehot(SOS[:2]))
    put(tmp_path / "suicide_val.jsonl", sos_chat(SOS[:1]))
    assert [record.split for record in load_sos_hl_1k(tmp_path)] == ["train"] * 3 + ["test"] * 2


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


@pytest.mark.parametrize(
    ("name", "stem", "said", "question", "label"),
    [
        ("SAD", "This post shows the stress cause of ", "emotional turmoil. ", 0, "emotion"),
        ("SAD", "This post shows the stress cause of ", "other causes. ", 0, "other"),
        ("SAD", "This post shows the stress cause of ", " work. ", 0, "work"),
        ("CAMS", "This post shows the mental disorder cause of ", "none. ", 0, "none"),
        ("CAMS", "This post shows the mental disorder cause of ", "jobs and career. ", 0, "career"),
        ("t-sid", "This post shows the mental disorder symptoms of ", "ptsd. ", 0, "ptsd"),
        ("t-sid", "This post shows the mental disorder symptoms of ", " no mental disorders. ", 0, "none"),
        ("swmh", "This post shows the mental disorder symptoms of ", "bipolar disorder. ", 0, "bipolar"),
        ("DR", 'The answer to the question "Does the poster suffers from depression?" is ', "yes. ", 0, "yes"),
        ("CLP", 'The answer to the question "Does the poster suffers from depression?" is ', " no. \n", 0, "no"),
        ("dreaddit", 'The answer to the question "Does the poster suffers from stress?" is ', " no. ", 0, "no"),
        ("loneliness", 'The answer to the question "Does the poster suffers from loneliness?" is ', "Yes. ", 0, "yes"),
        ("Irf", 'The answer to the question: "Does the post shows risk of perceived burdensomeness?" is ',
         " yes, the post shows risk of thwarted belongingness. \n\n", 1, "yes"),
        ("MultiWD", 'The answer to the question "Does the physical wellness dimension exists in the post?" is ',
         "no. ", 1, "no"),
    ],
)  # fmt: skip
def test_the_completion_form_says_what_the_instruction_form_says(tmp_path, name, stem, said, question, label):
    task = tasks.TASKS[IMHI_TASKS[name]]
    post = 'It says "a Question: b", Post: so'
    answer = f"{said}Reasoning: because Reasoning: twice"
    train = {"DR": "reddit_train", "dreaddit": "dreaddit-train"}.get(name, "train")
    header = ["", "post", "question", "response"]
    rows = [header, ["0", f"Post: {post}", f" Question: {stem}", answer]]
    put(tmp_path / "train_data" / "complete_data" / name / f"{train}.csv", table(rows, ","))
    rows = [["query", "gpt-3.5-turbo"], [f"Post: {post} Question: {stem}", answer]]
    put(tmp_path / "test_data" / "test_complete" / f"{name}.csv", table(rows, ","))
    for record, split in zip(load_upstream(tmp_path, [task.name]), ("train", "test"), strict=True):
        assert (record.post, record.label, record.split) == (post, label, split)
        assert record.question == task.all_questions("en")[question]
        assert record.explanation == "because Reasoning: twice"


def test_of_both_forms_the_instruction_form_is_read(tmp_path):
    put(tmp_path / "instruction_data" / "dreaddit" / "val.csv", imhi_table(imhi_row("from the instructions")))
    stem = ' Question: The answer to the question "Does the poster suffers from stress?" is '
    for part in ("dreaddit-train", "val"):
        rows = [["post", "question", "response"], ["Post: from the completions", stem, "yes. Reasoning: x"]]
        put(tmp_path / "complete_data" / "dreaddit" / f"{part}.csv", table(rows, ","))
    read = [(record.post, record.split) for record in load_imhi(tmp_path, ["dreaddit"])]
    assert read == [("from the completions", "train"), ("from the instructions", "dev")]
    assert [r.split for r in load_imhi(tmp_path / "complete_data", ["dreaddit"])] == ["train", "dev"]


def test_expert_explanations_are_read_apart(tmp_path):
    put(tmp_path / "expert" / "dreaddit.csv", imhi_table(imhi_row("an expert's")))
    (record,) = load_imhi_experts(tmp_path)
    assert (record.source, record.explanation) == ("imhi_dreaddit-expert", "the bus was late")
    with pytest.raises(InputError, match="no expert file here"):
        load_imhi_experts(tmp_path / "gone")


@pytest.mark.parametrize("folder", ["expert", "human_evaluation/test_instruction_expert", "human_evaluation"])
def test_expert_explanations_are_no_test_set(tmp_path, monkeypatch, folder):
    clone = tmp_path / "clone"
    put(clone / folder / "dreaddit.csv", imhi_table(imhi_row("an expert's")))
    put(clone / folder / "CAMS.csv", imhi_table(imhi_row("an expert's")))
    put(clone / "instruction_data" / "dreaddit" / "train.csv", imhi_table(imhi_row("a post")))
    for root in (clone, tmp_path):
        assert present(root) == ["imhi_dreaddit"]
        assert [record.split for record in load_upstream(root, ["imhi_dreaddit"])] == ["train"]
    monkeypatch.chdir(clone / folder)
    for root in (clone / folder, clone / folder / "..", "."):
        with pytest.raises(InputError, match="data set imhi_cams not found"):
            load_upstream(root, ["imhi_cams"])


LEVELS = [["comment", "myLabel"], ["今天我把东西都交代好了", "10"], ["面条不错", "0"]]


def test_sos_1k_reads_eleven_levels_of_one_fold(tmp_path):
    folder = tmp_path / "FineGrained" / "ModelTrain" / "data"
    put(folder / "train_data4.tsv", table(LEVELS, "\t"))
    put(folder / "val_data4.tsv", table([LEVELS[0], LEVELS[2]], "\t"))
    put(folder / "train_data5.tsv", table(LEVELS, "\t"))
    put(folder / "test_data.tsv", b"\xef\xbb\xbf" + table([LEVELS[0], ["天气", "5"]], "\t"))
    records = load_upstream(tmp_path, ["sos_1k"])
    assert [(r.label, r.split) for r in records] == [("10", "train"), ("0", "train"), ("0", "dev"), ("5", "test")]
    assert records[0].answer() == "这个帖子体现的自杀风险等级是10级。"
    assert present(tmp_path) == ["sos_1k"]


def test_pathways_read_parent_and_child(tmp_path):
    labels = "触发性事件,触发性事件##社会关系,认知歪曲##罪责归己/他,认知歪曲"
    chinese = f"我和他吵架了，都怪我\t{labels}\n\n我睡不着\t情绪反应##行为效应\n"
    put(tmp_path / "pathways" / "train.txt", b"\xef\xbb\xbf" + chinese.encode())
    put(tmp_path / "pathways" / "test.txt", b"We argued\tActivating_Event##Social_relation\n")
    records = load_upstream(tmp_path, ["pathways"])
    assert [(r.labels, r.language, r.split) for r in records] == [
        (("A2", "B10"), "zh", "train"), (("C2",), "zh", "train"), (("A2",), "en", "test")
    ]  # fmt: skip
    put(tmp_path / "other" / "train.txt", b"no labels in this one")
    assert present(tmp_path) == ["pathways"]
    with pytest.raises(InputError, match="data set pathways not found"):
        load_upstream(tmp_path / "other", ["pathways"])


def alpaca(*rows):
    keys = ("instruction", "input", "output")
    return json.dumps([dict(zip(keys, row, strict=True)) for row in rows], ensure_ascii=False, indent=1).encode()


def test_c_imhi_reads_what_we_write_and_what_is_known_of_the_authors_files(tmp_path):
    question = "这个帖子体现了什么认知歪曲？"
    ours = Record(
        "x", "cognitive_distortion", "zh", "都怪我", question, labels=("blaming_oneself",), explanation="说“怪我”"
    )
    question = tasks.TASKS["cognitive_pathway"].question("zh")
    pathway = Record("y", "cognitive_pathway", "zh", "吵架了", question, labels=("A2",))
    rows = [(r.question, r.post, r.answer()) for r in (ours, pathway)]
    put(tmp_path / "alpaca" / "test.json", b"\xef\xbb\xbf" + alpaca(*rows))
    again = load_upstream(tmp_path, ["c_imhi"])
    assert [replace(r, id="-", source="", split="train") for r in again] == [
        replace(r, id="-") for r in (ours, pathway)
    ]
    assert {r.split for r in again} == {"test"} and len({r.id for r in again}) == 2

    folder = tmp_path / "MentalGLM" / "Instruct data"
    distortion = "考虑以下这个帖子：“他说“我懂了”，都怪我”，这个帖子体现了什么认知歪曲？"
    put(folder / "Instruct_CD.json", alpaca((distortion, "", "该帖子体现了乱贴标签和应该句式。推理：他认为放大")))
    risk = ("这个帖子的自杀风险是高还是低？", "我吃了面", "低自杀风险。因为没有高自杀风险的表现")
    put(folder / "Instruct_suiside.json", alpaca(risk))
    first, second = load_upstream(tmp_path / "MentalGLM", ["c_imhi"])
    assert (first.labels, first.post) == (("should_statements", "labeling"), "他说“我懂了”，都怪我")
    assert (first.explanation, first.split) == ("他认为放大", "train")
    assert (second.label, second.post) == ("low", "我吃了面")


CD_ASKED, CD_SAID = "这个帖子体现了什么认知歪曲？", "该帖子体现了乱贴标签。推理：他说“没用”"


@pytest.mark.parametrize(
    ("asked", "given", "post"),
    [
        (CD_ASKED, "他说“你真没用”，我就是没用", "他说“你真没用”，我就是没用"),
        ("请回答：" + CD_ASKED, "我搜了“自杀风险”，都是“自杀风险”", "我搜了“自杀风险”，都是“自杀风险”"),
        ("指出其中的“认知歪曲”。", '她说"好"，就走了', '她说"好"，就走了'),
        ("请回答：" + CD_ASKED, "考虑以下这个帖子：“他说“好”，走了”", "他说“好”，走了"),
        ("你是心理学家。", f'考虑以下这个帖子："他说“好”" 问题：{CD_ASKED}', "他说“好”"),
        ("你是心理学家。", f"帖子：“他说“好”，走了”。{CD_ASKED}", "他说“好”，走了"),
        (f"考虑以下这个帖子：“他说“好”，走了” 问题：{CD_ASKED}", " ", "他说“好”，走了"),
    ],
)
def test_c_imhi_takes_the_post_whole_where_it_stands_alone(tmp_path, asked, given, post):
    (record,) = iter_c_imhi(put(tmp_path / "Instruct_CD.json", alpaca((asked, given, CD_SAID))))
    assert (record.post, record.labels) == (post, ("labeling",))


@pytest.mark.parametrize(
    ("task", "said", "gold"),
    [
        ("自杀风险", "没有体现高自杀风险。推理：x", "没"),
        ("自杀风险", "不属于高风险", "不"),
        ("自杀风险", "并非低自杀风险。因为x", "非"),
        ("认知歪曲", "乱贴标签，而不是以偏概全。推理：x", "不"),
        ("认知歪曲", "体现了乱贴标签，未体现“读心术”。推理：x", "未"),
        ("自杀风险", "不，这个帖子非常明显体现了高自杀风险，没有别的。推理：x", ("high",)),
        ("自杀风险", "毫无疑问是低自杀风险。因为没有高自杀风险的表现", ("low",)),
        ("认知歪曲", "他说“我不好”，不仅有非此即彼和否定正面思考，还有“乱贴标签”。推理：x",
         ("all_or_nothing", "disqualifying_positive", "labeling")),
        ("认知歪曲", "“我不行”体现了乱贴标签。推理：没有以偏概全", ("labeling",)),
    ],
)  # fmt: skip
def test_c_imhi_reads_no_label_that_is_denied(tmp_path, task, said, gold):
    path = put(tmp_path / "Instruct_a.json", alpaca((f"有什么{task}？", "面条", said)))
    if isinstance(gold, tuple):
        (record,) = iter_c_imhi(path)
        assert record.gold == gold
    else:
        with pytest.raises(InputError, match=f":2, column 'output': '{gold}' stands beside a label and may deny it"):
            list(iter_c_imhi(path))


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


GOOD = ("这个帖子体现了什么认知歪曲？", "都怪我", "这个帖子体现的认知歪曲有：罪责归己。")


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
