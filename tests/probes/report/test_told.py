"""What a reader must be told before a map is believed: families, labels, contrasts, borders, cuts; p by its name."""

import dataclasses
from typing import Any

import pytest

from probes.checks.swaps import Swap
from probes.records import Check
from probes.report.overview import MAIN, brief, facts, funnel, panel
from probes.report.overview import tests as hypotheses
from probes.report.view import card, p_value
from probes.results.summary import summarise
from probes.terminal import print_summary
from tests.probes.worlds import post_result

NECESSITY = Check("necessity", "erase", 3.0, 2.5, 2.0, 3.0, 0.3, None, 20, "ok", (), (2.0, 2.5, 3.0))


def told(results: list[Any], **more: Any) -> dict[str, tuple[str, str]]:
    return {title: (value, note) for title, value, note in facts(summarise(results, n_boot=0, draws=9, **more))}


def test_a_budget_of_one_family_fails_no_gate() -> None:
    results = [post_result(s, methods=("erase", "gradnorm")) for s in range(6)]
    evidence = [r.evidence() for r in results]
    steps = funnel({}, summarise(results, evidence, n_boot=0, draws=9), evidence)
    assert [step["name"] for step in steps] == ["can be probed", "cite the post", "have maps of both families"]
    assert steps[-1] == {
        "name": "have maps of both families", "count": 0, "lost": "this budget makes maps of 1 family only"
    }  # fmt: skip


def test_labels_contrasts_borders_and_cuts() -> None:
    results = [post_result(s) for s in range(4)]
    found = told(results)
    assert found["Labels given"] == ("high 4", "all posts have one label: it may not tell them apart")
    odds = [abs(a.f_input) for r in results for a in r.attributions if (a.method, a.target) == ("gradnorm", "label")]
    assert found["Mean |log-odds| of the label"] == (f"{sum(odds) / 4:.2f}", "nats; 0 below 0.1")
    assert found["Posts cut into"] == ("clauses", "0 with fewer than 4, which settle little")
    assert not any(title.startswith(("Label scores", "Tokens at")) for title in found)
    results[0] = dataclasses.replace(results[0], label="low", contrast="log p", border=1, not_varied=((4, 6),))
    results[1] = dataclasses.replace(results[1], contrast="unlisted", border=2, border_letters=True)
    results[2] = dataclasses.replace(results[2], contrast="reworded")
    found = told(results)
    assert found["Labels in other words"] == ("1", "compared with the other candidates in the same words")
    assert any(
        "the others are compared in the same words" in n for n in card(3, results[2], results[2].evidence())["notes"]
    )
    assert found["Labels given"] == ("high 3 · low 1", "of 4 posts")
    assert found["Label scores that are no plain contrast"] == (
        "2", "1 without another candidate: plain log p; 1 whose sentence is no candidate"
    )  # fmt: skip
    assert found["Tokens at the ends not varied"] == ("3", "shared with the prompt, in 2 posts; 1 hold letters")
    notes = card(1, results[0], results[0].evidence())["notes"]
    assert any("1 token at an end of the post" in n and "characters 5 to 6 have no saliency" in n for n in notes)
    assert any("plain log-probability, not a contrast" in n for n in notes)


def test_an_adjusted_p_has_its_own_name(capsys: pytest.CaptureFixture[str]) -> None:
    results = [post_result(s) for s in range(6)]
    evidence = [r.evidence() for r in results]
    summary = summarise(results, evidence, n_boot=200, draws=99)
    summary["p"], summary["p_holm"] = dict.fromkeys(summary["p"], 0.011), dict.fromkeys(summary["p_holm"], 0.044)
    strips = panel(MAIN, summary, evidence, [(r.id, None) for r in results])
    assert strips is not None and [s["p"] for s in strips["strips"]] == ["p (Holm) = 0.044", "p (Holm) = 0.044", None]
    assert "p (Holm) = 0.044 for the weaker method" in dict(brief(summary))["How sure"]
    print_summary(summary)
    shown = " ".join(capsys.readouterr().out.split())
    assert "0.011" not in shown and "labels given" in shown
    assert (p_value(0.0004), p_value(None, "p (Holm)")) == ("p < 0.001", "no p (Holm)")


def test_necessity_says_what_as_many_other_words_do() -> None:
    results = [dataclasses.replace(post_result(s), measured=(NECESSITY,)) for s in range(5)]
    found = summarise(results, n_boot=0, draws=9)
    assert found["necessity"] == 3.0 and found["necessity_beyond"] == 0.5
    assert told(results)["Cited words hidden, beyond as many others"][0] == "−0.5"
    assert any("hiding as many other words 2.50" in note for note in results[0].evidence().report.notes)


def test_swap_pairs_are_tested_and_shown() -> None:
    swaps = [Swap(str(i), "erase", None, 2.0 + i, True, (0.1, 0.0, 2.0 + i, 0.1), 2) for i in range(6)]
    summary = summarise([post_result(s) for s in range(6)], n_boot=0, draws=999, swaps=swaps)
    assert summary["swaps"]["turned"] == 6 and summary["swaps"]["by_method"]["erase"]["p_share"] <= 0.01
    rows = {row["hypothesis"] for row in hypotheses(summary)}
    assert {"where swapped posts differ, their maps differ", "the label moves as the maps of swapped posts say"} <= rows
