"""Each check on an answer that passes and on ones that fail it; the aligner; consistency with a known answer."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mentalglm_jax.data.explain.checks import ROW_CHECKS, Candidate, Limits, consistency, not_near_duplicate
from mentalglm_jax.data.explain.quotes import ACCEPT, find_quotes, quotes_occur, similarity, without_quotes
from mentalglm_jax.data.records import Record
from mentalglm_jax.text.tasks import TASKS

POST = "最近总是睡不着，感觉活着没有任何意义，东西都交代好了，妈妈不知道"
GOOD = (
    "这个帖子体现了高自杀风险。 推理：帖子提到“东西都交代好了”，说明发帖人已经做了安排，"
    "符合有计划的标准，需要尽快由专业人员评估。"
)
EN_POST = "I can't sleep and my boss keeps yelling at me about the report, I feel sick every Sunday"
EN_GOOD = (
    'Yes, the poster suffers from stress. Reasoning: The writer says "my boss keeps yelling at me", and ties '
    "feeling sick to work, which points to lasting pressure at the job."
)


def zh(text, finish="stop", post=POST):
    return Candidate(Record("a", "suicide_risk", "zh", post, "问？", label="high"), text, finish)


def en(text):
    return Candidate(Record("a", "imhi_dreaddit", "en", EN_POST, "Q?", label="yes"), text)


def failed(candidate):
    return [name for name, check in ROW_CHECKS.items() if not check(candidate, Limits())]


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        (zh(GOOD), []),
        (en(EN_GOOD), []),
        (zh(GOOD.replace("高自杀风险", "低自杀风险", 1)), ["states_gold_label"]),
        (zh("高。" + GOOD), ["states_gold_label"]),
        (zh(GOOD.replace("东西都交代好了", "我什么都准备妥当了")), ["quotes_the_post"]),
        (zh(GOOD.replace("“", "").replace("”", "")), ["quotes_the_post"]),
        (zh(GOOD.replace("符合有计划", "属于“高自杀风险”，符合有计划")), []),
        (zh(GOOD.replace("“东西都交代好了”", "“高”")), ["quotes_the_post"]),
        (en(EN_GOOD.replace('"my boss keeps yelling at me"', '"my boss fired me"')), ["quotes_the_post"]),
        (zh("这个帖子体现了高自杀风险。 推理：The writer says “东西都交代好了” and so they made arrangements."),
         ["right_language"]),
        (en("Yes, the poster suffers from stress. Reasoning: " + GOOD), ["quotes_the_post", "right_language",
                                                                        "right_length"]),
        (zh("这个帖子体现了高自杀风险。 推理：“东西都交代好了”。"), ["right_language", "right_length"]),
        (zh(GOOD + "说明" * 300), ["right_length"]),
        (zh(GOOD, finish="length"), ["right_length"]),
        (zh(GOOD + "可以联系13812345678。"), ["no_contacts"]),
        (zh(GOOD + "建议服用安眠药。"), ["no_method_advice"]),
        (zh(GOOD + "建议尽快联系专业人员。"), []),
        (zh(GOOD + "达到致死量。"), ["no_method_advice"]),
        (en(EN_GOOD + " You should try an overdose."), ["no_method_advice"]),
        (en(EN_GOOD + " They should talk to a friend."), []),
        (zh(GOOD + "这与给定的标签一致。"), ["no_label_leak"]),
        (zh(GOOD + "专家标注为高。"), ["no_label_leak"]),
        (en(EN_GOOD + " This matches the given label."), ["no_label_leak"]),
        (zh(""), ["states_gold_label", "quotes_the_post", "right_language", "right_length"]),
    ],
)  # fmt: skip
def test_each_fault_fails_its_check_and_no_other(candidate, expected):
    assert failed(candidate) == expected


def test_the_name_of_a_label_is_no_leak():
    record = Record("a", "cognitive_distortion", "zh", "我就是个笨蛋，没用", "问？", labels=("labeling",))
    reason = "发帖人说“我就是个笨蛋”，用一个负面的词概括自己，属于乱贴标签的表现。"
    said = f"这个帖子体现的认知歪曲有：乱贴标签。 推理：{reason}"
    assert failed(Candidate(record, said)) == []


# --- quotes ---


@pytest.mark.parametrize(
    ("quote", "close"),
    [
        ("感觉活着没有任何意义", 1.0),
        ("感觉活着，没有任何意义！", 1.0),
        ("感觉活着没有意义", 0.875),
        ("最近……交代好了", 1.0),
        ("最近……编造的话", 0.0),
        ("想要结束一切", 0.0),
        ("妈妈", 1.0),
        ("爸爸", 0.0),
        ("", 0.0),
    ],
)
def test_similarity(quote, close):
    assert similarity(quote, POST) == pytest.approx(close)


def slow_alignment(a, b):
    """Smith-Waterman cell by cell."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            match = table[i - 1][j - 1] + (2 if a[i - 1] == b[j - 1] else -1)
            table[i][j] = max(0, match, table[i - 1][j] - 1, table[i][j - 1] - 1)
    return max(map(max, table))


@settings(max_examples=40)
@given(st.text("abcd", min_size=4, max_size=12), st.text("abcd", min_size=1, max_size=20))
def test_the_aligner_is_smith_waterman(quote, post):
    assert similarity(quote, post) == pytest.approx(slow_alignment(quote, post) / (2 * len(quote)))


@settings(max_examples=40)
@given(st.text(string.ascii_lowercase, min_size=8, max_size=40), st.data())
def test_any_part_of_a_post_is_found_and_a_typo_is_forgiven(post, data):
    start = data.draw(st.integers(0, len(post) - 8))
    part = post[start : start + 8]
    assert similarity(part.upper(), post) == 1.0
    assert similarity(part[:3] + "1" + part[4:], post) >= ACCEPT


def test_quotation_marks():
    text = "他说“一”，「二」『三』\"four\" and 'five', it's not 'six"
    assert find_quotes(text) == ["一", "二", "三", "four", "five"]
    assert without_quotes("a“b”c") == "ac"
    assert not quotes_occur("没有引文", POST)


@pytest.mark.parametrize("said", ["'I can't go home'", "‘I can’t go home’", "„I can't go home“", "«I can't go home»"])
def test_an_invented_quote_beside_a_true_one_fails_in_any_marks(said):
    """Up to an apostrophe it was true, or it was not seen at all."""
    true = EN_GOOD.replace('"my boss keeps yelling at me"', "'I can't sleep'")
    assert failed(en(true)) == []
    assert failed(en(f"{true} They add {said}.")) == ["quotes_the_post"]
    assert quotes_occur("‘I can’t sleep’", EN_POST) and not quotes_occur("‘I can’t go home’", EN_POST)


# --- corpus ---


def corpus(count, words, label_in_text=False):
    found = []
    for number in range(count):
        label = ("high", "low")[number % 2]
        named = {"high": "高自杀风险", "low": "低自杀风险"}[label] if label_in_text else ""
        sentence = TASKS["suicide_risk"].sentence([label], "zh")
        text = f"{sentence} 推理：第{number // 2 * 37}次，{words[label]}{named}。"
        found.append(Candidate(Record(f"c{number}", "suicide_risk", "zh", POST, "问？", label=label), text))
    return found


def test_consistency_reads_the_argument_and_not_the_name_of_the_label():
    told = consistency(corpus(40, {"high": "他已经做了安排", "low": "他只是觉得有些累"}), 0)
    assert told.f1 == told.f1_masked == 1.0 and set(told.agrees) == {True} and told.n == 40
    named = consistency(corpus(40, {"high": "他这样写", "low": "他这样写"}, label_in_text=True), 0)
    assert named.f1 == 1.0 and named.f1_masked < 0.7 and False in named.agrees
    few = consistency(corpus(6, {"high": "a", "low": "b"}), 0)
    assert (few.f1, few.f1_masked, set(few.agrees)) == (None, None, {None})


def test_consistency_of_several_labels():
    task, found = "cognitive_distortion", []
    for number in range(40):
        labels = (("labeling",), ("mind_reading",), ("labeling", "mind_reading"), ("mental_filter",))[number % 4]
        said = {"labeling": "用词概括自己", "mind_reading": "猜别人的想法", "mental_filter": "只盯着坏处"}
        text = f"推理：{'，'.join(said[label] for label in labels)}，第{number * 37}次"
        found.append(Candidate(Record(f"c{number}", task, "zh", POST, "问？", labels=labels), "这。 " + text))
    result = consistency(found, 0)
    assert result.f1 > 0.95 and all(result.agrees)


def test_near_duplicates_are_told_by_their_own_words():
    same = "说明发帖人已经做了安排，符合有计划的标准，需要尽快由专业人员评估"
    texts = [f"推理：他说“{quote}”，{same}" for quote in ("东西都交代好了", "妈妈不知道")]
    other = "推理：他说“睡不着”，只写了夜里的情形，没有提到今后的打算，也没有告别的话"
    found = [zh("这个帖子体现了高自杀风险。 " + text) for text in (*texts, other)]
    assert not_near_duplicate(found, 0.9) == [True, False, True]
