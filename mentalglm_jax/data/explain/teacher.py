"""Asking a teacher model for text and never paying twice.

Every answer is kept in a file named by the hash of what was asked, written before it is used: a build that stops is
continued for the price of what was not yet answered, and a build repeated costs nothing and gives the same files.
Needs the [data] extra (the official ``openai`` client) unless the teacher is a local model.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from mentalglm_jax.data.explain.prompts import Message
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.files import write_json
from mentalglm_jax.foreign import parse_json, read_text

_LONGEST_WAIT = 120.0  # seconds, also when the server asks for more
CONTENT_FILTER = "content_filter"  # ``Answer.finish`` of a request that the server's filter refused
# How servers name it: OpenAI and Azure, older OpenAI, DashScope, Zhipu; DeepSeek gives a message and no code.
_FILTER_CODES = (CONTENT_FILTER, "content_policy_violation", "data_inspection_failed", "1301")
_FILTER_MESSAGE = "content exists risk"
_FILTER_FINISHES = (CONTENT_FILTER, "sensitive")
_LONGEST_REASON = 200  # characters of a server's message
_UNUSED = "unused"  # folder of the cache: what was paid for answers of no use
Positive = Annotated[int, Field(ge=1)]


class TeacherConfig(BaseModel):
    """Which model, how it is sampled, and what it may cost.

    ``base_url`` is any OpenAI-compatible endpoint (None: the client's default); ``api_key_env`` names the environment
    variable with the key, and an endpoint without keys needs none. ``local`` makes ``model`` a directory that this
    package loads itself. ``max_spend`` is in the currency of the two prices (per million tokens). Both caps count what
    the cache holds, so they bind all builds that share it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    model: str
    local: bool = False
    adapter: str | None = None
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    max_tokens: Positive = 512
    concurrency: Positive = 8
    timeout: Annotated[float, Field(gt=0)] = 120.0
    retries: Annotated[int, Field(ge=0)] = 6
    backoff: Annotated[float, Field(ge=0)] = 1.0
    max_total_tokens: Positive | None = None
    max_spend: Annotated[float, Field(gt=0)] | None = None
    input_price: Annotated[float, Field(ge=0)] = 0.0
    output_price: Annotated[float, Field(ge=0)] = 0.0


@dataclass(frozen=True)
class Answer:
    """What came back. ``finish`` is the server's reason ("length": cut off; "content_filter": refused by a filter, the
    text is empty or cut); tokens as the server counts them."""

    text: str
    finish: str
    model: str
    prompt_tokens: int
    completion_tokens: int


@runtime_checkable
class Teacher(Protocol):
    """Anything that answers chats."""

    stats: Counter[str]

    async def ask(self, messages: Sequence[Message], seed: int) -> Answer:
        """The answer to one chat. Raises: RunError if there is none to be had."""
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
        try:
            return Answer(**parse_json(read_text(self._path(key)), key)["answer"])
        except (OSError, InputError, KeyError, TypeError):
            return None

    def put(self, key: str, asked: dict[str, Any], answer: Answer) -> None:
        """Keeps the answer, on disk when this returns."""
        write_json(self._path(key), {"asked": asked, "answer": asdict(answer)})

    def put_unused(self, prompt: int, completion: int) -> None:
        """Keeps what was paid for an answer that is of no use."""
        write_json(self._directory / _UNUSED / f"{uuid.uuid4().hex}.json",
                   {"prompt_tokens": prompt, "completion_tokens": completion})  # fmt: skip

    def tokens(self) -> tuple[int, int]:
        """(prompt, completion) tokens of all that was paid for: answers kept, and those of no use."""
        paid = [(a.prompt_tokens, a.completion_tokens)
                for path in self._directory.glob("??/*.json") if (a := self.get(path.stem))]  # fmt: skip
        for path in self._directory.glob(f"{_UNUSED}/*.json"):
            with contextlib.suppress(OSError, InputError, ValueError, KeyError, TypeError):
                found = parse_json(read_text(path), str(path))
                paid.append((int(found["prompt_tokens"]), int(found["completion_tokens"])))
        return sum(prompt for prompt, _ in paid), sum(completion for _, completion in paid)

    def _path(self, key: str) -> Path:
        return self._directory / key[:2] / f"{key}.json"


class BudgetSpent(RunError):
    """The next request could exceed the cap."""


class Budget:
    """Caps on tokens and money. Each try of a request reserves the most it can cost before it is sent, and what comes
    back is spent whether it is of use or not, so a cap is never passed."""

    def __init__(self, config: TeacherConfig, spent: tuple[int, int]):
        self._config = config
        self.prompt, self.completion = spent
        self._reserved: list[tuple[int, int]] = []
        self._changed = asyncio.Condition()

    def cost(self, prompt: int, completion: int) -> float:
        """In the currency of the prices."""
        return (prompt * self._config.input_price + completion * self._config.output_price) / 1e6

    @contextlib.asynccontextmanager
    async def request(self, prompt: int, completion: int) -> AsyncIterator[None]:
        """Holds a reservation; waits while those of other requests stand in the way.

        Raises: BudgetSpent if nothing is under way and it still does not fit.
        """
        most = (prompt, completion)
        async with self._changed:
            while not self._fits(most):
                if not self._reserved:
                    raise BudgetSpent(
                        f"the budget is spent: {self.prompt + self.completion} tokens "
                        f"({self.cost(self.prompt, self.completion):.2f}) used, and the next request could take "
                        f"{sum(most)}; what was answered is kept, raise teacher.max_total_tokens or max_spend to go on"
                    )
                await self._changed.wait()
            self._reserved.append(most)
        try:
            yield
        finally:
            async with self._changed:
                self._reserved.remove(most)
                self._changed.notify_all()

    def _fits(self, most: tuple[int, int]) -> bool:
        prompt = self.prompt + sum(p for p, _ in self._reserved) + most[0]
        completion = self.completion + sum(c for _, c in self._reserved) + most[1]
        tokens, money = self._config.max_total_tokens, self._config.max_spend
        return (tokens is None or prompt + completion <= tokens) and (
            money is None or self.cost(prompt, completion) <= money
        )

    def spend(self, prompt: int, completion: int) -> None:
        """Counts what was paid."""
        self.prompt += prompt
        self.completion += completion


class _Malformed(Exception):
    """The server said 200 and something that is not an answer."""


class OpenAITeacher:
    """Any OpenAI-compatible endpoint: bounded concurrency, retries with exponential back-off, budget, cache.

    The first failure stops it: requests under way finish and are kept, none is sent any more.

    Raises: InputError if the [data] extra or the key is missing.
    """

    def __init__(self, config: TeacherConfig, cache: AnswerCache):
        try:
            import openai
        except ImportError:
            raise InputError("a teacher endpoint needs the data extra: pip install 'mentalglm-jax[data]'") from None
        key = os.environ.get(config.api_key_env) or ("none" if config.base_url else "")
        if not key:
            raise InputError(f"teacher: set {config.api_key_env}, or give teacher.base_url of an endpoint without keys")
        self._openai: Any = openai
        self._config, self._cache = config, cache
        self._client = openai.AsyncOpenAI(base_url=config.base_url, api_key=key, timeout=config.timeout, max_retries=0)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._failure: RunError | None = None
        self._failed = asyncio.Event()
        self.budget = Budget(config, cache.tokens())
        self.stats: Counter[str] = Counter()

    async def __aenter__(self) -> "OpenAITeacher":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(self, messages: Sequence[Message], seed: int) -> Answer:
        """As ``Teacher.ask``. Raises also BudgetSpent."""
        config = self._config
        asked = {"base_url": config.base_url, "model": config.model, "messages": list(messages), "seed": seed,
                 "temperature": config.temperature, "max_tokens": config.max_tokens}  # fmt: skip
        key = self._cache.key(asked)
        if (known := self._cache.get(key)) is not None:
            self.stats["cached"] += 1
            return known
        async with self._slots:
            try:
                answer = await self._patiently(asked)
                self._cache.put(key, asked, answer)
            except RunError as error:
                self._failure = self._failure or error
                self._failed.set()
                raise
        self.stats["asked"] += 1
        if answer.finish == CONTENT_FILTER:
            self.stats["filtered"] += 1
        return answer

    async def _patiently(self, asked: dict[str, Any]) -> Answer:
        openai, reason, wait = self._openai, "", 0.0
        # A byte-level tokenizer makes at most one token of a byte; the chat format adds a few per message.
        most = (sum(len(message["content"].encode()) + 16 for message in asked["messages"]), asked["max_tokens"])
        for attempt in range(self._config.retries + 1):
            if attempt:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._failed.wait(), min(wait, _LONGEST_WAIT))
            wait = self._config.backoff * 2**attempt * random.uniform(0.5, 1.5)
            try:
                async with self.budget.request(*most):
                    if self._failure is not None:
                        raise self._failure
                    return await self._once(asked, most)
            except openai.RateLimitError as error:
                if error.code == "insufficient_quota":
                    raise RunError(f"teacher: no quota left at {self._where}; what was answered is kept") from None
                reason = "rate limit (429)"
                wait = max(wait, _retry_after(error))
            except (openai.InternalServerError, openai.ConflictError) as error:
                reason = f"server error ({error.status_code})"
                wait = max(wait, _retry_after(error))
            except openai.APITimeoutError:
                reason = f"timeout ({self._config.timeout:g} s)"
            except openai.APIConnectionError:
                reason = "no connection"
            except openai.APIStatusError as error:
                if _is_filter(error):
                    return Answer("", CONTENT_FILTER, asked["model"], 0, 0)
                raise RunError(
                    f"teacher: {self._where} refused the request ({error.status_code}{self._said(error, asked)}); "
                    "check model, key and base_url"
                ) from None
            except _Malformed:
                reason = "malformed answer"
            self.stats[reason.split(" (")[0]] += 1
        raise RunError(
            f"teacher: {self._where} gave no answer in {self._config.retries + 1} tries, last: {reason}; "
            "what was answered is kept, the same command continues"
        )

    async def _once(self, asked: dict[str, Any], most: tuple[int, int]) -> Answer:
        """One try. Spends what the server counted, of what it did not count all that was reserved."""
        found: Any = None
        with contextlib.suppress(ValueError, self._openai.APIResponseValidationError):  # 200 and no JSON
            found = await self._client.chat.completions.create(
                **{name: value for name, value in asked.items() if name != "base_url"}
            )
        usage = getattr(found, "usage", None)
        counted = (getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None))
        prompt, completion = (
            count if isinstance(count, int) else reserved for count, reserved in zip(counted, most, strict=True)
        )
        self.budget.spend(prompt, completion)
        try:
            choice = found.choices[0]
            text, finish = choice.message.content, choice.finish_reason
            refused = finish in _FILTER_FINISHES or getattr(choice.message, "refusal", None)
        except (AttributeError, IndexError, TypeError):
            text, finish, refused = None, None, None
        if refused:
            text, finish = text or "", CONTENT_FILTER
        elif not isinstance(text, str) or not text.strip():
            self._cache.put_unused(prompt, completion)
            raise _Malformed
        return Answer(text, finish or "", str(found.model or asked["model"]), prompt, completion)

    @property
    def _where(self) -> str:
        return self._config.base_url or "the endpoint"

    def _said(self, error: Any, asked: dict[str, Any]) -> str:
        """The server's own reason in one line, after a colon; nothing if it gave none, or repeats what it was sent (a
        post) or the key."""
        text = " ".join(_message(error).split())
        size = 24 if text.isascii() else 8
        sent = " ".join(" ".join(message["content"].split()) for message in asked["messages"])
        repeats = any(text[at : at + size] in sent for at in range(len(text) - size + 1))
        if not text or repeats or self._client.api_key in text:
            return ""
        return f": {text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + '…'}"


def _message(error: Any) -> str:
    """What the server says about an error, in either of the places where servers say it."""
    body = error.body if isinstance(error.body, dict) else {}
    return next((said for name in ("message", "detail") if isinstance(said := body.get(name), str)), "")


def _is_filter(error: Any) -> bool:
    """Whether a refusal is about what this one request says."""
    if error.status_code != 400:
        return False
    return error.code in _FILTER_CODES or error.type in _FILTER_CODES or _FILTER_MESSAGE in _message(error).lower()


def _retry_after(error: Any) -> float:
    try:
        return float(error.response.headers.get("retry-after", 0))
    except ValueError:
        return 0.0


class LocalTeacher:
    """A model on this machine, behind the same cache. ``complete`` answers one chat: (text, finish, prompt tokens,
    completion tokens); ``fingerprint`` tells its weights apart."""

    def __init__(
        self,
        config: TeacherConfig,
        cache: AnswerCache,
        fingerprint: str,
        complete: Callable[[Sequence[Message], int], tuple[str, str, int, int]],
    ):
        self._config, self._cache, self._complete = config, cache, complete
        self._fingerprint = fingerprint
        self.stats: Counter[str] = Counter()

    async def ask(self, messages: Sequence[Message], seed: int) -> Answer:
        """As ``Teacher.ask``."""
        config = self._config
        asked = {"local": self._fingerprint, "messages": list(messages), "seed": seed,
                 "temperature": config.temperature, "max_tokens": config.max_tokens}  # fmt: skip
        key = self._cache.key(asked)
        if (known := self._cache.get(key)) is not None:
            self.stats["cached"] += 1
            return known
        text, finish, prompt, completion = self._complete(messages, seed)
        answer = Answer(text, finish, config.model, prompt, completion)
        self._cache.put(key, asked, answer)
        self.stats["asked"] += 1
        return answer
