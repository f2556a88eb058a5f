"""The synthetic provider's replies to requests, and its counts; `server` puts HTTP around it.

The functions of `sim/model/provider.py` decide, unmodified; the forms are OpenAI's (`wire`, `streams`) or, for the
messages endpoint, Anthropic's (`anthropic`).

**Chance** is keyed by request and attempt, never streamed, so the order of arrival changes nothing. A request with our
own client id (`paceline-RUN-INDEX-ATTEMPT`, as `governor/provider/openai_adapter.py` sends it) draws under that index
and attempt, exactly as row INDEX of a simulation with the same seed; any other request draws under a hash of its
content, without caps, and the count of its arrivals. The answer's length is stated by the header
`x-paceline-output-tokens` or `metadata.paceline_output_tokens`; else it is the one that `workload` assumes (log-normal,
the median a quarter of the cap first seen). The cap then cuts it. Tool calls and JSON (`contents`) keep their length.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from governor.model.errors import BadInput
from governor.model.estimate import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES, Sizes, charge_of, sizes_of
from governor.model.keyed import FAULT, OUTPUT_LENGTH, TIER, keyed_uniform, normal_quantile
from governor.model.requests import MESSAGES_URL, URLS
from governor.profiles.loader import OPENAI, read_profile
from governor.profiles.schema import Profile
from sim.model import provider as prov
from sim.model.faults import Event, FaultState
from sim.model.provider import ProviderState
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import P50_ASSUMED_MAX, P50_ASSUMED_NO_CAP, P50_OF_CAP, SIGMA_ASSUMED
from sim.model.workload import TOKENS_MAX
from sim.serving import anthropic, profile_forms, streams, wire
from sim.serving.contents import Content, content_of
from sim.serving.stats import Stats
from sim.serving.streams import Timed
from sim.serving.wire import AnswerSpec, Headers

# A policy's own estimate per run, which the provider's charge rule `fixed` takes.
FIXED_CHARGE = 7_000
# Most requests remembered: how often each arrived and how long its answer is.
REMEMBERED_MAX = 1_000_000
OUTPUT_HEADER = b"x-paceline-output-tokens"
OUTPUT_METADATA = "paceline_output_tokens"

_CLIENT_ID = re.compile(rb"(paceline-[0-9A-Za-z]{1,64}-([0-9]{1,15}))-([0-9]{1,9})")
PATHS = (*URLS, MESSAGES_URL)
_PROMPTS = {
    CHAT: ("messages",),
    RESPONSES: ("instructions", "input"),
    EMBEDDINGS: ("input",),
    COMPLETIONS: ("prompt",),
    MESSAGES: ("system", "messages"),
}
# The model assumed for a stored prompt, whose request need not name one.
STORED_MODEL = "gpt-4o"
# The tier that an answer states, by the one that was asked for; others are served as the default.
_SERVED = {"flex": "flex", "priority": "priority", "fast": "priority"}
_REFUSED = (prov.THROTTLED, prov.TOO_LARGE, prov.QUOTA, prov.SLOW_DOWN)

# Ways in which a reply is sent.
_FULL = 0
DROPPED = 1
TRUNCATED = 2


@dataclass(slots=True)
class Call:
    """One incoming attempt. `request`, `attempt`: the keys of its chance; `arrivals`: how often it has arrived."""

    model: str
    body: dict[str, Any]
    sizes: Sizes
    request: int
    attempt: int
    arrivals: int
    output_tokens: int
    content: Content


@dataclass(slots=True)
class Reply:
    """A reply: when (provider's seconds from admission) and how it is sent; `written`: an answer in place of a body.

    `endpoint` determines the forms. `counts`: the headers that state limits and what remains. `first_s`: when a stream
    begins, -1 if the answer is sent whole. `inside`: the code of the error that the answer turns into.
    """

    outcome: str
    status: int = 200
    body: bytes = b""
    extra: Headers = field(default_factory=list)
    service_s: float = 0.0
    way: int = _FULL
    written: AnswerSpec | None = None
    charge: int = 0
    content_type: bytes = wire.JSON
    counts: Headers = field(default_factory=list)
    endpoint: int = CHAT
    first_s: float = -1.0
    inside: str = ""

    def whole_body(self) -> bytes:
        """Return the body of an answer that is sent whole, with its fault applied."""
        a, words = self.written, _words(self.endpoint)
        if a is None:
            return self.body
        body = words.failure_body(a, self.inside) if self.inside else words.answer_body(a)
        return body[: len(body) // 2] if self.outcome == "malformed" else body

    def events(self) -> list[Timed]:
        """Return a streamed answer as events, with its fault applied: cut off, malformed, or ended by an error."""
        assert self.written is not None
        forms = anthropic if self.endpoint == MESSAGES else streams
        events = forms.stream_of(self.written)
        half = events[: max(1, len(events) // 2)]
        due, last = half[-1]
        if self.inside:
            return [*half, (due, forms.failure_event(self.written, self.inside, len(half)))]
        if self.outcome == "malformed":
            return [*half[:-1], (due, last[: len(last) // 2] + b"\n\n")]
        return half if self.way == TRUNCATED else events


def _words(endpoint: int) -> Any:
    """Return the module that writes an endpoint's forms."""
    return anthropic if endpoint == MESSAGES else wire


class Desk:
    """One provider quota in operation: attempts in, replies out. Times are the provider's seconds.

    `scale`: stated times (waits, resets) are divided by this. `server.Provider` explains the other arguments.
    """

    def __init__(
        self,
        config: ProviderConfig,
        *,
        seed: int = 0,
        events: Sequence[Event] = (),
        scale: float = 1.0,
        fixed_charge: int = FIXED_CHARGE,
        ms_header: bool = False,
    ) -> None:
        self.config = config
        self.profile = None if config.profile == OPENAI else read_profile(config.profile)
        self.pp = config.params()
        standard = {name: d for d, name in enumerate(wire.DIMENSIONS)}
        self.places = {each.name: each.place for each in config.quota} or standard
        self.ps = ProviderState()
        prov.day_started(self.ps, config.day_tokens_used, config.day_requests_used)
        self.seed = seed
        self.trouble = FaultState(events, seed)
        self.scale = scale
        self.fixed_charge = fixed_charge
        self.ms_header = ms_header
        self.count = Stats()
        self.remembered: dict[bytes, list[int]] = {}

    def came(self, endpoint: int, headers: dict[bytes, bytes], now: float) -> int:
        """Count an arriving attempt and return its number, from 1."""
        count = self.count
        count.requests += 1
        count.first_s = now if count.first_s < 0.0 else count.first_s
        count.last_s = now
        count.endpoints[PATHS[endpoint]] += 1
        count.retry_counts[headers.get(b"x-stainless-retry-count", b"none")[:8].decode("latin-1")] += 1
        count.in_flight += 1
        count.in_flight_max = max(count.in_flight_max, count.in_flight)
        return count.requests

    def ended(self, reply: Reply, hung_up: bool, now: float) -> None:
        """Count an attempt whose reply is due. An answer is settled unless its client has hung up."""
        count = self.count
        count.in_flight -= 1
        count.outcomes["hung_up" if hung_up else reply.outcome] += 1
        a = reply.written
        if not hung_up and reply.outcome == "ok" and a is not None:
            count.prompt_tokens += a.prompt_tokens
            count.output_tokens += a.output_tokens
            count.bill(a, a.tier)
            used = float(a.prompt_tokens + a.output_tokens)
            at, prompt = max(self.ps.at, now), float(a.prompt_tokens)
            prov.settled(self.pp, self.ps, self.seed, float(reply.charge), used, at, prompt)
        if self.pp.counts == prov.COUNTS_AT_ANSWER:
            prov.advanced(self.pp, self.ps, self.seed, max(self.ps.at, now))
            reply.counts = self._counts(reply)

    def stats(self) -> dict[str, Any]:
        """Return the counts so far.

        They are: requests by outcome, endpoint and the SDK's retry count, tokens, the most in flight, requests that
        came more than once, how often each event struck, and the highest fill of each limit (`windows`).
        """
        windows = {
            name: {
                "limit": self.pp.limit[d],
                "limit_now": prov.limit_now(self.pp, self.ps, d),
                "used_max": self.count.used_max[d],
                "used_ratio_max": self.count.used_ratio_max[d],
            }
            for name, d in self.places.items()
            if self.pp.limit[d] > 0.0
        }
        events = [[event.kind, times] for event, times in zip(self.trouble.events, self.trouble.struck, strict=True)]
        return {**self.count.as_dict(), "windows": windows, "events": events}

    def headers(self, reply: Reply, number: int) -> Headers:
        """Return the headers that every reply carries; call it after `ended`."""
        processing_s = (reply.service_s if reply.first_s < 0.0 else reply.first_s) / self.scale
        return [*_words(reply.endpoint).own_headers(number, processing_s), *reply.counts, *reply.extra]

    def _counts(self, reply: Reply) -> Headers:
        """Return the limits and what remains of them now, if this reply states them."""
        if not prov.states_counts(self.pp, reply.status == 429):
            return []
        if (profile := self._own(reply.endpoint)) is not None:
            return profile_forms.profile_headers(self.pp, self.ps, self.scale, profile, self.places, time.time())
        write: Callable[..., Headers] = _words(reply.endpoint).limit_headers
        return write(self.pp, self.ps, self.scale, self.config.header_names, time.time())

    def limits_page(self, path: str, models: Sequence[str]) -> bytes | None:
        """Return what an endpoint of limits answers, by the profile's form; None for any other path."""
        profile = read_profile(self.config.profile)
        return profile_forms.limits_body(profile, path, self.pp, self.places, models)

    def _own(self, endpoint: int) -> Profile | None:
        """Return the profile whose names and formats hold at this endpoint; None: those of `wire` or `anthropic`."""
        return self.profile if self.profile and (self.profile.api == "anthropic") == (endpoint == MESSAGES) else None

    # ------------------------------------------------------------ replies

    def decided(self, endpoint: int, headers: dict[bytes, bytes], raw: bytes, now: float) -> Reply:
        """Decide the reply to one attempt that arrives at `now`, and change the provider's state accordingly."""
        reply = self._decided(endpoint, headers, raw, now)
        reply.endpoint = endpoint
        reply.counts = self._counts(reply)
        return reply

    def _decided(self, endpoint: int, headers: dict[bytes, bytes], raw: bytes, now: float) -> Reply:
        pp, ps = self.pp, self.ps
        prov.advanced(pp, ps, self.seed, now)
        try:
            call = self._call(endpoint, headers, _parsed(raw))
        except BadInput as error:
            body = _words(endpoint).error_body(error.reason, "invalid_request_error")
            return self._refusal(endpoint, "bad_request", body)
        keys = now, call.request, call.attempt, call.arrivals, self.count.requests
        event = self.trouble.strikes(True, *keys)
        if event is not None:
            return self._refused_by(event, call, headers)
        tiers, is_flex = self.config.tiers, call.body.get("service_tier") == "flex"
        if is_flex and keyed_uniform(self.seed, call.request, call.arrivals, TIER) < tiers.flex_refused_ratio:
            return self._refusal(endpoint, "no_capacity", wire.no_capacity_error())
        used_before = list(ps.used)
        sizes = call.sizes
        charge = charge_of(self.config.charge_rule, sizes, self.fixed_charge, self.config.as_of)
        output, prompt = _cut(call), float(sizes.prompt_tokens)
        outcome, service_s, d, wait_s = prov.answered(
            pp, ps, self.seed, call.request, call.attempt, float(charge), float(output), -1.0, now, prompt=prompt
        )
        self._note_use()
        if outcome in _REFUSED:
            requested = 0.0 if d < 0 else pp.per_request[d] + prov.amount_of(pp, d, float(charge), prompt)
            return self._refused(outcome, call, d, used_before, requested, wait_s)
        self.count.charged_tokens += charge
        if outcome == prov.SERVER_ERROR:
            return self._server_error(endpoint, 500, service_s)
        if outcome == prov.DROPPED:
            return Reply("dropped", service_s=service_s, way=DROPPED)
        reply = self._answer(call, output, charge, service_s * (tiers.flex_slower if is_flex else 1.0))
        event = self.trouble.strikes(False, *keys)
        return reply if event is None else self._spoiled(event, reply)

    def batch_reply(self, endpoint: int, body: dict[str, Any]) -> tuple[Reply, int]:
        """Return the answer to a line of a Batch file, and its input tokens (0 of what no endpoint could take).

        It is the one that the same request would get live, drawn in the same way, but for limits and time: nothing is
        charged, and a lost connection has no meaning.
        """
        try:
            call = self._call(endpoint, {}, body)
        except BadInput as error:
            return self._refusal(endpoint, "bad_request", wire.error_body(error.reason, "invalid_request_error")), 0
        tokens = call.sizes.prompt_tokens
        if keyed_uniform(self.seed, call.request, call.attempt, FAULT) < self.pp.error_ratio:
            return self._server_error(endpoint, 500, 0.0), tokens
        reply = self._answer(call, _cut(call), 0, 0.0)
        if reply.written is not None:
            reply.written = replace(reply.written, cached_tokens=0, tier="default")
        return reply, tokens

    def _call(self, endpoint: int, headers: dict[bytes, bytes], body: dict[str, Any]) -> Call:
        """Return the attempt that a request makes. Raise BadInput for what no endpoint could take."""
        model = body.get("model") or (STORED_MODEL if endpoint == RESPONSES and body.get("prompt") else None)
        if not isinstance(model, str) or not model:
            raise BadInput("you must provide a model parameter")
        sizes = sizes_of(endpoint, body)
        if endpoint == MESSAGES and sizes.max_tokens < 1:
            raise BadInput("max_tokens: Field required")
        content = content_of(endpoint, headers, body)
        found = _CLIENT_ID.fullmatch(headers.get(b"x-client-request-id", b""))
        if found is not None:
            name, request, attempt = found[1], int(found[2]), int(found[3])
        else:
            prompt = json.dumps([endpoint, model, [body.get(key) for key in _PROMPTS[endpoint]]])
            name = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
            request, attempt = int.from_bytes(name, "big") >> 1, 0
        seen = self.remembered.get(name)
        if seen is None:
            if len(self.remembered) >= REMEMBERED_MAX:
                del self.remembered[next(iter(self.remembered))]
            seen = self.remembered[name] = [0, self._length(sizes, request)]
        seen[0] += 1
        if seen[0] == 2:
            self.count.came_again += 1
        stated = _stated_output(headers, body)
        output = 0 if endpoint == EMBEDDINGS else stated if stated >= 0 else seen[1]
        if content.tokens() >= 0:
            output = sizes.n * max(1, content.tokens())
        return Call(model, body, sizes, request, attempt or seen[0], seen[0], output, content)

    def _length(self, sizes: Sizes, request: int) -> int:
        """Return the tokens that the model would write uncut: `workload`'s assumption, row by row."""
        quarter = min(max(P50_OF_CAP * sizes.max_tokens, 1.0), P50_ASSUMED_MAX)
        p50 = P50_ASSUMED_NO_CAP if sizes.max_tokens < 0 else quarter
        u = keyed_uniform(self.seed, request, 0, OUTPUT_LENGTH)
        length = p50 * math.exp(SIGMA_ASSUMED * normal_quantile(u))
        return sizes.n * round(min(max(length, 1.0), TOKENS_MAX))

    def _answer(self, call: Call, output: int, charge: int, service_s: float) -> Reply:
        sizes, body = call.sizes, call.body
        cut_off = output < call.output_tokens
        inputs, options = body.get("input"), body.get("stream_options")
        many = sizes.endpoint == EMBEDDINGS and isinstance(inputs, list) and not isinstance(inputs[0], int)
        written = AnswerSpec(
            endpoint=sizes.endpoint,
            model=call.model,
            key=call.request,
            created=int(time.time()),
            prompt_tokens=sizes.prompt_tokens,
            output_tokens=output,
            answers=len(inputs) if many and isinstance(inputs, list) else sizes.n,
            cut_off=cut_off,
            empty=cut_off and prov.cut_without_text(self.pp, self.seed, call.request),
            dimensions=_dimensions(body.get("dimensions")),
            as_base64=body.get("encoding_format") == "base64",
            content=call.content,
            includes_usage=isinstance(options, dict) and bool(options.get("include_usage")),
            cached_tokens=self.config.tiers.cached(sizes.prompt_tokens),
            tier=_SERVED.get(str(body.get("service_tier")), "default"),
        )
        reply = Reply("ok", service_s=service_s, written=written, charge=charge, endpoint=sizes.endpoint)
        if body.get("stream") and sizes.endpoint != EMBEDDINGS:
            # The first token's share of the time, including noise and stalls.
            smooth_s = self.pp.first_token_s + self.pp.per_token_s * output
            reply.first_s = service_s * (self.pp.first_token_s / smooth_s if smooth_s > 0.0 else 1.0)
            reply.content_type = streams.CONTENT_TYPE
        return reply

    def _note_use(self) -> None:
        """Update the highest fill of each limit so far."""
        count = self.count
        for d in self.places.values():
            used = self.ps.used[d]
            if used > count.used_max[d]:
                count.used_max[d] = used
            if used > 0.0 and (limit := prov.limit_now(self.pp, self.ps, d)) > 0.0:
                count.used_ratio_max[d] = max(count.used_ratio_max[d], used / limit)

    # ------------------------------------------------------------ refusals and faults

    def _refused(self, outcome: int, call: Call, d: int, used: list[float], requested: float, wait_s: float) -> Reply:
        """Return the reply to an attempt that the provider refuses.

        `used`: the use of each limit before this attempt.
        """
        endpoint = call.sizes.endpoint
        words = _words(endpoint)
        if outcome == prov.QUOTA:
            return self._refusal(endpoint, "quota", words.quota_error())
        if outcome == prov.SLOW_DOWN:
            return self._refusal(endpoint, "slow_down", words.slow_down_error())
        limit = prov.limit_now(self.pp, self.ps, d)
        if outcome == prov.TOO_LARGE:
            return self._refusal(endpoint, "too_large", words.too_large_error(call.model, d, limit, requested))
        stated_s = words.stated_wait_s(wait_s, self.scale)
        if (profile := self._own(endpoint)) is not None and endpoint != MESSAGES:
            body = wire.rate_error(
                call.model, d, limit, used[d], requested, stated_s, profile_forms.throttled_code(profile)
            )
            reply = self._refusal(endpoint, "throttled", body)
            reply.extra += profile_forms.profile_wait(profile, stated_s, time.time())
            return reply
        body = words.rate_error(call.model, d, limit, used[d], requested, stated_s)
        reply = self._refusal(endpoint, "throttled", body)
        if endpoint == MESSAGES or self.pp.retry_after in (prov.SAYS_SECONDS, prov.SAYS_CONSTANT, prov.SAYS_OLDEST):
            reply.extra += wire.retry_after(stated_s)
        if self.ms_header:
            reply.extra += wire.retry_after_ms(stated_s)
        return reply

    def _refused_by(self, event: Event, call: Call, headers: dict[bytes, bytes]) -> Reply:
        """Return the reply to an attempt that an event refuses at the door."""
        endpoint, kind = call.sizes.endpoint, event.kind
        words = _words(endpoint)
        stated_s = words.stated_wait_s(event.retry_after_s, self.scale)
        if kind == "throttled":
            limit = max(1.0, prov.limit_now(self.pp, self.ps, prov.RPM))
            body = words.rate_error(call.model, prov.RPM, limit, limit, 1.0, stated_s)
        elif kind == "slow_down":
            body = words.slow_down_error()
        elif kind == "quota":
            body = words.quota_error(event.code)
        elif kind == "overloaded":
            body = words.server_error(words.STATUS[kind])[0]
        elif kind == "model_not_found":
            body = words.unknown_model_error(call.model)
        else:
            key = headers.get(b"authorization", b"").removeprefix(b"Bearer ") or headers.get(b"api-key", b"")
            body = words.unauthorized_error(key.decode("latin-1"))
        reply = self._refusal(endpoint, kind, body)
        reply.extra += wire.retry_after(stated_s)
        return reply

    def _refusal(self, endpoint: int, kind: str, body: bytes) -> Reply:
        outcome = "unauthorized" if kind == "model_not_found" else kind
        return Reply(outcome, _words(endpoint).STATUS[kind], body, service_s=self.pp.refusal_s)

    def _server_error(self, endpoint: int, status: int, service_s: float) -> Reply:
        body, content_type = _words(endpoint).server_error(status)
        outcome = "overloaded" if status in (503, 529) else "server_error"
        return Reply(outcome, status, body, service_s=service_s, content_type=content_type)

    def _spoiled(self, event: Event, reply: Reply) -> Reply:
        """Return the reply with an event after admission applied to it."""
        if event.kind == "server_error":
            return self._server_error(reply.endpoint, event.status, min(reply.service_s, self.pp.first_token_s))
        if event.kind == "drop":
            return Reply("dropped", service_s=reply.service_s, way=DROPPED)
        if event.kind == "stall":
            reply.service_s += event.stall_s
        elif event.kind == "truncate":
            reply.outcome, reply.way = "truncated", TRUNCATED
        elif event.kind == "error_inside":
            reply.outcome, reply.inside = "error_inside", event.inside
        else:
            reply.outcome = "malformed"
        return reply


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise BadInput("We could not parse the JSON body of your request.") from None
    if not isinstance(body, dict):
        raise BadInput("The JSON body of a request must be an object.")
    return body


def _cut(call: Call) -> int:
    """Return the tokens of the answer, over all that were asked for, after its cap."""
    cap = call.sizes.max_tokens * call.sizes.n
    return min(call.output_tokens, cap) if cap > 0 else call.output_tokens


def _dimensions(value: object) -> int:
    if type(value) is not int:
        return wire.EMBEDDING_DIMENSIONS
    return min(max(value, 1), wire.EMBEDDING_DIMENSIONS_MAX)


def _stated_output(headers: dict[bytes, bytes], body: dict[str, Any]) -> int:
    """Return the answer's length as the request states it, -1 if it does not. Raise BadInput if it is not a count."""
    metadata = body.get("metadata")
    stated = headers.get(OUTPUT_HEADER, b"").decode("latin-1")
    if not stated and isinstance(metadata, dict):
        stated = str(metadata.get(OUTPUT_METADATA, ""))
    if not stated:
        return -1
    if not re.fullmatch("[0-9]{1,9}", stated):
        raise BadInput(f"{OUTPUT_METADATA} must be a whole number of tokens")
    return min(int(stated), TOKENS_MAX)
