"""The scheduler alone: events in, instructions out, as a list; and its invariants after each step of random runs."""

from __future__ import annotations

import random
from math import inf
from typing import Any

import pytest

from governor import law
from governor.model.errors import FailureCode
from governor.model.needs import Scheduled, of_tokens
from governor.scheduler.interfaces import Stated
from governor.scheduler.quota import LocalQuota
from governor.scheduler.scheduler import Scheduler
from tests.governor.desks import quiet


class Shell:
    """Writes instructions down, and keeps what is in flight. `count`: requests of the batch, each of 100 tokens."""

    def __init__(self, count: int) -> None:
        self.left = list(range(count))
        self.flying: list[Scheduled] = []
        self.said: list[tuple[Any, ...]] = []

    def next_work(self) -> Scheduled | None:
        if not self.left:
            return None
        job = Scheduled(self.left.pop(0), 100.0, -1.0, 0.0)
        job.since = [0.0] * 8
        return job

    def launch(self, job: Scheduled, now: float) -> None:
        self.flying.append(job)
        self.said.append(("launch", job.index, now))

    def attempted(self, job: Scheduled, now: float) -> None:
        pass

    def backed_off(self, job: Scheduled, now: float, retry_at: float) -> None:
        self.said.append(("backed_off", job.index, retry_at))

    def finalize(self, job: Scheduled, now: float) -> Scheduled:
        self.said.append(("finalize", job.index, now))
        return Scheduled(job.index, 50.0, -1.0, now)

    def suspended(self, job: Scheduled, now: float, code: str) -> None:
        self.said.append(("suspended", job.index, code))

    def doubted(self, job: Scheduled) -> None:
        pass

    def ended(self, job: Scheduled, now: float, code: str) -> None:
        self.said.append(("ended", job.index, code))

    def lost(self, job: Scheduled, at: float, code: str) -> None:
        self.said.append(("lost", job.index, code))

    def given_up(self, job: Scheduled, now: float, code: str) -> None:
        self.said.append(("given_up", job.index, code))

    def deferred(self, cause: int) -> None:
        pass

    def halted(self) -> None:
        self.said.append(("halted",))

    def over(self) -> list[int]:
        """Requests that have ended, in the order in which they did."""
        return [said[1] for said in self.said if said[0] in ("ended", "lost", "given_up")]


def begun(p: law.Params, count: int) -> tuple[Scheduler[Scheduled], Shell]:
    shell = Shell(count)
    scheduler: Scheduler[Scheduled] = Scheduler(shell, LocalQuota(p), seed=1, backlog=count)
    scheduler.begun(0.0)
    scheduler.changed(0.0)
    return scheduler, shell


# ---------------------------------------------------------------- a timetable


def test_events_in_instructions_out() -> None:
    scheduler, shell = begun(quiet(max_concurrency=2, backoff_base_s=2.0), 3)
    first, second = shell.flying
    scheduler.throttled(first, 5.0, (), 1.0)
    assert scheduler.wake_at == 1.0 + 5.0 + law.RETRY_AFTER_SLACK_S
    scheduler.succeeded(second, of_tokens(10.0), (), 2.0, False)
    scheduler.woken(scheduler.wake_at)
    assert shell.said == [
        ("launch", 0, 0.0),
        ("launch", 1, 0.0),
        ("backed_off", 0, 6.002),
        ("launch", 2, 1.0),
        ("ended", 1, ""),
        ("launch", 0, 6.002),
    ]
    assert scheduler.wake_at == inf


def test_what_the_account_refuses_stops_all_and_leaves_the_rest_pending() -> None:
    scheduler, shell = begun(quiet(max_concurrency=2), 4)
    first, second = shell.flying
    scheduler.failed(second, -1.0, (), 1.0, FailureCode.SERVER_ERROR)
    scheduler.account_refused(first, (), 1.5, FailureCode.INSUFFICIENT_QUOTA)
    third = shell.flying[2]
    assert (scheduler.stopped, scheduler.wake_at) == (FailureCode.INSUFFICIENT_QUOTA, inf)
    scheduler.succeeded(third, of_tokens(10.0), (), 9.0, False)
    scheduler.closed()
    assert shell.over() == [2]
    assert scheduler.quota.in_flight == 0


# ---------------------------------------------------------------- random runs, validated after each step


class Story:
    """A run of random events under random settings."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.count = rng.randint(1, 25)
        self.scheduler, self.shell = begun(self.settings(), self.count)
        self.calls: list[Scheduled] = []
        self.now = 0.0
        self.withdrawn = 0

    def settings(self) -> law.Params:
        rng = self.rng
        return quiet(
            max_concurrency=rng.randint(1, 6),
            stagger_s=rng.choice([0.0, 0.5]),
            tpm=rng.choice([0, 1_000]),
            window=rng.randint(0, 2),
            backoff_keeps_permit=rng.randint(0, 1),
            hold_on_throttle=rng.randint(0, 1),
            deadline_s=rng.choice([0.0, 40.0]),
            max_attempts=rng.randint(1, 4),
            settles=rng.randint(0, 1),
            sync_headers=rng.randint(0, 1),
        )

    def passes(self) -> None:
        """Time goes on to the scheduler's next moment, or to some moment before."""
        wake_at = self.scheduler.wake_at
        if wake_at < inf and self.rng.random() < 0.6:
            self.now = max(self.now, wake_at)
            self.scheduler.woken(self.now)
        else:
            self.now += self.rng.choice([0.0, 0.25, self.rng.uniform(0.0, 5.0)])
            if self.now >= wake_at:
                self.scheduler.woken(max(wake_at, self.scheduler.clock_at))
                self.now = max(self.now, self.scheduler.clock_at)

    def is_answered(self) -> None:
        """Something comes back from an attempt."""
        rng, scheduler, now = self.rng, self.scheduler, self.now
        job = self.shell.flying.pop(rng.randrange(len(self.shell.flying)))
        stated: Stated = [(law.TPM, 1_000.0, rng.uniform(0.0, 1_000.0))] if rng.random() < 0.3 else ()
        kind = rng.random()
        if kind < 0.4:
            if job.alone:
                scheduler.returned(job, rng.choice([None, of_tokens(80.0)]), stated, now)
            else:
                scheduler.succeeded(job, of_tokens(80.0), stated, now, job.lane == law.MAIN and rng.random() < 0.2)
        elif kind < 0.6:
            wait_s = rng.choice([-1.0, 3.0, 1e6])
            scheduler.throttled(job, wait_s, stated, now, is_last=job.alone and rng.random() < 0.2)
        elif kind < 0.85:
            local, answer = rng.random() < 0.2, rng.random() < 0.2
            code = FailureCode.SERVER_ERROR
            scheduler.failed(job, -1.0, stated, now, code, is_answer=answer, is_local=local)
        elif job.alone:
            scheduler.drop(job)
            scheduler.changed(now)
        elif kind < 0.97:
            scheduler.rejected(job, stated, now, FailureCode.BAD_REQUEST, in_doubt=rng.random() < 0.5)
        else:
            scheduler.account_refused(job, stated, now, FailureCode.INSUFFICIENT_QUOTA)

    def is_changed(self) -> None:
        """Somebody outside does something."""
        rng, scheduler = self.rng, self.scheduler
        kind = rng.random()
        if kind < 0.3:
            scheduler.reprice(self.settings(), self.now)
        elif kind < 0.5:
            scheduler.pause()
        elif kind < 0.7:
            scheduler.resume()
        elif kind < 0.9:
            call = Scheduled(10_000 + len(self.calls), rng.uniform(1.0, 300.0), -1.0, self.now)
            call.alone = True
            self.calls.append(call)
            scheduler.submitted(call, self.now)
        else:
            index = rng.randrange(self.count)
            self.withdrawn += scheduler.withdrawn(lambda job: job.index == index, self.now)
        scheduler.changed(self.now)

    def tell(self) -> None:
        """The whole run: nothing is lost, nothing ends twice, nothing stays held."""
        scheduler, shell, rng = self.scheduler, self.shell, self.rng
        steps = rng.randint(5, 120)
        for step in range(10_000):
            if step < steps and rng.random() < 0.25:
                self.is_changed()
            elif shell.flying and rng.random() < 0.5:
                self.is_answered()
            else:
                self.passes()
            if step == steps:
                scheduler.resume()
                scheduler.changed(self.now)
            scheduler.validate(shell.flying)
            if not shell.flying and (scheduler.stopped or not (scheduler.unfinished or scheduler.jobs())):
                break
        else:
            raise AssertionError("the run never ends")
        over = [index for index in shell.over() if index < 10_000]
        assert len(over) == len(set(over)), "a request ended twice"
        if not scheduler.stopped:
            assert len(over) + self.withdrawn == self.count
        scheduler.closed()
        for job in scheduler.jobs():
            scheduler.drop(job)
        assert (scheduler.quota.in_flight, scheduler.quota.s.finalize_open) == (0, 0)


def test_invariants_hold_after_each_step_of_random_runs(seed: int) -> None:
    first = random.Random(seed).randrange(2**40)
    ends: set[str] = set()
    for n in range(400):
        story = Story(random.Random(first + n))
        try:
            story.tell()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, run {first + n}: {error}") from error
        ends |= {said[0] for said in story.shell.said} | {said[2] for said in story.shell.said if len(said) == 3}
    print(f"seed {seed}: {sorted(str(each) for each in ends if isinstance(each, str))}")
    assert {"finalize", "suspended", "lost", "given_up", "backed_off", "halted"} <= ends
    assert {FailureCode.DEADLINE_EXCEEDED, FailureCode.RATE_LIMIT_EXHAUSTED, FailureCode.BAD_REQUEST} <= ends


def test_validate_sees_a_permit_that_leaked() -> None:
    scheduler, shell = begun(quiet(max_concurrency=2), 3)
    scheduler.validate(shell.flying)
    with pytest.raises(AssertionError, match="permits taken"):
        scheduler.validate(shell.flying[1:])
