"""How often do stated intervals hold? Known truths are drawn, and what is stated of them is counted as right or wrong.

Three parts: the figures of `calibrate` over drawn logs; its outlook against a second log of the same kind, under noise
that is log-normal or not; and the share in time that `capacity` states, against many runs that it never saw. Each
coverage is printed with its own interval (Clopper and Pearson, 95 %). The seeds are fixed: the same counts everywhere.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from scipy import stats

from benchmarks.bench_calibrate import drawn, holds
from sim.app.example_log import write_log
from sim.calibration.calibrate import calibrate, read_sources


def told(name: str, hits: int, of: int) -> str:
    """One line: a coverage and its interval."""
    low, high = stats.binomtest(hits, of).proportion_ci(0.95, method="exact")
    return f"{name:<28}{hits:>6,} of {of:<6,} {hits / of:6.1%} ({low:.1%} to {high:.1%})"


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


def main() -> None:
    """Prints all three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a twentieth of the logs and questions")
    count = 25 if parser.parse_args().short else 500
    with tempfile.TemporaryDirectory() as folder:
        right, stated = figures(count, Path(folder))
    print(f"calibrate: intervals of 95 %, {count} drawn logs")
    for name in stated:
        print(f"  {told(name, right[name], stated[name])}")
    print(f"  {told('all', right.total(), stated.total())}")


if __name__ == "__main__":
    main()
