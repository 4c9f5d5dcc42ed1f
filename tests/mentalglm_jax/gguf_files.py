"""Small GGUF files, written with the gguf package as llama.cpp's converter lays them out."""

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.mentalglm_jax.chat_families import FAMILIES, write_family

HIDDEN, INNER, HEADS, GROUPS, LAYERS, CONTEXT = 64, 96, 4, 2, 2, 128
TOKENS = 2560
_PRE = {"qwen": "qwen2", "smollm": "smollm", "llama": "llama-bpe", "llama-dated": "llama-bpe"}
_CONTROL, _USER, _UNUSED = 3, 4, 5


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp keeps them: number i of a head beside number i + half."""
    rows = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.stack([rows[:, 0], rows[:, 1]], axis=2).reshape(weight.shape)


def random_weights(architecture: str, seed: int = 0, layers: int = LAYERS) -> dict[str, np.ndarray]:
    """A model's tensors by their Hugging Face names."""
    rng = np.random.default_rng(seed)
    size = HIDDEN // HEADS

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.2, shape).astype(np.float32)

    found = {"model.embed_tokens.weight": draw(TOKENS, HIDDEN), "model.norm.weight": draw(HIDDEN)}
    for layer in range(layers):
        here = f"model.layers.{layer}."
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["post_self_attn_layernorm", "post_mlp_layernorm"] * (architecture == "glm4")
        found |= {f"{here}{norm}.weight": draw(HIDDEN) for norm in norms}
        for name, count in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            found[f"{here}self_attn.{name}_proj.weight"] = draw(count * size, HIDDEN)
            if architecture != "llama":
                found[f"{here}self_attn.{name}_proj.bias"] = draw(count * size)
        found[f"{here}self_attn.o_proj.weight"] = draw(HIDDEN, HIDDEN)
        found[f"{here}mlp.down_proj.weight"] = draw(HIDDEN, INNER)
        fused = {"gate_up_proj": 2 * INNER} if architecture == "glm4" else {"gate_proj": INNER, "up_proj": INNER}
        found |= {f"{here}mlp.{name}.weight": draw(rows, HIDDEN) for name, rows in fused.items()}
    return found


_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_self_attn_layernorm": "post_attention_norm",
    "post_mlp_layernorm": "post_ffw_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """A Hugging Face tensor's name in a GGUF file."""
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{_NAMES[rest]}.{kind}"
    return f"{_NAMES[stem]}.{kind}"


def write_gguf(
    path: Path, architecture: str, weights: dict[str, np.ndarray], family: str = "smollm",
    kind: str = "F32", keys: dict[str, Any] | None = None, drop: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None, sparse: dict[str, tuple[int, ...]] | None = None,
) -> Path:  # fmt: skip
    """Writes ``weights`` with the tokenizer of a family of ``chat_families``.

    Args:
        kind: of matrices; norms and biases are F32.
        keys: more metadata, or other values (None leaves one out).
        drop: keys and tensors left out.
        extra: tensors by their name in the file.
        sparse: instead of weights, tensors (without ".weight") of these shapes, Q8_0 zeros that take no room on disk;
            the vocabulary is filled up to the first one's rows.
    """
    writer = gguf.GGUFWriter(path, architecture)
    size = HIDDEN // HEADS
    raw, named, template = _tokenizer(path.parent / f"{path.stem}-tokenizer", family)
    vocabulary = dict(raw["model"]["vocab"]) | {token["content"]: token["id"] for token in raw["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = [1] * len(tokens)
    for token in raw["added_tokens"]:
        kinds[token["id"]] = _CONTROL if token["special"] else _USER
    fill = (next(iter(sparse.values()))[0] if sparse else TOKENS) - len(tokens)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in raw["model"]["merges"]]
    stated: dict[str, Any] = {
        "context_length": CONTEXT, "embedding_length": HIDDEN, "block_count": LAYERS, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": GROUPS, "rope.freq_base": 10_000.0,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": size // (2 if architecture == "glm4" else 1),
    }  # fmt: skip
    stated = {f"{architecture}.{key}": value for key, value in stated.items()}
    writer.kv_data[0].clear()
    stated |= {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _PRE.get(family, "glm4"),
        "tokenizer.ggml.tokens": [*tokens, *(f"[PAD{place}]" for place in range(fill))],
        "tokenizer.ggml.token_type": [*kinds, *[_UNUSED] * fill], "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": vocabulary[named["eos_token"]], "tokenizer.chat_template": template,
    }  # fmt: skip
    if "bos_token" in named:
        stated["tokenizer.ggml.bos_token_id"] = vocabulary[named["bos_token"]]
        stated["tokenizer.ggml.add_bos_token"] = family.startswith("llama")
    if "pad_token" in named:
        stated["tokenizer.ggml.padding_token_id"] = vocabulary[named["pad_token"]]
    for key, value in (stated | (keys or {})).items():
        if key not in drop and value is not None:
            _add(writer, key, value)
    for name, weight in weights.items():
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, HEADS if name.endswith("q_proj.weight") else GROUPS)
        if gguf_name(name) not in drop:
            _tensor(writer, gguf_name(name), weight, kind if weight.ndim == 2 else "F32")
    for name, weight in (extra or {}).items():
        _tensor(writer, name, weight, "F32")
    for name, shape in (sparse or {}).items():
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        width, nbytes = gguf.GGML_QUANT_SIZES[kind]
        size_in_bytes = int(np.prod(shape)) // width * nbytes
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.float32), size_in_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if sparse:
        writer.write_ti_data_to_file()
        writer.close()
        sizes = [-(-info.nbytes // 32) * 32 for tensors in writer.tensors for info in tensors.values()]
        os.truncate(path, -(-path.stat().st_size // 32) * 32 + sum(sizes))
        return path
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tokenizer(directory: Path, family: str) -> tuple[dict[str, Any], dict[str, str], str]:
    if family == "glm":
        from mentalglm_jax.text.tokenizer import BUILTIN, CHAT_TEMPLATE

        raw = json.loads((BUILTIN / "tokenizer.json").read_text("utf-8"))
        return raw, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, CHAT_TEMPLATE
    write_family(directory, family)
    raw = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    return raw, FAMILIES[family][2], FAMILIES[family][3]


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _tensor(writer: Any, name: str, weight: np.ndarray, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        writer.add_tensor(name, weight.astype(np.float32 if kind == "F32" else np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(weight, number), raw_dtype=number)
