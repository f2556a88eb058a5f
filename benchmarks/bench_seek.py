"""Unknown limits: how much of a quota is used that nobody states, how often it is met, and how soon it is found again.

    python -m benchmarks.bench_seek [--short | --peers]

The synthetic provider states no counts; the law has to find its tokens per minute (OPENAI_FIND_LIMITS=tokens), in
virtual time, with every kind of window, with the wait stated and without. Requests of 200 to 800 tokens take about 12
seconds. `of bound`: the time below which nobody could be, knowing everything, over the batch's. Beside it the same
batch with the limit known to the policy, in a bucket with 1 % headroom: what knowing the limit is worth.

Then the limit is halved or doubled in mid-run: after how many seconds the limit found first is within a tenth of the
new one, at four moments within a minute.

Last, what `peer_seek` restates of inspect_ai and langroid beside it, with a steady limit and with one that is halved.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from benchmarks.peer_seek import InspectAi, Langroid, figures
from governor import law
from governor.model.policy import Policy
from sim.des.driver import Simulation
from sim.experiment.experiment import Case, case_of, figures_of
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import from_tokens
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import ModelSource

SEED = 1
MINUTES = 30
WINDOWS = ("bucket", "anchored", "clock", "sliding")
SAYS = ("ms", "absent")


def case(count: int, tpm: int, find: str, **provider: Any) -> Case:
    """The batch at that provider, under a policy to which nothing but the limit of tokens matters."""
    rng = np.random.default_rng(SEED)
    policy = Policy.preset("paceline").with_(
        find_limits=find,
        tpm_limit=tpm,
        tpm_headroom=0.01,
        stagger_s=0.0,
        max_concurrency=1_000,
        sync_headers=False,
        charge_rule="prompt_plus_max",
    )
    workload = from_tokens(
        rng.integers(200, 801, count),
        np.zeros(count, np.int64),
        max_tokens=0,
        recorded_s=12.0 * rng.lognormal(0.0, 0.3, count),
        role_chars=np.zeros(count, np.int64),
    )
    config = {"tpm": tpm, "counts": "none", "charge_rule": "prompt_plus_max", **provider}
    source = ModelSource(requests=count, prompt_tokens=(1, 1), output_tokens=(1, 1))
    return case_of(
        Scenario(source=source, workload=workload, provider=ProviderConfig.model_validate(config), policy=policy)
    )


class Watched(Simulation):
    """A simulation that notes the limit found after each event: `found`, pairs of time and tokens per minute."""

    found: list[tuple[float, float]]

    def launch(self, job: Any, now: float) -> None:
        """Note it at each launch."""
        self.__dict__.setdefault("found", []).append((now, self.s.scale[law.TPM]))
        super().launch(job, now)


def run(work: Case) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """The figures of one run, and the limit found over time."""
    simulation = Watched(work.columns, work.params, work.provider, seed=SEED, from_trace=False)
    return figures_of(simulation.run(), work.grant, SEED), simulation.found


def steady(rates: tuple[int, ...]) -> None:
    """One line per rate, window and form of refusal."""
    print("tokens/min window    wait    of bound 429s/100  lost   known 429s/100")
    for tpm in rates:
        for window in WINDOWS:
            for says in SAYS:
                both = [
                    run(case(tpm * MINUTES // 500, tpm, find, window=window, retry_after=says))[0]
                    for find in ("tokens", "none")
                ]
                (a, b), (x, y) = ((f["efficiency"], 100.0 * f["throttled"] / f["attempts"]) for f in both)
                lost = both[0]["failed"]
                print(f"{tpm:10,} {window:9} {says:7} {a:8.3f} {b:8.2f} {lost:5.0f} {x:7.3f} {y:8.2f}", flush=True)


def moved(tpm: int, factor: float) -> None:
    """One line per window: seconds until the moved limit is found, for changes at four moments."""
    for window in WINDOWS:
        took = []
        for at in (603.0, 617.0, 634.0, 651.0):
            count = int(tpm / 500 * (at / 60.0 + 5.0 * factor))
            work = case(count, tpm, "tokens", window=window, limit_changes=[{"at_s": at, "factor": factor}])
            new = tpm * factor
            near = (t - at for t, n in run(work)[1] if t > at and (n >= 0.9 * new if factor > 1.0 else n <= 1.1 * new))
            took.append(next(near, float("inf")))
        print(f"{tpm:10,} x {factor:<4g} {window:9} found after {', '.join(f'{s:.0f}' for s in took)} s", flush=True)


def peers(tpm: int) -> None:
    """One line per window, form of refusal, change and library."""
    print("tokens/min window    wait    limit  library    of bound 429s/100  lost")
    for window in ("bucket", "sliding"):
        for says in ("seconds", "absent"):
            for limit, changes in (("steady", []), ("halved", [{"at_s": 600.0, "factor": 0.5}])):
                count = tpm * MINUTES // 500 if limit == "steady" else tpm * 20 // 500
                work = case(count, tpm, "tokens", window=window, retry_after=says, limit_changes=changes)
                ours, _ = run(work)
                bound_s, throttled = ours["bound_s"], 100.0 * ours["throttled"] / ours["attempts"]
                rows = {"paceline": (bound_s / ours["makespan_s"], throttled, int(ours["failed"]))}
                for peer in (InspectAi, Langroid):
                    rows[peer.__name__] = figures(peer, work, SEED, bound_s)
                for name, (share, refused, lost) in rows.items():
                    line = f"{tpm:10,} {window:9} {says:7} {limit} {name:10} {share:8.3f} {refused:8.2f} {lost:5}"
                    print(line, flush=True)


def main() -> None:
    """Print the tables; `--short`: one rate each; `--peers`: the last one only."""
    if "--peers" in sys.argv:
        return peers(50_000)
    short = "--short" in sys.argv
    steady((50_000,) if short else (20_000, 50_000, 200_000))
    for tpm in (50_000,) if short else (50_000, 200_000):
        for factor in (0.5, 2.0):
            moved(tpm, factor)
    peers(50_000)


if __name__ == "__main__":
    main()
