"""A run directory: the recipe it belongs to, which stages are finished, and where their results lie."""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence, Set
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from pydantic import ValidationError

from mentalglm_jax.checkpoints.adapters import load_adapter
from mentalglm_jax.checkpoints.directories import load
from mentalglm_jax.checkpoints.hf_files import CALIBRATION, is_hub_id
from mentalglm_jax.checkpoints.model_card import CARD
from mentalglm_jax.data.records import SPLITS, Record, read_records
from mentalglm_jax.devices.distributed import barrier
from mentalglm_jax.devices.together import on_primary
from mentalglm_jax.errors import InputError
from mentalglm_jax.files import LOCK, check_owned, check_unedited, left_over_of, write_json
from mentalglm_jax.foreign import MAX_YAML_NODES, at_home, read_json, some
from mentalglm_jax.model.fingerprint import base_fingerprint, model_fingerprint
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.model.lora import merge_lora
from mentalglm_jax.model.sharding import shard_model
from mentalglm_jax.pipeline.changes import outdated, reopened
from mentalglm_jax.pipeline.kept import OUTDATED, check_unchanged, digests, remove
from mentalglm_jax.settings import more_than
from mentalglm_jax.text.tasks import TASKS_FILE, add_tasks_beside, added_tasks, tasks_in, write_tasks
from mentalglm_jax.text.tokenizer import GlmTokenizer
from mentalglm_jax.train.checkpoint import differences, few
from mentalglm_jax.train.recipe import MeshSection, Recipe, opened_mesh, what_it_is

# What a run writes, by its path below the run directory. Deleting goes by this: whatever else is there is not a run's.
_BESIDE = r"README\.md|tasks\.yaml|calibration\.json"
_MODEL = r"(?:config|generation_config|tokenizer|tokenizer_config|special_tokens_map|model\.safetensors\.index)\.json"
_MODEL = rf"(?:{_MODEL}|{_BESIDE}|chat_template\.jinja|tokenizer\.model|model[-0-9a-z]*\.safetensors)"
_ADAPTER = rf"adapter/(?:adapter_config\.json|adapter_model\.safetensors|{_BESIDE})"
_TRAINED = (
    rf"(?:(?:checkpoints|tensorboard|profile|wandb)/.+|(?:metrics|evaluation)\.jsonl|reference\.safetensors|{_ADAPTER})"
)
_GENERATED = r"(?:dev_)?generations\.jsonl(?:\.partial)?"
_PROBED = r"probes/(?:cache/.+|[^/]+\.(?:json|jsonl|parquet|csv|html))"
_FILES = (
    r"(?:run|summary|evaluation|calibration)\.json|evaluation\.(?:csv|html)|(?:label_scores|probes_input)\.jsonl|model_card\.md"
    r"|tasks\.yaml"
)
_WRITTEN = re.compile(
    rf"{_FILES}|report\.html|reference_logits\.npz|{_GENERATED}|{_ADAPTER}|{_PROBED}|(?:tokenizer|base|merged)/{_MODEL}"
    rf"|data/(?:un)?faithful/(?:train|dev|test)\.jsonl|pretrain/(?:[^/]+/)?{_TRAINED}|stages/[^/]+/{_TRAINED}"
    rf"|control/(?:{_TRAINED}|{_GENERATED}|{_PROBED})"
)
# Links that W&B makes in its own folder; nothing of a run is read or written there, and deleted they are themselves.
_OF_OTHERS = re.compile(r"(?:stages/[^/]+|control)/wandb/.+")
_FOLDERS = {"data", "tokenizer", "base", "pretrain", "stages", "control", "adapter", "merged", "probes"}
_EXPORTED = ("adapter", "merged")  # directories with a model card
# Without which a stage that run.json calls finished is not; of training stages it is the adapter.
_RESULTS = {
    "data": ("data/faithful", "tokenizer"), "pretrain": ("base",), "generate": ("generations.jsonl",),
    "export": ("adapter", "merged", "reference_logits.npz"), "evaluate": ("evaluation.json",),
    "probe": ("probes/summary.json",), "summary": ("summary.json",)
}  # fmt: skip


def _passing(name: str) -> bool:
    """Whether a file is of a write that is under way or was killed, or a lock."""
    return left_over_of(name) is not None or (name.startswith(".") and name.endswith(LOCK))


def written_by_run(relative: str) -> bool:
    """Whether a run writes a file of this path below its directory, finished or not."""
    parts = relative.split("/")
    if _WRITTEN.fullmatch(relative) is not None or relative == LOCK:
        return True
    for at, part in enumerate(parts):
        target = left_over_of(part)
        if target is None and at == len(parts) - 1 and part.startswith(".") and part.endswith(LOCK):
            target = part[1 : -len(LOCK)]
        if target and _is_target("/".join([*parts[:at], target])):
            return True
    return False


def replaceable(folder: str) -> Callable[[Path], None]:
    """For ``replace_dir`` of this folder of a run directory: nothing that a run does not write may be in it."""
    return functools.partial(check_owned, owned=lambda name: written_by_run(f"{folder}/{name}"))


def _is_target(relative: str) -> bool:
    """Whether a run writes this file, or replaces this directory."""
    inside = ("x", "config.json", "adapter_config.json", "train.jsonl")
    return (_WRITTEN.fullmatch(relative) is not None or relative in _FOLDERS
            or any(_WRITTEN.fullmatch(f"{relative}/{name}") for name in inside))  # fmt: skip


def _refuse_own_inputs(recipe: Recipe) -> None:
    """``--restart`` must not delete what the run is to read, nor delete for a run that cannot begin.

    Raises:
        InputError: a local input lies in the run directory, or is not there.
    """
    for key, given in (("data.root", recipe.data.root), ("model.path", recipe.model.path),
                       ("model.adapter", recipe.model.adapter), ("tokenizer.path", recipe.tokenizer.path),
                       *((f"stages.{one.name}.conversations", one.conversations) for one in recipe.stages),
                       *((f"stages.{one.name}.objective.pairs", one.objective.pairs) for one in recipe.stages
                         if one.objective is not None)):  # fmt: skip
        if given is None:
            continue
        path = at_home(given)
        if path.exists() and path.resolve().is_relative_to(recipe.run_dir.resolve()):
            raise InputError(f"{key}: {given} lies in {recipe.run_dir}, which --restart would delete; nothing was "
                             "deleted. Choose another run_dir, or copy the input elsewhere")  # fmt: skip
        if not path.exists() and key.endswith((".root", ".conversations", ".pairs")):
            raise InputError(f"{key}: {given}: no such file or directory; --restart has deleted nothing")


def clear(directory: Path, folder: str = ".") -> list[str]:
    """Deletes what a run wrote into ``directory``, and nothing through a link; returns what stays.

    Args:
        directory: a run directory.
        folder: only what lies in this folder of it.

    Raises:
        InputError: ``directory``, or something in it that has the name of a run's, is a link. Nothing is deleted then.
    """
    links, written, other = _sorted_out(directory, folder)
    if directory.is_symlink() or links:
        raise InputError(f"{[directory, *links][not directory.is_symlink()]}: is a link, and --restart deletes nothing "
                         "through a link; nothing was deleted. Remove it or choose another run_dir")  # fmt: skip
    for path in written:
        if path != directory / LOCK:
            path.unlink()
    for name in _FOLDERS if folder == "." else (folder,):
        for root, _, _ in os.walk(directory / name, topdown=False):
            if not os.listdir(root):
                os.rmdir(root)
    return sorted(path.relative_to(directory).as_posix() for path in other)


def _sorted_out(directory: Path, folder: str = "") -> tuple[list[Path], list[Path], list[Path]]:
    """What is in a run directory or a folder of it: links where a run has its own, files of a run, and what else."""
    links, written, other = [], [], []
    for root, folders, names in os.walk(directory / folder):
        for path in (Path(root) / name for name in (*folders, *names)):
            relative = path.relative_to(directory).as_posix()
            ours = written_by_run(relative) or relative in _FOLDERS
            if path.is_symlink() and _OF_OTHERS.fullmatch(relative):
                written.append(path)
            elif path.is_symlink():
                (links if ours or relative.split("/")[0] in _FOLDERS else other).append(path)
            elif not path.is_dir():
                (written if ours else other).append(path)
    return links, written, other


class NoRun(InputError):
    """There is no run in a directory, or none that this version can read."""


class Run:
    """A run directory and its recipe.

    Args:
        recipe: what to do.
        restart: delete what a run left in the directory (``clear``), and begin anew.
        allow_changed: go on with another recipe; stages that are finished stay as they are.
        profile: training stages write a trace of a few steps.
        say: where a stage tells a line while it works.

    Raises:
        InputError: the directory holds a run of another recipe, is not a run directory, or its run.json is damaged; or
            a link stands where a run writes.
    """

    def __init__(
        self, recipe: Recipe, restart: bool = False, *, allow_changed: bool = False, profile: bool = False,
        say: Callable[[str], None] | None = None,
    ):  # fmt: skip
        self.recipe, self.dir = recipe, recipe.run_dir
        self.allow_changed, self.profile, self.say = allow_changed, profile, say
        self._file = self.dir / "run.json"
        wanted = what_it_is(recipe)
        self._state: dict[str, Any] = {"recipe": wanted, "stages": {}, "base": {}}
        self.changed_from: Recipe | None = None  # the recipe until now, where it was another
        self.reopened: list[str] = []
        self._known = self._read()
        if self._known is not None and restart:
            _refuse_own_inputs(recipe)
            barrier("every process has seen what is to be deleted")
            if (kept := on_primary(lambda: clear(self.dir))) and say is not None:
                say(f"{self.dir}: kept {some(kept)}, which a run does not write")
            self._known = None
        elif self._known is not None:
            try:
                add_tasks_beside(self.dir)
            except InputError as error:
                raise InputError(f"{error}; or begin anew with --restart") from None
            differing = self._differing(wanted)
            if differing and not allow_changed:
                raise InputError(f"{self.dir} holds a run of another recipe ({few(differing, 3)}); --allow-changed "
                                 "goes on with the new values, --set run_dir=... begins elsewhere, --restart deletes "
                                 "it")  # fmt: skip
            links, written, _ = _sorted_out(self.dir)
            if links:  # old checkpoints are deleted, damaged ones renamed
                raise InputError(f"{links[0]}: is a link, and a run writes and deletes in its own directory only; put "
                                 "the files themselves there, or choose another run_dir")  # fmt: skip
            if odd := [
                path for path in written if not (path.is_file() or path.is_symlink())
            ]:  # a pipe would be waited for
                raise InputError(f"{odd[0]}: is neither a file nor a directory; remove it")
            self._state["stages"] = dict(self._known["stages"])
            self._state["base"] = dict(self._known["base"])
            if differing:
                self._change()
        elif self.dir.exists() and (there := [name for name in os.listdir(self.dir) if not _passing(name)]):
            raise InputError(f"{self.dir}: not empty and not a run directory ({some(sorted(there))}); "
                             "choose another run_dir")  # fmt: skip
        self.result: dict[str, dict[str, Any]] = self._state["stages"]

    @classmethod
    def opened(
        cls, directory: Path, say: Callable[[str], None] | None = None, mesh: MeshSection | None = None
    ) -> "Run":
        """The run in ``directory``, by its own recipe, on ``mesh``, which is part of no run.

        Raises:
            NoRun: there is none.
            InputError: it is damaged, or has links or pipes in it.
        """
        try:
            known = read_json(directory / "run.json")["recipe"]
            if more_than(known, MAX_YAML_NODES):
                raise ValueError
            recipe = Recipe.model_validate({**known, "run_dir": directory})
            recipe = recipe.model_copy(update={"mesh": mesh})
        except (InputError, ValueError, KeyError, TypeError):
            raise NoRun(f"{directory}: not a run directory (no readable run.json)") from None
        return cls(recipe, say=say)

    def check_trained(self) -> None:
        """Whether all that answers need is there. Raises: InputError, saying what is missing and what to do."""
        for name in ("data", *(f"train {stage.name}" for stage in self.recipe.stages)):
            if name not in self.result:
                raise InputError(
                    f"{self.dir}: stage {name!r} is not finished; `mentalglm train` with its recipe goes on"
                )
            self.check_finished(name)

    def _change(self) -> None:
        """Goes on with another recipe: stages of which it asks more are no longer finished."""
        assert self._known is not None
        stages = self._state["stages"]
        try:
            self.changed_from = Recipe.model_validate({**self._known["recipe"], "run_dir": self.dir})
        except ValidationError:
            raise InputError(f"{self._file}: its recipe is none that this version can go on with; choose another "
                             "run_dir, or --restart") from None  # fmt: skip
        self.reopened = reopened(self.changed_from, self.recipe, stages, lambda name: self._stage(name).is_dir())
        for name in self.reopened:
            stages.pop(name, None)
            for later in outdated(name):
                stages.pop(later, None)

    def forget(self, names: Sequence[str]) -> None:
        """Notes that what these stages made, or began, is out of date; they will be done again."""
        if "train control" in names:  # it began from an adapter that will be another one
            on_primary(lambda: clear(self.dir, "control"))
        on_primary(lambda: remove(self.dir, [file for name in names for file in OUTDATED.get(name, ())]))
        if gone := [name for name in names if self.result.pop(name, None) is not None]:
            on_primary(lambda: write_json(self._file, self._state))
            if self.say is not None:
                self.say(f"to be done again: {', '.join(gone)}")

    def _read(self) -> dict[str, Any] | None:
        """run.json, if there is one; checked as far as it is used."""
        if not os.path.lexists(self._file):
            return None
        try:
            found = read_json(self._file)
        except InputError as error:
            raise self._damaged(f" ({str(error).removeprefix(f'{self._file}')[:200].lstrip(': ')})") from None
        stages, base = found.get("stages"), found.setdefault("base", {})
        if not (
            isinstance(found.get("recipe"), dict)
            and not more_than(found["recipe"], MAX_YAML_NODES)
            and isinstance(base, dict)
            and isinstance(stages, dict)
            and all(isinstance(one, dict) and isinstance(one.get("seconds"), int | float) for one in stages.values())
        ):
            raise self._damaged()
        return found

    def _differing(self, wanted: dict[str, Any]) -> list[str]:
        assert self._known is not None
        known = self._known["recipe"]
        try:
            with contextlib.suppress(ValidationError):  # keys that a later version has are what they are by default
                known = what_it_is(Recipe.model_validate({**known, "run_dir": self.dir}))
            return differences(known, wanted)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._damaged() from None

    def _damaged(self, how: str = "") -> InputError:
        return InputError(f"{self._file}: is damaged, or not a run's{how}; delete {self.dir} or choose another run_dir")

    def begin(self) -> None:
        """Writes run.json, before anything else: whatever happens then, the directory is known to be a run's."""
        if self._known != self._state:
            on_primary(lambda: write_json(self._file, self._state))
        if "train control" in self.reopened:
            on_primary(lambda: clear(self.dir, "control"))

    def check_finished(self, stage: str) -> None:
        """Whether what a finished ``stage`` made is still there, and still what it made.

        Raises:
            InputError: it is not.
        """
        name = stage.removeprefix("train ")
        results = [self.dir / result for result in _RESULTS.get(stage, ())]
        for path in results if name == stage else [self.adapter_dir(name)]:
            if not path.exists():
                raise InputError(f"{path}: is missing, though {self._file} calls stage {stage!r} finished; put it "
                                 "back, or begin anew with --restart")  # fmt: skip
        self.check_unchanged(stage)

    def check_all_finished(self, stages: Sequence[str]) -> None:
        """``check_finished`` of those that are finished and stay so, before hours of work for the others; and whether
        these would replace a model card that somebody went on with.

        Raises: InputError.
        """
        again: set[str] = set()
        for name in stages:
            if name not in self.result:
                again |= {name, *outdated(name)}
            elif name not in again:
                self.check_finished(name)
        for name in again.intersection(stages):
            adapter = self._adapter_of(name)
            for place in [adapter] if adapter else [self.dir / one for one in _EXPORTED] if name == "export" else ():
                check_unedited(place / CARD)

    def check_unchanged(self, stage: str, read: Callable[[str], bool] | None = None) -> None:
        """Whether nobody has changed what a finished ``stage`` made (``kept.check_unchanged``). Raises: InputError."""
        check_unchanged(self.dir, stage, self._adapter_of(stage), self.result.get(stage, {}), read)

    def _adapter_of(self, stage: str) -> Path | None:
        return self.adapter_dir(stage.removeprefix("train ")) if stage.startswith("train ") else None

    def finished(self, stage: str, result: dict[str, Any]) -> None:
        """Notes that ``stage`` is complete and what it found."""
        self.result[stage] = result | {"files": on_primary(lambda: digests(self.dir, stage, self._adapter_of(stage)))}
        if stage == "pretrain":
            self._state["base"] = {}  # it has made another one
        on_primary(lambda: write_json(self._file, self._state))

    @property
    def base(self) -> str | Path:
        """The base model: pre-trained here, or what the recipe names."""
        return self.dir / "base" if self.recipe.pretrain else str(self.recipe.model.path)

    @property
    def base_id(self) -> str | None:
        """The Hub id of the base model, where the recipe names it by one."""
        return str(self.base) if is_hub_id(str(self.base)) else None

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

    def check_evaluable(self, records: Sequence[Record] | None = None, probed: bool = True) -> str:
        """Whether what comes after training will find records; a line that says which.

        Args:
            records: all of the data; None is what the run directory has.
            probed: ask for what is to be probed, too.

        Raises:
            InputError: no split to evaluate on, or none of its records is of the task that is to be probed.
        """
        split = self.eval_split if records is None else self._evaluated({record.split for record in records})
        there = self.records(split) if records is None else [record for record in records if record.split == split]
        probe = self.recipe.probe
        if probed and probe.posts and not any(record.task == probe.task for record in there):
            raise InputError(f"probe.task {probe.task!r} has no {split} record, so nothing could be probed; set "
                             "probe.task to a task that has some, or probe.posts=0")  # fmt: skip
        return f"results are on the {split} records"

    def records(self, split: str, variant: str = "faithful") -> list[Record]:
        """The records of one split."""
        return read_records(self.records_file(split, variant))

    def records_if_any(self, split: str) -> list[Record]:
        """The same; none where the data has none of that split."""
        file = self.records_file(split)
        return self.records(split) if file.is_file() and file.stat().st_size else []

    def records_file(self, split: str, variant: str = "faithful") -> Path:
        """Where they lie."""
        return self.dir / "data" / variant / f"{split}.jsonl"

    def tokenizer(self) -> GlmTokenizer:
        """The run's tokenizer."""
        return GlmTokenizer.load(self.dir / "tokenizer")

    def load_base(self, quantize: str | None = None, mesh: Mesh | None = None) -> Glm:
        """The base model without adapter, see ``ModelSection`` for when it is quantised."""
        section = self.recipe.model
        model = load(self.base, dtype=section.dtype, rope_theta=section.rope_theta, mesh=mesh, quantize=quantize)
        model.remat, model.backend = section.remat, section.attention
        self._check_base(model, f"{section.dtype} {quantize or ''}".rstrip())
        return model

    def _check_base(self, model: Glm, form: str) -> None:
        """Whether it is the base that the run began with, in this ``form``. Raises: InputError."""
        found, noted = base_fingerprint(model), self._state["base"]
        if noted.setdefault(form, found) != found and not self.allow_changed:
            raise InputError(f"{self.base}: is not the base model that this run began with: its weights or its "
                             "config.json are others now, or another revision was downloaded; put it back, choose "
                             "another run_dir, or go on with --allow-changed")  # fmt: skip
        noted[form] = found

    def load_final(self, stage: str | None = None) -> Glm:
        """The base model with the adapter of ``stage``, on the recipe's mesh; None is the last one."""
        mesh = opened_mesh(self.recipe.mesh)
        model = self.load_base(mesh=mesh)
        load_adapter(model, self.adapter_dir(stage or self.recipe.stages[-1].name))
        if mesh is not None:
            shard_model(model, mesh)
        return model

    def load_merged(self, stage: str | None = None) -> tuple[Glm, str]:
        """``load_final`` with the adapter merged, and the fingerprint of what it was before."""
        model = self.load_final(stage)
        fingerprint = model_fingerprint(model)
        return merge_lora(model, in_place=True), fingerprint

    def adapter_dir(self, stage: str) -> Path:
        """Where the adapter trained by ``stage`` is kept."""
        return self._stage(stage) / "adapter"

    def _stage(self, name: str) -> Path:
        return self.dir / ("control" if name == "control" else f"stages/{name}")

    def pack_calibration(self, directory: Path) -> None:
        """Writes what the development records said of the final model's probabilities beside its weights in
        ``directory``, or takes what is no longer so away."""
        source, target = self.dir / CALIBRATION, directory / CALIBRATION
        if source.is_file():
            write_json(target, read_json(source))
        else:
            target.unlink(missing_ok=True)

    def pack_tasks(self, directory: Path, names: Iterable[str] | None = None) -> None:
        """Writes the run's own tasks (``names`` says which are in use; None: those in the run directory) to the
        ``tasks.yaml`` of ``directory``, an export or the run itself, if it has any."""
        own = tasks_in(self.dir)
        if names is not None:
            own = added_tasks({*names, *self.recipe.tasks})
        if own:
            write_tasks(directory / TASKS_FILE, own)
