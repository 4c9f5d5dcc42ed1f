"""``mentalglm data``: inspect, build and review data. Every command is one library call; prints no post."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mentalglm_jax.cli.options import AsJson, Overrides, ReplaceSurrogates, SetNames, TaskFile, finite, make_known
from mentalglm_jax.cli.output import TYPER, cell, examples, print_json, say
from mentalglm_jax.cli.progress import ConsoleReporter
from mentalglm_jax.errors import InputError

review_app = typer.Typer(**TYPER, help="People rate a sample of explanations.",
                         epilog=examples("mentalglm data review COMMAND --help"))  # fmt: skip
data_app = typer.Typer(**TYPER, help="Look at data, build explanations, have people check them.",
                       epilog=examples("mentalglm data COMMAND --help"))  # fmt: skip
data_app.add_typer(review_app, name="review")


@data_app.command("inspect", epilog=examples("mentalglm data inspect my-data --set-name sos_hl_1k"))
def data_inspect(
    root: Annotated[
        Path,
        typer.Argument(
            help="What data.root of a recipe names: a folder of upstream files, of "
            "records or of `datasets`, or one file of them"
        ),
    ],
    sets: SetNames = [],  # noqa: B006
    near: Annotated[bool, typer.Option(help="Look for near duplicates too")] = True,
    threshold: Annotated[float, typer.Option(callback=finite, help="Similarity from which two posts are near")] = 0.8,
    out: Annotated[Path | None, typer.Option(help="Also write the records here, contact details replaced")] = None,
    tasks: TaskFile = None,
    replace_surrogates: ReplaceSurrogates = False,
    json_: AsJson = False,
) -> None:
    """Counts, labels, lengths, duplicates, posts on both sides of a split, label conflicts, contact details."""
    from mentalglm_jax.data.contacts import scrub_record
    from mentalglm_jax.data.inspection import Inspection
    from mentalglm_jax.data.roots import iter_root
    from mentalglm_jax.data.surrogates import replacing_surrogates

    make_known(tasks)
    inspection = Inspection(near, threshold)
    kept = []
    with replacing_surrogates(replace_surrogates):
        for record in iter_root(root, sets):
            inspection.add(record)
            if out is not None:
                kept.append(scrub_record(record))
    report = inspection.report()
    if out is not None:
        _write_splits(out, kept)
        report["scrubbed"] = str(out)
    if json_:
        print_json(report)
        return
    for line in inspection_lines(report):
        say(line)


@data_app.command(
    "import",
    epilog=examples(
        "mentalglm data import posts.csv --text text --label label --user author --task mood --out mine",
        "mentalglm data import posts.xlsx --text post --label topics --sep ';' --out mine",
    ),
)
def data_import(
    source: Annotated[
        str,
        typer.Argument(
            metavar="TABLE",
            help="CSV, TSV, Excel, JSON, JSON Lines, Parquet or Arrow file; a folder of such, one per "
            "split, or what `datasets` saved; or a data set's Hub id",
        ),
    ],
    text: Annotated[str, typer.Option(metavar="COLUMN", help="Column with the posts")],
    label: Annotated[str, typer.Option(metavar="COLUMN", help="Column with the labels")],
    out: Annotated[Path, typer.Option(help="Folder to write: records, recipe, datasheet and, if it is new, the task")],
    explanation: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column with explanations")] = None,
    id_: Annotated[
        str | None, typer.Option("--id", metavar="COLUMN", help="Column with ids; default: made of the row's number")
    ] = None,
    user: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column with authors; one's posts stay in one split")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="A known task, or the name of the one that is made of the labels found")
    ] = None,
    sep: Annotated[str | None, typer.Option(help="What separates several labels of one cell, e.g. ';'")] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Per cent of train, dev and test; default: the splits the files name, else 80/10/10"),
    ] = None,
    language: Annotated[str, typer.Option(help="en | zh | auto: told of each post")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the split")] = 0,
    skip: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be taken, and say which")
    ] = False,
    scrub: Annotated[bool, typer.Option("--scrub-contacts", help="Replace contact details by placeholders")] = False,
    encoding: Annotated[str | None, typer.Option(help="Of a CSV or TSV; default: found, and said")] = None,
    sheet: Annotated[str | None, typer.Option(help="Of a workbook; default: the first")] = None,
    config: Annotated[str | None, typer.Option(help="Of a data set of the Hub that has several")] = None,
    model: Annotated[
        str, typer.Option(help="Model directory or Hub id that the recipe trains")
    ] = "zai-org/glm-4-9b-hf",
    tasks: TaskFile = None,
    replace_surrogates: ReplaceSurrogates = False,
    json_: AsJson = False,
) -> None:
    """Makes records of anybody's table: splits them (posts of one author and near copies stay together), writes a task
    where the labels are new, a recipe and a datasheet. Prints no post."""
    from mentalglm_jax.data.intake.importing import Choices, import_table, next_steps, read_shares
    from mentalglm_jax.data.intake.rows import Columns
    from mentalglm_jax.data.surrogates import replacing_surrogates

    make_known(tasks)
    choices = Choices(
        task=task, separator=sep, language=None if language == "auto" else language,
        shares=None if split is None else read_shares(split), seed=seed, skip=skip, scrub=scrub, encoding=encoding,
        sheet=sheet, config=config, model=model,
    )  # fmt: skip
    with replacing_surrogates(replace_surrogates):
        manifest = import_table(source, out, Columns(text, label, explanation, id_, user), choices)
    if json_:
        print_json(manifest | {"out": str(out)})
        return
    for line in import_lines(manifest):
        say(line)
    for number, line in enumerate(next_steps(out, manifest["own_task"])):
        say(f"{'next' if not number else '':<6}{line}")


def import_lines(manifest: dict[str, Any]) -> Iterator[Table | str]:
    """What ``import`` prints: what was found out, then the records per split."""
    yield from manifest["notes"]
    table = Table(show_edge=False, header_style="bold")
    for name in ("split", "records", "labels"):
        table.add_column(name, justify="right" if name == "records" else "left")
    for split, entry in manifest["splits"].items():
        labels = ", ".join(f"{label} {count}" for label, count in entry["labels"].items())
        table.add_row(split, str(entry["records"]), cell(labels))
    yield table
    languages = ", ".join(f"{language} {count}" for language, count in manifest["languages"].items())
    yield f"languages: {languages}; with an explanation: {manifest['explanations']}"


def _write_splits(folder: Path, records: list[Any]) -> None:
    from mentalglm_jax.data.records import SPLITS, records_text
    from mentalglm_jax.data.written import check_same
    from mentalglm_jax.files import working_in, write_text
    from mentalglm_jax.text.tasks import added_tasks, keep_tasks

    parts = {f"{split}.jsonl": [record for record in records if record.split == split] for split in SPLITS}
    texts = {name: records_text(rows) if rows else None for name, rows in parts.items()}
    with working_in(folder):
        check_same(folder, texts, "it may be what was read, or another's")
        keep_tasks(folder, added_tasks(record.task for record in records))
        for name, text in texts.items():
            if text is not None:
                write_text(folder / name, text, private=True)


def inspection_lines(report: dict[str, Any]) -> Iterator[Table | str]:
    """What ``inspect`` prints: a table of the parts, then one line per finding."""
    table = Table(show_edge=False, header_style="bold")
    for name in ("task", "source", "split"):
        table.add_column(name, no_wrap=name == "task")
    for name in ("records", "duplicates", "contact rows", "characters (median, p95, max)"):
        table.add_column(name, justify="right")
    table.add_column("labels")
    for task, sources in report["tasks"].items():
        for source, splits in sources.items():
            for split, entry in splits.items():
                lengths = entry["characters"]
                labels = ", ".join(f"{label} {count}" for label, count in entry["labels"].items())
                table.add_row(task, cell(source), split, str(entry["records"]), str(entry["duplicates"]),
                              str(entry["contact_rows"]), f"{lengths['median']}, {lengths['p95']}, {lengths['max']}",
                              cell(labels))  # fmt: skip
    yield table
    for kind, words in (("overlap", "train and held-out part of one source"), ("crossings", "across sources")):
        for entry in report[kind]:
            near = f", {entry['near']} near" if "near" in entry else ""
            yield (f"{words}: {'/'.join(entry['train'][1:])} and {'/'.join(entry['held_out'][1:])} share "
                   f"{entry['exact']} posts exactly{near}")  # fmt: skip
    conflicts = report["conflicts"]
    yield f"posts with two different labels for one question: {conflicts['same_task']}"
    if conflicts["level_posts_shared_with_risk"]:
        yield (f"risk level against high/low: {conflicts['level_against_risk']} of "
               f"{conflicts['level_posts_shared_with_risk']} shared posts disagree")  # fmt: skip
    yield f"rows with contact details: {report['contacts']['rows']}"
    if "scrubbed" in report:
        yield f"{report['scrubbed']}: written, contact details replaced"


@data_app.command("build", epilog=examples("mentalglm data build configs/build/c-imhi.yaml"))
def data_build(
    recipe: Annotated[Path, typer.Argument(help="Build recipe, e.g. configs/build/c-imhi.yaml")],
    set_: Overrides = [],  # noqa: B006
    tasks: TaskFile = None,
    json_: AsJson = False,
) -> None:
    """Has a teacher explain labelled posts, checks every explanation, writes a data set. Continues where it stopped."""
    from mentalglm_jax.data.explain.build import build, load_build_recipe

    make_known(tasks)
    loaded = load_build_recipe(recipe, set_)
    teacher = local_teacher(loaded.teacher, loaded.cache) if loaded.teacher.local else None
    reporter = ConsoleReporter(Console(stderr=True))
    try:
        manifest = build(loaded, reporter.stage("explain", announced=False), teacher)
    finally:
        reporter.close()
    if json_:
        print_json(manifest)
        return
    table = Table(show_edge=False, header_style="bold")
    table.add_column("check")
    table.add_column("passed", justify="right")
    for name, entry in manifest["checks"].items():
        rate = "too few" if entry["rate"] is None else f"{entry['rate']:.1%}"
        table.add_row(name, f"{entry['passed']}/{entry['n']} ({rate})")
    say(table)
    counts, stats = manifest["records"], manifest["teacher"]
    say(f"{counts['accepted']} of {counts['asked']} explanations kept; teacher: "
        f"{', '.join(f'{what} {count}' for what, count in sorted(stats.items()))}\n"
        f"{loaded.out}: written")  # fmt: skip


@review_app.command("export", epilog=examples("mentalglm data review export runs/demo --out review --language en"))
def review_export(
    source: Annotated[
        Path,
        typer.Argument(
            help="Output of `data build`, records with explanations, or a model's "
            "answers: a run directory or its generations.jsonl"
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for review.html, review.csv and sample.jsonl")],
    count: Annotated[int, typer.Option("--limit", min=1, help="Explanations to rate, at most")] = 200,
    seed: Annotated[int, typer.Option(help="Of the sample")] = 0,
    language: Annotated[str, typer.Option(help="Of the form: zh | en")] = "zh",
    tasks: TaskFile = None,
    json_: AsJson = False,
) -> None:
    """Writes a stratified sample as one offline form (and CSV) on four scales. Copies the posts into it."""
    from mentalglm_jax.data.explain.review import answered, export_review
    from mentalglm_jax.data.records import read_records

    make_known(tasks)
    answers = source / "generations.jsonl" if source.is_dir() else source
    if answers.name == "generations.jsonl" and answers.is_file():
        from mentalglm_jax.evaluate.answers import read_generations

        records, labels_by = answered(read_generations(answers)), "model"
    else:
        files = sorted((source / "records").glob("*.jsonl")) if source.is_dir() else [source]
        if not files:
            raise InputError(f"{source}: neither records/*.jsonl nor generations.jsonl here; give the folder that "
                             "`mentalglm data build` wrote, or a run directory")  # fmt: skip
        records = [record for file in files for record in read_records(file, allow_extra=True)]
        labels_by = "experts"
    made = export_review(records, out, count=count, seed=seed, language=language, labels_by=labels_by)
    if json_:
        print_json(made | {"out": str(out)})
    else:
        say(f"{out / 'review.html'}: {made['items']} explanations, form {made['form']}")


@review_app.command("import", epilog=examples("mentalglm data review import review ratings-a.json ratings-b.json"))
def review_import(
    folder: Annotated[Path, typer.Argument(help="Folder that `review export` wrote")],
    ratings: Annotated[list[Path], typer.Argument(help="Files the form downloaded, one per rater (.json, .csv)")],
    accept_at: Annotated[
        float, typer.Option(callback=finite, min=0, max=3, help="Mean rating from which a record is accepted")
    ] = 2.0,
    json_: AsJson = False,
) -> None:
    """Merges several raters: agreement, disagreements, accepted records. Prints no post."""
    from mentalglm_jax.data.explain.review import import_review

    result = import_review(folder, ratings, accept_at=accept_at)
    if json_:
        print_json(result)
        return
    table = Table(show_edge=False, header_style="bold")
    for name in ("scale", "mean", "Fleiss κ", "Krippendorff α", "rated by all"):
        table.add_column(name)
    for scale, entry in result["agreement"].items():
        values = (entry["mean"], entry["fleiss_kappa"], entry["krippendorff_alpha"])
        table.add_row(scale, *("–" if v is None else f"{v:.3f}" for v in values), str(entry["items_rated_by_all"]))
    say(table)
    for one in result["disagreements"]:
        say(f"{one['id']}: apart on {', '.join(one['scales'])}")
    counts = f"{result['accepted']} of {result['rated']} rated records accepted"
    say(f"{counts} ({len(result['raters'])} raters)")


def local_teacher(config: Any, cache: Path) -> Any:
    """A ``LocalTeacher`` around a model that this package loads."""
    from mentalglm_jax.checkpoints.directories import load
    from mentalglm_jax.checkpoints.hf_files import locate
    from mentalglm_jax.data.explain.teacher import AnswerCache, LocalTeacher
    from mentalglm_jax.inference.generate import model_fingerprint
    from mentalglm_jax.model.lora import has_lora, merge_lora
    from mentalglm_jax.serve.local import LocalChats
    from mentalglm_jax.text.tokenizer import GlmTokenizer

    model = load(config.model, adapter=config.adapter)
    model = merge_lora(model) if has_lora(model) else model
    tokenizer = GlmTokenizer.load(locate(config.model))

    chats = LocalChats(
        model, tokenizer, rows=config.concurrency, max_tokens=config.max_tokens, temperature=config.temperature
    )
    return LocalTeacher(config, AnswerCache(cache), model_fingerprint(model), chats)
