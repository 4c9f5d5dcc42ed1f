"""Model directories in and out: load, save and convert, by the table of ``weights.py``.

Everything streams. Loading reads, tensor by tensor, the slices that this process's devices keep; saving and converting
hold one tensor at a time and replace the target in one step.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from mentalglm_jax.checkpoints.adapter_formats import Source
from mentalglm_jax.checkpoints.adapters import load_adapter, trained_rope_theta
from mentalglm_jax.checkpoints.hf_files import (
    CALIBRATION,
    DTYPE_NAMES,
    DTYPES,
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
    Checkpoint,
    TensorSource,
    check_vocabulary,
    copy_tokenizer,
    locate,
    write_shards,
)
from mentalglm_jax.checkpoints.model_card import CARD
from mentalglm_jax.checkpoints.orbax_files import (
    CHUNK_BYTES,
    PARAMS,
    WRITTEN,
    OrbaxCheckpoint,
    ParameterSource,
    write_params,
)
from mentalglm_jax.checkpoints.rows import Rows, Tensor, half_split
from mentalglm_jax.checkpoints.vision import PROCESSOR_FILES, copy_processors, tower_of, tower_sources
from mentalglm_jax.checkpoints.weights import (
    WRITABLE_LAYOUTS,
    check_tensors,
    config_for,
    detect_layout,
    ends_of,
    generation_config,
    inventory,
    parameter,
    parameter_shapes,
    read_config,
)
from mentalglm_jax.devices.distributed import on_host
from mentalglm_jax.devices.together import consumed
from mentalglm_jax.errors import InputError
from mentalglm_jax.files import check_owned, refuse_inputs, replace_dir, sealed, write_json, write_text
from mentalglm_jax.foreign import at_home, read_json, some, there
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.lora import has_lora, merge_lora, refuse_quantized
from mentalglm_jax.model.quantize import (
    abstract_quantized,
    check_method,
    encode,
    layer_linears,
    parts_of,
    quantization,
)
from mentalglm_jax.model.relatives import RELATIVES, VISION
from mentalglm_jax.model.sharding import parameter_shardings, shard_model
from mentalglm_jax.text.labels import Task
from mentalglm_jax.text.task_files import TASKS_FILE, tasks_in, write_tasks
from mentalglm_jax.text.tokenizer import GlmTokenizer

RowReader = Callable[[str, int | None, int, int], np.ndarray]  # path, layer, start, stop


def load(
    path_or_hub_id: str | Path,
    adapter: str | Path | None = None,
    dtype: Any = "float32",
    mesh: Mesh | None = None,
    quantize: str | None = None,
    rope_theta: float | None = None,
) -> Glm:
    """Loads a GLM-4 model or a relative from a directory or the Hub, in any published layout (see ``weights.py``).

    Weights are read slice by slice: at any time the host holds one parameter of one layer, and with ``mesh`` each
    process reads only what its own devices keep.

    Args:
        path_or_hub_id: a directory with config.json and safetensors, or a Hub id such as ``zai-org/glm-4-9b-chat-hf``.
        adapter: a PEFT adapter to put on top, directory or Hub id, see ``adapters.load_adapter``.
        dtype: what parameters are stored and computed in, "float32", "bfloat16", or "auto": bfloat16 where tensors of
            the checkpoint are.
        mesh: devices to spread the parameters over, by the rules of ``sharding.py``; None is the default device.
        quantize: "int8", "int4" or "nf4" keeps the kernels of the decoder layers frozen in that form, see
            ``quantize.py``; each is quantised as it is read. None keeps them in ``dtype``.
        rope_theta: overrides the base of the rotary frequencies that config.json states. None is what the adapter was
            trained with, where there is one and it says so.

    Raises:
        InputError: the checkpoint is missing, malformed, incomplete, holds tensors that do not belong or NaN; or an
            option is not supported. The message names the file and the tensors.
    """
    if quantize is not None:
        check_method(quantize)
    dtype = dtype if dtype == "auto" else _model_dtype(dtype)
    directory = locate(path_or_hub_id)
    checkpoint = _opened(directory)
    if isinstance(dtype, str):
        stored = {tensor.dtype for tensor in checkpoint.tensors.values()}
        dtype = _model_dtype("bfloat16" if "BF16" in stored else "float32")
    if rope_theta is None and adapter is not None:
        rope_theta = trained_rope_theta(adapter)
    config = read_config(checkpoint, rope_theta)
    layout = detect_layout(checkpoint.tensors)
    tensors = check_tensors(checkpoint, config, layout)
    model = abstract_quantized(config, quantize, param_dtype=dtype)
    local = at_home(path_or_hub_id).is_dir()
    model.source = Source(str(directory.resolve()) if local else str(path_or_hub_id), layout)
    shardings = {} if mesh is None else parameter_shardings(model, mesh)
    if isinstance(checkpoint, OrbaxCheckpoint):
        if quantize is not None:
            raise InputError(f"{checkpoint.directory}: quantize needs safetensors; `mentalglm convert` to glm first")
        finite = _restore(model, checkpoint, dtype, shardings)
    else:
        finite = _fill(model, Rows(checkpoint, tensors), dtype, shardings)
    bad = [name for name, ok in jax.device_get(finite).items() if not ok]
    if bad:
        raise InputError(f"{checkpoint.directory}: NaN or infinity (after the cast to {dtype.name}) in {some(bad)}")
    if adapter is not None:
        load_adapter(model, adapter)
        if mesh is not None:
            shard_model(model, mesh)
    return model


def _opened(directory: Path) -> Checkpoint | OrbaxCheckpoint:
    weights = any(there(directory / name) for name in (SINGLE, INDEX))
    return OrbaxCheckpoint(directory) if (directory / PARAMS).is_dir() and not weights else Checkpoint(directory)


def _model_dtype(dtype: Any) -> jnp.dtype:
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        raise InputError(f"dtype {dtype!r} is not known; use float32 or bfloat16, or auto") from error
    if dtype == jnp.float16:
        raise InputError("dtype float16 overflows in GLM-4 (NaN loss, endless '!!!!'); use bfloat16 or float32")
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise InputError(f"dtype {dtype.name} is not supported; use float32 or bfloat16")
    return dtype


def _fill(model: Glm, rows: Rows, dtype: Any, shardings: Mapping[str, NamedSharding]) -> dict[str, jax.Array]:
    """Gives every parameter of an abstract ``model`` its value; says which tensors were finite."""
    shapes = parameter_shapes(model.config)
    method, quantized = quantization(model), {}
    if method is not None:
        quantized = {path: parts_of(linear.kernel) for path, linear in layer_linears(model).items()}
    stacks: dict[str, jax.Array] = {}
    finite: dict[str, jax.Array] = {}
    for path, layer in rows:
        transposed, sharding, shape = path.endswith(".kernel"), shardings.get(path), shapes[path]
        pieces = quantized.get(path)
        if pieces is not None:  # its largest array is cut like the kernel: blocks of inputs, outputs
            sharding = _kernel_sharding(shardings.get(f"{path}.{next(iter(pieces))}"))
        value = _read(rows, path, layer, shape if layer is None else shape[1:], sharding)
        if pieces is not None:
            assert method is not None
            value, ok = _whole(value, dtype=dtype, transposed=True, sharding=None)
            for (piece, variable), new in zip(pieces.items(), _encode(value, method=method), strict=True):
                place, where = f"{path}.{piece}", shardings.get(f"{path}.{piece}")
                if place not in stacks:
                    stacks[place] = jnp.zeros(variable.shape, new.dtype, device=where)
                stacks[place], _ = _into_stack(stacks[place], new, layer, transposed=False, sharding=where)
        elif layer is None:
            value, ok = _whole(value, dtype=dtype, transposed=transposed, sharding=sharding)
            parameter(model, path).set_value(value)
        else:
            if path not in stacks:
                stacks[path] = jnp.zeros(shape, dtype, device=sharding)
            stacks[path], ok = _into_stack(stacks[path], value, layer, transposed=transposed, sharding=sharding)
        for name in rows.names(path, layer):
            finite[name] = ok if name not in finite else finite[name] & ok
    for path, stack in stacks.items():
        parameter(model, path).set_value(stack)
    return finite


def _restore(
    model: Glm, checkpoint: OrbaxCheckpoint, dtype: Any, shardings: Mapping[str, NamedSharding]
) -> dict[str, jax.Array]:
    """``_fill`` from Orbax form."""
    here, finite = jnp.zeros(()).sharding, {}
    for path in parameter_shapes(model.config):
        value = checkpoint.array(path, dtype, shardings.get(path, here))
        parameter(model, path).set_value(value)
        finite[path] = jnp.isfinite(value).all()
    return finite


def _read(
    rows: Rows, path: str, layer: int | None, shape: tuple[int, ...], sharding: NamedSharding | None
) -> jax.Array:
    """A parameter (or its layer) of ``shape`` as files have it, kernels ``[out, in]``, on the devices where it will
    live."""
    shape = shape[::-1] if path.endswith(".kernel") else shape

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # only for arrays without data, such as random keys
        start, stop, _ = index[0].indices(shape[0])
        return rows.read(path, layer, start, stop, *index[1:])

    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    axes = [*sharding.spec, None, None, None][(layer is not None) :][: len(shape)]
    if path.endswith(".kernel"):
        axes.reverse()
    return jax.make_array_from_callback(shape, NamedSharding(sharding.mesh, PartitionSpec(*axes)), read)


def _kernel_sharding(sharding: NamedSharding | None) -> NamedSharding | None:
    """The sharding of a kernel ``[L, in, out]``, given that of its quantised values or of its codes by block."""
    if sharding is None:
        return None
    layers, inputs, *_, outputs = sharding.spec
    return NamedSharding(sharding.mesh, PartitionSpec(layers, inputs, outputs))


_encode = functools.partial(jax.jit, static_argnames="method")(encode)


@functools.partial(jax.jit, static_argnames=("transposed", "sharding"), donate_argnames="stack")
def _into_stack(
    stack: Array, value: Array, layer: Int[Array, ""], *, transposed: bool, sharding: NamedSharding | None
) -> tuple[Array, Array]:
    value = (value.T if transposed else value).astype(stack.dtype)
    stack = jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)
    if sharding is not None:
        stack = jax.lax.with_sharding_constraint(stack, sharding)
    return stack, jnp.isfinite(value).all()


@functools.partial(jax.jit, static_argnames=("dtype", "transposed", "sharding"))
def _whole(value: Array, *, dtype: Any, transposed: bool, sharding: NamedSharding | None) -> tuple[Array, Array]:
    value = (value.T if transposed else value).astype(dtype)
    if sharding is not None:
        value = jax.lax.with_sharding_constraint(value, sharding)
    return value, jnp.isfinite(value).all()


@jax.jit
def _take(stack: Array, layer: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)


def save_pretrained(
    model: Glm,
    directory: str | Path,
    merge: bool = True,
    layout: str | None = None,
    tokenizer: Any = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    card: str | None = None,
) -> None:
    """Writes a Hugging Face model directory, which replaces ``directory`` in one step when complete. Of several
    processes all must call it; the primary one writes.

    Args:
        merge: fold the adapter into the weights (summed in float32, cast once). False writes the base alone; the
            adapter is then for ``save_adapter``.
        layout: None is the form of the model's own family. "glm" is transformers' Glm or Glm4, whichever the model is;
            "llama", "mistral", "qwen2" theirs; "glm4v" and "glm46v" theirs, with the vision tower copied from where the
            model was loaded; "chatglm" is the remote-code form (for vLLM and llama.cpp; transformers needs the original
            repository's code for it, which is not written).
        tokenizer: a directory to copy tokenizer files from, or an object with ``save(directory)``; None writes none.
        dtype: dtype of the file's tensors; None keeps the parameters' own.
        max_shard_bytes: a model larger than this is split into shards with an index.
        card: README.md; None writes none.

    Raises:
        InputError: the layout cannot express this model, or ``directory`` holds files that are not a checkpoint's.
        RunError: the disk refused; what was there is unchanged.
    """
    directory = Path(directory)
    refuse_quantized(model, "save_pretrained")
    own = parameter(model, "embed_tokens.embedding")[...].dtype if dtype is None else _model_dtype(dtype)
    layout = layout or model.config.family
    tower = tower_of(model, layout)
    config_dict = config_for(model.config, layout, own.name, None if tower is None else tower.config)
    tensors = inventory(model.config, layout)
    if merge and has_lora(model):
        model = merge_lora(model)

    def blocks() -> Iterator[np.ndarray]:  # of all tensors, in the order in which they are written
        for tensor in tensors.values():
            for part in tensor.parts:
                value = parameter(model, part.path)[...]
                value = on_host(value if part.layer is None else _take(value, part.layer))
                rows = value.T if part.path.endswith(".kernel") else value
                rows = rows[part.first : part.first + part.stop - part.start]
                yield (half_split(rows, part.head) if part.head else rows).astype(own)

    made = blocks()

    def source(name: str, tensor: Tensor) -> TensorSource:
        return TensorSource(name, DTYPE_NAMES[own], tensor.shape, lambda: itertools.islice(made, len(tensor.parts)))

    sources = [source(*item) for item in tensors.items()] + tower_sources(tower, layout)
    generation = generation_config(model.config, ends_of(model.config, tokenizer))
    contents = _Contents(config_dict, generation, tokenizer, None if tower is None else tower.directory, card=card)
    consumed(made, lambda: _write(directory, contents, lambda temporary: write_shards(temporary, sources,
                                                                                      max_shard_bytes)))  # fmt: skip


def convert(
    source: str | Path,
    target: str | Path,
    layout: str | None = None,
    rope_theta: float | None = None,
    max_shard_bytes: int = 5_000_000_000,
    check: Callable[[Path], bool] | None = None,
) -> tuple[str, bool]:
    """Rewrites a checkpoint in another form, bit for bit and block by block, without building the model.

    Tokenizer files go along; a chatglm checkpoint's ``tokenizer.model`` becomes the ``tokenizer.json`` that
    transformers reads without remote code.

    Args:
        layout: as in ``save_pretrained``, or "orbax": the parameter tree on disk, see ``orbax_files``. Any of them, and
            whatever ``load`` reads, can be the source. From chatglm to glm, ``rope_theta`` becomes 10000 times the
            file's rope_ratio. A vision tower goes along only where source and target have one.
        check: called with the complete directory before it takes the place of ``target``; what it raises stops that.

    Returns:
        the layout written, and whether ``check`` said that it had something to check.

    Raises:
        InputError, RunError: as ``load`` and ``save_pretrained``.
    """
    if layout not in (None, *WRITABLE_LAYOUTS, "orbax"):
        raise InputError(f"layout {layout!r} is not one of {', '.join(WRITABLE_LAYOUTS)}, orbax")
    checkpoint = _opened(locate(source))
    refuse_inputs(Path(target), {"the model": checkpoint.directory})
    config = read_config(checkpoint, rope_theta)
    layout = layout or config.family
    tensors = check_tensors(checkpoint, config, detect_layout(checkpoint.tensors))
    dtypes = {checkpoint.tensors[name].dtype for name in tensors}
    if len(dtypes) > 1:
        raise InputError(
            f"{checkpoint.directory}: mixes dtypes {some(sorted(dtypes))}; load and save it in one instead"
        )
    dtype = dtypes.pop()
    read = _row_reader(checkpoint, tensors)
    if layout == "orbax":
        form = "glm" if config.family in VISION else config.family  # a tree has no vision tower
        config_dict = config_for(config, form, DTYPES[dtype].name)
        parameters = [
            ParameterSource(path, dtype, shape, functools.partial(read, path))
            for path, shape in parameter_shapes(config).items()
        ]
        write = functools.partial(write_params, sources=parameters)
    else:
        config_dict = config_for(config, layout, DTYPES[dtype].name, checkpoint.config)
        sources = [
            TensorSource(name, dtype, tensor.shape, functools.partial(_blocks, read, tensor, DTYPES[dtype].itemsize))
            for name, tensor in inventory(config, layout).items()
        ] + tower_sources(checkpoint, layout)
        write = functools.partial(write_shards, tensors=sources, max_shard_bytes=max_shard_bytes)
    generation = checkpoint.directory / "generation_config.json"
    contents = _Contents(
        config_dict,
        generation_config(config, read_json(generation) if there(generation) else {}),
        _tokenizer_of(checkpoint.directory, layout),
        checkpoint.directory if layout in VISION else None,
        tasks=tasks_in(checkpoint.directory),
    )
    return layout, _write(Path(target), contents, write, check)


def _row_reader(checkpoint: Checkpoint | OrbaxCheckpoint, tensors: Mapping[str, Tensor]) -> RowReader:
    """Rows ``start:stop`` of a parameter (of one layer), as checkpoints store it; refuses NaN and infinity."""
    rows = Rows(checkpoint, tensors) if isinstance(checkpoint, Checkpoint) else None

    def read(path: str, layer: int | None, start: int, stop: int) -> np.ndarray:
        if isinstance(checkpoint, OrbaxCheckpoint):
            value = checkpoint.read(path, layer, start, stop)
        else:
            assert rows is not None
            value = rows.read(path, layer, start, stop)
        if not _finite(value):
            names = [path] if rows is None else rows.names(path, layer)
            raise InputError(f"{checkpoint.directory}: NaN or infinity in {some(names)}")
        return value

    return read


def _finite(value: np.ndarray) -> bool:
    """By the bits of the exponent, in pieces that stay in the cache: many times faster than ``isfinite``."""
    unsigned, exponent = {"float32": (np.uint32, 0x7F800000), "float16": (np.uint16, 0x7C00)}.get(
        value.dtype.name, (np.uint16, 0x7F80)
    )
    bits = np.ascontiguousarray(value).reshape(-1).view(unsigned)
    piece = np.empty(min(bits.size, 1 << 17), unsigned)
    for start in range(0, bits.size, 1 << 17):
        part = bits[start : start + (1 << 17)]
        if np.bitwise_and(part, unsigned(exponent), out=piece[: part.size]).max() >= exponent:
            return False
    return True


def _blocks(read: RowReader, tensor: Tensor, itemsize: int) -> Iterator[np.ndarray]:
    """A tensor of a layout, some rows at a time."""
    most = max(1, CHUNK_BYTES // (math.prod(tensor.shape[1:]) * itemsize))
    for part in tensor.parts:
        step = max(1, most // part.head) * part.head if part.head else most  # whole heads
        last = part.first + part.stop - part.start
        for start in range(part.first, last, step):
            rows = read(part.path, part.layer, start, min(start + step, last))
            yield half_split(rows, part.head) if part.head else rows


def _tokenizer_of(directory: Path, layout: str) -> Any:
    """What ``_write`` copies or saves of a source's tokenizer."""
    check_vocabulary(directory)
    present = {name for name in TOKENIZER_FILES if there(directory / name)}
    tiktoken = layout not in ("chatglm", *RELATIVES)  # theirs is SentencePiece's
    if tiktoken and "tokenizer.model" in present and "tokenizer.json" not in present:
        return GlmTokenizer.load(directory)
    return directory if present else None


class _Contents(NamedTuple):
    """What a model directory holds besides weights; ``tokenizer`` and ``card`` as in ``save_pretrained``; ``processor``
    is the directory whose image and video processors go along; ``tasks`` are those that travel with it."""

    config: dict[str, Any]
    generation: dict[str, Any]
    tokenizer: Any
    processor: Path | None = None
    tasks: tuple[Task, ...] = ()
    card: str | None = None


def _write(
    directory: Path,
    contents: _Contents,
    write_weights: Callable[[Path], None],
    check: Callable[[Path], bool] | None = None,
) -> bool:
    """Says what ``check`` said."""

    def owned(name: str) -> object:
        ours = ("config.json", "generation_config.json", INDEX, CARD, TASKS_FILE, CALIBRATION, *TOKENIZER_FILES,
                *PROCESSOR_FILES)  # fmt: skip
        return name in ours or re.fullmatch(r"model[^/]*\.safetensors", name) or WRITTEN.fullmatch(name)

    with replace_dir(directory, functools.partial(check_owned, owned=owned)) as temporary:
        write_json(temporary / "config.json", contents.config)
        write_json(temporary / "generation_config.json", contents.generation)
        write_weights(temporary)
        if contents.card is not None:
            write_text(temporary / CARD, sealed(contents.card))
        if isinstance(contents.tokenizer, str | Path):
            copy_tokenizer(Path(contents.tokenizer), temporary)
        elif contents.tokenizer is not None:
            contents.tokenizer.save(temporary)
        if contents.processor is not None:
            copy_processors(contents.processor, temporary)
        if contents.tasks:
            write_tasks(temporary / TASKS_FILE, contents.tasks)
        written = _opened(temporary)  # what cannot be read back must not replace anything
        config = GlmConfig.from_dict(written.config)
        check_tensors(written, config, detect_layout(written.tensors))
        return check is not None and check(temporary)
