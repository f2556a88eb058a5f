"""Traces: rows of token counts, as CSV or JSONL, whatever their columns are called.

What lives here: the two readers of rows. What must not: names of columns and checks of values (`trace_columns`),
recognising files and making workloads of rows (`readers`).

Theory of operation. A CSV is first read by Arrow, typed and in blocks: a million rows take about a second. If anything
in it is not as plain as that, it is read again row by row by `csv`, which is ten times slower, accepts a little more
and knows the line and column of whatever is wrong. A JSONL trace goes through the same row-by-row checks. All
complaints are `BadInput`: one line, `file:line:`, then the column, the value and the remedy.
"""

from __future__ import annotations

import csv
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from governor.model.errors import BadInput, quoted
from governor.model.estimate import kind_of
from sim.model.workload import TOKENS_MAX
from sim.scenario.trace_columns import (
    DEFAULTS,
    LOWEST,
    NEEDED,
    SECONDS_MAX,
    TEXTS,
    UNITS,
    WHOLES,
    Column,
    date_seen,
    is_absent,
    moment_of,
    number_of,
    resolved,
    seconds_of,
    text_of,
    unit_seen,
    unit_words,
    whole_of,
)

BOM = b"\xef\xbb\xbf"
# A smaller CSV file is read line by line.
SMALL_BYTES = 200_000
Table = dict[str, Any]


class Named(Protocol):
    """Bytes that can be read more than once, and the name that they have in errors."""

    @property
    def name(self) -> str: ...

    def stream(self) -> BinaryIO:
        """The bytes from their beginning."""


# ---------------------------------------------------------------- rows


class Rows:
    """The rows read so far, by role. `dates`: whether arrivals are dates (microseconds since 1970), None = unknown."""

    def __init__(self, roles: Mapping[str, Column], source: str) -> None:
        self.roles = roles
        self.source = source
        self.dates: bool | None = None
        self.unit = ""
        self.columns: dict[str, Any] = {}
        for role in roles:
            self.columns[role] = array("q" if role in WHOLES else "d") if role not in TEXTS else []
        self.line_of: dict[str, int] = {}
        self.adders = [(role, column.name, self._adder(role, column)) for role, column in roles.items()]

    def _adder(self, role: str, column: Column) -> Callable[[Any], None]:
        append = self.columns[role].append
        if role in WHOLES:
            return lambda value: append(whole_of(role, value))
        if role == "latency":
            return lambda value: append(seconds_of(column.unit, value))
        if role == "arrival":
            return lambda value: self._add_arrival(value, column.unit)
        return lambda value: append(text_of(role, value))

    def _add_arrival(self, value: object, unit: str) -> None:
        dates, number = moment_of(value)
        if number < 0.0:
            raise ValueError("is a negative time")
        seen = date_seen(value) if dates else unit or unit_seen(number)
        if self.dates is None:
            self.dates, self.unit = dates, seen
        if seen != self.unit:
            raise ValueError(f"is in {unit_words(seen)} among values in {unit_words(self.unit)}: one unit per column")
        self.columns["arrival"].append(number)

    def add(self, row: Mapping[str, Any], line: int) -> None:
        """Takes one row; BadInput names the line, the column and the value."""
        for role, name, adder in self.adders:
            value = row.get(name)
            if is_absent(role, value):
                if role in NEEDED:
                    raise BadInput(f"column {quoted(name)} has no value here", self.source, line)
                value = DEFAULTS.get(role, 0)
            try:
                adder(value)
            except ValueError as error:
                raise BadInput(f"column {quoted(name)}: {quoted(value)} {error}", self.source, line) from None
        if "id" in self.roles:
            custom_id = self.columns["id"][-1]
            first = self.line_of.setdefault(custom_id, line)
            if first != line:
                raise BadInput(f"custom_id {quoted(custom_id)} stands on line {first} already", self.source, line)

    def table(self) -> Table:
        """Role -> array of numbers, or list of texts."""
        return {
            role: np.frombuffer(values, values.typecode) if isinstance(values, array) else values
            for role, values in self.columns.items()
        }


# ---------------------------------------------------------------- JSONL


def read_jsonl(source: Named, chosen: Mapping[str, str], first: int, drawn: bool) -> tuple[Rows, Table]:
    """The rows of a JSONL trace, at most `first` of them (0 = all)."""
    rows = None
    for line, row in islice(json_rows(source), first or None):
        if rows is None:
            rows = Rows(resolved(list(row), chosen, source.name, drawn), source.name)
        if "body" in row and rows.roles["prompt"].name not in row:
            raise BadInput("a request in batch format among rows of a trace: one kind per file", source.name, line)
        rows.add(row, line)
    assert rows is not None, "a source has at least one line that is not blank"
    return rows, rows.table()


def json_rows(source: Named) -> Iterator[tuple[int, dict[str, Any]]]:
    with source.stream() as stream:
        for line, raw in enumerate(stream, 1):
            text = _decoded(raw.removeprefix(BOM) if line == 1 else raw, source.name, line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                cut = "; the line is cut short: was the file written to its end?" if not raw.endswith(b"\n") else ""
                raise BadInput(
                    f"not JSON: {error.msg} (column {error.colno}), where one object per line should be{cut}",
                    source.name,
                    line,
                ) from None
            except (ValueError, RecursionError) as error:
                raise BadInput(f"not JSON that can be read: {error}", source.name, line) from None
            if not isinstance(row, dict):
                raise BadInput(f"{kind_of(row)} where a JSON object should be", source.name, line)
            yield line, row


def _decoded(raw: bytes, name: str, line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"not UTF-8 text: {error.reason} (byte {error.start + 1}): save it as UTF-8"
        raise BadInput(message, name, line) from None


# ---------------------------------------------------------------- CSV


def read_csv(source: Named, chosen: Mapping[str, str], first: int, drawn: bool) -> tuple[Rows, Table]:
    """The rows of a CSV trace with a header line, at most `first` of them (0 = all); `,`, `;`, tab or `|` between."""
    names, separator, line = header_of(source)
    rows = Rows(resolved(names, chosen, source.name, drawn), source.name)
    # To import Arrow takes longer than to read a small file line by line.
    table = None if _is_small(source) else _fast_table(source, rows, names, separator, line, first)
    if table is None:
        for at, row in islice(csv_rows(source, names, separator, line), first or None):
            rows.add(row, at)
        table = rows.table()
    if not len(table["prompt"]):
        raise BadInput("only a header, no rows", source.name)
    return rows, table


def _is_small(source: Named) -> bool:
    with source.stream() as stream:
        return len(stream.read(SMALL_BYTES)) < SMALL_BYTES


def header_of(source: Named) -> tuple[list[str], str, int]:
    """Names, separator and line number of the header: the first line that is not blank."""
    text, line = "", 0
    with source.stream() as stream:
        for line, raw in enumerate(stream, 1):
            text = _decoded(raw.removeprefix(BOM) if line == 1 else raw, source.name, line)
            if text.strip():
                break
    separator = max(",;\t|", key=text.count)
    try:
        names = [name.strip() for name in next(csv.reader([text], delimiter=separator, strict=True))]
    except csv.Error as error:
        raise BadInput(f"not a CSV header: {error}", source.name, line) from None
    if all(_is_value(name) for name in names):
        raise BadInput("values where a header line with the columns' names should be", source.name, line)
    twice = [name for i, name in enumerate(names) if name and name in names[:i]]
    if twice:
        raise BadInput(f"two columns are called {quoted(twice[0])}: rename one", source.name, line)
    return names, separator, line


def _is_value(text: str) -> bool:
    """Whether a word is a number or a date, as no column is called."""
    try:
        moment_of(text)
    except ValueError:
        return number_of(text) is not None
    return True


def csv_rows(source: Named, names: list[str], separator: str, header: int) -> Iterator[tuple[int, dict[str, str]]]:
    with source.stream() as stream:
        lines = (_decoded(raw, source.name, line) for line, raw in enumerate(stream, 1) if line > header)
        reader = csv.reader(lines, delimiter=separator, strict=True)
        at = header
        try:
            for values in reader:
                # A quoted value may hold line breaks: a row is named by its first line.
                start, at = at + 1, header + reader.line_num
                if len(values) == len(names):
                    yield start, dict(zip(names, values, strict=True))
                elif values and (len(values) > 1 or values[0].strip()):
                    message = (
                        f"{len(values)} values where the header names {len(names)} columns: is the line whole, and "
                        "are values that hold a separator quoted?"
                    )
                    raise BadInput(message, source.name, start)
        except csv.Error as error:
            raise BadInput(f"not CSV: {error}", source.name, at + 1) from None


def _fast_table(source: Named, rows: Rows, names: list[str], separator: str, header: int, first: int) -> Table | None:
    """The table as Arrow reads it, None where anything is not plain: then the slow reader decides, or says why."""
    import pyarrow as pa
    import pyarrow.csv as pc

    typical = next(csv_rows(source, names, separator, header), None)
    if typical is None or "endpoint" in rows.roles:
        return None
    wanted = {role: f"c{names.index(column.name)}" for role, column in rows.roles.items()}
    kinds: dict[str, Any] = {}
    for role in wanted:
        kinds[role] = pa.string() if role in TEXTS else pa.float64()
    if "arrival" in wanted:
        value = typical[1][rows.roles["arrival"].name]
        rows.dates = number_of(value) is None
        if rows.dates:
            zoned = re.search(r"(Z|[+-]\d\d:?\d\d)\s*$", value[10:]) is not None
            kinds["arrival"] = pa.timestamp("ns", tz="UTC") if zoned else pa.timestamp("ns")
    parts: list[dict[str, Any]] = []
    count = 0
    try:
        with source.stream() as stream:
            reader = pc.open_csv(
                stream,
                read_options=pc.ReadOptions(column_names=[f"c{i}" for i in range(len(names))], skip_rows=header),
                parse_options=pc.ParseOptions(delimiter=separator),
                convert_options=pc.ConvertOptions(
                    include_columns=list(wanted.values()),
                    column_types={wanted[role]: kind for role, kind in kinds.items()},
                    null_values=["", "null", "nan", "NaN", "None", "NA"],
                ),
            )
            for batch in reader:
                part = {role: _plain(role, batch.column(name), rows.roles[role].unit) for role, name in wanted.items()}
                parts.append(part)
                count += batch.num_rows
                if 0 < first <= count:
                    break
    except (pa.ArrowException, ValueError, OverflowError):
        rows.dates = None
        return None
    joined = {role: _joined([part[role] for part in parts])[: first or None] for role in wanted}
    if _needs_a_look(joined, rows):
        rows.dates = None
        return None
    return joined


def _needs_a_look(table: Table, rows: Rows) -> bool:
    """Whether only the slow reader can name the line: an id that stands twice, moments of two units."""
    if "id" in table and len(set(table["id"])) < len(table["id"]):
        return True
    if "arrival" not in table or rows.dates or rows.roles["arrival"].unit or not len(table["arrival"]):
        return False
    return unit_seen(float(table["arrival"].min())) != unit_seen(float(table["arrival"].max()))


def _joined(parts: list[Any]) -> Any:
    if parts and isinstance(parts[0], list):
        return [text for part in parts for text in part]
    return np.concatenate(parts) if parts else np.empty(0)


def _plain(role: str, column: Any, unit: str) -> NDArray[Any] | list[str]:
    """One block of one column; ValueError where a value needs the slow reader's attention."""
    if role in TEXTS:
        texts: list[str] = column.to_pylist()
        if any(is_absent(role, text) for text in texts):
            raise ValueError
        return texts
    if role == "arrival" and column.type != "double":
        if column.null_count:
            raise ValueError
        nanoseconds = column.cast("int64").to_numpy(zero_copy_only=False)
        return (nanoseconds // 1_000).astype(np.float64)
    if column.null_count and role not in ("max_tokens", "latency"):
        raise ValueError
    numbers: NDArray[np.float64] = column.fill_null(-1.0).to_numpy(zero_copy_only=False)
    if role == "arrival":
        if not ((numbers >= 0.0) & (numbers < 1e20)).all():
            raise ValueError
        return numbers
    if role == "latency":
        seconds = np.where(numbers == -1.0, -1.0, numbers * UNITS[unit])
        if not ((seconds == -1.0) | ((seconds >= 0.0) & (seconds <= SECONDS_MAX))).all():
            raise ValueError
        return seconds
    # Checked before the conversion, which is undefined for what does not fit.
    if not ((numbers >= LOWEST.get(role, 0)) & (numbers <= TOKENS_MAX)).all():
        raise ValueError
    whole = numbers.astype(np.int64)
    if not (whole == numbers).all():
        raise ValueError
    return whole
