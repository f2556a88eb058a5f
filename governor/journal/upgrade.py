"""Which journals this version can read, and what one of an older schema lacks."""

from __future__ import annotations

from sqlalchemy import String, inspect, select, update

from governor import __version__
from governor.journal.database import Database, JournalError
from governor.journal.schema import APPLICATION_ID, OLDEST_SCHEMA, SCHEMA, TIER_COLUMNS, attempts, metadata, run


def check_recognised(database: Database) -> None:
    """Raise JournalError unless this is a journal whose schema we know."""
    if database.path is not None:
        if not database.path.exists():
            raise JournalError(f"{database.name}: there is no such journal: `paceline run` creates one")
        if database.is_empty():
            text = "it is empty, no run was started in it: remove it, or run again"
            raise JournalError(f"{database.name}: {text}")
        with database.bare() as connection:
            application = connection.execute("PRAGMA application_id").fetchone()[0]
        if application != APPLICATION_ID:
            text = "this database is not a Paceline journal: name another file (`paceline run`: with --journal)"
            raise JournalError(f"{database.name}: {text}")
    with database.reading() as connection:
        if not inspect(connection).has_table(run.name):
            raise JournalError(f"{database.name}: this database holds no Paceline journal: name another")
        rows = connection.execute(select(run.c.schema, run.c.version)).all()
    if len(rows) != 1:
        raise database.damaged(f"{len(rows)} runs in it where one should be")
    schema, version = rows[0]
    if schema > SCHEMA:
        text = f"made by Paceline {version} with schema {schema}, this is {__version__} and knows {SCHEMA}: upgrade it"
        raise JournalError(f"{database.name}: {text}")
    if schema < OLDEST_SCHEMA:
        text = f"made by Paceline {version} with schema {schema}, this is {__version__} with {SCHEMA}: use that version"
        raise JournalError(f"{database.name}: {text}")


def bring_up_to_date(database: Database) -> None:
    """Add everything that an older schema lacks."""
    with database.writing() as connection:
        metadata.create_all(connection)
        there = {column["name"] for column in inspect(connection).get_columns(attempts.name)}
        for name in TIER_COLUMNS:
            if name not in there:
                column = attempts.c[name]
                default = "''" if isinstance(column.type, String) else "0"
                type_ = column.type.compile(connection.dialect)
                connection.exec_driver_sql(
                    f"ALTER TABLE {attempts.name} ADD COLUMN {name} {type_} DEFAULT {default} NOT NULL"
                )
        connection.execute(update(run).values(schema=SCHEMA))
