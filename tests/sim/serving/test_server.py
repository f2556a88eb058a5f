"""The provider over real HTTP on loopback, asked by the official SDK and by bare sockets.

What the provider decides is tested without HTTP (`test_replies`); here: that the SDK understands every answer and error
as the real provider's, that waits take the time they should, and that broken connections are broken.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import openai
import psutil
import pytest
from openai import OpenAI

from governor.model.errors import BadSetting
from governor.model.estimate import CHAT, sizes_of
from governor.model.requests import Outcome
from governor.provider import answers
from governor.provider import rate_limit_headers as stated
from sim.model import provider as prov
from sim.model.faults import Event
from sim.model.provider_config import ProviderConfig
from sim.serving.server import Provider, ProviderThread, run_provider, serve, spawn
from tests.live import WAIT_S

KEY = "sk-a-key-that-nobody-may-see-0123456789"
QUICK = ProviderConfig(
    tpm=0,
    latency={"first_token_s": 0.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0},
    faults={"refusal_s": 0.0},
)
CHAT_BODY = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]}


def client(server: ProviderThread, **options: Any) -> OpenAI:
    """The SDK, checking every answer against its own types, with no retries of its own."""
    defaults = {"max_retries": 0, "timeout": 10.0, "_strict_response_validation": True}
    return OpenAI(api_key=KEY, base_url=server.base_url, **{**defaults, **options})


def posted(
    server: ProviderThread, body: Any = None, path: str = "/v1/chat/completions", **headers: str
) -> answers.Answer:
    """One call without the SDK, classified."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT_S)
    try:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", path, json.dumps(CHAT_BODY if body is None else body), sent)
        response = connection.getresponse()
        content = response.read()
        return answers.classify(response.status, dict(response.getheaders()), content)
    finally:
        connection.close()


@pytest.fixture(scope="module")
def quick() -> Iterator[ProviderThread]:
    with serve(QUICK) as server:
        yield server


# ---------------------------------------------------------------- the SDK understands


def test_chat(quick: ProviderThread) -> None:
    body = {**CHAT_BODY, "n": 2, "max_tokens": 12, "metadata": {"paceline_output_tokens": "100"}}
    with client(quick) as sdk:
        raw = sdk.chat.completions.with_raw_response.create(**body)
    answer = raw.parse()
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sizes_of(CHAT, body).prompt_tokens
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    assert raw.request_id is not None
    assert raw.request_id.startswith("req_")
    assert "x-ratelimit-limit-tokens" not in raw.headers, "no limit, no header"


def test_chat_text_has_the_length_that_usage_states(quick: ProviderThread) -> None:
    with client(quick) as sdk:
        answer = sdk.chat.completions.create(**CHAT_BODY, extra_headers={"x-paceline-output-tokens": "250"})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 250
    assert len(answer.choices[0].message.content or "") == 4 * 250
    assert answer.choices[0].finish_reason == "stop"


def test_responses_whole_and_cut(quick: ProviderThread) -> None:
    with client(quick) as sdk:
        whole = sdk.responses.create(model="gpt-4o", input="Hello", extra_headers={"x-paceline-output-tokens": "9"})
        assert (whole.status, whole.incomplete_details, len(whole.output_text)) == ("completed", None, 36)
        assert whole.usage is not None
        assert (whole.usage.output_tokens, whole.usage.output_tokens_details.reasoning_tokens) == (9, 0)
        empty = set()
        for i in range(40):
            cut = sdk.responses.create(
                model="gpt-4o",
                input=f"Hello {i}",
                max_output_tokens=16,
                extra_headers={"x-paceline-output-tokens": "90"},
            )
            assert cut.status == "incomplete"
            assert cut.incomplete_details is not None
            assert cut.incomplete_details.reason == "max_output_tokens"
            assert cut.usage is not None
            assert cut.usage.output_tokens == 16
            empty.add(cut.output_text == "")
            assert (cut.output[0].type == "reasoning") == (cut.output_text == "")
    assert empty == {True, False}, "half of the cut answers have no text"


@pytest.mark.parametrize("form", [{"encoding_format": "float"}, {}])
def test_embeddings(quick: ProviderThread, form: dict[str, Any]) -> None:
    """Without a format the SDK asks for base64, and decodes it after its own (then lenient) validation."""
    with client(quick, _strict_response_validation=bool(form)) as sdk:
        answer = sdk.embeddings.create(model="text-embedding-3-small", input=["one", "two"], dimensions=64, **form)
        assert [item.index for item in answer.data] == [0, 1]
        assert sum(x * x for x in answer.data[0].embedding) == pytest.approx(1.0, rel=1e-5)
        assert len(answer.data[1].embedding) == 64
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == 2
        one = sdk.embeddings.create(model="text-embedding-3-small", input="one", **form)
        assert [len(item.embedding) for item in one.data] == [1_536]


def test_completions_and_models(quick: ProviderThread) -> None:
    with client(quick) as sdk:
        old = sdk.completions.create(model="gpt-3.5-turbo-instruct", prompt="Once", max_tokens=5)
        assert old.choices[0].finish_reason in ("stop", "length")
        assert "gpt-4o" in [model.id for model in sdk.models.list()]


def test_azure_paths(quick: ProviderThread) -> None:
    for path in ("/openai/deployments/my-gpt/chat/completions?api-version=2024-10-21", "/openai/v1/chat/completions"):
        assert posted(quick, path=path).outcome is Outcome.OK


ERRORS = [
    ("throttled", openai.RateLimitError, "rate_limit_exceeded", Outcome.THROTTLED),
    ("slow_down", openai.RateLimitError, "slow_down", Outcome.SLOW_DOWN),
    ("quota", openai.RateLimitError, "insufficient_quota", Outcome.QUOTA),
    ("overloaded", openai.InternalServerError, "server_is_overloaded", Outcome.OVERLOADED),
    ("unauthorized", openai.AuthenticationError, "invalid_api_key", Outcome.UNAUTHORIZED),
    ("model_not_found", openai.NotFoundError, "model_not_found", Outcome.BAD_REQUEST),
    ("server_error", openai.InternalServerError, None, Outcome.SERVER_ERROR),
]


@pytest.mark.parametrize(("kind", "error", "code", "outcome"), ERRORS)
def test_errors_are_the_sdk_s_own(kind: str, error: type[openai.APIStatusError], code: str, outcome: Outcome) -> None:
    with serve(QUICK, events=[Event(kind=kind)]) as server, client(server) as sdk:
        with pytest.raises(error) as caught:
            sdk.chat.completions.create(**CHAT_BODY)
        response = caught.value.response
        assert answers.classify(response.status_code, response.headers, response.content).outcome is outcome
        assert caught.value.code == code
        assert caught.value.request_id
        assert KEY not in str(caught.value)
        assert server.stats()["outcomes"] == {"unauthorized" if kind == "model_not_found" else kind: 1}


def test_limits_quota_and_size_over_http() -> None:
    config = QUICK.with_(tpm=30_000, rpm=500, quota_requests=9, charge_rule="prompt_plus_max")
    with serve(config) as server, client(server) as sdk:
        raw = sdk.chat.completions.with_raw_response.create(**CHAT_BODY, max_tokens=4_000)
        limits = {limit.dimension: limit for limit in stated.limits_of(raw.headers)}
        charge = 3 + 4_000  # ceil((5 characters + "user") / 4) + max_tokens
        assert (limits["TPM"].limit, limits["TPM"].remaining) == (30_000, 30_000 - charge)
        assert (limits["RPM"].limit, limits["RPM"].remaining) == (500, 499)
        reset_s = stated.duration_s(raw.headers["x-ratelimit-reset-tokens"])
        assert reset_s == stated.refill_reset_s(30_000, 30_000 - charge, 60.0)
        with pytest.raises(openai.RateLimitError, match="Request too large for gpt-4o") as too_large:
            sdk.chat.completions.create(**CHAT_BODY, max_tokens=40_000)
        assert stated.quoted_numbers(str(too_large.value)).requested == 40_003
        for _ in range(6):
            sdk.chat.completions.create(**CHAT_BODY, max_tokens=4_000)
        with pytest.raises(openai.RateLimitError, match=r"^Error code: 429 .*Rate limit reached for gpt-4o ") as full:
            sdk.chat.completions.create(**CHAT_BODY, max_tokens=4_000)
        numbers = stated.quoted_numbers(str(full.value))
        stated_s = stated.retry_after_s(full.value.response.headers, str(full.value))
        exact_s = stated.refill_wait_s(numbers.limit, numbers.used, numbers.requested, 60.0)
        # Used is printed whole, rounded up: the stated wait is less by up to one token's refill, 2 ms.
        assert exact_s - 0.003 <= stated_s <= exact_s
        time.sleep(0.1)  # 50 tokens flow back, the three requests below take 12
        for _ in range(2):
            sdk.chat.completions.create(**CHAT_BODY, max_tokens=1)
        with pytest.raises(openai.RateLimitError, match="exceeded your current quota"):
            sdk.chat.completions.create(**CHAT_BODY, max_tokens=1)


@pytest.mark.parametrize(
    ("body", "words"),
    [({"model": "gpt-4o"}, "messages"), ([], "object"), ({}, "model")],
)
def test_bad_requests(quick: ProviderThread, body: Any, words: str) -> None:
    answer = posted(quick, body)
    assert (answer.status, answer.outcome) == (400, Outcome.BAD_REQUEST)
    assert words in answer.message


def test_unknown_paths(quick: ProviderThread) -> None:
    assert posted(quick, path="/v1/audio/speech").status == 404


# ---------------------------------------------------------------- time


def test_an_answer_takes_its_latency() -> None:
    config = QUICK.with_(latency={"first_token_s": 0.1, "per_token_s": 0.001, "sigma": 0.0, "stall_ratio": 0.0})
    with serve(config) as server:
        begun = time.monotonic()
        assert posted(server, x_paceline_output_tokens="200").outcome is Outcome.OK
        assert time.monotonic() - begun >= 0.3


def test_no_part_of_an_answer_waits_for_an_acknowledgement() -> None:
    """Nagle's algorithm is off on the connections that are served: with it a body comes 40 ms after its head."""
    seen: list[int] = []

    class Looking(Provider):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            connection = scope["state"]["transport"].get_extra_info("socket")
            seen.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            await super().__call__(scope, receive, send)

    with ProviderThread(Looking(QUICK), 0) as server:
        assert posted(server).outcome == Outcome.OK
    assert len(seen) == 1
    assert seen[0] != 0


def test_a_time_scale_divides_waits_and_what_is_stated() -> None:
    config = QUICK.with_(
        tpm=6_000,
        charge_rule="prompt_plus_max",
        latency={"first_token_s": 2.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0},
    )
    body = {**CHAT_BODY, "max_tokens": 5_997}
    with serve(config, time_scale=20.0) as server:
        begun = time.monotonic()
        first = posted(server, body)
        took_s = time.monotonic() - begun
        assert 0.1 <= took_s < 2.0
        assert first.outcome is Outcome.OK
        second = posted(server, body)
        # 6,000 of 6,000 were used: full again after 60 s of the provider's, 3 s of ours, less what has passed.
        assert second.outcome is Outcome.THROTTLED
        assert 3.0 - (time.monotonic() - begun) - 0.1 < second.retry_after_s <= 3.0 - 0.1
        time.sleep(0.6)
        third = posted(server, body)
        assert 0.4 < second.retry_after_s - third.retry_after_s < time.monotonic() - begun
    with serve(config, time_scale=20.0, stated_time="provider") as server:
        begun = time.monotonic()
        posted(server, body)
        stated_s = posted(server, body).retry_after_s
        assert 60.0 - 20.0 * (time.monotonic() - begun) - 2.0 < stated_s <= 60.0 - 2.0


def test_the_clock_starts_with_the_first_request() -> None:
    now = [1_000.0]
    config = QUICK.with_(tpm=10_000, limit_changes=[{"at_s": 10.0, "factor": 0.5}])
    with ProviderThread(Provider(config, clock=lambda: now[0]), 0) as server:
        assert server.provider.now() == 0.0
        now[0] += 500.0
        assert {limit.limit for limit in posted(server).limits} == {10_000}
        now[0] += 9.0
        assert {limit.limit for limit in posted(server).limits} == {10_000}
        now[0] += 1.5
        assert {limit.limit for limit in posted(server).limits} == {5_000}
        assert server.stats()["last_s"] == 10.5


def test_a_scale_out_of_range() -> None:
    with pytest.raises(BadSetting, match="--time-scale 0 is out of range"):
        Provider(QUICK, time_scale=0.0)


# ---------------------------------------------------------------- broken connections


def test_a_drop_closes_the_connection_before_any_answer() -> None:
    with serve(QUICK, events=[Event(kind="drop")]) as server:
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            posted(server)
        assert server.stats()["outcomes"] == {"dropped": 1}
        with client(server) as sdk, pytest.raises(openai.APIConnectionError):
            sdk.chat.completions.create(**CHAT_BODY)


def test_a_truncated_body_breaks_off_in_the_middle() -> None:
    with serve(QUICK, events=[Event(kind="truncate")]) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT_S)
        connection.request("POST", "/v1/chat/completions", json.dumps(CHAT_BODY))
        response = connection.getresponse()
        promised = int(response.headers["content-length"])
        with pytest.raises(http.client.IncompleteRead) as caught:
            response.read()
        connection.close()
        assert len(caught.value.partial) == promised // 2
        assert response.status == 200


def test_a_malformed_body_ends_properly_and_is_no_json() -> None:
    with serve(QUICK, events=[Event(kind="malformed", times=1)]) as server:
        assert posted(server).outcome is Outcome.MALFORMED
        assert posted(server).outcome is Outcome.OK


def test_a_stall_takes_longer() -> None:
    with serve(QUICK, events=[Event(kind="stall", stall_s=0.3, times=1)]) as server:
        begun = time.monotonic()
        assert posted(server).outcome is Outcome.OK
        assert time.monotonic() - begun >= 0.3


@pytest.mark.parametrize("status", [500, 502, 503, 504, 529])
def test_every_5xx(status: int) -> None:
    with serve(QUICK, events=[Event(kind="server_error", status=status)]) as server:
        answer = posted(server)
        assert answer.status == status
        assert answer.outcome in (Outcome.SERVER_ERROR, Outcome.OVERLOADED)
        assert answer.message


def test_a_client_that_hangs_up_is_counted_and_not_settled() -> None:
    config = QUICK.with_(
        tpm=100_000,
        settles=True,
        charge_rule="prompt_plus_max",
        latency={"first_token_s": 60.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0},
    )
    with serve(config) as server:
        with client(server, timeout=0.5) as sdk, pytest.raises(openai.APITimeoutError):
            sdk.chat.completions.create(**CHAT_BODY, max_tokens=50_000)
        deadline = time.monotonic() + WAIT_S
        while server.stats()["in_flight"] and time.monotonic() < deadline:
            time.sleep(0.02)
        stats = server.stats()
        assert stats["outcomes"] == {"hung_up": 1}
        assert server.provider.desk.ps.used[prov.TPM] == 50_003


# ---------------------------------------------------------------- counting


def test_stats_count_what_was_seen_and_keep_no_secret() -> None:
    config = QUICK.with_(tpm=50_000, rpm=100, charge_rule="prompt_plus_max", faults={"refusal_s": 0.0})
    events = [Event(kind="throttled", attempts=2, retry_after_s=0.01)]
    with (
        serve(config, events=events) as server,
        client(server, max_retries=3, _strict_response_validation=False) as sdk,
    ):
        sdk.chat.completions.create(
            model="gpt-4o", messages=[{"role": "user", "content": "a secret question"}], max_tokens=100
        )
        sdk.embeddings.create(model="text-embedding-3-small", input="another secret")
        stats = server.stats()
        with urlopen(f"{server.url}/_stats", timeout=WAIT_S) as response:
            text = response.read().decode()
    assert (stats["requests"], stats["outcomes"]) == (6, {"throttled": 4, "ok": 2})
    assert stats["retry_counts"] == {"0": 2, "1": 2, "2": 2}
    assert stats["endpoints"] == {"/v1/chat/completions": 3, "/v1/embeddings": 3}
    assert stats["events"] == [["throttled", 4]]
    # ceil((17 characters + "user") / 4) + 100, and ceil(14 / 4)
    assert stats["charged_tokens"] == 6 + 100 + 4
    assert stats["windows"]["TPM"]["used_max"] == pytest.approx(110, abs=100 * 60 / 50)
    assert 0.0 < stats["windows"]["TPM"]["used_ratio_max"] <= 110 / 50_000
    assert stats["windows"]["RPM"]["used_max"] <= 2.0
    assert (stats["in_flight"], stats["in_flight_max"], stats["came_again"]) == (0, 1, 2)
    assert 0.0 == stats["first_s"] <= stats["last_s"] <= stats["now_s"]
    assert "secret" not in text
    assert KEY not in text


def test_the_most_in_flight_and_no_limit_ever_exceeded() -> None:
    config = QUICK.with_(
        tpm=20_000,
        rpm=40,
        charge_rule="prompt_plus_max",
        latency={"first_token_s": 0.3, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0},
    )
    with serve(config) as server, ThreadPoolExecutor(30) as pool:
        found = list(pool.map(lambda i: posted(server, {**CHAT_BODY, "max_tokens": 997, "seed": i}), range(30)))
        stats = server.stats()
    ok = sum(answer.outcome is Outcome.OK for answer in found)
    assert ok == 20, "20 of 1,000 tokens fit into 20,000; the 200 that refill in 0.6 s are not one more"
    assert sum(answer.outcome is Outcome.THROTTLED for answer in found) == 10
    assert 20 <= stats["in_flight_max"] <= 30
    assert all(window["used_ratio_max"] <= 1.0 + 1e-9 for window in stats["windows"].values())


def test_reset_starts_anew() -> None:
    with serve(QUICK.with_(quota_requests=1)) as server:
        assert [posted(server).outcome for _ in range(2)] == [Outcome.OK, Outcome.QUOTA]
        with urlopen(Request(f"{server.url}/_reset", method="POST"), timeout=WAIT_S):
            pass
        assert server.stats()["requests"] == 0
        assert posted(server).outcome is Outcome.OK


# ---------------------------------------------------------------- serving


def test_loopback_only_and_a_taken_port() -> None:
    with serve(QUICK) as server:
        found = {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.laddr and c.laddr.port == server.port}
        assert found == {"127.0.0.1"}
        with pytest.raises(BadSetting, match=f"--port {server.port} cannot be used"):
            serve(QUICK, server.port)
    with pytest.raises(BadSetting, match="--port 99999"):
        serve(QUICK, 99_999)


def test_stopping_leaves_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    config = QUICK.with_(latency={"first_token_s": 60.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0})
    server = serve(config)
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            posted(server)
        except (OSError, http.client.HTTPException) as error:
            failed.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    deadline = time.monotonic() + WAIT_S
    while not server.stats()["in_flight"] and time.monotonic() < deadline:
        time.sleep(0.01)
    begun = time.monotonic()
    server.stop()
    asking.join(WAIT_S)
    assert len(failed) == 1
    assert time.monotonic() - begun < 60.0
    server.stop()  # twice is once
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert logging.getLogger("uvicorn.error").level == logging.NOTSET, "the host's logging stays as it is"


def test_a_process_of_its_own_serves_the_same() -> None:
    config = QUICK.with_(tpm=1_000, charge_rule="prompt_plus_max", limit_changes=[{"at_s": 0.0, "factor": 2.0}])
    events = [Event(kind="server_error", times=1, status=502)]
    with spawn(config, seed=5, events=events, fixed_charge=3) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT_S)
        statuses = []
        for cap in (1, 1, 5_000):
            connection.request("POST", "/v1/chat/completions", json.dumps({**CHAT_BODY, "max_tokens": cap}))
            response = connection.getresponse()
            limit = response.headers["x-ratelimit-limit-tokens"]
            response.read()
            statuses.append((response.status, limit))
        connection.close()
        assert statuses == [(502, "2000"), (200, "2000"), (429, "2000")]
        assert server.stats()["requests"] == 3
        pid = server.pid
    assert not psutil.pid_exists(pid)


def test_the_command_says_where_and_ends_by_signal(tmp_path: Path, root: Path) -> None:
    faults = tmp_path / "faults.yaml"
    faults.write_text("provider: {tpm: 1234}\nevents: [{kind: drop, at_s: 5}]\n")
    program = (
        "import sys\nfrom sim.model.provider_config import ProviderConfig\n"
        "from sim.serving.server import run_provider\n"
        "run_provider(0, ProviderConfig.of('gpt-4o-tier1'), faults=sys.argv[1], time_scale=2.0, "
        "say=lambda line: print(line, flush=True))\n"
    )
    for number, code in ((signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(faults)],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        assert process.stdout is not None
        where, what = process.stdout.readline().strip(), process.stdout.readline().strip()
        name, _, url = where.partition("=")
        assert name == "OPENAI_BASE_URL"
        # The port is open from the first line on; who asks is answered as soon as the server runs.
        with urlopen(f"{url.removesuffix('/v1')}/_stats", timeout=WAIT_S) as response:
            assert json.load(response)["time_scale"] == 2.0
        process.send_signal(number)
        _, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == code
        assert errors == ""
        assert "1,234 TPM" in what
        assert "2 times as fast" in what


def test_the_command_refuses_a_bad_file(tmp_path: Path) -> None:
    path = tmp_path / "faults.yaml"
    path.write_text("events: [{kind: flood}]")
    with pytest.raises(BadSetting, match="flood"):
        run_provider(0, QUICK, faults=str(path))


# ---------------------------------------------------------------- speed


async def _load(port: int, count: int, connections: int) -> int:
    """Asks so many times over a few kept connections, without an SDK; how many answers were 200."""
    body = json.dumps({**CHAT_BODY, "max_tokens": 1}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    left, good = [count], [0]

    async def ask() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while left[0] > 0:
            left[0] -= 1
            writer.write(head + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            good[0] += answer.startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(ask() for _ in range(connections)))
    return good[0]


def test_one_core_serves_1500_tiny_answers_per_second() -> None:
    """By the server's own CPU time, which a busy machine does not stretch as it does the clock's."""
    config = QUICK.with_(tpm=10**9, rpm=10**7)
    with spawn(config) as server:
        process = psutil.Process(server.pid)
        asyncio.run(_load(server.port, 100, 20))
        before = process.cpu_times()
        count = 1_200
        assert asyncio.run(_load(server.port, count, 20)) == count
        after = process.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    assert count / cpu_s > 1_500, f"{count / cpu_s:.0f} requests per second of CPU"
