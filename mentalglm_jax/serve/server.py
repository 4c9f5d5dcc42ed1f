"""Starting the endpoint: a port of this machine, the key, the web server."""

import os
import socket
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from mentalglm_jax.devices.hardware import GIB, free_memory
from mentalglm_jax.errors import InputError, RunError, install
from mentalglm_jax.foreign import read_text
from mentalglm_jax.inference.continuous import ContinuousBatch, cache_bytes
from mentalglm_jax.inference.decode import apart_bytes
from mentalglm_jax.model.glm import Glm
from mentalglm_jax.serve.app import make_app
from mentalglm_jax.serve.connections import bounded, most_connections
from mentalglm_jax.serve.engine import Engine
from mentalglm_jax.text.tokenizer import GlmTokenizer

ADDRESS = "127.0.0.1"
KEY_VARIABLE = "MENTALGLM_API_KEY"
_GRACE = 5  # seconds for answers under way when the server is stopped


def read_key(file: Path | None) -> str | None:
    """The key of ``--api-key-file``, or else of the environment variable ``KEY_VARIABLE``; None: no key is asked for.

    Raises: InputError: the file cannot be read, or holds no key of printable ASCII in one line.
    """
    where = KEY_VARIABLE
    if file is None:
        if (key := os.environ.get(KEY_VARIABLE)) is None:
            return None
    else:
        where = str(file)
        try:
            key = read_text(file, 4096)
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror or error})") from None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"{where}: holds no key; a key is one line of printable ASCII without spaces")
    return key


def listen(port: int) -> socket.socket:
    """A socket on this machine's own address; port 0 takes a free one. Raises: RunError: the port is taken."""
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((ADDRESS, port))
        found.listen(128)
    except OSError as error:
        found.close()
        raise RunError(f"port {port} cannot be used ({error.strerror}); choose another with --port, 0 takes a free "
                       "one") from None  # fmt: skip
    return found


def check_cache(model: Glm, rows: int, context: int) -> str:
    """A line on how much memory the cache of ``make_server`` may take. The model is loaded already.

    Raises: InputError: it cannot fit, so that some requests would fail once others are under way.
    """
    context = max(2, min(context, model.config.max_position_embeddings))
    free = free_memory(jax.devices()[0])
    if free is not None:
        free -= apart_bytes(nnx.split(model)[1])

    def needed(rows: int, context: int) -> int:
        return 2 * cache_bytes(model, rows, context)

    said = (f"the cache of {rows} request{'s' if rows > 1 else ''} of {context} tokens takes up to "
            f"{needed(rows, context) / GIB:.2f} GiB while it grows")  # fmt: skip
    if free is None:
        return said
    if needed(rows, context) <= free:
        return f"{said}; {free / GIB:.1f} GiB are free"
    fewer = next((one for one in range(rows - 1, 0, -1) if needed(one, context) <= free), None)
    shorter = next((one for one in (context >> by for by in range(1, 32)) if one > 255 and needed(rows, one) <= free),
                   None)  # fmt: skip
    fits = [f"--batch-size {fewer}"] * bool(fewer) + [f"--context {shorter}"] * bool(shorter)
    raise InputError(f"{said}, and {free / GIB:.2f} GiB are free; "
                     f"{' or '.join(fits) + ' fits' if fits else 'free some, or take a smaller model'}")  # fmt: skip


def make_server(
    model: Glm, tokenizer: GlmTokenizer, *, name: str, rows: int, waiting: int, context: int, key: str | None
) -> Any:
    """A ``uvicorn.Server``; ``run(sockets=[listen(port)])`` serves until it is interrupted.

    Args:
        name: model id that clients give.
        rows: requests answered at a time.
        waiting: requests that may wait for one of them.
        context: tokens of messages and answer together, at most; no more than the model's.
        key: see ``make_app``.

    Raises:
        InputError: the [serve] extra is not installed.
    """
    try:
        import uvicorn
    except ImportError:
        raise InputError(f"`mentalglm serve` needs the serve extra: {install('serve')}") from None
    batch = ContinuousBatch(model, rows=rows, vocab_limit=tokenizer.vocab_size)
    context = min(context, model.config.max_position_embeddings)
    app = make_app(Engine(batch, tokenizer, most_waiting=waiting), tokenizer, name=name, context=context, key=key)
    # h11 bounds what it holds of a request's head; httptools, which uvicorn would take where it is installed, does not.
    protocol = bounded(most_connections(rows + waiting))
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="on",
                                         http=protocol, ws="none", timeout_graceful_shutdown=_GRACE))  # fmt: skip


def address(at: socket.socket) -> str:
    """The base URL that clients give."""
    return f"http://{ADDRESS}:{at.getsockname()[1]}/v1"
