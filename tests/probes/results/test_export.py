"""The tables of a run: they agree with the results they come from, hold no text, and say which schema they follow."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from probes.results.export import NAMES, export
from probes.results.store import SCHEMA_VERSION, Run
from probes.results.summary import summarise
from tests.probes.worlds import post_result

RESULTS = tuple(post_result(s, cite=(s % 3,), invent=s == 2, language=("zh", "en")[s % 2]) for s in range(6))
RUN = Run({}, summarise(RESULTS, n_boot=100, draws=99), RESULTS)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    out = tmp_path_factory.mktemp("tables")
    assert [path.name for path in export(RUN, out)] == list(NAMES)
    return out


def test_units_are_the_maps_in_long_form(tables):
    table = pq.read_table(tables / "units.parquet")
    assert table.schema.metadata[b"schema_version"] == str(SCHEMA_VERSION).encode()
    rows = table.to_pylist()
    assert {row["schema_version"] for row in rows} == {SCHEMA_VERSION}
    for result in RESULTS:
        for a in result.attributions:
            own = [r for r in rows if (r["example_id"], r["method"], r["target"]) == (a.example_id, a.method, a.target)]
            clauses = [r for r in own if r["unit"] == "clause"]
            assert [(r["start"], r["end"]) for r in clauses] == list(result.units)
            np.testing.assert_allclose(
                [r["value"] for r in clauses], [a.char_values[x:y].sum() for x, y in result.units]
            )
            chars = [r["value"] for r in own if r["unit"] == "char"]
            np.testing.assert_array_equal(chars, a.char_values if a.unit == "char" else [])
            assert {r["converged"] for r in own} == {a.converged}
        cited = [r["cited"] for r in rows if r["example_id"] == result.id and r["unit"] == "clause"]
        assert 0 < np.mean(np.array(cited) > 0.5) < 1 and max(cited) <= 1


def test_checks_say_the_same_in_both_formats(tables):
    flat = [json.loads(line) for line in (tables / "checks.jsonl").read_text("utf-8").splitlines()]
    table = pq.read_table(tables / "checks.parquet")
    assert table.schema.metadata[b"schema_version"] == str(SCHEMA_VERSION).encode()
    assert table.to_pylist() == [{name: row[name] for name in table.column_names} for row in flat]
    assert sorted(table.column_names) == sorted(flat[0])
    found = {(row["example_id"], row["name"], row["method"]): row for row in flat}
    for result in RESULTS:
        report = result.evidence().report
        for check in report.checks:
            row = found[result.id, check.name, check.method]
            assert (row["value"], row["p"], row["n"], row["verdict"]) == (check.value, check.p, check.n, report.verdict)


def test_summary_csv_holds_the_headline(tables):
    rows = list(csv.DictReader(io.StringIO((tables / "summary.csv").read_text("utf-8"))))
    assert {row["schema_version"] for row in rows} == {str(SCHEMA_VERSION)}
    by_name = {(row["name"], row["method"]): row for row in rows}
    assert len(by_name) == len(rows)
    headline, summary = by_name["mass_ratio", "erase"], RUN.summary
    assert float(headline["value"]) == summary["mass_ratio"]["erase"]
    assert [float(headline["ci_low"]), float(headline["ci_high"])] == summary["mass_ratio_ci"]["erase"]
    assert float(headline["null"]) == summary["mass_ratio_null"]["erase"] and headline["n"] == "6"
    for name in ("excess", "cosine"):
        test = next(t for t in summary["tests"] if (t["check"], t["method"]) == (name, "ig"))
        assert [float(by_name[name, "ig"][key]) for key in ("p", "p_holm")] == [test["p"], test["p_holm"]]
    assert by_name["necessity", "erase"]["value"] == ""  # nothing measured is an empty field, not a zero
    assert int(by_name["verdict_supported", ""]["value"]) == summary["verdicts"]["supported"]


def test_no_table_holds_a_word(tables):
    for name in NAMES:
        data = (tables / name).read_bytes().decode("utf-8", "ignore")
        for result in RESULTS:
            assert result.post[:6] not in data and result.explanation[:6] not in data


def test_a_run_without_posts_has_empty_tables(tmp_path):
    export(Run({}, summarise((), n_boot=0, draws=9), ()), tmp_path)
    assert pq.read_table(tmp_path / "units.parquet").num_rows == 0
    assert pq.read_table(tmp_path / "checks.parquet").num_rows == 0


def test_the_docs_name_every_column(tables):
    docs = (Path(__file__).parents[3] / "docs" / "report.md").read_text("utf-8")
    for name in ("units.parquet", "checks.parquet"):
        assert f"`{', '.join(pq.read_table(tables / name).column_names)}`" in docs
    assert f"`{(tables / 'summary.csv').read_text('utf-8').splitlines()[0].replace(',', ', ')}`" in docs
