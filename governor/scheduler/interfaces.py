"""The two sides of the scheduler: the shell that carries out what it decides, and the quota that it asks.

An instruction is a call of a `Shell`'s method. A `Quota` is the law on a state: its methods that are named after
functions of the law are those functions with policy and state filled in (`governor/law.py` says what each does).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any, Protocol, TypeVar

from governor.law import Params, State
from governor.model.scheduled import Scheduled

J = TypeVar("J", bound=Scheduled)
# What an answer states of the provider's counts: dimension, limit and what is left of it.
Stated = Iterable[tuple[int, float, float]]
# In place of a time: the quota has taken the request over, and grants it later.
TAKEN_OVER = -inf


class Shell(Protocol[J]):
    """Carries out what the scheduler decides."""

    def next_work(self) -> J | None:
        """The next request of the batch, with its `since`; None at its end."""

    def launch(self, job: J, now: float) -> None:
        """The attempt is booked: send it."""

    def attempted(self, job: J, now: float) -> None:
        """The attempt is over, and its request is to be tried again (`backed_off` follows)."""

    def backed_off(self, job: J, now: float, retry_at: float) -> None:
        """The job may be launched again then, under the attempt that it now has."""

    def finalize(self, job: J, now: float) -> J:
        """The attempt is over, its answer cut off without text: the job of the finalize pass."""

    def suspended(self, job: J, now: float, code: str) -> None:
        """The attempt is over and its request pending. `code`: with which it is lost if it was only set aside."""

    def doubted(self, job: J) -> None:
        """The job met what may concern every request."""

    def ended(self, job: J, now: float, code: str) -> None:
        """The attempt is over and its request with it: answered (""), or lost with that code."""

    def lost(self, job: J, at: float, code: str) -> None:
        """A request that was set aside at `at` is lost after all."""

    def given_up(self, job: J, now: float, code: str) -> None:
        """The job will not be launched any more."""

    def deferred(self, cause: int) -> None:
        """A job at the head has to wait for this cause; said once per attempt and cause."""

    def halted(self) -> None:
        """`stopped` was set: nothing more is launched."""


class Quota(Protocol):
    """A quota as the scheduler uses it.

    `ask`: `law.admission` of the scheduler's head; or (TAKEN_OVER, 0), or (inf, law.NOTHING) where the quota takes no
    more requests over for the moment. `s`: the state, as last heard of. `breaker`: the one that knows of the circuit
    breaker. `head`: when the head of a shared queue may launch, and what it waits for; None where `ask` says
    so at once.
    """

    p: Params
    s: State
    head: tuple[float, int] | None

    def ask(self, reserve: float, standing: int, now: float) -> tuple[float, int]: ...

    def launched(self, reserve: float, standing: int, now: float, u: float) -> None: ...

    def settled(self, reserve: float, used: float, launched_at: float, now: float) -> None: ...

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
        """Permits that are taken by this scheduler's requests."""

    def booked_since(self, job: Any, d: int) -> float:
        """What has been booked in a dimension since before the job's launch."""

    def spared(self, job: Any) -> int:
        """`law.spared` of the job's last attempt."""

    def reprice(self, params: Params, now: float) -> None:
        """Takes changed settings over."""

    def taken_over(self) -> Iterable[Any]:
        """The jobs that wait with the quota."""

    def take_back(self, now: float) -> list[tuple[tuple[float, ...], Any]]:
        """Asked before each look at the queue where `head` is not None: jobs that are to wait in the scheduler again,
        with their ranks."""

    def forget(self, job: Any) -> None:
        """A job that may have been taken over waits for nothing more."""

    def waited(self, waits_s: list[float]) -> list[float]:
        """A job's wait by cause, corrected for what was heard of late."""
