"""The command `paceline provider`: the synthetic provider behind real HTTP on loopback, as options describe it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from governor.model.errors import PacelineError
from governor.model.words import counting

SERVER_EXTRA = "serving a provider needs paceline[sim,server]: pip install 'paceline[sim,server]'"


def provider(
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65_535, help="Port on 127.0.0.1; 0 = any free one.")] = 0,
    named: Annotated[
        str, typer.Option("--provider", metavar="TIER|FILE.yaml", help="A published tier, or a provider's file.")
    ] = "",
    profile: Annotated[
        str, typer.Option(metavar="NAME|FILE.yaml", help="Its profile: how it counts, charges and refuses.")
    ] = "",
    tpm: Annotated[int | None, typer.Option(metavar="N", parser=counting(1), help="Tokens per minute.")] = None,
    rpm: Annotated[
        int | None, typer.Option(metavar="N", parser=counting(), help="Requests per minute; 0 = no limit.")
    ] = None,
    charge: Annotated[str | None, typer.Option(metavar="RULE", help="Charge rule, such as prompt_plus_max.")] = None,
    settles: Annotated[
        bool | None, typer.Option("--settles/--no-settles", help="Whether real use is booked on completion.")
    ] = None,
    latency: Annotated[
        str | None, typer.Option(metavar="MODEL|S,S_PER_TOKEN", help="A measured model, or the line itself.")
    ] = None,
    faults: Annotated[str | None, typer.Option(metavar="FILE.yaml", help="Faults to inject, and when.")] = None,
    time_scale: Annotated[float, typer.Option(metavar="X", help="Run the clock this many times as fast.")] = 1.0,
    stated_time: Annotated[
        Literal["client", "provider"],
        typer.Option(help="In whose seconds waits are stated; provider: for clients with the same --time-scale."),
    ] = "client",
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of answers, latency and faults.")] = 0,
) -> None:
    """Serve a synthetic provider on loopback.

    OpenAI-compatible: set OPENAI_BASE_URL to the line that it prints. GET /_stats counts what it saw.
    """
    try:
        from sim.model.provider_config import ProviderConfig
        from sim.scenario.scenario_file import latency_of, named_provider
        from sim.serving.server import run_provider
    except ImportError as error:
        raise PacelineError(f"{SERVER_EXTRA} ({error.name} is missing)") from None
    config = named_provider(named, profile) if named or profile else ProviderConfig()
    changes: dict[str, Any] = {
        "tpm": tpm,
        "rpm": rpm,
        "charge_rule": charge,
        "settles": settles,
        "latency": None if latency is None else latency_of(latency),
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes:
        config = config.with_(**changes)
    run_provider(port, config, faults=faults, seed=seed, time_scale=time_scale, stated_time=stated_time)
