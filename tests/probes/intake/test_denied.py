"""A label that an answer denies or doubts is not read; nor is a number in another number. What is affirmed is read."""

import pytest

from probes.intake.labels import read_label

CANDIDATES = {
    "mood": {"positive": "positive", "negative": "negative", "neutral": "neutral"},
    "risk": {"high": "High suicide risk", "low": "Low suicide risk"},
    "depressed": {"yes": "depressed", "no": "not depressed"},
    "suicidal": {"s": "suicidal", "n": "non-suicidal"},
    "sentence": {
        "yes": "Yes, the poster suffers from stress.", "no": "No, the poster does not suffer from stress."
    },
    "高": {"high": "高自杀风险", "low": "低自杀风险"},
    "有": {"risk": "有风险", "none": "无风险"},
    "number": {"0": "0", "1": "1", "2": "2"},
    "illness": {"depression": "depression", "anxiety": "anxiety"},
    "高风险": {"high": "高风险", "low": "低风险"},
}  # fmt: skip
DENIED = {
    "mood": [
        "It is not positive.", "The mood isn't positive at all.", "It isn’t positive", "It isnt positive",
        "Non-positive", "non positive", "It is *not* positive", "It is _not_ positive", "neither good nor positive",
        "It cannot be called positive", "far from positive", "anything but negative", "unlikely to be positive",
        "I doubt that it is positive", "It is unclear whether it is positive", "not sad, angry or negative",
        "without positive words", "Positive is not what this is", "Positive? No.", "Is it positive? Yes.",
        "这不是positive", "This is not a post that anyone would call positive",
    ],
    "risk": [
        "This is not a high suicide risk.", "The post shows no high risk signs.", "There is no high suicide risk here.",
        "There is no evidence that the post shows a high suicide risk", "I do not believe there is high suicide risk.",
        "High suicide risk is unlikely", "High suicide risk can be excluded", "It is not high.\nThe risk is low.",
        "Not high but low", "The post does not, in my view, show high suicide risk",
        "I do not believe the author, who wrote about an exam, is at high suicide risk.",
        "High suicide risk: no", "It is not, as far as one can tell, a high suicide risk",
    ],
    "illness": [
        "Depression: No", "Depression: absent", "**Depression**: not present", "depression: no\nanxiety: yes",
        "there is little evidence for depression", "- depression: 0\n- anxiety: 1", "depression = false",
        "Depression - No", "few signs of depression",
    ],
    "高风险": ["高风险：否", "高风险的可能性较低", "高风险的可能性很低", "高风险比较低", "并不，在我看来，属于高风险"],
    "depressed": [
        "He is never depressed", "He isn't depressed", "He is not really depressed",
        "He is not not depressed",
    ],
    "suicidal": ["not suicidal", "not non-suicidal", "nonsuicidal"],
    "高": [
        "没有高自杀风险。", "沒有高自杀风险", "这不是高自杀风险", "并非高自杀风险", "非高自杀风险", "无高自杀风险",
        "没有证据表明该帖子体现了高自杀风险", "高自杀风险不成立", "不太可能是高自杀风险",
        "是否为高自杀风险", "可以排除高自杀风险",
    ],
    "有": ["没有风险", "不是无风险"],
    "number": [
        "The answer is 1.5", "10", "1,000", "1 000", "1/2", "-1", ".5", "0.5", "2:1", "1%", "1-2", "1st", "2020-1",
        "１0", "not 1", "2,1",
    ],
}  # fmt: skip
AFFIRMED = {
    "mood": [
        ("**Positive**\nHe is not positive", "positive"), ("Negative. The words 'not happy' show it.", "negative"),
        ("Without a doubt positive", "positive"), ("There is no doubt that it is positive", "positive"),
        ("Not only sad but negative", "negative"), ("No, it is positive", "positive"),
        ("The words “I do not want to go” are negative", "negative"),
        ("He cannot sleep, so it is negative", "negative"),
        ("He does not sleep and the mood is negative.", "negative"), ("Negative. It is not a good day.", "negative"),
    ],
    "risk": [
        ("High suicide risk. The author does not sleep.", "high"), ("Low suicide risk, as there is no plan.", "low")
    ],
    "illness": [("Depression: he cannot sleep.", "depression"), ("A little sad, depression.", "depression")],
    "高风险": [("高风险：他想死", "high"), ("他很难过，高风险", "high")],
    "depressed": [("The author is not depressed.", "no"), ("depressed", "yes")],
    "suicidal": [("It is non-suicidal.", "n"), ("suicidal.", "s")],
    "sentence": [
        ("Yes, the poster suffers from stress. He cannot sleep.", "yes"), ("no", "no"), ("Yes", "yes"),
        ("No, the poster does not suffer from stress. He is not ill.", "no"),
    ],
    "高": [
        ("这个帖子体现了高自杀风险。", "high"), ("毫无疑问是高自杀风险", "high"), ("非常明显，高自杀风险", "high"),
        ("他说“我不想活了”属于高自杀风险", "high"), ("他睡不着，因此是高自杀风险", "high"),
        ("不仅难过，而且高自杀风险", "high"),
    ],
    "有": [("有风险", "risk"), ("该帖子无风险。", "none")],
    "number": [
        ("Level 1", "1"), ("1.", "1"), ("1. He is sad.", "1"), ("1, he is sad", "1"), ("Label:1", "1"),
        ("**1**", "1"), ("1）难过", "1"), ("1 out of 5", "1"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "answer"), [(kind, answer) for kind, found in DENIED.items() for answer in found])
def test_a_label_that_is_denied_or_in_another_number_is_not_read(kind: str, answer: str) -> None:
    assert read_label(answer, CANDIDATES[kind]) == (None, None)


@pytest.mark.parametrize(
    ("kind", "answer", "label"), [(kind, *pair) for kind, found in AFFIRMED.items() for pair in found]
)
def test_a_label_that_is_affirmed_is_read(kind: str, answer: str, label: str) -> None:
    found, span = read_label(answer, CANDIDATES[kind])
    assert found == label and span is not None
    said = answer[slice(*span)].casefold()
    assert said in (CANDIDATES[kind][label].casefold(), label.casefold())
