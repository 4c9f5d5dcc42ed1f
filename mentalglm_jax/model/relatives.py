"""GLM's relatives: models whose layers compute what a ``Glm`` layer computes, read from and written to their own form.

    llama     Llama 2 and 3, SmolLM2, Yi: every dimension of a head is rotated, no biases
    mistral   the same, where the sliding window does not bite
    qwen2     Qwen2 and Qwen2.5: the same with q, k and v biases
    glm4v     GLM-4.1V-9B-Thinking: Glm4 under nested names, with a vision tower beside it that is not run
    glm46v    GLM-4.6V-Flash: the same

What they differ in besides is names and the order of rows, which ``checkpoints.weights`` knows. A configuration that
differs in more is refused by the name of the difference.
"""

from collections.abc import Container, Mapping
from typing import Any, NamedTuple

from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import DIRECTORY, Fields, short
from mentalglm_jax.model.rope import MOST_POSITIONS, read_scaling, written
from mentalglm_jax.model.spellings import rope_of

VISION = ("glm4v", "glm46v")
NOT_HERE: dict[str, str] = {
    "qwen3": "its norms of q and k are parts that this model does not have",
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "glm4v_moe", "deepseek_v3", "llama4"),
                    "a mixture of experts, which this model is not"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "mllama", "llava", "mistral3"), "a vision-language model"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text", "phi3", "qwen", "baichuan", "internlm2"),
                    "another kind of layer"),
}  # fmt: skip
# Keys of other computations that authors put beside a model type we know; transformers passes over them.
ANOTHER_LAYER: tuple[str, ...] = tuple(DIRECTORY["another_layer"])
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


class Relative(NamedTuple):
    """What transformers takes for an absent key, and what the model's code fixes."""

    architecture: str
    attention_bias: bool  # of q, k and v
    positions: int
    kv_heads: int | None  # None: as many as query heads
    eos: tuple[int, ...]
    bos: int | None
    window: int | None  # an absent sliding_window


RELATIVES = {
    "llama": Relative("LlamaForCausalLM", False, 2048, None, (2,), 1, None),
    "mistral": Relative("MistralForCausalLM", False, 131072, 8, (2,), 1, 4096),
    "qwen2": Relative("Qwen2ForCausalLM", True, 32768, 32, (), None, 4096),
}
FAMILIES = ("glm", *RELATIVES, *VISION)


def relative_fields(kind: str, raw: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The fields of ``GlmConfig`` that a llama, mistral or qwen2 ``config.json`` states.

    Args:
        kind: its ``model_type``.
        sizes: the sizes in ``raw``, checked; ``num_key_value_heads`` and ``head_dim`` where the file has them.

    Raises:
        InputError: a value of the wrong type or range, or one that asks for another computation.
    """
    own, read = RELATIVES[kind], Fields(raw, "config.json")
    rope = rope_of(raw)
    turned = Fields(rope, "config.json: rope_parameters")
    heads = sizes["num_attention_heads"]
    positions = read.integer("max_position_embeddings", 1, MOST_POSITIONS, own.positions)
    _refuse_others(kind, raw, read, rope)
    _refuse_windows(kind, raw, read, positions, sizes["num_hidden_layers"])
    kv_heads = None if "num_key_value_heads" in raw else own.kv_heads
    return {
        **sizes,
        "num_key_value_heads": sizes.get("num_key_value_heads") or kv_heads or heads,
        "head_dim": sizes.get("head_dim") or sizes["hidden_size"] // heads,
        "max_position_embeddings": positions,
        "rms_norm_eps": read.number("rms_norm_eps", default=1e-6),
        "rope_theta": turned.number("rope_theta", default=read.number("rope_theta", default=10000.0)),
        "partial_rotary_factor": 1.0,
        "rope_scaling": read_scaling(rope, positions),
        "attention_bias": own.attention_bias,
        "tie_word_embeddings": read.flag("tie_word_embeddings", False),
        "initializer_range": read.number("initializer_range", default=0.02),
        "eos_token_id": _ids(read, raw, "eos_token_id", own.eos),
        "pad_token_id": next(iter(_ids(read, raw, "pad_token_id", ())), None),
        "bos_token_id": next(iter(_ids(read, raw, "bos_token_id", () if own.bos is None else (own.bos,))), None),
        "family": kind,
    }


def _ids(read: Fields, raw: Mapping[str, Any], key: str, absent: tuple[int, ...]) -> tuple[int, ...]:
    """Token ids at ``key``; null is none at all, and so is -1, as the first Llama's files say it."""
    if raw.get(key) == -1 or (key in raw and raw[key] is None):
        return ()
    return read.integers(key, 0, MOST_POSITIONS, absent)


def _refuse_others(kind: str, raw: Mapping[str, Any], read: Fields, rope: Mapping[str, Any]) -> None:
    if (value := raw.get("hidden_act", "silu")) != "silu":
        raise InputError(f"config.json: hidden_act {short(value)} is not supported (GLM-4 and its relatives use silu)")
    if read.flag("mlp_bias", False):
        raise InputError("config.json: mlp_bias = True: this model's feed-forward has no biases")
    if read.flag("attention_bias", RELATIVES[kind].attention_bias) != RELATIVES[kind].attention_bias:
        has = "q, k and v have biases in every qwen2 model" if kind == "qwen2" else (
            "o_proj would have a bias too, which this model does not have")  # fmt: skip
        raise InputError(f"config.json: attention_bias = {raw['attention_bias']!r} in a {kind} model: {has}")
    for place in (raw, rope):
        if Fields(place, "config.json").number("partial_rotary_factor", default=1.0) != 1.0:
            raise InputError(
                f"config.json: partial_rotary_factor {short(place['partial_rotary_factor'])}: a {kind} model rotates "
                "every dimension of a head"
            )
    if experts := [key for key in EXPERTS if raw.get(key)]:
        raise InputError(f"config.json: {experts[0]} {short(raw[experts[0]])}: a mixture of experts, which this model "
                         "is not")  # fmt: skip
    refuse_other_layers(raw, () if kind == "llama" else ("sliding_window", "layer_types"))


def refuse_other_layers(raw: Mapping[str, Any], windows: Container[str] = ()) -> None:
    """Raises InputError when a ``config.json`` asks for a computation that its model type does not name.

    Args:
        windows: keys of windows that the type knows, and that are judged elsewhere. transformers' layers pass over the
            others, but its cache cuts keys off by them: an answer is then of another model than its logits. So it does
            by ``decoder_`` windows of an ``is_encoder_decoder``; an ``attribute_map`` has it read any key as another.
    """
    others = [key for key in (*ANOTHER_LAYER, *DIRECTORY["other_keys"], "per_layer_config") if raw.get(key)]
    others += [key for key in DIRECTORY["windows"]  # to the cache 0 is a window of none, not none
               if key not in windows and raw.get(key) is not None and not _too_wide(raw, key)]  # fmt: skip
    kinds = raw.get("layer_types") or ()
    if "layer_types" not in windows and (
        not isinstance(kinds, list | tuple) or {*map(str, kinds)} - {"full_attention"}
    ):
        others.append("layer_types")
    if not raw.get("is_causal", True):
        others.append("is_causal")
    if others:
        raise InputError(f"config.json: {others[0]} {short(raw[others[0]])} asks for a layer that this model does not "
                         "have")  # fmt: skip


def _too_wide(raw: Mapping[str, Any], key: str) -> bool:
    """Whether no row that the model takes notices that window."""
    window, positions = raw[key], raw.get("max_position_embeddings", raw.get("seq_length"))
    return isinstance(window, int) and isinstance(positions, int) and window >= positions


def _refuse_windows(kind: str, raw: Mapping[str, Any], read: Fields, positions: int, layers: int) -> None:
    """A window that no row of up to ``positions`` tokens notices is none."""
    if kind == "llama":
        return  # its layers have none: ``refuse_other_layers``
    kinds = read.texts("layer_types", None)
    window = read.integer("sliding_window", 1, MOST_POSITIONS, None)
    if "sliding_window" not in raw:
        window = RELATIVES[kind].window
    if kind == "qwen2" and not read.flag("use_sliding_window", False):
        window = None
    sliding = [one for one in kinds or () if one != "full_attention"]
    if kind == "qwen2" and kinds is None and window is not None:
        sliding = list(range(read.integer("max_window_layers", 0, MOST_POSITIONS, 28), layers))
    if kind == "mistral" and window is not None:
        sliding = [window]
    if sliding and window is None:
        raise InputError(f"config.json: layer_types has {short(sliding[0])}, but no sliding_window is switched on")
    if sliding and window is not None and window < positions:
        raise InputError(
            f"config.json: sliding_window {window} is shorter than max_position_embeddings {positions}, and this model "
            f"has no windows; rows of up to {window} tokens do not notice it: set max_position_embeddings to {window} "
            "in a copy of the directory to use it that far"
        )


def vision_fields(kind: str, raw: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The fields of the text decoder of a glm4v or glm46v ``config.json``, whose ``text_config`` has ``sizes``.

    On text, the three position ids of a token are equal, so that its multimodal RoPE is the plain one.

    Raises:
        InputError: as ``relative_fields``.
    """
    text = Fields(raw, "config.json").mapping("text_config")
    refuse_other_layers({key: raw[key] for key in DIRECTORY["other_keys"] if key in raw})
    refuse_other_layers(text)
    read, rope = Fields(text, "config.json: text_config"), rope_of(text)
    turned = Fields(rope, "config.json: rope_parameters")
    if (stated := text.get("model_type", "glm4v_text")) != "glm4v_text":
        raise InputError(f"config.json: text_config.model_type {short(stated)} is not glm4v_text")
    if (value := text.get("hidden_act", "silu")) != "silu":
        raise InputError(f"config.json: hidden_act {short(value)} is not supported (GLM-4 and its relatives use silu)")
    if not read.flag("attention_bias", True):
        raise InputError(f"config.json: attention_bias = False: q, k and v have biases in every {kind} model")
    heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
    if sizes.get("head_dim", width // heads) != width // heads:
        raise InputError(f"config.json: head_dim {sizes['head_dim']} in a {kind} model is hidden_size / heads, "
                         f"{width // heads}")  # fmt: skip
    positions = read.integer("max_position_embeddings", 1, MOST_POSITIONS, 32768)
    factor = turned.number("partial_rotary_factor", default=read.number("partial_rotary_factor", default=1.0))
    sections = turned.integers("mrope_section", 0, MOST_POSITIONS, (8, 12, 12))
    if sum(sections) != (pairs := int(width // heads * factor) // 2):
        raise InputError(f"config.json: mrope_section {short(list(sections))} does not sum to the {pairs} rotary pairs "
                         "of a head")  # fmt: skip
    ids = [Fields(place, "config.json") for place in (text, raw)]
    # To transformers a glm46v ties by the outer key alone; a glm4v also by the inner one, as older files have it.
    ties = [Fields(place, "config.json") for place in ((text, raw) if kind == "glm4v" else (raw,))]
    return {
        **sizes,
        "num_key_value_heads": sizes.get("num_key_value_heads") or (heads if "num_key_value_heads" in text else 2),
        "head_dim": width // heads,
        "max_position_embeddings": positions,
        "rms_norm_eps": read.number("rms_norm_eps", default=1e-5),
        "rope_theta": turned.number("rope_theta", default=read.number("rope_theta", default=10000.0)),
        "partial_rotary_factor": factor,
        "rope_scaling": read_scaling(rope, positions),
        "attention_bias": True,
        "tie_word_embeddings": any(one.flag("tie_word_embeddings", False) for one in ties),
        "initializer_range": read.number("initializer_range", default=0.02),
        "sandwich_norm": True,
        "family": kind,
        **({"eos_token_id": eos} if (eos := _either(ids, "eos_token_id")) else {}),
        "pad_token_id": next(iter(_either(ids, "pad_token_id")), None),
    }


def _either(places: list[Fields], key: str) -> tuple[int, ...]:
    return next((found for one in places if (found := one.integers(key, 0, MOST_POSITIONS, ()))), ())


def relative_config(kind: str, fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The ``config.json`` of a llama, mistral or qwen2 model whose ``GlmConfig`` has ``fields``, as transformers 4 and
    5 read it: the rotary block stands under its old name too, for 4 passes over the new one."""
    own = RELATIVES[kind]
    scaling = written(fields["rope_scaling"])
    rope = {**scaling, "rope_theta": fields["rope_theta"]}
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
            "initializer_range", "bos_token_id", "pad_token_id", "rope_theta")  # fmt: skip
    eos = list(fields["eos_token_id"])
    fixed = {"llama": {"attention_bias": False, "mlp_bias": False}, "mistral": {"sliding_window": None},
             "qwen2": {"use_sliding_window": False}}  # fmt: skip
    return {
        "architectures": [own.architecture],
        "model_type": kind,
        **{name: fields[name] for name in same},
        **fixed[kind],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "rope_parameters": rope,
        **({} if fields["rope_scaling"] is None else {"rope_scaling": rope}),
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
