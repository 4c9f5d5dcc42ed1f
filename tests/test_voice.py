"""How pages and commands speak: short sentences, "cannot" in one word, no word that only we know, short pages."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests.hostile.commands import ALL as COMMANDS
from tests.hostile.commands import IDS
from tests.test_command_lines import leaf

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
PAGES += [
    ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "notebooks/README.md")
]
WRITTEN_BY_A_COMMAND = ("validation.md", "architectures.md", "leaderboard.md")  # and docs/reference/, which is not kept
MOST_LINES, MOST_WORDS = 150, 30
# What only those say who have read the code; the page about the architecture may.
JARGON = re.compile(r"\b(rooms?|walls?|houses?)\b", re.IGNORECASE)
SPELT_IN_TWO = re.compile(r"\bcan not\b(?! only)", re.IGNORECASE)
SOURCES = [
    path
    for folder in ("mentalglm_jax", "probes", "scripts", "notebooks", "configs")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".pyi", ".html", ".js", ".yaml", ".ipynb", ".sh") and "assets" not in path.parts
]


def prose(page: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every paragraph, item, heading and cell; a piece of code is one word."""
    for token in MarkdownIt("commonmark").enable("table").parse(page):
        if token.type == "inline":
            words = []
            for child in token.children or ():
                words.append({"code_inline": "code", "softbreak": " ", "hardbreak": " "}.get(child.type, child.content))
            yield (token.map or [0])[0] + 1, "".join(words)


def too_long(text: str) -> list[str]:
    """Sentences of more than ``MOST_WORDS`` words."""
    found = re.split(r"(?<=[.!?])[\")”’*]*\s+", text)
    return [one for one in found if len(one.split()) > MOST_WORDS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_is_read_in_one_sitting(page: Path):
    text = page.read_text("utf-8")
    if page.name not in (*WRITTEN_BY_A_COMMAND, "CHANGELOG.md"):
        assert len(text.splitlines()) <= MOST_LINES, "split it"
    assert not [(line, one) for line, words in prose(text) for one in too_long(words)], "two sentences do"
    assert not SPELT_IN_TWO.findall(text)
    if page.name != "architecture.md":
        assert not [(line, words) for line, words in prose(text) if JARGON.search(words)]


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 100 and len(text.split()) <= 600


def test_cannot_is_one_word_in_the_sources():
    assert len(SOURCES) > 150
    assert not [str(path) for path in SOURCES if SPELT_IN_TWO.search(path.read_text("utf-8"))]


@pytest.mark.parametrize(("entry", "command"), COMMANDS, ids=IDS)
def test_the_help_of_a_command_is_plain(entry: str, command: str):
    found = leaf(entry, command)
    for text in (found.help or "", *(one.help or "" for one in found.params)):
        assert not too_long(" ".join(text.split())) and not JARGON.search(text) and not SPELT_IN_TWO.search(text), text


def test_the_rules_would_notice():
    assert too_long("word " * 31 + "end.") and not too_long("word " * 29 + "end. And more.")
    assert JARGON.search("no room") and not JARGON.search("roomy") and SPELT_IN_TWO.search("It can not.")
    assert [words for _, words in prose("| a | `b c` d |\n|---|---|\n| e | f |")] == ["a", "code d", "e", "f"]
