"""`paceline probe`: the few calls that settle what the documentation leaves open, against the user's own account.

Theory of operation. If a bucket is full before a call, it shows the call's charge exactly: limit less remaining. So
each question waits until the bucket is full again, at most a minute, and makes calls that the possible rules answer
differently:

  charge rule      one call that declares a large output cap; the rule whose charge is nearest
  settles          a tiny call right after that one has ended: has its reservation been corrected to its use? If the
                   cap is charged, once more with a short answer: a long one lasts until the bucket is full again
  slices           more tiny calls at once than a second's share of the requests limit
  refusals count   two calls of 60 % of the limit each: after the second was refused, how much is left?
  gate             if the cap is not charged: is a call refused whose cap is above the limit?
  window           calls of an eighth of the limit: five at once, eight after 20 s and 62 s, one every 4 s; which of
                   them were refused, compared with the refusals of each known window (`judge`); needs no headers

No call is made that could cost more than the rest of `--max-cost`, assuming that its whole cap is written. Questions
that cannot be answered (other traffic, a limit so high that it refills before the next call, no headers) are reported
as such, never guessed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from governor.model.errors import PacelineError
from governor.model.estimate import CHAT, Sizes, charge_of, sizes_of
from governor.model.prices import Price, Usage
from governor.model.requests import Answer, Limit, Outcome, Request, Scope, url_of
from governor.model.work import Job, Sender, Work

_TIMEOUT_S = 120.0
TINY = 16
CAP_MOST = 12_000
PROMPT_MOST = 100_000
BURST_MOST = 60
FILL_RATIO = 0.6
# Differences that do not count: the refill of a moment, in seconds, and rounding, in tokens.
MOMENT_S = 0.25
_ROUNDING = 6.0
_RULES = ("auto", "prompt_plus_max", "max_of", "responses")
WORDS = "Count upwards, one number per line, and go on for as long as you may. "
BRIEF = "Answer with the one word yes. "
CAP_CHARGED = ("prompt_plus_max", "max_of")
QUESTIONS = ("charge_rule", "settles", "slice_s", "max_tokens_in_gate", "failed_requests_count")


# The question about the window: the parts of the limit that one call takes, and the number of calls at each second. A
# minute after the first salvo a counter is empty, while a log still holds the second salvo.
PARTS = (8, 64)
SALVOS = (
    (0.0, 5),
    (20.0, 8),
    *((24.0 + 4.0 * i, 1) for i in range(9)),
    (62.0, 8),
    *((66.0 + 4.0 * i, 1) for i in range(6)),
)
KNOCKS_MOST = sum(calls for _, calls in SALVOS)
# The time that all questions take, seconds: from, to.
TAKES_S = (240.0, 420.0)


@dataclass(frozen=True, slots=True)
class WindowProbe:
    """One call of the question about the window. Times in seconds of the provider's clock; -1 = unknown.

    `charges`: by each rule. `used`: tokens of the answer. `wait_s`: the wait that a refusal stated.
    """

    at_s: float
    ended_s: float
    let_in: bool
    wait_s: float
    used: float
    charges: dict[str, float]


@dataclass(frozen=True, slots=True)
class ProbeAnswer:
    """The answer to one question. `value` None: the question could not be answered, and `why` gives the reason."""

    name: str
    value: Any
    why: str


Judge = Callable[[Sequence[WindowProbe], float, float], list[ProbeAnswer]]
"""Judge from knocks how a provider with this many tokens and requests per minute (0 = no limit) behaves."""


@dataclass(slots=True)
class Probe:
    """One account under test. `price`: the model's; `max_cost_usd`: for all calls. `time_scale`: its clock's.

    `believed`: tokens and requests per minute by the settings, if no header states them. `judge`: evaluates the
    question about the window; None = it is not asked.
    """

    send: Sender
    model: str
    price: Price
    max_cost_usd: float
    time_scale: float = 1.0
    spent_usd: float = 0.0
    calls: int = 0
    limits: dict[str, Limit] = field(default_factory=dict)
    believed: tuple[float, float] = (0.0, 0.0)
    judge: Judge | None = None

    # ------------------------------------------------------------ calls

    def _body(self, prompt_tokens: int, cap: int, words: str) -> dict[str, Any]:
        text = (words * (4 * prompt_tokens // len(words) + 1))[: max(8, 4 * prompt_tokens)]
        return {"model": self.model, "messages": [{"role": "user", "content": text}], "max_completion_tokens": cap}

    def affords(self, prompt_tokens: int, cap: int, calls: int = 1) -> bool:
        """Return whether so many calls fit into the remaining cost, even if each writes its whole cap."""
        worst = calls * self.price.cost_usd(Usage(prompt_tokens + 10, cap))
        return self.spent_usd + worst <= self.max_cost_usd

    async def call(self, prompt_tokens: int, cap: int, words: str = WORDS) -> tuple[Answer, Sizes, float]:
        """Make one call; return its answer, its sizes, and when it was sent (the loop's clock). `words`: its prompt.

        Raise PacelineError if the provider refuses the account.
        """
        body = self._body(prompt_tokens, cap, words)
        sizes = sizes_of(CHAT, body)
        self.calls += 1
        request = Request(self.calls, f"probe-{self.calls}", url_of(CHAT), self.model, body, sizes)
        sent_s = asyncio.get_running_loop().time()
        answer = await self.send(Job(Work(request, 0.0), self.calls, 0.0, -1.0, -1, 0.0), _TIMEOUT_S)
        if answer.scope is Scope.ACCOUNT:
            raise PacelineError(
                f"the account is refused: {answer.error_code or answer.outcome}: {answer.message[:200]}"
            )
        if answer.outcome is Outcome.OK:
            usage = Usage(answer.used_prompt_tokens, answer.used_output_tokens)
            self.spent_usd += self.price.cost_usd(usage)
        for limit in answer.limits:
            self.limits[limit.dimension] = limit
        return answer, sizes, sent_s

    # ------------------------------------------------------------ the bucket

    @property
    def limit(self) -> float:
        """Tokens per minute; 0 = neither headers nor settings state it."""
        return self.limits["TPM"].limit if "TPM" in self.limits else self.believed[0]

    @property
    def requests_limit(self) -> float:
        """Requests per minute; 0 = neither headers nor settings state it."""
        return self.limits["RPM"].limit if "RPM" in self.limits else self.believed[1]

    @property
    def rate_per_s(self) -> float:
        """Tokens that the bucket regains per second of our clock."""
        return self.limit / 60.0 * self.time_scale

    async def fill(self) -> None:
        """Wait until the bucket must be full again, by its last count."""
        missing = self.limit - self.limits["TPM"].remaining
        await asyncio.sleep(min(65.0 / self.time_scale, missing / self.rate_per_s + 0.3 / self.time_scale + 0.05))


def foreseen_usd(price: Price, tpm: float, rpm: float, charge_rule: str) -> float:
    """Return what all questions cost at most, as a rule, on an account with these limits; 0 = no limit.

    Answers that are asked to go on fill their cap, and the question about the window uses three minutes of the limit.
    """
    by_cap = charge_rule in CAP_CHARGED
    cap = CAP_MOST
    while cap > 4 * TINY and cap > tpm / 3.0:
        cap //= 2
    burst = math.ceil(rpm / 60.0) + 3
    tiny = 2 + (burst if rpm and burst <= min(BURST_MOST, rpm / 2.0) else 0)
    prompt, output = 10.0 * tiny + 200.0, float(TINY * tiny + cap)
    if by_cap:
        output += FILL_RATIO * tpm
        prompt += 10.0 * KNOCKS_MOST
        # Brief answers to calls whose caps fill three minutes of the limit.
        output += 0.1 * 3.0 * tpm
    else:
        output += 1.05 * tpm
        prompt += (FILL_RATIO * tpm if FILL_RATIO * tpm <= PROMPT_MOST else 0.0) + 3.0 * tpm
    return price.sum_usd(round(prompt), 0, round(output))


def used_in(answer: Answer) -> float:
    """Return the tokens that the headers count as used; -1 = not stated."""
    return next((x.limit - x.remaining for x in answer.limits if x.dimension == "TPM"), -1.0)


async def probed(probe: Probe) -> list[ProbeAnswer]:
    """Ask all questions, in the order in which they disturb each other least; return their answers.

    Raise PacelineError if the cost limit is too small or the first call fails.
    """
    if not probe.affords(10, TINY, 4):
        raise PacelineError(f"--max-cost {probe.max_cost_usd:g} is less than four tiny calls cost: raise it")
    first, _, _ = await probe.call(10, TINY)
    if first.outcome is not Outcome.OK:
        raise PacelineError(
            f"the first call failed: {first.status} {first.error_code or first.outcome}: {first.message[:200]}"
        )
    if used_in(first) < 0.0:
        found = [ProbeAnswer(name, None, "the headers state no tokens limit") for name in QUESTIONS]
    else:
        rule, settles = await _charge_and_settling(probe)
        found = [rule, settles, await _slices(probe)]
        found.append(await _gate(probe, rule))
        found.append(await _refusals_count(probe, rule))
    by_refusals = await _window(probe, found[0])
    told = {each.name: each for each in by_refusals if each.value is not None}
    found = [told.pop(each.name, each) if each.value is None else each for each in found]
    names = {each.name for each in found}
    return found + [each for each in by_refusals if each.name not in names]


async def _window(probe: Probe, rule: ProbeAnswer) -> list[ProbeAnswer]:
    """Determine by refusals alone how the limit counts over time."""
    judge = probe.judge
    if judge is None:
        return [ProbeAnswer("window", None, "not asked: it needs paceline[sim]")]
    if probe.limit / PARTS[-1] < 2 * TINY:
        return [ProbeAnswer("window", None, "neither headers nor OPENAI_TPM_LIMIT state a limit that calls could fill")]
    why = ""
    # Use caps first: they cost only what is written. Use smaller calls if a burst is shorter than one call.
    by_caps = [rule.value in CAP_CHARGED] if rule.value is not None else [True, False]
    for by_cap in by_caps:
        for part in PARTS:
            size = math.floor(probe.limit / part)
            prompt, cap = (10, size) if by_cap else (size, TINY)
            if not by_cap and size > PROMPT_MOST:
                why = f"a part of the limit is {size:,} tokens: more than a prompt holds"
                continue
            if not probe.affords(prompt, cap, KNOCKS_MOST):
                why = f"not asked: {KNOCKS_MOST} calls of {size:,} tokens could cost more than what is left"
                continue
            knocks = await _knocked(probe, prompt, cap)
            if all(knock.let_in for knock in knocks):
                why = f"none of {len(knocks)} calls of {size:,} tokens was refused at a limit of {probe.limit:,.0f}"
                break
            if any(knock.let_in for knock in knocks):
                return judge(knocks, probe.limit, probe.requests_limit)
            why = f"not even the first of {len(knocks)} calls of {size:,} tokens was let in"
    return [ProbeAnswer("window", None, why)]


async def _knocked(probe: Probe, prompt: int, cap: int) -> list[WindowProbe]:
    """Make the calls of the window question; return them in the order in which they were sent."""
    await asyncio.sleep(61.0 / probe.time_scale)
    loop = asyncio.get_running_loop()
    zero_s = loop.time()
    found: list[WindowProbe] = []

    async def one() -> None:
        answer, sizes, sent_s = await probe.call(prompt, cap, BRIEF)
        if answer.outcome not in (Outcome.OK, Outcome.THROTTLED):
            return
        let_in = answer.outcome is Outcome.OK
        used = float(answer.used_prompt_tokens + answer.used_output_tokens) if let_in else -1.0
        at_s, ended_s = ((at - zero_s) * probe.time_scale for at in (sent_s, loop.time()))
        charges = {name: _charge(name, sizes, answer) for name in (*_RULES, "prompt_chars4")}
        found.append(WindowProbe(at_s, ended_s, let_in, answer.retry_after_s, used, charges))

    for moment_s, calls in SALVOS:
        await asyncio.sleep(zero_s + moment_s / probe.time_scale - loop.time())
        await asyncio.gather(*(one() for _ in range(calls)))
        # If the first salvo was refused whole, or nothing was refused by the second, the rest would add nothing.
        outcomes = {knock.let_in for knock in found}
        if outcomes == {False} or (moment_s > 0.0 and outcomes == {True}):
            break
    return sorted(found, key=lambda knock: knock.at_s)


async def _charge_and_settling(probe: Probe) -> tuple[ProbeAnswer, ProbeAnswer]:
    """Make a call with a large cap, and a tiny one right after it."""
    await probe.fill()
    cap = CAP_MOST
    while cap > 4 * TINY and (cap > probe.limit / 3.0 or not probe.affords(200, cap)):
        cap //= 2
    if not probe.affords(200, cap):
        why = f"not asked: it could cost more than what is left of ${probe.max_cost_usd:g}"
        return ProbeAnswer("charge_rule", None, why), ProbeAnswer("settles", None, why)
    answer, sizes, sent_s = await probe.call(200, cap)
    charged = used_in(answer)
    if answer.outcome is not Outcome.OK or charged < 0.0:
        why = f"the call with {cap:,} tokens of cap came back {answer.outcome}"
        return ProbeAnswer("charge_rule", None, why), ProbeAnswer("settles", None, why)
    rule = _rule(charged, sizes, answer)
    settles = await _settling(probe, rule, answer, charged, sent_s)
    if settles.value is None and rule.value in CAP_CHARGED and probe.affords(200, cap):
        await probe.fill()
        answer, _, sent_s = await probe.call(200, cap, BRIEF)
        if answer.outcome is Outcome.OK and (charged := used_in(answer)) >= 0.0:
            settles = await _settling(probe, rule, answer, charged, sent_s)
    return rule, settles


async def _settling(probe: Probe, rule: ProbeAnswer, answer: Answer, charged: float, sent_s: float) -> ProbeAnswer:
    """Make a tiny call after `answer`, whose call was sent at `sent_s` and charged `charged` tokens."""
    after, tiny, after_s = await probe.call(10, TINY)
    left = used_in(after)
    if after.outcome is not Outcome.OK or left < 0.0 or answer.used_output_tokens < 0:
        return ProbeAnswer("settles", None, f"the call after it came back {after.outcome}")
    real = float(answer.used_prompt_tokens + answer.used_output_tokens)
    left -= _charge(rule.value or "auto", tiny, after)
    kept = max(0.0, charged - (after_s - sent_s) * probe.rate_per_s)
    # A correction upwards came when the call ended, a moment ago, so that nothing of it has refilled yet.
    corrected = max(0.0, kept + real - charged)
    # The use to expect now: (settled?, amount). A bucket has refilled; a counter or a log of a minute has not.
    expected = ((False, kept), (True, corrected), (False, charged), (True, real))
    tolerance = MOMENT_S * probe.rate_per_s / math.sqrt(probe.time_scale) + _ROUNDING
    fitting = {settled for settled, amount in expected if abs(left - amount) <= tolerance}
    why = (
        f"{left:,.0f} tokens counted once the call had ended. Expected, settled or not: of a bucket {corrected:,.0f} "
        f"or {kept:,.0f}, of a counter per minute {real:,.0f} or {charged:,.0f}"
    )
    if len(fitting) == 1:
        return ProbeAnswer("settles", fitting.pop(), why)
    problem = "both ways fit: the limit refills too fast, or the answer was short" if fitting else "none of these fits"
    return ProbeAnswer("settles", None, f"{why}: {problem}")


def _charge(rule: str, sizes: Sizes, answer: Answer) -> float:
    """Return the rule's charge; `responses` counts the real prompt if it is stated."""
    if rule == "responses" and answer.used_prompt_tokens >= 0:
        extra = charge_of(rule, sizes, 0) - sizes.prompt_tokens
        return float(answer.used_prompt_tokens + extra)
    return float(charge_of(rule, sizes, 0))


def _rule(charged: float, sizes: Sizes, answer: Answer) -> ProbeAnswer:
    expected = {rule: _charge(rule, sizes, answer) for rule in _RULES}
    best = min(expected, key=lambda rule: abs(expected[rule] - charged))
    words = ", ".join(f"{rule} {tokens:,.0f}" for rule, tokens in expected.items())
    if abs(expected[best] - charged) > _ROUNDING + 0.02 * expected[best]:
        return ProbeAnswer("charge_rule", None, f"charged {charged:,.0f} tokens, as no rule would: {words}")
    return ProbeAnswer("charge_rule", best, f"charged {charged:,.0f} tokens: {words}")


async def _slices(probe: Probe) -> ProbeAnswer:
    """Make more tiny calls at once than a second's share of the requests limit."""
    name = "slice_s"
    rpm = probe.limits.get("RPM")
    if rpm is None:
        return ProbeAnswer(name, None, "no requests limit per minute is stated")
    burst = math.ceil(rpm.limit / 60.0) + 3
    if burst > min(BURST_MOST, rpm.limit / 2.0):
        return ProbeAnswer(
            name, None, f"a second's share of {rpm.limit:,.0f} requests is more than is sent at once here"
        )
    if not probe.affords(10, TINY, burst):
        return ProbeAnswer(name, None, "not asked: it could cost more than what is left")
    await probe.fill()
    await asyncio.sleep(2.0 / probe.time_scale)
    answers = await asyncio.gather(*(probe.call(10, TINY) for _ in range(burst)))
    refused = sum(answer.outcome is Outcome.THROTTLED for answer, _, _ in answers)
    why = f"{refused} of {burst} calls at once were refused, a second's share is {rpm.limit / 60.0:,.1f}"
    return ProbeAnswer(name, 1.0 if refused else 0.0, why)


async def _gate(probe: Probe, rule: ProbeAnswer) -> ProbeAnswer:
    """Determine whether a cap above the limit is refused although it is not charged."""
    name = "max_tokens_in_gate"
    if rule.value in CAP_CHARGED:
        return ProbeAnswer(name, True, "the cap is charged")
    cap = math.ceil(1.05 * probe.limit)
    if not probe.affords(10, cap):
        return ProbeAnswer(name, None, f"not asked: a cap of {cap:,} tokens could cost more than what is left")
    await probe.fill()
    answer, _, _ = await probe.call(10, cap)
    if answer.outcome is Outcome.TOO_LARGE or answer.outcome is Outcome.THROTTLED:
        return ProbeAnswer(name, True, f"a cap of {cap:,} tokens was refused: {answer.message[:80]}")
    if answer.outcome is Outcome.OK:
        return ProbeAnswer(name, False, f"a cap of {cap:,} tokens was let in, at a limit of {probe.limit:,.0f}")
    return ProbeAnswer(name, None, f"a cap of {cap:,} tokens came back {answer.outcome}: the model may not allow it")


async def _refusals_count(probe: Probe, rule: ProbeAnswer) -> ProbeAnswer:
    """Make two calls of 60 % of the limit, and see what is left after the second one's refusal."""
    name = "failed_requests_count"
    wanted = math.ceil(FILL_RATIO * probe.limit)
    by_cap = rule.value in CAP_CHARGED
    prompt, cap = (10, wanted) if by_cap else (wanted, TINY)
    if not by_cap and wanted > PROMPT_MOST:
        return ProbeAnswer(name, None, f"60 % of the limit is {wanted:,} tokens: more than a prompt holds")
    if not probe.affords(prompt, cap, 2):
        return ProbeAnswer(name, None, "not asked: it could cost more than what is left")
    await probe.fill()
    # Send both at once: the first answer may take longer than the bucket needs to refill.
    first, second = await asyncio.gather(probe.call(prompt, cap), probe.call(prompt, cap))
    answers = sorted((first[0], second[0]), key=lambda answer: answer.outcome is not Outcome.OK)
    refused = answers[1]
    if answers[0].outcome is not Outcome.OK or refused.outcome is not Outcome.THROTTLED:
        return ProbeAnswer(name, None, f"the two calls came back {answers[0].outcome} and {refused.outcome}")
    used = used_in(refused)
    if used < 0.0:
        return ProbeAnswer(name, None, "the refusal states no limits in its headers")
    value = used > (1.0 + FILL_RATIO) / 2.0 * probe.limit
    return ProbeAnswer(name, value, f"{used:,.0f} of {probe.limit:,.0f} tokens used after a refusal of {wanted:,}")


# ---------------------------------------------------------------- the file

# The entries of the file, with the name under which a plan notes what was learned; "" = part of another entry.
KEYS = {
    "charge_rule": "charge rule",
    "settles": "settling",
    "failed_requests_count": "refused requests",
    "slice_s": "slices",
    "window": "window",
    "burst_s": "",
    "charged": "",
    "retry_after": "Retry-After",
}


def provider_text(probe: Probe, found: list[ProbeAnswer]) -> str:
    """Return the provider.yaml for `--provider`. Unanswered questions become comments and keep the defaults."""
    lines = [f"# What paceline probe read from this account with {probe.calls} calls of {probe.model}."]
    for told in found:
        known = "not told" if told.value is None else _yaml(told.value)
        lines.append(f"# {told.name}: {known}: {told.why}")
    lines.append(f"tpm: {probe.limit:.0f}")
    if probe.requests_limit:
        lines.append(f"rpm: {probe.requests_limit:.0f}")
    answered = [told for told in found if told.name in KEYS and told.value is not None]
    lines += [f"{told.name}: {_yaml(told.value)}" for told in answered]
    learnt = [KEYS[told.name] for told in answered if KEYS[told.name]]
    if learnt:
        lines += [f"learnt: [{', '.join(learnt)}]", "learnt_from: paceline probe"]
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def write_provider(path: Path, text: str) -> None:
    """Write the file; it appears whole or not at all."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
