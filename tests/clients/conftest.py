"""Everything here is marked ``clients`` and needs an environment of its own: `make test-clients`, `make test-vllm`."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder; outside of the two environments plain `pytest` skips them."""
    there = {name for name in ("lm_eval", "vllm") if importlib.util.find_spec(name) is not None}
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.clients)
            if not there:
                item.add_marker(pytest.mark.skip(reason="needs the clients: make test-clients, make test-vllm"))


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """Where `make test-clients` has put llama.cpp: converters/ and runtime/."""
    return Path(sys.prefix) / "llama.cpp"


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Keeps a measured figure for the terminal's summary; benchmarks/LOG.md has the last ones."""

    def keep(value: str) -> None:
        request.node.user_properties.append(("figure", value))

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each figure."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    for report in reports:
        for name, value in report.user_properties:
            if name == "figure":
                terminalreporter.write_line(f"{report.outcome} {report.nodeid.rpartition('::')[2]}: {value}")
