"""One part in a process of its own: ``python -m mentalglm_jax.bench.child SPEC OUT``.

Started by ``mentalglm_jax.bench.run``, which stops it when its time is over. So a compiler that takes too long costs
its part and nothing else, and the device's memory is free again for the next one.
"""

import json
import sys
from pathlib import Path
from typing import Any

from mentalglm_jax.files import write_json
from mentalglm_jax.foreign import read_json


def main(spec_file: str, out: str) -> None:
    """Reads SPEC, measures, writes OUT anew after every measurement."""
    spec: dict[str, Any] = read_json(Path(spec_file))

    def tell(found: dict[str, Any]) -> None:
        write_json(Path(out), found)

    from mentalglm_jax.model.sharding import split_cpu
    from mentalglm_jax.train.recipe import Recipe

    recipe = None if spec["recipe"] is None else Recipe.model_validate(spec["recipe"])
    if recipe is not None and recipe.mesh is not None and recipe.mesh.cpu_devices is not None:
        split_cpu(recipe.mesh.cpu_devices)
    from mentalglm_jax.bench import device, generation, logits, training
    from mentalglm_jax.bench.target import target_of

    folder, seconds = Path(spec["folder"]), float(spec["seconds"])
    if spec["kind"] == "device":
        device.measure(tell)
        return
    target = target_of(recipe)
    (folder / "target.json").write_text(json.dumps({
        "config": target.config.to_dict(target.recipe.model.dtype), "dtype": target.recipe.model.dtype,
        "rank": target.recipe.lora.rank, "alpha": target.recipe.lora.alpha, "accumulate": target.train.accumulate,
    }), encoding="utf-8")  # fmt: skip
    target.check_room(step=spec["kind"] == "step")
    if spec["kind"] == "step":
        training.measure(target, seconds, folder / "rows.npz", tell)
    elif spec["kind"] == "generate":
        generation.measure(target, seconds, tell)
    else:
        logits.measure(target, folder, tell)


if __name__ == "__main__":
    main(*sys.argv[1:])
