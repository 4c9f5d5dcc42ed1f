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
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from mentalglm_jax.data.prompts import Message
from mentalglm_jax.errors import InputError, RunError
from mentalglm_jax.files import write_json

_LONGEST_WAIT = 120.0  # seconds, also when the server asks for more
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
    """What came back. ``finish`` is the server's reason ("length": cut off); tokens as the server counts them."""

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
            return Answer(**json.loads(self._path(key).read_text(encoding="utf-8"))["answer"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, asked: dict[str, Any], answer: Answer) -> None:
        """Keeps the answer, on disk when this returns."""
        write_json(self._path(key), {"asked": asked, "answer": asdict(answer)})

    def tokens(self) -> tuple[int, int]:
        """(prompt, completion) tokens of all answers kept."""
        found = [answer for path in self._directory.glob("??/*.json") if (answer := self.get(path.stem))]
        return sum(a.prompt_tokens for a in found), sum(a.completion_tokens for a in found)

    def _path(self, key: str) -> Path:
        return self._directory / key[:2] / f"{key}.json"


class BudgetSpent(RunError):
    """The next request could exceed the cap."""


class Budget:
    """Caps on tokens and money. A request reserves the most it can cost before it is sent, so a cap is never passed."""

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

    def spend(self, answer: Answer) -> None:
        """Counts a paid answer."""
        self.prompt += answer.prompt_tokens
        self.completion += answer.completion_tokens


class _Malformed(Exception):
    """The server said 200 and something that is not an answer."""


class OpenAITeacher:
    """Any OpenAI-compatible endpoint: bounded concurrency, retries with exponential back-off, budget, cache.

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
        # A byte-level tokenizer makes at most one token of a byte; the chat format adds a few per message.
        most = sum(len(message["content"].encode()) + 16 for message in messages)
        async with self._slots, self.budget.request(most, config.max_tokens):
            answer = await self._patiently(asked)
            self._cache.put(key, asked, answer)
            self.budget.spend(answer)
        self.stats["asked"] += 1
        return answer

    async def _patiently(self, asked: dict[str, Any]) -> Answer:
        openai, reason, wait = self._openai, "", 0.0
        for attempt in range(self._config.retries + 1):
            if attempt:
                await asyncio.sleep(min(wait, _LONGEST_WAIT))
            wait = self._config.backoff * 2**attempt * random.uniform(0.5, 1.5)
            try:
                return await self._once(asked)
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
                raise RunError(
                    f"teacher: {self._where} refused the request ({error.status_code}); check model, key and base_url"
                ) from None
            except (_Malformed, ValueError, openai.APIResponseValidationError):
                reason = "malformed answer"
            self.stats[reason.split(" (")[0]] += 1
        raise RunError(
            f"teacher: {self._where} gave no answer in {self._config.retries + 1} tries, last: {reason}; "
            "what was answered is kept, the same command continues"
        )

    async def _once(self, asked: dict[str, Any]) -> Answer:
        found: Any = await self._client.chat.completions.create(**{k: v for k, v in asked.items() if k != "base_url"})
        try:
            choice = found.choices[0]
            text, finish = choice.message.content, choice.finish_reason
            usage = found.usage
            prompt, completion = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
        except (AttributeError, IndexError, TypeError):
            raise _Malformed from None
        if not isinstance(text, str) or not text.strip():
            raise _Malformed
        # A server that does not count is taken to have used all that was reserved.
        return Answer(text, finish or "", str(found.model or asked["model"]),
                      prompt if isinstance(prompt, int) else sum(len(m["content"]) for m in asked["messages"]),
                      completion if isinstance(completion, int) else asked["max_tokens"])  # fmt: skip

    @property
    def _where(self) -> str:
        return self._config.base_url or "the endpoint"


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
