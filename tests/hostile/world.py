"""A small world in which every command that writes has something to write, and what stands in for a hostile disk."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from mentalglm_jax.checkpoints.adapters import save_adapter
from mentalglm_jax.checkpoints.directories import save_pretrained
from mentalglm_jax.cli.main import main
from mentalglm_jax.data.explain.review import SCALES, form_id
from mentalglm_jax.data.records import Record, read_records, write_records
from mentalglm_jax.inference.generate import generation_row
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.lora import LoraConfig, add_lora
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
from mentalglm_jax.train.recipe import load_recipe, what_it_is

RECORDS = [
    Record(
        f"r{i}", "suicide_risk", "en", f"I like {what}.", "Is it high or low?", "low", explanation=f"It says {what}."
    )
    for i, what in enumerate(("rain", "wind", "snow", "soup"))
]
RECIPE = {
    "run_dir": "run", "data": {"source": "jsonl", "root": "data"}, "model": {"path": "model"}, "verify": False,
    "lora": {"rank": 2, "alpha": 4}, "probe": {"posts": 0}, "generate": {"max_new_tokens": 2, "batch_size": 4},
    "stages": [{"name": "a", "languages": ["en"], "train": {"steps": 2, "rows": 1, "sequence_length": 256}}],
}  # fmt: skip
BUILD = {"out": "built", "cache": "cache", "data": {"root": "records.jsonl"}, "experts": "records.jsonl",
         "teacher": {"base_url": "http://127.0.0.1:9", "model": "m"}}  # fmt: skip

# What a command that writes is called with, and what it writes to.
WRITES = {
    "mentalglm run": (["recipe.yaml"], "run"),
    "mentalglm train": (["recipe.yaml"], "run"),
    "mentalglm sweep": (["recipe.yaml", "--out", "swept"], "swept"),
    "mentalglm generate": (["model", "--in", "records.jsonl", "--out", "answers.jsonl"], "answers.jsonl"),
    "mentalglm evaluate": (["finished/generations.jsonl", "--out", "evaluated"], "evaluated"),
    "mentalglm leaderboard": (["finished", "--out", "board.md"], "board.md"),
    "mentalglm convert": (["model", "converted", "--to", "chatglm"], "converted"),
    "mentalglm export": (["trained", "--to", "peft", "--out", "exported"], "exported"),
    "mentalglm data inspect": (["records.jsonl", "--no-near", "--out", "scrubbed"], "scrubbed"),
    "mentalglm data import": (["posts.csv", "--text", "post", "--label", "label", "--out", "mine"], "mine"),
    "mentalglm data build": (["build.yaml"], "cache"),
    "mentalglm data review export": (["records.jsonl", "--out", "review"], "review"),
    "mentalglm data review import": (["rated", "ratings.json"], "rated"),
}  # fmt: skip
# Print only; or (probes) are tried in the tests of the folder that writes for them.
ELSEWHERE = {
    "mentalglm plan", "mentalglm doctor", "mentalglm tasks list", "mentalglm tasks show", "mentalglm tasks check",
    "mentalglm bench", "mentalglm chat", "mentalglm serve",
    "probes run", "probes demo", "probes check", "probes report", "probes randomise", "probes rank",
    "probes verify", "probes selftest", "probes validate", "probes leaderboard", "probes rows", "probes answer",
}  # fmt: skip


def make_world(directory: Path) -> None:
    """Fills ``directory``: model, records, recipes, a trained run, finished answers with their evaluation, a review."""
    tokenizer = GlmTokenizer.load(BUILTIN)
    config = GlmConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                       head_dim=8, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048,
                       pad_token_id=tokenizer.pad_id)  # fmt: skip
    model = Glm(config, rngs=nnx.Rngs(0))
    save_pretrained(model, directory / "model", tokenizer=tokenizer)
    write_records(directory / "records.jsonl", RECORDS)
    for split in ("train", "dev"):
        write_records(directory / "data" / f"{split}.jsonl", RECORDS[:2] if split == "train" else RECORDS[2:])
    (directory / "posts.csv").write_text("post,label\nI like rain.,good\nI like wind.,bad\n")
    (directory / "recipe.yaml").write_text(json.dumps(RECIPE))
    (directory / "build.yaml").write_text(json.dumps(BUILD))
    with contextlib.chdir(directory):
        recipe = load_recipe(Path("recipe.yaml"), ["run_dir=trained"])
    add_lora(model, LoraConfig(rank=2, alpha=4.0), nnx.Rngs(1))
    save_adapter(model, directory / "trained" / "stages" / "a" / "adapter")
    (directory / "trained" / "run.json").write_text(json.dumps({
        "recipe": what_it_is(recipe), "stages": {}
    }))  # fmt: skip
    (directory / "finished").mkdir()
    rows = [generation_row(r, tokenizer, tokenizer.prompt_ids(r.prompt), tokenizer.encode(r.answer())) for r in RECORDS]
    (directory / "finished" / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.chdir(directory):
        for command in (["evaluate", "finished", "--out", "finished"],
                        ["data", "review", "export", "records.jsonl", "--out", "rated"]):  # fmt: skip
            with contextlib.suppress(SystemExit):
                main([*command, "--json"])
    sample = read_records(directory / "rated" / "sample.jsonl")
    given = {record.id: dict.fromkeys(SCALES, 3) for record in sample}
    (directory / "ratings.json").write_text(json.dumps({"form": form_id(sample), "rater": "A", "ratings": given}))


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond ``limit`` bytes: the system refuses a write, as it does where there is no room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    cached = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)  # it is the tests', and would be left cut short
    compilation_cache.reset_cache()
    kept, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # Python cuts bytecode short without a word
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.dont_write_bytecode = kept
        jax.config.update("jax_compilation_cache_dir", cached)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Nothing can be made in ``directory``; root too goes without its right to overrule that."""
    mode = directory.stat().st_mode
    directory.chmod(0o555)
    _overrule(False)
    try:
        yield
    finally:
        _overrule(True)
        directory.chmod(mode)


def _overrule(allowed: bool) -> None:
    """CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH in the effective set of this thread (capset(2)); of root only."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] = sets[0] | (sets[1] & 0b110) if allowed else sets[0] & ~0b110
    assert libc.capset(header, sets) == 0


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below ``directory`` with its bytes, hidden ones too."""
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in sorted(directory.rglob("*"))
            if path.is_file()}  # fmt: skip
