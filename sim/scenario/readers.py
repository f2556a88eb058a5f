"""Files into workloads: OpenAI batch JSONL, traces as CSV or JSONL, and what kind of file this is in the first place.

What lives here: `Source` (a named file, or standard input read once), the recognition of its kind, `read_workload`, and
the saving of rows that came from standard input. What must not: rows of traces (`traces`), the batch line's own format
(`governor/model/requests.py`), models of answer lengths (`workload`).

A batch file gives sizes by the same code that the live run uses; answers come from an old run's results, from two
quantiles or from an assumed model, uncapped: the body's cap cuts them at run time. A trace gives token counts, and the
rest is assumed and said so. Bad input is `BadInput`: one line that begins with `file:line:`.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from governor.model.errors import BadInput, BadSetting, quoted
from governor.model.estimate import EMBEDDINGS, Sizes
from governor.model.requests import OldResult, read_requests, read_results
from sim.model.workload import (
    ASSUMED,
    CAP_ASSUMED,
    MEASURED,
    TOKENS_MAX,
    Provenance,
    Workload,
    constant,
    from_tokens,
    similar_outputs,
    with_outputs_assumed,
    with_outputs_drawn,
)
from sim.scenario.trace_columns import OUR_COLUMNS, WHOLES, arrival_seconds
from sim.scenario.traces import BOM, Rows, Table, read_csv, read_jsonl

BATCH = "batch"
TRACE_JSONL = "JSONL trace"
TRACE_CSV = "CSV trace"
SCENARIO = "scenario"

HEAD_BYTES = 65_536
_MAGIC = {
    b"\x1f\x8b": "gzip-compressed: unpack it first (gunzip)",
    b"PK\x03\x04": "a zip archive (or a spreadsheet): unpack or export it first",
    b"PAR1": "Parquet: export it as CSV first",
    b"\x28\xb5\x2f\xfd": "zstd-compressed: unpack it first (unzstd)",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}


@dataclass(frozen=True, slots=True)
class Source:
    """A file by name, or standard input (`-`) with its bytes, which can be read only once. `name` stands in errors."""

    name: str
    path: str
    data: bytes | None = None

    @property
    def label(self) -> str:
        """The name without folders, for reports."""
        return os.path.basename(self.name)

    @staticmethod
    def open(path: str | Path, stdin: BinaryIO | None = None) -> Source:
        """The source at `path`; BadInput where there is none, where it is a folder, or where nothing is in it."""
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
                if not stream.read(1):
                    raise BadInput("the file is empty", source.name)
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot be read: {getattr(error, 'strerror', None) or error}", text) from None
        return source

    def stream(self) -> BinaryIO:
        """The bytes from their beginning, as an open file."""
        return BytesIO(self.data) if self.data is not None else open(self.path, "rb")

    def kind(self) -> str:
        """BATCH, TRACE_JSONL, TRACE_CSV or SCENARIO, from the first lines and the name's ending."""
        with self.stream() as stream:
            head = stream.read(HEAD_BYTES)
        for magic, what in _MAGIC.items():
            if head.startswith(magic):
                raise BadInput(f"this is {what}", self.name)
        if b"\0" in head:
            raise BadInput("this is not a text file", self.name)
        if self.path.lower().endswith((".yaml", ".yml")):
            return SCENARIO
        text = head.removeprefix(BOM).lstrip()
        if not text:
            raise BadInput("nothing but blank lines in it", self.name)
        if text.startswith(b"["):
            raise BadInput("this is one JSON list: write one object per line (jq -c '.[]')", self.name, 1)
        if text.startswith(b"{"):
            return self._kind_of_json()
        is_yaml = re.match(rb"(#[^\n]*\n|---[^\n]*\n|\s)*[A-Za-z_][\w]*:(\s|$)", text)
        return SCENARIO if is_yaml else TRACE_CSV

    def _kind_of_json(self) -> str:
        with self.stream() as stream:
            line = next(line for line in stream if line.removeprefix(BOM).strip())
        try:
            first = json.loads(line.removeprefix(BOM))
            return BATCH if "body" in first or "url" in first else TRACE_JSONL
        except (ValueError, RecursionError, TypeError):
            # Broken: the reader of the likelier kind says where.
            return BATCH if b'"body"' in line or b'"custom_id"' in line else TRACE_JSONL


def read_workload(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    outputs_from: str | Path | None = None,
    output_tokens: tuple[float, float] | None = None,
    max_tokens: int | None = None,
    first: int = 0,
    seed: int = 0,
) -> Workload:
    """The workload in `source`, at most its `first` rows (0 = all). BadInput or BadSetting for anything that is wrong.

    `columns`: role -> column of a trace. `outputs_from`: an old results file of the same batch. `output_tokens`: P50
    and P95 of the answers' length. `max_tokens`: the output cap declared by every row of a trace, in place of its
    column or of the assumed one. `seed`: keys what has to be drawn.
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
            return _batch(source, outputs_from, output_tokens, first, seed)
        if source.kind() == SCENARIO:
            raise BadInput("this is a scenario, not a workload", source.name)
        if outputs_from is not None:
            raise BadInput("--outputs-from is for batch files: a trace holds its own output tokens", source.name)
        read = read_jsonl if source.kind() == TRACE_JSONL else read_csv
        rows, table = read(source, columns or {}, first, output_tokens is not None)
        workload = _trace(source, rows, table, max_tokens, first)
        return workload if output_tokens is None else with_outputs_drawn(workload, *output_tokens, seed)
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror or error}", source.name) from None


# ---------------------------------------------------------------- batch files


def _batch(
    source: Source,
    outputs_from: str | Path | None,
    output_tokens: tuple[float, float] | None,
    first: int,
    seed: int,
) -> Workload:
    sizes: dict[str, array[int]] = {name: array("q") for name in Sizes.__slots__}
    ids: list[str] = []
    models: list[str] = []
    try:
        with source.stream() as stream:
            for request in islice(read_requests(stream, source.name, keep_body=False), first or None):
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
        provenance=_batch_provenance(source.label, visible["max_tokens"], first),
    )
    if output_tokens is not None:
        return with_outputs_drawn(workload, *output_tokens, seed)
    if outputs_from is not None:
        return _with_old_outputs(workload, str(outputs_from), seed)
    return with_outputs_assumed(workload, seed)


def _batch_provenance(name: str, caps: Any, first: int) -> Provenance:
    undeclared = int((caps < 0).sum())
    cap = f"declared in the bodies of {name}"
    return {
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
    """The error of a line with what only the whole file can tell: the line is cut short, or is of another kind."""
    if not error.line:
        return error
    with source.stream() as stream:
        raw = next(islice(stream, error.line - 1, None), b"")
    if error.reason.startswith("not JSON") and not raw.endswith(b"\n"):
        return BadInput(f"{error.reason}; the line is cut short: was the file written to its end?", *_place(error))
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        return error
    if isinstance(row, dict) and "body" not in row and "url" not in row and "missing" in error.reason:
        return BadInput(f"{error.reason}: every line of a batch file is one request in batch format", *_place(error))
    return error


def _place(error: BadInput) -> tuple[str, int]:
    return error.path, error.line


def _with_old_outputs(workload: Workload, path: str, seed: int) -> Workload:
    """Answers from an old run's results, by custom_id; those not there are drawn from those that are."""
    old = Source.open(path)
    if old.kind() == SCENARIO or old.kind() == TRACE_CSV:
        raise BadInput("this is not a results file (JSONL, one line per request)", path)
    counts: Counter[str] = Counter()
    outputs: dict[str, int] = {}
    try:
        with old.stream() as stream:
            for result in read_results(stream, path):
                if _is_answer(result):
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
    # How long a cut answer would have become is not known: one token more makes it a cut one again.
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


def _is_answer(result: OldResult) -> bool:
    return result.output_tokens >= 0 and (result.status == 0 or 200 <= result.status < 300)


# ---------------------------------------------------------------- traces

_FROM_ROLE = {role: column for role, column in OUR_COLUMNS.items() if role in WHOLES[3:]} | {"endpoint": "endpoint"}


def _trace(source: Source, rows: Rows, table: Table, max_tokens: int | None, first: int) -> Workload:
    name = source.label
    prompts = table["prompt"]
    count = len(prompts)
    outputs = table.get("output", constant(0, count))
    given: dict[str, Any] = {
        column: np.asarray(table[role], np.int64) for role, column in _FROM_ROLE.items() if role in table
    }
    if "id" in table:
        given["custom_ids"] = table["id"]
    if "model" in table:
        models = table["model"]
        given["models"] = models[0] if len(set(models)) == 1 else models
    provenance: Provenance = {
        "requests": (MEASURED, _rows_text(name, count, first)),
        "prompt tokens": (MEASURED, _column_text(name, rows, "prompt")),
    }
    if "chars" not in table:
        provenance["prompt sizes"] = (ASSUMED, "one message of 4 characters per token")
    if "output" in table:
        provenance["output tokens"] = (MEASURED, _column_text(name, rows, "output"))
    cap, provenance["output cap"] = _trace_cap(name, rows, table, outputs, max_tokens)
    if "latency" in table and (table["latency"] >= 0.0).any():
        given["recorded_s"] = table["latency"]
        recorded = int((table["latency"] >= 0.0).sum())
        provenance["latency"] = (MEASURED, f"{_column_text(name, rows, 'latency')}, {recorded:,} of {count:,} rows")
    order = None
    if "arrival" in table:
        column = rows.roles["arrival"]
        ours = column.name == OUR_COLUMNS["arrival"] and not rows.dates
        arrival_s = arrival_seconds(table["arrival"], bool(rows.dates), column.unit, ours)
        if not (arrival_s >= 0.0).all():
            raise BadInput(f"column {quoted(column.name)} holds arrivals before 0", source.name)
        text = _column_text(name, rows, "arrival")
        if (np.diff(arrival_s) < 0.0).any():
            order = np.argsort(arrival_s, kind="stable")
            text += "; the rows were not in order of arrival and have been sorted"
        given["arrival_s"] = arrival_s
        provenance["arrivals"] = (MEASURED, text)
    workload = from_tokens(prompts, outputs, max_tokens=cap, provenance=provenance, **given)
    return workload if order is None else workload.take(order)


def _column_text(name: str, rows: Rows, role: str) -> str:
    return f"column {rows.roles[role].name} of {name}"


def _trace_cap(
    name: str, rows: Rows, table: Table, outputs: Any, max_tokens: int | None
) -> tuple[Any, tuple[str, str]]:
    """The declared output cap of a trace's rows, and where it comes from."""
    if max_tokens is None and "max_tokens" in table:
        return table["max_tokens"], (MEASURED, _column_text(name, rows, "max_tokens"))
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
    **{role: role for role in ("max_tokens", *WHOLES[3:])},
}


def save_rows(workload: Workload, path: Path) -> None:
    """Writes the workload as a CSV that `read_workload` reads back exactly; the file appears whole or not at all."""
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
