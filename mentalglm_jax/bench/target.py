"""What is measured: a geometry, an adapter and a step, from a recipe or fitted to the device."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mentalglm_jax.data.batches import Example
from mentalglm_jax.devices.hardware import GIB, free_memory
from mentalglm_jax.errors import InputError
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.layout import MESH_AXES
from mentalglm_jax.model.sharding import make_mesh
from mentalglm_jax.planning.cost import estimate_memory, shape_of
from mentalglm_jax.planning.plan import abstract_trainee, geometry, mesh_sizes
from mentalglm_jax.train.recipe import Recipe, TrainConfig

# Without a recipe: GLM-4-9b on an accelerator, a model of 59 M parameters on a CPU.
_LARGE = {"model": {"path": "zai-org/glm-4-9b-chat-hf", "dtype": "bfloat16", "remat": "full"}}
_SMALL = {
    "model": {"geometry": {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1712, "num_hidden_layers": 8,
                           "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}},
    "pretrain": {"train": {"steps": 1}},
}  # fmt: skip
# Lengths of examples in tokens, and how often they are drawn: short posts mostly, as in IMHI, and some long ones.
LENGTHS = {(120, 300): 0.5, (300, 700): 0.35, (700, 1500): 0.15}
ANSWERS = 0.3  # of an example's tokens
PER_ROW = 12  # examples that are drawn for a row of the step
FILL = 0.85  # of a device's memory, by the estimate, for which rows are chosen


def default_recipe(rows: int, length: int, *, small: bool) -> Recipe:
    """What is measured where no recipe is given: LoRA of rank 16 on every linear layer."""
    train = {"steps": 1000, "rows": rows, "sequence_length": length}
    return Recipe.model_validate(
        {"run_dir": "bench", "data": {"source": "synthetic"}, "lora": {"rank": 16, "alpha": 32},
         "stages": [{"name": "bench", "languages": ["en"], "train": train}], **(_SMALL if small else _LARGE)}
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """A recipe's first stage on a mesh of the devices that are there."""

    recipe: Recipe
    train: TrainConfig
    config: GlmConfig
    mesh: Mesh

    def shapes(self) -> Glm:
        """The model and its adapter as shapes, dtypes and shardings."""
        return abstract_trainee(self.recipe, self.mesh, backend="auto")

    def model(self) -> Glm:
        """The same with random numbers in it, made where they lie: nothing is read and nothing crosses a bus."""
        model = self.shapes()
        for number, (keys, leaf) in enumerate(nnx.to_flat_state(state := nnx.state(model))):
            leaf.set_value(_filled(number, ".".join(map(str, keys)), leaf))
        nnx.update(model, state)
        return model

    def check_room(self, *, step: bool) -> None:
        """Whether this machine's memory holds what is measured on its processor: weights, and of a ``step`` the rest.

        An accelerator refuses by itself; a machine without room ends other programs.

        Raises:
            InputError: it does not.
        """
        shapes, free = self.shapes(), free_memory(jax.devices()[0])
        if jax.devices()[0].platform != "cpu" or free is None:
            return
        memory = estimate_memory(shapes, shape_of(self.train, dict(self.mesh.shape)))
        drawn = PER_ROW * 4 * self.train.rows * self.train.sequence_length  # tokens of examples
        needed = memory.total * self.mesh.size + 3 * drawn if step else memory.weights * self.mesh.size
        if needed > FILL * free:
            raise InputError(f"it takes {needed / GIB:,.1f} GiB and this machine has {free / GIB:,.1f} free; measure a "
                             "smaller model or fewer rows, or where there is an accelerator")  # fmt: skip

    def parameters(self) -> int:
        """Of the base."""
        base = nnx.eval_shape(lambda: Glm(self.config, rngs=nnx.Rngs(0)))
        return sum(x.size for x in jax.tree.leaves(nnx.state(base)))


def target_of(recipe: Recipe | None) -> Target:
    """The recipe's first stage, or the default one with as many rows of 4,096 tokens (on a CPU one of 512) as fit.

    Raises:
        InputError: the recipe's model is not there and of no known geometry, or its mesh does not fit the devices.
    """
    device = jax.devices()[0]
    if recipe is None:
        small = device.platform == "cpu"
        recipe = default_recipe(1, 512 if small else 4096, small=small)
        if not small:
            recipe = default_recipe(_rows_that_fit(recipe, device), 4096, small=False)
    mesh = make_mesh(*mesh_sizes(recipe))
    train = recipe.stages[0].train
    if train.rows // train.accumulate % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise InputError(
            f"{train.rows} rows in {train.accumulate} micro-batches cannot be spread evenly over {mesh.size} devices; "
            "change train.rows"
        )
    return Target(recipe, train, geometry(recipe), mesh)


def _rows_that_fit(recipe: Recipe, device: Any) -> int:
    """The largest power of two up to 8 whose estimate stays below ``FILL`` of the memory; at least one per device."""
    limit = (device.memory_stats() or {}).get("bytes_limit", 0) * FILL
    model = abstract_trainee(recipe, None, backend="auto")
    sizes: dict[str, int] = dict.fromkeys(MESH_AXES, 1)
    sizes["fsdp"] = jax.device_count()
    for rows in (8, 4, 2, 1):
        config = recipe.stages[0].train.model_copy(update={"rows": rows * sizes["fsdp"]})
        if estimate_memory(model, shape_of(config, sizes)).total < limit:
            break
    return rows * sizes["fsdp"]


def examples(count: int, longest: int, vocabulary: int) -> list[Example]:
    """Random tokens in examples of ``LENGTHS`` (none above ``longest``), ``ANSWERS`` of each a target."""
    rng, found = np.random.default_rng(0), []
    ranges, weights = list(LENGTHS), list(LENGTHS.values())
    for choice in rng.choice(len(ranges), count, p=weights):
        size = min(int(rng.integers(*ranges[choice])), longest)
        tokens = rng.integers(4, vocabulary, size).astype(np.int32)
        index = np.arange(size - 1 - round(ANSWERS * size), size - 1, dtype=np.int32)
        found.append(Example(tokens=tokens, target_index=index, target_ids=tokens[index + 1]))
    return found


def _filled(seed: int, name: str, leaf: Any) -> jax.Array:
    dtype, shape = jnp.dtype(leaf.dtype), leaf.shape

    def fill() -> jax.Array:
        if jnp.issubdtype(dtype, jnp.integer):
            return jax.random.randint(jax.random.key(seed), shape, -7, 8, jnp.int32).astype(dtype)
        if "norm" in name or "scale" in name.rsplit(".", 1)[-1]:
            return jnp.full(shape, 1.0 if "norm" in name else 0.01, dtype)
        return 0.02 * jax.random.normal(jax.random.key(seed), shape, dtype)

    return jax.jit(fill, out_shardings=leaf.sharding)()
