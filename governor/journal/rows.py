"""The values that a journal's rows are read into, as `Records` returns them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from governor.journal.schema import DamagedError, request_of
from governor.model.estimate import Sizes
from governor.model.policy import Policy
from governor.model.prices import Usage
from governor.model.requests import LANES, Answer, Attempt, Limit, Request
from governor.model.work import Work


class RunRow(NamedTuple):
    """The record of the run itself. `requests`: -1 until all are in. `purged_epoch_s`: -1 unless it was purged."""

    schema: int
    version: str
    fingerprint: str
    seed: int
    epoch_s: float
    requests: int
    purged_epoch_s: float


@dataclass(frozen=True, slots=True)
class Pending:
    """One request that has not ended, with its history. `resent`: how often an attempt was lost without a trace."""

    work: Work
    resent: int


Pendings = Iterator[Pending]
PoolNames = str | Sequence[str]


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One request that has ended, without its body. `failure`: "" or its code. `answer`: None if none ever came."""

    request: Request
    failure: str
    answer: Answer | None
    ended_s: float
    resent: int


class Counts(NamedTuple):
    """Requests by state, how often one was sent again after a crash, and failed requests by code."""

    requests: int
    pending: int
    in_flight: int
    done: int
    failed: int
    resent: int
    failures: dict[str, int]


class LegRow(NamedTuple):
    """One process's share of the run. `ended_s`: -1 while it runs, and for ever if it crashed.

    `ending`: why it ended.
    """

    leg: int
    began_s: float
    ended_s: float
    ending: str
    version: str


class SettingsRow(NamedTuple):
    """The policy of a pool from `at_s` on: at the beginning of a leg, or changed in the course of it."""

    leg: int
    pool: str
    at_s: float
    policy: Policy


class ForecastRow(NamedTuple):
    """A forecast. It counts as one only if nothing had been launched before it was written."""

    leg: int
    at_s: float
    launched_before: int
    content: dict[str, Any]


class Command(NamedTuple):
    """A command to the run: `pause`, `resume`, `set` with its `NAME=VALUE` words, or `unset` with names.

    `taken_s`: when the run took it up, -1 = not yet. `outcome`: "" or why it was refused.
    """

    id: int
    asked_epoch_s: float
    name: str
    words: tuple[str, ...]
    taken_s: float
    outcome: str


class Billed(NamedTuple):
    """One ended attempt, the provider's id of it, the tokens used, and the sizes of its request."""

    attempt: Attempt
    request_id: str
    usage: Usage
    sizes: Sizes


class HeardAttempt(NamedTuple):
    """One ended attempt with its headers' figures; `processing_s`: the provider's own time, -1 = unknown."""

    attempt: Attempt
    limits: tuple[Limit, ...]
    processing_s: float


class Prefixed:
    """A row of results whose columns carry a prefix, since requests have columns of the same names."""

    __slots__ = ("_row",)

    def __init__(self, row: Any) -> None:
        self._row = row

    def __getattr__(self, name: str) -> Any:
        return getattr(self._row, f"r_{name}")


def pending_of(row: Any, body: dict[str, Any]) -> Pending:
    request = request_of(row, body)
    if row.lane not in LANES:
        raise DamagedError("a lane")
    return Pending(
        Work(
            request,
            row.reserve,
            row.expected,
            row.finalize_reserve,
            row.charge,
            row.finalize_charge,
            lane=LANES.index(row.lane),
            attempt=row.attempt,
            first_launched_s=row.first_launched_s,
            retry_at_s=row.retry_at_s,
        ),
        row.resent,
    )
