"""A batch against a provider of 30,000 tokens per minute, live: `paceline run` beside what else pip installs.

    python -m benchmarks.bench_live_peers [--short] [--seeds 5] [--time-scale 10]

The case: continuous bucket of 30,000 TPM, 500 RPM, charge prompt + max_tokens at admission, an answer takes 0.6 s + 8
ms per output token; 60 requests of 250 to 2,500 tokens, prompt and declared cap; answers of a quarter of the cap to
all of it. Then the same where the provider books real use on completion (and our policy does too), and where it states
Retry-After in whole seconds, which it otherwise does in the message alone. A refused request costs no tokens.

Everybody sends the same requests over HTTP on loopback with the official SDK, to a provider in a process of its own.
All clocks run ten times as fast, the provider's and those of the contenders (`peers_live`), so that the figures are
seconds of their time. Ours is `paceline run` itself, journal and all: 20 in flight, bucket window, 1 % headroom,
longest declared cap first. `sorted` gives the baseline our order, too.

For each: requests lost, 429s, and the makespan over the bound, below which no scheduler can go.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median
from typing import Any

from benchmarks import peers_live
from benchmarks.live_batch import RULE, bound, drawn, run_cases
from governor.model.policy import Policy
from governor.run.scaledloop import ScaledLoop
from sim.base.layout import table
from sim.model.provider_config import ProviderConfig
from sim.serving.server import spawn

TPM, RPM, REQUESTS, TOKENS = 30_000, 500, 60, (250, 2_500)
FIRST_TOKEN_S, PER_TOKEN_S = 0.6, 0.008
SCALE_MOST = 10.0
# So many runs at once: each is idle nearly all the time.
AT_ONCE = 3
OURS = "paceline"
SORTED = "aiolimiter, sorted"
CASES = {
    "as in the docs": {"settles": False, "retry_after": "ms"},
    "settles": {"settles": True, "retry_after": "ms"},
    "Retry-After": {"settles": False, "retry_after": "seconds"},
}
# Makespan over bound at most, where something is promised; 429s at most one.
PROMISED = {"as in the docs": 1.08, "settles": 1.15}


@dataclass(frozen=True, slots=True)
class Ran:
    """What one contender made of one batch. `ratio`: makespan over bound, of what was answered."""

    name: str
    case: str
    seed: int
    lost: int
    throttled: int
    ratio: float


def provider(case: str) -> ProviderConfig:
    """The provider of a case."""
    return ProviderConfig().with_(
        tpm=TPM,
        rpm=RPM,
        charge_rule=RULE,
        failed_requests_count=False,
        latency={"first_token_s": FIRST_TOKEN_S, "per_token_s": PER_TOKEN_S, "sigma": 0.0, "stall_ratio": 0.0},
        **CASES[case],
    )


def policy(case: str) -> Policy:
    """What somebody sets who knows the provider."""
    return Policy.preset("paceline").with_(
        max_concurrency=peers_live.CONCURRENCY,
        stagger_seconds=0.0,
        tpm_limit=TPM,
        tpm_headroom=0.01,
        rpm_limit=RPM,
        charge_rule=RULE,
        settle=CASES[case]["settles"],
    )


def ran(name: str, case: str, seed: int, scale: float) -> Ran:
    """One contender, one batch, one provider."""
    batch = drawn(seed, REQUESTS, TOKENS)
    order = sorted(batch, key=lambda each: -each.body["max_tokens"]) if name == SORTED else batch
    contender = peers_live.CONTENDERS.get(name.split(",")[0] if name == SORTED else name)
    options: dict[str, Any] = {"seed": seed, "time_scale": scale, "stated_time": "provider"}
    with spawn(provider(case), **options) as server:
        if contender is None:
            summary = run_cases(batch, policy(case), server.base_url, time_scale=scale).summary
            lost, makespan_s = REQUESTS - summary.completed, summary.makespan_s
        else:
            calls = [(each.body, each.charge) for each in order]
            with asyncio.Runner(loop_factory=lambda: ScaledLoop(scale)) as runner:
                ends = runner.run(peers_live.run(contender, server.base_url, TPM, calls))
            lost, makespan_s = ends.count(-1.0), max(ends)
        outcomes = server.stats()["outcomes"]
    return Ran(name, case, seed, lost, outcomes.get("throttled", 0), makespan_s / bound(provider(case), batch))


def row(name: str, case: str, runs: list[Ran]) -> list[str]:
    """One line of the table."""
    ratios = [each.ratio for each in runs]
    lost = [each.lost for each in runs]
    cells = [_range(lost), _range([each.throttled for each in runs])]
    mark = " (lost some)" if any(lost) else ""
    return [case, name, *cells, f"{median(ratios):.3f}", f"{max(ratios):.3f}{mark}"]


def _range(figures: list[int]) -> str:
    low, high = min(figures), max(figures)
    return f"{low}" if low == high else f"{low} to {high}"


def kept(case: str, runs: list[Ran]) -> bool:
    """Whether ours did as promised."""
    if any(each.lost or each.throttled > 1 for each in runs):
        return False
    return case not in PROMISED or max(each.ratio for each in runs) <= PROMISED[case]


def main(words: list[str]) -> int:
    """The table on standard output; 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(prog="bench_live_peers")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--time-scale", type=float, default=SCALE_MOST)
    given = parser.parse_args(words)
    if not 0.0 < given.time_scale <= SCALE_MOST:
        parser.error(f"--time-scale must be above 0 and at most {SCALE_MOST:g}")
    seeds = range(1, 1 + (given.seeds or (1 if given.short else 5)))
    cases = list(PROMISED) if given.short else list(CASES)
    names = [*peers_live.CONTENDERS, SORTED, OURS]
    begun = time.monotonic()
    # A process for each run: none inherits another's loop, connections or garbage.
    with ProcessPoolExecutor(AT_ONCE, get_context("spawn")) as pool:
        orders = [(name, case, seed) for case in cases for seed in seeds for name in names]
        done = list(pool.map(ran, *zip(*orders, strict=True), [given.time_scale] * len(orders)))
    rows = [["case", "contender", "lost of 60", "429s", "makespan / bound, median", "worst"]]
    good = True
    for case in cases:
        for name in names:
            runs = [each for each in done if (each.name, each.case) == (name, case)]
            rows.append(row(name, case, runs))
            good &= name != OURS or kept(case, runs)
    plain = provider("as in the docs")
    bounds = ", ".join(f"{bound(plain, drawn(seed, REQUESTS, TOKENS)):.1f}" for seed in seeds)
    print(f"seeds {seeds.start} to {seeds.stop - 1}, bounds {bounds} s, clocks {given.time_scale:g} times as fast")
    print(table(rows))
    limits = ", ".join(f"{case} {limit:g}" for case, limit in PROMISED.items())
    print(f"ours may lose none, draw one 429, and need at most ({limits}): {'met' if good else 'MISSED'}")
    print(f"{time.monotonic() - begun:.0f} s")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
