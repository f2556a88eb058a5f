"""`paceline serve` and `paceline token`: the options of the HTTP service, which is imported when a command runs."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

import typer

from governor.cli.run import (
    Assignments,
    BaseUrl,
    EnvFile,
    FileTokens,
    PoolsFile,
    ProfileName,
    Rpm,
    ScenarioFile,
    Tpm,
    environment_of,
    pools_of,
    words_of,
)
from governor.model.errors import BadSetting, PacelineError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
tokens = typer.Typer(help="Manage the service's bearer tokens.", pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(tokens, name="token")

DATABASE = "PACELINE_DATABASE_URL"
DEFAULT_DATABASE = "paceline-service.db"
EXTRA = "the service needs paceline[service]: pip install 'paceline[service]'"
# Keys in the context's `meta` under which the mounting app leaves the simulations.
FORECAST, WHAT_IF = "paceline.forecast", "paceline.what_if"

_Where = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="FILE.db|URL",
        help=f"SQLite file, or PostgreSQL's URL for several replicas; {DATABASE}, else {DEFAULT_DATABASE}.",
    ),
]


def _where(given: str | None) -> str:
    return given or os.environ.get(DATABASE, "").strip() or DEFAULT_DATABASE


@app.command()
def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on; anything but loopback needs tokens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0 = any free one.")] = 8000,
    database: _Where = None,
    env_file: EnvFile = None,
    assignments: Assignments = None,
    tpm: Tpm = None,
    rpm: Rpm = None,
    pools: PoolsFile = None,
    base_url: BaseUrl = None,
    profile: ProfileName = None,
    scenario: ScenarioFile = None,
    prices: Annotated[str | None, typer.Option(metavar="FILE.yaml", help="What models cost.")] = None,
    lease: Annotated[
        str, typer.Option(metavar="15s", help="How long a replica that stops reporting keeps its batches.")
    ] = "15s",
    grace: Annotated[
        str, typer.Option(metavar="30s", help="How long requests in flight may end after Ctrl-C or SIGTERM.")
    ] = "30s",
    max_upload_mb: Annotated[int, typer.Option(metavar="MB", min=1, max=10_000, help="The largest batch file.")] = 512,
    file_tokens: FileTokens = "5k",  # type: ignore[assignment]
    require_token: Annotated[bool, typer.Option("--require-token", help="Ask for a token on loopback, too.")] = False,
    time_scale: Annotated[
        float, typer.Option(metavar="X", min=0.001, max=1_000.0, help="A clock X times as fast, for rehearsals.")
    ] = 1.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show warnings only.")] = False,
) -> None:
    """Serve batches over HTTP, under one quota.

    Offers templates, guarded batches, progress and what-if questions. On loopback, every user of this machine may do
    anything; other addresses require a bearer token (`paceline token add`).
    """
    try:
        from governor.service.run import run_service
    except ImportError as error:
        raise PacelineError(f"{EXTRA} ({error.name} is missing)") from None
    from governor.model.pools import key_of
    from governor.model.words import seconds_of
    from governor.profiles.loader import prices_in_force, profile_of
    from governor.service.config import ServiceConfig
    from governor.sharedquota.sharing import redis_url

    environment = environment_of(env_file)
    found = pools_of(environment, env_file, words_of(assignments, tpm, rpm), pools, base_url, scenario, profile)
    for pool in found:
        key_of(pool, environment)
    lease_s = seconds_of(lease, "--lease")
    if not 1.0 <= lease_s <= 3_600.0:
        raise BadSetting(f"--lease {lease}: from 1 s to 1 h", "--lease")
    config = ServiceConfig(
        host=host,
        port=port,
        database=_where(database),
        pools=found,
        environment=environment,
        prices=prices_in_force(prices, *map(profile_of, found)),
        forecast=context.meta.get(FORECAST),
        what_if=context.meta.get(WHAT_IF),
        lease_s=lease_s,
        grace_s=seconds_of(grace, "--grace"),
        upload_bytes=max_upload_mb * 2**20,
        file_tokens=file_tokens,
        require_token=require_token,
        time_scale=time_scale,
        redis=redis_url(environment),
    )
    raise SystemExit(run_service(config, quiet=quiet))


# ---------------------------------------------------------------- tokens


def _store(database: str | None, *, make: bool) -> Any:
    try:
        from governor.service.store.base import ServiceDatabase
        from governor.service.store.store import Store
    except ImportError as error:
        raise PacelineError(f"{EXTRA} ({error.name} is missing)") from None
    found = ServiceDatabase(_where(database))
    try:
        found.looked_at(make=make)
    except BaseException:
        found.closed()
        raise
    return Store(found)


@tokens.command("add")
def add_token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is; stands in the records.")],
    scope: Annotated[
        Literal["read", "run", "admin"], typer.Option(help="read; run also batches; admin also settings.")
    ] = "run",
    database: _Where = None,
) -> None:
    """Create a token, or replace the one with that name. It is printed once and stored as a hash."""
    from governor.service.api.auth import hash_of, new_token

    if not (0 < len(name) <= 100 and name.isprintable()):
        raise BadSetting("the name of a token has 1 to 100 visible characters")
    store = _store(database, make=True)
    token = new_token()
    try:
        store.add_token(name, hash_of(token), scope)
    finally:
        store.database.closed()
    typer.echo(token)


@tokens.command("list")
def list_tokens(database: _Where = None) -> None:
    """List tokens with their scopes."""
    store = _store(database, make=False)
    try:
        found = sorted(store.tokens().values())
    finally:
        store.database.closed()
    for name, scope in found:
        typer.echo(f"{name}  {scope}")


@tokens.command("remove")
def remove_token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is, as `paceline token list` says it.")],
    database: _Where = None,
) -> None:
    """Revoke a token; running services notice within a few seconds."""
    store = _store(database, make=False)
    try:
        gone = store.remove_token(name)
    finally:
        store.database.closed()
    if not gone:
        raise BadSetting(f"there is no token of that name: {name!r}")
    typer.echo("removed")
