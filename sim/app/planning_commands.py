"""The planning commands: simulate, plan, sensitivity, capacity, backtest, replay, shadow, split.

Options as they are typed, and what they mean together. A command imports what it needs when it runs, so that `--help`
is instant and the live commands run without the extra `sim`.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

from governor.model.errors import BadSetting
from governor.model.words import counting
from sim.app.options import (
    AsJson,
    FinishBy,
    Options,
    ReplayOptions,
    ShadowOptions,
    count,
    share,
    show,
    show_result,
    takes_options,
    wait_s,
    width,
)
from sim.base.progress import Progress

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_CANNOT = 3


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
        typer.Option(metavar="FILE.png", help="Draw the first run."),
    ] = None,
    chrome_trace: Annotated[
        str | None,
        typer.Option(metavar="FILE.json", help="The first run for Perfetto: a lane per place in flight."),
    ] = None,
) -> None:
    """Show what would happen under these settings.

    Finish time, 429s, lost requests, and the setting that holds the batch back. With --replications, how much runs
    differ.

    Example: paceline simulate requests.jsonl --env-file .env
    """
    from sim.app.inputs import inputs_of, pool_of
    from sim.app.outputs import check_file
    from sim.experiment.experiment import replicate_or_keep
    from sim.reporting import exports
    from sim.reporting import terminal as shown

    if given.pools:
        from sim.app.pools import simulated_pools

        if attempts or timeline or chrome_trace:
            raise BadSetting("--attempts, --timeline and --chrome-trace are for one quota, without --pools", "--pools")
        show_result(given, *simulated_pools(given, width()))
        return
    check_file(attempts, "--attempts", (".csv", ".parquet"))
    check_file(timeline, "--timeline", (".png",))
    check_file(chrome_trace, "--chrome-trace", (".json",))
    inputs = inputs_of(given)
    scenario = inputs.scenario
    runs = scenario.replications or 1
    if attempts or timeline or chrome_trace or runs == 1:
        summary = exports.first_run(scenario, attempts, timeline, chrome_trace, given.engine)
        if runs == 1:
            text = shown.summary_text(scenario, summary, width())
            show_result(given, summary.to_json_dict(), text, inputs.notes)
            return
    with Progress("simulating", runs) as bar:
        pool = pool_of(given, bar)
        forecast, lost = replicate_or_keep(scenario, runs, pool=pool)
    show_result(
        given, shown.forecast_json(scenario, forecast), shown.forecast_text(scenario, forecast, width()), inputs.notes
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
        typer.Option(help="What to minimise; makespan if not given."),
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
            "never more than three times that; then up to 6,000 runs as proof. No new setting is tried after 2, 10 or "
            "60 minutes; normal if not given."
        ),
    ] = None,
    prices: Annotated[
        str | None,
        typer.Option(metavar="FILE.yaml", help="What models cost; a dated list comes with Paceline."),
    ] = None,
) -> None:
    """Find better settings, with the evidence.

    Makes two recommendations: one that changes only the eight guardrail settings, and one that uses everything. The
    folder receives the report, the settings as env files (and those of today, to go back to), and a scenario that
    repeats the plan. Ctrl-C ends the search and prints the best settings so far.

    Example: paceline plan requests.jsonl --env-file .env --finish-by 6h
    """
    from governor.model.files import prepared_folder
    from sim.app.inputs import inputs_of, pool_of
    from sim.app.outputs import plan_json, planned
    from sim.reporting import terminal as shown
    from sim.selection.planner import requests_foreseen

    asked = {
        "objective": objective,
        "max_throttled_per_100": max_throttled_per_100,
        "max_lost": max_lost,
        "finish_by_s": finish_by,
        "effort": effort,
        "prices": None if prices is None else os.path.abspath(prices),
    }
    if given.pools:
        from sim.app.inputs import PlanOptions
        from sim.app.pools import planned_pools

        with prepared_folder(out) as folder, Progress("planning", 1) as bar:
            result = planned_pools(given, PlanOptions().with_given(**asked), folder, bar, width())
        show_result(given, *result)
        return
    inputs = inputs_of(given)
    scenario = inputs.scenario
    plan_options = inputs.plan_options.with_given(**asked)
    foreseen = requests_foreseen(scenario, plan_options.effort)
    with prepared_folder(out) as folder, Progress("planning", foreseen / len(scenario.workload)) as bar:
        pool = pool_of(given, bar, foreseen)
        found = planned(scenario, plan_options, folder, notes=inputs.notes, pool=pool, say=bar.say)
    command, report = found.written.command, found.written.report
    front = f"\n\n{found.front.text(width())}" if found.front is not None else ""
    text = f"{shown.plan_text(scenario, found.plan, width())}{front}\n\nagain: {command}\nreport: {report}"
    made = plan_json(scenario, plan_options, found.plan, found.notes, command, found.front)
    show_result(given, made, text, found.notes)


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
    objective: Annotated[Literal["makespan", "p95_latency"], typer.Option(help="What to minimise.")] = "makespan",
    figure: Annotated[str | None, typer.Option(metavar="FILE.png|.svg", help="Draw the effects.")] = None,
) -> None:
    """Show which settings matter, and which can stay as they are.

    How much finish time, 429s and losses change as each quantity moves, and what each alternative rule or switch would
    change, with intervals.

    Example: paceline sensitivity requests.jsonl --env-file .env
    """
    from sim.app.inputs import inputs_of, pool_of
    from sim.app.outputs import check_file
    from sim.app.sensitivity_command import SIZES, runs_foreseen, sensed, sensitivity_text, write_figure

    check_file(figure, "--figure", (".png", ".svg"))
    size = size or SIZES[method]
    if size == 1:
        raise BadSetting("--size 1 leaves no interval: write 2 or more, or 0 for as many as usual")
    if method == "sobol" and size & (size - 1):
        raise BadSetting(
            f"--size {size} is not a power of 2, which --method sobol needs: write {1 << size.bit_length()}"
        )
    inputs = inputs_of(given)
    scenario = inputs.scenario
    seeds = scenario.replications or 1
    runs = runs_foreseen(scenario, method, size, seeds)
    with Progress("moving each setting", runs) as bar:
        foreseen = runs * len(scenario.workload)
        pool = pool_of(given, bar, foreseen)
        found = sensed(scenario, objective, method=method, size=size, seeds=seeds, near=near, pool=pool)
    if figure:
        write_figure(figure, found)
    show_result(given, found.to_json_dict(), sensitivity_text(scenario, found, width()), inputs.notes)


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
            help="Share of runs that must finish in time; 0.95 if not given.",
        ),
    ] = None,
    keep_settings: Annotated[
        bool,
        typer.Option("--keep-settings", help="Keep these settings instead of tuning them at each limit."),
    ] = False,
    tiers: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="Model whose published tiers to try; the workload's model if not given.",
            show_default=False,
        ),
    ] = "",
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE.png", help="Draw finish time against the limit."),
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
            help="How long one file takes: an assumption, no provider publishes it; 4h,20h if not given.",
        ),
    ] = None,
    batch_discount: Annotated[
        float | None,
        typer.Option(metavar="P", parser=share, help="Discount of the Batch API; by the price list if not given."),
    ] = None,
    cached_share: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            parser=share,
            help="Share of prompt tokens that live calls find cached; what the provider states if not given.",
        ),
    ] = None,
    prices: Annotated[
        str | None,
        typer.Option(metavar="FILE.yaml", help="Prices per model; a dated list comes with Paceline."),
    ] = None,
    reserved: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="Compare with provisioned units (PTU) of this model, as a profile prices them, the spill included.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Find the smallest limit or tier that meets a deadline.

    Both the smallest limit of tokens per minute and the smallest published tier, with settings tuned to each. The exit
    code is 3 if no limit is enough.

    Example: paceline capacity requests.jsonl --finish-by 6h
    """
    from sim.app.capacity_command import CapacityOptions, answered, terms_of
    from sim.app.inputs import inputs_of

    asked = CapacityOptions(
        finish_by_s=finish_by,
        p95_wait_s=p95_wait,
        how_many=how_many,
        confidence=confidence,
        retune=not keep_settings,
        tiers=tiers,
        picture=out,
        batch=terms_of(batch_queue, batch_turnaround, batch_discount, None if reserved else cached_share),
        reserved=reserved,
        cached_share=cached_share or 0.0,
        prices=prices,
    )
    asked.check()
    inputs = inputs_of(given, fit=how_many)
    found = answered(given, inputs, asked, width())
    show_result(given, found.found, found.text, (*inputs.notes, *found.notes))
    if not found.enough:
        raise typer.Exit(_CANNOT)


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
    """Compare a finished run with its simulation.

    The simulation is told only what the run could not know beforehand, above all the length and time of each answer.

    Example: paceline backtest results.journal.db
    """
    from sim.validation.backtest import backtest_command

    backtest_command(journal, as_json, out, provider=provider, tpm=tpm, replications=replications, width=width())


@app.command()
@takes_options
def replay(
    given: ReplayOptions,
    source: Annotated[
        str,
        typer.Argument(
            metavar="JOURNAL.db|LOG", help="The journal of a run, or a log of another client.", show_default=False
        ),
    ],
) -> None:
    """Show how a run would have gone under other settings.

    The same requests meet what they met then: answers, times, faults, other users of the quota. Without other settings,
    the run is reproduced under its own.

    Example: paceline replay results.journal.db --set OPENAI_STAGGER_SECONDS=2
    """
    from sim.app.replay_command import replayed

    found, text = replayed(source, given, width())
    show(found, text, as_json=given.json)


@app.command()
@takes_options
def shadow(
    given: ShadowOptions,
    source: Annotated[
        str,
        typer.Argument(metavar="JOURNAL.jsonl", help="What a client in shadow mode recorded.", show_default=False),
    ],
) -> None:
    """Show what governing would have made of recorded calls.

    Replays the calls of a client in shadow mode under today's settings and under those that a plan recommends for them:
    429s avoided, calls saved, time added or saved.

    Example: paceline shadow paceline-shadow.jsonl --out recommended.env
    """
    from sim.app.shadow_command import shadowed

    found, text = shadowed(source, given, os.environ, width(), lambda what: typer.echo(what, err=True))
    show(found, text, as_json=given.json)


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
    """Split a batch into files for the Batch API.

    Each file holds one model and one endpoint, at most 50,000 lines and 200 MB; the files of one wave fit into the
    queue together. Either all files appear, with a list of them, or none.

    Example: paceline split requests.jsonl --out files --batch-queue 2m
    """
    from sim.reporting.capacity_text import split_text
    from sim.selection.split import split as write

    found = write(batch, out, queue_tokens=batch_queue, rest=rest, live_share=live, file_tokens=file_tokens)
    show(found.to_json_dict(), split_text(found, width()), as_json=as_json)
