"""The twin of one live run: the same batch in simulation, with what only the run itself could teach.

Theory of operation. Sizes, settings and seed were known before the first launch, and are read as such. Of what came
after, only this is taken: the length of each answer, the time of each answered request and how much of it was its way
to the provider, the times of refusals, how many answers failed or were cut without text, what others used of the
quota (`others`), how late the loop's timers rang, and when the settings were changed. Not taken: when anything was
launched, what was throttled, how long anything waited. A request without an answer takes a length from those with
similar prompts, and its time from a line fitted to the answered ones.

How late timers rang is read from the journal, for each launch that one had been set for.

Time is counted from the first launch. Between two legs the simulation pauses, since quotas refill meanwhile; what is
published leaves that time out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from governor import law
from governor.journal.journal import Journal
from governor.model.errors import BadInput
from governor.model.estimate import EMBEDDINGS, Sizes
from governor.model.needs import of_tokens
from governor.model.policy import Policy
from governor.model.requests import BATCH, Attempt, Outcome
from sim.calibration.others import Count, OthersUse, counts_of, gone_by_others
from sim.des.calendar import ANSWER, CHANGE, Appointment
from sim.des.driver import Simulation
from sim.des.jobs import Job
from sim.des.run import Tally
from sim.model import provider as prov
from sim.model import windows as win
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import similar_outputs
from sim.model.workload import MEASURED, Workload, constant
from sim.validation.assumptions import believed_provider
from sim.validation.recorded import REFUSED, Record, record_of

Change = tuple[float, Policy | str]
# A leg that launches this soon after its beginning has waited for nothing but itself, seconds.
START_MOST_S = 10.0
SERVER_FAULTS = (Outcome.SERVER_ERROR, Outcome.OVERLOADED)
# One that cannot be read is paid for, and ends its request as any other answer does.
ANSWERS = (Outcome.OK, Outcome.MALFORMED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One pool of one run. `workload`: its ended requests, with the answers and times that were measured.

    `late_s`: how late timers rang, seconds each. `counts`: its attempts, with what their headers stated. `latency`,
    `faults`: fields of the provider's configuration. `changes`: (when, new settings | "paused" | "resumed").
    `record`: each attempt and each end as it was. `answers`: lengths that were measured, -1 = none came.
    `makespan_s`, `throttled`, `launches`: what was measured. `gaps`: (when a leg ended, when the next began). Times are
    in seconds since the first launch, with the gaps; `makespan_s` is without. `lost`: (when it is booked once
    more, row of the workload), for each attempt that was in flight when its leg ended.
    """

    pool: str
    model: str
    policy: Policy
    seed: int
    workload: Workload
    late_s: NDArray[np.float64]
    counts: list[Count]
    latency: dict[str, float]
    faults: dict[str, float]
    changes: tuple[Change, ...]
    record: Record
    answers: NDArray[np.int64]
    finalize: bool
    began_s: float
    makespan_s: float
    throttled: int
    launches: int
    unfinished: int
    unanswered: int
    gaps: tuple[tuple[float, float], ...] = ()
    lost: tuple[tuple[float, int], ...] = ()

    def worked_s(self, at_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return moments without the time between legs, same shape."""
        return at_s - sum((np.clip(at_s - end, 0.0, begin - end) for end, begin in self.gaps), np.zeros_like(at_s))


def lessons(journal: Journal) -> list[Lesson]:
    """Return the lessons of a journal, one per pool. Raise BadInput if no request has ended yet."""
    attempts = [attempt for attempt in journal.attempts() if attempt.lane != BATCH]
    if not attempts:
        raise BadInput("no live attempt has ended yet: nothing to compare with", journal.name)
    first_s = min(attempt.launched_s for attempt in attempts)
    gaps = _gaps(journal, attempts, first_s)
    names = dict.fromkeys(stated.pool for stated in journal.settings())
    losses_at = _losses_at(journal, attempts, first_s, gaps)
    by_pool = [(name, [a for a in attempts if a.pool == name]) for name in names]
    found = [_lesson(journal, name, mine, first_s, gaps, losses_at) for name, mine in by_pool]
    return [lesson for lesson in found if lesson is not None]


def _gaps(journal: Journal, attempts: list[Attempt], first_s: float) -> tuple[tuple[float, float], ...]:
    """Return the gaps between legs that launched requests, in seconds since the first launch.

    What a leg launches soon after it has begun was let out by its beginning, which then counts from there.
    """
    begins = [leg.began_s for leg in journal.legs()]
    spans: dict[int, tuple[float, float]] = {}
    for attempt in attempts:
        i = max(0, bisect_right(begins, attempt.launched_s) - 1)
        first, last = spans.get(i, (attempt.launched_s, attempt.finished_s))
        spans[i] = min(first, attempt.launched_s), max(last, attempt.finished_s)
    found = []
    for (_, (_, end)), (i, (first, _)) in pairwise(sorted(spans.items())):
        begin = first if first - begins[i] <= START_MOST_S else begins[i]
        if begin > end:
            found.append((end - first_s, begin - first_s))
    return tuple(found)


def _lesson(
    journal: Journal,
    pool: str,
    attempts: list[Attempt],
    first_s: float,
    gaps: tuple[tuple[float, float], ...],
    losses_at: list[tuple[float, float]],
) -> Lesson | None:
    def clock(at_s: float) -> float:
        return at_s - first_s

    history = [stated for stated in journal.settings() if stated.pool == pool]
    ended = {end.request: end for end in journal.ends(pool)}
    results = [result for result in journal.results() if result.request.pool == pool]
    # A request that was never let out (it was oversized) ended without an attempt, and takes no part.
    tried = {attempt.request for attempt in attempts}
    results = [result for result in results if result.request.index in tried]
    if not results:
        return None
    rows = [result.request for result in results]
    unfinished = sum(1 for _ in journal.unfinished(pool))
    place = {request.index: i for i, request in enumerate(rows)}
    mine = [attempt for attempt in attempts if attempt.request in place]
    policy = history[0].policy
    visible = {name: np.array([getattr(request.sizes, name) for request in rows], np.int64) for name in Sizes.__slots__}
    output, recorded = _answers(mine, place, visible, policy.finalize_max_tokens)
    answered = output >= 0
    seed = journal.run().seed
    sizes: dict[str, Any] = visible
    bare = Workload(
        **sizes,
        output_tokens=np.where(visible["endpoint"] == EMBEDDINGS, 0, np.maximum(output, 0)),
        arrival_s=constant(0.0, len(rows), np.float64),
        recorded_s=recorded,
        custom_ids=[request.custom_id for request in rows],
        models=[request.model for request in rows],
        provenance={"output tokens": (MEASURED, "the journal"), "latency": (MEASURED, "the journal")},
    )
    workload = bare.with_(output_tokens=similar_outputs(bare, output, seed)) if 0 < answered.sum() < len(rows) else bare
    heard = [each for each in journal.heard(pool) if each.attempt.request in place]
    names = [request.model for request in rows]
    counts = counts_of(heard, place, clock)
    ends = {place[i]: end for i, end in ended.items() if i in place}
    last_s = {a.request: clock(a.launched_s) for a in sorted(mine, key=lambda a: a.launched_s)}
    lesson = Lesson(
        pool=pool,
        model=max(dict.fromkeys(names), key=names.count),
        policy=policy,
        seed=seed,
        workload=workload,
        late_s=np.array(journal.lateness(pool)),
        counts=counts,
        latency=_latency(mine, answered, workload),
        faults=_faults(mine, visible),
        changes=_changes(journal, [(stated.at_s, stated.policy) for stated in history], clock, gaps),
        record=record_of(heard, ends, place, clock, counts),
        answers=output,
        finalize=any(attempt.lane == "finalize" for attempt in mine),
        began_s=clock(journal.legs()[0].began_s),
        makespan_s=0.0,
        throttled=sum(attempt.outcome in REFUSED for attempt in mine),
        launches=len(mine),
        unfinished=unfinished,
        unanswered=int((~answered).sum()),
        gaps=gaps,
        lost=_lost([(result.resent, last_s[result.request.index]) for result in results], losses_at),
    )
    return replace(lesson, makespan_s=float(lesson.worked_s(lesson.record.ended_s).max()))


def _losses_at(
    journal: Journal, attempts: list[Attempt], first_s: float, gaps: tuple[tuple[float, float], ...]
) -> list[tuple[float, float]]:
    """Return, for each leg but the last, when the next one began, and when to book again what the leg has lost.

    The simulation launches once what a leg has launched; the second launch is booked when the next leg begins. What a
    leg lost of which no attempt is recorded was launched when it began. Seconds since the first launch.
    """
    begins = [leg.began_s for leg in journal.legs()]
    active = {max(0, bisect_right(begins, attempt.launched_s) - 1) for attempt in attempts}
    found = []
    for i, (began_s, next_s) in enumerate(pairwise(at_s - first_s for at_s in begins)):
        later = (begin_s for _, begin_s in gaps if begin_s > began_s)
        found.append((next_s, next(later, next_s) if i in active else began_s))
    return found


def _lost(
    requests: Sequence[tuple[int, float]], losses_at: Sequence[tuple[float, float]]
) -> tuple[tuple[float, int], ...]:
    """Return when each lost attempt is booked, and its row.

    `requests`: how often each was lost in flight, and its last launch. The journal does not record which legs lost it;
    the last ones before that launch are assumed.
    """
    found: list[tuple[float, int]] = []
    for row, (count, last_s) in enumerate(requests):
        times = [at_s for next_s, at_s in losses_at if next_s <= last_s]
        found += [(at_s, row) for at_s in times[max(0, len(times) - count) :]]
    return tuple(sorted(found))


def _answers(
    attempts: list[Attempt], place: dict[int, int], visible: dict[str, NDArray[Any]], finalize_cap: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return each answer's uncut length (-1 = unknown), and the time of the attempt that brought it."""
    output = np.full(len(place), -1, np.int64)
    recorded = np.full(len(place), -1.0)
    caps = np.where(visible["max_tokens"] < 0, -1, visible["max_tokens"] * visible["n"])
    for a in attempts:
        if a.outcome not in ANSWERS:
            continue
        i, length = place[a.request], max(0, a.output_tokens)
        if a.outcome is Outcome.MALFORMED and a.output_tokens < 0:
            recorded[i] = a.finished_s - a.launched_s
            continue
        if a.lane == "finalize":
            output[i] = max(output[i], length + (length >= finalize_cap))
            continue
        recorded[i] = a.finished_s - a.launched_s
        # The uncut length of an answer cut by its cap is unknown, and makes no difference.
        output[i] = max(output[i], length + (0 < caps[i] <= length))
    return output, recorded


def _latency(attempts: list[Attempt], answered: NDArray[np.bool_], workload: Workload) -> dict[str, float]:
    """Return the line through the measured times, for attempts without a measured time."""
    answers = [a for a in attempts if a.outcome is Outcome.OK]
    if len(answers) < 2 or not answered.any():
        return {}
    x = np.array([max(0, a.output_tokens) for a in answers], np.float64)
    y = np.array([a.finished_s - a.launched_s for a in answers])
    slope = 0.0 if np.ptp(x) == 0.0 else max(0.0, float(np.polyfit(x, y, 1)[0]))
    first = max(0.0, float(np.mean(y) - slope * np.mean(x)))
    line = np.maximum(first + slope * x, 1e-6)
    sigma = float(np.std(np.log(np.maximum(y, 1e-6) / line)))
    return {"first_token_s": first, "per_token_s": slope, "sigma": min(3.0, sigma)}


def _faults(attempts: list[Attempt], visible: dict[str, NDArray[Any]]) -> dict[str, float]:
    """Return the shares of attempts that failed after admission, and the median time of a refusal."""
    let_in = [a for a in attempts if a.outcome not in REFUSED]
    count = max(1, len(let_in))
    found = {
        "error_ratio": sum(a.outcome in SERVER_FAULTS for a in let_in) / count,
        "drop_ratio": sum(a.outcome is Outcome.DROPPED for a in let_in) / count,
        "hang_ratio": sum(a.outcome is Outcome.TIMEOUT for a in let_in) / count,
    }
    refused = [a.finished_s - a.launched_s for a in attempts if a.outcome in REFUSED]
    if refused:
        found["refusal_s"] = float(np.median(refused))
    passes = sum(a.lane == "finalize" and a.attempt == 1 for a in attempts)
    if passes:
        caps = visible["max_tokens"] * visible["n"]
        cut = sum(
            a.lane == "main" and a.outcome is Outcome.OK and a.output_tokens in set(caps.tolist()) for a in attempts
        )
        found["empty_cut_ratio"] = min(1.0, passes / max(passes, cut))
    return found


def _changes(
    journal: Journal,
    history: list[tuple[float, Policy]],
    clock: Callable[[float], float],
    gaps: tuple[tuple[float, float], ...],
) -> tuple[Change, ...]:
    """Return changes during the run: settings, and pauses that were requested from outside or lay between legs."""
    found: list[Change] = []
    for (_, before), (at_s, after) in pairwise(history):
        if after != before:
            found.append((max(0.0, clock(at_s)), after))
    words = {"pause": "paused", "resume": "resumed"}
    for command in journal.commands():
        if command.name in words and command.taken_s >= 0.0:
            found.append((max(0.0, clock(command.taken_s)), words[command.name]))
    for end_s, begin_s in gaps:
        found += [(end_s, "paused"), (begin_s, "resumed")]
    return tuple(sorted(found, key=lambda change: change[0]))


def believed(lesson: Lesson) -> ProviderConfig:
    """Return the provider as the settings state it: their limits, charge rule and settling."""
    return believed_provider(lesson.policy, np.array([lesson.model]))


def taught(provider: ProviderConfig, lesson: Lesson) -> ProviderConfig:
    """Return the provider with the run's times and faults. The measured times already include stalls."""
    latency = {**lesson.latency, "stall_ratio": 0.0} if lesson.latency else {"stall_ratio": 0.0}
    return provider.with_(
        latency={**provider.latency.model_dump(), **latency, "preset": "", "scale": 1.0, "recorded": True},
        faults={**provider.faults.model_dump(), **lesson.faults},
    )


class Twin(Simulation):
    """The simulation of a live run: timers ring late as they did, and settings change when they did.

    `there_s`, `round_s`: the way of each request to the provider, and there and back, shape (requests,). `began_s`:
    when the first one reached it, where its clock begins. `takings`: what others use of the quota, on that clock.
    `lost`: attempts that the simulation does not make, whose charge and reservation are booked all the same. Those
    from before the run's first launch are booked on a clock that begins with them. `reserves`: when a leg began under
    another rule of what is reserved, and the tokens that each request reserves from then on, shape (requests,).
    """

    def __init__(
        self,
        *arguments: Any,
        late_s: NDArray[np.float64],
        rng: np.random.Generator,
        changes: Sequence[Change] = (),
        there_s: NDArray[np.float64] | None = None,
        round_s: NDArray[np.float64] | None = None,
        began_s: float = 0.0,
        takings: Sequence[OthersUse] = (),
        lost: Sequence[tuple[float, int]] = (),
        reserves: Sequence[tuple[float, NDArray[np.float64]]] = (),
        **rest: Any,
    ) -> None:
        super().__init__(*arguments, **rest)
        self._late_s, self._rng = late_s, rng
        self._late = -inf, 0.0  # a head's moment, and when it is noticed
        self._there_s = there_s.tolist() if there_s is not None else [0.0] * len(self.columns)
        self._round_s = round_s.tolist() if round_s is not None else [0.0] * len(self.columns)
        self._began_s = began_s
        for taking in takings:
            Appointment(self.env, began_s + taking.at_s, CHANGE, self._on_taking, taking)
        # Where headers state what was used, lost attempts are among the takings.
        self._charges_lost = not takings
        self._lost, self._changes, self._reserves = lost, changes, reserves
        self._reserved: list[float] | None = None

    def run(self, start_s: float = 0.0) -> Tally:
        """Run to the end of the last request."""
        for at, row in self._lost:
            if at <= start_s:
                self.ps.at = min(self.ps.at, at - self._began_s)
                self._lose(row, at)
            else:
                Appointment(self.env, at, CHANGE, self._on_lost, row)
        for at, change in self._changes:
            Appointment(self.env, at, CHANGE, self._on_change, change)
        for at, tokens in self._reserves:
            Appointment(self.env, at, CHANGE, self._on_reserves, tokens.tolist())
        return super().run(start_s)

    def next_work(self) -> Job | None:
        """Return the next request of the batch, with what it reserves in this leg."""
        job = super().next_work()
        return job if job is None else self._reserving(job)

    def _reserving(self, job: Job) -> Job:
        if self._reserved is not None:
            job.reserve = self._reserved[job.index]
            job.need = job.need_of(job.reserve)
        return job

    def _on_reserves(self, event: Any) -> None:
        """Reserve by the new leg's rule whatever is not in flight: a resumed run reads its requests again."""
        self._reserved = event._value
        waiting = self.scheduler.jobs()
        for job in waiting if self.scheduler.new_work is None else [*waiting, self.scheduler.new_work]:
            self._reserving(job)

    def _on_wake(self, event: Any) -> None:
        """Handle a due moment: the loop notices it a little later, unless another event wakes it first."""
        if event is self.timer and event is not None:
            head_at = self.scheduler.head_at
            if self.is_due:
                is_later = self._postponed()
            else:
                if head_at != self._late[0]:
                    self._late = head_at, self.env._now + self._lateness()
                is_later = self._late[1] > self.env._now
            if is_later:
                self.timer, self.timer_at = None, inf
                self._settle()
            else:
                super()._on_wake(event)

    def _next_at(self, head_at: float) -> tuple[float, bool]:
        return super()._next_at(self._late[1] if head_at == self._late[0] else head_at)

    def _lateness(self) -> float:
        """Return how late the timer that is due now fires."""
        return float(self._rng.choice(self._late_s)) if len(self._late_s) else 0.0

    def _postponed(self) -> bool:
        """Return whether the backoff that has ended is noticed only later."""
        return False

    def _answer(self, job: Job, key: int, now: float) -> tuple[int, float, int, float]:
        """Return the provider's response; it sees the attempt when it arrives, on the provider's clock."""
        there_s, round_s = self._way(job)
        answer = self._served(job, key, max(self.ps.at, now + there_s - self._began_s))
        if self._counts_later:
            left_s = max(now, now + answer[1] - (round_s - there_s))
            Appointment(self.env, left_s, ANSWER, self._on_left, job)
        return answer

    def _way(self, job: Job) -> tuple[float, float]:
        """Return seconds to the provider, and there and back."""
        return self._there_s[job.index], self._round_s[job.index]

    def _served(self, job: Job, key: int, at: float) -> tuple[int, float, int, float]:
        """Return what the provider does with the attempt at `at` on the provider's clock."""
        return super()._answer(job, key, at)

    def _left(self, job: Job, now: float) -> None:
        """Do nothing: the answer left the provider earlier."""

    def _on_left(self, event: Any) -> None:
        super()._left(event._value, max(self.ps.at, self.env._now - self._began_s))

    def _on_taking(self, event: Any) -> None:
        gone_by_others(self.pp, self.ps, self.provider_seed, event._value)

    def _on_lost(self, event: Any) -> None:
        if not self.is_over:
            self._lose(event._value, self.env._now)

    def _lose(self, row: int, now: float) -> None:
        """Take the charge of the row's request and book its reservation."""
        c = self.columns
        charge = float(c.charge[row])
        if self.pp.settles or any(self.pp.at_answer):
            charge = min(charge, float(c.prompt_tokens[row] + c.output_tokens[row]))
        prov.advanced(self.pp, self.ps, self.provider_seed, max(now - self._began_s, self.ps.at))
        if self._charges_lost:
            win.taken(self.pp, self.ps, charge, 1.0, False)
        self.scheduler.quota.launched(of_tokens(float(c.reserve[row])), law.HOLDING, now, 0.5)

    def _on_change(self, event: Any) -> None:
        change = event._value
        self.change(change if isinstance(change, str) else change.params())
