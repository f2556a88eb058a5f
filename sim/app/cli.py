"""The `paceline` command: every command in its group, and the one place where an error becomes a line and an exit code.

Exit codes: 0, 2 for bad input, 3 if nothing can meet a requirement (`capacity`), 130 after Ctrl-C, 143 and 129 after
SIGTERM and SIGHUP, 141 if the reader of a pipe has gone; the others are the live commands'
(`governor/model/errors.py`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from governor.cli.app import FORECAST, JUDGE, WHAT_IF
from governor.cli.app import app as governor_app
from governor.model.errors import PacelineError
from sim.app.calibrate_command import calibrate
from sim.app.notebook_command import notebook
from sim.app.planning_commands import app as planning_app
from sim.serving.provider_command import provider

if TYPE_CHECKING:
    from governor.forecast.forecast import Expectation, Outlook
    from governor.provider.probe import ProbeAnswer, WindowProbe

_NEEDS_SIM = "planning needs paceline[sim]: pip install 'paceline[sim]'"
INTERRUPTED, TERMINATED, HUNG_UP, PIPE_CLOSED, _BAD_INPUT = 130, 143, 129, 141, 2

# The groups of `paceline --help`, in the order in which a user meets them. A test holds that each command is in one.
GROUPS = {
    "Plan": ("simulate", "plan", "apply", "settings", "sensitivity", "capacity", "split"),
    "Run": ("doctor", "profiles", "preflight", "run", "export"),
    "Steer a run": ("status", "pause", "resume", "set", "unset"),
    "Learn": ("probe", "calibrate", "backtest", "replay", "shadow", "verify", "notebook"),
    "Serve": ("serve", "token", "provider", "purge"),
}


class _Grouped(TyperGroup):
    """Lists the commands by group."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        grouped = {name for names in GROUPS.values() for name in names}
        others = tuple(name for name in self.list_commands(ctx) if name not in grouped)
        width = max(len(name) for name in self.commands)
        for title, names in {**GROUPS, "Other": others}.items():
            found = [(name, self.commands[name]) for name in names if name in self.commands]
            rows = [
                (name.ljust(width), command.get_short_help_str(formatter.width - width - 6))
                for name, command in found
                if not command.hidden
            ]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


app = typer.Typer(
    name="paceline",
    cls=_Grouped,
    help="Plan a batch of LLM calls before it costs anything, then run it with the settings that the plan proved.",
    epilog="Start with: paceline simulate requests.jsonl --env-file .env",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    # Plain text: panels cut long option names short on an ordinary terminal.
    rich_markup_mode=None,
)
app.add_typer(planning_app)
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
        raise typer.Exit(_BAD_INPUT)
    # The forecast that a live run asks for; `governor` does not import the simulator.
    context.obj = _foresee
    if find_spec("numpy") is not None:
        from sim.app.side_process import SideProcess

        beside = SideProcess()
        context.meta[FORECAST], context.meta[WHAT_IF] = beside.forecast, beside.what_if
        context.meta[JUDGE] = _judge


def _judge(knocks: Sequence[WindowProbe], tpm: float, rpm: float) -> list[ProbeAnswer]:
    from sim.calibration.fits_window import judged

    return judged(knocks, tpm, rpm)


def _foresee(outlook: Outlook) -> Expectation:
    from sim.validation.run_forecast import foresee

    return foresee(outlook)


# ---------------------------------------------------------------- errors and exit codes


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; whatever a user can mend is one line on stderr, without traceback."""
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
        return _failed(_usage(error), _BAD_INPUT)
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
        return _failed(f"the output cannot be written: {error.strerror}: what was done stays done", _BAD_INPUT)
    except KeyboardInterrupt:
        return _failed("interrupted: no file was left unfinished", INTERRUPTED)
    except _Terminated as signalled:
        return _failed("terminated: no file was left unfinished", 128 + signalled.number)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "governor", "sim"):
            raise
        return _failed(_NEEDS_SIM, _BAD_INPUT)
    finally:
        _drained()


def _open_streams() -> None:
    """Discard what is written to standard output or error if it is closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (as long as the process)


def _drained() -> None:
    """Drop what a stream that cannot be written still holds: the interpreter's last flush would turn the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def _usage(error: Any) -> str:
    """Return what is wrong with the command line, and which help to read."""
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
