"""Where Python takes modules from: never from the directory a command happens to stand in.

A checkpoint or a data set from a stranger may hold ``torch.py`` or ``probes.py``. Python looks into the working
directory first for ``python -m`` and ``python -c``, and wherever PYTHONPATH has an empty or relative entry; libraries
that start workers (multiprocessing, joblib) start them that way. This module is imported before any other, so it may
need nothing that a file there could stand in for: ``os`` and ``sys`` are loaded before Python looks anywhere.
"""

import os
import sys

SEARCH_PATHS = ("PYTHONPATH", "PATH", "LD_LIBRARY_PATH")


def guard(package: str, command: str) -> None:
    """Closes the working directory to imports, for this process and all it starts, if this is one of our commands.

    Nothing happens where the package is used as a library: what a notebook or a script imports is its own business.

    Args:
        package: as in ``python -m PACKAGE``.
        command: name of the console script.
    """
    if not _is_command(package, command):
        return
    if sys.argv[0] == "-m" and not sys.flags.safe_path and sys.path[0] == _working_directory():
        del sys.path[0]
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)  # `site` has made its entries absolute since
    meant = {os.path.abspath(entry) for entry in given if os.path.isabs(entry)}
    dropped = {os.path.abspath(entry) for entry in given if not os.path.isabs(entry)} - meant
    if not os.environ.get("PYTHONPATH"):  # to Python an empty one is none
        dropped = set()
    sys.path[:] = [entry for entry in sys.path if os.path.isabs(entry) and entry not in dropped]
    clean = environment()
    for name in SEARCH_PATHS:
        os.environ.pop(name, None)
    os.environ.update(clean)


def environment(**changes: str) -> dict[str, str]:
    """This process's environment for a child: Python does not add the working directory to its path there, and no
    search path has an empty or relative entry, which mean that directory."""
    result = {**os.environ, "PYTHONSAFEPATH": "1", **changes}
    for name in SEARCH_PATHS:
        kept = [entry for entry in result.pop(name, "").split(os.pathsep) if os.path.isabs(entry)]
        if kept:
            result[name] = os.pathsep.join(kept)
    return result


def module_command(module: str, *arguments: object) -> list[str]:
    """The command line that runs ``module`` in a process of its own; to be started with ``environment``."""
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # deleted; Python has added nothing then
        return None


def _is_command(package: str, command: str) -> bool:
    if sys.argv[:1] != ["-m"]:  # what stands there while `python -m` looks for its module
        return bool(sys.argv) and os.path.basename(sys.argv[0]) in (command, f"{command}.exe", f"{command}-script.py")
    for option, after in zip(sys.orig_argv[1:], [*sys.orig_argv[2:], ""], strict=True):
        flags, found, module = option.removeprefix("-").partition("m")
        if option.startswith("-") and found and set(flags) <= set("bBdEiIOPqsSuvx"):
            module = module or after
            return module == package or module.startswith(f"{package}.")
    return False
