"""IRF and CNSocialDepress in synthetic twins of their layouts: words that people marked, found in the post or not."""

import csv
import json

import pytest

from mentalglm_jax.data.contacts import scrub_record
from mentalglm_jax.data.inspection import inspect_records
from mentalglm_jax.data.rationales import find_rationale, iter_cnsd, iter_irf
from mentalglm_jax.data.records import Record, read_records, write_records
from mentalglm_jax.data.sources import load_upstream, present
from mentalglm_jax.data.surrogates import replacing_surrogates
from mentalglm_jax.errors import InputError

HEADER = ["", "text", "belong", "belong_exp", "burden", "burden_exp"]
POST = " I sit alone at lunch, and nobody asks. They’d be better off without me "
ROWS = [
    ["7", POST, "1", "alone at lunch", "1", "They'd be better off"],
    ["8", "we went swimming", "0", "", "0", ""],
    ["9", "nobody came", "1", "no one came", "0", ""],
]


def irf(folder, rows=ROWS, name="train", header=HEADER):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def spoken(record):
    return None if record.rationales is None else [record.post[slice(*span)] for span in record.rationales]


def test_irf_gives_two_records_a_post_with_the_words_people_marked(tmp_path):
    clone = tmp_path / "irf-acl" / "data"
    irf(clone)
    irf(clone, ROWS[1:2], "val")
    irf(clone, ROWS[2:], "test")
    assert present(tmp_path) == ["irf"]
    with pytest.warns(UserWarning, match="of 4 rationales 1 stand .* as they are, 1 by .* 2 not"):
        records = load_upstream(tmp_path, ["irf"])
    assert [r.split for r in records] == ["train"] * 6 + ["dev"] * 2 + ["test"] * 2
    assert [r.label for r in records[:6]] == ["yes", "yes", "no", "no", "yes", "no"]
    assert [r.question.split()[-2] for r in records[:2]] == ["thwarted", "perceived"]
    assert [spoken(r) for r in records[:6]] == [["alone at lunch"], ["They’d be better off"], None, None, [], None]
    counted = inspect_records(records, near=False)["tasks"]["imhi_irf"]["irf"]["train"]["rationales"]
    assert counted == {"records": 3, "spans": 2, "not_found": 1}


USERS = {
    "p_user_1": {
        "inpput": "\ntext_1: 最近总是睡不好。\ntext_2: 情绪一直很低落，不太想说话。\ntext_10: 睡不好！觉得自己没用",
        "output": "答案：“是”。总结和分析: 负面情绪（次要判断标准）：低落。text_2[情绪一直，很低落]，text_1[疲惫]。"
        "临床症状：text_10[睡不好、吃不下]，text_3[哭]。综合判断：有风险。",
    },
    "n_user_1": {"input": "text_1: 今天吃了面", "output": "答案：“否”。总结和分析：没有。综合判断：没有风险。"},
}


def cnsd(folder, users=USERS):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "CNSD_dataset.json").write_text(json.dumps(users, ensure_ascii=False), encoding="utf-8")


def test_cnsocialdepress_gives_a_record_a_user_with_the_evidence_in_its_own_post(tmp_path):
    cnsd(tmp_path / "cnsocialdepress")
    with pytest.warns(UserWarning, match="of 5 rationales 1 stand .* as they are, 1 by .* 3 not"):
        first, second = load_upstream(tmp_path, ["cnsocialdepress"])
    assert (first.task, first.language, first.label, second.label) == ("depression_risk", "zh", "yes", "no")
    assert spoken(first) == ["情绪一直很低落", "睡不好"] and spoken(second) == []
    assert first.rationales[1][0] > first.post.index("text_10")  # not the same words of text_1
    assert first.explanation.startswith("负面情绪") and second.explanation == "没有。综合判断：没有风险。"
    assert first.answer().startswith("是，这些帖子体现了抑郁风险。 推理：负面情绪")


@pytest.mark.parametrize(
    ("post", "phrase", "found"),
    [
        ("so tired", "tired", ("tired", "exact")),
        ("So  TIRED, again", "so tired again", ("So  TIRED, again", "normalised")),
        ("ＡＢＣ 太累了", "abc太累", ("ＡＢＣ 太累", "normalised")),
        ("½ of me", "1 2 of", ("½ of", "normalised")),
        ("so tired", "so bored", (None, "not_found")),
        ("so tired", "…", (None, "not_found")),
        ("so tired", "", (None, "not_found")),
    ],
)
def test_a_phrase_is_found_as_written_or_by_its_letters(post, phrase, found):
    span, how = find_rationale(post, phrase)
    assert (None if span is None else post[slice(*span)], how) == found


def test_rationales_travel_with_the_record(tmp_path):
    made = Record("a", "imhi_irf", "en", "call 555-123-4567, I am alone", "Q?", label="yes", rationales=((19, 29),))
    for name in ("a.jsonl", "a.parquet"):
        write_records(tmp_path / name, [made])
        assert read_records(tmp_path / name) == [made]
    assert spoken(scrub_record(made)) == ["I am alone"]
    assert "rationales" not in Record("a", "imhi_irf", "en", "x", "Q?", label="yes").to_dict()
    with pytest.raises(InputError, match=r"rationales: \[0, 99\] is not inside the post"):
        Record("a", "imhi_irf", "en", "x", "Q?", label="yes", rationales=((0, 99),))


@pytest.mark.parametrize(
    ("write", "read", "says"),
    [
        (
            lambda p: irf(p, [["7", "x", "2", "", "0", ""]]),
            iter_irf,
            r"train.csv:2, column 'belong': expected 0 or 1",
        ),
        (lambda p: irf(p, [["7", " ", "1", "", "0", ""]]), iter_irf, r"train.csv:2: the post is empty"),
        (lambda p: irf(p, header=[*HEADER[:5], "x"]), iter_irf, r"column 'burden_exp' is missing"),
        (lambda p: irf(p, name="other"), iter_irf, "no IRF file here"),
        (lambda p: cnsd(p, {"u": {"inpput": "text_1: x"}}), iter_cnsd, r"user 'u': field 'output' is missing"),
        (lambda p: cnsd(p, {"u": {"output": "x"}}), iter_cnsd, r"user 'u': field 'inpput' is missing"),
        (
            lambda p: cnsd(p, {"u": {"inpput": "x", "output": "也许"}}),
            iter_cnsd,
            r"field 'output': expected 答案",
        ),
        (lambda p: cnsd(p, {"u": ["x"]}), iter_cnsd, r"user 'u': expected an object"),
        (lambda p: cnsd(p, [1]), iter_cnsd, r"must hold an object"),
        (lambda p: cnsd(p, {}), iter_cnsd, r"holds no row"),
    ],
    ids=["label", "empty-post", "column", "no-file", "no-output", "no-posts", "no-verdict", "list", "root", "nobody"],
)
def test_a_damaged_file_is_one_line(tmp_path, write, read, says):
    write(tmp_path / "data")
    with pytest.raises(InputError, match=says):
        list(read(tmp_path / "data"))


def test_half_a_surrogate_pair_names_the_user_or_is_replaced(tmp_path):
    said = {"inpput": "1. \ud83d 睡不着", "output": "答案：“是”"}
    (tmp_path / "CNSD_dataset.json").write_text(json.dumps({"7": said}), encoding="utf-8")
    with pytest.raises(InputError, match=r"CNSD_dataset\.json, field '7\.inpput': character 4 is half"):
        list(iter_cnsd(tmp_path))
    with replacing_surrogates():
        (record,) = iter_cnsd(tmp_path)
    assert "\ufffd" in record.post
