"""Connects the official openai SDK to the governor's `Answer`; the only file that imports openai.

Theory of operation. The client's own `post` sends the body as bytes, and the response comes back raw: headers and bytes
go to `answers.classify`. The SDK's typed objects are not used, since the results file needs the JSON itself; this alone
makes a call a quarter cheaper than `chat.completions.create` (1.15 instead of 1.5 ms of CPU on loopback).

The number of connections in use is not limited here: the governor limits the requests in flight, and a second limit
would be a hidden queue whose waits could not be attributed. Idle connections are limited, since each costs time.

Every attempt carries `X-Client-Request-Id: paceline-RUN-INDEX-ATTEMPT`, so that the provider's logs can be matched with
ours even if an attempt never got an answer. The key is put into a header and nowhere else: every response and exception
is searched for it before it becomes an answer.

Answers are read within bounds (`_BoundedClient`), since a server may send anything: the unpacked size is limited, and
redirects are not followed, since another host would get the prompt and the key.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import secrets
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Self
from urllib.parse import urlsplit

import anyio
from openai import (
    DEFAULT_CONNECTION_LIMITS,
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncAzureOpenAI,
    AsyncOpenAI,
    DefaultAsyncHttpxClient,
    Timeout,
)

from governor.model.errors import BadSetting, quoted
from governor.model.estimate import CHAT, EMBEDDINGS, RESPONSES
from governor.model.pools import BASE_URL, Pool, checked_url, key_of
from governor.model.requests import Answer, Outcome, Request
from governor.profiles.loader import profile_of
from governor.provider.answers import classify, dropped, local, malformed, timed_out

AZURE_ENDPOINT = "AZURE_OPENAI_ENDPOINT"
AZURE_API_VERSION = "OPENAI_API_VERSION"
AZURE_TOKEN = "AZURE_OPENAI_AD_TOKEN"
OPENAI_URL = "https://api.openai.com/v1"

TIMEOUT_S = 600.0
CONNECT_S = 10.0
# Longer than the stagger's 15 s and its jitter, so that a slow run need not reconnect for each request, and shorter
# than the 60 s after which common load balancers silently drop a connection.
KEEPALIVE_S = 20.0
# The transport checks every idle connection twice per request, at about 6 us each: with a burst's 280 connections kept
# idle a request took 5.2 ms of CPU, with 32 of them 2.5 ms.
IDLE_MAX = 8
# The transport checks connections in use too, so requests in flight are spread over several clients of this many each:
# with 50 in flight a request took an eighth less CPU with 8 per client than with 64.
LANE_MOST = 8
# The largest known answer, 2,048 embeddings of 1,536 numbers, is 75 MB; in base64 ("encoding_format") a fifth of that.
ANSWER_BYTES_MAX = 128 * 2**20
# The part of a larger answer that is kept.
_HEAD_BYTES = 2**16
# Accepted content encodings: those of the standard library, applied once. Others may expand without bound in one step.
_PACKINGS = ("", "identity", "gzip", "deflate")
_FAULT = "paceline_fault"
_CUT = "cut off"
# This machine's own exhaustion: descriptors, memory, ports, disk.
_LOCAL_ERRORS = (
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL, errno.ENOSPC, errno.EDQUOT),
)
# This header makes the SDK return the response as it came.
_RAW = {"X-Stainless-Raw-Response": "true"}
_HIDDEN = "***"
# A shorter key is not a secret but a word ("none", "test", as used with local servers), and removing it would spoil
# answers that contain the word. Real keys have 32 characters or more.
_KEY_LEAST = 20


@dataclass(slots=True)
class _Lane:
    """A client with connections of its own. `busy`: the number of requests that it is sending."""

    client: AsyncOpenAI
    busy: int = 0


class Adapter:
    """Sends attempts of one pool through the official SDK. Use it inside one event loop, and close it at the end.

    `environment`: where the pool's variables are looked up (by default the process's). `run_id`: letters and digits
    that make client request ids unique among runs; random if empty. `timeout_s`: for attempts without a time-out of
    their own. Raises BadSetting, naming the variable, if a key or an address is missing or unusable.
    """

    def __init__(
        self,
        pool: Pool | None = None,
        environment: Mapping[str, str] | None = None,
        *,
        run_id: str = "",
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        environment = os.environ if environment is None else environment
        self.pool = _addressed(pool or Pool(), environment)
        self.profile = profile_of(self.pool)
        self.run_id = run_id or secrets.token_hex(8)
        assert re.fullmatch("[0-9A-Za-z]{1,64}", self.run_id), f"run id {self.run_id!r}: letters and digits only"
        self.timeout_s = timeout_s
        self.address = _origin(self.pool.address or OPENAI_URL)
        key = key_of(self.pool, environment)
        self._key = key.encode("ascii")
        self._is_secret = len(key) >= _KEY_LEAST
        check_surroundings(os.environ)
        try:
            self._ssl = _ssl_context()
            self._lanes = [_Lane(_client(self.pool, key, self._ssl))]
        except (OSError, ValueError, ImportError, _transport().InvalidURL) as error:
            raise BadSetting(_surroundings_text(error)) from None
        _load_transport()

    def __repr__(self) -> str:
        return f"<Adapter of pool {self.pool.name} at {self.address}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        for lane in self._lanes:
            await lane.client.close()

    def client_request_id(self, index: int, attempt: int) -> str:
        """Return the id of this attempt in the provider's logs. `attempt`: `keyed.attempt_key`, unique over lanes."""
        return f"paceline-{self.run_id}-{index}-{attempt}"

    async def send(
        self,
        request: Request,
        *,
        attempt: int = 1,
        body_overrides: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """Send one attempt and return its answer. Raises only a cancellation.

        `request`: must have its body. `body_overrides`: fields that replace the body's (see `capped`). `timeout_s`: for
        the whole attempt, from connecting to the last byte.
        """
        assert request.body is not None, f"request {request.index} was read without its body"
        body = {**request.body, **body_overrides} if body_overrides else request.body
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        options = {
            "headers": {**_RAW, "X-Client-Request-Id": self.client_request_id(request.index, attempt)},
            "timeout": Timeout(timeout_s, connect=min(timeout_s, CONNECT_S)),
        }
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._post(request.url.removeprefix("/v1"), body, options)
        except (TimeoutError, APITimeoutError) as error:
            if any(type(each).__name__ == "ConnectTimeout" for each in _causes(error)):
                return timed_out(f"no connection to {self.address} within {min(timeout_s, CONNECT_S):g} s")
            return timed_out(f"no answer from {self.address} within {timeout_s:g} s")
        except APIStatusError as error:
            response = error.response
        except Exception as error:
            return self._unanswered(error)
        fault = response.extensions.get(_FAULT, "")
        answer = self._classified(response)
        if not fault or answer.outcome not in (Outcome.OK, Outcome.MALFORMED):
            return answer
        if fault.startswith(_CUT):
            # The server announced more than the whole answer, or the connection broke off before its end.
            return answer if answer.outcome is Outcome.OK else dropped(f"no answer from {self.address}: {fault}")
        return malformed(f"{self.address} sent an answer {fault}: it is not asked for again", answer.status, answer.raw)

    async def look(self, path: str, *, method: str = "GET", timeout_s: float) -> Answer:
        """Return the answer to a call without a body, such as a look at a background response. Never raises."""
        options: Any = {"headers": _RAW, "timeout": Timeout(timeout_s, connect=min(timeout_s, CONNECT_S))}
        try:
            call = self.client.get if method == "GET" else self.client.post
            raw: Any = await call(path, cast_to=object, options=options)
        except Exception as error:
            return self.failure(error)
        return self._classified(raw.http_response)

    def _classified(self, response: Any) -> Answer:
        hide = self._key.decode() if self._is_secret else ""
        return classify(
            response.status_code,
            response.headers,
            response.content,
            now_epoch=time.time(),
            hide=hide,
            profile=self.profile,
        )

    async def _post(self, path: str, body: dict[str, Any], options: Any) -> Any:
        """Return the response to the SDK's call, as httpx represents it."""
        lane = next((lane for lane in self._lanes if lane.busy < LANE_MOST), None)
        if lane is None:
            lane = _Lane(_client(self.pool, self._key.decode(), self._ssl))
            self._lanes.append(lane)
        lane.busy += 1
        try:
            if self.pool.azure is not None:
                # The SDK reads the deployment from the body.
                raw = await lane.client.post(path, cast_to=object, body=body, options=options)
            else:
                raw = await lane.client.post(path, cast_to=object, content=_encoded(body), options=options)
        finally:
            lane.busy -= 1
        return raw.http_response  # type: ignore[attr-defined]

    @property
    def client(self) -> AsyncOpenAI:
        """Return the SDK's client itself, without retries of its own, for other calls than attempts."""
        return self._lanes[0].client

    def failure(self, error: Exception) -> Answer:
        """Return the `Answer` for an exception that a call of `client` raised."""
        if isinstance(error, APIStatusError):
            return self._classified(error.response)
        if isinstance(error, (TimeoutError, APITimeoutError)):
            return timed_out(f"no answer from {self.address} in time")
        return self._unanswered(error)

    def _unanswered(self, error: Exception) -> Answer:
        """Return the `Answer` for an exception of the SDK, according to its cause: no readable response came."""
        cause: BaseException = error
        while isinstance(cause, APIConnectionError) and cause.__cause__ is not None:
            cause = cause.__cause__
        kind = type(cause).__name__
        words = str(cause)[:300]
        if self._is_secret:
            words = words.replace(self._key.decode(), _HIDDEN)
        message = f"{kind}: {words}" if words else kind
        chain = list(_causes(error))
        exhausted = next((each for each in chain if _is_local(each)), None)
        if exhausted is not None:
            return local(f"this machine could not send it: {exhausted}")
        # An unknown host, or another host's certificate: the address may be wrong.
        astray = any(map(_is_astray, chain))
        return dropped(f"no answer from {self.address}: {message}", misaddressed=astray)


class _BoundedClient(DefaultAsyncHttpxClient):
    """An HTTP client that reads each response to its end, within bounds, whatever its status.

    The SDK would read a refusal's body without bounds. A fault of the body is noted in the response's extensions, and
    the response then holds the part that came before the fault.
    """

    async def send(self, request: Any, **options: Any) -> Any:
        response = await super().send(request, **{**options, "stream": True, "follow_redirects": False})
        if options.get("stream") and response.status_code < 300:
            return response  # its caller reads it, within bounds of its own
        content = bytearray()
        try:
            fault = await _read(response, content)
        finally:
            await response.aclose()
        if fault and not fault.startswith(_CUT):
            del content[_HEAD_BYTES:]
        names = ("content-encoding", "content-length", "transfer-encoding")
        headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in names]
        extensions = {**response.extensions, _FAULT: fault}
        return type(response)(
            response.status_code, headers=headers, content=bytes(content), request=request, extensions=extensions
        )


async def _read(response: Any, content: bytearray) -> str:
    """Append the response's body to `content`; return what is wrong with it, "" if nothing."""
    packing = response.headers.get("content-encoding", "").strip().lower()
    if packing not in _PACKINGS:
        return f"packed as {packing[:40]!r}, which was not asked for"
    try:
        async for part in response.aiter_bytes():
            content += part
            if len(content) > ANSWER_BYTES_MAX:
                return f"of more than {ANSWER_BYTES_MAX // 2**20} MiB (ask for less in one request)"
    except _transport().DecodingError as error:
        return f"that cannot be unpacked ({error})"
    except (_transport().ReadError, _transport().RemoteProtocolError) as error:
        return f"{_CUT}: {error}"
    return ""


def _transport() -> Any:
    """Return the package of the SDK's own transport: httpx2 under SDK 3, httpx under SDK 2."""
    return import_module(type(DEFAULT_CONNECTION_LIMITS).__module__.partition(".")[0])


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Return an exception and all exceptions that led to it."""
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        each = left.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            left += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]


# OpenSSL's reasons for an answer that is not TLS: plain HTTP at an address that says https.
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE")


def _is_astray(error: BaseException) -> bool:
    """Return whether the address is wrong: its name does not exist, or the server there is not the expected one.

    A name that cannot be looked up at the moment does not count.
    """
    if isinstance(error, socket.gaierror):
        return error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
    if isinstance(error, ssl.SSLCertVerificationError):
        return True
    return isinstance(error, ssl.SSLError) and getattr(error, "reason", "") in _NO_TLS


def _is_local(error: BaseException) -> bool:
    if isinstance(error, socket.gaierror):
        return error.errno in (socket.EAI_SYSTEM, socket.EAI_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _LOCAL_ERRORS)


def capped(request: Request, tokens: int) -> dict[str, int]:
    """Return the field that sets a request's output cap to `tokens`, under the name that the request itself uses.

    Empty for embeddings, which have no output.
    """
    endpoint, body = request.sizes.endpoint, request.body or {}
    if endpoint == EMBEDDINGS:
        return {}
    if endpoint == RESPONSES:
        return {"max_output_tokens": tokens}
    old = endpoint != CHAT or (body.get("max_tokens") is not None and body.get("max_completion_tokens") is None)
    return {"max_tokens" if old else "max_completion_tokens": tokens}


def _load_transport() -> None:
    """Load now what the SDK's transport loads at its first request, which delays a first burst by about 30 ms."""
    anyio.Lock()
    anyio.connect_tcp  # noqa: B018 (the attribute access loads it)


def _encoded(body: dict[str, Any]) -> bytes:
    """Encode a body as the SDK does, except that a lone surrogate, which JSON may contain, stays an escape."""
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(body, separators=(",", ":")).encode()


def _addressed(pool: Pool, environment: Mapping[str, str]) -> Pool:
    """Return the pool with the settings that it leaves to the SDK's environment variables filled in, except the key."""
    if pool.azure is None:
        url = pool.base_url or checked_url(environment.get(BASE_URL, "").strip())
        if pool.profile and not url and (profile := profile_of(pool)).base_url is None:
            raise BadSetting(
                f"profile {profile.name} has no address of its own: name yours by --base-url or {BASE_URL}", BASE_URL
            )
        return replace(pool, base_url=url)
    azure = pool.azure
    endpoint = azure.endpoint or checked_url(environment.get(AZURE_ENDPOINT, "").strip(), "endpoint")
    version = azure.api_version or environment.get(AZURE_API_VERSION, "").strip()
    for value, name in ((endpoint, AZURE_ENDPOINT), (version, AZURE_API_VERSION)):
        if not value:
            raise BadSetting(f"{name} is not set, and pool {pool.name} does not state it: set one of them", name)
    return replace(pool, azure=replace(azure, endpoint=endpoint, api_version=version))


def _ssl_context() -> ssl.SSLContext:
    """Return one TLS context for all clients: each would make its own, which blocks the loop for about 30 ms."""
    context: ssl.SSLContext = _transport().create_ssl_context()
    return context


PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy", "https_proxy", "http_proxy")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


def check_surroundings(environment: Mapping[str, str]) -> None:
    """Raise BadSetting, naming the variable, if the environment's proxy or certificates cannot be used.

    The SDK's transport reads these variables itself. A proxy's address may contain a password, so the message omits it.
    """
    for name in PROXIES:
        value = environment.get(name, "").strip()
        if value:
            complaint = _proxy_fault(value if "://" in value else f"http://{value}")
            if complaint:
                raise BadSetting(f"{name} {complaint}, or unset {name}", name)
    for name, is_there, what in zip(CERTIFICATES, (os.path.isfile, os.path.isdir), ("file", "folder"), strict=True):
        path = environment.get(name, "").strip()
        if path and not is_there(path):
            raise BadSetting(f"{name}: there is no {what} {path!r}: correct the path, or unset {name}", name)


def _proxy_fault(url: str) -> str:
    """Return what is wrong with a proxy's address, and the remedy; "" if nothing is."""
    try:
        parts = urlsplit(url)
        good = bool(parts.hostname) and parts.port != 0
    except ValueError:  # an invalid port, or unmatched brackets
        good = False
    if not good:
        return "is not an address of a proxy: write http://HOST:PORT"
    if parts.scheme not in _PROXY_SCHEMES:
        return f"names a proxy of an unknown kind ({quoted(parts.scheme)}): write http://HOST:PORT"
    if parts.scheme.startswith("socks") and find_spec("socksio") is None:
        return "names a SOCKS proxy, which needs a package that is not installed: pip install socksio"
    return ""


def _surroundings_text(error: Exception) -> str:
    """Return in one line why no client could be made, for cases that `check_surroundings` does not detect."""
    names = CERTIFICATES if isinstance(error, OSError) else PROXIES
    named = [name for name in names if os.environ.get(name, "").strip()]
    if isinstance(error, ssl.SSLError):
        why = "it holds no certificate that can be read (PEM)"
    else:
        why = (isinstance(error, OSError) and error.strerror) or type(error).__name__
    return f"{' or '.join(named) or 'the HTTP client'} cannot be used: {why}: correct or unset it"


def _client(pool: Pool, key: str, context: ssl.SSLContext) -> AsyncOpenAI:
    # Use the class of the SDK's own limits: httpx2 under SDK 3, httpx under SDK 2.
    limits = type(DEFAULT_CONNECTION_LIMITS)(
        max_connections=None, max_keepalive_connections=IDLE_MAX, keepalive_expiry=KEEPALIVE_S
    )
    common: dict[str, Any] = {
        "max_retries": 0,
        "timeout": TIMEOUT_S,
        "organization": pool.organization or None,
        "project": pool.project or None,
        "http_client": _BoundedClient(limits=limits, verify=context),
        "default_headers": {"Accept-Encoding": "gzip, deflate"},
    }
    if pool.azure is None:
        return AsyncOpenAI(api_key=key, base_url=pool.base_url or OPENAI_URL, **common)
    common["azure_ad_token" if pool.key == AZURE_TOKEN else "api_key"] = key
    client: AsyncOpenAI = AsyncAzureOpenAI(
        azure_endpoint=pool.azure.endpoint,
        azure_deployment=pool.azure.deployment or None,
        api_version=pool.azure.api_version,
        **common,
    )
    return client


def _origin(url: str) -> str:
    """Return scheme, host and port of an address: the part that a message may contain."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
