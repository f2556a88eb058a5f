"""How often do stated intervals hold? Known truths are drawn, and what is stated of them is counted as right or wrong.

    python -m benchmarks.bench_coverage [--short] [--part figures|outlooks|capacity] [--write]

Three parts: the figures of `calibrate` over drawn logs; its outlook against a second log of the same kind, under noise
that is log-normal or not; and the share in time that `capacity` states, against many runs that it never saw. Each
coverage is printed with its own interval (Clopper and Pearson, 95 %). The seeds are fixed: the same counts everywhere.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.bench_calibrate import drawn, holds
from benchmarks.page import publish, rows, told
from governor.model.policy import Policy
from sim.calibration.calibrate import calibrate, outlook, read_sources, tokens_per_min
from sim.calibration.fits import SCORES
from sim.calibration.logs import write_log
from sim.des.engines import simulated
from sim.experiment.experiment import Pool, case_of, replicate
from sim.model.provider_config import ProviderConfig
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import ModelSource
from sim.selection.capacity import at_limits, capacity

PARTS = ("figures", "outlooks", "capacity")
# Noise of answer times: log-normal, of two kinds of answers, and with a heavy tail (Student's t of three degrees).
NOISES = (
    (),
    ({"log_ratios": (np.where(SCORES < 0.0, -0.5, 0.5) + 0.05 * SCORES).tolist()},),
    ({"log_ratios": (0.2 * stats.t.ppf(stats.norm.cdf(SCORES), 3)).tolist()},),
)


def figures(logs: int, folder: Path, requests: int = 0) -> tuple[Counter[str], Counter[str]]:
    """(intervals that hold, intervals stated) by figure, over so many drawn logs."""
    right: Counter[str] = Counter()
    stated: Counter[str] = Counter()
    path = folder / "log.csv"
    for seed in range(1, logs + 1):
        known = drawn(10_000 + seed, requests)
        write_log(known.scenario, path)
        found = calibrate(read_sources([str(path)], {}))
        for name, true in known.truth.items():
            figure = found[name]
            if figure.known and not (figure.low is None and figure.high is None):
                stated[name] += 1
                right[name] += holds(figure, true)
    return right, stated


def outlooks(pairs: int, folder: Path) -> Counter[str]:
    """How many second logs lie in the outlook of a first one of the same kind, for either of its figures."""
    right: Counter[str] = Counter()
    path = folder / "log.csv"
    for seed in range(1, pairs + 1):
        known = drawn(20_000 + seed)
        provider = known.scenario.provider
        late = {**provider.latency.model_dump(), "noise": NOISES[seed % len(NOISES)]}
        first = known.scenario.with_(provider=provider.with_(latency=late))
        source = first.source.model_copy(update={"seed": 30_000 + seed})
        second = first.with_(source=source, workload=source.load(), seed=30_000 + seed)
        write_log(first, path)
        found = calibrate(read_sources([str(path)], {}))
        # As a batch, in which waits do not hide how long answers take.
        policy = found.scenario.policy.with_(stagger_seconds=0.0, max_concurrency=8)
        ahead = outlook(
            found.scenario.with_(policy=policy, arrivals="batch"), len(second.workload), unknowns=found.unknowns
        )
        case = case_of(second.with_(policy=policy, arrivals="batch"))
        makespan_s = simulated(case, second.seed).summary(case.grant).makespan_s
        assert ahead.tokens_per_min is not None
        right["tokens per minute"] += (
            ahead.tokens_per_min[1] <= tokens_per_min(second.workload) <= ahead.tokens_per_min[2]
        )
        right["makespan"] += ahead.makespan_s[1] <= makespan_s <= ahead.makespan_s[2]
    return right


def shares(questions: int, fresh: int) -> tuple[Counter[str], int]:
    """(answers whose share in time is as stated, answers) of `capacity`, each against `fresh` runs of its own."""
    right: Counter[str] = Counter()
    answers = 0
    pool = Pool(0, engine="compiled")
    for seed in range(1, questions + 1):
        rng = random.Random(seed)
        requests = rng.randint(20, 80)
        p50, o50 = rng.uniform(200, 1_500), rng.uniform(50, 250)
        source = ModelSource(
            requests=requests,
            prompt_tokens=(p50, p50 * rng.uniform(1.5, 4.0)),
            output_tokens=(o50, o50 * rng.uniform(1.5, 4.0)),
            max_tokens=rng.choice([400, 1_000]),
            seed=seed,
        )
        late = {"sigma": rng.uniform(0.1, 0.5), "stall_ratio": rng.choice([0.0, 0.002, 0.01])}
        others = {"share": rng.choice([0.0, 0.2]), "burst_s": 10.0, "period_s": 60.0}
        provider = ProviderConfig(cotenant=others, faults={"error_ratio": rng.choice([0.0, 0.01])}, latency=late)
        policy = Policy.preset("paceline").with_(max_concurrency=rng.choice([4, 16, 64]), stagger_seconds=0.0)
        scenario = Scenario.of(source, provider=provider, policy=policy, seed=seed)
        charged = float(scenario.charges().sum())
        minutes = max(1.0, charged / rng.uniform(20_000, 60_000))
        found = capacity(scenario, 60.0 * minutes, retune=seed % 5 == 0, pool=pool).smallest
        if found is None:
            continue
        answers += 1
        limited = at_limits(scenario, found.tpm, found.rpm).with_(
            policy=found.forecast.policy, seed=10**8 + seed * fresh
        )
        runs = replicate(limited, fresh, pool=pool).runs
        on_time = sum(run["failed"] == 0 and run["makespan_s"] <= 60.0 * minutes for run in runs) / fresh
        right["the share asked for (95 %)"] += on_time >= 0.95
        right["the lower limit that is printed"] += on_time >= found.on_time_at_least
    return right, answers


def lines_of(right: Counter[str], stated: Mapping[str, int]) -> list[list[str]]:
    """A coverage each line."""
    return [[name, told(right[name], of)] for name, of in stated.items()]


def main() -> None:
    """Prints the parts that are asked for, each as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a twentieth of the logs and questions")
    parser.add_argument("--part", action="append", choices=PARTS, help="one of them; all if none is named")
    parser.add_argument("--write", action="store_true", help="write them into docs/explanation/accuracy.md")
    given = parser.parse_args()
    count, fresh = (25, 400) if given.short else (500, 2_000)
    for part in given.part or PARTS:
        if part == "capacity":
            # A quarter of the questions have no answer.
            questions = 7 * count // 5
            right, answers = shares(questions, fresh)
            what = f"capacity, {answers} answers to {questions} questions, each against {fresh:,} runs of its own"
            lines = lines_of(right, dict.fromkeys(right, answers))
        else:
            with tempfile.TemporaryDirectory() as folder:
                if part == "figures":
                    right, stated = figures(count, Path(folder))
                    what = f"calibrate, intervals of 95 %, {count} drawn logs"
                    lines = [*lines_of(right, stated), ["all of them", told(right.total(), stated.total())]]
                else:
                    right = outlooks(count, Path(folder))
                    what = f"calibrate's outlook of 95 %, {count} second logs"
                    lines = lines_of(right, dict.fromkeys(right, count))
        print(what, *(f"  {name:<33} {coverage}" for name, coverage in lines), sep="\n", flush=True)
        if given.write:
            publish(part, rows([what, "holds"], lines), f"python -m benchmarks.bench_coverage --part {part} --write")


if __name__ == "__main__":
    main()
