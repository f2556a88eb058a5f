"""One request on its way, as the scheduler knows it. Live and simulated jobs add the fields that their shells need."""

from __future__ import annotations

from governor import law
from governor.model.needs import TOKENS, Weights


class Scheduled:
    """One request on its way: the fields that the scheduler needs.

    `reserve`: the tokens set aside, for records and the order of launches; `need`: what it takes of each dimension,
    by the `weights` of its tokens, of which `prompt` are input.
    `expected`: the declared output cap, -1 = none. `jitter_u`: the uniform number for the stagger of its next launch,
    -1 if it was not drawn ahead. `since`: the clock of causes when it became eligible.
    """

    __slots__ = (
        *("index", "lane", "attempt", "standing", "reserve", "need", "prompt", "weights", "expected", "jitter_u"),
        *("submitted_s", "eligible_s", "first_launched_s", "launched_s", "failed_s"),
        *("since", "asked", "alone", "queued", "flying", "holds", "ended", "booked", "tries", "outages"),
    )
    since: list[float]
    booked: list[float]

    def __init__(
        self,
        index: int,
        reserve: float,
        expected: float,
        submitted_s: float,
        jitter_u: float = -1.0,
        prompt: float = 0.0,
        weights: Weights = TOKENS,
    ) -> None:
        self.index = index
        self.lane = law.MAIN
        self.attempt = 1
        self.standing = law.FIRST
        self.reserve = reserve
        self.prompt = prompt
        self.weights = weights
        self.need = weights.of(reserve, prompt)
        self.expected = expected
        self.jitter_u = jitter_u
        self.submitted_s = submitted_s
        self.eligible_s = submitted_s
        self.first_launched_s = -1.0
        self.launched_s = -1.0
        self.failed_s = -1.0  # when its last attempt failed without an answer
        self.asked = 0  # a bit for each cause that it has waited for at the head
        self.alone = False  # a program's own call: not reported to any batch
        self.queued = False
        self.flying = False
        self.holds = False  # a permit: in flight, or kept during a backoff
        self.ended = False
        self.tries = 0  # launches so far, including those that do not count as attempts
        self.outages = 0  # outages by which it was spared an attempt

    def need_of(self, tokens: float) -> list[float]:
        """Return what the request takes of each dimension if it reserves that many tokens."""
        return self.weights.of(tokens, self.prompt)

    def reserve_anew(self, p: law.Params, found: float, declared: float) -> None:
        """Reserve the tokens found by current knowledge, or the declared ones if the others would never fit."""
        need = self.need_of(found)
        fits = not law.never_fits(p, need)
        self.reserve, self.need = (found, need) if fits else (declared, self.need_of(declared))
