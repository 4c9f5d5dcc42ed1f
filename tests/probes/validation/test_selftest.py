"""The self-test passes on a sound engine and fails on a broken one."""

import importlib
import json
import math

import pytest
import torch

import probes.models.forward
from probes.errors import ProbeError
from probes.models.forward import Forward
from probes.models.score import Scorer

module = importlib.import_module("probes.validation.selftest")  # the name in the package is the function


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    before = torch.random.get_rng_state()
    found = module.selftest()
    assert torch.equal(torch.random.get_rng_state(), before)
    return {row["id"]: row for row in found}


def test_everything_is_right_here(rows: dict[str, dict]) -> None:
    assert all(row["ok"] for row in rows.values()), [row for row in rows.values() if not row["ok"]]
    for row in rows.values():
        assert list(row) == ["id", "what", "value", "bound", "ok"]
        assert math.isfinite(row["value"]) and row["value"] >= 0
    assert json.loads(json.dumps(rows)) == rows


def test_every_promised_check_is_there(rows: dict[str, dict]) -> None:
    named = {"V1.ig", "V1.erase", "V2.or.ig", "V2.product.erase", "V6.pad", "V6.batch", "V13.ours", "V13.default"}
    named |= {f"V3.{method}.{target}" for method in ("ig", "erase", "gradnorm") for target in ("label", "explanation")}
    assert named <= set(rows)


def test_known_traps_are_measured(rows: dict[str, dict]) -> None:
    """Information rows: unmasked left padding is wrong on any version; Captum's default path on those installed."""
    assert rows["V6.left"]["value"] > 0.1 and rows["V6.left"]["bound"] is None
    guard = rows["V13.default"]
    assert ("wrong on these versions" in guard["what"]) == (guard["value"] > 1e-3)


def failing(found: list[dict]) -> set[str]:
    return {row["id"] for row in found if not row["ok"]}


def test_ignored_erasure_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = probes.models.forward.attention_mask
    monkeypatch.setattr(probes.models.forward, "attention_mask", lambda plan, keep, *rest: whole(plan, None, *rest))
    with pytest.raises(ProbeError, match="hidden by the attention mask still moves the log-odds"):
        module._linear()


def test_wrong_baseline_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path starts at zero, and what is erased becomes another token, where the record says pad."""
    made = Forward.__init__

    def start_at_zero(self: Forward, *args: object, **settings: object) -> None:
        made(self, *args, **settings)
        self.neutral, self._pad = torch.zeros_like(self.post), self._pad + 1

    monkeypatch.setattr(Forward, "__init__", start_at_zero)
    assert failing(module._linear()) == {"V1.ig", "V1.neutral"}


def test_forgotten_rival_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    label_ids = Scorer.label_ids

    def one_rival_less(self: Scorer, example: object) -> tuple:
        start, label, others, anew = label_ids(self, example)
        return start, label, others[:-1], anew

    probe, example = module._random_glm()
    monkeypatch.setattr(Scorer, "label_ids", one_rival_less)
    assert {"V3.ig.label", "V3.erase.label"} <= failing(module._brute_force(probe, example))


def test_lost_padding_mask_is_harmless_only_on_the_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A score that depends on its company is noticed."""
    logprobs = Scorer.logprobs

    def company(self: Scorer, sequences: list, starts: list) -> torch.Tensor:
        return logprobs(self, sequences, starts) * (1 + 1e-3 * (len(sequences) > 1))

    probe, example = module._random_glm()
    monkeypatch.setattr(Scorer, "logprobs", company)
    assert "V6.pad" in failing(module._invariance(probe, example))
