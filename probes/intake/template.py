"""Rendering a template that somebody else wrote, in a process with little memory and time.

A chat template is a program. It runs in Jinja's ImmutableSandboxedEnvironment, which keeps it from everything but texts
and numbers, and in a process of its own, because the sandbox lets it count to ten to the ninth or double a text forty
times. What comes back are texts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from probes.errors import ProbeError, ProbeInputError
from probes.foreign import first_line, inside, parse_json, plain, read_bytes
from probes.interpreter import environment

MAX_MEMORY = 1 << 30
MAX_RENDERED = 1 << 22  # characters of one text
# Bytes of all texts as JSON: what comes back must not fill the memory that the process itself was not allowed to.
_FLOOR, _GROWTH = 32 << 20, 8  # of any call, and for one byte of template and contexts
MAX_TEMPLATE = 1 << 20  # bytes
_SECONDS = 5  # of processor time, and one more for every
_PER_SECOND = 500  # texts, which take milliseconds each


def chat_template(directory: str | Path) -> str | None:
    """The chat template of a model directory: ``chat_template.jinja``, or the (default) one of tokenizer_config.json.

    Raises:
        ProbeInputError: a file of them is no plain file, too large or damaged; or there are two.
    """
    directory = Path(directory)
    if (other := directory / "additional_chat_templates" / "default.jinja").exists():
        raise ProbeInputError(f"{other}: is a second default template, which transformers takes; delete one of them")
    if (directory / "chat_template.jinja").exists():
        return read_template(inside(directory, "chat_template.jinja"))
    if not (directory / "tokenizer_config.json").exists():
        return None
    path = inside(directory, "tokenizer_config.json")
    config = parse_json(read_bytes(path), path)
    found = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(found, list):  # several by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    if isinstance(found, dict):
        found = found.get("default")
    if found is not None and not isinstance(found, str):
        raise ProbeInputError(f"{path}: chat_template is a {type(found).__name__}, not a text")
    return found


def read_template(path: str | Path) -> str:
    """The text of a template file.

    Raises:
        ProbeInputError: it cannot be read, or is no UTF-8.
    """
    if "{{" in str(path) and not Path(path).exists():
        raise ProbeInputError(f"{plain(path, 80)}: a file is wanted that holds this text; write it into one")
    try:
        return read_bytes(path, MAX_TEMPLATE).decode()
    except UnicodeDecodeError as error:
        raise ProbeInputError(f"{path}: is no UTF-8 text ({error.reason} at byte {error.start})") from error


def render(
    template: str, contexts: Sequence[Mapping[str, Any]], where: object, strict: bool = False
) -> list[str | ProbeInputError]:
    """What a template makes of each context.

    Args:
        strict: a name that the context does not have is an error; chat templates count on its being nothing.

    Returns:
        for each context its text, or why there is none (a role or a missing name that the template refuses).
    Raises:
        ProbeInputError: it is no template, took more time or memory than it may, or makes far more of the contexts than
            they hold.
        ProbeError: no process can be started.
    """
    seconds = _SECONDS + len(contexts) // _PER_SECOND
    task = {"template": template, "contexts": [dict(one) for one in contexts], "seconds": seconds, "strict": strict}
    command = [sys.executable, "-P", "-m", "probes.intake.template"]
    try:
        child = subprocess.run(
            command, input=json.dumps(task).encode(), capture_output=True, timeout=60 + 20 * seconds, env=environment()
        )
    except subprocess.TimeoutExpired as error:
        raise ProbeInputError(f"{where}: was not rendered within {error.timeout:.0f} seconds") from None
    except OSError as error:
        raise ProbeError(f"no process can be started to render {where} ({error.strerror or error})") from error
    if child.returncode < 0:
        limit = f"{seconds} seconds or {MAX_MEMORY >> 20} MiB"
        raise ProbeInputError(f"{where}: took more than {limit} to render {len(contexts)} texts")
    if child.returncode != 0:
        said = child.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
        raise ProbeInputError(f"{where}: cannot be rendered ({plain(said[0])})")
    found = parse_json(child.stdout, f"{where}, rendered")
    return [one["text"] if "text" in one else ProbeInputError(f"{where}: {plain(one['error'])}") for one in found]


def _render(task: Mapping[str, Any]) -> list[dict[str, str]]:
    """The work of the process, as transformers renders chat templates."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``, with which newer templates mark what is trained."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
        undefined=jinja2.StrictUndefined if task["strict"] else jinja2.Undefined,
    )
    sandbox.filters["tojson"] = tojson
    # No strftime_now: a template that asks for the date then writes its own, and a prompt is the same tomorrow.
    names: Any = sandbox.globals
    names["raise_exception"] = raise_exception
    compiled, found = sandbox.from_string(task["template"]), []
    most = left = _FLOOR + _GROWTH * len(json.dumps(task))
    for context in task["contexts"]:
        try:
            text = compiled.render(context)  # a name of its own: a column may be called "self"
        except jinja2.TemplateError as error:  # a role it does not take, or what it may not do
            found.append({"error": first_line(error)})
            continue
        if len(text) > MAX_RENDERED:
            raise ValueError(f"{len(text)} characters for one row")
        left -= len(json.dumps(text))
        if left < 0:
            raise ValueError(f"{len(found) + 1} of {len(task['contexts'])} texts take more than {most >> 20} MiB")
        found.append({"text": text})
    return found


def _main() -> None:
    import resource

    task = json.load(sys.stdin)
    import jinja2.sandbox  # noqa: F401 - before memory is bounded

    seconds = int(time.process_time()) + task["seconds"]  # what was imported is not the template's doing
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        found = _render(task)
    except MemoryError:
        sys.exit(f"more than {MAX_MEMORY >> 20} MiB")
    except Exception as error:  # whatever a stranger's program can provoke
        sys.exit(first_line(error))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    _main()
