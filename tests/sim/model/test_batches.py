"""The Batch API as a model: timetables, without HTTP and without waiting."""

from __future__ import annotations

import json
import math
import random
import statistics
from typing import Any

import pytest

from governor.batchapi.limits import FILE_BYTES
from governor.model.errors import BadSetting
from sim.base.arguments import checked
from sim.model import batches as model
from sim.model.batches import (
    CANCELLED,
    CANCELLING,
    CANCELLING_S,
    COMPLETED,
    ENDED,
    EXPIRED,
    EXPIRES_S,
    FAILED,
    FINALIZING,
    FINALIZING_S,
    IN_PROGRESS,
    VALIDATING,
    VALIDATING_S,
    Batch,
    BatchApi,
    BatchQueue,
    check_file,
)
from sim.model.provider_config import ProviderConfig
from tests.live import line

CHAT = "/v1/chat/completions"


def queue_of(*, queue_tokens: int = 0, turnaround_s: tuple[float, float] = (100.0, 100.0), seed: int = 0) -> BatchQueue:
    return BatchQueue(BatchApi(queue_tokens=queue_tokens, turnaround_s=turnaround_s), seed, "org-test")


def submitted(queue: BatchQueue, now: float, *, key: int = 1, tokens: int = 10, lines: int = 50) -> Batch:
    return queue.submit(key, model="gpt-4o", tokens=tokens, lines=lines, now=now)


def history(queue: BatchQueue, batch: Batch) -> list[tuple[float, str]]:
    """The batch's states, each at the moment that the queue says is next."""
    seen = [(batch.entered[batch.status], batch.status)]
    while (at := queue.next_at()) < math.inf:
        queue.advance(at)
        if batch.status != seen[-1][1]:
            seen.append((at, batch.status))
    return seen


# ---------------------------------------------------------------- states


def test_a_batch_goes_through_its_states_at_their_times() -> None:
    queue = queue_of()
    batch = submitted(queue, 7.0)
    assert history(queue, batch) == [
        (7.0, VALIDATING),
        (7.0 + VALIDATING_S, IN_PROGRESS),
        (107.0 - FINALIZING_S, FINALIZING),
        (107.0, COMPLETED),
    ]
    assert sorted(batch.order) == list(range(50))
    assert batch.order != list(range(50)), "answers come in an order of their own"
    counts = [batch.answered(at) for at in (7.0, 10.0, 40.0, 70.0, 105.0, 1e9)]
    assert counts == sorted(counts)
    assert (counts[0], counts[1], counts[-2:]) == (0, 0, [50, 50])
    assert 0 < counts[2] < counts[3] < 50


def test_one_late_look_sees_what_many_looks_see() -> None:
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    often, once = (queue_of(queue_tokens=25, turnaround_s=(50.0, 400.0)) for _ in range(2))
    arrivals = sorted(rng.uniform(0.0, 600.0) for _ in range(40))
    both = []
    for key, at in enumerate(arrivals):
        for _ in range(3):
            often.advance(rng.uniform(arrivals[key - 1] if key else 0.0, at))
        both.append([submitted(queue, at, key=key, tokens=10) for queue in (often, once)])
    for queue in (often, once):
        queue.advance(1e6)
    assert [a.entered for a, _ in both] == [b.entered for _, b in both], f"seed {seed}"
    assert {batch.status for batch, _ in both} == {COMPLETED, FAILED}, f"seed {seed}"


def test_one_that_takes_longer_than_a_day_expires_with_what_is_answered() -> None:
    queue = queue_of(turnaround_s=(2 * EXPIRES_S, 2 * EXPIRES_S))
    batch = submitted(queue, 0.0, lines=200)
    assert history(queue, batch)[-1] == (EXPIRES_S, EXPIRED)
    # Half the time in progress is over: the share is binomial, here within 5 standard deviations.
    assert abs(batch.answered(1e9) - 100) < 5 * math.sqrt(200 / 4)


@pytest.mark.parametrize(("cancel_at", "some"), [(1.0, False), (500.0, True)])
def test_a_cancelled_batch_keeps_what_is_answered_or_in_flight(cancel_at: float, some: bool) -> None:
    queue = queue_of(queue_tokens=10, turnaround_s=(1_000.0, 1_000.0))
    batch = submitted(queue, 0.0)
    assert queue.cancel(batch, cancel_at)
    answered = batch.answered(cancel_at)
    assert (0 < answered < 50) is some
    assert queue.cancel(batch, cancel_at + 1.0), "twice is once"
    assert history(queue, batch) == [(cancel_at, CANCELLING), (cancel_at + CANCELLING_S, CANCELLED)]
    in_flight = sum(cancel_at < at <= cancel_at + CANCELLING_S for at in batch.due_at)
    assert batch.answered(1e9) == (answered + in_flight if some else 0)
    assert not queue.cancel(batch, 1e9)
    assert queue.enqueued["gpt-4o"] == 0


def test_what_is_over_or_nearly_cannot_be_cancelled() -> None:
    queue = queue_of()
    batch = submitted(queue, 0.0)
    assert not queue.cancel(batch, 99.0)
    assert batch.status == FINALIZING
    assert not queue.cancel(batch, 100.0)
    assert batch.status == COMPLETED


# ---------------------------------------------------------------- queue and turnaround


def test_the_queue_holds_a_models_tokens_from_validation_to_the_end() -> None:
    queue = queue_of(queue_tokens=25)
    first, second = submitted(queue, 0.0), submitted(queue, 1.0, key=2, tokens=15)
    third = submitted(queue, 2.0, key=3, tokens=1)
    other = queue.submit(4, model="gpt-4.1", tokens=25, lines=1, now=2.0)
    queue.advance(6.0)
    assert [batch.status for batch in (first, second, third, other)] == [IN_PROGRESS, IN_PROGRESS, FAILED, IN_PROGRESS]
    (problem,) = third.problems
    assert problem.code == "token_limit_exceeded"
    assert problem.message == (
        "Enqueued token limit reached for gpt-4o in organization org-test. Limit: 25 enqueued tokens. "
        "Please try again once some in_progress batches have been completed."
    )
    # The first one ends at 100: a batch that is validated in that very moment finds its tokens free.
    late = submitted(queue, 100.0 - VALIDATING_S, key=5, tokens=10)
    queue.advance(100.0)
    assert (first.status, late.status) == (COMPLETED, IN_PROGRESS)
    queue.advance(1e6)
    assert queue.enqueued == {"gpt-4o": 0, "gpt-4.1": 0}
    assert queue.enqueued_max == {"gpt-4o": 25, "gpt-4.1": 25}


def test_the_queue_is_never_above_its_limit_and_empty_in_the_end() -> None:
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    queue, at, batches = queue_of(queue_tokens=100, turnaround_s=(60.0, 86_400.0), seed=seed), 0.0, []
    for key in range(300):
        at += rng.expovariate(1 / 40.0)
        batches.append(submitted(queue, at, key=key, tokens=rng.randint(1, 60), lines=2))
        if rng.random() < 0.2:
            queue.cancel(rng.choice(batches), at)
        held = sum(batch.tokens for batch in batches if IN_PROGRESS in batch.entered and batch.status not in ENDED)
        assert queue.enqueued["gpt-4o"] == held <= 100, f"seed {seed}"
    queue.advance(1e9)
    assert queue.enqueued["gpt-4o"] == 0, f"seed {seed}"
    assert {COMPLETED, FAILED} <= {batch.status for batch in batches} <= set(ENDED), f"seed {seed}"


def test_turnarounds_have_the_stated_quantiles_and_depend_on_seed_and_key_alone() -> None:
    def drawn(seed: int) -> list[float]:
        queue = queue_of(turnaround_s=(1_000.0, 5_000.0), seed=seed)
        return [submitted(queue, 0.0, key=key, lines=0).turnaround_s for key in range(500)]

    times = drawn(1)
    # Shares below the stated quantiles, within 5 standard deviations of 500 draws.
    for p, quantile in ((0.5, 1_000.0), (0.95, 5_000.0)):
        share = statistics.fmean(each <= quantile for each in times)
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / 500)
    assert times == drawn(1)
    assert times != drawn(2)


def test_terms_come_from_a_providers_file() -> None:
    data = {"batch_api": {"queue_tokens": 90_000, "turnaround_s": [600, 3_600]}}
    assert checked(ProviderConfig, data, "provider").batch_api == BatchApi(
        queue_tokens=90_000, turnaround_s=(600.0, 3_600.0)
    )
    with pytest.raises(BadSetting, match=r"provider\.batch_api: turnaround_s is P50 and P95: 60 is below 600"):
        checked(ProviderConfig, {"batch_api": {"turnaround_s": [600, 60]}}, "provider")
    with pytest.raises(BadSetting, match=r"provider\.batch_api\.queue_tokens=-1: must be at least 0"):
        checked(ProviderConfig, {"batch_api": {"queue_tokens": -1}}, "provider")


# ---------------------------------------------------------------- the input file


def raw_of(*records: Any) -> bytes:
    return b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in records)


def test_a_good_file_has_no_problems() -> None:
    raw = raw_of(line("a"), b"", line("b")) + json.dumps(line("c")).encode()
    lines, problems = check_file(raw, CHAT)
    assert [each.custom_id for each in lines] == ["a", "b", "c"]
    assert problems == []


@pytest.mark.parametrize(
    ("second", "code", "param"),
    [
        (b'{"custom_id": ', "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (b"\xff", "invalid_json_line", None),
        (b"\xef\xbb\xbf" + json.dumps(line("b")).encode(), "invalid_json_line", None),
        (line("a"), "duplicate_custom_id", "custom_id"),
        (line("b", model="gpt-4.1"), "mismatched_model", "body.model"),
        ({**line("b"), "url": "/v1/responses"}, "invalid_url", "url"),
        ({**line("b"), "method": "GET"}, "invalid_method", "method"),
        ({**line("b"), "body": {"messages": []}}, "missing_required_parameter", "body.model"),
        ({**line("b"), "body": 5}, "invalid_type", "body"),
        ({"custom_id": "b", "method": "POST", "url": CHAT}, "missing_required_parameter", "body"),
        ({**line("b"), "custom_id": ""}, "invalid_type", "custom_id"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_number(second: Any, code: str, param: str | None) -> None:
    _, problems = check_file(raw_of(line("a"), second, line("c")), CHAT)
    assert [(each.code, each.line, each.param) for each in problems] == [(code, 2, param)]


def test_files_that_are_empty_or_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [each.code for each in check_file(b"\n \n", CHAT)[1]] == ["empty_file"]
    assert (model.FILE_LINES, FILE_BYTES) == (50_000, 200 * 10**6)
    monkeypatch.setattr(model, "FILE_LINES", 3)
    raw = raw_of(*(line(f"q-{i}") for i in range(3)))
    assert check_file(raw, CHAT)[1] == []
    assert [each.code for each in check_file(raw + raw_of(line("q-3")), CHAT)[1]] == ["too_many_tasks"]
    assert len(check_file(b"{\n" * 1_000, CHAT)[1]) == model.PROBLEMS_MAX
