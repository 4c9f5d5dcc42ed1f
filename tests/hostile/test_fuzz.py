"""Every reader of foreign bytes on mutated files: a refusal in one line or a value, never a foreign exception, five
seconds or two GiB. ``FUZZ_EXAMPLES`` is how many inputs each reader gets: 200 unless it is set; the slow tests take
100,000."""

import contextlib
import copy
import json
import os
import random
import resource
import shutil
import struct
import time
import warnings

import hypothesis
import pytest
from hypothesis import strategies as st

from mentalglm_jax.checkpoints.adapters import load_adapter
from mentalglm_jax.checkpoints.hf_files import Checkpoint, TensorFiles
from mentalglm_jax.checkpoints.weights import check_tensors, detect_layout, generation_config, read_config
from mentalglm_jax.data.records import read_records
from mentalglm_jax.errors import MentalGLMError
from mentalglm_jax.evaluate.answers import read_generations
from mentalglm_jax.foreign import read_json
from mentalglm_jax.model.glm import abstract_model
from mentalglm_jax.pipeline.run_dir import Run
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
from mentalglm_jax.train.recipe import load_recipe, what_it_is
from tests.hostile.foreign_files import CONFIG, RECORD, write_adapter, write_checkpoint
from tests.hostile.test_command_line import RECIPE

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
VALUES = [None, True, False, 0, 1, -1, 2**31, 2**63, 10**40, 1.5, 1e39, -1e-60, "", "a", "x" * 9999, "NaN",
          "\x1b[31m\n", [], [1], [[]], {}, {"a": 1}, {"type": "yarn", "factor": 2}, [None], "(a+)+$",
          "(?i)", "../x", "\0"]  # fmt: skip
RAW = [b"NaN", b"Infinity", b"1e999", b"9" * 5000, b'"\\ud800"', b"[" * 2000, b"{", b"}", b"]", b",", b'"',
       b"\xff", b"\xef\xbb\xbf", b"\0", b"&a [*a]", b"!!python/name:os", b"\n", b"- " * 50, b"? ",
       b"<<: ", b"\\u0000"]  # fmt: skip


def places(value, at=()):
    """Every place of a JSON value."""
    yield at
    children = value.items() if isinstance(value, dict) else enumerate(value[:50]) if isinstance(value, list) else ()
    for key, child in children:
        if len(at) < 5:
            yield from places(child, (*at, key))


def mutated_value(value, draw):
    """The value with one to three places changed, removed or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.randint(1, 3)):
        found = [at for at in places(value) if at]
        if not found:
            break
        *parents, last = draw.choice(found)
        node = value
        for key in parents:
            node = node[key]
        kind = draw.randrange(4)
        if kind == 0:
            node.pop(last)
        elif kind == 1 and isinstance(node, dict):
            node[draw.choice(["x", "\x07", "a.b", "(", *map(str, node)])] = copy.deepcopy(node[last])
        else:
            node[last] = copy.deepcopy(draw.choice(VALUES))  # a list that is put into itself ends nowhere
    return value


def mutated_bytes(data, draw):
    """The bytes with a few cut, changed, repeated or put in."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(4)
        if kind == 0:
            del data[at : at + draw.choice([1, 8, 100, len(data)])]
        elif kind == 1 and at < len(data):
            data[at] = draw.randrange(256)
        elif kind == 2:
            data[at:at] = data[max(0, at - draw.choice([1, 8, 200])) : at] * draw.choice([1, 2, 30])
        else:
            data[at:at] = draw.choice(RAW)
    return bytes(data)


def mutated_json(data, draw):
    if draw.random() < 0.6:
        data = json.dumps(mutated_value(json.loads(data), draw)).encode()
    return data if draw.random() < 0.4 else mutated_bytes(data, draw)


def mutated_tensors(data, draw):
    length = struct.unpack("<Q", data[:8])[0]
    header = mutated_json(data[8 : 8 + length], draw)
    length = len(header) if draw.random() < 0.9 else draw.choice([0, 7, 2**32, 2**63])
    return struct.pack("<Q", length) + header + data[8 + len(header) :]


def opened(directory):
    checkpoint = Checkpoint(directory)
    config = read_config(checkpoint)
    check_tensors(checkpoint, config, detect_layout(checkpoint.tensors))
    generation_config(config, read_json(directory / "generation_config.json"))


def small_tokenizer(directory):
    """The builtin one with fewer words, for speed."""
    value = json.loads((BUILTIN / "tokenizer.json").read_text())
    value["model"]["merges"] = value["model"]["merges"][:40]
    count = 256 + 40
    words = sorted(value["model"]["vocab"].items(), key=lambda pair: pair[1])
    value["model"]["vocab"] = {word: number for number, (word, _) in enumerate(words[:count])}
    for number, token in enumerate(value["added_tokens"]):
        token["id"] = count + number
    (directory / "tokenizer.json").write_text(json.dumps(value))


READERS = {
    "config.json": (mutated_json, opened),
    "generation_config.json": (mutated_json, opened),
    "model.safetensors": (mutated_tensors, lambda d: TensorFiles([d / "model.safetensors"])),
    "model.safetensors.index.json": (mutated_json, opened),
    "adapter_config.json": (mutated_json, None),
    "tokenizer.json": (mutated_json, lambda d: GlmTokenizer.load(d).encode("a <|user|> 我 " * 20)),
    "tokenizer_config.json": (mutated_json, lambda d: GlmTokenizer.load(d)),
    "records.jsonl": (mutated_json, lambda d: read_records(d / "records.jsonl", allow_extra=True)),
    "generations.jsonl": (mutated_json, lambda d: read_generations(d / "generations.jsonl")),
    "run.json": (mutated_json, None),
    "recipe.yaml": (mutated_bytes, lambda d: load_recipe(d / "recipe.yaml")),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """One directory for each reader, with what it reads undamaged."""
    made = {}
    for name in READERS:
        directory = made[name] = tmp_path_factory.mktemp("fuzz")
        if name == "adapter_config.json":
            write_adapter(directory)
        elif name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copytree(BUILTIN, directory, dirs_exist_ok=True)
            small_tokenizer(directory)
        elif name.endswith(("index.json", "config.json", "safetensors")):
            write_checkpoint(directory, 100_000 if "index" in name else 1 << 30)
        elif name.endswith(".jsonl"):
            row = RECORD | {"cues": [[0, 3]], "parsed_label": "high", "parsed_explanation": "x", "parse_status": "ok"}
            (directory / name).write_text(json.dumps(row))
        else:
            (directory / "recipe.yaml").write_text(RECIPE.format(run=directory))
            state = {"recipe": what_it_is(load_recipe(directory / "recipe.yaml")), "stages": {"data": {"seconds": 1}}}
            (directory / "run.json").write_text(json.dumps(state))
    return made


class Checked(Exception):
    """An adapter passed every check; the arrays that would now be made are not."""


def checked(*_):
    raise Checked


def attack(name, directory, count):
    mutate, read = READERS[name]
    data = (directory / name).read_bytes()
    model = abstract_model(CONFIG)
    recipe = load_recipe(directory / "recipe.yaml") if name == "run.json" else None
    ends = {"value": 0, "refusal": 0}

    def read_it():
        if name == "adapter_config.json":
            load_adapter(model, directory)
        elif name == "run.json":
            Run(recipe)
        else:
            read(directory)

    with warnings.catch_warnings(), contextlib.suppress(Checked):
        warnings.simplefilter("ignore")
        read_it()  # it is sound to begin with

    @hypothesis.settings(max_examples=count, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.integers(0, 2**64 - 1))
    def one(seed):
        (directory / name).write_bytes(mutate(data, random.Random(seed)))
        began, worked, end, code, line = time.monotonic(), time.process_time(), "value", 2, ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_it()
        except Checked:
            pass
        except MentalGLMError as error:
            end, code, line = "refusal", error.exit_code, str(error)
        ends[end] += 1
        assert code == 2 and len(line) < 100_000, line[:1000]
        assert time.process_time() - worked < 5 and time.monotonic() - began < 60  # other processes may be busy

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        one()
    finally:
        (directory / name).write_bytes(data)
    assert ends["refusal"] > count // 20, ends  # the mutations reach the checks
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20  # KiB


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", READERS)
def test_fuzz(valid, name, monkeypatch):
    monkeypatch.setattr("mentalglm_jax.checkpoints.adapters.add_lora", checked)
    attack(name, valid[name], EXAMPLES)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", READERS)
def test_fuzz_at_length(valid, name, monkeypatch):
    monkeypatch.setattr("mentalglm_jax.checkpoints.adapters.add_lora", checked)
    attack(name, valid[name], 100_000)
