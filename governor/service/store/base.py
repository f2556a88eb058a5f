"""The service's database: opened, migrated to the newest schema, and safe to be used from many threads.

SQLite: one process at a time (it holds the journal's lock); its threads write one after another, since a writer that
polls a locked database waits longer than one that queues. PostgreSQL: any number of processes, each with a lease (see
`worker`), whose time is the server's.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, inspect, make_url, text
from sqlalchemy.exc import ArgumentError

from governor.journal import schema
from governor.journal.database import Database, JournalError
from governor.service.store import tables

_APPLICATION_ID = 0x50414353  # "PACS"
# Two processes that migrate at once take turns: an advisory lock of PostgreSQL's, of this number.
_MIGRATING = 0x50414353
# The longest time that a transaction may be idle.
FROZEN_MS = 5_000
# Free bytes below which nothing more is accepted or launched: room for the answers in flight and the write-ahead log.
ROOM_KEPT = 64 * 2**20


class NoRoomError(JournalError):
    """Raised if the disk has no room for a write. There may be room later."""


class ServiceDatabase(Database):
    """The service's database; see the module. `where`: a path, or the URL of a PostgreSQL or SQLite database."""

    def __init__(self, where: str) -> None:
        super().__init__(_postgres_url(where))
        self.where = where
        self._turn = FairLock() if self.is_sqlite else nullcontext()

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Open a transaction that is durable when the block is left, and leaves no trace if it raises."""
        with self._turn, super().writing() as connection:
            yield connection

    def now(self, connection: Connection) -> float:
        """Return seconds since 1970 by the clock that all replicas share."""
        if self.is_sqlite:
            return time.time()
        return float(connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())

    def check_room(self, wanted: int = 0) -> None:
        """Raise `NoRoomError` if a SQLite file's disk lacks room for so many bytes and the answers' reserve.

        The write-ahead log is on the same disk: callers count it in. The disks of other databases are unknown.
        """
        if self.path is None:
            return
        free = shutil.disk_usage(self.path.parent).free
        if free - wanted < ROOM_KEPT:
            needed = f"{wanted / 2**20:,.1f} MiB for requests and " if wanted else ""
            text = f"its disk has {free / 2**20:,.1f} MiB free and needs {needed}{ROOM_KEPT >> 20} MiB for answers"
            raise NoRoomError(f"{self.name}: {text}: make room", retryable=True)

    def prepared(self) -> None:
        """Create it if need be, lock it (SQLite), and migrate it to the newest schema."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.is_empty():
                self.made()
            self._check_ours()
            self.locked()
            self.check_room()
        self._migrate()

    def looked_at(self, *, make: bool) -> None:
        """Prepare for a short look beside a service that runs. `make`: also if there is no database yet."""
        if self.path is not None:
            if self.is_empty() and not make:
                raise JournalError(f"{self.name}: there is no such database: `paceline serve` makes one")
            if self.is_empty():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.made()
            self._check_ours()
        self._migrate()

    def _check_ours(self) -> None:
        with self.bare() as connection:
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            mark = connection.execute("PRAGMA application_id").fetchone()[0]
            if tables and mark != _APPLICATION_ID:
                raise JournalError(f"{self.name}: this database is not the service's: name another with --database")
            if not tables:
                connection.execute(f"PRAGMA application_id={_APPLICATION_ID}")

    def _migrate(self) -> None:
        """Create a new database from the present tables; bring an existing one up to date, step by step."""
        from alembic import command

        with self.writing() as connection:
            if not self.is_sqlite:
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATING})"))
            config = alembic_config()
            config.attributes["connection"] = connection
            current = _current(connection)
            for metadata in (schema.metadata, tables.metadata):
                metadata.create_all(connection)
            if not current:
                command.stamp(config, "head")
            elif _newest(config) not in current:
                command.upgrade(config, "head")
            self._check_tables(connection)

    def _check_tables(self, connection: Connection) -> None:
        """Raise JournalError if a table differs from this version's: in the middle of a batch that is costly."""
        found = inspect(connection)
        for table in (*schema.metadata.sorted_tables, *tables.metadata.sorted_tables):
            there = {column["name"] for column in found.get_columns(table.name)}
            missing = [column.name for column in table.columns if column.name not in there]
            if missing:
                text = f"table {table.name} lacks {', '.join(missing)}: it was made by another version of Paceline"
                raise JournalError(f"{self.name}: {text}: use that version, or name another with --database")


class FairLock:
    """A lock that threads get in the order in which they came: a thread that commits all the time starves no other."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._is_taken = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._is_taken:
                self._is_taken = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()  # the leaving thread passes it on

    def __exit__(self, *exception: object) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_taken = False


def replica_name() -> str:
    """Return this process's name among the replicas: its host and its process number."""
    return f"{socket.gethostname()}:{os.getpid()}"


def session_name(replica: str) -> str:
    """Return the `application_name` of a replica's sessions; PostgreSQL keeps 63 bytes of it."""
    return f"paceline {replica[-50:]}"


def _postgres_url(where: str) -> str:
    """Return a PostgreSQL URL with its driver, the replica's name and an end for idle transactions; else unchanged.

    A process that is frozen, or whose host is gone, in the middle of a transaction would hold up every other process
    that takes its batches over. A process frozen between two commands of a pipeline does not count as idle: its
    sessions are ended by name (`Store.free_batches`).
    """
    scheme, found, rest = where.partition("://")
    if not found or scheme not in ("postgres", "postgresql", "postgresql+psycopg"):
        return where
    try:
        url = make_url(f"postgresql+psycopg://{rest}")
    except (ArgumentError, ValueError):
        return where  # the error is reported, without the URL, when it is opened
    if "application_name" not in url.query:
        url = url.update_query_dict({"application_name": session_name(replica_name())})
    if "options" not in url.query:
        url = url.update_query_dict({"options": f"-c idle_in_transaction_session_timeout={FROZEN_MS}"})
    return url.render_as_string(hide_password=False)


def alembic_config() -> Any:
    """Return Alembic's configuration; its connection comes in by `attributes`."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(str(files("governor.service"))) / "migrations"))
    return config


def _newest(config: Any) -> str:
    from alembic.script import ScriptDirectory

    return str(ScriptDirectory.from_config(config).get_current_head())


def _current(connection: Connection) -> set[str]:
    if not inspect(connection).has_table("alembic_version"):
        return set()
    return set(connection.execute(text("SELECT version_num FROM alembic_version")).scalars())
