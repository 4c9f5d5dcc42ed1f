"""``mentalglm bench``: what it measures, its time boxes, and a report that is valid whatever happens."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mentalglm_jax.bench import device, generation, logits, run, training
from mentalglm_jax.bench.target import Target, examples, target_of
from mentalglm_jax.cli.bench import bench_table
from mentalglm_jax.cli.main import main
from mentalglm_jax.errors import InputError
from mentalglm_jax.train.recipe import Recipe
from mentalglm_jax.train.speed import train_flops

GEOMETRY = {"vocab_size": 160, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


def recipe(**model: Any) -> Recipe:
    return Recipe.model_validate({
        "run_dir": "bench", "data": {"source": "synthetic"}, "lora": {"rank": 4, "alpha": 8},
        "model": {"geometry": GEOMETRY, **model}, "pretrain": {"train": {"steps": 1}},
        "stages": [{"name": "a", "languages": ["en"], "train": {"steps": 1, "rows": 2, "sequence_length": 128}}],
    })  # fmt: skip


@pytest.fixture(scope="module")
def target() -> Target:
    return target_of(recipe())


class Told(list[dict[str, Any]]):
    def __call__(self, found: dict[str, Any]) -> None:
        self.append(json.loads(json.dumps(found)))


@pytest.mark.parametrize("quantize", [None, "int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_random_weights_are_made_in_every_place_of_the_model(quantize):
    target = target_of(recipe(quantize=quantize))
    wanted = {keys: (x.shape, x.dtype) for keys, x in nnx.to_flat_state(nnx.state(target.shapes()))}
    model = target.model()
    found = {keys: (x.shape, x.dtype) for keys, x in nnx.to_flat_state(nnx.state(model))}
    assert found == wanted
    out = model(jnp.arange(4, 20)[None])
    assert np.isfinite(out).all() and np.std(out) > 0
    assert target.parameters() == 3 * (2 * 32 * 32 + 32 * 64 + 3 * 32 * 64 + 96 + 64) + 2 * 160 * 32 + 32


def test_the_step(target, tmp_path):
    told = Told()
    training.measure(target, 0.0, tmp_path / "rows.npz", told)
    first, last = told[0], told[-1]
    assert first["planned_bytes"] > 0 and "compile_seconds" not in first  # each is told as soon as it is known
    assert last["compile_seconds"] > 0 and last["compiled_bytes"] > 4 * last["parameters"]
    assert last["steps"] >= 1 and np.isfinite(last["loss"])
    rows = np.load(tmp_path / "rows.npz")
    assert rows["tokens"].shape == (2, 128) and (rows["segments"] > 0).mean() > 0.5
    # The rate is real tokens over the median step, and its FLOPs are those of the convention.
    tokens = last["tokens_per_second"] * last["step_seconds"]
    assert 0.5 * 256 < tokens <= 256
    targets = last["answer_tokens_per_second"] * last["step_seconds"]
    least, most = (
        train_flops(target.config, tokens=tokens, targets=targets, pairs=pairs, frozen=True)
        for pairs in (0.0, 128 * 129.0)
    )  # two rows of one segment each see most
    assert least < last["model_flops"] * last["step_seconds"] <= most * 1.001
    assert last["executed_flops"] > last["model_flops"]


def test_decoding(target, monkeypatch):
    monkeypatch.setattr(generation, "BATCHES", (1, 2))
    told = Told()
    generation.measure(target, 60.0, told)
    assert list(told[-1]["batches"]) == ["1", "2"]
    for entry in told[-1]["batches"].values():
        assert entry["weights_per_second"] == pytest.approx(told[-1]["weight_bytes"] / entry["step_seconds"])
        assert entry["tokens_per_second"] > 0
    layer = 2 * 32 * 32 + 2 * 32 * 32 + 3 * 32 * 64  # and the vocabulary's matrix, four bytes each
    assert told[-1]["weight_bytes"] == 4 * (3 * layer + 32 * 160)


def test_logits_are_the_cut_models(target, tmp_path):
    told = Told()
    logits.measure(target, tmp_path, told)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["num_hidden_layers"] == told[0]["layers"] == 2
    assert np.load(tmp_path / "logits.npz")["logits"].shape == (1, logits.LENGTH, 160)


def test_the_device(monkeypatch):
    told = Told()
    monkeypatch.setattr(device, "ROUNDS", 1)
    device.measure(told)
    assert told[0]["machine"]["backend"] == "cpu" and told[0]["documented"] is None
    assert told[-1]["matmul_flops"] > 1e8 and told[-1]["bandwidth"] > 1e8


def test_lengths_are_as_stated():
    found = examples(2000, 4096, 1000)
    sizes = np.array([len(one["tokens"]) for one in found])
    assert [round(float(((sizes >= a) & (sizes < b)).mean()), 1) for a, b in ((120, 300), (300, 700), (700, 1500))] == [
        0.5, 0.3, 0.1] or sizes.max() < 1500  # fmt: skip
    assert 0.28 < sum(len(one["target_ids"]) for one in found) / sizes.sum() < 0.32
    assert max(len(one["tokens"]) for one in examples(50, 128, 1000)) == 128


def plain(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def test_a_part_is_stopped_when_its_time_is_over(tmp_path):
    out = tmp_path / "bench.json"
    with pytest.raises(run.RunError, match=r"nothing could be measured; .*bench\.json says why"):
        run.bench(plain(recipe()), parts=["device"], minutes=0.5 / 60, out=out)  # Python starts, JAX does not
    entry = json.loads(out.read_text())["parts"]["device"]
    assert entry["state"].startswith("stopped after") and entry["found"] is None and entry["seconds"] < 30


def test_a_part_that_fails_says_why_and_costs_the_others_nothing(tmp_path):
    given = plain(recipe())
    given["mesh"] = {"data": 3, "fsdp": 1, "tensor": 1}
    out = tmp_path / "bench.json"
    report = run.bench(given, parts=["generate", "device"], minutes=4.0, out=out)
    assert report == json.loads(out.read_text())
    assert report["parts"]["generate"]["state"].startswith("failed: ") and "3" in report["parts"]["generate"]["state"]
    assert report["parts"]["device"]["found"]["machine"]["jax"] == jax.__version__
    lines = bench_table(report)
    assert lines.row_count >= 2


def test_an_interruption_leaves_a_report(tmp_path, monkeypatch):
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.bench(None, parts=["device", "step"], out=tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["parts"] == {
        "device": {"state": "interrupted", "found": None, "seconds": 0.0}
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--part", "speed"], "part 'speed' is not one of device, step"),
        (["--part", "peft"], "part 'peft' trains on the rows that part 'step' packs; ask for both"),
        (["--against", "trl"], "--against 'trl' is not known; peft is"),
        (["--set", "seed=1"], "--set changes a recipe; name one"),
    ],
)
def test_bad_input_is_one_line(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").touch()
    monkeypatch.setattr(run, "_measure", lambda *_: pytest.fail("it measured"))
    with pytest.raises(SystemExit) as end:
        main(["bench", "--out", str(tmp_path / "taken" / "bench.json")])
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "taken" in line and "cannot write" in line


def test_a_mesh_that_rows_cannot_be_spread_over(target):
    given = dataclasses.replace(target)
    assert given.train.rows == 2
    with pytest.raises(InputError):
        target_of(Recipe.model_validate({**plain(recipe()), "mesh": {"data": 2}}))
