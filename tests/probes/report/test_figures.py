"""Figures: vector files with real text, the numbers of the run in them, and no surprise with scripts or redaction."""

import dataclasses

import numpy as np
import pytest

from probes.errors import ProbeError
from probes.report import figures
from probes.results.store import Run
from probes.results.summary import summarise
from tests.probes.report.test_page import NECESSITY, SUFFICIENCY
from tests.probes.worlds import post_result

RESULTS = tuple(dataclasses.replace(post_result(s), measured=(NECESSITY, SUFFICIENCY)) for s in range(6))
RUN = Run({}, summarise(RESULTS, n_boot=100, draws=99), RESULTS)


def test_headline_draws_mean_null_and_every_post():
    (axes,) = figures.headline(RUN).axes
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "integrated gradients",
        "erasure",
        "gradient norm (screening)",
    ]
    points = [line.get_xydata() for line in axes.lines]
    drawn = [tuple(xy[0]) for xy in points if len(xy) == 1]
    assert (RUN.summary["mass_ratio"]["ig"], 3.0) in drawn and len(drawn) == 3 * (len(RESULTS) + 1)
    nulls = [xy[0][0] for xy in points if len(xy) == 2 and xy[0][0] == xy[1][0]]
    assert nulls == [RUN.summary["mass_ratio_null"][method] for method in ("ig", "erase", "gradnorm")]
    two = figures.headline({"A": RUN, "B": RUN}).axes[0]
    assert [t.get_text() for t in two.get_yticklabels()][:2] == ["integrated gradients · A", "integrated gradients · B"]


def test_clauses_mirror_label_and_explanation():
    result = post_result(3, noise=0.0)
    left, right = figures.clauses(result, "erase").axes
    assert [bar.get_width() for bar in left.patches] == pytest.approx([0, 4, 0, 0, 0, 0])
    assert [bar.get_width() for bar in right.patches] == pytest.approx([0, 9, 0, 0, 0, 0])
    names = left.get_yticklabels()
    assert [n.get_text().startswith("▸") for n in names] == [False, True, *[False] * 4]
    assert left.xaxis_inverted() and not right.xaxis_inverted()
    with pytest.raises(ProbeError, match="no map by 'shap'"):
        figures.clauses(result, "shap")


def test_erasure_shows_the_null():
    (axes,) = figures.erasure(RESULTS[0]).axes
    assert [t.get_text() for t in axes.get_yticklabels()][1:] == ["cited words hidden", "only cited words left"]
    assert [(bar.get_x(), round(bar.get_width(), 6)) for bar in axes.patches] == [(-1.0, 0.9), (-4.0, 2.0)]
    without = dataclasses.replace(RESULTS[0], attributions=())
    with pytest.raises(ProbeError, match="no erasure map"):
        figures.erasure(without)


def test_files_are_vectors_with_real_text_and_the_same_every_time(tmp_path):
    for name in ("a.pdf", "b.pdf"):
        figures.save(figures.clauses(post_result(1, language="en")), tmp_path / name)
    data = (tmp_path / "a.pdf").read_bytes()
    assert data.startswith(b"%PDF") and b"/FontFile2" in data and b"/Type3" not in data
    assert data == (tmp_path / "b.pdf").read_bytes()
    svg = figures.save(figures.headline(RUN), tmp_path / "new" / "c.svg").read_text("utf-8")
    assert ">integrated gradients<" in svg
    with pytest.raises(ProbeError, match="cannot write"):
        figures.save(figures.headline(RUN), tmp_path / "d.docx")


@pytest.mark.parametrize("installed", [True, False])
def test_text_without_a_font_or_without_leave_goes_by_number(tmp_path, monkeypatch, installed):
    if not installed:
        monkeypatch.setattr(figures, "_fonts", lambda: ("DejaVu Sans",))
    drawable = len(figures._fonts()) == 2
    chinese = figures.clauses(post_result(2)).axes[0].get_yticklabels()[0].get_text()
    assert (chinese == "clause 1") != drawable
    figures.save(figures.clauses(post_result(2)), tmp_path / "a.pdf")  # warnings are errors: no missing glyph
    closed = figures.clauses(post_result(2).redacted()).axes[0].get_yticklabels()
    assert [label.get_text().removeprefix("▸ ") for label in closed] == [f"clause {i}" for i in range(1, 7)]
    odd = dataclasses.replace(post_result(2, language="en"), post="\u202e$x_{1}$" + "a" * 500)
    figures.save(figures.clauses(odd), tmp_path / "b.pdf")


def test_conditions_stand_under_each_other():
    (axes,) = figures.randomisation({"on": [1.0, 3.0], "off": [0.0, np.nan]}, "x", chance=0.5).axes
    drawn = [tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xydata()) == 1]
    assert (2.0, 2) in drawn and (0.0, 1) in drawn and len(drawn) == 5
