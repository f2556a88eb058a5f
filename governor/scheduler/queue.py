"""The waiting requests: the queue in the law's order, the calendar of backoffs and deadlines, and the clock of causes.

Theory of operation. New work is pulled from its source one request ahead, so that memory stays flat. Retries, finalize
passes and single submissions wait in a heap, in the order of `law.rank`. Backoffs and deadlines are kept in the
calendar. Entries of ended jobs stay in both until they come to the top or a sweep removes them.

Waiting. The quota states the cause for which the head waits, and that cause holds until the next event. One clock per
cause advances with it, so that an attempt's wait by cause is the difference of two readings. The totals need no
readings: each advance counts once per waiting request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from math import fsum, inf
from operator import sub
from typing import Any, Generic

from governor import law
from governor.law import FINALIZE, FIRST, HOLDING, NOTHING
from governor.model.keyed import JITTER_RETRY, JITTER_STAGGER, attempt_key, keyed_uniform
from governor.model.requests import CAUSES
from governor.scheduler.interfaces import Elsewhere, J, Quota, Shell, Stated

# Heaps of this length or more are swept now and then.
SWEEP = 100
# The first part of the law's rank for new work; smaller values are urgent, such as retries and finalize passes.
NEW_WORK = 2.0

Rank = tuple[float, ...]


class Queue(Generic[J]):
    """The jobs that wait for their launch or for the end of a backoff. See `Scheduler` for the fields.

    `elsewhere`: other quotas that may serve the same requests, None = there are none.
    """

    def __init__(self, shell: Shell[J], quota: Quota, seed: int, start_s: float, backlog: int) -> None:
        self.shell = shell
        self.quota = quota
        self.seed = seed
        self.elsewhere: Elsewhere | None = None
        self.stopped = ""
        self.clock = [0.0] * len(CAUSES)
        self.clock_at = start_s
        self.waits_s = [0.0] * len(CAUSES)
        self.cause = NOTHING
        self.head_at = inf
        self.backlog = self.waiting = self.unfinished = backlog
        self._start_s = start_s
        self._head: J | None = None  # new work
        self._aside: list[tuple[J, float, str]] = []  # jobs set aside, since when, and their failure code if lost
        self._queue: list[tuple[Rank, int, J]] = []
        # Time, sequence, whether it is a deadline (else the end of a backoff), job, its launches so far.
        self.calendar: list[tuple[float, int, bool, J, int]] = []
        self._queue_sweep = self._calendar_sweep = SWEEP
        self._sequence = 0

    # ------------------------------------------------------------ queries

    @property
    def due_at(self) -> float:
        """Return when the next backoff ends or the next deadline is reached; inf = none."""
        calendar = self.calendar
        while calendar and _is_stale(calendar[0]):
            heappop(calendar)
        return calendar[0][0] if calendar else inf

    def due_job(self) -> J | None:
        """Return the job whose backoff ends next; None if a deadline comes first or the calendar is empty."""
        return self.calendar[0][3] if self.due_at < inf and not self.calendar[0][2] else None

    def postpone(self, until: float) -> None:
        """Move the next due entry to `until`. For the replay of a live loop, whose timers ring late."""
        _, _, is_deadline, job, tries = heappop(self.calendar)
        self._sequence += 1
        heappush(self.calendar, (until, self._sequence, is_deadline, job, tries))

    @property
    def wake_at(self) -> float:
        """Return when `Scheduler.woken` is to be called, unless another event comes first; inf = never."""
        return inf if self.stopped else min(self.head_at, self.due_at)

    def first(self) -> J | None:
        """Return the job at the head, None if no job waits."""
        queue = self._queue
        while queue:
            if not queue[0][2].ended:
                return queue[0][2]
            heappop(queue)
        return self._head

    @property
    def new_work(self) -> J | None:
        """Return the request of the batch that would be queued next, None after the last."""
        return self._head

    def jobs(self) -> list[J]:
        """Return all jobs that wait for their launch or for the end of a backoff, except the head of new work."""
        queued = [job for _, _, job in self._queue if not job.ended]
        backing_off = [job for _, _, is_deadline, job, _ in self.calendar if not (is_deadline or job.ended)]
        return [*queued, *backing_off, *self.quota.taken_over()]

    def ahead_of(self, rank: Rank) -> list[tuple[list[float], int]]:
        """Return (need, standing) of the queued jobs ahead of that rank, in order, without new work."""
        queued = sorted(entry for entry in self._queue if entry[0] < rank and not entry[2].ended)
        return [(job.need, job.standing) for _, _, job in queued]

    def backing_off(self) -> tuple[float, float]:
        """Return when the first and the last backing-off job may be tried again; (inf, -inf) if there is none."""
        ends = [moment[0] for moment in self.calendar if not (moment[2] or moment[3].ended)]
        return min(ends, default=inf), max(ends, default=-inf)

    def next_launch_at(self, *, is_flying: bool) -> float:
        """Return the earliest time of the next launch; -inf = at any moment, or as soon as something else happens.

        `is_flying`: a request is in flight, whose answer may change that time unless a hold is the cause.
        """
        if self.stopped or self.quota.s.paused or (is_flying and self.cause != law.HOLD):
            return -inf
        if self.cause == law.HOLD:
            return self.head_at
        at = min(self.head_at, max(self.backing_off()[0], self.quota.s.hold_until))
        return at if at < inf else -inf

    def waited(self, job: J) -> list[float]:
        """Return how long the job has waited since it became eligible, by cause, seconds."""
        return self.quota.waited(list(map(sub, self.clock, job.since)))

    # ------------------------------------------------------------ changes

    def advance(self, now: float) -> None:
        """Count the time until `now` under the cause that has held since the last event."""
        passed = now - self.clock_at
        if passed > 0.0:
            self.clock[self.cause] += passed
            if not self.stopped:
                self.waits_s[self.cause] += passed * self.waiting
            self.clock_at = now

    def _sync(self, job: J, stated: Stated, refused: int, now: float) -> None:
        """Pass on the counts that headers state, with what has been booked since the launch."""
        quota = self.quota
        if quota.p.sync_headers and job.booked:
            for d, limit, remaining in stated:
                since = quota.booked_since(job, d)
                quota.synced(d, limit, remaining, job.need[d], refused, since, job.launched_s, now)

    def _next(self) -> None:
        """Pull the next new work from its source."""
        self._head = self.shell.next_work()
        if self._head is not None:
            if self.backlog:
                self.backlog -= 1
            else:
                self.waiting += 1
                self.unfinished += 1

    def _may_go(self, job: J, now: float) -> None:
        """Make the job eligible and queue it: from now on its waiting is counted."""
        job.eligible_s = now
        job.asked = 0
        job.since = self.clock.copy()
        job.queued = True
        self.waiting += 1
        place = float(self._sequence)
        rank = law.rank(self.quota.p, job.lane, job.attempt, job.expected, job.reserve, place, job.standing)
        self._push(rank, job)

    def _push(self, rank: Rank, job: J) -> None:
        self._sequence += 1
        if len(self._queue) > self._queue_sweep:
            self._queue_sweep = swept(self._queue, lambda entry: entry[2].ended)
        heappush(self._queue, (rank, self._sequence, job))

    def _taken(self, job: J) -> None:
        """Remove the head from its queue."""
        if job is self._head:
            self._next()
        else:
            heappop(self._queue)

    def _leave(self, job: J) -> None:
        """Remove the head, which waits no more."""
        job.queued = False
        self.waiting -= 1
        self._taken(job)

    def _dequeued(self, job: J) -> None:
        """Mark the job as no longer waiting, if it waited; its heap entry stays until it comes to the top."""
        if job.queued:
            job.queued = False
            self.waiting -= 1

    def _watch_deadline(self, job: J) -> None:
        """Enter the deadline of a job that has been launched before: it is given up if it still waits then."""
        if job.first_launched_s >= 0.0:
            gives_up_at = law.deadline_at(self.quota.p, job.first_launched_s)
            if gives_up_at < inf:
                self._at(gives_up_at, True, job)

    def _at(self, when: float, is_deadline: bool, job: J) -> None:
        """Enter a job's deadline, or the end of its backoff, into the calendar."""
        self._sequence += 1
        if not is_deadline:
            job.eligible_s = when
        if len(self.calendar) > self._calendar_sweep:
            self._calendar_sweep = swept(self.calendar, _is_stale)
        heappush(self.calendar, (when, self._sequence, is_deadline, job, job.tries))

    # ------------------------------------------------------------ one job

    def jitter_u(self, job: J) -> float:
        """Return the uniform number that moves the launch slot after the job's next launch."""
        if job.jitter_u >= 0.0:
            return job.jitter_u
        if self.quota.p.stagger_s > 0.0 and job.standing == FIRST:
            return keyed_uniform(self.seed, job.index, attempt_key(job.lane, job.tries + 1), JITTER_STAGGER)
        return 0.5

    def _retry_u(self, job: J) -> float:
        return keyed_uniform(self.seed, job.index, attempt_key(job.lane, job.tries), JITTER_RETRY)

    def _is_late(self, job: J, now: float) -> bool:
        """Return whether the deadline of a job that was launched before has come."""
        return job.first_launched_s >= 0.0 and law.deadline_at(self.quota.p, job.first_launched_s) <= now

    def _spare(self, job: J) -> None:
        """Do not count the job's last, failed attempt if it was made during an outage, as far as is known by now."""
        outages = self.quota.spared(job)
        if outages >= 0:
            job.outages = outages
            job.attempt -= 1
        job.failed_s = -1.0

    # ------------------------------------------------------------ leaving this quota

    def drop(self, job: J) -> None:
        """Remove a job that is neither answered nor lost: it gives back its permit, and its request stays pending."""
        self.quota.forget(job)
        self._dequeued(job)
        job.ended = True
        job.flying = False
        if job.holds:
            job.holds = False
            self.quota.released()
        if job.lane == FINALIZE:
            self.quota.finalize_closed()

    def renewed(self, now: float) -> None:
        """Ask the source again for the next new work: another quota has launched it, or there is some by now."""
        self.advance(now)
        if self._head is not None:
            self.waiting -= 1
            self.unfinished -= 1
        self._next()

    def _handed_on(self, job: J, now: float, by: float) -> bool:
        """Let another quota have a waiting job that it would launch by that time, and return whether it does."""
        if self.elsewhere is None or job.alone or not self.elsewhere.may_take(job, now, by):
            return False
        if job.failed_s >= 0.0:
            self._spare(job)
        self._leaves(job)
        return True

    def _given_away(self, now: float) -> None:
        """Let other quotas have all that waits here, where nothing is answered any more."""
        assert self.elsewhere is not None
        for job in [*self.jobs(), *(each[0] for each in self._aside)]:
            if not job.alone and self.elsewhere.may_save(job, now):
                if job.failed_s >= 0.0:
                    self._spare(job)
                self._leaves(job)
        self._aside = [each for each in self._aside if not each[0].ended]

    def _leaves(self, job: J) -> None:
        """Hand on a job that is not in flight."""
        assert self.elsewhere is not None
        if not job.ended:
            self.drop(job)
        self.unfinished -= 1
        self.elsewhere.take(job)

    # ------------------------------------------------------------ invariants

    def validate(self, in_flight: Iterable[J]) -> None:
        """Raise AssertionError if a job is in two places, counted wrongly or holds a permit by mistake. For tests.

        `in_flight`: the jobs that the shell was told to launch and has not reported on.
        """
        flying, waiting, aside = list(in_flight), self.jobs(), [each[0] for each in self._aside]
        queued = [job for job in waiting if job.queued]
        places = [*flying, *waiting, *aside, *([] if self._head is None else [self._head])]
        assert len(set(places)) == len(places), "a job is in two places"
        assert all(job.flying and job.holds and not job.queued for job in flying)
        assert not any(job.flying or job.ended for job in waiting)
        assert all(job.holds == (job.standing == HOLDING) for job in waiting), "a permit is kept or lost by mistake"
        assert not any(job.flying or job.holds or job.queued for job in aside)
        assert self.quota.in_flight == sum(job.holds for job in places), "permits taken are not those held"
        assert self.waiting == self.backlog + len(queued) + (self._head is not None)
        if not self.stopped:
            known = sum(not job.alone for job in places) + self.backlog
            assert self.unfinished == known, f"{self.unfinished} unfinished, {known} known"
        assert self.stopped == "" or self.wake_at == inf
        assert all(each >= 0.0 for each in (*self.clock, *self.waits_s))
        assert abs(fsum(self.clock) - (self.clock_at - self._start_s)) <= 1e-6 * max(1.0, self.clock_at)


def _is_stale(moment: tuple[float, int, bool, Any, int]) -> bool:
    """Return whether a calendar entry no longer applies to its job."""
    _, _, is_deadline, job, tries = moment
    return job.ended or job.tries != tries or (is_deadline and job.launched_s >= job.eligible_s)


def swept(heap: list[Any], is_over: Callable[[Any], bool]) -> int:
    """Remove the ended entries from a heap in place; return the length at which to sweep again."""
    heap[:] = [entry for entry in heap if not is_over(entry)]
    heapify(heap)
    return SWEEP + 2 * len(heap)
