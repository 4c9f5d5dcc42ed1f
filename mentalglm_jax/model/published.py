"""What a published ``config.json`` says, in the names of ``GlmConfig``.

Native glm / glm4 (old and new spellings), the chatglm remote code, and by ``relatives.py`` what is built of the same
layers. Every value is checked for type and range: the file comes from strangers.
"""

from collections.abc import Mapping
from typing import Any

from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import DIRECTORY, Fields, short
from mentalglm_jax.model.relatives import (
    NOT_HERE,
    RELATIVES,
    VISION,
    refuse_other_layers,
    relative_fields,
    vision_fields,
)
from mentalglm_jax.model.rope import MOST_POSITIONS, read_scaling
from mentalglm_jax.model.spellings import ROPE_BASE, rope_of

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads")  # fmt: skip
# Far above every published model, and low enough that no product of them overflows.
MOST = {"num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 16, "num_key_value_heads": 1 << 16,
         "head_dim": 1 << 16, "max_position_embeddings": MOST_POSITIONS}  # fmt: skip
MOST_WIDTH = 1 << 24
MAX_TOKEN_ID = (1 << 31) - 1  # ids are int32
# Numbers that every model has. transformers computes with a null and falls over; for an absent key it has a default.
_NEVER_NULL = ("rms_norm_eps", "layernorm_epsilon", "max_position_embeddings", "seq_length", *SIZES[:-1])
_FLAGS = ("attention_bias", "tie_word_embeddings", "mlp_bias", "use_sliding_window")  # nor may these be null to it


def published_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``GlmConfig`` that ``raw``, a ``config.json``, states.

    Of glm and chatglm, the keys present tell which, not ``model_type``, because re-saved checkpoints mix them.

    Raises:
        InputError: a needed key is missing, a value has the wrong type or range, or asks for something this model does
            not have; the weights are quantised.
    """
    read = Fields(raw, "config.json")
    refuse_quantised(raw)
    _refuse_null(raw)
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in (*RELATIVES, *VISION):
        text = raw if kind in RELATIVES else read.mapping("text_config")
        refuse_quantised(text)
        _refuse_null(text)
        where = Fields(text, "config.json" if kind in RELATIVES else "config.json: text_config")
        optional = [name for name in ("num_key_value_heads", "head_dim") if text.get(name) is not None]
        sizes = {name: _size(where, text, name) for name in (*SIZES[:-1], *optional)}
        return relative_fields(kind, raw, sizes) if kind in RELATIVES else vision_fields(kind, raw, sizes)
    fields = _from_chatglm(raw, read) if "ffn_hidden_size" in raw else _from_native(raw, read)
    if (eos := read.integers("eos_token_id", 0, MAX_TOKEN_ID, None)) is not None:
        fields["eos_token_id"] = eos
    if "pad_token_id" in raw:
        fields["pad_token_id"] = read.integer("pad_token_id", 0, MAX_TOKEN_ID, None)
    return fields | {"bos_token_id": read.integer("bos_token_id", 0, MAX_TOKEN_ID, None)}


def refuse_quantised(raw: Mapping[str, Any]) -> None:
    """Raises InputError when a ``config.json`` says that the weights beside it are codes of a quantisation method."""
    for key in DIRECTORY["quantised"]:
        if not (said := raw.get(key)):
            continue
        said = said if isinstance(said, Mapping) else {}
        bits = said.get("bits") or (4 if said.get("load_in_4bit") else 8 if said.get("load_in_8bit") else None)
        usual = "MLX" if key == "quantization" else "unknown method"
        method = str(said.get("quant_method") or said.get("quant_algo") or usual)[:80]
        raise InputError(
            f"config.json: this checkpoint is quantised ({method}{f', {bits} bits' if type(bits) is int else ''}), its "
            'tensors are codes of that method; load the checkpoint it was made from, with quantize="int8" or "nf4" '
            "(model.quantize in a recipe) where memory is short"
        )


def _refuse_null(raw: Mapping[str, Any]) -> None:
    """Raises: InputError where what every model has is null, or of a kind that transformers does not take."""
    if found := [name for name in (*_NEVER_NULL, *_FLAGS) if name in raw and raw[name] is None]:
        kind = "true or false" if found[0] in _FLAGS else "a number"
        raise InputError(f"config.json: {found[0]} is null and must be {kind}; take it from the original release")
    if type(raw.get("rms_norm_eps")) is int:
        raise InputError(f"config.json: rms_norm_eps {raw['rms_norm_eps']} is a whole number, which transformers does "
                         "not take; write it with a point")  # fmt: skip


def _size(read: Fields, raw: Mapping[str, Any], *names: str) -> int:
    """A size under the first of its ``names`` that is there."""
    for name in names:
        if raw.get(name) is not None:
            return read.integer(name, 1, MOST.get(name, MOST_WIDTH))
    raise InputError(f"config.json: key {names[0]!r} is missing; is this a checkpoint of GLM-4 or a relative?")


def _from_native(raw: Mapping[str, Any], read: Fields) -> dict[str, Any]:
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in NOT_HERE:
        raise InputError(f"config.json: model_type {short(kind)} is not supported: {NOT_HERE[kind]}")
    if kind not in ("glm", "glm4", None):
        known = ", ".join(("glm", "glm4", "chatglm", *VISION, *RELATIVES))
        raise InputError(f"config.json: model_type {short(kind)} is not GLM-4 nor one of its relatives ({known})")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json: hidden_act {short(raw['hidden_act'])} is not supported (GLM-4 uses silu)")
    refuse_other_layers(raw)
    rope = rope_of(raw)
    turned = Fields(rope, "config.json: rope_parameters")
    if "partial_rotary_factor" in raw and raw["partial_rotary_factor"] is None:  # all of a head to transformers
        raise InputError("config.json: partial_rotary_factor is null and must be a number; GLM-4's is 0.5")
    glm4 = (raw.get("model_type") or raw.get("architectures")) in ("glm4", ["Glm4ForCausalLM"])
    fields: dict[str, Any] = {name: _size(read, raw, name) for name in SIZES}
    # What transformers 5.23 takes for an absent key; its GlmConfig and Glm4Config have the same defaults.
    positions = read.integer("max_position_embeddings", 1, MOST["max_position_embeddings"], 131072)
    return fields | {
        "head_dim": read.integer("head_dim", 0, MOST["head_dim"], 128)
        or fields["hidden_size"] // fields["num_attention_heads"],
        "max_position_embeddings": positions,
        "rms_norm_eps": read.number("rms_norm_eps", default=1.5625e-07),
        "rope_theta": turned.number("rope_theta", default=read.number("rope_theta", default=10000.0)),
        "partial_rotary_factor": turned.number(
            "partial_rotary_factor", default=read.number("partial_rotary_factor", default=0.5)
        ),
        "rope_scaling": read_scaling(rope, positions),
        "attention_bias": read.flag("attention_bias", True),
        "tie_word_embeddings": read.flag("tie_word_embeddings", False),
        "initializer_range": read.number("initializer_range", default=0.02),
        "sandwich_norm": glm4,
    }


def _from_chatglm(raw: Mapping[str, Any], read: Fields) -> dict[str, Any]:
    for key, only in (("rmsnorm", True), ("post_layer_norm", True), ("add_bias_linear", False),
                      ("apply_residual_connection_post_layernorm", False), ("original_rope", True)):  # fmt: skip
        if raw.get(key, only) is not only:
            raise InputError(f"config.json: {key} = {short(raw[key])} is not a GLM-4 model ({only!r} is)")
    refuse_other_layers(raw)
    rope = rope_of(raw)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"config.json: rope type {short(kind)} is not one that a chatglm model has")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json: hidden_act {short(raw['hidden_act'])} is not supported (GLM-4 uses silu)")
    if read.number("partial_rotary_factor", default=0.5) != 0.5:
        raise InputError("config.json: a chatglm model rotates half of each head, partial_rotary_factor says otherwise")
    heads, hidden = _size(read, raw, "num_attention_heads"), _size(read, raw, "hidden_size")
    grouped = read.flag("multi_query_attention", False)
    return {
        "vocab_size": _size(read, raw, "padded_vocab_size", "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _size(read, raw, "ffn_hidden_size"),
        "num_hidden_layers": _size(read, raw, "num_layers", "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(read, raw, "multi_query_group_num") if grouped else heads,
        "head_dim": read.integer("kv_channels", 0, MOST["head_dim"], 0) or hidden // heads,
        "max_position_embeddings": read.integer("seq_length", 1, MOST["max_position_embeddings"], 8192),
        "rms_norm_eps": read.number("layernorm_epsilon"),
        "rope_theta": ROPE_BASE * read.number("rope_ratio", default=1.0),
        "partial_rotary_factor": 0.5,
        "attention_bias": read.flag("add_qkv_bias", False),
        "tie_word_embeddings": read.flag("tie_word_embeddings", False),
    }
