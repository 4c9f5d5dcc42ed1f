"""The page in a real browser: it draws, it reacts, it fits a telephone, and nothing in a post can run or call out."""

import base64
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probes.report.page import write_report
from probes.results.store import Run
from probes.results.summary import summarise
from tests.probes.report.test_page import ATTACKS, MANIFEST, hostile
from tests.probes.worlds import post_result

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARY is None, reason="no chromium on the PATH (Debian: apt-get install chromium)"),
]
QUIET = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", *QUIET.split(), "--hide-scrollbars", "--remote-debugging-pipe"]


class Browser:
    """A page driven over the DevTools pipe: file descriptors 3 and 4 of the browser, messages ended by a zero byte."""

    def __init__(self, profile: Path) -> None:
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        # bash moves the descriptors: a child of subprocess may not have 3 and 4 chosen for it
        line = f'exec "$0" "$@" 3<&{commands} 4>&{answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", line, str(BINARY), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._rest, self._count, self.events = b"", 0, []
        target = self._send("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
        self._session = self._send("Target.attachToTarget", {"targetId": target, "flatten": True}, None)["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._send(method, params, self._session)

    def _send(self, method: str, params: dict[str, Any], session: str | None) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self._read, 1 << 16)
            assert chunk, "the browser went away"
            self._rest += chunk
        raw, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(raw)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, path: Path, width: int, media: str = "", scheme: str = "light") -> None:
        self.events.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)
        self.send("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()

    def js(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> bytes:
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 8000), "scale": 1}
        data = base64.b64decode(self.send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"])
        path.write_bytes(data)
        return data

    def complaints(self) -> list[dict[str, Any]]:
        """Console messages, exceptions, log entries (policy violations among them) since ``open``."""
        self.js("1")  # events sent before this answer are in
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self._send("Browser.close", {}, None)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    results = tuple(
        post_result(s, k=4 + s % 4, cite=((s // 2) % 3,), language=("zh", "en")[s % 2], invent=s % 4 == 0)
        for s in range(8)
    )
    run = Run(MANIFEST, summarise(results, n_boot=200, draws=199), results)
    return write_report(run, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def attack(tmp_path_factory) -> Path:
    """Every attack in every place, a right-to-left override, and a post of 10,000 characters without a space."""
    script = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    posts = [*ATTACKS, script, "\u202eabc\u2066" * 9, "长" * 10_000, "W" * 3000, "e" + "\u0301" * 300]
    results = []
    for i, text in enumerate(posts):
        one = hostile(f"我{text}你", f"“{text[:40]}”和“{script}”", label=script, label_text=script)
        noisy = np.random.default_rng(i).normal(size=one.length)
        maps = tuple(dataclasses.replace(a, example_id=f"x{i}", char_values=noisy) for a in one.attributions)
        results.append(dataclasses.replace(one, id=f"x{i}", attributions=maps))
    run = Run(MANIFEST | {"model": script}, summarise(results, n_boot=0, draws=9), tuple(results))
    return write_report(run, tmp_path_factory.mktemp("attack") / "report.html")


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_draws_without_a_word_of_complaint(browser, report, tmp_path, width, scheme):
    browser.open(report, width, scheme=scheme)
    assert browser.complaints() == []
    assert browser.requests() == [report.as_uri()]
    assert browser.js("document.documentElement.scrollWidth") == width
    assert len(browser.screenshot(tmp_path / "page.png")) > 100_000
    dark = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(20, 24, 29)") == (scheme == "dark")


def test_nothing_in_a_post_runs_or_calls_out(browser, attack):
    for width in (1200, 390):
        browser.open(attack, width)
        time.sleep(0.3)
        assert browser.js("typeof window.hacked") == "undefined"
        assert browser.complaints() == [] and browser.requests() == [attack.as_uri()]
        assert browser.js("document.documentElement.scrollWidth") == width
        assert browser.js("document.images.length") == 0
        assert browser.js("document.querySelectorAll('script').length") == 1


def test_the_policy_would_stop_what_got_through(browser, report):
    browser.open(report, 1200)
    browser.js("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 1\">')")
    browser.js(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s)"
    )
    for _ in range(1000):
        if found := any("Content Security Policy" in json.dumps(event) for event in browser.complaints()):
            break
        time.sleep(0.1)
    assert found and browser.js("typeof window.hacked") == "undefined"


def test_a_cited_phrase_lights_its_source(browser, report):
    browser.open(report, 1200)
    lit = "[...document.querySelectorAll('.lit')].map(n => n.textContent)"
    browser.js("window.phrase = document.querySelector('.expl .cite[data-cites]'); phrase.focus()")
    words = browser.js("phrase.textContent")
    found = browser.js(lit)
    assert found and set(found) == {words} and len(found) >= 2  # the phrase and its place in the post
    browser.js("phrase.blur()")
    assert browser.js(lit) == []
    browser.js("phrase.scrollIntoView({behavior: 'instant', block: 'center'})")
    box = browser.js("(r => [r.x + 3, r.y + 5])(phrase.getClientRects()[0])")
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert browser.js(lit) == found
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert browser.js(lit) == []


def test_a_cited_phrase_shows_its_own_saliency(browser, report):
    browser.open(report, 1200)
    browser.js(
        "window.phrase = document.querySelector('.expl .cite[data-cites]'); window.card = phrase.closest('article')"
    )
    browser.js("window.source = card.querySelector('.source'); window.hint = card.querySelector('.hint')")
    before, rest = browser.js("source.dataset.show"), browser.js("hint.textContent")
    browser.js("phrase.focus()")
    assert browser.js("source.dataset.show") == "phrase" and browser.js("hint.textContent") != rest
    cited = browser.js("[...source.querySelectorAll('[data-cites] [data-now=\"5\"]')].map(n => n.textContent).join('')")
    assert cited == browser.js("phrase.textContent")
    shaded = "[...source.querySelectorAll('[data-now]')].map(n => getComputedStyle(n).backgroundColor)"
    assert "rgba(27, 94, 158, 0.52)" in browser.js(shaded)
    browser.js("phrase.blur()")
    assert browser.js("source.dataset.show") == before and browser.js(shaded) == []
    assert browser.js("hint.textContent") == rest


CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const parse = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = (c) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = c.slice(0, 3).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.textContent.trim() || parent.closest('script, [aria-hidden=true], svg')) continue;
    if (!parent.getClientRects().length) continue;
    const chain = [];
    for (let up = parent; up; up = up.parentElement) chain.unshift(parse(getComputedStyle(up).backgroundColor));
    const back = chain.reduce((below, top) => over(top, below), [255, 255, 255, 1]);
    const [a, b] = [light(over(parse(getComputedStyle(parent).color), back)), light(back)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found[`${parent.tagName}.${parent.className}`] = ratio.toFixed(2);
  }
  return JSON.stringify(found);
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_has_contrast(browser, report, scheme):
    browser.open(report, 1200, scheme=scheme)
    browser.js("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    for shown in ("document.body", "document.querySelectorAll('.expl .cite').forEach((node) => node.focus())"):
        browser.js(shown)
        assert json.loads(browser.js(CONTRAST)) == {}  # WCAG 2.2 AA: 4.5 to 1


def test_everything_is_reached_with_the_keyboard(browser, report):
    browser.open(report, 1200)
    seen = []
    for _ in range(60):
        for kind in ("keyDown", "keyUp"):
            browser.send("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        seen.append(browser.js("document.activeElement.tagName + '.' + document.activeElement.className"))
    assert seen[0] == "A.skip"
    for wanted in ("SUMMARY.", "BUTTON.", "A.", "INPUT.", "DIV.text source outlined", "SPAN.cite lit"):
        assert wanted in seen, (wanted, seen)


def test_layers_switch_for_one_post_and_for_all(browser, report):
    browser.open(report, 1200)
    shades = (
        "(card => [...card.querySelectorAll('.source span')].map(n => getComputedStyle(n).backgroundColor).join())"
        "(document.querySelector('#post-{}'))"
    )
    click = "document.querySelector('#post-1 input[value=\"{}\"]').click()"
    label, other = browser.js(shades.format(1)), browser.js(shades.format(2))
    browser.js(click.format("explanation"))
    explanation = browser.js(shades.format(1))
    browser.js(click.format("erase"))
    erased = browser.js(shades.format(1))
    browser.js(click.format("none"))
    plain = browser.js(shades.format(1))
    assert len({label, explanation, erased, plain}) == 4 and set(plain.split("rgba")) <= {
        "",
        "(0, 0, 0, 0),",
        "(0, 0, 0, 0)",
    }
    assert browser.js(shades.format(2)) == other
    outline = "getComputedStyle(document.querySelector('#post-2 .source [data-cites]')).outlineStyle"
    assert browser.js(outline) == "solid"
    browser.js("document.querySelector('#posts > .panel input[type=checkbox]').click()")
    assert browser.js(outline) == "none"
    browser.js("document.querySelector('#posts > .panel input[value=none]').click()")
    assert browser.js(shades.format(2)) != other


def test_the_table_sorts(browser, report):
    browser.open(report, 1200)
    shares = "[...document.querySelectorAll('.sortable tbody tr')].map(r => Number(r.cells[3].dataset.v))"
    button = "document.querySelectorAll('.sortable th button')[3]"
    browser.js(f"{button}.click()")
    assert browser.js(shares) == sorted(browser.js(shares), reverse=True)
    browser.js(f"{button}.click()")
    assert browser.js(shares) == sorted(browser.js(shares))
    assert browser.js(f"{button}.closest('th').getAttribute('aria-sort')") == "ascending"


def test_print_shows_everything_and_no_controls(browser, report, attack):
    browser.open(report, 1000, media="print")
    browser.js("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.js("[...document.querySelectorAll('details')].every((node) => node.open)")
    browser.js("window.dispatchEvent(new Event('afterprint'))")
    assert not browser.js("[...document.querySelectorAll('details')].some((node) => node.open)")
    assert browser.js("(n => n.scrollHeight <= n.clientHeight + 1)(document.querySelector('.tall'))")
    assert browser.js("getComputedStyle(document.querySelector('.switch')).display") == "none"
    browser.open(attack, 1000, media="print")
    assert browser.js("[...document.querySelectorAll('.text')].every(n => n.scrollHeight <= n.clientHeight + 1)")
