"""Decide whether a batch may start, and if not, how long to wait. Pure arithmetic: no clock, no simulation, no I/O.

Two modes, because the guardrails' literal rule would refuse the very batch that their own checklist starts (ten runs of
7,000 tokens against 25,500 usable ones):

* `strict` is that rule: runs x estimate must fit into one minute's budget, in addition to what is already booked in it.
* `paced` trusts the governor to pace a batch of any size, and refuses only a batch that could not start or never
  finish: a request larger than a limit, or a window so full that not even the smallest request fits into it now.

In both, a forecast past the caller's deadline is refused. Waiting helps if only the booked tokens stand in the way; the
suggested wait is in whole seconds, as in Retry-After: the smallest number that is enough, so it is never a second too
long. If waiting cannot help, no wait is suggested.

The forecast is a callable that simulates, injected by a caller that has a simulator. Without one, `fluid_forecast`
serves: the largest of the times that each knob alone would need, as if work were a fluid. It ignores tails, throttles
and interplay and is mostly too early; the verdict says which of the two was used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from governor.law import (
    BUCKET,
    BY_TPM,
    FIXED,
    FIXED_S,
    MINUTE_S,
    RPD,
    RPM,
    SLIDING,
    TPD,
    TPM,
    Params,
    State,
    cell_s,
    held_of,
    used_in,
)
from governor.model.errors import FailureCode
from governor.model.needs import Weights
from governor.model.phrases import amount_text, limit_name, what_of
from governor.model.policy import Policy

# Bookings are sums of floating-point shares of whole tokens: anything below this is not a token.
_ROUNDING = 1e-6
_NO_LIMIT = 1e15


@dataclass(frozen=True, slots=True)
class Load:
    """A batch's reservations: number of runs, and the tokens of all runs, of the largest and of the smallest.

    `prompt`: how many of all tokens are input; `prompt_largest`, `output_largest`: the most input, and the most tokens
    beside it, of a run. They matter where a profile limits input and output apart.
    """

    count: int
    total: int
    largest: int
    smallest: int
    prompt: int = 0
    prompt_largest: int = 0
    output_largest: int = 0

    @classmethod
    def of(cls, reservations: Iterable[int]) -> Load:
        """Return the load of single reservations, read once."""
        count, total, largest, smallest = 0, 0, 0, 0
        for tokens in reservations:
            smallest = tokens if count == 0 else min(smallest, tokens)
            largest = max(largest, tokens)
            count += 1
            total += tokens
        return cls(count, total, largest, smallest)

    @classmethod
    def uniform(cls, runs: int, tokens_per_run: int) -> Load:
        """Return the load of `runs` equal runs: the guardrails' runs x estimate."""
        return cls(runs, runs * tokens_per_run, tokens_per_run, tokens_per_run)

    @classmethod
    def even(cls, runs: int, tokens: float, prompt_ratio: float) -> Load:
        """Return the load of `runs` runs of the mean size: `tokens` in all, of which that share is input."""
        mean = max(1, round(tokens / max(1, runs)))
        prompt = round(prompt_ratio * mean)
        return cls(runs, mean * runs, mean, mean, prompt * runs, prompt, mean - prompt)

    def amounts(self, weights: Weights) -> list[float]:
        """Return what all runs take of each dimension."""
        rates = zip(weights.per_request, weights.per_input, weights.per_output, strict=True)
        return [
            self.count * each + (into * self.prompt + out * (self.total - self.prompt)) for each, into, out in rates
        ]

    def peaks(self, weights: Weights) -> list[float]:
        """Return what the largest run takes of each dimension, or less where input and output differ in weight."""
        rates = zip(weights.per_request, weights.per_input, weights.per_output, strict=True)
        return [
            each + max(into * self.prompt_largest, out * self.output_largest, min(into, out) * self.largest)
            for each, into, out in rates
        ]


@dataclass(frozen=True, slots=True)
class InUse:
    """Tokens booked in the window of dimension `place` now, and how they free if nothing else is launched.

    `frees_in_s`: seconds until none is left. `continuous`: they free evenly over that time (a bucket), else all at its
    end (a fixed minute). `releases`: (seconds from now, tokens) if they free in steps instead (a sliding window). Raise
    ValueError for tokens without a time: they would count as free already.
    """

    tokens: float = 0.0
    frees_in_s: float = 0.0
    continuous: bool = False
    releases: tuple[tuple[float, float], ...] = ()
    place: int = TPM

    def __post_init__(self) -> None:
        if self.tokens > 0.0 and not (0.0 < self.frees_in_s < math.inf):
            raise ValueError(f"{self.tokens:,.0f} tokens in use must free in some time, not {self.frees_in_s} s")

    def after(self, wait_s: float) -> int:
        """Return the whole tokens still booked after a wait."""
        if self.releases:
            left = self.tokens - math.fsum(tokens for at_s, tokens in self.releases if at_s <= wait_s)
        elif wait_s >= self.frees_in_s:
            left = 0.0
        elif self.continuous:
            left = self.tokens * (1.0 - wait_s / self.frees_in_s)
        else:
            left = self.tokens
        return max(0, math.ceil(left - _ROUNDING))

    def wait_for(self, room: int) -> int:
        """Return the smallest number of whole seconds until at most `room` tokens (0 or more) are booked."""
        low, high = -1, math.ceil(self.frees_in_s)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.after(middle) <= room else (middle, high)
        return high


def in_use(p: Params, s: State, now: float) -> InUse:
    """Return the law's bookings against this minute's tokens, and how they free from `now` on.

    Of several such dimensions the fullest counts.
    """
    held = {d: used_in(p, s, d, now) for d in range(p.dimensions) if p.limit[d] > 0.0 and p.cause[d] == BY_TPM}
    d = max(held, key=lambda d: held[d] / p.budget[d], default=TPM)
    tokens = held.get(d, 0.0)
    if tokens <= _ROUNDING:
        return InUse()
    if p.window[d] == BUCKET:
        return InUse(tokens, s.full_at[d] - now, continuous=True, place=d)
    if p.window[d] != SLIDING:
        return InUse(tokens, max(_ROUNDING, s.window_at[d] + _length_s(p, d) - now), place=d)
    releases = []
    step_s = cell_s(p, d)
    before, cell = tokens, math.floor(now / step_s)
    while before > _ROUNDING:
        cell += 1
        left = used_in(p, s, d, cell * step_s)
        if left < before:
            releases.append((cell * step_s - now, before - left))
        before = left
    return InUse(tokens, releases[-1][0], releases=tuple(releases), place=d)


def _length_s(p: Params, d: int) -> float:
    """Return the length of a window as the law holds it: a fixed one with the slack for the provider's clock."""
    return p.length_s[d] + (FIXED_S - MINUTE_S if p.window[d] == FIXED else 0.0)


# ---------------------------------------------------------------- the fluid forecast


@dataclass(frozen=True, slots=True)
class Fluid:
    """A forecast that treats work as a fluid. `bound`: the cause that needs longest, as in `waits_s`, or the name of a
    profile's dimension; "" = none.

    `finish_s`: seconds from the start, the last answer included if the service time is known. `last_launch_s`: the
    times that each knob alone would need until the last launch.
    """

    finish_s: float
    bound: str
    last_launch_s: dict[str, float]


def fluid_forecast(policy: Policy, load: Load, *, booked: InUse = InUse(), service_s: float = 0.0) -> Fluid:
    """Return when a batch would finish under this policy: the largest of the times that single knobs need.

    `service_s`: mean time of an answer, 0 = unknown (then concurrency costs nothing and the last answer takes no time).
    """
    p = policy.believing().params()
    n = load.count
    if n == 0:
        return Fluid(0.0, "", {})
    weights = policy.weights
    amounts, peaks = load.amounts(weights), load.peaks(weights)
    by_place = [
        _window_s(p, d, amounts[d], peaks[d], n, booked if d == booked.place else InUse()) for d in range(p.dimensions)
    ]
    if policy.quota:
        limits_s = {each.name: by_place[each.place] for each in policy.quota}
    else:
        limits_s = {"tpm": by_place[TPM], "rpm": by_place[RPM], "day": max(by_place[TPD], by_place[RPD])}
    last_launch_s = {
        "concurrency": (math.ceil(n / p.max_concurrency) - 1) * service_s,
        "stagger": (n - 1) * p.stagger_s,
        **limits_s,
    }
    bound = max(last_launch_s, key=last_launch_s.__getitem__)
    longest_s = last_launch_s[bound]
    return Fluid(longest_s + service_s, bound if longest_s > 0.0 else "", last_launch_s)


def _bucket_s(p: Params, d: int, amount: float, largest: float, used: float = 0.0) -> float:
    """Return seconds until the last of `amount` fits into a bucket that is full except for `used`.

    A run above the budget needs the whole bucket.
    """
    if p.limit[d] <= 0.0:
        return 0.0
    return max(0.0, used + amount - max(held_of(p, d, p.budget[d]), largest)) / p.rate_per_s[d]


def _window_s(p: Params, d: int, amount: float, largest: float, n: int, booked: InUse) -> float:
    """Return seconds until the last of `amount` fits a window's limit, in whole runs of the mean size.

    The policy's kind of window decides how the limit frees.
    """
    if p.limit[d] <= 0.0 or amount <= 0.0:
        return 0.0
    if p.window[d] == BUCKET:
        return _bucket_s(p, d, amount, largest, booked.tokens)
    per_minute = max(1, math.floor(p.budget[d] * n / amount + _ROUNDING))
    minute_s = _length_s(p, d)
    at_once, next_minute_s = per_minute, minute_s
    if booked.tokens > 0.0:
        at_once = math.floor(max(0.0, p.budget[d] - booked.tokens) * n / amount + _ROUNDING)
        next_minute_s = booked.frees_in_s
    if n <= at_once:
        return 0.0
    return next_minute_s + (math.ceil((n - at_once) / per_minute) - 1) * minute_s


# ---------------------------------------------------------------- the verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The verdict on a batch. A refusal is `503 BATCH_RATE_LIMITED` with these fields.

    `code`: "" or BATCH_RATE_LIMITED. `reason`: one line with the figures and the remedy. `suggested_wait_s`: whole
    seconds, also for Retry-After; None if waiting does not help, and then `retryable` is false. `max_runs_now`: how
    many of the runs, whichever they are, would be admitted now. `forecast_finish_s`: None if it never finishes.
    `forecast_bound`: the cause that limits the batch by the fluid forecast, as in `waits_s`.
    """

    ok: bool
    code: str
    reason: str
    projected_tokens: int
    budget_tokens: int
    in_use_tokens: int
    suggested_wait_s: int | None
    retryable: bool
    max_runs_now: int
    forecast_finish_s: float | None
    forecast_by: Literal["fluid", "simulation", "turnaround"]
    forecast_bound: str


def preflight(
    policy: Policy,
    load: Load,
    *,
    booked: InUse = InUse(),
    deadline_s: float | None = None,
    forecast: Callable[[], float] | None = None,
    service_s: float = 0.0,
) -> Verdict:
    """Return whether a batch of this load may start now, by the policy's `preflight_mode`.

    `booked`: tokens held by running work. `deadline_s`: seconds from now within which the caller needs the last answer;
    waiting does not move that moment, so a forecast past it is final. `forecast`: simulates this batch and returns its
    finish in seconds (inf = never), called only if nothing else refuses. `service_s`: as for `fluid_forecast`.
    """
    fluid = fluid_forecast(policy, load, booked=booked, service_s=service_s)
    believed = policy.believing()
    d = _fullest(believed, load, booked)
    budget = int(min(believed.params().budget[d], _NO_LIMIT))
    held = booked if booked.place == d else InUse()
    by: Literal["fluid", "simulation"] = "fluid"
    never = _never(policy, load)
    reason, wait_s, runs = never or _full(policy, load, held, d, budget) or ("", None, load.count)
    finish_s = math.inf if never else fluid.finish_s
    if not reason and load.count:
        if forecast is not None:
            finish_s, by = forecast(), "simulation"
        if deadline_s is not None and finish_s > deadline_s:
            runs = _runs_within(policy, load, booked, service_s, deadline_s, finish_s)
            reason = (
                f"the forecast finish is {finish_s:,.1f} s from now, the deadline is {deadline_s:,.1f} s: allow more "
                f"time, change what holds it back ({fluid.bound or 'the answers themselves'}), or send "
                f"{f'about {runs:,} runs' if runs else 'shorter runs'}"
            )
    return Verdict(
        ok=not reason,
        code=FailureCode.BATCH_RATE_LIMITED.value if reason else "",
        reason=reason,
        projected_tokens=int(load.amounts(policy.weights)[d]),
        budget_tokens=budget,
        in_use_tokens=held.after(0.0),
        suggested_wait_s=wait_s,
        retryable=not reason or wait_s is not None,
        max_runs_now=runs,
        forecast_finish_s=finish_s if finish_s < math.inf else None,
        forecast_by=by,
        forecast_bound=fluid.bound,
    )


_Refusal = tuple[str, int | None, int]  # reason, wait in whole seconds or None, runs that may go now


def _fullest(policy: Policy, load: Load, booked: InUse) -> int:
    """Return the dimension of tokens that the batch and running work fill most."""
    p, amounts = policy.params(), load.amounts(policy.weights)
    counted = [d for d in range(p.dimensions) if p.limit[d] > 0.0 and p.cause[d] == BY_TPM]
    held = booked.after(0.0)
    return max(counted, key=lambda d: (amounts[d] + held * (d == booked.place)) / p.budget[d], default=TPM)


def _never(policy: Policy, load: Load) -> _Refusal | None:
    """Return a refusal if some run can never be admitted."""
    p, peaks = policy.params(), load.peaks(policy.weights)
    for d in range(p.dimensions):
        is_sought = d == TPM and policy.find_limits in ("tokens", "both")
        if 0.0 < p.limit[d] < peaks[d] and not is_sought:
            needs = f"a run needs {amount_text(peaks[d])} {what_of(policy, d)}"
            return (
                f"{needs}, the limit is {amount_text(p.limit[d])}: shorten it or raise {limit_name(policy, d)}",
                None,
                0,
            )
    return None


def _full(policy: Policy, load: Load, booked: InUse, d: int, budget: int) -> _Refusal | None:
    """Return a refusal if the minute has no room for the whole batch (`strict`), or for any of its runs (`paced`)."""
    if load.count == 0:
        return None
    weights, held = policy.weights, booked.after(0.0)
    total, largest = int(load.amounts(weights)[d]), int(load.peaks(weights)[d])
    figures = f"{total:,} {what_of(policy, d)} projected, {budget:,} in the budget, {held:,} in use"
    if policy.preflight_mode == "strict":
        if total + held <= budget:
            return None
        runs = min(load.count, max(0, budget - held) // max(1, largest))
        if total > budget:
            remedy = "send fewer runs at once"
            if largest > budget:
                remedy = f"shorten runs to that, or raise {limit_name(policy, d)} (the largest needs {largest:,})"
            return f"{figures}: the batch alone is over one minute's budget; {remedy}", None, runs
        need = total
    else:
        # A run above the budget goes alone, into an empty window.
        need = min(int(min(weights.per_input[d], weights.per_output[d]) * load.smallest), budget)
        if need + held <= budget:
            return None
        runs = 0
    wait_s = booked.wait_for(budget - need)
    return f"{figures}: running work has filled this minute; try again in {wait_s} s", wait_s, runs


def _runs_within(
    policy: Policy, load: Load, booked: InUse, service_s: float, deadline_s: float, finish_s: float
) -> int:
    """Estimate how many of the runs would finish in time: the fluid forecast, scaled to agree on the whole batch."""

    def fluid_s(runs: int) -> float:
        total, prompt = (math.ceil(each * runs / load.count) for each in (load.total, load.prompt))
        part = replace(load, count=runs, total=total, prompt=prompt)
        return fluid_forecast(policy, part, booked=booked, service_s=service_s).finish_s

    whole_s = fluid_s(load.count)
    if whole_s <= 0.0:
        return max(0, math.floor(load.count * deadline_s / finish_s))
    stretch = max(1.0, finish_s / whole_s)
    low, high = 0, load.count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fluid_s(middle) * stretch <= deadline_s else (low, middle)
    return low
