"""Options that several commands take, so that each has one name and one line of help."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mentalglm_jax.cli.output import hush

if TYPE_CHECKING:
    from mentalglm_jax.train.recipe import MeshSection


def finite(value: float | None) -> float | None:
    """Callback of an option that is a number: NaN is below no minimum and above no maximum.

    Raises: typer.BadParameter for NaN and infinity.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else")]
Overrides = Annotated[list[str], typer.Option("--set", help="Override a value: --set a.b=c (repeatable)")]
OnMesh = Annotated[list[str], typer.Option("--set", help="Devices, as in a recipe: --set mesh.fsdp=-1 (repeatable)")]
SetNames = Annotated[
    list[str], typer.Option("--set-name", help="Upstream data set to read, e.g. sos_hl_1k (repeatable)")
]
TaskFile = Annotated[
    Path | None, typer.Option("--tasks", help="File that defines tasks of your own; not needed where one travels along")
]
ModelName = Annotated[str, typer.Argument(help="Model directory or Hub id")]
Adapter = Annotated[str | None, typer.Option(help="PEFT adapter over MODEL: directory or Hub id")]
Tokenizer = Annotated[Path | None, typer.Option(help="Tokenizer directory; default: the model's")]
Temperature = Annotated[float, typer.Option(callback=finite, min=0.0, help="0 takes the likeliest token; above, draws")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Tokens of an answer at most; default: 640, or what the "
                                                              "model's context leaves")]  # fmt: skip
BatchSize = Annotated[int, typer.Option(min=1, help="Posts answered at a time")]
Dtype = Annotated[str, typer.Option(help="float32 | bfloat16 | auto: bfloat16 where the checkpoint's tensors are")]
Quantize = Annotated[str | None, typer.Option(help="Hold the kernels in int8, int4 or nf4")]
RopeTheta = Annotated[
    float | None, typer.Option(callback=finite, help="Overrides the rotary base that config.json states")
]
System = Annotated[str | None, typer.Option(help="System turn before every post; default: the task's own, if any")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many posts, from the top")]
ReplaceSurrogates = Annotated[bool, typer.Option("--replace-surrogates", help="U+FFFD where a text holds half of a "
                                                                              "UTF-16 surrogate pair")]  # fmt: skip


def naming(tasks: Path | None) -> list[str]:
    """``--tasks`` as an override of a recipe, so that the run holds it."""
    return [] if tasks is None else [f"tasks={json.dumps(str(tasks))}"]


def make_known(tasks: Path | None) -> None:
    """Makes the tasks of ``--tasks`` known. Raises: InputError as ``read_tasks`` and ``add_tasks``."""
    if tasks is not None:
        from mentalglm_jax.text.tasks import add_tasks, read_tasks

        add_tasks(read_tasks(tasks), str(tasks))


def make_known_of(model: str, adapter: str | None) -> None:
    """Makes the tasks known that travel with a model and its adapter, directories or Hub ids."""
    from mentalglm_jax.checkpoints.hf_files import ADAPTER_FILES, MODEL_FILES, is_hub_id, locate
    from mentalglm_jax.foreign import at_home
    from mentalglm_jax.text.tasks import add_tasks_beside

    for place, files in ((model, MODEL_FILES), (adapter, ADAPTER_FILES)):
        if place is not None and (at_home(place).is_dir() or is_hub_id(place)):
            add_tasks_beside(locate(place, files))  # of any other, what loads it says what is wrong


def load_model(
    model: str, adapter: str | None, tokenizer: Path | None, *, dtype: str, quantize: str | None,
    rope_theta: float | None, mesh: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """A model that answers, its adapter merged unless its kernels are quantised, and its tokenizer."""
    from mentalglm_jax.checkpoints.directories import load
    from mentalglm_jax.checkpoints.hf_files import locate
    from mentalglm_jax.text.tokenizer import GlmTokenizer

    loaded = load(model, adapter=adapter, dtype=dtype, quantize=quantize, rope_theta=rope_theta, mesh=mesh)
    return loaded if quantize else merged(loaded), GlmTokenizer.load(tokenizer or locate(model))


def merged(model: Any) -> Any:
    """``model`` with its adapter, if it has one, folded in, in place: it answers faster."""
    from mentalglm_jax.model.lora import has_lora, merge_lora

    return merge_lora(model, in_place=True) if has_lora(model) else model


def place(set_: Sequence[str]) -> "MeshSection | None":
    """What ``--set mesh.KEY=VALUE`` says, and ``join_others``; to be called before anything touches a device.

    Raises:
        InputError: another key, a wrong value, or as ``distributed.start``.
    """
    from mentalglm_jax.settings import settings_of
    from mentalglm_jax.train.recipe import Places

    section = settings_of(Places, set_).mesh if set_ else None
    join_others(section)
    return section


def join_others(section: "MeshSection | None") -> None:
    """Joins the processes of several hosts, where ``section`` says so; all but the first are quiet from then on."""
    from mentalglm_jax.devices.distributed import is_primary, join

    if section is not None:
        join(section.cpu_devices, section.distributed)
        if section.distributed and not is_primary():
            hush()
