"""What a model or adapter directory may hold, checked before transformers or PEFT is given its path.

The rule, its names and its limits are those of ``directory.json``, which both packages have. Headers are checked before
a tensor is touched. What cannot be computed with here (GGUF, quantised weights, an adapter in place of a model) is
named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from probes.errors import ProbeInputError
from probes.foreign import DIRECTORY, Fields, first_line, foreign_code, inside, parse_json, plain, read_json, some

SINGLE: str = DIRECTORY["weights"]["one"]
INDEX: str = DIRECTORY["weights"]["index"]
ADAPTER_CONFIG: str = DIRECTORY["adapter"]["config"]
ADAPTER_WEIGHTS: str = DIRECTORY["adapter"]["weights"]
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
PICKLES = tuple(DIRECTORY["pickles"])
MAX_HEADER_BYTES: int = DIRECTORY["bytes"]["a safetensors header"]  # of one file; 61 layers need about 100 kB
MAX_TENSORS: int = DIRECTORY["tensors"]  # over all files
# What may be downloaded of a Hub repository: nothing else is ever opened.
HUB_FILES = tuple(DIRECTORY["downloaded"])
# Dtypes as safetensors names them; others are those of quantised weights. PyTorch also computes in float64.
DTYPES = ("F64", *DIRECTORY["dtypes"])
_EXACT = (*DTYPES, "BOOL", "I64", "I32")  # beside the weights, some checkpoints hold masks and positions
# What transformers counts to, in making a configuration and a model of it.
_COUNT = re.compile(r"(^|_)(depth|layers?|blocks?|heads?|experts?|dense|repeats?)(_|$)")
_STACKED = re.compile(r"(^|_)(depth|layers?|blocks?|cycles?)$")  # how many there are, each with tensors of its own
_MAX_ID = 2**31 - 1
_FEW = 64  # of layers that share their weights
_TABLES = 512 << 20  # bytes


class Tensor(NamedTuple):
    """What a header says about one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of its elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


def locate(model: str | Path, files: tuple[str, ...] = HUB_FILES) -> Path:
    """The local directory of a model, or with ``ADAPTER_FILES`` of an adapter; a Hub id is downloaded first (``files``
    only), so that it is checked like any other.

    Raises:
        ProbeInputError: neither a directory nor an id that the Hub can serve.
    """
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        return path
    what = "adapter directory" if files is ADAPTER_FILES else "directory"
    if path.is_file() and _begins(path) == b"GGUF":
        raise ProbeInputError(f"{model}: a GGUF file (llama.cpp); {_ORIGINAL}")
    if path.exists() or path.is_symlink():
        needed = ADAPTER_CONFIG if files is ADAPTER_FILES else "config.json"
        raise ProbeInputError(f"{model}: is a file; give the directory that holds {needed}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(model)):
        raise ProbeInputError(f"{model}: no such {what}, nor is it a Hub id (ORG/NAME)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        with foreign_code(model, f"no such {what} here, and the Hub download failed"):
            return Path(snapshot_download(str(model), allow_patterns=list(files)))
    except ProbeInputError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            reason = "the Hub has no such repository, or shows it to others only (`hf auth login`)"
        elif isinstance(error.__cause__, LocalEntryNotFoundError):
            offline = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the Hub cannot be reached"
            reason = f"it is not in the Hub's cache either, and {offline}"
        else:
            raise
    raise ProbeInputError(f"{model}: no such {what} here, and {reason}")


def _begins(file: Path) -> bytes:
    with contextlib.suppress(OSError), file.open("rb") as opened:
        return opened.read(4)
    return b""


def check_model(directory: Path) -> dict[str, Tensor]:
    """Refuses a model directory that is not safe or not a plain model; gives the tensors of its headers by name.

    Raises:
        ProbeInputError: named, with what to do.
    """
    names = _names(directory)
    if ADAPTER_CONFIG in names:
        raise ProbeInputError(
            f"{directory}: is a PEFT adapter ({ADAPTER_CONFIG}); give its base as MODEL and this with --adapter"
        )
    if "config.json" not in names and any(name.endswith(".gguf") for name in names):
        raise ProbeInputError(f"{directory}: a GGUF directory (llama.cpp); {_ORIGINAL}")
    config = read_json(inside(directory, "config.json"))
    _refuse_quantised(directory, names, config)
    tensors = _tensors(directory, names)
    if codes := [name for name in tensors if _CODES.fullmatch(name)]:
        raise ProbeInputError(f"{directory}: a quantised checkpoint (tensor {plain(codes[0], 80)}); {_ORIGINAL}")
    _check_config(directory / "config.json", config, tensors)
    if "generation_config.json" in names:
        path = inside(directory, "generation_config.json")
        _check_ids(path, read_json(path))
    return tensors


def check_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The parsed ``adapter_config.json`` of a PEFT directory and the tensors of its header by name.

    Raises:
        ProbeInputError: files missing or outside, pickled weights, a damaged header.
    """
    names = _names(directory)
    if ADAPTER_CONFIG not in names:
        raise ProbeInputError(f"{directory}: no PEFT adapter: {ADAPTER_CONFIG} is missing")
    config = read_json(inside(directory, ADAPTER_CONFIG))
    if ADAPTER_WEIGHTS not in names:
        pickles = sorted(name for name in names if name.endswith(PICKLES))
        why = f"only pickles are there ({some(pickles)}), which could run code" if pickles else "it is missing"
        raise ProbeInputError(f"{directory / ADAPTER_WEIGHTS}: needed, but {why}; save the adapter as safetensors")
    return config, dict(_header(inside(directory, ADAPTER_WEIGHTS)))


_ORIGINAL = "gradients need the original weights; take the unquantised safetensors release"
# Ends of the names under which quantisation methods store codes and scales.
_CODES = re.compile(rf".*\.({'|'.join(DIRECTORY['codes'])}|quant_state\..*)")
_QUANTISERS = {"bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8",
               "compressed-tensors": "compressed-tensors", "mxfp4": "MXFP4"}  # fmt: skip


def _names(directory: Path) -> set[str]:
    try:
        return {path.name for path in directory.iterdir()}
    except OSError as error:
        raise ProbeInputError(f"{directory}: cannot read ({error.strerror or error})") from error


def _refuse_quantised(directory: Path, names: set[str], config: dict[str, Any]) -> None:
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]  # of a vision model: text_config
    found = [(key, part[key]) for part in parts for key in DIRECTORY["quantised"] if part.get(key)]
    key, stated = found[0] if found else ("", None)
    old = sorted(names & {"quantize_config.json", "quant_config.json"})
    if not stated and not old:
        return
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    if isinstance(stated, dict) and method is None and ("load_in_4bit" in stated or "load_in_8bit" in stated):
        method = "bitsandbytes"
    if method is None and key == "quantization":
        method = "MLX"
    name = _QUANTISERS.get(str(method).lower(), plain(method, 40)) if method else f"{old[0]} is there" if old else ""
    raise ProbeInputError(f"{directory}: a quantised checkpoint{f' ({name})' if name else ''}; {_ORIGINAL}")


def _tensors(directory: Path, names: set[str]) -> dict[str, Tensor]:
    """The tensors of the weight files, one by one as their index places them."""
    if SINGLE in names:
        return _once([inside(directory, SINGLE)])
    if INDEX not in names:
        if pickles := sorted(name for name in names if name.endswith(PICKLES)):
            raise ProbeInputError(
                f"{directory}: only pickled weights ({some(pickles)}); loading a pickle can run anything its author "
                "wrote, so only safetensors are read. Save the model again with safetensors"
            )
        if any(name.endswith(".gguf") for name in names):
            raise ProbeInputError(f"{directory}: a GGUF directory (llama.cpp); {_ORIGINAL}")
        raise ProbeInputError(f"{directory}: neither {SINGLE} nor {INDEX} found")
    path = inside(directory, INDEX)
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise ProbeInputError(f"{path}: weight_map must map tensor names to file names")
    if odd := [name for name in placed.values() if not name.endswith(".safetensors")]:
        raise ProbeInputError(f"{path}: {plain(odd[0], 80)} is no safetensors file; only those are read")
    found = _once([inside(directory, name) for name in sorted(set(placed.values()))])
    wrong = [name for name, file in placed.items() if name not in found or found[name].file.name != file]
    wrong += [name for name in found if name not in placed]
    if wrong:
        raise ProbeInputError(f"{path}: does not match its shards: {some(wrong)}")
    return found


def _once(files: list[Path]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _header(file):
            if name in found:
                raise ProbeInputError(f"{file}: {plain(name)} is also in {found[name].file.name}; once is right")
            found[name] = tensor
            if len(found) > MAX_TENSORS:
                raise ProbeInputError(f"{file}: more than {MAX_TENSORS} tensors are not those of a language model")
    if odd := sorted({tensor.dtype for tensor in found.values()} - set(_EXACT)):
        kind = "FP8" if odd[0].startswith("F8") else odd[0]
        raise ProbeInputError(f"{files[0].parent}: a quantised checkpoint ({kind} tensors); {_ORIGINAL}")
    return found


def _header(file: Path) -> Iterator[tuple[str, Tensor]]:
    """What a safetensors header names, read by us first: moderate size, each name once; then by the library itself."""
    from safetensors import safe_open

    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ProbeInputError(f"{file}: not a safetensors file of a language model (header of {length} bytes)")
            header = handle.read(length)
    except OSError as error:
        raise ProbeInputError(f"{file}: not a readable safetensors file ({first_line(error)})") from error
    parse_json(header, f"{file}: not a readable safetensors file; its header")
    with foreign_code(file, "not a readable safetensors file"), safe_open(file, framework="np") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        found = [(name, Tensor(file, one.get_dtype(), tuple(one.get_shape()))) for name, one in slices.items()]
    yield from found


def _check_config(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Refuses what would build something else, or something far larger, than the tensors of the directory."""
    # An extent costs a file nothing: one tensor of [150000, 1] would stand for as many layers, hours of work to build.
    stacked = max(len(tensors), _FEW)
    most = max(stacked, *(extent for tensor in tensors.values() for extent in tensor.shape))
    if config.get("transformers_weights") is not None:
        raise ProbeInputError(f"{path}: transformers_weights names other files; weights must be {SINGLE} or {INDEX}")
    stack = [config]
    while stack:
        part = stack.pop()
        fields = Fields(part, path)
        _check_ids(path, part)
        if part.get("attribute_map"):
            fields.refuse("attribute_map", "has transformers read any key as another; no model needs it in its file")
        if _repeated(part.get("attention_types")) > stacked:  # of GPT-Neo: how often each list of kinds is to follow
            fields.refuse("attention_types", f"stands for more than {stacked} layers")
        for key, value in part.items():
            if isinstance(value, int) and not isinstance(value, bool):
                bound = stacked if _STACKED.search(key) else most if _COUNT.search(key) else 2**53
                fields.integer(key, -_MAX_ID, bound)
            if "_implementation" in key and "/" in json.dumps(value):
                fields.refuse(key, "names code on the Hub, which is never run")
        stack += [value for value in part.values() if isinstance(value, dict)]


def _repeated(kinds: Any) -> int:
    """How many entries ``[[kinds, times], ...]`` stands for; what is none of this is for transformers to refuse."""
    pairs = [one for one in kinds if isinstance(one, list) and len(one) == 2] if isinstance(kinds, list) else []
    return sum(len(what) * times for what, times in pairs if isinstance(what, (list, str)) and isinstance(times, int))


def check_computed(directory: Path, config: Any) -> None:
    """Refuses a config that asks for a computation which transformers' class for it does not know and passes over.

    Args:
        config: as transformers reads it.
    Raises:
        ProbeInputError: the key is named.
    """
    where = directory / "config.json"
    raw = read_json(inside(directory, "config.json"))
    text = config.get_text_config()
    for part, own in (
        (raw, config),
        *([(raw["text_config"], text)] if isinstance(raw.get("text_config"), dict) else ()),
    ):
        known = {one.name for one in dataclasses.fields(own)} | set(own.attribute_map)
        layers = part.get("per_layer_config")
        odd = [
            key
            for layer in ({}, *(layers.values() if isinstance(layers, dict) else ()))
            if isinstance(layer, dict)
            for one in [{**part, **layer}]
            for key in (*(key for key in DIRECTORY["another_layer"] if one.get(key)), *_windows(one))
            if key not in known
        ]
        # Of such a model the cache, and nothing else, goes by the keys that begin with decoder_.
        if part.get("is_encoder_decoder") and not type(own).is_encoder_decoder:
            odd.append("is_encoder_decoder")
        if odd:
            Fields(part, where).refuse(odd[0], f"asks for a layer that a {own.model_type} model does not have")


def _windows(part: dict[str, Any]) -> Iterator[str]:
    """Keys by which attention would not reach all that stands before. The layers of a type that does not know them
    pass over them, but transformers' cache cuts keys off by them: an answer is then of another model than is scored."""
    positions = part.get("max_position_embeddings")
    for key in DIRECTORY["windows"]:
        window = part.get(key)
        if window is not None and not (isinstance(window, int) and isinstance(positions, int) and window >= positions):
            yield key
    kinds = part.get("layer_types") or ()
    if not isinstance(kinds, (list, tuple)) or {*map(str, kinds)} - {"full_attention"}:
        yield "layer_types"
    if not part.get("is_causal", True):
        yield "is_causal"


def _check_ids(path: Path, values: dict[str, Any]) -> None:
    """Token ids are numbers that a model can have."""
    fields = Fields(values, path)
    for key, value in values.items():
        if key.endswith("_token_id") and value is not None:
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, bool) or not isinstance(one, int) or not -1 <= one <= _MAX_ID:
                    fields.refuse(key, f"must be a token id (0 to {_MAX_ID})")


def check_size(directory: Path, model: Any, tensors: dict[str, Tensor]) -> None:
    """Refuses a config whose model is more than twice what its files hold (tied embeddings count twice), or whose
    tables of positions and masks, which no file holds, take more than the weights and half a GiB.

    Args:
        model: as the config describes it, on the meta device.
    Raises:
        ProbeInputError: the sizes in config.json are not those of the weights.
    """
    stored = sum(tensor.size for tensor in tensors.values())
    parameters = sum(weight.numel() for weight in model.parameters())
    computed = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    where = directory / "config.json"
    if parameters > 2 * stored + 1_000_000:
        raise ProbeInputError(f"{where}: describes a model of {parameters:,} parameters, the files hold {stored:,}")
    if computed > 4 * stored + _TABLES:
        raise ProbeInputError(
            f"{where}: describes a model with {computed >> 20:,} MiB of position tables and masks; are "
            "max_position_embeddings, n_positions and the like those of the weights?"
        )
