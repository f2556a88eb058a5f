"""The process that talks to a Ray cluster for `spread`, by messages on stdin and stdout.

This is the only module that imports Ray.

Messages are pickled. From here first ("ready", workers) or ("refused", why); then, for each call (fingerprint,
function, workers, shared, rows) that comes in, ("result", value) per row (index of its shared part, its own part), in
order, or one ("raised", exception) or ("lost", why) instead, after which no more tasks of that call are started. Its
few tasks in flight then run to their end and their results are dropped: `ray.cancel` beside a task that is just ending
crashes the whole process (an internal check of Ray 2.60). The process ends at the end of stdin.

Theory of operation. RAY_ADDRESS names the cluster by Ray's own rules; without it a cluster is started on this machine,
on loopback, and ends with this process. We use plain remote tasks, not Ray's backend for joblib, which yields no result
before all are done and sends shared objects again with each task. The address is checked for a server first, and then
repeatedly by a thread, because Ray by itself would wait for minutes. Every node must have the same sources as the
calling process: another version would silently give other results.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from governor.model.errors import BadSetting, quoted
from sim.experiment.parallel import fingerprint

ADDRESS = "RAY_ADDRESS"
NEEDS_RAY = "--backend ray needs paceline[ray]: pip install 'paceline[ray]'"
# Tasks in flight per worker: enough to keep every worker busy, few enough not to queue results.
_AHEAD = 3
# Interval of checks that the cluster answers, their time-out, and how many may fail in a row.
ASK_EVERY_S, ANSWER_S, ASK_TIMES = 5.0, 3.0, 3
# Ray's retries of a task whose worker died.
RETRIES = 2
# RFC 9113, section 3.4: both sides begin with a frame of settings, the client with a fixed text before it.
HTTP2_HEADER, HTTP2_SETTINGS = 9, 4
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, HTTP2_SETTINGS, 0, 0, 0, 0, 0))


class Line:
    """The channel back to the parent: messages from several threads, one at a time."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.lock = threading.Lock()

    def tell(self, kind: str, value: Any) -> None:
        """Send a message."""
        with self.lock:
            pickle.dump((kind, value), self.stream, pickle.HIGHEST_PROTOCOL)
            self.stream.flush()


def main() -> None:
    """Answer calls until stdin ends."""
    # Ray's own output must not mix with the messages.
    line = Line(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    try:
        ray, address = connected()
    except BadSetting as error:
        line.tell("refused", str(error))
        return
    threading.Thread(target=_watch, args=(address, line), daemon=True).start()
    line.tell("ready", max(1, int(ray.cluster_resources().get("CPU", 1))))
    while True:
        try:
            wanted, function, workers, shared, rows = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        for kind, value in answered(ray, wanted, function, workers, shared, rows):
            line.tell(kind, value)
    ray.shutdown()


def answered(
    ray: Any, wanted: str, function: Callable[[Any, Any], Any], workers: int, shared: Sequence[Any], rows: Sequence[Any]
) -> Iterator[tuple[str, Any]]:
    """Yield the messages that answer one call."""
    remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_checked)
    most = workers or _AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    put: dict[int, Any] = {}
    under_way: dict[Any, int] = {}
    found: dict[int, Any] = {}
    started = done = 0
    try:
        while done < len(rows):
            while started < len(rows) and len(under_way) < most:
                i, own = rows[started]
                if i not in put:
                    put[i] = ray.put(shared[i])
                under_way[remote.remote(function, wanted, put[i], own)] = started
                started += 1
            if done in found:
                yield "result", found.pop(done)
                done += 1
                continue
            ready = ray.wait(list(under_way))[0][0]
            found[under_way[ready]] = ray.get(ready)
            del under_way[ready]
    except ray.exceptions.RayTaskError as error:
        yield "raised", error.cause if isinstance(error.cause, Exception) else RuntimeError(str(error))
    except ray.exceptions.WorkerCrashedError:
        yield "lost", f"a Ray worker was lost {RETRIES + 1} times at one task"
    except (ray.exceptions.RayError, ConnectionError) as error:
        yield "lost", f"a task was lost on the Ray cluster ({_first_line(error)})"


def _checked(function: Callable[[Any, Any], Any], wanted: str, shared: Any, own: Any) -> Any:
    """Run the task on a worker of the cluster: call `function` if that machine has the same sources."""
    if fingerprint() != wanted:
        raise BadSetting(
            f"a node of the Ray cluster ({socket.gethostname()}) has another version of paceline than this machine: "
            "install the same on all"
        )
    return function(shared, own)


def _watch(address: str, line: Line) -> None:
    """End this process, with a message, when the cluster has not answered for a while."""
    silent = 0
    while silent < ASK_TIMES:
        time.sleep(ASK_EVERY_S)
        silent = 0 if answers(address) else silent + 1
    with contextlib.suppress(OSError):
        line.tell("lost", f"the Ray cluster at {address} is gone")
    os._exit(1)


# ---------------------------------------------------------------- finding the cluster


def connected() -> tuple[Any, str]:
    """Connect Ray to the cluster that RAY_ADDRESS names, or to a new local one; return Ray and the address of the head.

    Raise BadSetting if Ray is not installed or no cluster answers at the address.
    """
    named = os.environ.get(ADDRESS, "")
    own = named in ("", "local")
    if not own and named != "auto":
        check_address(named)
    if own or is_loopback(named):
        # Ray would replace loopback by this machine's external address and listen there; this is Ray's switch to
        # prevent it.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Ray reports usage to its makers over the network unless this is set.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise BadSetting(NEEDS_RAY) from None
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}
    if own:
        quiet |= {"address": "local", "include_dashboard": False}
    try:
        ray.init(**quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise BadSetting(f"{ADDRESS}={quoted(named)}: no Ray cluster can be used there: {_first_line(error)}") from None
    return ray, ray.get_runtime_context().gcs_address


def check_address(named: str) -> None:
    """Raise BadSetting if `named` is not HOST:PORT or no cluster answers there."""
    if _host_and_port(named)[1] < 0:
        raise BadSetting(
            f"{ADDRESS}={quoted(named)} is not an address that can be used: write the head node's HOST:PORT, or 'auto'"
        )
    if not answers(named):
        raise BadSetting(f"{ADDRESS}={quoted(named)}: no Ray cluster answers there: is it running?")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _host_and_port(address: str) -> tuple[str, int]:
    """Return host and port; the port is -1 if this is not an address."""
    host, colon, port = address.rpartition(":")
    good = bool(colon and host) and "/" not in address and port.isdecimal() and 0 < int(port) < 65_536
    return host.strip("[]"), int(port) if good else -1


def answers(address: str) -> bool:
    """Return whether a server that may be a Ray head answers at HOST:PORT: one that speaks HTTP/2, as gRPC does.

    Any other server would keep Ray waiting for minutes. Under TLS only the connection is tried.
    """
    try:
        with socket.create_connection(_host_and_port(address), ANSWER_S) as talk:
            if os.environ.get("RAY_USE_TLS", "0").lower() not in ("", "0", "false"):
                return True
            talk.settimeout(ANSWER_S)
            talk.sendall(HTTP2_HELLO)
            frame = b""
            while len(frame) < HTTP2_HEADER and (more := talk.recv(HTTP2_HEADER - len(frame))):
                frame += more
    except OSError:
        return False
    return len(frame) == HTTP2_HEADER and frame[3] == HTTP2_SETTINGS


def is_loopback(address: str) -> bool:
    """Return whether the address HOST:PORT is reachable from this machine only."""
    host, _ = _host_and_port(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    main()
