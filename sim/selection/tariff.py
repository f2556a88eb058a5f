"""What a batch costs, and what its settings can add to that: time-outs, re-sends and finalize passes.

Every answer is paid for once, whatever the settings: `answers_usd`. What settings change is what is paid beside the
answers: attempts that timed out or whose connection dropped, which the provider answers and bills all the same,
and finalize passes, which send the prompt again and write the answer anew. Refused attempts cost nothing. A batch over
several models pays for these tokens at the mean price of its prompts and outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date

import numpy as np

from governor.model.prices import PER, Prices
from sim.experiment.results import Figures
from sim.scenario.scenario import Scenario


@dataclass(frozen=True, slots=True)
class Tariff:
    """US dollars: all answers once, and per token of what is paid beside them."""

    answers_usd: float
    prompt_usd: float
    output_usd: float

    def extra_usd(self, run: Figures) -> float:
        """What a run pays beside its answers."""
        return run["extra_prompt_tokens"] * self.prompt_usd + run["extra_output_tokens"] * self.output_usd


def tariff_of(scenario: Scenario, prices: Prices | None) -> Tariff | None:
    """The workload's tariff at the newest prices; None without prices, or where a model has none."""
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
    """The mean price of a token."""
    total = float(tokens.sum())
    return float((tokens * price).sum()) / total if total > 0.0 else float(price.mean())
