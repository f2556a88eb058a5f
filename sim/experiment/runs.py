"""The runs of a search: each is made once, however often it is asked for, and kept.

A run is identified by its condition, its policy and its seed. `requests` counts simulated requests: the search's effort
is measured by it, so that the same seed finds the same settings on any machine.

Cost of a run. Every answer is paid for once, under any settings: `answers_usd`. Settings change only the extra cost:
attempts that timed out or lost their connection, which the provider answers and bills all the same, and finalize
passes, which send the prompt again and write a new answer. Refused attempts cost nothing. A batch over several models
pays for these tokens at the mean price of its prompts and outputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import numpy as np

from governor.model.policy import Policy
from governor.model.prices import PER, Prices
from sim.experiment.experiment import Case, Pool, case_of
from sim.experiment.parallel import WorkersLost
from sim.experiment.results import Figures
from sim.scenario.scenario import Scenario
from sim.scenario.stress import Condition

PolicyKey = tuple[Any, ...]

# Simulated requests handed to the pool at a time: an interrupted search keeps the earlier results.
BATCH_REQUESTS = 4_000_000


def key_of(policy: Policy) -> PolicyKey:
    """Return a key that is equal for policies with the same settings, whichever knobs were named."""
    # All knobs are plain values; pydantic's dump would copy them one by one, at ten times the cost.
    return tuple(policy.__dict__.values())


@dataclass(frozen=True, slots=True)
class Tariff:
    """Prices in US dollars: all answers once, and per token of anything paid beyond them."""

    answers_usd: float
    prompt_usd: float
    output_usd: float

    def extra_usd(self, run: Figures) -> float:
        """Return what a run costs beyond its answers."""
        return run["extra_prompt_tokens"] * self.prompt_usd + run["extra_output_tokens"] * self.output_usd


def tariff_of(scenario: Scenario, prices: Prices | None) -> Tariff | None:
    """Return the workload's tariff at the newest prices; None without prices, or if a model has none."""
    workload = scenario.workload
    count = len(workload)
    if prices is None or not count:
        return None
    names: Iterable[str] = [workload.models] if isinstance(workload.models, str) else workload.models or [""]
    known = {name: prices.of(name, date.max) for name in set(names)}
    priced = {name: price for name, price in known.items() if price is not None}
    if len(priced) < len(known):
        return None
    by_row = [priced[workload.model(i)] for i in range(count)] if len(priced) > 1 else [*priced.values()]
    per_prompt = np.array([price.input for price in by_row]) / PER
    per_output = np.array([price.output for price in by_row]) / PER
    c = scenario.columns()
    prompt = np.asarray(c.prompt_tokens, dtype=np.float64)
    output = np.asarray(c.output_tokens, dtype=np.float64)
    written = np.where(c.cap > 0, np.minimum(output, c.cap), output)
    answers = float((prompt * per_prompt).sum() + (written * per_output).sum())
    return Tariff(answers, _mean(prompt, per_prompt), _mean(written, per_output))


def _mean(tokens: np.ndarray, price: np.ndarray) -> float:
    """Return the mean price of a token."""
    total = float(tokens.sum())
    return float((tokens * price).sum()) / total if total > 0.0 else float(price.mean())


class Runs:
    """All runs of one search. `tariff` adds `extra_usd` to each run's values.

    `ends_at`: a moment of `time.monotonic` after which a search requests no new runs.
    """

    def __init__(self, pool: Pool, *, tariff: Tariff | None = None, ends_at: float = math.inf) -> None:
        self.pool = pool
        self.tariff = tariff
        self.ends_at = ends_at
        self.made = 0
        self.requests = 0
        self._known: dict[tuple[str, PolicyKey], dict[int, Figures]] = {}
        self._cases: dict[tuple[str, PolicyKey], Case] = {}

    @property
    def out_of_time(self) -> bool:
        """Return whether the search has used up its time."""
        return time.monotonic() >= self.ends_at

    def require(self, wanted: Iterable[tuple[Condition, Policy, Sequence[int]]]) -> None:
        """Run each of these under those of its seeds that are missing."""
        tasks: list[tuple[str, PolicyKey, Case, list[int]]] = []
        asked: dict[tuple[str, PolicyKey], set[int]] = {}
        for condition, policy, seeds in wanted:
            key = key_of(policy)
            mine = self._known.setdefault((condition.name, key), {})
            # A policy asked for twice in one call runs once under each of its seeds.
            under_way = asked.setdefault((condition.name, key), set())
            missing = [seed for seed in dict.fromkeys(seeds) if seed not in mine and seed not in under_way]
            under_way.update(missing)
            if missing:
                tasks.append((condition.name, key, self._case(condition, policy, key), missing))
        while tasks:
            batch: list[tuple[str, PolicyKey, Case, list[int]]] = []
            size = 0
            while tasks and (not batch or size < BATCH_REQUESTS):
                batch.append(tasks.pop(0))
                size += len(batch[-1][2].columns) * len(batch[-1][3])
            self._make(batch)

    def figures(self, condition: Condition, policy: Policy, seeds: Sequence[int]) -> list[Figures]:
        """Return the runs under these seeds, making those that are missing."""
        mine = self._known.get((condition.name, key_of(policy)), {})
        if not all(seed in mine for seed in seeds):
            self.require([(condition, policy, seeds)])
            mine = self._known[condition.name, key_of(policy)]
        return [mine[seed] for seed in seeds]

    def known(self, condition: Condition, key: PolicyKey, seeds: range) -> list[Figures]:
        """Return the runs made so far under these seeds."""
        return [run for seed, run in self._known.get((condition.name, key), {}).items() if seed in seeds]

    def _case(self, condition: Condition, policy: Policy, key: PolicyKey) -> Case:
        # Only for settings that return for more seeds: others are not worth the memory.
        case = self._cases.get((condition.name, key))
        if case is None:
            case = case_of(condition.scenario, policy)
            if condition.name == "":
                self._cases["", key] = case
        return case

    def _make(self, batch: Sequence[tuple[str, PolicyKey, Case, list[int]]]) -> None:
        try:
            self._keep(batch, self.pool.run([(case, seeds) for _, _, case, seeds in batch]))
        except WorkersLost as lost:
            self._keep(batch, lost.found or [[] for _ in batch])
            raise

    def _keep(self, batch: Sequence[tuple[str, PolicyKey, Case, list[int]]], found: Sequence[list[Figures]]) -> None:
        for (name, key, _, _), figures in zip(batch, found, strict=True):
            for run in figures:
                self._take(name, key, run)

    def _take(self, name: str, key: PolicyKey, run: Figures) -> None:
        if self.tariff is not None:
            run = replace(run, values={**run.values, "extra_usd": self.tariff.extra_usd(run)})
        self._known[name, key][run.seed] = run
        self.made += 1
        self.requests += run.requests
