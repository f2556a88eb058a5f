"""The cases of the outside world, each through a whole run on loopback: what is sent again, what is not, and who stops.

The server answers by a word in the prompt, oddly the first time or always, and counts what it was asked.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.answers.forms import NO_CREDIT, anthropic, chat, error, openrouter, page
from tests.live import FREE, KEY, ROOT, Cli, line, lines_of, run_args, shared_cli, write_batch

ACCESS = "You have reached your specified API usage limits. You will regain access on 2099-01-01 at 00:00 UTC."


def nested(depth: int, inmost: str) -> str:
    """An answer with lists in lists beside its text."""
    return json.dumps(chat()).replace('"index": 0', f'"index": 0, "logprobs": {"[" * depth}{inmost}{"]" * depth}')


# Word -> status, headers, body; and whether only the first attempt is answered so.
ODD: dict[str, tuple[int, dict[str, str], Any, bool]] = {
    "a1": (200, {}, chat(None, error={"message": "Provider returned error", "code": 429}), True),
    "a2": (200, {}, {"error": {"code": 502, "message": "down"}}, True),
    "a3": (200, {}, chat("", "error", choice={"error": {"code": 502, "message": "lost"}}), True),
    "a8": (498, {}, error("capacity exceeded", "capacity_exceeded", "capacity_exceeded"), True),
    "425": (425, {}, "", True),
    "a4": (403, {}, openrouter("Input was flagged", 403), False),
    "a5": (403, {"content-type": "text/html"}, page("Attention Required! | Cloudflare"), False),
    "a6": (402, {}, NO_CREDIT, False),
    "a7": (404, {}, error("The model does not exist", "invalid_request_error", "model_not_found"), False),
    "filter": (400, {}, error("The response was filtered", None, "content_filter"), False),
    "cut": (200, {}, '{"choices": [{"message": {"content": "hel', False),
    "html": (200, {"content-type": "text/html"}, page("Sign in"), False),
    "empty": (200, {}, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 0}}, False),
    "queued": (200, {}, {"object": "response", "status": "queued", "output": []}, False),
    "a12": (429, {}, anthropic("rate_limit_error", ACCESS), False),
    "bedrock": (429, {}, {"message": "Too many tokens per day, please wait before trying again."}, False),
    "nan": (200, {}, nested(90, "NaN, 1e999"), False),
    "deep": (200, {}, nested(500, "NaN"), False),
}  # fmt: skip
RETRIED = [word for word, (_, _, _, once) in ODD.items() if once]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        word = asked["messages"][0]["content"].split()[0]
        with self.server.lock:
            self.server.asked[word] += 1
            count = self.server.asked[word]
        status, headers, body, once = ODD.get(word, (200, {}, chat(), False))
        if once and count > 1:
            status, headers, body = 200, {}, chat()
        sent = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **headers, "content-length": str(len(sent))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[tuple[str, Counter[str]]]:
    server = _Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", server.asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def cli() -> Cli:
    return shared_cli()


def asked_of(folder: Path, *words: str, fine: int = 10) -> None:
    lines = [line(f"fine-{i}", text=f"fine{i} question") for i in range(fine)]
    write_batch(folder / "requests.jsonl", [*lines, *(line(word, text=f"{word} question") for word in words)])


def test_what_passes_is_sent_again_and_answered(cli: Cli, tmp_path: Path) -> None:
    asked_of(tmp_path, *RETRIED)
    with serving() as (url, asked):
        ran = cli.run(*run_args(tmp_path, url, "--json"))
    assert ran.code == 0, ran.err
    assert {word: asked[word] for word in RETRIED} == dict.fromkeys(RETRIED, 2)
    for each in lines_of(tmp_path / "results.jsonl"):
        assert each["response"]["body"]["choices"][0]["message"]["content"] == "hello", "nothing empty counts as done"


@pytest.mark.parametrize(
    ("word", "code"),
    [
        *((word, "BAD_REQUEST") for word in ("a4", "a5", "a6", "a7", "filter")),
        *((word, "UNREADABLE_ANSWER") for word in ("cut", "html", "empty", "queued", "deep")),
    ],
)
def test_what_is_refused_or_cannot_be_read_ends_its_own_request(cli: Cli, tmp_path: Path, word: str, code: str) -> None:
    """It is sent once, also by a resume, and the others are done."""
    asked_of(tmp_path, word)
    with serving() as (url, asked):
        for _ in range(2):
            ran = cli.run(*run_args(tmp_path, url, "--json"))
            assert ran.code == 1, ran.err
            assert (ran.json["completed"], ran.json["failures"]) == (10, {code: 1})
        assert asked[word] == 1
        assert sum(asked.values()) == 11
    (failed,) = lines_of(tmp_path / "results.errors.jsonl")
    assert (failed["custom_id"], failed["error"]["code"]) == (word, code)
    status, _, body, _ = ODD[word]
    assert failed["response"]["status_code"] == status
    if code == "UNREADABLE_ANSWER":
        assert failed["response"]["body"] == body, "what is paid for is kept"


@pytest.mark.parametrize(("word", "says"), [("a12", "access returns"), ("bedrock", "Too many tokens per day")])
def test_a_limit_that_lasts_for_days_stops_the_run_and_can_be_resumed(
    cli: Cli, tmp_path: Path, word: str, says: str
) -> None:
    asked_of(tmp_path, word, fine=0)
    with serving() as (url, asked):
        ran = cli.run(*run_args(tmp_path, url, "--json"))
        assert ran.code == 4, ran.err
        assert asked == {word: 1}
        assert says in ran.err
        ran = cli.run(*run_args(tmp_path, url, "--json"))
        assert (ran.code, asked) == (4, {word: 2}), "pending, so tried again by the next command"


def test_numbers_that_json_has_not_become_null(cli: Cli, tmp_path: Path) -> None:
    asked_of(tmp_path, "nan", fine=1)
    with serving() as (url, _):
        ran = cli.run(*run_args(tmp_path, url, "--json"))
    assert ran.code == 0, ran.err
    text = (tmp_path / "results.jsonl").read_text()
    assert "null,null" in text
    assert "NaN" not in text
    assert "Infinity" not in text


def test_more_in_flight_than_descriptors_allow_is_refused_with_the_figure(cli: Cli, tmp_path: Path) -> None:
    asked_of(tmp_path, fine=200)
    args = " ".join(map(str, run_args(tmp_path, "http://127.0.0.1:9/v1", "--yes")))
    command = f"import sys; sys.argv[0] = 'paceline'; from sim.app.cli import main; sys.exit(main({args.split()!r}))"
    env = {**os.environ, "OPENAI_API_KEY": KEY, **FREE, "OPENAI_MAX_CONCURRENCY": "100"}
    shell = f"ulimit -n 120; exec {shlex.quote(sys.executable)} -c {shlex.quote(command)}"
    ran = subprocess.run(["bash", "-c", shell], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.splitlines()[-1].endswith(
        "100 requests in flight need 150 descriptors, and this process may have 120: lower OPENAI_MAX_CONCURRENCY to "
        "70 in all, or raise `ulimit -n`"
    )
