"""How close the twin is: live runs over HTTP against forecast and backtest, over scenarios drawn from a seed.

    python -m benchmarks.twin [--short] [--scenarios 20] [--time-scale 8] [--seed 1]

Each scenario draws a batch (sizes, caps, number of requests), a provider (limits, charge rule, settling, others on the
quota) and settings (window, concurrency, stagger, order of launches). The batch runs live, as `paceline run` does it:
the official SDK, the asyncio driver, a journal on disk, against `paceline provider` in a process of its own on
loopback. Clocks of both run X times as fast. The forecast is the one in the journal, written before the first launch
from the settings alone. The backtest is told the provider and reads from the journal what the run could not know; its
chance has other seeds than the provider's.

The table shows each prediction with its 95 % interval, and whether the measured figure lies in it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from governor.journal.journal import Journal
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.prices import Prices
from governor.provider.sending import connect_with
from governor.run.batch import Orders, run_batch
from governor.run.pool_run import Manner
from governor.telemetry.progress import Quiet
from sim.base.layout import table
from sim.model.provider_config import ProviderConfig
from sim.serving.server import spawn
from sim.validation.backtest import Backtest, backtest
from sim.validation.foresight import foresee

SCALE, SCALE_MOST = 8.0, 10.0
SCENARIOS, SHORT = 20, 3
# A scenario that lasts longer has gone wrong; what ended until then is compared.
STOP_AFTER_S = 600.0
MODEL = "gpt-4o-mini"
HALF_WIDTH_MOST, ERROR_MOST, COVERED_LEAST = 0.05, 0.02, 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One scenario. `sizes`: (characters of the prompt, declared cap) of each request."""

    name: str
    provider: ProviderConfig
    policy: Policy
    sizes: tuple[tuple[int, int], ...]
    seed: int


def drawn(seed: int, number: int) -> Drawn:
    """The scenario of that number under a seed: shaped so that it lasts one to three minutes of its own time."""
    rng = random.Random(f"{seed}/{number}")
    shape = rng.choice(["small", "mixed", "large", "bimodal"])
    count = rng.randint(40, 80)
    caps = {"small": (200, 400), "mixed": (200, 2_000), "large": (1_000, 2_500), "bimodal": (150, 150)}[shape]
    sizes = []
    for _ in range(count):
        cap = rng.randint(*caps) if shape != "bimodal" or rng.random() < 0.7 else 2_000
        sizes.append((rng.randint(200, 4_000), cap))
    needed = sum(chars // 4 + cap for chars, cap in sizes)
    settles = rng.random() < 0.4
    rule = rng.choice(["prompt_plus_max", "max_of"])
    if rule == "max_of":
        needed = sum(max(chars // 4, cap) for chars, cap in sizes)
    largest = max(chars // 4 + cap for chars, cap in sizes)
    # About one to two minutes' worth of tokens beyond the first bucket.
    tpm = round(max(2.5 * largest, needed / rng.uniform(2.0, 3.0)))
    share = rng.choice([0.0, 0.0, 0.1, 0.25])
    bursts = share > 0.0 and rng.random() < 0.5
    cotenant = {"share": share, "burst_s": 10.0 if bursts else 0.0, "period_s": 30.0 if bursts else 0.0}
    window = rng.choice(["fixed", "sliding", "bucket", "bucket"])
    provider = ProviderConfig(
        tpm=tpm,
        rpm=500,
        charge_rule=rule,
        settles=settles,
        cotenant=cotenant,
        latency=MODEL,
        window="clock" if window == "fixed" else "bucket",
    )
    policy = Policy.preset("paceline").with_(
        tpm_limit=tpm,
        rpm_limit=500,
        tpm_window=window,
        charge_rule=rule,
        settle=settles,
        max_concurrency=rng.choice([3, 8, 20, 40]),
        stagger_seconds=rng.choice([0.0, 0.0, 0.5, 1.5]),
        tpm_headroom=rng.choice([0.01, 0.05]) if share == 0.0 else rng.choice([0.05, 0.3]),
        launch_order=rng.choice(["fifo", "longest_first"]),
        # A counter that falls at the full minute states a wait from which its headers read like a limit per day.
        sync_headers=window != "fixed" and rng.random() < 0.5,
    )
    words = [
        shape,
        window,
        rule,
        "settles" if settles else "",
        f"others {share:.0%}" if share else "",
        "bursts" * bursts,
    ]
    return Drawn(
        name=" ".join(filter(None, words)),
        provider=provider,
        policy=policy,
        sizes=tuple(sizes),
        seed=rng.randrange(2**31),
    )


def written(scenario: Drawn, path: Path) -> None:
    """The batch as a JSONL file."""
    rng = random.Random(scenario.seed)
    with path.open("w", encoding="utf-8") as file:
        for i, (chars, cap) in enumerate(scenario.sizes):
            text = "".join(rng.choices("abcdefgh ", k=chars))
            body = {"model": MODEL, "max_tokens": cap, "messages": [{"role": "user", "content": text}]}
            line = {"custom_id": f"q-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def rehearsed(scenario: Drawn, time_scale: float, folder: Path | None = None) -> Backtest:
    """The scenario run live on loopback, and its backtest. `folder`: where its files stay; None = nowhere."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="paceline-twin-") as name:
            return rehearsed(scenario, time_scale, Path(name))
    written(scenario, folder / "batch.jsonl")
    # Another seed than the run's: what the provider draws is not ours to know.
    options: dict[str, Any] = {"seed": scenario.seed ^ 0x5EED, "time_scale": time_scale, "stated_time": "provider"}
    with spawn(scenario.provider, **options) as server:
        environment = {"OPENAI_API_KEY": "no-key-is-needed", "OPENAI_BASE_URL": server.base_url}
        orders = Orders(
            requests=folder / "batch.jsonl",
            out=folder / "results.jsonl",
            journal=folder / "run.db",
            pools=[Pool(policy=scenario.policy, base_url=server.base_url)],
            environment=environment,
            prices=Prices({}),
            manner=Manner(time_scale=time_scale, stop_after_s=STOP_AFTER_S),
            seed=scenario.seed,
            yes=True,
        )
        with (folder / "said.txt").open("w", encoding="utf-8") as said:
            outcome = run_batch(orders, foresee=foresee, connect=connect_with(environment), shown=Quiet(said))
    with Journal.open(folder / "run.db") as journal:
        found = backtest(journal, provider=scenario.provider)
    return found if not outcome.pending else replace(found, notes=(*found.notes, f"stopped: {outcome.stopped}"))


def shown_row(number: int, scenario: Drawn, found: Backtest) -> list[str]:
    """One line of the table."""
    m, f = found.makespan_s, found.forecast
    error = "-" if m.error_ratio is None else f"{100.0 * m.error_ratio:+.2f} %"
    counts = [
        f"{c.measured:.0f} in {c.low:.0f}-{c.high:.0f}{'' if c.covered else ' !'}"
        for c in (found.throttled, found.launches)
    ]
    forecast = "-"
    if f is not None and f.error_ratio is not None:
        forecast = f"{f.low:.0f}-{f.high:.0f} {100.0 * f.error_ratio:+.0f} %{'' if f.covered else ' !'}"
    interval = f"{m.low:.1f}-{m.high:.1f}{'' if m.covered else ' !'}"
    return [f"{number} {scenario.name}", f"{m.measured:.1f}", interval, error, *counts, forecast]


def verdict(found: list[Backtest]) -> tuple[list[str], bool]:
    """The figures over all scenarios, and whether they keep what is promised."""
    n = len(found)
    errors = [abs(b.makespan_s.error_ratio or 0.0) for b in found]
    widths = [b.makespan_s.half_width_ratio for b in found]
    covered = sum(b.makespan_s.covered for b in found)
    lines = [
        f"backtest: makespan within its interval in {covered} of {n}, half-width median {100 * median(widths):.1f} %, "
        f"at most {100 * max(widths):.1f} %; median absolute error {100 * median(errors):.2f} %, at most "
        f"{100 * max(errors):.2f} %",
        f"backtest: 429s within in {sum(b.throttled.covered for b in found)} of {n}, launches in "
        f"{sum(b.launches.covered for b in found)} of {n}",
    ]
    forecasts = [b.forecast for b in found if b.forecast is not None]
    if forecasts:
        off = median(abs(f.error_ratio or 0.0) for f in forecasts)
        lines.append(
            f"forecast: makespan within in {sum(f.covered for f in forecasts)} of {len(forecasts)}, median absolute "
            f"error {100 * off:.1f} %; 429s within in "
            f"{sum(b.forecast_throttled is not None and b.forecast_throttled.covered for b in found)} of {n}"
        )
    good = covered >= COVERED_LEAST * n and median(errors) <= ERROR_MOST and max(widths) <= HALF_WIDTH_MOST
    return lines, good


def main(words: list[str]) -> int:
    """Runs the scenarios, prints the table; 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(prog="twin")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--scenarios", type=int, default=0)
    parser.add_argument("--time-scale", type=float, default=SCALE)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=1, help="number of the first scenario")
    given = parser.parse_args(words)
    if not 0.0 < given.time_scale <= SCALE_MOST:
        parser.error(f"--time-scale must be above 0 and at most {SCALE_MOST:g}")
    count = given.scenarios or (SHORT if given.short else SCENARIOS)
    print(f"seed {given.seed}, {count} scenarios, clocks {given.time_scale:g} times as fast", flush=True)
    rows = [["scenario", "measured s", "backtest s", "error", "429s", "launches", "forecast s"]]
    found, begun = [], time.monotonic()
    for number in range(given.first, given.first + count):
        scenario = drawn(given.seed, number)
        result = rehearsed(scenario, given.time_scale)
        found.append(result)
        rows.append(shown_row(number, scenario, result))
        print(" | ".join(rows[-1]), flush=True)
    lines, good = verdict(found)
    print(f"\n{table(rows)}\n\n! = outside of its interval")
    print("\n".join([*lines, f"{time.monotonic() - begun:.0f} s"]))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
