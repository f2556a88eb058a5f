"""How the members of a pool that has lost its memory meet: who has come, and when one of them may rebuild it.

Whoever notices that an image is not to be believed takes it away, rings for the others and meets them at the muster:
each leaves its `Join` and the newest image that it knows. When all owners of the newest of these have come, and
GATHER_S are over (others may have entered since), or after MUSTER_S, one of them rebuilds the pool and all go on. The
newest image among the living, and the launches that came after it, are everything that was decided unless its decider
died. The image of another version of Paceline is left alone as long as one of its processes lives.
"""

from __future__ import annotations

from typing import Any

import msgpack

from governor.sharedquota.image import FORMAT, FORMAT_NAME, Image, Join, newest
from governor.sharedquota.interfaces import StoreLostError

MUSTER_S = 3.0
# Processes that no image names yet are waited for so long: longer than the longest pause before an attempt to connect.
# A pool that nobody knows begins after the shorter time, in which whoever is connected has heard the bell.
GATHER_S, BEGIN_S = 1.0, 0.2


class Muster:
    """A muster under way, as the member `owner` sees it.

    `doubted`: the head of the image that does not count, empty where there is none; `is_foreign`: another version of
    Paceline wrote it. `up_s`: for how long the server had been up. `began_at`, `here_at`: on the loop's clock, when
    this process first met the others, and when it came this time. `scale`: seconds of that clock per second.

    Of the records that came last: `joins` by owner, `images`, whether all who ever came `are_all_here`, and whether
    others who are `absent` may know of launches that are in no image.
    """

    def __init__(
        self,
        owner: str,
        doubted: bytes,
        up_s: float,
        began_at: float,
        here_at: float,
        scale: float,
        *,
        is_foreign: bool,
    ) -> None:
        self._owner = owner
        self._doubted = doubted
        self._is_foreign = is_foreign
        self._up_s = up_s
        self._began_at = began_at
        self._here_at = self._calm_at = here_at
        self._calm_ms = 0
        self._scale = scale
        self._mustered: set[str] = set()
        self.joins: dict[str, Join] = {}
        self.images: list[Image] = []
        self.are_all_here = self.absent = False

    def may_rebuild(
        self, records: dict[str, bytes], leases: dict[str, float], server_us: int, now: float, asked_at: float
    ) -> bool:
        """Whether this member rebuilds the pool now, by what all have left: see `QuotaStore.muster`.

        `leases`: by owner, until when. StoreLostError where processes of another version share the pool.
        """
        began_ms = _number(records.pop("", b""), server_us // 1000)
        if began_ms != self._calm_ms:
            # All records were lost since: others may have met, begun the pool and lost it without our seeing them.
            self._calm_at, self._calm_ms = (asked_at if self._calm_ms else self._here_at), began_ms
        self._mustered |= set(records)
        entries = {name: found for name, each in records.items() if (found := _record(each)) is not None}
        others = [name for name, until in leases.items() if until >= now and name not in entries]
        if self._is_foreign and others:
            raise StoreLostError("another version of Paceline shares this pool: wait for its processes, or end them")
        self.joins = {name: join for name, (join, _) in entries.items()}
        self.images = images = [image for _, image in entries.values() if image is not None]
        calm_s, whole_s = ((asked_at - at) / self._scale for at in (self._calm_at, self._began_at))
        self.are_all_here = self._mustered == set(records)
        is_calm = self.are_all_here and calm_s >= (BEGIN_S if self._began_at == self._here_at else GATHER_S)
        is_begun = not images and not self._doubted and self._up_s >= MUSTER_S and is_calm
        is_complete = _complete(images, entries) and self.are_all_here and whole_s >= GATHER_S
        is_over = max(whole_s, (server_us / 1000 - began_ms) / 1000) >= MUSTER_S
        # Others may know of launches that are in no image: another version, or whoever still lives where an image was
        # there; or where there was none, whoever has begun the pool and lost it at once.
        self.absent = (
            any(map(_is_foreign, records.values()))
            or bool(self._doubted and others)
            or not (images or is_begun or calm_s >= GATHER_S)
        )
        return _may_rebuild(self._owner, images, entries) and (is_complete or is_begun or is_over)


def _record(data: bytes) -> tuple[Join, Image | None] | None:
    """A record of the muster; None for one that another version of Paceline has left, and for what nobody has."""
    try:
        found, packed, image = msgpack.unpackb(data)
        return (Join(*packed[1:]), Image.decoded(image) if image else None) if found == FORMAT else None
    except (TypeError, ValueError):
        return None


def _is_foreign(data: bytes) -> bool:
    """Whether another version of Paceline has left this record."""
    try:
        found = msgpack.unpackb(data)[0]
    except (TypeError, ValueError, LookupError):
        return False
    return isinstance(found, str) and found != FORMAT and found.startswith(FORMAT_NAME)


def _number(data: bytes, otherwise: int) -> int:
    return int(data) if data.isdigit() else otherwise


def _may_rebuild(name: str, images: list[Image], entries: dict[str, Any]) -> bool:
    """Whether the newest image has this process in it, or none that is here.

    Else those that are in it rebuild the pool: should what another rebuilds be lost before they have seen it, they
    would take theirs for the newest.
    """
    best = newest(images)
    known = best.living() if best is not None else []
    return name in known or not any(each in entries for each in known)


def _complete(images: list[Image], entries: dict[str, Any]) -> bool:
    """Whether all owners of the newest image have come."""
    best = newest(images)
    return best is not None and all(name in entries for name in best.living())
