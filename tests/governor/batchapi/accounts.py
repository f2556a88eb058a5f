"""An account at the synthetic provider, called in this process and in virtual time, and runs of waves against it.

`Mortal` is a process of ours that may be killed at any point: before and after each call, and before and after each
commit. What the next one finds is the journal's file and the account, nothing else.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, TypeVar

from governor.batchapi.client import CallFailed, RemoteBatch, RemoteFile, batch_in, file_in
from governor.batchapi.collect import DriverContext
from governor.batchapi.driver import WaveDriver
from governor.journal.journal import Journal
from governor.model.estimate import sizes_of
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.requests import CHAT, Request, url_of
from governor.model.work import Work, work_of
from governor.provider.answers import classify, dropped
from sim.model.provider_config import ProviderConfig
from sim.serving.batches import ApiRefusal, BatchDesk
from sim.serving.replies import Desk
from tests.virtual_loop import run_virtual

T = TypeVar("T")
RUN_ID = "r1"
EPOCH_S = 1_700_000_000.0


class Killed(BaseException):
    """The process is dead: nothing of it runs on."""


@dataclass
class Account:
    """The provider's side, which outlives our processes. `now`: its seconds, which are those of the run.

    `faults`: called before and after each call with its name; may raise. `downloads`: by file.
    """

    config: ProviderConfig
    seed: int = 1
    now: float = 0.0
    faults: Callable[[str, str], None] = lambda when, name: None
    calls: Counter[str] = field(default_factory=Counter)
    downloads: Counter[str] = field(default_factory=Counter)
    created: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.desk = BatchDesk(Desk(self.config, seed=self.seed))

    @property
    def queue(self) -> Any:
        return self.desk.queue

    def call(self, name: str, method: str, path: str, sent: Any = None, **query: Any) -> Any:
        """One request; what HTTP would have answered, or `CallFailed`."""
        self.faults("before", name)
        self.calls[name] += 1
        self.queue.advance(self.now)

        async def asked() -> Any:
            await self.desk._write_files()
            request = SimpleNamespace(method=method, query_params={k: str(v) for k, v in query.items()})
            return await self.desk._answer(request, path, sent or {}, self.now, lambda at: int(EPOCH_S + at))

        try:
            found = _at_once(asked())
        except ApiRefusal as refusal:
            raise CallFailed(classify(refusal.status, None, refusal.body)) from None
        self.faults("after", name)
        return found

    def cancel_there(self, batch_id: str) -> None:
        """Somebody else cancels a batch."""
        self.call("console", "POST", f"/v1/batches/{batch_id}/cancel")


def _at_once(coroutine: Any) -> Any:
    """The result of a coroutine that only yields to others."""
    while True:
        try:
            coroutine.send(None)
        except StopIteration as done:
            return done.value


class Client:
    """A `BatchClient` of that account. `takes_s`: draws how long a call is under way, None = no time."""

    def __init__(self, account: Account, takes_s: Callable[[], float] | None = None) -> None:
        self.account = account
        self.takes_s = takes_s

    async def upload(self, name: str, content: BinaryIO) -> RemoteFile:
        sent = {"purpose": "batch", "name": name, "content": content.read()}
        return file_in(await self._call("upload", "POST", "/v1/files", sent))

    async def create(self, file_id: str, endpoint: str, metadata: Mapping[str, str]) -> RemoteBatch:
        sent = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h", "metadata": dict(metadata)}
        return batch_in(await self._call("create", "POST", "/v1/batches", sent))

    async def retrieve(self, batch_id: str) -> RemoteBatch:
        return batch_in(await self._call("retrieve", "GET", f"/v1/batches/{batch_id}"))

    async def cancel(self, batch_id: str) -> RemoteBatch:
        return batch_in(await self._call("cancel", "POST", f"/v1/batches/{batch_id}/cancel"))

    async def batches(self, since_epoch_s: float) -> list[RemoteBatch]:
        return [batch_in(each) for each in (await self._call("batches", "GET", "/v1/batches", limit=100))["data"]]

    async def files(self) -> list[RemoteFile]:
        return [file_in(each) for each in (await self._call("files", "GET", "/v1/files", purpose="batch"))["data"]]

    async def download(self, file_id: str, into: BinaryIO) -> None:
        into.write(await self._call("download", "GET", f"/v1/files/{file_id}/content"))
        self.account.downloads[file_id] += 1

    async def delete(self, file_id: str) -> None:
        try:
            await self._call("delete", "DELETE", f"/v1/files/{file_id}")
        except CallFailed as failed:
            if failed.answer.status != 404:
                raise

    async def aclose(self) -> None:
        pass

    async def _call(self, *arguments: Any, **query: Any) -> Any:
        if self.takes_s is not None:
            await asyncio.sleep(self.takes_s())
        self.account.now = asyncio.get_running_loop().time()
        return self.account.call(*arguments, **query)


# ---------------------------------------------------------------- our side


POOL = Pool(policy=Policy(retry_max_attempts=5))


def works(requests: int, *, models: tuple[str, ...] = ("gpt-4o-mini",), chars: int = 400) -> list[Work]:
    """Requests of about chars/4 tokens each, in turns for those models."""
    found = []
    for i in range(requests):
        body = {
            "model": models[i % len(models)],
            "messages": [{"role": "user", "content": f"{i} " + "x" * chars}],
            "max_tokens": 20,
        }
        request = Request(i, f"q-{i}", url_of(CHAT), body["model"], body, sizes_of(CHAT, body))  # type: ignore[arg-type]
        found.append(work_of(request, POOL.policy))
    return found


def journal_of(path: Path, given: list[Work]) -> Journal:
    """The journal at that path, made of these requests if there is none, ready to run."""
    if Journal.exists(path):
        return Journal.open(path, to_run=True)
    journal = Journal.create(path, fingerprint="print", seed=1, epoch_s=EPOCH_S)
    journal.ingest(given)
    return journal


@dataclass
class Lived:
    """One process's life: why its driver returned, and what it said."""

    why: str
    said: list[str]


def live(
    journal: Journal,
    account: Account,
    *,
    pool: Pool = POOL,
    keep_files: bool = False,
    committed: Callable[[str], None] = lambda when: None,
    meanwhile: Callable[[WaveDriver], Awaitable[None]] | None = None,
) -> Lived:
    """Run the waves of a journal to their end, in virtual time from where the account's clock stands.

    `committed`: called before and after each commit; may raise.
    """
    said: list[str] = []
    begin_s = account.now

    async def main() -> str:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(begin_s)
        begun = journal.begin({pool.name: pool.policy}, loop.time())

        async def flushed() -> None:
            committed("before")
            journal._running().commit()
            committed("after")

        async def in_thread(function: Callable[[], T]) -> T:
            return function()

        numbers = count(max((row.wave for row in journal.waves()), default=0) + 1)
        around = DriverContext(
            now=loop.time,
            say=said.append,
            flushed=flushed,
            in_thread=in_thread,
            numbers=numbers,
            run_id=RUN_ID,
            began_epoch_s=EPOCH_S,
            keep_files=keep_files,
            spool=journal.downloads,
        )
        recorder, waves = begun.recorders[pool.name], journal.wave_recorder(pool.name)
        driver = WaveDriver(pool, Client(account), journal, recorder, waves, around)
        beside = asyncio.create_task(meanwhile(driver)) if meanwhile is not None else None
        try:
            why = await driver.run()
            numbers_ended = [row.wave for row in driver.ended_rows]
            assert len(numbers_ended) == len(set(numbers_ended)), "a wave ends once"
        finally:
            if beside is not None:
                beside.cancel()
        journal.finish(loop.time(), why or "finished")
        return why

    return Lived(run_virtual(main()), said)


def dropped_call() -> CallFailed:
    """A call whose answer never came."""
    return CallFailed(dropped("the connection broke"))


def check_account(account: Account, journal: Journal, given: list[Work]) -> None:
    """Nothing is lost or doubled, no batch of ours came about twice, and no file is left."""
    counts = journal.counts()
    assert (counts.pending, counts.in_flight) == (0, 0), counts
    found = [result.request.custom_id for result in journal.results()]
    assert found == [work.request.custom_id for work in given]
    for result in journal.results():
        if not result.failure:
            assert result.answer is not None
            assert result.answer.body is not None
    marks = [json.dumps(job.metadata, sort_keys=True) for job in account.desk.jobs.values()]
    assert len(set(marks)) == len(marks), "a wave became two batches"
    assert not account.desk.files, "files are left"
    assert all(row.stage == "closed" for row in journal.waves())
