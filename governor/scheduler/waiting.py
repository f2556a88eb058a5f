"""How long a request would wait now: the law asked ahead of time, on a copy of its state.

Those that wait before it are launched in their order, each as soon as the law admits it; a place in flight comes free
when an answer has taken as long as answers lately have. What cannot be known is left out: refusals, what is submitted
later and goes first, and that answers use less than they reserved.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import fields
from heapq import heapify, heappop, heappush
from math import inf

from governor import law
from governor.law import Params, State

# (reserve, standing) of an attempt that waits; (launched at, reserve) of one in flight.
Waiting = tuple[float, int]
Flying = tuple[float, float]


def copied(s: State) -> State:
    """The same state, which can be changed without changing that one."""
    other = copy(s)
    for each in fields(State):
        value = getattr(s, each.name)
        if isinstance(value, list):
            setattr(other, each.name, value.copy())
    return other


def wait_s(
    p: Params, s: State, ahead: Iterable[Waiting], flying: Iterable[Flying], mine: Waiting, answer_s: float, now: float
) -> float:
    """Seconds until `mine` may be sent; inf where that depends on what nobody can foresee (a pause).

    `ahead`: what goes first, in order. `flying`: what is in flight. `answer_s`: how long an answer takes. `s` stays as
    it is.
    """
    s = copied(s)
    ends = [(max(now, launched + answer_s), launched, reserve) for launched, reserve in flying]
    heapify(ends)
    at = now
    for reserve, standing in (*ahead, mine):
        while True:
            admitted_at, _ = law.admission(p, s, reserve, standing, at)
            if not ends or admitted_at <= ends[0][0]:
                break
            at, launched, held = heappop(ends)
            law.settled(p, s, held, held, launched, at)
        if admitted_at == inf:
            return inf
        at = max(at, admitted_at)
        law.launched(p, s, reserve, standing, at, 0.5)
        heappush(ends, (at + answer_s, at, reserve))
    return at - now
