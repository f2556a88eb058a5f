"""What a run by the Batch API looks like: its progress, and how long the rest will take at the turnaround assumed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from governor.batchapi.limits import COMPLETED, EXPIRES_S, FILE_LINES, TURNAROUND_S, usable_tokens
from governor.batchapi.waves import Waves, WaveStage
from governor.journal.records import Records
from governor.journal.waves import WaveRow
from governor.model.words import duration, percent, plural


@dataclass(frozen=True, slots=True)
class Foreseen:
    """How long waves take, one after the other. `measured`: from so many ended batches, 0 = assumed."""

    finish_s: float
    waves: int
    turnaround_s: float
    measured: int

    def text(self) -> str:
        """Return the forecast in words, with what it rests on."""
        if not self.waves:
            return "nothing"
        how = f"measured on {plural(self.measured, 'batch')}" if self.measured else "assumed: no batch has ended yet"
        return f"about {duration(self.finish_s)} ({plural(self.waves, 'wave')} of {duration(self.turnaround_s)}, {how})"


def turnaround_s(rows: Iterable[WaveRow]) -> tuple[float, int]:
    """Return the mean turnaround of the batches that were completed, by the provider's stamps, and their number.

    The assumed median and 0 if there are none.
    """
    done = [r.ended_epoch_s - r.created_epoch_s for r in rows if r.status == COMPLETED and r.created_epoch_s >= 0.0]
    return (math.fsum(done) / len(done), len(done)) if done else (TURNAROUND_S[0], 0)


def foreseen(left: Iterable[tuple[str, int, float]], queue_tokens: int, rows: Sequence[WaveRow] = ()) -> Foreseen:
    """Return the forecast for (model, requests, input tokens): models have queues of their own, and go side by side."""
    usable = usable_tokens(queue_tokens)
    fills: dict[str, float] = {}
    files: dict[str, int] = {}
    for model, requests, tokens in left:
        if not requests:
            continue
        fills[model] = fills.get(model, 0.0) + tokens / usable
        files[model] = files.get(model, 0) + math.ceil(requests / FILE_LINES)
    most = max((math.ceil(round(fill, 9)) if queue_tokens else 1 for fill in fills.values()), default=0)
    each_s, measured = turnaround_s(rows)
    waves = sum(max(math.ceil(round(fills[model], 9)), files[model]) for model in fills)
    return Foreseen(most * min(each_s, EXPIRES_S), waves, each_s, measured)


def left_of(waves: Waves) -> list[tuple[str, int, float]]:
    """Return (model, requests, input tokens) of what a pool has not been answered yet, by wave and lane."""
    left = [
        (wave.lane.model, wave.requests, wave.tokens)
        for wave in waves.open.values()
        if wave.stage not in (WaveStage.ENDED, WaveStage.COLLECTED)
    ]
    return left + [(lane.model, requests, tokens) for lane, requests, tokens in waves.waiting()]


def ahead_of(journal: Records, pool: str, queue_tokens: int) -> Foreseen:
    """Return the forecast of what is left of a pool, according to its journal."""
    rows = journal.waves(pool)
    left = [(row.model, row.requests, row.tokens) for row in rows if row.ended_s < 0.0]
    left += [(model, requests, float(tokens)) for model, _, _, requests, tokens in journal.lanes(pool)]
    return foreseen(left, queue_tokens, rows)


@dataclass(frozen=True, slots=True)
class WaveProgress:
    """The progress of a run by the Batch API.

    `ended`, `failed`: requests of the input. `open`, `begun`: waves at the provider, and those in progress there, with
    `answered` of `of` requests by the provider's count. `enqueued`: estimated tokens in the queue, of `limit` (0 =
    unknown). `waiting`: requests in no wave.
    """

    total: int
    ended: int
    failed: int
    open: int
    begun: int
    answered: int
    of: int
    enqueued: float
    limit: int
    waiting: int
    rest: str
    stopped: str = ""

    def line(self) -> str:
        """Return one line for a log."""
        share = self.ended / self.total if self.total else 1.0
        parts = [f"{self.ended:,} of {self.total:,} done ({percent(share)})"]
        parts += [f"{self.failed:,} failed"] if self.failed else []
        return ", ".join([*parts, *self._state()])

    def short(self) -> str:
        """Return the progress for a bar, the most important first."""
        share = self.ended / self.total if self.total else 1.0
        failed = f", {self.failed:,} failed" if self.failed else ""
        return ", ".join([f"{self.ended:,}/{self.total:,} ({percent(share)}{failed})", *self._state()])

    def _state(self) -> list[str]:
        parts = [f"{plural(self.open, 'wave')} at the provider"]
        if self.begun:
            parts[0] += f" ({self.answered:,} of {self.of:,} answered)"
        of = f" of {self.limit:,}" if self.limit else ""
        parts.append(f"queue {self.enqueued:,.0f}{of} tokens")
        parts += [f"{self.waiting:,} waiting"] if self.waiting else []
        return [*parts, "stopping" if self.stopped else f"{self.rest} left"]


def progress(
    every: Sequence[Waves], foreseen_: Foreseen, *, total: int, ended: int, failed: int, stopped: str
) -> WaveProgress:
    """Return the progress of all pools together."""
    waves = [wave for each in every for wave in each.open.values() if wave.stage is WaveStage.SUBMITTED]
    begun = [wave for wave in waves if wave.total]
    models = [(each, model) for each in every for model in each.ledgers]
    limits = [each.ledgers[model].limit for each, model in models]
    return WaveProgress(
        total=total,
        ended=ended,
        failed=failed,
        open=len(waves),
        begun=len(begun),
        answered=sum(wave.completed + wave.failed for wave in begun),
        of=sum(wave.total for wave in begun),
        enqueued=sum(each.enqueued(model) for each, model in models),
        limit=sum(limits) if all(limits) else 0,
        waiting=sum(requests for each in every for _, requests, _ in each.waiting()),
        rest=foreseen_.text(),
        stopped=stopped,
    )
