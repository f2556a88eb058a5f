"""`run_batch`: rows in Python in, results out, by the same durable run as `paceline run`.

The rows become a batch file, hidden beside the journal, which is removed when the run ends. Everything else works as in
`paceline run`: the same call resumes where the last one ended, sends only what changed, and pays for nothing twice. The
run has a thread and a loop of its own, so that a program's loop, or a notebook's, is not held up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from governor.journal.journal import Journal
from governor.model.env_files import policy_of
from governor.model.errors import BadInput, BadSetting, BudgetExhausted, PacelineError, QuotaExhausted, Refused, quoted
from governor.model.estimate import TOKENS_PER_FILE, WHOLE_MAX
from governor.model.policy import Policy
from governor.model.pools import checked_url, default_pools
from governor.model.requests import CHAT, COMPLETIONS, URLS, endpoint_of, usage_of
from governor.profiles.loader import prices_in_force, profile_of, with_profile
from governor.provider.answers import text_of
from governor.provider.sending import connect_with
from governor.run.account import RunOutcome, lines_of, outcome_text
from governor.run.batch import Orders, run_orders
from governor.run.pool_run import RunOptions
from governor.run.spool import Spool
from governor.run.steer import Stopper
from governor.sharedquota.sharing import redis_url
from governor.telemetry.progress import Display, shown

Rows = Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]] | Any
Prompt = str | Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The result of one row. `row`: its number, from 0. `answer`: its text, "" if there is none.

    `body`: the whole response body, also of a refusal. `error`: the failure's code, "" = it succeeded; `message`: the
    reason. Tokens: -1 = the answer does not state them.
    """

    row: int
    custom_id: str
    answer: str
    body: Mapping[str, Any] | None
    error: str
    message: str
    prompt_tokens: int
    output_tokens: int

    @property
    def ok(self) -> bool:
        """Return whether it was answered."""
        return not self.error


def run_batch(
    rows: Rows,
    *,
    journal: str | os.PathLike[str],
    prompt: Prompt | None = None,
    model: str = "",
    body: Mapping[str, Any] | None = None,
    url: str = URLS[CHAT],
    policy: Policy | None = None,
    base_url: str = "",
    max_cost: float | None = None,
    retry_failed: bool = False,
    resend_changed: bool = False,
    skip_oversized: bool = False,
    file_tokens: int = TOKENS_PER_FILE,
    yes: bool = False,
    progress: bool = True,
    time_scale: float = 1.0,
) -> BatchResults:
    """Answer every row, durably: `async for result in run_batch(rows, journal="x.db")`, in the order of completion.

    `rows`: dicts, an iterator or async iterator of them, or a DataFrame (pandas, polars). Without `prompt` a row is a
    line of a batch file, or a request's body (`messages`, `input`, ...); with it a row is data: `prompt` is a template
    ("Summarise {text}") or a function of the row that returns text or messages. `body` and `model` are fields of every
    request, which a row's own override. A column `custom_id` names a row, else a DataFrame's index or the row's number.

    `journal`: where the run is recorded; the same call with it resumes, and first yields the rows already answered.
    `policy`: by default the environment's settings, as for `paceline run`; the other options are that command's.
    `progress`: a bar on a terminal or in a notebook, else a line every 30 s.

    Raise PacelineError for whatever `paceline run` refuses (BadInput for invalid rows), and after the last result, if
    the run stopped before its end, BudgetExhausted, QuotaExhausted or Refused. Ctrl-C lets requests in flight end, a
    second one cancels them; so does leaving the loop.
    """
    environment = dict(os.environ)
    url = url if url.startswith("/v1/") else f"/v1{url}"
    if endpoint_of(url) < 0:
        raise BadSetting(f"url {quoted(url)} is none that a batch can have: use one of {', '.join(URLS)}")
    if type(file_tokens) is not int or not 0 <= file_tokens <= WHOLE_MAX:
        raise BadSetting(f"file_tokens {file_tokens!r}: a whole number of tokens from 0 to {WHOLE_MAX:,}")
    if policy is not None and not isinstance(policy, Policy):
        raise BadSetting(f"policy {quoted(policy)} is no Policy: use Policy().with_(tpm_limit=450_000)", "policy")
    if max_cost is not None and not (isinstance(max_cost, int | float) and max_cost > 0.0):
        raise BadSetting(f"max_cost {quoted(max_cost)} is no amount: use US dollars above 0", "max_cost")
    if body is not None and not isinstance(body, Mapping):
        raise BadSetting(f"body {quoted(body)} is no dict: use the fields of every request", "body")
    if prompt is not None and not (isinstance(prompt, str) or callable(prompt)):
        raise BadSetting(f"prompt {quoted(prompt)} is neither a template nor a function of the row", "prompt")
    settings = policy or policy_of(None, environment=environment)
    where = str(os.fspath(journal))
    (pool,) = default_pools(settings, environment, checked_url(base_url, "base_url"))
    pool = with_profile(pool, environment)
    orders = Orders(
        requests=_spool_path(where),
        out=None,
        journal=where,
        pools=(pool,),
        environment=environment,
        prices=prices_in_force(None, profile_of(pool)),
        manner=RunOptions(max_cost=max_cost, insist=yes, time_scale=time_scale, redis=redis_url(environment)),
        yes=yes,
        skip_oversized=skip_oversized,
        file_tokens=file_tokens,
        retry_failed="" if retry_failed else None,
        resend_changed=resend_changed,
    )
    fields = {**({"model": model} if model else {}), **(body or {})}
    return BatchResults(_Lines(rows, prompt, fields, url), orders, shown(quiet=not progress))


def run_batch_sync(rows: Rows, *, journal: str | os.PathLike[str], **options: Any) -> BatchResults:
    """Run `run_batch` for scripts: return when all rows have ended; iterate over the results or call `to_frame()`.

    `options`: as for `run_batch`. `rows` must not be an async iterator.
    """
    results = run_batch(rows, journal=journal, **options)
    for _ in results:
        pass
    return results


def _spool_path(where: str) -> Path:
    """Return the path of a journal's batch file: hidden beside it, or in the working folder if it is a database."""
    place = Path("paceline.db" if "://" in where else where)
    return place.absolute().with_name(f".{place.name}.rows.jsonl")


# ---------------------------------------------------------------- rows to lines


class _Lines:
    """The rows as lines of a batch file. `numbers`: those of the rows written, by custom id, in their order."""

    def __init__(self, rows: Rows, prompt: Prompt | None, fields: Mapping[str, Any], url: str) -> None:
        self.rows = rows
        self.prompt = prompt
        self.fields = fields
        self.url = url
        self.numbers: dict[str, int] = {}
        # Only pandas' index counts: a list has an `index` too, and polars has none.
        self.index: Any = getattr(rows, "index", None) if hasattr(rows, "to_dict") else None

    def line(self, row: Any, label: object = None) -> str:
        """Return the line of the next row. Raise BadInput, naming the row, if it does not make a request."""
        number = len(self.numbers)
        if not isinstance(row, Mapping):
            raise BadInput(f"row {number} is a {type(row).__name__}: a row is a dict or a row of a DataFrame")
        # A DataFrame's empty cell is no name.
        custom_id = str(next(name for name in (row.get("custom_id"), label, number) if _is_stated(name)))
        if custom_id in self.numbers:
            first = self.numbers[custom_id]
            raise BadInput(f"row {number} has the name of row {first}, {quoted(custom_id)}: make custom_id unique")
        self.numbers[custom_id] = number
        if self.prompt is None and "body" in row:
            line = {"method": "POST", "url": self.url, **row, "custom_id": custom_id}
            line["body"] = {**self.fields, **row["body"]} if isinstance(row["body"], Mapping) else row["body"]
        else:
            asked = self._asked(row, number) if self.prompt is not None else _without(row, "custom_id")
            line = {"custom_id": custom_id, "method": "POST", "url": self.url, "body": {**self.fields, **asked}}
        try:
            return json.dumps(line, ensure_ascii=False, allow_nan=False, default=_plain)
        except (TypeError, ValueError) as error:
            raise BadInput(f"row {number} ({quoted(custom_id)}) is no JSON: {error}") from None

    def _asked(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Return the fields of the body that the prompt fills."""
        if callable(self.prompt):
            said = self.prompt(row)
            if not isinstance(said, (str, list)):
                raise BadInput(f"row {number}: the prompt returned {quoted(said)}: it must be text or a list")
        else:
            assert self.prompt is not None
            try:
                said = self.prompt.format_map(row)
            except KeyError as error:
                columns = ", ".join(str(name) for name in row)
                raise BadInput(
                    f"row {number} has no {quoted(str(error.args[0]))}, which the prompt names: it has {columns}"
                ) from None
            except (ValueError, IndexError, AttributeError) as error:
                raise BadInput(f"the prompt is no template: {error}; write {{{{ and }}}} for braces") from None
        endpoint = endpoint_of(self.url)
        if endpoint == CHAT:
            return {"messages": [{"role": "user", "content": said}] if isinstance(said, str) else said}
        return {"prompt" if endpoint == COMPLETIONS else "input": said}

    def pairs(self) -> Iterator[tuple[Any, object]]:
        """Yield every row with its label, None = it has none."""
        rows = self.rows
        if hasattr(rows, "iter_rows"):  # polars
            yield from ((row, None) for row in rows.iter_rows(named=True))
        elif hasattr(rows, "to_dict"):  # pandas
            yield from zip(rows.to_dict("records"), self.index, strict=True)
        elif isinstance(rows, Iterable) and not isinstance(rows, (str, bytes, Mapping)):
            yield from ((row, None) for row in rows)
        else:
            what = (
                "an async iterator, which needs run_batch" if isinstance(rows, AsyncIterable) else type(rows).__name__
            )
            raise BadInput(f"rows are {what}: give dicts, an iterator of dicts or a DataFrame")


def _without(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a row as a body, without the fields for which a DataFrame has no value."""
    return {key: value for key, value in row.items() if key != name and _is_stated(value)}


def _is_stated(value: Any) -> bool:
    """Return whether a cell holds a value: neither None nor NaN."""
    return value is not None and (not isinstance(value, float) or value == value)


def _plain(value: Any) -> Any:
    """Return NumPy's scalars and arrays, and dates, as JSON has them."""
    for convert in ("tolist", "isoformat"):
        if hasattr(value, convert):
            return getattr(value, convert)()
    raise TypeError(f"{type(value).__name__} cannot be sent")


# ---------------------------------------------------------------- the run, and its results

# The runs of this process, by their batch file.
_RUNS: dict[Path, tuple[Stopper, threading.Event]] = {}


class _Sink:
    """Hands lines of results from the run's thread to the reader."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[str | None] = SimpleQueue()
        self.arrived: Callable[[], object] = lambda: None

    def add(self, succeeded: bool, line: str) -> None:
        """Pass on one result; see `outputs.Follow`."""
        self.put(line)

    def put(self, line: str | None) -> None:
        """Pass on a line, or None: there are no more."""
        self.queue.put(line)
        with contextlib.suppress(RuntimeError):  # the reader's loop may be closed: no reason to end a paid run
            self.arrived()


class BatchResults:
    """The results of a batch, as they come: iterate over it, with `async for` or `for`, once for the run.

    When the run has ended, `summary` holds its figures, iterating again yields the results in the order of the rows,
    and `to_frame()` returns all of them as a DataFrame. If a loop is left early, the run stops when this object is
    deleted.
    """

    def __init__(self, lines: _Lines, orders: Orders, progress: Display) -> None:
        self._lines = lines
        self._sink = _Sink()
        self._stopper = Stopper()
        self._orders = replace(orders, manner=replace(orders.manner, follow=self._sink, stopper=self._stopper))
        self._shown = progress
        self._thread: threading.Thread | None = None
        self._run = _Run()
        self._taken = False
        self._spool = Spool(self._orders.requests, str(orders.journal))

    @property
    def summary(self) -> Any:
        """Return the figures of the run (`governor.forecast.summary.Summary`); None until it has ended."""
        return None if self._run.outcome is None else self._run.outcome.summary

    def __iter__(self) -> Iterator[BatchResult]:
        if self._taken:
            yield from self._read()
            return
        self._taken = True
        self._let_end()
        with self._spool as file:
            for row, label in self._lines.pairs():
                file.write(self._lines.line(row, label))
        self._start()
        try:
            while (line := self._sink.queue.get()) is not None:
                yield from self._numbered(line)
        except BaseException:
            self._end()
            raise
        self._finish()

    async def __aiter__(self) -> AsyncIterator[BatchResult]:
        if self._taken:
            for result in self._read():
                yield result
            return
        self._taken = True
        await asyncio.to_thread(self._let_end)
        with self._spool as file:
            if isinstance(self._lines.rows, AsyncIterable):
                async for row in self._lines.rows:
                    file.write(self._lines.line(row))
            else:
                for row, label in self._lines.pairs():
                    file.write(self._lines.line(row, label))
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        self._sink.arrived = lambda: loop.call_soon_threadsafe(arrived.set)
        self._start()
        try:
            while (line := await self._next(arrived)) is not None:
                for result in self._numbered(line):
                    yield result
        except (asyncio.CancelledError, GeneratorExit):
            self._stopper.press()
            while True:
                try:
                    while await self._next(arrived) is not None:
                        pass
                    break
                except asyncio.CancelledError:
                    self._stopper.press()
            raise
        self._finish()

    async def _next(self, arrived: asyncio.Event) -> str | None:
        """Return the next line; None = there are no more."""
        while self._sink.queue.empty():
            await arrived.wait()
            arrived.clear()
        return self._sink.queue.get()

    def to_frame(self) -> Any:
        """Return every row that has ended, as a pandas DataFrame: answer, error, message, tokens and body.

        Its index is that of the DataFrame given as rows, else the custom ids. Raise PacelineError without pandas.
        """
        try:
            import pandas
        except ImportError:
            raise PacelineError("to_frame() needs pandas: pip install pandas") from None
        results = list(self._read())
        names = [name for name in BatchResult.__slots__ if name not in ("row", "custom_id")]
        columns = {name: [getattr(result, name) for result in results] for name in names}
        found = [result.row for result in results]
        ids = list(self._lines.numbers)
        index = self._lines.index
        labels = index.take(found) if index is not None else pandas.Index([ids[i] for i in found], name="custom_id")
        return pandas.DataFrame(columns, index=labels)

    def _read(self) -> Iterator[BatchResult]:
        """Yield the results of requests that have ended, from the journal, in the order of the rows."""
        with Journal.open(self._orders.journal) as journal:
            found = [result for _, line in lines_of(journal) for result in self._numbered(line)]
        yield from sorted(found, key=lambda result: result.row)

    def _numbered(self, line: str) -> Iterator[BatchResult]:
        """Yield the result of a line; nothing for a row that is no longer among the rows."""
        data = json.loads(line)
        number = self._lines.numbers.get(data["custom_id"])
        if number is not None:
            yield _result_of(data, number)

    def _let_end(self) -> None:
        """Wait for a stopped run of the same journal in this process: its reader left the loop."""
        before = _RUNS.get(self._orders.requests)
        if before is not None and before[0].pressed:
            before[1].wait()

    def _start(self) -> None:
        run = (self._run, self._orders, self._shown, self._sink, self._spool)
        # Not a daemon: a program must not end while answers that are paid for are not yet written.
        self._thread = threading.Thread(target=_Run.work, args=run, name="batch", daemon=False)
        _RUNS[self._orders.requests] = self._stopper, self._run.ended
        self._thread.start()

    def _end(self) -> None:
        """Stop the run and wait for requests in flight; a second Ctrl-C cancels them."""
        # Not by Thread.join: up to Python 3.12 an interrupted one takes a running thread for ended.
        while not self._run.ended.is_set():
            with contextlib.suppress(KeyboardInterrupt):
                self._stopper.press()
                self._run.ended.wait()

    def _finish(self) -> None:
        """Raise, after the last result, the exception of the run's thread, or Incomplete."""
        assert self._thread is not None
        self._thread.join()
        if self._run.error is not None:
            raise self._run.error
        outcome = self._run.outcome
        if outcome is not None and outcome.pending:
            kinds: tuple[type[PacelineError], ...] = (QuotaExhausted, BudgetExhausted)
            kind = next((kind for kind in kinds if kind.exit_code == outcome.exit_code), Refused)
            raise kind(f"{outcome_text(outcome)}: the same call goes on with {outcome.journal}")

    def __del__(self) -> None:
        # A second press would cancel what is in flight.
        if not self._stopper.pressed:
            self._stopper.press()


class _Run:
    """The work of the run's thread and its outcome; holds no reference to the reader of the results."""

    def __init__(self) -> None:
        self.outcome: RunOutcome | None = None
        self.error: BaseException | None = None
        self.ended = threading.Event()

    def work(self, orders: Orders, progress: Display, sink: _Sink, spool: Spool) -> None:
        """Run the batch to its end, and tell the reader."""
        try:
            connect = connect_with(orders.environment)
            self.outcome = run_orders(orders, foresee=None, connect=connect, shown=progress)
            progress.inform(outcome_text(self.outcome))
        except BadInput as error:
            self.error = spool.of_rows(error)
        except BaseException as error:
            self.error = error
        finally:
            _RUNS.pop(orders.requests, None)
            spool.remove()
            self.ended.set()
            sink.put(None)


def _result_of(data: Mapping[str, Any], row: int) -> BatchResult:
    """Return a line of the batch output format as a result."""
    response, error = data["response"] or {}, data["error"] or {}
    content = response.get("body")
    found = content if isinstance(content, dict) else {}
    prompt, output = usage_of(found)
    return BatchResult(
        row=row,
        custom_id=data["custom_id"],
        answer="" if error else text_of(found),
        body=content,
        error=str(error.get("code", "")),
        message=str(error.get("message", "")),
        prompt_tokens=prompt,
        output_tokens=output,
    )
