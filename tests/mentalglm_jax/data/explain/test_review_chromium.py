"""The review form in a real browser: rated by keys, kept over a reload, downloaded, deaf to markup in posts."""

import json
import time

import pytest

from mentalglm_jax.data.explain.review import form_id, import_review, render_form
from mentalglm_jax.data.records import write_records
from tests.mentalglm_jax.data.explain.test_review import ATTACK, records
from tests.probes.report.test_page_chromium import BINARY, Browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARY is None, reason="no chromium on the PATH (Debian: apt-get install chromium)"),
]


@pytest.fixture
def browser(tmp_path):
    found = Browser(tmp_path / "profile")
    yield found
    found.close()


def press(browser, *keys):
    for key in keys:
        text = {"text": key} if len(key) == 1 else {}
        browser.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        browser.send("Input.dispatchKeyEvent", type="keyUp", key=key)


def test_rated_by_keys_kept_and_imported(browser, tmp_path):
    sample = records(3, post="帖子{}" + ATTACK, explanation=ATTACK)
    write_records(tmp_path / "sample.jsonl", sample)
    page = tmp_path / "review.html"
    page.write_text(render_form(sample, "en"), encoding="utf-8")
    for width in (1200, 390):
        browser.open(page, width)
        time.sleep(0.3)
        assert browser.complaints() == [] and browser.requests() == [page.as_uri()]
        assert browser.js("typeof window.hacked") == "undefined" and browser.js("document.images.length") == 0
        assert browser.js("document.documentElement.scrollWidth") == width
    assert browser.js("document.querySelector('#post').textContent") == sample[0].post

    browser.js("document.querySelector('#rater').focus()")
    press(browser, "A", "Escape")
    assert browser.js("document.querySelector('#rater').value") == "A"
    press(browser, "3", "2", "2", "1", "ArrowUp", "3")  # up: professionality again
    press(browser, "ArrowRight", "0", "0", "0", "0", "Backspace", "u")
    browser.open(page, 1200)
    assert browser.js("document.querySelector('#progress').textContent") == "1 / 3"
    downloaded = json.loads(browser.js("asJson()"))
    assert downloaded["form"] == form_id(sample) and downloaded["rater"] == "A"
    assert downloaded["ratings"]["r0"] == {
        "consistency": 3, "reliability": 2, "professionality": 3, "overall": 1
    }  # fmt: skip
    assert downloaded["ratings"]["r1"] == {"consistency": 0, "reliability": 0, "professionality": 0}
    (tmp_path / "a.json").write_text(json.dumps(downloaded), encoding="utf-8")
    (tmp_path / "b.csv").write_text(browser.js("asCsv()").replace('"A"', '"B"'), encoding="utf-8")
    result = import_review(tmp_path, [tmp_path / "a.json", tmp_path / "b.csv"])
    assert result["raters"] == ["A", "B"] and result["agreement"]["overall"]["items_rated_by_all"] == 1

    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "down"))
    press(browser, "c")
    assert browser.js("document.activeElement.id") == "comment"
    browser.js("document.querySelector('#json').click()")
    deadline = time.time() + 10
    while not (found := list((tmp_path / "down").glob("ratings-*-A.json"))) and time.time() < deadline:
        time.sleep(0.1)
    assert json.loads(found[0].read_text(encoding="utf-8")) == downloaded
