"""A tokenizer that normalises what it reads: posts, and spans in them, are followed through; or the row is left out."""

import json
import unicodedata
from typing import Any

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers

from probes.errors import ProbeInputError, RowRefused
from probes.intake.rows import Reader, lay
from probes.models.reading import read
from probes.models.token_bytes import TokenBytes
from probes.suite import lay_out
from tests.probes.tiny import LABELS, make_row

RULES = {
    "NFC": normalizers.NFC(),
    "NFKC": normalizers.NFKC(),
    "lower": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
}
POST = "Cafe\u0301 ＡＢ：ﬁne, I can't see a way out. 한국 ㎏"


def normalising(tokenizer: Any, rule: Any) -> TokenBytes:
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.normalizer = rule
    return TokenBytes(
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
        )
    )


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("aÉ e\u0301\u0323ｶﾞ①㎏ﬁİ가각ᄀ\u1161\u11a8글中。🏳\u200d\ufe0f\u0344Ω"), max_size=12))
@example(text="\u0301a")
@example(text="a\uff9e\u0301")
def test_the_map_is_exact_for_any_text(name: str, text: str) -> None:
    core = Tokenizer(models.BPE())
    core.normalizer = RULES[name]
    found = read(core, text)
    whole = RULES[name].normalize_str(text)
    assert found is not None and found.text == whole and len(found.begins) == len(text)
    for at in range(len(text)):  # each piece read alone is what stands there
        low, high = found.span((at, at + 1))
        piece = "".join(c for c, b, e in zip(text, found.begins, found.ends, strict=True) if (b, e) == (low, high))
        assert RULES[name].normalize_str(piece) == whole[low:high]


@pytest.mark.parametrize("name", RULES)
def test_a_post_is_found_as_it_was_read(tokenizer: Any, name: str) -> None:
    token_bytes = normalising(tokenizer, RULES[name])
    row = make_row(token_bytes.tokenizer, 0, "en", POST, "Cafe\u0301")
    a = POST.index("ﬁne")
    row |= {"rationales": [[a, a + 3], [0, 1]], "prompt_ids": token_bytes.plain(f"<|user|> {POST} Risk?<|assistant|>")}
    row |= {"parsed_explanation": None, "label_text": RULES[name].normalize_str(row["label_text"])}
    laid, skipped = lay_out(_Encoder(token_bytes), [row])
    assert not skipped
    found = laid[0]
    assert found.post == RULES[name].normalize_str(POST) != POST
    assert found.text[slice(*found.post_char)] == found.post
    assert found.cues is not None and found.rationales is not None
    said = [
        unicodedata.normalize("NFKC", found.post[slice(*span)]).lower() for span in (*found.cues, *found.rationales)
    ]
    assert said == ["café", "fine", "c"]


class _Encoder:
    """What ``lay_out`` asks of a probe."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self.token_bytes = token_bytes

    def encode(self, row: dict[str, Any]) -> Any:
        from probes.models.encode import encode

        return encode(row, self.token_bytes)


def test_one_that_cannot_be_followed_is_left_out_and_counted(tokenizer: Any) -> None:
    """A rule that looks at the ends of a text reads its pieces otherwise than the whole."""
    token_bytes = normalising(tokenizer, normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]))
    posts = ["e\u0301 fine\u0301 ", "It was fine"]
    rows = [make_row(token_bytes.tokenizer, at, "en", post, "fine") for at, post in enumerate(posts)]
    for row, post in zip(rows, posts, strict=True):
        row["prompt_ids"] = token_bytes.plain(f"<|user|>{post}Risk?<|assistant|>")
    laid, skipped = lay_out(_Encoder(token_bytes), rows)
    assert [one.id for one in laid] == ["row-1"]
    assert [one["reason"] for one in skipped] == ["the tokenizer normalises the post"]


def test_rows_from_plain_text_are_read_as_the_tokenizer_reads(tokenizer: Any) -> None:
    reader = object.__new__(Reader)  # no directory: its tokenizer is the tiny one with another rule
    reader.name, reader.token_bytes, reader.template = "tiny", normalising(tokenizer, RULES["NFKC"]), None
    record = {"id": "a", "prompt": f"Ｐｏｓｔ：{POST} Risk?", "post": POST, "label": "high", "rationales": [[0, 5]],
              "hint": "Ｐｏｓｔ", "answer": f"\n{LABELS['en']['high']} It says “ＡＢ：ﬁne”."}  # fmt: skip
    laid = lay(reader, [record], LABELS["en"])
    assert not laid.left_out
    row = laid.rows[0]
    assert row["post"] == unicodedata.normalize("NFKC", POST) and row["rationales"] == [[0, 4]]
    assert row["parsed_explanation"] == "It says “AB:fine”." and row["hint"] == "Post" and json.dumps(row)
    with pytest.raises(ProbeInputError, match=r"record 'a': key 'rationales' must be a list of \[start, end\)"):
        lay(reader, [record | {"rationales": [3]}], LABELS["en"])
    with pytest.raises((RowRefused, ProbeInputError), match="is not inside the post of"):
        lay(reader, [record | {"rationales": [[0, 999]]}], LABELS["en"])
