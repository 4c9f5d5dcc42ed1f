"""Tokens per second of our `generate_ids` against transformers' `generate`: same random model, same prompts, same run.

    python -P benchmarks/generate.py [--sizes tiny small] [--batches 1 8] [--new 128] [--rounds 5] [--json]
    python -P benchmarks/generate.py --models DIR [DIR ...]             trained ones instead of random ones
    python -P benchmarks/generate.py --sizes 9b --dtype bfloat16        on a GPU; 19 GB of disk

(-P keeps this folder, whose file is called like a module, out of the import path.)

The model is written once by transformers and read by both. Greedy, no stop token, left-padded prompts of mixed lengths;
both sides are warmed up, then take turns, and a ratio is the median over the rounds of their times in one round. Beside
it: the same of processor seconds (a machine's other work moves them less), whether the tokens are equal, and how fast
the weights went by, in GB/s, as a fraction of what the device can: on an accelerator `hardware.py`'s figure, on a CPU a
matrix-vector product of PyTorch over a matrix that no cache holds. Eight prompts need eight products by each number
that was read: the share of the matmul peak (PyTorch's product of 2048 x 2048 on a CPU) stands last.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GlmConfig, GlmForCausalLM

from mentalglm_jax import load
from mentalglm_jax.devices.hardware import chip_of
from mentalglm_jax.inference.decode import generate_ids

# tiny: the demo's model. small: 59 M parameters in about GLM-4's proportions, but half of them in the vocabulary.
SIZES = {
    "tiny": {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "small": {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1712, "num_hidden_layers": 8,
              "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "9b": {},
}  # fmt: skip
LONGEST_PROMPT = 120


def write_model(directory: Path, size: str, dtype: torch.dtype) -> None:
    """Saves a random model."""
    config = GlmConfig(**SIZES[size], attention_bias=True, max_position_embeddings=8192, pad_token_id=0,
                       eos_token_id=None, initializer_range=0.05, dtype=dtype)  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = GlmForCausalLM(config)
    torch.set_default_dtype(before)
    model.save_pretrained(directory)


def read_per_step(model: Any) -> tuple[int, int]:
    """Bytes and numbers that one decoding step reads of a model's weights: a table of embeddings only where it is tied
    to the logits."""
    found = [p for n, p in model.named_parameters() if "embed_tokens" not in n or model.config.tie_word_embeddings]
    return sum(p.numel() * p.element_size() for p in found), sum(p.numel() for p in found)


def prompts_of(batch: int, vocabulary: int) -> list[list[int]]:
    """The longest first; all lengths from a half of it on."""
    rng = np.random.default_rng(batch)
    lengths = [LONGEST_PROMPT, *rng.integers(LONGEST_PROMPT // 2, LONGEST_PROMPT + 1, batch - 1)]
    return [rng.integers(1, vocabulary, int(length)).tolist() for length in lengths]


def timed(run: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """Seconds by the clock and of the processor, all threads together; and the result."""
    began = time.perf_counter(), time.process_time()
    found = run()
    return (time.perf_counter() - began[0], time.process_time() - began[1]), found


def compare(theirs: Any, ours: Any, batch: int, new: int, rounds: int) -> dict[str, Any]:
    """Seconds of both sides, their ratio, and the seconds of one decoding step: what twice as many tokens take more."""
    prompts = prompts_of(batch, ours.config.vocab_size)
    ids = torch.tensor([[0] * (LONGEST_PROMPT - len(p)) + p for p in prompts], device=theirs.device)
    mask = torch.tensor([[0] * (LONGEST_PROMPT - len(p)) + [1] * len(p) for p in prompts], device=theirs.device)

    def reference(count: int) -> list[list[int]]:
        out = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count)
        return out[:, LONGEST_PROMPT:].tolist()

    def found(count: int) -> list[list[int]]:
        return generate_ids(ours, prompts, max_new_tokens=count, eos_ids=[], batch_size=batch)

    sides = {"theirs": reference, "ours": found}
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for side in sides.values():
        side(new)
        side(new // 2)
    equal = True
    for _ in range(rounds):
        answers = []
        for count in (new, new // 2):
            for name, side in sides.items():
                taken, tokens = timed(lambda side=side, count=count: side(count))
                seconds.setdefault((name, count), []).append(taken)
                answers.append(tokens)
        equal &= answers[0] == answers[1] and answers[2] == answers[3]
    ratios = np.divide(seconds["theirs", new], seconds["ours", new])  # [round, clock or processor]
    middle = {key: np.median(values, axis=0) for key, values in seconds.items()}
    steps = {name: (middle[name, new] - middle[name, new // 2]) / (new - new // 2) for name in sides}
    return {
        "batch": batch, "new": new, "equal": equal, "ratios": sorted(ratios[:, 0].tolist()),
        "ratio": float(np.median(ratios[:, 0])), "processor_ratio": float(np.median(ratios[:, 1])),
        "tokens_per_second": {name: batch * new / float(middle[name, new][0]) for name in sides},
        "step_seconds": {name: float(step[0]) for name, step in steps.items()},
        "step_processor_seconds": {name: float(step[1]) for name, step in steps.items()},
    }  # fmt: skip


def limits(device: torch.device) -> tuple[float, float, str]:
    """Bytes per second that the device can read, its multiply-and-adds per second times two, and whence the figures."""
    chip = chip_of(jax.devices()[0].device_kind)
    if chip is not None:
        return chip.bandwidth, chip.flops, f"{chip.name}, {chip.source}"
    matrix, vector = torch.ones(8192, 8192, device=device), torch.ones(8192, device=device)
    best = min(timed(lambda: matrix @ vector)[0][0] for _ in range(10))
    square = torch.ones(2048, 2048, device=device)
    most = min(timed(lambda: square @ square)[0][0] for _ in range(5))
    return matrix.numel() * 4 / best, 2 * 2048**3 / most, "PyTorch's best products: matrix by vector, matrix by matrix"


def main() -> None:
    parser = argparse.ArgumentParser(description="generate_ids against transformers' generate.")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small"])
    parser.add_argument("--models", nargs="+", type=Path, default=[], help="directories, instead of sizes")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--new", type=int, default=128, help="tokens generated per prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--dir", type=Path, help="where to write the models; default: the temporary directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    rows = []
    for size in args.models or args.sizes:
        with tempfile.TemporaryDirectory(dir=args.dir) as directory:
            if not args.models:
                write_model(Path(directory), size, dtype)
            place = size if args.models else directory
            theirs: Any = AutoModelForCausalLM.from_pretrained(place, dtype=dtype).eval()
            theirs.generation_config = GenerationConfig(pad_token_id=0)  # its own may stop, sample and penalise
            theirs.to(device)
            ours = load(place, dtype=args.dtype)
        weights, numbers = read_per_step(theirs)
        for batch in args.batches:
            found = compare(theirs, ours, batch, args.new, args.rounds)
            found |= {"size": getattr(size, "name", size), "weight_bytes": weights, "weights": numbers}
            rows.append(found | {"gb_per_second": {n: weights / s / 1e9 for n, s in found["step_seconds"].items()}})
        del theirs, ours
    limit, peak, source = limits(device)
    if args.json:
        said = {"limit": limit, "peak": peak, "limit_source": source, "threads": torch.get_num_threads(), "rows": rows}
        print(json.dumps(said))
        return
    print(f"{args.dtype}, {args.new} tokens per prompt, {torch.get_num_threads()} threads of PyTorch, {device}")
    columns = ["model", "batch", "tokens/s theirs", "ours", "ratio (lowest, highest)", "ratio of processor time",
               "tokens equal", "processor ms a step theirs", "ours", "GB/s theirs", "ours", "of the peak"]  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        speeds, gb, step = row["tokens_per_second"], row["gb_per_second"], row["step_processor_seconds"]
        cells = [
            f"{row['size']}, {row['weight_bytes'] / 1e6:.0f} MB a step", row["batch"], f"{speeds['theirs']:.0f}",
            f"{speeds['ours']:.0f}", f"{row['ratio']:.2f} ({row['ratios'][0]:.2f}, {row['ratios'][-1]:.2f})",
            f"{row['processor_ratio']:.2f}", "yes" if row["equal"] else "NO", f"{1e3 * step['theirs']:.2f}",
            f"{1e3 * step['ours']:.2f}", f"{gb['theirs']:.1f}",
            f"{gb['ours']:.1f} ({1e9 * gb['ours'] / limit:.0%} of the limit)",
            f"{2 * row['batch'] * row['weights'] / row['step_seconds']['ours'] / peak:.0%}",
        ]  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |")
    print(f"Limit: {limit / 1e9:.1f} GB/s, peak {peak / 1e9:.0f} GFLOP/s ({source}).")


if __name__ == "__main__":
    main()
