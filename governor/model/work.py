"""What the governor is given to do and whom it tells: the values and protocols of `governor/scheduler/`.

`Work` is a request with what to reserve for it, `Job` is it (or a permit) on its way, `Observer` listens and `Send`
sends.
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
from governor.model.policy import Policy
from governor.model.requests import LANES, Answer, Attempt, Outcome, Request
from governor.model.scheduled import Scheduled

DIMENSIONS = {"TPM": law.TPM, "RPM": law.RPM, "TPD": law.TPD, "RPD": law.RPD}
# What a request becomes when its last attempt failed so.
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
# The account, not the request, is at fault: nothing more is sent, and what was not answered stays pending.
STOPPING = {Outcome.QUOTA: FailureCode.INSUFFICIENT_QUOTA, Outcome.UNAUTHORIZED: FailureCode.UNAUTHORIZED}
# Turned away at the door, so not charged. A bad request is let in: recorded 400s cost tokens
# (docs/explanation/provider.md#charge).
TURNED_AWAY = (*THROTTLES, *STOPPING, Outcome.TOO_LARGE, Outcome.LOCAL)
TIMED_OUT = Answer(Outcome.TIMEOUT, message="no answer within the request's time-out or deadline")


# A moment of a run, and what its clock of causes showed then: from here a request's waiting is counted.
Begun = tuple[float, list[float]]


@dataclass(frozen=True, slots=True)
class Work:
    """One request to run: what to reserve for it and for its finalize pass, and its declared cap (-1 = none).

    `charge`, `finalize_charge`: what the provider is believed to charge, for the records; -1 = unknown. `finalizes`:
    whether a run with finalize passes may open one for it. `begun`: since when it waits, if not since the run began.

    The rest is history, of a request that an earlier leg has launched: `lane` and `attempt` are those to launch next,
    `first_launched_s` is when it was first launched (-1 = never), `retry_at_s` the moment at which its backoff ends.
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


class PoolState(Protocol):
    """What an observer may read of the governor that it observes.

    `p`, `s`: settings and state of the law. `late_s`: by how much the timer was late that lets the present launch out,
    -1 = no timer did. `stopped`: why nothing more is launched, "" = it is.
    """

    late_s: float

    @property
    def p(self) -> Params: ...

    @property
    def s(self) -> State: ...

    @property
    def stopped(self) -> str: ...

    def now(self) -> float:
        """Seconds since the run began."""


class Observer:
    """Told of everything that a run does, in order. Methods are quick and synchronous; what one raises ends the run.

    Each may call the governor's `stop`, `pause`, `resume` and `reprice`. What a subclass does not define costs nothing;
    who wants to hear of `backed_off` or `suspended` defines `attempted` too.
    """

    @property
    def hears_decisions(self) -> bool:
        """Whether `decided` is to be called."""
        return type(self).decided is not Observer.decided

    def began(self, governor: PoolState) -> None:
        """Told first: whose reports these are."""

    def launched(self, job: Job, now: float) -> None:
        """An attempt is about to be sent."""

    async def flushed(self) -> None:
        """Awaited before each send: returns when what was told so far is durable."""

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        """An attempt is over; `failure` is the request's failure code if it is lost with it."""

    def suspended(self, attempt: Attempt, answer: Answer) -> None:
        """Told after `attempted`: the attempt does not count, and its request is pending until it is launched again.

        Or until `ended` comes: it was refused, and it may be that all requests are.
        """

    def backed_off(self, attempt: Attempt, answer: Answer, retry_at_s: float, next_attempt: int) -> None:
        """Told after `attempted`: the request is not lost with that attempt, it may be launched again at that time.

        `next_attempt`: the number under which it will be, the same one where this attempt did not count.
        """

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        """A request is over: answered (""), or lost with that code. `answer` is its last one, None if unsent since."""

    def deferred(self, cause: int) -> None:
        """A job at the head has to wait for this cause of the law; counted once per job, attempt and cause."""

    def decided(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        """The law's function of that name, called with these arguments after `p` and `s`, returned that.

        `repriced` stands for the change of settings as well: its arguments are the new settings and the time.
        """


class Send(Protocol):
    """Sends one attempt and says what came back. Raises nothing: what the provider does wrong is an answer too."""

    def __call__(self, job: Job, timeout_s: float) -> Awaitable[Answer]:
        """After `timeout_s` the call is cancelled, and counts as a time-out."""


class Job(Scheduled):
    """A request of a batch on its way, or a permit that a program waits for (without `work`).

    `request`: the work's, or what the program said of its own; None = no observer is told of it.
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
    ) -> None:
        Scheduled.__init__(self, index, reserve, expected, submitted_s)  # quicker than super()
        self.work = work
        self.request = request if work is None else work.request
        self.alone = work is None
        self.charge = charge
        self.answer: Answer | None = None  # to its last attempt
        self.expired = False  # its attempt was cancelled since its time was over
        self.granted: asyncio.Future[bool] | None = None


def attempt_of(job: Job, pool: str, answer: Answer, now: float, failure: str) -> Attempt:
    """The row of an attempt that has just ended."""
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
    """Tokens that we reserve for a request, by the policy's charge rule."""
    return charge_of(policy.charge_rule, sizes, policy.est_tokens_per_run)


def work_of(request: Request, policy: Policy, before: Work | None = None, *, finalizes: bool = True) -> Work:
    """What the driver needs of a request, under these settings. `before`: its record, whose history it keeps.

    `finalizes`: whether a finalize pass may follow.

    Expected output is the declared cap over all answers. The provider's charge is not known live: what is believed is
    our own rule, or what is measured for the endpoint where ours is a flat estimate.
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
    history = ("lane", "attempt", "first_launched_s", "retry_at_s")
    return replace(work, **{name: getattr(before, name) for name in history})
