"""Index maps between a text and its normalised copy hold for any string."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.citations.normalise import normalise

ANY = st.text(alphabet=st.characters(), max_size=60)  # surrogates, controls, everything
TRICKY = st.text(
    alphabet=st.sampled_from(
        list("aB́ ﬁＡ①한ᄒ\u1161\u11abが\u3099゙。\u200b\u202e👩\u200d🔬\ufe0f'’\"“”「」…症抑ß½\ud800")
    ),
    max_size=40,
)


@settings(max_examples=400, deadline=None)
@given(st.one_of(ANY, TRICKY))
def test_index_maps_round_trip(text):
    norm = normalise(text)
    assert len(norm.start) == len(norm.end) == len(norm.text)
    assert norm.index[0] == 0 and norm.index[-1] == len(norm.text) and (np.diff(norm.index) >= 0).all()
    for i in range(len(norm.text)):
        a, b = norm.to_source(i, i + 1)
        assert 0 <= a < b <= len(text)
        x, y = norm.from_source(a, b)
        assert x <= i < y
        assert normalise(text[a:b]).text == norm.text[x:y]  # the source span alone normalises to the same characters


@settings(max_examples=200, deadline=None)
@given(st.one_of(ANY, TRICKY))
def test_normalisation_ignores_width_case_and_invisible_characters(text):
    once = normalise(text).text
    assert normalise("".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)).text == once
    assert normalise("".join(c.upper() if c.isascii() else c for c in text)).text == once
    assert normalise("\u200b" + text + "\u202e，").text == once
