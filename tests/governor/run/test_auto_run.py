"""`--via auto` against an account at the synthetic provider, in virtual time: killed at any point, with moves.

Live calls and the Batch API are one account's; its books say what has been paid for, ours what was answered.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from governor.batchapi.limits import CANCELLED, CANCELLING
from governor.forecast.forecast import Demand, Outlook, fluid
from governor.journal.journal import Journal
from governor.model.errors import FailureCode
from governor.model.pools import Pool
from governor.model.prices import Spending
from governor.model.requests import BATCH, Answer, Attempt, Outcome, endpoint_of
from governor.model.work import Job, Work
from governor.profiles.loader import prices_in_force
from governor.provider.answers import classify, malformed
from governor.run.live import Leg
from governor.run.pool_run import RunOptions
from governor.run.via.auto_run import AutoRun
from governor.run.via.wave_run import Spender
from governor.telemetry.progress import Display
from sim.des.virtual_loop import VirtualLoop
from tests.governor.batchapi.accounts import POOL, Account, Client, Killed, check_account, journal_of, works
from tests.governor.batchapi.test_driver import _no_fsync as _no_fsync
from tests.governor.batchapi.test_driver import config_of
from tests.virtual_loop import run_virtual

MODELS = ("gpt-4o-mini", "gpt-4o", "gpt-5-mini")


@dataclass
class Mortal:
    """The point at which a process dies, counted from now; none if -1. Every later point finds it dead."""

    left: int = -1
    is_dead: bool = False
    died: asyncio.Event = field(default_factory=asyncio.Event)

    def point(self, *_: str) -> None:
        """Live on, or not."""
        self.left -= self.left > 0
        if self.left == 0:
            self.is_dead = True
            self.died.set()
            raise Killed


class Caller:
    """Live calls to the account. `paid`: those that it has answered, or will though the caller is dead, by request."""

    def __init__(self, account: Account, rng: random.Random) -> None:
        self.account = account
        self.rng = rng
        self.paid: Counter[str] = Counter()

    async def __call__(self, job: Job, timeout_s: float) -> Answer:
        """Send one attempt."""
        assert job.work is not None
        request = job.work.request
        self.account.faults("before", "live")
        assert request.body is not None
        reply, _ = self.account.desk.desk.batch_reply(endpoint_of(request.url), request.body)
        self.paid[request.custom_id] += reply.status == 200
        await asyncio.sleep(self.rng.uniform(1.0, 40.0))
        self.account.faults("after", "live")
        return classify(reply.status, None, reply.whole_body())

    async def aclose(self) -> None:
        """Close nothing."""


class InPlace(VirtualLoop):
    """Threads in virtual time: what they are asked to do is done at once, and known a second later."""

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """Call the function here and now."""
        done, result = self.create_future(), func(*args)
        self.call_later(1.0, lambda: done.done() or done.set_result(result))
        return done


@dataclass
class Committer:
    """The thread of a journal's commits, in place, with a point of death before and after each."""

    point: Callable[[], None]

    def submit(self, write: Callable[..., None], *args: Any) -> concurrent.futures.Future[None]:
        """Write here and now."""
        self.point()
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        try:
            done.set_result(write(*args))
        except Exception as error:
            done.set_exception(error)
        self.point()
        return done

    def shutdown(self) -> None:
        """End no thread."""


def leg_of(journal: Journal, pool: Pool, given: list[Work]) -> Leg:
    """What is left of a journal, for one process."""
    demand = Demand()
    for work in given:
        demand.add(work.request.model, work.request.sizes, work.reserve)
    counts = journal.counts()
    return Leg(
        journal=journal,
        pools={pool.name: pool},
        started={pool.name: pool.policy},
        left={pool.name: (counts.pending + counts.in_flight, float(demand.total))},
        models={pool.name: frozenset(demand.models)},
        expectations={pool.name: fluid(Outlook(pool=pool, demand=demand))},
        canaries={},
        spent=Spending(prices_in_force(), date.today()),
    )


@dataclass
class Mixture:
    """One run of `--via auto` in all its lives: its account, its live calls, and when it is to be done."""

    account: Account
    caller: Caller
    pool: Pool
    given: list[Work]
    deadline_at: float
    path: Path
    said: io.StringIO = field(default_factory=io.StringIO)

    def live(self, mortal: Mortal) -> None:
        """One life of our process, which ends by a kill or on its own. What it had not committed is gone with it."""
        self.account.faults = mortal.point
        journal: Journal = journal_of(self.path, self.given)
        journal._running()._thread = Committer(mortal.point)  # type: ignore[assignment]
        try:
            run_virtual(self._main(journal, mortal), kind=InPlace)
        except BaseException:
            if not mortal.is_dead:
                raise
        finally:
            if mortal.is_dead:
                journal._running().abandon()
                journal._writer = None
            journal.close()

    async def _main(self, journal: Journal, mortal: Mortal) -> None:
        loop, account = asyncio.get_running_loop(), self.account
        await asyncio.sleep(account.now)
        journal.now_s = lambda scale=1.0: loop.time()  # type: ignore[method-assign]
        auto = AutoRun(
            leg_of(journal, self.pool, self.given),
            lambda pool: self.caller,
            lambda pool: Client(account, lambda: self.caller.rng.expovariate(1.0)),
            Display(self.said),
            RunOptions(),
            finish_by_s=self.deadline_at - loop.time(),
            keep_files=False,
        )
        auto._begin()
        working, dying = asyncio.create_task(auto._work()), asyncio.create_task(mortal.died.wait())
        await asyncio.wait({working, dying}, return_when=asyncio.FIRST_COMPLETED)
        account.now = loop.time()
        if mortal.is_dead:
            working.cancel()
            await asyncio.wait({working})
            raise Killed
        dying.cancel()
        await working
        await auto._close_down()
        journal.finish(loop.time(), "finished")


def mixture(path: Path, rng: random.Random) -> Mixture:
    """Draw a run whose Batch API is late more often than not."""
    given = works(rng.randint(20, 70), models=MODELS[: rng.randint(1, 3)])
    queue = rng.choice([0, 0, 3_000])
    deadline_s = rng.uniform(2_000.0, 12_000.0)
    p50 = deadline_s * rng.choice([0.1, 0.8, 1.5, 3.0])
    config = config_of(queue, error_ratio=rng.choice([0.0, 0.1]), turnaround_s=[p50, 2.0 * p50])
    account = Account(config, seed=rng.randrange(10**6))
    knobs = {"max_concurrency": 4, "stagger_seconds": rng.choice([0.0, 5.0]), "batch_queue_tokens": queue}
    pool = Pool(policy=POOL.policy.with_(**knobs))
    return Mixture(account, Caller(account, rng), pool, given, deadline_s, path)


@dataclass
class Seen:
    """What runs came to. `moved`: requests answered live after their wave was cancelled; `kept`: answered by one.

    `finished`: those of `kept` that the provider has answered after it was asked to cancel.
    """

    runs: int = 0
    kills: int = 0
    cancelled: int = 0
    moved: int = 0
    kept: int = 0
    finished: int = 0
    with_moves: int = 0
    resent: int = 0
    bought_again: int = 0
    late: int = 0


def checked(run: Mixture, seen: Seen) -> None:
    """Nothing is lost or doubled, and everything that was paid for is in the books."""
    assert "nothing more is submitted" not in run.said.getvalue(), run.said.getvalue()
    with journal_of(run.path, run.given) as journal:
        check_account(run.account, journal, run.given)
        answered: Counter[tuple[str, str]] = Counter()
        for attempt in journal.attempts():
            if attempt.outcome is Outcome.OK:
                answered[attempt.custom_id, BATCH if attempt.lane == BATCH else "live"] += 1
        results = list(journal.results())
        seen.late += max(end.ended_s for end in journal.ends()) > run.deadline_at
        waves = journal.waves()
    for result in results:
        name = result.request.custom_id
        ok = answered[name, BATCH] + answered[name, "live"]
        assert ok == (not result.failure), f"{name}: {ok} answers"
        # A live call whose process died before its answer was on record is the one thing that is bought again.
        again = run.caller.paid[name] - answered[name, "live"]
        assert 0 <= again <= result.resent, f"{name}: bought {again} times more, sent again {result.resent} times"
        seen.bought_again += again
        seen.resent += result.resent
    # Each line that the Batch API has answered and billed is the answer of its request, once.
    billed = run.account.desk.desk.count.billed
    lines = sum(sums["answers"] for name, sums in billed.items() if name.endswith(" batch"))
    assert lines == sum(count for (_, lane), count in answered.items() if lane == BATCH)
    cancelled = [row for row in waves if row.status == "cancelled"]
    live = sum(count for (_, lane), count in answered.items() if lane == "live")
    seen.runs += 1
    seen.cancelled += len(cancelled)
    seen.kept += sum(row.completed for row in cancelled)
    for job in run.account.desk.jobs.values():
        if CANCELLED in (entered := job.batch.entered):
            seen.finished += job.batch.answered(1e9) - job.batch.answered(entered[CANCELLING] - 1e-9)
    moved = min(live, sum(row.requests - row.completed for row in cancelled))
    seen.moved += moved
    seen.with_moves += moved > 0


def killed_runs(folder: Path, rng: random.Random, kills: int) -> Seen:
    """Runs that are killed at random points until so many kills have struck; each run is then checked."""
    seen = Seen()
    while seen.kills < kills:
        run = mixture(folder / f"{seen.runs}.db", rng)
        for _ in range(rng.randint(1, 9)):
            mortal = Mortal(rng.randint(1, 150))
            run.live(mortal)
            seen.kills += mortal.is_dead
            if not mortal.is_dead:
                break
        run.live(Mortal())
        checked(run, seen)
        run.path.unlink()
    print(f"\n{seen}")
    return seen


def test_kills_at_random_points_with_moves_lose_nothing_and_double_nothing(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    # Most runs have moves, but not all.
    found = (killed_runs(tmp_path, rng, 15) for _ in range(10))
    assert any(seen.cancelled for seen in found)


def test_an_answer_of_a_batch_that_is_gone_costs_its_worst() -> None:
    request, spent = works(1)[0].request, Spending(prices_in_force(), date.today())
    values = dict.fromkeys(Attempt.columns(), -1) | {"request": request.index, "custom_id": "q", "pool": "", "url": ""}
    attempt = Attempt(
        **values | {"model": request.model, "lane": BATCH, "outcome": Outcome.MALFORMED, "error_code": ""}
    )
    spender = Spender(spent)
    spender.attempted(attempt, malformed("the file is gone"), "")
    spender.ended(request, FailureCode.UNREADABLE_ANSWER, None, 0.0)
    price = spent.price(request.model, BATCH)
    assert price is not None
    most = price.most_used(request.sizes)
    assert most is not None
    assert (spent.unpriced, spent.cost_usd) == (0, price.cost_usd(most))


@pytest.mark.long
def test_a_thousand_kills_with_moves(tmp_path: Path, seed: int) -> None:
    seen = killed_runs(tmp_path, random.Random(seed), 1_000)
    assert seen.with_moves > seen.runs / 2
