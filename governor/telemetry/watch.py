"""Observe a live run: figures for its progress, and conditions to report to the user once.

`Meter` counts; `Alarms` reports, once each, limits that differ from the settings, an account that is refused, a
provider that cannot be reached, and the first request that fails for a reason (`refusals` reports refusals that all
requests meet, `longwaits` long waits); `Together` is several observers in one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from math import inf
from typing import Any

from governor import law
from governor.forecast.guard import MeasuredFigures
from governor.forecast.summary import Tally
from governor.law import PROBE_GAP_MAX_S
from governor.model.errors import quoted
from governor.model.estimate import Sizes
from governor.model.policy import KNOB_BY_ENV, Policy
from governor.model.pools import Pool
from governor.model.prices import Spending, usage_in
from governor.model.requests import ACCOUNT_REFUSES, CAUSES, Answer, Attempt, Outcome, Request
from governor.model.words import duration, moment_text
from governor.model.work import EVENTS, THROTTLES, Job, Observer, PoolState

# Granted and configured limits closer than this count as equal: providers round.
LIMITS_DIFFER = 0.01
_WAITED = tuple(f"waited_{cause}_s" for cause in CAUSES[1:])


class Together(Observer):
    """Several observers as one, called in order; a store comes first, so that nothing is reported before it is kept."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        each = tuple(observers)
        for event in EVENTS:
            heard = [getattr(observer, event) for observer in each if observer.hears(event)]
            if heard:
                setattr(self, event, heard[0] if len(heard) == 1 else _in_turn(heard))
        flushes = [observer.flushed for observer in each if observer.hears("flushed")]
        if flushes:
            self.flushed = partial(_flush_all, flushes)  # type: ignore[method-assign]


def _in_turn(heard: list[Callable[..., None]]) -> Callable[..., None]:
    def report(*event: Any) -> None:
        for each in heard:
            each(*event)

    return report


async def _flush_all(flushes: Sequence[Callable[[], Awaitable[None]]]) -> None:
    for flush in flushes:
        await flush()


# ---------------------------------------------------------------- the circuit breaker


class OutageWatch:
    """Sees the circuit breaker of a pool open and close. `since_s`: start of the present outage, -1 = there is none."""

    def __init__(self) -> None:
        self.state: PoolState | None = None
        self.since_s = -1.0

    def changed(self) -> bool:
        """Return whether an outage has begun or ended since the last call."""
        s = self.state.s if self.state is not None else None
        since_s = s.outage_from if s is not None and s.probe_at > -inf else -1.0
        if since_s == self.since_s:
            return False
        self.since_s = since_s
        return True


# ---------------------------------------------------------------- figures


class Meter(Observer):
    """The figures of one pool in this process: a `Tally`, the last minute's tokens, means over the answers.

    `ended_before`: requests that had ended in earlier legs of the run. `left`, `left_tokens`: remaining requests and
    their reservations.
    """

    def __init__(self, pool: Pool, spent: Spending, *, left: int, left_tokens: float) -> None:
        self.policy = pool.policy
        self.spent = spent
        self.tally = Tally()
        self.left = left
        self.left_tokens = left_tokens
        self._reserved = self._prompted = 0.0
        self.answers = 0
        self.answer_s = 0.0
        self.answer_tokens = 0
        self.in_flight = 0
        self._minute = [0.0] * 60
        self._minute_at = 0
        self._launched: dict[int, tuple[float, Sizes | None]] = {}

    def launched(self, job: Job, now: float) -> None:
        self.tally.launched()
        self.in_flight += 1
        self._roll(now)
        self._minute[int(now) % 60] += job.reserve
        self._reserved += job.reserve
        self._prompted += min(job.prompt, job.reserve)
        self._launched.setdefault(job.index, (job.reserve, job.request.sizes if job.request is not None else None))

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        self.in_flight -= 1
        prompt, output = max(attempt.prompt_tokens, 0), max(attempt.output_tokens, 0)
        self.tally.answered(
            attempt.reserved_tokens, attempt.charged_tokens, prompt + output, attempt.outcome in THROTTLES
        )
        waits_s = self.tally.waits_s
        for i, name in enumerate(_WAITED, 1):
            waits_s[i] += getattr(attempt, name)
        self.spent.attempted(attempt, usage_in(answer.body), self._launched.get(attempt.request, (0.0, None))[1])
        if attempt.outcome is not Outcome.OK:
            return
        service_s = attempt.finished_s - attempt.launched_s
        self.answers += 1
        self.answer_s += service_s
        self.answer_tokens += output
        used = prompt + output if attempt.prompt_tokens >= 0 and attempt.output_tokens >= 0 else -1
        if attempt.lane == "main":
            self.tally.work.add(0.0, attempt.charged_tokens, used, service_s, prompt)
        else:
            self.tally.work.finalized(attempt.charged_tokens, used)

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        self.tally.ended(failure, now)
        self.left -= 1
        self.left_tokens -= self._launched.pop(request.index, (0.0, None))[0]

    def deferred(self, cause: int) -> None:
        self.tally.deferrals[cause] += 1

    @property
    def prompt_ratio(self) -> float:
        """The share of input in the tokens reserved so far."""
        return self._prompted / self._reserved if self._reserved else 0.0

    def _roll(self, now: float) -> None:
        """Clear the seconds that have passed since the last launch."""
        second = int(now)
        for passed in range(self._minute_at + 1, min(second, self._minute_at + 60) + 1):
            self._minute[passed % 60] = 0.0
        self._minute_at = max(second, self._minute_at)

    def tokens_per_minute(self, now: float) -> float:
        """Return the tokens reserved by launches of the last minute."""
        self._roll(now)
        return sum(self._minute)

    @property
    def service_s(self) -> float:
        """Return the mean time of an answer so far, 0 before the first."""
        return self.answer_s / self.answers if self.answers else 0.0

    def measured(self, paused: bool = False) -> MeasuredFigures:
        """Return the figures to compare with a forecast."""
        t = self.tally
        mean_tokens = self.answer_tokens / self.answers if self.answers else 0.0
        return MeasuredFigures(t.requests, t.failed, t.throttled, t.attempts, self.service_s, mean_tokens, paused)


# ---------------------------------------------------------------- what the user should know


class Alarms(Observer):
    """Reports irregularities in one pool, each once, through `say(line)`.

    `granted`: the account's limits as last stated, by dimension.
    """

    def __init__(self, pool: Pool, say: Callable[[str], None]) -> None:
        self.policy = pool.policy
        self._of = "" if pool.name == "default" else f"pool {pool.name}: "
        self._say = say
        self.granted: dict[str, float] = {}
        self._told: set[str] = set()
        self._outage = OutageWatch()

    def began(self, governor: PoolState) -> None:
        self._outage.state = governor

    def repriced(self, policy: Policy) -> None:
        """Compare with these settings from now on."""
        self.policy = policy
        self._told.clear()

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        for limit in answer.limits:
            self.granted[limit.dimension] = limit.limit
            if limit.dimension not in self._told:
                self._compare(limit.dimension, limit.limit)
        state = self._outage.state
        if self._outage.changed() and state is not None and not state.stopped:
            self._say(self._of + outage_text(self._outage, answer))
        if answer.outcome in ACCOUNT_REFUSES and "account" not in self._told:
            self._told.add("account")
            self._say(self._of + account_text(answer))
        if answer.outcome in (Outcome.DROPPED, Outcome.LOCAL) and answer.outcome not in self._told:
            # A wrong address looks the same, and would be retried forever without a message.
            self._told.add(answer.outcome)
            self._say(self._of + (_words(answer) or "the connection dropped before the answer arrived"))

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        if not failure or failure in self._told:
            return
        self._told.add(failure)
        said = _words(answer) if answer is not None else "never sent, or not again"
        self._say(f"{self._of}request {quoted(request.custom_id)} failed: {failure}: {said}".rstrip(": "))

    def _compare(self, dimension: str, granted: float) -> None:
        text = limit_text(dimension, granted, self.policy)
        if text:
            self._told.add(dimension)
            self._say(self._of + text)


def outage_text(outage: OutageWatch, answer: Answer) -> str:
    """Return the message for an outage that has just begun, or ended."""
    assert outage.state is not None
    s = outage.state.s
    if outage.since_s < 0.0:
        return f"the provider answers again, after {duration(s.outage_until - s.outage_from)}: it goes on"
    lately = duration(outage.state.now() - s.outage_from)
    why = _words(answer) or (f"status {answer.status}" if answer.status else str(answer.outcome))
    return (
        f"no answer for {lately} ({why}): waits for the provider and probes it, at most {PROBE_GAP_MAX_S:g} s apart; "
        "attempts that fail meanwhile do not count; check the address and the network if it should be there"
    )


def limit_text(dimension: str, granted: float, policy: Policy) -> str:
    """Return the message for an account's limit that differs from the settings; "" if they agree."""
    knob = KNOB_BY_ENV.get(f"OPENAI_{dimension}_LIMIT")
    if knob is None:
        return ""
    ours = float(getattr(policy, knob.name))
    if abs(granted - ours) <= LIMITS_DIFFER * granted:
        return ""
    what = "tokens" if dimension[0] == "T" else "requests"
    per = "minute" if dimension[2] == "M" else "day"
    stated = f"the account grants {granted:,.0f} {what} per {per}"
    if ours <= 0.0:
        # An unconfigured limit matters only if it would bind; without a bound there is nothing to compare with.
        return f"{stated}, {knob.env} is not set: set {knob.env}={granted:.0f}" if dimension == "RPM" else ""
    if granted < ours:
        return f"{stated}, {knob.env}={ours:.0f} is higher: expect 429s, or set {knob.env}={granted:.0f}"
    return f"{stated}, {knob.env}={ours:.0f} uses less of it: the run could be faster with {knob.env}={granted:.0f}"


def _words(answer: Answer) -> str:
    """Return the provider's message, on one line."""
    return " ".join(answer.message.split())[:300]


def account_text(answer: Answer) -> str:
    """Return why the provider no longer serves this account, in its own words as far as it has any."""
    what = "the account's quota is used up" if answer.outcome is Outcome.QUOTA else "the key or the model was rejected"
    words = _words(answer)
    code = f" ({answer.status} {answer.error_code})" if answer.error_code else f" ({answer.status})"
    until = f"; access returns {moment_text(answer.returns_at)}" if answer.returns_at is not None else ""
    return f"{what}{code}: {words}{until}" if words else what + code + until


def waiting_for(cause: int) -> str:
    """Return the law's cause as in records; "" for nothing."""
    return CAUSES[cause] if cause != law.NOTHING else ""
