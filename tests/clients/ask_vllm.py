"""Asks vLLM, in a process of its own: an adapter that it refuses may hang the next request.

    python ask_vllm.py BASE TOKENS.json OUT.npz [NAME=ADAPTER ...]

Writes log-probabilities ``[len(tokens) - 1, V]`` of the base ("base") and of each adapter by its name.
"""

import json
import os
import sys

import numpy as np


def main(base: str, tokens_file: str, out: str, adapters: list[str]) -> None:
    """One model, one request for each adapter."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    with open(tokens_file, encoding="utf-8") as file:
        tokens = json.load(file)
    more = {"enable_lora": True, "max_lora_rank": 32} if adapters else {}
    model = LLM(base, dtype="float32", enforce_eager=True, max_model_len=256, max_logprobs=-1, skip_tokenizer_init=True,
                enable_prefix_caching=False, **more)  # fmt: skip
    asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, detokenize=False)
    found = {}
    for number, adapter in enumerate(["base=", *adapters]):
        name, _, path = adapter.partition("=")
        lora = LoRARequest(name, number, path) if path else None
        (answer,) = model.generate([{"prompt_token_ids": tokens}], asked, lora_request=lora, use_tqdm=False)
        rows = answer.prompt_logprobs[1:]
        found[name] = np.array([[row[token].logprob for token in range(len(row))] for row in rows])
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:4], sys.argv[4:])
