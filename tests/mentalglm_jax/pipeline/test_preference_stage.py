"""A preference stage in a recipe: from the stage before it, or from an adapter of somewhere else."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from mentalglm_jax.errors import InputError
from mentalglm_jax.pipeline.job import run
from mentalglm_jax.text.tokenizer import BUILTIN, GlmTokenizer
from mentalglm_jax.train.recipe import load_recipe
from tests.mentalglm_jax.pipeline.test_changes import Seen


@pytest.fixture
def pairs(tmp_path):
    tokenizer = GlmTokenizer.load(BUILTIN)
    rows = [{"id": f"p{n}", "prompt_ids": tokenizer.prompt_ids(f"I think of {what}."),
             "chosen_ids": [*tokenizer.encode(f"\n{what}"), tokenizer.stop_id],
             "rejected_ids": [*tokenizer.encode("\nno"), tokenizer.stop_id]}
            for n, what in enumerate(("rain", "wind", "snow"))]  # fmt: skip
    rows.append(rows[0] | {"id": "long", "chosen_ids": rows[0]["chosen_ids"] * 40})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def adapter(directory):
    return load_file(directory / "adapter" / "adapter_model.safetensors")


def test_a_stage_of_pairs_goes_on_from_the_stage_before_or_from_an_adapter(small, pairs, tmp_path):
    train = {"steps": 4, "rows": 1, "sequence_length": 128, "learning_rate": 1e-2, "warmup_ratio": 0.0, "log_every": 1}
    first = {"name": "a", "train": train}
    repair = {"name": "b", "objective": {"kind": "dpo", "pairs": str(pairs)}, "train": train}
    seen = Seen()
    both = load_recipe(small, [f"run_dir={tmp_path / 'both'}", f"stages={json.dumps([first, repair])}"])
    run(both, seen, until="train")
    assert seen.stages == ["data", "train a", "train b"]
    assert any("1 examples are longer than sequence_length = 128" in line and "first: long" in line
               for line in seen.lines)  # fmt: skip
    where = tmp_path / "both" / "stages" / "b"
    rows = [json.loads(line) for line in (where / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert rows[0]["margin"] == rows[0]["kl"] == 0 and rows[-1]["margin"] > 0
    assert load_file(where / "reference.safetensors")["log_probabilities"].dtype == np.float32
    # The same stage alone, from the adapter that the first one left.
    start = tmp_path / "start"
    shutil.copytree(tmp_path / "both" / "stages" / "a" / "adapter", start)
    alone = load_recipe(small, [f"run_dir={tmp_path / 'alone'}", f"stages={json.dumps([repair])}",
                                f"model.adapter={start}"])  # fmt: skip
    run(alone, Seen(), until="train")
    found, wanted = adapter(tmp_path / "alone" / "stages" / "b"), adapter(where)
    assert {name: x.tobytes() for name, x in found.items()} == {name: x.tobytes() for name, x in wanted.items()}
    before = adapter(tmp_path / "both" / "stages" / "a")
    assert any((before[name] != wanted[name]).any() for name in wanted)
    # Started anew it reads the same pairs; damaged ones stop it before it trains.
    pairs.write_text(pairs.read_text() + "{}\n")
    with pytest.raises(InputError, match=r"pairs\.jsonl:5: field 'id' is missing"):
        run(alone, Seen(), restart=True, until="train")
