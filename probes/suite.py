"""Probes a whole data set: resumable at any point, every post cached under a hash of all its numbers depend on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.checks.crosscheck import Evidence, post_units
from probes.checks.swaps import Swap, counterpart, pairs, swap
from probes.checks.verdict import FAMILIES
from probes.citations.align import align, merge_spans
from probes.citations.clauses import choose_cut
from probes.citations.normalise import is_cjk
from probes.errors import ProbeError, ProbeInputError
from probes.files import write_json
from probes.records import Attribution, Example
from probes.report.page import write_report
from probes.results.export import export
from probes.results.store import SCHEMA_VERSION, PostResult, Run, Suite, cited_target, read_json
from probes.results.summary import summarise
from probes.saliency.settings import METHODS, NEED_FILLERS

if TYPE_CHECKING:
    from probes.probe import Probe
    from probes.saliency.attribute import Settings

Progress = Callable[[float, int], None]

# fast can screen but never judge: it has one family that may speak. standard: erasure with and without a hole, so that
# what missing text does is told from what the words do (``checks.offset``). full: IG to 1 %, finer clauses, more maps
# per family, gates on every map, and what needs more passes or generation (``checks.gates``, ``checks.behaviour``).
_FULL = ("ig", "erase", "ig_filler", "gradshap", "erase_resample", "shap", "gradnorm", "gxi")
BUDGETS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "fast": (("erase", "gradnorm"), {}),
    "standard": (("ig", "erase", "erase_resample", "gradnorm"), {}),
    "full": (_FULL, {"tolerance": 0.01, "max_steps": 1024, "max_units": 60}),
}
_RANDOMISED = 8  # posts of the full budget whose maps are made again with the weights drawn anew
_FILLERS = 64  # clauses of other posts per post, drawn once per run


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
) -> Suite:
    """Attributes, aligns and cross-checks every row, and writes the run directory (``probes.results.store``).

    Killed at any point, the same call continues: finished posts, and finished maps of a post, are read back from
    ``out/cache``. Results do not depend
    on where it was interrupted, nor on how many processes share the work (``accelerate launch -m probes run ...``: each
    makes its share of the posts, the first gathers them from the cache and writes the run).

    Args:
        rows: rows of generations.jsonl (``probes.models.encode.read_generations``).
        out: directory; made if needed.
        budget: fast | standard | full.
        limit: only the first so many rows.
        redact: write no text of any post or explanation anywhere under ``out``.
        progress: called with (posts done, posts in all); between posts with a part of one, after each map.

    Returns:
        what is written to ``summary.json`` (``probes.results.summary.summarise``), a dict that knows its run
        (``probes.results.store.Suite``); empty in processes other than the first.

    Raises:
        ProbeInputError: unknown budget, a row that can not be laid out, no row with a label, or ``redact`` into the
            directory of an unredacted run.
        ProbeError: a file can not be written.
    """
    from probes.saliency.attribute import Settings

    out = Path(out)
    prepare(out, budget, limit, redact)
    settings = Settings(seed=seed, **BUDGETS[budget][1])
    # Every row is laid out before the first is attributed: a bad row must not surface after an hour.
    rows = list(rows)[:limit]
    examples = [probe.encode(dict(row)) for row in rows]
    skipped = [{"id": e.id, "reason": "no label was parsed from the output"} for e in examples if not e.label_text]
    examples = [e for e in examples if e.label_text]
    cut = choose_cut([e.post for e in examples])
    examples = [dataclasses.replace(e, cut=cut) for e in examples]
    if not examples:
        raise ProbeInputError(
            f"none of the {len(rows)} rows has a label to attribute (label_text is null in all of them)"
        )
    swapped = pairs(examples)
    plan = _plan(examples, budget, seed)
    manifest = _manifest(probe, budget, plan.methods, settings, redact, limit, len(rows), skipped)
    manifest |= {"cut": cut, "border_tokens": sum(len(e.border) for e in examples)}
    rank, world = _rank()
    if rank == 0:
        write_json(out / "manifest.json", manifest | {"status": "running"})
    made: dict[int, tuple[str, PostResult]] = {}
    # With several processes each makes every world-th post; then the first reads what the others made.
    order = sorted(range(len(examples)), key=lambda i: (i % world != rank, i))
    for done, at in enumerate(order if rank == 0 else [i for i in order if i % world == rank]):
        example = examples[at]
        if progress:
            progress(done, len(examples))
        name = f"{_key(example, probe.fingerprint, plan, at, settings, redact)}.json"
        path = out / "cache" / name
        result = _awaited(path, at, world) if at % world != rank else _cached(path)
        if result is None:
            # The longest row first: a model that cannot be probed is refused before the first post.
            probe.scorer.check(max(examples, key=lambda e: len(e.ids)))
            within = None if progress is None else functools.partial(_within, progress, done, len(examples))
            result = _result(probe, example, plan, at, settings, path, within)
            result = result.redacted() if redact else result
            write_json(path, result.to_dict())
            for part in path.parent.glob(f"{path.stem}.part-*.json"):
                part.unlink(missing_ok=True)
        made[at] = (name, result)
    if rank != 0:
        return Suite({}, out)
    names, results = (list(column) for column in zip(*(made[at] for at in range(len(examples))), strict=True))
    if redact:  # which posts share an author is kept, who it is is not
        authors = {user: f"author {i}" for i, user in enumerate(dict.fromkeys(e.user for e in examples if e.user))}
        known = [authors.get(e.user or "") for e in examples]
        results = [dataclasses.replace(r, user=who) for r, who in zip(results, known, strict=True)]
        manifest |= {"authors": known}
    if progress:
        progress(len(examples), len(examples))
    evidence = [result.evidence(n_boot=n_boot, seed=seed) for result in results]
    swaps: list[Swap] = []
    for a, b in swapped:
        swaps += _swaps(probe, (examples[a], examples[b]), plan.fillers[b], (results[a], results[b]), settings, out)
    summary = summarise(results, evidence, n_boot=n_boot, seed=seed, swaps=swaps) | {"skipped": len(skipped)}
    summary["randomisation"] = _randomisation(probe, examples[:_RANDOMISED], out, seed) if plan.deep else None
    _write_run(out, results, evidence, summary, manifest | {"cache": names})
    return Suite(summary, out)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What one run does to each post: methods, fillers per post, other rows to exchange with, how deep to look."""

    methods: tuple[str, ...]
    fillers: tuple[tuple[str, ...], ...]
    examples: tuple[Example, ...]
    deep: bool
    seed: int


def _plan(examples: Sequence[Example], budget: str, seed: int) -> _Plan:
    """Fillers are clauses of other posts of the same task and script; a post without any goes without the methods that
    need them."""
    from probes.citations.clauses import pieces

    methods = BUDGETS[budget][0]
    if not set(methods) & set(NEED_FILLERS):
        return _Plan(methods, ((),) * len(examples), tuple(examples), budget == "full", seed)
    cut = [[e.post[a:b] for a, b in pieces(e.post, cut=e.cut)] for e in examples]
    kinds = [(e.task, _script(e.post)) for e in examples]
    fillers = []
    for i, kind in enumerate(kinds):
        pool = [t for j, texts in enumerate(cut) if j != i and kinds[j] == kind for t in texts]
        fillers.append(tuple(random.Random(f"{seed} {i}").sample(pool, min(_FILLERS, len(pool)))))
    if not any(fillers):
        methods = tuple(m for m in methods if m not in NEED_FILLERS)
    return _Plan(methods, tuple(fillers), tuple(examples), budget == "full", seed)


def _able(plan: _Plan, at: int) -> tuple[str, ...]:
    """The methods a post can have: those that put other text in its place need other text."""
    return tuple(m for m in plan.methods if plan.fillers[at] or m not in NEED_FILLERS)


def _script(post: str) -> str:
    wide = sum(map(is_cjk, post))
    return "wide" if 3 * wide >= len(post) else "narrow"


def _rank() -> tuple[int, int]:
    """(rank, processes) as `accelerate launch` and `torchrun` set them; (0, 1) otherwise."""
    return int(os.environ.get("RANK", "0")), max(1, int(os.environ.get("WORLD_SIZE", "1")))


def _awaited(path: Path, at: int, world: int, patience: float = 3600.0) -> PostResult:
    """The post that another process makes.

    Raises:
        ProbeError: it did not come within ``patience`` seconds.
    """
    began = time.monotonic()
    while (result := _cached(path)) is None:
        if time.monotonic() - began > patience:
            raise ProbeError(f"{path}: process {at % world} has not made this post in {patience:.0f} s; did it stop?")
        time.sleep(0.2)
    return result


def _within(progress: Progress, done: int, total: int, share: float) -> None:
    progress(done + share, total)


def _maps(
    probe: Probe,
    example: Example,
    calls: Sequence[tuple[str, tuple[str, ...]]],
    settings: Settings,
    fillers: Sequence[str],
    path: Path,
    within: Callable[[float], None] | None,
) -> list[Attribution]:
    """The maps of one post, each call kept beside its cache file as soon as it is made: on a real model a post takes
    minutes, and Ctrl-C must not cost them. A map holds no text."""
    from probes.saliency.attribute import attribute

    maps: list[Attribution] = []
    for step, (method, targets) in enumerate(calls):
        part = path.with_name(f"{path.stem}.part-{step}.json")
        found: list[Attribution] | None = None
        if part.is_file():
            with contextlib.suppress(KeyError, TypeError, ValueError, ProbeInputError):
                found = [Attribution.from_dict(item) for item in read_json(part)]
        if found is None:
            found = attribute(probe, example, (method,), targets, settings, fillers)
            write_json(part, [a.to_dict() for a in found])
        maps += found
        if within:
            within((step + 1) / (len(calls) + 1))
    return maps


def _result(
    probe: Probe,
    example: Example,
    plan: _Plan,
    at: int,
    settings: Settings,
    path: Path,
    within: Callable[[float], None] | None,
) -> PostResult:
    from probes.checks.faithfulness import cited_effects

    citations = align(example)
    targets = ("label", "explanation") if example.explanation else ("label",)
    # What each cited phrase is written from. Erasure reads every target from the same passes, so only it is asked.
    phrases = tuple(dict.fromkeys(cited_target(c) for c in citations)) if example.explanation else ()
    calls: list[tuple[str, tuple[str, ...]]] = []
    for method in _able(plan, at):
        if METHODS[method][0] in ("erase", "shap", "kernelshap"):  # one pass serves all targets
            calls.append((method, targets + phrases * (method == "erase")))
        else:
            calls += [(method, (target,)) for target in targets]
    maps = _maps(probe, example, calls, settings, plan.fillers[at], path, within)
    spans = merge_spans(span for citation in citations for span in citation.post_char)
    judged = any(a.method == "ig" for a in maps)  # the fast budget screens; it does not pay for this
    measured = list(cited_effects(probe, example, spans)) if spans and judged else []
    moved: tuple[tuple[float, float], ...] = ()
    if plan.deep:
        from probes.checks.behaviour import counterfactuals, mediation_share, weight_of_evidence
        from probes.checks.gates import judge, max_sensitivity

        donors = [e for j, e in enumerate(plan.examples) if j != at]
        measured += [weight_of_evidence(probe, example), mediation_share(probe, example, donors)]
        measured += judge(probe, example, maps, settings)
        measured += max_sensitivity(probe, example, maps, settings, plan.fillers[at])
        moved = counterfactuals(probe, example, plan.fillers[at], seed=plan.seed)
    result = PostResult.of(example, citations, maps, post_units(maps, example.post, example.cut), measured)
    return dataclasses.replace(result, counterfactuals=moved)


def _swaps(
    probe: Probe,
    pair: tuple[Example, Example],
    fillers: Sequence[str],
    results: tuple[PostResult, PostResult],
    settings: Settings,
    out: Path,
) -> list[Swap]:
    """One swap pair by every method that may give a verdict; the second post's maps for the first's answer are kept in
    the cache like a post."""
    from probes.saliency.attribute import attribute

    (first, second), (one, other) = pair, results
    methods = [a.method for a in one.attributions if a.target == "label" and a.method in FAMILIES]
    if first.label_text == second.label_text and first.ids[first.prompt_len :] == second.ids[second.prompt_len :]:
        maps = [a for a in other.attributions if a.target == "label"]
    else:
        moved = counterpart(first, second)
        able = [m for m in methods if fillers or m not in NEED_FILLERS]
        parts = [
            SCHEMA_VERSION,
            probe.fingerprint,
            able,
            dataclasses.asdict(settings),
            list(fillers),
            moved.to_dict(),
        ]
        path = out / "cache" / f"swap-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.json"
        if path.is_file():
            maps = [Attribution.from_dict(item) for item in read_json(path)]
        else:
            maps = attribute(probe, moved, able, ("label",), settings, fillers)
            write_json(path, [a.to_dict() for a in maps])
    found = [
        swap(a, b, (first.post, second.post), (one.units, other.units), str(first.pair), first.user)
        for a in one.attributions
        for b in maps
        if a.target == "label" and a.method == b.method and a.method in methods
    ]
    return [s for s in found if s is not None]


def _randomisation(probe: Probe, examples: Sequence[Example], out: Path, seed: int) -> dict[str, Any]:
    """``probes.checks.randomise.study`` of a few posts, kept in the cache like a post."""
    from probes.checks.randomise import study

    parts = [SCHEMA_VERSION, probe.fingerprint, seed, [list(e.ids) for e in examples]]
    path = out / "cache" / f"randomised-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.json"
    if path.is_file():
        with contextlib.suppress(ProbeInputError):
            return read_json(path)
    found = study(probe, examples, seed=seed)
    write_json(path, found)
    return found


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


def _key(example: Example, model_fp: str, plan: _Plan, at: int, settings: Settings, redact: bool) -> str:
    """Hash of everything a cached post depends on: row, model, methods, settings, format, redaction, other posts."""
    parts = [SCHEMA_VERSION, model_fp, list(plan.methods), dataclasses.asdict(settings), redact, example.to_dict()]
    parts.append(list(plan.fillers[at]))
    if plan.deep:
        parts.append([list(e.ids) for e in plan.examples])
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
    methods: Sequence[str],
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
        "methods": list(methods),
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
