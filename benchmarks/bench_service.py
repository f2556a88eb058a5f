"""The HTTP service under load, beside a bare FastAPI application under the same load in the same run.

200 clients read the progress of a running batch twice a second each, 20 clients post a batch of ten lines a second, 200
more listen to event streams, while 40 requests a second are launched; all on this machine, which also runs the
synthetic provider. The clients are bare sockets in one process of its own, whose share of the CPU and whose own
lateness are printed, since both count as the server's. Printed: errors, latencies as the clients see them, the server's
CPU time per request (its simulator's included), and its memory, before and after rounds of streams that come and go.
Then: the memory that an upload of many lines takes, and the time of a what-if of 1,000 requests; and whether each
promise is kept.

    python -m benchmarks.bench_service [--short]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

READERS, POSTERS, LISTENERS = 200, 20, 200
READ_EVERY_S, POST_EVERY_S = 0.5, 1.0
# Answers take a second, and so many requests are in flight: less than half of what a 30-million-TPM account launches.
LAUNCHES = 40
# What is promised: the slowest answer but one in a hundred; and by how much more memory a long upload may take.
LIMIT_MS, FLAT_MIB = 250.0, 32.0
WAIT_S = 120.0
BARE = """
import socket, sys, uvicorn
from fastapi import FastAPI, Request
app = FastAPI()
@app.get("/batches/{batch_id}")
async def get(batch_id: str):
    return {"batch_id": batch_id, "state": "running", "requests": 10, "done": 3, "failed": 0, "eta_s": 1.5}
@app.post("/batches")
async def post(request: Request):
    return {"batch_id": "batch_0", "requests": (await request.body()).count(10)}
uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="warning")
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def line(name: str, words: int = 8) -> bytes:
    content = "How are you? " * words
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": content}], "max_tokens": 50}
    record = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(record).encode() + b"\n"


def lines(count: int, words: int = 8) -> bytes:
    return b"".join(line(f"q-{i}", words) for i in range(count))


# ---------------------------------------------------------------- a client that costs little


class Connection(asyncio.Protocol):
    """One kept-alive HTTP/1.1 connection: as little as a load generator beside its server can be.

    An answer is timed when its last byte is handed over by the socket, before anybody looks at it.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self._transport: asyncio.Transport | None = None
        self._came = bytearray()
        self._wanted = -1
        self._body_from = 0
        self._answer: asyncio.Future[tuple[int, bytes, float]] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body."""
        status, answer, _ = await self.timed(request(self.port, method, path, body))
        return status, answer

    async def timed(self, content: bytes) -> tuple[int, bytes, float]:
        """Status, body and seconds from the first byte sent to the last received."""
        loop = asyncio.get_running_loop()
        if self._transport is None:
            self._transport, _ = await loop.create_connection(lambda: self, "127.0.0.1", self.port)
        self._answer, self._wanted = loop.create_future(), -1
        begun = time.perf_counter()
        self._transport.write(content)
        status, answer, came_at = await self._answer
        return status, answer, came_at - begun

    def data_received(self, data: bytes) -> None:
        came, answer = self._came, self._answer
        came += data
        if self._wanted < 0:
            end = came.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(came[:end]).lower()
            self._body_from = end + 4
            self._wanted = self._body_from + int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        if len(came) >= self._wanted and answer is not None and not answer.done():
            at = time.perf_counter()
            answer.set_result((int(came[9:12]), bytes(came[self._body_from : self._wanted]), at))
            self._came = bytearray()

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("closed by the server"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def request(port: int, method: str, path: str, body: bytes = b"") -> bytes:
    """A request as it goes over the wire."""
    kind = "application/json" if body[:1] == b"{" and b"\n" not in body else "application/jsonl"
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + f"Content-Type: {kind}\r\n\r\n".encode() + body


class Listener(asyncio.Protocol):
    """One event stream."""

    def __init__(self, load: Load) -> None:
        self._load = load

    def data_received(self, data: bytes) -> None:
        self._load.events += data.count(b"event: ")


class Load:
    """What the clients saw. Latencies in seconds; `lag_s`: how late this process itself was, 20 times a second."""

    def __init__(self, port: int, batch_id: str) -> None:
        self.port, self.batch_id = port, batch_id
        self.reads: list[float] = []
        self.posts: list[float] = []
        self.lag_s: list[float] = []
        self.events = 0
        self.errors: list[str] = []

    async def client(self, number: int, content: bytes, wanted: int, every_s: float, into: list[float]) -> None:
        connection, loop = Connection(self.port), asyncio.get_running_loop()
        at = loop.time() + every_s * (number * 0.618034 % 1.0)
        try:
            while True:
                await asyncio.sleep(max(0.0, at - loop.time()))
                at = max(at, loop.time() - every_s) + every_s
                status, answer, took_s = await connection.timed(content)
                into.append(took_s)
                if status != wanted:
                    self.errors.append(f"{status} {answer[:100]!r}")
        except OSError as error:
            self.errors.append(repr(error))
        finally:
            connection.close()

    async def listener(self) -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: Listener(self), "127.0.0.1", self.port)
        try:
            transport.write(request(self.port, "GET", f"/batches/{self.batch_id}/events"))
            await asyncio.sleep(1e6)
        finally:
            transport.close()

    async def watched(self) -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.05)
            self.lag_s.append(time.perf_counter() - begun - 0.05)

    async def run(self, seconds: float, posts: int, listeners: int) -> None:
        read = request(self.port, "GET", f"/batches/{self.batch_id}")
        tasks = [asyncio.create_task(self.watched())]
        tasks += [asyncio.create_task(self.client(i, read, 200, READ_EVERY_S, self.reads)) for i in range(READERS)]
        for i in range(POSTERS):
            # Prompts of another length each: no two batches are alike.
            post = request(self.port, "POST", "/batches", lines(10, words=8 + i))
            tasks.append(asyncio.create_task(self.client(i, post, posts, POST_EVERY_S, self.posts)))
        tasks += [asyncio.create_task(self.listener()) for _ in range(listeners)]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# ---------------------------------------------------------------- servers


@contextlib.contextmanager
def process(command: list[str], port: int, folder: Path, **environment: str) -> Iterator[psutil.Process]:
    """A server that answers, until the block ends."""
    env = os.environ | environment
    with open(folder / f"{port}.log", "wb") as log:
        started = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    try:
        until = time.monotonic() + WAIT_S
        while True:
            assert started.poll() is None, (folder / f"{port}.log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
                break
            assert time.monotonic() < until, "it does not come"
            time.sleep(0.05)
        yield psutil.Process(started.pid)
    finally:
        started.kill()
        started.wait()


def cpu_s(of: psutil.Process) -> float:
    """Seconds of CPU time, those of children that run included."""
    times = [each.cpu_times() for each in (of, *of.children())] if of.pid != os.getpid() else [of.cpu_times()]
    return float(sum(each.user + each.system for each in times))


def mib(of: psutil.Process) -> float:
    return float(of.memory_info().rss / 2**20)


def others() -> float:
    """Seconds of CPU time that this machine has given to whatever is none of ours, since it began."""
    times = psutil.cpu_times()
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    used_s = 0.0
    for each in ours:
        with contextlib.suppress(psutil.NoSuchProcess):
            used_s += each.cpu_times().user + each.cpu_times().system
    return float(times.user + times.nice + times.system + times.irq + times.softirq - used_s)


async def asked(port: int, method: str, path: str, body: bytes = b"") -> Any:
    connection = Connection(port)
    try:
        status, answer = await connection.ask(method, path, body)
        assert status < 300, (status, answer[:300])
        return json.loads(answer)
    finally:
        connection.close()


async def ready(port: int) -> None:
    for _ in range(2_400):
        with contextlib.suppress(AssertionError, OSError):
            await asked(port, "GET", "/readyz")
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it is not ready")


async def compiled(port: int) -> None:
    """Until the simulator's compiled engine is loaded, which on a new machine is first compiled for half a minute."""
    shape = {"requests": 1_000, "prompt_tokens": 500, "max_output_tokens": 400}
    for _ in range(200):
        if (await asked(port, "POST", "/what-if", json.dumps({"shape": shape}).encode()))["runs"] > 1:
            return
        await asyncio.sleep(0.5)


# ---------------------------------------------------------------- what is measured


async def loaded(port: int, server: psutil.Process, seconds: float, *, bare: bool) -> dict[str, float]:
    batch_id = "batch_0"
    if not bare:
        await ready(port)
        await compiled(port)
        batch_id = (await asked(port, "POST", "/batches", lines(5_000)))["batch_id"]
    warm = Load(port, batch_id)
    await warm.run(min(3.0, seconds), 200 if bare else 202, 0)
    me = psutil.Process()
    load, before, mine = Load(port, batch_id), cpu_s(server), cpu_s(me)
    await load.run(seconds, 200 if bare else 202, 0 if bare else LISTENERS)
    used_s = cpu_s(server) - before
    return {
        "errors": len(load.errors),
        "server_cpu_share": used_s / seconds,
        "client_cpu_share": (cpu_s(me) - mine) / seconds,
        "client_lag_p99_ms": 1e3 * quantile(load.lag_s, 0.99),
        "reads": len(load.reads),
        "posts": len(load.posts),
        "events": load.events,
        "read_p50_ms": 1e3 * quantile(load.reads, 0.5),
        "read_p99_ms": 1e3 * quantile(load.reads, 0.99),
        "post_p50_ms": 1e3 * quantile(load.posts, 0.5),
        "post_p99_ms": 1e3 * quantile(load.posts, 0.99),
        "cpu_ms_per_request": 1e3 * used_s / (len(load.reads) + len(load.posts)),
    }


async def streamed(port: int, server: psutil.Process, rounds: int) -> list[float]:
    """Memory after each round of streams that come, listen for a second and go."""
    batch_id = (await asked(port, "GET", "/batches?limit=1"))["batches"][0]["batch_id"]
    found = []
    for _ in range(rounds):
        load = Load(port, batch_id)
        tasks = [asyncio.create_task(load.listener()) for _ in range(LISTENERS)]
        await asyncio.sleep(1.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.3)
        found.append(mib(server))
    return found


async def uploaded(port: int, server: psutil.Process, count: int) -> tuple[float, float]:
    """(seconds, MiB at most above what it had before) of an upload of so many lines."""
    content, before, most = lines(count), mib(server), 0.0
    begun = time.perf_counter()
    upload = asyncio.create_task(asked(port, "POST", "/batches", content))
    while not upload.done():
        most = max(most, mib(server))
        await asyncio.sleep(0.02)
    batch_id = (await upload)["batch_id"]
    took_s = time.perf_counter() - begun
    await asked(port, "POST", f"/batches/{batch_id}/cancel")
    return took_s, most - before


async def what_ifs(port: int, times: int) -> list[float]:
    """Seconds of each what-if of 1,000 requests, as a client sees it; the engine is loaded by then or not."""
    shape = {"requests": 1_000, "prompt_tokens": 500, "max_output_tokens": 400}
    body = {"shape": shape, "settings": {"OPENAI_STAGGER_SECONDS": 0.5}}
    found = []
    for i in range(times):
        body["seed"] = i  # type: ignore[assignment]
        begun = time.perf_counter()
        await asked(port, "POST", "/what-if", json.dumps(body).encode())
        found.append(time.perf_counter() - begun)
    return found


def verdict(text: str, is_kept: bool) -> None:
    print(f"{'kept' if is_kept else 'MISSED':7} {text}")


async def of_service(port: int, server: psutil.Process, short: bool) -> dict[str, float]:
    found = await loaded(port, server, 5.0 if short else 30.0, bare=False)
    rows = await streamed(port, server, 4 if short else 12)
    print(f"memory after each round of {LISTENERS} streams, MiB: {', '.join(f'{row:.0f}' for row in rows)}")
    grown = []
    for count in (2_000, 20_000) if short else (10_000, 100_000):
        took_s, more = await uploaded(port, server, count)
        grown.append(more)
        print(f"upload of {count:,} lines: {took_s:.1f} s, at most {more:.0f} MiB more")
    quiet = await what_ifs(port, 10)
    print(f"what-if of 1,000 requests: median {1e3 * statistics.median(quiet):.0f} ms, most {1e3 * max(quiet):.0f} ms")
    p99_ms = max(found["read_p99_ms"], found["post_p99_ms"])
    verdict(f"no error under load: {found['errors']:.0f}", not found["errors"])
    verdict(f"p99 under {LIMIT_MS:g} ms: {p99_ms:.0f} ms", p99_ms < LIMIT_MS)
    verdict(
        f"event streams do not grow memory: {rows[-1] - rows[1]:+.1f} MiB since the second round",
        rows[-1] <= rows[1] + 2,
    )
    verdict(f"an upload ten times as long takes {grown[1] - grown[0]:+.0f} MiB more", grown[1] - grown[0] < FLAT_MIB)
    verdict(f"what-if under 300 ms: {1e3 * max(quiet):.0f} ms", max(quiet) < 0.3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--short", action="store_true", help="a quick look")
    short = parser.parse_args().short
    paceline = [sys.executable, "-m", "sim.app.cli"]
    begun, before = time.monotonic(), others()
    with tempfile.TemporaryDirectory(prefix="paceline-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        root = str(Path(__file__).resolve().parent.parent)
        llm, port, other = free_port(), free_port(), free_port()
        command = [*paceline, "provider", "--port", str(llm), "--tpm", "1000000000", "--latency", "1,0"]
        stack.enter_context(process(command, llm, folder, PYTHONPATH=root))
        (folder / "bare.py").write_text(BARE)
        with process([sys.executable, "bare.py", str(other)], other, folder) as peer:
            bare = asyncio.run(loaded(other, peer, 5.0 if short else 30.0, bare=True))
        settings = {"OPENAI_MAX_CONCURRENCY": str(LAUNCHES), "OPENAI_STAGGER_SECONDS": "0"}
        settings |= {"OPENAI_TPM_LIMIT": "1000000000", "OPENAI_API_KEY": "nobody's", "PYTHONPATH": root}
        settings["OPENAI_BASE_URL"] = f"http://127.0.0.1:{llm}/v1"
        command = [*paceline, "serve", "--port", str(port), "--database", "service.db", "--quiet"]
        server = stack.enter_context(process(command, port, folder, **settings))
        found = asyncio.run(of_service(port, server, short))
        theirs = (others() - before) / (time.monotonic() - begun)
    print(f"{READERS} readers, {POSTERS} posters, {LISTENERS} listeners ({found['events']:,.0f} events), ", end="")
    print(f"{LAUNCHES} launches a second; other programs took {theirs:.2f} of {os.cpu_count()} cores meanwhile")
    print(f"{'':24}{'service':>10}{'bare':>10}{'ratio':>8}")
    for row in ("reads", "posts", "read_p50_ms", "read_p99_ms", "post_p50_ms", "post_p99_ms", "cpu_ms_per_request"):
        print(f"{row:24}{found[row]:10,.1f}{bare[row]:10,.1f}{found[row] / max(1e-9, bare[row]):8.1f}")
    for row in ("server_cpu_share", "client_cpu_share", "client_lag_p99_ms"):
        print(f"{row:24}{found[row]:10,.2f}{bare[row]:10,.2f}")


if __name__ == "__main__":
    main()
