"""A recipe is checked before anything runs; every mistake is one line that says where and what is meant."""

import re
from pathlib import Path

import pytest
import yaml

from mentalglm_jax.errors import InputError
from mentalglm_jax.train.recipe import Recipe, load_recipe

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
RECIPE = """\
run_dir: runs/test
data: {source: synthetic}
model:
  geometry: {hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, head_dim: 8}
pretrain:
  train: {steps: 3}
stages:
  - name: english
    languages: [en]
    train: {steps: 5, rows: 4}
  - name: chinese
    train: {epochs: 2, learning_rate: 1e-4}
"""


@pytest.fixture
def path(tmp_path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    return file


def problem(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        load_recipe(path, overrides)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_shipped_recipe_loads(file):
    text = file.read_text(encoding="utf-8")
    needs_data = yaml.safe_load(text)["data"]["source"] != "synthetic"
    recipe = load_recipe(file, ["data.root=somewhere"] if needs_data else [])
    assert isinstance(recipe, Recipe)
    comment = text[: text.index("\nrun_dir")]
    assert f"configs/{file.name}" in comment and "mentalglm " in comment  # the usage line on top
    assert ("data.root" in comment) == needs_data


def test_what_does_not_go_together(path):
    stage = "stages.english.train"
    assert "final: best needs eval_every" in problem(path, f"{stage}.final=best")
    assert "lora_plus_ratio is for the stages" in problem(path, "pretrain.train.lora_plus_ratio=16")
    assert "eval_every is for the stages" in problem(path, "pretrain.train.eval_every=5")
    assert "pretrain runs in one process" in problem(path, "mesh.distributed=true")
    recipe = load_recipe(path, ["mesh.fsdp=8", "wandb.project=thesis", f"{stage}.eval_every=5", f"{stage}.final=best"])
    assert recipe.mesh is not None and (recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor) == (1, 8, 1)
    assert not recipe.mesh.distributed and recipe.wandb is not None and recipe.wandb.name is None


STOPS = "stages.english.train.early_stopping"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([f"{STOPS}.patience=3"], "early_stopping needs eval_every"),
        (
            [f"{STOPS}.patience=3", "stages.english.train.eval_every=2", "stages.english.train.final=last"],
            "early_stopping ends with the best step; leave final out",
        ),
        ([f"{STOPS}.patience=0", "stages.english.train.eval_every=2"], "early_stopping.patience"),
        ([f"{STOPS}.metric=loss", "stages.english.train.eval_every=2"], "early_stopping.patience"),
        ([f"{STOPS}={{patience: 2, metric: f1}}", "stages.english.train.eval_every=2"], "early_stopping.metric"),
        ([f"{STOPS}={{patience: 2, min_delta: -1}}", "stages.english.train.eval_every=2"], "early_stopping.min_delta"),
        ([f"{STOPS}=3", "stages.english.train.eval_every=2"], "stages.0.train.early_stopping"),
        (["pretrain.train.early_stopping={patience: 2}"], "early_stopping needs eval_every"),
        (["pretrain.train.decay_ratio=0.2"], "decay_ratio is for schedule: wsd; cosine has no stable part"),
        (["pretrain.train.schedule=wsd", "pretrain.train.decay_ratio=0"], "pretrain.train.decay_ratio"),
        (["pretrain.train.schedule=wsd", "pretrain.train.warmup_ratio=0.95"], "more than the whole run together"),
        (["stages.english.weights={suicide_risk: often}"], "stages.0.weights.suicide_risk: a weight is a number"),
        (["stages.english.weights={suicide_risk: {high: -1}}"], "stages.0.weights.suicide_risk: a weight is a number"),
        (["stages.english.weights={suicide_risk: {high: [1]}}"], "stages.0.weights.suicide_risk: a weight is a number"),
        (["stages.english.weights={suicide_risk: 1e9}"], "from 0 to 1000"),
        (["stages.english.weights={suicide_risk: true}"], "a weight is a number"),
        (["train.steps=2"], "either steps or epochs"),  # one of the stages counts epochs
    ],
)
def test_what_practitioners_mistake(path, overrides, says):
    assert says in problem(path, *overrides)


def test_keys_of_practitioners(path):
    stops = [f"{STOPS}={{patience: 3, metric: accuracy}}", "stages.english.train.eval_every=5"]
    weights = (
        "stages.english.weights={suicide_risk: balanced, imhi_dreaddit: {yes: 2, no: 1e-1}, suicide_level: {9: 5}}"
    )
    recipe = load_recipe(path, [*stops, weights, "train.learning_rate=3e-4"])
    english, chinese = recipe.stages
    assert english.train.final == "best" and english.train.best_by == "accuracy"
    assert (chinese.train.final, chinese.train.best_by) == ("last", "loss")
    assert english.weights == {
        "suicide_risk": "balanced", "imhi_dreaddit": {"yes": 2.0, "no": 0.1}, "suicide_level": {"9": 5.0}
    }  # fmt: skip
    assert english.train.learning_rate == chinese.train.learning_rate == 3e-4  # of every stage,
    assert recipe.pretrain is not None and recipe.pretrain.train.learning_rate == 1e-4  # and of nothing else
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe  # as run.json has it


def test_the_examples_of_the_page_are_recipes(path):
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text("utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        path.write_text(yaml.safe_dump(yaml.safe_load(RECIPE) | yaml.safe_load(block)), encoding="utf-8")
        (stage,) = load_recipe(path).stages
        assert stage.weights or stage.train.early_stopping or stage.conversations


def test_values_and_defaults(path):
    recipe = load_recipe(path)
    english, chinese = recipe.stages
    assert (recipe.seed, recipe.lora.rank, recipe.lora.target_modules) == (0, 16, "all-linear")
    assert (english.train.steps, english.train.epochs, english.train.rows) == (5, None, 4)
    assert (chinese.train.steps, chinese.train.epochs) == (None, 2)
    assert chinese.train.learning_rate == 1e-4  # YAML 1.1 reads 1e-4 as a string
    assert chinese.languages is None


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("stage=1", "'stage'", "'stages'"),
        ("lora.rnk=8", "'lora.rnk'", "'rank'"),
        ("pretrain.train.step=8", "'pretrain.train.step'", "'steps'"),
        ("stages.english.train.learning_rat=1", "'stages.0.train.learning_rat'", "'learning_rate'"),
        ("data.synthetic.n_tran=1", "'data.synthetic.n_tran'", "'n_train'"),
        ("probe.control={name: x, lanuages: [en], train: {steps: 1}}", "'probe.control.lanuages'", "'languages'"),
        ("model.geometry.hidden_sise=3", "'geometry.hidden_sise'", "'hidden_size'"),
        ("stages.chinese.tasks=[suicide_rsk]", "'suicide_rsk'", "'suicide_risk'"),
        ("probe.task=suicide", "'suicide'", "'suicide_risk'"),
        ("answer_ordr=label_first", "'answer_ordr'", "'answer_order'"),
        ("stages.chinese.weight={a: 1}", "'stages.1.weight'", "'weights'"),
        ("stages.english.train.early_stopping.patients=3", "'stages.0.train.early_stopping.patients'", "'patience'"),
    ],
)
def test_an_unknown_key_names_the_nearest(path, override, key, meant):
    line = problem(path, override)
    assert line.startswith(f"{path}: ")
    assert f"unknown key {key}" in line or f"unknown task {key}" in line
    assert f"(did you mean {meant}?)" in line


def test_a_key_like_no_other_is_still_named(path):
    line = problem(path, "zzz=1")
    assert "unknown key 'zzz'" in line and "did you mean" not in line


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("lora.rank=many", "lora.rank"),
        ("lora.rank=0", "lora.rank"),
        ("lora.dropout=1", "lora.dropout"),
        ("lora.target_modules=[q_prj]", "q_prj"),
        ("lora.target_modules=[]", "target_modules is empty"),
        ("pretrain.train.steps=1.5", "pretrain.train.steps"),
        ("pretrain.train.learning_rate=.nan", "pretrain.train.learning_rate"),
        ("pretrain.train.learning_rate=.inf", "pretrain.train.learning_rate"),
        ("pretrain.train.beta2=1", "pretrain.train.beta2"),
        ("pretrain.train.schedule=step", "pretrain.train.schedule"),
        ("pretrain.train.epochs=1", "either steps or epochs"),
        ("pretrain.train.steps=null", "either steps or epochs"),
        ("pretrain.train.accumulate=3", "rows (16) must be a multiple of accumulate (3)"),
        ("seed=-1", "seed"),
        ("seed=4294967296", "seed"),
        ("stages=[]", "at least one stage"),
        ("stages.chinese.name=english", "its own name"),
        ("stages.chinese.name=control", "'control'"),
        ("stages.chinese.name=../elsewhere", "stages.1.name"),
        ("stages.chinese.name=a.b", "stages.1.name"),
        ("stages.chinese.languages=[fr]", "stages.1: languages: no task is asked in 'fr'; known: en, zh"),
        ("data=synthetic", "data"),
        ("data.source=jsonl", "add --set data.root=PATH"),
        ("model.path=somewhere", "give either path"),
        ("model.rope_theta=0", "model.rope_theta"),
        ("pretrain=null", "pretrain goes with model.geometry"),
    ],
)
def test_a_wrong_value_says_where(path, override, where):
    line = problem(path, override)
    assert line.startswith(f"{path}: ") and where in line


def test_several_problems_are_counted(path):
    assert "(and 1 more)" in problem(path, "lora.rank=many", "seed=-1")


def test_overrides_reach_every_level(path):
    recipe = load_recipe(
        path,
        ["run_dir=elsewhere", "lora.rank=3", "stages.chinese.train.epochs=0.5", "stages.0.train.steps=7",
         "generate.limit=2", "data.synthetic.n_clauses=[4, 6]", "probe.control={name: control, train: {steps: 1}}",
         "stages.english.train.learning_rate=2e-3", "lora.target_modules=[q_proj, v_proj]"],
    )  # fmt: skip
    assert (str(recipe.run_dir), recipe.lora.rank, recipe.generate.limit) == ("elsewhere", 3, 2)
    assert recipe.stages[1].train.epochs == 0.5 and recipe.stages[0].train.steps == 7
    assert recipe.data.synthetic.n_clauses == (4, 6)
    assert recipe.probe.control is not None and recipe.probe.control.train.steps == 1
    assert recipe.stages[0].train.learning_rate == 2e-3
    assert recipe.lora.config().target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("lora.rank", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("lora.rank=[1", "not valid YAML"),
        ("stages.german.train.steps=1", "no item 'german'; there are english, chinese"),
        ("stages.2.train.steps=1", "no item '2'; there are english, chinese"),
        ("run_dir.x.y=1", "'x' is below a plain value"),
        ("run_dir.x=1", "run_dir is a plain value"),
        ("stages.0=1", "give the whole list"),
    ],
)
def test_an_impossible_override_is_explained(path, override, reason):
    line = problem(path, override)
    assert line.startswith(f"--set {override.partition('=')[0]}: ") and reason in line


def test_an_override_reaches_only_the_place_it_names(path):
    text = RECIPE.replace("train: {steps: 5, rows: 4}", "train: &shared {steps: 5, rows: 4}")
    path.write_text(text.replace("train: {epochs: 2, learning_rate: 1e-4}", "train: *shared"), encoding="utf-8")
    recipe = load_recipe(path, ["stages.english.train.steps=9"])
    assert [stage.train.steps for stage in recipe.stages] == [9, 5]


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b"a: 1\nb: [1, 2\nc: 3\n", 3, "not valid YAML"),
        (b"a: 1\n\tb: 2\n", 2, "not valid YAML"),
        (b"a: 1\nb: *nowhere\n", 2, "not valid YAML"),
        (b"a: !!python/object/apply:os.getcwd []\n", 1, "not valid YAML"),
        (b"a: \x00\n", None, "not valid YAML"),
        ("a: 自杀".encode("gb18030"), None, "cannot be read as UTF-8"),
        (b"", None, "a recipe is a mapping of sections, this file is NoneType"),
        (b"- 1\n- 2\n", None, "a recipe is a mapping of sections, this file is list"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, content, line, reason):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    found = problem(file)
    assert found.startswith(f"{file}:{line}: " if line else f"{file}") and reason in found


def test_a_missing_file(tmp_path):
    assert problem(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such recipe"
    assert "cannot be read" in problem(tmp_path)
