"""One line for people on why a setting should change: the knob's own story, with the figures of this case."""

from __future__ import annotations

from collections.abc import Mapping

from governor.model.policy import Policy
from sim.base.words import duration, percent
from sim.scenario.scenario import Scenario

# What is less reads as nothing.
SECONDS_WORTH_A_WORD = 0.5


def reason_for(
    name: str, old: Policy, new: Policy, waits_s: Mapping[str, float], left_out_s: float, scenario: Scenario
) -> str:
    """Why this knob changes.

    `waits_s`: mean waits by cause under today's settings, seconds over all requests. `left_out_s`: what the
    recommendation loses without this change.
    """
    before, after = getattr(old, name), getattr(new, name)
    waited = _share(waits_s)
    rule = scenario.provider.charge_rule
    tpm = scenario.provider.tpm
    if name == "stagger_seconds":
        held = f"{waited('stagger')} of all waiting was for the next launch slot"
        if after < before:
            return f"{held}; the token budget paces launches by itself"
        return "spaces launches, so that a burst does not meet a limit that the budget cannot see"
    if name == "max_concurrency":
        if after > before and waits_s["concurrency"] > 0.05 * sum(waits_s.values()):
            return f"{waited('concurrency')} of all waiting was for a free place in flight"
        if after > before and left_out_s < SECONDS_WORTH_A_WORD:
            return "as assumed this gains nothing; it is room for the case that answers take longer"
        if after > before:
            return f"{before} in flight would hold back what the other changes gain, by {duration(left_out_s)}"
        return "more in flight brings nothing here, and fewer are exposed when the provider refuses"
    if name == "tpm_headroom":
        if after < before:
            return f"the budget follows the provider's own refill; {percent(before)} of {tpm:,.0f} tokens/min lay idle"
        return "leaves room for what the reservation does not cover"
    texts = {
        "est_tokens_per_run": f"nearer to what the provider charges ({rule}) than {old.est_tokens_per_run:,} tokens",
        "retry_max_attempts": "a request survives a longer run of refusals" if after > before else "fewer suffice",
        "backoff_base_seconds": "returns sooner after a refusal" if after < before else "waits out a refusal",
        "finalize_lowers_concurrency": "finalize passes need not slow the others down",
        "tpm_window": {
            "bucket": "the provider refills continuously: no waiting for a minute to expire",
            "sliding": "tokens free as they age, not all at once when a minute expires",
            "fixed": "whole minutes fit this batch",
        }[new.tpm_window],
        "charge_rule": {
            "fixed": "one flat reservation is enough here",
            "max_of": "reserves what the documentation says is charged, request by request",
            "prompt_plus_max": "reserves the most that could be charged, request by request: safe under every rule",
        }.get(new.charge_rule, f"reserves request by request what is measured to be charged ({new.charge_rule})"),
        "launch_order": "starts the longest declared answers first, so that the batch does not end on a long tail"
        if new.launch_order == "longest_first"
        else "the order of submission does as well",
        "sync_headers": "the provider's own count corrects the budget: a neighbour or another charge rule shows",
        "hold_on_throttle": "after a 429 nobody launches into the same refusal"
        if after
        else "a 429 concerns one request",
        "backoff_keeps_permit": "a place in flight is not blocked while its request backs off"
        if not after
        else "a request that backs off keeps its place, which damps the rest",
        "settle": "books what was really used as soon as it is known" if after else "the provider does not settle",
    }
    return texts.get(name, "better in the simulation")


def _share(waits_s: Mapping[str, float]):  # type: ignore[no-untyped-def]
    total = sum(waits_s.values())

    def of(cause: str) -> str:
        return percent(waits_s[cause] / total) if total > 0.0 else "none"

    return of
