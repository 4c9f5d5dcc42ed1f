"""Random damage to every file of strangers that ``probes`` reads: it is read, or refused as ours; nothing else."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from probes.errors import ProbeError
from probes.models.adapter import read_config
from probes.models.directory import Tensor
from probes.models.encode import TokenBytes, encode, read_generations
from probes.models.tokenizer import _tokenizer_json
from probes.results.cache import digest
from probes.results.store import SCHEMA_VERSION, PostResult, read_manifest, read_run
from tests.probes.tiny import POSTS, boilerplate, make_row, make_tokenizer
from tests.probes.worlds import post_result

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**45), 10**45), st.floats(),
    st.sampled_from([math.nan, math.inf, 1e308, -0.0, "", "\ud800", "\x00", "../x", "(a+)+", "(?i)x", "=1+1", [], {}]),
    st.text(max_size=8),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
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
POST = post_result(0).to_dict()
NAME = f"{'0' * 32}.json"
MANIFEST = {
    "kind": "probes", "schema_version": SCHEMA_VERSION, "status": "done", "cache": [NAME], "model": "m",
    "rows": 1, "skipped": [],
    "redact": False, "methods": ["ig"], "settings": {}, "versions": {}, "limit": None, "summary": digest({}),
}  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value can be changed."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in items for place in _places(one, (*path, key)))][:400]


@st.composite
def damaged(draw: st.DrawFn, sound: dict[str, Any]) -> dict[str, Any]:
    """``sound`` with one to three values replaced or left out."""
    value = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(_places(value)[1:]))
        node = value
        for key in path:
            node = node[key]
        if draw(st.booleans()):
            node[last] = draw(VALUES)
        else:
            del node[last]
        if not value:
            break
    return value


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def generations(value: dict[str, Any], place: Path) -> None:
    (place / "rows.jsonl").write_bytes(_dump(value))
    for row in read_generations(place / "rows.jsonl"):
        encode(row, TOKENS)


def adapter_config(value: dict[str, Any], place: Path) -> None:
    from probes.foreign import parse_json

    raw = parse_json(_dump(value), "adapter_config.json")
    read_config(raw, Path("adapter_config.json"), MODULES, TENSORS)


def cached_post(value: dict[str, Any], place: Path) -> None:
    from probes.foreign import parse_json

    PostResult.from_dict(parse_json(_dump(value), "post", half_pairs=True)).evidence(n_boot=20)


def manifest(value: dict[str, Any], place: Path) -> None:
    (place / "cache").mkdir(exist_ok=True)
    (place / "cache" / NAME).write_bytes(_dump({"digest": digest(POST, name=NAME), "value": POST}))
    (place / "manifest.json").write_bytes(_dump(value))
    (place / "summary.json").write_bytes(b"{}")
    read_manifest(place)
    read_run(place)


def tokenizer(value: dict[str, Any], place: Path) -> None:
    from probes.foreign import parse_json

    _tokenizer_json(Path("tokenizer.json"), parse_json(_dump(value), "tokenizer.json"))


SOUND = {
    "truncation": None, "padding": None, "added_tokens": [], "normalizer": {"type": "NFC"}, "post_processor": None,
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\p{L}+|\\s+(?!\\S)"}, "behavior": "Isolated"},
    "model": {"type": "BPE", "dropout": None, "vocab": {"a": 0}, "merges": []},
}  # fmt: skip
READERS = {
    "generations.jsonl": (generations, ROW), "adapter_config.json": (adapter_config, ADAPTER),
    "a cached post": (cached_post, POST), "manifest.json": (manifest, MANIFEST), "tokenizer.json": (tokenizer, SOUND),
}  # fmt: skip


def _fuzz(name: str, place: Path, count: int) -> None:
    reader, sound = READERS[name]
    reader(copy.deepcopy(sound), place)  # it is sound to begin with

    @settings(max_examples=count, deadline=5000, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(damaged(sound))
    def damage(value: dict[str, Any]) -> None:
        refusal = None
        try:
            reader(value, place)
        except ProbeError as error:
            refusal = str(error)
        assert refusal is None or (refusal and "\n" not in refusal)

    damage()


@pytest.mark.filterwarnings("ignore::probes.errors.ProbeWarning")
@pytest.mark.parametrize("name", READERS)
def test_200_damaged_files(name, tmp_path):
    _fuzz(name, tmp_path, 200)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.filterwarnings("ignore::probes.errors.ProbeWarning")
@pytest.mark.parametrize("name", READERS)
def test_100000_damaged_files(name, tmp_path):
    _fuzz(name, tmp_path, 100_000)


@pytest.mark.parametrize("name", ["generations.jsonl", "manifest.json"])
@settings(max_examples=100, deadline=5000, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200) | st.text(alphabet='{}[]",:\\u0d8e1N9.-', max_size=60).map(str.encode))
def test_bytes_that_are_no_json(name, data, tmp_path_factory):
    place = tmp_path_factory.mktemp("bytes")
    (place / "rows.jsonl").write_bytes(data)
    (place / "manifest.json").write_bytes(data)
    with pytest.raises(ProbeError):
        read_generations(place / "rows.jsonl") if name == "generations.jsonl" else read_manifest(place)
