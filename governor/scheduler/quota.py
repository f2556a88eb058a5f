"""The quota of one process: the law on a state of its own.

`governor/sharedquota/shared.py` holds the other one, whose state is kept in Redis and decided on by several processes
in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from governor import law
from governor.law import Params, State
from governor.model.scheduled import Scheduled

# The functions of the law that a scheduler calls: each reads or changes the state.
REPORTED = (
    *("admission", "launched", "settled", "released", "answered", "throttled", "failed", "synced"),
    *("finalize_opened", "finalize_closed", "paused", "resumed", "day_started"),
)
# What had been booked at a launch, where no counts of the provider are compared with it.
NOT_BOOKED: list[float] = []

Told = Callable[[str, tuple[Any, ...], Any], None]


class LocalQuota:
    """The quota of one process. `told`: hears name, arguments and result of each call, for a record that can be
    decided again."""

    settled: Callable[[float, float, float, float], None]
    released: Callable[[], None]
    answered: Callable[[float], None]
    throttled: Callable[..., float]
    failed: Callable[..., tuple[float, int]]
    synced: Callable[..., None]
    finalize_opened: Callable[[], None]
    finalize_closed: Callable[[], None]
    paused: Callable[[], None]
    resumed: Callable[[], None]
    day_started: Callable[[float, float, float], None]
    head: tuple[float, int] | None = None

    def __init__(self, p: Params, s: State | None = None, told: Told | None = None) -> None:
        self.p = p
        self.s = State() if s is None else s
        self._told = told
        self._fill()

    def _fill(self) -> None:
        for name in REPORTED:
            decide = partial(getattr(law, name), self.p, self.s)
            setattr(self, name, decide if self._told is None else self._reporting(name, decide, self._told))
        self._admission: Callable[..., tuple[float, int]] = self.__dict__["admission"]
        self._launched: Callable[..., None] = self.__dict__["launched"]

    @staticmethod
    def _reporting(name: str, decide: Callable[..., Any], told: Told) -> Callable[..., Any]:
        def report(*arguments: Any) -> Any:
            result = decide(*arguments)
            told(name, arguments, result)
            return result

        return report

    @property
    def breaker(self) -> State:
        """The state itself."""
        return self.s

    @property
    def in_flight(self) -> int:
        """Permits that are taken."""
        return self.s.in_flight

    def ask(self, job: Scheduled, now: float) -> tuple[float, int]:
        """When the job may launch, by the law, and what it waits for until then."""
        return self._admission(job.reserve, job.standing, now)

    def book(self, job: Scheduled, now: float, u: float) -> list[float]:
        """Books the launch of a job; what had been booked before."""
        self._launched(job.reserve, job.standing, now, u)
        return self.s.booked_before.copy() if self.p.sync_headers else NOT_BOOKED

    def booked_since(self, job: Scheduled, d: int) -> float:
        """What has been booked in a dimension since before the job's launch."""
        return self.s.booked[d] - job.booked[d]

    def spared(self, job: Scheduled) -> int:
        """`law.spared` of the job's last attempt."""
        return law.spared(self.p, self.s, job.outages, job.launched_s, job.failed_s)

    def reprice(self, params: Params, now: float) -> None:
        """Takes changed settings over, and tells of it."""
        law.repriced(self.p, params, self.s, now)
        if self._told is not None:
            self._told("repriced", (params, now), None)
        self.p = params
        self._fill()

    def taken_over(self) -> Iterable[Scheduled]:
        """None: this quota answers at once."""
        return ()

    def take_back(self, now: float) -> list[tuple[tuple[float, ...], Any]]:
        """None."""
        return []

    def forget(self, job: Scheduled) -> None:
        """Nothing is known of it."""

    def waited(self, waits_s: list[float]) -> list[float]:
        """As they are."""
        return waits_s
