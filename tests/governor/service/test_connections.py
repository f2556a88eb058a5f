"""Slow and greedy clients: what they may hold, and that calls and other clients go on beside them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from governor.model.errors import BadSetting
from governor.model.policy import Policy
from governor.service.api.connections import (
    CLIENTS_LEAST,
    HEAD_BYTES,
    OWN,
    PER_CLIENT,
    Connection,
    Gate,
    accept,
    places,
)
from governor.service.errors import HANDLERS
from tests.live import WAIT_S, Cli, provider, shared_cli
from tests.services import error_of, good, lines, ready, started, until
from tests.virtual_loop import run_virtual


@pytest.fixture
def cli() -> Iterator[Cli]:
    """The command line; whatever a test has left running is ended."""
    found = shared_cli()
    yield found
    for process in list(found._running.values()):
        process.signal(signal.SIGKILL)


def opened(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=WAIT_S)


def test_half_open_connections_cost_a_running_batch_nothing(cli: Cli, tmp_path: Path) -> None:
    env = {"OPENAI_MAX_CONCURRENCY": "20"}
    slow = {"first_token_s": 0.2, "per_token_s": 0.0, "sigma": 0.1, "stall_ratio": 0.0}
    with contextlib.ExitStack() as stack, provider(latency=slow) as llm:
        served = ready(started(cli, tmp_path, llm.base_url, env=env, limit_files=256))
        batch_id = served.batch(200)
        until("the first result", lambda: served.get(f"/batches/{batch_id}")["done"])
        for i in range(300):
            half = stack.enter_context(contextlib.closing(opened(str(served.client.base_url))))
            if i % 2:
                half.sendall(b"POST /batches HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: ")
        # Others are served beside them, and the batch loses nothing.
        row = served.over(batch_id)
        assert (row["done"], row["failed"], row["attempts"]) == (200, 0, 200)
        served.stop(signal.SIGKILL)


def test_a_thousand_posts_at_once_are_all_answered(cli: Cli, tmp_path: Path) -> None:
    with provider() as llm:
        served = ready(started(cli, tmp_path, llm.base_url, env={"OPENAI_MAX_CONCURRENCY": "100"}))
        url = str(served.client.base_url)

        async def story() -> list[int]:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120.0) as client:
                posts = [client.post("/batches", content=lines(1, f"p{i}")) for i in range(1_000)]
                return [answer.status_code for answer in await asyncio.gather(*posts)]

        found = asyncio.run(story())
        assert found == [202] * 1_000
        served.stop(signal.SIGKILL)


def test_more_calls_in_flight_than_descriptors_allow_are_refused_with_the_figures(cli: Cli, tmp_path: Path) -> None:
    with provider() as llm:
        served = ready(started(cli, tmp_path, llm.base_url, limit_files=256))
        answer = served.client.put("/settings", json={"settings": {"OPENAI_MAX_CONCURRENCY": 200}})
        error_of(answer, 422, "BAD_SETTING")
        most = 256 - OWN - PER_CLIENT * CLIENTS_LEAST
        assert f"may have 256: lower OPENAI_MAX_CONCURRENCY to {most} in all" in answer.text
        good(served.client.put("/settings", json={"settings": {"OPENAI_MAX_CONCURRENCY": most}}))
        served.stop(signal.SIGKILL)
    with pytest.raises(BadSetting, match="200 calls in flight need 312 descriptors, and this process may have 256"):
        places([Policy(max_concurrency=100), Policy(max_concurrency=100)], 256)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_any_signal_to_end_ends_in_good_order(cli: Cli, tmp_path: Path, name: str) -> None:
    slow = {"first_token_s": 0.5, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0}
    with provider(latency=slow) as llm:
        env = {"OPENAI_MAX_CONCURRENCY": "3"}
        served = ready(started(cli, tmp_path, llm.base_url, env=env))
        batch_id = served.batch(20)
        until("the first call", lambda: served.get(f"/batches/{batch_id}")["in_flight"])
        served.stop(getattr(signal, name))
        sent = llm.stats()["requests"]
        again = ready(started(cli, tmp_path, llm.base_url))
        row = again.over(batch_id)
        assert (row["done"], row["resent"], llm.stats()["requests"]) == (20, 0, 20)
        assert 0 < sent < 20
        again.stop(signal.SIGKILL)


# ---------------------------------------------------------------- in virtual time


class Wire(asyncio.Transport):
    """What a connection writes to, and is closed by."""

    def __init__(self, protocol: Connection, host: str) -> None:
        super().__init__({"peername": (host, 1), "sockname": ("127.0.0.1", 2)})
        self.sent = b""
        self.closed = False
        self._protocol = protocol
        protocol.connection_made(self)

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    abort = close

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


async def answering(scope: Any, receive: Any, send: Any) -> None:
    """An application that reads the body and answers."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def wire(gate: Gate, host: str = "10.0.0.1") -> Wire:
    config = uvicorn.Config(
        answering, http=Connection, ws="none", lifespan="off", log_config=None, timeout_keep_alive=99
    )
    made = Connection(gate, config=config, server_state=uvicorn.server.ServerState(), app_state={})
    return Wire(made, host)


HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n"


async def dripped(to: Wire, part: bytes, seconds: float, gate: Gate) -> float:
    """Sends that part once a second until the connection is closed; returns when."""
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    while not to.closed and loop.time() - began_at < seconds:
        if part:
            to._protocol.data_received(part)
        await asyncio.sleep(1.0)
        gate.sweep()
    return loop.time() - began_at


@pytest.mark.parametrize(
    ("begins", "part", "closed_s"),
    [
        (b"", b"", 11.0),  # nothing ever comes
        (b"", b"\r\n", 11.0),  # empty lines before a head
        (HEAD, b"X-A: b\r\n", 11.0),  # a head that does not end
        (HEAD + b"X-A: ", b"b", 11.0),
        (HEAD + b"\r\n", b"", 31.0),  # a body that does not come
        (HEAD + b"\r\nbody", b"", 11.0),  # a connection kept open after its answer
        (HEAD + b"\r\nbodyGET / HT", b"", 11.0),  # the next head does not end
    ],
)
def test_a_connection_that_keeps_the_service_waiting_is_closed(begins: bytes, part: bytes, closed_s: float) -> None:
    async def story() -> float:
        gate = Gate(100)
        made = wire(gate)
        if begins:
            made._protocol.data_received(begins)
        took_s = await dripped(made, part, 100.0, gate)
        assert made.closed
        await asyncio.sleep(0.0)
        assert (gate.open, gate.busy) == (set(), {})
        return took_s

    assert run_virtual(story()) == pytest.approx(closed_s, abs=1.5)


def test_a_body_that_comes_slowly_is_waited_for() -> None:
    async def story() -> bytes:
        gate = Gate(100)
        made = wire(gate)
        made._protocol.data_received(HEAD + b"\r\n")
        for _ in range(4):
            await asyncio.sleep(20.0)
            gate.sweep()
            made._protocol.data_received(b"x")
        await asyncio.sleep(0.1)
        return made.sent

    assert run_virtual(story()).startswith(b"HTTP/1.1 200 OK")


def test_a_long_body_is_no_head() -> None:
    async def story() -> bytes:
        made = wire(Gate(100))
        size = 4 * HEAD_BYTES
        made._protocol.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(2):
            made._protocol.data_received(b"x" * (size // 2))
        await asyncio.sleep(0.1)
        return made.sent

    assert run_virtual(story()).startswith(b"HTTP/1.1 200 OK")


def test_an_endless_head_is_read_no_further_than_its_limit() -> None:
    async def story() -> int:
        made = wire(Gate(100))
        made._protocol.data_received(HEAD + b"X-A: ")
        sent = 0
        while not made.closed:
            made._protocol.data_received(b"x" * 1_000)
            sent += 1_000
        return sent

    assert run_virtual(story()) <= HEAD_BYTES + 1_000


def test_the_longest_waiting_gives_way_and_the_busy_do_not() -> None:
    async def story() -> list[list[bool]]:
        gate = Gate(4)
        wires = [wire(gate, f"10.0.0.{i}") for i in range(2)]
        for each in wires:
            each._protocol.data_received(HEAD + b"\r\n")  # busy: their bodies are under way
        await asyncio.sleep(1.0)
        wires += [wire(gate), wire(gate)]
        found = []
        # None that has just come gives way, for as long as a head may take.
        for _ in range(2):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(gate.room(), 0.2)
            found.append([each.closed for each in wires])
        return found

    first, second = run_virtual(story())
    assert first == [False] * 4
    assert second in ([False, False, True, False], [False, False, False, True])


def test_one_client_does_not_get_all_places() -> None:
    async def story() -> tuple[list[bytes], bytes, dict[str, int]]:
        gate = Gate(8)
        greedy = [wire(gate, "10.0.0.1") for _ in range(7)]
        other = wire(gate, "10.0.0.2")
        for each in (*greedy, other):
            each._protocol.data_received(HEAD + b"\r\n")
        await asyncio.sleep(1.0)
        refused = [each.sent[:12] for each in greedy]
        for each in (*greedy, other):
            each._protocol.data_received(b"body")
        await asyncio.sleep(1.0)
        return refused, other.sent[:12], dict(gate.busy)

    refused, other, busy = run_virtual(story())
    assert refused == [b""] * 6 + [b"HTTP/1.1 503"]
    assert other == b"HTTP/1.1 200"
    assert busy == {}


def test_a_refused_client_that_goes_on_sending_does_not_keep_its_place() -> None:
    async def story() -> tuple[float, list[bool]]:
        gate = Gate(8)
        greedy = [wire(gate, "10.0.0.1") for _ in range(8)]
        for each in greedy:
            each._protocol.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\n")
        await asyncio.sleep(1.0)
        await asyncio.wait_for(gate.room(), 1.0)
        gone = [each.closed for each in greedy]
        return await dripped(greedy[7 if gone[6] else 6], b"x", 99.0, gate), gone

    closed_s, gone = run_virtual(story())
    assert gone[:6] == [False] * 6
    assert sum(gone) == 1
    assert closed_s <= 11.0


def test_a_client_that_leaves_during_a_post_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """It once wrote two tracebacks."""

    async def reading(request: Request) -> None:
        await request.body()

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    app = Starlette(routes=[Route("/batches", reading, methods=["POST"])], exception_handlers=HANDLERS)
    scope = {"type": "http", "method": "POST", "path": "/batches", "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    assert not caplog.records


def test_what_is_not_taken_in_now_is_taken_in_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has no descriptor for a moment: the client waits in the backlog."""

    async def story() -> bytes:
        loop = asyncio.get_running_loop()
        taken, failures = loop.sock_accept, [OSError(24, "Too many open files")]

        async def sock_accept(listening: socket.socket) -> Any:
            if failures:
                raise failures.pop()
            return await taken(listening)

        monkeypatch.setattr(loop, "sock_accept", sock_accept)
        gate = Gate(4)
        config = uvicorn.Config(answering, http=Connection, ws="none", lifespan="off", log_config=None)
        state = uvicorn.server.ServerState()
        with socket.create_server(("127.0.0.1", 0)) as listening:
            accepting = asyncio.create_task(
                accept(listening, gate, lambda: Connection(gate, config=config, server_state=state, app_state={}))
            )
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            writer.write(HEAD + b"\r\nbody")
            found = await asyncio.wait_for(reader.readline(), WAIT_S)
            writer.close()
            accepting.cancel()
            await asyncio.wait([accepting])
        return found

    assert asyncio.run(story()) == b"HTTP/1.1 200 OK\r\n"
