"""The run directory on disk, and reading it back: the posts must bear what the summary says of them.

::

    DIR/manifest.json        what was run, with which versions; "status" is "running" until everything below is written
    DIR/attributions.jsonl, units.parquet, checks.jsonl, checks.parquet, summary.csv  tables (``results.export``)
    DIR/summary.json         the data set in numbers
    DIR/report.html
    DIR/cache/               one file per post, named by a hash of everything its numbers depend on (``results.cache``)
    DIR/private/             of a redacted run: the key of that hash; not to be passed on
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from probes.checks.crosscheck import Evidence
from probes.errors import ProbeInputError
from probes.foreign import Fields, first_line, plain, read_json
from probes.notebook import Shown
from probes.results.borne import drawn_by, unborne
from probes.results.cache import digest, entry
from probes.results.posts import PostResult as PostResult  # names of here, too, for notebooks
from probes.results.posts import cited_target as cited_target

# 2: maps of cited phrases; 3: draws of checks, authors, rationales; 4: nulls by clause, p_holm; 5: digests, border
# tokens stay, offset of erasure, one cut for a data set, swap pairs; 6: rows left out by reason, labels in other words,
# gates and fillers at equal length, quotes that turn what they quote; 7: chains of reasoning
SCHEMA_VERSION = 7
_REPAIRS = "the same `probes run` command repairs it"


def in_words(reasons: Mapping[str, int]) -> str:
    """What was left out, by reason, the most first: ``2 the post is empty; 1 ...``."""
    return "; ".join(f"{count} {plain(reason)}" for reason, count in Counter(reasons).most_common())


def short_name(model: str) -> str:
    """The last parts of the paths in a model name: what is passed on should not name a home directory."""
    return " + ".join(part.rstrip("/").rsplit("/", 1)[-1] for part in model.split(" + "))


@dataclass(frozen=True, eq=False)
class Run(Shown):
    """A finished run. ``evidence``: the checks of ``results`` where they are at hand, else made again when needed."""

    manifest: dict[str, Any]
    summary: dict[str, Any]
    results: tuple[PostResult, ...]
    evidence: tuple[Evidence, ...] | None = None

    def __repr__(self) -> str:
        return f"Run({len(self.results)} posts, {self.summary['conclusion']})"


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a finished run.

    Raises:
        ProbeInputError: not a run directory, unfinished, or written by another version.
    """
    directory = Path(directory)
    path = directory / "manifest.json"
    if not path.exists() and not path.is_symlink():
        raise ProbeInputError(f"{directory}: no manifest.json here; give the directory that `probes run --out` wrote")
    manifest = read_manifest_file(path)
    if manifest.get("kind") != "probes":
        raise ProbeInputError(f"{path}: not written by `probes run`")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        found = plain(manifest.get("schema_version"), 40)
        raise ProbeInputError(f"{directory}: schema version {found}, this version reads {SCHEMA_VERSION}; run it again")
    if manifest.get("status") != "done":
        raise ProbeInputError(f"{directory}: the run is not finished; the same `probes run` command continues it")
    fields = Fields(manifest, path)
    for key in ("model", "model_fp", "dtype", "device", "budget", "created"):
        fields.text(key)
    for key in ("cache", "methods", "left_out", "limits"):
        fields.texts(key)
    for key in ("rows", "limit"):
        fields.integer(key, 0, 2**53)
    for key in ("settings", "versions"):
        fields.table(key)
    fields.boolean("redact")
    authors, skipped = manifest.get("authors", []), manifest.get("skipped", [])
    pseudonyms = isinstance(authors, list) and all(isinstance(one, (str, type(None))) for one in authors)
    if "authors" in manifest and not (pseudonyms and len(authors) == len(fields.texts("cache"))):
        fields.refuse("authors", "must name one author per post")
    named = isinstance(skipped, list) and all(
        isinstance(one, dict) and all(isinstance(one.get(key), str) for key in ("id", "reason")) for one in skipped
    )
    if not named:
        fields.refuse("skipped", "must be a list of rows with their reasons")
    return manifest


def read_manifest_file(path: Path) -> dict[str, Any]:
    """A manifest.json as it stands.

    Raises:
        ProbeInputError: a link to another directory, or not a JSON object.
    """
    if path.is_symlink():
        raise ProbeInputError(f"{path}: is a link, not a file of this run")
    return read_json(path, half_pairs=True)


def read_run(directory: str | Path) -> Run:
    """A finished run with all its posts.

    Raises:
        ProbeInputError: see ``read_manifest``; or a file of it is missing or damaged (named, with what to do), or the
            posts do not bear what the summary says.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    results = []
    for name in manifest.get("cache") or ():
        try:
            results.append(PostResult.from_dict(entry(directory / "cache", name)))
        except ProbeInputError as error:
            where = "" if str(directory) in str(error) else f"{directory / 'cache' / name}: "
            raise ProbeInputError(f"{where}{error}; {_REPAIRS}") from error
    if not results:
        raise ProbeInputError(f"{directory}/manifest.json: cache: names no post; {_REPAIRS}")
    if twice := [name for name, count in Counter(result.id for result in results).items() if count > 1]:
        raise ProbeInputError(f"{directory}/manifest.json: cache: post {plain(twice[0], 80)!r} twice; {_REPAIRS}")
    if "authors" in manifest:  # of a redacted run: pseudonyms, which no cached post holds
        results = [replace(r, user=who) for r, who in zip(results, manifest["authors"], strict=True)]
    summary = read_json(directory / "summary.json", half_pairs=True)
    if digest(summary) != manifest.get("summary"):
        raise ProbeInputError(f"{directory}/summary.json: damaged or edited since it was written; {_REPAIRS}")
    if summary.get("n") != len(results):
        said = f"{len(results)} posts, but {directory}/summary.json is of {plain(summary.get('n'), 20)}"
        raise ProbeInputError(f"{directory}/manifest.json: cache: names {said}; {_REPAIRS}")
    return Run(manifest, summary, tuple(results), _borne(directory, manifest, summary, results))


def _borne(
    directory: Path, manifest: dict[str, Any], summary: dict[str, Any], results: Sequence[PostResult]
) -> tuple[Evidence, ...]:
    """The checks of the posts, which bear what the summary says. Raises: ProbeInputError: they do not."""
    try:
        seed, n_boot = drawn_by(manifest)
        evidence = tuple(result.evidence(n_boot=n_boot, seed=seed) for result in results)
        wrong = unborne(summary, manifest, evidence, results)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as error:
        said = f"holds no run as this version writes it ({first_line(error)}); run it again"
        raise ProbeInputError(f"{directory}: {said}") from error
    if wrong is not None:
        raise ProbeInputError(f"{directory}/summary.json: {wrong}; {_REPAIRS}")
    return evidence


class Suite(Shown, dict[str, Any]):
    """What ``run_suite`` returns: the numbers of ``summary.json`` as a dict, and the run they come from.

    ``write_report(suite, path)`` takes it as it is; a notebook shows the report of its run.
    """

    def __init__(self, summary: dict[str, Any], directory: str | Path) -> None:
        super().__init__(summary)
        self.directory = Path(directory)

    @functools.cached_property
    def run(self) -> Run:
        """Every post with its maps and checks, read back from the directory (``read_run``)."""
        return read_run(self.directory)
