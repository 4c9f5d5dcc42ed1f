"""Checkpoint directories in Orbax form: config.json, tokenizer files, and ``params/``, the parameter tree of ``Glm``.

The tree is what ``nnx.to_pure_dict(nnx.state(model))`` gives: layers stacked on a leading axis, kernels ``[in, out]``.
Orbax restores it onto any mesh, every host reading the chunks that its own devices keep. We write it as plain zarr
arrays, one directory each: Orbax lays down the structure, TensorStore fills the arrays block by block, so that a stack
of 9 GB never exists in memory. A chunk holds some output rows of one layer in the order that safetensors files have
them (a kernel's chunks are column-major), so that converting moves bytes and transposes nothing.
"""

import math
import os
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from mentalglm_jax.checkpoints.hf_files import DTYPE_NAMES, DTYPES, ModelFiles, TensorInfo
from mentalglm_jax.checkpoints.ocdbt import MANIFEST, check_databases
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.foreign import read_json

PARAMS = "params"
# What ``write_params`` leaves, by its path in the checkpoint directory.
WRITTEN = re.compile(
    rf"{PARAMS}/(?:_METADATA|_CHECKPOINT_METADATA|_sharding|commit_success\.txt|array_metadatas/\w+"
    r"|[\w.]+/(?:\.zarray|\d+(?:\.\d+)*))"
)
CHUNK_BYTES = 32 << 20
MAX_FILES = 1_000_000
GROWTH, FLOOR = 10, 1 << 28  # bytes of arrays for one of the files, and of any checkpoint: weights hardly compress
_ZARR_TYPES = {"F32": "<f4", "BF16": "bfloat16", "F16": "<f2"}


class OrbaxCheckpoint(ModelFiles):
    """A directory in Orbax form: its parsed ``config.json``, and parameters by dotted path, read in slices.

    Raises:
        InputError: no config, a link inside ``params/``, or no tree of arrays there that Orbax can read.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.config: dict[str, Any] = read_json(directory / "config.json")
        self._params = (directory / PARAMS).absolute()
        held = check_files(self._params)
        _, self._zarr3 = _described(self._params)
        check_databases(self._params)
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                tree = checkpointer.metadata(self._params).item_metadata.tree
            leaves = {_dotted(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
            self.tensors = {
                path: TensorInfo(self._params, DTYPE_NAMES.get(leaf.dtype, str(leaf.dtype)), tuple(leaf.shape))
                for path, leaf in leaves.items()
            }
        except Exception as error:  # Orbax and TensorStore raise a dozen types for a damaged directory
            raise InputError(f"{self._params}: not a readable Orbax checkpoint ({reason(error)})") from error
        stated = sum(_nbytes(info) for info in self.tensors.values())
        if stated > FLOOR + GROWTH * held:
            raise InputError(
                f"{self._params}: describes arrays of {stated} bytes, its files hold {held}; weights are not that alike"
            )
        self._open: tuple[str, Any] | None = None

    def read(self, path: str, layer: int | None, start: int, stop: int) -> np.ndarray:
        """Rows ``start:stop`` of a parameter (of one layer) as checkpoints store it: kernels as ``[out, in]``.

        Raises:
            InputError: chunks are missing or damaged.
        """
        array = self._store(path) if layer is None else self._store(path)[layer]
        return self._slice(path, array.T if path.endswith(".kernel") else array, (slice(start, stop),))

    def array(self, path: str, dtype: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        """A parameter of the tree, cast to ``dtype``; each device's part is read by the process that has the device.

        Raises:
            InputError: chunks are missing or damaged.
        """
        store = self._store(path)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # only for arrays without data, such as random keys
            return self._slice(path, store, index).astype(dtype, copy=False)

        return jax.make_array_from_callback(self.tensors[path].shape, sharding, part)

    def _slice(self, path: str, array: Any, index: tuple[slice, ...]) -> np.ndarray:
        try:
            return array[index].read(order="C").result()
        except Exception as error:  # TensorStore: ValueError and others
            raise InputError(f"{self._params}: cannot read parameter {path} ({reason(error)})") from error

    def _store(self, path: str) -> Any:
        if self._open is None or self._open[0] != path:
            self._open = path, _opened(self._params, path, self._zarr3, self.tensors[path].shape)
        return self._open[1]


def check_saved(tree: Path) -> None:
    """Whether a tree that Orbax itself saved can be restored for no more time and memory than its arrays take; that
    these have the shapes that are wanted is seen by Orbax.

    Args:
        tree: its directory, of which ``check_files`` was asked.

    Raises:
        InputError: it cannot.
    """
    names, zarr3 = _described(tree)
    check_databases(tree)
    for name in names:
        _opened(tree, name, zarr3)


def _opened(params: Path, path: str, zarr3: bool, shape: tuple[int, ...] | None = None) -> Any:
    """The array of a parameter. Raises: InputError: it is not readable, not of ``shape``, or in chunks larger than
    itself: a chunk is decoded whole, however little of it is wanted."""
    if (params / MANIFEST).exists():  # how Orbax itself saves a tree
        kvstore = {"driver": "ocdbt", "base": f"file://{params}/", "path": f"{path}/"}
    else:
        kvstore = {"driver": "file", "path": f"{params / path}/"}
    spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
    try:
        store = ts.open(spec, open=True, read=True).result()
    except Exception as error:
        raise InputError(f"{params}: cannot read parameter {path} ({reason(error)})") from error
    chunk, found = store.chunk_layout.read_chunk.shape, tuple(store.shape)
    if (shape is not None and found != shape) or any(
        part is not None and part > max(size, 1) for part, size in zip(chunk or (), found, strict=False)
    ):
        wanted = "" if shape is None else f", wanted {list(shape)}"
        raise InputError(f"{params}: parameter {path} has shape {list(found)} in chunks of {list(chunk or ())}{wanted}")
    return store


def check_files(params: Path) -> int:
    """Only files and directories below ``params``, and not without end: a FIFO would be waited for, a link followed.
    Returns the bytes of all of them.

    Raises: InputError: there is something else.
    """
    held = 0
    for number, path in enumerate((params, *params.rglob("*"))):
        status = path.lstat()
        kind = status.st_mode
        held += status.st_size if stat.S_ISREG(kind) else 0
        if stat.S_ISLNK(kind):
            raise InputError(f"{path}: is a link; put the file itself there")
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise InputError(f"{path}: is neither a file nor a directory; remove it")
        if number > MAX_FILES:
            raise InputError(f"{params}: more than {MAX_FILES} files are not those of a checkpoint")
    return held


def _described(params: Path) -> tuple[list[str], bool]:
    """The dotted names of the arrays in ``_METADATA``, and whether they are of zarr's third version. Orbax makes paths
    of the names: none may lead out of ``params``.

    Raises: InputError: one does, or these are no names.
    """
    described = read_json(params / "_METADATA")
    tree, names = described.get("tree_metadata"), []
    for leaf in tree.values() if isinstance(tree, dict) else [None]:
        about: dict[str, Any] = leaf if isinstance(leaf, dict) else {}
        keys = about.get("key_metadata")
        parts = [
            part.get("key") if isinstance(part, dict) else None
            for part in (keys if isinstance(keys, list) and keys else [None])
        ]
        if not all(isinstance(part, str) and re.fullmatch(r"\w{1,200}", part, re.ASCII) for part in parts):
            raise InputError(f"{params / '_METADATA'}: tree_metadata does not name the parameters of a model")
        value = about.get("value_metadata")
        if not (isinstance(value, dict) and value.get("skip_deserialize")):  # None has no array
            names.append(".".join(map(str, parts)))
    return names, bool(described.get("use_zarr3"))


def _nbytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * (DTYPES[info.dtype].itemsize if info.dtype in DTYPES else 8)


def _dotted(path: Iterable[Any]) -> str:
    return ".".join(str(getattr(key, "key", key)) for key in path)


class ParameterSource(NamedTuple):
    """A parameter to be written; ``read(layer, start, stop)`` gives rows as ``OrbaxCheckpoint.read`` does."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int | None, int, int], np.ndarray]


def write_params(directory: Path, sources: Iterable[ParameterSource]) -> None:
    """Writes ``directory/params``, holding two chunks at a time.

    Raises:
        RunError: the file system refused.
    """
    params = (directory / PARAMS).absolute()
    sources = list(sources)
    tree: dict[str, Any] = {}
    for source in sources:
        *parents, last = source.path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = np.zeros(1, DTYPES[source.dtype])  # a placeholder: Orbax would hold the whole array
    try:
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(params, args=ocp.args.PyTreeSave(tree))
        for source in sources:
            _fill(params / source.path, source)
    except InputError:
        raise
    except Exception as error:  # OSError, and what TensorStore makes of one: ValueError and others
        raise RunError(f"{params}: cannot write ({reason(error)}); what was there is unchanged") from error


def _fill(array: Path, source: ParameterSource) -> None:
    kernel, stacked = source.path.endswith(".kernel"), source.path.startswith("layers.")
    shape = source.shape[stacked:]
    rows, *rest = reversed(shape) if kernel else shape
    pieces = math.ceil(rows * math.prod(rest) * DTYPES[source.dtype].itemsize / CHUNK_BYTES)
    step = math.ceil(rows / pieces)
    chunk = (*rest, step) if kernel else (step, *rest)
    store = ts.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{array}/"},
            "metadata": {
                "shape": source.shape,
                "chunks": (1, *chunk) if stacked else chunk,
                "dtype": _ZARR_TYPES[source.dtype],
                "order": "F" if kernel else "C",
                "compressor": None,  # bfloat16 weights hardly compress
                "filters": None,
                "fill_value": None,
            },
            "store_data_equal_to_fill_value": True,  # a chunk that is absent is then a chunk that was lost
            "create": True,
            "delete_existing": True,
        }
    ).result()
    written: Any = None
    for layer in range(source.shape[0]) if stacked else [None]:
        target = store if layer is None else store[layer]
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            value = source.read(layer, start, stop)
            if written is not None:  # one chunk is written while the next is read
                written.result()
            written = (target.T if kernel else target)[start:stop].write(value)
    if written is not None:
        written.result()


def reason(error: Exception) -> str:
    """One short line of what Orbax or TensorStore raised: TensorStore wraps what the system said in whole
    specifications and keeps only its number apart."""
    if system := re.search(r"\[os_error_code='(\d+)'\]", str(error)):
        return os.strerror(int(system[1]))
    text = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0][:160]
    return text or type(error).__name__
