"""One quantity under two names, the native layout's and chatglm's. Where ``config.json`` states both, they must agree.

transformers reads the native names of a glm directory, llama.cpp's converter the chatglm ones of the same directory
(https://github.com/ggml-org/llama.cpp, ``conversion/chatglm.py``), so a directory that has only one kind, or two that
differ, is another model to one of them.
"""

import math
from collections.abc import Mapping
from typing import Any

from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import Fields, short
from mentalglm_jax.model.rope import MOST_POSITIONS

_LAYER = "attention"  # as transformers names kinds of layers: full_attention, linear_attention
ROPE_BASE = 10000.0  # chatglm states the base of the rotary frequencies as a multiple of this
CHATGLM_NAMES = {
    "rope_theta": "rope_ratio", "rms_norm_eps": "layernorm_epsilon", "max_position_embeddings": "seq_length",
    "intermediate_size": "ffn_hidden_size", "num_key_value_heads": "multi_query_group_num", "head_dim": "kv_channels",
    "num_hidden_layers": "num_layers", "attention_bias": "add_qkv_bias",
}  # fmt: skip


def rope_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What ``rope_scaling``, the older name, and ``rope_parameters`` say of the rotary positions, with the trained
    context where that stands beside them.

    Raises:
        InputError: one is no object, or holds objects or kinds of layers; or they differ: transformers then follows the
            older one and drops the other, and which of them was meant cannot be known.
    """
    read = Fields(raw, "config.json")
    older, newer = ({**one, "rope_type": one.get("rope_type", one.get("type", "default"))} if one else {}
                    for one in (read.mapping("rope_scaling", {}), read.mapping("rope_parameters", {})))  # fmt: skip
    if older and newer:
        for key in sorted((older.keys() | newer.keys()) - {"type"}):
            if older.get(key) != newer.get(key):
                raise InputError(
                    f"config.json: rope_scaling and rope_parameters differ in {short(key)}: {short(older.get(key))} "
                    f"and {short(newer.get(key))}; transformers follows rope_scaling; delete one of the two"
                )
    rope = {**older, **newer}
    layers = raw.get("layer_types")
    named = {one for one in layers if isinstance(one, str)} if isinstance(layers, list | tuple) else ()
    nested = [one for one, value in rope.items() if isinstance(value, Mapping) or one in named or one.endswith(_LAYER)]
    if nested:
        raise InputError(f"config.json: rope_parameters by kind of layer ({short(nested[0])}) are not supported")
    trained = read.integer("original_max_position_embeddings", 1, MOST_POSITIONS, None)
    if trained is not None:  # transformers prefers the one outside the block, in every model type
        rope["original_max_position_embeddings"] = trained
    return rope


def llama_cpp_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The chatglm names beside the native ones that llama.cpp's converter needs in a glm directory."""
    return {
        "rope_ratio": fields["rope_theta"] / ROPE_BASE,
        "layernorm_epsilon": fields["rms_norm_eps"],
        "seq_length": fields["max_position_embeddings"],
    }


def check_agreement(raw: Mapping[str, Any], fields: Mapping[str, Any], ignored: str | None = None) -> None:
    """``fields`` is what was read of ``raw``, under native names; the other spellings in it must say the same.

    Args:
        ignored: a native name that the caller overrides, so that the file has no say.

    Raises:
        InputError: two keys contradict each other.
    """
    chatglm = "ffn_hidden_size" in raw
    rope = rope_of(raw)
    stated = {**raw, "rope_theta": rope.get("rope_theta", raw.get("rope_theta"))}
    for native, theirs in CHATGLM_NAMES.items():
        read, other = (theirs, native) if chatglm else (native, theirs)
        unused = theirs == "multi_query_group_num" and not raw.get("multi_query_attention", True)
        if native == ignored or unused or stated.get(other) is None:
            continue
        value, claim = fields[native], stated[other]
        if native == "rope_theta":  # either may be the multiple; a base in float32 has 24 bits
            value = value / ROPE_BASE if chatglm else value
            factor = 1 / ROPE_BASE if chatglm else ROPE_BASE
        else:
            factor = 1.0
        if not _same(value, claim, factor):
            default = "" if stated.get(read) is not None else " (the default)"
            todo = "pass the right rope_theta (10000 times rope_ratio), or " if native == "rope_theta" else ""
            raise InputError(
                f"config.json: {read} {value!r}{default} and {other} {claim!r} contradict each other; {todo}correct "
                "one of them in the file"
            )


def _same(value: Any, claim: Any, factor: float) -> bool:
    if any(isinstance(each, bool) or not isinstance(each, int | float) for each in (value, claim)):
        return value == claim
    return math.isclose(value, claim * factor, rel_tol=1e-6)
