"""The twin against rate limiters that we did not write: plan, run, backtest, beside what others would have used.

    python -m benchmarks.twin_outside [--short] [--kind "slowapi fixed" ...] [--requests 60 200] [--seeds 1 2 3]
                                      [--probe]

For each endpoint of `outside_servers`, each size of batch and each seed: the preset `paceline`, told the limits and the
charge rule, runs live over loopback; then the settings that are planned with the endpoint's provider file; beside them
the official SDK with its own 10 retries, and aiolimiter with a weight per request and 10 retries. Each contender meets
a fresh endpoint. Clocks count waiting and the processor's time of both ends (`own_time`), so that a busy machine does
not show; with `--time-scale X` they are the machine's, X times as fast, and each endpoint is a process of its own.

Per run: the measured finish time and 429s, each with the backtest's 95 % interval (told the provider file), the
error, and the forecast that stood in the journal before the first launch. That of the first run was told the provider
file, and no answers; that of the second run only what `calibrate` learnt from the first run's journal.

`--probe`: in place of all that, `paceline probe` asks each endpoint, from a moment of the minute that the seed draws;
each answer is right, wrong, or none.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import peers_live
from benchmarks.live_batch import ENVIRONMENT, Case, drawn, write_lines
from benchmarks.outside_servers import KINDS, RPM, TPM, OwnTime, described, served
from benchmarks.own_time import BASE_URL, OwnTimeLoop, without_threads
from governor.journal.journal import Journal
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.prices import Price, Prices
from governor.provider.probe import Probe, ProbeAnswer, probed
from governor.provider.sending import connect_with
from governor.run.batch import Orders, run_orders
from governor.run.pool_run import RunOptions
from governor.run.scaledloop import loop_factory
from governor.telemetry.progress import Display
from sim.app.api import plan
from sim.base.arguments import checked
from sim.base.layout import table
from sim.calibration.calibrate import calibrate
from sim.calibration.fits_window import judged
from sim.calibration.observed import of_journal
from sim.model.provider_config import ProviderConfig
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import FileSource
from sim.validation.backtest import Backtest, ComparedFigure, backtest
from sim.validation.run_forecast import foresee

TOKENS = (200, 1_000)
COUNTS, SHORT = (60, 200), (60,)
STOP_AFTER_S = 1_200.0
# Ours may be slower than the better of the two peers by no more, where that one lost nothing.
SLOWER_MOST = 0.03
INSIDE_LEAST, THROTTLED_INSIDE_LEAST, ERROR_MOST, SECOND_ERROR_MOST = 0.9, 0.85, 0.01, 0.05
PRESET, RECOMMENDED = "paceline", "recommended"
PEERS = ("SDK, 10 retries", "aiolimiter")


@dataclass(frozen=True, slots=True)
class Ours:
    """One run of ours, with its backtest. `is_second`: its forecast is from the calibrated journal of the first."""

    kind: str
    count: int
    settings: str
    policy: Policy
    lost: int
    found: Backtest
    is_second: bool


@dataclass(frozen=True, slots=True)
class Peer:
    """One run of a peer: when the last request ended, seconds, and how many were lost."""

    name: str
    makespan_s: float
    lost: int


def provider_of(kind: str) -> ProviderConfig:
    """The provider file of an endpoint."""
    return checked(ProviderConfig, described(kind), "provider")


def preset() -> Policy:
    """The preset, told the two limits and the charge rule, without the stagger, which would decide everything."""
    return Policy.preset("paceline").with_(
        tpm_limit=TPM,
        rpm_limit=RPM,
        charge_rule="prompt_plus_max",
        stagger_seconds=0.0,
        max_concurrency=peers_live.CONCURRENCY,
        tpm_headroom=peers_live.HEADROOM,
    )


@contextmanager
def endpoint(kind: str, time_scale: float) -> Iterator[tuple[str, Callable[[], asyncio.AbstractEventLoop] | None]]:
    """A fresh endpoint's base URL, and what makes loops for its clients. `time_scale` 0: on own time (`own_time`)."""
    if time_scale > 0.0:
        with served(kind, time_scale) as base_url:
            yield base_url, loop_factory(time_scale)
    else:
        with without_threads():
            app: Any = OwnTime(kind)
            yield BASE_URL, lambda: OwnTimeLoop(app, counts_work=False)


def run_ours(
    kind: str, count: int, path: Path, policy: Policy, scenario: Path, *, seed: int, time_scale: float, folder: Path
) -> Ours:
    """A batch under that policy against a fresh endpoint, its journal and its backtest.

    `scenario`: what its forecast is told. `folder`, a new one, bears the name of the settings.
    """
    folder.mkdir()
    with endpoint(kind, time_scale) as (base_url, loop):
        orders = Orders(
            requests=path,
            out=folder / "results.jsonl",
            journal=folder / "run.db",
            pools=[Pool(policy=policy, base_url=base_url, scenario=str(scenario))],
            environment=ENVIRONMENT,
            prices=Prices({}),
            manner=RunOptions(time_scale=time_scale or 1.0, new_loop=loop, stop_after_s=STOP_AFTER_S),
            seed=seed,
            yes=True,
        )
        with (folder / "said.txt").open("w", encoding="utf-8") as said:
            outcome = run_orders(orders, foresee=foresee, connect=connect_with(ENVIRONMENT), shown=Display(said))
    with Journal.open(folder / "run.db") as journal:
        found = backtest(journal, provider=provider_of(kind))
    lost = outcome.summary.failed + outcome.pending
    return Ours(kind, count, folder.name, policy, lost, found, folder.name == RECOMMENDED)


def run_peer(kind: str, name: str, batch: Sequence[Case], time_scale: float) -> Peer:
    """The same batch by a peer, against a fresh endpoint."""
    work = [(case.body, case.charge) for case in batch]
    with endpoint(kind, time_scale) as (base_url, loop), asyncio.Runner(loop_factory=loop) as runner:
        ends = runner.run(
            asyncio.wait_for(peers_live.run(peers_live.CONTENDERS[name], base_url, TPM, work), STOP_AFTER_S)
        )
    return Peer(name, max(ends), sum(end < 0.0 for end in ends))


def tried(kind: str, count: int, *, seed: int, time_scale: float, folder: Path) -> Iterator[Ours | Peer]:
    """All contenders on one endpoint."""
    batch = drawn(seed + count, count, TOKENS)
    path = folder / "batch.jsonl"
    write_lines(path, (case.body for case in batch))
    given: dict[str, Any] = {"seed": seed, "time_scale": time_scale}
    assumed = Scenario.of(FileSource(path=str(path)), provider=provider_of(kind), policy=preset(), seed=seed)
    scenario, learnt = folder / "scenario.yaml", folder / "learnt.yaml"
    assumed.write(scenario)
    yield run_ours(kind, count, path, preset(), scenario, folder=folder / PRESET, **given)
    calibrate(of_journal(str(folder / PRESET / "run.db"))).write(learnt)
    policy = plan(assumed, effort="quick").policy
    yield run_ours(kind, count, path, policy, learnt, folder=folder / RECOMMENDED, **given)
    for name in PEERS:
        yield run_peer(kind, name, batch, time_scale)


@contextmanager
def kept_in(keep: Path | None, name: str) -> Iterator[Path]:
    """A folder for the files of one endpoint: one that goes away, or a new one of that name under `keep`."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="paceline-outside-") as name:
            yield Path(name)
    else:
        folder = keep / name
        folder.mkdir(parents=True)
        yield folder


# ---------------------------------------------------------------- the probe


def asked(kind: str, seed: int) -> tuple[list[ProbeAnswer], int]:
    """The probe's answers on a fresh endpoint, and its calls."""
    with endpoint(kind, 0.0) as (base_url, loop), asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(_asked(base_url, random.Random(seed).uniform(0.0, 60.0)))


async def _asked(base_url: str, begin_s: float) -> tuple[list[ProbeAnswer], int]:
    await asyncio.sleep(begin_s)
    send = connect_with(ENVIRONMENT)(Pool(policy=preset(), base_url=base_url))
    probe = Probe(send, "gpt-4o-mini", Price(date.min, 0.15, 0.15, 0.60), 1.0, believed=(TPM, RPM), judge=judged)
    try:
        return await probed(probe), probe.calls
    finally:
        await send.aclose()


def probe_all(kinds: Sequence[str], seeds: Sequence[int]) -> int:
    """Ask each endpoint, print every answer, and return 1 if one is wrong."""
    counts: Counter[str] = Counter()
    for kind, seed in product(kinds, seeds):
        found, calls = asked(kind, seed)
        truth = provider_of(kind)
        told = []
        for answer in (each for each in found if hasattr(truth, each.name)):
            known = answer.value is not None
            word = "silent" if not known else "right" if answer.value == getattr(truth, answer.name) else "WRONG"
            counts[word] += 1
            told.append(f"{answer.name} {word}{f' ({answer.value})' if known else ''}")
        print(f"{kind}, seed {seed}: {calls} calls; {', '.join(told)}", flush=True)
    print(f"answers: {counts['right']} right, {counts['silent']} silent, {counts['WRONG']} wrong")
    return 1 if counts["WRONG"] else 0


# ---------------------------------------------------------------- the table


def _cell(c: ComparedFigure | None) -> str:
    return "-" if c is None else f"{c.measured:.1f} in {c.low:.1f}-{c.high:.1f}{'' if c.covered else ' !'}"


def _error(c: ComparedFigure | None) -> str:
    return "-" if c is None or c.error_ratio is None else f"{100.0 * c.error_ratio:+.1f} %"


def row(one: Ours) -> list[str]:
    """One line of the table."""
    b = one.found
    cells = [_cell(b.makespan_s), _error(b.makespan_s), _cell(b.throttled), _cell(b.forecast), _error(b.forecast)]
    return [f"{one.kind}, {one.count}", one.settings, *cells, str(one.lost)]


def verdict(ours: Sequence[Ours], slower: Sequence[str]) -> tuple[list[str], bool]:
    """The figures over all runs, and whether they keep what is promised."""
    n, found = len(ours), [one.found for one in ours]
    errors = [abs(b.makespan_s.error_ratio or 0.0) for b in found]
    inside, counted = sum(b.makespan_s.covered for b in found), sum(b.throttled.covered for b in found)
    lost = sum(one.lost for one in ours if one.settings == RECOMMENDED)
    forecasts = [one.found.forecast for one in ours if one.found.forecast is not None and not one.is_second]
    off = [abs(f.error_ratio or 0.0) for f in forecasts] or [0.0]
    seconds = [one.found.forecast for one in ours if one.found.forecast is not None and one.is_second]
    apart = [abs(s.error_ratio or 0.0) for s in seconds] or [0.0]
    lines = [
        f"backtest: finish inside its interval in {inside} of {n}, 429s in {counted} of {n}; median absolute error "
        f"{100 * median(errors):.2f} %, at most {100 * max(errors):.2f} %",
        f"forecast before the launch: inside in {sum(f.covered for f in forecasts)} of {len(forecasts)}, median "
        f"absolute error {100 * median(off):.1f} %",
        f"second run from a calibrated first: inside in {sum(s.covered for s in seconds)} of {len(seconds)}, median "
        f"absolute error {100 * median(apart):.1f} %",
        f"recommended settings: {lost} requests lost; slower than the better peer by more than "
        f"{SLOWER_MOST:.0%}: {'; '.join(slower) or 'nowhere'}",
    ]
    good = inside >= INSIDE_LEAST * n and counted >= THROTTLED_INSIDE_LEAST * n and median(errors) <= ERROR_MOST
    good = good and median(apart) <= SECOND_ERROR_MOST
    return lines, good and not lost and not slower


def main(words: list[str]) -> int:
    """Runs everything, prints the table; 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(prog="twin_outside")
    parser.add_argument("--short", action="store_true", help="60 requests only")
    parser.add_argument("--kind", action="append", choices=KINDS, help="an endpoint; all if none is named")
    parser.add_argument("--requests", type=int, nargs="+", default=None)
    parser.add_argument("--time-scale", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--keep", type=Path, help="a folder where journals stay")
    parser.add_argument("--probe", action="store_true", help="ask the endpoints by `paceline probe` instead")
    given = parser.parse_args(words)
    if not 0.0 <= given.time_scale <= 10.0:
        parser.error("--time-scale must be from 0 (own time) to 10")
    if given.probe:
        return probe_all(given.kind or KINDS, given.seeds)
    counts = given.requests or (SHORT if given.short else COUNTS)
    seeds = ", ".join(map(str, given.seeds))
    clocks = f"clocks {given.time_scale:g} times as fast" if given.time_scale else "on own time"
    print(f"seeds {seeds}; {TPM:,} TPM and {RPM} RPM, {clocks}", flush=True)
    ours: list[Ours] = []
    rows = [["endpoint", "settings", "finish s", "error", "429s", "forecast s", "error", "lost"]]
    slower, begun = [], time.monotonic()
    for kind in given.kind or KINDS:
        for count, seed in product(counts, given.seeds):
            with kept_in(given.keep, f"{kind.replace(' ', '-')}-{count}-{seed}") as folder:
                best, recommended_s = float("inf"), 0.0
                for one in tried(kind, count, seed=seed, time_scale=given.time_scale, folder=folder):
                    if isinstance(one, Ours):
                        ours.append(one)
                        rows.append(row(one))
                        if one.settings == RECOMMENDED:
                            recommended_s = one.found.makespan_s.measured
                    else:
                        rows.append([f"{kind}, {count}", one.name, f"{one.makespan_s:.1f}", *[""] * 4, str(one.lost)])
                        best = best if one.lost else min(best, one.makespan_s)
                    print(" | ".join(rows[-1]), flush=True)
                if recommended_s > (1.0 + SLOWER_MOST) * best:
                    slower.append(f"{kind}, {count}: {recommended_s:.1f} s for {best:.1f} s")
    lines, good = verdict(ours, slower)
    print(f"\n{table(rows)}\n\n! = outside of its interval")
    print("\n".join([*lines, f"{time.monotonic() - begun:.0f} s"]))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
