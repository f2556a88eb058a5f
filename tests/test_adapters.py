"""Other libraries over a governed client, each the real package: the examples run as they stand, refused at first."""

from __future__ import annotations

import asyncio
import os
import runpy
import subprocess
import sys
from typing import Any

import pytest
from langchain_openai import ChatOpenAI

from governor.adapters.langchain import GovernedRateLimiter
from governor.model.policy import Policy
from governor.provider.transport import GovernedTransport
from governor.run.governed import governed
from governor.scheduler.driver import Governor
from tests.live import FREE, KEY, ROOT, provider
from tests.servers import redis_server

EXAMPLES = ("langchain_model.py", "pydantic_ai_agent.py", "openai_agents.py")
LINES = 12


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**FREE, "OPENAI_API_KEY": KEY, "OPENAI_AGENTS_DISABLE_TRACING": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("PACELINE_REDIS_URL", "PACELINE_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_refused_at_first_and_answered_all_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with provider(events=[{"kind": "throttled", "times": 3, "retry_after_s": 0.05}]) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        outcomes = server.stats()["outcomes"]
        retries = server.stats()["retry_counts"]
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if line]) == 10
    assert outcomes == {"throttled": 3, "ok": 10}
    assert set(retries) <= {"0", "none"}, "the retries are the law's, not the SDK's"


@pytest.mark.parametrize("name", [*EXAMPLES, "ray_data.py"])
def test_an_example_is_short(name: str) -> None:
    assert len([line for line in (ROOT / "examples" / name).read_text().splitlines() if line]) <= LINES


@pytest.mark.long  # a cluster of Ray's takes a minute to start
def test_workers_of_ray_data_share_a_quota() -> None:
    ray = {"RAY_ADDRESS": "local", "RAY_raylet_start_wait_time_s": "300", "RAY_USAGE_STATS_ENABLED": "0"}
    with redis_server() as redis, provider(events=[{"kind": "throttled", "times": 3, "retry_after_s": 0.05}]) as server:
        shared = {"OPENAI_BASE_URL": server.base_url, "PACELINE_REDIS_URL": redis.url, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "examples" / "ray_data.py")]
        done = subprocess.run(
            command, env={**os.environ, **ray, **shared}, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        assert server.stats()["outcomes"] == {"throttled": 3, "ok": 10}
    assert len(done.stdout.splitlines()) == 11


def test_both_clients_of_a_chat_model_are_governed() -> None:
    model = governed(ChatOpenAI(model="gpt-4o", max_retries=5))
    for client in (model.root_client, model.root_async_client):
        assert isinstance(client._client._transport, GovernedTransport)
        assert client.max_retries == 0


def test_a_rate_limiter_lets_go_what_the_settings_allow() -> None:
    policy = Policy.from_env({**FREE, "OPENAI_TPM_LIMIT": "10000", "OPENAI_TPM_HEADROOM": "0"})

    async def main(limiter: GovernedRateLimiter) -> list[bool]:
        return [await limiter.aacquire(blocking=False) for _ in range(4)]

    assert asyncio.run(main(GovernedRateLimiter(3_000, Governor(policy)))) == [True, True, True, False]
    limiter = GovernedRateLimiter(3_000, Governor(policy))
    assert [limiter.acquire(blocking=False) for _ in range(4)] == [True, True, True, False]
    assert GovernedRateLimiter(1).acquire()


def test_a_limiter_is_asked_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with provider() as server:
        limiter = GovernedRateLimiter(3_000)
        asked: list[Any] = []
        acquire = limiter.acquire
        monkeypatch.setattr(limiter, "acquire", lambda **how: asked.append(how) or acquire(**how))
        ChatOpenAI(model="gpt-4o", base_url=server.base_url, rate_limiter=limiter).invoke("Hello")
    assert asked == [{"blocking": True}]
