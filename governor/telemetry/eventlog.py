"""The log of a live run: one line for each launch, wait, 429 and result, as text or as JSON, on standard error.

Prompts, answers and keys are never logged, nor is a provider's message, which may quote any of them.
"""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from governor.model.requests import CAUSES, LANES, Answer, Attempt, Outcome, Request
from governor.model.work import THROTTLES, Job, Observer, PoolState
from governor.telemetry.watch import OutageWatch

Format = Literal["text", "json"]


class EventLog(Observer):
    """Writes the events of one pool. `zero_epoch`: the epoch of the pool's time zero, once it is known."""

    def __init__(self, form: Format, pool: str, stream: TextIO | None = None) -> None:
        self.form = form
        self.pool = pool
        self.stream = stream or sys.stderr
        self.zero_epoch = 0.0
        self._now = 0.0
        self._outage = OutageWatch()

    def began(self, governor: PoolState) -> None:
        self._outage.state = governor

    def launched(self, job: Job, now: float) -> None:
        self._now = now
        assert job.work is not None
        self._line(
            now,
            "launch",
            custom_id=job.work.request.custom_id,
            lane=LANES[job.lane],
            attempt=job.attempt,
            reserved_tokens=int(job.reserve),
        )

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        self._now = attempt.finished_s
        ok = attempt.outcome is Outcome.OK
        event = "throttled" if attempt.outcome in THROTTLES else "answer" if ok else "error"
        waits = {cause: getattr(attempt, f"waited_{cause}_s") for cause in CAUSES[1:]}
        self._line(
            attempt.finished_s,
            event,
            custom_id=attempt.custom_id,
            lane=attempt.lane,
            attempt=attempt.attempt,
            outcome=str(attempt.outcome),
            status=attempt.status,
            code=attempt.error_code,
            took_s=round(attempt.finished_s - attempt.launched_s, 3),
            prompt_tokens=attempt.prompt_tokens,
            output_tokens=attempt.output_tokens,
            retry_after_s=attempt.retry_after_s,
            waited_s={cause: round(wait_s, 3) for cause, wait_s in waits.items() if wait_s >= 0.0005},
            request_id=answer.request_id,
        )
        if self._outage.changed():
            since_s = round(self._outage.since_s, 3)
            self._line(attempt.finished_s, "outage" if since_s >= 0.0 else "back", since_s=since_s)

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        self._now = now
        self._line(now, "lost" if failure else "done", custom_id=request.custom_id, code=failure)

    def deferred(self, cause: int) -> None:
        self._line(self._now, "wait", cause=CAUSES[cause])

    def _line(self, now: float, event: str, **values: Any) -> None:
        """Write one line; absent values ("" or -1) are omitted from the text form and null in the JSON form."""
        if self.form == "json":
            absent = {name: None if value in ("", -1, -1.0) else value for name, value in values.items()}
            at = datetime.fromtimestamp(self.zero_epoch + now, UTC).isoformat(timespec="milliseconds")
            record = {"time": at, "at_s": round(now, 3), "event": event, "pool": self.pool, **absent}
            text = json.dumps(record, separators=(",", ":"))
        else:
            pairs = [f"{name}={_shown(value)}" for name, value in values.items() if value not in ("", -1, -1.0, {})]
            pool = "" if self.pool == "default" else f" pool={self.pool}"
            text = f"{now:10.3f} {event:<9}{pool} {' '.join(pairs)}"
        # As for progress: a log that cannot be written does not end a run.
        with contextlib.suppress(OSError):
            print(text, file=self.stream)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}:{number:g}" for name, number in value.items())
    if isinstance(value, str):
        # An id may hold anything; a line must stay one line.
        plain = value.isprintable() and " " not in value and value
        return value if plain else json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
