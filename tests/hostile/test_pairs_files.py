"""Pairs of answers from strangers: one line with file, row and key, before a stage is trained."""

import json
import os
import shutil

import pytest

from mentalglm_jax.data.pairs import read_pairs
from tests.hostile.attack import refused, run
from tests.hostile.foreign_files import JSON_ATTACKS, called

PAIR = {"id": "a > b", "prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [8, 10], "margin": 0.5}
LINES: dict[str, tuple[bytes, str]] = {
    **{name: (raw if isinstance(raw, bytes) else raw.encode(), "") for name, (raw, _) in JSON_ATTACKS.items()
       if name not in ("empty", "a byte order mark")},
    "no prompt": (json.dumps({k: v for k, v in PAIR.items() if k != "prompt_ids"}).encode(), ":2: field 'prompt_ids'"),
    "an empty prompt": (json.dumps(PAIR | {"prompt_ids": []}).encode(), ":2: prompt_ids: expected a list"),
    "an empty answer": (json.dumps(PAIR | {"rejected_ids": []}).encode(), ":2: rejected_ids: expected a list"),
    "ids as text": (json.dumps(PAIR | {"chosen_ids": "8 9"}).encode(), ":2: chosen_ids: expected a list"),
    "true as an id": (json.dumps(PAIR | {"chosen_ids": [True, 1]}).encode(), ":2: chosen_ids: expected a list"),
    "1.0 as an id": (json.dumps(PAIR | {"chosen_ids": [1.0]}).encode(), ":2: chosen_ids: expected a list"),
    "a nested list": (json.dumps(PAIR | {"chosen_ids": [[1]]}).encode(), ":2: chosen_ids: expected a list"),
    "a negative id": (json.dumps(PAIR | {"chosen_ids": [8, -1]}).encode(), ":2: chosen_ids: -1 is no token"),
    "another vocabulary": (json.dumps(PAIR | {"chosen_ids": [8, 99]}).encode(), r":2: chosen_ids: 99 .*\(0 to 95\)"),
    "an id of 63 bits": (json.dumps(PAIR | {"prompt_ids": [2**62]}).encode(), ":2: prompt_ids: 4611686018427387904"),
    "one answer twice": (json.dumps(PAIR | {"rejected_ids": [8, 9]}).encode(), ":2: chosen_ids and rejected_ids"),
    "the same id": (json.dumps(PAIR | {"id": "first"}).encode(), ":2: id 'first' already stands in line 1"),
    "no id": (json.dumps(PAIR | {"id": " "}).encode(), ":2: id: expected text"),
    "an id of control characters": (json.dumps(PAIR | {"id": "\x1b[31m", "chosen_ids": 0}).encode(), ":2: chosen_ids"),
    "a line of 5 million characters": (b'"' + b"x" * 5_000_000 + b'"', ":2: a line of 4194304 characters or more"),
}  # fmt: skip


@pytest.mark.parametrize("attack", LINES)
def test_pairs_line(tmp_path, attack):
    raw, says = LINES[attack]
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(json.dumps(PAIR | {"id": "first"}).encode() + b"\n" + raw + b"\n")
    refused(called(lambda: read_pairs(file, 96)), rf"pairs\.jsonl.*{says}")


@pytest.fixture
def world(template, tmp_path, monkeypatch):
    shutil.copytree(template, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    (tmp_path / "world" / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    return tmp_path / "world"


@pytest.mark.parametrize("kind", ["nothing", "empty", "directory", "pipe", "device"])
def test_no_file_of_pairs(world, capsys, kind):
    file = world / "pairs.jsonl"
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "empty":
        file.touch()
    elif kind == "device":
        file.symlink_to("/dev/zero")
    outcome = trained("{kind: dpo, pairs: pairs.jsonl}", capsys)
    refused(outcome, r"pairs\.jsonl.*(no such file|holds no pair|cannot be read)")


def trained(objective: str, capsys, *more: str):
    outcome = run(["mentalglm", "train", "recipe.yaml", "--set", f"stages.a.objective={objective}", "--set",
                   "stages.a.languages=null", *more], capsys)  # fmt: skip
    lines = [line for line in outcome.err.splitlines(keepends=True) if line.startswith("mentalglm: ")]
    return type(outcome)(outcome.code, outcome.out, "".join(lines), outcome.seconds)


OBJECTIVES = {
    "a kind there is not": ("{kind: ppo, pairs: pairs.jsonl}", r"objective\.kind.*'dpo', 'ipo' or 'orpo'"),
    "no pairs": ("{kind: dpo}", r"objective\.pairs"),
    "beta 0": ("{kind: dpo, pairs: pairs.jsonl, beta: 0}", r"objective\.beta"),
    "beta nan": ("{kind: dpo, pairs: pairs.jsonl, beta: .nan}", r"objective\.beta"),
    "all labels wrong": ("{kind: dpo, pairs: pairs.jsonl, label_smoothing: 0.5}", r"objective\.label_smoothing"),
    "a key there is not": ("{kind: dpo, pairs: pairs.jsonl, weight: 1}", "weight"),
    "a list": ("[dpo]", "objective"),
}


@pytest.mark.parametrize("attack", OBJECTIVES)
def test_objective(world, capsys, attack):
    given, says = OBJECTIVES[attack]
    refused(trained(given, capsys), says)


@pytest.mark.parametrize(
    "key", ["variant=unfaithful", "replay=0.5", "weights={suicide_risk: 2}", "train.mask_posts=0.1"]
)
def test_what_is_for_records_is_not_for_pairs(world, capsys, key):
    outcome = trained("{kind: dpo, pairs: pairs.jsonl}", capsys, "--set", f"stages.a.{key}")
    refused(outcome, rf"{key.split('=')[0].split('.')[-1]}")


@pytest.mark.parametrize("how", ["another rank", "no adapter", "a pickle"])
def test_an_adapter_to_start_from(world, capsys, how):
    adapter = world / "trained" / "stages" / "a" / "adapter"
    more = {"another rank": ["--set", "lora.rank=4"]}.get(how, [])
    if how == "no adapter":
        shutil.rmtree(adapter)
    elif how == "a pickle":
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    outcome = trained("{kind: dpo, pairs: pairs.jsonl}", capsys, "--set", f"model.adapter={adapter}", *more)
    says = {"another rank": r"lora: describes another adapter than model\.adapter .*rank 4 where it has 2",
            "no adapter": "adapter", "a pickle": "only pickles are there"}  # fmt: skip
    refused(outcome, says[how])


def test_a_restart_does_not_delete_its_pairs(world, capsys):
    assert trained("{kind: dpo, pairs: pairs.jsonl}", capsys).code == 0
    (world / "run" / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    outcome = trained("{kind: dpo, pairs: run/pairs.jsonl}", capsys, "--restart")
    refused(outcome, r"stages\.a\.objective\.pairs: .*lies in run, which --restart would delete")
    assert (world / "run" / "stages" / "a" / "adapter").is_dir()
