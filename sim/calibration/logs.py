"""Read logs of real requests, one row per attempt, into `Observed`, with the checks that need the whole log.

A fit of wrong times would be wrong without any sign. So a row that ends before it begins is rejected, and so is a log
whose durations cannot all be in one unit. `sim/scenario/columns.py` recognises columns; `sim/scenario/table.py` reads
rows. Exports of spans and batch output consist of such rows too.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from governor import law
from governor.model.errors import BadInput, quoted
from sim.calibration.observed import STATED, Observed, observed_of
from sim.des.driver import Simulation
from sim.des.jobs import Job
from sim.des.run import CHARGED
from sim.experiment.experiment import OUTCOMES, case_of
from sim.model import provider as prov
from sim.model.workload import Real
from sim.scenario.columns import ANSWERED, MOMENTS, UNITS
from sim.scenario.readers import TRACES, Source
from sim.scenario.scenario import Scenario
from sim.scenario.table import Table, read_table

# No answer takes longer: the longest time-out in use is 600 s. Larger values are in some other unit.
LATENCY_MAX_S = 900.0
# Nor this many times the median of its log; seconds among milliseconds lie below the inverse.
LATENCY_RATIO_MAX = 500.0
# A column of milliseconds with seconds among them: so far below the others per token, and as many rows that grow with
# the answers' lengths. (What a cache answered is as quick, whatever its length.)
APART_RATIO = 100.0
APART_ROWS = 5
APART_CORRELATION = 0.5


def of_log(source: Source, chosen: Mapping[str, str]) -> Observed:
    """Return the attempts of a log. Raise BadInput or BadSetting, in one line, for the first error."""
    try:
        table = read_table(source, TRACES[source.kind()], chosen)
    except (EOFError, zlib.error) as error:
        raise BadInput(f"gzip that cannot be read: {error}", source.name) from None
    rows: dict[str, Any] = {**table.numbers, **table.texts}
    rows |= _seconds(table)
    _check_order(table, rows)
    for role in ("latency", "first_token"):
        if role in rows:
            _check_durations(table, role, rows[role])
    if "latency" in rows and "output" in rows:
        _check_seconds_among_ms(table, rows["output"], rows["latency"])
    if table.has_kinds or (table.kinds != ANSWERED).any():
        rows["kind"] = table.kinds
    if "lane" in rows:
        rows["finalize"] = [float(lane == "finalize") for lane in rows["lane"]]
    notes = (*table.notes(source.label), *_notes(source, table))
    return observed_of(source.label, rows, source=source.name, notes=notes)


def _notes(source: Source, table: Table) -> list[str]:
    notes = []
    cached, prompt = (np.maximum(table.numbers.get(role, np.zeros(1)), 0.0).sum() for role in ("cached", "prompt"))
    if cached > 0.0:
        share = f"{cached / max(prompt, cached):.0%}"
        notes.append(f"{source.label}: {share} of the prompt tokens were read from the provider's cache")
    if not any(role in table.numbers for role in (*MOMENTS, "latency", *STATED)):
        notes.append(f"{source.label}: states no times and no headers: only lengths can be learnt from it")
    return notes


def _seconds(table: Table) -> dict[str, Real]:
    """Return moments in seconds from a common zero, -1 = not stated, and what follows from the start of the answer."""
    scale = {role: 1e-6 if "date" in unit else UNITS[unit] for role, unit in table.units.items()}
    known = {role: table.numbers[role] != -1.0 for role in scale}
    zero = min((float(table.numbers[role][known[role]].min()) * scale[role] for role in scale), default=0.0)
    # A whole second, so that dates of 1e15 us keep their last digits.
    zero = float(np.floor(zero))
    found: dict[str, Real] = {}
    for role, per in scale.items():
        shifted = (table.numbers[role] - zero / per) * per
        found[role] = np.where(known[role], shifted, -1.0)
    begins = found.pop("first_token_at", None)
    if begins is not None and "launched" in found and "finished" in found and "first_token" not in table.numbers:
        launched, finished = found["launched"], found["finished"]
        # An answer that was not streamed states its first token at its end, or at 0.
        streamed = (launched >= 0.0) & (launched < begins) & (begins < finished)
        found["first_token"] = np.where(streamed, begins - launched, -1.0)
    return found


def _check_order(table: Table, rows: dict[str, Any]) -> None:
    if "launched" not in rows or "finished" not in rows:
        return
    begun, ended = rows["launched"], rows["finished"]
    both = (begun >= 0.0) & (ended >= 0.0)
    first, name = (table.columns[role].name for role in ("launched", "finished"))
    wrong = both & (ended < begun)
    if wrong.any():
        row = int(np.argmax(wrong))
        early_s = begun[row] - ended[row]
        text = f"column {quoted(name)}: it ended {early_s:,.6g} s before it began (column {quoted(first)})"
        raise BadInput(text, table.source, int(table.lines[row]))
    if "latency" not in rows:
        return
    column = table.columns["latency"]
    took, measured = rows["latency"], ended - begun
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = took / measured
    wrong = both & (took > 0.0) & (measured > 0.0) & ~((ratio > 0.02) & (ratio < 50.0))
    if wrong.any():
        row = int(np.argmax(wrong))
        text = (
            f"column {quoted(column.name)}: {took[row]:,.6g} s, but {quoted(first)} to {quoted(name)} is "
            f"{measured[row]:,.6g} s: mixed units? name the unit: --columns latency={column.name}:ms"
        )
        raise BadInput(text, table.source, int(table.lines[row]))


def _check_durations(table: Table, role: str, values: Real) -> None:
    known = values[values > 0.0]
    if not len(known) or role not in table.columns:
        return
    name = table.columns[role].name
    most = min(LATENCY_MAX_S, LATENCY_RATIO_MAX * float(np.median(known)))
    worst = int(np.argmax(values))
    if values[worst] > most:
        text = (
            f"column {quoted(name)}: {values[worst]:,.6g} s, where the median is {np.median(known):,.6g} s: mixed "
            f"units, or not in seconds? name the unit: --columns {role}={name}:ms"
        )
        raise BadInput(text, table.source, int(table.lines[worst]))


def _check_seconds_among_ms(table: Table, output: Real, took_s: Real) -> None:
    answered = (table.kinds == ANSWERED) & (output > 0.0) & (took_s > 0.0)
    if answered.sum() <= APART_ROWS:
        return
    per_token_s = took_s / np.maximum(output, 1.0)
    median_s = float(np.median(per_token_s[answered]))
    apart = np.flatnonzero(answered & (per_token_s < median_s / APART_RATIO))
    if len(apart) < APART_ROWS or not output[apart].std():
        return
    grows = float(np.corrcoef(np.log(output[apart]), np.log(took_s[apart]))[0, 1])
    if grows > APART_CORRELATION:
        name, first = table.columns["latency"].name, int(apart[0])
        text = (
            f"column {quoted(name)}: {took_s[first]:,.6g} s for {output[first]:,.0f} tokens, where others take "
            f"{median_s / per_token_s[first]:,.0f} times as long: mixed units? {len(apart):,} of "
            f"{len(output):,} rows are like this one: bring them all to one unit"
        )
        raise BadInput(text, table.source, int(table.lines[first]))


# ---------------------------------------------------------------- an example log


HEADER = (
    *("custom_id", "prompt_tokens", "output_tokens", "max_tokens", "arrival_s", "launched_s", "finished_s", "outcome"),
    *("retry_after_s", "limit_tokens", "remaining_tokens", "limit_requests", "remaining_requests"),
)


class _Heard(Simulation):
    """A run whose attempts keep what their headers stated, although the law does not read them."""

    def _answer(self, job: Job, key: int, now: float) -> tuple[int, float, int, float]:
        answer = super()._answer(job, key, now)
        self._state(job)
        return answer


def write_log(scenario: Scenario, path: Path) -> Path:
    """Simulate the scenario and write a log of its attempts as a program might: one row each, with its headers."""
    workload = scenario.workload
    rows: list[tuple[Any, ...]] = []

    def take(job: Job, now: float, code: str) -> None:
        ok = OUTCOMES[job.outcome].value == "ok"
        heard = OUTCOMES[job.outcome].value in ("ok", "throttled", "slow_down", "server_error")
        heard = heard and prov.states_counts(case.provider, job.outcome not in CHARGED)
        stated = {d if d == law.TPM else law.RPM: figures for d, *figures in job.stated if heard}
        (limit, left), (requests, requests_left) = (stated.get(d, (-1.0, -1.0)) for d in (law.TPM, law.RPM))
        i = job.index
        rows.append(
            (
                *(f"q-{i}", int(workload.prompt_tokens[i]), int(job.output) if ok else "", int(workload.max_tokens[i])),
                *(workload.arrival_s[i], job.launched_s, now, OUTCOMES[job.outcome].value),
                job.retry_after_s if job.retry_after_s >= 0.0 else "",
                *(limit, left, requests, requests_left),
            )
        )

    case = case_of(scenario)
    _Heard(
        case.columns, case.params, case.provider, seed=scenario.seed, from_trace=case.from_trace, on_attempt=take
    ).run()
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        writer.writerows(rows)
    return path
