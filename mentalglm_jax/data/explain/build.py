"""C-IMHI rebuilt: labelled posts and experts' examples in, explained records out, every step checked and repeatable.

The method is that of IMHI (Yang et al. 2024), which C-IMHI follows: a teacher model sees criteria, two random expert
examples per class and the gold label, and writes the explanation; automatic checks refuse what does not hold
(``checks.py``); people rate a sample (``review.py``). Same recipe, data and cache give the same files, byte for byte.
"""

import asyncio
import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mentalglm_jax.data.contacts import scrub_record
from mentalglm_jax.data.explain import checks
from mentalglm_jax.data.explain.checks import CHECKS, ROW_CHECKS, Candidate, Limits
from mentalglm_jax.data.explain.datasheet import datasheet
from mentalglm_jax.data.explain.endpoint import OpenAITeacher
from mentalglm_jax.data.explain.prompts import Prompts, load_prompts, pick_examples
from mentalglm_jax.data.explain.replies import redact_body, redact_url
from mentalglm_jax.data.explain.teacher import CONTENT_FILTER, TOO_LONG, AnswerCache, Teacher, TeacherConfig
from mentalglm_jax.data.held_out import Split, data_split
from mentalglm_jax.data.imhi import load_imhi_experts
from mentalglm_jax.data.records import SPLITS, Record, read_records, write_records
from mentalglm_jax.data.selection import limited
from mentalglm_jax.data.surrogates import replacing_surrogates
from mentalglm_jax.data.written import check_replaceable, digests, write_manifest
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.files import refuse_inputs, replace_dir, working_in, write_json, write_text
from mentalglm_jax.settings import Settings, load_settings
from mentalglm_jax.text.tasks import TASKS_FILE, added_tasks, write_tasks
from mentalglm_jax.text.thinking import spoken

Progress = Callable[..., None]
_NEVER_REQUIRED = ("label_recoverable",)  # of a weak classifier; reported, and required only where the recipe says so


class BuildData(Settings):
    """Labelled posts: ``sets`` below ``root`` (upstream files), or records (``roots.record_files``). ``dev_fraction``
    of the training part becomes the development part; ``limit`` keeps at most that many records per task, language and
    split, spread evenly over the file; ``accept_unknown_overlap`` and ``replace_surrogates`` as in a training
    recipe."""

    root: Path
    sets: tuple[str, ...] = ()
    dev_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    splits: tuple[Literal["train", "dev", "test"], ...] = ("train", "dev")
    limit: Annotated[int, Field(ge=1)] | None = None
    accept_unknown_overlap: bool = False
    replace_surrogates: bool = False
    scrub: bool = True


class BuildLimits(Settings):
    """Bounds of the checks; ``require`` names those an explanation must pass to be kept."""

    zh_characters: tuple[int, int] = Limits.zh_characters
    en_words: tuple[int, int] = Limits.en_words
    near_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.9
    require: tuple[str, ...] = tuple(name for name in CHECKS if name not in _NEVER_REQUIRED)


class BuildRecipe(Settings):
    """``experts``: a record file with explanations, or a folder of IMHI's expert files. ``prompts``: an own wording.
    ``attempts``: how often the teacher is asked, with other seeds, until its answer passes the row checks."""

    out: Path
    cache: Path
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data: BuildData
    experts: Path
    examples_per_class: Annotated[int, Field(ge=1)] = 2
    prompts: Path | None = None
    attempts: Annotated[int, Field(ge=1)] = 2
    teacher: TeacherConfig
    checks: BuildLimits = BuildLimits()


@dataclass(frozen=True)
class Outcome:
    """One candidate with the checks it failed, and those that could not judge it."""

    candidate: Candidate
    failed: tuple[str, ...]
    attempts: int
    unjudged: tuple[str, ...] = ()


def load_build_recipe(path: str | Path, overrides: Sequence[str] = ()) -> BuildRecipe:
    """Reads a recipe; ``overrides`` are ``a.b=value``. Raises: InputError naming the file and the key."""
    recipe = load_settings(path, BuildRecipe, overrides)
    if unknown := [name for name in recipe.checks.require if name not in CHECKS]:
        raise InputError(f"{path}: checks.require: unknown check {unknown[0]!r}; known: {', '.join(CHECKS)}")
    if recipe.cache.resolve().is_relative_to(recipe.out.resolve()):
        raise InputError(f"{path}: cache lies inside out, which every build replaces; put it elsewhere")
    return recipe


def build(recipe: BuildRecipe, progress: Progress, teacher: Teacher | None = None) -> dict[str, Any]:
    """Asks the teacher, checks, writes ``recipe.out``; returns its manifest.

    Args:
        progress: called with (done, total, text).
        teacher: instead of the endpoint the recipe names (a local model).

    Raises:
        InputError: recipe, data, experts or prompts are wrong, or ``out`` holds something else.
        RunError: the teacher failed or the budget is spent; all answers, those under way included, are in the cache and
            the same call goes on. A post that the teacher's content filter refuses is no failure: it is rejected.
    """
    check_replaceable(recipe.out)
    refuse_inputs(recipe.out, {"data.root": recipe.data.root, "experts": recipe.experts, "prompts": recipe.prompts})
    with replacing_surrogates(recipe.data.replace_surrogates):
        records, split = _gold_records(recipe)
        experts = load_experts(recipe.experts)
    prompts = {language: load_prompts(language, recipe.prompts) for language in sorted({r.language for r in records})}
    _check_experts(recipe, records, experts)
    with working_in(recipe.cache):  # two at once would pay for the same answers twice
        asked = asyncio.run(_ask_all(recipe, records, experts, prompts, progress, teacher))
    outcomes, corpus = _corpus_checked(recipe, asked.outcomes)
    inputs = {"posts": len(records), "posts_sha256": _digest(records), **split.to_dict(), "notes": split.lines,
              "experts": len(experts), "experts_sha256": _digest(experts)}  # fmt: skip
    return _write(recipe, outcomes, corpus, prompts, inputs) | {"teacher": asked.stats}


def _digest(records: Sequence[Record]) -> str:
    lines = (json.dumps(record.to_dict(), ensure_ascii=False, sort_keys=True) + "\n" for record in records)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_experts(path: Path) -> list[Record]:
    """Records with explanations by experts. Raises: InputError if the file or folder holds none."""
    experts = load_imhi_experts(path) if path.is_dir() else read_records(path)
    if bare := [record.id for record in experts if not record.explanation]:
        raise InputError(f"{path}: {len(bare)} expert examples have no explanation, the first is {bare[0]!r}")
    return experts


def _gold_records(recipe: BuildRecipe) -> tuple[list[Record], Split]:
    section = recipe.data
    split = data_split(section.root, section.sets, section.dev_fraction,
                       accept_unknown_overlap=section.accept_unknown_overlap)  # fmt: skip
    kept = limited([record for record in split.records if record.split in section.splits], section.limit)
    kept = [scrub_record(record) for record in kept] if section.scrub else kept
    if not kept:
        raise InputError(f"{section.root}: no record of the splits {', '.join(section.splits)}")
    if repeated := [one for one, count in Counter(record.id for record in kept).items() if count > 1]:
        raise InputError(f"{section.root}: id {repeated[0]!r} stands there twice; ids must differ")
    return kept, split


def _check_experts(recipe: BuildRecipe, records: Sequence[Record], experts: Sequence[Record]) -> None:
    known = checks.checked_languages()
    if strange := next((record for record in records if record.language not in known), None):
        raise InputError(f"{recipe.data.root}: record {strange.id!r} is in {strange.language!r}; explanations can be "
                         f"checked in {', '.join(known)} only")  # fmt: skip
    have = {(record.task, record.language) for record in experts}
    for task, language in sorted({(record.task, record.language) for record in records} - have):
        raise InputError(f"{recipe.experts}: no expert example for task {task} in {language!r}; add some")


# --- asking ---


@dataclass
class _Asked:
    outcomes: list[Outcome]
    stats: Mapping[str, int]


async def _ask_all(
    recipe: BuildRecipe, records: Sequence[Record], experts: Sequence[Record], prompts: Mapping[str, Prompts],
    progress: Progress, teacher: Teacher | None
) -> _Asked:  # fmt: skip
    limits = Limits(recipe.checks.zh_characters, recipe.checks.en_words)
    outcomes: list[Outcome | None] = [None] * len(records)
    waiting = iter(range(len(records)))
    failures: list[Exception] = []
    done = good = 0
    async with contextlib.AsyncExitStack() as stack:
        if teacher is None:
            teacher = await stack.enter_async_context(OpenAITeacher(recipe.teacher, AnswerCache(recipe.cache)))

        async def work() -> None:
            nonlocal done, good
            for number in waiting:
                if failures:
                    return
                try:
                    outcome = await _explain(recipe, records[number], experts, prompts, limits, teacher)
                except Exception as failure:  # of any kind: the others' answers under way are paid for
                    failures.append(failure)
                    teacher.stop(RunError(str(failure)))
                    return
                outcomes[number] = outcome
                done += 1
                good, stats = good + _keepable(recipe, outcome), teacher.stats
                progress(done, len(records), f"{stats['asked']} asked, {stats['cached']} from the cache, {good} good")

        workers = min(len(records), recipe.teacher.concurrency)
        tasks = [asyncio.ensure_future(work()) for _ in range(workers)]
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:  # Ctrl-C; a second one ends at once
            failures.append(RunError("interrupted"))
            teacher.stop(RunError("interrupted"))
            progress(done, len(records), "stops when the answers under way are here; Ctrl-C again: at once")
            await asyncio.wait(tasks)
            raise
        if failures:
            raise failures[0]
    return _Asked([outcome for outcome in outcomes if outcome is not None], dict(teacher.stats))


async def _explain(
    recipe: BuildRecipe, record: Record, experts: Sequence[Record], prompts: Mapping[str, Prompts], limits: Limits,
    teacher: Teacher
) -> Outcome:  # fmt: skip
    """The first answer that can be kept: it has an explanation and passes the required row checks. Else the one that
    fails the fewest of these, and of such the one that fails the fewest of all."""
    best, best_faults, tries = None, (0, 0), 0
    for attempt in range(recipe.attempts):
        seed = recipe.seed + attempt
        examples = pick_examples(record, experts, recipe.examples_per_class, seed)
        answer = await teacher.ask(prompts[record.language].messages(record, examples), seed)
        candidate = Candidate(record, spoken(answer.text), answer.finish)
        failed = tuple(name for name, check in ROW_CHECKS.items() if not check(candidate, limits))
        outcome, tries = Outcome(candidate, failed, attempt + 1), attempt + 1
        faults = (len(set(failed) & set(recipe.checks.require)) + (not candidate.explanation), len(failed))
        if best is None or faults < best_faults:
            best, best_faults = outcome, faults
        if not faults[0]:
            break
    assert best is not None
    return replace(best, attempts=tries)


def _keepable(recipe: BuildRecipe, outcome: Outcome) -> bool:
    return bool(outcome.candidate.explanation) and not set(recipe.checks.require) & set(outcome.failed)


def _corpus_checked(
    recipe: BuildRecipe, outcomes: Sequence[Outcome]
) -> tuple[list[Outcome], dict[str, dict[str, float | int | None]]]:
    """Adds the corpus checks; also the consistency figures per task.

    Consistency looks at the answers that have an explanation. Near duplicates are looked for among those that pass all
    other required checks, so that nothing is lost for resembling an answer that is refused anyway.
    """
    failed = [list(outcome.failed) for outcome in outcomes]
    unjudged: list[list[str]] = [[] for _ in outcomes]
    figures: dict[str, dict[str, float | int | None]] = {}
    parts: dict[tuple[str, str], list[int]] = {}
    for number, outcome in enumerate(outcomes):
        if outcome.candidate.explanation:
            record = outcome.candidate.record
            parts.setdefault((record.task, record.language), []).append(number)
        else:
            unjudged[number].append("label_recoverable")
    for (task, language), numbers in sorted(parts.items()):
        found = checks.consistency([outcomes[n].candidate for n in numbers], recipe.seed)
        figures[f"{task} ({language})"] = {"n": found.n, "weighted_f1": found.f1,
                                           "weighted_f1_label_names_removed": found.f1_masked}  # fmt: skip
        for number, agrees in zip(numbers, found.agrees, strict=True):
            if not agrees:
                (unjudged if agrees is None else failed)[number].append("label_recoverable")
    now = [replace(o, failed=tuple(f)) for o, f in zip(outcomes, failed, strict=True)]
    kept = [number for number, outcome in enumerate(now) if _keepable(recipe, outcome)]
    unique = checks.not_near_duplicate([outcomes[n].candidate for n in kept], recipe.checks.near_threshold)
    for number, passed in zip(kept, unique, strict=True):
        if not passed:
            failed[number].append("not_near_duplicate")
    for number in set(range(len(outcomes))) - set(kept):
        unjudged[number].append("not_near_duplicate")
    both = zip(outcomes, failed, unjudged, strict=True)
    return [replace(o, failed=tuple(f), unjudged=tuple(u)) for o, f, u in both], figures


# --- writing ---


def _write(
    recipe: BuildRecipe, outcomes: Sequence[Outcome], consistency: Mapping[str, Any], prompts: Mapping[str, Prompts],
    inputs: Mapping[str, Any]
) -> dict[str, Any]:  # fmt: skip
    accepted = [explained(o.candidate) for o in outcomes if _keepable(recipe, o)]
    rejected = [o for o in outcomes if not _keepable(recipe, o)]
    with replace_dir(recipe.out, check_replaceable, private=True) as folder:
        for split in SPLITS:
            if rows := [record for record in accepted if record.split == split]:
                write_records(folder / "data" / f"{split}.parquet", rows)
                write_records(folder / "records" / f"{split}.jsonl", rows)
                write_json(folder / "alpaca" / f"{split}.json", [alpaca_row(record) for record in rows], private=True)
        lines = [json.dumps({"id": o.candidate.record.id, "failed": o.failed, "finish": o.candidate.finish,
                             "answer": o.candidate.text}, ensure_ascii=False) for o in rejected]  # fmt: skip
        write_text(folder / "rejected.jsonl", "".join(f"{line}\n" for line in lines), private=True)
        if own := added_tasks(o.candidate.record.task for o in outcomes):
            write_tasks(folder / TASKS_FILE, own)
        manifest = {
            "recipe": _published(recipe),
            "inputs": inputs,
            "prompts": {p.language: {"version": p.version, "sha256": p.sha256} for p in prompts.values()},
            "records": {"asked": len(outcomes), "accepted": len(accepted), "rejected": len(rejected),
                        "filtered": sum(o.candidate.finish == CONTENT_FILTER for o in rejected),
                        "too_long": sum(o.candidate.finish == TOO_LONG for o in rejected)},
            "counts": _counts(accepted),
            "checks": check_rates(outcomes),
            "consistency": consistency,
            "attempts": dict(sorted(Counter(str(o.attempts) for o in outcomes).items())),
            "files": digests(folder),
        }  # fmt: skip
        write_manifest(folder, manifest, datasheet(manifest))
    return manifest


def _published(recipe: BuildRecipe) -> dict[str, Any]:
    """The recipe without a path of the machine it ran on, and without what opens the endpoint."""
    places: Any = {"out": True, "cache": True, "experts": True, "prompts": True, "data": {"root"}}
    found, teacher = recipe.model_dump(mode="json", exclude=places), recipe.teacher
    found["teacher"] |= {"extra_body": redact_body(teacher.extra_body)}
    if teacher.base_url is not None:
        found["teacher"]["base_url"] = redact_url(teacher.base_url)
    if teacher.local:
        adapter = None if teacher.adapter is None else Path(teacher.adapter).name
        found["teacher"] |= {"model": Path(teacher.model).name, "adapter": adapter}
    return found


def explained(candidate: Candidate) -> Record:
    """The candidate's record with its explanation."""
    return replace(candidate.record, explanation=candidate.explanation)


def alpaca_row(record: Record) -> dict[str, str]:
    """C-IMHI's form; the post stands alone in ``input``."""
    return {"instruction": record.question, "input": record.post, "output": record.answer()}


def check_rates(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Per check: how many answers pass, of how many that it could judge, the rate (None if it judged none), and the
    rate per task."""
    found: dict[str, dict[str, Any]] = {}
    for name in CHECKS:
        by_task: dict[str, list[bool]] = {}
        for outcome in outcomes:
            if name not in outcome.unjudged:
                by_task.setdefault(outcome.candidate.record.task, []).append(name not in outcome.failed)
        passed, total = sum(map(sum, by_task.values())), sum(map(len, by_task.values()))
        rates = {task: round(sum(values) / len(values), 4) for task, values in sorted(by_task.items())}
        rate = round(passed / total, 4) if total else None
        found[name] = {"passed": passed, "n": total, "rate": rate, "by_task": rates}
    return found


def _counts(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        entry = found.setdefault(record.task, {}).setdefault(record.split, {"records": 0, "labels": Counter()})
        entry["records"] += 1
        entry["labels"].update(record.gold)
    return {task: {split: {"records": e["records"], "labels": dict(e["labels"].most_common())}
                   for split, e in splits.items()} for task, splits in found.items()}  # fmt: skip
