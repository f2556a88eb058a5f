"""Rows of a file as (path, value) pairs: CSV, JSON lines, JSON documents of any layout, Parquet.

Files are read as streams, a JSON list element by element. Nested objects are flattened to paths
(`usage.prompt_tokens`), including those written as text in a cell. Errors name the line.
"""

from __future__ import annotations

import ast
import codecs
import csv
import json
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain
from typing import Any, BinaryIO, Protocol

from governor.model.errors import BadInput, quoted
from governor.model.estimate import kind_of
from sim.scenario.columns import guessed, is_container, moment_of, number_of

BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = 2**20
PARQUET_ROWS = 2_048
DEEPEST = 8
_Row = Mapping[str, Any]
Pairs = list[tuple[str, Any]]
# Keys under which documents hold lists of spans or of calls.
LISTS = (
    *("resourceSpans", "scopeSpans", "instrumentationLibrarySpans", "spans", "batches", "data", "runs"),
    *("observations", "generations", "results", "items", "rows", "traces"),
)


class NamedBytes(Protocol):
    """Bytes that can be read more than once, and the name that errors use for them."""

    @property
    def name(self) -> str: ...

    def stream(self) -> BinaryIO:
        """Return the bytes from the beginning."""


def pairs_of(source: NamedBytes, kind: str) -> Iterator[tuple[int, Pairs]]:
    """Return line number and values of every row of a file of that kind: "csv", "json" or "parquet"."""
    return {"csv": _csv_pairs, "json": _json_pairs, "parquet": _parquet_pairs}[kind](source)


def _flat(row: _Row, before: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) for every plain value in a row, including those of objects written as text in a cell."""
    for key, value in row.items():
        if isinstance(value, str) and value[:1] == "{" and _may_hold(key):
            value = _object_in(value)
        elif isinstance(value, list):
            if key.endswith("ttributes"):
                value = _attributes(value)
            elif len(value) == 1:
                # A header with a single value.
                value = value[0]
        if isinstance(value, dict):
            if depth < DEEPEST:
                yield from _flat(value, f"{before}{key}.", depth + 1)
        elif not isinstance(value, list):
            yield before + key, value


_may_hold = cache(is_container)


def _object_in(text: str) -> Any:
    """Return the object that a cell holds as JSON or in pandas' notation; the text itself if it holds neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return text


def _attributes(parts: list[Any]) -> _Row:
    """Return OTLP's list of typed attributes as an object."""
    found: dict[str, Any] = {}
    for part in parts:
        typed = part.get("value") if isinstance(part, dict) else None
        if not isinstance(typed, dict) or not typed:
            continue
        kind, value = next(iter(typed.items()))
        if kind == "arrayValue" and isinstance(value, dict):
            value = [next(iter(v.values()), None) for v in value.get("values") or () if isinstance(v, dict)]
            value = value[0] if len(value) == 1 else value
        found[str(part.get("key"))] = value
    return found


# ---------------------------------------------------------------- JSON


def _json_pairs(source: NamedBytes) -> Iterator[tuple[int, Pairs]]:
    return ((line, list(_flat(row))) for line, row in json_rows(source))


def json_rows(source: NamedBytes) -> Iterator[tuple[int, _Row]]:
    """Yield line number and object of every row: JSON lines, or documents of any layout that hold lists of rows."""
    for line, document, text in _lines(source) if _is_by_line(source) else _documents(source):
        if not isinstance(document, dict):
            raise BadInput(f"{kind_of(document)} where a JSON object should be", source.name, line)
        if not any(key in document for key in LISTS):
            yield line, document
            continue
        at = 0
        for row in _spread(document):
            number = row.get("spanId") or row.get("id") or ""
            place = text.find(f'"{number}"', at) if number else -1
            if place >= 0:
                line, at = line + text.count("\n", at, place), place
            yield line, row


def _is_by_line(source: NamedBytes) -> bool:
    """Return whether the first non-blank line is a complete object. A list may be one line of any length."""
    with source.stream() as stream:
        head = stream.read(_CHUNK_BYTES).removeprefix(BOM).lstrip()
    if head.startswith(b"["):
        return False
    with source.stream() as stream:
        raw = next((raw for raw in stream if raw.removeprefix(BOM).strip()), b"")
    try:
        return isinstance(json.loads(raw.removeprefix(BOM)), dict)
    except (ValueError, RecursionError):
        return False


def _spread(document: _Row) -> Iterator[_Row]:
    """Yield the rows in a document, at any depth of lists; the document itself if it has its own usage."""
    inner = [part for key in LISTS if isinstance(document.get(key), list) for part in document[key]]
    if not inner or any((guessed(key) or ("",))[0] in ("prompt", "output") for key in document):
        yield document
        return
    for part in inner:
        if isinstance(part, dict):
            yield from _spread(part)


def _lines(source: NamedBytes) -> Iterator[tuple[int, Any, str]]:
    with source.stream() as stream:
        for line, raw in enumerate(stream, 1):
            text = _decoded(raw.removeprefix(BOM) if line == 1 else raw, source.name, line)
            if not text.strip():
                continue
            try:
                yield line, json.loads(text), text
            except json.JSONDecodeError as error:
                cut = "; the line is cut short: was the file written to its end?" if not raw.endswith(b"\n") else ""
                raise BadInput(
                    f"not JSON: {error.msg} (column {error.colno}), where one object per line should be{cut}",
                    source.name,
                    line,
                ) from None
            except (ValueError, RecursionError) as error:
                raise BadInput(f"not JSON that can be read: {error}", source.name, line) from None


def _decoded(raw: bytes, name: str, line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"not UTF-8 text: {error.reason} (byte {error.start + 1}): save it as UTF-8"
        raise BadInput(message, name, line) from None


def _documents(source: NamedBytes) -> Iterator[tuple[int, Any, str]]:
    """Yield line, value and text of each JSON value or list element, decoded one by one as the file is read."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    parse = json.JSONDecoder().raw_decode
    text, at, line, in_list, ended, size = "", 0, 1, False, False, _CHUNK_BYTES
    with source.stream() as stream:
        while True:
            while at < len(text) and (text[at].isspace() or (in_list and text[at] == ",")):
                line += text[at] == "\n"
                at += 1
            if at < len(text) and text[at] == ("]" if in_list else "["):
                in_list, at = not in_list, at + 1
                continue
            problem: Exception | None = None
            if at < len(text):
                try:
                    value, end = parse(text, at)
                    yield line, value, text[at:end]
                    line += text.count("\n", at, end)
                    text, at, size = (text, end, size) if end < _CHUNK_BYTES else (text[end:], 0, _CHUNK_BYTES)
                    continue
                except (ValueError, RecursionError) as error:
                    problem = error
            if not ended and (at >= len(text) or isinstance(problem, json.JSONDecodeError)):
                raw = stream.read(size)
                try:
                    text, at, ended, size = text[at:] + decode(raw, not raw), 0, not raw, 2 * size
                except UnicodeDecodeError as error:
                    at_line = line + text.count("\n", at) + raw[: error.start].count(b"\n")
                    raise BadInput(f"not UTF-8 text: {error.reason}: save it as UTF-8", source.name, at_line) from None
                continue
            if at >= len(text) and not in_list:
                return
            raise _not_json(problem, text, at, source.name, line)


def _not_json(problem: Exception | None, text: str, at: int, name: str, line: int) -> BadInput:
    cut = "; the file is cut short: was it written to its end?"
    if problem is None:
        return BadInput(f"not JSON: the list has no end{cut}", name, line)
    if not isinstance(problem, json.JSONDecodeError):
        return BadInput(f"not JSON that can be read: {problem}", name, line)
    short = problem.pos >= len(text.rstrip()) - 1 or problem.msg.startswith("Unterminated")
    column = problem.pos - text.rfind("\n", 0, problem.pos)
    line += text.count("\n", at, problem.pos)
    return BadInput(f"not JSON: {problem.msg} (column {column}){cut if short else ''}", name, line)


# ---------------------------------------------------------------- CSV


def _csv_pairs(source: NamedBytes) -> Iterator[tuple[int, Pairs]]:
    """Yield the rows of a CSV with a header line, separated by `,`, `;`, tab or `|`.

    Raise BadInput if it has no rows.
    """
    names, separator, header = _header_of(source)
    containers = any(map(is_container, names))
    empty = True
    for line, values in _csv_rows(source, names, separator, header):
        empty = False
        pairs = list(zip(names, values, strict=True))
        yield line, list(_flat(dict(pairs))) if containers else pairs
    if empty:
        raise BadInput("only a header, no rows", source.name)


def _header_of(source: NamedBytes) -> tuple[list[str], str, int]:
    """Return column names, separator and line number of the header, which is the first non-blank line."""
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
    """Return whether a word is a number or a date, which no column name is."""
    try:
        moment_of(text, "")
    except ValueError:
        return number_of(text) is not None
    return True


def _csv_rows(source: NamedBytes, names: list[str], separator: str, header: int) -> Iterator[tuple[int, list[str]]]:
    # A prompt in a cell may exceed the default of 128 KiB.
    csv.field_size_limit(2**31 - 1)
    with source.stream() as stream:
        lines = (_decoded(raw, source.name, line) for line, raw in enumerate(stream, 1) if line > header)
        reader = csv.reader(lines, delimiter=separator, strict=True)
        at = header
        try:
            for values in reader:
                # A quoted value may hold line breaks: errors name a row by its first line.
                start, at = at + 1, header + reader.line_num
                if len(values) == len(names):
                    yield start, values
                elif values and (len(values) > 1 or values[0].strip()):
                    message = (
                        f"{len(values)} values where the header names {len(names)} columns: is the line whole, and "
                        "are values that hold a separator quoted?"
                    )
                    raise BadInput(message, source.name, start)
        except csv.Error as error:
            raise BadInput(f"not CSV: {error}", source.name, at + 1) from None


# ---------------------------------------------------------------- Parquet


def _parquet_pairs(source: NamedBytes) -> Iterator[tuple[int, Pairs]]:
    """Yield the rows of a Parquet file, numbered from 1 in place of lines."""
    # Arrow takes longer to import than most files take to read.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with source.stream() as stream:
            batches = pq.ParquetFile(stream).iter_batches(PARQUET_ROWS)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for row, values in enumerate(rows, 1):
                yield row, list(_flat(values))
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"not Parquet that can be read: {str(error).splitlines()[0]}", source.name) from None
