"""What `data inspect` finds, each finding planted; contact details; near duplicates."""

import json
from dataclasses import replace

import pytest

from mentalglm_jax.cli.main import main
from mentalglm_jax.data.contacts import find_contacts, scrub, scrub_record
from mentalglm_jax.data.inspection import inspect_records
from mentalglm_jax.data.near import NearIndex, near_duplicates, signature
from mentalglm_jax.data.records import Record, read_records, write_records
from mentalglm_jax.data.splits import bare_post
from mentalglm_jax.errors import InputError

LONG = "今天下班很晚，地铁上人很多，我一直在想明天的会议，觉得自己什么都做不好，可是同事说已经很不错了"


def record(id_, post, label="low", split="train", source="sos_hl_1k", task="suicide_risk", **more):
    return Record(id_, task, "zh", post, "问？", label=label, split=split, source=source, **more)


@pytest.mark.parametrize(
    ("text", "kind", "clean"),
    [
        ("找我 13812345678 吧", "phone", "找我 [phone] 吧"),
        ("+86 138-1234-5678", "phone", "[phone]"),
        ("电话010-12345678。", "phone", "电话[phone]。"),
        ("call 415-555-0134 now", "phone", "call [phone] now"),
        ("加qq：12345678吧", "messenger", "加qq：[account]吧"),
        ("我的微信号是abc_123", "messenger", "我的微信号是[account]"),
        ("Discord: someone_1", "messenger", "Discord: [account]"),
        ("写信给a.b@c-d.com谢谢", "email", "写信给[email]谢谢"),
        ("看https://example.org/a?b=1，很好", "url", "看[url]，很好"),
        ("看weibo.com/u/1", "url", "看[url]"),
        ("谢谢@小明同学 你好", "handle", "谢谢[user] 你好"),
        ("ask u/some_one there", "handle", "ask [user] there"),
        ('回复<a href="x">他</a>', "html", "回复他"),
    ],
)
def test_contact_details_are_found_and_replaced(text, kind, clean):
    assert {found for found, _ in find_contacts(text)} == {kind}
    assert scrub(text) == clean
    assert find_contacts(clean) == []


@pytest.mark.parametrize(
    "text", ["他在QQ上说", "用微信聊天", "a discord server", "<url> and <3", "1381234567", "9" * 30, "3.1415926535897",
             "3 a.m. and 5@ night", "either/or us", "2024-01-02"],
)  # fmt: skip
def test_what_only_looks_like_a_contact_is_left(text):
    assert find_contacts(text) == [] and scrub(text) == text


def test_scrubbing_moves_cues_with_their_words():
    post = "打13812345678给我，不想活了，@小明 再见"
    cue = post.index("不想活了")
    hit = post.index("138")
    spans = ((cue, cue + 4), (hit + 2, hit + 5), (0, hit + 3))
    clean = scrub_record(record("a", post, cues=spans, decoys=((len(post) - 2, len(post)),), explanation="他说@小明"))
    assert clean.post == "打[phone]给我，不想活了，[user] 再见" and clean.explanation == "他说[user]"
    assert [clean.post[slice(*span)] for span in clean.cues] == ["不想活了", "[phone]", "打[phone]"]
    assert [clean.post[slice(*span)] for span in clean.decoys] == ["再见"]
    assert scrub_record(record("a", "<br>")).post == "[removed]"


def test_near_texts_are_found_and_far_ones_are_not():
    texts = [LONG, LONG[:-2] + "啊", "完全不同的一句话，说的是天气和面条，没有别的", LONG[::-1], LONG]
    assert list(near_duplicates([(text, "zh") for text in texts], 0.8)) == [None, 0, None, None, 0]
    chain = [(text, "zh") for text in (LONG, LONG[8:], LONG[16:])]  # the third resembles only the second, a repeat
    assert list(near_duplicates(chain, 0.75)) == [None, 0, None] and list(near_duplicates(chain[1:], 0.75)) == [None, 0]
    index, ab, xyz = NearIndex(0.8), signature("ab", "en"), signature("xyz", "en")
    assert index.near(ab) == []
    assert [index.add(ab), index.add(ab), index.add(xyz)] == [0, 1, 2]
    assert index.near(ab) == [0, 1] and index.near(xyz) == [2]
    with pytest.raises(InputError, match=r"threshold: 1.0"):
        NearIndex(1.0)


def planted():
    level = {"task": "suicide_level", "source": "sos_1k"}
    return [
        record("a", "面条不错", "low"),
        record("b", "面条，不错！", "low"),  # duplicate but for punctuation
        record("c", "交代好了", "high"),
        record("d", "交代好了", "low"),  # conflict
        record("e", LONG, "low"),
        record("f", "打13812345678", "high"),
        record("g", "面条不错", "low", "test"),  # overlap, exact
        record("h", LONG[:-2] + "啊", "low", "dev"),  # overlap, near
        record("i", "交代好了", "3", "test", **level),  # crossing; low by its level
        record("j", "在QQ上说", "9", "train", **level),
    ]


def test_every_planted_fault_is_reported_and_no_post():
    report = inspect_records(planted())
    part = report["tasks"]["suicide_risk"]["sos_hl_1k"]["train"]
    assert (part["records"], part["duplicates"], part["labels"]) == (6, 2, {"low": 4, "high": 2})
    assert part["characters"] == {"mean": 12.83, "median": 4, "p95": 47, "max": 47} and "words" not in part
    assert (part["contact_rows"], part["contacts"]) == (1, {"phone": 1})
    assert report["tasks"]["suicide_level"]["sos_1k"]["train"]["messenger_mentions"] == 1
    sides = {(tuple(e["train"]), tuple(e["held_out"])): e for e in report["overlap"]}
    train = ("suicide_risk", "sos_hl_1k", "train")
    test, dev = (sides[train, (*train[:2], split)] for split in ("test", "dev"))
    assert (test["exact"], test["near"], test["exact_ids"]) == (1, 0, [["a", "g"], ["b", "g"]])
    assert (dev["exact"], dev["near"], dev["near_ids"]) == (0, 1, [["e", "h"]])
    (crossing,) = report["crossings"]
    assert crossing["train"] == list(train) and crossing["held_out"][1:] == ["sos_1k", "test"]
    assert crossing["exact_ids"] == [["c", "i"], ["d", "i"]] and crossing["exact"] == 1
    assert report["conflicts"]["same_task_ids"] == [["c", "d"]]
    assert (report["conflicts"]["level_posts_shared_with_risk"], report["conflicts"]["level_against_risk"]) == (1, 1)
    assert report["contacts"] == {"rows": 1, "ids": ["f"]}
    text = json.dumps(report, ensure_ascii=False)
    assert not any(one.post in text for one in planted())


def test_one_post_under_two_questions_is_no_duplicate_and_without_near_nothing_is_hashed():
    two = [record("a", "面条"), replace(record("b", "面条", "high"), question="另问？")]
    report = inspect_records(two, near=False)
    assert report["tasks"]["suicide_risk"]["sos_hl_1k"]["train"]["duplicates"] == 0
    assert report["conflicts"]["same_task"] == 0
    assert "near" not in inspect_records(planted(), near=False)["overlap"][0]


def test_bare_post():
    assert bare_post(" Ａ, b！1 ") == "ab1" and bare_post("。。。") == "。。。"


def test_the_command_prints_counts_and_writes_scrubbed_records(tmp_path, capsys):
    write_records(tmp_path / "all.jsonl", planted())

    def call(*more):
        with pytest.raises(SystemExit) as stop:
            main(["data", "inspect", str(tmp_path / "all.jsonl"), *map(str, more)])
        return stop.value.code, *capsys.readouterr()

    code, out, _ = call("--json", "--out", tmp_path / "clean")
    assert code == 0
    report = json.loads(out)
    assert report["tasks"]["suicide_risk"]["sos_hl_1k"]["train"]["records"] == 6
    assert "打[phone]" in [r.post for r in read_records(tmp_path / "clean" / "train.jsonl")]
    assert {path.name for path in (tmp_path / "clean").iterdir()} == {"train.jsonl", "dev.jsonl", "test.jsonl"}
    code, out, _ = call()
    assert "rows with contact details: 1" in out and "risk level against high/low: 1 of 1" in out
    assert code == 0 and not any(one.post in out for one in planted())
    code, _, err = call("--set-name", "imhi")
    assert code == 2 and "holds records" in err
