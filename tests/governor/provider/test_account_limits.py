"""An account's limits, read from its provider's own endpoint: in both forms, and never with the key in wrong hands."""

from __future__ import annotations

import io
import json
import urllib.request

import pytest

from governor.model.errors import BadSetting, PacelineError
from governor.model.pools import Pool
from governor.profiles.loader import read_profile
from governor.provider.account_limits import account_limits, drift, settings_for
from governor.provider.rate_limit_headers import limits_of
from sim.model.provider_config import ProviderConfig
from sim.serving.server import serve
from tests.live import WAIT_S

ADMIN = {"OPENAI_ADMIN_KEY": "admin-key", "OPENAI_PROJECT_ID": "proj/1", "ANTHROPIC_ADMIN_KEY": "admin-key"}


def test_openai_states_them_per_project_and_model() -> None:
    with serve(ProviderConfig(tpm=450_000, rpm=5_000, rpd=10_000)) as served:
        pool = Pool(base_url=served.base_url, profile="openai")
        limits = account_limits(pool, ADMIN, "gpt-4o-2024-08-06")
        assert limits == {"TPM": 450_000, "RPM": 5_000, "RPD": 10_000}
        with pytest.raises(PacelineError, match="states no limits of gpt-9"):
            account_limits(pool, ADMIN, "gpt-9")
    assert settings_for(limits) == {
        "OPENAI_TPM_LIMIT": "450000",
        "OPENAI_RPM_LIMIT": "5000",
        "OPENAI_RPD_LIMIT": "10000",
    }
    assert drift(limits, {"TPM": 450_000, "RPM": 3_000}) == [
        "the endpoint states RPM 5,000, the headers 3,000: the account has another limit for this key, or it has just "
        "changed"
    ]


def test_anthropic_states_them_in_groups_of_models() -> None:
    config = ProviderConfig.model_validate({"profile": "anthropic", "tpm": 0, "rpm": 50})
    with serve(config) as served:
        pool = Pool(base_url=served.base_url, profile="anthropic")
        limits = account_limits(pool, ADMIN, "gpt-4o-mini")
    assert limits is not None
    assert limits["RPM"] == 50
    assert settings_for({"ITPM": 30_000.0}) == {}, "there is no setting for it yet"


@pytest.mark.parametrize(
    "body",
    [
        b"<html>sign in</html>",
        b"[1]",
        b'{"data": 7}',
        b'{"data": [7, {"models": 3}, {"models": ["m"]}]}',
        b"[" * 100_000,
        b"\xff\xfe",
        b"",
    ],
)
def test_an_odd_answer_is_one_line(monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    limits = _stated(monkeypatch, body, "anthropic", "claude")
    assert isinstance(limits, str)
    assert "\n" not in limits


def test_limits_that_can_be_none_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("NaN", "1e999", "true", "-5", '"7"', "null"):
        odd = f'{{"type": "requests_per_minute", "value": {value}}}, {{"type": "output_tokens_per_minute", "value": 9}}'
        body = f'{{"data": [{{"models": ["m"], "limits": [{odd}]}}]}}'
        assert _stated(monkeypatch, body.encode(), "anthropic", "m") == {"OTPM": 9.0}
    groups = b'{"data": [{"models": ["m"], "limits": 7}]}'
    assert _stated(monkeypatch, groups, "anthropic", "m") == {}


def _stated(monkeypatch: pytest.MonkeyPatch, body: bytes, profile: str, model: str) -> dict[str, float] | str | None:
    """What is read of an endpoint that answers so, or the error."""
    opener = urllib.request.OpenerDirector
    monkeypatch.setattr(opener, "open", lambda self, request, **options: io.BytesIO(body))
    try:
        return account_limits(Pool(base_url="http://127.0.0.1:9/v1", profile=profile), ADMIN, model)
    except PacelineError as error:
        return str(error)


def test_without_an_admin_key_nothing_is_asked() -> None:
    assert account_limits(Pool(base_url="http://127.0.0.1:9/v1", profile="openai"), {}, "gpt-4o") is None
    assert account_limits(Pool(base_url="http://127.0.0.1:9/v1"), ADMIN, "gpt-4o") is None


def test_an_admin_key_goes_to_its_own_provider_alone() -> None:
    gateway = Pool(base_url="https://gateway.example.com/v1", profile="openai")
    with pytest.raises(BadSetting, match="OPENAI_ADMIN_KEY is an admin key of OpenAI, and is not sent to"):
        account_limits(gateway, ADMIN, "gpt-4o")
    with pytest.raises(BadSetting, match="set OPENAI_PROJECT_ID"):
        account_limits(Pool(profile="openai"), {"OPENAI_ADMIN_KEY": "k"}, "gpt-4o")


def test_a_tier_with_input_and_output_apart_is_served_and_read_by_its_profile() -> None:
    with serve(ProviderConfig.of("claude-sonnet-4-tier1")) as served:
        pool = Pool(base_url=served.base_url, profile="anthropic")
        assert account_limits(pool, ADMIN, "gpt-4o-mini") == {"RPM": 50, "ITPM": 30_000, "OTPM": 8_000}
        body = {"model": "claude-sonnet-4", "max_tokens": 20, "messages": [{"role": "user", "content": "Hello"}]}
        request = urllib.request.Request(
            f"{served.base_url}/messages", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=WAIT_S) as response:
            stated = {
                limit.dimension: limit for limit in limits_of(dict(response.headers), -1.0, read_profile("anthropic"))
            }
    assert {name: limit.limit for name, limit in stated.items()} == {"RPM": 50, "ITPM": 30_000, "OTPM": 8_000}
    assert stated["RPM"].remaining == 49, "tokens are rounded to thousands, requests are not"
