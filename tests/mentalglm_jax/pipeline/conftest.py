"""A one-layer model, a few records and a recipe: the cheapest run there is."""

from pathlib import Path

import pytest
import yaml
from flax import nnx

from mentalglm_jax.checkpoints.directories import save_pretrained
from mentalglm_jax.data.records import Record, write_records
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer

QUESTION = tasks.TASKS["suicide_risk"].question("en")
TRAIN = {"steps": 2, "rows": 1, "sequence_length": 128, "schedule": "constant", "warmup_ratio": 0.0, "save_every": 100,
         "learning_rate": 1e-2}  # fmt: skip


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A recipe file; its run directory, ``run``, is to be set."""
    directory, tokenizer = tmp_path_factory.mktemp("small"), GlmTokenizer.load(BUILTIN)
    config = GlmConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                       head_dim=8, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
                       pad_token_id=tokenizer.pad_id)  # fmt: skip
    save_pretrained(Glm(config, rngs=nnx.Rngs(0)), directory / "model", tokenizer=tokenizer)
    for split, posts in {
        "train": ["rain", "wind", "snow", "soup", "tea"],
        "dev": ["fog", "hail"],
        "test": ["sun"],
    }.items():
        write_records(directory / "data" / f"{split}.jsonl", [
            Record(f"{split}{n}", "suicide_risk", "en", f"I think of {what} all day long.", QUESTION,
                   "low" if n % 4 else "high", split=split) for n, what in enumerate(posts)
        ])  # fmt: skip
    recipe = {
        "run_dir": "run", "data": {"source": "jsonl", "root": str(directory / "data")}, "verify": False,
        "model": {"path": str(directory / "model")}, "lora": {"rank": 2, "alpha": 4}, "probe": {"posts": 0},
        "generate": {"max_new_tokens": 2, "batch_size": 4},
        "stages": [{"name": "a", "train": TRAIN}, {"name": "b", "train": TRAIN}],
    }  # fmt: skip
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return directory / "recipe.yaml"
