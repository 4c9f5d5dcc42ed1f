"""``mentalglm convert``: a checkpoint in another form, or a GGUF file as a model directory."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mentalglm_jax.cli.options import RopeTheta, finite
from mentalglm_jax.cli.output import cell, print_json, say


def convert(
    source: Annotated[str, typer.Argument(help="Model directory or Hub id, any layout, or a GGUF file")],
    target: Annotated[Path, typer.Argument(help="Directory to write")],
    to: Annotated[str | None, typer.Option(help="glm | chatglm | llama | mistral | qwen2 | glm4v | glm46v | orbax; "
                                                "default: the family's own")] = None,
    rope_theta: RopeTheta = None,
    max_shard_gb: Annotated[
        float, typer.Option(callback=finite, min=0.001, help="Size of a safetensors shard, 10^9 bytes")
    ] = 5.0,
    dtype: Annotated[str | None, typer.Option(help="Of what a GGUF file unpacks to: float32 (the default; every bit of "
                                                   "it) or bfloat16 (half the size)")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else")] = False,
) -> None:  # fmt: skip
    """Rewrites a checkpoint in another form, block by block and bit for bit, and has transformers open the result."""
    from mentalglm_jax.checkpoints.directories import convert as convert_checkpoint
    from mentalglm_jax.checkpoints.gguf_files import is_gguf
    from mentalglm_jax.checkpoints.model_card import CARD
    from mentalglm_jax.checkpoints.reopened import reopen_with_transformers, transformers_installed
    from mentalglm_jax.errors import InputError
    from mentalglm_jax.files import check_unedited
    from mentalglm_jax.model.relatives import VISION

    check_unedited(target / CARD)
    if is_gguf(Path(source)):
        if to is not None or rope_theta is not None:
            raise InputError(f"{source}: a GGUF file becomes a directory of its own architecture; convert that one "
                             "then (--to, --rope-theta)")  # fmt: skip
        _convert_gguf(source, target, dtype or "float32", int(max_shard_gb * 1e9), json_)
        return
    if dtype is not None:
        raise InputError(f"{source}: --dtype is for GGUF files; a directory is rewritten bit for bit")
    check = reopen_with_transformers if transformers_installed() else None
    layout, opened = convert_checkpoint(source, target, to, rope_theta, int(max_shard_gb * 1e9), check)
    if json_:
        print_json({"out": str(target), "layout": layout, "opened_with_transformers": opened})
        return
    notes = {"orbax": "for mentalglm and Orbax", **dict.fromkeys(VISION, "its vision tower copied as it was"),
             "chatglm": "for vLLM and llama.cpp; transformers has no code of its own for this layout"}  # fmt: skip
    note = notes.get(layout, "not opened with transformers, which is not installed")
    say(f"{target}: written in the {layout} layout ({'transformers opens it' if opened else note})")


def _convert_gguf(source: str, target: Path, dtype: str, max_shard_bytes: int, json_: bool) -> None:
    from mentalglm_jax.checkpoints.gguf_models import convert_gguf
    from mentalglm_jax.checkpoints.reopened import reopen_with_transformers, transformers_installed
    from mentalglm_jax.errors import InputError
    from mentalglm_jax.foreign import read_json
    from mentalglm_jax.text.tokenizer import GlmTokenizer

    check = reopen_with_transformers if transformers_installed() else None
    with Console(stderr=True).status(cell(f"unpacking {source} ...")):
        convert_gguf(source, target, dtype, max_shard_bytes, check)
    try:
        chat, reason = GlmTokenizer.load(target).chat_format.name, None
    except InputError as error:  # a base model: good for its weights
        chat, reason = None, str(error)
    architecture = read_json(target / "config.json")["model_type"]
    if json_:
        print_json({"out": str(target), "layout": architecture, "dtype": dtype, "chat_format": chat, "why": reason,
                    "opened_with_transformers": check is not None})  # fmt: skip
        return
    note = "transformers opens it" if check is not None else "not opened with transformers, which is not installed"
    spoken = f"chat format {chat}" if chat else f"no chat format, so it cannot be asked or tuned: {reason}"
    say(f"{target}: written in the {architecture} layout, {dtype} ({note}); {spoken}")
