"""What a run trained, for other programs and for the Hub."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mentalglm_jax.checkpoints.adapter_formats import FORMATS, vllm_format
from mentalglm_jax.checkpoints.adapters import save_adapter
from mentalglm_jax.checkpoints.directories import save_pretrained
from mentalglm_jax.checkpoints.hf_files import CALIBRATION, is_hub_id, names_repository
from mentalglm_jax.checkpoints.model_card import CARD, Licence, licence_named, licence_of
from mentalglm_jax.devices.distributed import join
from mentalglm_jax.devices.together import on_primary
from mentalglm_jax.errors import InputError
from mentalglm_jax.files import check_unedited, refuse_inputs
from mentalglm_jax.foreign import at_home
from mentalglm_jax.model.lora import merge_lora
from mentalglm_jax.pipeline import hub
from mentalglm_jax.pipeline.card import run_card
from mentalglm_jax.pipeline.run_dir import Run, written_by_run
from mentalglm_jax.train.recipe import MeshSection


@dataclass(frozen=True)
class Export:
    """What was written: the directory, its files by name with their bytes, and where they were uploaded to, if so."""

    directory: Path
    files: dict[str, int]
    pushed: hub.Pushed | None = None

    @property
    def card(self) -> str:
        """The model card."""
        return (self.directory / CARD).read_text(encoding="utf-8")


def export_run(
    run_dir: Path, to: str, out: Path, stage: str | None = None, push: str | None = None, public: bool = False,
    base_name: str | None = None, licence: str | None = None, dry_run: bool = False,
    mesh: MeshSection | None = None,
) -> Export:  # fmt: skip
    """Writes the adapter that a run trained, or the merged model, with a model card.

    Args:
        run_dir: a run directory whose training stages are done.
        to: a format of ``save_adapter`` ("peft", "vllm", "vllm-split", "llama.cpp", "chatglm"), or "merged".
        out: directory to write.
        stage: whose adapter; None is the last stage's.
        push: Hub repository (ORG/NAME) to upload ``out`` to as well; needs a token (``hf auth login``). It is made
            private, unless ``public``.
        base_name: Hub id that adapter and card name as the base, instead of where the run read it. What is pushed must
            name one, as a path says who works where; only a merged model that was pre-trained here has none.
        licence: of what is written, as the Hub calls it. None is the base's, as its card says.
        dry_run: with ``push``: do everything but the upload.
        mesh: devices to spread the model over.

    Raises:
        InputError: not a run directory, an unknown format or stage, or the stage is not finished; a push that would
            publish a local path or a user's name.
        RunError: the Hub refused, or cannot be reached.
    """
    if mesh is not None:
        join(mesh.cpu_devices, mesh.distributed)
    job = Run.opened(run_dir, mesh=mesh)
    recipe = job.recipe
    for given, option in ((public, "--public"), (dry_run, "--dry-run")):
        if given and push is None:
            raise InputError(f"{option} goes with --push")
    if to not in (*FORMATS, "merged"):
        raise InputError(f"export format {to!r} is not one of {', '.join(FORMATS)}, merged")
    if push is not None and not names_repository(push):
        raise InputError(f"--push {push!r}: give a Hub repository, ORG/NAME")
    if base_name is not None and not is_hub_id(base_name):
        raise InputError(f"--base-name {base_name!r}: give a Hub id, ORG/NAME, that is no directory here")
    base = base_name or job.base_id
    if push is not None and base is None and (to != "merged" or recipe.pretrain is None):
        raise InputError(f"--push would publish the local path of the base, {job.base}; add --base-name ORG/NAME, "
                         "the base's Hub id")  # fmt: skip
    stage = stage or recipe.stages[-1].name
    if not job.adapter_dir(stage).is_dir():
        raise InputError(f"{job.adapter_dir(stage)}: no adapter; is stage {stage!r} of this run finished?")
    job.check_unchanged(f"train {stage}")
    job.check_unchanged("data", lambda name: not name.startswith("data/"))  # the posts may have been deleted
    if stage == recipe.stages[-1].name:
        job.check_unchanged("evaluate", lambda name: name == CALIBRATION)
    _refuse_own(job, out)
    check_unedited(out / CARD, "" if push is None else f"hf upload {push} {out} uploads it as it is")
    named = None if licence is None else licence_named(licence)
    if push is not None and not dry_run:
        on_primary(lambda: hub.prepare(push, public))  # before the work, not after it

    def card_of(written: str) -> str:
        terms = named or _terms(job, base, ask=push is not None)
        return run_card(job, written, stage=stage, base=base, licence=terms, repository=push)

    model = job.load_final(stage)
    written = vllm_format(model) if to == "vllm" else to
    card = on_primary(lambda: card_of(written))
    if to == "merged":
        save_pretrained(merge_lora(model, in_place=True), out, tokenizer=job.tokenizer(), card=card)
    else:
        save_adapter(model, out, format=to, base_model_name_or_path=base_name, card=card)

    def finish() -> tuple[dict[str, int], hub.Pushed | None]:
        job.pack_tasks(out)
        if stage == recipe.stages[-1].name:
            job.pack_calibration(out)
        files = {path.name: path.stat().st_size for path in sorted(out.iterdir()) if path.is_file()}
        if push is None:
            return files, None
        _refuse_private(job, out, files)
        return files, None if dry_run else hub.push(out, list(files), push, public)

    files, pushed = on_primary(finish)
    return Export(out, files, pushed and hub.Pushed(*pushed))


def _refuse_own(job: Run, out: Path) -> None:
    """Whether the export would replace what the run reads, or what it wrote and needs to go on. Raises: InputError."""
    recipe = job.recipe
    refuse_inputs(out, {"model.path": job.base, "model.adapter": recipe.model.adapter,
                        "tokenizer.path": recipe.tokenizer.path, "data.root": recipe.data.root})  # fmt: skip
    here, below = out.resolve(), job.dir.resolve()
    if here.is_relative_to(below):
        place = here.relative_to(below).as_posix()
        if any(written_by_run(f"{place}/{name}") for name in ("config.json", "adapter_config.json")):
            raise InputError(f"{out}: is the run's own, and would be replaced; name another --out")


def _terms(job: Run, base: str | None, ask: bool) -> Licence | None:
    """The licence of the base: by the card beside its weights, or on the Hub if that may be asked."""
    if job.recipe.pretrain is not None:
        return None
    found = licence_of(at_home(str(job.base)), base)
    return hub.licence_on_hub(base) if found is None and ask and base is not None else found


def _refuse_private(job: Run, out: Path, files: dict[str, int]) -> None:
    """Stops before what is to be published names a place on this machine, or who works here.

    A tokenizer's configuration, for one, may hold the path it was once loaded from.

    Raises:
        InputError: naming file and what stands there.
    """
    local = {Path.home(), Path.cwd(), job.dir.absolute(), out.absolute()}
    local |= {at_home(str(given)).absolute() for given in
              (job.recipe.data.root, job.recipe.model.path, job.recipe.tokenizer.path,
               *(stage.conversations for stage in job.recipe.stages))
              if given is not None and not is_hub_id(str(given))}  # fmt: skip
    places = {str(path) for given in local for path in (given, given.resolve()) if len(path.parts) > 2}
    # A path of any machine: a home directory, with what follows.
    home = re.compile(r"(?:/home|/Users|[A-Za-z]:\\+Users|/data/users)[/\\]+[^/\\\"\s]+|/root/[^/\"\s]+")
    for name in files:
        if not name.endswith((".json", ".md", ".jinja", ".yaml")) or name == "tokenizer.json":
            continue
        text = (out / name).read_text(encoding="utf-8")
        found = next((place for place in places if place in text or json.dumps(place)[1:-1] in text), None)
        found = found or (match[0] if (match := home.search(text)) else None)
        if found is not None:
            raise InputError(f"{out / name}: names {found}, a place on a machine, and would be published; take it out "
                             "of the file it came from and export again")  # fmt: skip


def describe(export: Export) -> Iterator[str]:
    """Lines that list what is, or would be, uploaded, and its card."""
    for name, size in export.files.items():
        yield f"{size:>14,}  {name}"
    yield ""
    yield export.card
