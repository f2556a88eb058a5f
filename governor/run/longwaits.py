"""Report unusually long waits at once: hours that a provider asks for, and launches that lie past a budget.

The law alone decides how long a request waits, and whether its pool is held; nothing here makes a wait longer or
shorter.

A limit per minute never asks for more than a minute. A longer wait comes from a daily limit, which a run may sit out,
or is absurd: 114 hours were seen (docs/explanation/provider.md#buckets). A batch should never sleep that long without a
message.
"""

from __future__ import annotations

from collections.abc import Callable

from governor.law import DAY_S, OUTWAITED
from governor.model.errors import FailureCode
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.requests import Answer, Attempt
from governor.model.words import duration, moment_text
from governor.model.work import THROTTLES, Observer
from governor.provider.rate_limit_headers import quoted_numbers
from governor.scheduler.driver import Governor

LONG_WAIT_S = 120.0
# After a report, only a wait so many times as long is reported again.
NEWS_RATIO = 2.0

# Reasons for ending a run that would sleep too long, besides `FailureCode.OUTWAITED`.
STOP_AFTER, FINISH_BY, LONG_WAIT = "STOP_AFTER", "FINISH_BY", "LONG_WAIT"

_COUNTED = {
    "TPM": "tokens per minute",
    "RPM": "requests per minute",
    "TPD": "tokens per day",
    "RPD": "requests per day",
}


class LongWaits(Observer):
    """Reports long waits in one pool, through `say(line)`.

    `moment`: maps a time of the run to wall time, once that is known.
    """

    def __init__(self, pool: Pool, say: Callable[[str], None]) -> None:
        self.policy = pool.policy
        self.moment: Callable[[float], float] = lambda at_s: at_s
        self._of = "" if pool.name == "default" else f"pool {pool.name}: "
        self._say = say
        self._longest_s = LONG_WAIT_S / NEWS_RATIO
        self._outwaited = ""

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        if failure and answer.retry_after_s > LONG_WAIT_S:
            late = failure == FailureCode.DEADLINE_EXCEEDED
            self._tell(answer, attempt.finished_s + answer.retry_after_s, lost_text(self.policy, late=late))

    def suspended(self, attempt: Attempt, answer: Answer) -> None:
        if answer.outcome not in THROTTLES:
            return
        until_s = attempt.finished_s + answer.retry_after_s
        self._outwaited = f"{asker(answer)} asks to wait until {moment_text(self.moment(until_s))}"
        self._tell(answer, until_s, outwaited_text(self.policy, answer.retry_after_s))

    def backed_off(self, attempt: Attempt, answer: Answer, retry_at_s: float, next_attempt: int) -> None:
        cap_s = self.policy.retry_after_cap_seconds
        if answer.retry_after_s > max(cap_s, LONG_WAIT_S):
            then = f"longer than OPENAI_RETRY_AFTER_CAP_SECONDS={cap_s:g}: it is tried again before"
            self._tell(answer, attempt.finished_s + answer.retry_after_s, then)
        elif answer.retry_after_s > LONG_WAIT_S:
            held = self.policy.hold_on_throttle and answer.outcome in THROTTLES
            self._tell(answer, retry_at_s, waits_text(held=held))

    def stopped_text(self) -> str:
        """Return the message for a run that stopped because every request met such a wait."""
        return f"{self._outwaited}, and {OUTWAITED} in a row met that: stopped; the same command goes on then"

    def _tell(self, answer: Answer, until_s: float, then: str) -> None:
        if answer.retry_after_s < NEWS_RATIO * self._longest_s:
            return
        self._longest_s = answer.retry_after_s
        until = moment_text(self.moment(until_s))
        self._say(f"{self._of}{asker(answer)} asks to wait {duration(answer.retry_after_s)}, until {until}: {then}")


def asker(answer: Answer) -> str:
    """Return the origin of the wait: the limit that the message names, else the provider."""
    quoted = quoted_numbers(answer.message)
    if not quoted.dimension:
        return "the provider"
    size = f"{quoted.limit:,.0f} " if quoted.limit >= 0.0 else ""
    return f"the limit of {size}{_COUNTED[quoted.dimension]}"


def waits_text(*, held: bool) -> str:
    """Return what such a wait means for a request that will be tried again, and the remedy."""
    then = "nothing is launched until then" if held else "that request waits, the others go on"
    return (
        f"{then}; Ctrl-C and the same command later go on from here, `paceline set` OPENAI_DEADLINE_SECONDS=N gives up "
        "what would wait longer, --stop-after and --finish-by end a run that would sleep past them"
    )


def lost_text(policy: Policy, *, late: bool) -> str:
    """Return what it means for a request that is lost. `late`: lost to its deadline, not to its number of attempts."""
    if not late:
        return "that was the request's last attempt"
    text = f"OPENAI_DEADLINE_SECONDS={policy.deadline_seconds:g} is over before that, the request is given up"
    if policy.hold_on_throttle:
        text += f"; nothing is launched for {duration(policy.deadline_seconds)}"
    return text


def outwaited_text(policy: Policy, wait_s: float) -> str:
    """Return what it means if the wait is longer than any that is obeyed."""
    cap_s, deadline_s = policy.retry_after_cap_seconds, policy.deadline_seconds
    name, limit_s = ("RETRY_AFTER_CAP", cap_s) if wait_s > cap_s else ("DEADLINE", deadline_s)
    return f"longer than OPENAI_{name}_SECONDS={limit_s:g}: the request is given up, or all of them where all meet it"


def held_text(governor: Governor, moment: Callable[[float], float]) -> str:
    """Return the message for a leg that begins in a long hold, caused by an earlier leg's 429; "" if it does not."""
    until_s = governor.s.hold_until
    wait_s = until_s - governor.now()
    if wait_s <= LONG_WAIT_S:
        return ""
    return (
        f"an earlier 429 asked to wait until {moment_text(moment(until_s))}: nothing is launched for "
        f"{duration(wait_s)}; --set OPENAI_HOLD_ON_THROTTLE=false tries at once"
    )


# ---------------------------------------------------------------- ending instead of sleeping


def too_late(
    next_s: float, now_s: float, *, stop_after_s: float | None, finish_by_s: float | None, insist: bool = False
) -> str:
    """Return why a run should end now because its next launch lies past a budget; "" = it need not.

    All seconds since the leg began; `next_s`: the earliest possible launch. `insist`: `--yes`, which lifts the guard of
    a day. A run that is slightly late is not ended for `--finish-by`: only a long wait ends it.
    """
    if stop_after_s is not None and next_s >= stop_after_s:
        return STOP_AFTER
    wait_s = next_s - now_s
    if finish_by_s is not None:
        return FINISH_BY if wait_s > LONG_WAIT_S and next_s >= finish_by_s else ""
    return LONG_WAIT if wait_s > DAY_S and not insist else ""


def too_late_text(why: str, wait_s: float, epoch_s: float, budget_s: float | None) -> str:
    """Return the message for that end. `epoch_s`: when the next launch would be; `budget_s`: the option's value."""
    past = {
        STOP_AFTER: f"past --stop-after {duration(budget_s or 0.0)}",
        FINISH_BY: f"past --finish-by {duration(budget_s or 0.0)}",
        LONG_WAIT: "more than a day (--yes sits it out)",
    }[why]
    return (
        f"the next launch is {duration(wait_s)} away, {moment_text(epoch_s)}, {past}: stopped; the same command then "
        "goes on"
    )
