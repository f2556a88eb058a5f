"""Codes, statuses and phrases of refusals with their meanings: the data of `answers`.

To support another provider, add rows here. One row for each form seen in the wild, with its source, is in
tests/answers.
"""

from __future__ import annotations

import re

from governor.model.requests import Outcome

QUOTA_CODES = frozenset(
    {
        "insufficient_quota",
        "credit_balance_exhausted",
        "organization_spend_limit_exceeded",
        "project_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
        "billing_hard_limit_reached",
        "billing_not_active",
    }
)
# Codes, types and gRPC statuses in lower case, which count whatever the HTTP status is; the first match wins.
BY_WORD: tuple[tuple[Outcome, frozenset[str]], ...] = (
    (
        Outcome.QUOTA,
        # ChatGPT plans, LiteLLM's budgets, Zhipu and MiniMax without balance.
        QUOTA_CODES | {"usage_limit_reached", "budget_exceeded", "1113", "minimax_1008", "billing_error"},
    ),
    (Outcome.SLOW_DOWN, frozenset({"slow_down"})),
    (Outcome.TOO_LARGE, frozenset({"request_too_large"})),
    (
        # This request's own fault, though its status may point to the key (LiteLLM: 401 for one model).
        Outcome.BAD_REQUEST,
        frozenset(
            {
                *("content_filter", "content_policy_violation", "moderation_blocked", "invalid_prompt"),
                *("responsibleaipolicyviolation", "data_inspection_failed", "context_length_exceeded"),
                *("key_model_access_denied", "team_model_access_denied", "model_not_found", "deploymentnotfound"),
                *("unsupported_country_region_territory", "model_not_active", "minimax_2013", "minimax_1026"),
            }
        ),
    ),
    (
        Outcome.THROTTLED,
        frozenset(
            {
                *("rate_limit_exceeded", "rate_limit_error", "tokens", "requests", "rate_limited", "throttling_error"),
                *("throttlingexception", "too_many_requests", "too_many_requests_error", "ratelimitreached"),
                *("model_rate_limit", "resource_exhausted", "throttling", "1302", "minimax_1002", "minimax_1039"),
            }
        ),
    ),
    (
        Outcome.UNAUTHORIZED,
        frozenset(
            {
                *("invalid_api_key", "authentication_error", "invalid_authentication_error", "unauthenticated"),
                *("account_deactivated", "api_key_invalid", "unrecognizedclientexception", "minimax_1004"),
            }
        ),
    ),
    (
        Outcome.OVERLOADED,
        frozenset(
            {
                *("server_is_overloaded", "overloaded_error", "service_unavailable_error", "unavailable"),
                *("overloaded", "engine_overloaded_error", "capacity_exceeded", "serviceunavailableexception"),
                *("modelnotreadyexception", "nocapacity", "1305"),
            }
        ),
    ),
    (
        Outcome.SERVER_ERROR,
        frozenset(
            {
                *("server_error", "internal_server_error", "api_error", "internalservererror", "internal"),
                *("internalserverexception", "engine_error", "minimax_1000", "minimax_1001", "minimax_1013"),
            }
        ),
    ),
)
# A word above overrules any status, but these generic words do not: a retry cannot help a request that is at fault.
GENERIC = frozenset({"api_error", "internal", "unavailable", "authentication_error"})
BY_STATUS = {
    401: Outcome.UNAUTHORIZED,
    408: Outcome.TIMEOUT,
    409: Outcome.SERVER_ERROR,  # a conflict passes: the official SDK tries it again
    413: Outcome.TOO_LARGE,
    420: Outcome.THROTTLED,
    423: Outcome.SERVER_ERROR,
    424: Outcome.SERVER_ERROR,  # a gateway whose upstream failed
    425: Outcome.SERVER_ERROR,
    429: Outcome.THROTTLED,  # "Resource Unavailable" of the flex tier, Azure's code "429", or no body at all
    498: Outcome.OVERLOADED,  # Groq's flex tier: capacity_exceeded
    499: Outcome.SERVER_ERROR,  # a proxy that gave up on its upstream
    503: Outcome.OVERLOADED,
    529: Outcome.OVERLOADED,
}
# Messages that say more than code and status. A bare "exceeded your current quota" is OpenAI's; providers that use that
# sentence for temporary rate limits name the limit in code or type.
BY_TEXT = tuple(
    (outcome, re.compile(pattern, re.IGNORECASE))
    for outcome, pattern in (
        (
            Outcome.QUOTA,
            r"credit balance is too low|insufficient (?:account )?(?:balance|credits)|used all available credits"
            r"|will regain access on|reached your specified (?:API )?usage limits|budget has been exceeded"
            r"|too many (?:tokens|requests) per day|free-models-per-day|\blimit_rpd/",
        ),
        (
            Outcome.UNAUTHORIZED,
            r"api key (?:not valid|expired)|incorrect api key"
            r"|(?:organization|account) has been (?:disabled|deactivated)",
        ),
        (Outcome.BAD_REQUEST, r"extra usage is required for long context"),
        (Outcome.THROTTLED, r"throttlingexception|rate limit (?:reached|exceeded)|qps request limit"),
    )
)
QUOTA_BARE = "exceeded your current quota"
# Gemini names the exhausted quotas: a daily one returns at midnight, whatever its retryDelay says.
DAILY_QUOTA = re.compile(r"PerDay", re.IGNORECASE)
# The finish reasons of a choice that holds no answer (OpenRouter, z.AI, DeepSeek, vLLM).
FAILED_FINISH = {
    "error": Outcome.SERVER_ERROR,
    "network_error": Outcome.SERVER_ERROR,
    "insufficient_system_resource": Outcome.OVERLOADED,
    "abort": Outcome.SERVER_ERROR,
}
