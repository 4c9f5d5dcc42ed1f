"""A checkpoint's own ``chat_template``: what it renders, in a process with little memory and time, and which row it is.

A template is a program that a stranger wrote. It runs in Jinja's ImmutableSandboxedEnvironment, which keeps it from
everything but texts and numbers, and in a process of its own, because the sandbox lets it count to ten to the ninth or
double a text forty times. What comes back are texts, which are compared and never executed.
"""

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.foreign import first_line, parse_json, short
from mentalglm_jax.interpreter import environment, module_command
from mentalglm_jax.text.chat_formats import FORMATS, GLM, PROBES, ChatFormat, fitted

SECONDS = 3  # of processor time, for all of PROBES; they take milliseconds
MAX_MEMORY = 512 << 20
MAX_RENDERED = 1 << 20  # characters of one conversation
_WAIT = 120  # seconds for the process as a whole, on a machine that is busy


class ChatFormatWarning(UserWarning):
    """The chat template, or the stop tokens, that a checkpoint states are not those of the format that is used."""


def recognise(template: str | None, tokens: Mapping[str, str], knows: Callable[[str], bool], where: str) -> tuple[
    ChatFormat, str | None
]:  # fmt: skip
    """The row of ``FORMATS`` that a checkpoint's tokenizer speaks, and what is odd about it.

    Args:
        template: its chat template, if it has one.
        tokens: its bos_token, eos_token and the like, which a template may write.
        knows: whether a special token is in its vocabulary.

    Returns:
        the row; and a sentence for the user where GLM-4's tokens are there but the template writes something else.
        (Published copies of GLM-4 carry templates of other models; the role tokens decide.)

    Raises:
        InputError: no row's tokens are in the vocabulary, there is no template, or it writes something else.
        RunError: no process could be started.
    """
    rows = [row for row in FORMATS if all(map(knows, row.tokens))]
    if GLM in rows and template is None:
        return GLM, None
    if not rows:
        missing = next(token for token in GLM.tokens if not knows(token))
        others = ", ".join(f"{row.name} ({' '.join(row.tokens)})" for row in FORMATS if row is not GLM)
        raise InputError(
            f"{where}: special token {missing} is not in the vocabulary, nor are those of {others}; is this a GLM-4 "
            "tokenizer? Other chat formats are not supported"
        )
    if template is None:
        raise InputError(
            f"{where}: no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), so how a "
            "turn is written is not known; take the files of an instruction-tuned release, or put its template there"
        )
    try:
        rendered = _rendered(template, tuple(sorted(tokens.items())))
    except InputError as error:
        if GLM in rows:
            return GLM, f"{where}: {error}; GLM-4's own format is used"
        raise InputError(f"{where}: {error}; take the one of the original release") from None
    for row in rows:
        if (found := fitted(row, rendered, tokens.get("bos_token"))) is not None:
            return found, None
    names = " or ".join(row.name for row in rows)
    shown = short(rendered[0])
    unlike = f"its chat template writes a conversation otherwise than the format {names}"
    if GLM in rows:
        return GLM, f"{where}: {unlike}, which is used; it begins {shown}"
    raise InputError(
        f"{where}: {unlike}, whose tokens it has, and no other is known; it begins {shown}. Prompts would not be what "
        "the model was trained on; take the template of the original release"
    )


@functools.lru_cache(maxsize=32)
def _rendered(template: str, tokens: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """What the template makes of each of ``PROBES``. Raises: InputError (without the file's name), RunError."""
    task = {"template": template, "tokens": dict(tokens), "conversations": PROBES}
    try:
        child = subprocess.run(
            module_command("mentalglm_jax.text.chat_template"), input=json.dumps(task).encode(), capture_output=True,
            timeout=_WAIT, env=environment(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise InputError(f"its chat template was not rendered within {_WAIT} seconds") from None
    except OSError as error:
        raise RunError(f"no process can be started to render a chat template ({error.strerror or error})") from error
    if child.returncode < 0:
        raise InputError(f"its chat template took more than {SECONDS} seconds or {MAX_MEMORY >> 20} MiB to render")
    if child.returncode != 0:
        reason = child.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
        raise InputError(f"its chat template cannot be rendered ({short(reason[0])})")
    found = parse_json(child.stdout, "its chat template: rendered as")
    return tuple(map(str, found))


def _render(task: Mapping[str, Any]) -> list[str]:
    """The work of the process: every conversation of ``task``, as transformers renders it."""
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
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = tojson
    # No strftime_now: a template that asks for the date then writes its own, and a prompt is the same tomorrow.
    names: Any = sandbox.globals
    names["raise_exception"] = raise_exception
    compiled, texts = sandbox.from_string(task["template"]), []
    for messages, answer in task["conversations"]:
        try:
            text = compiled.render(messages=messages, add_generation_prompt=answer, tools=None, documents=None,
                                   **task["tokens"])  # fmt: skip
        except jinja2.TemplateError as error:  # a role it does not take, or what it may not do
            text = f"an error: {first_line(error)}"
        if len(text) > MAX_RENDERED:
            raise ValueError(f"{len(text)} characters of a short conversation")
        texts.append(text)
    return texts


def _main() -> None:
    import resource

    task = json.load(sys.stdin)
    import jinja2.sandbox  # noqa: F401 - before memory is bounded

    seconds = int(time.process_time()) + SECONDS  # what was imported is not the template's doing
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        texts = _render(task)
    except MemoryError:
        sys.exit(f"more than {MAX_MEMORY >> 20} MiB")
    except Exception as error:  # whatever a stranger's program can provoke
        sys.exit(first_line(error))
    json.dump(texts, sys.stdout)


if __name__ == "__main__":
    _main()
