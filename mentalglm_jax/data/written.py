"""Folders that a command writes whole, each with a manifest of its files: which of them it may replace."""

import hashlib
from pathlib import Path

from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import read_json

MANIFEST = "manifest.json"
_UNLISTED = (MANIFEST, "README.md")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder``, by its path there."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}  # fmt: skip


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
    ours = read_json(out / MANIFEST).get("files")
    if not isinstance(ours, dict):
        raise InputError(f"{out / MANIFEST}: not written by this command; choose another out")
    for name in files:
        path = out / name
        if name not in _UNLISTED and (
            path.is_symlink() or not path.is_file() or ours.get(name) != hashlib.sha256(path.read_bytes()).hexdigest()
        ):
            raise InputError(f"{path}: was {'changed' if name in ours else 'put there'} since it was written, and "
                             "would be lost; move it, or choose another out")  # fmt: skip
