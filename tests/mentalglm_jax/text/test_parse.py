"""Labels in other dress are read, denied ones never: over every built-in task, language and label."""

import pytest

from mentalglm_jax.text import tasks
from mentalglm_jax.text.task_files import tasks_of

EVERY = [(task, language) for task in tasks.TASKS.values() for language in task.languages]
IDS = [f"{task.name}-{language}" for task, language in EVERY]
REASON = {"en": "Reasoning: they say so", "zh": "推理：他这样说"}
ANSWER = {"en": "Answer", "zh": "回答"}
DRESS = {
    "bold": "**{}**",
    "bold-before-stop": "**{bare}**.",
    "underscores": "__{}__",
    "italics": "*{}*",
    "code": "`{}`",
    "quotes": "“{}”",
    "straight-quotes": '"{}"',
    "heading": "## {}",
    "bullet": "- {}",
    "answer": "{answer}: {}",
    "wide-colon": "{answer}：{}",
    "bold-answer": "**{answer}:** {}",
    "bold-answer-colon-outside": "**{answer}**: **{}**",
    "no-stop": "{bare}",
    "exclamation": "{bare}!",
    "line-break": "{}\n",
}
DENIED = {
    "en": ("not {}", "**not** {}", "not **{}**", "no {}", "{}? No.", "{}?", "~~{}~~", "It is not true that {}",
           "neither {}", "{} is wrong", "{} – not.", "non-{}", "[ ] {}", "{}: no"),
    "zh": ("没有{}", "不是{}", "并非{}", "不{}", "无{}", "非{}", "未见{}", "{}？不是", "{}吗？", "否，{}", "没有体现{}",
           "**没有**{}", "~~{}~~"),
}  # fmt: skip


def short_forms(task, language, label):
    """The label alone, and as in "high suicide risk"; none where labels are whole sentences."""
    if language in label.whole:
        return []
    name, tail = label.name(language), task.templates[language].split("{}")[1].rstrip(".。")
    head = task.templates[language].split("{}")[0].split()[-1] if language == "en" else ""
    return [name, name + tail, f"{head} {name}{tail}".strip()]


def forms(task, language):
    for number, label in enumerate(task.labels):
        sentence = task.sentence([label.key], language)
        for said in (sentence, *short_forms(task, language, label)):
            yield label.key, said
            if number == 0:
                yield label.key, said.upper()
                yield label.key, said.capitalize()


@pytest.mark.parametrize("dress", list(DRESS.values()), ids=list(DRESS))
@pytest.mark.parametrize(("task", "language"), EVERY, ids=IDS)
def test_every_label_is_read_in_every_dress(task, language, dress):
    for key, said in forms(task, language):
        text = dress.format(said, bare=said.rstrip(".。"), answer=ANSWER[language])
        for after in (
            " " + REASON[language],
            f"\n\n**{REASON[language][: 9 if language == 'en' else 2]}**: they say so",
        ):
            parsed = tasks.parse(task, language, text + after)
            assert (parsed.labels, parsed.status) == ((key,), "ok"), text + after
            assert parsed.explanation in ("they say so", "他这样说")
            assert parsed.label_span is not None
            found = (text + after)[slice(*parsed.label_span)]
            assert said.rstrip(".。") in found and len(found) <= len(said) + 3
        first = f"{REASON[language]}\n{ANSWER[language]}: {text}"
        if "{answer}" not in dress:
            assert tasks.parse(task, language, first).labels == (key,), first


@pytest.mark.parametrize(("task", "language"), EVERY, ids=IDS)
def test_no_denied_label_is_read(task, language):
    for denied in DENIED[language]:
        for _, said in forms(task, language):
            for text in (denied.format(said), f"{ANSWER[language]}: **{denied.format(said.rstrip('.。'))}**"):
                parsed = tasks.parse(task, language, f"{text} {REASON[language]}")
                assert (parsed.labels, parsed.status) == (None, "unknown_label"), text


@pytest.mark.parametrize(
    ("task", "language", "text", "labels"),
    [
        ("suicide_risk", "en", "**High**", ("high",)),
        ("suicide_risk", "en", "high suicide risk", ("high",)),
        ("suicide_risk", "en", "Answer: LOW", ("low",)),
        ("suicide_risk", "en", "Label: high", ("high",)),
        ("suicide_risk", "en", "**Final answer:** High suicide risk.", ("high",)),
        ("suicide_risk", "en", "Label: not high", None),
        ("suicide_risk", "en", "The label: high", None),
        ("suicide_risk", "zh", "**标签：** 高", ("high",)),
        ("suicide_risk", "zh", "最终答案：高自杀风险", ("high",)),
        ("suicide_risk", "zh", "结论：不是高自杀风险", None),
        ("suicide_risk", "en", "not high risk", None),
        ("suicide_risk", "en", "This post does not show high suicide risk.", None),
        ("suicide_risk", "en", "high or low", None),
        ("suicide_risk", "en", "high, low", None),
        ("suicide_risk", "en", "higher", None),
        ("suicide_risk", "zh", "答案：**高自杀风险**", ("high",)),
        ("suicide_risk", "zh", "没有高风险", None),
        ("suicide_risk", "zh", "这个帖子没有体现高自杀风险。", None),
        ("suicide_level", "en", "**Level 1**", ("1",)),
        ("suicide_level", "en", "level 10", ("10",)),
        ("suicide_level", "zh", "1级", ("1",)),
        ("cognitive_distortion", "en", "**Labeling**, **Mind reading**", ("mind_reading", "labeling")),
        ("cognitive_distortion", "en", "labeling, not mind reading", None),
        ("cognitive_distortion", "zh", "乱贴标签，读心术", ("mind_reading", "labeling")),
        ("cognitive_distortion", "zh", "乱贴标签，没有读心术", None),
        ("imhi_dr", "en", "**No, the poster does not suffer from depression.**", ("no",)),
        ("imhi_dr", "en", "Yes, the poster does not suffer from depression.", None),
        ("imhi_dr", "en", "**No**", None),
    ],
)  # fmt: skip
def test_what_is_said_and_what_is_not(task, language, text, labels):
    assert tasks.parse(task, language, text).labels == labels


@pytest.mark.parametrize(
    "dress", ["{}", "{}. Reasoning: he is sad", "Label: {}", "**{}**", "Answer: **{}**", "> {}", "- {}", "- **{}**"]
)
def test_a_sign_is_of_the_number(dress):
    """-1 is not 1, and >5 is not 5; a dash or ``>`` before a space begins a line of Markdown."""
    form = {"kind": "single", "question": {"en": "Which?"}, "sentence": {"en": "The label is {}."}}
    names = {"below": "-1", "none": "0", "above": "1", "more": ">5", "five": "5"}
    labels = {key: {"name": {"en": name}} for key, name in names.items()}
    (task,) = tasks_of({"signs": form | {"labels": labels}}, "here")
    for key, name in names.items():
        assert tasks.parse(task, "en", dress.format(name)).labels == (key,), key
    (rest,) = tasks_of({"plain": form | {"labels": {"1": {}, "5": {}}}}, "here")
    for said in ("-1", ">5", "->5", "--1"):
        assert tasks.parse(rest, "en", dress.format(said)).labels is None, said
