"""The provider's desk without HTTP: against the simulation, against the charge rules, and keyed chance.

The central test replays a whole simulated run: the same attempts at the same times must draw the same outcomes, times
and stated waits from the code that answers real HTTP requests.
"""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from governor.model.estimate import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, charge_of, sizes_of
from governor.model.keyed import attempt_key
from governor.model.policy import Policy
from governor.model.requests import Outcome, Request, read_requests
from governor.provider import answers
from governor.provider import rate_limit_headers as stated
from sim.des.driver import Simulation
from sim.model import provider as prov
from sim.model.provider_config import ProviderConfig
from sim.model.workload import TOKENS_MAX, columns
from sim.scenario.readers import Source, read_workload
from sim.serving import wire
from sim.serving.replies import DROPPED, Desk, Reply

PLAIN = ProviderConfig(tpm=0, latency={"first_token_s": 0.6, "per_token_s": 0.008, "sigma": 0.0, "stall_ratio": 0.0})
URLS = {CHAT: "/v1/chat/completions", RESPONSES: "/v1/responses", EMBEDDINGS: "/v1/embeddings"}


def chat(text: str = "Hello there", **fields: Any) -> dict[str, Any]:
    return {"model": "gpt-4o", "messages": [{"role": "user", "content": text}], **fields}


def asked(
    desk: Desk,
    body: dict[str, Any],
    now: float = 0.0,
    *,
    endpoint: int = CHAT,
    index: int | None = None,
    attempt: int = 1,
    **headers: str,
) -> Reply:
    """One attempt at the desk; with an `index` it carries our client id."""
    sent = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    if index is not None:
        sent[b"x-client-request-id"] = f"paceline-run1-{index}-{attempt}".encode()
    desk.came(endpoint, sent, now)
    return desk.decided(endpoint, sent, json.dumps(body).encode(), now)


def parsed(desk: Desk, reply: Reply) -> answers.Answer:
    body = reply.body if reply.written is None else wire.answer_body(reply.written)
    return answers.classify(reply.status, dict(desk.headers(reply, 1)), body)


# ---------------------------------------------------------------- against the simulation


def batch_file(path: Path, count: int, rng: random.Random) -> Path:
    """A mixed batch: three endpoints, caps declared and not, short and long prompts.

    Several answers are asked for without a cap only: a finalize pass caps each here, all of them in simulation.
    """
    with path.open("w") as file:
        for i in range(count):
            endpoint = rng.choice([CHAT, CHAT, RESPONSES, EMBEDDINGS])
            text = "".join(rng.choice("abcdefgh äπ") for _ in range(rng.randint(20, 3_000)))
            body: dict[str, Any] = {"model": "gpt-4o"}
            if endpoint == CHAT:
                body["messages"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
                if rng.random() < 0.8:
                    body["max_tokens"] = rng.randint(20, 900)
                else:
                    body["n"] = 3
            elif endpoint == RESPONSES:
                body |= {"input": text, "max_output_tokens": rng.randint(16, 400)}
            else:
                body["input"] = [text, "short"]
            file.write(json.dumps({"custom_id": f"q{i}", "method": "POST", "url": URLS[endpoint], "body": body}) + "\n")
    return path


def read(path: Path) -> list[Request]:
    with path.open() as lines:
        return list(read_requests(lines, str(path)))


def finalized(request: Request, cap: int) -> dict[str, Any]:
    """The body of a finalize pass."""
    assert request.body is not None
    name = "max_output_tokens" if request.sizes.endpoint == RESPONSES else "max_tokens"
    return {**request.body, name: cap}


class Recorded(Simulation):
    """A simulation that writes down, in order, what was launched with which outcome, and when each answer came."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.log: list[tuple[str, int, int, float, int, float]] = []
        super().__init__(*arguments, **options)

    def launch(self, job: Any, now: float) -> None:
        super().launch(job, now)
        key = attempt_key(job.lane, job.tries)  # an attempt that an outage spared keeps its number, not its chance
        self.log.append(("launched", job.index, key, now, job.outcome, job.retry_after_s))

    def _on_answer(self, event: Any) -> None:
        job, now = event._value, self.env.now
        key = attempt_key(job.lane, job.tries)  # an attempt that an outage spared keeps its number, not its chance
        self.log.append(("answered", job.index, key, now, job.outcome, now - job.launched_s))
        super()._on_answer(event)


def simulated(folder: Path, config: ProviderConfig, policy: Policy, seed: int) -> tuple[Path, Recorded, Any]:
    """A batch of 500 requests of that seed, simulated."""
    path = batch_file(folder / f"{seed}.jsonl", 500, random.Random(seed))
    cols = columns(
        read_workload(Source.open(str(path)), seed=seed),
        reserve_rule="prompt_chars4",
        est_tokens_per_run=7_000,
        charge_rule=config.charge_rule,
        as_of=config.as_of,
        finalize_max_tokens=policy.finalize_max_tokens,
    )
    simulation = Recorded(
        cols, policy.params(), config.params(), seed=seed, finalize_max_tokens=policy.finalize_max_tokens
    )
    return path, simulation, simulation.run()


@pytest.mark.parametrize("settles", [False, True])
def test_replays_a_simulated_run(tmp_path: Path, seed: int, settles: bool) -> None:
    config = ProviderConfig(
        tpm=20_000,
        rpm=90,
        settles=settles,
        charge_rule="prompt_plus_max",
        limit_changes=[{"at_s": 40.0, "factor": 0.6}],
        cotenant={"share": 0.2, "burst_s": 5.0, "period_s": 30.0},
        faults={"error_ratio": 0.05, "drop_ratio": 0.05, "empty_cut_ratio": 1.0},
        latency={"preset": "gpt-4o", "stall_ratio": 0.05, "stall_max_s": 20.0, "stall_min_s": 5.0},
    )
    policy = Policy.preset("paceline").with_(
        tpm_limit=24_000, max_concurrency=30, stagger_seconds=0.0, sync_headers=False
    )
    # Some seeds draw no answer that is cut off: the next ones do.
    for seed in range(seed, seed + 20):  # noqa: B020
        path, simulation, tally = simulated(tmp_path, config, policy, seed)
        if tally.throttled > 5 and tally.finalize_passes > 0:
            break
    else:
        pytest.fail("no scenario draws 429s and finalize passes")

    requests = read(path)
    desk = Desk(config, seed=seed)
    replies: dict[tuple[int, int], Reply] = {}
    names = {prov.OK: "ok", prov.THROTTLED: "throttled", prov.SERVER_ERROR: "server_error", prov.DROPPED: "dropped"}
    for happened, index, key, now, outcome, figure in simulation.log:
        request, place = requests[index], (seed, index, key)
        if happened == "launched":
            body = request.body if key < 100_000 else finalized(request, policy.finalize_max_tokens)
            assert body is not None
            reply = asked(desk, body, now, endpoint=request.sizes.endpoint, index=index, attempt=key)
            replies[index, key] = reply
            assert reply.outcome == names[outcome], place
            if outcome == prov.THROTTLED:
                # "Try again in 0s" counts as not said, here as in the law.
                stated_s = figure if figure > 0.0 else -1.0
                assert parsed(desk, reply).retry_after_s == pytest.approx(stated_s, abs=1e-9), place
        else:
            assert replies[index, key].service_s == pytest.approx(figure, abs=1e-6), place
            desk.ended(replies[index, key], False, now)
    assert len(replies) == tally.attempts
    assert desk.count.charged_tokens == tally.charged_tokens
    assert desk.count.outcomes["ok"] == tally.completed + tally.finalize_passes
    assert desk.count.prompt_tokens + desk.count.output_tokens == tally.used_tokens


def test_answers_are_as_long_as_the_workload_assumes(tmp_path: Path, seed: int) -> None:
    path = batch_file(tmp_path / "batch.jsonl", 150, random.Random(seed))
    workload = read_workload(Source.open(str(path)), seed=seed)
    desk = Desk(PLAIN, seed=seed)
    for request in read(path):
        assert request.body is not None
        reply = asked(desk, request.body, endpoint=request.sizes.endpoint, index=request.index)
        length, cap = int(workload.output_tokens[request.index]), request.sizes.max_tokens * request.sizes.n
        assert reply.written is not None
        assert reply.written.output_tokens == (min(length, cap) if cap > 0 else length), (seed, request.index)
        assert reply.written.cut_off == (0 < cap < length)
        assert reply.written.prompt_tokens == request.sizes.prompt_tokens


# ---------------------------------------------------------------- charges


@pytest.mark.parametrize("rule", ["fixed", "prompt_chars4", "prompt_plus_max", "max_of", "responses", "auto"])
@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, EMBEDDINGS, COMPLETIONS])
def test_charges_by_the_rule(rule: str, endpoint: int) -> None:
    body = {
        CHAT: chat("x" * 400, max_tokens=100, n=2),
        RESPONSES: {"model": "gpt-4o", "input": "x" * 400, "max_output_tokens": 100},
        EMBEDDINGS: {"model": "text-embedding-3-small", "input": ["x" * 400, "y" * 80]},
        COMPLETIONS: {"model": "gpt-3.5-turbo-instruct", "prompt": "x" * 400, "max_tokens": 100},
    }[endpoint]
    desk = Desk(PLAIN.with_(tpm=100_000, charge_rule=rule), fixed_charge=1_234)
    assert asked(desk, body, endpoint=endpoint).outcome == "ok"
    expected = charge_of(rule, sizes_of(endpoint, body), 1_234)
    assert desk.count.charged_tokens == expected
    assert desk.ps.used[prov.TPM] == expected
    if rule == "prompt_plus_max" and endpoint == CHAT:
        assert expected == math.ceil((400 + len("user")) / 4) + 2 * 100


def test_settles_to_what_was_used_unless_the_client_hung_up() -> None:
    body = chat("x" * 400, max_tokens=2_000)
    for hung_up, left in ((False, 50), (True, 2_101)):
        desk = Desk(PLAIN.with_(tpm=100_000, charge_rule="prompt_plus_max", settles=True))
        reply = asked(desk, body, x_paceline_output_tokens="0")
        assert desk.ps.used[prov.TPM] == math.ceil(404 / 4) + 2_000
        desk.ended(reply, hung_up, 0.0)
        sizes = sizes_of(CHAT, body)
        assert desk.ps.used[prov.TPM] == (sizes.prompt_tokens if not hung_up else 2_101)
        assert desk.count.outcomes == ({"hung_up": 1} if hung_up else {"ok": 1})
        assert left  # both figures are below the declared cap's


# ---------------------------------------------------------------- lengths, cuts, chance


def test_the_request_may_state_its_own_length() -> None:
    desk = Desk(PLAIN)
    by_header = asked(desk, chat("one"), x_paceline_output_tokens="321")
    by_metadata = asked(desk, chat("two", metadata={"paceline_output_tokens": "77"}, max_tokens=50))
    assert by_header.written is not None
    assert (by_header.written.output_tokens, by_header.written.cut_off) == (321, False)
    assert by_metadata.written is not None
    assert (by_metadata.written.output_tokens, by_metadata.written.cut_off) == (50, True)
    assert by_metadata.service_s == pytest.approx(0.6 + 0.008 * 50)
    for wrong in ("many", "-1", "1.5", "9" * 10):
        assert asked(desk, chat("three"), x_paceline_output_tokens=wrong).status == 400


def test_the_length_outlives_a_changed_cap(seed: int) -> None:
    """A finalize pass asks the same question with a larger cap: the model still wants to say the same."""
    desk = Desk(PLAIN, seed=seed)
    for i in range(50):
        short = asked(desk, chat(f"question {i}", max_tokens=4)).written
        free = asked(desk, chat(f"question {i}", max_completion_tokens=100_000)).written
        assert short is not None
        assert free is not None
        assert short.output_tokens == min(4, free.output_tokens)
        assert short.key == free.key


def test_a_cut_answer_is_empty_as_often_as_configured(seed: int) -> None:
    ratio, count = 0.3, 2_000
    desk = Desk(PLAIN.with_(faults={"empty_cut_ratio": ratio}), seed=seed)
    empty = 0
    for i in range(count):
        reply = asked(desk, chat("q", max_tokens=10), index=i, x_paceline_output_tokens="500")
        answer = parsed(desk, reply)
        assert answer.cut_off
        assert answer.used_output_tokens == 10
        empty += not answer.has_text
    assert abs(empty - ratio * count) < 5 * math.sqrt(count * ratio * (1 - ratio)), seed


def test_chance_is_keyed_not_streamed(seed: int) -> None:
    config = PLAIN.with_(latency="gpt-4o", faults={"error_ratio": 0.2, "drop_ratio": 0.1})
    order = list(range(200))
    found = []
    for _ in range(2):
        desk = Desk(config, seed=seed)
        replies = {i: asked(desk, chat(f"question {i}")) for i in order}
        found.append({i: (replies[i].outcome, replies[i].service_s) for i in sorted(order)})
        random.Random(seed + 1).shuffle(order)
    assert found[0] == found[1]
    other = Desk(config, seed=seed + 1)
    assert {i: asked(other, chat(f"question {i}")).service_s for i in range(200)} != {
        i: s for i, (_, s) in found[0].items()
    }


def test_another_attempt_draws_anew() -> None:
    desk = Desk(PLAIN.with_(latency="gpt-4o"))
    times = [asked(desk, chat("the same")).service_s for _ in range(5)]
    assert len(set(times)) == 5
    assert desk.count.came_again == 1


def test_lengths_are_log_normal_around_the_assumed_median(seed: int) -> None:
    desk = Desk(PLAIN, seed=seed)
    lengths = []
    for i in range(3_000):
        reply = asked(desk, chat(f"{i}"))
        assert reply.written is not None
        lengths.append(reply.written.output_tokens)
    # Of 3,000 draws with sigma 0.8 the median's own standard error is 1.25 * 0.8 / sqrt(3000) = 1.8 %.
    assert np.median(lengths) == pytest.approx(200, rel=0.1), seed
    assert np.std(np.log(lengths)) == pytest.approx(0.8, rel=0.1), seed
    assert max(lengths) <= TOKENS_MAX


# ---------------------------------------------------------------- 429s, against the printed formula


def refused(config: ProviderConfig, **options: Any) -> tuple[Desk, Reply]:
    """Asks until a refusal comes, all at one instant."""
    desk = Desk(config, **options)
    for i in range(200):
        reply = asked(desk, chat("x" * 4_000, max_tokens=3_000), 100.0, index=i)
        if reply.outcome != "ok":
            return desk, reply
    raise AssertionError("never refused")


@pytest.mark.parametrize(
    ("dimension", "limits", "window_s"),
    [
        ("TPM", {"tpm": 30_000}, 60.0),
        ("RPM", {"tpm": 0, "rpm": 3}, 60.0),
        ("RPD", {"tpm": 0, "rpm": 100, "rpd": 5}, 86_400.0),
        ("TPD", {"tpm": 0, "tpd": 90_000}, 86_400.0),
    ],
)
def test_a_429_prints_what_the_bucket_holds(dimension: str, limits: dict[str, int], window_s: float) -> None:
    config = PLAIN.with_(charge_rule="prompt_plus_max", **limits)
    desk, reply = refused(config)
    answer = parsed(desk, reply)
    assert answer.outcome is Outcome.THROTTLED
    assert (answer.status, answer.error_code) == (429, "rate_limit_exceeded")
    numbers = stated.quoted_numbers(answer.message)
    charge = charge_of("prompt_plus_max", sizes_of(CHAT, chat("x" * 4_000, max_tokens=3_000)), 0)
    assert numbers.dimension == dimension
    assert numbers.limit == limits[dimension.lower()]
    assert numbers.requested == (charge if dimension[0] == "T" else 1)
    # All came at one instant: nothing has drained, so that the figures are whole.
    assert numbers.used == (numbers.limit // numbers.requested) * numbers.requested
    assert answer.retry_after_s == stated.refill_wait_s(numbers.limit, numbers.used, numbers.requested, window_s)
    assert json.loads(reply.body)["error"]["type"] == ("tokens" if dimension[0] == "T" else "requests")
    assert re.search(rf"on (tokens|requests) per (min|day) \({dimension}\): Limit ", answer.message)
    assert [limit.dimension for limit in answer.limits if limit.dimension == dimension] or dimension == "TPD"


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_ways_to_state_a_wait(scale: float) -> None:
    config = PLAIN.with_(tpm=30_000, charge_rule="prompt_plus_max")
    # 7 * 4,001 = 28,007 are used, so that 2,008 are too many: 4.016 s.
    exact_s = stated.refill_wait_s(30_000, 28_007, 4_001, 60.0)
    assert exact_s == 4.016
    found = {}
    for mode in ("absent", "ms", "seconds"):
        desk, reply = refused(config.with_(retry_after=mode), scale=scale)
        extra = dict(reply.extra)
        found[mode] = parsed(desk, reply).retry_after_s
        assert (b"retry-after" in extra) == (mode == "seconds")
        assert (b"try again" in reply.body) == (mode != "absent")
    assert found["absent"] == -1.0
    assert found["ms"] == pytest.approx(math.floor(exact_s / scale * 1000) / 1000)
    assert found["seconds"] == pytest.approx(5.0 / scale)
    desk, reply = refused(config, ms_header=True, scale=scale)
    assert dict(reply.extra)[b"retry-after-ms"] == str(math.floor(exact_s / scale * 1000)).encode()


def test_too_large_quota_and_slow_down() -> None:
    desk = Desk(PLAIN.with_(tpm=1_000, charge_rule="prompt_plus_max"))
    answer = parsed(desk, asked(desk, chat("x", max_tokens=5_000)))
    assert answer.outcome is Outcome.TOO_LARGE
    numbers = stated.quoted_numbers(answer.message)
    assert (numbers.limit, numbers.requested, answer.retry_after_s) == (1_000, 5_002, -1.0)

    desk = Desk(PLAIN.with_(quota_requests=2))
    found = [parsed(desk, asked(desk, chat(str(i)))) for i in range(4)]
    assert [answer.outcome for answer in found] == [Outcome.OK, Outcome.OK, Outcome.QUOTA, Outcome.QUOTA]
    assert found[2].error_code == "insufficient_quota"

    desk = Desk(PLAIN.with_(tpm=2_000_000, ramp_tpm=50_000, charge_rule="prompt_plus_max"))
    outcomes = [parsed(desk, asked(desk, chat("x", max_tokens=9_000), index=i)).outcome for i in range(7)]
    assert outcomes == [Outcome.OK] * 5 + [Outcome.SLOW_DOWN] * 2


# ---------------------------------------------------------------- headers


def test_headers_state_what_the_buckets_hold(seed: int) -> None:
    rng = random.Random(seed)
    config = PLAIN.with_(tpm=90_000, rpm=500, rpd=2_000, charge_rule="prompt_plus_max")
    desk = Desk(config)
    state = prov.ProviderState()
    now = 0.0
    for i in range(300):
        now += rng.expovariate(10.0)
        body = chat("x" * rng.randint(1, 400), max_tokens=rng.randint(1, 400))
        reply = asked(desk, body, now, index=i)
        charge = charge_of("prompt_plus_max", sizes_of(CHAT, body), 0)
        prov.admitted(desk.pp, state, 0, float(charge), now)
        headers = {name.decode(): value.decode() for name, value in desk.headers(reply, i)}
        d = prov.requests_dimension(desk.pp, state)
        for word, dimension, length_s in (
            ("requests", d, 60.0 if d == prov.RPM else 86_400.0),
            ("tokens", prov.TPM, 60.0),
        ):
            limit, used = desk.pp.limit[dimension], state.used[dimension]
            assert float(headers[f"x-ratelimit-limit-{word}"]) == limit
            assert float(headers[f"x-ratelimit-remaining-{word}"]) == max(0, math.floor(limit - used + 1e-6))
            text = headers[f"x-ratelimit-reset-{word}"]
            assert re.fullmatch(r"(\d+h)?(\d+m)?(\d+(\.\d{1,3})?s|\d+ms)", text), text
            assert stated.duration_s(text) == pytest.approx(used / limit * length_s, abs=0.0011), (seed, i, word)
        told = {limit.dimension: limit for limit in parsed(desk, reply).limits}
        assert told["TPM"].remaining == prov.remaining(desk.pp, state, prov.TPM)


def test_counts_are_of_the_admission_or_of_the_answer() -> None:
    """1,000 tokens/s refill; 20,000 are charged at 0 s, 10,000 more at 5 s, and 8,012 used are settled at 10 s."""

    def left(counts: str, settles: bool, used: float = 0.0) -> list[float]:
        config = PLAIN.with_(tpm=60_000, charge_rule="prompt_plus_max", counts=counts, settles=settles)
        desk = Desk(config)
        desk.ps.used[prov.TPM] = used
        headers = {"x_paceline_output_tokens": "12"}
        reply = asked(desk, chat("x" * 31_996, max_tokens=12_000), 0.0, **headers)
        asked(desk, chat("x" * 3_996, max_tokens=9_000), 5.0)
        desk.ended(reply, False, 10.0)
        return [limit.remaining for limit in parsed(desk, reply).limits]

    full = 60_000.0
    assert left("none", False) == left("none", False, full) == left("refusals", True) == []
    assert left("admission", True) == left("admission", False) == [40_000]
    later = 60_000 - (20_000 - 5_000 + 10_000 - 5_000)
    assert left("answer", False) == [later]
    prompt = sizes_of(CHAT, chat("x" * 31_996)).prompt_tokens
    assert left("answer", True) == [later + 20_000 - prompt - 12]
    assert left("refusals", False, full) == left("admission", False, full) == [0]


@pytest.mark.parametrize(
    ("names", "stated"),
    [
        ("api_key", {"x-ratelimit-api_key-limit-tokens": "60000", "x-ratelimit-api_key-remaining-tokens": "40000"}),
        ("api_key", {"x-ratelimit-api_key-limit-requests": "100", "x-ratelimit-api_key-remaining-requests": "99"}),
        ("llm_provider", {"llm_provider-x-ratelimit-limit-tokens": "60000"}),
        ("llm_provider", {"llm_provider-x-ratelimit-remaining-requests": "99"}),
        # The limit that is closest, whichever it is; 20,000 tokens are back after 20 s.
        ("plain", {"x-ratelimit-limit": "60000", "x-ratelimit-remaining": "40000", "x-ratelimit-reset": "20"}),
    ],
)
def test_counts_stand_under_gateways_names(names: str, stated: dict[str, str]) -> None:
    desk = Desk(PLAIN.with_(tpm=60_000, rpm=100, charge_rule="prompt_plus_max", header_names=names))
    reply = asked(desk, chat("x" * 31_996, max_tokens=12_000))
    headers = {name.decode(): value.decode() for name, value in desk.headers(reply, 1)}
    assert headers.items() >= stated.items()
    assert "x-ratelimit-limit-tokens" not in headers


def test_a_refusal_states_a_constant_wait_in_its_header() -> None:
    desk = Desk(PLAIN.with_(rpm=1, retry_after=60.0, window="anchored"))
    asked(desk, chat())
    answer = parsed(desk, asked(desk, chat(), 50.0))
    assert (answer.outcome, answer.retry_after_s) == (Outcome.THROTTLED, 60.0)
    assert asked(desk, chat(), 60.0).outcome == "ok"


def test_no_limit_no_header() -> None:
    desk = Desk(PLAIN)
    assert parsed(desk, asked(desk, chat())).limits == ()


# ---------------------------------------------------------------- what cannot be answered


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"not json",
        b"[1]",
        b"{}",
        b'{"model": 5, "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "gpt-4o"}',
        b'{"model": "gpt-4o", "messages": []}',
        b'{"model": "gpt-4o", "messages": [{"role": "user", "content": "x"}], "max_tokens": -3}',
        b"[" * 100_000,
        b'{"model": "\xff"}',
    ],
)
def test_bad_requests_are_400_and_uncharged(raw: bytes) -> None:
    desk = Desk(PLAIN.with_(tpm=1_000))
    reply = desk.decided(CHAT, {}, raw, 0.0)
    answer = parsed(desk, reply)
    assert (answer.outcome, answer.status) == (Outcome.BAD_REQUEST, 400)
    assert answer.message
    assert desk.ps.used == [0.0] * 8


def test_any_text_survives_the_way_out() -> None:
    desk = Desk(PLAIN)
    model = 'gpt "4o" \\ \u2028 \U0001f600 \ud83d \x07'
    reply = asked(desk, {**chat("x"), "model": model})
    assert reply.written is not None
    assert json.loads(wire.answer_body(reply.written))["model"] == model


def test_a_dropped_answer_is_charged() -> None:
    desk = Desk(PLAIN.with_(tpm=10_000, faults={"drop_ratio": 1.0}))
    reply = asked(desk, chat())
    assert (reply.outcome, reply.way) == ("dropped", DROPPED)
    assert desk.ps.used[prov.TPM] > 0.0
