"""Summaries of `probes` that say what their posts do not: whoever writes the digest too can write any verdict."""

import json
import shutil
from pathlib import Path

import pytest

from probes.errors import ProbeInputError
from probes.results.cache import Cache, digest
from probes.results.store import SCHEMA_VERSION
from probes.results.summary import summarise
from probes.suite import run_suite
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
    "a list of tests that is none": (lambda s: {"tests": [{"check": "x"}]}, "tests is"),
    "fewer tests, so that Holm asks less": (
        lambda s: {"tests": s["tests"][:1], "p_holm": {s["tests"][0]["method"]: s["tests"][0]["p"]}}, "tests is"),
    "a p-value after Holm": (lambda s: {"p_holm": other(0.0001, s["p_holm"])}, "p_holm is"),
    "a p-value below nothing": (lambda s: {"p": other(-0.001, s["p"])}, "p is"),
    "beside other posts": (lambda s: {"p_position": other(0.0001, s["p"])}, "p_position is"),
    "verdicts of a label": (
        lambda s: {"by_label": [one | {"verdicts": {"supported": 99}} for one in s["by_label"]]}, "by_label is"),
    "more authors": (lambda s: {"n_users": 80}, "n_users is"),
    "a correlation": (lambda s: {"pearson": other(0.99, s["p"])}, "pearson is"),
    "a key less": (lambda s: {"labels": None}, "labels is"),
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


def test_p_values_of_few_posts_are_not_taken_either(nothing, tmp_path, capsys):
    """Nor where the manifest does not say how often the bootstrap drew."""
    results = [post_result(seed) for seed in range(3)]
    shutil.copytree(nothing, tmp_path / "run")
    names = [f"{letter * 32}.json" for letter in "abc"]
    for name, result in zip(names, results, strict=True):
        Cache(tmp_path / "run").write(name, result.to_dict())
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))
    del manifest["n_boot"]
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest | {"cache": names}))
    summary = json.loads(json.dumps(summarise(results, seed=20261130)))
    claim(tmp_path / "run", summary)
    assert run(["probes", "check", tmp_path / "run"], capsys).code == 0
    claim(tmp_path / "run", summary | {"p": other(0.25, summary["p"])})
    refused(run(["probes", "check", tmp_path / "run"], capsys), "p is")


@pytest.mark.parametrize("asked", [{"seed": -1}, {"seed": 1 << 63}, {"n_boot": 100_001}], ids=repr)
def test_what_could_not_be_made_again_is_not_begun(asked, tmp_path):
    with pytest.raises(ProbeInputError, match="seed is 0 to 9223372036854775807, n_boot 0 to 100000"):
        run_suite(None, [], tmp_path / "out", **asked)
