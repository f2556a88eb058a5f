"""The twin is exact: the asyncio driver and the SimPy driver, same scenario and seed, give the same run, to the bit.

The live driver runs on a virtual loop and sends to `sim/model/provider.py`, the simulated one runs as it always does.
What is compared: every column of every attempt in order of their ends, how and when each request ended, the deferrals
by cause, and the law's state when all is over. Nothing is rounded, and nothing is sorted first.

Ties. In SimPy, events of one instant have an order (docs/explanation/law.md#ties); a real loop has no instants of that
kind. The virtual loop is told the same order here, so that scenarios full of round times are compared like the others;
`test_ties_need_their_order_and_nothing_else_does` shows what becomes of them without it.

Where a quota runs out both leave what still waits pending, and every attempt that ends after the stop is compared.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from governor import law
from governor.model.errors import FailureCode
from governor.model.keyed import attempt_key
from governor.model.needs import of_tokens
from governor.model.policy import Policy
from governor.model.requests import CAUSES, CHAT, Answer, Attempt, Limit, Outcome, Request, Sizes
from governor.model.work import TIMED_OUT, Job, Observer, Work
from governor.scheduler.attempts import Attempts
from governor.scheduler.driver import Governor
from sim.des.calendar import CHANGE, Appointment
from sim.des.driver import Simulation
from sim.des.jobs import Job as SimulatedJob
from sim.des.run import CHARGED, Tally, launch_order
from sim.experiment import experiment
from sim.experiment.experiment import Case, attempt_rows, case_of
from sim.model import provider as prov
from sim.model.latency import latency_s
from sim.scenario.scenario import Scenario
from tests.scenarios import drawn, shown
from tests.virtual_loop import run_virtual

# A scenario whose time-outs are too short meets a day of probes: many attempts come of few requests.
REQUESTS = 8_000
# A longer form: PACELINE_TWO_WORLDS=2000000 pytest -m slow tests/test_two_worlds.py
SLOW_REQUESTS = int(os.environ.get("PACELINE_TWO_WORLDS", "1000000"))

# The live driver's timers in that order; answers, which are nobody's timer, are 0. Its own time-outs come after all
# answers of the instant: an answer in the last moment is one, and where the send states the time-outs they find nobody.
TIME_OUTS: dict[Callable[..., Any], int] = {Attempts.expire: 1}
TIES = TIME_OUTS | {Governor.pause: 2, Governor.resume: 2, Governor.reprice: 2, Governor._ring: 4}


Change = tuple[float, law.Params | str]
"""At that time the settings change to these, or the pool is paused, or resumed."""


@dataclass
class World:
    """What a run left. `ends`: (request, failure, when). `tied`: events of several kinds met at one instant."""

    rows: list[Attempt] = field(default_factory=list)
    ends: list[tuple[int, str, float]] = field(default_factory=list)
    deferrals: list[int] = field(default_factory=lambda: [0] * len(CAUSES))
    state: law.State = field(default_factory=law.State)
    stopped: str = ""
    tied: bool = False


# ---------------------------------------------------------------- simulated


class Changing(Simulation):
    """The simulation with changes of settings in mid-run, and with a list of ends."""

    def __init__(self, *arguments: Any, changes: list[Change], world: World, **rest: Any) -> None:
        super().__init__(*arguments, **rest)
        self.world = world
        self.instants: dict[float, set[int]] = {}
        for at, change in changes:
            Appointment(self.env, at, CHANGE, lambda event, change=change: self.change(change))  # type: ignore[misc]

    def over(self, job: SimulatedJob, at: float, code: str) -> None:
        self.world.ends.append((job.index, code, at))
        super().over(job, at, code)

    def run(self, start_s: float = 0.0) -> Tally:
        """Notes on the way which kinds of events meet at one instant: where there is but one kind, there is no tie."""
        env, step = self.env, self.env.step

        def keep() -> None:
            while env._queue:
                at, kind = env._queue[0][:2]
                self.instants.setdefault(at, set()).add(kind)
                step()

        env.keep = keep  # type: ignore[method-assign]
        return super().run(start_s)


def simulated(scenario: Scenario, case: Case, seed: int, changes: list[Change]) -> World:
    """The run as the simulation has it."""
    world = World()
    simulation = Changing(
        case.columns,
        case.params,
        case.provider,
        seed=seed,
        day_tokens_used=case.grant.day_tokens_used,
        day_requests_used=case.grant.day_requests_used,
        finalize_max_tokens=case.finalize_max_tokens,
        on_attempt=attempt_rows(scenario, world.rows.append),
        changes=changes,
        world=world,
    )
    world.deferrals = simulation.run().deferrals
    world.state, world.stopped = simulation.s, simulation.scheduler.stopped
    world.tied = any(len(kinds) > 1 for kinds in simulation.instants.values())
    return world


# ---------------------------------------------------------------- live


class Watching(Observer):
    """Fills a world with what the live driver reports."""

    def __init__(self, world: World) -> None:
        self.world = world

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        self.world.rows.append(attempt)

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        self.world.ends.append((request.index, failure, now))

    def deferred(self, cause: int) -> None:
        self.world.deferrals[cause] += 1


class Provider:
    """`sim/model/provider.py` as somebody to send to: asked at launch, heard of when its answer is there.

    `hangs`: what it would answer too late it never answers, so that the driver's own time-out rings. Otherwise the send
    states the time-out itself, in its place among the answers of that instant.
    """

    def __init__(self, scenario: Scenario, case: Case, seed: int, hangs: bool) -> None:
        self.case = case
        self.seed = seed
        self.hangs = hangs
        self.governor: Governor
        self.state = prov.ProviderState()
        prov.day_started(self.state, case.grant.day_tokens_used, case.grant.day_requests_used)
        c = case.columns
        self.columns = (c.cap.tolist(), c.output_tokens.tolist(), c.prompt_tokens.tolist(), c.recorded_s.tolist())
        self.refused_unheard: set[tuple[int, float]] = set()

    async def send(self, job: Job, timeout_s: float) -> Answer:
        loop = self.governor.loop
        pp, ps, seed, i, now = self.case.provider, self.state, self.seed, job.index, loop.time()
        assert now == job.launched_s
        cap, uncapped, prompt, recorded_s = (column[i] for column in self.columns)
        most = cap if job.lane == law.MAIN else self.case.finalize_max_tokens
        output = min(uncapped, most) if most > 0 else uncapped
        charge = float(job.charge)
        outcome, service_s, _, retry_after_s = prov.answered(
            pp, ps, seed, i, attempt_key(job.lane, job.tries), charge, float(output), recorded_s, now
        )
        limits = self.limits(outcome)
        at = now + service_s
        expires_at = law.expires_at(self.governor.p, job.first_launched_s, now)
        assert timeout_s == expires_at - now
        if at > expires_at:
            if outcome not in CHARGED:
                self.refused_unheard.add((i, now))
            await until(loop, math.inf if self.hangs else expires_at)
            return TIMED_OUT
        await until(loop, at)
        if outcome == prov.DROPPED:
            return Answer(Outcome.DROPPED)
        if outcome == prov.OK:
            prov.settled(pp, ps, seed, charge, float(prompt + output), at)
        if pp.counts == prov.COUNTS_AT_ANSWER:
            prov.advanced(pp, ps, seed, at)
            limits = self.limits(outcome)
        if outcome != prov.OK:
            kind, status = experiment.OUTCOMES[outcome], experiment.STATUS[outcome]
            return Answer(kind, status, retry_after_s=retry_after_s, limits=limits)
        cut_off = job.lane == law.MAIN and 0 < cap < uncapped
        return Answer(
            Outcome.OK,
            200,
            used_prompt_tokens=prompt,
            used_output_tokens=output,
            cut_off=cut_off,
            has_text=not (cut_off and prov.cut_without_text(pp, seed, i)),
            limits=limits,
        )

    def limits(self, outcome: int) -> tuple[Limit, ...]:
        """What the headers state, in the order in which they stand."""
        pp, ps = self.case.provider, self.state
        if not prov.states_counts(pp, outcome not in CHARGED):
            return ()
        d = prov.requests_dimension(pp, ps)
        stated = [(law.TPM, "TPM")] if pp.limit[law.TPM] > 0.0 else []
        stated += [(d, "RPM" if d == law.RPM else "RPD")] if d >= 0 else []
        return tuple(Limit(name, prov.limit_now(pp, ps, d), prov.remaining(pp, ps, d)) for d, name in stated)


async def until(loop: asyncio.AbstractEventLoop, at: float) -> None:
    """Returns at exactly that time."""
    ring = loop.create_future()
    handle = loop.call_at(at, ring.set_result, None) if at < math.inf else None
    try:
        await ring
    finally:
        if handle is not None:
            handle.cancel()


def works(scenario: Scenario, case: Case) -> Iterator[Work]:
    """The batch in order of launch, as a journal would hand it out."""
    c, w = case.columns, scenario.workload
    for i in launch_order(c, case.params).tolist():
        # Of the sizes, only those that a quota's weights count.
        sizes = Sizes(CHAT, int(c.prompt_tokens[i]), 0, 0, 1, 0, 0, 1, int(c.cap[i]))
        yield Work(
            Request(i, w.custom_id(i), w.url(i), w.model(i), None, sizes),
            float(c.reserve[i]),
            float(c.cap[i]),
            float(c.finalize_reserve[i]),
            int(c.charge[i]),
            int(c.finalize_charge[i]),
        )


def live(
    scenario: Scenario,
    case: Case,
    seed: int,
    changes: list[Change],
    *,
    hangs: bool,
    ordered: bool = True,
) -> tuple[World, set[tuple[int, float]]]:
    """The run as the live driver has it, and the attempts that were refused when nobody listened any more.

    These by request and time of launch: an attempt that met an outage does not count, so that its number comes again.

    `ordered`: ties go in the house's order, else in the order in which the timers were set.
    """
    world = World()
    provider = Provider(scenario, case, seed, hangs)

    async def main() -> None:
        day = {"day_tokens_used": case.grant.day_tokens_used, "day_requests_used": case.grant.day_requests_used}
        governor = provider.governor = Governor(case.params, seed=seed, observer=Watching(world), **day)
        for at, change in changes:
            if isinstance(change, str):
                governor.loop.call_at(at, governor.pause if change == "paused" else governor.resume)
            else:
                governor.loop.call_at(at, governor.reprice, change)
        finalize = case.finalize_max_tokens > 0
        world.stopped = await governor.run(works(scenario, case), provider.send, finalize=finalize)
        world.state = governor.s

    run_virtual(main(), priorities=TIES if ordered else TIME_OUTS)
    return world, provider.refused_unheard


# ---------------------------------------------------------------- compared


def as_the_provider_knows(a: Attempt, refused_unheard: set[tuple[int, float]]) -> Attempt:
    """A live row with what only the simulation can know: a refusal that was not heard of costs nothing.

    And where the quota has run out, the simulated provider says so in a code of its own.
    """
    if a.outcome == Outcome.TIMEOUT and (a.request, a.launched_s) in refused_unheard:
        return a._replace(charged_tokens=0)
    if a.outcome == Outcome.QUOTA:
        return a._replace(error_code=FailureCode.INSUFFICIENT_QUOTA)
    return a


def differences(a: World, b: World, refused_unheard: set[tuple[int, float]]) -> str:
    """The first difference between the simulated run and the live one, "" if there is none."""
    for n, (ours, seen) in enumerate(zip(a.rows, b.rows, strict=False)):
        theirs = as_the_provider_knows(seen, refused_unheard)
        if ours != theirs:
            columns = [name for name in Attempt.columns() if getattr(ours, name) != getattr(theirs, name)]
            parts = [f"{name}: simulated {getattr(ours, name)!r}, live {getattr(theirs, name)!r}" for name in columns]
            return f"attempt {n} (request {ours.request}, {ours.lane} {ours.attempt}): " + "; ".join(parts)
    if len(a.rows) != len(b.rows):
        return f"{len(a.rows)} attempts simulated, {len(b.rows)} live"
    if a.ends != b.ends:
        return f"ends: simulated {a.ends}, live {b.ends}"
    if (a.deferrals, a.stopped) != (b.deferrals, b.stopped):
        return f"deferrals and stop: simulated {a.deferrals, a.stopped}, live {b.deferrals, b.stopped}"
    fields = [f.name for f in dataclasses.fields(law.State)]
    return "; ".join(
        f"state.{name}: simulated {getattr(a.state, name)}, live {getattr(b.state, name)}"
        for name in fields
        if getattr(a.state, name) != getattr(b.state, name)
    )


def settings_changed(rng: random.Random, policy: Policy) -> Policy:
    """Other settings for the rest of the run. What a deadline or a limit would end at once stays as it is."""
    changes: dict[str, Any] = {
        "max_concurrency": rng.choice([1, 2, 8, 50]),
        "stagger_seconds": rng.choice([0.0, 0.5, 6.0]),
        "tpm_headroom": rng.choice([0.0, 0.05, 0.4]),
        "tpm_window": rng.choice(["fixed", "sliding", "bucket"]),
        "rpm_limit": rng.choice([0, 3, 40]),
        "retry_max_attempts": rng.choice([2, 5]),
        "backoff_base_seconds": rng.choice([0.1, 5.0]),
        "backoff_keeps_permit": rng.random() < 0.5,
        "hold_on_throttle": rng.random() < 0.5,
        "settle": rng.random() < 0.5,
    }
    return policy.with_(**{name: changes[name] for name in rng.sample(sorted(changes), rng.randint(1, 5))})


def changes_of(rng: random.Random, policy: Policy) -> list[Change]:
    """In one of three runs the operator steps in: new settings at some moments, or a pause."""
    changes: list[Change] = []
    if rng.random() < 0.25:
        for _ in range(rng.randint(1, 3)):
            policy = settings_changed(rng, policy)
            changes.append((rng.choice([rng.uniform(0.0, 300.0), float(rng.randint(1, 120))]), policy.params()))
        changes.sort(key=lambda change: change[0])
    if rng.random() < 0.15:
        at = rng.uniform(0.0, 120.0)
        changes += [(at, "paused"), (at + rng.uniform(0.1, 90.0), "resumed")]
    return changes


def times_out_alone(world: World) -> bool:
    """Whether no answer arrives at the instant of a time-out. If so, what comes too late may as well never come.

    The live driver has one timer for all time-outs: among the answers of one instant they have no place of their own.
    """
    time_outs = {a.finished_s for a in world.rows if a.outcome == Outcome.TIMEOUT}
    return not any(a.finished_s in time_outs for a in world.rows if a.outcome != Outcome.TIMEOUT)


def compared(seed: int, counts: dict[str, int]) -> None:
    """One drawn scenario in both worlds."""
    scenario = drawn(seed, arrivals="batch")
    case = case_of(scenario)
    changes = changes_of(random.Random(seed + 1), scenario.policy)
    ours = simulated(scenario, case, scenario.seed, changes)
    theirs, refused_unheard = live(scenario, case, scenario.seed, changes, hangs=times_out_alone(ours))
    difference = differences(ours, theirs, refused_unheard)
    assert not difference, f"{difference}\nin {shown(seed, scenario)}, changes {changes}"
    counts["scenarios"] += 1
    counts["requests"] += len(case.columns)
    counts["attempts"] += len(theirs.rows)
    counts["changed"] += bool(changes)
    counts["tied"] += ours.tied
    counts["stopped"] += bool(theirs.stopped)
    for a in theirs.rows:
        counts[a.outcome] = counts.get(a.outcome, 0) + 1
        counts["finalize"] += a.lane == "finalize"
        counts["retries"] += a.attempt > 1


def compared_until(seed: int, requests: int) -> dict[str, int]:
    """Scenario after scenario, until so many requests went through both worlds. Prints what it saw."""
    counts = dict.fromkeys(
        ("scenarios", "requests", "attempts", "changed", "tied", "stopped", "finalize", "retries"), 0
    )
    begun = time.perf_counter()
    first = random.Random(seed).randrange(2**40)
    n = 0
    while counts["requests"] < requests:
        compared(first + 2 * n, counts)
        n += 1
    print(f"seed {seed}: {counts} in {time.perf_counter() - begun:.1f} s")
    return counts


def test_two_worlds_give_the_same_attempts(seed: int) -> None:
    counts = compared_until(seed, REQUESTS)
    # It is no comparison unless everything occurred, and often.
    for outcome in (Outcome.THROTTLED, Outcome.SERVER_ERROR, Outcome.DROPPED, Outcome.TIMEOUT):
        assert counts[outcome] > 100, counts
    assert counts[Outcome.QUOTA] > 5, counts
    assert counts["finalize"] > 100, counts
    assert counts["retries"] > 3_000, counts


@pytest.mark.long
def test_two_worlds_for_longer(seed: int) -> None:
    compared_until(seed + 1, SLOW_REQUESTS)


def test_ties_need_their_order_and_nothing_else_does(seed: int) -> None:
    """Without an order for events of one instant: equal to the bit wherever no two kinds of events meet at one.

    Where they do meet, a retry may find a place that an answer gives back at that same instant, or miss it.
    """
    first = random.Random(seed + 2).randrange(2**40)
    free = differing = tied = 0
    for n in range(300):
        scenario = drawn(first + n, arrivals="batch")
        case = case_of(scenario)
        changes = changes_of(random.Random(first + n), scenario.policy)
        ours = simulated(scenario, case, scenario.seed, changes)
        hangs = times_out_alone(ours)
        theirs, refused_unheard = live(scenario, case, scenario.seed, changes, hangs=hangs, ordered=False)
        difference = differences(ours, theirs, refused_unheard)
        assert ours.tied or not difference, f"{difference}\nin {shown(first + n, scenario)}, changes {changes}"
        free += not ours.tied
        tied += ours.tied
        differing += bool(difference)
    print(f"seed {seed}: {free} scenarios without ties all equal; of {tied} with ties, {differing} differ")
    assert free > 50
    assert tied > 10


# ---------------------------------------------------------------- arrivals over time


class Program:
    """The requests of a trace as a program's own calls: each asks for a permit when it arrives."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        self.seed = seed
        self.launches: list[tuple[int, float]] = []
        # The order at one instant: answers, arrivals, wakes.
        self.state = run_virtual(self._main(), priorities={Program._arrives: 3, Governor._ring: 4})

    async def _main(self) -> law.State:
        c, grant = self.case.columns, self.case.grant
        day = {"day_tokens_used": grant.day_tokens_used, "day_requests_used": grant.day_requests_used}
        self.governor = Governor(self.case.params, seed=self.seed, **day)
        self.tasks: list[asyncio.Task[None]] = []
        self.all_there: asyncio.Future[None] = self.governor.loop.create_future()
        for i in np.argsort(c.arrival_s, kind="stable").tolist():
            self.governor.loop.call_at(float(c.arrival_s[i]), self._arrives, i)
        await self.all_there
        await asyncio.gather(*self.tasks)
        return self.governor.s

    def _arrives(self, i: int) -> None:
        self.tasks.append(self.governor.loop.create_task(self._call(i)))
        if len(self.tasks) == len(self.case.columns):
            self.all_there.set_result(None)

    async def _call(self, i: int) -> None:
        c, seed = self.case.columns, self.seed
        reserve, cap, output = float(c.reserve[i]), int(c.cap[i]), int(c.output_tokens[i])
        output = min(output, cap) if cap > 0 else output
        if law.never_fits(self.case.params, of_tokens(reserve)):
            return
        service_s = latency_s(self.case.provider, seed, i, attempt_key(law.MAIN, 1), output, c.recorded_s[i])
        async with self.governor.permit(reserve, expected=float(cap)) as permit:
            self.launches.append((i, permit.launched_s))
            await until(self.governor.loop, permit.launched_s + service_s)
            permit.used(float(c.prompt_tokens[i]) + output)


def test_permits_are_granted_when_the_simulation_launches_arrivals(seed: int) -> None:
    """Requests of a trace, a provider that lets everybody in: the same launches to the bit, by permits as simulated."""
    first = random.Random(seed + 3).randrange(2**40)
    all_in: dict[str, Any] = {
        **{"tpm": 0, "rpm": 0, "tpd": 0, "rpd": 0, "quota_requests": 0, "slice_s": 0.0, "ramp_tpm": 0},
        **{"faults": {}, "outages": []},
    }
    # The jitter of a permit is drawn for its own number, which is not the request's.
    knobs = {"jitter_ratio": 0.0, "request_timeout_seconds": 600.0, "deadline_seconds": 0.0, "sync_headers": False}
    launches = 0
    for n in range(1_000):
        scenario = drawn(first + n, policy=knobs, provider=all_in, finalize=False)
        if scenario.arrivals == "batch":
            continue
        case = case_of(scenario)
        rows: list[Attempt] = []
        simulation = Simulation(
            case.columns,
            case.params,
            case.provider,
            seed=scenario.seed,
            day_tokens_used=case.grant.day_tokens_used,
            day_requests_used=case.grant.day_requests_used,
            from_trace=True,
            on_attempt=attempt_rows(scenario, rows.append),
        )
        simulation.run()
        program = Program(case, scenario.seed)
        expected = sorted((a.launched_s, a.request) for a in rows)
        assert sorted((at, i) for i, at in program.launches) == expected, shown(first + n, scenario)
        assert program.state == simulation.s, shown(first + n, scenario)
        launches += len(expected)
    print(f"seed {seed}: {launches} launches")
    assert launches > 3_000
