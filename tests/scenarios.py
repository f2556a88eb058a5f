"""Whole scenarios drawn from one number: any policy, workload and provider, at a scale at which all of it matters.

`drawn(seed)` is the same scenario for the same seed, so a failure is repeated by the seed that its test prints. Tests
of the driver, of its live twin and of the compiled engine draw from here. Every habit of the provider and every knob
occurs, alone and together; amounts are chosen so that limits bind for minutes, not for ever, and a run takes
milliseconds.

`batch` writes a workload down by hand, for tests that read like a timetable.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from governor import law
from governor.model.estimate import CHAT, COMPLETIONS, RESPONSES, RULES
from governor.model.policy import Policy
from governor.model.requests import Attempt
from sim.des.driver import Simulation, Tally
from sim.experiment.experiment import Case, attempt_rows, case_of
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import from_tokens
from sim.model.workload import Workload
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import ModelSource

# Seeds of runs: any number that `keyed_uniform` takes.
SEEDS_MAX = 2**48
NO_LIMITS: dict[str, Any] = {"tpm": 0, "latency": {"first_token_s": 1.0, "per_token_s": 0.0, "stall_ratio": 0.0}}


@dataclass(frozen=True)
class Run:
    """One run: its attempts in order of their ends, what the driver counted, and the law's state when it was over."""

    scenario: Scenario
    case: Case
    rows: list[Attempt]
    tally: Tally
    state: law.State


def run(scenario: Scenario, seed: int | None = None) -> Run:
    """Runs the scenario, under another seed than its own where one is given."""
    case = case_of(scenario)
    rows: list[Attempt] = []
    simulation = Simulation(
        case.columns,
        case.params,
        case.provider,
        seed=scenario.seed if seed is None else seed,
        day_tokens_used=case.grant.day_tokens_used,
        day_requests_used=case.grant.day_requests_used,
        finalize_max_tokens=case.finalize_max_tokens,
        from_trace=case.from_trace,
        on_attempt=attempt_rows(scenario, rows.append),
    )
    tally = simulation.run()
    return Run(scenario, case, rows, tally, simulation.s)


# ---------------------------------------------------------------- by hand


def batch(
    sizes: Sequence[int],
    service_s: Sequence[float] | float = 1.0,
    *,
    outputs: Sequence[int] | int = 0,
    cap: int = 0,
    arrival_s: Sequence[float] | None = None,
) -> Workload:
    """Requests with these prompts and exactly these service times.

    Charged by `prompt_plus_max`, each counts as its size + cap. `outputs`: what the model would write, uncapped.
    """
    count = len(sizes)
    return from_tokens(
        np.array(sizes, np.int64),
        np.full(count, outputs, np.int64) if isinstance(outputs, int) else np.array(outputs, np.int64),
        max_tokens=cap,
        arrival_s=None if arrival_s is None else np.array(arrival_s, np.float64),
        recorded_s=np.broadcast_to(np.array(service_s, np.float64), (count,)).copy(),
        role_chars=np.zeros(count, np.int64),
    )


def scenario_of(
    workload: Workload, policy: Policy | None = None, *, provider: dict[str, Any] | None = None, **rest: Any
) -> Scenario:
    """A scenario of rows that came from no file. `provider`: what differs from one without limits, noise and faults."""
    # The source only states where rows can be read again; these cannot.
    source = ModelSource(requests=max(1, len(workload)), prompt_tokens=(1, 1), output_tokens=(1, 1))
    config = ProviderConfig.model_validate({"charge_rule": "prompt_plus_max", **NO_LIMITS, **(provider or {})})
    return Scenario(source=source, workload=workload, provider=config, policy=policy or Policy(), **rest)


# ---------------------------------------------------------------- drawn


def drawn(
    seed: int, *, policy: dict[str, Any] | None = None, provider: dict[str, Any] | None = None, **rest: Any
) -> Scenario:
    """The scenario of that number. `policy`, `provider` and `rest` (fields of `Scenario`) hold whatever is drawn."""
    rng = random.Random(seed)
    tpm = rng.choice([600, 3_000, 30_000])
    workload = _workload(rng, tpm)
    config = _provider(rng, workload, tpm) | (provider or {})
    knobs = _policy(rng, tpm, config) | (policy or {})
    arrivals = "trace" if workload.has_arrivals and rng.random() < 0.8 else "batch"
    rest = {"seed": rng.randrange(SEEDS_MAX), "arrivals": arrivals, "finalize": rng.random() < 0.5} | rest
    return scenario_of(workload, Policy(**knobs), provider=config, **rest)


def shown(seed: int, scenario: Scenario) -> str:
    """The scenario for a failure's message."""
    named = scenario.policy.model_dump(exclude_defaults=True)
    config = scenario.provider.model_dump(exclude_defaults=True)
    return f"drawn({seed}): {len(scenario.workload)} requests, {scenario.arrivals}, {named}, {config}"


def _workload(rng: random.Random, tpm: int) -> Workload:
    """Up to 60 requests of up to a few minutes' tokens in all; few declare nothing, some are larger than a budget."""
    count = rng.choice([1, rng.randint(2, 8), rng.randint(8, 60), rng.randint(8, 60)])
    middle = tpm * rng.choice([0.3, 1.0, 4.0]) / max(count, 3)
    prompts = [max(1, round(middle * rng.lognormvariate(0.0, 0.7))) for _ in range(count)]
    if rng.random() < 0.3:
        prompts[rng.randrange(count)] = round(tpm * rng.uniform(0.5, 1.1))
    outputs = [max(1, round(0.3 * middle * rng.lognormvariate(0.0, 0.9))) for _ in range(count)]
    low, high = rng.choice([(-1, -1), (1, 50), (round(0.2 * middle) + 1, round(middle) + 2)])
    caps = [rng.randint(low, high) for _ in range(count)]
    whole = rng.random() < 0.3  # round times, so that events meet at one instant
    arrival_s = None
    if rng.random() < 0.45:
        at, arrivals = 0.0, []
        for _ in range(count):
            at += 0.0 if rng.random() < 0.3 else float(rng.randint(0, 9)) if whole else rng.expovariate(0.3)
            arrivals.append(at)
        arrival_s = np.array(arrivals)
    recorded = rng.choice([0.0, 0.0, 0.5, 1.0])
    times = [float(rng.randint(1, 30)) if whole else rng.uniform(0.2, 40.0) for _ in range(count)]
    recorded_s = [t if rng.random() < recorded else -1.0 for t in times]
    return from_tokens(
        np.array(prompts, np.int64),
        np.array(outputs, np.int64),
        max_tokens=np.array(caps, np.int64),
        arrival_s=arrival_s,
        recorded_s=np.array(recorded_s),
        endpoint=np.array([rng.choice([CHAT, CHAT, RESPONSES, COMPLETIONS]) for _ in range(count)], np.int64),
        tools=np.array([int(rng.random() < 0.1) for _ in range(count)], np.int64),
        n=np.array([rng.choice([1, 1, 1, 2]) for _ in range(count)], np.int64),
    )


def _provider(rng: random.Random, workload: Workload, tpm: int) -> dict[str, Any]:
    """Limits, habits and faults in any combination. Daily limits and neighbours never at once: a tick per second."""
    count = len(workload)
    config: dict[str, Any] = {
        "tpm": rng.choice([tpm, tpm, tpm, 0]),
        "rpm": rng.choice([0, 0, rng.randint(1, 6), rng.randint(6, 60)]),
        "charge_rule": rng.choice(RULES),
        "settles": rng.random() < 0.4,
        "charged": rng.choice(["admission", "admission", "admission", "answer"]),
        "failed_requests_count": rng.choice([False, False, True, True, "tokens", "requests"]),
        "retry_after": rng.choice(["absent", "ms", "seconds", "oldest", float(rng.randint(1, 60))]),
        "retry_after_min_s": rng.choice([0.0, 1.0]),
        **rng.choice([{}, {}, {}, {"burst_s": 20.0}, {"window": "anchored"}, {"window": "sliding"}, _clock(rng)]),
        "counts": rng.choice(["admission", "admission", "answer", "refusals", "none"]),
        "counts_share": rng.choice([1.0, 1.0, 0.1]),
        "counts_rounded_to": rng.choice([1, 1, 100]),
        "counts_negative": rng.random() < 0.3,
        "faults": {"empty_cut_ratio": rng.choice([0.0, 0.5, 1.0]), "refusal_s": rng.choice([0.001, 0.05, 0.5])},
        "latency": {
            "first_token_s": rng.choice([0.05, 0.5, 2.0]),
            "per_token_s": rng.choice([0.0, 0.01, 20.0 / tpm]),
            "sigma": rng.choice([0.0, 0.3]),
            "stall_ratio": rng.choice([0.0, 0.0, 0.2]),
            "stall_min_s": 5.0,
            "stall_max_s": 100.0,
        },
    }
    if rng.random() < 0.3:
        config["faults"] |= {"error_ratio": rng.choice([0.0, 0.1, 0.5]), "drop_ratio": rng.choice([0.0, 0.1, 0.4])}
        config["faults"]["hang_ratio"] = rng.choice([0.0, 0.0, 0.1])
    if rng.random() < 0.2:
        config |= {"slice_s": rng.choice([0.5, 1.0, 10.0]), "slice_tokens": rng.choice([0, tpm // 10])}
    if rng.random() < 0.1:
        config["ramp_tpm"] = tpm // rng.choice([2, 5])
    if rng.random() < 0.1:
        config["quota_requests"] = rng.randint(1, count)
    if rng.random() < 0.2:
        times = sorted(rng.sample(range(1, 400), rng.randint(1, 3)))
        config["limit_changes"] = [{"at_s": float(at), "factor": rng.choice([0.3, 0.5, 1.0, 2.0])} for at in times]
    if rng.random() < 0.25:
        used = rng.choice([0, 1])
        if rng.random() < 0.5:
            config |= {"rpd": rng.randint(count // 2 + 1, 3 * count), "day_requests_used": used * rng.randint(0, count)}
        else:
            whole = int(workload.prompt_tokens.sum())
            config |= {"tpd": rng.randint(whole // 2 + 1, 4 * whole), "day_tokens_used": used * rng.randint(0, whole)}
    elif rng.random() < 0.3:
        bursty = {"burst_s": rng.choice([5.0, 15.0]), "period_s": 60.0} if rng.random() < 0.5 else {}
        config["cotenant"] = {"share": rng.choice([0.1, 0.25, 0.6]), **bursty}
    if rng.random() < 0.15:
        at, kind = float(rng.randint(0, 60)), rng.choice(["drops", "5xx", "hang"])
        config["outages"] = [{"at_s": at, "length_s": float(rng.choice([5, 60, 300])), "kind": kind}]
    return config


def _clock(rng: random.Random) -> dict[str, Any]:
    return {"window": "clock", "phase_s": float(rng.randrange(60))}


def _policy(rng: random.Random, tpm: int, config: dict[str, Any]) -> dict[str, Any]:
    """Every knob. The limits are the provider's, or wrong by half; time-outs and deadlines may be short."""
    knobs: dict[str, Any] = {
        "max_concurrency": rng.choice([1, 2, 3, 8, 50]),
        "stagger_seconds": rng.choice([0.0, 0.0, 0.5, 3.0, 15.0]),
        "tpm_limit": round(tpm * rng.choice([0.5, 1.0, 1.0, 1.0, 2.0])),
        "tpm_headroom": rng.choice([0.0, 0.01, 0.15, 0.5]),
        "est_tokens_per_run": round(tpm * rng.choice([0.02, 0.1, 0.25, 0.9])) or 1,
        "retry_max_attempts": rng.choice([1, 2, 5, 5, 9]),
        "backoff_base_seconds": rng.choice([0.1, 2.0, 10.0]),
        "backoff_cap_seconds": rng.choice([5.0, 60.0]),
        "tpm_window": rng.choice(["fixed", "sliding", "bucket"]),
        "charge_rule": rng.choice(RULES),
        "launch_order": rng.choice(["fifo", "longest_first"]),
        "rpm_limit": rng.choice([0, config["rpm"], config["rpm"]]),
        "rpd_limit": rng.choice([0, config.get("rpd", 0), config.get("rpd", 0)]),
        "tpd_limit": rng.choice([0, config.get("tpd", 0), config.get("tpd", 0)]),
        "jitter_ratio": rng.choice([0.0, 0.2, 1.0]),
        "jitter_cap_seconds": rng.choice([0.0, 3.0]),
        "retry_after_cap_seconds": rng.choice([600.0, 600.0, 2.0]),
        "request_timeout_seconds": rng.choice([600.0, 600.0, 20.0, 3.0]),
        "deadline_seconds": rng.choice([0.0, 0.0, 0.0, 15.0, 90.0, 600.0]),
        "finalize_max_concurrency": rng.choice([1, 2, 4]),
        "interactive_reserve": rng.choice([0.0, 0.0, 0.25]),
        "finalize_max_tokens": rng.choice([10, tpm // 20, tpm // 2]),
    }
    for name in ("settle", "backoff_keeps_permit", "hold_on_throttle", "sync_headers", "refund_throttled"):
        knobs[name] = rng.random() < 0.5
    knobs["finalize_lowers_concurrency"] = rng.random() < 0.7
    return knobs
