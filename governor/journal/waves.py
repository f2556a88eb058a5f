"""Waves of the Batch API in the journal: the file, the batch made of it, and the requests that it holds.

A request that a wave holds is `in_flight` until the wave lets go of it: with its answer, or pending again. What a wave
has come to is recorded before the next step is taken, in one transaction with what it means for its requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Double, bindparam, case, delete, insert, select, update

from governor.journal.recorder import Writer
from governor.journal.schema import IN_FLIGHT, PENDING, requests, wave_requests, waves

_OF_WAVE = wave_requests.c.wave == bindparam("b_wave")
_HELD = requests.c.request.in_(select(wave_requests.c.request).where(_OF_WAVE))
_TAKEN = (
    update(requests)
    .where(_HELD)
    .values(
        state=IN_FLIGHT,
        launched_s=bindparam("b_at_s", type_=Double),
        first_launched_s=case(
            (requests.c.first_launched_s < 0.0, bindparam("b_at_s", type_=Double)), else_=requests.c.first_launched_s
        ),
        retry_at_s=-1.0,
    )
)
_RETURNED = update(requests).where(_HELD).values(state=PENDING)
_LET_GO = delete(wave_requests).where(wave_requests.c.request == bindparam("b_request"))
_EMPTIED = delete(wave_requests).where(_OF_WAVE)


class WaveRow(NamedTuple):
    """One wave. Times: seconds since the run began; `*_epoch_s`: the provider's stamps, since 1970; -1 = not yet.

    `tokens`: of its input, as estimated; `real_tokens`: as the provider states them, -1 = it does not. `stage`: see
    `governor.batchapi.waves.WaveStage`; `status`, `total`, `completed`, `failed`: the provider's. `files_read`: of its
    error and its output file, in this order. `message`: why it failed.
    """

    wave: int
    pool: str
    model: str
    url: str
    requests: int
    tokens: float
    bytes: int
    stage: str
    file_id: str = ""
    batch_id: str = ""
    output_file_id: str = ""
    error_file_id: str = ""
    status: str = ""
    total: int = 0
    completed: int = 0
    failed: int = 0
    real_tokens: int = -1
    files_read: int = 0
    planned_s: float = -1.0
    submitted_s: float = -1.0
    ended_s: float = -1.0
    created_epoch_s: float = -1.0
    ended_epoch_s: float = -1.0
    message: str = ""


class WaveRecorder:
    """Records the waves of one pool. Reports are durable once the journal is flushed."""

    def __init__(self, writer: Writer, pool: str) -> None:
        self._writer = writer
        self.pool = pool

    def planned(self, wave: WaveRow, numbers: Sequence[int]) -> None:
        """A wave holds these requests from now on."""
        self._report(insert(waves), [wave._asdict()])
        self._report(insert(wave_requests), [{"request": number, "wave": wave.wave} for number in numbers])
        self._report(_TAKEN, [{"b_wave": wave.wave, "b_at_s": wave.planned_s}])

    def changed(self, wave: int, **values: Any) -> None:
        """A wave has come further. `values`: by the names of `WaveRow`."""
        self._report(update(waves).where(waves.c.wave == wave).values(**values), [{}])

    def let_go(self, numbers: Iterable[int]) -> None:
        """Their wave does not hold these requests any more; what has become of them is reported to the recorder."""
        self._report(_LET_GO, [{"b_request": number} for number in numbers])

    def returned(self, wave: int) -> None:
        """All requests that a wave still holds are pending again, as if they had not been in it."""
        self._report(_RETURNED, [{"b_wave": wave}])
        self._report(_EMPTIED, [{"b_wave": wave}])

    def _report(self, statement: Any, rows: list[dict[str, Any]]) -> None:
        if rows:
            self._writer.batch.waves.append((statement, rows))
            self._writer.touched()
