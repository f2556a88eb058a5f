"""Checkpoints of a pool's use, which outlive its process: the law's state and settings as text, and their dating.

A checkpoint is written in the same transaction as the launches and answers that led to it. It is read by name, so that
another version of the law takes over every field that it knows.

Time. A run counts its own seconds, and a process that resumes it must know how many have passed since the checkpoint.
On the same boot of the same machine the boot clock tells, even if the wall clock was changed. After a reboot, or on
another machine, the wall clocks are compared, and are assumed to be right; a clock that went back counts as no time at
all, so that recorded use never lies in the future or is forgotten early.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from governor import law
from governor.law import Params, State
from governor.model.lawcalls import moved
from governor.model.needs import of_tokens
from governor.model.policy import Policy

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Continues while the machine sleeps, which the monotonic clock of Linux does not.
_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)


class Moment(NamedTuple):
    """One moment by two clocks: seconds since 1970, and since the boot of that id ("" = no such clock here)."""

    epoch_s: float
    boot: str
    boot_s: float

    def elapsed_s(self, later: Moment) -> float:
        """Return seconds from this moment to a later one, never below 0: by the boot clock if both have the same."""
        if self.boot and self.boot == later.boot and later.boot_s >= self.boot_s:
            return later.boot_s - self.boot_s
        return max(0.0, later.epoch_s - self.epoch_s)


def this_moment() -> Moment:
    """Return the present moment by all clocks."""
    if _BOOT_CLOCK is None:
        return Moment(time.time(), "", 0.0)
    return Moment(time.time(), _boot_id(), time.clock_gettime(_BOOT_CLOCK))


@cache
def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text("ascii").strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A pool's settings and state at `at_s` of its run's time; `moment` dates it.

    `state`: must not be changed. `unlike`: fields that this version of the law lacks, or that its version lacked.
    """

    params: Params
    state: State
    at_s: float
    moment: Moment
    unlike: tuple[str, ...] = ()

    def now_s(self, scale: float = 1.0) -> float:
        """Return the run's time now; `scale`: how many times as fast as the machine's its clock runs."""
        return self.at_s + self.moment.elapsed_s(this_moment()) * scale

    def text(self) -> str:
        """Return settings and state as JSON, by name."""
        both = {"params": _short(self.params), "state": _short(self.state)}
        return json.dumps(both, separators=(",", ":"))

    def carried_over(self, params: Params, at_s: float, by_s: float = 0.0) -> State:
        """Return the state with which a new process begins at `at_s`, under these settings, its times `by_s` later.

        Used tokens stay used. Nothing is in flight any more, and a new process is not paused. A process that begins in
        an outage may probe at once.
        """
        s = moved(self.params, self.state, by_s) if by_s else copied(self.state)
        s.in_flight = s.finalize_open = s.alone = s.paused = 0
        s.probe_at = min(s.probe_at, at_s)
        if params != self.params:
            law.repriced(self.params, params, s, at_s)
        return s


def taken_from(params: Params, state: State, at_s: float) -> Checkpoint:
    """Return a checkpoint of this moment: the state is copied, the settings never change."""
    return Checkpoint(params, copied(state), at_s, this_moment())


def copied(state: State) -> State:
    """Return a separate state with the same numbers."""
    return State(**values_of(state))


def values_of(bag: Params | State) -> dict[str, Any]:
    """Return the fields by name, lists copied."""
    values = ((each, getattr(bag, each)) for each in type(bag).__slots__)
    return {name: value.copy() if isinstance(value, list) else value for name, value in values}


def _short(bag: Params | State) -> dict[str, Any]:
    """Return the fields by name, lists of one repeated value (most are) shortened to `[[length, value]]`."""
    return {
        name: [[len(value), value[0]]] if isinstance(value, list) and value.count(value[0]) == len(value) > 1 else value
        for name, value in values_of(bag).items()
    }


def read_back(text: str, at_s: float, moment: Moment) -> Checkpoint:
    """Return the checkpoint that `text` wrote. Raise ValueError if it is not one."""
    found = json.loads(text)
    unlike: list[str] = []
    params, state = Policy().params(), State()
    for bag, name in ((params, "params"), (state, "state")):
        if not isinstance(found, dict) or not isinstance(found.get(name), dict):
            raise ValueError(f"a checkpoint without {name}")
        _fill(bag, found[name], unlike)
    return Checkpoint(params, state, at_s, moment, tuple(unlike))


# The lengths of lists that an earlier law kept for its first four dimensions, and for two sliding windows.
_EARLIER = (4, 2 * law.CELLS)


def _fill(bag: Any, stored: dict[str, Any], unlike: list[str]) -> None:
    """Take over, by name, the fields of the same shape; fields without a match on either side are `unlike`."""
    known = type(bag).__slots__
    unlike += [name for name in stored if name not in known]
    for name in known:
        like, value = getattr(bag, name), stored.get(name)
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
            value = [value[0][1]] * min(int(value[0][0]), len(like) + 1 if isinstance(like, list) else 1)
        if isinstance(like, list) and isinstance(value, list) and len(value) in (len(like), *_EARLIER):
            setattr(bag, name, [float(each) for each in value] + like[len(value) :])
        elif isinstance(like, list) and isinstance(value, int | float):
            # An earlier law had one value for both limits per minute.
            setattr(bag, name, [float(value), float(value), *like[2:]])
        elif not isinstance(like, list) and isinstance(value, int | float):
            setattr(bag, name, type(like)(value))
        else:
            unlike.append(name)


class Launch(NamedTuple):
    """One launch on record: when, how many tokens it holds, whether it was a first attempt."""

    at_s: float
    tokens: float
    is_first: bool


def rebuilt(params: Params, launches: Iterable[Launch]) -> State:
    """Return the state that these launches leave, in order of time: for a journal without a readable checkpoint.

    Holds and figures from headers are lost; refused launches count as used.
    """
    s = State()
    for launch in launches:
        law.launched(params, s, of_tokens(launch.tokens), law.FIRST if launch.is_first else law.RETRY, launch.at_s, 0.5)
    s.in_flight = s.alone = 0
    return s
