"""Readers of upstream files, on tiny invented ones in their formats."""

from dataclasses import replace

import pytest

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
from mentalglm_jax.errors import InputError
from mentalglm_jax.text import tasks
from tests.mentalglm_jax.upstream import (
    CD,
    LEVELS,
    SOS,
    STRESS,
    alpaca,
    cd_table,
    imhi_row,
    imhi_table,
    put,
    sos_chat,
    sos_onehot,
    sos_table,
    table,
)

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
        ("自杀风险", "自杀风险：高", ("high",)),
        ("自杀风险", "自杀风险等级：低。推理：x", ("low",)),
        ("自杀风险", "答案：高。", ("high",)),
        ("自杀风险", "低", ("low",)),
        ("自杀风险", "该用户的自杀风险较高。因为x", ("high",)),
        ("自杀风险", "经历了高考，心情低落。该帖子体现了低自杀风险。推理：x", ("low",)),
        ("自杀风险", "难以判断高自杀风险。推理：x", "难以"),
        ("自杀风险", "难以判断该帖子是否体现了高自杀风险", "难以"),
        ("自杀风险", "高自杀风险，难以判断。", "难以"),
        ("自杀风险", "高自杀风险？", "？"),
        ("自杀风险", "自杀风险不低", "不"),
        ("自杀风险", "自杀风险谈不上高", "不"),
        ("自杀风险", "请判断高自杀风险", "请"),
        ("自杀风险", "中高风险", "中"),
        ("自杀风险", "假设自杀风险：高", "假设"),
        ("自杀风险", "可能是高自杀风险", "可能"),
        ("自杀风险", "该帖子体现了高自杀风险。其实并非高自杀风险。", "非"),
        ("认知歪曲", "很难说是乱贴标签", "难说"),
        ("认知歪曲", "该帖子体现了乱贴标签。他把小事放大了，所以这样说", ("labeling",)),
        ("认知歪曲", "认知歪曲类型：非此即彼、以偏概全", ("all_or_nothing", "over_generalization")),
        ("认知歪曲", "“没有乱贴标签”", None),
        ("自杀风险", "“没有高自杀风险”", None),
    ],
)  # fmt: skip
def test_c_imhi_reads_no_label_that_is_denied(tmp_path, task, said, gold):
    path = put(tmp_path / "Instruct_a.json", alpaca((f"有什么{task}？", "面条", said)))
    if isinstance(gold, tuple):
        (record,) = iter_c_imhi(path)
        assert record.gold == gold
    else:
        says = f"'{gold}' stands beside a label and may deny it" if gold else "no label of task"
        with pytest.raises(InputError, match=f":2, column 'output': {says}"):
            list(iter_c_imhi(path))
