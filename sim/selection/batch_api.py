"""Live, flex, the Batch API, or a mix of them: what each costs, when it is done, and what is promised.

Theory of operation. Each way is simulated as a run would go: live calls by the scheduler and the law against the
synthetic provider, batches by the synthetic Batch API, and for a mix the decision of `governor/forecast/mixes.py`
between them (`sim/des/mixed.py`). A mix is run for the deadline that is asked for, and for others, so that there is a
front of cost against finish time: without a deadline nobody can say which point of it is best.

The Batch API says nothing of when. Its turnaround is log-normal with a given P50 and P95, independent from batch to
batch, and a batch that takes longer than 24 h expires; how well the P50 is known is part of what is assumed, and drawn
anew for each run. Waves go as `split` writes them: a wave fits into the queue of enqueued input tokens.

Money: every answer is paid for once, where it was given. Cached prompt tokens are cheaper live and in flex, and are
taken to be none in the Batch API, whose order of execution is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from typing import Any

import numpy as np
from numpy.typing import NDArray

from governor.batchapi.limits import EXPIRES_S, FILE_LINES, TURNAROUND_S, usable_tokens
from governor.forecast.mixes import ASSUMED_FACTOR, batch_lines, live_rate, turnaround_of
from governor.model.keyed import normal_quantile
from governor.model.prices import PER, Prices
from governor.model.requests import STANDARD
from sim.des.mixed import BATCH, FLEX, LIVE, Decide, Mix, MixedSimulation, only
from sim.experiment.experiment import Case, case_of
from sim.model.batches import BatchApi
from sim.scenario.scenario import Scenario, limits_of

AUTO = "auto"
# Of an answer's cost where no prices are known: an output token costs about four of the prompt.
OUTPUT_WEIGHT = 4.0
# Simulated requests over all ways; runs of each, within bounds.
EFFORT, RUNS_LEAST, RUNS_MOST = 400_000, 20, 60
# Larger workloads are thinned to so many, with the limits and the queue.
REQUESTS_MOST = 2_000
# Other deadlines that a mix is run for.
FRONT = 4
PROMISE = 0.95
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Terms:
    """The Batch API as assumed. `queue_tokens`: enqueued input tokens per model. `turnaround_s`: a batch's P50 and P95.

    `factor`: within which its P50 is known; `measured`: from so many batches, 0 = it is assumed. `discount`: share
    taken off the price, None = by the price list. `cached_share`: of the prompt tokens, that live calls find cached,
    None = as the provider is taken to do.
    """

    queue_tokens: int
    turnaround_s: tuple[float, float] = TURNAROUND_S
    discount: float | None = None
    cached_share: float | None = None
    factor: float = ASSUMED_FACTOR
    measured: int = 0


def terms_of_provider(api: BatchApi) -> Terms:
    """Return the terms that a provider's configuration states."""
    return Terms(api.queue_tokens, api.turnaround_s, factor=max(api.known_within, 1.01), measured=api.measured)


@dataclass(frozen=True, slots=True)
class Way:
    """One way, over `runs`. `deadline_s`: what a mix was told, None for other ways. `live_share`: of requests, mean.

    `finish_s`: P50; `promise_s`: what holds in 95 of 100 runs; inf = not done. `cost_usd`: mean, None = not known.
    `on_front`: no other way costs less and promises as much.
    """

    name: str
    deadline_s: float | None
    live_share: float
    done_probability: float
    finish_s: float
    promise_s: float
    cost_usd: float | None
    runs: int
    on_front: bool = False

    def to_json_dict(self) -> dict[str, Any]:
        """Return plain values."""
        found = asdict(self)
        return {name: None if value == math.inf else value for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class _Money:
    """US dollars per request in each place, or weights if prices are not known."""

    known: bool
    by_place: dict[str, NDArray[np.float64]]
    flex: NDArray[np.bool_]


def ways(
    scenario: Scenario, terms: Terms, prices: Prices | None, deadline_s: float, *, say: Say = lambda what: None
) -> tuple[Way, ...]:
    """Return live, batch, flex where there is such a price, and mixes for the deadline and around it."""
    money = _money(scenario, terms, prices)
    scale = money.by_place[LIVE].sum()
    scenario, terms, rows = _thinned(scenario, terms)
    money = _Money(money.known, {place: usd[rows] for place, usd in money.by_place.items()}, money.flex[rows])
    names = [LIVE, BATCH, *([FLEX] if money.flex.any() else [])]
    count = len(scenario.workload)
    runs = max(RUNS_LEAST, min(RUNS_MOST, EFFORT // max(1, count) // (len(names) + FRONT + 1)))
    made = _Runs(scenario, terms, money, runs, float(scale / money.by_place[LIVE].sum()))
    found = []
    for name in names:
        say(f"simulating {name}")
        found.append(made.way(name, deadline_s, None, only(name)))
    horizons = [deadline_s]
    first, last = found[0].promise_s, max(way.promise_s for way in found if way.promise_s < math.inf)
    if math.isfinite(first) and last > 1.5 * first:
        steps = range(1, FRONT + 1)
        horizons += [first * (last / first) ** (i / (FRONT + 1)) for i in steps]
    for horizon_s in sorted(horizons):
        say(f"simulating a mix for {horizon_s:,.0f} s")
        found.append(made.way(AUTO, deadline_s, horizon_s, None))
    return tuple(replace(way, on_front=_is_on_front(way, found)) for way in found)


def _is_on_front(way: Way, among: Sequence[Way]) -> bool:
    def of(each: Way) -> tuple[float, float]:
        return (each.cost_usd if each.cost_usd is not None else each.live_share, each.promise_s)

    cost, promise = of(way)
    return not any(
        c <= cost and p <= promise and (c < cost or p < promise) for c, p in map(of, among)
    ) and math.isfinite(promise)


def cheapest(found: Sequence[Way], confidence: float) -> Way | None:
    """Return the cheapest way that is done by the deadline with that probability; None if none is."""
    sure = [way for way in found if way.done_probability >= confidence]
    # Even without known prices, fewer live requests are cheaper.
    return min(sure, key=lambda way: (way.cost_usd or 0.0, way.live_share, way.promise_s), default=None)


class _Runs:
    """Simulated runs of one scenario. `scale`: the whole workload's cost over that of the rows simulated."""

    def __init__(self, scenario: Scenario, terms: Terms, money: _Money, runs: int, scale: float) -> None:
        self.case: Case = case_of(scenario)
        self.terms, self.money, self.runs, self.scale = terms, money, runs, scale
        count = len(scenario.workload)
        latency = scenario.provider.latency
        columns = self.case.columns
        written = np.where(columns.cap > 0, np.minimum(columns.output_tokens, columns.cap), columns.output_tokens)
        service_s = latency.first_token_s + latency.per_token_s * float(written.mean())
        self.seed = scenario.seed
        self.believed = turnaround_of(
            *terms.turnaround_s, expires_s=EXPIRES_S, factor=terms.factor, measured=terms.measured
        )
        self.plain: dict[str, Any] = {
            "models": [scenario.workload.model(i) for i in range(count)],
            "saving_usd": (money.by_place[LIVE] - money.by_place[BATCH]).tolist(),
            "flex": money.flex.tolist(),
            "queue_tokens": usable_tokens(terms.queue_tokens),
            "file_requests": batch_lines(count, FILE_LINES),
            "turnaround": self.believed,
            "live": live_rate(scenario.policy, service_s),
        }

    def way(self, name: str, deadline_s: float, horizon_s: float | None, decide: Decide | None) -> Way:
        """Return one way's figures. `horizon_s`: the deadline told to a mix. `decide`: in place of its decision."""
        finish: list[float] = []
        costs: list[float] = []
        live_shares: list[float] = []
        for r in range(self.runs):
            run = self._run(r, horizon_s, decide)
            tally = run.run()
            finish.append(tally.last_s if not tally.failed else math.inf)
            places = np.array(run.place)
            costs.append(sum(float(usd[places == place].sum()) for place, usd in self.money.by_place.items()))
            live_shares.append(float((places == LIVE).mean()))
        times = np.array(finish)
        return Way(
            name=name,
            deadline_s=horizon_s,
            live_share=float(np.mean(live_shares)),
            done_probability=float((times <= deadline_s).mean()),
            finish_s=float(np.quantile(times, 0.5, method="higher")),
            promise_s=float(np.quantile(times, PROMISE, method="higher")),
            cost_usd=self.scale * float(np.mean(costs)) if self.money.known else None,
            runs=self.runs,
        )

    def _run(self, r: int, horizon_s: float | None, decide: Decide | None) -> MixedSimulation:
        terms = self.terms
        # One stratum per run: how the provider is, while the decision knows only how well that is known.
        factor = math.exp(math.log(terms.factor) * normal_quantile((r + 0.5) / self.runs))
        p50, p95 = (min(factor * each, 10 * EXPIRES_S) for each in terms.turnaround_s)
        more: dict[str, Any] = {} if decide is None else {"decide": decide, "re_decides": False}
        mix = Mix(
            **self.plain,
            batch_api=BatchApi(queue_tokens=terms.queue_tokens, turnaround_s=(p50, p95)),
            horizon_s=horizon_s if horizon_s is not None else EXPIRES_S,
            **more,
        )
        return MixedSimulation(self.case.columns, self.case.params, self.case.provider, seed=self.seed + r, mix=mix)


def _thinned(scenario: Scenario, terms: Terms) -> tuple[Scenario, Terms, NDArray[np.int64]]:
    """Return a part of the workload, evenly spread, with as large a part of all limits, and which rows it has."""
    count = len(scenario.workload)
    provider, policy = scenario.provider, scenario.policy
    largest = float(max(scenario.charges().max(initial=1.0), scenario.columns().reserve.max(initial=1.0)))
    most = provider.tpm * (1.0 - policy.tpm_headroom) / (4.0 * largest) if provider.tpm else math.inf
    k = int(max(1.0, min(count / REQUESTS_MOST, most, max(1, provider.rpm), policy.max_concurrency)))
    rows = np.arange(0, count, k)
    if k == 1:
        return scenario, terms, rows
    provider = provider.with_(tpm=provider.tpm // k, rpm=provider.rpm // k)
    own = {"max_concurrency": policy.max_concurrency // k, "stagger_seconds": policy.stagger_seconds * k}
    policy = policy.with_(**limits_of(provider), **own)
    thin = scenario.with_(workload=scenario.workload.take(rows), provider=provider, policy=policy)
    return thin, replace(terms, queue_tokens=terms.queue_tokens // k), rows


def _money(scenario: Scenario, terms: Terms, prices: Prices | None) -> _Money:
    """Return what each request costs in each place."""
    workload, columns = scenario.workload, scenario.columns()
    prompt = np.asarray(columns.prompt_tokens, float)
    written = np.asarray(columns.output_tokens, float)
    written = np.where(columns.cap >= 0, np.minimum(written, columns.cap), written)
    count = len(workload)
    names = [workload.model(i) for i in range(count)]
    rates = {LIVE: np.zeros((3, count)), FLEX: np.zeros((3, count)), BATCH: np.zeros((3, count))}
    has_flex = np.zeros(count, bool)
    known = prices is not None
    for name in set(names):
        rows = np.array([each == name for each in names])
        price = prices.of(name, date.max) if prices is not None else None
        if price is None:
            known = False
            rates[LIVE][:, rows] = np.array([[1.0], [1.0], [OUTPUT_WEIGHT]])
            rates[BATCH][:, rows] = 0.5 * rates[LIVE][:, rows]
            continue
        batch, flex = price.at("batch"), price.at("flex")
        if terms.discount is not None:
            batch = price._replace(batch=1.0 - terms.discount).at("batch")
        for place, at in ((LIVE, price.at(STANDARD)), (BATCH, batch or price), (FLEX, flex or price)):
            assert at is not None
            rates[place][:, rows] = np.array([[at.input], [at.cached_input], [at.output]])
        has_flex[rows] = flex is not None
    if terms.cached_share is None:
        hits = np.array([scenario.provider.tiers.cached(int(each)) for each in prompt], float)
    else:
        hits = terms.cached_share * prompt
    found = {}
    for place, (fresh, cached, output) in rates.items():
        read = hits if place != BATCH else 0.0
        found[place] = ((prompt - read) * fresh + read * cached + written * output) / PER
    return _Money(known, found, has_flex)
