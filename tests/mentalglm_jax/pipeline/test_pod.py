"""The whole job on two real processes that share the model: the files of one process, killed and stopped as one."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mentalglm_jax.checkpoints.directories import load
from mentalglm_jax.checkpoints.hf_files import TensorFiles
from mentalglm_jax.data.posts import read_posts
from mentalglm_jax.data.records import Record, write_records
from mentalglm_jax.evaluate.posts import answer_posts
from mentalglm_jax.pipeline.job import run
from mentalglm_jax.text.tokenizer import GlmTokenizer
from mentalglm_jax.train.recipe import load_recipe
from tests.mentalglm_jax.pipeline.conftest import QUESTION
from tests.mentalglm_jax.pipeline.test_changes import Seen
from tests.mentalglm_jax.pod import Pod

MESH = ("--set", "mesh.distributed=true", "--set", "mesh.data=2", "--set", "mesh.fsdp=2")


def mentalglm(*arguments: object) -> list[object]:
    return ["-P", "-m", "mentalglm_jax", *arguments, *MESH]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def names(directory: Path) -> set[str]:
    """What lies in a run directory, but for checkpoints, whose files depend on the devices."""
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    return {name for name in found if "/checkpoints/" not in name and "/tensorboard/" not in name}


def same_scores(found: list[dict[str, Any]], wanted: list[dict[str, Any]], key: str) -> None:
    assert [row["id"] for row in found] == [row["id"] for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert list(one[key]) == list(other[key])
        np.testing.assert_allclose([*one[key].values()], [*other[key].values()], rtol=0, atol=1e-4)


def same_tensors(found: Path, wanted: Path) -> None:
    ours, theirs = TensorFiles([found]), TensorFiles([wanted])
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name in ours.tensors:
        np.testing.assert_allclose(ours.read(name), theirs.read(name), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.timeout(600)
def test_posts_are_shared_out_and_written_once(small, tmp_path):
    """By two processes of one device, each with a copy of the model; one process here."""
    posts, model = tmp_path / "posts.txt", small.parent / "model"
    posts.write_text("".join(f"I think of the number {n} all day long.\n" for n in range(5)), encoding="utf-8")
    command = ["generate", model, "--in", posts, "--task", "suicide_risk", "--language", "en", "--batch-size", "4",
               "--max-new-tokens", "6", "--json"]  # fmt: skip
    pod = Pod("-P", "-m", "mentalglm_jax", *command, "--out", tmp_path / "pod.jsonl", "--set", "mesh.distributed=true",
              "--set", "mesh.data=2", devices=1)  # fmt: skip
    loaded, tokenizer = load(model), GlmTokenizer.load(model)
    asked = read_posts(posts, task="suicide_risk", language="en")
    wanted = answer_posts(loaded, tokenizer, asked, tmp_path / "one.jsonl", max_new_tokens=6, batch_size=4)
    first, second = pod.done()
    assert json.loads(first)["rows"] == 5 and second == ""
    found = rows(tmp_path / "pod.jsonl")
    same_scores(found, wanted, "label_probabilities")
    assert [row["output_ids"] for row in found] == [row["output_ids"] for row in wanted]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl", "pod.jsonl", "posts.txt"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_job_on_two_processes(small, tmp_path):
    """Trained until the label F1 of development records stops it, exported, answered, scored: as by one process, told
    by the first."""
    shutil.copytree(small.parent / "data", tmp_path / "data")
    write_records(tmp_path / "data" / "dev.jsonl", [
        Record(f"dev{n}", "suicide_risk", "en", f"Every night I dream of {what} again.", QUESTION,
               "low" if n % 2 else "high", split="dev") for n, what in enumerate(("rain", "soup", "fog", "tea", "ice"))
    ])  # fmt: skip
    changes = ["train.rows=4", "generate={max_new_tokens: 8, batch_size: 4}", f"data.root={tmp_path / 'data'}",
               "stages.b.train.eval_every=1", "stages.b.train.early_stopping={patience: 1, metric: label_f1}",
               ]  # fmt: skip
    pod = Pod(*mentalglm("run", small, "--set", f"run_dir={tmp_path / 'pod'}", "--json",
                         *(word for change in changes for word in ("--set", change))), devices=2)  # fmt: skip
    run(load_recipe(small, [f"run_dir={tmp_path / 'one'}", *changes]), Seen())
    first, second = pod.done()
    found, wanted = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("pod", "one"))
    assert json.loads(first) == found and second == ""
    assert found["eval"]["suicide_risk"]["n"] == 1 and found["seconds"].keys() == wanted["seconds"].keys()
    pods, ones = (rows(tmp_path / name / "generations.jsonl") for name in ("pod", "one"))
    for row in (*pods, *ones):
        assert row.pop("answered_by")  # the model to the last bit, and sums over two devices are rounded otherwise
    assert pods == ones
    same_scores(*(rows(tmp_path / name / "label_scores.jsonl") for name in ("pod", "one")), "label_logprobs")
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        same_tensors(tmp_path / "pod" / name, tmp_path / "one" / name)
    arrays = [np.load(tmp_path / name / "reference_logits.npz") for name in ("pod", "one")]
    np.testing.assert_allclose(arrays[0]["logits"], arrays[1]["logits"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(arrays[0]["greedy_ids"], arrays[1]["greedy_ids"])
    assert names(tmp_path / "pod") == names(tmp_path / "one")
    stopped = [[(row["step"], row["label_f1"]) for row in rows(tmp_path / name / "stages/b/evaluation.jsonl")]
               for name in ("pod", "one")]  # fmt: skip
    assert stopped[0] == stopped[1] != []


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "run"
    run(load_recipe(small, [f"run_dir={directory}"]), Seen(), until="train")
    return directory


@pytest.fixture(scope="module")
def posts(tmp_path_factory):
    """Many, so that there is time between the first batch and the last."""
    file = tmp_path_factory.mktemp("posts") / "posts.txt"
    file.write_text("".join(f"I think of the number {n} all day long.\n" for n in range(60)), encoding="utf-8")
    return file


def asked(small: Path, posts: Path, out: Path) -> list[object]:
    return ["generate", small.parent / "model", "--in", posts, "--out", out, "--task", "suicide_risk", "--language",
            "en", "--batch-size", "2", "--max-new-tokens", "48"]  # fmt: skip


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_and_stopped_in_the_middle_the_same_command_goes_on(small, posts, tmp_path):
    one, out = tmp_path / "one.jsonl", tmp_path / "out.jsonl"
    alone = Pod("-P", "-m", "mentalglm_jax", *asked(small, posts, one), count=1, devices=1)
    partial = tmp_path / "out.jsonl.partial"
    pod = Pod(*mentalglm(*asked(small, posts, out)), devices=2)
    pod.when(lambda: lines(partial) > 8, pod.kill)
    alone.done()
    kept = lines(partial) - 1
    assert 8 <= kept < 60 and not out.exists()
    # A signal to the second of them stops both after the same batch, with the launcher's "try again".
    pod = Pod(*mentalglm(*asked(small, posts, out)), devices=2)
    pod.when(lambda: lines(partial) > kept + 8, lambda: os.kill(pod.processes[1].pid, signal.SIGTERM))
    ended = pod.ended()
    assert [process.code for process in ended] == [75, 75], ended
    assert all("interrupted while generating; what was finished is kept" in process.err for process in ended)
    assert kept + 8 <= lines(partial) - 1 < 60 and (lines(partial) - 1) % 2 == 0 and not out.exists()
    # Ctrl-C on the first one.
    stopped = lines(partial)
    pod = Pod(*mentalglm(*asked(small, posts, out)), devices=2)
    pod.when(lambda: lines(partial) > stopped + 4, lambda: os.kill(pod.processes[0].pid, signal.SIGINT))
    assert sorted(process.code for process in pod.ended()) == [1, 75]
    assert stopped < lines(partial) < 61
    Pod(*mentalglm(*asked(small, posts, out)), devices=2).done()
    found, wanted = rows(out), rows(one)
    same_scores(found, wanted, "label_probabilities")
    for row in (*found, *wanted):
        del row["label_probabilities"]
    assert found == wanted
    assert not partial.exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_evaluate_and_export_of_a_trained_run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "pod")
    shutil.copytree(trained, tmp_path / "one")
    Pod("-P", "-m", "mentalglm_jax", "evaluate", tmp_path / "one", count=1, devices=1).done()
    first, second = Pod(*mentalglm("evaluate", tmp_path / "pod"), devices=2).done()
    assert "suicide_risk" in first and second == ""
    assert rows(tmp_path / "pod/generations.jsonl") == rows(tmp_path / "one/generations.jsonl")
    same_scores(*(rows(tmp_path / name / "label_scores.jsonl") for name in ("pod", "one")), "label_logprobs")
    for form, file in (("merged", "model.safetensors"), ("vllm", "adapter_model.safetensors")):
        Pod(*mentalglm("export", tmp_path / "pod", "--to", form), devices=2).done()
        Pod("-P", "-m", "mentalglm_jax", "export", tmp_path / "one", "--to", form, count=1, devices=1).done()
        same_tensors(tmp_path / "pod" / f"export-{form}" / file, tmp_path / "one" / f"export-{form}" / file)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_one_process_refuses_all_refuse(small, posts, trained, tmp_path):
    (tmp_path / "file").write_text("x")
    pods = {
        "cannot make its directory": Pod(*mentalglm(*asked(small, posts, tmp_path / "file/out.jsonl")), devices=2),
        "the processes were given different posts": Pod(devices=2, each=[
            mentalglm(*asked(small, posts, tmp_path / "out.jsonl"), *limit) for limit in ((), ("--limit", "3"))
        ]),
        "would be replaced": Pod(
            *mentalglm("export", trained, "--to", "merged", "--out", posts.parent), devices=2
        ),
    }  # fmt: skip
    for reason, pod in pods.items():
        for process in pod.ended(300):
            assert process.code in (1, 2) and reason in process.err.splitlines()[-1], process
    assert not (tmp_path / "out.jsonl").exists()
