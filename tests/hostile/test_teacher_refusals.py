"""What opens a teacher's account is shown nowhere, posts go nowhere else, and every refusal is read for what it is."""

import base64
import json
import re
from typing import Any

import pytest

from mentalglm_jax.data.records import write_records
from tests.hostile.attack import refused
from tests.hostile.teacher_world import KEY, World, accepted, said
from tests.mentalglm_jax.data.explain.test_build import post, records
from tests.mentalglm_jax.endpoint import behaving, completion, dripping, failing, oracle, saying


@pytest.fixture
def world(tmp_path, capsys, monkeypatch) -> World:
    monkeypatch.setenv("HOSTILE_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return World(tmp_path, capsys)


# --- secrets and where the posts go ---


def with_login(url: str, query: str = "") -> str:
    return url.replace("http://", "http://user:hunter2-pass@") + query


def test_user_password_and_query_of_the_address_open_it_and_are_written_nowhere(world):
    with behaving() as server:
        outcome = world.build(with_login(server.url, "?api-version=1&key=query-secret"))
        accepted(outcome)
        sent = server.requests[0]
    assert sent["path"] == "/v1/chat/completions?api-version=1&key=query-secret"
    assert sent["authorization"] == "Basic " + base64.b64encode(b"user:hunter2-pass").decode()
    assert not re.search("hunter2|query-secret", world.written() + outcome.out + outcome.err)


@pytest.mark.parametrize("behaviour", [failing(404), failing(302, location="/v1"), failing(500), dripping(0.05)],
                         ids=["refused", "redirect", "server error", "timeout"])  # fmt: skip
def test_no_refusal_shows_what_opens_the_address(world, behaviour):
    with behaving(default=behaviour) as server:
        line = refused(world.build(with_login(server.url, "?key=query-secret"), timeout=0.5), "teacher: http://127", 1)
    assert not re.search(f"hunter2|query-secret|user|{KEY}", line + world.written())


def test_what_opens_an_extra_key_of_the_body_is_written_nowhere(world):
    with behaving() as server:
        accepted(world.build(server.url, extra_body={"auth": {"api_key": "body-secret"}, "top_k": 3}))
        assert server.requests[0]["auth"] == {"api_key": "body-secret"} and server.requests[0]["top_k"] == 3
    assert "body-secret" not in world.written() and '"top_k": 3' in world.written()


def test_what_opens_an_extra_key_of_the_body_is_masked_where_the_server_repeats_it(world):
    with behaving(default=failing(400, {"error": "unknown key body-secret"})) as server:
        line = refused(
            world.build(server.url, extra_body={"auth": [{"token": "body-secret"}]}), r"unknown key \*\*\*", 1
        )
    assert "body-secret" not in line + world.written()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_takes_the_posts_elsewhere(world, status):
    with behaving() as other, behaving(default=failing(status, location=with_login(other.url, "?a=b"))) as server:
        refused(world.build(server.url), rf"sends the request on to {other.url} \({status}\), where no post is sent", 1)
        assert other.requests == [] and len(server.requests) == 1


@pytest.mark.parametrize("location", ["", "http://[", "\x1b[31m//x", "http://" + "a" * 5000, "javascript:alert(1)"])
def test_a_redirect_to_nonsense_is_refused_in_a_line(world, location):
    with behaving(default=failing(307, location=location)) as server:
        refused(world.build(server.url), r"\(307.*|refused", code=1)


ECHOES = {
    "whole": KEY,
    "in a sentence": f"Incorrect API key provided: {KEY}.",
    "its larger part": f"key starts with {KEY[:16]}",
    "Base64": base64.b64encode(KEY.encode()).decode(),
    "with invisible characters": "\u200b".join(KEY),
    "escaped": "".join(f"\\u{ord(c):04x}" for c in KEY),
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES.keys())
def test_an_echoed_key_is_masked_in_a_refusal(world, echo):
    with behaving(default=failing(401, {"error": {"message": echo}})) as server:
        line = refused(world.build(server.url), r"401: .*\*\*\*", code=1)
    assert not any(KEY[at : at + 12] in line for at in range(len(KEY) - 11)) and echo not in line


def test_an_echoed_key_is_masked_in_what_is_kept(world):
    def echo(asked: dict[str, Any]) -> dict[str, Any]:
        return completion(asked, oracle(asked["messages"]) + KEY) | {"model": f"m {KEY}"}

    with behaving(default=echo) as server:
        outcome = world.build(server.url)
        accepted(outcome)
    assert KEY not in world.written() + outcome.out and "***" in world.written()


@pytest.mark.parametrize(
    "quoted",
    [post(0), f"bad request: {post(0)}!", json.dumps(post(0)), f'{{"content": {json.dumps(post(0))}}}', post(0)[:20]],
    ids=["alone", "in a sentence", "escaped", "escaped in JSON", "half"],
)
def test_a_post_is_not_printed_by_way_of_a_refusal(world, quoted):
    with behaving(default=failing(400, {"error": {"message": quoted}})) as server:
        line = refused(world.build(server.url), r"refused the request \(400", code=1)
    assert not any(post(0)[at : at + 8] in line for at in range(len(post(0)) - 7))


# --- why it refused ---

REASONS = {
    "string": ("no such model", "400: no such model"),
    "JSON string": ('"no such model"', "400: no such model"),
    "error string": ({"error": "no such model"}, "400: no such model"),
    "error object": ({"error": {"message": "no such model"}}, "400: no such model"),
    "message": ({"message": "no such model", "object": "error"}, "400: no such model"),
    "detail": ({"detail": "no such model"}, "400: no such model"),
    "FastAPI": ({"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs", "input": "x"}]}, "400: body.seed: Extra"),
    "list": ([{"error": {"message": "no such model"}}], "400: no such model"),
    "error list": ({"errors": [{"message": "no such model"}]}, "400: no such model"),
    "nested": ({"error": {"error": {"msg": "no such model"}}}, "400: no such model"),
    "page": ("<html><head><title>502 Bad Gateway</title></head><body>x</body></html>", "400: 502 Bad Gateway"),
    "page without title": ("<style>p {}</style><p>no such <b>model</b></p>", "400: no such model"),
    "empty": ("", "400, without a reason"),
    "spaces": (" \n ", "400, without a reason"),
    "nothing said": ({"error": {"code": None}}, "400, without a reason"),
    "deep": ("[" * 100_000, "400"),
    "control characters": ({"error": "no\x00 \x1b[31msuch\u2028model\u202e"}, r"400: no \[31msuch model"),
    "markup": ({"error": "[red]no[/] such [/nothing] model"}, r"400: \[red\]no\[/\] such \[/nothing\] model"),
    "half a surrogate": (b'{"error": "no \\ud83d model"}', "400: no . model"),
    "long": ({"error": "long " * 10_000}, "400: long .*…"),
}


@pytest.mark.parametrize(("body", "says"), REASONS.values(), ids=REASONS.keys())
def test_the_reason_of_a_refusal_is_told_whatever_its_shape(world, body, says):
    with behaving(default=failing(400, body)) as server:
        refused(world.build(server.url), rf"refused the request \({says}.*\); check model", code=1)
        assert len(server.requests) == 1


EMPTY = {
    "OpenAI": (429, {"error": {"message": "You exceeded it", "code": "insufficient_quota"}}),
    "Zhipu": (429, {"error": {"code": "1113", "message": "您的账户已欠费，请充值后重试"}}),
    "Zhipu, a number": (429, {"error": {"code": 1113, "message": "x"}}),
    "DeepSeek": (402, {"error": {"message": "Insufficient Balance"}}),
    "402 alone": (402, ""),
    "Moonshot": (429, {"error": {"message": "x", "type": "exceeded_current_quota_error"}}),
    "DashScope": (400, {"code": "Arrearage", "message": "Access denied"}),
    "SiliconFlow": (403, {"code": 30001, "message": "Sorry, your account balance is insufficient"}),
    "one-api": (403, {"error": {"message": "用户额度不足", "code": "insufficient_user_quota"}}),
    "Anthropic": (400, {"error": {"message": "Your credit balance is too low", "type": "invalid_request_error"}}),
    "MiniMax, with 200": (200, {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}),
    "xAI": (429, {"code": "Some resource has been exhausted", "error": "Your team has either used all available credits"
                  " or reached its monthly spending limit."}),
    "xAI, new": (403, {"error": "Your newly created team doesn't have any credits yet."}),
    "Hugging Face": (429, {"error": "You have exceeded your monthly included credits for Inference Providers."}),
    "Fireworks": (412, {"error": {"message": "Account x is suspended, possibly due to reaching the monthly spending "
                                             "limit or failure to pay past invoices"}}),
}  # fmt: skip


@pytest.mark.parametrize(("status", "body"), EMPTY.values(), ids=EMPTY.keys())
def test_an_empty_account_is_no_rate_limit(world, status, body):
    with behaving(default=failing(status, body)) as server:
        refused(world.build(server.url, retries=6), f"no money or quota left at .*{status}", code=1)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (429, {"error": {"code": "1302", "message": "并发数过高"}}),
        (429, {"error": {"message": "You exceeded your current quota, retry in 20 s", "status": "RESOURCE_EXHAUSTED"}}),
        (503, {"error": {"message": "busy"}}),
        (200, {"error": {"code": 429, "message": "upstream is busy"}}),
        (
            200,
            {
                "choices": [
                    {"error": {"code": 502, "message": "x"}, "finish_reason": "error", "message": {"content": ""}}
                ]
            },
        ),
        (429, {"error": {"message": "Rate limit exceeded: free-models-per-day. Add 10 credits to unlock more"}}),
    ],
    ids=["Zhipu", "Gemini", "503", "OpenRouter, with 200", "OpenRouter, in the choice", "OpenRouter, free"],
)
def test_a_busy_server_is_no_empty_account(world, status, body):
    with behaving(failing(status, body)) as server:
        assert accepted(world.build(server.url))["records"]["accepted"] == 3
        assert len(server.requests) == 4


FILTERS: dict[str, Any] = {
    "OpenRouter": failing(403, {"error": {"code": 403, "message": "x requires moderation and your input was flagged"}}),
    "Zhipu": failing(400, {"error": {"code": "1301", "message": "系统检测到输入或生成内容可能包含不安全或敏感内容"}}),
    "Azure": failing(
        400, {"error": {"code": "content_filter", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}
    ),
    "DashScope": failing(400, {"error": {"code": "data_inspection_failed", "message": "Input data may be"}}),
    "DashScope, native": failing(400, {"code": "DataInspectionFailed", "message": "x"}),
    "Volcengine": failing(400, {"error": {"code": "SensitiveContentDetected.SevereViolation", "message": "x"}}),
    "one-api": failing(500, {"error": {"code": "sensitive_words_detected", "message": "x"}}),
    "DeepSeek": failing(400, {"error": {"message": "Content Exists Risk", "code": "invalid_request_error"}}),
    "OpenAI, reasoning": failing(400, {"error": {"code": "invalid_prompt", "message": "x"}}),
    "MiniMax, with 200": failing(200, {"choices": None, "base_resp": {"status_code": 1026, "status_msg": "x"}}),
    "words alone": failing(403, "Request blocked by moderation"),
    "451": failing(451),
    "no choice": saying(b'{"choices": []}'),
    "finish sensitive": said("", "sensitive"),
    "finish safety": said(None, "SAFETY"),
    "refusal": said(None, "stop", refusal="I cannot"),
    "xAI": failing(403, {"code": "x", "error": "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE"}),
    "Moonshot": failing(400, {"error": {"message": "The request was rejected because it was considered high risk"}}),
    "StepFun": failing(400, {"error": {"message": "The content you provided or machine outputted is blocked."}}),
    "Cohere": failing(400, {"message": "blocked input: x"}),
    "Bedrock": failing(400, {"message": "Guardrail was enforced"}),
    "Volcengine, risk": failing(400, {"error": {"code": "InputTextRiskDetection", "message": "x"}}),
    "Baidu": failing(400, {"error": {"code": "unsafe_request", "message": "x"}}),
    "iFlytek, with 200": failing(200, {"code": 10013, "message": "x", "sid": "y"}),
    "OpenRouter, in the choice": failing(
        200,
        {
            "choices": [
                {"error": {"code": 403, "message": "flagged by moderation"}, "finish_reason": "error", "message": {}}
            ]
        },
    ),
    "finish guardrail": said(None, "guardrail_intervened"),
    "finish filtered": said("", "content_filtered"),
}


@pytest.mark.parametrize("behaviour", FILTERS.values(), ids=FILTERS.keys())
def test_a_filter_rejects_its_post_and_not_the_build(world, behaviour):
    with behaving(behaviour) as server:
        manifest = accepted(world.build(server.url))
        assert accepted(world.build(server.url))["teacher"] == {"cached": 3} and len(server.requests) == 3
    assert manifest["records"] == {"asked": 3, "accepted": 2, "rejected": 1, "filtered": 1, "too_long": 0}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, "Your account was flagged for violating our content policy"),
        (403, "not available in your country"),
        (451, "this model is not served in your region"),
        (401, "safety system: invalid key"),
    ],
)
def test_what_no_post_can_help_is_no_filter(world, status, message):
    with behaving(default=failing(status, {"error": {"message": message}})) as server:
        refused(world.build(server.url), rf"refused the request \({status}: {message}\)", code=1)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body",
    [{"error_code": 17, "error_msg": "daily limit"}, {"success": False, "errors": [{"message": "daily limit"}]},
     {"detail": "daily limit"}, {"choices": [], "message": "daily limit"}],
    ids=["Baidu", "Cloudflare", "a gateway", "beside no choice"],
)  # fmt: skip
def test_the_reason_is_told_where_the_status_says_that_all_is_well(world, body):
    with behaving(default=failing(200, body)) as server:
        refused(world.build(server.url), r"in 2 tries, last: error instead of an answer \(200: daily limit\)", code=1)


def test_a_filter_that_refuses_everything_ends_the_build(world):
    write_records(world.folder / "posts.jsonl", records(40))
    with behaving(default=failing(451)) as server:
        refused(world.build(server.url), "the content filter of .* refused all of 10 posts", code=1)
        assert len(server.requests) == 10
