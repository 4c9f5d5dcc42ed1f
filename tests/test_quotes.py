"""What counts as a quote is the same for both packages: `mentalglm evaluate` and `data build`, and `probes`."""

import random

import pytest

from mentalglm_jax.data.explain.quotes import find_quotes, without_quotes
from probes.citations import align

READ = {
    "straight": ('He says "I don\'t sleep".', ["I don't sleep"]),
    "curly": ("He says “I don’t sleep”.", ["I don’t sleep"]),
    "curly, closed straight": ("He says “I don't sleep\".", ["I don't sleep"]),
    "straight single": ("He says 'I don't sleep'.", ["I don't sleep"]),
    "curly single": ("He says ‘I don’t sleep’.", ["I don’t sleep"]),
    "several apostrophes": (
        "‘it’s what I’d’ve said’ and 'I can't, won't'",
        ["it’s what I’d’ve said", "I can't, won't"],
    ),
    "single beside double": ("'I don't want to' and \"nothing helps\"", ["I don't want to", "nothing helps"]),
    "a digit before": ("the 5's and 'the 90's were mine'", ["the 90's were mine"]),
    "a mark inside": ("'Never!' and ‘never?’", ["Never!", "never?"]),
    "no quote": ("It's the poster's, they don't say; it’s ‘em", []),
    "not closed": ("He says 'I don't sleep.\nIt's 'so'.", ["so"]),
    "a paragraph left open": ('He says "no.\n\nThen "yes".', ["yes"]),
    "at both ends": ("'don't'", ["don't"]),
    "German": ("„Ich will nicht“ und ‚geht’s noch‘", ["Ich will nicht", "geht’s noch"]),
    "German, English close": ("„nichts hilft” „gar nichts“", ["nichts hilft", "gar nichts"]),
    "guillemets": ("«je n'ai plus envie» et ‹rien›", ["je n'ai plus envie", "rien"]),
    "guillemets inwards": ("»ich will's nicht« und ›nichts‹", ["ich will's nicht", "nichts"]),
    "Chinese": ("写道“睡不着”，也写道‘不想活’。", ["睡不着", "不想活"]),
    "Chinese, straight": ("写道'不想活'了，又写\"累\"了", ["不想活", "累"]),
    "corners": ("「睡不着」『不想活』｢累｣", ["睡不着", "不想活", "累"]),
    "wide": ("＂睡不着＂和＇不想活＇", ["睡不着", "不想活"]),
    "Japanese": ("〝眠れない〟", ["眠れない"]),
    "backticks": ("it says `I don't sleep`", ["I don't sleep"]),
    "nested corners": ("「他说『累』了」『a「b」c』", ["他说『累』了", "a「b」c"]),
    "nested in its own kind": ("“他说“累”了”", ["他说“累”了"]),
    "single in double": ("\"she said 'I can't'\" and 'so'", ["she said 'I can't'", "so"]),
    "double in single": ("'she said \"I can't\" twice'", ['she said "I can\'t" twice']),
    "curly in curly": ("“she said ‘I can’t’ twice”", ["she said ‘I can’t’ twice"]),
    "empty": ('"" and “ ”', []),
}


def spoken(text):
    return [quote for a, b in align._quotes(text) if (quote := text[a:b].strip())]


@pytest.mark.parametrize(("text", "quotes"), READ.values(), ids=READ)
def test_both_packages_read_the_same_quotes(text, quotes):
    assert (find_quotes(text), spoken(text)) == (quotes, quotes)
    assert not any(quote in without_quotes(text) for quote in quotes)


def test_both_packages_read_the_same_of_marks_in_any_order(monkeypatch):
    titles = dict.fromkeys("《〈")
    monkeypatch.setattr(align, "_PAIRS", {mark: to for mark, to in align._PAIRS.items() if mark not in titles})
    marks = "".join(opener + closers for opener, closers in align._PAIRS.items()) + "''‘’\"\"" * 3
    rng = random.Random(0)
    for _ in range(20_000):
        text = "".join(rng.choice(marks + "ab 我1.\n\n") for _ in range(rng.randint(1, 14)))
        assert find_quotes(text) == spoken(text), repr(text)
