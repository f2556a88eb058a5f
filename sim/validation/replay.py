"""One run again, under its own settings or others: what each of its attempts met is kept, and who is refused follows.

Theory of operation. A counterfactual in three steps. What happened is first explained by the run's own settings: for
each launch, how late the loop was; for each attempt that was let in, what it met and how long that took; between the
counts in the headers, what others used. All this is then kept, the settings are replaced, and the run is simulated
again. As long as both runs launch the same at the same moments the journal's own answers hold, refusals included, so
that a replay under the run's own settings is the run. From the first launch that differs the provider's model decides
what is refused; what an attempt meets once it is let in stays that of the journal, by its place among those of its
request.

Replications differ in what the journal cannot tell: the answers of requests that never got one, attempts beyond those
that were made, how late timers and how long refusals and the ways to the provider would have been, what others use
after the run's end (its own pattern, from a random moment on).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from governor.law import TPM
from governor.model.policy import Policy
from governor.model.requests import CAUSES
from sim.calibration.others import OthersUse, began_s, gaps, takings, ways_of
from sim.des.calendar import CHANGE, Appointment
from sim.des.jobs import Job
from sim.des.run import TIMEOUT, Tally
from sim.model import provider as prov
from sim.model import windows as win
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import similar_outputs
from sim.model.workload import Arrivals, charges, columns
from sim.validation.logged import refused_alone
from sim.validation.recorded import Record, RecordedAttempt
from sim.validation.twin import Lesson, Twin, taught

Rewrite = Callable[[Policy], Policy]
Delays = dict[tuple[int, int, int], float]
# Two moments of one launch that differ by less are the same, seconds; and by at most twice the latest timer.
SLACK_LEAST_S = 0.02
# How late a launch may be where no timer of the run was timed, and a retry whose moment is recorded, seconds.
LATE_UNKNOWN_S, LATE_MOST_S = 0.25, 10.0
# A provider is played beside the best one if it leaves no more than this of the counts unexplained beyond that one's.
UNEXPLAINED_MORE = 0.02


class Replay(Twin):
    """One run again. `record`: what it met; `delays`: how late each launch was, None = to be learnt on the way.

    `coupled`: the journal's own answers hold as long as the run launches as it did; without, the provider's model
    decides on every refusal. `timeout_s`: that the run had. `zero_s`: where this run's clock begins on that of the
    record. `parted_s`: when it first launched otherwise, None = never.
    """

    def __init__(
        self,
        *arguments: Any,
        record: Record,
        timeout_s: float,
        zero_s: float,
        coupled: bool,
        delays: Delays | None,
        takings: Sequence[OthersUse] = (),
        **rest: Any,
    ) -> None:
        super().__init__(*arguments, takings=takings, **rest)
        self.record, self.timeout_s, self.zero_s = record, timeout_s, zero_s
        self.learns, self.delays = delays is None, {} if delays is None else delays
        self.slack_s = max(SLACK_LEAST_S, 2.0 * float(self._late_s.max(initial=0.0)))
        self.late_most_s = self.slack_s if len(self._late_s) else LATE_UNKNOWN_S
        self.parted_s: float | None = None if coupled else 0.0
        self.ends_s = np.full(len(self.columns), np.nan)
        self.is_lost = np.ones(len(self.columns), np.bool_)
        self._let_in: dict[tuple[int, int], int] = {}
        self._as_it_was: dict[int, RecordedAttempt] = {}
        self._expiry_late_s: dict[int, float] = {}
        self._noticed_at: dict[Job, float] = {}  # of backoffs that have ended
        self._answers_at = {tried.ended_s for tried in record.tried.values()}
        self._ways = ways_by_place(record)
        self._refusals_s = [tried.took_s for tried in record.tried.values() if tried.is_refused]
        self._burst = (-1.0, 0)
        self._way_now: tuple[float, float] | None = None
        self._pattern = list(takings)
        if self._pattern:
            self._lap_s = max(float(record.ended_s.max()) - zero_s, self._pattern[-1].at_s) + 1e-6
            Appointment(self.env, self._began_s + self._lap_s, CHANGE, self._on_lap)

    # ------------------------------------------------------------ how late the loop is

    def _lateness(self) -> float:
        if not len(self._late_s):
            return 0.0
        # Live there is one timer: what backs off until this moment goes first, however late it rings.
        if self._noticed_at:
            return max(self._noticed_at.values()) - self.env._now
        job = self.scheduler.first()
        assert job is not None, "a timer without a head"
        return self._late_by(job)

    def _postponed(self) -> bool:
        job = self.scheduler.due_job()
        if job is None or self._noticed_at.pop(job, None) is not None:
            return False
        self._noticed_at[job] = self.env._now + self._late_by(job, is_retry=True)
        self.scheduler.postpone(self._noticed_at[job])
        return True

    def _late_by(self, job: Job, *, is_retry: bool = False) -> float:
        """Return how late the loop is with the job's next launch: as in the run, else as any of the run's launches."""
        key = job.index, job.lane, job.tries + 1
        if self.learns:
            past = self.record.tried.get(key)
            if past is None:
                return 0.0
            # When a retry's moment was noticed is recorded; of what was never launched before, only the launch.
            is_noticed = is_retry and past.eligible_s >= 0.0
            late_s = (past.eligible_s if is_noticed else past.launched_s) - self.zero_s - self.env._now
            if not 0.0 <= late_s <= (LATE_MOST_S if is_noticed else self.late_most_s):
                return 0.0
            if not is_noticed and past.launched_s in self._answers_at:
                return 0.0  # no timer let it out
            self.delays[key] = late_s
        if key in self.delays:
            return self.delays[key]
        return float(self._rng.choice(self._late_s)) if len(self._late_s) else 0.0

    # ------------------------------------------------------------ what an attempt meets

    def _way(self, job: Job) -> tuple[float, float]:
        past = self.record.tried.get((job.index, job.lane, job.tries))
        at_s, place = self._burst
        self._burst = (self.env._now, place + 1 if at_s == self.env._now else 0)
        is_then = past is not None and abs(past.launched_s - self.env._now - self.zero_s) <= self.slack_s
        self._way_now = None
        if is_then or not self._ways:
            return super()._way(job) if past is None or past.way_s is None else past.way_s
        # Launched at another moment, in another burst: as any that was launched in that place of one.
        ways = self._ways[min(self._burst[1], len(self._ways) - 1)]
        is_usual = self.seed == self.provider_seed
        self._way_now = ways[len(ways) // 2] if is_usual else ways[int(self._rng.integers(len(ways)))]
        return self._way_now

    def _served(self, job: Job, key: int, at: float) -> tuple[int, float, int, float]:
        """Return the recorded outcome, as far as the journal holds it.

        Once the runs have parted, the model decides refusals.
        """
        pp, ps = self.pp, self.ps
        past = self._past(job)
        answer = super()._served(job, key, at)
        is_refused = answer[0] in (prov.THROTTLED, prov.SLOW_DOWN)
        self._as_it_was.pop(job.index, None)
        if past is not None:
            self._as_it_was[job.index] = past
            if past.is_refused != is_refused:
                # The model holds what the journal says that it does.
                sign = 1.0 if is_refused else -1.0
                win.taken(pp, ps, sign * job.charge, sign, False, 0.0, 0.0, win.ADMISSION)
            if past.is_refused:
                return past.outcome, past.took_s, -1, past.retry_after_s
        elif is_refused:
            return answer[0], self._refusal_s(job, answer[1]), answer[2], answer[3]
        lane = job.index, job.lane
        nth = self._let_in[lane] = self._let_in.get(lane, -1) + 1
        met = self.record.let_in.get(lane, ())
        self._expiry_late_s.pop(job.index, None)
        if nth >= len(met):
            return answer
        outcome, took_s, then, now = met[nth].outcome, met[nth].took_s, met[nth].way_s, self._way_now
        if outcome == TIMEOUT:
            waited_s = met[nth].ended_s - met[nth].launched_s
            self._expiry_late_s[job.index] = max(0.0, waited_s - self.timeout_s)
            if waited_s < 0.99 * self.timeout_s:
                outcome, took_s = prov.DROPPED, waited_s  # no connection: a client does not wait that long for one
        if met[nth].used >= 0.0:
            job.output = max(0.0, met[nth].used - job.prompt)
        if then is not None and now is not None:
            # What it took in another burst than that of the run: the provider's time is its own, the way is not.
            took_s = max(now[1], took_s + now[1] - then[1])
        return outcome, took_s, -1, met[nth].retry_after_s

    def _refusal_s(self, job: Job, usual_s: float) -> float:
        """Return how long a refusal by the model takes: as in the run if the attempt was refused there, else as any."""
        past = self.record.tried.get((job.index, job.lane, job.tries))
        if past is not None and past.is_refused:
            return past.took_s
        if self.seed == self.provider_seed or not self._refusals_s:
            return usual_s
        return self._refusals_s[int(self._rng.integers(len(self._refusals_s)))]

    def _expires_at(self, job: Job, now: float) -> float:
        """Return when the attempt expires, as late as the loop gave it up in the run."""
        return super()._expires_at(job, now) + self._expiry_late_s.get(job.index, 0.0)

    def _past(self, job: Job) -> RecordedAttempt | None:
        """Return this attempt's counterpart in the journal; None once the runs have parted, which is detected here."""
        if self.parted_s is not None:
            return None
        at_s = self.env._now + self.zero_s
        past = self.record.tried.get((job.index, job.lane, job.tries))
        is_then = past is not None and abs(past.launched_s - at_s) <= self.slack_s
        if is_then and self.record.is_nth(self.tally.attempts, at_s, self.slack_s):
            return past
        self.parted_s = at_s
        return None

    def _state(self, job: Job) -> None:
        super()._state(job)
        past = self._as_it_was.get(job.index)
        if past is not None:
            job.stated = past.stated

    def _came_back_empty(self, job: Job) -> bool:
        """Return whether the answer had no text, as in the run if the run received the answer."""
        if (job.index, 0) in self.record.let_in:
            return (job.index, 1) in self.record.let_in
        return super()._came_back_empty(job)

    def _on_lap(self, event: Any) -> None:
        """Continue others' use in its own pattern, from a random moment on, once the run outlasts the record."""
        if self.is_over:
            return
        start_s = self.env._now - self._began_s
        shift_s = float(self._rng.uniform(0.0, self._lap_s))
        for taking in self._pattern:
            at_s = start_s + (taking.at_s - shift_s) % self._lap_s
            Appointment(self.env, self._began_s + at_s, CHANGE, self._on_taking, taking._replace(at_s=at_s))
        Appointment(self.env, self.env._now + self._lap_s, CHANGE, self._on_lap)

    def over(self, job: Job, at: float, code: str) -> None:
        """Record when each request ended, and whether it was lost."""
        self.ends_s[job.index] = at + self.zero_s
        self.is_lost[job.index] = bool(code)
        super().over(job, at, code)

    def run(self, start_s: float = 0.0) -> Tally:
        """Run to the end; requests left pending by a stop are lost then."""
        tally = super().run(start_s)
        self.ends_s[np.isnan(self.ends_s)] = tally.last_s + self.zero_s
        return tally


def ways_by_place(record: Record) -> list[list[tuple[float, float]]]:
    """Return known delays by place among attempts launched at one instant, shorter ones first; no place is empty."""
    bursts: dict[float, list[tuple[float, float]]] = {}
    for tried in record.tried.values():
        if tried.way_s is not None:
            bursts.setdefault(tried.launched_s, []).append(tried.way_s)
    found: list[list[tuple[float, float]]] = []
    for burst in bursts.values():
        for place, way_s in enumerate(sorted(burst)):
            if place == len(found):
                found.append([])
            found[place].append(way_s)
    return [sorted(ways) for ways in found]


class ReplayedRun(NamedTuple):
    """One replication. `waits_s`: by cause. `ends_s`, `is_lost`: of each request, shape (requests,)."""

    makespan_s: float
    throttled: float
    launches: float
    waits_s: NDArray[np.float64]
    ends_s: NDArray[np.float64]
    is_lost: NDArray[np.bool_]
    parted_s: float | None


class Stage:
    """A lesson and the provider to play it on. `reruns` plays it, under the run's own settings or others.

    `is_log`: it is another client's, whose settings are not known. `own`: under its own settings, None for a log.
    """

    def __init__(
        self, lesson: Lesson, provider: ProviderConfig, *, arrivals: Arrivals = "batch", is_log: bool = False
    ) -> None:
        self.lesson, self.arrivals, self.is_log = lesson, arrivals, is_log
        provider = taught(provider, lesson)
        self.takings = takings(lesson.counts, self._columns(lesson.policy, provider).charge, provider)
        if any(count.stated for count in lesson.counts):
            # What others did stands in the headers: it need not be drawn.
            provider = provider.with_(cotenant={"share": 0.0, "burst_s": 0.0, "period_s": 0.0})
        self.provider = provider
        self.delays: Delays = {}
        self.own = None if is_log else self._run(None, 0, coupled=True, delays=None)

    def reruns(self, runs: int, rewrite: Rewrite | None = None, *, coupled: bool = True) -> list[ReplayedRun]:
        """Return replications under rewritten settings, None = the run's own."""
        coupled = coupled and not self.is_log
        return [self._run(rewrite, r, coupled=coupled, delays=self.delays) for r in range(runs)]

    def predictions(self, runs: int) -> list[ReplayedRun]:
        """Return replications that predict the run from its known answers, times and faults.

        Each launch is as late as any of the run's, and the provider's model decides refusals.
        """
        return [self._run(None, r, coupled=False, delays={}) for r in range(runs)]

    def as_it_was(self) -> ReplayedRun:
        """Return the recorded run."""
        lesson, record = self.lesson, self.lesson.record
        counts, ends_s = (float(lesson.throttled), float(lesson.launches)), lesson.worked_s(record.ended_s)
        return ReplayedRun(lesson.makespan_s, *counts, record.waits_s, ends_s, record.is_lost, None)

    def alone(self) -> ReplayedRun:
        """Return the run with the provider's model deciding every refusal; for a log, only how many it refuses."""
        if not self.is_log:
            return self.reruns(1, coupled=False)[0]
        charges = self._columns(self.lesson.policy, self.provider).charge
        refused = refused_alone(self.lesson.record, charges, self.provider, self.takings)
        return self.as_it_was()._replace(throttled=float(refused))

    def _columns(self, policy: Policy, provider: ProviderConfig, number: int = 0) -> Any:
        lesson = self.lesson
        workload = lesson.workload
        if number and 0 < (lesson.answers >= 0).sum() < len(workload):
            drawn = similar_outputs(workload, lesson.answers, lesson.seed + number)
            workload = workload.with_(output_tokens=drawn)
        return columns(
            workload,
            reserve_rule=policy.charge_rule,
            est_tokens_per_run=policy.est_tokens_per_run,
            charge_rule=provider.charge_rule,
            as_of=provider.as_of,
            finalize_max_tokens=policy.finalize_max_tokens,
            arrivals=self.arrivals,
        )

    def _run(self, rewrite: Rewrite | None, number: int, *, coupled: bool, delays: Delays | None) -> ReplayedRun:
        lesson, provider = self.lesson, self.provider
        write = rewrite or (lambda policy: policy)
        policy = write(lesson.policy)
        # A run from its first launch on, but on the clock of the run itself.
        start_s, zero_s = 0.0, 0.0
        if self.arrivals == "batch":
            start_s = max(0.0, lesson.record.launched_s[0] - lesson.began_s)
            zero_s = lesson.record.launched_s[0] - start_s
        there_s, round_s = ways_of(lesson.counts, len(lesson.workload))
        replay = Replay(
            self._columns(policy, provider, number),
            policy.params(),
            provider.params(),
            seed=lesson.seed,
            provider_seed=lesson.seed + number,
            day_tokens_used=float(provider.day_tokens_used),
            day_requests_used=float(provider.day_requests_used),
            finalize_max_tokens=policy.finalize_max_tokens if lesson.finalize else 0,
            from_trace=self.arrivals == "trace",
            late_s=lesson.late_s,
            rng=np.random.default_rng((lesson.seed, number)),
            changes=[
                (max(0.0, at_s - zero_s), write(change) if isinstance(change, Policy) else change)
                for at_s, change in lesson.changes
            ],
            there_s=there_s,
            round_s=round_s,
            began_s=began_s(lesson.counts) - zero_s,
            takings=self.takings,
            lost=[(at_s - zero_s, row) for at_s, row in lesson.lost],
            reserves=[
                (at_s - zero_s, self._columns(write(change), provider, number).reserve)
                for at_s, change in lesson.changes
                if isinstance(change, Policy) and any(end_s <= at_s <= begin_s for end_s, begin_s in lesson.gaps)
            ],
            record=lesson.record,
            timeout_s=lesson.policy.request_timeout_seconds or inf,
            zero_s=zero_s,
            coupled=coupled,
            delays=delays,
        )
        tally = replay.run(start_s)
        if delays is None:
            self.delays = replay.delays
        return ReplayedRun(
            float(lesson.worked_s(np.array(tally.last_s + zero_s))),
            float(tally.throttled),
            float(tally.attempts),
            np.array(tally.waits_s[: len(CAUSES)]),
            lesson.worked_s(replay.ends_s),
            replay.is_lost,
            None if replay.parted_s is None else float(lesson.worked_s(np.array(replay.parted_s))),
        )


# ---------------------------------------------------------------- the provider


def closest(
    lesson: Lesson,
    candidates: Sequence[tuple[str, ProviderConfig]],
    *,
    arrivals: Arrivals = "batch",
    is_log: bool = False,
) -> tuple[str, Stage]:
    """Return the provider that explains the run best, the first among equals, with minutes counted in any form.

    Those are played that explain most counts of the headers: then what counts is also the share of launches by which
    429s differ, where the model alone decides on them, and that by which the makespan does.
    """
    forms = [(name, form) for name, given in candidates for form in _forms(given)]
    unexplained = [_unexplained(lesson, form) for _, form in forms]
    least = min(unexplained)
    played = [
        (loss, name, Stage(lesson, form, arrivals=arrivals, is_log=is_log))
        for loss, (name, form) in sorted(zip(unexplained, forms, strict=True), key=lambda each: each[0])
        if loss <= least + UNEXPLAINED_MORE
    ]

    def misses(each: tuple[float, str, Stage]) -> float:
        alone = each[2].alone()
        counts = abs(alone.throttled - lesson.throttled) / max(1, lesson.launches)
        return round(each[0] + counts + abs(alone.makespan_s - lesson.makespan_s) / max(1e-9, lesson.makespan_s), 3)

    _, name, stage = min(played, key=misses)
    return name, stage


def _forms(given: ProviderConfig) -> list[ProviderConfig]:
    """Return the given provider and its variants that count minutes differently."""
    if given.burst_s < win.MINUTE_S or given.charged == "answer" or "window" in given.learnt:
        return [given]
    windows: tuple[str, ...] = ("bucket", "clock", "anchored", "sliding")
    return [given, *(given.with_(window=window, phase_s=0.0) for window in windows if window != given.window)]


def _unexplained(lesson: Lesson, provider: ProviderConfig) -> float:
    """Return the share of the headers' counts that are off, weighted by how much: 1 = by the median charge or more."""
    charged = charges(lesson.workload, provider.charge_rule, lesson.policy.est_tokens_per_run, provider.as_of)
    found = [gap for gap in gaps(lesson.counts, charged, provider) if gap.d == TPM and gap.said.let_in]
    if not found:
        return 0.0
    reach = max(1.0, float(np.median([gap.own for gap in found])))
    return float(np.mean([min(1.0, abs(gap.more) / reach) for gap in found]))
