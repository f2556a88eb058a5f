"""How close a replay is: pairs of live runs over HTTP, each run replayed under its own settings and under the other's.

    python -m benchmarks.replayed [--short] [--pairs 12] [--time-scale 8] [--seed 11]

The scenarios are those of `benchmarks.twin`, every third with server errors and dropped connections, every third with
settings that claim more than the limit, so that refusals come. Each runs twice against one provider, under two draws of
settings. A replay is told nothing but the journal: also the provider is the one that explains it best.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.twin import Drawn, drawn, rehearsed
from governor.journal.journal import Journal
from governor.model.policy import Policy
from sim.app.replay_command import ReplayOptions, replayed
from sim.validation.twin import Lesson, lessons

SCALE, PAIRS, SHORT = 8.0, 12, 2
OWN_MOST, ERROR_MOST = 0.005, 0.01


def pair_of(seed: int, number: int) -> tuple[Drawn, Drawn]:
    """One batch and one provider under two settings."""
    first = drawn(seed, number)
    if number % 3 == 1:
        faults = {**first.provider.faults.model_dump(), "error_ratio": 0.08, "drop_ratio": 0.04}
        first = dataclasses.replace(first, provider=first.provider.with_(faults=faults))
    if number % 3 == 2:
        over = first.policy.with_(tpm_headroom=0.0, tpm_limit=round(1.3 * first.provider.tpm))
        first = dataclasses.replace(first, policy=over)
    rng = random.Random(f"{seed}/{number}/second")
    changes: dict[str, Any] = {
        "max_concurrency": rng.choice([3, 8, 20, 40]),
        "stagger_seconds": rng.choice([0.0, 0.5, 1.5]),
        "launch_order": rng.choice(["fifo", "longest_first"]),
        "tpm_headroom": rng.choice([0.0, 0.05, 0.2]),
    }
    return first, dataclasses.replace(first, policy=first.policy.with_(**changes))


def lesson_in(folder: Path) -> Lesson:
    """What the one pool of the run in that folder teaches."""
    with Journal.open(folder / "run.db") as journal:
        return lessons(journal)[0]


def replay_in(folder: Path, policy: Policy) -> dict[str, Any]:
    """The run in that folder under that policy, as `--json` prints it."""
    env = folder / "other.env"
    env.write_text(policy.to_env(everything=True), encoding="utf-8")
    return replayed(str(folder / "run.db"), ReplayOptions(env_file=str(env)), 110)[0]


def main(words: list[str]) -> int:
    """Runs the pairs, prints a line per replay; 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(prog="replayed")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--time-scale", type=float, default=SCALE)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--first", type=int, default=1, help="number of the first scenario")
    given = parser.parse_args(words)
    count = given.pairs or (SHORT if given.short else PAIRS)
    exact, own_off, errors, inside, counts_inside = 0, [], [], 0, 0
    for number in range(given.first, given.first + count):
        with tempfile.TemporaryDirectory(prefix="paceline-replayed-") as name:
            folders = [Path(name) / "first", Path(name) / "second"]
            scenarios = pair_of(given.seed, number)
            for folder, scenario in zip(folders, scenarios, strict=True):
                folder.mkdir()
                rehearsed(scenario, given.time_scale, folder)
            runs = [lesson_in(folder) for folder in folders]
            for i in (0, 1):
                run, other = runs[i], runs[1 - i]
                found = replay_in(folders[i], scenarios[1 - i].policy)
                own, m, counts = found["own_settings"], found["makespan_s"], found["throttled"]
                exact += (own["launches"], own["throttled"]) == (run.launches, run.throttled)
                own_off.append(abs(own["makespan_s"] / run.makespan_s - 1.0))
                errors.append(abs(m["would"] / other.makespan_s - 1.0))
                inside += m["low"] <= other.makespan_s - run.makespan_s <= m["high"]
                counts_inside += counts["low"] <= other.throttled - run.throttled <= counts["high"]
                print(
                    f"{number}{'ab'[i]} {scenarios[i].name}: own {own['launches']:.0f} of {run.launches} launches, "
                    f"{own['throttled']:.0f} of {run.throttled} 429s, makespan {100.0 * own_off[-1]:.3f} % off; other "
                    f"settings {m['would']:.1f} s for {other.makespan_s:.1f} s ({100.0 * errors[-1]:.2f} % off), "
                    f"429s {counts['would']:.1f} for {other.throttled}",
                    flush=True,
                )
    n = len(errors)
    print(
        f"own settings: launches and 429s exact in {exact} of {n}, makespan at most {100.0 * max(own_off):.2f} % off\n"
        f"other settings: makespan {100.0 * median(errors):.2f} % off in the median, at most "
        f"{100.0 * max(errors):.1f} %; inside the 95 % interval {inside} of {n}, 429s {counts_inside} of {n}"
    )
    return 0 if exact == n and max(own_off) <= OWN_MOST and median(errors) <= ERROR_MOST else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
