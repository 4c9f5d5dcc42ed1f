"""GGUF files from strangers: no header may ask for memory, no tensor reach beyond the file, nothing be waited for."""

import json
import os
import struct
import time

import pytest
from tokenizers import Tokenizer

from mentalglm_jax.checkpoints.gguf_files import GgufFile
from mentalglm_jax.checkpoints.gguf_models import convert_gguf
from tests.hostile.attack import refused, run
from tests.hostile.foreign_files import called
from tests.hostile.gguf_bytes import LIST, TEXT, U32, entry, file, listed, small_model, tensor, text
from tests.mentalglm_jax.gguf_files import random_weights, write_gguf

ATTACKS = {
    "nothing": (b"", "its header ends beyond byte 0"),
    "three letters": (b"GGU", "ends beyond byte 3"),
    "another file": (b"PK\3\4" + bytes(100), "does not begin with GGUF"),
    "version 1": (file(version=1), "version 1, known are 2 and 3"),
    "version 0": (file(version=0), "version 0, known are"),
    "version 4": (file(version=4), "version 4, known are"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian byte order"),
    "2^63 tensors": (file(tensors=1 << 63), "9223372036854775808 tensors, at most"),
    "20,000 tensors that are not there": (file(tensors=20_000, padded=0), "ends beyond byte"),
    "2^63 entries": (file(entries=1 << 63), "metadata entries, at most"),
    "a key of 2^60 bytes": (file(struct.pack("<Q", 1 << 60), entries=1), "1152921504606846976 bytes of text"),
    "a text of 2^62 bytes": (file(entry("a", TEXT, struct.pack("<Q", 1 << 62))), "bytes of text, at most"),
    "a text of 4 MB that is not there": (file(entry("a", TEXT, struct.pack("<Q", 4 << 20))), "ends beyond byte"),
    "a list of 2^60 numbers": (file(listed(U32, 1 << 60)), "elements of 'a', at most"),
    "a list of 4 million texts that are not there": (file(listed(TEXT, 4_000_000)), "ends beyond byte"),
    "a list of 4 million numbers that are not there": (file(listed(12, 4_000_000)), "ends beyond byte"),
    "lists of 4 million each": (
        file(listed(0, 3_000_000, bytes(3_000_000)), entry("b", LIST, struct.pack("<IQ", 0, 3_000_000))),
        "elements of 'b', at most 1000000",
    ),
    "a list of lists": (file(listed(LIST, 1)), "a list of the unknown kind 9"),
    "a value of kind 77": (file(entry("a", 77, b"")), "value of the unknown kind 77"),
    "a key that is no text": (file(text(b"\xff\xfe") + struct.pack("<II", U32, 1), entries=1), "not UTF-8"),
    "a key twice": (file(entry("a", U32, bytes(4)), entry("a", U32, bytes(4))), "'a' stands more than once"),
    "a key of control characters": (file(entry("\x1b[31m", 77, b"")), r"\\x1b\[31m"),
    "no axes": (file((tensor(shape=()),)), "with 0 axes"),
    "nine axes": (file((tensor(shape=(1,) * 9),)), "with 9 axes"),
    "an axis of 0": (file((tensor(shape=(0, 4)),)), r"of shape \(0, 4\)"),
    "2^126 numbers": (file((tensor(shape=(1 << 63, 1 << 63)),)), "of shape"),
    "a tensor twice": (file((tensor(),), (tensor(),)), "tensor 't' twice"),
    "a tensor cut short": (file((tensor(shape=(4096,)),)), "tensor t ends at byte .* cut short"),
    "a tensor far beyond": (file((tensor(offset=1 << 60),)), "tensor t ends at byte .* cut short"),
    "2^64 - 32 as a place": (file((tensor(offset=(1 << 64) - 32),)), "tensor t ends at byte .* cut short"),
    "a place that is not aligned": (file((tensor(offset=7),)), "tensor t begins at 7"),
    "two tensors of the same bytes": (file((tensor("a"),), (tensor("b"),)), "tensor b shares its bytes with another"),
    "a tensor inside another": (file((tensor("a", (64,)),), (tensor("b", offset=32),)), "tensor b shares its bytes"),
    "an alignment of 0": (file(entry("general.alignment", U32, bytes(4)), (tensor(),)), "alignment must be a multiple"),
    "an alignment of 2^31": (
        file(entry("general.alignment", U32, struct.pack("<I", 1 << 31)), (tensor(),)),
        "alignment",
    ),
    "an alignment of text": (file(entry("general.alignment", TEXT, text("x")), (tensor(),)), "alignment must be"),
    "kind 9999": (file((tensor(kind=9999),)), "tensor t is of the kind 9999, which"),
    "kind Q4_2, which was taken out": (file((tensor(kind=4),)), "tensor t is of the kind 4, which"),
    "integers": (file((tensor(kind=26),)), "tensor t is of the kind I32, which"),
    "a row that is no block": (file((tensor(shape=(5,), kind=2),)), "rows of 5, which Q4_0 cannot hold"),
    "nothing of a model": (file(), "architecture None"),
    "a list of architectures": (
        file(entry("general.architecture", LIST, struct.pack("<IQ", TEXT, 1) + text("llama"))),
        r"architecture \['llama'\]",
    ),
    "numbers for an architecture": (
        file(entry("general.architecture", LIST, struct.pack("<IQ", U32, 2) + bytes(8))),
        "architecture array",
    ),
    # Compared with as many factors as its first axis has, 36 million pairs; ten times as long, 3.6 billion.
    "6,000 rows of one rotary factor": (small_model(factors=(1, 6000)), r"rope_freqs.weight has the shape \(6000, 1\)"),
    "rotary factors of two axes": (small_model(factors=(3, 5)), r"rope_freqs.weight has the shape \(5, 3\)"),
    "rotary factors of another head": (small_model(factors=(7,)), r"rope_freqs.weight has the shape \(7,\)"),
    "a first token that is the text": (small_model("$A"), "begins a text with the token '.A'"),
    "a first token that is another text": (small_model("$B:1"), "begins a text with the token"),
    "a first token of two words": (small_model("a b"), "begins a text with the token 'a b'"),
    "a first token with a kind": (small_model("x:1"), "begins a text with the token 'x:1'"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_file(tmp_path, attack):
    data, says = ATTACKS[attack]
    (tmp_path / "m.gguf").write_bytes(data)
    began = time.process_time()
    refused(called(lambda: convert_gguf(tmp_path / "m.gguf", tmp_path / "out")), rf"m\.gguf: .*{says}")
    assert time.process_time() - began < 10 and not (tmp_path / "out").exists()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    refused(called(lambda: GgufFile(tmp_path / "m.gguf")), r"m\.gguf: cannot be read, it is not a file")


def test_a_file_cut_anywhere(tmp_path):
    """Any length is refused, in the header or for the first tensor that is not whole."""
    whole = write_gguf(tmp_path / "m.gguf", "llama", random_weights("llama")).read_bytes()
    header = GgufFile(tmp_path / "m.gguf").tensors["token_embd.weight"].offset
    for place in [*range(0, header, header // 5), *range(header, len(whole), len(whole) // 5), len(whole) - 1]:
        (tmp_path / "cut.gguf").write_bytes(whole[:place])
        refused(called(lambda: GgufFile(tmp_path / "cut.gguf")), r"cut\.gguf: .*(beyond byte|cut short)")


def test_the_command(tmp_path, capsys):
    (tmp_path / "m.gguf").write_bytes(file(version=4))
    refused(run(["mentalglm", "convert", tmp_path / "m.gguf", tmp_path / "out"], capsys), "version 4, known are")
    outcome = run(["mentalglm", "convert", tmp_path / "m.gguf", tmp_path / "out", "--to", "chatglm"], capsys)
    refused(outcome, "a GGUF file becomes a directory of its own architecture")
    outcome = run(["mentalglm", "convert", tmp_path, tmp_path / "out", "--dtype", "bfloat16"], capsys)
    refused(outcome, "--dtype is for GGUF files")


# What llama.cpp takes where a key is absent: another model or text than of a file that says so.
FACTORS = {
    "alone": ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "of none": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
    "of 1": ({"rope.scaling.factor": 1.0}, {"rope_type": "default"}),
}  # fmt: skip


@pytest.mark.parametrize("factor", FACTORS)
def test_a_factor_without_its_kind(tmp_path, factor):
    """It was passed over, and llama.cpp divides positions by it."""
    keys, rope = FACTORS[factor]
    keys = {f"llama.{key}": value for key, value in keys.items()}
    convert_gguf(write_gguf(tmp_path / "m.gguf", "llama", random_weights("llama"), keys=keys), tmp_path / "m")
    found = json.loads((tmp_path / "m" / "config.json").read_text())["rope_parameters"]
    assert found == {"rope_theta": 10_000.0, **rope}


@pytest.mark.parametrize(("said", "begun"), [(None, True), (True, True), (False, False)])
def test_a_llama_3_that_does_not_say_that_texts_begin(tmp_path, said, begun):
    """The published files of Llama 3 have no such key; Hugging Face's tokenizer begins texts, too."""
    path = write_gguf(tmp_path / "m.gguf", "llama", random_weights("llama"), "llama",
                      keys={"tokenizer.ggml.add_bos_token": said})  # fmt: skip
    convert_gguf(path, tmp_path / "m")
    first = json.loads((tmp_path / "m" / "generation_config.json").read_text())["bos_token_id"]
    ids = Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json")).encode("I slept").ids
    assert (ids[0] == first) is begun


@pytest.mark.parametrize("key", ["add_eos_token", "add_sep_token"])
def test_texts_that_end_with_a_token(tmp_path, key):
    path = write_gguf(tmp_path / "m.gguf", "llama", random_weights("llama"), keys={f"tokenizer.ggml.{key}": True})
    refused(called(lambda: convert_gguf(path, tmp_path / "m")), f"ends every text with a token .*{key}")
