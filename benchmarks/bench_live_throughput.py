"""What Paceline costs a live batch that no limit holds back: requests per second beside the bare SDK, and memory.

    python -m benchmarks.bench_live_throughput [--short]

The same short requests go over HTTP on loopback to a provider in a process of its own, 50 in flight, each answered
after 50 ms, in three ways: the official SDK's `chat.completions.create` behind a semaphore, a task for each request;
the driver and the adapter as a program of one's own uses them; and `paceline run`. They are taken in turn, each run in
a process of its own. The rate counts from the first launch to the last answer. For `paceline run` that has the journal
in it (every launch on the disk before its request is sent, every answer before it counts), progress and figures; what
comes before and after (reading the input into the journal, writing the results) is in its CPU time and its whole time.

Memory: the peak of the client's process in one `paceline run` of 100,000 requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from openai import AsyncOpenAI

from benchmarks.bench_driver import held_mb
from benchmarks.live_batch import ENVIRONMENT, run_live, write_lines
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.requests import read_requests
from governor.model.work import Work, work_of
from governor.provider.sending import PoolSender
from governor.scheduler.driver import Governor
from sim.base.layout import table
from sim.model.provider_config import ProviderConfig
from sim.serving.server import spawn

REPEATS = 5
CONCURRENCY = 50
RATIO_LEAST = 0.85
LIMIT_MB = 300.0
PROVIDER = ProviderConfig().with_(
    tpm=0, rpm=0, latency={"first_token_s": 0.05, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0}
)
POLICY = Policy.preset("paceline").with_(
    max_concurrency=CONCURRENCY, stagger_seconds=0.0, tpm_limit=10**12, charge_rule="prompt_plus_max"
)
SDK, LIBRARY, RUN = "the SDK behind a semaphore", "driver and adapter", "paceline run"


def bodies(count: int) -> Iterator[dict[str, Any]]:
    """Short requests, made one at a time."""
    for i in range(count):
        text = f"Question {i}: is the answer to the question before this one yes or no? One word."
        yield {"model": "gpt-4o-mini", "max_tokens": 40, "messages": [{"role": "user", "content": text}]}


# ---------------------------------------------------------------- the three ways: seconds from first launch to the end


async def by_sdk(path: Path, base_url: str) -> float:
    """A task and a semaphore for each request."""
    read = [json.loads(text)["body"] for text in path.read_text(encoding="utf-8").splitlines()]
    free = asyncio.Semaphore(CONCURRENCY)
    async with AsyncOpenAI(api_key=ENVIRONMENT["OPENAI_API_KEY"], base_url=base_url, max_retries=0) as client:

        async def one(body: dict[str, Any]) -> None:
            async with free:
                answer = await client.chat.completions.create(**body)
            assert answer.usage is not None

        begun = time.perf_counter()
        await asyncio.gather(*(one(body) for body in read))
        return time.perf_counter() - begun


async def by_library(path: Path, base_url: str) -> float:
    """The governor pulls the same lines, and the adapter sends them."""
    pool = Pool(policy=POLICY, base_url=base_url)

    def works(lines: list[str]) -> Iterator[Work]:
        return (work_of(request, POLICY) for request in read_requests(lines, path.name))

    lines = path.read_text(encoding="utf-8").splitlines()
    send = PoolSender(pool, ENVIRONMENT)
    governor = Governor(POLICY.params())
    begun = time.perf_counter()
    assert await governor.run(works(lines), send) == ""
    taken_s = time.perf_counter() - begun
    await send.aclose()
    return taken_s


def by_run(path: Path, base_url: str) -> float:
    """The whole command, but for the process itself."""
    outcome = run_live(path, POLICY, base_url)
    assert outcome.exit_code == 0, outcome
    return outcome.summary.makespan_s


def measured(way: str, count: int) -> dict[str, float]:
    """One run in this process: seconds, CPU seconds of this process, seconds with all around it, peak MB."""
    with tempfile.TemporaryDirectory(prefix="paceline-rate-") as name:
        path = Path(name) / "batch.jsonl"
        write_lines(path, bodies(count))
        with spawn(PROVIDER) as server:
            cpu_s, begun = time.process_time(), time.perf_counter()
            if way == RUN:
                taken_s = by_run(path, server.base_url)
            else:
                main = by_sdk if way == SDK else by_library
                taken_s = asyncio.run(main(path, server.base_url))
            whole_s, cpu_s = time.perf_counter() - begun, time.process_time() - cpu_s
            assert server.stats()["outcomes"] == {"ok": count}
    return {"taken_s": taken_s, "cpu_s": cpu_s, "whole_s": whole_s, "peak_mb": held_mb(peak=True)}


def apart(way: str, count: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_live_throughput", "--way", way, "--count", str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main(words: list[str]) -> int:
    """The tables on standard output; 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(prog="bench_live_throughput")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--way", default="", help="one run, its figures as JSON")
    parser.add_argument("--count", type=int, default=0, help="requests of a run")
    given = parser.parse_args(words)
    if given.way:
        print(json.dumps(measured(given.way, given.count)))
        return 0
    count = given.count or (1_000 if given.short else 3_000)
    taken: dict[str, list[dict[str, float]]] = {SDK: [], LIBRARY: [], RUN: []}
    for _ in range(2 if given.short else REPEATS):
        for way, figures in taken.items():
            figures.append(apart(way, count))
    rows = [["", "requests/s", "of the SDK", "CPU ms each", "of the SDK", "whole s"]]
    rates = {way: median(count / each["taken_s"] for each in figures) for way, figures in taken.items()}
    cpus = {way: median(1_000.0 * each["cpu_s"] / count for each in figures) for way, figures in taken.items()}
    for way, figures in taken.items():
        whole_s = median(each["whole_s"] for each in figures)
        ratios = f"{rates[way] / rates[SDK]:.2f}", f"{cpus[way] / cpus[SDK]:.2f}"
        rows.append([way, f"{rates[way]:,.0f}", ratios[0], f"{cpus[way]:.2f}", ratios[1], f"{whole_s:.1f}"])
    print(f"{count:,} requests, {CONCURRENCY} in flight, median of {len(taken[RUN])}; Python {sys.version.split()[0]}")
    print(table(rows))
    good = rates[RUN] >= RATIO_LEAST * rates[SDK]
    print(f"paceline run must reach {RATIO_LEAST:g} of the SDK: {'met' if good else 'MISSED'}")
    many = 10_000 if given.short else 100_000
    held = apart(RUN, many)
    fits = held["peak_mb"] <= LIMIT_MB
    print(
        f"{many:,} requests: peak memory {held['peak_mb']:.0f} MB (limit {LIMIT_MB:.0f} for 100,000: "
        f"{'met' if fits else 'MISSED'}), {many / held['taken_s']:,.0f} requests/s, {held['whole_s']:.0f} s in all"
    )
    return int(not (good and fits))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
