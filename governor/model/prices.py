"""Cost of a run: prices per model, the tokens that are billed, and the budget of `--max-cost`.

Formula, per attempt that was answered: (prompt - cached) x input + cached x cached_input + output x output, each price
per million tokens. Cached tokens are part of the prompt and reasoning tokens part of the output, as providers state
them in `usage`; a price without `cached_input` bills cached tokens in full. Rejected and failed attempts cost nothing,
except those whose body states what they used: a success that cannot be read is paid for.

A price file is dated and meant to be edited by the user (`--prices FILE`); the file shipped with the package lies
beside this module. A model without a known price has no cost: the total is then unknown too, and is never shown as if
it were complete.
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
from governor.model.estimate import kind_of
from governor.model.files import only_keys, read_yaml
from governor.model.requests import Attempt, Outcome, usage_of

PER = 1_000_000
SHIPPED = Path(__file__).with_name("prices.yaml")
# A model's name may carry the date of its snapshot.
_SNAPSHOT = re.compile(r"-\d{4}-?\d{2}-?\d{2}$")
_KEYS = ("since", "input", "cached_input", "output")


class Usage(NamedTuple):
    """Tokens that an answer states as used: `cached` is part of `prompt`, `reasoning` of `output`. -1 = unknown."""

    prompt: int = -1
    output: int = -1
    cached: int = 0
    reasoning: int = 0


def usage_in(body: Mapping[str, Any] | None) -> Usage:
    """Return the usage in a response's body, whatever its endpoint; unknown if the body states none. Never raises."""
    if body is None:
        return Usage()
    prompt, output = usage_of(body)
    usage = body.get("usage")
    if not isinstance(usage, Mapping):
        return Usage(prompt, output)
    cached = _detail(usage, ("prompt_tokens_details", "input_tokens_details"), "cached_tokens")
    reasoning = _detail(usage, ("completion_tokens_details", "output_tokens_details"), "reasoning_tokens")
    return Usage(prompt, output, min(cached, max(prompt, 0)), min(reasoning, max(output, 0)))


def _detail(usage: Mapping[str, Any], groups: tuple[str, ...], key: str) -> int:
    for group in groups:
        details = usage.get(group)
        value = details.get(key) if isinstance(details, Mapping) else None
        if type(value) is int and value > 0:
            return value
    return 0


class Price(NamedTuple):
    """US dollars per million tokens, valid from a given day."""

    since: date
    input: float
    cached_input: float
    output: float

    def cost_usd(self, usage: Usage) -> float:
        """Return the cost of this usage in US dollars; counts that are not stated cost nothing."""
        prompt, output = max(usage.prompt, 0), max(usage.output, 0)
        whole = (prompt - usage.cached) * self.input + usage.cached * self.cached_input + output * self.output
        return whole / PER


@dataclass(frozen=True, slots=True)
class Prices:
    """A price list. `checked`: the day on which it was last compared with the provider's own; "" = not stated."""

    models: Mapping[str, tuple[Price, ...]]
    name: str = ""
    checked: str = ""

    def of(self, model: str, day: date) -> Price | None:
        """Return the price of a model on a day: by its full name, then without the snapshot's date, then by pattern."""
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


class Spent:
    """The running total of a run. `cost_usd` is a sum over answers whose price is known; `unpriced` counts the rest.

    `since_usd`: the cost of earlier sessions of the same run.
    """

    def __init__(self, prices: Prices, day: date, since_usd: float = 0.0) -> None:
        self.cost_usd = since_usd
        self.unpriced = 0
        self.cached_tokens = 0
        self.reasoning_tokens = 0
        self._prices = prices
        self._day = day
        self._known: dict[str, Price | None] = {}

    def price(self, model: str) -> Price | None:
        """Return the price of a model on the day of the run."""
        if model not in self._known:
            self._known[model] = self._prices.of(model, self._day)
        return self._known[model]

    def attempted(self, attempt: Attempt, usage: Usage) -> float:
        """Add an attempt that is over; return its cost in US dollars, -1 = unknown."""
        is_paid = attempt.outcome is Outcome.OK or usage.prompt >= 0
        return self.answered(attempt.model, usage) if is_paid else 0.0

    def answered(self, model: str, usage: Usage) -> float:
        """Add an answer; return its cost in US dollars, -1 = unknown."""
        self.cached_tokens += usage.cached
        self.reasoning_tokens += usage.reasoning
        price = self.price(model)
        if price is None or usage.prompt < 0:
            self.unpriced += 1
            return -1.0
        cost = price.cost_usd(usage)
        self.cost_usd += cost
        return cost

    def total_usd(self) -> float | None:
        """Return the cost, or None if part of it is unknown."""
        return None if self.unpriced else self.cost_usd


# ---------------------------------------------------------------- reading


def read_prices(path: str | Path = SHIPPED) -> Prices:
    """Return the price list in a YAML file. Raise BadInput, naming the model and the key, if an entry is wrong."""
    name = str(path)
    data = read_yaml(path)
    only_keys(data, ("checked", "models"), "", name)
    models = data.get("models")
    if not isinstance(models, dict) or not models:
        raise BadInput("it has no 'models': a model's name with since, input, cached_input and output each", name)
    found = prices_in(models, name)
    return Prices(found, "" if path == SHIPPED else name, str(data.get("checked") or ""))


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
        known = {key: _dollars(entry[key], f"{place}{key}", name) for key in _KEYS[1:] if key in entry}
        for key in ("input", "output"):
            if key not in known:
                raise BadInput(f"{place}{key} is missing: US dollars per million tokens", name)
        prices.append(Price(since, known["input"], known.get("cached_input", known["input"]), known["output"]))
    days = [price.since for price in prices]
    if len(set(days)) != len(days) or not prices:
        raise BadInput(f"{place}each price needs its own day in 'since'", name)
    return tuple(prices)


def _dollars(value: Any, place: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < math.inf:
        raise BadInput(f"{place} is {quoted(value)}: it must be US dollars per million tokens, from 0 up", name)
    return float(value)


def dollars_text(cost_usd: float | None) -> str:
    """Return a sum for people: "$12.40", "$0.0031"; an unknown sum says so."""
    if cost_usd is None:
        return "not known"
    if cost_usd >= 0.0995 or cost_usd == 0.0:
        return f"${cost_usd:,.2f}"
    return f"${cost_usd:.2g}" if cost_usd >= 0.0001 else f"${cost_usd:.1g}"
