"""A batch over several quotas that serve one model: a scheduler and a synthetic provider each, and one router.

The router is the live one (`governor/scheduler/router.py`). Each quota is a `Case` of the same workload with settings
and provider of its own; the first one's settings give the order of launches. SimPy and the interpreted law only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from governor.law import FINALIZE, FIRST, RETRY
from governor.model.errors import FailureCode
from governor.model.needs import Weights
from governor.scheduler.router import Router, Seat
from sim.des.calendar import WAKE, Appointment
from sim.des.driver import Simulation
from sim.des.jobs import Job, jobs_of
from sim.des.run import AttemptSink, Tally

if TYPE_CHECKING:
    from sim.experiment.experiment import Case


@dataclass(frozen=True, slots=True)
class SeveralTallies:
    """One run over several quotas. `tallies`: of each quota; `lost`: requests that none could serve any more."""

    tallies: tuple[Tally, ...]
    lost: int

    @property
    def completed(self) -> int:
        """Return how many requests were answered."""
        return sum(tally.completed for tally in self.tallies)

    @property
    def makespan_s(self) -> float:
        """Return when the last request ended, seconds from the start."""
        return max(tally.last_s for tally in self.tallies)


class _Member(Simulation):
    """One quota of several. `seat`: set once it has joined the router."""

    seat: Seat[Job]

    def __init__(self, case: Case, seed: int, on_attempt: AttemptSink | None) -> None:
        super().__init__(
            case.columns,
            case.params,
            case.provider,
            seed=seed,
            day_tokens_used=case.grant.day_tokens_used,
            day_requests_used=case.grant.day_requests_used,
            finalize_max_tokens=case.finalize_max_tokens,
            on_attempt=on_attempt,
        )
        scheduler, provider = self.scheduler, case.provider
        scheduler.backlog = scheduler.waiting = scheduler.unfinished = 0
        # Each launch adds its own waits: the requests that wait are not this quota's alone.
        self.tally = Tally()
        self._weights = Weights(tuple(provider.per_request), tuple(provider.per_input), tuple(provider.per_output))
        self._is_renewed = False

    def bound(self, item: Job) -> Job:
        """Return a request as a job of this quota."""
        c, i = self.columns, item.index
        sizes = float(c.reserve[i]), item.expected, float(c.charge[i]), item.prompt, item.output
        if item.lane == FINALIZE:
            sizes = float(c.finalize_reserve[i]), item.expected, float(c.finalize_charge[i]), item.prompt, item.output
        job = Job(i, *sizes, item.recorded_s, item.submitted_s, weights=self._weights)
        job.since = item.since
        if item.ended:  # it comes from another quota
            job.since = self.scheduler.clock.copy()
            is_new = item.lane != FINALIZE and item.attempt == 1 and item.standing == FIRST
            job.lane, job.attempt, job.outages = item.lane, item.attempt, item.outages
            job.tries = item.attempt - 1
            job.first_launched_s = -1.0 if is_new else item.first_launched_s
            job.standing = RETRY if item.attempt > 1 else FIRST
        return job

    def need_of(self, item: Job) -> list[float]:
        """Return what a request takes of this quota's dimensions."""
        reserve = self.columns.finalize_reserve if item.lane == FINALIZE else self.columns.reserve
        return self._weights.of(float(reserve[item.index]), item.prompt)

    def next_work(self) -> Job | None:
        """Return the request that the router shows next."""
        for item in self.seat:
            job = self.bound(item)
            if job.lane != FINALIZE:
                return job
            self.scheduler.taken_up(job, -1.0)
        return None

    def renew(self) -> None:
        """Look at the router again, and launch in a moment if that is possible."""
        self.scheduler.renewed(self.env._now)
        if not self._is_renewed:
            self._is_renewed = True
            Appointment(self.env, self.env._now, WAKE, self._on_renewed)

    def _on_renewed(self, _: Appointment) -> None:
        self._is_renewed = False
        self.scheduler.changed(self.env._now)
        self._settle()

    def launch(self, job: Job, now: float) -> None:
        """See `Simulation.launch`."""
        for cause, waited_s in enumerate(self.scheduler.waited(job)):
            self.tally.waits_s[cause] += waited_s
        super().launch(job, now)

    def begin(self) -> None:
        """Launch what may go at once."""
        self.scheduler.begun(0.0)
        self.scheduler.changed(0.0)
        self._settle()


def simulated_over(cases: Sequence[Case], seed: int, on_attempt: Sequence[AttemptSink] = ()) -> SeveralTallies:
    """Return one run of a batch over several quotas, in order of preference. `on_attempt`: one for each quota."""
    assert not any(case.from_trace for case in cases), "requests of a trace are not shared"
    sinks: list[AttemptSink | None] = [*on_attempt] or [None for _ in cases]
    # Chance is each quota's own: their providers know nothing of each other.
    members = [_Member(case, seed + 7_919 * i, sinks[i]) for i, case in enumerate(cases)]
    first, env = cases[0], members[0].env
    source = jobs_of(first.columns, first.params, first.provider, seed, seed, from_trace=False)
    router: Router[Job] = Router(
        source, clock=lambda: env._now, index_of=lambda job: job.index, item_of=lambda job, seat: job
    )
    for member in members:
        member.env = env
        member.seat = router.join(member.scheduler, member.need_of, member.renew)
    for member in members:
        member.begin()
    env.keep()
    requests = len(first.columns)
    lost = requests - sum(member.tally.requests for member in members)
    for member in members:
        member.scheduler.closed()
        assert member.s.in_flight == 0, f"{member.s.in_flight} permits leaked"
    stopped = [member for member in members if member.scheduler.stopped]
    assert not lost or stopped, f"{lost} requests never ended"
    for _ in range(lost):
        why = stopped[0].scheduler.stopped or FailureCode.CONNECTION_DROPPED
        stopped[0].tally.ended(why, stopped[0].scheduler.clock_at)
    return SeveralTallies(tuple(member.tally for member in members), lost)
