"""The quota of one process: the law applied to the process's own state.

For a quota whose state is kept in Redis and decided on by several processes in turn, see
`governor/sharedquota/shared.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    """The quota of one process. See `interfaces.Quota`, and the law's functions of the same names."""

    def __init__(self, p: Params, s: State | None = None) -> None:
        self.head: tuple[float, int] | None = None
        self.p = p
        self.s = State() if s is None else s

    def ask(self, need: list[float], standing: int, now: float) -> tuple[float, int]:
        """See `law.admission`."""
        return law.admission(self.p, self.s, need, standing, now)

    def launched(self, need: list[float], standing: int, now: float, u: float) -> None:
        """See `law.launched`."""
        law.launched(self.p, self.s, need, standing, now, u)

    def settled(self, need: list[float], used: list[float], launched_at: float, now: float) -> None:
        """See `law.settled`."""
        law.settled(self.p, self.s, need, used, launched_at, now)

    def released(self) -> None:
        """See `law.released`."""
        law.released(self.p, self.s)

    def answered(self, now: float) -> None:
        """See `law.answered`."""
        law.answered(self.p, self.s, now)

    def throttled(self, *arguments: Any) -> float:
        """See `law.throttled`."""
        return law.throttled(self.p, self.s, *arguments)

    def failed(self, *arguments: Any) -> tuple[float, int]:
        """See `law.failed`."""
        return law.failed(self.p, self.s, *arguments)

    def synced(self, *arguments: Any) -> None:
        """See `law.synced`."""
        law.synced(self.p, self.s, *arguments)

    def finalize_opened(self) -> None:
        """See `law.finalize_opened`."""
        law.finalize_opened(self.p, self.s)

    def finalize_closed(self) -> None:
        """See `law.finalize_closed`."""
        law.finalize_closed(self.p, self.s)

    def paused(self) -> None:
        """See `law.paused`."""
        law.paused(self.p, self.s)

    def resumed(self) -> None:
        """See `law.resumed`."""
        law.resumed(self.p, self.s)

    def started(self, used: list[float], now: float) -> None:
        """See `law.started`."""
        law.started(self.p, self.s, used, now)

    def reprice(self, params: Params, now: float) -> None:
        """Adopt changed settings."""
        law.repriced(self.p, params, self.s, now)
        self.p = params

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


class RecordedQuota(LocalQuota):
    """A local quota that reports the name, arguments and result of each call, for a record that can be replayed."""

    def __init__(self, p: Params, s: State | None, told: Told) -> None:
        super().__init__(p, s)
        self.told = told

    def reprice(self, params: Params, now: float) -> None:
        """Adopt changed settings, and report the call."""
        law.repriced(self.p, params, self.s, now)
        self.told("repriced", (params, now), None)
        self.p = params


def _telling(name: str) -> Callable[..., Any]:
    decide = getattr(law, name)

    def call(self: RecordedQuota, *arguments: Any) -> Any:
        result = decide(self.p, self.s, *arguments)
        self.told(name, arguments, result)
        return result

    return call


def local_quota(p: Params, s: State | None, told: Told | None) -> LocalQuota:
    """Return the quota of one process. `told`: called with each of its calls, None = no record."""
    return LocalQuota(p, s) if told is None else RecordedQuota(p, s, told)


for _method, _name in REPORTED.items():
    setattr(RecordedQuota, _method, _telling(_name))
