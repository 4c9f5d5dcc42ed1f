"""Whether a step of a long script is done: by what it was made of and what it made, not by a file that is there.

Beside the first file of a step stands a note of its command, and of the digests of all it read and wrote. A step that
was killed has none; one whose inputs are others now, or whose results were edited, has another. Both are done again.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mentalglm_jax.files import write_json


def once(made: Sequence[Path], command: Iterable[object], read: Iterable[Path], make: Callable[[], object]) -> None:
    """Does a step unless it is done.

    Args:
        made: what the step writes, files or directories; they need not all come to be. What is left of another one is
            deleted before, if it is a file.
        command: what is done, in words and numbers.
        read: the files and directories it is done with.
        make: does it.
    """
    note, of = made[0].with_name(f".{made[0].name}.done.json"), made_of(command, read)
    if noted(note) == of | {"made": {str(path): digest(path) for path in made}}:
        return
    for path in (note, *made):
        if path.is_file():
            path.unlink()
    make()
    write_json(note, of | {"made": {str(path): digest(path) for path in made}})


def made_of(command: Iterable[object], read: Iterable[Path]) -> dict[str, Any]:
    """What tells a step from another."""
    return {"command": [*map(str, command)], "read": {str(path): digest(path) for path in read}}


def noted(note: Path) -> Any:
    """What a note says; None where there is none that can be read."""
    try:
        return json.loads(note.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def digest(path: Path) -> str | None:
    """SHA-256 of a file, or of the files of a directory and their names (locks and notes apart); None of nothing."""
    if path.is_dir():
        parts = [f"{one.relative_to(path)} {digest(one)}" for one in sorted(path.rglob("*"))
                 if one.is_file() and not one.name.startswith(".")]  # fmt: skip
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
