"""The live run: pools side by side in one event loop, until no work is left or the run is stopped.

Theory of operation. Each pool's governor pulls its work from the journal, a hundred rows at a time. A ticker handles
everything that is not an event of the driver: a few times a second it takes up commands, shows the progress, compares
with the forecast and watches the clock. Any part that wants to end the run calls `stop` with a reason; the governors
then launch nothing more, and requests in flight have the grace period to end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from governor.forecast.forecast import Expectation, finish_text
from governor.forecast.guard import canary_note, canary_verdict
from governor.forecast.summary import Tally
from governor.journal.background import BackgroundRecords
from governor.journal.journal import Journal
from governor.model.errors import BadInput, FailureCode
from governor.model.policy import Policy
from governor.model.pools import Connect, Pool, groups_of
from governor.model.prices import Spending, dollars_text
from governor.model.words import duration, plural
from governor.model.work import Sender, Work, work_of
from governor.provider.sending import PoolSender
from governor.run.account import CANARY, FAILED_INSIDE, MAX_COST, REFUSED
from governor.run.longwaits import FINISH_BY, STOP_AFTER, held_text, too_late, too_late_text
from governor.run.pool_run import PoolCallbacks, PoolRun, RunOptions, learner_of, pool_run
from governor.run.steer import Commands, Signals, answered
from governor.run.via.group import GroupRun
from governor.telemetry.metrics import Notice
from governor.telemetry.progress import Display, snapshot
from governor.telemetry.watch import waiting_for

# Periods of the ticker's tasks, in seconds of the machine's clock.
TICK_S = 0.2
COMMANDS_S, TRACK_S, TEXTFILE_S = 0.4, 1.0, 15.0


@dataclass(frozen=True, slots=True)
class Leg:
    """The work of one leg.

    By pool: the work left (requests, tokens reserved; their models), the forecast, the canary's. `started`: the pools'
    policies without the changes of `paceline set`. `request_usd`: the expected cost of one request, until one has been
    answered.
    """

    journal: Journal
    pools: Mapping[str, Pool]
    started: Mapping[str, Policy]
    left: Mapping[str, tuple[int, float]]
    models: Mapping[str, frozenset[str]]
    expectations: Mapping[str, Expectation]
    canaries: Mapping[str, Expectation]
    spent: Spending
    request_usd: float = 0.0


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a leg. By pool: `why` it stopped ("" = no work was left), limits from its headers, its counts.

    `at_s`: seconds since the run began. `resent`: requests that a crash had left in flight. `signals`: the names of the
    signals received.
    """

    why: Mapping[str, str]
    granted: Mapping[str, Mapping[str, float]]
    tallies: Mapping[str, Tally]
    began_s: float
    at_s: float
    resent: int
    signals: tuple[str, ...]

    @property
    def ending(self) -> str:
        """The reasons to stop in a word, for the journal."""
        return ", ".join(sorted({why for why in self.why.values() if why})) or "finished"


class Announcer:
    """Tells a run's events. `requests`: of the whole run. `notices`: the messages sent to the webhook."""

    def __init__(self, shown: Display, manner: RunOptions, requests: int) -> None:
        self.shown = shown
        self.manner = manner
        self.notices: list[Notice] = []
        self._requests = requests
        self._textfile_failed = False

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.shown.say(line)

    def ended_requests(self) -> int:
        """Return how many requests have ended in this leg."""
        raise NotImplementedError

    def tell(self, event: str, text: str) -> None:
        """Send a message to the webhook, if there is one."""
        if self.manner.hook:
            content = {"event": event, "text": f"paceline: {text}", "ended": self.ended_requests()}
            self.notices.append(Notice(self.manner.hook, {**content, "requests": self._requests}))

    def write_textfile(self) -> None:
        """Write the current metrics into the collector's textfile, if one is named. A failure does not stop the run."""
        if self.manner.metrics is None or self.manner.textfile is None:
            return
        try:
            self.manner.metrics.write_textfile(self.manner.textfile)
        except BadInput as error:
            if not self._textfile_failed:
                self.say(f"note: {error}")
            self._textfile_failed = True
        else:
            self._textfile_failed = False


class LiveRun(Announcer):
    """One leg of a run. Create it and await `run()` once."""

    def __init__(self, leg: Leg, connect: Connect, shown: Display, manner: RunOptions) -> None:
        self._before = leg.journal.counts()
        super().__init__(shown, manner, self._before.requests)
        self.leg = leg
        self.connect = connect
        self.runs: dict[str, PoolRun] = {}
        self.began_s = 0.0
        self.resent = 0
        self._cost_before, self._unpriced_before = leg.spent.cost_usd, leg.spent.unpriced
        self._signalled = False

    async def run(self) -> Ended:
        """Run until no work is left or the run is stopped. Raise JournalError if nothing can be recorded any more."""
        self._begin()
        signals = Signals(self._on_signal)
        commands = Commands(self.leg.journal, self.runs, self.leg.started, self.say)
        commands.at_start(self.began_s)
        self._over_budget()
        self.shown.start()
        try:
            with signals.handled(self.manner.stopper):
                ticker = asyncio.create_task(self._tick(commands))
                try:
                    await self._until_over(signals, ticker)
                    await self._until_written(signals)
                finally:
                    ticker.cancel()
                    await asyncio.gather(ticker, return_exceptions=True)
        finally:
            self.leg.journal.give_up()  # nothing that is still unwritten is an answer
            self.shown.stop()
            await self._close_down()
        runs = self.runs.values()
        return Ended(
            why={run.name: run.ending or run.governor.stopped for run in runs},
            granted={run.name: run.alarms.granted for run in runs},
            tallies={run.name: run.meter.tally for run in runs},
            began_s=self.began_s,
            at_s=max(run.governor.now() for run in runs),
            resent=self.resent,
            signals=tuple(signals.names),
        )

    def _begin(self) -> None:
        """Begin the leg: recorders, governors, and the forecast, before anything is launched."""
        leg, loop = self.leg, asyncio.get_running_loop()

        def on_full(full: str) -> None:
            loop.call_soon_threadsafe(self._on_full, full)

        leg.journal.wait_for_room(on_full)
        stated = leg.journal.run()
        zero = loop.time() - leg.journal.now_s(self.manner.time_scale)
        policies = {name: pool.policy for name, pool in leg.pools.items()}
        begun = leg.journal.begin(policies, loop.time() - zero, records=self.manner.records)
        self.began_s, self.resent = loop.time() - zero, begun.resent
        for note in begun.notes:
            self.say(f"note: {note}")
        for name, pool in leg.pools.items():
            self._say_overdue(name, pool)
        leg.journal.forecast({name: e.to_json_dict() for name, e in leg.expectations.items()}, self.began_s)
        for name, pool in leg.pools.items():
            self.runs[name] = pool_run(
                pool,
                begun.recorders[name],
                leg.expectations[name],
                left=leg.left[name],
                models=leg.models[name],
                answered=leg.journal.counts(name).done > 0,
                seed=stated.seed,
                start_s=self.began_s,
                learner=learner_of(leg.journal, name, pool.policy),
                send=self._sender(pool),
                spent=leg.spent,
                manner=self.manner,
                said=self._said(name),
            )
            run = self.runs[name]
            held = held_text(run.governor, run.long_waits.moment)
            if held:
                self.say(self._of(name) + held)

    def _sender(self, pool: Pool) -> Sender:
        send = self.connect(pool)
        if isinstance(send, PoolSender):
            send.backgrounds = BackgroundRecords(self.leg.journal, pool.name)
        return send

    def _said(self, name: str) -> PoolCallbacks:
        def refused(line: str) -> None:
            self.say(self._of(name) + line)
            self.runs[name].governor.stop(REFUSED)

        return PoolCallbacks(self.say, refused, self._over_budget)

    def _say_overdue(self, name: str, pool: Pool) -> None:
        """Report requests whose time ran out while no process ran them: they end at once."""
        deadline_s = pool.policy.deadline_seconds
        count = self.leg.journal.overdue(name, self.began_s - deadline_s) if deadline_s > 0.0 else 0
        if count:
            self.say(
                f"{self._of(name)}{plural(count, 'request')} launched more than OPENAI_DEADLINE_SECONDS={deadline_s:g} "
                f"ago: given up; --retry-failed={FailureCode.DEADLINE_EXCEEDED} tries them anew"
            )

    async def _close_down(self) -> None:
        for name, run in self.runs.items():
            if self.manner.metrics is not None:
                self.manner.metrics.unwatch(name)
            await run.governor.aclose()
            if self._signalled and isinstance(run.send, PoolSender):
                await self._leave_backgrounds(name, run.send)
            await run.send.aclose()

    async def _leave_backgrounds(self, name: str, send: PoolSender) -> None:
        """Cancel the background responses under way if that was asked for; say which ones go on."""
        if self.manner.cancel_background and (cancelled := await send.cancel_backgrounds()):
            self.say(f"{self._of(name)}{plural(cancelled, 'background response')} cancelled")
        left = len(send.backgrounds.ids) if send.backgrounds is not None else 0
        if left:
            what = plural(left, "background response")
            self.say(f"{self._of(name)}{what} left with the provider: the same command asks for the answers")

    # ------------------------------------------------------------ the work

    async def _until_over(self, signals: Signals, ticker: asyncio.Task[None]) -> None:
        """Wait until every pool has no work left, or has stopped and nothing of it is in flight."""
        work = asyncio.create_task(self._work())
        stopping = asyncio.create_task(signals.stopping.wait())
        cancelling = asyncio.create_task(signals.cancelling.wait())
        try:
            await asyncio.wait({work, stopping, ticker}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                # A signal; or the ticker has failed, which requests in flight should not suffer for.
                self.stop(signals.names[0] if signals.names else FAILED_INSIDE)
                grace_s = self.manner.grace_s * self.manner.time_scale
                await asyncio.wait({work, cancelling}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                flying = self._in_flight()
                self.say(f"{plural(flying, 'request')} in flight cancelled: the same command sends them again")
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
            if ticker.done():
                ticker.result()
        finally:
            for task in (work, stopping, cancelling):
                task.cancel()
            await asyncio.gather(work, stopping, cancelling, return_exceptions=True)

    async def _until_written(self, signals: Signals) -> None:
        """Wait until every answer is on the disk; one more signal gives up those for which there is no room."""
        written = asyncio.create_task(self.leg.journal.flushed())
        enough = asyncio.create_task((signals.cancelling if signals.names else signals.stopping).wait())
        await asyncio.wait({written, enough}, return_when=asyncio.FIRST_COMPLETED)
        enough.cancel()
        if not written.done():
            self.leg.journal.give_up()
        await written

    def _on_full(self, full: str) -> None:
        """Report that the disk is full, or that there is room again ("")."""
        text = f"{full}: nothing more is sent, and answers are kept in memory until there is room" if full else ""
        self.say(f"{self.leg.journal.name}: {text or 'there is room again: the run continues'}")

    async def _work(self) -> None:
        """Run the canary, then everything."""
        count = self.manner.canary
        if count:
            await self._side_by_side(lambda run: islice(self._works(run, longest_first=False), count))
            await self.leg.journal.flushed()
            if not await self._canary_passed():
                self.stop(CANARY)
        await self._side_by_side(lambda run: self._works(run, longest_first=_is_longest_first(run)), self._groups())

    def _groups(self) -> dict[str, GroupRun]:
        """Return the groups of pools that share their requests, by the name of each pool in one."""
        found: dict[str, GroupRun] = {}
        for members in groups_of(self.leg.pools.values()):
            if len(members) > 1:
                runs = [self.runs[pool.name] for pool in members]
                names = tuple(run.name for run in runs)
                pending = self.leg.journal.pending(names, longest_first=_is_longest_first(runs[0]))
                group = GroupRun(runs, (each.work for each in pending), self.say)
                found |= dict.fromkeys(names, group)
        return found

    async def _side_by_side(
        self, source: Callable[[PoolRun], Iterator[Work]], groups: Mapping[str, GroupRun] | None = None
    ) -> None:
        async def one(run: PoolRun) -> None:
            group = (groups or {}).get(run.name)
            if group is not None:
                run.ending = await group.run(run, finalize=self.manner.finalize)
            else:
                run.ending = await run.governor.run(
                    source(run), run.send, finalize=self.manner.finalize, refusals=run.refusals
                )
            if run.ending == FailureCode.OUTWAITED:
                self.say(self._of(run.name) + run.long_waits.stopped_text())

        tasks = [asyncio.create_task(one(run)) for run in self.runs.values()]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if any(task.exception() for task in done):
                self.stop(FAILED_INSIDE)
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _works(self, run: PoolRun, *, longest_first: bool) -> Iterator[Work]:
        """Yield the work left in a pool, estimated under the settings of the moment at which it is pulled."""
        for pending in self.leg.journal.pending(run.name, longest_first=longest_first):
            yield work_of(pending.work.request, run.policy, before=pending.work)

    # ------------------------------------------------------------ stopping

    def stop(self, why: str) -> None:
        """Launch nothing more in any pool."""
        for run in self.runs.values():
            run.governor.stop(why)

    def _stopped(self) -> bool:
        return all(run.governor.stopped for run in self.runs.values())

    def _in_flight(self) -> int:
        return sum(run.meter.in_flight for run in self.runs.values())

    def _on_signal(self, name: str) -> None:
        if self._signalled:
            return  # cancelled requests are reported when they end
        self._signalled = True
        flying = self._in_flight()
        grace = f", {flying:,} in flight may end within {duration(self.manner.grace_s)}; again to cancel"
        self.say(f"{name}: nothing more is launched{grace if flying else ''}")

    async def _asked(self, question: str) -> bool:
        assert self.manner.ask is not None
        self.shown.stop()
        try:
            return await answered(self.manner.ask, question)
        finally:
            self.shown.start()

    def _over_budget(self) -> None:
        """Stop if the budget is used up; called after each launch and answer.

        Requests in flight count at the mean cost so far, and batches in a queue as committed. An answer that states no
        usage counts at its worst, or at the expected cost of a request if nothing bounds it.
        """
        limit, spent = self.manner.max_cost, self.leg.spent
        if limit is None or self._stopped():
            return
        answers = sum(run.meter.answers for run in self.runs.values()) - (spent.unpriced - self._unpriced_before)
        sure_usd = spent.cost_usd - self._cost_before - spent.assumed_usd
        mean = sure_usd / answers if answers and sure_usd > 0.0 else self.leg.request_usd
        untold_usd = spent.unpriced * self.leg.request_usd
        if spent.bound_usd + untold_usd + mean * self._in_flight() >= limit:
            what = f"--max-cost {dollars_text(limit)}: {dollars_text(spent.cost_usd + untold_usd)} spent"
            if untold_usd + spent.assumed_usd:
                what += f", {dollars_text(untold_usd + spent.assumed_usd)} of it assumed for answers without usage"
            if spent.committed:
                what += f", {dollars_text(spent.bound_usd - spent.cost_usd)} committed to batches in the queue"
            self.say(f"{what}: nothing more is launched")
            self.stop(MAX_COST)

    # ------------------------------------------------------------ the canary

    async def _canary_passed(self) -> bool:
        """Return whether the first requests behaved as expected, or the user wants to go on anyway."""
        findings = []
        for name, run in self.runs.items():
            if run.ending:
                return False
            tally, expected = run.meter.tally, self.leg.canaries[name]
            took_s = tally.last_s - self.began_s if tally.requests else 0.0
            seen = run.meter.measured()
            findings += [self._of(name) + found for found in canary_verdict(expected, seen, took_s)]
            did = f"{plural(tally.requests, 'request')} in {duration(took_s)}, {tally.failed:,} failed"
            lines = [f"{did}, {tally.throttled:,} 429s; forecast: {finish_text(expected)}"]
            lines += [canary_note(expected, seen), self._canary_cost(run)]
            for text in filter(None, lines):
                self.shown.inform(f"{self._of(name)}canary: {text}")
        for found in findings:
            self.say(f"canary: {found}")
        if not findings or self.manner.insist:
            return True
        if self.manner.ask is not None:
            return await self._asked("The canary is worse than forecast. Continue with the rest?")
        self.say("canary: stopped before the rest; change the settings, or repeat the command with --yes")
        return False

    def _canary_cost(self, run: PoolRun) -> str:
        """Return the cost of the rest of a pool at the canary's rate, as text."""
        spent, answers = self.leg.spent, run.meter.answers
        if spent.total_usd() is None or not answers or len(self.runs) > 1:
            return ""
        rest = (spent.cost_usd - self._cost_before) / answers * run.meter.left
        return f"at this rate the rest costs about {dollars_text(rest)}"

    def _of(self, name: str) -> str:
        return f"pool {name}: " if len(self.leg.pools) > 1 else ""

    # ------------------------------------------------------------ messages and the ticker

    async def _tick(self, commands: Commands) -> None:
        """Handle everything that is not an event of the driver."""
        before = self._before
        ticks = 0
        while True:
            await asyncio.sleep(TICK_S * self.manner.time_scale)
            ticks += 1
            lanes = list(self.runs.values())
            self.shown.show(snapshot(lanes, before.requests, before.done + before.failed, before.failed))
            now = max(run.governor.now() for run in lanes)
            if is_time(ticks, COMMANDS_S):
                commands.look(now)
            if is_time(ticks, TRACK_S):
                self._compare()
                self._look_ahead()
            if is_time(ticks, TEXTFILE_S):
                self.write_textfile()
            limit_s = self.manner.stop_after_s
            if limit_s is not None and now - self.began_s >= limit_s and not self._stopped():
                self.say(f"--stop-after {duration(limit_s)} is over: nothing more is launched")
                self.stop(STOP_AFTER)

    def _look_ahead(self) -> None:
        """End at once a pool that could launch nothing before its budget of time is over, rather than sleep."""
        manner = self.manner
        for name, run in self.runs.items():
            at, now = run.governor.next_launch_at(), run.governor.now()
            budgets = {STOP_AFTER: manner.stop_after_s, FINISH_BY: manner.finish_by_s}
            why = too_late(
                at - self.began_s,
                now - self.began_s,
                stop_after_s=manner.stop_after_s,
                finish_by_s=manner.finish_by_s,
                insist=manner.insist,
            )
            if why:
                moment = run.long_waits.moment(at)
                self.say(self._of(name) + too_late_text(why, at - now, moment, budgets.get(why)))
                run.governor.stop(why)

    def _compare(self) -> None:
        """Check whether each pool keeps to its forecast."""
        for name, run in self.runs.items():
            if run.governor.stopped:
                continue
            paused = bool(run.governor.s.paused)
            cause = "" if paused else waiting_for(run.governor.cause)
            line = run.track.look(run.governor.now() - self.began_s, run.meter.measured(paused), cause)
            if line:
                self.say(self._of(name) + line)
                if run.track.late_since_s >= 0.0:
                    self.tell("late", self._of(name) + line)

    def ended_requests(self) -> int:
        """Return how many requests have ended in this leg."""
        return sum(run.meter.tally.requests for run in self.runs.values())


def _is_longest_first(run: PoolRun) -> bool:
    return run.policy.launch_order == "longest_first"


def is_time(ticks: int, every_s: float) -> bool:
    """Return whether something that is done every so many seconds is due at this tick."""
    return ticks % round(every_s / TICK_S) == 0
