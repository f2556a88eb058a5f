"""Is what `calibrate` says true? Logs of known providers, and the halves of real traces.

Round trip: a provider, a workload and arrivals are drawn, a run against them is simulated and written as a log, and
`calibrate` reads the log. A figure is recovered when the truth lies in its interval of 95 % (for rules, when it is the
true one); how often that is so over many logs is `bench_coverage`'s to say.

Halves: from the first half of a real trace the tokens per minute of the second are forecast, and the makespan of its
requests under a limit.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from governor.model.policy import Policy
from sim.calibration import calibrate as cal
from sim.calibration.calibrate import Calibration, calibrate, outlook, read_sources, tokens_per_min
from sim.calibration.fits import Figure
from sim.calibration.logs import write_log
from sim.des.engines import simulated
from sim.experiment.experiment import case_of
from sim.model.provider_config import ProviderConfig
from sim.model.workload import Workload
from sim.scenario.readers import Source, read_workload
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import ModelSource

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "azure-llm-2023"
RULES = ("prompt_plus_max", "max_of", "responses", "auto")
Z95 = 1.6448536269514722


@dataclass(frozen=True, slots=True)
class Known:
    """A scenario with its truth by figure."""

    scenario: Scenario
    truth: dict[str, Any]


def drawn(seed: int, requests: int = 0) -> Known:
    """A known provider and a workload that arrives over time, at a load below the limit."""
    rng = random.Random(seed)
    prompt, output = (rng.uniform(200, 1_500), rng.uniform(1.5, 4.0)), (rng.uniform(60, 300), rng.uniform(1.5, 4.0))
    cap = rng.choice([400, 800, 1_500])
    rule, settles = rng.choice(RULES), rng.random() < 0.4
    share = rng.choice([0.0, rng.uniform(0.1, 0.3)])
    rate = rng.uniform(0.5, 2.0)
    # A third of them asks for more than there is, and is refused.
    load = (rng.uniform(1.05, 1.25) if seed % 3 == 0 else rng.uniform(0.75, 0.95)) - share
    late = {
        "first_token_s": rng.uniform(0.2, 1.5),
        "per_token_s": rng.uniform(0.005, 0.03),
        "sigma": rng.uniform(0.08, 0.35),
        "stall_ratio": rng.choice([0.0, rng.uniform(0.005, 0.03)]),
    }
    provider = ProviderConfig(
        tpm=1_000_000,
        rpm=0,
        charge_rule=rule,
        settles=settles,
        failed_requests_count=rng.random() < 0.5,
        retry_after=rng.choice(["ms", "seconds", "absent"]),
    ).with_(
        cotenant={"share": share, "burst_s": 0.0, "period_s": 0.0},
        faults={"error_ratio": rng.choice([0.0, 0.02]), "drop_ratio": rng.choice([0.0, 0.01]), "refusal_s": 0.08},
        latency=late,
    )
    source = ModelSource(
        requests=requests or rng.randint(400, 900),
        prompt_tokens=(prompt[0], prompt[0] * prompt[1]),
        output_tokens=(output[0], output[0] * output[1]),
        max_tokens=cap,
        arrival_rate_per_s=rate,
        seed=seed,
    )
    # Unlimited on our side, so that refusals occur: what they say is to be learnt, too.
    policy = Policy.preset("paceline").with_(
        tpm_limit=10**9,
        rpm_limit=0,
        max_concurrency=200,
        stagger_seconds=0.0,
        sync_headers=False,
        hold_on_throttle=False,
    )
    # Busy, but not for ever: what the bucket gives is what these requests count, and others, in about so many minutes.
    scenario = Scenario.of(source, provider=provider, policy=policy, arrivals="trace", seed=seed)
    c = scenario.columns()
    counted = np.minimum(c.charge, c.prompt_tokens + np.minimum(c.output_tokens, cap)) if settles else c.charge
    tpm = int(max(counted.mean() * rate * 60.0 / load, 1.2 * c.charge.max()))
    provider = provider.with_(tpm=tpm)
    truth = {
        "tokens per minute": provider.tpm,
        "charge rule": rule,
        "settles": settles,
        "share of others": share,
        "refusals count": provider.failed_requests_count,
        "Retry-After": provider.retry_after,
        "refusal": 0.08,
        "server errors": provider.faults.error_ratio,
        "dropped": provider.faults.drop_ratio,
        "first token": late["first_token_s"],
        "per output token": late["per_token_s"],
        "noise (sigma)": late["sigma"],
        "stalls": late["stall_ratio"],
        "arrivals": rate,
        "burstiness (CV of gaps)": 1.0,
        "prompt tokens P50": prompt[0],
        "prompt tokens P95": prompt[0] * prompt[1],
        "output tokens P50": output[0],
    }
    if cap > output[0] * output[1]:
        truth["output tokens P95"] = output[0] * output[1]
    return Known(scenario.with_(provider=provider), truth)


def holds(figure: Figure, true: float) -> bool:
    """Whether the truth lies in a figure's interval; an end that is not bounded excludes nothing."""
    low = -math.inf if figure.low is None else figure.low
    high = math.inf if figure.high is None else figure.high
    return low - 1e-9 <= true <= high + 1e-9


def misses(found: Calibration, truth: dict[str, Any]) -> list[str]:
    """The figures that are stated and wrong, in words."""
    wrong = []
    for name, true in truth.items():
        figure = found[name]
        if not figure.known:
            continue
        if figure.low is None and figure.high is None:
            alike = next((rule.alike for rule in found.quota.rules if rule.rule == figure.value), ())
            if figure.value != true and true not in alike:
                wrong.append(f"{name} {figure.value}, true {true} ({figure.how})")
        elif not holds(figure, true):
            wrong.append(f"{name} {figure.value:.4g} [{figure.low}, {figure.high}], true {true:.4g}")
    return wrong


def round_trips(
    count: int, folder: Path, requests: int = 0, first_seed: int = 1, errors: list[tuple[float, float]] | None = None
) -> tuple[int, list[str]]:
    """(figures that were told, what was missed) over `count` drawn scenarios.

    `errors` takes the relative errors of the time per token: ours, and that of SciPy's plain regression, the peer.
    """
    told = 0
    missed: list[str] = []
    for seed in range(first_seed, first_seed + count):
        known = drawn(seed, requests)
        found = calibrate(read_sources([str(write_log(known.scenario, folder / f"log-{seed}.csv"))], {}))
        if errors is not None:
            errors.append(_slope_errors(found, known.truth["per output token"]))
        told += sum(found[name].known for name in known.truth)
        missed += [f"seed {seed}: {text}" for text in misses(found, known.truth)]
    return told, missed


def _slope_errors(found: Calibration, true: float) -> tuple[float, float]:
    seen = found.observed
    done = seen.answered
    plain = stats.linregress(seen.tries.output_tokens[done], seen.took_s[done]).slope
    return abs(found["per output token"].used / true - 1.0), abs(plain / true - 1.0)


def halves(name: str, limit: int, *, draws: int = cal.DRAWS) -> dict[str, tuple[float, float, float]]:
    """Forecast from the first half of an Azure trace, against the second: figure -> (low, high, outcome)."""
    trace = read_workload(Source.open(DATA / f"AzureLLMInferenceTrace_{name}.csv"))
    half = len(trace) // 2
    first = trace.take(np.arange(half))
    second = trace.take(np.arange(half, len(trace)))
    second = second.with_(arrival_s=second.arrival_s - second.arrival_s[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "first.csv"
        _save(first, path)
        found = calibrate(read_sources([str(path)], {}), base=ProviderConfig(tpm=limit))
    policy = Policy.preset("paceline").with_(tpm_limit=limit, max_concurrency=200, stagger_seconds=0.0)
    scenario = found.scenario.with_(policy=policy, arrivals="batch")
    ahead = outlook(scenario, len(second), draws=draws)
    case = case_of(scenario.with_(workload=second))
    outcome = simulated(case, 0).summary(case.grant).makespan_s
    assert ahead.tokens_per_min is not None
    return {
        "tokens/min": (*ahead.tokens_per_min[1:], tokens_per_min(second)),
        "makespan": (*ahead.makespan_s[1:], outcome),
    }


def _save(workload: Workload, path: Path) -> None:
    columns = (workload.prompt_tokens, workload.output_tokens, workload.arrival_s)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("prompt_tokens", "output_tokens", "arrival_s"))
        writer.writerows(zip(*(column.tolist() for column in columns), strict=True))


def main() -> None:
    """Prints both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="ten scenarios in place of fifty, fewer draws")
    short = parser.parse_args().short
    count = 10 if short else 50
    with tempfile.TemporaryDirectory() as folder:
        errors: list[tuple[float, float]] = []
        told, missed = round_trips(count, Path(folder), errors=errors)
    for line in missed:
        print(f"  missed: {line}")
    print(f"round trip: {count} scenarios, {told} figures told, {1 - len(missed) / told:.1%} of them right")
    ours, plain = np.median(np.array(errors), axis=0)
    print(
        f"time per token, median error: {ours:.1%}; scipy.stats.linregress {plain:.1%}: {plain / ours:.1f} times ours"
    )
    for name, limit in (("code", 2_000_000), ("conv", 2_000_000)):
        for figure, (low, high, outcome) in halves(name, limit, draws=10 if short else 40).items():
            word = "covers" if low <= outcome <= high else "MISSES"
            print(f"azure {name}, second half: {figure} {outcome:,.0f}, forecast {low:,.0f} to {high:,.0f}: {word}")


if __name__ == "__main__":
    main()
