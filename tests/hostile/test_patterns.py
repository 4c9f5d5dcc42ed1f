"""Foreign patterns mean what they mean in PEFT and always end; our own take time linear in the post."""

import re
import time

import hypothesis
import pytest
from hypothesis import strategies as st

from mentalglm_jax.data.c_imhi import _prompt_and_post
from mentalglm_jax.data.contacts import find_contacts, scrub
from mentalglm_jax.data.explain.quotes import find_quotes, similarity, without_quotes
from mentalglm_jax.data.near import shingles
from mentalglm_jax.foreign import pattern
from mentalglm_jax.model.lora import matches, selects
from mentalglm_jax.text import tasks
from tests.timing import grows_at_most

NAMES = [f"model.layers.{n}.{m}" for n in (0, 1, 11) for m in ("self_attn.q_proj", "mlp.gate_up_proj")] + ["lm_head"]
PIECES = ["q_proj", "gate", "layers", r"\.", ".", "model", "0", "1", "[01]", r"\d", r"\w", "_", "[^.]", r"\b", "^", "$"]
EXPRESSIONS = st.recursive(
    st.sampled_from(PIECES),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{1,2}", "{2}"])).map(lambda p: f"(?:{p[0]}){p[1]}"),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
    ),
    max_leaves=6,
)


@hypothesis.settings(max_examples=400)
@hypothesis.given(EXPRESSIONS)
def test_the_same_meaning_as_in_peft(expression):
    for name in NAMES:
        assert selects(expression, name) == (re.fullmatch(expression, name) is not None)
        assert matches(expression, name) == (re.match(rf"(.*\.)?({expression})$", name) is not None)


@pytest.mark.parametrize(
    "expression",
    [r"(a+)+$", r"(a|aa)+$", r"(.*)*!", r"([a-z_.0-9]+)*!", r"(.*.*.*.*.*.*.*.*)!", r"(a?){30}a{30}", r"((a*)*)*!"],
)
def test_an_expression_that_backtracks_ends(expression):
    began = time.process_time()
    pattern(expression).fullmatch("a" * 100_000 + "b")
    assert time.process_time() - began < 5


POSTS = {
    "labels": "a.", "a word": "a", "addresses": "a@b.co ", "www": "www.", "dots": ".", "dashes": "-", "at": "x@",
    "tags": "<b ", "messenger": "qq", "digits": "1", "hosts": "a.com ", "users": "u/", "opening marks": "“",
    "closing marks": "”", "straight marks": '"', "corner marks": "「", "apostrophes": " 'a", "contractions": "'a'b",
    "guillemets": "»", "Chinese": "我",
    "spaces": " ", "lines": "\n", "reasons": "Reasoning: ", "answers": "Answer: ", "combining": "e\u0301",
}  # fmt: skip
WORST = ("labels", "addresses", "hosts", "opening marks")
LINEAR = {
    "find_contacts": find_contacts,
    "scrub": scrub,
    "find_quotes": find_quotes,
    "without_quotes": without_quotes,
    "quotes in a post": lambda text: similarity("“I never sleep at all”", text),
    "a post as a quote": lambda text: similarity(text, "I never sleep at all " * 10_000),
    "shingles": lambda text: shingles(text, "zh"),
    "parse an answer": lambda text: tasks.parse("suicide_risk", "en", text),
    "where C-IMHI's post is": lambda text: _prompt_and_post(text, ""),
    "where C-IMHI's post is, asked": lambda text: _prompt_and_post("自杀风险", text),
}


@pytest.mark.parametrize("function", LINEAR)
@pytest.mark.parametrize(
    "post", [post if post in WORST else pytest.param(post, marks=pytest.mark.slow) for post in POSTS]
)
def test_linear_in_the_post(function, post):
    """50,000 and 200,000 characters: a quadratic function takes 16 times as long, a linear one 4."""
    text = POSTS[post] * 200_000
    grows_at_most(lambda length: LINEAR[function](text[:length]), 50_000, 200_000, 10, spare=0.05)
