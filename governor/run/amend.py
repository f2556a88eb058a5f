"""Take over a corrected input file: how it differs, by custom_id, from the lines that a journal holds.

Unchanged lines keep their outcome, whether they have ended or not. Changed and added lines are run; a line that changed
after it was answered is reported, and sent again only on demand. Lines that are gone are not sent any more; ended
requests stay. So a file that holds only the rest is accepted as well as the whole one.

`Amendment` reads the file once to say what it would do, and again to do it, once the run may start. A process that is
killed in between has changed nothing that the next one would not change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import NamedTuple, TypeVar

from sqlalchemy import delete, insert, select, update

from governor.journal.database import JournalError
from governor.journal.journal import Journal
from governor.journal.schema import DONE, FAILED, background, bodies, chunks, requests, results, run, wave_requests
from governor.model.errors import BadInput, quoted
from governor.model.requests import Request
from governor.model.words import plural
from governor.model.work import Work

_T = TypeVar("_T")
# Lines compared at a time.
_CHUNK = 500
# At most so many answered lines are named.
NAMED = 3


class _Known(NamedTuple):
    """A line as the journal holds it."""

    state: str
    url: str
    body: str


class Amendment:
    """The changes of a corrected input to a journal. `journal`: opened to run; nothing is written before `apply`.

    `numbers`: requests of the journal that are replaced or removed; `more`: by how many the requests left increase.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        c = requests.c
        with journal.writing() as connection:
            rows = connection.execute(select(c.custom_id, c.request, c.state)).all()
            # At the Batch API, which has them as they were.
            self._held = set(connection.execute(select(wave_requests.c.request)).scalars())
        self._numbers = {custom_id: number for custom_id, number, _ in rows}
        self._states = {number: state for _, number, state in rows}
        self._next = max(self._states, default=-1) + 1
        self.numbers: set[int] = set()
        self.added = self.changed = self.gone = self.more = 0
        self._gone: list[int] = []

    def changes(self, read: Iterable[Request], *, resend: bool, name: str) -> Iterator[Request]:
        """Yield the requests to be run anew, as the journal will number them; at the end the removed ones are known.

        `read`: the lines of the corrected file. `resend`: lines that were answered before they changed are sent again.
        Raise BadInput, naming them, if `resend` is off and there are such lines; JournalError if the file has no line
        in common with the journal.
        """
        self.added = self.changed = self.gone = self.more = 0
        self.numbers = set()
        left = dict(self._states)
        answered: list[Request] = []
        following = self._next
        for lines in _chunks(read):
            known = self._known([self._numbers[line.custom_id] for line in lines if line.custom_id in self._numbers])
            for line in lines:
                number = self._numbers.get(line.custom_id)
                if number is None:
                    self.added += 1
                    self.more += 1
                    yield replace(line, index=following)
                    following += 1
                    continue
                del left[number]
                before = known[number]
                if before.url == line.url and _canonical(json.loads(before.body)) == _canonical(line.body):
                    continue
                if number in self._held:
                    raise BadInput(
                        f"request {number} ({quoted(line.custom_id)}) changed while it is in a batch at the provider: "
                        "put back what was sent, and correct it when that has ended",
                        name,
                    )
                self.changed += 1
                self.more += before.state in (DONE, FAILED)
                self.numbers.add(number)
                if before.state == DONE and not resend:
                    answered.append(line)
                yield replace(line, index=number)
        if len(left) == len(self._states):
            text = "it belongs to another input: name another file with --journal, or use that input"
            raise JournalError(f"{self._journal.name}: {text}")
        if answered:
            names = ", ".join(quoted(line.custom_id) for line in answered[:NAMED])
            names += f" and {len(answered) - NAMED:,} more" if len(answered) > NAMED else ""
            raise BadInput(
                f"{plural(len(answered), 'line')} ({names}) changed after the answer came: put back what was sent, or "
                "add --resend-changed to send it again as it is now, which is paid for again",
                name,
            )
        going = {number for number, state in left.items() if state not in (DONE, FAILED)}
        self._gone = sorted(going - self._held)
        self.gone = len(self._gone)
        self.more -= self.gone
        self.numbers.update(self._gone)

    def _known(self, numbers: list[int]) -> Mapping[int, _Known]:
        c = requests.c
        query = select(c.request, c.state, c.url, bodies.c.body).join(bodies, bodies.c.request == c.request)
        with self._journal.writing() as connection:
            rows = connection.execute(query.where(c.request.in_(numbers))).all()
        return {number: _Known(*rest) for number, *rest in rows}

    def apply(self, works: Iterable[Work], fingerprint: str) -> None:
        """Write the changes into the journal, which then belongs to that input.

        `works`: the requests of `changes`, sized.
        """
        for rows, texts in chunks(works):
            with self._journal.writing() as connection:
                places = [row["request"] for row in rows]
                for table in (requests, bodies, results, background):
                    connection.execute(delete(table).where(table.c.request.in_(places)))
                connection.execute(insert(requests), rows)
                connection.execute(insert(bodies), texts)
        with self._journal.writing() as connection:
            for part in _chunks(self._gone):
                for table in (requests, bodies):
                    connection.execute(delete(table).where(table.c.request.in_(part)))
            count = len(self._states) + self.added - self.gone
            connection.execute(update(run).values(fingerprint=fingerprint, requests=count))

    @property
    def text(self) -> str:
        """Return the changes, in a line."""
        parts = [
            f"{count:,} {what}"
            for count, what in ((self.changed, "changed"), (self.added, "added"), (self.gone, "gone and not sent"))
            if count
        ]
        return f"the input was corrected: {', '.join(parts) or 'no line of it, but for their order'}"


def _chunks(each: Iterable[_T]) -> Iterator[list[_T]]:
    left = iter(each)
    return iter(lambda: list(islice(left, _CHUNK)), [])


def _canonical(body: object) -> str:
    """Return a body as text, regardless of the order of its keys; `1` and `true` differ."""
    return json.dumps(body, sort_keys=True)
