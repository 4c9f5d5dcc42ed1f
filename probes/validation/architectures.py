"""Which causal architectures of the installed transformers are scored as they answer: each built tiny and tried.

``python -P -m probes.validation.architectures --docs docs/architectures.md`` writes the table. A tiny model has random
weights and two layers or so; its scores by the engine are compared with a plain call of the model on token ids (no
mask, no packing, no embeddings, no cache), in fp32 and bf16, and an erased clause has to move the label.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from probes.errors import ProbeError, ProbeInputError
from probes.files import write_text
from probes.foreign import plain
from probes.models.trial import BOUND, HALF_BOUND, stretches
from probes.probe import Probe
from probes.records import Example
from probes.saliency.settings import Settings

DTYPES = ("float32", "bfloat16")
MOST = 3_000_000  # parameters: more is not tiny, so a size of this configuration is not known here
# What makes a model small, by the names that configurations use. Those that one does not have are left out.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "n_embed", "embedding_size", "word_embed_proj_dim",
                     "emb_dim", "lru_width", "dim_model", "embedding_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dff",
                     "ffn_hidden_size", "intermediate_size_mlp", "dim_ff", "shared_expert_intermediate_size",
                     "expert_ffn_hidden_size", "mamba_d_ssm"), 64),
    **dict.fromkeys(("moe_intermediate_size", "moe_shared_expert_intermediate_size", "ffn_config_hidden",
                     "shared_intermediate_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "attention_num_kv_heads"), 2),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
                     "encoder_layers"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "swa_head_dim",
                     "global_head_dim", "swa_v_head_dim", "attention_head_dim", "kv_channels", "dim_head",
                     "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "rotary_dim",
                     "hidden_size_per_layer_input", "mamba_d_head", "mamba_head_dim", "state_size",
                     "mamba_d_state", "ssm_state_size", "qk_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
                     "moe_num_primary_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts"), 2),
    "index_topk": 512,
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "first_k_dense_replace",
                     "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_expert_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_dt_rank", "time_step_rank", "laurel_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_key_heads",
                     "linear_num_value_heads"), 8),
    **dict.fromkeys(("linear_num_heads", "index_n_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), 512),
    **dict.fromkeys(("pad_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), 16),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "attention_chunk_size"), 16),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout"), 0.0),
    **dict.fromkeys(("is_decoder", "is_causal"), True),
    **dict.fromkeys(("num_nextn_predict_layers", "num_kv_shared_layers"), 0),
    **dict.fromkeys(("add_cross_attention", "use_cross_attention"), False),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_mamba_kernels": False,
    "tie_word_embeddings": False,
}  # fmt: skip
_LATENT = {"num_key_value_heads": 4, "qk_head_dim": 16}
# Sizes that hang together in ways no name tells.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "longcat_flash": {"num_layers": 1, "num_hidden_layers": 2, "head_dim": 8, "qk_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {"altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": 64},
    "xlm": {"causal": True, "emb_dim": 32},
    "reformer": {"axial_pos_embds": False},
}


@dataclass(frozen=True)
class Survey:
    """What came of one architecture.

    Attributes:
        name: ``model_type``; model: its class.
        outcome: scored | refused | not built.
        said: the reason of what was refused or not built; of what is scored, how.
        gaps: for each dtype the largest difference, in nats, of a label's log-odds or a stretch's log p from a plain
            call of the model.
        effect: nats that hiding the post's clauses moves the label at most, for each dtype.
    """

    name: str
    model: str
    outcome: str
    said: str
    gaps: dict[str, float]
    effect: dict[str, float]


def known() -> dict[str, str]:
    """``model_type`` -> class of every causal language model of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(name: str, vocabulary: int) -> Any:
    """A model of this type with random weights, float32, evaluation mode.

    Raises:
        ProbeError: it cannot be made tiny by the sizes known here, with transformers' own words.
    """
    import transformers

    try:
        with _quiet():
            kind = type(transformers.AutoConfig.for_model(name))
            names = set(kind().to_dict())
            if inner := [one for one in ("text_config", "decoder_config", "decoder") if one in names]:
                raise ValueError(f"its configuration holds others ({inner[0]}): not a model of text alone")
            given = {key: value for key, value in _SIZES.items() if key in names or key == "pad_token_id"}
            if "kv_lora_rank" in names:  # latent attention: as many key heads as query heads, of two parts
                given |= {key: value for key, value in _LATENT.items() if key in names}
            given |= {key: vocabulary for key in ("vocab_size", "vocab_size_per_layer_input") if key in names}
            given |= _kinds_of_layers(kind().to_dict())
            config = kind(**(given | _OWN.get(name, {})))
            with torch.device("meta"):
                size = sum(one.numel() for one in _of(config).parameters())
            if size > MOST:
                raise ValueError(f"{size:,} parameters with the sizes known here")
            torch.manual_seed(0)
            model = _of(config).float().eval()
            model(input_ids=torch.tensor([[3, 4, 5]]))
    except Exception as error:  # the library's own code, whatever it raises for sizes it does not like
        raise ProbeError(
            f"{name}: {plain(str(error).strip().split(chr(10))[0] or type(error).__name__, 160)}"
        ) from error
    with torch.no_grad():  # some start with matrices so small that nothing would matter
        for weight in model.parameters():
            if (weight.ndim >= 2 and not float(weight.std()) >= 0.1) or not bool(weight.any()):
                weight.normal_(std=0.2)
    return model


def _of(config: Any) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _kinds_of_layers(usual: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind that the default configuration has, as its lists of one item per layer tell them."""
    key = next((one for one in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if one in usual), "")
    count = usual.get(key)
    lists = {name: one for name, one in usual.items() if isinstance(one, list) and len(one) == count}
    if not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=True))
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    first = sorted([*first, *first] if len(first) == 1 else first)
    return {key: len(first), **{name: [one[at] for at in first] for name, one in lists.items()}}


@contextmanager
def _quiet() -> Iterator[None]:
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)


def survey(name: str, row: dict[str, Any], tokenizer: Any, dtypes: Sequence[str] = DTYPES) -> Survey:
    """Builds one architecture and tries it.

    Args:
        row: of generations.jsonl, with label, rivals and explanation. tokenizer: any small one.
    Returns:
        what was found; a model whose own answer is not what is scored is no ``Survey`` but an error.
    Raises:
        ProbeError: it was taken, and its scores are not its own, or an erased clause does nothing.
    """
    shown = known()[name]
    gaps: dict[str, float] = {}
    effects: dict[str, float] = {}
    how: list[str] = []
    try:
        built = tiny(name, len(tokenizer))
    except ProbeError as error:
        return Survey(name, shown, "not built", str(error).partition(": ")[2], {}, {})
    for dtype in dtypes:
        probe = Probe(built.to(getattr(torch, dtype)), tokenizer, f"tiny {name}")
        example = probe.encode(row)
        try:
            with _quiet():
                gaps[dtype], effects[dtype] = _compare(probe, example)
        except ProbeInputError as error:
            if type(probe.model).__name__ not in str(error):
                raise ProbeError(f"{name}: the refusal does not name the model: {error}") from error
            why = str(error).partition("cannot be probed here: ")[2].partition(". Every map")[0]
            how.append(f"{dtype}: refused: {why}")
            continue
        bound = BOUND.get(getattr(torch, dtype), HALF_BOUND)
        if not gaps[dtype] <= bound:
            raise ProbeError(f"{name}, {dtype}: scores and a plain call differ by {gaps[dtype]:.2g} nats")
        if not effects[dtype] > 0.01:
            raise ProbeError(f"{name}, {dtype}: erasing the post moves the label by {effects[dtype]:.2g} nats only")
        tried = probe.scorer.tried
        assert tried is not None
        can = tried.can
        prefix = f"prefix run every time ({can.unkept})" if can.unkept else "prefix kept"
        limits = [said.partition(":")[0] for said in can.limits.values()]  # without why: it differs with the weights
        way = ["packed" if can.packs else "one sequence at a time", prefix, *limits]
        how.append(f"{dtype}: {', '.join(way)}")
    if not gaps:
        return Survey(
            name, shown, "refused", how[0].partition("refused: ")[2].partition(" (It seems")[0], gaps, effects
        )
    same = {one.partition(": ")[2] for one in how}
    return Survey(name, shown, "scored", same.pop() if len(same) == 1 else ". ".join(how), gaps, effects)


def _compare(probe: Probe, example: Example) -> tuple[float, float]:
    """Largest difference from a plain call over label and stretches of the explanation, and what erasing does."""
    from probes.saliency.attribute import attribute

    targets = ("label", *stretches(example))
    forward = probe.scorer.forward(example, targets)
    found = forward.kept(torch.ones(1, len(forward.post), dtype=torch.bool))[0].double()
    start, own, others, _ = probe.scorer.label_ids(example)
    head = list(example.ids[:start])
    rivals = torch.tensor([plain_logp(probe, [*head, *ids], [(start, len(head) + len(ids))])[0] for ids in others])
    wanted = [plain_logp(probe, [*head, *own], [(start, start + len(own))])[0] - float(rivals.logsumexp(0))]
    segment = example.segment("explanation")
    assert segment is not None
    at = segment.char[0]
    places = [tuple(map(int, one.removeprefix("explanation[").removesuffix("]").split(":"))) for one in targets[1:]]
    spans = [example.tokens_of((at + a, at + b), within=segment.tok) for a, b in places]
    wanted += plain_logp(probe, list(example.ids[: segment.tok[1]]), spans)
    gap = float((found - torch.tensor(wanted, dtype=torch.float64)).abs().max())
    erased = attribute(probe, example, ("erase",), ("label",), Settings(max_units=4))[0]
    effect = max(map(abs, erased.values.tolist()))
    return gap, effect if math.isfinite(effect) else 0.0


def plain_logp(probe: Probe, ids: list[int], spans: Sequence[tuple[int, int]]) -> list[float]:
    """Log p of each token range of ``ids``, by the model alone, called as anybody would."""
    with torch.no_grad():
        logits = probe.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [float(sum(logits[at - 1, ids[at]] for at in range(a, b))) for a, b in spans]


def asked() -> tuple[dict[str, Any], Any]:
    """The row that every architecture is tried on, and its tokenizer."""
    from probes.validation.planted import World, make_tokenizer

    tokenizer = make_tokenizer(World(language="words"))
    post = "again walked home. worthless today, garden letter! music then."
    labels = {"high": " risk high.", "low": " risk low.", "none": " risk none."}
    said = ' since "worthless today", and nobody called.'
    return {
        "id": "a",
        "post": post,
        "prompt_ids": tokenizer(f"[gMASK]<sop><|user|>read this. post: {post} risk?<|assistant|>")["input_ids"],
        "output_ids": [*tokenizer(labels["high"] + said)["input_ids"], tokenizer.eos_token_id],
        "parsed_label": "high",
        "label_text": labels["high"],
        "parsed_explanation": said,
        "candidates": labels,
    }, tokenizer


def page(found: Sequence[Survey], failed: Sequence[str] = ()) -> str:
    """The table as a Markdown page, with the command and the versions that made it."""
    libraries = ", ".join(f"{one} {importlib.metadata.version(one)}" for one in ("torch", "transformers"))
    versions = f"Python {platform.python_version()}, {libraries}"
    counts = {one: sum(row.outcome == one for row in found) for one in ("scored", "refused", "not built")}
    lines = [
        "# Architectures",
        "",
        f"Written by `python -P -m probes.validation.architectures --docs docs/architectures.md` ({versions}).",
        "",
        f"Every causal language model of transformers, built with random weights as small as its configuration allows. "
        f"{counts['scored']} are scored, {counts['refused']} are refused by name before the first post. Of the rest "
        f"{counts['not built']} could not be built by sizes that this page knows: most hold a vision or audio "
        f"tower, or an encoder. {len(failed)} failed{': ' + ', '.join(failed) if failed else ''}.",
        "",
        "*Difference* is the largest between what is scored and a plain call of the model on token ids (no mask, no",
        "packing, no embeddings, no cache), in nats. It is of the label's log-odds, and of log p of each ten tokens of",
        f"the explanation. It may be {BOUND[torch.float32]:g} in float32 and {HALF_BOUND:g} in bfloat16. *Effect* is",
        "the most that hiding a clause (or cutting it out) moves the label.",
        "",
        "Your model may have other sizes than these: it is tried in the same way before the first post of every run.",
        "",
        "| model type | class | how it is scored | difference, fp32 | bf16 | effect, nats |",
        "|---|---|---|--:|--:|--:|",
    ]
    for one in sorted(found, key=lambda row: (("scored", "refused", "not built").index(row.outcome), row.name)):
        if one.outcome == "not built":
            continue
        gaps = [f"{one.gaps[name]:.0e}" if name in one.gaps else "" for name in DTYPES]
        effect = f"{min(one.effect.values()):.2g}" if one.effect else ""
        said = f"refused: {one.said}" if one.outcome == "refused" else one.said
        lines.append(f"| {one.name} | {one.model} | {said.replace('|', ' ')} | {gaps[0]} | {gaps[1]} | {effect} |")
    names = ", ".join(sorted(row.name for row in found if row.outcome == "not built"))
    return "\n".join([*lines, "", f"Not built:\n\n```text\n{names}\n```" if names else ""]).rstrip() + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Surveys the named architectures, or all; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="model types; all without")
    parser.add_argument("--docs", type=Path, help="the Markdown page to write")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)  # nothing here is large enough for two
    row, tokenizer = asked()
    found: list[Survey] = []
    failed: list[str] = []
    for name in given.names or known():
        try:
            found.append(survey(name, row, tokenizer))
            line = f"{name}: {found[-1].outcome}: {found[-1].said}"
        except Exception as error:  # the table is of all of them, and this one is named in it
            failed.append(name)
            line = f"{name}: FAILED: {error}"
        sys.stderr.write(f"{line}\n")
    text = page(found, failed)
    if given.docs is not None:
        write_text(given.docs, text)
    else:
        sys.stdout.write(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
