"""What a directory may hold is said once, in `directory.json`; both packages have it and judge directories alike.

One row is one directory, and what both say of it. What one of them alone knows (GLM's shapes, PEFT's options,
architectures of transformers) is in test_checkpoints.py, test_adapter_files.py, test_tokenizers.py and
test_probes_models.py."""

import json
import shutil
import struct
import warnings
from importlib.resources import files
from pathlib import Path

import pytest

from mentalglm_jax.checkpoints import adapters, hf_files
from mentalglm_jax.checkpoints.weights import check_tensors, detect_layout, generation_config, read_config
from mentalglm_jax.errors import MentalGLMError
from mentalglm_jax.foreign import read_json
from mentalglm_jax.model.glm import abstract_model
from mentalglm_jax.text import tokenizer_files
from mentalglm_jax.text.tokenizer import GlmTokenizer
from probes.errors import ProbeError
from probes.models import directory as probed
from probes.models.tokenizer import load_tokenizer
from tests.hostile.foreign_files import CONFIG, edit, fifo, key_text, link, text, write_adapter, write_checkpoint
from tests.hostile.fuzz_models import Checked, checked

JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
NESTED = '{"x": %s, "pad_token": "<|endoftext|>"}'


def folder(name):
    def damage(directory):
        (directory / name).unlink()
        (directory / name).mkdir()

    return damage


def aside(name):
    """The file is a link to another name in the same directory."""

    def damage(directory):
        (directory / name).rename(directory / f"really-{name}")
        (directory / name).symlink_to(f"really-{name}")

    return damage


def behind_another_directory(name):
    def damage(directory):
        (directory.parent / "other").mkdir()
        (directory / name).rename(directory.parent / "other" / name)
        (directory / name).symlink_to(f"../other/{name}")

    return damage


def snapshot(climb):
    """The Hub's cache: the directory is a snapshot whose files are links, to its own blobs or further up."""

    def damage(directory):
        blobs = directory.parents[1] / "blobs"
        for path in [*directory.iterdir()]:
            target = blobs if climb == "blobs" else directory.parents[2] / "elsewhere"
            target.mkdir(exist_ok=True)
            path.rename(target / f"h{path.name}")
            path.symlink_to(target / f"h{path.name}")

    return damage


def sharded(change):
    """Two shards with their index, of which ``change(weight_map)`` makes another."""

    def damage(directory):
        (directory / hf_files.SINGLE).unlink()
        write_checkpoint(directory, 20_000)
        path = directory / hf_files.INDEX
        index = json.loads(path.read_text())
        change(directory, index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def header(change):
    """The tensors with another header."""

    def damage(directory):
        path = directory / hf_files.SINGLE
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        found = change(data[8 : 8 + length])
        path.write_bytes(struct.pack("<Q", len(found)) + found + data[8 + length :])

    return damage


def pickles(beside):
    def damage(directory):
        (directory / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
        if not beside:
            (directory / hf_files.SINGLE).unlink()

    return damage


def split(pattern, count=1):
    one = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    parts = [one] * count + [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    return edit("tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": parts})


def swap(directory, placed):
    one, other = sorted(set(placed.values()))[:2]
    first = next(name for name, file in placed.items() if file == one)
    placed[first] = other


def twice(directory, placed):
    one, other = sorted(set(placed.values()))[:2]
    shutil.copy(directory / one, directory / other)


def lost(directory, placed):
    (directory / sorted(set(placed.values()))[0]).unlink()


def moved(directory, placed):
    name = sorted(set(placed.values()))[0]
    (directory / name).rename(directory.parent / name)
    for key, file in placed.items():
        placed[key] = f"../{name}" if file == name else file


OPENED = {
    "as it is": lambda directory: None,
    "shards": sharded(lambda directory, placed: None),
    "pickles beside": pickles(True), "code beside": text("modeling_glm.py", "raise SystemExit(1)"),
    "code named": edit("config.json", auto_map={"AutoModel": "modeling_glm.Evil"}),
    "a snapshot of the Hub's cache": snapshot("blobs"),
    "no generation_config.json": lambda directory: (directory / "generation_config.json").unlink(),
    "10^30 for no limit": edit("tokenizer_config.json", model_max_length=10**30),
    "truncation": edit("tokenizer.json", truncation={"direction": "Right", "max_length": 8,
                                                     "strategy": "LongestFirst", "stride": 0}),
    "padding": edit("tokenizer.json", padding={"strategy": {"Fixed": 3 * 10**9}, "direction": "Right",
                                               "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                                               "pad_token": "x"}),
    **{f"{name} links to its neighbour": aside(name) for name in (*JSON_FILES, hf_files.SINGLE)},
    **{f"{name} of 45 levels": key_text(name, "x", "[" * 45 + "]" * 45) for name in JSON_FILES[:2]},
}  # fmt: skip
REFUSED = {
    **{f"{name} is a pipe": fifo(name) for name in (*JSON_FILES, hf_files.SINGLE)},
    **{f"{name} is a directory": folder(name) for name in (*JSON_FILES, hf_files.SINGLE)},
    **{f"{name} links to /etc/passwd": link(name) for name in (*JSON_FILES, hf_files.SINGLE)},
    **{f"{name} links to a device": link(name, "/dev/zero") for name in (*JSON_FILES, hf_files.SINGLE)},
    **{f"{name} links to nothing": link(name, "gone") for name in (*JSON_FILES, hf_files.SINGLE)},
    **{f"{name} links to another directory": behind_another_directory(name) for name in JSON_FILES},
    "a snapshot that leaves the cache": snapshot("up"),
    **{f"{name}: {what}": key_text(name, "x", raw) for name in JSON_FILES for what, raw in {
        "NaN": "NaN", "infinity": "-Infinity", "1e999": "1e999", "60 levels": "[" * 60 + "]" * 60,
        "5,000 digits": "9" * 5000, "half a surrogate pair": '"\\ud800"', "a key twice": '{"a": 1, "a": 2}',
    }.items()},
    **{f"{name}: beyond 64 bits": key_text(name, "x", "9" * 20) for name in JSON_FILES[:3]},
    **{f"{name}: {what}": text(name, raw) for name in JSON_FILES for what, raw in {
        "empty": b"", "a list": b"[]", "not UTF-8": b'{"a": "\xff"}', "UTF-16": '{"a": 1}'.encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf{}", "100,000 levels": b"[" * 100_000, "cut": b'{"a": 1', "two": b"{} {}",
    }.items()},
    "config.json of 2 MB": key_text("config.json", "x", '"' + "x" * (2 << 20) + '"'),
    "tokenizer_config.json of 5 MB": key_text("tokenizer_config.json", "x", '"' + "x" * (5 << 20) + '"'),
    "pickles only": pickles(False),
    "an index that names ../": sharded(moved), "an index of another shard": sharded(swap),
    "a tensor in two shards": sharded(twice), "a shard that is gone": sharded(lost),
    "a tensor that the index leaves out": sharded(lambda d, placed: placed.pop("model.layers.0.self_attn.q_proj.bias")),
    "an index of what is not there": sharded(lambda d, placed: placed.update(more=next(iter(placed.values())))),
    "an index of a pickle": sharded(lambda d, placed: placed.update(dict.fromkeys(placed, "w.bin"))),
    "an index of numbers": sharded(lambda d, placed: placed.update(dict.fromkeys(placed, 1))),
    "a header that names a tensor twice": header(lambda raw: raw[:-1].rstrip() + b"," + raw.lstrip()[1:]),
    "a header of NaN": header(lambda raw: b'{"a": NaN}'), "a header that is a list": header(lambda raw: b"[]"),
    "a header of 100,000 levels": header(lambda raw: b"[" * 100_000),
    "a header of 17 MB": header(lambda raw: raw + b" " * (17 << 20)),
    "a header of 2^60 bytes": text(hf_files.SINGLE, (2**60).to_bytes(8, "little")),
    "an empty weight file": text(hf_files.SINGLE, b""),
    "8-bit weights": header(lambda raw: raw.replace(b'"F32"', b'"F8_E4M3"')),
    "quantised by name": edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
    "10^40 layers": key_text("config.json", "num_hidden_layers", "1" + "0" * 40),
    "10^9 layers": edit("config.json", num_hidden_layers=10**9),
    "a stop token of 10^40": key_text("config.json", "eos_token_id", "1" + "0" * 40),
    "a split that never ends": split(r"(\w+)+!"), "a split of the fourth power": split(r"x*x*x*x*y"),
    "a split of 2^30 ways": split("x?" * 30 + "y"), "60 splits": split(r"\s+", 60),
    "a split that does not compile": split("("),
}  # fmt: skip
LOADED = (".json", ".safetensors")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("sound") / "models--a--b" / "snapshots" / "0")


@pytest.fixture
def damaged(sound, tmp_path):
    """``damaged(damage)``: a copy of the directory with one thing done to it."""

    def make(damage):
        directory = tmp_path / "models--a--b" / "snapshots" / "0"
        shutil.copytree(sound, directory)
        damage(directory)
        return directory

    return make


def by_mentalglm(directory: Path) -> str:
    try:
        checkpoint = hf_files.Checkpoint(directory)
        config = read_config(checkpoint)
        check_tensors(checkpoint, config, detect_layout(checkpoint.tensors))
        if (directory / "generation_config.json").exists() or (directory / "generation_config.json").is_symlink():
            generation_config(config, read_json(directory / "generation_config.json"))
        GlmTokenizer.load(directory)
    except MentalGLMError as error:
        return str(error)
    return ""


def by_probes(directory: Path) -> str:
    try:
        probed.check_model(directory)
        load_tokenizer(directory)
    except ProbeError as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", OPENED)
def test_both_open(damaged, name):
    directory = damaged(OPENED[name])
    assert (by_mentalglm(directory), by_probes(directory)) == ("", "")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse(damaged, name):
    directory = damaged(REFUSED[name])
    for said in (by_mentalglm(directory), by_probes(directory)):
        assert said, "opened"
        assert str(directory.parent.parent) in said and len(said.splitlines()) == 1, said


ADAPTERS = {
    **{f"{name} is a pipe": fifo(name) for name in (adapters.CONFIG, adapters.WEIGHTS)},
    **{f"{name} links elsewhere": link(name) for name in (adapters.CONFIG, adapters.WEIGHTS)},
    **{f"{name} is a directory": folder(name) for name in (adapters.CONFIG, adapters.WEIGHTS)},
    **{f"{name} is gone": lambda d, name=name: (d / name).unlink() for name in (adapters.CONFIG, adapters.WEIGHTS)},
    "pickles only": lambda d: (d / adapters.WEIGHTS).rename(d / "adapter_model.bin"),
    "a long configuration": key_text(adapters.CONFIG, "x", '"' + "x" * (2 << 20) + '"'),
    "a rank that is no number": key_text(adapters.CONFIG, "r", "NaN"),
    "a rank of 10^40": key_text(adapters.CONFIG, "r", "1" + "0" * 40),
    "a deep configuration": text(adapters.CONFIG, "[" * 100_000), "a key twice": text(adapters.CONFIG, '{"r":1,"r":2}'),
    "half a pair": key_text(adapters.CONFIG, "x", '"\\udfff"'), "no tensors": text(adapters.WEIGHTS, b""),
    "a header of 2^60 bytes": text(adapters.WEIGHTS, (2**60).to_bytes(8, "little")),
}  # fmt: skip


@pytest.mark.parametrize("name", ["as it is", "pickles beside", *ADAPTERS])
def test_adapters(tmp_path, monkeypatch, name):
    monkeypatch.setattr(adapters, "add_lora", checked)
    directory = write_adapter(tmp_path / "adapter")
    if name == "pickles beside":
        (directory / "adapter_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    elif name != "as it is":
        ADAPTERS[name](directory)
    said = []
    model = abstract_model(CONFIG)
    for judge in (lambda: adapters.load_adapter(model, directory), lambda: probed.check_adapter(directory)):
        try:
            judge()
            said.append("")
        except Checked:  # the arrays that would now be made are not
            said.append("")
        except (MentalGLMError, ProbeError) as error:
            said.append(str(error))
    assert [bool(line) for line in said] == [name in ADAPTERS] * 2, said
    assert all(str(directory) in line and len(line.splitlines()) == 1 for line in said if line)


def test_both_packages_have_the_same_description():
    one, other = ((files(package) / "directory.json").read_bytes() for package in ("mentalglm_jax", "probes"))
    assert one == other
    said = json.loads(one)
    assert (hf_files.SINGLE, hf_files.INDEX, hf_files.PICKLES) == (probed.SINGLE, probed.INDEX, probed.PICKLES)
    assert (hf_files.MAX_HEADER_BYTES, hf_files.MAX_TENSORS) == (probed.MAX_HEADER_BYTES, probed.MAX_TENSORS)
    assert (adapters.CONFIG, adapters.WEIGHTS) == (probed.ADAPTER_CONFIG, probed.ADAPTER_WEIGHTS)
    assert [*hf_files.DTYPES] == said["dtypes"] == [*probed.DTYPES][1:]


def test_a_published_split_is_known_to_both():
    from probes.models.patterns import backtracks

    assert not [pattern for pattern in tokenizer_files.KNOWN_SPLITS if backtracks(pattern)]


def test_warnings_are_ours(sound):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (by_mentalglm(sound), by_probes(sound)) == ("", "")
