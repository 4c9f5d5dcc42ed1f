"""What a teacher is, and the cache that never lets an answer be paid for twice.

Every answer is kept in a file named by the hash of what was asked, written before it is used: a build that stops is
continued for the price of what was not yet answered, and a build repeated costs nothing and gives the same files.
``endpoint.py`` asks a server, ``LocalTeacher`` a model of this package.
"""

import contextlib
import hashlib
import json
import re
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import AnyHttpUrl, Field, JsonValue, TypeAdapter, model_validator

from mentalglm_jax.data.explain.prompts import Message
from mentalglm_jax.data.explain.replies import readable
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.files import write_json
from mentalglm_jax.foreign import parse_json, read_text
from mentalglm_jax.settings import Settings
from mentalglm_jax.text.thinking import spoken

CONTENT_FILTER = "content_filter"  # ``Answer.finish`` of a request that the server's filter refused
TOO_LONG = "too_long"  # the same, of a prompt for which a model on this machine has no room
_UNUSED = "unused"  # folder of the cache: what was paid for answers of no use
_LARGEST_FILE = 64 << 20  # bytes of a cache file that are read
_OURS = ("model", "messages", "stream", "n")  # of a request's body: what ``extra_body`` may not change
_HTTP = TypeAdapter(AnyHttpUrl)
Positive = Annotated[int, Field(ge=1)]
Setting = Literal["max_tokens", "temperature", "seed"]


# What a recipe of somebody else must not have sent to a place of its choice: HF_TOKEN, AWS_SECRET_ACCESS_KEY.
_NO_TEACHERS = re.compile(r"SECRET|PRIVATE|ACCESS|TOKEN|PASSW|SSH|GPG", re.IGNORECASE)


class TeacherConfig(Settings):
    """Which model, how it is sampled, and what it may cost.

    ``base_url`` is any OpenAI-compatible endpoint (None: the client's default); ``api_key_env`` names the environment
    variable with the key, and an endpoint without keys needs none. ``local`` makes ``model`` a directory that this
    package loads itself. ``timeout``: seconds for a whole try, from its first byte to the answer's last. ``names``: how
    the server calls ``max_tokens``, ``temperature`` and ``seed``, null for one that must not be sent; ``extra_body``
    is sent beside them. ``max_spend`` is in the currency of the two prices (per million tokens). Both caps count what
    the cache holds, so they bind all builds that share it.
    """

    model: Annotated[str, Field(min_length=1)]
    local: bool = False
    adapter: str | None = None
    base_url: str | None = None
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "OPENAI_API_KEY"
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    max_tokens: Annotated[int, Field(ge=1, le=2**24)] = 512
    names: dict[Setting, Annotated[str, Field(min_length=1)] | None] = Field(default_factory=dict)
    extra_body: dict[str, JsonValue] = Field(default_factory=dict)
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    timeout: Annotated[float, Field(gt=0, le=86400)] = 120.0
    retries: Annotated[int, Field(ge=0)] = 6
    backoff: Annotated[float, Field(ge=0)] = 1.0
    max_total_tokens: Positive | None = None
    max_spend: Annotated[float, Field(gt=0)] | None = None
    input_price: Annotated[float, Field(ge=0)] = 0.0
    output_price: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _check(self) -> "TeacherConfig":
        if not self.api_key_env.endswith("KEY") or _NO_TEACHERS.search(self.api_key_env):
            raise ValueError(f"api_key_env: {self.api_key_env} is no name for the key of a teacher, which it would be "
                             "sent to; name one that ends in KEY, such as TEACHER_API_KEY")  # fmt: skip
        check_url(self.base_url, "base_url")
        sent = [self.names.get(one, one) for one in ("max_tokens", "temperature", "seed")]
        sent = [*(name for name in sent if name is not None), *self.extra_body]
        if twice := [name for name in sent if name in _OURS or sent.count(name) > 1]:
            raise ValueError(f"names and extra_body: {twice[0]!r} is sent already; each key once")
        if self.names.get("max_tokens", "") is None and (self.max_total_tokens or self.max_spend):
            raise ValueError("names.max_tokens: null leaves answers without bound, so that no cap can hold; "
                             "name the key, or leave max_total_tokens and max_spend out")  # fmt: skip
        return self


def check_url(url: str | None, name: str) -> None:
    """Raises: ValueError, without the address (it may hold a password), unless it is http or https."""
    try:
        if url is not None and (not url.isprintable() or " " in url or not _HTTP.validate_python(url).host):
            raise ValueError(url)
    except ValueError:  # pydantic's ValidationError is one
        raise ValueError(f"{name}: not an address of an http or https server, e.g. http://localhost:8000/v1") from None


@dataclass(frozen=True)
class Answer:
    """What came back. ``finish`` is the server's reason ("length": cut off; "content_filter": refused by a filter, the
    text is empty or cut; "too_long": not asked, the text is empty); tokens as the server counts them."""

    text: str
    finish: str
    model: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def thought_only(self) -> bool:
        """All tokens went before a word of the answer was written."""
        return self.finish == "length" and not spoken(self.text)


@runtime_checkable
class Teacher(Protocol):
    """Anything that answers chats."""

    stats: Counter[str]

    async def ask(self, messages: Sequence[Message], seed: int) -> Answer:
        """The answer to one chat. Raises: RunError if there is none to be had."""
        ...

    def stop(self, reason: RunError) -> None:
        """Requests under way finish and are kept; from now on ``ask`` raises ``reason`` instead of sending one."""
        ...


class AnswerCache:
    """One JSON file per answer, under the first two characters of its key."""

    def __init__(self, directory: str | Path):
        self._directory = Path(directory)

    def key(self, asked: dict[str, Any]) -> str:
        """Hash of everything that shapes the answer."""
        return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def get(self, key: str) -> Answer | None:
        """The answer kept under ``key``; None if there is none, or its file is damaged (it will be asked again)."""
        entry = self._entry(self._path(key))
        return entry[1] if entry else None

    def put(self, key: str, asked: dict[str, Any], answer: Answer) -> None:
        """Keeps the answer, on disk when this returns."""
        write_json(self._path(key), {"asked": asked, "answer": asdict(answer)}, private=True)

    def put_unused(self, prompt: int, completion: int) -> None:
        """Keeps what was paid for an answer that is of no use."""
        write_json(self._directory / _UNUSED / f"{uuid.uuid4().hex}.json",
                   {"prompt_tokens": prompt, "completion_tokens": completion})  # fmt: skip

    def answers(self) -> Iterator[tuple[dict[str, Any], Answer]]:
        """What was asked and answered, of all that is kept."""
        for path in self._directory.glob("??/*.json"):
            if entry := self._entry(path):
                yield entry

    def tokens(self) -> tuple[int, int]:
        """(prompt, completion) tokens of all that was paid for: answers kept, and those of no use."""
        paid = [(answer.prompt_tokens, answer.completion_tokens) for _, answer in self.answers()]
        for path in self._directory.glob(f"{_UNUSED}/*.json"):
            found = _read(path)
            if found and _counted(found.get("prompt_tokens")) and _counted(found.get("completion_tokens")):
                paid.append((found["prompt_tokens"], found["completion_tokens"]))
        return sum(prompt for prompt, _ in paid), sum(completion for _, completion in paid)

    def _entry(self, path: Path) -> tuple[dict[str, Any], Answer] | None:
        """What a file holds, if it is what was written there: each field of its type, the name the hash of what was
        asked."""
        found = _read(path)
        try:
            asked, answer = (found or {})["asked"], Answer(**(found or {})["answer"])
            texts = (answer.text, answer.finish, answer.model)
            whole = all(isinstance(one, str) for one in texts) and self.key(asked) == path.stem
        except (KeyError, TypeError, ValueError, RecursionError):
            return None
        counts = (answer.prompt_tokens, answer.completion_tokens)
        return (asked, answer) if whole and all(map(_counted, counts)) else None

    def _path(self, key: str) -> Path:
        return self._directory / key[:2] / f"{key}.json"


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, InputError):
        found = parse_json(read_text(path, _LARGEST_FILE), str(path))
        return found if isinstance(found, dict) else None
    return None


def _counted(value: Any) -> bool:
    return type(value) is int and value >= 0


@runtime_checkable
class Chats(Protocol):
    """A model on this machine that answers chats (``mentalglm_jax.serve.local.LocalChats``).

    ``room``: tokens that a prompt may have; ``stops``: ids that end an answer."""

    @property
    def room(self) -> int: ...

    @property
    def stops(self) -> Sequence[int]: ...

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat."""
        ...

    async def complete(self, prompt: Sequence[int], seed: int) -> tuple[str, str, int]:
        """Text of the answer, why it ended, and its tokens."""
        ...


class LocalTeacher:
    """A model on this machine, behind the same cache; asked for several chats at a time. ``fingerprint`` tells its
    weights apart. What its tokenizer makes of a chat is part of what was asked."""

    def __init__(self, config: TeacherConfig, cache: AnswerCache, fingerprint: str, chats: Chats):
        self._config, self._cache, self._chats = config, cache, chats
        self._fingerprint = fingerprint
        self._stopped: RunError | None = None
        self.stats: Counter[str] = Counter()

    def stop(self, reason: RunError) -> None:
        """As ``Teacher.stop``."""
        self._stopped = self._stopped or reason

    async def ask(self, messages: Sequence[Message], seed: int) -> Answer:
        """As ``Teacher.ask``."""
        config, prompt = self._config, self._chats.prompt(messages)
        if len(prompt) > self._chats.room:
            self.stats["too_long"] += 1
            return Answer("", TOO_LONG, config.model, len(prompt), 0)
        asked = {"local": self._fingerprint, "messages": list(messages), "seed": seed, "prompt_ids": prompt,
                 "eos_ids": [*self._chats.stops], "temperature": config.temperature,
                 "max_tokens": config.max_tokens}  # fmt: skip
        key = self._cache.key(asked)
        if (known := self._cache.get(key)) is not None:
            self.stats["cached"] += 1
            return known
        if self._stopped is not None:
            raise self._stopped
        text, finish, completion = await self._chats.complete(prompt, seed)
        answer = Answer(readable(text), finish, config.model, len(prompt), completion)
        self._cache.put(key, asked, answer)
        self.stats["asked"] += 1
        return answer
