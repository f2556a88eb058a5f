"""A plan to show: true forecasts of policies that were chosen by hand, so that no search has to run first."""

from __future__ import annotations

import dataclasses
import fcntl
from collections.abc import Sequence

import numpy as np
import pytest

from governor.model.policy import KNOB_BY_NAME, Policy
from sim.des import compiled
from sim.experiment.experiment import attempts_of, case_of, figures_of, simulated
from sim.experiment.information import Finding, Gain
from sim.experiment.results import (
    Forecast,
    Heat,
    Plan,
    Point,
    Recommendation,
    RejectedSetting,
    Step,
    StressRow,
    forecast_of,
    paired_difference,
)
from sim.model.synthetic import parametric
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import FileSource

REPLICATIONS = 6
STRESS = {
    "charge rule prompt_plus_max": {"charge_rule": "prompt_plus_max"},
    "co-tenant takes 25 % in bursts": {"cotenant": {"share": 0.25, "burst_s": 15.0, "period_s": 60.0}},
    "no Retry-After": {"retry_after": "absent"},
}


@pytest.fixture(scope="session", autouse=True)
def _machine_code(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Load the compiled engine, which the first worker compiles: in Python a small plan takes three times as long."""
    with open(tmp_path_factory.getbasetemp().parent / "machine-code.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compiled.load()


@pytest.fixture(scope="session")
def sample_scenario() -> Scenario:
    """120 drawn requests at 30,000 tokens and 500 requests per minute, under today's guardrails."""
    workload = parametric(120, prompt_tokens=(900, 2_400), output_tokens=(180, 600), max_tokens=800, seed=11)
    return Scenario(source=FileSource(path="drawn.jsonl"), workload=workload, seed=5)


def forecast(scenario: Scenario, policy: Policy, replications: int = REPLICATIONS) -> Forecast:
    case = case_of(scenario, policy)
    seeds = range(scenario.seed, scenario.seed + replications)
    return forecast_of(policy, [figures_of(simulated(case, seed), case.grant, seed) for seed in seeds])


def recommendation(scenario: Scenario, now: Forecast, policy: Policy) -> Recommendation:
    """The policy with each of its changes left out alone; what they are worth is what the runs say."""
    found = forecast(scenario, policy)
    steps = []
    for name in KNOB_BY_NAME:
        old, new = getattr(now.policy, name), getattr(policy, name)
        if old != new:
            without = forecast(scenario, policy.with_(**{name: old}), 2)
            steps.append(
                Step(
                    env=KNOB_BY_NAME[name].env,
                    old=old,
                    new=new,
                    worth_s=paired_difference(without, found, "makespan_s"),
                    stress_worth_s=12.5,
                    throttled_per_100=without["throttled_per_100"].mean,
                    lost=without["failed"].mean,
                    breaks="",
                    reason=f"because {KNOB_BY_NAME[name].meaning} < & > matters",
                )
            )
    return Recommendation(found, tuple(steps), paired_difference(now, found, "makespan_s"))


def heat(scenario: Scenario, policy: Policy, now: Policy) -> Heat:
    xs, ys = (0.0, 0.5, 1.0, 3.0, 8.0, 15.0), (1, 3, 8, 20, 80)
    grid = [[policy.with_(stagger_seconds=x, max_concurrency=y) for x in xs] for y in ys]
    runs = [[forecast(scenario, each, 1).runs[0] for each in row] for row in grid]
    return Heat(
        x_env="OPENAI_STAGGER_SECONDS",
        y_env="OPENAI_MAX_CONCURRENCY",
        x_values=xs,
        y_values=tuple(float(y) for y in ys),
        objective_s=np.array([[run["makespan_s"] for run in row] for row in runs]),
        throttled_per_100=np.array([[run["throttled_per_100"] for run in row] for row in runs]),
        lost=np.array([[run["failed"] for run in row] for row in runs]),
        now=(now.stagger_seconds, float(now.max_concurrency)),
        recommended=(policy.stagger_seconds, float(policy.max_concurrency)),
    )


def points(scenario: Scenario, policies: Sequence[tuple[Policy, str]]) -> tuple[Point, ...]:
    found = []
    for policy, origin in policies:
        f = forecast(scenario, policy, 1)
        figures = f["makespan_s"].mean, f["throttled_per_100"].mean, f["failed"].mean
        found.append(Point(policy, origin, *figures, replications=1, on_front=False))
    return tuple(
        dataclasses.replace(
            p,
            on_front=p.lost == 0
            and not any(
                q.lost == 0
                and (q.objective_s, q.throttled_per_100) != (p.objective_s, p.throttled_per_100)
                and q.objective_s <= p.objective_s
                and q.throttled_per_100 <= p.throttled_per_100
                for q in found
            ),
        )
        for p in found
    )


@pytest.fixture(scope="session")
def sample_plan(sample_scenario: Scenario) -> Plan:
    """A plan with figures of real runs: today's guardrails, tuned guardrails, and the law's own means."""
    return plan_of(sample_scenario)


@pytest.fixture(scope="session")
def reckless_plan(sample_scenario: Scenario) -> Plan:
    """The same where today's settings draw 429s by the hundred and lose requests."""
    reckless = Policy().with_(
        stagger_seconds=0.2, est_tokens_per_run=300, max_concurrency=40, retry_max_attempts=4, tpm_headroom=0.0
    )
    return plan_of(sample_scenario.with_(policy=reckless))


def plan_of(scenario: Scenario) -> Plan:
    """A plan from the scenario's own policy to two others that were chosen by hand."""
    now = forecast(scenario, scenario.policy)
    tuned = scenario.policy.with_(
        max_concurrency=8, stagger_seconds=3.0, tpm_headroom=0.05, est_tokens_per_run=1_600, retry_max_attempts=8
    )
    few = recommendation(scenario, now, tuned)
    best = Policy.preset("paceline").with_(stagger_seconds=0.0, tpm_headroom=0.01, max_concurrency=20)
    full = recommendation(scenario, now, best)
    runner_up = forecast(scenario, best.with_(charge_rule="max_of", tpm_headroom=0.02))
    eager = best.with_(tpm_window="sliding", tpm_headroom=0.0, charge_rule="prompt_chars4", sync_headers=False)
    faster = forecast(scenario, eager)
    price = paired_difference(full.forecast, faster, "makespan_s")
    passed = RejectedSetting("the fastest setting tried", faster, price, "under 'x' it draws 9 per 100")
    full = dataclasses.replace(full, passed_over=(passed,))
    policies = [(scenario.policy, "now"), (tuned, "guardrails"), (best, "paceline"), (eager, "paceline")]
    for stagger in (0.0, 1.0, 4.0):
        for est in (300, 900, 1_600, 3_000):
            policies.append((tuned.with_(stagger_seconds=stagger, est_tokens_per_run=est), "guardrails"))
        for headroom in (0.0, 0.05, 0.15):
            policies.append((best.with_(stagger_seconds=stagger, tpm_headroom=headroom), "paceline"))
            policies.append((eager.with_(stagger_seconds=stagger / 4, tpm_headroom=headroom), "paceline"))
    named = {"now": now, "guardrails": few.forecast, "recommended": full.forecast, "runner_up": runner_up}
    stress = []
    for name, changes in STRESS.items():
        harder = scenario.with_(provider=scenario.provider.with_(**changes))
        stress.append(StressRow(name, {who: forecast(harder, f.policy, 2) for who, f in named.items()}))
    timelines = {who: attempts_of(scenario, 5, named[who].policy)[0] for who in ("now", "guardrails", "recommended")}
    return Plan(
        objective="makespan",
        now=now,
        guardrails=few,
        full=full,
        runner_up=runner_up,
        points=points(scenario, policies),
        stress=tuple(stress),
        heats=(heat(scenario, best, scenario.policy),),
        timelines=timelines,
        limits={"max_throttled_per_100": 1.0, "max_lost": 0.0},
        already_good=False,
        broken=(),
        settings_tried=len(policies),
        runs_simulated=321,
        requests_simulated=38_520,
        seed=5,
        find_out=(
            Finding(
                "the charge rule", Gain(220.0, 20.0, 180.0, 260.0), Gain(90.0, 10.0, 70.0, 110.0), False,
                "paceline probe", cost_usd=0.02, takes_s=(240.0, 420.0),
            ),
            Finding(
                "how long the answers are", None, Gain(40.0, 10.0, 20.0, 60.0), False, "--outputs-from",
                requests=100, cost_usd=0.31, takes_s=(80.0, 80.0),
            ),
        ),
    )  # fmt: skip
