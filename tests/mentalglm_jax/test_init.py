"""The public face: names arrive on first use, and importing costs and prints nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mentalglm_jax as mg


def test_importing_does_not_load_jax():
    program = "import sys, mentalglm_jax as mg; mg.__version__; assert not {'jax', 'flax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)


FIRST_USE = """
import mentalglm_jax as mg
for name in mg.__all__:
    getattr(mg, name)
from flax import nnx
from mentalglm_jax.text.tokenizer import BUILTIN
tokenizer = mg.GlmTokenizer.load(BUILTIN)
config = mg.GlmConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                      head_dim=8, num_attention_heads=2, num_key_value_heads=2, pad_token_id=tokenizer.pad_id,
                      max_position_embeddings=2048)
mg.save_pretrained(mg.Glm(config, rngs=nnx.Rngs(0)), "model", tokenizer=tokenizer)
assert len(mg.generate(mg.load("model"), tokenizer, ["a"], max_new_tokens=2)) == 1
import sys, mentalglm_jax.train.loop
loaded = {name.partition(".")[0] for name in sys.modules}
assert not {"torch", "transformers"} & loaded  # by way of another's package: they are installed
import importlib.util
assert importlib.util.find_spec("torch")  # and still to be had
"""


def test_first_use_prints_nothing(tmp_path):
    """Off a TPU, with the TPU compiler installed or not, and no platform named: no line and no warning of anybody's."""
    named = ("JAX_", "XLA_", "TPU_")  # what says where to compute; the programs compiled before are kept
    environment = {key: value for key, value in os.environ.items() if not key.startswith(named) or "CACHE" in key}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", FIRST_USE], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", mg.__all__)
def test_every_public_name_is_there(name):
    assert getattr(mg, name).__name__ == name
    assert name in dir(mg)


def test_generate_stays_the_function_whatever_is_imported_first():
    program = "import mentalglm_jax.inference.generate as module, mentalglm_jax as mg; "
    program += "from mentalglm_jax import generate; assert mg.generate is generate is module.generate"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="attribute lode"):
        mg.lode  # noqa: B018
