"""What a notebook shows: nothing a post contains gets out of its frame, and the numbers are the object's."""

import dataclasses
import html
import re

import numpy as np
import pytest

from probes.results.store import Run
from probes.results.summary import summarise
from tests.probes.report.test_page import ATTACKS, MANIFEST, Page, hostile
from tests.probes.worlds import attribution, post_result


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_names_and_posts_stay_text(attack):
    post = f"我想{attack}结束这一切"
    result = hostile(post, f"“{attack}”", id=attack, label=attack)
    maps = tuple(dataclasses.replace(a, example_id=attack, baseline=attack) for a in result.attributions)
    result = dataclasses.replace(result, attributions=maps)
    run = Run(MANIFEST, summarise([result], n_boot=0, draws=9), (result,))
    shown = [maps[0], result.evidence().report, result, run]
    for page in (Page(one._repr_html_()) for one in shown):
        assert not page.all("script") and not page.all("img") and not page.all("style")
        assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
    for one in shown[2:]:
        (frame,) = Page(one._repr_html_()).all("iframe")
        assert frame["sandbox"] == "allow-scripts"  # no allow-same-origin: it cannot reach the notebook
        inside = Page(frame["srcdoc"] or "")
        assert len(inside.all("script")) == 1 and not inside.all("img") and inside.all("meta", charset="utf-8")
        assert "default-src 'none'" in inside.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]


def test_a_map_shows_its_units_and_what_it_rests_on():
    a = attribution("ig", "label", np.array([2.0, -1.0, 0.0, np.nan]), rel_delta=0.2, converged=False)
    shown = a._repr_html_()
    bars = re.findall(r'<rect x="(\d+)" y="([\d.]+)" width="[\d.]+" height="([\d.]+)" fill="(#\w+)"', shown)
    assert bars == [
        ("0", "2.00", "28.00", "#1b5e9e"),
        ("1", "30.00", "14.00", "#d55e00"),
        ("2", "30.00", "0.00", "#1b5e9e"),
    ]
    assert "completeness error 20%, not converged" in shown and "integrated gradients for the label" in shown


def test_a_report_lists_every_check():
    report = post_result(1).evidence().report
    page = Page(report._repr_html_())
    assert len(page.all("tr")) == 1 + len(report.checks)
    assert f"p1: {report.verdict}" in page.words and "mass ratio" in page.words


def test_a_post_and_a_run_show_text_unless_redacted():
    result = post_result(2)
    assert result.post[:8] in html.unescape(result._repr_html_())
    closed = result.redacted()
    assert result.post[:4] not in html.unescape(closed._repr_html_())
    run = Run(MANIFEST | {"redact": True}, summarise([result], n_boot=0, draws=9), (result,))
    assert result.post[:4] not in html.unescape(run._repr_html_())
