"""Fenced blocks of Markdown pages, and what a comment in front of one says about running it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "notebooks/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SHELL = ("", "sh", "bash", "console")  # a block that names no language is a shell block
_MARK = re.compile(r"<!-- (not run|in order): (.+?) -->")


@dataclass(frozen=True)
class Block:
    """One fenced block. ``mark``: what the comment right before it says of running it, or None."""

    page: Path
    line: int
    language: str
    text: str
    mark: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """Lines of a shell block: comments dropped, continued lines joined; of a console block what follows "$ "."""
        text = self.text.replace("\\\n", " ")
        lines = [line.strip() for line in text.splitlines()]
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    """All of a page, in order.

    Raises:
        AssertionError: an indented block of code, which names no language and takes no comment.
    """
    found: list[Block] = []
    mark = None
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8")):
        assert token.type != "code_block", f"{page.name}:{token.map[0] + 1}: indented; fence it"
        if token.type == "fence":
            found.append(Block(page, token.map[0] + 1, token.info.partition(" ")[0], token.content, mark))
        comment = _MARK.fullmatch(token.content.strip()) if token.type == "html_block" else None
        mark = comment[2] if comment else None
    return found


ALL = [block for page in PAGES for block in blocks(page)]
