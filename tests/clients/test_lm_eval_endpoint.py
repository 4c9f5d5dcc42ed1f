"""lm-eval's `local-chat-completions` on `mentalglm serve`: a generation task of our own, greedy, several at a time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from flax import nnx

from mentalglm_jax.checkpoints.directories import save_pretrained
from mentalglm_jax.inference.generate import generate
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer

POSTS = ("I sleep badly and nothing helps.", "今天我觉得很累。", "We met at ten.", "The rain again.")
WORDS = 12


def test_lm_eval_reads_what_generate_says(tmp_path, figure):
    tokenizer = GlmTokenizer.load(BUILTIN)
    config = GlmConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                       head_dim=8, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.4,
                       max_position_embeddings=1024, eos_token_id=tokenizer.eos_ids,
                       pad_token_id=tokenizer.pad_id)  # fmt: skip
    model = Glm(config, rngs=nnx.Rngs(3))
    save_pretrained(model, tmp_path / "small", tokenizer=tokenizer)
    wanted = [generate(model, tokenizer, post, WORDS) for post in POSTS]
    right = [wanted[0], "something else", wanted[2], wanted[3]]  # three of four
    rows = [{"post": post, "said": said} for post, said in zip(POSTS, right, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ours.yaml").write_text(f"""task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{post}}}}"
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: ["never said"], do_sample: false, max_gen_toks: {WORDS}}}
metric_list: [{{metric: exact_match}}]
""")
    programs = Path(sys.executable).parent
    server = subprocess.Popen([programs / "mentalglm", "serve", tmp_path / "small", "--port", "0", "--json"],
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    try:
        assert server.stdout is not None
        said = json.loads(server.stdout.readline())
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", "--model", "local-chat-completions", "--apply_chat_template",
             "--tasks", "ours", "--include_path", str(tmp_path), "--log_samples",
             "--model_args", f"model=small,base_url={said['url']}/chat/completions,num_concurrent=3,max_retries=1",
             "--output_path", str(tmp_path / "out")],
            capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        )  # fmt: skip
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
        server.stdout.close()
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("samples_ours*.jsonl")
    heard = {row["doc"]["post"]: row["resps"][0][0] for row in map(json.loads, file.read_text("utf-8").splitlines())}
    assert [heard[post] for post in POSTS] == wanted
    (file,) = (tmp_path / "out").rglob("results*.json")
    score = json.loads(file.read_text())["results"]["ours"]["exact_match,none"]
    figure(f"exact match {score}, {len(heard)} answers letter for letter")
    assert score == 0.75
