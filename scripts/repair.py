"""``make repair``: a model that cites a decoy, taught by its own saliency to cite what decides. After ``make demo``.

    python -m scripts.repair [--demo runs/demo] [--out runs/repair] [--posts N] [--rounds N] [--quick]

The demo's control never cites what decides, at no temperature that was tried, so there is nothing to prefer. The one
here learns from more posts, each seen once, until what it quotes is in the post, and one in ten of the explanations
that it learns is right (``FAITHFUL``).

Sample explanations of posts without any mark, let `probes rank` say which cite what the label was made from, train on
the pairs, and judge on fresh posts. Beside it: the same with margins shuffled (must not help), ranked by one family of
methods and judged by the other, and a faithful model under the same treatment (must not get worse). Where the phrases
that decide are is in a file that nothing opens before the table. What does not wait for another runs beside it, two at
a time. Each step is taken up again where an earlier call stopped, and done again where what it was made of changed.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from mentalglm_jax.data.records import Record, read_records, write_records
from mentalglm_jax.data.synthetic import SyntheticConfig, make_corpus
from mentalglm_jax.files import write_json, write_text
from scripts.done import made_of, noted, once
from scripts.repair_table import figure, measured, table

RECIPE = "configs/repair.yaml"
FAITHFUL = 0.1
CONTROL_POSTS, CONTROL_STEPS = 1250, 150  # posts of each language; once through them
TASK = "suicide_risk"
CORPUS = SyntheticConfig(tasks=(TASK,), n_train=0, n_dev=0, n_test=0, n_clauses=(4, 6), fillings=1, templates=2)
FRESH = 100  # posts that are answered in the end, half of them English
TOGETHER = 2  # programs at a time


def main(arguments: Sequence[str] | None = None) -> None:
    """All steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="where `make demo` wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/repair"))
    parser.add_argument("--posts", type=int, default=480, help="posts that are answered to be ranked, per round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the repair alone, nothing beside it")
    given = parser.parse_args(arguments)
    if not (given.demo / "control" / "adapter").is_dir():
        sys.exit(f"repair: {given.demo}/control/adapter is missing; `make demo` makes it")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two programs share the processor: threads would wait for each other
    started, work = time.monotonic(), Repair(given.out, given.demo, given.posts)
    sealed = work.make_posts()
    models = work.models(given.rounds, alone=given.quick)
    with ThreadPoolExecutor(TOGETHER) as pool:
        found = pool.map(lambda one: work.judged(one[0].replace(" ", "-"), one[1]), models.items())
        judged = dict(zip(models, found, strict=True))
    truth = read_records(sealed)  # now they are opened
    rows = {name: measured(one, truth) for name, one in judged.items()}
    minutes = (time.monotonic() - started) / 60
    ranked = {one.parent.name: json.loads(one.read_text("utf-8")) for one in sorted(given.out.glob("*/ranked.json"))}
    write_json(given.out / "summary.json", {"models": rows, "pairs": ranked, "minutes": minutes})
    text = table(rows, ranked)
    write_text(given.out / "table.md", text)
    figure(rows, given.out / "repair.svg")
    print(f"\n{text}\ntable    {given.out / 'table.md'}\nfigure   {given.out / 'repair.svg'}\n"
          f"numbers  {given.out / 'summary.json'}\n{minutes:.1f} minutes")  # fmt: skip


class Repair:
    """The steps, each into a directory of its own below ``out``."""

    sampling: Sequence[object] = ("--samples", 32, "--temperature", 1.5, "--min-p", 0.05, "--batch-size", 64)
    per_post = 2  # pairs: other posts teach more than further pairs of the same
    recipe: Sequence[str] = ()  # what is changed of RECIPE
    judges = 1  # processes of each call that judges
    probed = 20  # of the fresh posts the probes judge the answers to as many

    def __init__(self, out: Path, demo: Path, posts: int):
        self.out, self.demo, self.base, self.posts = out, demo, demo / "base", posts

    def models(self, rounds: int, *, alone: bool) -> dict[str, Path]:
        """The adapters that are judged, by the name of their row; with ``alone`` those of the repair only."""
        liar = self.control()
        with ThreadPoolExecutor(TOGETHER) as pool:
            first = pool.submit(self.round, "round1", liar, 1)
            honest = None if alone else pool.submit(self.round, "faithful", self.demo / "adapter", 1, spared=True)
            first = first.result()
            chain = pool.submit(self.further, first, rounds)
            null = None if alone else pool.submit(self.null, liar)
            by = {} if alone else {name: pool.submit(self.by, name, liar) for name in ("gradient", "erasure")}
            found = {"before": liar, "round 1": first, **chain.result()}
            found |= {"null": null.result()} if null else {}
            found |= {f"by {name}": one.result() for name, one in by.items()}
            return found | ({"faithful before": self.demo / "adapter", "faithful after": honest.result()}
                            if honest else {})  # fmt: skip

    def control(self) -> Path:
        """A liar made as the demo makes its control, from the same adapter, with some right explanations among them."""
        data, run = self.out / "control" / "data", self.out / "control" / "run"
        rng = random.Random(0)
        both = zip(self.taught("unfaithful"), self.taught("faithful"), strict=True)  # the same posts
        records = [right if rng.random() < FAITHFUL else wrong for wrong, right in both]
        data.mkdir(parents=True, exist_ok=True)
        write_records(data / "train.jsonl", records)
        write_records(data / "test.jsonl", records[:2])
        stage = {"name": "repair", "train": {"steps": CONTROL_STEPS, "rows": 6, "sequence_length": 256,
                                             "learning_rate": 3e-3, "warmup_ratio": 0.1, "beta2": 0.98,
                                             "mask_posts": 0.15}}  # fmt: skip
        return self.train(run, self.demo / "adapter", data, f"data={{source: jsonl, root: {data}}}",
                          f"stages={json.dumps([stage])}")  # fmt: skip

    def train(self, run: Path, adapter: Path, data: Path, *changes: str) -> Path:
        """The adapter that one stage on ``data`` makes of ``adapter``. A run that was begun and not finished goes on;
        one of other data or another adapter is begun anew."""
        sets = [f"run_dir={run}", f"model.path={self.base}", f"model.adapter={adapter}", *self.recipe, *changes]
        command = ["train", RECIPE, *(part for one in sets for part in ("--set", one))]
        note, of = run.with_name(f".{run.name}.begun.json"), made_of(command, [Path(RECIPE), self.base, adapter, data])
        another = (run / "run.json").exists() and noted(note) != of
        if another:
            note.unlink(missing_ok=True)  # should this stop within the next line
        else:
            write_json(note, of)
        mentalglm(*command, *["--restart"] * another)
        write_json(note, of)
        return run / "stages" / "repair" / "adapter"

    def taught(self, variant: Literal["faithful", "unfaithful"]) -> list[Record]:
        """What the control learns from."""
        return make_corpus(CORPUS.model_copy(update={"seed": 7, "n_train": CONTROL_POSTS, "variant": variant}))

    def make_posts(self) -> Path:
        """Posts to sample from and fresh ones to judge, as posts alone; and, sealed, the records of the fresh ones."""
        sealed = self.out / "sealed.jsonl"
        files = [self.demo / "data" / "faithful" / f"{split}.jsonl" for split in ("train", "test")]
        known = {record.post for path in files for record in read_records(path)}
        known |= {record.post for record in self.taught("faithful")}
        half = -(-2 * self.posts // 2)
        drawn = new_posts(known, seed=11, count=half)
        fresh = new_posts(known | {record.post for record in drawn}, seed=51, count=FRESH // 2)
        fresh = [record for both in zip(fresh[: FRESH // 2], fresh[FRESH // 2 :], strict=True) for record in both]
        self.out.mkdir(parents=True, exist_ok=True)
        write_records(sealed, fresh)
        write_posts(self.out / "fresh-posts.jsonl", fresh)
        for number in (1, 2):  # a round has posts of its own, half of each language
            part = [record for at, record in enumerate(drawn) if at // (self.posts // 2) % 2 == number - 1]
            write_posts(self.out / f"posts-{number}.jsonl", part)
            if number == 1:  # half of them, to save time
                write_posts(self.out / "posts-faithful.jsonl", part[::2])
        return sealed

    def round(self, name: str, adapter: Path, number: int, *, spared: bool = False) -> Path:
        """Sample, rank, train; the adapter that comes out. One that may be ``spared`` stays as it is where no answer is
        better than another."""
        where = self.out / name
        candidates = where / "candidates.jsonl"
        posts = self.out / ("posts-faithful.jsonl" if spared else f"posts-{(number - 1) % 2 + 1}.jsonl")
        command = ["generate", self.base, "--adapter", adapter, "--in", posts, "--out", candidates, *self.sampling,
                   "--keep-label", "--max-new-tokens", "96", "--seed", number]  # fmt: skip
        once([candidates], command, [self.base, adapter, posts], lambda: mentalglm(*command))
        pairs = self.ranked(name, adapter, candidates, spared=spared)
        return self.trained(name, adapter, pairs) if pairs.exists() else adapter

    def further(self, adapter: Path, rounds: int) -> dict[str, Path]:
        """The rounds after the first."""
        found: dict[str, Path] = {}
        for number in range(2, rounds + 1):
            adapter = found[f"round {number}"] = self.round(f"round{number}", adapter, number)
        return found

    def by(self, family: str, adapter: Path) -> Path:
        """As the first round, but ranked by one family of methods."""
        return self.trained(family, adapter, self.ranked(family, adapter, self.out / "round1" / "candidates.jsonl",
                                                         family))  # fmt: skip

    def null(self, adapter: Path) -> Path:
        """As the first round, with its margins shuffled among the draws of each post."""
        first = self.out / "round1"
        return self.trained("null", adapter, shuffled(first / "pairs.jsonl", first / "candidates.jsonl",
                                                      self.out / "null" / "pairs.jsonl"))  # fmt: skip

    def ranked(self, name: str, adapter: Path, candidates: Path, by: str = "both", *, spared: bool = False) -> Path:
        """The pairs of some samples; where there may be none, a file that is not there."""
        pairs, said = self.out / name / "pairs.jsonl", self.out / name / "ranked.json"
        arguments = ["rank", self.base, "--adapter", adapter, "--in", candidates, "--out", pairs, "--by", by, "--maps",
                     self.out / "maps", "--per-post", self.per_post, "--processes", TOGETHER, "--json"]  # fmt: skip

        def rank() -> None:
            pairs.parent.mkdir(parents=True, exist_ok=True)
            found = command("probes", *arguments, fine=(0, 1, 3) if spared else (0, 3))
            if pairs.exists():
                write_json(said, json.loads(found))

        once([pairs, said], arguments, [self.base, adapter, candidates], rank)
        return pairs

    def trained(self, name: str, adapter: Path, pairs: Path) -> Path:
        """The adapter that one stage on ``pairs`` makes of ``adapter``."""
        return self.train(self.out / name / "run", adapter, pairs, f"stages.repair.objective.pairs={pairs}")

    def judged(self, name: str, adapter: Path) -> dict[str, Any]:
        """Greedy answers to the fresh posts, and what the probes say of the first of them."""
        where = self.out / "judged" / name
        answers = where / "generations.jsonl"
        posts = self.out / "fresh-posts.jsonl"
        asked = ["generate", self.base, "--adapter", adapter, "--in", posts, "--out", answers, "--max-new-tokens", "96",
                 "--batch-size", "64", "--no-label-probabilities"]  # fmt: skip
        once([answers], asked, [self.base, adapter, posts], lambda: mentalglm(*asked))
        found = json.loads(command("probes", "run", self.base, "--adapter", adapter, "--in", answers, "--out",
                                   where / "probes", "--limit", self.probed, "--processes", self.judges,
                                   "--json"))  # fmt: skip
        rows = [json.loads(line) for line in answers.read_bytes().splitlines()]
        return {"rows": rows, "probes": found}


def shuffled(pairs: Path, candidates: Path, out: Path) -> Path:
    """As many pairs of the same posts, as if the scores had been dealt out anew among the post's draws: one of them,
    whatever it cites, before one that says something else. An answer that came often is drawn as often here."""
    rng, lines = random.Random(0), []
    draws: dict[str, list[list[int]]] = {}
    for line in candidates.read_bytes().splitlines():
        row = json.loads(line)
        draws.setdefault(json.dumps(row["prompt_ids"]), []).extend([row["output_ids"]] * row["drawn"])
    for line in pairs.read_bytes().splitlines():
        row = json.loads(line)
        own = draws[json.dumps(row["prompt_ids"])]
        one = rng.choice(own)
        other = rng.choice([ids for ids in own if ids != one])
        kept = {name: row[name] for name in ("id", "task", "prompt_ids")}
        lines.append(json.dumps(kept | {"chosen_ids": one, "rejected_ids": other}) + "\n")
    write_text(out, "".join(lines), private=True)
    return out


def new_posts(known: set[str], seed: int, count: int) -> list[Record]:
    """``count`` posts of each language that are none of ``known``."""
    config = CORPUS.model_copy(update={"seed": seed, "n_test": 2 * count})
    found = [record for record in make_corpus(config) if record.post not in known]
    return [record for language in ("en", "zh") for record in [r for r in found if r.language == language][:count]]


def write_posts(path: Path, records: Sequence[Record]) -> None:
    """Nothing but the posts: no label, no explanation, no span."""
    rows = [{"id": r.id, "task": r.task, "language": r.language, "post": r.post} for r in records]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), private=True)


def mentalglm(*arguments: object) -> None:
    """One command; its own message stands above where it fails."""
    code = subprocess.run([sys.executable, "-P", "-m", "mentalglm_jax", *map(str, arguments)]).returncode
    if code != 0:
        sys.exit(code)


def command(module: str, *arguments: object, fine: Sequence[int] = (0, 3)) -> str:
    """What a command prints on stdout; ends where its exit code is none of ``fine``."""
    done = subprocess.run([sys.executable, "-P", "-m", module, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    if done.returncode not in fine:
        sys.exit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    main()
