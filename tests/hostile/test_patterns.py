"""Foreign patterns mean what they mean in PEFT and always end; our own take time linear in the post."""

import re
import time
import warnings

import hypothesis
import pytest
from hypothesis import strategies as st

from mentalglm_jax.data.c_imhi import _prompt_and_post
from mentalglm_jax.data.contacts import find_contacts, scrub
from mentalglm_jax.data.explain.quotes import find_quotes, similarity, without_quotes
from mentalglm_jax.data.near import shingles
from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import pattern
from mentalglm_jax.model.lora import LoraConfig, matches, selects
from mentalglm_jax.text import tasks
from probes.errors import ProbeInputError
from probes.models.patterns import ending, linear
from tests.timing import grows_at_most

NAMES = [f"model.layers.{n}.{m}" for n in (0, 1, 11) for m in ("self_attn.q_proj", "mlp.gate_up_proj")] + ["lm_head"]
PIECES = ["q_proj", "gate", "layers", r"\.", ".", "model", "0", "1", "[01]", r"\d", r"\w", "_", "[^.]", r"\b", "^", "$"]
ODD = [")|(", ")", "(", "\\", "|", "(?i:", "(?i)", "(?x)", "#", "(?x: #", "\n", "(?#", "ı", "İ", "Q_PROJ", "]", "["]
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


@hypothesis.settings(max_examples=600)
@hypothesis.given(st.lists(st.one_of(EXPRESSIONS, st.sampled_from(ODD)), min_size=1, max_size=5).map("".join))
@hypothesis.example("model)|(zzz")
@hypothesis.example("zzz)|(.*")
@hypothesis.example("(?i:layers.0.self_attn.q_proj|lm_head|gate_up_prıj)")
@hypothesis.example("(?i:self_attn.q_proj|lİm_head)")
def test_what_is_read_at_all_means_what_it_means_in_peft(key):
    """A stray bracket, a remark, a flag or a letter that engines fold apart may be refused, never read otherwise."""
    for ours, wrapped, whole in (
        (lambda: [selects(key, name) for name in NAMES], key, re.fullmatch),
        (lambda: [matches(key, name) for name in NAMES], rf"(.*\.)?({key})$", re.match),
        (lambda: [linear(key, "here").fullmatch(name) is not None for name in NAMES], key, re.fullmatch),
        (lambda: [ending(key, "here").fullmatch(name) is not None for name in NAMES], rf"(.*\.)?({key})$", re.match),
    ):  # fmt: skip
        try:
            found = ours()
        except (InputError, ProbeInputError):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert found == [whole(wrapped, name) is not None for name in NAMES]


@pytest.mark.parametrize("key", ["model)|(zzz", ")", "(", "a)(b", "q_proj\\", "q_proj)#(", "(?#q_proj"])
def test_a_key_that_is_no_expression_by_itself_is_refused(key):
    for pair in ({"rank_pattern": ((key, 2),)}, {"alpha_pattern": ((key, 2.0),)}):
        with pytest.raises(InputError, match=f"^LoRA: {re.escape(repr(key))} is not a regular expression"):
            LoraConfig(**pair)
    with pytest.raises(ProbeInputError, match=f"^here: {re.escape(repr(key))} is no regular expression"):
        ending(key, "here")


@pytest.mark.parametrize("letter", ["ı", "İ", "ſ", "\u212a"])
def test_letters_beyond_ascii_are_not_folded(letter):
    for key in (f"(?i:{letter})", f"(?i){letter}", f"(?s-m:x)|(?mi-s:[{letter}])"):
        with pytest.raises(InputError, match=r"write letters beyond ASCII without \(\?i"):
            pattern(key)
        with pytest.raises(ProbeInputError, match=r"write letters beyond ASCII without \(\?i"):
            linear(key, "here")
    assert pattern(letter).fullmatch(letter)
    assert linear(letter, "here").fullmatch(letter)


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
