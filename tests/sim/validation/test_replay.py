"""Counterfactual replay: a run under its own settings is itself, and under others what a second run would have been."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest

from governor.model.policy import Policy
from governor.model.requests import CAUSES
from sim.calibration.others import Count, OthersUse, takings
from sim.des.driver import Simulation
from sim.des.jobs import Job
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import from_tokens
from sim.model.workload import Workload, columns
from sim.validation.counterfactual import Counterfactual, counterfactual
from sim.validation.recorded import Record, RecordedAttempt
from sim.validation.replay import Stage, closest
from sim.validation.twin import Lesson

SEED = 5


class Truth:
    """A simulated run in place of a live one: what a journal would hold of it."""

    def __init__(self, workload: Workload, policy: Policy, provider: ProviderConfig) -> None:
        self.workload, self.policy, self.provider = workload, policy, provider
        self.tried: dict[tuple[int, int, int], RecordedAttempt] = {}
        self.ended_s = np.zeros(len(workload))
        self.is_lost = np.zeros(len(workload), np.bool_)
        read = columns(
            workload,
            reserve_rule=policy.charge_rule,
            est_tokens_per_run=policy.est_tokens_per_run,
            charge_rule=provider.charge_rule,
        )
        self.simulation = Simulation(read, policy.params(), provider.params(), seed=SEED, on_attempt=self._attempted)
        self.tally = self.simulation.run()

    def _attempted(self, job: Job, now: float, code: str) -> None:
        used = job.prompt + job.output if job.outcome == 0 else -1.0
        key = job.index, job.lane, job.tries
        stated = getattr(job, "stated", (0.0, 0.0, -1, 0.0, 0.0))
        self.tried[key] = RecordedAttempt(job.launched_s, now, job.outcome, job.retry_after_s, used, stated)
        self.ended_s[job.index], self.is_lost[job.index] = now, bool(code)

    def lesson(self) -> Lesson:
        """What is read from the run."""
        workload, record = self.workload, self.record()
        let_in = [record.let_in.get((i, 0), []) for i in range(len(workload))]
        took_s = [each[-1].took_s if each and each[-1].outcome == 0 else -1.0 for each in let_in]
        return Lesson(
            pool="default",
            model="m",
            policy=self.policy,
            seed=SEED,
            workload=workload.with_(recorded_s=np.array(took_s)),
            late_s=np.zeros(0),
            counts=[],
            latency={},
            faults=self.provider.faults.model_dump(),
            changes=(),
            record=record,
            answers=np.where(np.array(took_s) >= 0.0, workload.output_tokens, -1),
            finalize=False,
            began_s=0.0,
            makespan_s=float(self.tally.last_s),
            throttled=self.tally.throttled,
            launches=self.tally.attempts,
            unfinished=0,
            unanswered=0,
        )

    def record(self) -> Record:
        """Its attempts and ends."""
        return Record(self.tried, self.ended_s, self.is_lost, np.array(self.tally.waits_s[: len(CAUSES)]))


def drawn(rng: random.Random) -> tuple[Workload, ProviderConfig]:
    """A batch of 30 to 60 requests, and a provider on which they take some minutes."""
    count = rng.randint(30, 60)
    prompts = np.array([rng.randint(50, 900) for _ in range(count)])
    outputs = np.array([rng.randint(20, 600) for _ in range(count)])
    workload = from_tokens(prompts, outputs, max_tokens=600)
    provider = ProviderConfig(
        tpm=round(int(prompts.sum() + 600 * count) / rng.uniform(2.0, 4.0)),
        rpm=rng.choice([0, 60]),
        charge_rule="prompt_plus_max",
        settles=rng.random() < 0.5,
        charged=rng.choice(["admission", "admission", "answer"]),
        window=rng.choice(["bucket", "clock", "sliding"]),
        latency={"first_token_s": 1.0, "per_token_s": 0.02, "sigma": 0.0, "stall_ratio": 0.0},
    )
    return workload, provider


def settings(rng: random.Random, provider: ProviderConfig) -> Policy:
    """Settings that may overrun the limit."""
    return Policy.preset("paceline").with_(
        tpm_limit=round(provider.tpm * rng.choice([0.8, 1.0, 1.5])),
        tpm_window=rng.choice(["bucket", "sliding", "fixed"]),
        charge_rule="prompt_plus_max",
        settle=provider.settles,
        max_concurrency=rng.choice([2, 5, 20]),
        stagger_seconds=rng.choice([0.0, 1.5]),
        launch_order=rng.choice(["fifo", "longest_first"]),
        sync_headers=False,
        retry_max_attempts=rng.choice([3, 8]),
    )


def asked(truth: Truth, other: Policy, provider: ProviderConfig | None = None) -> Counterfactual:
    return counterfactual([Stage(truth.lesson(), provider or truth.provider)], lambda _: other, runs=3)


@pytest.mark.parametrize("seed", range(12))
def test_replay_is_the_run_and_under_other_settings_the_second_run(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    workload, provider = drawn(rng)
    first, second = settings(rng, provider), settings(rng, provider)
    truth, other = Truth(workload, first, provider), Truth(workload, second, provider)
    same = asked(truth, first)
    assert same.parted_s is None
    assert same.own is not None
    assert same.own.parted_s is None
    for each in (same.own, same.alone):
        assert (each.launches, each.throttled) == (truth.tally.attempts, truth.tally.throttled)
        assert each.makespan_s == pytest.approx(truth.tally.last_s)
    assert same.makespan_s[2:] == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)
    found = asked(truth, second)
    unanswered = sum(not any(tried.outcome == 0 for tried in met) for met in truth.record().let_in.values())
    if unanswered == 0 and len(truth.record().let_in) == len(workload):
        # Every answer is known: what the second run would have been is certain.
        assert found.launches.would == other.tally.attempts
        assert found.throttled.would == other.tally.throttled
        # Waits are stated in milliseconds, cut off: one of them may differ by rounding.
        assert found.makespan_s.would == pytest.approx(other.tally.last_s, rel=1e-6, abs=2e-3)
        for pair, at_s in zip(found.pairs, other.ended_s.tolist(), strict=True):
            assert pair.would_s == pytest.approx(at_s, rel=1e-6, abs=2e-3)


def test_most_of_the_drawn_runs_answer_all() -> None:
    """Else the test above would compare little."""
    complete = 0
    for seed in range(12):
        rng = random.Random(seed)
        workload, provider = drawn(rng)
        complete += not Truth(workload, settings(rng, provider), provider).is_lost.any()
    assert complete >= 6


def test_faults_come_back_to_the_request_that_met_them() -> None:
    workload = from_tokens(np.full(20, 100), np.full(20, 50), max_tokens=50)
    provider = ProviderConfig(
        tpm=0,
        charge_rule="prompt_plus_max",
        faults={"error_ratio": 0.3, "drop_ratio": 0.2},
        latency={"first_token_s": 1.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0},
    )
    policy = Policy.preset("paceline").with_(max_concurrency=3, stagger_seconds=0.0, tpm_limit=10**9)
    truth = Truth(workload, policy, provider)
    failed = sum(tried.outcome != 0 for tried in truth.tried.values())
    assert failed >= 3
    found = asked(truth, policy.with_(max_concurrency=20))
    assert found.launches.would == found.launches.was == len(truth.tried)
    assert found.launches.low == found.launches.high == 0.0
    assert found.makespan_s.difference < 0.0


def test_quota_refills_between_two_legs_and_the_time_is_left_out() -> None:
    """One request was answered, then the process was away for 1,000 s: what follows is a run of the other 19."""
    first, rest = (from_tokens(np.full(n, 100), np.full(n, 50), max_tokens=50) for n in (20, 19))
    provider = ProviderConfig(
        tpm=600,
        charge_rule="prompt_plus_max",
        latency={"first_token_s": 1.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0},
    )
    policy = Policy.preset("paceline").with_(
        max_concurrency=1, stagger_seconds=0.0, tpm_limit=600, charge_rule="prompt_plus_max", tpm_headroom=0.0
    )
    changes = ((0.5, "paused"), (1_001.0, "resumed"))
    whole, later = Truth(first, policy, provider), Truth(rest, policy, provider)
    lesson = dataclasses.replace(whole.lesson(), gaps=((1.0, 1_001.0),), changes=changes)
    (found,) = Stage(lesson, provider).predictions(1)
    assert found.makespan_s == pytest.approx(1.0 + later.tally.last_s)
    assert found.makespan_s < whole.tally.last_s - 10.0
    assert found.ends_s.max() == found.makespan_s


def test_the_provider_that_explains_the_run_is_taken() -> None:
    rng = random.Random(1)
    workload, provider = drawn(rng)
    policy = settings(rng, provider).with_(tpm_limit=2 * provider.tpm, max_concurrency=20, stagger_seconds=0.0)
    truth = Truth(workload, policy, provider)
    assert truth.tally.throttled
    wrong = provider.with_(tpm=2 * provider.tpm)
    name, stage = closest(truth.lesson(), [("believed", wrong), ("learnt", provider)])
    assert name == "learnt"
    assert stage.provider.tpm == provider.tpm
    assert closest(truth.lesson(), [("first", provider), ("second", provider)])[0] == "first"


def test_without_a_matching_provider_the_run_is_still_itself_and_the_interval_says_so() -> None:
    rng = random.Random(2)
    workload, provider = drawn(rng)
    policy = settings(rng, provider).with_(tpm_limit=2 * provider.tpm, max_concurrency=20, stagger_seconds=0.0)
    truth = Truth(workload, policy, provider)
    wrong = provider.with_(tpm=4 * provider.tpm)
    same = asked(truth, policy, wrong)
    assert same.own is not None
    assert same.own.throttled == truth.tally.throttled
    assert same.alone.throttled < truth.tally.throttled
    other = asked(truth, policy.with_(max_concurrency=19), wrong)
    missed = truth.tally.throttled - same.alone.throttled
    assert other.throttled.high - other.throttled.low > missed


def test_minutes_of_the_clock_are_told_from_a_bucket_by_the_counts() -> None:
    """The headers alone tell: nothing was refused in either."""

    def counts(window: str) -> list[Count]:
        used, found = 0.0, []
        for i in range(40):
            at_s = 5.0 * i
            used = 0.0 if window == "clock" and at_s % 60.0 == 0.0 else used
            used = max(0.0, used - (5.0 * 200.0 if window == "bucket" else 0.0)) + 800.0
            found.append(
                Count(i, True, at_s, at_s + 1.0, 0.0, 0.0, True, -1.0, -1.0, ((0, 12_000.0, 12_000.0 - used),))
            )
        return found

    workload = from_tokens(np.full(40, 300), np.full(40, 100), max_tokens=500)
    believed = ProviderConfig(tpm=12_000, charge_rule="prompt_plus_max", window="bucket")
    truth = Truth(workload, Policy.preset("paceline").with_(tpm_limit=12_000, stagger_seconds=5.0), believed)
    for window in ("bucket", "clock"):
        lesson = dataclasses.replace(truth.lesson(), counts=counts(window))
        name, stage = closest(lesson, [("believed", believed)])
        assert (name, stage.provider.window) == ("believed", window)


def test_a_refusal_by_the_model_takes_as_long_as_it_took_in_the_run() -> None:
    """A refusal that was 7 s on its way puts the retry off by 7 s, and so the end."""
    provider = ProviderConfig(
        tpm=6_000,
        charge_rule="prompt_plus_max",
        retry_after="seconds",
        failed_requests_count=False,
        latency={"first_token_s": 1.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0},
    )
    policy = Policy.preset("paceline").with_(
        tpm_limit=60_000, stagger_seconds=0.0, charge_rule="prompt_plus_max", sync_headers=False
    )
    truth = Truth(from_tokens(np.array([100, 100]), np.array([10, 10]), max_tokens=3_900), policy, provider)
    (refused,) = [key for key, tried in truth.tried.items() if tried.is_refused]
    lesson = truth.lesson()
    past = lesson.record.tried[refused]
    slow = {**lesson.record.tried, refused: past._replace(ended_s=past.ended_s + 7.0)}
    later = dataclasses.replace(lesson, record=dataclasses.replace(lesson.record, tried=slow, let_in={}, launched_s=[]))
    (usual,), (late,) = (Stage(each, provider).predictions(1) for each in (lesson, later))
    assert usual.throttled == late.throttled == 1.0
    assert late.makespan_s == pytest.approx(usual.makespan_s + 7.0)


def test_a_refusals_wait_says_what_others_had_used() -> None:
    """1,000 tokens were asked for, and 10 s of refill were missing: others had used all 6,000."""
    provider = ProviderConfig(tpm=6_000, charge_rule="prompt_plus_max", failed_requests_count=True)
    refused = Count(0, True, 0.0, 0.1, 0.0, 0.0, False, -1.0, -1.0, ((0, 6_000.0, 0.0), (1, 500.0, 499.0)), 10.0)
    found = takings([refused], np.full(1, 1_000.0), provider)
    # used + 1,000 - 6,000 = 10 s at 100 per second
    assert sum(taking.amount for taking in found) == pytest.approx(6_000.0)
    silent = dataclasses.replace(refused, retry_s=-1.0)
    assert takings([silent], np.full(1, 1_000.0), provider) == ()


def test_a_count_that_came_late_is_nobodys_use() -> None:
    """Two attempts of one moment, of which the first to be counted is heard of last: no neighbour is behind it."""

    def count(place: int, at_s: float, remaining: float | None) -> Count:
        stated: Any = () if remaining is None else ((0, 10_000.0, remaining),)
        return Count(place, True, at_s, at_s + 1.0, 0.0, 0.0, True, -1.0, -1.0, stated)

    charges = np.full(4, 1_000.0)
    provider = ProviderConfig(tpm=10_000, charge_rule="prompt_plus_max", window="clock")
    # The second is counted before the first, whose answer was dropped, is thought to be.
    counts = [count(0, 0.0, 9_000.0), count(1, 0.1, 7_000.0), count(2, 0.2, None), count(3, 0.3, 6_000.0)]
    assert takings(counts, charges, provider) == ()
    others = [count(0, 0.0, 9_000.0), count(1, 0.1, 5_000.0), count(2, 0.2, 4_000.0), count(3, 0.3, 3_000.0)]
    found = takings(others, charges, provider)
    assert sum(taking.amount for taking in found if taking.d == 0) == pytest.approx(3_000.0)
    assert all(isinstance(taking, OthersUse) for taking in found)
