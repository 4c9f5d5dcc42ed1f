"""Answers, explanations and posts that are made to take the square of their length: of time, or of memory."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from mentalglm_jax.data.rationales import iter_cnsd
from mentalglm_jax.data.records import MOST_SPANS, Record
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate import explanations
from mentalglm_jax.evaluate.answers import Answer
from mentalglm_jax.evaluate.explanations import explanation_scores, grounding, overlap
from mentalglm_jax.text.thinking import spoken
from probes import nulls
from probes.errors import ProbeInputError, RowRefused
from probes.intake.labels import find_label, read_label
from probes.intake.rows import MOST_CANDIDATES, MOST_RECORDS, Reader, lay, read_records
from probes.models.encode import MOST_BYTES, MOST_TOKENS, _find_label, encode
from probes.models.encode import _answer as _answer_of
from probes.models.token_bytes import TokenBytes
from probes.records import comparable
from probes.report import view
from probes.results.posts import PostResult
from probes.wording import reworded
from tests.hostile.test_probes_growth import BARE, held_at_most
from tests.hostile.test_probes_growth import POST as POST_OF_A_RUN
from tests.probes.tiny import make_tokenizer
from tests.timing import grows_at_most

ROW = {"id": "x", "post": "a post", "prompt_ids": [], "output_ids": []}
POST = {"id": "a", "task": "suicide_risk", "language": "en", "question": "q", "label": "high"}


@pytest.fixture(scope="module")
def tokens() -> TokenBytes:
    return TokenBytes(make_tokenizer(["a b"], 300))


def grows(work: Callable[[int], object], short: int = 2000) -> None:
    """Four times the text, at most eight times the time (a square would be sixteen)."""
    grows_at_most(work, short, 4 * short, 8)


SPOKEN = {
    "spaces inside what wraps an answer": lambda n: "<answer>a" + " " * 4 * n + "b",
    "answers that are opened": lambda n: "<answer>" * n,
    "thoughts that are opened": lambda n: "<think a" * n,
    "thoughts that end": lambda n: "</think>" * n,
}


@pytest.mark.parametrize("attack", SPOKEN)
def test_an_answer_is_found_in_linear_time(attack):
    grows(lambda n: spoken(SPOKEN[attack](n)), 8000)


LAID: dict[str, Callable[[int], object]] = {
    "thoughts that end before a label": lambda n: _answer_of({"label_text": "high"}, "p" + "</think>" * n + "high", 1),
    "a label of equal letters": lambda n: _find_label("a" * 2 * n, "a" * n, 0, "x"),
}


@pytest.mark.parametrize("attack", LAID)
def test_a_row_is_laid_out_in_linear_time(attack):
    grows(LAID[attack], 8000)


LABELS: dict[str, Callable[[int], tuple[str, dict[str, str]]]] = {
    "equal letters that are nearly a label": lambda n: ("a" * 4 * n, {"x": "a" * 2 * n + "b"}),
    "equal letters that are a label in a word": lambda n: ("a" * 4 * n, {"x": "a" * 2 * n}),
    "a label that is stated without end": lambda n: ("high. " * n, {"x": "high"}),
    "a word that is no label anywhere": lambda n: ("is a high, " * n, {"x": "high", "y": "a"}),
    "a word that is named in other words": lambda n: ("no risk. " * n, {"x": "risk", "y": "no risk"}),
    "letters without case": lambda n: ("难" * 4 * n, {"x": "难" * 2 * n + "b"}),
}


@pytest.mark.parametrize("attack", LABELS)
def test_a_label_is_read_in_linear_time(attack):
    grows(lambda n: read_label(*LABELS[attack](n)), 1000)


class _Reader(Reader):
    """Of ``probes rows``, without a model directory."""

    def __init__(self, tokens: TokenBytes) -> None:
        self.token_bytes, self.template, self.name = tokens, None, "it"


def test_candidates_without_end(tokens):
    one = {"prompt": "a post", "post": "a post", "answer": "x", "candidates": {str(n): "b" for n in range(2000)}}
    with pytest.raises(ProbeInputError, match=f"record '1': 2000 candidates, at most {MOST_CANDIDATES}"):
        lay(_Reader(tokens), [one])
    many = one | {"answer": "x" * 60_000, "candidates": {str(n): "b" for n in range(900)}}
    with pytest.raises(ProbeInputError, match="an answer of 60000 characters with 900 candidates is too long"):
        lay(_Reader(tokens), [many])


def test_more_tokens_than_any_model_reads(tokens):
    with pytest.raises(RowRefused, match=f"{MOST_TOKENS + 1} tokens, which no model reads"):
        encode(ROW | {"prompt_ids": [1], "output_ids": [1] * MOST_TOKENS}, tokens)


def test_a_token_that_is_a_book(tokens):
    """Two files: a tokenizer with a long token, and a row that says it often."""
    tokenizer = make_tokenizer(["a b"], 300)
    tokenizer.add_tokens(["b" * 50_000])
    long = TokenBytes(tokenizer)
    ids = [tokenizer.convert_tokens_to_ids("b" * 50_000)] * 2000
    with held_at_most(300), pytest.raises(RowRefused, match=f"bytes of text, at most {MOST_BYTES} are read"):
        encode(ROW | {"prompt_ids": long.encode("a post"), "output_ids": ids}, long)


def test_a_table_of_endless_rows(tmp_path):
    """Two bytes a row, two kilobytes of memory."""
    (tmp_path / "posts.txt").write_text("a\n" * (MOST_RECORDS + 1))
    with pytest.raises(ProbeInputError, match=rf"posts\.txt: more than {MOST_RECORDS} records"):
        read_records(tmp_path / "posts.txt")


def _answer(post: str, explanation: str, **more: Any) -> Answer:
    return Answer(Record(post=post, **POST | more), ("high",), explanation, "ok")


def test_quotes_as_long_as_the_post():
    """Each letter of the one was compared with each of the other."""
    post, quote = "ab" * 100_000, "cd" * 100_000
    assert grounding(quote, post) == 0
    assert grounding(post[:150_000], post) == 1
    found = explanation_scores([_answer(post, " ".join(f"“{quote[:900]}{n}”" for n in range(3000)))])
    assert found["quotes_grounded_rate"] == 0 and found["with_quote_rate"] == 1


def test_references_as_long_as_books(monkeypatch):
    """ROUGE-L kept a table of the product of both lengths: here 12 GB."""
    monkeypatch.setattr(explanations, "MOST_UNITS", 100)
    with held_at_most(50):
        found = overlap([("a b " * 20_000, "b c " * 20_000)], "en")["word"]
    assert 0.4 < found["rouge1"] < 0.6


def test_many_explanations_as_long_as_are_compared():
    """Each took the product of both lengths, a second of Python and more: a file of 16 MB an hour."""
    grows_at_most(lambda size: overlap([("a b " * size, "b a c " * size)], "en"), 100, 1000, 30)


def test_what_stands_in_the_same_order_is_that_of_the_table():
    draw = random.Random(0)
    for _ in range(200):
        reference, said = ([draw.choice("abcd") for _ in range(draw.randrange(30))] for _ in range(2))
        table = RougeScorer(["rougeL"], tokenizer=_Words()).score(" ".join(reference), " ".join(said))
        assert overlap([(" ".join(reference), " ".join(said))], "en")["word"]["rougeL"] == pytest.approx(
            table["rougeL"].fmeasure, abs=1e-12)  # fmt: skip


class _Words:
    tokenize = staticmethod(str.split)


@pytest.mark.parametrize("name", ["cues", "decoys", "rationales"])
def test_cues_that_are_the_post_again_and_again(name, tokens):
    post = "难过" * 5000
    spans = [[at, len(post)] for at in range(900)]
    with pytest.raises(InputError, match=rf"record 'a': {name}: 900 spans; at most"):
        Record.from_dict(POST | {"post": post, name: spans})
    with pytest.raises(InputError, match=rf"record 'a': {name}: {MOST_SPANS + 1} spans"):
        Record.from_dict(POST | {"post": post, name: [[0, 1]] * (MOST_SPANS + 1)})
    row = ROW | {"post": post, "prompt_ids": tokens.encode(post), "output_ids": tokens.encode("high"), name: spans}
    with pytest.raises(RowRefused, match=f"'{name}' marks the post more than 100 times over"):
        encode(row, tokens)


def _users(folder: Path, given: str, said: str) -> Path:
    text = json.dumps({"1": {"inpput": given, "output": said}}, ensure_ascii=False)
    (folder / "CNSD_dataset.json").write_text(text, "utf-8")
    return folder


ANALYSES: dict[str, Callable[[int], str]] = {
    "a verdict far away": lambda n: "答案：" + " " * 4 * n + "答案：是",
    "evidence that never closes": lambda n: "答案：是" + "text_1[" * n,
    "digits without end": lambda n: "答案：是 text_" + "1" * 4 * n,
}


@pytest.mark.parametrize("attack", ANALYSES)
def test_an_analysis_is_read_in_linear_time(attack, tmp_path):
    make = ANALYSES[attack]
    grows(lambda n: list(iter_cnsd(_users(tmp_path, "text_1: 难过", make(n)))), 8000)


def test_an_analysis_that_names_phrases_without_end(tmp_path):
    with pytest.raises(InputError, match="user '1', field 'output': names more than 1000 phrases"):
        list(iter_cnsd(_users(tmp_path, "text_1: 难过", "答案：是" + "text_1[开心]" * 2000)))


# --- what stands beside an answer: ids, candidates, citations of a made-up run ---


def _alternating(n: int) -> np.ndarray:
    return nulls.shifted_sums(np.ones(4 * n), np.arange(4 * n) % 2 == 0)


def _cited(times: int) -> list[dict[str, Any]]:
    """A post of 20,000 blocks, all of it cited so many times."""
    cited = [POST_OF_A_RUN["citations"][0] | {"id": f"c{n}", "post_char": [[0, 20_000]]} for n in range(times)]
    made = POST_OF_A_RUN | BARE | {"length": 20_000, "units": [[0, 20_000]], "citations": cited}
    return view.groups(PostResult.from_dict(made))


BESIDE: dict[str, tuple[Callable[[int], object], int]] = {
    "an id or label on a page": (lambda n: view.visible("\u597d" * n), 40_000),
    "marks behind a candidate": (lambda n: comparable("a" + "?" * n), 60_000),
    "marks before a candidate": (lambda n: comparable("\u201c" * n + "a"), 60_000),
    "marks behind a candidate that is looked for": (lambda n: find_label("a", "a" + "?" * n, (0, 1)), 60_000),
    "a candidate of marks": (lambda n: reworded("x", "?" * n + "!" + "?" * n, ["?" * n + ";" + "?" * n]), 40),
    "citations of all of a post": (_cited, 25),
    "a citation of every other character": (_alternating, 2000),
}


@pytest.mark.parametrize("attack", BESIDE)
def test_what_stands_beside_an_answer_is_shown_and_compared_in_linear_time(attack):
    grows(*BESIDE[attack])
