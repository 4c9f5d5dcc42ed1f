"""Where the label is, what it is compared with, and the rows that would score something else."""

from typing import Any

import pytest

from probes.errors import ProbeInputError
from probes.probe import Probe
from probes.records import comparable
from tests.probes.tiny import LABELS, make_row

HIGH, LOW = LABELS["en"]["high"], LABELS["en"]["low"]


@pytest.fixture
def row(tokenizer: Any) -> dict[str, Any]:
    return make_row(tokenizer, 0, "en", "We had dinner, it rained.", "dinner")


def said(tokenizer: Any, row: dict[str, Any], output: str, **changes: Any) -> dict[str, Any]:
    return row | {"output_ids": tokenizer(output)["input_ids"], "parsed_explanation": None, **changes}


@pytest.mark.parametrize(
    ("output", "before"),
    [
        (f"<think>Either {LOW} or {HIGH} {LOW}</think>\n{HIGH}", "</think>\n"),
        (f"</think>{HIGH}", "</think>"),
        (f"◁think▷{HIGH}◁/think▷ {HIGH}", "◁/think▷ "),
        (f"<thinking>a</thinking><think>{HIGH}</think>{HIGH}", "</think>"),
        (f"<|channel|>analysis<|message|>{HIGH}<|channel|>final<|message|>{HIGH}", "final<|message|>"),
        (f"First: {HIGH} Hm. {HIGH}", "Hm. "),
    ],
    ids=["think", "opened in the prompt", "kimi", "twice", "channels", "key"],
)
def test_the_label_is_the_answers(tiny_probe: Probe, tokenizer: Any, row: Any, output: str, before: str) -> None:
    reasoning = f"First: {HIGH} Hm." if output.startswith("First") else None
    example = tiny_probe.encode(said(tokenizer, row, output, reasoning=reasoning))
    segment = example.segment("label")
    assert segment is not None and example.text[slice(*segment.char)] == HIGH
    assert example.text[: segment.char[0]].endswith(before) and segment.char[0] == example.text.rindex(HIGH)


def test_an_explanation_in_the_reasoning(tiny_probe: Probe, tokenizer: Any, row: Any) -> None:
    output = f"<think>{HIGH} It says dinner.</think>{HIGH}"
    example = tiny_probe.encode(said(tokenizer, row, output, parsed_explanation="It says dinner."))
    names = [s.name for s in example.segments if s.name in ("label", "explanation")]
    assert names == ["explanation", "label"]
    both = f"<think>It says dinner.</think>{HIGH} It says dinner."
    example = tiny_probe.encode(said(tokenizer, row, both, parsed_explanation="It says dinner."))
    assert [s.name for s in example.segments if s.name in ("label", "explanation")] == ["label", "explanation"]


@pytest.mark.parametrize(
    ("output", "changes", "message"),
    [
        (f"<think>{HIGH} and on", {}, r"the reasoning \(<think>\) never ends"),
        (f"<think>{HIGH}</think> I do not know.", {}, "label_text stands in the reasoning only"),
        (LOW, {"label_text": LOW}, "parsed_label is 'high' but label_text is the sentence of 'low'"),
    ],
    ids=["cut off", "in the reasoning only", "another label's sentence"],
)
def test_rows_that_would_score_something_else(
    tiny_probe: Probe, tokenizer: Any, row: Any, output: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ProbeInputError, match=f"^row 'row-0': .*{message}"):
        tiny_probe.encode(said(tokenizer, row, output, **changes))


def test_a_prompt_that_ends_in_an_opened_thought(tiny_probe: Probe, tokenizer: Any, row: Any) -> None:
    prompt = [*row["prompt_ids"], *tokenizer("\n<think>")["input_ids"]]
    with pytest.raises(ProbeInputError, match="never ends"):
        tiny_probe.encode(said(tokenizer, row, HIGH, prompt_ids=prompt))
    found = tiny_probe.encode(said(tokenizer, row, f"{HIGH}</think>{HIGH}", prompt_ids=prompt)).segment("label")
    assert found is not None


@pytest.mark.parametrize("count", [1, 3])
def test_left_padding_is_refused(tiny_probe: Probe, tokenizer: Any, row: Any, count: int) -> None:
    opens = tokenizer.pad_token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id)  # one may open the text
    padded = row | {"prompt_ids": [tokenizer.pad_token_id] * (count + opens) + row["prompt_ids"]}
    with pytest.raises(ProbeInputError, match=f"prompt_ids begin with {count + opens} pad tokens"):
        tiny_probe.encode(padded)
    assert (
        tiny_probe.encode(row | {"prompt_ids": [tokenizer.pad_token_id] * opens + row["prompt_ids"]}).post
        == row["post"]
    )


@pytest.mark.parametrize(
    ("changes", "contrast", "rivals"),
    [
        ({}, "log-odds", (LOW,)),
        ({"candidates": None}, "log p", ()),
        ({"candidates": {"high": HIGH}}, "log p", ()),
        ({"candidates": {"high": HIGH, "low": LOW, "again": LOW}}, "log-odds", (LOW,)),
        ({"candidates": {"high": HIGH.upper() + "!", "low": LOW}}, "log-odds", (LOW,)),
        ({"candidates": {"high": "High.", "low": LOW}}, "unlisted", (LOW,)),
        ({"candidates": {"high": f"{HIGH} Yes", "low": f"{LOW} Yes"}}, "reworded", (LOW,)),
        ({"parsed_label": ["high", "low"], "candidates": {"a": "Only a.", "b": LOW}}, "unlisted", ("Only a.", LOW)),
    ],
    ids=["both", "none", "alone", "twice", "other spelling", "other words", "part of it", "several labels"],
)
def test_what_the_label_is_compared_with(
    tiny_probe: Probe, row: Any, changes: dict[str, Any], contrast: str, rivals: tuple[str, ...]
) -> None:
    example = tiny_probe.encode(row | changes)
    assert (example.contrast, example.rivals) == (contrast, rivals)
    assert len(tiny_probe.scorer.label_ids(example)[2]) == len(rivals)


# ---- what a template, a tokenizer or a label may look like that is not ours ----


def told(tokenizer, prompt_end: str, output: str, label_text: str = " high.", **more):
    """A row whose prompt ends in ``prompt_end`` and whose answer is ``output``."""
    post = "I cannot sleep at all."
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f'post: "{post} " {prompt_end}', output)]
    return {"id": "x", "task": "t", "post": post, "prompt_ids": ids[0], "output_ids": ids[1], "output_text": output,
            "parsed_label": "1", "label_text": label_text, "candidates": {"1": label_text, "0": " low."},
            **more}  # fmt: skip


@pytest.mark.parametrize("closed", ["<think>\n\n</think>\n\n", "<think></think>"])
def test_a_template_that_switches_thinking_off_is_read(tiny_probe, closed):
    example = tiny_probe.encode(told(tiny_probe.tokenizer, closed, "risk: high."))
    assert example.segment("label") is not None


def test_an_explanation_may_quote_a_mark(tiny_probe):
    for quoted in ("<think>", "</think>"):
        example = tiny_probe.encode(told(tiny_probe.tokenizer, "", f"risk: high. because of {quoted} in it"))
        label = example.segment("label")
        assert label is not None and example.text[: label.char[0]].endswith("risk:")


def test_a_label_inside_a_word_is_not_the_label(tiny_probe):
    row = told(tiny_probe.tokenizer, "", "The following is the risk: low.", "low")
    label = tiny_probe.encode(row | {"candidates": {"1": "low", "0": "high"}}).segment("label")
    assert label is not None
    example = tiny_probe.encode(row | {"candidates": {"1": "low", "0": "high"}})
    assert example.text[label.char[0] - 2 : label.char[1]] == ": low"


@pytest.mark.parametrize(
    ("own", "others"),
    [("1", ["-1", "0"]), ("+", ["-"]), ("C", ["C++"]), ("का", ["की"])],
    ids=["signs", "sign", "C", "marks"],
)
def test_labels_told_apart_by_a_sign_stay_rivals(own, others):
    assert not {comparable(own)} & {comparable(text) for text in others}
    assert comparable(f" “{own}”. ") == comparable(own)


def test_one_token_again_and_again_is_padding(tiny_probe):
    eos = tiny_probe.tokenizer.eos_token_id
    row = told(tiny_probe.tokenizer, "", "risk: high.")
    with pytest.raises(ProbeInputError, match="begin with 7 pad tokens"):
        tiny_probe.encode(row | {"prompt_ids": [eos] * 7 + row["prompt_ids"]})


@pytest.mark.parametrize(
    ("output", "given", "chain"),
    [
        (f"<think>\nIt says dinner. {LOW}</think>\n{HIGH} So.", {}, f"It says dinner. {LOW}"),
        (f"It says dinner.</think>{HIGH}", {}, "It says dinner."),
        (f"◁think▷It rained.◁/think▷ {HIGH}", {}, "It rained."),
        (f"First: it rained. {HIGH}", {"reasoning": "First: it rained."}, "First: it rained."),
        (f"It says dinner. {HIGH}", {"parsed_explanation": "It says dinner."}, "It says dinner."),
        (f"<think>It says dinner.</think>{HIGH} It rained.", {"parsed_explanation": "It rained."}, "It says dinner."),
        (f"<think>Hm. It rained.</think>{HIGH}", {"parsed_explanation": "It rained."}, "It rained."),
        (f"<think>\n\n</think>{HIGH} It rained.", {"parsed_explanation": "It rained."}, None),
        (f"{HIGH} It rained.", {"parsed_explanation": "It rained."}, None),
    ],
    ids=["think", "opened in the prompt", "kimi", "key", "explanation first", "both", "inside", "no thought", "after"],
)  # fmt: skip
def test_the_chain_that_stands_before_the_label(
    tiny_probe: Probe, tokenizer: Any, row: Any, output: str, given: dict[str, Any], chain: str | None
) -> None:
    example = tiny_probe.encode(said(tokenizer, row, output, **given))
    if chain is None:
        assert example.chain is None and example.segment("reasoning") is None
        with pytest.raises(ProbeInputError, match=r"^row-0: the row has no reasoning before its label$"):
            example.asked("reasoning")
        return
    found, label = example.chain, example.segment("label")
    assert found is not None and label is not None and found.tok[1] <= label.tok[0]
    assert example.text[slice(*found.char)] == chain and example.text[slice(*label.char)] == HIGH
    assert HIGH not in example.text[slice(*found.char)]
    asked = example.asked("reasoning")
    segment = asked.segment("explanation")
    assert asked.explanation == chain and segment is not None and segment.tok == found.tok and asked.chain == segment
    assert [s.name for s in asked.segments].count("explanation") == 1 and asked.label_text == example.label_text
    assert example.asked("explanation") is example


def test_a_hint_is_found_outside_the_post(tiny_probe: Probe, tokenizer: Any, row: Any) -> None:
    example = tiny_probe.encode(row | {"hint": "post"})
    assert example.hint is not None and example.text[slice(*example.hint)] == "post"
    assert not example.post_char[0] <= example.hint[0] < example.post_char[1]
    inside = tiny_probe.encode(row | {"hint": "it rained"}).hint
    assert inside is not None and example.post_char[0] <= inside[0] < example.post_char[1]
    with pytest.raises(ProbeInputError, match=r"^row 'row-0': hint is not in the prompt as it stands$"):
        tiny_probe.encode(row | {"hint": "nowhere"})
    with pytest.raises(ProbeInputError, match="not one of explanation, reasoning"):
        example.asked("thoughts")
