"""The datasheet of a built data set: its README.md, in the sections of "Datasheets for Datasets" (Gebru et al. 2021),
with the header by which ``datasets`` and the Hub find the files."""

from collections.abc import Mapping
from typing import Any

import yaml

from mentalglm_jax.markdown import escaped

_HEAD = """# Explained mental-health posts

A research instrument, not a diagnosis. Who is in a crisis needs a person: a doctor, a crisis line, someone they trust.

## Motivation

Posts with expert labels, each with an explanation of its label, to fine-tune and check interpretable models. Built with
`mentalglm data build` after the method of C-IMHI (Zhai et al., EMNLP 2025) and IMHI (Yang et al., WWW 2024). It is not
the authors' C-IMHI.
"""
_USES = """## Uses and limits

* The explanations argue for a label that was given; they are not evidence that the label is right.
* The checks are automatic. What people thought of a sample is in `review/`, if `mentalglm data review` was run.
* The posts keep the terms of their sources. The Chinese sources state no licence: use for research, do not redistribute
  without their authors' consent.
* Contact details were replaced by rule; rules miss some. Do not try to find the people who wrote the posts.
"""


def datasheet(manifest: Mapping[str, Any]) -> str:
    """README.md from the manifest of a build."""
    recipe, records = manifest["recipe"], manifest["records"]
    splits = sorted({name.split("/")[1].removesuffix(".parquet") for name in manifest["files"] if name[:5] == "data/"})
    files = [{"split": {"dev": "validation"}.get(split, split), "path": f"data/{split}.parquet"} for split in splits]
    header = {"license": "other", "task_categories": ["text-classification", "text-generation"],
              "configs": [{"config_name": "default", "data_files": files}]}  # fmt: skip
    teacher = recipe["teacher"]
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n",
        _HEAD,
        "## Composition\n",
        f"{records['accepted']} of {records['asked']} explanations passed the required checks; "
        f"{records['filtered']} posts were refused by the teacher's content filter, {records['too_long']} left no room "
        "for an answer in its context.\n",
        "| task | split | records | labels |\n|---|---|---|---|",
        *(f"| {task} | {split} | {entry['records']} | "
          f"{', '.join(f'{escaped(label)} {count}' for label, count in entry['labels'].items())} |"
          for task, parts in sorted(manifest["counts"].items()) for split, entry in parts.items()),
        "\n`data/*.parquet` and `records/*.jsonl` hold the same records; `alpaca/*.json` the same as `instruction`, "
        "`input` (the post), `output`. `rejected.jsonl` holds what was refused, and why.\n",
        "## Collection\n",
        f"* posts: {manifest['inputs']['posts']} of "
        f"{', '.join(map(escaped, recipe['data']['sets'])) or 'a file of records'} "
        f"(SHA-256 of the records {manifest['inputs']['posts_sha256']}); contact details "
        f"{'replaced' if recipe['data']['scrub'] else 'not replaced'}",
        *(f"* {escaped(line)}" for line in manifest["inputs"]["notes"]),
        f"* teacher: {escaped(teacher['model'])}{' (local)' if teacher['local'] else ''}, "
        f"temperature {teacher['temperature']}, at most {teacher['max_tokens']} tokens, "
        f"up to {recipe['attempts']} attempts, seed {recipe['seed']}",
        f"* examples: {recipe['examples_per_class']} per class, drawn per post from {manifest['inputs']['experts']} "
        "by experts",
        *(f"* prompts: {language} version {entry['version']}, SHA-256 {entry['sha256']}"
          for language, entry in manifest["prompts"].items()),
        f"* attempts needed: {', '.join(f'{count} took {n}' for n, count in manifest['attempts'].items())}\n",
        "## Quality control\n",
        "`of`: the answers that the check could judge (near duplicates are told among those that pass the others; "
        "`label_recoverable` needs some of each label).\n",
        "| check | passed | of | rate | required |\n|---|---|---|---|---|",
        *(f"| {name} | {entry['passed']} | {entry['n']} | {_rate(entry['rate'])} | "
          f"{'yes' if name in recipe['checks']['require'] else 'no'} |" for name, entry in manifest["checks"].items()),
        "\nExplanation to label, TF-IDF and logistic regression, 5-fold (weighted F1; in the last column without the "
        "label names):\n",
        "| task | n | F1 | F1 without label names |\n|---|---|---|---|",
        *(f"| {task} | {entry['n']} | {_figure(entry['weighted_f1'])} | "
          f"{_figure(entry['weighted_f1_label_names_removed'])} |" for task, entry in manifest["consistency"].items()),
        "",
        _USES,
        "## Files (SHA-256)\n",
        *(f"    {digest}  {name}" for name, digest in manifest["files"].items()),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "too few" if value is None else f"{value:.3f}"


def _rate(value: float | None) -> str:
    return "too few" if value is None else f"{value:.1%}"
