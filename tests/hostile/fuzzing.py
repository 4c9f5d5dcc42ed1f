"""Random damage to the files of strangers, thousands of inputs a second: how a file is damaged, and who judges.

An input is made from its number alone, so a fault is made again with that number. ``FUZZ_EXAMPLES`` is how many inputs
each reader gets: 60 unless it is set; the slow tests take 100,000. ``FUZZ_LOG`` names a file that gets one line of
JSON for each reader; ``FUZZ_SECONDS`` ends a reader after so many seconds of processor time, whatever it has reached.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import signal
import struct
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
AT_LENGTH = 100_000
MOST_SECONDS, MOST_KIB, MOST_CHARACTERS = 5.0, 2 << 20, 100_000  # of one input: time, memory, what is said
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**40, 1.5, 1e39, -1e-60, "", "a", "NaN", "x" * 3000,
    "\x1b[31m\n", "\ud800", "\u202e", "-0", "=1+1", "<|user|>", "{}", "{0.__class__}", "(a+)+$", "(?i)", "../x", "/etc",
    "\0", "__proto__", [], [1], [[]], {}, {"a": 1}, {"type": "yarn", "factor": 2}, [None], ["x"] * 300,
)  # fmt: skip
RAW = (
    b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b'"\\ud800"', b"[" * 2000, b'{"a":' * 60, b"{", b"}", b"]", b",", b'"',
    b"\xff", b"\xef\xbb\xbf", b"\0", b"&a [*a]", b"!!python/name:os", b"\n", b"\r", b"- " * 50, b"? ", b"<<: ", b": ",
    b"\\u0000", b"\xe2\x80\xa8", b"# ", b"{% for i in x %}", b"{{ x }}", b"%", b"'", b"\t",
)  # fmt: skip
_MARK = '"@raw@"'


class Mutator(NamedTuple):
    """What a file says that is sound, and how damaged ones are made."""

    sound: bytes
    damaged: Callable[[random.Random], bytes]


class Reader(NamedTuple):
    """How inputs are made, and what reads one."""

    mutator: Mutator
    read: Callable[[bytes], object]


class Readers(dict[str, Callable[[Path], Reader]]):
    """By name a function that makes a reader, with what it needs, in an empty directory."""

    def reads(self, name: str) -> Callable[[Callable[[Path], Reader]], Callable[[Path], Reader]]:
        """Enters such a function."""
        return lambda made: self.setdefault(name, made)


@dataclasses.dataclass
class Found:
    """What came of a reader: inputs, how many of them were read and refused, processor seconds, the slowest input with
    its seconds, and each kind of fault with the first input that has it."""

    reader: str
    inputs: int = 0
    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: int = 0
    slowest_seconds: float = 0.0
    faults: dict[str, str] = dataclasses.field(default_factory=dict)


# --- damage ---


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value, at most 50 of a list and six levels deep."""
    if at:
        yield at
    children = value.items() if isinstance(value, dict) else enumerate(value[:50]) if isinstance(value, list) else ()
    for key, child in children:
        if len(at) < 6:
            yield from places(child, (*at, key))


def _changed(value: Any, at: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy of ``value``, sharing what is not on the way, in which ``change`` was called with the parent of ``at``."""
    copy = value.copy()
    if len(at) == 1:
        change(copy, at[0])
    else:
        copy[at[0]] = _changed(copy[at[0]], at[1:], change)
    return copy


def in_values(*sound: Any) -> Mutator:
    """JSON texts of which one to three values are changed, removed, doubled, exchanged or no JSON; some are damaged as
    bytes, too."""
    known = [(value, list(places(value)), json.dumps(value).encode()) for value in sound]

    def damaged(draw: random.Random) -> bytes:
        value, found, text = known[draw.randrange(len(known))]
        raw = None
        if found and draw.random() < 0.75:
            for _ in range(draw.randint(1, 3)):
                kind, at = draw.randrange(8), draw.choice(found)

                def change(node: Any, key: Any, kind: int = kind, value: Any = value) -> None:
                    nonlocal raw
                    if kind == 0:
                        del node[key]
                    elif kind == 1 and isinstance(node, dict):
                        node[draw.choice(["x", "\x07", "a.b", "(", "__proto__", *node])] = node[key]
                    elif kind == 1:
                        node.insert(draw.randrange(len(node) + 1), node[key])
                    elif kind == 2:
                        node[key], raw = _MARK.strip('"'), draw.choice(RAW)
                    elif kind == 3 and isinstance(node[key], str):
                        node[key] = (
                            in_bytes(node[key].encode("utf-8", "replace")).damaged(draw).decode("utf-8", "replace")
                        )
                    elif kind == 3 and isinstance(node[key], int | float):
                        node[key] = draw.choice([node[key] + 1, node[key] - 1, -node[key], node[key] * 1000])
                    elif kind == 4:
                        node[key] = _at(value, draw.choice(found))
                    else:
                        node[key] = draw.choice(VALUES)

                try:
                    value = _changed(value, at, change)
                except (LookupError, TypeError, AttributeError):  # an earlier change took the place away
                    continue
            text = json.dumps(value, ensure_ascii=draw.random() < 0.7).encode("utf-8", "surrogatepass")
            if raw is not None:
                text = text.replace(_MARK.encode(), raw)
            if draw.random() < 0.8:
                return text
        return in_bytes(text).damaged(draw)

    return Mutator(known[0][2], damaged)


def _at(value: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        value = value[key]
    return value


def in_rows(*rows: Any) -> Mutator:
    """Lines of JSON, one of them damaged."""
    one, others = in_values(*rows), [json.dumps(row).encode() for row in rows]

    def damaged(draw: random.Random) -> bytes:
        lines = [one.damaged(draw), *draw.sample(others, draw.randrange(min(len(others), 2) + 1))]
        draw.shuffle(lines)
        return draw.choice([b"\n", b"\n", b"\n", b"\r\n", b"\n\n"]).join(lines)

    return Mutator(b"\n".join(others), damaged)


def in_bytes(*sound: bytes) -> Mutator:
    """Bytes of which a few are cut, changed, repeated or put in."""

    def damaged(draw: random.Random) -> bytes:
        data = bytearray(sound[draw.randrange(len(sound))])
        for _ in range(draw.randint(1, 4)):
            at, kind = draw.randrange(len(data) + 1), draw.randrange(6)
            if kind == 0:
                del data[at : at + draw.choice([1, 8, 100, len(data)])]
            elif kind == 1 and at < len(data):
                data[at] = draw.randrange(256)
            elif kind == 2:
                data[at:at] = data[max(0, at - draw.choice([1, 8, 200])) : at] * draw.choice([1, 2, 30])
            elif kind == 3:
                data[at:at] = draw.choice(RAW)
            elif kind == 4 and at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            else:
                width = draw.choice("BHIQ")
                number = draw.choice([0, 1, 255, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, 1 << 63])
                number &= (1 << 8 * struct.calcsize(width)) - 1
                data[at : at + struct.calcsize(width)] = struct.pack(f"<{width}", number)
        return bytes(data)

    return Mutator(sound[0], damaged)


def in_header(data: bytes) -> Mutator:
    """A safetensors file whose header is damaged; its length mostly fits."""
    length = struct.unpack("<Q", data[:8])[0]
    one, rest = in_values(json.loads(data[8 : 8 + length])), data[8 + length :]

    def damaged(draw: random.Random) -> bytes:
        header = one.damaged(draw)
        stated = len(header) if draw.random() < 0.9 else draw.choice([0, 7, 2**32, 2**63])
        return struct.pack("<Q", stated) + header + (rest if draw.random() < 0.9 else rest[: draw.randrange(99)])

    return Mutator(data, damaged)


def either(*mutators: Mutator) -> Mutator:
    """One of them."""
    return Mutator(mutators[0].sound, lambda draw: draw.choice(mutators).damaged(draw))


def from_file(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """A reader of bytes from one of a file."""

    def one(data: bytes) -> object:
        # Not emptied first: a file that was is flushed to the disk when it is closed, milliseconds for each input.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT), "wb", buffering=0) as file:
            file.write(data)
            file.truncate(len(data))
        return read()

    return one


# --- the judge ---


class TooLong(BaseException):
    """An input takes more than ``MOST_SECONDS`` of processor time."""


def _interrupt(*_: object) -> None:
    raise TooLong


def attack(name: str, reader: Reader, refusal: type[Exception], count: int) -> Found:
    """``count`` inputs, one after the other.

    A fault is any exception but ``refusal`` with exit code 2 and a short message, more than five seconds of processor
    time, or more than two GiB of memory beyond what the process held before.
    """
    found, most = Found(name), float(os.environ.get("FUZZ_SECONDS", "inf"))
    before = signal.signal(signal.SIGPROF, _interrupt)
    memory, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(reader.mutator.sound)  # it is read to begin with, so that refusals mean something
            while found.inputs < count and found.seconds < most:
                _judge(found, reader, refusal)
                found.inputs += 1
                found.seconds = time.process_time() - began
                held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                if held - memory > MOST_KIB:
                    found.faults.setdefault("memory", f"input {found.inputs - 1}: {held - memory} KiB more are held")
                    memory = held
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    if log := os.environ.get("FUZZ_LOG"):
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(found)) + "\n")
    return found


def _judge(found: Found, reader: Reader, refusal: type[Exception]) -> None:
    data = reader.mutator.damaged(random.Random(found.inputs))
    fault = None
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    began = time.process_time()
    try:
        reader.read(data)
        found.read += 1
    except KeyboardInterrupt:
        raise
    except refusal as error:
        found.refused += 1
        if getattr(error, "exit_code", 2) != 2 or len(str(error)) > MOST_CHARACTERS or not str(error):
            fault = _kind(error)
    except TooLong as error:
        fault = _kind(error)
    except BaseException as error:
        fault = _kind(error)
    signal.setitimer(signal.ITIMER_PROF, 0)
    took = time.process_time() - began
    if took > found.slowest_seconds:
        found.slowest, found.slowest_seconds = found.inputs, took
    if took > MOST_SECONDS:
        fault = fault or f"{took:.1f} s"
    if fault is not None:
        found.faults.setdefault(fault, f"input {found.inputs}: {data[:300]!r}")


def _kind(error: BaseException) -> str:
    """Type, what it says, and where it comes from."""
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-6:-1])
    return f"{type(error).__name__} at {where}: {str(error)[:200]}"


def check(found: Found) -> None:
    """Fails where there was a fault, or where hardly any damage was seen."""
    assert not found.faults, json.dumps(found.faults, indent=1)
    assert found.refused > found.inputs // 50, found
