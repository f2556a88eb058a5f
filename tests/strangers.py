"""A server that is not our provider: the standard library's, answering each request as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Status, headers, body (JSON, or text as it stands).
Reply = tuple[int, Mapping[str, str], Any]


def chat(text: str = "fine") -> Reply:
    """An answer as any server that speaks OpenAI's dialect gives it."""
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return 200, {}, {"id": "c-1", "object": "chat.completion", "choices": choices, "usage": usage}


def error(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    """A refusal in OpenAI's form."""
    return status, headers, {"error": {"message": message, "type": "invalid_request_error", "code": code}}


@dataclass(slots=True)
class Stranger:
    """The server while it runs. `bodies`: what was sent, in the order of arrival."""

    base_url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def stranger(answer: Callable[[dict[str, Any]], Reply]) -> Iterator[Stranger]:
    """A server on loopback for as long as the block lasts. `answer(body)`: what it says to a request."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.bodies.append(body)
            status, headers, content = answer(body)
            text = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            kind = "text/html" if isinstance(content, str) else "application/json"
            self.send_response(status)
            for name, value in {"Content-Type": kind, **headers, "Content-Length": str(len(text))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found = Stranger(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
