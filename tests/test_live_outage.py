"""Outages of a server that is not ours, met by `paceline run` over loopback: nothing is lost, and little is sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from pathlib import Path

import pytest

from tests.live import WAIT_S, Cli, batch, check_whole, run_args, shared_cli

ANSWER = {
    "id": "c",
    "object": "chat.completion",
    "created": 0,
    "model": "gpt-4o-mini",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6},
}
HTML = b"<html><body>Service Unavailable</body></html>"


class Server:
    """Answers chat requests over raw sockets after `reply_s`; from its `after`-th request on it is out for `out_s`.

    `kind`: it closes connections ("close"), accepts and hangs ("hang"), answers 503 with a page ("503"), or does not
    listen ("refuse"). Times in seconds of a clock that runs `scale` times as fast as the wall's. A context manager.
    """

    def __init__(self, kind: str, after: int, out_s: float, scale: float, reply_s: float = 0.5) -> None:
        self.kind, self.after, self.out_s, self.scale, self.reply_s = kind, after, out_s, scale, reply_s
        self.answered = 0
        self.met = 0  # requests or connections while it was out
        self.began = float("inf")
        self.writers: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> Server:
        ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.main(ready)))
        self.thread.start()
        assert ready.wait(WAIT_S)
        return self

    def __exit__(self, *exception: object) -> None:
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join(WAIT_S)

    async def main(self, ready: threading.Event) -> None:
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        self.listener = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = self.listener.sockets[0].getsockname()[1]
        ready.set()
        await self.over.wait()
        self.listener.close()
        for writer in self.writers:
            writer.transport.abort()

    @property
    def is_out(self) -> bool:
        return self.began <= time.monotonic() < self.began + self.out_s / self.scale

    async def fall(self) -> None:
        """The outage begins: all that is in flight dies."""
        self.began = time.monotonic()
        if self.kind != "hang":
            for writer in self.writers:
                writer.transport.abort()
        if self.kind == "refuse":
            self.listener.close()
            await asyncio.sleep(self.out_s / self.scale)
            self.listener = await asyncio.start_server(self.serve, "127.0.0.1", self.port)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                if self.is_out and self.kind == "close":
                    self.met += 1
                    break
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(int(x[15:]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:"))
                await reader.readexactly(length)
                if self.is_out:
                    self.met += 1
                    if self.kind == "503":
                        writer.write(reply(b"503 Service Unavailable", b"text/html", HTML))
                        continue
                    if self.kind == "hang":
                        await self.over.wait()
                    break
                await asyncio.sleep(self.reply_s / self.scale)
                if self.is_out:
                    break
                self.answered += 1
                writer.write(reply(b"200 OK", b"application/json", json.dumps(ANSWER).encode()))
                if self.answered == self.after:
                    self.falling = asyncio.create_task(self.fall())
        self.writers.discard(writer)
        writer.close()


def reply(status: bytes, kind: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (status, kind, len(body))
    return head + body


FREE = ("OPENAI_TPM_LIMIT=1000000000", "OPENAI_STAGGER_SECONDS=0")


def settings(*more: str) -> list[str]:
    return [word for each in (*FREE, *more) for word in ("--set", each)]


@pytest.fixture(scope="module")
def cli() -> Cli:
    return shared_cli()


@pytest.mark.parametrize("kind", ["close", "503", "refuse", "hang"])
def test_a_minute_without_answers_loses_nothing_and_draws_few_attempts(cli: Cli, tmp_path: Path, kind: str) -> None:
    batch(tmp_path / "requests.jsonl", 300)
    more = settings("OPENAI_BACKOFF_BASE_SECONDS=0.5", "OPENAI_MAX_CONCURRENCY=20", "OPENAI_REQUEST_TIMEOUT_SECONDS=20")
    with Server(kind, 100, 60.0, 20.0) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        ran = cli.run(*run_args(tmp_path, url, "--json", "--yes", "--time-scale", "20", *more))
    assert ran.code == 0, ran.err
    assert (ran.json["completed"], ran.json["failed"]) == (300, 0)
    assert server.met <= 60
    assert ran.json["attempts"] <= 300 + 60
    assert "no answer for" in ran.err
    assert "answers again" in ran.err
    check_whole(tmp_path, 300)


def test_thirteen_minutes_without_answers_cost_no_request_and_about_a_probe_a_minute(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 1_500)
    with Server("close", 300, 780.0, 60.0) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        more = settings("OPENAI_MAX_CONCURRENCY=20")
        ran = cli.run(*run_args(tmp_path, url, "--json", "--yes", "--time-scale", "60", *more))
    assert ran.code == 0, ran.err
    assert (ran.json["completed"], ran.json["failed"]) == (1_500, 0)
    assert server.met <= 20 + 20


def test_a_run_in_an_outage_ends_by_its_budget_and_goes_on_later(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 60)
    more = settings("OPENAI_MAX_CONCURRENCY=20")
    with Server("close", 20, 200.0, 20.0) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        args = run_args(tmp_path, url, "--json", "--yes", "--time-scale", "20", *more)
        first = cli.run(*args, "--stop-after", "1m")
        assert first.code == 5, first.err
        second = cli.run(*args)
    assert second.code == 0, second.err
    assert (second.json["completed"], second.json["failed"]) == (60, 0)
