"""ROUGE and BLEU in Chinese against counts by hand; grounding of quotes; consistency of label and explanation."""

import random

import pytest

from mentalglm_jax.data.records import Record
from mentalglm_jax.evaluate import consistency, evaluate, overlap
from mentalglm_jax.evaluate.answers import generated
from mentalglm_jax.evaluate.explanations import GROUNDED, chinese_words, grounding
from mentalglm_jax.text import tasks


def row(number: int, gold: str, said: str | None, explanation: str | None, reference=None, language="zh") -> dict:
    question = tasks.TASKS["suicide_risk"].question(language)
    record = Record(f"r{number}", "suicide_risk", language, f"post {number}", question, gold, explanation=reference)
    return record.to_dict() | {"parsed_label": said, "parsed_explanation": explanation, "parse_status": "ok"}


def test_rouge_by_character_and_word():
    found = overlap([("我很难过。", "我很 开心。")], "zh")
    # Characters: 我很难过。 against 我很开心。 share 3 of 5, bigrams 1 of 4, longest common subsequence 3.
    assert found["character"] == pytest.approx(
        {"rouge1": 3 / 5, "rouge2": 1 / 4, "rougeL": 3 / 5, "bleu": found["character"]["bleu"]}
    )
    assert chinese_words("我很难过。") == ["我", "很", "难过", "。"]
    assert found["word"]["rouge1"] == pytest.approx(3 / 4)
    english = overlap([("The poster feels tired.", "the poster, felt tired")], "en")
    assert set(english) == {"word"}
    assert english["word"]["rouge1"] == pytest.approx(3 / 4)


def test_bleu_by_hand():
    reference, said = "一二三四五六七八", "一二三四五六甲乙"
    precisions = (6 / 8, 5 / 7, 4 / 6, 3 / 5)
    expected = (precisions[0] * precisions[1] * precisions[2] * precisions[3]) ** 0.25
    assert overlap([(reference, said)], "zh")["character"]["bleu"] == pytest.approx(expected)
    assert overlap([(reference, reference)], "zh")["character"] == pytest.approx(
        {"rouge1": 1, "rouge2": 1, "rougeL": 1, "bleu": 1}
    )
    assert overlap([], "zh") == {}


def test_an_absent_explanation_scores_nothing_and_stays_in_the_mean():
    rows = [row(0, "high", "high", "完全一样的解释", "完全一样的解释"), row(1, "high", "high", None, "另外一个解释")]
    rows.append(row(2, "high", "high", "no reference here"))
    found = evaluate(rows, draws=2)["suicide_risk"]["explanation"]["overlap"]
    assert set(found) == {"zh"}
    assert found["zh"]["n"] == 2
    assert found["zh"]["character"]["rouge1"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("quote", "post", "low", "high"),
    [
        ("想结束这一切！", "我想结束这一切, 真的", 1.0, 1.0),
        ("I can’t  Sleep", "last night i can't sleep at all", 1.0, 1.0),
        ("感觉活着没有意义", "感觉活着没有任何意义", 0.8, 0.95),
        ("今天天气很好", "感觉活着没有任何意义", 0.0, 0.2),
        ("", "x", 0.0, 0.0),
        ("！？", "x！？", 0.0, 0.0),
    ],
)
def test_grounding(quote, post, low, high):
    assert low <= grounding(quote, post) <= high


def test_made_up_quotes_are_counted():
    said = "写道“感觉活着没有意义”，也写道“买了一张船票”。"
    item = row(0, "high", "high", said) | {"post": "感觉活着没有任何意义。睡不着。"}
    found = evaluate([item], draws=2)["suicide_risk"]["explanation"]
    assert (found["quotes_verbatim_rate"], found["quotes_grounded_rate"]) == (0, 0.5)
    assert 0 < GROUNDED < 0.88


@pytest.mark.parametrize(
    ("language", "post", "said"),
    [
        ("zh", "感觉活着没有任何意义。", "写道“感觉活着没有任何意义”，所以是“高”，即“高自杀风险”，不是「低」。"),
        ("en", "I can't go on.", '\'I can\'t go on\' and "can\'t go on" are "high suicide risk", not "low".'),
    ],
)
def test_a_label_in_quotation_marks_is_no_quote(language, post, said):
    """The same rule as the builder's: what the teacher may write is not counted as made up afterwards."""
    item = row(0, "high", "high", said, language=language) | {"post": post}
    found = evaluate([item], draws=2)["suicide_risk"]["explanation"]
    assert found["quotes_verbatim_rate"] == found["quotes_grounded_rate"] == found["with_quote_rate"] == 1.0
    only = row(0, "high", "high", "是“高”。" if language == "zh" else 'It is "high".', language=language)
    found = evaluate([only], draws=2)["suicide_risk"]["explanation"]
    assert (found["with_quote_rate"], found["quotes_grounded_rate"]) == (0.0, None)


@pytest.mark.parametrize(
    ("said", "quoted", "grounded"),
    [
        ("The poster says ‘I don’t want to live’.", 1.0, 0.0),
        ("The poster says 'I don't want to live' and \"nothing helps\".", 1.0, 0.5),
        ("The poster says 'I don't sleep'.", 1.0, 1.0),
        ("It's what the poster doesn't say that's telling.", 0.0, None),
    ],
)
def test_an_apostrophe_ends_no_quote(said, quoted, grounded):
    item = row(0, "high", "high", said, language="en") | {"post": "I don't sleep and nothing helps. Nobody calls me."}
    found = evaluate([item], draws=2)["suicide_risk"]["explanation"]
    assert (found["with_quote_rate"], found["quotes_grounded_rate"]) == (quoted, grounded)


def test_consistency_tells_fitting_explanations_from_swapped_ones():
    rng = random.Random(0)
    reasons = {"high": ["有计划", "写了遗书", "定了日期"], "low": ["只是累了", "没有计划过", "想好好睡"]}

    def text(key):
        return f"{rng.choice(reasons[key])}，所以如此判断{rng.randint(0, 99)}。"

    train = [Record(f"t{i}", "suicide_risk", "zh", f"p{i}", tasks.TASKS["suicide_risk"].question("zh"), label=key,
                    explanation=text(key)) for i, key in enumerate(["high", "low"] * 40)]  # fmt: skip
    other = {"high": "low", "low": "high"}
    gold = ["high", "low"] * 10
    fitting = [generated(row(i, g, g, text(g), text(g))) for i, g in enumerate(gold)]
    swapped = [generated(row(i, g, g, text(other[g]))) for i, g in enumerate(gold)]
    wrong = [generated(row(i, g, other[g], text(other[g]))) for i, g in enumerate(gold)]  # wrong, but of one piece
    assert consistency(fitting, train) == {"n": 20, "agreement": 1.0, "reference_agreement": 1.0}
    assert consistency(swapped, train) == {"n": 20, "agreement": 0.0}
    assert consistency(wrong, train) == {"n": 20, "agreement": 1.0}
    assert consistency(fitting, []) is None
    assert consistency([generated(row(i, g, None, text(g))) for i, g in enumerate(gold)], train) is None
