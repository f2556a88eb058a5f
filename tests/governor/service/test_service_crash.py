"""The service survives: killed at any moment, one of several replicas dead, its lease lost, its database away.

The suite kills a few times, the long form at 30 random moments. What a provider saw is counted by the provider.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psycopg
import pytest

from governor.journal.database import JournalError
from governor.journal.reports import Batch
from governor.law import State
from governor.model.pools import Pool
from governor.model.requests import Answer, Outcome
from governor.profiles.loader import prices_in_force
from governor.service.api.app import service_of
from governor.service.config import ServiceConfig
from governor.service.store.base import ServiceDatabase, replica_name, session_name
from governor.service.store.ledger import DatabaseRetries, FencedWriter, LeaseLostError, Ledger
from governor.service.store.store import Store
from tests.governor.journals import works
from tests.live import WAIT_S, Cli, provider, shared_cli
from tests.postgres import PostgresServer
from tests.servers import RedisServer
from tests.services import Served, good, lines, ready, started, until

IN_FLIGHT = 6
ENV = {"OPENAI_MAX_CONCURRENCY": str(IN_FLIGHT)}
LATENCY = {"first_token_s": 0.1, "per_token_s": 0.0, "sigma": 0.3, "stall_ratio": 0.0}
# Some 429s and drops on the way, so that retries are killed too.
EVENTS = [{"kind": "throttled", "ratio": 0.05, "retry_after_s": 0.05}, {"kind": "drop", "ratio": 0.03}]


@pytest.fixture(scope="module")
def cli() -> Cli:
    return shared_cli()


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


def posted(served: Served, count: int, key: str) -> str | None:
    """A batch's id, or None where the service died before it said that it was accepted."""
    with contextlib.suppress(httpx.HTTPError):
        answer = served.client.post("/batches", content=lines(count, key), headers={"Idempotency-Key": key})
        if answer.status_code == 202:
            return str(answer.json()["batch_id"])
        assert answer.status_code == 503, answer.text
    return None


def check_batch(served: Served, batch_id: str, count: int, key: str) -> int:
    """Each line has exactly one result; returns how many were sent again after a crash."""
    row = served.over(batch_id)
    assert (row["state"], row["requests"], row["done"], row["failed"]) == ("completed", count, count, 0)
    found = served.lines(batch_id)
    assert [each["custom_id"] for each in found] == [f"{key}-{i}" for i in range(count)]
    return int(row["resent"])


def check_kills(cli: Cli, folder: Path, seed: int, kills: int) -> None:
    """Kills the service so often under load, and starts it again; then every accepted batch finishes."""
    rng = random.Random(seed)
    accepted: dict[str, tuple[int, str]] = {}
    asked: dict[str, int] = {}
    with provider(events=EVENTS, latency=LATENCY, seed=seed % 10**6) as llm:
        for life in range(kills):
            served = started(cli, folder, llm.base_url, "--quiet", env=ENV)
            dies_at = time.monotonic() + rng.uniform(0.0, 1.6)
            while time.monotonic() < dies_at:
                # What got no answer is asked again under its key, until it is known.
                waiting = [key for key in asked if key not in {k for _, k in accepted.values()}]
                key = waiting[0] if waiting else f"k{len(asked)}"
                asked.setdefault(key, rng.randint(1, 12))
                batch_id = posted(served, asked[key], key)
                if batch_id is None:
                    time.sleep(0.02)
                else:
                    accepted[batch_id] = (asked[key], key)
                    time.sleep(rng.uniform(0.0, 0.25))
            served.stop(signal.SIGKILL)
            assert "Traceback" not in served.log, (life, served.log)
        served = ready(started(cli, folder, llm.base_url, "--quiet", env=ENV))
        resent = sum(check_batch(served, batch_id, *accepted[batch_id]) for batch_id in accepted)
        listed = served.get("/batches", params={"limit": 500})["batches"]
        served.stop(signal.SIGKILL)
        seen = llm.stats()["requests"]
    assert accepted, "nothing was accepted: nothing was tested"
    # Accepted but never heard of are at most those whose answer a kill cut off; nothing was accepted twice.
    assert {row["batch_id"] for row in listed} >= set(accepted)
    assert len(listed) <= len(asked)
    total = sum(row["requests"] for row in listed)
    assert resent <= kills * IN_FLIGHT
    with contextlib.closing(ServiceDatabase(str(folder / "service.db")).engine.raw_connection()) as connection:
        recorded = connection.cursor().execute("SELECT count(*) FROM attempts").fetchone()[0]
        doubled = (
            connection.cursor()
            .execute("SELECT count(*) - count(DISTINCT request) FROM attempts WHERE outcome = 'ok' AND lane = 'main'")
            .fetchone()[0]
        )
    assert doubled == 0
    assert total <= recorded <= seen + kills * IN_FLIGHT


@pytest.fixture
def killing(cli: Cli) -> Iterator[Cli]:
    """The command line; whatever a test has left running is ended."""
    yield cli
    for process in list(cli._running.values()):
        process.signal(signal.SIGKILL)


def test_kill_9_under_load_loses_nothing_and_doubles_nothing(killing: Cli, tmp_path: Path, seed: int) -> None:
    check_kills(killing, tmp_path, seed, 3)


@pytest.mark.long
def test_kill_9_at_thirty_moments(killing: Cli, tmp_path: Path, seed: int) -> None:
    check_kills(killing, tmp_path, seed, 30)


def test_a_signal_lets_those_in_flight_end(killing: Cli, tmp_path: Path) -> None:
    with provider(latency=LATENCY | {"first_token_s": 0.4}) as llm:
        served = ready(started(killing, tmp_path, llm.base_url, env=ENV))
        batch_id = served.batch(30)
        until("the first result", lambda: served.get(f"/batches/{batch_id}")["done"])
        with served.client.stream("GET", f"/batches/{batch_id}/events") as stream:
            served.process.signal(signal.SIGTERM)
            for _ in stream.iter_lines():
                pass
        ran = served.stop(signal.SIGTERM)
        assert ran.code in (0, 128 + signal.SIGTERM), ran.err
        before = llm.stats()["requests"]
        again = ready(started(killing, tmp_path, llm.base_url, env=ENV))
        row = again.over(batch_id)
        assert (row["done"], row["resent"], llm.stats()["requests"]) == (30, 0, 30)
        assert 0 < before < 30
        again.stop(signal.SIGKILL)


# ---------------------------------------------------------------- several replicas


def test_a_dead_replicas_batches_are_taken_over_and_none_runs_twice(
    killing: Cli, tmp_path: Path, postgres: PostgresServer, seed: int
) -> None:
    rng = random.Random(seed)
    url = postgres.database(f"takeover{rng.randrange(10**9)}")
    with provider(latency=LATENCY | {"first_token_s": 0.3}) as llm:
        args = ("--lease", "5s")
        a, b = (ready(started(killing, tmp_path, llm.base_url, *args, env=ENV, database=url)) for _ in range(2))
        count = 120  # six seconds' worth, so that the pause comes before the end on a busy machine too
        mine = {a.batch(count, prefix="a"): "a", b.batch(count, prefix="b"): "b"}
        until("a's first result", lambda: all(b.get(f"/batches/{batch_id}")["done"] for batch_id in mine))
        # Both replicas answer for either's batches; holding and settings go through the database.
        held = next(batch_id for batch_id, prefix in mine.items() if prefix == "a")
        good(b.client.post(f"/batches/{held}/pause"))
        until("the pause", lambda: a.get(f"/batches/{held}")["state"] == "paused")
        good(b.client.put("/settings", json={"settings": {"OPENAI_TPM_HEADROOM": 0.2}}))
        until("the setting", lambda: a.get("/settings")["settings"]["OPENAI_TPM_HEADROOM"] == 0.2)
        assert "no PACELINE_REDIS_URL" in b.get("/readyz")["detail"]
        before = a.get(f"/batches/{held}")["done"]
        good(b.client.post(f"/batches/{held}/resume"))
        # The first launches may be counted and not yet written: those that follow the first answers are.
        until("the next answer", lambda: a.get(f"/batches/{held}")["done"] > before)
        a.stop(signal.SIGKILL)
        resent = 0
        for batch_id, prefix in mine.items():
            row = b.over(batch_id)
            assert (row["state"], row["done"]) == ("completed", count)
            assert [each["custom_id"] for each in b.lines(batch_id)] == [f"{prefix}-{i}" for i in range(count)]
            resent += row["resent"]
        # What was in flight when it died was sent again, and nothing else was. Of that, some may have been written down
        # and not yet on the wire.
        assert 0 < resent <= IN_FLIGHT
        assert 2 * count <= llm.stats()["requests"] <= 2 * count + resent
        b.stop(signal.SIGKILL)


def test_a_replica_that_was_stopped_for_longer_than_its_lease_sends_nothing_more(
    killing: Cli, tmp_path: Path, postgres: PostgresServer, seed: int
) -> None:
    url = postgres.database(f"stopped{seed}")
    with provider(latency=LATENCY) as llm:
        a = ready(started(killing, tmp_path, llm.base_url, "--lease", "4s", env=ENV, database=url))
        batch_id = a.batch(60)
        until("the first result", lambda: a.get(f"/batches/{batch_id}")["done"])
        a.process.signal(signal.SIGSTOP)
        b = ready(started(killing, tmp_path, llm.base_url, "--lease", "4s", env=ENV, database=url))
        row = b.over(batch_id)
        assert (row["done"], row["failed"]) == (60, 0)
        before = llm.stats()["requests"]
        a.process.signal(signal.SIGCONT)
        # It notices at its next step, and begins another life.
        until("the other's new life", lambda: a.get(f"/batches/{batch_id}") == row)
        # What was on its way into the network when it was frozen may still go; nothing is launched any more.
        assert llm.stats()["requests"] <= before + IN_FLIGHT
        assert row["resent"] <= IN_FLIGHT
        for each in (a, b):
            each.stop(signal.SIGKILL)


def test_a_lapsed_replica_that_is_frozen_in_a_transaction_keeps_no_lock(postgres: PostgresServer, seed: int) -> None:
    url = postgres.database(f"frozen{seed}")
    database = ServiceDatabase(url)
    database.prepared()
    try:
        store = Store(database)
        lapsed, me = store.join("elsewhere:1", -1.0), store.join(replica_name(), 30.0)
        with psycopg.connect(url, application_name=session_name("elsewhere:1")) as frozen:
            frozen.execute("SELECT 1 FROM service_replicas WHERE number = %s FOR UPDATE", [lapsed])
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(store.free_batches, me).result(WAIT_S) == []
            with pytest.raises(psycopg.OperationalError):
                frozen.execute("SELECT 1")
        assert not store.renewed(lapsed, 30.0)
        assert store.renewed(me, 30.0)
    finally:
        database.closed()


def test_who_has_lost_the_lease_writes_nothing(tmp_path: Path) -> None:
    database = ServiceDatabase(str(tmp_path / "service.db"))
    database.prepared()
    try:
        store = Store(database)
        ledger = Ledger(store)
        with database.writing() as c:
            values = {"batch_id": "batch_1", "state": "queued", "owner": 1, "requests": 5, "who": "me"}
            rest = {"template_id": "", "template_version": 0, "finalize": 0, "deadline_s": -1.0, "details": {}}
            number = store.add_batch(c, values | rest)
            assert ledger.write(c, number, works(5)) == 5
        replica = store.join("first", 30.0)
        writer = FencedWriter(store, replica, DatabaseRetries(lambda error: None))
        writer.batch.ends.append(((number << 24) + 1, "", None, 1.0))
        writer.commit()
        assert ledger.records(number).counts().done == 1
        # Another process has taken the database over: with SQLite, all others are gone.
        other = store.join("second", 30.0)
        assert store.free_batches(other) == [(number, 1)]
        assert not store.renewed(replica, 30.0)
        writer.batch.ends.append(((number << 24) + 2, "", None, 1.0))
        with pytest.raises(LeaseLostError):
            writer.commit()
        assert ledger.records(number).counts().done == 1
        writer.abandon()
    finally:
        database.closed()


def test_a_lease_is_renewed_while_a_life_takes_stock(
    postgres: PostgresServer, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine that may take longer than a lease; neighbours look for lapsed ones all the time."""
    lease_s = 0.6
    config = ServiceConfig(
        database=postgres.database(f"renewed{seed}"),
        pools=[Pool(base_url="http://127.0.0.1:9/v1")],
        environment={},
        prices=prices_in_force(),
        lease_s=lease_s,
    )
    service = service_of(config)
    store, worker = service.store, service.worker
    looked: list[list[tuple[int, int]]] = []

    def slowly(*_: object) -> dict[str, State]:
        until_at = time.monotonic() + 2.0 * lease_s
        while time.monotonic() < until_at:
            looked.append(store.free_batches(-1))  # marks whose lease has lapsed as lost
            time.sleep(0.02)
        return {}

    monkeypatch.setattr(worker.ledger, "last_states", slowly)

    async def story() -> None:
        running = asyncio.create_task(worker.run())
        async with asyncio.timeout(WAIT_S):
            while not worker.ready:
                assert worker.trouble == "it is starting", worker.trouble
                await asyncio.sleep(0.02)
        assert worker.replica == 1
        worker.stop()
        await running

    try:
        asyncio.run(story())
    finally:
        store.database.closed()
    assert looked


def test_a_database_that_goes_away_and_comes_back_costs_no_answer(killing: Cli, tmp_path: Path) -> None:
    """Case a15, and more: it is away for longer than the answers in flight take; nothing is sent twice."""
    count = 40
    env = {"OPENAI_MAX_CONCURRENCY": str(count)}
    slow = LATENCY | {"first_token_s": 3.0, "sigma": 0.1}
    with PostgresServer() as server, provider(latency=slow) as llm:
        served = ready(started(killing, tmp_path, llm.base_url, "--lease", "5s", env=env, database=server.url))
        batch_id = served.batch(2 * count)
        until("all are in flight", lambda: llm.stats()["in_flight"] == count)
        server.stop()
        until("the complaint", lambda: served.client.get("/readyz").status_code == 503)
        assert served.client.get("/healthz").status_code == 200
        answer = served.client.get("/batches")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "DATABASE_UNAVAILABLE")
        until("their answers", lambda: llm.stats()["in_flight"] == 0)
        assert llm.stats()["requests"] == count
        server.start()
        row = served.over(batch_id)
        assert (row["done"], row["failed"], row["resent"]) == (2 * count, 0, 0)
        assert len({each["custom_id"] for each in served.lines(batch_id)}) == 2 * count
        assert llm.stats()["requests"] == 2 * count
        assert served.client.get("/readyz").status_code == 200
        served.stop(signal.SIGKILL)


def test_a_commit_whose_acknowledgement_was_lost_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = ServiceDatabase(str(tmp_path / "service.db"))
    database.prepared()
    try:
        store = Store(database)
        ledger = Ledger(store)
        with database.writing() as c:
            ledger.write(c, 1, works(2))
        told: list[JournalError | None] = []
        writer = FencedWriter(store, store.join("first", 30.0), DatabaseRetries(told.append))
        written = writer._write_once
        broken = [True, True]

        def write(batch: Batch) -> None:
            if len(broken) == 2:
                broken.pop()
                raise JournalError("it is away", retryable=True)
            written(batch)
            if broken:
                broken.pop()
                raise JournalError("its connection broke after the commit", retryable=True)

        monkeypatch.setattr(writer, "_write_once", write)
        writer.batch.ends.append(((1 << 24) + 1, "", Answer(Outcome.OK, status=200), 1.0))
        writer.commit()
        writer.batch.ends.append(((1 << 24) + 0, "", Answer(Outcome.OK, status=200), 2.0))
        writer.close()
        assert ledger.records(1).counts().done == 2
        assert [str(each) for each in told if each] == ["it is away", "its connection broke after the commit"]
        assert told[-1] is None
    finally:
        database.closed()


def test_replicas_share_one_quota_through_redis(
    killing: Cli, tmp_path: Path, postgres: PostgresServer, seed: int
) -> None:
    redis = RedisServer()
    try:
        url = postgres.database(f"shared{seed}")
        env = {"OPENAI_MAX_CONCURRENCY": "2", "PACELINE_REDIS_URL": redis.url}
        with provider(latency=LATENCY) as llm:
            replicas = [ready(started(killing, tmp_path, llm.base_url, env=env, database=url)) for _ in range(2)]
            batches = [each.batch(15, prefix=f"b{i}") for i, each in enumerate(replicas)]
            for each, batch_id in zip(replicas, batches, strict=True):
                row = each.over(batch_id)
                assert (row["state"], row["done"]) == ("completed", 15)
            stats = llm.stats()
            # Two at most in all, where each alone would have two of its own.
            assert (stats["requests"], stats["in_flight_max"]) == (30, 2)
            assert all(each.get("/readyz")["detail"] == "" for each in replicas)
            paused = replicas[0].batch(40, prefix="p")
            until("its first result", lambda: replicas[0].get(f"/batches/{paused}")["done"])
            good(replicas[0].client.post(f"/batches/{paused}/pause"))
            until("the end of what flies", lambda: replicas[0].get(f"/batches/{paused}")["in_flight"] == 0)
            good(replicas[0].client.post(f"/batches/{paused}/resume"))
            assert replicas[0].over(paused)["done"] == 40
            assert llm.stats()["requests"] == 70
            for each in replicas:
                each.stop(signal.SIGKILL)
    finally:
        redis.stop()
