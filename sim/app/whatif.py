"""What the service asks of the simulator: a quick forecast before it accepts a batch, and "what if" beside today.

Theory of operation. Both policies meet the same answers, latencies and faults, seed by seed, on the provider of the
pool's scenario, else on the one that today's settings believe in: proposing a higher limit does not make the provider
grant it. Somebody drags a slider, so time is what is given: runs are added, always in the same order of seeds, until
the time for them is used up. What is known of an answer (its tokens, its seconds) is taken as it was; the rest is drawn
anew in each run.

The compiled engine must first be compiled, once per machine and for many seconds, and that would hold up a server: a
process of its own does it, and until then SimPy's answers, which are the same, to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from governor.forecast.forecast import Outlook
from governor.model.estimate import EMBEDDINGS, Sizes
from governor.model.policy import KNOBS, Policy
from governor.model.requests import CAUSES
from sim.des.engines import engine_at_hand, simulated
from sim.model.provider_config import ProviderConfig
from sim.model.workload import Workload, constant
from sim.validation.assumptions import Assumptions, assumptions_of, scenario_assumptions
from sim.validation.run_forecast import SHARES, ForecastRun, case_of, run_once, workload_of

# Seconds of simulation for one answer; a pair of runs is made at least.
TIME_S = 0.12
_RUNS_MOST = 39
# For a batch whose sender waits for its acceptance.
FORECAST_REQUESTS = {"auto": 20_000, "simpy": 1_000}
FORECAST_RUNS = 5


def quick_forecast(outlook: Outlook) -> float | None:
    """Return when such a batch would finish in an idle pool: the median of some runs; None if that takes too long."""
    n = outlook.demand.requests
    engine = engine_at_hand()
    if not 0 < n <= FORECAST_REQUESTS[engine]:
        return None
    workload, models = workload_of(outlook)
    policy = outlook.pool.policy
    assumed = assumptions_of(outlook)
    provider = assumed.provider_for(policy, models)
    runs = max(1, min(FORECAST_RUNS, FORECAST_REQUESTS[engine] // n))
    planned = assumed.as_planned(workload)
    finishes = []
    for seed in range(outlook.seed, outlook.seed + runs):
        case = case_of(planned or assumed.answered(workload, seed), policy, provider, finalize=outlook.finalize)
        finishes.append(float(simulated(case, seed, engine=engine).last_s))
    return float(np.median(finishes))


def what_if(question: Mapping[str, Any]) -> dict[str, Any]:
    """See `governor/service/api/bodies.py` for the answer's shape."""
    begun, engine = time.perf_counter(), engine_at_hand()
    today, proposed = question["today"], question["proposed"]
    workload = _workload(question)
    models = np.full(len(workload), question["model"], dtype=object)
    assumed = scenario_assumptions(question["scenario"]) if question.get("scenario") else Assumptions()
    provider = assumed.provider_for(today, models)
    runs: list[tuple[ForecastRun, ForecastRun]] = []
    wanted = question["runs"]
    while len(runs) < (wanted or _RUNS_MOST):
        seed = question["seed"] + len(runs)
        drawn = _answered(workload, assumed, seed)
        finalize = question["finalize"]
        other = first = run_once(drawn, today, provider, finalize=finalize, seed=seed, engine=engine)
        if proposed != today:
            other = run_once(drawn, proposed, provider, finalize=finalize, seed=seed, engine=engine)
        runs.append((first, other))
        used_s = time.perf_counter() - begun
        if not wanted and used_s * (len(runs) + 1) / len(runs) > TIME_S:
            break
    return {
        "requests": len(workload),
        "runs": len(runs),
        "took_ms": (time.perf_counter() - begun) * 1_000.0,
        "today": _bands([run for run, _ in runs], today, provider),
        "proposed": _bands([run for _, run in runs], proposed, provider),
        "changes": question["changes"],
    }


def _workload(question: Mapping[str, Any]) -> Workload:
    """Return the batch as columns; unknown answers are 0 until they are drawn."""
    sizes: dict[str, Any] = {name: np.frombuffer(question["sizes"][name], np.int64) for name in Sizes.__slots__}
    count = len(question["output_tokens"])
    return Workload(
        **sizes,
        output_tokens=np.frombuffer(question["output_tokens"], np.int64),
        arrival_s=constant(0.0, count, np.float64),
        recorded_s=np.frombuffer(question["service_s"], np.float64),
    )


def _answered(workload: Workload, assumed: Assumptions, seed: int) -> Workload:
    """Return the workload with what is not known of its answers drawn."""
    known = np.asarray(workload.output_tokens)
    missing = (known < 0) & (np.asarray(workload.endpoint) != EMBEDDINGS)
    if not missing.any():
        return replace(workload, output_tokens=np.maximum(known, 0))
    drawn = assumed.answered(workload, seed)
    known_s = np.asarray(workload.recorded_s)
    return replace(
        drawn,
        output_tokens=np.where(known < 0, drawn.output_tokens, known),
        recorded_s=np.where(known_s < 0.0, drawn.recorded_s, known_s),
    )


def _bands(runs: list[ForecastRun], policy: Policy, provider: ProviderConfig) -> dict[str, Any]:
    finishes = [run.finish_s for run in runs]
    waits_s = {cause: float(np.mean([run.waits_s[i] for run in runs])) for i, cause in enumerate(CAUSES) if i}
    bound = max(waits_s, key=waits_s.__getitem__)
    ends = np.quantile(np.array([run.ends_at for run in runs]), (0.05, 0.5, 0.95), axis=0)
    milestones = [
        {"share": share, "p5_s": float(low), "p50_s": float(middle), "p95_s": float(high)}
        for share, low, middle, high in zip(SHARES, *ends, strict=True)
    ]
    efficiencies = [run.efficiency for run in runs if run.efficiency is not None]
    return {
        "finish_s": _quantiles(finishes),
        "throttled": _quantiles([float(run.throttled) for run in runs]),
        "failed": float(np.mean([run.failed for run in runs])),
        "waits_s": waits_s,
        "bound": bound if waits_s[bound] > 0.0 else "",
        "efficiency": float(np.mean(efficiencies)) if efficiencies else None,
        "milestones": milestones,
        "settings": {knob.env: getattr(policy, knob.name) for knob in KNOBS},
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    p5, p50, p95 = (float(value) for value in np.quantile(values, (0.05, 0.5, 0.95)))
    assert math.isfinite(p95), "a run that never ends"
    return {"p5": p5, "p50": p50, "p95": p95}
