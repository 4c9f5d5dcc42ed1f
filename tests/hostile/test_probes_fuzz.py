"""Every reader of foreign bytes of ``probes`` on damaged files: it is read, or refused as ours; nothing else.
``fuzzing.py`` says how inputs are made and judged, ``test_fuzz.py`` has the other side."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from probes.errors import ProbeError
from probes.foreign import foreign_code, parse_json, read_json
from probes.models.adapter import read_config
from probes.models.directory import Tensor, _once, check_adapter, check_model
from probes.models.encode import encode, read_generations
from probes.models.token_bytes import TokenBytes
from probes.models.tokenizer import _checked, load_tokenizer
from probes.models.verify import read_reference
from probes.results.cache import digest
from probes.results.lock import HOLDER, _holder
from probes.results.posts import PostResult
from probes.results.store import SCHEMA_VERSION, read_manifest, read_run
from probes.results.summary import summarise
from tests.hostile.fuzzing import (
    AT_LENGTH,
    EXAMPLES,
    Reader,
    Readers,
    attack,
    check,
    either,
    from_file,
    in_bytes,
    in_header,
    in_rows,
    in_values,
)
from tests.probes.tiny import POSTS, boilerplate, make_model, make_row, make_tokenizer, save_adapter
from tests.probes.worlds import post_result

TOKENIZER = make_tokenizer([f"{post} {boilerplate(language)}" for language, post, _ in POSTS], 360)
ROW = make_row(TOKENIZER, 0, *POSTS[1])
TOKENS = TokenBytes(TOKENIZER)
MODULES = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "o_proj")]
TENSORS = {
    f"base_model.model.{name}.lora_{half}.weight": Tensor(Path("w"), "F32", (4, 8) if half == "A" else (8, 4))
    for name in MODULES for half in "AB"
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "rank_pattern": {},
    "alpha_pattern": {}, "bias": "none", "use_dora": False, "modules_to_save": None, "layers_to_transform": None,
    "init_lora_weights": True, "exclude_modules": None, "trainable_token_indices": None, "layers_pattern": None,
}  # fmt: skip
PATTERNS = ADAPTER | {"rank_pattern": {r".*\.0\.self_attn.q_proj": 4}, "target_modules": ".*_proj",
                      "alpha_pattern": {"o_proj": 16}}  # fmt: skip
POST = post_result(0).to_dict()
NAME = f"{'0' * 32}.json"
SUMMARY = json.loads(json.dumps(summarise([PostResult.from_dict(POST)], n_boot=20)))
MANIFEST = {
    "kind": "probes", "schema_version": SCHEMA_VERSION, "status": "done", "cache": [NAME], "model": "m",
    "rows": 1, "skipped": [],
    "redact": False, "methods": ["ig"], "settings": {}, "versions": {}, "limit": None, "summary": digest(SUMMARY),
    "n_boot": 20,
}  # fmt: skip
BPE = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": {"type": "NFC"},
    "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                                        "use_regex": True},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\p{L}+|\\s+(?!\\S)"}, "behavior": "Isolated",
                      "invert": False},
    "model": {"type": "BPE", "dropout": None, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
}  # fmt: skip
UNIGRAM = BPE | {
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁a", -1.5], ["b", -2.0]],
              "byte_fallback": False},
}  # fmt: skip
READERS = Readers()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model(TOKENIZER).save_pretrained(path / "model")
    TOKENIZER.save_pretrained(path / "model")
    save_adapter(path / "model", path / "adapter")
    return path


def _model(place: Path, name: str) -> Reader:
    file = place / "model" / name
    return Reader(in_values(json.loads(file.read_text())), from_file(file, lambda: check_model(place / "model")))


@READERS.reads("config.json")
def _config(place: Path) -> Reader:
    return _model(place, "config.json")


@READERS.reads("generation_config.json")
def _generation_config(place: Path) -> Reader:
    return _model(place, "generation_config.json")


@READERS.reads("model.safetensors")
def _safetensors(place: Path) -> Reader:
    file = place / "x.safetensors"
    save_file({"a.weight": np.ones((2, 3), np.float32), "b": np.zeros(4, np.int32)}, file, {"format": "pt"})
    data = file.read_bytes()
    return Reader(either(in_header(data), in_header(data), in_bytes(data)), from_file(file, lambda: _once([file])))


@READERS.reads("model.safetensors.index.json")
def _index(place: Path) -> Reader:
    folder = place / "sharded"
    folder.mkdir()
    for number in (1, 2):
        save_file({f"model.{number}.weight": np.ones((64, 64), np.float32)}, folder / f"m-{number}.safetensors")
    shutil.copy(place / "model" / "config.json", folder)
    sound = {"metadata": {"total_size": 48}, "weight_map": {f"model.{n}.weight": f"m-{n}.safetensors" for n in (1, 2)}}
    file = folder / "model.safetensors.index.json"
    return Reader(in_values(sound), from_file(file, lambda: check_model(folder)))


@READERS.reads("adapter_config.json")
def _adapter_config(place: Path) -> Reader:
    def read(data: bytes) -> None:
        raw = parse_json(data, "adapter_config.json")
        if not isinstance(raw, dict):
            raise ProbeError("no object")
        read_config(raw, Path("adapter_config.json"), MODULES, TENSORS)

    return Reader(in_values(ADAPTER, PATTERNS), read)


@READERS.reads("adapter_model.safetensors")
def _adapter_model(place: Path) -> Reader:
    file = place / "adapter" / "adapter_model.safetensors"

    def read() -> None:
        raw, tensors = check_adapter(place / "adapter")
        read_config(raw, Path("adapter_config.json"), MODULES, tensors)

    return Reader(in_header(file.read_bytes()), from_file(file, read))


def _tokenizer_file(path: Path, *sound: dict[str, Any]) -> Reader:
    def read(data: bytes) -> None:
        value = _checked(path, data)
        if path.name == "tokenizer.json":
            with foreign_code("m", "no usable tokenizer"):  # what transformers makes of the checked file
                made = tokenizers.Tokenizer.from_str(json.dumps(value))
                made.no_truncation()
                made.no_padding()
                made.encode("ab 我 a", add_special_tokens=False)

    return Reader(in_values(*sound), read)


@READERS.reads("tokenizer.json")
def _tokenizer(place: Path) -> Reader:
    return _tokenizer_file(Path("tokenizer.json"), BPE, UNIGRAM)


@READERS.reads("tokenizer_config.json")
def _tokenizer_config(place: Path) -> Reader:
    return _tokenizer_file(Path("tokenizer_config.json"),
                           json.loads((place / "model" / "tokenizer_config.json").read_text()))  # fmt: skip


@READERS.reads("a tokenizer for transformers")
def _loaded(place: Path) -> Reader:
    name = "tokenizer_config.json"
    sound = json.loads((place / "model" / name).read_text())
    return Reader(in_values(sound), from_file(place / "model" / name, lambda: load_tokenizer(place / "model")))


@READERS.reads("generations.jsonl")
def _generations(place: Path) -> Reader:
    def read() -> None:
        for row in read_generations(place / "rows.jsonl"):
            encode(row, TOKENS)

    return Reader(in_rows(ROW, ROW | {"id": "other"}), from_file(place / "rows.jsonl", read))


@READERS.reads("a cached post")
def _cached(place: Path) -> Reader:
    def read(data: bytes) -> None:
        value = parse_json(data, "post", half_pairs=True)
        if not isinstance(value, dict):
            raise ProbeError("no object")
        PostResult.from_dict(value).evidence(n_boot=2)

    return Reader(in_values(POST), read)


def _finished(place: Path) -> Path:
    run = place / "run"
    (run / "cache").mkdir(parents=True)
    (run / "cache" / NAME).write_text(json.dumps({"digest": digest(POST, name=NAME), "value": POST}))
    (run / "manifest.json").write_text(json.dumps(MANIFEST))
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    return run


@READERS.reads("manifest.json")
def _manifest(place: Path) -> Reader:
    run = _finished(place)

    def read() -> None:
        read_manifest(run)
        read_run(run)

    return Reader(in_values(MANIFEST), from_file(run / "manifest.json", read))


@READERS.reads("summary.json")
def _summary(place: Path) -> Reader:
    run = _finished(place)
    return Reader(in_values(SUMMARY), from_file(run / "summary.json", lambda: read_run(run)))


@READERS.reads("an entry of the cache")
def _entry(place: Path) -> Reader:
    run = _finished(place)
    sound = json.loads((run / "cache" / NAME).read_text())
    return Reader(in_values(sound), from_file(run / "cache" / NAME, lambda: read_run(run)))


@READERS.reads("reference_logits.npz")
def _reference(place: Path) -> Reader:
    buffer = io.BytesIO()
    np.savez(buffer, tokens=np.ones((1, 3), np.int32), lengths=np.array([3]), logits=np.zeros((1, 3, 4), np.float32),
             prompt_ids=np.ones((1, 2), np.int32), prompt_lengths=np.array([2]), greedy_ids=np.ones((1, 2), np.int32),
             eos_ids=np.array([1]))  # fmt: skip
    return Reader(in_bytes(buffer.getvalue()), from_file(place / "r.npz", lambda: read_reference(place / "r.npz")))


@READERS.reads("who holds a lock")
def _lock(place: Path) -> Reader:
    def read() -> None:
        if _holder(place) == "another process":  # nothing is known of it
            read_json(place / HOLDER)

    return Reader(in_values({"host": "h", "process": 12}), from_file(place / HOLDER, read))


def fuzzed(name: str, model: Path, place: Path, count: int) -> None:
    shutil.copytree(model, place, dirs_exist_ok=True)
    check(attack(f"probes: {name}", READERS[name](place), ProbeError, count))


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", READERS)
def test_fuzz(name, model, tmp_path):
    fuzzed(name, model, tmp_path, EXAMPLES)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", READERS)
def test_fuzz_at_length(name, model, tmp_path):
    fuzzed(name, model, tmp_path, AT_LENGTH)


@pytest.mark.parametrize("name", ["generations.jsonl", "manifest.json"])
@settings(max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200) | st.text(alphabet='{}[]",:\\u0d8e1N9.-', max_size=60).map(str.encode))
def test_bytes_that_are_no_json(name, data, tmp_path_factory):
    place = tmp_path_factory.mktemp("bytes")
    (place / "rows.jsonl").write_bytes(data)
    (place / "manifest.json").write_bytes(data)
    with pytest.raises(ProbeError):
        read_generations(place / "rows.jsonl") if name == "generations.jsonl" else read_manifest(place)
