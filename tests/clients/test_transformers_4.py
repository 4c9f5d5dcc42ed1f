"""transformers 4 opens what is written here and computes the same: its config keys, its tokenizer files."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mentalglm_jax.checkpoints.directories import load, save_pretrained
from mentalglm_jax.inference.decode import generate_ids
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.rope import Linear, Llama3, Yarn
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
from tests.clients.ask_transformers_4 import CHAT, TEXT
from tests.mentalglm_jax.chat_families import write_family

HERE = Path(__file__).parent
YARN = Yarn(factor=4.0, original_max_position_embeddings=64)
LLAMA_3 = Llama3(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
RELATIVE = {"head_dim": 8, "attention_bias": False, "partial_rotary_factor": 1.0}
MODELS = {
    "glm": {}, "glm4": {"sandwich_norm": True, "attention_bias": True}, "glm tied": {"tie_word_embeddings": True},
    "glm linear": {"rope_scaling": Linear(factor=4.0)},
    "llama": {"family": "llama", **RELATIVE}, "mistral": {"family": "mistral", **RELATIVE},
    "llama yarn": {"family": "llama", **RELATIVE, "rope_scaling": YARN},
    "llama llama3": {"family": "llama", **RELATIVE, "rope_scaling": LLAMA_3},
    "qwen2": {"family": "qwen2", **RELATIVE, "attention_bias": True},
}  # fmt: skip
CHATS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen"}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_logits_prompt_and_answer(tmp_path, name, figure):
    own, family = MODELS[name], MODELS[name].get("family", "glm")
    source = BUILTIN if family == "glm" else write_family(tmp_path / "family", CHATS[family])
    tokenizer = GlmTokenizer.load(source)
    config = GlmConfig(**{
        "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "initializer_range": 0.3, "rope_theta": 54321.0, "eos_token_id": tokenizer.eos_ids,
        "pad_token_id": tokenizer.pad_id, **own,
    })  # fmt: skip
    model = Glm(config, rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path / "m", tokenizer=tokenizer)
    ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 60).tolist()
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    files = (Path(sys.prefix) / "transformers-4", tmp_path / "m", tmp_path / "ids.json", tmp_path / "out.json")
    command = [sys.executable, "-P", str(HERE / "ask_transformers_4.py"), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(files[-1].read_text("utf-8"))
    assert found["version"].startswith("4.") and found["keys"] == []
    wanted = np.asarray(model(jnp.asarray([ids], jnp.int32)))[0]
    apart = float(np.abs(np.asarray(found["logits"]) - wanted).max() / np.abs(wanted).max())
    assert apart < 1e-5
    assert found["prompt"] == tokenizer.prompt_ids(CHAT[0]["content"])
    assert found["plain"] == tokenizer.encode(TEXT)
    assert set(found["stops"]) == set(tokenizer.eos_ids) == set(load(tmp_path / "m").config.eos_token_id)
    (answer,) = generate_ids(model, [found["prompt"]], max_new_tokens=8, eos_ids=tokenizer.eos_ids)
    assert found["answer"] == answer
    figure(f"logits {apart:.1e} of the largest apart")
