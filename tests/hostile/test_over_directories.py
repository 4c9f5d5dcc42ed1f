"""A command that was told to write into the directory that it reads, or into another's: what is there stays as it was.

``test_over_inputs.py`` is about files. A directory is replaced whole, or gets files by names that others use too.
"""

import hashlib
import json
import os
import shutil
import warnings

import pytest

from mentalglm_jax.checkpoints.directories import load, save_pretrained
from mentalglm_jax.files import write_card
from mentalglm_jax.pipeline.data_stage import data_stage
from mentalglm_jax.pipeline.job import _summary
from mentalglm_jax.pipeline.run_dir import Run
from mentalglm_jax.text import tasks
from tests.hostile.attack import refused, run
from tests.hostile.teacher_world import KEY, World
from tests.hostile.world import contents

OWN = """\
# Agreed with the clinic on 3 May.
tasks:
  mood:
    kind: single
    question: {en: "Which mood?"}
    sentence: {en: "The mood is {}."}
    labels: {good: {}, bad: {}}
  sleep:
    kind: single
    question: {en: "How was the sleep?"}
    sentence: {en: "The sleep was {}."}
    labels: {fine: {}, poor: {}}
"""
IS_READ = r"would be replaced, and (is or )?holds \S+, which is read \({}\); name another place"


@pytest.mark.parametrize("source", ["data", "data/train.jsonl"])
def test_records_are_not_written_over_by_their_scrubbed_copy(world, capsys, source):
    """Contact details were gone from the only copy there was, and the command said that it had written it."""
    rows = [json.loads(line) for line in (world / "data/train.jsonl").read_text("utf-8").splitlines()]
    rows[0]["post"] += " Write to anna@example.org."
    (world / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = contents(world)
    refused(run(["mentalglm", "data", "inspect", source, "--out", "data"], capsys),
            r"data/train\.jsonl: is there already and differs; .*choose another --out")  # fmt: skip
    assert contents(world) == before


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
@pytest.mark.parametrize("there", ["a file", "a link", "a directory"])
def test_nor_are_those_of_another_data_set(world, capsys, name, there):
    """A part that this data set does not have would be one of two data sets."""
    (world / "other").mkdir()
    (world / "mine").write_text("mine")
    path = world / "other" / name
    path.write_text("mine") if there == "a file" else path.mkdir() if there == "a directory" else path.symlink_to(
        world / "mine")  # fmt: skip
    before = contents(world)
    refused(run(["mentalglm", "data", "inspect", "data", "--out", "other"], capsys),
            rf"other/{name}: is there already and differs")  # fmt: skip
    assert contents(world) == before


def test_the_same_copy_may_be_written_again(world, capsys):
    for _ in range(2):
        assert run(["mentalglm", "data", "inspect", "data", "--out", "copy"], capsys).code == 0
    assert sorted(contents(world / "copy")) == ["dev.jsonl", "train.jsonl"]


@pytest.mark.parametrize("left", ["review.html", "sample.jsonl"])
def test_what_is_rated_is_not_exchanged_for_another_sample(world, capsys, left):
    """The form went to the raters; without its sample their ratings can no longer be read."""
    for path in (world / "rated").iterdir():
        if path.name != left:
            path.unlink()
    before = contents(world)
    outcome = run(["mentalglm", "data", "review", "export", "records.jsonl", "--limit", 1, "--out", "rated"], capsys)
    refused(outcome, rf"rated/{left}: is there already and differs; somebody may be rating with it")
    assert contents(world) == before


@pytest.mark.parametrize("target", ["model", "sub/../model", "link"])
def test_a_model_is_not_converted_over_itself(world, capsys, target):
    (world / "sub").mkdir()
    (world / "link").symlink_to("model")
    before = contents(world)
    outcome = run(["mentalglm", "convert", "model", target, "--to", "chatglm"], capsys)
    refused(outcome, IS_READ.format("the model"))
    assert contents(world) == before


@pytest.mark.parametrize("form", ["merged", "vllm-split"])
@pytest.mark.parametrize(
    ("out", "says"), [("model", IS_READ.format(r"model\.path")), ("trained/stages/a/adapter", "is the run's own"),
                      ("trained/merged", "is the run's own"), ("trained/adapter", "is the run's own")],
    ids=["base", "stage", "merged", "adapter"],
)  # fmt: skip
def test_an_export_replaces_neither_the_base_nor_what_the_run_goes_on_with(world, capsys, out, says, form):
    state = json.loads((world / "trained" / "run.json").read_text())
    state["stages"] = {name: {"seconds": 1.0} for name in ("data", "train a")}
    (world / "trained" / "run.json").write_text(json.dumps(state))
    before = contents(world)
    refused(run(["mentalglm", "export", "trained", "--to", form, "--out", out], capsys), says)
    assert contents(world) == before


def test_an_import_does_not_replace_the_table_it_reads(world, capsys):
    """It may be a part of the import that is there, whose other parts would be gone."""
    options = ["--text", "post", "--label", "label", "--task", "mood", "--split", "50/25/25"]
    rows = "".join(f"{word} came home {word},{label}\n" for word in ("rain", "wind", "snow", "hail", "sun", "fog")
                   for label in ("good", "bad"))  # fmt: skip
    (world / "posts.csv").write_text(f"post,label\n{rows}")
    assert run(["mentalglm", "data", "import", "posts.csv", "--out", "mine", *options], capsys).code == 0
    before = contents(world)
    outcome = run(["mentalglm", "data", "import", "mine/train.jsonl", "--out", "mine", *options], capsys)
    refused(outcome, IS_READ.format("the table"))
    assert contents(world) == before


@pytest.mark.parametrize("key", ["data.root", "experts", "prompts"])
def test_a_build_does_not_replace_what_it_reads(tmp_path, monkeypatch, capsys, key):
    monkeypatch.setenv("HOSTILE_KEY", KEY)
    here = World(tmp_path, capsys)
    shutil.copytree(tmp_path, tmp_path / "out" / "records")
    digest = hashlib.sha256
    files = {name: digest(data).hexdigest() for name, data in contents(tmp_path / "out").items()}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps({"files": files}))
    before = contents(tmp_path)
    inside = tmp_path / "out/records" / ("posts.jsonl" if key == "data.root" else "experts.jsonl")
    refused(here.build("http://127.0.0.1:9/v1", "--set", f"{key}={inside}"), IS_READ.format(key.replace(".", r"\.")))
    assert {name: data for name, data in contents(tmp_path).items() if name != "recipe.yaml"} == before


def answers(folder, own=OWN):
    """Answers to the task mood, which is defined in ``own``."""
    (folder / "tasks.yaml").write_text(own)
    tasks.add_tasks_beside(folder)
    row = {"task": "mood", "language": "en", "question": "Which mood?", "label": "good", "split": "test", "source": "s",
           "parsed_label": "good", "parsed_explanation": "They smile.", "parse_status": "ok"}  # fmt: skip
    rows = [row | {"id": f"r{n}", "post": f"Day {n}: I went out and smiled."} for n in range(3)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))


def test_tasks_that_somebody_wrote_stay_beside_the_evaluation(tmp_path, capsys):
    """Those that this evaluation did not ask were gone, and so was what people had written between them."""
    answers(tmp_path)
    for options in ([], ["--task", "mood"]):
        outcome = run(["mentalglm", "evaluate", tmp_path / "answers.jsonl", "--out", tmp_path, *options], capsys)
        assert outcome.code == 0 and (tmp_path / "tasks.yaml").read_text() == OWN


OTHERS = {
    "lacks the task": (OWN.replace("mood", "tiredness"), r"lacks task 'mood' and was written by hand; add it"),
    "defines it otherwise": (OWN.replace("good: {}", "good: {name: {en: fine}}"), r"defines task 'mood' otherwise"),
    "is damaged": ("tasks: [", "not valid YAML"),
    "is a link": (None, "is a link to a file outside the directory"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_task_file_of_somebody_is_not_written_anew(tmp_path, capsys, other):
    text, says = OTHERS[other]
    (tmp_path / "from").mkdir()
    (tmp_path / "out").mkdir()
    answers(tmp_path / "from")
    path = tmp_path / "out" / "tasks.yaml"
    path.write_text(text) if text is not None else path.symlink_to(tmp_path / "from" / "tasks.yaml")
    before = contents(tmp_path)
    outcome = run(["mentalglm", "evaluate", tmp_path / "from/answers.jsonl", "--out", tmp_path / "out"], capsys)
    refused(outcome, rf"out/tasks\.yaml:.* {says}" if other != "is damaged" else says)
    assert contents(tmp_path) == before


def test_what_we_wrote_grows(tmp_path):
    tasks.keep_tasks(tmp_path, tasks.tasks_of({"mood": MOOD}, "here"))
    tasks.keep_tasks(tmp_path, tasks.tasks_of({"sleep": MOOD | {"question": {"en": "How was it?"}}}, "here"))
    assert [task.name for task in tasks.read_tasks(tmp_path)] == ["mood", "sleep"]


MOOD = {"kind": "single", "question": {"en": "Which mood?"}, "sentence": {"en": "The mood is {}."},
        "labels": {"good": {}, "bad": {}}}  # fmt: skip


WRITES = {
    "evaluate": (["evaluate", "finished/generations.jsonl", "--out", "out"], "model_card.md"),
    "export": (["export", "trained", "--to", "peft", "--out", "out"], "README.md"),
}


@pytest.mark.parametrize("command", WRITES)
@pytest.mark.parametrize("how", ["added to", "changed", "written anew", "as it was"])
def test_a_card_that_a_person_went_on_with_is_not_written_over(world, capsys, command, how):
    """Model cards are there to be completed; the next export, or report, replaced them without a word."""
    arguments, name = WRITES[command]
    assert run(["mentalglm", *arguments], capsys).code == 0
    card = world / "out" / name
    text = card.read_text("utf-8")
    card.write_text({"added to": text + "Labelled by two nurses.\n", "changed": text.replace("research", "clinical", 1),
                     "written anew": "# Ours\n", "as it was": text}[how], "utf-8")  # fmt: skip
    before, again = contents(world), run(["mentalglm", *arguments], capsys)
    if how == "as it was":
        assert again.code == 0, again.err
        return
    refused(again, rf"out/{name}: was changed since it was written .*and would be lost; move it, or choose another")
    assert contents(world) == before


@pytest.mark.parametrize("command", [*WRITES, "convert"])
@pytest.mark.parametrize("what", ["a pipe", "a device", "a directory"])
def test_a_card_that_is_no_file_is_not_waited_for(world, capsys, command, what):
    arguments, name = WRITES.get(command, (["convert", "model", "out", "--to", "chatglm"], "README.md"))
    card = world / "out" / name
    card.parent.mkdir(exist_ok=True)
    {"a pipe": os.mkfifo, "a device": lambda path: path.symlink_to("/dev/zero"), "a directory": os.mkdir}[what](card)
    refused(run(["mentalglm", *arguments], capsys), rf"out/{name}: was changed since it was written")
    assert card.is_fifo() or card.is_symlink() or card.is_dir()


def test_an_edited_card_is_pushed_as_it_is_or_not_at_all(world, capsys):
    """The Hub is not asked for a repository before that is known."""
    arguments, name = WRITES["export"]
    assert run(["mentalglm", *arguments], capsys).code == 0
    (world / "out" / name).write_text("# Ours\n")
    pushed = run(["mentalglm", *arguments, "--push", "org/name", "--base-name", "org/base"], capsys)
    refused(pushed, rf"out/{name}: was changed .*; hf upload org/name out uploads it as it is")


def test_a_conversion_does_not_take_a_card_away(world, capsys):
    assert run(["mentalglm", "convert", "model", "out", "--to", "chatglm"], capsys).code == 0
    (world / "out" / "README.md").write_text("# Ours\n")
    before = contents(world)
    refused(
        run(["mentalglm", "convert", "model", "out", "--to", "chatglm"], capsys), r"out/README\.md: was changed since"
    )
    assert contents(world) == before


def test_a_merged_model_is_written_again_over_its_own_card(world):
    model = load(world / "model")
    for card in ("# One\n", "# Two\n"):
        save_pretrained(model, world / "out", card=card)
    assert (world / "out" / "README.md").read_text().startswith("# Two\n")


def test_a_card_that_is_edited_while_a_model_works_stays(world, capsys, monkeypatch):
    """It was judged at the start alone. What the model took is kept, and the command says which page is not new."""
    from mentalglm_jax.evaluate import assess

    arguments, name = WRITES["evaluate"]
    assert run(["mentalglm", *arguments], capsys).code == 0
    card, work = world / "out" / name, assess.assess

    def edited(*given, **named):
        card.write_text(card.read_text("utf-8") + "Labelled by two nurses.\n", "utf-8")
        (world / "out" / "evaluation.json").unlink()
        return work(*given, **named)

    monkeypatch.setattr(assess, "assess", edited)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        done = run(["mentalglm", *arguments], capsys)
    assert done.code == 0 and f"{name}: was changed since it was written and is left as it is" in done.err
    assert card.read_text("utf-8").endswith("Labelled by two nurses.\n")
    assert (world / "out" / "evaluation.json").is_file()


@pytest.fixture
def exported(world):
    """A run of which all is finished but its summary, with the cards of its export."""
    job = Run.opened(world / "trained")
    job.begin()
    job.finished("data", data_stage(job, lambda *said: None) | {"seconds": 1.0})
    for name in ("generations.jsonl", "evaluation.json"):
        shutil.copy(world / "finished" / name, job.dir / name)
    for stage in ("train a", "export", "generate", "evaluate"):
        job.finished(stage, {"seconds": 1.0})
    for name in ("adapter", "merged"):
        write_card(job.dir / name / "README.md", "# Made by the export\n")
    return Run.opened(job.dir)


@pytest.mark.parametrize("edited", ["adapter", "merged"])
def test_a_card_of_the_run_itself_that_a_person_went_on_with_stays(exported, edited):
    card, other = (exported.dir / name / "README.md" for name in (edited, {"adapter": "merged"}.get(edited, "adapter")))
    card.write_text(card.read_text("utf-8") + "Labelled by two nurses.\n", "utf-8")
    before = card.read_text("utf-8")
    with pytest.warns(UserWarning, match=rf"{edited}/README\.md: was changed .* and is left as it is"):
        _summary(exported, lambda *said: None)
    assert card.read_text("utf-8") == before and "Made by the export" not in other.read_text("utf-8")


@pytest.mark.parametrize("place", ["adapter", "merged", "stages/a/adapter"])
def test_nor_does_a_stage_that_is_done_again_replace_it(exported, place, capsys):
    """Training longer wrote the directories anew, cards included; it is said before the work."""
    card = exported.dir / place / "README.md"
    card.write_text("# Ours\n")
    exported.forget(["train a", "export"] if place.startswith("stages") else ["export"])
    before = contents(exported.dir)
    refused(run(["mentalglm", "run", "recipe.yaml", "--set", "run_dir=trained"], capsys),
            rf"trained/{place}/README\.md: was changed since it was written .*and would be lost; move it")  # fmt: skip
    assert contents(exported.dir) == before
