"""The interfaces of a shared pool's member: the store that keeps the pool, and the host of the membership."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from governor.law import Params
from governor.model.errors import PacelineError
from governor.model.lawcalls import Numbers
from governor.sharedquota.image import Call, Event, Image, Launch, OwnerNews

LEASE_S = 10.0


class StoreLostError(Exception):
    """The store cannot be reached, for the reason that the text says."""


@dataclass(frozen=True, slots=True)
class Server:
    """The answering server: an id that changes with each start, and its uptime in seconds."""

    id: bytes
    up_s: float


@dataclass(frozen=True, slots=True)
class StoreReading:
    """The store's content at one moment. `image`: empty = none. `leases`: until when, milliseconds since 1970."""

    server_us: int
    image: bytes
    inbox: list[bytes]
    leases: Mapping[str, int]


class QuotaStore(Protocol):
    """Keeps one pool for its owners. Raises StoreLostError if it is away, PacelineError if it refuses access."""

    @property
    def place(self) -> str:
        """Return the store's address, for messages."""

    async def connect(self) -> Server:
        """Connect anew, and return the answering server."""

    async def close(self) -> None:
        """Close all connections."""

    async def tell(self, batch: bytes) -> StoreReading:
        """Append the batch to the inbox if this server holds an image, renew the owner's lease, and read."""

    async def replace(
        self, head: bytes, image: bytes, taken: int, news: Mapping[tuple[str, int], bytes]
    ) -> StoreReading | None:
        """Replace the image named by `head` and tell the owners; return None, or a reading if it was too late.

        `taken`: the number of inbox batches that the image includes. -1 = all, whatever they are, and only if the
        owner's record of the recovery is still there: a rebuilding since would have removed it. `news`: by owner and
        entry.
        """

    async def recovery(self, record: bytes, doubted: bytes, *, removes: bool) -> tuple[StoreReading, dict[str, bytes]]:
        """Leave a record for rebuilding the image; return a reading and all records, none if the image is rebuilt.

        `doubted`: the head of an image that is invalid although it names this server; `removes`: remove that image.
        Every process that waits for news gets empty news. Besides the owners' records, "" holds the time of the first
        one: milliseconds since 1970.
        """

    async def news(self, entry: int) -> list[bytes]:
        """Wait a while for news of this entry, and return it, oldest first."""


@dataclass(frozen=True, slots=True)
class MemberState:
    """A process's account of itself when it enters: permits, open finalize passes, waiting attempts, and launches.

    `launches`, `used`, `before`: see `Join`.
    """

    holds: int
    finalizes: int
    wants: list[Event]
    launches: list[Launch]
    used: tuple[float, ...]
    before: tuple[float, ...]


class Host(Protocol):
    """The owner of a membership. All methods are quick; none raises."""

    records: bool

    def standing(self, known: Image | None) -> MemberState:
        """Return what it holds and waits for now. `known`: the newest image that the membership has."""

    def heard(self, image: Image, news: OwnerNews | None = None) -> None:
        """Take the pool's present state, and what this process has just decided for itself."""

    def news(self, news: OwnerNews) -> None:
        """Take what another process has decided for it."""

    def decided(self, params: Params, before: Numbers, image: Image, calls: list[Call]) -> None:
        """Take a decision of this process: its settings, the state before, the resulting image, the law's calls.

        Called only if it `records`.
        """

    def missed(self, why: str) -> bool:
        """Note that the store is unreachable; return whether that was reported, else the call is repeated."""

    def back(self) -> None:
        """Note that the store is back."""

    def broke(self, error: PacelineError) -> None:
        """Note that the membership has failed for good."""


# ---------------------------------------------------------------- the store's clock

# The store's clock, in microseconds since 1970, becomes seconds since EPOCH_S, times the scale of a sped-up rehearsal,
# rounded down to a binary fraction: differences of two such times are exact, so a process may count from its own zero
# (a fixed distance away) and lose no bit.
# 2026-01-01, so that a time has bits to spare for its fraction.
EPOCH_S = 1_767_225_600
QUANTUM_S = 2.0**-16
# More than the difference between two quartz clocks.
DRIFT_RATIO = 5e-4


def floored(seconds: float) -> float:
    """Return that time, rounded down to a whole number of quanta."""
    return math.floor(seconds / QUANTUM_S) * QUANTUM_S


def server_s(server_us: int, scale: float) -> float:
    """Return the store's clock (microseconds since 1970) as seconds since EPOCH_S, times `scale`."""
    return floored((server_us - EPOCH_S * 1_000_000) * scale / 1e6)


class ServerClock:
    """A lower bound of the pool's time by a local monotonic clock. `ahead_s`: the pool's time less the local time.

    An answer heard at `heard_at` says that the store's time is at least the time that it states: the largest such bound
    is kept, so that no process is ever ahead of the store, and it fades by DRIFT_RATIO, so that a local clock that runs
    fast is corrected.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.ahead_s = -math.inf
        self._heard_at = -math.inf

    def heard(self, server_us: int, asked_at: float, heard_at: float) -> float:
        """Record the store's answer, asked and heard at these local times, and return the store's time."""
        at = server_s(server_us, self.scale)
        if self._heard_at > -math.inf:
            self.ahead_s -= DRIFT_RATIO * max(0.0, heard_at - self._heard_at)
        # Not before the question was asked either: follow at once a clock that was set back.
        self.ahead_s = min(max(self.ahead_s, at - heard_at), at - asked_at)
        self._heard_at = heard_at
        return at
