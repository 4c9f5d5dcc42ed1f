"""What the pages show works: every block of Python runs, every command line exists, links lead somewhere."""

import contextlib
import importlib
import json
import re
import shlex
import tomllib
import typing
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from PIL import Image
from pydantic import BaseModel

from tests.fences import ALL, PAGES, SHELL, Block, blocks
from tests.hostile.attack import ENTRIES
from tests.hostile.commands import commands
from tests.test_command_lines import leaf

ROOT = Path(__file__).parents[1]
LANGUAGES = {*SHELL, "python", "text", "yaml", "json"}
# Why a block may stand there without being run, and what shows that it is so.
REASONS = {
    "needs an accelerator": r"configs/(tpu|gpu|mentalglm)",
    "needs the Hub": r"ORG/NAME|hf auth",
    "needs data that is not shipped": r"data\.root=PATH|model\.gguf",
    "compiles for a TPU": r"--topology",
    "needs several processes": r"accelerate launch|torchrun",
    "goes on until it is stopped": r"mentalglm (chat|serve)",
    "needs a server": r"127\.0\.0\.1",
    "other programs": r"vllm serve|convert_hf_to_gguf",
    "takes minutes": r"two_stage|configs/repair\.yaml|mentalglm bench|mentalglm_jax bench|"
    r"make (demo|study|test\S*)|configs/(demo|study|build/c-imhi)\.yaml|probes validate|"
    r"benchmarks\.rationales|probes leaderboard",
}
TESTED = re.compile(r"tested by (tests/\S+\.py)")
PYTHON = [block for block in ALL if block.language == "python"]
COMMANDS = [block for block in ALL if block.language in SHELL]
RUN = [block for block in COMMANDS if block.mark is None]


def test_there_are_blocks_of_every_kind():
    assert len(PYTHON) >= 5 and len(COMMANDS) >= 15 and len(RUN) >= 8


@pytest.mark.parametrize("block", ALL, ids=str)
def test_a_block_says_what_it_is(block: Block):
    assert block.language in LANGUAGES, block.language
    if block.mark is None:
        return
    if tested := TESTED.fullmatch(block.mark):
        test = (ROOT / tested[1]).read_text("utf-8")
        assert block.page.name in test or all(
            f'"{line.split()[1]}"' in test for line in block.commands() if "pip" not in line
        )
    else:
        assert block.mark in REASONS, f"{block.mark!r} is no reason not to run a block"
        assert re.search(REASONS[block.mark], block.text), f"nothing in it {block.mark}"


# ---- command lines ---------------------------------------------------------------------------------------------------


def targets() -> set[str]:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    return set(phony.split())


def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"])


def check(words: list[str]) -> None:
    """Fails where a command line names what is not there: a command, an option, a target, an extra, a file."""
    while found := re.fullmatch(r"([A-Z_]+)=(\S*)", words[0]):
        assert found[1] != "PYTHONPATH" or found[2].startswith(("/", "$PWD")), f"{words[0]}: not absolute, so dropped"
        words = words[1:]
    if words[0] == "until":
        words = words[1 : [word.endswith(";") for word in words].index(True) + 1]
        words[-1] = words[-1].removesuffix(";")
    if words[:2] == ["accelerate", "launch"]:
        words = ["probes", *words[words.index("probes") + 1 :]]
    program, *rest = words
    if program in ENTRIES:
        if not rest or rest[0].startswith("--"):
            assert set(rest) <= {"--version", "--help", "--install-completion"}, words
            return
        command, found = [], None
        for word in rest:
            command.append(word)
            with contextlib.suppress(KeyError, AttributeError):
                found = leaf(program, " ".join(command))
                if not getattr(found, "commands", None):
                    break
        assert found is not None and not getattr(found, "commands", None), words
        arguments = [word for word in rest[len(command) :] if word != "--debug"]
        with contextlib.suppress(SystemExit):  # --help
            found.make_context(" ".join(command), arguments).close()
    elif program == "make":
        assert {word for word in rest if "=" not in word} <= targets(), words
    elif program == "pip":
        assert rest[0] in ("install", "download"), words
        assert all((ROOT / name).is_file() for flag, name in pairwise(rest) if flag == "-r"), words
        for extra in re.findall(r"\[([^\]]+)\]", " ".join(rest)):
            assert set(extra.split(",")) <= extras(), words
    elif program == "python" and rest[:3] == ["-P", "-m", "mentalglm_jax"]:
        check(["mentalglm", *rest[3:]])
    elif program == "python" and rest[:1] == ["-m"]:  # a file of the clone, in which it is called
        assert (ROOT / f"{rest[1].replace('.', '/')}.py").is_file(), words
    elif program in ("python", ".venv/bin/python"):
        files = [word for word in rest if word.endswith(".py")]
        if files and files[0] in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):  # llama.cpp's
            return
        assert files and all((ROOT / word).is_file() for word in files), words
    else:
        assert program in (
            "git",
            "cd",
            "echo",
            "hf",
            "tensorboard",
            "lm_eval",
            "vllm",
            "llama-server",
        ), f"{program}: say in tests/test_docs.py how it is checked"


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_every_command_line_exists(block: Block):
    for line in block.commands():
        check(shlex.split(line))


@pytest.mark.parametrize(
    "line", ["mentalglm fly", "probes run", "probes run m --in a --out b --no-such", "make fly", "pip install '.[fly]'",
             "python scripts/fly.py", "python -m scripts.fly", "fly", "mentalglm data",
             "PYTHONSAFEPATH=1 accelerate launch -m probes fly", "PYTHONPATH=. python -P -m mentalglm_jax bench"]
)  # fmt: skip
def test_the_check_would_notice(line: str):
    with pytest.raises(Exception):  # noqa: B017  Click's own, or an assertion
        check(shlex.split(line))


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "yaml"], ids=str)
def test_every_piece_of_yaml_is_taken(block: Block):
    """Pieces of recipes by the models that check recipes, task files as task files."""
    from mentalglm_jax.data.explain.teacher import TeacherConfig
    from mentalglm_jax.text.task_files import tasks_of
    from mentalglm_jax.train.recipe import StageSection

    raw = yaml.safe_load(block.text)
    assert set(raw) <= {"tasks", "stages", "teacher"} and len(raw) == 1, "say here how it is checked"
    for stage in raw.get("stages", ()):
        StageSection.model_validate(stage)
    if "tasks" in raw:
        assert tasks_of(raw["tasks"], str(block))
    if "teacher" in raw:
        TeacherConfig.model_validate({"base_url": "http://localhost", "model": "m", **raw["teacher"]})


# ---- generated pages -------------------------------------------------------------------------------------------------


def test_the_reference_has_every_command_option_key_and_name():
    from mentalglm_jax.data.explain.build import BuildRecipe
    from mentalglm_jax.train.recipe import Recipe
    from scripts import docs_pages

    for entry in ENTRIES:
        page = docs_pages.command_page(entry)
        for name in commands(entry):
            assert f"\n## {entry} {name}\n" in page
            section = page.partition(f"\n## {entry} {name}\n")[2].partition("\n## ")[0]
            names = [name for one in leaf(entry, name).params for name in one.opts if name.startswith("--")]
            assert not [name for name in names if name != "--help" and name not in section]
            assert f"```sh\n{entry} {name}" in section
    page = docs_pages.recipe_page()
    todo = [Recipe, BuildRecipe]
    while todo:
        model = todo.pop()
        assert not [key for key in model.model_fields if f"| <code>{key}</code> |" not in page]
        todo += [one for field in model.model_fields.values() for one in sections_in(field.annotation)]
    for package in ("mentalglm_jax", "probes"):
        names = importlib.import_module(package).__all__
        assert not [name for name in names if not re.search(rf"^::: \S+\.{name}$", docs_pages.api_page(package), re.M)]


def sections_in(annotation: object) -> list[type[BaseModel]]:
    """The models that a type names, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [one for argument in typing.get_args(annotation) for one in sections_in(argument)]


# ---- Python ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Where the blocks of Python run: what `make demo` and `probes demo` write, from tiny models and a few posts."""
    from flax import nnx

    from mentalglm_jax.checkpoints.adapters import save_adapter
    from mentalglm_jax.checkpoints.directories import save_pretrained
    from mentalglm_jax.model.glm import Glm, GlmConfig
    from mentalglm_jax.model.lora import LoraConfig, add_lora
    from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
    from probes.demo import MODELS, PAIR, ROWS
    from probes.models.encode import read_generations
    from probes.probe import Probe
    from probes.suite import run_suite

    directory = tmp_path_factory.mktemp("docs")
    tokenizer = GlmTokenizer.load(BUILTIN)
    config = GlmConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                       head_dim=8, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048,
                       pad_token_id=tokenizer.pad_id, eos_token_id=tokenizer.eos_ids)  # fmt: skip
    model = Glm(config, rngs=nnx.Rngs(0))
    save_pretrained(model, directory / "runs" / "demo" / "base", tokenizer=tokenizer)
    add_lora(model, LoraConfig(rank=2, alpha=4.0), nnx.Rngs(1))
    for adapter in ("runs/demo/adapter", "my-adapter"):
        save_adapter(model, directory / adapter)
    for name in MODELS:
        rows = read_generations(PAIR / name / ROWS)[:2]
        run_suite(Probe.from_pretrained(PAIR / name), rows, directory / "probes-demo" / name, budget="fast")
    return directory


@pytest.mark.parametrize(
    "page", sorted({block.page for block in PYTHON}), ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_every_block_of_python_runs(page: Path, world: Path, monkeypatch, capsys):
    """In the order of the page, each with what those before it have made."""
    monkeypatch.chdir(world)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python" and block.mark is None:
            exec(compile(block.text, str(block), "exec"), names)


# ---- commands that can run -------------------------------------------------------------------------------------------

# `make demo` in small: the same recipe with two steps of everything.
SMALL = ["data.synthetic.n_train=12", "data.synthetic.n_test=3", "pretrain.chats=40", "pretrain.train.steps=2",
         "train.steps=2", "probe.control=null", "probe.posts=0", "generate.max_new_tokens=4",
         "model.geometry.hidden_size=64", "model.geometry.head_dim=16", "model.geometry.intermediate_size=64",
         "mesh.cpu_devices=1"]  # fmt: skip
CHECKED_ONLY = ("make", "pip", "git", "cd", "python", ".venv/bin/python")  # what they name is looked up, see ``check``


@pytest.fixture(scope="module")
def lived_in(tmp_path_factory) -> Path:
    """A directory in which every name that the pages' commands use is there, made by the commands themselves."""
    from mentalglm_jax.text import tasks

    directory = tmp_path_factory.mktemp("lived")
    for name in ("docs", "configs", "scripts"):
        (directory / name).symlink_to(ROOT / name)
    with contextlib.chdir(directory):
        for run_dir in ("runs/demo", "runs/a", "runs/b"):
            settings = [f"--set={one}" for one in (*SMALL, f"run_dir={run_dir}", f"seed={len(run_dir)}")]
            if run_dir != "runs/demo":
                settings += ["--set=verify=false"]
            tasks.forget_added()
            _done(["mentalglm", "run", "configs/demo.yaml", *settings])
        for name, target in {"MODEL": "runs/demo/base", "ADAPTER": "runs/demo/adapter", "RUN": "runs/demo",
                             "TRAIN.jsonl": "runs/demo/data/faithful/train.jsonl"}.items():  # fmt: skip
            Path(name).symlink_to(target)
        records = Path("runs/demo/data/faithful/test.jsonl").read_text("utf-8")
        Path("RECORDS.jsonl").write_text(records, "utf-8")
        # After two steps no answer states a label: what is probed are the right answers, put into the model's mouth.
        written = [json.loads(line) for line in Path("runs/demo/generations.jsonl").read_text("utf-8").splitlines()]
        Path("right.jsonl").write_text("".join(map(_right, written[:2])), "utf-8")
        _done(["probes", "rows", "MODEL", "--in", "right.jsonl", "--out", "rows.jsonl"])
        said = [json.loads(line) for line in Path("rows.jsonl").read_text("utf-8").splitlines()]
        rows = [old | new for old, new in zip(written, said, strict=False)] + written[len(said) :]
        Path("generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        Path("records").mkdir()
        Path("records/train.jsonl").write_text(Path("TRAIN.jsonl").read_text("utf-8"), "utf-8")
        Path("posts.txt").write_text("I cannot sleep.\nWe had dinner.\n", "utf-8")
        (task,) = [block for block in blocks(ROOT / "docs" / "tasks.md") if block.language == "yaml"]
        Path("tasks.yaml").write_text(task.text, "utf-8")
    return directory


def _right(row: dict[str, typing.Any]) -> str:
    """A line for `probes rows`: what was asked, with the right answer."""
    answer = f"{row['candidates'][row['label']]} Reasoning: {row['explanation']}"
    asked = {"prompt": f"{row['post']} {row['question']}", "post": row["post"], "answer": answer}
    return json.dumps(asked | {"id": row["id"], "candidates": row["candidates"]}) + "\n"


def _done(words: list[str]) -> None:
    code: object = 0
    try:
        importlib.import_module(ENTRIES[words[0]]).main(words[1:])
    except SystemExit as end:
        code = end.code
    assert not code, (words, code)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "page", sorted({block.page for block in RUN}), ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_every_command_of_a_page_runs(page: Path, lived_in: Path, monkeypatch):
    """In the order of the page. Those of `make` and `pip` are looked up, not run."""
    from mentalglm_jax.text import tasks

    monkeypatch.chdir(lived_in)
    for block in blocks(page):
        if block.language in SHELL and block.mark is None:
            for line in block.commands():
                words = shlex.split(line)
                if words[0] not in CHECKED_ONLY:
                    tasks.forget_added()
                    _done(words)


# ---- links and names -------------------------------------------------------------------------------------------------

NAMED = re.compile(
    r"`((?:mentalglm_jax|probes|tests|scripts|docs|configs|benchmarks|notebooks)/[\w./-]+\.(?:py|md|yaml|json|sh|ipynb))`"
)


def test_the_picture_of_the_report_says_when_it_was_taken():
    from scripts.picture import CAPTION, PAGE, PICTURE, SIZE

    with Image.open(PICTURE) as picture:
        said, size = picture.info, picture.size
    caption = CAPTION.search(PAGE.read_text("utf-8"))
    assert caption is not None and f"`make picture`, {said['Creation Time']}, version" in caption[0]
    assert f"mentalglm-jax {caption[0].rpartition(' ')[2].rstrip(')')}, scripts/picture.py" == said["Software"]
    assert size == SIZE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_names_is_there(page: Path):
    named = [name for name in NAMED.findall(page.read_text("utf-8")) if "NAME" not in name]
    assert not [name for name in named if not (ROOT / name).exists()]
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
        assert "://" in target or (page.parent / target).exists() or target.startswith("reference/"), target
