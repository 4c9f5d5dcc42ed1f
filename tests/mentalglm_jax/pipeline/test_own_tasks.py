"""Tasks of one's own through the whole path: data, training, export, answers, evaluation, what probes read; told once.

One tiny run is shared. Every test begins with a process that knows the package's tasks only.
"""

import json
import shutil

import pytest
import yaml

from mentalglm_jax.cli.main import main
from mentalglm_jax.data.records import Record, read_records, write_records
from mentalglm_jax.evaluate.answers import read_generations
from mentalglm_jax.evaluate.inputs import read_answers
from mentalglm_jax.evaluate.scores import evaluate
from mentalglm_jax.inference.generate import generation_row
from mentalglm_jax.text import tasks
from mentalglm_jax.text.tokenizer import GlmTokenizer
from probes.models.encode import read_generations as rows_for_probes
from tests.mentalglm_jax.own_tasks import MOOD, OWN, definitions

NAMES = ("weather", "distorted", "tension")
POSTS = {
    "en": ("The sun is out.", "It poured all day.", "My roof is gone."),
    "zh": ("出太阳了。", "下了一天雨。", "屋顶没了。"),
}
TRAIN = {"rows": 2, "sequence_length": 256, "learning_rate": 1e-3, "save_every": 2, "log_every": 1, "steps": 2}
RECIPE = {
    "data": {"source": "jsonl"},
    "model": {"geometry": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                           "num_attention_heads": 2, "head_dim": 16, "initializer_range": 0.1}},
    "pretrain": {"chats": 30, "train": TRAIN}, "lora": {"rank": 2, "alpha": 4},
    "stages": [{"name": "all", "tasks": list(NAMES), "train": TRAIN}],
    "verify": False, "generate": {"max_new_tokens": 4, "batch_size": 8},
    "probe": {"posts": 0, "task": "weather"},
}  # fmt: skip


def records(split):
    """Every label of every task in every language; several labels where the task states several."""
    found = []
    for task in definitions(*NAMES):
        for language in task.languages:
            for number, key in enumerate(task.keys):
                post = f"{POSTS[language][number % 3]} {split} {number}"
                gold = {"label": key} if task.arity == "single" else {"labels": (key,)}
                if task.arity == "multi" and number == 0:
                    gold = {"labels": (task.keys[1], key)}
                found.append(Record(f"{task.name}-{language}-{split}-{number}", task.name, language, post,
                                    task.question(language), **gold, explanation="It says so.", source="own",
                                    split=split))  # fmt: skip
    return found


def call(*arguments, code=0):
    tasks.forget_added()
    with pytest.raises(SystemExit) as end:
        main([str(one) for one in arguments])
    assert (end.value.code or 0) == code, arguments


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose recipe says nothing of tasks but their names: ``tasks.yaml`` lies beside its data."""
    root = tmp_path_factory.mktemp("own")
    tasks.add_tasks(definitions())
    for split in ("train", "test"):
        write_records(root / "data" / f"{split}.jsonl", records(split))
    tasks.write_tasks(root / "data" / "tasks.yaml", definitions(*NAMES))
    recipe = RECIPE | {"run_dir": str(root / "run"), "data": {"source": "jsonl", "root": str(root / "data")}}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    call("run", root / "recipe.yaml", "--json")
    shutil.rmtree(root / "data")  # whatever follows cannot look there
    return root / "run"


@pytest.fixture(scope="module")
def answered(trained):
    """Rows as a model would write them that has learned all but one label of each task."""
    tasks.add_tasks(definitions())
    tokenizer, rows = GlmTokenizer.load(trained / "tokenizer"), []
    for record in records("test"):
        task = tasks.get_task(record.task)
        said = record.gold if record.gold != (task.keys[-1],) else task.keys[:1]
        answer = tasks.answer(task, said, "It says so.", record.language)
        ids = [*tokenizer.encode("\n" + answer), tokenizer.stop_id]
        rows.append(generation_row(record, tokenizer, tokenizer.prompt_ids(record.prompt, record.system), ids))
    return rows


@pytest.mark.parametrize("place", ["", "stages/all/adapter", "adapter", "merged"])
def test_the_tasks_stand_in_the_run_and_in_what_it_exports(trained, place):
    assert tasks.read_tasks(trained / place) == definitions(*NAMES)


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_an_export_holds_them_too_and_can_be_written_again(trained, tmp_path, form):
    for _ in range(2):
        call("export", trained, "--to", form, "--out", tmp_path / "out")
        assert tasks.read_tasks(tmp_path / "out") == definitions(*NAMES)
    if form == "merged":
        call("convert", tmp_path / "out", tmp_path / "chatglm", "--to", "chatglm")
        assert tasks.read_tasks(tmp_path / "chatglm") == definitions(*NAMES)


def test_the_run_is_evaluated_continued_and_compared_without_being_told(trained, capsys):
    capsys.readouterr()
    call("evaluate", trained, "--json")
    result = json.loads(capsys.readouterr().out)
    assert list(result) == list(NAMES)
    assert result["tension"]["mae"] >= 0 and "mae" not in result["weather"]
    assert result["weather"]["positive_class"] == "storm" and set(result["weather"]["by_language"]) == {"en", "zh"}
    assert result["distorted"]["label_reading"]["n"] == 8
    call("leaderboard", trained, "--json")
    assert {row["task"] for row in json.loads(capsys.readouterr().out)} == set(NAMES)
    call("run", trained.parent / "recipe.yaml", "--json")  # finished; its data folder is gone
    assert set(json.loads(capsys.readouterr().out)["eval"]) == set(NAMES)


@pytest.mark.parametrize("name", ["generations.jsonl", "label_scores.jsonl"])
def test_rows_are_read_anywhere(trained, tmp_path, name, capsys):
    lines = (trained / name).read_text("utf-8").splitlines()
    (tmp_path / name).write_text("\n".join(line for line in lines if json.loads(line)["task"] == "tension"), "utf-8")
    capsys.readouterr()
    call("evaluate", tmp_path / name, "--json", "--out", tmp_path / "out")
    assert list(json.loads(capsys.readouterr().out)) == ["tension"]
    assert tasks.read_tasks(tmp_path / "out") == definitions("tension")
    call("leaderboard", tmp_path / "out")
    call("evaluate", tmp_path / name, "--against", tmp_path / name, "--json")


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_a_model_or_adapter_directory_answers_posts(trained, tmp_path, kind):
    (tmp_path / "p.txt").write_text("It rains.\n")
    model = [trained / "merged"] if kind == "merged" else [trained / "base", "--adapter", trained / "adapter"]
    call("generate", *model, "--task", "weather", "--language", "zh", "--in", tmp_path / "p.txt", "--out",
         tmp_path / "a.jsonl", "--max-new-tokens", 2)  # fmt: skip
    (row,) = map(json.loads, (tmp_path / "a.jsonl").read_text("utf-8").splitlines())
    assert row["question"] == OWN["weather"]["question"]["zh"] and list(row["label_probabilities"]) == [
        *OWN["weather"]["labels"]
    ]


def test_answers_are_scored_by_kind(answered, tmp_path):
    (tmp_path / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered))
    tasks.forget_added()
    result = evaluate(read_answers(tmp_path).generations, draws=2)
    levels = result["tension"]  # 0, 1, 2 are right and 3 is answered with 0
    assert (levels["mae"], levels["within_one"], levels["accuracy"]) == (0.75, 0.75, 0.75)
    assert levels["positive_class"] == "3" and levels["positive_f1"] == 0.0
    assert levels["quadratic_weighted_kappa"] == pytest.approx(1 - 9 / 10)  # squared distances by hand
    assert result["weather"]["accuracy"] == pytest.approx(2 / 3) and result["weather"]["positive_f1"] == 0
    several = result["distorted"]  # "none" stands alone and is answered with the first label
    assert several["exact_match"] == 0.75 and several["per_class"]["none"]["f1"] == 0.0
    assert result["distorted"]["parse_failure_rate"] == 0.0


def test_probes_read_the_rows(answered, tmp_path):
    (tmp_path / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered))
    for row in rows_for_probes(tmp_path / "generations.jsonl"):
        task = row["task"]
        assert list(row["candidates"]) == [*OWN[task]["labels"]] and row["label_text"] and row["task_definition"]


def test_a_file_given_by_hand_may_say_the_same_and_nothing_else(trained, tmp_path, capsys):
    tasks.write_tasks(tmp_path / "same.yaml", definitions("weather"))
    call("evaluate", trained, "--tasks", tmp_path / "same.yaml", "--json")
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"tasks": {"weather": MOOD}}))
    capsys.readouterr()
    call("evaluate", trained, "--tasks", tmp_path / "other.yaml", code=2)
    said = capsys.readouterr().err
    assert "task 'weather' is known with another definition" in said and len(said.splitlines()) == 1
    row = json.loads((trained / "generations.jsonl").read_text("utf-8").splitlines()[0])
    row["task_definition"] = row["task_definition"] | {"kind": "singel"}
    (tmp_path / "generations.jsonl").write_text(json.dumps(row))
    call("evaluate", tmp_path / "generations.jsonl", code=2)
    said = capsys.readouterr().err
    assert "generations.jsonl:1: task_definition: task 'weather': kind 'singel' is unknown" in said


def test_a_recipe_that_names_a_file_or_defines_tasks_itself(tmp_path):
    from mentalglm_jax.train.recipe import load_recipe

    base = {**RECIPE, "run_dir": "r", "data": {"source": "jsonl", "root": str(tmp_path)},
            "stages": [{"name": "all", "tasks": ["mood"], "train": TRAIN}], "probe": {"posts": 0}}  # fmt: skip
    tasks.write_tasks(tmp_path / "mine.yaml", definitions("mood"))
    found = []
    for given in ({"tasks": {"mood": MOOD}}, {"tasks": str(tmp_path / "mine.yaml")}):
        tasks.forget_added()
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(base | given, sort_keys=False))
        found.append(load_recipe(tmp_path / "recipe.yaml"))
        assert tasks.get_task("mood") == definitions("mood")[0]
    tasks.forget_added()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(base))
    with pytest.raises(Exception, match="unknown task 'mood'"):
        load_recipe(tmp_path / "recipe.yaml")
    found.append(load_recipe(tmp_path / "recipe.yaml", [f"tasks={tmp_path / 'mine.yaml'}"]))
    assert found[0] == found[1] == found[2] and found[0].tasks == {"mood": tasks.task_record(definitions("mood")[0])}
    (tmp_path / "mine.yaml").write_text("tasks: {mood: {kind: single}}")
    with pytest.raises(Exception, match=r"recipe.yaml: tasks: .*mine.yaml: task 'mood': question must be a mapping"):
        load_recipe(tmp_path / "recipe.yaml", [f"tasks={tmp_path / 'mine.yaml'}"])


def test_a_system_turn_is_trained_answered_and_scored(trained):
    from mentalglm_jax.data.batches import encode_records

    raw = {**MOOD, "system": {"en": "Answer briefly."}}
    tasks.add_tasks(tasks.tasks_of({"mood": raw}, "here"))
    tokenizer = GlmTokenizer.load(trained / "tokenizer")
    record = Record("m", "mood", "en", "I like rain.", MOOD["question"]["en"], "calm", explanation="It says so.")
    (example,), _ = encode_records([record], tokenizer, 256)
    ids = example["tokens"].tolist()
    prompt = tokenizer.prompt_ids(record.prompt, "Answer briefly.")
    assert ids[: len(prompt)] == prompt and example["target_index"].min() == len(prompt) - 1
    start, end = example["post"]
    assert tokenizer.decode(ids[start:end]).strip() in record.post and end > start


def test_records_of_an_own_task_need_its_definition(trained, tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps(records_without_tasks()[0]))
    with pytest.raises(Exception, match=r"r.jsonl:1: record .*: unknown task 'weather'.*--tasks FILE"):
        read_records(tmp_path / "r.jsonl")
    tasks.write_tasks(tmp_path / "tasks.yaml", definitions("weather"))
    assert read_records(tmp_path / "r.jsonl")[0].task == "weather"
    with pytest.raises(Exception, match="no such file"):
        read_generations(tmp_path / "generations.jsonl")


def records_without_tasks():
    tasks.add_tasks(definitions("weather", "distorted", "tension"))
    found = [record.to_dict() for record in records("test")]
    tasks.forget_added()
    return found
