"""The service's checked start options: address, database, pools, access, and limits on request size."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Protocol

from governor.forecast.forecast import Outlook
from governor.model.estimate import TOKENS_PER_FILE
from governor.model.pools import Pool
from governor.model.prices import Prices

SCOPES = ("read", "run", "admin")
MIB = 2**20


class Forecast(Protocol):
    """Simulates a batch before the service accepts it: fast, and None if there is no simulator."""

    def __call__(self, outlook: Outlook) -> float | None:
        """Return seconds until the last answer, inf = never, in an idle pool."""


_WhatIf = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """The service's options. `forecast`, `what_if`: simulators, None = there is none.

    `lease_s`: how long a silent replica keeps its batches. `upload_bytes`: the largest batch file; `body_bytes`: the
    largest of any other request. `file_tokens`: assumed for each file and the like that a request only points to, in
    batches and what-if questions. `require_token`: also on loopback. `time_scale`: as in a run. `redis`: the URL of the
    Redis that shares the quota with other processes, "" = it is not shared.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    database: str = "paceline-service.db"
    pools: Sequence[Pool]
    environment: Mapping[str, str] = field(repr=False)
    prices: Prices
    forecast: Forecast | None = None
    what_if: _WhatIf | None = None
    lease_s: float = 15.0
    grace_s: float = 30.0
    upload_bytes: int = 512 * MIB
    body_bytes: int = 8 * MIB
    file_tokens: int = TOKENS_PER_FILE
    require_token: bool = False
    time_scale: float = 1.0
    redis: str = field(default="", repr=False)
    today: Callable[[], date] = date.today

    @property
    def is_local(self) -> bool:
        """Return whether it listens to this machine alone."""
        return is_local_host(self.host)


def is_local_host(host: str) -> bool:
    """Return whether a host's name or address is this machine's own and unreachable from elsewhere."""
    name = host.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
