"""What an import writes: records per split, the task where it is new, a recipe, a datasheet, a manifest."""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mentalglm_jax.data.records import SPLITS, Record, write_records
from mentalglm_jax.data.written import check_replaceable, digests, write_manifest
from mentalglm_jax.errors import InputError
from mentalglm_jax.files import replace_dir, write_text
from mentalglm_jax.foreign import read_json
from mentalglm_jax.markdown import escaped
from mentalglm_jax.text import tasks

RECIPE = "recipe.yaml"
_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
_ROWS = 8  # one for each device of the slice that the comments name


class _Size(NamedTuple):
    """Of models up to a width: dtype and remat, learning rate, steps below which an adapter learns little at it (so a
    small table is read more often), and how often at most."""

    width: float
    kept: str
    rate: str
    steps: int
    epochs: int


_SIZES = (
    _Size(512, "float32, remat: none", "4.0e-3", 100, 50),  # as in configs/demo.yaml
    _Size(1024, "float32, remat: full", "1.0e-3", 60, 20),  # as in configs/study.yaml
    _Size(math.inf, "bfloat16, remat: full", "1.0e-4", 60, 10),
)
_FEWEST = 3  # epochs
_ROOM = 1.5  # of a row's length over its longest record: the tokenizer may be another
_PLAIN = re.compile(r"[\w./-]+")

_RECIPE = """# Made by `mentalglm data import`: {records} posts in {languages}, {labels} labels. Yours to edit.
#   mentalglm plan {recipe} --topology v5e-8     does it fit a TPU, how fast can it be; docs/training.md has GPUs
#   mentalglm train {recipe}                     the adapter, in {run}/stages
#   mentalglm run {recipe}                       that, and export, evaluation, probes, report
run_dir: {run}
seed: {seed}
{tasks}
data: {{source: jsonl, root: {root}}}

model: {{path: {model}, dtype: {kept}}}{note}

lora: {{rank: 16, alpha: 32, dropout: 0.05, target_modules: all-linear}}

mesh: {{data: 1, fsdp: -1, tensor: 1}}    # all devices that are there share weights and rows

stages:
  - name: posts    # a row holds several posts; rows / accumulate of them are on the devices at a time
    train: {{epochs: {epochs}, rows: {rows}, accumulate: 1, sequence_length: {length}, learning_rate: {rate},
            save_every: 200}}

generate: {{batch_size: 16}}

probe: {{task: {task}, posts: 40, budget: standard}}
"""

_HEAD = """# {title}

A research instrument, not a diagnosis. Who is in a crisis needs a person: a doctor, a crisis line, someone they trust.

Made by `mentalglm data import`. It holds posts: keep it as private as they are. Posts keep the terms under which they
were written and collected; this page is for you to complete (who labelled them and how, who agreed to what).

## Composition

"""


def write_import(
    out: Path, records: Sequence[Record], task: tasks.Task, facts: Mapping[str, Any], *, model: str, seed: int
) -> dict[str, Any]:  # fmt: skip
    """Writes the folder ``out`` anew.

    Args:
        task: written beside the records, unless it comes with the package.
        facts: what was found, JSON-ready, for manifest and datasheet.

    Returns:
        The manifest.

    Raises:
        InputError: ``out`` holds something else than an unchanged import.
        RunError: the file system refused.
    """
    manifest = dict(facts)
    with replace_dir(out, check_replaceable, private=True) as folder:
        for split in SPLITS:
            if part := [record for record in records if record.split == split]:
                write_records(folder / f"{split}.jsonl", part)
        if task.name not in tasks.BUILT_IN:
            tasks.write_tasks(folder / tasks.TASKS_FILE, [task])
        write_text(folder / RECIPE, _recipe(out, records, task, model, seed))
        manifest["files"] = digests(folder)
        write_manifest(folder, manifest, datasheet(manifest))
    return manifest


def _recipe(out: Path, records: Sequence[Record], task: tasks.Task, model: str, seed: int) -> str:
    lengths = [_tokens(record.prompt + record.answer()) for record in records]
    length = next((one for one in _LENGTHS if one >= _ROOM * max(lengths)), _LENGTHS[-1])
    trained = sum(tokens for tokens, record in zip(lengths, records, strict=True) if record.split == "train")
    steps = max(1, round(trained / length / _ROWS))
    size = next(one for one in _SIZES if _width(model) <= one.width)
    return _RECIPE.format(
        records=len(records), languages=" and ".join(sorted({record.language for record in records})),
        labels=len(task.labels), recipe=_quoted(str(out / RECIPE)), run=_quoted(f"runs/{out.name}"), seed=seed,
        tasks="" if task.name in tasks.BUILT_IN else f"tasks: {_quoted(str(out / tasks.TASKS_FILE))}\n",
        root=_quoted(str(out)), model=_quoted(model), rows=_ROWS,
        epochs=min(max(math.ceil(size.steps / steps), _FEWEST), size.epochs), kept=size.kept, rate=size.rate,
        note="    # float32 on a CPU" if size.kept.startswith("bfloat16") else "",
        length=length, task=_quoted(task.name),
    )  # fmt: skip


def _width(model: str) -> float:
    """``hidden_size`` of a model whose directory is here; infinite of what is not known yet."""
    with contextlib.suppress(InputError):
        found = read_json(Path(model) / "config.json").get("hidden_size")
        if isinstance(found, int):
            return float(found)
    return math.inf


def _tokens(text: str) -> float:
    """About how many tokens a text has, told from its Chinese and its other characters."""
    return sum(1.0 if one > "\u2e80" else 0.35 for one in text)


def _quoted(text: str) -> str:
    """``text`` as YAML has it within a line, in quotation marks where it needs them."""
    if _PLAIN.fullmatch(text) and yaml.safe_load(text) == text:
        return text
    marks = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(marks.get(one, one) if one.isprintable() else f"\\U{ord(one):08x}" for one in text) + '"'


def datasheet(manifest: Mapping[str, Any]) -> str:
    """README.md from the manifest of an import, with the header by which ``datasets`` and the Hub find the files."""
    files = [{"split": {"dev": "validation"}.get(split, split), "path": f"{split}.jsonl"}
             for split in manifest["splits"]]  # fmt: skip
    header = {"language": list(manifest["languages"]), "task_categories": ["text-classification"],
              "configs": [{"config_name": "default", "data_files": files}]}  # fmt: skip
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n",
        _HEAD.format(title=manifest["task"]) + "| split | records | labels |\n|---|---|---|",
        *(f"| {split} | {entry['records']} | {', '.join(f'{escaped(k)} {n}' for k, n in entry['labels'].items())} |"
          for split, entry in manifest["splits"].items()),
        "\nLanguages: " + ", ".join(f"{name} {count}" for name, count in manifest["languages"].items())
        + f". With an explanation: {manifest['explanations']}.",
        "\n## Collection\n",
        f"* from {escaped(manifest['source']['name'])} ({manifest['rows']} rows)",
        *(f"* {escaped(note)}" for note in manifest["notes"]),
        "\n## Files (SHA-256)\n",
        *(f"    {digest}  {name}" for name, digest in manifest["files"].items()),
        "",
    ]  # fmt: skip
    return "\n".join(lines)
