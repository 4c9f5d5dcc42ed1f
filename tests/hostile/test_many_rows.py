"""Files of many small rows: what is compared with each other, row by row, has a bound."""

import dataclasses
import random
import re

import pytest

from mentalglm_jax.data import tables
from mentalglm_jax.data.intake import rows as intake
from mentalglm_jax.evaluate.bertscore import read_tokenizer, rows_for
from mentalglm_jax.text import tasks
from probes import ranking
from probes.citations.clauses import pieces
from probes.errors import ProbeInputError
from probes.ranking import Answer, Rules, comparable, rank
from probes.suite import _FILLERS, _script, fillers_of
from probes.validation.selftest import closed_form_probe
from tests.hostile.attack import refused, run
from tests.hostile.foreign_files import called


@pytest.fixture(scope="module")
def probe():
    return closed_form_probe({"x": [1.0, 0.0], "y": [0.0, 1.0]}, lambda seen: seen.sum(-1))


def row(probe, name, post="x", label="A"):
    encode = probe.token_bytes.encode
    return {"id": name, "post": post, "prompt_ids": encode(f"p {post} ?"), "output_ids": encode(label),
            "label_text": label, "label": label, "candidates": {"A": "A", "B": "B"}}  # fmt: skip


def test_labels_that_nobody_knows_are_likened_only_where_they_are_shown(monkeypatch):
    """150,000 rows of them took minutes, to show six."""
    likened = []
    monkeypatch.setattr(intake, "nearest", lambda label, known: likened.append(label) or f"; near {label}")
    made = [intake.Row(str(n), f"r{n}", "post", (f"lable {n // 2}",), None, None, None, "en") for n in range(2000)]
    faults = intake.Faults()
    assert intake.records_of(made, tasks.get_task("suicide_risk"), "here", faults) == []
    assert not likened
    assert "2 with the unknown label 'lable 0'; near lable 0 (rows 0, 1)" in faults.line()
    assert len(likened) == 6


def test_long_labels_that_are_shown_alike_are_not_all_likened_to_one():
    labels = ("Belief##mental filtex", "Belief##mental fiXter", "Belief##mental filtex")
    made = [intake.Row(str(n), f"r{n}", "post", (label,), None, None, None, "en") for n, label in enumerate(labels)]
    faults = intake.Faults()
    intake.records_of(made, tasks.get_task("cognitive_pathway"), "here", faults)
    alone = intake.Faults()
    intake.records_of(made[:1], tasks.get_task("cognitive_pathway"), "here", alone)
    assert re.match(
        "1 with the unknown label text of 21 characters; did you mean 'Belief##mental filter'", alone.line()
    )
    assert re.match("3 with the unknown label text of 21 characters; known: .* .rows 0, 1, 2.$", faults.line())


def test_answers_to_one_post_without_end(probe, tmp_path, monkeypatch):
    """Each is compared with each: 10,000 rows of five megabytes were gigabytes of pairs."""
    rows = [row(probe, f"r#{number}") for number in range(ranking.MOST_ANSWERS + 1)]
    monkeypatch.setattr(ranking, "_group", lambda *_: pytest.fail("maps are made"))
    with pytest.raises(ProbeInputError, match="257 answers to the post of 'r#0' have one label; at most 256 are comp"):
        rank(probe, rows, tmp_path / "pairs.jsonl")


def test_as_many_as_are_compared_are_few_pairs():
    one = Answer({"id": "a"}, (1, 2), ranking.np.array([True, False]), 0.0, 1)
    able, _ = comparable([one] * ranking.MOST_ANSWERS, Rules())
    assert len(able) == ranking.MOST_ANSWERS * (ranking.MOST_ANSWERS - 1) < 100_000


def by_definition(examples, seed):
    """A pool for every post: quadratic."""
    cut = [[e.post[a:b] for a, b in pieces(e.post, cut=e.cut)] for e in examples]
    kinds = [(e.task, _script(e.post)) for e in examples]
    for i, kind in enumerate(kinds):
        pool = [t for j, texts in enumerate(cut) if j != i and kinds[j] == kind for t in texts]
        yield tuple(random.Random(f"{seed} {i}").sample(pool, min(_FILLERS, len(pool))))


@pytest.fixture(scope="module")
def examples(probe):
    first = probe.encode(row(probe, "a"))
    posts = [
        f"I slept {number}. I ate {number}, alone." if number % 3 else f"我睡{number}次。我累。" for number in range(60)
    ]
    return [dataclasses.replace(first, id=f"r{number}", post=post, cut="clause", task="tw"[number % 7 == 0])
            for number, post in enumerate(posts)]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 20, 60])
def test_fillers_are_those_of_the_definition(examples, count):
    assert fillers_of(examples[:count], 3) == list(by_definition(examples[:count], 3))


def test_fillers_of_many_posts(examples):
    """A pool for each was 40,000 times 40,000 posts before the first map."""
    assert len(fillers_of(examples * 667, 0)) == 40_020


LINES = {"one cell": "x" * 5000, "many cells": "," * 5000, "quoted": '"' + "x" * 5000 + '"'}


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("first", [True, False], ids=["header", "row"])
def test_a_line_of_a_table_without_end(tmp_path, capsys, monkeypatch, line, first):
    """It was read whole, however many gigabytes it had."""
    monkeypatch.setattr(tables, "_LONGEST_ITEM", 1000)
    rows = [LINES[line], "post,label", "rain,good"] if first else ["post,label", "rain,good", LINES[line]]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    command = ["mentalglm", "data", "import", tmp_path / "t.csv", "--text", "post", "--label", "label", "--out",
               tmp_path / "out"]  # fmt: skip
    refused(
        run(command, capsys), rf"t\.csv: line {1 if first else 3} has 1000 characters or more, as no row of a table"
    )


def test_a_table_is_never_held_whole_to_find_its_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_LONGEST_ITEM", 1000)
    (tmp_path / "t.csv").write_text("a,b\n" + "x" * 100_000)
    asked = []
    real = tables._Lines.readline
    monkeypatch.setattr(tables._Lines, "readline", lambda self, size=-1: asked.append(size) or real(self, size))
    refused(called(lambda: list(tables.read_table(tmp_path / "t.csv", ("utf-8",), ","))), "line 2 has 1000 characters")
    assert asked == [1000, 1000]


@pytest.mark.parametrize("words", ["[PAD]\n\n[UNK]\n[CLS]\n[SEP]\na", "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\na"])
def test_ids_of_a_vocabulary_with_gaps(tmp_path, words):
    """More than it has words: the last was read as another row of the embedding, and scored."""
    (tmp_path / "vocab.txt").write_text(words)
    tokenizer = read_tokenizer(tmp_path, 16)
    assert tokenizer.get_vocab_size() == 5 and max(tokenizer.encode("a").ids) == 5 == rows_for(tokenizer) - 1
