"""A run as tables, for other programs: JSONL to read and diff, Parquet to compute with, CSV for a spreadsheet.

========================= ============================================================================================
``attributions.jsonl``    one line per map: every field of ``model.Attribution``
``units.parquet``         long: one row per post, method, target and unit. Every map on the clauses of its post (where
                          maps are compared); maps that live on characters on those too. ``unit`` says which.
``checks.jsonl, .parquet`` one row per check of one post, with its null
``summary.csv``           one row per number of the data set and method, with interval, null and p
========================= ============================================================================================

Every row says ``schema_version``. No table holds a word of a post or an explanation: units and citations are character
offsets, so a redacted run and an open one export the same columns. ``docs/report.md`` explains every column.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.checks.crosscheck import Evidence, char_mask, unit_sums
from probes.files import write_bytes, write_jsonl
from probes.records import Attribution
from probes.results.posts import PostResult
from probes.results.store import SCHEMA_VERSION, Run

if TYPE_CHECKING:
    import pyarrow as pa

NAMES = ("attributions.jsonl", "units.parquet", "checks.jsonl", "checks.parquet", "summary.csv")
# Numbers of a summary that are kept per method: name -> (interval, null) under which keys.
_PER_METHOD: dict[str, tuple[str | None, str | None]] = {
    "mass_ratio": ("mass_ratio_ci", "mass_ratio_null"),
    "excess": ("excess_ci", None),
    "auroc_clause": ("auroc_clause_ci", None),
    "cosine": ("cosine_ci", "cosine_mismatched"),
    "pearson": ("pearson_ci", None),
    "cue_auroc": ("cue_auroc_ci", None),
    "decoy_auroc": ("decoy_auroc_ci", None),
}
_SUMMARY = ("schema_version", "name", "method", "value", "ci_low", "ci_high", "null", "p", "p_holm", "n")
# The wide signs count in East Asian settings; ; stands between cells in much of Europe.
_COMPUTES = re.compile(r"""(?:^|(?<=[;\t\r\n]))(?=["\s]*[=+\-@＝＋－＠])""")
_POSTS_PER_GROUP = 256  # posts whose rows are held in memory at a time


def export(run: Run, out: str | Path) -> list[Path]:
    """Writes every table of a run (``NAMES``) into a directory, each file atomically.

    Raises:
        ProbeError: a file cannot be written.
    """
    out, private = Path(out), not run.manifest.get("redact")
    evidence = run.evidence or tuple(result.evidence() for result in run.results)
    checks = check_rows(run.results, evidence)
    maps = ({"schema_version": SCHEMA_VERSION} | a.to_dict() for r in run.results for a in r.attributions)
    write_jsonl(out / "attributions.jsonl", maps, private)
    write_bytes(out / "units.parquet", units_parquet(run.results), private)
    write_jsonl(out / "checks.jsonl", checks, private)
    write_bytes(out / "checks.parquet", checks_parquet(checks), private)
    write_bytes(out / "summary.csv", summary_csv(run.summary).encode("utf-8"))
    return [out / name for name in NAMES]


def check_rows(results: Sequence[PostResult], evidence: Sequence[Evidence]) -> list[dict[str, Any]]:
    """One flat row per check, for checks.jsonl and checks.parquet."""
    rows = []
    for result, found in zip(results, evidence, strict=True):
        head = {"schema_version": SCHEMA_VERSION, "example_id": result.id, "task": result.task, "label": result.label}
        for check in found.report.checks:
            low, high = check.ci or (None, None)
            plain = {key: value for key, value in check.to_dict().items() if key not in ("ci", "inputs", "draws")}
            shown = {"verdict": found.report.verdict, "ci_low": low, "ci_high": high, "inputs": list(check.inputs)}
            rows.append(head | plain | shown)
    return rows


def checks_parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    """``check_rows`` as one Parquet file."""
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    texts = ("example_id", "task", "label", "verdict", "name", "method", "status")
    numbers = ("value", "null_mean", "null_q05", "null_q95", "p", "ci_low", "ci_high")
    schema = pa.schema(
        [
            ("schema_version", pa.int16()),
            *((name, text) for name in texts),
            *((name, number) for name in numbers),
            ("n", pa.int64()),
            ("inputs", pa.list_(text)),
        ],
        metadata={"schema_version": str(SCHEMA_VERSION)},
    )
    return _parquet(schema, iter([pa.Table.from_pylist(list(rows), schema=schema)]))


def units_parquet(results: Sequence[PostResult]) -> bytes:
    """Every map of every post in long form (see the top) as one Parquet file."""
    import pyarrow as pa

    names = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema(
        [
            ("schema_version", pa.int16()),
            *((name, names) for name in ("example_id", "task", "label", "method", "target", "unit")),
            *((name, pa.int32()) for name in ("index", "start", "end")),
            *((name, pa.float64()) for name in ("value", "cited")),
            ("converged", pa.bool_()),
            ("model_fp", names),
        ],
        metadata={"schema_version": str(SCHEMA_VERSION)},
    )

    def tables() -> Iterator[pa.Table]:
        for start in range(0, len(results), _POSTS_PER_GROUP):
            columns: dict[str, list[np.ndarray]] = {field.name: [] for field in schema}
            for result in results[start : start + _POSTS_PER_GROUP]:
                mask = char_mask([s for c in result.citations for s in c.post_char], result.length)
                for a in result.attributions:
                    for block in _unit_columns(result, a, mask):
                        for name, values in block.items():
                            columns[name].append(values)
            arrays = [
                pa.array(np.concatenate(columns[f.name]).tolist() if columns[f.name] else [], type=f.type)
                for f in schema
            ]
            yield pa.Table.from_arrays(arrays, schema=schema)

    return _parquet(schema, tables())


def _unit_columns(result: PostResult, a: Attribution, mask: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """The rows of one map as columns: on clauses, and on characters where the map lives there."""
    levels = [("clause", tuple(result.units), unit_sums(a.char_values, result.units))]
    if a.unit != "clause":
        levels.append((a.unit, a.unit_spans, a.values))
    for unit, spans, values in levels:
        size = len(spans)
        edges = np.array(spans, dtype=np.int64).reshape(size, 2)
        constant = {
            "schema_version": SCHEMA_VERSION,
            "example_id": result.id,
            "task": result.task,
            "label": result.label,
            "method": a.method,
            "target": a.target,
            "unit": unit,
            "converged": a.converged,
            "model_fp": a.model_fp,
        }
        block = {name: np.full(size, value, dtype=object) for name, value in constant.items()}
        block |= {"index": np.arange(size), "start": edges[:, 0], "end": edges[:, 1], "value": values}
        block["cited"] = unit_sums(mask.astype(np.float64), spans) / np.maximum(edges[:, 1] - edges[:, 0], 1)
        yield block


def _parquet(schema: pa.Schema, tables: Iterator[pa.Table]) -> bytes:
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema) as writer:
        for table in tables:
            writer.write_table(table)
    return sink.getvalue()


def summary_csv(summary: dict[str, Any]) -> str:
    """The numbers of ``summary.json`` as one table; an empty field where there is nothing to measure."""
    rows: list[tuple[Any, ...]] = []

    tests = {(test["check"], test["method"]): test for test in summary["tests"]}

    def add(name: str, value: Any, n: Any, method: str = "", ci: Any = None, null: Any = None) -> None:
        (low, high), test = ci or (None, None), tests.get((name, method), {})
        rows.append(
            (SCHEMA_VERSION, name, method, value, low, high, null, test.get("p"), test.get("p_holm"), test.get("n", n))
        )

    for name, keys in _PER_METHOD.items():
        for method, value in summary.get(name, {}).items():
            ci, null = (summary.get(key, {}).get(method) if key else None for key in keys)
            add(name, value, summary["n_used"].get(method), method, ci, null)
    for name in ("necessity", "sufficiency"):
        add(name, summary.get(name), None, "erase", summary.get(f"{name}_ci"), summary.get(f"{name}_null"))
    add("fabricated_quote_rate", summary["fabricated_quote_rate"], summary["n_quotes"])
    add("abstained", summary["abstained"], summary["n"])
    for verdict, count in summary["verdicts"].items():
        add(f"verdict_{verdict}", count, summary["n"], null=summary["verdicts_by_chance"].get(verdict))
    sink = io.StringIO()
    writer = csv.writer(sink)
    writer.writerows([_SUMMARY, *([_cell(value) for value in row] for row in rows)])
    return sink.getvalue()


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would compute gets a ``'`` before it: also behind spaces, and behind what separates cells
    or lines somewhere inside it."""
    return _COMPUTES.sub(r"\g<0>'", value) if isinstance(value, str) else value
