"""The first stage of a run: its records, apart from what is held out, and its tokenizer."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from mentalglm_jax.checkpoints.hf_files import locate
from mentalglm_jax.data.held_out import Split, records_split, upstream_split
from mentalglm_jax.data.records import write_records
from mentalglm_jax.data.selection import limited
from mentalglm_jax.data.sources import present
from mentalglm_jax.data.surrogates import replacing_surrogates
from mentalglm_jax.data.synthetic import make_corpus
from mentalglm_jax.errors import InputError
from mentalglm_jax.files import replace_dir
from mentalglm_jax.pipeline.kept import read_in_place
from mentalglm_jax.pipeline.run_dir import Run, replaceable
from mentalglm_jax.pipeline.stage_inputs import check_stages
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer, train_bpe


def data_stage(job: Run, progress: Callable[..., None], evaluated: bool = False) -> dict[str, Any]:
    """The records of the run, split and limited, and its tokenizer. ``evaluated``: stop where nothing could be."""
    recipe, section = job.recipe, job.recipe.data
    read: Split | None = None
    if section.source == "synthetic":
        corpora = {"faithful": make_corpus(section.synthetic)}
        if recipe.probe.control is not None:
            corpora["unfaithful"] = make_corpus(section.synthetic.model_copy(update={"variant": "unfaithful"}))
    elif section.source == "upstream":
        assert section.root is not None
        with replacing_surrogates(section.replace_surrogates):
            read = upstream_split(section.root, section.sets or present(section.root), section.dev_fraction,
                                   accept_unknown_overlap=section.accept_unknown_overlap)  # fmt: skip
        corpora = {"faithful": read.records}
    else:
        assert section.root is not None
        with replacing_surrogates(section.replace_surrogates):
            read = records_split(section.root)
        corpora = {"faithful": read.records}
    lines = [] if read is None else read.lines
    if not any(record.split == "train" for record in corpora["faithful"]):
        raise InputError(f"the recipe's data has no training records{''.join(f'; {line}' for line in lines)}")
    notes = list(lines)
    if evaluated:  # better said before training than after it
        lines.append(job.check_evaluable(corpora["faithful"]))
    counts: dict[str, dict[str, int]] = {}
    labels: dict[str, Counter[str]] = {}  # of the training records, as are the languages
    languages: Counter[str] = Counter()
    for variant, records in corpora.items():
        kept = limited(records, section.limit)
        with replace_dir(job.dir / "data" / variant, replaceable(f"data/{variant}"), private=True) as directory:
            for split in ("train", "dev", "test"):
                write_records(directory / f"{split}.jsonl", [r for r in kept if r.split == split])
        if variant == "faithful":
            for record in kept:
                counts.setdefault(record.task, {}).setdefault(record.split, 0)
                counts[record.task][record.split] += 1
                if record.split == "train":
                    labels.setdefault(record.task, Counter()).update(record.gold)
                    languages[record.language] += 1
    job.pack_tasks(job.dir, counts)
    if recipe.tokenizer.vocab_size is not None:
        texts = [turn["content"] for record in job.records("train") for turn in record.chat(recipe.answer_order)]
        tokenizer: GlmTokenizer = train_bpe(texts, recipe.tokenizer.vocab_size)
    else:
        source = recipe.tokenizer.path or (BUILTIN if recipe.pretrain else locate(str(recipe.model.path)))
        tokenizer = GlmTokenizer.load(source)
    check_stages(job, tokenizer)
    with replace_dir(job.dir / "tokenizer", replaceable("tokenizer")) as directory:
        tokenizer.save(directory)
    said = [f"{task}: " + ", ".join(f"{n} {split}" for split, n in splits.items()) for task, splits in counts.items()]
    found = {"counts": counts, "labels": labels, "languages": languages, "notes": notes, "say": said + lines,
             "read": read_in_place(recipe)}  # fmt: skip
    return found if read is None else found | {"held_out": read.to_dict()}
