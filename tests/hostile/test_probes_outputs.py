"""Where `probes run` may write: into a directory of its own, over nothing that is not a run's, through no link. And
rows that come through a pipe are refused with what to do."""

import csv
import io
import os
import re

import pytest

from probes.errors import ProbeInputError
from probes.probe import Probe
from probes.ranking import _forget, rank
from probes.results.cache import Cache
from probes.results.export import NAMES, summary_csv
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


def through_a_pipe(data: bytes) -> str:
    """What `<(command)` gives: a name of an open pipe, which holds what somebody wrote to it."""
    reads, writes = os.pipe()
    assert os.write(writes, data) == len(data)  # all of it fits
    os.close(writes)
    return f"/dev/fd/{reads}"


@pytest.mark.parametrize("command", ["probes run", "mentalglm generate", "mentalglm data inspect"])
def test_rows_that_come_through_a_pipe(place, capsys, command):  # noqa: F811
    name = through_a_pipe((place / "rows.jsonl").read_bytes()[:1000])
    arguments = {
        "probes run": ["probes", "run", place / "model", "--in", name, "--out", place / "out"],
        "mentalglm generate": ["mentalglm", "generate", place / "model", "--in", name, "--out", place / "out"],
        "mentalglm data inspect": ["mentalglm", "data", "inspect", name],
    }[command]
    outcome = run(arguments, capsys)
    os.close(int(name.rpartition("/")[2]))
    refused(outcome, rf"{name}: .* pipe.* <\(command\) does, has to be saved to a file first")


@pytest.mark.parametrize("where", ["pairs.jsonl.maps", "pairs.jsonl.maps/cache"])
def test_a_link_in_place_of_the_maps_of_a_ranking(where, tmp_path):
    """They are deleted when all is done, and so would be what is behind it."""
    probe_without_model = object.__new__(Probe)  # it is said before the first row is looked at
    (tmp_path / "mine" / "cache").mkdir(parents=True)
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).symlink_to(tmp_path / "mine")
    with pytest.raises(ProbeInputError, match=rf"{where}: is a link; maps are kept, and deleted, in a directory"):
        rank(probe_without_model, [], tmp_path / "pairs.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "mine")  # named by the user, and kept
    with pytest.raises(ProbeInputError, match="none of the 0 rows"):
        rank(probe_without_model, [], tmp_path / "pairs.jsonl", maps=tmp_path / "link")


def test_files_of_others_among_the_maps_stay(tmp_path):
    cache = Cache(tmp_path)
    cache.write(name := cache.name(["a post"]), {"maps": []})
    (tmp_path / "cache" / "notes.json").write_text("mine")
    _forget(cache)
    assert [path.name for path in cache.directory.iterdir()] == ["notes.json"] and name != "notes.json"


NO_FORMULA = ("supported", "3;x", "a-b", "x; y", "")
FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\n-1", " =1", "＝1", "－1", "x;=1+1", "x; @A1", 'a;"=1+1',
            "x\n\u3000＋1", "x\r\n=1", "=1;=2")  # fmt: skip


@pytest.mark.parametrize("name", [*NO_FORMULA, *FORMULAS], ids=repr)
def test_no_cell_of_a_summary_is_a_formula(name):
    """Nor begins one inside a cell, where ; stands between columns."""
    numbers = dict.fromkeys(("fabricated_quote_rate", "n_quotes", "abstained", "n"), 0)
    made = summary_csv(numbers | {"tests": [], "verdicts": {name: 1}, "verdicts_by_chance": {}, "n_used": {},
                                  "mass_ratio": {name: 0.5}})  # fmt: skip
    methods = {row["method"] for row in csv.DictReader(io.StringIO(made, newline=""))}
    (cell,) = methods - {"", "erase"} or {""}
    parts = [part.lstrip(' "\u3000') for part in re.split(r"[;\t\r\n]", cell)]
    assert not [part for part in parts if part.startswith(tuple("=+-@＝＋－＠"))]
    assert cell.replace("'", "") == name and (cell == name) == (name in NO_FORMULA)
