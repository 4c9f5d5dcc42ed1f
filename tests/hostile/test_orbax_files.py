"""Orbax directories from strangers: chunks that stand for gigabytes, arrays that are not there, names that lead out."""

import bz2
import functools
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import tensorstore

from mentalglm_jax.checkpoints.ocdbt import MANIFEST, check_databases
from mentalglm_jax.checkpoints.orbax_files import OrbaxCheckpoint
from tests.hostile.attack import refused, run
from tests.hostile.foreign_files import called, write_checkpoint

LARGE = 256 << 20  # bytes that a chunk of 64 unpacks to
NORM = "norm.weight"  # 16 numbers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("orbax")
    write_checkpoint(place / "glm")
    command = ["mentalglm", "convert", place / "glm", place / "whole", "--to", "orbax"]
    from mentalglm_jax.cli.main import main

    with pytest.raises(SystemExit) as end:
        main([str(word) for word in command[1:]])
    assert not end.value.code
    return place / "whole"


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def edit(file: Path, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@functools.cache
def bomb(kind: str) -> bytes:
    zeros = bytes(1 << 24)
    if kind == "zstd":  # blocks of one repeated byte, 128 KiB each; no size is stated
        count = LARGE >> 17
        blocks = (((1 << 17) << 3 | 2 | (number == count - 1)).to_bytes(3, "little") + b"\0" for number in range(count))
        return b"\x28\xb5\x2f\xfd\0\x58" + b"".join(blocks)
    if kind == "blosc":
        return b"\x02\x01\x01\x04" + struct.pack("<III", (1 << 31) - 17, 1 << 16, 100) + bytes(84)
    maker = bz2.BZ2Compressor(1) if kind == "bz2" else zlib.compressobj(1, zlib.DEFLATED, 31 if kind == "gzip" else 15)
    return b"".join([*(maker.compress(zeros) for _ in range(LARGE >> 24)), maker.flush()])


def peak() -> int:
    """The most memory this process held since it was last asked, in bytes."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.split("VmHWM:")[1].split()[0]) << 10


@pytest.mark.parametrize("kind", ["zlib", "gzip", "zstd", "bz2", "blosc"])
def test_a_chunk_that_unpacks_to_gigabytes(copy, tmp_path, capsys, kind):
    array = copy / "params" / NORM
    compressor = (
        {"id": kind, "cname": "zstd", "clevel": 5, "shuffle": 0} if kind == "blosc" else {"id": kind, "level": 1}
    )
    edit(array / ".zarray", compressor=compressor)
    (array / "0").write_bytes(bomb(kind))
    watched = os.access("/proc/self/clear_refs", os.W_OK)
    before = watched and (peak(), peak())[1]
    done = run(["mentalglm", "convert", copy, tmp_path / "out", "--to", "glm"], capsys)
    refused(done, rf"cannot read parameter {NORM}")
    assert not watched or peak() - before < LARGE // 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shape", "chunks"), [([1 << 40], [16]), ([1 << 20, 1 << 20], [1, 1]), ([1 << 40], [1 << 40])], ids=str
)
def test_an_array_that_is_not_there(copy, shape, chunks):
    edit(copy / "params" / NORM / ".zarray", shape=shape, chunks=chunks)
    refused(
        called(lambda: OrbaxCheckpoint(copy)), r"params: (describes arrays of \d+ bytes, its files hold|not a read)"
    )


@pytest.mark.parametrize(
    "name", ["..", "../..", "/etc", "a/b", "", ".", "a\0b", "é", "x" * 300, 3, None, ["a"], {"a": 1}], ids=repr
)
def test_a_name_that_leads_out(copy, name):
    file = copy / "params" / "_METADATA"
    described = json.loads(file.read_text())
    first = next(iter(described["tree_metadata"]))
    described["tree_metadata"][first]["key_metadata"][0]["key"] = name
    file.write_text(json.dumps(described))
    refused(called(lambda: OrbaxCheckpoint(copy)), "_METADATA: tree_metadata does not name the parameters of a model")


@pytest.mark.parametrize(
    "tree", [None, [], "x", {"a": None}, {"a": {}}, {"a": {"key_metadata": [3]}}, {"a": {"key_metadata": 3}}], ids=repr
)
def test_a_tree_that_is_none(copy, tree):
    edit(copy / "params" / "_METADATA", tree_metadata=tree)
    refused(called(lambda: OrbaxCheckpoint(copy)), "_METADATA: tree_metadata does not name the parameters of a model")


def checksum(data: bytes) -> bytes:
    """CRC-32C, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return struct.pack("<I", crc ^ 0xFFFFFFFF)


def framed(magic: int, body: bytes, packed: bool = False) -> bytes:
    """A manifest or a node of an OCDBT database; ``packed``: ``body`` is compressed."""
    head = struct.pack(">I", magic) + struct.pack("<Q", len(body) + 18) + bytes([0, packed]) + body
    return head + checksum(head)


def number(value: int) -> bytes:
    low = bytes([value & 127 | (128 if value > 127 else 0)])
    return low + number(value >> 7) if value > 127 else low


def database(place: Path) -> tuple[bytes, bytes]:
    """A database of one entry beside its node; its manifest without frame, and the part of it that says how it is
    kept."""
    config = {"compression": None, "max_inline_value_bytes": 10}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{place}/", "config": config}).result()
    store.write("a/x", b"hello" * 30).result()
    body = (place / MANIFEST).read_bytes()[14:-4]
    return body, body[:24]


def bomb_manifest(scratch: Path, place: Path, files: int) -> None:
    """A manifest in ``place`` that names so many files."""
    _, config = database(scratch)
    start = config + number(files)
    blocks = [((len(start) << 3).to_bytes(3, "little")) + start]  # as it is, then zeros, 128 KiB a block
    count = (min(files, 10_000_000) * 4 >> 17) + 1
    blocks += [((1 << 17) << 3 | 2 | (one == count - 1)).to_bytes(3, "little") + b"\0" for one in range(count)]
    place.mkdir(exist_ok=True)
    (place / MANIFEST).write_bytes(framed(0x0CDB3A2A, b"\x28\xb5\x2f\xfd\0\x58" + b"".join(blocks), packed=True))
    assert (place / MANIFEST).stat().st_size < 2000


@pytest.mark.parametrize("where", ["", "ocdbt.process_0"])
@pytest.mark.parametrize("files", [10_000_000, 1 << 40])
def test_a_manifest_that_names_files_without_end(copy, tmp_path, capsys, files, where):
    """24 kilobytes were 4 GB and a minute and a half of work."""
    bomb_manifest(tmp_path / "database", copy / "params" / where, files)
    refused(run(["mentalglm", "convert", copy, tmp_path / "out"], capsys), rf"params: .*{MANIFEST}: it takes more than")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../../secret", "d/../../../secret", "{root}/secret"])
def test_a_value_that_lies_outside(tmp_path, name):
    """TensorStore keeps to its directory; should a later one not, this tells."""
    root, place = tmp_path, tmp_path / "in" / "params"
    (root / "secret").write_bytes(b"secret" * 100)
    body, _ = database(place)
    (data,) = (place / "d").iterdir()
    raw = data.read_bytes()
    at = raw.index(b"\x0c\xdb\x20\xde")
    old, path = f"d/{data.name}".encode(), name.format(root=root).encode()
    inside = raw[at + 14 : -4]
    start = inside.index(old) - 2
    node = framed(0x0CDB20DE, inside[:start] + number(len(path)) + b"\0" + path + inside[start + 2 + len(old) :])
    data.write_bytes(raw[:at] + node)
    mark = bytes([len(raw) - at])
    assert body.count(mark + b"\x00\x96\x01") == 1
    cut = body.index(mark + b"\x00\x96\x01")
    head = body[:cut].replace(mark, number(len(node)))
    (place / MANIFEST).write_bytes(framed(0x0CDB3A2A, head + number(len(node)) + body[cut + 1 :]))
    check_databases(place)
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{place}/"}).result()
    assert store.list().result() == [b"a/x"]
    with pytest.raises(ValueError, match="Invalid key"):
        store.read("a/x").result()


def test_the_undamaged_one_converts(whole, tmp_path, capsys):
    assert run(["mentalglm", "convert", whole, tmp_path / "out", "--to", "glm"], capsys).code == 0
