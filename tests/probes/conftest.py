"""A tiny random GLM and a tiny byte-level BPE tokenizer, saved as a model directory; and rows for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from probes.probe import Probe
from tests.probes.tiny import POSTS, boilerplate, make_model, make_row, make_tokenizer, save_adapter


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer([f"{post} {boilerplate(language)}" for language, post, _ in POSTS], 360)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Model directory as `save_pretrained` writes it: random weights of standard deviation 0.2."""
    path = tmp_path_factory.mktemp("tiny_model")
    make_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_probe(tiny_model_dir: Path) -> Probe:
    return Probe.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="session")
def tiny_rows(tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    return [make_row(tokenizer, index, *post) for index, post in enumerate(POSTS)]


@pytest.fixture(scope="session")
def tiny_generations(tmp_path_factory: pytest.TempPathFactory, tiny_rows: list[dict[str, Any]]) -> Path:
    path = tmp_path_factory.mktemp("generations") / "generations.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in tiny_rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def adapter_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    save_adapter(tiny_model_dir, path)
    return path
