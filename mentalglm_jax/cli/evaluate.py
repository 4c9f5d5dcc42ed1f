"""``mentalglm evaluate``: scores of a model, or of answers that are there."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mentalglm_jax.cli.options import (
    Adapter,
    AsJson,
    BatchSize,
    Dtype,
    MaxNewTokens,
    OnMesh,
    Quantize,
    ReplaceSurrogates,
    RopeTheta,
    SetNames,
    System,
    TaskFile,
    load_model,
    make_known,
    make_known_of,
    merged,
    place,
)
from mentalglm_jax.cli.output import SAFETY, print_json, say, stderr
from mentalglm_jax.cli.progress import ConsoleReporter
from mentalglm_jax.errors import InputError, RunError

if TYPE_CHECKING:
    from mentalglm_jax.pipeline.run_dir import Run
    from mentalglm_jax.train.recipe import MeshSection


def evaluate(
    model: Annotated[str, typer.Argument(help="Model directory or Hub id, a run directory, or finished answers: a "
                                              "generations.jsonl or a directory with one")],
    adapter: Adapter = None,
    task: Annotated[str | None, typer.Option(help="Only this task")] = None,
    tasks: TaskFile = None,
    data: Annotated[Path | None, typer.Option(help="What is to be answered: what data.root of a recipe names, or a "
                                                   "labelled table (columns post, label); of finished answers, those "
                                                   "that are missing then count as wrong")] = None,
    sets: SetNames = [],  # noqa: B006
    split: Annotated[str | None, typer.Option(help="Of --data: dev (of upstream files 20 % of the training part; the "
                                                   "default where there are several), test or train; of a run its "
                                                   "own records")] = None,
    language: Annotated[str | None, typer.Option(help="Of a labelled table, e.g. en; default: that of each "
                                                      "post")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many records, drawn from the whole of a file that may be sorted")
    ] = None,
    train_data: Annotated[Path | None, typer.Option("--train", help="Training records (as --data), for floors")] = None,
    against: Annotated[Path | None, typer.Option(help="Compare with these finished answers to the same posts")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for answers and report (HTML, JSON, CSV, card)")] = None,
    encoder: Annotated[Path | None, typer.Option(help="BERT or BART directory: adds BERTScore or BARTScore of the "
                                                      "explanations")] = None,
    ratings: Annotated[Path | None, typer.Option(help="Folder of `mentalglm data review import`: adds what people said "
                                                      "about these explanations")] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    rope_theta: RopeTheta = None,
    replace_surrogates: ReplaceSurrogates = False,
    set_: OnMesh = [],  # noqa: B006
    json_: AsJson = False,
) -> None:  # fmt: skip
    """Scores labels and explanations, read from the text and as label log-probabilities, with confidence intervals;
    given --train, beside baselines; given --against, compared with another run. A run that was trained answers its own
    evaluation records, as its recipe says."""
    import tempfile

    from mentalglm_jax.checkpoints.hf_files import CALIBRATION
    from mentalglm_jax.data.selection import evenly
    from mentalglm_jax.data.surrogates import replacing_surrogates
    from mentalglm_jax.devices.together import held_by_primary, on_primary
    from mentalglm_jax.evaluate.assess import assess
    from mentalglm_jax.evaluate.calibrated import read_scalings, scalings_of
    from mentalglm_jax.evaluate.inputs import GENERATIONS, check_place, finished, read_answers, read_data, shown_name
    from mentalglm_jax.evaluate.noted import with_adapter
    from mentalglm_jax.evaluate.report import CARD, write_report
    from mentalglm_jax.evaluate.tables import format_comparison, format_table
    from mentalglm_jax.files import check_unedited, working_in
    from mentalglm_jax.inference.generate import forget_partial
    from mentalglm_jax.text.tasks import added_tasks, keep_tasks
    from mentalglm_jax.train.recipe import opened_mesh

    section = place(set_)
    make_known(tasks)
    job = _run_of(Path(model), section)
    floors = job if data is None and split != "train" else None  # of records of its own, by its own training records
    answered = finished(Path(model)) and (job is None or "generate" in job.result)
    own = job is not None and data is None and (split is not None or not answered)  # it answers records of its own
    of_a_model = {"--adapter": adapter, "--quantize": quantize, "--rope-theta": rope_theta}
    if answered or job is not None:
        _refuse(f"{model}: holds {'finished answers' if answered else 'its adapter'}", of_a_model, "a model")
    if job is not None and (own or not answered):
        job.check_trained()
    if job is not None:
        job.check_unchanged("data", lambda _: True)  # its training records make floors, its tasks say what labels mean
        if answered and not own:
            job.check_unchanged("generate")
            job.check_unchanged("evaluate")
        else:
            job.check_unchanged("evaluate", lambda name: name == CALIBRATION)
    if out is not None:
        check_unedited(out / CARD)
        check_place(out, Path(model) if (split is None if own else answered) else None)
    of_records = {"--system": system, "--limit": limit, "--max-new-tokens": max_new_tokens}
    if job is not None and own and split is not None:
        answered, data = False, job.records_file(split)
    elif job is not None and own:
        _refuse(f"{model}: answers as its recipe says", of_records, "--split or --data")
        answered = _answer_own(job.dir, section)
    elif answered:
        _refuse(f"{model}: holds finished answers", of_records, "a model")
    if not answered and data is None:
        raise InputError(f"{model}: is a model; say what it is to answer with --data PATH")
    if not answered and job is None:
        make_known_of(model, adapter)
    with replacing_surrogates(replace_surrogates):  # all that is read, before a model works for hours
        answers = read_answers(model).of_task(task) if answered else None
        records = None if data is None else read_data(data, task, split, language, sets)
        if records is not None and limit is not None:
            records = [records[i] for i in evenly(len(records), limit)]
        train = [] if train_data is None else read_data(train_data, task, "train", language, sets)
        if floors is not None and train_data is None and floors.records_file("train").is_file():
            train = [record for record in floors.records("train") if task in (None, record.task)]
        others = None if against is None else read_answers(against).of_task(task)
        if out is not None:
            named = answers.tasks() if answers is not None else {record.task for record in records or ()}
            keep_tasks(out, added_tasks(named), write=False)
        scalings = {}
        # Never told of records that may be those it was fitted on.
        if not answered and not any(record.split == "dev" for record in records or ()):
            scalings = scalings_of(model, adapter) if job is None else read_scalings(job.dir)
    with contextlib.ExitStack() as alone:  # nobody else works in --out meanwhile
        if answers is None:
            assert records is not None
            if out is not None:
                alone.enter_context(held_by_primary(lambda: working_in(out)))
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    if job is None:
                        speaker = load_model(model, adapter, None, dtype=dtype, quantize=quantize,
                                             rope_theta=rope_theta, mesh=opened_mesh(section))  # fmt: skip
                    else:
                        speaker = merged(job.load_final()), job.tokenizer()
                    answers = _answer(*speaker, records, out or Path(scratch), max_new_tokens=max_new_tokens,
                                      batch_size=batch_size, system=system, scalings=scalings)  # fmt: skip
                except KeyboardInterrupt:
                    if out is not None:
                        raise
                    raise RunError(
                        "interrupted; nothing is kept: with --out DIR the same command would continue"
                    ) from None
        result, compared = assess(answers, records, train=train, against=others, encoder=encoder, ratings=ratings)
        if job is not None:
            result = with_adapter(result, job.result)
        if out is not None:
            if answered:
                alone.enter_context(held_by_primary(lambda: working_in(out)))
            on_primary(lambda: write_report(out, result, title=shown_name(model), compared=compared,
                                            against="" if against is None else shown_name(str(against))))  # fmt: skip
            if not answered:
                forget_partial(out / GENERATIONS)
    if json_:
        print_json({"tasks": result, "comparison": compared} if compared is not None else result)
        return
    say(format_table(result))
    if compared is not None:
        say(format_comparison(compared))
    if out is not None:
        say(f"report   {out / 'evaluation.html'}")
    say(f"\n{SAFETY}", style="dim")


def _refuse(what: str, options: Mapping[str, Any], where: str) -> None:
    """Raises: InputError if one of ``options`` was given."""
    if given := [name for name, value in options.items() if value is not None]:
        raise InputError(f"{what}; {given[0]} goes with {where}")


def _run_of(directory: Path, mesh: "MeshSection | None") -> "Run | None":
    """The run in ``directory``; None where there is none, or none that can be read beside its answers. One that is
    refused for what else is in it is refused here too: its answers may not be what its stages left."""
    from mentalglm_jax.evaluate.inputs import finished
    from mentalglm_jax.pipeline.run_dir import NoRun, Run

    if not (directory / "run.json").is_file():
        return None
    try:
        return Run.opened(directory, mesh=mesh)
    except NoRun:
        if finished(directory):
            return None
        raise


def _answer_own(run_dir: Path, mesh: "MeshSection | None") -> bool:
    """The answers of a trained run to its evaluation records, with progress; True once they are finished."""
    from mentalglm_jax.pipeline.job import evaluate_run

    reporter = ConsoleReporter(stderr())
    try:
        evaluate_run(run_dir, reporter, mesh)
    finally:
        reporter.close()
    return True


def _answer(loaded: Any, tokenizer: Any, records: Sequence[Any], out: Path, **options: Any) -> Any:
    """Both readings of ``records`` by a model, with progress."""
    from mentalglm_jax.evaluate.inputs import answer_records

    reporter = ConsoleReporter(stderr())
    try:
        return answer_records(loaded, tokenizer, records, out, progress=reporter.stage, **options)
    finally:
        reporter.close()
