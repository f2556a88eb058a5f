"""The Python API: what a program names becomes what the command line reads, and results are what the commands print."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from governor import Policy
from governor.model.env_files import policy_of
from governor.model.errors import BadInput, BadSetting, Oversized, PacelineError
from governor.model.policy import KNOBS
from sim import (
    PlanResult,
    Scenario,
    SimulationResult,
    compare,
    knob_map,
    plan,
    simulate,
    simulate_pools,
    simulate_processes,
)
from sim.app.inputs import PlanOptions, read_inputs
from sim.app.options import Options
from sim.experiment.experiment import attempts_of, replicate
from sim.experiment.results import Plan
from sim.model.workload import ARRAYS
from sim.reporting.dataframes import processes_frame
from sim.reporting.terminal import forecast_text, summary_text
from sim.selection import planner
from sim.serving.rehearsal import rehearsed

ROWS = [{"prompt_tokens": 300 + 40 * i, "output_tokens": 20 + i} for i in range(30)]
HEAVY = {"numpy", "pandas", "pydantic", "matplotlib", "simpy", "numba", "openai", "asyncio", "typer"}


def words(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return ran.stdout.strip()


@pytest.fixture(scope="module")
def batch(root: Path) -> str:
    return str(root / "examples" / "batch.jsonl")


@pytest.fixture(scope="module")
def today(batch: str) -> Scenario:
    return Scenario(batch, tpm=30_000, rpm=500)


@pytest.fixture(scope="module")
def result() -> SimulationResult:
    """Four runs that draw 429s."""
    reckless = {"stagger_s": 0.5, "est_tokens_per_run": 300, "max_concurrency": 20, "tpm_headroom": 0.0}
    return simulate(Scenario(ROWS, tpm=9_000, policy=reckless), replications=4, seed=7, workers=1)


@pytest.fixture(scope="module")
def found(sample_plan: Plan, sample_scenario: Scenario) -> PlanResult:
    return PlanResult(sample_scenario, PlanOptions(), sample_plan)


class TestImports:
    def test_the_packages_alone_are_light(self) -> None:
        code = "import json, sys, governor, sim; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
        assert not HEAVY & set(json.loads(words(code)))

    def test_what_they_offer_is_listed_and_there(self) -> None:
        import governor
        import sim

        for package in (governor, sim):
            assert set(package.__all__) <= set(dir(package))
            for name in package.__all__:
                assert getattr(package, name) is not None
            with pytest.raises(AttributeError, match="no attribute 'nothing'"):
                package.nothing  # noqa: B018

    def test_no_module_takes_the_name_of_a_function(self) -> None:
        code = (
            "import sim, sim.app.cli, sim.app.outputs, sim.selection.planner\n"
            "print(callable(sim.plan), callable(sim.simulate))"
        )
        assert words(code) == "True True"

    def test_without_the_extra_it_says_what_to_install(self) -> None:
        code = (
            "import sys; sys.modules['pandas'] = None\nimport sim\ntry: sim.simulate\nexcept ImportError as e: print(e)"
        )
        assert words(code) == "simulate needs pandas, which comes with: pip install 'paceline[sim]'"


class TestScenario:
    def test_a_file_is_read_as_the_command_line_reads_it(self, batch: str, root: Path) -> None:
        env = str(root / "examples" / "today.env")
        options = Options(workload=batch, env_file=env, tpm=40_000, assignments=["OPENAI_TPM_HEADROOM=0.1"], seed=3)
        by_command = read_inputs(options, {}).scenario
        mine = Scenario.from_file(batch, env_file=env, tpm=40_000, policy={"tpm_headroom": 0.1}, seed=3)
        assert mine.to_yaml() == by_command.to_yaml()
        for name in ARRAYS:
            assert np.array_equal(getattr(mine.workload, name), getattr(by_command.workload, name))

    def test_the_environment_is_not_looked_at(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_MAX_CONCURRENCY", "77")
        assert Scenario(ROWS).policy.max_concurrency == 3

    def test_rows_at_hand_are_the_rows_of_a_file(self, tmp_path: Path) -> None:
        frame = pd.DataFrame(ROWS)
        path = tmp_path / "trace.csv"
        frame.to_csv(path, index=False)
        of_file = Scenario(path)
        numpys = [{name: np.int64(value) for name, value in row.items()} for row in ROWS]
        renamed = frame.rename(columns={"prompt_tokens": "in", "output_tokens": "out"})
        columns = {"prompt": "in", "output": "out"}
        for scenario in (Scenario(ROWS), Scenario(frame), Scenario(numpys), Scenario(renamed, columns=columns)):
            for name in ARRAYS:
                assert np.array_equal(getattr(scenario.workload, name), getattr(of_file.workload, name)), name

    def test_chat_bodies_become_a_batch(self) -> None:
        body = {"model": "gpt-4o", "max_tokens": 50, "messages": [{"role": "user", "content": "x" * 400}]}
        scenario = Scenario([body, body], provider="gpt-4o-tier1")
        line = {"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": body}
        assert scenario.workload.custom_id(1) == "request-1"
        assert np.array_equal(scenario.charges()[1:], Scenario([line], provider="gpt-4o-tier1").charges())

    def test_what_has_no_file_is_written_beside_the_scenario(self, tmp_path: Path) -> None:
        scenario = Scenario(ROWS, tpm=20_000)
        scenario.write(tmp_path / "scenario.yaml")
        again = Scenario(tmp_path / "scenario.yaml")
        assert replicate(again, 2).runs == replicate(scenario, 2).runs

    def test_a_scenario_file_keeps_its_settings_and_takes_changes(self, tmp_path: Path) -> None:
        first = Scenario(ROWS, tpm=20_000, policy={"stagger_s": 7, "max_concurrency": 9})
        first.write(tmp_path / "scenario.yaml")
        again = Scenario(tmp_path / "scenario.yaml", policy={"stagger_s": 2}, provider={"settles": True})
        assert (again.policy.stagger_seconds, again.policy.max_concurrency) == (2.0, 9)
        assert (again.provider.tpm, again.provider.settles) == (20_000, True)

    @pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.name)
    def test_every_knob_goes_by_three_names(self, knob, today: Scenario) -> None:
        value = knob.paceline if knob.kind in ("boolean", "string") else type(knob.guardrails)(knob.guardrails + 1)
        if knob.kind in ("integer", "number") and not knob.holds(value):
            value = 0.5
        for name in (knob.name, knob.env, knob.name.replace("_seconds", "_s")):
            changed = today.with_(**{name: value})
            assert getattr(changed.policy, knob.name) == value
            assert changed.policy == today.policy.with_(**{knob.name: value})
            assert changed.provider == today.provider
            assert changed.workload is today.workload

    def test_a_granted_limit_takes_the_settings_with_it_where_they_agreed(self, today: Scenario) -> None:
        assert today.with_(tpm=60_000).policy.tpm_limit == 60_000
        assert today.with_(tpm_limit=20_000).with_(tpm=60_000).policy.tpm_limit == 20_000
        assert today.with_(provider={"tpm": 60_000}).policy.tpm_limit == 30_000
        assert today.with_(tpm=60_000, tpm_limit=50_000).policy.tpm_limit == 50_000

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"stager_s": 5}, "'stager_s' .*: did you mean stagger_s?"),
            ({"stagger_ms": 5}, "'stagger_ms' .*: did you mean stagger_s?"),
            ({"tmp": 5}, "'tmp' .*: did you mean tpm?"),
            ({"polcy": "paceline"}, "'polcy' .*: did you mean policy?"),
            ({"qqqq": 5}, "'qqqq' is nothing that a scenario can be changed in"),
            ({"policy": "pacelime"}, "there is no preset 'pacelime'"),
            ({"policy": {"stager_s": 1}}, "no setting 'stager_s': did you mean stagger_s?"),
            ({"stagger_s": -1}, "OPENAI_STAGGER_SECONDS='-1' is not allowed: a number from 0"),
            ({"stagger_s": 1, "OPENAI_STAGGER_SECONDS": 2}, "OPENAI_STAGGER_SECONDS is given twice"),
            ({"provider": {"tmp": 1}}, "tmp"),
            ({"provider": "gpt-4o-tier9"}, "gpt-4o-tier9"),
        ],
        ids=str,
    )
    def test_a_slip_is_named(self, today: Scenario, changes: dict, message: str) -> None:
        with pytest.raises(BadSetting, match=message):
            today.with_(**changes)

    def test_slips_in_what_it_is_made_of(self, batch: str) -> None:
        for given, message in (
            (lambda: Scenario(), "a scenario is made of requests"),
            (lambda: Scenario(batch, tmp=3), "has no 'tmp': did you mean tpm?"),
            (lambda: Scenario(batch, policy={"stager_s": 1}), "did you mean stagger_s?"),
        ):
            with pytest.raises(BadSetting, match=message):
                given()
        for rows, message in (
            ([], "requests: there are no rows"),
            ([ROWS[0], 5], "requests:2: a number where a request should be"),
            ([{"a": 1}], "requests:1: no column of prompt and output tokens"),
            ([{"prompt_tokens": 1, "output_tokens": {1}}], "requests: set in a row"),
            ("nowhere.jsonl", "nowhere.jsonl: there is no such file"),
        ):
            with pytest.raises(BadInput, match=message):
                Scenario(rows)

    def test_its_repr_is_a_line(self, today: Scenario) -> None:
        assert repr(today).startswith("<Scenario: 200 requests to gpt-4o, 30,000 TPM and 500 RPM, max_concurrency=3")
        assert len(repr(today)) < 200


class TestSimulate:
    def test_is_what_the_command_says(self, result: SimulationResult) -> None:
        assert result.forecast.runs == replicate(result.scenario, 4).runs
        assert str(result) == forecast_text(result.scenario, result.forecast, 100)
        single = simulate(result.scenario, replications=1)
        assert str(single) == summary_text(single.scenario, single.summary, 100)
        assert single.summary == attempts_of(result.scenario, 7)[1].summary(result.scenario.grant())

    def test_attempts_add_up_to_the_summary(self, result: SimulationResult) -> None:
        rows, summary = result.attempts, result.summary
        assert summary.throttled > 0, "a case without 429s shows nothing"
        assert len(rows) == summary.attempts
        assert rows["finished_s"].max() == summary.makespan_s
        assert rows["charged_tokens"].sum() == summary.charged_tokens
        assert Counter(rows["outcome"])["throttled"] == summary.throttled
        assert pd.api.types.is_float_dtype(rows["launched_s"])

    def test_the_timeline_ends_where_the_counts_do(self, result: SimulationResult) -> None:
        line, summary = result.timeline, result.summary
        assert line["time_s"].is_monotonic_increasing
        assert line["time_s"].iloc[[0, -1]].tolist() == [0.0, summary.makespan_s]
        last = line.iloc[-1]
        assert (last["launched_attempts"], last["throttled_attempts"]) == (summary.attempts, summary.throttled)
        assert last["in_flight_requests"] == 0
        # At a moment of one's own choosing, counted by hand.
        at_s = float(line["time_s"].iloc[len(line) // 2])
        row = line.iloc[len(line) // 2]
        rows = result.attempts
        in_flight = ((rows["launched_s"] <= at_s) & (rows["finished_s"] > at_s)).sum()
        recent = (rows["launched_s"] <= at_s) & (rows["launched_s"] > at_s - 60.0)
        assert row["in_flight_requests"] == in_flight
        assert row["charged_last_60s_tokens"] == rows.loc[recent, "charged_tokens"].sum()

    def test_runs_estimates_and_waits_agree(self, result: SimulationResult) -> None:
        runs = result.runs
        assert runs.index.tolist() == [7, 8, 9, 10]
        for name in ("makespan_s", "efficiency_ratio", "throttled"):
            known = runs[name].dropna()
            assert result.estimates.loc[name, "mean"] == pytest.approx(known.mean(), nan_ok=True)
            assert result.estimates.loc[name, "n"] == len(known)
        waits = result.waits
        assert waits["share_ratio"].sum() == pytest.approx(1.0)
        assert waits["waited_s"].is_monotonic_decreasing
        assert waits.loc["backoff", "waited_s"] == pytest.approx(runs["waited_backoff_s"].mean())

    def test_a_difference_is_taken_seed_by_seed(self, result: SimulationResult) -> None:
        slower = simulate(result.scenario.with_(stagger_s=10), replications=4, seed=7)
        difference = slower.minus(result)
        by_hand = slower.runs["makespan_s"] - result.runs["makespan_s"]
        assert difference.mean == pytest.approx(by_hand.mean())
        half = 3.182446305284263 * by_hand.std() / 2.0  # Student's t, 97.5 %, 3 degrees of freedom; sqrt(4)
        assert difference.high - difference.mean == pytest.approx(half)
        with pytest.raises(BadSetting, match="share no seeds"):
            simulate(result.scenario, seed=100).minus(result)

    def test_what_can_never_run_is_refused(self, today: Scenario) -> None:
        with pytest.raises(Oversized, match="the limit is 500"):
            simulate(today.with_(tpm=500))

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda s: simulate(s, replications=0), "replications=0: must be a whole number from 1 up"),
            (lambda s: simulate(s, replications=1.5), "replications=1.5: must be a whole number"),
            (lambda s: simulate(s, seed=-1), "seed=-1: must be a whole number from 0 up"),
            (lambda s: simulate(s, seed="x"), "seed='x': must be a whole number"),
            (lambda s: simulate(s, workers=-1), "workers=-1"),
            (lambda s: simulate(s, engine="fast"), "engine='fast': must be auto, compiled or simpy"),
            (lambda s: simulate("requests.jsonl"), "scenario is 'requests.jsonl', not a Scenario: make one"),
            (lambda s: compare([s, s]), "nothing to compare: name scenarios"),
            (lambda s: compare({"a": "requests.jsonl"}), r"scenarios\['a'\] is 'requests.jsonl', not a Scenario"),
            (lambda s: plan(s, finish_by_s="2h"), "finish_by_s='2h': must be a number from 0 up"),
            (lambda s: plan(None), "scenario is None, not a Scenario"),
            (lambda s: knob_map(s, "tpm_headroom", [], "stagger_s", [1]), "a map needs values of tpm_headroom"),
            (lambda s: knob_map(s, "stagger_s", [1], "stagger_s", [1]), "over two knobs"),
            (lambda s: simulate_processes(s, 0), "processes=0: must be a whole number from 1 to 64"),
            (lambda s: simulate_processes(s, 2, store_rtt_s=-1), "store_rtt_s=-1: must be a number from 0 up"),
            (lambda s: s.with_(arrivals="poisson"), "arrivals='poisson': must be batch or trace"),
            (lambda s: s.with_(policy=5), "policy is 5, not a Policy"),
            (lambda s: Scenario(ROWS, provider=9), "provider is 9, not a ProviderConfig"),
            (lambda s: Scenario(5), "int where a file, rows or a DataFrame should be"),
        ],
    )
    def test_what_cannot_be_meant_is_said_in_a_line(
        self, today: Scenario, call: Callable[[Any], Any], message: str
    ) -> None:
        with pytest.raises(PacelineError, match=message):
            call(today)

    def test_its_repr_is_a_line(self, result: SimulationResult) -> None:
        assert repr(result).startswith("<SimulationResult: 30 requests in ")
        assert "\n" not in repr(result)


class TestPlan:
    def test_the_env_text_is_the_policy(self, found: PlanResult, tmp_path: Path) -> None:
        for name, policy in (("env", found.policy), ("guardrails_env", found.guardrails)):
            path = tmp_path / name
            path.write_text(getattr(found, name))
            assert policy_of(path).params() == policy.params()
        (tmp_path / "back").write_text(found.rollback_env)
        assert policy_of(tmp_path / "back").params() == found.scenario.policy.params()
        assert found.recommended.policy == found.policy

    def test_the_front_holds_nothing_that_another_beats(self, found: PlanResult) -> None:
        front, tried = found.front, found.tried
        assert 0 < len(front) <= len(tried)
        assert front["makespan_s"].is_monotonic_increasing
        for a in front.itertuples():
            better = (tried["makespan_s"] < a.makespan_s) & (tried["throttled_per_100"] <= a.throttled_per_100)
            assert not (better & (tried["lost_requests"] <= a.lost_requests)).any()

    def test_tables_hold_the_plans_figures(self, found: PlanResult) -> None:
        gain = found.comparison.loc["now", "makespan_s"] - found.comparison.loc["recommended", "makespan_s"]
        assert gain == pytest.approx(found.found.full.gain_s.mean)
        # Each left out alone: no sum of a whole.
        assert (found.changes["worth_low_s"] <= found.changes["worth_s"]).all()
        assert set(found.changes.index) <= {knob.env for knob in KNOBS}
        assert found.stress.index.get_level_values("settings").unique().tolist() == [
            "now",
            "guardrails",
            "recommended",
            "runner_up",
        ]

    def test_it_writes_what_the_command_writes(self, found: PlanResult, tmp_path: Path) -> None:
        report = found.write(tmp_path / "out")
        assert report.name == "report.html"
        assert {p.name for p in report.parent.iterdir()} >= {"report.html", "recommended.env", "plan.json"}
        # The text alone has no scenario beside it; the file names the one in its folder.
        written = (report.parent / "recommended.env").read_text()
        title, _, settings = found.env.partition("\n\n")
        assert written.startswith(title)
        assert written.endswith(settings)
        assert "PACELINE_SCENARIO=scenario.yaml\n" in written

    def test_a_search_finds_what_gains(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(planner.EFFORTS, "quick", 3_000)
        monkeypatch.setattr(planner, "LEAST_RUNS", 1)
        scenario = Scenario(ROWS[:6], tpm=30_000)
        found = plan(scenario, effort="quick", workers=1)
        now = simulate(scenario, replications=3)
        then = simulate(found.recommended, replications=3)
        assert then.minus(now).high < 0.0
        assert "makespan_s" in found.front
        assert repr(found).startswith("<PlanResult: ")
        with pytest.raises(BadSetting, match=r"plan\.effort='huge'"):
            plan(scenario, effort="huge")  # type: ignore[arg-type]


def test_a_policy_is_enough_for_a_governor() -> None:
    import asyncio

    from governor import Governor

    async def made() -> tuple[Governor, Governor]:
        policy = Policy().with_(stagger_s=2)
        return Governor(policy), Governor(policy.params())

    by_policy, by_params = asyncio.run(made())
    assert by_policy.p == by_params.p
    assert math.isclose(by_policy.p.stagger_s, 2.0)


class TestComparing:
    def test_the_same_seeds_for_all(self) -> None:
        scenario = Scenario(ROWS, tpm=20_000)
        found = compare({"now": scenario, "other": scenario.with_(stagger_s=1, seed=50)}, replications=3, seed=4)
        assert [result.runs.index.tolist() for result in found.results.values()] == [[4, 5, 6]] * 2
        assert found.table.loc["other", "makespan_s"] == pytest.approx(found["other"].runs["makespan_s"].mean())
        assert found["now"].minus(found["other"]).mean > 0.0
        with pytest.raises(BadSetting, match="nothing to compare"):
            compare({})

    def test_a_map_holds_the_run_of_each_cell_and_marks_the_best(self) -> None:
        scenario = Scenario(ROWS, tpm=9_000, policy={"est_tokens_per_run": 300, "max_concurrency": 20})
        staggers, headrooms = (0.0, 2.0, 15.0), (0.0, 0.3)
        found = knob_map(scenario, "stagger_s", staggers, "OPENAI_TPM_HEADROOM", headrooms, replications=2)
        assert (found.x_env, found.y_env) == ("OPENAI_STAGGER_SECONDS", "OPENAI_TPM_HEADROOM")
        for x, stagger_s in enumerate(staggers):
            for y, headroom in enumerate(headrooms):
                runs = simulate(scenario.with_(stagger_s=stagger_s, tpm_headroom=headroom), replications=2).runs
                assert found.objective_s[y, x] == pytest.approx(runs["makespan_s"].mean())
                assert found.lost[y, x] == pytest.approx(runs["failed"].mean())
        assert (found.lost > 0).any(), "a case in which every cell is good shows nothing"
        best = headrooms.index(found.recommended[1]), staggers.index(found.recommended[0])
        assert found.lost[best] == 0
        good = (found.lost == 0) & (found.throttled_per_100 <= 1.0)
        assert found.objective_s[best] == found.objective_s[good].min()

    def test_processes_share_what_one_has(self) -> None:
        scenario = Scenario(ROWS, tpm=20_000).with_(policy="paceline", stagger_s=0)
        runs = {str(n): simulate_processes(scenario, n) for n in (1, 3)}
        table = processes_frame(runs)
        assert table.loc["3", "makespan_s"] == pytest.approx(table.loc["1", "makespan_s"], rel=0.02)
        assert (table["used_max_tokens"] <= 20_000 * (1 + 1e-9)).all()
        assert table.loc["3", "lost_requests"] == 0
        with pytest.raises(BadSetting, match="arrive over time"):
            simulate_processes(scenario.with_(arrivals="trace"), 2)

    def test_a_preset_keeps_the_providers_limits(self) -> None:
        scenario = Scenario(ROWS, tpm=450_000, rpm=5_000)
        assert scenario.with_(policy="paceline").policy.tpm_limit == 450_000
        assert scenario.with_(policy="paceline", tpm_limit=9_000).policy.tpm_limit == 9_000


def test_only_bodies_can_be_rehearsed(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="token counts have no bodies"):
        rehearsed(Scenario(ROWS), tmp_path)


def test_pools_that_share_a_batch_are_simulated_together_and_differing_ones_refused() -> None:
    alone = Scenario(ROWS, tpm=30_000)
    both = simulate_pools({"small": alone, "large": alone.with_(tpm=90_000)}, replications=2)
    assert [run.lost for run in both.runs] == [0, 0]
    assert sum(each.completed for each in both.summaries.values()) == both.runs[0].completed
    whole = both.summary
    assert (whole.requests, whole.failed, whole.attempts) == (len(ROWS), 0, len(ROWS))
    assert whole.efficiency is not None
    assert whole.efficiency == pytest.approx(whole.bound_s / both.runs[0].makespan_s)
    assert both.makespan_s <= simulate(alone, replications=2).forecast["makespan_s"].mean
    with pytest.raises(BadSetting, match="pool b: its batch is not that of pool a"):
        simulate_pools({"a": alone, "b": Scenario(ROWS[:2], tpm=30_000)})
    with pytest.raises(BadSetting, match="scenarios is empty"):
        simulate_pools({})
