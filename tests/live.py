"""What the end-to-end tests share: batch files, settings, a provider on loopback, and the command line in processes."""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from governor.journal.journal import Journal
from sim.model.faults import Event
from sim.model.provider_config import ProviderConfig
from sim.serving.server import ProviderThread, serve

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-a-key-that-nobody-may-see-0123456789"
# Whatever hangs has hung for good after this, on a machine ten times as busy as it has cores too.
WAIT_S = 120.0
# Nothing holds the batch back: what such a test is about is not pacing.
FREE = {
    "OPENAI_MAX_CONCURRENCY": "20",
    "OPENAI_STAGGER_SECONDS": "0",
    "OPENAI_TPM_LIMIT": "10000000",
    "OPENAI_CHARGE_RULE": "auto",
    "OPENAI_TPM_WINDOW": "bucket",
    "OPENAI_BACKOFF_BASE_SECONDS": "0.05",
    "OPENAI_BACKOFF_KEEPS_PERMIT": "false",
}


def line(
    custom_id: str, *, model: str = "gpt-4o-mini", text: str = "How are you?", cap: int | None = 100
) -> dict[str, Any]:
    """One line of a batch file."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}]}
    if cap is not None:
        body["max_tokens"] = cap
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write_batch(path: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    """A batch file of these lines."""
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def batch(path: Path, count: int, seed: int = 1, *, model: str = "gpt-4o-mini", cap: int = 100) -> Path:
    """`count` requests of different sizes."""
    rng = random.Random(seed)
    lines = [line(f"q-{i}", model=model, text="x" * rng.randint(20, 400), cap=cap) for i in range(count)]
    return write_batch(path, lines)


def provider(
    *,
    events: Iterable[dict[str, Any]] = (),
    time_scale: float = 1.0,
    seed: int = 0,
    stated_time: Literal["client", "provider"] = "client",
    **config: Any,
) -> ProviderThread:
    """A quick provider without limits, but for what `config` says of it."""
    given: dict[str, Any] = {
        "tpm": 0,
        "rpm": 0,
        "latency": {"first_token_s": 0.02, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0},
        "faults": {"refusal_s": 0.0},
        **config,
    }
    made = ProviderConfig().with_(**given)
    return serve(
        made, seed=seed, events=[Event(**event) for event in events], time_scale=time_scale, stated_time=stated_time
    )


# ---------------------------------------------------------------- the command line


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which must be one JSON object and nothing else."""
        found: dict[str, Any] = json.loads(self.out)
        return found


@dataclass(slots=True)
class Process:
    """A command under way. A process of its own, which alone is signalled."""

    pid: int
    out: Path
    err: Path
    over: threading.Event = field(default_factory=threading.Event)
    code: int = -1

    def wait(self) -> Ran:
        """Until it has ended."""
        assert self.over.wait(WAIT_S), f"still running after {WAIT_S} s: {self.err.read_text()[-2000:]}"
        return Ran(self.code, self.out.read_text(), self.err.read_text())

    def signal(self, number: int) -> None:
        """Sends it a signal, if it is still there."""
        if not self.over.is_set():
            os.kill(self.pid, number)


class Cli:
    """Runs command lines in processes that need not import anything (see `live_child`). A context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._started: list[int] = []
        self._told = threading.Condition()
        self._running: dict[int, Process] = {}
        self._ended: dict[int, int] = {}
        self._parent = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "live_child.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        with self._told:
            assert self._told.wait_for(lambda: self._started, WAIT_S), "the command line could not be loaded"
        self._started.clear()

    def __enter__(self) -> Cli:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        for process in self._running.values():
            process.signal(9)
        self._parent.stdin.close()
        self._parent.wait(WAIT_S)
        self._reader.join(WAIT_S)
        self._parent.stdout.close()

    def _read(self) -> None:
        assert self._parent.stdout is not None
        for text in self._parent.stdout:
            words = text.split()
            with self._told:
                if len(words) == 2:
                    self._ended[int(words[0])] = int(words[1])
                    self._match()
                else:
                    self._started.append(int(words[0]) if words[0].isdecimal() else 0)
                self._told.notify_all()

    def _match(self) -> None:
        for pid in list(self._ended):
            process = self._running.pop(pid, None)
            if process is not None:
                process.code = self._ended.pop(pid)
                process.over.set()

    def start(
        self,
        *args: object,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        limit_bytes: int = 0,
        limit_files: int = 0,
        dies_after: int = 0,
    ) -> Process:
        """A command in the background. Its environment is `env` and nothing else, with a key unless that says so.

        `limit_bytes`: no file may become larger. `dies_after`: killed right after so many commits; 0 = not at all.
        """
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        order = {
            "args": [str(arg) for arg in args],
            "env": {"OPENAI_API_KEY": KEY, "HOME": str(self._folder), "LANG": "C.UTF-8", **FREE, **(env or {})},
            "cwd": str(cwd or self._folder),
            "stdout": str(out),
            "stderr": str(err),
            "limit_bytes": limit_bytes,
            "limit_files": limit_files,
            "dies_after": dies_after,
        }
        assert self._parent.stdin is not None
        with self._told:
            self._parent.stdin.write(json.dumps(order) + "\n")
            self._parent.stdin.flush()
            assert self._told.wait_for(lambda: self._started, WAIT_S), "no process was started"
            process = Process(self._started.pop(0), out, err)
            self._running[process.pid] = process
            self._match()
        return process

    def run(self, *args: object, **how: Any) -> Ran:
        """A command, to its end."""
        ran = self.start(*args, **how).wait()
        assert KEY not in ran.out + ran.err, "the key was printed"
        assert "Traceback" not in ran.err, ran.err
        return ran


@functools.cache
def shared_cli() -> Cli:
    """One for all modules: loading the command line takes seconds."""
    folder = tempfile.TemporaryDirectory(prefix="paceline-cli-")
    cli = Cli(Path(folder.name))
    # In this order, the last registered first: end the process, then remove its folder.
    atexit.register(folder.cleanup)
    atexit.register(cli.__exit__)
    return cli


def run_args(folder: Path, base_url: str, *more: object, requests: str = "requests.jsonl") -> list[object]:
    """`paceline run` on the folder's batch file, into its results.jsonl."""
    return ["run", folder / requests, "--out", folder / "results.jsonl", "--base-url", base_url, *more]


# ---------------------------------------------------------------- what came out


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(text) for text in path.read_text().splitlines()]


def check_whole(folder: Path, count: int) -> None:
    """Exactly one line for each request, in order of the input, over both files; and the journal is sound."""
    results, errors = (lines_of(folder / name) for name in ("results.jsonl", "results.errors.jsonl"))
    for found in (results, errors):
        numbers = [int(each["custom_id"].removeprefix("q-")) for each in found]
        assert numbers == sorted(numbers)
    ids = [each["custom_id"] for each in (*results, *errors)]
    assert sorted(ids) == sorted(f"q-{i}" for i in range(count))
    for each in results:
        assert each["error"] is None
        assert each["response"]["status_code"] == 200
    for each in errors:
        assert each["error"]["code"]
    with Journal.open(folder / "results.journal.db") as journal:
        assert journal.complaints() == []
