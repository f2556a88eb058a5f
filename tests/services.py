"""What tests of the HTTP service share: `paceline serve` in a process of its own, a client, and what it should find."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from platformdirs import user_cache_path

from tests.live import KEY, WAIT_S, Cli, Process, line

TEMPLATE = {"name": "greeting", "model": "gpt-4o-mini", "prompt": "Say hello to {{ name }}", "max_output_tokens": 50}
OVER = ("completed", "cancelled")


def until(what: str, true: Callable[[], Any]) -> Any:
    """What `true` returns once that is something; in bounded time."""
    end = time.monotonic() + WAIT_S
    while True:
        found = true()
        if found:
            return found
        assert time.monotonic() < end, f"never came: {what}"
        time.sleep(0.02)


# A connection for each call: one that idles is closed after 5 s on the service's clock, which may run 20 times as fast.
ANEW = httpx.Limits(max_keepalive_connections=0)


@dataclass(slots=True)
class Served:
    """A service that answers. `client`: knows its address. `database`: its path or URL."""

    process: Process
    client: httpx.Client
    database: str

    def get(self, path: str, **rest: Any) -> Any:
        """The JSON of a GET that must succeed."""
        return good(self.client.get(path, **rest))

    def post(self, path: str, content: Any = None, **rest: Any) -> Any:
        """The JSON of a POST that must succeed."""
        return good(self.client.post(path, json=content, **rest))

    def template(self, **changes: Any) -> str:
        """The id of a new template."""
        return str(self.post("/templates", TEMPLATE | changes)["template_id"])

    def run(self, template: str, runs: int = 1, **rest: Any) -> httpx.Response:
        """A batch-run of one input."""
        body = {"inputs": [{"name": "Ada"}], "runs": runs, **rest}
        return self.client.post(f"/templates/{template}/batch-run", json=body)

    def batch(self, count: int, *, prefix: str = "q", **params: Any) -> str:
        """The id of a new batch of raw lines."""
        return str(good(self.client.post("/batches", content=lines(count, prefix), params=params))["batch_id"])

    def over(self, batch_id: str) -> dict[str, Any]:
        """The batch, once it is over."""

        def found() -> dict[str, Any] | None:
            row: dict[str, Any] = self.get(f"/batches/{batch_id}")
            return row if row["state"] in OVER else None

        ended: dict[str, Any] = until(f"the end of {batch_id}", found)
        return ended

    def lines(self, batch_id: str, what: str = "results") -> list[dict[str, Any]]:
        """The lines of its results or errors."""
        answer = self.client.get(f"/batches/{batch_id}/{what}")
        assert answer.status_code == 200, answer.text
        return [json.loads(text) for text in answer.text.splitlines()]

    def stop(self, number: int = signal.SIGTERM) -> Any:
        """Signals it and waits for its end."""
        self.process.signal(number)
        ran = self.process.wait()
        self.client.close()
        return ran

    @property
    def log(self) -> str:
        """What it has said."""
        return self.process.out.read_text() + self.process.err.read_text()


def lines(count: int, prefix: str = "q", text: str = "How are you?") -> bytes:
    """A batch file."""
    return b"".join(json.dumps(line(f"{prefix}-{i}", text=text)).encode() + b"\n" for i in range(count))


def good(answer: httpx.Response) -> Any:
    """The JSON of an answer that must be a success."""
    assert answer.status_code < 300, f"{answer.status_code} {answer.text}"
    return answer.json()


def error_of(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The details of an answer that must be this error."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code, error
    assert error["message"]
    details: dict[str, Any] = error["details"]
    return details


def started(
    cli: Cli,
    folder: Path,
    base_url: str,
    *args: object,
    env: Mapping[str, str] | None = None,
    database: str = "",
    headers: Mapping[str, str] | None = None,
    limit_files: int = 0,
) -> Served:
    """A service that answers; it may still be getting ready."""
    where = database or str(folder / "service.db")
    # The user's cache, where machine code of the simulator is kept, not that of an empty home.
    cache = str(user_cache_path())
    env = {"OPENAI_BASE_URL": base_url, "XDG_CACHE_HOME": cache, **(env or {})}
    process = cli.start(
        "serve", "--port", "0", "--database", where, *args, env=env, cwd=folder, limit_files=limit_files
    )

    def address() -> str:
        assert not process.over.is_set(), process.wait().err
        # The command line may not have come as far as its own files yet.
        text = process.out.read_text() if process.out.exists() else ""
        return text.split()[2] if text.endswith("\n") else ""

    url = until("the address", address).replace("0.0.0.0", "127.0.0.1")
    return Served(process, httpx.Client(base_url=url, headers=dict(headers or {}), timeout=WAIT_S, limits=ANEW), where)


def ready(served: Served) -> Served:
    """The same, once it takes batches."""
    try:
        until("the service", lambda: served.client.get("/readyz").status_code == 200)
    except AssertionError:
        raise AssertionError(f"never ready: {served.client.get('/readyz').text} {served.log}") from None
    return served


@contextlib.contextmanager
def serving(cli: Cli, folder: Path, base_url: str, *args: object, **rest: Any) -> Iterator[Served]:
    """A service that takes batches, until the block ends. It must have printed no key and no traceback."""
    served = ready(started(cli, folder, base_url, *args, **rest))
    try:
        yield served
    finally:
        served.client.close()
        if not served.process.over.is_set():
            served.stop(signal.SIGKILL)
    assert KEY not in served.log, "the key was printed"
    assert "Traceback" not in served.log, served.log
