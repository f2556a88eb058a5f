"""Decide for each request between live calls, flex processing and the Batch API: cheapest, and still in time.

Theory of operation. The Batch API costs half and says nothing of when; a batch that is cancelled keeps what it has
answered. So waiting for it is free as long as live calls could still do the rest in time, and `decide` is asked again
and again, each time with what has been answered meanwhile:

* Everything that has a chance of being done by the Batch API is handed in, as far as its queue has room.
* While the rest can wait until the next decision, nothing is bought live. It can wait if live calls alone could do all
  of it from then on, or if in a share `confidence` of the drawn futures enough batches end in time for that.
* Otherwise the slack is gone, and live calls get as much as they can do until the next decision: first what is in no
  batch, and of this what gains least by waiting; then batches are cancelled, those that have not begun before others.
* Flex costs as much as a batch and uses the live limits, which wait meanwhile. Where a model has it, live calls run at
  its price from the start, for as long as its slow answers are in time.

Time and chance are arguments: seconds on the caller's timeline, and turnarounds as quantiles of equally probable
worlds. Within a world batches are independent; that the turnaround as a whole is not known is what worlds differ in.
A batch counts as done only when all of it is, though most answer their lines one by one.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from governor.model.keyed import normal_quantile
from governor.model.policy import Policy

CONFIDENCE = 0.98
# Share of live calls' own time that is kept in reserve: retries, slow answers, refused calls.
MARGIN = 0.1
# Documented: cancelling takes up to ten minutes, a flex answer up to fifteen.
CANCEL_S, FLEX_S = 600.0, 900.0
# After a refusal for lack of capacity, flex is left alone for so long.
FLEX_BLOCKED_S = 300.0
# Decisions are so far apart at the least, and so many until the deadline.
STEP_MIN_S, STEPS = 60.0, 60
# The slowest answers of a healthy provider, which end a run (docs/explanation/provider.md#latency).
TAIL_S = 60.0
# A batch that is this improbable to end in time is not handed in: live calls do it sooner for the same money.
HOPELESS = 0.02
# Batches are so small that a run has about this many, each of which can be moved without the others.
BATCHES, LINES_LEAST = 24, 20
WORLDS, LEVELS = 64, 32
# The median of a turnaround that was never measured may be off by this factor either way, in two thirds of the worlds.
ASSUMED_FACTOR = 1.5
# Spreads the draws of one batch evenly over the worlds, and those of different batches independently of each other.
_GOLDEN = 0.6180339887498949
Z95 = 1.6448536269514722


@dataclass(frozen=True, slots=True)
class Turnaround:
    """How long a batch takes from hand-in to its end, in seconds: for each world its quantiles, rising; inf = expires.

    `measured`: from so many ended batches, 0 = assumed.
    """

    worlds: tuple[tuple[float, ...], ...]
    measured: int = 0

    def drawn(self, world: int, u: float, age_s: float = 0.0) -> float:
        """Return the quantile `u` of a turnaround in a world, given that it is longer than `age_s`."""
        levels = self.worlds[world]
        past = bisect_right(levels, age_s) if age_s > 0.0 else 0
        place = past + u * (len(levels) - past)
        return levels[int(place)] if place < len(levels) else math.inf

    def done_by(self, within_s: float) -> float:
        """Return the probability that a batch ends within this time."""
        done = sum(bisect_right(levels, within_s) for levels in self.worlds)
        return done / sum(len(levels) for levels in self.worlds)


def turnaround_of(
    p50_s: float, p95_s: float, *, expires_s: float, factor: float = ASSUMED_FACTOR, measured: int = 0
) -> Turnaround:
    """Return a log-normal turnaround whose median is known up to a `factor`, itself log-normal."""
    sigma = math.log(p95_s / p50_s) / Z95
    between = math.log(factor)
    worlds = []
    for w in range(WORLDS):
        middle = p50_s * math.exp(between * normal_quantile((w + 0.5) / WORLDS))
        levels = (middle * math.exp(sigma * normal_quantile((i + 0.5) / LEVELS)) for i in range(LEVELS))
        worlds.append(tuple(level if level <= expires_s else math.inf for level in levels))
    return Turnaround(tuple(worlds), measured)


def fitted(times_s: Sequence[float], *, least: int = 3) -> tuple[float, float, float] | None:
    """Return P50, P95 and the factor within which the P50 is known, of measured turnarounds; None for too few."""
    if len(times_s) < least:
        return None
    logs = [math.log(max(each, 1.0)) for each in times_s]
    middle = math.fsum(logs) / len(logs)
    spread = max(math.sqrt(math.fsum((each - middle) ** 2 for each in logs) / (len(logs) - 1)), 0.05)
    # One standard error of the mean, wider while the spread itself rests on few.
    factor = math.exp(spread / math.sqrt(len(logs)) * (1.0 + 2.0 / len(logs)))
    return math.exp(middle), math.exp(middle + Z95 * spread), factor


def step_s(now: float, deadline: float) -> float:
    """Return how long a decision holds."""
    return max(STEP_MIN_S, (deadline - now) / STEPS)


def batch_lines(requests: int, most: int) -> int:
    """Return how many lines a batch has at most in a run of so many requests; `most`: what the provider takes."""
    return min(most, max(LINES_LEAST, math.ceil(requests / BATCHES)))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request in no batch and not given to live calls.

    `input_tokens`: in the Batch API's queue; `live_tokens`: charged by the live limit. `saving_usd`: of the Batch API
    over live. `flex`: its model has a flex price, and it may use it now.
    """

    key: int
    model: str
    input_tokens: int
    live_tokens: float
    saving_usd: float = 0.0
    flex: bool = False


@dataclass(frozen=True, slots=True)
class OpenBatch:
    """A batch under way. `left`, `left_tokens`: requests not yet answered, and what live calls would be charged."""

    key: int
    model: str
    input_tokens: int
    left: int
    left_tokens: float
    submitted_at: float
    is_begun: bool
    is_cancelling: bool = False


@dataclass(frozen=True, slots=True)
class LiveRate:
    """What live calls can do: tokens and requests per second (inf = no limit), the tokens that a full bucket holds,
    calls in flight, and seconds per answer in the mean and at worst.
    """

    tokens_per_s: float
    requests_per_s: float
    burst_tokens: float
    in_flight: int
    service_s: float
    tail_s: float

    def needs_s(self, requests: float, tokens: float) -> float:
        """Return how long live calls need for that many requests."""
        if requests <= 0:
            return 0.0
        by_tokens = max(0.0, tokens - self.burst_tokens) / self.tokens_per_s
        by_flight = requests * self.service_s / self.in_flight
        return max(by_tokens, requests / self.requests_per_s, by_flight) + self.tail_s


def live_rate(policy: Policy, service_s: float, tail_s: float = TAIL_S) -> LiveRate:
    """Return what live calls can do under these settings. `service_s`: mean time of an answer."""
    rpm, stagger_s = policy.rpm_limit, policy.stagger_seconds
    per_s = rpm * (1.0 - policy.tpm_headroom) / 60.0 if rpm else math.inf
    if stagger_s:
        per_s = min(per_s, 1.0 / stagger_s)
    tpm = policy.tpm_limit * (1.0 - policy.tpm_headroom)
    return LiveRate(
        tokens_per_s=tpm / 60.0 if tpm else math.inf,
        requests_per_s=per_s,
        burst_tokens=tpm if tpm else 0.0,
        in_flight=policy.max_concurrency,
        service_s=service_s,
        tail_s=service_s + tail_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """All that a decision rests on. `live_left`: requests and tokens given to live calls and not yet answered.

    `queue_tokens`: usable enqueued input tokens per model, inf = no limit. `file_requests`: most lines of a batch;
    smaller ones can be moved one by one. `step_s`: until the next decision.
    """

    now: float
    deadline: float
    waiting: Sequence[Candidate]
    batches: Sequence[OpenBatch]
    live: LiveRate
    live_left: tuple[int, float]
    queue_tokens: float
    file_requests: int
    step_s: float
    turnaround: Turnaround
    confidence: float = CONFIDENCE
    cancel_s: float = CANCEL_S
    flex_s: float = FLEX_S
    margin: float = MARGIN


@dataclass(frozen=True, slots=True)
class Placement:
    """Where requests go now, by key: `live`, `flex`, and `batch`, one tuple per batch; all others wait.

    `cancel`: keys of batches to cancel. `can_wait`: probability that nothing needs to be bought live yet; at
    most this, where it is below what is asked for.
    """

    live: tuple[int, ...] = ()
    flex: tuple[int, ...] = ()
    batch: tuple[tuple[int, ...], ...] = ()
    cancel: tuple[int, ...] = ()
    can_wait: float = 1.0


@dataclass(slots=True)
class _File:
    """A batch to be: requests of one model that fit into its queue."""

    model: str
    keys: list[int] = field(default_factory=list)
    input_tokens: int = 0
    live_tokens: float = 0.0


def decide(s: Situation) -> Placement:
    """Return where each waiting request goes, and which batches are cancelled."""
    hopeless = s.turnaround.done_by(s.deadline - s.now) < HOPELESS
    # What no queue ever holds can only go live, as everything does once no batch ends in time.
    at_once = [c for c in s.waiting if hopeless or c.input_tokens > s.queue_tokens]
    movable = [] if hopeless else [c for c in s.waiting if c.input_tokens <= s.queue_tokens]
    movable.sort(key=lambda c: (-c.saving_usd / max(c.live_tokens, 1e-9), c.key))
    files = _files(movable, s)
    can_wait = _can_wait(s, files, at_once)
    is_slow_enough = _flex_in_time(s)
    cancel: list[int] = []
    taken: list[Candidate] = []
    if can_wait < s.confidence:
        taken, cancel = _fed(s, movable, at_once)
    elif is_slow_enough:
        taken, _ = _fed(s, [c for c in movable if c.flex], at_once, cancels=False)
    if s.now + s.step_s + s.cancel_s > s.deadline:
        # Answers come with the end of their batch: the last moment to ask for those that are there.
        cancel = [b.key for b in s.batches if not b.is_cancelling]
    gone = {c.key for c in taken}
    if gone:
        files = _files([c for c in movable if c.key not in gone], s)
    now = [*at_once, *taken]
    return Placement(
        live=tuple(c.key for c in now if not (c.flex and is_slow_enough)),
        flex=tuple(c.key for c in now if c.flex and is_slow_enough),
        batch=tuple(tuple(file.keys) for file in _with_room(s, files)),
        cancel=tuple(cancel),
        can_wait=can_wait,
    )


def _need_s(s: Situation, requests: float, tokens: float) -> float:
    return s.live.needs_s(requests, tokens) * (1.0 + s.margin)


def _flex_in_time(s: Situation) -> bool:
    """Return whether all that is left could be answered slowly: at flex's pace, then in time all the same."""
    requests = s.live_left[0] + len(s.waiting) + sum(b.left for b in s.batches)
    tokens = s.live_left[1] + sum(c.live_tokens for c in s.waiting) + sum(b.left_tokens for b in s.batches)
    return s.now + s.flex_s + min(_need_s(s, requests, tokens), s.deadline) <= s.deadline


def _files(waiting: Sequence[Candidate], s: Situation) -> list[_File]:
    """Return waiting requests as batches to be, in order: one model each, no more than the queue holds."""
    files: list[_File] = []
    unfinished: dict[str, _File] = {}
    for c in waiting:
        file = unfinished.get(c.model)
        if file is None or len(file.keys) >= s.file_requests or file.input_tokens + c.input_tokens > s.queue_tokens:
            file = unfinished[c.model] = _File(c.model)
            files.append(file)
        file.keys.append(c.key)
        file.input_tokens += c.input_tokens
        file.live_tokens += c.live_tokens
    return files


def _enqueued(s: Situation) -> dict[str, float]:
    found: dict[str, float] = {}
    for batch in s.batches:
        found[batch.model] = found.get(batch.model, 0.0) + batch.input_tokens
    return found


def _with_room(s: Situation, files: Sequence[_File]) -> list[_File]:
    """Return the batches that the queues have room for now; each model's in order."""
    enqueued = _enqueued(s)
    found = []
    full: set[str] = set()
    for file in files:
        used = enqueued.get(file.model, 0.0) + file.input_tokens
        if file.model in full or used > s.queue_tokens:
            full.add(file.model)
            continue
        enqueued[file.model] = used
        found.append(file)
    return found


# ---------------------------------------------------------------- the slack


def _can_wait(s: Situation, files: Sequence[_File], at_once: Sequence[Candidate]) -> float:
    """Return the probability that everything is in time though nothing is bought live before the next decision."""
    begun_s = _need_s(s, s.live_left[0] + len(at_once), s.live_left[1] + sum(c.live_tokens for c in at_once))
    requests = sum(b.left for b in s.batches) + sum(len(f.keys) for f in files)
    tokens = sum(b.left_tokens for b in s.batches) + sum(f.live_tokens for f in files)
    if not requests:
        return 1.0
    if _fits(s, begun_s, requests, tokens, s.now + s.step_s):
        return 1.0
    worlds = len(s.turnaround.worlds)
    late = 0
    for w in range(worlds):
        late += not _world_is_in_time(s, files, begun_s, requests, tokens, w)
        if late > (1.0 - s.confidence) * worlds:
            break
    return 1.0 - late / worlds


def _fits(s: Situation, begun_s: float, requests: float, tokens: float, at: float) -> bool:
    """Return whether live calls alone do the rest if they get it at that moment."""
    if requests <= 0:
        return max(at, s.now + begun_s) <= s.deadline
    busy_s = max(0.0, begun_s - (at - s.now))
    return at + s.cancel_s + busy_s + _need_s(s, requests, tokens) <= s.deadline


def _world_is_in_time(
    s: Situation, files: Sequence[_File], begun_s: float, requests: float, tokens: float, world: int
) -> bool:
    """Return whether batches end early enough in one world for live calls to do the rest.

    The queues are filled again as batches end; live calls begin at the first moment that is safe.
    """
    turnaround, worlds = s.turnaround, len(s.turnaround.worlds)
    ends: list[tuple[float, int, str, float, float, float]] = []
    number = 0

    def draw(age_s: float) -> float:
        # The order of worlds must not be the order of the draws: a batch that is early is so in any world.
        return turnaround.drawn(world, ((world * 0.7548776662466927 + number * _GOLDEN) + 0.5 / worlds) % 1.0, age_s)

    for batch in s.batches:
        number += 1
        age_s = s.now - batch.submitted_at
        end_at = batch.submitted_at + draw(age_s) if not batch.is_cancelling else math.inf
        heapq.heappush(ends, (end_at, number, batch.model, batch.input_tokens, batch.left, batch.left_tokens))
    enqueued = _enqueued(s)
    coming: dict[str, list[_File]] = {}
    for file in reversed(files):
        coming.setdefault(file.model, []).append(file)

    def submit(model: str, at: float) -> None:
        nonlocal number
        waiting = coming.get(model, [])
        while waiting and enqueued.get(model, 0.0) + waiting[-1].input_tokens <= s.queue_tokens:
            file = waiting.pop()
            number += 1
            enqueued[model] = enqueued.get(model, 0.0) + file.input_tokens
            sizes = file.input_tokens, len(file.keys), file.live_tokens
            heapq.heappush(ends, (at + draw(0.0), number, model, *sizes))

    for model in list(coming):
        submit(model, s.now)
    while ends:
        end_at, _, model, input_tokens, left, left_tokens = heapq.heappop(ends)
        if end_at > s.deadline:
            return False
        enqueued[model] -= input_tokens
        requests -= left
        tokens -= left_tokens
        submit(model, end_at)
        if _fits(s, begun_s, requests, tokens, max(end_at, s.now + s.step_s)):
            return True
    return False


def _fed(
    s: Situation, by_gain: Sequence[Candidate], at_once: Sequence[Candidate], *, cancels: bool = True
) -> tuple[list[Candidate], list[int]]:
    """Return what live calls get besides `at_once`: enough to be busy until the next decision bears fruit.

    And the batches to cancel for it, whose rest comes back later.
    """
    requests = float(s.live_left[0] + len(at_once))
    tokens = s.live_left[1] + sum(c.live_tokens for c in at_once)
    wanted_s = s.step_s + s.cancel_s + s.live.tail_s
    taken: list[Candidate] = []
    for c in reversed(by_gain):
        if s.live.needs_s(requests, tokens) >= wanted_s:
            return taken, []
        taken.append(c)
        requests += 1
        tokens += c.live_tokens
    if not cancels:
        return taken, []
    for batch in s.batches:
        if batch.is_cancelling:
            requests += batch.left
            tokens += batch.left_tokens
    cancel: list[int] = []
    movable = [b for b in s.batches if not b.is_cancelling and b.left]
    # The latest is the one to end last; of those under way, the one with most left.
    for batch in sorted(movable, key=lambda b: (b.is_begun, -b.submitted_at, -b.left_tokens, b.key)):
        if s.live.needs_s(requests, tokens) >= wanted_s:
            break
        cancel.append(batch.key)
        requests += batch.left
        tokens += batch.left_tokens
    return taken, cancel
