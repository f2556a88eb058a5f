"""The synthetic provider behind real HTTP, on loopback only: enough of OpenAI and Anthropic for their official SDKs.

The module holds the ASGI app with its clock, served by uvicorn in a thread (`serve`), in a separate process (`spawn`)
or as a command (`run_provider`). `replies` decides the answers. Keys are not checked, and neither keys nor bodies are
kept.

**Time.** The provider's clock stays at 0 until its first request, so that limit changes, bursts and events of a faults
file count from the start of a run. With a time scale X it runs X times as fast as the machine's: all waits are divided
by X, and its limits "per minute" are per 60/X real seconds. Stated times (Retry-After, "try again in", resets,
openai-processing-ms) are in the client's real seconds, divided by X too, which suits a client that is unaware of the
scale. `stated_time="provider"` leaves them undivided, for a client whose own clock runs X times as fast: only such a
client can keep a bucket of one minute's capacity that refills in 60/X seconds.

**A client that hangs up** leaves its charge, and nothing is settled: as for a timed-out attempt in simulation. The same
applies to a client that closes a stream before its end.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self
from urllib.request import urlopen

import uvicorn
from starlette.requests import ClientDisconnect, Request
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from governor.model.errors import BadSetting
from sim.base.arguments import checked
from sim.model.faults import Event, Faults, read_faults
from sim.model.provider_config import ProviderConfig
from sim.serving import wire
from sim.serving.background import BackgroundDesk
from sim.serving.batches import PREFIXES, BatchDesk
from sim.serving.replies import DROPPED, FIXED_CHARGE, PATHS, TRUNCATED, Desk, Reply

_HOST = "127.0.0.1"
_MODELS = ("gpt-4o", "gpt-4o-mini", "gpt-4.1", "text-embedding-3-small")
_START_S = 30.0

_ENDPOINTS = {url: code for code, url in enumerate(PATHS)}
# Azure's paths: /openai/deployments/NAME/chat/completions, /openai/responses.
_AZURE = re.compile(r"/openai(?:/deployments/[^/]+|/v1)?(/.+)")


class Provider:
    """The ASGI app of one provider quota.

    `config`, `events`: the provider, and faults injected on top of it. `fixed_charge`: tokens that the charge rule
    `fixed` takes. `ms_header`: state waits also as `retry-after-ms`, which no recorded OpenAI answer has but the
    official SDK understands. `time_scale`, `stated_time`: see the module's docstring. Raise BadSetting if the scale is
    out of range.
    """

    def __init__(
        self,
        config: ProviderConfig,
        *,
        seed: int = 0,
        events: Sequence[Event] = (),
        time_scale: float = 1.0,
        stated_time: Literal["client", "provider"] = "client",
        fixed_charge: int = FIXED_CHARGE,
        ms_header: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0.001 <= time_scale <= 1_000.0:
            raise BadSetting(f"--time-scale {time_scale:g} is out of range: from 0.001 to 1000", "--time-scale")
        self.config = config
        self.time_scale = time_scale
        self.clock = clock
        self._made_from: dict[str, Any] = {
            "seed": seed,
            "events": tuple(events),
            "scale": time_scale if stated_time == "client" else 1.0,
            "fixed_charge": fixed_charge,
            "ms_header": ms_header,
        }
        self.reset()

    def reset(self) -> None:
        """Restart: initial buckets, no memory, and the clock at 0 until the next request (`POST /_reset`)."""
        self.desk = Desk(self.config, **self._made_from)
        self.batches = BatchDesk(self.desk)
        self.backgrounds = BackgroundDesk(self._serve_attempt, _sent)
        self.zero: float | None = None
        self.epoch_s = 0.0

    def now(self) -> float:
        """Return the provider's clock: seconds since its first request, times the scale; 0 before it."""
        return 0.0 if self.zero is None else (self.clock() - self.zero) * self.time_scale

    def _arrived(self) -> tuple[float, float]:
        """Now, and when the provider's clock began, by the machine's; the first arrival begins it."""
        now = self.clock()
        if self.zero is None:
            self.zero = now
            self.epoch_s = time.time()
        return now, self.zero

    def stats(self) -> dict[str, Any]:
        """Return the counts of `Desk.stats` and `BatchDesk.stats`, and the clock: what `GET /_stats` prints."""
        now = self.now()
        return {**self.desk.stats(), **self.batches.stats(now), "now_s": now, "time_scale": self.time_scale}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one HTTP request."""
        assert scope["type"] == "http", scope["type"]
        path, method = scope["path"], scope["method"]
        if (found := _AZURE.fullmatch(path)) is not None:
            path = f"/v1{found[1]}"
        if method == "POST" and path in _ENDPOINTS:
            await self._serve_attempt(_ENDPOINTS[path], scope, receive, send)
        elif path.startswith(PREFIXES):
            await self._serve_batches(path, scope, receive, send)
        elif await self.backgrounds.answer(method, path, send):
            return
        elif method == "GET" and path == "/_stats":
            await _sent(send, 200, json.dumps(self.stats()).encode())
        elif method == "POST" and path == "/_reset":
            self.reset()
            await _sent(send, 200, b"{}")
        elif method == "GET" and (limits := self.desk.limits_page(path, _MODELS)) is not None:
            await _sent(send, 200, limits)
        elif method == "GET" and path == "/v1/models":
            await _sent(send, 200, wire.models_body(_MODELS))
        else:
            await _sent(send, 404, wire.error_body(f"Invalid URL ({method} {path})", "invalid_request_error"))

    async def _serve_batches(self, path: str, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request of the Batch API."""
        _, zero = self._arrived()
        batches, scale, epoch_s = self.batches, self.desk.scale, self.epoch_s
        try:
            status, body, content_type = await batches.answer(
                Request(scope, receive),
                path,
                lambda: (self.clock() - zero) * self.time_scale,
                lambda at_s: int(epoch_s + at_s / scale),
            )
        except ClientDisconnect:
            return
        await _sent(send, status, body, content_type)

    async def _serve_attempt(self, endpoint: int, scope: Any, receive: Any, send: Any) -> None:
        """Serve an API request: decide it on arrival, answer it when it is due."""
        raw = await _read(receive)
        if raw is None or await self.backgrounds.took(endpoint, raw, scope, send):
            return
        # Bound here: a reset while this waits must not mix two runs.
        desk = self.desk
        arrived, zero = self._arrived()
        now = (arrived - zero) * self.time_scale
        headers = dict(scope["headers"])
        number = desk.came(endpoint, headers, now)
        reply = desk.decided(endpoint, headers, raw, now)
        transport = scope.get("state", {}).get("transport")

        async def until(service_s: float) -> bool:
            """Wait for that moment; return whether the client is still connected."""
            await asyncio.sleep(max(0.0, arrived + service_s / self.time_scale - self.clock()))
            return transport is None or not transport.is_closing()

        def ended(hung_up: bool) -> None:
            desk.ended(reply, hung_up, (self.clock() - zero) * self.time_scale)

        try:
            if reply.first_s >= 0.0 and reply.way != DROPPED:
                await self._stream(reply, lambda: desk.headers(reply, number), until, ended, transport, send)
                return
            stays = await until(reply.service_s)
            ended(not stays)
            if stays:
                await _write(reply, desk.headers(reply, number), transport, send)
        except asyncio.CancelledError:
            if transport is None or not transport.is_closing():
                raise
            # The server was stopped: uvicorn must not report this as an error of the app.

    async def _stream(
        self,
        reply: Reply,
        headers: Callable[[], wire.Headers],
        until: Callable[[float], Awaitable[bool]],
        ended: Callable[[bool], None],
        transport: asyncio.Transport | None,
        send: Any,
    ) -> None:
        """Send an answer as events, each when it is due; call `ended` before the last one, on which the client acts."""
        events = reply.events()
        span_s = reply.service_s - reply.first_s
        stays = await until(reply.first_s)
        if stays:
            own = [(b"content-type", reply.content_type), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": reply.status, "headers": own + headers()})
        due_s = reply.first_s
        for i, (share, event) in enumerate(events):
            if stays and (at_s := reply.first_s + span_s * share) > due_s:
                due_s = at_s
                stays = await until(due_s)
            if not stays:
                break
            if i == len(events) - 1:
                ended(False)
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if not stays:
            ended(True)
        elif reply.way == TRUNCATED and transport is not None:
            transport.close()
            await asyncio.sleep(0)
        else:
            await send({"type": "http.response.body", "body": b""})


async def _write(reply: Reply, headers: wire.Headers, transport: asyncio.Transport | None, send: Any) -> None:
    """Send a reply, whole or broken off as it states."""
    assert reply.way == 0 or transport is not None, "only a server of this module can break a connection"
    if reply.way == DROPPED and transport is not None:
        transport.abort()
        await asyncio.sleep(0)  # so that uvicorn notices that the client is gone
        return
    body = reply.whole_body()
    own = [(b"content-type", reply.content_type), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": reply.status, "headers": own + headers})
    if reply.way == TRUNCATED and transport is not None:
        await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
        transport.close()
        await asyncio.sleep(0)
        return
    await send({"type": "http.response.body", "body": body})


async def _read(receive: Any) -> bytes | None:
    """Return a request's whole body; None if the client disconnected before its end."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message["body"])
        if not message.get("more_body", False):
            return b"".join(parts) if len(parts) > 1 else parts[0]


async def _sent(send: Any, status: int, body: bytes, content_type: bytes = wire.JSON) -> None:
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# ---------------------------------------------------------------- serving


class _Protocol(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
    """uvicorn's HTTP protocol, with a connection that the app can break, as a dropped answer requires."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.app_state = {"transport": transport}


def protocol_of(provider: Provider) -> Callable[[], asyncio.Protocol]:
    """Return the factory of connection protocols, for a loop that makes connections itself."""
    server = _uvicorn(provider)
    config = server.config
    config.load()
    state: Any = server.server_state
    return lambda: config.http_protocol_class(config=config, server_state=state, app_state={})  # type: ignore[call-arg]


def _uvicorn(provider: Provider, log_level: str | None = None) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            provider,
            http=_Protocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            # Leave the host program's logging unchanged.
            log_config=None,
            log_level=log_level,
            access_log=False,
            server_header=False,
            # Far above any client's, so that no connection is closed at the moment when it is reused.
            timeout_keep_alive=3_600,
            timeout_graceful_shutdown=1,
        )
    )


def _listening(port: int) -> socket.socket:
    """Return a socket bound to loopback; port 0 takes a free one. Raise BadSetting if the port is unavailable."""
    # Name the protocol, which accepted sockets inherit: otherwise asyncio does not know that they are TCP and keeps
    # Nagle's algorithm on, and an answer's body waits 40 ms for the acknowledgement of its head.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_HOST, port))
        # From now on a client may connect; it is served as soon as the server runs.
        listener.listen(2_048)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise BadSetting(f"--port {port} cannot be used on {_HOST}: {reason}: name another", "--port") from None
    return listener


class ServedProvider:
    """A provider that is being served; a context manager that stops it at the end."""

    port: int

    @property
    def url(self) -> str:
        """Return the server's root URL."""
        return f"http://{_HOST}:{self.port}"

    @property
    def base_url(self) -> str:
        """Return the value for OPENAI_BASE_URL."""
        return f"{self.url}/v1"

    def stats(self) -> dict[str, Any]:
        """Return what `GET /_stats` prints."""
        with urlopen(f"{self.url}/_stats", timeout=10.0) as response:
            counts: dict[str, Any] = json.load(response)
        return counts

    def stop(self) -> None:
        """Stop serving at once: clients that wait for an answer find the connection closed. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


class ProviderThread(ServedProvider):
    """A provider served by a thread of this process: light, for tests; it shares the interpreter with its client."""

    def __init__(self, provider: Provider, port: int) -> None:
        self.provider = provider
        self._listener = _listening(port)
        self.port = int(self._listener.getsockname()[1])
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="provider", daemon=True)
        self._thread.start()
        assert self._started.wait(_START_S), f"the provider did not start within {_START_S:g} s"

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(_START_S)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        server = _uvicorn(self.provider)
        # The same as uvicorn's own `serve`, without its signals and its ticks of 0.1 s.
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup(sockets=[self._listener])
        self._started.set()
        await self._stopping.wait()
        for listening in server.servers:
            listening.close()
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # so that every connection notices that it is lost
        tasks = list(server.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def serve(config: ProviderConfig, port: int = 0, **options: Any) -> ProviderThread:
    """Serve a provider on loopback from a thread; port 0 takes a free one. `options`: as for `Provider`."""
    return ProviderThread(Provider(config, **options), port)


class ProviderProcess(ServedProvider):
    """A provider served by a separate process, as measurements require."""

    def __init__(self, config: ProviderConfig, port: int, options: dict[str, Any]) -> None:
        events = [event.model_dump(exclude_unset=True) for event in options.pop("events", ())]
        order = {"config": config.model_dump(), "events": events, "port": port, "options": options}
        # The packages are beside this one, installed or not.
        paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sim.serving.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        said = self._process.stdout.readline().strip()
        if not said.isdecimal():
            self.stop()
            raise BadSetting(said or "the provider's process did not start", "--port")
        self.port = int(said)
        self.pid = self._process.pid

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(_START_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def spawn(config: ProviderConfig, port: int = 0, **options: Any) -> ProviderProcess:
    """Serve a provider on loopback from a separate process. `options`: as for `Provider`, except the clock.

    The process ends with its parent, when the pipe between them closes.
    """
    return ProviderProcess(config, port, options)


def _serve_as_told() -> None:
    """Run the child's side of `spawn`: read the options from one line on stdin, write the port to stdout."""
    order = json.loads(sys.stdin.readline())
    config = checked(ProviderConfig, order["config"], "provider")
    events = [checked(Event, event, "events") for event in order["events"]]
    try:
        running = serve(config, order["port"], events=events, **order["options"])
    except BadSetting as error:
        print(error, flush=True)
        return
    with running:
        print(running.port, flush=True)
        sys.stdin.read()


def _say_at_once(line: str) -> None:
    """Print a line without delay: the reader of a pipe waits for the address."""
    print(line, flush=True)


def run_provider(
    port: int,
    config: ProviderConfig,
    *,
    faults: str | Faults | None = None,
    say: Callable[[str], None] = _say_at_once,
    **options: Any,
) -> None:
    """Serve a provider until a signal ends it, and print its address: the command `paceline provider`.

    `faults`: the path of a faults file, or its content. `options`: as for `Provider`. Raise BadSetting or BadInput if
    they or the port are invalid. SIGINT ends it quietly, SIGTERM as it ends any program.
    """
    if isinstance(faults, str):
        faults = read_faults(faults)
    if faults is not None:
        config = faults.applied(config)
        options["events"] = faults.events
    provider = Provider(config, **options)
    listener = _listening(port)
    url = f"http://{_HOST}:{listener.getsockname()[1]}"
    say(f"OPENAI_BASE_URL={url}/v1")
    say(_described(provider))
    say(f"ANTHROPIC_BASE_URL={url}")
    try:
        _uvicorn(provider, "critical").run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()


def _described(provider: Provider) -> str:
    """Return one line with what this provider grants."""
    config, pp = provider.config, provider.desk.pp
    limits = [f"{pp.limit[d]:,.0f} {name}" for d, name in enumerate(wire.DIMENSIONS) if pp.limit[d] > 0.0]
    settles = "settles" if config.settles else "does not settle"
    words = [config.preset or "provider", ", ".join(limits) or "no limits", f"charge {config.charge_rule}", settles]
    if provider.time_scale != 1.0:
        words.append(f"{provider.time_scale:g} times as fast as the clock")
    if provider.desk.trouble.events:
        words.append(f"events: {', '.join(event.kind for event in provider.desk.trouble.events)}")
    return "; ".join(words)


if __name__ == "__main__":
    _serve_as_told()
