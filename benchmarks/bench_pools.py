"""One model over several quotas, live: the makespan against the pooled bound, and what a dead quota costs.

    python -m benchmarks.bench_pools [--requests 240] [--seed 1]

Three pools of one group, of 30,000, 60,000 and 90,000 tokens a minute, as `paceline run` uses them: the official SDK,
a journal on disk, and three synthetic providers over HTTP, on the time of this process alone (`own_time`). The pooled
bound is that of one quota with the sum of the limits: no scheduler is faster. Then the same with a pool whose account
is refused in mid-run, whose key is, or that answers nothing any more.

Beside it, where `PACELINE_LITELLM_PYTHON` names an interpreter with litellm: LiteLLM's Router over the same quotas, in
real time (it counts by the minute of the clock), with half of the requests.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from pathlib import Path

from benchmarks.live_batch import ENVIRONMENT, RULE, Case, bound, drawn, write_lines
from benchmarks.outside_servers import LITELLM_PYTHON
from benchmarks.own_time import OwnTimeLoop, without_threads
from governor.journal.journal import Journal
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.prices import Prices
from governor.model.requests import Outcome
from governor.provider.sending import connect_with
from governor.run.batch import Orders, run_orders
from governor.run.pool_run import RunOptions
from governor.telemetry.progress import Display
from sim.model.faults import Event
from sim.model.provider_config import ProviderConfig
from sim.serving.server import Provider, spawn

LIMITS = (30_000, 60_000, 90_000)
FIRST_PORT = 9
STRATEGIES = ("usage-based-routing-v2", "least-busy", "simple-shuffle")
PEER_S = 400.0


@dataclass(frozen=True, slots=True)
class Measured:
    """`most_lost`: the most attempts that one request has spent without an answer on the pool that died.

    `efficiency`: what the run itself says; None if it lost a request.
    """

    makespan_s: float
    bound_s: float
    answered: int
    lost: int
    throttled: int
    attempts: int
    by_pool: dict[str, int]
    most_lost: int
    efficiency: float | None

    @property
    def ratio(self) -> float:
        """Makespan over the pooled bound."""
        return self.makespan_s / self.bound_s


def provider_of(tpm: int) -> ProviderConfig:
    """A quota of so many tokens a minute, without noise."""
    latency = {"first_token_s": 0.3, "per_token_s": 0.002, "sigma": 0.0, "stall_ratio": 0.0}
    return ProviderConfig(tpm=tpm, rpm=10_000, charge_rule=RULE, latency=latency)  # type: ignore[arg-type]


def policy_of(tpm: int) -> Policy:
    """Settings for all of it."""
    return Policy(
        tpm_limit=tpm,
        tpm_headroom=0.01,
        tpm_window="bucket",
        charge_rule=RULE,
        max_concurrency=40,
        launch_order="longest_first",
        stagger_seconds=0.0,
    )


def measured(batch: Sequence[Case], dying: Sequence[Event] = (), *, limits: Sequence[int] = LIMITS) -> Measured:
    """Run the batch over the pools, of which the last one meets these events."""
    with tempfile.TemporaryDirectory(prefix="paceline-bench-") as name:
        folder = Path(name)
        write_lines(folder / "batch.jsonl", (case.body for case in batch))
        return run_in(folder, batch, dying, limits=limits)


def run_in(
    folder: Path,
    batch: Sequence[Case],
    dying: Sequence[Event] = (),
    *,
    limits: Sequence[int] = LIMITS,
    at_s: float = inf,
    then: Callable[[], object] = lambda: None,
) -> Measured:
    """Run `batch.jsonl` of that folder, or resume it; `then` is called at `at_s` of the loop's clock."""
    providers = {
        FIRST_PORT + i: Provider(provider_of(tpm), events=dying if i == len(limits) - 1 else ())
        for i, tpm in enumerate(limits)
    }
    pools = [
        Pool(f"p{i}", policy_of(tpm), ("*",), base_url=f"http://127.0.0.1:{FIRST_PORT + i}/v1", group="all")
        for i, tpm in enumerate(limits)
    ]

    def new_loop() -> OwnTimeLoop:
        loop = OwnTimeLoop(providers, counts_work=False)
        if at_s < inf:
            loop.call_at(at_s, then)
        return loop

    orders = Orders(
        requests=folder / "batch.jsonl",
        out=folder / "results.jsonl",
        journal=folder / "run.db",
        pools=pools,
        environment=ENVIRONMENT,
        prices=Prices({}),
        manner=RunOptions(new_loop=new_loop),
        yes=True,
    )
    with without_threads(), (folder / "said.txt").open("w", encoding="utf-8") as said:
        outcome = run_orders(orders, foresee=None, connect=connect_with(ENVIRONMENT), shown=Display(said))
    with Journal.open(folder / "run.db") as journal:
        attempts = list(journal.attempts())
    dead = Counter(a.request for a in attempts if a.pool == pools[-1].name and a.outcome is not Outcome.OK)
    answers = Counter(a.pool for a in attempts if a.outcome is Outcome.OK)
    return Measured(
        max(a.finished_s for a in attempts) - min(a.launched_s for a in attempts),
        bound(provider_of(sum(limits)), batch),
        outcome.summary.completed,
        len(batch) - outcome.summary.completed,
        outcome.summary.throttled,
        outcome.summary.attempts,
        dict(answers),
        max(dead.values(), default=0),
        outcome.summary.efficiency,
    )


DEATHS = {
    "no credit": {"kind": "quota"},
    "key refused": {"kind": "unauthorized"},
    "drops all": {"kind": "drop"},
    "500s": {"kind": "server_error"},
    "model gone": {"kind": "model_not_found"},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    batch = drawn(options.seed, options.requests, (1_000, 5_000))
    print(f"{'':14}{'makespan':>10}{'bound':>8}{'ratio':>7}{'lost':>6}{'429s':>6}  answers by pool")
    whole = _told("all well", measured(batch))
    for name, event in DEATHS.items():
        _told(name, measured(batch, [Event(**event, at_s=whole.makespan_s / 2)]))  # type: ignore[arg-type]

    if LITELLM_PYTHON:
        half = batch[: len(batch) // 2]
        _told("half, ours", measured(half))
        for strategy in STRATEGIES:
            print(f"{strategy}: {litellm_ratio(half, strategy)}", flush=True)


def litellm_ratio(batch: Sequence[Case], strategy: str) -> str:
    """Run the batch by LiteLLM's Router, over providers in processes of their own; return what came of it."""
    with ExitStack() as stack:
        served = [stack.enter_context(spawn(provider_of(tpm))) for tpm in LIMITS]
        deployments = [{"base_url": each.base_url, "tpm": tpm} for each, tpm in zip(served, LIMITS, strict=True)]
        order = {"bodies": [case.body for case in batch], "strategy": strategy, "deployments": deployments}
        script = Path(__file__).with_name("litellm_router.py")
        ran = subprocess.run(
            [LITELLM_PYTHON, script], input=json.dumps(order) + "\n", text=True, capture_output=True, timeout=PEER_S
        )
        found = json.loads(ran.stdout.strip().splitlines()[-1])
        throttled = sum(each.stats()["outcomes"].get("throttled", 0) for each in served)
    ratio = found["seconds"] / bound(provider_of(sum(LIMITS)), batch)
    return (
        f"ratio {ratio:.3f}, {found['lost']} lost, {throttled} 429s, given up and asked again {found['refused']} times"
    )


def _told(name: str, m: Measured) -> Measured:
    by_pool = ", ".join(f"{pool} {count}" for pool, count in sorted(m.by_pool.items()))
    print(
        f"{name:14}{m.makespan_s:>9.1f}s{m.bound_s:>7.1f}s{m.ratio:>7.3f}{m.lost:>6}{m.throttled:>6}  {by_pool}"
        f"; attempts lost by one request on the last pool: at most {m.most_lost}",
        flush=True,
    )
    return m


if __name__ == "__main__":
    main()
