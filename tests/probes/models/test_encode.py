"""Bytes, characters and segments of a generated row."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from probes.errors import ProbeError, ProbeInputError
from probes.models.encode import encode, read_generations
from probes.models.token_bytes import TokenBytes, decode_bytes
from probes.probe import Probe
from probes.records import Example, Segment
from probes.saliency.attribute import Settings, attribute
from probes.suite import lay_out
from tests.probes.tiny import QUESTION, make_row


def test_bytes_of_tokens_make_the_text(tiny_probe: Probe, tokenizer, tiny_rows: list[dict[str, Any]]) -> None:
    for row in tiny_rows:
        example = tiny_probe.encode(row)
        raw = b"".join(tiny_probe.token_bytes(index) for index in example.ids)
        assert raw.decode() == example.text == tokenizer.decode(example.ids)
        assert example.byte_spans[0][0] == 0 and example.byte_spans[-1][1] == len(raw)
        assert [raw[a:b].decode() for a, b in itertools.pairwise(example.char_bytes)] == list(example.text)
        assert example.text[slice(*example.post_char)] == row["post"]


def test_segments_cover_all_tokens_and_hold_the_texts(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    for row in tiny_rows:
        example = tiny_probe.encode(row)
        names = [segment.name for segment in example.segments]
        assert names == ["template", "post", "template", "other", "label", "other", "explanation", "other"]
        assert [s.tok[0] for s in example.segments[1:]] == [s.tok[1] for s in example.segments[:-1]]
        assert example.segments[0].tok[0] == 0 and example.segments[-1].tok[1] == len(example.ids)
        for name, text in (("label", row["label_text"]), ("explanation", row["parsed_explanation"])):
            segment = example.segment(name)
            assert segment is not None and example.text[slice(*segment.char)] == text
            decoded = b"".join(tiny_probe.token_bytes(index) for index in example.ids[slice(*segment.tok)]).decode()
            assert decoded.strip() == text
        assert example.segments[2].tok[1] == example.prompt_len == len(row["prompt_ids"])


def test_tokens_that_cut_a_character(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    """The Chinese rows must exercise what breaks other tools: characters cut into several tokens."""
    example = tiny_probe.encode(tiny_rows[0])
    first, last = example.post_tok
    starts = set(example.char_bytes)
    cut = [index for index in range(first, last) if example.byte_spans[index][0] not in starts]
    assert len(cut) > 20
    emoji = example.post.index("😭")
    tokens = example.tokens_of((example.post_char[0] + emoji, example.post_char[0] + emoji + 1))
    assert tokens[1] - tokens[0] > 1
    values = np.zeros(last - first)
    values[tokens[0] - first : tokens[1] - first] = 1.5
    chars = example.post_chars(values)
    assert chars[emoji] == pytest.approx(1.5 * (tokens[1] - tokens[0]))
    assert np.delete(chars, emoji).max() == 0


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), st.data())
def test_char_values_conserve_the_sum(tiny_probe: Probe, tokenizer, post: str, data: st.DataObject) -> None:
    try:
        example = tiny_probe.encode(make_row(tokenizer, 0, "zh", post, post[:1]))
    except ProbeInputError:  # one or two characters, all of them fused with the quotation marks
        assert len(post) <= 2
        return
    first, last = example.post_tok
    values = np.array(data.draw(st.lists(st.floats(-1e3, 1e3), min_size=last - first, max_size=last - first)))
    chars = example.post_chars(values)
    assert chars.shape == (len(post),)
    assert chars.sum() == pytest.approx(values.sum(), abs=1e-9)
    begin, stop = (example.char_bytes[at] for at in example.post_char)
    assert all(
        b > begin and a < stop
        for a, b in [*example.byte_spans[first:last], *map(example.byte_spans.__getitem__, example.border)]
    )
    low, high = min((first, *example.border)), max((last, *(at + 1 for at in example.border)))
    assert example.byte_spans[low - 1][1] <= begin and example.byte_spans[high][0] >= stop
    assert not chars[~example.varied].any()


@pytest.mark.parametrize(
    ("post", "merge", "prompt", "fused", "not_varied"),
    [
        ("fine.", [(".", '"')], 'p: "{}" q', '."', [4]),
        ("fine!", [("!", '"')], 'p: "{}" q', '!"', [4]),
        ('"so', [('"', '"')], 'p: "{}" q', '""', [0]),
        ("fine.", [(".", "Ċ")], "p: {}\nq", ".\n", [4]),
        ("fine", [("e", "<")], "p: {}<q>", "e<", [3]),
        ("he", [('"', "h"), ("e", '"')], 'p: "{}"', None, None),
        ("fine.", [], 'p: "{}" q', "", []),
        ("fine.", [("Ġ", "f")], "p: {} q", "", []),  # a space before the word is no template
    ],
    ids=["stop", "shout", "opening", "line break", "letter", "nothing left", "apart", "space before the word"],
)
def test_border_tokens_are_not_the_posts(
    post: str, merge: list[tuple[str, str]], prompt: str, fused: str | None, not_varied: list[int] | None
) -> None:
    tokenizer = byte_tokenizer(merges=merge)
    row = make_row(tokenizer, 0, "en", post, post)
    row |= {"prompt_ids": tokenizer(prompt.format(post))["input_ids"], "question": None}
    if fused is None:
        with pytest.raises(ProbeInputError, match="'row-0': no token lies wholly inside the post of 2 characters"):
            encode(row, TokenBytes(tokenizer))
        return
    example = encode(row, TokenBytes(tokenizer))
    raw = example.text.encode()
    assert "".join(raw[slice(*example.byte_spans[at])].decode() for at in example.border) == fused
    assert np.flatnonzero(~example.varied).tolist() == not_varied
    first, last = example.post_tok
    assert b"".join(raw[slice(*example.byte_spans[at])] for at in range(first, last)).decode().strip() in post
    values = np.arange(1.0, last - first + 1)
    chars = example.post_chars(values)
    assert chars[not_varied].tolist() == [0.0] * len(not_varied or ()) and chars.sum() == pytest.approx(values.sum())
    assert Example.from_dict(json.loads(json.dumps(example.to_dict()))).border == example.border
    with pytest.raises(ProbeError, match="post tokens"):
        example.post_chars(np.ones(last - first + 1))


@pytest.mark.parametrize("method", ["ig", "ig_zero", "erase", "erase_neutral", "erase_resample", "shap", "gradnorm"])
def test_border_tokens_stay_as_they_are(tiny_probe: Probe, tokenizer, method: str) -> None:
    """Every pass over a perturbed post sees the border token's own embedding, and attends to it."""
    row = make_row(tokenizer, 0, "en", "fed the dog, it rained, so I slept, again.", "it rained")
    example = tiny_probe.encode(row)
    first, last = example.post_tok
    moved = tuple(
        Segment("post", (first, last - 2), s.char) if s.name == "post"
        else Segment("template", (last, s.tok[1]), s.char) if s.tok[0] == last else s
        for s in example.segments
    )  # fmt: skip
    at = [s.name for s in moved].index("post") + 1
    fixed = dataclasses.replace(
        example, segments=(*moved[:at], Segment("border", (last - 2, last), (0, 0)), *moved[at:])
    )
    assert fixed.border == (last - 2, last - 1)
    embedding = tiny_probe.model.get_input_embeddings()
    own, seen = embedding.weight[list(fixed.ids[last - 2 : last])], []

    def watch(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_key_values") is None:  # what stands before the post, run once
            assert kwargs["inputs_embeds"].shape[1] == first
        else:
            seen.append((kwargs["inputs_embeds"].detach(), kwargs["attention_mask"]))

    tiny_probe.scorer.check(fixed)  # its plain calls on ids are not what is looked at
    handle = tiny_probe.model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        found = attribute(tiny_probe, fixed, (method,), ("label",), Settings(), ("the sun shone", "we ate soup"))
    finally:
        handle.remove()
    border = slice(last - 2 - first, last - first)  # every pass begins at the post
    assert seen and all(torch.equal(e[:, border], own.expand(len(e), -1, -1)) for e, _ in seen)
    for _, mask in seen:
        if mask is not None and mask.ndim == 4:
            assert bool((mask[:, 0, fixed.prompt_len - 1 - first, last - 2 : last] == 0).all())
        elif mask is not None:
            assert bool((mask[:, last - 2 : last] == 1).all())
    gone = np.flatnonzero(~fixed.varied)
    assert len(gone) and not found[0].char_values[gone].any()
    assert found[0].char_values.sum() == pytest.approx(found[0].values.sum())


def byte_tokenizer(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    vocab = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocab)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["[gMASK]", "<sop>", "<|user|>", "<|assistant|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[gMASK]")


@pytest.mark.parametrize("short", [1, 3], ids=["one of four", "three of four"])
def test_posts_of_a_data_set_are_cut_alike(tiny_probe: Probe, tokenizer: Any, short: int) -> None:
    few, many = "I fed the dog. It rained. I slept badly.", "I fed the dog, it rained, I slept badly, I woke."
    posts = [few] * short + [many] * (4 - short)
    rows = [make_row(tokenizer, n, "en", post, "I slept") for n, post in enumerate(posts)]
    examples, skipped = lay_out(tiny_probe, rows)
    assert [e.cut for e in examples] == ["clause" if short == 1 else "word"] * 4 and not skipped


@pytest.mark.parametrize(
    ("post", "language"),
    [("post", "en"), ("Question", "en"), ("user", "en"), ("帖子", "zh"), ("问题", "zh"), ("<|user|>", "zh")],
)
def test_post_that_repeats_the_template(tokenizer, tiny_probe: Probe, post: str, language: str) -> None:
    """The template holds the words of the post elsewhere, the question too."""
    example = tiny_probe.encode(make_row(tokenizer, 0, language, post, post))
    before = example.text[: example.post_char[0]]
    assert before.endswith(': "' if language == "en" else '："')
    assert example.text[example.post_char[1] :].startswith('"')


def test_question_before_the_post(tiny_probe: Probe, tokenizer) -> None:
    row = make_row(tokenizer, 0, "en", "It was fine", "fine")
    prompt = f"<|user|>\n{QUESTION['en']} It was fine<|assistant|>"
    example = tiny_probe.encode(row | {"prompt_ids": tokenizer(prompt)["input_ids"]})
    assert example.text[: example.post_char[1]].endswith(f"{QUESTION['en']} It was fine")


def test_explanation_before_the_label(tiny_probe: Probe, tokenizer) -> None:
    row = make_row(tokenizer, 0, "en", "It was fine", "It was fine")
    text = f"\nReasoning: {row['parsed_explanation']} Answer: {row['label_text']}<|user|>"
    example = tiny_probe.encode(row | {"output_ids": tokenizer(text)["input_ids"]})
    names = [segment.name for segment in example.segments if segment.name in ("label", "explanation")]
    assert names == ["explanation", "label"]

    # An explanation that states the label sentence itself: the label is what follows it.
    reason = f"{row['label_text']} {row['parsed_explanation']}"
    text = f"\nReasoning: {reason} Answer: {row['label_text']}<|user|>"
    example = tiny_probe.encode(row | {"parsed_explanation": reason, "output_ids": tokenizer(text)["input_ids"]})
    found = [segment.name for segment in example.segments if segment.name in ("label", "explanation")]
    assert found == ["explanation", "label"]


def test_rows_without_label_or_explanation(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    nothing = dict.fromkeys(("parsed_label", "label_text", "parsed_explanation", "cues", "candidates"))
    example = tiny_probe.encode(tiny_rows[0] | nothing)
    assert (example.label, example.label_text, example.explanation, example.cues) == ("", "", None, None)
    assert example.segment("label") is None and example.segment("explanation") is None
    both = tiny_probe.encode(tiny_rows[0] | {"parsed_label": ["high", "low"]})
    assert both.label == "high,low"


def test_output_that_ends_inside_a_character(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    row = tiny_rows[0]
    cut = next(
        end
        for end in range(len(row["output_ids"]), 0, -1)
        if not _is_utf8(b"".join(tiny_probe.token_bytes(index) for index in row["output_ids"][:end]))
    )
    example = tiny_probe.encode(row | {"output_ids": row["output_ids"][:cut], "parsed_explanation": None})
    assert example.text.endswith("\ufffd")
    assert len(example.char_bytes) == len(example.text) + 1


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@given(st.lists(st.one_of(st.binary(max_size=4), st.text(max_size=3).map(lambda t: t.encode("utf-8", "ignore")))))
def test_decode_bytes_is_replace_with_a_way_back(parts: list[bytes]) -> None:
    data = b"".join(parts)
    text, offsets = decode_bytes(data)
    assert text == data.decode("utf-8", "replace")
    assert len(offsets) == len(text) + 1 and offsets[-1] == len(data) and offsets == sorted(offsets)
    for index, char in enumerate(text):
        piece = data[offsets[index] : offsets[index + 1]]
        assert piece.decode("utf-8", "replace") == char


def test_ids_without_a_token_have_no_text(tiny_probe: Probe, tiny_rows: list[dict[str, Any]], tokenizer) -> None:
    """GLM has embedding rows past its vocabulary; should a model ever emit one, the rest must stay in place."""
    row = tiny_rows[1]
    plain = tiny_probe.encode(row)
    example = tiny_probe.encode(row | {"output_ids": [*row["output_ids"][:5], len(tokenizer), *row["output_ids"][5:]]})
    assert example.text == plain.text
    assert example.byte_spans[example.prompt_len + 5][0] == example.byte_spans[example.prompt_len + 5][1]


def test_byte_fallback_tokens() -> None:
    """Llama 2's way: a marker for the space, <0xNN> for bytes."""
    pieces = ["<unk>", "\u2581fine", "<0xE4>", "<0xBD>", "<0xA0>"]
    core = Tokenizer(
        models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    found = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=core))
    assert b"".join(found(index) for index in (1, 2, 3, 4)).decode() == " fine你"


POST = "long night again, nothing helps me."


def _word_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer without bytes over the words of ``POST`` and of the answer."""
    words = ["Post", ":", "Risk", "?", "high", "because", "nothing", "long", "night", "again", ",", "helps", "me", "."]
    if kind == "WordLevel":
        core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
    elif kind == "WordPiece":
        pieces = ["[UNK]", *words, "##ing", "noth", "help", "##s"]
        vocab = {w: i for i, w in enumerate(w for w in pieces if w not in ("nothing", "helps"))}
        core = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    else:
        letters = sorted({*"".join(words), "\u2581"})
        pieces = [("<unk>", 0.0), *((f"\u2581{w}", -2.0) for w in words), *((char, -9.0) for char in letters)]
        core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "Unigram"])
def test_tokenizers_without_bytes(kind: str) -> None:
    """Word tokenizers know words only: the post reads with a space before each of their tokens."""
    tokenizer = _word_tokenizer(kind)
    post = POST if kind == "Unigram" else "long night again , nothing helps me ."

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    row = {"id": "w", "post": post, "prompt_ids": ids(f"Post : {post} Risk ?"), "label_text": "high"}
    row |= {"output_ids": [*ids("high because nothing helps"), tokenizer.eos_token_id]}
    row |= {"parsed_explanation": "because nothing helps", "candidates": {"h": "high", "l": "long"}}
    found = TokenBytes(tokenizer)
    example = encode(row, found)
    assert found.kind == ("SentencePiece" if kind == "Unigram" else kind)
    low, high = example.post_char
    assert example.text[low:high] == post and example.text.endswith("because nothing helps<eos>")
    values = np.arange(1.0, 1 + example.post_tok[1] - example.post_tok[0])
    spread = example.post_chars(values)
    assert spread.sum() == pytest.approx(values.sum(), abs=1e-9)
    a = post.index("nothing")  # its own tokens' values, whole; the space before belongs to the token
    first, last = example.tokens_of((low + a, low + a + 7))
    own = values[first - example.post_tok[0] : last - example.post_tok[0]].sum()
    assert spread[a - 1 : a + 7].sum() == pytest.approx(own)
    assert example.segment("label") is not None and example.segment("explanation") is not None
    # Two spaces are two markers to SentencePiece: nothing is lost. Upper case and unknown words are, to all three.
    for lost in ("LONG night", "long Zen", *(("long  night",) if kind != "Unigram" else ())):
        with pytest.raises(ProbeInputError, match=f"tokenizer .{found.kind}. lose spaces"):
            encode(row | {"post": lost, "prompt_ids": ids(f"Post : {lost} Risk ?")}, found)


def test_a_space_that_the_tokenizer_puts_in_front_is_taken_out_again() -> None:
    """Llama 2's way: " low" after a label would become two spaces, "low" after a line break would get one."""
    pieces = ["<unk>", "\u2581", "l", "o", "w", "<0x0A>", "low", "\u2581low"]
    core = Tokenizer(
        models.BPE({p: i for i, p in enumerate([*pieces, "ow"])}, [("o", "w"), ("l", "ow"), ("\u2581", "low")],
                   byte_fallback=True, unk_token="<unk>")
    )  # fmt: skip
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    found = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=core))
    assert found.encode(" low") == [pieces.index("\u2581low")]
    assert found.encode("low") == [pieces.index("low")]


def test_word_tokenizer_end_to_end() -> None:
    tokenizer = _word_tokenizer("WordLevel")
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, pad_token_id=len(tokenizer) - 1, bos_token_id=None)  # fmt: skip
    torch.manual_seed(0)
    probe = Probe(LlamaForCausalLM(config).eval(), tokenizer)
    post = "long night again , nothing helps me ."
    ids = probe.token_bytes.encode
    row = {"id": "w", "post": post, "prompt_ids": ids(f"Post : {post} Risk ?"), "label_text": "high"}
    row |= {"output_ids": ids("high because nothing helps"), "parsed_explanation": "because nothing helps"}
    example = probe.encode(row | {"candidates": {"h": "high", "l": "long"}})
    for found in attribute(probe, example, ("ig", "erase"), settings=Settings(units="token", tolerance=1e-3)):
        assert found.char_values.sum() == pytest.approx(found.values.sum())
        if found.method == "ig":
            assert found.converged and found.char_values.sum() == pytest.approx(
                found.f_input - found.f_baseline, rel=2e-3, abs=2e-4
            )


def test_tokenizer_whose_tokens_mean_nothing_alone_is_refused_by_name() -> None:
    core = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    with pytest.raises(ProbeInputError, match=r"BPE.* is neither byte-level"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=core))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_ids": []}, "'output_ids' is empty"),
        ({"post": "never said", "cues": None}, "the post is not in the prompt"),
        ({"post": "  "}, "the post is empty"),
        ({"label_text": "Something else."}, "label_text is not in the decoded output_ids"),
        ({"parsed_explanation": "Something else."}, "parsed_explanation is not in the decoded output_ids"),
        ({"prompt_ids": []}, "'prompt_ids' is empty"),
        ({"output_ids": [1, "2"]}, "'output_ids' must hold non-negative integers"),
        ({"output_ids": [1, -1]}, "'output_ids' must hold non-negative integers"),
        ({"cues": [[0, 1000]]}, r"'cues': \[0, 1000\] is not"),
        ({"candidates": {"high": ""}}, "'candidates' must map"),
        ({"post": None}, "'post' has type NoneType"),
    ],
)
def test_bad_rows_are_named(tiny_probe: Probe, tiny_rows: list[dict[str, Any]], change: dict, message: str) -> None:
    with pytest.raises(ProbeInputError, match=f"^row 'row-1': .*{message}"):
        tiny_probe.encode(tiny_rows[1] | change)


def test_read_generations(tiny_generations: Path, tiny_rows: list[dict[str, Any]]) -> None:
    assert read_generations(tiny_generations) == json.loads(json.dumps(tiny_rows))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([b"{}"], ":1: key 'id' is missing"),
        ([b"", b"[1]"], ":2: a JSON list"),
        ([b"{'a': 1}"], ":1: not JSON"),
        (['{"id": "帖"}'.encode("gb18030")], ":1: not UTF-8"),
        ([b'{"id": 1, "post": "", "prompt_ids": 1, "output_ids": [1]}'], ":1: key 'prompt_ids' has type int"),
        ([b'{"id": 1, "post": "a", "prompt_ids": [1], "output_ids": [1]}'] * 2, ":2: id 1 was used on line 1"),
        ([b" "], "no rows"),
    ],
)
def test_unreadable_generations_name_the_line(tmp_path: Path, lines: list[bytes], message: str) -> None:
    path = tmp_path / "g.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ProbeInputError, match=message) as caught:
        read_generations(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_missing_generations_file(tmp_path: Path) -> None:
    with pytest.raises(ProbeInputError, match=r"gone\.jsonl: cannot read"):
        read_generations(tmp_path / "gone.jsonl")


def test_example_of_multi_label_row(tiny_probe: Probe, tokenizer) -> None:
    row = make_row(tokenizer, 3, "en", "We had dinner. It was fine", "fine", parsed_label=["high"])
    example: Example = tiny_probe.encode(row)
    assert example.label == "high" and set(example.candidates) == {"high", "low"}
