"""GGUF files byte by byte, sound and otherwise."""

import struct

import numpy as np

from mentalglm_jax.text.tokenizer_files import _byte_letters

U32, BOOL, TEXT, LIST = 4, 7, 8, 9


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def listed(inner, count, data=b""):
    return entry("a", LIST, struct.pack("<IQ", inner, count) + data)


def tensor(name="t", shape=(4,), kind=0, offset=0):
    axes = struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", size) for size in shape)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


def file(*parts, magic=b"GGUF", version=3, tensors=None, entries=None, padded=4096):
    """``parts`` are entries, then tensors; how many there are is said as asked."""
    kinds = [part for part in parts if isinstance(part, tuple)]
    counts = struct.pack("<QQ", len(kinds) if tensors is None else tensors,
                         len(parts) - len(kinds) if entries is None else entries)  # fmt: skip
    body = b"".join(part[0] if isinstance(part, tuple) else part for part in parts)
    return magic + struct.pack("<I", version) + counts + body + bytes(padded)


def texts(key, values):
    return entry(key, LIST, struct.pack("<IQ", TEXT, len(values)) + b"".join(map(text, values)))


def number(key, value):
    return entry(key, U32, struct.pack("<I", value))


def small_model(begins=None, factors=None):
    """A Llama of one layer and eight numbers with a vocabulary of bytes, 20 kB. ``begins``: with that token before a
    text; ``factors``: with rope_freqs.weight of that shape, the longest axis last."""
    letters = [*_byte_letters(), "ab", "<|im_end|>", *([] if begins is None else [begins])]
    kinds = np.array([1] * 257 + [3] * (len(letters) - 257), "<i4")
    entries = [
        entry("general.architecture", TEXT, text("llama")), number("llama.block_count", 1),
        number("llama.embedding_length", 8), number("llama.attention.head_count", 2),
        number("llama.attention.head_count_kv", 1), number("llama.feed_forward_length", 8),
        number("llama.context_length", 64), entry("llama.rope.freq_base", 6, struct.pack("<f", 1e4)),
        entry("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
        entry("tokenizer.ggml.model", TEXT, text("gpt2")), entry("tokenizer.ggml.pre", TEXT, text("smollm")),
        texts("tokenizer.ggml.tokens", letters), texts("tokenizer.ggml.merges", ["a b"]),
        entry("tokenizer.ggml.token_type", LIST, struct.pack("<IQ", 5, len(kinds)) + kinds.tobytes()),
        number("tokenizer.ggml.eos_token_id", 257), entry("tokenizer.chat_template", TEXT, text("{{ messages }}")),
    ]  # fmt: skip
    if begins is not None:
        entries += [number("tokenizer.ggml.bos_token_id", 258), entry("tokenizer.ggml.add_bos_token", BOOL, b"\1")]
    shapes = {"token_embd": (8, len(letters)), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.attn_q": (8, 8),
              "blk.0.attn_k": (8, 4), "blk.0.attn_v": (8, 4), "blk.0.attn_output": (8, 8), "blk.0.ffn_norm": (8,),
              "blk.0.ffn_gate": (8, 8), "blk.0.ffn_up": (8, 8), "blk.0.ffn_down": (8, 8),
              **({} if factors is None else {"rope_freqs": factors})}  # fmt: skip
    tensors, offset = [], 0
    for name, shape in shapes.items():
        tensors.append((tensor(f"{name}.weight", shape, 0, offset),))
        offset += -(-4 * int(np.prod(shape)) // 32) * 32
    return file(*entries, *tensors, padded=offset + 64)
