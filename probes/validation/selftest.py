"""Is the engine right on this machine, with the versions installed here? Seconds, no model needed.

Closed-form models whose attributions are known on paper, an independent brute force on a small random GLM, and a guard
on the Captum path this package refuses to use. Verdicts should only be read where every row is ok.
"""

import itertools
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from probes.errors import ProbeError
from probes.probe import Probe
from probes.records import Attribution, Example
from probes.saliency.attribute import Settings, attribute, clause_tokens

Row = dict[str, Any]
_SPECIALS = ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>")
_POST = "昨晚没睡好，外面下着雨。😭I can't go on, it is late"


def selftest() -> list[Row]:
    """Runs every check.

    Returns:
        one ``{"id", "what", "value", "bound", "ok"}`` per check: ``value`` is an error (or a size, where ``bound`` is
        None and the row is information only), ok means ``value <= bound``.
    """
    import torch

    state = torch.random.get_rng_state()
    try:
        rows = [*_linear(), *_interactions()]
        probe, example = _random_glm()
        return [*rows, *_brute_force(probe, example), *_invariance(probe, example), *_captum_guard(probe)]
    finally:
        torch.random.set_rng_state(state)  # asking for a self-test must not move anyone's random numbers


def _row(name: str, what: str, value: float, bound: float | None) -> Row:
    return {"id": name, "what": what, "value": value, "bound": bound, "ok": bound is None or bool(value <= bound)}


def _tokenizer() -> Any:
    """One token per byte, plus GLM's chat tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(_SPECIALS))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=_SPECIALS[0], pad_token=_SPECIALS[0])


def _example(probe: Probe, post: str, label: str, candidates: dict[str, str], explanation: str | None) -> Example:
    encode = probe.token_bytes.encode
    said = f"{candidates[label]} Reasoning: {explanation}" if explanation else candidates[label]
    return probe.encode(
        {
            "id": "selftest",
            "post": post,
            "question": "?",
            "prompt_ids": encode(f"[gMASK]<sop><|user|>\npost: {post} ?<|assistant|>"),
            "output_ids": encode(said),
            "parsed_label": label,
            "label_text": candidates[label],
            "parsed_explanation": explanation,
            "candidates": candidates,
        }
    )


def closed_form_probe(embeddings: dict[str, list[float]], logit: Callable[[Any], Any], fades: float = 1.0) -> Probe:
    """A probe over a model whose log-odds of "A" against "B" is ``logit(sum of the embeddings it attends to)``.

    Args:
        embeddings: one-byte token -> embedding; every other token has the zero vector. The key "" sets the pad token.
        logit: maps float ``[..., D]`` to ``[...]``.
        fades: what a token adds is multiplied by this for every place that it stands further back.
    """
    import torch

    tokenizer = _tokenizer()
    width = len(next(iter(embeddings.values())))

    class Config:
        def to_json_string(self, use_diff: bool = True) -> str:
            return json.dumps({"closed_form": sorted(embeddings), "use_diff": use_diff})

    class ClosedForm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = Config()
            self.table = torch.nn.Embedding(len(tokenizer), width)
            with torch.no_grad():
                self.table.weight.zero_()
                for token, vector in embeddings.items():
                    index = tokenizer.pad_token_id if token == "" else tokenizer(token)["input_ids"][0]
                    self.table.weight[index] = torch.tensor(vector)

        def get_input_embeddings(self) -> torch.nn.Embedding:
            return self.table

        def forward(
            self,
            input_ids: Any = None,
            inputs_embeds: Any = None,
            attention_mask: Any = None,
            logits_to_keep: Any = 0,
            **_: Any,
        ) -> Any:
            inputs_embeds = self.table(input_ids) if inputs_embeds is None else inputs_embeds
            size = inputs_embeds.shape[1]
            allow = torch.ones(size, size, dtype=torch.bool).tril().expand(len(inputs_embeds), -1, -1)
            if attention_mask is not None and attention_mask.ndim == 2:
                allow = allow & attention_mask[:, None, :].bool()
            elif attention_mask is not None:
                allow = (attention_mask == 0)[:, 0]
            weights = allow.to(inputs_embeds.dtype)
            if fades != 1.0:
                places = torch.arange(size)
                weights = weights * fades ** (places[:, None] - places).clamp(min=0)
            seen = weights @ inputs_embeds
            logits = seen.new_zeros(*seen.shape[:2], len(tokenizer))
            logits[..., tokenizer("A")["input_ids"][0]] = logit(seen)
            return type("Output", (), {"logits": logits[:, logits_to_keep]})()

    return Probe(ClosedForm().eval(), tokenizer, "closed form")


def _one(probe: Probe, example: Example, method: str, **settings: Any) -> Attribution:
    found = attribute(probe, example, (method,), ("label",), Settings(**settings))[0]
    for limit in probe.scorer.can.limits.values():  # these models can do all there is: the engine or torch is at fault
        raise ProbeError(f"{probe.name}: {limit}")
    return found


def _linear() -> list[Row]:
    """V1: a bag of embeddings. Every method must give w . (e - e_baseline)."""
    rng = np.random.default_rng(0)
    letters = "abcdefgh"
    weights = rng.normal(size=4)
    table = {letter: rng.normal(size=4).tolist() for letter in (*letters, "")}
    import torch

    vector = torch.tensor(weights, dtype=torch.float32)
    probe = closed_form_probe(table, lambda seen: seen @ vector)
    example = _example(probe, "abc。def，gh", "a", {"a": "A", "b": "B"}, None)
    pad = np.array(table[""])
    effect = np.array([(np.array(table[c]) if c in table else np.zeros(4)) @ weights for c in example.post])
    # "。" and "，" are three tokens each with the zero embedding
    neutral = effect - np.array([(3 if c in "。，" else 1) * (pad @ weights) for c in example.post])
    found = _one(probe, example, "ig")
    spans, _ = clause_tokens(example)
    masked, padded = _one(probe, example, "erase"), _one(probe, example, "erase", eraser="neutral")
    sums = [np.array([values[a:b].sum() for a, b in spans]) for values in (effect, neutral)]
    return [
        _row("V1.ig", "linear: integrated gradients = w.(e - e_pad)", _max(found.char_values - neutral), 1e-5),
        _row("V1.delta", "linear: completeness delta", abs(found.delta or 0.0), 1e-5),
        _row("V1.erase", "linear: clause erasure (attention) = sum of w.e", _max(masked.values - sums[0]), 1e-5),
        _row(
            "V1.neutral",
            "linear: erasure (neutral) = sum of w.(e - e_pad)",
            _max(padded.values - sums[1]),
            1e-5,
        ),
    ]


def _interactions() -> list[Row]:
    """V2: what the methods say where there is no single right answer; the documented limits, not an aspiration."""
    cases = (
        ("product", {"x": [2.0, 0.0], "y": [0.0, 3.0]}, lambda h: h[..., 0] * h[..., 1], (3.0, 3.0), (6.0, 6.0)),
        ("or", {"x": [1.0, 0.0], "y": [0.0, 1.0]}, lambda h: h.sum(-1).clamp(max=1.0), (0.5, 0.5), (0.0, 0.0)),
    )
    rows = []
    for name, table, logit, shared, alone in cases:
        probe = closed_form_probe(table, logit)
        example = _example(probe, "x，y", "a", {"a": "A", "b": "B"}, None)
        # The clamp bends where a slope is taken: only halving brings that error down.
        ig, erase = _one(probe, example, "ig", tolerance=1e-6), _one(probe, example, "erase")
        rows.append(_row(f"V2.{name}.ig", f"{name}: IG shares {shared}", _max(ig.char_values[[0, 2]] - shared), 1e-5))
        rows.append(_row(f"V2.{name}.erase", f"{name}: erasure gives {alone}", _max(erase.values - alone), 1e-5))
    return rows


def _random_glm() -> tuple[Probe, Example]:
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    tokenizer = _tokenizer()
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=True,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GlmForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.pad_token_id] = torch.randn(32) * 0.2
    probe = Probe(model.eval(), tokenizer, "random GLM")
    candidates = {"high": "Risk is high.", "low": "Risk is low.", "none": "No risk."}
    return probe, _example(probe, _POST, "high", candidates, "they say 没睡好")


def _brute_force(probe: Probe, example: Example) -> list[Row]:
    """V3: one sequence at a time, no packing, no Captum, float64."""
    import copy

    import torch

    model = copy.deepcopy(probe.model).double()
    first, last = example.post_tok
    embedding = model.get_input_embeddings()
    encode = probe.token_bytes.encode

    def score(target: str, post: Any, keep: Any = None) -> Any:
        def logp(ids: list[int], start: int) -> Any:
            embeds = embedding(torch.tensor([ids]))
            embeds = torch.cat([embeds[:, :first], post[None], embeds[:, last:]], 1)
            mask = torch.ones(1, len(ids), dtype=torch.long)
            if keep is not None:
                mask[0, first:last] = keep
            found = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[0].log_softmax(-1)
            return sum(found[at - 1, ids[at]] for at in range(start, len(ids)))

        segment = example.segment(target)
        assert segment is not None
        start, end = segment.tok
        if target == "explanation":
            return logp(list(example.ids[:end]), start)
        others = [encode(text) for text in example.candidates.values() if text != example.label_text]
        head = list(example.ids[:start])
        return logp([*head, *example.ids[start:end]], start) - torch.stack(
            [logp([*head, *ids], start) for ids in others]
        ).logsumexp(0)

    post = embedding(torch.tensor(example.ids[first:last])).detach()
    neutral = embedding(torch.tensor(probe.pad_id)).detach()
    spans, unit = clause_tokens(example)
    rows = []
    for found in attribute(probe, example):
        if found.method == "ig":
            gradient = torch.zeros_like(post)
            for a, b in itertools.pairwise(found.params["edges"]):
                for place, weight in ((a, 1 / 6), ((a + b) / 2, 4 / 6), (b, 1 / 6)):
                    at = place * (post - neutral) + neutral
                    at.requires_grad_()
                    gradient += weight * (b - a) * torch.autograd.grad(score(found.target, at), at)[0]
            wanted = example.post_chars((gradient * (post - neutral)).sum(-1).numpy())
        elif found.method == "gradnorm":
            at = post.clone().requires_grad_()
            wanted = example.post_chars(torch.autograd.grad(score(found.target, at), at)[0].norm(dim=-1).numpy())
        else:
            with torch.no_grad():
                full = score(found.target, post)
                kept = [torch.as_tensor((unit != index).astype(int)) for index in range(len(spans))]
                wanted = np.array([float(full - score(found.target, post, keep)) for keep in kept])
        error = _max(found.values - wanted) / max(_max(wanted), 1e-12)
        rows.append(
            _row(f"V3.{found.method}.{found.target}", "random GLM: engine = brute force (relative)", error, 1e-4)
        )
    return rows


def _invariance(probe: Probe, example: Example) -> list[Row]:
    """V6: nothing may depend on what shares the batch, on padding, or on the batch size."""
    import torch

    first, ids = example.post_tok[0], list(example.ids)
    sequences = [ids, ids[: len(ids) // 2], ids[: first + 3]]
    starts = [example.prompt_len, first, first]
    together = probe.scorer.logprobs(sequences, starts)
    alone = torch.cat([probe.scorer.logprobs([s], [t]) for s, t in zip(sequences, starts, strict=True)])
    rows = [_row("V6.pad", "right padding and batch company change a score (relative)", _gap(together, alone), 1e-5)]
    budget = probe.scorer.token_budget
    maps = attribute(probe, example)
    probe.scorer.token_budget = len(ids)
    single = attribute(probe, example)
    probe.scorer.token_budget = budget
    error = max(_max(a.values - b.values) / max(_max(a.values), 1e-12) for a, b in zip(maps, single, strict=True))
    rows.append(_row("V6.batch", "batches of one row change an attribution (relative)", error, 1e-4))

    def padded(left: int, right: int) -> Any:
        row = torch.tensor([[probe.pad_id] * left + ids + [probe.pad_id] * right])
        with torch.no_grad():
            logits = probe.model(input_ids=row, use_cache=False).logits[0, left : left + len(ids)].log_softmax(-1)
        return logits[:-1].gather(1, torch.tensor(ids)[1:, None]).sum()

    rows.append(_row("V6.right", "right padding without a mask (relative)", _gap(padded(0, 9), padded(0, 0)), 1e-5))
    wrong = float((padded(9, 0) - padded(0, 0)).abs())
    rows.append(_row("V6.left", "left padding without a mask is wrong by this many nats: not used here", wrong, None))
    return rows


def _captum_guard(probe: Probe) -> list[Row]:
    """V13: Captum's LLM wrapper, whose default (cached, token by token) path broke silently with transformers 5.3."""
    import torch
    from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput

    tokenizer = probe.tokenizer
    prompt, target = "[gMASK]<sop><|user|>\nno way out<|assistant|>", "Risk is high."
    ids, answer = probe.token_bytes.encode(prompt), probe.token_bytes.encode(target)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the wrapper warns about what it is asked to do here
        for one_pass in (True, False):
            wrapper = LLMAttribution(FeatureAblation(probe.model), tokenizer)
            inputs = TextTokenInput(prompt, tokenizer, baselines=probe.pad_id)
            settings: dict[str, Any] = {"forward_in_tokens": False} if one_pass else {}
            result = wrapper.attribute(inputs, target=torch.tensor(answer), **settings)
            found[one_pass] = result.seq_attr.double().numpy()
    erased = [[*ids[:at], probe.pad_id, *ids[at + 1 :], *answer] for at in range(len(ids))]
    scores = probe.scorer.logprobs([[*ids, *answer], *erased], [len(ids)] * (1 + len(ids))).double().numpy()
    ours = _max(scores[0] - scores[1:] - found[True]) / max(_max(found[True]), 1e-12)
    gap = _max(found[False] - found[True])
    says = "wrong on these versions, by this many nats" if gap > 1e-3 else "in agreement on these versions"
    return [
        _row("V13.ours", "token erasure = Captum's one-pass path (relative)", ours, 1e-4),
        _row("V13.default", f"Captum's default LLMAttribution path is {says}: not used here", gap, None),
    ]


def _max(values: Any) -> float:
    return float(np.abs(np.asarray(values)).max())


def _gap(a: Any, b: Any) -> float:
    return float(((a - b).abs() / b.abs().clamp(min=1.0)).max())
