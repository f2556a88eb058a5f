"""What a run would have been under other settings, compared request by request with what it was: `paceline replay`.

Statistics. The interval of a difference is that in which one more run lies, Student's mean +- t x sd x sqrt(1 + 1/n)
over the replications (`replay` says in what they differ). Its sd has a second part: what the provider's model misses of
this very run when it decides on every refusal; and a makespan's is widened by the error of the model that no
replication varies (`model_error`). Both are left out where the two runs never part: the journal has seen it all then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from governor.model.policy import KNOBS
from governor.model.requests import CAUSES
from sim.des.run import TIMEOUT
from sim.experiment.results import CONFIDENCE
from sim.model.provider_config import ProviderConfig
from sim.validation.backtest import RUNS_LEAST, RUNS_MOST
from sim.validation.model_error import measured
from sim.validation.replay import ReplayedRun, Rewrite, Stage
from sim.validation.run_forecast import REQUESTS_SIMULATED

# Ends that differ by at most this, in seconds, count as equal.
SAME_S = 0.1


class PairedFigure(NamedTuple):
    """One figure as it was (nan = not known) and under the other settings; their difference with its 95 % interval."""

    was: float
    would: float
    difference: float
    low: float
    high: float


class EndDelays(NamedTuple):
    """The delay of requests answered in both runs, in seconds (negative: sooner), and the shares that are delayed."""

    requests: int
    median_s: PairedFigure
    sooner_ratio: float
    later_ratio: float


@dataclass(frozen=True, slots=True)
class RequestPair:
    """One request in both runs: when it ended, seconds since the first launch (the mean over replications)."""

    custom_id: str
    was_s: float
    would_s: float
    was_lost: bool
    would_lost_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Counterfactual:
    """A run beside what it would have been. `changed`: env name -> (was, is). `own`: under its own settings.

    `alone`: under its own settings where the provider's model decides on every refusal. `parted_s`: the earliest
    launch that differs, None = none does. `is_log`: of another client, whose own settings are not known.
    """

    requests: int
    replications: int
    changed: dict[str, tuple[str, str]]
    makespan_s: PairedFigure
    throttled: PairedFigure
    launches: PairedFigure
    lost: PairedFigure
    waits_s: dict[str, PairedFigure]
    ends: EndDelays
    own: ReplayedRun | None
    alone: ReplayedRun
    parted_s: float | None
    provider: ProviderConfig
    provider_from: str
    pairs: tuple[RequestPair, ...]
    untold: tuple[str, ...]
    is_log: bool = False


def counterfactual(
    stages: Sequence[Stage],
    rewrite: Rewrite,
    *,
    runs: int = 0,
    provider_from: str = "",
    model_error_ratio: float | None = None,
) -> Counterfactual:
    """Replay these pools under rewritten settings. `runs`: replications, 0 = as many as `backtest` makes.

    `model_error_ratio`: of the makespan, None = as measured.
    """
    requests = sum(len(stage.lesson.workload) for stage in stages)
    runs = runs or max(RUNS_LEAST, min(RUNS_MOST, REQUESTS_SIMULATED // max(1, requests)))
    would = [_together(each) for each in zip(*(stage.reruns(runs, rewrite) for stage in stages), strict=True)]
    alone = _together([stage.alone() for stage in stages])
    was = _together([stage.as_it_was() for stage in stages])
    own = [stage.own for stage in stages if stage.own is not None]
    is_log = not own
    parted = [each.parted_s for each in would if each.parted_s is not None]
    has_parted = bool(parted) or is_log

    def pair(of: Callable[[ReplayedRun], float], model_error_ratio: float = 0.0) -> PairedFigure:
        values = np.array([of(each) for each in would])
        missed = abs(of(alone) - of(was)) if has_parted else 0.0
        model = model_error_ratio * float(values.mean()) if has_parted else 0.0
        return _paired(of(was), values, missed, -of(was), model)

    throttled = pair(lambda each: each.throttled)
    if model_error_ratio is None:
        model_error_ratio = measured().replay[throttled.was + throttled.high > 0.0]
    changed: dict[str, tuple[str, str]] = {}
    for stage in stages:
        before, after = stage.lesson.policy, rewrite(stage.lesson.policy)
        for knob in KNOBS:
            if getattr(before, knob.name) != getattr(after, knob.name):
                changed[knob.env] = knob.text(getattr(before, knob.name)), knob.text(getattr(after, knob.name))
    return Counterfactual(
        requests=requests,
        replications=runs,
        changed=changed,
        makespan_s=pair(lambda each: each.makespan_s, model_error_ratio),
        throttled=throttled,
        launches=pair(lambda each: each.launches),
        lost=pair(lambda each: float(each.is_lost.sum())),
        waits_s={
            cause: pair(lambda each, i=i: float(each.waits_s[i]))  # type: ignore[misc]
            for i, cause in enumerate(CAUSES)
            if i and any(each.waits_s[i] > 0.0 for each in (was, *would))
        },
        ends=_ends(was, would, alone if has_parted else was),
        own=_together(own) if own else None,
        alone=alone,
        parted_s=min(parted, default=None),
        provider=stages[0].provider,
        provider_from=provider_from,
        pairs=_pairs(stages, was, would),
        untold=_untold(stages, would),
        is_log=is_log,
    )


def _together(parts: Sequence[ReplayedRun]) -> ReplayedRun:
    """Combine pools that work in parallel: the last one ends the run, and counts add up."""
    parted = [part.parted_s for part in parts if part.parted_s is not None]
    return ReplayedRun(
        max(part.makespan_s for part in parts),
        sum(part.throttled for part in parts),
        sum(part.launches for part in parts),
        np.sum([part.waits_s for part in parts], axis=0),
        np.concatenate([part.ends_s for part in parts]),
        np.concatenate([part.is_lost for part in parts]),
        min(parted, default=None),
    )


def _paired(was: float, values: NDArray[np.float64], missed: float, least: float, model: float = 0.0) -> PairedFigure:
    """Return the mean difference, with the interval of one more run's; `missed`: sd of the provider's model.

    `least`: below which no difference can be. `model`: 95 % half-width of what is not in either.
    """
    from scipy.special import stdtrit

    n, mean = len(values), float(values.mean())
    own = float(values.std(ddof=1)) * math.sqrt(1.0 + 1.0 / n) if n > 1 else 0.0
    half = float(stdtrit(max(1, n - 1), 0.5 + CONFIDENCE / 2.0)) * math.hypot(own, missed)
    half = math.hypot(half, model)
    return PairedFigure(was, mean, mean - was, max(mean - was - half, least), mean - was + half)


def _ends(was: ReplayedRun, would: Sequence[ReplayedRun], alone: ReplayedRun) -> EndDelays:
    moved = []
    for each in would:
        both = ~(was.is_lost | each.is_lost)
        moved.append((each.ends_s - was.ends_s)[both] if both.any() else np.zeros(1))
    medians = np.array([float(np.median(each)) for each in moved])
    missed = abs(float(np.median(alone.ends_s - was.ends_s)))
    return EndDelays(
        len(moved[0]),
        _paired(0.0, medians, missed, -math.inf),
        float(np.mean([(each < -SAME_S).mean() for each in moved])),
        float(np.mean([(each > SAME_S).mean() for each in moved])),
    )


def _pairs(stages: Sequence[Stage], was: ReplayedRun, would: Sequence[ReplayedRun]) -> tuple[RequestPair, ...]:
    names = [stage.lesson.workload.custom_id(i) for stage in stages for i in range(len(stage.lesson.workload))]
    ends_s = np.mean([each.ends_s for each in would], axis=0).tolist()
    lost = np.mean([each.is_lost for each in would], axis=0).tolist()
    rows = zip(names, was.ends_s.tolist(), ends_s, was.is_lost.tolist(), lost, strict=True)
    return tuple(RequestPair(*row) for row in rows)


def _untold(stages: Sequence[Stage], would: Sequence[ReplayedRun]) -> tuple[str, ...]:
    """Return what the journal cannot show of this counterfactual, and how it is filled in."""
    notes = []
    unanswered = sum(stage.lesson.unanswered for stage in stages)
    if unanswered:
        notes.append(f"the answers of {unanswered:,} requests that never got one: drawn from those to similar prompts")
    unfinished = sum(stage.lesson.unfinished for stage in stages)
    if unfinished:
        notes.append(f"{unfinished:,} requests that have not ended: left out on both sides")
    timed_out = sum(tried.outcome == TIMEOUT for stage in stages for tried in stage.lesson.record.tried.values())
    if timed_out:
        notes.append(f"when {timed_out:,} attempts that timed out would have been answered: never, in both runs")
    if any(each.parted_s is not None for each in would):
        notes.append("attempts beyond those that were made: their times and faults are drawn from the others'")
        if any(stage.takings for stage in stages):
            notes.append("what others use after the run's end: their pattern is repeated from a random moment of it")
    return tuple(notes)
