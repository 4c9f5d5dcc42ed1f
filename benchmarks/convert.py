"""Converts a random chatglm checkpoint to glm, to Orbax and back, and shows that no bit changed on the way.

    python benchmarks/convert.py                    a few MB, seconds
    python benchmarks/convert.py --full             glm-4-9b-chat's geometry, 18.8 GB in bfloat16; needs 38 GB of disk
    python benchmarks/convert.py --full --layers 8  the same with fewer layers

Every conversion is the `mentalglm convert` command in a process of its own, whose peak memory the kernel reports. Its
time is given as a ratio to `cp` of the same bytes; both start with the source dropped from the page cache and end with
the result on disk. Names and digests of what is expected are made here, while the source is written, and not by the
tables of the package. Each stage's source is deleted once its result is there.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from mentalglm_jax.checkpoints.hf_files import TensorSource, write_shards

BLOCK_BYTES = 64 << 20
SHARD_BYTES = 2_000_000_000
SMALL = {"hidden_size": 256, "ffn_hidden_size": 640, "num_attention_heads": 4, "kv_channels": 64, "num_layers": 3,
         "padded_vocab_size": 1024, "eos_token_id": [1, 2, 3], "pad_token_id": 0}  # fmt: skip
FULL = {"hidden_size": 4096, "ffn_hidden_size": 13696, "num_attention_heads": 32, "kv_channels": 128, "num_layers": 40,
        "padded_vocab_size": 151552, "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329}  # fmt: skip
COMMON = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False, "layernorm_epsilon": 1.5625e-07, "multi_query_attention": True,
    "multi_query_group_num": 2, "rope_ratio": 500, "original_rope": True, "post_layer_norm": True, "rmsnorm": True,
    "seq_length": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
}  # fmt: skip
Digests = dict[str, str]


def tensors(sizes: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], list[tuple[str, int]]]]:
    """Name and shape of every chatglm tensor, and which glm tensors its rows are."""
    hidden, ffn, vocab = sizes["hidden_size"], sizes["ffn_hidden_size"], sizes["padded_vocab_size"]
    q, kv = sizes["num_attention_heads"] * sizes["kv_channels"], 2 * sizes["kv_channels"]
    old, new = "transformer.encoder.layers", "model.layers"
    yield "transformer.embedding.word_embeddings.weight", (vocab, hidden), [("model.embed_tokens.weight", vocab)]
    for i in range(sizes["num_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{old}.{i}.{norm}.weight", (hidden,), [(f"{new}.{i}.{norm}.weight", hidden)]
        for end, rest in (("weight", (hidden,)), ("bias", ())):
            rows = [(f"{new}.{i}.self_attn.{name}_proj.{end}", n) for name, n in (("q", q), ("k", kv), ("v", kv))]
            yield f"{old}.{i}.self_attention.query_key_value.{end}", (q + 2 * kv, *rest), rows
        for theirs, ours, shape in (
            ("self_attention.dense", "self_attn.o_proj", (hidden, q)),
            ("mlp.dense_h_to_4h", "mlp.gate_up_proj", (2 * ffn, hidden)),
            ("mlp.dense_4h_to_h", "mlp.down_proj", (hidden, ffn)),
        ):
            yield f"{old}.{i}.{theirs}.weight", shape, [(f"{new}.{i}.{ours}.weight", shape[0])]
    yield "transformer.encoder.final_layernorm.weight", (hidden,), [("model.norm.weight", hidden)]
    yield "transformer.output_layer.weight", (vocab, hidden), [("lm_head.weight", vocab)]


def write_source(directory: Path, sizes: dict[str, Any]) -> tuple[Digests, int]:
    """Writes random weights in the chatglm layout; returns the digest of every glm tensor they hold, and all bytes."""
    rng, digests = np.random.default_rng(0), {}
    noise = rng.integers(0, 1 << 64, BLOCK_BYTES // 8 + 1, np.uint64)

    def random(shape: tuple[int, ...], rows: list[tuple[str, int]]) -> Callable[[], Iterator[np.ndarray]]:
        def blocks() -> Iterator[np.ndarray]:
            width = int(np.prod(shape[1:]))
            for name, count in rows:
                digest, step = hashlib.sha256(), max(1, BLOCK_BYTES // (2 * width))
                for start in range(0, count, step):
                    n = min(step, count - start)
                    # The same noise under another mask for every block; without its top exponent bit |x| is below 2.
                    words = noise[: -(-n * width // 4)] ^ rng.integers(0, 1 << 64, dtype=np.uint64)
                    bits = (words & np.uint64(0xBFFFBFFFBFFFBFFF)).view(np.uint16)[: n * width]
                    digest.update(bits.data)
                    yield bits.view(ml_dtypes.bfloat16).reshape(n, *shape[1:])
                digests[name] = digest.hexdigest()

        return blocks

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(COMMON | sizes))
    sources = [TensorSource(name, "BF16", shape, random(shape, rows)) for name, shape, rows in tensors(sizes)]
    total = sum(source.nbytes for source in sources)
    write_shards(directory, sources, min(SHARD_BYTES, total // 3))
    return digests, total


def digests_of(directory: Path) -> Digests:
    """The digest of every tensor in the safetensors files of a directory."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="np") as handle:
            names = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        for name, shape in names.items():
            digest = hashlib.sha256()
            step = max(1, BLOCK_BYTES // (2 * int(np.prod(shape[1:]))))
            for start in range(0, shape[0], step):
                with safe_open(file, framework="np") as handle:
                    digest.update(
                        np.ascontiguousarray(handle.get_slice(name)[start : min(start + step, shape[0])])
                        .view(np.uint16)
                        .data
                    )
            found[name] = digest.hexdigest()
    return found


def drop_cache(directory: Path) -> None:
    """Asks the kernel to forget the files, so that reading them is reading the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(command: list[str], source: Path) -> dict[str, float]:
    """Seconds by the clock, seconds of processor time and peak resident GiB of a command and its children."""
    drop_cache(source)
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {child.returncode}")
    # Linux reports KiB.
    return {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "peak_gib": usage.ru_maxrss / 2**20}


def run(root: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """All stages below ``root``, which is left empty."""
    source, first, orbax, second, copy = (root / name for name in ("chatglm", "glm", "orbax", "glm-again", "copy"))
    expected, total = write_source(source, sizes)
    result: dict[str, Any] = {"bytes": total, "tensors": len(expected), "stages": {}}

    def cp() -> dict[str, float]:
        found = measured(["sh", "-c", f"cp -r '{source}' '{copy}' && sync -f '{copy}'"], source)
        shutil.rmtree(copy)
        return found

    def convert(start: Path, end: Path, layout: str) -> None:
        command = [sys.executable, "-P", "-m", "mentalglm_jax", "convert", str(start), str(end), "--to", layout]
        found, name = measured(command, start), f"{start.name} -> {end.name}"
        result["stages"][name] = found | {"ratio_to_cp": found["seconds"] / result["cp"]["seconds"]}
        print(f"{name}: {found}", file=sys.stderr)

    def verify(directory: Path) -> None:
        found = digests_of(directory)
        wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        if wrong:
            raise SystemExit(f"{directory}: {len(wrong)} tensors differ, e.g. {min(wrong)}")

    result["cp"] = cp()
    print(f"cp: {result['cp']}", file=sys.stderr)
    convert(source, first, "glm")
    verify(first)
    shutil.rmtree(source)
    convert(first, orbax, "orbax")
    shutil.rmtree(first)
    convert(orbax, second, "glm")
    shutil.rmtree(orbax)
    verify(second)
    shutil.rmtree(second)
    result["identical_tensors"] = len(expected)
    result["peak_gib"] = max(stage["peak_gib"] for stage in result["stages"].values())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert chatglm -> glm -> Orbax -> glm; bits, memory, time.")
    parser.add_argument("--full", action="store_true", help="geometry of glm-4-9b-chat")
    parser.add_argument("--layers", type=int, help="other number of layers")
    parser.add_argument("--dir", type=Path, help="where to work; default: the system's temporary directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    sizes = (FULL if args.full else SMALL) | ({} if args.layers is None else {"num_layers": args.layers})
    root = Path(tempfile.mkdtemp(prefix="convert-", dir=args.dir))
    try:
        result = run(root, sizes)
    finally:
        shutil.rmtree(root)
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['identical_tensors']} of {result['tensors']} tensors bit-identical after every conversion to glm")
    print(f"| {result['bytes'] / 1e9:.2f} GB | seconds | ratio to cp | processor seconds | peak GiB |")
    print("|---|---|---|---|---|")
    for name, stage in ({"cp": result["cp"] | {"ratio_to_cp": 1.0}} | result["stages"]).items():
        numbers = (f"{stage[key]:.2f}" for key in ("seconds", "ratio_to_cp", "cpu", "peak_gib"))
        print(f"| {name} | {' | '.join(numbers)} |")


if __name__ == "__main__":
    main()
