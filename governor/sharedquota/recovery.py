"""Recovery of a pool that has lost its memory: which members have reported, and when one may rebuild the pool.

The process that notices an invalid image removes it and calls the others; each leaves its `Join` and the newest image
that it knows. When all owners of the newest of these have come and GATHER_S have
passed (others may have entered since), or after RECOVERY_S, one of them rebuilds the pool and all continue. The newest
image among the living, and the launches that came after it, are everything that was decided, unless the deciding
process died. The image of another version of Paceline is left alone as long as one of its processes lives.
"""

from __future__ import annotations

from typing import Any

import msgpack

from governor.sharedquota.image import FORMAT, FORMAT_NAME, Image, Join, newest
from governor.sharedquota.interfaces import StoreLostError

RECOVERY_S = 3.0
# Wait this long for processes that are in no image yet: longer than the longest pause before an attempt to connect. A
# new pool begins after the shorter time, in which every connected process has heard the bell.
GATHER_S, BEGIN_S = 1.0, 0.2


class Recovery:
    """A recovery under way, as the member `owner` sees it.

    `doubted`: the head of the invalid image, empty if there is none; `is_foreign`: another version of Paceline wrote
    that image. `up_s`: the server's uptime. `began_at`, `here_at`: on the loop's clock, when this process first met the
    others, and when it came this time. `scale`: seconds of that clock per second.

    The newest records determine: `joins` by owner; `images`; `are_all_here`, whether every owner that ever came has a
    record; `absent`, whether other processes may know of launches that are in no image.
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
        self._met: set[str] = set()
        self.joins: dict[str, Join] = {}
        self.images: list[Image] = []
        self.are_all_here = self.absent = False

    def may_rebuild(
        self, records: dict[str, bytes], leases: dict[str, float], server_us: int, now: float, asked_at: float
    ) -> bool:
        """Return whether this member rebuilds the pool now, judging by all records: see `QuotaStore.recovery`.

        `leases`: by owner, until when. Raises StoreLostError if processes of another version share the pool.
        """
        began_ms = _number(records.pop("", b""), server_us // 1000)
        if began_ms != self._calm_ms:
            # All records were lost meanwhile: others may have met, begun the pool and lost it unnoticed by us.
            self._calm_at, self._calm_ms = (asked_at if self._calm_ms else self._here_at), began_ms
        self._met |= set(records)
        entries = {name: found for name, each in records.items() if (found := _record(each)) is not None}
        others = [name for name, until in leases.items() if until >= now and name not in entries]
        if self._is_foreign and others:
            raise StoreLostError("another version of Paceline shares this pool: wait for its processes, or end them")
        self.joins = {name: join for name, (join, _) in entries.items()}
        self.images = images = [image for _, image in entries.values() if image is not None]
        calm_s, whole_s = ((asked_at - at) / self._scale for at in (self._calm_at, self._began_at))
        self.are_all_here = self._met == set(records)
        is_calm = self.are_all_here and calm_s >= (BEGIN_S if self._began_at == self._here_at else GATHER_S)
        is_begun = not images and not self._doubted and self._up_s >= RECOVERY_S and is_calm
        is_complete = _complete(images, entries) and self.are_all_here and whole_s >= GATHER_S
        is_over = max(whole_s, (server_us / 1000 - began_ms) / 1000) >= RECOVERY_S
        # Other processes may know of launches that are in no image: those of another version; those still alive if
        # there was an image; or, if there was none, those that began the pool and lost it at once.
        self.absent = (
            any(map(_is_foreign, records.values()))
            or bool(self._doubted and others)
            or not (images or is_begun or calm_s >= GATHER_S)
        )
        return _may_rebuild(self._owner, images, entries) and (is_complete or is_begun or is_over)


def _record(data: bytes) -> tuple[Join, Image | None] | None:
    """Return a record of the recovery; None if it is from another version of Paceline, or unreadable."""
    try:
        found, packed, image = msgpack.unpackb(data)
        return (Join(*packed[1:]), Image.decoded(image) if image else None) if found == FORMAT else None
    except (TypeError, ValueError):
        return None


def _is_foreign(data: bytes) -> bool:
    """Return whether another version of Paceline has left this record."""
    try:
        found = msgpack.unpackb(data)[0]
    except (TypeError, ValueError, LookupError):
        return False
    return isinstance(found, str) and found != FORMAT and found.startswith(FORMAT_NAME)


def _number(data: bytes, otherwise: int) -> int:
    return int(data) if data.isdigit() else otherwise


def _may_rebuild(name: str, images: list[Image], entries: dict[str, Any]) -> bool:
    """Return whether the newest image has this process in it, or none of the processes present.

    Otherwise the processes in the image rebuild the pool: if another process rebuilt it and the result were lost before
    they have seen it, they would take their own image for the newest.
    """
    best = newest(images)
    known = best.living() if best is not None else []
    return name in known or not any(each in entries for each in known)


def _complete(images: list[Image], entries: dict[str, Any]) -> bool:
    """Return whether all owners of the newest image have come."""
    best = newest(images)
    return best is not None and all(name in entries for name in best.living())
