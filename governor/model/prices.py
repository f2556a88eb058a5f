"""Cost of a run: prices per model, the tokens that are billed, and the budget of `--max-cost`.

Formula, per attempt that was answered: (prompt - cached - written) x input + cached x cached_input + written x
cache_write x input + output x output, each price per million tokens, times the factor of the service tier that served
it. Tokens read from a cache and those written to one are part of the prompt, and reasoning tokens part of the output; a
price without `cached_input` or `cache_write` bills those like any others. Where a price is `long`, a prompt above
`LONG_PROMPT` tokens doubles the input prices of its whole request and makes its output half as expensive again.
Rejected and failed attempts cost nothing, except those whose body states what they used.

A success that cannot be read, or that states no usage, is paid for: it counts at its worst, `most_used`.

The lists that come with Paceline stand in the profiles (see `governor/profiles`); a user's own is a dated file
(`--prices FILE`). A model without a known price has no cost: the total is then unknown too, and is never shown as if it
were complete.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from governor.model.errors import BadInput, quoted
from governor.model.estimate import EMBEDDINGS, Sizes, kind_of
from governor.model.files import only_keys, read_yaml
from governor.model.requests import BATCH, CACHE_READ, CACHE_WRITE, STANDARD, Attempt, Outcome, tier_of, usage_of

PER = 1_000_000
# A model's name may carry the date of its snapshot.
_SNAPSHOT = re.compile(r"-\d{4}-?\d{2}-?\d{2}$")
_RATES = ("input", "cached_input", "output")
_FACTORS = ("batch", "flex", "priority")
_KEYS = ("since", *_RATES, *_FACTORS, "cache_write", "long", "output_max")

# The Batch API takes half the price off for every model that it serves.
BATCH_FACTOR = 0.5
LONG_PROMPT, LONG_INPUT, LONG_OUTPUT = 272_000, 2.0, 1.5
# Tables of numbers have up to so many times the tokens that are estimated (docs/explanation/provider.md#sizes).
PROMPT_WORST = 2.2


class Usage(NamedTuple):
    """Tokens that an answer states as used: `cached` and `written` (to a cache) are part of `prompt`, `reasoning` of
    `output`. -1 = unknown.

    `tier`: the service tier that served it; see `STANDARD`.
    """

    prompt: int = -1
    output: int = -1
    cached: int = 0
    reasoning: int = 0
    tier: str = STANDARD
    written: int = 0


def usage_in(body: Mapping[str, Any] | None) -> Usage:
    """Return the usage in a response's body, whatever its endpoint; unknown if the body states none. Never raises."""
    if body is None:
        return Usage()
    prompt, output = usage_of(body)
    usage = body.get("usage")
    if not isinstance(usage, Mapping):
        return Usage(prompt, output, tier=tier_of(body))
    groups = ("prompt_tokens_details", "input_tokens_details")
    cached = _detail(usage, groups, "cached_tokens") or _whole(usage.get(CACHE_READ))
    written = _detail(usage, groups, "cache_write_tokens") or _whole(usage.get(CACHE_WRITE))
    reasoning = _detail(usage, ("completion_tokens_details", "output_tokens_details"), "reasoning_tokens")
    # Anthropic states the tier within its usage.
    tier = tier_of(body) or tier_of(usage)
    cached = min(cached, max(prompt, 0))
    written = min(written, max(prompt, 0) - cached)
    return Usage(prompt, output, cached, min(reasoning, max(output, 0)), tier, written)


def _detail(usage: Mapping[str, Any], groups: tuple[str, ...], key: str) -> int:
    for group in groups:
        details = usage.get(group)
        value = _whole(details.get(key)) if isinstance(details, Mapping) else 0
        if value:
            return value
    return 0


def _whole(value: object) -> int:
    return value if type(value) is int and 0 < value < 2**53 else 0


class Price(NamedTuple):
    """US dollars per million tokens, valid from a given day, for standard processing.

    `batch`, `flex`, `priority`: factors of these tiers, None = the model has no such price. `long`: prompts above
    `LONG_PROMPT` cost more. `cache_write`: factor on `input` for tokens written to a cache. `output_max`: most tokens
    that the model writes, 0 = unknown.
    """

    since: date
    input: float
    cached_input: float
    output: float
    batch: float | None = BATCH_FACTOR
    flex: float | None = None
    priority: float | None = None
    long: bool = False
    output_max: int = 0
    cache_write: float = 1.0

    def at(self, tier: str) -> Price | None:
        """Return the price in a tier; None if it is unknown."""
        if tier == STANDARD:
            return self
        factor = getattr(self, tier) if tier in _FACTORS else None
        if factor is None:
            return None
        return self._replace(**{rate: factor * getattr(self, rate) for rate in _RATES})

    def cost_usd(self, usage: Usage) -> float:
        """Return the cost of one answer in US dollars, whatever its tier; counts that are not stated cost nothing."""
        prompt = max(usage.prompt, 0)
        is_long = prompt > LONG_PROMPT
        written = usage.written * (self.cache_write - 1.0) * self.input * (LONG_INPUT if is_long and self.long else 1.0)
        return self.sum_usd(prompt, usage.cached, max(usage.output, 0), is_long=is_long) + written / PER

    def sum_usd(self, prompt: float, cached: float, output: float, *, is_long: bool = False) -> float:
        """Return the cost of tokens summed over any number of answers; `is_long`: their prompts are."""
        fresh = (prompt - cached) * self.input + cached * self.cached_input
        written = output * self.output
        return (fresh * LONG_INPUT + written * LONG_OUTPUT if is_long and self.long else fresh + written) / PER

    def most_used(self, sizes: Sizes) -> Usage | None:
        """Return the most that an answer to such a request can have used; None if nothing bounds its length."""
        cap = sizes.max_tokens if sizes.max_tokens >= 0 else self.output_max
        if not cap and sizes.endpoint != EMBEDDINGS and sizes.max_tokens < 0:
            return None
        return Usage(math.ceil(PROMPT_WORST * sizes.prompt_tokens), cap * sizes.n)


@dataclass(frozen=True, slots=True)
class Prices:
    """A price list. `checked`: the day on which it was last compared with the provider's own; "" = not stated."""

    models: Mapping[str, tuple[Price, ...]]
    name: str = ""
    checked: str = ""

    def of(self, model: str, day: date, tier: str = STANDARD) -> Price | None:
        """Return the price of a model on a day and in a tier.

        Its name is looked up in full, then without the snapshot's date, then by pattern.
        """
        price = self._standard(model, day)
        return price.at(tier) if price is not None else None

    def _standard(self, model: str, day: date) -> Price | None:
        for name in (model, _SNAPSHOT.sub("", model)):
            if name in self.models:
                return _newest(self.models[name], day)
        for pattern, prices in self.models.items():
            if "*" in pattern and fnmatch.fnmatchcase(model, pattern):
                return _newest(prices, day)
        return None

    def unknown(self, models: Mapping[str, int], day: date) -> list[str]:
        """Return the models that have no price, most frequent first."""
        missing = [model for model in models if self.of(model, day) is None]
        return sorted(missing, key=lambda model: (-models[model], model))


def _newest(prices: tuple[Price, ...], day: date) -> Price | None:
    begun = [price for price in prices if price.since <= day]
    return max(begun, key=lambda price: price.since) if begun else None


class Spending:
    """The running total of a run. `cost_usd` is a sum over answers whose price is known; `unpriced` counts the rest.

    `assumed_usd`: the part of it for answers of unknown usage, counted at their worst. `since_usd`: the cost of earlier
    sessions of the same run. `committed`: what is bought but not yet answered, by any key, such as a batch in a queue.
    """

    def __init__(self, prices: Prices, day: date, since_usd: float = 0.0) -> None:
        self.cost_usd = since_usd
        self.assumed_usd = 0.0
        self.unpriced = 0
        self.cached_tokens = 0
        self.reasoning_tokens = 0
        self.committed: dict[object, float] = {}
        self._prices = prices
        self._day = day
        self._known: dict[tuple[str, str], Price | None] = {}

    def price(self, model: str, tier: str = STANDARD) -> Price | None:
        """Return the price of a model in a tier, on the day of the run."""
        if (model, tier) not in self._known:
            self._known[model, tier] = self._prices.of(model, self._day, tier)
        return self._known[model, tier]

    def attempted(self, attempt: Attempt, usage: Usage, sizes: Sizes | None = None) -> float:
        """Add an attempt that is over; return its cost in US dollars, -1 = unknown. `sizes`: see `answered`."""
        if attempt.outcome not in (Outcome.OK, Outcome.MALFORMED) and usage.prompt < 0:
            return 0.0
        # The place is ours to know: the answers of a batch need not state it.
        tier = BATCH if attempt.lane == BATCH else usage.tier
        return self.answered(attempt.model, usage._replace(tier=tier), sizes)

    def answered(self, model: str, usage: Usage, sizes: Sizes | None = None) -> float:
        """Add an answer; return its cost in US dollars, -1 = unknown.

        `sizes`: its request's, by which an answer of unknown usage is counted at its worst.
        """
        self.cached_tokens += usage.cached
        self.reasoning_tokens += usage.reasoning
        price = self.price(model, usage.tier)
        used = usage if usage.prompt >= 0 or price is None or sizes is None else price.most_used(sizes)
        if price is None or used is None or used.prompt < 0:
            self.unpriced += 1
            return -1.0
        cost = price.cost_usd(used)
        self.cost_usd += cost
        if used is not usage:
            self.assumed_usd += cost
        return cost

    def total_usd(self) -> float | None:
        """Return the cost, or None if part of it is unknown."""
        return None if self.unpriced else self.cost_usd

    @property
    def bound_usd(self) -> float:
        """Return what is spent and committed."""
        return self.cost_usd + math.fsum(self.committed.values())


# ---------------------------------------------------------------- reading


def read_prices(path: str | Path) -> Prices:
    """Return the price list in a YAML file. Raise BadInput, naming the model and the key, if an entry is wrong."""
    name = str(path)
    data = read_yaml(path)
    only_keys(data, ("checked", "models"), "", name)
    models = data.get("models")
    if not isinstance(models, dict) or not models:
        raise BadInput("it has no 'models': a model's name with since, input, cached_input and output each", name)
    found = prices_in(models, name)
    return Prices(found, name, str(data.get("checked") or ""))


def prices_in(models: Mapping[Any, Any], name: str = "", place: str = "models.") -> dict[str, tuple[Price, ...]]:
    """Return the prices of models as a document states them; `name` and `place` begin the message of an error."""
    return {str(model): _entries(f"{place}{model}", stated, name) for model, stated in models.items()}


def _entries(place: str, stated: Any, name: str) -> tuple[Price, ...]:
    """Return a model's prices: one, or a list of them with different days."""
    place = f"{place}: "
    entries = stated if isinstance(stated, list) else [stated]
    prices = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise BadInput(f"{place}{kind_of(entry)} where since, input and output should be", name)
        only_keys(entry, _KEYS, place, name)
        since = entry.get("since", date.min)
        if type(since) is not date:
            raise BadInput(f"{place}since is {quoted(since)}: write a day, YYYY-MM-DD", name)
        known = {key: _dollars(entry[key], f"{place}{key}", name) for key in _RATES if key in entry}
        keys = (*_FACTORS, "cache_write")
        factors = {key: _number(entry[key], f"{place}{key}", name, "a factor") for key in keys if key in entry}
        is_long, most = (
            entry.get("long", False),
            _number(entry.get("output_max", 0), f"{place}output_max", name, "tokens"),
        )
        if type(is_long) is not bool:
            raise BadInput(f"{place}long is {quoted(is_long)}: write true or false", name)
        for key in ("input", "output"):
            if key not in known:
                raise BadInput(f"{place}{key} is missing: US dollars per million tokens", name)
        rates = (known["input"], known.get("cached_input", known["input"]), known["output"])
        prices.append(Price(since, *rates, **factors, long=is_long, output_max=round(most)))
    days = [price.since for price in prices]
    if len(set(days)) != len(days) or not prices:
        raise BadInput(f"{place}each price needs its own day in 'since'", name)
    return tuple(prices)


def _dollars(value: Any, place: str, name: str) -> float:
    return _number(value, place, name, "US dollars per million tokens")


def _number(value: Any, place: str, name: str, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < math.inf:
        raise BadInput(f"{place} is {quoted(value)}: it must be {what}, from 0 up", name)
    return float(value)


def dollars_text(cost_usd: float | None) -> str:
    """Return a sum for people: "$12.40", "$0.0031"; an unknown sum says so."""
    if cost_usd is None:
        return "not known"
    if cost_usd >= 0.0995 or cost_usd == 0.0:
        return f"${cost_usd:,.2f}"
    return f"${cost_usd:.2g}" if cost_usd >= 0.0001 else f"${cost_usd:.1g}"
