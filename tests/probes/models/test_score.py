"""The scoring engine: packing, masks, padding, back-off; each against one plain pass per sequence."""

import dataclasses
from typing import Any

import pytest
import torch
import transformers

from probes.errors import ProbeError, ProbeInputError
from probes.models.pack import Plan
from probes.probe import Probe
from probes.records import Example
from tests.probes.tiny import LABELS, make_model, make_row

EN = 2  # an English row, EN + 1 another; 0 and 1 are Chinese


def plain_logp(probe: Probe, ids: list[int], start: int, erased: tuple[int, ...] = ()) -> float:
    """Sum of log p of ids[start:], in float64, one unpadded sequence."""
    mask = torch.ones(1, len(ids), dtype=torch.long)
    mask[0, list(erased)] = 0
    logits = probe.model(input_ids=torch.tensor([ids]), attention_mask=mask).logits[0].double().log_softmax(-1)
    return float(sum(logits[at - 1, ids[at]] for at in range(start, len(ids))))


def plain_label(probe: Probe, example: Example, erased: tuple[int, ...] = ()) -> float:
    segment = example.segment("label")
    assert segment is not None
    head = list(example.ids[: segment.tok[0]])
    own = plain_logp(probe, list(example.ids[: segment.tok[1]]), len(head), erased)
    others = [
        plain_logp(probe, head + probe.token_bytes.encode(text), len(head), erased)
        for text in example.candidates.values()
        if text != example.label_text
    ]
    return own - float(torch.tensor(others, dtype=torch.float64).logsumexp(0))


def everything(forward: Any, rows: int = 1) -> torch.Tensor:
    return torch.ones(rows, len(forward.post), dtype=torch.bool)


@pytest.fixture(params=["two labels", "five labels, one the start of another"])
def example(request: pytest.FixtureRequest, tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> Example:
    row = tiny_rows[EN]
    if request.param != "two labels":
        own = LABELS["en"]["high"]
        more = {"x": "The suicide", "y": own + " Really.", "z": "Nothing."}
        row = row | {"candidates": LABELS["en"] | more}
    return tiny_probe.encode(row)


def test_scores_equal_one_pass_per_candidate(tiny_probe: Probe, example: Example) -> None:
    forward = tiny_probe.scorer.forward(example, ("explanation", "label"))
    found = forward.kept(everything(forward))[0]
    segment = example.segment("explanation")
    assert segment is not None
    wanted = plain_logp(tiny_probe, list(example.ids[: segment.tok[1]]), segment.tok[0])
    assert float(found[0]) == pytest.approx(wanted, rel=1e-5)
    assert float(found[1]) == pytest.approx(plain_label(tiny_probe, example), rel=1e-5)


def test_packed_equals_unpacked(tiny_probe: Probe, example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = torch.rand(5, example.post_tok[1] - example.post_tok[0]) > 0.4
    packed = tiny_probe.scorer.forward(example, ("label", "explanation")).kept(keep)
    monkeypatch.setattr(tiny_probe.scorer, "can", dataclasses.replace(tiny_probe.scorer.can, packs=False))
    forward = tiny_probe.scorer.forward(example, ("label", "explanation"))
    assert len(forward.plans) == len(example.candidates) + 1
    assert torch.allclose(forward.kept(keep), packed, rtol=1e-5, atol=1e-4)


def test_erased_tokens_are_not_seen(tiny_model_dir: Any, tiny_probe: Probe, example: Example) -> None:
    first, last = example.post_tok
    erased = (first, first + 3, last - 1)
    keep = torch.ones(last - first, dtype=torch.bool)
    keep[[at - first for at in erased]] = False
    forward = tiny_probe.scorer.forward(example, ("label",))
    # the difference of two log p of some ten nats, from logits that are rounded in float32
    wanted = plain_label(tiny_probe, example, erased)
    assert float(forward.kept(keep[None])[0, 0]) == pytest.approx(wanted, rel=1e-5, abs=5e-6)
    # in float64 nothing but the meaning is left
    exact = Probe.from_pretrained(tiny_model_dir, dtype="float64")
    found = exact.scorer.forward(example, ("label",)).kept(keep[None])
    assert float(found[0, 0]) == pytest.approx(plain_label(exact, example, erased), rel=1e-10)
    # and what they were does not matter any more
    ids = list(example.ids)
    ids[first + 3] = 77
    changed = dataclasses.replace(example, ids=tuple(ids))
    again = tiny_probe.scorer.forward(changed, ("label",))
    assert torch.equal(again.kept(keep[None]), forward.kept(keep[None]))
    assert not torch.equal(again.kept(everything(again)), forward.kept(everything(forward)))


def test_neutral_eraser_is_the_pad_token(tiny_probe: Probe, example: Example) -> None:
    first, last = example.post_tok
    ids = list(example.ids)
    ids[first + 2] = tiny_probe.pad_id
    keep = torch.ones(1, last - first, dtype=torch.bool)
    keep[0, 2] = False
    found = tiny_probe.scorer.forward(example, ("label",)).kept(keep, "neutral")
    replaced = dataclasses.replace(example, ids=tuple(ids))
    assert float(found[0, 0]) == pytest.approx(plain_label(tiny_probe, replaced), rel=1e-5)


class DeafModel(torch.nn.Module):
    """A model that ignores a 4-D mask, as one with its own attention may."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, attention_mask: torch.Tensor | None = None, **inputs: Any) -> Any:
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = None
        return self.inner(attention_mask=attention_mask, **inputs)


def test_model_that_ignores_the_packing_mask_is_noticed(tokenizer, tiny_probe: Probe, example: Example) -> None:
    probe = Probe(DeafModel(make_model(tokenizer)).eval(), tokenizer)
    forward = probe.scorer.forward(example, ("label",))
    assert not probe.scorer.can.packs
    assert float(forward.kept(everything(forward))[0, 0]) == pytest.approx(plain_label(tiny_probe, example), rel=1e-5)


def test_logprobs_do_not_depend_on_company(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    sequences = [[*row["prompt_ids"], *row["output_ids"]] for row in tiny_rows]
    starts = [len(row["prompt_ids"]) for row in tiny_rows]
    together = tiny_probe.scorer.logprobs(sequences, starts)
    for index, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        alone = tiny_probe.scorer.logprobs([ids], [start])[0]
        assert float(together[index]) == pytest.approx(float(alone), rel=1e-5)
        assert float(alone) == pytest.approx(plain_logp(tiny_probe, ids, start), rel=1e-5)
    with pytest.raises(ProbeError, match="start"):
        tiny_probe.scorer.logprobs([[1, 2]], [0])


def test_out_of_memory_halves_the_batch(tiny_probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = tiny_probe.scorer
    monkeypatch.setattr(scorer, "token_budget", 800)
    sizes = []

    def part(items: torch.Tensor) -> torch.Tensor:
        sizes.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return items * 2

    items = torch.arange(9)
    assert scorer.chunked(part, items, 100).tolist() == (items * 2).tolist()
    assert sizes == [8, 4, 2, 2, 2, 2, 1]
    with pytest.raises(ProbeError, match="single sequence of 900 tokens"):
        scorer.chunked(lambda _: part(torch.arange(4)), items, 900)
    with pytest.raises(RuntimeError, match="shapes"):
        scorer.chunked(lambda _: (_ for _ in ()).throw(RuntimeError("shapes do not match")), items, 100)


def test_bfloat16_model_is_scored_in_full_precision(
    tiny_model_dir, tiny_probe: Probe, tiny_rows: list[dict[str, Any]]
) -> None:
    half = Probe.from_pretrained(tiny_model_dir, dtype="bfloat16")
    scores = []
    for probe in (half, tiny_probe):
        forward = probe.scorer.forward(probe.encode(tiny_rows[EN]), ("label", "explanation"))
        scores.append(forward.kept(everything(forward))[0])
    assert scores[0].dtype == torch.float64
    assert torch.allclose(scores[0], scores[1], rtol=0.03, atol=0.3)


def test_label_whose_last_token_goes_on(tiny_probe: Probe, tokenizer) -> None:
    """Where the label's last token holds more than the label, every candidate is tokenised alike."""
    row = make_row(tokenizer, 0, "en", "We had dinner", "dinner")
    short = {"high": "The suicide risk of this user is hig", "low": LABELS["en"]["low"]}
    example = tiny_probe.encode(row | {"label_text": short["high"], "candidates": short})
    start, label, others, anew = tiny_probe.scorer.label_ids(example)
    assert anew and tokenizer.decode(label) == short["high"] and tokenizer.decode(others[0]) == short["low"]
    forward = tiny_probe.scorer.forward(example, ("label",))
    head = list(example.ids[:start])
    wanted = plain_logp(tiny_probe, head + label, start) - plain_logp(tiny_probe, head + others[0], start)
    assert float(forward.kept(everything(forward))[0, 0]) == pytest.approx(wanted, rel=1e-5)


def test_label_that_opens_with_a_space(tiny_probe: Probe, tokenizer) -> None:
    row = make_row(tokenizer, 0, "en", "We had dinner", "dinner")
    output = tokenizer("\nSo: " + row["output_text"])["input_ids"]
    example = tiny_probe.encode(row | {"output_ids": output})
    _, label, others, anew = tiny_probe.scorer.label_ids(example)
    lead = tokenizer.decode(label).removesuffix(LABELS["en"]["high"])
    assert not anew and tokenizer.decode(others[0]) == lead + LABELS["en"]["low"]


def test_single_candidate_is_plain_log_probability(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    example = tiny_probe.encode(tiny_rows[1] | {"candidates": {}})
    forward = tiny_probe.scorer.forward(example, ("label",))
    segment = example.segment("label")
    assert segment is not None
    wanted = plain_logp(tiny_probe, list(example.ids[: segment.tok[1]]), segment.tok[0])
    assert float(forward.kept(everything(forward))[0, 0]) == pytest.approx(wanted, rel=1e-5)


def test_part_of_the_explanation(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    example = tiny_probe.encode(tiny_rows[EN])
    segment = example.segment("explanation")
    assert segment is not None and example.explanation is not None
    whole = f"explanation[0:{len(example.explanation)}]"
    cut = example.byte_spans[segment.tok[0] + 4][0]
    at = example.char_bytes.index(cut) - segment.char[0]
    parts = (f"explanation[0:{at}]", f"explanation[{at}:{len(example.explanation)}]")
    forward = tiny_probe.scorer.forward(example, ("explanation", whole, *parts))
    found = forward.kept(everything(forward))[0]
    assert float(found[0]) == float(found[1])
    assert float(found[2] + found[3]) == pytest.approx(float(found[0]), rel=1e-6)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("labels", "not label, explanation or"),
        ("explanation[1-2]", "not label, explanation or"),
        ("explanation[3:900]", "not inside the explanation"),
    ],
)
def test_unknown_targets(tiny_probe: Probe, tiny_rows: list[dict[str, Any]], target: str, message: str) -> None:
    with pytest.raises(ProbeInputError, match=message):
        tiny_probe.scorer.forward(tiny_probe.encode(tiny_rows[0]), (target,))


def test_rows_without_the_target(tiny_probe: Probe, tiny_rows: list[dict[str, Any]]) -> None:
    example = tiny_probe.encode(tiny_rows[0] | dict.fromkeys(("label_text", "parsed_label", "parsed_explanation")))
    for target in ("label", "explanation"):
        with pytest.raises(ProbeInputError, match=f"row-0: the row has no {target}"):
            tiny_probe.scorer.forward(example, (target,))


def test_post_that_ends_the_prompt_can_not_be_hidden(tiny_probe: Probe, tokenizer) -> None:
    row = make_row(tokenizer, 0, "en", "We had dinner", "dinner")
    example = tiny_probe.encode(
        row | {"question": None, "prompt_ids": tokenizer("<|user|> We had dinner")["input_ids"]}
    )
    forward = tiny_probe.scorer.forward(example, ("label",))
    keep = everything(forward)
    keep[0, -1] = False
    with pytest.raises(ProbeInputError, match="neutral eraser"):
        forward.kept(keep)
    assert torch.isfinite(forward.kept(keep, "neutral")).all()
    with pytest.raises(ProbeInputError, match="'deletion': not one of attention, neutral"):
        forward.kept(keep, "deletion")


def test_plan_lets_branches_see_only_their_own_past() -> None:
    plan = Plan.build([1, 2, 3, 4, 5], [(3, 5)], [(3, [4, 8, 9]), (3, [6])], torch.device("cpu"))
    assert plan.ids.tolist() == [1, 2, 3, 4, 5, 8, 9, 6]
    assert plan.positions.tolist() == [0, 1, 2, 3, 4, 4, 5, 3]
    assert plan.allow is not None
    seen = [row.nonzero().flatten().tolist() for row in plan.allow]
    assert seen[4:] == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 3, 5, 6], [0, 1, 2, 7]]
    read = [(int(plan.rows[p]), int(t), int(g)) for p, t, g in zip(plan.pick, plan.token, plan.group, strict=True)]
    assert read == [(2, 4, 0), (3, 5, 0), (2, 4, 1), (3, 8, 1), (5, 9, 1), (2, 6, 2)]


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 512, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("config", "packs"),
    [
        (transformers.LlamaConfig(vocab_size=380, **SMALL), True),
        (transformers.Qwen2Config(vocab_size=380, **SMALL), True),
        (transformers.Glm4Config(vocab_size=380, head_dim=8, **SMALL), True),
        (transformers.GPT2Config(vocab_size=380, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2), True),
        # a window of 16 tokens: the 4-D mask undoes it, which the check must see
        (transformers.MistralConfig(vocab_size=380, sliding_window=16, **SMALL), False),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else "",
)
def test_other_architectures(
    config: transformers.PretrainedConfig, packs: bool, tokenizer, tiny_rows: list[dict[str, Any]]
) -> None:
    probe = Probe(transformers.AutoModelForCausalLM.from_config(config).eval(), tokenizer)
    example = probe.encode(tiny_rows[EN])
    forward = probe.scorer.forward(example, ("label", "explanation"))
    assert probe.scorer.can.packs == packs
    keep = everything(forward, 2)
    keep[1, 3:9] = False
    found = forward.kept(keep)
    erased = tuple(example.post_tok[0] + at for at in range(3, 9))
    assert float(found[0, 0]) == pytest.approx(plain_label(probe, example), rel=1e-4, abs=1e-4)
    assert float(found[1, 0]) == pytest.approx(plain_label(probe, example, erased), rel=1e-4, abs=1e-4)
