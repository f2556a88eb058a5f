"""Decides every recorded decision again: the same law on the same inputs must give the same results, to the bit.

What lives here: the shape of a recorded decision, the law's bags as plain numbers, and the replay. What must not: I/O
(decisions come in as an iterable; `journal` reads them from its tables) and any rule of the law.

Theory of operation. A driver reports each call of the law in order: name, arguments without `p` and `s`, result. The
law is a function of policy, state and arguments alone, and the state is a function of the calls before. So a fresh
state that is led through the same calls gives the same answers; the first that differs shows that the law has changed
since, or that the record has. Compared are the 64 bits of each number: inf, -0.0 and the last digit count.

A chain is what one pool's state went through in one leg of a run (one process's share of it). Beside the law's own
functions these names stand in it: `began` opens it (the policy's numbers), `repriced` changes the policy (the new
numbers, then `now`), `restored` replaces the state (its numbers). Calls that return nothing are checked by what the
calls after them answer.

Of a pool that several processes share, a chain holds the decisions that this process made, for whomever. `shared` says
that their times count from another zero, so many seconds before the run's own; `patched` is what other processes
changed in the state since (place and value, in turn): their decisions stand in their journals.
"""

from __future__ import annotations

import inspect
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

from governor import law
from governor.law import Params, State
from governor.model.policy import Policy

BEGAN = "began"
REPRICED = "repriced"
RESTORED = "restored"
SHARED = "shared"
PATCHED = "patched"

Numbers = tuple[float, ...]


class Decision(NamedTuple):
    """One call of the law. `sequence` counts within a chain, that is a pool and a leg; `began` has -1."""

    pool: str
    leg: int
    sequence: int
    name: str
    arguments: Numbers
    result: Numbers


@dataclass(frozen=True, slots=True)
class Difference:
    """The first decision that does not come out as recorded. `at_s`: its time, or the last one known before it.

    `arguments`: name and value each. `now`: what the law answers today, empty where it has no answer. `reason`: why.
    """

    decision: Decision
    at_s: float
    arguments: tuple[tuple[str, float], ...]
    now: Numbers
    reason: str

    def __str__(self) -> str:
        d = self.decision
        inputs = ", ".join(f"{name}={value!r}" for name, value in self.arguments[:12])
        more = f", and {len(self.arguments) - 12} more" if len(self.arguments) > 12 else ""
        place = f"decision {d.sequence:,} of pool {d.pool!r}, leg {d.leg}, at {self.at_s:.3f} s"
        return f"{place}: {d.name}({inputs}{more}): {self.reason}"


@dataclass(frozen=True, slots=True)
class Verified:
    """What a replay found. `checked`: decisions that came out the same, up to the first difference if there is one."""

    checked: int
    chains: int
    difference: Difference | None

    def __str__(self) -> str:
        if self.difference is None:
            return f"{self.checked:,} decisions in {self.chains:,} chains decided again: all equal"
        return f"{self.checked:,} decisions are equal, then one is not: {self.difference}"


# ---------------------------------------------------------------- numbers


_PACKERS: dict[int, struct.Struct] = {}


def packed(numbers: Numbers) -> bytes:
    """Numbers as little-endian doubles, 8 bytes each: exact, inf and -0.0 included."""
    packer = _PACKERS.get(len(numbers))
    if packer is None:
        packer = _PACKERS[len(numbers)] = struct.Struct(f"<{len(numbers)}d")
    return packer.pack(*numbers)


# Before the numbers of a stored call: length of its name, number of arguments, number of results. Then the name.
_HEAD = struct.Struct("<BHH")
_HEADS: dict[tuple[str, int, int], bytes] = {}


def stored(calls: Iterable[tuple[str, Numbers, Numbers]]) -> bytes:
    """Calls of the law (name, arguments, result) as bytes, exactly; `read_back` reads them."""
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
    """The calls that `stored` wrote. ValueError where the bytes end in the middle of one, or make no sense."""
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
    """A call's arguments, or its result, as plain numbers; a bag (`Params`, `State`) becomes its fields in order."""
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
    """What a function of the law returned, as numbers: nothing, one number or several."""
    if value is None:
        return ()
    return numbers_of(value) if isinstance(value, tuple) else (float(value),)


def params_of(numbers: Numbers) -> Params:
    """The bag whose fields, in order, are these numbers. ValueError if there are too many or too few."""
    return Params(**_fields_of(_PARAMS, numbers))


def state_of(numbers: Numbers) -> State:
    """The same for a state."""
    return State(**_fields_of(_STATE, numbers))


def patch_of(before: Numbers, after: Numbers) -> Numbers:
    """What makes the one state's numbers the other's: place and value, in turn."""
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
            # A slice, so that numbers that end too soon are complained of below and not here.
            values[column.name] = sum(map(type(like), numbers[place : place + 1]))
            place += 1
    if place != len(numbers):
        raise ValueError(f"{len(numbers)} numbers where {place} should be")
    return values


_PARAMS = Policy().params()
_STATE = State()
PARAMS_NUMBERS = len(numbers_of((_PARAMS,)))

# ---------------------------------------------------------------- replay


class _Call(NamedTuple):
    """A function of the law with the names and types of its arguments after `p` and `s`; `now`: the time's place."""

    function: Callable[..., Any]
    names: tuple[str, ...]
    kinds: tuple[type, ...]
    now: int


def _calls() -> dict[str, _Call]:
    found = {}
    for name, function in inspect.getmembers(law, inspect.isfunction):
        names = tuple(inspect.signature(function).parameters)
        if names[:2] == ("p", "s") and not name.startswith("_"):
            names = names[2:]
            kinds = tuple(int if function.__annotations__[each] is int else float for each in names)
            found[name] = _Call(function, names, kinds, names.index("now") if "now" in names else -1)
    return found


CALLS = _calls()


class NoSuchCallError(ValueError):
    """A decision that this version of the law cannot take."""


class Replay:
    """One chain's policy and state, led through recorded calls. `at_s`: the latest time seen, 0 before the first."""

    def __init__(self) -> None:
        self.params = Policy().params()
        self.state = State()
        self.at_s = 0.0
        self.zero_s = 0.0  # the chain's time at the run's zero

    def decide(self, name: str, arguments: Numbers) -> Numbers:
        """Makes the call and returns its result as numbers.

        `NoSuchCallError` where this version's law has no such call; what the law raises on impossible arguments goes
        through.
        """
        if name == BEGAN:
            self.params, self.state = params_of(arguments), State()
            return ()
        if name == RESTORED:
            self.state = state_of(arguments)
            return ()
        if name == SHARED:
            (self.zero_s,) = arguments
            return ()
        if name == PATCHED:
            numbers = list(numbers_of((self.state,)))
            for place, value in zip(arguments[::2], arguments[1::2], strict=True):
                numbers[int(place)] = value
            self.state = state_of(tuple(numbers))
            return ()
        if name == REPRICED:
            params = params_of(arguments[:-1])
            self._time_is(arguments[-1])
            law.repriced(self.params, params, self.state, arguments[-1])
            self.params = params
            return ()
        call = CALLS.get(name)
        if call is None:
            raise NoSuchCallError("this version's law has no function of that name")
        if len(arguments) != len(call.names):
            raise NoSuchCallError(f"this version's law takes {len(call.names)} arguments there, not {len(arguments)}")
        if call.now >= 0:
            self._time_is(arguments[call.now])
        values = (kind(value) for kind, value in zip(call.kinds, arguments, strict=True))
        return result_of(call.function(self.params, self.state, *values))

    def _time_is(self, now: float) -> None:
        self.at_s = max(self.at_s, now - self.zero_s) if math.isfinite(now) else self.at_s

    def check(self, decision: Decision) -> Difference | None:
        """Makes the decision again; None if it comes out as recorded."""
        try:
            now = self.decide(decision.name, decision.arguments)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, NoSuchCallError) else f"the law cannot decide that: {error}"
            return self._difference(decision, (), reason)
        if packed(now) == packed(decision.result):
            return None
        return self._difference(decision, now, f"recorded was {_shown(decision.result)}, the law says {_shown(now)}")

    def _difference(self, decision: Decision, now: Numbers, reason: str) -> Difference:
        names = CALLS[decision.name].names if decision.name in CALLS else ()
        names += tuple(f"number {place}" for place in range(len(names), len(decision.arguments)))
        inputs = tuple(zip(names, decision.arguments, strict=False))
        return Difference(decision, self.at_s, inputs, now, reason)


def _shown(result: Numbers) -> str:
    return ", ".join(map(repr, result)) if result else "nothing"


def verify(decisions: Iterable[Decision]) -> Verified:
    """Decides again, on fresh states, what was decided; stops at the first difference.

    `decisions` come in order within each chain; chains may be interleaved. One that does not open with `began`, and one
    that lacks a decision in between, differ there: nothing can be said of what follows.
    """
    chains: dict[tuple[str, int], tuple[Replay, int]] = {}
    checked = 0
    for decision in decisions:
        chain = (decision.pool, decision.leg)
        if decision.name == BEGAN:
            replay, expected = Replay(), decision.sequence
        elif chain in chains:
            replay, expected = chains[chain]
        else:
            gap = "nothing says with which policy this chain began"
            return Verified(checked, len(chains), Replay()._difference(decision, (), gap))
        if decision.sequence != expected:
            gap = f"decision {expected:,} should stand here: what was decided in between is not recorded"
            return Verified(checked, len(chains), replay._difference(decision, (), gap))
        difference = replay.check(decision)
        chains[chain] = replay, expected + 1
        if difference is not None:
            return Verified(checked, len(chains), difference)
        checked += decision.name != BEGAN
    return Verified(checked, len(chains), None)
