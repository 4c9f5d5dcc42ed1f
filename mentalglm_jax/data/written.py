"""Folders that a command writes whole, each with a manifest of its files: which of them it may replace."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mentalglm_jax.errors import InputError
from mentalglm_jax.files import write_json, write_text
from mentalglm_jax.foreign import read_json

MANIFEST, DATASHEET = "manifest.json", "README.md"
_SHEET = "datasheet_sha256"  # beside "files", which the datasheet lists


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder``, by its path there."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}  # fmt: skip


def check_same(folder: Path, texts: Mapping[str, str | None], why: str) -> None:
    """Whether files of ``folder`` are not there, or what they will be; None: it will not be there. ``why`` they may be
    needed stands in the message.

    Raises: InputError."""
    for name, text in texts.items():
        path = folder / name
        same = text is not None and path.is_file() and path.read_bytes() == text.encode()
        if os.path.lexists(path) and not same:
            raise InputError(f"{path}: is there already and differs; {why}: choose another --out")


def write_manifest(folder: Path, manifest: Mapping[str, Any], datasheet: str) -> None:
    """Writes the datasheet, for people to complete, and the manifest, which tells if they have. Raises: RunError."""
    write_text(folder / DATASHEET, datasheet)
    write_json(folder / MANIFEST, {**manifest, _SHEET: hashlib.sha256(datasheet.encode()).hexdigest()})


def check_replaceable(out: Path) -> None:
    """Raises: InputError if replacing ``out`` whole would lose what another, or a person, put there."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: is a file; this command writes a folder")
    files = [str(path.relative_to(out)) for path in sorted(out.rglob("*")) if path.is_symlink() or not path.is_dir()]
    if not files:
        return
    if MANIFEST not in files:
        raise InputError(f"{out}: not empty and not written by this command; choose another out")
    manifest = read_json(out / MANIFEST)
    ours = manifest.get("files")
    if not isinstance(ours, dict):
        raise InputError(f"{out / MANIFEST}: not written by this command; choose another out")
    known = {MANIFEST} if _SHEET in manifest else {MANIFEST, DATASHEET}  # an earlier version did not note it
    ours = {**ours, DATASHEET: manifest.get(_SHEET)}
    for name in files:
        path = out / name
        if name not in known and (
            path.is_symlink() or not path.is_file() or ours.get(name) != hashlib.sha256(path.read_bytes()).hexdigest()
        ):
            raise InputError(f"{path}: was {'changed' if name in ours else 'put there'} since it was written, and "
                             "would be lost; move it, or choose another out")  # fmt: skip
