"""The commands that talk to a provider: run, preflight, doctor. `governor/cli/journal.py` has those about a journal.

The simulated forecast arrives in the context's object (`Foresee`), which the mounting app sets. Without it, the fluid
estimate of `preflight` is used, and every text says so. A command imports its dependencies when it runs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from governor.model.errors import BadInput, BadSetting
from governor.model.estimate import WHOLE_MAX
from governor.model.words import counting

if TYPE_CHECKING:
    from governor.model.policy import Policy
    from governor.model.pools import Pool
    from governor.run.account import RunOutcome

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

EnvFile = Annotated[
    list[str] | None,
    typer.Option(
        "--env-file",
        metavar="FILE",
        help="Settings and keys; without it, the environment's. May be repeated: a later file wins.",
    ),
]
ScenarioFile = Annotated[
    str | None,
    typer.Option(
        "--scenario",
        metavar="FILE.yaml",
        help="What a plan assumed of the provider, for the forecast; in place of PACELINE_SCENARIO.",
    ),
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One setting on top; may be repeated.")
]
Tpm = Annotated[str | None, typer.Option("--tpm", metavar="N", help="Short for --set OPENAI_TPM_LIMIT=N.")]
Rpm = Annotated[str | None, typer.Option("--rpm", metavar="N", help="Short for --set OPENAI_RPM_LIMIT=N.")]
PoolsFile = Annotated[
    str | None, typer.Option("--pools", metavar="FILE.yaml", help="Several quotas side by side, chosen by model.")
]
BaseUrl = Annotated[str | None, typer.Option("--base-url", metavar="URL", help="Overrides OPENAI_BASE_URL.")]
ProfileName = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="NAME|FILE.yaml",
        help="The provider's profile, in place of PACELINE_PROFILE; by default the address chooses it.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
FileTokens = Annotated[
    int,
    typer.Option(
        metavar="N",
        parser=counting(high=WHOLE_MAX),
        help="Tokens assumed for each file and the like that a request only points to.",
    ),
]
RETRY_ALL = "--retry-failed"


class _Run(TyperCommand):
    """Lets `--retry-failed` stand alone or with a code, which an option with a value cannot."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [f"{RETRY_ALL}=" if arg == RETRY_ALL else arg for arg in args])


@app.command(cls=_Run)
def run(
    context: typer.Context,
    requests: Annotated[
        str, typer.Argument(metavar="REQUESTS.jsonl", help="Requests in OpenAI's batch format.", show_default=False)
    ],
    out: Annotated[
        str, typer.Option(metavar="RESULTS.jsonl", help="Results; failures go beside it, into RESULTS.errors.jsonl.")
    ],
    env_file: EnvFile = None,
    assignments: Assignments = None,
    tpm: Tpm = None,
    rpm: Rpm = None,
    pools: PoolsFile = None,
    base_url: BaseUrl = None,
    profile: ProfileName = None,
    scenario: ScenarioFile = None,
    journal: Annotated[
        str | None,
        typer.Option(metavar="FILE.db|URL", help="Where the run is recorded; RESULTS.journal.db if not given."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Start whatever the forecast or the canary says.")] = False,
    finish_by: Annotated[
        str | None,
        typer.Option(
            metavar="6h|06:00",
            help="Do not start if the forecast is later, or wait past it; default: a day.",
        ),
    ] = None,
    stop_after: Annotated[
        str | None, typer.Option(metavar="6h|06:00", help="Stop launching at this time; exit code 5.")
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option(metavar="USD", min=0.0, help="Stop launching once this is spent; exit code 5.")
    ] = None,
    prices: Annotated[
        str | None, typer.Option(metavar="FILE.yaml", help="What models cost; a dated list comes with Paceline.")
    ] = None,
    canary: Annotated[
        int, typer.Option(metavar="N", min=0, help="Run N requests first and compare them with the forecast.")
    ] = 0,
    finalize: Annotated[
        bool, typer.Option("--finalize", help="Finish answers that were cut off without text by one more, paid call.")
    ] = False,
    skip_oversized: Annotated[
        bool, typer.Option("--skip-oversized", help="Record requests above the limit as failed without sending them.")
    ] = False,
    file_tokens: FileTokens = "5k",  # type: ignore[assignment]
    retry_failed: Annotated[
        str | None,
        typer.Option("--retry-failed", metavar="[=CODE]", help="Retry failed requests: all, or those with CODE."),
    ] = None,
    resend_changed: Annotated[
        bool, typer.Option("--resend-changed", help="Send again the lines that changed after they were answered.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Write results as they arrive; input order is restored at the end.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are not this run's.")] = False,
    via: Annotated[
        Literal["live", "batch", "auto"],
        typer.Option(
            help="Call the provider live, hand files to its Batch API at half the price, or auto: the cheapest mix of "
            "both that is done by --finish-by, a day if not given."
        ),
    ] = "live",
    batch_queue: Annotated[
        str | None, typer.Option("--batch-queue", metavar="N", help="Short for --set OPENAI_BATCH_QUEUE_TOKENS=N.")
    ] = None,
    keep_files: Annotated[
        bool, typer.Option("--keep-files", help="Do not delete the files at the Batch API once all is collected.")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**62, help="Seed of the jitter.")] = 0,
    grace: Annotated[
        str, typer.Option(metavar="30s", help="Time for requests in flight to end after Ctrl-C or another signal.")
    ] = "30s",
    cancel_background: Annotated[
        bool,
        typer.Option("--cancel-background", help="After a signal, cancel background responses that are under way."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show warnings only, no progress.")] = False,
    log_format: Annotated[
        Literal["text", "json"] | None, typer.Option(help="One line per launch, wait, 429 and result on stderr.")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(metavar="PORT", min=0, max=65_535, help="Prometheus metrics on loopback; 0 = any free."),
    ] = None,
    metrics_textfile: Annotated[
        str | None, typer.Option(metavar="FILE.prom", help="The same metrics, in a file for node_exporter.")
    ] = None,
    notify: Annotated[
        str | None, typer.Option(metavar="URL", help="POST a message when it finishes, stops or falls behind.")
    ] = None,
    record: Annotated[
        bool,
        typer.Option("--record", help="Record every decision for `paceline verify`; takes a third more disk."),
    ] = False,
    time_scale: Annotated[
        float,
        typer.Option(
            metavar="X", min=0.001, max=1_000.0, help="A clock X times as fast, as `paceline provider` has one."
        ),
    ] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Run a batch, or resume it.

    Repeat the same command to resume: finished requests are never sent again, and of a corrected file only new or
    changed lines are sent.

    Exit codes: 0 all succeeded, 1 some failed, 2 bad input, 3 not started or cannot finish, 4 the account has no money
    left or its key was rejected, 5 a budget is used up; 130, 143 and 129 after Ctrl-C, SIGTERM and SIGHUP.

    Example: paceline run requests.jsonl --out results.jsonl --env-file .env
    """
    from governor.model.words import seconds_of, until_s
    from governor.profiles.loader import prices_in_force, profile_of
    from governor.provider.sending import connect_with
    from governor.run.batch import Orders, run_orders
    from governor.run.outputs import journal_path
    from governor.run.pool_run import RunOptions
    from governor.sharedquota.sharing import redis_url
    from governor.telemetry import progress

    environment = environment_of(env_file)
    results = Path(out)
    manner = RunOptions(
        finalize=finalize,
        max_cost=max_cost,
        stop_after_s=None if stop_after is None else until_s(stop_after, "--stop-after"),
        finish_by_s=None if finish_by is None or yes else until_s(finish_by, "--finish-by"),
        grace_s=seconds_of(grace, "--grace"),
        canary=canary,
        insist=yes,
        log_format=log_format,
        textfile=None if metrics_textfile is None else Path(metrics_textfile),
        records=record,
        hook=notify or "",
        ask=_ask if sys.stdin.isatty() and sys.stderr.isatty() else None,
        time_scale=time_scale,
        cancel_background=cancel_background,
        redis=redis_url(environment),
    )
    found = pools_of(
        environment, env_file, words_of(assignments, tpm, rpm, batch_queue), pools, base_url, scenario, profile
    )
    orders = Orders(
        requests=Path(requests),
        out=results,
        journal=journal if journal is not None else journal_path(results),
        pools=found,
        environment=environment,
        prices=prices_in_force(prices, *map(profile_of, found)),
        manner=manner,
        seed=seed,
        yes=yes,
        finish_by_s=None if finish_by is None else until_s(finish_by, "--finish-by"),
        finish_by=finish_by or "",
        skip_oversized=skip_oversized,
        overwrite=overwrite,
        retry_failed=retry_failed,
        resend_changed=resend_changed,
        file_tokens=file_tokens,
        follow=follow,
        via=via,
        keep_files=keep_files,
        metrics_port=metrics_port,
    )
    shown = progress.shown(quiet=quiet, logs=log_format)
    outcome = run_orders(orders, foresee=context.obj, connect=connect_with(environment), shown=shown)
    _print(outcome, orders, as_json)
    # Not typer's own exit: after a signal `sim/app/cli.py` would say that nothing was written.
    raise SystemExit(outcome.exit_code)


def _print(outcome: RunOutcome, orders: Any, as_json: bool) -> None:
    from governor.cli.text import outcome_json, outcome_text

    if as_json:
        print(json.dumps(outcome_json(outcome, several=len(orders.pools) > 1), indent=2, allow_nan=False))
    else:
        print(outcome_text(outcome, orders))
    sys.stdout.flush()


def _ask(question: str) -> bool:
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# ---------------------------------------------------------------- preflight


@app.command()
def preflight(
    context: typer.Context,
    requests: Annotated[
        str, typer.Argument(metavar="REQUESTS.jsonl", help="Requests in OpenAI's batch format.", show_default=False)
    ],
    env_file: EnvFile = None,
    assignments: Assignments = None,
    tpm: Tpm = None,
    rpm: Rpm = None,
    pools: PoolsFile = None,
    scenario: ScenarioFile = None,
    mode: Annotated[
        Literal["strict", "paced"] | None, typer.Option(help="In place of PREFLIGHT_MODE.", show_default=False)
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(metavar="6h|06:00", help="When the last answer must have arrived.")
    ] = None,
    file_tokens: FileTokens = "5k",  # type: ignore[assignment]
    as_json: AsJson = False,
) -> None:
    """Check whether a batch may start now, or how long to wait.

    `strict` refuses a batch that exceeds one minute's budget; `paced` refuses only what can never run or would miss the
    deadline. Sends nothing and needs no key. The exit code is 3 if the batch is refused.

    Example: paceline preflight requests.jsonl --env-file .env --deadline 6h
    """
    from governor.cli.text import verdict_json, verdict_text
    from governor.forecast.preflight import preflight as judge
    from governor.model.requests import UnseenContent
    from governor.model.words import until_s
    from governor.run.intake import read_demands

    words = [*words_of(assignments, tpm, rpm), *([f"PREFLIGHT_MODE={mode}"] if mode else [])]
    found = pools_of(environment_of(env_file), env_file, words, pools, None, scenario)
    deadline_s = None if deadline is None else until_s(deadline, "--deadline")
    verdicts = {}
    unseen = UnseenContent(file_tokens)
    demands = read_demands(Path(requests), found, unseen, file_tokens=file_tokens)
    for pool, demand in zip(found, demands.values(), strict=True):
        verdicts[pool.name] = judge(
            pool.policy,
            demand.load(),
            deadline_s=deadline_s,
            forecast=_finish(context, pool, demand),
            service_s=demand.assumed_service_s(),
        )
    if as_json:
        print(json.dumps(verdict_json(verdicts), indent=2, allow_nan=False))
    else:
        print(verdict_text(verdicts))
    if unseen.text:
        typer.echo(f"note: {unseen.text} (--file-tokens)", err=True)
    if not all(verdict.ok for verdict in verdicts.values()):
        raise typer.Exit(3)


def _finish(context: typer.Context, pool: Pool, demand: Any) -> Callable[[], float] | None:
    """Return a function that simulates when this pool will finish; None if no simulator is installed."""
    from governor.forecast.forecast import Demand, Outlook

    try:
        # A forecast of nothing costs nothing, and shows whether there is a simulator.
        if context.obj is None or context.obj(Outlook(pool=pool, demand=Demand())) is None:
            return None
    except ImportError:
        return None
    return lambda: float(context.obj(Outlook(pool=pool, demand=demand)).finish_s)


# ---------------------------------------------------------------- doctor


@app.command()
def doctor(
    env_file: EnvFile = None,
    assignments: Assignments = None,
    tpm: Tpm = None,
    rpm: Rpm = None,
    pools: PoolsFile = None,
    base_url: BaseUrl = None,
    profile: ProfileName = None,
    model: Annotated[str, typer.Option(metavar="MODEL", help="The model to call.")] = "gpt-4o-mini",
    write: Annotated[
        str | None,
        typer.Option(metavar="FILE.env", help="Write the limits that the provider's endpoint states into this file."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check key, model and limits with one tiny call.

    With an admin key (OPENAI_ADMIN_KEY and OPENAI_PROJECT_ID, or ANTHROPIC_ADMIN_KEY) it also reads the limits from the
    provider's own endpoint. Points out settings, headers and endpoint that disagree with each other. Costs a few tokens
    per pool. The exit code is 1 if a pool does not answer, 4 if the account is rejected.

    Example: paceline doctor --env-file .env
    """
    from governor.provider.sending import connect_with
    from governor.run.doctor import Diagnosis, examine

    environment = environment_of(env_file)
    found = pools_of(environment, env_file, words_of(assignments, tpm, rpm), pools, base_url, None, profile)
    if write is not None and len(found) > 1:
        raise BadSetting("--write is for one quota: leave out --pools", "--write")
    findings: Sequence[Diagnosis] = examine(found, environment, connect_with(environment), model)
    if as_json:
        print(json.dumps({finding.pool: finding.to_json_dict() for finding in findings}, indent=2))
    else:
        print("\n".join(finding.text(named=len(findings) > 1) for finding in findings))
    if write is not None:
        _write_limits(Path(write), findings[0].endpoint)
    raise typer.Exit(max(finding.exit_code for finding in findings))


def _write_limits(target: Path, limits: Mapping[str, float] | None) -> None:
    """Write the endpoint's limits into an env file."""
    from governor.provider.account_limits import settings_for
    from governor.run.apply import write_settings

    if limits is None:
        raise BadSetting(
            "--write needs the provider's own limits: set its admin key, such as OPENAI_ADMIN_KEY", "--write"
        )
    done = write_settings(target, settings_for(limits))
    for change in done.changes:
        print(change, file=sys.stderr)
    if not done.changes:
        print(f"{target}: the limits are these already", file=sys.stderr)


# ---------------------------------------------------------------- options in combination


def words_of(
    assignments: Sequence[str] | None, tpm: str | None, rpm: str | None, batch_queue: str | None = None
) -> list[str]:
    """Return the settings of the command line, the special ones first, so that a --set wins."""
    from governor.model.words import count_of

    words = []
    if tpm is not None:
        words.append(f"OPENAI_TPM_LIMIT={count_of(tpm, '--tpm')}")
    if rpm is not None:
        words.append(f"OPENAI_RPM_LIMIT={count_of(rpm, '--rpm')}")
    if batch_queue is not None:
        words.append(f"OPENAI_BATCH_QUEUE_TOKENS={count_of(batch_queue, '--batch-queue')}")
    return [*words, *(assignments or ())]


def environment_of(env_files: Sequence[str] | None) -> dict[str, str]:
    """Return variables by name: the process's own, overlaid with the env files'.

    Keys are looked up here and go nowhere else.
    """
    from governor.model.env_files import environment_of as layered

    return layered(env_files, os.environ)


def pools_of(
    environment: Mapping[str, str],
    env_files: Sequence[str] | None,
    words: Sequence[str],
    pools_file: str | None,
    base_url: str | None,
    scenario: str | None = None,
    profile: str | None = None,
) -> tuple[Pool, ...]:
    """Return the pools of a command: of the pools file, or the one of the settings.

    `scenario`, `profile`: the options of these names.
    """
    from dataclasses import replace

    from governor.model.env_files import policy_of, stated_profile
    from governor.model.pools import checked_url, default_pools, read_pools
    from governor.profiles.loader import with_profile

    policy: Policy = policy_of(env_files, environment=environment)
    if base_url is not None and not base_url.strip():
        raise BadSetting("--base-url is empty: name an address, or leave the option out for OpenAI's own")
    if pools_file is None:
        url = checked_url(base_url or "", "--base-url")
        (pool,) = default_pools(policy.set_values(words), environment, url)
        stated = stated_profile(env_files, environment) if profile is None else profile
        pool = replace(pool, scenario=scenario_of(scenario, env_files, environment), profile=stated)
        return (with_profile(pool, environment),)
    if base_url is not None:
        raise BadSetting("--base-url is for a run without --pools: state base_url in the pools file")
    if scenario is not None:
        raise BadSetting("--scenario is for a run without --pools: state scenario in the pools file")
    if profile is not None:
        raise BadSetting("--profile is for a run without --pools: state profile in the pools file")
    try:
        return tuple(with_profile(pool, environment) for pool in read_pools(pools_file, policy, words))
    except BadSetting as error:
        raise BadInput(str(error), pools_file) from None


def scenario_of(given: str | None, env_files: Sequence[str] | None, environment: Mapping[str, str]) -> str:
    """Return the scenario for forecasts: `--scenario`, else that of PACELINE_SCENARIO; "" = none.

    A file that is named on the command line must exist. Settings outlive the plan that made them: if the file that they
    name is gone, a line says so and the forecast goes by the settings.
    """
    from governor.model.env_files import SCENARIO, scenario_path

    if given is not None:
        if not os.path.isfile(given):
            raise BadInput("there is no such file", given)
        return given
    path = scenario_path(env_files, environment)
    if path and not os.path.isfile(path):
        text = (
            f"note: {path} ({SCENARIO}) is not there: the forecast assumes a provider with the limits of the settings"
        )
        print(text, file=sys.stderr, flush=True)
        return ""
    return path
