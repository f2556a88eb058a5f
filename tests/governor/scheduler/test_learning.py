"""Estimates that learn: the sketch against sorted lists, live against simulated, and what a journal can tell again."""

from __future__ import annotations

import asyncio
import math
import random
from pathlib import Path

import numpy as np
import pytest

from governor.journal.journal import Journal
from governor.journal.verify import verify
from governor.model.errors import BadInput
from governor.model.estimate import CHAT, LEARNED, Sizes, charge_of
from governor.model.policy import Policy
from governor.model.requests import Answer, Attempt, Outcome, Request
from governor.model.work import Job, Observer, Work
from governor.run.pool_run import learner_of
from governor.scheduler.batch import kind_of
from governor.scheduler.driver import Governor
from governor.scheduler.learning import GROWTH, LEAST, QUANTILE, Learner
from sim.des import engines
from sim.des.driver import Simulation
from sim.des.engines import simulated
from sim.experiment.experiment import case_of
from sim.model.provider_config import ProviderConfig
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import ModelSource
from tests import live
from tests.virtual_loop import run_virtual


def sizes(prompt: int, cap: int) -> Sizes:
    return Sizes(CHAT, prompt, 4 * prompt, 4, 1, 0, 0, 1, cap)


def test_estimate_is_the_quantile_of_what_was_used(seed: int) -> None:
    rng = random.Random(seed)
    learner, used = Learner(), []
    for i in range(400):
        if i < LEAST:
            assert learner.estimate("kind", 100.0, 5_000.0) == 5_000.0, "as declared until enough have come"
        beyond = float(max(1, int(rng.lognormvariate(5.0, 0.8))))
        used.append(beyond)
        learner.saw("kind", 100.0, 100.0 + beyond)
        if len(used) >= LEAST:
            rank = min(len(used), math.ceil(QUANTILE * (len(used) + 1)))
            true = 100.0 + sorted(used)[rank - 1]
            found = learner.estimate("kind", 100.0, 5_000.0)
            assert true <= found <= 100.0 + (true - 100.0) * GROWTH + 1.0
    assert learner.estimate("other", 100.0, 5_000.0) == 5_000.0, "another kind learns for itself"


def test_order_of_answers_does_not_matter(seed: int) -> None:
    rng = random.Random(seed)
    seen = [(rng.choice("ab"), float(rng.randint(1, 900)), float(rng.randint(1, 5_000))) for _ in range(300)]
    first, second = Learner(), Learner()
    for each in seen:
        first.saw(*each)
    for each in sorted(seen):
        second.saw(*each)
    for kind in "ab":
        assert first.estimate(kind, 50.0, 9.0) == second.estimate(kind, 50.0, 9.0)


def test_declared_rule_is_the_start() -> None:
    assert charge_of(LEARNED, sizes(100, 900), 7_000) == charge_of("prompt_plus_max", sizes(100, 900), 7_000)
    # Where no cap is declared, the estimate per run stands for it.
    assert charge_of(LEARNED, sizes(100, -1), 7_000) == charge_of("prompt_plus_max", sizes(100, 7_000), 0)


# ---------------------------------------------------------------- both worlds

POLICY = Policy.preset("paceline").with_(
    charge_rule=LEARNED, tpm_limit=60_000, rpm_limit=0, stagger_seconds=0.0, max_concurrency=30, sync_headers=False,
    settle=True, launch_order="fifo",
)  # fmt: skip
LATENCY = {"first_token_s": 2.0, "per_token_s": 0.01, "sigma": 0.0, "stall_ratio": 0.0}


def scenario(policy: Policy = POLICY) -> Scenario:
    source = ModelSource(requests=150, prompt_tokens=(300, 900), output_tokens=(120, 400), max_tokens=3_000, seed=3)
    provider = ProviderConfig(tpm=600_000, settles=True).with_(latency=LATENCY)
    return Scenario.of(source, provider=provider, policy=policy, seed=9)


class Reserves(Observer):
    """What was reserved for each attempt, in order of launch."""

    def __init__(self) -> None:
        self.found: list[tuple[int, float]] = []

    def launched(self, job: Job, now: float) -> None:
        self.found.append((job.index, job.reserve))


def test_live_and_simulated_reserve_the_same() -> None:
    case = case_of(scenario())
    c = case.columns
    simulated_: list[tuple[int, float]] = []

    class Watched(Simulation):
        def launch(self, job, now):  # type: ignore[no-untyped-def]
            simulated_.append((job.index, job.reserve))
            super().launch(job, now)

    Watched(c, case.params, case.provider, seed=9).run()
    observer = Reserves()

    async def main() -> None:
        governor = Governor(case.params, seed=9, observer=observer, learner=Learner())

        async def send(job: Job, timeout_s: float) -> Answer:
            prompt, output = int(c.prompt_tokens[job.index]), int(min(c.output_tokens[job.index], c.cap[job.index]))
            await asyncio.sleep(2.0 + 0.01 * output)
            return Answer(Outcome.OK, 200, used_prompt_tokens=prompt, used_output_tokens=output, has_text=True)

        def work():  # type: ignore[no-untyped-def]
            for i in range(len(c)):
                request = Request(i, f"r{i}", "/v1/chat/completions", "m", {}, sizes(int(c.prompt_tokens[i]), 3_000))
                yield Work(request, float(c.reserve[i]), expected=float(c.cap[i]))

        await governor.run(work(), send)

    run_virtual(main())
    assert observer.found == simulated_
    first, last = dict(simulated_)[0], dict(simulated_)[149]
    assert last < first / 2.0, "it has learnt that answers are far shorter than declared"


def test_learning_shortens_a_batch_that_declares_too_much() -> None:
    learnt = simulated(case_of(scenario()), 9).last_s
    declared = simulated(case_of(scenario(POLICY.with_(charge_rule="prompt_plus_max"))), 9).last_s
    assert learnt < declared


def test_compiled_engine_says_that_it_cannot(monkeypatch) -> None:
    case = case_of(scenario())
    assert simulated(case, 9, engine="compiled").last_s == simulated(case, 9, engine="simpy").last_s, "SimPy's both"
    assert "SimPy" in engines.checked("auto", learns=True)[0]
    with pytest.raises(BadInput, match="learn"):
        engines.checked("compiled", learns=True)


def test_journal_of_a_learning_run_verifies_and_teaches_again(tmp_path: Path) -> None:
    live.batch(tmp_path / "requests.jsonl", 60, cap=20_000)
    env = {
        "OPENAI_CHARGE_RULE": LEARNED,
        "OPENAI_TPM_LIMIT": "400000",
        "OPENAI_SETTLE": "true",
        "OPENAI_MAX_CONCURRENCY": "4",
    }
    with live.provider() as served:
        ran = live.shared_cli().run(*live.run_args(tmp_path, served.base_url, "--yes"), env=env)
    assert ran.code == 0, ran.err
    with Journal.open(tmp_path / "results.journal.db") as journal:
        assert verify(journal.decisions()).difference is None
        attempts: list[Attempt] = sorted(journal.attempts(), key=lambda a: a.launched_s)
        policy = journal.settings()[0].policy
        again = learner_of(journal, "default", policy)
        request = next(iter(journal.results())).request
    assert policy.charge_rule == LEARNED
    assert again is not None
    kind, _ = kind_of(request)
    used = [a.output_tokens + a.prompt_tokens for a in attempts]
    assert again.estimate(kind, 0.0, 10.0**9) <= GROWTH * max(used) + 1.0
    reserved = np.array([a.reserved_tokens for a in attempts])
    assert reserved[0] > 20_000
    assert reserved[-5:].max() < 10_000
