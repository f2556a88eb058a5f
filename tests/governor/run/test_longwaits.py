"""Long waits are told at once, with who asks, until when and what to do; a run ends rather than sleep past a budget."""

from __future__ import annotations

import asyncio
import time
from math import inf
from typing import Any

import pytest

from governor import law
from governor.model.errors import FailureCode
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.requests import Answer, Outcome
from governor.model.words import moment_text
from governor.run.longwaits import (
    FINISH_BY,
    LONG_WAIT,
    STOP_AFTER,
    LongWaits,
    asker,
    held_text,
    too_late,
    too_late_text,
)
from governor.scheduler.driver import Governor
from tests.governor import journals
from tests.governor.desks import OK, THROTTLED, Desk, Ran, quiet, works
from tests.virtual_loop import run_virtual

HOURS = 114.3 * 3_600.0
DAILY = "Rate limit reached for gpt-4o on requests per day (RPD): Limit 200, Used 200, Requested 1."
LATE = FailureCode.DEADLINE_EXCEEDED


def asks(wait_s: float, message: str = "") -> Answer:
    return Answer(Outcome.THROTTLED, 429, message=message, retry_after_s=wait_s)


class Heard:
    """A watcher with what it said."""

    def __init__(self, name: str = "default", **settings: Any) -> None:
        self.said: list[str] = []
        self.watch = LongWaits(Pool(name=name, policy=Policy(**settings)), self.said.append)

    def back_off(self, answer: Answer) -> None:
        row = journals.attempt(journals.job(journals.work(0)), answer, 10.0)
        self.watch.attempted(row, answer, "")
        self.watch.backed_off(row, answer, 10.0 + answer.retry_after_s, row.attempt + 1)

    def lose(self, answer: Answer, failure: str = LATE) -> None:
        self.watch.attempted(journals.attempt(journals.job(journals.work(0)), answer, 10.0, failure), answer, failure)


def test_who_asks_for_which_wait_until_when_and_what_to_do() -> None:
    heard = Heard(hold_on_throttle=True)
    heard.watch.moment = lambda at_s: time.mktime((2026, 11, 25, 7, 0, 0, 0, 0, -1)) + at_s
    heard.back_off(asks(432.0, DAILY))
    assert len(heard.said) == 1
    until = "the limit of 200 requests per day asks to wait 7 min 12 s, until Wed 25 Nov 07:07: "
    assert heard.said[0].startswith(until + "nothing is launched until then; Ctrl-C and the same command later")
    for remedy in ("OPENAI_DEADLINE_SECONDS", "--stop-after", "--finish-by"):
        assert remedy in heard.said[0]


def test_a_wait_is_told_once_and_again_only_if_it_is_much_longer() -> None:
    heard = Heard(name="eu")
    for wait_s in (59.0, 120.0, 432.0, 450.0, 800.0, HOURS, HOURS):
        heard.back_off(asks(wait_s))
    assert [line[: line.index(", until")] for line in heard.said] == [
        "pool eu: the provider asks to wait 7 min 12 s",
        "pool eu: the provider asks to wait 4 d 18 h",
    ]
    assert "that request waits, the others go on" in heard.said[0]


def test_a_lost_request_is_told_with_the_reason() -> None:
    heard = Heard(deadline_seconds=600.0, hold_on_throttle=True)
    heard.lose(asks(HOURS))
    assert heard.said[0].endswith(
        "OPENAI_DEADLINE_SECONDS=600 is over before that, the request is given up; nothing is launched for 10 min"
    )
    heard = Heard()
    heard.lose(asks(HOURS), FailureCode.RATE_LIMIT_EXHAUSTED)
    assert heard.said[0].endswith("that was the request's last attempt")


def test_a_wait_above_the_cap_that_is_tried_again_is_not_said_to_be_waited_out() -> None:
    heard = Heard()
    answer = Answer(Outcome.SERVER_ERROR, 503, message="maintenance", retry_after_s=3_600.0)
    heard.back_off(answer)
    heard.back_off(answer)
    (line,) = heard.said
    assert line.startswith("the provider asks to wait 1 h, until ")
    assert line.endswith("longer than OPENAI_RETRY_AFTER_CAP_SECONDS=600: it is tried again before")


def test_a_wait_that_is_not_obeyed_says_which_setting_decides_and_until_when() -> None:
    answer = asks(HOURS, DAILY)
    row = journals.attempt(journals.job(journals.work(0)), answer, 10.0)
    for settings, name in (
        ({}, "OPENAI_RETRY_AFTER_CAP_SECONDS=600"),
        ({"retry_after_cap_seconds": 1e6, "deadline_seconds": 60.0}, "OPENAI_DEADLINE_SECONDS=60"),
    ):
        heard = Heard(**settings)
        heard.watch.moment = lambda at_s: time.mktime((2026, 11, 25, 7, 0, 0, 0, 0, -1)) + at_s
        heard.watch.suspended(row, answer)
        (line,) = heard.said
        assert "the limit of 200 requests per day asks to wait 4 d 18 h, until Mon 30 Nov 01:18: longer than" in line
        assert name in line
        stops = heard.watch.stopped_text()
        assert stops.startswith("the limit of 200 requests per day asks to wait until Mon 30 Nov 01:18, and 3 in a row")


def daily(wait_s: float) -> Answer:
    return asks(wait_s, DAILY)


@pytest.mark.parametrize("hold", [0, 1])
@pytest.mark.parametrize("limits", [{"retry_after_cap_s": 600.0}, {"deadline_s": 600.0}])
def test_where_all_meet_such_a_wait_the_run_stops_and_loses_nothing(hold: int, limits: dict[str, float]) -> None:
    desk = Desk(script={i: [(1.0, daily(HOURS))] for i in range(5, 100)})
    ran = Ran(quiet(max_concurrency=1, hold_on_throttle=hold, **limits), desk, works(100))
    assert (ran.why, len(ran.log.ends), len(desk.sent)) == (FailureCode.OUTWAITED, 5, 5 + law.OUTWAITED)


@pytest.mark.parametrize("limits", [{"retry_after_cap_s": 600.0}, {"deadline_s": 600.0}])
def test_an_answer_that_was_under_way_when_the_limit_was_reached_costs_no_request(limits: dict[str, float]) -> None:
    """Only a success launched after a refusal shows that the provider still admits requests."""
    slow: dict[int, list[tuple[float, Answer]]] = {i: [(5.0, OK)] for i in range(3)}
    desk = Desk(script=slow | {i: [(2.0 + i % 2, daily(HOURS))] for i in range(3, 100)})
    ran = Ran(quiet(max_concurrency=5, **limits), desk, works(100))
    assert ran.why == FailureCode.OUTWAITED
    assert ran.log.ends == [(i, "", 5.0) for i in range(3)]


@pytest.mark.parametrize("hold", [0, 1])
def test_a_single_absurd_wait_ends_its_request_and_never_holds_a_pool(hold: int) -> None:
    """114 hours were seen: once in a while, from one of many keys behind a gateway."""
    desk = Desk(script={i: [(1.0, daily(HOURS))] for i in range(0, 20, 4)})
    ran = Ran(quiet(max_concurrency=1, hold_on_throttle=hold, retry_after_cap_s=600.0), desk, works(20))
    lost = [i for i, failure, _ in ran.log.ends if failure]
    assert (ran.why, lost) == ("", list(range(0, 20, 4)))
    assert {failure for _, failure, _ in ran.log.ends} == {"", FailureCode.RATE_LIMIT_EXHAUSTED}
    # At most the backoff of a 429 that states nothing.
    assert desk.sent[-1][0] <= 20.0 + 5 * 2.0


def test_the_longest_wait_that_is_obeyed_is_the_cap() -> None:
    for wait_s, code in ((600.0, ""), (600.001, FailureCode.RATE_LIMIT_EXHAUSTED)):
        ran = Ran(quiet(retry_after_cap_s=600.0), Desk(script={0: [(1.0, daily(wait_s))]}), works(1))
        assert [failure for _, failure, _ in ran.log.ends] == [code]


def test_a_message_without_figures_and_moments_that_no_calendar_has() -> None:
    assert asker(asks(500.0, "on tokens per min (TPM). Try again in 500s")) == "the limit of tokens per minute"
    assert asker(asks(500.0)) == "the provider"
    assert moment_text(1e300) == moment_text(inf) == "never"


# ---------------------------------------------------------------- rather end than sleep


@pytest.mark.parametrize(
    ("next_s", "budgets", "why"),
    [
        (-inf, {"stop_after_s": 10.0}, ""),
        (9.9, {"stop_after_s": 10.0}, ""),
        (10.0, {"stop_after_s": 10.0}, STOP_AFTER),
        (700.0, {"finish_by_s": 600.0}, FINISH_BY),
        (700.0, {"finish_by_s": 800.0}, ""),
        (105.0, {"finish_by_s": 100.0}, ""),  # late by little
        (HOURS, {}, LONG_WAIT),
        (HOURS, {"insist": True}, ""),
        (HOURS, {"finish_by_s": 1e6}, ""),  # said so
        (80_000.0, {}, ""),
    ],
)
def test_when_a_run_should_end(next_s: float, budgets: dict[str, Any], why: str) -> None:
    assert too_late(next_s, 5.0, **({"stop_after_s": None, "finish_by_s": None} | budgets)) == why
    if why:
        assert "the same command then goes on" in too_late_text(why, next_s, 0.0, 10.0)


def looked_at(p: law.Params, desk: Desk, *moments: float) -> list[float]:
    """What `next_launch_at` says at these moments of a batch of three."""
    found: list[float] = []

    async def main() -> None:
        governor = Governor(p)
        loop = asyncio.get_running_loop()
        for at in moments:
            loop.call_at(at, lambda: found.append(governor.next_launch_at()))
        loop.call_at(moments[-1] + 0.1, governor.stop, "enough")
        await governor.run(works(3), desk.send)
        assert governor.next_launch_at() == -inf

    run_virtual(main())
    return found


def test_the_next_launch_is_known_where_nothing_else_can_happen() -> None:
    hours = Desk(script={0: [(1.0, asks(500.0))], 1: [(2.0, THROTTLED)]})
    # One at a time, and its place is kept: the rest waits for 0, whose attempt is in flight until 1.
    kept = looked_at(quiet(max_concurrency=1, backoff_keeps_permit=1), hours, 0.5, 1.5)
    assert kept == [-inf, pytest.approx(501.002)]
    # Held: whatever is in flight, nobody goes before 501.
    held = Desk(script={0: [(1.0, asks(500.0))], 1: [(9.0, OK)]})
    assert looked_at(quiet(max_concurrency=2, hold_on_throttle=1), held, 0.5, 1.5) == [-inf, pytest.approx(501.002)]
    # Not held: 2 goes at once, and then only 0 is left.
    free = Desk(script={0: [(1.0, asks(500.0))]})
    assert looked_at(quiet(max_concurrency=1), free, 1.5, 3.5) == [-inf, pytest.approx(501.002)]


def test_a_leg_that_begins_in_a_hold_says_so() -> None:
    async def main() -> tuple[str, str]:
        held = Governor(quiet(hold_on_throttle=1), state=law.State(hold_until=HOURS), start_s=1_000.0)
        free = Governor(quiet(hold_on_throttle=1), state=law.State(hold_until=1_060.0), start_s=1_000.0)
        return held_text(held, lambda at: at), held_text(free, lambda at: at)

    held, free = run_virtual(main())
    assert "nothing is launched for 4 d 18 h; --set OPENAI_HOLD_ON_THROTTLE=false tries at once" in held
    assert free == ""
