"""Asking a server that speaks OpenAI's chat completions, so that it can neither hang, flood nor overcharge a build.

Each try is bounded in time and size; it reserves what it can cost; what comes back is on disk before anything else
happens. No redirect is followed: the posts go where the recipe says. Needs the [data] extra (the official client).
"""

import asyncio
import base64
import contextlib
import email.utils
import math
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from mentalglm_jax.data.explain.key_owners import check_owner
from mentalglm_jax.data.explain.prompts import Message
from mentalglm_jax.data.explain.replies import Refusal, Reply, Secrets, read_reply, redact_body, redact_url
from mentalglm_jax.data.explain.teacher import CONTENT_FILTER, Answer, AnswerCache, Setting, TeacherConfig, check_url
from mentalglm_jax.errors import InputError, RunError, install

LARGEST_BODY = 8 << 20  # bytes, decoded; the longest answers take some hundred thousand
_CONNECT = 15.0  # seconds; longer is a host that is not there
_LONGEST_WAIT = 120.0  # seconds, also when the server asks for more
_LONGEST_TOKEN = 64  # characters: a text longer than all its tokens can be is cut
_ALL_REFUSED = 10  # filtered posts, with none ever answered, after which it is not the posts
# Tries that end so were never sent: nobody is paid for them.
_UNSENT = {"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "LocalProtocolError", "ProxyError"}


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


class _TooLarge(Exception):
    """A body over ``LARGEST_BODY``."""


class _Useless(Exception):
    """A try that brought nothing: why, in a word to count, and in words to show."""

    def __init__(self, kind: str, shown: str, wait: float = 0.0):
        super().__init__(shown)
        self.kind, self.shown, self.wait = kind, shown, wait


def _bounded(openai: Any) -> Any:
    """The class of the HTTP client: the official one's, which reads a body piece by piece and stops at the bound.

    The response it gives has the headers that mean something here and no other: what a server says about encodings
    and links is not acted on.
    """

    class Bounded(openai.DefaultAsyncHttpxClient):
        async def send(self, request: Any, *, stream: bool = False, **more: Any) -> Any:
            response, body = await super().send(request, stream=True, **more), bytearray()
            try:
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > LARGEST_BODY:
                        raise _TooLarge
            finally:
                await response.aclose()
            headers = {name: value for name in ("retry-after", "location") if (value := response.headers.get(name))}
            return type(response)(response.status_code, headers=headers, content=bytes(body), request=request)

    return Bounded


class OpenAITeacher:
    """Any OpenAI-compatible endpoint: bounded concurrency, retries with exponential back-off, budget, cache.

    The first failure stops it: requests under way finish and are kept, none is sent any more.

    Raises: InputError if the [data] extra or the key is missing, or the key or the address is none.
    """

    def __init__(self, config: TeacherConfig, cache: AnswerCache):
        try:
            import openai
        except ImportError:
            raise InputError(f"a teacher endpoint needs the data extra: {install('data')}") from None
        url = config.base_url or os.environ.get("OPENAI_BASE_URL") or None
        try:
            check_url(url, "OPENAI_BASE_URL")
        except ValueError as error:
            raise InputError(f"teacher: {error}") from None
        key = os.environ.get(config.api_key_env, "").strip()
        if not key and not url:
            raise InputError(f"teacher: set {config.api_key_env}, or give teacher.base_url of an endpoint without keys")
        if key:
            check_owner(config.api_key_env, url)
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"teacher: {config.api_key_env} holds a character that no key has; set it again")
        self._openai: Any = openai
        self._config, self._cache = config, cache
        self._secrets = Secrets(key, url, config.extra_body)
        self._url = None if url is None else redact_url(url)
        self._client = self._open(url, key)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._failure: RunError | None = None
        self._failed = asyncio.Event()
        self._answered: bool | None = None  # whether any answer of use is known; None: only the cache could tell
        self.budget = Budget(config, cache.tokens())
        self.stats: Counter[str] = Counter()

    def _open(self, url: str | None, key: str) -> Any:
        """The official client. Its address is without user, password and query, which it would put into messages and
        logs; they are sent as what they mean."""
        openai, config, parts = self._openai, self._config, urlsplit(url or "")
        # A kept connection that the server has closed meanwhile would cost a try; a new one costs next to nothing.
        headers = {"Accept-Encoding": "identity", "Connection": "close"}
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        plain = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        limits = openai.Timeout(config.timeout, connect=min(0.9 * config.timeout, _CONNECT))
        try:
            return openai.AsyncOpenAI(
                base_url=plain or None, api_key=key or "none", default_headers=headers, max_retries=0,
                default_query=dict(parse_qsl(parts.query)),
                http_client=_bounded(openai)(timeout=limits, follow_redirects=False),
            )  # fmt: skip
        except Exception as error:  # the client's own view of what an address is
            raise InputError(f"teacher: {self._where} cannot be used ({type(error).__name__})") from None

    async def __aenter__(self) -> "OpenAITeacher":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    def stop(self, reason: RunError) -> None:
        """As ``Teacher.stop``."""
        self._failure = self._failure or reason
        self._failed.set()

    async def ask(self, messages: Sequence[Message], seed: int) -> Answer:
        """As ``Teacher.ask``. Raises also BudgetSpent."""
        config = self._config
        settings: dict[Setting, Any] = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        asked: dict[str, Any] = {"base_url": self._url, "model": config.model, "messages": list(messages), "seed": seed}
        asked |= {name: value for name, value in settings.items() if config.names.get(name, name) is not None}
        asked |= {"names": dict(config.names)} if config.names else {}
        asked |= {"extra_body": redact_body(config.extra_body)} if config.extra_body else {}
        key = self._cache.key(asked)
        answer = self._cache.get(key)
        if answer is not None:
            self.stats["cached"] += 1
        else:
            async with self._slots:
                try:
                    answer = await self._patiently(key, asked)
                except RunError as error:
                    self.stop(error)
                    raise
            self.stats["asked"] += 1
            self.stats.update({"filtered": 1} if answer.finish == CONTENT_FILTER else {})
        self._judge(answer)
        return answer

    def _judge(self, answer: Answer) -> None:
        """Stops where no answer was ever of use and the next will be of none: the recipe is wrong, not the post."""
        if answer.thought_only:
            self.stats["thought only"] += 1
        elif answer.finish != CONTENT_FILTER:
            self._answered = True
        if self._answered or (not answer.thought_only and self.stats["filtered"] < _ALL_REFUSED):
            return
        if self._answered is None:
            now = {"base_url": self._url, "model": self._config.model, "max_tokens": self._config.max_tokens}
            self._answered = any(
                all(asked.get(name) == value for name, value in now.items())
                for asked, other in self._cache.answers()
                if other.finish != CONTENT_FILTER and not other.thought_only
            )
        if not self._answered:
            error = RunError(
                f"teacher: {self._config.model} used all {self._config.max_tokens} tokens before it wrote a word of "
                "its answer (thinking counts); raise teacher.max_tokens"
                if answer.thought_only
                else f"teacher: the content filter of {self._where} refused all of {self.stats['filtered']} posts; "
                "check model and base_url, or choose another teacher"
            )
            self.stop(error)
            raise error

    async def _patiently(self, key: str, asked: dict[str, Any]) -> Answer:
        # A byte-level tokenizer makes at most one token of a byte; the chat format adds a few per message.
        most = (sum(len(message["content"].encode()) + 16 for message in asked["messages"]), self._config.max_tokens)
        last = _Useless("", "")
        for attempt in range(self._config.retries + 1):
            if attempt:
                backoff = self._config.backoff * 2 ** min(attempt - 1, 20) * random.uniform(0.5, 1.5)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._failed.wait(), min(max(backoff, last.wait), _LONGEST_WAIT))
            try:
                async with self.budget.request(*most):
                    if self._failure is not None:
                        raise self._failure
                    return await self._once(key, asked, most)
            except _Useless as useless:
                last = useless
                self.stats[last.kind] += 1
        raise RunError(
            f"teacher: {self._where} gave no answer in {self._config.retries + 1} tries, last: {last.shown}; "
            "what was answered is kept, the same command continues"
        )

    async def _once(self, key: str, asked: dict[str, Any], most: tuple[int, int]) -> Answer:
        """One try, its answer on disk. Spends what the server counted; of what it did not count, and of what was sent
        and never answered, all that was reserved.

        Raises: _Useless if another try may help, RunError if none will.
        """
        openai, config = self._openai, self._config
        settings: dict[Setting, Any] = {"max_tokens": config.max_tokens, "temperature": config.temperature}
        settings["seed"] = asked["seed"]
        body = {config.names.get(name, name): value for name, value in settings.items()} | config.extra_body
        body.pop(None, None)
        try:
            async with asyncio.timeout(config.timeout):
                raw = await self._client.chat.completions.with_raw_response.create(
                    model=config.model, messages=asked["messages"], extra_body=body
                )
        except openai.APIStatusError as error:
            return self._refused(Refusal.of(error.status_code, error.response.content), key, asked, error.response)
        except (TimeoutError, openai.APITimeoutError) as error:
            self._lost(error, most)
            raise _Useless("timeout", f"timeout ({config.timeout:g} s)") from None
        except (_TooLarge, openai.APIConnectionError) as error:
            self._lost(error, most)
            if isinstance(error, _TooLarge) or isinstance(error.__cause__, _TooLarge):
                raise _Useless("malformed answer", f"an answer of over {LARGEST_BODY >> 20} MiB") from None
            raise _Useless("no connection", "no connection") from None
        try:
            reply = read_reply(raw.content)
        except ValueError:
            self._paid(most, kept=False)
            raise _Useless("malformed answer", "malformed answer") from None
        if reply.error is not None:
            return self._refused(reply.error, key, asked, None)
        return self._keep(reply, key, asked, most)

    def _keep(self, reply: Reply, key: str, asked: dict[str, Any], most: tuple[int, int]) -> Answer:
        tokens = tuple(
            reserved if count is None else count
            for count, reserved in zip((reply.prompt_tokens, reply.completion_tokens), most, strict=True)
        )
        text, finish = self._secrets.mask(reply.text or ""), reply.finish
        if len(text) > _LONGEST_TOKEN * self._config.max_tokens:
            text, finish = text[: _LONGEST_TOKEN * self._config.max_tokens], "length"
        if reply.refused or reply.choices == 0:  # filters of some servers leave nothing at all
            finish = CONTENT_FILTER
        elif not text.strip() and not reply.thought_only:
            self._paid(tokens, kept=False)
            raise _Useless("malformed answer", "an answer without text")
        answer = Answer(text, finish, self._secrets.mask(reply.model) or self._config.model, *tokens)
        self._paid(tokens, kept=True)
        self._cache.put(key, asked, answer)
        return answer

    def _refused(self, refusal: Refusal, key: str, asked: dict[str, Any], response: Any) -> Answer:
        """The kept answer of a post that a filter refused. Raises: _Useless, RunError."""
        kind = refusal.kind
        if kind == "content":
            answer = Answer("", CONTENT_FILTER, self._config.model, 0, 0)
            self._cache.put(key, asked, answer)
            return answer
        said = refusal.reason([message["content"] for message in asked["messages"]], self._secrets)
        why = f"{refusal.status}: {said}" if said else f"{refusal.status}, without a reason"
        if kind == "account":
            raise RunError(f"teacher: no money or quota left at {self._where} ({why}); what was answered is kept")
        if 300 <= refusal.status < 400:
            leads = self._secrets.mask_shown(_shown_url(response.headers.get("location", "")))
            raise RunError(
                f"teacher: {self._where} sends the request on to {leads} ({refusal.status}), where no post is sent; "
                "make that teacher.base_url if you trust it"
            )
        if kind == "busy":
            names = {429: "rate limit", 200: "error instead of an answer"}
            name = names.get(refusal.status, "server error")
            raise _Useless(name, f"{name} ({why})", _retry_after(response))
        raise RunError(f"teacher: {self._where} refused the request ({why}); check model, key and base_url")

    def _paid(self, tokens: tuple[int, ...], *, kept: bool) -> None:
        prompt, completion = tokens
        self.budget.spend(prompt, completion)
        if not kept:
            self._cache.put_unused(prompt, completion)

    def _lost(self, error: BaseException, most: tuple[int, int]) -> None:
        """A request that was sent is billed, whether its answer arrives or not."""
        if type(error.__cause__).__name__ not in _UNSENT:
            self._paid(most, kept=False)

    @property
    def _where(self) -> str:
        return self._url or "the endpoint"


def _shown_url(url: str) -> str:
    """Scheme, host and path of where a redirect leads, in printable characters; its query may hold anything."""
    try:
        plain = redact_url(url).partition("?")[0]
    except ValueError:
        plain = ""
    return "".join(character for character in plain if character.isprintable())[:200] or "nowhere"


def _retry_after(response: Any) -> float:
    """Seconds that the server asks to wait, given as such or as a date; 0 if it asks for none."""
    said = "" if response is None else response.headers.get("retry-after", "")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
