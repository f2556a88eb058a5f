"""A server that is not our provider: the standard library's, answering each request as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Status, headers, body: JSON, text as it stands, or a list of chunks that are sent one by one. The connection breaks
# off where a chunk is None; what a chunk that can be called returns is sent, when it returns.
Reply = tuple[int, Mapping[str, str], Any]


def chat(text: str = "fine") -> Reply:
    """An answer as any server that speaks OpenAI's dialect gives it."""
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return 200, {}, {"id": "c-1", "object": "chat.completion", "choices": choices, "usage": usage}


def event(content: dict[str, Any] | str, name: str = "") -> bytes:
    """One server-sent event."""
    data = content if isinstance(content, str) else json.dumps(content)
    return (f"event: {name}\n" if name else "").encode() + f"data: {data}\n\n".encode()


def chat_stream(*texts: str, usage: dict[str, int] | None = None) -> list[Any]:
    """The chunks of a streamed chat answer; `usage`: with a last chunk that states it."""
    base = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    chunks: list[Any] = [
        event({**base, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], "usage": None})
        for text in texts
    ]
    chunks.append(event({**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
    if usage is not None:
        chunks.append(event({**base, "choices": [], "usage": usage}))
    return [*chunks, event("[DONE]")]


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
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            is_json = self.headers["Content-Type"].startswith("application/json")
            body = {**(json.loads(raw) if is_json else {"raw": raw.decode("latin-1")}), "path": self.path}
            found.bodies.append(body)
            status, headers, content = answer(body)
            if isinstance(content, list):
                self.stream(status, headers, content)
                return
            if isinstance(content, bytes):
                text = content
            else:
                text = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            kind = "text/html" if isinstance(content, str) else "application/json"
            self.send_response(status)
            for name, value in {"Content-Type": kind, **headers, "Content-Length": str(len(text))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(text)

        def stream(self, status: int, headers: Mapping[str, str], chunks: list[Any]) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": "text/event-stream", **headers, "Transfer-Encoding": "chunked"}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            with suppress(BrokenPipeError, ConnectionResetError):
                for each in chunks:
                    chunk = each() if callable(each) else each
                    if chunk is None:
                        self.close_connection = True
                        return
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                self.wfile.write(b"0\r\n\r\n")

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
