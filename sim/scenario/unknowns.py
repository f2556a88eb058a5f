"""Unknown conditions as ranges, and scenarios drawn from them: the second half of the stress set.

Theory of operation. The listed conditions change one thing at a time, by an amount that we chose; reality is a mixture.
So all unknowns are drawn at once, each from its range: the provider's charge rule, whether it settles, the share of the
quota that others take and in what bursts, the drift of latency, and how much longer answers are than assumed; after a
run that showed nothing of it, also how minutes are counted, when tokens are, and what refusals state. Factors are
log-uniform, shares uniform. Draw i is keyed by the scenario's seed and i, like all chance here, so more draws do
not change earlier ones. A charge rule under which some request could never run is not drawn.
"""

from __future__ import annotations

import math
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from governor.model.keyed import SEARCH, keyed_uniform
from sim.base.arguments import Config
from sim.scenario.scenario import Scenario
from sim.scenario.stress import Condition, stress_set

Range = Annotated[tuple[float, float], Field(strict=False)]

# Published figures use seeds and draws that no search has seen; a plan and its forecasts share them.
FRESH_SEEDS = 1_000_000
FRESH_DRAWS = 1_000

_BURST_S, PERIOD_S = (5.0, 30.0), 60.0
WINDOWS = ("bucket", "clock", "anchored", "sliding")
# What gateways state of every refusal, whatever is left of the minute, seconds.
_CONSTANT_WAIT_S = 60


class Unknowns(Config):
    """Ranges that plans must hold for, each (lowest, highest).

    `latency_factor`, `output_factor`: multiples of the assumed latency and answer lengths. `cotenant_share`: share of
    the quota that others take in bursts. `settles`: probability that the provider settles. `charge_rules`: whether
    another charge rule may apply. `windows`: whether any window may apply, tokens may count at the answer, and one
    constant wait may be stated, each unless learnt. `counts_at_answer`: probability that header counts refer to the
    moment of the answer.
    """

    charge_rules: bool = True
    windows: bool = False
    counts_at_answer: Annotated[float, Field(ge=0, le=1)] = 0.5
    settles: Annotated[float, Field(ge=0, le=1)] = 0.5
    cotenant_share: Range = (0.0, 0.3)
    latency_factor: Range = (0.7, 2.5)
    output_factor: Range = (0.6, 2.0)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for name, least, most in (
            ("cotenant_share", 0.0, 0.95),
            ("latency_factor", 0.01, 100.0),
            ("output_factor", 0.01, 100.0),
        ):
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise ValueError(f"{name} [{low:g}, {high:g}] must be two numbers from {least:g} to {most:g} in order")
        return self

    def text(self) -> str:
        """Return the ranges in one readable line; in brackets the default range that applies if nothing is known."""
        usual = Unknowns()

        def span(name: str, *, percent: bool = False) -> str:
            text, most = (_span(getattr(each, name), percent=percent) for each in (self, usual))
            return text if text == most else f"{text} (in place of {most})"

        parts = [
            "any other charge rule that fits" if self.charge_rules else "the charge rule as known",
            *(["any window, gate and stated wait that was not learnt"] if self.windows else []),
            {0.0: "no settling", 1.0: "settling"}.get(self.settles, f"settling with probability {self.settles:g}"),
            f"counts dated at the answer with probability {self.counts_at_answer:g}",
            f"others on the quota {span('cotenant_share', percent=True)} in bursts",
            f"latency x {span('latency_factor')}",
            f"answers x {span('output_factor')} as long",
        ]
        return ", ".join(parts)


def _span(values: tuple[float, float], *, percent: bool = False) -> str:
    low, high = values
    return f"{low:.0%} to {high:.0%}" if percent else f"{low:g} to {high:g}"


def drawn(scenario: Scenario, unknowns: Unknowns, draws: range) -> list[Condition]:
    """Return the conditions of these draws: all unknowns at once, each from its range, and chance of its own.

    Under one seed for all, a stall that this seed happens to have, or to lack, would be in every condition.
    """
    rules: list[str] = [scenario.provider.charge_rule]
    if unknowns.charge_rules:
        # The rules of the stress set: none if the rule was learnt.
        listed = [changed.provider.charge_rule for _, changed in stress_set(scenario)]
        rules += [rule for rule in listed if rule not in rules]
    return [Condition(f"draw {i + 1}", _one(scenario, unknowns, rules, i)) for i in draws]


def _one(scenario: Scenario, unknowns: Unknowns, rules: list[str], i: int) -> Scenario:
    def u(unknown: int) -> float:
        # The key's request and attempt are the draw and the unknown.
        return keyed_uniform(scenario.seed, i, unknown, SEARCH)

    def between(span: tuple[float, float], unknown: int) -> float:
        return span[0] + (span[1] - span[0]) * u(unknown)

    def factor(span: tuple[float, float], unknown: int) -> float:
        return math.exp(between((math.log(span[0]), math.log(span[1])), unknown))

    provider, workload = scenario.provider, scenario.workload
    share = between(unknowns.cotenant_share, 2)
    if "other users of the quota" not in provider.learnt:
        share = max(provider.cotenant.share, share)
    cotenant = {"share": share, "burst_s": between(_BURST_S, 3), "period_s": PERIOD_S} if share > 0.0 else {}
    habits: dict[str, object] = {}
    if unknowns.windows and "window" not in provider.learnt:
        window = WINDOWS[int(len(WINDOWS) * u(7))]
        habits = {"window": window, "phase_s": 60.0 * u(8) if window == "clock" else 0.0}
        if u(9) < 0.5:
            habits["charged"] = "answer"
        if "Retry-After" not in provider.learnt and u(10) < 0.5:
            habits["retry_after"] = _CONSTANT_WAIT_S
    late = provider.latency.model_dump()
    scale = min(1_000.0, late["scale"] * factor(unknowns.latency_factor, 4))
    longer = factor(unknowns.output_factor, 5)
    outputs = np.maximum(1, np.rint(workload.output_tokens * longer)).astype(np.int64)
    return scenario.with_(
        seed=scenario.seed + i,
        workload=workload.with_(output_tokens=np.where(workload.output_tokens > 0, outputs, 0)),
        provider=provider.with_(
            charge_rule=rules[min(len(rules) - 1, int(len(rules) * u(0)))],
            settles=provider.settles if "settling" in provider.learnt else u(1) < unknowns.settles,
            counts="answer" if provider.counts == "admission" and u(6) < unknowns.counts_at_answer else provider.counts,
            cotenant=cotenant,
            latency={**late, "scale": scale},
            **habits,
        ),
    )
