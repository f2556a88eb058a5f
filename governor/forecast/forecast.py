"""Forecast a live run: when it finishes, what limits it and what it costs, as far as these can be known.

Every forecast here is arithmetic. A simulation comes in as a callable (`Foresee`), made by a caller that has a
simulator.

The fluid expectation treats work as a fluid: the largest of the times that each knob alone would need. It ignores 429s,
tails and interplay, is mostly too early, and has no interval; every text that shows it says so. If the time of an
answer is not known, it is assumed from the measured median model (0.21 s + 19.3 ms per output token:
docs/explanation/provider.md#latency) and answers of a quarter of the declared cap, at most 500 tokens, 200 without one.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from itertools import islice
from operator import attrgetter
from typing import Any, Literal

from governor.forecast.preflight import InUse, Load, fluid_forecast
from governor.model.estimate import EMBEDDINGS, Sizes
from governor.model.pools import Pool
from governor.model.prices import LONG_PROMPT, Prices, dollars_text
from governor.model.requests import STANDARD
from governor.model.words import duration, knob_text, plural

FIRST_TOKEN_S, PER_TOKEN_S = 0.214, 0.0193
_SIZES_OF = attrgetter(*Sizes.__slots__)
IDLE = InUse()
_P50_OF_CAP, P50_MAX, P50_NO_CAP = 0.25, 500.0, 200.0


class Demand:
    """The remaining work of one pool, summed in one pass over its requests, and their sizes (80 bytes a request).

    `total`, `largest`, `smallest`: tokens reserved by our charge rule; `prompt`, `prompt_largest`, `output_largest`: as
    in `Load`. `answer_tokens` (as assumed): by model;
    `uncapped`: how many requests declare no cap. `billed`: prompt tokens, answer tokens as assumed, and declared caps,
    by what decides their price: model, service tier, and whether the prompt is a long one.
    """

    def __init__(self) -> None:
        self.requests = self.total = self.largest = self.smallest = self.uncapped = 0
        self.prompt = self.prompt_largest = self.output_largest = 0
        self.models: dict[str, int] = {}
        self.answer_tokens: dict[str, float] = {}
        self.billed: dict[tuple[str, str, bool], list[float]] = {}
        self._sizes = array("q")
        self._model_of = array("q")
        self._numbers: dict[str, int] = {}

    def add(self, model: str, sizes: Sizes, reserve: int, tier: str = STANDARD) -> None:
        """Add one request. `tier`: the service tier that it asks for."""
        self.smallest = reserve if not self.requests else min(self.smallest, reserve)
        self.largest = max(self.largest, reserve)
        self.requests += 1
        self.total += reserve
        prompt = min(sizes.prompt_tokens, reserve)
        self.prompt += prompt
        self.prompt_largest = max(self.prompt_largest, prompt)
        self.output_largest = max(self.output_largest, reserve - prompt)
        self.models[model] = self.models.get(model, 0) + 1
        answer = assumed_answer(sizes)
        self.answer_tokens[model] = self.answer_tokens.get(model, 0.0) + answer
        sums = self.billed.setdefault((model, tier, sizes.prompt_tokens > LONG_PROMPT), [0.0, 0.0, 0.0])
        sums[0] += sizes.prompt_tokens
        sums[1] += answer
        if sizes.max_tokens >= 0:
            sums[2] += sizes.max_tokens * sizes.n
        elif sizes.endpoint != EMBEDDINGS:
            self.uncapped += 1
        self._sizes.extend(_SIZES_OF(sizes))
        self._model_of.append(self._numbers.setdefault(model, len(self._numbers)))

    def rows(self) -> Iterator[tuple[str, Sizes]]:
        """Yield model and sizes of each request, in the order in which they were added."""
        names = list(self._numbers)
        width = len(Sizes.__slots__)
        for i, number in enumerate(self._model_of):
            yield names[number], Sizes(*self._sizes[i * width : (i + 1) * width])

    def first(self, count: int, reserve_of: Callable[[Sizes], int]) -> Demand:
        """Return the demand of the first `count` requests alone."""
        part = Demand()
        for model, sizes in islice(self.rows(), count):
            part.add(model, sizes, reserve_of(sizes))
        return part

    def load(self) -> Load:
        """Return the demand as `preflight` takes it."""
        peaks = (self.prompt_largest, self.output_largest)
        return Load(self.requests, self.total, self.largest, self.smallest, self.prompt, *peaks)

    def assumed_service_s(self) -> float:
        """Return the assumed mean time of an answer."""
        if not self.requests:
            return 0.0
        return FIRST_TOKEN_S + PER_TOKEN_S * sum(self.answer_tokens.values()) / self.requests


def assumed_answer(sizes: Sizes) -> float:
    """Return the assumed output tokens of a request whose answer is unknown; see the module's docstring."""
    if sizes.endpoint == EMBEDDINGS:
        return 0.0
    if sizes.max_tokens < 0:
        return P50_NO_CAP * sizes.n
    return min(_P50_OF_CAP * sizes.max_tokens, P50_MAX) * sizes.n


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """The input of a forecast: one pool's remaining requests.

    `assumed`: that of an `Expectation`, from an earlier forecast of the same run; the pool's own scenario takes
    precedence. `booked`: the part of the present minute that a resumed run has used.
    """

    pool: Pool
    demand: Demand
    finalize: bool = False
    seed: int = 0
    assumed: Mapping[str, Any] | None = None
    booked: InUse = IDLE

    def delay_s(self) -> float:
        """Return by how much the present bookings delay the finish, by the fluid estimate."""
        load, policy = self.demand.load(), self.pool.policy
        if self.booked.tokens <= 0.0:
            return 0.0
        late_s = fluid_forecast(policy, load, booked=self.booked).finish_s - fluid_forecast(policy, load).finish_s
        return max(0.0, late_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """The expected course of one pool's run. Times in seconds from the start.

    `low_s`, `high_s`: 95 % interval of one run's finish; both `finish_s` if none is known (`runs` 0). `bound`: the
    cause that limits it, as in `waits_s`, "" = none. `answer_tokens`: by model. `milestones`: (share done, earliest,
    latest time), rising. `assumed`: a scenario's statements on provider and answers, as plain values; None = there is
    no scenario, and the provider is taken to match the settings. `promise_s`: the finish that holds in 95 of 100 of the
    conditions that cannot be ruled out; None = unknown: no plan states these conditions, or the batch is too large to
    draw them. `cached_share`: of the prompt tokens, that the provider finds cached.
    """

    by: Literal["fluid", "simulation"]
    runs: int
    requests: int
    finish_s: float
    low_s: float
    high_s: float
    throttled: float
    throttled_low: float
    throttled_high: float
    attempts: float
    attempts_low: float
    attempts_high: float
    bound: str
    service_s: float
    answer_tokens: Mapping[str, float]
    milestones: tuple[tuple[float, float, float], ...] = ()
    assumed: Mapping[str, Any] | None = None
    promise_s: float | None = None
    cached_share: float = 0.0

    def to_json_dict(self) -> dict[str, Any]:
        """Return everything but the milestones, for the journal."""
        names = [name for name in self.__slots__ if name not in ("milestones", "answer_tokens")]
        return {name: getattr(self, name) for name in names} | {"answer_tokens": dict(self.answer_tokens)}


Foresee = Callable[[Outlook], Expectation]


def fluid(outlook: Outlook, *, service_s: float = 0.0) -> Expectation:
    """Return the expectation that needs no simulator. `service_s`: measured mean time of an answer, 0 = assumed."""
    demand = outlook.demand
    service_s = service_s or demand.assumed_service_s()
    found = fluid_forecast(outlook.pool.policy, demand.load(), booked=outlook.booked, service_s=service_s)
    n = float(demand.requests)
    return Expectation(
        by="fluid",
        runs=0,
        requests=demand.requests,
        finish_s=found.finish_s,
        low_s=found.finish_s,
        high_s=found.finish_s,
        throttled=0.0,
        throttled_low=0.0,
        throttled_high=0.0,
        attempts=n,
        attempts_low=n,
        attempts_high=n,
        bound=found.bound,
        service_s=service_s,
        answer_tokens=dict(demand.answer_tokens),
        milestones=((0.0, 0.0, 0.0), (1.0, found.finish_s, found.finish_s)),
    )


# ---------------------------------------------------------------- money


@dataclass(frozen=True, slots=True)
class CostForecast:
    """US dollars. `expected`: None if a model has no price.

    `most`: with every declared cap used up, None if it is not known or a request declares none. `unpriced`: models
    without a price.
    """

    expected: float | None
    most: float | None
    unpriced: tuple[str, ...]


def cost_forecast(
    demand: Demand,
    answer_tokens: Mapping[str, float],
    prices: Prices,
    day: date,
    tier: str | None = None,
    cached_share: float = 0.0,
) -> CostForecast:
    """Return the cost of the remaining requests. `tier`: for all of them, None = the one that each asks for.

    `cached_share`: of the prompt tokens, that are found cached; at most, none is.
    """
    priced = {key: prices.of(key[0], day, key[1] if tier is None else tier) for key in demand.billed}
    unpriced = {key[0]: demand.models[key[0]] for key, price in priced.items() if price is None}
    if unpriced:
        return CostForecast(None, None, tuple(sorted(unpriced, key=lambda model: (-unpriced[model], model))))
    expected = most = 0.0
    for (model, _, is_long), (prompt, answers, caps) in demand.billed.items():
        price = priced[model, _, is_long]
        assert price is not None
        # Only the model's sum is foreseen: it is shared out as it was assumed.
        share = answers / demand.answer_tokens[model] if demand.answer_tokens[model] else 0.0
        expected += price.sum_usd(prompt, cached_share * prompt, share * answer_tokens.get(model, 0.0), is_long=is_long)
        most += price.sum_usd(prompt, 0.0, caps, is_long=is_long)
    return CostForecast(expected, None if demand.uncapped else most, ())


def cost_text(cost: CostForecast, prices: Prices) -> str:
    """Return the forecast cost in one line."""
    if cost.expected is None:
        models = ", ".join(model or "requests without a model" for model in cost.unpriced[:3]) + (
            ", ..." if len(cost.unpriced) > 3 else ""
        )
        return f"not known: no price for {models} (--prices FILE)"
    most = f", at most {dollars_text(cost.most)} by the declared caps" if cost.most is not None else ""
    dated = f" (prices of {prices.checked})" if prices.checked else ""
    return f"about {dollars_text(cost.expected)}{most}{dated}"


# ---------------------------------------------------------------- in words


def finish_text(e: Expectation) -> str:
    """Return the expected finish and how it is known, as text."""
    if e.by == "fluid":
        return (
            f"done in about {duration(e.finish_s)} (a rough estimate without simulation: 429s and tails are left out)"
        )
    low, high = duration(e.low_s), duration(e.high_s)
    between = f", {low} to {high} in 95 % of runs" if low != high else ""
    return f"done in {duration(e.finish_s)} ({plural(e.runs, 'simulated run')}{between})"


def promise_text(e: Expectation) -> str:
    """Return the finish as assumed and the finish that holds under all plausible conditions, as text; "" if unknown."""
    if e.promise_s is None:
        return ""
    return (
        f"{duration(e.finish_s)} if the provider is as assumed; by {duration(e.promise_s)} in 95 of 100 of the "
        "conditions that cannot be ruled out"
    )


def throttles_text(e: Expectation) -> str:
    """Return how many 429s are expected, as text."""
    if e.by == "fluid":
        return "not estimated"
    low, high = round(e.throttled_low), round(e.throttled_high)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def together(expectations: Iterable[Expectation]) -> Expectation | None:
    """Return several pools side by side: the last to finish decides, the rest adds up. None for no pools."""
    found = list(expectations)
    if len(found) <= 1:
        return found[0] if found else None
    last = max(found, key=lambda e: e.finish_s)
    requests = sum(e.requests for e in found)
    answers: dict[str, float] = {}
    for e in found:
        for model, tokens in e.answer_tokens.items():
            answers[model] = answers.get(model, 0.0) + tokens
    sums = {
        name: sum(getattr(e, name) for e in found)
        for name in ("throttled", "throttled_low", "throttled_high", "attempts", "attempts_low", "attempts_high")
    }
    simulated = all(e.by == "simulation" for e in found)
    return Expectation(
        by="simulation" if simulated else "fluid",
        runs=min(e.runs for e in found),
        requests=requests,
        finish_s=last.finish_s,
        low_s=max(e.low_s for e in found),
        high_s=max(e.high_s for e in found),
        bound=last.bound,
        service_s=sum(e.service_s * e.requests for e in found) / max(1, requests),
        answer_tokens=answers,
        promise_s=None if any(e.promise_s is None for e in found) else max(e.promise_s or 0.0 for e in found),
        **sums,
    )


def held_back_text(e: Expectation, pool: Pool) -> str:
    """Return the knob that limits a pool, with its value."""
    return knob_text(e.bound, pool.policy) if e.bound else "the answers' own time"
