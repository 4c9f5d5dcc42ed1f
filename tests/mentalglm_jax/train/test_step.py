"""One optimisation step against NumPy: schedule, clipping, AdamW, accumulation; and what a step must leave alone."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mentalglm_jax.errors import InputError
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.model.lora import LoraParam
from mentalglm_jax.train.loss import answer_loss
from mentalglm_jax.train.step import averaged, learning_rate_schedule, make_optimizer, make_step
from tests.mentalglm_jax.tiny import parameters, same, tiny_batch, tiny_config, tiny_model

KEY = jax.random.key(0)


def micro(batch, count: int):
    return {name: x.reshape(count, x.shape[0] // count, *x.shape[1:]) for name, x in batch.items()}


COMPILED: dict[Any, Any] = {}


class Stepper:
    """A step function and its state; ``stepper(batch)`` takes one. Equal settings share the compiled function."""

    def __init__(self, model: Glm, trainable: str = "lora", accumulate: int = 1, **changes):
        self.accumulate = accumulate
        config = tiny_config(accumulate=1, **changes)
        function, self.state, self.frozen = make_step(model, make_optimizer(config, 12), config, trainable)
        key = model.lora_config, trainable, tuple(sorted(changes.items()))
        self.function = COMPILED.setdefault(key, function)

    def __call__(self, batch, key=KEY) -> dict[str, float]:
        state = self.state
        state.trainable, state.optimizer, out = self.function(
            state.trainable, state.optimizer, self.frozen, micro(batch, self.accumulate), key
        )
        return {name: float(value) for name, value in out.items()}

    @property
    def values(self) -> dict[str, np.ndarray]:
        flat = nnx.to_flat_state(self.state.trainable)
        return {".".join(map(str, path)): np.array(leaf[...]) for path, leaf in flat}

    @property
    def optimizer_values(self) -> dict[str, np.ndarray]:
        return {str(i): np.array(leaf) for i, leaf in enumerate(jax.tree.leaves(self.state.optimizer))}


@partial(jax.jit, static_argnums=0)
def mean_loss_gradient(graph, train, frozen, batch):
    def loss(train):
        sums = answer_loss(nnx.merge(graph, train, frozen), batch, chunk=1000)
        return sums.nll / sums.weight

    return jax.value_and_grad(loss)(train)


def gradient(model: Glm, batch) -> tuple[float, dict[str, np.ndarray]]:
    """Mean loss per target and its gradient, by plain differentiation of the whole batch at once."""
    value, gradients = mean_loss_gradient(*nnx.split(model, LoraParam, ...), batch)
    return float(value), {".".join(map(str, path)): np.array(g[...]) for path, g in nnx.to_flat_state(gradients)}


@pytest.fixture(scope="module")
def batch():
    found = tiny_batch(rows=4)
    # Very different numbers of targets per row: a mean of means would be visibly wrong.
    weights = found["target_weights"].copy()
    weights[0, 2:], weights[1, 4:] = 0, 0
    return found | {"target_weights": weights}


def test_the_schedules_that_end_in_a_straight_line():
    """By the numbers: 4 steps of warm-up, then 16 down to 0; or 10 that stay and 6 (0.3 of 20) down to 0."""
    linear = learning_rate_schedule(tiny_config(learning_rate=2.0, warmup_ratio=0.2, schedule="linear"), 20)
    warm = [0.0, 0.5, 1.0, 1.5]
    wanted = [*warm, *(2 - i / 8 for i in range(17))]
    np.testing.assert_allclose([float(linear(i)) for i in range(21)], wanted, atol=1e-6)
    wsd = tiny_config(learning_rate=2.0, warmup_ratio=0.2, schedule="wsd", decay_ratio=0.3)
    stable = learning_rate_schedule(wsd, 20)
    wanted = [*warm, *[2.0] * 10, *(2 - i / 3 for i in range(7))]
    np.testing.assert_allclose([float(stable(i)) for i in range(21)], wanted, atol=1e-6)
    default = learning_rate_schedule(tiny_config(learning_rate=2.0, warmup_ratio=0.0, schedule="wsd"), 20)
    np.testing.assert_allclose([float(default(i)) for i in (0, 18, 19, 20)], [2, 2, 1, 0], atol=1e-6)
    whole = tiny_config(learning_rate=2.0, warmup_ratio=0.0, schedule="wsd", decay_ratio=1.0)
    np.testing.assert_allclose([float(learning_rate_schedule(whole, 4)(i)) for i in range(5)], [2, 1.5, 1, 0.5, 0])


def test_schedule():
    cosine = learning_rate_schedule(tiny_config(learning_rate=2.0, warmup_ratio=0.2, schedule="cosine"), 20)
    wanted = [2 * n / 4 for n in range(4)] + [1 + np.cos(np.pi * n / 16) for n in range(17)]
    np.testing.assert_allclose([cosine(n) for n in range(21)], wanted, rtol=1e-6, atol=1e-6)
    constant = learning_rate_schedule(tiny_config(learning_rate=2.0, warmup_ratio=0.2, schedule="constant"), 20)
    np.testing.assert_allclose([constant(n) for n in (0, 1, 4, 19)], [0, 0.5, 2, 2])
    # No step is lost to a warm-up that was not asked for, or that is shorter than a step.
    for ratio, steps in ((0.0, 20), (0.03, 1), (0.03, 10)):
        assert float(learning_rate_schedule(tiny_config(learning_rate=2.0, warmup_ratio=ratio), steps)(0)) == 2.0


def test_adamw_and_clipping_equal_the_formula(batch):
    """Three steps by the formulas of Loshchilov & Hutter, in float64, with plain gradients.

    With an eps that counts: a small one divides gradients near 0 by themselves, and shows their rounding errors alone.
    """
    settings = {"learning_rate": 3e-2, "warmup_ratio": 0.0, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95,
                "eps": 1e-3, "clip_norm": 0.5}  # fmt: skip
    stepper = Stepper(tiny_model(), **settings)
    model = tiny_model()
    values = {name: value.astype(np.float64) for name, value in parameters(model, LoraParam).items()}
    first, second = ({name: np.zeros_like(value) for name, value in values.items()} for _ in range(2))
    for t in range(1, 4):
        loss, gradients = gradient(model, batch)
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
        out = stepper(batch)
        assert out["loss"] == pytest.approx(loss, rel=1e-5)
        assert out["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.5  # before clipping
        assert out["targets"] == batch["target_weights"].sum() and out["finite"]
        rate = settings["learning_rate"] * (1 + np.cos(np.pi * (t - 1) / 12)) / 2
        for name, g in gradients.items():
            g = g * (0.5 / norm)
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            step = (first[name] / (1 - 0.8**t)) / (np.sqrt(second[name] / (1 - 0.95**t)) + 1e-3)
            values[name] = values[name] - rate * (step + 0.1 * values[name])
            np.testing.assert_allclose(stepper.values[name], values[name], rtol=1e-3, atol=2e-6)
        for name, leaf in nnx.to_flat_state(nnx.state(model, LoraParam)):
            path = ".".join(map(str, name))
            leaf.set_value(jnp.asarray(stepper.values[path]))
            values[path] = stepper.values[path].astype(np.float64)


def test_the_optimizer_is_optax_adamw():
    config = tiny_config(weight_decay=0.1, clip_norm=0.5)
    parts = (
        optax.clip_by_global_norm(0.5),
        optax.adamw(learning_rate_schedule(config, 12), 0.9, 0.999, weight_decay=0.1),
    )
    ours, reference = make_optimizer(config, 12), optax.chain(*parts)
    tree = {"w": jnp.asarray([1.0, -2.0, 3.0])}
    one, other = ours.init(tree), reference.init(tree)
    for scale in (1.0, 0.1, 10.0):
        grads = jax.tree.map(lambda x, scale=scale: scale * x, tree)
        found, one = ours.update(grads, one, tree)
        wanted, other = reference.update(grads, other, tree)
        np.testing.assert_array_equal(found["w"], wanted["w"])


def test_lora_plus_scales_the_step_of_b_only(batch):
    plain, plus = Stepper(tiny_model()), Stepper(tiny_model(), lora_plus_ratio=16.0)
    start = plain.values
    for stepper in (plain, plus):
        stepper(batch)  # warm-up: a learning rate of 0
        stepper(batch)
    for name, value in start.items():
        ratio = 16.0 if name.endswith(".b") else 1.0
        moved = plain.values[name] - value
        # Where B starts at zero, A has no gradient yet; the adapter of down_proj starts elsewhere.
        assert (np.abs(moved).max() > 1e-4) == (name.endswith(".b") or "down_proj" in name)
        np.testing.assert_allclose(plus.values[name] - value, ratio * moved, rtol=1e-3, atol=2e-6)


def test_the_average_of_the_parameters(batch):
    plain, kept = Stepper(tiny_model()), Stepper(tiny_model(), ema_decay=0.75)
    average = plain.values
    for _ in range(4):
        plain(batch)
        kept(batch)
        for name, value in plain.values.items():  # training itself does not notice; two programs may round in two ways
            np.testing.assert_allclose(kept.values[name], value, rtol=0, atol=1e-6)
        average = {name: 0.75 * value + 0.25 * plain.values[name] for name, value in average.items()}
    found = averaged(kept.state.trainable, kept.state.optimizer)
    flat = {".".join(map(str, path)): np.array(leaf[...]) for path, leaf in nnx.to_flat_state(found)}
    assert flat.keys() == average.keys()
    for name, value in average.items():
        np.testing.assert_allclose(flat[name], value, rtol=0, atol=1e-6)
    assert averaged(plain.state.trainable, plain.state.optimizer) is plain.state.trainable
    # A bad step leaves the average alone too.
    kept(batch | {"target_weights": np.full_like(batch["target_weights"], np.nan)})
    again = averaged(kept.state.trainable, kept.state.optimizer)
    for path, leaf in nnx.to_flat_state(again):
        assert flat[".".join(map(str, path))].tobytes() == np.array(leaf[...]).tobytes()


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_one_big_batch(batch, accumulate):
    whole, parts = Stepper(tiny_model()), Stepper(tiny_model(), accumulate=accumulate)
    for _ in range(3):
        wanted, found = whole(batch), parts(batch)
        assert found == pytest.approx(wanted, rel=1e-5)
    for name, value in whole.values.items():
        np.testing.assert_allclose(parts.values[name], value, rtol=0, atol=2e-6)
    # A mean of the micro-batches' means is something else here.
    parts = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(4)]
    means = [gradient(tiny_model(), part)[0] for part in parts]
    assert abs(np.mean(means) / gradient(tiny_model(), batch)[0] - 1) > 1e-2


def test_lora_steps_leave_the_base_and_the_scale_bit_identical(batch):
    model = tiny_model(dropout=0.3)
    before = parameters(model)
    stepper = Stepper(model)
    for seed in range(3):
        stepper(batch, jax.random.key(seed))
    nnx.update(model, stepper.state.trainable)
    after = parameters(model)
    trained = set(parameters(model, LoraParam))
    assert trained == {name for name in before if name.endswith((".a", ".b"))} and len(trained) == 12
    for name, value in before.items():
        assert (after[name].tobytes() == value.tobytes()) == (name not in trained), name


def test_all_trains_every_parameter(batch):
    model = tiny_model(lora=False)
    before = parameters(model)
    stepper = Stepper(model, "all")
    losses = [stepper(batch)["loss"] for _ in range(8)]
    assert stepper.values.keys() == before.keys()
    assert all((stepper.values[name] != value).any() for name, value in before.items())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_bad_step_changes_nothing(batch, poison):
    bad = batch | {"target_weights": np.where(batch["target_weights"] > 0, np.float32(poison), 0)}
    clean, hit = Stepper(tiny_model()), Stepper(tiny_model())
    assert clean(batch)["finite"] and hit(batch)["finite"]
    before = hit.values | hit.optimizer_values
    out = hit(bad)
    assert not out["finite"]
    assert same(hit.values | hit.optimizer_values, before)  # moments and the count behind the schedule too
    assert clean(batch) == hit(batch)
    assert same(clean.values, hit.values)


def test_dropout_is_the_keys_and_only_loras(batch):
    def after(seed: int, trainable: str) -> dict[str, np.ndarray]:
        stepper = Stepper(tiny_model(dropout=0.5), trainable)
        stepper(batch, jax.random.key(seed))
        stepper(batch, jax.random.key(seed))
        return stepper.values

    assert same(after(0, "lora"), after(0, "lora")) and not same(after(0, "lora"), after(1, "lora"))
    assert same(after(0, "all"), after(1, "all"))


def test_micro_batches_draw_their_own_dropout(batch):
    """The same rows twice as two micro-batches: with one mask for both the gradient would be that of one of them."""
    row = {name: x[2:3] for name, x in batch.items()}
    twice = {name: np.concatenate([x, x]) for name, x in row.items()}
    one, two = Stepper(tiny_model(dropout=0.5)), Stepper(tiny_model(dropout=0.5), accumulate=2)
    assert one(row)["loss"] != two(twice)["loss"]
    assert Stepper(tiny_model())(row)["loss"] == pytest.approx(
        Stepper(tiny_model(), accumulate=2)(twice)["loss"], rel=1e-6
    )


def test_a_batch_without_targets_is_no_accident(batch):
    stepper = Stepper(tiny_model())
    out = stepper(batch | {"target_weights": np.zeros_like(batch["target_weights"])})
    assert out["finite"] and out["loss"] == 0 and out["targets"] == 0 and out["grad_norm"] == 0


def test_the_step_takes_its_state(batch):
    """Donated: no second copy of parameters and moments while a step runs."""
    stepper = Stepper(tiny_model())
    leaves = jax.tree.leaves((stepper.state.trainable, stepper.state.optimizer))
    frozen = jax.tree.leaves(stepper.frozen)
    stepper(batch)
    assert all(leaf.is_deleted() for leaf in leaves)
    assert not any(leaf.is_deleted() for leaf in frozen)


def test_nothing_to_train_is_said():
    config = tiny_config()
    optimizer = make_optimizer(config, 1)
    with pytest.raises(InputError, match="'lora', but the model has no adapter"):
        make_step(tiny_model(lora=False), optimizer, config, "lora")
    with pytest.raises(InputError, match="trainable 'base' is not one of lora, all"):
        make_step(tiny_model(), optimizer, config, "base")


def test_a_step_is_made_anew_only_for_what_changes_it():
    """A later stage, or a run taken up in the same process, does not trace the model again."""

    def made(steps: int = 12, trainable: str = "lora", dropout: float = 0.0, **changes):
        config = tiny_config(**changes)
        return make_step(tiny_model(dropout=dropout), make_optimizer(config, steps), config, trainable)[0]

    others = [{"steps": 13}, {"trainable": "all"}, {"dropout": 0.1}, {"loss_chunk": 7}, {"clip_norm": 0.5}]
    for other in others:
        assert made() is made() is not made(**other) is made(**other), other
