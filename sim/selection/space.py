"""The settings that a plan may try: a ladder of values per knob, where a search begins, what lies next to a setting."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from governor.model.policy import KNOB_BY_NAME, Policy
from sim.model.windows import MINUTE_S
from sim.scenario.scenario import Scenario

_CONCURRENCY = (1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200, 300, 500, 800, 1200, 2000)
_STAGGER = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 15.0, 20.0, 30.0)
HEADROOM = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.15, 0.2, 0.3)
ATTEMPTS = (3, 5, 8, 12)
# Costs nothing where nothing is refused, and loses nothing where a limit is lower than assumed and no wait is stated.
RECIPE_ATTEMPTS = 8
_BACKOFF = (0.5, 1.0, 2.0, 4.0, 8.0)
# The window of ours that mirrors one of the provider's. Minutes of its clock are mirrored by none: no 60 s of ours hold
# more than a limit in any of them.
MIRRORS = {"bucket": "bucket", "anchored": "fixed", "sliding": "sliding", "clock": "sliding"}
# Where the provider's window is known, those of ours that never ask it for more than it holds. Others may do as well in
# a simulation, where nothing arrives late, and are refused on the way to a real one.
WITHIN = {
    "bucket": ("fixed", "sliding", "bucket"),
    "anchored": ("fixed", "sliding"),
    "sliding": ("sliding",),
    "clock": ("sliding",),
}
CHARGE_RULES = ("prompt_chars4", "auto", "responses", "max_of", "prompt_plus_max")
# A short burst is filled to within so many seconds of its refill. Connections are made on the way of the first
# requests, which therefore arrive later than those that follow: a burst used to the last token is refused then.
BURST_SPARE_S = 0.25
FLAGS = ("sync_headers", "hold_on_throttle", "backoff_keeps_permit", "settle")


@dataclass(frozen=True, slots=True)
class Space:
    """The values that each knob may take, in order. Knobs that are missing stay as they are."""

    ladders: Mapping[str, tuple[Any, ...]]

    def neighbours(self, policy: Policy, reach: Sequence[int] = (-1, 1)) -> list[Policy]:
        """Return policies that differ in one knob, `reach` rungs away; switches and rules in every other value."""
        found = []
        for name, ladder in self.ladders.items():
            value = getattr(policy, name)
            if isinstance(value, str | bool):
                found += [policy.with_(**{name: other}) for other in ladder if other != value]
            elif name != "est_tokens_per_run" or policy.charge_rule == "fixed":
                at = int(np.searchsorted(ladder, value))
                exact = at < len(ladder) and ladder[at] == value
                for step in reach:
                    rung = at + step if exact or step < 0 else at + step - 1
                    if 0 <= rung < len(ladder):
                        found.append(policy.with_(**{name: ladder[rung]}))
        return found


def _ladder(values: Iterable[float], kind: type, most: float = math.inf) -> tuple[Any, ...]:
    return tuple(sorted({kind(value) for value in values if value <= most}))


def gap_s(scenario: Scenario) -> float:
    """Return the mean time between launches that the provider's limits allow in the long run, seconds; 0 = no limit."""
    provider = scenario.provider
    charge = scenario.columns(scenario.policy).charge
    by_tokens = 60.0 * float(charge.mean()) / provider.tpm if provider.tpm else 0.0
    by_requests = 60.0 / provider.rpm if provider.rpm else 0.0
    return max(by_tokens, by_requests)


def guardrail_space(scenario: Scenario) -> Space:
    """Return the knobs of a deployment that cannot change its code; the TPM limit follows the provider and stays."""
    now, n = scenario.policy, len(scenario.workload)
    charge = scenario.columns(now).charge
    quantiles = [float(q) for q in np.quantile(charge, (0.5, 0.75, 0.9, 0.95, 0.99, 1.0))] + [float(charge.mean())]
    estimates = [50.0 * math.ceil(q / 50.0) for q in quantiles] + [now.est_tokens_per_run]
    gap = gap_s(scenario)
    return Space(
        {
            "stagger_seconds": _ladder(
                [*_STAGGER, now.stagger_seconds, *(_rounded(gap * f) for f in (0.5, 0.8, 1.0, 1.2))], float
            ),
            "max_concurrency": _ladder([*_CONCURRENCY, now.max_concurrency], int, max(n, now.max_concurrency)),
            "tpm_headroom": _ladder([*HEADROOM, now.tpm_headroom], float),
            "est_tokens_per_run": _ladder(estimates, int),
            "retry_max_attempts": _ladder([*ATTEMPTS, now.retry_max_attempts], int),
            "backoff_base_seconds": _ladder([*_BACKOFF, now.backoff_base_seconds], float),
        }
    )


def full_space(scenario: Scenario) -> Space:
    """Everything that the law can do."""
    ladders = dict(guardrail_space(scenario).ladders)
    provider = scenario.provider
    ladders["tpm_window"] = WITHIN[provider.window] if "window" in provider.learnt else WITHIN["bucket"]
    ladders["burst_seconds"] = _ladder((burst_mirror_s(scenario), scenario.policy.burst_seconds), float)
    ladders["charge_rule"] = ("fixed", *CHARGE_RULES)
    ladders["launch_order"] = ("fifo", "longest_first")
    for flag in FLAGS:
        ladders[flag] = (False, True)
    if not _returns_unused(scenario):
        # Counts in headers would put right what the simulation settles wrongly; a real account may not state them.
        del ladders["settle"]
    return Space(ladders)


def burst_mirror_s(scenario: Scenario) -> float:
    """Return our own burst for the provider's, seconds: a little shorter, never below the largest request's charge."""
    provider = scenario.provider
    if provider.burst_s == MINUTE_S:
        return MINUTE_S
    largest_s = 0.0
    if provider.tpm and len(scenario.workload):
        largest_s = MINUTE_S * float(scenario.columns(scenario.policy).charge.max()) / provider.tpm
    return min(provider.burst_s, max(provider.burst_s - BURST_SPARE_S, math.ceil(100.0 * largest_s) / 100.0))


def _returns_unused(scenario: Scenario) -> bool:
    """Return whether the provider counts real use in the end, so that settling is right."""
    return scenario.provider.settles or scenario.provider.charged == "answer"


def _rounded(value: float) -> float:
    """Two significant digits: a setting that a person would write."""
    if value <= 0.0:
        return 0.0
    digits = 1 - math.floor(math.log10(value))
    return round(value, digits)


def guardrail_anchors(scenario: Scenario) -> list[Policy]:
    """Return the start of the guardrail search: today's settings, and reservations near the real charge."""
    now = scenario.policy
    space = guardrail_space(scenario).ladders
    gap = _rounded(gap_s(scenario))
    most = space["max_concurrency"][-1]
    anchors = [now]
    for est in space["est_tokens_per_run"]:
        for concurrency in (min(20, most), min(200, most)):
            for stagger in {0.0, gap, now.stagger_seconds}:
                anchors.append(
                    now.with_(
                        est_tokens_per_run=est, max_concurrency=concurrency, stagger_seconds=stagger, tpm_headroom=0.05
                    )
                )
    return anchors


def recipe(scenario: Scenario) -> Policy:
    """Return a fixed recipe, without any search: the provider's window mirrored, 1 % headroom, first in first out."""
    provider = scenario.provider
    return scenario.policy.with_(
        tpm_window=MIRRORS[provider.window],
        burst_seconds=burst_mirror_s(scenario),
        charge_rule=provider.charge_rule,
        tpm_headroom=0.01,
        stagger_seconds=0.0,
        max_concurrency=1_000,
        launch_order="fifo",
        backoff_keeps_permit=False,
        retry_max_attempts=max(RECIPE_ATTEMPTS, scenario.policy.retry_max_attempts),
        settle=_returns_unused(scenario),
    )


def plain_mirror(scenario: Scenario) -> Policy:
    """Return what a knowledgeable user would write without a search: the mirrored window, no stagger, the auto rule.

    And the charge rule of the provider, where it is known.
    """
    plain = recipe(scenario)
    return plain if "charge rule" in scenario.provider.learnt else plain.with_(charge_rule="auto")


def full_anchors(scenario: Scenario) -> list[Policy]:
    """Return the start of the full search: the recipe, and the presets' switches at several concurrencies."""
    base = recipe(scenario)
    n = len(scenario.workload)
    rules = dict.fromkeys((scenario.provider.charge_rule, "max_of", "prompt_plus_max"))
    anchors = [scenario.policy, base]
    for rule in rules:
        for concurrency in sorted({min(c, max(1, n)) for c in (20, 80, 300, 1200)}):
            for order in ("fifo", "longest_first"):
                for sync in (False, True):
                    anchors.append(
                        base.with_(
                            charge_rule=rule,
                            max_concurrency=concurrency,
                            launch_order=order,
                            sync_headers=sync,
                            hold_on_throttle=sync,
                        )
                    )
    return anchors


def safer_variants(policy: Policy, space: Space, gap_s: float) -> list[Policy]:
    """Safer relatives of a policy, the most useful first; only knobs of the space. `gap_s`: see the function."""
    ladders = space.ladders
    wished: list[dict[str, Any]] = []
    if "sync_headers" in ladders:
        watchful = {"sync_headers": True, "hold_on_throttle": True, "tpm_window": ladders["tpm_window"][-1]}
        spaced = {"stagger_seconds": _nearest(ladders["stagger_seconds"], max(policy.stagger_seconds, 0.5 * gap_s))}
        wished += [watchful, watchful | spaced]
        wished += [
            watchful | more | {"charge_rule": rule} for rule in ("prompt_plus_max", "max_of") for more in (spaced, {})
        ]
        wished += [watchful | {"backoff_keeps_permit": not policy.backoff_keeps_permit}]
    if policy.charge_rule == "fixed":
        higher = [est for est in ladders["est_tokens_per_run"] if est > policy.est_tokens_per_run]
        wished += [{"est_tokens_per_run": est} for est in higher[-2:] + higher[:2]]
    stagger = [s for s in (0.1, 0.5, 1.0, 2.0, 0.5 * gap_s, gap_s) if s > policy.stagger_seconds]
    wished += [{"stagger_seconds": _nearest(ladders["stagger_seconds"], s)} for s in stagger]
    higher = [h for h in ladders["tpm_headroom"] if h > policy.tpm_headroom]
    wished += [{"tpm_headroom": h} for h in higher[:4:2] + higher[4:5]]
    wished += [{"retry_max_attempts": a} for a in ladders["retry_max_attempts"] if a > policy.retry_max_attempts]
    wished += [{"max_concurrency": c} for c in ladders["max_concurrency"] if c < policy.max_concurrency][-1:-6:-2]
    if "sync_headers" in ladders:
        wished += [{"hold_on_throttle": not policy.hold_on_throttle}]
    if "settle" in ladders:
        wished += [{"settle": not policy.settle}]
    return [policy.with_(**changes) for changes in wished]


def _nearest(ladder: Sequence[float], value: float) -> float:
    return min(ladder, key=lambda rung: abs(rung - value))


def changed_knobs(old: Policy, new: Policy) -> list[str]:
    """Python names of the knobs whose values differ and matter, in the order of the table."""
    idle = {"est_tokens_per_run"} if new.charge_rule != "fixed" else set()
    return [name for name in KNOB_BY_NAME if name not in idle and getattr(old, name) != getattr(new, name)]
