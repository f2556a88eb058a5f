"""Run a scenario many times: replications under keyed common random numbers, in parallel on the local cores.

Theory of operation. A `Case` holds everything that one run needs, as numbers. Run r of any case uses seed + r, and
chance is keyed by its purpose (`governor/model/keyed.py`), so two policies under one seed meet the same latencies,
faults and neighbours: their difference is estimated seed by seed, with far fewer runs than independent ones would take.
Because a run depends only on its case and its seed, results are the same for any number of workers and any order.

The engines of `sim/des/engines.py` give the same run, to the bit, so the choice between them affects only time. Runs
are spread in chunks large enough to pay for their transport: over threads if the compiled engine works on this machine
(it releases the interpreter's lock), unless so much of the work is Python's own that processes finish sooner; else over
the workers of `spread`, local processes or a Ray cluster. Small amounts of work stay in this process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from governor import law
from governor.forecast.summary import Grant, Summary
from governor.model.policy import Policy
from governor.model.requests import CAUSES, LANES, Attempt, Outcome
from sim.des import engines
from sim.des.engines import Chosen, Engine, simulated, simulations
from sim.des.run import AttemptSink, Tally, quantiles
from sim.experiment.parallel import Backend, WorkersLost, crew_of
from sim.experiment.results import Figures, Forecast, forecast_of
from sim.model.provider import ProviderParams
from sim.model.provider_config import ProviderConfig
from sim.model.workload import Columns
from sim.scenario.scenario import Scenario

# Simulated requests below which a task is not worth sending to another process, or to another thread.
TASK_REQUESTS = {"simpy": 8_000, "compiled": 20_000}
THREAD_REQUESTS = 3_000
# Costs in seconds with the compiled engine: a run's share in Python, which threads cannot share; a request in machine
# code, which they can; and starting processes.
RUN_S, REQUEST_S = 0.15e-3, 0.4e-6
_START_S = 2.0
OUTCOMES = (
    Outcome.OK,
    Outcome.THROTTLED,
    Outcome.QUOTA,
    Outcome.TOO_LARGE,
    Outcome.SLOW_DOWN,
    Outcome.SERVER_ERROR,
    Outcome.DROPPED,
    Outcome.TIMEOUT,
)
STATUS = (200, 429, 429, 429, 429, 500, 0, 0)


@dataclass(frozen=True, slots=True)
class Case:
    """One policy on one workload and provider, ready to run."""

    columns: Columns
    params: law.Params
    provider: ProviderParams
    grant: Grant
    from_trace: bool
    finalize_max_tokens: int


def case_of(scenario: Scenario, policy: Policy | None = None) -> Case:
    """Return the scenario under `policy` (default: its own), ready to run."""
    policy = policy or scenario.policy
    provider, grant = _provider_side(scenario.provider)
    return Case(
        columns=scenario.columns(policy),
        params=_policy_side(policy if policy.quota else policy.with_quota(scenario.provider.quota)),
        provider=provider,
        grant=grant,
        from_trace=scenario.arrivals == "trace",
        finalize_max_tokens=policy.finalize_max_tokens if scenario.finalize else 0,
    )


# A search asks for the same policies under many conditions, and for many policies under each. These are never modified.


@lru_cache(maxsize=512)
def _policy_side(policy: Policy) -> law.Params:
    return policy.params()


@lru_cache(maxsize=128)
def _provider_side(provider: ProviderConfig) -> tuple[ProviderParams, Grant]:
    return provider.params(), provider.grant()


def figures_of(tally: Tally, grant: Grant, seed: int) -> Figures:
    """Return one run's figures."""
    s = tally.summary(grant)
    p50, p95 = quantiles(tally.latencies_s, (0.5, 0.95))
    values = {
        "makespan_s": s.makespan_s,
        "efficiency": math.nan if s.efficiency is None else s.efficiency,
        "throttled": float(s.throttled),
        "throttled_per_100": 100.0 * s.throttled / s.requests,
        "failed": float(s.failed),
        "attempts": float(s.attempts),
        "latency_p50_s": p50,
        "latency_p95_s": p95,
        "bound_s": s.bound_s,
        "reserved_tokens": float(s.reserved_tokens),
        "charged_tokens": float(s.charged_tokens),
        "used_tokens": float(s.used_tokens),
        "peak_in_flight": float(s.peak_in_flight),
        "stagger_delays": float(s.stagger_delays),
        "tpm_deferrals": float(s.tpm_deferrals),
        "finalize_passes": float(tally.finalize_passes),
        "extra_prompt_tokens": tally.extra_prompt_tokens,
        "extra_output_tokens": tally.extra_output_tokens,
    }
    return Figures(seed, s.requests, s.completed, values, dict(s.waits_s), dict(s.failures))


def summary_of(case: Case, seed: int) -> Summary:
    """Return one run as the `Summary` that `--json` prints."""
    return simulated(case, seed).summary(case.grant)


def attempts_of(scenario: Scenario, seed: int, policy: Policy | None = None) -> tuple[list[Attempt], Tally]:
    """Return one run's attempts, ordered by when they ended, and its tally."""
    rows: list[Attempt] = []
    tally = simulated(case_of(scenario, policy), seed, attempt_rows(scenario, rows.append))
    return rows, tally


def attempt_rows(scenario: Scenario, take: Callable[[Attempt], Any]) -> AttemptSink:
    """Return a sink for the driver that passes each attempt to `take` as the flat row that every run records."""
    workload = scenario.workload
    prompt_tokens = workload.prompt_tokens.tolist()

    def sink(job: Any, now: float, failure: str) -> None:
        answered = job.outcome == 0
        retry_at_s = job.eligible_s - job.submitted_s
        take(
            Attempt(
                request=job.index,
                custom_id=workload.custom_id(job.index),
                pool="default",
                model=workload.model(job.index),
                url=workload.url(job.index),
                lane=LANES[job.lane],
                attempt=job.attempt,
                submitted_s=job.submitted_s,
                eligible_s=job.eligible_s,
                launched_s=job.launched_s,
                finished_s=now,
                reserved_tokens=int(job.reserve),
                charged_tokens=int(job.charged),
                prompt_tokens=prompt_tokens[job.index] if answered else -1,
                output_tokens=int(job.output) if answered else -1,
                outcome=OUTCOMES[job.outcome],
                status=STATUS[job.outcome],
                error_code=failure,
                retry_after_s=job.retry_after_s,
                **dict(zip(_WAITED, job.waits_s[1:-1], strict=True)),
                waited_backoff_s=retry_at_s,
            )
        )

    return sink


_WAITED = tuple(f"waited_{cause}_s" for cause in CAUSES[1:-1])


# ---------------------------------------------------------------- many runs

Task = tuple[Case, tuple[int, ...]]


def _run_task(case: Case, seeds: tuple[int, ...], *, engine: Chosen) -> list[Figures]:
    tallies = simulations(case, seeds, engine=engine)
    return [figures_of(tally, case.grant, seed) for tally, seed in zip(tallies, seeds, strict=True)]


class Pool:
    """A pool that runs cases on many workers; results come in task order, for any number of workers of any backend.

    `workers`: processes (threads with the compiled engine), 0 = one per core, 1 = only this one. `on_runs(n)` is called
    as runs finish. `foreseen`: requests expected to be simulated in all, by which `auto` chooses the engine. `backend`:
    where the workers are, see `spread`.
    """

    def __init__(
        self,
        workers: int = 0,
        on_runs: Callable[[int], None] | None = None,
        *,
        engine: Engine = "auto",
        foreseen: float = 0.0,
        backend: Backend = "local",
    ) -> None:
        engines.checked(engine)
        self.engine = engine
        self.foreseen = foreseen
        self.backend = backend
        self.crew = crew_of(backend, workers)
        self.workers = self.crew.size
        self.on_runs = on_runs or (lambda n: None)
        self.runs = 0
        self.requests = 0

    def run(self, tasks: Iterable[tuple[Case, Sequence[int]]]) -> list[list[Figures]]:
        """Return the figures of each task: one `Figures` per seed.

        Raise WorkersLost if workers died and the work could not go on; its `found` holds the results so far, in the
        same form.
        """
        wanted = [(case, tuple(seeds)) for case, seeds in tasks]
        work = sum(len(case.columns) * len(seeds) for case, seeds in wanted)
        engine = engines.chosen(self.engine, max(work, self.foreseen - self.requests))
        threads = engine == "compiled" and self._threads_serve(sum(len(seeds) for _, seeds in wanted), work)
        least = THREAD_REQUESTS if threads else TASK_REQUESTS[engine]
        pieces: list[tuple[int, Task]] = []
        for i, (case, seeds) in enumerate(wanted):
            step = max(1, math.ceil(least / max(1, len(case.columns))))
            pieces += [(i, (case, seeds[j : j + step])) for j in range(0, len(seeds), step)]
        found: list[list[Figures]] = [[] for _ in wanted]
        run = partial(_run_task, engine=engine)
        own = [task for _, task in pieces]
        if len(own) < 2 or work < 2 * least or (self.crew.size == 1 and self.backend == "local"):
            results: Iterable[list[Figures]] = (run(case, seeds) for case, seeds in own)
        else:
            results = self._threaded(run, own) if threads else self.crew.map(run, own)
        try:
            for (i, _), figures in zip(pieces, results, strict=True):
                found[i] += figures
                self.runs += len(figures)
                self.requests += sum(f.requests for f in figures)
                self.on_runs(len(figures))
        except WorkersLost as lost:
            lost.found = found
            raise
        return found

    def _threads_serve(self, runs: int, work: int) -> bool:
        """Return whether threads would finish this work for the compiled engine before processes."""
        if self.backend != "local":
            return False
        in_python_s, in_all_s = runs * RUN_S, runs * RUN_S + work * REQUEST_S
        return max(in_python_s, in_all_s / self.workers) < _START_S + in_all_s / self.workers

    def _threaded(self, run: Callable[..., list[Figures]], tasks: list[Task]) -> Iterator[list[Figures]]:
        """Yield the figures of each task from threads, which share the columns and start at once.

        Machine code runs without the interpreter's lock.
        """
        runs = sum(len(seeds) for _, seeds in tasks)
        work = sum(len(case.columns) * len(seeds) for case, seeds in tasks)
        # Several small tasks at a time: each handover costs as much as a short run.
        size = max(1, math.ceil(THREAD_REQUESTS * runs / max(1, work)))
        several = [tasks[i : i + size] for i in range(0, len(tasks), size)]
        with ThreadPoolExecutor(self.workers) as threads:
            try:
                for found in threads.map(lambda some: [run(case, seeds) for case, seeds in some], several):
                    yield from found
            finally:
                # After Ctrl-C the remaining results are not needed.
                threads.shutdown(wait=False, cancel_futures=True)


def replicate_or_keep(scenario: Scenario, replications: int, *, pool: Pool) -> tuple[Forecast, WorkersLost | None]:
    """Replicate as `replicate` does; if workers were lost, return the forecast of the finished runs, and the loss.

    Raise WorkersLost if no run finished.
    """
    try:
        return replicate(scenario, replications, pool=pool), None
    except WorkersLost as lost:
        kept = [run for runs in lost.found or [] for run in runs]
        if not kept:
            raise
        said = WorkersLost(f"{lost}; the figures are of {len(kept):,} runs in place of {replications:,}")
        return forecast_of(scenario.policy, kept), said


def replicate(
    scenario: Scenario, replications: int, *, policy: Policy | None = None, pool: Pool | None = None
) -> Forecast:
    """Run the scenario `replications` times under seeds seed, seed + 1, ... and return the forecast."""
    pool = pool or Pool()
    case = case_of(scenario, policy)
    seeds = range(scenario.seed, scenario.seed + replications)
    return forecast_of(policy or scenario.policy, pool.run([(case, seeds)])[0])
