"""Facts about a run as a whole in its journal: its deadline, the tiers that served it, the limits that it found."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import func, insert, select

from governor import law
from governor.journal.journal import Journal
from governor.journal.schema import TIERS_SINCE, attempts, deadlines
from governor.model.policy import Policy
from governor.model.requests import BATCH, Outcome


def deadline_of(journal: Journal, words: str, at_s: float) -> float:
    """Return when a run is to be done, in seconds since it began. The journal must be opened to run.

    `words`: the user's; repeated after a resume, they mean what they meant at first. Others mean `at_s` from now on.
    """
    with journal.writing() as connection:
        query = select(deadlines.c.words, deadlines.c.at_s).order_by(deadlines.c.id.desc()).limit(1)
        last = connection.execute(query).first()
        if last is not None and last.words == words:
            return float(last.at_s)
        connection.execute(insert(deadlines), {"words": words, "at_s": at_s})
    return at_s


def tiers_of(journal: Journal) -> dict[str, int]:
    """Return the number of live answers by the tier that served them: "" = standard, or not stated."""
    if journal.run().schema < TIERS_SINCE:
        return {}
    c = attempts.c
    query = select(c.service_tier, func.count()).where(c.outcome == Outcome.OK, c.lane != BATCH)
    with journal.reading() as connection:
        rows = connection.execute(query.group_by(c.service_tier).order_by(c.service_tier)).all()
    return {tier: int(count) for tier, count in rows}


def limits_found(journal: Journal, policies: Mapping[str, Policy]) -> dict[str, dict[str, float]]:
    """Return the limits that the search has met, by pool and dimension, as of each pool's last checkpoint.

    0 = sought, and no refusal has shown it yet. Pools that seek no limit are left out.
    """
    found = {}
    for name, policy in policies.items():
        last = journal.checkpoint(name)
        if last is not None and last.params.seeks:
            p, s = last.params, last.state
            found[name] = {
                dimension: law.limit_found(p, s, d)
                for dimension, d in policy.places.items()
                if d < p.dimensions and p.sought[d]
            }
    return found
