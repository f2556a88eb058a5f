"""Repeat every recorded decision: the same law on the same inputs must give the same results, to the bit.

Theory of operation. A driver reports each call of the law in order: name, arguments without `p` and `s`, result. The
law is a function of policy, state and arguments alone, and the state is a function of the calls before. So a fresh
state that is led through the same calls gives the same answers; the first that differs shows that the law has changed
since, or that the record has. The 64 bits of each number are compared: inf, -0.0 and the last digit count.

A chain is the history of one pool's state in one leg of a run (one process's share of it). Besides the law's own
functions these names occur in it: `began` opens it (the policy's numbers), `repriced` changes the policy (the new
numbers, then `now`), `restored` replaces the state (its numbers). Calls that return nothing are checked by the results
of the calls after them.

For a pool that several processes share, a chain holds the decisions that this process made, for itself or for others.
`shared` says that their times count from another zero, so many seconds before the run's own; `patched` lists what other
processes changed in the state since (place and value, in turn): their decisions are in their own journals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from governor import law
from governor.law import State
from governor.model.lawcalls import (
    BEGAN,
    CALLS,
    PATCHED,
    REPRICED,
    RESTORED,
    SHARED,
    Numbers,
    numbers_of,
    packed,
    params_of,
    result_of,
    state_of,
)
from governor.model.policy import Policy


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
    """The first decision whose result is not as recorded. `at_s`: its time, or the last one known before it.

    `arguments`: name and value each. `now`: the law's result today, empty if it has none. `reason`: why.
    """

    decision: Decision
    at_s: float
    arguments: tuple[tuple[str, float], ...]
    now: Numbers
    reason: str

    def __str__(self) -> str:
        d = self.decision
        # Most of the eight amounts of a need are 0.
        shown = [(name, value) for name, value in self.arguments if value or not name.endswith("]")]
        inputs = ", ".join(f"{name}={value!r}" for name, value in shown[:12])
        more = f", and {len(shown) - 12} more" if len(shown) > 12 else ""
        place = f"decision {d.sequence:,} of pool {d.pool!r}, leg {d.leg}, at {self.at_s:.3f} s"
        return f"{place}: {d.name}({inputs}{more}): {self.reason}"


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The result of a replay.

    `checked`: decisions that came out the same, up to the first difference if there is one.
    """

    checked: int
    chains: int
    difference: Difference | None

    def __str__(self) -> str:
        if self.difference is None:
            return f"{self.checked:,} decisions in {self.chains:,} chains repeated: all equal"
        return f"{self.checked:,} decisions are equal, then one is not: {self.difference}"


class NoSuchCallError(ValueError):
    """Raised for a decision that this version of the law cannot make."""


class LawReplay:
    """One chain's policy and state, led through recorded calls. `at_s`: the latest time seen, 0 before the first."""

    def __init__(self) -> None:
        self.params = Policy().params()
        self.state = State()
        self.at_s = 0.0
        self.zero_s = 0.0  # the chain's time at the run's zero

    def decide(self, name: str, arguments: Numbers) -> Numbers:
        """Make the call and return its result as numbers.

        Raise `NoSuchCallError` if this version's law has no such call; exceptions that the law raises on impossible
        arguments pass through.
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
        if len(arguments) != len(call.columns):
            raise NoSuchCallError(f"this version's law takes {len(call.columns)} numbers there, not {len(arguments)}")
        if call.now >= 0:
            self._time_is(arguments[call.now])
        return result_of(call.function(self.params, self.state, *call.arguments(arguments)))

    def _time_is(self, now: float) -> None:
        self.at_s = max(self.at_s, now - self.zero_s) if math.isfinite(now) else self.at_s

    def check(self, decision: Decision) -> Difference | None:
        """Make the decision again; return None if the result is as recorded."""
        try:
            now = self.decide(decision.name, decision.arguments)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, NoSuchCallError) else f"the law cannot decide that: {error}"
            return self._difference(decision, (), reason)
        if packed(now) == packed(decision.result):
            return None
        return self._difference(decision, now, f"the record says {_shown(decision.result)}, the law says {_shown(now)}")

    def _difference(self, decision: Decision, now: Numbers, reason: str) -> Difference:
        names = CALLS[decision.name].columns if decision.name in CALLS else ()
        names += tuple(f"number {place}" for place in range(len(names), len(decision.arguments)))
        inputs = tuple(zip(names, decision.arguments, strict=False))
        return Difference(decision, self.at_s, inputs, now, reason)


def _shown(result: Numbers) -> str:
    return ", ".join(map(repr, result)) if result else "nothing"


def verify(decisions: Iterable[Decision]) -> VerifyResult:
    """Repeat recorded decisions on fresh states; stop at the first difference.

    `decisions` come in order within each chain; chains may be interleaved. A chain that does not open with `began`, or
    that lacks a decision in between, differs at that point: nothing can be said of the decisions that follow.
    """
    chains: dict[tuple[str, int], tuple[LawReplay, int]] = {}
    checked = 0
    for decision in decisions:
        chain = (decision.pool, decision.leg)
        if decision.name == BEGAN:
            replay, expected = LawReplay(), decision.sequence
        elif chain in chains:
            replay, expected = chains[chain]
        else:
            gap = "the policy at the start of this chain is not recorded"
            return VerifyResult(checked, len(chains), LawReplay()._difference(decision, (), gap))
        if decision.sequence != expected:
            gap = f"decision {expected:,} is expected here: the decisions in between are not recorded"
            return VerifyResult(checked, len(chains), replay._difference(decision, (), gap))
        difference = replay.check(decision)
        chains[chain] = replay, expected + 1
        if difference is not None:
            return VerifyResult(checked, len(chains), difference)
        checked += decision.name != BEGAN
    return VerifyResult(checked, len(chains), None)
