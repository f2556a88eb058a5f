"""Read files into workloads: OpenAI batch JSONL, and logs and traces of any format; and detect the kind of a file.

A batch file yields sizes by the same code that the live run uses. Its answers come from an old run's results, from two
quantiles or from an assumed model, uncapped: the body's cap cuts them at run time. A trace yields token counts; the
rest is assumed and marked as such. Bad input raises `BadInput`: one line that begins with `file:line:`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from governor.model.errors import BadInput, BadSetting, quoted
from governor.model.estimate import EMBEDDINGS, TOKENS_PER_FILE, Sizes
from governor.model.requests import (
    GZIP,
    UnseenContent,
    foreign_format,
    one_list,
    read_requests,
    read_results,
)
from sim.model.synthetic import CAP_ASSUMED, from_tokens, similar_outputs, with_outputs_assumed, with_outputs_drawn
from sim.model.workload import ASSUMED, MEASURED, TOKENS_MAX, Provenance, Workload, constant
from sim.scenario.columns import ANSWERED, OUR_COLUMNS, WHOLES, seconds_from_first
from sim.scenario.rows import BOM
from sim.scenario.table import Table, read_table

BATCH = "batch"
TRACE_JSON = "JSON trace"
TRACE_CSV = "CSV trace"
TRACE_PARQUET = "Parquet trace"
SCENARIO = "scenario"
# The row reader for each kind of trace.
TRACES = {TRACE_JSON: "json", TRACE_CSV: "csv", TRACE_PARQUET: "parquet"}

_HEAD_BYTES = 65_536
# The input of a batch that lists files and the like that it only points to, whose tokens cannot be counted here.
UNSEEN = "content of unknown length"
SQLITE = b"SQLite format 3\0"


@dataclass(frozen=True, slots=True)
class Source:
    """A named file, or standard input (`-`) with its bytes, which can be read only once. Errors state `name`.

    `packed`: the source is gzip-compressed and is unpacked as it is read.
    """

    name: str
    path: str
    data: bytes | None = None
    packed: bool = False

    @property
    def label(self) -> str:
        """Return the name without folders, for reports."""
        return os.path.basename(self.name)

    @staticmethod
    def open(path: str | Path, stdin: BinaryIO | None = None) -> Source:
        """Return the source at `path`. Raise BadInput if it does not exist, is a folder, or is empty."""
        text = str(path)
        try:
            if text == "-":
                source = Source("stdin", text, (stdin or sys.stdin.buffer).read())
            elif not os.path.exists(text):
                raise BadInput("there is no such file", text)
            elif os.path.isdir(text):
                raise BadInput("this is a folder: name a file in it", text)
            elif not os.path.isfile(text):
                # A pipe gives its bytes once; reading it twice would find it empty.
                source = Source(text, text, Path(text).read_bytes())
            else:
                source = Source(text, text)
            with source.stream() as stream:
                head = stream.read(len(GZIP))
            if not head:
                raise BadInput("the file is empty", source.name)
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot be read: {getattr(error, 'strerror', None) or error}", text) from None
        return replace(source, packed=head == GZIP)

    def stream(self) -> BinaryIO:
        """Return the bytes from the beginning, as an open file."""
        if self.packed:
            return cast(BinaryIO, gzip.open(self.path if self.data is None else io.BytesIO(self.data)))
        return io.BytesIO(self.data) if self.data is not None else open(self.path, "rb")

    def kind(self) -> str:
        """Return BATCH, TRACE_JSON, TRACE_CSV, TRACE_PARQUET or SCENARIO, by the first lines and the file extension."""
        try:
            with self.stream() as stream:
                head = stream.read(_HEAD_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            raise BadInput(f"gzip that cannot be read: {error}", self.name) from None
        kind = self._kind_of(head)
        if kind == BATCH and self.packed:
            # A run resumes by line and byte position in its input, so no command accepts a compressed batch.
            raise BadInput(f"this is {foreign_format(GZIP)}", self.name)
        return kind

    def _kind_of(self, head: bytes) -> str:
        if head.startswith(b"PAR1"):
            return TRACE_PARQUET
        if what := foreign_format(head):
            raise BadInput(f"this is {what}", self.name)
        if b"\0" in head:
            raise BadInput("this is not a text file", self.name)
        if self.path.lower().endswith((".yaml", ".yml")):
            return SCENARIO
        text = head.removeprefix(BOM).lstrip()
        if not text:
            raise BadInput("nothing but blank lines in it", self.name)
        if text[:1] in (b"{", b"["):
            return self._kind_of_json(text)
        is_yaml = re.match(rb"(#[^\n]*\n|---[^\n]*\n|\s)*[A-Za-z_][\w]*:(\s|$)", text)
        return SCENARIO if is_yaml else TRACE_CSV

    def _kind_of_json(self, head: bytes) -> str:
        """Return BATCH for requests in batch format.

        A JSON list of them is rejected: a run reads one request per line.
        """
        is_list = head.startswith(b"[")
        first: Any = None
        if not is_list:
            with self.stream() as stream:
                line = next(line for line in stream if line.removeprefix(BOM).strip()).removeprefix(BOM)
        else:
            line = head[1:].lstrip()
        try:
            first, _ = json.JSONDecoder().raw_decode(line.decode("utf-8", "replace").lstrip())
            asks = "body" in first or ("url" in first and not ({"response", "usage", "prompt_tokens"} & first.keys()))
        except (ValueError, RecursionError, TypeError, AttributeError):
            # Malformed: the reader of the likelier kind reports where.
            asks = b'"body"' in line[:200] or b'"custom_id"' in line[:200]
        if asks and is_list:
            raise one_list(self.name)
        return BATCH if asks else TRACE_JSON


def read_workload(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    outputs_from: str | Path | None = None,
    output_tokens: tuple[float, float] | None = None,
    max_tokens: int | None = None,
    first: int = 0,
    seed: int = 0,
    file_tokens: int = TOKENS_PER_FILE,
) -> Workload:
    """Return the workload in `source`, at most its `first` rows (0 = all).

    Raise BadInput or BadSetting if anything in the file or the options is wrong.

    `columns`: role -> column of a trace. `outputs_from`: an old results file of the same batch. `output_tokens`: P50
    and P95 of answer lengths. `max_tokens`: the output cap that every row of a trace declares, in place of its column
    or the assumed one. `seed`: the seed of anything drawn. `file_tokens`: tokens assumed for each file and the like
    that a batch line only points to.
    """
    if output_tokens is not None:
        p50, p95 = output_tokens
        if not 1.0 <= p50 <= p95 <= TOKENS_MAX:
            raise BadSetting(f"--output-tokens {p50:g},{p95:g}: P50 and P95 must be from 1 up, P95 not below P50")
    if first < 0:
        raise BadSetting(f"--first {first:,}: write a number of rows from 1 up, 0 = all")
    if max_tokens is not None and not -1 <= max_tokens <= TOKENS_MAX:
        raise BadSetting(f"max_tokens {max_tokens:,} is not a number of tokens: from 0 to {TOKENS_MAX:,}, -1 = no cap")
    try:
        if source.kind() == BATCH:
            if columns or max_tokens is not None:
                what = "columns" if columns else "max_tokens"
                raise BadInput(f"{what} is for traces: a batch file declares its own", source.name)
            return _batch(source, outputs_from, output_tokens, first, seed, file_tokens)
        if source.kind() == SCENARIO:
            raise BadInput("this is a scenario, not a workload", source.name)
        if outputs_from is not None:
            raise BadInput("--outputs-from is for batch files: a trace holds its own output tokens", source.name)
        table = read_table(source, TRACES[source.kind()], columns or {}, first=first, drawn=output_tokens is not None)
        workload = _trace(source, table, max_tokens, first)
        return workload if output_tokens is None else with_outputs_drawn(workload, *output_tokens, seed)
    except (EOFError, zlib.error) as error:
        raise BadInput(f"gzip that cannot be read: {error}", source.name) from None
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror or error}", source.name) from None


# ---------------------------------------------------------------- batch files


def _batch(
    source: Source,
    outputs_from: str | Path | None,
    output_tokens: tuple[float, float] | None,
    first: int,
    seed: int,
    file_tokens: int,
) -> Workload:
    unseen = UnseenContent(file_tokens)
    sizes: dict[str, array[int]] = {name: array("q") for name in Sizes.__slots__}
    ids: list[str] = []
    models: list[str] = []
    try:
        with source.stream() as stream:
            requests = read_requests(stream, source.name, keep_body=False, file_tokens=file_tokens, in_background=True)
            for request in islice(requests, first or None):
                unseen.add(request)
                for name, values in sizes.items():
                    values.append(getattr(request.sizes, name))
                ids.append(request.custom_id)
                models.append(request.model)
    except BadInput as error:
        raise explained(source, error) from None
    count = len(ids)
    visible: dict[str, Any] = {name: np.frombuffer(values, np.int64) for name, values in sizes.items()}
    workload = Workload(
        **visible,
        output_tokens=constant(0, count),
        arrival_s=constant(0.0, count, np.float64),
        recorded_s=constant(-1.0, count, np.float64),
        custom_ids=ids,
        models=models[0] if len(set(models)) == 1 else models,
        provenance=_batch_provenance(source.label, visible["max_tokens"], first, unseen),
    )
    if output_tokens is not None:
        return with_outputs_drawn(workload, *output_tokens, seed)
    if outputs_from is not None:
        return _with_old_outputs(workload, str(outputs_from), seed)
    return with_outputs_assumed(workload, seed)


def _batch_provenance(name: str, caps: Any, first: int, unseen: UnseenContent) -> Provenance:
    undeclared = int((caps < 0).sum())
    cap = f"declared in the bodies of {name}"
    found = {UNSEEN: (ASSUMED, f"{unseen.text} (--file-tokens)")} if unseen.text else {}
    return found | {
        "requests": (MEASURED, _rows_text(name, len(caps), first)),
        "prompt sizes": (MEASURED, f"characters, messages, images and tools of the bodies in {name}"),
        "prompt tokens": (ASSUMED, "estimated from the text: UTF-8 bytes / 4, 4 per message"),
        "output cap": (MEASURED, f"{cap}; {undeclared:,} of {len(caps):,} declare none" if undeclared else cap),
    }


def _rows_text(name: str, count: int, first: int) -> str:
    if count == 1:
        return f"the first row of {name}" if first == 1 else f"the one row of {name}"
    return f"the first {count:,} rows of {name}" if first == count else f"all {count:,} rows of {name}"


def explained(source: Source, error: BadInput) -> BadInput:
    """Return a line's error, extended by what only the whole file shows: the line is cut short, or of another kind."""
    if not error.line:
        return error
    with source.stream() as stream:
        raw = next(islice(stream, error.line - 1, None), b"")
    if error.reason.startswith("not JSON") and not raw.endswith(b"\n"):
        return BadInput(
            f"{error.reason}; the line is cut short: was the file written to its end?", error.path, error.line
        )
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        return error
    if isinstance(row, dict) and "body" not in row and "url" not in row and "missing" in error.reason:
        return BadInput(
            f"{error.reason}: every line of a batch file is one request in batch format", error.path, error.line
        )
    return error


def _with_old_outputs(workload: Workload, path: str, seed: int) -> Workload:
    """Return the workload with answers from an old run's results, by custom_id.

    Missing ones are drawn from the others.
    """
    old = Source.open(path)
    if old.kind() not in (BATCH, TRACE_JSON):
        raise BadInput("this is not a results file (JSONL, one line per request)", path)
    counts: Counter[str] = Counter()
    outputs: dict[str, int] = {}
    try:
        with old.stream() as stream:
            for result in read_results(stream, path):
                if result.output_tokens >= 0 and (result.status == 0 or 200 <= result.status < 300):
                    counts[result.custom_id] += 1
                    outputs[result.custom_id] = min(result.output_tokens, TOKENS_MAX)
    except BadInput as error:
        raise explained(old, error) from None
    assert workload.custom_ids is not None
    known = np.array([outputs.get(custom_id, -1) for custom_id in workload.custom_ids], np.int64)
    known[workload.endpoint == EMBEDDINGS] = 0
    found = int((known >= 0).sum())
    if not found:
        raise BadInput(
            f"none of its {len(outputs):,} answers with usage is to a custom_id of this batch "
            f"(which begins with {quoted(workload.custom_id(0))})",
            path,
        )
    cap = workload.n * workload.max_tokens
    cut = (known > 0) & (cap > 0) & (known >= cap)
    # The uncut length of a cut answer is unknown; one token more makes the cap cut it again.
    known[cut] = cap[cut] + 1
    text = f"usage in {old.label} for {found:,} of {len(workload):,} requests"
    missing = len(workload) - found
    if missing:
        known = similar_outputs(workload, known, seed)
        text += f"; the other {missing:,} take the answer of one with a prompt of similar length"
    if cut.any():
        text += f"; {int(cut.sum()):,} had reached their cap and would have been longer by an unknown length"
    twice = sum(count > 1 for count in counts.values())
    if twice:
        text += f"; {twice:,} stand there more than once, the last counts"
    label = MEASURED if 2 * found >= len(workload) else ASSUMED
    return workload.with_(output_tokens=known, provenance={"output tokens": (label, text)})


# ---------------------------------------------------------------- traces

_WHOLE_FIELDS = tuple(WHOLES)[4:]
# A role that a row leaves empty.
_DEFAULTS = {"messages": 1, "role_chars": 4, "n": 1}


def _trace(source: Source, table: Table, max_tokens: int | None, first: int) -> Workload:
    """Return the answered requests of a log or trace, in order of arrival."""
    name = source.label
    kept = table.kinds == ANSWERED
    numbers = {role: values[kept] for role, values in table.numbers.items()}
    prompts = numbers["prompt"].astype(np.int64)
    count = len(prompts)
    if not count:
        raise BadInput("no answered request with prompt and output tokens in it", source.name)
    outputs = numbers["output"].astype(np.int64) if "output" in numbers else constant(0, count)
    given: dict[str, Any] = {}
    for role in _WHOLE_FIELDS:
        if role in numbers:
            low = _DEFAULTS.get(role, 0)
            given[role] = np.where(numbers[role] < 0.0, 4.0 * prompts if role == "chars" else low, numbers[role])
            given[role] = given[role].astype(np.int64)
    if "endpoint" in numbers:
        given["endpoint"] = numbers["endpoint"].astype(np.int64)
    ids = _ids(source, table, kept)
    if ids is not None:
        given["custom_ids"] = ids
    if "model" in table.texts:
        models = [model for model, is_kept in zip(table.texts["model"], kept, strict=True) if is_kept]
        given["models"] = models[0] if len(set(models)) == 1 else models
    rows = _rows_text(name, count, first)
    left = [f"{len(kept) - count:,} rows of requests that failed are left out"] if count < len(kept) else []
    left += [note.removeprefix(f"{name}: ") for note in table.notes(name)]
    provenance: Provenance = {
        "requests": (MEASURED, "; ".join([rows, *left])),
        "prompt tokens": (MEASURED, _column_text(name, table, "prompt")),
    }
    if "chars" not in numbers:
        provenance["prompt sizes"] = (ASSUMED, "one message of 4 characters per token")
    if "output" in numbers:
        provenance["output tokens"] = (MEASURED, _column_text(name, table, "output"))
    cap, provenance["output cap"] = _trace_cap(name, table, numbers, outputs, max_tokens)
    took_s, text = _latencies(name, table, numbers)
    if took_s is not None and (took_s >= 0.0).any():
        given["recorded_s"] = took_s
        recorded = int((took_s >= 0.0).sum())
        provenance["latency"] = (MEASURED, f"{text}, {recorded:,} of {count:,} rows")
    order = None
    moments = next((role for role in ("arrival", "launched") if role in numbers), None)
    if moments is not None:
        column = table.columns[moments]
        if (numbers[moments] == -1.0).any():
            line = int(table.lines[kept][np.argmin(numbers[moments])])
            raise BadInput(f"column {quoted(column.name)} has no value here", source.name, line)
        # Our own column counts from the start of the run.
        ours = column.name == OUR_COLUMNS["arrival"] and "date" not in table.units[moments]
        arrival_s = numbers[moments] if ours else seconds_from_first(numbers[moments], table.units[moments])
        text = _column_text(name, table, moments)
        if (np.diff(arrival_s) < 0.0).any():
            order = np.argsort(arrival_s, kind="stable")
            text += "; the rows were not in order of arrival and have been sorted"
        given["arrival_s"] = arrival_s
        provenance["arrivals"] = (MEASURED, text)
    workload = from_tokens(prompts, outputs, max_tokens=cap, provenance=provenance, **given)
    return workload if order is None else workload.take(order)


def _ids(source: Source, table: Table, kept: Any) -> list[str] | None:
    """Return the requests' ids. A duplicate is an error in a column that is ours or user-stated; a guess is dropped."""
    if "id" not in table.texts:
        return None
    ids = [custom_id for custom_id, is_kept in zip(table.texts["id"], kept, strict=True) if is_kept]
    column = table.columns["id"]
    if len(set(ids)) == len(ids) and "" not in ids:
        return ids
    if column.rank[0] >= 0 and column.name != OUR_COLUMNS["id"]:
        return None
    line_of: dict[str, int] = {}
    for custom_id, line in zip(ids, table.lines[kept].tolist(), strict=True):
        if not custom_id:
            raise BadInput(f"column {quoted(column.name)} has no value here", source.name, line)
        before = line_of.setdefault(custom_id, line)
        if before != line:
            raise BadInput(f"custom_id {quoted(custom_id)} stands on line {before} already", source.name, line)
    raise AssertionError("an id stands twice or is missing")


def _latencies(name: str, table: Table, numbers: dict[str, Any]) -> tuple[Any, str]:
    """Return each request's latency in seconds, -1 = unknown: as stated, or from its start to its end."""
    if "latency" in numbers:
        return numbers["latency"], _column_text(name, table, "latency")
    both = ("launched", "finished")
    if not all(role in numbers for role in both) or table.units["launched"] != table.units["finished"]:
        return None, ""
    begun, ended = (numbers[role] for role in both)
    known = (begun >= 0.0) & (ended >= begun)
    moments = np.concatenate([begun, ended])
    seconds = seconds_from_first(moments, table.units["launched"])
    took_s = np.where(known, seconds[len(begun) :] - seconds[: len(begun)], -1.0)
    names = " to ".join(table.columns[role].name for role in both)
    return took_s, f"columns {names} of {name}"


def _column_text(name: str, table: Table, role: str) -> str:
    return f"column {table.columns[role].name} of {name}"


def _trace_cap(
    name: str, table: Table, numbers: dict[str, Any], outputs: Any, max_tokens: int | None
) -> tuple[Any, tuple[str, str]]:
    """Return the declared output cap of a trace's rows, and its provenance."""
    if max_tokens is None and "max_tokens" in numbers:
        return numbers["max_tokens"].astype(np.int64), (MEASURED, _column_text(name, table, "max_tokens"))
    cap = CAP_ASSUMED if max_tokens is None else max_tokens
    if cap < 0:
        return cap, (ASSUMED, "none is declared, as given")
    text = f"{cap:,} for every request, " + ("for want of a column" if max_tokens is None else "as given")
    longer = int((outputs > cap).sum())
    if longer:
        text += f"; {longer:,} answers are longer and are cut by it"
    return cap, (ASSUMED, text)


# ---------------------------------------------------------------- rows that have no file

ROLE_FIELDS = {
    "prompt": "prompt_tokens",
    "output": "output_tokens",
    "arrival": "arrival_s",
    "latency": "recorded_s",
    **{role: role for role in tuple(WHOLES)[3:]},
}


def save_rows(workload: Workload, path: Path) -> None:
    """Write the workload as a CSV that `read_workload` reads back exactly; the file is replaced atomically."""
    header = [OUR_COLUMNS[role] for role in ROLE_FIELDS]
    fields = [getattr(workload, name).tolist() for name in ROLE_FIELDS.values()]
    if not workload.has_arrivals:
        place = header.index(OUR_COLUMNS["arrival"])
        del header[place], fields[place]
    urls = [workload.url(row) for row in range(len(workload))]
    header += ["endpoint"]
    fields += [urls]
    if workload.models is not None:
        header += ["model"]
        fields += [[workload.model(row) for row in range(len(workload))]]
    if workload.custom_ids is not None:
        header += ["custom_id"]
        fields += [[custom_id.replace("\0", "\\0") for custom_id in workload.custom_ids]]
    unfinished = path.with_name(path.name + ".part")
    with open(unfinished, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(zip(*fields, strict=True))
    unfinished.replace(path)


def is_journal(path: str) -> bool:
    """Return whether a path or URL is a journal rather than a text file. Raise BadInput if nothing is there."""
    if "://" in path:
        return True
    if path == "-":
        return False
    with Source.open(path).stream() as stream:
        return stream.read(len(SQLITE)) == SQLITE
