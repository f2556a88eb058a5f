"""The two engines are one: SimPy and machine code, same scenario and seed, give the same run, to the bit.

What is compared: every column of every attempt in order of their ends, and every count of the run's tally. Nothing is
rounded, and nothing is sorted first.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from typing import Any

import numpy as np
import pytest

from governor.model.errors import FailureCode
from governor.model.requests import Attempt, Outcome
from sim.experiment.experiment import OUTCOMES, attempt_rows, case_of, figures_of, simulated
from sim.model.synthetic import from_tokens
from sim.scenario.scenario import Scenario
from tests.scenarios import drawn, scenario_of, shown

SCENARIOS = 1_000
# A longer form: PACELINE_ENGINES=5000000 pytest -m long tests/test_engines.py
LONG_REQUESTS = int(os.environ.get("PACELINE_ENGINES", "1000000"))


def run(scenario: Scenario, engine: Any) -> tuple[list[Attempt], dict[str, Any]]:
    """Attempts and counts of a run by that engine."""
    case = case_of(scenario)
    rows: list[Attempt] = []
    tally = simulated(case, scenario.seed, attempt_rows(scenario, rows.append), engine=engine)
    figures = dataclasses.asdict(figures_of(tally, case.grant, scenario.seed))
    return rows, dataclasses.asdict(tally) | {"figures": repr(figures)}


def difference(ours: list[Any], theirs: list[Any]) -> str:
    """The first difference between the attempts, "" if there is none."""
    for n, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            columns = [name for name in Attempt.columns() if getattr(a, name) != getattr(b, name)]
            parts = [f"{name}: SimPy {getattr(a, name)!r}, compiled {getattr(b, name)!r}" for name in columns]
            return f"attempt {n} (request {a.request}, {a.lane} {a.attempt}): " + "; ".join(parts)
    return "" if len(ours) == len(theirs) else f"{len(ours)} attempts with SimPy, {len(theirs)} compiled"


def compared(seed: int, counts: dict[str, int]) -> None:
    """One drawn scenario by both engines."""
    scenario = drawn(seed)
    rows, tally = run(scenario, "simpy")
    their_rows, their_tally = run(scenario, "compiled")
    assert not difference(rows, their_rows), f"{difference(rows, their_rows)}\nin {shown(seed, scenario)}"
    # As text, in which 0 and 0.0, and another order of failures, differ too.
    both = {name: (repr(tally[name]), repr(their_tally[name])) for name in tally}
    differing = {name: values for name, values in both.items() if values[0] != values[1]}
    assert not differing, f"{differing}\nin {shown(seed, scenario)}"
    seen(scenario, rows, tally, counts)


def seen(scenario: Scenario, rows: list[Attempt], tally: dict[str, Any], counts: dict[str, int]) -> None:
    """Counts what really occurred."""
    policy, provider = scenario.policy, scenario.provider
    counts["scenarios"] += 1
    counts["requests"] += len(scenario.workload)
    counts["attempts"] += len(rows)
    happened = {
        **{str(outcome): sum(a.outcome == outcome for a in rows) for outcome in {a.outcome for a in rows}},
        "retries": sum(a.attempt > 1 for a in rows),
        "kept permits": sum(a.attempt > 1 for a in rows) * policy.backoff_keeps_permit,
        "held": sum(a.waited_hold_s > 0.0 for a in rows),
        "finalize": sum(a.lane == "finalize" for a in rows),
        "trace": len(rows) * (scenario.arrivals == "trace"),
        "longest first": len(rows) * (policy.launch_order == "longest_first"),
        "fixed": len(rows) * (policy.tpm_window == "fixed"),
        "sliding": len(rows) * (policy.tpm_window == "sliding"),
        "bucket": len(rows) * (policy.tpm_window == "bucket"),
        "synced": len(rows) * policy.sync_headers,
        **{f"counts: {provider.counts}": len(rows) * policy.sync_headers},
        "settled": len(rows) * policy.settle,
        "co-tenant": len(rows) * (provider.cotenant.share > 0.0),
        "limit changes": len(rows) * bool(provider.limit_changes),
        "slices": len(rows) * (provider.slice_s > 0.0),
        "ramp": len(rows) * (provider.ramp_tpm > 0),
        f"{provider.window} window": len(rows),
        "small burst": len(rows) * (provider.burst_s < 60.0),
        f"charged at {provider.charged}": len(rows),
        "day": sum(a.waited_day_s > 0.0 for a in rows),
        "stalls": len(rows) * (provider.latency.stall_ratio > 0.0),
        "outages": len(rows) * bool(provider.outages),
        "hangs": len(rows) * (provider.faults.hang_ratio > 0.0),
        "recorded": int((scenario.workload.recorded_s >= 0.0).sum()),
        "late": tally["failures"].get(FailureCode.DEADLINE_EXCEEDED, 0),
        "too large": tally["failures"].get(FailureCode.REQUEST_TOO_LARGE, 0),
        "credit gone": tally["failures"].get(FailureCode.INSUFFICIENT_QUOTA, 0),
        "waits too long": tally["failures"].get(FailureCode.OUTWAITED, 0),
    }
    for name, count in happened.items():
        counts[name] = counts.get(name, 0) + int(count)


def compared_until(seed: int, scenarios: int, requests: int) -> dict[str, int]:
    """Scenario after scenario, until so many, and so many requests, went through both. Prints what it saw."""
    counts = dict.fromkeys(("scenarios", "requests", "attempts"), 0)
    begun = time.perf_counter()
    first = random.Random(seed).randrange(2**40)
    while counts["scenarios"] < scenarios or counts["requests"] < requests:
        compared(first + counts["scenarios"], counts)
    print(f"seed {seed}: {counts} in {time.perf_counter() - begun:.1f} s")
    return counts


def occurred(counts: dict[str, int], least: int) -> None:
    """It is no comparison unless everything occurred, and often."""
    outcomes = {str(outcome): 0 for outcome in OUTCOMES if outcome is not Outcome.TOO_LARGE}
    rare = {name: count for name, count in (outcomes | counts).items() if count < least and name != Outcome.TOO_LARGE}
    assert not rare, rare


def test_both_engines_give_the_same_attempts(seed: int) -> None:
    counts = compared_until(seed, SCENARIOS, 0)
    occurred(counts, 20)


@pytest.mark.long
def test_both_engines_for_longer(seed: int) -> None:
    counts = compared_until(seed + 1, 1_000, LONG_REQUESTS)
    occurred(counts, 1_000)


@pytest.mark.parametrize("engine", ["simpy", "compiled"])
@pytest.mark.parametrize("arrives_s", [0.0, 0.5])
def test_the_bound_is_of_all_that_was_asked_for(engine: Any, arrives_s: float) -> None:
    """200 requests a day: 500 take 300 / 200 of a day at least, however many of them a policy gives up."""
    arrivals: dict[str, Any] = {"arrival_s": np.arange(500) * arrives_s} if arrives_s else {}
    workload = from_tokens(np.full(500, 10), np.full(500, 5), max_tokens=20, **arrivals)
    case = case_of(scenario_of(workload, provider={"rpd": 200}, arrivals="trace" if arrives_s else "batch"))
    summary = simulated(case, 0, engine=engine).summary(case.grant)
    assert summary.failed > 100
    assert summary.efficiency is None
    assert summary.bound_s == pytest.approx(1.5 * 86_400.0, rel=0.01)
