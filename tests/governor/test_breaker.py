"""The circuit breaker of the law, as timetables: when it opens, what it lets out, what counts, and when it closes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from governor import law
from governor.model.needs import of_tokens
from tests.governor.laws import EXHAUSTED, FAILED, INF, OK, Job, Pool, Reply, free


def server(down: tuple[float, float], reply_s: float = 1.0, crashes: tuple[int, ...] = ()) -> Any:
    """A server that closes every connection from `down[0]` to `down[1]`, and always those of some requests."""

    def reply(job: Job, now: float) -> Reply:
        if job.index in crashes or down[0] <= now < down[1]:
            return Reply(0.0 if job.index not in crashes else reply_s, FAILED)
        if now < down[0] < now + reply_s:
            return Reply(down[0] - now, FAILED)
        return Reply(reply_s)

    return reply


def ended(pool: Pool, kind: str) -> list[int]:
    return sorted(index for _, index, how in pool.ends if how == kind)


@pytest.mark.parametrize("keeps", [0, 1])
@pytest.mark.parametrize("places", [1, 2, 3, 20])
def test_a_minute_without_any_answer_costs_no_request_and_few_attempts(places: int, keeps: int) -> None:
    p = free(max_concurrency=places, backoff_base_s=0.5, backoff_keeps_permit=keeps)
    pool = Pool(p, [1.0] * 300, server((5.0, 65.0))).run()
    assert ended(pool, OK) == list(range(300))
    assert sum(5.0 <= at < 65.0 for at in pool.times()) <= 60


@pytest.mark.parametrize("keeps", [0, 1])
def test_thirteen_minutes_with_twenty_in_flight_cost_about_a_probe_a_minute(keeps: int) -> None:
    p = free(max_concurrency=20, backoff_keeps_permit=keeps)
    pool = Pool(p, [1.0] * 1_500, server((20.0, 800.0))).run()
    assert ended(pool, OK) == list(range(1_500))
    late = [at for at in pool.times() if 140.0 <= at < 800.0]
    assert len(late) <= 11
    # What died as it began has lost no attempt: all of them could have failed four times more.
    assert {launch.attempt for launch in pool.launches if launch.at >= 800.0} == {1}


def test_the_probes_go_out_at_a_widening_interval_and_the_rest_when_one_is_answered() -> None:
    p = free(max_concurrency=3, backoff_base_s=1.0, jitter_ratio=0.0)
    pool = Pool(p, [1.0] * 20, server((0.0, 100.0))).run()
    times = pool.times()
    gaps = [b - a for a, b in pairwise(times[3:]) if a < 100.0]
    assert times[:3] == [0.0] * 3
    assert [round(gap, 6) for gap in gaps[:6]] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert pool.s.outage_from == 0.0
    answered_at = next(at for at, _, how in pool.ends if how == OK)
    assert pool.s.outage_until == answered_at
    assert sum(100.0 <= at < answered_at for at in times) == 1
    assert pool.s.probe_at == -INF


def test_one_request_that_always_fails_alone_opens_nothing_and_is_lost_after_its_attempts() -> None:
    for places in (1, 3):
        pool = Pool(free(max_concurrency=places), [1.0], server((INF, INF), crashes=(0,))).run()
        assert ended(pool, EXHAUSTED) == [0]
        assert pool.times() == [0.0, 3.0, 8.0, 17.0, 34.0]
        assert pool.s.outage_from == -INF


@pytest.mark.parametrize("places", [1, 2, 8])
@pytest.mark.parametrize("crashes", [(0,), (3, 4), (0, 10, 20, 30)])
def test_requests_that_crash_the_server_are_lost_and_take_no_other_with_them(
    places: int, crashes: tuple[int, ...]
) -> None:
    pool = Pool(free(max_concurrency=places), [1.0] * 120, server((INF, INF), crashes=crashes)).run()
    assert ended(pool, EXHAUSTED) == list(crashes)
    assert len(pool.launches) <= 120 + len(crashes) * (2 * 5 + 8)


def test_an_answer_of_whatever_kind_shows_that_the_provider_is_there() -> None:
    p = free()
    for answer in ("settled", "throttled", "answered", "failed"):
        s = law.State(in_flight=9)
        for request in range(2):
            law.failed(p, s, request, 1, 0, 0, -1.0, 0.0, 0.0, 1.0, 0.0)
        if answer == "settled":
            law.settled(p, s, of_tokens(1.0), of_tokens(1.0), 0.0, 1.0)
        elif answer == "throttled":
            law.throttled(p, s, of_tokens(1.0), 1, -1.0, 0.0, 0.0, 1.0, 0.0)
        elif answer == "answered":
            law.answered(p, s, 1.0)
        else:
            law.failed(p, s, 4, 1, 0, 1, -1.0, 0.0, 0.0, 1.0, 0.0)
        law.failed(p, s, 5, 1, 0, 0, -1.0, 0.0, 0.0, 1.0, 0.0)
        assert s.probe_at == -INF, answer
    law.failed(p, s, 6, 1, 0, 0, -1.0, 0.0, 0.0, 1.0, 0.0)
    law.failed(p, s, 7, 1, 0, 0, -1.0, 0.0, 0.0, 1.0, 0.0)
    assert (s.outage_from, s.outage_until, s.probe_at) == (1.0, INF, 3.0)
    assert law.admission(p, s, of_tokens(1.0), law.RETRY, 1.0) == (3.0, law.OUTAGE)


def test_after_a_day_without_an_answer_attempts_count_again() -> None:
    pool = Pool(free(), [1.0] * 4, server((0.0, math.inf))).run()
    assert ended(pool, EXHAUSTED) == [0, 1, 2, 3]
    last = max(pool.times())
    assert law.OUTAGE_MAX_S < last < law.OUTAGE_MAX_S + 600.0
