"""The model card of what a run trained: what it is, what it was trained and tested on, its limits, how to load it.

A card is read by strangers. All of it is counted, defined in this package or asked for by an option; of the run's own
words nothing enters: no path, no name of a directory, stage, person, file or record, and no post.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mentalglm_jax import __version__
from mentalglm_jax.checkpoints.model_card import (
    SAFETY,
    TAGS,
    Licence,
    adapter_kind,
    adapter_sentence,
    card_text,
    licence_fields,
    licence_sentence,
)
from mentalglm_jax.data.sources import SOURCES
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.report import RESULTS_NOTE, readings, results_table
from mentalglm_jax.evaluate.stated import EVALUATION, read_stated
from mentalglm_jax.markdown import code, escaped, fenced
from mentalglm_jax.pipeline.run_dir import Run
from mentalglm_jax.text import tasks
from mentalglm_jax.train.recipe import StageSection

_LIMITS = """\
* For research on explainable analysis of posts about mental health. Not for diagnosis, triage, moderation or any
  decision about a person.
* Labels come from annotators who read single posts, or from rules (synthetic posts); they are not clinical findings.
* Explanations are generated text. They can be fluent and wrong, and quote what the post does not say. Check them:
  `probes run`.
* Posts of another platform, language, time or length than those it was trained on are not covered by the results."""
_CONCLUSIONS = {
    "supported": "The explanations cite what the model used more than chance would.",
    "contradicted": "The explanations cite what the model used less than chance would.",
}
_SCREENING = ("gradnorm", "gxi")  # methods that never count towards a verdict
_PEFT = {"peft", "llama.cpp"}  # the formats that PEFT reads whatever the base


def run_card(
    job: Run, to: str, *, stage: str | None = None, base: str | None = None, licence: Licence | None = None,
    repository: str | None = None, now: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """README.md for an export of ``job``.

    Args:
        to: "merged", or the format of the adapter as ``formatted`` names it ("vllm" says too little: its result depends
            on the base).
        stage: whose adapter; None is the last stage's, and only that one was evaluated.
        base: Hub id of the base model; None where it has none, or none that is known.
        licence: of the base; None is unknown.
        repository: Hub repository of the export, ORG/NAME; None where it is not to be uploaded.
        now: what a stage that is just ending says, by its name as in ``job.result``, where it does not stand yet.

    Raises:
        InputError: the run's own files are damaged, or its scores are not those of its answers.
    """
    names = [one.name for one in job.recipe.stages]
    stage = stage or names[-1]
    earlier = job.recipe.stages[: names.index(stage) + 1] if stage in names else (job.recipe.probe.control,)
    trained = [one for one in earlier if one is not None]
    config = job.recipe.lora.config()
    try:
        evaluation = _evaluation(job) if stage == names[-1] else {}
        merged, what = to == "merged", f"{adapter_kind(config)} adapter"
        title = f"{f'`{base}`' if base else 'Model'} with a {what} merged in" if merged else what
        title = f"{what} for `{base}`" if base and not merged else title
        fields = {
            **licence_fields(licence, base), "base_model": base,
            "base_model_relation": ("finetune" if merged else "adapter") if base else None,
            "language": _languages(job, trained), "pipeline_tag": "text-generation",
            "library_name": "transformers" if merged else "peft" if to in _PEFT else "mentalglm-jax", "tags": TAGS,
            "metrics": ["f1"] if evaluation else None,
            "model_name": (repository or what).rpartition("/")[2] if evaluation else None,
            "eval_results": _eval_results(job, evaluation),
        }  # fmt: skip
        sections = [
            ("", f"> {SAFETY}"),
            ("", _origin(job, base) + " " + adapter_sentence(config)),
            ("What it answers", "\n".join(_tasks(job, trained, evaluation))),
            ("Training data", "\n".join(_data(job))),
            ("Training", "\n".join(_training(job, trained, now or {}))),
            ("Results", _results(evaluation, stage == names[-1])),
            ("Explanations against saliency", "\n".join(_probes(job) if stage == names[-1] else ["Not probed."])),
            ("Limits", _LIMITS),
            ("How to load it", "\n\n".join(_loading(job, to, base, repository or "DIRECTORY"))),
            ("Licence", f"{licence_sentence(licence, base)} The posts it was trained on are not part of it; they keep "
                        "the terms of their sources, which may restrict what a model trained on them is used for."),
        ]  # fmt: skip
        return card_text(fields, title, sections)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise InputError(f"{job.dir}: what the run says of its data and results is damaged; run it anew with "
                         "--restart, or export from a copy that is whole") from None  # fmt: skip


def _evaluation(job: Run) -> dict[str, Any]:
    return read_stated(job.dir / EVALUATION)[0] if "evaluate" in job.result else {}


def _origin(job: Run, base: str | None) -> str:
    if job.recipe.pretrain is not None:
        count = job.result.get("pretrain", {}).get("parameters")
        size = f" of {int(count):,} parameters" if count else ""
        come = f"The base is a small model{size}, pre-trained from nothing by the same recipe."
    else:
        come = f"The base is `{base}`." if base else "The base was a local copy whose Hub id was not stated."
    return f"{come} Fine-tuned in JAX with mentalglm-jax {__version__} to label a post and explain the label."


def _languages(job: Run, trained: list[StageSection]) -> list[str]:
    there = job.result.get("data", {}).get("languages") or tasks.LANGUAGES
    return [one for one in sorted(there) if any(stage.languages is None or one in stage.languages for stage in trained)]


def _tasks(job: Run, trained: list[StageSection], evaluation: Mapping[str, Any]) -> Iterator[str]:
    counted, turns = job.result.get("data", {}).get("counts", {}), dict[str, None]()
    for name in dict.fromkeys([*counted, *evaluation]):
        if not any(stage.tasks is None or name in stage.tasks for stage in trained):
            continue
        task = tasks.get_task(name)
        kind = "one label" if task.arity == "single" else "one or more labels"
        spoken = [one for one in task.languages if one in _languages(job, trained)]
        labels = ", ".join(_label(label, spoken) for label in task.labels)
        yield f"* `{name}`, {kind} of {len(task.keys)}: {labels}."
        for language in spoken:
            system = task.system(language)
            said = f" System turn: {code(system)}" if system else ""
            yield f"  Asked ({language}): {code(task.question(language))}{said}"
            turns[task.prompt("{post}", "{question}", language)] = None
    if not turns:
        yield "Not recorded by this run."
        return
    yield ""
    yield "The user turn, with the post and the question in place; the answer is a label sentence and an explanation:"
    yield ""
    yield fenced(*turns)


def _label(label: tasks.Label, languages: list[str]) -> str:
    """Its key, with its name where that is another word."""
    name = label.name(languages[0]) if languages else label.key
    same = name.lower().replace(" ", "_") == label.key.lower()
    return code(label.key) if same else f"{code(label.key)} ({escaped(name)})"


def _data(job: Run) -> Iterator[str]:
    section, found = job.recipe.data, job.result.get("data", {})
    sets = [name for name in section.sets if name in SOURCES or name == "imhi"]
    said = {
        "synthetic": "Synthetic posts, written by templates: no person wrote them.",
        "upstream": f"Published data sets: {', '.join(sets)}." if sets else "Published data sets.",
        "jsonl": "Records of the user's own, which are not published with this model.",
    }  # fmt: skip
    yield said[section.source] + " No post is in this repository; the numbers are counts of records."
    counts, labels = found.get("counts", {}), found.get("labels", {})
    if counts:
        yield ""
        yield "| task | train | dev | test | labels of the training records |"
        yield "|---|--:|--:|--:|---|"
    for name, splits in counts.items():
        numbers = " | ".join(str(int(splits.get(split, 0))) for split in ("train", "dev", "test"))
        task = tasks.get_task(name)
        shown = ", ".join(
            f"{escaped(key)} {int(count)}" for key in task.keys if (count := labels.get(name, {}).get(key))
        )
        yield f"| {name} | {numbers} | {shown or '–'} |"
    held_out = found.get("held_out", {})
    gone, unknown = held_out.get("left_out", {}), held_out.get("unknown_overlap", ())
    if total := sum(int(gone.get(kind, 0)) for kind in ("exact", "near")):
        yield f"\n{total} training records were left out: their posts stand in a development or test part too."
    if unknown := [name for name in unknown if name in SOURCES]:
        yield (f"\n**Overlap unknown.** Published test posts of {' and '.join(unknown)} may be among the training "
               "records: their test parts were not at hand (`data.accept_unknown_overlap`). Scores on those test parts "
               "mean nothing.")  # fmt: skip


def _training(job: Run, trained: list[StageSection], now: Mapping[str, Any]) -> Iterator[str]:
    recipe = job.recipe
    if recipe.model.quantize:
        yield f"* The base was frozen in {recipe.model.quantize} while the adapter was trained (QLoRA)."
    for number, stage in enumerate(trained, start=1):
        result, config = {**job.result, **now}.get(f"train {stage.name}", {}), stage.train
        of = ", ".join(map(escaped, stage.tasks)) if stage.tasks else "all tasks"
        replay = f", {stage.replay:.0%} of earlier records again" if stage.replay else ""
        steps = f"{int(result['steps'])} steps" if "steps" in result else "still being trained"
        loss = f", last loss {float(result['loss']):.3f}" if "loss" in result else ""
        spoken = " and ".join(map(escaped, stage.languages or ("all languages",)))
        yield f"* Stage {number}: {spoken}, {of}{replay}; {steps}, learning rate {config.learning_rate:g}{loss}."
        if stage.variant == "unfaithful":
            yield "  **Its explanations are wrong on purpose**: it is a control for the checks, not for use."


def _results(evaluation: Mapping[str, Any], last: bool) -> str:
    if not last:
        return "This is an earlier stage of a run; only the last one was evaluated."
    return f"{RESULTS_NOTE}\n\n{results_table(evaluation)}" if evaluation else "Not evaluated."


def _eval_results(job: Run, evaluation: Mapping[str, Any]) -> list[Any] | None:
    from huggingface_hub import EvalResult

    found = []
    split = job.eval_split if evaluation else None
    for name, entry in evaluation.items():
        for reading, scores in readings(entry):
            low, high = (float(value) for value in scores["ci95"])
            how = "read from the answer" if reading == "text" else "by label probability"
            found.append(
                EvalResult(
                    task_type="text-classification", task_name=f"{name}, {how}", dataset_type=job.recipe.data.source,
                    dataset_name=f"{name}, {split} records", dataset_config=f"{name}-{reading}", dataset_split=split,
                    metric_type="f1", metric_name=f"weighted F1 (95 % CI {low:.3f} to {high:.3f})",
                    metric_value=round(float(scores["weighted_f1"]), 4),
                )
            )  # fmt: skip
    return found or None


def _probes(job: Run) -> Iterator[str]:
    probed = job.result.get("probe", {})
    summary = probed.get("summary")
    if not summary:
        yield "Not probed. `probes run` tells whether an explanation cites what the model used."
        return
    conclusion = _CONCLUSIONS.get(summary.get("conclusion"), "Whether the explanations cite what the model used is "
                                  "undecided.")  # fmt: skip
    yield f"`probes` on {int(summary['n'])} posts of `{job.recipe.probe.task}`: {conclusion}"
    yield ""
    yield "| verdict on a post | posts | expected from random citations |"
    yield "|---|--:|--:|"
    for verdict in ("supported", "contradicted", "inconclusive"):
        counts, chance = summary.get("verdicts", {}), summary.get("verdicts_by_chance", {})
        yield f"| {verdict} | {int(counts.get(verdict, 0))} | {_number(chance.get(verdict), 1)} |"
    yield ""
    intervals, by_length = summary.get("mass_ratio_ci", {}), summary.get("mass_ratio_null", {})
    for method, share in summary.get("mass_ratio", {}).items():
        if method.isidentifier() and method not in _SCREENING:
            low, high = intervals.get(method) or (None, None)
            yield (f"* Positive saliency inside the cited words ({method}): {_number(share)} (95 % CI {_number(low)} "
                   f"to {_number(high)}), {_number(by_length.get(method))} by their length alone.")  # fmt: skip
    yield f"* Quotes that are not in the post: {_number(summary.get('fabricated_quote_rate'))} of all."
    told = (probed.get("check") or {}).get("diagnosticity")
    if told is not None:
        yield f"* Told from a control trained to cite something else: {_number(told)} of pairs (chance 0.5)."
    if (probed.get("check") or {}).get("erased_otherwise"):
        yield "* Of model and control one has erased tokens cut out, the other hidden: their maps differ by that, too."


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{float(value):.{digits}f}"


def _loading(job: Run, to: str, base: str | None, where: str) -> Iterator[str]:
    """One paragraph for each program, with what it does not read said (docs/adapters.md has the table)."""
    lora, base, merged = job.recipe.lora, base or "BASE", to == "merged"
    tokenizer = where if merged else base
    whole = merged or not (lora.use_dora or lora.modules_to_save)
    if to in _PEFT:
        yield f"PEFT:\n\n{_python(_ADAPTED, where, tokenizer)}"
    if to in _PEFT or merged:
        needs = "" if merged else ", with PEFT installed"
        dora = "\n\nIt computes something else for DoRA: use PEFT." if lora.use_dora and not merged else ""
        yield f"transformers{needs}:\n\n{_python(_TRANSFORMERS, where, tokenizer)}{dora}"
    else:
        yield f"PEFT and transformers do not read this format (`{to}`); export again with `--to peft`."
    if merged:
        yield f"vLLM:\n\n{_bash(f'vllm serve {where}')}"
    elif whole and to != "llama.cpp":
        of = ", unless the base is a Glm4 (then export with `--to vllm`)" if to == "peft" else ""
        rank = _vllm_rank(lora.rank)
        command = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter={where}"
        yield f"vLLM{of}:\n\n{_bash(command)}"
    else:
        yield f"vLLM: export again with `--to {'vllm' if whole else 'merged'}`."
    convert = f"hf download {where} --local-dir export"
    if merged:
        yield f"llama.cpp:\n\n{_bash(convert, 'python convert_hf_to_gguf.py export')}"
    elif whole and (to in ("llama.cpp", "chatglm") or (to == "peft" and not (lora.use_rslora or lora.alpha_pattern))):
        yield f"llama.cpp:\n\n{_bash(convert, 'python convert_lora_to_gguf.py export --base BASE_DIRECTORY')}"
    else:
        yield f"llama.cpp: export again with `--to {'llama.cpp' if whole else 'merged'}`."
    load = f'mg.load("{where}")' if merged else f'mg.load("{base}", adapter="{where}")'
    yield f"mentalglm-jax:\n\n{_python(_OURS, load, tokenizer)}"


def _vllm_rank(rank: int) -> int:
    """The smallest --max-lora-rank that vLLM offers for it."""
    return next((one for one in (8, 16, 32, 64, 128, 256, 320, 512) if rank <= one), rank)


def _python(code: str, where: str, tokenizer: str) -> str:
    return f"```python\n{code.format(where=where, tokenizer=tokenizer)}```"


def _bash(*lines: str) -> str:
    return "\n".join(["```bash", *lines, "```"])


_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
"""
_ADAPTED = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
"""
_OURS = """\
import mentalglm_jax as mg
from mentalglm_jax.checkpoints.hf_files import locate

model = {where}
tokenizer = mg.GlmTokenizer.load(locate("{tokenizer}"))
"""
