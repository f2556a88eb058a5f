"""The forecast that a live run asks for before it starts: its own requests, simulated under its own settings.

Theory of operation. Each simulated run has its own seed and its own draw of the answers, so that the interval holds
what chance does; it does not hold what is assumed. Of a provider that was learnt from a run it does hold what that run
left open, and the model's error (`model_error`). Of n runs, smallest and largest enclose the next one with
probability (n - 1) / (n + 1): 95 % for 39. A batch that allows fewer has Student's prediction interval, mean +- t x sd
x sqrt(1 + 1/n): there a rare stall of one answer no longer decides the finish. About 60,000 requests are simulated in
all, some seconds' work, in at least 2 runs; a batch of more than 300,000 gets the fluid estimate, which is not worse
where chance averages out.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from governor.forecast.forecast import Expectation, Outlook, fluid
from governor.model.estimate import Sizes
from governor.model.policy import Policy
from governor.model.requests import CAUSES
from sim.des.engines import Engine, chosen, simulated
from sim.experiment.experiment import Case
from sim.experiment.results import CONFIDENCE, percentile
from sim.model.provider_config import ProviderConfig
from sim.model.workload import Workload, columns, constant
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import ModelSource
from sim.scenario.unknowns import FRESH_DRAWS, FRESH_SEEDS, Unknowns, drawn
from sim.validation.assumptions import assumptions_of
from sim.validation.model_error import measured, widened

REQUESTS_SIMULATED = 60_000
RUNS_LEAST, RUNS_MOST = 2, 39
REQUESTS_MOST = 300_000
# Draws of the unknowns, and the fewest that a 95th percentile needs.
DRAWS, DRAWS_LEAST = 100, 19
SHARES = tuple(i / 20.0 for i in range(1, 21))


def foresee(outlook: Outlook, model_error_ratio: float | None = None) -> Expectation:
    """Return the simulated forecast of this pool's run.

    `model_error_ratio`: of the finish on a provider that was learnt from a run, None = as measured.
    """
    if not 0 < outlook.demand.requests <= REQUESTS_MOST:
        return fluid(outlook)
    workload, models = workload_of(outlook)
    n = len(workload)
    policy = outlook.pool.policy
    assumed = assumptions_of(outlook)
    provider = assumed.provider_for(policy, models)
    runs = max(RUNS_LEAST, min(RUNS_MOST, REQUESTS_SIMULATED // max(1, n)))
    engine = chosen("auto", n * runs)
    seeds = range(outlook.seed, outlook.seed + runs)
    answers = [assumed.answered(workload, seed) for seed in seeds]

    def runs_on(conditions: Sequence[tuple[Workload, ProviderConfig]]) -> list[ForecastRun]:
        return [
            run_once(answered, policy, on, finalize=outlook.finalize, seed=seed, engine=engine)
            for seed, (answered, on) in zip(seeds, conditions, strict=True)
        ]

    found = runs_on([(answered, provider) for answered in answers])
    finish = _interval([run.finish_s for run in found])
    planned = assumed.as_planned(workload)
    if planned is not None:
        # The plan's figure holds for the answers that it drew once: the same figure here, within what chance does.
        likely = median(
            run_once(planned, policy, provider, finalize=outlook.finalize, seed=seed, engine=engine).finish_s
            for seed in seeds
        )
        finish = min(likely, finish[0]), likely, max(likely, finish[2])
    throttled = _interval([float(run.throttled) for run in found])
    if provider.learnt_from:
        # The likely finish is the one as learnt; how far it may be off, that of what was left open.
        drawn_from = [
            _as_learnt(answered, outlook, provider, assumed.unknowns, i) for i, answered in enumerate(answers)
        ]
        others = runs_on(drawn_from)
        low, _, high = _interval([run.finish_s for run in others])
        finish = min(low, finish[0]), finish[1], max(high, finish[2])
        counts = _interval([float(run.throttled) for run in others])
        throttled = min(counts[0], throttled[0]), throttled[1], max(counts[2], throttled[2])
        ratio = measured().forecast[throttled[2] > 0.0] if model_error_ratio is None else model_error_ratio
        finish = widened(*finish, ratio)
    late_s = outlook.delay_s()
    finish = finish[0] + late_s, finish[1] + late_s, finish[2] + late_s
    promise_s = None
    # On the way of a run part of what was not known has shown: the promise is one of its beginning.
    if assumed.path and outlook.assumed is None:
        promise_s = _promise_s(planned or assumed.answered(workload, outlook.seed), outlook, provider, assumed.unknowns)
    attempts = _interval([float(run.attempts) for run in found])
    waits_s = {cause: sum(run.waits_s[i] for run in found) for i, cause in enumerate(CAUSES) if i}
    bound = max(waits_s, key=waits_s.__getitem__)
    ends = np.array([run.ends_at for run in found])
    tokens = np.mean([run.answer_tokens for run in found], axis=0)
    return Expectation(
        by="simulation",
        runs=runs,
        requests=n,
        finish_s=finish[1],
        low_s=finish[0],
        high_s=finish[2],
        throttled=throttled[1],
        throttled_low=throttled[0],
        throttled_high=throttled[2],
        attempts=attempts[1],
        attempts_low=max(float(n), attempts[0]),
        attempts_high=attempts[2],
        bound=bound if waits_s[bound] > 0.0 else "",
        service_s=float(np.mean([run.service_s for run in found])),
        answer_tokens={model: float(tokens[models == model].sum()) for model in dict.fromkeys(models.tolist())},
        milestones=((0.0, 0.0, 0.0), *_milestones(ends + late_s)),
        assumed=assumed.to_json_dict(),
        promise_s=None if promise_s is None else promise_s + late_s,
        cached_share=provider.tiers.share_of(workload.prompt_tokens),
    )


def _as_learnt(
    workload: Workload, outlook: Outlook, provider: ProviderConfig, unknowns: Unknowns, i: int
) -> tuple[Workload, ProviderConfig]:
    """Return answers and provider drawn from what the run that they were learnt from leaves open.

    Ranges of factors hold the chance of another run, too, which is in the simulation already.
    """
    narrower = {
        name: tuple(each ** (0.5**0.5) for each in getattr(unknowns, name))
        for name in ("latency_factor", "output_factor")
    }
    scenario = Scenario(
        source=ModelSource.model_construct(),
        workload=workload,
        provider=provider,
        policy=outlook.pool.policy,
        seed=outlook.seed,
    )
    (condition,) = drawn(scenario, unknowns.model_copy(update=narrower), range(i, i + 1))
    return condition.scenario.workload, condition.scenario.provider


def _promise_s(workload: Workload, outlook: Outlook, provider: ProviderConfig, unknowns: Unknowns) -> float | None:
    """Return the finish that holds in 95 of 100 conditions drawn from the unknowns, as a plan promises it.

    None if the batch allows fewer than the 19 draws that a 95th percentile needs.
    """
    draws = min(DRAWS, REQUESTS_SIMULATED // len(workload))
    if draws < DRAWS_LEAST:
        return None
    policy = outlook.pool.policy
    scenario = Scenario(
        source=ModelSource.model_construct(), workload=workload, provider=provider, policy=policy, seed=outlook.seed
    )
    engine = chosen("auto", draws * len(workload))
    conditions = [each.scenario for each in drawn(scenario, unknowns, range(FRESH_DRAWS, FRESH_DRAWS + draws))]
    ends = [
        run_once(
            each.workload,
            policy,
            each.provider,
            finalize=outlook.finalize,
            seed=each.seed + FRESH_SEEDS,
            engine=engine,
        )
        for each in conditions
    ]
    return percentile([run.finish_s for run in ends], 0.95).value


def workload_of(outlook: Outlook) -> tuple[Workload, NDArray[Any]]:
    """Return the pool's remaining requests, without answers, and their models, shape (requests,)."""
    sizes: dict[str, array[int]] = {name: array("q") for name in Sizes.__slots__}
    models: list[str] = []
    for model, each in outlook.demand.rows():
        for name, values in sizes.items():
            values.append(getattr(each, name))
        models.append(model)
    count = len(models)
    visible: dict[str, Any] = {name: np.frombuffer(values, np.int64) for name, values in sizes.items()}
    workload = Workload(
        **visible,
        output_tokens=constant(0, count),
        arrival_s=constant(0.0, count, np.float64),
        recorded_s=constant(-1.0, count, np.float64),
    )
    return workload, np.array(models, dtype=object)


class ForecastRun:
    """One simulated run: its figures, and when each share of the requests had ended."""

    def __init__(self) -> None:
        self.finish_s = 0.0
        self.throttled = 0
        self.attempts = 0
        self.failed = 0
        self.efficiency: float | None = None
        self.waits_s: list[float] = []
        self.service_s = 0.0
        self.ends_at: list[float] = []
        self.answer_tokens: NDArray[Any] = np.zeros(0)


def case_of(drawn: Workload, policy: Policy, provider: ProviderConfig, *, finalize: bool) -> Case:
    """Return the case to simulate: these requests under this policy on this provider."""
    return Case(
        columns=columns(
            drawn,
            reserve_rule=policy.charge_rule,
            est_tokens_per_run=policy.est_tokens_per_run,
            charge_rule=provider.charge_rule,
            finalize_max_tokens=policy.finalize_max_tokens,
        ),
        params=policy.params(),
        provider=provider.params(),
        grant=provider.grant(),
        from_trace=False,
        finalize_max_tokens=policy.finalize_max_tokens if finalize else 0,
    )


def run_once(
    drawn: Workload, policy: Policy, provider: ProviderConfig, *, finalize: bool, seed: int, engine: Engine = "auto"
) -> ForecastRun:
    """Return one simulated run of requests whose answers are known or drawn."""
    case = case_of(drawn, policy, provider, finalize=finalize)
    ends, services = array("d"), array("d")

    def ended(job: Any, now: float, failure: str) -> None:
        if job.outcome == 0:
            services.append(now - job.launched_s)
        if failure or job.outcome == 0:
            ends.append(now)

    tally = simulated(case, seed, ended, engine=engine)
    run = ForecastRun()
    run.finish_s = float(tally.last_s)
    run.throttled, run.attempts = tally.throttled, tally.attempts
    summary = tally.summary(case.grant)
    run.failed, run.efficiency = summary.failed, summary.efficiency
    run.waits_s = list(tally.waits_s)
    run.service_s = float(np.mean(services)) if services else 0.0
    run.ends_at = np.quantile(ends, SHARES).tolist() if ends else [0.0] * len(SHARES)
    caps = case.columns.cap
    run.answer_tokens = np.where(caps < 0, case.columns.output_tokens, np.minimum(caps, case.columns.output_tokens))
    return run


def _interval(values: list[float]) -> tuple[float, float, float]:
    """Return (low, middle, high), the 95 % prediction interval of the next run, not below 0: see the module."""
    x = np.asarray(values)
    n = len(x)
    if n >= RUNS_MOST:
        return float(x.min()), float(np.median(x)), float(x.max())
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2.0) * x.std(ddof=1) * math.sqrt(1.0 + 1.0 / n)) if n > 1 else 0.0
    mean = float(x.mean())
    return max(0.0, mean - half), mean, mean + half


def _milestones(ends: NDArray[np.float64]) -> list[tuple[float, float, float]]:
    """Return (share, earliest, latest) over the runs; `ends` has shape (runs, shares)."""
    earliest, latest = ends.min(axis=0), ends.max(axis=0)
    return [(share, float(a), float(b)) for share, a, b in zip(SHARES, earliest, latest, strict=True)]
