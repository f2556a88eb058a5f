"""What the tests of the journal share: requests whose answers are known, and a run that reports to a journal.

Answers are functions of the request's number, so whoever reads one back knows what it must be.
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from governor.journal.journal import Journal
from governor.journal.recorder import FullRecorder, Recorder
from governor.law import FINALIZE, MAIN, Params, State
from governor.model.estimate import sizes_of
from governor.model.policy import Policy
from governor.model.requests import ACCOUNT_REFUSES, CHAT, Answer, Attempt, Limit, Outcome, Request, url_of
from governor.model.work import Job, Work
from governor.scheduler.driver import Governor

EPOCH_S = 1_700_000_000.0
BACKOFF_S = 2.0
# Nothing binds but the number in flight, and refused requests come back at once.
FREE = Policy(
    max_concurrency=8,
    stagger_seconds=0.0,
    tpm_limit=10**9,
    tpm_headroom=0.0,
    tpm_window="bucket",
    backoff_base_seconds=0.01,
    jitter_ratio=0.0,
    backoff_keeps_permit=False,
)


def work(index: int, *, pool: str = "default", cap: int = 100, text: str = "", custom_id: str = "") -> Work:
    """A request whose body declares that cap, -1 = none."""
    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": text or f"question {index}"}]}
    if cap >= 0:
        body["max_tokens"] = cap
    request = Request(index, custom_id or f"q-{index}", url_of(CHAT), "m", body, sizes_of(CHAT, body), pool)
    return Work(request, 500.0 + index % 3, float(cap), 600.0, 450, 550)


def works(count: int, **rest: Any) -> Iterator[Work]:
    return (work(index, **rest) for index in range(count))


def answer(index: int, text: str = "") -> Answer:
    """The right answer to that request."""
    body = {
        "id": f"chat-{index}",
        "choices": [{"message": {"content": text or f"answer {index}"}}],
        "usage": {"prompt_tokens": 10 + index, "completion_tokens": 7},
    }
    limits = (Limit("TPM", 30_000.0, 29_000.5), Limit("RPM", 500.0, 499.0))
    return Answer(
        Outcome.OK,
        200,
        used_prompt_tokens=10 + index,
        used_output_tokens=7,
        has_text=True,
        limits=limits,
        request_id=f"req_{index}",
        body=body,
    )


def refusal(
    outcome: Outcome = Outcome.THROTTLED,
    status: int = 429,
    message: str = "slow down, please",
    retry_after_s: float = -1.0,
) -> Answer:
    body = {"error": {"message": message, "code": "rate_limit_exceeded"}}
    return Answer(outcome, status, "rate_limit_exceeded", message, retry_after_s, request_id="req_no", body=body)


def created(where: Any, count: int | Iterable[Work] = 0, *, fingerprint: str = "print", seed: int = 1) -> Journal:
    """A journal that holds so many requests, or those, ready to begin."""
    journal = Journal.create(where, fingerprint=fingerprint, seed=seed, epoch_s=EPOCH_S)
    journal.ingest(works(count) if isinstance(count, int) else count)
    return journal


def begun(where: Any, count: int | Iterable[Work] = 0, *, at_s: float = 0.0) -> tuple[Journal, Recorder]:
    """The same, begun with one pool."""
    journal = created(where, count)
    return journal, journal.begin({"default": FREE}, at_s).recorders["default"]


def recorded(where: Any, count: int) -> tuple[Journal, FullRecorder]:
    """The same with every call of the law."""
    journal = created(where, count)
    recorder = journal.begin({"default": FREE}, 0.0, records=True).recorders["default"]
    assert isinstance(recorder, FullRecorder)
    return journal, recorder


# ---------------------------------------------------------------- reports by hand


@dataclass
class PoolAt:
    """A pool's settings and state at a moment, as a recorder reads them of a governor."""

    p: Params
    s: State
    at_s: float
    late_s: float = -1.0

    def now(self) -> float:
        return self.at_s


def pool_of(policy: Policy, at_s: float) -> PoolAt:
    """A fresh one."""
    return PoolAt(policy.params(), State(), at_s)


def job(work: Work, *, attempt: int = 1, lane: int = MAIN, launched_s: float = 1.0, first_s: float = -1.0) -> Job:
    """A job as a driver reports it when it launches it."""
    made = Job(work, work.request.index, work.reserve, work.expected, work.charge, 0.0)
    made.attempt, made.lane, made.launched_s = attempt, lane, launched_s
    made.first_launched_s = launched_s if first_s < 0.0 else first_s
    return made


def attempt(done: Job, came: Answer, finished_s: float, failure: str = "") -> Attempt:
    """The row of an attempt, with a different number in every column that holds one."""
    assert done.work is not None
    request = done.work.request
    return Attempt(
        request=request.index,
        custom_id=request.custom_id,
        pool=request.pool,
        model=request.model,
        url=request.url,
        lane=("main", "finalize")[done.lane],
        attempt=done.attempt,
        submitted_s=0.1,
        eligible_s=0.25,
        launched_s=done.launched_s,
        finished_s=finished_s,
        reserved_tokens=501,
        charged_tokens=450,
        prompt_tokens=came.used_prompt_tokens,
        output_tokens=came.used_output_tokens,
        outcome=came.outcome,
        status=came.status,
        error_code=failure or came.error_code,
        retry_after_s=came.retry_after_s,
        waited_concurrency_s=1 / 3,
        waited_stagger_s=0.2,
        waited_tpm_s=0.3,
        waited_rpm_s=0.4,
        waited_day_s=0.5,
        waited_hold_s=0.6,
        waited_paused_s=0.7,
        waited_backoff_s=math.pi,
    )


def ends(recorder: Recorder, done: Job, came: Answer, at_s: float, failure: str = "") -> None:
    """The job's attempt is over, and with it the request."""
    assert done.work is not None
    recorder.attempted(attempt(done, came, at_s, failure), came, failure)
    recorder.ended(done.work.request, failure, came, at_s)


def again(recorder: Recorder, done: Job, came: Answer, at_s: float) -> None:
    """The attempt is over, its request is not: it backs off, unless it was answered or the account is at fault."""
    row = attempt(done, came, at_s)
    recorder.attempted(row, came, "")
    if came.outcome in ACCOUNT_REFUSES:
        recorder.suspended(row, came)
    elif came.outcome is not Outcome.OK:
        recorder.backed_off(row, came, at_s + BACKOFF_S, row.attempt + 1)


def finalizing(done: Work, launched_s: float, first_s: float) -> Job:
    return job(done, lane=FINALIZE, launched_s=launched_s, first_s=first_s)


# ---------------------------------------------------------------- a whole run


def run_through(journal: Journal, recorder: Recorder, send: Any, *, policy: Policy = FREE, at_s: float = 0.0) -> float:
    """Runs what is pending to its end with the real driver; returns when that was."""

    async def main() -> float:
        governor = Governor(policy.params(), seed=1, observer=recorder, state=recorder.state, start_s=at_s)
        pending = journal.pending(longest_first=policy.launch_order == "longest_first")
        why = await governor.run((each.work for each in pending), send)
        assert not why, why
        await journal.flushed()
        return governor.now()

    return asyncio.run(main())


def rows(path: Path, query: str, *values: Any) -> list[Any]:
    """What another process sees: only what is committed."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query, values).fetchall()
    finally:
        connection.close()


def bytes_of(path: Path) -> bytes:
    """Everything that the journal has on the disk."""
    return b"".join(file.read_bytes() for file in sorted(path.parent.iterdir()))
