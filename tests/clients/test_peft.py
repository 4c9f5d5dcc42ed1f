"""transformers, PEFT and lm-eval on the directories written here, from any working directory."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers

from mentalglm_jax.checkpoints.adapters import load_adapter, save_adapter
from mentalglm_jax.checkpoints.directories import load, save_pretrained
from mentalglm_jax.model.lora import merge_lora
from mentalglm_jax.text.tokenizer import BUILTIN
from tests.clients.cells import (
    KINDS,
    Base,
    base_model,
    by_transformers,
    difference,
    log_probabilities,
    ours,
    with_adapter,
)

CLOSE = 1e-4
PLAIN = Base()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base and a LoRA adapter on it that name no path by hand: loaded from ``base``, saved to ``adapter``."""
    directory = tmp_path_factory.mktemp("peft")
    save_pretrained(base_model("glm", PLAIN), directory / "base", tokenizer=BUILTIN)
    model, trained = load(directory / "base"), with_adapter("glm", "lora", PLAIN)
    save_adapter(trained, directory / "plain")
    load_adapter(model, directory / "plain")
    save_adapter(model, directory / "adapter")
    return SimpleNamespace(directory=directory, base=directory / "base", adapter=directory / "adapter",
                           wanted=ours(model))  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another working directory than the one that wrote."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["glm", "glm4"])
def test_peft_computes_what_jax_does(tmp_path, layout, kind, figure):
    model = with_adapter(layout, kind, PLAIN)
    save_pretrained(base_model(layout, PLAIN), "base", tokenizer=BUILTIN)
    save_adapter(model, "adapter")
    save_pretrained(model, "merged", tokenizer=BUILTIN)
    wanted = ours(model)
    apart, merged = by_transformers(Path("base"), Path("adapter")), by_transformers(Path("merged"))
    figure(f"PEFT {difference(apart, wanted):.1e}, merged {difference(merged, wanted):.1e}")
    assert max(difference(apart, wanted), difference(merged, wanted)) <= CLOSE


@pytest.mark.parametrize("opener", ["AutoPeftModelForCausalLM", "AutoModelForCausalLM", "pipeline"])
def test_an_adapter_directory_opens_by_itself(world, opener, figure):
    """By the base that its adapter_config.json names; nobody says where that is."""
    adapter = str(world.adapter)
    if opener == "pipeline":
        pipe = transformers.pipeline("text-generation", adapter, dtype=torch.float32)
        assert pipe("A post.", max_new_tokens=3, return_full_text=False)[0]["generated_text"] is not None
        model = pipe.model
    elif opener == "AutoPeftModelForCausalLM":
        model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    found = difference(log_probabilities(model), world.wanted)
    figure(f"{opener} {found:.1e}")
    assert found <= CLOSE


@pytest.mark.parametrize("kind", ["lora", "rslora", "alphas", "dora"])
def test_load_adapter_of_transformers(world, kind, figure):
    """Right, but for DoRA, which transformers 5.23 takes as something else, PEFT's own adapters too; docs/adapters.md
    says so. When this fails for DoRA, it is mended there: correct the documentation."""
    trained = with_adapter("glm", kind, PLAIN)
    save_adapter(trained, "adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    model.load_adapter("adapter")
    found = difference(log_probabilities(model), ours(trained))
    figure(f"load_adapter {kind}: {found:.1e}")
    assert (found <= CLOSE) == (kind != "dora")


def test_an_adapter_for_vllm_alone_is_refused_by_peft_and_transformers(world):
    """They would drop its gate_proj and up_proj, and answer."""
    save_adapter(with_adapter("glm", "lora", PLAIN), "split", format="vllm-split")
    model = transformers.AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    for opener in (lambda: peft.PeftModel.from_pretrained(model, "split"), lambda: model.load_adapter("split")):
        with pytest.raises(ValueError, match=r"VLLM_ONLY \(gate_proj and up_proj are GLM's fused gate_up_proj"):
            opener()
    config = json.loads(Path("split/adapter_config.json").read_text())
    Path("split/adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    silent = log_probabilities(peft.PeftModel.from_pretrained(model, "split"))
    assert difference(silent, world.wanted) > 0.1  # what the refusal is for


def test_lm_eval_with_an_adapter_scores_as_with_the_merged_model(world, tmp_path, figure):
    """`lm_eval --model hf pretrained=BASE,peft=ADAPTER` and the merged directory, on a task of our own sentences."""
    merged = tmp_path / "merged"
    model = load(world.base)
    load_adapter(model, world.adapter)
    save_pretrained(merge_lora(model), merged, tokenizer=BUILTIN)
    rows = [{"text": text} for text in ("I sleep badly and nothing helps.", "今天我觉得很累。", "We met at ten.")]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("ours.yaml").write_text(f"""task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
""")
    scores = []
    models = {"apart": f"pretrained={world.base},peft={world.adapter}", "merged": f"pretrained={merged}"}
    for name, arguments in models.items():
        done = subprocess.run(
            [str(Path(sys.executable).with_name("lm_eval")), "--model", "hf", "--model_args",
             f"{arguments},dtype=float32", "--tasks", "ours", "--include_path", str(tmp_path), "--device", "cpu",
             "--batch_size", "1", "--output_path", str(tmp_path / name)],
            capture_output=True, text=True, env={**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        (file,) = (tmp_path / name).rglob("results*.json")
        scores.append(json.loads(file.read_text())["results"]["ours"]["bits_per_byte,none"])
    figure(f"bits per byte {scores[0]:.6f}, merged {scores[1]:.6f}")
    assert math.isclose(*scores, rel_tol=1e-5)
