"""Attacks on `probes answer` and `probes rank`: what a checkpoint says of decoding, and answers that would be lost."""

import json
from pathlib import Path

import pytest

from probes.checks.behaviour import _generate
from probes.errors import ProbeError, ProbeInputError
from probes.intake import answer as intake
from probes.intake.answer import answer, prompts
from probes.intake.rows import Reader, lay
from probes.models.encode import read_generations
from probes.probe import Probe
from tests.hostile.attack import refused, run
from tests.hostile.probes_files import clean, edit, place  # noqa: F401

POSTS = [{"id": str(at), "post": f"I fed the dog {at} times."} for at in range(4)]
LABELS = {"high": "The risk is high.", "low": "The risk is low."}
MOST = 6


def asked(folder: Path, posts=POSTS, template: str = "Post: {{ post }} Risk?"):
    reader = Reader(folder / "model")
    return lay(reader, prompts(reader, posts, template, "T"), LABELS, answered=False).rows


def ids(rows) -> list[list[int]]:
    return [row["output_ids"] for row in rows]


# Each changes what the tiny model says, where transformers is left to take it from the file.
DECODING = {
    "a penalty on repetition": {"repetition_penalty": 3.0},
    "forbidden tokens": {"suppress_tokens": [156]},
    "beams": {"num_beams": 3},
    "no pair of tokens twice": {"no_repeat_ngram_size": 1},
    "a bias": {"sequence_bias": [[[40], 100.0]]},
    "a last token": {"forced_eos_token_id": 41},
}


@pytest.mark.parametrize("said", DECODING)
def test_an_answer_is_greedy_whatever_the_checkpoint_says(said, place):  # noqa: F811
    model = Probe.from_pretrained(place / "model")
    wanted, spoken = ids(answer(model, asked(place), place / "a.jsonl", MOST)), _generate(model, [[60, 61, 62]], MOST)
    edit(place / "model" / "generation_config.json", **DECODING[said])
    other = Probe.from_pretrained(place / "model")
    assert ids(answer(other, asked(place), place / "b.jsonl", MOST)) == wanted
    assert _generate(other, [[60, 61, 62]], MOST) == spoken
    assert DECODING[said].items() <= other.model.generation_config.to_dict().items()  # it was read, and is left there


@pytest.fixture
def answered(place):  # noqa: F811
    """Four answers in a file, a model, and the bytes that must stay."""
    model = Probe.from_pretrained(place / "model")
    answer(model, asked(place), place / "g.jsonl", MOST)
    return model, place / "g.jsonl", (place / "g.jsonl").read_bytes()


LOSSES = {
    "fewer posts": (lambda p: asked(p, POSTS[:1]), r"row '1' is not among the posts of this call"),
    "other posts": (lambda p: asked(p, [{"id": "x", "post": "We had dinner."}]), r"row '0' is not among the"),
    "another prompt": (lambda p: asked(p, template="Say: {{ post }} Risk?"), r"row '0' was asked with another"),
    "another post of one id": (lambda p: asked(p, [one | {"post": "We had dinner."} for one in POSTS]),
                               r"row '0' was asked with another post or prompt"),
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_answers_that_another_call_would_lose(loss, place, answered):  # noqa: F811
    rows, says = LOSSES[loss]
    model, out, before = answered
    with pytest.raises(ProbeInputError, match=rf"g\.jsonl: {says}.*would be lost; give another --out"):
        answer(model, rows(place), out, MOST)
    assert out.read_bytes() == before


def test_a_call_that_goes_on_is_stopped_again(place, answered, monkeypatch):  # noqa: F811
    """Killed in its first write, when it has taken up one of the answers that were there."""
    model, out, before = answered
    monkeypatch.setattr(intake, "_KEPT_EVERY", 1)

    def killed(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(model, asked(place), out, MOST, progress=killed)
    assert ids(read_generations(out)) == ids(map(json.loads, before.decode().splitlines()))


def test_stop_tokens_that_changed_under_half_an_answer_file(place, answered):  # noqa: F811
    _, out, before = answered
    edit(place / "model" / "generation_config.json", eos_token_id=[5])
    with pytest.raises(ProbeInputError, match="was not written by this model and call"):
        answer(Probe.from_pretrained(place / "model"), asked(place), out, MOST)
    assert out.read_bytes() == before


@pytest.mark.parametrize("there", ["the answers themselves", "a post", "half a row", "nothing", "a directory"])
def test_pairs_over_something_else(there, place, capsys):  # noqa: F811
    out = place / ("rows.jsonl" if there == "the answers themselves" else "mine")
    if there == "a directory":
        out.mkdir()
    elif out.name == "mine":
        out.write_text({"a post": "I fed the dog", "half a row": '{"id": "a > b", "chosen_ids"', "nothing": ""}[there])
    before = None if out.is_dir() else out.read_bytes()
    outcome = run(["probes", "rank", place / "model", "--in", place / "rows.jsonl", "--out", out], capsys)
    refused(
        outcome, rf"{out}: (would be replaced, but holds no pairs of `probes rank`|is in the way|is what --in names)"
    )
    assert before is None or out.read_bytes() == before


def test_pairs_over_pairs(place, capsys):  # noqa: F811
    """They are what it writes; here no pair comes of the rows, and those that are there stay."""
    out = place / "pairs.jsonl"
    out.write_text('{"id": "a > b", "task": "", "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}\n')
    before = out.read_bytes()
    outcome = run(["probes", "rank", place / "model", "--in", place / "rows.jsonl", "--out", out], capsys)
    assert outcome.code == ProbeError.exit_code and "no pair: " in outcome.err
    assert out.read_bytes() == before
