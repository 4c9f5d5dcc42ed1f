"""The same adapter under other names: what vLLM, llama.cpp and the chatglm layout call and fuse differently.

    peft        GLM's own modules: q_proj, k_proj, v_proj, o_proj, gate_up_proj, down_proj
    vllm        what vLLM reads for the base at hand: peft for Glm, vllm-split for Glm4, chatglm for the chatglm layout
    vllm-split  gate_up_proj in its halves gate_proj and up_proj (the same A, the rows of B), for vLLM's own GLM code;
                one rank and one scale for all, as older readers drop rank_pattern and alpha_pattern
    llama.cpp   as peft with every factor s folded into B: convert_lora_to_gguf knows alpha / rank only
    chatglm     names of the remote-code layout, q, k and v as one query_key_value; one rank and one scale for all

Fused to split: A is copied, the rows of B are cut. Split to fused: the same when all A are equal; else the ranks add
up, A is stacked and B has the parts' B on its diagonal. Both say the same map exactly.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mentalglm_jax.checkpoints.peft_config import from_peft, to_peft
from mentalglm_jax.errors import InputError
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.model.lora import SAVABLE, TARGETS, LoraConfig, Spec

FORMATS = ("peft", "vllm", "vllm-split", "llama.cpp", "chatglm")
# PEFT drops modules that the model does not have, so half of such an adapter would be lost without a word. It refuses
# an unknown task_type and prints it; vLLM does not look at that key.
FOR_VLLM_ONLY = "VLLM_ONLY (gate_proj and up_proj are GLM's fused gate_up_proj; PEFT reads `--to peft`)"
MAX_VLLM_RANK = 512  # the largest --max-lora-rank
MERGE = "save a merged model (`--to merged`, mg.save_pretrained)"
_CHATGLM = {
    "self_attn.o_proj": "self_attention.dense", "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h", "lm_head": "transformer.output_layer",
    "model.embed_tokens": "transformer.embedding.word_embeddings", "model.layers.": "transformer.encoder.layers.",
}  # fmt: skip
_QKV = ("q_proj", "k_proj", "v_proj")
_HALVES = ("gate_proj", "up_proj")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model was read: its absolute directory or Hub id, and the layout of the files there."""

    name: str
    layout: str


@dataclasses.dataclass(frozen=True)
class Low:
    """One module's adapter on the host: ``a [r, in]``, ``b [out, r]``, DoRA's ``magnitude [out]``, what it means."""

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    spec: Spec


class _Foreign(LoraConfig):
    """A configuration over the names of another layout."""

    KNOWN: ClassVar = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "output_layer", *_HALVES, *TARGETS)
    SAVABLE: ClassVar = ("word_embeddings", "output_layer", *SAVABLE)


def formatted(
    modules: Mapping[str, Low], config: LoraConfig, base: str | None, format: str, model: Glm
) -> tuple[dict[str, Low], dict[str, Any]]:
    """``modules`` (glm's name -> adapter) of ``model`` under the names of ``format``, and the ``adapter_config.json``
    for them.

    Raises:
        InputError: ``format`` cannot say it.
    """
    if format in ("vllm", "vllm-split", "llama.cpp"):
        _refuse(modules, config, format)
    named = vllm_format(model) if format == "vllm" else format
    if named == "chatglm" and model.config.sandwich_norm:
        raise InputError("save_adapter: the chatglm layout has no Glm4 models (it cannot express sandwich_norm); "
                         "save it as peft or vllm-split")  # fmt: skip
    if named == "peft":
        renamed, described = dict(modules), to_peft(config, base)
    elif named == "llama.cpp":
        renamed, described = _folded(modules, config, base)
    else:
        if named == "vllm-split":
            split = [_split_halves(name, each) for name, each in modules.items()]
            renamed = {name: low for halves in split for name, low in halves.items()}
        else:
            renamed = _to_chatglm(modules, config, _outputs(model))
        renamed, config = _uniform(renamed, config)
        saved = [_CHATGLM_SAVED[name] if named == "chatglm" else name for name in config.modules_to_save]
        described = _described(renamed, config, base, model) | {"modules_to_save": saved or None}
    if any(name.rpartition(".")[2] in _HALVES for name in renamed):
        described["task_type"] = FOR_VLLM_ONLY
    rank = max((low.spec.rank for low in renamed.values()), default=0)
    if format in ("vllm", "vllm-split") and rank > MAX_VLLM_RANK:
        raise InputError(f"save_adapter: vLLM does not load rank {rank}, {MAX_VLLM_RANK} is its largest; {MERGE}")
    return renamed, described


def vllm_format(model: Glm) -> str:
    """The format that vLLM reads for the base of ``model``. It sends Glm to its transformers backend, Glm4 and chatglm
    to code of its own (vLLM 0.32)."""
    if model.source is not None and model.source.layout == "chatglm":
        return "chatglm"
    return "vllm-split" if model.config.sandwich_norm else "peft"


def _refuse(modules: Mapping[str, Low], config: LoraConfig, format: str) -> None:
    unable = "llama.cpp does not convert" if format == "llama.cpp" else "vLLM does not load"
    if config.use_dora:
        raise InputError(f"save_adapter: {unable} DoRA; {MERGE}")
    if config.modules_to_save:
        raise InputError(f"save_adapter: {unable} modules_to_save; {MERGE}")
    if "lm_head" in modules and format != "llama.cpp":
        raise InputError(f"save_adapter: {unable} an adapter on lm_head; {MERGE}")


_CHATGLM_SAVED = {"embed_tokens": "word_embeddings", "lm_head": "output_layer"}


def chatglm_name(name: str) -> str:
    """The chatglm layout's name of a module; q, k and v keep theirs."""
    return _translated(name, _CHATGLM)


def glm_name(name: str) -> str:
    """The inverse of ``chatglm_name``."""
    return _translated(name, {theirs: ours for ours, theirs in _CHATGLM.items()})


def _translated(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def _split_halves(name: str, low: Low) -> dict[str, Low]:
    if not name.endswith("gate_up_proj"):
        return {name: low}
    halves = zip(_HALVES, np.split(low.b, 2), strict=True)
    return {name.replace("gate_up_proj", half): dataclasses.replace(low, b=b) for half, b in halves}


def _to_chatglm(modules: Mapping[str, Low], config: LoraConfig, outputs: Mapping[str, int]) -> dict[str, Low]:
    renamed: dict[str, Low] = {}
    for name, low in modules.items():
        parent, _, last = name.rpartition(".")
        if last not in _QKV:
            renamed[chatglm_name(name)] = low
            continue
        parts = [modules.get(f"{parent}.{each}") for each in _QKV]
        if config.use_dora and None in parts:
            raise InputError(
                "save_adapter: chatglm's query_key_value can have DoRA on all of q, k and v, this adapter has it on "
                f"{', '.join(each for each, part in zip(_QKV, parts, strict=True) if part)}; save format 'peft'"
            )
        fused = chatglm_name(parent).replace("self_attn", "self_attention") + ".query_key_value"
        renamed.setdefault(fused, fuse(parts, [outputs[each] for each in _QKV], config.use_rslora))
    return renamed


def fuse(parts: list[Low | None], outputs: list[int], rslora: bool) -> Low:
    """The adapter of modules whose outputs are concatenated; None is a part without one."""
    present = [part for part in parts if part is not None]
    first = present[0]
    magnitude = None
    if all(part.magnitude is not None for part in present):
        magnitude = np.concatenate([part.magnitude for part in present if part.magnitude is not None])
    if len(present) == len(parts) and all(
        part.spec == first.spec and np.array_equal(part.a, first.a) for part in present
    ):
        return Low(first.a, np.concatenate([part.b for part in present]), magnitude, first.spec)
    rank = sum(part.spec.rank for part in present)
    scale = next((part.spec.scale for part in present if part.spec.scale), 1.0)
    b, row, column = np.zeros((sum(outputs), rank), np.float32), 0, 0
    for part, rows in zip(parts, outputs, strict=True):
        if part is not None:
            factor = np.float32(part.spec.scale / scale)
            b[row : row + rows, column : column + part.spec.rank] = part.b * factor
            column += part.spec.rank
        row += rows
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    return Low(np.concatenate([part.a for part in present]), b, magnitude, Spec(rank, alpha, scale))


def _folded(modules: Mapping[str, Low], config: LoraConfig, base: str | None) -> tuple[dict[str, Low], dict[str, Any]]:
    if config.alpha == 0:
        raise InputError("save_adapter: format 'llama.cpp' divides by alpha, which is 0; save a merged model")
    folded = {}
    for name, low in modules.items():
        factor = low.spec.scale / (config.alpha / low.spec.rank)
        b = low.b if factor == 1 else (low.b * np.float32(factor)).astype(np.float32)
        folded[name] = dataclasses.replace(low, b=b)
    return folded, to_peft(dataclasses.replace(config, use_rslora=False, alpha_pattern=()), base)


def _uniform(modules: Mapping[str, Low], config: LoraConfig) -> tuple[dict[str, Low], LoraConfig]:
    """The same maps with one rank and one scale, alpha / rank: older vLLMs know ``r`` and ``lora_alpha`` only and drop
    the patterns, llama.cpp knows the rows of A and ``lora_alpha`` only.

    Ranks are filled up with zeros; the scale most modules have is everyone's, the others' B take the rest.
    """
    specs = [low.spec for low in modules.values()]
    scales = [spec.scale for spec in specs if spec.scale] or [0.0]
    rank, scale = max(spec.rank for spec in specs), max(scales, key=scales.count)
    spec = Spec(rank, scale * rank, scale)
    filled = {}
    for name, low in modules.items():
        more = rank - low.spec.rank
        b = low.b if low.spec.scale == scale else low.b * np.float32(low.spec.scale / scale)
        filled[name] = Low(np.pad(low.a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more))), low.magnitude, spec)
    uniform = {"rank": rank, "alpha": spec.alpha, "use_rslora": False, "rank_pattern": (), "alpha_pattern": ()}
    return filled, dataclasses.replace(config, **uniform)


def _outputs(model: Glm) -> dict[str, int]:
    return {name: getattr(model.layers.self_attn, name).kernel.shape[-1] for name in _QKV}


def _described(modules: Mapping[str, Low], config: LoraConfig, base: str | None, model: Glm) -> dict[str, Any]:
    """The ``adapter_config.json`` that selects exactly ``modules``, with their ranks and alphas."""
    groups: dict[str, dict[str, Spec]] = {}
    for name, low in modules.items():
        groups.setdefault(name.rpartition(".")[2], {})[name] = low.spec
    targets: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for last, specs in groups.items():
        layers = model.config.num_hidden_layers if ".layers." in next(iter(specs)) else 1
        targets += [last] if len(specs) == layers else specs
        for table, default, field in ((ranks, config.rank, "rank"), (alphas, config.alpha, "alpha")):
            values = {name: getattr(spec, field) for name, spec in specs.items()}
            if len({*values.values()}) > 1:
                table |= {re.escape(name): value for name, value in values.items() if value != default}
            elif default not in values.values():
                table[last] = next(iter(values.values()))
    number = {name: int(alpha) if alpha == int(alpha) else alpha for name, alpha in alphas.items()}
    return to_peft(config, base) | {
        "target_modules": targets, "exclude_modules": None, "layers_to_transform": None, "rank_pattern": ranks,
        "alpha_pattern": number,
    }  # fmt: skip


def dialect(names: list[str]) -> str:
    """The format that tensor names are in; llama.cpp's names are peft's."""
    if any(".transformer.encoder." in name or ".transformer.output_layer." in name for name in names):
        return "chatglm"
    return "vllm-split" if any(re.search(r"\.mlp\.(gate|up)_proj\.", name) for name in names) else "peft"


def to_native(
    raw: Mapping[str, Any], file: Path, names: list[str], read: Callable[[str, Spec], Low], model: Glm
) -> tuple[dict[str, Low], LoraConfig]:
    """An adapter of the chatglm or vllm-split dialect in glm's names.

    Args:
        raw: the content of ``file``, its adapter_config.json.
        names: its modules, without the prefix.
        read: the adapter of one of them.
        model: the base it is for.

    Raises:
        InputError: the configuration does not fit ``names``.
    """
    theirs = from_peft(raw, file, _Foreign, names)
    lows: dict[str, Low] = {}
    for name in names:
        spec = theirs.spec_of(name)
        if spec is None:
            raise InputError(f"{file}: target_modules does not select {name}, which the weights adapt")
        lows[name] = read(name, spec)
    outputs = _outputs(model)
    native: dict[str, Low] = {}
    for name, low in lows.items():
        parent, _, last = name.rpartition(".")
        if last == "query_key_value":
            rows = np.cumsum([outputs[each] for each in _QKV])[:-1]
            parent = parent.replace("self_attention", "self_attn").replace("transformer.encoder.", "model.")
            magnitudes = [None] * 3 if low.magnitude is None else np.split(low.magnitude, rows)
            for each, b, magnitude in zip(_QKV, np.split(low.b, rows), magnitudes, strict=True):
                native[f"{parent}.{each}"] = dataclasses.replace(low, b=b, magnitude=magnitude)
        elif last in _HALVES:
            whole = [lows.get(f"{parent}.{half}") for half in _HALVES]
            size = next(part.b.shape[0] for part in whole if part is not None)
            if theirs.use_dora and None in whole:
                raise InputError(f"{file}: DoRA on {last} alone cannot be said of the fused gate_up_proj")
            native.setdefault(f"{parent}.gate_up_proj", fuse(whole, [size, size], theirs.use_rslora))
        else:
            native[glm_name(name)] = low
    common = LoraConfig(rank=theirs.rank, alpha=theirs.alpha, dropout=theirs.dropout, use_rslora=theirs.use_rslora,
                        use_dora=theirs.use_dora)  # fmt: skip
    saved = {theirs: ours for ours, theirs in _CHATGLM_SAVED.items()}
    described = _described(native, common, None, model) | {
        "modules_to_save": [saved.get(name, name) for name in theirs.modules_to_save]
    }
    return native, from_peft(described, file)
