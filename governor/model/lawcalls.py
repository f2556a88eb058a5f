"""Represent calls of the law as plain numbers, as records keep them and messages carry them.

Besides the law's own functions these names occur in a chain of calls: `began` opens it (the policy's numbers),
`repriced` changes the policy (the new numbers, then `now`), `restored` replaces the state (its numbers). In a pool that
several processes share, `shared` says that times count from another zero, so many seconds before the run's own, and
`patched` lists what other processes have changed in the state since (place and value, in turn).
"""

from __future__ import annotations

import inspect
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from governor import law
from governor.law import CELLS, CELLS_BEHIND, DIMENSIONS, SLIDING, Params, State, cell_s
from governor.model.policy import Policy

BEGAN = "began"
REPRICED = "repriced"
RESTORED = "restored"
SHARED = "shared"
PATCHED = "patched"

Numbers = tuple[float, ...]

_BREAKER_TIMES = ("silent_since", "outage_from", "outage_opened_at", "outage_until", "probe_at")
_SOUGHT_TIMES = ("sought_from", "sought_at", "opened_at", "cut_at", "refused_at")
_TIMES = (
    "last_launch_at",
    "next_slot_at",
    "hold_until",
    "burst_at",
    "pace_at",
    "paced_until",
    *_SOUGHT_TIMES,
    *_BREAKER_TIMES,
)
# The circuit breaker's fields of a state.
BREAKER = ("unanswered", "failing", "several", "probe_gap_s", *_BREAKER_TIMES)
_FIELDS = tuple(each.name for each in fields(State))


_PACKERS: dict[int, struct.Struct] = {}


def packed(numbers: Numbers) -> bytes:
    """Return numbers as little-endian doubles, 8 bytes each: exact, inf and -0.0 included."""
    packer = _PACKERS.get(len(numbers))
    if packer is None:
        packer = _PACKERS[len(numbers)] = struct.Struct(f"<{len(numbers)}d")
    return packer.pack(*numbers)


# The header of a stored call: length of its name, number of arguments, number of results. The name follows.
_HEAD = struct.Struct("<BHH")
_HEADS: dict[tuple[str, int, int], bytes] = {}


def stored(calls: Iterable[tuple[str, Numbers, Numbers]]) -> bytes:
    """Return calls of the law (name, arguments, result) as bytes, exactly; `read_back` reads them."""
    parts = []
    for name, arguments, result in calls:
        key = name, len(arguments), len(result)
        head = _HEADS.get(key)
        if head is None:
            text = name.encode("ascii")
            head = _HEADS[key] = _HEAD.pack(len(text), len(arguments), len(result)) + text
        parts.append(head)
        parts.append(packed(arguments + result))
    return b"".join(parts)


def read_back(data: bytes) -> Iterator[tuple[str, Numbers, Numbers]]:
    """Yield the calls that `stored` wrote.

    Raise ValueError if the bytes are malformed or end in the middle of a call.
    """
    place = 0
    while place < len(data):
        if place + _HEAD.size > len(data):
            raise ValueError("a stored call is cut off")
        letters, arguments, results = _HEAD.unpack_from(data, place)
        start = place + _HEAD.size
        place = start + letters + 8 * (arguments + results)
        if place > len(data):
            raise ValueError("a stored call is cut off")
        numbers = struct.unpack_from(f"<{arguments + results}d", data, start + letters)
        yield data[start : start + letters].decode("ascii"), numbers[:arguments], numbers[arguments:]


def numbers_of(values: Iterable[Any]) -> Numbers:
    """Return a call's arguments or result as plain numbers; a bag (`Params`, `State`) becomes its fields in order."""
    flat: list[float] = []
    for value in values:
        if is_dataclass(value):
            flat.extend(numbers_of(getattr(value, column.name) for column in fields(value)))
        elif isinstance(value, list):
            flat.extend(map(float, value))
        else:
            flat.append(float(value))
    return tuple(flat)


def result_of(value: Any) -> Numbers:
    """Return the result of one of the law's functions as a sequence of numbers: none, one or several."""
    if value is None:
        return ()
    return numbers_of(value) if isinstance(value, tuple) else (float(value),)


def params_of(numbers: Numbers) -> Params:
    """Return the bag whose fields, in order, are these numbers. Raise ValueError if there are too many or too few."""
    return Params(**_fields_of(_PARAMS, numbers))


def state_of(numbers: Numbers) -> State:
    """Return the state whose fields, in order, are these numbers. Raise ValueError if there are too many or too few."""
    return State(**_fields_of(_STATE, numbers))


def patch_of(before: Numbers, after: Numbers) -> Numbers:
    """Return the patch that turns the numbers of state `before` into those of `after`: place and value, in turn."""
    changes = ((float(i), new) for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new)
    return tuple(number for change in changes for number in change)


def _fields_of(model: Params | State, numbers: Numbers) -> dict[str, Any]:
    values: dict[str, Any] = {}
    place = 0
    for column in fields(model):
        like = getattr(model, column.name)
        if isinstance(like, list):
            values[column.name] = list(numbers[place : place + len(like)])
            place += len(like)
        else:
            # A slice, so that numbers that end too soon are reported below and not here.
            values[column.name] = sum(map(type(like), numbers[place : place + 1]))
            place += 1
    if place != len(numbers):
        raise ValueError(f"{len(numbers)} numbers where {place} should be")
    return values


_PARAMS = Policy().params()
_STATE = State()

# ---------------------------------------------------------------- replay


class _Call(NamedTuple):
    """A function of the law with the names and types of its arguments after `p` and `s`.

    `columns`: the names of the numbers that represent them, where an array of amounts takes one per dimension. `now`:
    the time's place among these.
    """

    function: Callable[..., Any]
    names: tuple[str, ...]
    kinds: tuple[type, ...]
    columns: tuple[str, ...]
    now: int

    def arguments(self, numbers: Numbers) -> list[Any]:
        """Return the arguments that these numbers represent."""
        found: list[Any] = []
        place = 0
        for kind in self.kinds:
            if kind is list:
                found.append(list(numbers[place : place + DIMENSIONS]))
                place += DIMENSIONS
            else:
                found.append(kind(numbers[place]))
                place += 1
        return found


_KINDS: dict[Any, type] = {int: int, list[float]: list}


def _calls() -> dict[str, _Call]:
    found = {}
    for name, function in inspect.getmembers(law, inspect.isfunction):
        names = tuple(inspect.signature(function).parameters)
        if names[:2] == ("p", "s") and not name.startswith("_"):
            names = names[2:]
            kinds = tuple(_KINDS.get(function.__annotations__[each], float) for each in names)
            columns = tuple(
                column
                for each, kind in zip(names, kinds, strict=True)
                for column in ([f"{each}[{d}]" for d in range(DIMENSIONS)] if kind is list else [each])
            )
            found[name] = _Call(function, names, kinds, columns, columns.index("now") if "now" in columns else -1)
    return found


CALLS = _calls()


def moved(p: Params, s: State, by_s: float) -> State:
    """Return a copy of a state with all its times `by_s` later: the same pool seen from another zero.

    The cells of a sliding window move by whole cells, up to one more: never looser.
    """
    values: list[Any] = [getattr(s, name) for name in _FIELDS]
    copies: list[Any] = [each.copy() if isinstance(each, list) else each for each in values]
    t = State(*copies)
    for name in _TIMES:
        setattr(t, name, getattr(t, name) + by_s)
    for times in (t.full_at, t.window_at, t.mirror_at, t.synced_at):
        times[:] = [at + by_s for at in times]
    t.zero_s -= by_s
    for d in range(p.dimensions):
        if p.window[d] != SLIDING and not p.sought[d]:
            continue
        passed = math.ceil(by_s / cell_s(p, d))
        ring = s.cells[d * CELLS : (d + 1) * CELLS]
        if not any(ring):
            t.cell_at[d] = 0.0
            continue
        newest = int(s.cell_at[d])
        for cell in range(newest - CELLS_BEHIND, newest + 1):
            t.cells[d * CELLS + (cell + passed) % CELLS] = ring[cell % CELLS]
        t.cell_at[d] = float(newest + passed)
    return t
