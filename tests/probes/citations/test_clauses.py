"""Clauses, and which tokens go with which."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from probes.citations.clauses import choose_cut, clause_tokens, clauses, pieces, words
from probes.models.encode import encode
from probes.models.token_bytes import TokenBytes
from tests.probes.tiny import make_row


def texts(post: str, **limits: int) -> list[str]:
    return [post[a:b] for a, b in clauses(post, **limits)]


@pytest.mark.parametrize(
    ("post", "wanted"),
    [
        ("昨晚又没睡好，下着雨。感觉没有意义！", ["昨晚又没睡好，", "下着雨。", "感觉没有意义！"]),
        ("我好累😭睡不着…想哭", ["我好累😭", "睡不着…", "想哭"]),
        ("好累。😭😭睡不着", ["好累。", "😭😭", "睡不着"]),
        ("我好累 睡不着", ["我好累 ", "睡不着"]),
        ("我好累,睡不着", ["我好累,", "睡不着"]),
        ("It rained. I am late, again", ["It rained.", " I am late,", " again"]),
        ("It is 3.5 or 1,000 e.g now", ["It is 3.5 or 1,000 e.g now"]),
        ("one\ntwo", ["one\n", "two"]),
        ("……我好累", ["……我好累"]),
        ("好累！！！ ", ["好累！！！ "]),
        ("。", ["。"]),
        ("", []),
    ],
)
def test_clauses(post: str, wanted: list[str]) -> None:
    assert texts(post) == wanted


def test_long_clauses_are_cut_at_spaces() -> None:
    post = "this sentence goes on and on without any punctuation whatsoever until it stops"
    found = texts(post, max_width=48)
    assert len(found) == 2 and found[0].endswith(" ") and "".join(found) == post
    assert [len(text) for text in texts("字" * 50, max_width=48)] == [16, 17, 17]


def test_short_neighbours_are_joined_down_to_the_limit() -> None:
    post = "，".join(["字" * 9] * 40 + ["短"] * 4)
    found = clauses(post, max_units=30)
    assert len(found) == 30
    assert max(b - a for a, b in found) <= 20
    assert texts("a. b. c.", max_units=1) == ["a. b. c."]


@given(st.text(max_size=300), st.integers(1, 30))
def test_clauses_cover_any_text_once(post: str, limit: int) -> None:
    found = clauses(post, max_units=limit)
    assert len(found) <= limit
    assert all(a < b for a, b in found)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(found))
    assert not post or (found[0][0] == 0 and found[-1][1] == len(post))


def test_token_of_comma_and_word_goes_with_the_word() -> None:
    """GLM's split keeps a comma and the word after it together, so one token often spans two clauses."""
    merges = [("ï¼", "Į"), ("æĪ", "ĳ"), ("ï¼Į", "æĪĳ")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = [*alphabet, "ï¼", "æĪ", *(a + b for a, b in merges)]
    core = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(vocab)}, merges=[("ï", "¼"), ("æ", "Ī"), *merges])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    example = encode(make_row(tokenizer, 0, "zh", "累，我走", "累"), TokenBytes(tokenizer))
    spans, unit = clause_tokens(example)
    assert spans == [(0, 2), (2, 4)]
    assert unit.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_clause_without_a_token_of_its_own_joins_the_next() -> None:
    merges = [("ç", "´"), ("ç´", "¯"), ("ï", "¼"), ("ï¼", "Į"), ("ç´¯", "ï¼Į"), ("ç´¯ï¼Į", "ç´¯ï¼Į")]
    vocab = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocab)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    example = encode(make_row(tokenizer, 0, "zh", "累，累，ok", "ok"), TokenBytes(tokenizer))
    assert [example.post[a:b] for a, b in clauses(example.post)] == ["累，", "累，", "ok"]
    spans, unit = clause_tokens(example)
    assert spans == [(0, 4), (4, 6)] and unit.tolist() == [0, 1, 1]


LONG, SHORT = "I went out, I came home, it rained, I slept.", "I went out. It rained. I could not sleep at all."


@pytest.mark.parametrize(
    ("posts", "cut"),
    [([LONG], "clause"), ([SHORT], "word"), ([LONG, SHORT], "clause"), ([LONG, SHORT, SHORT], "word"),
     ([LONG] * 3 + [SHORT], "clause")],
)  # fmt: skip
def test_one_unit_for_a_data_set(posts: list[str], cut: str) -> None:
    assert choose_cut(posts) == cut
    for post in posts:
        whole = len(pieces(post, cut=cut))
        assert whole == len(clauses(post) if cut == "clause" else words(post)) and whole >= 3
