"""Runs of the tiny model: what the tests of the training loop stop, break and compare."""

import dataclasses
from pathlib import Path
from typing import Any

from mentalglm_jax.model.glm import Glm
from mentalglm_jax.train.loop import Surroundings, train
from tests.mentalglm_jax.tiny import parameters, tiny_config, tiny_examples, tiny_model

EXAMPLES = [{**item, "post": (0, 3), "id": f"record-{n}"} for n, item in enumerate(tiny_examples(30))]


HELD_OUT = tiny_examples(11, seed=9)


ALONE = Surroundings()


MASKED: dict[str, Any] = {"mask_posts": 0.5}


MODELS: list[Glm] = []  # what the calls of ``run`` trained, also those that raised


def run(
    directory: Path, at: int = 0, act: Any = None, examples: Any = EXAMPLES, seed: int = 3, evaluation: Any = (),
    around: Surroundings = ALONE, **changes: Any,
):  # fmt: skip
    """Trains the tiny model; ``act()`` is called after step ``at``. Returns the result and the parameters."""
    model = tiny_model(dropout=0.3)

    def progress(done: int, total: int, text: str) -> None:
        if act is not None and done == at:
            act()

    config = tiny_config(**(MASKED | changes))
    around = dataclasses.replace(around, progress=progress)
    try:
        result = train(model, examples, config, directory, trainable="lora", seed=seed, evaluation=evaluation,
                       around=around)  # fmt: skip
    finally:
        MODELS.append(model)
    return result, parameters(model)


def steps_saved(directory: Path) -> list[str]:
    return sorted((path.name for path in (directory / "checkpoints").iterdir()), key=lambda name: (len(name), name))


def one_line(error: BaseException, code: int) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 700 and getattr(error, "exit_code", None) == code
    return text
