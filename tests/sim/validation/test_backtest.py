"""The backtest: what is taken from a journal, what the twin makes of it, and a live run on loopback against both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from governor.journal.journal import Journal
from governor.model.errors import PacelineError
from governor.model.policy import Policy
from governor.model.requests import Attempt, Outcome
from sim.des.driver import Simulation
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import from_tokens
from sim.model.workload import columns
from sim.validation.backtest import ComparedFigure, _interval, backtest_command, provider_of
from sim.validation.model_error import conformal
from sim.validation.twin import Lesson, Twin, _answers, _faults, _gaps, _latency, _losses_at, _lost, lessons
from tests.live import batch, provider, run_args, shared_cli

STEADY = ProviderConfig(tpm=0, latency={"first_token_s": 1.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0})


def attempt(request: int, **changes: object) -> Attempt:
    values: dict[str, object] = dict.fromkeys(Attempt.columns(), 0.0)
    for name in ("custom_id", "model", "url", "error_code"):
        values[name] = ""
    values |= {"request": request, "pool": "default", "lane": "main", "attempt": 1, "output_tokens": -1}
    values |= {"outcome": Outcome.OK, "status": 200, "launched_s": 1.0, "finished_s": 3.0}
    return Attempt(**{**values, **changes})  # type: ignore[arg-type]


# ---------------------------------------------------------------- figures


def test_error_is_a_share_of_what_was_measured() -> None:
    assert ComparedFigure(90.0, 80.0, 100.0, 120.0).error_ratio == pytest.approx(0.25)
    assert not ComparedFigure(90.0, 80.0, 100.0, 120.0).covered
    assert ComparedFigure(0.0, 0.0, 0.0, 0.0).error_ratio == 0.0
    assert ComparedFigure(2.0, 0.0, 4.0, 0.0).error_ratio is None, "no share of nothing"
    assert ComparedFigure(100.0, 95.0, 105.0, 100.0).half_width_ratio == pytest.approx(0.05)


def test_interval_holds_one_more_run_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    trials = 4_000
    inside = 0
    for _ in range(trials):
        x = rng.normal(100.0, 3.0, 11)
        _, low, high = _interval(x[:10])
        inside += low <= x[10] <= high
    # Four standard errors of a share of 0.95.
    assert inside / trials == pytest.approx(0.95, abs=4.0 * (0.95 * 0.05 / trials) ** 0.5)


def test_model_error_of_one_half_holds_for_the_other_as_often_as_it_says() -> None:
    """Split conformal prediction needs no shape of the errors: here most are nothing, and some are large."""
    rng = np.random.default_rng(5)
    inside, trials = 0, 400
    for _ in range(trials):
        errors = np.where(rng.random(120) < 0.9, 0.0, rng.exponential(0.1, 120))
        inside += int((errors[60:] <= conformal(errors[:60])).sum())
    share = inside / (60 * trials)
    # At least 95 %, at most 1/61 more; four standard errors, the halves being what is independent.
    assert 0.95 - 4.0 * 0.029 / trials**0.5 <= share <= 0.95 + 1.0 / 61.0 + 4.0 * 0.029 / trials**0.5
    assert conformal([0.1, 0.3, 0.2]) == 0.3


def test_interval_keeps_the_models_own_error_where_nothing_varies() -> None:
    mean, low, high = _interval(np.full(1_000, 50.0), 0.01)
    assert mean == 50.0
    assert (high - low) / 2.0 == pytest.approx(0.5)
    assert _interval(np.full(10, 3.0)) == (3.0, 3.0, 3.0)


# ---------------------------------------------------------------- what is read


def test_time_between_two_legs_is_no_time_of_the_run() -> None:
    journal = SimpleNamespace(legs=lambda: [SimpleNamespace(began_s=at_s) for at_s in (2.0, 50.0, 100.0, 300.0)])
    # The leg of 50 s launched nothing; the one of 100 s soon after its beginning, that of 300 s had to wait.
    rows = [(5.0, 9.0), (6.0, 20.0), (101.0, 120.0), (340.0, 350.0)]
    attempts = [attempt(i, launched_s=begin, finished_s=end) for i, (begin, end) in enumerate(rows)]
    gaps = _gaps(journal, attempts, 5.0)  # type: ignore[arg-type]
    assert gaps == ((15.0, 96.0), (115.0, 295.0))
    worked_s = Lesson.worked_s(SimpleNamespace(gaps=gaps), np.array([-3.0, 15.0, 60.0, 106.0, 345.0]))  # type: ignore[arg-type]
    assert worked_s.tolist() == [-3.0, 15.0, 15.0, 25.0, 345.0 - 81.0 - 180.0]


def test_answers_are_those_of_the_attempt_that_was_answered() -> None:
    visible = {"max_tokens": np.array([10, -1, 10, 10, 10]), "n": np.ones(5, np.int64)}
    attempts = [
        attempt(0, outcome=Outcome.THROTTLED, finished_s=1.5),
        attempt(0, attempt=2, launched_s=10.0, finished_s=14.0, output_tokens=7),
        attempt(1, output_tokens=500),
        attempt(2, output_tokens=10),
        attempt(2, lane="finalize", launched_s=5.0, finished_s=50.0, output_tokens=33),
        attempt(3, outcome=Outcome.SERVER_ERROR),
        attempt(4, outcome=Outcome.MALFORMED),
    ]
    output, recorded = _answers(attempts, {i: i for i in range(5)}, visible, 6_000)
    assert output.tolist() == [7, 500, 33, -1, -1]
    assert recorded.tolist() == [4.0, 2.0, 2.0, -1.0, 2.0], "one that cannot be read has taken its time"
    faults = _faults(attempts, visible)
    assert faults == {
        "error_ratio": 1 / 6,
        "drop_ratio": 0.0,
        "hang_ratio": 0.0,
        "refusal_s": 0.5,
        "empty_cut_ratio": 1.0,
    }


def test_latency_is_the_line_through_the_answers() -> None:
    rows = [attempt(i, launched_s=0.0, finished_s=0.5 + 0.02 * i, output_tokens=i) for i in range(50)]
    found = _latency(rows, np.ones(50, bool), from_tokens(np.ones(50, np.int64), np.arange(50)))
    assert found["first_token_s"] == pytest.approx(0.5)
    assert found["per_token_s"] == pytest.approx(0.02)
    assert found["sigma"] == pytest.approx(0.0, abs=1e-6)


# ---------------------------------------------------------------- the twin


def run_of(
    count: int, policy: Policy, late_s: float, changes: tuple[tuple[float, object], ...] = (), **rest: Any
) -> float:
    """Makespan of equal requests of one second each."""
    workload = from_tokens(np.full(count, 100), np.full(count, 50), max_tokens=50)
    read = columns(
        workload, reserve_rule="prompt_plus_max", est_tokens_per_run=0, charge_rule="prompt_plus_max", arrivals="batch"
    )
    late, rng = np.full(1, late_s), np.random.default_rng(0)
    parts = (read, policy.params(), STEADY.params())
    twin = Twin(*parts, seed=1, late_s=late if late_s else np.zeros(0), rng=rng, changes=changes, **rest)  # type: ignore[arg-type]
    if not late_s and not changes and not rest:
        assert twin.run().last_s == Simulation(*parts, seed=1).run().last_s
        return Simulation(*parts, seed=1).run().last_s
    return twin.run().last_s


def test_lateness_adds_up_over_launch_slots() -> None:
    policy = Policy.preset("paceline").with_(max_concurrency=50, stagger_seconds=2.0, jitter_ratio=0.0, tpm_limit=10**9)
    on_time = run_of(21, policy, 0.0)
    assert on_time == pytest.approx(20 * 2.0 + 1.0)
    # Each slot is counted from the launch before it: twenty timers, each a quarter of a second late.
    assert run_of(21, policy, 0.25) == pytest.approx(on_time + 20 * 0.25)


def test_an_answer_wakes_the_loop_without_lateness() -> None:
    policy = Policy.preset("paceline").with_(max_concurrency=2, stagger_seconds=0.0, tpm_limit=10**9)
    assert run_of(10, policy, 0.25) == run_of(10, policy, 0.0) == pytest.approx(5.0)


def test_settings_change_when_they_did() -> None:
    policy = Policy.preset("paceline").with_(max_concurrency=1, stagger_seconds=0.0, tpm_limit=10**9)
    wider = policy.with_(max_concurrency=4)
    # Two alone, then the third and three more at 2.5 s, ...: 10 requests, at 2.5 s one is in flight until 3.
    assert run_of(10, policy, 0.0) == pytest.approx(10.0)
    assert run_of(10, policy, 0.0, ((2.5, wider),)) == pytest.approx(4.5)
    paused = ((2.5, "paused"), (7.5, "resumed"))
    assert run_of(10, policy, 0.0, paused) == pytest.approx(7.5 + 7.0)


def test_a_leg_reserves_by_its_own_rule() -> None:
    """A resumed run reads its requests again: under another charge rule they reserve something else."""
    policy = Policy.preset("paceline").with_(
        max_concurrency=50, stagger_seconds=0.0, tpm_limit=320, tpm_headroom=0.0, tpm_window="fixed", sync_headers=False
    )
    # Two requests of 150 tokens per minute; the last six go in the third minute once they reserve 30 each.
    assert run_of(10, policy, 0.0) == pytest.approx(4 * 61.0 + 1.0)
    renewed = run_of(10, policy, 0.0, reserves=[(70.0, np.full(10, 30.0))])
    assert renewed == pytest.approx(2 * 61.0 + 1.0)


# ---------------------------------------------------------------- a live run


def test_a_live_run_is_what_its_twin_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over HTTP on own time. The interval may miss one run in twenty; twice its width, and the counts, may not be
    missed."""
    pytest.importorskip("openai")
    from benchmarks.twin import drawn, rehearsed

    scenario = drawn(3, 1)
    provider = ProviderConfig(tpm=12_000, rpm=500, charge_rule="prompt_plus_max", latency="gpt-4o-mini")
    # No header sync, and some headroom: how the requests of one burst arrive at the provider is not simulated.
    policy = Policy.preset("paceline").with_(
        tpm_limit=12_000,
        rpm_limit=500,
        charge_rule="prompt_plus_max",
        max_concurrency=20,
        stagger_seconds=0.0,
        tpm_headroom=0.05,
        sync_headers=False,
    )
    sizes = tuple((400, 300 + 20 * i) for i in range(40))
    scenario = dataclasses.replace(scenario, provider=provider, policy=policy, sizes=sizes)
    found = rehearsed(scenario, 0.0, tmp_path)
    assert found.requests == 40
    m = found.makespan_s
    assert abs(m.measured - m.predicted) <= m.high - m.low, found.text()
    assert 0.0 < m.half_width_ratio <= 0.25
    # The bucket: what exceeds its capacity comes at the rate of the limit, whoever schedules it.
    charges = [100 + 5 + cap for _, cap in sizes]
    assert m.measured > (sum(charges) - 12_000) / 200.0
    assert abs(found.throttled.measured - found.throttled.predicted) <= 1.0
    assert abs(found.launches.measured - found.launches.predicted) <= 1.0
    assert found.forecast is not None

    backtest_command(str(tmp_path / "run.db"), True, str(tmp_path / "report"))
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "report" / "backtest.json").read_text())
    wanted = {"predicted_makespan_s", "predicted_low_s", "predicted_high_s", "measured_makespan_s", "error_ratio"}
    assert wanted <= set(printed)
    for name in ("throttled", "launches"):
        counted = {f"predicted_{name}", f"predicted_{name}_low", f"predicted_{name}_high", f"measured_{name}"}
        assert counted | {f"{name}_error_ratio"} <= set(printed)
    with Journal.open(tmp_path / "run.db") as journal:
        attempts = list(journal.attempts())
    first, last = min(a.launched_s for a in attempts), max(a.finished_s for a in attempts)
    assert printed["measured_makespan_s"] == pytest.approx(last - first, abs=1e-6)
    assert printed["measured_launches"] == len(attempts)


def test_attempts_lost_by_a_kill_are_booked_again(tmp_path: Path) -> None:
    """Killed with 20 of 30 requests in flight, which the provider charges twice: 40 % off where that is not known."""
    pytest.importorskip("openai")
    cli = shared_cli()
    batch(tmp_path / "requests.jsonl", 30, cap=400)
    env = {"OPENAI_TPM_LIMIT": "12000", "OPENAI_CHARGE_RULE": "prompt_plus_max", "OPENAI_SYNC_HEADERS": "false"}
    latency = {"first_token_s": 3.0, "per_token_s": 0.0, "sigma": 0.3, "stall_ratio": 0.0}
    with provider(
        tpm=12_000, charge_rule="prompt_plus_max", latency=latency, counts="none", time_scale=20.0, seed=2
    ) as served:
        args = run_args(tmp_path, served.base_url, "--json", "--yes", "--time-scale", "20")
        assert cli.start(*args, env=env, dies_after=10).wait().code == 137
        ran = cli.run(*args, env=env)
    assert (ran.code, ran.json["completed"]) == (0, 30), ran.err
    with Journal.open(tmp_path / "results.journal.db") as journal:
        (lesson,) = lessons(journal)
        lost = journal.counts().resent
    assert len(lesson.lost) == lost >= 8
    found = cli.run("backtest", tmp_path / "results.journal.db", "--json").json
    assert found["predicted_makespan_s"] == pytest.approx(found["measured_makespan_s"], rel=0.1), found


def test_an_attempt_is_lost_by_the_last_legs_before_its_last_launch() -> None:
    """Legs from 0, 50, 100 and 300 s; of the second no attempt is recorded, the third launched from 110 s on."""
    journal = SimpleNamespace(legs=lambda: [SimpleNamespace(began_s=at_s) for at_s in (0.0, 50.0, 100.0, 300.0)])
    attempts = [attempt(0, launched_s=at_s, finished_s=at_s + 5.0) for at_s in (0.0, 110.0, 301.0)]
    losses_at = _losses_at(journal, attempts, 0.0, ((5.0, 100.0), (115.0, 300.0)))  # type: ignore[arg-type]
    assert losses_at == [(50.0, 100.0), (100.0, 50.0), (300.0, 300.0)]
    assert _lost([(0, 301.0), (1, 110.0), (2, 301.0), (3, 301.0)], losses_at) == (
        (50.0, 1),
        (50.0, 2),
        (50.0, 3),
        (100.0, 3),
        (300.0, 2),
        (300.0, 3),
    )


def test_requests_that_hang_until_the_time_out_are_foreseen(tmp_path: Path) -> None:
    """A fifth of the attempts is never answered: the run lasts as long as its time-outs, not as long as its answers.

    (Without that, the backtest of such a run said 0.02 s where 3.3 s were measured.)
    """
    pytest.importorskip("openai")
    cli = shared_cli()
    batch(tmp_path / "requests.jsonl", 60)
    with provider(faults={"hang_ratio": 0.2}, seed=2) as served:
        args = run_args(tmp_path, served.base_url, "--json", "--yes")
        ran = cli.run(*args, env={"OPENAI_REQUEST_TIMEOUT_SECONDS": "1"})
    assert (ran.code, ran.json["completed"]) == (0, 60), ran.err
    found = cli.run("backtest", tmp_path / "results.journal.db", "--json").json
    assert found["measured_makespan_s"] >= 1.0
    assert found["predicted_makespan_s"] >= 1.0
    for name in ("makespan_s", "launches"):
        assert found[f"predicted_{name}"] == pytest.approx(found[f"measured_{name}"], rel=0.25), found


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PacelineError):
        backtest_command(str(tmp_path / "nothing.db"))


@pytest.mark.parametrize("text", ["tpm: 60000\n", "workload: {path: gone.jsonl}\nprovider: {tpm: 60000}\n"])
def test_a_provider_is_read_from_what_probe_writes_and_from_a_scenario(text: str, tmp_path: Path) -> None:
    path = tmp_path / "provider.yaml"
    path.write_text(text)
    with Journal.create(tmp_path / "j.db", fingerprint="", seed=0, epoch_s=0.0) as journal:
        assert provider_of(journal, str(path), None) == ProviderConfig(tpm=60_000)


def test_a_run_in_an_anchored_window_shared_with_others_is_rehearsed(tmp_path: Path) -> None:
    """Nothing of such a counter drains between two counts, which a bucket's arithmetic takes for use by others."""
    pytest.importorskip("openai")
    from benchmarks.twin import drawn, rehearsed

    limits = {"tpm": 12_000, "charge_rule": "prompt_plus_max", "latency": "gpt-4o-mini"}
    provider = ProviderConfig.model_validate({**limits, "window": "anchored", "cotenant": {"share": 0.1}})
    policy = Policy.preset("paceline").with_(tpm_limit=12_000, tpm_window="fixed", charge_rule="prompt_plus_max")
    sizes = tuple((400, 300) for _ in range(36))
    found = rehearsed(dataclasses.replace(drawn(3, 1), provider=provider, policy=policy, sizes=sizes), 0.0, tmp_path)
    assert found.makespan_s.measured > 60.0
    assert found.makespan_s.predicted == pytest.approx(found.makespan_s.measured, rel=0.02)
