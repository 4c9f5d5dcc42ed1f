"""What a training stage is given: its records, weighed, and their examples."""

from collections.abc import Sequence

import numpy as np

from mentalglm_jax.data.batches import Example, encode_records
from mentalglm_jax.data.records import Record
from mentalglm_jax.data.selection import mixture, weighted
from mentalglm_jax.errors import InputError
from mentalglm_jax.pipeline.run_dir import Run
from mentalglm_jax.text.tokenizer import GlmTokenizer
from mentalglm_jax.train.recipe import StageSection


def chosen(job: Run, stage: StageSection, split: str = "train") -> list[Record]:
    """The records of one split that are of the stage's languages and tasks."""
    return [
        record for record in job.records(split, stage.variant)
        if (stage.languages is None or record.language in stage.languages)
        and (stage.tasks is None or record.task in stage.tasks)
    ]  # fmt: skip


def drawn(job: Run, stage: StageSection) -> tuple[list[Record], list[str]]:
    """The training records of an epoch, each as often as ``stage.weights`` says, and lines that tell the mix.

    Raises: InputError as ``weighted``, naming the stage.
    """
    records = chosen(job, stage)
    if not stage.weights:
        return records, []
    try:
        found = weighted(records, stage.weights, job.recipe.seed)
    except InputError as error:
        raise InputError(f"stage {stage.name}: {error}") from None
    return found, mixture(records, found)


def stage_examples(
    job: Run, stage: StageSection, earlier: Sequence[StageSection], tokenizer: GlmTokenizer
) -> tuple[list[Example], list[str]]:
    """What ``stage`` trains on, replay of the ``earlier`` stages included, and the ids of records that are too long."""
    records, lines = drawn(job, stage)
    if job.say is not None:
        for line in lines:
            job.say(line)
    for other in earlier:
        seen = chosen(job, other)
        order = np.random.default_rng(job.recipe.seed).permutation(len(seen))
        records += [seen[i] for i in order[: round(stage.replay * len(seen))]]
    return encode_records(records, tokenizer, stage.train.sequence_length, job.recipe.answer_order)


def check_weights(job: Run) -> None:
    """Weighs the records of every stage, so that a name that fits none is found before hours of training.

    Raises: InputError as ``drawn``.
    """
    recipe = job.recipe
    stages = [*recipe.stages, *(recipe.pretrain.then if recipe.pretrain else ())]
    for stage in [*stages, *([recipe.probe.control] if recipe.probe.control else [])]:
        if stage.weights:
            drawn(job, stage)
