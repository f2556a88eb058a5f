"""An incoming batch: read as a stream, judged, and only then written and accepted.

A small batch stays in memory from the reading to the one transaction of its acceptance. A large one is read twice: for
the verdict, of which 80 bytes a request remain, and once more to be written, a few hundred requests at a time, under a
batch that is not visible yet. A process that dies before the acceptance leaves nothing: the replica that takes its
batches over removes it. A refused batch is never written.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import anyio.to_thread
from sqlalchemy import Connection

from governor.batchapi.limits import usable_tokens
from governor.batchapi.sdk_client import check_has_batches
from governor.forecast.forecast import Demand, Outlook
from governor.forecast.preflight import InUse, Verdict, fluid_forecast, preflight
from governor.journal.database import JournalError
from governor.journal.schema import to_json
from governor.law import DAY_S
from governor.model.errors import BadInput, BadSetting, FailureCode
from governor.model.pools import Pool
from governor.model.requests import BATCH, Request, read_requests
from governor.model.words import duration, until_s
from governor.model.work import Work, work_of
from governor.run.intake import pooled
from governor.run.via.guards import check_both, check_line, foreseen_of
from governor.service.errors import INVALID_REQUEST, NOT_READY, RATE_LIMITED, ApiError
from governor.service.store.store import QUEUED, RECEIVING, BatchRow, Key, new_id
from governor.service.store.tables import BATCH_REQUESTS_MOST
from governor.service.worker.policies import checked_overrides
from governor.service.worker.worker import Worker

# Requests, and approximate bytes of bodies, that are held before they are written.
CHUNK, _CHUNK_BYTES = 500, 4 * 2**20
# With so many forecasts pending, a batch is accepted on the fluid forecast: it says so, and does not wait.
FORECASTS_MOST = 4
# The database's bytes for a request besides its body; and the copies of a body on the disk: in the write-ahead log and
# in the file.
ROW_BYTES, COPIES = 600, 2
# So many models of a batch are kept with it, to tell a refusal of one model from a refusal of all its requests.
MODELS_MOST = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSpec:
    """The options of a posted batch. `template`: id and version, None = raw lines. `finish_by`: of via=auto."""

    who: str
    deadline_s: float | None = None
    finalize: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    template: tuple[str, int] | None = None
    name: str = ""
    via: str = "live"
    finish_by: str = ""

    def check(self) -> None:
        """Raise BadSetting for options that do not go together."""
        if self.finish_by and self.via != "auto":
            raise BadSetting(f"finish_by is for via=auto: leave it out with via={self.via}, or set deadline_s")
        if self.finalize and self.via != "live":
            raise BadSetting(f"finalize is for live calls: leave it out with via={self.via}")


@dataclass(frozen=True, slots=True)
class PoolVerdict:
    """The verdict on a batch, and the pool that it is about: the pool that refuses, or that will end last."""

    pool: str
    verdict: Verdict

    def to_json_dict(self) -> dict[str, Any]:
        names = list(Verdict.__dataclass_fields__)
        return {"pool": self.pool} | {name: getattr(self.verdict, name) for name in names}

    def refusal(self) -> ApiError:
        """Return the 503 of a batch that may not start."""
        v = self.verdict
        names = ("projected_tokens", "budget_tokens", "in_use_tokens", "suggested_wait_s", "retryable", "max_runs_now")
        details = {name: getattr(v, name) for name in names} | {"pool": self.pool}
        headers = {} if v.suggested_wait_s is None else {"Retry-After": str(v.suggested_wait_s)}
        return ApiError(503, RATE_LIMITED, v.reason, details, headers)


class Incoming:
    """An incoming batch: `read`, `judge`, then `accept` or `discard`, which leaves nothing.

    `stores`: whether it may be accepted; a mere preflight keeps nothing. `left`: set once the client has gone.
    """

    def __init__(self, worker: Worker, spec: BatchSpec, *, stores: bool = True) -> None:
        spec.check()
        # Seconds from now, on the clock of the pools.
        self._finish_s = self._finish_by = -1.0
        if spec.via == "auto":
            self._finish_s = until_s(spec.finish_by, "finish_by") if spec.finish_by else spec.deadline_s or DAY_S
            self._finish_by = time.time() + self._finish_s / worker.config.time_scale
        self.spec = spec
        self.left = threading.Event()
        self.demands: dict[str, Demand] = {}
        self.pools: list[Pool] = []
        self.own: dict[str, str] = {}
        self._worker = worker
        self._stores = stores
        self._replica = worker.replica
        self._batch_id = new_id("batch")
        self._number = 0  # written requests are stored under it
        self._lines: Callable[[], Iterable[str | bytes]] = lambda: ()
        self._name = ""
        self._runs: int | None = None
        self._is_large = False
        self._buffer: list[Work] = []
        self._bytes = 0
        for pool, policy in worker.policies.in_force().items():
            own = checked_overrides(policy, spec.settings)
            self.own = own
            stated = next(each for each in worker.config.pools if each.name == pool)
            words = [f"{name}={value}" for name, value in own.items()]
            self.pools.append(replace(stated, policy=policy.set_values(words)))
            self.demands[pool] = Demand()

    @property
    def count(self) -> int:
        """Return the requests read so far."""
        return sum(demand.requests for demand in self.demands.values())

    # ------------------------------------------------------------ in a thread

    def read(self, lines: Callable[[], Iterable[str | bytes]], name: str, runs: int | None = None) -> None:
        """Read the batch once. Raise BadInput for an invalid line, `ApiError` if the client has left. Blocks.

        `lines`: returns the same lines each time. `runs`: so many requests of each, called `ID-r0` and so on.
        """
        self._lines, self._name, self._runs = lines, name, runs
        size = 0
        for work in self._works():
            request = work.request
            self.demands[request.pool].add(request.model, request.sizes, int(work.reserve))
            if not self._stores or self._is_large:
                continue
            size += 0 if self._buffer and self._buffer[-1].request.body is request.body else request.sizes.chars
            self._buffer.append(work)
            if len(self._buffer) >= CHUNK or size >= _CHUNK_BYTES:
                self._is_large, self._buffer = True, []

    def _works(self) -> Iterator[Work]:
        for request, pool in pooled(self._requests(), self.pools, self._name):
            if request.index >= BATCH_REQUESTS_MOST:
                raise BadInput(f"more than {BATCH_REQUESTS_MOST:,} requests: send several batches", self._name)
            if self.spec.via == BATCH:
                check_has_batches(pool)
                check_line(request, 0, pool)
            work = work_of(request, pool.policy)
            if self.spec.via == "auto":
                check_has_batches(pool)
                check_both(request, int(work.reserve), pool)
            yield work

    def _requests(self) -> Iterator[Request]:
        runs = self._runs
        for request in read_requests(self._measured(), self._name, file_tokens=self._worker.config.file_tokens):
            if runs is None:
                yield request
                continue
            for run in range(runs):
                yield replace(request, index=request.index * runs + run, custom_id=f"{request.custom_id}-r{run}")

    def _measured(self) -> Iterator[str | bytes]:
        """Yield the lines while the client waits for the answer; add up their bytes."""
        self._bytes = 0
        most = self._worker.config.upload_bytes
        for line in self._lines():
            if self.left.is_set():
                raise ApiError(400, INVALID_REQUEST, "the client has left")
            self._bytes += len(line)
            if self._bytes > most:
                raise BadInput(f"the requests are larger than {most:,} bytes: send several batches", self._name)
            yield line

    def _write(self) -> None:
        """Write all of a large batch, under a number that is not visible yet."""
        size = 0
        for work in self._works():
            same = self._buffer and self._buffer[-1].request.body is work.request.body
            self._buffer.append(work)
            size += 0 if same else work.request.sizes.chars
            if len(self._buffer) >= CHUNK or size >= _CHUNK_BYTES:
                self._spill()
                size = 0

    def _spill(self) -> None:
        store, ledger = self._worker.store, self._worker.ledger
        with store.database.writing() as c:
            number = self._number
            if not number:
                number = store.add_batch(c, self._values(RECEIVING, self._batch_id, {}))
            elif not self._is_ours(c):
                raise JournalError("this replica's lease was lost while a batch came in", retryable=True)
            ledger.write(c, number, self._buffer)
        # Not before it is committed: the number of a transaction that was rolled back is soon another batch's.
        self._number = number
        self._buffer = []

    def _is_ours(self, c: Connection) -> bool:
        """Return whether the written requests remain: a replica that took this one for dead removes them."""
        return self._worker.store.receives(c, self._number, self._batch_id)

    def _values(self, state: str, batch_id: str, details: Mapping[str, Any]) -> dict[str, Any]:
        spec = self.spec
        template_id, version = spec.template or ("", 0)
        return {
            "batch_id": batch_id,
            "state": state,
            "owner": self._replica,
            "requests": self.count,
            "who": spec.who[:255],
            "name": spec.name,
            "template_id": template_id,
            "template_version": version,
            "finalize": int(spec.finalize),
            "deadline_s": -1.0 if spec.deadline_s is None else spec.deadline_s,
            "via": spec.via,
            "finish_by": self._finish_by,
            "details": details,
        }

    def discard(self) -> None:
        """Remove the written requests, but not those of another batch written under that number since. Blocks."""
        if self._number:
            worker = self._worker
            worker.ledger.erase(self._number, self._is_ours)
            with worker.store.database.writing() as c:
                if self._is_ours(c):
                    worker.store.remove_batch(c, self._number)
            self._number = 0

    def _accepted(self, judged: PoolVerdict, key: Key | None, answer: Callable[[BatchRow], dict[str, Any]]) -> BatchRow:
        """Accept the batch: write everything that makes it, in one transaction. Blocks."""
        v, store = judged.verdict, self._worker.store
        store.database.check_room(COPIES * self._bytes + ROW_BYTES * self.count)
        if self._is_large:
            self._write()
        busy = [name for name, demand in self.demands.items() if demand.requests]
        details = {
            "settings": self.own,
            "pools": busy,
            "tokens": sum(demand.total for demand in self.demands.values()),
            "forecast": {"finish_s": v.forecast_finish_s, "by": v.forecast_by, "bound": v.forecast_bound},
        }
        models = sorted({model for demand in self.demands.values() for model in demand.models})
        if len(models) <= MODELS_MOST:
            details["models"] = models
        with store.database.writing() as c:
            if not store.holds(c, self._replica) or (self._number and not self._is_ours(c)):
                raise JournalError("this replica's lease was lost while a batch came in", retryable=True)
            number = self._number
            if number:
                values = {"state": QUEUED, "requests": self.count, "details": to_json(details)}
                store.change_batch(c, number, **values)
            else:
                number = store.add_batch(c, self._values(QUEUED, self._batch_id, details))
            self._worker.ledger.write(c, number, self._buffer)
            row = store.numbered(c, number)
            if key is not None:
                store.keep(c, key, 202, to_json(answer(row)))
        self._buffer = []
        return row

    # ------------------------------------------------------------ in the event loop

    async def judge(self) -> PoolVerdict:
        """Return whether the batch may start now; each pool has its own budget and counts its own runs alone."""
        if not self._worker.ready:
            text = f"the service takes no batches right now: {self._worker.trouble}"
            raise ApiError(503, NOT_READY, text, {"retryable": True}, {"Retry-After": "2"})
        found: list[PoolVerdict] = []
        for pool in self.pools:
            demand = self.demands[pool.name]
            if not demand.requests and len(self.pools) > 1 and self.count:
                continue
            if self.spec.via != "live":
                judged = await asyncio.to_thread(self._judged_batch, pool, demand)
            else:
                judged = await self._judged(pool, demand)
            if not judged.verdict.ok:
                return judged
            found.append(judged)
        return max(found, key=lambda each: each.verdict.forecast_finish_s or math.inf)

    async def _judged(self, pool: Pool, demand: Demand) -> PoolVerdict:
        lane = self._worker.lanes.get(pool.name)
        booked = lane.booked() if lane is not None else InUse()
        service_s = (lane.meter.service_s if lane is not None else 0.0) or demand.assumed_service_s()
        deadline_s, load = self.spec.deadline_s, demand.load()
        verdict = preflight(pool.policy, load, booked=booked, service_s=service_s)
        if not verdict.ok:
            return PoolVerdict(pool.name, verdict)
        simulate = self._worker.config.forecast
        alone_s = None
        worker = self._worker
        if simulate is not None and load.count and worker.forecasts < FORECASTS_MOST:
            outlook = Outlook(pool=pool, demand=demand, finalize=self.spec.finalize)
            worker.forecasts += 1
            try:
                # One at a time: in parallel they would not finish sooner.
                async with worker.simulating:
                    alone_s = await anyio.to_thread.run_sync(simulate, outlook)
            finally:
                worker.forecasts -= 1
        fluid_s = fluid_forecast(pool.policy, load, service_s=service_s).finish_s
        finish_s = fluid_s if alone_s is None else alone_s
        # Running and booked work comes on top, as a fluid: more cannot be known of it.
        ahead, tokens = self._worker.ahead_of(load.count, float(load.total), pool.name)
        if lane is not None and not lane.blocked and not lane.governor.s.paused:
            lane.assumed_s = lane.assumed_s or service_s
            finish_s += max(0.0, min(1e9, lane.eta_s(ahead, tokens)) - fluid_s)
        verdict = preflight(
            pool.policy, load, booked=booked, deadline_s=deadline_s, forecast=lambda: finish_s, service_s=service_s
        )
        if alone_s is None:
            verdict = replace(verdict, forecast_by="fluid")
        return PoolVerdict(pool.name, verdict)

    def _judged_batch(self, pool: Pool, demand: Demand) -> PoolVerdict:
        """In a thread: return the verdict on work for the Batch API, which has a queue instead of a minute's budget."""
        ahead = foreseen_of(demand, pool, self._worker.store.ended_waves(pool.name))
        is_mixed = self.spec.via == "auto"
        limit_s = self.spec.deadline_s
        reason = ""
        if not is_mixed and demand.requests and limit_s is not None and ahead.finish_s > limit_s:
            reason = (
                f"the forecast finish by the Batch API is {ahead.text()} from now, the deadline is "
                f"{duration(limit_s)}: allow more time, or send it with via=live"
            )
        usable = usable_tokens(pool.policy.batch_queue_tokens)
        verdict = Verdict(
            ok=not reason,
            code=FailureCode.BATCH_RATE_LIMITED.value if reason else "",
            reason=reason,
            projected_tokens=sum(int(prompt) for prompt, *_ in demand.billed.values()),
            budget_tokens=int(usable) if usable < math.inf else 0,
            in_use_tokens=0,
            suggested_wait_s=None,
            retryable=not reason,
            max_runs_now=0 if reason else demand.requests,
            forecast_finish_s=self._finish_s if is_mixed else ahead.finish_s,
            forecast_by="turnaround",
            forecast_bound="batch_queue" if ahead.waves > len(demand.models) else "turnaround",
        )
        return PoolVerdict(pool.name, verdict)

    async def accept(
        self, judged: PoolVerdict, key: Key | None, answer: Callable[[BatchRow], dict[str, Any]]
    ) -> BatchRow:
        """Make the batch durable and begin it. Raise `KeyTakenError` if the same was accepted a moment ago."""
        # Shielded: a client that goes away now does not leave it half done.
        return await asyncio.shield(self._accept(judged, key, answer))

    async def _accept(
        self, judged: PoolVerdict, key: Key | None, answer: Callable[[BatchRow], dict[str, Any]]
    ) -> BatchRow:
        row = await asyncio.to_thread(self._accepted, judged, key, answer)
        await self._worker.adopt(row)
        return row
