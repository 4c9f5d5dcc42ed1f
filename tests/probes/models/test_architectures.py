"""Tiny random models of many architectures: what is scored is what the model answers, and what cannot be had is not.

Each is compared with a plain call of transformers on token ids (no mask, no packing, no embeddings), in fp32 and bf16.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from probes.checks.behaviour import _generate, weight_of_evidence
from probes.citations.clauses import clause_tokens
from probes.errors import ProbeInputError
from probes.probe import Probe
from probes.records import Example
from probes.saliency.attribute import Settings, attribute
from probes.saliency.settings import NEED_GRADIENTS
from probes.suite import BUDGETS, run_suite
from tests.probes.tiny import make_row

_BASE: dict[str, Any] = {
    "vocab_size": 380,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WIDE: dict[str, Any] = {**_BASE, "intermediate_size": 64, "num_key_value_heads": 2}
_HEAD: dict[str, Any] = {**_WIDE, "head_dim": 8}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MAMBA: dict[str, Any] = {"vocab_size": 380, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
_ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "glm": ("Glm", _HEAD),
    "glm4": ("Glm4", _HEAD),
    "llama": ("Llama", _WIDE),
    "qwen2": ("Qwen2", _WIDE),
    "qwen3": ("Qwen3", _HEAD),
    "qwen3_moe": ("Qwen3Moe", {**_HEAD, **_MOE, "num_experts": 4}),
    "mixtral": ("Mixtral", {**_WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mistral window": ("Mistral", {**_WIDE, "sliding_window": 16}),
    "gemma2 window": ("Gemma2", {**_HEAD, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3 window": ("Gemma3Text", {**_HEAD, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "phi": ("Phi", _WIDE),
    "olmo2": ("Olmo2", _WIDE),
    "granite": ("Granite", _WIDE),
    "gpt2": ("GPT2", {"vocab_size": 380, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2, **_ENDS}),
    "gpt_neox": ("GPTNeoX", {**_BASE, "intermediate_size": 64}),
    "opt": ("OPT", {**_BASE, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": (
        "Bloom", {"vocab_size": 380, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2, **_ENDS}
    ),
    "falcon alibi": ("Falcon", {**_BASE, "alibi": True, "new_decoder_architecture": False, "multi_query": True}),
    "mpt": ("Mpt", {"vocab_size": 380, "d_model": 32, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2, **_ENDS}),
    "mamba": ("Mamba", {**_MAMBA, **_ENDS}),
    "mamba2": ("Mamba2", {**_MAMBA, **_ENDS, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}),
    "rwkv": ("Rwkv", {"vocab_size": 380, "hidden_size": 32, "num_hidden_layers": 2, **_ENDS}),
    "recurrent_gemma": (
        "RecurrentGemma", {**_HEAD, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16}
    ),
    "gemma3n": (
        "Gemma3nText",
        {**_HEAD, "vocab_size_per_layer_input": 380, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
         "laurel_rank": 4, "altup_num_inputs": 2, "num_hidden_layers": 2, "activation_sparsity_pattern": [0.0, 0.0],
         "layer_types": ["full_attention", "full_attention"], "intermediate_size": [64, 64]},
    ),
    "gemma4": (
        "Gemma4Text",
        {**_HEAD, "vocab_size_per_layer_input": 380, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
         "layer_types": ["full_attention", "full_attention"], "global_head_dim": 8},
    ),
    "jamba": ("Jamba", {**_WIDE, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2,
                        "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 4}),
    "falcon_h1": ("FalconH1", {**_HEAD, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
                               "mamba_n_groups": 1, "mamba_chunk_size": 16}),
    "lfm2": ("Lfm2", {**_WIDE, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
}  # fmt: skip
# What is done otherwise (``Abilities.limits``), and why, as the user reads it.
LIMITED = {
    "rwkv": {"masks": "a token hidden by the attention mask still moves the log-odds"},
    "recurrent_gemma": {"masks": "a token hidden by the attention mask still moves the log-odds"},
    "gemma3n": {"gradients": "it looks at the ids as well"},
    "gemma4": {"gradients": "it cannot be scored from embeddings"},
}

# Whose prefix is run in every pass: states instead of tokens in the cache, by name.
UNKEPT = {
    "mamba": "it gives no past_key_values",
    "mamba2": "it gives no past_key_values",
    "rwkv": "it gives no past_key_values",
    "recurrent_gemma": "it gives no past_key_values",
    "jamba": "its cache holds LinearAttentionLayer",
    "falcon_h1": "its cache holds LinearAttentionAndFullAttentionLayer",
    "lfm2": "its cache holds LinearAttentionLayer",
}


def make(name: str, dtype: torch.dtype, tokenizer: Any) -> Probe:
    kind, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # some start with matrices so small that nothing would matter
        for weight in model.parameters():
            if (weight.ndim >= 2 and float(weight.std()) < 0.1) or not bool(weight.any()):
                weight.normal_(std=0.2)
    return Probe(model.to(dtype).eval(), tokenizer, f"tiny {name}")


def plain(probe: Probe, ids: list[int], start: int, mask: torch.Tensor | None = None) -> float:
    """Log p of ``ids[start:]``, by the model alone."""
    seen = {} if mask is None else {"attention_mask": mask[None].long()}
    with torch.no_grad():
        logits = probe.model(input_ids=torch.tensor([ids]), **seen).logits[0].float().log_softmax(-1)
    return float(sum(logits[at - 1, ids[at]] for at in range(start, len(ids))))


def without(probe: Probe, example: Example, erased: set[int]) -> float:
    """Log-odds of the label by the model alone, without some tokens of the row: hidden, or not there at all where it
    cannot hide any."""
    start, own, others, _ = probe.scorer.label_ids(example)

    def logp(label: list[int]) -> float:
        ids = [*example.ids[:start], *label]
        left = [at for at in range(len(ids)) if at not in erased]
        if "masks" in probe.scorer.can.limits:
            return plain(probe, [ids[at] for at in left], start - len(erased))
        mask = torch.zeros(len(ids), dtype=torch.bool)
        mask[left] = True
        return plain(probe, ids, start, mask if erased else None)

    return logp(own) - float(np.logaddexp.reduce([logp(label) for label in others]))


@pytest.fixture(scope="module")
def row(tokenizer: Any) -> dict[str, Any]:
    post = "I fed the dog, it rained. I can't see a way out any more... Work starts at 9.30."
    return make_row(tokenizer, 0, "en", post, "I can't see a way out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_the_models_own(name: str, dtype: torch.dtype, tokenizer: Any, row: dict[str, Any]) -> None:
    probe = make(name, dtype, tokenizer)
    example = probe.encode(row)
    forward = probe.scorer.forward(example, ("label", "explanation"))
    tried = probe.scorer.tried
    assert tried is not None and (forward.prefix is None) == bool(tried.can.unkept)
    limits, known = tried.can.limits, LIMITED.get(name, {})
    assert limits.keys() == known.keys() and all(why in limits[kind] for kind, why in known.items())
    if name in UNKEPT:
        assert tried.can.unkept == UNKEPT[name]
    elif dtype == torch.float32:  # in half precision rounding alone may be beyond the bound
        assert tried.can.unkept == "" and tried.gaps["prefix kept"] <= 3e-5
    found = forward.kept(torch.ones(1, len(forward.ids), dtype=torch.bool))[0]
    said = example.segment("explanation")
    assert said is not None
    bound = 0.05 if dtype == torch.bfloat16 else 1e-4 if name in LIMITED else 1e-3
    assert float(found[0]) == pytest.approx(without(probe, example, set()), abs=bound)
    # the explanation has ten times the tokens of the label
    assert float(found[1]) == pytest.approx(plain(probe, list(example.ids[: said.tok[1]]), said.tok[0]), abs=10 * bound)
    erased = attribute(probe, example, ("erase",), ("label",), Settings(max_units=4))[0]
    assert np.isfinite(erased.values).all() and np.abs(erased.values).max() > 1e-4
    assert erased.baseline == erased.params["eraser"] == ("cut" if "masks" in limits else "attention")


@pytest.mark.parametrize("name", LIMITED)
def test_what_is_erased_otherwise_is_erased_right(name: str, tokenizer: Any, row: dict[str, Any]) -> None:
    """Each clause, by the model alone; all at once in one batch, of as many lengths."""
    probe = make(name, torch.float32, tokenizer)
    example = probe.encode(row)
    owner, first = clause_tokens(example, 4)[1], example.post_tok[0]
    found = attribute(probe, example, ("erase", "erase_neutral"), ("label",), Settings(max_units=4))
    whole = without(probe, example, set())
    gone = [{first + int(at) for at in np.flatnonzero(owner == unit)} for unit in range(owner.max() + 1)]
    wanted = [whole - without(probe, example, one) for one in gone]
    assert found[0].values == pytest.approx(wanted, abs=1e-4) and max(map(abs, wanted)) > 0.01
    assert found[0].f_baseline == pytest.approx(without(probe, example, set().union(*gone)), abs=1e-4)
    padded = [[probe.pad_id if at in one else index for at, index in enumerate(example.ids)] for one in gone]
    other = [whole - without(probe, dataclasses.replace(example, ids=tuple(ids)), set()) for ids in padded]
    assert found[1].values == pytest.approx(other, abs=1e-4)
    # what is hidden from the label elsewhere goes the same way
    start, own, *_ = probe.scorer.label_ids(example)
    sequence, hidden = [*example.ids[:start], *own], min(gone, key=len)
    span = (min(hidden), max(hidden) + 1)
    both = probe.scorer.logprobs([sequence, sequence], [start, start], [[span], []]).tolist()
    mask = torch.tensor([not span[0] <= at < span[1] for at in range(len(sequence))])
    cut = [index for index, seen in zip(sequence, mask.tolist(), strict=True) if seen]
    by_cut = "masks" in probe.scorer.can.limits
    alone = plain(probe, cut, start - len(hidden)) if by_cut else plain(probe, sequence, start, mask)
    assert both == pytest.approx([alone, plain(probe, sequence, start)], abs=1e-4)


@pytest.mark.parametrize("name", [name for name, kinds in LIMITED.items() if "gradients" in kinds])
def test_maps_from_gradients_are_refused_by_name(name: str, tokenizer: Any, row: dict[str, Any]) -> None:
    probe = make(name, torch.float32, tokenizer)
    example = probe.encode(row)
    line = rf"tiny {name}: {type(probe.model).__name__} cannot be asked for"
    for method in NEED_GRADIENTS:
        with pytest.raises(ProbeInputError, match=rf"\A{line} method '{method}', .*; it has erase, erase_neutral, .*"):
            attribute(probe, example, ("erase", method), ("label",), Settings(), ("it rained.",))
    forward = probe.scorer.forward(example, ("label",))
    with pytest.raises(ProbeInputError, match=rf"\A{line} embeddings that are no token's: "):
        forward(forward.post[None])


def test_a_check_tries_the_model_first(tokenizer: Any, row: dict[str, Any]) -> None:
    """Where nothing was scored before it, it must not take the model for one that can do everything."""
    probe = make("gemma3n", torch.float32, tokenizer)
    example = probe.encode(row)
    found = weight_of_evidence(probe, example)
    start, own, (other,), _ = probe.scorer.label_ids(example)
    said, tail = example.segment("explanation"), start + len(own)
    assert said is not None and found.value is not None
    rows = [[*example.ids[:start], *label, *example.ids[tail : said.tok[1]]] for label in (own, other)]
    wanted = [plain(probe, ids, len(ids) - (said.tok[1] - said.tok[0])) for ids in rows]
    assert found.value == pytest.approx(wanted[0] - wanted[1], abs=1e-4)


class Long(torch.nn.Module):
    """A model that ignores the mask, and whose answers depend on how long the batch is."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def forward(self, attention_mask: torch.Tensor | None = None, **inputs: Any) -> Any:
        out = self.inner(**inputs)
        out.logits = out.logits * (1 + 0.01 * inputs.get("input_ids", inputs.get("inputs_embeds")).shape[1])
        return out


def test_what_cannot_be_cut_out_either_is_refused(tokenizer: Any, row: dict[str, Any]) -> None:
    probe = Probe(Long(make("gpt2", torch.float32, tokenizer).model).eval(), tokenizer, "tiny long")
    line = r"\Atiny long: Long cannot be probed here: what shares the batch of a row with tokens cut out moves its"
    with pytest.raises(ProbeInputError, match=line):
        probe.scorer.check(probe.encode(row))


def test_answers_are_written_one_at_a_time_where_padding_is_read(tokenizer: Any, row: dict[str, Any]) -> None:
    probe = make("rwkv", torch.float32, tokenizer)
    probe.scorer.check(probe.encode(row))
    prompts = [row["prompt_ids"], row["prompt_ids"][:9]]
    assert _generate(probe, prompts, 6) == [_generate(probe, [one], 6)[0] for one in prompts]


def run(name: str, tokenizer: Any, row: dict[str, Any], out: Path, budget: str) -> tuple[Probe, Any]:
    other = make_row(
        tokenizer, 1, "en", "We had dinner, we sang. It was fine, I slept. Nobody called me.", "It was fine"
    )
    probe = make(name, torch.float32, tokenizer)
    told: list[str] = []
    suite = run_suite(probe, [row, other], out, budget, n_boot=20, tell=told.append)
    assert all(line.partition(" (left out")[0] in told[0] for line in suite.run.manifest["limits"])
    return probe, suite


def test_a_budget_goes_without_gradients_and_says_so_once(tokenizer: Any, row: dict[str, Any], tmp_path: Path) -> None:
    probe, suite = run("gemma3n", tokenizer, row, tmp_path, "full")
    manifest = suite.run.manifest
    assert manifest["methods"] == ["erase", "erase_resample", "shap"]
    assert manifest["left_out"] == ["ig", "ig_filler", "gradshap", "gradnorm", "gxi"]
    (said,) = manifest["limits"]
    assert said.startswith("no maps from gradients: ") and said.endswith(
        "(left out: ig, ig_filler, gradshap, gradnorm, gxi)"
    )
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("no maps from gradients: ") == 1 and "this model has maps of 1 family only" in page
    assert suite["verdicts"] == {"supported": 0, "contradicted": 0, "inconclusive": 2}
    assert suite["conclusion"] == "inconclusive" and suite["measured"]["necessity"]["erase"]["n"] == 2
    checks = [c for r in suite.run.results for c in r.measured]
    assert {c.status for c in checks if c.name.startswith("soft_")} == {"abstain"}
    assert {c.method for c in checks if c.name == "faithfulness_corr"} == {"erase", "erase_resample", "shap"}
    assert set(suite["randomisation"]["cascade"][0]["correlation"]) == {"erase"}
    for budget, made in (("fast", False), ("standard", True)):  # of one post both have the same maps
        alone = run_suite(probe, [row], tmp_path / "one", budget, n_boot=20)
        assert alone.run.manifest["methods"] == ["erase"] and ("necessity" in alone["measured"]) == made


def test_a_run_that_cuts_says_so_once(tokenizer: Any, row: dict[str, Any], tmp_path: Path) -> None:
    probe, suite = run("recurrent_gemma", tokenizer, row, tmp_path, "standard")
    manifest = suite.run.manifest
    assert manifest["methods"] == list(BUDGETS["standard"][0]) and manifest["left_out"] == []
    (said,) = manifest["limits"]
    assert said.startswith("erased tokens are cut out of the sequence, what follows closes up: a token hidden by")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("erased tokens are cut out of the sequence") == 1
    maps = [a for r in suite.run.results for a in r.attributions if a.method == "erase"]
    assert {a.baseline for a in maps} == {"cut"}
    made = len(list((tmp_path / "cache").iterdir()))
    again = run_suite(probe, [row], tmp_path / "one", "standard", n_boot=20)
    assert again.run.manifest["limits"] == manifest["limits"]
    run("recurrent_gemma", tokenizer, row, tmp_path, "standard")
    assert len(list((tmp_path / "cache").iterdir())) == made
