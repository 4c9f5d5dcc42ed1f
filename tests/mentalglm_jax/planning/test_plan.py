"""Planning: what is lowered is what training runs; the compiler's verdict; refusals in one line.

The compiler itself (libtpu) comes with the [dev] extra on Linux x86-64, the only machines it exists for; elsewhere the
tests go as far as JAX does: the step is lowered for a TPU, kernel included.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from mentalglm_jax.checkpoints.weights import parameter_shapes
from mentalglm_jax.cli import main as cli
from mentalglm_jax.data.batches import PackedBatches
from mentalglm_jax.data.pairs import Pair, encode_pairs
from mentalglm_jax.devices.hardware import TPUS
from mentalglm_jax.errors import InputError
from mentalglm_jax.model.glm import Glm, GlmConfig
from mentalglm_jax.model.lora import LoraParam, add_lora
from mentalglm_jax.model.sharding import make_mesh, shard_model
from mentalglm_jax.planning import plan
from mentalglm_jax.planning.answering import step_seconds
from mentalglm_jax.planning.collectives import by_kind, collectives
from mentalglm_jax.planning.cost import abstract_mesh, estimate_memory, shape_of
from mentalglm_jax.train.recipe import load_recipe
from mentalglm_jax.train.step import make_optimizer, make_step

ROOT = Path(__file__).parents[3]
GEOMETRY = {
    "model_type": "glm", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip


def write_recipe(directory: Path, **changes) -> Path:
    """A recipe for a model directory that holds nothing but its config.json."""
    (directory / "model").mkdir(exist_ok=True)
    (directory / "model" / "config.json").write_text(json.dumps(GEOMETRY), "utf-8")
    recipe = {
        "run_dir": str(directory / "run"),
        "data": {"source": "jsonl", "root": str(directory)},
        "model": {"path": str(directory / "model"), "dtype": "bfloat16", "remat": "full"},
        "mesh": {"fsdp": -1},
        "lora": {"rank": 4, "alpha": 8},
        "stages": [{"name": "one", "train": {"steps": 10, "rows": 4, "accumulate": 2, "sequence_length": 256,
                                             "targets_per_row": 64, "loss_chunk": 32}}],
    }  # fmt: skip
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes), "utf-8")
    return path


def shapes(tree) -> list[tuple[tuple[int, ...], str]]:
    return [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(tree)]


def test_a_plan_is_made_of_what_training_is_made_of(tmp_path):
    """The state of shapes has the shapes, dtypes and placements of a real one; so has the batch."""
    recipe = load_recipe(write_recipe(tmp_path))
    train, mesh = recipe.stages[0].train, make_mesh()
    real = Glm(GlmConfig.from_dict(GEOMETRY), rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16, remat="full")
    add_lora(real, recipe.lora.config(), nnx.Rngs(0))
    shard_model(real, mesh)
    model = plan.abstract_trainee(recipe, mesh, "splash")
    made = [make_step(m, make_optimizer(train, 10), train, "lora", mesh)[1:] for m in (real, model)]
    (state, frozen), (planned, planned_frozen) = made
    assert shapes(planned.trainable) == shapes(state.trainable) and shapes(planned_frozen) == shapes(frozen)
    assert shapes(planned.optimizer) == shapes(state.optimizer)
    for found, wanted in zip(jax.tree.leaves(planned.optimizer), jax.tree.leaves(state.optimizer), strict=True):
        assert isinstance(found, jax.ShapeDtypeStruct)
        assert found.sharding.is_equivalent_to(wanted.sharding, found.ndim)
    batch = plan.abstract_batch(train, shape_of(train, dict(mesh.shape)), mesh)
    assert {name: x.shape[:2] for name, x in batch.items()} == dict.fromkeys(batch, (2, 2))
    assert batch["target_ids"].shape == (2, 2, 64) and batch["tokens"].dtype == np.int32


def test_the_step_is_lowered_for_a_tpu_without_one(tmp_path):
    """Tracing, partitioning and the kernel's own compiler up to what libtpu takes over: forward, dq and dkv kernels."""
    recipe = load_recipe(write_recipe(tmp_path))
    train, mesh = recipe.stages[0].train, make_mesh()
    model = plan.abstract_trainee(recipe, mesh, "splash")
    traced = plan.trace_step(model, train, shape_of(train, dict(mesh.shape)), mesh)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    kernels = {name for name in ("fwd", "dq", "dkv") if f"splash_mha_{name}_segmented" in text}
    assert kernels == {"fwd", "dq", "dkv"} and "tpu_custom_call" in text
    donated = len(jax.tree.leaves(nnx.state(model, LoraParam))) * 3 + 2  # parameters, two moments, two step counts
    assert text.count("tf.aliasing_output") + text.count("jax.buffer_donor") == donated


def test_a_preference_stage_is_planned_as_it_is_trained(tmp_path):
    """With the file of pairs the very shapes of its batches, without it no fewer pairs or targets than fit."""
    file, train = tmp_path / "pairs.jsonl", {"steps": 10, "rows": 4, "accumulate": 2, "sequence_length": 256,
                                             "loss_chunk": 32}  # fmt: skip
    stage = {"name": "one", "objective": {"kind": "dpo", "pairs": str(file)}, "train": train}
    recipe = load_recipe(write_recipe(tmp_path, stages=[stage]))
    section, mesh = recipe.stages[0], make_mesh()
    before = plan.paired_rows(section, 512, 0)
    assert before == plan.PairedRows(per_row=64, targets=256, exact=False)
    pairs = [Pair(f"p{n}", (5, 6, 7), (8,) * (20 + n), (9,) * 15, n) for n in range(12)]
    file.write_text("".join(json.dumps(dataclasses.asdict(pair)) + "\n" for pair in pairs))
    batches = PackedBatches(encode_pairs(pairs, 256)[0], rows=4, sequence_length=256, targets_per_row=None, seed=0)
    real = next(iter(batches))
    rows = plan.paired_rows(section, 512, 0)
    assert rows == plan.PairedRows(per_row=batches.pairs_per_row, targets=batches.targets_per_row, exact=True)
    assert 2 < rows.per_row < before.per_row
    config = section.train.model_copy(update={"targets_per_row": rows.targets})
    shape = shape_of(config, dict(mesh.shape))
    batch = plan.abstract_batch(config, shape, mesh, pairs=rows.per_row)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: ((2, 2, *x.shape[1:]), x.dtype) for name, x in real.items()
    }
    model = plan.abstract_trainee(recipe, mesh, "xla")
    estimated = estimate_memory(model, shape)
    found, _, _ = plan.compile_step(model, config, shape, mesh, estimated, section.objective, rows)
    plain, _, _ = plan.compile_step(model, config, shape, mesh, estimated)
    assert found is not None and plain is not None
    assert found.total < 1.2 * plain.total  # no second model, no array of all logits


def test_most_pairs_that_a_row_can_hold_are_planned_for_where_there_are_none_yet(tmp_path):
    least = [Pair(f"p{n}", (5,), (6,), (7,), n) for n in range(100)]
    for length, targets in ((64, None), (64, 10), (4, None)):
        train = {"steps": 1, "rows": 1, "sequence_length": length, "targets_per_row": targets}
        stage = {"name": "one", "objective": {"kind": "dpo", "pairs": str(tmp_path / "none.jsonl")}, "train": train}
        section = load_recipe(write_recipe(tmp_path, stages=[stage])).stages[0]
        batches = PackedBatches(encode_pairs(least, length)[0], rows=1, sequence_length=length,
                                targets_per_row=targets, seed=0)  # fmt: skip
        assert plan.paired_rows(section, 512, 0).per_row == batches.pairs_per_row


@pytest.mark.parametrize("name", ["zai-org/glm-4-9b-hf", "THUDM/glm-4-9b-chat", "zai-org/GLM-4-9B-0414"])
def test_published_models_need_no_download(tmp_path, name):
    recipe = load_recipe(write_recipe(tmp_path), [f"model.path={name}"])
    config = plan.geometry(recipe)
    assert (config.num_hidden_layers, config.vocab_size, config.num_key_value_heads) == (40, 151552, 2)
    assert config.sandwich_norm is ("0414" in name)


def test_a_model_nobody_knows_is_refused(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), ["model.path=zai-org/glm-4-9b-fh"])
    with pytest.raises(InputError, match=r"no such directory .*did you mean 'zai-org/glm-4-9b-hf'"):
        plan.geometry(recipe)


def test_without_the_compiler_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(plan.importlib.metadata, "version", version)
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", str(write_recipe(tmp_path)), "--topology", "v5e:2x2", "--json"])
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and out == ""
    assert err.splitlines()[-1] == (
        "mentalglm: a plan needs the TPU compiler (not a TPU): in a clone of mentalglm-jax: pip install '.[tpu]'"
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--topology", "v5e:9"], "topology 'v5e:9' is not known"),
        (["--topology", "v5e:2x2", "--stage", "two"], "no stage 'two'; the recipe has one"),
    ],
)
def test_a_wrong_question_is_bad_input(tmp_path, capsys, arguments, reason):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", str(write_recipe(tmp_path)), *arguments])
    assert stop.value.code == 2 and reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (135.88G) "
         "exceeds available HBM (15.75G).", 135.88 * 2**30),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.55G of "
         "15.75G hbm. Exceeded hbm capacity by 1.80G.", 17.55 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem", None),
    ],
)  # fmt: skip
def test_what_a_refusing_compiler_needs(message, needed):
    assert plan.refusal(RuntimeError(message)) == needed


def test_the_largest_part_names_its_knob(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), ["model.path=zai-org/glm-4-9b-hf"])
    model = plan.abstract_trainee(recipe, make_mesh(), "xla")
    shape = shape_of(recipe.stages[0].train, {"data": 1, "fsdp": 1, "tensor": 1})
    advice = plan.knobs(model, shape, estimate_memory(model, shape))
    assert advice.startswith("weights 17.5 GiB: model.quantize: int8 or int4")


def test_nothing_is_said_about_a_cpu(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path))
    assert plan.expected(recipe, recipe.stages[0]) is None


class Accelerator:
    """A v5e chip as far as the estimate looks at one."""

    device_kind, platform, id, process_index = "TPU v5 lite", "tpu", 0, 0

    def memory_stats(self):
        return {"bytes_limit": int(15.75 * 2**30)}


def test_the_line_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_own_device", Accelerator)
    small = load_recipe(write_recipe(tmp_path))
    line = plan.expected(small, small.stages[0])
    assert line is not None and line.startswith("estimate: 0.0 of 15.8 GiB per device") and "tokens/s" in line
    large = load_recipe(write_recipe(tmp_path), ["model.path=zai-org/glm-4-9b-hf"])
    line = plan.expected(large, large.stages[0])
    assert line is not None and "It will hardly fit; weights 17.5 GiB: model.quantize" in line


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("tpu-*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_fit_by_arithmetic(path):
    """The compiler's word stands in docs/plan.md; this notices a recipe or a change of code that could not fit."""
    from mentalglm_jax.devices.hardware import parse_topology

    topology = parse_topology(path.read_text("utf-8").split("--topology ")[1].split()[0])
    recipe = load_recipe(path)
    assert recipe.mesh is not None
    sizes = {"data": recipe.mesh.data, "fsdp": recipe.mesh.fsdp, "tensor": recipe.mesh.tensor}
    assert np.prod(list(sizes.values())) == topology.devices
    model = plan.abstract_trainee(recipe, None, "splash")
    for stage in recipe.stages:
        shape = shape_of(stage.train, sizes)
        assert shape.rows * shape.accumulate * sizes["data"] * sizes["fsdp"] == stage.train.rows
        total = estimate_memory(model, shape).total
        assert total < topology.chip.memory / topology.chip.devices, (stage.name, total / 2**30)


def run_plan(python: str | Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`mentalglm plan` of the small recipe in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [python, "-m", "mentalglm_jax", "plan", write_recipe(directory), *arguments, "--json"]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


DRIVER = """import contextlib, io, json, sys
from mentalglm_jax.cli.main import main
for given in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(given)
            code = 0
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def compiles(python: str | Path, directory: Path) -> None:
    """A small model on four v5e chips, with the compiler that ``python`` has; rows that no chip can hold; a slice that
    there is not. All in one process, which starts the compiler once."""
    model = {"path": str(directory / "model"), "dtype": "bfloat16", "remat": "none"}  # a third less to compile
    recipe, rows = str(write_recipe(directory, model=model)), "stages.one.train.rows"
    asked = [["--topology", "v5e:2x2", "--set", f"{rows}=8"],
             ["--topology", "v5e:2x2", "--set", f"{rows}=65536", "--set", "stages.one.train.sequence_length=2048"],
             ["--topology", "v5e:3x5"]]  # fmt: skip
    command = [python, "-c", DRIVER, json.dumps([["plan", recipe, *one, "--json"] for one in asked])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    fits, far, unknown = map(json.loads, done.stdout.splitlines())
    assert fits[0] == 0, fits
    found = json.loads(fits[1])
    assert found["collectives"]["all-gather"] > 0 and found["any_order"] is None
    assert found["fits"] and found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert 0 < found["compiled"]["activations"] < found["total"] < 2**30
    assert far[0] == 1, far
    found = json.loads(far[1])
    assert not found["fits"] and found["needed"] > 16 * 2**30
    assert "train.accumulate" in found["advice"]
    assert unknown[0] == 2 and "the TPU compiler has no such slice" in unknown[2]


@pytest.mark.parametrize(("fits", "code"), [(True, 0), (False, 1)])
def test_what_does_not_fit_is_told_by_the_exit_code(monkeypatch, capsys, tmp_path, fits, code):
    monkeypatch.setattr(plan, "plan", lambda *_, **__: SimpleNamespace(fits=fits, to_dict=lambda: {"fits": fits}))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", str(write_recipe(tmp_path)), "--topology", "v5e:2x2", "--json"])
    assert stopped.value.code == code and json.loads(capsys.readouterr().out) == {"fits": fits}


@pytest.mark.parametrize(("mesh", "chips", "told"), [("null", 4, True), ("null", 1, False), ("{fsdp: -1}", 4, False)])
def test_a_recipe_without_a_mesh_is_told_that_it_would_take_one_device(
    monkeypatch, capsys, tmp_path, mesh, chips, told
):  # fmt: skip
    found = SimpleNamespace(fits=True, mesh={"data": 1, "fsdp": chips, "tensor": 1})
    monkeypatch.setattr(plan, "plan", lambda *_, **__: found)
    monkeypatch.setattr(cli, "plan_table", lambda found: "a table")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", str(write_recipe(tmp_path)), "--topology", "v5e:2x2", "--set", f"mesh={mesh}"])
    said = capsys.readouterr()
    assert stopped.value.code == 0 and said.out == "a table\n"
    assert ("has no mesh, so that a run would take one device" in " ".join(said.err.split())) == told


needs_libtpu = pytest.mark.skipif(
    not any(importlib.metadata.distributions(name="libtpu")),
    reason="needs the TPU compiler, which exists for Linux x86-64: pip install '.[tpu]'",
)


@needs_libtpu
def test_a_compiler_without_a_tpu_is_quiet():
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS" and not k.startswith("TPU_")}
    command = [sys.executable, "-m", "mentalglm_jax", "doctor"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tpu_compiler_compiles_it(tmp_path):
    compiles(sys.executable, tmp_path)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tpu_compiler_compiles_what_answers(tmp_path):
    sizes = ("--batch", "8", "--prompt-tokens", "60", "--new-tokens", "60")
    done = run_plan(sys.executable, tmp_path, "--topology", "v5e:2x2", "--generate", *sizes)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [*found["programs"]] == ["prompts", "first token", "tokens", "label scores"] and found["fits"]
    assert (found["batch"], found["prompt_tokens"], found["slots"]) == (8, 64, 128)
    assert found["cache"] == 8 * 128 * 2 * 2 * 2 * 64 * 2  # rows, slots, layers, k and v, heads, their size, bfloat16
    assert found["weights"] + found["cache"] < found["programs"]["tokens"] <= found["total"] < 2**28
    assert found["total"] == max(found["programs"].values())


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_exchanges_do_not_depend_on_the_order_of_devices(tmp_path):
    done = run_plan(sys.executable, tmp_path, "--topology", "v5e:2x2", "--set", "stages.one.train.rows=8",
                    "--device-order")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["any_order"] is True


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tpu_extra_is_all_it_needs(tmp_path):
    """In an environment of its own."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{ROOT}[tpu]"]
    subprocess.run(install, check=True)
    compiles(python, tmp_path)


# The parameters that the models' own pages state, tied embeddings counted once.
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
}


def test_the_relatives_that_are_known_have_their_published_size():
    relatives = {name: config for name, config in plan.GEOMETRIES.items() if config.family != "glm"}
    assert relatives.keys() == PUBLISHED.keys()
    for name, config in relatives.items():
        assert sum(map(math.prod, parameter_shapes(config).values())) == PUBLISHED[name], name
        assert GlmConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--batch", "4"), "--batch goes with --generate"),
        (("--generate", "--stage", "one"), "--stage is of training"),
        (("--generate", "--prompt-tokens", "500"), "exceed the model's context of 512 tokens"),
    ],
)
def test_options_of_answers(tmp_path, capsys, options, reason):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", str(write_recipe(tmp_path)), "--topology", "v5e:2x2", *options])
    assert stopped.value.code == 2 and reason in capsys.readouterr().err


def test_a_token_takes_as_long_as_reading_what_it_needs(tmp_path):
    """Kernels and head once, cut over the device's share, and the cache; nine billion in bfloat16 on a v6e chip."""
    recipe = load_recipe(write_recipe(tmp_path), ["model.path=zai-org/glm-4-9b-hf"])
    model = plan.abstract_model_on(recipe, make_mesh(), "xla", adapter=False)
    kernels = 40 * (4096 * (4096 + 512) + 4096 * 4096 + 3 * 4096 * 13696) + 4096 * 151552
    chip = TPUS["v6e"]
    assert step_seconds(model, make_mesh(), 1e9, chip) == pytest.approx((2 * kernels + 1e9) / chip.bandwidth)
    part = abstract_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert step_seconds(model, part, 1e9, chip) == pytest.approx((2 * kernels / 4 + 1e9) / chip.bandwidth)


def test_exchanges_are_told_by_kind_and_shape():
    program = """
      %a = f32[8,16]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1}}
      %b = (bf16[4]{0}, bf16[8]{0}) all-gather-start(%y), dimensions={0}
      %c = bf16[8]{0} all-gather-done(%b)
      %d = f32[8,16]{0,1} all-reduce(%z), to_apply=%add
      ROOT %e = f32[2]{0} fusion(%all-gather.1), calls=%reduce-scatter
    """
    found = collectives(program)
    assert found == {"all-reduce f32[8,16]": 2, "all-gather (bf16[4], bf16[8])": 1}
    assert by_kind(found) == {"all-gather": 1, "all-reduce": 2}
