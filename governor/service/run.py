"""The service as a process: the socket, the server, the log, the signals."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Generator

import uvicorn
from uvicorn.config import STARTUP_FAILURE

from governor.forecast.forecast import Demand, Outlook
from governor.model.errors import BadSetting
from governor.run.batch import descriptors
from governor.run.scaledloop import loop_factory
from governor.service.api.app import served, service_of
from governor.service.api.connections import Connection, Gate, accept, places
from governor.service.api.events import Events
from governor.service.config import ServiceConfig

BACKLOG = 2_048
SWITCH_S = 0.0005
GARBAGE = 10_000, 20, 20

log = logging.getLogger("paceline.service")


class _Server(uvicorn.Server):
    """Accepts connections through a gate; at its end, streams end first (uvicorn would wait for them)."""

    def __init__(self, config: uvicorn.Config, streams: Events, gate: Gate) -> None:
        super().__init__(config)
        self._streams = streams
        self._gate = gate
        self._accepting: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise SystemExit(STARTUP_FAILURE)
        config, state = self.config, self.server_state

        def connection() -> Connection:
            return Connection(self._gate, config=config, server_state=state, app_state=self.lifespan.state)

        self.servers = []
        self._accepting = [asyncio.create_task(accept(each, self._gate, connection)) for each in sockets or ()]
        self.started = True

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self._gate.sweep()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._accepting:
            task.cancel()
        self._streams.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        with super().capture_signals():
            before = signal.getsignal(signal.SIGHUP)
            if before is signal.SIG_IGN:  # nohup
                yield
                return
            signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(signal.SIGHUP, before)


class _Settled:
    """Freezes the loaded objects at the first tick and makes collections rarer.

    Everything loaded by then stays: searching half a million objects for garbage again and again would hold up every
    request for a tenth of a second each time. Waiting requests are many objects that are not garbage either, so they
    are searched less often than in a program that makes cycles all the time.
    """

    def __init__(self) -> None:
        self._is_done = False

    def __call__(self) -> None:
        if not self._is_done:
            self._is_done = True
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GARBAGE)


def run_service(config: ServiceConfig, *, quiet: bool = False) -> int:
    """Serve until a signal; return the exit code.

    Raise BadSetting if it may not or cannot listen; JournalError likewise.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    # Each statement that a thread gives SQLite releases the interpreter and wants it back, and the event loop would
    # keep it for ten times as long: a transaction of some statements then takes a second under load.
    sys.setswitchinterval(SWITCH_S)
    if config.forecast is not None:
        # A forecast of nothing costs nothing, and lets the simulator prepare itself: before there are threads,
        # connections and a socket, none of which a child may inherit.
        config.forecast(Outlook(pool=config.pools[0], demand=Demand()))
    service = service_of(config)
    try:
        service.worker.policies.refresh()
        gate = Gate(places(service.worker.policies.in_force().values(), descriptors()), config.time_scale)
        service.worker.policies.checks.append(lambda policies: places(policies.values(), descriptors()))
        service.worker.policies.changed.append(gate.change)
        if not config.is_local and not service.store.tokens():
            raise BadSetting(
                f"--host {config.host} can be reached from elsewhere, and there is no token: make one with "
                "`paceline token add NAME`, or listen on 127.0.0.1",
                "--host",
            )
        listening = _socket(config)
    except BaseException:
        service.store.database.closed()
        raise
    with listening:
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"listening on http://{shown}:{port}", flush=True)
        # No access log: a line per request adds nothing to the metrics, and may reveal too much.
        settings = uvicorn.Config(
            served(service),
            lifespan="on",
            access_log=False,
            log_config=None,
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=max(1, round(config.grace_s)),
        )
        service.worker.ticked.append(_Settled())
        server = _Server(settings, service.events, gate)
        with asyncio.Runner(loop_factory=loop_factory(config.time_scale)) as runner:
            runner.run(server.serve([listening]))
    return 0 if server.started else 1


def _socket(config: ServiceConfig) -> socket.socket:
    """Listen before anything is printed."""
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # else asyncio does not set TCP_NODELAY
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((config.host.strip("[]"), config.port))
        found.listen(BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadSetting(
            f"--host {config.host} --port {config.port} cannot be used: {reason}: name another", "--port"
        ) from None
    return found
