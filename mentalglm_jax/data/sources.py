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
from mentalglm_jax.errors import InputError, nearest


@dataclass(frozen=True)
class Source:
    """How one data set is found and read: the ``tasks`` of its records, ``places`` below a root or below a folder of
    it, ``holds`` tells whether a folder has its files, ``read`` yields the records of that folder."""

    tasks: tuple[str, ...]
    places: tuple[str, ...]
    holds: Callable[[Path], bool]
    read: Callable[[Path], Iterator[Record]]


def _imhi_source(sets: Sequence[str]) -> Source:
    return Source(
        tuple(imhi.IMHI_TASKS[name] for name in sets),
        ("", "imhi", "train_data"),
        lambda path: bool(imhi.imhi_files(path, sets[0])),
        lambda path: imhi.iter_imhi(path, sets),
    )


# Of the data sets of one task the first is the one whose results are compared; what repeats it stands behind it.
_SOURCES: dict[str, Source] = {
    SOS_HL_1K: Source(
        ("suicide_risk",), ("", "sos_hl_1k", "data/suicide"), lambda path: bool(chinese.sos_files(path)),
        chinese.iter_sos_hl_1k,
    ),
    SOS_1K: Source(
        ("suicide_level",), ("", "sos_1k", "ModelTrain/data"), lambda path: bool(chinese.sos_1k_files(path)),
        chinese.iter_sos_1k,
    ),
    SOCIALCD_3K: Source(
        ("cognitive_distortion",), ("", "socialcd_3k", "data/SocialCD-3k"),
        lambda path: any(path.glob("*_data_with_header.tsv")), chinese.iter_socialcd_3k,
    ),
    PATHWAYS: Source(
        ("cognitive_pathway",), ("", "pathways", "cognitive_pathways", "data"), chinese.pathways_here,
        chinese.iter_pathways,
    ),
    C_IMHI_RAW: Source(
        ("suicide_risk", "cognitive_distortion"), ("", "Raw data", "c_imhi/Raw data"),
        lambda path: bool(c_imhi.c_imhi_raw_files(path)), c_imhi.iter_c_imhi_raw,
    ),
    C_IMHI: Source(
        tuple(c_imhi.ORIGINALS), ("", "c_imhi", "alpaca", "Instruct data", "c_imhi/Instruct data"), c_imhi.c_imhi_here,
        c_imhi.iter_c_imhi,
    ),
    "imhi": _imhi_source(imhi.IMHI_DEFAULT),
    **{task: _imhi_source((name,)) for name, task in imhi.IMHI_TASKS.items()},
    rationales.IRF: Source(
        ("imhi_irf",), ("", "irf", "irf/data", "data"), rationales.irf_here, rationales.iter_irf
    ),
    rationales.CNSD: Source(
        ("depression_risk",), ("", "cnsocialdepress"), rationales.cnsd_here, rationales.iter_cnsd
    ),
}  # fmt: skip
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
            raise InputError(f"unknown data set {name!r}{nearest(name, SOURCES)}; known: {', '.join(SOURCES)}")
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
    folder = _folder(root)
    found = [name for name, source in _SOURCES.items() if name != "imhi" and _find(folder, source) is not None]
    if not found:
        raise InputError(f"{root}: no file of records (.jsonl, .parquet, .arrow), and none of the known data sets is "
                         f"there ({', '.join(SOURCES)}); `mentalglm data import` makes records of a table")  # fmt: skip
    return found


def of_task(root: str | Path, task: str) -> list[str]:
    """The data sets below ``root`` that hold records of ``task``, in the order of ``SOURCES``. Raises: InputError if
    there is none."""
    here = present(root)
    if found := [name for name in here if task in _SOURCES[name].tasks]:
        return found
    known = [name for name, source in _SOURCES.items() if task in source.tasks and name != "imhi"]
    wanted = f"it is in {', '.join(known)}" if known else "none of the published data sets has it"
    raise InputError(f"{root}: no data set with task {task!r} among those here ({', '.join(here)}); {wanted}")


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
