"""A log of another client as a `Lesson`: what it says of each attempt, with settings that it never had.

Such a client has no settings of ours, so that there is no replay of the log itself. What can be checked is the
provider: `refused_alone` says how many of the log's own launches its model refuses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from governor.model.errors import BadInput
from governor.model.policy import Policy
from governor.model.requests import CAUSES
from sim.calibration.observed import Observed, workload_of
from sim.calibration.others import Count, OthersUse, gone_by_others
from sim.model import provider as prov
from sim.model.provider_config import ProviderConfig
from sim.scenario.columns import ANSWERED, LOST, OTHER, REFUSED, SERVER_FAULT
from sim.validation.recorded import Record, RecordedAttempt, RecordedLane
from sim.validation.twin import Lesson

# What became neither of an answer nor of a known failure ends its request, as a bad request does.
_SIMULATED = {
    ANSWERED: prov.OK,
    REFUSED: prov.THROTTLED,
    SERVER_FAULT: prov.SERVER_ERROR,
    LOST: prov.DROPPED,
    OTHER: prov.TOO_LARGE,
}


def lesson_of(observed: Observed, policy: Policy) -> Lesson:
    """Return a log's requests under settings of ours. Raise BadInput if it does not state when attempts were made."""
    rows = observed.rows()
    if not (observed.launched_s[rows] >= 0.0).all() or not (observed.took_s[rows] >= 0.0).all():
        raise BadInput(
            "a replay needs to know of each request when it was sent and how long it took: name the columns with "
            "--columns launched=NAME,latency=NAME",
            observed.label,
        )
    workload = workload_of(observed)
    order = np.arange(len(rows))
    if workload.has_arrivals:
        arrived = observed.arrived_s[rows]
        order = np.argsort(arrived - arrived.min(), kind="stable")
    place = {int(observed.request[row]): i for i, row in enumerate(rows[order].tolist())}
    tried: dict[tuple[int, int, int], RecordedAttempt] = {}
    count: dict[RecordedLane, int] = {}
    ended_s = np.zeros(len(rows))
    for i in range(len(observed)):
        at = place.get(int(observed.request[i]))
        if at is None or observed.launched_s[i] < 0.0:
            continue
        launched_s, took_s = float(observed.launched_s[i]), max(0.0, float(observed.took_s[i]))
        lane = at, 0
        count[lane] = count.get(lane, 0) + 1
        tokens = observed.tries.prompt_tokens[i] + observed.tries.output_tokens[i]
        used = float(tokens) if observed.kind[i] == ANSWERED else -1.0
        outcome, retry_s = _SIMULATED[int(observed.kind[i])], float(observed.retry_after_s[i])
        tried[(*lane, count[lane])] = RecordedAttempt(launched_s, launched_s + took_s, outcome, retry_s, used)
        ended_s[at] = max(ended_s[at], launched_s + took_s)
    is_answered = observed.answered[rows[order]]
    names = [workload.model(i) for i in range(len(workload))]
    return Lesson(
        pool="default",
        model=max(dict.fromkeys(names), key=names.count),
        policy=policy,
        seed=0,
        workload=workload,
        late_s=np.zeros(0),
        counts=_counts(observed, place),
        latency={},
        faults={},
        changes=(),
        record=Record(tried, ended_s, ~is_answered, np.full(len(CAUSES), np.nan)),
        answers=np.where(is_answered, workload.output_tokens, -1),
        finalize=False,
        began_s=0.0,
        makespan_s=float(ended_s.max()),
        throttled=int((observed.kind == REFUSED).sum()),
        launches=len(observed),
        unfinished=0,
        unanswered=int((~is_answered).sum()),
    )


def _counts(observed: Observed, place: dict[int, int]) -> list[Count]:
    """Return what the headers stated, by the rows of the workload."""
    found = []
    for count in observed.counts():
        at = place.get(int(observed.request[count.place]))
        if at is not None:
            count.place = at
            found.append(count)
    return found


def refused_alone(record: Record, charges: Any, provider: ProviderConfig, takings: tuple[OthersUse, ...]) -> int:
    """Return how many of a log's own launches the provider's model refuses, in their order and at their moments."""
    pp, ps = provider.params(), prov.ProviderState()
    events: list[tuple[float, int, Any]] = [(taking.at_s, 0, taking) for taking in takings]
    events += [(tried.launched_s, 2, (place, tried)) for (place, _, _), tried in record.tried.items()]
    events += [
        (tried.ended_s, 1, (place, tried)) for (place, _, _), tried in record.tried.items() if tried.outcome == prov.OK
    ]
    refused = 0
    for at_s, kind, what in sorted(events, key=lambda event: event[:2]):
        if kind == 0:
            gone_by_others(pp, ps, 0, what)
            continue
        charge = float(charges[what[0]])
        if kind == 1:
            prov.settled(pp, ps, 0, charge, what[1].used, max(at_s, ps.at))
        else:
            refused += prov.admitted(pp, ps, 0, charge, max(at_s, ps.at))[0] in (prov.THROTTLED, prov.SLOW_DOWN)
    return refused
