"""What a client may ask: OpenAI's chat completions, as far as this package can do what the words say.

A parameter that would be ignored is refused unless its value asks for nothing (``n: 1``, ``tools: []``); null counts as
absent. Every refusal is one sentence in OpenAI's error shape.
"""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mentalglm_jax.errors import InputError, nearest
from mentalglm_jax.foreign import MAX_INTEGER, parse_json, short
from mentalglm_jax.inference.continuous import MOST_TOLD, Wanted
from mentalglm_jax.inference.decode import MAX_NEW_TOKENS
from mentalglm_jax.settings import more_than
from mentalglm_jax.text.tokenizer import GlmTokenizer

MOST_MESSAGES = 1000
MOST_VALUES = 20_000  # of a body: a message of one part has six
_Text = Annotated[str, Field(max_length=256)]


class ApiError(Exception):
    """A refusal: HTTP status, a sentence, and where there is one the parameter and OpenAI's code."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


class TextPart(_Part):
    """A part of a content; others (images, audio) are not read."""

    type: Literal["text"]
    text: str


def _one_part(given: Any) -> Any:
    return [{"type": "text", "text": given}] if isinstance(given, str) else given


def _one_item(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


class Message(_Part):
    """A turn. An answer that a client sends back as it came may bring empty lists along."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_one_part)]
    name: str | None = None
    type: Literal["text"] = "text"
    annotations: Annotated[list[Any], Field(max_length=0)] = []
    tool_calls: Annotated[list[Any], Field(max_length=0)] = []

    @property
    def text(self) -> str:
        """The content as one text."""
        return "".join(part.text for part in self.content)


class _StreamOptions(_Part):
    include_usage: bool = False
    include_obfuscation: bool = False


class _ResponseFormat(_Part):
    type: Literal["text"]


class ChatRequest(_Part):
    """The body of ``POST /v1/chat/completions``. The second half may be given, but asks for nothing."""

    model: _Text
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=16), BeforeValidator(_one_item)
    ] = []  # fmt: skip
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOLD)] | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None

    n: Annotated[int, Field(ge=1, le=1)] = 1
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] = {}
    tools: Annotated[list[Any], Field(max_length=0)] = []
    functions: Annotated[list[Any], Field(max_length=0)] = []
    tool_choice: Literal["none", "auto"] = "none"
    function_call: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = False
    response_format: _ResponseFormat | None = None
    modalities: list[Literal["text"]] = ["text"]
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"
    user: _Text | None = None
    safety_identifier: _Text | None = None
    prompt_cache_key: _Text | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] = {}


# Parameters of OpenAI's that this package has no work for, with the value that asks for none.
_ONLY = {
    "n": "1", "presence_penalty": "0", "frequency_penalty": "0", "logit_bias": "{}", "tools": "[]", "functions": "[]",
    "tool_choice": "'none'", "function_call": "'none'", "response_format": "{'type': 'text'}",
    "modalities": "['text']", "store": "false", "service_tier": "'auto'",
}  # fmt: skip


def read_request(body: bytes) -> ChatRequest:
    """Raises: ApiError 400: not JSON, an unknown parameter, or a value that is not one of its parameter."""
    try:
        raw = parse_json(body, "the body")
    except InputError as error:
        raise ApiError(400, str(error)) from None
    if not isinstance(raw, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(raw).__name__}")
    if more_than(raw, MOST_VALUES):
        raise ApiError(400, f"the body holds more than {MOST_VALUES} values")
    try:
        asked = ChatRequest.model_validate(raw)
    except ValidationError as error:
        raise _refused(error) from None
    if asked.max_tokens is not None and asked.max_completion_tokens not in (None, asked.max_tokens):
        raise ApiError(400, "max_tokens and max_completion_tokens mean the same; give one of them", param="max_tokens")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    if asked.messages[-1].role == "assistant":
        raise ApiError(400, "messages: the last one is the assistant's; end with a user's", param="messages")
    if empty := [number for number, one in enumerate(asked.messages) if not one.text]:
        raise ApiError(400, f"messages[{empty[0]}].content is empty", param="messages")
    return asked


def _refused(error: ValidationError) -> ApiError:
    """The first thing that is wrong, by its place: ``messages[0].content``."""
    problems = error.errors(include_url=False, include_context=False)
    # A part of another kind has other keys, too; what is misspelt may be what is missing.
    kinds = ("literal_error", "extra_forbidden")
    problem = min(problems, key=lambda one: kinds.index(one["type"]) if one["type"] in kinds else len(kinds))
    fields = {*ChatRequest.model_fields, *Message.model_fields, *TextPart.model_fields}
    place = ""
    for part in problem["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part in fields or problem["type"] == "extra_forbidden":
            place += f".{part}" if place else part
    param = str(problem["loc"][0]) if problem["loc"] else None
    if param in _ONLY:
        return ApiError(400, f"{param} is not supported here; leave it out, or give {_ONLY[param]}, got "
                        f"{short(problem['input'])}", param=param, code="unsupported_value")  # fmt: skip
    if problem["type"] == "extra_forbidden":
        name = str(problem["loc"][-1])
        known = ChatRequest.model_fields if len(problem["loc"]) == 1 else Message.model_fields
        return ApiError(
            400,
            f"unknown parameter {short(place)}{nearest(name, known)}; it would be ignored",
            param=param,
            code="unknown_parameter",
        )
    if problem["type"] == "missing":
        return ApiError(400, f"{place} is missing", param=param, code="missing_required_parameter")
    said = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return ApiError(400, f"{short(place)[1:-1]} {said}, got {short(problem['input'])}", param=param)


def prompt_of(asked: ChatRequest, tokenizer: GlmTokenizer) -> list[int]:
    """The conversation as token ids, in the model's declared chat format; what a content says stays text.

    Raises: ApiError 400: a system turn where the format has none, or a character the tokenizer cannot write.
    """
    roles: Mapping[str, str] = {"developer": "system"}
    messages = [{"role": roles.get(one.role, one.role), "content": one.text} for one in asked.messages]
    try:
        return tokenizer.ask_ids(messages)
    except InputError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from None


def wanted_of(asked: ChatRequest, prompt: list[int], context: int) -> Wanted:
    """What the decoder is asked for.

    Args:
        context: tokens of prompt and answer together, at most.

    Raises: ApiError 400: too long.
    """
    given = asked.max_tokens or asked.max_completion_tokens
    room = given if given is not None else min(MAX_NEW_TOKENS, context - len(prompt))
    if room < 1 or len(prompt) + room > context:
        more = f" and {room} for the answer" if given is not None else ""
        raise ApiError(
            400, f"the context is {context} tokens, these messages take {len(prompt)}{more}; shorten them"
            f"{' or lower max_tokens' if given is not None else ''}",
            code="context_length_exceeded", param="messages",
        )  # fmt: skip
    seed = secrets.randbits(32) if asked.seed is None else asked.seed % 2**32
    told = (asked.top_logprobs or 0) if asked.logprobs else None
    return Wanted(tuple(prompt), room, asked.temperature, asked.top_p, seed, told)
