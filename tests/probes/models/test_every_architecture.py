"""Every causal architecture of the installed transformers, built tiny: scored as it answers, or refused by name."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from probes.errors import ProbeError, ProbeInputError
from probes.probe import Probe
from probes.records import Example
from probes.validation import architectures
from probes.validation.architectures import asked, known, main, page, survey, tiny

DOCS = Path(__file__).parents[3] / "docs" / "architectures.md"


@pytest.fixture(scope="module")
def row_and_tokenizer() -> tuple[dict[str, Any], Any]:
    return asked()


@pytest.mark.parametrize(
    ("name", "outcome", "said"),
    [
        ("glm4", "scored", "packed, prefix kept"),
        ("gpt2", "scored", "packed, prefix kept"),
        ("mistral", "scored", "one sequence at a time, prefix kept"),
        ("falcon_h1", "scored", "one sequence at a time, prefix run every time .its cache holds LinearAttention"),
        ("xlnet", "refused", "what follows a token moves its log p"),
        ("data2vec-text", "scored", "one sequence at a time, prefix kept, no maps from gradients$"),
        ("rwkv", "scored", "erased tokens are cut out of the sequence, what follows closes up$"),
        ("fuyu", "not built", "not a model of text alone"),
    ],
)
def test_a_handful(row_and_tokenizer: tuple[dict[str, Any], Any], name: str, outcome: str, said: str) -> None:
    found = survey(name, *row_and_tokenizer)
    assert found.outcome == outcome and re.search(said, found.said), found
    if outcome == "scored":
        assert found.gaps["float32"] < 1e-4 and min(found.effect.values()) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", known())
def test_all_of_them(row_and_tokenizer: tuple[dict[str, Any], Any], name: str) -> None:
    assert survey(name, *row_and_tokenizer).outcome in ("scored", "refused", "not built")


def test_scores_that_are_not_the_models_own_are_no_row(
    row_and_tokenizer: tuple[dict[str, Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison is with the model alone, and not with what the engine thinks of itself."""
    plain = architectures.plain_logp
    monkeypatch.setattr(architectures, "plain_logp", lambda *given: [one + 0.01 for one in plain(*given)])
    with pytest.raises(ProbeError, match=r"gpt2, float32: scores and a plain call differ by 0\.0"):
        survey("gpt2", *row_and_tokenizer, dtypes=("float32",))


def test_a_model_that_sees_what_follows_is_refused(row_and_tokenizer: tuple[dict[str, Any], Any]) -> None:
    """It would be told the answer that it is asked for, and every number would agree with every other."""

    class Filling(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.config = inner, inner.config

        def get_input_embeddings(self) -> Any:
            return self.inner.get_input_embeddings()

        def forward(self, **inputs: Any) -> Any:
            out = self.inner(**inputs)
            out.logits = out.logits + 0.1 * out.logits.mean(1, keepdim=True)
            return out

    row, tokenizer = row_and_tokenizer
    probe = Probe(Filling(tiny("gpt2", len(tokenizer))).eval(), tokenizer)
    with pytest.raises(ProbeInputError, match="Filling cannot be probed here: what follows a token moves its log p"):
        probe.scorer.check(probe.encode(row))


def test_a_model_that_cannot_be_called_is_refused(row_and_tokenizer: tuple[dict[str, Any], Any]) -> None:
    row, tokenizer = row_and_tokenizer
    model = tiny("gpt2", len(tokenizer))
    model.transformer.ln_f = torch.nn.LayerNorm(7)
    probe = Probe(model.eval(), tokenizer)
    example: Example = probe.encode(row)
    with pytest.raises(ProbeInputError, match="GPT2LMHeadModel cannot be probed here: it cannot be called on"):
        probe.scorer.check(example)


def test_the_page_is_what_the_command_writes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fuyu", "xlnet", "--docs", str(tmp_path / "a.md")]) == 0
    text = (tmp_path / "a.md").read_text("utf-8")
    assert "| xlnet | XLNetLMHeadModel | refused: what follows" in text and "```text\nfuyu\n```" in text
    assert "xlnet: refused" in capfd.readouterr().err


def test_the_page_in_the_docs_names_every_architecture_once() -> None:
    text = DOCS.read_text("utf-8")
    named = re.findall(r"^\| ([\w.-]+) \| \w+ \|", text, re.MULTILINE)
    unbuilt = text.partition("```text\n")[2].rstrip("`\n").split(", ")
    assert len(named) > 100 and len(named) == len(set(named)) and not set(named) & set(unbuilt)
    assert "0 failed" in text and page([]).splitlines()[0] in text
