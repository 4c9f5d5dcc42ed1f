"""What two rows' trials found together is tried as well; and what a model cannot hear is told by other hidden ids."""

from typing import Any

import pytest
import torch

from probes.errors import ProbeInputError
from probes.models.trial import BOUND, told
from probes.probe import Probe
from probes.records import Example
from tests.probes.models.test_architectures import plain
from tests.probes.tiny import make_model, make_row

POST = "I fed the dog, it rained. I can't see a way out any more... Work starts at 9.30. "
NEVER = range(0)


class Moody(torch.nn.Module):
    """A model that looks at the ids beside the embeddings of ``short`` sequences, does not hear its mask over ``deaf``
    ones, and gives other answers for ids with positions where the sequence is of a length in ``wrong``."""

    def __init__(self, inner: torch.nn.Module, short: range, deaf: range, wrong: range = NEVER) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.short, self.deaf, self.wrong = short, deaf, wrong

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def forward(self, attention_mask: Any = None, past_key_values: Any = None, **inputs: Any) -> Any:
        by_ids = "input_ids" in inputs
        size = inputs["input_ids" if by_ids else "inputs_embeds"].shape[1]
        size += 0 if past_key_values is None else past_key_values.get_seq_length()
        heard = None if size in self.deaf else attention_mask
        out = self.inner(attention_mask=heard, past_key_values=past_key_values, **inputs)
        if (size in self.short and not by_ids) or (size in self.wrong and by_ids and "position_ids" in inputs):
            out.logits = out.logits * 1.01
        return out


class Rows:
    """A short row and a long one, and the lengths of their sequences."""

    def __init__(self, tokenizer: Any) -> None:
        probe = Probe(make_model(tokenizer), tokenizer)
        self.short, self.long = (
            probe.encode(make_row(tokenizer, 0, "en", POST * times, "it rained")) for times in (1, 5)
        )
        self.until = len(self.short.ids) + 20  # no sequence of the long row is as short, half of its post cut out
        label = self.long.segment("label")
        assert label is not None and label.tok[0] - (self.long.post_tok[1] - self.long.post_tok[0]) // 2 > self.until
        label = self.short.segment("label")
        assert label is not None
        self.least = label.tok[1] - 5  # every sequence of the short row is longer, as long as nothing is cut out


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> Rows:
    return Rows(tokenizer)


def moody(tokenizer: Any, rows: Rows, wrong: range = NEVER) -> Probe:
    model = Moody(make_model(tokenizer), range(rows.until), range(rows.until, 10_000), wrong)
    return Probe(model.eval(), tokenizer, "tiny moody")


def without_half(probe: Probe, example: Example) -> tuple[float, float]:
    """Log p of the explanation with every other token of the post cut out: by the engine, and by the model alone."""
    segment = example.segment("explanation")
    assert segment is not None
    first, last = example.post_tok
    keep = torch.arange(last - first) % 2 == 1
    found = float(probe.scorer.forward(example, ("explanation",)).kept(keep[None])[0, 0])
    ids = [
        index for at, index in enumerate(example.ids[: segment.tok[1]]) if not first <= at < last or keep[at - first]
    ]
    return found, plain(probe, ids, len(ids) - (segment.tok[1] - segment.tok[0]))


def test_what_two_rows_need_together_is_scored_once_and_equals_a_plain_call(tokenizer: Any, rows: Rows) -> None:
    probe = moody(tokenizer, rows)
    probe.scorer.check(rows.short)
    assert {"ids", "cut"} & {*probe.scorer.can.way} == {"ids"} and "joined" not in probe.scorer.tried.gaps
    probe.scorer.check(rows.long)
    tried = probe.scorer.tried
    assert tried is not None and {"ids", "cut"} <= {*tried.can.way} and tried.can.way == probe.scorer.can.way
    assert tried.gaps["joined"] <= tried.bound == BOUND[torch.float32]
    assert "joined" in told(tried, probe.scorer.memory)
    for example in (rows.short, rows.long):
        found, wanted = without_half(probe, example)
        assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("which", ["longer row", "row before it"])
def test_what_two_rows_need_together_and_cannot_have_is_refused(which: str, tokenizer: Any, rows: Rows) -> None:
    wrong = range(rows.until, 10_000) if which == "longer row" else range(rows.least)
    probe = moody(tokenizer, rows, wrong)
    probe.scorer.check(rows.short)
    before = probe.scorer.tried
    line = r"\Atiny moody: Moody cannot be probed here: rows of different length need different ways, and with both"
    with pytest.raises(ProbeInputError, match=rf"{line} \(.*ids.*cut.*\) it differs from a plain call by "):
        probe.scorer.check(rows.long)
    assert probe.scorer.tried is before


def test_hidden_ids_are_exchanged_where_a_model_is_called_on_ids(tokenizer: Any, rows: Rows) -> None:
    """Called on ids only, it is given no other embeddings: what it does not hear is told by other ids."""
    probe = Probe(Moody(make_model(tokenizer), range(10_000), range(10_000)).eval(), tokenizer, "tiny moody")
    probe.scorer.check(rows.short)
    can = probe.scorer.can
    assert {"ids", "cut"} <= {*can.way} and "a token hidden by the attention mask still moves" in can.unmasked
    assert probe.scorer.tried is not None and probe.scorer.tried.gaps["cut"] <= 1e-3


def test_what_follows_a_cut_closes_up(tokenizer: Any, rows: Rows) -> None:
    """By positions: rotary ones go on where the cut began, as in a shorter text."""
    probe = Probe(Moody(make_model(tokenizer), NEVER, range(10_000)).eval(), tokenizer, "tiny deaf")
    found, wanted = without_half(probe, rows.short)
    assert found == pytest.approx(wanted, abs=1e-3)
    assert "cut" in probe.scorer.can.way and not probe.scorer.can.unkept  # also after a prefix that is kept
