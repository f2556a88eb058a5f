"""The `paceline` command: planning, and the commands of the live half mounted beside it.

Exit codes: 0, 2 for bad input, 3 where nothing can meet a wish (`capacity`), 130 after Ctrl-C, 143 and 129 after
SIGTERM and SIGHUP, 141 where the reader of a pipe has gone; the others are the live commands'
(`governor/model/errors.py`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.main import get_command

from governor.cli.app import FORECAST, JUDGE, WHAT_IF
from governor.cli.app import app as governor_app
from governor.model.errors import BadSetting, PacelineError
from sim.app.calibrate_command import calibrate
from sim.app.notebook_command import notebook
from sim.app.options import AsJson, FinishBy, Options, count, finish_by_s, round_trip_s, share, takes_options, wait_s
from sim.base.counting import counting
from sim.base.progress import Progress
from sim.serving.provider_command import provider

if TYPE_CHECKING:
    from governor.forecast.forecast import Expectation, Outlook
    from governor.forecast.summary import Summary
    from governor.model.requests import Attempt
    from governor.provider.probe import Knock, Told
    from sim.app.inputs import Inputs
    from sim.des.engines import Engine
    from sim.scenario.scenario import Scenario

app = typer.Typer(
    name="paceline",
    help="Plan a batch of LLM calls before it costs anything: how long it takes, how many 429s it draws, which "
    "settings would do better.",
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain text: panels cut long option names short on an ordinary terminal.
    rich_markup_mode=None,
)

NEEDS_REDIS = "--processes needs paceline[redis]: pip install 'paceline[redis]'"
NEEDS_SIM = "planning needs paceline[sim]: pip install 'paceline[sim]'"
INTERRUPTED, TERMINATED, HUNG_UP, PIPE_CLOSED, BAD_INPUT, CANNOT = 130, 143, 129, 141, 2, 3
# One run of so many requests takes long enough to show how far it is.
LONG_RUN = 50_000


# ---------------------------------------------------------------- commands


@app.command()
@takes_options
def simulate(
    given: Options,
    attempts: Annotated[
        str | None,
        typer.Option(metavar="FILE.csv|.parquet", help="One row per attempt, of the first run."),
    ] = None,
    timeline: Annotated[
        str | None,
        typer.Option(metavar="FILE.png", help="The first run as a picture."),
    ] = None,
    chrome_trace: Annotated[
        str | None,
        typer.Option(metavar="FILE.json", help="The first run for Perfetto: a lane per place in flight."),
    ] = None,
    processes: Annotated[
        int, typer.Option(metavar="N", min=0, max=64, help="The batch dealt out to N processes that share its quota.")
    ] = 0,
    store_rtt: Annotated[
        float, typer.Option(metavar="1ms", parser=round_trip_s, help="With --processes: how far away their store is.")
    ] = "1ms",  # type: ignore[assignment]
    crash_at: Annotated[
        float | None,
        typer.Option(metavar="5m", parser=finish_by_s, help="With --processes: when one of them dies."),
    ] = None,
) -> None:
    """What would happen under these settings.

    Finish time, 429s, requests lost, and the knob that holds the batch back; with --replications, how much runs differ.
    """
    from sim.app.inputs import pool_of
    from sim.app.outputs import check_file
    from sim.experiment.experiment import replicate_or_keep
    from sim.reporting import terminal as shown

    check_file(attempts, "--attempts", (".csv", ".parquet"))
    check_file(timeline, "--timeline", (".png",))
    check_file(chrome_trace, "--chrome-trace", (".json",))
    inputs = _inputs(given)
    scenario = inputs.scenario
    runs = scenario.replications or 1
    if processes:
        if attempts or timeline or chrome_trace or runs > 1 or scenario.arrivals == "trace":
            raise BadSetting(
                "--processes is for one run of a batch: leave out its files, --replications and --arrivals"
            )
        _result(given, *_shared(scenario, processes, store_rtt, crash_at), inputs.notes)
        return
    if attempts or timeline or chrome_trace or runs == 1:
        summary = _one_run(inputs, attempts, timeline, chrome_trace, given.engine)
        if runs == 1:
            text = shown.summary_text(scenario, summary, _width())
            _result(given, summary.to_json_dict(), text, inputs.notes)
            return
    with Progress("simulating", runs) as bar:
        pool = pool_of(given, bar)
        forecast, lost = replicate_or_keep(scenario, runs, pool=pool)
    _result(
        given, shown.forecast_json(scenario, forecast), shown.forecast_text(scenario, forecast, _width()), inputs.notes
    )
    if lost is not None:
        raise lost


@app.command()
@takes_options
def plan(
    given: Options,
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the report and the settings.")] = "out",
    objective: Annotated[
        Literal["makespan", "p95_latency"] | None,
        typer.Option(help="What should become short; makespan if not given."),
    ] = None,
    max_throttled_per_100: Annotated[
        float | None,
        typer.Option(metavar="X", min=0.0, help="429s per 100 requests, at most; 1 if not given."),
    ] = None,
    max_lost: Annotated[
        float | None,
        typer.Option(metavar="P", parser=share, help="Share of requests lost, at most; 0 if not given."),
    ] = None,
    finish_by: FinishBy = None,
    effort: Annotated[
        Literal["quick", "normal", "thorough"] | None,
        typer.Option(
            help="How long to search: about 0.6, 3 or 12 million simulated requests, 240 runs of a larger batch, "
            "at most 2, 10 or 60 minutes; normal if not given."
        ),
    ] = None,
    prices: Annotated[
        str | None,
        typer.Option(metavar="FILE.yaml", help="What models cost; a dated list comes with Paceline."),
    ] = None,
) -> None:
    """Find better settings, with the evidence.

    Two recommendations, one with the eight guardrail knobs alone and one with everything that Paceline can do. Into the
    folder go the report, the settings as env files, the way back, and a scenario that makes the same plan again. Ctrl-C
    ends the search and prints the best settings so far.
    """
    from sim.app.inputs import pool_of
    from sim.app.outputs import plan_json, prepared_folder
    from sim.app.plan_command import planned
    from sim.reporting import terminal as shown

    inputs = _inputs(given)
    scenario = inputs.scenario
    wishes = inputs.wishes.with_given(
        objective=objective,
        max_throttled_per_100=max_throttled_per_100,
        max_lost=max_lost,
        finish_by_s=finish_by,
        effort=effort,
        prices=None if prices is None else os.path.abspath(prices),
    )
    with prepared_folder(out) as folder, Progress("planning", _runs_foreseen(scenario, wishes.effort)) as bar:
        foreseen = _runs_foreseen(scenario, wishes.effort) * len(scenario.workload)
        pool = pool_of(given, bar, foreseen)
        found = planned(scenario, wishes, folder, notes=inputs.notes, pool=pool, say=bar.say)
    command, report = found.written.command, found.written.report
    text = f"{shown.plan_text(scenario, found.plan, _width())}\n\nagain: {command}\nreport: {report}"
    made = plan_json(scenario, wishes, found.plan, found.notes, command)
    _result(given, made, text, found.notes)


@app.command()
@takes_options
def sensitivity(
    given: Options,
    method: Annotated[
        Literal["morris", "sobol"],
        typer.Option(
            help="Changes in the figures' own units (morris), or shares of variance (sobol, ten times the runs)."
        ),
    ] = "morris",
    size: Annotated[
        int,
        typer.Option(
            metavar="N",
            parser=counting(0, 65_536),
            help="Trajectories (morris) or base samples (sobol, a power of 2) of the quantities; 0 = as many as usual.",
        ),
    ] = 0,
    near: Annotated[
        bool,
        typer.Option("--near", help="Only quantities within two steps of these settings, not all that a plan tries."),
    ] = False,
    objective: Annotated[
        Literal["makespan", "p95_latency"], typer.Option(help="What should become short.")
    ] = "makespan",
    figure: Annotated[str | None, typer.Option(metavar="FILE.png|.svg", help="The effects as a picture.")] = None,
) -> None:
    """Show which settings matter, and which can stay as they are.

    How much each quantity changes finish time, 429s and losses when it moves, and what each other rule or switch would
    change in place of the present one, with intervals.
    """
    from sim.app.inputs import pool_of
    from sim.app.outputs import check_file
    from sim.app.sensitivity_command import SIZES, runs_foreseen, sensed, sensitivity_text, write_figure

    check_file(figure, "--figure", (".png", ".svg"))
    size = size or SIZES[method]
    if size == 1:
        raise BadSetting("--size 1 leaves no interval: write 2 or more, or 0 for as many as usual")
    if method == "sobol" and size & (size - 1):
        raise BadSetting(f"--size {size} is no power of 2, which --method sobol needs: write {1 << size.bit_length()}")
    inputs = _inputs(given)
    scenario = inputs.scenario
    seeds = scenario.replications or 1
    runs = runs_foreseen(scenario, method, size, seeds)
    with Progress("moving each setting", runs) as bar:
        foreseen = runs * len(scenario.workload)
        pool = pool_of(given, bar, foreseen)
        found = sensed(scenario, objective, method=method, size=size, seeds=seeds, near=near, pool=pool)
    if figure:
        write_figure(figure, found)
    _result(given, found.to_json_dict(), sensitivity_text(scenario, found, _width()), inputs.notes)


@app.command()
@takes_options
def capacity(
    given: Options,
    finish_by: FinishBy = None,
    p95_wait: Annotated[
        float | None,
        typer.Option(
            metavar="30s",
            parser=wait_s,
            help="For steady traffic (--arrivals trace), in place of --finish-by: how long 95 % of requests may wait.",
        ),
    ] = None,
    how_many: Annotated[
        bool,
        typer.Option("--how-many", help="How many requests like these fit under the present limits, instead."),
    ] = False,
    confidence: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            parser=share,
            help="Share of runs that must be in time; 0.95 if not given.",
        ),
    ] = None,
    keep_settings: Annotated[
        bool,
        typer.Option("--keep-settings", help="Keep these settings; else they are tuned anew at each limit."),
    ] = False,
    tiers: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="Whose published tiers to try; the workload's model if not given.",
            show_default=False,
        ),
    ] = "",
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE.png", help="Finish time against the limit, as a picture."),
    ] = None,
    batch_queue: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=count,
            help="Compare with the Batch API, whose queue takes so many input tokens per model; 0 = no limit.",
        ),
    ] = None,
    batch_turnaround: Annotated[
        str | None,
        typer.Option(
            metavar="P50,P95",
            help="How long it takes over one file: an assumption, nobody publishes it; 4h,20h if not given.",
        ),
    ] = None,
    batch_discount: Annotated[
        float | None,
        typer.Option(metavar="P", parser=share, help="What it takes off the price; 50% if not given."),
    ] = None,
    cached_share: Annotated[
        float | None,
        typer.Option(
            metavar="P", parser=share, help="Share of prompt tokens that live runs find cached; 0 if not given."
        ),
    ] = None,
    prices: Annotated[
        str | None,
        typer.Option(metavar="FILE.yaml", help="Prices per model; those that come along if not given."),
    ] = None,
) -> None:
    """Which limit or tier finishes the batch in time.

    The smallest limit of tokens per minute, and the smallest published tier, at which it is done by then, with settings
    tuned to each. Exit code 3 where none is enough.
    """
    from sim.app.capacity_command import Asked, answered, terms_of

    asked = Asked(
        finish_by_s=finish_by,
        p95_wait_s=p95_wait,
        how_many=how_many,
        confidence=confidence,
        retune=not keep_settings,
        tiers=tiers,
        picture=out,
        batch=terms_of(batch_queue, batch_turnaround, batch_discount, cached_share),
        prices=prices,
    )
    asked.check()
    inputs = _inputs(given, fit=how_many)
    found = answered(given, inputs, asked, _width())
    _result(given, found.found, found.text, (*inputs.notes, *found.notes))
    if not found.enough:
        raise typer.Exit(CANNOT)


@app.command()
def backtest(
    journal: Annotated[str, typer.Argument(metavar="JOURNAL.db", help="The journal of a run.", show_default=False)],
    provider: Annotated[
        str | None,
        typer.Option(
            "--provider",
            "--scenario",
            metavar="TIER|FILE.yaml",
            help="The provider to assume, or a scenario that states one; what the run's forecast assumed if not given.",
        ),
    ] = None,
    tpm: Annotated[int | None, typer.Option(metavar="N", parser=counting(1), help="Its tokens per minute.")] = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Folder for the comparison.")] = None,
    replications: Annotated[
        int,
        typer.Option(
            metavar="N", parser=counting(0, 10_000), help="Runs to simulate; 0 = as many as need some seconds."
        ),
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """What the simulation would have predicted for a run, against what happened.

    From the journal it takes only what the run could not know beforehand: above all the length and time of each answer.
    """
    from sim.validation.backtest import backtest_command

    backtest_command(journal, as_json, out, provider=provider, tpm=tpm, replications=replications, width=_width())


@app.command()
def replay(
    source: Annotated[
        str,
        typer.Argument(
            metavar="JOURNAL.db|LOG", help="The journal of a run, or a log of another client.", show_default=False
        ),
    ],
    env_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Other settings, on top of the run's own.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="One other setting; may be repeated."),
    ] = None,
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="TIER|FILE.yaml",
            help="The provider to assume; else the one that explains the run best, as believed or as learnt from it.",
        ),
    ] = None,
    tpm: Annotated[int | None, typer.Option(metavar="N", min=1, help="Its tokens per minute.")] = None,
    pairs: Annotated[
        str | None, typer.Option(metavar="FILE.csv", help="When each request ended, and when it would have.")
    ] = None,
    replications: Annotated[
        int, typer.Option(metavar="N", min=0, max=10_000, help="Runs to simulate; 0 = as many as need some seconds.")
    ] = 0,
    columns: Annotated[
        str, typer.Option(metavar="ROLE=NAME,...", help="Columns of a log; a time may carry a unit: latency=took:ms.")
    ] = "",
    arrivals: Annotated[
        Literal["batch", "trace"] | None,
        typer.Option(help="Of a log: all requests there at the start, or as it says (the default where it does)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run would have been under other settings.

    Its very requests meet what they met then: answers, times, faults, other users of the quota. Without settings, the
    run is reproduced under its own.
    """
    from sim.app.replay_command import ReplayOptions, replayed

    options = ReplayOptions(
        env_file=env_file,
        assignments=assignments or (),
        provider=provider,
        tpm=tpm,
        runs=replications,
        pairs=pairs,
        columns=columns,
        arrivals=arrivals,
    )
    found, text = replayed(source, options, _width())
    _print(found, text, as_json=as_json)


@app.command()
def split(
    batch: Annotated[str, typer.Argument(metavar="BATCH.jsonl", help="Requests in OpenAI's batch format.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="A new or empty folder for the files.", show_default=False)],
    batch_queue: Annotated[
        int,
        typer.Option(metavar="N", parser=count, help="Input tokens that may be enqueued per model; 0 = no limit."),
    ] = "0",  # type: ignore[assignment]
    rest: Annotated[
        Literal["waves", "live"],
        typer.Option(help="What the queue cannot hold at once: further waves of files, or live.jsonl."),
    ] = "waves",
    live: Annotated[
        float, typer.Option(metavar="P", parser=share, help="Share of requests that goes into live.jsonl anyway.")
    ] = "0",  # type: ignore[assignment]
    file_tokens: Annotated[
        int,
        typer.Option(
            metavar="N", parser=count, help="Tokens assumed for each file and the like that a request only points to."
        ),
    ] = "5k",  # type: ignore[assignment]
    as_json: AsJson = False,
) -> None:
    """A batch as files for the Batch API.

    One model and one endpoint per file, at most 50,000 lines and 200 MB; the files of one wave fit into the queue
    together. All files appear at once, with a list of them, or none.
    """
    from sim.reporting.batch_text import split_text
    from sim.selection.split import split as write

    found = write(batch, out, queue_tokens=batch_queue, rest=rest, live_share=live, file_tokens=file_tokens)
    _print(found.to_json_dict(), split_text(found, _width()), as_json=as_json)


app.command()(calibrate)
app.command()(notebook)
app.command()(provider)
app.add_typer(governor_app)


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from governor import __version__

        typer.echo(f"paceline {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(BAD_INPUT)
    # What a live run asks before it starts; `governor` knows of no simulator.
    context.obj = _foresee
    if find_spec("numpy") is not None:
        from sim.app.side_process import Beside

        beside = Beside()
        context.meta[FORECAST], context.meta[WHAT_IF] = beside.forecast, beside.what_if
        context.meta[JUDGE] = _judge


# ---------------------------------------------------------------- steps


def _judge(knocks: Sequence[Knock], tpm: float, rpm: float) -> list[Told]:
    from sim.calibration.fits_window import judged

    return judged(knocks, tpm, rpm)


def _foresee(outlook: Outlook) -> Expectation:
    from sim.validation.foresight import foresee

    return foresee(outlook)


def _inputs(given: Options, *, fit: bool = True) -> Inputs:
    from sim.app.inputs import read_inputs
    from sim.des import engines

    engines.checked(given.engine)
    inputs = read_inputs(given, os.environ, fit=fit)
    notes = engines.checked(given.engine, learns=inputs.scenario.policy.charge_rule == "learned")
    return replace(inputs, notes=(*inputs.notes, *notes))


def _runs_foreseen(scenario: Scenario, effort: str) -> float:
    """About how many runs a plan will make."""
    from sim.selection.planner import EFFORTS, LEAST_RUNS

    n = len(scenario.workload)
    return max(EFFORTS[effort], LEAST_RUNS * n) / n


def _one_run(
    inputs: Inputs, attempts: str | None, timeline: str | None, chrome_trace: str | None, engine: Engine
) -> Summary:
    """The first run's `Summary`; its attempts go into the files that are named."""
    from sim.des.engines import simulated
    from sim.experiment.experiment import attempt_rows, case_of
    from sim.reporting import exports

    scenario = inputs.scenario
    n = len(scenario.workload)
    rows: list[Attempt] = []
    with contextlib.ExitStack() as files, Progress("simulating", n) as bar:
        takes: list[Callable[[Attempt], Any]] = []
        if attempts:
            takes.append(files.enter_context(exports.attempts_file(attempts)))
        if timeline or chrome_trace:
            takes.append(rows.append)
        if bar.shown and n >= LONG_RUN:
            takes.append(lambda attempt: bar.add(attempt.attempt == 1))
        sink = attempt_rows(scenario, lambda attempt: [take(attempt) for take in takes]) if takes else None
        case = case_of(scenario)
        summary = simulated(case, scenario.seed, sink, engine=engine).summary(case.grant)
    if timeline:
        exports.write_timeline(timeline, rows, scenario.grant())
    if chrome_trace:
        exports.write_chrome_trace(chrome_trace, rows)
    return summary


def _shared(scenario: Scenario, processes: int, rtt_s: float, crash_at: float | None) -> tuple[dict[str, Any], str]:
    """One run over several processes: as an object, and as text."""
    try:
        from sim.app.shared_quota import Arrangement, shared_run
    except ImportError as error:
        raise PacelineError(f"{NEEDS_REDIS} ({error.name} is missing)") from None
    from sim.reporting.terminal import shared_text

    arrangement = Arrangement(processes=processes, rtt_s=rtt_s, crash_at=float("inf") if crash_at is None else crash_at)
    run = shared_run(scenario, arrangement)
    return run.to_json_dict(), shared_text(scenario, run, _width())


def _width() -> int:
    """Columns for text: the terminal's, or a fixed number in a pipe, so that logs look alike everywhere."""
    return max(60, min(140, shutil.get_terminal_size((110, 24)).columns)) if sys.stdout.isatty() else 110


def _result(given: Options, found: dict[str, Any], text: str, notes: Sequence[str]) -> None:
    """The result on stdout, as an object or as text; what to be careful about on stderr."""
    from sim.reporting.terminal import notes_text

    if notes:
        typer.echo(notes_text(notes, _width()), err=True)
    _print(found, text, as_json=given.json)


def _print(found: dict[str, Any], text: str, *, as_json: bool) -> None:
    from sim.reporting.terminal import plain

    print(json.dumps(plain(found), indent=2, allow_nan=False) if as_json else text, flush=True)


# ---------------------------------------------------------------- errors and exit codes


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; whatever a user can mend is one line on stderr, without traceback."""
    usage_error: Any = typer.BadParameter.__mro__[2]
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        # What the encoding has no bytes for (in UTF-8 half of a surrogate pair) is no reason to end.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        with _ends_orderly():
            code = get_command(app)(args if args is None else list(args), prog_name="paceline", standalone_mode=False)
            sys.stdout.flush()
        if code == INTERRUPTED:
            return _failed("interrupted: no file was left unfinished", INTERRUPTED)
        return code if isinstance(code, int) else 0
    except PacelineError as error:
        return _failed(str(error), error.exit_code)
    except usage_error as error:
        return _failed(_usage(error), BAD_INPUT)
    except SystemExit as ended:
        # Typer ends a command whose reader has gone with 1, which here means that some requests failed.
        if isinstance(ended.__context__, BrokenPipeError):
            return PIPE_CLOSED
        raise
    except BrokenPipeError:
        return PIPE_CLOSED
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _failed(f"the output cannot be written: {error.strerror}: what was done stays done", BAD_INPUT)
    except KeyboardInterrupt:
        return _failed("interrupted: no file was left unfinished", INTERRUPTED)
    except _Terminated as signalled:
        return _failed("terminated: no file was left unfinished", 128 + signalled.number)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "governor", "sim"):
            raise
        return _failed(NEEDS_SIM, BAD_INPUT)
    finally:
        _drained()


def _open_streams() -> None:
    """Where standard output or error is closed, what is written there goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (as long as the process)


def _drained() -> None:
    """Leaves nothing in a stream that cannot be written: the interpreter's last flush would turn the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def _usage(error: Any) -> str:
    """What is wrong with the command line, and where to look."""
    # Without the words that pydantic, which checks Typer's values, puts before ours.
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{message} (see {context.command_path if context else 'paceline'} --help)"


def _failed(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(" ".join(message.split()), file=sys.stderr)
    return code


class _Terminated(BaseException):
    """SIGTERM or SIGHUP came: an exception, so that unfinished files are removed on the way out."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


@contextlib.contextmanager
def _ends_orderly() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise _Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]  # by `nohup`
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
