"""What one training step costs a device, by arithmetic alone: memory, FLOPs, bytes, and the time no program beats.

Memory is exact for what lies in it between steps (weights, adapter, optimiser) and an estimate for the rest;
``plan.py`` asks the compiler. Times are bounds: each takes one resource at its documented peak, and the step takes the
longest.

* compute: model FLOPs (``train.speed``, full rows of one segment each), the adapter's, and what ``remat`` and the
  chunked loss compute twice
* memory bandwidth: weights once per pass over the layers, inputs and outputs of the matrix products, logits, optimiser
* links: under fsdp the weights of a pass that other devices keep, under tensor the residual stream twice per layer
"""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from mentalglm_jax.devices.hardware import Chip
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.model.layout import MESH_AXES
from mentalglm_jax.model.lora import LoraParam, parameter_count
from mentalglm_jax.model.sharding import parameter_shardings
from mentalglm_jax.train.recipe import TrainConfig
from mentalglm_jax.train.speed import matrix_parameters, train_flops

# Passes over the layers in one step: forward, again for what the backward pass needs and was not kept, backward.
PASSES = {"none": 2, "dots": 2, "full": 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes per device. ``activations`` is everything a step needs beside what lies there between steps."""

    weights: float
    adapters: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.adapters + self.optimizer + self.activations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """Seconds that one step takes at least, by resource; FLOPs are of the whole step on all devices."""

    model_flops: float
    executed_flops: float
    compute: float
    bandwidth: float
    links: float
    tokens: int

    @property
    def seconds(self) -> float:
        """The longest of the three."""
        return max(self.compute, self.bandwidth, self.links)

    @property
    def tokens_per_second(self) -> float:
        """An upper bound, of all devices together, for rows without padding."""
        return self.tokens / self.seconds

    @property
    def limit(self) -> str:
        """What the step waits for."""
        return {self.compute: "compute", self.bandwidth: "memory bandwidth", self.links: "links"}[self.seconds]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A stage's step as sizes. ``rows`` is one micro-batch on one device; ``targets`` is per row."""

    rows: int
    accumulate: int
    length: int
    targets: int
    chunk: int
    data: int
    fsdp: int
    tensor: int

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return self.data * self.fsdp * self.tensor


def shape_of(config: TrainConfig, sizes: dict[str, int]) -> Shape:
    """The step of ``config`` on a mesh of ``sizes``. Without ``targets_per_row`` every token may be a target."""
    parts = sizes["data"] * sizes["fsdp"]
    targets = min(config.targets_per_row or config.sequence_length, config.sequence_length)
    chunk = -(-targets // -(-targets // config.loss_chunk))
    return Shape(max(1, config.rows // config.accumulate // parts), config.accumulate, config.sequence_length, targets,
                 chunk, sizes["data"], sizes["fsdp"], sizes["tensor"])  # fmt: skip


def bytes_per_device(model: Glm, mesh: Mesh | AbstractMesh) -> tuple[float, float]:
    """Bytes of the frozen arrays and of the adapter that one device of ``mesh`` keeps."""
    shardings = parameter_shardings(model, mesh)
    frozen = adapter = 0.0
    for keys, leaf in nnx.to_flat_state(nnx.state(model)):
        shape = shardings[".".join(map(str, keys))].shard_shape(leaf.shape)
        size = math.prod(shape) * jnp.dtype(leaf.dtype).itemsize
        if isinstance(leaf, LoraParam):
            adapter += size
        else:
            frozen += size
    return frozen, adapter


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """A mesh of ``sizes`` without devices."""
    return AbstractMesh(tuple(sizes[axis] for axis in MESH_AXES), MESH_AXES)


def parts_of_activations(model: Glm, shape: Shape, adapters: float) -> dict[str, float]:
    """Estimated bytes per device by what they are for; in the backward pass of one layer they exist together.
    ``adapters`` is what a device keeps of the adapter."""
    config, wide = model.config, model.dtype.itemsize
    size, ffn = config.hidden_size, config.intermediate_size
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    tokens = shape.rows * shape.length
    products = tokens * (2 * size + 2 * queries + 2 * keys + 3 * ffn) / shape.tensor * wide
    kept = {
        "full": tokens * size / shape.tensor * wide,
        "dots": products + tokens * size / shape.tensor * wide,
        "none": 2 * products,
    }[model.remat]
    body, head = weight_bytes(model)
    found = {
        "layer inputs": config.num_hidden_layers * kept,
        "one layer": tokens * (4 * ffn + 4 * queries + 4 * size) / shape.tensor * wide,
        "logits": shape.rows * shape.chunk * config.vocab_size / shape.tensor * (4 + 4 + wide),
        "gradients": adapters * (2 if shape.accumulate > 1 else 1),
    }
    if shape.fsdp > 1:  # of a layer, and of the next one meanwhile; the projection stays for all chunks
        found["gathered weights"] = 2 * body / config.num_hidden_layers / shape.tensor + head / shape.tensor
    return found


def weight_bytes(model: Glm) -> tuple[float, float]:
    """Bytes of all layers' kernels as stored, and of the vocabulary projection, which is the table of embeddings where
    they are tied."""
    projection = "embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    flat = [(keys, leaf) for keys, leaf in nnx.to_flat_state(nnx.state(model)) if {"kernel", "embedding"} & {*keys}]
    sizes = [(keys, float(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize)) for keys, leaf in flat]
    head = sum((size for keys, size in sizes if keys[0] == projection), 0.0)
    return sum((size for keys, size in sizes if keys[0] == "layers"), 0.0), head


def estimate_memory(model: Glm, shape: Shape) -> Memory:
    """Bytes per device without asking a compiler."""
    frozen, adapter = bytes_per_device(
        model, abstract_mesh({"data": shape.data, "fsdp": shape.fsdp, "tensor": shape.tensor})
    )
    return Memory(weights=frozen, adapters=adapter, optimizer=2 * adapter,
                  activations=sum(parts_of_activations(model, shape, adapter).values()))  # fmt: skip


def bound(model: Glm, shape: Shape, chip: Chip) -> Bound:
    """What the documented peaks of ``chip`` allow."""
    config, wide = model.config, model.dtype.itemsize
    rows = shape.rows * shape.accumulate * shape.data * shape.fsdp
    tokens, targets = float(rows * shape.length), float(rows * shape.targets)
    pairs = rows * shape.length * (shape.length + 1) / 2
    body, head = matrix_parameters(config)
    adapter = parameter_count(nnx.state(model, LoraParam))
    passes = PASSES[model.remat]
    model_flops = train_flops(config, tokens=tokens, targets=targets, pairs=pairs, frozen=True)
    scores = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    again = {"none": 0.0, "dots": scores, "full": 2 * (body + adapter) * tokens + scores}[model.remat]
    executed = model_flops + 6 * adapter * tokens + 2 * head * targets + again

    local = shape.rows * shape.length  # of one micro-batch on one device
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    through = 5 * config.hidden_size + 2 * queries + 2 * keys + 3 * config.intermediate_size
    stored, projection = weight_bytes(model)
    logits = shape.rows * shape.targets * config.vocab_size / shape.tensor * 4
    traffic = (
        passes * (stored / shape.tensor + config.num_hidden_layers * local * through / shape.tensor * wide)
        + 3 * -(-shape.targets // shape.chunk) * projection / shape.tensor + 3 * logits
    )  # fmt: skip
    optimizer = 7 * 4 * adapter / shape.fsdp  # parameter and two moments, read and written, and the gradient
    foreign = (shape.fsdp - 1) / shape.fsdp
    moved = 2 * (stored + projection) / shape.tensor * foreign  # gathered for the forward and for the backward pass
    residual = local * config.hidden_size * wide * (shape.tensor - 1) / shape.tensor
    moved += 4 * passes * config.num_hidden_layers * residual
    reduced = 2 * 4 * adapter / shape.tensor * (1 - 1 / (shape.data * shape.fsdp))
    one = 1 / chip.devices
    return Bound(
        model_flops=model_flops, executed_flops=executed, compute=executed / shape.devices / (chip.flops * one),
        bandwidth=(shape.accumulate * traffic + optimizer) / (chip.bandwidth * one),
        links=shape.accumulate * (moved + reduced) / (chip.links / 2 * one), tokens=int(tokens),
    )  # fmt: skip
