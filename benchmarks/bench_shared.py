"""One quota over many processes: what is lost, throttled and wasted, and how fast Redis lets launches be decided.

    python -m benchmarks.bench_shared [--short]

First the issue's cases: 3 and 8 processes with 60 and 480 requests of about 1,500 tokens on one 30,000-TPM quota that
is charged at admission, behind real HTTP on loopback. Beside the first, the same governors without a store, each with a
third of the quota (what can be done without sharing) and each with all of it (what happens when nobody thinks of it).
Then `paceline run` in three processes, one of them killed -9 and started again, and Redis killed and started again with
an empty memory. Then launches decided through Redis: as many as 8 processes get in all, and how long a permit takes at
40 per second. Each promise of the issue ends in a line that says whether it was kept.

Clocks are SCALE times as fast, the buckets as large as ever, so whatever a request needs on its way from the decision
to the provider counts SCALE times as much: the governor's budget is HEADROOM below the limit, and that covers
60 s x HEADROOM / SCALE of difference between the first request's way and a later one's (1.2 s at true speed, 0.12 s
here). So the provider writes down when each attempt came, and its limiter is asked a second time with all of them come
at the moment of their decision: a 429 that is then gone was the path's, one that stays would be the sharing's.
`--short`: the first case, faster clocks and shorter rates.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bench_service import others
from benchmarks.recorded import Explained, RecordedProvider, explained
from sim.model.provider_config import ProviderConfig
from tests.live import Cli
from tests.servers import redis_server
from tests.shared_runs import Runs, never_above_the_limit, provider
from tests.sharing import Crew, Did, Order, shares

TPM = 30_000
WAIT_S = 400.0
TOKENS = 1_500
SCALE, SCALE_SHORT = 10.0, 20.0
# Whole command lines, whose first request takes longest: 5 % of headroom cover 0.6 s of its way then.
SCALE_DEATHS = 5.0
HEADROOM = 0.02
LATENCY = {"first_token_s": 1.0, "per_token_s": 0.005, "sigma": 0.2, "stall_ratio": 0.0}
SETTINGS: dict[str, Any] = {
    "max_concurrency": 100,
    "stagger_seconds": 0.0,
    "tpm_limit": TPM,
    "tpm_headroom": HEADROOM,
    "tpm_window": "bucket",
    "charge_rule": "prompt_plus_max",
    "backoff_keeps_permit": False,
    "hold_on_throttle": True,
}
FREE: dict[str, Any] = {"max_concurrency": 100_000, "stagger_seconds": 0.0, "tpm_limit": 10**12}
CONFIG = ProviderConfig().with_(tpm=TPM, rpm=0, charge_rule="prompt_plus_max", latency=LATENCY)


def verdict(is_kept: bool, text: str) -> None:
    print(f"{'kept' if is_kept else 'MISSED':7} {text}", flush=True)


def batch(
    url: str, processes: int, requests: int, scale: float, **changes: Any
) -> tuple[list[Did], dict[str, Any], Explained]:
    """The batch over so many processes; what each did, what the provider saw, and why it refused what it did."""
    with RecordedProvider(CONFIG, time_scale=scale, stated_time="provider") as served:
        settings = SETTINGS | changes
        each = requests // processes
        order = Order(settings, url=url, base_url=served.base_url, requests=each, tokens=TOKENS, scale=scale)
        with Crew(processes, order) as crew:
            found = crew.done(WAIT_S)
        seen, stats = served.record()
    sent = {name: values for did in found for name, values in did.sent.items()}
    return found, stats, explained(CONFIG, seen, sent, scale)


def row(name: str, found: list[Did], stats: dict[str, Any], why: Explained, requests: int) -> float:
    """Prints one line; returns makespan over bound."""
    bound_s = (stats["charged_tokens"] - TPM) * 60.0 / TPM + 1.0
    last_s = max(did.last_s for did in found)
    done = sum(len(did.answered) for did in found)
    low, high = min(shares(found)), max(shares(found))
    used = stats["windows"]["TPM"]["used_ratio_max"]
    path = f"{1e3 * why.path_s_p50:5.0f} {1e3 * why.path_s_max:6.0f}"
    numbers = f"{done:5}/{requests:<5} {why.throttled:6} {last_s / bound_s:8.3f} {low:9.2f} to {high:.2f} {used:9.3f}"
    print(f"{name:40} {numbers} {path}", flush=True)
    return last_s / bound_s


def shared(url: str, processes: int, requests: int, scale: float) -> float:
    """One of the issue's cases; returns its makespan over the bound."""
    found, stats, why = batch(url, processes, requests, scale)
    ratio = row(f"{processes}, {requests}: one quota through Redis", found, stats, why, requests)
    answered = sum(len(did.answered) for did in found)
    each = shares(found)
    if why.throttled:
        print(f"  of {why.throttled} 429s {why.unaided} had come with no time on the way", flush=True)
    verdict(answered == requests, f"nothing lost: {answered} of {requests} answered")
    verdict(why.throttled <= 2, f"at most 2 throttles: {why.throttled}")
    verdict(not why.unaided, f"none that the decisions alone would have drawn: {why.unaided}")
    verdict(ratio <= 1.10, f"makespan at most 1.10 x bound: {ratio:.3f}")
    verdict(0.8 <= min(each) <= max(each) <= 1.2, f"launches within 20 % of equal: {min(each):.2f} to {max(each):.2f}")
    return ratio


# ---------------------------------------------------------------- deaths


def deaths(cli: Cli, folder: Path) -> None:
    """One of three runs killed -9 and started again; then Redis. Each request must have one result."""
    with provider(SCALE_DEATHS) as served, redis_server() as server:
        runs = Runs(cli, _made(folder / "killed"), served, server.url, 3, 24, SCALE_DEATHS)
        runs.until_seen(35)
        runs.processes[0].signal(signal.SIGKILL)
        runs.processes[0].wait()
        runs.processes[0] = runs.start(0)
        runs.done()
        throttled, stats = never_above_the_limit(served), served.stats()
    used = stats["windows"]["TPM"]["used_ratio_max"]
    verdict(
        used <= 1.0 and throttled <= 2,
        f"a process killed -9: nothing lost, {throttled} throttles, the limit used to {used:.3f}",
    )
    with provider(SCALE_DEATHS) as served, redis_server() as server:
        runs = Runs(cli, _made(folder / "redis"), served, server.url, 3, 24, SCALE_DEATHS)
        runs.until_seen(35)
        server.kill()
        time.sleep(0.3)
        before = served.stats()["requests"]
        time.sleep(1.0)
        launched = served.stats()["requests"] - before
        server.start()
        runs.done()
        throttled, stats = never_above_the_limit(served), served.stats()
    used, ok = stats["windows"]["TPM"]["used_ratio_max"], stats["outcomes"]["ok"]
    verdict(launched == 0, f"Redis killed: {launched} launches without it")
    text = f"and started again: nothing lost, {ok - 72} sent twice, {throttled} throttles, the limit used to {used:.3f}"
    verdict(used <= 1.0 and ok == 72 and throttled <= 2, text)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


# ---------------------------------------------------------------- rates


def rate(url: str, for_s: float) -> None:
    """As many launches as 8 processes get, answered at once."""
    with Crew(8, Order(FREE, url=url, for_s=for_s)) as crew:
        found = crew.done()
    launches = sum(len(did.launches) for did in found)
    doubled = launches - sum(len({index for _, index in did.launches}) for did in found)
    lost = launches - sum(len(did.answered) for did in found)
    cpu_ms = 1000.0 * sum(did.cpu_s for did in found) / launches
    verdict(not lost and not doubled, f"{launches:,} launches: {lost} lost, {doubled} doubled")
    verdict(
        launches / for_s >= 400.0,
        f"at least 400 launches per second from 8 processes: {launches / for_s:,.0f} ({cpu_ms:.2f} ms of CPU each)",
    )


def latency(url: str, for_s: float) -> None:
    """How long permits take at 40 per second in all, asked for at even times."""
    with Crew(8, Order(FREE, url=url, for_s=for_s, every_s=8 / 40, service_s=0.05)) as crew:
        found = crew.done()
    waits_s = sorted(wait for did in found for wait in did.waits_s)
    p50, p99 = (1000.0 * waits_s[int(q * (len(waits_s) - 1))] for q in (0.5, 0.99))
    verdict(
        p99 < 20.0, f"a permit at 40 per second ({len(waits_s)} of them) under 20 ms: p50 {p50:.1f}, p99 {p99:.1f} ms"
    )


def main(short: bool) -> None:
    """Prints all tables and verdicts."""
    begun, before = time.monotonic(), others()
    scale = SCALE_SHORT if short else SCALE
    with redis_server() as server, tempfile.TemporaryDirectory(prefix="paceline-bench-") as name:
        head = f"{'done':>11} {'429s':>6} {'x bound':>8} {'shares':>17} {'used max':>9} {'way ms':>12}"
        print(f"{f'processes, requests (clocks x {scale:g})':40} {head}")
        ours = shared(server.url, 3, 60, scale)
        third = row("3, 60: a third of it each", *batch("", 3, 60, scale, tpm_limit=TPM // 3), 60)
        row("3, 60: all of it each, as they believe", *batch("", 3, 60, 60.0), 60)
        print(f"makespan, a third each over shared: {third / ours:.2f}")
        if not short:
            shared(server.url, 8, 480, scale)
            with Cli(_made(Path(name) / "cli")) as cli:
                deaths(cli, Path(name))
        rate(server.url, 3.0 if short else 10.0)
        latency(server.url, 5.0 if short else 20.0)
    took_s = time.monotonic() - begun
    theirs = (others() - before) / took_s
    print(f"other programs took {theirs:.2f} of {os.cpu_count()} cores meanwhile; {took_s / 60:.1f} minutes in all")
    verdict(took_s < 720.0, f"the whole of it in under 12 minutes: {took_s / 60:.1f}")


if __name__ == "__main__":
    main("--short" in sys.argv)
