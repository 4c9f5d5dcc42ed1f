"""A label is read where an answer states it, and that place is what is probed."""

from pathlib import Path
from typing import Any

import pytest

from probes.errors import RowRefused
from probes.intake import labels
from probes.intake.answer import read_answer
from probes.intake.denied import denied
from probes.intake.labels import read_explanation, read_label
from probes.intake.rows import Reader, lay
from probes.models.encode import encode
from probes.probe import Probe
from probes.records import Span

CANDIDATES = {
    "risk": {"high": "High suicide risk", "low": "Low suicide risk"},
    "word": {"high": "high", "low": "low"},
    "高": {"高": "高自杀风险", "低": "低自杀风险"},
    "是": {"yes": "是", "no": "否"},
    "yes": {"yes": "yes", "no": "no"},
    "mood": {"positive": "positive", "negative": "negative"},
    "number": {"0": "0", "1": "1", "2": "2"},
}
MOODS = {"depression": "Depression", "anxiety": "Anxiety"}
STRESS = {
    "yes": "Yes, the poster suffers from stress",
    "no": "No, the poster does not suffer from stress",
}
POST = "I fed the dog, it rained."


@pytest.fixture(scope="module")
def reader(tiny_model_dir: Path) -> Reader:
    return Reader(tiny_model_dir)


@pytest.mark.parametrize(
    ("kind", "answer", "label"),
    [
        ("risk", "The post describes a low mood and hopelessness.\nAnswer: High suicide risk", "high"),
        ("risk", "Let me think about what the high school student says.\nLow suicide risk.", "low"),
        ("risk", "High.\nAnswer: Low suicide risk", None),
        ("高", "分析：作者情绪低落，失眠。\n结论：高自杀风险", "高"),
        ("高", "这个用户情绪低落，多次提到想死。", None),
        ("高", "高", "高"), ("高", "答案：高", "高"), ("高", "风险高", "高"), ("高", "风险较高，他想死。", "高"),
        ("高", "高。他想死", "高"), ("高", "高风险。", "高"), ("高", "自尊心很低，随时可能自杀", None),
        ("是", "该用户只是在抱怨工作，情绪稳定。", None), ("是", "作者否定自己。", None), ("是", "答案是否", "no"),
        ("是", "答案是否定的。", None), ("是", "是的，他想死。", "yes"),
        ("yes", "The author has no hope left and wants to die.", None),
        ("yes", "He is at risk: no one listens to him.", None), ("yes", "yes and no", None),
        ("yes", "No. The author sleeps.", "no"), ("yes", "No, the author sleeps.", "no"),
        ("word", "High. The author sleeps.", "high"), ("word", "Answer: high", "high"),
        ("word", "The answer is high.", "high"), ("word", "The risk is high", "high"), ("word", "high risk", "high"),
        ("word", "**Label:** high", "high"), ("word", '{"label": "high"}', "high"),
        ("word", "The risk is high because he says goodbye.", "high"), ("word", "The risk is high, as he ate", "high"),
        ("word", "His mood is very low, he plans to die tonight.", None),
        ("word", "She finished high school and is content.", None), ("word", "The author feels low.", None),
        ("mood", "The author shows something negative.", "negative"),
        ("mood", "The author has negative thoughts but the outlook is good.", None),
        ("number", "In 1 sentence: he is fine.", None), ("number", "Score: 1 out of 2", "1"),
    ],
)  # fmt: skip
def test_a_label_is_read_where_it_is_stated(kind: str, answer: str, label: str | None) -> None:
    assert read_label(answer, CANDIDATES[kind])[0] == label


@pytest.mark.parametrize(
    ("candidates", "answer"),
    [
        (MOODS, "**Depression**\n- evidence: none\n\n**Anxiety**\n- evidence: panic\n\n**Answer: Anxiety**"),
        (MOODS, "Depression: The author does not mention low mood.\nAnxiety: The author mentions panic."),
        (MOODS, "Depression: 10%\nAnxiety: 90%"), (MOODS, "Depression: 0.05\nAnxiety: 0.9"),
        (MOODS, "Depression: 2/10"), (MOODS, "Depression: ❌\nAnxiety: ✅"), (MOODS, "Depression: ❌"),
        (MOODS, "Depression (unlikely), Anxiety (likely)"), (MOODS, "Depression.\nHmm, wait, anxiety."),
        (CANDIDATES["word"], "Low.\nWait, actually high."),
        (MOODS, "Depression: low\nAnxiety: high"), (MOODS, "| Depression | 10% |\n| Anxiety | 90% |"),
        (CANDIDATES["word"], "high: 0.1, low: 0.9"), (CANDIDATES["word"], "high (0.1), low (0.9)"),
        (CANDIDATES["高"], "高：10%\n低：90%"), (MOODS, '{"depression": 0.1, "anxiety": 0.9}'),
        (MOODS, "1. Depression\n2. Anxiety\nThe answer is anxiety."), (CANDIDATES["word"], "Low\n\nCorrection: High."),
        (CANDIDATES["risk"], "A) High suicide risk\nB) Low suicide risk\n\nAnswer: B"),
        (STRESS, "Yes, the poster suffers from stress: 15%\nNo, the poster does not suffer from stress: 85%"),
        (STRESS, "A) Yes, the poster suffers from stress.\nB) No, the poster does not suffer from stress.\nAnswer: B"),
    ],
)  # fmt: skip
def test_an_answer_that_goes_through_the_labels_states_none(candidates: dict[str, str], answer: str) -> None:
    assert read_label(answer, candidates)[0] is None


@pytest.mark.parametrize(
    ("candidates", "answer", "label"),
    [
        (CANDIDATES["word"], "High (90%). The author plans it.", "high"),
        (CANDIDATES["word"], "Low.\nHe is calm. High mood is no sign of anything.", "low"),
        (MOODS, "Depression\nThe author mentions sadness and anxiety.", "depression"),
        (MOODS, "Answer: Depression\nExplanation: no sign of anxiety: he is calm.", "depression"),
        (MOODS, "Depression\n\nAnxiety: none", "depression"), (MOODS, "Depression\nAnxiety: ✗", "depression"),
        (CANDIDATES["yes"], "Yes.\nHe writes: “No, I cannot go on.”", "yes"),
        (CANDIDATES["number"], "2\n1. He says goodbye.\n0. He plans it.", "2"),
        (CANDIDATES["risk"], "High suicide risk\nNot low suicide risk, because he plans it.", "high"),
        (CANDIDATES["risk"], "High suicide risk\nThe post says “low suicide risk is boring”.", "high"),
    ],
)  # fmt: skip
def test_other_labels_in_passing_take_none_away(candidates: dict[str, str], answer: str, label: str) -> None:
    assert read_label(answer, candidates)[0] == label


def laid(reader: Reader, answer: str, kind: str, **given: Any) -> dict[str, Any]:
    record = {"prompt": f'Post: "{POST}" Risk?', "post": POST, "answer": answer, **given}
    return lay(reader, [record], CANDIDATES[kind]).rows[0]


@pytest.mark.parametrize(
    ("answer", "kind", "given", "at"),
    [
        ("Score (0-2): 2. He ate.", "number", {}, 13),
        ("In 1.5 lines: 1. He ate.", "number", {}, 14),
        ("On the scale 1-2 it is 2. He ate.", "number", {}, 23),
        ("Level 2/2... 2, as he ate.", "number", {}, 13),
        ("Score (0-2): 2. He ate.", "number", {"label": "2"}, 13),
        ("Score (0-2): 2. He ate.", "number", {"label_text": "2"}, 13),
        ("no. The author does not know what to do.", "yes", {"label_text": "no"}, 0),
        ("no. The author does not know what to do, no.", "yes", {"label_text": "no"}, 0),
        ("<think>no</think>no. There is no hope.", "yes", {"label_text": "no"}, 17),
        ("There is no hope. Answer: no", "yes", {"label_text": "no"}, 26),
        ("There is no hope. Answer: no", "yes", {"label": "no"}, 26),
        ("He says no. So no. He ate.", "yes", {"label_text": "no", "explanation": "He says no."}, 15),
    ],
)
def test_the_place_that_was_read_is_the_one_that_is_probed(
    reader: Reader, answer: str, kind: str, given: dict[str, Any], at: int
) -> None:
    row = laid(reader, answer, kind, **given)
    size = len(row["label_text"])
    assert row["label_span"] == [at, at + size]
    found = encode(row, reader.token_bytes)
    segment, begin = found.segment("label"), found.text.index(answer)
    assert segment is not None and segment.char == (begin + at, begin + at + size)


def test_what_a_model_wrote_keeps_its_place(tiny_model_dir: Path, reader: Reader) -> None:
    said = "Score (0-2): 2. He ate."
    asked = laid(reader, said, "number")
    row = read_answer(Probe.from_pretrained(tiny_model_dir), asked | {"label_span": None}, asked["output_ids"])
    assert row["label_span"] == [13, 14]


def test_a_label_text_inside_words_only_is_none(reader: Reader) -> None:
    good = {"prompt": f'Post: "{POST}" Risk?', "post": POST, "answer": "no"}
    found = lay(reader, [good, good | {"answer": "I know", "label_text": "no"}], CANDIDATES["yes"])
    assert [one["reason"] for one in found.left_out] == ["label_text is not in the answer"]


@pytest.mark.parametrize("span", [[0, 1], [-10, -9], [13, 900], [14, 13]])
def test_a_label_span_that_is_not_the_label_is_refused(reader: Reader, span: list[int]) -> None:
    row = laid(reader, "Score (0-2): 2. He ate.", "number")
    with pytest.raises(RowRefused, match=r"label_span .* is not label_text; mend it or leave it out"):
        encode(row | {"label_span": span}, reader.token_bytes)


@pytest.mark.parametrize(
    ("answer", "explanation"),
    [
        ("The risk is high.", None), ("Label: high", None), ("**Answer**: high risk", None), ("High risk.", None),
        ("He ate. The risk is high.", "He ate."), ("He ate.\nAnswer:\nhigh", "He ate."),
        ("He ate nothing, so the risk is high.", "He ate nothing"), ("High risk. He ate.", "He ate."),
    ],
)  # fmt: skip
def test_an_explanation_is_more_than_the_sentence_of_the_label(answer: str, explanation: str | None) -> None:
    label, at = read_label(answer, CANDIDATES["word"])
    assert label == "high" and read_explanation(answer, at) == explanation


@pytest.mark.parametrize("repeated", ["high. ", "“ x is high. ", "“ x high suicide risk. "])
@pytest.mark.parametrize("times", [8, 9, 120])
def test_a_label_is_looked_at_in_few_places(repeated: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred places of a short answer took a tenth of a second."""
    looked: list[Span] = []
    monkeypatch.setattr(labels, "denied", lambda answer, place: looked.append(place) or denied(answer, place))
    kind = "risk" if "suicide" in repeated else "word"
    found = read_label(repeated * times, CANDIDATES[kind])[0]
    assert len(looked) <= 8 and found == ("high" if times == 8 else None)
