"""Does answering fit a TPU slice, and how fast can it be: the programs of ``inference``, compiled with no TPU at hand.

What is compiled is what ``mentalglm generate`` and label scoring run: a prompt's pass, the first token, the loop over
tokens, the scores of label sentences. Nothing is run and no weights are read.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mentalglm_jax.devices.hardware import Chip, parse_topology
from mentalglm_jax.errors import InputError
from mentalglm_jax.inference.decode import Rules, Sampling, advance, bucket, copies, first_token, prefill
from mentalglm_jax.inference.decode import plan as plan_batches
from mentalglm_jax.inference.scoring import score_batch
from mentalglm_jax.model.glm import Glm, KVCache
from mentalglm_jax.model.sharding import make_mesh
from mentalglm_jax.planning.cost import bytes_per_device, weight_bytes
from mentalglm_jax.planning.plan import (
    abstract_model_on,
    allocated,
    geometry,
    mesh_sizes,
    refusal,
    tpu_devices,
    versions,
)
from mentalglm_jax.train.recipe import Recipe

LABELS, SENTENCE = 10, 16  # label sentences that are scored, and tokens of the longest
STOPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerPlan:
    """What was found out; bytes are per device, the cache's for ``slots`` tokens of every row.

    ``programs`` holds what each of them needs in all, weights and cache included; None where the compiler refused,
    ``needed`` then being what it said it would need, if it did. ``step_seconds`` is the least that one token of every
    row takes by memory bandwidth: every kernel and the cache are read once.
    """

    model: str
    topology: str
    device_memory: float
    mesh: dict[str, int]
    batch: int
    prompt_tokens: int
    new_tokens: int
    slots: int
    weights: float
    cache: float
    programs: dict[str, float | None]
    needed: float | None
    fits: bool
    step_seconds: float
    tokens_per_second: float
    compile_seconds: float
    versions: dict[str, str]

    @property
    def total(self) -> float:
        """Bytes of the program that needs most."""
        return max((size for size in self.programs.values() if size is not None), default=self.weights + self.cache)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "total": self.needed or self.total}


def plan_answers(
    recipe: Recipe, topology: str, *, batch: int = 16, prompt_tokens: int = 1024, new_tokens: int = 512
) -> AnswerPlan:
    """Compiles what answers a batch of posts on a TPU slice.

    Args:
        recipe: its model and mesh are used; a quantised base keeps its adapter beside it, another has it merged.
        topology: see ``hardware.parse_topology``.
        batch: posts answered at a time, of all copies of the model together.
        prompt_tokens: of the longest prompt.
        new_tokens: of an answer at most.

    Raises:
        InputError: as ``plan.plan``; or the batch does not go through one program, or not into the model's context.
        RunError: the TPU compiler is not installed.
    """
    target, config = parse_topology(topology), geometry(recipe)
    if prompt_tokens + new_tokens > config.max_position_embeddings:
        raise InputError(f"prompt_tokens {prompt_tokens} and new_tokens {new_tokens} exceed the model's context of "
                         f"{config.max_position_embeddings} tokens")  # fmt: skip
    mesh = make_mesh(*mesh_sizes(recipe), devices=tpu_devices(target))
    _, rows, length = next(plan_batches([prompt_tokens] * batch, batch, copies(mesh)))
    model = abstract_model_on(recipe, mesh, backend="xla", adapter=recipe.model.quantize is not None)
    slots, started, needed = bucket(length + new_tokens), time.perf_counter(), None
    programs: dict[str, float | None] = {}
    for name, lowered in _programs(model, mesh, rows, length, slots):
        try:
            programs[name] = allocated(lowered.compile())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            programs[name] = None
            needed = max(filter(None, (needed, refusal(error))), default=None)
    weights, cache = sum(bytes_per_device(model, mesh)), _cache_bytes(model, mesh, rows, slots)
    step = step_seconds(model, mesh, cache, target.chip)
    return AnswerPlan(
        model=f"{recipe.model.path}{f' ({recipe.model.quantize})' if recipe.model.quantize else ''}",
        topology=target.name, device_memory=target.chip.memory / target.chip.devices, mesh=dict(mesh.shape),
        batch=rows, prompt_tokens=length, new_tokens=new_tokens, slots=slots, weights=weights, cache=cache,
        programs=programs, needed=needed, fits=None not in programs.values(), step_seconds=step,
        tokens_per_second=rows / step, compile_seconds=time.perf_counter() - started, versions=versions(),
    )  # fmt: skip


def step_seconds(model: Glm, mesh: Mesh | AbstractMesh, cache: float, chip: Chip) -> float:
    """The least time of one token of every row, by the memory bandwidth of one device.

    Args:
        cache: bytes per device; a step reads all of its slots.
    """
    body, head = weight_bytes(model)
    read = (body + head) / (mesh.shape["fsdp"] * mesh.shape["tensor"])
    return (read + cache) / (chip.bandwidth / chip.devices)


def _cache_bytes(model: Glm, mesh: Mesh, rows: int, slots: int) -> float:
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return rows // copies(mesh) * slots * per_token


def _programs(model: Glm, mesh: Mesh, rows: int, length: int, slots: int) -> Any:
    """Name and lowered form of every program, one after the other."""

    def on(shape: tuple[int, ...], dtype: Any, *axes: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    def spread(x: Any) -> Any:
        """The cache's layers come first, of everything else the rows."""
        axes = {5: (None, "data"), 0: ()}.get(x.ndim, ("data",))
        return on(x.shape, x.dtype, *axes)

    graph, state = nnx.split(model)
    tokens = on((rows, length), jnp.int32, "data")
    yield "prompts", prefill.lower(graph, state, tokens, tokens)
    hidden, cache = jax.tree.map(spread, jax.eval_shape(lambda *x: prefill(graph, *x), state, tokens, tokens))
    assert isinstance(cache, KVCache)
    key = np.asarray(jax.random.key_data(jax.random.key(0)))
    rules = Rules._make((on(key.shape, key.dtype), on((rows,), jnp.uint32, "data"), on((STOPS,), jnp.int32),
                         on((), jnp.int32)))  # fmt: skip
    finished, greedy = on((rows,), jnp.bool_, "data"), Sampling()
    yield "first token", first_token.lower(graph, state, hidden, cache, finished, None, rules, sampling=greedy,
                                           slots=slots)  # fmt: skip
    decoding = jax.eval_shape(
        lambda *x: first_token(graph, *x, sampling=greedy, slots=slots), state, hidden, cache, finished, None, rules
    )
    decoding = jax.tree.map(spread, decoding)
    yield "tokens", advance.lower(graph, state, decoding, rules, on((), jnp.int32), None, sampling=greedy)
    sentences = on((LABELS, SENTENCE), jnp.int32)
    yield "label scores", score_batch.lower(graph, state, tokens, tokens, sentences, on((LABELS,), jnp.int32), None)
