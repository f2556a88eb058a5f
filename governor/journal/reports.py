"""Reports that are not yet on the disk, gathered in a batch, and the statements that put them there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Double, String, bindparam, func, insert, update

from governor.journal.checkpoint import Checkpoint, taken_from
from governor.journal.schema import (
    DONE,
    FAILED,
    attempt_row,
    attempts,
    checkpoint_row,
    checkpoints,
    commands,
    decisions,
    deferrals,
    policies,
    requests,
    result_row,
    results,
    settings_of,
    timers,
)
from governor.model.lawcalls import numbers_of, result_of, stored
from governor.model.policy import Policy
from governor.model.requests import Answer, Attempt
from governor.model.work import PoolState

_MOVED = (
    update(requests)
    .where(requests.c.request == bindparam("b_request"))
    .values(
        state=bindparam("b_state"),
        lane=bindparam("b_lane"),
        attempt=bindparam("b_attempt"),
        launched_s=bindparam("b_launched_s"),
        first_launched_s=func.coalesce(bindparam("b_first_launched_s", type_=Double), requests.c.first_launched_s),
        retry_at_s=bindparam("b_retry_at_s"),
        pool=func.coalesce(bindparam("b_pool", type_=String), requests.c.pool),
    )
)
_ENDED = (
    update(requests)
    .where(requests.c.request == bindparam("b_request"))
    .values(state=bindparam("b_state"), failure=bindparam("b_failure"), ended_s=bindparam("b_ended_s"))
)
_DEFERRED = (
    update(deferrals)
    .where(
        deferrals.c.leg == bindparam("b_leg"),
        deferrals.c.pool == bindparam("b_pool"),
        deferrals.c.cause == bindparam("b_cause"),
    )
    .values(requests=deferrals.c.requests + bindparam("b_requests"))
)
_CHECKPOINTED = (
    update(checkpoints)
    .where(checkpoints.c.leg == bindparam("b_leg"), checkpoints.c.pool == bindparam("b_pool"))
    .values(
        at_s=bindparam("b_at_s"),
        epoch_s=bindparam("b_epoch_s"),
        boot=bindparam("b_boot"),
        boot_s=bindparam("b_boot_s"),
        state=bindparam("b_state"),
    )
)
_TAKEN = (
    update(commands)
    .where(commands.c.id == bindparam("b_id"))
    .values(taken_s=bindparam("b_taken_s"), outcome=bindparam("b_outcome"))
)


@dataclass(slots=True)
class RequestMove:
    """The state of a request after its latest launch or attempt. `first_launched_s`: None = unchanged.

    `retry_at_s`: when its backoff ends, -1 = it does not back off. `pool`: the one that has launched it, None =
    unchanged.
    """

    state: str
    lane: str
    attempt: int
    launched_s: float
    first_launched_s: float | None = None
    retry_at_s: float = -1.0
    pool: str | None = None

    def row(self, request: int) -> dict[str, Any]:
        return {
            "b_request": request,
            "b_state": self.state,
            "b_lane": self.lane,
            "b_attempt": self.attempt,
            "b_launched_s": self.launched_s,
            "b_first_launched_s": self.first_launched_s,
            "b_retry_at_s": self.retry_at_s,
            "b_pool": self.pool,
        }


@dataclass(slots=True)
class Calls:
    """Consecutive calls of the law in one chain: name, arguments, result."""

    first: int
    calls: list[tuple[str, tuple[Any, ...], Any]] = field(default_factory=list)

    def row(self, leg: int, pool: int) -> dict[str, Any]:
        numbers = ((name, numbers_of(arguments), result_of(result)) for name, arguments, result in self.calls)
        return {"leg": leg, "pool": pool, "first": self.first, "count": len(self.calls), "calls": stored(numbers)}


@dataclass(slots=True)
class Batch:
    """Reports that are not yet on the disk, in the order of the reports within each kind."""

    moves: dict[int, RequestMove] = field(default_factory=dict)
    attempts: list[tuple[Attempt, Answer]] = field(default_factory=list)
    ends: list[tuple[int, str, Answer | None, float]] = field(default_factory=list)
    decisions: dict[tuple[int, int], Calls] = field(default_factory=dict)
    deferrals: dict[tuple[int, int, int], int] = field(default_factory=dict)
    policies: list[tuple[int, int, float, Policy]] = field(default_factory=list)
    taken: list[tuple[int, float, str]] = field(default_factory=list)
    timers: list[tuple[int, float]] = field(default_factory=list)
    waves: list[tuple[Any, list[dict[str, Any]]]] = field(default_factory=list)  # statements, with their rows
    pools: dict[tuple[int, int], PoolState] = field(default_factory=dict)  # that have reported
    checkpoints: dict[tuple[int, int], Checkpoint] = field(default_factory=dict)

    def holds_any(self) -> bool:
        """Return whether there is anything to commit."""
        return bool(
            self.pools
            or self.decisions
            or self.moves
            or self.attempts
            or self.ends
            or self.deferrals
            or self.policies
            or self.taken
            or self.waves
        )

    def checkpoint(self) -> None:
        """Take each pool's present state, which reflects all reports so far and no more."""
        for chain, pool in self.pools.items():
            self.checkpoints[chain] = taken_from(pool.p, pool.s, pool.now())

    def moved(self, request: int, move: RequestMove) -> None:
        """Record the request's new state."""
        before = self.moves.get(request)
        if before is not None:
            move.pool = move.pool or before.pool
            if move.first_launched_s is None:
                move.first_launched_s = before.first_launched_s
        self.moves[request] = move

    def followed_by(self, later: Batch) -> Batch:
        """Return this batch followed by a later one."""
        for request, move in later.moves.items():
            self.moved(request, move)
        self.attempts += later.attempts
        self.ends += later.ends
        for chain, calls in later.decisions.items():
            if chain in self.decisions:
                self.decisions[chain].calls += calls.calls
            else:
                self.decisions[chain] = calls
        for key, count in later.deferrals.items():
            self.deferrals[key] = self.deferrals.get(key, 0) + count
        self.policies += later.policies
        self.taken += later.taken
        self.timers += later.timers
        self.waves += later.waves
        self.pools |= later.pools
        return self

    def statements(self) -> list[tuple[Any, list[dict[str, Any]]]]:
        """Return the statements to execute, with their rows.

        Moves come before ends: an end is a request's last state. Waves come last: they let go of requests that moved.
        """
        ends, answers = [], []
        for request, failure, answer, ended_s in self.ends:
            state = FAILED if failure else DONE
            ends.append({"b_request": request, "b_state": state, "b_failure": str(failure), "b_ended_s": ended_s})
            if answer is not None:
                answers.append(result_row(request, answer))
        return [
            (insert(policies), [_policy_row(*change) for change in self.policies]),
            (_MOVED, [move.row(request) for request, move in self.moves.items()]),
            (insert(attempts), [attempt_row(*each) for each in self.attempts]),
            (_ENDED, ends),
            (insert(results), answers),
            (insert(decisions), [calls.row(*chain) for chain, calls in self.decisions.items()]),
            (_DEFERRED, [_deferral_row(*key, count) for key, count in self.deferrals.items()]),
            (insert(timers), [{"pool": pool, "late_s": late_s} for pool, late_s in self.timers]),
            (_CHECKPOINTED, [_checkpoint_row(*chain, taken) for chain, taken in self.checkpoints.items()]),
            (_TAKEN, [{"b_id": i, "b_taken_s": at_s, "b_outcome": outcome} for i, at_s, outcome in self.taken]),
            *self.waves,
        ]


def _policy_row(leg: int, pool: int, at_s: float, policy: Policy) -> dict[str, Any]:
    return {"leg": leg, "pool": pool, "at_s": at_s, "settings": settings_of(policy)}


def _checkpoint_row(leg: int, pool: int, checkpoint: Checkpoint) -> dict[str, Any]:
    return {f"b_{name}": value for name, value in checkpoint_row(leg, pool, checkpoint).items()}


def _deferral_row(leg: int, pool: int, cause: int, count: int) -> dict[str, Any]:
    return {"b_leg": leg, "b_pool": pool, "b_cause": cause, "b_requests": count}
