"""No held-out post is trained on, under whatever name or spelling: synthetic clones of the repositories' layouts."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from mentalglm_jax.data.c_imhi import _prompt_and_post, iter_c_imhi_raw
from mentalglm_jax.data.explain.datasheet import datasheet
from mentalglm_jax.data.held_out import records_split, upstream_split
from mentalglm_jax.data.records import Record, write_records
from mentalglm_jax.data.splits import bare_post, clusters, dev_split, without_held_out
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.report import model_card
from mentalglm_jax.text import tasks

CHARACTERS = "".join(chr(code) for code in range(0x4E00, 0x4F00))
CD = [label.name("zh") for label in tasks.TASKS["cognitive_distortion"].labels]
ASKED = {"risk": "这个帖子的自杀风险是高还是低？", "cd": "这个帖子体现了什么认知歪曲？"}
SAID = {"risk": "该帖子体现了低自杀风险。推理：他还在笑", "cd": "该帖子体现了乱贴标签。推理：他说自己没用"}


def posts(kind, count, length=40):
    """Posts of random characters: none is near another."""
    draw = random.Random(kind)
    return ["".join(draw.choices(CHARACTERS, k=length)) for _ in range(count)]


RISK, DISTORTED = posts("risk", 12), posts("cd", 12)
RISK_TEST, CD_TEST = RISK[8:], DISTORTED[8:]


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def instructions(kind, texts):
    rows = [{"instruction": ASKED[kind], "input": text, "output": SAID[kind]} for text in texts]
    return json.dumps(rows, ensure_ascii=False)


def cd_table(texts, header=True):
    rows = ["\t".join([*("01"[column == 9] for column in range(12)), text]) for text in texts]
    return "\n".join((["\t".join([*CD, "内容"])] if header else []) + rows) + "\n"


def c_imhi_clone(root, *, raw=True, spelling=str):
    """MentalGLM's repository as others' code reads it. ``spelling``: what the instruction files made of the posts."""
    clone = root / "MentalGLM"
    put(clone / "Instruct data" / "Instruct_suiside.json", instructions("risk", map(spelling, RISK)))
    put(clone / "Instruct data" / "Instruct_CD.json", instructions("cd", map(spelling, DISTORTED)))
    put(clone / "Expert_example" / "readme.txt", "expert examples")
    if raw:
        for part, texts in (("train", RISK[:6]), ("val", RISK[6:8]), ("test", RISK_TEST)):
            put(clone / "Raw data" / "Suiside" / f"{part}_set.tsv", "".join(f"0\t{text}\n" for text in texts))
        put(clone / "Raw data" / "CD" / "train.tsv", cd_table(DISTORTED[:8]))
        put(clone / "Raw data" / "CD" / "test.tsv", cd_table(CD_TEST, header=False))
    return clone


def originals(root, parts=("sos", "cd")):
    """The published data sets beside it, with their test parts."""
    if "sos" in parts:
        lines = [f"{number}\t0\t{text}" for number, text in enumerate(RISK_TEST)]
        put(root / "sos_hl_1k" / "suicide_val_LLM.csv", "\n".join(["id\tlabel\tcomment", *lines]) + "\n")
        put(root / "sos_hl_1k" / "suicide_train_LLM.csv", f"id\tlabel\tcomment\n0\t0\t{RISK[0]}\n")
    if "cd" in parts:
        put(root / "socialcd_3k" / "test_data_with_header.tsv", cd_table(CD_TEST))


def trained(split):
    return [record.post for record in split.records if record.split == "train"]


def punctuated(text):
    return f"“{text[:9]}，{text[9:]}！” "


def edited(text):
    return text[:-1] + "了"


def same(text):
    return text


@pytest.mark.parametrize("beside", ["raw", "originals"])
@pytest.mark.parametrize("spelling", [same, punctuated, edited])
def test_no_published_test_post_of_c_imhi_is_trained_on(tmp_path, beside, spelling):
    c_imhi_clone(tmp_path, raw=beside == "raw", spelling=spelling)
    if beside == "originals":
        originals(tmp_path)
    split = upstream_split(tmp_path, ["c_imhi"], 0.0)
    held_out = {spelling(text).strip() for text in (*RISK_TEST, *CD_TEST)}
    raw_validation = {spelling(text).strip() for text in RISK[6:8]} if beside == "raw" else set()
    wanted = {spelling(text).strip() for text in (*RISK, *DISTORTED)} - held_out - raw_validation
    assert set(trained(split)) == wanted
    assert not {record.post for record in split.records} & held_out  # nor are choices made on them
    gone = len(held_out) + len(raw_validation)
    assert split.left_out == ({"near": gone} if spelling is edited else {"exact": gone})
    assert split.unknown == () and str(gone) in split.lines[0]


@pytest.mark.parametrize(
    ("raw", "parts", "missing"),
    [(False, (), "sos_hl_1k and socialcd_3k"), (False, ("sos",), "socialcd_3k"), (False, ("cd",), "sos_hl_1k")],
    ids=["alone", "without-distortions", "without-risk"],
)
def test_c_imhi_without_the_test_parts_is_refused_or_said(tmp_path, raw, parts, missing):
    c_imhi_clone(tmp_path, raw=raw)
    originals(tmp_path, parts)
    with pytest.raises(InputError, match=rf"test posts of {missing}, and .*data.accept_unknown_overlap=true"):
        upstream_split(tmp_path, ["c_imhi"])
    split = upstream_split(tmp_path, ["c_imhi"], accept_unknown_overlap=True)
    assert " and ".join(split.unknown) == missing and missing in split.lines[-1]
    assert split.to_dict()["unknown_overlap"] == list(split.unknown)


def test_the_instruction_folder_alone_finds_the_raw_parts_beside_it(tmp_path):
    clone = c_imhi_clone(tmp_path)
    split = upstream_split(clone / "Instruct data", ["c_imhi"], 0.0)
    assert not set(trained(split)) & {*RISK_TEST, *CD_TEST}


def test_a_train_part_is_no_test_part(tmp_path):
    """The raw folder without its test files, and a data set without its own, leave the overlap unknown."""
    clone = c_imhi_clone(tmp_path)
    (clone / "Raw data" / "Suiside" / "test_set.tsv").unlink()
    originals(tmp_path)
    (tmp_path / "sos_hl_1k" / "suicide_val_LLM.csv").unlink()
    with pytest.raises(InputError, match="test posts of sos_hl_1k, and"):
        upstream_split(tmp_path, ["c_imhi"])


def test_what_data_build_wrote_needs_no_test_part(tmp_path):
    task = tasks.TASKS["suicide_risk"]
    made = Record("x", task.name, "zh", RISK[0], task.question("zh"), label="low", explanation="他还在笑")
    rows = [{"instruction": made.question, "input": made.post, "output": made.answer()}]
    put(tmp_path / "alpaca" / "train.json", json.dumps(rows, ensure_ascii=False))
    assert upstream_split(tmp_path, ["c_imhi"], 0.0).unknown == ()


def test_a_test_post_of_any_data_set_here_is_no_training_data_of_another(tmp_path):
    """SOS-1K shares posts with SOS-HL-1K and splits them otherwise; only SOS-1K is named."""
    originals(tmp_path)
    lines = [f"{text}\t3" for text in (*RISK[:4], punctuated(RISK_TEST[0]))]
    put(tmp_path / "sos_1k" / "train_data4.tsv", "\n".join(["comment\tmyLabel", *lines]) + "\n")
    split = upstream_split(tmp_path, ["sos_1k"], 0.0)
    assert trained(split) == RISK[:4] and split.left_out == {"exact": 1}


@pytest.mark.parametrize("copy", [same, punctuated, edited])
def test_records_of_ones_own_are_held_apart_too(tmp_path, copy):
    question = tasks.TASKS["suicide_risk"].question("zh")
    made = [Record(str(n), "suicide_risk", "zh", text, question, label="low") for n, text in enumerate(RISK)]
    copies = [replace(r, id=f"copy{r.id}", post=copy(r.post).strip()) for r in made[8:]]
    write_records(tmp_path / "train.jsonl", [*made[:8], *copies])
    write_records(tmp_path / "dev.jsonl", made[8:10])
    write_records(tmp_path / "test.jsonl", made[10:])
    split = records_split(tmp_path)
    assert trained(split) == RISK[:8] and split.left_out.total() == 4
    assert Counter(r.split for r in split.records) == {"train": 8, "dev": 2, "test": 2}


def test_the_raw_parts_and_the_pathway_question_are_read(tmp_path):
    raw = list(iter_c_imhi_raw(c_imhi_clone(tmp_path) / "Raw data"))
    assert Counter((r.task, r.split) for r in raw) == {
        ("suicide_risk", "train"): 6, ("suicide_risk", "dev"): 2, ("suicide_risk", "test"): 4,
        ("cognitive_distortion", "train"): 8, ("cognitive_distortion", "test"): 4,
    }  # fmt: skip
    assert {r.gold for r in raw} == {("low",), ("labeling",)} and len({r.id for r in raw}) == len(raw)
    asked = "考虑以下这个帖子：“和他吵架了”，这个帖子体现了什么认知路径（触发性事件、认知歪曲、情绪反应、驳斥）？"
    rows = [
        {
            "instruction": asked,
            "input": "",
            "output": "该帖子体现了触发性事件##社会关系、情绪反应##行为效应。推理：吵架",
        }
    ]
    put(tmp_path / "own" / "Instruct_pathway.json", json.dumps(rows, ensure_ascii=False))
    split = upstream_split(tmp_path / "own", ["c_imhi"], 0.0, accept_unknown_overlap=True)
    (record,) = split.records
    assert (record.task, record.labels, record.post) == ("cognitive_pathway", ("A2", "C2"), "和他吵架了")
    assert split.unknown == ("pathways",)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("Suiside/test_set.tsv", "他笑了\t0\n", r"test_set.tsv:1, column 1: expected 1 \(high\) or 0 \(low\) before"),
        ("Suiside/test_set.tsv", "0\t他笑了\t1\n", r"test_set.tsv:1: 3 columns, expected 2 \(label, text\)"),
        ("CD/test.tsv", "\t".join(["0"] * 12 + ["他笑了"]), r"CD/test.tsv:1: no label, all twelve"),
        ("CD/test.tsv", "\t".join(["0"] * 11 + ["2", "他笑了"]), r"CD/test.tsv:1: column '非此即彼' is missing"),
    ],
    ids=["swapped-columns", "third-column", "no-label", "no-header"],
)
def test_a_damaged_raw_part_is_named_by_row_and_column(tmp_path, file, text, says):
    put(tmp_path / "Raw data" / file, text)
    with pytest.raises(InputError, match=says):
        list(iter_c_imhi_raw(tmp_path / "Raw data"))


# --- clusters ---


def record(number, post, split="train"):
    return Record(str(number), "suicide_risk", "zh", post, "?", label="low", split=split)


def test_near_twins_go_to_one_side_whatever_the_order():
    base = posts("twins", 200)
    records = [
        record(f"{n}{copy.__name__}", copy(post)) for n, post in enumerate(base) for copy in (same, punctuated, edited)
    ]
    sides = {r.id: r.split for r in dev_split(records, 0.5)}
    shuffled = random.Random(0).sample(records, len(records))
    assert {r.id: r.split for r in dev_split(shuffled, 0.5)} == sides
    groups = [{sides[f"{n}{copy.__name__}"] for copy in (same, punctuated, edited)} for n in range(len(base))]
    assert all(len(group) == 1 for group in groups)
    assert 70 <= sum(group == {"dev"} for group in groups) <= 130  # a cluster is no likelier to be held out


def test_short_posts_are_compared_whole():
    """One digit of a few: not the same post."""
    numbers = clusters([record(n, f"day {n}: tired") for n in range(100, 160)])
    assert len(set(numbers)) == 60
    assert len(set(clusters([record(0, "Day 7: tired."), record(1, "day 7 – tired!")]))) == 1


def test_a_chain_of_near_posts_is_held_out_whole():
    """The second is near the test post, the third only near the second."""
    first = posts("chain", 1, 60)[0]
    second, third = first[:-2] + "一二", first[2:-2] + "一二三四"
    far = bare_post(posts("other", 1)[0])
    stay, gone = without_held_out([record(2, second), record(3, third), record(4, far)], [record(1, first, "test")])
    assert [r.id for r in stay] == ["4"] and gone == {"near": 2}


# --- what is stated ---


def test_an_unknown_overlap_is_stated_in_cards_and_datasheet(tmp_path):
    c_imhi_clone(tmp_path, raw=False)
    split = upstream_split(tmp_path, ["c_imhi"], accept_unknown_overlap=True)
    (line,) = split.lines
    assert f"* {line}" in model_card({}, title="x", notes=split.lines)
    recipe = {"teacher": {"model": "m", "local": True, "temperature": 0, "max_tokens": 1}, "attempts": 1, "seed": 0,
              "examples_per_class": 1, "data": {"sets": ["x"], "scrub": True}, "checks": {"require": []}}  # fmt: skip
    counts = {"accepted": 1, "asked": 1, "filtered": 0, "too_long": 0}
    manifest = {"recipe": recipe, "records": counts, "files": {}, "counts": {},
                "inputs": {"posts": 1, "posts_sha256": "0", "experts": 1, "notes": split.lines}, "prompts": {},
                "attempts": {}, "checks": {}, "consistency": {}}  # fmt: skip
    assert f"* {line}" in datasheet(manifest)


def sos_1k(root, texts):
    put(
        root / "sos_1k" / "train_data1.tsv",
        "comment\tmyLabel\n" + "".join(f"{text}\t{n % 10}\n" for n, text in enumerate(texts)),
    )


def test_a_lone_test_file_is_a_test_part_too(tmp_path):
    """Without a training file beside it SOS-HL-1K was not seen at all, and its test posts were trained on."""
    sos_1k(tmp_path, RISK[6:])
    rows = "".join(f"{n}\t0\t{text}\n" for n, text in enumerate(RISK_TEST))
    put(tmp_path / "sos_hl_1k" / "suicide_val_LLM.csv", "id\tlabel\tcomment\n" + rows)
    found = upstream_split(tmp_path, ["sos_1k"])
    assert found.left_out["exact"] == len(RISK_TEST) and {r.post for r in found.records} == set(RISK[6:8])


def test_a_post_is_on_one_side_whichever_data_sets_are_named(tmp_path):
    """What a run over two data sets trains on, an evaluation on one of them must not score."""
    many = posts("many", 60)
    sos_1k(tmp_path, [text + "。" for text in many])
    rows = "".join(f"{n}\t0\t{text}\n" for n, text in enumerate(many))
    put(tmp_path / "sos_hl_1k" / "suicide_train_LLM.csv", "id\tlabel\tcomment\n" + rows)
    sides = [
        {r.id: r.split for r in upstream_split(tmp_path, names).records if r.source == "sos_hl_1k"}
        for names in (["sos_hl_1k"], ["sos_hl_1k", "sos_1k"])
    ]
    assert sides[0] == sides[1] and set(sides[0].values()) == {"train", "dev"}


def test_a_question_without_a_quoted_post_has_none():
    assert _prompt_and_post("自杀风险是高还是低？", "") == ("自杀风险是高还是低？", "")
    assert _prompt_and_post("风险？“他说：“累”。”", "") == ("风险？", "他说：“累”。")
