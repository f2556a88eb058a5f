"""The meanings of refusals that a profile states, compiled for `answers`.

The codes and wordings of every shipped profile are understood whatever the pool, since gateways pass them on; the
pool's own profile wins. Statuses are the profile's own, and else the generic ones. One row for each form seen in the
wild, with its source, is in tests/answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from governor.model.requests import Outcome
from governor.profiles.loader import GENERIC, all_profiles, read_profile
from governor.profiles.schema import Profile

# The order in which meanings are believed if the words of an error have several.
_ORDER = (
    *(Outcome.QUOTA, Outcome.SLOW_DOWN, Outcome.TOO_LARGE, Outcome.BAD_REQUEST, Outcome.THROTTLED),
    *(Outcome.UNAUTHORIZED, Outcome.OVERLOADED, Outcome.SERVER_ERROR, Outcome.TIMEOUT),
)
# The order of wordings: a key that is refused overrules a fault of the request.
_WORDINGS = (Outcome.QUOTA, Outcome.UNAUTHORIZED, *_ORDER)


@dataclass(frozen=True, slots=True)
class Codes:
    """What `schema.Errors` states, of one profile and of those that it may pass on.

    `bare`: wordings that count only for an error without any code.
    """

    words: Mapping[str, Outcome]
    generic: frozenset[str]
    statuses: Mapping[int, Outcome]
    messages: tuple[tuple[re.Pattern[str], Outcome], ...]
    bare: tuple[tuple[re.Pattern[str], Outcome], ...]
    finish_reasons: Mapping[str, Outcome]
    daily_quotas: tuple[re.Pattern[str], ...]

    def worded(self, words: frozenset[str]) -> Outcome | None:
        """Return the meaning of an error's words, None if none is known."""
        found = {self.words[word] for word in words if word in self.words}
        return next((outcome for outcome in _ORDER if outcome in found), None)


@lru_cache(64)
def codes_of(profile: Profile) -> Codes:
    """Return the meanings that hold for the answers of a pool with this profile."""
    others = [each for each in all_profiles() if each is not profile]
    tables = [each.errors for each in (*reversed(others), profile)]  # later entries win
    messages = [each for table in reversed(tables) for each in table.messages]
    compiled = [(re.compile(each.pattern, re.IGNORECASE), each.outcome) for each in messages if not each.bare]
    return Codes(
        words={code: outcome for table in tables for outcome, codes in table.codes.items() for code in codes},
        generic=frozenset(code for table in tables for code in table.generic),
        statuses={**read_profile(GENERIC).errors.statuses, **profile.errors.statuses},
        messages=tuple(sorted(compiled, key=lambda each: _WORDINGS.index(each[1]))),
        bare=tuple((re.compile(each.pattern, re.IGNORECASE), each.outcome) for each in messages if each.bare),
        finish_reasons={reason: outcome for table in tables for reason, outcome in table.finish_reasons.items()},
        daily_quotas=tuple({re.compile(table.daily_quotas, re.IGNORECASE) for table in tables if table.daily_quotas}),
    )
