"""Shadow: calls pass unchanged, what passed is written down, and no error of ours reaches a call."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from anthropic import Anthropic
from openai import APIConnectionError, APIStatusError, AsyncOpenAI, OpenAI

from governor.model.errors import BadInput, BadSetting
from governor.provider.shadow import ShadowLog, ShadowTransport, shadow_log
from governor.run.governed import governed
from sim.serving.server import ProviderThread
from tests.live import KEY, provider

HELLO: Any = {"model": "gpt-4o", "messages": [{"role": "user", "content": "a secret"}], "max_tokens": 50}
LONG = {"x-paceline-output-tokens": "30"}


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "shadow.jsonl"
    monkeypatch.setenv("PACELINE_SHADOW_JOURNAL", str(path))
    monkeypatch.delenv("PACELINE_SHADOW_PROMPTS", raising=False)
    return path


@pytest.fixture
def server() -> Iterator[ProviderThread]:
    with provider(tpm=1_000_000) as running:
        yield running


def rows(path: Path) -> list[dict[str, Any]]:
    shadow_log(str(path)).flush(30.0)
    return [json.loads(line) for line in path.read_text().splitlines()]


def sync_client(server: ProviderThread, **options: Any) -> OpenAI:
    return governed(OpenAI(api_key=KEY, base_url=server.base_url, **options), mode="shadow")


def test_every_kind_of_call_passes_and_is_written_down(server: ProviderThread, journal: Path) -> None:
    with OpenAI(api_key=KEY, base_url=server.base_url) as bare, sync_client(server) as client:
        plain = bare.chat.completions.create(**HELLO, extra_headers=LONG)
        same = client.chat.completions.create(**HELLO, extra_headers=LONG)
        assert same.choices == plain.choices
        chunks = list(
            client.chat.completions.create(
                **HELLO, stream=True, stream_options={"include_usage": True}, extra_headers=LONG
            )
        )
        assert chunks[-1].usage == plain.usage
        client.responses.create(model="gpt-4o", input="Hello", extra_headers=LONG)
        client.embeddings.create(model="text-embedding-3-small", input=["a", "b"])
        client.models.list()
    with governed(Anthropic(api_key=KEY, base_url=server.url), mode="shadow") as claude:
        claude.messages.create(**{**HELLO, "model": "claude"}, extra_headers=LONG)

    async def asynchronous() -> None:
        client = governed(AsyncOpenAI(api_key=KEY, base_url=server.base_url), mode="shadow")
        async with client, client.chat.completions.stream(**HELLO, extra_headers=LONG) as stream:
            await stream.until_done()

    asyncio.run(asynchronous())
    found = rows(journal)
    assert [row.get("endpoint") for row in found] == [
        *("/v1/chat/completions",) * 2,
        *("/v1/responses", "/v1/embeddings", None, "/v1/chat/completions"),
    ]
    assert all(row["outcome"] == "ok" and row["latency"] > 0.0 and row["launched"] > 1e9 for row in found)
    assert [row.get("output_tokens") for row in found] == [30, 30, 30, 0, 30, 30]
    assert {row["limit_tokens"] for row in found} == {1_000_000}
    assert len({row["custom_id"] for row in found}) == 6
    assert "secret" not in journal.read_text()
    assert oct(journal.stat().st_mode & 0o777) == "0o600"


def test_retries_of_the_client_are_attempts_of_one_call(journal: Path) -> None:
    with provider(events=[{"kind": "throttled", "times": 1, "retry_after_s": 0.01}]) as server:
        with sync_client(server, max_retries=2) as client:
            client.chat.completions.create(**HELLO)
            client.chat.completions.create(**HELLO)
        assert server.stats()["requests"] == 3
    first, second, third = rows(journal)
    assert (first["outcome"], first["status_code"], first["retry_after"]) == ("throttled", 429, 0.01)
    assert (first["custom_id"], first["arrival"], 2) == (second["custom_id"], second["arrival"], second["attempt"])
    assert third["custom_id"] != first["custom_id"]


def test_what_fails_fails_as_before(journal: Path) -> None:
    events = [{"kind": "model_not_found", "times": 1}, {"kind": "drop"}]
    with provider(events=events) as server, sync_client(server, max_retries=0) as client:
        with pytest.raises(APIStatusError, match="does not exist"):
            client.chat.completions.create(**HELLO)
        with pytest.raises(APIConnectionError):
            client.chat.completions.create(**{**HELLO, "max_tokens": 51})
    assert [row["outcome"] for row in rows(journal)] == ["bad_request", "dropped"]


def test_errors_of_ours_are_swallowed_and_counted(
    server: ProviderThread, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = ShadowLog(tmp_path / "absent" / "x.jsonl")
    http = httpx2.Client(transport=ShadowTransport(httpx2.HTTPTransport(), log))
    with OpenAI(api_key=KEY, base_url=server.base_url, http_client=http) as client:
        for _ in range(3):
            assert client.chat.completions.create(**HELLO).choices
            log.flush(30.0)
    assert (log.errors, log.recorded) == (3, 0)
    assert caplog.text.count("calls are not affected") == 1


def test_an_answer_that_has_been_read_already_is_written_down(tmp_path: Path) -> None:
    log = ShadowLog(tmp_path / "x.jsonl")
    usage = {"prompt_tokens": 5, "completion_tokens": 7}
    body = {"choices": [{"message": {"content": "Hi"}}], "usage": usage}
    inner = httpx2.MockTransport(lambda request: httpx2.Response(200, json=body))
    with httpx2.Client(transport=ShadowTransport(inner, log)) as http:
        assert http.post("http://127.0.0.1/v1/chat/completions", json=HELLO).json() == body
    log.flush(30.0)
    assert json.loads((tmp_path / "x.jsonl").read_text())["output_tokens"] == 7


def test_what_there_is_no_room_for_is_dropped_and_counted(
    server: ProviderThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ShadowLog(tmp_path / "x.jsonl")
    monkeypatch.setattr(log._queue, "full", lambda: True)
    with httpx2.Client(transport=ShadowTransport(httpx2.HTTPTransport(), log)) as http:
        assert http.post(f"{server.base_url}/chat/completions", json=HELLO).status_code == 200
    assert log.dropped == 1


def test_many_threads_and_two_logs_write_whole_lines(server: ProviderThread, journal: Path) -> None:
    other = ShadowLog(journal)  # as another process would
    with sync_client(server) as client, httpx2.Client(transport=ShadowTransport(httpx2.HTTPTransport(), other)) as http:
        second = OpenAI(api_key=KEY, base_url=server.base_url, http_client=http)

        def ask(i: int) -> None:
            chosen = client if i % 2 else second
            chosen.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": f"Hello {i}"}])

        with ThreadPoolExecutor(10) as threads:
            list(threads.map(ask, range(60)))
    other.flush(30.0)
    found = rows(journal)
    assert len({row["custom_id"] for row in found}) == len(found) == 60


def test_bodies_are_kept_on_request_and_a_mode_must_be_one(
    server: ProviderThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "with.jsonl"
    monkeypatch.setenv("PACELINE_SHADOW_JOURNAL", str(path))
    monkeypatch.setenv("PACELINE_SHADOW_PROMPTS", "true")
    monkeypatch.setenv("PACELINE_MODE", "shadow")
    with governed(OpenAI(api_key=KEY, base_url=server.base_url)) as client:
        client.chat.completions.create(**HELLO)
        assert client.max_retries == 2, "the client's own retries are its own"
    assert json.loads(rows(path)[0]["sent"])["messages"] == HELLO["messages"]
    monkeypatch.setenv("PACELINE_MODE", "shade")
    with OpenAI(api_key=KEY) as client, pytest.raises(BadSetting, match="PACELINE_MODE 'shade' does not exist"):
        governed(client)
    monkeypatch.setenv("PACELINE_SHADOW_JOURNAL", os.fspath(tmp_path / "absent" / "x"))
    with OpenAI(api_key=KEY) as client, pytest.raises(BadInput, match="cannot be written"):
        governed(client, mode="shadow")
