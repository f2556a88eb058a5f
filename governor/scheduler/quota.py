"""The quota of one process: the law applied to the process's own state.

For a quota whose state is kept in Redis and decided on by several processes in turn, see
`governor/sharedquota/shared.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from governor import law
from governor.law import Params, State
from governor.model.needs import Scheduled

Told = Callable[[str, tuple[Any, ...], Any], None]
# The functions of the law that read or change the state, keyed by the method that calls each.
REPORTED = {
    name: "admission" if name == "ask" else name
    for name in (
        *("ask", "launched", "settled", "released", "answered", "throttled", "failed", "synced"),
        *("finalize_opened", "finalize_closed", "paused", "resumed", "started"),
    )
}


class LocalQuota:
    """The quota of one process: the law's functions, bound to the settings and the state. See `interfaces.Quota`.

    `told`: called with the name, arguments and result of each call, for a record that can be replayed.
    """

    ask: Callable[[list[float], int, float], tuple[float, int]]
    launched: Callable[[list[float], int, float, float], None]
    settled: Callable[[list[float], list[float], float, float], None]
    released: Callable[[], None]
    answered: Callable[[float], None]
    throttled: Callable[..., float]
    failed: Callable[..., tuple[float, int]]
    synced: Callable[..., None]
    finalize_opened: Callable[[], None]
    finalize_closed: Callable[[], None]
    paused: Callable[[], None]
    resumed: Callable[[], None]
    started: Callable[[list[float], float], None]

    def __init__(self, p: Params, s: State | None = None, told: Told | None = None) -> None:
        self.head: tuple[float, int] | None = None
        self.s = State() if s is None else s
        self.told = told
        self._adopt(p)

    def _adopt(self, p: Params) -> None:
        self.p = p
        for method, name in REPORTED.items():
            decide = partial(getattr(law, name), p, self.s)
            setattr(self, method, decide if self.told is None else _telling(name, decide, self.told))

    def reprice(self, params: Params, now: float) -> None:
        """Adopt changed settings."""
        law.repriced(self.p, params, self.s, now)
        if self.told is not None:
            self.told("repriced", (params, now), None)
        self._adopt(params)

    @property
    def breaker(self) -> State:
        """The law's state, which holds the circuit breaker."""
        return self.s

    @property
    def in_flight(self) -> int:
        """The number of permits taken."""
        return self.s.in_flight

    def booked_since(self, job: Scheduled, d: int) -> float:
        """Return what has been booked in dimension `d` since before the job's launch."""
        return self.s.booked[d] - job.booked[d]

    def spared(self, job: Scheduled) -> int:
        """Return `law.spared` of the job's last attempt."""
        return law.spared(self.p, self.s, job.outages, job.launched_s, job.failed_s)

    def taken_over(self) -> Iterable[Scheduled]:
        """Return no jobs: this quota answers at once."""
        return ()

    def take_back(self, now: float) -> list[tuple[tuple[float, ...], Any]]:
        """Return no jobs."""
        return []

    def forget(self, job: Scheduled) -> None:
        """Do nothing: this quota keeps no jobs."""

    def waited(self, waits_s: list[float]) -> list[float]:
        """Return the waits unchanged."""
        return waits_s


def _telling(name: str, decide: Callable[..., Any], told: Told) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        result = decide(*arguments)
        told(name, arguments, result)
        return result

    return call
