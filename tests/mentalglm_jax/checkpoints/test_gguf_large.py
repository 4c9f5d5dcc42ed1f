"""GGUF files of the size that people have: memory, and the one real file that a registry carries."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.mentalglm_jax.gguf_files import write_gguf

CONVERT = """import resource, sys
from mentalglm_jax.checkpoints.gguf_models import convert_gguf
convert_gguf(sys.argv[1], sys.argv[2], "bfloat16")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
WIDTH, INNER, HEADS, GROUPS, TOKENS = 4096, 14336, 32, 8, 128256  # Llama 3's 8 B; one of its 32 layers


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_billion_parameters_in_three_gigabytes(tmp_path):
    """A vocabulary and a layer of Llama 3 8B, packed in 8 bits and full of zeros; more layers would take no more."""
    groups = WIDTH // HEADS * GROUPS
    shapes = {"token_embd": (TOKENS, WIDTH), "output_norm": (WIDTH,), "output": (TOKENS, WIDTH)}
    layer = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (groups, WIDTH),
             "attn_v": (groups, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH),
             "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}  # fmt: skip
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    keys = {"llama.block_count": 1, "llama.embedding_length": WIDTH, "llama.feed_forward_length": INNER,
            "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": GROUPS,
            "llama.rope.dimension_count": WIDTH // HEADS}  # fmt: skip
    path = write_gguf(tmp_path / "m.gguf", "llama", {}, "llama", keys=keys, sparse=shapes)
    assert path.stat().st_size > 1.3e9
    command = [sys.executable, "-P", "-c", CONVERT, path, tmp_path / "m"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.5 * 2**20  # KiB; the bound that is promised is 3 GiB
    assert sum(file.stat().st_size for file in (tmp_path / "m").glob("*.safetensors")) == pytest.approx(
        2.54e9, rel=0.01
    )


SMOLLM2 = os.environ.get("MENTALGLM_SMOLLM2", "")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not SMOLLM2, reason="MENTALGLM_SMOLLM2 names no SmolLM2-135M-Instruct.Q4_1.gguf; `make study` fetches it"
)
def test_smollm2_is_what_transformers_makes_of_it(tmp_path):
    """Every tensor bit for bit, token ids, and JAX's logits on a chat prompt."""
    import jax.numpy as jnp
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import mentalglm_jax as mg
    from mentalglm_jax.checkpoints.gguf_models import convert_gguf

    source = Path(SMOLLM2)
    convert_gguf(source, tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())
    tokenizer, reference = (
        mg.GlmTokenizer.load(tmp_path / "m"),
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name),
    )
    for text in (
        "it's 12345 days,  ok?\n\n  yes ",
        "我最近睡不着。\n",
        "naïve 🙂\x00",
        "  \t x",
        "don't I'll",
        "2024-11-29",
    ):
        assert tokenizer.encode(text) == reference(text, add_special_tokens=False).input_ids
    ids = tokenizer.prompt_ids("What is the capital of France? 我最近睡不着。")
    wanted = theirs(torch.tensor([ids])).logits.detach().numpy()
    found = np.asarray(mg.load(tmp_path / "m")(jnp.asarray([ids])))
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert (found.argmax(-1) == wanted.argmax(-1)).all()
    stated = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert stated["eos_token_id"] == [tokenizer.stop_id] == list(tokenizer.eos_ids)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_recipe_of_make_study_takes_a_relative_to_its_verified_exports(tmp_path):
    """The same recipe on a Qwen2 of two layers: transformers and PEFT compute what JAX does, greedy answers alike."""
    from mentalglm_jax.cli.main import main
    from tests.mentalglm_jax.gguf_files import random_weights

    keys = {"qwen2.context_length": 1024}
    path = write_gguf(tmp_path / "m.gguf", "qwen2", random_weights("qwen2"), "qwen", keys=keys)
    stage = "{name: english, languages: [en], train: {steps: 2, rows: 2, sequence_length: 512}}"
    changes = {"run_dir": tmp_path / "run", "model.path": tmp_path / "m", "data.synthetic.n_train": 6,
               "data.synthetic.n_test": 2, "stages": f"[{stage}]", "generate.max_new_tokens": 8, "probe.posts": 0,
               "mesh": "null"}  # fmt: skip
    for command in (["convert", path, tmp_path / "m"], ["run", Path(__file__).parents[3] / "configs" / "study.yaml", *(
        text for key, value in changes.items() for text in ("--set", f"{key}={value}"))]):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main([str(part) for part in command])
        assert not ended.value.code
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for exported in ("merged", "adapter"):
        assert summary["parity"][f"{exported}_max_abs_logit_diff"] < 1e-4
    rows = [json.loads(line) for line in (tmp_path / "run" / "generations.jsonl").read_text().splitlines()]
    assert {tuple(row["prompt_ids"][-3:]) for row in rows} == {tuple(rows[0]["prompt_ids"][-3:])}  # assistant, opened
