"""Live, flex or the Batch API: single decisions, worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from governor.forecast.mixes import (
    CANCEL_S,
    Candidate,
    LiveRate,
    OpenBatch,
    Situation,
    decide,
    live_rate,
    turnaround_of,
)
from governor.model.policy import Policy

HOUR, DAY = 3_600.0, 86_400.0
# One request of 1,000 tokens a second; its answer takes a second.
LIVE = LiveRate(1_000.0, math.inf, 0.0, 100, 1.0, 1.0)
# Known to the minute: all batches take an hour.
HOURLY = turnaround_of(HOUR, HOUR * 1.001, expires_s=DAY, factor=1.0001)
UNKNOWN = turnaround_of(4 * HOUR, 20 * HOUR, expires_s=DAY)


def requests(count: int, **given: object) -> list[Candidate]:
    return [replace(Candidate(i, "m", 900, 1_000.0, 1.0), **given) for i in range(count)]  # type: ignore[arg-type]


def batch(key: int, left: int = 100, **given: object) -> OpenBatch:
    plain = OpenBatch(key, "m", 900 * left, left, 1_000.0 * left, 0.0, is_begun=False)
    return replace(plain, **given)  # type: ignore[arg-type]


def situation(**given: object) -> Situation:
    plain = Situation(
        now=0.0,
        deadline=10 * HOUR,
        waiting=(),
        batches=(),
        live=LIVE,
        live_left=(0, 0.0),
        queue_tokens=math.inf,
        file_requests=100,
        step_s=60.0,
        turnaround=UNKNOWN,
    )
    return replace(plain, **given)  # type: ignore[arg-type]


def test_while_live_calls_could_still_do_all_of_it_everything_is_handed_in() -> None:
    found = decide(situation(waiting=requests(250)))
    assert (found.live, found.cancel, found.can_wait) == ((), (), 1.0)
    assert [len(each) for each in found.batch] == [100, 100, 50]
    assert sorted(key for each in found.batch for key in each) == list(range(250))


def test_a_queue_takes_what_it_has_room_for_and_each_model_has_its_own() -> None:
    waiting = requests(300) + [replace(c, key=300 + c.key, model="n") for c in requests(50)]
    found = decide(situation(waiting=waiting, queue_tokens=200_000.0, batches=[batch(1)]))
    # 90,000 of 200,000 tokens are taken: one more batch of 90,000 of this model, and the other's.
    assert [len(each) for each in found.batch] == [100, 50]


def test_what_no_queue_holds_goes_live_at_once() -> None:
    waiting = [*requests(10), Candidate(10, "m", 5_000, 5_000.0)]
    found = decide(situation(waiting=waiting, queue_tokens=1_000.0))
    assert found.live == (10,)


def test_without_slack_batches_that_have_not_begun_are_cancelled_first() -> None:
    """1,000 s of live work and its reserve, ten minutes for cancelling: the slack ends there, not before."""
    begun = [batch(key, is_begun=True, left=100) for key in range(5)]
    new = [batch(key) for key in range(5, 10)]
    need_s = LIVE.needs_s(1_000, 1e6) * 1.1 + CANCEL_S + 60.0
    calm = decide(situation(batches=begun + new, deadline=need_s + 1.0))
    assert (calm.cancel, calm.live) == ((), ())
    tight = decide(situation(batches=begun + new, deadline=need_s - 1.0))
    assert tight.can_wait < 0.98
    assert tight.cancel
    assert set(tight.cancel[:5]) == set(range(5, 10))


def test_live_calls_get_no_more_than_they_can_do_until_the_next_decision_bears_fruit() -> None:
    found = decide(situation(waiting=requests(5_000), deadline=5_000.0))
    assert found.can_wait < 0.98
    assert len(found.live) == pytest.approx(60.0 + CANCEL_S, rel=0.02)
    assert len({*found.live, *(key for each in found.batch for key in each)}) == 5_000


def test_a_turnaround_that_is_known_may_be_waited_for() -> None:
    """Live calls cannot do it all, but the batches end in an hour."""
    found = decide(situation(waiting=requests(9_000), deadline=2 * HOUR, turnaround=HOURLY, file_requests=1_000))
    assert (found.live, found.can_wait) == ((), 1.0)
    late = decide(situation(waiting=requests(9_000), deadline=0.99 * HOUR, turnaround=HOURLY, file_requests=1_000))
    assert len(late.live) == 9_000  # no batch is done by then: nothing is gained by waiting
    assert late.batch == ()


def test_answers_of_a_batch_come_with_its_end() -> None:
    """All lines are answered, but none has come back: in the last minutes it is cancelled to get them."""
    done = batch(1, left=0, is_begun=True)
    assert decide(situation(batches=[done], deadline=CANCEL_S + 61.0)).cancel == ()
    assert decide(situation(batches=[done], deadline=CANCEL_S + 59.0)).cancel == (1,)
    assert decide(situation(batches=[replace(done, is_cancelling=True)], deadline=100.0)).cancel == ()


def test_flex_runs_from_the_start_and_ends_when_its_slowness_would_be_late() -> None:
    found = decide(situation(waiting=requests(3_000, flex=True)))
    assert found.live == ()
    assert len(found.flex) == pytest.approx(60.0 + CANCEL_S, rel=0.02)
    late = decide(situation(waiting=requests(3_000, flex=True), deadline=3_900.0))
    assert late.flex == ()
    assert late.live


def test_what_gains_least_by_waiting_is_bought_live_first() -> None:
    waiting = [replace(c, saving_usd=float(c.key)) for c in requests(5_000)]
    found = decide(situation(waiting=waiting, deadline=5_000.0))
    assert sorted(found.live) == list(range(len(found.live)))


def test_what_live_calls_can_do() -> None:
    """500 tokens/s and 15 s between launches; 10 requests need 150 s by the one, 20 s by the other."""
    policy = Policy(tpm_limit=30_000, tpm_headroom=0.0, stagger_seconds=15.0, max_concurrency=3)
    rate = live_rate(policy, 2.0, 0.0)
    assert rate.needs_s(10, 10_000.0) == pytest.approx(152.0)
    assert rate.needs_s(0, 0.0) == 0.0


def test_a_turnaround_s_worlds_have_its_quantiles() -> None:
    assert UNKNOWN.done_by(4 * HOUR) == pytest.approx(0.5, abs=0.02)
    # Beyond a day a batch has expired.
    assert UNKNOWN.done_by(math.inf) == 1.0
    assert UNKNOWN.done_by(1e9) == pytest.approx(UNKNOWN.done_by(DAY))
    assert HOURLY.drawn(0, 0.5) == pytest.approx(HOUR, rel=0.01)
    # Given that it has taken five hours already, it takes longer.
    assert UNKNOWN.drawn(0, 0.01, 5 * HOUR) > 5 * HOUR
