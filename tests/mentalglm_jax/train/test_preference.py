"""Preference stages: the losses by their formulas from full logits in float64, and everything a run promises."""

import json
import logging
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from pydantic import ValidationError

from mentalglm_jax.data.batches import PackedBatches
from mentalglm_jax.devices.stopping import Preempted
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.model.lora import LoraParam
from mentalglm_jax.model.sharding import make_mesh
from mentalglm_jax.train import reference
from mentalglm_jax.train.loop import Surroundings, train
from mentalglm_jax.train.preference import LOSSES, MEASURES, Objective, pairs_per_token, preference_loss
from mentalglm_jax.train.step import make_optimizer, make_step
from tests.mentalglm_jax.pairs import LENGTH, objective, tiny_pair_examples, tiny_pairs
from tests.mentalglm_jax.tiny import on_eight_devices, parameters, rows, same, tiny_config, tiny_model

KINDS = [("dpo", {"label_smoothing": 0.1, "sft_weight": 0.2}), ("ipo", {"sft_weight": 0.2}), ("orpo", {})]


def settings(**changes):
    return tiny_config(**({"sequence_length": LENGTH, "steps": 6, "save_every": 2, "rows": 2} | changes))


@partial(jax.jit, static_argnums=0)
def all_logits(graph, state, tokens):
    return nnx.merge(graph, state)(tokens)


def token_log_p(model: Glm, prompt, answer) -> np.ndarray:
    """float64, of one conversation alone."""
    ids = np.zeros((1, 20), np.int32)
    ids[0, : len(prompt) + len(answer)] = [*prompt, *answer]
    logits = np.asarray(all_logits(*nnx.split(model), ids), np.float64)[0]
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(
        -1, keepdims=True
    )  # fmt: skip
    return np.array([log_p[len(prompt) - 1 + at, token] for at, token in enumerate(answer)])


def moved(seed: int = 5) -> Glm:
    """The tiny model some way from where its stage began."""
    model = tiny_model()
    for place, (_, leaf) in enumerate(nnx.to_flat_state(nnx.state(model, LoraParam))):
        leaf.set_value(leaf[...] + 0.1 * jax.random.normal(jax.random.key(seed + place), leaf.shape))
    return model


def by_formula(kind: str, o: Objective, start: Glm, now: Glm, pairs) -> dict[str, float]:
    """The papers' losses, written again."""
    terms, gaps, nll, d = [], [], [], []
    for pair in pairs:
        sides = [(token_log_p(now, pair.prompt_ids, ids), token_log_p(start, pair.prompt_ids, ids))
                 for ids in (pair.chosen_ids, pair.rejected_ids)]  # fmt: skip
        (c, c0), (r, r0) = sides
        nll += list(-c)
        d += [*(c - c0), *(r - r0)]
        if kind == "dpo":
            gap = o.beta * ((c - c0).sum() - (r - r0).sum())
            loss = (1 - o.label_smoothing) * np.log1p(np.exp(-gap)) + o.label_smoothing * np.log1p(np.exp(gap))
        elif kind == "ipo":
            gap = (c - c0).mean() - (r - r0).mean()
            loss = (gap - 1 / (2 * o.beta)) ** 2
        else:
            odds = [p / (1 - p) for p in (np.exp(c.mean()), np.exp(r.mean()))]
            gap = np.log(odds[0] / odds[1])
            loss = o.beta * np.log1p(np.exp(-gap))
        terms.append(loss)
        gaps.append(gap)
    weight = {"dpo": 0.2, "ipo": 0.2, "orpo": 1.0}[kind]
    d = np.array(d)
    return {"loss": np.mean(terms) + weight * np.mean(nll), "margin": np.mean(gaps), "chosen_loss": np.mean(nll),
            "accuracy": np.mean(np.array(gaps) > 0), "kl": np.mean(np.exp(d) - 1 - d)}  # fmt: skip


def batch_of(start: Glm, examples, tmp_path: Path, rows: int, length: int = LENGTH, name: str = "reference"):
    """One batch of all examples, with what ``start`` says of them."""
    config = settings(rows=rows, accumulate=1, sequence_length=length)
    found = reference.with_reference(start, examples, config, tmp_path / name, start="a", seed=0, mesh=None,
                                     progress=None)  # fmt: skip
    batches = PackedBatches(found, rows=rows, sequence_length=length, targets_per_row=None, seed=0)
    assert batches.steps_per_epoch() == 1
    return next(iter(batches))


def value_and_gradient(model: Glm, batch, o: Objective, chunk: int = 5):
    graph, adapter, rest = nnx.split(model, LoraParam, ...)

    @jax.jit
    def run(adapter, batch):
        def loss(adapter):
            share = pairs_per_token({name: jax.numpy.asarray(x) for name, x in batch.items()})
            out = preference_loss(nnx.merge(graph, adapter, rest), batch, o, share, chunk=chunk)
            return out.total / out.weight, out.means()

        return jax.value_and_grad(loss, has_aux=True)(adapter)

    (value, means), gradient = run(adapter, batch)
    flat = {".".join(map(str, path)): np.array(leaf[...]) for path, leaf in nnx.to_flat_state(gradient)}
    return float(value), {name: float(x) for name, x in means.items()}, flat


def means_of(model: Glm, batch, o: Objective) -> dict[str, float]:
    graph, state = nnx.split(model)
    share = pairs_per_token({name: jax.numpy.asarray(x) for name, x in batch.items()})
    out = jax.jit(lambda state, batch: preference_loss(nnx.merge(graph, state), batch, o, share, chunk=5))(state, batch)
    return {name: float(x) for name, x in out.means().items()}


@pytest.mark.parametrize(("kind", "more"), KINDS)
def test_packed_rows_give_the_papers_losses(tmp_path, kind, more):
    start, now, o, pairs = tiny_model(), moved(), objective(kind, **more), tiny_pairs()
    batch = batch_of(start, tiny_pair_examples(), tmp_path, rows=8)
    assert batch["pair_weights"].sum() == len(pairs) and batch["pair_weights"].sum(1).max() >= 2
    assert batch["segment_ids"].max() == 2 * batch["pair_weights"].shape[1]
    means = means_of(now, batch, o)
    value, wanted = means["loss"], by_formula(kind, o, start, now, pairs)
    for name, number in wanted.items():
        assert means[name] == pytest.approx(number, rel=1e-5), name
    assert value == pytest.approx(wanted["loss"], rel=1e-5) and 0 < wanted["accuracy"] < 1
    assert means["chosen_length"] == pytest.approx(np.mean([len(pair.chosen_ids) for pair in pairs]))
    assert means["rejected_length"] == pytest.approx(np.mean([len(pair.rejected_ids) for pair in pairs]))


def test_packed_equals_one_pair_a_row(tmp_path):
    start, now, o = tiny_model(), moved(), objective(sft_weight=0.2)
    batch = batch_of(start, tiny_pair_examples(), tmp_path, rows=8)
    alone = batch_of(start, tiny_pair_examples(), tmp_path, rows=12, length=30, name="alone")
    assert alone["pair_weights"].shape == (12, 1) and batch["pair_weights"].shape[1] > 1
    value, _, packed = value_and_gradient(now, batch, o)
    other, _, unpacked = value_and_gradient(now, alone, o)
    assert other == pytest.approx(value, rel=1e-6)
    for name, gradient in unpacked.items():
        np.testing.assert_allclose(packed[name], gradient, rtol=0, atol=2e-6 * np.abs(gradient).max(), err_msg=name)


def test_every_loss_names_its_paper():
    assert set(LOSSES) == {"dpo", "ipo", "orpo"} and all("arXiv" in loss.paper for loss in LOSSES.values())


@pytest.mark.slow
def test_micro_batches_add_up(tmp_path):
    """Two pairs in one, one in the other: a mean of means would be another loss."""
    start, now, o = tiny_model(), moved(), objective("dpo", sft_weight=0.7)
    batch = batch_of(start, tiny_pair_examples(7), tmp_path, rows=6)
    found = []
    for accumulate in (1, 2):
        step, state, frozen = make_step(moved(), make_optimizer(settings(), 6), settings(), "lora", None, o)
        micro = {name: x.reshape(accumulate, 6 // accumulate, *x.shape[1:]) for name, x in batch.items()}
        new, _, out = step(state.trainable, state.optimizer, frozen, micro, jax.random.key(0))
        found.append(({name: float(x) for name, x in out.items()}, new))
    assert len(set(batch["pair_weights"].reshape(2, -1).sum(1).tolist())) == 2  # not even
    for name, value in found[0][0].items():
        assert found[1][0][name] == pytest.approx(value, rel=1e-5), name
    wanted = by_formula("dpo", o, start, now, tiny_pairs(7)) | {"weight": 0.7}
    plain = wanted["loss"] + 0.5 * wanted["chosen_loss"]  # by_formula adds 0.2 of it
    assert found[0][0]["loss"] == pytest.approx(plain, rel=1e-5)


# ---- a run ----------------------------------------------------------------------------------------------------------


def go(directory: Path, at: int = 0, act=None, model: Glm | None = None, o: Objective | None = None, mesh=None, **more):
    model = model or tiny_model(dropout=0.3)

    def progress(done: int, total: int, text: str) -> None:
        if act is not None and done == at and "start" not in text:
            act()

    around = Surroundings(progress=progress, mesh=mesh)
    result = train(model, tiny_pair_examples(), settings(**more), directory, trainable="lora", seed=3,
                   objective=o or objective(sft_weight=0.2), around=around)  # fmt: skip
    return result, parameters(model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    result, values = go(directory)
    return result, values, rows(directory), directory


def test_a_run_prefers_what_is_chosen(whole, tmp_path):
    result, _, lines, directory = whole
    assert (result.steps, result.accuracy, result.loss) == (6, lines[-1]["accuracy"], lines[-1]["loss"])
    assert all(set(MEASURES) <= set(line) for line in lines)
    assert lines[0]["margin"] == lines[0]["kl"] == 0  # dropout is off, and the packing that of the reference
    go(tmp_path, steps=40, learning_rate=3e-2, save_every=100)
    last = rows(tmp_path)[-1]
    assert last["accuracy"] == 1 and last["margin"] > 0.5 and last["kl"] > 0.01 and last["loss"] < lines[0]["loss"]
    board = list((directory / "tensorboard").iterdir())
    assert b"margin" in board[0].read_bytes()


def no_reference(*arguments: object) -> None:
    raise AssertionError("computed again")


def test_an_interrupted_stage_goes_on_bit_for_bit_from_its_reference(whole, tmp_path, monkeypatch):
    with pytest.raises(Preempted):
        go(tmp_path, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(reference, "_computed", no_reference)
    _, values = go(tmp_path)
    assert rows(tmp_path) == whole[2] and same(values, whole[1])


@pytest.mark.slow
def test_a_killed_stage_goes_on_bit_for_bit(whole, tmp_path):
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, __file__, str(tmp_path), "kill"], cwd=root, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(root)}, timeout=600)  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    _, values = go(tmp_path)
    assert rows(tmp_path) == whole[2] and same(values, whole[1])


@pytest.mark.parametrize("damage", ["cut", "flipped", "another start", "another file"])
def test_a_reference_that_is_not_the_stage_s_own_is_computed_again(tmp_path, caplog, damage):
    examples, path = tiny_pair_examples(), tmp_path / "reference"

    def kept(model: Glm, start: str = "a"):
        return reference.with_reference(model, examples, settings(), path, start=start, seed=0, mesh=None,
                                        progress=None)  # fmt: skip

    model = tiny_model()
    wanted = [item["reference"] for item in kept(model)]
    assert path.stat().st_mode & 0o77 == 0
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-8])
    elif damage == "flipped":
        data[-3] ^= 1
        path.write_bytes(data)
    elif damage == "another file":
        path.write_bytes(b"\x80\x04pickle")
    with caplog.at_level(logging.WARNING):
        if damage == "another start":
            found = kept(moved(), "b")
            assert not np.array_equal(np.concatenate([x["reference"] for x in found]), np.concatenate(wanted))
        else:
            found = kept(model)
            np.testing.assert_array_equal([x for item in found for x in item["reference"]], np.concatenate(wanted))
    assert "computed again" in caplog.text
    caplog.clear()
    kept(moved() if damage == "another start" else model, "b" if damage == "another start" else "a")
    assert not caplog.text


def test_a_stage_of_another_start_or_objective_is_another_run(whole, tmp_path):
    directory = whole[3]
    with pytest.raises(Exception, match=r"another recipe: .*start: "):
        go(directory, model=moved())
    with pytest.raises(Exception, match=r"another recipe: objective\.beta: 0\.3 -> 0\.4"):
        go(directory, o=objective(sft_weight=0.2, beta=0.4))
    go(directory)  # and what the first refusal computed again was put right


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path):
    found = on_eight_devices(__file__, str(tmp_path / "many"), "mesh")
    _, wanted = go(tmp_path / "one", rows=8, accumulate=1)
    lines = rows(tmp_path / "one")
    for name in ("loss", "margin", "kl", "accuracy", "grad_norm"):
        np.testing.assert_allclose([row[name] for row in found["rows"]], [row[name] for row in lines], atol=1e-5)
    for name, value in wanted.items():
        np.testing.assert_allclose(np.array(found["values"][name]), value, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kind": "simpo"}, "'dpo', 'ipo' or 'orpo'"),
        ({"beta": 0}, "greater than 0"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing is for kind: dpo; ipo has none"),
        ({"sft_weight": -1}, "greater than or equal to 0"),
        ({"bta": 1}, "bta"),
    ],
)
def test_an_objective_that_is_none_is_refused(given, says):
    with pytest.raises(ValidationError, match=says):
        objective(**given)


if __name__ == "__main__":
    directory, what = Path(sys.argv[1]), sys.argv[2]
    if what == "kill":
        go(directory, 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    _, values = go(directory, mesh=make_mesh(data=2, fsdp=4, tensor=1), rows=8, accumulate=1)
    sys.stdout.write(json.dumps({"rows": rows(directory), "values": {name: x.tolist() for name, x in values.items()}}))
