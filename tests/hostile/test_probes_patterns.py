"""Patterns in tokenizer.json, which a backtracking engine matches with every post: at most quadratic by their form,
and given up after a time whatever their form says. Those of published tokenizers pass."""

import threading
import time

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from probes.errors import ProbeInputError
from probes.models import tokenizer as module
from probes.models.patterns import backtracks
from probes.models.tokenizer import text_ids

_WORD = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_FRONT = r"[^\r\n\p{L}\p{N}]?"
PUBLISHED = {
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_FRONT}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "DBRX": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+",
    "o200k": rf"{_FRONT}{_WORD}*{_SMALL}+{_ENDS}|{_FRONT}{_WORD}+{_SMALL}*{_ENDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+"
             rf"[\r\n/]*|{_SPACES}",
    "Kimi K2": rf"[\p{{Han}}]+|{_FRONT}[\p{{Lu}}&&[^\p{{Han}}]]*[\p{{Ll}}&&[^\p{{Han}}]]+{_ENDS}|{_SPACES}",
    "DeepSeek V3": rf"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{{|}}~][A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
                   rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    "DeepSeek LLM": r"\s+$", "DeepSeek LLM, Han": r"[一-龥ࠀ-一가-퟿]+",
    "DeepSeek LLM, marks": r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    "BLOOM": r" ?[^(\s|[.,!?…。，、।۔،])]+", "Falcon": r"[0-9][0-9][0-9]", "thousands": r"\d{1,3}(?=(?:\d{3})*\b)",
    "CLIP": r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "SentencePiece": " {2,}",
}  # fmt: skip
CUBE, SQUARED = "2 unbounded repeats follow each other", "ways at each place"
TRAPS = {
    "nested": (r"(a+)+b", "repeats a group whose"), "alternatives": (r"(a|aa)+b", "repeats a group whose"),
    "a cube": (r"a*a*b", CUBE), "the fourth power": (r"x*x*x*x*y", "4 unbounded repeats"),
    "apart": (r"\w+ ?\w+!", CUBE), "by lazy ones": (r"a*?a+?b", CUBE), "by possessive ones": (r"a++.*b", CUBE),
    "in groups": (r"(?:a*)(?:a*)b", CUBE), "in a look ahead": (r"a*(?=.*b)c", CUBE), "optional": (r"(?:a+)?a+b", CUBE),
    "in a look behind": (r"(?<!a*)a*b", CUBE), "counted without end": (r"a{1,}a{2,}b", CUBE),
    "counted far": (r"a{1,99}a{1,99}b", CUBE), "counted exactly": (r"a{5000}a{5000}b", CUBE),
    "by {,n}": (r"a{,99}a{,99}b", CUBE), "counted near": (r"a{1,20}a{1,20}a{1,20}b", f"in 8e+03 {SQUARED}"),
    "30 choices": ("a?" * 30 + "b", f"in 1.07e+09 {SQUARED}"), "20 pairs": ("(?:a|a)" * 20 + "b", "in 1.05e+06 ways"),
    "choices and a repeat": ("a?" * 6 + "a*b", f"in 64 {SQUARED}"),
    "a group of choices": (r"(?:a{0,3})*b", "repeats a group"), "a reference": (r"(a*)\1", "refers back"),
    "by name": (r"(?<n>a*)\k<n>", "refers back"), "a call": (r"(?<n>a)\g<n>", "refers back"),
    "a comment": (r"(?#()a*", "a group begins with"), "absence": (r"(?~ab)c", "a group begins with"),
    "a condition": (r"(?(1)a*|b)", "a group begins with"), "free spacing": (r"(?x: a # ()", "a group begins with"),
    "clusters": (r"\X*", r"it holds \X"), "keep": (r"a*\Kb", r"it holds \K"),
    "a repeat of a repeat": (r"(?:a*)*", "repeats a group"), "twice repeated": (r"a**", "repeats a repeat"),
    "possessive twice": (r"a*++", "repeats a repeat"), "counted twice": (r"a{2}{3}", "repeats a repeat"),
    "open": (r"(a", "brackets"), "closed": (r"a)", "brackets"), "an open class": (r"[a", "brackets"),
    "an open class in a class": (r"[a[b]", "brackets"), "deep": ("(" * 60 + ")" * 60, "50 deep"),
    "long": ("a" * 20_000, "20000 characters"), "behind a class": (r"[]]a*a*b", CUBE),
    "behind an escape": (r"\[a*a*b]", CUBE), "behind a property": (r"\p{L}*\p{L}*b", CUBE),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name):
    assert backtracks(PUBLISHED[name]) is None


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap(name):
    pattern, says = TRAPS[name]
    why = backtracks(pattern)
    assert why is not None and says in why


def splitting(pattern):
    """A tokenizer that does nothing else."""
    core = Tokenizer(models.WordLevel({"x": 0}, "x"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("pattern", [r"a+b", r"\s+$", r"(?:ab)+c", r"a?a?a+b", r"(?=a*b)c", PUBLISHED["o200k"]])
def test_what_is_let_through_takes_quadratic_time_at_most(pattern):
    assert backtracks(pattern) is None
    tokenizer = splitting(pattern)
    for post in ("a", " ", "ab", "A", "\n"):
        began = time.process_time()
        text_ids(tokenizer, post * (2000 // len(post)))
        assert time.process_time() - began < 2


def test_a_text_that_takes_too_long_is_given_up(monkeypatch):
    """The library works without Python's lock, or this would come with its end."""
    monkeypatch.setattr(module, "_LONGEST", 0.1)
    before = set(threading.enumerate())
    with pytest.raises(ProbeInputError, match=r"needs more than 0\.1 s for a text of 12001 characters; take the"):
        text_ids(splitting(r"a+\z"), "a" * 12_000 + "b")
    (left,) = set(threading.enumerate()) - before  # still at it
    monkeypatch.undo()
    assert text_ids(splitting(r"a"), "a" * 2500) == [0] * 2500
    left.join()  # no other test has it beside it


def test_a_tokenizer_that_gives_up_is_a_refusal():
    def panic(text, add_special_tokens):
        raise BaseException("a panic")

    for text in ("a", "a" * 3000):
        with pytest.raises(ProbeInputError, match="the tokenizer: cannot encode a text"):
            text_ids(panic, text)
