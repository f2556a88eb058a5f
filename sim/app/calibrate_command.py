"""The command `paceline calibrate`: logs of real requests into a scenario, with a table and a picture of the fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from governor.model.errors import BadSetting, PacelineError

if TYPE_CHECKING:
    from sim.calibration.calibrate import CalibratedForecast, Calibration
    from sim.calibration.fits import Figure
    from sim.validation.backtest import Backtest

_NEEDS_SIM = "calibrating needs paceline[sim]: pip install 'paceline[sim]'"


def calibrate(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="A journal, a log (CSV, JSONL), batch output, or spans exported as JSON.",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Option(metavar="SCENARIO.yaml", help="Where to write the scenario.", show_default=False)],
    columns: Annotated[
        str, typer.Option(metavar="ROLE=NAME,...", help="Columns of a log; a time may carry a unit: latency=took:ms.")
    ] = "",
    pool: Annotated[
        str, typer.Option(metavar="NAME", help="The pool of a journal that has several, each with its own quota.")
    ] = "",
    provider: Annotated[
        str, typer.Option(metavar="TIER|FILE.yaml", help="Provider whose values are used where the log cannot tell.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Learn a scenario from logs of real requests.

    Learns answer lengths, times and arrivals; from headers the charge rule, the limit and other users' share of it;
    from refusals how the limit counts over time. Each figure has an interval. The run of a journal is then simulated
    with what was learnt. What the log cannot tell is listed and keeps its default. Also writes the rows as CSV, and a
    picture of data against fit.

    Example: paceline calibrate results.journal.db --out mine.yaml
    """
    try:
        from sim.calibration import calibrate as cal
        from sim.reporting.figures_calibrate import write_figure
        from sim.scenario.columns import parse_columns
        from sim.scenario.scenario_file import named_provider
    except ImportError as error:
        raise PacelineError(f"{_NEEDS_SIM} ({error.name} is missing)") from None
    path = Path(out)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise BadSetting(f"--out {out}: a scenario's name ends in .yaml", "--out")
    if not path.parent.is_dir():
        raise BadSetting(f"--out {out}: there is no folder {path.parent}", "--out")
    observed = cal.read_sources(sources, parse_columns(columns) if columns else {}, pool)
    found = cal.calibrate(observed, base=named_provider(provider) if provider else None)
    scenario = found.write(path)
    picture = path.with_suffix(".png")
    write_figure(found, picture)
    ahead = cal.outlook(scenario, unknowns=found.unknowns) if len(scenario.workload) > 1 else None
    again = _resimulated(sources, found, pool)
    if as_json:
        content = {**found.to_json_dict(), "outlook": _outlook_json(ahead)}
        content["resimulated"] = None if again is None else again.to_json_dict()
        print(json.dumps(content, indent=2, allow_nan=False), flush=True)
        return
    print(text_of(found, ahead), flush=True)
    if again is not None:
        table, _, _ = again.text().partition("\n\n")
        print(f"\nthe run itself, simulated with what was learnt:\n{table}", flush=True)
    print(f"\nscenario: {path}\npicture: {picture}\nnext: paceline simulate {path}", flush=True)


def _resimulated(sources: list[str], found: Calibration, pool: str) -> Backtest | None:
    """Run one journal again, on the provider that was learnt from it.

    None for other sources, and for a run by the Batch API.
    """
    from governor.journal.journal import Journal
    from sim.validation.backtest import backtest

    if len(sources) != 1 or found.observed.policy is None:
        return None
    with Journal.open(sources[0]) as journal:
        if journal.waves():
            return None
        return backtest(journal, provider=found.scenario.provider, pool=pool)


def _outlook_json(ahead: CalibratedForecast | None) -> dict[str, Any] | None:
    if ahead is None:
        return None
    names = ("median", "low", "high")
    rate = None if ahead.tokens_per_min is None else dict(zip(names, ahead.tokens_per_min, strict=True))
    makespan = dict(zip(names, ahead.makespan_s, strict=True))
    return {"requests": ahead.requests, "tokens_per_min": rate, "makespan_s": makespan}


def text_of(found: Calibration, ahead: CalibratedForecast | None) -> str:
    """Return the figures as a table, then what cannot be told, then the forecast."""
    told = [figure for figure in found.figures if figure.known]
    lines = [
        f"learnt from {len(found.observed):,} attempts of {found.observed.label} (each interval holds with 95 %)",
        "",
    ]
    for figure in told:
        lines.append(f"  {figure.name:<26}{_value(figure):<33} {figure.how}")
    for name, families in (("prompt", found.prompts), ("output", found.outputs)):
        if families:
            fits = ", ".join(f"{family.name} {family.ks:.3f}" for family in families)
            lines.append(f"  {name + ' families (KS)':<26}{fits}")
    if found.latency is not None:
        fits = ", ".join(f"{name} {score:.3f}" for name, score in found.latency.noise.scores.items())
        lines.append(f"  {'noise (log score)':<26}{fits}")
    lines += ["", "cannot be told from the log, left as it was:"]
    lines += [
        f"  {figure.name:<26}{_plain(figure.default):<14}{figure.how}" for figure in found.figures if not figure.known
    ]
    lines += [f"  {note}" for note in found.notes]
    lines += ["", "still unknown, and drawn by a plan:", f"  {found.unknowns.text()}"]
    tried = found.quota.window.tried
    if tried:
        attempts = found.quota.window.attempts
        lines.append(f"  {attempts - tried[0].misses:,} of {attempts:,} attempts end as the fitted quota predicts")
    if ahead is not None:
        lines += ["", f"another {ahead.requests:,} requests of this kind, with 95 %:"]
        if ahead.tokens_per_min is not None:
            lines.append("  {:<26}{:,.0f} ({:,.0f} to {:,.0f})".format("tokens per minute", *ahead.tokens_per_min))
        lines.append(
            "  {:<26}{:,.0f} s ({:,.0f} to {:,.0f}), under the scenario's settings".format(
                "makespan", *ahead.makespan_s
            )
        )
    return "\n".join(lines)


def _value(figure: Figure) -> str:
    unit = f" {figure.unit}" if figure.unit else ""
    wide = 0.0 if figure.low is None or figure.high is None else figure.high - figure.low
    # A share of 2e-05 (0 to 0.03) is none that was seen.
    value = 0.0 if wide > 0.0 and abs(figure.value) < wide / 1_000.0 else figure.value
    value, low, high = (_plain(each) for each in (value, figure.low, figure.high))
    if figure.low is None and figure.high is None:
        return f"{value}{unit}"
    if figure.low is None or figure.high is None:
        return f"{value}{unit} ({f'{low} or more' if figure.high is None else f'{high} or less'})"
    return f"{value}{unit}" if figure.low == figure.high else f"{value}{unit} ({low} to {high})"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else "none" if value is None else str(value)
