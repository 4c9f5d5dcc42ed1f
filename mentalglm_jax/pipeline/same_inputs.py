"""Whether the runs of a sweep were made of the same inputs: a mean over old and new data, or over two base models, is
none.

What a run's data stage left, what it read where it lies and the base that it trained on stand in its run.json.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import read_json
from mentalglm_jax.pipeline.data_stage import data_stage
from mentalglm_jax.pipeline.kept import digests, talks_and_pairs
from mentalglm_jax.pipeline.run_dir import Run
from mentalglm_jax.train.recipe import Recipe, what_it_is

_Noted = dict[str, str | None]  # an input's file, by the recipe's key and its name, to its digest
_BASE = "base: "


def check_now(recipes: Sequence[Recipe], out: Path) -> None:
    """Whether runs that have begun were made of what the inputs hold now. Inputs that cannot be read are no matter: no
    run can begin with them.

    Args:
        recipes: of the runs; each names its directory.
        out: where the data are made once more, to be compared, and deleted.

    Raises:
        InputError: an input, or an own task, was changed; it is named, and so is the run.
    """
    now: dict[str, _Noted | None] = {}
    for recipe in recipes:
        if (noted := _noted(recipe)) is None:
            continue
        if (given := _given(recipe)) not in now:
            now[given] = _now(recipe, out)
        if (found := now[given]) is not None:
            _compare(recipe, noted, found, "what is there now")


def check_alike(recipes: Sequence[Recipe]) -> None:
    """Whether the runs that have begun were made of the same inputs, where their recipes name the same.

    Raises:
        InputError: two were not; one is named, and the input.
    """
    first: dict[str, tuple[_Noted, Path]] = {}
    for recipe in recipes:
        if (noted := _noted(recipe)) is not None:
            known, of = first.setdefault(_given(recipe), (noted, recipe.run_dir))
            _compare(recipe, noted, known, f"those of {of}")
            known |= noted


def _given(recipe: Recipe) -> str:
    """What two recipes have in common that read the same."""
    said = what_it_is(recipe)
    model = [said["model"][name] for name in ("path", "adapter", "rope_theta")]
    files = sorted((name, str(path)) for name, path in talks_and_pairs(recipe).items())
    control = recipe.probe.control is not None  # it has a corpus of its own
    return json.dumps([said["data"], said["tasks"], said["tokenizer"], said["answer_order"], model, files, control])


def _noted(recipe: Recipe) -> _Noted | None:
    """What run.json says of a run's inputs; None if none was begun by this recipe, or its data are not read yet."""
    try:
        found, wanted = read_json(recipe.run_dir / "run.json"), what_it_is(recipe)
        stages, base, known = found["stages"], found.get("base") or {}, found["recipe"]
        if known | {"tasks": {}} != wanted | {"tasks": {}} or "data" not in stages:
            return None
        data: Mapping[str, Any] = stages["data"]
        noted = dict(data.get("files") or {}) | dict(data.get("read") or {})
        # Of a base that each run trains, the last bits may be others on another machine.
        base = {} if recipe.pretrain is not None else base
        noted |= {f"{_BASE}{form}": name for form, name in dict(base).items()}
        tasks_changed = known["tasks"] != wanted["tasks"]
    except (InputError, KeyError, TypeError, ValueError, AttributeError):  # none, or damaged: whoever reads it says so
        return None
    if tasks_changed:  # a task file that was edited
        raise _other(recipe, "tasks", "what is there now")
    return noted


def _now(recipe: Recipe, out: Path) -> _Noted | None:
    """The same of the inputs as they are now, without the base's fingerprint, for which it would have to be loaded;
    None if they cannot be read."""
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".inputs-") as place:  # for nobody else: it holds posts
            job = Run(recipe.model_copy(update={"run_dir": Path(place) / "run"}))
            found = data_stage(job, lambda *arguments, **named: None)
            return digests(job.dir, "data", None) | found["read"]
    except InputError:
        return None


def _compare(recipe: Recipe, noted: _Noted, other: _Noted, whose: str) -> None:
    sides = [{name.partition("/")[0] for name in one} for one in (noted, other)]
    for name in sorted(noted.keys() | other.keys()):
        # What one side says nothing of, as a version that did not note it, or a form of the base not loaded yet, is no
        # difference; a file that is gone, or has come, is one.
        if name.partition("/")[0] in sides[0] & sides[1] and noted.get(name) != other.get(name):
            raise _other(recipe, _named(recipe, name), whose)


def _other(recipe: Recipe, what: str, whose: str) -> InputError:
    return InputError(f"{recipe.run_dir}: {what} held something else when this run was made than {whose}, and their "
                      "scores would be mixed; put back what was there, delete that run (its own `mentalglm train` with "
                      "--restart does), or choose another --out")  # fmt: skip


def _named(recipe: Recipe, name: str) -> str:
    """The key of the recipe that names an input, and what it says."""
    root, tokenizer, base = recipe.data.root, recipe.tokenizer, recipe.model.path
    kind = name.partition("/")[0]
    if kind == "data":
        return "data.synthetic" if root is None else f"data.root ({root})"
    if kind == "tokenizer" and tokenizer.vocab_size is not None:
        return "tokenizer.vocab_size"
    if kind == "tokenizer" and (tokenizer.path or base is None):
        return f"tokenizer.path ({tokenizer.path or 'none'})"
    if kind in ("tokenizer", "model.path") or name.startswith(_BASE):
        return f"model.path ({base})"
    return {"model.adapter": f"model.adapter ({recipe.model.adapter})"}.get(kind, name.replace("/", ", file ", 1))
