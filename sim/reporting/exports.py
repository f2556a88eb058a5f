"""Exports of a simulated run for other tools: attempts as CSV or Parquet, a trace for Perfetto, a picture of the run.

Every file is written atomically (`files`).

The trace is Chrome's Trace Event Format, which Perfetto (ui.perfetto.dev) and chrome://tracing open. One process holds
a lane per place in flight, in which each attempt is one slice named by its outcome; one holds a lane per cause of
waiting, with the waits of the head of the queue; one holds the counters. Perfetto colours a slice by its name, ignoring
digits, so a wait's colour is its cause, and an attempt's its outcome; `cname` does the same for chrome://tracing. Times
are microseconds since the run began.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from governor.forecast.summary import Grant, Summary
from governor.model.errors import BadInput
from governor.model.files import write_atomically
from governor.model.requests import Attempt, Outcome
from sim.base.progress import Progress
from sim.des.engines import Engine, simulated
from sim.experiment.experiment import attempt_rows, case_of
from sim.reporting import series
from sim.scenario.scenario import Scenario

Take = Callable[[Attempt], None]

COLUMNS = Attempt.columns()
# Rows per Parquet row group, which is held in memory while a run is written.
GROUP_ROWS = 50_000
# One run of this many requests takes long enough to show its progress.
LONG_RUN = 50_000
ATTEMPT_SUFFIXES = (".csv", ".parquet")

_IN_FLIGHT, WAITS, COUNTERS = 1, 2, 3
# Reserved colour names of chrome://tracing.
_OUTCOME_COLOURS = {Outcome.OK: "good", Outcome.THROTTLED: "bad", Outcome.SLOW_DOWN: "bad"}
_CAUSE_COLOURS = {
    "concurrency": "thread_state_running",
    "stagger": "thread_state_iowait",
    "tpm": "thread_state_runnable",
    "rpm": "rail_response",
    "day": "rail_animation",
    "hold": "terrible",
    "paused": "grey",
}


# ---------------------------------------------------------------- attempts as a table


@contextlib.contextmanager
def attempts_file(path: str | Path) -> Iterator[Take]:
    """Yield a function that takes one attempt after another; the file appears when the block ends without error.

    CSV or Parquet by the file extension; raise BadInput for any other. The columns are those of `Attempt`; at most one
    row group is held in memory.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in ATTEMPT_SUFFIXES:
        raise BadInput(f"attempts are written as {' or '.join(ATTEMPT_SUFFIXES)}: end the name so", str(path))
    with write_atomically(path) as unfinished, (_csv if suffix == ".csv" else _parquet)(unfinished) as take:
        yield take


def write_attempts(path: str | Path, attempts: Iterable[Attempt]) -> None:
    """Write the attempts as CSV or Parquet, one row each, in their order."""
    with attempts_file(path) as take:
        for attempt in attempts:
            take(attempt)


@contextlib.contextmanager
def _csv(path: Path) -> Iterator[Take]:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        # Numbers as Python writes them: the shortest text that reads back as the same number.
        yield lambda attempt: writer.writerow(attempt.row())


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Take]:
    import pyarrow
    import pyarrow.parquet

    kinds = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string(), Outcome: pyarrow.string()}
    hints = get_type_hints(Attempt)
    schema = pyarrow.schema([(name, kinds[hints[name]]) for name in COLUMNS])
    rows: list[tuple[Any, ...]] = []
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:

        def flush() -> None:
            columns = zip(*rows, strict=True) if rows else ([] for _ in COLUMNS)
            arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
            rows.clear()

        def take(attempt: Attempt) -> None:
            rows.append(attempt.row())
            if len(rows) >= GROUP_ROWS:
                flush()

        yield take
        flush()


# ---------------------------------------------------------------- a trace for Perfetto


def write_chrome_trace(path: str | Path, attempts: Sequence[Attempt], *, title: str = "paceline") -> None:
    """Write the run as a trace that Perfetto opens: see this module's docstring."""
    with write_atomically(path) as unfinished, unfinished.open("w", encoding="utf-8") as stream:
        stream.write('{"displayTimeUnit":"ms","otherData":')
        stream.write(json.dumps({"title": title}))
        stream.write(',"traceEvents":[\n')
        for i, event in enumerate(trace_events(attempts)):
            stream.write(",\n" if i else "")
            stream.write(json.dumps(event, separators=(",", ":"), ensure_ascii=False))
        stream.write("\n]}\n")


def trace_events(attempts: Sequence[Attempt]) -> Iterator[dict[str, Any]]:
    """Yield the trace's events: names of lanes, slices of attempts and of waits, counters."""
    lane = series.lanes(attempts)
    waits = series.head_waits(attempts)
    yield from _names(max(lane, default=-1) + 1, {wait.cause for wait in waits})
    for number, a in zip(lane, attempts, strict=True):
        # Perfetto ignores digits when it picks a colour, so the request's number may be part of the name.
        name = f"{a.outcome.value} {a.request}" + (" finalize" if a.lane == "finalize" else "")
        args = {column: value for column, value in zip(COLUMNS, a.row(), strict=True) if value not in (-1, "")}
        yield _slice(_IN_FLIGHT, number, name, a.launched_s, a.finished_s, args) | {
            "cat": "attempt",
            "cname": _OUTCOME_COLOURS.get(a.outcome, "terrible"),
        }
    for wait in waits:
        args = {"launched_next": wait.attempt.custom_id, "request": wait.attempt.request}
        yield _slice(WAITS, _row_of(wait.cause), wait.cause, wait.start_s, wait.end_s, args) | {
            "cat": "wait",
            "cname": _CAUSE_COLOURS[wait.cause],
        }
    yield from _counter("in flight", "requests", series.in_flight(attempts))
    yield from _counter("charged in the last minute", "tokens", series.charged_per_minute(attempts))


def _row_of(cause: str) -> int:
    return series.HEAD_CAUSES.index(cause)


def _names(lanes: int, causes: set[str]) -> Iterator[dict[str, Any]]:
    """Yield the names and the order of processes and lanes."""
    threads = [(_IN_FLIGHT, number, f"place {number + 1}") for number in range(lanes)]
    threads += [(WAITS, _row_of(cause), cause) for cause in series.HEAD_CAUSES if cause in causes]
    for process, name in (
        (COUNTERS, "totals"),
        (WAITS, "what the head of the queue waits for"),
        (_IN_FLIGHT, "in flight"),
    ):
        meta = {"ph": "M", "pid": process, "tid": 0, "ts": 0}
        yield meta | {"name": "process_name", "args": {"name": name}}
        yield meta | {"name": "process_sort_index", "args": {"sort_index": -process}}
    for process, number, name in threads:
        meta = {"ph": "M", "pid": process, "tid": number + 1, "ts": 0}
        yield meta | {"name": "thread_name", "args": {"name": name}}
        yield meta | {"name": "thread_sort_index", "args": {"sort_index": number}}


def _microseconds(seconds: float) -> int:
    # Whole numbers, so that an end and the next start at one instant stay equal: viewers nest slices that overlap.
    return round(1e6 * seconds)


def _slice(process: int, lane: int, name: str, start_s: float, end_s: float, args: dict[str, Any]) -> dict[str, Any]:
    start = _microseconds(start_s)
    span = {"ts": start, "dur": _microseconds(end_s) - start}
    # Thread ids count from 1: 0 is the idle thread to some viewers.
    return {"ph": "X", "pid": process, "tid": lane + 1, "name": name, **span, "args": args}


def _counter(name: str, unit: str, steps: series.Steps) -> Iterator[dict[str, Any]]:
    for at_s, value in zip(*(column.tolist() for column in steps), strict=True):
        yield {"ph": "C", "pid": COUNTERS, "tid": 0, "name": name, "ts": _microseconds(at_s), "args": {unit: value}}


# ---------------------------------------------------------------- a picture of the run


def write_timeline(path: str | Path, attempts: Sequence[Attempt], grant: Grant, *, title: str = "") -> None:
    """Write the run as a PNG: tokens per minute and limit, requests in flight, launches with 429s, waits by cause."""
    # Importing the drawing library is slow, and only this function needs it.
    from sim.base.style import png_of
    from sim.reporting.figures_time import timeline

    if Path(path).suffix.lower() != ".png":
        raise BadInput("a timeline is written as .png: end the name so", str(path))
    picture = png_of(timeline(attempts, grant, title=title))
    with write_atomically(path) as unfinished:
        unfinished.write_bytes(picture)


# ---------------------------------------------------------------- all exports


def first_run(
    scenario: Scenario, attempts: str | None, timeline: str | None, chrome_trace: str | None, engine: Engine
) -> Summary:
    """Return the first run's `Summary` and write its attempts to the named files."""
    n = len(scenario.workload)
    rows: list[Attempt] = []
    with contextlib.ExitStack() as files, Progress("simulating", n) as bar:
        takes: list[Callable[[Attempt], Any]] = []
        if attempts:
            takes.append(files.enter_context(attempts_file(attempts)))
        if timeline or chrome_trace:
            takes.append(rows.append)
        if bar.shown and n >= LONG_RUN:
            takes.append(lambda attempt: bar.add(attempt.attempt == 1))
        sink = attempt_rows(scenario, lambda attempt: [take(attempt) for take in takes]) if takes else None
        case = case_of(scenario)
        summary = simulated(case, scenario.seed, sink, engine=engine).summary(case.grant)
    if timeline:
        write_timeline(timeline, rows, scenario.grant())
    if chrome_trace:
        write_chrome_trace(chrome_trace, rows)
    return summary
