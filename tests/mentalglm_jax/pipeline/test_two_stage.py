"""Two stages against one: both arms by seeds, on the same split, each command one that goes on where it stopped."""

from pathlib import Path

import pytest

from mentalglm_jax.train.recipe import load_recipe
from scripts import two_stage
from tests.mentalglm_jax import upstream

SETS = [
    "lora.rank=8",
    "stages.english.train.epochs=2",
    "stages.chinese.train.steps=7",
    "stages.chinese.train.epochs=null",
]


@pytest.fixture
def found():
    return [*two_stage.commands("it's a/model", Path("my data"), Path("out"), 3, SETS)]


def recipes(commands):
    for command in commands:
        if command[0] == "train":
            assert command[2::2] == ["--set"] * (len(command) // 2 - 1)
            yield load_recipe(command[1], command[3::2])


def test_both_arms_train_the_same_but_for_the_english_stage(found):
    trained = [*recipes(found)]
    assert [(recipe.run_dir, recipe.seed) for recipe in trained] == [
        (Path("out") / arm / f"seed-{seed}", seed) for seed in range(3) for arm in (two_stage.BOTH, two_stage.ALONE)
    ]
    both, alone = trained[:2]
    assert both.model.path == alone.model.path == "it's a/model" and both.data.root == alone.data.root == Path(
        "my data"
    )
    assert [stage.name for stage in both.stages] == ["english", "chinese"] and both.stages[1:] == alone.stages
    assert both.stages[0].train.epochs == 2 and alone.stages[0].train.steps == 7
    assert "imhi" in both.data.sets and {*alone.data.sets} == {*both.data.sets} - {"imhi"}
    same = {"run_dir", "data", "stages"}
    assert both.model_dump(exclude=same) == alone.model_dump(exclude=same)
    assert both.lora.rank == 8


def test_one_chinese_set_alone_asks_its_task_alone():
    found = [*two_stage.commands("m", Path("d"), Path("out"), 1, [], ["sos_hl_1k"])]
    assert [{*recipe.data.sets} for recipe in recipes(found)] == [{"sos_hl_1k", "imhi"}, {"sos_hl_1k"}]
    asked = [command[command.index("--task") + 1] for command in found if "--task" in command]
    assert asked == ["suicide_risk"] * 3 and not [part for part in found[-1] if "cognitive" in part]


def test_each_seed_is_compared_when_both_arms_have_it_and_all_at_the_end(found):
    words = [command[0] for command in found]
    arm = ["train", "evaluate", "evaluate"]
    assert words == [*arm * 2, *["evaluate"] * 4, *[*arm * 2, *["evaluate"] * 2] * 2, "leaderboard"]
    compared = [command for command in found if "--against" in command]
    assert [(command[1], command[command.index("--against") + 1]) for command in compared[2:4]] == [
        (f"out/english-then-chinese/seed-1/{task}", f"out/chinese-only/seed-1/{task}")
        for task in two_stage.TASKS.values()
    ]
    assert len(found[-1]) == 1 + 2 * 6 + 2 + 2
    written = [command[-1] for command in found if "evaluate" in command and "--against" not in command]
    assert sorted(written) == sorted(found[-1][1:-2])


def test_what_was_answered_is_asked_once(found, tmp_path):
    places = [Path(command[-1]) for command in found if command[0] == "evaluate" and "--against" not in command]
    for place in places[:5]:
        (tmp_path / place.relative_to("out")).mkdir(parents=True)
        (tmp_path / place.relative_to("out") / "model_card.md").touch()
    again = [*two_stage.commands("m", Path("d"), tmp_path, 3, [])]
    assert len(again) == len(found) - 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_comparison_on_a_tiny_model(small, tmp_path, capsys):
    root = tmp_path / "data"
    chinese = [
        ("high" if number % 3 else "low", f"今天第{number}次想到，{'累' * (number % 5 + 1)}得说不出话")
        for number in range(40)
    ]
    rows = upstream.cd_rows(
        *((f"第{number}天我还是觉得自己{'笨' * (number % 4 + 1)}", {number % 12}) for number in range(40))
    )
    english = [upstream.imhi_row(f"day {number}: the bus was late {'again ' * (number % 6)}") for number in range(20)]
    for name, data in (("sos_hl_1k/suicide_train.jsonl", upstream.sos_chat(chinese)),
                       ("socialcd_3k/train_data_with_header.tsv", upstream.cd_table(rows)),
                       ("imhi/instruction_data/dreaddit/train.csv", upstream.imhi_table(*english))):  # fmt: skip
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(data)
    model = small.parent / "model"
    train = "train.steps=2", "train.epochs=null", "train.rows=1", "mesh=null", "generate.max_new_tokens=2"
    sets = [part for one in (*train, "data.sets=[sos_hl_1k, socialcd_3k, imhi_dreaddit]") for part in ("--set", one)]
    for _ in range(2):
        two_stage.main([str(model), str(root), "--out", str(tmp_path / "out"), "--seeds", "1", *sets])
    table = (tmp_path / "out" / "leaderboard.md").read_text("utf-8")
    assert (
        "| suicide_risk | english-then-chinese | label |" in table and "| cognitive_distortion | chinese-only" in table
    )
    assert "before-suicide_risk" in table and "floor: tfidf_logreg" in table
