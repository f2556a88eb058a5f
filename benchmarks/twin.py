"""How close the twin is: live runs over HTTP against what was said of them, over pairs of runs drawn from a seed.

    python -m benchmarks.twin [--short] [--pairs 200] [--live 2] [--time-scale X] [--seed 1] [--keep DIR]
                              [--from DIR] [--minutes M] [--write]

Each pair draws a batch (sizes, caps; 30 to 60 requests, in every other two pairs 100 to 400), a provider (limits,
charge rule, settling, others on the quota; every third with server errors and dropped connections) and two sets of
settings (window, concurrency, stagger, order of launches; every third claims more than the limit, so that refusals
come). Runs are live, as `paceline run` does them: the official SDK, the asyncio driver, a journal on disk, `paceline
provider` over HTTP on loopback. Their clock counts waiting and the processor's time for both ends, so that what other
programs take of the machine does not show (`own_time`); with `--time-scale X` it is the machine's, X times as fast, and
the provider is a process of its own. There are three runs of each pair: a first one; a second one, of another batch of
the same kind, with chance of its own; and a third one, of the second's batch and chance under the other settings.
Times are from the first launch to the last end. Five things are scored:

* `rehearsal`: `backtest` of each run, told the provider, and by the journal what the run itself could not know;
* `second`: the second run by the forecast that a run makes of its batch before the first launch, from a scenario that
  `calibrate` made of the first run's journal;
* `changed`: the third run by the same, so after a change of settings;
* `chance`: both by the same forecast, but told the provider: what is left is chance, and no calibration can undo it;
* `replay`: second and third run, each by a replay of the other's journal under its own settings, told nothing else.

Each half-width has two parts, as root of the sum of squares: that of the simulation itself, and the model error, a
share of the prediction. The latter is estimated from the pairs of odd numbers (split conformal: the least share with
which at least 95 % of them, and one more, would be inside) and counted on the others. `--write` puts the page and the
shares that commands use (`sim/validation/model_error.json`) in place; `--from DIR` scores runs that `--keep` has kept.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from benchmarks.own_time import BASE_URL, OwnTimeLoop, without_threads
from benchmarks.page import publish, rows, told
from governor.forecast.forecast import Demand, Foresee, Outlook
from governor.journal.journal import Journal
from governor.model.errors import BadInput, PacelineError
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.prices import Prices
from governor.provider.sending import connect_with
from governor.run.batch import Orders, run_orders
from governor.run.pool_run import RunOptions
from governor.telemetry.progress import Display
from sim.app.options import ReplayOptions
from sim.app.replay_command import staged
from sim.calibration.calibrate import calibrate
from sim.calibration.observed import of_journal
from sim.model.provider_config import ProviderConfig
from sim.serving.server import Provider, spawn
from sim.validation.backtest import Backtest, backtest
from sim.validation.counterfactual import counterfactual
from sim.validation.model_error import FILE, ModelError, conformal, widened
from sim.validation.run_forecast import foresee
from sim.validation.twin import lessons

T = TypeVar("T")
SCALE_MOST = 20.0
PAIRS, SHORT = 200, 3
# A run that lasts longer has gone wrong: its pair is counted as failed.
STOP_AFTER_S = 3_600.0
# Requests of a batch. What chance does to the answers of a few dozen is more than any forecast could know.
FEW, MANY = (30, 60), (100, 400)
WORST = 12
# Replications of each rehearsal and replay.
RUNS = 12
MODEL = "gpt-4o-mini"
# Declared caps by kind of batch; a bimodal one has long answers besides.
CAPS = {"small": (200, 400), "mixed": (200, 2_000), "large": (1_000, 2_500), "bimodal": (150, 150)}
# A forecast is held to its promise on batches of MANY requests.
FORECASTS = ("second", "changed")
KINDS = ("rehearsal", "second", "changed", "chance", "replay")
# What is promised: median errors, and shares inside.
ERROR_MOST = {"rehearsal": 0.005, "second": 0.03, "changed": 0.03, "chance": 1.0, "replay": 0.03}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One scenario. `sizes`: (characters of the prompt, declared cap) of each request."""

    name: str
    shape: str
    provider: ProviderConfig
    policy: Policy
    sizes: tuple[tuple[int, int], ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Score:
    """One prediction of a makespan, seconds, and of 429s. `low_s` to `high_s`: without the model error."""

    kind: str
    pair: int
    name: str
    requests: int
    predicted_s: float
    low_s: float
    high_s: float
    measured_s: float
    throttled: float
    throttled_low: float
    throttled_high: float
    throttled_measured: float

    @property
    def error_ratio(self) -> float:
        """(measured - predicted) / measured."""
        return (self.measured_s - self.predicted_s) / self.measured_s

    @property
    def model_error_ratio(self) -> float:
        """The least model error with which the measured makespan is inside."""
        off_s = self.measured_s - self.predicted_s
        own_s = self.high_s - self.predicted_s if off_s > 0.0 else self.predicted_s - self.low_s
        return max(0.0, off_s**2 - own_s**2) ** 0.5 / self.predicted_s

    @property
    def is_small(self) -> bool:
        """Whether the batch is of a few dozen requests."""
        return self.requests <= FEW[1]

    @property
    def has_refusals(self) -> bool:
        """Whether some may come, by the prediction."""
        return self.throttled_high > 0.0

    @property
    def counts_inside(self) -> bool:
        """Whether the 429s are."""
        return self.throttled_low <= self.throttled_measured <= self.throttled_high


def drawn(seed: int, number: int) -> Drawn:
    """The scenario of that number under a seed: shaped so that it lasts about a minute of its own time."""
    rng = random.Random(f"{seed}/{number}")
    shape = rng.choice(list(CAPS))
    sizes = sizes_of(shape, number, rng)
    needed = sum(chars // 4 + cap for chars, cap in sizes)
    settles = rng.random() < 0.4
    rule = rng.choice(["prompt_plus_max", "max_of"])
    if rule == "max_of":
        needed = sum(max(chars // 4, cap) for chars, cap in sizes)
    largest = max(chars // 4 + cap for chars, cap in sizes)
    # About half a minute's to one and a half minutes' worth of tokens beyond the first bucket.
    tpm = round(max(2.5 * largest, needed / rng.uniform(1.5, 2.5)))
    share = rng.choice([0.0, 0.0, 0.1, 0.25])
    bursts = share > 0.0 and rng.random() < 0.5
    cotenant = {"share": share, "burst_s": 10.0 if bursts else 0.0, "period_s": 30.0 if bursts else 0.0}
    window = rng.choice(["fixed", "sliding", "bucket", "bucket"])
    faults = {"error_ratio": 0.08, "drop_ratio": 0.04} if number % 3 == 1 else {}
    provider = ProviderConfig(
        tpm=tpm,
        rpm=500,
        charge_rule=rule,
        settles=settles,
        cotenant=cotenant,
        latency=MODEL,
        window="clock" if window == "fixed" else "bucket",
    ).with_(faults=faults)
    is_over = number % 3 == 2
    headroom = rng.choice([0.01, 0.05]) if share == 0.0 else rng.choice([0.05, 0.3])
    policy = Policy.preset("paceline").with_(
        tpm_limit=round(1.3 * tpm) if is_over else tpm,
        rpm_limit=500,
        tpm_window=window,
        charge_rule=rule,
        settle=settles,
        max_concurrency=rng.choice([3, 8, 20, 40]),
        stagger_seconds=rng.choice([0.0, 0.0, 0.5, 1.5]),
        tpm_headroom=0.0 if is_over else headroom,
        launch_order=rng.choice(["fifo", "longest_first"]),
        # A counter that falls at the full minute states a wait from which its headers read like a limit per day.
        sync_headers=window != "fixed" and rng.random() < 0.5,
    )
    others = f"others {share:.0%}{' in bursts' if bursts else ''}" if share else ""
    words = [shape, window, rule, "settles" if settles else "", others, "faults" if faults else "", "over" * is_over]
    return Drawn(
        name=" ".join(filter(None, words)),
        shape=shape,
        provider=provider,
        policy=policy,
        sizes=sizes,
        seed=rng.randrange(2**31),
    )


def sizes_of(shape: str, number: int, rng: random.Random) -> tuple[tuple[int, int], ...]:
    """A batch of that kind, for that pair: (characters of the prompt, declared cap) of each request."""
    found = []
    for _ in range(rng.randint(*(MANY if number // 2 % 2 else FEW))):
        cap = 2_000 if shape == "bimodal" and rng.random() < 0.3 else rng.randint(*CAPS[shape])
        found.append((rng.randint(200, 4_000), cap))
    return tuple(found)


def pair_of(seed: int, number: int) -> tuple[Drawn, Drawn, Drawn]:
    """First run, second run, and the second under other settings; see the module's docstring."""
    first = drawn(seed, number)
    rng = random.Random(f"{seed}/{number}/second")
    second = replace(first, sizes=sizes_of(first.shape, number, rng), seed=rng.randrange(2**31))
    changes: dict[str, Any] = {
        "max_concurrency": rng.choice([3, 8, 20, 40]),
        "stagger_seconds": rng.choice([0.0, 0.5, 1.5]),
        "launch_order": rng.choice(["fifo", "longest_first"]),
        "tpm_headroom": rng.choice([0.0, 0.05, 0.2]),
    }
    return first, second, replace(second, policy=second.policy.with_(**changes))


def written(scenario: Drawn, path: Path) -> None:
    """The batch as a JSONL file."""
    rng = random.Random(scenario.seed)
    with path.open("w", encoding="utf-8") as file:
        for i, (chars, cap) in enumerate(scenario.sizes):
            text = "".join(rng.choices("abcdefgh ", k=chars))
            body = {"model": MODEL, "max_tokens": cap, "messages": [{"role": "user", "content": text}]}
            line = {"custom_id": f"q-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def run_live(scenario: Drawn, time_scale: float, folder: Path, foresee: Foresee | None = None) -> None:
    """The scenario over HTTP on loopback; its files stay in `folder`. BadInput where it does not end.

    `time_scale`: of the machine's clock, with the provider in a process of its own; 0 = on own time (`own_time`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    written(scenario, folder / "batch.jsonl")
    # Another seed than the run's: what the provider draws is not ours to know.
    seed = scenario.seed ^ 0x5EED
    if time_scale:
        options: dict[str, Any] = {"seed": seed, "time_scale": time_scale, "stated_time": "provider"}
        with spawn(scenario.provider, **options) as server:
            _run(
                scenario, server.base_url, RunOptions(time_scale=time_scale, stop_after_s=STOP_AFTER_S), folder, foresee
            )
    else:
        provider = Provider(scenario.provider, seed=seed)
        manner = RunOptions(new_loop=lambda: OwnTimeLoop(provider), stop_after_s=STOP_AFTER_S)
        with without_threads():
            _run(scenario, BASE_URL, manner, folder, foresee)


def _run(scenario: Drawn, base_url: str, manner: RunOptions, folder: Path, foresee: Foresee | None) -> None:
    environment = {"OPENAI_API_KEY": "no-key-is-needed", "OPENAI_BASE_URL": base_url}
    orders = Orders(
        requests=folder / "batch.jsonl",
        out=folder / "results.jsonl",
        journal=folder / "run.db",
        pools=[Pool(policy=scenario.policy, base_url=base_url)],
        environment=environment,
        prices=Prices({}),
        manner=manner,
        seed=scenario.seed,
        yes=True,
    )
    with (folder / "said.txt").open("w", encoding="utf-8") as said:
        outcome = run_orders(orders, foresee=foresee, connect=connect_with(environment), shown=Display(said))
    if outcome.pending:
        raise BadInput(f"{outcome.pending} requests were left when it stopped: {outcome.stopped}", scenario.name)


def rehearsed(scenario: Drawn, time_scale: float, folder: Path) -> Backtest:
    """The scenario run live, forecast and all, and its backtest."""
    run_live(scenario, time_scale, folder, foresee)
    with Journal.open(folder / "run.db") as journal:
        return backtest(journal, provider=scenario.provider)


# ---------------------------------------------------------------- the scores


def folders_of(keep: Path, number: int) -> list[Path]:
    """Where the three runs of a pair are."""
    return [keep / str(number) / each for each in ("first", "second", "changed")]


def ran(seed: int, number: int, time_scale: float, keep: Path, end_s: float) -> bool:
    """Runs a pair live; False where it would have begun after `end_s` on the machine's clock."""
    if time.time() > end_s:
        return False
    for folder, scenario in zip(folders_of(keep, number), pair_of(seed, number), strict=True):
        run_live(scenario, time_scale, folder)
    return True


def scored(seed: int, number: int, keep: Path) -> list[Score]:
    """All scores of a pair that has run."""
    return list(scores_in(number, folders_of(keep, number), pair_of(seed, number)))


def scores_in(number: int, folders: Sequence[Path], scenarios: Sequence[Drawn]) -> Iterator[Score]:
    """The scores of three runs that have been made."""
    runs = []
    for folder, scenario in zip(folders, scenarios, strict=True):
        with Journal.open(folder / "run.db") as journal:
            found = backtest(journal, provider=scenario.provider, runs=RUNS, model_error_ratio=0.0)
            runs.append((lessons(journal)[0], [result.request.sizes for result in journal.results()]))
        m, t = found.makespan_s, found.throttled
        figures = m.predicted, m.low, m.high, m.measured, t.predicted, t.low, t.high, t.measured
        yield Score("rehearsal", number, scenario.name, len(scenario.sizes), *figures)
    learnt, known = (folders[0] / name for name in ("learnt.yaml", "known.yaml"))
    calibrate(of_journal(str(folders[0] / "run.db"))).write(learnt)
    known.write_text(json.dumps(scenarios[0].provider.model_dump(mode="json", exclude_defaults=True)), encoding="utf-8")
    for kind, scenario, (lesson, sizes) in zip(("second", "changed"), scenarios[1:], runs[1:], strict=True):
        demand = Demand()
        for each in sizes:
            demand.add(MODEL, each, 0)
        for by, file in ((kind, learnt), ("chance", known)):
            pool = Pool(policy=scenario.policy, scenario=str(file))
            f = foresee(Outlook(pool=pool, demand=demand, seed=scenario.seed), 0.0)
            counts = f.throttled, f.throttled_low, f.throttled_high, float(lesson.throttled)
            figures = f.finish_s, f.low_s, f.high_s, lesson.makespan_s, *counts
            yield Score(by, number, scenario.name, len(sizes), *figures)
    for i, j in ((1, 2), (2, 1)):
        measured, policy = runs[j][0], scenarios[j].policy
        name, stages = staged(str(folders[i] / "run.db"), [runs[i][0]], ReplayOptions())
        c = counterfactual(stages, lambda _, policy=policy: policy, runs=RUNS, model_error_ratio=0.0)  # type: ignore[misc]
        m, t = c.makespan_s, c.throttled
        figures = m.would, m.was + m.low, m.was + m.high, measured.makespan_s, t.would, t.was + t.low, t.was + t.high
        figures = *figures, float(measured.throttled)
        yield Score("replay", number, f"{scenarios[j].name}, {name}", len(scenarios[j].sizes), *figures)


# ---------------------------------------------------------------- what they come to


def errors_of(kind: str, scores: Iterable[Score]) -> tuple[float, float]:
    """The model error of a kind, from the pairs of odd numbers, without refusals and with; 0 for chance alone.

    Forecasts before and after a change are of one.
    """
    kinds = FORECASTS if kind in FORECASTS else (kind,)
    mine = [s for s in scores if s.kind in kinds and s.pair % 2]
    calm, others = ([s.model_error_ratio for s in mine if s.has_refusals is has] for has in (False, True))
    if kind == "chance":
        return 0.0, 0.0
    # Rounded up to a thousandth: less than that no clock but its own can be trusted with.
    calm_ratio, other_ratio = (
        math.ceil(1_000.0 * conformal(each)) / 1_000.0 for each in (calm or others, others or calm)
    )
    return calm_ratio, other_ratio


def summed_up(scores: Sequence[Score]) -> tuple[list[list[str]], bool]:
    """Rows for each kind, and whether it is as promised."""
    found, good = [], True
    for kind in KINDS:
        mine = [score for score in scores if score.kind == kind]
        if len({score.pair % 2 for score in mine}) < 2:
            continue
        ratios = errors_of(kind, scores)
        many = [s for s in mine if not s.is_small]
        for name, part in (
            (kind, mine),
            (f"... {FEW[0]} to {FEW[1]} requests", [s for s in mine if s.is_small]),
            (f"... {MANY[0]} to {MANY[1]} requests", many),
            ("... no 429s foreseen", [s for s in mine if not s.has_refusals]),
            ("... 429s foreseen", [s for s in mine if s.has_refusals]),
        ):
            # Nothing is learnt for chance alone: all of it counts.
            held_out = [s for s in part if s.pair % 2 == 0 or kind == "chance"]
            if not held_out:
                continue
            inside = sum(s.model_error_ratio <= ratios[s.has_refusals] for s in held_out)
            errors = sorted(abs(s.error_ratio) for s in part)
            ends = [widened(s.low_s, s.predicted_s, s.high_s, ratios[s.has_refusals]) for s in held_out]
            widths = [(high - low) / 2.0 / value for low, value, high in ends]
            are = {s.has_refusals for s in part}
            found.append(
                [
                    name,
                    f"{len(part)}",
                    f"{median(errors):.2%}",
                    f"{errors[math.ceil(0.9 * len(errors)) - 1]:.1%}",
                    f"{errors[-1]:.0%}",
                    f"{median(s.error_ratio for s in part):+.2%}",
                    "" if len(are) > 1 or kind == "chance" else f"{ratios[are.pop()]:.2%}",
                    f"{median(widths):.1%}",
                    told(inside, len(held_out)),
                    told(sum(s.counts_inside for s in part), len(part)),
                ]
            )
            if part is mine:
                good = good and 0.93 <= inside / len(held_out) <= 0.97
            if part is (many if kind in FORECASTS else mine):
                good = good and median(errors) <= ERROR_MOST[kind]
    return found, good


HEADER = ["prediction", "runs", "median error", "90 % below", "worst", "median, signed", "model error"]
HEADER += ["median half-width", "makespan inside", "429s inside"]


def page_of(scores: Sequence[Score], failures: Sequence[str], given: argparse.Namespace, took_s: float) -> str:
    """The part of the page that these make."""
    worst = sorted(scores, key=lambda score: -score.model_error_ratio)[:WORST]
    off = [
        [
            s.kind,
            f"{s.pair}: {s.name}",
            f"{s.measured_s:.1f}",
            f"{s.predicted_s:.1f}",
            f"{s.error_ratio:+.1%}",
            f"{s.throttled_measured:.0f} for {s.throttled:.1f}",
        ]
        for s in worst
    ]
    pairs = len({score.pair for score in scores})
    clock = f"clocks {given.time_scale:g} times as fast" if given.time_scale else "on own time"
    took = ", as kept by an earlier run of the command" if given.kept else f"; {took_s / 60.0:.0f} minutes"
    lines = [
        f"{pairs} pairs of seed {given.seed}, three live runs each, {clock}{took}. Pairs that failed: {len(failures)}.",
        *(f"\n* {failure}" for failure in failures),
        "",
        rows(HEADER, summed_up(scores)[0]),
        "",
        f"The {len(off)} furthest outside:",
        "",
        rows(["prediction", "pair", "measured s", "predicted s", "error", "429s"], off),
    ]
    return "\n".join(lines)


def write(scores: Sequence[Score], page: str, command: str) -> None:
    """Puts the page and the model errors that commands use in place."""
    publish("twin", page, command)
    kinds = {"rehearsal": "rehearsal", "forecast": "second", "replay": "replay"}
    found: dict[str, Any] = {}
    runs: dict[str, list[int]] = {}
    for name, kind in kinds.items():
        found[name] = [round(ratio, 4) for ratio in errors_of(kind, scores)]
        mine = [s for s in scores if s.pair % 2 and (s.kind in FORECASTS if kind in FORECASTS else s.kind == kind)]
        runs[name] = [sum(s.has_refusals is has for s in mine) for has in (False, True)]
    error = ModelError(**found, made=datetime.now(UTC).date().isoformat(), command=command, runs=runs)
    FILE.write_text(json.dumps(error._asdict(), indent=2) + "\n", encoding="utf-8")


def options(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="twin")
    parser.add_argument("--short", action="store_true", help=f"{SHORT} pairs")
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--live", type=int, default=os.cpu_count() or 1, help="live runs at a time")
    parser.add_argument("--time-scale", type=float, default=0.0, help="of the machine's clock; 0 = on own time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=1, help="number of the first pair")
    parser.add_argument("--minutes", type=float, default=0.0, help="no pair begins later; 0 = no bound")
    parser.add_argument("--keep", type=Path, default=None, help="a folder where the runs stay")
    parser.add_argument("--from", dest="kept", type=Path, default=None, help="score the runs in such a folder")
    parser.add_argument("--write", action="store_true", help="write the page and the model error")
    given = parser.parse_args(words)
    if not 0.0 <= given.time_scale <= SCALE_MOST:
        parser.error(f"--time-scale must be from 0 to {SCALE_MOST:g}")
    given.pairs = given.pairs or (SHORT if given.short else PAIRS)
    return given


def main(words: list[str]) -> int:
    """Runs the pairs, prints a line per score and the table; 1 where a promise is not kept."""
    given = options(words)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="paceline-twin-") as name:
        keep = given.kept or given.keep or Path(name)
        numbers = list(range(given.first, given.first + given.pairs))
        failures: list[str] = []
        if given.kept is None:
            end_s = time.time() + 60.0 * given.minutes if given.minutes else math.inf
            made = _each(ran, [(given.seed, n, given.time_scale, keep, end_s) for n in numbers], given.live, failures)
            numbers = [n for n, has_run in zip(numbers, made, strict=True) if has_run]
        else:
            numbers = [n for n in numbers if (folders_of(keep, n)[-1] / "run.db").exists()]
        took_s = time.monotonic() - begun
        # Afterwards, so that no scoring takes the processor from a run.
        found = _each(scored, [(given.seed, n, keep) for n in numbers], os.cpu_count() or 1, failures)
    scores = [score for mine in found if mine is not None for score in mine]
    for s in scores:
        print(
            f"{s.pair} {s.kind} {s.name}: {s.measured_s:.1f} s in {s.low_s:.1f}-{s.high_s:.1f}, predicted "
            f"{s.predicted_s:.1f} ({s.error_ratio:+.2%}); 429s {s.throttled_measured:.0f} in "
            f"{s.throttled_low:.0f}-{s.throttled_high:.0f}, predicted {s.throttled:.1f}"
        )
    if not scores:
        return 1
    table, good = summed_up(scores)
    print(rows(HEADER, table), f"\n{len(failures)} pairs failed; {time.monotonic() - begun:.0f} s", sep="\n")
    if given.write:
        command = " ".join(["python -m benchmarks.twin", *words])
        write(scores, page_of(scores, failures, given, took_s), command)
    return 0 if good and not failures else 1


def _each(work: Callable[..., T], asked: list[tuple[Any, ...]], processes: int, failures: list[str]) -> list[T | None]:
    """What `work` makes of each, by so many processes; None where it failed, which is printed and noted."""
    found: list[T | None] = [None] * len(asked)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as workers:
        begun = {workers.submit(work, *arguments): i for i, arguments in enumerate(asked)}
        for done in as_completed(begun):
            i = begun[done]
            try:
                found[i] = done.result()
            except (PacelineError, OSError, AssertionError, TimeoutError) as error:
                failures.append(f"pair {asked[i][1]}: {type(error).__name__}: {error}")
                print(failures[-1], flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
