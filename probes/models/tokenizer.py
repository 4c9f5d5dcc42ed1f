"""Opening a tokenizer directory: checked copies of its files go to transformers, which never sees the directory.

What a file may ask for beside its vocabulary is switched off or refused: ``truncation`` and ``padding`` (transformers
writes them into tokenizer.json after one ordinary call; every post would be cut or filled up without a word), random
merges, patterns that can run for ever, tables that make the library panic, code of a repository.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from probes.errors import ProbeError, ProbeInputError, ProbeWarning
from probes.foreign import first_line, foreign_code, inside, parse_json, plain, read_bytes
from probes.models.patterns import MAX_PATTERNS, backtracks, patterns_in

# What transformers builds a tokenizer from. No chat template: prompts come as token ids.
_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json",
         "vocab.json")  # fmt: skip
_OTHER = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "merges.txt", "vocab.txt")
_VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", *(name for name in _OTHER if name.endswith(".model"))}
# Of tokenizer_config.json: code of a repository, and what names other files (a vocabulary may be one).
_DROPPED = re.compile(r"auto_map|chat_template|name_or_path|custom_pipelines|.*_files?|vocab|merges|\w+_kwargs"
                      r"|tokenizer_object|__slow_tokenizer|post_processor")  # fmt: skip
_SHORT, _LONGEST = 2000, 60  # characters whose time the form of the patterns bounds; seconds for a longer text
_MAX_GROWTH = 1000  # how often a chain of Replace rules may multiply the length of a text


def load_tokenizer(model_dir: str | Path) -> Any:
    """The model directory's fast tokenizer; whatever it is given, it reads whole.

    Warns:
        ProbeWarning: truncation, padding or dropout was switched on in tokenizer.json; here it is off.
    Raises:
        ProbeInputError: there is none, it needs remote code, or its files are damaged or unsafe (named).
        ProbeError: no room for a checked copy of them in the directory for temporary files.
    """
    import transformers

    directory = Path(model_dir)
    found = [name for name in (*_JSON, *_OTHER) if (directory / name).exists() or (directory / name).is_symlink()]
    if not set(found) & _VOCABULARIES:  # the library would make one without a word in it
        raise ProbeInputError(f"{model_dir}: no usable tokenizer (no tokenizer.json); save one beside the model")
    with tempfile.TemporaryDirectory(prefix="probes-tokenizer-") as staged:
        for name in found:
            data = read_bytes(inside(directory, name))
            if name in _JSON:
                data = json.dumps(_checked(directory / name, data)).encode()
            try:
                (Path(staged) / name).write_bytes(data)
            except OSError as error:
                raise ProbeError(f"{staged}: cannot write ({error.strerror or error})") from error
        with foreign_code(model_dir, "no usable tokenizer"):
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(staged, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ProbeInputError(f"{model_dir}: only a slow tokenizer; save a tokenizer.json beside the model")
    tokenizer.name_or_path = str(model_dir)
    with foreign_code(model_dir, "no usable tokenizer"):
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        tokenizer("a b", add_special_tokens=False)
    return tokenizer


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text as it is, without special tokens.

    Raises:
        ProbeInputError: the tokenizer gives up, or is not done after ``_LONGEST`` seconds. (The library cannot be
            interrupted, but it works without Python's lock; its thread ends with the process.)
    """
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        except BaseException as error:  # a pattern may give up, which is a panic and no Exception
            found.append(error)

    if len(text) <= _SHORT:
        work()
    else:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(_LONGEST)
    if not found:
        raise ProbeInputError(
            f"the tokenizer: needs more than {_LONGEST} s for a text of {len(text)} characters; take the tokenizer of "
            "the original release, whose patterns have no trap"
        )
    if isinstance(found[0], BaseException):
        with foreign_code("the tokenizer", "cannot encode a text"):
            raise found[0]
    return found[0]


def tokenizer_digest(tokenizer: Any) -> str:
    """16 hex digits over all by which a fast tokenizer cuts a text, and what it puts before one."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    with foreign_code("tokenizer", "cannot tell its rules"):
        rules = {} if core is None else json.loads(core.to_str())
        opened = list(tokenizer("a")["input_ids"])
    # Cutting and padding are what a call asks for, and what the last call asked for stays there.
    text = json.dumps([rules | {"truncation": None, "padding": None}, opened])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def normalisers(core: Any) -> list[str]:
    """The names of the rules of a ``tokenizers.Tokenizer`` that change a text beyond its spaces."""
    with foreign_code("tokenizer", "cannot tell its normalizer"):
        rule = json.loads(core.to_str()).get("normalizer")
    rules = rule.get("normalizers", [rule]) if rule else []
    harmless = ("Prepend", "Replace")  # SentencePiece's marker for a space
    return [str(one.get("type")) for one in rules if one.get("type") not in harmless]


def _checked(path: Path, data: bytes) -> dict[str, Any]:
    value = parse_json(data, path)
    if not isinstance(value, dict):
        raise ProbeInputError(f"{path}: a JSON {type(value).__name__}, not an object")
    if path.name == "tokenizer.json":
        return _tokenizer_json(path, value)
    if path.name in ("tokenizer_config.json", "config.json"):
        names = value.get("fast_tokenizer_files") or []
        if others := [name for name in (names if isinstance(names, list) else [names]) if name != "tokenizer.json"]:
            said = "which some programs would read in place of tokenizer.json; delete that key"
            raise ProbeInputError(f"{path}: fast_tokenizer_files names {plain(repr(others[0]), 80)}, {said}")
        return {key: one for key, one in value.items() if not _DROPPED.fullmatch(key)}
    return value


def _tokenizer_json(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Raises, warns, and gives back what may be opened."""
    patterns = list(patterns_in(value))
    if len(patterns) > MAX_PATTERNS:
        raise ProbeInputError(f"{path}: {len(patterns)} patterns are not those of a tokenizer; download it again")
    for pattern in patterns:
        if why := backtracks(pattern):
            raise ProbeInputError(
                f"{path}: its pattern {plain(repr(pattern), 80)} can run for ever: {why}; take the tokenizer of the "
                "original release"
            )
    growth = math.prod(max(1, len(text)) for text in _replacements(value.get("normalizer")))
    if growth > _MAX_GROWTH:
        raise ProbeInputError(f"{path}: its Replace rules can make a text {growth:.1g} times as long")
    for table in _charsmaps(value):
        if why := _damaged_charsmap(table):
            raise ProbeInputError(f"{path}: its precompiled_charsmap is damaged ({why}); download it again")
    was = []
    if (cut := value.get("truncation")) is not None:
        length = cut.get("max_length") if isinstance(cut, dict) else None
        was.append(f"truncation to {plain(length, 20)} tokens")
    if value.get("padding") is not None:
        was.append("padding")
    model = value.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        was.append("dropout of merges")
        value["model"] = model | {"dropout": None}
    if was:
        said = f"{path}: {' and '.join(was)} switched on in the file; off here, every text is read whole"
        warnings.warn(said, ProbeWarning, stacklevel=2)
    return value | {"truncation": None, "padding": None}


def _replacements(rule: Any) -> list[str]:
    if not isinstance(rule, dict):
        return []
    if isinstance(rule.get("normalizers"), list):
        return [text for one in rule["normalizers"] for text in _replacements(one)]
    return [text for key in ("content", "prepend") if isinstance(text := rule.get(key), str)]


def _charsmaps(value: Any) -> list[str]:
    stack, found = [value.get("normalizer")], []
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if isinstance(node.get("precompiled_charsmap"), str):
                found.append(node["precompiled_charsmap"])
            stack += [one for one in node.values() if isinstance(one, (dict, list))]
        elif isinstance(node, list):
            stack += node
    return found


def _damaged_charsmap(text: str) -> str | None:
    """What is wrong with SentencePiece's table of replacements; the library trusts it and panics.

    Four bytes say how long the double-array trie is (little-endian, uint32 units), the rest are the replacements, each
    ended by a zero byte. A unit without bit 31 leads from place i to i ^ offset ^ byte; bit 8 says that i ^ offset
    holds a value, which is the place of a replacement (Darts-clone's layout).
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        return first_line(error)
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 or size % 4 or size == 0 or 4 + size > len(data):
        return f"{len(data)} bytes with a trie of {size}"
    units = np.frombuffer(data[4 : 4 + size], "<u4").astype(np.int64)
    replaced = data[4 + size :]
    try:
        replaced.decode("utf-8")
    except UnicodeDecodeError:
        return "replacements that are not UTF-8"
    places = np.arange(len(units)) ^ ((units >> 10) << ((units & (1 << 9)) >> 6))
    inner = units < 1 << 31
    if (places[inner] | 0xFF).max(initial=0) >= len(units):
        return "a trie that leads outside itself"
    values = units[places[inner & (units >> 8 & 1 == 1)]] & 0x7FFFFFFF
    begins = np.array([*((np.frombuffer(replaced, np.uint8) & 0xC0) != 0x80), True])
    if values.max(initial=0) > len(replaced) or not begins[np.minimum(values, len(replaced))].all():
        return "a replacement outside its list"
    return None
