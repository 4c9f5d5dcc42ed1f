"""Thinking in the marks of many makers: no part of an answer, and no label of it is the answer's."""

import pytest

from mentalglm_jax.text import tasks, thinking
from probes.models import encode

THOUGHT = "Could be This post shows low suicide risk. Reasoning: or not"
BLOCKS = {
    "think": ("<think>", "</think>"),
    "in capitals": ("\n<THINK>\n", "\n</THINK>\n\n"),
    "with an attribute": ('<think lang="en">', "</think>"),
    "opened by the template": ("", "</think>\n"),
    "thinking": ("<thinking>", "</thinking>"),
    "Seed": ("<seed:think>", "</seed:think>"),
    "Kimi": ("◁think▷", "◁/think▷"),
    "Magistral": ("[THINK]", "[/THINK]"),
    "Cohere": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "Gemma": ("<|channel>thought\n", "<channel|>"),
    "MedGemma": ("<unused94>thought\n", "<unused95>"),
    "gpt-oss": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    "Sky-T1": ("<|begin_of_thought|>", "<|end_of_thought|>"),
}
WRAPPED = {"as it is": ("", ""), "answer": ("<answer>", "</answer>"), "box": ("<|begin_of_box|>", "<|end_of_box|>\n"),
           "answer without end": ("\n<answer>\n", "")}  # fmt: skip
SAID = {
    "label first": ("This post shows high suicide risk. Reasoning: they say so", ("high",), "they say so"),
    "label alone": ("**High**", ("high",), None),
    "explanation first": (
        "Reasoning: they say so Answer: This post shows high suicide risk.",
        ("high",),
        "they say so",
    ),
}


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("block", BLOCKS)
def test_the_label_is_the_answers(block, wrapped, said):
    (opened, closed), (before, after), (answer, labels, explanation) = BLOCKS[block], WRAPPED[wrapped], SAID[said]
    text = f"{opened}{THOUGHT}{closed}{before}{answer}{after}"
    assert thinking.spoken(text) == answer
    found = tasks.parse("suicide_risk", "en", text)
    assert (found.labels, found.explanation) == (labels, explanation)
    assert found.label_span is not None and text[slice(*found.label_span)] in answer
    assert found.label_span[0] >= len(opened + THOUGHT + closed)


@pytest.mark.parametrize("block", [name for name, (opened, _) in BLOCKS.items() if opened])
def test_thinking_that_never_ends_states_nothing(block):
    text = f"{BLOCKS[block][0]}{THOUGHT}"
    assert thinking.spoken(text) == ""
    found = tasks.parse("suicide_risk", "en", text)
    assert (found.labels, found.explanation, found.status) == (None, None, "no_label")


@pytest.mark.parametrize(
    "text",
    ["High. Reasoning: they think <b>so</b>", "High. Reasoning: the <reason>is</reason> this", "<answers>High",
     "They say <answer>High</answer> and no", "I think high"],
)  # fmt: skip
def test_what_is_no_thinking_is_kept(text):
    assert thinking.spoken(text) == text


def test_both_packages_have_the_same_marks():
    assert (thinking.OPENED, thinking.CLOSED) == (encode.OPENED, encode.CLOSED)
