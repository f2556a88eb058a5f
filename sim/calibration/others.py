"""Network delays and the use by others on the quota, learnt from the headers in a journal.

Moments. An attempt takes longer than the provider's own time for it (`openai-processing-ms`) by its network delay, both
ways. The shortest such difference of a run is taken as the round trip without any queue; any delay beyond half of it is
attributed to the way there: behind others of the same burst, or for a first connection. Of the attempts launched at one
instant, the one after which the least remained was admitted last.

Others. The run's own attempts go through the provider's model (`sim/model/provider.py`) in order of admission. If a
header states more use than the model holds, others have used the difference since the count before. If it states less,
the moments were not exact, and the difference is offset against those of the minute before, then against the next ones.
After each count the model is set to the stated value, so errors do not accumulate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from governor.journal.rows import HeardAttempt
from governor.law import RPM, TPM
from governor.model.needs import STANDARD
from governor.model.requests import Outcome
from governor.model.work import TURNED_AWAY
from sim.model import provider as prov
from sim.model import windows as win
from sim.model.provider_config import ProviderConfig
from sim.model.windows import MINUTE_S

# Others' use is spread over pieces of this length; fewer if two counts are closer.
_PIECE_S = 1.0
PIECES_MOST = 600
# Takings below this share of the run's own charges can arise from inexact moments alone.
NOBODY_RATIO = 0.02


@dataclass(slots=True)
class Count:
    """One attempt whose answer was received. Times in seconds since the first launch.

    `place`: its request's place in the workload. `there_s`: delay to the provider, `round_s`: there and back; -1 =
    unknown. `charge`: assumed charge of a finalize pass; -1 = the workload states it. `stated`: dimension, limit,
    remaining. `retry_s`: the wait that a refusal states, -1 = none.
    """

    place: int
    is_first: bool
    launched_s: float
    ended_s: float
    there_s: float
    round_s: float
    let_in: bool
    charge: float
    used: float
    stated: tuple[tuple[int, float, float], ...]
    retry_s: float = -1.0

    @property
    def left(self) -> float:
        """Return what remained of the tokens per minute; 0 if not stated."""
        return next((remaining for d, _, remaining in self.stated if d == TPM), 0.0)


class OthersUse(NamedTuple):
    """Others used `amount` of dimension `d` (TPM or RPM) at `at_s` on the provider's clock."""

    at_s: float
    d: int
    amount: float


def counts_of(heard: Iterable[HeardAttempt], place: dict[int, int], clock: Callable[[float], float]) -> list[Count]:
    """Return a count for each attempt whose request is in `place`, in order of launch."""
    found = []
    for a, limits, processing_s in heard:
        if a.request not in place:
            continue
        took_s = a.finished_s - a.launched_s
        found.append(
            Count(
                place=place[a.request],
                is_first=a.attempt == 1 and a.lane == "main",
                launched_s=clock(a.launched_s),
                ended_s=clock(a.finished_s),
                there_s=-1.0,
                round_s=min(took_s, max(0.0, took_s - processing_s)) if processing_s >= 0.0 else -1.0,
                let_in=a.outcome not in TURNED_AWAY,
                charge=-1.0 if a.lane == "main" else float(max(0, a.charged_tokens)),
                used=float(a.prompt_tokens + a.output_tokens) if a.outcome is Outcome.OK else -1.0,
                stated=tuple((STANDARD[x.dimension], x.limit, x.remaining) for x in limits if x.dimension in STANDARD),
                retry_s=a.retry_after_s,
            )
        )
    found.sort(key=lambda count: count.launched_s)
    find_ways(found)
    return found


def find_ways(counts: Sequence[Count]) -> None:
    """Split each round trip into the way there and the way back; see the module's docstring."""
    known = [count.round_s for count in counts if count.round_s >= 0.0]
    if not known:
        return
    back_s, usual_s = min(known) / 2.0, float(np.median(known))
    for _, group in groupby(counts, key=lambda count: count.launched_s):
        burst = list(group)
        ways = sorted(max(0.0, (c.round_s if c.round_s >= 0.0 else usual_s) - back_s) for c in burst)
        for there_s, count in zip(ways, sorted(burst, key=lambda c: -c.left), strict=True):
            count.there_s = there_s


def ways_of(counts: Sequence[Count], requests: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (delay there, there and back) of each request's first attempt, typical ones if unknown. Shape (requests,).

    Zeros if no header has stated the provider's own time.
    """
    found = []
    for name in ("there_s", "round_s"):
        known = [getattr(count, name) for count in counts if getattr(count, name) >= 0.0]
        values = np.full(requests, float(np.median(known)) if known else 0.0)
        for count in counts:
            if count.is_first and getattr(count, name) >= 0.0:
                values[count.place] = getattr(count, name)
        found.append(values)
    return found[0], np.maximum(found[1], found[0])


def began_s(counts: Sequence[Count]) -> float:
    """Return when the first attempt reached the provider, seconds since the first launch; 0 if no delay is known."""
    return min((count.launched_s + count.there_s for count in counts if count.there_s >= 0.0), default=0.0)


class CountGap(NamedTuple):
    """The excess `more` of a count of dimension `d` over the model, accumulated between `since_s` and `at_s`.

    `before`: use according to the count before; `own`: use added by the attempt itself, by the model. `shows_all`: all
    that others took in between is still counted at its end: the bucket cannot have run empty, nothing was set back.
    """

    d: int
    since_s: float
    at_s: float
    more: float
    before: float
    own: float
    limit: float
    said: Count
    shows_all: bool


def gaps(counts: Sequence[Count], charges: NDArray[np.float64], provider: ProviderConfig) -> Iterator[CountGap]:
    """Yield each stated count's gap to the model, which is then set to the stated value, so errors do not accumulate.

    `charges`: the provider's charge for each request, shape (requests,). The provider's co-tenants are left out of the
    model.
    """
    pp = provider.with_(cotenant={"share": 0.0, "burst_s": 0.0, "period_s": 0.0}).params()
    ps = prov.ProviderState()
    prov.day_started(ps, float(provider.day_tokens_used), float(provider.day_requests_used))
    known = [count for count in counts if count.there_s >= 0.0]
    zero_s = began_s(counts)
    events = [(count.launched_s + count.there_s - zero_s, 0, count) for count in known]
    events += [
        (count.ended_s - (count.round_s - count.there_s) - zero_s, 1, count) for count in known if count.used >= 0.0
    ]
    events.sort(key=lambda event: event[:2])
    since_s, held = [0.0, 0.0], [0.0, 0.0]
    for at_s, is_end, count in events:
        charge = count.charge if count.charge >= 0.0 else float(charges[count.place])
        if is_end:
            prov.settled(pp, ps, 0, charge, count.used, max(at_s, ps.at))
            continue
        prov.advanced(pp, ps, 0, at_s)
        win.opened(pp, ps)
        stated = {d: (limit, remaining) for d, limit, remaining in count.stated}
        for d in (TPM, RPM):
            own = (charge if d == TPM else 1.0) if count.let_in else 0.0
            if d not in stated:
                if pp.limit[d] > 0.0:
                    _hold(pp, ps, d, ps.used[d] + own)
                continue
            limit, remaining = stated[d]
            used = limit - remaining
            passed_s = at_s - since_s[d]
            if pp.window[d] == win.BUCKET:
                shows_all = held[d] > limit * passed_s / MINUTE_S > 0.0
            else:
                shows_all = 0.0 < passed_s < MINUTE_S and (pp.window[d] == win.SLIDING or ps.used[d] >= held[d] > 0.0)
            yield CountGap(d, since_s[d], at_s, used - ps.used[d] - own, held[d], own, limit, count, shows_all)
            _hold(pp, ps, d, used)
            since_s[d], held[d] = at_s, used


def _hold(pp: Any, ps: Any, d: int, used: float) -> None:
    """Set the model's use of dimension `d` in the current minute to `used`."""
    more, ps.used[d] = used - ps.used[d], used
    if pp.window[d] == win.SLIDING:
        win.logged(pp, ps, d, more)


def takings(counts: Sequence[Count], charges: NDArray[np.float64], provider: ProviderConfig) -> tuple[OthersUse, ...]:
    """Return what others used, in order of time; empty if it is no more than inexact moments explain.

    `charges`: the provider's charge for each request, shape (requests,). The provider's co-tenants are left out of the
    model.
    """
    taken: tuple[list[tuple[CountGap, float]], ...] = ([], [])
    owed = [0.0, 0.0]
    for gap in gaps(counts, charges, provider):
        known = gap.more
        if not gap.said.let_in and provider.failed_requests_count:
            # A refusal that counts fills the bucket: only the wait that it states shows how full the bucket was before.
            known = _before_refusal(gap, charges, provider)
        if not math.isnan(known):
            more = known - owed[gap.d]
            while more < 0.0 and taken[gap.d] and taken[gap.d][-1][0].at_s >= gap.at_s - MINUTE_S:
                before, amount = taken[gap.d].pop()
                more += amount
                if more > 0.0:
                    taken[gap.d].append((before, more))
                    more = 0.0
            owed[gap.d] = max(0.0, -more)
            if more > 0.0:
                taken[gap.d].append((gap, more))
    found = [each for gap, amount in chain(*taken) for each in _spread(gap.d, amount, gap.since_s, gap.at_s)]
    total = sum(taking.amount for taking in found if taking.d == TPM)
    return tuple(sorted(found)) if total > NOBODY_RATIO * float(charges.sum()) else ()


def _before_refusal(gap: CountGap, charges: NDArray[np.float64], provider: ProviderConfig) -> float:
    """Return how much fuller than the model a bucket was when it refused: its wait is (used + charge - limit) / rate.

    nan if the wait does not show it: another dimension may have refused, or waits are not those of a bucket.
    """
    said = gap.said
    requests_left = min((left for d, _, left in said.stated if d != TPM), default=1.0)
    exact = provider.window == "bucket" and provider.retry_after == "ms" and provider.retry_after_min_s == 0.0
    if gap.d != TPM or not exact or said.retry_s <= 0.0 or requests_left < 1.0:
        return math.nan
    charge = said.charge if said.charge >= 0.0 else float(charges[said.place])
    model = gap.limit - said.left - gap.more
    return gap.limit * (1.0 + said.retry_s / MINUTE_S) - charge - model


def _spread(d: int, amount: float, since_s: float, until_s: float) -> list[OthersUse]:
    if amount <= 0.0:
        return []
    pieces = min(PIECES_MOST, max(1, math.ceil((until_s - since_s) / _PIECE_S)))
    length_s = (until_s - since_s) / pieces
    return [OthersUse(since_s + (i + 0.5) * length_s, d, amount / pieces) for i in range(pieces)]


def gone_by_others(pp: Any, ps: Any, seed: int, taking: OthersUse) -> None:
    """Book the use by others."""
    prov.advanced(pp, ps, seed, max(taking.at_s, ps.at))
    prov.taken_by_others(pp, ps, taking.d, taking.amount)
