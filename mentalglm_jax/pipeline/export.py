"""What a run trained, for other programs and for the Hub."""

from pathlib import Path

from mentalglm_jax.checkpoints.adapter_formats import FORMATS
from mentalglm_jax.checkpoints.adapters import save_adapter
from mentalglm_jax.checkpoints.directories import save_pretrained
from mentalglm_jax.checkpoints.hf_files import is_hub_id
from mentalglm_jax.errors import InputError
from mentalglm_jax.foreign import read_json
from mentalglm_jax.pipeline.run_dir import Run
from mentalglm_jax.train.recipe import Recipe


def export_run(
    run_dir: Path, to: str, out: Path, stage: str | None = None, push: str | None = None, public: bool = False,
    base_name: str | None = None,
) -> Path:  # fmt: skip
    """Writes the adapter that a run trained.

    Args:
        run_dir: a run directory whose training stages are done.
        to: a format of ``save_adapter`` ("peft", "vllm", "vllm-split", "llama.cpp", "chatglm"), or "merged".
        out: directory to write.
        stage: whose adapter; None is the last stage's.
        push: Hub repository (USER/NAME) to upload ``out`` to as well; needs a logged-in ``hf auth login``. It is made
            private, unless ``public``.
        base_name: Hub id that the adapter names as its base instead of where the run read it. An adapter that is
            pushed must name one, as a path says who works where.

    Raises:
        InputError: not a run directory, an unknown format or stage, or the stage is not finished; a push that would
            publish a local path.
    """
    try:
        recipe = Recipe.model_validate({**read_json(run_dir / "run.json")["recipe"], "run_dir": run_dir})
    except (InputError, ValueError, KeyError, TypeError):
        raise InputError(f"{run_dir}: not a run directory (no readable run.json)") from None
    if public and push is None:
        raise InputError("--public goes with --push")
    if to not in (*FORMATS, "merged"):
        raise InputError(f"export format {to!r} is not one of {', '.join(FORMATS)}, merged")
    job = Run(recipe)
    if base_name is not None and (to == "merged" or not is_hub_id(base_name)):
        reason = "merged names no base" if to == "merged" else f"{base_name!r} is none, ORG/NAME"
        raise InputError(f"--base-name is for adapters, and a Hub id that is no directory here: {reason}")
    if push is not None and to != "merged" and not is_hub_id(base_name or str(job.base)):
        raise InputError(f"--push would publish the local path of the base, {job.base}; add --base-name ORG/NAME, "
                         "the base's Hub id")  # fmt: skip
    stage = stage or recipe.stages[-1].name
    if not job.adapter_dir(stage).is_dir():
        raise InputError(f"{job.adapter_dir(stage)}: no adapter; is stage {stage!r} of this run finished?")
    model = job.load_final(stage)
    if to == "merged":
        save_pretrained(model, out, tokenizer=job.tokenizer())
    else:
        save_adapter(model, out, format=to, base_model_name_or_path=base_name)
    job.state_data(out)
    job.pack_tasks(out)
    if push is not None:
        _push(out, push, public)
    return out


def _push(directory: Path, repository: str, public: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True, private=not public)
    if not public and not api.repo_info(repository).private:
        raise InputError(f"{repository}: is a public repository, nothing was uploaded; say --public if that is meant")
    api.upload_folder(repo_id=repository, folder_path=str(directory))
