"""The same adapter under other names: what vLLM, llama.cpp and the chatglm layout call and fuse differently.

    peft        GLM's own modules: q_proj, k_proj, v_proj, o_proj, gate_up_proj, down_proj
    vllm        what vLLM reads for the base at hand: peft for Glm, vllm-split for Glm4, chatglm for the chatglm layout
    vllm-split  gate_up_proj in its halves gate_proj and up_proj (the same A, the rows of B), for vLLM's own GLM code;
                one rank and one scale for all, as older readers drop rank_pattern and alpha_pattern
    llama.cpp   as peft with every factor s folded into B: convert_lora_to_gguf knows alpha / rank only
    chatglm     names of the remote-code layout, q, k and v as one query_key_value; one rank and one scale for all

Of a relative (``model.relatives``) every format has the names and the row order of its own family: gate_proj and
up_proj apart, B of q and k with the rotary pairs half-split; nested names in glm4v. What a format fuses or splits is
exact, see ``adapter_rows``.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mentalglm_jax.checkpoints.adapter_rows import Low, fuse, halves, reordered
from mentalglm_jax.checkpoints.peft_config import from_peft, to_peft
from mentalglm_jax.checkpoints.rows import half_split, interleaved
from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import some
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.model.lora import EMBEDDING, SAVABLE, TARGETS, LoraConfig, Spec, linears, module_names
from mentalglm_jax.model.relatives import RELATIVES, VISION

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
_ROTARY = ("q_proj", "k_proj")
_HALVES = ("gate_proj", "up_proj")
_TOWER = r"model\.visual\..*"
_NESTED = partial(re.sub, r"^model\.", "model.language_model.")
_FLAT = partial(re.sub, r"^model\.language_model\.", "model.")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model was read: its absolute directory or Hub id, and the layout of the files there."""

    name: str
    layout: str


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
    family = model.config.family
    if family in VISION:
        if format != "peft":
            raise InputError(f"save_adapter: what else than PEFT reads of a {family} adapter is not known; save format "
                             "'peft' or a merged model")  # fmt: skip
        renamed = {_NESTED(name): low for name, low in modules.items()}
        # Names like down_proj are in the vision tower too.
        described = _described(renamed, config, base, model) | {"exclude_modules": _TOWER}
        return renamed, described
    if format in ("vllm", "vllm-split", "llama.cpp"):
        _refuse(modules, config, format)
    if family in RELATIVES:
        renamed, described = _in_halves(modules, config, base, format, model)
        _refuse_rank(renamed, format)
        return renamed, described
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
            renamed = _split(modules, config.use_rslora)
        else:
            renamed = _to_chatglm(modules, config, _outputs(model))
        renamed, config = _uniform(renamed, config)
        saved = [_CHATGLM_SAVED[name] if named == "chatglm" else name for name in config.modules_to_save]
        described = _described(renamed, config, base, model) | {"modules_to_save": saved or None}
    if any(name.rpartition(".")[2] in _HALVES for name in renamed):
        described["task_type"] = FOR_VLLM_ONLY
    _refuse_rank(renamed, format)
    return renamed, described


def _in_halves(
    modules: Mapping[str, Low], config: LoraConfig, base: str | None, format: str, model: Glm
) -> tuple[dict[str, Low], dict[str, Any]]:
    """``formatted`` for llama and its kin."""
    if format == "chatglm":
        raise InputError(f"save_adapter: the chatglm layout has no {model.config.family} models; save it as peft")
    order = partial(half_split, head=model.config.head_dim)
    own = {name: reordered(low, order) if name.endswith(_ROTARY) else low for name, low in modules.items()}
    renamed = _split(own, config.use_rslora)
    if format == "llama.cpp":
        renamed = _fold(renamed, config)
        config = dataclasses.replace(config, use_rslora=False, alpha_pattern=())
    elif format != "peft":
        renamed, config = _uniform(renamed, config)
    return renamed, _described(renamed, config, base, model)


def _refuse_rank(modules: Mapping[str, Low], format: str) -> None:
    rank = max((low.spec.rank for low in modules.values()), default=0)
    if format in ("vllm", "vllm-split") and rank > MAX_VLLM_RANK:
        raise InputError(f"save_adapter: vLLM does not load rank {rank}, {MAX_VLLM_RANK} is its largest; {MERGE}")


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


def saved_name(name: str, format: str, model: Glm) -> str:
    """The name that a weight which is saved whole has in ``format``."""
    return chatglm_name(name) if format == "chatglm" else _NESTED(name) if model.config.family in VISION else name


def glm_name(name: str) -> str:
    """The inverse of ``chatglm_name``."""
    return _translated(name, {theirs: ours for ours, theirs in _CHATGLM.items()})


def _translated(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def _split(modules: Mapping[str, Low], rslora: bool) -> dict[str, Low]:
    """``modules`` with gate_up_proj in its halves."""
    split: dict[str, Low] = {}
    for name, low in modules.items():
        if not name.endswith("gate_up_proj"):
            split[name] = low
            continue
        for half, part in zip(_HALVES, halves(low, rslora), strict=True):
            if part is not None:
                split[name.replace("gate_up_proj", half)] = part
    return split


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
        renamed.setdefault(_fused(parent), fuse(parts, [outputs[each] for each in _QKV], config.use_rslora))
    return renamed


def _folded(modules: Mapping[str, Low], config: LoraConfig, base: str | None) -> tuple[dict[str, Low], dict[str, Any]]:
    return _fold(modules, config), to_peft(dataclasses.replace(config, use_rslora=False, alpha_pattern=()), base)


def _fold(modules: Mapping[str, Low], config: LoraConfig) -> dict[str, Low]:
    if config.alpha == 0:
        raise InputError("save_adapter: format 'llama.cpp' divides by alpha, which is 0; save a merged model")
    folded = {}
    for name, low in modules.items():
        spec = Spec(low.spec.rank, config.alpha, config.alpha / low.spec.rank)
        factor = low.spec.scale / spec.scale
        b = low.b if factor == 1 else (low.b * np.float32(factor)).astype(np.float32)
        folded[name] = dataclasses.replace(low, b=b, spec=spec)
    return folded


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


def dialect(names: list[str], family: str = "glm") -> str:
    """The format that tensor names of an adapter for a model of ``family`` are in; llama.cpp's names are peft's."""
    if any(".transformer.encoder." in name or ".transformer.output_layer." in name for name in names):
        return "chatglm"
    if family in VISION or any(".model.language_model." in name for name in names):
        return "glm4v"
    if family in RELATIVES:
        return "llama"
    return "vllm-split" if any(re.search(r"\.mlp\.(gate|up)_proj\.", name) for name in names) else "peft"


def native_name(name: str, spoken: str) -> str:
    """glm's name of a module or of a weight that is saved whole, of a dialect."""
    return _FLAT(name) if spoken == "glm4v" else glm_name(name)


def check_layout(model: Glm, raw: Mapping[str, Any], names: list[str], ours: bool, file: Path) -> None:
    """Refuses an adapter that was trained on the base in another layout, as far as names tell: there, rows of q and k
    stand in another order.

    Args:
        raw: the content of ``file``, its adapter_config.json.
        names: its tensors.
        ours: whether it says what base it is for, which is checked elsewhere.

    Raises:
        InputError: it was.
    """
    if not any(".layers." in name for name in names):
        return
    spoken, family = dialect(names), model.config.family
    apart = spoken == "vllm-split" and raw.get("task_type") != FOR_VLLM_ONLY
    if spoken == "peft" and any(".gate_up_proj." in name for name in names):
        spoken = "glm"
    home = {"chatglm": "chatglm", "glm4v": "glm4v", "glm": "glm", "vllm-split": "llama"}.get(spoken)
    fits = {**dict.fromkeys(RELATIVES, ("llama", None)), **dict.fromkeys(VISION, ("glm4v",))}
    wrong = home not in fits[family] if family in fits else home == "glm4v" or (
        # Without the mark they are a relative's own, or old halves for vLLM of a model that is none.
        apart and not ours and model.config.partial_rotary_factor == 1.0 and not model.config.sandwich_norm
    )  # fmt: skip
    if wrong:
        raise InputError(
            f"{file}: its modules are named as in a {home or 'glm or llama'} directory, this base is in the {family} "
            f"layout, where names and rows are others; load the base in the layout that the adapter was trained on"
        )


def _modules(model: Glm, spoken: str) -> dict[str, tuple[int, int]]:
    """Every module of ``model`` that can be adapted, under the names of a dialect: inputs and outputs."""
    found: dict[str, tuple[int, int]] = {}
    for path, linear in linears(model):
        *_, inputs, outputs = linear.kernel.shape
        for name in module_names(path, model.config.num_hidden_layers):
            parent, _, last = name.rpartition(".")
            if last == "gate_up_proj" and spoken in ("llama", "vllm-split"):
                found |= {f"{parent}.{half}": (inputs, outputs // 2) for half in _HALVES}
            elif spoken == "chatglm" and last in _QKV:
                fused = _fused(parent)
                found[fused] = inputs, outputs + found.get(fused, (0, 0))[1]
            else:
                found[_NESTED(name) if spoken == "glm4v" else chatglm_name(name) if spoken == "chatglm" else name] = (
                    inputs, outputs)  # fmt: skip
    return found


def _fused(parent: str) -> str:
    return chatglm_name(parent).replace("self_attn", "self_attention") + ".query_key_value"


def to_native(
    raw: Mapping[str, Any], file: Path, names: list[str], read: Callable[[str, Spec], Low], model: Glm, spoken: str
) -> tuple[dict[str, Low], LoraConfig]:
    """An adapter of another dialect in glm's names and row order.

    Args:
        raw: the content of ``file``, its adapter_config.json.
        names: its modules, without the prefix.
        read: the adapter of one of them.
        model: the base it is for.
        spoken: what ``dialect`` says of it.

    Raises:
        InputError: the configuration does not fit ``names``, or an adapter not its module.
    """
    here = _modules(model, spoken)
    theirs = from_peft(raw, file, _Foreign, [*here, _NESTED(EMBEDDING) if spoken == "glm4v" else EMBEDDING])
    if tower := [name for name in names if re.match(_TOWER, name)]:
        raise InputError(f"{file}: adapts the vision tower ({some(tower)}), which is not run here; merge it with PEFT")
    if strange := [name for name in names if name not in here]:
        raise InputError(f"{file}: {len(strange)} of the modules that the weights adapt are not in this model: "
                         f"{some(strange)}")  # fmt: skip
    lows: dict[str, Low] = {}
    for name in names:
        spec = theirs.spec_of(name)
        if spec is None:
            raise InputError(f"{file}: target_modules does not select {name}, which the weights adapt")
        low = lows[name] = read(name, spec)
        inputs, outputs = here[name]
        if (low.a.shape[1], low.b.shape[0]) != (inputs, outputs):
            raise InputError(
                f"{file}: {name} has A {list(low.a.shape)} and B {list(low.b.shape)} instead of "
                f"[{spec.rank}, {inputs}] and [{outputs}, {spec.rank}]; was it trained on another base?"
            )
        if theirs.use_dora and (low.magnitude is None or low.magnitude.shape != (outputs,)):
            raise InputError(f"{file}: {name} has no lora_magnitude_vector [{outputs}], which use_dora needs")
    if missing := [name for name in here if name not in lows and theirs.spec_of(name) is not None]:
        raise InputError(f"{file}: selects {len(missing)} modules that the weights do not adapt: {some(missing)}")
    outputs_of = _outputs(model)
    order = partial(interleaved, head=model.config.head_dim)
    native: dict[str, Low] = {}
    for name, low in lows.items():
        parent, _, last = name.rpartition(".")
        if last == "query_key_value":
            rows = np.cumsum([outputs_of[each] for each in _QKV])[:-1]
            parent = parent.replace("self_attention", "self_attn").replace("transformer.encoder.", "model.")
            magnitudes = [None] * 3 if low.magnitude is None else np.split(low.magnitude, rows)
            for each, b, magnitude in zip(_QKV, np.split(low.b, rows), magnitudes, strict=True):
                native[f"{parent}.{each}"] = dataclasses.replace(low, b=b, magnitude=magnitude)
        elif last in _HALVES:
            whole = [lows.get(f"{parent}.{half}") for half in _HALVES]
            size = low.b.shape[0]
            if theirs.use_dora and None in whole:
                raise InputError(f"{file}: DoRA on {last} alone cannot be said of the fused gate_up_proj")
            native.setdefault(f"{parent}.gate_up_proj", fuse(whole, [size, size], theirs.use_rslora))
        elif spoken == "llama" and last in _ROTARY:
            native[name] = reordered(low, order)
        else:
            native[native_name(name, spoken)] = low
    common = LoraConfig(rank=theirs.rank, alpha=theirs.alpha, dropout=theirs.dropout, use_rslora=theirs.use_rslora,
                        use_dora=theirs.use_dora)  # fmt: skip
    saved = {theirs: ours for ours, theirs in _CHATGLM_SAVED.items()}
    described = _described(native, common, None, model) | {
        "modules_to_save": [saved.get(name, name) for name in theirs.modules_to_save]
    }
    return native, from_peft(described, file)
