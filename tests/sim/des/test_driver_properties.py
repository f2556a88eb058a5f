"""Nothing lost, nothing hidden: what holds for every run of the SimPy driver, whatever the scenario.

Scenarios are drawn whole from one number (`tests.scenarios.drawn`), which every failure prints. Each property is
checked from the attempt rows alone, by brute force and without the law: budgets by adding up what was launched, permits
by counting who is under way, backoffs from the row before. Only `test_the_tally_is_what_the_rows_add_up_to` also asks
`summary`, to hold the driver's two ways of counting to each other.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from governor import law
from governor.forecast.summary import tallied
from governor.model.requests import CAUSES, Attempt, Ended, Outcome
from sim.des.run import launch_order
from sim.experiment.experiment import attempt_rows, simulated
from sim.scenario.scenario import Scenario
from tests.scenarios import Run, drawn, run, shown

# A seed does not shrink: a smaller number is another scenario, not a smaller one.
any_seed = settings(
    max_examples=settings.default.max_examples,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
seeds = st.integers(0, 2**40)

WAITS = tuple(f"waited_{cause}_s" for cause in CAUSES[1:])
REFUSED = (Outcome.THROTTLED, Outcome.SLOW_DOWN, Outcome.QUOTA, Outcome.TOO_LARGE)
# No answer, so perhaps an outage.
UNANSWERED = (Outcome.SERVER_ERROR, Outcome.DROPPED, Outcome.TIMEOUT)
# Failures of requests that may end while nothing of theirs is under way.
UNLAUNCHED = {"REQUEST_TOO_LARGE", "INSUFFICIENT_QUOTA", "OPENAI_DEADLINE_EXCEEDED", "OUTWAITED"}
# No sync, no settling, no refunds: then a budget holds what was launched and nothing else.
PLAIN = {"sync_headers": False, "settle": False, "refund_throttled": False}


def ran(seed: int, **held: Any) -> Run:
    """The run of a drawn scenario, noted for the case that a check fails."""
    scenario = drawn(seed, **held)
    note(shown(seed, scenario))
    return run(scenario)


def lanes(rows: Iterable[Attempt]) -> dict[tuple[int, str], list[Attempt]]:
    """Attempts of each request in each lane, in order of their ends."""
    found: dict[tuple[int, str], list[Attempt]] = {}
    for a in rows:
        found.setdefault((a.request, a.lane), []).append(a)
    return found


def firsts(done: Run) -> list[Attempt]:
    """The first attempt of each request in each lane."""
    return [rows[0] for rows in lanes(done.rows).values()]


def silence(done: Run) -> list[int]:
    """Per row: how many attempts in a row, with this one, had ended without an answer; 0 for an answer."""
    counts = [0]
    for a in done.rows:
        counts.append(counts[-1] + 1 if a.outcome in UNANSWERED else 0)
    return counts[1:]


def outages(done: Run) -> list[tuple[float, float]]:
    """From when to when so many attempts in a row, of two requests at least, ended without an answer."""
    found: list[tuple[float, float]] = []
    spell: list[Attempt] = []
    for a in done.rows:
        if a.outcome in UNANSWERED:
            spell.append(a)
            continue
        found += _outage(spell, a.finished_s)
        spell = []
    return found + _outage(spell, math.inf)


def _outage(spell: list[Attempt], until: float) -> list[tuple[float, float]]:
    is_one = len(spell) >= law.OUTAGE_FAILURES and len({a.request for a in spell}) > 1
    return [(spell[0].finished_s, until)] if is_one else []


def waits_of(a: Attempt) -> list[float]:
    return [getattr(a, column) for column in WAITS]


# ---------------------------------------------------------------- every request ends exactly once


@any_seed
@given(seeds)
def test_every_request_ends_exactly_once(seed: int) -> None:
    done = ran(seed)
    by_lane = lanes(done.rows)
    failures: Counter[str] = Counter()
    completed = aside = 0
    for i in range(len(done.scenario.workload)):
        main, last = by_lane.get((i, "main"), []), by_lane.get((i, "finalize"), [])
        rows = main + last
        for a in rows[:-1]:
            # Nothing comes after a lost request, nor after an answer but its finalize pass.
            assert not a.error_code
            assert a.outcome != Outcome.OK or (last and a is main[-1])
        if last:
            assert main[-1].outcome == Outcome.OK
            assert done.scenario.finalize
        end = rows[-1] if rows else None
        if end is not None and end.outcome == Outcome.OK and not end.error_code:
            completed += 1
        elif end is not None and end.error_code:
            failures[end.error_code] += 1
            aside += end.lane == "main" and law.outlasts(done.case.params, end.retry_after_s)
    # Who is neither answered nor lost with an attempt ended without one under way, for one of three reasons; among
    # the answered there may be some whose finalize pass was never launched.
    rest = Counter(done.tally.failures) - failures
    # Who met too long a wait is set aside, and where the run stops before that is decided, lost by the stop.
    undecided = (failures - Counter(done.tally.failures)).total()
    assert undecided <= (aside if {"OUTWAITED", "INSUFFICIENT_QUOTA"} & set(done.tally.failures) else 0)
    assert set(rest) <= UNLAUNCHED
    assert done.tally.requests == len(done.scenario.workload) == done.tally.completed + done.tally.failed
    assert done.tally.failed == sum(done.tally.failures.values())
    assert done.tally.completed <= completed
    assert completed - done.tally.completed <= done.tally.finalize_passes - len({r for r, n in by_lane if n != "main"})
    assert len(done.tally.latencies_s) == done.tally.completed


@any_seed
@given(seeds)
def test_attempts_are_numbered_without_gaps_and_never_more_than_allowed(seed: int) -> None:
    done = ran(seed)
    silent = outages(done)
    for rows in lanes(done.rows).values():
        # An attempt that failed in an outage does not count: the next one has its number.
        assert rows[0].attempt == 1
        assert all(after.attempt - before.attempt in (0, 1) for before, after in pairwise(rows))
        for before, after in pairwise(rows):
            met = before.outcome in UNANSWERED and any(a <= before.finished_s <= b for a, b in silent)
            assert after.attempt > before.attempt or met
        assert rows[-1].attempt <= done.scenario.policy.retry_max_attempts
        assert all(a.outcome != Outcome.OK for a in rows[:-1])


# ---------------------------------------------------------------- time


@any_seed
@given(seeds)
def test_time_never_runs_backwards(seed: int) -> None:
    done = ran(seed)
    at = 0.0
    for a in done.rows:
        assert a.finished_s >= at
        assert 0.0 <= a.submitted_s <= a.eligible_s <= a.launched_s <= a.finished_s
        at = a.finished_s
    assert done.tally.last_s >= at or not done.rows
    for rows in lanes(done.rows).values():
        for before, after in pairwise(rows):
            assert after.submitted_s == before.finished_s
    if done.scenario.arrivals == "trace":
        arrival_s = done.scenario.workload.arrival_s
        assert all(a.submitted_s == arrival_s[a.request] for a in firsts(done) if a.lane == "main")


@any_seed
@given(seeds)
def test_nobody_waits_longer_than_the_time_out_or_past_the_deadline(seed: int) -> None:
    done = ran(seed)
    policy = done.scenario.policy
    first = {a.request: a.launched_s for a in firsts(done) if a.lane == "main"}
    for a in done.rows:
        limit = a.launched_s + policy.request_timeout_seconds
        if policy.deadline_seconds:
            limit = min(limit, first[a.request] + policy.deadline_seconds)
            assert a.launched_s <= first[a.request] + policy.deadline_seconds
        assert a.finished_s <= limit
        assert (a.outcome == Outcome.TIMEOUT) <= (a.finished_s == limit)


@any_seed
@given(seeds)
def test_waits_by_cause_add_up_to_the_time_between_submission_and_launch(seed: int) -> None:
    done = ran(seed)
    for a in done.rows:
        waits = waits_of(a)
        assert min(waits) >= 0.0
        assert math.fsum(waits) == pytest.approx(a.launched_s - a.submitted_s, rel=1e-9, abs=1e-6)
        assert a.waited_backoff_s == pytest.approx(a.eligible_s - a.submitted_s, rel=1e-9, abs=1e-9)


@any_seed
@given(seeds)
def test_retries_never_come_before_their_backoff(seed: int) -> None:
    done = ran(seed)
    policy, silent = done.scenario.policy, outages(done)
    for rows in lanes(done.rows).values():
        for before, after in pairwise(rows):
            wait_s = min(policy.backoff_base_seconds * 2.0 ** (before.attempt - 1), policy.backoff_cap_seconds)
            if 0.0 < before.retry_after_s <= policy.retry_after_cap_seconds:
                doubled_s = before.retry_after_s * 2.0 ** (before.attempt - 1)
                wait_s = max(before.retry_after_s, min(doubled_s, wait_s)) + 0.002
            elif (
                before.outcome in REFUSED and after.attempt == policy.retry_max_attempts and not policy.deadline_seconds
            ):
                first_s = min(a.launched_s for a in done.rows if a.request == before.request)
                wait_s = max(wait_s, first_s + law.FIXED_S - before.finished_s)
            jitter_s = min(policy.jitter_ratio * wait_s, policy.jitter_cap_seconds)
            backoff_s = after.eligible_s - before.finished_s
            # In an outage a request that has just failed lets another one have the next probe.
            longest_s = wait_s + jitter_s
            if before.outcome in UNANSWERED and any(a <= before.finished_s < b for a, b in silent):
                longest_s = max(longest_s, law.PROBE_GAP_MAX_S + law.PROBE_TURN_S)
            assert wait_s - 1e-9 <= backoff_s <= longest_s + 1e-9
            assert after.launched_s >= after.eligible_s


# ---------------------------------------------------------------- permits


def kept(done: Run) -> set[tuple[int, float]]:
    """The attempts, by request and launch, whose request keeps its place while it backs off.

    That is all of them where the policy says so, but those of which nothing came back, nor of the one before.
    """
    if not done.scenario.policy.backoff_keeps_permit:
        return set()
    return {(a.request, a.launched_s) for a, count in zip(done.rows, silence(done), strict=True) if count < 2}


def held(done: Run) -> list[tuple[float, float]]:
    """From when to when each permit is held, to its last row at least; a request that backs off may keep its own."""
    keeping = kept(done)
    spans = []
    for rows in lanes(done.rows).values():
        begin = rows[0].launched_s
        for before, after in pairwise(rows):
            if (before.request, before.launched_s) not in keeping:
                spans.append((begin, before.finished_s))
                begin = after.launched_s
        spans.append((begin, rows[-1].finished_s))
    return spans


def most(spans: Iterable[tuple[float, float]], *, ends_first: bool = True) -> int:
    """The most spans open at once, where at one instant ends come first (then spans of no length count nothing)."""
    steps = []
    for begin, end in spans:
        if begin < end or not ends_first:
            steps += [(begin, ends_first, 1), (end, not ends_first, -1)]
    level = peak = 0
    for _, _, step in sorted(steps, key=lambda step: step[:2]):
        level += step
        peak = max(peak, level)
    return peak


@any_seed
@given(seeds)
def test_never_more_in_flight_than_permits_and_none_leaks(seed: int) -> None:
    done = ran(seed)
    cap = done.scenario.policy.max_concurrency
    assert most(held(done)) <= cap
    # What backs off is not in flight. Answers that arrive at one instant are taken one by one, with launches between
    # them.
    flights = [(a.launched_s, a.finished_s) for a in done.rows]
    assert most(flights) <= done.tally.peak_in_flight <= min(cap, most(flights, ends_first=False))
    assert (done.state.in_flight, done.state.finalize_open, done.state.alone) == (0, 0, 0)


@any_seed
@given(seeds)
def test_while_a_finalize_pass_is_open_nobody_joins_above_the_lower_cap(seed: int) -> None:
    done = ran(seed, policy={"finalize_lowers_concurrency": True}, finalize=True)
    policy = done.scenario.policy
    cap = min(policy.max_concurrency, policy.finalize_max_concurrency)
    by_lane = lanes(done.rows)
    opened = [
        (by_lane[request, "main"][-1].finished_s, rows) for (request, lane), rows in by_lane.items() if lane != "main"
    ]
    spans, keeping = held(done), kept(done)
    for cut_at, rows in opened:
        for lane_rows in by_lane.values():
            again = [
                after for before, after in pairwise(lane_rows) if (before.request, before.launched_s) not in keeping
            ]
            for a in lane_rows[:1] + again:
                # Strictly inside: at the instant of its opening or its end, the order of events decides.
                if cut_at < a.launched_s < rows[-1].finished_s:
                    others = sum(begin < a.launched_s < end for begin, end in spans)
                    assert others < cap


@any_seed
@given(seeds)
def test_first_attempts_keep_the_stagger_within_its_jitter(seed: int) -> None:
    done = ran(seed)
    policy = done.scenario.policy
    gap = policy.stagger_seconds - min(policy.stagger_seconds * policy.jitter_ratio, policy.jitter_cap_seconds)
    at = sorted(a.launched_s for a in firsts(done))
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(at))


# ---------------------------------------------------------------- budgets


def excess_of_anchored_minutes(taken: list[tuple[float, float]], budget: float) -> float:
    """By how much any minute, anchored at the first launch after the last one expired, holds more than the budget."""
    worst, anchor, used = 0.0, -math.inf, 0.0
    for at, amount in taken:
        if at >= anchor + law.FIXED_S:
            anchor, used = at, 0.0
        # Above the budget it may go as the first of its minute, alone.
        worst = max(worst, used + (min(amount, budget) if used == 0.0 else amount) - budget)
        used += amount
    return worst


def excess_of_any_minute(taken: list[tuple[float, float]], budget: float) -> float:
    """By how much any 60 s (both ends included) hold more than the budget."""
    worst = 0.0
    for i, (at, amount) in enumerate(taken):
        before = sum(other for then, other in taken[:i] if then >= at - 60.0)
        worst = max(worst, before + (min(amount, budget) if before == 0.0 else amount) - budget)
    return worst


def excess_of_bucket(taken: list[tuple[float, float]], budget: float, rate_per_s: float) -> float:
    """By how much any stretch of launches takes more than the capacity and what is refilled meanwhile."""
    worst = 0.0
    for j, (at, amount) in enumerate(taken):
        total = min(amount, budget)  # above the budget: from a full bucket
        worst = max(worst, total - budget)
        for then, earlier in reversed(taken[:j]):
            total += earlier
            worst = max(worst, total - budget - rate_per_s * (at - then))
    return worst


def excesses(done: Run) -> dict[str, float]:
    """By how much each budget was exceeded, in its own unit."""
    policy, p = done.scenario.policy, done.case.params
    launched = sorted((a.launched_s, float(a.reserved_tokens)) for a in done.rows)
    counts = [(at, 1.0) for at, _ in launched]
    provider = done.scenario.provider
    found = {}
    for d, name, taken in ((law.TPM, "TPM", launched), (law.RPM, "RPM", counts)):
        if p.limit[d] > 0.0:
            if policy.tpm_window == "fixed":
                found[name] = excess_of_anchored_minutes(taken, p.budget[d])
            elif policy.tpm_window == "sliding":
                found[name] = excess_of_any_minute(taken, p.budget[d])
            else:
                found[name] = excess_of_bucket(taken, p.budget[d], p.rate_per_s[d])
    for d, name, taken, used in (
        (law.TPD, "TPD", launched, provider.day_tokens_used),
        (law.RPD, "RPD", counts, provider.day_requests_used),
    ):
        if p.limit[d] > 0.0:
            start = [(0.0, float(used))] if used else []
            # What was used before the run may be more than the budget; it is not ours to answer for.
            found[name] = excess_of_bucket(start + taken, max(p.budget[d], used), p.rate_per_s[d])
    return found


@settings(any_seed, max_examples=2 * settings.default.max_examples)
@given(seeds)
def test_no_budget_is_exceeded_in_the_sense_of_its_window(seed: int) -> None:
    done = ran(seed, policy=PLAIN)
    found = excesses(done)
    assert max(found.values(), default=0.0) <= 1e-3, found


@pytest.mark.parametrize("window", ["fixed", "sliding", "bucket"])
def test_the_brute_force_sees_a_budget_exceeded(window: str) -> None:
    """The same check against a budget a little smaller than the one that was kept: it must object."""
    seen = 0
    for seed in range(60):
        done = run(drawn(seed, policy={**PLAIN, "tpm_window": window}))
        smaller = dataclasses.replace(done.case.params, budget=[0.97 * b for b in done.case.params.budget])
        smaller = dataclasses.replace(smaller, rate_per_s=[0.97 * r for r in done.case.params.rate_per_s])
        seen += (
            max(excesses(dataclasses.replace(done, case=dataclasses.replace(done.case, params=smaller))).values())
            > 1e-3
        )
        if seen == 6:
            break
    assert seen == 6


@any_seed
@given(seeds)
def test_above_the_budget_runs_alone_and_above_the_limit_not_at_all(seed: int) -> None:
    done = ran(seed, policy={**PLAIN, "backoff_keeps_permit": False})
    p = done.case.params
    limit = min((x for x in (p.limit[law.TPM], p.limit[law.TPD]) if x > 0.0), default=math.inf)
    for a in done.rows:
        assert a.reserved_tokens <= limit
        if a.reserved_tokens > p.budget[law.TPM]:
            for b in done.rows:
                if b is not a:
                    assert b.finished_s <= a.launched_s or b.launched_s >= a.finished_s


# ---------------------------------------------------------------- counting


@any_seed
@given(seeds)
def test_the_tally_is_what_the_rows_add_up_to(seed: int) -> None:
    done = ran(seed)
    rows, tally = done.rows, done.tally
    columns = done.case.columns
    assert tally.attempts == len(rows)
    assert tally.throttled == sum(a.outcome in (Outcome.THROTTLED, Outcome.SLOW_DOWN) for a in rows)
    for a in rows:
        main = a.lane == "main"
        assert a.reserved_tokens == (columns.reserve if main else columns.finalize_reserve)[a.request]
        assert a.charged_tokens in (0, (columns.charge if main else columns.finalize_charge)[a.request])
        assert (a.charged_tokens == 0) >= (a.outcome in REFUSED)
    answered = [a for a in rows if a.outcome == Outcome.OK]
    assert tally.reserved_tokens == sum(a.reserved_tokens for a in rows)
    assert tally.charged_tokens == sum(a.charged_tokens for a in rows)
    assert tally.used_tokens == sum(a.prompt_tokens + a.output_tokens for a in answered)

    launched = Counter((a.request, a.lane) for a in rows)
    whole = not set(tally.failures) & UNLAUNCHED
    assert not whole or len(launched) == tally.requests + tally.finalize_passes
    for i, cause in enumerate(CAUSES[1:], 1):
        total = math.fsum(getattr(a, WAITS[i - 1]) for a in rows)
        # Who ended without an attempt under way has waited too, and no row says so.
        assert tally.waits_s[i] >= total * (1 - 1e-6) - 1e-6, cause
        assert tally.waits_s[i] <= total * (1 + 1e-6) + 1e-6 or not whole, cause
    assert tally.waits_s[0] == 0.0

    if whole:
        ends = {a.request: Ended(a.request, a.finished_s, a.error_code) for a in rows}
        stagger_delays, tpm_deferrals = tally.deferrals[law.STAGGER], tally.deferrals[law.BY_TPM]
        counted = tallied(rows, ends.values(), stagger_delays=stagger_delays, tpm_deferrals=tpm_deferrals)
        again = counted.summary(done.case.grant)
        ours = tally.summary(done.case.grant)
        for field in dataclasses.fields(ours):
            if field.name not in ("waits_s", "peak_in_flight"):
                expected = getattr(again, field.name)
                if isinstance(expected, float):
                    expected = pytest.approx(expected, rel=1e-9)
                assert getattr(ours, field.name) == expected, field.name


@any_seed
@given(seeds)
def test_a_request_defers_at_most_once_per_cause_and_attempt(seed: int) -> None:
    done = ran(seed)
    tally = done.tally
    for cause in range(law.CONCURRENCY, law.PAUSED + 1):
        assert tally.deferrals[cause] <= tally.attempts + tally.failed + tally.finalize_passes
        # Where anybody has waited, the head was deferred. (It may be deferred at an instant and go at the same one.)
        assert tally.deferrals[cause] > 0 or tally.waits_s[cause] == 0.0
    assert tally.deferrals[law.NOTHING] == 0


# ---------------------------------------------------------------- chance and oracles


@any_seed
@given(seeds)
def test_the_same_seed_gives_the_same_bytes(seed: int) -> None:
    scenario = drawn(seed)
    first, second = run(scenario), run(drawn(seed))
    assert repr(first.rows) == repr(second.rows)
    assert repr(first.tally) == repr(second.tally)
    assert repr(first.state) == repr(second.state)
    # Watching changes nothing.
    rows: list[Attempt] = []
    alone = simulated(first.case, scenario.seed, engine="simpy")
    watched = simulated(first.case, scenario.seed, attempt_rows(scenario, rows.append), engine="simpy")
    assert repr(alone) == repr(watched)
    assert repr(rows) == repr(first.rows)
    # Where requests were lost, the bound's input is all that was asked for, while the driver's is what was answered.
    work = alone.work if alone.failed else first.tally.work
    assert repr(alone) == repr(dataclasses.replace(first.tally, work=work))
    assert alone.work.requests + len(alone.work.arrivals_s) == len(scenario.workload)


def test_another_seed_gives_another_run() -> None:
    noisy = drawn(3, provider={"latency": {"sigma": 0.3}})
    assert repr(run(noisy, 1).rows) != repr(run(noisy, 2).rows)


def answers_permuted(scenario: Scenario, seed: int) -> Scenario:
    """The scenario whose hidden half (answers and recorded times) belongs to other requests."""
    workload = scenario.workload
    order = np.array(random.Random(seed).sample(range(len(workload)), len(workload)))
    changed = workload.with_(output_tokens=workload.output_tokens[order], recorded_s=workload.recorded_s[order])
    return scenario.with_(workload=changed)


def before(moment: float, done: Run) -> list[tuple[float, int]]:
    return sorted((a.launched_s, a.request) for a in done.rows if a.launched_s < moment)


@any_seed
@given(seeds)
def test_permuting_the_hidden_answers_changes_nothing_before_the_first_one_arrives(seed: int) -> None:
    scenario = drawn(seed)
    other = answers_permuted(scenario, seed)
    note(shown(seed, scenario))
    one, two = run(scenario), run(other)
    assert (one.case.columns.reserve == two.case.columns.reserve).all()
    orders = [launch_order(done.case.columns, done.case.params).tolist() for done in (one, two)]
    assert orders[0] == orders[1]
    first = min((a.finished_s for done in (one, two) for a in done.rows), default=math.inf)
    assert before(first, one) == before(first, two)


@any_seed
@given(seeds)
def test_a_batch_starts_in_the_order_of_what_is_known_at_submission(seed: int) -> None:
    """Never the answer: declared cap, then reservation, then place in the file; or the place in the file alone."""
    done = ran(seed, arrivals="batch")
    columns, policy = done.case.columns, done.scenario.policy

    def key(i: int) -> tuple[float, ...]:
        return (-columns.cap[i], -columns.reserve[i], i) if policy.launch_order == "longest_first" else (i,)

    started = {a.request: a.launched_s for a in firsts(done) if a.lane == "main"}
    at = [started[i] for i in sorted(started, key=key)]
    assert at == sorted(at)


# ---------------------------------------------------------------- the generator


def test_the_drawn_scenarios_reach_everything() -> None:
    """Every outcome, failure, cause of waiting, window and habit occurs among 400 of them: no property holds idly."""
    seen: Counter[str] = Counter()
    for seed in range(400):
        scenario = drawn(seed)
        done = run(scenario)
        kinds = {str(a.outcome) for a in done.rows} | set(done.tally.failures)
        kinds |= {cause for cause, wait_s in zip(CAUSES, done.tally.waits_s, strict=True) if wait_s > 0.0}
        kinds |= {"finalize" for a in done.rows if a.lane == "finalize"}
        kinds |= {"lossless"} if not done.tally.failed else set()
        kinds |= {"efficient"} if (done.tally.summary(done.case.grant).efficiency or 0.0) > 0.5 else set()
        kinds |= {"above the budget" for a in done.rows if a.reserved_tokens > done.case.params.budget[law.TPM]}
        kinds |= {scenario.policy.tpm_window, scenario.arrivals}
        seen.update(kinds)
        for name, present in _habits(scenario).items():
            seen[name] += present
    wanted = {str(o) for o in Outcome} - {"overloaded", "bad_request", "unauthorized", "malformed", "local"}
    wanted |= {*CAUSES[1:7], "backoff", "fixed", "sliding", "bucket", "batch", "trace", "finalize", "lossless"}
    wanted |= {"efficient", "above the budget", *_habits(drawn(0))}
    wanted |= {"OPENAI_RATE_LIMIT_EXHAUSTED", "OPENAI_DEADLINE_EXCEEDED", "REQUEST_TOO_LARGE", "INSUFFICIENT_QUOTA"}
    wanted |= {"OUTWAITED", "OPENAI_SERVER_ERROR", "OPENAI_TIMEOUT", "OPENAI_CONNECTION_DROPPED"}
    assert {name for name in wanted if seen[name] < 10} == set()


def _habits(scenario: Scenario) -> dict[str, bool]:
    config = scenario.provider
    return {
        "slices": config.slice_s > 0.0,
        "ramp": config.ramp_tpm > 0,
        "quota": config.quota_requests > 0,
        "changes": bool(config.limit_changes),
        "day": config.rpd > 0 or config.tpd > 0,
        "steady neighbour": config.cotenant.share > 0.0 and config.cotenant.period_s == 0.0,
        "bursty neighbour": config.cotenant.period_s > 0.0,
        "clock": config.window == "clock",
        "settles": config.settles,
        "outage": bool(config.outages),
        "hangs": config.faults.hang_ratio > 0.0,
        "stalls": config.latency.stall_ratio > 0.0,
    }
