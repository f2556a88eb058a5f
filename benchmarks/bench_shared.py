"""One quota over many processes: what is lost, throttled and wasted, and how fast Redis lets launches be decided.

    python -m benchmarks.bench_shared [--short]

First the issue's case: 3 and 8 processes with 60 and 480 requests of about 1,500 tokens on one 30,000-TPM quota that is
charged at admission, behind real HTTP on loopback, with clocks sped up. Beside it, for the 3-process case, the same
governors without a store, each with a third of the quota (what can be done without sharing) and each with all of it
(what happens when nobody thinks of it). Then launches decided through Redis: as many as 8 processes get in all, and how
long a permit takes at 40 per second. `--short`: the 3-process case and shorter rates.
"""

from __future__ import annotations

import sys
from typing import Any

from sim.provider_config import ProviderConfig
from sim.server import spawn
from tests.servers import RedisServer
from tests.sharing import Crew, Did, Order, shares

TPM = 30_000
TOKENS = 1_500
LATENCY = {"first_token_s": 1.0, "per_token_s": 0.005, "sigma": 0.2, "stall_ratio": 0.0}
SETTINGS: dict[str, Any] = {
    "max_concurrency": 100,
    "stagger_seconds": 0.0,
    "tpm_limit": TPM,
    "tpm_headroom": 0.02,
    "tpm_window": "bucket",
    "charge_rule": "prompt_plus_max",
    "backoff_keeps_permit": False,
    "hold_on_throttle": True,
}
FREE: dict[str, Any] = {"max_concurrency": 100_000, "stagger_seconds": 0.0, "tpm_limit": 10**12}


def batch(url: str, processes: int, requests: int, scale: float, **changes: Any) -> tuple[list[Did], dict[str, Any]]:
    """The batch over so many processes; what each did, and what the provider saw."""
    config = ProviderConfig().with_(tpm=TPM, rpm=0, charge_rule="prompt_plus_max", latency=LATENCY)
    with spawn(config, time_scale=scale, stated_time="provider") as served:
        settings = SETTINGS | changes
        each = requests // processes
        order = Order(settings, url=url, base_url=served.base_url, requests=each, tokens=TOKENS, scale=scale)
        with Crew(processes, order) as crew:
            found = crew.done()
        return found, served.stats()


def row(name: str, found: list[Did], stats: dict[str, Any]) -> float:
    """Prints one line; returns makespan over bound."""
    charged = stats["charged_tokens"]
    bound_s = (charged - TPM) * 60.0 / TPM + 1.0
    last_s = max(did.last_s for did in found)
    done, requests = sum(len(did.answered) for did in found), sum(len(did.answered) + did.failed for did in found)
    low, high = min(shares(found)), max(shares(found))
    ratio = last_s / bound_s
    used = stats["windows"]["TPM"]["used_ratio_max"]
    throttled = sum(did.throttled for did in found)
    print(f"{name:42} {done:5}/{requests:<5} {throttled:6} {ratio:8.3f} {low:9.2f} to {high:.2f} {used:9.3f}")
    return ratio


def rate(url: str, for_s: float) -> None:
    """As many launches as 8 processes get, answered at once."""
    with Crew(8, Order(FREE, url=url, for_s=for_s)) as crew:
        found = crew.done()
    launches = sum(len(did.launches) for did in found)
    doubled = launches - sum(len({index for _, index in did.launches}) for did in found)
    lost = launches - sum(len(did.answered) for did in found)
    cpu_ms = 1000.0 * sum(did.cpu_s for did in found) / launches
    print(f"launches per second, 8 processes: {launches / for_s:,.0f} ({cpu_ms:.2f} ms of CPU each); ", end="")
    print(f"lost {lost}, doubled {doubled}")


def latency(url: str, for_s: float) -> None:
    """How long permits take at 40 per second in all, asked for at even times."""
    with Crew(8, Order(FREE, url=url, for_s=for_s, every_s=8 / 40, service_s=0.05)) as crew:
        found = crew.done()
    waits_s = sorted(wait for did in found for wait in did.waits_s)
    p50, p99 = (1000.0 * waits_s[int(q * (len(waits_s) - 1))] for q in (0.5, 0.99))
    print(f"a permit at 40 per second ({len(waits_s)} of them): p50 {p50:.1f} ms, p99 {p99:.1f} ms")


def main(short: bool) -> None:
    """Prints all tables."""
    server = RedisServer()
    try:
        print(f"{'processes, requests':42} {'done':>11} {'429s':>6} {'x bound':>8} {'shares':>17} {'used max':>9}")
        ours = row("3, 60: one quota through Redis", *batch(server.url, 3, 60, 10.0))
        third = row("3, 60: a third of it each", *batch("", 3, 60, 10.0, tpm_limit=TPM // 3))
        row("3, 60: all of it each, as they believe", *batch("", 3, 60, 60.0))
        print(f"makespan, a third each over shared: {third / ours:.2f}")
        if not short:
            row("8, 480: one quota through Redis", *batch(server.url, 8, 480, 30.0))
        rate(server.url, 3.0 if short else 10.0)
        latency(server.url, 5.0 if short else 20.0)
    finally:
        server.stop()


if __name__ == "__main__":
    main("--short" in sys.argv)
