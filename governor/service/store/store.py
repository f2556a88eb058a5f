"""The service's own records beside the journal: batches as a whole, templates, settings, leases, keys, tokens.

Every method blocks; callers in the event loop use a thread.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select, text, update
from sqlalchemy.exc import IntegrityError

from governor.journal.schema import to_json, waves
from governor.journal.waves import WaveRow
from governor.service.store.base import ServiceDatabase, session_name
from governor.service.store.tables import batches, keys, replicas, settings, templates, tokens, versions

# A batch: on its way in, waiting or running, held, at its end.
RECEIVING, QUEUED, RUNNING, PAUSED, STOPPED = "receiving", "queued", "running", "paused", "stopped"
CANCELLING, CANCELLED, COMPLETED = "cancelling", "cancelled", "completed"
ACTIVE = (QUEUED, RUNNING, PAUSED, STOPPED, CANCELLING)
ENDED = (CANCELLED, COMPLETED)
# `resume` is said once: the batch's owner turns it into `run`.
RUN, PAUSE, CANCEL, RESUME = "run", "pause", "cancel", "resume"
KEY_DAYS = 7.0
# So many of the latest waves say how long the Batch API takes.
WAVES_MEASURED = 50


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One batch as stored; `waves`: see `bodies.WaveOut`; times are seconds since 1970, -1 = not yet or unknown."""

    number: int
    batch_id: str
    name: str
    state: str
    wanted: str
    reason: str
    owner: int
    created_at: float
    ended_at: float
    requests: int
    done: int
    failed: int
    in_flight: int
    attempts: int
    throttled: int
    resent: int
    eta_s: float
    who: str
    template_id: str
    template_version: int
    finalize: int
    deadline_s: float
    via: str
    finish_by: float
    waves: list[dict[str, Any]]
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TemplateRow:
    """One version of a template; `content` is the posted body."""

    template_id: str
    version: int
    created_at: float
    who: str
    content: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """One change of settings. `changes`: name -> (before, after); after None = as the process was started."""

    number: int
    at: float
    who: str
    pool: str
    changes: dict[str, tuple[str, str | None]]


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """The answer given under an Idempotency-Key. `fingerprint`: of the request that it answered."""

    fingerprint: str
    status: int
    answer: str


@dataclass(frozen=True, slots=True)
class Key:
    """An Idempotency-Key as received, with its owner and the fingerprint of its request."""

    scope: str
    key: str
    fingerprint: str


class KeyTakenError(Exception):
    """Raised if another request with the same Idempotency-Key was quicker."""


def new_id(kind: str) -> str:
    """Return an id such as `batch_4f0c...`: 96 bits, so that it cannot be guessed."""
    return f"{kind}_{secrets.token_hex(12)}"


class Store:
    """Reads and writes the service's tables; every method may raise `JournalError`."""

    def __init__(self, database: ServiceDatabase) -> None:
        self.database = database

    # ------------------------------------------------------------ batches

    def batch(self, batch_id: str) -> BatchRow | None:
        """Return the batch of that id, if it has been accepted."""
        with self.database.reading() as c:
            row = c.execute(select(batches).where(batches.c.batch_id == batch_id)).first()
        return None if row is None or row.state == RECEIVING else _batch(row)

    def numbered(self, c: Connection, number: int) -> BatchRow:
        """Return the batch of that number, in the caller's transaction."""
        return _batch(c.execute(select(batches).where(batches.c.number == number)).one())

    def batches(self, limit: int, before: int = 0) -> list[BatchRow]:
        """Return the newest batches, newest first; `before`: only those that are older than that number (0 = all)."""
        query = select(batches).where(batches.c.state != RECEIVING).order_by(batches.c.number.desc()).limit(limit)
        with self.database.reading() as c:
            return [_batch(row) for row in c.execute(query.where(batches.c.number < before) if before else query)]

    def add_batch(self, c: Connection, values: Mapping[str, Any]) -> int:
        """Add a batch in the caller's transaction; return its number."""
        start: dict[str, Any] = {"name": "", "wanted": RUN, "reason": "", "created_at": self.database.now(c)}
        start |= {"ended_at": -1.0, "eta_s": -1.0, "via": "live", "finish_by": -1.0, "waves": "[]"}
        start |= dict.fromkeys(("done", "failed", "in_flight", "attempts", "throttled", "resent"), 0)
        found = c.execute(insert(batches), start | dict(values) | {"details": to_json(values["details"])})
        key = found.inserted_primary_key
        assert key is not None
        return int(key[0])

    def receives(self, c: Connection, number: int, batch_id: str) -> bool:
        """Return whether that batch is still on its way in, under that number: a number may become another batch's."""
        b = batches.c
        query = select(b.number).where(b.number == number, b.batch_id == batch_id, b.state == RECEIVING)
        return c.execute(query).first() is not None

    def remove_batch(self, c: Connection, number: int) -> None:
        """Remove a batch that was not accepted."""
        c.execute(delete(batches).where(batches.c.number == number))

    def change_batch(self, c: Connection, number: int, **values: Any) -> bool:
        """Change columns of a batch; return whether it exists."""
        return bool(c.execute(update(batches).where(batches.c.number == number).values(values)).rowcount)

    def want(self, number: int, wanted: str, key: Key | None = None) -> None:
        """Ask the batch's owner to run, pause or cancel it; a cancelled batch stays cancelled.

        `key`: kept with it, its answer to follow (`answered`). Raise `KeyTakenError` if the same was asked before.
        """
        query = update(batches).where(batches.c.number == number, batches.c.wanted != CANCEL)
        with self.database.writing() as c:
            if key is not None:
                self.keep(c, key, 200, "")
            c.execute(query.where(batches.c.state.in_(ACTIVE)).values(wanted=wanted))

    def resumed(self, number: int) -> None:
        """Record that its owner knows that a batch is to go on."""
        mine = (batches.c.number == number, batches.c.wanted == RESUME)
        with self.database.writing() as c:
            c.execute(update(batches).where(*mine).values(wanted=RUN))

    def progress(self, owner: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Record the progress of batches, as far as they are this owner's."""
        b = batches.c
        by_names: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in rows:
            by_names.setdefault(tuple(row), []).append({f"b_{name}": value for name, value in row.items()})
        with self.database.writing() as c:
            for names, values in by_names.items():
                # Leave a batch that is over alone: this may have been noted before it was.
                mine = (b.number == bindparam("b_number"), b.owner == owner, *(b.state != ended for ended in ENDED))
                new: dict[str, Any] = {name: bindparam(f"b_{name}") for name in names if name != "number"}
                c.execute(update(batches).where(*mine).values(new), values)

    def ended_waves(self, pool: str) -> list[WaveRow]:
        """Return the latest waves of a pool that have ended, of whatever batch, newest first."""
        w = waves.c
        query = select(*(w[name] for name in WaveRow._fields)).where(w.pool == pool, w.ended_s >= 0.0)
        with self.database.reading() as c:
            return [WaveRow(*row) for row in c.execute(query.order_by(w.wave.desc()).limit(WAVES_MEASURED))]

    # ------------------------------------------------------------ leases

    def join(self, name: str, lease_s: float) -> int:
        """Add a replica; return its number. If only one process can be alive (SQLite), all others are lost."""
        with self.database.writing() as c:
            if self.database.is_sqlite:
                c.execute(update(replicas).values(lost=1))
            row = {"name": name[:255], "lease_until": self.database.now(c) + lease_s, "lost": 0, "commits": 0}
            key = c.execute(insert(replicas), row).inserted_primary_key
            assert key is not None
            return int(key[0])

    def renewed(self, number: int, lease_s: float) -> bool:
        """Prolong a lease; return False if it was lost."""
        r = replicas.c
        with self.database.writing() as c:
            until = self.database.now(c) + lease_s
            query = update(replicas).where(r.number == number, r.lost == 0).values(lease_until=until)
            return bool(c.execute(query).rowcount)

    def left(self, number: int) -> None:
        """End a replica in good order: its remaining batches are free at once."""
        with self.database.writing() as c:
            c.execute(update(replicas).where(replicas.c.number == number).values(lost=1))

    def holds(self, c: Connection, number: int) -> bool:
        """Return whether the replica still has its lease; it cannot be taken away until the transaction ends."""
        query = select(replicas.c.number).where(replicas.c.number == number, replicas.c.lost == 0)
        return c.execute(query.with_for_update(read=True)).first() is not None

    def commit_of(self, c: Connection, number: int) -> int | None:
        """Return the number of the replica's last commit, None if its lease was lost; lock its row until the end."""
        r = replicas.c
        query = select(r.commits).where(r.number == number, r.lost == 0).with_for_update()
        found: int | None = c.execute(query).scalar()
        return found

    def committed(self, c: Connection, number: int, serial: int) -> None:
        """Mark the present transaction as the replica's commit of that number."""
        c.execute(update(replicas).where(replicas.c.number == number).values(commits=serial))

    def free_batches(self, me: int) -> list[tuple[int, int]]:
        """Return (number, owner) of active batches without a living owner; mark lapsed replicas as lost first."""
        r, b = replicas.c, batches.c
        # A replica that ended, or whose row is gone, owns nothing.
        alive = select(r.number).where(r.lost == 0)
        free = select(b.number, b.owner).where(b.state.in_((*ACTIVE, RECEIVING)), b.owner.not_in(alive), b.owner != me)
        with self.database.reading() as c:
            now = self.database.now(c)
            lapsed = select(r.number, r.name).where(r.lost == 0, r.lease_until < now, r.number != me)
            names = {row.number: row.name for row in c.execute(lapsed)}
            living = set(c.execute(select(r.name).where(r.lost == 0, r.number.not_in(names))).scalars())
            found = [(row.number, row.owner) for row in c.execute(free)]
        if not names:
            return found
        numbers = list(names)
        self._end_sessions(set(names.values()) - living)
        with self.database.writing() as c:
            late = (r.number.in_(numbers), r.lease_until < self.database.now(c))
            c.execute(update(replicas).where(*late).values(lost=1))
        with self.database.reading() as c:
            return [(row.number, row.owner) for row in c.execute(free)]

    def _end_sessions(self, names: set[str]) -> None:
        """End the open PostgreSQL sessions of lapsed replicas of these names: a frozen one would keep its locks."""
        if self.database.is_sqlite:
            return
        query = text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = :name AND usename = current_user AND pid <> pg_backend_pid()"
        )
        with self.database.reading() as c:
            for name in names:
                c.execute(query, {"name": session_name(name)})

    def claimed(self, c: Connection, number: int, before: int, me: int) -> BatchRow | None:
        """Return the batch, if no other replica was quicker to take it over from `before`."""
        query = update(batches).where(batches.c.number == number, batches.c.owner == before).values(owner=me)
        if not c.execute(query).rowcount:
            return None
        return self.numbered(c, number)

    def wanted(self, owner: int) -> dict[int, str]:
        """Return the wanted state of each of the owner's active batches."""
        query = select(batches.c.number, batches.c.wanted)
        query = query.where(batches.c.owner == owner, batches.c.state.in_(ACTIVE))
        with self.database.reading() as c:
            return {row.number: row.wanted for row in c.execute(query)}

    def neighbours(self, me: int) -> int:
        """Return how many other replicas are alive."""
        with self.database.reading() as c:
            r = replicas.c
            query = select(r.number).where(r.lost == 0, r.number != me, r.lease_until >= self.database.now(c))
            return len(c.execute(query).all())

    # ------------------------------------------------------------ templates

    def template(self, template_id: str, version: int | None = None) -> TemplateRow | None:
        """Return a template's newest version, or that version; None if it does not exist or was deleted."""
        t, v = templates.c, versions.c
        with self.database.reading() as c:
            row = c.execute(select(templates).where(t.template_id == template_id, t.deleted == 0)).first()
            if row is None:
                return None
            wanted = row.version if version is None else version
            found = c.execute(select(versions).where(v.template_id == template_id, v.version == wanted)).first()
        return None if found is None else _template(found)

    def templates(self, limit: int, after: str = "") -> list[TemplateRow]:
        """Return the templates' newest versions, by id; `after`: only those that follow that id."""
        t, v = templates.c, versions.c
        query = select(versions).join(templates, (t.template_id == v.template_id) & (t.version == v.version))
        query = query.where(t.deleted == 0, t.template_id > after).order_by(t.template_id).limit(limit)
        with self.database.reading() as c:
            return [_template(row) for row in c.execute(query)]

    def template_versions(self, template_id: str) -> list[TemplateRow]:
        """Return every version of a template, the oldest first; also of a deleted one."""
        query = select(versions).where(versions.c.template_id == template_id).order_by(versions.c.version)
        with self.database.reading() as c:
            return [_template(row) for row in c.execute(query)]

    def add_template(
        self,
        content: Mapping[str, Any],
        who: str,
        key: Key | None = None,
        answer: Callable[[TemplateRow], str] | None = None,
    ) -> TemplateRow:
        """Add a template, version 1. `answer`: makes the answer kept under the Idempotency-Key, if there is one."""
        template_id = new_id("tmpl")
        with self.database.writing() as c:
            now = self.database.now(c)
            row = {"template_id": template_id, "version": 1, "created_at": now, "deleted": 0}
            c.execute(insert(templates), row)
            made = _new_version(c, template_id, 1, now, who, content)
            if key is not None and answer is not None:
                self.keep(c, key, 201, answer(made))
            return made

    def change_template(self, template_id: str, content: Mapping[str, Any], who: str) -> TemplateRow | None:
        """Add a version of a template; return None if there is no such template."""
        t = templates.c
        with self.database.writing() as c:
            now = self.database.now(c)
            mine = (t.template_id == template_id, t.deleted == 0)
            # The change first, which takes the row's lock: two at once get two versions.
            if not c.execute(update(templates).where(*mine).values(version=t.version + 1)).rowcount:
                return None
            version = int(c.execute(select(t.version).where(*mine)).scalar_one())
            return _new_version(c, template_id, version, now, who, content)

    def delete_template(self, template_id: str) -> bool:
        """Delete a template; its versions stay, since batches were made from them."""
        t = templates.c
        query = update(templates).where(t.template_id == template_id, t.deleted == 0).values(deleted=1)
        with self.database.writing() as c:
            return bool(c.execute(query).rowcount)

    # ------------------------------------------------------------ settings

    def changes(self, after: int = 0, limit: int = 1_000_000, *, newest: bool = False) -> list[Change]:
        """Return changes of settings after that number, in order (`newest`: the last ones, newest first)."""
        s = settings.c
        query = select(settings).where(s.number > after).order_by(s.number.desc() if newest else s.number).limit(limit)
        with self.database.reading() as c:
            return [
                Change(
                    row.number, row.at, row.who, row.pool, {k: (v[0], v[1]) for k, v in _object(row.changes).items()}
                )
                for row in c.execute(query)
            ]

    def add_change(self, who: str, pool: str, changes: Mapping[str, tuple[str, str | None]]) -> int:
        """Record a change of settings; return its number."""
        with self.database.writing() as c:
            content = to_json({name: list(pair) for name, pair in changes.items()})
            row = {"at": self.database.now(c), "who": who[:255], "pool": pool, "changes": content}
            key = c.execute(insert(settings), row).inserted_primary_key
            assert key is not None
            return int(key[0])

    # ------------------------------------------------------------ Idempotency-Keys

    def kept(self, key: Key) -> KeptAnswer | None:
        """Return the earlier answer under that key."""
        query = select(keys).where(keys.c.scope == key.scope, keys.c.key == key.key)
        with self.database.reading() as c:
            row = c.execute(query).first()
        return None if row is None else KeptAnswer(row.fingerprint, row.status, row.answer)

    def keep(self, c: Connection, key: Key, status: int, answer: str) -> None:
        """Keep an answer, in the transaction that makes it true.

        Raise `KeyTakenError` if another request was quicker.
        """
        now = self.database.now(c)
        row = {"scope": key.scope, "key": key.key, "at": now, "fingerprint": key.fingerprint}
        try:
            c.execute(insert(keys), row | {"status": status, "answer": answer})
        except IntegrityError:
            raise KeyTakenError from None

    def answered(self, key: Key, answer: str) -> None:
        """Keep the answer under a key that was kept without one."""
        mine = (keys.c.scope == key.scope, keys.c.key == key.key)
        with self.database.writing() as c:
            c.execute(update(keys).where(*mine).values(answer=answer))

    def forget_keys(self) -> None:
        """Remove keys too old to be sent again."""
        with self.database.writing() as c:
            c.execute(delete(keys).where(keys.c.at < self.database.now(c) - KEY_DAYS * 86_400.0))

    # ------------------------------------------------------------ tokens

    def tokens(self) -> dict[str, tuple[str, str]]:
        """Return hash -> (name, scope)."""
        with self.database.reading() as c:
            return {row.sha256: (row.name, row.scope) for row in c.execute(select(tokens))}

    def add_token(self, name: str, sha256: str, scope: str) -> None:
        """Add a token, or replace that name's."""
        with self.database.writing() as c:
            c.execute(delete(tokens).where(tokens.c.name == name))
            row = {"name": name, "sha256": sha256, "scope": scope, "created_at": self.database.now(c)}
            c.execute(insert(tokens), row)

    def remove_token(self, name: str) -> bool:
        """Remove that name's token; return whether there was one."""
        with self.database.writing() as c:
            return bool(c.execute(delete(tokens).where(tokens.c.name == name)).rowcount)


def _new_version(
    c: Connection, template_id: str, version: int, now: float, who: str, content: Mapping[str, Any]
) -> TemplateRow:
    row = {"template_id": template_id, "version": version, "created_at": now, "who": who[:255]}
    c.execute(insert(versions), row | {"content": to_json(dict(content))})
    return TemplateRow(template_id, version, now, who, dict(content))


def _object(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found


def _batch(row: Any) -> BatchRow:
    values = {name: getattr(row, name) for name in BatchRow.__slots__ if name not in ("details", "waves")}
    return BatchRow(**values, details=_object(row.details), waves=json.loads(row.waves))


def _change(row: Any) -> Change:
    changes = {name: (before, after) for name, (before, after) in _object(row.changes).items()}
    return Change(row.number, row.at, row.who, row.pool, changes)


def _template(row: Any) -> TemplateRow:
    return TemplateRow(row.template_id, row.version, row.created_at, row.who, _object(row.content))
