"""What a training stage is given: its records, weighed, or its pairs, as examples; and the adapter it starts from."""

from collections.abc import Sequence

import numpy as np
from flax import nnx

from mentalglm_jax.checkpoints.adapters import load_adapter
from mentalglm_jax.data.batches import Example, encode_conversations, encode_records
from mentalglm_jax.data.conversations import Conversation, apart_from, read_conversations
from mentalglm_jax.data.pairs import encode_pairs, read_pairs
from mentalglm_jax.data.records import Record
from mentalglm_jax.data.selection import evenly, mixture, weighted
from mentalglm_jax.errors import InputError
from mentalglm_jax.inference.scoring import label_ids
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.model.lora import add_lora, resolve
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


def dev_records(job: Run, stage: StageSection) -> list[Record]:
    """What ``eval_every`` looks at: ``eval_examples`` of the stage's development records, from the whole of them, so
    that every task and label has its share in what stops the stage and chooses its best step."""
    if stage.train.eval_every is None:
        return []
    records = chosen(job, stage, "dev")
    return [records[i] for i in evenly(len(records), stage.train.eval_examples)]


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
    """What ``stage`` trains on, replay of the ``earlier`` stages included, and the ids of records, or pairs, that are
    too long."""
    if stage.objective is not None:
        return encode_pairs(read_pairs(stage.objective.pairs, tokenizer.vocab_size), stage.train.sequence_length)
    records, lines = drawn(job, stage)
    if job.say is not None:
        for line in lines:
            job.say(line)
    for other in (one for one in earlier if one.objective is None):
        seen = chosen(job, other)
        order = np.random.default_rng(job.recipe.seed).permutation(len(seen))
        records += [seen[i] for i in order[: round(stage.replay * len(seen))]]
    length, talks = stage.train.sequence_length, conversations(job, stage)
    kept, too_long = encode_conversations(talks, tokenizer, length, stage.train_on or "last")
    if records or not kept:
        examples, longer = encode_records(records, tokenizer, length, job.recipe.answer_order)
        kept, too_long = [*examples, *kept], [*longer, *too_long]
    return kept, too_long


def conversations(job: Run, stage: StageSection) -> list[Conversation]:
    """The conversations of a stage without those that have a post of a held-out record; a line says how many went.

    Raises: InputError as ``read_conversations``; or none is left.
    """
    if stage.conversations is None:
        return []
    held_out = [record for split in ("dev", "test") for record in job.records_if_any(split)]
    given = read_conversations(stage.conversations)
    found, gone = apart_from(given, held_out)
    if not found:
        raise InputError(f"{stage.conversations}: every conversation has a post of the development or test records, so "
                         "none can be trained on")  # fmt: skip
    if gone and job.say is not None:
        job.say(f"{stage.conversations}: {gone} of {len(given)} conversations are left out: they have posts of the "
                "development or test records")  # fmt: skip
    return found


def check_stages(job: Run, tokenizer: GlmTokenizer) -> None:
    """Weighs the records of every stage, reads its conversations and pairs, and writes the label sentences, so that a
    name that fits none, a file that is damaged, or labels that cannot be scored are found before hours of training.

    Raises: InputError as ``drawn``, ``read_conversations``, ``read_pairs`` and ``label_ids``.
    """
    recipe = job.recipe
    stages = [*recipe.stages, *(recipe.pretrain.then if recipe.pretrain else ())]
    for stage in [*stages, *([recipe.probe.control] if recipe.probe.control else [])]:
        if stage.objective is not None:
            read_pairs(stage.objective.pairs, tokenizer.vocab_size)
        elif stage.weights:
            drawn(job, stage)
        if stage.conversations is not None:
            read_conversations(stage.conversations)
    if recipe.generate.label_scores:
        asked = [record for split in ("train", "dev", "test") for record in job.records_if_any(split)]
        for task, language in dict.fromkeys((record.task, record.language) for record in asked):
            label_ids(tokenizer, task, language, recipe.answer_order)


def start_adapter(job: Run, model: Glm, previous: str | None) -> None:
    """Puts the adapter that a stage starts from on ``model``: that of the stage ``previous``, else the recipe's
    ``model.adapter``, else a fresh one.

    Raises:
        InputError: as ``load_adapter``; or ``lora`` describes another adapter than the one that is there.
    """
    recipe, wanted = job.recipe, job.recipe.lora.config()
    if previous is not None:
        load_adapter(model, job.adapter_dir(previous))
        return
    if recipe.model.adapter is None:
        add_lora(model, wanted, nnx.Rngs(recipe.seed))
        return
    load_adapter(model, recipe.model.adapter)
    found = model.lora_config
    differing = [name for name in ("rank", "alpha", "use_dora", "use_rslora", "modules_to_save")
                 if getattr(found, name) != getattr(wanted, name)]  # fmt: skip
    if differing or resolve(model, found) != resolve(model, wanted):
        said = [f"{name} {getattr(wanted, name)} where it has {getattr(found, name)}" for name in differing]
        raise InputError(f"lora: describes another adapter than model.adapter ({recipe.model.adapter}): "
                         f"{', '.join(said) or 'its modules, ranks or scales differ'}; write there what its "
                         "adapter_config.json says")  # fmt: skip
