"""Probes a whole data set: resumable at any point, every post cached under a hash of all its numbers depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.align import align, merge_spans
from probes.crosscheck import Evidence, post_units
from probes.errors import ProbeInputError
from probes.export import export
from probes.files import write_json
from probes.model import Attribution, Example
from probes.report import write_report
from probes.results import SCHEMA_VERSION, PostResult, Run, cited_target, read_json
from probes.summary import summarise

if TYPE_CHECKING:
    from probes.attribute import Settings
    from probes.model import Probe

Progress = Callable[[int, int], None]

# fast can screen but never judge: it has one family that may speak. full: IG to 1 %, finer clauses.
BUDGETS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "fast": (("erase", "gradnorm"), {}),
    "standard": (("ig", "erase", "gradnorm"), {}),
    "full": (("ig", "erase", "gradnorm"), {"tolerance": 0.01, "max_steps": 1024, "max_units": 60}),
}


def run_suite(
    probe: Probe,
    rows: Iterable[Mapping[str, Any]],
    out: str | Path,
    budget: str = "standard",
    limit: int | None = None,
    redact: bool = False,
    progress: Progress | None = None,
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Attributes, aligns and cross-checks every row, and writes the run directory (``probes.results``).

    Killed at any point, the same call continues: finished posts are read back from ``out/cache``. Results do not depend
    on where it was interrupted.

    Args:
        rows: rows of generations.jsonl (``probes.encode.read_generations``).
        out: directory; made if needed.
        budget: fast | standard | full.
        limit: only the first so many rows.
        redact: write no text of any post or explanation anywhere under ``out``.
        progress: called with (posts done, posts in all).

    Returns:
        what is written to ``summary.json`` (``probes.summary.summarise``).

    Raises:
        ProbeInputError: unknown budget, a row that can not be laid out, no row with a label, or ``redact`` into the
            directory of an unredacted run.
        ProbeError: a file can not be written.
    """
    from probes.attribute import Settings

    out = Path(out)
    prepare(out, budget, limit, redact)
    methods, changes = BUDGETS[budget]
    settings = Settings(seed=seed, **changes)
    # Every row is laid out before the first is attributed: a bad row must not surface after an hour.
    rows = list(rows)[:limit]
    examples = [probe.encode(dict(row)) for row in rows]
    skipped = [{"id": e.id, "reason": "no label was parsed from the output"} for e in examples if not e.label_text]
    examples = [e for e in examples if e.label_text]
    if not examples:
        raise ProbeInputError(
            f"none of the {len(rows)} rows has a label to attribute (label_text is null in all of them)"
        )
    manifest = _manifest(probe, budget, settings, redact, limit, len(rows), skipped)
    write_json(out / "manifest.json", manifest | {"status": "running"})
    results, names = [], []
    for done, example in enumerate(examples):
        if progress:
            progress(done, len(examples))
        name = f"{_key(example, probe.fingerprint, methods, settings, redact)}.json"
        result = _cached(out / "cache" / name)
        if result is None:
            result = _result(probe, example, methods, settings)
            result = result.redacted() if redact else result
            write_json(out / "cache" / name, result.to_dict())
        results.append(result)
        names.append(name)
    if progress:
        progress(len(examples), len(examples))
    evidence = [result.evidence(n_boot=n_boot, seed=seed) for result in results]
    summary = summarise(results, evidence, n_boot=n_boot, seed=seed) | {"skipped": len(skipped)}
    _write_run(out, results, evidence, summary, manifest | {"cache": names})
    return summary


def _result(probe: Probe, example: Example, methods: Sequence[str], settings: Settings) -> PostResult:
    from probes.attribute import attribute
    from probes.faithfulness import cited_effects

    citations = align(example)
    targets = ("label", "explanation") if example.explanation else ("label",)
    # What each cited phrase is written from. Erasure reads every target from the same passes, so only it is asked.
    phrases = tuple(dict.fromkeys(cited_target(c) for c in citations)) if example.explanation else ()
    attributions: list[Attribution] = []
    for method in methods:
        attributions += attribute(probe, example, (method,), targets + phrases * (method == "erase"), settings)
    spans = merge_spans(span for citation in citations for span in citation.post_char)
    judged = any(a.method == "ig" for a in attributions)  # the fast budget screens; it does not pay for this
    measured = cited_effects(probe, example, spans) if spans and judged else ()
    return PostResult.of(example, citations, attributions, post_units(attributions, example.post), measured)


def _write_run(
    out: Path,
    results: Sequence[PostResult],
    evidence: Sequence[Evidence],
    summary: dict[str, Any],
    manifest: dict[str, Any],
) -> None:
    """Everything but the cache; the manifest says "done" last."""
    write_json(out / "summary.json", summary)
    manifest = manifest | {"status": "done"}
    run = Run(manifest, summary, tuple(results), tuple(evidence))
    export(run, out)
    write_report(run, out / "report.html")
    write_json(out / "manifest.json", manifest)


def _key(example: Example, model_fp: str, methods: Sequence[str], settings: Settings, redact: bool) -> str:
    """Hash of everything a cached post depends on: row, model, methods, settings, format, redaction."""
    parts = [SCHEMA_VERSION, model_fp, list(methods), dataclasses.asdict(settings), redact, example.to_dict()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _cached(path: Path) -> PostResult | None:
    """A finished post, or None when there is none or it can not be read (it is then made again)."""
    if not path.is_file():
        return None
    try:
        return PostResult.from_dict(read_json(path))
    except (KeyError, TypeError, ValueError, ProbeInputError):
        return None


def prepare(out: str | Path, budget: str = "standard", limit: int | None = None, redact: bool = False) -> None:
    """Refuses what can be refused before a model is loaded; changes nothing.

    Raises:
        ProbeInputError: unknown budget, limit below 1, ``out`` is not for us, or ``redact`` over an unredacted run.
    """
    out = Path(out)
    if budget not in BUDGETS:
        raise ProbeInputError(f"budget {budget!r}: choose from {', '.join(BUDGETS)}")
    if limit is not None and limit < 1:
        raise ProbeInputError(f"limit {limit}: at least 1")
    if out.exists() and not out.is_dir():
        raise ProbeInputError(f"{out}: a file is in the way; give a directory")
    if not (out / "manifest.json").is_file():
        return
    found = read_json(out / "manifest.json")
    if not isinstance(found, dict) or found.get("kind") != "probes":
        raise ProbeInputError(f"{out}/manifest.json: belongs to something else; give another --out")
    if redact and not found.get("redact"):
        raise ProbeInputError(
            f"{out}: holds an unredacted run, text stays in its cache; give another --out or delete it"
        )


def _manifest(
    probe: Probe,
    budget: str,
    settings: Settings,
    redact: bool,
    limit: int | None,
    n_rows: int,
    skipped: list[dict[str, str]],
) -> dict[str, Any]:
    names = ("torch", "transformers", "peft", "captum", "numpy")
    versions = {name: metadata.version(name) for name in names if _installed(name)}
    return {
        "kind": "probes",
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": probe.name,
        "model_fp": probe.fingerprint,
        "dtype": str(probe.dtype).removeprefix("torch."),
        "device": str(probe.device),
        "budget": budget,
        "methods": list(BUDGETS[budget][0]),
        "settings": dataclasses.asdict(settings),
        "redact": redact,
        "limit": limit,
        "rows": n_rows,
        "skipped": skipped,
        "versions": {"python": platform.python_version(), **versions},
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
