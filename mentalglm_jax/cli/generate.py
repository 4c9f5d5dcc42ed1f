"""``mentalglm generate``: answers to posts."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from mentalglm_jax.cli.options import (
    Adapter,
    AsJson,
    BatchSize,
    Dtype,
    Limit,
    MaxNewTokens,
    ModelName,
    OnMesh,
    Quantize,
    ReplaceSurrogates,
    RopeTheta,
    System,
    TaskFile,
    Temperature,
    Tokenizer,
    finite,
    load_model,
    make_known,
    make_known_of,
    place,
)
from mentalglm_jax.cli.output import SAFETY, print_json, say, stderr
from mentalglm_jax.cli.progress import ConsoleReporter
from mentalglm_jax.errors import InputError


def generate(
    model: ModelName,
    in_: Annotated[Path, typer.Option("--in", help="Posts: .txt (one a line), .csv, .tsv, .xlsx, .jsonl or .parquet")],
    out: Annotated[Path, typer.Option("--out", help="Answers to write: .jsonl, or .csv for a spreadsheet")],
    task: Annotated[str | None, typer.Option(help="What the posts are asked; default: what each row says")] = None,
    tasks: TaskFile = None,
    language: Annotated[str | None, typer.Option(help="Of posts whose row does not say; default: told of each")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the post; default: post or text")] = None,
    limit: Limit = None,
    adapter: Adapter = None,
    tokenizer: Tokenizer = None,
    system: System = None,
    label_probabilities: Annotated[
        bool | None, typer.Option(help="Also how probable each label is; default: yes, but not with --samples")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    min_p: Annotated[
        float | None,
        typer.Option(
            callback=finite,
            min=0,
            help="With --samples: share of the likeliest token's probability that a drawn one needs",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the draws")] = 0,
    samples: Annotated[int | None, typer.Option(min=1, help="So many different answers to each post, at most")] = None,
    keep_label: Annotated[
        bool, typer.Option("--keep-label", help="With --samples: all with the label of the likeliest answer")
    ] = False,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    rope_theta: RopeTheta = None,
    replace_surrogates: ReplaceSurrogates = False,
    set_: OnMesh = [],  # noqa: B006
    json_: AsJson = False,
) -> None:
    """Answers posts: label, its probability and an explanation, one row each. A post is all that is needed. Continues
    where an interrupted call stopped."""
    from mentalglm_jax.data.posts import read_posts
    from mentalglm_jax.data.surrogates import replacing_surrogates
    from mentalglm_jax.evaluate.calibrated import scalings_of
    from mentalglm_jax.evaluate.posts import answer_posts
    from mentalglm_jax.inference.generate import check_unfinished, count_unread
    from mentalglm_jax.inference.samples import generate_samples
    from mentalglm_jax.train.recipe import opened_mesh

    if samples is None and keep_label:
        raise InputError("--keep-label goes with --samples")
    if samples is None and min_p is not None:
        raise InputError("--min-p goes with --samples")
    if samples is not None and temperature == 0:
        raise InputError("--samples needs --temperature above 0: at 0 all answers to a post are one")
    if samples is not None and label_probabilities:
        raise InputError("--label-probabilities: not with --samples, they are of a post, not of an answer")
    check_unfinished(out)  # before a model is loaded for minutes
    section = place(set_)
    make_known(tasks)
    make_known_of(model, adapter)
    with replacing_surrogates(replace_surrogates):
        scalings = scalings_of(model, adapter)
        posts = read_posts(in_, task=task, language=language, column=text, limit=limit)
    loaded, encoder = load_model(model, adapter, tokenizer, dtype=dtype, quantize=quantize, rope_theta=rope_theta,
                                 mesh=opened_mesh(section))  # fmt: skip
    reporter = ConsoleReporter(stderr())
    try:
        common = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "batch_size": batch_size,
                  "system": system}  # fmt: skip
        counts = None
        if samples is None:
            rows = answer_posts(loaded, encoder, posts, out, probabilities=label_probabilities is not False,
                                scalings=scalings, progress=reporter.stage, **common)  # fmt: skip
        else:
            rows, counts = generate_samples(loaded, encoder, posts, out_path=out, samples=samples,
                                            min_p=min_p, keep_label=keep_label, progress=reporter.stage("samples"),
                                            **common)  # fmt: skip
    finally:
        reporter.close()
    found = count_unread(rows)
    if json_:
        print_json({"out": str(out), **found, **({} if counts is None else dataclasses.asdict(counts))})
    elif counts is not None:
        say(f"{out}: {counts.rows} answers to {counts.posts} posts; not written: {counts.duplicates} that repeat "
            f"another word for word, {counts.other_label} of another label; {counts.unlabelled} posts without a label "
            f"to keep\n{SAFETY}")  # fmt: skip
    else:
        say(f"{out}: {found['rows']} answers, {found['no_label']} without a readable label, {found['cut_off']} cut off "
            f"by the token limit\n{SAFETY}")  # fmt: skip
