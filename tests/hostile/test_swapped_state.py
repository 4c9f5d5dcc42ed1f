"""State that was edited, swapped or half replaced between two commands: the next one goes on with nothing of it."""

import dataclasses
import json
import os
import shutil

import jax.numpy as jnp
import pytest
from flax import nnx

from mentalglm_jax.checkpoints.adapters import save_adapter
from mentalglm_jax.checkpoints.directories import load, save_pretrained
from mentalglm_jax.data.batches import encode_chats
from mentalglm_jax.errors import InputError
from mentalglm_jax.evaluate.assess import assess
from mentalglm_jax.evaluate.inputs import read_answers
from mentalglm_jax.inference.generate import generate_records, model_fingerprint, partial_file
from mentalglm_jax.inference.samples import generate_samples
from mentalglm_jax.model.fingerprint import base_fingerprint
from mentalglm_jax.model.lora import LoraConfig, add_lora
from mentalglm_jax.pipeline.data_stage import data_stage
from mentalglm_jax.pipeline.run_dir import Run
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import GlmTokenizer
from mentalglm_jax.train.loop import train
from mentalglm_jax.train.recipe import TrainConfig
from tests.hostile.attack import refused, run
from tests.hostile.world import RECORDS


class Killed(Exception):
    """Raised where the process is meant to have died."""


def killed(done, total):
    raise Killed


@pytest.fixture(scope="module")
def tokenizer(template):
    return GlmTokenizer.load(template / "model")


@pytest.fixture
def model(template):
    return load(template / "model")


CHANGES = {
    "label": {"label": "high"},
    "explanation": {"explanation": "It says otherwise."},
    "cues": {"cues": ((0, 1),)},
}


@pytest.mark.parametrize("changed", CHANGES)
def test_records_mended_while_answers_were_half_done(model, tokenizer, tmp_path, changed):
    out, options = tmp_path / "out.jsonl", {"max_new_tokens": 2, "batch_size": 2}
    with pytest.raises(Killed):
        generate_records(model, tokenizer, RECORDS, out_path=out, progress=killed, **options)
    mended = [dataclasses.replace(record, **CHANGES[changed]) for record in RECORDS]
    rows = generate_records(model, tokenizer, mended, out_path=out, **options)
    for row, record in zip(rows, mended, strict=True):
        assert {key: row[key] for key in record.to_dict()} == record.to_dict()


def test_records_mended_while_samples_were_half_done(model, tokenizer, tmp_path):
    out, options = tmp_path / "out.jsonl", {"samples": 2, "temperature": 1.0, "max_new_tokens": 2, "batch_size": 2}
    with pytest.raises(Killed):
        generate_samples(model, tokenizer, RECORDS, out_path=out, progress=killed, **options)
    mended = [dataclasses.replace(record, label="high") for record in RECORDS]
    rows, _ = generate_samples(model, tokenizer, mended, out_path=out, **options)
    assert {row["label"] for row in rows} == {"high"}


ODD = {"an answer of its own": {"parsed_label": "high", "output_text": "High."}, "no ids": {"output_ids": None},
       "ids beyond": {"output_ids": [10**6]}, "text for ids": {"output_ids": "12"}, "half ids": {"output_ids": [1.5]},
       "no prompt": {"prompt_ids": None}}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_half_done_answers_that_say_something_else(model, tokenizer, tmp_path, odd):
    out, options = tmp_path / "out.jsonl", {"max_new_tokens": 2, "batch_size": 2}
    wanted = generate_records(model, tokenizer, RECORDS, out_path=tmp_path / "whole.jsonl", **options)
    with pytest.raises(Killed):
        generate_records(model, tokenizer, RECORDS, out_path=out, progress=killed, **options)
    head, *lines = partial_file(out).read_text().splitlines()
    lines = [json.dumps(json.loads(line) | ODD[odd]) for line in lines]
    partial_file(out).write_text("\n".join([head, *lines]) + "\n")
    if odd == "an answer of its own":
        assert generate_records(model, tokenizer, RECORDS, out_path=out, **options) == wanted
    else:
        with pytest.raises(InputError, match=r"out\.jsonl\.partial: is damaged \("):
            generate_records(model, tokenizer, RECORDS, out_path=out, **options)


MOVES = {"rows": ("embed_tokens.embedding", 0), "inputs": ("layers.mlp.down_proj.kernel", 1),
         "outputs": ("layers.self_attn.q_proj.kernel", 2), "norm": ("norm.weight", 0)}  # fmt: skip


@pytest.mark.parametrize("moved", MOVES)
def test_weights_that_changed_places_are_another_model(model, moved):
    """A checkpoint read in a wrong order of rows has the same numbers, but half an answer file of it is another's."""
    path, axis = MOVES[moved]
    before, variable = model_fingerprint(model), model
    for name in path.split("."):
        variable = getattr(variable, name)
    if moved == "norm":
        variable.set_value(variable[...].at[1].set(2.0))
        before = model_fingerprint(model)
    variable.set_value(jnp.flip(variable[...], axis))
    assert model_fingerprint(model) != before


def test_a_stage_does_not_go_on_over_another_base(template, tokenizer, tmp_path):
    """Its checkpoint holds the adapter alone."""
    examples = encode_chats([("hello there", "fine"), ("how are you", "well")], tokenizer, 64)
    config = TrainConfig(steps=2, rows=1, sequence_length=64, save_every=1, keep_last=2)

    def begin(changed):
        model = load(template / "model")
        if changed:
            kernel = model.layers.mlp.down_proj.kernel
            kernel.set_value(kernel[...] * 3)
        add_lora(model, LoraConfig(rank=2, alpha=4.0), nnx.Rngs(1))
        return train(model, examples, config, tmp_path / "run", trainable="lora", seed=0)

    begin(changed=False)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    with pytest.raises(InputError, match=r"checkpoints/1 was made with another recipe: base: "):
        begin(changed=True)
    assert begin(changed=False).steps == 2


def test_the_base_of_an_adapter_is_told_without_it(model):
    before = base_fingerprint(model)
    add_lora(model, LoraConfig(rank=2, alpha=4.0), nnx.Rngs(1))
    assert base_fingerprint(model) == before != model_fingerprint(model)


@pytest.fixture
def finished(template, tmp_path, monkeypatch):
    """A run whose training, answers and scores are there, and noted in run.json as the stages note them."""
    for name in ("model", "data", "trained"):
        shutil.copytree(template / name, tmp_path / name)
    shutil.copy(template / "recipe.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    job = Run.opened(tmp_path / "trained")
    job.begin()
    job.finished("data", data_stage(job, lambda *said: None) | {"seconds": 1.0})
    job.finished("train a", {"seconds": 1.0})
    model, fingerprint = job.load_merged()
    options = {"max_new_tokens": 2, "fingerprint": fingerprint}
    rows = generate_records(
        model, job.tokenizer(), job.records("dev"), out_path=job.dir / "generations.jsonl", **options
    )
    job.finished("generate", {"seconds": 1.0})
    scores = [row | {"label_logprobs": {"high": -1.0, "low": -2.0}, "answer_order": "label_first"} for row in rows]
    (job.dir / "label_scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    (job.dir / "evaluation.json").write_text("{}")
    job.finished("evaluate", {"seconds": 1.0})
    return job.dir


def other_adapter(directory):
    model = load(directory.parent / "model")
    add_lora(model, LoraConfig(rank=2, alpha=4.0), nnx.Rngs(7))
    save_adapter(model, directory / "stages" / "a" / "adapter")


def other_label(file):
    text = file.read_text()
    assert '"low"' in text
    file.write_text(text.replace('"low"', '"high"', 1))


def write_own_task(file, name):
    """A task of two labels, "good" and "bad"."""
    labels = "".join(f"{key}: {{name: {{en: {key}}}}}, " for key in ("good", "bad"))
    file.write_text(f"tasks:\n  {name}:\n    kind: single\n    question: {{en: 'How was it?'}}\n"
                    f"    sentence: {{en: 'It was {{}}.'}}\n    labels: {{{labels}}}\n")  # fmt: skip
    return file


SWAPS = {
    "adapter": (other_adapter, r"adapter_(config\.json|model\.safetensors): was changed"),
    "adapter_config": (lambda d: (f := d / "stages/a/adapter/adapter_config.json").write_text(
        f.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8')), r"adapter_config\.json: was changed"),
    "a record": (lambda d: other_label(d / "data/faithful/dev.jsonl"), r"dev\.jsonl: was changed"),
    "records of another split": (lambda d: shutil.copy(d / "data/faithful/train.jsonl", d / "data/faithful/dev.jsonl"),
                                 r"dev\.jsonl: was changed"),
    "tokenizer": (lambda d: (d / "tokenizer/tokenizer.json").write_text("{}"), r"tokenizer\.json: was changed"),
    "a tokenizer's words for its parts": (lambda d: (d / "tokenizer/tokenizer_config.json").write_text("{}"),
                                          r"tokenizer_config\.json: was changed"),
    "tokens added": (lambda d: (d / "tokenizer/added_tokens.json").write_text("{}"), r"added_tokens\.json: has come"),
    "a chat template": (lambda d: (d / "tokenizer/chat_template.jinja").write_text("{{ messages }}"),
                        r"chat_template\.jinja: was changed"),
    "where answers end": (lambda d: (d / "tokenizer/generation_config.json").write_text('{"eos_token_id": 5}'),
                          r"generation_config\.json: has come"),
    "a task from nowhere": (lambda d: shutil.copy(write_own_task(d.parent / "own.yaml", "mood"), d / "tasks.yaml"),
                            r"tasks\.yaml: has come"),
    "an answer": (lambda d: other_label(d / "generations.jsonl"), r"generations\.jsonl: was changed"),
    "a score": (lambda d: (f := d / "label_scores.jsonl").write_text(f.read_text().replace("-1.0", "-3.0")),
                r"label_scores\.jsonl: was changed"),
    "scores gone": (lambda d: (d / "label_scores.jsonl").unlink(), r"label_scores\.jsonl: is gone"),
    "a calibration": (lambda d: (d / "calibration.json").write_text("{}"), r"calibration\.json: has come"),
    "a link beside an answer": (
        lambda d: (other_label(d / "generations.jsonl"), (d / "evaluation.csv").symlink_to("/dev/null")),
        r"evaluation\.csv: is a link, and a run writes"),
    "a pipe": (lambda d: ((d / "label_scores.jsonl").unlink(), os.mkfifo(d / "label_scores.jsonl")),
               r"label_scores\.jsonl: is neither a file nor a directory"),
}  # fmt: skip


EXPORTED = ["tokenizer", "a tokenizer's words for its parts", "tokens added", "a chat template", "where answers end",
            "a task from nowhere", "a calibration"]  # fmt: skip


@pytest.mark.parametrize("form", ["merged", "peft"])
@pytest.mark.parametrize("swap", EXPORTED)
def test_an_export_takes_nothing_else_for_the_runs_own(finished, capsys, swap, form):
    """The tokenizer of another run would turn the model's words into others, its calibration its probabilities."""
    change, says = SWAPS[swap]
    change(finished)
    refused(run(["mentalglm", "export", "trained", "--to", form, "--out", "exported"], capsys), says)
    assert not (finished.parent / "exported").exists()


def test_a_run_without_its_posts_is_exported(finished, capsys):
    """They may have been deleted; no export holds one."""
    shutil.rmtree(finished / "data")
    for name in ("generations.jsonl", "label_scores.jsonl"):
        (finished / name).unlink()
    assert run(["mentalglm", "export", "trained", "--to", "peft", "--out", "exported"], capsys).code == 0


READERS = {
    "a table of runs": ["leaderboard", "trained"],
    "a table of files": ["leaderboard", "trained/evaluation.json"],
    "a model card": ["export", "trained", "--to", "peft", "--out", "exported"],
    "a comparison": ["evaluate", "finished/generations.jsonl", "--against", "trained"],
    "a page": ["evaluate", "trained/generations.jsonl", "--out", "page"],
}


@pytest.mark.parametrize("reader", READERS)
def test_answers_of_another_run_with_their_scores(finished, capsys, reader):
    """They fit one another, and were never given by the run whose name they would stand under."""
    place = finished.parent
    for name in ("label_scores.jsonl", "evaluation.json"):
        (finished / name).unlink()
    (place / "finished").mkdir()
    rows = [json.loads(line) for line in (finished / "generations.jsonl").read_text().splitlines()]
    rows = [row | {"parsed_label": row["label"], "parse_status": "ok"} for row in rows]
    (place / "finished" / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(["mentalglm", "evaluate", "finished", "--out", "finished"], capsys).code == 0
    shutil.copytree(place / "finished", finished, dirs_exist_ok=True)
    says = r"trained/generations\.jsonl: was changed since stage 'generate' was finished"
    refused(run(["mentalglm", *READERS[reader]], capsys), says)
    assert not (place / "exported").exists() and not (place / "page").exists()


@pytest.mark.parametrize("name", ["summary.json", "base/config.json", "base/model.safetensors"])
def test_what_else_a_finished_stage_left(finished, name):
    """The summary of another run would be printed as this one's; a base that was made here is told at once."""
    job, stage = Run.opened(finished), "summary" if name == "summary.json" else "pretrain"
    (finished / name).parent.mkdir(exist_ok=True)
    (finished / name).write_text("{}")
    job.finished(stage, {"seconds": 1.0})
    Run.opened(finished).check_finished(stage)
    (finished / name).write_text('{"of": "another"}')
    with pytest.raises(InputError, match=rf"{name}: was changed since stage '{stage}' was finished"):
        Run.opened(finished).check_finished(stage)


@pytest.mark.parametrize("swap", SWAPS)
def test_what_finished_stages_left_was_changed(finished, capsys, swap):
    change, says = SWAPS[swap]
    change(finished)
    command = ["mentalglm", "run", "recipe.yaml", "--set", "run_dir=trained"]
    refused(run(command, capsys), says)
    if "adapter" not in swap:  # finished answers do without one
        refused(run(["mentalglm", "evaluate", "trained"], capsys), says)
    else:
        refused(run(["mentalglm", "export", "trained", "--to", "peft", "--out", "exported"], capsys), says)


def test_the_words_of_a_runs_own_task_were_swapped(finished, capsys):
    """Each label says what the other meant: every score of them would be upside down, without a word."""
    write_own_task(finished / "tasks.yaml", "mood")
    job = Run.opened(finished)
    job.finished("data", {"seconds": 1.0})
    text = (finished / "tasks.yaml").read_text()
    (finished / "tasks.yaml").write_text(text.replace("en: good", "en: x").replace("en: bad", "en: good")
                                         .replace("en: x", "en: bad"))  # fmt: skip
    tasks.forget_added()  # the next command is another process
    says = r"tasks\.yaml: (was changed|task 'mood' is known with another definition)"  # run.json may know it, too
    refused(run(["mentalglm", "evaluate", "trained"], capsys), says)


def test_a_run_of_a_version_that_noted_fewer_files_goes_on(finished):
    state = json.loads((finished / "run.json").read_text())
    noted = state["stages"]["data"]["files"]
    state["stages"]["data"]["files"] = {name: digest for name, digest in noted.items() if name.endswith(".jsonl")}
    (finished / "run.json").write_text(json.dumps(state))
    (finished / "tokenizer" / "added_tokens.json").write_text("{}")
    Run.opened(finished).check_finished("data")


@pytest.mark.parametrize("changed", ["weights", "config.json"])
def test_the_base_of_a_run_was_changed(finished, capsys, changed):
    """Between two stages: the model's directory was written anew, or the Hub has another revision."""
    place = finished.parent / "model"
    if changed == "weights":
        model = load(place)
        kernel = model.layers.mlp.down_proj.kernel
        kernel.set_value(kernel[...][:, ::-1])
        save_pretrained(model, place, tokenizer=GlmTokenizer.load(place))
    else:
        text = (place / "config.json").read_text()
        raw = json.loads(text)
        raw |= {
            "rope_theta": 50000.0,
            "rope_ratio": 5.0,
            "rope_parameters": raw["rope_parameters"] | {"rope_theta": 5e4},
        }
        (place / "config.json").write_text(json.dumps(raw))
        with pytest.raises(InputError, match=r"trained on a base with rope_theta|is not the base model"):
            Run.opened(finished).load_final()
        return
    for command in (["run", "recipe.yaml", "--set", "run_dir=trained"],
                    ["export", "trained", "--to", "merged", "--out", "exported"]):  # fmt: skip
        outcome = run(["mentalglm", *command], capsys)
        said = [line for line in outcome.err.splitlines(keepends=True) if not line.startswith("export ...")]
        outcome = dataclasses.replace(outcome, err="".join(said))
        refused(outcome, "model: is not the base model that this run began with")


def test_scores_beside_answers_of_another_model(finished, capsys):
    """`evaluate MODEL --out DIR` was killed between the two files of an earlier model's directory."""
    (finished / "run.json").unlink()
    file = finished / "label_scores.jsonl"
    rows = [json.loads(line) | {"answered_by": "0" * 16} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="its parsed answer is of another model than its label-scored one"):
        assess(read_answers(finished))
    refused(run(["mentalglm", "evaluate", "trained"], capsys), "of another model than its label-scored one")


def test_results_of_a_model_that_was_trained_on_are_gone(finished):
    """What is read beside an adapter is the adapter's: a temperature of the one before would calibrate wrongly."""
    (finished / "calibration.json").write_text("{}")
    Run.opened(finished).forget(["generate", "evaluate", "summary"])
    left = {"generations.jsonl", "label_scores.jsonl", "calibration.json", "evaluation.json"}
    assert not left & {path.name for path in finished.iterdir()}
