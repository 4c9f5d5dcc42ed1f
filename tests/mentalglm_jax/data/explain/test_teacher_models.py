"""Real models as teachers: one served by `transformers serve`, one loaded by this package; both say what it says."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from flax import nnx

from mentalglm_jax.checkpoints.directories import load, save_pretrained
from mentalglm_jax.cli.data import local_teacher
from mentalglm_jax.cli.main import main
from mentalglm_jax.data.explain.build import BuildRecipe, build
from mentalglm_jax.data.records import write_records
from mentalglm_jax.inference.generate import answer_text, generate_ids
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
from tests.mentalglm_jax.data.explain.test_build import quiet, records

WORDS = 12


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A one-layer model that answers, as `mentalglm export --to merged` leaves it."""
    directory, tokenizer = tmp_path_factory.mktemp("teacher") / "merged", GlmTokenizer.load(BUILTIN)
    config = GlmConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                       head_dim=8, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.4,
                       max_position_embeddings=4096, eos_token_id=tokenizer.eos_ids,
                       pad_token_id=tokenizer.pad_id)  # fmt: skip
    save_pretrained(Glm(config, rngs=nnx.Rngs(3)), directory, tokenizer=tokenizer)
    return directory


def recipe(model_dir: Path, folder: Path, **teacher) -> BuildRecipe:
    write_records(folder / "posts.jsonl", records(3))
    write_records(folder / "experts.jsonl", records(16, 100, explanation="专家写道“可以”。"))
    return BuildRecipe.model_validate({
        "out": folder / "out", "cache": folder / "cache", "data": {"root": folder / "posts.jsonl"}, "attempts": 1,
        "experts": folder / "experts.jsonl", "examples_per_class": 1,
        "teacher": {"model": str(model_dir), "temperature": 0.0, "max_tokens": WORDS, **teacher},
    })  # fmt: skip


def answers(folder: Path) -> dict[str, str]:
    """The last user turn asked to what was said, from the cache."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "cache").glob("??/*.json")]
    return {json.dumps(one["asked"]["messages"]): one["answer"]["text"] for one in found}


def own_words(model_dir: Path, messages: list[dict[str, str]]) -> str:
    """The greedy answer of the same model to the same chat, as the model's own tokenizer lays it out."""
    tokenizer = GlmTokenizer.load(model_dir)
    turns = [token for one in messages for token in tokenizer.turn_ids(one["role"], one["content"])]
    prompt = [*tokenizer.prefix_ids, *turns, tokenizer.id_of("<|assistant|>")]
    (ids,) = generate_ids(load(str(model_dir)), [prompt], max_new_tokens=WORDS, eos_ids=tokenizer.eos_ids,
                          vocab_limit=tokenizer.vocab_size)  # fmt: skip
    return answer_text(tokenizer, ids)


def test_a_model_of_ours_is_a_teacher(model_dir, tmp_path, capsys):
    """By the command: what the model says is what it says anywhere, and a second build asks nothing."""
    made = recipe(model_dir, tmp_path, local=True)
    file = tmp_path / "build.yaml"
    file.write_text(json.dumps(json.loads(made.model_dump_json())), encoding="utf-8")
    for asked in ({"asked": 3}, {"cached": 3}):
        with pytest.raises(SystemExit) as stop:
            main(["data", "build", str(file), "--json"])
        assert stop.value.code == 0
        manifest = json.loads(capsys.readouterr().out)
        assert manifest["teacher"] == asked
        # It was never trained.
        assert manifest["records"] == {"asked": 3, "accepted": 0, "rejected": 3, "filtered": 0, "too_long": 0}
    (messages, said), *rest = answers(tmp_path).items()
    assert len(rest) == 2 and said == own_words(model_dir, json.loads(messages))
    assert local_teacher(made.teacher, made.cache).stats == {}


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1200):
        assert process.poll() is None, log.read_text(encoding="utf-8")
        try:
            with urllib.request.urlopen(url, timeout=5) as found:
                assert found.status == 200
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(f"no server after ten minutes: {log.read_text(encoding='utf-8')}")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_transformers_serves_the_exported_model_as_teacher(model_dir, tmp_path):
    """A real server of another make, started and stopped here; greedy, it says what our own decoding says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "server.log"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model_dir), "--host", "127.0.0.1",
               "--port", str(port), "--device", "cpu"]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
                                   env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        made = recipe(model_dir, tmp_path, base_url=f"http://127.0.0.1:{port}/v1", concurrency=2, timeout=300.0)
        manifest = build(made, quiet)
        again = build(made, quiet)
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert manifest["teacher"] == {"asked": 3} and again["teacher"] == {"cached": 3}
    assert manifest["records"] == {"asked": 3, "accepted": 0, "rejected": 3, "filtered": 0, "too_long": 0}
    assert manifest["checks"]["states_gold_label"]["passed"] == 0
    for messages, said in answers(tmp_path).items():
        assert said.removeprefix("\n") == own_words(model_dir, json.loads(messages))
