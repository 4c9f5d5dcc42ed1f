"""Tokenizer files from strangers: nothing in them may cut, pad or vary a text, wait, panic or take all memory."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import sys
import time
import tomllib
import warnings
from pathlib import Path

import pytest

from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.bertscore import read_tokenizer as read_encoder_tokenizer
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
from mentalglm_jax.text.tokenizer_files import SwitchedOffWarning
from tests.hostile.attack import refused
from tests.hostile.foreign_files import JSON_ATTACKS, called, fifo, link, text
from tests.mentalglm_jax.chat_families import write_family

TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {"strategy": {"Fixed": 300}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
           "pad_token": "<|endoftext|>"}  # fmt: skip
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
POST = "I have not slept for days and nothing helps. " * 10


def tokenizer(change):
    def damage(directory):
        value = json.loads((directory / "tokenizer.json").read_text())
        change(value)
        (directory / "tokenizer.json").write_text(json.dumps(value))

    return damage


def model(**changes):
    return tokenizer(lambda t: t["model"].update(changes))


def split(expression):
    return tokenizer(lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(pattern=expression))


def around(*single):
    """What other programs would put around each text."""
    return tokenizer(lambda t: t.update(post_processor={"type": "Sequence", "processors": [
        {"type": "TemplateProcessing", "single": list(single), "pair": [], "special_tokens": {}}]}))  # fmt: skip


def added(**changes):
    return tokenizer(
        lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"id": 2560, "content": "<x>"} | changes)
    )


@contextlib.contextmanager
def silent_stderr():
    """What a library writes to the descriptor itself, which is more than the one line."""
    read, write = os.pipe()
    kept = os.dup(2)
    os.dup2(write, 2)
    said: list[bytes] = []
    try:
        yield said
    finally:
        os.dup2(kept, 2)
        os.close(write)
        os.close(kept)
        os.set_blocking(read, False)
        with contextlib.suppress(BlockingIOError):
            said.append(os.read(read, 1 << 16))
        os.close(read)


CUTS = {
    "truncation": {"truncation": TRUNCATION},
    "truncation with a stride as long": {"truncation": TRUNCATION | {"stride": 8}},
    "truncation to nothing": {"truncation": TRUNCATION | {"max_length": 0}},
    "padding to 300": {"padding": PADDING},
    "padding to 3 billion": {"padding": PADDING | {"strategy": {"Fixed": 3_000_000_000}}},
    "padding to a multiple of 0": {"padding": PADDING | {"strategy": "BatchLongest", "pad_to_multiple_of": 0}},
    "both": {"padding": PADDING, "truncation": TRUNCATION},
}


@pytest.mark.parametrize("attack", CUTS)
def test_what_cuts_or_pads_is_off_and_said(tmp_path, attack):
    shutil.copytree(BUILTIN, tmp_path / "t")
    tokenizer(lambda t: t.update(CUTS[attack]))(tmp_path / "t")
    with pytest.warns(SwitchedOffWarning, match=f"{' and '.join(sorted(CUTS[attack], reverse=True))} switched off"):
        found = GlmTokenizer.load(tmp_path / "t")
    assert found.encode(POST) == GlmTokenizer.load(BUILTIN).encode(POST)
    with warnings.catch_warnings():  # an encoder's own length stays, and nothing else
        warnings.simplefilter("error")
        assert len(read_encoder_tokenizer(tmp_path / "t", 20).encode(POST).ids) == 20


def test_dropout_is_off_and_said(tmp_path):
    shutil.copytree(BUILTIN, tmp_path / "t")
    model(dropout=0.5)(tmp_path / "t")
    with pytest.warns(SwitchedOffWarning, match="dropout switched off"):
        assert GlmTokenizer.load(tmp_path / "t").encode(POST) == GlmTokenizer.load(BUILTIN).encode(POST)


ATTACKS = {
    **{f"{name}": (text("tokenizer.json", raw), rf"tokenizer\.json.*({says}|no JSON object)")
       for name, (raw, says) in JSON_ATTACKS.items() if name != "17 MB"},
    "a pipe": (fifo("tokenizer.json"), "is not a file"),
    "a link outside": (link("tokenizer.json"), "is a link to a file outside"),
    "65 MB": (text("tokenizer.json", b"{" + b" " * (65 << 20) + b"}"), "too large"),
    "an object": (text("tokenizer.json", "{}"), "model None is not a part"),
    "a split that never ends": (split({"Regex": r"(\w+)+!"}), "none of the published patterns"),
    "a split that does not compile": (split({"Regex": "("}), "none of the published patterns"),
    "a split by nothing": (split({"String": ""}), "none of the published patterns"),
    "a long split": (split({"Regex": "a" * 1_000_000}), "none of the published patterns"),
    "a replacement that multiplies": (
        tokenizer(lambda t: t.update(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 999})),
        "normalizer Replace does something else than to write spaces",
    ),
    "a replacement inside": (
        tokenizer(lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"Regex": "(a+)+!"}, "content": ""}]})), "Replace does something else"
    ),
    "a prefix": (tokenizer(lambda t: t.update(normalizer={"type": "Prepend", "prepend": "a"})), "Prepend does some"),
    "a damaged charsmap": (
        tokenizer(lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        "normalizer 'Precompiled' is not a part",
    ),
    "pieces of no length": (
        tokenizer(lambda t: t.update(pre_tokenizer={"type": "FixedLength", "length": 0})), "'FixedLength' is not a part"
    ),
    "parts in parts": (
        tokenizer(lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits"}] * 21})),
        "at most 20 parts",
    ),
    "parts that are none": (tokenizer(lambda t: t.update(pre_tokenizer=[1])), "pre_tokenizer None is not a part"),
    "a type with control characters": (
        tokenizer(lambda t: t.update(decoder={"type": "\x1b[31m\n"})), r"\\x1b\[31m\\n"
    ),
    "Unigram": (tokenizer(lambda t: t.update(model={"type": "Unigram", "vocab": []})), "model 'Unigram' is not a part"),
    "each text twice": (around(TEXT, TEXT), "post_processor.single does not hold the text once"),
    "no text": (around(), "post_processor.single does not hold the text once"),
    "the second text for the first": (around({"Sequence": {"id": "B", "type_id": 0}}), "does not hold the text once"),
    "a text of text": (around({"Sequence": "A"}), "does not hold the text once"),
    "an id of 2^32 - 1": (tokenizer(lambda t: t["model"]["vocab"].update(zzz=2**32 - 1)), "must be 0 to 2560"),
    "an id of 2^62": (tokenizer(lambda t: t["model"]["vocab"].update(zzz=2**62)), "must be 0 to 2560"),
    "an id below 0": (tokenizer(lambda t: t["model"]["vocab"].update(zzz=-1)), "must be 0 to 2560"),
    "an id twice": (tokenizer(lambda t: t["model"]["vocab"].update(zzz=1)), "must be 0 to 2560"),
    "an id of text": (tokenizer(lambda t: t["model"]["vocab"].update(zzz="1")), "must be 0 to 2560"),
    "a vocabulary of numbers": (model(vocab=[1, 2]), "vocab must be an object"),
    "an added id of 10^9": (added(id=10**9), "must be 0 to 2560"),
    "an added token without text": (added(content=""), "added_tokens must be a list"),
    "added tokens of numbers": (tokenizer(lambda t: t.update(added_tokens=[1])), "added_tokens must be a list"),
    "a merge of no token": (tokenizer(lambda t: t["model"]["merges"].append(["q", "zzzz"])), "cannot be read as a tok"),
    "merges of numbers": (model(merges=[1]), "cannot be read as a tokenizer"),
    "a prefix for parts of words": (model(continuing_subword_prefix="##########"), "continuing_subword_prefix"),
    "a long end of words": (model(end_of_word_suffix="x" * 10_000), "end_of_word_suffix must be text of at most"),
    "dropout 5": (model(dropout=5), "dropout must be a number from 0 to 1"),
    "no special tokens": (tokenizer(lambda t: t.update(added_tokens=[])), "none of the added_tokens of"),
    "template of 2 MB": (text("chat_template.jinja", "x" * (2 << 20)), "too large"),
    "template not UTF-8": (text("chat_template.jinja", b"\xff"), "UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_tokenizer(tmp_path, attack):
    damage, says = ATTACKS[attack]
    shutil.copytree(BUILTIN, tmp_path / "t")
    damage(tmp_path / "t")
    began = time.process_time()
    with silent_stderr() as said:
        outcome = called(lambda: GlmTokenizer.load(tmp_path / "t"))
    assert time.process_time() - began < 10
    refused(outcome, says)
    assert b"".join(said) == b""


def test_a_tiktoken_token_of_a_megabyte(tmp_path):
    lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
    lines.append(base64.b64encode(b"a" * 1_000_000) + b" 256")
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))
    refused(called(lambda: GlmTokenizer.load(tmp_path)), "line 257 holds a token of 1000000 bytes")


@pytest.mark.parametrize("unit", ["a", " ", "\n", "我", "1", "! ", "\u0301", "'s", "<|user|>"])
def test_a_post_of_200000_characters(unit):
    tokenizer = GlmTokenizer.load(BUILTIN)
    began = time.process_time()
    assert tokenizer.encode((unit * 200_000)[:200_000])
    assert time.process_time() - began < 20


def changed(directory, change):
    raw = json.loads((BUILTIN / "tokenizer.json").read_text("utf-8"))
    change(raw)
    (directory / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    return directory


def without_a_byte(raw):
    model = raw["model"]
    model["merges"] = [pair for pair in model["merges"] if "D" not in "".join(pair)]
    kept = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1]) if "D" not in token]
    model["vocab"] = {token: number for number, token in enumerate(kept)}
    for number, token in enumerate(raw["added_tokens"], start=len(kept)):
        token["id"] = number


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "could lose letters"),
        (lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(invert=True), "could lose letters"),
        (
            lambda raw: raw["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "WhitespaceSplit"}),
            "could lose letters",
        ),
        (
            lambda raw: raw["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Punctuation", "behavior": "Removed"}),
            "could lose letters",
        ),
        (lambda raw: raw["pre_tokenizer"]["pretokenizers"].pop(0), "could lose letters"),
        (lambda raw: raw.update(normalizer={"type": "Lowercase"}), "normalizer present"),
        (lambda raw: raw.update(decoder=None), "decoder is not ByteLevel"),
        (without_a_byte, "1 of the 256 bytes have no token"),
    ],
    ids=["split removed", "split inverted", "spaces", "punctuation", "no split", "case", "decoder", "a byte"],
)
def test_a_tokenizer_that_changes_posts(tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        GlmTokenizer.load(changed(tmp_path, change))


TEMPLATES = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
                "{{ n.x | length }}",
    "a gigabyte": "{{ 'a' * 10**9 }}",
    "a number of 10^9 digits": "{{ 10**(10**9) }}",
    "a wide number": "{{ '%2000000000d' % 1 }}",
    "3 MB": "{{ 'a'.ljust(3000000) }}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "lipsum": "{{ lipsum(99999) }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ self.__init__.__globals__ }}",
    "a command": "{{ cycler.__init__.__globals__.os.popen('touch done').read() }}",
    "append": "{{ messages.append(messages) }}",
    "a file": "{% include '/etc/passwd' %}",
    "control characters": "\x1b[31m{{ '\n\n' }}",
    "deep brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "many expressions": "{{ 1 }}" * 100_000,
}  # fmt: skip


# They take all the time there is: "loops" has the three seconds, which are the bound; to these one is given.
BUSY = ("a number of 10^9 digits", "lipsum")
BUSY_CHILD = "from mentalglm_jax.text import chat_template as room; room.SECONDS = 1; room._main()"


@pytest.mark.parametrize("attack", TEMPLATES)
def test_a_chat_template_that_is_a_program(tmp_path, monkeypatch, attack):
    """It ends, in one line, and has done nothing."""
    if attack in BUSY:
        command = [sys.executable, "-P", "-c", BUSY_CHILD]
        monkeypatch.setattr("mentalglm_jax.text.chat_template.module_command", lambda *_: command)
    write_family(tmp_path / "t", "qwen", chat_template=TEMPLATES[attack])
    monkeypatch.chdir(tmp_path)
    with silent_stderr() as said:
        outcome = called(lambda: GlmTokenizer.load(tmp_path / "t"))
    refused(outcome, r"tokenizer\.json: its chat template (took more than 3 seconds|cannot be rendered|writes a conv)")
    assert b"".join(said) == b"" and [path.name for path in tmp_path.iterdir()] == ["t"]


def test_the_sandbox_of_templates_is_one_without_known_holes():
    """Jinja2 before 3.1.6 lets a template out of its sandbox (CVE-2024-56326, CVE-2025-27516): none may be there."""
    wanted = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    every = [*wanted["dependencies"], *itertools.chain(*wanted["optional-dependencies"].values())]
    bounds = [one for one in every if one.lower().startswith("jinja2")]
    assert len(bounds) == 3 and set(bounds) == {"jinja2>=3.1.6"}
