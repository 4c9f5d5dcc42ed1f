"""What a server's reply means: text, thinking, what it cost, why it refused; and what of it may be shown or kept.

Every reply is the word of a stranger. Servers that call themselves OpenAI-compatible agree on little else than the
place of the text, so that errors are read in whatever shape they come.
"""

import base64
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from mentalglm_jax.text.thinking import spoken

MASK = "***"
_MOST_TOKENS = 10**9  # a larger count is no count
_LONGEST_REASON = 200  # characters of a server's message that are shown
_READ_OF_REASON = 2000  # and that are looked at
_RUN = 12  # characters of a secret that, shown, are too many
_SHORT_SECRET = 8  # below, a value is as likely a word of the text ("EMPTY", "test")
_SECRET_NAME = re.compile(r"key|token|secret|passw|auth|credential", re.IGNORECASE)

Kind = Literal["content", "account", "busy", "refused"]


# --- secrets ---


def redact_url(url: str) -> str:
    """The address without user, password and fragment, each value of its query masked."""
    parts = urlsplit(url)
    query = [(name, MASK) for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, urlencode(query, safe="*"), ""))


def redact_body(value: Any, found: list[str] | None = None) -> Any:
    """``extra_body`` as it may be kept: text under a name like ``api_key`` is masked, at any depth, and put into
    ``found``."""
    if isinstance(value, list):
        return [redact_body(inner, found) for inner in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for name, inner in value.items():
        secret = isinstance(inner, str) and _SECRET_NAME.search(name)
        if secret and found is not None:
            found.append(inner)
        kept[name] = MASK if secret else redact_body(inner, found)
    return kept


class Secrets:
    """Masks the key, the user, password and query values of the address, and what ``extra_body`` hides, by value and
    in the forms in which they travel (Base64, percent-encoded)."""

    def __init__(self, key: str, url: str | None, extra_body: dict[str, Any]):
        parts = urlsplit(url or "")
        userinfo = parts.netloc.rpartition("@")[0]
        plain = [key, unquote(parts.password or ""), unquote(userinfo), userinfo]
        plain += [value for _, value in parse_qsl(parts.query)]
        redact_body(extra_body, plain)
        travel = [base64.b64encode(one.encode()).decode() for one in plain] + [quote(one, safe="") for one in plain]
        self._values = sorted({one for one in (*plain, *travel) if len(one) >= 4}, key=len, reverse=True)
        self._runs = {one[at : at + _RUN] for one in self._values for at in range(len(one) - _RUN + 1)}

    def mask(self, text: str) -> str:
        """For what is kept: every secret long enough not to be a word of the text."""
        for value in self._values:
            text = text.replace(value, MASK) if len(value) >= _SHORT_SECRET else text
        return text

    def mask_shown(self, text: str) -> str:
        """For a message: every secret, and any part of one."""
        for value in self._values:
            text = text.replace(value, MASK)
        return _without_runs(text, _RUN, self._runs.__contains__, MASK)


def _without_runs(text: str, size: int, known: Any, mark: str) -> str:
    """``text`` with each stretch whose every window of ``size`` characters is ``known`` replaced by ``mark``."""
    hidden = bytearray(len(text))
    for at in range(len(text) - size + 1):
        if known(text[at : at + size]):
            hidden[at : at + size] = b"\1" * size
    pieces = re.finditer(rb"\x00+|\x01+", bytes(hidden))
    return "".join(text[m.start() : m.end()] if m[0][0] == 0 else mark for m in pieces)


# --- an answer ---


def readable(text: str) -> str:
    """The text as it can be written as UTF-8: half a surrogate pair becomes U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@dataclass(frozen=True)
class Reply:
    """A reply with status 200. ``text`` None: none was given. ``choices``: how many answers (None: not even a list).
    Token counts are None where the server gives none that can be one."""

    text: str | None
    finish: str
    refused: bool
    model: str
    choices: int | None
    prompt_tokens: int | None
    completion_tokens: int | None
    error: "Refusal | None"

    @property
    def thought_only(self) -> bool:
        """All tokens went before a word of the answer was written."""
        return not self.refused and self.finish == "length" and not spoken(self.text or "")


# Reasons to stop, lower case: of a filter, beside those that name one (``_CONTENT_CODE``); of the token limit.
_REFUSING = ("safety", "blocklist", "blocked", "refusal", "recitation", "spii")
_CUT = ("length", "max_tokens", "max_output_tokens", "max_length", "model_length", "token_limit")


def read_reply(body: bytes) -> Reply:
    """Reads a chat completion. Raises: ValueError if it is no JSON object (too deep to read counts as none)."""
    try:
        found = json.loads(body)
    except RecursionError:
        raise ValueError("too deep") from None
    if not isinstance(found, dict):
        raise ValueError("no object")
    choices, usage = found.get("choices"), found.get("usage")
    first = choices[0] if isinstance(choices, list) and choices else None
    choice = first if isinstance(first, dict) else {}
    message = choice.get("message") if isinstance(choice.get("message"), dict) else {}
    assert isinstance(message, dict)
    text, finish = _content(message.get("content")), choice.get("finish_reason")
    finish = readable(finish)[:50] if isinstance(finish, str) else ""
    finish = "length" if finish.lower() in _CUT else finish
    usage = usage if isinstance(usage, dict) else {}
    empty = not (text or message.get("reasoning_content") or message.get("reasoning"))
    model = found.get("model")
    refused = finish.lower() in _REFUSING or bool(_CONTENT_CODE.search(finish.lower()) or message.get("refusal"))
    return Reply(
        text, finish, refused,
        readable(model)[:200] if isinstance(model, str) else "", len(choices) if isinstance(choices, list) else None,
        _count(usage.get("prompt_tokens"), 1), _count(usage.get("completion_tokens"), 0 if empty else 1),
        None if text or refused else _error(found, choice),
    )  # fmt: skip


def _error(found: dict[str, Any], choice: dict[str, Any]) -> "Refusal | None":
    """What a reply with status 200 and no answer says went wrong, in the reply (whatever its shape) or in its choice
    (OpenRouter)."""
    if choice and not choice.get("error"):
        return None
    said = {"error": choice["error"]} if choice else {key: value for key, value in found.items() if key != "choices"}
    inner = said.get("error")
    status = inner.get("code") if isinstance(inner, dict) else None
    status = status if type(status) is int and 400 <= status < 600 else 200
    refusal = Refusal.of(status, json.dumps(said).encode())
    base = found.get("base_resp")  # of MiniMax, with 0 in every good reply
    if isinstance(base, dict) and base.get("status_code") in (None, 0) and not inner:
        return None
    return refusal if inner or any(one.strip() for one in refusal.messages) or isinstance(base, dict) else None


def _content(content: Any) -> str | None:
    """Text, or a list of parts of which those of type "text" are the answer."""
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(part["text"] for part in parts if isinstance(part.get("text"), str)) or None
    return readable(content) if isinstance(content, str) else None


def _count(value: Any, least: int) -> int | None:
    return value if type(value) is int and least <= value <= _MOST_TOKENS else None


# --- a refusal ---

# Zhipu, MiniMax (two), OpenAI, Gemini, iFlytek (three), Baidu
_CONTENT_CODES = {"1301", "1026", "1027", "invalid_prompt", "safety", "10013", "10014", "10019", "unsafe_request"}
_CONTENT_CODE = re.compile(
    r"content_?(?:filter|policy|moderation|blocked)|sensitive|moderation|data_?inspection|responsibleai|"
    r"prohibited_content|inappropriate|risk_?detection|censor|guardrail"
)
_CONTENT_WORDS = re.compile(
    r"content exists risk|\bmoderation\b|(?:harmful|unsafe) content|guardrail|considered high risk|"
    r"(?:input|prompt|content|text) (?:was|has been|is) (?:flagged|blocked)|blocked (?:input|output|prompt|content)|"
    r"(?:text|content) may contain risk|content you provided.{0,60}\bblocked|"
    r"content (?:management )?(?:policy|filter)|safety (?:system|policy|filter)|sensitive (?:content|word|information)|"
    r"inappropriate content|usage (?:polic|guideline)|敏感|违规|不合规|不安全|风险内容|审核不通过|未通过.{0,6}审核",
    re.IGNORECASE,
)
_NOT_ABOUT_CONTENT = re.compile(r"\baccount\b|organi[sz]ation|api key|账[户号]|region|country", re.IGNORECASE)
_ACCOUNT_CODES = {
    "insufficient_quota", "insufficient_user_quota", "exceeded_current_quota_error", "billing_hard_limit_reached",
    "billing_not_active", "insufficient_balance", "insufficientbalance", "arrearage", "accountoverdueerror",
    "allocationquota.freetieronly", "payment_required", "1113", "1309", "30001", "1008",
}  # fmt: skip
_ACCOUNT_WORDS = re.compile(
    r"insufficient (?:account )?(?:balance|credits?|quota|funds)|credit balance|out of credits?|credit limit|"
    r"(?:available|included|remaining|all (?:of )?your) credits|(?:have any|no|not enough|purchase|buy)(?: more)? "
    r"credits|spending limit|past invoices|余额不足|余额已|欠费|额度(?:已)?(?:用尽|不足|用完|失败)|可用资源包",
    re.IGNORECASE,
)
_CODE_NAMES = ("code", "type", "status", "status_code", "error_code", "err_code")
_MESSAGE_NAMES = ("message", "msg", "detail", "details", "error_description", "error_msg", "errmsg", "status_msg",
                  "error", "errors", "reason", "title", "base_resp")  # fmt: skip
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
_TITLE = re.compile(r"<title[^>]*>([^<]*)", re.IGNORECASE)
_BLOCK = re.compile(r"<(script|style)\b.*?(?:</\1[^>]*>?|\Z)", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<[^<>]*>")


@dataclass(frozen=True)
class Refusal:
    """What a server says when it does not answer: status, codes (lower case) and messages, from whatever shape."""

    status: int
    codes: frozenset[str]
    messages: tuple[str, ...]

    @classmethod
    def of(cls, status: int, body: bytes) -> "Refusal":
        """Reads JSON of any shape (an object, a list, a string), HTML, text, or nothing."""
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = _plain(body[: 8 * _READ_OF_REASON].decode("utf-8", "replace"))
        codes = frozenset(_codes(found))
        return cls(status, codes, tuple(one[:_READ_OF_REASON] for one in _messages(found) if one.strip())[:8])

    @property
    def kind(self) -> Kind:
        """ "content": about what this one request says; "account": no money or quota left; "busy": worth another try;
        "refused": of any other kind."""
        said = " ".join(self.messages)
        if self.status == 402 or self.codes & _ACCOUNT_CODES or _ACCOUNT_WORDS.search(said):
            return "account"
        coded = self.codes & _CONTENT_CODES or any(map(_CONTENT_CODE.search, self.codes))
        worded = self.status in (200, 400, 403, 406, 422) and _CONTENT_WORDS.search(said)
        if coded or ((worded or self.status == 451) and not _NOT_ABOUT_CONTENT.search(said)):
            return "content"
        return "busy" if self.status in (200, 408, 409, 425, 429) or self.status >= 500 else "refused"

    def reason(self, sent: Iterable[str], secrets: Secrets) -> str:
        """The server's own words in one line: no secret, nothing that was sent (posts), no control character.
        Empty if it gave none."""
        for message in self.messages:
            text = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), message)
            text = re.sub(r'\\([nrt"])', " ", text)
            text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in readable(text)
                           if unicodedata.category(c) not in ("Cf", "Cs", "Co", "Cn"))  # fmt: skip
            text = secrets.mask_shown(" ".join(text.split()))
            posts = " ".join(" ".join(readable(one).split()) for one in sent)
            text = _without_runs(text, 24 if text.isascii() else 8, posts.__contains__, "…")
            if MASK in text or any(character.isalnum() for character in text):
                return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"
        return ""


def _plain(text: str) -> str:
    """Text, or the title of a page, or what is left of the page without its tags."""
    if "<" not in text:
        return text
    title = _TITLE.search(text)
    return title[1] if title and title[1].strip() else _TAG.sub(" ", _BLOCK.sub(" ", text))


def _codes(value: Any, depth: int = 4) -> Iterator[str]:
    inner: Iterable[Any] = ()
    if isinstance(value, dict):
        for name in _CODE_NAMES:
            if isinstance(value.get(name), str | int) and len(str(value[name])) <= 60:
                yield str(value[name]).lower()
        inner = list(value.values())[:32]
    elif isinstance(value, list):
        inner = value[:8]
    if depth:
        for one in inner:
            yield from _codes(one, depth - 1)


def _messages(value: Any, depth: int = 4) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif depth and isinstance(value, dict):
        if isinstance(value.get("loc"), list) and isinstance(value.get("msg"), str):  # FastAPI: which key is wrong
            yield f"{'.'.join(map(str, value['loc'][:8]))}: {value['msg']}"
        for name in _MESSAGE_NAMES:
            if name in value:
                yield from _messages(value[name], depth - 1)
    elif depth and isinstance(value, list):
        for one in value[:8]:
            yield from _messages(one, depth - 1)
