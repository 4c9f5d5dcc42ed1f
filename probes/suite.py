"""Probes a whole data set: resumable at any point, every post cached under a hash of all its numbers depend on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import platform
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.checks.crosscheck import Evidence
from probes.checks.swaps import LeftOut, Swap, pairs
from probes.citations.clauses import choose_cut
from probes.citations.normalise import is_cjk, normalise
from probes.errors import ProbeInputError, ProbeWarning, RowRefused
from probes.files import write_json
from probes.models.abilities import Abilities
from probes.models.trial import told
from probes.post import Plan, Steps, chained, probe_post, swap_pair
from probes.records import ASKED, Example, one_name, somebody
from probes.report.page import write_report
from probes.results.borne import MOST_BOOT, MOST_SEED
from probes.results.cache import Cache, digest
from probes.results.export import NAMES, export
from probes.results.lock import held, refuse_held
from probes.results.posts import PostResult
from probes.results.store import SCHEMA_VERSION, Run, Suite, in_words, read_manifest_file, short_name
from probes.results.summary import summarise
from probes.saliency.settings import NEED_FILLERS, NEED_GRADIENTS
from probes.workers import awaited, launched, shares

if TYPE_CHECKING:
    from probes.probe import Probe
    from probes.saliency.attribute import Settings

Progress = Callable[[float, int], None]

# fast can screen but never judge: it has one family that may speak. standard: erasure with and without a hole, so that
# what missing text does is told from what the words do (``checks.erasure_offset``). full: IG to 1 %, finer clauses,
# more maps per family, gates on every map, and what needs more passes or generation (``checks.gates``,
# ``checks.behaviour``).
_FULL = ("ig", "erase", "ig_filler", "gradshap", "erase_resample", "shap", "gradnorm", "gxi")
BUDGETS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "fast": (("erase", "gradnorm"), {}),
    "standard": (("ig", "erase", "erase_resample", "gradnorm"), {}),
    "full": (_FULL, {"tolerance": 0.01, "max_steps": 1024, "max_units": 60}),
}
NO_LABEL = "no label was parsed from the output"
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
    max_memory: int | float | None = None,
    tell: Callable[[str], None] | None = None,
    ask: str = "explanation",
    working: Callable[[int], bool] = lambda rank: True,
) -> Suite:
    """Attributes, aligns and cross-checks every row, and writes the run directory (``probes.results.store``).

    Killed at any point, the same call continues: finished posts, and finished steps of a post (each map, each check
    that runs the model), are read back from ``out/cache``. Results do not depend on where it was interrupted, nor on
    how many processes share the work (``accelerate launch -m probes run ...``: each makes its share of the posts, the
    first gathers them from the cache and writes the run).

    Rows that cannot be probed are left out: a line says so before the first post, ``skipped_by_reason`` counts them.

    Args:
        rows: rows of generations.jsonl (``probes.models.encode.read_generations``).
        out: directory; made if needed.
        budget: fast | standard | full.
        limit: only the first so many rows.
        redact: write no text of any post or explanation anywhere under ``out``.
        progress: called with (posts done, posts in all); between posts with a part of one, after each step.
        max_memory: GiB that weights, kept prefix and batches may take together; None: as the engine likes it.
        tell: called before the first post with a line that says how the model is scored and what that takes.
        ask: explanation | reasoning: what is asked whether it cites what the label was made from.
        working: whether process i of several is still at work; this one makes what another has left.

    Returns:
        what is written to ``summary.json`` (``probes.results.summary.summarise``), a dict that knows its run
        (``probes.results.store.Suite``); empty in processes other than the first.

    Raises:
        ProbeInputError: unknown budget, rows of another format or model, no row that can be probed, ``redact`` into
            the directory of an unredacted run, ``max_memory`` is too little for one row, or ``seed`` or ``n_boot``
            is out of bounds.
        ProbeError: a file cannot be written.
    """
    from probes.saliency.attribute import Settings

    out = Path(out)
    prepare(out, budget, limit, redact, max_memory, ask)
    rank, world = launched()
    if not 0 <= seed < MOST_SEED or not 0 <= n_boot <= MOST_BOOT:
        raise ProbeInputError(f"seed is 0 to {MOST_SEED - 1}, n_boot 0 to {MOST_BOOT}, not {seed} and {n_boot}")
    settings = Settings(seed=seed, **BUDGETS[budget][1])
    rows = list(rows)[:limit]
    examples, skipped = lay_out(probe, rows, ask)
    if skipped and rank == 0:
        said = f"{len(skipped)} of {len(rows)} rows left out: {in_words(Counter(one['reason'] for one in skipped))}"
        warnings.warn(said, ProbeWarning, stacklevel=2)
    plan = _plan(examples, budget, seed)
    if redact:  # what is wrong with a row may quote it
        skipped = [{"id": one["id"], "reason": one["reason"]} for one in skipped]
    manifest = _manifest(probe, budget, plan.methods, settings, redact, limit, len(rows), skipped)
    manifest |= {"cut": examples[0].cut, "border_tokens": sum(len(e.border) for e in examples), "ask": ask}
    manifest["cut_off"] = sum(row.get("finish") == "length" for row in rows)  # by the token limit, as the file says
    with contextlib.ExitStack() as stack:
        if rank == 0:  # the processes of one launch share the directory; their first holds it
            stack.enter_context(held(out))
            write_json(out / "manifest.json", manifest | {"status": "running"}, private=not redact)
        stack.enter_context(probe.scorer.unchanged())
        prepared = functools.cache(functools.partial(_try, probe, examples, max_memory, tell, manifest))
        if not _all_kept(Cache(out, redact), probe.fingerprint, plan, settings, redact):
            prepared()
            assert probe.scorer.tried is not None
            plan = _within_reach(plan, probe.scorer.tried.can, manifest)
        return _carry_out(
            probe, examples, plan, settings, manifest, out, (rank, world), working, progress, n_boot, prepared
        )


def _try(
    probe: Probe,
    examples: Sequence[Example],
    max_memory: int | float | None,
    tell: Callable[[str], None] | None,
    manifest: dict[str, Any],
) -> None:
    """Tries the model on the longest row, and on that with the longest prefix: one that cannot be probed is refused
    before the first post. What was found goes into ``manifest``, and is told."""
    scorer = probe.scorer
    scorer.settle(examples)
    if max_memory is not None:
        scorer.fit(int(max_memory * 2**30))
    assert scorer.tried is not None
    tried, memory = scorer.tried, scorer.memory
    known = {name: gap for name, gap in tried.gaps.items() if math.isfinite(gap)}
    manifest["engine"] = {**dataclasses.asdict(tried), "gaps": known, "memory": memory}
    if tell is not None:
        tell(told(tried, memory))


def lay_out(
    probe: Probe, rows: Sequence[Mapping[str, Any]], ask: str = "explanation"
) -> tuple[list[Example], list[dict[str, str]]]:
    """Every row, laid out before the first is attributed: a bad row must not surface after an hour, nor stop the rest.

    Returns:
        the rows that can be probed, cut alike; and of each of the others its ``id``, the ``reason`` in words that rows
        share, and ``said``, what is wrong with this one.
    Raises:
        ProbeInputError: rows of another format or model, or none that can be probed.
    """
    examples: list[Example] = []
    skipped: list[dict[str, str]] = []
    for row in rows:
        try:
            example = probe.encode(dict(row))
            if not example.label_text:
                raise RowRefused(example.id, "label_text is null or empty", NO_LABEL)
            if example.post_tok[1] >= example.prompt_len:
                said = "the post ends the prompt, so hiding its last token cannot erase it; put text after the post"
                raise RowRefused(example.id, said, "the post ends the prompt")
            if ask == "reasoning" and example.chain is None:
                said = "no reasoning stands before the label, so there is none to ask"
                raise RowRefused(example.id, said, "no reasoning before the label")
            examples.append(example.asked(ask))
        except RowRefused as error:
            skipped.append({"id": str(row.get("id")), "reason": error.reason, "said": str(error)})
    if not examples:
        first = next((one["said"] for one in skipped if one["reason"] != NO_LABEL), "")
        why = f"{in_words(Counter(one['reason'] for one in skipped))}{f' ({first})' if first else ''}"
        raise ProbeInputError(f"none of the {len(rows)} rows can be probed: {why}")
    cut = choose_cut([e.post for e in examples])
    return _copies([dataclasses.replace(e, cut=cut) for e in examples]), skipped


def _copies(examples: Sequence[Example]) -> list[Example]:
    """Rows of one post (width, case and marks apart) are not independent, however many answers to it there are, and
    whoever is named as its author: they are given one author in common. Authors who share a post become one."""
    texts = [normalise(example.post).text for example in examples]
    first: dict[str, str] = {}  # author, or text of an unnamed post -> another of the same group

    def root(name: str) -> str:
        while (up := first.setdefault(name, name)) != name:
            first[name] = name = first[up]  # shortens the way for the next
        return name

    spelt: dict[str, str] = {}  # an author in another case or width, or with a character nobody sees, is no other
    owners = [f"post {text}" if (who := somebody(e.user)) is None else f"user {spelt.setdefault(one_name(who), who)}"
              for e, text in zip(examples, texts, strict=True)]  # fmt: skip
    for owner, text in zip(owners, texts, strict=True):
        low, high = sorted((root(owner), root(f"post {text}")), reverse=True)  # "user ..." is kept before "post ..."
        first[high] = low
    groups = [root(owner) for owner in owners]
    many = [group for group, count in Counter(groups).items() if count > 1 and group.startswith("post ")]
    names = {group: f"copies {i}" for i, group in enumerate(many)}
    return [dataclasses.replace(e, user=group.removeprefix("user ") if group.startswith("user ") else names.get(group))
            for e, group in zip(examples, groups, strict=True)]  # fmt: skip


def _carry_out(
    probe: Probe,
    examples: Sequence[Example],
    plan: Plan,
    settings: Settings,
    manifest: dict[str, Any],
    out: Path,
    place: tuple[int, int],
    working: Callable[[int], bool],
    progress: Progress | None,
    n_boot: int,
    prepared: Callable[[], None],
) -> Suite:
    """What ``run_suite`` does once everything is laid out and the directory is ours.

    Args:
        prepared: to be called before the model is, or what is kept of swapped rows is asked for.
    """
    (rank, world), redact, seed = place, bool(manifest["redact"]), plan.seed
    cache = Cache(out, redact)
    made: dict[int, tuple[str, PostResult]] = {}
    # With several processes each makes every world-th post; then the first reads what the others made.
    for done, at in enumerate(shares(len(examples), rank, world)):
        example = examples[at]
        if progress:
            progress(done, len(examples))
        name = cache.name(_depends(example, probe.fingerprint, plan, at, settings, redact))
        find = functools.partial(_cached, cache, name)
        theirs = at % world != rank
        result = awaited(find, functools.partial(working, at % world), cache.directory / name) if theirs else find()
        if result is None:
            prepared()
            within = None if progress is None else functools.partial(_within, progress, done, len(examples))
            result = probe_post(probe, example, plan, at, settings, cache, name, within)
            result = result.redacted() if redact else result
            cache.write(name, result.to_dict())
        cache.forget_parts(name)  # also of a post that was finished when the run was stopped
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
    swaps: list[Swap | LeftOut] = []
    found, no_pair = pairs(examples)
    if found:
        prepared()  # maps of swapped rows are named by how the model is called with the rows of the run
    for a, b in found:
        swaps += swap_pair(
            probe, (examples[a], examples[b]), plan.fillers[b], (results[a], results[b]), settings, cache
        )
    if redact:  # a pair's id is the user's own words
        numbers = {pair: f"pair {i}" for i, pair in enumerate(dict.fromkeys(s.pair for s in swaps))}
        swaps = [dataclasses.replace(s, pair=numbers[s.pair]) for s in swaps]
    study = _randomisation(probe, examples[:_RANDOMISED], plan, cache) if plan.deep else None
    summary = summarise(results, evidence, n_boot=n_boot, seed=seed, swaps=swaps) | {
        "skipped": len(manifest["skipped"]),
        "skipped_by_reason": dict(Counter(one["reason"] for one in manifest["skipped"])),
        "no_pair": no_pair,
        "cut_off": manifest["cut_off"],
        "randomisation": study,
    }
    _write_run(out, results, evidence, summary, manifest | {"cache": names, "n_boot": n_boot})
    return Suite(summary, out)


def _plan(examples: Sequence[Example], budget: str, seed: int) -> Plan:
    """Fillers as by ``fillers_of``; a post without any goes without the methods that need them."""
    methods = BUDGETS[budget][0]
    if not set(methods) & set(NEED_FILLERS):
        return Plan(methods, ((),) * len(examples), tuple(examples), budget == "full", seed, budget != "fast")
    fillers = fillers_of(examples, seed)
    if not any(fillers):
        methods = tuple(m for m in methods if m not in NEED_FILLERS)
    return Plan(methods, tuple(fillers), tuple(examples), budget == "full", seed, budget != "fast")


def _within_reach(plan: Plan, can: Abilities, manifest: dict[str, Any]) -> Plan:
    """The plan without what the model cannot do, which ``manifest`` is told, and by it the report."""
    gone = [m for m in plan.methods if can.ungraded and m in NEED_GRADIENTS]
    methods = tuple(m for m in plan.methods if m not in gone)
    said = dict(can.limits)
    if gone:
        said["gradients"] += f" (left out: {', '.join(gone)})"
    manifest |= {"methods": list(methods), "left_out": gone, "limits": list(said.values())}
    return dataclasses.replace(plan, methods=methods, limits=tuple(said))


def _all_kept(cache: Cache, fingerprint: str, plan: Plan, settings: Settings, redact: bool) -> bool:
    """Whether every post is in the cache, made by the whole plan: then the model need not be tried again."""
    names = (cache.name(_depends(e, fingerprint, plan, at, settings, redact)) for at, e in enumerate(plan.examples))
    return all((cache.directory / name).exists() for name in names)


def fillers_of(examples: Sequence[Example], seed: int) -> list[tuple[str, ...]]:
    """For each post clauses of others of its task and script, drawn once per run."""
    from probes.citations.clauses import pieces

    cut = [[e.post[a:b] for a, b in pieces(e.post, cut=e.cut)] for e in examples]
    kinds = [(e.task, _script(e.post)) for e in examples]
    pools: dict[tuple[str, str], list[str]] = {kind: [] for kind in kinds}
    starts = []
    for texts, kind in zip(cut, kinds, strict=True):
        starts.append(len(pools[kind]))
        pools[kind] += texts
    fillers = []
    for i, (start, kind) in enumerate(zip(starts, kinds, strict=True)):
        pool, own = pools[kind], len(cut[i])  # places in the pool without its own; a pool for each would be quadratic
        others = range(len(pool) - own)
        drawn = random.Random(f"{seed} {i}").sample(others, min(_FILLERS, len(others)))
        fillers.append(tuple(pool[at if at < start else at + own] for at in drawn))
    return fillers


def _script(post: str) -> str:
    wide = sum(map(is_cjk, post))
    return "wide" if 3 * wide >= len(post) else "narrow"


def _within(progress: Progress, done: int, total: int, share: float) -> None:
    progress(done + share, total)


def _randomisation(probe: Probe, examples: Sequence[Example], plan: Plan, cache: Cache) -> dict[str, Any]:
    """``probes.checks.randomise.study`` of a few posts, kept in the cache like a post."""
    from probes.checks.randomise import study

    parts = [SCHEMA_VERSION, probe.fingerprint, plan.seed, [e.to_dict() for e in examples], *plan.limits]
    name, methods = cache.name(parts, "randomised-"), tuple(m for m in ("ig", "erase") if m in plan.methods)
    if (found := cache.read(name)) is None:
        found = study(probe, examples, methods, plan.seed, keep=Steps(cache, name).kept)
        cache.write(name, found)
    cache.forget_parts(name)
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
    manifest = manifest | {"status": "done", "summary": digest(summary)}
    run = Run(manifest, summary, tuple(results), tuple(evidence))
    export(run, out)
    write_report(run, out / "report.html")
    write_json(out / "manifest.json", manifest, private=not manifest["redact"])  # ids, and why rows are left out


def _depends(example: Example, model_fp: str, plan: Plan, at: int, settings: Settings, redact: bool) -> list[Any]:
    """Everything a cached post depends on: row, model, methods, settings, format, redaction, other posts."""
    parts = [SCHEMA_VERSION, model_fp, list(plan.methods), dataclasses.asdict(settings), redact, example.to_dict()]
    parts.append(list(plan.fillers[at]))
    if plan.deep or chained(example):
        parts.append(plan.together)
    if plan.limits:
        parts += [list(plan.limits), plan.judged]
    return parts


def _cached(cache: Cache, name: str) -> PostResult | None:
    """A finished post, or None when there is none or it cannot be used (it is then made again, and that is said)."""
    value = cache.read(name)
    try:
        return None if value is None else PostResult.from_dict(value)
    except ProbeInputError as error:
        warnings.warn(f"{cache.directory / name}: {error}; made again", ProbeWarning, stacklevel=2)
        return None


def prepare(
    out: str | Path,
    budget: str = "standard",
    limit: int | None = None,
    redact: bool = False,
    max_memory: int | float | None = None,
    ask: str = "explanation",
) -> None:
    """Refuses what can be refused before a model is loaded; changes nothing.

    Raises:
        ProbeInputError: unknown budget or ``ask``, limit below 1, memory that is no size, ``out`` is not for us, or
            ``redact`` over an unredacted run.
    """
    out = Path(out)
    if budget not in BUDGETS:
        raise ProbeInputError(f"budget {budget!r}: choose from {', '.join(BUDGETS)}")
    if ask not in ASKED:
        raise ProbeInputError(f"ask {ask!r}: choose from {', '.join(ASKED)}")
    if limit is not None and limit < 1:
        raise ProbeInputError(f"limit {limit}: at least 1")
    if max_memory is not None and not 0 < max_memory < 2**20:
        raise ProbeInputError(f"max memory {max_memory:g}: GiB, above 0")
    if out.exists() and not out.is_dir():
        raise ProbeInputError(f"{out}: a file is in the way; give a directory")
    if links := [name for name in ("cache", "private") if (out / name).is_symlink()]:
        raise ProbeInputError(f"{out / links[0]}: is a link; posts are kept in the run's own directory only, remove it")
    if launched()[0] == 0:
        refuse_held(out)
    if not os.path.lexists(out / "manifest.json"):
        if others := [name for name in (*NAMES, "summary.json", "report.html") if os.path.lexists(out / name)]:
            raise ProbeInputError(f"{out / others[0]}: would be replaced, but {out} is not a run's; give another --out")
        return
    found = read_manifest_file(out / "manifest.json")
    if found.get("kind") != "probes":
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
        "model": short_name(probe.name) if redact else probe.name,
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
