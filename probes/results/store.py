"""What a run keeps of each post, and the run directory on disk.

::

    DIR/manifest.json        what was run, with which versions; "status" is "running" until everything below is written
    DIR/attributions.jsonl, units.parquet, checks.jsonl, checks.parquet, summary.csv  tables (``results.export``)
    DIR/summary.json         the data set in numbers
    DIR/report.html
    DIR/cache/               one file per post, named by a hash of everything its numbers depend on
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from probes import stats
from probes.checks.crosscheck import Evidence, examine
from probes.citations.clauses import choose_cut
from probes.errors import ProbeInputError
from probes.notebook import Shown
from probes.records import Attribution, Check, Citation, Example, Span

# 2: maps of cited phrases; 3: draws of checks, authors, rationales; 4: nulls by clause, p_holm; 5: border tokens stay,
# offset of erasure, one cut for a data set, swap pairs
SCHEMA_VERSION = 5


def cited_target(citation: Citation) -> str:
    """The attribution target of one cited phrase: its characters of the explanation."""
    return f"explanation[{citation.expl_char[0]}:{citation.expl_char[1]}]"


@dataclass(frozen=True, eq=False)
class PostResult(Shown):
    """One post, its citations and its maps. Character offsets throughout; ``units`` are the clauses of the post.

    ``measured`` are checks that needed the model (necessity and sufficiency of the cited words ...); ``rationales`` are
    spans that people marked, ``user`` is the author, ``counterfactuals`` are (label shift, mentioned), one
    per inserted clause.

    ``border`` tokens also hold characters of the template and were not varied; ``not_varied`` are the post's characters
    in them, ``border_letters`` says whether one is a letter or digit. ``contrast``: what the label's score is
    (``records.Example.contrast``). ``cut``: clause | word, what the units are. ``pair``: id of its swap pair.

    ``post``, ``explanation`` and ``label_text`` are None in a redacted result; lengths and offsets stay.
    """

    id: str
    task: str
    label: str
    label_text: str | None
    length: int
    units: tuple[Span, ...]
    post: str | None
    explanation: str | None
    explanation_length: int
    cues: tuple[Span, ...] | None
    decoys: tuple[Span, ...] | None
    citations: tuple[Citation, ...]
    attributions: tuple[Attribution, ...]
    measured: tuple[Check, ...] = ()
    rationales: tuple[Span, ...] | None = None
    user: str | None = None
    counterfactuals: tuple[tuple[float, float], ...] = ()
    border: int = 0
    not_varied: tuple[Span, ...] = ()
    border_letters: bool = False
    contrast: str = "log-odds"
    cut: str = "clause"
    pair: str | None = None

    @classmethod
    def of(
        cls,
        example: Example,
        citations: Sequence[Citation],
        attributions: Sequence[Attribution],
        units: tuple[Span, ...],
        measured: Sequence[Check] = (),
    ) -> PostResult:
        return cls(
            id=example.id,
            task=example.task,
            label=example.label,
            label_text=example.label_text,
            length=len(example.post),
            units=units,
            post=example.post,
            explanation=example.explanation,
            explanation_length=len(example.explanation or ""),
            cues=example.cues,
            decoys=example.decoys,
            citations=tuple(citations),
            attributions=tuple(attributions),
            measured=tuple(measured),
            rationales=example.rationales,
            user=example.user,
            border=len(example.border),
            not_varied=_stretches(~example.varied),
            border_letters=any(
                c.isalnum() for c, varied in zip(example.post, example.varied, strict=True) if not varied
            ),
            contrast=example.contrast,
            cut=example.cut or choose_cut([example.post]),
            pair=example.pair,
        )

    def redacted(self) -> PostResult:
        """A copy with offsets and scores only: no text, no hash a guessed quote could be compared with, no author."""
        citations = tuple(replace(citation, text_hash="") for citation in self.citations)
        return replace(self, post=None, explanation=None, label_text=None, citations=citations, user=None)

    def evidence(self, null: str = "circular", n_boot: int = 2000, seed: int = 0) -> Evidence:
        """Runs all checks (``crosscheck.examine``)."""
        return examine(
            self.attributions,
            self.citations,
            example_id=self.id,
            length=self.length,
            units=self.units,
            label=self.label,
            explanation_length=self.explanation_length,
            cues=self.cues,
            decoys=self.decoys,
            measured=self.measured,
            rationales=self.rationales,
            user=self.user,
            null=null,
            n_boot=n_boot,
            seed=seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Only JSON types; ``from_dict`` gives an equal result back."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain | {
            "citations": [citation.to_dict() for citation in self.citations],
            "attributions": [attribution.to_dict() for attribution in self.attributions],
            "measured": [check.to_dict() for check in self.measured],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PostResult:
        """Inverse of ``to_dict``.

        Raises:
            KeyError, TypeError, ProbeInputError: written by another version, or damaged.
        """
        read: dict[str, Any] = {name: values[name] for name in cls.__dataclass_fields__}
        for name in ("units", "cues", "decoys", "rationales", "not_varied"):
            read[name] = None if read[name] is None else tuple((a, b) for a, b in read[name])
        read["citations"] = tuple(Citation.from_dict(item) for item in read["citations"])
        read["attributions"] = tuple(Attribution.from_dict(item) for item in read["attributions"])
        read["measured"] = tuple(Check.from_dict(item) for item in read["measured"])
        read["counterfactuals"] = tuple((a, b) for a, b in read["counterfactuals"])
        return cls(**read)


def _stretches(mask: np.ndarray) -> tuple[Span, ...]:
    starts, ends = stats.runs(mask)
    return tuple((int(a), int(b)) for a, b in zip(starts, ends, strict=True))


def read_json(path: Path) -> Any:
    """Parsed JSON.

    Raises:
        ProbeInputError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ProbeInputError(f"{path}: cannot read ({error.strerror or error})") from error
    except ValueError as error:
        raise ProbeInputError(f"{path}: not JSON ({error})") from error


@dataclass(frozen=True, eq=False)
class Run(Shown):
    """A finished run. ``evidence``: the checks of ``results`` where they are at hand, else made again when needed."""

    manifest: dict[str, Any]
    summary: dict[str, Any]
    results: tuple[PostResult, ...]
    evidence: tuple[Evidence, ...] | None = None


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a finished run.

    Raises:
        ProbeInputError: not a run directory, unfinished, or written by another version.
    """
    directory = Path(directory)
    if not (directory / "manifest.json").is_file():
        raise ProbeInputError(f"{directory}: no manifest.json here; give the directory that `probes run --out` wrote")
    manifest = read_json(directory / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("kind") != "probes":
        raise ProbeInputError(f"{directory}/manifest.json: not written by `probes run`")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        found = manifest.get("schema_version")
        raise ProbeInputError(f"{directory}: schema version {found}, this version reads {SCHEMA_VERSION}; run it again")
    if manifest.get("status") != "done":
        raise ProbeInputError(f"{directory}: the run is not finished; the same `probes run` command continues it")
    return manifest


def read_run(directory: str | Path) -> Run:
    """A finished run with all its posts.

    Raises:
        ProbeInputError: see ``read_manifest``; or a file of it is missing or damaged (named, with what to do).
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    results = []
    for name in manifest["cache"]:
        path = directory / "cache" / name
        try:
            results.append(PostResult.from_dict(read_json(path)))
        except (KeyError, TypeError, ProbeInputError) as error:
            raise ProbeInputError(f"{path}: missing or damaged; the same `probes run` command repairs it") from error
    if "authors" in manifest:  # of a redacted run: pseudonyms, which no cached post holds
        results = [replace(r, user=who) for r, who in zip(results, manifest["authors"], strict=True)]
    return Run(manifest, read_json(directory / "summary.json"), tuple(results))


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
