"""The journal's database: how it is opened, which process may write, and what its errors mean to a user.

SQLite, the default. WAL, so that readers (`status`, `verify`, `set`) and the run do not wait for each other.
synchronous=FULL: a commit returns when it is on the disk. NORMAL would survive a killed process, but not a power cut,
after which answers that were paid for would be asked for again; commits are grouped, so one fsync serves many records.
The file is created with mode 0600 before SQLite sees it; the -wal and -shm files inherit that mode.

One process runs a journal at a time: two would send everything twice. It holds the exclusive lock on an empty database
beside the journal (`-lock`), which the operating system releases however the process ends. A file of the journal is
never opened except by SQLite: closing it would drop SQLite's locks on it (POSIX).

Another database is named by its URL and must be this journal's alone. On PostgreSQL the process that runs it holds an
advisory lock, in a separate session, which the server releases when that ends; before each write the process checks
that the session is still there, and takes the lock anew after a server's restart. On other databases the operator must
see to it that only one process runs a journal.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)

from governor.model.errors import OPERATOR, PacelineError

BUSY_TIMEOUT_S = 30.0
LOCK_TIMEOUT_S = 0.5  # longer than any process holds it just to check the lock
WAL_BYTES_KEPT = 64 * 2**20
# One journal per schema of a database.
_KEY = {"key": 0x50414345}
_TAKE = text("SELECT pg_try_advisory_lock(:key, hashtext(current_schema()))")
_IS_HELD = text(
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid::bigint = :key"
    " AND objid::bigint = (hashtext(current_schema())::bigint & 4294967295)"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
COMPANIONS = ("-wal", "-shm", "-journal", "-lock")
# After these it is unknown what reached the disk: a write that failed so must not be tried again.
_LASTING_IO = {sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC, sqlite3.SQLITE_IOERR_READ}


class JournalError(PacelineError):
    """Raised for a journal that cannot be opened, read or written. Earlier commits are intact unless it says otherwise.

    `retryable`: the same call can succeed once the cause is removed (room on the disk, another process gone). `full`:
    how full the disk is, if that is the cause, else "".
    """

    exit_code = 2
    fault = OPERATOR

    def __init__(self, message: str, *, retryable: bool = False, full: str = "") -> None:
        self.retryable = retryable
        self.full = full
        super().__init__(message)


class Database:
    """One open database. `name`: its name in messages, never with a password.

    `where`: a path or a database URL. `writable=False` is for looking: a file in a folder that cannot be written is
    then read as it stands. Nothing is touched until the first connection.
    """

    def __init__(self, where: str | os.PathLike[str], *, writable: bool = True) -> None:
        url = _url_of(where)
        self.path: Path | None = None
        hidden = {name: "hidden" for name in url.query if "password" in name.lower()}  # libpq: password, sslpassword
        self.name = url.update_query_dict(hidden).render_as_string(hide_password=True)
        if url.get_backend_name() == "sqlite":
            if not url.database or url.database == ":memory:":
                raise JournalError(f"{self.name}: a journal in memory would not outlive its process: name a file")
            self.name = str(where) if not _is_url(where) else url.database
            self.path = Path(url.database).absolute()
            url = _file_url(self.path, writable)
        self.engine = _engine(url, self.name)
        self.writer = self.engine.execution_options(paceline_writes=True)
        self._lock: sqlite3.Connection | None = None
        self._session: Connection | None = None

    @property
    def is_sqlite(self) -> bool:
        return self.path is not None

    # ------------------------------------------------------------ transactions

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open a short transaction that sees one moment.

        Keep it short: an old one keeps SQLite's WAL from shrinking.
        """
        with self.explaining(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Open a transaction that is durable when the block is left, and leaves no trace if it raises."""
        if self._session is not None:
            self._still_locked(self._session)
        with self.explaining(), self.writer.begin() as connection:
            yield connection

    @contextmanager
    def bare(self) -> Iterator[sqlite3.Connection]:
        """Open SQLite's own connection without a transaction, for operations barred in one (VACUUM, checkpoints)."""
        with self.explaining():
            connection = self.engine.raw_connection()
            try:
                assert isinstance(connection.driver_connection, sqlite3.Connection)
                yield connection.driver_connection
            finally:
                connection.close()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn every database error in this block into a `JournalError`."""
        try:
            yield
        except DBAPIError as error:
            # Any other error (a value out of range, a missing column) fails in the same way each time.
            passing = isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated
            raise self._explained(error.orig, passing=passing) from None
        except sqlite3.Error as error:
            raise self._explained(error) from None
        except SQLAlchemyError as error:
            raise JournalError(f"{self.name}: the database cannot be used: {_first_line(error)}") from None

    def _explained(self, error: BaseException | None, *, passing: bool = True) -> JournalError:
        code = getattr(error, "sqlite_errorcode", None)
        if code is None:
            return JournalError(f"{self.name}: the database refused: {_first_line(error)}", retryable=passing)
        kind = code & 0xFF
        if kind == sqlite3.SQLITE_FULL or (kind == sqlite3.SQLITE_IOERR and code not in _LASTING_IO):
            full = "the disk is full" if kind == sqlite3.SQLITE_FULL else "the disk takes no more (full, or a quota)"
            full += self._free()
            text = f"{full}: make room and run the same command again; what was recorded is intact"
            return JournalError(f"{self.name}: {text}", retryable=True, full=full)
        if kind in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
            text = "cannot be written: its folder or file is read-only, or not yours; name another with --journal"
            return JournalError(f"{self.name}: {text}", retryable=True)
        if kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            text = f"another process kept it locked for {BUSY_TIMEOUT_S:.0f} s: end that process, then try again"
            return JournalError(f"{self.name}: {text}", retryable=True)
        if kind == sqlite3.SQLITE_NOTADB:
            return JournalError(
                f"{self.name}: this is not a Paceline journal: name another file (`paceline run`: with --journal)"
            )
        if kind == sqlite3.SQLITE_CORRUPT:
            return self.damaged(_first_line(error))
        if kind == sqlite3.SQLITE_IOERR:
            text = "reading or writing failed: check the disk, then restore a copy or name another file with --journal"
            return JournalError(f"{self.name}: {text}")
        return JournalError(f"{self.name}: the database refused: {_first_line(error)}")

    def damaged(self, detail: str) -> JournalError:
        """Return the error for contents that cannot be right."""
        text = "restore a copy, or start again with another file (--journal)"
        return JournalError(f"{self.name}: the journal is damaged ({detail}): {text}")

    def _free(self) -> str:
        try:
            assert self.path is not None
            return f" ({shutil.disk_usage(self.path.parent).free / 2**20:,.1f} MiB free)"
        except (OSError, AssertionError):
            return ""

    # ------------------------------------------------------------ files

    def made(self) -> None:
        """Create the file, mode 0600, in WAL mode. An existing file or database must be empty."""
        if self.path is None:
            return
        self._touched(self.path)
        with self.bare() as connection:
            # Before anything is changed in what may be another program's database.
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise JournalError(f"{self.name}: there is a database already: continue its run, or name another file")
            connection.execute("PRAGMA journal_mode=WAL")

    def is_empty(self) -> bool:
        """Return whether there is no file, or a database without a table in it."""
        assert self.path is not None
        if not self.path.exists():
            return True
        self._check_file(self.path)
        with self.bare() as connection:
            return not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]

    def _check_file(self, path: Path) -> None:
        """Raise JournalError for a path that exists but is not a file: /dev/null must keep its mode."""
        if not path.is_file():
            what = "this is a folder" if path.is_dir() else "this is not a file"
            raise JournalError(f"{self.name}: {what}: name a file with --journal")

    def _touched(self, path: Path) -> None:
        """Create an empty file that only its owner can read. An existing file is not opened: see the module."""
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except FileExistsError:
            self._check_file(path)
            if path.stat().st_size == 0:
                with suppress(OSError):
                    path.chmod(0o600)
        except FileNotFoundError:
            raise JournalError(f"{self.name}: there is no folder {str(path.parent)!r}: make it first") from None
        except OSError as error:
            text = f"cannot be made: {error.strerror}: name another file with --journal"
            raise JournalError(f"{self.name}: {text}", retryable=True) from None

    def locked(self) -> None:
        """Become the one process that runs this journal, until `closed`.

        Raise `JournalError` while another one does.
        """
        if self._lock is not None or self._session is not None:
            return
        if not (self._takes_lock(LOCK_TIMEOUT_S) if self.is_sqlite else self._takes_session()):
            text = "another process is running this journal: wait for it, or steer it with `paceline pause` or `set`"
            raise JournalError(f"{self.name}: {text}", retryable=True)

    def is_locked(self) -> bool:
        """Return whether some process runs this journal now.

        False for databases that are not locked (see the module).
        """
        if self.engine.dialect.name == "postgresql":
            with self.reading() as connection:
                return bool(connection.execute(_IS_HELD, _KEY).scalar())
        if self.path is None or not os.path.exists(f"{self.path}-lock"):
            return False
        if self._lock is not None:
            return True
        try:
            taken = self._takes_lock(0.0)
        except JournalError:
            return False  # no process can write here
        self._unlocked()
        return not taken

    def _takes_lock(self, timeout_s: float) -> bool:
        path = Path(f"{self.path}-lock")
        self._touched(path)
        lock = sqlite3.connect(path, timeout=timeout_s, isolation_level=None, check_same_thread=False)
        try:
            lock.execute("PRAGMA journal_mode=OFF")  # nothing is ever written, so no file to roll back from
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            lock.close()
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                return False
            raise self._explained(error) from None
        self._lock = lock
        return True

    def _takes_session(self) -> bool:
        if self.engine.dialect.name != "postgresql":
            return True
        with self.explaining():
            session = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            if session.execute(_TAKE, _KEY).scalar():
                self._session = session
                return True
            session.close()
            return False

    def _still_locked(self, session: Connection) -> None:
        """Raise JournalError if the lock went with its session and another process took it."""
        try:
            session.execute(text("SELECT 1"))
        except SQLAlchemyError:
            session.invalidate()
            session.close()
            self._session = None
            self.locked()

    def _unlocked(self) -> None:
        if self._session is not None:
            # Ended, not kept for later: the lock belongs to the session.
            self._session.invalidate()
            self._session.close()
            self._session = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def closed(self) -> None:
        """Release connections and lock."""
        self._unlocked()
        self.engine.dispose()

    def removed(self) -> None:
        """Close, and remove the file with its companion files."""
        self.closed()
        if self.path is not None:
            for suffix in ("", *COMPANIONS):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)


def _is_url(where: str | os.PathLike[str]) -> bool:
    return isinstance(where, str) and "://" in where


def _url_of(where: str | os.PathLike[str]) -> URL:
    if not _is_url(where):
        return URL.create("sqlite+pysqlite", database=os.fspath(where))
    try:
        return make_url(os.fspath(where))
    except (ArgumentError, ValueError):
        # Do not show the text: it may hold a password.
        raise JournalError("the journal's URL cannot be read: write dialect://user@host/database, or a path") from None


def _file_url(path: Path, writable: bool) -> URL:
    """Return the URL of a SQLite file. For reading in a folder without write permission: as a file that cannot change.

    SQLite creates its shared memory beside a WAL database even to read it, unless it is told that no process writes.
    """
    wal = Path(f"{path}-wal")
    if writable or os.access(path.parent, os.W_OK) or (wal.exists() and wal.stat().st_size):
        return URL.create("sqlite+pysqlite", database=str(path))
    query = {"mode": "ro", "immutable": "1", "uri": "true"}
    return URL.create("sqlite+pysqlite", database=f"file:{quote(str(path))}", query=query)


def _engine(url: URL, name: str) -> Engine:
    sqlite = url.get_backend_name() == "sqlite"
    # Parameters are prompts and answers: they stay out of every error and log.
    arguments = {"timeout": BUSY_TIMEOUT_S, "check_same_thread": False} if sqlite else {}
    try:
        # A connection that a restarted server has dropped is replaced before it is used.
        engine = create_engine(url, hide_parameters=True, connect_args=arguments, pool_pre_ping=not sqlite)
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        text = f"no driver for {url.drivername} is installed ({error}): install it beside Paceline"
        raise JournalError(f"{name}: {text}") from None
    except (SQLAlchemyError, TypeError) as error:
        raise JournalError(f"{name}: the database cannot be used: {_first_line(error)}") from None
    if sqlite:
        event.listen(engine, "connect", _on_connect)
        event.listen(engine, "begin", _on_begin)
    return engine


def _on_connect(connection: sqlite3.Connection, _: object) -> None:
    # The driver's own transactions begin too late, at the first write after the reads: ours begin in `_on_begin`.
    connection.isolation_level = None
    for pragma in (
        "synchronous=FULL",
        "secure_delete=ON",
        "temp_store=MEMORY",  # a sort's scratch file would hold prompts outside the journal
        "trusted_schema=OFF",
        f"journal_size_limit={WAL_BYTES_KEPT}",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _on_begin(connection: Connection) -> None:
    # A write transaction that began as a reader cannot wait for another writer (SQLITE_BUSY_SNAPSHOT): begin as one.
    writes = connection.get_execution_options().get("paceline_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _first_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
