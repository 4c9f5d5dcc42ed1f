"""ONE invertible table between checkpoint tensor names and the parameter tree, and what follows from it.

A table row says in which tensors of a layout a parameter lives. Parameters that share a tensor are blocks of its rows
in table order (chatglm's fused query_key_value is all of q, then all of k, then all of v). Tensors that share a
parameter are blocks of its rows in the order named (Llama's gate, then up). Checkpoints store a linear map as
``[out, in]``, the tree stores ``kernel [in, out]``; rows of rotary pairs are as ``rows.py`` says; all else is alike.

    glm       transformers' Glm and Glm4 (the two extra norms of Glm4 are rows of the same table)
    chatglm   the remote-code releases glm-4-9b, -chat, -chat-1m
    glm-qkv   an early conversion of glm that kept q, k and v fused; read only
    llama     transformers' Llama, and under the same names mistral and qwen2
    glm4v     the text decoder of transformers' Glm4v, and under the same names glm46v; the vision tower passes by
    orbax     no table: the parameter tree itself, see orbax_files.py
"""

import dataclasses
import functools
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from mentalglm_jax.checkpoints.hf_files import DTYPES, Checkpoint, ModelFiles
from mentalglm_jax.checkpoints.rows import Part, Tensor
from mentalglm_jax.checkpoints.vision import TOWER, tower_tensors, vision_config
from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import DIRECTORY, Fields, read_json, short, some, there
from mentalglm_jax.model.glm import Glm, GlmConfig, abstract_model
from mentalglm_jax.model.published import MAX_TOKEN_ID, refuse_quantised
from mentalglm_jax.model.relatives import RELATIVES, VISION
from mentalglm_jax.model.spellings import ROPE_BASE
from mentalglm_jax.text.chat_formats import GLM
from mentalglm_jax.text.tokenizer import GlmTokenizer

_GLM = "model.layers.{}."
_CHATGLM = "transformer.encoder.layers.{}."


class Place(NamedTuple):
    """The tensors whose rows, one after the other, are a parameter's; ``half_split`` is their rotary pairs' order."""

    names: tuple[str, ...]
    half_split: bool = False


_GLM_TABLE = {
    "embed_tokens.embedding": "model.embed_tokens.weight",
    "layers.input_layernorm.weight": _GLM + "input_layernorm.weight",
    "layers.self_attn.q_proj.kernel": _GLM + "self_attn.q_proj.weight",
    "layers.self_attn.k_proj.kernel": _GLM + "self_attn.k_proj.weight",
    "layers.self_attn.v_proj.kernel": _GLM + "self_attn.v_proj.weight",
    "layers.self_attn.q_proj.bias": _GLM + "self_attn.q_proj.bias",
    "layers.self_attn.k_proj.bias": _GLM + "self_attn.k_proj.bias",
    "layers.self_attn.v_proj.bias": _GLM + "self_attn.v_proj.bias",
    "layers.self_attn.o_proj.kernel": _GLM + "self_attn.o_proj.weight",
    "layers.post_self_attn_layernorm.weight": _GLM + "post_self_attn_layernorm.weight",
    "layers.post_attention_layernorm.weight": _GLM + "post_attention_layernorm.weight",
    "layers.mlp.gate_up_proj.kernel": _GLM + "mlp.gate_up_proj.weight",
    "layers.mlp.down_proj.kernel": _GLM + "mlp.down_proj.weight",
    "layers.post_mlp_layernorm.weight": _GLM + "post_mlp_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.kernel": "lm_head.weight",
}
_LLAMA_TABLE = {path: Place((name,), ".q_proj." in path or ".k_proj." in path)
                for path, name in _GLM_TABLE.items() if "post_self_attn" not in path and "post_mlp" not in path} | {
    "layers.mlp.gate_up_proj.kernel": Place((_GLM + "mlp.gate_proj.weight", _GLM + "mlp.up_proj.weight")),
}  # fmt: skip
_NESTED = {path: name.replace("model.", "model.language_model.") for path, name in _GLM_TABLE.items()}
_ONE_NAME: dict[str, dict[str, str]] = {
    "glm": _GLM_TABLE,
    "glm-qkv": {
        path: re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", name) for path, name in _GLM_TABLE.items()
    },
    "chatglm": {
        "embed_tokens.embedding": "transformer.embedding.word_embeddings.weight",
        "layers.input_layernorm.weight": _CHATGLM + "input_layernorm.weight",
        "layers.self_attn.q_proj.kernel": _CHATGLM + "self_attention.query_key_value.weight",
        "layers.self_attn.k_proj.kernel": _CHATGLM + "self_attention.query_key_value.weight",
        "layers.self_attn.v_proj.kernel": _CHATGLM + "self_attention.query_key_value.weight",
        "layers.self_attn.q_proj.bias": _CHATGLM + "self_attention.query_key_value.bias",
        "layers.self_attn.k_proj.bias": _CHATGLM + "self_attention.query_key_value.bias",
        "layers.self_attn.v_proj.bias": _CHATGLM + "self_attention.query_key_value.bias",
        "layers.self_attn.o_proj.kernel": _CHATGLM + "self_attention.dense.weight",
        "layers.post_attention_layernorm.weight": _CHATGLM + "post_attention_layernorm.weight",
        "layers.mlp.gate_up_proj.kernel": _CHATGLM + "mlp.dense_h_to_4h.weight",
        "layers.mlp.down_proj.kernel": _CHATGLM + "mlp.dense_4h_to_h.weight",
        "norm.weight": "transformer.encoder.final_layernorm.weight",
        "lm_head.kernel": "transformer.output_layer.weight",
    },
    **dict.fromkeys(VISION, _NESTED),
}  # fmt: skip
TABLES: dict[str, dict[str, Place]] = {
    **{layout: {path: Place((name,)) for path, name in table.items()} for layout, table in _ONE_NAME.items()},
    **dict.fromkeys(RELATIVES, _LLAMA_TABLE),
}
WRITABLE_LAYOUTS = ("glm", "chatglm", *RELATIVES, *VISION)
# Rotary frequencies are computed from the config; the stored buffers are base-10000 values nothing reads.
DROPPED = re.compile(
    r"(transformer\.rotary_pos_emb|model\.(language_model\.)?(layers\.\d+\.self_attn\.)?rotary_emb)\.inv_freq"
)
# Ends of the names under which quantisation methods store codes and scales (GPTQ, AWQ, FP8, bitsandbytes, others).
_CODES = re.compile(rf".*\.({'|'.join(DIRECTORY['codes'])}|quant_state\..*)")


class RopeThetaWarning(UserWarning):
    """The configuration's rope_theta is probably not what the model was trained with."""


@functools.lru_cache(maxsize=32)
def parameter_shapes(config: GlmConfig) -> Mapping[str, tuple[int, ...]]:
    """Dotted path to shape, for every parameter of the base model."""
    state = nnx.to_flat_state(nnx.state(abstract_model(config), nnx.Param))
    return {".".join(map(str, path)): leaf.shape for path, leaf in state}


def inventory(config: GlmConfig, layout: str) -> dict[str, Tensor]:
    """Every tensor a complete checkpoint of ``layout`` has. Each parameter lies in exactly one place.

    Raises:
        InputError: the layout has no name for a parameter this model needs.
    """
    if layout == "orbax":
        return {p: Tensor(shape, (Part(p, None, 0, shape[0]),)) for p, shape in parameter_shapes(config).items()}
    table, shapes = TABLES[layout], parameter_shapes(config)
    if nameless := [path for path in shapes if path not in table]:
        raise InputError(f"layout {layout!r} has no place for {some(nameless)}")
    tensors: dict[str, Tensor] = {}

    def add(path: str, layer: int | None) -> None:
        shape = shapes[path] if layer is None else shapes[path][1:]
        rows, *rest = reversed(shape) if path.endswith(".kernel") else shape
        rows, head = rows // len(table[path].names), config.head_dim if table[path].half_split else 0
        for number, template in enumerate(table[path].names):
            name = template.format(layer)
            start, parts = (tensors[name].shape[0], tensors[name].parts) if name in tensors else (0, ())
            part = Part(path, layer, start, start + rows, number * rows, head)
            tensors[name] = Tensor((start + rows, *rest), (*parts, part))

    stacked = [path for path in table if path in shapes and path.startswith("layers.")]
    first, *last = [path for path in table if path in shapes and path not in stacked]
    add(first, None)
    for layer in range(config.num_hidden_layers):
        for path in stacked:
            add(path, layer)
    for path in last:
        add(path, None)
    return tensors


def detect_layout(names: Iterable[str]) -> str:
    """The layout tensor names are in; re-saved checkpoints keep a config that says another one. ``llama`` and ``glm4v``
    stand for all that share their names."""
    names = list(names)
    if any(name.startswith("transformer.") for name in names):
        return "chatglm"
    if "embed_tokens.embedding" in names:
        return "orbax"
    if any(name.startswith(("model.language_model.", TOWER)) for name in names):
        return "glm4v"
    if any(".mlp.gate_proj." in name for name in names):
        return "llama"
    return "glm-qkv" if any(".self_attn.qkv_proj." in name for name in names) else "glm"


def read_config(checkpoint: ModelFiles, rope_theta: float | None = None) -> GlmConfig:
    """The model configuration of a checkpoint.

    Warns:
        RopeThetaWarning: a native 128K or 1M chat checkpoint says rope_theta 10000. The published conversions of
            glm-4-9b-chat lost the original's rope_ratio (500, or 10000 for -1m). The file is honoured, as transformers
            does, unless ``rope_theta`` is given.

    Raises:
        InputError: the configuration is not one of GLM-4 or a relative, or the tensors are named as in another family.
    """
    raw, file = dict(checkpoint.config), checkpoint.directory / "config.json"
    layout = detect_layout(checkpoint.tensors)
    if raw.get("model_type") is None:  # the tensors tell the two native models apart
        raw["model_type"] = "glm4" if any("post_mlp_layernorm" in name for name in checkpoint.tensors) else "glm"
    codes = [name for name in checkpoint.tensors if _CODES.fullmatch(name)]
    try:
        refuse_quantised(raw if not codes else {"quantization_config": {"quant_method": f"tensor {codes[0]}"}, **raw})
        config = GlmConfig.from_dict(raw, rope_theta=rope_theta)
    except InputError as error:
        raise InputError(f"{checkpoint.directory}: {error}") from error
    kin = {**dict.fromkeys(RELATIVES, "llama"), **dict.fromkeys(VISION, "glm4v")}
    if layout != "orbax" and kin.get(config.family, "glm") != (layout if layout in kin else "glm"):
        raise InputError(
            f"{checkpoint.directory}: config.json says model_type {short(raw['model_type'])}, but the tensors are "
            f"named as in a {layout} directory; one of the two is from another model"
        )
    likely = {131072: 5e6, 1048576: 1e8}.get(config.max_position_embeddings)
    native = "ffn_hidden_size" not in raw and config.model_type == "glm"
    if (
        likely
        and native
        and rope_theta is None
        and config.rope_theta == 10000.0
        and config.partial_rotary_factor == 0.5
    ):
        warnings.warn(
            f"{file}: rope_theta is 10000, but a GLM-4 chat model of {config.max_position_embeddings} positions was "
            f"trained with {likely:.0f}; the published conversion lost it. The file's value is used, as transformers "
            f"does; pass rope_theta={likely:.0f} to use the other, rope_theta=10000 to silence this. An adapter is "
            "valid only with the value it was trained with",
            RopeThetaWarning,
            stacklevel=3,
        )
    return config


def check_tensors(checkpoint: ModelFiles, config: GlmConfig, layout: str) -> dict[str, Tensor]:
    """The inventory, after every tensor in the files was matched with it and the other way round.

    Raises:
        InputError: names what is missing, unexpected, of the wrong shape or of the wrong dtype.
    """
    passing = tower_tensors(checkpoint, layout)
    found = {name: info for name, info in checkpoint.tensors.items()
             if not DROPPED.fullmatch(name) and name not in passing}  # fmt: skip
    if config.num_hidden_layers > len(found) and layout != "orbax":  # there a stack of layers is one array
        raise InputError(
            f"{checkpoint.directory}: config.json says {config.num_hidden_layers} layers, "
            f"the files hold only {len(found)} tensors"
        )
    expected = inventory(config, layout)
    if config.tie_word_embeddings and isinstance(checkpoint, Checkpoint):  # older saves hold the shared table twice
        found.pop(_duplicate_head(checkpoint, layout), None)
    faults = []
    for what, names in (
        ("missing", [name for name in expected if name not in found]),
        ("unexpected", [name for name in found if name not in expected]),
        ("of wrong shape", [
            f"{name} {list(found[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items() if name in found and found[name].shape != tensor.shape
        ]),
        ("of wrong dtype", [
            f"{name} {info.dtype} (only {', '.join(DTYPES)} are read)"
            for name, info in found.items() if name in expected and info.dtype not in DTYPES
        ]),
    ):  # fmt: skip
        if names:
            faults.append(f"{len(names)} tensor{'s' * (len(names) > 1)} {what}: {some(names)}")
    if faults:
        raise InputError(f"{checkpoint.directory}: the weights do not fit config.json ({layout}): {'; '.join(faults)}")
    return expected


def _duplicate_head(checkpoint: Checkpoint, layout: str) -> str:
    table = TABLES[layout]
    (head,), (embedding,) = table["lm_head.kernel"].names, table["embed_tokens.embedding"].names
    if head not in checkpoint.tensors or embedding not in checkpoint.tensors:
        return head
    infos = checkpoint.tensors[head], checkpoint.tensors[embedding]
    if infos[0].shape != infos[1].shape or not np.array_equal(checkpoint.read(head), checkpoint.read(embedding)):
        raise InputError(
            f"{checkpoint.directory}: config.json ties the embeddings, but {head} and {embedding} differ; "
            "set tie_word_embeddings to false or remove the wrong tensor"
        )
    return head


def parameter(model: Glm, path: str) -> nnx.Variable:
    """The parameter (or part of a quantised one) at a dotted path, e.g. ``layers.self_attn.q_proj.kernel``."""
    return functools.reduce(getattr, path.split("."), model)  # type: ignore[return-value]


def config_for(config: GlmConfig, layout: str, dtype: str, source: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The ``config.json`` of a layout, read back to make sure that it says the same model.

    Args:
        source: of a vision-language model, the ``config.json`` it came with, whose rest is kept.

    Raises:
        InputError: an unknown layout, or one that cannot express this configuration.
    """
    if layout not in WRITABLE_LAYOUTS:
        raise InputError(f"layout {layout!r} is not one of {', '.join(WRITABLE_LAYOUTS)}")
    family = layout if layout in (*RELATIVES, *VISION) else "glm"
    if layout in VISION:
        if source is None or source.get("model_type") != layout:
            raise InputError(f"layout {layout!r} has a vision tower, which only a {layout} directory can give")
        raw = vision_config(config, source, dtype)
    elif layout == "chatglm":
        raw = _chatglm_config(config, dtype)
    else:
        raw = dataclasses.replace(config, family=family).to_dict(dtype)
    back = GlmConfig.from_dict(raw)
    optional = ("initializer_range", "family", "bos_token_id")  # what no computation with the files depends on
    names = [name for name in GlmConfig.__dataclass_fields__ if name not in optional]
    if lost := [name for name in names if getattr(back, name) != getattr(config, name)]:
        raise InputError(f"layout {layout!r} cannot express this model's {some(lost, 8)}; use layout 'glm'")
    return raw


def generation_config(config: GlmConfig, stated: Mapping[str, Any]) -> dict[str, Any]:
    """``generation_config.json``: what the source's own said, with every id that may end an answer.

    Which of GLM-4's three end a turn depends on who fine-tuned the model, so one of them in a file stands for all. Of a
    relative the ids of ``stated`` are all, where it has any: to transformers ``config.json`` has no say then.

    Raises:
        InputError: ``stated`` has something else than token ids for eos_token_id.
    """
    eos = Fields(stated, "generation_config.json").integers("eos_token_id", 0, MAX_TOKEN_ID, ())
    ids = dict.fromkeys(eos if eos and config.family in RELATIVES else [*config.eos_token_id, *eos])
    if config.family not in RELATIVES and ids.keys() & set(GlmConfig.eos_token_id):
        ids |= dict.fromkeys(GlmConfig.eos_token_id)
    written = {"_from_model_config": not stated, **stated, "eos_token_id": [*ids], "pad_token_id": config.pad_token_id}
    if config.family in RELATIVES:
        written = {"bos_token_id": config.bos_token_id, **written}
        written["pad_token_id"] = stated.get("pad_token_id", config.pad_token_id)
    return {key: value for key, value in written.items() if value is not None and value != []}


def ends_of(config: GlmConfig, tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer, or the directory of one, says of the ids that end and pad an answer, for ``generation_config``:
    ``config.json`` may have only some, in any layout. A directory that is no tokenizer of ours has it in its own file.
    """
    if isinstance(tokenizer, str | Path):
        file = Path(tokenizer) / "generation_config.json"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what it reads in another way; said where it is used
                tokenizer = GlmTokenizer.load(tokenizer)
        except InputError:
            said = read_json(file) if there(file) else {}
            return {name: said[name] for name in ("eos_token_id", "pad_token_id") if name in said}
    if not isinstance(tokenizer, GlmTokenizer):
        return {}
    ends = {"eos_token_id": list(tokenizer.eos_ids)}
    if config.family in RELATIVES:
        return {**ends, "pad_token_id": tokenizer.pad_id}
    own = GlmConfig.eos_token_id if tokenizer.chat_format is GLM else ()
    return ends if {*tokenizer.eos_ids} - {*config.eos_token_id, *own} else {}


def _chatglm_config(config: GlmConfig, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "add_bias_linear": False,
        "add_qkv_bias": config.attention_bias,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "eos_token_id": list(config.eos_token_id),
        "ffn_hidden_size": config.intermediate_size,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": config.hidden_size,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.rms_norm_eps,
        "multi_query_attention": True,
        "multi_query_group_num": config.num_key_value_heads,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_layers": config.num_hidden_layers,
        "original_rope": True,
        "pad_token_id": config.pad_token_id,
        "padded_vocab_size": config.vocab_size,
        "post_layer_norm": True,
        "rmsnorm": True,
        "rope_ratio": config.rope_theta / ROPE_BASE,
        "seq_length": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
