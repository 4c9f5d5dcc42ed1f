"""A run directory through failures in the first stage, ``--restart``, damage and links. No stage beyond the first runs:
what happens in the later ones is tested in tests/mentalglm_jax/pipeline."""

import json
import os

import pytest
import yaml

from mentalglm_jax.errors import RunError
from mentalglm_jax.pipeline.run_dir import NoRun, Run, clear, written_by_run
from mentalglm_jax.pipeline.sweep import _child
from mentalglm_jax.train.recipe import Recipe
from tests.hostile.attack import refused, run

STAGE = {"name": "a", "train": {"steps": 1, "rows": 1, "sequence_length": 64}}
RECIPE = {"data": {"source": "jsonl", "root": "nowhere"}, "model": {"path": "nowhere"}, "stages": [STAGE],
          "probe": {"posts": 0}, "verify": False}  # fmt: skip
LATER = ["data", "train a", "export", "generate", "evaluate", "summary"]


@pytest.fixture
def tried(tmp_path, monkeypatch, capsys):
    """``tried("--restart", ...)``: the outcome of `mentalglm run`, which ends in its first stage: there is no data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"run_dir": "run", **RECIPE}))
    (tmp_path / "nowhere").mkdir()

    def attempt(*options, command="run"):
        outcome = run(["mentalglm", command, "recipe.yaml", *options], capsys)
        lines = [line for line in outcome.err.splitlines(keepends=True) if not line.startswith(("data ...", "  run: "))]
        attempt.said = [line for line in outcome.err.splitlines() if line.startswith("  run: ")]
        return type(outcome)(outcome.code, outcome.out, "".join(lines), outcome.seconds)

    return attempt


MISSING = r"nowhere: no records here; expected train\.jsonl"


@pytest.mark.parametrize("command", ["run", "train"])
def test_a_run_that_failed_in_its_first_stage_goes_on(tried, command):
    for options in ([], [], ["--restart"], []):
        refused(tried(*options, command=command), MISSING)
    assert os.listdir("run") == ["run.json"]


@pytest.mark.parametrize("left", [None, ".lock", ".run.json.0123456789abcdef.unfinished"])
def test_a_run_that_was_killed_before_its_first_file_goes_on(tried, tmp_path, left):
    (tmp_path / "run").mkdir()
    if left is not None:
        (tmp_path / "run" / left).write_text("half")
    refused(tried(), MISSING)
    assert os.listdir("run") == ["run.json"]


def test_restart_deletes_only_what_a_run_writes(tried, tmp_path):
    refused(tried(), MISSING)
    ours = [
        "run.json", "summary.json", "generations.jsonl.partial", "data/faithful/train.jsonl", "stages/a/metrics.jsonl",
        "stages/a/checkpoints/2/state/d/0", "stages/a/adapter/README.md", "merged/model-00001-of-00002.safetensors",
        "probes/cache/ab.json", "probes/report.html", "control/probes/summary.json", "base/config.json",
        ".merged.0123456789abcdef.unfinished/model.safetensors", "pretrain/then/tensorboard/events",
    ]  # fmt: skip
    mine = ["notes.txt", "stages/a/notes.txt", "data/mine.jsonl", "export-peft/README.md", "merged/notes/a.md",
            "stages/notes.txt", ".git/config", "probes/thesis/a.json"]  # fmt: skip
    for name in (*ours, *mine):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("{}") if name != "run.json" else None
    refused(tried("--restart"), MISSING)
    left = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert left == {"run.json", *mine}
    assert len(tried.said) == 1 and ".git/config" in tried.said[0] and "and 4 more" in tried.said[0]


@pytest.mark.parametrize("name", ["run", "run/stages", "run/data/faithful/train.jsonl", "run/stages/a/checkpoints"])
def test_restart_deletes_nothing_through_a_link(tried, tmp_path, name):
    refused(tried(), MISSING)
    elsewhere = tmp_path / "elsewhere"
    if name == "run":
        (tmp_path / "run").rename(elsewhere)
    else:
        elsewhere.mkdir()
    (elsewhere / "summary.json").write_text("mine")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).symlink_to(elsewhere)
    before = (tmp_path / "run" / "run.json").read_bytes()
    refused(tried("--restart"), f"{name}: is a link, and --restart deletes nothing through a link; nothing was deleted")
    assert (elsewhere / "summary.json").read_text() == "mine" and (tmp_path / "run" / "run.json").read_bytes() == before


def test_restart_keeps_links_of_others(tried, tmp_path):
    refused(tried(), MISSING)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "summary.json").write_text("mine")
    (tmp_path / "run" / "shortcut").symlink_to(tmp_path / "mine")
    refused(tried("--restart"), MISSING)
    assert (tmp_path / "run" / "shortcut" / "summary.json").read_text() == "mine"


@pytest.mark.parametrize("target", ["gone", "recipe.yaml"], ids=["dangling", "a file"])
def test_a_link_that_is_no_directory(tried, tmp_path, target):
    (tmp_path / "run").symlink_to(tmp_path / target)
    for options in ([], ["--restart"]):
        refused(tried(*options), "run: cannot make this directory", code=1)


DAMAGE = {
    "empty": "", "cut": '{"recipe": {', "a list": "[]", "no recipe": '{"stages": {}}', "no stages": '{"recipe": {}}',
    "stages a list": '{"recipe": {}, "stages": []}', "a stage a number": '{"recipe": {}, "stages": {"data": 1}}',
    "no seconds": '{"recipe": {}, "stages": {"data": {}}}', "deep": "[" * 100_000 + "]" * 100_000,
    "deep inside": '{"recipe": ' + '{"a": ' * 900 + "1" + "}" * 900 + ', "stages": {}}', "not UTF-8": "\udcff",
    "recipe null": '{"recipe": null, "stages": {}}', "a long number": '{"recipe": ' + "9" * 5000 + "}",
}  # fmt: skip


@pytest.mark.parametrize("restart", [[], ["--restart"]], ids=["continue", "restart"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_json(tried, tmp_path, damage, restart):
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(DAMAGE[damage], "utf-8", "surrogateescape")
    (tmp_path / "run" / "summary.json").write_text("mine")
    if damage == "deep inside":
        refused(tried(), r"run\.json: is damaged|holds a run of another recipe")
        return
    refused(tried(*restart), r"run/run\.json: is damaged")
    assert (tmp_path / "run" / "summary.json").read_text() == "mine"


@pytest.mark.parametrize("kind", ["fifo", "directory", "link"])
def test_run_json_is_no_file(tried, tmp_path, kind):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "run.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        (tmp_path / "other.json").write_text(json.dumps({"recipe": {}, "stages": {}}))
        path.symlink_to(tmp_path / "other.json")
    refused(tried(), r"run/run\.json: is damaged.* \(is (not a file|a link)")


@pytest.mark.parametrize("lost", ["data", "tokenizer", "stages", "merged", "generations.jsonl", "summary.json"])
def test_a_finished_run_whose_results_are_gone_is_not_finished(tried, tmp_path, lost):
    refused(tried(), MISSING)
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    state["stages"] = {name: {"seconds": 1.0} for name in LATER}
    (tmp_path / "run" / "run.json").write_text(json.dumps(state))
    for name in ("data/faithful", "tokenizer", "stages/a/adapter", "adapter", "merged"):
        (tmp_path / "run" / name).mkdir(parents=True)
    for name in ("reference_logits.npz", "generations.jsonl", "evaluation.json"):
        (tmp_path / "run" / name).write_text("")
    (tmp_path / "run" / "summary.json").write_text('{"parity": {}, "eval": {}, "probes": {}, "seconds": {}}')
    assert tried("--json").code == 0
    os.rename(tmp_path / "run" / lost, tmp_path / "away")
    refused(tried("--json"), rf"run/{lost}\S*: is missing, though run/run\.json calls stage '.*' finished")
    if lost == "stages":
        refused(tried("--json", command="train"), r"run/stages/a/adapter: is missing")


def test_all_that_is_not_a_runs_stays_whoever_asks(tmp_path):
    """The pattern by which ``--restart`` deletes knows no file of a name that users give theirs."""
    names = ["README.md", "paper.tex", "data.csv", "data/train.jsonl", "model.safetensors", "adapter.safetensors",
             "stages.json", "a/run.json", "run.json/x", "Summary.json", "stages/a/b/metrics.jsonl", "probes", "lock",
             "data/README.md", "tokenizer/a/tokenizer.json", "../run.json", "checkpoints/1", ".locks"]  # fmt: skip
    assert not [name for name in names if written_by_run(name)]
    (tmp_path / "stages" / "mine").mkdir(parents=True)
    (tmp_path / "stages" / "mine" / "a.txt").write_text("mine")
    assert clear(tmp_path) == ["stages/mine/a.txt"] and (tmp_path / "stages" / "mine" / "a.txt").exists()


@pytest.mark.parametrize("name", [".notes.lock", ".npm.lock", ".mine.lock/thesis.txt"])
def test_restart_keeps_what_only_looks_like_a_lock(tried, tmp_path, name):
    refused(tried(), MISSING)
    (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / name).write_text("mine")
    refused(tried("--restart"), MISSING)
    assert (tmp_path / "run" / name).read_text() == "mine"


@pytest.mark.parametrize("value", ["data.root=run/data/faithful", "model.path=run/merged", "data.root=run"])
def test_restart_does_not_delete_its_own_input(tried, tmp_path, value):
    refused(tried(), MISSING)
    for name in ("data/faithful/train.jsonl", "merged/config.json"):
        (tmp_path / "run" / name).parent.mkdir(parents=True)
        (tmp_path / "run" / name).write_text("{}")
    refused(tried("--restart", "--set", value), "lies in run, which --restart would delete; nothing was deleted")
    assert (tmp_path / "run/merged/config.json").exists() and (tmp_path / "run/data/faithful/train.jsonl").exists()


def test_restart_looks_for_its_input_first(tried, tmp_path):
    refused(tried(), MISSING)
    (tmp_path / "run" / "summary.json").write_text("{}")
    refused(tried("--restart", "--set", "data.root=typing_eror"), "no such file or directory; --restart has deleted")
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("name", ["stages", "stages/a/checkpoints", "data/faithful", "summary.json", "merged"])
def test_a_run_does_not_go_on_through_a_link(tried, tmp_path, name):
    """It keeps two checkpoints and deletes older ones, it renames damaged ones: all that is numbered, elsewhere too."""
    refused(tried(), MISSING)
    (tmp_path / "elsewhere" / "2023").mkdir(parents=True)
    (tmp_path / "elsewhere" / "2023" / "photo").write_text("mine")
    (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    refused(tried(), rf"run/{name}: is a link, and a run writes and deletes in its own directory only")
    assert (tmp_path / "elsewhere" / "2023" / "photo").read_text() == "mine"


@pytest.mark.parametrize("options", [[], ["--restart"]])
def test_a_run_goes_on_with_the_links_that_wandb_makes(tried, tmp_path, options):
    """In its own folder, of which a run reads nothing: one to the newest run, one to a log in the user's cache."""
    refused(tried(), MISSING)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "core.log").write_text("mine")
    (tmp_path / "run/stages/a/wandb/run-1/logs").mkdir(parents=True)
    for name, to in (("latest-run", "run-1"), ("debug.log", "run-1/logs/gone.log"),
                     ("run-1/logs/core.log", tmp_path / "mine" / "core.log"), ("all", tmp_path / "mine")):  # fmt: skip
        (tmp_path / "run/stages/a/wandb" / name).symlink_to(to)
    refused(tried(*options), MISSING)
    assert (tmp_path / "mine" / "core.log").read_text() == "mine"
    assert (tmp_path / "run/stages").exists() == (not options)


@pytest.mark.parametrize("name", ["stages/a/wandb", "stages/wandb/checkpoints", "pretrain/wandb/checkpoints", "wandb"])
def test_nothing_else_called_wandb_may_be_a_link(tried, tmp_path, name):
    refused(tried(), MISSING)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    if name == "wandb":  # somebody else's
        refused(tried("--restart"), MISSING)
    else:
        refused(tried(), rf"run/{name}: is a link, and a run writes and deletes in its own directory only")
    assert (tmp_path / "elsewhere").is_dir() and (tmp_path / "run" / name).is_symlink()


@pytest.mark.parametrize("name", ["stages/a/reference.safetensors", "stages/a/checkpoints/1/metrics/metrics",
                                  "generations.jsonl", "merged/config.json"])  # fmt: skip
def test_a_run_does_not_wait_for_a_pipe(tried, tmp_path, name):
    """The log-probabilities of a preference stage were read by a library that waits for one."""
    refused(tried(), MISSING)
    (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(tmp_path / "run" / name)
    refused(tried(), rf"run/{name}: is neither a file nor a directory; remove it")
    refused(tried("--restart"), MISSING)
    assert not (tmp_path / "run" / name).exists()


@pytest.mark.parametrize("kind", ["a link", "a pipe"])
def test_the_log_of_a_sweep_is_its_own(tmp_path, kind):
    (tmp_path / "mine").write_text("mine")
    log = tmp_path / "log.txt"
    log.symlink_to(tmp_path / "mine") if kind == "a link" else os.mkfifo(log)
    with pytest.raises(RunError, match=r"log\.txt: cannot write"):
        _child(["--version"], log, lambda: None)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("key", ["stages", "more"])
def test_a_recipe_of_values_without_end_in_a_run_json(tmp_path, monkeypatch, key):
    """A kilobyte was taken for each that is wrong: 16 MB of them made gigabytes."""
    recipe = {"run_dir": "x", "data": {"source": "synthetic"}, "model": {"path": "m"}, "stages": [], key: [1] * 100_000}
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe, "stages": {}}))
    monkeypatch.setattr(Recipe, "model_validate", lambda *_: pytest.fail("each value is looked at"))
    with pytest.raises(NoRun, match="not a run directory"):
        Run.opened(tmp_path)
