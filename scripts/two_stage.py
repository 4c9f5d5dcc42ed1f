"""Does English first help? Two-stage tuning (English, then Chinese) against Chinese only, by seeds, with paired tests.

    python scripts/two_stage.py MODEL DATA [--out runs/two-stage] [--seeds 3] [--chinese SET] [--set a.b=c ...]

MODEL is a directory or Hub id, DATA the folder of the published files (SOS-HL-1K, SocialCD-3K, IMHI). Everything is
scored on the development split of their training parts. The same command goes on where it stopped, inside a training
run too; a seed is finished in both arms before the next one begins, so what is there can be compared at any time.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

RECIPE = Path("configs/two-stage.yaml")
TASKS = {"sos_hl_1k": "suicide_risk", "socialcd_3k": "cognitive_distortion"}  # what each Chinese set asks
LENGTH = ("--max-new-tokens", "48")  # labels alone
BOTH, ALONE = "english-then-chinese", "chinese-only"


def main(arguments: Sequence[str] | None = None) -> None:
    """All runs, then the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/two-stage"))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm, from seed 0 on")
    parser.add_argument("--chinese", choices=TASKS, help="one Chinese set only (default: both)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="as of `mentalglm train`, both arms"
    )
    given = parser.parse_args(arguments)
    chinese = [given.chinese] if given.chinese else [*TASKS]
    for command in commands(given.model, given.data, given.out, given.seeds, given.set, chinese):
        with subprocess.Popen([sys.executable, "-P", "-m", "mentalglm_jax", *command]) as process:
            try:
                code = process.wait()
            except KeyboardInterrupt:  # it has reached the command too, which saves
                code = process.wait()
        if code != 0:
            sys.exit(code)


def commands(
    model: str, data: Path, out: Path, seeds: int, sets: Sequence[str], chinese: Sequence[str] = (*TASKS,)
) -> Iterator[list[str]]:
    """What is carried out, as arguments of ``mentalglm``; each does nothing again that it finds done."""
    tasks = [TASKS[name] for name in chinese]
    answered: list[Path] = []
    for seed in range(seeds):
        for arm in (BOTH, ALONE):
            run = out / arm / f"seed-{seed}"
            changes = [f"model.path={yaml_text(model)}", f"data.root={yaml_text(data)}",
                       *overrides(arm, sets, chinese), f"seed={seed}", f"run_dir={yaml_text(run)}"]  # fmt: skip
            yield ["train", str(RECIPE), *(part for one in changes for part in ("--set", one))]
            for task in tasks:  # English posts are long, and ask nothing of this comparison
                answered.append(run / task)
                if not finished(answered[-1]):
                    yield ["evaluate", str(run), "--split", "dev", "--task", task, *LENGTH, "--out", str(answered[-1])]
        if seed == 0:  # the model as it came, asked the same
            records = out / ALONE / "seed-0" / "data" / "faithful"
            for task in tasks:
                files = ["--data", str(records / "dev.jsonl"), "--train", str(records / "train.jsonl")]
                answered.append(out / f"before-{task}")
                if not finished(answered[-1]):
                    yield ["evaluate", model, "--task", task, *files, *LENGTH, "--out", str(answered[-1])]
        for task in tasks:
            both, alone = (str(out / arm / f"seed-{seed}" / task) for arm in (BOTH, ALONE))
            place = out / "difference" / f"{task}-seed-{seed}"
            yield ["evaluate", both, "--against", alone, "--out", str(place)]
    yield ["leaderboard", *map(str, answered), "--out", str(out / "leaderboard.md")]


def finished(place: Path) -> bool:
    """Whether a command that scores has come to its end there: it writes this file last."""
    return (place / "model_card.md").is_file()


def overrides(arm: str, sets: Sequence[str], chinese: Sequence[str] = (*TASKS,)) -> list[str]:
    """``sets`` after what makes an arm of the recipe. What they say of the English stage is nothing to the arm that has
    none; both arms read the same split, which does not depend on the sets that are named."""
    if arm == BOTH:
        return [f"data.sets=[{', '.join([*chinese, 'imhi'])}]", *sets]
    recipe = yaml.safe_load(RECIPE.read_text("utf-8"))
    stages = [stage for stage in recipe["stages"] if stage["name"] != "english"]
    shown = yaml.safe_dump(stages, default_flow_style=True, width=10**6).strip()
    kept = [one for one in sets if not one.startswith("stages.english.")]
    return [f"data.sets=[{', '.join(chinese)}]", f"stages={shown}", *kept]


def yaml_text(value: object) -> str:
    """A value of ``--set`` that YAML reads as this text."""
    return "'" + str(value).replace("'", "''") + "'"


if __name__ == "__main__":
    main()
