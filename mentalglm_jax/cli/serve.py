"""``mentalglm serve``: an OpenAI-compatible endpoint on this machine."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from mentalglm_jax.cli.options import Adapter, AsJson, Dtype, ModelName, Quantize, RopeTheta, Tokenizer, load_model
from mentalglm_jax.cli.output import print_json, say
from mentalglm_jax.devices.stopping import Terminated


def serve(
    model: ModelName,
    adapter: Adapter = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    name: Annotated[str | None, typer.Option(help="Model id that clients give; default: that of ADAPTER or MODEL, of a "
                                                  "directory its name")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with a key that every request must carry; default: "
                                                           "$MENTALGLM_API_KEY, without it no key")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=256, help="Requests answered at a time")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait for it; one more gets status 429")] = 64,
    context: Annotated[int, typer.Option(min=1, help="Tokens of messages and answer together, at most")] = 8192,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    rope_theta: RopeTheta = None,
    json_: AsJson = False,
) -> None:  # fmt: skip
    """Answers on http://127.0.0.1:PORT/v1 as OpenAI's chat completions do: streaming, log-probabilities, many at a
    time. For this machine only; Ctrl-C ends it."""
    from mentalglm_jax.evaluate.inputs import shown_name
    from mentalglm_jax.serve.server import address, check_cache, listen, make_server, read_key

    key = read_key(api_key_file)
    with listen(port) as at:  # before a model is loaded for minutes
        loaded, encoder = load_model(model, adapter, tokenizer, dtype=dtype, quantize=quantize, rope_theta=rope_theta)
        room = check_cache(loaded, batch_size, context)
        named = name or shown_name(adapter or model)
        server = make_server(loaded, encoder, name=named, rows=batch_size, waiting=queue, context=context, key=key)
        if json_:
            print_json({"url": address(at), "model": named})
        else:
            say(f"{named}: {address(at)} (Ctrl-C ends it); {room}")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt, Terminated):
            server.run(sockets=[at])
