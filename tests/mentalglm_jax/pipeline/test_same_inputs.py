"""A sweep goes on only with the inputs it was begun with: data, conversations, tokenizer, base; it mixes nothing."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from mentalglm_jax.data.held_out import records_split
from mentalglm_jax.data.records import write_records
from mentalglm_jax.errors import InputError
from mentalglm_jax.pipeline.data_stage import data_stage
from mentalglm_jax.pipeline.run_dir import Run
from mentalglm_jax.pipeline.search import read_spaces, search
from mentalglm_jax.pipeline.sweep import make_points, sweep
from mentalglm_jax.text.tokenizer import train_bpe
from mentalglm_jax.train.recipe import load_recipe

TALK = {"messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]}
STAGE = {"steps": 1, "rows": 1, "sequence_length": 128, "eval_every": 1}


class Runs:
    """Stands for `train` and `evaluate`: the first stage is the real one, the rest are its results alone."""

    def __init__(self, meanwhile=lambda count: None):
        self.begun: list[str] = []
        self.meanwhile = meanwhile

    def __call__(self, arguments, log: Path, stopped) -> int:
        if arguments[0] == "evaluate":
            return 0
        recipe = load_recipe(arguments[1], arguments[3::2])
        self.begun.append(recipe.run_dir.parent.name)
        job = Run(recipe)
        if "data" not in job.result:
            job.finished("data", data_stage(job, lambda *a, **k: None) | {"seconds": 1})
        job.finished("train a", {"best": {"step": 1, "loss": 1.0}, "seconds": 1})
        for name in ("generate", "evaluate"):
            job.finished(name, {"seconds": 1})
        scores = {"n": 1, "weighted_f1": 0.5, "micro_f1": 0.5, "macro_f1": 0.5, "ci95": [0.0, 1.0], "floors": {}}
        (recipe.run_dir / "evaluation.json").write_text(json.dumps({"suicide_risk": scores}))
        self.meanwhile(len(self.begun))
        return 0


@pytest.fixture
def own(small, tmp_path) -> Path:
    """The recipe with inputs of its own, which may be changed."""
    for name in ("data", "model"):
        shutil.copytree(small.parent / name, tmp_path / name)
    (tmp_path / "talks.jsonl").write_text(json.dumps(TALK) + "\n", encoding="utf-8")
    recipe = yaml.safe_load(small.read_text(encoding="utf-8"))
    recipe |= {"data": {"source": "jsonl", "root": str(tmp_path / "data")}, "model": {"path": str(tmp_path / "model")},
               "stages": [{"name": "a", "train": STAGE, "conversations": str(tmp_path / "talks.jsonl")}]}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return tmp_path / "recipe.yaml"


def relabelled(own: Path) -> None:
    records = [one for one in records_split(own.parent / "data").records if one.split == "train"]
    write_records(own.parent / "data/train.jsonl", [*records[1:], records[0]])


def other_tokenizer(own: Path) -> None:
    train_bpe(["I think of rain all day long."] * 50, 400).save(own.parent / "model")


def other_talks(own: Path) -> None:
    (own.parent / "talks.jsonl").write_text(json.dumps(TALK).replace("So.", "No.") + "\n", encoding="utf-8")


CHANGES = [(relabelled, r"data\.root \(.*data\)"),
           (other_tokenizer, r"model\.path \(.*model\)"), (other_talks, r"stages\.a\.conversations")]  # fmt: skip


def swept(own: Path, grid: str, start) -> dict:
    out, points = make_points(own, [f"lora.alpha={grid}"], 1, own.parent / "out")
    return sweep(own, out, points, say=lambda line: None, start=start)


@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_a_sweep_does_not_go_on_with_inputs_that_were_changed(own, change, named):
    swept(own, "4", Runs())
    before = (own.parent / "out/sweep.json").read_bytes()
    change(own)
    runs = Runs()
    with pytest.raises(InputError, match=named + ".* held something else when this run was made.*another --out") as one:
        swept(own, "4,8", runs)
    assert "\n" not in str(one.value) and "alpha=4/seed-0: " in str(one.value)
    assert runs.begun == [] and (own.parent / "out/sweep.json").read_bytes() == before
    assert sorted(path.name for path in (own.parent / "out").iterdir() if path.is_dir()) == ["alpha=4"]


def test_a_sweep_goes_on_with_the_same_inputs_and_when_they_are_gone(own):
    swept(own, "4", Runs())
    (own.parent / "model/README.md").write_text("notes", encoding="utf-8")  # nothing that is read
    runs = Runs()
    assert len(swept(own, "4,8", runs)["table"]) == 2 and runs.begun == ["alpha=8"]
    shutil.rmtree(own.parent / "data")  # posts may be deleted and scores kept
    assert len(swept(own, "4,8", Runs())["table"]) == 2


@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_inputs_that_are_changed_meanwhile_are_not_averaged(own, change, named):
    runs = Runs(lambda count: change(own) if count == 1 else None)
    with pytest.raises(InputError, match=rf"alpha=8/seed-0: {named}.*than those of .*alpha=4/seed-0"):
        swept(own, "4,8", runs)
    assert not (own.parent / "out/sweep.json").exists()


def test_another_base_is_told_by_its_fingerprint(own):
    """Of runs that noted nothing else, as an earlier version did not."""
    swept(own, "4,8", Runs())
    for alpha, base in ((4, "a"), (8, "b")):
        file = own.parent / f"out/alpha={alpha}/seed-0/run.json"
        state = json.loads(file.read_text(encoding="utf-8"))
        del state["stages"]["data"]["read"]
        file.write_text(json.dumps(state | {"base": {"float32": base}}), encoding="utf-8")
    with pytest.raises(InputError, match=r"alpha=8/seed-0: model\.path .*than those of .*alpha=4/seed-0"):
        swept(own, "4,8", Runs())


@pytest.mark.parametrize(("change", "named"), CHANGES[:2])
def test_a_search_does_not_go_on_with_inputs_that_were_changed(own, change, named):
    settings = {"out": own.parent / "out", "say": lambda line: None}
    spaces = read_spaces(["lora.alpha=float:1:9"])
    search(own, spaces, 2, start=Runs(), **settings)
    assert search(own, spaces, 3, start=(more := Runs()), **settings)[1]["table"] and len(more.begun) == 1
    change(own)
    runs = Runs()
    with pytest.raises(InputError, match=named + ".* held something else"):
        search(own, spaces, 4, start=runs, **settings)
    assert runs.begun == []


def test_a_search_learns_nothing_from_inputs_that_were_changed_meanwhile(own):
    runs = Runs(lambda count: relabelled(own) if count == 2 else None)
    with pytest.raises(InputError, match=r"data\.root .*than those of"):
        search(own, read_spaces(["lora.alpha=float:1:9"]), 5, start=runs, out=own.parent / "out",
               say=lambda line: None)  # fmt: skip
    assert len(runs.begun) == 3


def test_own_tasks_that_were_edited_are_no_input_of_the_same_sweep(own):
    swept(own, "4", Runs())
    file = own.parent / "out/alpha=4/seed-0/run.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    state["recipe"]["tasks"] = {"mood": {"labels": {"low": {"en": "low"}}}}
    file.write_text(json.dumps(state), encoding="utf-8")
    runs = Runs()
    with pytest.raises(InputError, match=r"alpha=4/seed-0: tasks held something else"):
        swept(own, "4,8", runs)
    assert runs.begun == []
