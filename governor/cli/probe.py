"""The command `paceline probe`: a few calls that settle how an account is limited, into a provider.yaml."""

from __future__ import annotations

import asyncio
import json
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from governor.cli.run import AsJson, BaseUrl, EnvFile, ProfileName, environment_of, pools_of
from governor.model.errors import BadSetting

if TYPE_CHECKING:
    from governor.model.pools import Pool
    from governor.model.prices import Price
    from governor.provider.probe import Judge, Probe, ProbeAnswer

# Key in the context's `meta` under which the mounting app leaves the simulation that judges windows.
JUDGE = "paceline.judge"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def probe(
    context: typer.Context,
    max_cost: Annotated[
        float,
        typer.Option(metavar="USD", min=0.0, help="What all calls together may cost at most.", show_default=False),
    ],
    out: Annotated[str, typer.Option(metavar="FILE.yaml", help="The provider that was found.")] = "provider.yaml",
    env_file: EnvFile = None,
    base_url: BaseUrl = None,
    profile: ProfileName = None,
    model: Annotated[str, typer.Option(metavar="MODEL", help="The model to call.")] = "gpt-4o-mini",
    prices: Annotated[
        str | None, typer.Option(metavar="FILE.yaml", help="What models cost; a dated list comes with Paceline.")
    ] = None,
    time_scale: Annotated[float, typer.Option(metavar="X", hidden=True)] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Measure how this account charges and refuses.

    Is the output cap charged, is real use booked later, do 429s count, are there slices of a second, and which window
    does the limit use? If headers state nothing, the probe learns from refusals alone, at the limits in the settings.
    It takes four to seven minutes; nothing else should use the account meanwhile. It reports what it could not decide.

    Example: paceline probe --max-cost 0.10 --env-file .env
    """
    from governor.profiles.loader import prices_in_force, profile_of
    from governor.provider.probe import provider_text, write_provider

    path = Path(out)
    if path.suffix.lower() not in (".yaml", ".yml") or not path.parent.is_dir():
        raise BadSetting(f"--out {out}: name a .yaml file in a folder that exists", "--out")
    environment = environment_of(env_file)
    pool = pools_of(environment, env_file, [], None, base_url, None, profile)[0]
    price = prices_in_force(prices, profile_of(pool)).of(model, date.today())
    if price is None:
        raise BadSetting(
            f"--model {model}: its price is not known, so --max-cost cannot be kept: name --prices", "--model"
        )
    found, asked = asyncio.run(_asked(pool, environment, model, price, max_cost, time_scale, context.meta.get(JUDGE)))
    write_provider(path, provider_text(asked, found))
    if as_json:
        told = {each.name: {"value": each.value, "why": each.why} for each in found}
        print(json.dumps({**told, "calls": asked.calls, "cost_usd": round(asked.spent_usd, 6)}, indent=2))
        return
    for each in found:
        value = "cannot be told" if each.value is None else str(each.value)
        print(f"{each.name:<24}{value:<18}{each.why}")
    print(f"\n{asked.calls} calls, ${asked.spent_usd:.4f}; written: {path}; use it: --provider {path}")


async def _asked(
    pool: Pool,
    environment: dict[str, str],
    model: str,
    price: Price,
    max_cost_usd: float,
    time_scale: float,
    judge: Judge | None,
) -> tuple[list[ProbeAnswer], Probe]:
    from governor.provider.probe import Probe, probed
    from governor.provider.sending import connect_with

    send = connect_with(environment)(pool)
    believed = (float(pool.policy.tpm_limit), float(pool.policy.rpm_limit))
    made = Probe(send, model, price, max_cost_usd, time_scale=time_scale, believed=believed, judge=judge)
    try:
        return await probed(made), made
    finally:
        await send.aclose()
