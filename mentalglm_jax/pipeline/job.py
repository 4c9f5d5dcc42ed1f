"""The main job: from records to a checked explanation, one directory, every stage resumable.

``run.json`` in the run directory holds the recipe and what each finished stage said; a stage is repeated only if it did
not finish, and training and generation go on inside a stage where they stopped. The PyTorch side (``probes``) is
reached through files and a child process only.
"""

import functools
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx

from mentalglm_jax.checkpoints.adapters import save_adapter
from mentalglm_jax.checkpoints.directories import save_pretrained
from mentalglm_jax.checkpoints.hf_files import CALIBRATION
from mentalglm_jax.checkpoints.model_card import CARD
from mentalglm_jax.checkpoints.reference import write_reference
from mentalglm_jax.data.batches import encode_chats, encode_posts, encode_records
from mentalglm_jax.data.records import Record
from mentalglm_jax.data.selection import evenly, limited
from mentalglm_jax.data.synthetic import pretraining_chats
from mentalglm_jax.data.tables import read_lines
from mentalglm_jax.devices.compiled import keep_nothing
from mentalglm_jax.devices.distributed import barrier, is_primary, join
from mentalglm_jax.devices.stopping import Interrupted, Preempted, Terminated, carried_out
from mentalglm_jax.devices.together import held_by_primary, on_primary
from mentalglm_jax.errors import InputError, RunError, install
from mentalglm_jax.evaluate.assess import assess
from mentalglm_jax.evaluate.calibrated import fit_scalings, read_scalings, write_scalings
from mentalglm_jax.evaluate.development import errors_said, fit_on_development
from mentalglm_jax.evaluate.inputs import LABEL_SCORES, Answers
from mentalglm_jax.evaluate.noted import with_adapter
from mentalglm_jax.evaluate.readings import label_f1, score_records
from mentalglm_jax.evaluate.report import write_report
from mentalglm_jax.evaluate.stated import EVALUATION, read_stated
from mentalglm_jax.files import working_in, write_bytes, write_card, write_json, write_text
from mentalglm_jax.foreign import parse_json, read_json
from mentalglm_jax.inference.generate import answer_text, count_unread, generate_ids, generate_records
from mentalglm_jax.interpreter import environment, module_command
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.lora import merge_lora, parameter_count
from mentalglm_jax.pipeline.card import run_card
from mentalglm_jax.pipeline.changes import nothing_left, outdated
from mentalglm_jax.pipeline.data_stage import data_stage
from mentalglm_jax.pipeline.kept import DEV_GENERATIONS, remove
from mentalglm_jax.pipeline.run_dir import Run
from mentalglm_jax.pipeline.stage_inputs import dev_records, stage_examples, start_adapter
from mentalglm_jax.planning.plan import expected
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import GlmTokenizer
from mentalglm_jax.train.evaluation import Sampler
from mentalglm_jax.train.loop import Surroundings, TrainResult, train
from mentalglm_jax.train.recipe import MeshSection, Recipe, StageSection, opened_mesh

REFERENCE_ROWS = 8
GREEDY_ROWS = 16
MAX_DIFFERENCE = 0.05  # of the largest logit: bfloat16 stays far below it, a wrong rotary base far above


@runtime_checkable
class Reporter(Protocol):
    """Where a run tells what it is doing; the command line shows progress bars, a notebook may pass its own."""

    def stage(self, name: str) -> Callable[..., None]:
        """A stage starts; returns ``progress(done, total, text="")``."""
        ...

    def say(self, line: str) -> None:
        """One line of result."""
        ...


class Silent:
    """A run of several processes is told by the first."""

    def stage(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None

    def say(self, line: str) -> None:
        pass


def run(
    recipe: Recipe, reporter: Reporter, *, restart: bool = False, until: str | None = None, allow_changed: bool = False,
    profile: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Runs or continues the whole job; returns ``summary.json`` (or, with ``until``, what the stages said so far).

    Args:
        restart: see ``Run``; so are ``allow_changed`` and ``profile``.
        until: "train" stops after the last training stage.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the same call continues.
        MentalGLMError: the recipe, the data or a stage failed; one line says why.
    """
    if recipe.compile_cache == "off":
        keep_nothing()
    if recipe.mesh is not None:
        join(recipe.mesh.cpu_devices, recipe.mesh.distributed)
    reporter = reporter if is_primary() else Silent()
    with held_by_primary(lambda: working_in(recipe.run_dir)):
        job = Run(recipe, restart, allow_changed=allow_changed, profile=profile, say=reporter.say)
        barrier("the run directory is read")
        done = all(name in job.result for name, _ in _stages(recipe, until))
        if job.changed_from is not None and done and not job.reopened:
            raise nothing_left(job.changed_from, recipe)
        job.begin()
        _go(job, reporter, list(_stages(recipe, until)), evaluated=until is None)
        hint = f"delete {job.dir} or choose another run_dir"  # somebody may have touched it
        return job.result if until is not None else on_primary(lambda: read_json(job.dir / "summary.json", hint))


def evaluate_run(directory: Path, reporter: Reporter, mesh: MeshSection | None = None) -> None:
    """Answers and scores the evaluation split of a trained run, as ``run`` would; does nothing where that is done.

    Args:
        mesh: devices to spread the model over; it is not part of what a run is.

    Raises:
        InputError: not a run directory, its training is not finished, or its data has nothing to evaluate on.
        Interrupted: the same call continues.
    """
    if mesh is not None:
        join(mesh.cpu_devices, mesh.distributed)
    reporter = reporter if is_primary() else Silent()
    with held_by_primary(lambda: working_in(directory)):
        job = Run.opened(directory, reporter.say, mesh)
        job.check_trained()
        job.check_evaluable(probed=False)
        stages = [(name, function) for name, function in _stages(job.recipe, None) if name in ("generate", "evaluate")]
        _go(job, reporter, stages)


def _go(job: Run, reporter: Reporter, stages: Sequence[tuple[str, "Stage"]], evaluated: bool = False) -> None:
    """Does what of ``stages`` is not finished. ``evaluated``: later ones evaluate, which some data do not allow."""
    job.check_all_finished([name for name, _ in stages])
    for name, function in stages:
        if name in job.result:
            if name == "data" and evaluated and "summary" not in job.result:
                job.check_evaluable()  # data that `mentalglm train` read
            continue
        job.forget(outdated(name))
        started, used = time.perf_counter(), _processor_seconds()
        try:
            result = function(job, reporter.stage(name))
            barrier(f"{name} is done")
        except (KeyboardInterrupt, Terminated) as stop:
            kind = Preempted if isinstance(stop, Terminated) else Interrupted
            raise kind(
                f"interrupted in stage {name!r}; what is in {job.dir} is kept, the same command continues"
            ) from None
        result["seconds"] = round(time.perf_counter() - started, 1)
        result["processor_seconds"] = round(_processor_seconds() - used, 1)
        job.finished(name, result)
        for line in result.get("say", ()):
            reporter.say(line)


def _processor_seconds() -> float:
    """Of this process and the children it has waited for; on a shared machine the clock tells how busy others were."""
    return sum(os.times()[:4])


# Every process carries out every stage; what one alone may do (files, other programs) is done ``on_primary``.
Stage = Callable[[Run, Callable[..., None]], dict[str, Any]]


def _alone(stage: Stage) -> Stage:
    """A stage that needs no devices: the primary process does it."""
    return lambda job, progress: on_primary(lambda: stage(job, progress))


def _stages(recipe: Recipe, until: str | None) -> Iterable[tuple[str, Stage]]:
    yield "data", _alone(functools.partial(data_stage, evaluated=until is None))
    if recipe.pretrain is not None:
        yield "pretrain", _pretrain
    previous: str | None = None
    for stage in recipe.stages:
        yield f"train {stage.name}", _training(stage, previous)
        previous = stage.name
    if until == "train":
        return
    probing = recipe.probe.posts > 0
    if probing and recipe.probe.control is not None:
        yield "train control", _training(recipe.probe.control, previous, directory="control")
    yield "export", _export
    if recipe.verify:
        yield "verify", _alone(_verify)
    yield "generate", _generate
    yield "evaluate", _evaluate
    if probing:
        yield "probe", _probe
    yield "summary", _alone(_summary)


def _pretrain(job: Run, progress: Callable[..., None]) -> dict[str, Any]:
    recipe = job.recipe
    assert recipe.pretrain is not None
    assert recipe.model.geometry is not None
    tokenizer = job.tokenizer()
    geometry = {
        "model_type": "glm", "vocab_size": tokenizer.vocab_size, "eos_token_id": list(tokenizer.eos_ids),
        "pad_token_id": tokenizer.pad_id, "attention_bias": True, "max_position_embeddings": 2048,
        "hidden_size": 0, "intermediate_size": 0, "num_hidden_layers": 0, "num_attention_heads": 0,
        "num_key_value_heads": 2, **recipe.model.geometry,
    }  # fmt: skip
    model = Glm(GlmConfig.from_dict(geometry), rngs=nnx.Rngs(recipe.seed), remat=recipe.model.remat,
                backend=recipe.model.attention)  # fmt: skip
    length = recipe.pretrain.train.sequence_length
    if recipe.data.source == "synthetic":
        chats = pretraining_chats(recipe.data.synthetic, recipe.pretrain.chats, seed=recipe.seed)
        examples = encode_chats(((user, assistant) for user, assistant, _ in chats), tokenizer, length)
    else:
        examples = encode_posts((record.post for record in job.records("train")), tokenizer, length)
    around = Surroundings(progress=progress, say=job.say, mesh=opened_mesh(recipe.mesh), profile=job.profile,
                          allow_changed=job.allow_changed)  # fmt: skip
    result = train(model, examples, recipe.pretrain.train, job.dir / "pretrain", trainable="all", seed=recipe.seed,
                   identity={"geometry": recipe.model.geometry}, around=around)  # fmt: skip
    count = parameter_count(model)
    said: dict[str, Any] = {"parameters": count, **_said(result, f"{count / 1e6:.2f} M parameters")}
    for number, stage in enumerate(recipe.pretrain.then):
        examples, too_long = stage_examples(job, stage, recipe.pretrain.then[:number], tokenizer)
        result = train(model, examples, stage.train, job.dir / "pretrain" / stage.name, trainable="all",
                       seed=recipe.seed, identity={"stage": stage.name}, around=around)  # fmt: skip
        said["say"] += [*_said(result, f"then {stage.name}")["say"], *_left_out(stage, too_long)]
    save_pretrained(model, job.dir / "base", tokenizer=tokenizer)
    return said


def _said(result: TrainResult, first: str, best_by: str = "loss") -> dict[str, Any]:
    mfu = "" if result.mfu is None else f", MFU {result.mfu:.1%}"
    best = ""
    if result.best is not None:
        name = f"{'lowest' if best_by == 'loss' else 'highest'} development {best_by.replace('_f1', ' F1')}"
        best = f"; {name} {result.best[1]:.3f} at step {result.best[0]}"
    stopped = f" of {result.planned}, stopped early" if result.steps < result.planned else ""
    line = (
        f"{first}; {result.steps} steps{stopped}, loss {result.loss:.3f}, {result.tokens_per_second:,.0f} tokens/s "
        f"({result.answer_tokens_per_second:,.0f} answer{mfu}){best}"
    )
    numbers = ("steps", "planned", "loss", "accuracy", "tokens_per_second", "answer_tokens_per_second", "mfu",
               "skipped_steps")  # fmt: skip
    found = {**{name: getattr(result, name) for name in numbers}, "say": [line]}
    return found if result.best is None else found | {"best": dict(zip(("step", best_by), result.best, strict=True))}


def _training(stage: StageSection, previous: str | None, directory: str | None = None) -> Stage:
    """A LoRA stage that starts from the adapter of ``previous`` (or a fresh one)."""

    def train_stage(job: Run, progress: Callable[..., None]) -> dict[str, Any]:
        recipe, tokenizer = job.recipe, job.tokenizer()
        where = job.dir / (directory or f"stages/{stage.name}")
        earlier = recipe.stages[: recipe.stages.index(stage)] if stage in recipe.stages else ()
        examples, too_long = stage_examples(job, stage, earlier, tokenizer)
        mesh = opened_mesh(recipe.mesh)
        if mesh is None and jax.device_count() > 1 and job.say is not None:
            job.say(f"{jax.device_count()} devices are here, the recipe has no mesh, one is used; "
                    "--set mesh.fsdp=-1 uses all")  # fmt: skip
        if job.say is not None and (line := expected(recipe, stage)) is not None:
            job.say(line)
        model = job.load_base(recipe.model.quantize, mesh)
        tokenizer.check_rows(model.config.vocab_size, str(job.dir / "tokenizer"))
        start_adapter(job, model, previous)
        identity = {"lora": recipe.lora.model_dump(mode="json"), "stage": stage.name}
        held_out = dev_records(job, stage)
        if stage.train.eval_every and not held_out:
            raise InputError(f"stage {stage.name}: eval_every is set, but its data has no development records")
        dev = (encode_records(held_out, tokenizer, stage.train.sequence_length, recipe.answer_order)[0]
               if held_out else [])  # fmt: skip
        wandb: Any = recipe.wandb
        around = Surroundings(
            progress=progress, say=job.say, mesh=mesh, profile=job.profile, allow_changed=job.allow_changed,
            wandb=wandb and (wandb.project, wandb.name or f"{job.dir.name}-{stage.name}"),
            sample=_sampler(tokenizer, _spread(held_out, stage.train.eval_samples), recipe.generate.max_new_tokens),
        )  # fmt: skip
        result = train(
            model, examples, stage.train, where, trainable="lora", seed=recipe.seed, identity=identity, evaluation=dev,
            label_f1=lambda model: label_f1(model, tokenizer, held_out, recipe.generate.batch_size),
            objective=stage.objective, around=around,
        )  # fmt: skip
        said = _said(result, f"LoRA rank {recipe.lora.rank}", stage.train.best_by)
        said["say"] += _left_out(stage, too_long)
        card = run_card(job, "peft", stage=stage.name, base=job.base_id, now={f"train {stage.name}": said})
        save_adapter(model, where / "adapter", card=card)
        on_primary(lambda: job.pack_tasks(where / "adapter"))
        return {**said, "left_out": len(too_long)}

    return train_stage


def _left_out(stage: StageSection, too_long: Sequence[str]) -> list[str]:
    return [f"{len(too_long)} examples are longer than sequence_length = {stage.train.sequence_length} tokens and were "
            f"left out whole (first: {first})" for first in too_long[:1]]  # fmt: skip


def _sampler(tokenizer: GlmTokenizer, records: Sequence[Record], max_new_tokens: int | None) -> Sampler | None:
    """Greedy answers to ``records``, by their ids: the posts stay where they are."""
    if not records:
        return None
    prompts = [tokenizer.prompt_ids(record.prompt, record.system) for record in records]

    def sample(model: Glm) -> list[dict[str, Any]]:
        answers = generate_ids(model, prompts, max_new_tokens=max_new_tokens, eos_ids=tokenizer.eos_ids,
                               vocab_limit=tokenizer.vocab_size)  # fmt: skip
        texts = [answer_text(tokenizer, ids) for ids in answers]
        return [{"id": record.id, "answer": text} for record, text in zip(records, texts, strict=True)]

    return sample


def _eval_records(job: Run) -> list[Record]:
    return limited(job.records(job.eval_split), job.recipe.generate.limit)


def _export(job: Run, progress: Callable[..., None]) -> dict[str, Any]:
    """``adapter/``, ``merged/`` and what JAX computes with them, for ``probes verify``."""
    model, tokenizer = job.load_final(), job.tokenizer()
    records, order = _eval_records(job), job.recipe.answer_order
    texts = [tokenizer.chat(record.chat(order)).ids for record in _spread(records, REFERENCE_ROWS)]
    prompts = [tokenizer.prompt_ids(record.prompt, record.system) for record in _spread(records, GREEDY_ROWS)]
    greedy = generate_ids(model, prompts, max_new_tokens=min(job.recipe.generate.max_new_tokens or 64, 64),
                          eos_ids=tokenizer.eos_ids, vocab_limit=tokenizer.vocab_size)  # fmt: skip
    write_reference(job.dir / "reference_logits.npz", model, texts, prompts, greedy, tokenizer)
    save_adapter(model, job.dir / "adapter", card=run_card(job, "peft", base=job.base_id))
    save_pretrained(merge_lora(model, in_place=True), job.dir / "merged", tokenizer=tokenizer,
                    card=run_card(job, "merged", base=job.base_id))  # fmt: skip

    def pack() -> None:
        for name in ("adapter", "merged"):
            job.pack_tasks(job.dir / name)

    on_primary(pack)
    return {}


def _spread(records: Sequence[Record], count: int) -> list[Record]:
    """``count`` records evenly spaced over the list, so that all tasks and languages are among them."""
    return [records[i] for i in sorted({int(i) for i in np.linspace(0, len(records) - 1, min(count, len(records)))})]


def _probes(*arguments: str | Path) -> dict[str, Any]:
    """Runs the ``probes`` command in a process of its own; returns the JSON object it prints."""
    command = module_command("probes", *arguments, "--json")
    code, output = carried_out(command, stdout=subprocess.PIPE, stderr=None, text=True,
                               env=environment(HF_HUB_OFFLINE=os.environ.get("HF_HUB_OFFLINE", "1")))  # fmt: skip
    if code not in (0, 3):  # 3: done, but for rows that cannot be probed; it says which on stderr
        raise RunError(f"`probes {arguments[0]}` stopped with exit code {code}; its reason stands above. "
                       f"It needs the [probes] extra (PyTorch): {install('probes')}")  # fmt: skip
    return json.loads(output)


def _verify(job: Run, progress: Callable[..., None]) -> dict[str, Any]:
    """Reloads both exports with transformers and PEFT and compares them with what JAX computed."""
    reference = job.dir / "reference_logits.npz"
    merged = _probes("verify", job.dir / "merged", "--reference", reference)
    progress(1, 2)
    adapter = _probes("verify", str(job.base), "--adapter", job.dir / "adapter", "--reference", reference)
    progress(2, 2)
    lines = []
    for name, found in (("merged", merged), ("adapter", adapter)):
        lines.append(f"{name}: max |Δ logit| {found['max_abs_logit_diff']:.1e}, greedy identical "
                     f"{found['greedy_identical']}/{found['greedy_total']}"
                     + f", others part where two logits are {found['greedy_gap']:.1e} apart"
                     * (found["greedy_identical"] < found["greedy_total"]))  # fmt: skip
        if found["max_abs_logit_diff"] > MAX_DIFFERENCE * found["max_abs_logit"]:
            raise RunError(f"{job.dir / name}: transformers computes another model than the one trained ({lines[-1]})")
    return {"merged": merged, "adapter": adapter, "say": ["; ".join(lines)]}


def _generate(job: Run, progress: Callable[..., None]) -> dict[str, Any]:
    section, tokenizer = job.recipe.generate, job.tokenizer()
    model, fingerprint = job.load_merged()
    rows = generate_records(model, tokenizer, _eval_records(job), fingerprint=fingerprint,
                            out_path=job.dir / "generations.jsonl", max_new_tokens=section.max_new_tokens,
                            batch_size=section.batch_size, progress=progress)  # fmt: skip
    found = count_unread(rows)
    line = ("{rows} answers; {no_label} without a readable label, {no_explanation} with a label and no explanation, "
            "{cut_off} cut off by the token limit")  # fmt: skip
    return {**found, "say": [line.format(**found)]}


def _probed(job: Run, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows given to ``probes``: of the recipe's task, the languages in equal parts."""
    section = job.recipe.probe
    chosen = [row for row in rows if row["task"] == section.task]
    if not chosen:
        raise InputError(f"probe.task {section.task!r} has no generated rows; the data has no such task")
    chosen = [row for row in chosen if row["label_text"] is not None]
    if not chosen:
        raise RunError(f"no answer for {section.task} states a label, so there is nothing to probe; train for longer")
    by_language = {
        language: [row for row in chosen if row["language"] == language]
        for language in tasks.get_task(section.task).languages
    }
    share = -(-section.posts // sum(bool(part) for part in by_language.values()))
    return [part[i] for part in by_language.values() for i in evenly(len(part), share)][: section.posts]


def _evaluate(job: Run, progress: Callable[..., None]) -> dict[str, Any]:
    section, values, where = job.recipe.generate, [], job.dir / LABEL_SCORES
    rows, found = _read_jsonl(job.dir / "generations.jsonl"), {}
    on_primary(lambda: remove(job.dir, (CALIBRATION, LABEL_SCORES)))
    if section.label_scores:
        (model, fingerprint), tokenizer = job.load_merged(), job.tokenizer()
        first = job.recipe.answer_order == "explanation_first"
        once = job.eval_split == "dev" and not first  # what is scored anyway is what a scaling is fitted on
        if not once and (held_out := limited(job.records_if_any("dev"), section.limit)):
            found = fit_on_development(model, tokenizer, held_out, explains_first=first, fingerprint=fingerprint,
                                       out_path=job.dir / DEV_GENERATIONS, max_new_tokens=section.max_new_tokens,
                                       batch_size=section.batch_size, progress=progress)  # fmt: skip
            on_primary(lambda: write_scalings(job.dir, found))
        fair = {} if job.eval_split == "dev" else on_primary(lambda: read_scalings(job.dir))  # of other records
        values = score_records(model, tokenizer, _eval_records(job), out_path=where, progress=progress,
                               written=rows if first else None, scalings=fair, fingerprint=fingerprint,
                               batch_size=section.batch_size)  # fmt: skip
        if once:
            found = fit_scalings(values)
            on_primary(lambda: write_scalings(job.dir, found))

    def report() -> list[str]:
        result = with_adapter(assess(Answers(rows, values), train=job.records("train"))[0], job.result)
        write_report(job.dir, result, title=job.dir.name, notes=job.result["data"].get("notes", ()))
        said = "{}: temperature {:.2f} of {} development records"
        return [said.format(task, one["temperature"], one["records"]) + errors_said(result.get(task))
                for task, one in found.items()]  # fmt: skip

    return {"say": on_primary(report)}


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [parse_json(line, f"{path}:{number}", "delete it to start over") for number, line in read_lines(path)]


def _probe(job: Run, progress: Callable[..., None]) -> dict[str, Any]:
    section, base, generations = job.recipe.probe, str(job.base), job.dir / "generations.jsonl"
    rows = _probed(job, _read_jsonl(generations))

    def probed(adapter: Path, rows_file: Path, out: Path) -> dict[str, Any]:
        asked = ("--budget", section.budget, "--processes", str(section.processes))
        return on_primary(lambda: _probes("run", base, "--adapter", adapter, "--in", rows_file, "--out", out, *asked))

    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    on_primary(lambda: write_text(job.dir / "probes_input.jsonl", text, private=True))
    found = probed(job.dir / "adapter", job.dir / "probes_input.jsonl", job.dir / "probes")
    result: dict[str, Any] = {"summary": found}
    if section.control is not None:
        control, wanted = job.dir / "control", job.recipe.generate
        ids = {row["id"] for row in rows}
        records = [record for record in job.records(job.eval_split) if record.id in ids]
        model, fingerprint = job.load_merged("control")
        generate_records(model, job.tokenizer(), records, fingerprint=fingerprint,
                         out_path=control / "generations.jsonl", max_new_tokens=wanted.max_new_tokens,
                         batch_size=wanted.batch_size)  # fmt: skip
        result["control"] = probed(control / "adapter", control / "generations.jsonl", control / "probes")
        result["check"] = on_primary(lambda: _probes("check", job.dir / "probes", "--against", control / "probes"))
    page = job.dir / "probes" / "report.html"
    on_primary(lambda: write_bytes(job.dir / "report.html", page.read_bytes(), private=True))
    return result


def _summary(job: Run, progress: Callable[..., None]) -> dict[str, Any]:
    summary: dict[str, Any] = {"eval_split": job.eval_split, "parity": {}, "eval": {}, "probes": {}}
    summary["data"] = {name: job.result["data"][name] for name in ("counts", "held_out", "notes")
                       if name in job.result["data"]}  # fmt: skip
    try:  # what earlier stages said may have been read back from a run.json that somebody changed
        if "verify" in job.result:
            for name in ("merged", "adapter"):
                found = job.result["verify"][name]
                summary["parity"][f"{name}_max_abs_logit_diff"] = found["max_abs_logit_diff"]
                summary["parity"][f"{name}_greedy_identical"] = [found["greedy_identical"], found["greedy_total"]]
        if "probe" in job.result:
            found = job.result["probe"]
            summary["probes"] = {**found["summary"], "diagnosticity": found.get("check", {}).get("diagnosticity"),
                                 "control": found.get("control"), "check": found.get("check")}  # fmt: skip
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{job.dir / 'run.json'}: what stages verify and probe found is damaged; begin anew with "
                         "--restart") from None  # fmt: skip
    summary["eval"], _ = read_stated(job.dir / EVALUATION)
    for name, to in (("adapter", "peft"), ("merged", "merged")):  # with results, which were not there at the export
        write_card(job.dir / name / CARD, run_card(job, to, base=job.base_id))
        job.pack_calibration(job.dir / name)
    summary["seconds"] = {name: result["seconds"] for name, result in job.result.items()}
    summary["processor_seconds"] = {name: result.get("processor_seconds") for name, result in job.result.items()}
    write_json(job.dir / "summary.json", summary)
    return {}
