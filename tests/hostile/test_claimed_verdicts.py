"""Summaries of `probes` that say what their posts do not: whoever writes the digest too can write any verdict."""

import json
import shutil
from pathlib import Path

import pytest

from probes.results.cache import Cache, digest
from probes.results.store import SCHEMA_VERSION
from probes.results.summary import summarise
from tests.hostile.attack import refused, run
from tests.hostile.probes_files import edit
from tests.probes.worlds import post_result


@pytest.fixture(scope="module")
def nothing(tmp_path_factory):
    """A run whose explanations cite at random, as a stranger who knows how digests are made could hand it on."""
    place = tmp_path_factory.mktemp("nothing")
    results = [post_result(seed, cite=((seed * 7 + 2) % 6,), noise=0.3) for seed in range(8)]
    cache = Cache(place)
    names = [f"{at:032x}.json" for at in range(len(results))]
    for name, result in zip(names, results, strict=True):
        cache.write(name, result.to_dict())
    manifest = {
        "kind": "probes", "schema_version": SCHEMA_VERSION, "status": "done", "cache": names, "model": "m", "rows": 8,
        "skipped": [], "redact": False, "methods": ["ig", "erase"], "settings": {"seed": 20261130}, "versions": {},
        "limit": None, "n_boot": 60,
    }  # fmt: skip
    (place / "manifest.json").write_text(json.dumps(manifest))
    claim(place, json.loads(json.dumps(summarise(results, n_boot=60, seed=20261130))))
    return place


def claim(place: Path, summary: dict) -> None:
    (place / "summary.json").write_text(json.dumps(summary))
    edit(place / "manifest.json", summary=digest(summary))


def other(value, found):
    """The same in every method."""
    return dict.fromkeys(found, value)


SURE = [0.2, 0.4]
CLAIMS = {
    "a conclusion": (lambda s: {"conclusion": "supported"}, "conclusion is supported, and its posts give inconclusive"),
    "the other one": (lambda s: {"conclusion": "contradicted"}, "conclusion is contradicted, and its posts give"),
    "a p-value": (lambda s: {"p": other(0.0001, s["p"])}, "p is .*and its posts give"),
    "a conclusion with all it needs": (
        lambda s: {"conclusion": "supported", "excess_ci": other(SURE, s["p"]), "p_holm": other(0.0001, s["p"]),
                   "tests": [one | {"p": 0.0001, "p_holm": 0.0001} for one in s["tests"]]}, "excess_ci is"),
    "verdicts": (lambda s: {"verdicts": {"supported": 8, "contradicted": 0, "inconclusive": 0}}, "verdicts is"),
    "fewer by chance": (
        lambda s: {"verdicts_by_chance": {"supported": 0.0, "contradicted": 0.0}}, "verdicts_by_chance is"),
    "a share": (lambda s: {"mass_ratio": other(0.9, s["p"])}, "mass_ratio is"),
    "an interval": (lambda s: {"mass_ratio_ci": other(SURE, s["p"])}, "mass_ratio_ci is"),
    "less by length": (lambda s: {"mass_ratio_null": other(0.01, s["p"])}, "mass_ratio_null is"),
    "posts that speak": (lambda s: {"n_used": other(80, s["p"])}, "n_used is"),
    "an excess": (lambda s: {"excess": other(0.3, s["p"])}, "excess is"),
    "NaN for an excess": (lambda s: {"excess": other(None, s["p"])}, "excess is"),
    "no methods": (lambda s: {"excess": {}}, "excess is"),
    "a list of tests that is none": (lambda s: {"tests": [{"check": "x"}]}, "holds no run as this version writes it"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["check", "report"])
@pytest.mark.parametrize("attack", CLAIMS)
def test_a_summary_that_its_posts_do_not_bear(attack, command, nothing, tmp_path, capsys):
    changes, says = CLAIMS[attack]
    shutil.copytree(nothing, tmp_path / "run")
    true = json.loads((nothing / "summary.json").read_text("utf-8"))
    assert true["conclusion"] == "inconclusive"
    claim(tmp_path / "run", true | changes(true))
    refused(run(["probes", command, tmp_path / "run"], capsys), says)


def test_one_that_they_bear(nothing, capsys):
    for command in (["check", nothing], ["report", nothing], ["check", nothing, "--against", nothing]):
        assert run(["probes", *command], capsys).code == 0


def test_a_summary_of_an_earlier_version_of_few_posts(nothing, tmp_path, capsys):
    """It had p-values of fewer than five; and no manifest said how often the bootstrap drew."""
    results = [post_result(seed) for seed in range(3)]
    shutil.copytree(nothing, tmp_path / "run")
    for name, result in zip(("a" * 32, "b" * 32, "c" * 32), results, strict=True):
        Cache(tmp_path / "run").write(f"{name}.json", result.to_dict())
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))
    names = [f"{letter * 32}.json" for letter in "abc"]
    (tmp_path / "run" / "manifest.json").write_text(
        json.dumps({key: value for key, value in manifest.items() if key != "n_boot"} | {"cache": names})
    )
    summary = json.loads(json.dumps(summarise(results, n_boot=20, seed=3)))
    claim(tmp_path / "run", summary | {"p": other(0.25, summary["p"])})
    assert run(["probes", "check", tmp_path / "run"], capsys).code == 0
