"""Results of a run: attempts in, one `Summary` out, and the bound that no scheduler could have beaten.

A `Summary` is made from a `Tally`, which a driver keeps while it runs (constant memory for a batch), or `tallied`
makes from attempt rows afterwards, from a journal or a table. A test checks that the two agree.

The bound is the time below which no scheduler can go on that provider. Let a request count as c tokens: its charge
once, or the smaller of charge and use if the provider settles. Take the requests that arrive from t on, D tokens in
all, and let T be the moment at which the last of them is admitted. The provider keeps `used`, which drains at most at
the limit's rate, and admits no request above the limit (docs/explanation/provider.md#buckets). So, with L(T) the limit
in force and R(a, b) the amount that drains from a to b,

    used(t) + D - R(t, T) <= used(T) <= L(T),   hence   T >= the first moment with L(T) + R(t, T) >= used(t) + D.

That last request still takes its own service time, at least the shortest of theirs, and every request takes its own
from its arrival: makespan >= max(T + shortest service, latest of arrival + service). Any t gives a valid bound, the
largest counts; a batch has t = 0 only. Notes on each term:

* used(t) >= 0, and for a day that was begun >= what was used before, less what has drained since.
* Where the provider settles, requests from before t may still hand tokens back after t, at most the sum of (charge -
  use) over them, and over all finalize passes: that much less is demanded from t on. For a batch it is nothing, since
  what is handed back was charged within the run.
* A limit that changes keeps what is used: R integrates the rate over time, L(T) is the limit of that moment. So no
  capacity is won when a limit falls, and none is lost that was used before.
* A minute counter (Azure) admits at most the limit, the highest one of that minute, once per minute from t's on.
* Requests, per minute and per day, go by the same formula with c = 1.
* Rejected, failed and finalize attempts, co-tenants, slices and ramps only take capacity away, and do not appear.
* Unknown figures (-1) count as nothing, so the bound stays below the truth.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from governor.law import BUCKET, BY_TPM, CLOCK, DAY_S, MINUTE_S, STAGGER
from governor.model.needs import Limited
from governor.model.requests import CAUSES, Attempt, Ended, Outcome

# A provider may overshoot its limit in floating point by so much of one token (or request): sim/model/provider.py's
# ROUNDING.
_ROUNDING = 1e-6
_THROTTLES = (Outcome.THROTTLED, Outcome.SLOW_DOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The provider's grant, as far as the bound needs it. Limits per minute and day, 0 = none.

    `settles`: a completed request counts its use. `minute_reset`: a counter emptied each minute, in place of the
    bucket; the run begins `phase_s` into one. `burst_ratio`: the capacity of the minute's bucket, as a share of the
    limit. `changes`: (from_s, factor) in order of time, the minute limits from then on as multiples of the first ones.
    `day_*_used`: the part of the daily limits that was used before the run. `quota`: the dimensions of a profile, in
    place of the four limits.
    """

    tpm_limit: float = 0.0
    rpm_limit: float = 0.0
    tpd_limit: float = 0.0
    rpd_limit: float = 0.0
    settles: bool = False
    minute_reset: bool = False
    phase_s: float = 0.0
    burst_ratio: float = 1.0
    changes: tuple[tuple[float, float], ...] = ()
    day_tokens_used: float = 0.0
    day_requests_used: float = 0.0
    quota: tuple[Limited, ...] = ()


def _floats() -> array[float]:
    return array("d")


@dataclass(slots=True)
class WorkDone:
    """The work of a run, as the bound sees it: one `add` per request that was answered, in any order.

    Requests that arrive at 0 are held as sums, later arrivals in flat arrays (32 bytes each). Plain fields, so that a
    compiled engine can fill them in: `requests`, `charged`, `counted` (smaller of charge and use), `inputs` (the input
    among the charge) and `shortest_s` of the requests at 0; `latest_s` the largest arrival + service of all;
    `returned`: charge less use of finalize passes.
    """

    requests: int = 0
    charged: float = 0.0
    counted: float = 0.0
    shortest_s: float = math.inf
    latest_s: float = 0.0
    returned: float = 0.0
    arrivals_s: array[float] = field(default_factory=_floats)
    charges: array[float] = field(default_factory=_floats)
    counts: array[float] = field(default_factory=_floats)
    services_s: array[float] = field(default_factory=_floats)
    inputs: float = 0.0

    def add(self, arrived_s: float, charge: float, used: float, service_s: float, prompt: float = 0.0) -> None:
        """Add one answered request: its arrival, the provider's charge and use (-1 = unknown), its service time.

        `prompt`: the input among the tokens, for dimensions of a profile.
        """
        if charge < 0.0:
            charge = 0.0
        counted = charge if charge < used else used if used > 0.0 else 0.0
        if arrived_s + service_s > self.latest_s:
            self.latest_s = arrived_s + service_s
        if arrived_s <= 0.0:
            self.requests += 1
            self.charged += charge
            self.counted += counted
            self.inputs += prompt if prompt < charge else charge
            if service_s < self.shortest_s:
                self.shortest_s = service_s
        else:
            self.arrivals_s.append(arrived_s)
            self.charges.append(charge)
            self.counts.append(counted)
            self.services_s.append(service_s)

    def finalized(self, charge: float, used: float) -> None:
        """Add an answered finalize pass: no demand of its own, but a provider that settles hands tokens back."""
        if charge > used:
            self.returned += charge - max(used, 0.0)

    def suffixes(self, settles: bool) -> Iterator[tuple[float, float, int, float]]:
        """Yield (t, tokens demanded from t on, requests, shortest service) per arrival t, latest first.

        With `settles` the tokens are net of what requests from before t may hand back.
        """
        at_s, charges, counts, services_s = self.arrivals_s, self.charges, self.counts, self.services_s
        n = len(at_s)
        order: Iterable[int] = range(n - 1, -1, -1)
        if any(at_s[i] > at_s[i + 1] for i in range(n - 1)):
            order = sorted(order, key=at_s.__getitem__, reverse=True)
        refunds = 0.0
        if settles:
            refunds = self.returned + (self.charged - self.counted) + (math.fsum(charges) - math.fsum(counts))
        tokens, requests, shortest_s = 0.0, 0, math.inf
        t = math.inf
        for i in order:
            if at_s[i] < t and requests:
                yield t, tokens - refunds, requests, shortest_s
            t = at_s[i]
            requests += 1
            if services_s[i] < shortest_s:
                shortest_s = services_s[i]
            if settles:
                tokens += counts[i]
                refunds -= charges[i] - counts[i]
            else:
                tokens += charges[i]
        if requests:
            yield t, tokens - refunds, requests, shortest_s
        if self.requests:
            tokens += self.counted if settles else self.charged
            yield 0.0, tokens, requests + self.requests, min(shortest_s, self.shortest_s)


# ---------------------------------------------------------------- the bound


class _Bucket:
    """A limit that refills continuously. `used`: at time 0. `changes`: factors on the limit over time.

    `burst_ratio`: its capacity as a share of the limit, at least 1.
    """

    def __init__(
        self,
        limit: float,
        length_s: float,
        used: float,
        changes: tuple[tuple[float, float], ...],
        burst_ratio: float = 1.0,
    ) -> None:
        self.used = used
        self.burst_ratio = burst_ratio
        self.pieces: list[tuple[float, float, float, float, float]] = []  # from, to, limit, rate, drained until from
        drained = 0.0
        for from_s, to_s, granted in _pieces(limit, changes):
            self.pieces.append((from_s, to_s, granted, granted / length_s, drained))
            drained += granted / length_s * (to_s - from_s)

    def admits_at(self, t: float, demand: float) -> float:
        """Return the earliest time by which `demand`, none of it there before `t`, can be admitted.

        Seconds, at least `t`.
        """
        if demand <= 0.0:
            return t
        target = -math.inf
        for from_s, to_s, limit, rate_per_s, drained in self.pieces:
            if to_s <= t:
                continue
            if limit <= 0.0:
                return max(from_s, t)
            if target == -math.inf:
                target = max(drained + rate_per_s * (t - from_s), self.used) + demand - _ROUNDING
            capacity = max(1.0, limit * self.burst_ratio) if self.burst_ratio < 1.0 else limit
            at = from_s + (target - drained - capacity) / rate_per_s
            if at < to_s:
                return max(at, from_s, t)
        raise AssertionError("the last piece has no end")


class _Counter:
    """A limit counted afresh in each minute; time 0 lies `phase_s` into one."""

    def __init__(self, limit: float, changes: tuple[tuple[float, float], ...], phase_s: float = 0.0) -> None:
        self.phase_s = phase_s
        changes = tuple((max(0.0, at_s) + phase_s, factor) for at_s, factor in changes)
        self.pieces = list(_pieces(limit, changes))

    def admits_at(self, t: float, demand: float) -> float:
        """Return the start of the minute in which the last of `demand` was admitted, at least `t`."""
        return self._admits_at(t + self.phase_s, demand) - self.phase_s

    def _admits_at(self, t: float, demand: float) -> float:
        minute = math.floor(t / MINUTE_S)
        left = demand
        while left > 0.0:
            begins_s, ends_s = minute * MINUTE_S, (minute + 1) * MINUTE_S
            here = [piece for piece in self.pieces if piece[0] < ends_s and piece[1] > begins_s]
            # Until the next change all minutes are alike; a minute in which the limit changes grants the highest of
            # them.
            alike = math.inf if len(here) == 1 and here[0][1] == math.inf else 1.0
            if len(here) == 1 and alike == 1.0:
                alike = max(1.0, math.floor(here[0][1] / MINUTE_S) - minute)
            limit = max(granted for _, _, granted in here)
            if min(granted for _, _, granted in here) <= 0.0:
                break
            minutes = math.ceil(left / (limit + _ROUNDING))
            if minutes <= alike:
                minute += minutes - 1
                break
            left -= alike * (limit + _ROUNDING)
            minute += int(alike)
        return max(t, minute * MINUTE_S)


def _pieces(limit: float, changes: tuple[tuple[float, float], ...]) -> Iterator[tuple[float, float, float]]:
    """Yield (from, to, limit) in order of time, from 0 to inf."""
    from_s, granted = 0.0, limit
    for at_s, factor in changes:
        if at_s > from_s:
            yield from_s, at_s, granted
            from_s = at_s
        granted = limit * factor
    yield from_s, math.inf, granted


def bound_s(grant: Grant, work: WorkDone) -> float:
    """Return the makespan, seconds from the run's beginning, below which no scheduler can go on that provider.

    0 without work. Formula and proof: the module's docstring. O(requests) for arrivals over time, else O(1).
    """
    token_limits: list[_Bucket | _Counter] = []
    request_limits: list[_Bucket | _Counter] = []
    for limit, limits in ((grant.tpm_limit, token_limits), (grant.rpm_limit, request_limits)):
        if limit > 0.0:
            bucket = _Bucket(limit, MINUTE_S, 0.0, grant.changes, grant.burst_ratio)
            limits.append(_Counter(limit, grant.changes, grant.phase_s) if grant.minute_reset else bucket)
    if grant.tpd_limit > 0.0:
        token_limits.append(_Bucket(grant.tpd_limit, DAY_S, grant.day_tokens_used, ()))
    if grant.rpd_limit > 0.0:
        request_limits.append(_Bucket(grant.rpd_limit, DAY_S, grant.day_requests_used, ()))
    bound = work.latest_s
    for t, tokens, requests, shortest_s in work.suffixes(grant.settles):
        last_at = t
        for supply in token_limits:
            last_at = max(last_at, supply.admits_at(t, tokens))
        for supply in request_limits:
            last_at = max(last_at, supply.admits_at(t, requests))
        bound = max(bound, last_at + shortest_s)
    if work.requests:
        output = (work.counted if grant.settles else work.charged) - work.inputs
        for each in grant.quota:
            amount = each.per_request * work.requests + each.per_input * work.inputs + each.per_output * output
            bound = max(bound, _admits_all_at(each, amount, grant.changes) + work.shortest_s)
    return bound


def _admits_all_at(each: Limited, amount: float, changes: tuple[tuple[float, float], ...]) -> float:
    """Return when the last of an amount that is there from the beginning can be admitted in one dimension of a profile.

    Of a window, the highest limit may go once in its length, at the earliest; a run may begin at the end of the first.
    """
    if each.limit <= 0.0 or amount <= 0.0 or each.at_answer:
        return 0.0
    changes = changes if each.length_s <= MINUTE_S else ()
    if each.window == BUCKET:
        return _Bucket(each.limit, each.length_s, 0.0, changes).admits_at(0.0, amount)
    most = each.limit * max(1.0, *(factor for _, factor in changes), 1.0)
    first_s = each.length_s - each.phase_s % each.length_s if each.window == CLOCK else each.length_s
    windows = math.ceil(amount / (most + _ROUNDING)) - 1
    return first_s + (windows - 1) * each.length_s if windows > 0 else 0.0


def efficiency_of(bound: float, makespan_s: float, failed: int) -> float | None:
    """Return bound / makespan, 0 to 1; None for a run that lost a request or had no work: it may not quote one.

    Also None if no limit bounds it (work for the Batch API alone), and if the run beat its bound by more than rounding:
    then the grant does not describe that provider.
    """
    if failed or makespan_s <= 0.0 or bound <= 0.0 or bound > makespan_s * (1.0 + 1e-9):
        return None
    return min(1.0, bound / makespan_s)


# ---------------------------------------------------------------- the summary


@dataclass(frozen=True, slots=True, repr=False)
class Summary:
    """The figures of one run, the same keys live and simulated. Times in seconds since the run began.

    `throttled`: attempts refused with a rate-limit 429. `peak_in_flight`: attempts launched and not yet answered; a
    request that backs off is not in flight, even where it keeps its permit. Tokens are sums over attempts, as far as
    they are known. `stagger_delays`, `tpm_deferrals`: requests that had to wait for that cause at the head of the
    queue, each counted once. `waits_s`: by cause, summed over attempts. `failures`: requests by failure code.
    `efficiency`: None if a request was lost. `cost_usd`: None if prices are not known.
    """

    requests: int
    completed: int
    failed: int
    attempts: int
    throttled: int
    makespan_s: float
    bound_s: float
    efficiency: float | None
    reserved_tokens: int
    charged_tokens: int
    used_tokens: int
    peak_in_flight: int
    stagger_delays: int
    tpm_deferrals: int
    waits_s: Mapping[str, float]
    failures: Mapping[str, int]
    cost_usd: float | None

    def to_json_dict(self) -> dict[str, Any]:
        """Return the keys in order, with plain numbers, None and dicts only."""
        values = {column.name: getattr(self, column.name) for column in fields(self)}
        return values | {"waits_s": dict(self.waits_s), "failures": dict(self.failures)}

    def __repr__(self) -> str:
        efficiency = "none" if self.efficiency is None else f"{self.efficiency:.3f}"
        return (
            f"<Summary: {self.completed:,} of {self.requests:,} requests in {self.makespan_s:,.1f} s, "
            f"{self.throttled:,} throttled of {self.attempts:,} attempts, efficiency {efficiency}>"
        )

    def _repr_html_(self) -> str:
        """Return the HTML for a notebook: a table, and the time and the waiting as a small figure."""
        from governor.forecast.summary_html import summary_html

        return summary_html(self)


@dataclass(slots=True)
class Tally:
    """Counts of a run under way, in constant memory for a batch; a driver adds to it and a `Summary` is made from it.

    Drivers either call the methods (well under a microsecond each) or add to the fields. `waits_s`, `deferrals`: by the
    law's causes CONCURRENCY to PAUSED, and BACKOFF. `last_s`: when the last request ended. `work`: the bound's input.
    """

    requests: int = 0
    completed: int = 0
    failed: int = 0
    attempts: int = 0
    throttled: int = 0
    last_s: float = 0.0
    reserved_tokens: float = 0.0
    charged_tokens: float = 0.0
    used_tokens: float = 0.0
    in_flight: int = 0
    peak_in_flight: int = 0
    waits_s: list[float] = field(default_factory=lambda: [0.0] * len(CAUSES))
    deferrals: list[int] = field(default_factory=lambda: [0] * len(CAUSES))
    failures: dict[str, int] = field(default_factory=dict)
    work: WorkDone = field(default_factory=WorkDone)

    def launched(self) -> None:
        """Count an attempt in flight. It enters the totals once it is recorded, which a cancelled attempt never is."""
        self.in_flight += 1
        if self.in_flight > self.peak_in_flight:
            self.peak_in_flight = self.in_flight

    def answered(self, reserved: float, charged: float, used: float, throttled: bool) -> None:
        """Count an attempt that ended, in whatever way. Unknown tokens: -1."""
        self.in_flight -= 1
        self.attempts += 1
        self.reserved_tokens += reserved
        if throttled:
            self.throttled += 1
        if charged > 0:
            self.charged_tokens += charged
        if used > 0:
            self.used_tokens += used

    def ended(self, failure: str, now: float) -> None:
        """Count a request that is over: answered (""), or lost with that code."""
        self.requests += 1
        if failure:
            self.failed += 1
            self.failures[failure] = self.failures.get(failure, 0) + 1
        else:
            self.completed += 1
        if now > self.last_s:
            self.last_s = now

    def summary(self, grant: Grant, cost_usd: float | None = None) -> Summary:
        """Return the figures so far, against the provider's grant."""
        bound = bound_s(grant, self.work)
        return Summary(
            requests=self.requests,
            completed=self.completed,
            failed=self.failed,
            attempts=self.attempts,
            throttled=self.throttled,
            makespan_s=float(self.last_s),
            bound_s=bound,
            efficiency=efficiency_of(bound, self.last_s, self.failed),
            reserved_tokens=round(self.reserved_tokens),
            charged_tokens=round(self.charged_tokens),
            used_tokens=round(self.used_tokens),
            peak_in_flight=self.peak_in_flight,
            stagger_delays=self.deferrals[STAGGER],
            tpm_deferrals=self.deferrals[BY_TPM],
            waits_s=dict(zip(CAUSES[1:], self.waits_s[1:], strict=True)),
            failures={str(code): count for code, count in sorted(self.failures.items())},
            cost_usd=cost_usd,
        )


def tallied(
    attempts: Iterable[Attempt],
    ends: Iterable[Ended],
    *,
    stagger_delays: int = 0,
    tpm_deferrals: int = 0,
    lost: Iterable[tuple[float, float]] = (),
) -> Tally:
    """Return the counts of a run from its attempt rows (in any order) and the end of each request.

    Deferrals are counted at the head of the queue, which rows do not show: they come from the driver or the journal.
    Nor do rows show the waiting of a request that was never launched. `lost`: charge and least use, in tokens, of each
    request that was lost and might have been answered: the bound is over these too, as it is in a simulation.
    """
    tally = Tally()
    tally.deferrals[STAGGER] = stagger_delays
    tally.deferrals[BY_TPM] = tpm_deferrals
    arrived_s: dict[int, float] = {}
    answers: dict[int, tuple[float, float, float, float]] = {}
    flights: list[tuple[float, float]] = []
    for a in attempts:
        spent = max(a.prompt_tokens, 0) + max(a.output_tokens, 0)
        used = spent if a.prompt_tokens >= 0 and a.output_tokens >= 0 else -1
        tally.launched()
        tally.answered(a.reserved_tokens, a.charged_tokens, spent, a.outcome in _THROTTLES)
        for i, cause in enumerate(_WAITED, 1):
            tally.waits_s[i] += getattr(a, cause)
        arrived_s[a.request] = min(a.submitted_s, arrived_s.get(a.request, math.inf))
        if a.outcome == Outcome.OK and a.lane == "main":
            answers[a.request] = (a.charged_tokens, used, a.finished_s - a.launched_s, max(a.prompt_tokens, 0))
        elif a.outcome == Outcome.OK and a.lane == "finalize":
            tally.work.finalized(a.charged_tokens, used)
        flights.append((a.launched_s, a.finished_s))
    for request, answer in answers.items():
        tally.work.add(arrived_s[request], *answer)
    for charge, least in lost:
        tally.work.add(0.0, charge, least, 0.0)
    for end in ends:
        tally.ended(end.failure, end.ended_s)
    tally.peak_in_flight = _peak(flights)
    return tally


_WAITED = tuple(f"waited_{cause}_s" for cause in CAUSES[1:])


def _peak(flights: Iterable[tuple[float, float]]) -> int:
    """Return the most of these (from, to) at once.

    At one instant answers precede launches, and empty flights come last.
    """
    events: list[tuple[float, int]] = []
    for from_s, to_s in flights:
        events += ((from_s, 1), (to_s, 2 if to_s == from_s else 0))
    in_flight = peak = 0
    for _, kind in sorted(events):
        in_flight += 1 if kind == 1 else -1
        peak = max(peak, in_flight)
    return peak
