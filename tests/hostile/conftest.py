"""Counts the attacks: every test item of this folder is one, but those of the harness itself."""

from pathlib import Path

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """``hostile: 231 attacks, 231 held`` at the end of a run that had any."""
    reports = [
        (outcome, report)
        for outcome in ("passed", "failed", "error")
        for report in terminalreporter.stats.get(outcome, ())
        if getattr(report, "nodeid", "").startswith("tests/hostile/")
        and "test_harness" not in report.nodeid
        and getattr(report, "when", "call") == "call"
    ]
    if reports:
        held = sum(outcome == "passed" for outcome, _ in reports)
        terminalreporter.write_line(f"hostile: {len(reports)} attacks, {held} held")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which every command that writes has something to write; to be copied."""
    from tests.hostile.world import make_world

    directory = tmp_path_factory.mktemp("template")
    make_world(directory)
    return directory
