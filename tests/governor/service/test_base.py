"""The service's database: whose it is, that it is alone, and that its tables are this version's."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from governor.journal.database import JournalError
from governor.service.store.base import ServiceDatabase
from tests.governor.journals import created


def prepared(path: Path) -> None:
    database = ServiceDatabase(str(path))
    try:
        database.prepared()
    finally:
        database.closed()


def test_a_table_of_another_version_is_found_out_before_anything_is_sent(tmp_path: Path) -> None:
    prepared(tmp_path / "a.db")
    with closing(sqlite3.connect(tmp_path / "a.db")) as connection:
        connection.execute("ALTER TABLE attempts DROP COLUMN waited_hold_s")
        connection.commit()
    with pytest.raises(JournalError, match="table attempts lacks waited_hold_s"):
        prepared(tmp_path / "a.db")


def test_what_is_not_the_services_is_left_alone(tmp_path: Path) -> None:
    created(tmp_path / "journal.db", 3).close()
    with pytest.raises(JournalError, match="is not the service's"):
        prepared(tmp_path / "journal.db")
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE mine (x)")
        connection.commit()
    with pytest.raises(JournalError, match="is not the service's"):
        prepared(tmp_path / "other.db")


def test_one_process_at_a_time_on_sqlite(tmp_path: Path) -> None:
    first, second = (ServiceDatabase(str(tmp_path / "a.db")) for _ in range(2))
    try:
        first.prepared()
        with pytest.raises(JournalError, match="another process"):
            second.prepared()
    finally:
        second.closed()
        first.closed()


def test_a_url_that_cannot_be_read_is_not_repeated() -> None:
    with pytest.raises(JournalError) as caught:
        ServiceDatabase("postgresql://me:secret@host:port/db")
    assert "secret" not in str(caught.value)
