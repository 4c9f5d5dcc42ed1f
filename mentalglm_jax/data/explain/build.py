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

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mentalglm_jax.data.contacts import scrub_record
from mentalglm_jax.data.explain import checks
from mentalglm_jax.data.explain.checks import CHECKS, ROW_CHECKS, Candidate, Limits
from mentalglm_jax.data.explain.datasheet import datasheet
from mentalglm_jax.data.explain.prompts import Prompts, load_prompts, pick_examples
from mentalglm_jax.data.explain.teacher import CONTENT_FILTER, AnswerCache, OpenAITeacher, Teacher, TeacherConfig
from mentalglm_jax.data.imhi import load_imhi_experts
from mentalglm_jax.data.records import SPLITS, Record, iter_records, read_records, write_records
from mentalglm_jax.data.selection import limited
from mentalglm_jax.data.sources import dev_split, load_upstream, present
from mentalglm_jax.errors import InputError, MentalGLMError
from mentalglm_jax.files import replace_dir, write_json, write_text
from mentalglm_jax.foreign import MAX_YAML_BYTES, parse_yaml, read_text

Progress = Callable[..., None]
MANIFEST = "manifest.json"
_NEVER_REQUIRED = ("label_recoverable",)  # of a weak classifier; reported, and required only where the recipe says so


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BuildData(_Strict):
    """Labelled posts: ``sets`` below ``root`` (upstream files), or ``root`` itself a record file. ``dev_fraction`` of
    the training part becomes the development part; ``limit`` keeps at most that many records per task, language and
    split, spread evenly over the file."""

    root: Path
    sets: tuple[str, ...] = ()
    dev_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    splits: tuple[Literal["train", "dev", "test"], ...] = ("train", "dev")
    limit: Annotated[int, Field(ge=1)] | None = None
    scrub: bool = True


class BuildLimits(_Strict):
    """Bounds of the checks; ``require`` names those an explanation must pass to be kept."""

    zh_characters: tuple[int, int] = Limits.zh_characters
    en_words: tuple[int, int] = Limits.en_words
    near_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.9
    require: tuple[str, ...] = tuple(name for name in CHECKS if name not in _NEVER_REQUIRED)


class BuildRecipe(_Strict):
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
    path = Path(path)
    try:
        text = read_text(path, MAX_YAML_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error.strerror})") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a recipe is a mapping of sections, this file is {type(raw).__name__}")
    for override in overrides:
        key, equals, text = override.partition("=")
        *parents, last = key.split(".")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not equals or not last or not isinstance(node, dict):
            raise InputError(f"--set {override}: write it as section.key=value")
        node[last] = parse_yaml(text, f"--set {override[:200]}", "the value is not valid YAML")
    try:
        recipe = BuildRecipe.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
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
    if recipe.out.exists() and any(recipe.out.iterdir()) and not (recipe.out / MANIFEST).is_file():
        raise InputError(f"{recipe.out}: not empty and not written by this command; choose another out")
    records = _gold_records(recipe)
    experts = load_experts(recipe.experts)
    prompts = {language: load_prompts(language, recipe.prompts) for language in sorted({r.language for r in records})}
    _check_experts(recipe, records, experts)
    asked = asyncio.run(_ask_all(recipe, records, experts, prompts, progress, teacher))
    outcomes, corpus = _corpus_checked(recipe, asked.outcomes)
    inputs = {"posts": len(records), "posts_sha256": _digest(records),
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


def _gold_records(recipe: BuildRecipe) -> list[Record]:
    section = recipe.data
    if section.root.suffix in (".jsonl", ".parquet"):
        records = list(iter_records(section.root))
    else:
        records = dev_split(load_upstream(section.root, section.sets or present(section.root)), section.dev_fraction)
    kept = limited([record for record in records if record.split in section.splits], section.limit)
    kept = [scrub_record(record) for record in kept] if section.scrub else kept
    if not kept:
        raise InputError(f"{section.root}: no record of the splits {', '.join(section.splits)}")
    if repeated := [one for one, count in Counter(record.id for record in kept).items() if count > 1]:
        raise InputError(f"{section.root}: id {repeated[0]!r} stands there twice; ids must differ")
    return kept


def _check_experts(recipe: BuildRecipe, records: Sequence[Record], experts: Sequence[Record]) -> None:
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
    failures: list[MentalGLMError] = []
    done = 0
    async with contextlib.AsyncExitStack() as stack:
        if teacher is None:
            teacher = await stack.enter_async_context(OpenAITeacher(recipe.teacher, AnswerCache(recipe.cache)))

        async def work() -> None:
            nonlocal done
            for number in waiting:
                if failures:
                    return
                try:  # a failure in a task would cancel the others, and what they were about to get is paid for
                    outcomes[number] = await _explain(recipe, records[number], experts, prompts, limits, teacher)
                except MentalGLMError as failure:
                    failures.append(failure)
                    return
                done += 1
                progress(
                    done, len(records), f"{teacher.stats['asked']} asked, {teacher.stats['cached']} from the cache"
                )

        workers = min(len(records), 1 if recipe.teacher.local else recipe.teacher.concurrency)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(work())
        except BaseExceptionGroup as group_failure:
            first: BaseException = group_failure
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None
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
        candidate = Candidate(record, answer.text.strip(), answer.finish)
        failed = tuple(name for name, check in ROW_CHECKS.items() if not check(candidate, limits))
        outcome, tries = Outcome(candidate, failed, attempt + 1), attempt + 1
        faults = (len(set(failed) & set(recipe.checks.require)) + (not candidate.explanation), len(failed))
        if best is None or faults < best_faults:
            best, best_faults = outcome, faults
        if not faults[0]:
            break
    assert best is not None
    return replace(best, attempts=tries)


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
    required = set(recipe.checks.require)
    kept = [n for n, o in enumerate(outcomes) if o.candidate.explanation and not required & set(failed[n])]
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
    required = set(recipe.checks.require)
    accepted = [explained(o.candidate) for o in outcomes if not required & set(o.failed) and o.candidate.explanation]
    rejected = [o for o in outcomes if required & set(o.failed) or not o.candidate.explanation]
    with replace_dir(recipe.out) as folder:
        for split in SPLITS:
            if rows := [record for record in accepted if record.split == split]:
                write_records(folder / "data" / f"{split}.parquet", rows)
                write_records(folder / "records" / f"{split}.jsonl", rows)
                write_json(folder / "alpaca" / f"{split}.json", [alpaca_row(record) for record in rows])
        lines = [json.dumps({"id": o.candidate.record.id, "failed": o.failed, "finish": o.candidate.finish,
                             "answer": o.candidate.text}, ensure_ascii=False) for o in rejected]  # fmt: skip
        write_text(folder / "rejected.jsonl", "".join(f"{line}\n" for line in lines))
        manifest = {
            "recipe": recipe.model_dump(  # no path of the machine it ran on
                mode="json", exclude={"out": True, "cache": True, "experts": True, "prompts": True, "data": {"root"}}
            ),
            "inputs": inputs,
            "prompts": {p.language: {"version": p.version, "sha256": p.sha256} for p in prompts.values()},
            "records": {"asked": len(outcomes), "accepted": len(accepted), "rejected": len(rejected),
                        "filtered": sum(o.candidate.finish == CONTENT_FILTER for o in rejected)},
            "counts": _counts(accepted),
            "checks": check_rates(outcomes),
            "consistency": consistency,
            "attempts": dict(sorted(Counter(str(o.attempts) for o in outcomes).items())),
            "files": {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
                      for path in sorted(folder.rglob("*")) if path.is_file()},
        }  # fmt: skip
        write_text(folder / "README.md", datasheet(manifest))
        write_json(folder / MANIFEST, manifest)
    return manifest


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
