"""Account for a run: its figures from the journal, as one `Summary` for each pool and one for all of them together.

Time. Records count seconds from the beginning of the first leg, by the wall clock. A run that was stopped in the
evening and resumed in the morning did not take all night: its makespan, and so its efficiency, count only the time of
its legs.

Exit codes: 0 all succeeded, 1 some failed, 2 bad input, 3 refused or cannot finish, 4 the account's quota (or the
account itself) is refused, 5 a budget of money or time is used up, 130, 143 and 129 after a signal.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

from governor.forecast.pooled import merged, pooled_bound_s
from governor.forecast.summary import Grant, Summary, Tally, tallied
from governor.journal.journal import Journal
from governor.journal.rows import ResultRow
from governor.law import BY_TPM, STAGGER
from governor.model.errors import FailureCode
from governor.model.needs import STANDARD
from governor.model.policy import LIMITS, Policy
from governor.model.pools import Pool, groups_of
from governor.model.prices import Prices, Spending
from governor.model.requests import Attempt, Ended, error_line, result_line
from governor.model.words import duration
from governor.run.longwaits import FINISH_BY, LONG_WAIT, STOP_AFTER
from governor.run.steer import SIGNALS

# Reasons for stopping early, besides the driver's failure codes, the names of signals and those of `longwaits`.
MAX_COST, REFUSED, CANARY, FAILED_INSIDE = "MAX_COST", "REFUSED", "CANARY", "ERROR"
ACCOUNT = (FailureCode.INSUFFICIENT_QUOTA, FailureCode.UNAUTHORIZED)

ALL_WELL, SOME_FAILED, _CANNOT, _QUOTA, BUDGET = 0, 1, 3, 4, 5
SIGNAL_CODES = {number.name: 128 + number for number in SIGNALS}
_CODE_OF = {
    **dict.fromkeys(ACCOUNT, _QUOTA),
    MAX_COST: BUDGET,
    **dict.fromkeys((STOP_AFTER, FINISH_BY, LONG_WAIT, FailureCode.OUTWAITED), BUDGET),
    REFUSED: _CANNOT,
    CANARY: _CANNOT,
    **SIGNAL_CODES,
}

_MESSAGES = {
    FailureCode.RATE_LIMIT_EXHAUSTED: "every attempt was refused with a 429",
    FailureCode.DEADLINE_EXCEEDED: "OPENAI_DEADLINE_SECONDS passed before an attempt was answered",
    FailureCode.REQUEST_TOO_LARGE: "it is larger than what is allowed",
    FailureCode.SERVER_ERROR: "every attempt failed on the provider's side",
    FailureCode.UNREADABLE_ANSWER: "the answer was paid for but cannot be read, so it was not requested again",
    FailureCode.TIMEOUT: "no attempt was answered in time",
    FailureCode.BATCH_CANCELLED: "the batch was cancelled before it was answered",
    FailureCode.CONNECTION_DROPPED: "no attempt reached the provider, or every connection broke",
}


def lines_of(journal: Journal) -> Iterator[tuple[bool, str]]:
    """Yield (succeeded, line of the batch output format) for every request that has ended, in order of the input."""
    for result in journal.results():
        yield line_of(result)


def line_of(result: ResultRow) -> tuple[bool, str]:
    """Return the line of one request; see `lines_of`."""
    answer, failure = result.answer, result.failure
    if not failure:
        assert answer is not None
        return True, result_line(result.request, answer)
    ours = _MESSAGES.get(FailureCode(failure), "") if failure in FailureCode.__members__.values() else ""
    if failure == FailureCode.REQUEST_TOO_LARGE and answer is None:
        ours = "it needs more tokens than the limit and was never sent"
    theirs = answer.message if answer is not None else ""
    message = ": ".join(filter(None, (ours, " ".join(theirs.split())))) or failure
    return False, error_line(result.request, failure, message, answer)


# ---------------------------------------------------------------- the run's own time


@dataclass(frozen=True, slots=True)
class WorkingTime:
    """The stretches of time in which a process worked on the run, in order: (from, to), seconds."""

    stretches: tuple[tuple[float, float], ...]

    def own(self, at_s: float) -> float:
        """Return how long the run had worked at that moment."""
        begins = [begin for begin, _ in self.stretches]
        i = bisect_right(begins, at_s)
        before = math.fsum(end - begin for begin, end in self.stretches[: max(0, i - 1)])
        if i == 0:
            return 0.0
        begin, end = self.stretches[i - 1]
        return before + min(at_s, end) - begin


def worked(journal: Journal) -> WorkingTime:
    """Return the legs of a run. A leg that crashed has no recorded end: its last record counts as its end."""
    legs = journal.legs()
    last = [leg.began_s for leg in legs]
    begins = list(last)
    if any(leg.ended_s < 0.0 for leg in legs):
        for attempt in journal.attempts():
            i = bisect_right(begins, attempt.finished_s) - 1
            if i >= 0:
                last[i] = max(last[i], attempt.finished_s)
    ends = [leg.ended_s if leg.ended_s >= 0.0 else last[i] for i, leg in enumerate(legs)]
    return WorkingTime(tuple(zip(begins, ends, strict=True)))


# ---------------------------------------------------------------- summaries


def grant_of(policy: Policy, granted: Mapping[str, float] | None = None) -> Grant:
    """Return the provider's grant: from its response headers (by dimension), else from the settings."""
    granted = granted or {}
    if policy.quota:
        p = policy.params()
        quota = tuple(replace(each, limit=granted.get(each.name, p.limit[each.place])) for each in policy.quota)
        return Grant(settles=any(each.settles for each in quota), quota=quota)
    return Grant(
        tpm_limit=granted.get("TPM", float(policy.tpm_limit)),
        rpm_limit=granted.get("RPM", float(policy.rpm_limit)),
        tpd_limit=granted.get("TPD", float(policy.tpd_limit)),
        rpd_limit=granted.get("RPD", float(policy.rpd_limit)),
        settles=policy.settle,
    )


def summaries_of(
    journal: Journal,
    pools: Sequence[Pool],
    granted: Mapping[str, Mapping[str, float]],
    tallies: Mapping[str, Tally],
    cost_usd: float | None,
) -> tuple[Summary, dict[str, Summary]]:
    """Return the figures of all pools together, and of each, over all legs.

    `granted`: limits from headers. `tallies`: of a run of one leg, which has counted everything itself; empty = counted
    from the journal. Pools of one group are bounded by the sum of their limits.
    """
    policies = {stated.pool: stated.policy for stated in journal.settings()}
    grants = {pool.name: grant_of(policies.get(pool.name, pool.policy), granted.get(pool.name)) for pool in pools}
    tallies = tallies or {pool.name: tally_of(journal, pool.name) for pool in pools}
    by_pool = {name: tallies[name].summary(grant) for name, grant in grants.items()}
    groups = [[pool.name for pool in members] for members in groups_of(pools)]
    bounds = [pooled_bound_s([grants[n] for n in names], [tallies[n].work for n in names]) for names in groups]
    return merged(list(by_pool.values()), max(bounds), cost_usd), by_pool


def tally_of(journal: Journal, pool: str) -> Tally:
    """Return the counts of one pool over all legs, from the journal alone."""
    time = worked(journal)
    # Every request counts as submitted at the beginning, and not when it came from another pool of its group.
    attempts = (a._replace(submitted_s=0.0) if a.lane == "main" else a for a in journal.attempts(pool))
    ends: Iterable[Ended] = journal.ends(pool)
    if len(time.stretches) > 1:
        attempts = (_moved(attempt, time) for attempt in attempts)
        ends = (end._replace(ended_s=time.own(end.ended_s)) for end in ends)
    deferred = journal.deferrals(pool)
    lost = journal.lost(pool)
    return tallied(attempts, ends, stagger_delays=deferred[STAGGER], tpm_deferrals=deferred[BY_TPM], lost=lost)


def _moved(attempt: Attempt, time: WorkingTime) -> Attempt:
    """Return the attempt on the run's own clock."""
    return attempt._replace(
        submitted_s=time.own(attempt.submitted_s),
        eligible_s=time.own(attempt.eligible_s),
        launched_s=time.own(attempt.launched_s),
        finished_s=time.own(attempt.finished_s),
    )


def spent_before(journal: Journal, prices: Prices, day: date) -> Spending:
    """Return the cost of the answers so far, from the attempts in the journal."""
    spent = Spending(prices, day)
    for attempt, _, usage, sizes in journal.billed():
        spent.attempted(attempt, usage, sizes)
    return spent


_USAGE_COLUMNS = ("request_id", "cached_tokens", "reasoning_tokens", "service_tier", "cache_write_tokens")
ATTEMPT_COLUMNS = (*Attempt.columns(), *_USAGE_COLUMNS, "cost_usd")


def attempt_rows(journal: Journal, prices: Prices, day: date) -> Iterator[tuple[Any, ...]]:
    """Yield every ended attempt as a row of ATTEMPT_COLUMNS; absent values and unknown costs are empty."""
    spent = Spending(prices, day)
    for attempt, request_id, usage, sizes in journal.billed():
        cost = spent.attempted(attempt, usage, sizes)
        values = (*attempt.row(), request_id, usage.cached, usage.reasoning, usage.tier, usage.written, cost)
        yield tuple("" if value in (-1, -1.0) else value for value in values)


# ---------------------------------------------------------------- how a run ended


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """The outcome of a run: the figures over all legs, the same by pool, and the exit code.

    `stopped`: the reason, by pool. `tiers`: live answers by the service tier that served them. `worked_s`: by all
    legs. `found`: the limits found by the search, by pool and dimension (`facts.limits_found`). `journal`: its name
    for the user, never with a password.
    """

    summary: Summary
    by_pool: Mapping[str, Summary]
    exit_code: int
    stopped: Mapping[str, str]
    pending: int
    resent: int
    journal: str
    tiers: Mapping[str, int] = field(default_factory=dict)
    worked_s: float = 0.0
    found: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def tiers_text(tiers: Mapping[str, int]) -> str:
    """Return how many live answers each service tier gave, the standard tier's first."""
    return ", ".join(f"{count:,} {tier or 'standard'}" for tier, count in tiers.items())


def found_pairs(found: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str]]:
    """Return a row of text for each pool that seeks limits, with the settings that state them the next time."""
    return [("found" if len(found) == 1 else f"found by {name}", _found(limits)) for name, limits in found.items()]


def _found(found: Mapping[str, float]) -> str:
    met = {name: round(limit) for name, limit in found.items() if limit > 0.0}
    told = [f"{limit:,} {name}" for name, limit in met.items()]
    told += [f"no {name} yet: nothing was refused" for name in found if name not in met]
    if not met:
        return ", ".join(told)
    settings = [f"OPENAI_{name}_LIMIT={limit}" for name, limit in met.items() if name in STANDARD]
    others = ",".join(f"{name}={limit}" for name, limit in met.items() if name not in STANDARD)
    settings += [f"{LIMITS}={others}"] if others else []
    return f"{', '.join(told)}; once you trust it: {' '.join(settings)}"


def exit_code(failed: int, pending: int, stopped: Mapping[str, str], signals: Sequence[str]) -> int:
    """Return the process's exit code: a signal first, then the gravest reason to stop, then whether all succeeded."""
    if signals:
        return SIGNAL_CODES[signals[0]]
    if pending:
        return max((_CODE_OF.get(why, _CANNOT) for why in stopped.values()), default=_CANNOT)
    return SOME_FAILED if failed else ALL_WELL


def outcome_text(outcome: RunOutcome) -> str:
    """Return one line that says how the run ended."""
    s = outcome.summary
    text = f"{s.completed:,} of {s.requests + outcome.pending:,} done, {s.failed:,} failed"
    text += f", {s.throttled:,} 429s in {s.attempts:,} attempts, {duration(s.makespan_s)}"
    if outcome.pending:
        reasons = ", ".join(sorted(set(outcome.stopped.values()))) or "unknown"
        text += f"; stopped ({reasons}), {outcome.pending:,} not done"
    return text
