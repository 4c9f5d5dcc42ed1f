"""The review form in a real browser: rated by keys, kept over a reload, downloaded, deaf to markup in posts."""

import json
import time
from dataclasses import replace

import pytest

from mentalglm_jax.data.explain.review import SCALES, form_id, import_review, read_ratings, render_form
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
    assert browser.js("document.querySelector('#post').textContent") == sample[0].post.replace("\u2028", "[U+2028]")

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
    deadline = time.time() + 100
    while not (found := list((tmp_path / "down").glob("ratings-*-A.json"))) and time.time() < deadline:
        time.sleep(0.1)
    assert json.loads(found[0].read_text(encoding="utf-8")) == downloaded


NAMES = ("__proto__", "constructor", "toString", "hasOwnProperty", "=1+1", "'=1", "''", "-1", "@x", "\t=1", " =1",
         "＝1", "007", "1e5", "TRUE", "MAR1", 'a,"b"\r\nc', "[/b]")  # fmt: skip


def test_ratings_of_any_id_come_back_by_both_files(browser, tmp_path):
    """Ids that JavaScript knows, and those that a spreadsheet would take for something else; kept over a reload."""
    sample = [replace(one, id=name) for one, name in zip(records(len(NAMES)), NAMES, strict=True)]
    write_records(tmp_path / "sample.jsonl", sample)
    page = tmp_path / "review.html"
    page.write_text(render_form(sample, "en"), encoding="utf-8")
    browser.open(page, 1200)
    assert browser.js("document.querySelector('#progress').textContent") == f"0 / {len(NAMES)}"
    browser.js("document.querySelector('#rater').focus()")
    press(browser, "=", "A", "Escape")
    for number in range(len(NAMES)):
        press(browser, *str(number % 4) * 4, "ArrowRight")
    browser.js("document.querySelector('#comment').value = '=HYPERLINK(1)'")
    browser.js("document.querySelector('#comment').dispatchEvent(new Event('input'))")
    assert browser.js("Object.keys(Object.prototype).length") == 0 and browser.complaints() == []
    browser.open(page, 1200)
    assert browser.js("document.querySelector('#progress').textContent") == f"{len(NAMES)} / {len(NAMES)}"
    (tmp_path / "a.json").write_text(browser.js("asJson()"), encoding="utf-8")
    sheet = browser.js("asCsv()")
    (tmp_path / "b.csv").write_text(sheet, encoding="utf-8", newline="")
    assert ',"\'=HYPERLINK(1)"' in sheet and ',"\'=1+1",' in sheet and ',"\'=A",' in sheet
    ids = [one.id for one in sample]
    for name in ("a.json", "b.csv"):
        found = read_ratings(tmp_path / name, form_id(sample), ids)
        assert found.rater == "=A" and found.comments == {"[/b]": "=HYPERLINK(1)"}
        assert found.scores == {one: dict.fromkeys(SCALES, n % 4) for n, one in enumerate(ids)}


def test_a_second_rater_neither_sees_nor_goes_on_with_the_first_ones_ratings(browser, tmp_path):
    """At one computer, in one tab; the name is asked first, and what an earlier version kept is of the name in it."""
    sample = records(3)
    page = tmp_path / "review.html"
    page.write_text(render_form(sample, "en"), encoding="utf-8")

    def named(name):
        browser.js("document.querySelector('#rater').focus()")
        browser.js("document.querySelector('#rater').value = ''")
        press(browser, *name, "Enter")

    def progress():
        return browser.js("document.querySelector('#progress').textContent")

    browser.open(page, 1200)
    assert browser.js("document.activeElement.id") == "rater" and browser.js("fieldsets.every(set => set.disabled)")
    press(browser, "Escape", "3", "3", "3", "3")
    assert progress() == "0 / 3" and "name or code first" in browser.js("document.querySelector('#saved').textContent")
    named("Ann")
    press(browser, "3", "3", "3", "3")
    assert progress() == "1 / 3" and not browser.js("fieldsets.some(set => set.disabled)")
    named("Bo")
    assert progress() == "0 / 3" and json.loads(browser.js("asJson()")) == {
        "form": form_id(sample), "rater": "Bo", "ratings": {}}  # fmt: skip
    press(browser, "1", "1", "1", "1", "ArrowRight", "1", "1", "1", "1")
    browser.open(page, 1200)  # in the same tab the name is known
    assert progress() == "2 / 3" and json.loads(browser.js("asJson()"))["rater"] == "Bo"
    browser.js("sessionStorage.clear()")
    browser.open(page, 1200)
    assert progress() == "0 / 3" and browser.js("document.querySelector('#rater').value") == ""
    named(" ann ")
    assert progress() == "1 / 3"
    assert json.loads(browser.js("asJson()"))["ratings"] == {sample[0].id: dict.fromkeys(SCALES, 3)}
    old = {"rater": "Cy", "at": 2, "ratings": {one.id: dict.fromkeys(SCALES, 2) for one in sample}}
    browser.js(f"localStorage.setItem('mentalglm-review-{form_id(sample)}', JSON.stringify({json.dumps(old)}))")
    browser.js("sessionStorage.clear()")
    browser.open(page, 1200)
    named("Dee")
    assert progress() == "0 / 3"
    named("Cy")
    assert progress() == "3 / 3" and json.loads(browser.js("asJson()"))["ratings"] == old["ratings"]
    assert browser.js(f"localStorage.getItem('mentalglm-review-{form_id(sample)}')") is None


class Window(Browser):
    """One more page of a browser that is there, with the same storage."""

    def __init__(self, browser):
        self._of = browser
        self._rest, self._count, self.events = b"", 0, []
        target = browser._send("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
        found = browser._send("Target.attachToTarget", {"targetId": target, "flatten": True}, None)
        self._session = found["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    @property
    def events(self):
        return self._of.events

    @events.setter
    def events(self, value):
        pass

    def _send(self, method, params, session):
        return self._of._send(method, params, session)

    def _next(self):
        return self._of._next()


def test_two_windows_of_one_rater_lose_nothing_of_each_other(browser, tmp_path):
    sample = records(4)
    page = tmp_path / "review.html"
    page.write_text(render_form(sample, "en"), encoding="utf-8")
    other = Window(browser)
    for window in (browser, other):
        window.open(page, 1200)
        window.js("document.querySelector('#rater').focus()")
        press(window, *"Ann", "Enter")
    press(browser, "3", "3", "3", "3", "ArrowRight")
    press(other, "ArrowRight", "2", "2", "2", "2", "ArrowRight", "1", "1", "1", "1")

    def shown(window, wanted):
        deadline = time.time() + 60
        while (found := window.js("document.querySelector('#progress').textContent")) != wanted:
            assert time.time() < deadline, found
            time.sleep(0.1)

    shown(browser, "3 / 4")  # without a key pressed there
    press(browser, "ArrowRight", "ArrowRight", "0", "0", "0", "0")
    shown(other, "4 / 4")
    press(other, "Backspace", "ArrowLeft", "3", "3", "3", "3")  # takes back the last scale of the third item
    shown(browser, "3 / 4")
    press(browser, "c", "x", "Escape")
    wanted = [dict.fromkeys(SCALES, value) for value in (3, 3, 1, 0)]
    del wanted[2]["overall"]
    wanted[3]["comment"] = "x"
    for window in (browser, other):
        deadline = time.time() + 60
        expected = {one.id: value for one, value in zip(sample, wanted, strict=True)}
        while (found := json.loads(window.js("asJson()"))["ratings"]) != expected:
            assert time.time() < deadline, found
            time.sleep(0.1)


def test_a_key_held_down_rates_one_scale(browser, tmp_path):
    sample = records(2)
    page = tmp_path / "review.html"
    page.write_text(render_form(sample, "en"), encoding="utf-8")
    browser.open(page, 1200)
    browser.js("document.querySelector('#rater').focus()")
    press(browser, *"Bo", "Enter")
    for _ in range(4):
        browser.send("Input.dispatchKeyEvent", type="keyDown", key="2", text="2", autoRepeat=_ > 0)
    browser.send("Input.dispatchKeyEvent", type="keyUp", key="2")
    assert json.loads(browser.js("asJson()"))["ratings"] == {sample[0].id: {SCALES[0]: 2}}


@pytest.mark.parametrize(
    ("language", "whose", "caption"),
    [
        ("en", "experts", "Label given by experts"),
        ("en", "model", "Label given by the model"),
        ("zh", "experts", "专家给出的标签"),
        ("zh", "model", "模型给出的标签"),
    ],
)
def test_the_caption_says_whose_label_it_is_and_the_footer_names_the_keys(browser, tmp_path, language, whose, caption):
    page = tmp_path / "review.html"
    page.write_text(render_form(records(1), language, whose), encoding="utf-8")
    browser.open(page, 1200)
    shown = browser.js("document.body.innerText")
    assert caption in shown and shown.count("专家给出" if language == "zh" else "given by experts") == (
        whose == "experts"
    )
    footer = browser.js("document.querySelector('footer').innerText")
    assert (
        all(key in footer for key in ("0–3", "↑", "Backspace")) and "object at" not in footer and "method" not in footer
    )
