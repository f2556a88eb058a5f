"""One pool of a live run: its governor, its observers, and its present settings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from governor.forecast.forecast import Expectation
from governor.forecast.guard import RESUMED_SLACK_S, SLACK_S, Track
from governor.journal.recorder import Recorder
from governor.journal.records import Records
from governor.journal.rows import ResultRow
from governor.model.estimate import LEARNED
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.prices import Spending
from governor.model.requests import Answer, Attempt, Outcome, Request
from governor.model.work import Job, Observer, Sender
from governor.run.account import line_of
from governor.run.longwaits import LongWaits
from governor.run.outputs import Follow
from governor.run.steer import Stopper
from governor.scheduler.batch import kind_of
from governor.scheduler.driver import Governor
from governor.scheduler.learning import Learner
from governor.scheduler.repeated_refusals import THEN, Refusals
from governor.sharedquota.sharing import shared_governor
from governor.telemetry.eventlog import EventLog, Format
from governor.telemetry.metrics import Metrics
from governor.telemetry.progress import ProgressLane
from governor.telemetry.watch import Alarms, Meter, Together


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Options for carrying out a run. `ask`: puts a question to the user at a terminal, None = no terminal.

    `max_cost`: US dollars, `stop_after_s`, `finish_by_s`: seconds of this leg; None = no budget. `grace_s`: how long
    requests in flight may take after a signal. `canary`: number of first requests of each pool to try; `insist`: go on
    whatever the canary finds. `records`: every call of the law is recorded. `follow`: receives each result, such as the
    file that grows. `stopper`: stops the run, besides signals. `textfile`, `hook`: targets of metrics and messages.
    `cancel_background`: background responses are cancelled after a signal. `redis`: the URL through which pools are
    shared with other processes, "" = they are not shared. `new_loop`: creates the event loop, None = a loop whose clock
    runs `time_scale` times as fast as the machine's.
    """

    finalize: bool = False
    max_cost: float | None = None
    stop_after_s: float | None = None
    finish_by_s: float | None = None
    grace_s: float = 30.0
    canary: int = 0
    insist: bool = False
    log_format: Format | None = None
    follow: Follow | None = None
    stopper: Stopper | None = None
    metrics: Metrics | None = None
    textfile: Path | None = None
    records: bool = False
    hook: str = ""
    ask: Callable[[str], bool] | None = None
    time_scale: float = 1.0
    new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None
    cancel_background: bool = False
    redis: str = field(default="", repr=False)


@dataclass(slots=True)
class PoolRun(ProgressLane):
    """One pool under way; `ProgressLane` holds the fields from which its progress is read.

    `ending`: why it stopped, "" = it did not.
    """

    name: str
    policy: Policy
    recorder: Recorder
    alarms: Alarms
    long_waits: LongWaits
    track: Track
    send: Sender
    refusals: Refusals | None
    ending: str = ""

    def pause(self) -> None:
        """Launch nothing until `resume`."""
        self.governor.pause()

    def resume(self) -> None:
        """Launch again."""
        self.governor.resume()

    def change(self, policy: Policy) -> None:
        """Adopt other settings; they are recorded with the time."""
        self.policy = policy
        self.meter.policy = policy
        self.alarms.repriced(policy)
        self.long_waits.policy = policy
        self.governor.reprice(policy.params())
        self.recorder.policy_changed(policy, self.governor.now())


@dataclass(frozen=True, slots=True)
class PoolCallbacks:
    """The callbacks of a pool: `say(line)` for the user, `refused(line)` if all requests are refused alike.

    `spending()` is called after each launch and each answer, if there is a budget.
    """

    say: Callable[[str], None]
    refused: Callable[[str], None]
    spending: Callable[[], None]


def pool_run(
    pool: Pool,
    recorder: Recorder,
    expectation: Expectation,
    *,
    left: tuple[int, float],
    models: frozenset[str],
    answered: bool,
    seed: int,
    start_s: float,
    learner: Learner | None,
    send: Sender,
    spent: Spending,
    manner: RunOptions,
    said: PoolCallbacks,
) -> PoolRun:
    """Return a pool ready to run, inside an event loop.

    `left`: requests left, and tokens reserved for them; `models`: their models. `answered`: some were answered before.
    """
    meter = Meter(pool, spent, left=left[0], left_tokens=left[1])
    alarms = Alarms(pool, said.say)
    long_waits = LongWaits(pool, said.say)
    log = EventLog(manner.log_format, pool.name) if manner.log_format is not None else None
    observers: list[Observer | None] = [
        recorder,  # first: nothing is reported before it is recorded
        meter,
        alarms,
        long_waits,
        _Purse(said.spending) if manner.max_cost is not None else None,
        Follower(manner.follow) if manner.follow is not None else None,
        manner.metrics.observer(pool.name) if manner.metrics is not None else None,
        log,
    ]
    governor = governor_of(
        pool,
        manner,
        said.say,
        seed=seed,
        observer=Together(_present(observers)),
        state=recorder.state,
        start_s=start_s,
        learner=learner,
    )
    # From the clocks alone, since the run's may be faster than the wall's.
    long_waits.moment = lambda at_s: time.time() + (at_s - governor.now()) / manner.time_scale
    if manner.metrics is not None:
        manner.metrics.watch(pool.name, governor)
    if log is not None:
        log.zero_epoch = governor.zero_epoch
    return PoolRun(
        governor=governor,
        meter=meter,
        assumed_s=expectation.service_s,
        name=pool.name,
        policy=pool.policy,
        recorder=recorder,
        alarms=alarms,
        long_waits=long_waits,
        track=Track(expectation, RESUMED_SLACK_S if start_s > 0.0 else SLACK_S),
        send=send,
        refusals=None
        if manner.insist and not pool.group
        else Refusals(
            models,
            answered=answered,
            halt=said.refused,
            lasting=bool(pool.group),
            then="its requests go to the other pools of its group, if any is left" if pool.group else THEN,
        ),
    )


def governor_of(
    pool: Pool, manner: RunOptions, say: Callable[[str], None], *, observer: Observer, seed: int = 0, **continued: Any
) -> Governor:
    """Return the governor of a pool, whose quota is private or shared. `continued`: as for `Governor`."""
    learner = continued.pop("learner", None) or (Learner() if pool.policy.charge_rule == LEARNED else None)
    if not manner.redis:
        return Governor(
            pool.policy, seed=seed, observer=observer, pool=pool.name, learner=learner, own_quota=True, **continued
        )
    if learner is not None:
        say(
            f"pool '{pool.name}': on a quota that processes share, estimates do not learn: what is declared is reserved"
        )
    return shared_governor(
        pool, manner.redis, say, time_scale=manner.time_scale, seed=seed, observer=observer, **continued
    )


def learner_of(journal: Records, pool: str, policy: Policy) -> Learner | None:
    """Return a learner of the pool's answers so far, if its estimates learn: a resumed leg knows what the run knew."""
    if policy.charge_rule != LEARNED:
        return None
    learner = Learner()
    answered = [a for a in journal.attempts(pool) if a.outcome is Outcome.OK and a.lane == "main"]
    if not answered:
        return learner
    kinds = {result.request.index: kind_of(result.request) for result in journal.results()}
    kinds |= {request.index: kind_of(request) for request in journal.unfinished(pool)}
    for a in answered:
        if a.prompt_tokens >= 0 and a.output_tokens >= 0 and a.request in kinds:
            learner.saw(*kinds[a.request], float(a.prompt_tokens + a.output_tokens))
    return learner


def _present(observers: Iterable[Observer | None]) -> list[Observer]:
    return [observer for observer in observers if observer is not None]


class _Purse(Observer):
    """Calls back after each launch and each answer: money was or will be spent."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def launched(self, job: Job, now: float) -> None:
        self._then()

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        if attempt.outcome is Outcome.OK:
            self._then()


class Follower(Observer):
    """Passes on each line of the results as its request ends."""

    def __init__(self, followed: Follow) -> None:
        self._followed = followed

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        self._followed.add(*line_of(ResultRow(request, failure, answer, now, 0)))
