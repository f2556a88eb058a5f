"""The interface as OpenAPI describes it: what schemathesis finds, and that migrations make the tables of today.

schemathesis draws requests from the description, good and bad ones, and checks that no answer is a 5xx that is not
described, has another status, type, header or shape than described, or accepts what the description forbids.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from sqlalchemy import BigInteger, inspect, text

from governor.journal import schema as journal
from governor.service.store import tables
from governor.service.store.base import ServiceDatabase
from governor.service.store.store import Store, new_id
from tests.live import WAIT_S, provider, shared_cli
from tests.postgres import PostgresServer
from tests.services import Served, serving

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("api")
    with provider() as llm, serving(shared_cli(), folder, llm.base_url, "--quiet") as found:
        found.batch(3)
        found.template()
        yield found


@pytest.fixture(scope="module")
def described(served: Served) -> schemathesis.schemas.BaseSchema:
    # The stream of all that goes on never ends.
    found = schemathesis.openapi.from_url(f"{str(served.client.base_url).rstrip('/')}/openapi.json")
    return found.exclude(path="/live/events")


def fuzzed(described: schemathesis.schemas.BaseSchema, mode: schemathesis.GenerationMode, examples: int) -> int:
    """So many requests to each operation, each answer checked; returns how many operations there are."""
    found = 0
    for each in described.get_all_operations():
        operation = each.ok()

        @settings(
            max_examples=examples, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def sent(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=list(CHECKS), timeout=WAIT_S)

        try:
            sent()
        except Unsatisfiable:
            # Everything is allowed there: nothing that is wrong can be drawn.
            assert mode is schemathesis.GenerationMode.NEGATIVE
        found += 1
    return found


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_no_5xx_and_no_break_of_the_schema(described: schemathesis.schemas.BaseSchema, mode: Any) -> None:
    assert fuzzed(described, mode, 4) >= 20


@pytest.mark.long
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_no_5xx_and_no_break_of_the_schema_at_length(described: schemathesis.schemas.BaseSchema, mode: Any) -> None:
    assert fuzzed(described, mode, 150) >= 20


def test_every_path_of_the_interface_is_described(served: Served) -> None:
    paths = served.get("/openapi.json")["paths"]
    wanted = {
        "/templates": {"get", "post"},
        "/templates/{template_id}": {"get", "put", "delete"},
        "/templates/{template_id}/preflight": {"post"},
        "/templates/{template_id}/batch-run": {"post"},
        "/batches": {"get", "post"},
        "/batches/{batch_id}": {"get"},
        "/batches/{batch_id}/results": {"get"},
        "/batches/{batch_id}/errors": {"get"},
        "/batches/{batch_id}/events": {"get"},
        "/batches/{batch_id}/cancel": {"post"},
        "/batches/{batch_id}/pause": {"post"},
        "/batches/{batch_id}/resume": {"post"},
        "/settings": {"get", "put"},
        "/what-if": {"post"},
        "/metrics": {"get"},
        "/healthz": {"get"},
        "/readyz": {"get"},
    }
    for path, methods in wanted.items():
        assert methods <= set(paths[path]), path
    for path, operations in paths.items():
        for method, operation in operations.items():
            assert operation.get("summary"), (method, path)
            assert {"401", "422"} <= set(operation["responses"]), (method, path)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_migrations_make_the_tables_of_today(kind: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        where = str(tmp_path / "service.db")
        if kind == "postgresql":
            where = stack.enter_context(PostgresServer()).url
        for _ in range(2):  # the second time there is nothing to do
            database = ServiceDatabase(where)
            database.prepared()
            with database.reading() as connection:
                context = MigrationContext.configure(connection, opts={"compare_type": False})
                differences = compare_metadata(context, [journal.metadata, tables.metadata])  # type: ignore[arg-type]
                # PostgreSQL's order of an index is no difference that alembic can see.
                assert [each for each in differences if each[0] not in ("remove_index", "add_index")] == []
            database.closed()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_database_of_the_first_version_is_brought_up_to_date(kind: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        where = str(tmp_path / "service.db")
        if kind == "postgresql":
            where = stack.enter_context(PostgresServer()).url
        database = ServiceDatabase(where)
        stack.callback(database.closed)
        database.prepared()
        with database.writing() as c:
            for column in ("name", "via", "finish_by", "waves"):
                c.execute(text(f"ALTER TABLE service_batches DROP COLUMN {column}"))
            for column in ("service_tier", "cache_write_tokens"):
                c.execute(text(f"ALTER TABLE attempts DROP COLUMN {column}"))
            c.execute(text("ALTER TABLE service_replicas DROP COLUMN commits"))
            if kind == "postgresql":
                c.execute(text("ALTER TABLE waves ALTER COLUMN wave TYPE INTEGER"))
            c.execute(text("UPDATE alembic_version SET version_num = 'v0001'"))
        database.prepared()
        assert Store(database).join("new", 1.0) == 1
        with database.reading() as c:
            (wave,) = (column for column in inspect(c).get_columns("waves") if column["name"] == "wave")
        assert kind == "sqlite" or isinstance(wave["type"], BigInteger)


def test_ids_do_not_repeat() -> None:
    assert len({new_id("batch") for _ in range(1_000)}) == 1_000
