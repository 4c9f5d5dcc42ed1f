"""GGUF files, in which small models travel: a strict reader of the header, and tensors as float32, some rows at a time.

The file comes from a stranger. Counts and lengths are checked against the file's size before anything is allocated, so
that a header of a few bytes cannot ask for all memory; nothing outside the declared tensors is read; and a tensor that
reaches beyond the end of the file is found before any work is done. How blocks of weights are unpacked is the business
of the ``gguf`` package (llama.cpp's own); it gets bytes of a length that was checked.
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mentalglm_jax.errors import InputError, install
from mentalglm_jax.foreign import first_line, open_file, short

MAX_HEADER_BYTES = 96 << 20  # vocabularies of 260,000 tokens with their merges have 15 MB
MAX_ENTRIES = 10_000  # of metadata
MAX_ELEMENTS = 4_000_000  # in all lists of the metadata together
MAX_TENSORS = 20_000
MAX_TEXT = 4 << 20  # bytes of one text; a chat template has some thousand
MAX_NAME = 256
# The value kinds of the format, by their number: numpy's letter for those of a fixed size.
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _TEXT, _LIST = 7, 8, 9
_HINT = "download it again"


class GgufTensor(NamedTuple):
    """One tensor: ``shape`` as numpy has it, outermost first; ``offset`` from the beginning of the file."""

    shape: tuple[int, ...]
    kind: Any
    offset: int
    row_bytes: int


class GgufFile:
    """An opened GGUF file.

    Attributes:
        path: of the file.
        metadata: key to value: numbers, texts, truth values, and lists of one of them (numbers as arrays).
        tensors: name to what the header says.

    Raises:
        InputError: not a GGUF file of version 2 or 3 in little-endian order, damaged, cut short, or a quantisation
            that cannot be unpacked; or the [gguf] extra is not installed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._gguf = _package()
        try:
            with open_file(path) as file:
                size = path.stat().st_size
                read = _Header(path, file, size)
                self.metadata = read.metadata()
                self.tensors = self._placed(read.tensors(), read.position, size)
        except OSError as error:
            raise InputError(f"{path}: cannot read ({error.strerror or error})") from None

    def _placed(self, found: Mapping[str, tuple[tuple[int, ...], int, int]], end: int, size: int) -> dict[
        str, GgufTensor
    ]:  # fmt: skip
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment % 8:
            raise InputError(f"{self.path}: general.alignment must be a multiple of 8, got {short(alignment)}")
        start = -(-end // alignment) * alignment
        tensors = {}
        for name, (shape, number, offset) in found.items():
            kind, row_bytes = self._kind(name, number, shape[-1])
            last = start + offset + math.prod(shape[:-1]) * row_bytes
            if offset % alignment or last > size:
                what = f"ends at byte {last}, the file at {size}" if last > size else f"begins at {offset}"
                raise InputError(f"{self.path}: tensor {name} {what}; the file is cut short or damaged, {_HINT}")
            tensors[name] = GgufTensor(shape, kind, start + offset, row_bytes)
        end = 0
        for name, one in sorted(tensors.items(), key=lambda item: item[1].offset):
            if one.offset < end:  # a small file would stand for any number of large tensors
                raise InputError(f"{self.path}: tensor {name} shares its bytes with another; {_HINT}")
            end = one.offset + math.prod(one.shape[:-1]) * one.row_bytes
        return tensors

    def _kind(self, name: str, number: int, width: int) -> tuple[Any, int]:
        """The quantisation and the bytes of a row of ``width`` weights."""
        kind: Any = number
        try:
            kind = self._gguf.GGMLQuantizationType(number)
            block, nbytes = self._gguf.GGML_QUANT_SIZES[kind]
            self._gguf.quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError):
            raise InputError(
                f"{self.path}: tensor {name} is of the kind {getattr(kind, 'name', kind)}, which the gguf package "
                "cannot unpack; take a file of F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 or a K kind such as Q4_K_M"
            ) from None
        if width % block:
            raise InputError(f"{self.path}: tensor {name} has rows of {width}, which {kind.name} cannot hold; {_HINT}")
        return kind, width // block * nbytes

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The rows ``start:stop`` (along the first axis) of a tensor of one or two axes, as float32.

        A tensor of one axis counts as rows of one number.

        Raises:
            InputError: the file changed since it was opened, or holds NaN or infinity here.
        """
        tensor = self.tensors[name]
        if len(tensor.shape) == 1:
            return self._read(name, tensor, 0, 1).reshape(-1)[start:stop]
        return self._read(name, tensor, start, stop)

    def _read(self, name: str, tensor: GgufTensor, start: int, stop: int) -> np.ndarray:
        wanted = (stop - start) * tensor.row_bytes
        try:
            with open_file(self.path) as file:
                file.seek(tensor.offset + start * tensor.row_bytes)
                data = file.read(wanted)
        except OSError as error:
            raise InputError(f"{self.path}: cannot read tensor {name} ({error.strerror or error})") from None
        if len(data) != wanted:
            raise InputError(f"{self.path}: became shorter while it was read; {_HINT}")
        packed = np.frombuffer(data, np.uint8).reshape(stop - start, tensor.row_bytes)
        with np.errstate(all="ignore"):  # a scale that is no number is found below
            values = self._gguf.quants.dequantize(packed, tensor.kind)
        values = np.asarray(values, np.float32).reshape(stop - start, tensor.shape[-1])
        if not np.isfinite(values).all():
            raise InputError(f"{self.path}: NaN or infinity in tensor {name}; {_HINT}")
        return values


def _package() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise InputError(
            f"GGUF files are unpacked by the gguf package, which is not installed: {install('gguf')}"
        ) from error
    return gguf


class _Header:
    """The header, read once from its beginning."""

    def __init__(self, path: Path, file: Any, size: int):
        self._path, self._file, self._most = path, file, min(size, MAX_HEADER_BYTES)
        self._short = size <= MAX_HEADER_BYTES
        self.position, self._elements = 0, 0
        if self._take(4) != b"GGUF":
            raise self.wrong("it does not begin with GGUF")
        version = self._number("<u4")
        if version and version & 0xFFFF == 0:
            raise self.wrong("big-endian byte order, which is not supported", "take the little-endian file")
        if version not in (2, 3):
            raise self.wrong(f"version {version}, known are 2 and 3", "convert the model with a newer llama.cpp")
        self._declared = self._count("tensors", MAX_TENSORS)
        self._entries = self._count("metadata entries", MAX_ENTRIES)

    def wrong(self, what: str, hint: str = _HINT) -> InputError:
        return InputError(f"{self._path}: not a readable GGUF file ({what}); {hint}")

    def metadata(self) -> dict[str, Any]:
        """Every entry."""
        found: dict[str, Any] = {}
        for _ in range(self._entries):
            key = self._text(MAX_NAME)
            if key in found:
                raise self.wrong(f"the key {short(key)} stands more than once")
            found[key] = self._value(self._number("<u4"), key)
        return found

    def tensors(self) -> dict[str, tuple[tuple[int, ...], int, int]]:
        """Name to shape, number of the kind, offset."""
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(self._declared):
            name = self._text(MAX_NAME)
            axes = self._number("<u4")
            if name in found or not 1 <= axes <= 4:
                raise self.wrong(f"tensor {short(name)} " + ("twice" if name in found else f"with {axes} axes"))
            shape = tuple(self._number("<u8") for _ in range(axes))
            if min(shape) < 1 or math.prod(shape) > 1 << 48:
                raise self.wrong(f"tensor {short(name)} of shape {shape}")
            found[name] = (shape[::-1], self._number("<u4"), self._number("<u8"))
        return found

    def _take(self, count: int) -> bytes:
        """The next bytes. Checked before they are read: a length may say anything."""
        if count > self._most - self.position:
            if self._short:
                raise self.wrong(f"its header ends beyond byte {self._most}, where the file ends")
            raise self.wrong(f"a header of more than {self._most} bytes")
        self.position += count
        data = self._file.read(count)
        if len(data) != count:
            raise self.wrong("it became shorter while it was read")
        return data

    def _number(self, letter: str) -> Any:
        kind = np.dtype(letter)
        return np.frombuffer(self._take(kind.itemsize), kind)[0].item()

    def _count(self, what: str, most: int) -> int:
        (count,) = struct.unpack("<Q", self._take(8))
        if count > most:
            raise self.wrong(f"{count} {what}, at most {most} make sense")
        return count

    def _text(self, most: int = MAX_TEXT) -> str:
        data = self._take(self._count("bytes of text", most))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"text that is not UTF-8 before byte {self.position}") from None

    def _value(self, kind: int, key: str) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _BOOL:
            return self._take(1) != b"\0"
        if kind == _TEXT:
            return self._text()
        if kind != _LIST:
            raise self.wrong(f"{short(key)} has a value of the unknown kind {kind}")
        inner = self._number("<u4")
        count = self._count(f"elements of {short(key)}", MAX_ELEMENTS - self._elements)
        self._elements += count
        if inner in _NUMBERS or inner == _BOOL:
            letter = np.dtype(_NUMBERS.get(inner, "u1"))
            return np.frombuffer(self._take(count * letter.itemsize), letter)
        if inner != _TEXT:
            raise self.wrong(f"{short(key)} is a list of the unknown kind {inner}")
        return [self._text() for _ in range(count)]


def is_gguf(path: Path) -> bool:
    """Whether ``path`` is a file, not a directory, and says that it is GGUF."""
    if not path.is_file():
        return False
    try:
        with open_file(path) as file:
            return path.suffix.lower() == ".gguf" or file.read(4) == b"GGUF"
    except OSError as error:
        raise InputError(f"{path}: cannot read ({first_line(error)})") from None
