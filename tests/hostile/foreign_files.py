"""Small valid files of every kind that strangers hand over, made without a model; attacks damage copies."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mentalglm_jax.checkpoints.adapters import _shapes
from mentalglm_jax.checkpoints.hf_files import TensorSource, write_shards
from mentalglm_jax.checkpoints.peft_config import to_peft
from mentalglm_jax.checkpoints.weights import inventory
from mentalglm_jax.cli.output import inert
from mentalglm_jax.errors import MentalGLMError
from mentalglm_jax.model.glm import GlmConfig, abstract_model
from mentalglm_jax.model.lora import LoraConfig, resolve
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import BUILTIN
from tests.hostile.attack import Outcome

CONFIG = GlmConfig(
    vocab_size=2560, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=256, eos_token_id=(1, 2), pad_token_id=0,
)  # fmt: skip
LORA = LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj", "v_proj"))
RECORD = {
    "id": "r1", "task": "suicide_risk", "language": "en", "post": "I slept badly.", "label": "high",
    "question": tasks.TASKS["suicide_risk"].question("en"), "explanation": "Because.", "split": "test",
}  # fmt: skip
Damage = Callable[[Path], Any]


def write_checkpoint(directory: Path, shard_bytes: int = 1 << 30) -> Path:
    """A GLM-4 of two layers with its tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copytree(BUILTIN, directory, dirs_exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    sources = [
        TensorSource(name, "F32", tensor.shape, lambda shape=tensor.shape: [np.full(shape, 0.5, np.float32)])
        for name, tensor in inventory(CONFIG, "glm").items()
    ]
    write_shards(directory, sources, shard_bytes)
    return directory


def write_adapter(directory: Path) -> Path:
    """A PEFT adapter for it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(to_peft(LORA, None)))
    model = abstract_model(CONFIG)
    shapes = _shapes(model, LORA, resolve(model, LORA))
    save_file(
        {key: np.ones(shape, np.float32) for key, shape in shapes.items()}, directory / "adapter_model.safetensors"
    )
    return directory


def edit(name: str, **changes: Any) -> Damage:
    """Sets keys of a JSON file; ``...`` removes one."""

    def damage(directory: Path) -> None:
        value = json.loads((directory / name).read_text())
        for key, new in changes.items():
            value.pop(key, None) if new is ... else value.update({key: new})
        (directory / name).write_text(json.dumps(value))

    return damage


def text(name: str, content: str | bytes) -> Damage:
    """Replaces a file."""
    return lambda directory: (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def key_text(name: str, key: str, raw: str) -> Damage:
    """Sets one key to JSON text that ``json.dumps`` would not write."""

    def damage(directory: Path) -> None:
        value = json.loads((directory / name).read_text())
        value[key] = "MARK"
        (directory / name).write_text(json.dumps(value).replace('"MARK"', raw))

    return damage


def fifo(name: str) -> Damage:
    """A pipe that nobody writes to in the place of a file."""

    def damage(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return damage


def link(name: str, target: str = "/etc/passwd") -> Damage:
    """A link to somewhere else."""

    def damage(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(target)

    return damage


def called(function: Callable[[], Any]) -> Outcome:
    """What a library call ended in, as the command line would print it."""
    try:
        function()
    except MentalGLMError as error:
        return Outcome(error.exit_code, "", inert(f"mentalglm: {error}") + "\n", 0.0)
    return Outcome(0, "", "", 0.0)


# What any JSON file may be, and what is said of it.
JSON_ATTACKS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "not JSON"),
    "truncated": ('{"a": 1', "not JSON"),
    "a list": ("[1]", "must hold a JSON object"),
    "not UTF-8": (b'{"a": "\xff"}', "UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "not JSON"),
    "deep": ("[" * 100_000, "levels"),
    "just too deep": ('{"a":' * 60 + "1" + "}" * 60, "levels"),
    "5,000 digits": ('{"a": ' + "9" * 5000 + "}", "5000 digits"),
    "beyond 64 bits": ('{"a": 10000000000000000000000000000000000000000}', "41 digits"),
    "NaN": ('{"a": NaN}', "NaN is not a number"),
    "minus infinity": ('{"a": -Infinity}', "-Infinity is not a number"),
    "1e999": ('{"a": 1e999}', "1e999 is infinite"),
    "half a surrogate pair": ('{"a": "\\ud800"}', "surrogate"),
    "half a pair in a key": ('{"\\udc00": 1}', "surrogate"),
    "a key twice": ('{"a": 1, "a": 2}', "'a' stands more than once"),
    "text behind": ("{} {}", "more text"),
    "17 MB": ("{" + " " * (17 << 20) + "}", "too large"),
}


def _torn(first: str, *rows: str, delimiter: str = ",") -> str:
    """A table written without a convention: ``first`` begins in the second line of data."""
    lines = ["post,label", "The sun came out,low", first, *rows, "I am tired,high", "It was late,low"]
    return "\n".join(lines).replace(",", delimiter) + "\n"


# Two posts of which one begins with a mark and a later one ends with one: ending, content, line of the merged row.
TORN_TABLES = {
    "tabs": (".tsv", _torn('"Thread 1,high', 'Thread 2",low', delimiter="\t"), 3),
    "commas": (".csv", _torn('"Thread 1,high', 'Thread 2",low'), 3),
    "with rows between": (".csv", _torn('"Thread 1,high', "What now,low", "Nobody calls,high", 'Thread 2",low'), 3),
    "with a row of another width between": (".csv", _torn('"One,high', "What, now,low", "Three,high", 'Two",low'), 3),
    "where spaces stand beside commas": (".csv", _torn('"Thread 1, high', 'Thread 2", low').replace(",", ", "), 3),
    "labels of other rows unseen": (".csv", 'post,label\n"One,7\nTwo",8\nThree,9\n', 2),
    "labels first": (".tsv", 'label\tpost\nlow\t"One\nhigh\tTwo"\nlow\tThree\nhigh\tFour\n', 2),
    "ids first": (".csv", 'id,post,label\n1,"One,high\n2,Two",low\n3,Three,high\n4,Four,low\n', 2),
    "where the row has another width": (".csv", _torn('"One,high', 'Two,low', 'Three"'), 3),
    "in a table that quotes elsewhere": (".csv", _torn('"One,high', 'Two",low', '"rain, sun",low'), 3),
    "with line ends of Windows": (".csv", _torn('"One,high', 'Two",low').replace("\n", "\r\n"), 3),
    "with line ends of old": (".csv", _torn('"One,high', 'Two",low').replace("\n", "\r"), 3),
}  # fmt: skip
