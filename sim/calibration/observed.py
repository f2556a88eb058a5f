"""Observed attempts as columns: the one form into which every source of `calibrate` is read.

Theory of operation. There is one row per attempt, including refused ones, since refusals carry information on the
limit. Sizes are those of the request, except prompt tokens, which are the measured ones if an answer stated them.
Values that a source does not state are -1. Times are seconds from the first one in the log; if only the end of an
attempt is known, its start is the end minus its duration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from governor.batchapi.limits import COMPLETED
from governor.journal.journal import Journal
from governor.model.errors import BadInput
from governor.model.needs import STANDARD
from governor.model.policy import Policy
from governor.model.requests import BATCH, Outcome, Request, Sizes
from sim.calibration.others import Count, find_ways
from sim.model.synthetic import similar_outputs
from sim.model.workload import MEASURED, Real, Workload, constant
from sim.scenario.columns import ANSWERED, OTHER, REFUSED, kind_of_attempt


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """Attempts in order of launch; arrays of one length, -1 = not known.

    `tries`: their sizes (`output_tokens` of those answered, else 0). `request`: a number per request. `final`: whether
    this answer ended its request and was no finalize pass. `first_s`: until the first token. `stated`: the headers'
    tokens limit and remaining, requests limit and remaining, shape (attempts, 4). `policy`: the settings of the run,
    if a journal states them. `batch`: all requests were present at the start. `outcomes`: whether outcomes are stated.
    `turnarounds_s`: of the batches that the Batch API completed, by its own stamps.
    """

    label: str
    tries: Workload
    request: NDArray[np.int64]
    final: NDArray[np.bool_]
    kind: NDArray[np.int64]
    launched_s: Real
    arrived_s: Real
    took_s: Real
    first_s: Real
    processing_s: Real
    retry_after_s: Real
    stated: Real
    day: NDArray[np.bool_]
    policy: Policy | None = None
    batch: bool = False
    outcomes: bool = True
    notes: tuple[str, ...] = ()
    turnarounds_s: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.request)

    @property
    def answered(self) -> NDArray[np.bool_]:
        """Return which attempts were answered, shape (attempts,)."""
        return self.kind == ANSWERED

    def rows(self) -> NDArray[np.int64]:
        """Return the attempts that represent their requests: the last answer of each request, or else its last try.

        Lost requests are included because they used the quota as well. A refused row without an id belongs to no
        request.
        """
        answers = _last_of_each(self.request, self.final & self.answered)
        tries = _last_of_each(self.request, self.request >= 0)
        lost = tries[~np.isin(self.request[tries], self.request[answers])]
        return np.sort(np.concatenate([answers, lost]))

    def counts(self) -> list[Count]:
        """Return the attempts whose moment is known, with what their headers stated, as `others` reads them."""
        found = []
        for i in np.flatnonzero(self.launched_s >= 0.0).tolist():
            took_s = max(0.0, float(self.took_s[i]))
            processing_s = float(self.processing_s[i])
            stated = []
            limit, left, requests, requests_left = self.stated[i].tolist()
            if limit > 0.0 and left >= 0.0:
                stated.append((0, limit, left))
            if requests > 0.0 and requests_left >= 0.0 and not self.day[i]:
                stated.append((1, requests, requests_left))
            let_in = self.kind[i] != REFUSED
            used = float(self.tries.prompt_tokens[i] + self.tries.output_tokens[i]) if self.answered[i] else -1.0
            found.append(
                Count(
                    place=i,
                    is_first=False,
                    launched_s=float(self.launched_s[i]),
                    ended_s=float(self.launched_s[i]) + took_s,
                    there_s=0.0,
                    round_s=max(0.0, took_s - processing_s) if processing_s >= 0.0 else 0.0,
                    let_in=bool(let_in),
                    charge=-1.0,
                    used=used,
                    stated=tuple(stated),
                    retry_s=float(self.retry_after_s[i]),
                )
            )
        found.sort(key=lambda count: count.launched_s)
        if (self.processing_s >= 0.0).any():
            find_ways(found)
        return found


TEXT_DEFAULTS = {"chars": -1, "role_chars": 4, "messages": 1, "images": 0, "tools": 0, "n": 1, "endpoint": 0}


def observed_of(label: str, rows: Mapping[str, Sequence[Any]], *, source: str, notes: tuple[str, ...] = ()) -> Observed:
    """Return the attempts of checked columns: see `logs.ROLES` for their names; an absent role is unknown.

    Raise BadInput if there is no answer among them.
    """
    count = len(next(iter(rows.values())))

    def numbers(role: str, absent: float = -1.0) -> Real:
        return np.asarray(rows[role], np.float64) if role in rows else constant(absent, count, np.float64)

    def whole(role: str) -> NDArray[np.int64]:
        default = TEXT_DEFAULTS.get(role, -1)
        return numbers(role).astype(np.int64) if role in rows else constant(default, count)

    kind = numbers("kind", ANSWERED).astype(np.int64)
    launched, finished, took = numbers("launched"), numbers("finished"), numbers("latency")
    arrived = numbers("arrival")
    if not (launched >= 0.0).any() and not ((finished >= 0.0) & (took >= 0.0)).any() and (arrived >= 0.0).any():
        # The log states one moment per attempt: without it, its headers could not be used at all.
        launched = arrived
        notes = (*notes, f"{label}: its only moments are taken for those at which attempts were sent")
    launched = np.where((launched < 0.0) & (finished >= 0.0) & (took >= 0.0), finished - took, launched)
    took = np.where((took < 0.0) & (finished >= 0.0) & (launched >= 0.0), finished - launched, took)
    known = [values[values >= 0.0].min() for values in (launched, arrived) if (values >= 0.0).any()]
    zero = min(known, default=0.0)
    launched, arrived = (np.where(values >= 0.0, values - zero, -1.0) for values in (launched, arrived))
    arrived = np.where(arrived < 0.0, launched, arrived)
    prompt, output = whole("prompt"), whole("output")
    ids = rows["id"] if "id" in rows else [""] * count
    order = np.argsort(np.where(launched >= 0.0, launched, arrived), kind="stable")
    code: dict[str, int] = {}
    numbered = (code.setdefault(x, len(code)) if x else -2 - i for i, x in enumerate(ids))
    request = np.fromiter(numbered, np.int64, count)
    code.clear()
    # The size known from one attempt of a request holds for its other attempts, since refusals state no usage.
    prompt = _from_siblings(request, prompt)
    usable = (kind == ANSWERED) & (prompt >= 0) & (output >= 0)
    if not usable.any():
        raise BadInput("no answered request with prompt and output tokens in it: nothing to learn from", source)
    chars = whole("chars")
    prompt_known = _filled(prompt, prompt[usable])
    tries = Workload(
        endpoint=whole("endpoint"),
        prompt_tokens=prompt_known,
        chars=np.where(chars >= 0, chars, 4 * prompt_known),
        role_chars=whole("role_chars"),
        messages=whole("messages"),
        images=whole("images"),
        tools=whole("tools"),
        n=np.maximum(1, whole("n")),
        max_tokens=whole("max_tokens"),
        output_tokens=np.maximum(0, output),
        arrival_s=np.maximum(0.0, arrived),
        recorded_s=took,
        custom_ids=[x or f"request-{i + 1}" for i, x in enumerate(ids)],
        models=_one_or_all(rows["model"]) if "model" in rows else None,
    )
    # A log in order of time, as most are, is not copied.
    sort: Any = slice(None) if (np.diff(order) == 1).all() else order
    tries = tries if isinstance(sort, slice) else tries.take(order)
    stated = [numbers(role) for role in STATED] if any(role in rows for role in STATED) else None
    lane = numbers("finalize", 0.0)
    found = Observed(
        label=label,
        tries=tries,
        request=request[sort],
        final=((lane == 0.0) & usable)[sort],
        kind=np.where((kind == ANSWERED) & ~usable, OTHER, kind)[sort],
        launched_s=launched[sort],
        arrived_s=arrived[sort],
        took_s=took[sort],
        first_s=numbers("first_token")[sort],
        processing_s=numbers("processing")[sort],
        retry_after_s=numbers("retry_after")[sort],
        stated=np.broadcast_to(-1.0, (count, 4)) if stated is None else np.column_stack(stated)[sort],
        day=numbers("day", 0.0)[sort] > 0.0,
        outcomes="kind" in rows,
        notes=notes,
    )
    # If a request was answered several times, the last answer counts.
    final = np.zeros(count, np.bool_)
    final[_last_of_each(found.request, found.final)] = True
    again = int(found.final.sum()) - int(final.sum())
    if again:
        notes = (*notes, f"{label}: {again:,} answers are to requests (by id) with a later one, which counts alone")
    return replace(found, final=final, notes=notes)


def _filled(prompt: NDArray[np.int64], known: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return prompts with unknown ones (-1) replaced by shuffled quantiles of the known, with the same distribution."""
    missing = np.flatnonzero(prompt < 0)
    filled = prompt.copy()
    ranks = (np.random.default_rng(0).permutation(len(missing)) + 0.5) / max(1, len(missing))
    filled[missing] = np.sort(known)[(ranks * len(known)).astype(np.int64)]
    return filled


STATED = ("limit_tokens", "remaining_tokens", "limit_requests", "remaining_requests")


def _from_siblings(request: NDArray[np.int64], prompt: NDArray[np.int64]) -> NDArray[np.int64]:
    last = _last_of_each(request, prompt >= 0)
    if not len(last):
        return prompt
    place = np.minimum(np.searchsorted(request[last], request), len(last) - 1)
    return np.where(request[last][place] == request, prompt[last][place], -1)


def _last_of_each(request: NDArray[np.int64], where: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the last attempt of each request among those selected, in order of request number."""
    places = np.flatnonzero(where)
    _, from_end = np.unique(request[places][::-1], return_index=True)
    return places[len(places) - 1 - from_end]


def _one_or_all(names: Sequence[str]) -> str | list[str]:
    return names[0] if len(set(names)) == 1 else list(names)


# ---------------------------------------------------------------- journals


def of_journal(path: str, pool: str = "") -> Observed:
    """Return the attempts of one pool in a Paceline journal.

    `pool`: "" = the only one. Each has a provider and a quota of its own: raise BadInput if there are several, no pool
    of that name, or no attempt that has ended.
    """
    with Journal.open(path) as journal:
        requests: dict[int, Request] = {result.request.index: result.request for result in journal.results()}
        requests |= {request.index: request for request in journal.unfinished()}
        heard = [each for each in journal.heard() if each.attempt.request in requests]
        names = sorted({each.attempt.pool for each in heard})
        if pool not in names and (pool or len(names) > 1):
            which = f"--pool {pool}: the journal has" if pool else f"{len(names)} pools, each with a quota of its own:"
            raise BadInput(f"{which} {', '.join(names)}: name one with --pool", path)
        heard = [each for each in heard if not pool or each.attempt.pool == pool]
        settings = [stated for stated in journal.settings() if not pool or stated.pool == pool]
        done = [wave for wave in journal.waves() if wave.status == COMPLETED and wave.created_epoch_s >= 0.0]
    if not heard:
        raise BadInput("no attempt has ended yet: nothing to learn from", path)
    rows: dict[str, list[Any]] = {}
    for a, limits, processing_s in heard:
        request = requests[a.request]
        stated = {limit.dimension: (limit.limit, limit.remaining) for limit in limits}
        tokens, day = stated.get("TPM", (-1.0, -1.0)), "RPD" in stated
        per_request = stated.get("RPM", stated.get("RPD", (-1.0, -1.0)))
        sizes = {name: getattr(request.sizes, name) for name in Sizes.__slots__}
        finalize = a.lane == "finalize"
        if finalize and settings:
            sizes["max_tokens"] = settings[0].policy.finalize_max_tokens
        answered = a.outcome is Outcome.OK
        # The time of a line in a batch says nothing of live calls, nor was it charged to their limits.
        timed = a.lane != BATCH
        row = {
            **{name: sizes[name] for name in ("endpoint", "chars", "role_chars", "messages", "images", "tools", "n")},
            "id": f"{a.request}",
            "model": a.model,
            "prompt": a.prompt_tokens if answered and a.prompt_tokens >= 0 else sizes["prompt_tokens"],
            "output": a.output_tokens if answered else -1,
            "max_tokens": sizes["max_tokens"],
            "launched": a.launched_s if timed else -1.0,
            "arrival": a.launched_s if timed else -1.0,
            "finished": a.finished_s if timed else -1.0,
            "kind": kind_of_attempt(a.outcome, -1, ""),
            "retry_after": a.retry_after_s,
            "processing": processing_s,
            "finalize": float(finalize),
            "day": float(day),
            **dict(zip(STATED, (*tokens, *per_request), strict=True)),
        }
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
    label = f"pool {pool} of journal {path}" if pool else f"journal {path}"
    found = observed_of(label, rows, source=path)
    times = tuple(wave.ended_epoch_s - wave.created_epoch_s for wave in done)
    return replace(found, policy=settings[0].policy if settings else None, batch=True, turnarounds_s=times)


def pooled(parts: Sequence[Observed]) -> Observed:
    """Return several sources as one, placed one after the other in time if each has a separate clock."""
    if len(parts) == 1:
        return parts[0]
    shift, requests = 0.0, 0
    moved = []
    for part in parts:
        # A quarter of an hour between them: use in one no longer affects the next.
        launched_s, arrived_s = (np.where(v >= 0.0, v + shift, -1.0) for v in (part.launched_s, part.arrived_s))
        ids = np.where(part.request >= 0, part.request + requests, part.request - requests)
        moved.append(replace(part, request=ids, launched_s=launched_s, arrived_s=arrived_s))
        shift = float(max(launched_s.max(), arrived_s.max(), 0.0)) + 900.0
        requests += 2 * len(part) + 2
    columns = ("request", "final", "kind", "launched_s", "arrived_s", "took_s", "first_s", "processing_s")
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in moved])
        for name in (*columns, "retry_after_s", "stated", "day")
    }
    merged: Any = replace
    found: Observed = merged(
        moved[0],
        **joined,
        turnarounds_s=tuple(each for part in moved for each in part.turnarounds_s),
        label=", ".join(part.label for part in parts),
        tries=_joined([part.tries for part in moved]),
        batch=all(part.batch for part in parts),
        notes=tuple(note for part in parts for note in part.notes),
    )
    return found


def _joined(parts: Sequence[Workload]) -> Workload:
    from sim.model.workload import ARRAYS

    columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS}
    names = [part.models for part in parts]
    models = [part.model(i) for part in parts for i in range(len(part))] if any(names) else None
    return Workload(
        **columns,
        custom_ids=[part.custom_id(i) for part in parts for i in range(len(part))],
        models=models,
    )


def workload_of(found: Observed) -> Workload:
    """Return the requests for a scenario: whole rows, with their recorded times and arrivals.

    A request that was never answered takes the answer of one with a similar prompt.
    """
    rows = found.rows()
    taken, answered = found.tries.take(rows), found.answered[rows]
    arrived = found.arrived_s[rows]
    if not answered.all():
        outputs = similar_outputs(taken, np.where(answered, taken.output_tokens, -1), 0)
        taken = taken.with_(output_tokens=outputs, recorded_s=np.where(answered, taken.recorded_s, -1.0))
    timed = not found.batch and bool((arrived >= 0.0).all()) and float(np.ptp(arrived)) > 0.0
    arrival_s = arrived - arrived.min() if timed else constant(0.0, len(rows), np.float64)
    caps = taken.max_tokens * taken.n
    # The uncut length of an answer cut by its cap is unknown; one token more makes the cap cut it again.
    cut = (taken.max_tokens > 0) & (taken.output_tokens >= caps)
    ids = taken.custom_ids or []
    repeated = len(set(ids)) < len(ids)
    taken = taken.with_(
        arrival_s=arrival_s,
        has_arrivals=timed,
        output_tokens=np.where(cut, caps + 1, taken.output_tokens),
        custom_ids=[f"request-{i + 1}" for i in range(len(ids))] if repeated else ids,
        provenance={
            "requests": (
                MEASURED,
                f"{len(rows):,} requests of {found.label}, {int(answered.sum()):,} of them answered",
            ),
            "prompt tokens": (MEASURED, found.label),
            "output tokens": (MEASURED, found.label),
            "latency": (MEASURED, found.label),
            **({"arrivals": (MEASURED, found.label)} if timed else {}),
        },
    )
    if not timed:
        return taken
    order = np.argsort(arrival_s, kind="stable")
    return taken.take(order)


assert STANDARD["TPM"] == 0, "counts name dimensions by the law's numbers"
