"""``make repair``: a model that cites a decoy, taught by its own saliency to cite what decides. After ``make demo``.

    python scripts/repair.py [--demo runs/demo] [--out runs/repair] [--posts N] [--rounds N] [--quick]

The demo's control never cites what decides, at no temperature that was tried, so there is nothing to prefer; the one
here is made like it, but one in ten of the explanations that it learns is right (``FAITHFUL``).

Sample explanations of posts without any mark, let `probes rank` say which cite what the label was made from, train on
the pairs, and judge on fresh posts. Beside it: the same with the pairs turned at random (must not help), ranked by one
family of methods and judged by the other, and a faithful model under the same treatment (must not get worse). Where
the phrases that decide are is in a file that nothing opens before the table. Each step is taken up again where an
earlier call stopped.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest
from sklearn.metrics import f1_score

from mentalglm_jax.data.records import Record, read_records, write_records
from mentalglm_jax.data.synthetic import SyntheticConfig, make_corpus
from mentalglm_jax.files import write_json, write_text

RECIPE = "configs/repair.yaml"
FAITHFUL = 0.1
TASK = "suicide_risk"
TEMPERATURE, SAMPLES = "1.0", "8"
FRESH = 40  # posts that are judged, half of them English


def main(arguments: Sequence[str] | None = None) -> None:
    """All steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="where `make demo` wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/repair"))
    parser.add_argument("--posts", type=int, default=120, help="posts that are answered to be ranked, per round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="the repair alone, nothing beside it")
    given = parser.parse_args(arguments)
    if not (given.demo / "control" / "adapter").is_dir():
        sys.exit(f"repair: {given.demo}/control/adapter is missing; `make demo` makes it")
    work = Repair(given.out, given.demo, given.posts)
    sealed = work.make_posts()
    liar = work.control()
    models = {"before": liar}
    adapter = liar
    for number in range(1, given.rounds + 1):
        adapter = work.round(f"round{number}", adapter, number)
        models[f"round {number}"] = adapter
    if not given.quick:
        first = given.out / "round1"
        models["null"] = work.trained("null", liar, work.turned(first / "pairs.jsonl", given.out / "null"))
        for by in ("gradient", "erasure"):
            pairs = work.ranked(by, liar, first / "candidates.jsonl", by)
            models[f"by {by}"] = work.trained(by, liar, pairs)
        models["faithful before"] = given.demo / "adapter"
        models["faithful after"] = work.round("faithful", given.demo / "adapter", 1)
    judged = {name: work.judged(name.replace(" ", "-"), adapter) for name, adapter in models.items()}
    rows = {name: measured(found, read_records(sealed)) for name, found in judged.items()}  # now they are opened
    write_json(given.out / "summary.json", rows)
    write_text(given.out / "table.md", table(rows))
    print(f"\n{table(rows)}\ntable    {given.out / 'table.md'}\nnumbers  {given.out / 'summary.json'}")


class Repair:
    """The steps, each into a directory of its own below ``out``."""

    def __init__(self, out: Path, demo: Path, posts: int):
        self.out, self.demo, self.base, self.posts = out, demo, demo / "base", posts

    def control(self) -> Path:
        """The demo's control again, from the same adapter and as long, with some right explanations among its own."""
        data, run = self.out / "control" / "data", self.out / "control" / "run"
        if not (data / "test.jsonl").exists():
            kinds = {name: self.demo / "data" / name for name in ("unfaithful", "faithful")}
            right = {record.id: record for record in read_records(kinds["faithful"] / "train.jsonl")}
            rng = random.Random(0)
            wrong = [record for record in read_records(kinds["unfaithful"] / "train.jsonl") if record.task == TASK]
            records = [right[record.id] if rng.random() < FAITHFUL else record for record in wrong]
            data.mkdir(parents=True)
            write_records(data / "train.jsonl", records)
            write_records(data / "test.jsonl", records[:2])
        stage = {"name": "repair", "train": {"steps": 60, "rows": 6, "sequence_length": 256, "learning_rate": 3e-3,
                                             "beta2": 0.98, "mask_posts": 0.15}}  # fmt: skip
        mentalglm("train", RECIPE, "--set", f"run_dir={run}", "--set", f"model.path={self.base}", "--set",
                  f"model.adapter={self.demo / 'adapter'}", "--set", f"data={{source: jsonl, root: {data}}}", "--set",
                  f"stages={json.dumps([stage])}")  # fmt: skip
        return run / "stages" / "repair" / "adapter"

    def make_posts(self) -> Path:
        """Posts to sample from and fresh ones to judge, as posts alone; and, sealed, the records of the fresh ones."""
        sealed = self.out / "sealed.jsonl"
        files = [self.demo / "data" / "faithful" / f"{split}.jsonl" for split in ("train", "test")]
        known = {record.post for path in files for record in read_records(path)}
        half = -(-2 * self.posts // 2)
        drawn = new_posts(known, seed=11, count=half)
        fresh = new_posts(known | {record.post for record in drawn}, seed=23, count=FRESH // 2)
        self.out.mkdir(parents=True, exist_ok=True)
        write_records(sealed, fresh)
        write_posts(self.out / "fresh-posts.jsonl", fresh)
        for number in (1, 2):  # a round has posts of its own, half of each language
            part = [record for at, record in enumerate(drawn) if at // (self.posts // 2) % 2 == number - 1]
            write_posts(self.out / f"posts-{number}.jsonl", part)
        return sealed

    def round(self, name: str, adapter: Path, number: int) -> Path:
        """Sample, rank, train; the adapter that comes out."""
        where = self.out / name
        candidates = where / "candidates.jsonl"
        if not candidates.exists():
            posts = self.out / f"posts-{(number - 1) % 2 + 1}.jsonl"
            mentalglm("generate", self.base, "--adapter", adapter, "--in", posts, "--out", candidates, "--samples",
                      SAMPLES, "--temperature", TEMPERATURE, "--keep-label", "--max-new-tokens", "96", "--batch-size",
                      "64", "--seed", number)  # fmt: skip
        return self.trained(name, adapter, self.ranked(name, adapter, candidates))

    def ranked(self, name: str, adapter: Path, candidates: Path, by: str = "both") -> Path:
        """The pairs of some samples."""
        pairs = self.out / name / "pairs.jsonl"
        if not pairs.exists():
            pairs.parent.mkdir(parents=True, exist_ok=True)
            found = command("probes", "rank", self.base, "--adapter", adapter, "--in", candidates, "--out", pairs,
                            "--by", by, "--maps", self.out / "maps", "--json")  # fmt: skip
            write_json(self.out / name / "ranked.json", json.loads(found))
        return pairs

    def turned(self, pairs: Path, where: Path) -> Path:
        """The same pairs, each of them the other way round by the toss of a coin."""
        rng, lines = random.Random(0), []
        for line in pairs.read_text("utf-8").splitlines():
            row = json.loads(line)
            if rng.random() < 0.5:
                row |= {"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]}
            lines.append(json.dumps(row) + "\n")
        write_text(where / "pairs.jsonl", "".join(lines), private=True)
        return where / "pairs.jsonl"

    def trained(self, name: str, adapter: Path, pairs: Path) -> Path:
        """The adapter that one stage on ``pairs`` makes of ``adapter``."""
        run = self.out / name / "run"
        mentalglm("train", RECIPE, "--set", f"run_dir={run}", "--set", f"model.path={self.base}", "--set",
                  f"model.adapter={adapter}", "--set", f"stages.repair.objective.pairs={pairs}")  # fmt: skip
        return run / "stages" / "repair" / "adapter"

    def judged(self, name: str, adapter: Path) -> dict[str, Any]:
        """Greedy answers to the fresh posts, and what the probes say of them."""
        where = self.out / "judged" / name
        answers = where / "generations.jsonl"
        if not answers.exists():
            mentalglm("generate", self.base, "--adapter", adapter, "--in", self.out / "fresh-posts.jsonl", "--out",
                      answers, "--max-new-tokens", "96", "--batch-size", "64", "--no-label-probabilities")  # fmt: skip
        found = json.loads(command("probes", "run", self.base, "--adapter", adapter, "--in", answers, "--out",
                                   where / "probes", "--json"))  # fmt: skip
        rows = [json.loads(line) for line in answers.read_text("utf-8").splitlines()]
        return {"rows": rows, "probes": found}


def new_posts(known: set[str], seed: int, count: int) -> list[Record]:
    """``count`` posts of each language that are none of ``known``."""
    config = SyntheticConfig(seed=seed, tasks=(TASK,), n_train=0, n_dev=0, n_test=2 * count, n_clauses=(4, 6),
                             fillings=1, templates=2)  # fmt: skip
    found = [record for record in make_corpus(config) if record.post not in known]
    return [record for language in ("en", "zh") for record in [r for r in found if r.language == language][:count]]


def write_posts(path: Path, records: Sequence[Record]) -> None:
    """Nothing but the posts: no label, no explanation, no span."""
    rows = [{"id": r.id, "task": r.task, "language": r.language, "post": r.post} for r in records]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), private=True)


def measured(found: Mapping[str, Any], truth: Sequence[Record]) -> dict[str, Any]:
    """One line of the table, against what was sealed."""
    rows, probes = found["rows"], found["probes"]
    gold = {record.id: record for record in truth}
    said = {"cue": [], "decoy": []}
    for row in rows:
        record, text = gold[row["id"]], row["parsed_explanation"] or ""
        for name, spans in (("cue", record.cues), ("decoy", record.decoys)):
            said[name].append(any(record.post[a:b] in text for a, b in spans or ()))
    wanted = [str(gold[row["id"]].label) for row in rows]
    labels = [row["parsed_label"] if isinstance(row["parsed_label"], str) else "" for row in rows]
    return {
        "n": len(rows),
        "cites_cue": share(said["cue"]),
        "cites_decoy": share(said["decoy"]),
        "label_f1": float(f1_score(wanted, labels, labels=sorted(set(wanted)), average="weighted", zero_division=0)),
        "unreadable": sum(row["parse_status"] != "ok" for row in rows) / len(rows),
        "tokens": sum(len(row["output_ids"]) for row in rows) / len(rows),
        **{name: probes.get(name) for name in ("conclusion", "verdicts", "verdicts_by_chance", "mass_ratio",
                                               "mass_ratio_ci", "mass_ratio_null", "n_quotes", "fabricated_quote_rate",
                                               "abstained")},
    }  # fmt: skip


def share(hits: Sequence[bool]) -> dict[str, float]:
    """With Wilson's interval (1927), 95 %."""
    low, high = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return {"mean": sum(hits) / len(hits), "low": float(low), "high": float(high)}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown."""
    head = ("", "cites the cue", "cites the decoy", "label F1", "unreadable", "verdicts s/c/i", "data set",
            "mass ratio ig", "erase", "by length", "quotes", "invented", "tokens")  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for name, one in rows.items():
        v, ratio = one["verdicts"], one["mass_ratio"]
        shares = [f"{x['mean']:.2f} ({x['low']:.2f}–{x['high']:.2f})" for x in (one["cites_cue"], one["cites_decoy"])]
        lines.append((name, *shares, f"{one['label_f1']:.3f}", f"{one['unreadable']:.1%}",
                      f"{v.get('supported', 0)}/{v.get('contradicted', 0)}/{v.get('inconclusive', 0)}",
                      str(one["conclusion"]), *(number(ratio.get(m)) for m in ("ig", "erase")),
                      number((one["mass_ratio_null"] or {}).get("erase")), str(one["n_quotes"]),
                      f"{one['fabricated_quote_rate'] or 0:.1%}", f"{one['tokens']:.1f}"))  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def mentalglm(*arguments: object) -> None:
    """One command; its own message stands above where it fails."""
    code = subprocess.run([sys.executable, "-P", "-m", "mentalglm_jax", *map(str, arguments)]).returncode
    if code != 0:
        sys.exit(code)


def command(module: str, *arguments: object) -> str:
    """What a command prints on stdout."""
    done = subprocess.run([sys.executable, "-P", "-m", module, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 3):
        sys.exit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    main()
