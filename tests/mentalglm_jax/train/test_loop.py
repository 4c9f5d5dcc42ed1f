"""The training loop: what a run writes, evaluates and keeps, and which changes of its recipe it refuses."""

import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from mentalglm_jax.data.batches import PackedBatches
from mentalglm_jax.devices.stopping import Interrupted
from mentalglm_jax.errors import InputError
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.train.loop import Surroundings, TrainResult, _check_context, train
from mentalglm_jax.train.loss import answer_loss
from tests.mentalglm_jax.runs import EXAMPLES, HELD_OUT, MASKED, MODELS, one_line, run, steps_saved
from tests.mentalglm_jax.tiny import parameters, rows, same, tiny_config, tiny_model


def test_a_whole_run(whole):
    result, values, lines, directory = whole
    assert isinstance(result, TrainResult)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert steps_saved(directory) == ["8", "12"]
    assert (result.steps, result.loss, result.accuracy) == (12, lines[-1]["loss"], lines[-1]["accuracy"])
    assert result.skipped_steps == 0 and result.tokens_per_second > 0 and result.lengths.examples == 30
    assert len({line["loss"] for line in lines}) == 12
    before = parameters(tiny_model(dropout=0.3))
    assert {name for name in before if (values[name] != before[name]).any()} == {
        n for n in before if n.endswith((".a", ".b"))
    }
    np.testing.assert_allclose([line["learning_rate"] for line in lines[:4]], [0, 1e-2 / 3, 2e-2 / 3, 1e-2], rtol=1e-6)
    # What a step counted is what its batch held.
    batches = iter(PackedBatches(EXAMPLES, rows=4, sequence_length=32, targets_per_row=None, seed=3))
    assert [line["targets"] for line in lines] == [next(batches)["target_weights"].sum() for _ in range(12)]


def test_a_run_learns(tmp_path):
    """The same eight examples in every step: random answers can be learnt by heart, whatever the machine rounds to."""
    run(tmp_path, examples=EXAMPLES[:8], learning_rate=3e-2, steps=30, mask_posts=0.0, save_every=100)
    losses = [line["loss"] for line in rows(tmp_path)]
    assert len({line["targets"] for line in rows(tmp_path)}) == 1
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


def evaluations(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]


def test_evaluation_on_the_way(whole, tmp_path):
    """It changes nothing of the training, is the plain loss of the parameters, and is told again after a resume."""
    seen, read = [], []

    def sample(model: Glm) -> list[dict[str, Any]]:
        seen.append(parameters(model))
        return [{"id": "a", "answer": str(len(seen))}]

    around = Surroundings(sample=sample)
    whole_dir, parts = tmp_path / "whole", tmp_path / "parts"
    result, values = run(whole_dir, 10, lambda: read.append(rows(whole_dir)), evaluation=HELD_OUT, eval_every=5,
                         around=around)  # fmt: skip
    assert rows(whole_dir) == whole[2] and same(values, whole[1]) and same(seen[-1], values)
    assert read == [whole[2][:10]]  # the directory of a running run can be read
    found = evaluations(whole_dir)
    assert [row["step"] for row in found] == [5, 10, 12] and found[1]["samples"] == [{"id": "a", "answer": "2"}]
    losses = [row["loss"] for row in found]
    assert result.best == (found[int(np.argmin(losses))]["step"], min(losses))
    batches = PackedBatches(HELD_OUT, rows=16, sequence_length=32, targets_per_row=None, seed=1)
    assert batches.steps_per_epoch() == 1
    graph, state = nnx.split(MODELS[-1])
    loss = jax.jit(lambda state, batch: answer_loss(nnx.merge(graph, state), batch, chunk=1000))
    sums = loss(state, next(iter(batches)))
    assert losses[-1] == pytest.approx(float(sums.nll / sums.weight), rel=1e-6)
    assert found[-1]["accuracy"] == pytest.approx(float(sums.correct / sums.weight), rel=1e-6)
    with pytest.raises(Interrupted):
        run(parts, 7, lambda: os.kill(os.getpid(), signal.SIGTERM), evaluation=HELD_OUT, eval_every=5)
    again, values = run(parts, evaluation=HELD_OUT, eval_every=5)
    assert [row["loss"] for row in evaluations(parts)] == losses and again.best == result.best
    assert rows(parts) == whole[2] and same(values, whole[1])


@pytest.mark.parametrize("of", ["examples", "evaluation"])
def test_an_example_beyond_the_models_context_is_refused_by_its_name(tmp_path, of):
    """Of a pair each answer is as long as it is."""
    context = tiny_model().config.max_position_embeddings
    longest = np.zeros(context + 1, np.int32)
    long = EXAMPLES[0] | {"id": "the long one", "tokens": longest}
    with pytest.raises(
        InputError, match=f"'the long one': has {context + 1} tokens, .* sequence_length to at most {context}"
    ):
        run(tmp_path, **{of: [*EXAMPLES, long]}, **({"eval_every": 5} if of == "evaluation" else {}))
    assert not (tmp_path / "checkpoints").exists()
    _check_context(context, [EXAMPLES[0] | {"tokens": longest, "split": context}])


def test_a_run_can_end_with_its_best_step(tmp_path):
    """At this learning rate the development loss rises again; the average of the parameters is what is scored."""
    seen = []
    around = Surroundings(sample=lambda model: seen.append(parameters(model)) or [])
    settings: dict[str, Any] = {"evaluation": HELD_OUT, "eval_every": 2, "final": "best", "ema_decay": 0.5,
                                "keep_last": 1, "learning_rate": 5e-2}  # fmt: skip
    result, values = run(tmp_path, around=around, **settings)
    assert result.best is not None and result.best[0] < 12  # else there is nothing to see here
    assert same(values, seen[result.best[0] // 2 - 1]) and not same(values, seen[-1])
    assert steps_saved(tmp_path) == [str(result.best[0]), "12"]
    again, values = run(tmp_path, 12, lambda: pytest.fail("a step was taken"), **settings)
    assert again.best == result.best and same(values, seen[result.best[0] // 2 - 1])


def test_evaluation_needs_examples(tmp_path):
    with pytest.raises(InputError, match="eval_every is set, but there are no development examples"):
        run(tmp_path, eval_every=5)


def test_a_profile_is_written_and_changes_nothing(whole, tmp_path):
    run(tmp_path, around=Surroundings(profile=True))
    assert rows(tmp_path) == whole[2]
    assert [path for path in (tmp_path / "profile").rglob("*.xplane.pb") if path.stat().st_size > 10_000]


def test_a_changed_recipe_can_be_allowed(whole, tmp_path, caplog):
    directory = tmp_path / "copy"
    shutil.copytree(whole[3], directory)
    shutil.rmtree(directory / "checkpoints" / "12")
    with caplog.at_level(logging.WARNING, logger="mentalglm_jax"):
        run(directory, around=Surroundings(allow_changed=True), learning_rate=2e-2)
    assert "train.learning_rate: 0.01 -> 0.02; going on with the new values" in caplog.text
    found = rows(directory)
    assert found[:8] == whole[2][:8]
    assert found[8]["learning_rate"] == pytest.approx(2 * whole[2][8]["learning_rate"])
    # What is saved now is of the new recipe.
    with pytest.raises(InputError, match=r"train.learning_rate: 0.02 -> 0.01"):
        run(directory)
    # An average of the parameters is one more array per parameter: the reason comes first, and nothing is deleted.
    with pytest.raises(InputError, match=r"recipe: train.ema_decay: None -> 0.9; .*Its arrays do not fit this one"):
        run(directory, around=Surroundings(allow_changed=True), learning_rate=2e-2, ema_decay=0.9)
    assert steps_saved(directory)[-1] == "12"


def test_a_finished_run_is_not_repeated(whole, tmp_path):
    """What a pipeline does that was killed between the last step and noting it: the same result, nothing trained."""
    result, values, lines, directory = whole
    shutil.copytree(directory, tmp_path / "copy")
    again, same_values = run(tmp_path / "copy", 12, lambda: pytest.fail("a step was taken"))
    assert (again.steps, again.loss, again.accuracy) == (12, result.loss, result.accuracy)
    assert same(same_values, values) and rows(tmp_path / "copy") == lines


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"learning_rate": 2e-2}, "train.learning_rate: 0.01 -> 0.02"),
        ({"seed": 4}, "seed: 3 -> 4"),
        ({"steps": 13}, "steps: 12 -> 13"),
        ({"examples": EXAMPLES[1:]}, "examples.count: 30 -> 29"),
        ({"examples": [*EXAMPLES[1:], EXAMPLES[0]]}, "examples.sha256: "),
    ],
)
def test_another_recipe_is_refused(whole, changes, key):
    with pytest.raises(InputError) as error:
        run(whole[3], **changes)
    assert key in one_line(error.value, 2)
    assert rows(whole[3]) == whole[2] and steps_saved(whole[3]) == ["8", "12"]  # untouched


@pytest.mark.parametrize(
    ("model", "trainable", "key"),
    [
        ("dora", "lora", "parameters.layers.mlp.down_proj.adapter.magnitude"),
        ("lora", "all", "trainable: 'lora' -> 'all'"),
    ],
)
def test_another_adapter_is_refused(whole, model, trainable, key):
    with pytest.raises(InputError) as error:
        train(tiny_model(dora=model == "dora"), EXAMPLES, tiny_config(**MASKED), whole[3], trainable=trainable, seed=3)
    assert key in str(error.value)


def test_the_callers_identity_counts(tmp_path):
    settings: dict[str, Any] = {"trainable": "lora", "seed": 0}
    config = tiny_config(steps=1)
    train(tiny_model(), EXAMPLES, config, tmp_path, identity={"base": "one"}, **settings)
    with pytest.raises(InputError, match="base: 'one' -> 'two'"):
        train(tiny_model(), EXAMPLES, config, tmp_path, identity={"base": "two"}, **settings)


def test_epochs_are_batches_that_hold_every_example(tmp_path):
    per_epoch = PackedBatches(EXAMPLES, rows=4, sequence_length=32, targets_per_row=None, seed=3).steps_per_epoch()
    result, _ = run(tmp_path, steps=None, epochs=2)
    assert result.steps == 2 * per_epoch
    targets = sum(len(item["target_ids"]) for item in EXAMPLES)
    assert sum(line["targets"] for line in rows(tmp_path)) == 2 * targets


def test_logging_now_and_then(whole, tmp_path):
    run(tmp_path, steps=7, log_every=3)
    assert [line["step"] for line in rows(tmp_path)] == [3, 6, 7]
