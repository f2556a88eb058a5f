"""The values that the scheduler works on and the protocols through which it sends and reports.

`Work` is a request with its reservations, `Job` is that request (or a permit) on its way, `Observer` is told of events
and `Send` sends attempts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from governor import law
from governor.law import Params, State
from governor.model.errors import FailureCode
from governor.model.estimate import LEARNED, Sizes, charge_of
from governor.model.needs import TOKENS, Scheduled, Weights
from governor.model.policy import Policy
from governor.model.requests import LANES, Answer, Attempt, Outcome, Request

# The failure code of a request whose last attempt failed with that outcome.
SPENT = {
    Outcome.THROTTLED: FailureCode.RATE_LIMIT_EXHAUSTED,
    Outcome.SLOW_DOWN: FailureCode.RATE_LIMIT_EXHAUSTED,
    Outcome.OVERLOADED: FailureCode.SERVER_ERROR,
    Outcome.SERVER_ERROR: FailureCode.SERVER_ERROR,
    Outcome.MALFORMED: FailureCode.UNREADABLE_ANSWER,
    Outcome.TIMEOUT: FailureCode.TIMEOUT,
    Outcome.DROPPED: FailureCode.CONNECTION_DROPPED,
    Outcome.TOO_LARGE: FailureCode.REQUEST_TOO_LARGE,
    Outcome.BAD_REQUEST: FailureCode.BAD_REQUEST,
}
THROTTLES = (Outcome.THROTTLED, Outcome.SLOW_DOWN)
FINAL = (Outcome.TOO_LARGE, Outcome.BAD_REQUEST, Outcome.MALFORMED)
# The account, not the request, is at fault: nothing more is sent, and unanswered requests stay pending.
STOPPING = {Outcome.QUOTA: FailureCode.INSUFFICIENT_QUOTA, Outcome.UNAUTHORIZED: FailureCode.UNAUTHORIZED}
# Rejected before processing, so not charged. A bad request is not among them: recorded 400s cost tokens
# (docs/explanation/provider.md#charge).
TURNED_AWAY = (*THROTTLES, *STOPPING, Outcome.TOO_LARGE, Outcome.LOCAL)
TIMED_OUT = Answer(Outcome.TIMEOUT, message="no answer within the request's time-out or deadline")


# A moment of a run and the reading of its clock of causes at that moment: a request's waiting counts from here.
Begun = tuple[float, list[float]]


@dataclass(frozen=True, slots=True)
class Work:
    """One request to run: its reservations for the request and its finalize pass, and its declared cap (-1 = none).

    `charge`, `finalize_charge`: the provider's presumed charge, for the records; -1 = unknown. `finalizes`: whether a
    run with finalize passes may open one for it. `begun`: the moment from which it waits, if not since the run began.

    The other fields are the history of a request that an earlier leg has launched: `lane` and `attempt` are the next to
    launch, `first_launched_s` is when it was first launched (-1 = never), `retry_at_s` the moment at which its backoff
    ends. `outages`: how many outages have spared it an attempt. `roams`: it comes from another quota of its model, and
    takes its turn with the new work.
    """

    request: Request
    reserve: float
    expected: float = -1.0
    finalize_reserve: float = 0.0
    charge: int = -1
    finalize_charge: int = -1
    finalizes: bool = True
    begun: Begun | None = None
    lane: int = law.MAIN
    attempt: int = 1
    first_launched_s: float = -1.0
    retry_at_s: float = -1.0
    outages: int = 0
    roams: bool = False


class PoolState(Protocol):
    """The part of the governor that its observer may read.

    `p`, `s`: settings and state of the law. `late_s`: how late the timer behind the present launch was, -1 = no timer
    was involved. `stopped`: why nothing more is launched, "" = launching goes on.
    """

    late_s: float

    @property
    def p(self) -> Params: ...

    @property
    def s(self) -> State: ...

    @property
    def stopped(self) -> str: ...

    def now(self) -> float:
        """Return seconds since the run began."""


# The methods of `Observer`, but for `flushed`, which is awaited.
EVENTS = ("began", "launched", "attempted", "suspended", "backed_off", "ended", "deferred", "decided")


class Observer:
    """Receives every event of a run, in order. Methods are quick and synchronous; an exception from one ends the run.

    Each may call the governor's `stop`, `pause`, `resume` and `reprice`. Methods that a subclass does not define cost
    nothing; a subclass that defines `backed_off` or `suspended` must define `attempted` too.
    """

    def hears(self, event: str) -> bool:
        """Return whether the method of that name does anything."""
        return getattr(getattr(self, event), "__func__", None) is not getattr(Observer, event)

    def began(self, governor: PoolState) -> None:
        """Receive, first of all, the governor whose reports follow."""

    def launched(self, job: Job, now: float) -> None:
        """An attempt is about to be sent."""

    async def flushed(self) -> None:
        """Return once every event reported so far is durable; awaited before each send."""

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        """An attempt is over; `failure` is the request's failure code if the request is lost with it."""

    def suspended(self, attempt: Attempt, answer: Answer) -> None:
        """The attempt just reported does not count: its request is pending until it is launched again.

        Or until `ended` comes: it was refused, and perhaps every request is.
        """

    def backed_off(self, attempt: Attempt, answer: Answer, retry_at_s: float, next_attempt: int) -> None:
        """The request survives that attempt and may be launched again at `retry_at_s`; follows `attempted`.

        `next_attempt`: the number of the next attempt, unchanged if this attempt did not count.
        """

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        """A request is over: answered (""), or lost with that code. `answer`: its last answer, None if unsent since."""

    def deferred(self, cause: int) -> None:
        """A job at the head has to wait for this cause of the law; counted once per job, attempt and cause."""

    def decided(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        """The law's function `name`, called with these arguments after `p` and `s`, returned `result`.

        `repriced` also stands for the change of settings: its arguments are the new settings and the time.
        """


class Send(Protocol):
    """Sends one attempt and returns its answer. Raises nothing: a provider's fault is an answer too."""

    def __call__(self, job: Job, timeout_s: float) -> Awaitable[Answer]:
        """Send the job's attempt; after `timeout_s` the call is cancelled and counts as a time-out."""


class Job(Scheduled):
    """A request of a batch on its way, or a permit that a program waits for (without `work`).

    `request`: the work's, or the program's own description; None = no observer is told of it.
    """

    __slots__ = ("answer", "charge", "expired", "granted", "request", "waits_s", "work")
    # Set when an attempt is launched: the wait before it, by cause.
    waits_s: list[float]

    def __init__(
        self,
        work: Work | None,
        index: int,
        reserve: float,
        expected: float,
        charge: int,
        submitted_s: float,
        request: Request | None = None,
        weights: Weights = TOKENS,
    ) -> None:
        told = request if work is None else work.request
        prompt = 0.0 if told is None else float(told.sizes.prompt_tokens)
        Scheduled.__init__(self, index, reserve, expected, submitted_s, -1.0, prompt, weights)  # quicker than super()
        self.work = work
        self.request = told
        self.alone = work is None
        self.charge = charge
        self.answer: Answer | None = None  # to its last attempt
        self.expired = False  # its attempt was cancelled because its time was over
        self.granted: asyncio.Future[bool] | None = None


class Sender(Protocol):
    """Sends the attempts of one pool."""

    def __call__(self, job: Job, timeout_s: float) -> Awaitable[Answer]:
        """Send one attempt; see `Send`."""

    async def aclose(self) -> None:
        """Close all connections."""


def attempt_of(job: Job, pool: str, answer: Answer, now: float, failure: str) -> Attempt:
    """Return the row of an attempt that has just ended."""
    request = job.request
    assert request is not None
    waits_s = job.waits_s[law.CONCURRENCY : law.PAUSED + 1]
    waits_s.append(job.eligible_s - job.submitted_s if job.tries > 1 else 0.0)
    return Attempt(
        request.index,
        request.custom_id,
        pool,
        request.model,
        request.url,
        LANES[job.lane],
        job.attempt,
        job.submitted_s,
        job.eligible_s,
        job.launched_s,
        now,
        int(job.reserve),
        0 if answer.outcome in TURNED_AWAY else job.charge,
        answer.used_prompt_tokens,
        answer.used_output_tokens,
        answer.outcome,
        answer.status,
        failure or answer.error_code,
        answer.retry_after_s,
        *waits_s,
    )


def reserve_of(policy: Policy, sizes: Sizes) -> int:
    """Return the tokens that we reserve for a request, by the policy's charge rule."""
    return charge_of(policy.charge_rule, sizes, policy.est_tokens_per_run)


def work_of(request: Request, policy: Policy, before: Work | None = None, *, finalizes: bool = True) -> Work:
    """Return a request as the driver needs it under these settings. `before`: its record, whose history it keeps.

    `finalizes`: whether a finalize pass may follow.

    Expected output is the declared cap over all answers. The provider's charge is not known live: the presumed charge
    is our own rule's, or, if ours is a flat estimate, that of the rule measured for the endpoint.
    """
    sizes = request.sizes
    rule = policy.charge_rule
    reserve = reserve_of(policy, sizes)
    believed = "auto" if rule in ("fixed", LEARNED) else rule
    expected = float(sizes.max_tokens * sizes.n) if sizes.max_tokens >= 0 else -1.0
    charge = reserve if rule == believed else charge_of(believed, sizes, 0)
    if not finalizes:
        return Work(request, reserve, expected, charge=charge, finalizes=False)
    last = replace(sizes, max_tokens=policy.finalize_max_tokens)
    work = Work(
        request,
        reserve,
        expected,
        finalize_reserve=reserve_of(policy, last),
        charge=charge,
        finalize_charge=charge_of(believed, last, 0),
    )
    if before is None or before.first_launched_s < 0.0:
        return work
    history = ("lane", "attempt", "first_launched_s", "retry_at_s", "outages", "roams")
    return replace(work, **{name: getattr(before, name) for name in history})
