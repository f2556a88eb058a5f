"""Live, by the Batch API, or split: what each costs, and how probably it is done by the deadline.

Theory of operation. The Batch API answers within 24 h at a discount and says nothing of when. Its turnaround is an
assumption, and is said to be one: log-normal with a given P50 and P95, independent from file to file; a file that takes
longer than 24 h expires and is not done at all. Files come in waves, as `split` writes them: a wave fits into the queue
of enqueued input tokens, and the next begins when its last file has ended; models have queues of their own and go side
by side. So a batch is done after the largest, over models, of the sums, over waves, of the longest turnaround in each.

Live figures are runs of the scenario at its limits. In a split a share of the requests, evenly spread, runs live while
the rest is under way as Batch files; both must be done. Of all splits that are sure enough the one with the least live
is cheapest. Money: every answer is paid for once; cached prompt tokens are cheaper live, and are taken to be none in
the Batch API, whose order of execution is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import numpy as np
from numpy.typing import NDArray

from governor.batchapi.limits import EXPIRES_S, FILE_LINES, TURNAROUND_S, usable_tokens
from governor.model.prices import PER, Prices
from sim.model.synthetic import sigma_of
from sim.scenario.scenario import Scenario
from sim.selection.capacity import Search

DISCOUNT = 0.5
DRAWS = 20_000
SHARES = tuple(i / 20 for i in range(1, 20))


@dataclass(frozen=True, slots=True)
class Terms:
    """The Batch API as assumed. `queue_tokens`: enqueued input tokens per model. `turnaround_s`: P50 and P95 of a file.

    `discount`: share taken off the price. `cached_share`: of the prompt tokens, that a live run finds cached.
    """

    queue_tokens: int
    turnaround_s: tuple[float, float] = TURNAROUND_S
    discount: float = DISCOUNT
    cached_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Way:
    """One way. `live_share`: of the requests. `finish_s`: P50, inf = never. `cost_usd`: None = not known.

    `waves`: of Batch files, for the model that needs most; 0 where all is live.
    """

    name: str
    live_share: float
    done_probability: float
    finish_s: float
    cost_usd: float | None
    waves: int

    def to_json_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def ways(search: Search, terms: Terms, prices: Prices | None) -> tuple[Way, ...]:
    """Live, Batch and, where that is not sure enough, the split with the least live that is, or else the surest one."""
    scenario = search.scenario
    policies = search.suited_to(scenario)

    def way(name: str, share: float) -> Way:
        live = _picked(len(scenario.workload), share)
        finish_s, done = np.zeros(DRAWS), 1.0
        times = [0.0]
        if live.any():
            search.say(f"trying {share:.0%} live")
            part = scenario.with_(workload=scenario.workload.take(live))
            probe = search.confirmed(part, policies, whole=True)
            done = probe.on_time / probe.runs
            times = [run["makespan_s"] if not run["failed"] else math.inf for run in probe.forecast.runs]
        waves = 0
        if not live.all():
            finish_s, waves = batch_finish_s(scenario, ~live, terms)
            done *= float((finish_s <= search.finish_by_s).mean())
        # Live runs and turnarounds are independent: every pairing is equally probable.
        both = np.maximum(np.resize(np.array(times), DRAWS), finish_s)
        middle = float(np.quantile(both, 0.5, method="higher"))
        return Way(name, share, done, middle, cost_usd(scenario, live, terms, prices), waves)

    found = [way("live", 1.0), way("batch", 0.0)]
    splits: list[Way] = []
    # Where all by the Batch API is sure enough nothing is cheaper; and only splits whose rest may be in time are run.
    for share in SHARES if found[1].done_probability < search.confidence else ():
        rest_s, _ = batch_finish_s(scenario, ~_picked(len(scenario.workload), share), terms)
        if (rest_s <= search.finish_by_s).mean() >= search.confidence:
            splits.append(way("split", share))
            if splits[-1].done_probability >= search.confidence:
                break
    if splits:
        found.append(max(splits, key=lambda w: (min(w.done_probability, search.confidence), -w.live_share)))
    return tuple(found)


def _picked(count: int, share: float) -> NDArray[np.bool_]:
    """Return which requests go live: this share of them, evenly spread, as `split --live` picks them."""
    ends = np.floor(np.arange(1, count + 1) * share)
    picked: NDArray[np.bool_] = np.diff(ends, prepend=0.0) > 0
    return picked


def batch_finish_s(scenario: Scenario, rows: NDArray[np.bool_], terms: Terms) -> tuple[NDArray[np.float64], int]:
    """Return when Batch files of these requests would be done, `DRAWS` times, seconds, inf = never.

    And how many waves.
    """
    workload = scenario.workload
    names = np.array([workload.model(i) for i in range(len(workload))])
    finish_s, most = np.zeros(DRAWS), 0
    rng = np.random.default_rng(scenario.seed)
    for model in sorted(set(names[rows].tolist())):
        tokens = workload.prompt_tokens[rows & (names == model)]
        files = files_per_wave(tokens.tolist(), terms.queue_tokens)
        most = max(most, len(files))
        total = np.zeros(DRAWS)
        for count in files:
            total += _turnarounds_s(rng, count, terms).max(axis=0)
        # What fits into no queue is never done there; `split` refuses it.
        fits = int(tokens.max()) <= usable_tokens(terms.queue_tokens)
        finish_s = np.maximum(finish_s, total if fits else math.inf)
    return finish_s, most


def files_per_wave(tokens: Sequence[int], queue_tokens: int) -> list[int]:
    """Return how many files each wave has, for requests with so many input tokens in the order of the file.

    See `split`.
    """
    usable = usable_tokens(queue_tokens)
    waves: list[int] = []
    queued, lines = 0.0, 0
    for each in tokens:
        if not waves or queued + each > usable:
            waves.append(0)
            queued, lines = 0.0, FILE_LINES
        if lines == FILE_LINES:
            waves[-1] += 1
            lines = 0
        queued += each
        lines += 1
    return waves


def _turnarounds_s(rng: np.random.Generator, files: int, terms: Terms) -> NDArray[np.float64]:
    """Return turnarounds, shape (files, DRAWS), inf = expired."""
    p50, p95 = terms.turnaround_s
    drawn = p50 * np.exp(sigma_of(p50, p95) * rng.standard_normal((files, DRAWS)))
    return np.where(drawn <= EXPIRES_S, drawn, math.inf)


def cost_usd(scenario: Scenario, live: NDArray[np.bool_], terms: Terms, prices: Prices | None) -> float | None:
    """Return the cost of all answers, some live and the rest by the Batch API; None if a price is unknown."""
    if prices is None:
        return None
    workload, columns = scenario.workload, scenario.columns()
    written = np.where(columns.cap >= 0, np.minimum(columns.output_tokens, columns.cap), columns.output_tokens)
    total = 0.0
    for i in range(len(workload)):
        price = prices.of(workload.model(i), date.max)
        if price is None:
            return None
        prompt = price.input
        if live[i]:
            prompt += terms.cached_share * (price.cached_input - price.input)
        cost = (float(columns.prompt_tokens[i]) * prompt + float(written[i]) * price.output) / PER
        total += cost if live[i] else cost * (1.0 - terms.discount)
    return total
