"""What a quantised base loses against bfloat16, kernel by kernel and layer by layer, in the logits, and what it holds.

    python -P benchmarks/quantize.py                     a random model; what it prints is in docs/adapters.md
    python -P benchmarks/quantize.py DIRECTORY           any checkpoint that mentalglm_jax.load takes
    python -P benchmarks/quantize.py --methods nf4 --json

(-P keeps this folder, whose file is called like a module, out of the import path.)

Kernels: root mean square of the difference relative to that of the bfloat16 kernel. Logits: the same over all positions
of random tokens, and how often the most probable token stays. Both models compute in float32 with bfloat16 weights, so
that nothing but the weights differs. Memory: the bytes of the arrays held. Random weights are nearly normal and have no
outliers, and errors do not add up in them as in a trained model: only a checkpoint tells about that checkpoint.
"""

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mentalglm_jax import load
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.quantize import METHODS, layer_linears, quantize_model

RANDOM = GlmConfig(vocab_size=2048, hidden_size=256, intermediate_size=640, num_hidden_layers=4, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=64, initializer_range=0.06)  # fmt: skip


def relative(found: Any, wanted: Any) -> float:
    found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def model_of(directory: str | None, method: str | None) -> Glm:
    """Weights in bfloat16 or quantised from that, activations in float32."""
    if directory is not None:
        model = load(directory, dtype="bfloat16", quantize=method)
    else:
        model = Glm(RANDOM, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
        if method is not None:
            quantize_model(model, method)
    model.dtype = jnp.dtype(jnp.float32)
    return model


def held(model: Glm) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def kernel_bytes(kernel: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(kernel)))


def logits(model: Glm, tokens: jax.Array) -> np.ndarray:
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))(state, tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors and memory of quantised bases against bfloat16.")
    parser.add_argument("directory", nargs="?", help="a checkpoint; default: random weights")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    base = model_of(args.directory, None)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, base.config.vocab_size, (2, 64)), jnp.int32)
    wanted, kernels = logits(base, tokens), layer_linears(base)
    rows = []
    for method in args.methods:
        model = model_of(args.directory, method)
        layers = {
            path.removeprefix("layers.").removesuffix(".kernel"): [
                relative(linear.kernel[n], kernels[path].kernel[n]) for n in range(base.config.num_hidden_layers)
            ]
            for path, linear in layer_linears(model).items()
        }
        found = logits(model, tokens)
        rows.append({
            "method": method, "kernels": layers, "logits": relative(found, wanted), "bytes": held(model),
            "same_token": float((found.argmax(-1) == wanted.argmax(-1)).mean()),
            "kernel_bytes": sum(kernel_bytes(linear.kernel) for linear in layer_linears(model).values()),
        })  # fmt: skip
    whole = sum(li.kernel[...].nbytes for li in kernels.values())
    if args.json:
        print(json.dumps({"bytes": held(base), "kernel_bytes": whole, "rows": rows}))
        return
    print(f"{'random weights' if args.directory is None else args.directory}; bfloat16 holds {held(base) / 1e6:.2f} MB")
    print(
        "| method | MB in all | kernels, of bfloat16's bytes | logits | same token | worst kernel of layer 0, 1, ... |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        worst = " ".join(f"{100 * max(layer):.2f}" for layer in zip(*row["kernels"].values(), strict=True))
        print(
            f"| {row['method']} | {row['bytes'] / 1e6:.2f} | {row['kernel_bytes'] / whole:.3f} | "
            f"{row['logits']:.2%} | {row['same_token']:.1%} | {worst} % |"
        )


if __name__ == "__main__":
    main()
