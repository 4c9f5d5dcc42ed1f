"""A label in other words than its candidate's is compared with the other candidates in those words, or not at all."""

from typing import Any

import pytest

from mentalglm_jax.text import tasks
from probes.probe import Probe
from probes.wording import reworded
from tests.probes.tiny import make_row

HIGH, LOW = "This post shows high suicide risk.", "This post shows low suicide risk."
高, 低 = "这个帖子体现了高自杀风险。", "这个帖子体现了低自杀风险。"


@pytest.mark.parametrize(
    ("written", "own", "other", "wanted"),
    [
        ("High.", HIGH, LOW, "Low."),
        ("**HIGH**", HIGH, LOW, "**LOW**"),
        (" high suicide risk", HIGH, LOW, " low suicide risk"),
        ("This post shows **high** suicide risk", HIGH, LOW, "This post shows **low** suicide risk"),
        ("ｈｉｇｈ", HIGH, LOW, "low"),
        ("**高**", 高, 低, "**低**"),
        ("高自杀风险", 高, 低, "低自杀风险"),
        ("level 1", "It is of level 1.", "It is of level 10.", "level 10"),
        ("10级", "等级是10级。", "等级是1级。", "1级"),
        ("Yes, she is **ill**", "Yes, she is ill.", "No, she is not ill.", "No, she is not **ill**"),
        ("Low risk", "low risk", "very low risk", "Very low risk"),
        ("-1", "-1", "1", "1"),
        # what says more, or less, than its own sentence does has no like
        ("not high", HIGH, LOW, None),
        ("highly", HIGH, LOW, None),
        ("high, high", HIGH, LOW, None),
        ("low", HIGH, LOW, None),
        ("没有高自杀风险", 高, 低, None),
        (HIGH, "High.", LOW, None),
        ("", HIGH, LOW, None),
        ("high", HIGH, " ", None),
    ],
)
def test_one_label_in_anothers_words(written: str, own: str, other: str, wanted: str | None) -> None:
    assert reworded(written, own, [other]) == (None if wanted is None else (wanted,))


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", ["suicide_risk", "suicide_level", "cognitive_distortion", "cognitive_pathway"])
def test_what_the_trainer_reads_as_a_label_has_its_rivals(name: str, language: str) -> None:
    """Every short form that ``parse`` reads as one label reads, with another's name in it, as the other label."""
    task = tasks.get_task(name)
    candidates = task.candidates(language)
    head, tail = (part.rstrip(".。") for part in task.templates[language].split("{}"))
    for label in task.labels:
        others = {key: text for key, text in candidates.items() if key != label.key}
        said = label.name(language)
        for written in (said, f"**{said}**", f"{said}.", said.upper(), f"{said}{tail}", f"{head}{said}{tail}"):
            assert task.read_short(written, language) == (label.key,)
            found = reworded(written, candidates[label.key], list(others.values()))
            assert found is not None, written
            assert [task.read_short(text, language) for text in found] == [(key,) for key in others]


@pytest.mark.parametrize("written", ["High.", "**high**", "The suicide risk of this user is HIGH"])
def test_what_is_scored_is_what_the_model_wrote(tiny_probe: Probe, tokenizer: Any, written: str) -> None:
    row = make_row(tokenizer, 0, "en", "We had dinner, it rained.", "dinner")
    output = f"\n{written} Reasoning: {row['parsed_explanation']}"
    example = tiny_probe.encode(row | {"output_ids": tokenizer(output)["input_ids"], "label_text": written})
    start, own, (other,), _ = tiny_probe.scorer.label_ids(example)
    assert tokenizer.decode(own).strip() == written and own == list(example.ids[start : start + len(own)])
    assert tokenizer.decode(other).strip() == {"H": "Low.", "*": "**low**"}.get(
        written[0], "The suicide risk of this user is LOW"
    )
    assert example.contrast == ("log-odds" if written.startswith("The") else "reworded")
