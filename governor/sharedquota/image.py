"""The data of a shared pool: its image, what owners report and are told, and how each is encoded in the store.

An owner is one process's membership. Its events are numbered, so that an event that arrives twice counts once; `holds`
and `finalizes` are given back when it dies.

Incarnations. Each rebuilding of a lost image begins an incarnation: a counter with random bits below it, so that two
halves of a split brain never use the same number. `cuts` states the version at which each earlier incarnation ended. A
launch is booked in an image if the image knows its incarnation and its version is not beyond the cut; every other
launch of the living is booked again when its process enters.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from math import inf
from typing import Any

import msgpack

from governor import law
from governor.law import Params, State
from governor.model.lawcalls import numbers_of, params_of
from governor.model.requests import CAUSES

# Kinds of event.
WANT, WITHDRAW, CALL, REPRICE, LEAVE, JOIN, HERE = range(7)
# Precedes an image: the server that holds it, its incarnation and version. Unequal = another process has decided.
HEAD = struct.Struct(">40sQQ")
SERVER_BYTES = 40
UNTOLD = ("", 0, inf, law.NOTHING)

Call = tuple[str, tuple[Any, ...], Any]
Event = list[Any]
# Owner, number of its first event, and the events.
Batch = tuple[str, int, list[Event]]
# Incarnation, version, need, standing, time, and the uniform number of the stagger.
Launch = tuple[int, int, list[float], int, float, float]


@dataclass(slots=True)
class Waiter:
    """One attempt that waits to launch. `ticket` counts within its owner.

    `turn`: its arrival, in rounds in which each owner has one attempt, so that owners with much to do take turns.
    """

    owner: str
    ticket: int
    lane: int
    attempt: int
    standing: int
    expected: float
    size: float
    need: list[float]
    u: float
    turn: int

    def key(self, p: Params) -> tuple[float, ...]:
        """Return its place in the queue, as the law orders it; of equal keys the first to come goes first."""
        return law.rank(p, self.lane, self.attempt, self.expected, self.size, float(self.turn), self.standing)


@dataclass(slots=True)
class Owner:
    """One process's membership. `joined`: the number of its latest entry; `last`: of its newest event in the image.

    `turn`: of its newest attempt in the queue. `gone_at`: when its lease lapsed, -1 = it lives. `told`: the number of
    its news since that entry. `since`: the incarnation that it entered; its launches of earlier ones are booked.
    `silent`: it has sent nothing since the pool was rebuilt: a grant might never reach it, and be lost from the budget.
    """

    joined: int
    last: int
    holds: int = 0
    finalizes: int = 0
    turn: int = 0
    gone_at: float = -1.0
    told: int = 0
    since: int = 0
    silent: bool = False


@dataclass(slots=True)
class Join:
    """A process's account of itself when it enters, or enters again because it missed something.

    `number`: of this entry. `last`: of its newest event. `params`: its settings, if they are to apply to the pool.
    `calls`: its numbered events since the last one that it knows to be in an image. `wants`: its waiting attempts.
    `launches`: its launches that an image may lack. `lineage`, `used`: the pool that it knew, and the amounts in
    use there. `before`: the use in each dimension of the law when an earlier run of this process ended, for a new pool.
    `seen`: the newest incarnation that it has heard of.
    """

    number: int
    last: int
    params: tuple[float, ...] | None
    holds: int
    finalizes: int
    calls: list[tuple[int, Event]]
    wants: list[Event]
    launches: list[Launch]
    lineage: int = 0
    used: tuple[float, ...] = (0.0,) * law.DIMENSIONS
    before: tuple[float, ...] = (0.0,) * law.DIMENSIONS
    seen: int = 0

    def packed(self) -> list[Any]:
        """Return the entry as an event."""
        return [JOIN, *(getattr(self, each.name) for each in fields(self))]


@dataclass(slots=True)
class OwnerNews:
    """The part of a decision that concerns one owner.

    `wake`: ticket, moment and cause, if its attempt is the pool's head.
    `clock`: seconds that the pool's head has waited, by cause. `grants`: tickets that may launch at `now`, each with
    the bookings before it. `refused`: tickets that can never be launched.
    """

    incarnation: int
    version: int
    now: float
    cause: int
    clock: list[float]
    wake: tuple[int, float, int] | None = None
    grants: list[tuple[int, list[float]]] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)

    def encoded(self) -> bytes:
        """Return the news as bytes."""
        return bytes(msgpack.packb([getattr(self, each.name) for each in fields(self)]))

    @staticmethod
    def decoded(data: bytes) -> OwnerNews:
        """Return the news that `encoded` wrote."""
        return OwnerNews(*msgpack.unpackb(data))


# Cached because policies are few and never change in place, and every image contains one.
_known_params = lru_cache(maxsize=32)(params_of)
_FRESH = State()
_STATE = tuple(each.name for each in fields(State))
_FIRST: tuple[Any, ...] = tuple(getattr(_FRESH, name) for name in _STATE)


class UnreadableImageError(ValueError):
    """The store's content is not an image of this version. `is_foreign`: another version of Paceline wrote it."""

    def __init__(self, is_foreign: bool) -> None:
        super().__init__("another version of Paceline shares this pool" if is_foreign else "it is no state of a pool")
        self.is_foreign = is_foreign


@dataclass(slots=True)
class Image:
    """A pool at one version. Times are on the pool's timeline, in seconds.

    `server`: the server that holds it. `incarnation`, `cuts`: see the module. `lineage`: random, drawn when the pool
    was created. `wake_at`, `cause`: until when and why the head must wait. `told`: the owner and ticket that were told
    so. `clock`: seconds that a head has waited, by cause. `turn`: of the latest launch.
    """

    p: Params
    lineage: int
    server: bytes = b""
    incarnation: int = 0
    version: int = 0
    s: State = field(default_factory=State)
    now: float = -inf
    wake_at: float = inf
    cause: int = law.NOTHING
    told: tuple[str, int, float, int] = UNTOLD
    clock: list[float] = field(default_factory=lambda: [0.0] * len(CAUSES))
    turn: int = 0
    cuts: dict[int, int] = field(default_factory=dict)
    owners: dict[str, Owner] = field(default_factory=dict)
    waiters: list[Waiter] = field(default_factory=list)

    @property
    def head(self) -> bytes:
        """The 56 bytes that name this version."""
        return HEAD.pack(self.server, self.incarnation, self.version)

    def encoded(self) -> bytes:
        """Return the image as bytes, without loss; lists of the state in their initial form take one byte."""
        s = self.s
        values = [getattr(s, name) for name in _STATE]
        state = [
            None if isinstance(each, list) and each == first else each
            for each, first in zip(values, _FIRST, strict=True)
        ]
        body = [
            FORMAT,
            numbers_of((self.p,)),
            state,
            [[name, *_values(owner)] for name, owner in self.owners.items()],
            [_values(w) for w in self.waiters],
            *(getattr(self, name) for name in _PLAIN),
        ]
        return self.head + bytes(msgpack.packb(body))

    @staticmethod
    def decoded(data: bytes) -> Image:
        """Return the image that `encoded` wrote. Raise UnreadableImageError for anything else."""
        try:
            server, incarnation, version = HEAD.unpack_from(data)
            found, *body = msgpack.unpackb(memoryview(data)[HEAD.size :], strict_map_key=False)
        except Exception:  # whatever a decoder raises on garbage
            raise UnreadableImageError(is_foreign=False) from None
        if found != FORMAT:
            raise UnreadableImageError(is_foreign=isinstance(found, str) and found.startswith(FORMAT_NAME))
        try:
            params, state, owners, waiters, *plain = body
            rest = dict(zip(_PLAIN, plain, strict=True))
            values: list[Any] = [list(f) if each is None else each for each, f in zip(state, _FIRST, strict=True)]
            return Image(
                p=_known_params(tuple(params)),
                server=server.rstrip(b"\0"),
                incarnation=incarnation,
                version=version,
                s=State(*values),
                owners={name: Owner(*each) for name, *each in owners},
                waiters=[Waiter(*each) for each in waiters],
                **rest | {"told": tuple(rest["told"])},
            )
        except (TypeError, ValueError, KeyError):
            raise UnreadableImageError(is_foreign=False) from None

    @property
    def age(self) -> tuple[int, int]:
        """The order of a pool's images: the larger, the newer."""
        return self.incarnation, self.version

    def living(self) -> list[str]:
        """Return the owners that have not gone."""
        return [name for name, o in self.owners.items() if o.gone_at < 0.0]

    def is_due(self, now: float) -> bool:
        """Return whether the head may launch by now."""
        return bool(self.waiters) and self.wake_at <= now

    def lapsed(self, leases: Mapping[str, float], now: float) -> list[str]:
        """Return the living owners whose lease has ended or is unknown."""
        return [name for name in self.living() if leases.get(name, -inf) < now]


# The fields of an image that are encoded unchanged.
_PLAIN = ("lineage", "now", "wake_at", "cause", "told", "clock", "turn", "cuts")


def _values(of: Waiter | Owner) -> list[Any]:
    return [getattr(of, name) for name in of.__slots__]


def _format() -> str:
    """Return the name of this format: it changes with every encoded field, and with the length of the state's lists."""
    shapes = [[name, len(v) if isinstance(v, list) else 0] for name, v in zip(_STATE, _FIRST, strict=True)]
    names = [[each.name for each in fields(of)] for of in (Params, Owner, Waiter, Join, OwnerNews)]
    return FORMAT_NAME + hashlib.sha256(repr((shapes, names, _PLAIN, CAUSES)).encode()).hexdigest()[:12]


FORMAT_NAME = "paceline "
FORMAT = _format()


def newest(images: Iterable[Image]) -> Image | None:
    """Return the image of one pool that was decided last; None if there is none."""
    return max(images, key=lambda image: image.age, default=None)
