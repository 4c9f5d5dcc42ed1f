"""``mentalglm generate``: answers to posts."""

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
    Quantize,
    ReplaceSurrogates,
    RopeTheta,
    System,
    TaskFile,
    finite,
    load_model,
    make_known,
    make_known_of,
)
from mentalglm_jax.cli.output import SAFETY, print_json, say, stderr
from mentalglm_jax.cli.progress import ConsoleReporter


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
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer directory; default: the model's")] = None,
    system: System = None,
    label_probabilities: Annotated[bool, typer.Option(help="Also how probable each label is")] = True,
    max_new_tokens: MaxNewTokens = None,
    temperature: Annotated[
        float, typer.Option(callback=finite, min=0.0, help="0 takes the likeliest token; above, draws")
    ] = 0.0,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    rope_theta: RopeTheta = None,
    replace_surrogates: ReplaceSurrogates = False,
    json_: AsJson = False,
) -> None:
    """Answers posts: label, its probability and an explanation, one row each. A post is all that is needed. Continues
    where an interrupted call stopped."""
    from mentalglm_jax.data.posts import read_posts
    from mentalglm_jax.data.surrogates import replacing_surrogates
    from mentalglm_jax.evaluate.posts import answer_posts
    from mentalglm_jax.inference.generate import count_unread

    make_known(tasks)
    make_known_of(model, adapter)
    with replacing_surrogates(replace_surrogates):
        posts = read_posts(in_, task=task, language=language, column=text, limit=limit)
    loaded, encoder = load_model(model, adapter, tokenizer, dtype=dtype, quantize=quantize, rope_theta=rope_theta)
    reporter = ConsoleReporter(stderr())
    try:
        rows = answer_posts(
            loaded, encoder, posts, out, probabilities=label_probabilities, max_new_tokens=max_new_tokens,
            temperature=temperature, batch_size=batch_size, system=system, progress=reporter.stage,
        )  # fmt: skip
    finally:
        reporter.close()
    found = count_unread(rows)
    if json_:
        print_json({"out": str(out), **found})
    else:
        say(f"{out}: {found['rows']} answers, {found['no_label']} without a readable label, {found['cut_off']} cut off "
            f"by the token limit\n{SAFETY}")  # fmt: skip
