"""What a member of a shared pool needs of others: a store that keeps the pool, and a host whose membership it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from governor.law import Params
from governor.model.errors import PacelineError
from governor.model.lawcalls import Numbers
from governor.sharedquota.image import Call, Event, Image, Launch, News

LEASE_S = 10.0


class StoreLostError(Exception):
    """The store cannot be reached, for the reason that the text says."""


@dataclass(frozen=True, slots=True)
class Server:
    """Who answers: an id that changes with each start of a server, and for how many seconds it has been up."""

    id: bytes
    up_s: float


@dataclass(frozen=True, slots=True)
class StoreReading:
    """What the store held at one moment. `image`: empty = none. `leases`: until when, milliseconds since 1970."""

    server_us: int
    image: bytes
    inbox: list[bytes]
    leases: Mapping[str, int]


class QuotaStore(Protocol):
    """Keeps one pool for its owners. StoreLostError where it is away, PacelineError where it refuses us."""

    @property
    def place(self) -> str:
        """Where it is, for people."""

    async def connect(self) -> Server:
        """Connects anew; who answers."""

    async def close(self) -> None:
        """Closes all connections."""

    async def tell(self, batch: bytes) -> StoreReading:
        """Appends the batch to the inbox if this server holds an image, renews the owner's lease, and reads."""

    async def replace(
        self, head: bytes, image: bytes, taken: int, news: Mapping[tuple[str, int], bytes]
    ) -> StoreReading | None:
        """Puts the image in the place of the one named by `head`, and tells the owners; else a reading: too late.

        `taken`: batches of the inbox that it has in it. -1 = all, whatever they are, and only if the owner's record of
        the muster is still there: a rebuilding since would have removed it. `news`: by owner and entry.
        """

    async def muster(self, record: bytes, doubted: bytes, *, removes: bool) -> tuple[StoreReading, dict[str, bytes]]:
        """Leaves a record for whoever rebuilds the image; what all have left. None at all where that is done.

        `doubted`: the head of an image that does not count though it names this server; `removes`: it is taken away.
        Whoever waits for news gets empty news. Beside the owners' records stands, under "", when the first came:
        milliseconds since 1970.
        """

    async def news(self, entry: int) -> list[bytes]:
        """Waits for news of this entry, for a while; what came, oldest first."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a process says of itself when it enters: permits, open finalize passes, what waits, and what it launched.

    `launches`, `used`, `before`: see `Join`.
    """

    holds: int
    finalizes: int
    wants: list[Event]
    launches: list[Launch]
    used: float
    before: tuple[float, ...]


class Host(Protocol):
    """Whose membership it is. All methods are quick; none raises."""

    records: bool

    def standing(self, known: Image | None) -> Standing:
        """What it holds and wants, now. `known`: the newest image that it has."""

    def heard(self, image: Image, news: News | None = None) -> None:
        """The pool as it is now, and what this process has just decided for itself."""

    def news(self, news: News) -> None:
        """What another process decided for it."""

    def decided(self, params: Params, before: Numbers, image: Image, calls: list[Call]) -> None:
        """This process has decided: under which settings, on which state, by which calls, with which outcome.

        Only if it `records`.
        """

    def missed(self, why: str) -> bool:
        """The store cannot be reached: nothing is launched. Whether that was said; else it is reported again."""

    def back(self) -> None:
        """The store is back."""

    def broke(self, error: PacelineError) -> None:
        """For good."""
