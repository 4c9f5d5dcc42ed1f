"""Killed at a random moment, any number of times: the same command ends with the same bytes, and nothing is left over.

Of `data build`, whose answers are bought, tests/mentalglm_jax/data/explain has interruptions; of `probes run`, its own.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.world import WRITES, contents

# What a run of several stages must come to; its log of seconds and its event files differ from run to run.
SAME = ("adapter", "merged", "generations.jsonl", "label_scores.jsonl", "evaluation.json", "reference_logits.npz")
RUNS = {"mentalglm run": "run", "mentalglm train": "run", "mentalglm sweep": "swept/recipe/seed-0"}
FAST = ("mentalglm convert", "mentalglm data review export")


class Zygote:
    def __init__(self, said: Path):
        self._said = said
        self._process = subprocess.Popen([sys.executable, Path(__file__).with_name("zygote.py")],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip

    def __call__(self, directory: Path, *commands: list[str], kill: float | None = None) -> tuple[list[int], float]:
        """Exit codes and seconds."""
        asked = {"commands": commands, "directory": str(directory), "said": str(self._said), "kill": kill}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline())
        return found["codes"], found["seconds"]

    def said(self) -> str:
        return self._said.read_text()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    made = Zygote(tmp_path_factory.mktemp("zygote") / "said")
    yield made
    made.close()


def arguments(command: str) -> list[str]:
    return [*command.split()[1:], *WRITES[command][0]]


def of_interest(world: Path, command: str) -> dict[str, bytes]:
    # An adapter names its base by an absolute path: where this world lies is no difference.
    found = {name: data.replace(str(world).encode(), b"WORLD") for name, data in contents(world).items()}
    if run := RUNS.get(command):
        return {name: data for name, data in found.items() if name.startswith(tuple(f"{run}/{one}" for one in SAME))
                or (name.startswith(f"{run}/stages/") and "/adapter/" in name)}  # fmt: skip
    return {name: data for name, data in found.items() if name != "review/review.html"}  # holds a number used once


def forget_finished(world: Path) -> None:
    """Answers that are finished are not written over: a process may be killed when it has nothing left to do."""
    if not (world / "answers.jsonl.partial").exists():
        (world / "answers.jsonl").unlink(missing_ok=True)


CASES = [(command, 2) if command in FAST else pytest.param(command, 20, marks=pytest.mark.slow)
         for command in WRITES if command != "mentalglm data build"]  # fmt: skip
CASES += [pytest.param(command, 20, marks=pytest.mark.slow, id=f"{command}, often") for command in FAST]


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("command", "kills"), CASES)
def test_killed_at_a_random_moment(template, zygote, tmp_path, command, kills):
    for name in ("undisturbed", "killed"):
        shutil.copytree(template, tmp_path / name)
    codes, seconds = zygote(tmp_path / "undisturbed", arguments(command))
    assert codes == [0], zygote.said()
    moments, killed = random.Random(f"{command} {kills}"), 0
    while killed < kills:
        forget_finished(tmp_path / "killed")
        codes, _ = zygote(tmp_path / "killed", arguments(command), kill=moments.uniform(0, seconds))
        assert codes in ([-9], [0]), zygote.said()
        killed += codes == [-9]
        if codes == [0]:  # done before that moment, as a first call takes longer than those after it
            seconds *= 0.8
    forget_finished(tmp_path / "killed")
    codes, _ = zygote(tmp_path / "killed", arguments(command))
    assert codes == [0], zygote.said()
    wanted = of_interest(tmp_path / "undisturbed", command)
    assert wanted and of_interest(tmp_path / "killed", command) == wanted
    assert not [name for name in contents(tmp_path / "killed") if name.endswith((".lock", ".partial"))]
    assert not list((tmp_path / "killed").rglob("*.unfinished*"))


@pytest.mark.parametrize("command", FAST)
def test_two_that_start_at_the_same_moment(template, zygote, tmp_path, command):
    """One of them does it; the other did it just after, or said who is at it."""
    shutil.copytree(template, tmp_path / "world")
    shutil.copytree(template, tmp_path / "alone")
    assert zygote(tmp_path / "alone", arguments(command))[0] == [0]
    codes, _ = zygote(tmp_path / "world", arguments(command), arguments(command))
    assert sorted(codes) in ([0, 0], [0, 1]), zygote.said()
    if 1 in codes:
        assert "works on it; wait until that has ended" in zygote.said()
    assert of_interest(tmp_path / "world", command) == of_interest(tmp_path / "alone", command)
