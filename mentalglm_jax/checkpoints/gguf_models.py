"""A GGUF file as a Hugging Face directory: configuration, every tensor under its name there, tokenizer, chat template.

llama.cpp keeps the rows of ``llama``'s q and k in another order, so that its rotary pairs are neighbours; they go back
to the two halves of each head that transformers expects. Everything else is stored alike. What the file says and what
is not understood is refused, never dropped: a hyperparameter that nobody reads could change what the model computes.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mentalglm_jax.checkpoints.gguf_files import GgufFile
from mentalglm_jax.checkpoints.hf_files import (
    DTYPE_NAMES,
    INDEX,
    TOKENIZER_FILES,
    Checkpoint,
    TensorSource,
    write_shards,
)
from mentalglm_jax.checkpoints.hf_files import DTYPES as FILE_DTYPES
from mentalglm_jax.checkpoints.weights import check_tensors, detect_layout, read_config
from mentalglm_jax.errors import InputError
from mentalglm_jax.files import check_owned, replace_dir, write_json
from mentalglm_jax.foreign import Fields, short, some
from mentalglm_jax.text.gguf_vocabulary import Vocabulary

_BLOCK_BYTES = 32 << 20  # of float32 rows unpacked at a time; a vocabulary of 8 B has 2 GiB
_LAYER = "blk.{}."
_HF = "model.layers.{}."
_MOST = 1 << 31
_COMMON = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_BIASES = {f"attn_{x}.bias": f"self_attn.{x}_proj.bias" for x in "qkv"}
_LLAMA = {
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
}
_GLM4 = {
    "post_attention_norm.weight": "post_self_attn_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_up.weight": "mlp.gate_up_proj.weight",
    "post_ffw_norm.weight": "post_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class _Architecture:
    """``names``: tensors of a layer (and of none) here and there; ``halves``: rows of q and k are reordered;
    ``partial``: as in Glm4, part of a head may go unrotated, and q, k and v may have no biases (the models of 32 B)."""

    model_class: str
    names: dict[str, str]
    halves: bool = False
    partial: bool = False
    fixed: tuple[tuple[str, Any], ...] = ()  # keys of config.json that are the same for all


ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", _COMMON | _LLAMA, halves=True,
                           fixed=(("attention_bias", False), ("mlp_bias", False))),
    "qwen2": _Architecture("Qwen2ForCausalLM", _COMMON | _BIASES | _LLAMA, fixed=(("use_sliding_window", False),)),
    "glm4": _Architecture("Glm4ForCausalLM", _COMMON | _BIASES | _GLM4, partial=True),
}  # fmt: skip
_KEYS = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
         "attention.head_count_kv", "attention.key_length", "attention.value_length",
         "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scaling.type",
         "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned", "vocab_size",
         "attention.sliding_window", "expert_count", "expert_used_count")  # fmt: skip
# Llama 3's scaling travels as 1 / factor per frequency; these are the published ones (3.1 and 3.3, 3.2).
_LLAMA3 = tuple(
    {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192} for factor in (8.0, 32.0)
)  # fmt: skip


@dataclass(frozen=True)
class _Row:
    """A tensor of the result: where it lies, its shape, and whether the rows of its heads are reordered."""

    source: str
    shape: tuple[int, ...]
    heads: int | None = None


def convert_gguf(
    source: str | Path,
    target: str | Path,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    check: Callable[[Path], object] | None = None,
) -> Vocabulary:
    """Writes the model of a GGUF file as a Hugging Face directory, which replaces ``target`` when complete.

    Weights are unpacked block by block: about 0.5 GiB are held, whatever the model's size.

    Args:
        source: the file; architecture llama (Llama, Mistral, SmolLM2, Yi), qwen2 or glm4.
        dtype: of the tensors written. "float32" holds what the file says to the last bit; "bfloat16" is half as large
            and rounds each weight by up to 1 in 256, far below what a 4-bit file has lost already.
        max_shard_bytes: a model larger than this is split into shards with an index.
        check: called with the complete directory before it takes the place of ``target``; what it raises stops that.

    Returns:
        the vocabulary that was read.

    Raises:
        InputError: the file is damaged, of another architecture, or has keys or tensors that are not understood; its
            tokenizer cannot be written exactly; or ``target`` holds other files.
        RunError: the disk refused; what was there is unchanged.
    """
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype {short(dtype)} is not one of float32, bfloat16")
    target, file = Path(target), GgufFile(Path(source))
    name = file.metadata.get("general.architecture")
    parts = file.metadata.get("split.count", 1)
    if type(parts) is not int or parts > 1:
        raise InputError(f"{file.path}: is one of {short(parts)} parts of a model; join them first "
                         "(`llama-gguf-split --merge FIRST OUT.gguf`)")  # fmt: skip
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{file.path}: a model of the architecture {short(name)}; those that can be read are {known}")
    vocabulary = Vocabulary(file.metadata, str(file.path))
    config, rows = _model(file, str(name), vocabulary)
    config["dtype"] = dtype
    kind = DTYPE_NAMES[next(one for one in FILE_DTYPES.values() if one.name == dtype)]
    sources = [
        TensorSource(name, kind, row.shape, lambda row=row: _blocks(file, row, kind)) for name, row in rows.items()
    ]
    ours = ("config.json", "generation_config.json", INDEX, *TOKENIZER_FILES)
    owned = lambda name: name in ours or re.fullmatch(r"model[^/]*\.safetensors", name)  # noqa: E731
    with replace_dir(target, functools.partial(check_owned, owned=owned)) as temporary:
        write_json(temporary / "config.json", config)
        vocabulary.save(temporary)
        write_shards(temporary, sources, max_shard_bytes)
        written = Checkpoint(temporary)  # what cannot be read back must not replace anything
        check_tensors(written, read_config(written), detect_layout(written.tensors))
        if check is not None:
            check(temporary)
    return vocabulary


def _model(file: GgufFile, name: str, vocabulary: Vocabulary) -> tuple[dict[str, Any], dict[str, _Row]]:
    """``config.json`` and every tensor that belongs to it, each found in the file with its shape."""
    kind = ARCHITECTURES[name]
    stated = {key.removeprefix(f"{name}."): value for key, value in file.metadata.items() if key.startswith(f"{name}.")}
    if unknown := sorted(stated.keys() - set(_KEYS)):
        raise InputError(
            f"{file.path}: states {some([f'{name}.{key}' for key in unknown])}, which is not understood and may change "
            "what the model computes"
        )
    read = Fields(stated, f"{file.path}: {name}")
    layers, hidden = read.integer("block_count", 1, 10_000), read.integer("embedding_length", 1, 1 << 20)
    heads = read.integer("attention.head_count", 1, 1 << 16)
    groups = read.integer("attention.head_count_kv", 1, heads, heads)
    inner = read.integer("feed_forward_length", 1, 1 << 24)
    size = read.integer("attention.key_length", 1, 1 << 16, hidden // heads)
    if read.integer("attention.value_length", 1, 1 << 16, size) != size or heads % groups or size % 2:
        raise InputError(
            f"{file.path}: {heads} heads of {size} with {groups} groups and other values do not fit together"
        )
    if read.integer("expert_count", 0, _MOST, 0) > 0:
        raise InputError(f"{file.path}: a mixture of experts, which this model is not")
    context = read.integer("context_length", 1, _MOST)
    if read.integer("attention.sliding_window", 0, _MOST, context) not in (0, *range(context, context + 1)):
        raise InputError(f"{file.path}: attends within a sliding window, which is not supported")
    embedding = file.tensors.get("token_embd.weight")
    tokens = embedding.shape[0] if embedding is not None else 0
    rotated = read.integer("rope.dimension_count", 1, size, size)
    if rotated != size and not kind.partial:
        raise InputError(f"{file.path}: rotates {rotated} of {size} numbers of a head, which {name} models do not")
    config: dict[str, Any] = {
        "architectures": [kind.model_class], "model_type": name, "vocab_size": tokens, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups, "head_dim": size, "hidden_act": "silu", "max_position_embeddings": context,
        "rms_norm_eps": _rounded(read.number("attention.layer_norm_rms_epsilon", 0.0, 1.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors, **dict(kind.fixed), **vocabulary.special_ids,
        "rope_parameters": _rope(file, read, rotated)
        | ({"partial_rotary_factor": rotated / size} if kind.partial else {}),
    }  # fmt: skip
    names = kind.names
    if kind.partial:
        config["attention_bias"] = any(_LAYER.format(0) + label in file.tensors for label in _BIASES)
        names = names if config["attention_bias"] else {k: v for k, v in names.items() if k not in _BIASES}
    sizes = {
        "token_embd.weight": (tokens, hidden), "output.weight": (tokens, hidden), "output_norm.weight": (hidden,),
        "attn_q.weight": (heads * size, hidden), "attn_k.weight": (groups * size, hidden),
        "attn_v.weight": (groups * size, hidden), "attn_output.weight": (hidden, heads * size),
        "attn_q.bias": (heads * size,), "attn_k.bias": (groups * size,), "attn_v.bias": (groups * size,),
        "ffn_gate.weight": (inner, hidden), "ffn_down.weight": (hidden, inner),
        "ffn_up.weight": ((2 if kind.partial else 1) * inner, hidden),
    }  # fmt: skip
    rows: dict[str, _Row] = {}

    def add(label: str, layer: int | None) -> None:
        here, there = (label, names[label]) if layer is None else (
            _LAYER.format(layer) + label, _HF.format(layer) + names[label])  # fmt: skip
        turned = {"attn_q.weight": heads, "attn_k.weight": groups}.get(label) if kind.halves else None
        rows[there] = _Row(here, sizes.get(label, (hidden,)), turned)

    bare = ("token_embd.weight", "output_norm.weight", "output.weight")
    add("token_embd.weight", None)
    for layer in range(layers):
        for label in names:
            if label not in bare:
                add(label, layer)
    for label in ("output_norm.weight", *([] if config["tie_word_embeddings"] else ["output.weight"])):
        add(label, None)
    _check(file, rows, tokens, vocabulary)
    return config, rows


def _check(file: GgufFile, rows: dict[str, _Row], tokens: int, vocabulary: Vocabulary) -> None:
    """Every tensor is there once, in its shape, and no other."""
    wanted = {row.source: row.shape for row in rows.values()}
    found = {name: tensor.shape for name, tensor in file.tensors.items() if name != "rope_freqs.weight"}
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    shapes = [f"{name} {found[name]} instead of {wanted[name]}" for name in wanted.keys() & found if
              found[name] != wanted[name]]  # fmt: skip
    parts = (("is missing", missing), ("does not belong", extra), ("has another shape", sorted(shapes)))
    if wrong := [f"{some(names)} {what}" for what, names in parts if names]:
        raise InputError(f"{file.path}: its tensors are not those of its configuration: {'; '.join(wrong)}")
    if len(vocabulary) > tokens:
        raise InputError(f"{file.path}: has {len(vocabulary)} tokens, but an embedding of only {tokens} rows")


def _rope(file: GgufFile, read: Fields, rotated: int) -> dict[str, Any]:
    """``rope_parameters``. Raises: InputError: a scaling that is not linear, Llama 3's or Qwen2's yarn."""
    base = _rounded(read.number("rope.freq_base", 1e-3, 1e12, 10_000.0))
    kind = read.text("rope.scaling.type", None, 100)
    if kind is None:  # to llama.cpp a factor alone is a linear one
        kind = "none" if read.number("rope.scaling.factor", 0.0, 1e4, 0.0) in (0.0, 1.0) else "linear"
    factors = file.tensors.get("rope_freqs.weight")
    if factors is not None and factors.shape != (rotated // 2,):
        raise InputError(f"{file.path}: rope_freqs.weight has the shape {factors.shape}, the pairs of a head are "
                         f"{rotated // 2}")  # fmt: skip
    if factors is not None and kind == "none":
        stated = file.rows("rope_freqs.weight", 0, factors.shape[0])
        for known in _LLAMA3:
            if np.allclose(stated, _llama3_factors(known, base, 2 * len(stated)), rtol=1e-4):
                return {"rope_theta": base, **known}
        raise InputError(f"{file.path}: rope_freqs.weight is not the scaling of Llama 3.1, 3.2 or 3.3")
    if kind == "yarn" and factors is None:
        return {
            "rope_theta": base, "rope_type": "yarn", "factor": _rounded(read.number("rope.scaling.factor", 1.0, 1e4)),
            "original_max_position_embeddings": read.integer("rope.scaling.original_context_length", 1, _MOST),
        }  # fmt: skip
    if kind == "linear" and factors is None:
        return {
            "rope_theta": base,
            "rope_type": "linear",
            "factor": _rounded(read.number("rope.scaling.factor", 1e-4, 1e4)),
        }
    if kind != "none":
        raise InputError(f"{file.path}: rope scaling {short(kind)} is not supported; known: none, linear, yarn, and "
                         "Llama 3's")  # fmt: skip
    return {"rope_theta": base, "rope_type": "default"}


def _llama3_factors(known: dict[str, Any], base: float, size: int) -> np.ndarray:
    """What each frequency is divided by (the scaling of Llama 3.1's reference code)."""
    lengths = 2 * math.pi * base ** (np.arange(0, size, 2) / size)
    turns = known["original_max_position_embeddings"] / lengths
    low, high, factor = known["low_freq_factor"], known["high_freq_factor"], known["factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _rounded(value: float) -> float:
    """The shortest decimal number that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _blocks(file: GgufFile, row: _Row, kind: str) -> Iterator[np.ndarray]:
    """A tensor, some rows at a time; whole heads where their rows are reordered."""
    width = math.prod(row.shape[1:])
    step = max(1, _BLOCK_BYTES // (4 * width))
    head = 1 if row.heads is None else row.shape[0] // row.heads
    step = max(step // head, 1) * head
    for start in range(0, row.shape[0], step):
        stop = min(start + step, row.shape[0])
        values = file.rows(row.source, start, stop)
        if row.heads is not None:
            values = values.reshape(-1, head // 2, 2, width).swapaxes(1, 2).reshape(values.shape)
        yield values.astype(FILE_DTYPES[kind])
