"""Facts about a run as a whole in its journal: when it is to be done, and which service tiers served it."""

from __future__ import annotations

from sqlalchemy import func, insert, select

from governor.journal.journal import Journal
from governor.journal.schema import TIERS_SINCE, attempts, deadlines
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
