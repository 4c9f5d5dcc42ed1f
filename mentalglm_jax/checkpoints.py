"""Model directories in and out: load, save and convert, by the table of ``weights.py``.

Everything streams. Loading reads, tensor by tensor, the slices that this process's devices keep; saving and converting
hold one tensor at a time and replace the target in one step.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from mentalglm_jax.adapters import load_adapter
from mentalglm_jax.errors import InputError
from mentalglm_jax.files import replace_dir, write_json
from mentalglm_jax.glm import Glm
from mentalglm_jax.hf_files import (
    DTYPE_NAMES,
    DTYPES,
    INDEX,
    TOKENIZER_FILES,
    Checkpoint,
    TensorSource,
    check_replaceable,
    copy_tokenizer,
    locate,
    read_json,
    some,
    write_shards,
)
from mentalglm_jax.lora import has_lora, merge_lora, refuse_quantized
from mentalglm_jax.quantize import (
    abstract_quantized,
    check_method,
    encode,
    layer_linears,
    parts_of,
    quantization,
)
from mentalglm_jax.sharding import parameter_shardings, shard_model
from mentalglm_jax.weights import (
    Part,
    Tensor,
    check_tensors,
    config_for,
    detect_layout,
    inventory,
    parameter,
    parameter_shapes,
    read_config,
)


def load(
    path_or_hub_id: str | Path,
    adapter: str | Path | None = None,
    dtype: Any = "float32",
    mesh: Mesh | None = None,
    quantize: str | None = None,
    rope_theta: float | None = None,
) -> Glm:
    """Loads a GLM-4 model from a directory or the Hub, in any published layout (glm, glm4, chatglm).

    Weights are read slice by slice: at any time the host holds one tensor of one layer, and with ``mesh`` each process
    reads only what its own devices keep.

    Args:
        path_or_hub_id: a directory with config.json and safetensors, or a Hub id such as ``zai-org/glm-4-9b-chat-hf``.
        adapter: a PEFT adapter directory to put on top, see ``adapters.load_adapter``.
        dtype: what parameters are stored and computed in, "float32" or "bfloat16".
        mesh: devices to spread the parameters over, by the rules of ``sharding.py``; None is the default device.
        quantize: "int8", "int4" or "nf4" keeps the kernels of the decoder layers frozen in that form, see
            ``quantize.py``; each is quantised as it is read. None keeps them in ``dtype``.
        rope_theta: overrides the base of the rotary frequencies that config.json states.

    Raises:
        InputError: the checkpoint is missing, malformed, incomplete, holds tensors that do not belong or NaN; or an
            option is not supported. The message names the file and the tensors.
    """
    if quantize is not None:
        check_method(quantize)
    dtype = _model_dtype(dtype)
    checkpoint = Checkpoint(locate(path_or_hub_id))
    config = read_config(checkpoint, rope_theta)
    layout = detect_layout(checkpoint.tensors)
    tensors = check_tensors(checkpoint, config, layout)
    model = abstract_quantized(config, quantize, param_dtype=dtype)
    _fill(model, checkpoint, tensors, dtype, {} if mesh is None else parameter_shardings(model, mesh))
    if adapter is not None:
        load_adapter(model, adapter)
        if mesh is not None:
            shard_model(model, mesh)
    return model


def _model_dtype(dtype: Any) -> jnp.dtype:
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        raise InputError(f"dtype {dtype!r} is not known; use float32 or bfloat16") from error
    if dtype == jnp.float16:
        raise InputError("dtype float16 overflows in GLM-4 (NaN loss, endless '!!!!'); use bfloat16 or float32")
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise InputError(f"dtype {dtype.name} is not supported; use float32 or bfloat16")
    return dtype


def _fill(
    model: Glm,
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    dtype: Any,
    shardings: Mapping[str, NamedSharding],
) -> None:
    """Gives every parameter of an abstract ``model`` its value."""
    shapes = parameter_shapes(model.config)
    method, quantized = quantization(model), {}
    if method is not None:
        quantized = {path: parts_of(linear.kernel) for path, linear in layer_linears(model).items()}
    stacks: dict[str, jax.Array] = {}
    finite: dict[str, jax.Array] = {}
    for name, tensor in tensors.items():
        for part in tensor.parts:
            path, transposed, sharding = part.path, part.path.endswith(".kernel"), shardings.get(part.path)
            pieces = quantized.get(path)
            if pieces is not None:  # its largest array is cut like the kernel: blocks of inputs, outputs
                sharding = _kernel_sharding(shardings.get(f"{path}.{next(iter(pieces))}"))
            value = _read_part(checkpoint, name, tensor, part, sharding)
            if pieces is not None:
                assert method is not None
                value, ok = _whole(value, dtype=dtype, transposed=True, sharding=None)
                for (piece, variable), new in zip(pieces.items(), _encode(value, method=method), strict=True):
                    place, where = f"{path}.{piece}", shardings.get(f"{path}.{piece}")
                    if place not in stacks:
                        stacks[place] = jnp.zeros(variable.shape, new.dtype, device=where)
                    stacks[place], _ = _into_stack(stacks[place], new, part.layer, transposed=False, sharding=where)
            elif part.layer is None:
                value, ok = _whole(value, dtype=dtype, transposed=transposed, sharding=sharding)
                parameter(model, path).set_value(value)
            else:
                if path not in stacks:
                    stacks[path] = jnp.zeros(shapes[path], dtype, device=sharding)
                stacks[path], ok = _into_stack(
                    stacks[path], value, part.layer, transposed=transposed, sharding=sharding
                )
            finite[name] = ok if name not in finite else finite[name] & ok
    for path, stack in stacks.items():
        parameter(model, path).set_value(stack)
    bad = [name for name, ok in jax.device_get(finite).items() if not ok]
    if bad:
        raise InputError(f"{checkpoint.directory}: NaN or infinity (after the cast to {dtype.name}) in {some(bad)}")


def _read_part(
    checkpoint: Checkpoint, name: str, tensor: Tensor, part: Part, sharding: NamedSharding | None
) -> jax.Array:
    """One part as the file has it, ``[out, in]``, on the devices where its layer of the parameter will live."""
    shape = (part.stop - part.start, *tensor.shape[1:])

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # only for arrays without data, such as random keys
        start, stop, _ = index[0].indices(shape[0])
        return checkpoint.read(name, slice(part.start + start, part.start + stop), *index[1:])

    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    axes = [*sharding.spec, None, None, None][(part.layer is not None) :][: len(shape)]
    if part.path.endswith(".kernel"):
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
    layout: str = "glm",
    tokenizer: Any = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a Hugging Face model directory, which replaces ``directory`` in one step when complete.

    Args:
        merge: fold the adapter into the weights (summed in float32, cast once). False writes the base alone; the
            adapter is then for ``save_adapter``.
        layout: "glm" is transformers' own form (Glm or Glm4, whichever the model is), "chatglm" the remote-code form
            (for vLLM and llama.cpp; transformers needs the original repository's code for it, which is not written).
        tokenizer: a directory to copy tokenizer files from, or an object with ``save(directory)``; None writes none.
        dtype: dtype of the file's tensors; None keeps the parameters' own.
        max_shard_bytes: a model larger than this is split into shards with an index.

    Raises:
        InputError: the layout cannot express this model, or ``directory`` holds files that are not a checkpoint's.
        RunError: the disk refused; what was there is unchanged.
    """
    directory = Path(directory)
    refuse_quantized(model, "save_pretrained")
    own = parameter(model, "embed_tokens.embedding")[...].dtype if dtype is None else _model_dtype(dtype)
    config_dict = config_for(model.config, layout, own.name)
    tensors = inventory(model.config, layout)
    if merge and has_lora(model):
        model = merge_lora(model)

    def source(name: str, tensor: Tensor) -> TensorSource:
        def read() -> np.ndarray:
            parts = []
            for part in tensor.parts:
                value = parameter(model, part.path)[...]
                value = np.asarray(value if part.layer is None else _take(value, part.layer))
                parts.append((value.T if part.path.endswith(".kernel") else value).astype(own))
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        return TensorSource(name, DTYPE_NAMES[own], tensor.shape, read)

    _write(directory, config_dict, [source(*item) for item in tensors.items()], tokenizer, max_shard_bytes)


def convert(
    source: str | Path,
    target: str | Path,
    layout: str = "glm",
    rope_theta: float | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Rewrites a checkpoint in another layout, tensor by tensor and bit for bit, without building the model.

    From chatglm to glm, ``rope_theta`` becomes 10000 times the file's rope_ratio. Tokenizer files go along.

    Raises:
        InputError, RunError: as ``load`` and ``save_pretrained``.
    """
    checkpoint = Checkpoint(locate(source))
    config = read_config(checkpoint, rope_theta)
    tensors = check_tensors(checkpoint, config, detect_layout(checkpoint.tensors))
    places = {(part.path, part.layer): (name, part) for name, tensor in tensors.items() for part in tensor.parts}
    dtypes = {checkpoint.tensors[name].dtype for name in tensors}
    if len(dtypes) > 1:
        raise InputError(
            f"{checkpoint.directory}: mixes dtypes {some(sorted(dtypes))}; load and save it in one instead"
        )
    dtype = dtypes.pop()

    def rewritten(name: str, tensor: Tensor) -> TensorSource:
        def read() -> np.ndarray:
            found = [places[part.path, part.layer] for part in tensor.parts]
            parts = [checkpoint.read(other, slice(p.start, p.stop), *_rest(tensor)) for other, p in found]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        return TensorSource(name, dtype, tensor.shape, read)

    config_dict = config_for(config, layout, DTYPES[dtype].name)
    tokenizer = checkpoint.directory if any((checkpoint.directory / n).exists() for n in TOKENIZER_FILES) else None
    sources = [rewritten(*item) for item in inventory(config, layout).items()]
    _write(Path(target), config_dict, sources, tokenizer, max_shard_bytes)


def _rest(tensor: Tensor) -> tuple[slice, ...]:
    return (slice(None),) * (len(tensor.shape) - 1)


def _write(
    directory: Path, config: dict[str, Any], tensors: list[TensorSource], tokenizer: Any, max_shard_bytes: int
) -> None:
    def owned(name: str) -> bool:
        ours = ("config.json", "generation_config.json", INDEX, *TOKENIZER_FILES)
        return name in ours or (name.startswith("model") and name.endswith(".safetensors"))

    check_replaceable(directory, owned)
    with replace_dir(directory) as temporary:
        write_json(temporary / "config.json", config)
        generation = {name: config[name] for name in ("eos_token_id", "pad_token_id")}
        write_json(temporary / "generation_config.json", {"_from_model_config": True, **generation})
        write_shards(temporary, tensors, max_shard_bytes)
        if isinstance(tokenizer, str | Path):
            copy_tokenizer(Path(tokenizer), temporary)
        elif tokenizer is not None:
            tokenizer.save(temporary)
        written = Checkpoint(temporary)  # a header that cannot be read back must not replace anything
        assert {name: info.shape for name, info in written.tensors.items()} == {t.name: t.shape for t in tensors}
        read_json(temporary / "generation_config.json")
