"""One quota over several processes, simulated: the live half's own driver, members and decisions, on virtual time.

Theory of operation. All processes are governors in one event loop whose clock jumps from timer to timer. What a process
costs is not modelled: a decision takes no time but its round trips. A process that dies says nothing more, what it had
in flight is charged and never heard of, and after a while a new one takes over what it had not finished.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from governor import law
from governor.forecast.summary import Summary, Tally
from governor.law import MAIN, TPM
from governor.model.keyed import attempt_key
from governor.model.needs import of_amounts
from governor.model.requests import CAUSES, CHAT, Answer, Attempt, Limit, Outcome, Request, Sizes
from governor.model.work import Job, Observer, Work
from governor.sharedquota.image import HEAD, SERVER_BYTES
from governor.sharedquota.interfaces import EPOCH_S, LEASE_S, Server, StoreLostError, StoreReading
from governor.sharedquota.shared import SharedGovernor
from sim.des.run import CHARGED, launch_order
from sim.des.virtual_loop import run_virtual
from sim.experiment import experiment
from sim.experiment.experiment import Case, case_of
from sim.model import provider as prov
from sim.scenario.scenario import Scenario

# As long as it takes to notice that a process is gone, and to start another.
RESTART_S = 5.0
_WAITED = [f"waited_{cause}_s" for cause in CAUSES[1:]]


class SimulatedStore:
    """A simulated store and its distance. `lose()` restarts it with an empty memory.

    `reads`, `wins`, `late`: turns taken, decisions made, and decisions that another process made first.
    """

    def __init__(self, rtt_s: float, lease_s: float = LEASE_S) -> None:
        self.rtt_s = rtt_s
        self.lease_s = lease_s
        self.loop = asyncio.get_running_loop()
        self.reads = self.wins = self.late = 0
        self._starts = 0
        self.up_since = -inf
        self.is_up = True
        self._begin()

    def _begin(self) -> None:
        self._starts += 1
        self.server = f"server-{self._starts}".encode().ljust(40, b"\0")
        self.image = b""
        self.inbox: list[bytes] = []
        self.leases: dict[str, int] = {}
        self.recovery: dict[str, bytes] = {}
        self.lists: dict[tuple[str, int], deque[bytes]] = {}
        self.bells: dict[tuple[str, int], asyncio.Event] = {}

    def lose(self, for_s: float) -> None:
        """Away for so long, and then empty."""
        self.is_up = False
        for bell in self.bells.values():
            bell.set()
        self.loop.call_later(for_s, self._back)

    def _back(self) -> None:
        self._begin()
        self.is_up, self.up_since = True, self.loop.time()

    def flush(self) -> None:
        """Everything is deleted; the server goes on, and who waits for news goes on waiting."""
        self.image, self.inbox, self.leases, self.recovery = b"", [], {}, {}
        for each in self.lists.values():
            each.clear()

    def now_us(self) -> int:
        """Return the server's clock, microseconds since 1970."""
        return EPOCH_S * 1_000_000 + int(self.loop.time() * 1e6)

    def renewed(self, owner: str) -> None:
        """Renew the owner's lease."""
        self.leases[owner] = (self.now_us() + round(self.lease_s * 1e6)) // 1000

    def reading(self) -> StoreReading:
        """Return the present content."""
        self.reads += 1
        return StoreReading(self.now_us(), self.image, list(self.inbox), dict(self.leases))

    def tell(self, key: tuple[str, int], news: bytes) -> None:
        """Put news into an owner's list."""
        self.lists.setdefault(key, deque()).append(news)
        self.bell(key).set()

    def bell(self, key: tuple[str, int]) -> asyncio.Event:
        """Return the event that is set when something is put into that list."""
        return self.bells.setdefault(key, asyncio.Event())


class SimulatedStoreClient:
    """One member's way to the shelf: a `member.Store`. `dies()`: nothing of it reaches the shelf any more."""

    def __init__(self, shelf: SimulatedStore, owner: str) -> None:
        self._shelf = shelf
        self._owner = owner
        self._is_dead = False
        self._server = b""

    @property
    def place(self) -> str:
        return "the store"

    def dies(self) -> None:
        """Drop whatever this process sends from now on."""
        self._is_dead = True

    async def _on_the_way(self) -> None:
        await asyncio.sleep(self._shelf.rtt_s / 2)
        if self._is_dead:
            await asyncio.get_running_loop().create_future()
        if not self._shelf.is_up or (self._server and self._server != self._shelf.server):
            raise StoreLostError("it was stopped")

    async def connect(self) -> Server:
        self._server = b""
        await self._on_the_way()
        shelf = self._shelf
        self._server = shelf.server
        return Server(shelf.server.rstrip(b"\0"), shelf.loop.time() - shelf.up_since)

    async def close(self) -> None:
        pass

    async def tell(self, batch: bytes) -> StoreReading:
        await self._on_the_way()
        shelf = self._shelf
        shelf.renewed(self._owner)
        if batch and shelf.image[:SERVER_BYTES] == self._server:
            shelf.inbox.append(batch)
        reading = shelf.reading()
        await self._on_the_way()
        return reading

    async def replace(
        self, head: bytes, image: bytes, taken: int, news: Mapping[tuple[str, int], bytes]
    ) -> StoreReading | None:
        await self._on_the_way()
        shelf = self._shelf
        late: StoreReading | None = None
        if shelf.image[: HEAD.size] != head or (taken < 0 and self._owner not in shelf.recovery):
            shelf.late += 1
            late = shelf.reading()
        else:
            shelf.wins += 1
            shelf.image = image
            shelf.inbox = [] if taken < 0 else shelf.inbox[taken:]
            if taken < 0:
                shelf.recovery = {}
            for key, each in news.items():
                shelf.tell(key, each)
        await self._on_the_way()
        return late

    async def recovery(self, record: bytes, doubted: bytes, *, removes: bool) -> tuple[StoreReading, dict[str, bytes]]:
        await self._on_the_way()
        shelf = self._shelf
        records: dict[str, bytes] = {}
        head = shelf.image[: HEAD.size]
        if head[:SERVER_BYTES] != self._server or head == doubted:
            if removes and head == doubted:
                shelf.image = b""
            shelf.renewed(self._owner)
            shelf.recovery.setdefault("", str(shelf.now_us() // 1000).encode())
            shelf.recovery[self._owner] = record
            for key in list(shelf.bells):
                shelf.tell(key, b"")
            records = dict(shelf.recovery)
        reading = shelf.reading()
        await self._on_the_way()
        return reading, records

    async def news(self, entry: int) -> list[bytes]:
        key = (self._owner, entry)
        shelf = self._shelf
        while not shelf.lists.get(key):
            bell = shelf.bell(key)
            bell.clear()
            await bell.wait()
            if not shelf.lists.get(key):
                await self._on_the_way()
        found = list(shelf.lists[key])
        shelf.lists[key].clear()
        await self._on_the_way()
        return found


# ---------------------------------------------------------------- the provider


class SimulatedSender:
    """A sender around `sim/model/provider.py`: arrivals are decided at once and answered in their time.

    `used_max`: tokens per minute in use, at most. `sent`: by request, how often it was let in.
    """

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        self.seed = seed
        self.state = prov.ProviderState()
        prov.day_started(self.state, case.grant.day_tokens_used, case.grant.day_requests_used)
        self.used_max = 0.0
        self.sent: Counter[int] = Counter()
        c = case.columns
        self._columns = c.cap.tolist(), c.output_tokens.tolist(), c.prompt_tokens.tolist(), c.recorded_s.tolist()

    async def send(self, job: Job, timeout_s: float) -> Answer:
        """See `driver.Send`."""
        pp, ps, seed, i = self.case.provider, self.state, self.seed, job.index
        loop = asyncio.get_running_loop()
        cap, uncapped, prompt, recorded_s = (column[i] for column in self._columns)
        most = cap if job.lane == MAIN else self.case.finalize_max_tokens
        output = min(uncapped, most) if most > 0 else uncapped
        charge = float(job.charge)
        key = attempt_key(job.lane, job.tries)
        outcome, service_s, _, retry_after_s = prov.answered(
            pp, ps, seed, i, key, charge, float(output), recorded_s, loop.time()
        )
        self.used_max = max(self.used_max, ps.used[TPM])
        limits = self._limits(outcome)
        if outcome == prov.OK:
            self.sent[i] += 1
        await asyncio.sleep(service_s)
        if outcome == prov.DROPPED:
            return Answer(Outcome.DROPPED)
        if outcome == prov.OK:
            prov.settled(pp, ps, seed, charge, float(prompt + output), loop.time())
        if pp.counts == prov.COUNTS_AT_ANSWER:
            prov.advanced(pp, ps, seed, loop.time())
            limits = self._limits(outcome)
        if outcome != prov.OK:
            kind, status = experiment.OUTCOMES[outcome], experiment.STATUS[outcome]
            return Answer(kind, status, retry_after_s=retry_after_s, limits=limits)
        cut_off = job.lane == MAIN and 0 < cap < uncapped
        return Answer(
            Outcome.OK,
            200,
            used_prompt_tokens=prompt,
            used_output_tokens=output,
            cut_off=cut_off,
            has_text=not (cut_off and prov.cut_without_text(pp, seed, i)),
            limits=limits,
        )

    def _limits(self, outcome: int) -> tuple[Limit, ...]:
        """Return the counts that the headers state."""
        pp, ps = self.case.provider, self.state
        if not prov.states_counts(pp, outcome not in CHARGED):
            return ()
        d = prov.requests_dimension(pp, ps)
        stated = [(TPM, "TPM")] if pp.limit[TPM] > 0.0 else []
        stated += [(d, "RPM" if d == prov.RPM else "RPD")] if d >= 0 else []
        return tuple(Limit(name, prov.limit_now(pp, ps, d), prov.remaining(pp, ps, d)) for d, name in stated)


# ---------------------------------------------------------------- a batch over several processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """The processes. `crash_at`: when the first dies; `lost_at`: when the store is lost, for `lost_s`."""

    processes: int
    rtt_s: float = 0.001
    crash_at: float = inf
    lost_at: float = inf
    lost_s: float = 1.0


@dataclass(slots=True)
class SharedRun:
    """One run. `launches`: by process, their times. `decisions`, `late`: of the store; `turns`: readings of it.

    `used_max`: the most tokens that the provider had in use. `resent`: requests that it let in more than once, through
    a crash. `stopped`: why processes ended before their work did.
    """

    summary: Summary
    launches: list[list[float]]
    decisions: int
    late: int
    turns: int
    used_max: float
    resent: int
    stopped: list[str]

    def shares(self) -> list[float]:
        """Return each process's launches, over an equal share, until the first has launched all of its own."""
        until = min((max(times) for times in self.launches if times), default=0.0)
        counts = [sum(at <= until for at in times) for times in self.launches]
        return [count * len(counts) / max(1, sum(counts)) for count in counts]

    def to_json_dict(self) -> dict[str, Any]:
        """Return the summary, and what the arrangement adds to it."""
        added = {
            "processes": len(self.launches),
            "shares": self.shares(),
            "decisions": self.decisions,
            "late_decisions": self.late,
            "turns": self.turns,
            "used_tokens_max": self.used_max,
            "resent": self.resent,
            "stopped": self.stopped,
        }
        return {**self.summary.to_json_dict(), "shared": added}


class _Counts(Observer):
    """One process's part of the tally."""

    def __init__(self, tally: Tally, times: list[float], open_: dict[int, Work]) -> None:
        self._tally = tally
        self._times = times
        self._open = open_
        self._loop = asyncio.get_running_loop()

    def launched(self, job: Job, now: float) -> None:
        self._tally.launched()
        self._times.append(self._loop.time())

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        prompt, output = max(attempt.prompt_tokens, 0), max(attempt.output_tokens, 0)
        throttled = attempt.outcome in (Outcome.THROTTLED, Outcome.SLOW_DOWN)
        self._tally.answered(attempt.reserved_tokens, attempt.charged_tokens, prompt + output, throttled)
        for i, name in enumerate(_WAITED, 1):
            self._tally.waits_s[i] += getattr(attempt, name)
        if attempt.outcome is Outcome.OK:
            service_s = attempt.finished_s - attempt.launched_s
            if attempt.lane == "main":
                self._tally.work.add(0.0, attempt.charged_tokens, prompt + output, service_s)
            else:
                self._tally.work.finalized(attempt.charged_tokens, prompt + output)

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        self._tally.ended(failure, self._loop.time())
        del self._open[request.index]

    def deferred(self, cause: int) -> None:
        self._tally.deferrals[cause] += 1


@dataclass(slots=True)
class _Run:
    """The state that all processes of a run share."""

    case: Case
    seed: int
    shelf: SimulatedStore
    provider: SimulatedSender
    tally: Tally
    launches: list[list[float]]
    stores: list[list[SimulatedStoreClient]]
    stopped: list[str] = field(default_factory=list)

    async def process(self, number: int, open_: dict[int, Work]) -> None:
        """Run one process from its start to its end, or until it is cancelled."""

        def store(owner: str) -> SimulatedStoreClient:
            self.stores[number].append(SimulatedStoreClient(self.shelf, owner))
            return self.stores[number][-1]

        counts = _Counts(self.tally, self.launches[number], open_)
        state = None
        if number == 0:  # the process that begins the pool knows the day's earlier use
            state = law.State()
            grant = self.case.grant
            used = of_amounts({law.TPD: grant.day_tokens_used, law.RPD: grant.day_requests_used})
            law.started(self.case.params, state, used, 0.0)
        governor = SharedGovernor(self.case.params, store=store, seed=self.seed, observer=counts, state=state)
        finalize = self.case.finalize_max_tokens > 0
        why = await governor.run(iter(list(open_.values())), self.provider.send, finalize=finalize)
        await governor.aclose()
        if why:
            self.stopped.append(why)

    async def mortal(self, number: int, open_: dict[int, Work], dies_at: float) -> None:
        """Run a process that dies, and another that takes over."""
        life = asyncio.create_task(self.process(number, open_))
        await asyncio.wait({life}, timeout=dies_at - self.shelf.loop.time())
        if life.done():
            return life.result()
        for store in self.stores[number]:
            store.dies()
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)
        await asyncio.sleep(RESTART_S)
        await self.process(number, open_)


def shared_run(scenario: Scenario, arrangement: Arrangement, seed: int | None = None) -> SharedRun:
    """Return the scenario's batch, dealt out to so many processes that share its quota."""
    case = case_of(scenario)
    assert not case.from_trace, "a batch"
    n = arrangement.processes
    hands: list[dict[int, Work]] = [{} for _ in range(n)]
    for place, work in enumerate(_works(scenario, case)):
        hands[place % n][work.request.index] = work

    async def main() -> SharedRun:
        shelf = SimulatedStore(arrangement.rtt_s)
        run = _Run(
            case=case,
            seed=scenario.seed if seed is None else seed,
            shelf=shelf,
            provider=SimulatedSender(case, scenario.seed if seed is None else seed),
            tally=Tally(),
            launches=[[] for _ in range(n)],
            stores=[[] for _ in range(n)],
        )
        if arrangement.lost_at < inf:
            shelf.loop.call_at(arrangement.lost_at, shelf.lose, arrangement.lost_s)
        lives = [
            run.mortal(i, hand, arrangement.crash_at) if i == 0 and arrangement.crash_at < inf else run.process(i, hand)
            for i, hand in enumerate(hands)
        ]
        await asyncio.gather(*lives)
        resent = sum(times > 1 for times in run.provider.sent.values())
        summary = run.tally.summary(case.grant)
        used_max = run.provider.used_max
        return SharedRun(summary, run.launches, shelf.wins, shelf.late, shelf.reads, used_max, resent, run.stopped)

    return run_virtual(main())


def _works(scenario: Scenario, case: Case) -> Iterator[Work]:
    """Return the batch in order of launch."""
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
