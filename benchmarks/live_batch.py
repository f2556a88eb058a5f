"""What the live benchmarks share: a batch drawn from a seed, and `paceline run` over it on loopback."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from governor.forecast.summary import WorkDone, bound_s
from governor.model.estimate import CHAT, charge_of, sizes_of
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.prices import Prices
from governor.provider.sending import connect_with
from governor.run.batch import Orders, RunOutcome, run_orders
from governor.run.pool_run import RunOptions
from governor.telemetry.progress import Display
from sim.model.provider_config import ProviderConfig

ENVIRONMENT = {"OPENAI_API_KEY": "no-key-is-needed"}


@dataclass(frozen=True, slots=True)
class Case:
    """One request: its body, which states the answer's length to the provider, its charge by `RULE`, that length."""

    body: dict[str, Any]
    charge: int
    output_tokens: int


RULE = "prompt_plus_max"


def drawn(seed: int, count: int, tokens: tuple[int, int]) -> list[Case]:
    """`count` requests of so many tokens, prompt and declared cap; answers of a quarter of the cap to all of it."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        total = rng.randint(*tokens)
        cap = round(total * rng.uniform(0.3, 0.7))
        output = rng.randint(cap // 4, cap)
        body = {
            "model": "gpt-4o",
            "max_tokens": cap,
            "messages": [{"role": "user", "content": f"{i} {seed} ".ljust(4 * (total - cap), "x")}],
            "metadata": {"paceline_output_tokens": str(output)},
        }
        made.append(Case(body, charge_of(RULE, sizes_of(CHAT, body), 0), output))
    return made


def bound(provider: ProviderConfig, batch: Sequence[Case]) -> float:
    """No scheduler ends that batch sooner on a provider without noise, seconds."""
    work = WorkDone()
    for case in batch:
        used = sizes_of(CHAT, case.body).prompt_tokens + case.output_tokens
        service_s = provider.latency.first_token_s + provider.latency.per_token_s * case.output_tokens
        work.add(0.0, float(case.charge), float(used), service_s)
    return bound_s(provider.grant(), work)


def write_lines(path: Path, bodies: Iterable[dict[str, Any]]) -> None:
    """A batch file of these bodies."""
    with path.open("w", encoding="utf-8") as file:
        for i, body in enumerate(bodies):
            line = {"custom_id": f"q-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def run_live(path: Path, policy: Policy, base_url: str, *, time_scale: float = 1.0) -> RunOutcome:
    """`paceline run` of that file in this process, journal and results beside it; without a simulated forecast."""
    orders = Orders(
        requests=path,
        out=path.with_name("results.jsonl"),
        journal=path.with_name("run.db"),
        pools=[Pool(policy=policy, base_url=base_url)],
        environment=ENVIRONMENT,
        prices=Prices({}),
        manner=RunOptions(time_scale=time_scale),
        yes=True,
    )
    with path.with_name("said.txt").open("w", encoding="utf-8") as said:
        return run_orders(orders, foresee=None, connect=connect_with(ENVIRONMENT), shown=Display(said))


def run_cases(batch: Sequence[Case], policy: Policy, base_url: str, *, time_scale: float = 1.0) -> RunOutcome:
    """The same for a batch in memory; its files go away."""
    with tempfile.TemporaryDirectory(prefix="paceline-bench-") as name:
        path = Path(name) / "batch.jsonl"
        write_lines(path, (case.body for case in batch))
        return run_live(path, policy, base_url, time_scale=time_scale)
