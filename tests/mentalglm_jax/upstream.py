"""Invented rows in the upstream data sets' formats: what the tests of their readers read."""

import csv
import io
import json

from mentalglm_jax.data.records import Record
from mentalglm_jax.text import tasks

SOS = [("high", "今天我把东西都交代好了"), ("low", "面条不错，我还想再吃"), ("low", '他说"好"，我就去了')]


CD_HEADER = [label.name("zh") for label in tasks.TASKS["cognitive_distortion"].labels]


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


LEVELS = [["comment", "myLabel"], ["今天我把东西都交代好了", "10"], ["面条不错", "0"]]


def alpaca(*rows):
    keys = ("instruction", "input", "output")
    return json.dumps([dict(zip(keys, row, strict=True)) for row in rows], ensure_ascii=False, indent=1).encode()


GOOD = ("这个帖子体现了什么认知歪曲？", "都怪我", "这个帖子体现的认知歪曲有：罪责归己。")


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
