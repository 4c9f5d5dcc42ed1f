"""A run directory: the recipe it belongs to, which stages are finished, and where their results lie."""

import shutil
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mentalglm_jax.checkpoints.directories import load
from mentalglm_jax.data.records import SPLITS, Record, read_records
from mentalglm_jax.data.sources import dev_split
from mentalglm_jax.devices.distributed import barrier, is_primary
from mentalglm_jax.errors import InputError
from mentalglm_jax.files import write_json
from mentalglm_jax.foreign import read_json
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.text.tokenizer import GlmTokenizer
from mentalglm_jax.train.checkpoint import differences
from mentalglm_jax.train.recipe import Recipe


def read_splits(root: Path) -> tuple[list[Record], list[str]]:
    """The records of ``root``/train.jsonl and, where they are there, dev.jsonl and test.jsonl.

    What stands in dev.jsonl or test.jsonl is of that split, whatever its rows say. A training record whose post is
    evaluated too is left out (``dev_split`` would move it, into results that are to be on the files as they are).

    Returns:
        The records, and lines that say what was left out.
    """
    records = read_records(root / "train.jsonl")
    for split in ("dev", "test"):
        if (file := root / f"{split}.jsonl").exists():
            records += [replace(record, split=split) for record in read_records(file)]
    sides = [record.split for record in dev_split(records, 0.0)]
    kept = [record for record, side in zip(records, sides, strict=True) if record.split == side]
    if not (left_out := len(records) - len(kept)):
        return kept, []
    return kept, [f"{left_out} training records are left out: their posts stand in the development or test part too"]


class Run:
    """A run directory and its recipe.

    Args:
        recipe: what to do.
        restart: delete what a run with another recipe left in the directory, instead of refusing.
        allow_changed: go on with another recipe; stages that are finished stay as they are.
        profile: training stages write a trace of a few steps.
        say: where a stage tells a line while it works.

    Raises:
        InputError: the directory holds a run of another recipe, or is not a run directory.
    """

    def __init__(
        self, recipe: Recipe, restart: bool = False, *, allow_changed: bool = False, profile: bool = False,
        say: Callable[[str], None] | None = None,
    ):  # fmt: skip
        self.recipe, self.dir = recipe, recipe.run_dir
        self.allow_changed, self.profile, self.say = allow_changed, profile, say
        self._file = self.dir / "run.json"
        if restart and self._file.exists():
            barrier("every process has seen what is to be deleted")
            if is_primary():
                shutil.rmtree(self.dir)
            barrier("the old run is deleted")
        wanted = recipe.model_dump(mode="json", exclude={"run_dir", "mesh", "wandb"})  # where it runs, not what
        self._state: dict[str, Any] = {"recipe": wanted, "stages": {}}
        if self._file.exists():
            try:
                self._state = read_json(self._file)
                differing = differences(self._state["recipe"], wanted)
                stages = self._state["stages"]
                if not all(isinstance(found, dict) for found in (self._state["recipe"], stages, *stages.values())):
                    raise TypeError("stages")
            except (InputError, KeyError, TypeError, AttributeError):
                raise InputError(f"{self._file}: damaged; delete {self.dir} or choose another run_dir") from None
            if differing and not allow_changed:
                raise InputError(
                    f"{self.dir} holds a run of another recipe ({'; '.join(differing[:3])}); "
                    "use another --set run_dir=..., --allow-changed to go on with the new values, or --restart to "
                    "delete it"
                )
            self._state["recipe"] = wanted
        elif self.dir.exists() and any(self.dir.iterdir()):
            raise InputError(f"{self.dir}: not empty and not a run directory; choose another run_dir")
        self.result: dict[str, dict[str, Any]] = self._state["stages"]

    def finished(self, stage: str, result: dict[str, Any]) -> None:
        """Notes that ``stage`` is complete and what it found."""
        self.result[stage] = result
        if is_primary():
            write_json(self._file, self._state)

    @property
    def base(self) -> str | Path:
        """The base model: pre-trained here, or what the recipe names."""
        return self.dir / "base" if self.recipe.pretrain else str(self.recipe.model.path)

    @property
    def eval_split(self) -> str:
        """The split results are reported on: the test one, or the development one where there is no test record.
        Upstream test files stay untouched, so there it is the development one.

        Raises:
            InputError: the run's data has none of them.
        """
        files = {split: self.dir / "data" / "faithful" / f"{split}.jsonl" for split in SPLITS}
        return self._evaluated({split for split, file in files.items() if file.is_file() and file.stat().st_size})

    def _evaluated(self, there: Set[str]) -> str:
        data = self.recipe.data
        splits = ("dev",) if data.source == "upstream" else ("test", "dev")
        if found := [split for split in splits if split in there]:
            return found[0]
        todo = {
            "upstream": "set data.dev_fraction higher", "synthetic": "set data.synthetic.n_test above 0",
            "jsonl": f"add {data.root}/test.jsonl or dev.jsonl",
        }[data.source]  # fmt: skip
        raise InputError(f"the data has no {' or '.join(splits)} record, so nothing can be evaluated; {todo} (where "
                         "`mentalglm train` was here before: with --restart), or use `mentalglm train`")  # fmt: skip

    def check_evaluable(self, records: Sequence[Record] | None = None) -> str:
        """Whether what comes after training will find records; a line that says which.

        Args:
            records: all of the data; None is what the run directory has.

        Raises:
            InputError: no split to evaluate on, or none of its records is of the task that is to be probed.
        """
        split = self.eval_split if records is None else self._evaluated({record.split for record in records})
        there = self.records(split) if records is None else [record for record in records if record.split == split]
        probe = self.recipe.probe
        if probe.posts and not any(record.task == probe.task for record in there):
            raise InputError(f"probe.task {probe.task!r} has no {split} record, so nothing could be probed; set "
                             "probe.task to a task that has some, or probe.posts=0")  # fmt: skip
        return f"results are on the {split} records"

    def records(self, split: str, variant: str = "faithful") -> list[Record]:
        """The records of one split."""
        return read_records(self.dir / "data" / variant / f"{split}.jsonl")

    def tokenizer(self) -> GlmTokenizer:
        """The run's tokenizer."""
        return GlmTokenizer.load(self.dir / "tokenizer")

    def load_base(self, quantize: str | None = None, mesh: Mesh | None = None) -> Glm:
        """The base model without adapter, see ``ModelSection`` for when it is quantised."""
        section = self.recipe.model
        model = load(self.base, dtype=section.dtype, rope_theta=section.rope_theta, mesh=mesh, quantize=quantize)
        model.remat, model.backend = section.remat, section.attention
        return model

    def adapter_dir(self, stage: str) -> Path:
        """Where the adapter trained by ``stage`` is kept."""
        return self.dir / ("control" if stage == "control" else f"stages/{stage}") / "adapter"
