"""The service's own tables, beside those of the journal (`governor/journal/schema.py`), in the same database.

    service_batches      one row per batch; its requests are those numbered from `number << BATCH_BITS` on
    service_templates    one row per template, and in service_versions one per version of it
    service_replicas     the processes that work on batches, each with its lease
    service_legs         which replica wrote which leg of the journal
    service_settings     every change of settings: author, time, content
    service_keys         Idempotency-Keys and the answers given under them
    service_tokens       bearer tokens, hashed

A batch belongs to the replica `owner` (0 = no owner); a replica whose lease has lapsed is marked `lost`, in a
transaction, before another takes its batches over. Times are seconds since 1970.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Index, Integer, MetaData, String, Table, Text

# A batch has at most 2 ** 24 requests; their numbers stay below 2 ** 53 for 500 million batches.
BATCH_BITS = 24
BATCH_REQUESTS_MOST = 2**BATCH_BITS

metadata = MetaData()

# SQLite's own key is 64 bits wide under the name of INTEGER only.
_BIG = BigInteger().with_variant(Integer, "sqlite")


def _key(name: str) -> Column[int]:
    return Column(name, _BIG, primary_key=True, autoincrement=True)


def _whole(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


def _number(name: str) -> Column[float]:
    return Column(name, Double, nullable=False)


def _short(name: str, *, unique: bool = False) -> Column[str]:
    return Column(name, String(255), nullable=False, unique=unique)


def _long(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


batches = Table(
    "service_batches",
    metadata,
    _key("number"),
    _short("batch_id", unique=True),
    _short("name"),  # its owner's name for it, "" = none
    _short("state"),
    _short("wanted"),  # the wanted state: run, pause, cancel; resume: once, to another replica
    _short("reason"),  # why it has stopped
    _whole("owner"),
    _number("created_at"),
    _number("ended_at"),  # -1 = not yet
    _whole("requests"),
    _whole("done"),
    _whole("failed"),
    _whole("in_flight"),
    _whole("attempts"),
    _whole("throttled"),
    _whole("resent"),
    _number("eta_s"),  # -1 = unknown
    _short("who"),
    _short("template_id"),  # "" = raw
    _whole("template_version"),
    _whole("finalize"),
    _number("deadline_s"),  # -1 = none
    _short("via"),  # live, batch or auto
    _number("finish_by"),  # of auto, -1 = none
    _long("waves"),  # JSON: the latest waves at the Batch API
    _long("details"),  # JSON: settings, forecast, pools
)
Index("service_batches_by_state", batches.c.state, batches.c.owner)

templates = Table(
    "service_templates",
    metadata,
    Column("template_id", String(255), primary_key=True),
    _whole("version"),
    _number("created_at"),
    _whole("deleted"),
)

versions = Table(
    "service_versions",
    metadata,
    Column("template_id", String(255), primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    _number("created_at"),
    _short("who"),
    _long("content"),
)

replicas = Table(
    "service_replicas",
    metadata,
    _key("number"),
    _short("name"),
    _number("lease_until"),
    _whole("lost"),
    _whole("commits"),  # the number of its last commit
)

legs = Table(
    "service_legs",
    metadata,
    Column("leg", _BIG, primary_key=True, autoincrement=False),
    _whole("replica"),
)

settings = Table(
    "service_settings",
    metadata,
    _key("number"),
    _number("at"),
    _short("who"),
    _short("pool"),
    _long("changes"),  # JSON: name -> [before, after] as texts; after null = reset to its value at the start
)

keys = Table(
    "service_keys",
    metadata,
    Column("scope", String(255), primary_key=True),
    Column("key", String(255), primary_key=True),
    _number("at"),
    _short("fingerprint"),
    _whole("status"),
    _long("answer"),
)

tokens = Table(
    "service_tokens",
    metadata,
    Column("name", String(255), primary_key=True),
    _short("sha256", unique=True),
    _short("scope"),
    _number("created_at"),
)
