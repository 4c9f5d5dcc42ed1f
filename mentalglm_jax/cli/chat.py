"""``mentalglm chat``: a conversation in the terminal."""

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mentalglm_jax.cli.options import (
    Adapter,
    Dtype,
    MaxNewTokens,
    ModelName,
    Quantize,
    RopeTheta,
    TaskFile,
    Temperature,
    Tokenizer,
    load_model,
    make_known,
    make_known_of,
)
from mentalglm_jax.cli.output import SAFETY, complain, inert, say
from mentalglm_jax.data.surrogates import half_pair
from mentalglm_jax.errors import InputError

if TYPE_CHECKING:
    from mentalglm_jax.data.records import Post

QUOTES = '"""'
COMMANDS = {
    "/system TEXT": "begin anew with this system turn; without TEXT, with none",
    "/reset": "begin anew",
    "/quit": "leave, as Ctrl-D does",
    QUOTES: "before and after a post of several lines, or one that begins with /",
}


def chat(
    model: ModelName,
    adapter: Adapter = None,
    task: Annotated[str | None, typer.Option(help="What is typed is a post, asked what this task asks")] = None,
    tasks: TaskFile = None,
    language: Annotated[str | None, typer.Option(help="With --task: of the posts; default: told of each")] = None,
    system: Annotated[str | None, typer.Option(help="System turn before the conversation")] = None,
    tokenizer: Tokenizer = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the draws")] = 0,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    rope_theta: RopeTheta = None,
) -> None:
    """A conversation in the terminal, answered word by word. /help lists what else can be typed; Ctrl-C stops an
    answer, Ctrl-D leaves."""
    ask = None
    if task is not None:
        from mentalglm_jax.data.posts import typed_post
        from mentalglm_jax.text.tasks import get_task

        make_known(tasks)
        make_known_of(model, adapter)
        ask = partial(typed_post, task=get_task(task).name, language=language)
    elif given := [name for name, value in (("--tasks", tasks), ("--language", language)) if value is not None]:
        raise InputError(f"{given[0]} goes with --task")
    loaded, encoder = load_model(model, adapter, tokenizer, dtype=dtype, quantize=quantize, rope_theta=rope_theta)
    session = _Session(loaded, encoder, system, ask, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    shown = sys.stdin.isatty()
    if shown:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - lines can be edited and recalled
        say(f"{SAFETY}\n/help lists the commands", style="dim")
    while True:
        try:
            typed = _read("> " if shown else "")
            if typed is None or typed == ("/quit", False):
                return
            session.take(*typed)
        except InputError as error:
            complain(str(error))
        except KeyboardInterrupt:  # at the prompt or just before it: the session is not lost
            say("\nCtrl-D or /quit leaves", style="dim")


def _read(prompt: str) -> tuple[str, bool] | None:
    """A line without the spaces around it, or several between two lines of three quotes as they are, and which of the
    two it was; None at the end of the input."""
    try:
        line = input(prompt).strip()
        if line != QUOTES:
            return line, False
        lines: list[str] = []
        while (line := input("… " if prompt else "")).strip() != QUOTES:
            lines.append(line)
        return "\n".join(lines), True
    except EOFError:
        sys.stdout.write("\n")
        return None


class _Session:
    """A conversation; with ``ask`` each text is a post and a conversation of its own."""

    def __init__(self, model: Any, tokenizer: Any, system: str | None, ask: "Callable[[str], Post] | None",
                 **options: Any):  # fmt: skip
        self._model, self._tokenizer, self._ask, self._options = model, tokenizer, ask, options
        self._head = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []

    def take(self, text: str, quoted: bool) -> None:
        """What was typed. Raises: InputError: it cannot be done; the conversation is as before."""
        word, _, rest = text.strip().partition(" ")
        if half_pair(text) is not None:
            raise InputError("this is not UTF-8; it is left out")
        if not text.strip():
            return
        if quoted or not word.startswith("/"):
            self._answer(text)
        elif word == "/help":
            say("\n".join(f"{name:<14}{what}" for name, what in COMMANDS.items()))
        elif word in ("/reset", "/system"):
            self._turns = []
            if word == "/system":
                self._head = [{"role": "system", "content": rest}] if rest else []
            say("a new conversation")
        else:
            raise InputError(f"{word}: no such command; /help lists them")

    def _answer(self, text: str) -> None:
        from mentalglm_jax.inference.decode import generate_ids
        from mentalglm_jax.inference.spoken import Spoken

        head = self._head
        if self._ask is not None:
            post = self._ask(text)
            text = post.prompt
            head = head or ([{"role": "system", "content": post.system}] if post.system else [])
        turns = [*self._turns, {"role": "user", "content": text}]
        spoken, said = Spoken(self._tokenizer), list[str]()

        def tell(piece: str) -> None:
            said.append(piece)
            sys.stdout.write("\n".join(map(inert, piece.split("\n"))))
            sys.stdout.flush()

        try:
            generate_ids(
                self._model, [self._tokenizer.ask_ids([*head, *turns])], eos_ids=self._tokenizer.eos_ids,
                vocab_limit=self._tokenizer.vocab_size, stream=lambda _, token: tell(spoken.add(token).text),
                **self._options,
            )  # fmt: skip
            tell(spoken.end().text)
        except KeyboardInterrupt:
            sys.stdout.write(" …")
        except InputError as error:
            raise InputError(f"{error}; /reset begins anew") from None
        sys.stdout.write("\n")
        if self._ask is None and (answer := "".join(said)):
            self._turns = [*turns, {"role": "assistant", "content": answer}]
