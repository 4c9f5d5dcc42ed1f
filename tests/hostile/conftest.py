"""Counts the attacks: every test item of this folder is one, but those of the harness itself."""

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
