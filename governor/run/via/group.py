"""Pools of a live run that share the requests of their models: a router over their governors.

Requests come from the journal in one order for all pools of the group. Those that an earlier leg has launched go on
where they were: a background response is with that provider, and its pool knows what the request has to wait for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

from governor import law
from governor.model.requests import Request
from governor.model.work import Begun, Job, Work, reserve_of, work_of
from governor.provider.sending import PoolSender
from governor.run.pool_run import PoolRun
from governor.scheduler.router import Router, Seat


class GroupRun:
    """The pools of one group under way. `source`: their remaining work, those launched before first."""

    def __init__(self, runs: Sequence[PoolRun], source: Iterator[Work], say: Callable[[str], None]) -> None:
        self._runs = {run.name: run for run in runs}
        self._say = say
        self._news = {run.name: asyncio.Event() for run in runs}
        self._busy = len(runs)
        self._is_over = False
        before: list[Work] = []
        for work in source:
            before.append(work)
            if work.first_launched_s < 0.0:
                break
        new = [before.pop()] if before and before[-1].first_launched_s < 0.0 else []
        self.router: Router[Work] = Router(
            chain(new, source),
            clock=runs[0].governor.now,
            index_of=lambda work: work.request.index,
            item_of=lambda job, seat: _roaming(job),
            took=self._took,
        )
        self._seats: dict[str, Seat[Work]] = {}
        for run in runs:
            self._seats[run.name] = self.router.join(
                run.governor.scheduler, partial(_need, run), partial(self._renew, run), partial(_stays, run)
            )
        for work in before:
            self._seats[work.request.pool].own.append(work)

    async def run(self, run: PoolRun, *, finalize: bool) -> str:
        """Run one of the pools until the group has no work left, or this pool has stopped; return why it stopped."""
        seat, news = self._seats[run.name], self._news[run.name]
        # (Unlike a generator, `map` goes on after its source had nothing.)
        source = map(partial(_bound, run, run.governor.mark()), seat)
        while True:
            ending = await run.governor.run(source, run.send, finalize=finalize, refusals=run.refusals)
            self._busy -= 1
            if ending:
                news.clear()
            if ending and any(each.is_open for each in self.router.seats):
                names = ", ".join(name for name, each in self._seats.items() if each.is_open)
                self._say(f"pool {run.name} launches nothing more ({ending}): its requests go to {names}")
            if not self._busy and not any(each.is_set() for each in self._news.values()):
                self._is_over = True
                for each in self._news.values():
                    each.set()
            if not ending:
                await news.wait()
            if ending or self._is_over:
                return ending
            news.clear()
            self._busy += 1

    def _renew(self, run: PoolRun) -> None:
        if not run.governor.renew() and not run.governor.stopped:
            self._news[run.name].set()

    def _took(self, work: Work, seat: Seat[Work]) -> None:
        """Move a request from the figures of the pool that it was counted in to those of the one that has it now."""
        to = next(name for name, each in self._seats.items() if each is seat)
        for name, count in ((work.request.pool, -1), (to, 1)):
            meter = self._runs[name].meter
            meter.left += count
            meter.left_tokens += count * work.reserve


def _need(run: PoolRun, work: Work) -> list[float]:
    policy, request = run.policy, work.request
    tokens = work.finalize_reserve if work.lane == law.FINALIZE else float(reserve_of(policy, request.sizes))
    return policy.weights.of(tokens, float(request.sizes.prompt_tokens))


def _bound(run: PoolRun, begun: Begun, work: Work) -> Work:
    """Return a request as this pool launches it. `begun`: since when it waits, unless it comes from another pool."""
    request: Request = replace(work.request, pool=run.name)
    found = work_of(request, run.policy, before=work)
    return replace(found, begun=run.governor.mark() if work.roams else begun)


def _roaming(job: Job) -> Work:
    """Return a job that leaves its pool as work for another."""
    assert job.work is not None
    # The records say of an attempt that was set aside that it has never been.
    is_new = job.lane == law.MAIN and job.attempt == 1 and job.standing == law.FIRST
    return replace(
        job.work,
        lane=job.lane,
        attempt=job.attempt,
        first_launched_s=-1.0 if is_new else job.first_launched_s,
        retry_at_s=-1.0,
        outages=job.outages,
        roams=job.lane == law.MAIN,
    )


def _stays(run: PoolRun, job: Job) -> bool:
    """Return whether a request is a background response at this pool's provider."""
    kept = run.send.backgrounds if isinstance(run.send, PoolSender) else None
    return kept is not None and job.index in kept.ids
