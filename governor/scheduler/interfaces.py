"""The two interfaces of the scheduler: the shell that carries out its decisions, and the quota that it asks.

An instruction is a call of a `Shell` method. A `Quota` is the law applied to a state: methods named after functions of
the law are those functions with policy and state filled in (`governor/law.py` documents each).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any, Protocol, TypeVar

from governor.law import Params, State
from governor.model.needs import Scheduled

J = TypeVar("J", bound=Scheduled)
# The provider's counts in an answer: dimension, limit and remaining amount.
Stated = Iterable[tuple[int, float, float]]
# Stands in place of a time if the quota has taken the request over and will grant it later.
TAKEN_OVER = -inf


class Shell(Protocol[J]):
    """Carries out the scheduler's decisions."""

    def next_work(self) -> J | None:
        """Return the next request of the batch, with its `since`; None at its end."""

    def launch(self, job: J, now: float) -> None:
        """Send the attempt, which is booked."""

    def attempted(self, job: J, now: float) -> None:
        """Note that the attempt is over and its request is to be tried again (`backed_off` follows)."""

    def backed_off(self, job: J, now: float, retry_at: float) -> None:
        """Note that the job may be launched again at `retry_at`, under its new attempt number."""

    def finalize(self, job: J, now: float) -> J:
        """Note that the attempt is over, its answer cut off without text, and return the job of the finalize pass."""

    def suspended(self, job: J, now: float, code: str) -> None:
        """Note that the attempt is over and its request pending. `code`: the failure code if it was only set aside."""

    def doubted(self, job: J) -> None:
        """Note that the job met a refusal that may concern every request."""

    def ended(self, job: J, now: float, code: str) -> None:
        """Note that the attempt and its request are over: answered (""), or lost with that code."""

    def lost(self, job: J, at: float, code: str) -> None:
        """Note that a request set aside at `at` is lost after all."""

    def given_up(self, job: J, now: float, code: str) -> None:
        """Note that the job will not be launched any more."""

    def deferred(self, cause: int) -> None:
        """Note that a job at the head has to wait for this cause; called once per attempt and cause."""

    def halted(self) -> None:
        """Note that `stopped` was set: nothing more is launched."""


class Elsewhere(Protocol):
    """The other quotas that may serve a scheduler's requests: see `router`."""

    def may_take(self, job: Any, now: float, by: float) -> bool:
        """Return whether a quota that the request has not tried would launch it by that time; inf = at some time."""

    def may_save(self, job: Any, now: float) -> bool:
        """Return whether another quota can serve a request that waits here, where nothing is answered any more."""

    def take(self, job: Any) -> None:
        """Take over a request, which has left the scheduler."""

    def looked(self) -> None:
        """Note that the state of this quota may have changed."""


class Quota(Protocol):
    """A quota as the scheduler uses it.

    `ask`: returns `law.admission` of the scheduler's head; or (TAKEN_OVER, 0); or (inf, law.NOTHING) if the quota takes
    no more requests over for the moment. `s`: the newest known state. `breaker`: the state that holds the circuit
    breaker. `head`: when the head of a shared queue may launch, and what it waits for; None if `ask` returns that at
    once.
    """

    p: Params
    s: State
    head: tuple[float, int] | None

    def ask(self, need: list[float], standing: int, now: float) -> tuple[float, int]: ...

    def launched(self, need: list[float], standing: int, now: float, u: float) -> None: ...

    def settled(self, need: list[float], used: list[float], launched_at: float, now: float) -> None: ...

    def released(self) -> None: ...

    def answered(self, now: float) -> None: ...

    def throttled(self, *arguments: Any) -> float: ...

    def failed(self, *arguments: Any) -> tuple[float, int]: ...

    def synced(self, *arguments: Any) -> None: ...

    def finalize_opened(self) -> None: ...

    def finalize_closed(self) -> None: ...

    def paused(self) -> None: ...

    def resumed(self) -> None: ...

    @property
    def breaker(self) -> State: ...

    @property
    def in_flight(self) -> int:
        """The number of permits taken by this scheduler's requests."""

    def booked_since(self, job: Any, d: int) -> float:
        """Return what has been booked in dimension `d` since before the job's launch."""

    def spared(self, job: Any) -> int:
        """Return `law.spared` of the job's last attempt."""

    def reprice(self, params: Params, now: float) -> None:
        """Adopt changed settings."""

    def taken_over(self) -> Iterable[Any]:
        """Return the jobs that wait with the quota."""

    def take_back(self, now: float) -> list[tuple[tuple[float, ...], Any]]:
        """Return the jobs that are to wait in the scheduler again, with their ranks.

        Called before each look at the queue if `head` is not None.
        """

    def forget(self, job: Any) -> None:
        """Withdraw a job that the quota may have taken over."""

    def waited(self, waits_s: list[float]) -> list[float]:
        """Return a job's wait by cause, corrected for news that arrived late."""
