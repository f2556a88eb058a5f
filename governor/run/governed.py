"""`governed(client)`: the same SDK client, whose calls the governor paces from now on.

    client = governed(AsyncOpenAI())                                       # settings from the environment
    client = governed(OpenAI(), Governor(Policy().with_(tpm_limit=450_000)))

The client keeps its type, its results and its exceptions. Its own retries are switched off: the law retries.

Clients without an explicit governor share one per quota, by the settings of the environment; if PACELINE_REDIS_URL is
set, with other processes too. A quota is an address, an organisation and a project.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import inf
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit
from weakref import WeakSet

from governor.model.errors import BadSetting, PacelineError, quoted
from governor.model.estimate import LEARNED
from governor.model.policy import Policy
from governor.model.pools import DEFAULT, Pool, default_pools
from governor.profiles.loader import profile_of, with_dimensions
from governor.profiles.schema import Profile
from governor.provider.openai_adapter import OPENAI_URL
from governor.provider.shadow import ShadowTransport, shadow_log
from governor.provider.transport import GovernedTransport
from governor.scheduler.driver import BATCH, Governor, standing_of
from governor.scheduler.learning import Learner
from governor.scheduler.portal import Portal, portal_to
from governor.sharedquota.sharing import redis_url, shared_governor
from governor.telemetry.metrics import process_metrics
from governor.telemetry.tracing import traces
from governor.telemetry.watch import Together

C = TypeVar("C")
# "govern" or "shadow"; for shadow, the journal to record in and whether it holds prompts.
MODE, SHADOW_JOURNAL, SHADOW_PROMPTS = "PACELINE_MODE", "PACELINE_SHADOW_JOURNAL", "PACELINE_SHADOW_PROMPTS"
DEFAULT_JOURNAL = "paceline-shadow.jsonl"
MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
_LOG = logging.getLogger("governor")

_lock = threading.Lock()
_quotas: dict[Pool, Portal] = {}


def governed(
    client: C,
    governor: Governor | Policy | None = None,
    *,
    max_wait_s: float = inf,
    lane: str = BATCH,
    mode: Literal["govern", "shadow"] | None = None,
) -> C:
    """Return `client`, whose calls are sent when the governor permits.

    `client`: of any SDK that is built on httpx or httpx2 (AsyncOpenAI, OpenAI, AsyncAzureOpenAI, AsyncAnthropic, ...),
    a LangChain chat model on top of one, or an httpx client. `governor`: a quota that several clients may share, or its
    settings; by default those of the environment (OPENAI_TPM_LIMIT and so on). `max_wait_s`: a call that cannot be sent
    within so many seconds is answered with a 503 instead of waiting. `lane`: "interactive" if a user waits for the
    answers: such calls go before those of lane "batch", and may use the share of each limit that
    OPENAI_INTERACTIVE_RESERVE keeps. `mode`: "shadow" delays and changes nothing, and records requests and answers in
    PACELINE_SHADOW_JOURNAL, for `paceline shadow`; by default the value of PACELINE_MODE. Raise BadSetting for a
    setting that cannot be obeyed, PacelineError for a client in which no httpx client is found.
    """
    if isinstance(client, type):
        raise PacelineError(f"{client.__name__} is a class: governed({client.__name__}()) takes a client")
    if not (governor is None or isinstance(governor, Governor | Policy)):
        raise BadSetting(f"governor {quoted(governor)} is neither a Governor nor a Policy", "governor")
    if not (isinstance(max_wait_s, int | float) and max_wait_s >= 0.0):
        raise BadSetting(
            f"max_wait_s {quoted(max_wait_s)} is no wait: use seconds from 0, or leave it out", "max_wait_s"
        )
    sdks = [client, *_sdks_in(client)]
    clients = [http for sdk in sdks for http in _http_clients(sdk)]
    if not clients:
        raise PacelineError(
            f"no httpx client in {quoted(type(client).__name__)}: give its SDK an http_client, and govern that: "
            "governed(httpx.AsyncClient())"
        )
    standing_of(lane)
    if _mode_of(mode, os.environ) == "shadow":
        place = os.environ.get(SHADOW_JOURNAL) or DEFAULT_JOURNAL
        log = shadow_log(
            place, prompts=os.environ.get(SHADOW_PROMPTS, "").strip().lower() in ("1", "true", "yes", "on")
        )
        _wrap(clients, lambda inner: ShadowTransport(inner, log))
        return client
    portal, policy = _quota_of(sdks[-1], governor)
    profile = profile_of(_pool_of(sdks[-1], policy, os.environ))
    _wrap(clients, lambda inner: _around(inner, portal, policy, max_wait_s, lane, profile))
    for sdk in sdks:
        if hasattr(sdk, "max_retries"):
            sdk.max_retries = 0
    return client


def _sdks_in(model: object) -> list[Any]:
    """Return a chat model's SDK clients (LangChain's ChatOpenAI, AzureChatOpenAI, ChatAnthropic), if any."""
    names = ("root_client", "root_async_client", "_client", "_async_client")
    found = (getattr(model, name, None) for name in names)
    return [each for each in found if hasattr(each, "base_url") and hasattr(each, "_client")]


def _mode_of(mode: str | None, environment: Mapping[str, str]) -> str:
    """Return the mode asked for, or PACELINE_MODE's."""
    found = mode if mode is not None else environment.get(MODE, "").strip().lower() or "govern"
    if found not in ("govern", "shadow"):
        name = "mode" if mode is not None else MODE
        raise BadSetting(f"{name} {quoted(found)} does not exist: use govern or shadow", name)
    return found


def _wrap(clients: list[Any], around: Callable[[Any], Any]) -> None:
    """Put a transport around each transport of the clients; replace one of ours that is already there."""

    def wrapped(transport: Any) -> Any:
        ours = isinstance(transport, GovernedTransport | ShadowTransport)
        return around(transport.inner if ours else transport)

    for http in clients:
        http._transport = wrapped(http._transport)
        for pattern, transport in http._mounts.items():
            http._mounts[pattern] = None if transport is None else wrapped(transport)


def _around(
    inner: Any, portal: Portal, policy: Policy, max_wait_s: float, lane: str, profile: Profile
) -> GovernedTransport:
    """Return a governed transport around another."""
    followed = traces()
    options: dict[str, Any] = {} if followed is None else {"follow": followed.operation}
    return GovernedTransport(inner, portal, policy, max_wait_s=max_wait_s, lane=lane, profile=profile, **options)


def _http_clients(client: object) -> Iterator[Any]:
    """Yield the httpx clients by which an SDK sends: itself, its `_client`, or those in its configuration."""
    settings = getattr(client, "sdk_configuration", None)
    candidates = (client, getattr(client, "_client", None))
    others = (getattr(settings, "client", None), getattr(settings, "async_client", None))
    for each in (*candidates, *others):
        if hasattr(each, "_transport") and hasattr(each, "_mounts"):
            yield each


def _quota_of(client: object, governor: Governor | Policy | None) -> tuple[Portal, Policy]:
    if isinstance(governor, Governor):
        if governor.policy is None:
            raise PacelineError(f"the governor of pool '{governor.pool}' has no charge rule: make it of a Policy")
        portal = portal_to(governor)
        with _lock:
            _count(portal, governor.pool, governor)
        return portal, governor.policy
    policy = governor or Policy.from_env(os.environ)
    pool = with_dimensions(_pool_of(client, policy, os.environ))
    if governor is not None:
        return portal_of(pool), pool.policy
    with _lock:
        if pool not in _quotas:
            _quotas[pool] = portal_of(pool)
        return _quotas[pool], pool.policy


def _pool_of(client: object, policy: Policy, environment: Mapping[str, str]) -> Pool:
    """Return the quota that a client calls: the quota of `paceline run` in the same environment, if it is the same."""
    (pool,) = default_pools(policy, environment)
    address = str(getattr(client, "base_url", "") or "").rstrip("/")
    url = "" if address == OPENAI_URL else address
    organization, project = (_text(getattr(client, name, None)) for name in ("organization", "project"))
    name = DEFAULT if url == pool.base_url else (urlsplit(url).hostname or DEFAULT)
    return replace(pool, name=name, base_url=url, organization=organization, project=project)


def portal_of(pool: Pool) -> Portal:
    """Return the portal to a new governor of that quota, shared with other processes if the environment says so."""
    if url := redis_url(os.environ):

        def make() -> Governor:
            governor = shared_governor(pool, url, _LOG.warning)
            _count(portal, pool.name, governor)
            return governor

        portal = Portal(make=make)
        return portal
    learner = Learner() if pool.policy.charge_rule == LEARNED else None
    governor = Governor(pool.policy, pool=pool.name, learner=learner, own_quota=True)
    portal = portal_to(governor)
    _count(portal, pool.name, governor)
    return portal


_counted: WeakSet[Governor] = WeakSet()


def _count(portal: Portal, pool: str, governor: Governor) -> None:
    """Include this governor in the process's metrics from now on."""
    if governor in _counted:
        return
    _counted.add(governor)
    if (followed := traces()) is not None:
        followed.watch(governor)
    metrics = process_metrics()
    metrics.watch(pool, governor)
    observer = metrics.observer(pool)
    observer.began(governor)
    governor.observe(Together([governor.observer, observer]))
    if os.environ.get(MULTIPROCESS):
        portal.heard = lambda: metrics.refresh(pool)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
