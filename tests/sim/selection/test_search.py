"""Searching: runs are made once, fronts are fronts, what is dear is counted, limits come first."""

from __future__ import annotations

from datetime import date

import numpy as np
import pytest

from governor.model.policy import Policy
from governor.model.prices import Price, Prices
from sim.experiment.experiment import Pool
from sim.experiment.results import Figures, Point
from sim.experiment.runs import Condition, Runs, key_of
from sim.model.provider_config import ProviderConfig
from sim.scenario.scenario import ModelSource, Scenario
from sim.selection.hardening import Stress
from sim.selection.search import Goal, Searcher, _with_front, better
from sim.selection.searchlog import SearchLog, digest_of
from sim.selection.space import full_anchors, full_space, guardrail_space, safer_variants
from sim.selection.tariff import Tariff, tariff_of
from tests.scenarios import batch


class Counting(Pool):
    """A pool that writes down what it was asked for."""

    def __init__(self) -> None:
        super().__init__(1, engine="simpy")
        self.asked: list[tuple[int, int]] = []

    def run(self, tasks):  # type: ignore[no-untyped-def]
        wanted = [(case, list(seeds)) for case, seeds in tasks]
        for case, seeds in wanted:
            what = hash((repr(case.params), case.columns.reserve.tobytes()))
            self.asked += [(what, seed) for seed in seeds]
        return super().run(wanted)


@pytest.fixture
def small() -> Scenario:
    source = ModelSource(requests=20, prompt_tokens=(700, 2_000), output_tokens=(150, 600), max_tokens=800, seed=5)
    return Scenario.of(source, provider=ProviderConfig(), policy=Policy(), seed=11)


def test_nothing_is_run_twice_and_a_climb_ends_where_no_neighbour_is_better(small: Scenario) -> None:
    pool = Counting()
    searcher = Searcher(Condition("", small), Goal(), Runs(pool))
    space = guardrail_space(small)
    best = searcher.climb(small.policy, space.neighbours, 4)
    assert len(pool.asked) == len(set(pool.asked))
    assert searcher.runs.made == len(pool.asked)
    ahead = searcher.score(best, 4)
    assert ahead < searcher.score(small.policy, 4)
    assert not any(better(searcher.score(near, 4), ahead) for near in space.neighbours(best))
    leader, _ = searcher.leader or (None, 0)
    assert leader == best


def test_the_same_setting_twice_in_one_call_runs_under_all_its_seeds(small: Scenario) -> None:
    pool = Counting()
    runs, here = Runs(pool), Condition("", small)
    runs.require([(here, small.policy, [1, 2, 2]), (here, small.policy, [2, 3])])
    assert sorted(seed for _, seed in pool.asked) == [1, 2, 3]
    assert [run.seed for run in runs.figures(here, small.policy, [3, 1])] == [3, 1]
    assert runs.made == 3


def test_the_effort_ends_a_climb(small: Scenario) -> None:
    runs = Runs(Counting())
    searcher = Searcher(Condition("", small), Goal(), runs, effort=1)
    searcher.climb(small.policy, guardrail_space(small).neighbours, 4)
    once = runs.requests
    searcher.climb(small.policy, guardrail_space(small).neighbours, 4)
    assert runs.requests == once > 0


def test_the_front_is_what_nothing_beats(seed: int) -> None:
    """Against plain comparison of all pairs, with and without money."""
    rng = np.random.default_rng(seed)
    for money in (True, False):
        points = []
        for i in range(150):
            throttled, objective, extra = rng.integers(0, 8, 3).tolist()
            lost = float(rng.integers(0, 2))
            paid = float(extra) if money else None
            points.append(Point(Policy(), str(i), objective, throttled, lost, 3, False, paid))
        points.sort(key=lambda p: (p.lost, p.throttled_per_100, p.objective_s, p.extra_usd or 0.0))
        found = _with_front(points)

        def figures(p: Point) -> tuple[float, float, float]:
            return p.throttled_per_100, p.objective_s, p.extra_usd or 0.0

        least = [p for p in points if p.lost == points[0].lost]
        wanted = {
            figures(p)
            for p in least
            if not any(
                figures(q) != figures(p) and all(a <= b for a, b in zip(figures(q), figures(p), strict=True))
                for q in least
            )
        }
        assert {figures(p) for p in found if p.on_front} == wanted
        assert all(p.lost == points[0].lost for p in found if p.on_front)


# ---------------------------------------------------------------- money


PRICES = Prices({"dear": (Price(date.min, 10.0, 10.0, 40.0),), "cheap": (Price(date.min, 1.0, 1.0, 4.0),)})


def test_what_a_batch_costs_and_what_settings_add(small: Scenario) -> None:
    workload = batch([1_000, 3_000], 30.0, outputs=[500, 900], cap=600).with_(models=["dear", "cheap"])
    scenario = small.with_(workload=workload, policy=Policy(request_timeout_seconds=20.0, retry_max_attempts=2))
    tariff = tariff_of(scenario, PRICES)
    assert tariff is not None
    # Answers are cut at their cap of 600.
    assert tariff.answers_usd == pytest.approx((1_000 * 10 + 500 * 40 + 3_000 * 1 + 600 * 4) / 1e6)
    assert tariff.prompt_usd == pytest.approx((1_000 * 10 + 3_000 * 1) / 4_000 / 1e6)
    # Every attempt times out: each request is paid for twice, and answers nothing.
    runs = Runs(Pool(1, engine="simpy"), tariff=tariff)
    (run,) = runs.figures(Condition("", scenario), scenario.policy, [1])
    assert run["extra_usd"] == pytest.approx(2.0 * tariff.answers_usd)
    assert tariff_of(small.with_(workload=workload.with_(models=["dear", "unheard-of"])), PRICES) is None
    assert tariff_of(scenario, None) is None


def test_money_joins_the_front(small: Scenario) -> None:
    """A provider that drops connections: what is sent again costs; refusals do not."""
    priced = small.with_(provider=small.provider.with_(faults={"drop_ratio": 0.3}), policy=Policy(stagger_seconds=0.0))
    runs = Runs(Pool(1, engine="simpy"), tariff=Tariff(1.0, 1e-6, 1e-6))
    searcher = Searcher(Condition("", priced), Goal(), runs)
    searcher.run([priced.policy, priced.policy.with_(retry_max_attempts=1)], 3)
    once, again = sorted(searcher.front(), key=lambda p: p.extra_usd or 0.0)
    assert (once.policy.retry_max_attempts, again.policy.retry_max_attempts) == (1, 5)
    assert 0.0 < (once.extra_usd or 0.0) < (again.extra_usd or 0.0)
    assert once.lost > again.lost


# ---------------------------------------------------------------- stress


def test_nobody_is_asked_to_do_what_nothing_tried_can_do(small: Scenario) -> None:
    # Every answer fails: whatever the settings, all is lost there.
    hopeless = Condition("hopeless", small.with_(provider=small.provider.with_(faults={"error_ratio": 1.0})))
    faulty = Condition("faulty", small.with_(provider=small.provider.with_(faults={"error_ratio": 0.4})))
    stress = Stress([hopeless, faulty], Goal(), Runs(Pool(1, engine="simpy")), 2)
    base = Policy(stagger_seconds=0.5)
    hasty, patient = base.with_(retry_max_attempts=1), base.with_(retry_max_attempts=12)
    stress.run([hasty, patient])
    assert stress.violated(patient) == []
    assert stress.violations(patient) == (0.0, 0.0)
    assert stress.violated(hasty) == [1]
    lost = [run["failed"] / run.requests for run in stress.figures(hasty, 1)]
    least = [run["failed"] / run.requests for run in stress.figures(patient, 1)]
    assert stress.violations(hasty)[0] == pytest.approx(np.mean(lost) - np.mean(least))
    with stress.quick():
        assert stress.seeds == 1
    assert stress.seeds == 2


# ---------------------------------------------------------------- the journal


def figures(seed: int) -> Figures:
    values = {"makespan_s": 0.1 + seed, "efficiency": float("nan"), "failed": 0.0}
    return Figures(seed, 20, 20, values, {"tpm": 1.5}, {"X": 1})


@pytest.fixture
def journal(tmp_path, monkeypatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr("sim.selection.searchlog.AFTER_S", 0.0)
    monkeypatch.setattr("sim.selection.searchlog.EVERY_S", 0.0)
    log = SearchLog(tmp_path / "search.journal", "mark")
    digest = digest_of(key_of(Policy()))
    log.add([(("", digest, seed), figures(seed)) for seed in range(5)])
    log.close()
    return tmp_path / "search.journal"


def test_a_journal_reads_back_exactly(journal) -> None:  # type: ignore[no-untyped-def]
    log = SearchLog(journal, "mark")
    digest = digest_of(key_of(Policy()))
    assert list(log.known) == [("", digest, seed) for seed in range(5)]
    assert repr(list(log.known.values())) == repr([figures(seed) for seed in range(5)])
    assert log.notes == [f"resumed: 5 runs of an interrupted search are taken from {journal}"]
    assert SearchLog(journal, "mark", resume=False).known == {}


def test_a_line_that_was_cut_off_is_dropped_and_the_next_search_goes_on_behind_the_last_whole_one(journal) -> None:  # type: ignore[no-untyped-def]
    journal.write_bytes(journal.read_bytes()[:-20])
    log = SearchLog(journal, "mark")
    assert log.resumed == 4
    log.add([(("", "other", 9), figures(9))])
    log.close()
    again = SearchLog(journal, "mark")
    assert [key[2] for key in again.known] == [0, 1, 2, 3, 9]


def test_a_journal_that_cannot_be_written_is_a_note_and_no_end(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("sim.selection.searchlog.AFTER_S", 0.0)
    log = SearchLog(tmp_path / "nowhere" / "search.journal", "mark")
    for seed in range(3):
        log.add([(("", "x", seed), figures(seed))])
    log.close()
    assert len(log.notes) == 1
    assert "cannot be written" in log.notes[0]


@pytest.mark.parametrize(("habits", "settles"), [({}, False), ({"settles": True}, True), ({"charged": "answer"}, True)])
def test_settling_is_tried_only_where_the_provider_ends_up_counting_use(
    small: Scenario, habits: dict[str, object], settles: bool
) -> None:
    """Simulated headers repair what the law settles wrongly, so that a search would find it for its speed alone."""
    scenario = small.with_(provider=small.provider.with_(**habits), policy=small.policy.with_(settle=not settles))
    space = full_space(scenario)
    assert ("settle" in space.ladders) == settles
    anchors = [policy for policy in full_anchors(scenario) if policy != scenario.policy]
    assert {policy.settle for policy in anchors} == {settles}
    tried = [near for policy in anchors for near in (*space.neighbours(policy), *safer_variants(policy, space, 1.0))]
    assert settles or not any(policy.settle for policy in tried)
