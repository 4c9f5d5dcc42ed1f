"""``mentalglm data``: inspect, build and review data. Every command is one library call; prints no post."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mentalglm_jax.errors import InputError

data_app = typer.Typer(no_args_is_help=True, help="Look at data, build explanations, have people check them.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else")]


@data_app.command("inspect")
def data_inspect(
    root: Annotated[Path, typer.Argument(help="Folder with upstream files, or records (.jsonl, .parquet)")],
    sets: Annotated[list[str], typer.Option("--set-name", help="Data set, e.g. sos_hl_1k (repeatable)")] = [],  # noqa: B006
    near: Annotated[bool, typer.Option(help="Look for near duplicates too (needs the [data] extra)")] = True,
    threshold: Annotated[float, typer.Option(help="Similarity from which two posts are near")] = 0.8,
    scrub: Annotated[Path | None, typer.Option(help="Also write the records here, contact details replaced")] = None,
    json_: AsJson = False,
) -> None:
    """Counts, labels, lengths, duplicates, posts on both sides of a split, label conflicts, contact details."""
    from mentalglm_jax.data.contacts import scrub_record
    from mentalglm_jax.data.inspection import Inspection

    inspection = Inspection(near, threshold)
    kept = []
    for record in _records(root, sets):
        inspection.add(record)
        if scrub is not None:
            kept.append(scrub_record(record))
    report = inspection.report()
    if scrub is not None:
        _write_splits(scrub, kept)
        report["scrubbed"] = str(scrub)
    if json_:
        _print_json(report)
        return
    for line in inspection_lines(report):
        Console().print(line, soft_wrap=True, highlight=False)


def _records(root: Path, sets: list[str]) -> Iterator[Any]:
    from mentalglm_jax.data.records import iter_records
    from mentalglm_jax.data.sources import iter_upstream, present

    if root.suffix in (".jsonl", ".parquet"):
        if sets:
            raise InputError(f"--set-name: {root} is one file of records; name sets only for a folder")
        return iter_records(root)
    return iter_upstream(root, sets or present(root))


def _write_splits(folder: Path, records: list[Any]) -> None:
    from mentalglm_jax.data.records import SPLITS, write_records

    for split in SPLITS:
        if rows := [record for record in records if record.split == split]:
            write_records(folder / f"{split}.jsonl", rows)


def inspection_lines(report: dict[str, Any]) -> Iterator[Table | str]:
    """What ``inspect`` prints: a table of the parts, then one line per finding."""
    table = Table(show_edge=False, header_style="bold")
    for name in ("task", "source", "split"):
        table.add_column(name)
    for name in ("records", "duplicates", "contact rows", "characters (median, p95, max)"):
        table.add_column(name, justify="right")
    table.add_column("labels")
    for task, sources in report["tasks"].items():
        for source, splits in sources.items():
            for split, entry in splits.items():
                lengths = entry["characters"]
                labels = ", ".join(f"{label} {count}" for label, count in entry["labels"].items())
                table.add_row(task, source, split, str(entry["records"]), str(entry["duplicates"]),
                              str(entry["contact_rows"]), f"{lengths['median']}, {lengths['p95']}, {lengths['max']}",
                              labels)  # fmt: skip
    yield table
    for kind, words in (("overlap", "train and held-out part of one source"), ("crossings", "across sources")):
        for entry in report[kind]:
            near = f", {entry['near']} near" if "near" in entry else ""
            yield (f"{words}: {'/'.join(entry['train'][1:])} and {'/'.join(entry['held_out'][1:])} share "
                   f"{entry['exact']} posts exactly{near}")  # fmt: skip
    conflicts = report["conflicts"]
    yield f"posts with two different labels for one question: {conflicts['same_task']}"
    if conflicts["level_posts_shared_with_risk"]:
        yield (f"risk level against high/low: {conflicts['level_against_risk']} of "
               f"{conflicts['level_posts_shared_with_risk']} shared posts disagree")  # fmt: skip
    yield f"rows with contact details: {report['contacts']['rows']}"
    if "scrubbed" in report:
        yield f"{report['scrubbed']}: written, contact details replaced"


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
