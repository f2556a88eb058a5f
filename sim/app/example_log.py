"""A log of requests as some program might have kept it, written from a simulated run: for trying `calibrate`."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from sim.des.driver import Job, Simulation
from sim.des.run import CHARGED
from sim.experiment.experiment import OUTCOMES, case_of
from sim.model import provider as prov
from sim.scenario.scenario import Scenario

HEADER = (
    *("custom_id", "prompt_tokens", "output_tokens", "max_tokens", "arrival_s", "launched_s", "finished_s", "outcome"),
    *("retry_after_s", "limit_tokens", "remaining_tokens", "limit_requests", "remaining_requests"),
)


class _Heard(Simulation):
    """A run whose attempts keep what their headers stated, though the law does not look at them."""

    def _answer(self, job: Job, key: int, now: float) -> tuple[int, float, int, float]:
        answer = super()._answer(job, key, now)
        self._state(job)
        return answer


def write_log(scenario: Scenario, path: Path) -> Path:
    """Simulates the scenario and writes a log of its attempts as a program might: one row each, with its headers."""
    workload = scenario.workload
    rows: list[tuple[Any, ...]] = []

    def take(job: Job, now: float, code: str) -> None:
        ok = OUTCOMES[job.outcome].value == "ok"
        heard = OUTCOMES[job.outcome].value in ("ok", "throttled", "slow_down", "server_error")
        heard = heard and prov.states_counts(case.provider, job.outcome not in CHARGED)
        limit, left, _, requests, requests_left = job.stated if heard else (-1.0, -1.0, -1, -1.0, -1.0)
        i = job.index
        rows.append(
            (
                *(f"q-{i}", int(workload.prompt_tokens[i]), int(job.output) if ok else "", int(workload.max_tokens[i])),
                *(workload.arrival_s[i], job.launched_s, now, OUTCOMES[job.outcome].value),
                job.retry_after_s if job.retry_after_s >= 0.0 else "",
                *(limit, left, requests or -1.0, requests_left if requests else -1.0),
            )
        )

    case = case_of(scenario)
    _Heard(
        case.columns, case.params, case.provider, seed=scenario.seed, from_trace=case.from_trace, on_attempt=take
    ).run()
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        writer.writerows(rows)
    return path
