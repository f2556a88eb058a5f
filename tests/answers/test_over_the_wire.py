"""Servers that answer oddly, through the official SDK's path: one attempt ends in the right answer, within bounds."""

from __future__ import annotations

import asyncio
import errno
import gzip
import json
import resource
import socket
import ssl
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from governor.model.estimate import sizes_of
from governor.model.pools import Pool
from governor.model.requests import CHAT, Answer, Outcome, Request, Scope, url_of
from governor.provider.openai_adapter import ANSWER_BYTES_MAX, Adapter
from tests.answers.forms import chat, page
from tests.memory import peak_mib

KEY = "sk-a/key-of-no-known-form+0123456789"
BODY: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]}
REQUEST = Request(0, "q0", url_of(CHAT), "gpt-4o", BODY, sizes_of(CHAT, BODY))
FINE = json.dumps(chat()).encode()
MEBIBYTE = 2**20

Writing = Callable[[asyncio.StreamWriter, str], Any]


def asked(writing: Writing, times: int = 1) -> tuple[list[Answer], int]:
    """The answers to so many attempts at a server that writes so, and how many requests reached it.

    `writing(writer, address)`: writes one response.
    """
    heads: list[bytes] = []

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            heads.append(head)
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(length)
            host, port = writer.get_extra_info("sockname")
            written = writing(writer, f"http://{host}:{port}")
            if written is not None:
                await written
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def main() -> list[Answer]:
        server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with Adapter(Pool(base_url=url), {"OPENAI_API_KEY": KEY}) as adapter:
            found = [await adapter.send(REQUEST, timeout_s=60.0) for _ in range(times)]
        server.close()
        return found

    return asyncio.run(main()), len(heads)


def written(body: bytes, status: str = "200 OK", *, length: int | None = None, **headers: str) -> Writing:
    """A response with this body, which announces so many bytes."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    head = "\r\n".join([*lines, "connection: close", "", ""]).encode()

    def writing(writer: asyncio.StreamWriter, address: str) -> None:
        writer.write(head.replace(b"ADDRESS", address.encode()) + body)

    return writing


def one(writing: Writing) -> Answer:
    (answer,), requests = asked(writing)
    assert requests == 1
    assert answer.message.isprintable() or not answer.message
    return answer


@pytest.mark.parametrize(
    ("writing", "outcome", "says"),
    [
        (written(FINE), Outcome.OK, ""),
        (written(gzip.compress(FINE), content_encoding="gzip"), Outcome.OK, ""),
        (written(zlib.compress(FINE), content_encoding="deflate"), Outcome.OK, ""),
        (written(FINE.decode().encode("utf-16")), Outcome.OK, ""),
        (written(b"\xef\xbb\xbf" + FINE), Outcome.OK, ""),
        (written(FINE, length=len(FINE) + 100), Outcome.OK, ""),
        (written(FINE, length=len(FINE) - 30), Outcome.MALFORMED, "no answer in it"),
        (written(FINE[:-30], length=len(FINE)), Outcome.DROPPED, "cut off"),
        (written(b"hello", content_encoding="gzip"), Outcome.MALFORMED, "cannot be unpacked"),
        (written(gzip.compress(FINE)[:-8], content_encoding="gzip"), Outcome.OK, ""),
        (written(b"hello", content_encoding="br"), Outcome.MALFORMED, "packed as 'br'"),
        (written(gzip.compress(gzip.compress(FINE)), content_encoding="gzip, gzip"), Outcome.MALFORMED, "packed as"),
        (written(page("LiteLLM").encode(), content_type="text/html"), Outcome.MALFORMED, "a page of HTML"),
        (written(b""), Outcome.MALFORMED, "an empty body"),
        (written(b"hello", "503 Busy", content_encoding="gzip"), Outcome.OVERLOADED, ""),
        (written(b'{"error":', "429 Too Many", length=500, retry_after="7"), Outcome.THROTTLED, ""),
    ],
)  # fmt: skip
def test_odd_bodies(writing: Writing, outcome: Outcome, says: str) -> None:
    answer = one(writing)
    assert answer.outcome is outcome, answer
    assert says in answer.message
    assert answer.retry_after_s == (7.0 if outcome is Outcome.THROTTLED else -1.0)


def test_a_chunked_answer_that_is_cut_off_is_asked_for_again() -> None:
    def cut(writer: asyncio.StreamWriter, address: str) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n20\r\n" + FINE[:32] + b"\r\n40\r\n" + FINE[32:50]
        )

    assert one(cut).outcome is Outcome.DROPPED


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
def test_redirects_are_not_followed(status: str) -> None:
    """Neither in a loop nor to another host, which would get the prompt and the key."""
    answer = one(written(b"", status, location="ADDRESS/v1/chat/completions"))
    assert (answer.outcome, answer.scope) == (Outcome.BAD_REQUEST, Scope.ADDRESS)
    assert "a redirect to http://127.0.0.1" in answer.message


@pytest.mark.parametrize("escape", [lambda c: f"\\u{ord(c):04x}", lambda c: "\\/" if c == "/" else c])
@pytest.mark.parametrize("status", ["200 OK", "401 No", "500 No"])
@pytest.mark.parametrize(
    "shape",
    [
        '{"error": {"message": "bad KEY", "code": "KEY"}}',
        '{"choices": [{"message": {"content": "KEY"}}]}',
        '{"cut": "KEY',
    ],
)
def test_a_key_in_escapes_is_taken_out(escape: Callable[[str], str], status: str, shape: str) -> None:
    body = shape.replace("KEY", "".join(map(escape, KEY)))
    answer = one(written(body.encode(), status, x_request_id=f"req-{KEY}"))
    assert answer.request_id == "req-***"
    shown = json.dumps([answer.body, answer.raw, answer.message, answer.error_code]).replace("\\\\", "\\")
    for text in (shown, shown.encode().decode("unicode_escape").replace("\\/", "/")):
        assert KEY not in text
    assert "***" in shown


def test_what_would_steer_a_terminal_is_escaped() -> None:
    message = "\x1b]0;owned\x07\x1b[2Jbad\r\nrequest \u202egnp.exe \x9b31m"
    error = json.dumps({"error": {"message": message, "code": "\x1b[31mcode"}}).encode()
    answer = one(written(error, "400 Bad", x_request_id="req-1"))
    assert answer.message.isprintable()
    assert answer.error_code.isprintable()
    assert answer.message.startswith("\\u001b]0;owned\\u0007\\u001b[2Jbad request")


def _tls(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, f"[SSL: {reason}]")
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("error", "outcome", "scope"),
    [
        (_tls("WRONG_VERSION_NUMBER"), Outcome.DROPPED, Scope.ADDRESS),
        (_tls("UNEXPECTED_EOF_WHILE_READING"), Outcome.DROPPED, Scope.REQUEST),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), Outcome.DROPPED, Scope.ADDRESS),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), Outcome.DROPPED, Scope.REQUEST),
        (socket.gaierror(socket.EAI_MEMORY, "Memory allocation failure"), Outcome.LOCAL, Scope.REQUEST),
        (ssl.SSLCertVerificationError("certificate verify failed"), Outcome.DROPPED, Scope.ADDRESS),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), Outcome.DROPPED, Scope.REQUEST),
        (OSError(errno.EMFILE, "Too many open files"), Outcome.LOCAL, Scope.REQUEST),
        (OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address"), Outcome.LOCAL, Scope.REQUEST),
        (MemoryError(), Outcome.LOCAL, Scope.REQUEST),
    ],
)
def test_why_nothing_was_sent(
    monkeypatch: pytest.MonkeyPatch, error: Exception, outcome: Outcome, scope: Scope
) -> None:
    """What the transport says, however deep its cause lies: a wrong address, this machine, or a network away."""

    async def refuse(*_: object, **__: object) -> None:
        try:
            raise error
        except Exception as cause:
            raise OSError("All connection attempts failed") from cause

    monkeypatch.setattr(anyio, "connect_tcp", refuse)

    async def main() -> Answer:
        async with Adapter(Pool(base_url="http://127.0.0.1:9/v1"), {"OPENAI_API_KEY": KEY}) as adapter:
            return await adapter.send(REQUEST, timeout_s=10.0)

    answer = asyncio.run(main())
    assert (answer.outcome, answer.scope) == (outcome, scope), answer


def test_without_descriptors_the_attempt_is_this_machines_failure() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def main() -> Answer:
        async with Adapter(Pool(base_url="http://127.0.0.1:9/v1"), {"OPENAI_API_KEY": KEY}) as adapter:
            with open("/dev/null") as lowest:
                resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno(), hard))
            try:
                return await adapter.send(REQUEST, timeout_s=10.0)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    answer = asyncio.run(main())
    assert answer.outcome is Outcome.LOCAL
    assert "Too many open files" in answer.message


# ---------------------------------------------------------------- size


async def _large(writer: asyncio.StreamWriter, packed: bool, status: bytes) -> None:
    head = (
        b"HTTP/1.1 " + status + b"\r\ncontent-encoding: gzip\r\n\r\n" if packed else b"HTTP/1.1 " + status + b"\r\n\r\n"
    )
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    writer.write(head)
    part = b'{"choices": [' + b" " * MEBIBYTE
    for _ in range(300):
        writer.write(packer.compress(part) if packed else part)
        await writer.drain()
        part = b" " * MEBIBYTE
    if packed:
        writer.write(packer.flush())


def peak_of_large_answers() -> None:
    """In a process of its own: four large answers; prints the outcomes and the peak of memory in MiB."""
    found = []
    for status in (b"200 OK", b"500 No"):
        for packed in (False, True):
            (answer,), _ = asked(lambda writer, _, packed=packed, status=status: _large(writer, packed, status))  # type: ignore[misc]
            found.append((str(answer.outcome), answer.status, len(answer.raw) <= 2**16))
    print(json.dumps([found, peak_mib()]))


def test_an_answer_of_300_mib_ends_its_own_request_within_400_mib_of_memory() -> None:
    """Plain and packed (under 1 MB on the wire), as a success and as a refusal."""
    root = Path(__file__).parents[2]
    code = "from tests.answers.test_over_the_wire import peak_of_large_answers as run; run()"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found, peak = json.loads(ran.stdout)
    assert found == [["malformed", 200, True]] * 2 + [["server_error", 500, True]] * 2
    assert ANSWER_BYTES_MAX / MEBIBYTE < peak < 400.0
