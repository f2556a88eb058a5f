"""A batch that is not accepted takes nothing of another one's with it, whatever number it had for a while."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from governor.forecast.preflight import preflight
from governor.journal.database import JournalError
from governor.model.errors import BadSetting
from governor.model.policy import Policy
from governor.model.pools import Azure, Pool
from governor.profiles.loader import prices_in_force
from governor.service.api import accept
from governor.service.api.accept import BatchSpec, Incoming, PoolVerdict
from governor.service.api.auth import Authority, RequestGuard
from governor.service.api.whatif import _sent
from governor.service.config import ServiceConfig
from governor.service.errors import ApiError
from governor.service.store import base
from governor.service.store.base import NoRoomError, ServiceDatabase
from governor.service.store.ledger import Ledger
from governor.service.store.store import Key, KeyTakenError, Store
from governor.service.store.tables import settings
from governor.service.worker.policies import Policies
from governor.service.worker.worker import Worker
from tests.live import line

KEY = Key("me POST /batches", "k1", "the same")


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without rows: migrations take their time."""
    path = tmp_path_factory.mktemp("accept") / "service.db"
    database = ServiceDatabase(str(path))
    database.prepared()
    database.closed()
    return path


@pytest.fixture
def replica(migrated: Path, tmp_path: Path) -> Iterator[Worker]:
    """What a batch on its way in needs of a worker, without its life."""
    shutil.copy(migrated, tmp_path / "service.db")
    database = ServiceDatabase(str(tmp_path / "service.db"))
    database.locked()
    store = Store(database)
    pools = [Pool(policy=Policy(tpm_limit=10**9))]
    found = SimpleNamespace(
        store=store,
        ledger=Ledger(store),
        policies=Policies(pools, store),
        config=SimpleNamespace(pools=pools, upload_bytes=10**8, file_tokens=9_000),
        replica=store.join("one", 30.0),
    )
    yield cast(Worker, found)
    database.closed()


def incoming(replica: Worker, count: int, *, runs: int | None = None, text: str = "How are you?") -> Incoming:
    made = Incoming(replica, BatchSpec(who="me"))
    made.read(lambda: (json.dumps(line(f"q-{i}", text=text)) for i in range(count)), "batch", runs)
    return made


def accepted(made: Incoming, key: Key | None = None) -> Any:
    (pool,) = made.pools
    verdict = preflight(pool.policy, made.demands[pool.name].load())
    return made._accepted(PoolVerdict(pool.name, verdict), key, lambda row: {"batch_id": row.batch_id})


def counts(replica: Worker, number: int) -> int:
    return int(replica.ledger.records(number).counts().requests)


def test_a_file_counts_as_the_services_setting_says(replica: Worker) -> None:
    file = {"type": "input_file", "file_id": "file-abc"}
    body = {"model": "m", "input": [{"role": "user", "content": [file]}], "max_output_tokens": 10}
    lines = [{"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": body}]
    made = Incoming(replica, BatchSpec(who="me"))
    made.read(lambda: map(json.dumps, lines), "batch")
    asked = _sent(lines, replica.config.file_tokens)["sizes"]
    assert made._buffer[0].request.sizes.chars == asked["chars"][0] == 4 * 9_000


def test_an_azure_deployment_has_no_batch_api(replica: Worker) -> None:
    azure = Azure("https://example.openai.azure.com", "2024-10-21", "gpt-41")
    made = Incoming(replica, BatchSpec(who="me", via="batch"))
    made.pools = [Pool(policy=Policy(), azure=azure)]
    with pytest.raises(BadSetting, match="Azure deployment, whose Batch API is not supported: run it live"):
        made.read(lambda: [json.dumps(line("q-0"))], "batch")


def test_the_loser_of_two_with_one_key_leaves_the_next_batch_alone(replica: Worker) -> None:
    winner, loser, third = (incoming(replica, count) for count in (2, 3, 4))
    first = accepted(winner, KEY)
    with pytest.raises(KeyTakenError):
        accepted(loser, KEY)
    # The number of the transaction that was rolled back is given out again before the loser has tidied up.
    row = accepted(third)
    loser.discard()
    assert [counts(replica, each.number) for each in (first, row)] == [2, 4]
    assert replica.store.batch(row.batch_id) == row


def test_an_upload_whose_replica_was_taken_for_dead_leaves_the_next_batch_alone(
    replica: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accept, "CHUNK", 2)
    lost = incoming(replica, 5)
    write, written = Incoming._spill, []

    def spill(self: Incoming) -> None:
        if self is lost and written:
            raise JournalError("its process died", retryable=True)
        write(self)
        written.append(self)

    monkeypatch.setattr(Incoming, "_spill", spill)
    with pytest.raises(JournalError, match="died"):
        accepted(lost)  # two are written
    assert counts(replica, 1) == 2
    number, owner = replica.store.free_batches(replica.store.join("two", 30.0))[0]
    assert owner == replica.replica
    # The next life removes what was on its way in, and the number is another batch's.
    replica.ledger.erase(number)
    with replica.store.database.writing() as c:
        replica.store.remove_batch(c, number)
    replica.replica = 2
    row = accepted(incoming(replica, 5))
    assert row.number == number
    written.clear()
    with pytest.raises(JournalError, match="lease was lost"):
        accepted(lost)
    lost.discard()
    assert counts(replica, row.number) == 5
    assert replica.store.batch(row.batch_id) == row


def test_a_batch_is_written_once_it_is_accepted_and_not_before(
    replica: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accept, "CHUNK", 2)
    refused = incoming(replica, 5)
    assert sum(counts(replica, number) for number in range(1, 4)) == 0
    refused.discard()
    row = accepted(incoming(replica, 5))
    assert (row.requests, counts(replica, row.number)) == (5, 5)
    found = [each.work.request for each in replica.ledger.records(row.number).pending(is_new=True)]
    assert [request.custom_id for request in found] == [f"q-{i}" for i in range(5)]


@pytest.mark.parametrize("chunk", [1_000, 3])
def test_a_body_is_stored_once_for_all_runs_of_an_input(
    replica: Worker, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(accept, "CHUNK", chunk)
    path = replica.store.database.path
    assert path is not None
    text = "x" * 10**6
    row = accepted(incoming(replica, 2, runs=20, text=text))
    if chunk > 40:
        assert sum(each.stat().st_size for each in path.parent.glob("service.db*")) < 2 * 3 * 10**6
    records = replica.ledger.records(row.number)
    assert records.counts().requests == 40
    for longest_first in (False, True):
        found = [each.work.request for each in records.pending(longest_first=longest_first)]
        assert sorted(request.custom_id for request in found) == sorted(
            f"q-{i}-r{j}" for i in range(2) for j in range(20)
        )
        assert all(request.body is not None and request.body["messages"][0]["content"] == text for request in found)
        assert len({id(request.body) for request in found}) <= 2 + 40 // chunk


def test_reading_ends_when_the_client_has_left(replica: Worker) -> None:
    made = Incoming(replica, BatchSpec(who="me"))
    read = 0

    def lines() -> Iterator[str]:
        nonlocal read
        for read in range(1, 1_000_000):
            if read == 100:
                made.left.set()
            yield json.dumps(line(f"q-{read}"))

    with pytest.raises(ApiError, match="the client has left"):
        made.read(lines, "batch")
    assert read == 100


def test_a_batch_without_room_on_the_disk_is_refused_with_the_figures(
    replica: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = incoming(replica, 2_000)
    free = base.ROOM_KEPT + 2**20
    monkeypatch.setattr(base.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    replica.store.database.check_room()
    with pytest.raises(NoRoomError, match=r"65\.0 MiB free and needs [1-9].* MiB for requests and 64 MiB for answers"):
        accepted(made)
    assert counts(replica, 1) == 0
    free = base.ROOM_KEPT - 1
    with pytest.raises(NoRoomError, match=r"64\.0 MiB free and needs 64 MiB for answers: make room"):
        replica.store.database.check_room()


def test_changes_that_become_visible_in_the_other_order_end_as_everywhere(replica: Worker) -> None:
    """Two replicas change settings at once, and the earlier number is committed later."""
    policies = replica.policies

    def changed(number: int, **values: str) -> None:
        changes = json.dumps({name: ["", value] for name, value in values.items()})
        row = {"number": number, "at": 0.0, "who": "me", "pool": "default", "changes": changes}
        with replica.store.database.writing() as c:
            c.execute(settings.insert(), row)

    changed(2, OPENAI_MAX_CONCURRENCY="7")
    assert policies.refresh()
    assert not policies.refresh()
    changed(1, OPENAI_MAX_CONCURRENCY="5", OPENAI_TPM_HEADROOM="0.3")
    assert policies.refresh()
    found = policies.in_force()["default"]
    assert (found.max_concurrency, found.tpm_headroom) == (7, 0.3)
    assert not policies.refresh()


def test_what_is_held_in_memory_is_limited_as_such(replica: Worker) -> None:
    """A file streams to the disk; JSON does not, whatever it is posted to."""
    pools = replica.config.pools
    config = ServiceConfig(pools=pools, environment={}, prices=prices_in_force(), upload_bytes=900, body_bytes=80)

    async def status(path: str, kind: str, size: int) -> int:
        told: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def send(message: Any) -> None:
            told.append(message)

        async def receive() -> Any:
            raise AssertionError("nobody reads")

        headers = [(b"content-type", kind.encode()), (b"content-length", str(size).encode())]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        await RequestGuard(app, config, Authority(config, replica.store))(scope, receive, send)
        return int(told[0]["status"])

    form, plain = "multipart/form-data; boundary=x", "application/json"
    cases = {
        ("/batches", "application/jsonl", 900): 200,
        ("/batches", "application/jsonl", 901): 413,
        ("/templates/t/batch-run", form, 900): 200,
        ("/templates/t/batch-run", plain, 81): 413,
        ("/templates/t/preflight", plain, 80): 200,
        ("/settings", form, 81): 413,
    }
    assert {case: asyncio.run(status(*case)) for case in cases} == cases
