"""Preflight's verdicts on their boundaries, to the token and the second, and obeyed waits asked of the law itself."""

from __future__ import annotations

import math
import random
from typing import Literal

import pytest

from governor import law
from governor.forecast.preflight import InUse, Load, Verdict, fluid_forecast, in_use, preflight
from governor.model.needs import of_tokens
from governor.model.policy import Policy

STRICT = Policy(preflight_mode="strict")
PACED = Policy()
TEN_RUNS = Load.uniform(10, 7_000)  # the guardrails' own checklist
WINDOWS: tuple[Literal["fixed", "sliding", "bucket"], ...] = ("fixed", "sliding", "bucket")


def refused(verdict: Verdict) -> bool:
    assert verdict.ok == (verdict.code == "") == (verdict.reason == "")
    assert verdict.code in ("", "BATCH_RATE_LIMITED")
    assert "\n" not in verdict.reason
    assert verdict.ok or verdict.retryable == (verdict.suggested_wait_s is not None)
    return not verdict.ok


class TestLoad:
    def test_of_single_reservations(self) -> None:
        assert Load.of(iter([5, 1, 9])) == Load(count=3, total=15, largest=9, smallest=1)
        assert Load.of([7_000] * 10) == TEN_RUNS
        assert Load.of([]) == Load(0, 0, 0, 0)


class TestStrict:
    def test_the_budget_to_the_token(self) -> None:
        assert not refused(preflight(STRICT, Load.of([25_500])))
        assert not refused(preflight(STRICT, Load.of([25_000, 500])))
        verdict = preflight(STRICT, Load.of([25_000, 501]))
        assert refused(verdict)
        assert (verdict.projected_tokens, verdict.budget_tokens, verdict.in_use_tokens) == (25_501, 25_500, 0)
        assert (verdict.retryable, verdict.suggested_wait_s) == (False, None)

    def test_the_literal_rule_refuses_the_checklist_batch_and_says_how_many_would_go(self) -> None:
        verdict = preflight(STRICT, TEN_RUNS)
        assert refused(verdict)
        assert (verdict.projected_tokens, verdict.budget_tokens, verdict.max_runs_now) == (70_000, 25_500, 3)
        assert not verdict.retryable
        assert not refused(preflight(STRICT, Load.uniform(3, 7_000)))
        assert refused(preflight(STRICT, Load.uniform(4, 7_000)))

    def test_what_is_in_use_counts_to_the_token(self) -> None:
        batch = Load.uniform(2, 7_000)
        assert not refused(preflight(STRICT, batch, booked=InUse(11_500, 20.0)))
        verdict = preflight(STRICT, batch, booked=InUse(11_501, 20.0))
        assert refused(verdict)
        assert (verdict.in_use_tokens, verdict.suggested_wait_s, verdict.retryable) == (11_501, 20, True)
        assert verdict.max_runs_now == 1
        assert "14,000" in verdict.reason
        assert "11,501" in verdict.reason
        assert "20 s" in verdict.reason

    def test_waiting_cannot_help_a_batch_that_alone_is_too_much(self) -> None:
        verdict = preflight(STRICT, TEN_RUNS, booked=InUse(12_000, 30.0))
        assert refused(verdict)
        assert (verdict.retryable, verdict.suggested_wait_s, verdict.max_runs_now) == (False, None, 1)

    def test_a_bucket_frees_bit_by_bit(self) -> None:
        # 8,501 tokens too many at 425 tokens a second: 20 s free 8,500, so it takes 21.
        policy = STRICT.with_(tpm_window="bucket")
        booked = InUse(25_500, 60.0, continuous=True)
        assert preflight(policy, Load.of([8_500]), booked=booked).suggested_wait_s == 20
        assert preflight(policy, Load.of([8_501]), booked=booked).suggested_wait_s == 21

    def test_any_so_many_of_unequal_runs_would_fit(self, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            runs = [rng.randint(1, 9_000) for _ in range(rng.randint(1, 20))]
            used = rng.randint(0, 30_000)
            verdict = preflight(STRICT, Load.of(runs), booked=InUse(used, 30.0) if used else InUse())
            if refused(verdict):
                assert (
                    sum(sorted(runs)[len(runs) - verdict.max_runs_now :]) + used <= 25_500 or not verdict.max_runs_now
                )
            else:
                assert verdict.max_runs_now == len(runs)


class TestPaced:
    def test_the_checklist_batch_starts_and_so_does_a_huge_one(self) -> None:
        verdict = preflight(PACED, TEN_RUNS)
        assert not refused(verdict)
        assert (verdict.max_runs_now, verdict.suggested_wait_s, verdict.retryable) == (10, None, True)
        assert not refused(preflight(PACED, Load.uniform(100_000, 7_000)))

    def test_a_run_above_the_limit_can_never_start(self) -> None:
        assert not refused(preflight(PACED, Load.of([100, 30_000])))
        verdict = preflight(PACED, Load.of([100, 30_001]))
        assert refused(verdict)
        assert (verdict.retryable, verdict.suggested_wait_s, verdict.forecast_finish_s) == (False, None, None)
        assert "30,001" in verdict.reason
        assert "raise OPENAI_TPM_LIMIT" in verdict.reason
        assert refused(preflight(PACED.with_(tpd_limit=20_000), Load.of([20_001])))
        assert not refused(preflight(PACED.with_(tpd_limit=20_000), Load.of([20_000])))
        assert refused(preflight(STRICT.with_(tpd_limit=20_000), Load.of([20_001])))

    def test_a_window_that_running_work_has_filled(self) -> None:
        assert not refused(preflight(PACED, TEN_RUNS, booked=InUse(18_500, 42.5)))
        verdict = preflight(PACED, TEN_RUNS, booked=InUse(18_501, 42.5))
        assert refused(verdict)
        assert (verdict.suggested_wait_s, verdict.retryable, verdict.max_runs_now) == (43, True, 0)

    def test_the_smallest_run_decides_whether_anything_could_start(self) -> None:
        batch = Load.of([7_000, 400])
        assert not refused(preflight(PACED, batch, booked=InUse(25_100, 10.0)))
        assert refused(preflight(PACED, batch, booked=InUse(25_101, 10.0)))

    def test_a_run_above_the_budget_goes_alone_into_an_empty_window(self) -> None:
        alone = Load.of([28_000])
        assert not refused(preflight(PACED, alone))
        assert preflight(PACED, alone, booked=InUse(1, 9.2)).suggested_wait_s == 10

    def test_nothing_to_do_is_never_refused(self) -> None:
        for policy in (STRICT, PACED):
            verdict = preflight(policy, Load.of([]), booked=InUse(30_000, 5.0), deadline_s=0.0)
            assert not refused(verdict)
            assert verdict.forecast_finish_s == 0.0


class TestDeadline:
    @pytest.mark.parametrize("mode", ["strict", "paced"])
    def test_a_forecast_past_it_is_final(self, mode: str) -> None:
        policy = Policy().with_(preflight_mode=mode)
        batch = Load.uniform(3, 7_000)  # 15 s apart: the last goes out at 30 s
        assert not refused(preflight(policy, batch, deadline_s=30.0))
        verdict = preflight(policy, batch, deadline_s=29.9)
        assert refused(verdict)
        assert (verdict.retryable, verdict.suggested_wait_s, verdict.forecast_finish_s) == (False, None, 30.0)
        assert (verdict.forecast_by, verdict.forecast_bound) == ("fluid", "stagger")
        assert verdict.max_runs_now == 2
        assert not refused(preflight(policy, Load.uniform(2, 7_000), deadline_s=29.9))

    def test_a_simulation_speaks_where_there_is_one(self) -> None:
        asked = []

        def forecast() -> float:
            asked.append(1)
            return 400.0

        verdict = preflight(PACED, TEN_RUNS, deadline_s=400.0, forecast=forecast)
        assert not refused(verdict)
        assert (verdict.forecast_finish_s, verdict.forecast_by) == (400.0, "simulation")
        verdict = preflight(PACED, TEN_RUNS, deadline_s=200.0, forecast=forecast)
        assert refused(verdict)
        # The fluid needs 180 s for all ten and the simulation 400: in 200 s about as many as the fluid does in 90.
        assert verdict.max_runs_now == 6
        assert fluid_forecast(PACED, Load.uniform(6, 7_000)).finish_s <= 90.0
        assert fluid_forecast(PACED, Load.uniform(7, 7_000)).finish_s > 90.0
        assert len(asked) == 2
        assert refused(preflight(PACED, TEN_RUNS, booked=InUse(25_500, 3.0), forecast=forecast))
        assert len(asked) == 2  # what is refused anyway is not simulated

    def test_a_simulation_that_never_ends(self) -> None:
        verdict = preflight(PACED, Load.uniform(1, 7_000), deadline_s=60.0, forecast=lambda: math.inf)
        assert refused(verdict)
        assert (verdict.forecast_finish_s, verdict.forecast_by, verdict.max_runs_now) == (None, "simulation", 0)

    def test_without_a_deadline_it_is_only_told(self) -> None:
        verdict = preflight(PACED, TEN_RUNS, service_s=20.0)
        assert not refused(verdict)
        assert verdict.forecast_finish_s == pytest.approx(3 * law.FIXED_S + 20.0)


class TestObeyedWait:
    """The law books, the verdict names a wait, and the law is asked again at its end and one second earlier."""

    @pytest.mark.parametrize("window", WINDOWS)
    @pytest.mark.parametrize("mode", ["strict", "paced"])
    def test_it_is_enough_and_no_second_too_long(self, window: str, mode: str, seed: int) -> None:
        rng = random.Random(seed)
        policy = Policy().with_(tpm_window=window, preflight_mode=mode, max_concurrency=1_000, stagger_seconds=0.0)
        p = policy.params()
        refusals = 0
        for _ in range(150):
            s = law.State()
            now = rng.uniform(0.0, 1_000.0)
            for _ in range(rng.randint(1, 12)):
                reserve = float(rng.randint(500, 6_000))
                now = max(
                    now + rng.choice([0.0, rng.uniform(0.0, 8.0)]),
                    law.admit_at(p, s, of_tokens(reserve), law.FIRST, now),
                )
                law.launched(p, s, of_tokens(reserve), law.FIRST, now, 0.5)
            now += rng.uniform(0.0, 5.0)
            batch = Load.uniform(rng.randint(1, 2), rng.randint(6_000, 12_750))
            verdict = preflight(policy, batch, booked=in_use(p, s, now))
            assert verdict.in_use_tokens == math.ceil(law.used_in(p, s, law.TPM, now) - 1e-6)
            if not refused(verdict):
                continue
            refusals += 1
            wait_s = verdict.suggested_wait_s
            assert wait_s is not None
            need = batch.total if mode == "strict" else batch.smallest
            assert need + law.used_in(p, s, law.TPM, now + wait_s) <= p.budget[law.TPM] + 1e-6
            assert need + law.used_in(p, s, law.TPM, now + wait_s - 1.0) > p.budget[law.TPM]
            # Obeyed, the same question is answered with yes; and the law launches at once.
            assert not refused(preflight(policy, batch, booked=in_use(p, s, now + wait_s)))
            assert law.admit_at(p, s, of_tokens(need), law.FIRST, now + wait_s) <= now + wait_s + 1e-6
        assert refusals > 20

    @pytest.mark.parametrize("window", WINDOWS)
    def test_it_can_be_asked_at_any_moment(self, window: str) -> None:
        """The law's minute is a little longer than a minute, and rounding may leave a billionth of a token."""
        p = Policy().with_(tpm_window=window).params()
        s = law.State()
        law.launched(p, s, of_tokens(10_000.0), law.FIRST, 0.0, 0.5)
        for tenths in range(1_250):
            now = tenths / 20.0
            booked = law.used_in(p, s, law.TPM, now)
            assert in_use(p, s, now).after(0.0) == math.ceil(booked - 1e-6)
        law.launched(p, s, of_tokens(1e-9), law.FIRST, 200.0, 0.5)
        assert in_use(p, s, 200.0) == InUse()

    def test_tokens_without_a_time_would_be_free_already(self) -> None:
        for frees_in_s in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="must free in some time"):
                InUse(1_000, frees_in_s)
        assert InUse().after(0.0) == 0

    def test_an_empty_state_has_nothing_in_use(self) -> None:
        for window in WINDOWS:
            assert in_use(Policy(tpm_window=window).params(), law.State(), 5.0) == InUse()


class TestFluid:
    """Each knob alone against its closed form."""

    def test_stagger(self) -> None:
        policy = Policy(stagger_seconds=15.0, tpm_limit=10**9)
        fluid = fluid_forecast(policy, TEN_RUNS, service_s=4.0)
        assert (fluid.finish_s, fluid.bound) == (9 * 15.0 + 4.0, "stagger")

    def test_concurrency(self) -> None:
        policy = Policy(stagger_seconds=0.0, tpm_limit=10**9, max_concurrency=4)
        fluid = fluid_forecast(policy, TEN_RUNS, service_s=10.0)
        assert (fluid.finish_s, fluid.bound) == (30.0, "concurrency")  # 4 + 4 + 2 runs of 10 s

    def test_minutes_hold_whole_runs(self) -> None:
        for window, minute_s in (("fixed", law.FIXED_S), ("sliding", law.MINUTE_S)):
            policy = Policy(stagger_seconds=0.0).with_(tpm_window=window)
            assert fluid_forecast(policy, Load.uniform(3, 7_000)).finish_s == 0.0
            fluid = fluid_forecast(policy, TEN_RUNS)  # 3 per minute: 3, 3, 3, 1
            assert (fluid.finish_s, fluid.bound) == (pytest.approx(3 * minute_s), "tpm")
            # With 12,000 in use only one fits at once, and the next three when they free.
            assert fluid_forecast(policy, TEN_RUNS, booked=InUse(12_000, 25.0)).finish_s == 25.0 + 2 * minute_s

    def test_a_bucket_flows(self) -> None:
        policy = Policy(stagger_seconds=0.0, tpm_window="bucket")
        fluid = fluid_forecast(policy, TEN_RUNS)
        assert fluid.finish_s == pytest.approx((70_000 - 25_500) / 425)
        booked = InUse(5_000, 5_000 / 425, continuous=True)
        assert fluid_forecast(policy, TEN_RUNS, booked=booked).finish_s == pytest.approx((75_000 - 25_500) / 425)
        # Above the budget each waits for a full bucket, and leaves a debt behind.
        large = fluid_forecast(policy, Load.uniform(3, 28_000))
        assert large.finish_s == pytest.approx(2 * 28_000 / 425)

    def test_runs_above_the_budget_go_one_per_minute(self) -> None:
        assert fluid_forecast(Policy(stagger_seconds=0.0), Load.uniform(3, 28_000)).finish_s == 2 * law.FIXED_S

    def test_requests_and_days(self) -> None:
        policy = Policy(stagger_seconds=0.0, tpm_limit=10**9, tpm_headroom=0.0, rpm_limit=4)
        fluid = fluid_forecast(policy, TEN_RUNS)
        assert (fluid.finish_s, fluid.bound) == (2 * law.FIXED_S, "rpm")
        fluid = fluid_forecast(policy.with_(rpd_limit=6), TEN_RUNS)
        assert fluid.bound == "day"
        assert fluid.finish_s == pytest.approx(4 * 14_400.0)
        fluid = fluid_forecast(policy.with_(tpd_limit=60_000), TEN_RUNS)
        assert fluid.finish_s == pytest.approx(10_000 / 60_000 * 86_400)

    def test_nothing_holds_back_what_fits_at_once(self) -> None:
        fluid = fluid_forecast(Policy(), Load.uniform(1, 100), service_s=3.0)
        assert (fluid.finish_s, fluid.bound) == (3.0, "")
        assert fluid_forecast(Policy(stagger_seconds=0.0), Load.uniform(100, 0)).finish_s == 0.0

    def test_it_is_never_later_than_the_law_for_equal_runs_in_a_bucket(self, seed: int) -> None:
        """With service times of zero the law alone paces: its last launch is the fluid's, or later by whole tokens."""
        rng = random.Random(seed)
        for _ in range(30):
            policy = Policy(tpm_window="bucket", max_concurrency=1_000, jitter_ratio=0.0).with_(
                stagger_seconds=rng.choice([0.0, 1.0, 20.0]), rpm_limit=rng.choice([0, 3, 30])
            )
            batch = Load.uniform(rng.randint(1, 60), rng.randint(500, 9_000))
            p, s, now = policy.params(), law.State(), 0.0
            for _ in range(batch.count):
                now = law.admit_at(p, s, of_tokens(float(batch.largest)), law.FIRST, now)
                law.launched(p, s, of_tokens(float(batch.largest)), law.FIRST, now, 0.5)
            fluid_s = fluid_forecast(policy, batch).finish_s
            assert fluid_s <= now + 1e-6
            if policy.stagger_seconds == 0.0:
                assert fluid_s == pytest.approx(now, abs=1e-6)


def test_where_fewer_runs_would_not_help_shorter_ones_are_asked_for() -> None:
    one = preflight(STRICT, Load.uniform(1, 25_501))
    assert (one.ok, one.max_runs_now, "send fewer" in one.reason, "25,501" in one.reason) == (False, 0, False, True)
    many = preflight(STRICT, Load.uniform(4, 25_500))
    assert (many.ok, many.max_runs_now, "send fewer" in many.reason) == (False, 1, True)
