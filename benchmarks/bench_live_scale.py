"""A large quota, and a quota that changes under way: is all of it used, is nothing lost, how many 429s?

    python -m benchmarks.bench_live_scale [--short] [--time-scale 0.5]

**At scale.** 20,000 short requests at 2,000,000 TPM and 10,000 RPM, hundreds in flight, by `paceline run` over HTTP on
loopback with the official SDK, against a provider in a process of its own. Client and provider share this machine, and
an answer costs some 4 ms of CPU on both sides together. So the clocks run half as fast here, which halves what has to
go through per second of the machine's time, and nothing else.

**A quota that changes.** 200 requests of 250 to 2,500 tokens at 30,000 TPM, header sync on, refusals without a wait.
After a minute the limit is halved; or others take 25 % of the quota in one burst of 10 s in every minute; or both. Many
seeds in simulation, whose law, provider and driver are those of the live run; a few live, at clocks ten times as fast.
The settings: 20 in flight, bucket window, headroom as shown, longest first. Without header sync it would go as the last
lines of the table say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.live_batch import RULE, Case, bound, drawn, run_cases
from governor.model.estimate import CHAT, sizes_of
from governor.model.policy import Policy
from sim.base.layout import table
from sim.experiment.experiment import case_of, figures_of, simulated
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import from_tokens
from sim.scenario.scenario import ModelSource, Scenario
from sim.serving.server import spawn

SHORT_TOKENS, LONG_TOKENS = (100, 310), (250, 2_500)
EFFICIENCY_LEAST = 0.95
THROTTLES_MOST = 2.0
CHANGED_REQUESTS = 200
# With noise, as a real provider has it: sigma of the log-normal factor.
NOISE = 0.25
HALVED: dict[str, Any] = {"limit_changes": [{"at_s": 60.0, "factor": 0.5}]}
OTHERS: dict[str, Any] = {"cotenant": {"share": 0.25, "burst_s": 10.0, "period_s": 60.0}}
CHANGES = {"limit halved": HALVED, "25 % in bursts": OTHERS, "both": {**HALVED, **OTHERS}}


def provider(tpm: int, rpm: int, sigma: float, **habits: Any) -> ProviderConfig:
    """A quota charged by the documented rule; an answer takes 0.6 s + 8 ms per token."""
    latency = {"first_token_s": 0.6, "per_token_s": 0.008, "sigma": sigma, "stall_ratio": 0.0}
    return ProviderConfig().with_(tpm=tpm, rpm=rpm, charge_rule=RULE, latency=latency, **habits)


def policy(tpm: int, rpm: int, concurrency: int, headroom: float, *, sync: bool = True) -> Policy:
    """What somebody sets who knows the provider, though not what will become of it."""
    return Policy.preset("paceline").with_(
        max_concurrency=concurrency,
        stagger_seconds=0.0,
        tpm_limit=tpm,
        rpm_limit=rpm,
        tpm_headroom=headroom,
        charge_rule=RULE,
        sync_headers=sync,
    )


# ---------------------------------------------------------------- at scale


def at_scale(share: float, time_scale: float) -> bool:
    """That share of the case, on quotas of that share; prints the line and says whether it keeps the promise."""
    count, tpm, rpm = round(20_000 * share), round(2_000_000 * share), round(10_000 * share)
    batch = drawn(1, count, SHORT_TOKENS)
    quota = provider(tpm, rpm, 0.0)
    # The bucket is to be emptied well before the end, and the machine is slow: twice what the quota's own pace needs.
    settings = policy(tpm, rpm, 200 + round(600 * share), 0.01)
    with spawn(quota, seed=1, time_scale=time_scale, stated_time="provider") as server:
        summary = run_cases(batch, settings, server.base_url, time_scale=time_scale).summary
        throttled = server.stats()["outcomes"].get("throttled", 0)
    least_s = bound(quota, batch)
    efficiency = least_s / summary.makespan_s
    lost = count - summary.completed
    good = lost == 0 and efficiency >= EFFICIENCY_LEAST
    print(
        f"{count:,} requests at {tpm:,} TPM and {rpm:,} RPM, clocks {time_scale:g} times as fast: {lost} lost, "
        f"{throttled} 429s, at most {summary.peak_in_flight} in flight, {summary.makespan_s:.1f} s, bound {least_s:.1f}"
        f" s: efficiency {efficiency:.3f} (at least {EFFICIENCY_LEAST:g}: {'met' if good else 'MISSED'})",
        flush=True,
    )
    return good


# ---------------------------------------------------------------- a quota that changes


@dataclass(frozen=True, slots=True)
class Seen:
    """One run: requests lost, throttles per 100 requests, makespan."""

    lost: int
    per_100: float
    makespan_s: float


def in_simulation(batch: list[Case], quota: ProviderConfig, settings: Policy, seed: int) -> Seen:
    """The batch on the simulation's clock."""
    sizes = [sizes_of(CHAT, case.body) for case in batch]
    known = {
        name: np.array([getattr(size, name) for size in sizes]) for name in ("prompt_tokens", "chars", "max_tokens")
    }
    outputs = np.array([case.output_tokens for case in batch])
    # The source only stands in: the rows are those of the batch.
    source = ModelSource(requests=len(batch), prompt_tokens=(900, 3_000), output_tokens=(200, 900), seed=seed)
    workload = from_tokens(output_tokens=outputs, **known)
    case = case_of(replace(Scenario.of(source, provider=quota, policy=settings), workload=workload))
    found = figures_of(simulated(case, seed), case.grant, seed)
    return Seen(round(found["failed"]), found["throttled_per_100"], found["makespan_s"])


def live(batch: list[Case], quota: ProviderConfig, settings: Policy, seed: int, time_scale: float) -> Seen:
    """The batch over HTTP."""
    with spawn(quota, seed=seed, time_scale=time_scale, stated_time="provider") as server:
        summary = run_cases(batch, settings, server.base_url, time_scale=time_scale).summary
    return Seen(summary.failed, 100.0 * summary.throttled / len(batch), summary.makespan_s)


def changed(seeds: int, seeds_live: int, time_scale: float) -> bool:
    """The table; whether all lines with header sync keep the promise."""
    rows = [["quota", "headroom", "sync", "runs", "lost", "429s per 100, mean", "most", "makespan s, mean"]]
    good = True
    for where, headroom, sync in _settings():
        settings = policy(30_000, 500, 20, headroom, sync=sync)
        quota = provider(30_000, 500, NOISE, retry_after="absent", **CHANGES[where])
        for is_live, count in ((False, seeds), (True, seeds_live if sync else 0)):
            seen = []
            for seed in range(1, 1 + count):
                batch = drawn(seed, CHANGED_REQUESTS, LONG_TOKENS)
                run = (batch, quota, settings, seed)
                seen.append(live(*run, time_scale) if is_live else in_simulation(*run))
            if seen:
                runs = f"{count} {'live' if is_live else 'simulated'}"
                rows.append([where, f"{headroom:.0%}", "on" if sync else "off", runs, *_figures(seen)])
                kept = all(each.lost == 0 and each.per_100 <= THROTTLES_MOST for each in seen)
                good &= kept or not sync
    print(table(rows))
    print(f"with header sync none lost and at most {THROTTLES_MOST:g} per 100: {'met' if good else 'MISSED'}")
    return good


def _settings() -> Iterator[tuple[str, float, bool]]:
    """(quota, headroom, header sync): the thin headroom where one thing happens, a wider one where both do."""
    yield from (("limit halved", 0.01, True), ("25 % in bursts", 0.01, True), ("both", 0.05, True))
    yield from (("limit halved", 0.01, False), ("25 % in bursts", 0.01, False))


def _figures(seen: list[Seen]) -> list[str]:
    per_100 = [each.per_100 for each in seen]
    makespan_s = fmean(each.makespan_s for each in seen)
    return [f"{sum(each.lost for each in seen)}", f"{fmean(per_100):.2f}", f"{max(per_100):.2f}", f"{makespan_s:.0f}"]


def main(words: list[str]) -> int:
    """Both parts on standard output; 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(prog="bench_live_scale")
    parser.add_argument("--short", action="store_true", help="a tenth of the large quota, few seeds")
    parser.add_argument("--time-scale", type=float, default=0.0, help="of the large quota")
    given = parser.parse_args(words)
    share, scale = (0.1, 2.0) if given.short else (1.0, 0.5)
    good = at_scale(share, given.time_scale or scale)
    good &= changed(10, 1, 10.0) if given.short else changed(200, 3, 10.0)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
