"""Answers and label scores of a model that is spread over eight (virtual) devices are those of one."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from mentalglm_jax.checkpoints.adapters import save_adapter
from mentalglm_jax.checkpoints.directories import load, save_pretrained
from mentalglm_jax.checkpoints.reference import _logits
from mentalglm_jax.inference.decode import generate_ids, plan, prefill
from mentalglm_jax.inference.generate import model_fingerprint
from mentalglm_jax.inference.scoring import score_labels
from mentalglm_jax.model.lora import merge_lora
from mentalglm_jax.model.sharding import make_mesh, mesh_of
from tests.mentalglm_jax.tiny import VOCAB, on_eight_devices, tiny_model

MESHES = [(2, 2, 2), (1, 8, 1), (8, 1, 1), (1, 2, 4), (2, 4, 1), (4, 1, 2)]
COMMON: dict[str, Any] = {"max_new_tokens": 24, "eos_ids": list(range(40, 50)), "batch_size": 3}


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, VOCAB, int(length)).tolist() for length in (3, 40, 17, 9, 33, 5, 21, 12, 8, 30, 11)]


def few_answers(model: Any) -> dict[str, Any]:
    """What takes the fewest programs, as plain values."""
    short = [prompt[:32] for prompt in prompts()]  # one bucket
    return {
        "greedy": generate_ids(model, short, **COMMON),
        "scores": score_labels(model, short, [[5], [6, 7, 8], [9, 10]], batch_size=3).tolist(),
    }


def all_answers(model: Any) -> dict[str, Any]:
    """Everything a model is asked after training."""
    heads = [[7] * 40 + prompt for prompt in prompts()]
    streamed: dict[int, list[int]] = {}
    generate_ids(model, prompts()[:3], stream=lambda i, token: streamed.setdefault(i, []).append(token), **COMMON)
    tokens = np.asarray([prompt[:3] for prompt in prompts()])
    return few_answers(model) | {
        "long": generate_ids(model, prompts(), **COMMON),
        "drawn": generate_ids(model, prompts(), temperature=1.0, top_k=20, seed=5, repetition_penalty=1.1, **COMMON),
        "shared": generate_ids(model, heads, share_prefix=True, **COMMON),
        "streamed": [streamed[i] for i in range(3)],
        "logits": _logits(model, tokens, np.ones_like(tokens)).tolist(),
    }


def check(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, values in wanted.items():
        if name in ("scores", "logits"):
            np.testing.assert_allclose(found[name], values, rtol=0, atol=2e-5, err_msg=name)
        else:
            assert found[name] == values, name
            assert len({len(ids) for ids in values}) > 1  # some end early, others do not


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    model = tiny_model()
    save_pretrained(model, directory / "base", merge=False)
    save_adapter(model, directory / "adapter")
    return directory


def loaded(directory: Path, **options: Any) -> Any:
    return load(directory / "base", adapter=directory / "adapter", rope_theta=1e4, **options)


def test_two_by_two_by_two_answers_as_one(saved):
    found = on_eight_devices(__file__, str(saved), "few", "2", "2", "2")
    one = loaded(saved)
    assert mesh_of(one) is None
    check(found, few_answers(one))
    assert found["cache"].startswith("P(None, 'data', None")  # each copy of the model keeps its own posts
    assert found["kernel"] == "P(None, 'fsdp', 'tensor')" == found["merged"]
    assert found["fingerprint"] == model_fingerprint(one)  # one process goes on with what several have begun


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sizes", MESHES)
def test_other_meshes_answer_as_one(saved, sizes):
    check(on_eight_devices(__file__, str(saved), "all", *map(str, sizes)), all_answers(loaded(saved)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_a_quantised_base_answers_as_one(saved, method):
    found = on_eight_devices(__file__, str(saved), "all", "2", "2", "2", method)
    check(found, all_answers(loaded(saved, quantize=method)))


def test_every_batch_can_be_cut():
    lengths = [20_000, 9_000, 700, 600, 500, 40, 30, 20, 10, 5, 4]
    for parts in (1, 2, 3, 8):
        batches = list(plan(lengths, 4, parts))
        assert sorted(number for numbers, *_ in batches for number in numbers) == list(range(len(lengths)))
        assert all(rows % parts == 0 and len(numbers) <= rows for numbers, rows, _ in batches)
    assert [rows for _, rows, _ in plan([20_000] * 4, 4, 2)] == [2, 2]  # one long post for each copy
    assert [rows for _, rows, _ in plan([20_000] * 4, 4)] == [1] * 4


def main(directory: str, much: str, data: str, fsdp: str, tensor: str, quantize: str = "") -> None:
    mesh = make_mesh(int(data), int(fsdp), int(tensor))
    model = loaded(Path(directory), mesh=mesh, quantize=quantize or None)
    assert mesh_of(model) == mesh
    found = few_answers(model) if much == "few" else all_answers(model)
    if much == "few":
        graph, state = nnx.split(model)
        rows = jax.device_put(np.ones((2, 32), np.int32), jax.NamedSharding(mesh, jax.P("data")))
        found["cache"] = str(prefill(graph, state, rows, rows)[1].k.sharding.spec)
        found["kernel"] = str(model.layers.mlp.gate_up_proj.kernel[...].sharding.spec)
        found["fingerprint"] = model_fingerprint(model)
        found["merged"] = str(merge_lora(model, in_place=True).layers.mlp.gate_up_proj.kernel[...].sharding.spec)
        assert generate_ids(model, [prompt[:32] for prompt in prompts()], **COMMON) == found["greedy"]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
