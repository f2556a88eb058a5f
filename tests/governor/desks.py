"""What tests of the live driver share: somebody to send to, somebody who listens, and a batch run to its end.

All of it lives on the virtual loop: answers come at exactly the time that a test's script says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from governor import law
from governor.model.requests import CHAT, Answer, Attempt, Outcome, Request, Sizes, url_of
from governor.model.work import Job, Observer, Work
from governor.scheduler.driver import Governor
from tests.governor.laws import params
from tests.virtual_loop import VirtualLoop, run_virtual

SIZES = Sizes(CHAT, 10, 40, 0, 1, 0, 0, 1, 10)
OK = Answer(Outcome.OK, 200, used_prompt_tokens=10, used_output_tokens=5, has_text=True)
CUT = Answer(Outcome.OK, 200, used_prompt_tokens=10, used_output_tokens=10, cut_off=True)
THROTTLED = Answer(Outcome.THROTTLED, 429)
BROKEN = Answer(Outcome.SERVER_ERROR, 500)
REFUSAL_S = 0.05


def quiet(**changes: Any) -> law.Params:
    """Settings of which none binds and none is drawn, but for those that are named."""
    base: dict[str, Any] = {"max_concurrency": 100, "stagger_s": 0.0, "jitter_ratio": 0.0, "tpm": 0, "headroom": 0.0}
    return params(**(base | {"backoff_keeps_permit": 0} | changes))


def work(index: int, reserve: float = 100.0, **rest: Any) -> Work:
    return Work(Request(index, f"q-{index}", url_of(CHAT), "m", None, SIZES), reserve, charge=80, **rest)


def works(count: int, reserve: float = 100.0) -> Iterator[Work]:
    return (work(i, reserve) for i in range(count))


class Desk:
    """Somebody to send to. `script`: how each request's attempts are answered, in turn; else OK after `service_s`."""

    def __init__(self, service_s: float = 1.0, script: dict[int, list[tuple[float, Answer]]] | None = None) -> None:
        self.service_s = service_s
        self.script = {index: list(parts) for index, parts in (script or {}).items()}
        self.sent: list[tuple[float, int, int]] = []
        self.timeouts: list[float] = []
        self.cancelled: list[int] = []

    async def send(self, job: Job, timeout_s: float) -> Answer:
        self.sent.append((asyncio.get_running_loop().time(), job.index, job.attempt))
        self.timeouts.append(timeout_s)
        parts = self.script.get(job.index, [])
        after_s, answer = parts.pop(0) if parts else (self.service_s, OK)
        try:
            await asyncio.sleep(after_s)
        except asyncio.CancelledError:
            self.cancelled.append(job.index)
            raise
        return answer

    def at(self, index: int) -> list[float]:
        """When that request was sent."""
        return [when for when, i, _ in self.sent if i == index]


class Log(Observer):
    """What an observer was told, as lines."""

    def __init__(self) -> None:
        self.rows: list[Attempt] = []
        self.ends: list[tuple[int, str, float]] = []
        self.deferrals: list[int] = []
        self.launches: list[tuple[float, int]] = []
        self.decisions: list[tuple[str, tuple[Any, ...], Any]] = []

    def launched(self, job: Job, now: float) -> None:
        self.launches.append((now, job.index))

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        self.rows.append(attempt)

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        self.ends.append((request.index, failure, now))

    def deferred(self, cause: int) -> None:
        self.deferrals.append(cause)

    def decided(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        self.decisions.append((name, arguments, result))


class Ran:
    """A batch that was run to its end."""

    def __init__(self, p: law.Params, desk: Desk, source: Iterator[Work], **rest: Any) -> None:
        self.desk = desk
        self.log = rest.pop("log", None) or Log()
        self.steps: list[tuple[float, Callable[[Governor], Any]]] = rest.pop("steps", [])
        self.source = source
        self.rest = rest
        self.p = p
        self.over_s = -1.0
        self.why = run_virtual(self._main())

    async def _main(self) -> str:
        self.governor = Governor(self.p, observer=self.log)
        loop = asyncio.get_running_loop()
        for at, step in self.steps:
            loop.call_at(at, step, self.governor)
        why = await self.governor.run(self.source, self.desk.send, **self.rest)
        self.over_s = loop.time()
        nothing_held(self.governor)
        return why

    @property
    def sent(self) -> list[tuple[float, int]]:
        return [(round(at, 9), index) for at, index, _ in self.desk.sent]


def nothing_held(governor: Governor) -> None:
    """No permit, no finalize pass, no timer and no task is left behind."""
    assert governor.in_flight == 0
    assert governor.s.finalize_open == 0
    assert governor.s.alone == 0
    loop = governor.loop
    assert isinstance(loop, VirtualLoop)
    assert [when for when, callback in loop.timers() if callback == governor._ring] == []
    assert asyncio.all_tasks() == {asyncio.current_task()}
