"""What the law and the asyncio driver cost: CPU time per request, with a send that answers at once.

    python -m benchmarks.bench_live_overhead [--short]

No limit binds, so the driver is never idle and every microsecond is its own. Beside it stands the same batch without
us, a task and a semaphore per request: what asyncio costs anybody, and what the rest is added to. Four forms of ours:
bare (no limit configured); with everything on that is decided per request (four limits, settling, header sync); that
with a stagger of a nanosecond, which holds nothing up but gives each launch its jitter and its timer; and that again
with an observer who takes every report and decision. All runs are taken in turn in one process and timed in its CPU
seconds; each figure is the median.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from statistics import median
from typing import Any

from governor.model.policy import Policy
from governor.model.requests import CHAT, Answer, Attempt, Limit, Outcome, Request, Sizes, url_of
from governor.model.work import Job, Observer, Work
from governor.scheduler.driver import Governor

REPEATS = 5
LIMIT_US = 50.0
CONCURRENCY = 100
PLENTY = 10**12
SIZES = Sizes(CHAT, 500, 2_000, 0, 1, 0, 0, 1, 500)
ANSWER = Answer(Outcome.OK, 200, used_prompt_tokens=500, used_output_tokens=120, has_text=True)
STATED = Answer(
    Outcome.OK,
    200,
    used_prompt_tokens=500,
    used_output_tokens=120,
    has_text=True,
    limits=(Limit("TPM", 1e12, 1e12), Limit("RPM", 1e9, 1e9)),
)

BARE = Policy(max_concurrency=CONCURRENCY, stagger_seconds=0.0, tpm_limit=PLENTY)
FULL = Policy.preset("paceline").with_(
    max_concurrency=CONCURRENCY,
    stagger_seconds=0.0,
    tpm_limit=PLENTY,
    rpm_limit=10**9,
    tpd_limit=10**15,
    rpd_limit=10**12,
    settle=True,
    deadline_seconds=3_600.0,
)
STAGGERED = FULL.with_(stagger_seconds=1e-9)


class Listener(Observer):
    """Takes every report and keeps the last of each."""

    def launched(self, job: Job, now: float) -> None:
        self.last_launched = job

    async def flushed(self) -> None:
        pass

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        self.last_attempt = attempt

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        self.last_ended = request

    def deferred(self, cause: int) -> None:
        self.last_cause = cause

    def decided(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        self.last_decision = name, arguments, result


def works(count: int) -> Iterator[Work]:
    """A batch of equal requests, made one at a time."""
    for i in range(count):
        yield Work(Request(i, "q", url_of(CHAT), "gpt-4o", None, SIZES), 1_000.0, 500.0, 1_000.0, 1_000, 1_000)


def ours(policy: Policy, answer: Answer, observer: type[Observer], count: int) -> Callable[[], Awaitable[None]]:
    """The batch under that policy."""

    async def send(job: Job, timeout_s: float) -> Answer:
        return answer

    async def run() -> None:
        governor = Governor(policy.params(), observer=observer())
        assert await governor.run(works(count), send) == ""
        assert governor.in_flight == 0

    return run


def without_us(count: int) -> Callable[[], Awaitable[None]]:
    """The same sends behind a semaphore, a task each."""

    async def send(work: Work) -> Answer:
        return ANSWER

    async def one(work: Work, free: asyncio.Semaphore) -> None:
        try:
            await send(work)
        finally:
            free.release()

    async def run() -> None:
        free = asyncio.Semaphore(CONCURRENCY)
        tasks: set[asyncio.Task[None]] = set()
        for work in works(count):
            await free.acquire()
            task = asyncio.get_running_loop().create_task(one(work, free))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    return run


def timed(run: Callable[[], Awaitable[None]]) -> float:
    """CPU seconds of one run on a loop of its own."""

    async def main() -> float:
        gc.collect()
        begun = time.process_time()
        await run()
        return time.process_time() - begun

    return asyncio.run(main())


def main() -> int:
    """The table on standard output; 1 if a figure is above the limit."""
    count = 10_000 if "--short" in sys.argv else 100_000
    runs = {
        "a task and a semaphore, without us": without_us(count),
        "no limit configured": ours(BARE, ANSWER, Observer, count),
        "every limit, settling, header sync": ours(FULL, STATED, Observer, count),
        "the same with a stagger": ours(STAGGERED, STATED, Observer, count),
        "the same, every report taken": ours(STAGGERED, STATED, Listener, count),
    }
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            taken[name].append(1e6 * timed(run) / count)
    print(f"CPU microseconds per request, {count:,} requests, median of {REPEATS}; Python {sys.version.split()[0]}")
    print(f"{'':38} {'in all':>7} {'added':>7} {'range in all':>14}")
    without = median(next(iter(taken.values())))
    worst = 0.0
    for name, figures in taken.items():
        added = median(figures) - without
        print(f"{name:38} {median(figures):7.1f} {added:7.1f} {min(figures):7.1f} {max(figures):6.1f}")
        worst = max(worst, added)
    print(f"law and driver together may add {LIMIT_US:.0f}: {'met' if worst <= LIMIT_US else 'MISSED'}")
    return int(worst > LIMIT_US)


if __name__ == "__main__":
    sys.exit(main())
