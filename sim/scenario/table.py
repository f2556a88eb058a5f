"""Rows of logs and traces as arrays by role.

Theory of operation. Every row comes as (path, value) pairs, and each path is looked up once in the table of roles
(`columns`). Values go into arrays block by block: a million rows take some seconds and stay under 500 MB. Rows that
are no attempt at a model call are skipped and counted: spans of other work (an agent's span sums up its calls) and
answers from a gateway's cache. Every error is one `BadInput`: `file:line:`, then the column, the value and the remedy.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from governor.model.errors import BadInput, quoted
from sim.model.workload import TOKENS_MAX
from sim.scenario.columns import (
    ANSWERED,
    COUNTS,
    DURATIONS,
    LOWEST,
    MOMENTS,
    OTHER,
    SECONDS_MAX,
    UNITS,
    WHOLES,
    Column,
    RoleColumns,
    amount_of,
    is_absent,
    kind_of_attempt,
    moment_of,
    number_of,
    span_status_of,
    status_of,
    text_of,
    unit_words,
    whole_of,
)
from sim.scenario.rows import NamedBytes, Pairs, pairs_of

BLOCK_ROWS = 2_048
# Kinds of spans that are not model calls, even if they state usage.
NOT_CALLS = (
    *("span", "event", "chain", "tool", "retriever", "agent", "workflow", "task", "guardrail", "evaluator", "parser"),
    *("prompt", "reranker", "retrieval", "invoke_agent", "create_agent", "execute_tool", "invoke_workflow", "decision"),
)
CACHED = ("true", "hit", "semantic hit", "1")
OUT = {
    "spans": "spans are not of a model call and are left out",
    "cached": "calls were answered from a cache and are left out",
    "silent": "calls state no usage: their lengths are taken from the others",
}


class Table:
    """Rows read as arrays and lists by role, all of one length. `columns`: the column that first played each role.

    `numbers`: -1 = not stated; moments as `columns.moment_of` counts them, in `units`. `texts`: "" = not stated.
    `kinds`: how each attempt ended; `has_kinds`: whether the rows state it. `out`: number of skipped rows by reason.
    """

    def __init__(self, source: str, chosen: Mapping[str, str], *, drawn: bool = False) -> None:
        self.source = source
        self.names = RoleColumns(chosen)
        self.columns: dict[str, Column] = {}
        self.numbers: dict[str, Any] = {}
        self.texts: dict[str, list[str]] = {}
        self.units: dict[str, str] = {}
        self.lines: Any = array("q")
        self.kinds: Any = array("b")
        self.has_kinds = False
        self.out: Counter[str] = Counter()
        self._needed = ("prompt",) if drawn else ("prompt", "output")
        self._block: list[tuple[int, dict[str, tuple[Any, Column]]]] = []
        self._shared: dict[str, str] = {}
        self._batch_line = 0

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, rows: Iterable[tuple[int, Pairs]], first: int) -> None:
        """Read the rows, at most `first` of them (0 = all). Raise BadInput at the first error."""
        stream = iter(rows)
        head = list(islice(stream, BLOCK_ROWS))
        names = list(dict.fromkeys(name for _, pairs in head for name, _ in pairs))
        self.names.begin(names)
        self._check_names()
        taken = 0
        for line, pairs in chain(head, stream):
            taken += self._take(line, pairs)
            if taken == first and first:
                break
        self._flush()
        self.numbers = {role: np.frombuffer(values, np.float64) for role, values in self.numbers.items()}
        self.lines, self.kinds = np.frombuffer(self.lines, np.int64), np.frombuffer(self.kinds, np.int8).copy()
        if not len(self):
            spans = "no span of a model call in it (gen_ai.usage.* or prompt_tokens)"
            raise BadInput(spans if self.names.marked or self.out else "no rows in it", self.source)
        latency = self.columns.get("latency")
        if (
            latency is not None
            and latency.name.lower() == "response_time"
            and {"launched", "finished"} <= self.units.keys()
        ):
            # LiteLLM puts the time to the first token of a streamed answer there.
            del self.numbers["latency"]
        self._check_needed()

    def _check_names(self) -> None:
        found = ", ".join(quoted(name, 30) for name in self.names.names[:12])
        found += ", ..." if len(self.names.names) > 12 else ""
        for role, name in self.names.missing:
            raise BadInput(f"there is no column {quoted(name)} for {role}: found {found}", self.source, 1)
        there = {column.role for name in self.names.names for column in self.names.of(name)}
        missing = [role for role in self._needed if role not in there]
        if missing and self.names.names and not self.names.marked:
            remedy = ",".join(f"{role}=NAME" for role in missing)
            what = " and ".join(missing)
            raise BadInput(f"no column of {what} tokens: found {found}; name it: --columns {remedy}", self.source, 1)

    def _take(self, line: int, pairs: Pairs) -> bool:
        """Take one row; return whether it was an attempt."""
        best: dict[str, tuple[Any, Column]] = {}
        of = self.names.of
        for name, value in pairs:
            columns = of(name)
            # Words for "none" are short, so longer texts need no lookup.
            if not columns or ((type(value) is not str or len(value) < 6) and is_absent(columns[0].role, value)):
                continue
            for column in columns:
                held = best.get(column.role)
                if held is None or column.rank < held[1].rank:
                    best[column.role] = value, column
        why = self._left_out(best, line)
        if why:
            self.out[why] += 1
            return False
        if "prompt" not in best and not self._batch_line and any(name.startswith("body.") for name, _ in pairs):
            self._batch_line = line
        self._block.append((line, best))
        if len(self._block) == BLOCK_ROWS:
            self._flush()
        return True

    def _left_out(self, best: dict[str, tuple[Any, Column]], line: int) -> str:
        if "requests" in best:
            value, column = best["requests"]
            if (number_of(value) or 1.0) > 1.0:
                text = f"column {quoted(column.name)}: {quoted(value)} requests in one row: export one row per request"
                raise BadInput(text, self.source, line)
        if "kind" in best and str(best["kind"][0]).lower() in NOT_CALLS:
            return "spans"
        if self.names.marked and not any(role in best for role in ("prompt", "output", "model")):
            return "spans"
        return "cached" if "cache_hit" in best and str(best["cache_hit"][0]).lower() in CACHED else ""

    # ------------------------------------------------------------ blocks of rows

    def _flush(self) -> None:
        block, count = self._block, len(self.lines)
        self._block = []
        self.lines.extend(line for line, _ in block)
        self.kinds.extend(self._kind(line, best) for line, best in block)
        for role in dict.fromkeys(chain(self.columns, (role for _, best in block for role in best))):
            held = [best.get(role) for _, best in block]
            if role not in self.columns:
                self.columns[role] = next(pair[1] for pair in held if pair is not None)
            if role in ("id", "model", "lane"):
                texts = self.texts.setdefault(role, [""] * count)
                for pair, (line, _) in zip(held, block, strict=True):
                    texts.append("" if pair is None else self._text(pair, line))
            elif role in WHOLES or role in DURATIONS or role in MOMENTS or role in COUNTS or role == "endpoint":
                empty = 0.0 if role == "endpoint" else -1.0
                numbers = self.numbers.setdefault(role, array("d", [empty]) * count)
                plain = None if role in MOMENTS or role == "endpoint" else _plain_numbers(role, held)
                if plain is not None:
                    numbers.frombytes(plain.tobytes())
                    continue
                for pair, (line, _) in zip(held, block, strict=True):
                    numbers.append(empty if pair is None else self._checked(line, pair, self._number))

    def _number(self, value: Any, column: Column) -> float:
        role = column.role
        if role in WHOLES:
            return whole_of(role, value)
        if role == "endpoint":
            return float(text_of(role, value))
        if role not in MOMENTS:
            return amount_of(role, column.unit, value)
        seen, number = moment_of(value, column.unit)
        if number == -1.0:
            return number
        first = self.units.setdefault(role, seen)
        if seen != first:
            raise ValueError(f"is in {unit_words(seen)} among values in {unit_words(first)}: one unit per column")
        return number

    def _text(self, pair: tuple[Any, Column], line: int) -> str:
        value, column = pair
        if type(value) is not str:
            value = str(self._checked(line, pair, lambda value, column: text_of(column.role, value)))
        # Many rows share a few models and lanes; ids are unique to a row.
        return value if column.role == "id" else self._shared.setdefault(value, value)

    def _kind(self, line: int, best: dict[str, tuple[Any, Column]]) -> int:
        """Return how the attempt ended. An answered attempt without usage shows only that it was made."""
        status, pair = -1, best.get("status")
        if pair is not None:
            of_span = pair[1].name.endswith("status.code")
            status = int(self._checked(line, pair, lambda v, _: span_status_of(v) if of_span else status_of(v)))
        outcome, error = (str(best[role][0]).strip() if role in best else "" for role in ("outcome", "error"))
        self.has_kinds = self.has_kinds or bool(outcome or error) or pair is not None
        kind = kind_of_attempt(outcome, status, error)
        if kind != ANSWERED:
            # A failed call has no output, and states 0 prompt tokens because no answer reported them.
            best.pop("output", None)
            if number_of(best.get("prompt", (None,))[0]) == 0.0:
                del best["prompt"]
        elif self.names.marked and ("prompt" not in best or "output" not in best):
            self.out["silent"] += 1
            kind = OTHER
        return kind

    def _checked(self, line: int, pair: tuple[Any, Column], convert: Callable[[Any, Column], Any]) -> Any:
        value, column = pair
        try:
            return convert(value, column)
        except ValueError as error:
            raise BadInput(f"column {quoted(column.name)}: {quoted(value)} {error}", self.source, line) from None

    def _check_needed(self) -> None:
        answered = self.kinds == ANSWERED
        for role in self._needed:
            missing = answered & (self.numbers[role] < 0.0) if role in self.numbers else answered
            if not missing.any():
                continue
            line = int(self.lines[np.argmax(missing)])
            if line == self._batch_line:
                raise BadInput("a request in batch format among rows of a trace: one kind per file", self.source, line)
            playing = (c.name for name in self.names.names for c in self.names.of(name) if c.role == role)
            name = self.columns[role].name if role in self.columns else next(playing, role)
            text = f"column {quoted(name)} has no value here"
            if not self.has_kinds:
                text += "; where requests failed, name the column that says so: --columns status=NAME"
            raise BadInput(text, self.source, line)

    def notes(self, label: str) -> tuple[str, ...]:
        """Return one sentence for each kind of skipped row."""
        return tuple(f"{label}: {self.out[why]:,} {text}" for why, text in OUT.items() if self.out[why])


def _plain_numbers(role: str, held: list[tuple[Any, Column] | None]) -> NDArray[np.float64] | None:
    """Convert a block of one column at once; return None if any value must be parsed singly."""
    if None in held:
        return None
    values = [pair[0] for pair in held if pair is not None]
    units = {pair[1].unit for pair in held if pair is not None}
    kinds = set(map(type, values))
    if len(units) > 1 or not (kinds <= {str} or kinds <= {int, float}):
        return None
    try:
        numbers = np.fromiter(map(float, values), np.float64, len(values))
    except (ValueError, OverflowError):
        return None
    if role in DURATIONS:
        numbers *= UNITS[units.pop() or "s"]
        most = SECONDS_MAX
    else:
        most = TOKENS_MAX if role in WHOLES else 1e18
        if role in WHOLES and (np.floor(numbers) != numbers).any():
            return None
    return numbers if ((numbers >= LOWEST.get(role, 0)) & (numbers <= most)).all() else None


def read_table(
    source: NamedBytes, kind: str, chosen: Mapping[str, str], *, first: int = 0, drawn: bool = False
) -> Table:
    """Return the rows of a source of `kind` "csv", "json" or "parquet". `drawn`: answer lengths are not needed."""
    table = Table(source.name, chosen, drawn=drawn)
    table.read(pairs_of(source, kind), first)
    return table
