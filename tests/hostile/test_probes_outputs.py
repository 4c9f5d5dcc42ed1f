"""Where `probes run` may write: into a directory of its own, over nothing that is not a run's, through no link. And
rows that come through a pipe are refused with what to do."""

import os
import threading

import pytest

from probes.results.export import NAMES
from tests.hostile.attack import refused, run
from tests.hostile.probes_files import clean, place, probe  # noqa: F401
from tests.hostile.world import contents


@pytest.mark.parametrize("name", [*NAMES, "summary.json", "report.html"])
def test_a_file_that_is_not_a_run_s_is_not_replaced(place, capsys, name):  # noqa: F811
    (place / "out").mkdir()
    (place / "out" / name).write_text("mine")
    refused(probe(place, capsys), rf"out/{name}: would be replaced, but .*out is not a run's; give another --out")
    assert contents(place / "out") == {name: b"mine"}


@pytest.mark.parametrize("name", ["cache", "private"])
def test_no_post_is_kept_behind_a_link(place, capsys, name):  # noqa: F811
    (place / "elsewhere").mkdir()
    (place / "out").mkdir()
    (place / "out" / name).symlink_to(place / "elsewhere")
    refused(probe(place, capsys, *["--redact"] * (name == "private")), rf"out/{name}: is a link; posts are kept in the")
    assert contents(place / "elsewhere") == {}


def through_a_pipe(data: bytes) -> tuple[str, threading.Thread]:
    """What `<(command)` gives: a name of an open pipe that somebody writes to."""
    reads, writes = os.pipe()

    def write() -> None:
        with open(writes, "wb") as file:
            file.write(data)

    thread = threading.Thread(target=write)
    thread.start()
    return f"/dev/fd/{reads}", thread


@pytest.mark.parametrize("command", ["probes run", "mentalglm generate", "mentalglm data inspect"])
def test_rows_that_come_through_a_pipe(place, capsys, command):  # noqa: F811
    name, thread = through_a_pipe((place / "rows.jsonl").read_bytes()[:1000])
    arguments = {
        "probes run": ["probes", "run", place / "model", "--in", name, "--out", place / "out"],
        "mentalglm generate": ["mentalglm", "generate", place / "model", "--in", name, "--out", place / "out"],
        "mentalglm data inspect": ["mentalglm", "data", "inspect", name],
    }[command]
    outcome = run(arguments, capsys)
    os.close(int(name.rpartition("/")[2]))
    thread.join()
    refused(outcome, rf"{name}: .* pipe.* <\(command\) does, has to be saved to a file first")
