"""Upstream data sets, read from the files their authors publish.

None of them is shipped (the Chinese ones carry no licence). The user names a folder: a clone of the authors'
repository, one of its folders, or a folder that holds several. What is wrong with a file is reported with file, line
and column, and never with the post itself. The formats stand in ``chinese.py``, ``c_imhi.py``
and ``imhi.py``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mentalglm_jax.data import c_imhi, chinese, imhi, rationales
from mentalglm_jax.data.c_imhi import C_IMHI, C_IMHI_RAW
from mentalglm_jax.data.chinese import PATHWAYS, SOCIALCD_3K, SOS_1K, SOS_HL_1K
from mentalglm_jax.data.chinese import load_socialcd_3k as load_socialcd_3k
from mentalglm_jax.data.chinese import load_sos_hl_1k as load_sos_hl_1k
from mentalglm_jax.data.imhi import IMHI_DEFAULT as IMHI_DEFAULT
from mentalglm_jax.data.imhi import IMHI_TASKS as IMHI_TASKS
from mentalglm_jax.data.imhi import load_imhi as load_imhi
from mentalglm_jax.data.records import Record
from mentalglm_jax.errors import InputError


@dataclass(frozen=True)
class Source:
    """How one data set is found and read: ``places`` below a root or below a folder of it, ``holds`` tells whether a
    folder has its files, ``read`` yields the records of that folder."""

    places: tuple[str, ...]
    holds: Callable[[Path], bool]
    read: Callable[[Path], Iterator[Record]]


def _imhi_source(sets: Sequence[str]) -> Source:
    return Source(
        ("", "imhi", "train_data"),
        lambda path: bool(imhi.imhi_files(path, sets[0])),
        lambda path: imhi.iter_imhi(path, sets),
    )


_SOURCES: dict[str, Source] = {
    SOS_HL_1K: Source(
        ("", "sos_hl_1k", "data/suicide"), lambda path: bool(chinese.sos_files(path)), chinese.iter_sos_hl_1k
    ),
    SOS_1K: Source(
        ("", "sos_1k", "ModelTrain/data"), lambda path: bool(chinese.sos_1k_files(path)), chinese.iter_sos_1k
    ),
    SOCIALCD_3K: Source(
        ("", "socialcd_3k", "data/SocialCD-3k"),
        lambda path: any(path.glob("*_data_with_header.tsv")),
        chinese.iter_socialcd_3k,
    ),
    PATHWAYS: Source(("", "pathways", "cognitive_pathways", "data"), chinese.pathways_here, chinese.iter_pathways),
    C_IMHI: Source(
        ("", "c_imhi", "alpaca", "Instruct data", "c_imhi/Instruct data"), c_imhi.c_imhi_here, c_imhi.iter_c_imhi
    ),
    C_IMHI_RAW: Source(
        ("", "Raw data", "c_imhi/Raw data"), lambda path: bool(c_imhi.c_imhi_raw_files(path)), c_imhi.iter_c_imhi_raw
    ),
    rationales.IRF: Source(("", "irf", "irf/data", "data"), rationales.irf_here, rationales.iter_irf),
    rationales.CNSD: Source(("", "cnsocialdepress"), rationales.cnsd_here, rationales.iter_cnsd),
    "imhi": _imhi_source(imhi.IMHI_DEFAULT),
    **{task: _imhi_source((name,)) for name, task in imhi.IMHI_TASKS.items()},
}
SOURCES = tuple(_SOURCES)


def iter_upstream(root: str | Path, names: Sequence[str]) -> Iterator[Record]:
    """Finds the named data sets below ``root`` and reads them row by row, in the order of ``names``.

    Args:
        root: a clone, or a folder that holds clones or folders called as in ``SOURCES`` (``imhi`` for all of IMHI); a
            file stands for the folder it is in.
        names: of ``SOURCES``; "imhi" stands for DR, dreaddit and SAD.

    Raises:
        InputError: ``root`` or a data set is missing, a name is unknown, or a file is damaged.
    """
    root = _folder(root)
    for name in names:
        if name not in _SOURCES:
            raise InputError(f"unknown data set {name!r}; known: {', '.join(SOURCES)}")
        source = _SOURCES[name]
        folder = _find(root, source)
        if folder is None:
            places = ", ".join(place for place in source.places if place)
            raise InputError(f"{root}: data set {name} not found; looked here and one folder down for {places}")
        yield from source.read(folder)


def load_upstream(root: str | Path, names: Sequence[str]) -> list[Record]:
    """``iter_upstream`` as a list."""
    return list(iter_upstream(root, names))


def present(root: str | Path) -> list[str]:
    """The data sets below ``root`` by name, IMHI set by set. Raises: InputError if there is none."""
    root = _folder(root)
    found = [name for name, source in _SOURCES.items() if name != "imhi" and _find(root, source) is not None]
    if not found:
        raise InputError(f"{root}: none of the known data sets is there ({', '.join(SOURCES)})")
    return found


def find(root: str | Path, name: str) -> Path | None:
    """The folder below ``root`` that holds the data set, or None."""
    return _find(_folder(root), _SOURCES[name])


def _folder(root: str | Path) -> Path:
    """``root``, or the folder of the file it names."""
    root = Path(root)
    if root.is_file():
        return root.parent
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the folder that holds the upstream data sets")
    return root


def _find(root: Path, source: Source) -> Path | None:
    """The folder that holds the data set, below ``root`` or below a folder of it (a clone)."""
    bases = [root, *sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))]
    for base in bases:
        for place in source.places:
            if (base / place).is_dir() and source.holds(base / place):
                return base / place
    return None
