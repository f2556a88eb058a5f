"""The SimPy driver, read as timetables: who launches when, who waits for what, and how each request ends.

Services are exact (recorded times), chance is switched off where it is not the subject, and the times in each table
follow from the rules by hand. What holds for every scenario is in `test_driver_properties`, formulas of queueing are in
`test_theory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from governor.law import FIXED_S
from governor.model.errors import FailureCode
from governor.model.policy import Policy
from governor.model.requests import Outcome
from tests.scenarios import Run, batch, run, scenario_of

REFUSAL_S = 0.05


def quiet(**knobs: Any) -> Policy:
    """A policy whose knobs do not bind and whose jitter is off, but for those that are named. Reserves size + cap."""
    base: dict[str, Any] = {
        "max_concurrency": 100,
        "stagger_seconds": 0.0,
        "jitter_ratio": 0.0,
        "tpm_limit": 10**9,
        "tpm_headroom": 0.0,
        "charge_rule": "prompt_plus_max",
    }
    return Policy(**(base | knobs))


def launches(done: Run) -> list[tuple[float, int, str, int]]:
    """(launched, request, lane, attempt) in order of launch."""
    return sorted((round(a.launched_s, 9), a.request, a.lane, a.attempt) for a in done.rows)


def launched_at(done: Run, request: int) -> list[float]:
    return [a.launched_s for a in sorted(done.rows, key=lambda a: a.launched_s) if a.request == request]


def in_flight_max(done: Run) -> int:
    """Most attempts between launch and end at once; who ends at an instant makes room for who starts at it."""
    ends = sorted([(a.finished_s, -1) for a in done.rows] + [(a.launched_s, 1) for a in done.rows])
    level = most = 0
    for _, step in ends:
        level += step
        most = max(most, level)
    return most


# ---------------------------------------------------------------- the guardrails


@pytest.mark.parametrize("run_seed", range(10))
def test_ten_runs_of_7000_tokens_keep_the_guardrails(run_seed: int) -> None:
    scenario = scenario_of(batch([7_000] * 10, 5.0), provider={"tpm": 30_000, "charge_rule": "fixed"}, seed=run_seed)
    done = run(scenario)
    at = [launched_at(done, i)[0] for i in range(10)]
    # Three of 7,000 fit into 25,500, so every fourth waits for the next minute, which its own launch anchors.
    assert at[0::3] == pytest.approx([i * FIXED_S for i in range(4)])
    gaps = [b - a for i, (a, b) in enumerate(pairwise(at)) if i % 3 != 2]
    assert all(12.0 <= gap <= 18.0 for gap in gaps)
    assert len(set(gaps)) == len(gaps)  # jitter: no two alike
    assert done.tally.throttled == 0
    assert (done.tally.completed, done.tally.attempts, done.tally.reserved_tokens) == (10, 10, 70_000)
    summary = done.tally.summary(done.case.grant)
    assert (summary.stagger_delays, summary.tpm_deferrals) == (6, 3)


@pytest.mark.parametrize("service_s", [5.0, 31.7, 55.0, 100.0])
@pytest.mark.parametrize("run_seed", range(5))
def test_guardrails_hold_for_any_length_of_answer(service_s: float, run_seed: int) -> None:
    scenario = scenario_of(
        batch([7_000] * 10, service_s), provider={"tpm": 30_000, "charge_rule": "fixed"}, seed=run_seed
    )
    done = run(scenario)
    at = sorted(a.launched_s for a in done.rows)
    assert in_flight_max(done) <= 3
    assert done.tally.peak_in_flight <= 3
    assert all(b - a >= 12.0 for a, b in pairwise(at))
    anchor, used = -60.0, 0
    for moment in at:
        anchor, used = (moment, 7_000) if moment >= anchor + 60.0 else (anchor, used + 7_000)
        assert used <= 25_500
    assert done.tally.throttled == 0
    assert done.tally.completed == 10


def test_a_deferral_counts_once_however_often_it_is_asked_about() -> None:
    # Request 3 stands at the head from 0 to 60 while 40 answers come and go, and each makes the driver ask again.
    policy = quiet(tpm_limit=43_000, tpm_window="fixed")
    done = run(scenario_of(batch([1_000] * 40 + [7_000], [0.5 + i for i in range(40)] + [1.0]), policy))
    assert launched_at(done, 40) == [FIXED_S]
    assert done.tally.summary(done.case.grant).tpm_deferrals == 1
    # Two requests defer for two causes each: four.
    policy = quiet(max_concurrency=1, stagger_seconds=10.0)
    done = run(scenario_of(batch([1] * 3, 4.0), policy))
    assert launches(done) == [(0.0, 0, "main", 1), (10.0, 1, "main", 1), (20.0, 2, "main", 1)]
    assert (done.tally.deferrals[1], done.tally.deferrals[2]) == (2, 2)


# ---------------------------------------------------------------- retries


def refusing(size: int, **changes: Any) -> dict[str, Any]:
    """A provider whose day is used up: it refuses requests of this size for hours."""
    return {"tpd": size, "day_tokens_used": size, "retry_after": "absent", **changes}


def test_retries_start_2_4_8_s_after_the_429_was_received_and_the_last_after_a_minute() -> None:
    # 5 attempts of 5,000 fit into one minute's 25,500, so nothing but the backoff makes them wait. The last one comes
    # when a limit per minute must have opened again.
    scenario = scenario_of(batch([5_000]), Policy(jitter_ratio=0.0, est_tokens_per_run=5_000), provider=refusing(5_000))
    done = run(scenario)
    received = [a.finished_s for a in done.rows]
    assert [b.launched_s - at for at, b in zip(received, done.rows[1:], strict=False)] == pytest.approx(
        [2, 4, 8, FIXED_S - 14 - 4 * REFUSAL_S]
    )
    assert [a.finished_s - a.launched_s for a in done.rows] == pytest.approx([REFUSAL_S] * 5)
    assert [a.error_code for a in done.rows] == ["", "", "", "", "OPENAI_RATE_LIMIT_EXHAUSTED"]
    assert {a.outcome for a in done.rows} == {Outcome.THROTTLED}
    assert {a.status for a in done.rows} == {429}
    assert [a.retry_after_s for a in done.rows] == [-1.0] * 5
    assert done.tally.failures == {"OPENAI_RATE_LIMIT_EXHAUSTED": 1}
    assert done.tally.waits_s[8] == pytest.approx(FIXED_S - 4 * REFUSAL_S)


def test_backoff_doubles_to_32_and_is_capped_at_60_from_six_attempts_on() -> None:
    policy = quiet(retry_max_attempts=8)
    done = run(scenario_of(batch([5]), policy, provider=refusing(5)))
    assert [a.waited_backoff_s for a in done.rows] == pytest.approx([0, 2, 4, 8, 16, 32, 60, 60])


def test_jitter_of_a_backoff_only_adds_a_fifth_at_most_and_3_s_at_most() -> None:
    waits = []
    for run_seed in range(30):
        done = run(
            scenario_of(batch([5]), Policy(est_tokens_per_run=5, retry_max_attempts=6), provider=refusing(5)), run_seed
        )
        waits.append([a.waited_backoff_s for a in done.rows[1:]])
    for nominal, drawn in zip([2.0, 4.0, 8.0, 16.0, 32.0], np.transpose(waits), strict=True):
        span = min(0.2 * nominal, 3.0)
        assert drawn.min() >= nominal
        assert drawn.max() <= nominal + span
        # Uniform: of 30 draws the smallest and the largest lie in the outer thirds but for (2/3)^30 = 5e-6 each.
        assert drawn.min() < nominal + span / 3
        assert drawn.max() > nominal + span * 2 / 3


def test_retries_take_no_stagger_slot() -> None:
    policy = Policy(jitter_ratio=0.0, est_tokens_per_run=2_000, retry_max_attempts=3, deadline_seconds=100.0)
    done = run(scenario_of(batch([2_000] * 2), policy, provider=refusing(2_000)))
    # The second run's slot stays at 15 s, between and in spite of the first one's retries.
    assert launches(done) == [
        (0.0, 0, "main", 1),
        (2.05, 0, "main", 2),
        (6.1, 0, "main", 3),
        (15.0, 1, "main", 1),
        (17.05, 1, "main", 2),
        (21.1, 1, "main", 3),
    ]


def test_retries_go_through_the_budget() -> None:
    # 3 x 7,000 are booked: the fourth attempt (due at 14.15) waits for the next minute.
    done = run(scenario_of(batch([7_000]), Policy(jitter_ratio=0.0), provider=refusing(7_000)))
    fourth = done.rows[3]
    assert (fourth.attempt, fourth.launched_s) == (4, FIXED_S)
    assert fourth.eligible_s == pytest.approx(14.15)
    assert fourth.waited_tpm_s == pytest.approx(FIXED_S - 14.15)


@pytest.mark.parametrize(("style", "wait_s"), [("ms", 12.3), ("seconds", 13.0)])
def test_a_retry_after_wins_over_the_backoff(style: str, wait_s: float) -> None:
    # Used 6,000 + requested 6,050 - limit 10,000 = 2,050 tokens over: 12.3 s at 10,000 a minute.
    provider = {"tpm": 10_000, "retry_after": style, "failed_requests_count": False}
    done = run(scenario_of(batch([6_000, 6_050]), quiet(), provider=provider))
    refused, retried = (a for a in done.rows if a.request == 1)
    assert refused.retry_after_s == wait_s
    # Two milliseconds on top: a provider floors what it prints.
    assert retried.launched_s == pytest.approx(REFUSAL_S + wait_s + 0.002)
    assert retried.outcome == Outcome.OK


def test_a_hold_keeps_new_work_back_until_the_retry_has_gone() -> None:
    # Request 1 comes a second after the first: 6,000 - 1,000/6 used + 6,050 - 10,000 is 11.3 s over.
    workload = batch([6_000, 6_050, 10])
    provider = {"tpm": 10_000, "failed_requests_count": False}
    retry_at = pytest.approx(1.0 + REFUSAL_S + 11.3, abs=0.003)
    done = run(scenario_of(workload, quiet(stagger_seconds=1.0), provider=provider))
    assert launched_at(done, 2) == [2.0]
    # Its ten tokens are what the retry then lacks.
    assert len(launched_at(done, 1)) == 3
    done = run(scenario_of(workload, quiet(stagger_seconds=1.0, hold_on_throttle=True), provider=provider))
    assert launched_at(done, 1) == [1.0, retry_at]
    last = next(a for a in done.rows if a.request == 2)
    # As long after the retry as its refusal took: by then another one would have been heard.
    assert last.launched_s == pytest.approx(1.0 + 11.3 + 2 * REFUSAL_S, abs=0.003)
    # Its slot came a second after the refused launch; the rest of its time at the head was the hold's.
    assert last.waited_hold_s == pytest.approx(11.3 + REFUSAL_S, abs=0.003)


def test_who_backs_off_keeps_its_place_or_gives_it_to_the_next() -> None:
    provider = {"rpd": 1, "day_requests_used": 1, "retry_after": "absent"}
    for keeps, expected in (
        (True, [(0.0, 0), (2.05, 0), (6.1, 0), (6.15, 1), (8.2, 1), (12.25, 1)]),
        # At 2.05 the other one's refusal arrives and its own retry falls due: nobody is in the way.
        (False, [(0.0, 0), (0.05, 1), (2.05, 0), (2.1, 1), (6.1, 0), (6.15, 1)]),
    ):
        policy = quiet(max_concurrency=1, backoff_keeps_permit=keeps, retry_max_attempts=3, deadline_seconds=50.0)
        done = run(scenario_of(batch([1, 1]), policy, provider=provider))
        assert [(at, request) for at, request, _, _ in launches(done)] == expected
        assert in_flight_max(done) == 1


def test_an_answer_that_does_not_come_is_a_time_out_and_tried_again() -> None:
    policy = quiet(request_timeout_seconds=20.0, retry_max_attempts=2)
    done = run(scenario_of(batch([5], 50.0), policy))
    assert [(a.launched_s, a.finished_s, a.outcome, a.error_code) for a in done.rows] == [
        (0.0, 20.0, Outcome.TIMEOUT, ""),
        (22.0, 42.0, Outcome.TIMEOUT, "OPENAI_TIMEOUT"),
    ]
    assert [a.charged_tokens for a in done.rows] == [5, 5]  # it was let in, and so charged


def test_a_refusal_that_comes_too_late_is_a_time_out_that_was_not_charged() -> None:
    policy = quiet(request_timeout_seconds=0.01, retry_max_attempts=1)
    done = run(scenario_of(batch([5]), policy, provider=refusing(5)))
    assert [(a.finished_s, a.outcome, a.charged_tokens) for a in done.rows] == [(0.01, Outcome.TIMEOUT, 0)]
    assert done.tally.charged_tokens == 0


@pytest.mark.parametrize(
    ("faults", "outcome", "status", "code"),
    [
        ({"error_ratio": 1.0}, Outcome.SERVER_ERROR, 500, "OPENAI_SERVER_ERROR"),
        ({"drop_ratio": 1.0}, Outcome.DROPPED, 0, "OPENAI_CONNECTION_DROPPED"),
    ],
)
def test_faults_back_off_too_and_end_under_their_own_name(
    faults: dict[str, float], outcome: Outcome, status: int, code: str
) -> None:
    done = run(scenario_of(batch([5], 3.0), quiet(retry_max_attempts=3), provider={"faults": faults}))
    assert [(a.outcome, a.status, a.error_code) for a in done.rows] == [
        (outcome, status, ""),
        (outcome, status, ""),
        (outcome, status, code),
    ]
    assert [a.waited_backoff_s for a in done.rows] == pytest.approx([0.0, 2.0, 4.0])


# ---------------------------------------------------------------- finalize passes

EMPTY_CUTS = {"faults": {"empty_cut_ratio": 1.0}}


def test_a_finalize_pass_lowers_the_cap_to_2_and_goes_before_new_work() -> None:
    # Only request 0 is cut (its answer would have 900 tokens). Its pass takes 10 s too.
    workload = batch([5] * 5, [10.0, 30.0, 40.0, 1.0, 1.0], outputs=[900, 50, 50, 50, 50], cap=100)
    done = run(scenario_of(workload, quiet(max_concurrency=3), provider=EMPTY_CUTS, finalize=True))
    # At 10 two others are in flight, which is the lower cap: the pass waits for one of them to end, new work for both.
    assert launches(done) == [
        (0.0, 0, "main", 1),
        (0.0, 1, "main", 1),
        (0.0, 2, "main", 1),
        (30.0, 0, "finalize", 1),
        (40.0, 3, "main", 1),
        (40.0, 4, "main", 1),
    ]
    assert done.tally.finalize_passes == 1
    assert (done.tally.requests, done.tally.attempts) == (5, 6)
    cut, last = (a for a in done.rows if a.request == 0)
    assert (cut.output_tokens, cut.error_code) == (100, "")
    assert (last.submitted_s, last.output_tokens, last.waited_concurrency_s) == (10.0, 900, 20.0)
    assert done.tally.latencies_s[-1] == 41.0  # counted from the arrival, finalize pass included


def test_without_lowering_a_finalize_pass_takes_the_place_that_its_answer_left() -> None:
    workload = batch([5] * 4, [10.0, 30.0, 40.0, 1.0], outputs=[900, 50, 50, 50], cap=100)
    policy = quiet(max_concurrency=3, finalize_lowers_concurrency=False)
    done = run(scenario_of(workload, policy, provider=EMPTY_CUTS, finalize=True))
    assert launches(done)[3:] == [(10.0, 0, "finalize", 1), (20.0, 3, "main", 1)]


def test_finalize_passes_only_where_the_cut_answer_has_no_text_and_they_are_asked_for() -> None:
    workload = batch([5] * 200, 1.0, outputs=900, cap=100)
    for ratio, finalize, least, most in ((0.0, True, 0, 0), (1.0, False, 0, 0), (1.0, True, 200, 200)):
        provider = {"faults": {"empty_cut_ratio": ratio}}
        done = run(scenario_of(workload, quiet(), provider=provider, finalize=finalize))
        assert least <= done.tally.finalize_passes <= most
    whole = batch([5] * 10, 1.0, outputs=100, cap=100)  # exactly at its cap: not cut
    assert run(scenario_of(whole, quiet(), provider=EMPTY_CUTS, finalize=True)).tally.finalize_passes == 0


def test_tokens_that_are_billed_beside_the_answers_are_counted() -> None:
    # The answer takes 30 s and is given up after 20: both attempts are paid for and come to nothing.
    policy = quiet(request_timeout_seconds=20.0, retry_max_attempts=2)
    tally = run(scenario_of(batch([70], 30.0, outputs=[40], cap=100), policy)).tally
    assert (tally.extra_prompt_tokens, tally.extra_output_tokens) == (2 * 70, 2 * 40)
    # A finalize pass sends the prompt again and writes its answer anew; a refusal costs nothing.
    workload = batch([70] * 3, 1.0, outputs=[900, 50, 50], cap=100)
    provider = {**EMPTY_CUTS, "tpm": 1_200, "retry_after": "absent"}
    patient = quiet(retry_max_attempts=20, finalize_max_tokens=1_000)
    tally = run(scenario_of(workload, patient, provider=provider, finalize=True)).tally
    assert (tally.throttled > 0, tally.finalize_passes) == (True, 1)
    assert (tally.extra_prompt_tokens, tally.extra_output_tokens) == (70, 900)


def test_retries_go_before_finalize_passes_and_these_before_new_work() -> None:
    # Sizes with their cap: 105, 950 (refused beside the first), 120, 105. Request 2 holds a place until 40.05.
    workload = batch([5, 850, 20, 5], [20.0, 5.0, 40.0, 1.0], outputs=[900, 50, 50, 50], cap=100)
    provider = {**EMPTY_CUTS, "tpm": 1_000, "retry_after": "absent", "failed_requests_count": False}
    policy = quiet(max_concurrency=2, backoff_keeps_permit=False, backoff_base_seconds=8.0, finalize_max_tokens=10)
    done = run(scenario_of(workload, policy, provider=provider, finalize=True))
    # When the cut answer frees the other place at 20, the retry (due since 8.05), its own pass and request 3 all wait.
    assert launches(done) == [
        (0.0, 0, "main", 1),
        (0.0, 1, "main", 1),
        (0.05, 2, "main", 1),
        (20.0, 1, "main", 2),
        (25.0, 0, "finalize", 1),
        (40.05, 3, "main", 1),
    ]


def test_a_finalize_pass_that_never_fits_loses_the_request_and_closes() -> None:
    workload = batch([5, 5], 1.0, outputs=900, cap=100)
    policy = quiet(max_concurrency=1, tpm_limit=500, finalize_max_tokens=600)
    done = run(scenario_of(workload, policy, provider=EMPTY_CUTS, finalize=True))
    assert launches(done) == [(0.0, 0, "main", 1), (1.0, 1, "main", 1)]
    assert done.tally.failures == {FailureCode.REQUEST_TOO_LARGE: 2}
    assert done.state.finalize_open == 0


# ---------------------------------------------------------------- deadlines, quota, sizes


def test_a_retry_that_still_waits_at_its_deadline_ends_there() -> None:
    # The budget is used up until 60 s; the deadline of request 0 counts from its launch at 0.
    policy = quiet(tpm_limit=1_000, tpm_window="fixed", deadline_seconds=30.0)
    provider = {"faults": {"error_ratio": 1.0}}
    done = run(scenario_of(batch([900, 100], [1.0, 2.0]), policy, provider=provider))
    assert launches(done) == [(0.0, 0, "main", 1), (0.0, 1, "main", 1)]
    assert done.tally.failures == {FailureCode.DEADLINE_EXCEEDED: 2}
    assert done.tally.last_s == 30.0


def test_a_deadline_counts_from_the_first_launch_not_from_the_arrival() -> None:
    done = run(scenario_of(batch([5, 5], 20.0), quiet(max_concurrency=1, deadline_seconds=25.0)))
    assert launches(done) == [(0.0, 0, "main", 1), (20.0, 1, "main", 1)]
    assert done.tally.completed == 2


def test_a_finalize_pass_that_still_waits_at_the_deadline_ends_there() -> None:
    # The pass of request 0 waits from 20 on for one of two others to end; its request's time is over before, at 30.
    workload = batch([5] * 4, [20.0, 40.0, 40.0, 1.5], outputs=[900, 50, 50, 50], cap=100)
    policy = quiet(max_concurrency=3, stagger_seconds=1.0, deadline_seconds=30.0, retry_max_attempts=1)
    done = run(scenario_of(workload, policy, provider=EMPTY_CUTS, finalize=True))
    assert [(a.launched_s, a.finished_s, a.request, a.lane, a.outcome) for a in done.rows] == [
        (0.0, 20.0, 0, "main", Outcome.OK),
        (1.0, 31.0, 1, "main", Outcome.TIMEOUT),
        (30.0, 31.5, 3, "main", Outcome.OK),
        (2.0, 32.0, 2, "main", Outcome.TIMEOUT),
    ]
    assert done.tally.failures == {FailureCode.DEADLINE_EXCEEDED: 1, FailureCode.TIMEOUT: 2}


def test_when_the_credit_is_gone_everything_that_waits_ends_and_nothing_is_launched_any_more() -> None:
    # Request 0 is cut at 5, after the credit was found gone at 2.05: no finalize pass either.
    workload = batch([5] * 5, [5.0, 2.0, 1.0, 1.0, 1.0], outputs=[900, 50, 50, 50, 50], cap=100)
    provider = {**EMPTY_CUTS, "quota_requests": 2}
    done = run(scenario_of(workload, quiet(max_concurrency=2), provider=provider, finalize=True))
    assert [(round(a.finished_s, 9), a.request, a.outcome, a.error_code) for a in done.rows] == [
        (2.0, 1, Outcome.OK, ""),
        (2.05, 2, Outcome.QUOTA, "INSUFFICIENT_QUOTA"),
        (5.0, 0, Outcome.OK, ""),
    ]
    assert done.tally.failures == {"INSUFFICIENT_QUOTA": 4}
    assert done.tally.completed == 1


def test_a_run_is_over_when_the_credit_is_gone_and_what_would_arrive_later_is_lost() -> None:
    workload = batch([5] * 3, 1.0, arrival_s=[0.0, 10.0, 20.0])
    done = run(scenario_of(workload, quiet(), provider={"quota_requests": 1}, arrivals="trace"))
    assert [a.outcome for a in done.rows] == [Outcome.OK, Outcome.QUOTA]
    assert done.tally.failures == {"INSUFFICIENT_QUOTA": 2}
    assert done.tally.last_s == done.rows[-1].finished_s == 10.0 + REFUSAL_S


def test_a_request_above_the_limit_is_refused_at_once_and_one_above_the_budget_runs_alone() -> None:
    policy = quiet(tpm_limit=1_000, tpm_headroom=0.2, tpm_window="bucket")
    done = run(scenario_of(batch([300, 1_001, 900, 300, 10], [5.0, 1.0, 40.0, 1.0, 1.0]), policy))
    at = {request: moment for moment, request, _, _ in launches(done)}
    # Request 2 (900 > 800) waits until nothing is in flight (5 s) and the bucket is full: 300 tokens at 800 a minute.
    assert at[2] == pytest.approx(22.5)
    # Nobody joins it, although there would be room for 10 tokens from 30.75 s on.
    assert at[3] == pytest.approx(62.5)
    assert at[4] == pytest.approx(62.5)
    assert 1 not in at
    assert done.tally.failures == {"REQUEST_TOO_LARGE": 1}


# ---------------------------------------------------------------- order and time


def test_new_work_goes_as_submitted_or_longest_expected_first() -> None:
    # Sizes count with the cap of 10 each: equal caps, so the larger reservation goes first, then the earlier one.
    workload = batch([5, 7, 5, 9], 1.0, cap=10)
    for order, expected in (("fifo", [0, 1, 2, 3]), ("longest_first", [3, 1, 0, 2])):
        done = run(scenario_of(workload, quiet(max_concurrency=1, launch_order=order)))
        assert [request for _, request, _, _ in launches(done)] == expected
    caps = workload.with_(max_tokens=np.array([1, 2, 4, 3]))
    done = run(scenario_of(caps, quiet(max_concurrency=1, launch_order="longest_first")))
    assert [request for _, request, _, _ in launches(done)] == [2, 3, 1, 0]


def test_at_one_instant_answers_come_before_retries_and_these_before_arrivals() -> None:
    # One place. At 8: request 0's answer, the retry of request 1 and the arrival of request 3, all at once.
    provider = {"tpm": 1_000, "retry_after": "absent", "failed_requests_count": False}
    provider["faults"] = {"refusal_s": 1.0}
    workload = batch([900, 200, 10, 10], [8.0, 1.0, 1.0, 1.0], cap=0, arrival_s=[0.0, 0.0, 0.5, 8.0])
    policy = quiet(max_concurrency=2, backoff_keeps_permit=False, backoff_base_seconds=7.0)
    done = run(scenario_of(workload, policy, provider=provider, arrivals="trace"))
    # The refused request's place goes to request 2 at 1. At 8 both places are free: the retry, then the arrival.
    assert launches(done) == [
        (0.0, 0, "main", 1),
        (0.0, 1, "main", 1),
        (1.0, 2, "main", 1),
        (8.0, 1, "main", 2),
        (8.0, 3, "main", 1),
    ]
    # With one place only, the answer lets in who waited; the retry that falls due at the same instant comes after it.
    policy = quiet(max_concurrency=1, backoff_keeps_permit=False, backoff_base_seconds=3.0, retry_max_attempts=3)
    provider = {"rpd": 1, "day_requests_used": 1, "retry_after": "absent", "faults": {"refusal_s": 2.0}}
    done = run(scenario_of(batch([1] * 4), policy, provider=provider))
    assert [(at, request) for at, request, _, _ in launches(done)][:4] == [(0.0, 0), (2.0, 1), (4.0, 2), (6.0, 0)]


def test_an_arrival_at_the_instant_of_a_wake_is_there_when_the_queue_is_asked() -> None:
    workload = batch([5] * 3, 1.0, arrival_s=[0.0, 1.0, 15.0]).with_(max_tokens=np.array([1, 1, 9]))
    policy = quiet(stagger_seconds=15.0, launch_order="longest_first")
    done = run(scenario_of(workload, policy, arrivals="trace"))
    assert [(at, request) for at, request, _, _ in launches(done)] == [(0.0, 0), (15.0, 2), (30.0, 1)]


def test_arrivals_are_waited_for_and_nobody_is_launched_before_it_arrives() -> None:
    workload = batch([5] * 4, 2.0, arrival_s=[3.0, 3.5, 100.0, 100.0])
    done = run(scenario_of(workload, quiet(max_concurrency=1), arrivals="trace"))
    assert [(at, request) for at, request, _, _ in launches(done)] == [(3.0, 0), (5.0, 1), (100.0, 2), (102.0, 3)]
    assert list(done.tally.latencies_s) == [2.0, 3.5, 2.0, 4.0]


def test_waiting_goes_to_the_knob_that_holds_the_head() -> None:
    # Two places and a slot every 15 s, services of 20 s: request 2 at the head waits 5 s for a place, 10 for its slot.
    done = run(scenario_of(batch([5] * 3, 20.0), quiet(max_concurrency=2, stagger_seconds=15.0)))
    assert [a.launched_s for a in done.rows] == [0.0, 15.0, 30.0]
    assert [(a.waited_stagger_s, a.waited_concurrency_s) for a in done.rows] == [(0.0, 0.0), (15.0, 0.0), (25.0, 5.0)]
    assert done.tally.waits_s[1:3] == [5.0, 40.0]


def test_every_budget_has_its_own_cause() -> None:
    for knobs, column, wait_s in (
        ({"tpm_limit": 60, "tpm_window": "bucket"}, "waited_tpm_s", 40.0),
        ({"rpm_limit": 1, "tpm_window": "fixed"}, "waited_rpm_s", FIXED_S),
        ({"rpd_limit": 1}, "waited_day_s", 86_400.0),
        ({"tpd_limit": 80}, "waited_day_s", 21_600.0),
    ):
        done = run(scenario_of(batch([50, 50], 1.0), quiet(**knobs)))
        assert [getattr(a, column) for a in done.rows] == pytest.approx([0.0, wait_s]), knobs
        assert done.rows[1].launched_s == pytest.approx(wait_s)


def test_settling_lets_the_next_one_in_when_the_answer_is_shorter_than_reserved() -> None:
    # 600 of 1,000 reserved; 110 are used, so at the answer 490 come back and the next 600 fit at once.
    workload = batch([100, 100], 5.0, outputs=10, cap=500)
    for settle, at in ((False, 12.0), (True, 5.0)):
        done = run(scenario_of(workload, quiet(tpm_limit=1_000, tpm_window="bucket", settle=settle)))
        assert launched_at(done, 1) == pytest.approx([at])


def test_nothing_to_do_ends_at_once() -> None:
    done = run(scenario_of(batch([]), quiet()))
    assert (done.rows, done.tally.requests, done.tally.last_s) == ([], 0, 0.0)


@pytest.mark.parametrize("count", [4_095, 4_096, 4_097, 9_000])
def test_requests_are_read_in_chunks_without_a_seam(count: int) -> None:
    rng = np.random.default_rng(count)
    sizes: Sequence[int] = rng.integers(1, 1_000, count).tolist()
    done = run(scenario_of(batch(sizes, 1.0), quiet(max_concurrency=1, launch_order="longest_first")))
    assert [a.request for a in done.rows] == sorted(range(count), key=lambda i: (-sizes[i], i))
    assert done.tally.reserved_tokens == sum(sizes)
