"""Compiled programs kept on disk, so that the second start of a recipe compiles nothing.

It is JAX's persistent compilation cache with a place, a bound and a guard. On a TPU a step of a 9 B model compiles for
minutes at each start without it. What is read back is machine code that will run: the directory must belong to this
user and be writable by nobody else, and no recipe can name another one, as it may come from a stranger together with
that directory, or name an address. Who starts the run can, by ``JAX_COMPILATION_CACHE_DIR``.
"""

import errno
import hashlib
import os
import platform
import stat
import sys
import warnings
from collections.abc import MutableMapping
from pathlib import Path

import platformdirs

from mentalglm_jax.errors import InputError

MOST_BYTES = 10 * 2**30  # the programs not used for longest are deleted beyond that
_DIRECTORY = "JAX_COMPILATION_CACHE_DIR"
# Everything is kept: the many small programs of a start take longer together than the large one of a small model.
_SETTINGS = {"JAX_COMPILATION_CACHE_MAX_SIZE": str(MOST_BYTES), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
             "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}  # fmt: skip


def default_directory() -> Path:
    """``~/.cache/mentalglm-jax/compiled/PROCESSOR`` (by ``XDG_CACHE_HOME``, or the platform's custom): programs for
    CPUs use what the processor can do, and a home directory may be shared by machines of several kinds."""
    return platformdirs.user_cache_path("mentalglm-jax", appauthor=False) / "compiled" / _processor()


def keep_from_start(environment: MutableMapping[str, str]) -> None:
    """Sets JAX up, through the environment it reads when it is imported, to keep its programs in the default directory.

    A directory that the environment names already stays, with its settings. Where none can be made nothing is kept;
    ``described`` says so.
    """
    if _DIRECTORY in environment:
        return
    directory = default_directory()
    try:
        _make_private(directory)
    except InputError as error:
        warnings.warn(f"compiled programs are not kept: {error}", stacklevel=2)
    except OSError:  # no home, or one that cannot be written
        pass
    else:
        environment[_DIRECTORY] = str(directory)
        for name, value in _SETTINGS.items():
            environment.setdefault(name, value)


def keep_nothing() -> None:
    """From now on, whatever the environment says."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def described() -> str:
    """How many programs are kept, how large they are, and where; for ``mentalglm doctor``."""
    import jax

    place: str | None = jax.config.values["jax_compilation_cache_dir"]
    if not place:
        return "not kept"
    if "://" in place:
        return f"in {place}"
    sizes = [found.stat().st_size for found in Path(place).glob("*-cache")]
    return f"{len(sizes)}, {sum(sizes) / 2**20:,.1f} MiB, in {place}"


def _make_private(directory: Path) -> None:
    """Creates the directory. Raises: InputError where others could put programs into it; OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for one in (directory, *directory.parents[:2]):  # who owns one above can put another in this one's place
        if sys.platform != "win32" and one.stat().st_uid not in (os.geteuid(), 0):
            raise InputError(f"{one} belongs to another user, whose programs would be run here")
    if directory.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(f"{directory} can be written by other users, whose programs would be run here (chmod go-w)")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _processor() -> str:
    """A short name for the instructions this processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        said = next(line for line in lines if line.split(":")[0].strip() in ("flags", "Features"))
    except (OSError, StopIteration):
        said = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
