"""What the planning commands share: their options as they are typed, how values are read, and how results are shown."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from functools import wraps
from typing import Annotated, Any, Literal, get_type_hints

import typer

from governor.model.errors import BadSetting
from governor.model.phrases import whole_number
from governor.model.words import counting, seconds_of, until_s

count = counting()


def quantiles(text: str) -> tuple[float, float]:
    """`P50,P95` of `--output-tokens`, two numbers from 1 up in this order."""
    words = text.split(",")
    try:
        p50, p95 = (whole_number(word) or float(word) for word in words)
    except ValueError:
        raise BadSetting(f"--output-tokens {text!r} is not P50,P95: write for example 250,900") from None
    if not 1.0 <= p50 <= p95 < 1e8:
        raise BadSetting(f"--output-tokens {text!r}: P50 and P95 must be tokens from 1 up, P95 not below P50")
    return p50, p95


def duration_s(text: str) -> float | None:
    """Return the seconds of a duration above 0: 6h, 90m, 90min, 1h30m, 45s, 2d, 1.5h; None for anything else."""
    try:
        return seconds_of(text, "it")
    except BadSetting:
        return None


def finish_by_s(text: str, now: datetime | None = None) -> float:
    """Return the seconds from `now` (default: the clock) to a wanted end: a duration, or a time of day (`until_s`)."""
    try:
        return until_s(text, "it", now)
    except BadSetting:
        raise typer.BadParameter(
            f"{text!r} is neither a duration above 0 (6h, 90m, 1h30m) nor a time of day (06:00, 06:00+02:00)"
        ) from None


def wait_s(text: str) -> float:
    """Return the seconds of a duration: 30s, 2m."""
    seconds = duration_s(text)
    if seconds is None:
        raise typer.BadParameter(f"{text!r} is not a duration above 0 (30s, 2m)")
    return seconds


def share(text: str) -> float:
    """Return a share from 0 to 1: 0.01, or 1%."""
    word = text.strip()
    try:
        value = float(word[:-1]) / 100.0 if word.endswith("%") else float(word)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise typer.BadParameter(f"{text!r} is not a share from 0 to 1 (0.01, or 1%)")
    return value


FinishBy = Annotated[
    float | None,
    typer.Option(
        metavar="6h|06:00",
        parser=finish_by_s,
        help="Deadline: a duration from the start, or the next such time of day.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options that `simulate`, `plan` and `capacity` share; None and empty = not given."""

    workload: Annotated[
        str,
        typer.Argument(
            metavar="WORKLOAD",
            help="Requests in OpenAI's batch format (JSONL), a trace with token counts (CSV, JSONL), a scenario "
            "(YAML), the journal of a run, or - for standard input.",
            show_default=False,
        ),
    ]

    first: Annotated[int, typer.Option(metavar="N", parser=count, help="Only the first N rows; 0 = all.")] = 0
    arrivals: Annotated[
        Literal["batch", "trace"] | None,
        typer.Option(help="All requests at the start (the default), or at the times of the trace."),
    ] = None
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=NAME,...",
            help="Which column of a trace is what: prompt, output, arrival (arrival=NAME:ms), max_tokens, latency, "
            "id, model; Azure's, vidur's and Mooncake's names are known.",
        ),
    ] = None
    pool: Annotated[
        str, typer.Option(metavar="NAME", help="The pool of a journal that has several, each with its own quota.")
    ] = ""
    pools: Annotated[
        str,
        typer.Option(
            metavar="FILE.yaml", help="Of `simulate` and `plan`: several quotas, as `paceline run` takes them."
        ),
    ] = ""
    outputs_from: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Answer lengths from an old run's results, by custom_id.",
        ),
    ] = None
    output_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="P50,P95",
            help="Answer lengths drawn from a log-normal with these quantiles.",
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=counting(-1, 10**8),
            help="The output cap that every row of a trace declares; -1 = none.",
        ),
    ] = None
    file_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=count,
            help="Tokens assumed for each file, recording, stored prompt or earlier response that a request of a batch "
            "only points to (5k if not given).",
        ),
    ] = None
    skip_oversized: Annotated[
        bool,
        typer.Option(
            "--skip-oversized",
            help="Leave out requests that are charged more than the limit; else they are an error.",
        ),
    ] = False

    env_file: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Today's settings (see `paceline settings`); other names in the file are ignored. Without it, the "
            "environment's. May be repeated: a later file wins.",
        ),
    ] = None
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="One setting on top; may be repeated."),
    ] = None
    finalize: Annotated[
        bool | None,
        typer.Option(
            help="Finish answers that were cut off without text by one more call.",
            show_default=False,
        ),
    ] = None

    tpm: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=count,
            help="Tokens per minute that the provider grants, 0 = no limit; OPENAI_TPM_LIMIT follows unless set.",
        ),
    ] = None
    rpm: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=count,
            help="Requests per minute that it grants, 0 = no limit; OPENAI_RPM_LIMIT follows unless set.",
        ),
    ] = None
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.yaml",
            help="The provider's profile, in place of PACELINE_PROFILE: how it counts, charges and refuses.",
        ),
    ] = None
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET|FILE",
            help="The provider's habits: a YAML file, or a published tier such as gpt-4o-tier2.",
        ),
    ] = None
    provider_charge: Annotated[
        Literal["auto", "prompt_chars4", "prompt_plus_max", "max_of", "responses", "fixed"] | None,
        typer.Option(
            metavar="RULE",
            help="How many tokens an admission takes: auto (as measured), prompt_chars4, prompt_plus_max, max_of, "
            "responses, fixed.",
        ),
    ] = None
    provider_settles: Annotated[
        bool | None,
        typer.Option(help="Whether real use replaces the charge on completion.", show_default=False),
    ] = None
    latency: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Time of an answer, as measured for gpt-4o, gpt-4o-mini, gpt-4.1, ...; or seconds to the first token "
            "and per token (0.6,0.008). If not given: that of the requests' own model, else gpt-4o.",
        ),
    ] = None

    seed: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, max=2**32 - 1, help="Seed of the first run."),
    ] = None
    replications: Annotated[
        int | None,
        typer.Option(metavar="N", parser=counting(1, 10**6), help="How many runs to simulate, each with its own seed."),
    ] = None
    workers: Annotated[
        int,
        typer.Option(metavar="N", min=0, max=1024, help="How many runs to make in parallel; 0 = one per core."),
    ] = 0
    engine: Annotated[
        Literal["auto", "compiled", "simpy"],
        typer.Option(
            help="What simulates: machine code or SimPy, with the same figures to the last bit; auto is the first if "
            "numba is installed."
        ),
    ] = "auto"
    backend: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Where to simulate: on this machine, or on the Ray cluster that RAY_ADDRESS names."),
    ] = "local"
    json: AsJson = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _OtherSettings:
    """The options of commands that repeat a run under other settings. `replications`: 0 = some seconds of runs."""

    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One setting on top; may be repeated.")
    ] = None
    tpm: Annotated[int | None, typer.Option(metavar="N", min=1, help="The provider's tokens per minute.")] = None
    replications: Annotated[
        int, typer.Option(metavar="N", min=0, max=10_000, help="Runs to simulate; 0 = as many as need some seconds.")
    ] = 0
    json: AsJson = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions(_OtherSettings):
    """The options of `replay`."""

    env_file: Annotated[str | None, typer.Option(metavar="FILE", help="Other settings, on top of the run's own.")] = (
        None
    )
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="TIER|FILE.yaml",
            help="The provider to assume; else the one that explains the run best, as believed or as learnt from it.",
        ),
    ] = None
    pairs: Annotated[
        str | None, typer.Option(metavar="FILE.csv", help="When each request ended, and when it would have.")
    ] = None
    columns: Annotated[
        str, typer.Option(metavar="ROLE=NAME,...", help="Columns of a log; a time may carry a unit: latency=took:ms.")
    ] = ""
    arrivals: Annotated[
        Literal["batch", "trace"] | None,
        typer.Option(help="Of a log: all requests there at the start, or as it says (the default where it does)."),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowOptions(_OtherSettings):
    """The options of `shadow`."""

    env_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Today's settings; without it, the environment's.")
    ] = None
    provider: Annotated[
        str | None,
        typer.Option(metavar="TIER|FILE.yaml", help="The provider to assume; else the one learnt from the calls."),
    ] = None
    recommended: Annotated[
        str | None, typer.Option(metavar="FILE.env", help="Settings to compare with, in place of planning.")
    ] = None
    out: Annotated[str | None, typer.Option(metavar="FILE.env", help="Where the plan's settings go.")] = None


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all fields of its first argument's class as options of its own; they reach it as one object.

    Typer reads a function's signature, so the signature is made of both: no option stands twice in the source.
    """
    given, *own = inspect.signature(command, eval_str=True).parameters.values()
    kind = given.annotation
    hints = get_type_hints(kind, include_extras=True)
    shared = [stated.replace(annotation=hints[name]) for name, stated in inspect.signature(kind).parameters.items()]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    names = [field.name for field in fields(kind)]

    @wraps(command)
    def run(**values: Any) -> None:
        command(kind(**{name: values.pop(name) for name in names}), **values)

    run.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*shared, *own)}
    return run


# ---------------------------------------------------------------- results


def width() -> int:
    """Return the columns for text: the terminal's, or a fixed number in a pipe, so that logs look alike everywhere."""
    return max(60, min(140, shutil.get_terminal_size((110, 24)).columns)) if sys.stdout.isatty() else 110


def show_result(given: Options, found: dict[str, Any], text: str, notes: Sequence[str]) -> None:
    """Print the result to stdout, as JSON or as text, and what to be careful about to stderr."""
    from sim.reporting.terminal import notes_text

    if notes:
        typer.echo(notes_text(notes, width()), err=True)
    show(found, text, as_json=given.json)


def show(found: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print the result to stdout, as JSON or as text."""
    from sim.reporting.terminal import plain

    print(json.dumps(plain(found), indent=2, allow_nan=False) if as_json else text, flush=True)
