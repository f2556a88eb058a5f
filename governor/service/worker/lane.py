"""One pool of this replica: one governor for all of its batches, and its observers.

A governor that stopped because the account was refused leaves its batches where they stand: `blocked` says why, until
one of them is resumed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from governor.forecast.preflight import InUse, Load, fluid_forecast, in_use
from governor.journal.recorder import Recorder
from governor.law import FINALIZE, TPM, Params, limit_found, used_in
from governor.model.keyed import attempt_key
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.prices import Spending
from governor.model.requests import CAUSES, Answer, Attempt, Request
from governor.model.words import duration, moment_text
from governor.model.work import THROTTLES, Job, Observer, Sender
from governor.provider.openai_adapter import capped
from governor.provider.sending import PoolSender
from governor.run.longwaits import LongWaits
from governor.run.pool_run import RunOptions, governor_of
from governor.scheduler.driver import Governor
from governor.service.store.tables import BATCH_BITS
from governor.service.worker.feed import Feed
from governor.telemetry.metrics import Metrics
from governor.telemetry.watch import Alarms, Meter, Together, waiting_for

# The series: so many buckets of so many seconds.
BUCKET_S, BUCKETS = 5.0, 180
# A wait of which an operator needs to know.
LONG_HOLD_S = 60.0

log = logging.getLogger("paceline.service")


@dataclass(slots=True)
class Bucket:
    """Some seconds of a pool's life. `at`: their beginning, seconds since 1970."""

    at: float
    launches: int = 0
    throttled: int = 0
    answers: int = 0
    failed: int = 0
    tokens: float = 0.0

    def to_json_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.__slots__}


class Series(Observer):
    """Launches, 429s and results of the last quarter of an hour, in constant memory."""

    def __init__(self) -> None:
        self.buckets: deque[Bucket] = deque(maxlen=BUCKETS)

    def now(self) -> Bucket:
        """Return the bucket of this moment."""
        at = time.time() // BUCKET_S * BUCKET_S
        if not self.buckets or self.buckets[-1].at < at:
            self.buckets.append(Bucket(at))
        return self.buckets[-1]

    def launched(self, job: Job, now: float) -> None:
        bucket = self.now()
        bucket.launches += 1
        bucket.tokens += job.reserve

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        self.now().throttled += attempt.outcome in THROTTLES

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        bucket = self.now()
        bucket.answers += not failure
        bucket.failed += bool(failure)


class BatchReports(Observer):
    """Reports to the worker, by batch. It calls `launched`, `attempted` and `ended` with a batch's number."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def launched(self, job: Job, now: float) -> None:
        self._worker.present().on_launched(job.index >> BATCH_BITS, job.index)

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        self._worker.present().on_attempted(attempt.request >> BATCH_BITS, attempt)

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        self._worker.present().on_ended(request.index >> BATCH_BITS, failure, request, answer)


class LaneSender(PoolSender):
    """Sends for many batches. `cap_of`: the output cap of a finalize pass, by the batch's number."""

    def __init__(
        self,
        pool: Pool,
        environment: Mapping[str, str],
        cap_of: Callable[[int], int],
        lease_held: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(pool, environment)
        self._cap_of = cap_of
        self._lease_held = lease_held

    async def __call__(self, job: Job, timeout_s: float) -> Answer:
        """Send one attempt; nothing is sent any more once the lease may be another replica's."""
        await self._lease_held()
        assert job.work is not None
        request = job.work.request
        cap = self._cap_of(request.index >> BATCH_BITS)
        overrides = capped(request, cap) if job.lane == FINALIZE else None
        key = attempt_key(job.lane, job.tries)
        return await self._adapter.send(request, attempt=key, body_overrides=overrides, timeout_s=timeout_s)


@dataclass(slots=True, kw_only=True)
class Lane:
    """One pool's lane; see the module. Created inside the event loop by `lane_of`."""

    pool: Pool
    policy: Policy
    governor: Governor
    recorder: Recorder
    meter: Meter
    alarms: Alarms
    waits: LongWaits
    series: Series
    feed: Feed
    send: Sender
    time_scale: float = 1.0
    assumed_s: float = 0.0
    blocked: str = ""
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    # Requests and tokens that the pool will have launched by the end of a new batch of that size, with it.
    ahead_of: Callable[[int, float], tuple[int, float]] = lambda requests, tokens: (requests, tokens)

    @property
    def name(self) -> str:
        return self.pool.name

    @property
    def notes(self) -> list[str]:
        """Return notes for an operator on this pool: why it launches nothing, and until when."""
        found = [self.trouble] if self.trouble else []
        s, now = self.governor.s, self.governor.now()
        if s.probe_at > -inf:
            waited = duration(now - s.outage_from)
            found.append(f"no answer for {waited}: waits for the provider, next probe in {duration(s.probe_at - now)}")
        hold_s = s.hold_until - now
        if hold_s > LONG_HOLD_S:
            until = moment_text(time.time() + hold_s / self.time_scale)
            found.append(f"a 429 asked for a wait: nothing is launched for {duration(hold_s)}, until {until}")
        first_s, _ = self.governor.backing_off()
        wait_s = first_s - self.governor.now()
        if LONG_HOLD_S < wait_s < inf and hold_s <= LONG_HOLD_S:
            found.append(f"requests wait for {duration(wait_s)} and longer, as the provider asked; others go on")
        return found

    @property
    def trouble(self) -> str:
        """Return why nothing at all is launched, "" = launching goes on."""
        # Only a governor whose quota is shared has it.
        if not getattr(self.governor, "is_connected", True):
            return "the Redis of PACELINE_REDIS_URL cannot be used right now: nothing is launched"
        return self.blocked

    async def live(self, on_blocked: Callable[[str, str], None]) -> None:
        """Run the feed's work for ever; call `on_blocked(pool, why)` when the governor has stopped."""
        while True:
            await self.feed.filled.wait()
            why = await self.governor.run(self.feed, self.send, finalize=True)
            if not why:
                continue
            self.blocked = why
            self.opened.clear()
            on_blocked(self.name, why)
            await self.opened.wait()
            self.governor.reopen()

    def open(self) -> None:
        """Launch again after the governor had stopped."""
        self.blocked = ""
        self.opened.set()

    def change(self, policy: Policy) -> None:
        """Adopt other settings; they are recorded with the time."""
        self.policy = policy
        self.meter.policy = policy
        self.waits.policy = policy
        self.alarms.repriced(policy)
        self.governor.reprice(policy.params())
        self.recorder.policy_changed(policy, self.governor.now())

    # ------------------------------------------------------------ figures

    def booked(self) -> InUse:
        """Return this minute's tokens that running work holds."""
        return in_use(self.governor.p, self.governor.s, self.governor.now())

    @property
    def service_s(self) -> float:
        """Return the mean time of an answer, measured or assumed."""
        return self.meter.service_s or self.assumed_s

    def eta_s(self, requests: int, tokens: float) -> float:
        """Return seconds until so many more requests, besides those in flight, have ended, by the law.

        Return inf while nothing is launched.
        """
        governor = self.governor
        if governor.s.paused or self.blocked:
            return float("inf")
        if requests <= 0:
            return 0.0
        now = governor.now()
        load = Load.even(requests, tokens, self.meter.prompt_ratio)
        found = fluid_forecast(self.policy, load, booked=self.booked(), service_s=self.service_s)
        return max(0.0, governor.s.hold_until - now, governor.s.next_slot_at - now) + found.finish_s

    def to_json_dict(self, *, series: bool) -> dict[str, Any]:
        """Return the pool's present state for a page."""
        governor, tally, spent = self.governor, self.meter.tally, self.meter.spent
        now = governor.now()
        p: Params = governor.p
        wake_s = governor.wake_at - now
        found = {
            "pool": self.name,
            "in_flight": governor.in_flight,
            "max_concurrency": p.max_concurrency,
            "tokens_in_use": used_in(p, governor.s, TPM, now),
            "tokens_budget": p.budget[TPM] * (governor.s.scale[TPM] if p.sought[TPM] else 1.0),
            "tokens_limit": limit_found(p, governor.s, TPM),
            "tokens_last_minute": self.meter.tokens_per_minute(now),
            "window": self.policy.tpm_window,
            "waiting_for": waiting_for(governor.cause),
            "next_launch_s": max(0.0, wake_s) if wake_s < 1e9 else None,
            "attempts": tally.attempts,
            "throttled": tally.throttled,
            "deferrals": {cause: tally.deferrals[i] for i, cause in enumerate(CAUSES) if 0 < i < len(tally.deferrals)},
            "answer_s": self.service_s,
            "cost_usd": spent.cost_usd,
            # What is at the Batch API and not yet answered, at its most; null = a model there has no price.
            "committed_usd": held if (held := sum(spent.committed.values())) < inf else None,
            "blocked": self.trouble,
        }
        if series:
            self.series.now()
            found["series"] = [bucket.to_json_dict() for bucket in self.series.buckets]
            found["series_s"] = BUCKET_S
        return found


def lane_of(
    pool: Pool,
    policy: Policy,
    recorder: Recorder,
    *,
    seed: int,
    start_s: float,
    metrics: Metrics,
    worker: Any,
    send: Sender,
) -> Lane:
    """Return a pool ready to run, inside the event loop. `worker` receives each event by batch."""
    spent = Spending(worker.config.prices, worker.config.today())
    meter = Meter(pool, spent, left=0, left_tokens=0.0)
    alarms = Alarms(pool, log.warning)
    series = Series()
    waits = LongWaits(pool, log.warning)
    waits.moment = lambda at_s: time.time() + (at_s - governor.now()) / worker.config.time_scale
    # The recorder first: nothing is reported before it is recorded.
    observers: list[Observer] = [
        recorder,
        meter,
        alarms,
        waits,
        series,
        metrics.observer(pool.name),
        BatchReports(worker),
    ]
    governor = governor_of(
        replace(pool, policy=policy),
        RunOptions(redis=worker.config.redis, time_scale=worker.config.time_scale),
        log.warning,
        seed=seed,
        observer=Together(observers),
        state=recorder.state,
        start_s=start_s,
    )
    metrics.watch(pool.name, governor)
    lane = Lane(
        pool=pool,
        policy=policy,
        governor=governor,
        recorder=recorder,
        meter=meter,
        alarms=alarms,
        waits=waits,
        series=series,
        feed=Feed(governor.more, worker.on_failure),
        send=send,
        time_scale=worker.config.time_scale,
        ahead_of=lambda requests, tokens: worker.ahead_of(requests, tokens, pool.name),
    )
    meter.policy = policy
    return lane
