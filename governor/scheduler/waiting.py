"""Estimates how long a request would wait now, by applying the law ahead of time to a copy of its state.

The requests ahead of it are launched in order, each as soon as the law admits it. A place in flight comes free when an
answer has taken as long as recent answers have. The estimate leaves out what cannot be known: refusals, later requests
that go first, and answers that use less than they reserved.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import fields
from heapq import heapify, heappop, heappush
from math import inf

from governor import law
from governor.law import Params, State

# (need, standing) of a waiting attempt; (launched at, need) of an attempt in flight.
Waiting = tuple[list[float], int]
Flying = tuple[float, list[float]]


def copied(s: State) -> State:
    """Return a copy of the state that can be changed independently."""
    other = copy(s)
    for each in fields(State):
        value = getattr(s, each.name)
        if isinstance(value, list):
            setattr(other, each.name, value.copy())
    return other


def wait_s(
    p: Params, s: State, ahead: Iterable[Waiting], flying: Iterable[Flying], mine: Waiting, answer_s: float, now: float
) -> float:
    """Return the seconds until `mine` may be sent; inf if that cannot be foreseen (a pause).

    `ahead`: the attempts that go first, in order. `flying`: the attempts in flight. `answer_s`: how long an answer
    takes. `s` is not changed.
    """
    s = copied(s)
    ends = [(max(now, launched + answer_s), launched, need) for launched, need in flying]
    heapify(ends)
    at = now
    for need, standing in (*ahead, mine):
        while True:
            admitted_at, _ = law.admission(p, s, need, standing, at)
            if not ends or admitted_at <= ends[0][0]:
                break
            at, launched, held = heappop(ends)
            law.settled(p, s, held, held, launched, at)
        if admitted_at == inf:
            return inf
        at = max(at, admitted_at)
        law.launched(p, s, need, standing, at, 0.5)
        heappush(ends, (at + answer_s, at, need))
    return at - now
