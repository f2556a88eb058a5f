"""What harms a service from outside, and what it may cost: full disks, huge answers, absurd waits, templates."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import resource
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live import WAIT_S, Cli, provider, shared_cli
from tests.services import Served, error_of, good, lines, ready, started, until

LATENCY = {"first_token_s": 0.05, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0}
UNLIMITED = resource.RLIM_INFINITY


@pytest.fixture
def cli() -> Iterator[Cli]:
    """The command line; whatever a test has left running is ended."""
    found = shared_cli()
    yield found
    for process in list(found._running.values()):
        process.signal(signal.SIGKILL)


def size_of(served: Served) -> int:
    """Bytes of the database, with its write-ahead log."""
    path = Path(served.database)
    return sum(each.stat().st_size for each in path.parent.glob(f"{path.name}*"))


# ---------------------------------------------------------------- the disk


def test_answers_are_kept_while_the_disk_is_full_and_nothing_is_sent_twice(cli: Cli, tmp_path: Path) -> None:
    count = 10
    slow = LATENCY | {"first_token_s": 2.0}
    with provider(latency=slow) as llm:
        served = ready(started(cli, tmp_path, llm.base_url, env={"OPENAI_MAX_CONCURRENCY": str(count)}))
        batch_id = served.batch(2 * count)
        until("all are in flight", lambda: llm.stats()["in_flight"] == count)
        pid = served.process.pid
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, UNLIMITED))
        until("the complaint", lambda: served.client.get("/readyz").status_code == 503)
        assert "the disk" in served.client.get("/readyz").text
        until("their answers", lambda: llm.stats()["in_flight"] == 0)
        assert served.client.get("/healthz").status_code == 200
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))
        row = served.over(batch_id)
        assert (row["done"], row["failed"], row["resent"]) == (2 * count, 0, 0)
        assert llm.stats()["requests"] == 2 * count
        until("readiness", lambda: served.client.get("/readyz").status_code == 200)
        served.stop(signal.SIGKILL)


def test_a_refused_post_grows_the_database_by_nothing(cli: Cli, tmp_path: Path) -> None:
    env = {"PREFLIGHT_MODE": "strict", "OPENAI_TPM_LIMIT": "100000000", "OPENAI_CHARGE_RULE": "fixed"}
    with provider(latency=LATENCY) as llm:
        served = ready(started(cli, tmp_path, llm.base_url, env=env | {"OPENAI_EST_TOKENS_PER_RUN": "2000000"}))
        made = served.post("/templates", {"name": "t", "model": "gpt-4o-mini", "prompt": "{{ text }}"})
        before = size_of(served)
        body = {"inputs": [{"text": "x" * 900_000}], "runs": 400}
        answer = served.client.post(f"/templates/{made['template_id']}/batch-run", json=body)
        error_of(answer, 503, "BATCH_RATE_LIMITED")
        assert size_of(served) - before < 2**20
        answer = served.client.post("/batches", content=lines(2_000))
        error_of(answer, 503, "BATCH_RATE_LIMITED")
        assert size_of(served) - before < 2**20
        # Accepted, its 400 runs share one body: in the file and in the log.
        good(served.client.put("/settings", json={"settings": {"OPENAI_EST_TOKENS_PER_RUN": 1}}))
        row = good(served.client.post(f"/templates/{made['template_id']}/batch-run", json=body))
        assert row["requests"] == 400
        good(served.client.post(f"/batches/{row['batch_id']}/cancel"))
        assert size_of(served) - before < 16 * 2**20
        served.stop(signal.SIGKILL)


# ---------------------------------------------------------------- answers


class Huge(BaseHTTPRequestHandler):
    """Answers each call with 300 MB of JSON, plain or compressed by the model's name; a small one to others."""

    protocol_version = "HTTP/1.1"
    calls = 0
    packed = b""

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).calls += 1
        head = b'{"id": "c", "object": "chat.completion", "choices": [{"index": 0, "finish_reason": "stop", "message": '
        head += b'{"role": "assistant", "content": "'
        tail = b'"}}], "usage": {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        if b'"plain"' in asked:
            piece, pieces = b"x" * 10**6, 300
            self.send_header("Content-Length", str(len(head) + pieces * len(piece) + len(tail)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                for part in (head, *[piece] * pieces, tail):
                    self.wfile.write(part)
            self.close_connection = True
            return
        content = head + b"hello" + tail
        if b'"packed"' in asked:
            content = Huge.packed = Huge.packed or gzip.compress(head + b"x" * 300 * 10**6 + tail, 1)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


class ByModel(BaseHTTPRequestHandler):
    """A provider that does not know the model `nope`, and answers all others."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        usage = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
        message = {"role": "assistant", "content": "hello"}
        status, content = 200, {"choices": [{"index": 0, "finish_reason": "stop", "message": message}], "usage": usage}
        if asked["model"] == "nope":
            error = {"message": "The model `nope` does not exist", "code": "model_not_found", "type": "invalid"}
            status, content = 404, {"error": error}
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The base URL of such a provider, until the block ends."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()


def test_a_batch_that_is_refused_stops_itself_and_never_the_pool(cli: Cli, tmp_path: Path) -> None:
    with answering(ByModel) as url:
        served = ready(started(cli, tmp_path, url, env={"OPENAI_MAX_CONCURRENCY": "1"}))
        nope = lines(40, "nope").replace(b"gpt-4o-mini", b"nope")
        refused = good(served.client.post("/batches", content=nope))["batch_id"]
        row = until("its stop", lambda: (row := served.get(f"/batches/{refused}"))["state"] == "stopped" and row)
        assert "model_not_found" in row["reason"]
        assert row["done"] == 0
        assert row["failed"] <= 4
        assert (served.client.get("/readyz").status_code, served.get("/readyz")["detail"]) == (200, "")
        # One of its requests asks for what there is not: that one fails, whatever comes first.
        mixed = lines(40, "mixed").replace(b"gpt-4o-mini", b"nope", 1)
        row = served.over(good(served.client.post("/batches", content=mixed))["batch_id"])
        assert (row["state"], row["done"], row["failed"]) == ("completed", 39, 1)
        # To go on with it is somebody's decision; it stops again for the same reason.
        good(served.client.post(f"/batches/{refused}/resume"))
        until("its second stop", lambda: served.get(f"/batches/{refused}")["failed"] > 4 or None)
        until("its second stop", lambda: served.get(f"/batches/{refused}")["state"] == "stopped")
        served.stop(signal.SIGKILL)


def peak_mb(served: Served) -> float:
    """The most memory that the process ever had."""
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1_000.0


def test_a_huge_answer_ends_its_own_request_in_bounded_memory(cli: Cli, tmp_path: Path) -> None:
    Huge.calls = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Huge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/v1"
            served = ready(started(cli, tmp_path, url, env={"OPENAI_MAX_CONCURRENCY": "1"}))
            texts = [b'"small"', b'"plain"', b'"packed"', b'"small"']
            content = b"".join(
                each.replace(b"How are you?", text.strip(b'"')) + b"\n"
                for each, text in zip(lines(4).splitlines(), texts, strict=True)
            )
            batch_id = good(served.client.post("/batches", content=content))["batch_id"]
            row = served.over(batch_id)
            assert (row["done"], row["failed"]) == (2, 2)
            # Paid for once, and not bought again.
            assert Huge.calls == 4
            assert peak_mb(served) < 400.0
            served.stop(signal.SIGKILL)
        finally:
            server.shutdown()


def test_an_absurd_wait_is_said_and_the_service_goes_on(cli: Cli, tmp_path: Path) -> None:
    """Case a16: one 429 says "try again in 114h18m0s"."""
    asked = [{"kind": "throttled", "times": 1, "ratio": 1.0, "retry_after_s": 411_480.0}]
    env = {"OPENAI_MAX_CONCURRENCY": "1", "OPENAI_HOLD_ON_THROTTLE": "true"}
    with provider(events=asked, latency=LATENCY) as llm:
        served = ready(started(cli, tmp_path, llm.base_url, env=env))
        served.batch(2)
        until("the 429", lambda: llm.stats()["requests"])
        until("the log", lambda: "asks to wait 4 d 18 h" in served.log)
        served.stop(signal.SIGKILL)


# ---------------------------------------------------------------- templates, tokens


HOSTILE = [
    "{{" * 500_000,
    "{{ x }}" * 140_000,
    "{{ '" * 250_000,
    "{% for a in b %}" * 60_000,
    "x" * 1_000_000,
]


@contextlib.contextmanager
def asked_all_the_time(served: Served) -> Iterator[list[float]]:
    """Asks /healthz for as long as the block lasts; how long each answer took, in seconds."""
    took_s: list[float] = []
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=served.client.base_url, timeout=WAIT_S) as client:
            while not over.is_set():
                began = time.perf_counter()
                assert client.get("/healthz").status_code == 200
                took_s.append(time.perf_counter() - began)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield took_s
    finally:
        over.set()
        asking.join()


def test_no_template_stalls_the_service(cli: Cli, tmp_path: Path) -> None:
    """The figure is printed; that work is linear is asserted in `test_templates`."""
    made = {"name": "t", "model": "gpt-4o-mini"}
    deep = "[" * 500_000 + "]" * 500_000
    bodies = [json.dumps(made | {"prompt": prompt}) for prompt in HOSTILE]
    bodies += [json.dumps(made | {"prompt": "x"})[:-1] + f', "parameters": {{"a": {deep}}}}}']
    bodies += [json.dumps(made | {"prompt": "x", "parameters": {"a": [[]] * 250_000}})]
    with provider(latency=LATENCY) as llm:
        served = ready(started(cli, tmp_path, llm.base_url))
        found = served.post("/templates", made | {"prompt": "{{ text }}" * 5_000})
        path = f"/templates/{found['template_id']}/preflight"
        with asked_all_the_time(served) as took_s:
            for body in bodies:
                answer = served.client.post("/templates", content=body, headers={"Content-Type": "application/json"})
                assert answer.status_code == 422
            good(served.client.post(path, json={"inputs": [{"text": "x" * 150}] * 20, "runs": 20}))
            # What all inputs together become is bounded, too.
            answer = served.client.post(path, json={"inputs": [{"text": "x" * 190}] * 2_000})
            assert "larger than 536,870,912 bytes" in error_of_text(answer)
        print(f"{len(took_s)} answers, the slowest took {max(took_s):.3f} s")
        assert len(took_s) > 10
        served.stop(signal.SIGKILL)


def error_of_text(answer: httpx.Response) -> str:
    error_of(answer, 422, "BAD_INPUT")
    return answer.text


def test_streams_end_when_their_token_is_removed(cli: Cli, tmp_path: Path) -> None:
    database = ("--database", str(tmp_path / "service.db"))
    tokens = [
        cli.run("token", "add", name, "--scope", scope, *database).out.strip()
        for name, scope in (("stays", "admin"), ("goes", "read"))
    ]
    headers = [{"Authorization": f"Bearer {token}"} for token in tokens]
    slow = LATENCY | {"first_token_s": 5.0}
    with provider(latency=slow) as llm:
        served = ready(started(cli, tmp_path, llm.base_url, "--require-token", headers=headers[0]))
        batch_id = served.batch(200)
        with httpx.Client(base_url=served.client.base_url, headers=headers[1], timeout=WAIT_S) as other:
            assert other.post("/templates/tmpl_0/preflight", json={"inputs": [{}]}).status_code == 403
            for path in ("/live/events", f"/batches/{batch_id}/events"):
                until("the token", lambda: other.get("/settings").status_code == 200)
                with other.stream("GET", path) as stream:
                    heard = stream.iter_lines()
                    assert next(heard).startswith("event: ")
                    cli.run("token", "remove", "goes", *database)
                    for _ in heard:
                        pass  # it ends
                assert served.get(f"/batches/{batch_id}")["state"] == "running"
                made = cli.run("token", "add", "goes", "--scope", "read", *database).out.strip()
                other.headers["Authorization"] = f"Bearer {made}"
        served.stop(signal.SIGKILL)
