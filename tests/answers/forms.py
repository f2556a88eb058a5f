"""Forms in which providers answer, one row for each that was seen in the wild, with its source and the right `Answer`.

Sources: `facts N` is section N of the collection of provider facts that docs/explanation/provider.md was written from,
`case aN` a situation of the cases that were collected for this project, `owner/repo#N` a public issue, `docs NAME` a
provider's documentation. Bodies have the shape that was seen, with words of our own where the words do not matter.
"""

# ruff: noqa: E501  (one row, one line)
from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from governor.model.requests import Outcome, Scope

NOW = datetime(2026, 11, 30, 12, 0, tzinfo=UTC).timestamp()

OK, THROTTLED, QUOTA, TOO_LARGE = Outcome.OK, Outcome.THROTTLED, Outcome.QUOTA, Outcome.TOO_LARGE
SLOW_DOWN, OVERLOADED, SERVER_ERROR = Outcome.SLOW_DOWN, Outcome.OVERLOADED, Outcome.SERVER_ERROR
BAD_REQUEST, UNAUTHORIZED, TIMEOUT = Outcome.BAD_REQUEST, Outcome.UNAUTHORIZED, Outcome.TIMEOUT
MALFORMED = Outcome.MALFORMED


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What arrives, and what it means. `limits`: dimension -> (limit, remaining). `used`: prompt and output tokens."""

    source: str
    status: int
    body: Any
    outcome: Outcome
    headers: dict[str, str] = field(default_factory=dict)
    code: str = ""
    wait_s: float = -1.0
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    used: tuple[int, int] = (-1, -1)
    scope: Scope = Scope.REQUEST
    returns_at: float | None = None
    has_text: bool = False
    cut_off: bool = False


def form(source: str, status: int, body: Any, outcome: Outcome, code: str = "", **expected: Any) -> Form:
    """A row; the account's refusals concern the account, unless stated otherwise."""
    if outcome in (QUOTA, UNAUTHORIZED):
        expected.setdefault("scope", Scope.ACCOUNT)
    return Form(source=source, status=status, body=body, outcome=outcome, code=code, **expected)


# ---------------------------------------------------------------- shapes


def error(message: str, kind: str | None = None, code: Any = None, **more: Any) -> dict[str, Any]:
    """OpenAI's, which most others write too."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code, **more}}


def anthropic(kind: str, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_011"}


def google(status: int, name: str, message: str, *details: dict[str, Any]) -> dict[str, Any]:
    return {"error": {"code": status, "message": message, "status": name, "details": list(details)}}


def violation(quota: str) -> dict[str, Any]:
    return {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": quota}]}


def retry_info(delay: str) -> dict[str, Any]:
    return {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}


def page(title: str) -> str:
    return f"<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n<center><h1>{title}</h1></center>\r\n</body></html>"


def chat(content: Any = "hello", finish: str | None = "stop", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **more.pop("message", {})}
    usage = {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15}
    choice = {"index": 0, "message": message, "finish_reason": finish, **more.pop("choice", {})}
    return {"object": "chat.completion", "choices": [choice], "usage": usage, **more}


def response(status: str = "completed", text: str | None = "hello", **more: Any) -> dict[str, Any]:
    parts = [{"type": "output_text", "text": text}] if text is not None else []
    output = [{"type": "message", "role": "assistant", "content": parts}] if parts else []
    usage = {"input_tokens": 22, "output_tokens": 50, "total_tokens": 72}
    return {"object": "response", "status": status, "error": None, "output": output, "usage": usage, **more}


def epoch(*moment: int) -> float:
    return datetime(*moment, tzinfo=UTC).timestamp()  # type: ignore[misc, arg-type]


def rate(what: str, limit: int, used: int, requested: int, wait: str) -> str:
    name = {"TPM": "tokens per min", "RPM": "requests per min", "TPD": "tokens per day", "RPD": "requests per day"}[
        what
    ]
    return (
        f"Rate limit reached for gpt-4o in organization org-X on {name} ({what}): Limit {limit}, Used {used}, "
        f"Requested {requested}. Please try again in {wait}. Visit https://platform.openai.com/account/rate-limits."
    )


USED, USED_RESPONSE = (11, 4), (22, 50)
ANSWERED: dict[str, Any] = {"used": USED, "has_text": True}
RATE = ("rate_limit_exceeded",)

# ---------------------------------------------------------------- OpenAI

OPENAI = [
    form("BuilderIO/micro-agent#86", 429, error(rate("TPM", 30000, 29937, 385, "644ms"), "tokens", *RATE), THROTTLED, *RATE, wait_s=0.644),
    form("SevaSk/ecoute#194", 429, error(rate("RPM", 3, 3, 1, "20s"), "requests", *RATE), THROTTLED, *RATE, wait_s=20.0),
    form("feder-cr/invisible_playwright_mcp#145", 429, error(rate("RPD", 200, 200, 1, "7m12s"), "requests", *RATE), THROTTLED, *RATE, wait_s=432.0),
    form("openai/openai-agents-js#1022", 429, error(rate("RPD", 1000, 1000, 1, "1m26.4s"), "requests", *RATE), THROTTLED, *RATE, wait_s=86.4),
    form("openai/openai-dotnet#404", 429, error(rate("TPM", 100000, 96749, 19126, "114h18m0s"), "tokens", *RATE), THROTTLED, *RATE, wait_s=411_480.0),
    form("facts 4, Retry-After: 56", 429, error("Rate limit reached", "tokens", *RATE), THROTTLED, *RATE, headers={"Retry-After": "56"}, wait_s=56.0),
    form("case a14", 429, error("Rate limit reached", "requests", *RATE), THROTTLED, *RATE, headers={"retry-after": "1.5", "x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "60s"}, wait_s=1.5, limits={"RPM": (60, 0)}),
    form("facts 7, SDK order", 429, error("Rate limit reached", "tokens", *RATE), THROTTLED, *RATE, headers={"retry-after-ms": "250", "retry-after": "3"}, wait_s=0.25),
    form("RFC 9110, a date", 429, error("Rate limit reached", "tokens", *RATE), THROTTLED, *RATE, headers={"retry-after": "Mon, 30 Nov 2026 12:00:45 GMT"}, wait_s=45.0),
    form("facts 6, shell_gpt#653", 429, error("Request too large for gpt-4o in organization org-X on tokens per min (TPM): Limit 30000, Requested 31538. The input or output tokens must be reduced in order to run successfully.", "tokens", *RATE), TOO_LARGE, *RATE),
    form("UKGovernmentBEIS/inspect_ai#1396", 429, error("Request too large for gpt-4o in organization org-X on tokens per min (TPM): Limit 250000, Requested 546. The input or output tokens must be reduced in order to run successfully.", "tokens", *RATE), THROTTLED, *RATE),
    form("facts 6, classic", 429, error("You exceeded your current quota, please check your plan and billing details.", "insufficient_quota", "insufficient_quota"), QUOTA, "insufficient_quota"),
    form("facts 6, type alone", 429, error("You exceeded your current quota, please check your plan.", "insufficient_quota"), QUOTA, "insufficient_quota"),
    form("facts 6, neither type nor code", 429, error("You exceeded your current quota, please check your plan and billing details."), QUOTA),
    *(form("facts 6, help.openai.com 6614457", 429, error("You have no credits remaining. Add credits.", "insufficient_quota", code), QUOTA, code) for code in ("credit_balance_exhausted", "organization_spend_limit_exceeded", "project_spend_limit_exceeded", "organization_usage_limit_exceeded")),
    form("docs openai, billing", 429, error("Billing hard limit has been reached", "invalid_request_error", "billing_hard_limit_reached"), QUOTA, "billing_hard_limit_reached"),
    form("docs openai, billing", 429, error("Your account is not active, please check your billing details.", "billing_not_active", "billing_not_active"), QUOTA, "billing_not_active"),
    form("NousResearch/hermes-agent#57235", 429, error("The usage limit has been reached", "usage_limit_reached", plan_type="plus", resets_at=1_796_083_200, resets_in_seconds=42_000), QUOTA, "usage_limit_reached", wait_s=42_000.0, returns_at=1_796_083_200.0),
    form("facts 6, ramp", 429, error("Too fast: reduce your request rate", "rate_limit_error", "slow_down"), SLOW_DOWN, "slow_down"),
    form("facts 6, ramp before 2026", 503, error("Slow down", "service_unavailable_error", "slow_down"), SLOW_DOWN, "slow_down"),
    form("facts 6, flex", 429, error("Resource Unavailable", "invalid_request_error", "resource_unavailable"), THROTTLED, "resource_unavailable"),
    form("facts 13, flex, bare", 429, {"error": "Resource Unavailable"}, THROTTLED),
    form("facts 6", 503, error("The server is overloaded", "service_unavailable_error", "server_is_overloaded"), OVERLOADED, "server_is_overloaded"),
    form("facts 6", 500, error("The server had an error while processing your request. Sorry about that!", "server_error"), SERVER_ERROR, "server_error"),
    form("docs openai, engine", 503, error("That model is currently overloaded with other requests.", "server_error"), SERVER_ERROR, "server_error"),
    form("docs openai, 401", 401, error("Incorrect API key provided: k. You can find your API key in your account.", "invalid_request_error", "invalid_api_key"), UNAUTHORIZED, "invalid_api_key"),
    form("docs openai, 401", 401, error("You must be a member of an organization to use the API", "invalid_request_error"), UNAUTHORIZED, "invalid_request_error"),
    form("docs openai, deactivated", 401, error("The OpenAI account associated with this API key has been deactivated.", "invalid_request_error", "account_deactivated"), UNAUTHORIZED, "account_deactivated"),
    form("docs openai, 403", 403, error("Country, region, or territory not supported", "request_forbidden", "unsupported_country_region_territory"), BAD_REQUEST, "unsupported_country_region_territory"),
    form("case a7", 404, error("The model `gpt-9` does not exist or you do not have access to it.", "invalid_request_error", "model_not_found"), BAD_REQUEST, "model_not_found"),
    form("docs openai, wrong address", 404, error("Invalid URL (POST /chat/completions)", "invalid_request_error"), BAD_REQUEST, "invalid_request_error"),
    form("facts 6, opencode#140", 400, error("max_tokens is too large: 50000. This model supports at most 32768 completion tokens.", "invalid_request_error", "invalid_value"), BAD_REQUEST, "invalid_value"),
    form("facts 6", 400, error("This model's maximum context length is 128000 tokens.", "invalid_request_error", "context_length_exceeded"), BAD_REQUEST, "context_length_exceeded"),
    form("docs openai, moderation", 400, error("Your request was rejected as a result of our safety system.", "invalid_request_error", "moderation_blocked"), BAD_REQUEST, "moderation_blocked"),
    form("docs openai, 409", 409, error("Conflict", "invalid_request_error"), SERVER_ERROR, "invalid_request_error"),
    form("facts 7, 408", 408, error("Request timeout", "timeout"), TIMEOUT, "timeout"),
    form("facts 8", 200, chat(), OK, **ANSWERED),
    form("facts 5", 200, chat(), OK, headers={"x-ratelimit-limit-requests": "30000", "x-ratelimit-remaining-requests": "29999", "x-ratelimit-reset-requests": "2ms", "x-ratelimit-limit-tokens": "150000000", "x-ratelimit-remaining-tokens": "149999982", "x-ratelimit-reset-tokens": "0s"}, limits={"RPM": (30000, 29999), "TPM": (150_000_000, 149_999_982)}, **ANSWERED),
    form("facts 5, day", 200, chat(), OK, headers={"x-ratelimit-limit-requests": "200", "x-ratelimit-remaining-requests": "199", "x-ratelimit-reset-requests": "7m12s"}, limits={"RPD": (200, 199)}, **ANSWERED),
    form("facts 5, project", 200, chat(), OK, headers={"x-ratelimit-limit-tokens": "150000000", "x-ratelimit-remaining-tokens": "149999982", "x-ratelimit-limit-project-tokens": "60000", "x-ratelimit-remaining-project-tokens": "57000", "x-ratelimit-reset-project-tokens": "3s"}, limits={"TPM": (60_000, 57_000)}, **ANSWERED),
    form("facts 4, usage-based", 200, chat(), OK, headers={"x-ratelimit-limit-tokens_usage_based": "5000000", "x-ratelimit-remaining-tokens_usage_based": "1212010"}, **ANSWERED),
    form("docs openai, refusal", 200, chat(None, message={"refusal": "I can't help with that."}), OK, **ANSWERED),
    form("docs openai, length", 200, chat("", "length"), OK, used=USED, cut_off=True),
    form("docs openai, tools", 200, chat(None, "tool_calls", message={"tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}), OK, used=USED),
    form("docs openai, content_filter", 200, chat("", "content_filter"), OK, used=USED),
    form("docs openai, completions", 200, {"choices": [{"text": "once", "finish_reason": "stop"}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}, OK, used=(1, 2), has_text=True),
    form("docs openai, embeddings", 200, {"data": [{"embedding": [0.1]}], "usage": {"prompt_tokens": 8, "total_tokens": 8}}, OK, used=(8, 0)),
    form("docs openai, responses", 200, response(), OK, used=USED_RESPONSE, has_text=True),
    form("docs openai, responses refusal", 200, response(text=None, output=[{"type": "message", "content": [{"type": "refusal", "refusal": "No."}]}]), OK, used=USED_RESPONSE, has_text=True),
    form("docs openai, incomplete", 200, response("incomplete", None, incomplete_details={"reason": "max_output_tokens"}), OK, used=USED_RESPONSE, cut_off=True),
    form("docs openai, incomplete", 200, response("incomplete", None, incomplete_details={"reason": "content_filter"}), OK, used=USED_RESPONSE),
    form("facts 6, response.failed in a 200", 200, response("failed", None, error={"code": "rate_limit_exceeded", "message": rate("TPM", 30000, 29937, 385, "644ms")}), THROTTLED, *RATE, wait_s=0.644, used=USED_RESPONSE),
    form("openai/codex, fixture of a stream", 200, {"type": "response.failed", "response": response("failed", None, error={"code": "rate_limit_exceeded", "message": "Please try again in 11.054s."})}, THROTTLED, *RATE, wait_s=11.054, used=USED_RESPONSE),
    form("docs openai, server_error in a response", 200, response("failed", None, error={"code": "server_error", "message": "An error occurred"}), SERVER_ERROR, "server_error", used=USED_RESPONSE),
    form("docs openai, invalid_prompt in a response", 200, response("failed", None, error={"code": "invalid_prompt", "message": "flagged"}), BAD_REQUEST, "invalid_prompt", used=USED_RESPONSE),
    form("docs openai, failed without a reason", 200, response("failed", None), SERVER_ERROR, "server_error", used=USED_RESPONSE),
    form("docs openai, vector_store_timeout", 200, response("failed", None, error={"code": "vector_store_timeout", "message": ""}), SERVER_ERROR, "vector_store_timeout", used=USED_RESPONSE),
    form("case a9", 200, response("queued", None), MALFORMED, used=USED_RESPONSE),
    form("case a9", 200, response("in_progress", None), MALFORMED, used=USED_RESPONSE),
    form("docs openai, cancelled", 200, response("cancelled", None), MALFORMED, used=USED_RESPONSE),
    form("docs openai, stream error event", 200, {"type": "error", "code": "rate_limit_exceeded", "message": "Please try again in 2s.", "param": None}, THROTTLED, *RATE, wait_s=2.0),
    form("docs openai, a stream nobody asked for", 200, 'event: response.completed\ndata: {"type":"response.completed","response":' + json.dumps(response()) + "}\n\n", OK, used=USED_RESPONSE, has_text=True),
]  # fmt: skip

# ---------------------------------------------------------------- Azure

AZURE_OLD = "Requests to the ChatCompletions_Create Operation under Azure OpenAI API version 2023-05-15 have exceeded token rate limit of your current AIServices S0 pricing tier. Please retry after 86400 seconds."
AZURE_FILTER = error(
    "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
    None,
    "content_filter",
    status=400,
    innererror={
        "code": "ResponsibleAIPolicyViolation",
        "content_filter_result": {"hate": {"filtered": True, "severity": "high"}},
    },
)

AZURE = [
    form("jasonacox/TinyLLM#17", 429, {"error": {"code": "429", "message": AZURE_OLD}}, THROTTLED, "429", wait_s=86_400.0),
    form("icereed/paperless-gpt#814", 429, {"error": {"code": "429", "message": "Your requests to gpt-4o for gpt-4o in East US have exceeded token rate limit. Please retry after 4 seconds."}}, THROTTLED, "429", wait_s=4.0),
    form("openai/openai-python#937", 429, {"error": {"code": "429", "message": "Requests have exceeded token rate limit."}}, THROTTLED, "429", headers={"x-rate-limit-reset-tokens": "55", "x-ratelimit-remaining-requests": "79"}, wait_s=55.0),
    form("docs azure, x-ms-retry-after-ms", 429, {"error": {"code": "429", "message": "busy"}}, THROTTLED, "429", headers={"x-ms-retry-after-ms": "1500", "retry-after": "2"}, wait_s=1.5),
    form("openai/openai-dotnet#838", 429, {"error": {"code": "too_many_requests", "message": "Too Many Requests"}}, THROTTLED, "too_many_requests", headers={"x-ratelimit-limit-tokens": "-1", "x-ratelimit-remaining-tokens": "-1", "x-ratelimit-reset-tokens": "0"}),
    form("facts 5, negative remaining", 429, {"error": {"code": "429", "message": "busy"}}, THROTTLED, "429", headers={"retry-after": "4", "x-ratelimit-limit-tokens": "120000", "x-ratelimit-remaining-tokens": "-27689", "x-ratelimit-reset-tokens": "64"}, wait_s=4.0, limits={"TPM": (120_000, -27_689)}),
    form("facts 5, integer ms", 200, chat(), OK, headers={"x-ratelimit-limit-requests": "120", "x-ratelimit-remaining-requests": "119", "x-ratelimit-reset-requests": "500"}, limits={"RPM": (120, 119)}, **ANSWERED),
    form("facts 13, a slice of ten seconds", 200, chat(), OK, headers={"x-ratelimit-limit-requests": "120", "x-ratelimit-remaining-requests": "19"}, limits={"RPM": (120, 19)}, **ANSWERED),
    form("facts 5, 2024", 200, chat(), OK, headers={"x-ratelimit-remaining-requests": "79", "x-ratelimit-remaining-tokens": "61353"}, **ANSWERED),
    form("openai/openai-python#331", 400, error("The response was filtered", None, "content_filter", status=400), BAD_REQUEST, "content_filter"),
    form("compl-ai/compl-ai#20", 400, AZURE_FILTER, BAD_REQUEST, "content_filter"),
    form("docs azure, deployment", 404, {"error": {"code": "DeploymentNotFound", "message": "The API deployment for this resource does not exist."}}, BAD_REQUEST, "DeploymentNotFound"),
    form("docs azure, wrong path", 404, {"error": {"code": "404", "message": "Resource not found"}}, BAD_REQUEST, "404"),
    form("docs azure, key", 401, {"error": {"code": "401", "message": "Access denied due to invalid subscription key or wrong API endpoint."}}, UNAUTHORIZED, "401"),
    form("docs azure, token", 401, {"error": {"code": "Unauthorized", "message": "Access token is missing, invalid, audience is incorrect, or have expired."}}, UNAUTHORIZED, "Unauthorized"),
    form("docs azure, network rules", 403, {"error": {"code": "AccessDenied", "message": "Access denied due to Virtual Network/Firewall rules."}}, BAD_REQUEST, "AccessDenied"),
    form("docs azure, 424", 424, {"error": {"code": "FailedDependency", "message": "The upstream did not answer"}}, SERVER_ERROR, "FailedDependency"),
    form("docs azure, provisioned", 429, {"error": {"code": "NoCapacity", "message": "The system is currently experiencing high demand."}}, THROTTLED, "NoCapacity"),
    form("docs azure, internal", 500, {"error": {"code": "InternalServerError", "message": "Internal server error"}}, SERVER_ERROR, "InternalServerError"),
    form("docs azure, timeout", 408, {"error": {"code": "Timeout", "message": "The operation was timeout."}}, TIMEOUT, "Timeout"),
    form("docs azure APIM", 429, {"statusCode": 429, "message": "Rate limit is exceeded. Try again in 22 seconds."}, THROTTLED, wait_s=22.0),
    form("docs azure APIM, quota", 403, {"statusCode": 403, "message": "Out of call volume quota. Quota will be replenished in 18:46:21."}, BAD_REQUEST),
    form("docs azure APIM, key", 401, {"statusCode": 401, "message": "Access denied due to missing subscription key."}, UNAUTHORIZED),
    form("microsoft/foundry-dev-tools#222", 429, {"error": {"code": "RateLimitReached", "message": "Rate limit of 40000 per 60s exceeded for UserByModelByMinuteTokens. Please wait 60 seconds before retrying.", "details": "Rate limit of 40000 per 60s exceeded."}}, THROTTLED, "RateLimitReached", wait_s=60.0),
    form("docs GitHub Models, a day", 429, {"error": {"code": "RateLimitReached", "message": "Rate limit of 150 per 86400s exceeded for UserByModelByDay. Please wait 55555 seconds before retrying."}}, THROTTLED, "RateLimitReached", wait_s=55_555.0),
]  # fmt: skip

# ---------------------------------------------------------------- Anthropic

ANTHROPIC = [
    form("BerriAI/litellm#8293", 429, anthropic("rate_limit_error", "This request would exceed your organization's rate limit of 80,000 input tokens per minute."), THROTTLED, "rate_limit_error", headers={"retry-after": "17"}, wait_s=17.0),
    form("anthropics/claude-code#46156", 429, anthropic("rate_limit_error", "This request would exceed your account's rate limit. Please try again later."), THROTTLED, "rate_limit_error"),
    form("anthropics/claude-code#29584", 429, anthropic("rate_limit_error", "Extra usage is required for long context requests."), BAD_REQUEST, "rate_limit_error"),
    form("anthropics/claude-code#38035", 400, anthropic("invalid_request_error", "You have reached your specified API usage limits. You will regain access on 2027-01-01 at 00:00 UTC."), QUOTA, "invalid_request_error", returns_at=epoch(2027, 1, 1)),
    form("case a12", 429, anthropic("rate_limit_error", "You have reached your specified API usage limits. You will regain access on 2026-12-01 at 00:00 UTC."), QUOTA, "rate_limit_error", returns_at=epoch(2026, 12, 1)),
    form("BerriAI/litellm#37592", 400, anthropic("invalid_request_error", "You have reached your specified API usage limits. You will regain access on 2027-01-01"), QUOTA, "invalid_request_error", returns_at=epoch(2027, 1, 1)),
    form("anthropics/claude-code#66314", 400, anthropic("invalid_request_error", "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing."), QUOTA, "invalid_request_error"),
    form("docs anthropic, 401", 401, anthropic("authentication_error", "invalid x-api-key"), UNAUTHORIZED, "authentication_error"),
    form("docs anthropic, 403", 403, anthropic("permission_error", "Your API key does not have permission to use the specified resource."), BAD_REQUEST, "permission_error"),
    form("docs anthropic, 404", 404, anthropic("not_found_error", "model: claude-9"), BAD_REQUEST, "not_found_error"),
    form("docs anthropic, disabled", 400, anthropic("invalid_request_error", "This organization has been disabled."), UNAUTHORIZED, "invalid_request_error"),
    form("docs anthropic, 413", 413, anthropic("request_too_large", "Request exceeds the maximum size"), TOO_LARGE, "request_too_large"),
    form("docs anthropic, 500", 500, anthropic("api_error", "Internal server error"), SERVER_ERROR, "api_error"),
    form("docs anthropic, 504", 504, anthropic("timeout_error", "The request timed out"), SERVER_ERROR, "timeout_error"),
    form("docs anthropic, 529", 529, anthropic("overloaded_error", "Overloaded"), OVERLOADED, "overloaded_error"),
    form("docs anthropic, a stream's event", 200, anthropic("overloaded_error", "Overloaded"), OVERLOADED, "overloaded_error"),
    form("docs anthropic, long prompt", 400, anthropic("invalid_request_error", "prompt is too long: 210000 tokens > 200000 maximum"), BAD_REQUEST, "invalid_request_error"),
    form("facts 5, headers", 200, chat(), OK, headers={"anthropic-ratelimit-requests-limit": "50", "anthropic-ratelimit-requests-remaining": "49", "anthropic-ratelimit-requests-reset": "2026-11-30T12:00:01Z", "anthropic-ratelimit-input-tokens-limit": "40000", "anthropic-ratelimit-input-tokens-remaining": "39000"}, limits={"RPM": (50, 49), "TPM": (40_000, 39_000)}, **ANSWERED),
    form("anthropics/claude-code#3197", 520, "<!DOCTYPE html>\n<!--[if lt IE 7]> <html class=\"no-js\"> <![endif]-->\n<html><head><title>api.anthropic.com | 520: Web server is returning an unknown error</title></head></html>", SERVER_ERROR),
]  # fmt: skip

# ---------------------------------------------------------------- Bedrock and Gemini

CLOUDS = [
    form("anthropics/claude-code#1466", 429, {"message": "Too many tokens, please wait before trying again."}, THROTTLED, headers={"x-amzn-errortype": "ThrottlingException"}),
    form("Ivy-Interactive/Ivy-Tendril#1756", 429, {"message": "Too many tokens per day, please wait before trying again."}, QUOTA),
    form("minorun365/agent-book#29", 429, {"__type": "ThrottlingException", "message": "Too many tokens per day, please wait before trying again."}, QUOTA, "ThrottlingException"),
    form("case a12, in OpenAI's shape", 429, error("Too many tokens per day, please wait before trying again.", "rate_limit_error", *RATE), QUOTA, *RATE),
    form("docs bedrock", 429, {"message": "Too many requests, please wait before trying again."}, THROTTLED),
    form("docs bedrock", 400, {"__type": "com.amazon.coral.service#ThrottlingException", "message": "Rate exceeded"}, THROTTLED, "com.amazon.coral.service#ThrottlingException"),
    form("docs bedrock", 503, {"message": "Bedrock is unable to process your request."}, OVERLOADED, headers={"x-amzn-errortype": "ServiceUnavailableException"}),
    form("docs bedrock", 429, {"__type": "ModelNotReadyException", "message": "The model is not ready for inference."}, THROTTLED, "ModelNotReadyException"),
    form("docs bedrock", 424, {"__type": "ModelErrorException", "message": "The model failed."}, SERVER_ERROR, "ModelErrorException"),
    form("docs bedrock", 408, {"__type": "ModelTimeoutException", "message": "Processing time exceeded the model timeout length."}, TIMEOUT, "ModelTimeoutException"),
    form("docs bedrock", 403, {"Message": "User is not authorized to perform: bedrock:InvokeModel"}, BAD_REQUEST),
    form("docs bedrock", 403, {"__type": "UnrecognizedClientException", "message": "The security token included in the request is invalid."}, UNAUTHORIZED, "UnrecognizedClientException"),
    form("anthropics/claude-code#1466, comment", 400, {"__type": "ValidationException", "message": "Invocation of model ID with on-demand throughput isn't supported."}, BAD_REQUEST, "ValidationException"),
    form("google-gemini/gemini-cli#8437", 429, google(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota, please check your plan and billing details.", violation("GenerateRequestsPerMinutePerProjectPerModel-FreeTier"), violation("GenerateRequestsPerDayPerProjectPerModel-FreeTier")), QUOTA, "429"),
    form("facts 13, a minute's quota", 429, google(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota. Please retry in 34.07s.", violation("GenerateContentInputTokensPerModelPerMinute-FreeTier"), retry_info("34s")), THROTTLED, "429", wait_s=34.0),
    form("googleapis/python-genai#2065", 429, google(429, "RESOURCE_EXHAUSTED", "Resource has been exhausted (e.g. check quota)."), THROTTLED, "429"),
    form("google-gemini/gemini-cli#14811", 429, [google(429, "RESOURCE_EXHAUSTED", "Resource exhausted. Please try again later.")], THROTTLED, "429"),
    form("google-gemini/gemini-cli#7392", 503, google(503, "UNAVAILABLE", "The model is overloaded. Please try again later."), OVERLOADED, "503"),
    form("docs gemini, 500", 500, google(500, "INTERNAL", "An internal error has occurred."), SERVER_ERROR, "500"),
    form("docs gemini, 504", 504, google(504, "DEADLINE_EXCEEDED", "Deadline expired before operation could complete."), SERVER_ERROR, "504"),
    form("docs gemini, key", 400, google(400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.", {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}), UNAUTHORIZED, "400"),
    form("docs gemini, expired", 400, google(400, "INVALID_ARGUMENT", "API key expired. Please renew the API key."), UNAUTHORIZED, "400"),
    form("docs gemini, 403", 403, google(403, "PERMISSION_DENIED", "Generative Language API has not been used in project 1 before or it is disabled."), BAD_REQUEST, "403"),
    form("docs gemini, 404", 404, google(404, "NOT_FOUND", "models/gemini-9 is not found for API version v1beta"), BAD_REQUEST, "404"),
    form("docs gemini, location", 400, google(400, "FAILED_PRECONDITION", "User location is not supported for the API use."), BAD_REQUEST, "400"),
    form("docs vertex, 499", 499, google(499, "CANCELLED", "The operation was cancelled."), SERVER_ERROR, "499"),
]  # fmt: skip

# ---------------------------------------------------------------- other providers

OTHERS = [
    form("continuedev/continue#10920", 429, error("Rate limit reached for model `llama-3.3-70b-versatile` in organization `org_x` service tier `on_demand` on tokens per day (TPD): Limit 100000, Used 97050, Requested 3619. Please try again in 9m38.016s. Need more tokens?", "tokens", *RATE), THROTTLED, *RATE, wait_s=578.016),
    form("ago19800/HomeMind#29", 429, error("Rate limit reached for model `llama` on tokens per minute (TPM): Limit 12000, Used 2542, Requested 9855. Please try again in 1.984999999s.", "tokens", *RATE), THROTTLED, *RATE, wait_s=1.984999999),
    form("HunorLaczko/ha-groq-cloud-api#27", 413, error("Request too large for model llama-3.1-8b-instant on tokens per minute (TPM): Limit 6000, Requested 12328, please reduce your message size and try again.", "tokens", *RATE), TOO_LARGE, *RATE),
    form("OpenHands/OpenHands#4167", 429, error("Rate limit reached for model `llama` on tokens per minute (TPM): Limit 7000, Used 0, Requested 7895. Please try again in 7.671428571s.", "tokens", *RATE), TOO_LARGE, *RATE, wait_s=7.671428571),
    form("case a8", 498, error("Flex tier capacity exceeded", "capacity_exceeded", "capacity_exceeded"), OVERLOADED, "capacity_exceeded"),
    form("case a8, without a body", 498, "", OVERLOADED),
    form("docs groq, headers", 200, chat(), OK, headers={"x-ratelimit-limit-requests": "14400", "x-ratelimit-remaining-requests": "14370", "x-ratelimit-reset-requests": "2m59.56s", "x-ratelimit-limit-tokens": "18000", "x-ratelimit-remaining-tokens": "17997", "x-ratelimit-reset-tokens": "10ms"}, limits={"RPD": (14_400, 14_370), "TPM": (18_000, 17_997)}, **ANSWERED),
    form("docs groq, network", 403, error("Access denied. Please check your network settings.", "forbidden"), BAD_REQUEST, "forbidden"),
    form("nminaya/grammar-nazi-bot#958", 429, {"message": "Requests per minute limit exceeded - too many requests sent.", "type": "too_many_requests_error", "param": "quota", "code": "request_quota_exceeded"}, THROTTLED, "request_quota_exceeded"),
    form("continuedev/continue#9800", 429, {"message": "Tokens per minute limit exceeded - too many tokens processed.", "type": "too_many_tokens_error", "param": "quota", "code": "token_quota_exceeded"}, THROTTLED, "token_quota_exceeded"),
    form("docs cerebras, queue", 429, {"message": "We're experiencing high traffic right now! Please try again soon.", "type": "too_many_requests_error", "param": "queue", "code": "queue_exceeded"}, THROTTLED, "queue_exceeded"),
    form("docs cerebras, headers", 200, chat(), OK, headers={"x-ratelimit-limit-requests-day": "14400", "x-ratelimit-remaining-requests-day": "14399", "x-ratelimit-reset-requests-day": "33011.38", "x-ratelimit-limit-tokens-minute": "60000", "x-ratelimit-remaining-tokens-minute": "59000", "x-ratelimit-reset-tokens-minute": "11.38"}, limits={"RPD": (14_400, 14_399), "TPM": (60_000, 59_000)}, **ANSWERED),
    form("raycast/extensions#31107", 429, {"object": "error", "message": "Rate limit exceeded", "type": "rate_limited", "param": None, "code": "1300", "raw_status_code": 429}, THROTTLED, "1300"),
    form("continuedev/continue#6185", 429, {"object": "error", "message": "Service tier capacity exceeded for this model.", "type": "invalid_request_error", "param": None, "code": None}, THROTTLED, "invalid_request_error"),
    form("docs mistral, 401", 401, {"detail": "Unauthorized"}, UNAUTHORIZED),
    form("docs mistral, 422", 422, {"detail": [{"type": "missing", "loc": ["body", "model"], "msg": "Field required"}]}, BAD_REQUEST),
    form("mistralai/client-ts#169", 200, chat(), OK, headers={"x-ratelimit-limit-tokens-minute": "5000000", "x-ratelimit-remaining-tokens-minute": "4999911", "x-ratelimit-tokens-query-cost": "52", "x-ratelimit-limit-req-minute": "720", "x-ratelimit-remaining-req-minute": "717"}, limits={"TPM": (5_000_000, 4_999_911), "RPM": (720, 717)}, **ANSWERED),
    form("Aider-AI/aider#4851", 402, error("Insufficient Balance", "unknown_error", "invalid_request_error"), QUOTA, "invalid_request_error"),
    form("docs deepseek, finish", 200, chat("half", "insufficient_system_resource"), OVERLOADED, "insufficient_system_resource", used=USED),
    form("docs deepseek, 503", 503, error("Service is too busy.", "service_unavailable_error"), OVERLOADED, "service_unavailable_error"),
    form("continuedev/continue#10373", 429, {"code": "The caller does not have permission", "error": "Your team 1 has either used all available credits or reached its monthly spending limit."}, QUOTA, "The caller does not have permission"),
    form("docs xai, model", 404, {"code": "Some requested entity was not found", "error": "The model grok-9 does not exist."}, BAD_REQUEST, "Some requested entity was not found"),
    form("xtekky/gpt4free#3032", 429, error("You have reached the rate limit specific to this model. The maximum rate limit for this model is 9.0 queries per minute.", "model_rate_limit"), THROTTLED, "model_rate_limit"),
    form("docs together, headers", 200, chat(), OK, headers={"x-ratelimit-limit": "600", "x-ratelimit-remaining": "599", "x-ratelimit-reset": "1", "x-tokenlimit-limit": "180000", "x-tokenlimit-remaining": "179000"}, limits={"RPM": (600, 599), "TPM": (180_000, 179_000)}, **ANSWERED),
    form("GordeyZuev/LEAP#6", 429, {"error": "Too Many Requests", "message": "You have exceeded your usage limits. Please try again later."}, THROTTLED),
    form("huggingface/transformers#23793", 503, {"error": "Model x is currently loading", "estimated_time": 20.0}, OVERLOADED, wait_s=20.0),
    form("huggingface/text-generation-inference#439", 429, {"error": "Model is overloaded", "error_type": "overloaded"}, THROTTLED, "overloaded"),
    form("docs TGI, validation", 422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096", "error_type": "validation"}, BAD_REQUEST, "validation"),
    form("docs zhipu, balance", 429, {"error": {"code": "1113", "message": "Your account is in arrears"}}, QUOTA, "1113"),
    form("docs zhipu, rate", 429, {"error": {"code": "1302", "message": "Concurrency too high"}}, THROTTLED, "1302"),
    form("docs minimax, rate in a 200", 200, {"choices": None, "base_resp": {"status_code": 1002, "status_msg": "rate limit"}}, THROTTLED, "minimax_1002"),
    form("docs minimax, balance in a 200", 200, {"choices": None, "base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}, QUOTA, "minimax_1008"),
    form("docs minimax, fine", 200, chat(base_resp={"status_code": 0, "status_msg": ""}), OK, **ANSWERED),
    form("docs moonshot", 429, error("The engine is currently overloaded, please try again later", "engine_overloaded_error"), THROTTLED, "engine_overloaded_error"),
    form("docs dashscope", 429, error("Requests rate limit exceeded, please try again later.", "Throttling.RateQuota", "Throttling.RateQuota"), THROTTLED, "Throttling.RateQuota"),
    form("docs dashscope, inspection", 400, error("Input data may contain inappropriate content.", "data_inspection_failed", "data_inspection_failed"), BAD_REQUEST, "data_inspection_failed"),
]  # fmt: skip

# ---------------------------------------------------------------- gateways, and servers of one's own

NO_CREDIT = {
    "error": {
        "message": "This request requires more credits, or fewer max_tokens. You requested up to 64000 tokens, but can only afford 2666.",
        "code": 402,
        "metadata": {"provider_name": None},
    }
}


def openrouter(message: str, code: int, **metadata: Any) -> dict[str, Any]:
    return {"error": {"message": message, "code": code, "metadata": metadata}, "user_id": "user_1"}


def counted(limit: int, remaining: int, resets_at: float) -> dict[str, str]:
    return {
        "X-RateLimit-Limit": str(limit),
        "X-RateLimit-Remaining": str(remaining),
        "X-RateLimit-Reset": f"{resets_at * 1000:.0f}",
    }


GATEWAYS = [
    form("case a1", 200, chat(None, error={"message": "Provider returned error", "code": 429, "metadata": {"raw": "error code: 1015", "provider_name": "Kluster"}}), THROTTLED, "429", used=USED),
    form("case a2", 200, {"error": {"code": 502, "message": "Your chosen model is down"}}, SERVER_ERROR, "502"),
    form("case a3", 200, chat("", "error", choice={"error": {"code": 502, "message": "Provider disconnected"}}), SERVER_ERROR, "502", used=USED),
    form("maximhq/bifrost#5425", 200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": '{"events": ['}, "finish_reason": "error"}], "usage": {"prompt_tokens": None, "completion_tokens": None, "total_tokens": 0}}, SERVER_ERROR, "error"),
    form("anomalyco/opencode#44358", 200, chat("", "network_error"), SERVER_ERROR, "network_error", used=USED),
    form("genkit-ai/genkit#6259", 200, chat("half an answer", "stop", choice={"error": {"code": 429, "message": "upstream"}}), THROTTLED, "429", used=USED),
    form("docs openrouter, one of two choices", 200, {"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}, {"message": {"content": ""}, "finish_reason": "error", "error": {"code": 503, "message": "down"}}]}, OVERLOADED, "503"),
    form("case a4", 403, openrouter("Input was flagged", 403, reasons=["violence"], flagged_input="..."), BAD_REQUEST, "403"),
    form("case a6", 402, NO_CREDIT, BAD_REQUEST, "402"),
    form("facts 13, a budget in flight", 402, openrouter("The key's budget is in use by other requests", 402), THROTTLED, "402", headers={"retry-after": "8"}, wait_s=8.0),
    form("BerriAI/litellm#37592", 402, openrouter("Insufficient credits. Add more using https://openrouter.ai/settings/credits", 402), QUOTA, "402"),
    form("BerriAI/litellm#9035", 429, openrouter("Rate limit exceeded: limit_rpd/google/gemini", 429, headers=counted(80, 0, epoch(2026, 12, 1))), QUOTA, "429", returns_at=epoch(2026, 12, 1)),
    form("Gitlawb/openclaude#936", 429, openrouter("Rate limit exceeded: free-models-per-day. Add 10 credits to unlock 1000 free model requests per day", 429, headers=counted(50, 0, epoch(2026, 12, 1))), QUOTA, "429", returns_at=epoch(2026, 12, 1)),
    form("docs openrouter, per minute", 429, openrouter("Rate limit exceeded: free-models-per-min", 429, headers=counted(20, 0, NOW + 34.0)), THROTTLED, "429", wait_s=34.0),
    form("open-webui/computer#293", 429, openrouter("Provider returned error", 429, raw="z-ai/glm is temporarily rate-limited upstream. Please retry shortly.", provider_name="BaseTen"), THROTTLED, "429"),
    form("docs openrouter, moderation of the provider", 400, openrouter("Provider returned error", 400, raw='{"error":{"code":"content_filter"}}'), BAD_REQUEST, "400"),
    form("docs openrouter, no endpoints", 404, openrouter("No endpoints found that support tool use", 404), BAD_REQUEST, "404"),
    form("docs openrouter, a stream's error", 200, 'data: {"id":"gen","choices":[{"delta":{"content":"hal"}}]}\n\ndata: {"id":"gen","error":{"code":502,"message":"Provider disconnected"},"choices":[{"delta":{},"finish_reason":"error"}]}\n\ndata: [DONE]\n', SERVER_ERROR, "502"),
    form("BerriAI/litellm#20867", 429, error("No deployments available for selected model, Try again in 60 seconds. Passed model=gpt-4o.", "None", "429"), THROTTLED, "429", wait_s=60.0),
    form("jasonacox/TinyLLM#17, by a proxy", 429, error(f"litellm.RateLimitError: AzureException RateLimitError - {AZURE_OLD}", "throttling_error", "429"), THROTTLED, "429", wait_s=86_400.0),
    form("BerriAI/litellm#37599", 400, error("litellm.BadRequestError: AnthropicException - b'You have reached your specified API usage limits. You will regain access on 2027-01-01 at 00:00 UTC.'", None, "400"), QUOTA, "400", returns_at=epoch(2027, 1, 1)),
    form("docs litellm, budget", 400, error("Budget has been exceeded! Current cost: 10.2, Max budget: 10.0", "budget_exceeded", "400"), QUOTA, "400"),
    form("docs litellm, key without the model", 401, error("key not allowed to access model. This key can only access models=['a']", "key_model_access_denied", "401"), BAD_REQUEST, "401"),
    form("docs litellm, key", 401, error("Authentication Error, Invalid proxy server token passed.", "auth_error", "401"), UNAUTHORIZED, "401"),
    form("docs litellm, limiter v3", 429, {"detail": "Rate limit exceeded for api_key: 88. Limit type: tokens. Current limit: 30000, Remaining: 0. Limit resets at: 2026-11-30 12:00:41 UTC"}, THROTTLED, headers={"retry-after": "41", "rate_limit_type": "tokens"}, wait_s=41.0),
    form("docs litellm, limiter v3 without Retry-After", 429, {"error": {"message": "Rate limit exceeded for team: t. Limit type: requests. Current limit: 100, Remaining: 0. Limit resets at: 2026-11-30 12:00:41 UTC", "type": "None", "code": "429"}}, THROTTLED, "429", wait_s=41.0),
    form("facts 13 and docs litellm, a key's limits", 200, chat(), OK, headers={"x-ratelimit-api_key-limit-tokens": "30000", "x-ratelimit-api_key-remaining-tokens": "29000", "x-ratelimit-api_key-limit-requests": "100", "x-ratelimit-api_key-remaining-requests": "-2"}, limits={"TPM": (30_000, 29_000), "RPM": (100, -2)}, **ANSWERED),
    form("docs litellm, its provider's", 200, chat(), OK, headers={"llm_provider-x-ratelimit-limit-tokens": "450000", "llm_provider-x-ratelimit-remaining-tokens": "449000", "llm_provider-x-ratelimit-reset-tokens": "133ms"}, limits={"TPM": (450_000, 449_000)}, **ANSWERED),
    form("docs slowapi", 429, {"error": "Rate limit exceeded: 100 per 1 minute"}, THROTTLED, headers={"X-RateLimit-Limit": "100", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": f"{NOW + 30:.0f}", "Retry-After": "30"}, wait_s=30.0),
    form("slowapi, tokens as cost", 429, {"error": "Rate limit exceeded: 30000 per 1 minute"}, THROTTLED, headers={"X-RateLimit-Limit": "30000", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": f"{NOW + 54:.0f}", "Retry-After": "54"}, wait_s=54.0),
    form("slowapi, two limits", 200, chat(), OK, headers={"X-RateLimit-Limit": "100, 100", "X-RateLimit-Remaining": "99, 99", "X-RateLimit-Reset": f"{NOW + 60:.0f}, {NOW + 60:.0f}", "Retry-After": "60"}, **ANSWERED),
    form("docs slowapi, a day", 429, {"error": "Rate limit exceeded: 100 per 1 day"}, QUOTA, headers={"X-RateLimit-Limit": "100", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": f"{NOW + 30_000:.0f}"}, returns_at=NOW + 30_000),
    form("slowapi, 12 per 10 s", 429, {"error": "Rate limit exceeded: 12 per 10 second"}, THROTTLED, headers={"X-RateLimit-Limit": "12", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": f"{NOW + 7:.0f}", "Retry-After": "7"}, wait_s=7.0),
    form("slowapi, 12 per 10 s, a window that no header names", 200, chat(), OK, headers={"X-RateLimit-Limit": "12", "X-RateLimit-Remaining": "11", "X-RateLimit-Reset": f"{NOW + 10:.0f}", "Retry-After": "10"}, **ANSWERED),
    form("slowapi, 12 per minute", 200, chat(), OK, headers={"X-RateLimit-Limit": "12", "X-RateLimit-Remaining": "11", "X-RateLimit-Reset": f"{NOW + 60:.0f}", "Retry-After": "60"}, limits={"RPM": (12, 11)}, **ANSWERED),
    form("IETF draft 3, the window beside the limit", 200, chat(), OK, headers={"RateLimit-Limit": "12, 12;w=10", "RateLimit-Remaining": "11", "RateLimit-Reset": "10"}, limits={"RPM": (72, 71)}, **ANSWERED),
    form("docs express-rate-limit, draft 6", 200, chat(), OK, headers={"RateLimit-Policy": "100;w=900", "RateLimit-Limit": "100", "RateLimit-Remaining": "99", "RateLimit-Reset": "900"}, limits={"RPD": (9_600, 9_599)}, **ANSWERED),
    form("IETF draft 9, two policies", 200, chat(), OK, headers={"RateLimit-Policy": '"burst";q=12;w=10,"day";q=1000;w=86400', "X-RateLimit-Limit": "1000", "X-RateLimit-Remaining": "600"}, limits={"RPD": (1_000, 600)}, **ANSWERED),
    form("IETF draft 3, windows that cannot be", 200, chat(), OK, headers={"RateLimit-Limit": "5, 5;w=0", "RateLimit-Remaining": "4", "X-RateLimit-Limit-Second": "1e308", "X-RateLimit-Remaining-Second": "1"}, **ANSWERED),
    form("IETF draft 6, a window beyond all time", 200, chat(), OK, headers={"RateLimit-Policy": "100;w=" + "9" * 400, "RateLimit-Limit": "100", "RateLimit-Remaining": "99"}, **ANSWERED),
    form("docs kong", 200, chat(), OK, headers={"X-RateLimit-Limit-Second": "2", "X-RateLimit-Remaining-Second": "1", "X-RateLimit-Limit-Hour": "500", "X-RateLimit-Remaining-Hour": "499"}, limits={"RPM": (120, 119), "RPD": (12_000, 11_999)}, **ANSWERED),
    form("IETF draft, RateLimit-*", 200, chat(), OK, headers={"RateLimit-Limit": "100", "RateLimit-Remaining": "50", "RateLimit-Reset": "30"}, limits={"RPM": (100, 50)}, **ANSWERED),
    form("docs apisix", 200, chat(), OK, headers={"X-AI-RateLimit-Limit-openai-instance": "3000", "X-AI-RateLimit-Remaining-openai-instance": "2900", "X-AI-RateLimit-Reset-openai-instance": "30"}, limits={"TPM": (3_000, 2_900)}, **ANSWERED),
    form("docs AWS API Gateway", 429, {"message": "Too Many Requests"}, THROTTLED),
    form("docs AWS API Gateway", 403, {"message": "Forbidden"}, BAD_REQUEST),
    form("docs AWS API Gateway", 504, {"message": "Endpoint request timed out"}, SERVER_ERROR),
    form("docs apigee", 429, {"fault": {"faultstring": "Rate limit quota violation.", "detail": {"errorcode": "policies.ratelimit.QuotaViolation"}}}, THROTTLED),
    form("docs Cloudflare AI Gateway", 429, {"success": False, "errors": [{"code": 2003, "message": "Rate limited"}], "result": []}, THROTTLED, "2003"),
    form("docs Cloudflare Workers AI", 401, {"success": False, "errors": [{"code": 10000, "message": "Authentication error"}]}, UNAUTHORIZED, "10000"),
    form("Cloudflare, 1015", 429, "error code: 1015", THROTTLED),
    form("case a5", 403, page("Attention Required! | Cloudflare"), BAD_REQUEST),
    form("acheong08/ChatGPT#1485", 524, page("A timeout occurred"), SERVER_ERROR),
    form("Helicone/helicone#798", 522, page("522: Connection timed out"), SERVER_ERROR),
    form("nginx", 502, page("502 Bad Gateway"), SERVER_ERROR),
    form("nginx", 503, page("503 Service Temporarily Unavailable"), OVERLOADED, headers={"retry-after": "120"}, wait_s=120.0),
    form("nginx", 504, page("504 Gateway Time-out"), SERVER_ERROR),
    form("nginx", 413, page("413 Request Entity Too Large"), TOO_LARGE),
    form("nginx", 404, page("404 Not Found"), BAD_REQUEST, scope=Scope.ADDRESS),
    form("nginx", 405, page("405 Not Allowed"), BAD_REQUEST, scope=Scope.ADDRESS),
    form("nginx", 499, "", SERVER_ERROR),
    form("docs envoy", 503, "upstream connect error or disconnect/reset before headers. reset reason: connection failure", OVERLOADED),
    form("docs envoy", 503, "no healthy upstream", OVERLOADED),
    form("docs envoy", 429, "local_rate_limited", THROTTLED),
    form("HKUSTDial/Alpha-SQL#5", 400, {"object": "error", "message": "This model's maximum context length is 32768 tokens. However, you requested 41648 tokens.", "type": "BadRequestError", "param": None, "code": 400}, BAD_REQUEST, "400"),
    form("docs vllm, model", 404, {"object": "error", "message": "The model `x` does not exist.", "type": "NotFoundError", "param": None, "code": 404}, BAD_REQUEST, "404"),
    form("docs vllm, newer shape", 404, error("The model `x` does not exist.", "NotFoundError", 404), BAD_REQUEST, "404"),
    form("a prompt that is quoted", 422, {"detail": [{"msg": "Value error, got 'insufficient balance: you will regain access on 2099-01-01'"}]}, BAD_REQUEST),
    form("a prompt that is quoted", 400, error("Unsupported parameter. " + "x" * 300 + " insufficient balance", "invalid_request_error"), BAD_REQUEST, "invalid_request_error"),
    form("docs vllm, loading", 503, "", OVERLOADED),
    form("docs vllm, engine", 500, {"object": "error", "message": "EngineCore encountered an issue.", "type": "InternalServerError", "param": None, "code": 500}, SERVER_ERROR, "500"),
    form("docs vllm, aborted", 200, chat("hal", "abort"), SERVER_ERROR, "abort", used=USED),
    form("docs vllm, wrong address", 404, {"detail": "Not Found"}, BAD_REQUEST, scope=Scope.ADDRESS),
    form("docs ollama", 404, error('model "x" not found, try pulling it first', "not_found_error"), BAD_REQUEST, "not_found_error"),
    form("docs ollama, busy", 503, {"error": "server busy, please try again. maximum pending requests exceeded"}, OVERLOADED),
    form("docs llama.cpp, loading", 503, error("Loading model", "unavailable_error", 503), OVERLOADED, "503"),
    form("docs one-api", 503, error("No available channel for model gpt-4o under the current group", "new_api_error", "model_not_found"), BAD_REQUEST, "model_not_found"),
    form("RFC 4918", 423, "", SERVER_ERROR),
    form("RFC 8470", 425, "", SERVER_ERROR),
    form("RFC 9110, 451", 451, error("Unavailable for legal reasons", "invalid_request_error"), BAD_REQUEST, "invalid_request_error"),
    form("RFC 9110, an unknown 4xx that says later", 450, {"message": "Try again in 5 seconds"}, THROTTLED, wait_s=5.0),
    form("issue 12, redirects", 307, "", BAD_REQUEST, headers={"location": "https://elsewhere.example/v1"}, scope=Scope.ADDRESS),
    form("issue 12, redirects", 301, page("301 Moved Permanently"), BAD_REQUEST, headers={"location": "https://api.example/"}, scope=Scope.ADDRESS),
]  # fmt: skip

# ---------------------------------------------------------------- successes that cannot be read, and odd ones that can

NAN = '{"choices": [{"message": {"content": "hi"}, "finish_reason": "stop", "logprobs": NaN}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}'
READ: dict[str, Any] = {"used": (1, 2), "has_text": True}
SMALL = json.dumps(
    {
        "choices": [{"message": {"content": "Grüße"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    },
    ensure_ascii=False,
)

ODD = [
    form("issue 12, base address without /v1", 200, page("LiteLLM API"), MALFORMED, scope=Scope.ADDRESS),
    form("issue 12, a captive portal", 200, "<!doctype html><title>Sign in to Wi-Fi</title>", MALFORMED, scope=Scope.ADDRESS),
    form("cut off", 200, '{"choices": [{"message": {"content": "hel', MALFORMED),
    form("langgenius/dify#9197", 200, {"id": "gen-1", "provider": "x"}, MALFORMED),
    form("docs azure, asynchronous filter", 200, {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 0}}, MALFORMED, used=(1, 0)),
    form("gateways", 200, {"choices": None}, MALFORMED),
    form("gateways", 200, {"choices": [{"delta": {"content": "h"}}]}, MALFORMED),
    form("gateways", 200, 'data: {"choices":[{"delta":{"content":"hel"}}]}\n\ndata: [DONE]\n', MALFORMED),
    form("gateways", 200, "", MALFORMED),
    form("gateways", 200, "null", MALFORMED),
    form("gateways", 200, "ok", MALFORMED),
    form("gateways", 202, {"status": "queued", "id": "1"}, MALFORMED),
    form("gateways", 204, "", MALFORMED),
    form("a list of models in place of embeddings", 200, {"object": "list", "data": []}, MALFORMED),
    form("deeper than any answer", 200, '{"choices":' + "[" * 400 + "]" * 400 + "}", MALFORMED),
    form("deeper than the parser", 200, "[" * 100_000 + "]" * 100_000, MALFORMED),
    form("issue 12, NaN", 200, NAN, OK, **READ),
    form("issue 12, 1e999", 200, NAN.replace("NaN", "1e999"), OK, **READ),
    form("issue 12, a byte order mark", 200, b"\xef\xbb\xbf" + SMALL.encode(), OK, **READ),
    form("issue 12, UTF-16 with a mark", 200, SMALL.encode("utf-16"), OK, **READ),
    form("issue 12, UTF-16 without one", 200, SMALL.encode("utf-16-be"), OK, **READ),
    form("issue 12, UTF-32", 200, SMALL.encode("utf-32"), OK, **READ),
    form("not UTF-8", 200, SMALL.encode("latin-1"), OK, **READ),
    form("white space to keep the connection", 200, "\n\n   \n" + SMALL + "\n", OK, **READ),
    form("an error of null", 200, chat(error=None), OK, **ANSWERED),
    form("an error that is none", 200, chat(error={"code": 0, "message": "success"}), OK, **ANSWERED),
    form("an error that is none", 200, chat(error={"code": 200, "message": ""}), OK, **ANSWERED),
    form("a choice whose error is null", 200, chat(choice={"error": None}), OK, **ANSWERED),
    form("201", 201, chat(), OK, **ANSWERED),
    form("without usage", 200, chat(usage=None), OK, has_text=True),
]  # fmt: skip

FORMS = [*OPENAI, *AZURE, *ANTHROPIC, *CLOUDS, *OTHERS, *GATEWAYS, *ODD]
