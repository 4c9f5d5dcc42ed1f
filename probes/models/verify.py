"""Does the exported model say what the trainer's own framework said? Reload it here and compare, through a file."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from probes.errors import ProbeError, ProbeInputError
from probes.foreign import first_line, foreign_code, read_bytes
from probes.models.directory import check_model
from probes.models.greedy import continued
from probes.models.load import load_model
from probes.models.tokenizer import load_tokenizer

# name -> (dimensions, kind of number)
_ARRAYS = {
    "tokens": (2, "i"),
    "lengths": (1, "i"),
    "logits": (3, "f"),
    "prompt_ids": (2, "i"),
    "prompt_lengths": (1, "i"),
    "greedy_ids": (2, "i"),
    "eos_ids": (1, "i"),
}
_BATCH_TOKENS = 4096
_MAX_BYTES = 8 << 30  # of the file
# What its arrays may take: they are written as they are, and whoever packs them saves little but their padding.
_FLOOR, _GROWTH = 16 << 20, 16  # bytes of any file, and for one of its bytes
# What numpy and zipfile raise for bytes that are none of theirs.
_DAMAGE = (OSError, ValueError, EOFError, LookupError, TypeError, SyntaxError, RuntimeError)


def read_reference(path: str | Path) -> dict[str, np.ndarray]:
    """Reads reference_logits.npz.

    Returns:
        ``tokens`` int ``[N, S]`` right-padded, ``lengths`` ``[N]``, ``logits`` float ``[N, S, V]``, ``prompt_ids``
        ``[M, P]`` right-padded, ``prompt_lengths`` ``[M]``, ``greedy_ids`` ``[M, G]`` padded with -1 (stop token
        included), ``eos_ids`` ``[E]``.
    Raises:
        ProbeInputError: the file cannot be read, or an array is missing or does not fit the others.
    """
    path = Path(path)
    arrays = _arrays(path, io.BytesIO(read_bytes(path, _MAX_BYTES)))
    for name, (dimensions, kind) in _ARRAYS.items():
        if name not in arrays:
            raise ProbeInputError(f"{path}: array {name!r} is missing; export it again")
        if arrays[name].ndim != dimensions or arrays[name].dtype.kind != kind:
            raise ProbeInputError(f"{path}: array {name!r} is {arrays[name].dtype}{list(arrays[name].shape)}")
    if not len(arrays["tokens"]):
        raise ProbeInputError(f"{path}: holds no text, so nothing would be compared; export it again")
    _fits(path, arrays, "lengths", "tokens")
    _fits(path, arrays, "prompt_lengths", "prompt_ids")
    if arrays["logits"].shape[:2] != arrays["tokens"].shape:
        raise ProbeInputError(
            f"{path}: logits {list(arrays['logits'].shape)} do not match tokens {list(arrays['tokens'].shape)}"
        )
    if len(arrays["greedy_ids"]) != len(arrays["prompt_ids"]):
        raise ProbeInputError(
            f"{path}: {len(arrays['greedy_ids'])} rows of greedy_ids for {len(arrays['prompt_ids'])} prompts"
        )
    if not all(np.isfinite(arrays["logits"][row, :length]).all() for row, length in enumerate(arrays["lengths"])):
        raise ProbeInputError(f"{path}: the reference logits hold NaN or infinity")
    return arrays


def _arrays(path: Path, file: io.BytesIO) -> dict[str, np.ndarray]:
    """The arrays of ``_ARRAYS`` that an archive holds. Shapes are read, and bounded, before anything is unpacked."""
    arrays: dict[str, np.ndarray] = {}
    left = _FLOOR + _GROWTH * file.getbuffer().nbytes
    try:
        with zipfile.ZipFile(file) as archive:
            for name in [name for name in _ARRAYS if f"{name}.npy" in archive.namelist()]:
                with archive.open(f"{name}.npy") as member:
                    version = np.lib.format.read_magic(member)
                    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
                    shape, _, dtype = (read or np.lib.format.read_array_header_2_0)(member)
                size = math.prod(shape) * dtype.itemsize
                left -= size
                if dtype.hasobject or size > archive.getinfo(f"{name}.npy").file_size:
                    raise ValueError(f"array {name} of {dtype}{list(shape)} is not in it")
                if left < 0:
                    raise ValueError(f"array {name} of {dtype}{list(shape)} is far larger than the file")
                with archive.open(f"{name}.npy") as member:
                    arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    except (*_DAMAGE, zlib.error, zipfile.BadZipFile) as error:
        raise ProbeInputError(f"{path}: cannot read as npz ({first_line(error)}); export it again") from error
    return arrays


def _fits(path: Path, arrays: dict[str, np.ndarray], lengths: str, rows: str) -> None:
    good = len(arrays[lengths]) == len(arrays[rows])
    if not good or (arrays[lengths] < 1).any() or (arrays[lengths] > arrays[rows].shape[1]).any():
        raise ProbeInputError(f"{path}: {lengths} does not fit {rows} {list(arrays[rows].shape)}")


def verify(model_dir: str | Path, adapter: str | Path | None, reference_npz: str | Path) -> dict[str, Any]:
    """Compares the reloaded model with the trainer's logits and greedy generations, in float32 on the CPU.

    Args:
        model_dir: exported Hugging Face directory (the base model if ``adapter`` is given).
        adapter: PEFT adapter (directory or Hub id), applied without merging, or None.
        reference_npz: see ``read_reference``.
    Returns:
        ``max_abs_logit_diff`` over the real positions, ``max_abs_logit`` of the reference (the scale to read it by),
        ``greedy_identical`` of ``greedy_total`` generations that agree in every id up to and with the stop token;
        ``greedy_gap``: where others first differ, by how much at most the reloaded model prefers its own token (a
        logit; 0.0 where none differs), so at most twice the difference of the logits if rounding alone parts them;
        ``missing_keys`` and ``unexpected_keys`` (empty: anything else raises).
    Raises:
        ProbeInputError: model, adapter or reference unusable, or of different vocabulary.
        ProbeError: the reloaded model gives NaN.
    """
    arrays = read_reference(reference_npz)
    model, keys = load_model(model_dir, adapter, "float32", merge=False)
    vocab = model.get_output_embeddings().weight.shape[0]
    if arrays["logits"].shape[2] != vocab:
        raise ProbeInputError(
            f"{reference_npz}: logits over {arrays['logits'].shape[2]} tokens, but {model_dir} has {vocab}"
        )
    real = {"greedy_ids": arrays["greedy_ids"] >= 0}
    for name, lengths in (("tokens", "lengths"), ("prompt_ids", "prompt_lengths")):
        real[name] = np.arange(arrays[name].shape[1]) < arrays[lengths][:, None]
    for name, there in real.items():
        if ((arrays[name] < 0) | (arrays[name] >= vocab))[there].any():
            raise ProbeInputError(f"{reference_npz}: {name} holds ids outside 0..{vocab - 1}")
    gaps = _greedy_gaps(model, arrays)
    return {
        "max_abs_logit_diff": _logit_difference(model, arrays),
        "max_abs_logit": max(
            (
                float(np.abs(row[:length]).max())
                for row, length in zip(arrays["logits"], arrays["lengths"], strict=True)
            ),
            default=0.0,
        ),
        "greedy_identical": gaps.count(None),
        "greedy_total": len(gaps),
        "greedy_gap": max((gap for gap in gaps if gap is not None), default=0.0),
        **keys,
    }


def reopen(model_dir: str | Path) -> dict[str, Any]:
    """Whether transformers takes a model directory as complete, told without reading a weight.

    The model is built on the meta device from the directory's own config, so a 9B model needs no memory for this; its
    tensors are then compared with the headers of the safetensors files by name and shape.

    Returns:
        ``tensors`` and ``parameters`` (counts), ``eos_token_id`` of the generation config (a list), ``tokenizer`` (its
        length, None when the directory has none).
    Raises:
        ProbeInputError: config, generation config, tokenizer or weights do not open or do not fit each other.
    """
    import torch
    import transformers

    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise ProbeInputError(f"{model_dir}: no such directory")
    stored = {name: tensor.shape for name, tensor in check_model(model_dir).items()}
    with foreign_code(model_dir, "transformers does not open it"):
        config = transformers.AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
        generation = transformers.GenerationConfig.from_pretrained(model_dir)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shared = {} if not config.tie_word_embeddings else dict.fromkeys(model.all_tied_weights_keys)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in shared}
    wrong = [name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name)]
    if wrong:
        raise ProbeInputError(
            f"{model_dir}: {len(wrong)} tensors do not fit the model that its config describes, e.g. {min(wrong)}"
        )
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    eos = generation.eos_token_id
    return {
        "tensors": len(stored),
        "parameters": sum(int(np.prod(shape)) for shape in stored.values()),
        "eos_token_id": [eos] if isinstance(eos, int) else list(eos or ()),
        "tokenizer": len(load_tokenizer(model_dir)) if any((model_dir / name).exists() for name in names) else None,
    }


def _logit_difference(model: Any, arrays: dict[str, np.ndarray]) -> float:
    import torch

    size = arrays["tokens"].shape[1]
    mask = np.arange(size) < arrays["lengths"][:, None]
    ids = np.where(mask, arrays["tokens"], 0)
    rows = max(1, _BATCH_TOKENS // max(size, 1))
    worst = 0.0
    for at in range(0, len(ids), rows):
        part = slice(at, at + rows)
        with torch.no_grad():
            logits = model(
                input_ids=torch.as_tensor(ids[part], dtype=torch.long),
                attention_mask=torch.as_tensor(mask[part].astype(np.int64)),
                use_cache=False,
            ).logits
        difference = np.abs(logits.float().numpy() - arrays["logits"][part].astype(np.float32))[mask[part]].max()
        if not np.isfinite(difference):
            raise ProbeError("the reloaded model gives NaN or infinite logits")
        worst = max(worst, float(difference))
    return worst


def _greedy_gaps(model: Any, arrays: dict[str, np.ndarray]) -> list[float | None]:
    """``_gap`` of every prompt. Many answer at a time, padded on the left."""
    import torch

    eos = [int(index) for index in arrays["eos_ids"]]
    prompts = [ids[:length] for ids, length in zip(arrays["prompt_ids"], arrays["prompt_lengths"], strict=True)]
    wanted = [ids[ids >= 0].tolist() for ids in arrays["greedy_ids"]]
    rows = max(1, _BATCH_TOKENS // max(arrays["prompt_ids"].shape[1] + arrays["greedy_ids"].shape[1], 1))
    gaps: list[float | None] = []
    for at in range(0, len(prompts), rows):
        asked, theirs = prompts[at : at + rows], wanted[at : at + rows]
        width, most = max(map(len, asked)), max(map(len, theirs))
        ids, mask = np.zeros((2, len(asked), width), np.int64)
        for row, prompt in enumerate(asked):
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
        output = torch.as_tensor(ids)
        if most:
            output = continued(model, output, torch.as_tensor(mask), most, eos, eos[0] if eos else 0)
        answers = [_ended(row[width:].tolist(), eos) for row in output]
        gaps += [_gap(model, *row) for row in zip(asked, answers, theirs, strict=True)]
    return gaps


def _ended(answer: list[int], eos: list[int]) -> list[int]:
    """The answer up to and with its stop token."""
    return answer[: next((at + 1 for at, token in enumerate(answer) if token in eos), len(answer))]


def _gap(model: Any, prompt: np.ndarray, mine: list[int], theirs: list[int]) -> float | None:
    """None where the answer, as far as ``theirs`` goes, is ``theirs``, the stop token included; else how much larger
    the logit of the token it chose is than that of ``theirs``, at the first place where they differ."""
    import torch

    mine = mine[: len(theirs)]
    if theirs and mine == theirs:
        return None
    at = next((at for at, (one, other) in enumerate(zip(mine, theirs, strict=False)) if one != other), len(mine))
    seen = torch.as_tensor([[*prompt.tolist(), *theirs[:at]]], dtype=torch.long)
    with torch.no_grad():
        logits = model(input_ids=seen, use_cache=False).logits[0, -1].float()
    if at == len(mine):  # it has ended, theirs has not: that is no matter of logits
        return float(logits.max() - logits.min())
    return max(0.0, float(logits[mine[at]] - logits[theirs[at]]))
