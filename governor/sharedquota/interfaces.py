"""The interfaces of a shared pool's member: the store that keeps the pool, and the host of the membership."""

from __future__ import annotations

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
