"""Does a recipe fit a TPU slice, and how fast can it be there: asked of the TPU compiler, with no TPU at hand.

``plan`` compiles the training step of a recipe, the very function ``train`` runs, for the devices of a topology. The
compiler (libtpu, the [tpu] extra) lays out every buffer, so that its word on memory is the last one; nothing is run and
no weights are read. FLOPs and times come from ``cost.py``. ``expected`` is the arithmetic part alone, for a device that
is there.
"""

import dataclasses
import importlib.metadata
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mentalglm_jax.data.batches import Example, PackedBatches
from mentalglm_jax.data.pairs import encode_pairs, read_pairs
from mentalglm_jax.devices.hardware import GIB, Topology, chip_of, parse_topology
from mentalglm_jax.errors import InputError, RunError, install, nearest
from mentalglm_jax.foreign import at_home, read_json
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.layout import MESH_AXES
from mentalglm_jax.model.lora import add_lora
from mentalglm_jax.model.quantize import abstract_quantized
from mentalglm_jax.model.rope import Llama3
from mentalglm_jax.model.sharding import batch_sharding, make_mesh, parameter_shardings
from mentalglm_jax.planning.collectives import by_kind, collectives
from mentalglm_jax.planning.cost import Bound, Memory, Shape, bound, estimate_memory, parts_of_activations, shape_of
from mentalglm_jax.train.preference import Objective
from mentalglm_jax.train.recipe import Recipe, StageSection, TrainConfig
from mentalglm_jax.train.step import make_optimizer, make_step

_BASE: dict[str, Any] = {"max_position_embeddings": 8192}
_LONG: dict[str, Any] = {"num_key_value_heads": 4, "max_position_embeddings": 1048576}
_CHAT: dict[str, Any] = {"max_position_embeddings": 131072}
_0414: dict[str, Any] = {"sandwich_norm": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768}
_PLAIN: dict[str, Any] = {"partial_rotary_factor": 1.0, "pad_token_id": None, "rms_norm_eps": 1e-5}
_LLAMA: dict[str, Any] = _PLAIN | {"family": "llama", "attention_bias": False}
_LLAMA_2: dict[str, Any] = _LLAMA | {"vocab_size": 32000, "max_position_embeddings": 4096, "eos_token_id": (2,)}
_LLAMA_3: dict[str, Any] = _LLAMA | {
    "vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 5e5, "eos_token_id": (128001,)
}  # fmt: skip
_QWEN: dict[str, Any] = _PLAIN | {
    "family": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "eos_token_id": (151645,),
    "max_position_embeddings": 32768
}  # fmt: skip


def _three(factor: float) -> Llama3:
    return Llama3(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def _sized(vocab: int, hidden: int, feed: int, layers: int, heads: int, kv: int, head: int = 0) -> dict[str, Any]:
    return {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": feed, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head or hidden // heads}  # fmt: skip


# What the published checkpoints look like, for a plan before anything is downloaded.
GEOMETRIES = {
    f"{owner}/{name}": GlmConfig(**fields)
    for owner in ("zai-org", "THUDM")
    for name, fields in {
        "glm-4-9b": _BASE,
        "glm-4-9b-hf": _BASE,
        "glm-4-9b-chat": _CHAT,
        "glm-4-9b-chat-hf": _CHAT,
        "glm-4-9b-chat-1m": _LONG,
        "glm-4-9b-chat-1m-hf": _LONG,
        "GLM-4-9B-0414": _0414,
        "GLM-Z1-9B-0414": _0414,
    }.items()
} | {
    name: GlmConfig(**{**common, **sizes})
    for name, common, sizes in (
        ("meta-llama/Llama-2-7b-hf", _LLAMA_2, _sized(32000, 4096, 11008, 32, 32, 32)),
        ("meta-llama/Llama-2-7b-chat-hf", _LLAMA_2, _sized(32000, 4096, 11008, 32, 32, 32)),
        ("meta-llama/Llama-2-13b-chat-hf", _LLAMA_2, _sized(32000, 5120, 13824, 40, 40, 40)),
        ("meta-llama/Llama-3.1-8B", _LLAMA_3 | {"rope_scaling": _three(8.0)}, _sized(128256, 4096, 14336, 32, 32, 8)),
        ("meta-llama/Llama-3.1-8B-Instruct", _LLAMA_3 | {"rope_scaling": _three(8.0)},
         _sized(128256, 4096, 14336, 32, 32, 8)),
        ("meta-llama/Llama-3.2-1B-Instruct", _LLAMA_3 | {"rope_scaling": _three(32.0), "tie_word_embeddings": True},
         _sized(128256, 2048, 8192, 16, 32, 8)),
        ("meta-llama/Llama-3.2-3B-Instruct", _LLAMA_3 | {"rope_scaling": _three(32.0), "tie_word_embeddings": True},
         _sized(128256, 3072, 8192, 28, 24, 8)),
        ("HuggingFaceTB/SmolLM2-135M-Instruct",
         _LLAMA | {"rope_theta": 1e5, "max_position_embeddings": 8192, "tie_word_embeddings": True,
                   "eos_token_id": (2,)}, _sized(49152, 576, 1536, 30, 9, 3)),
        ("mistralai/Mistral-7B-Instruct-v0.3",
         _LLAMA | {"family": "mistral", "rope_theta": 1e6, "max_position_embeddings": 32768, "eos_token_id": (2,)},
         _sized(32768, 4096, 14336, 32, 32, 8)),
        ("Qwen/Qwen2.5-0.5B-Instruct", _QWEN | {"tie_word_embeddings": True}, _sized(151936, 896, 4864, 24, 14, 2)),
        ("Qwen/Qwen2.5-1.5B-Instruct", _QWEN | {"tie_word_embeddings": True}, _sized(151936, 1536, 8960, 28, 12, 2)),
        ("Qwen/Qwen2.5-3B-Instruct", _QWEN | {"tie_word_embeddings": True}, _sized(151936, 2048, 11008, 36, 16, 2)),
        ("Qwen/Qwen2.5-7B-Instruct", _QWEN, _sized(152064, 3584, 18944, 28, 28, 4)),
    )
}  # fmt: skip
# Which knob lowers which part of the memory.
_KNOBS = {
    "weights": "model.quantize: int8 or int4, or a larger mesh.fsdp on more chips",
    "adapters and optimiser": "a smaller lora.rank",
    "layer inputs": "model.remat: full, a larger train.accumulate (fewer rows at a time), or mesh.tensor",
    "one layer": "a larger train.accumulate (fewer rows at a time), a shorter train.sequence_length, or mesh.tensor",
    "logits": "a smaller train.loss_chunk",
    "gradients": "a smaller lora.rank",
    "gathered weights": "mesh.tensor instead of some of mesh.fsdp",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedRows:
    """Of a stage on pairs of answers: how many lie in a row, at most, and how many targets a row has room for.
    ``exact``: counted in the stage's file; else an upper bound, the file being made later."""

    per_row: int
    targets: int
    exact: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What was found out; bytes are per device. ``compiled`` is None when the compiler was not asked, or refused;
    ``needed`` is then what it said it would need, if it did. ``collectives`` counts the exchanges between devices in
    the program by kind; ``any_order`` says whether they are the same with the devices in reverse, where that was
    asked. ``pairs`` is of a stage on pairs."""

    model: str
    stage: str
    topology: str
    device_memory: float
    mesh: dict[str, int]
    shape: Shape
    pairs: PairedRows | None
    estimated: Memory
    compiled: Memory | None
    needed: float | None
    fits: bool
    advice: str
    bound: Bound
    collectives: dict[str, int]
    any_order: bool | None
    compile_seconds: float | None
    versions: dict[str, str]

    @property
    def total(self) -> float:
        """Bytes per device by the best source there is."""
        return self.compiled.total if self.compiled else self.needed or self.estimated.total

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found = dataclasses.asdict(self)
        for name in ("estimated", "compiled"):
            memory = getattr(self, name)
            found[name] = memory and {**found[name], "total": memory.total}
        found["bound"] |= {
            "seconds": self.bound.seconds, "tokens_per_second": self.bound.tokens_per_second, "limit": self.bound.limit
        }  # fmt: skip
        return {**found, "total": self.total}


def plan(recipe: Recipe, topology: str, *, stage: str | None = None, device_order: bool = False) -> Plan:
    """Compiles the training step of a recipe's stage for a TPU slice.

    Args:
        recipe: what would be trained; of its data a stage's pairs alone are read, where they are there already, and
            its model only as far as config.json.
        topology: e.g. "v5e:2x4", see ``hardware.parse_topology``.
        stage: name of the stage; None is the first.
        device_order: compile it once more, with the devices in reverse.

    Raises:
        InputError: unknown topology, stage or model; the mesh does not fit the slice; rows cannot be spread over it.
        RunError: the TPU compiler is not installed.
    """
    target, section = parse_topology(topology), _stage(recipe, stage)
    devices, backend = tpu_devices(target), "splash" if recipe.model.dtype == "bfloat16" else "xla"
    mesh = make_mesh(*mesh_sizes(recipe), devices=devices)
    model = abstract_trainee(recipe, mesh, backend)
    sizes = dict(mesh.shape)
    _check_rows(section.train, sizes)
    config, pairs = section.train, paired_rows(section, model.config.vocab_size, recipe.seed)
    if pairs is not None:
        config = config.model_copy(update={"targets_per_row": pairs.targets})
    shape = shape_of(config, sizes)
    estimated, memory = estimate_memory(model, shape), target.chip.memory / target.chip.devices
    started = time.perf_counter()
    compiled, needed, program = compile_step(model, config, shape, mesh, estimated, section.objective, pairs)
    sent, any_order = collectives(program), None
    if device_order and compiled is not None:
        back = make_mesh(*mesh_sizes(recipe), devices=devices[::-1])
        again = compile_step(abstract_trainee(recipe, back, backend), config, shape, back, estimated,
                             section.objective, pairs)  # fmt: skip
        any_order = collectives(again[2]) == sent
    return Plan(
        model=f"{recipe.model.path}{f' ({recipe.model.quantize})' if recipe.model.quantize else ''}",
        stage=section.name, topology=target.name, device_memory=memory, mesh=sizes, shape=shape,
        pairs=pairs, estimated=estimated, compiled=compiled, needed=needed, fits=compiled is not None,
        advice="" if compiled is not None else knobs(model, shape, estimated), bound=bound(model, shape, target.chip),
        collectives=by_kind(sent), any_order=any_order,
        compile_seconds=time.perf_counter() - started, versions=versions(),
    )  # fmt: skip


def paired_rows(stage: StageSection, vocab_size: int, seed: int) -> PairedRows | None:
    """How the pairs of ``stage`` fill its rows, packed as training packs them; None where it trains on records.

    Without the file: a pair has a token of prompt and one of answer on either side, at least.

    Raises:
        InputError: as ``read_pairs``, ``encode_pairs`` and ``PackedBatches``.
    """
    if stage.objective is None:
        return None
    config = stage.train
    if not stage.objective.pairs.exists():
        targets = min(config.targets_per_row or config.sequence_length, config.sequence_length)
        return PairedRows(per_row=max(1, min(config.sequence_length // 4, targets // 2)), targets=targets, exact=False)
    examples, _ = encode_pairs(read_pairs(stage.objective.pairs, vocab_size), config.sequence_length)
    packed = PackedBatches(examples, rows=config.rows, sequence_length=config.sequence_length,
                           targets_per_row=config.targets_per_row, seed=seed)  # fmt: skip
    return PairedRows(per_row=packed.pairs_per_row, targets=packed.targets_per_row, exact=True)


def tpu_devices(target: Topology) -> Sequence[Any]:
    """The devices of a slice as the TPU compiler knows them; none of them can run anything.

    Raises:
        RunError: libtpu is not installed.
        InputError: libtpu has no such slice.
    """
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise RunError(f"a plan needs the TPU compiler (not a TPU): {install('tpu')}") from None
    # Without the first, libtpu refuses where another process has it open, for a plan of its own or to train; without
    # the others it asks the metadata server of a Cloud TPU host, and waits for it.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    options: dict[str, Any] = {"chips_per_host_bounds": target.hosts}
    if target.chip.name == "v4":  # without it one device per core, which no v4 host offers
        options["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=target.name, **options).devices
    except (RuntimeError, ValueError) as error:
        raise InputError(f"topology {target.name}: the TPU compiler has no such slice ({_first(error)})") from error


def abstract_trainee(recipe: Recipe, mesh: Mesh | None, backend: str) -> Glm:
    """The model that a recipe trains, adapter included: shapes, dtypes and, with ``mesh``, shardings only."""
    return abstract_model_on(recipe, mesh, backend, adapter=True)


def abstract_model_on(recipe: Recipe, mesh: Mesh | None, backend: str, *, adapter: bool) -> Glm:
    """``abstract_trainee``, with or without its adapter."""
    section, dtype = recipe.model, jnp.dtype(recipe.model.dtype)
    config = geometry(recipe)

    def build() -> Glm:
        model = abstract_quantized(config, section.quantize, param_dtype=dtype, remat=section.remat, backend=backend)
        if adapter:
            add_lora(model, recipe.lora.config(), nnx.Rngs(0))
        return model

    model = nnx.eval_shape(build)
    if mesh is None:
        return model
    state = nnx.state(model)
    shardings = parameter_shardings(state, mesh)
    for keys, leaf in nnx.to_flat_state(state):
        sharding = shardings[".".join(map(str, keys))]
        leaf.set_value(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))
    nnx.update(model, state)
    return model


def geometry(recipe: Recipe) -> GlmConfig:
    """The model's configuration: of a local directory its config.json, of a known Hub id the built-in table.

    Raises:
        InputError: neither of the two.
    """
    name = recipe.model.path
    if name is None:
        return GlmConfig.from_dict({"model_type": "glm", "vocab_size": recipe.tokenizer.vocab_size or 4096,
                                    "num_key_value_heads": 2, **(recipe.model.geometry or {})})  # fmt: skip
    file = at_home(name) / "config.json"
    if file.is_file():
        return GlmConfig.from_dict(read_json(file))
    if name not in GEOMETRIES:
        raise InputError(
            f"model {name!r}: no such directory with a config.json, nor a model whose geometry is known"
            f"{nearest(name, GEOMETRIES)}; known are {', '.join(sorted(GEOMETRIES))}"
        )
    return GEOMETRIES[name]


def trace_step(
    model: Glm, config: TrainConfig, shape: Shape, mesh: Mesh, objective: Objective | None = None,
    pairs: PairedRows | None = None
) -> Any:  # fmt: skip
    """The training step, traced for arrays that are not there (``jax.stages.Traced``)."""
    optimizer = make_optimizer(config, config.steps or 1000)
    step, state, frozen = make_step(model, optimizer, config, "lora", mesh, objective)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    batch = abstract_batch(config, shape, mesh, pairs=0 if pairs is None else pairs.per_row)
    return step.trace(state.trainable, state.optimizer, frozen, batch, key)


def compile_step(
    model: Glm, config: TrainConfig, shape: Shape, mesh: Mesh, estimated: Memory, objective: Objective | None = None,
    pairs: PairedRows | None = None
) -> tuple[Memory | None, float | None, str]:  # fmt: skip
    """Memory of the compiled step, and its text; or None and, if it says so, the bytes that it would have needed."""
    lowered = trace_step(model, config, shape, mesh, objective, pairs).lower()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, refusal(error), ""
    total = allocated(program)
    memory = dataclasses.replace(estimated, activations=total - estimated.total + estimated.activations)
    return memory, None, program.as_text() or ""


def allocated(compiled: Any) -> float:
    """Bytes per device that a compiled program needs in all."""
    stats = compiled.memory_analysis()
    return float(
        stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    )  # fmt: skip


def refusal(error: Exception) -> float | None:
    """Bytes of memory that a compiler says it would have needed; of temporaries alone if they are too many already."""
    used = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", str(error)) or re.search(
        r"required for HLO temporaries \(([\d.]+)([KMGT])\)", str(error)
    )
    return float(used[1]) * 1024 ** ("KMGT".index(used[2]) + 1) if used else None


def abstract_batch(config: TrainConfig, shape: Shape, mesh: Mesh, pairs: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    """What the input pipeline yields, from the pipeline itself; ``pairs`` of answers in a row, 0 for records."""
    size = 2 if pairs else 1  # targets: one of each answer
    one = Example(tokens=np.zeros(2 * size, np.int32), target_index=np.zeros(size, np.int32),
                  target_ids=np.zeros(size, np.int32))  # fmt: skip
    batches = PackedBatches(
        [Example({**one, "split": 2})] * pairs or [one], rows=config.rows, sequence_length=shape.length,
        targets_per_row=shape.targets, seed=0
    )  # fmt: skip
    arrays: dict[str, Any] = {**next(iter(batches))}
    micro = (config.accumulate, config.rows // config.accumulate)
    where = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct((*micro, *x.shape[1:]), x.dtype, sharding=where) for name, x in arrays.items()}


def knobs(model: Glm, shape: Shape, memory: Memory) -> str:
    """What to turn to need less: the settings behind the three largest parts of the memory."""
    parts = {"weights": memory.weights, "adapters and optimiser": memory.adapters + memory.optimizer}
    parts |= parts_of_activations(model, shape, memory.adapters)
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    return "; ".join(f"{name} {parts[name] / GIB:.1f} GiB: {_KNOBS[name]}" for name in largest)


def expected(recipe: Recipe, stage: StageSection) -> str | None:
    """One line for the devices that are there, before weights are loaded; None where they are not accelerators.

    The memory is an estimate; a plan for the topology is the compiler's word.
    """
    device = _own_device()
    chip = chip_of(device.device_kind)
    if chip is None:
        return None
    sizes: dict[str, int] = dict.fromkeys(MESH_AXES, 1)
    if recipe.mesh is not None:
        sizes |= make_mesh(*mesh_sizes(recipe)).shape
    model, shape = abstract_trainee(recipe, None, backend="auto"), shape_of(stage.train, sizes)
    memory, least = estimate_memory(model, shape), bound(model, shape, chip)
    limit = (device.memory_stats() or {}).get("bytes_limit") or chip.memory / chip.devices
    line = (
        f"estimate: {memory.total / GIB:.1f} of {limit / GIB:.1f} GiB per device (weights {memory.weights / GIB:.1f}, "
        f"activations {memory.activations / GIB:.1f}); at most {least.tokens_per_second:,.0f} tokens/s "
        f"({least.limit})"
    )
    return line if memory.total < limit else f"{line}. It will hardly fit; {knobs(model, shape, memory)}"


def _own_device() -> Any:
    return jax.devices()[0]


def _stage(recipe: Recipe, name: str | None) -> StageSection:
    for stage in recipe.stages:
        if name in (None, stage.name):
            return stage
    raise InputError(f"no stage {name!r}; the recipe has {', '.join(stage.name for stage in recipe.stages)}")


def mesh_sizes(recipe: Recipe) -> tuple[int, int, int]:
    return (1, -1, 1) if recipe.mesh is None else (recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor)


def _check_rows(config: TrainConfig, sizes: dict[str, int]) -> None:
    parts = sizes["data"] * sizes["fsdp"]
    if config.rows // config.accumulate % parts:
        raise InputError(
            f"rows / accumulate = {config.rows // config.accumulate} rows cannot be spread evenly over data x fsdp = "
            f"{parts} devices; make rows a multiple of {parts * config.accumulate}"
        )


def _first(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
