"""The adapter end to end: the official SDK against the synthetic provider, and against servers that misbehave.

Every kind of answer must come out as the right `Answer`, none as an exception, and the key nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import openai
import psutil
import pytest

from governor.model.errors import BadSetting
from governor.model.estimate import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, sizes_of
from governor.model.pools import Azure, Pool
from governor.model.requests import Answer, Outcome, Request, endpoint_of, url_of
from governor.profiles.loader import read_profile
from governor.provider import openai_adapter
from governor.provider.openai_adapter import IDLE_MAX, LANE_MOST, Adapter, capped
from sim.model.faults import AT_THE_DOOR, Event
from sim.model.provider_config import ProviderConfig
from sim.serving.server import Provider, ProviderThread, serve

KEY = "a-key-of-no-known-form-0123456789abcdef"
ENVIRONMENT = {"OPENAI_API_KEY": KEY}
QUICK = ProviderConfig(
    tpm=0,
    latency={"first_token_s": 0.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0},
    faults={"refusal_s": 0.0},
)
BODIES: dict[int, dict[str, Any]] = {
    CHAT: {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]},
    RESPONSES: {"model": "gpt-4o", "input": "Hello"},
    EMBEDDINGS: {"model": "text-embedding-3-small", "input": "Hello", "dimensions": 8},
    COMPLETIONS: {"model": "gpt-3.5-turbo-instruct", "prompt": "Hello"},
}


def request(endpoint: int = CHAT, index: int = 0, **fields: Any) -> Request:
    body = {**BODIES[endpoint], **fields}
    return Request(index, f"q{index}", url_of(endpoint), body["model"], body, sizes_of(endpoint, body))


def pool(base_url: str, **fields: Any) -> Pool:
    return Pool(base_url=base_url, **fields)


def sent(base_url: str, *requests: Request, **options: Any) -> list[Answer]:
    """The answers of one adapter, all sent at once."""

    async def main() -> list[Answer]:
        async with Adapter(pool(base_url), ENVIRONMENT) as adapter:
            return await asyncio.gather(*(adapter.send(each, **options) for each in requests))

    return asyncio.run(main())


class Recording(Provider):
    """The provider, which also keeps the heads of what it is asked."""

    def __init__(self, config: ProviderConfig = QUICK, **options: Any) -> None:
        self.heads: list[tuple[str, dict[str, str]]] = []
        super().__init__(config, **options)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        heads = {name.decode(): value.decode() for name, value in scope["headers"]}
        query = scope["query_string"].decode()
        self.heads.append((scope["path"] + (f"?{query}" if query else ""), heads))
        await super().__call__(scope, receive, send)


Serving = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def raw_server(serving: Serving) -> AsyncIterator[str]:
    """A server that writes what it likes; yields its base URL."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serving(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)
        await server.wait_closed()


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of a request."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    return head, await reader.readexactly(length)


# ---------------------------------------------------------------- good answers


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, EMBEDDINGS, COMPLETIONS])
def test_a_good_answer_of_every_endpoint(endpoint: int) -> None:
    config = QUICK.with_(tpm=50_000, rpm=100)
    with serve(config) as server:
        asked = request(endpoint)
        (answer,) = sent(server.base_url, asked)
        state = server.provider.desk.ps
        used = list(state.used)
    assert (answer.outcome, answer.status, answer.error_code, answer.message) == (Outcome.OK, 200, "", "")
    assert answer.used_prompt_tokens == asked.sizes.prompt_tokens
    assert (answer.used_output_tokens == 0) == (endpoint == EMBEDDINGS)
    assert answer.has_text == (endpoint != EMBEDDINGS)
    assert answer.request_id == "req_" + "0" * 31 + "1"
    assert answer.body is not None
    assert answer.body["usage"]
    limits = {limit.dimension: (limit.limit, limit.remaining) for limit in answer.limits}
    assert limits == {"RPM": (100, 99), "TPM": (50_000, 50_000 - used[0])}


def test_the_length_limit_shows(seed: int) -> None:
    with serve(QUICK, seed=seed) as server:
        found = sent(
            server.base_url,
            *(request(CHAT, i, max_tokens=8, metadata={"paceline_output_tokens": "50"}) for i in range(40)),
        )
    assert all(answer.cut_off and answer.used_output_tokens == 8 for answer in found)
    assert {answer.has_text for answer in found} == {True, False}


def test_a_finalize_pass_raises_the_cap_under_the_name_that_the_request_uses() -> None:
    for endpoint, fields, name in (
        (CHAT, {}, "max_completion_tokens"),
        (CHAT, {"max_tokens": 5}, "max_tokens"),
        (CHAT, {"max_completion_tokens": 5}, "max_completion_tokens"),
        (CHAT, {"max_tokens": None, "max_completion_tokens": 5}, "max_completion_tokens"),
        (RESPONSES, {"max_output_tokens": 5}, "max_output_tokens"),
        (COMPLETIONS, {"max_tokens": 5}, "max_tokens"),
    ):
        asked = request(endpoint, **fields)
        overrides = capped(asked, 6_000)
        assert overrides == {name: 6_000}
        assert sizes_of(endpoint, {**(asked.body or {}), **overrides}).max_tokens == 6_000
    assert capped(request(EMBEDDINGS), 6_000) == {}
    asked = request(CHAT, max_tokens=5, metadata={"paceline_output_tokens": "300"})
    with serve(QUICK) as server:
        (short,) = sent(server.base_url, asked)
        (whole,) = sent(server.base_url, asked, body_overrides=capped(asked, 6_000))
    assert (short.used_output_tokens, short.cut_off) == (5, True)
    assert (whole.used_output_tokens, whole.cut_off) == (300, False)
    assert asked.body is not None
    assert asked.body["max_tokens"] == 5, "the request itself stays as it is"


def test_what_goes_over_the_wire() -> None:
    provider = Recording()

    async def main(base_url: str) -> None:
        environment = {**ENVIRONMENT, "OPENAI_BASE_URL": base_url}
        async with Adapter(Pool(organization="org-1", project="proj-2"), environment, run_id="run7") as adapter:
            await adapter.send(request(index=12), attempt=3)
            await adapter.send(request(EMBEDDINGS, index=13))

    with ProviderThread(provider, 0) as server:
        asyncio.run(main(server.base_url))
    (path, heads), (second, others) = provider.heads
    assert (path, second) == ("/v1/chat/completions", "/v1/embeddings")
    assert heads["authorization"] == f"Bearer {KEY}"
    assert (heads["openai-organization"], heads["openai-project"]) == ("org-1", "proj-2")
    assert heads["content-type"] == "application/json"
    assert heads["x-client-request-id"] == "paceline-run7-12-3"
    assert others["x-client-request-id"] == "paceline-run7-13-1"
    assert heads["x-stainless-retry-count"] == "0"


def test_any_text_arrives_as_it_was() -> None:
    bodies: list[dict[str, Any]] = []

    async def serving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, body = await read_request(reader)
        bodies.append(json.loads(body))
        writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\n{"data":[{}]}')
        await writer.drain()

    async def main() -> None:
        async with raw_server(serving) as url, Adapter(pool(url), ENVIRONMENT) as adapter:
            for text in ("plain", "Grüße \U0001f600 \x00 \u2028", "half a pair: \ud83d"):
                answer = await adapter.send(request(EMBEDDINGS, input=text))
                assert answer.outcome is Outcome.OK
                assert bodies[-1]["input"] == text

    asyncio.run(main())


def test_nothing_queues_behind_the_governor_and_few_connections_stay_idle() -> None:
    """As many connections as there are requests in flight: 150 at once, none waits for another."""
    config = QUICK.with_(latency={"first_token_s": 1.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0})

    def connections(port: int) -> int:
        mine = psutil.Process().net_connections("tcp")
        return sum(bool(c.raddr) and c.raddr.port == port and c.status == psutil.CONN_ESTABLISHED for c in mine)

    async def main(server: ProviderThread) -> tuple[list[Answer], int]:
        async with Adapter(pool(server.base_url), ENVIRONMENT) as adapter:
            found = await asyncio.gather(*(adapter.send(request(index=i)) for i in range(150)))
            return found, connections(server.port)

    with serve(config) as server:
        found, idle = asyncio.run(main(server))
        stats = server.stats()
    assert all(answer.outcome is Outcome.OK for answer in found)
    assert stats["in_flight_max"] == 150
    # Of each client that the 150 were spread over.
    assert 1 <= idle <= IDLE_MAX * -(-150 // LANE_MOST)


# ---------------------------------------------------------------- every kind of refusal and fault

EVENTS = [
    ({"kind": "throttled", "retry_after_s": 7.5}, Outcome.THROTTLED, 429, "rate_limit_exceeded", 7.5),
    ({"kind": "throttled"}, Outcome.THROTTLED, 429, "rate_limit_exceeded", -1.0),
    ({"kind": "slow_down", "retry_after_s": 3}, Outcome.SLOW_DOWN, 429, "slow_down", 3.0),
    *(
        ({"kind": "quota", "code": code}, Outcome.QUOTA, 429, code, -1.0)
        for code in sorted(read_profile("openai").errors.codes[Outcome.QUOTA])
    ),
    ({"kind": "overloaded"}, Outcome.OVERLOADED, 503, "server_is_overloaded", -1.0),
    ({"kind": "unauthorized"}, Outcome.UNAUTHORIZED, 401, "invalid_api_key", -1.0),
    ({"kind": "model_not_found"}, Outcome.BAD_REQUEST, 404, "model_not_found", -1.0),
    ({"kind": "server_error"}, Outcome.SERVER_ERROR, 500, "server_error", -1.0),
    ({"kind": "server_error", "status": 502}, Outcome.SERVER_ERROR, 502, "", -1.0),
    ({"kind": "server_error", "status": 504}, Outcome.SERVER_ERROR, 504, "", -1.0),
    ({"kind": "drop"}, Outcome.DROPPED, 0, "", -1.0),
    ({"kind": "truncate"}, Outcome.DROPPED, 0, "", -1.0),
    ({"kind": "malformed"}, Outcome.MALFORMED, 200, "", -1.0),
]


@pytest.mark.parametrize("door", [True, False])
def test_every_fault_becomes_its_answer_and_is_sent_once(door: bool) -> None:
    """One server; each event strikes once, in order."""
    rows = [row for row in EVENTS if (row[0]["kind"] in AT_THE_DOOR) is door]
    events = [Event(**row[0], times=1) for row in rows]

    async def main(url: str) -> list[Answer]:
        async with Adapter(pool(url), ENVIRONMENT) as adapter:
            return [await adapter.send(request(index=i)) for i in range(len(rows))]

    with serve(QUICK, events=events) as server:
        found = asyncio.run(main(server.base_url))
        stats = server.stats()
    for (fields, outcome, status, code, wait_s), answer in zip(rows, found, strict=True):
        assert (answer.outcome, answer.status, answer.error_code) == (outcome, status, code), fields
        assert answer.retry_after_s == wait_s, fields
        assert answer.message, fields
    assert stats["retry_counts"] == {"0": len(rows)}, "the SDK retries nothing by itself"


def test_real_limits_become_real_answers() -> None:
    config = QUICK.with_(tpm=10_000, charge_rule="prompt_plus_max")
    with serve(config) as server:
        (large,) = sent(server.base_url, request(max_tokens=20_000))
        (first,) = sent(server.base_url, request(max_tokens=9_000))
        (second,) = sent(server.base_url, request(max_tokens=9_000))
        wrong = request(max_tokens=9_000)
        wrong.body["messages"] = "not a list"
        (bad,) = sent(server.base_url, wrong)
    assert (large.outcome, large.retry_after_s) == (Outcome.TOO_LARGE, -1.0)
    assert first.outcome is Outcome.OK
    assert second.outcome is Outcome.THROTTLED
    # 2 * 9,003 - 10,000 = 8,006 too many of 10,000 per minute, less what drained meanwhile.
    assert 48.036 - 5.0 < second.retry_after_s <= 48.036
    assert second.limits[0].remaining < 2_000
    assert (bad.outcome, bad.status) == (Outcome.BAD_REQUEST, 400)


def test_a_connection_that_is_never_made_is_said_with_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_adapter, "CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:  # it speaks no TLS
        (answer,) = sent(f"https://127.0.0.1:{mute.getsockname()[1]}/v1", request(), timeout_s=30.0)
    assert answer.outcome is Outcome.TIMEOUT
    assert answer.message.startswith("no connection to https://127.0.0.1")
    assert answer.message.endswith("within 0.2 s")


def test_a_slow_answer_times_out_for_that_attempt_only() -> None:
    with serve(QUICK, events=[Event(kind="stall", stall_s=30.0, times=1)]) as server:
        begun = time.monotonic()
        (late,) = sent(server.base_url, request(), timeout_s=0.2)
        took_s = time.monotonic() - begun
        (good,) = sent(server.base_url, request())
    assert (late.outcome, late.status) == (Outcome.TIMEOUT, 0)
    assert "within 0.2 s" in late.message
    assert took_s < 30.0
    assert good.outcome is Outcome.OK


def test_a_trickle_cannot_outlast_the_time_out() -> None:
    """Each byte comes well within any read time-out; the whole must still end in time."""

    async def serving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        for _ in range(200):
            writer.write(b"{")
            await writer.drain()
            await asyncio.sleep(0.05)

    async def main() -> tuple[Answer, float]:
        async with raw_server(serving) as url, Adapter(pool(url), ENVIRONMENT) as adapter:
            begun = time.monotonic()
            return await adapter.send(request(), timeout_s=0.4), time.monotonic() - begun

    answer, took_s = asyncio.run(main())
    assert answer.outcome is Outcome.TIMEOUT
    assert 0.4 <= took_s < 10.0


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        (answer,) = sent(f"{url}/v1", request())
    assert (answer.outcome, answer.status) == (Outcome.DROPPED, 0)
    assert answer.message.startswith(f"no answer from {url}: ConnectError")


def test_garbage_never_raises(seed: int) -> None:
    """Whatever bytes come back, the attempt ends in an answer. 120 random ones, from noise to nearly good."""
    rng = random.Random(seed)
    body = b'{"choices":[{"message":{"content":"fine"}}]}'
    good = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    replies = []
    for i in range(120):
        reply = bytearray(good)
        if i % 4 == 0:
            reply = bytearray(rng.randbytes(rng.randint(0, 300)))
        elif i % 4 == 1:
            del reply[rng.randint(0, len(reply)) :]
        else:
            for _ in range(rng.randint(1, 6)):
                reply[rng.randrange(len(reply))] = rng.randrange(256)
        replies.append(bytes(reply))
    left = list(replies)

    async def serving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(left.pop())
        await writer.drain()

    async def main() -> list[Answer]:
        async with raw_server(serving) as url, Adapter(pool(url), ENVIRONMENT) as adapter:
            return [await adapter.send(request(index=i), timeout_s=2.0) for i in range(len(replies))]

    found = asyncio.run(main())
    outcomes = {answer.outcome for answer in found}
    assert {Outcome.DROPPED, Outcome.MALFORMED} <= outcomes, seed
    assert all(answer.message for answer in found if answer.outcome is not Outcome.OK), seed


def test_a_body_that_cannot_be_unpacked_is_malformed() -> None:
    async def serving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 5\r\n\r\nhello")
        await writer.drain()

    async def main() -> Answer:
        async with raw_server(serving) as url, Adapter(pool(url), ENVIRONMENT) as adapter:
            return await adapter.send(request())

    answer = asyncio.run(main())
    assert (answer.outcome, answer.status) == (Outcome.MALFORMED, 200)


def test_a_cancellation_passes_through() -> None:
    async def main(url: str) -> None:
        async with Adapter(pool(url), ENVIRONMENT) as adapter:
            task = asyncio.create_task(adapter.send(request()))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    config = QUICK.with_(latency={"first_token_s": 20.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0})
    with serve(config) as server:
        asyncio.run(main(server.base_url))


# ---------------------------------------------------------------- keys


def test_a_missing_key_names_its_variable() -> None:
    with pytest.raises(BadSetting, match=r"^OPENAI_API_KEY is not set") as caught:
        Adapter(Pool(), {})
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    with pytest.raises(BadSetting, match=r"^MY_TEAM_KEY is not set \(the key of pool 'team'\)"):
        Adapter(Pool(name="team", key="MY_TEAM_KEY"), ENVIRONMENT)


@pytest.mark.parametrize("key", ["sk-two words", "sk-line\nbreak", "sk-umlaut-ä", "sk-\x00"])
def test_a_key_that_no_header_can_carry_is_not_repeated(key: str) -> None:
    with pytest.raises(BadSetting, match="OPENAI_API_KEY contains a character that no key has") as caught:
        Adapter(Pool(), {"OPENAI_API_KEY": key})
    assert key not in str(caught.value)


def test_loopback_needs_no_key() -> None:
    async def main(url: str) -> Answer:
        async with Adapter(pool(url), {}) as adapter:
            return await adapter.send(request())

    with serve(QUICK) as server:
        assert asyncio.run(main(server.base_url)).outcome is Outcome.OK


def test_the_key_is_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    """A server that throws the key back in every way, and logging at its loudest."""
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
        caplog.set_level(logging.DEBUG, logger=name)
    count = [0]

    async def serving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, _ = await read_request(reader)
        assert KEY.encode() in head
        error = json.dumps({"error": {"message": f"bad key {KEY}", "code": "invalid_api_key", "param": KEY}}).encode()
        fine = json.dumps({"choices": [{"message": {"content": f"your key is {KEY}"}}]}).encode()
        ways = (
            b"HTTP/1.1 401 No\r\ncontent-length: %d\r\n\r\n%s" % (len(error), error),
            b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(fine), fine),
            b"HTTP/1.1 500 No\r\ncontent-length: %d\r\n\r\n%s" % (len(KEY), KEY.encode()),
            b"HTTP/1.1 200 %s and more\x00\r\n\r\n" % KEY.encode(),
            KEY.encode() + b"\r\n\r\n",
        )
        writer.write(ways[count[0]])
        count[0] += 1
        await writer.drain()

    async def main() -> list[str]:
        async with raw_server(serving) as url, Adapter(pool(url), ENVIRONMENT) as adapter:
            found = [repr(await adapter.send(request(index=i))) for i in range(5)]
            found += [repr(adapter), str(adapter.pool), repr(adapter._lanes[0].client), repr(adapter.pool)]
        async with Adapter(pool(url), ENVIRONMENT) as adapter:
            found.append(repr(await adapter.send(request())))
        return found

    found = asyncio.run(main())
    assert count[0] == 5
    assert sum("***" in text for text in found) >= 3, "it was thrown back, and taken out"
    # The transport's own trace, which nobody but a debugger turns on, shows the bytes of a broken status line as they
    # came: what is thrown back there is left out, what we send is not.
    logged = [record.getMessage() for record in caplog.records]
    for text in (*found, *(text for text in logged if not text.startswith("receive_response_headers.failed"))):
        assert KEY not in text
    assert "openai" in {record.name.split(".")[0] for record in caplog.records}, "the SDK did log"


@pytest.mark.parametrize("key", ["k", "none", "EMPTY", "no-key-is-needed"])
def test_a_word_in_place_of_a_key_spoils_no_answer(key: str) -> None:
    text = f"None of the tokens is {key}, none at all."
    fine = json.dumps({"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 3}}).encode()

    async def serving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(fine), fine))
        await writer.drain()

    async def main() -> Answer:
        async with raw_server(serving) as url, Adapter(pool(url), {"OPENAI_API_KEY": key}) as adapter:
            return await adapter.send(request())

    assert asyncio.run(main()).body == json.loads(fine)


def test_an_address_hides_what_stands_beside_the_host() -> None:
    adapter = Adapter(Pool(base_url="https://gateway.example:8443/very/secret/path/v1"), ENVIRONMENT)
    assert repr(adapter) == "<Adapter of pool default at https://gateway.example:8443>"
    asyncio.run(adapter.aclose())
    assert Adapter(Pool(), ENVIRONMENT).address == "https://api.openai.com"


# ---------------------------------------------------------------- Azure


def azure_sent(pool: Pool, environment: dict[str, str], *requests: Request) -> list[Answer]:
    async def main() -> list[Answer]:
        async with Adapter(pool, environment) as adapter:
            return [await adapter.send(each) for each in requests]

    return asyncio.run(main())


def test_azure_by_deployment_and_by_model() -> None:
    provider = Recording()
    with ProviderThread(provider, 0) as server:
        for deployment, name in (("", "gpt-4o"), ("mine", "mine")):
            azure = Pool(name="eu", key="EU_KEY", azure=Azure(server.url, "2024-10-21", deployment))
            found = azure_sent(azure, {"EU_KEY": KEY}, request(), request(RESPONSES))
            assert [answer.outcome for answer in found] == [Outcome.OK, Outcome.OK]
            (chat, heads), (responses, _) = provider.heads[-2:]
            assert chat == f"/openai/deployments/{name}/chat/completions?api-version=2024-10-21"
            assert responses == "/openai/responses?api-version=2024-10-21"
            assert heads["api-key"] == KEY
            assert "authorization" not in heads


def test_azure_from_the_sdk_s_own_names_and_with_a_token() -> None:
    provider = Recording()
    with ProviderThread(provider, 0) as server:
        environment = {
            "AZURE_OPENAI_AD_TOKEN": KEY,
            "AZURE_OPENAI_ENDPOINT": server.url,
            "OPENAI_API_VERSION": "2024-10-21",
        }
        azure = Pool(key="AZURE_OPENAI_AD_TOKEN", azure=Azure("", ""))
        assert azure_sent(azure, environment, request())[0].outcome is Outcome.OK
        assert provider.heads[-1][1]["authorization"] == f"Bearer {KEY}"
        for name in ("AZURE_OPENAI_ENDPOINT", "OPENAI_API_VERSION"):
            with pytest.raises(BadSetting, match=f"{name} is not set"):
                Adapter(azure, {key: value for key, value in environment.items() if key != name})


def test_the_sdk_is_the_one_that_was_checked() -> None:
    """Raw responses by header and `post` with bytes were read in the source of this major."""
    assert int(openai.__version__.split(".")[0]) in (2, 3)
    assert endpoint_of("/v1/responses") == RESPONSES
