"""The study file of a search, which others may have put there: it is not waited for, and sets nothing of the recipe
that is not searched."""

import os
import time

import optuna
import pytest

from mentalglm_jax.files import working_on
from mentalglm_jax.pipeline.search import JOURNAL, read_spaces, search
from tests.hostile.attack import refused
from tests.hostile.foreign_files import called
from tests.hostile.test_command_line import RECIPE

STAGES = "stages=[{name: a, train: {steps: 1, eval_every: 1}}]"


@pytest.fixture
def out(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(run=tmp_path / "run"))
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def searched(out):
    """Ends before a run begins."""

    def start(*_):
        raise AssertionError("a run was begun")

    spaces = read_spaces(["lora.rank=int:1:8"])
    return called(lambda: search(out.parent / "recipe.yaml", spaces, 2, out=out, overrides=[STAGES], say=print,
                                 start=start))  # fmt: skip


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "link", "link to nothing"])
def test_a_study_that_is_no_file(out, kind):
    file = out / JOURNAL
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        file.symlink_to({"device": "/dev/zero", "link": out.parent / "recipe.yaml"}.get(kind, "nowhere"))
    refused(searched(out), rf"{JOURNAL}: is not a file of this search")


@pytest.mark.parametrize("data", [b"\0" * 100, b"{", b'{"op_code": 99}\n', b"[[" * 5000, b'{"op_code": NaN}\n', b"x\n"])
def test_a_study_that_is_damaged(out, data):
    (out / JOURNAL).write_bytes(data)
    refused(searched(out), rf"{JOURNAL}: is of another search, or damaged")


@pytest.mark.parametrize("key", ["run_dir", "data.root", "model.path", "seed"])
def test_a_study_that_sets_more_than_is_searched(out, key):
    backend = optuna.storages.journal.JournalFileBackend(str(out / JOURNAL))
    study = optuna.create_study(storage=optuna.storages.JournalStorage(backend), study_name="sweep")
    space = {key: optuna.distributions.CategoricalDistribution([str(out.parent / "elsewhere"), "x"])}
    study.ask(space)
    refused(searched(out), rf"{JOURNAL}: is of another search, it has values of {key}")
    assert not (out.parent / "elsewhere").exists()


OTHERS = {"lora.alpha": "8", "train.learning_rate": "0.5", "seed": "7",
          "stages.a.train.early_stopping": "{patience: 3, metric: label_f1}"}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_a_study_of_another_recipe(out, other):
    """Its scores, lower or higher ones, would lead this search."""

    def start(*_):
        raise KeyboardInterrupt

    spaces = read_spaces(["lora.rank=int:1:8"])
    with pytest.raises(KeyboardInterrupt):
        search(out.parent / "recipe.yaml", spaces, 2, out=out, overrides=[STAGES, f"{other}={OTHERS[other]}"],
               say=print, start=start)  # fmt: skip
    refused(searched(out), rf"{JOURNAL}: is of another search, its recipe or --seeds were others")


@pytest.mark.parametrize("kind", ["a link to nothing", "a link", "a file", "a directory"])
def test_a_lock_of_optuna_that_nobody_holds(out, kind):
    """It was waited for: half a minute, or, where it leads nowhere, for ever. A killed search leaves such a one."""
    lock = out / f"{JOURNAL}.lock"
    if kind == "a file":
        lock.touch()
    elif kind == "a directory":
        lock.mkdir()
    else:
        lock.symlink_to("nowhere" if kind == "a link to nothing" else out.parent / "recipe.yaml")
    began = time.monotonic()
    with pytest.raises(AssertionError, match="a run was begun"):
        searched(out)
    assert time.monotonic() - began < 20 and os.path.lexists(lock)


def test_a_study_that_another_search_writes(out):
    with working_on(out / JOURNAL):
        refused(searched(out), rf"{JOURNAL}: process {os.getpid()} on .* works on it", code=1)
