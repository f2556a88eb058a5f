"""Decides what a pool does next at the Batch API: events come in, instructions go out. No clock, no I/O, no chance.

Theory of operation. Requests wait in a lane per model and endpoint. A wave is one input file and the batch made of it:
planned, uploaded, submitted, ended, collected, closed. Each step has one instruction, which the shell carries out,
records and then reports; a step that fails is due again after a backoff. If it is unknown whether an upload or a
creation has reached the provider (a time-out, a killed process), the wave is looked up there first, so nothing is
submitted twice.

The ledger holds, per model, the input tokens of its waves from their creation to their end, and plans a wave only into
what is left of the queue. Tokens are estimates, so the ledger corrects itself: ended batches state what they really
used, and a batch that the queue refused (`token_limit_exceeded`) states the limit, halves the part of the queue that is
used until one is accepted, and waits; its requests go back to their lane and are not counted as tried.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from governor import law
from governor.batchapi.limits import (
    CANCELLING,
    EMBEDDING_INPUTS,
    FILE_BYTES,
    FILE_LINES,
    FINALIZING,
    usable_tokens,
)
from governor.model.policy import Policy

# A poll comes late by at most this share of the batch's age.
_POLL_SHARE, _POLL_MIN_S, _POLL_MAX_S = 0.05, 5.0, 300.0
# A wave into a part of the queue waits until so much of it is free, lest a long tail of tiny files is submitted.
_ROOM_SHARE_LEAST = 0.25
# The part of the queue that is used after refusals, at the least.
_SHARE_LEAST = 1.0 / 64.0
# Waits while the queue is full of something else than our waves, and between calls that fail.
_QUEUE = Policy(backoff_base_seconds=15.0, backoff_cap_seconds=600.0).params()
_CALLS = Policy(backoff_base_seconds=2.0, backoff_cap_seconds=60.0).params()
# A creation whose answer was lost may take effect late: it is looked up again after this time before it is repeated.
_LATE_S = 60.0
# A request that the queue has refused so often with nothing else of ours in it, over more than an hour, fits into none.
ALONE_MOST = 12
_NEVER = math.inf


class WaveStage(StrEnum):
    """How far a wave has come, as far as it is on record."""

    PLANNED = "planned"
    UPLOADED = "uploaded"
    SUBMITTED = "submitted"
    ENDED = "ended"
    COLLECTED = "collected"
    CLOSED = "closed"


class Act(StrEnum):
    """What the shell is asked to do with a wave."""

    LOOK_UP = "look up"
    UPLOAD = "upload"
    CREATE = "create"
    POLL = "poll"
    CANCEL = "cancel"
    COLLECT = "collect"
    CLEAN = "clean"


class WaveLane(NamedTuple):
    """The requests that can share a file: of one model, to one endpoint."""

    model: str
    url: str


class PlanWave(NamedTuple):
    """Form the next wave of a lane, in the order of its requests.

    `tokens`: estimated input tokens that fit now. `tokens_ever`: that could ever fit; a request above it cannot run.
    `is_alone`: nothing of this model is in the queue, so the first request goes even if it is above `tokens`.
    """

    lane: WaveLane
    tokens: float
    tokens_ever: float
    is_alone: bool
    lines: int
    bytes: int
    inputs: int


class WaveStep(NamedTuple):
    """Carry out the next step of a wave."""

    act: Act
    wave: Wave


Instruction = PlanWave | WaveStep


@dataclass(slots=True, eq=False)
class Wave:
    """One input file and its batch. `tokens`: estimated input tokens. Times: seconds since the run began.

    `is_certain`: it is known that the next upload or creation has not happened. `status`, `total`, `completed` and
    `failed` are the provider's. `calls_failed`: calls in a row that failed. `look_ups`: times that a step in doubt was
    not found. `due_at`: when its next step is due.
    """

    number: int
    lane: WaveLane
    requests: int
    tokens: float
    stage: WaveStage = WaveStage.PLANNED
    is_certain: bool = True
    status: str = ""
    total: int = 0
    completed: int = 0
    failed: int = 0
    submitted_at: float = 0.0
    is_cancelled: bool = False
    calls_failed: int = 0
    look_ups: int = 0
    due_at: float = -_NEVER

    @property
    def is_enqueued(self) -> bool:
        """Return whether its tokens may be in the provider's queue: from its creation, sure or not, to its end."""
        return self.stage is WaveStage.SUBMITTED or (self.stage is WaveStage.UPLOADED and not self.is_certain)


@dataclass(slots=True)
class QueueLedger:
    """The queue of one model. `limit`: of enqueued input tokens, 0 = unknown.

    `factor`: real tokens per estimated one, as measured. `share`: the part of the queue that is used. `refusals`: in a
    row; `alone`: of them, the latest that met a single request with nothing else of ours in the queue. `closed_until`:
    no wave is planned before.
    """

    limit: int
    factor: float = 1.0
    share: float = 1.0
    refusals: int = 0
    alone: int = 0
    closed_until: float = -_NEVER
    real: float = 0.0
    estimated: float = 0.0

    @property
    def usable(self) -> float:
        """Return the estimated tokens that may be in the queue together; inf = no limit is known."""
        return usable_tokens(self.limit) / self.factor

    def accepted(self) -> None:
        """Note that the queue has taken a wave."""
        self.refusals = self.alone = 0
        self.share = min(1.0, 1.5 * self.share)

    def refused(self, limit: int, now: float) -> None:
        """Note that the queue was full. `limit`: as the refusal states it, 0 = it does not."""
        self.limit = limit or self.limit
        self.refusals += 1
        self.share = max(_SHARE_LEAST, self.share / 2.0)
        self.closed_until = now + law.backoff_s(_QUEUE, self.refusals)

    def measured(self, estimated: float, real: int) -> None:
        """Correct the estimates by what a batch, all of whose requests were answered, has really used."""
        self.real += real
        self.estimated += estimated
        self.factor = max(self.real / self.estimated, real / estimated)


@dataclass(slots=True)
class _Backlog:
    """The requests of a lane that are in no wave. `later`: those that back off, as (until, requests, tokens)."""

    requests: int = 0
    tokens: float = 0.0
    least: float = 0.0  # tokens of the head, once it did not fit
    later: list[tuple[float, int, float]] = field(default_factory=list)


class Waves:
    """The state of one pool at the Batch API. `queue_tokens`: limit of enqueued input tokens per model, 0 = unknown.

    `halted`: why no further wave is submitted, "" = they are; `is_paused`: none is for now. Waves under way go on.
    `is_fed`: a planner may offer more. `open`: by number. `others`: the tokens of a model that others have in the same
    queue, as far as is known.
    """

    def __init__(self, queue_tokens: int = 0) -> None:
        self.queue_tokens = queue_tokens
        self.halted = ""
        self.is_paused = False
        self.is_fed = False
        self.open: dict[int, Wave] = {}
        self.ledgers: dict[str, QueueLedger] = {}
        self.others: Callable[[str], float] = lambda model: 0.0
        self._backlogs: dict[WaveLane, _Backlog] = {}

    # ------------------------------------------------------------ figures

    def ledger(self, model: str) -> QueueLedger:
        """Return the queue of a model."""
        return self.ledgers.setdefault(model, QueueLedger(self.queue_tokens))

    def enqueued(self, model: str) -> float:
        """Return the input tokens of a model that are in the queue, as estimated and corrected."""
        found = sum(wave.tokens for wave in self.open.values() if wave.lane.model == model and wave.is_enqueued)
        return found * self.ledger(model).factor

    def waiting(self) -> list[tuple[WaveLane, int, float]]:
        """Return requests and estimated tokens that are in no wave, by lane, those that back off included."""
        return [
            (lane, b.requests + sum(n for _, n, _ in b.later), b.tokens + sum(tokens for *_, tokens in b.later))
            for lane, b in self._backlogs.items()
        ]

    @property
    def is_over(self) -> bool:
        """Return whether nothing is left to do: no wave is open, and nothing waits or nothing may be submitted."""
        if self.open or self.halted:
            return not self.open
        return not self.is_fed and not any(requests for _, requests, _ in self.waiting())

    def limited(self, queue_tokens: int) -> None:
        """Adopt another limit of the queues, 0 = unknown."""
        self.queue_tokens = queue_tokens
        for ledger in self.ledgers.values():
            ledger.limit = queue_tokens or ledger.limit

    # ------------------------------------------------------------ requests

    def _backlog(self, lane: WaveLane) -> _Backlog:
        return self._backlogs.setdefault(lane, _Backlog())

    def offered(self, lane: WaveLane, requests: int, tokens: float, eligible_at: float = -_NEVER) -> None:
        """Add requests to a lane, to be submitted at `eligible_at` or later."""
        backlog = self._backlog(lane)
        if requests:
            heapq.heappush(backlog.later, (eligible_at, requests, tokens))

    def replanned(self, placed: Iterable[tuple[WaveLane, float]]) -> None:
        """Submit these requests, given by lane and tokens, and no others that are in no wave."""
        self._backlogs.clear()
        for lane, tokens in placed:
            backlog = self._backlog(lane)
            backlog.requests += 1
            backlog.tokens += tokens

    def withdrawn(self, lane: WaveLane, requests: int, tokens: float) -> None:
        """Take requests that are in no wave out of a lane: they go another way."""
        backlog = self._backlog(lane)
        backlog.requests = max(0, backlog.requests - requests)
        backlog.tokens = max(0.0, backlog.tokens - tokens) if backlog.requests else 0.0

    def cancel(self, wave: Wave) -> None:
        """Have a wave cancelled; the requests that have not been answered by then come back."""
        wave.is_cancelled = True
        wave.due_at = -_NEVER

    # ------------------------------------------------------------ decisions

    def decide(self, now: float) -> list[Instruction]:
        """Return what is due. Carry all of it out, and report each, before asking again."""
        due: list[Instruction] = [WaveStep(_act(wave), wave) for wave in self.open.values() if wave.due_at <= now]
        planned: set[str] = set()
        for lane, backlog in self._backlogs.items():
            while backlog.later and backlog.later[0][0] <= now:
                _, requests, tokens = heapq.heappop(backlog.later)
                backlog.requests += requests
                backlog.tokens += tokens
            may = not self.halted and not self.is_paused and lane.model not in planned
            if may and (plan := self._plan(lane, backlog, now)) is not None:
                planned.add(lane.model)
                due.append(plan)
        return due

    def _plan(self, lane: WaveLane, backlog: _Backlog, now: float) -> PlanWave | None:
        """Return the next wave of a lane if there is room for one."""
        ledger = self.ledger(lane.model)
        if now >= ledger.closed_until:
            ledger.closed_until = -_NEVER
        if not backlog.requests or now < ledger.closed_until:
            return None
        waves = [wave for wave in self.open.values() if wave.lane.model == lane.model]
        held = sum(wave.tokens for wave in waves if wave.stage not in (WaveStage.ENDED, WaveStage.COLLECTED))
        others = self.others(lane.model)
        if not held and not others:
            return PlanWave(lane, ledger.usable * ledger.share, ledger.usable, True, *_file_limits())
        room = ledger.usable * ledger.share - held - others
        wanted = max(backlog.least, min(backlog.tokens, _ROOM_SHARE_LEAST * ledger.usable * ledger.share))
        if room <= 0.0 or room < wanted:
            return None
        return PlanWave(lane, room, ledger.usable, False, *_file_limits())

    @property
    def wake_at(self) -> float:
        """Return when `decide` may have something new to say; inf = not before an event."""
        times = [wave.due_at for wave in self.open.values()]
        for lane, backlog in self._backlogs.items():
            if self.halted or self.is_paused:
                break
            if backlog.later:
                times.append(backlog.later[0][0])
            if backlog.requests and self.ledger(lane.model).closed_until > -_NEVER:
                times.append(self.ledger(lane.model).closed_until)
        return min(times, default=_NEVER)

    # ------------------------------------------------------------ events

    def planned(self, lane: WaveLane, number: int, requests: int, tokens: float) -> Wave:
        """A wave was formed and recorded, under a number of its own."""
        self.withdrawn(lane, requests, tokens)
        self._backlog(lane).least = 0.0
        self.open[number] = wave = Wave(number, lane, requests, tokens)
        return wave

    def not_planned(self, lane: WaveLane, least: float) -> None:
        """No wave was formed: the first request has `least` tokens, which do not fit; 0 = there is no request."""
        backlog = self._backlog(lane)
        backlog.least = least
        if not least:
            backlog.requests, backlog.tokens = 0, 0.0

    def resumed(self, wave: Wave) -> None:
        """A wave is known from the journal: whether its next step happened after the last record is not certain."""
        wave.is_certain = False
        self.open[wave.number] = wave

    def looked_up(self, wave: Wave, now: float) -> None:
        """The provider knows nothing of the step in doubt; of a creation, a second look some time later decides."""
        self._went_well(wave)
        wave.look_ups += 1
        if wave.stage is WaveStage.UPLOADED and wave.look_ups == 1:
            wave.due_at = now + _LATE_S
            return
        wave.is_certain, wave.look_ups = True, 0

    def uploaded(self, wave: Wave) -> None:
        """The provider has the wave's file, and no batch of it was created yet, as far as is known."""
        self._went_well(wave)
        wave.stage = WaveStage.UPLOADED

    def created(self, wave: Wave, now: float) -> None:
        """The provider has the wave's batch."""
        self._went_well(wave)
        wave.stage, wave.is_certain = WaveStage.SUBMITTED, True
        wave.submitted_at = now
        wave.due_at = now + _POLL_MIN_S

    def polled(self, wave: Wave, status: str, total: int, completed: int, failed: int, now: float) -> None:
        """The batch is under way in that state."""
        self._went_well(wave)
        if total and not wave.total:
            self.ledger(wave.lane.model).accepted()
        wave.status, wave.total, wave.completed, wave.failed = status, total, completed, failed
        age_s = now - wave.submitted_at
        wave.due_at = now + min(max(_POLL_SHARE * age_s, _POLL_MIN_S), _POLL_MAX_S)

    def ended(self, wave: Wave, status: str, total: int, completed: int, failed: int, real_tokens: int) -> None:
        """The batch has ended, and holds no tokens of the queue any more. `real_tokens`: of its input, 0 = unknown."""
        self._went_well(wave)
        ledger = self.ledger(wave.lane.model)
        if total and not wave.total:
            ledger.accepted()
        wave.stage, wave.status = WaveStage.ENDED, status
        wave.total, wave.completed, wave.failed = total, completed, failed
        # Of a batch with unanswered lines the tokens are those of a part.
        if real_tokens > 0 and completed == wave.requests and wave.tokens > 0.0:
            ledger.measured(wave.tokens, real_tokens)

    def collected(self, wave: Wave) -> None:
        """All that the batch has answered is on record, and its other requests have come back."""
        self._went_well(wave)
        wave.stage = WaveStage.COLLECTED

    def queue_refused(self, wave: Wave, limit: int, now: float) -> bool:
        """The batch failed because the queue was full; return whether its only request fits into no queue."""
        ledger, model = self.ledger(wave.lane.model), wave.lane.model
        others = any(each.lane.model == model and each.is_enqueued for each in self.open.values() if each is not wave)
        ledger.refused(limit, now)
        ledger.alone = ledger.alone + 1 if wave.requests == 1 and not others else 0
        self.collected(wave)
        if ledger.alone < ALONE_MOST:
            return False
        ledger.alone = 0
        return True

    def closed(self, wave: Wave) -> None:
        """Nothing of the wave is left at the provider that is not to stay there."""
        wave.stage = WaveStage.CLOSED
        self.open.pop(wave.number, None)

    def call_failed(self, wave: Wave, retry_after_s: float, now: float, *, may_have_happened: bool) -> None:
        """A call failed that may succeed later. `retry_after_s`: as stated, -1 = it was not."""
        wave.calls_failed += 1
        wave.due_at = now + max(retry_after_s, retry_wait_s(wave.calls_failed))
        if may_have_happened and wave.stage in (WaveStage.PLANNED, WaveStage.UPLOADED):
            wave.is_certain, wave.look_ups = False, 0

    @staticmethod
    def _went_well(wave: Wave) -> None:
        wave.calls_failed = 0
        wave.due_at = -_NEVER


def retry_wait_s(failures: int) -> float:
    """Return how long to wait after so many calls in a row that failed."""
    return law.backoff_s(_CALLS, failures)


def _file_limits() -> tuple[int, int, int]:
    return FILE_LINES, FILE_BYTES, EMBEDDING_INPUTS


def _act(wave: Wave) -> Act:
    """Return the next step of a wave."""
    if wave.stage in (WaveStage.PLANNED, WaveStage.UPLOADED):
        if not wave.is_certain:
            return Act.LOOK_UP
        if wave.is_cancelled:
            return Act.CANCEL
        return Act.UPLOAD if wave.stage is WaveStage.PLANNED else Act.CREATE
    if wave.stage is WaveStage.SUBMITTED:
        return Act.CANCEL if wave.is_cancelled and wave.status not in (CANCELLING, FINALIZING) else Act.POLL
    return Act.COLLECT if wave.stage is WaveStage.ENDED else Act.CLEAN
