"""The site of the pages: it builds, a dead link fails it, it asks nobody for anything, and it works from the disk."""

import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from tests.probes.report.test_page_chromium import BINARY, Browser

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
EXTERNAL = re.compile(
    r"<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=\"(?:https?:)?//[^\"]*\"|url\(['\"]?(?:https?:)?//"
)


def built(directory: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` does after the pages are generated."""
    command = [sys.executable, "-P", "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", directory / "docs", ignore=shutil.ignore_patterns("reference"))
    shutil.copyfile(ROOT / "zensical.toml", directory / "zensical.toml")
    for package in ("mentalglm_jax", "probes"):
        (directory / package).symlink_to(ROOT / package)
    script = [sys.executable, "-P", ROOT / "scripts" / "docs_pages.py", "--out", directory / "docs" / "reference"]
    subprocess.run(script, check=True)
    return directory


@pytest.fixture(scope="module")
def site(source) -> Path:
    done = built(source)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "griffe" not in said and "arning" not in said, said
    return source / "build" / "site"


def test_every_page_is_built_and_in_the_list(source, site):
    nav = (source / "zensical.toml").read_text("utf-8")
    pages = {path.relative_to(source / "docs").with_suffix("") for path in (source / "docs").rglob("*.md")}
    assert {Path(name) for name in re.findall(r'"([\w/-]+)\.md"', nav)} == pages
    assert all((site / f"{page}.html").is_file() for page in pages)


def test_nothing_is_asked_of_another_server(site):
    found = {path.name: EXTERNAL.findall(path.read_text("utf-8")) for path in site.rglob("*.html")}
    assert len(found) > 30 and not {name: one for name, one in found.items() if one}
    assert not [path for path in site.rglob("*.css") if EXTERNAL.search(path.read_text("utf-8"))]


def test_public_names_and_keys_are_in_the_reference(site):
    import mentalglm_jax
    import probes

    for package in (mentalglm_jax, probes):
        page = (site / "reference" / f"api-{package.__name__}.html").read_text("utf-8")
        assert not [name for name in package.__all__ if not re.search(rf'id="[\w.]+\.{name}"', page)]
    assert "rope_theta" in (site / "reference" / "recipe.html").read_text("utf-8")


@pytest.mark.parametrize("link", ["nowhere.md", "faq.md#nowhere", "reference/recipe.md#nowhere"])
def test_a_dead_link_fails_the_build(source, site, link):
    page = source / "docs" / "faq.md"
    before = page.read_text("utf-8")
    page.write_text(f"{before}\n[dead]({link})\n", "utf-8")
    try:
        done = built(source)
    finally:
        page.write_text(before, "utf-8")
    assert done.returncode != 0 and "does not exist" in done.stdout + done.stderr


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BINARY is None:
        pytest.skip("no chromium on the PATH (Debian: apt-get install chromium)")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", ["index", "first-report", "report", "reference/recipe", "reference/api-probes"])
def test_a_page_fits_and_asks_for_nothing(site, browser, page, width, scheme):
    browser.open(site / f"{page}.html", width, scheme=scheme)
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert not [url for url in browser.requests() if not url.startswith(("file:", "data:", "about:", "blob:"))]
    assert not browser.complaints()
    red, green, blue = map(int, re.findall(r"\d+", browser.js("getComputedStyle(document.body).backgroundColor"))[:3])
    assert (red + green + blue > 384) == (scheme == "light")


FIELD = """[...document.querySelectorAll('*')].filter(one => one.shadowRoot)
    .map(one => one.shadowRoot.querySelector('input[aria-label=Search]')).find(one => one)"""


def test_the_search_works_from_the_disk(site, browser):
    """A key of a recipe is found, on the page of the keys."""
    browser.open(site / "index.html", 1280)
    browser.js("document.querySelector('.md-search__button').click()")
    awaited(browser, f"!!({FIELD})")
    browser.js(f"({FIELD}).focus()")
    browser.send("Input.insertText", text="lora_plus_ratio")
    awaited(browser, f"({FIELD}).getRootNode().textContent.includes('Keys of a recipe')")
    assert not [url for url in browser.requests() if not url.startswith(("file:", "data:", "about:", "blob:"))]


def awaited(browser, expression: str) -> None:
    for _ in range(1000):
        if browser.js(expression):
            return
        time.sleep(0.1)
    pytest.fail(f"never true: {expression}")


def test_the_configuration_loads_no_fonts():
    project = tomllib.loads((ROOT / "zensical.toml").read_text("utf-8"))["project"]
    assert project["theme"]["font"] is False and all(project["validation"].values())
