"""Checkpoint directories in the Hugging Face form: config.json, safetensors shards, their index.

What is read here comes from strangers. Nothing is unpickled, no code in the directory is run, no file outside it is
opened, and headers are checked before any tensor is touched. Reading and writing go tensor by tensor, slice by slice;
which tensor means what is told by ``weights.py``.
"""

import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from mentalglm_jax.errors import InputError
from mentalglm_jax.files import write_json
from mentalglm_jax.foreign import (
    DIRECTORY,
    at_home,
    first_line,
    inside,
    open_file,
    parse_json,
    read_bytes,
    read_json,
    some,
    there,
)
from mentalglm_jax.model.published import refuse_quantised
from mentalglm_jax.text.task_files import TASKS_FILE

_DTYPES = {"F32": np.float32, "BF16": jnp.bfloat16, "F16": np.float16}
DTYPES: dict[str, np.dtype] = {name: np.dtype(_DTYPES[name]) for name in DIRECTORY["dtypes"]}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX: str = DIRECTORY["weights"]["index"]
SINGLE: str = DIRECTORY["weights"]["one"]
TOKENIZER_FILES = (*DIRECTORY["tokenizer"], "chat_template.jinja")
VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
MAX_HEADER_BYTES: int = DIRECTORY["bytes"]["a safetensors header"]  # 40 layers need about 50 kB
MAX_TENSORS: int = DIRECTORY["tensors"]  # over all shards; 61 layers have about 900
PICKLES = tuple(DIRECTORY["pickles"])


class TensorInfo(NamedTuple):
    """What a header says about one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class ModelFiles:
    """A checkpoint directory, whatever its format: its parsed ``config.json`` and what it holds, by name."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]


class TensorFiles:
    """Some safetensors files read as one: names, shapes, and slices on demand.

    Raises:
        InputError: a file is missing, truncated or malformed, or a name occurs twice.
    """

    def __init__(self, files: Sequence[Path]):
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        entries = 0
        for file in files:
            entries += _check_header(file)
            if entries > MAX_TENSORS:
                raise InputError(
                    f"{file}: more than {MAX_TENSORS} tensors are not those of a language model's checkpoint"
                )
        for file in files:
            try:
                with safe_open(file, framework="np") as handle:
                    self.metadata |= handle.metadata() or {}
                    parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
                    found = {name: TensorInfo(file, p.get_dtype(), tuple(p.get_shape())) for name, p in parts.items()}
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{file}: not a readable safetensors file ({first_line(error)}); download it again"
                ) from error
            if twice := sorted(found.keys() & self.tensors.keys()):
                raise InputError(f"{file}: {twice[0]} is also in {self.tensors[twice[0]].file.name}; once is right")
            self.tensors |= found

    def read(self, name: str, *index: slice) -> np.ndarray:
        """The slice ``index`` of tensor ``name`` (all of it without ``index``), copied out of the file.

        Raises:
            InputError: the file changed or broke since it was opened.
        """
        info = self.tensors[name]
        index = index or (slice(None),) * max(len(info.shape), 1)
        try:
            with safe_open(
                info.file, framework="np"
            ) as handle:  # closed again, or the pages read so far stay in memory
                return handle.get_slice(name)[index]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{info.file}: cannot read tensor {name} ({first_line(error)})") from error


class Checkpoint(TensorFiles, ModelFiles):
    """A model directory: its parsed ``config.json`` and its tensors.

    Raises:
        InputError: no config, no safetensors (pickles are refused), an index that disagrees with its shards or points
            outside the directory, or any fault of ``TensorFiles``.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        packed = sorted(path.name for path in directory.iterdir() if path.suffix == ".gguf")
        if packed and not any(there(directory / name) for name in (SINGLE, INDEX)):
            raise InputError(
                f"{directory}: holds a GGUF ({some(packed)}), not safetensors; `mentalglm convert "
                f"{directory / packed[0]} DIRECTORY` makes a directory of it"
            )
        self.config: dict[str, Any] = read_json(directory / "config.json")
        try:
            refuse_quantised(self.config)
        except InputError as error:
            raise InputError(f"{directory}: {error}") from None
        index_path = directory / INDEX
        if there(directory / SINGLE):
            super().__init__([inside(directory, SINGLE)])
        elif there(index_path):
            placed = read_json(index_path).get("weight_map")
            if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
                raise InputError(f"{index_path}: weight_map must map tensor names to file names")
            shards = {name: inside(directory, name) for name in sorted(set(placed.values()))}
            super().__init__(list(shards.values()))
            wrong = [
                f"{name} is {'in ' + self.tensors[name].file.name if name in self.tensors else 'missing'}"
                for name, file in placed.items()
                if name not in self.tensors or self.tensors[name].file != shards[file]
            ] + [f"{name} is not listed" for name in self.tensors if name not in placed]
            if wrong:
                raise InputError(f"{index_path}: does not match its shards: {some(wrong)}")
        else:
            pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
            if pickles:
                raise InputError(
                    f"{directory}: only pickled weights ({some(pickles)}); loading a pickle can run anything its "
                    "author wrote, so only safetensors are read. Re-save the model with safetensors and try again"
                )
            raise InputError(f"{directory}: neither {SINGLE} nor {INDEX} found")


CALIBRATION = "calibration.json"  # how the label probabilities of these weights become ones to believe
MODEL_FILES = (*DIRECTORY["downloaded"], TASKS_FILE, "README.md")
ADAPTER_FILES = (DIRECTORY["adapter"]["config"], DIRECTORY["adapter"]["weights"], TASKS_FILE, CALIBRATION,
                 "README.md")  # fmt: skip


def locate(path_or_hub_id: str | Path, files: Sequence[str] = MODEL_FILES) -> Path:
    """The local directory of a model, or with ``ADAPTER_FILES`` of an adapter; a Hub snapshot is downloaded, of it no
    more than ``files``.

    Raises:
        InputError: neither a directory nor an id the Hub can serve.
    """
    path = at_home(path_or_hub_id)
    if path.is_dir():
        return path
    what = "adapter directory" if files is ADAPTER_FILES else "directory"
    if path.exists():
        needed = files[0] if files is ADAPTER_FILES else "config.json"
        gguf = "" if files is ADAPTER_FILES else " (a GGUF file: `mentalglm convert FILE DIR` first)"
        raise InputError(f"{path}: is a file; give the directory that holds {needed}{gguf}")
    hub_id = str(path_or_hub_id)
    if not is_hub_id(hub_id):
        raise InputError(f"{path}: no such {what}, nor is it a Hub id (ORG/NAME)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))
    except RepositoryNotFoundError:
        reason = "the Hub has no such repository, or shows it to others only (`hf auth login`)"
    except LocalEntryNotFoundError:
        offline = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the Hub cannot be reached"
        reason = f"it is not in the Hub's cache either, and {offline}"
    except Exception as error:  # the client and its transport raise many unrelated types
        reason = f"the Hub download failed: {first_line(error)}"
    raise InputError(f"{hub_id}: no such {what} here, and {reason}")


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form ORG/NAME and is no directory here."""
    return names_repository(name) and not Path(name).exists()


def names_repository(name: str) -> bool:
    """Whether ``name`` has the form ORG/NAME, whatever lies here under that name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII) is not None


class TensorSource(NamedTuple):
    """A tensor to be written; ``blocks`` is called once, when its turn comes, and gives its rows, first to last;
    a block must not change once it was given."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize


def write_safetensors(path: Path, tensors: Sequence[TensorSource], metadata: dict[str, str] | None = None) -> None:
    """Writes one safetensors file, holding two blocks of tensors at a time. Metadata always says ``format: pt``, which
    transformers asks for."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]
        }  # fmt: skip
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    # One block is written while the next is read or computed: each is about half of the work.
    with path.open("wb") as file, ThreadPoolExecutor(1) as writer:
        written = writer.submit(file.write, struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            rows = 0
            for block in tensor.blocks():
                if block.shape[1:] != tensor.shape[1:] or DTYPE_NAMES.get(block.dtype) != tensor.dtype:
                    raise AssertionError(f"{tensor.name}: {block.dtype}{block.shape} in {tensor.dtype}{tensor.shape}")
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                written.result()
                written = writer.submit(file.write, data)
                rows += len(block)
            if rows != tensor.shape[0]:
                raise AssertionError(f"{tensor.name}: {rows} rows of {tensor.shape[0]}")
        written.result()
        file.flush()
        os.fsync(file.fileno())


def write_shards(directory: Path, tensors: Iterable[TensorSource], max_shard_bytes: int) -> None:
    """Writes ``model.safetensors``, or numbered shards with an index if one file would exceed ``max_shard_bytes``."""
    shards: list[list[TensorSource]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    if len(shards) == 1:
        write_safetensors(directory / SINGLE, shards[0])
        return
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / name, shard)
        placed |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def check_vocabulary(source: Path) -> None:
    """Raises: InputError: the tokenizer in ``source`` keeps its vocabulary in files that are not read."""
    others = [name for name in VOCABULARIES if there(source / name)]
    if others and not any(there(source / name) for name in ("tokenizer.json", "tokenizer.model")):
        raise InputError(f"{source}: its vocabulary is in {some(others)}, and there is no tokenizer.json; have "
                         "transformers write one: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)")  # fmt: skip


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer files that exist, without references to remote code.

    Raises:
        InputError: ``source`` holds no tokenizer, or a file in it leads outside.
    """
    names = [name for name in TOKENIZER_FILES if there(source / name)]
    if not names:
        raise InputError(f"{source}: no tokenizer files found ({some(TOKENIZER_FILES[:3])})")
    check_vocabulary(source)
    for name in names:
        data = read_bytes(inside(source, name))
        if name != "tokenizer_config.json":
            (target / name).write_bytes(data)
            continue
        config = read_json(source / name)
        # A stale auto_map makes transformers ask for the old repository's Python code.
        if config.pop("auto_map", None) is not None:
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(target / name, config)


def _check_header(file: Path) -> int:
    """The number of entries of a header, which must be JSON of moderate size that names each tensor once."""

    try:
        with open_file(file) as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise InputError(f"{file}: a header of {length} bytes is not that of a language model's checkpoint")
            what = f"{file}: not a readable safetensors file; its header"
            header = parse_json(handle.read(length), what, "download it again")
    except OSError as error:
        raise InputError(f"{file}: not a readable safetensors file ({first_line(error)}); download it again") from error
    if not isinstance(header, dict):
        raise InputError(f"{file}: not a readable safetensors file (its header is no object); download it again")
    return len(header)
