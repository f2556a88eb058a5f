"""Summaries against hand counts, and the bound against its formula, against brute force and against schedulers.

The provider in here is written anew, from docs/explanation/provider.md#buckets: the bound must hold for that one too,
and a scheduler that knows everything must reach it where the formula is exact.
"""

from __future__ import annotations

import heapq
import json
import math
import random
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise

import pytest

from governor import law
from governor.forecast.summary import Grant, Summary, Tally, WorkDone, bound_s, efficiency_of, tallied
from governor.model.errors import FailureCode
from governor.model.requests import BACKOFF, CAUSES, Attempt, Ended, Outcome
from tests.governor.costs import lines_run

Item = tuple[float, int, int, float]  # arrival, charge, use, service


def work_of(items: list[Item]) -> WorkDone:
    work = WorkDone()
    for item in items:
        work.add(*item)
    return work


def drawn(rng: random.Random, n: int, arrivals: bool) -> list[Item]:
    items = []
    at_s = 0.0
    for _ in range(n):
        charge = rng.choice([rng.randint(1, 200), rng.randint(500, 1_000)])
        use = rng.randint(0, charge) if rng.random() < 0.8 else charge + rng.randint(0, 300)
        service_s = rng.choice([rng.uniform(0.1, 2.0), rng.uniform(5.0, 90.0)])
        items.append((at_s, charge, use, service_s))
        if arrivals:
            at_s += rng.choice([0.0, rng.expovariate(1.0), rng.expovariate(0.02)])
    return items


# ---------------------------------------------------------------- a provider and schedulers to hold the bound against


class Provider:
    """docs/explanation/provider.md#buckets, with changing limits, settling, days and minute counters."""

    def __init__(self, grant: Grant) -> None:
        self.grant = grant
        self.now = 0.0
        # Tokens and requests per minute, tokens and requests per day: [first limit, length, used].
        self.rows = [
            [grant.tpm_limit, 60.0, 0.0],
            [grant.rpm_limit, 60.0, 0.0],
            [grant.tpd_limit, 86_400.0, grant.day_tokens_used],
            [grant.rpd_limit, 86_400.0, grant.day_requests_used],
        ]

    def factor(self) -> float:
        return ([1.0] + [factor for at_s, factor in self.grant.changes if at_s <= self.now])[-1]

    def limit(self, row: list[float]) -> float:
        return row[0] * (self.factor() if row[1] == 60.0 else 1.0)

    def advance(self, to_s: float) -> None:
        edges = [at_s for at_s, _ in self.grant.changes if self.now < at_s < to_s]
        for edge_s in [*edges, to_s]:
            for row in self.rows:
                if row[1] == 60.0 and self.grant.minute_reset:
                    if math.floor(edge_s / 60.0) > math.floor(self.now / 60.0):
                        row[2] = 0.0
                else:
                    row[2] = max(0.0, row[2] - self.limit(row) / row[1] * (edge_s - self.now))
            self.now = edge_s

    def amounts(self, charge: int) -> list[tuple[list[float], float]]:
        return [(row, charge if i % 2 == 0 else 1.0) for i, row in enumerate(self.rows) if row[0] > 0.0]

    def fits_at(self, charge: int) -> float:
        """When this charge fits, by what is known now; `now` itself if it does. Ask again at the next event."""
        at = self.now
        for row, amount in self.amounts(charge):
            excess = row[2] + amount - self.limit(row)
            if excess <= 1e-6:
                continue
            if row[1] == 60.0 and self.grant.minute_reset:
                at = max(at, (math.floor(self.now / 60.0) + 1.0) * 60.0)
            else:
                at = max(at, self.now + max(excess / self.limit(row) * row[1], 1e-9))
        return at

    def book(self, charge: int) -> None:
        for row, amount in self.amounts(charge):
            row[2] += amount

    def settle(self, charge: int, use: int) -> None:
        if self.grant.settles:
            for row in (self.rows[0], self.rows[2]):
                if use <= charge:
                    row[2] = max(0.0, row[2] + use - charge)
                else:
                    row[2] = max(row[2], min(self.limit(row), row[2] + use - charge))


def makespan_of(rng: random.Random, grant: Grant, items: list[Item], order: str, lazy_ratio: float) -> float:
    """A scheduler with all knowledge and no cap on concurrency: at each event it launches what fits, in its order."""
    ranks = rng.sample(range(len(items)), len(items))
    keys: dict[str, list[float]] = {
        "arrival": [item[0] for item in items],
        "longest": [-item[3] for item in items],
        "shortest": [item[3] for item in items],
        "largest": [-item[1] for item in items],
        "random": [float(rank) for rank in ranks],
    }
    provider = Provider(grant)
    waiting = sorted(range(len(items)), key=keys[order].__getitem__)
    flying: list[tuple[float, int]] = []
    last_s = 0.0
    while waiting or flying:
        while flying and flying[0][0] <= provider.now:
            _, i = heapq.heappop(flying)
            provider.settle(items[i][1], items[i][2])
        events = [flying[0][0]] if flying else []
        events += [at_s for at_s, _ in grant.changes if at_s > provider.now]
        if waiting:
            events += [items[i][0] for i in waiting if items[i][0] > provider.now]
            ready = [i for i in waiting if items[i][0] <= provider.now]
            if ready and rng.random() >= lazy_ratio:
                at = provider.fits_at(items[ready[0]][1])
                if at <= provider.now:
                    provider.book(items[ready[0]][1])
                    waiting.remove(ready[0])
                    ends_s = provider.now + items[ready[0]][3]
                    heapq.heappush(flying, (ends_s, ready[0]))
                    last_s = max(last_s, ends_s)
                    continue
                events.append(at)
            elif ready:
                events.append(provider.now + rng.expovariate(0.2))
        if events:
            provider.advance(min(events))
    return last_s


def grants(rng: random.Random) -> Grant:
    """A provider whose limits bind, of any kind; each limit is at least the largest drawn charge, in every phase."""
    changes: list[tuple[float, float]] = []
    for _ in range(rng.choice([0, 0, 1, 3])):
        changes.append(((changes[-1][0] if changes else 0.0) + rng.uniform(0.0, 400.0), rng.choice([0.5, 1.0, 2.0])))
    daily = rng.random() < 0.3
    return Grant(
        tpm_limit=rng.choice([0, 2_000, 6_000]),
        rpm_limit=rng.choice([0, 2, 10]),
        tpd_limit=rng.choice([0, 30_000]) if daily else 0,
        rpd_limit=rng.choice([0, 40]) if daily else 0,
        settles=rng.random() < 0.5,
        minute_reset=rng.random() < 0.3,
        changes=tuple(changes),
        day_tokens_used=rng.choice([0, 20_000]) if daily else 0,
        day_requests_used=rng.choice([0, 30]) if daily else 0,
    )


class TestBoundOfABatch:
    """The bound's formula, written out."""

    def test_tokens(self, seed: int) -> None:
        rng = random.Random(seed)
        items = drawn(rng, 200, arrivals=False)
        total = sum(charge for _, charge, _, _ in items)
        services = [service_s for _, _, _, service_s in items]
        expected_s = max((total - 6_000) / (6_000 / 60) + min(services), max(services))
        assert bound_s(Grant(tpm_limit=6_000), work_of(items)) == pytest.approx(expected_s, rel=1e-7)

    def test_requests_and_days(self) -> None:
        work = work_of([(0.0, 10, 10, 4.0)] * 49 + [(0.0, 10, 10, 3.0)])
        assert bound_s(Grant(rpm_limit=10), work) == pytest.approx((50 - 10) * 6.0 + 3.0, rel=1e-7)
        assert bound_s(Grant(rpd_limit=20), work) == pytest.approx((50 - 20) * 4_320.0 + 3.0, rel=1e-7)
        assert bound_s(Grant(tpd_limit=400), work) == pytest.approx((500 - 400) * 216.0 + 3.0, rel=1e-7)
        # The limit that takes longest counts, and no limit leaves the longest answer.
        assert bound_s(Grant(rpm_limit=10, tpm_limit=300), work) == pytest.approx(240.0 + 3.0, rel=1e-7)
        assert bound_s(Grant(), work) == 4.0
        assert bound_s(Grant(tpm_limit=10**9), WorkDone()) == 0.0

    def test_a_day_that_was_begun_has_less_left(self) -> None:
        work = work_of([(0.0, 100, 100, 1.0)] * 10)
        grant = Grant(tpd_limit=2_000, day_tokens_used=1_500)
        assert bound_s(grant, work) == pytest.approx((1_500 + 1_000 - 2_000) / (2_000 / 86_400) + 1.0, rel=1e-7)
        grant = Grant(rpd_limit=12, day_requests_used=12)
        assert bound_s(grant, work) == pytest.approx(10 * 7_200.0 + 1.0, rel=1e-7)

    def test_where_the_provider_settles_the_smaller_of_charge_and_use_counts(self) -> None:
        work = work_of([(0.0, 500, 100, 1.0)] * 10 + [(0.0, 300, 400, 1.0)] * 10)
        assert bound_s(Grant(tpm_limit=600), work) == pytest.approx((8_000 - 600) / 10 + 1.0, rel=1e-7)
        assert bound_s(Grant(tpm_limit=600, settles=True), work) == pytest.approx((4_000 - 600) / 10 + 1.0, rel=1e-7)

    def test_what_is_not_known_counts_as_nothing(self) -> None:
        known = work_of([(0.0, 500, 500, 1.0)] * 10)
        partly = work_of([(0.0, 500, 500, 1.0)] * 10 + [(0.0, -1, 900, 2.0)])
        assert bound_s(Grant(tpm_limit=600), partly) == bound_s(Grant(tpm_limit=600), known)
        unused = work_of([(0.0, 500, 500, 1.0)] * 10 + [(0.0, 500, -1, 2.0)])
        assert bound_s(Grant(tpm_limit=600, settles=True), unused) == bound_s(Grant(tpm_limit=600, settles=True), known)

    def test_a_minute_counter_lets_in_whole_limits(self) -> None:
        work = work_of([(0.0, 100, 100, 2.0)] * 61)
        assert bound_s(Grant(tpm_limit=2_000, minute_reset=True), work) == 3 * 60.0 + 2.0
        changed = Grant(tpm_limit=2_000, minute_reset=True, changes=((90.0, 0.5),))
        # 2,000 in the first and in the second minute, which begins with the old limit, then 1,000 each.
        assert bound_s(changed, work) == 4 * 60.0 + 2.0

    def test_limits_that_change_are_integrated(self, seed: int) -> None:
        """The bound's moment is the first at which limit + drained reaches the demand, checked on a grid of times."""
        rng = random.Random(seed)
        for _ in range(50):
            changes = [(20.0 * (i + 1) + rng.uniform(0.0, 15.0), rng.choice([0.25, 0.5, 1.5, 2.0])) for i in range(4)]
            grant = Grant(tpm_limit=600, changes=tuple(changes))
            demand = rng.randint(601, 4_000)
            at = bound_s(grant, work_of([(0.0, demand, demand, 0.0)]))

            def reach(t: float, changes: list[tuple[float, float]] = changes) -> float:
                edges = [(0.0, 1.0), *changes, (math.inf, 0.0)]
                drained = 0.0
                limit = 0.0
                for (from_s, factor), (to_s, _) in pairwise(edges):
                    if from_s <= t:
                        drained += 10.0 * factor * (min(to_s, t) - from_s)
                        limit = 600.0 * factor
                return limit + drained

            assert reach(at + 1e-9) >= demand - 1e-4
            assert all(reach(at * k / 500) < demand for k in range(500))

    def test_the_stress_case_of_a_limit_halved_for_ten_minutes(self) -> None:
        work = work_of([(0.0, 1_000, 1_000, 2.0)] * 400)
        halved = Grant(tpm_limit=30_000, changes=((120.0, 0.5), (720.0, 1.0)))
        # 400,000 tokens: 30,000 at once, 60,000 in 2 minutes, 150,000 in the ten, and 160,000 more at full speed.
        assert bound_s(halved, work) == pytest.approx(720.0 + 160_000 / 500 + 2.0, rel=1e-7)


class TestBoundOfATrace:
    def test_it_is_the_largest_over_the_moments_of_arrival(self, seed: int) -> None:
        """The definition, term by term: quadratic, and so an independent check of the sums from behind."""
        rng = random.Random(seed)
        for _ in range(30):
            items = drawn(rng, rng.randint(1, 60), arrivals=True)
            expected_s = 0.0
            for t in {item[0] for item in items}:
                rest = [item for item in items if item[0] >= t]
                tokens_s = (sum(charge for _, charge, _, _ in rest) - 2_000) / (2_000 / 60)
                requests_s = (len(rest) - 5) * 12.0
                shortest_s = min(service_s for _, _, _, service_s in rest)
                longest_s = max(service_s for _, _, _, service_s in rest)
                expected_s = max(expected_s, t + max(tokens_s + shortest_s, requests_s + shortest_s, longest_s))
            rng.shuffle(items)
            bound = bound_s(Grant(tpm_limit=2_000, rpm_limit=5), work_of(items))
            # A millionth of a request may be missing (`_ROUNDING`): 12 us here.
            assert bound == pytest.approx(expected_s, rel=1e-7, abs=1.3e-5)

    def test_tokens_handed_back_late_are_not_demanded(self) -> None:
        """The case that breaks the plain formula: a refund from before t makes room for more than the limit after t."""
        grant = Grant(tpm_limit=1_000, settles=True)
        # Charged 1,000 at second 10, most of it drained by 60, and all of it handed back half a second later.
        early: Item = (10.0, 1_000, 0, 50.5)
        burst: list[Item] = [(60.0, 500, 500, 1.0)] * 4
        plain_s = 60.0 + (2_000 - 1_000) / (1_000 / 60) + 1.0
        makespan_s = makespan_of(random.Random(0), grant, [early, *burst], "arrival", 0.0)
        assert makespan_s == pytest.approx(60.5 + 30.0 + 1.0, rel=1e-6)
        assert makespan_s < plain_s
        assert bound_s(grant, work_of([early, *burst])) <= makespan_s
        # Nothing comes back where nothing was charged before: there the plain formula holds.
        assert bound_s(grant, work_of(burst)) == pytest.approx(plain_s, rel=1e-7)

    def test_a_finalize_pass_may_hand_tokens_back_too(self) -> None:
        grant = Grant(tpm_limit=1_000, settles=True)
        work = work_of([(0.0, 10, 10, 1.0)] + [(60.0, 500, 500, 1.0)] * 4)
        before_s = bound_s(grant, work)
        work.finalized(900, 100)
        assert bound_s(grant, work) == pytest.approx(before_s - 800 / (1_000 / 60), rel=1e-6)
        assert bound_s(Grant(tpm_limit=1_000), work) == before_s


class TestNoSchedulerBeatsTheBound:
    def test_any_provider_any_order_any_laziness(self, seed: int) -> None:
        rng = random.Random(seed)
        binding = 0
        for _ in range(300):
            grant = grants(rng)
            items = drawn(rng, rng.randint(1, 60), arrivals=rng.random() < 0.6)
            bound = bound_s(grant, work_of(items))
            order = rng.choice(["arrival", "longest", "shortest", "largest", "random"])
            makespan_s = makespan_of(rng, grant, items, order, rng.choice([0.0, 0.0, 0.3]))
            assert bound <= makespan_s * (1 + 1e-9), (grant, items, order)
            own_s = max(at_s + service_s for at_s, _, _, service_s in items)
            binding += bound > own_s + 1.0
        assert binding > 50  # the limits did bind: this was no test of the service times alone

    def test_equal_requests_reach_it(self, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(20):
            n, charge, service_s = rng.randint(20, 80), rng.choice([100, 250, 500]), rng.uniform(0.5, 20.0)
            grant = Grant(tpm_limit=2_000, rpm_limit=rng.choice([0, 30]))
            items: list[Item] = [(0.0, charge, charge, service_s)] * n
            makespan_s = makespan_of(rng, grant, items, "arrival", 0.0)
            assert bound_s(grant, work_of(items)) == pytest.approx(makespan_s, rel=1e-6)


class TestEfficiency:
    def test_only_a_run_that_lost_nothing_may_quote_it(self) -> None:
        assert efficiency_of(50.0, 100.0, 0) == 0.5
        assert efficiency_of(50.0, 100.0, 1) is None
        assert efficiency_of(0.0, 0.0, 0) is None

    def test_never_above_one_and_none_where_the_grant_is_wrong(self) -> None:
        assert efficiency_of(100.0 * (1 + 1e-12), 100.0, 0) == 1.0
        assert efficiency_of(101.0, 100.0, 0) is None


# ---------------------------------------------------------------- a run, counted in both ways


@dataclass(frozen=True)
class Run:
    tally: Tally
    attempts: list[Attempt]
    ends: list[Ended]


def row(request: int, lane: str, attempt: int, launched_s: float, finished_s: float, outcome: Outcome) -> Attempt:
    let_in = outcome not in (Outcome.THROTTLED, Outcome.SLOW_DOWN, Outcome.TOO_LARGE, Outcome.QUOTA)
    answered = outcome == Outcome.OK
    return Attempt(
        request=request,
        custom_id=f"q-{request}",
        pool="default",
        model="gpt-4o",
        url="/v1/chat/completions",
        lane=lane,
        attempt=attempt,
        submitted_s=0.0,
        eligible_s=0.0,
        launched_s=launched_s,
        finished_s=finished_s,
        reserved_tokens=700 + request,
        charged_tokens=500 + request if let_in else -1,
        prompt_tokens=300 if answered else -1,
        output_tokens=100 + request if answered else -1,
        outcome=outcome,
        status=200 if answered else 429,
        error_code="",
        retry_after_s=-1.0,
        waited_stagger_s=0.25,
        waited_tpm_s=launched_s / 3,
        waited_backoff_s=1.5 if attempt > 1 else 0.0,
    )


def random_run(rng: random.Random) -> Run:
    """Attempts drawn at random; the tally is fed event by event in the order of time, as a driver would."""
    attempts: list[Attempt] = []
    ends: list[Ended] = []
    for request in range(rng.randint(1, 60)):
        now = rng.uniform(0.0, 100.0)
        outcome, lane = Outcome.TIMEOUT, "main"
        for number in range(1, rng.randint(2, 5)):
            launched_s = now + rng.uniform(0.0, 10.0)
            now = launched_s + rng.uniform(0.1, 30.0)
            outcome = rng.choice([Outcome.OK, Outcome.THROTTLED, Outcome.SLOW_DOWN, Outcome.SERVER_ERROR])
            attempts.append(row(request, lane, number, launched_s, now, outcome))
            if outcome == Outcome.OK:
                break
        if outcome == Outcome.OK and rng.random() < 0.3:
            launched_s = now + 1.0
            now = launched_s + 2.0
            attempts.append(row(request, "finalize", 1, launched_s, now, Outcome.OK))
        code = "" if outcome == Outcome.OK else rng.choice([FailureCode.RATE_LIMIT_EXHAUSTED, FailureCode.TIMEOUT])
        ends.append(Ended(request, now, code))
    return Run(counted(attempts, ends), attempts, ends)


def counted(attempts: list[Attempt], ends: list[Ended]) -> Tally:
    tally = Tally()
    tally.deferrals[law.STAGGER] = 7
    tally.deferrals[law.BY_TPM] = 5
    events: list[tuple[float, int, Attempt]] = []
    for i, a in enumerate(attempts):
        events += ((a.launched_s, 2 * i + 1, a), (a.finished_s, 2 * i, a))
    for _, i, a in sorted(events, key=lambda event: event[:2]):
        used = max(0, a.prompt_tokens) + max(0, a.output_tokens)
        if i % 2:
            tally.launched()
            for cause in range(1, BACKOFF + 1):
                tally.waits_s[cause] += getattr(a, f"waited_{CAUSES[cause]}_s")
            continue
        tally.answered(a.reserved_tokens, a.charged_tokens, used, a.outcome in (Outcome.THROTTLED, Outcome.SLOW_DOWN))
        if a.outcome == Outcome.OK and a.lane == "main":
            tally.work.add(a.submitted_s, a.charged_tokens, used, a.finished_s - a.launched_s)
        elif a.outcome == Outcome.OK:
            tally.work.finalized(a.charged_tokens, used)
    for end in ends:
        tally.ended(end.failure, end.ended_s)
    return tally


GRANT = Grant(tpm_limit=2_000, rpm_limit=30, settles=True)


class TestSummary:
    def test_the_keys_are_those_of_the_design(self) -> None:
        keys = (
            "requests, completed, failed, attempts, throttled, makespan_s, bound_s, efficiency, reserved_tokens, "
            "charged_tokens, used_tokens, peak_in_flight, stagger_delays, tpm_deferrals, waits_s, failures, cost_usd"
        )
        assert [column.name for column in fields(Summary)] == keys.split(", ")
        assert list(Tally().summary(GRANT).to_json_dict()) == keys.split(", ")
        waited = [name.removeprefix("waited_").removesuffix("_s") for name in Attempt.columns() if "waited" in name]
        assert list(Tally().summary(GRANT).waits_s) == waited

    def test_causes_stand_where_the_law_counts_them(self) -> None:
        numbers = {"nothing": law.NOTHING, "concurrency": law.CONCURRENCY, "stagger": law.STAGGER, "tpm": law.BY_TPM}
        numbers |= {"rpm": law.BY_RPM, "day": law.BY_DAY, "hold": law.HOLD, "paused": law.PAUSED, "backoff": BACKOFF}
        assert [numbers[cause] for cause in CAUSES] == list(range(len(CAUSES)))

    def test_the_two_ways_agree(self, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            run = random_run(rng)
            one = run.tally.summary(GRANT, cost_usd=1.25).to_json_dict()
            rng.shuffle(run.attempts)
            again = tallied(run.attempts, run.ends, stagger_delays=7, tpm_deferrals=5)
            two = again.summary(GRANT, cost_usd=1.25).to_json_dict()
            for key in one:
                assert one[key] == (
                    pytest.approx(two[key]) if key in ("waits_s", "bound_s", "efficiency") else two[key]
                )
            assert json.loads(json.dumps(one)) == one

    def test_by_hand(self) -> None:
        attempts = [
            row(0, "main", 1, 0.0, 4.0, Outcome.OK),
            row(1, "main", 1, 1.0, 1.1, Outcome.THROTTLED),
            row(1, "main", 2, 3.0, 9.0, Outcome.OK),
            row(2, "main", 1, 2.0, 2.5, Outcome.SERVER_ERROR),
        ]
        ends = [Ended(0, 4.0, ""), Ended(1, 9.0, ""), Ended(2, 8.0, FailureCode.SERVER_ERROR)]
        ends.append(Ended(3, 0.0, FailureCode.REQUEST_TOO_LARGE))
        s = tallied(attempts, ends).summary(Grant(tpm_limit=1_001)).to_json_dict()
        assert (s["requests"], s["completed"], s["failed"], s["attempts"], s["throttled"]) == (4, 2, 2, 4, 1)
        assert s["failures"] == {"OPENAI_SERVER_ERROR": 1, "REQUEST_TOO_LARGE": 1}
        assert (s["reserved_tokens"], s["charged_tokens"], s["used_tokens"]) == (2_804, 1_503, 801)
        assert (s["makespan_s"], s["bound_s"], s["efficiency"], s["cost_usd"]) == (9.0, 6.0, None, None)
        assert s["waits_s"]["stagger"] == 1.0
        assert s["waits_s"]["backoff"] == 1.5
        assert s["peak_in_flight"] == 2

    def test_peak_in_flight_against_every_moment(self, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(50):
            attempts = []
            for i in range(rng.randint(1, 30)):
                launched_s = float(rng.randint(0, 20))
                attempts.append(row(i, "main", 1, launched_s, launched_s + rng.randint(1, 8), Outcome.OK))
            # Half-open: at the moment of its answer an attempt is over, and its place free.
            peak = max(sum(a.launched_s <= t < a.finished_s for a in attempts) for t in range(30))
            assert tallied(attempts, []).peak_in_flight == peak

    def test_an_attempt_over_in_no_time_is_seen(self) -> None:
        assert tallied([row(0, "main", 1, 5.0, 5.0, Outcome.THROTTLED)], []).peak_in_flight == 1

    def test_efficiency_of_a_run_that_lost_nothing(self) -> None:
        attempts = [row(0, "main", 1, 0.0, 4.0, Outcome.OK), row(1, "main", 1, 30.0, 36.0, Outcome.OK)]
        s = tallied(attempts, [Ended(0, 4.0, ""), Ended(1, 36.0, "")]).summary(Grant(tpm_limit=600))
        assert s.bound_s == pytest.approx((500 + 501 - 600) / 10 + 4.0, rel=1e-6)
        # The rows say 36 s, the bound 44.1 s: this provider grants more than was said, and no efficiency is quoted.
        assert s.efficiency is None
        s = tallied(attempts, [Ended(0, 4.0, ""), Ended(1, 36.0, "")]).summary(Grant(tpm_limit=800))
        assert s.efficiency == pytest.approx(((500 + 501 - 800) / (800 / 60) + 4.0) / 36.0, rel=1e-6)


class TestCost:
    """A tally may cost a simulated request next to nothing."""

    def test_a_batch_of_any_length_takes_the_same_memory(self) -> None:
        def grown(n: int) -> int:
            tally = Tally()
            tracemalloc.start()
            for i in range(n):
                tally.launched()
                tally.answered(700, 500, 400, False)
                tally.work.add(0.0, 500.0, 400.0, 1.0 + i)
                tally.ended("", float(i))
            size, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            return size

        assert grown(20_000) - grown(200) < 1_000

    def test_a_call_does_the_same_however_many_went_before(self) -> None:
        tally = Tally()
        calls = {
            "launched": tally.launched,
            "answered": lambda: tally.answered(700, 500, 400, False),
            "ended": lambda: tally.ended("", 3.0),
            "add": lambda: tally.work.add(0.0, 500.0, 400.0, 1.0),
        }
        for name, call in calls.items():
            call()
            second = lines_run(call)
            for _ in range(10_000):
                call()
            assert 0 < lines_run(call) <= second, name

    def test_a_long_trace_is_summed_in_one_pass(self, seed: int) -> None:
        """Twice the length takes about twice the work, not four times."""

        def trace(n: int) -> Iterator[Item]:
            rng = random.Random(seed)
            for i in range(n):
                yield i * 0.02, rng.randint(1, 1_000), 0, rng.uniform(0.5, 30.0)

        def lines(n: int) -> int:
            work = work_of(list(trace(n)))
            return lines_run(lambda: bound_s(Grant(tpm_limit=10**6), work))

        assert 0 < lines(10_000) < 2.1 * lines(5_000)
