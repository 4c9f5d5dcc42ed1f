"""``make repair-study``: the model of ``make study``, which nobody planted, taught by its own saliency. After that.

    python -m scripts.repair_study [--study runs/study] [--out runs/repair-study] [--posts N]

One round as in ``scripts/repair.py``: samples of new posts, pairs by `probes rank`, a preference stage. Judged on the
test posts that the study was judged on, before and after, by all that the probes measure. Nothing here is compared with
random pairs: a post takes minutes. What was made is not made again.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mentalglm_jax.data.records import read_records
from mentalglm_jax.data.synthetic import make_corpus
from mentalglm_jax.files import write_json, write_text
from mentalglm_jax.train.recipe import load_recipe
from probes.errors import ProbeError
from probes.results.store import read_run
from scripts.repair import TASK, Repair, write_posts
from scripts.repair_table import change, interval, markdown, measured, table

FAMILIES = ("ig", "erase", "erase_resample")


def main(arguments: Sequence[str] | None = None) -> None:
    """All steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--study", type=Path, default=Path("runs/study"), help="where `make study` wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/repair-study"))
    parser.add_argument("--posts", type=int, default=60, help="posts that are answered to be ranked")
    given = parser.parse_args(arguments)
    if not (given.study / "run" / "probes" / "summary.json").is_file():
        sys.exit(f"repair-study: {given.study}/run/probes/summary.json is missing; `make study` makes it")
    try:
        read_run(given.study / "run" / "probes")  # whether the summary is of these posts
    except ProbeError as error:
        sys.exit(f"repair-study: {error}")
    started, work = time.monotonic(), RealRepair(given.out, given.study, given.posts)
    work.make_posts()
    adapter = work.round("round1", given.study / "run" / "adapter", 1)
    before, after = work.before(), work.judged("after", adapter)
    asked = {row["id"] for row in before["rows"]}
    truth = [record for record in read_records(work.records) if record.id in asked]
    rows = {"before": measured(before, truth), "round 1": measured(after, truth)}
    ranked = {"round1": json.loads((given.out / "round1" / "ranked.json").read_text("utf-8"))}
    moved = [*changes(given.study / "run" / "probes", given.out / "judged" / "after" / "probes")]
    text = f"{table(rows, ranked)}\n{markdown([('mass ratio', 'posts', 'change'), *moved])}"
    minutes = (time.monotonic() - started) / 60
    write_json(given.out / "summary.json", {"models": rows, "pairs": ranked, "mass_ratio": moved, "minutes": minutes})
    write_text(given.out / "table.md", text)
    print(f"\n{text}\ntable    {given.out / 'table.md'}\n{minutes:.1f} minutes")


class RealRepair(Repair):
    """As on the control, with the study's model and corpus, and settings for fewer and longer posts."""

    sampling = ("--samples", 8, "--temperature", 1.5, "--min-p", 0.05, "--batch-size", 15)
    recipe = ("lora.rank=16", "lora.alpha=32", "stages.repair.train.rows=2", "stages.repair.train.learning_rate=3.0e-4")
    judges = 2
    probed = 1000  # all that the study judged

    def __init__(self, out: Path, study: Path, posts: int):
        super().__init__(out, study, posts)
        self.base, self.run = study / "smollm2", study / "run"
        self.records = study / "run" / "data" / "faithful" / "test.jsonl"

    def make_posts(self) -> Path:
        """New posts of the study's corpus to sample from, and those that it was judged on, as posts alone."""
        files = [path for path in self.records.parent.glob("*.jsonl") if path.stat().st_size]  # no dev part in a study
        known = {record.post for path in files for record in read_records(path)}
        config = load_recipe("configs/study.yaml").data.synthetic
        config = config.model_copy(update={"seed": 11, "tasks": (TASK,), "n_train": 0, "n_test": 2 * self.posts})
        drawn = [record for record in make_corpus(config) if record.post not in known][: self.posts]
        judged = {row["id"] for row in self.before()["rows"]}
        self.out.mkdir(parents=True, exist_ok=True)
        write_posts(self.out / "posts-1.jsonl", drawn)
        write_posts(self.out / "fresh-posts.jsonl", [r for r in read_records(self.records) if r.id in judged])
        return self.records

    def before(self) -> dict[str, Any]:
        """The study's own answers and what it found of them."""
        probes = self.run / "probes"
        judged = {check["example_id"] for check in read(probes / "checks.jsonl")}
        rows = [row for row in read(self.run / "generations.jsonl") if row["id"] in judged]
        return {"rows": rows, "probes": json.loads((probes / "summary.json").read_text("utf-8"))}


def changes(before: Path, after: Path) -> Iterator[tuple[str, ...]]:
    """Mean change of the mass ratio of the same posts, by method, over those whose map may speak both times; 95 %."""
    was, now = (
        {(c["example_id"], c["method"]): c["value"] for c in read(path / "checks.jsonl")
         if c["name"] == "mass_ratio" and c["status"] == "ok" and c["value"] is not None}
        for path in (before, after)
    )  # fmt: skip
    for method in FAMILIES:
        both = sorted(post for post, name in was.keys() & now.keys() if name == method)
        if both:
            found = change([was[post, method] for post in both], [now[post, method] for post in both])
            yield method, str(len(both)), interval(found, signed=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


if __name__ == "__main__":
    main()
