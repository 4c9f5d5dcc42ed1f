"""The optimiser and one optimisation step, as plain JAX over ``nnx.split`` trees."""

import dataclasses
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from mentalglm_jax.errors import InputError
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.model.layout import gather_projection, on_mesh
from mentalglm_jax.model.lora import LoraParam
from mentalglm_jax.model.quantize import quantization
from mentalglm_jax.train.loss import LossSums, answer_loss
from mentalglm_jax.train.preference import Objective, PreferenceSums, pairs_per_token, preference_loss
from mentalglm_jax.train.recipe import WSD_DECAY, TrainConfig

TRAINABLE: dict[str, Any] = {"lora": LoraParam, "all": nnx.Param}


@lru_cache(maxsize=4)  # the same functions for the same run, by which `_compiled` knows it again
def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) after clipping by the global norm, as optax composes them;
    then LoRA+ and the average of the parameters where the run asks for them.

    Args:
        config: the run.
        steps: length of the learning rate schedule.
    """
    parts = [
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate_schedule(config, steps), b1=config.beta1, b2=config.beta2, eps=config.eps,
                    weight_decay=config.weight_decay),
    ]  # fmt: skip
    if config.lora_plus_ratio != 1:  # AdamW's update is the learning rate times something: scaling one scales the other
        parts.append(optax.masked(optax.scale(config.lora_plus_ratio), _is_b))
    if config.ema_decay is not None:
        parts.append(_average(config.ema_decay))
    return optax.chain(*parts)


def _is_b(train: nnx.State) -> Any:
    return jax.tree.map_with_path(lambda path, _: any(getattr(part, "key", None) == "b" for part in path), train)


class AverageState(NamedTuple):
    """The exponential moving average of the parameters; it starts at their first values."""

    average: Any


def _average(decay: float) -> optax.GradientTransformation:
    """Averages the parameters as they will be after this update, which it leaves as it is; the last link of a chain."""

    def init(params: Any) -> AverageState:
        return AverageState(jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AverageState]:
        new = optax.apply_updates(params, updates)
        return updates, AverageState(jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, new))

    return optax.GradientTransformation(init, update)


def averaged(trainable: nnx.State, optimizer_state: optax.OptState) -> nnx.State:
    """What a run evaluates and ends with: the average of the parameters if it keeps one, else the parameters."""
    average = optax.tree.get(optimizer_state, "average")
    return trainable if average is None else average


def learning_rate_schedule(config: TrainConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates done before: linear from 0 over the first
    ``warmup_ratio`` of ``steps`` (none of them when that rounds to 0), then constant, or a cosine or a straight line
    that would reach 0 at ``steps``; that of "wsd" begins the last ``decay_ratio`` of ``steps`` before it."""
    peak, warmup = config.learning_rate, round(config.warmup_ratio * steps)
    left = max(1, steps - warmup)
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, left)
    elif config.schedule == "linear":
        rest = optax.linear_schedule(peak, 0.0, left)
    else:
        rest = optax.constant_schedule(peak)
    if config.schedule == "wsd":
        decay = min(left, max(1, round((config.decay_ratio or WSD_DECAY) * steps)))
        rest = optax.join_schedules([rest, optax.linear_schedule(peak, 0.0, decay)], [left - decay])
    if warmup == 0:
        return rest
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), rest], [warmup])


@dataclasses.dataclass
class TrainState:
    """What training changes: the trainable parameters and the optimiser's state, placed like the parameters."""

    trainable: nnx.State
    optimizer: optax.OptState


def make_step(
    model: Glm, optimizer: optax.GradientTransformation, config: TrainConfig, trainable: str, mesh: Mesh | None = None,
    objective: Objective | None = None
) -> tuple[jax.stages.Wrapped, TrainState, nnx.State]:  # fmt: skip
    """The compiled step with its first state and the frozen parameters.

    ``step(trainable, optimizer_state, frozen, batches, key)`` takes ``batches`` with a leading micro-batch axis
    ``[A, B, ...]``, donates the first two arguments and returns them updated, with scalar metrics: those of
    ``LossSums.means`` or ``PreferenceSums.means``, ``tokens`` (real ones), ``pairs`` (query-key pairs that see each
    other), ``grad_norm`` (before clipping), ``finite``. A step whose gradient is not finite changes nothing, the
    optimiser's step count included.

    The loss is the mean over all targets, or pairs, of all micro-batches: sums are accumulated and divided once at the
    end.

    Args:
        model: shares its arrays with the returned state, so the first step takes (donates) its trainable ones. One of
            shapes only (with shardings, see ``plan.py``) gives a state of shapes, to lower the step for.
        optimizer: see ``make_optimizer``.
        config: the run.
        trainable: "lora" trains the adapter, with its dropout; "all" every parameter, without dropout.
        mesh: the one the model's parameters are on (see ``sharding.shard_model``); None is one device.
        objective: of a stage on pairs of answers; None is next-token loss.

    Raises:
        InputError: nothing to train: another name than these, or "lora" for a model without adapter; or "all" on a
            quantised base, whose kernels are frozen.
    """
    if trainable not in TRAINABLE:
        raise InputError(f"trainable {trainable!r} is not one of {', '.join(TRAINABLE)}")
    if trainable == "all" and (method := quantization(model)) is not None:
        raise InputError(f"trainable 'all', but the base is quantised ({method}) and frozen; train 'lora' on it")
    graph, train, frozen = nnx.split(model, TRAINABLE[trainable], ...)
    if not jax.tree.leaves(train):
        raise InputError("trainable 'lora', but the model has no adapter; call lora.add_lora first")

    state = TrainState(train, _first_state(optimizer, train))
    layout: Any = None
    if mesh is not None:  # scalars go everywhere; what comes out of a step lies as it went in, so that donation works
        everywhere = NamedSharding(mesh, PartitionSpec())
        state.optimizer = jax.tree.map(lambda x: x if x.ndim else _put(x, everywhere), state.optimizer)
        layout = (*jax.tree.map(lambda x: x.sharding, (state.trainable, state.optimizer)), everywhere)
    leaves, tree = jax.tree.flatten(layout)
    step = _compiled(graph, optimizer, config.loss_chunk, trainable, mesh, objective, tuple(leaves), tree)
    return step, state, frozen


@lru_cache(
    maxsize=1
)  # a stage of the same settings, or a resumed run, is not traced anew; one: it lies in the device's memory
def _compiled(
    graph: nnx.GraphDef[Glm], optimizer: optax.GradientTransformation, chunk: int, trainable: str, mesh: Mesh | None,
    objective: Objective | None, leaves: tuple[NamedSharding, ...], tree: jax.tree_util.PyTreeDef
) -> jax.stages.Wrapped:  # fmt: skip
    """The step of ``make_step``; ``leaves`` and ``tree`` say where what it returns lies."""
    kind = LossSums if objective is None else PreferenceSums

    def sums(
        train: nnx.State, frozen: nnx.State, batch: Any, key: Array, share: Array | None
    ) -> tuple[Array, LossSums | PreferenceSums]:
        dropout = key if trainable == "lora" else None
        with on_mesh(mesh):
            whole = nnx.merge(graph, train, gather_projection(frozen))
            if objective is None or share is None:
                out = answer_loss(whole, batch, chunk=chunk, key=dropout)
            else:
                out = preference_loss(whole, batch, objective, share, chunk=chunk)
        return out.total, out

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=jax.tree.unflatten(tree, leaves))
    def step(
        train: nnx.State, optimizer_state: optax.OptState, frozen: nnx.State, batches: Any, key: Array
    ) -> tuple[nnx.State, optax.OptState, dict[str, Array]]:
        micro = batches["tokens"].shape[0]
        share = None if objective is None else pairs_per_token(batches)

        def accumulate(carry: Any, inputs: Any) -> tuple[Any, None]:
            index, batch = inputs
            gradients, out = jax.grad(sums, has_aux=True)(train, frozen, batch, jax.random.fold_in(key, index), share)
            return jax.tree.map(jnp.add, carry, (gradients, out)), None

        zero = (jax.tree.map(jnp.zeros_like, train), kind(*(jnp.float32(0) for _ in kind._fields)))
        if micro == 1:  # no second gradient buffer when there is nothing to accumulate
            gradients, out = accumulate(zero, (0, jax.tree.map(lambda x: x[0], batches)))[0]
        else:
            (gradients, out), _ = jax.lax.scan(accumulate, zero, (jnp.arange(micro), batches))
        weight = jnp.maximum(out.weight, 1)
        gradients = jax.tree.map(lambda g: g / weight.astype(g.dtype), gradients)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(out.total)
        updates, updated = optimizer.update(gradients, optimizer_state, train)
        new = optax.apply_updates(train, updates)
        new, updated = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (new, updated), (train, optimizer_state)
        )
        real = batches["segment_ids"] > 0
        metrics = {
            **out.means(),
            "tokens": real.sum(dtype=jnp.float32),
            "pairs": jnp.where(real, batches["positions"] + 1, 0).sum(dtype=jnp.float32),
            "grad_norm": norm,
            "finite": finite,
        }
        return new, updated, metrics

    return step


def _first_state(optimizer: optax.GradientTransformation, train: nnx.State) -> optax.OptState:
    if not isinstance(jax.tree.leaves(train)[0], jax.ShapeDtypeStruct):
        return optimizer.init(train)  # moments lie like their parameters, being made from them
    shapes = jax.eval_shape(optimizer.init, train)

    def placed(moment: jax.ShapeDtypeStruct, parameter: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=parameter.sharding)

    return optax.tree.map_params(optimizer.init, placed, shapes, train)


def _put(x: Any, sharding: NamedSharding) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.device_put(x, sharding)
