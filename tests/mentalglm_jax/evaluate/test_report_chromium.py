"""The evaluation report in a real browser: silent, offline, narrow enough for a phone, deaf to markup in names."""

import time

import pytest

from mentalglm_jax.evaluate import compare, evaluate
from mentalglm_jax.evaluate.report import render
from tests.mentalglm_jax.evaluate.test_report import rows
from tests.probes.report.test_page_chromium import BINARY, Browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARY is None, reason="no chromium on the PATH (Debian: apt-get install chromium)"),
]
ATTACK = "</style><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


def test_the_report_opens_without_a_word(tmp_path):
    """Every section there is: two readings, several tasks, pathway levels, ratings by people, a comparison."""
    answers = rows("suicide_risk", 30) + rows("cognitive_pathway", 38, None) + rows("imhi_sad", 18, "Reasons.", "en")
    result = evaluate(answers, label_scores=[row | {"answer_order": "explanation_first"} for row in answers], draws=5)
    scale = {"mean": 2.0, "ratings": 8, "fleiss_kappa": 0.5, "krippendorff_alpha": None}
    result["suicide_risk"]["explanation"]["human"] = {
        "raters": 2, "items": 4, "rated": 4, "accepted": 3, "agreement": {ATTACK: scale, "overall": scale}
    }  # fmt: skip
    floor = {k: result["imhi_sad"][k] for k in ("n", "weighted_f1", "micro_f1", "macro_f1", "ci95")}
    result["imhi_sad"]["floors"] = {ATTACK: floor}
    compared = compare((answers, answers), (answers, answers), draws=5)
    page = tmp_path / "evaluation.html"
    page.write_text(render(result, title=ATTACK, compared=compared, against=ATTACK), encoding="utf-8")
    browser = Browser(tmp_path / "profile")
    try:
        for width in (1200, 390):
            browser.open(page, width)
            time.sleep(0.3)
            assert browser.complaints() == [] and browser.requests() == [page.as_uri()]
            assert browser.js("typeof window.hacked") == "undefined" and browser.js("document.images.length") == 0
            assert browser.js("document.scripts.length") == 0
            assert browser.js("document.documentElement.scrollWidth") == width
            assert browser.js("getComputedStyle(document.querySelector('.mark')).fill") != "rgb(0, 0, 0)"  # styled
        assert ATTACK in browser.js("document.querySelector('.lede').textContent")
        assert browser.js("document.querySelectorAll('svg').length") > 10
        for details in range(browser.js("document.querySelectorAll('details').length")):
            browser.js(f"document.querySelectorAll('details')[{details}].open = true")
        assert browser.js("document.documentElement.scrollWidth") == 390  # the confusion matrices scroll by themselves
    finally:
        browser.close()
