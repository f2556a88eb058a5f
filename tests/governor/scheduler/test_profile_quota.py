"""A governor over the dimensions of a profile: input and output apart, counts by name, real use, refusals in words."""

from __future__ import annotations

import pytest

from governor import law
from governor.model.errors import PacelineError
from governor.model.policy import Policy
from governor.model.requests import Limit
from governor.profiles.loader import read_profile
from governor.profiles.quotas import quota_of
from governor.scheduler.driver import Governor
from tests.virtual_loop import run_virtual

LIMITS = {"RPM": 1_000.0, "ITPM": 60_000.0, "OTPM": 6_000.0}
QUOTA = quota_of(read_profile("anthropic"), LIMITS)
PLACE = {each.name: each.place for each in QUOTA}
POLICY = (
    Policy.preset("paceline")
    .with_(max_concurrency=1_000, stagger_seconds=0.0, tpm_headroom=0.0, sync_headers=False)
    .with_quota(QUOTA)
)


async def launched(governor: Governor, count: int, reserve: float, prompt: float) -> list[float]:
    times = []
    for _ in range(count):
        async with governor.permit(reserve, prompt=prompt) as permit:
            times.append(permit.launched_s)
    return times


def test_output_binds_although_input_has_room() -> None:
    """6,000 output tokens a minute refill 100 a second: six requests of 1,000 at once, then one every 10 s."""

    async def main() -> list[float]:
        return await launched(Governor(POLICY), 9, 1_500.0, 500.0)

    assert run_virtual(main()) == pytest.approx([0.0] * 6 + [10.0, 20.0, 30.0])


def test_real_use_is_booked_where_the_profile_settles() -> None:
    async def main() -> list[float]:
        governor = Governor(POLICY)
        async with governor.permit(7_000.0, prompt=1_000.0) as permit:
            permit.used(1_100.0)  # 100 of output
        return [law.used_in(governor.p, governor.s, PLACE[name], governor.now()) for name in LIMITS]

    assert run_virtual(main()) == pytest.approx([1.0, 1_000.0, 100.0])


def test_a_count_reaches_the_dimension_of_its_name() -> None:
    async def main() -> tuple[float, float]:
        governor = Governor(POLICY.with_(sync_headers=True))
        for _ in range(2):
            async with governor.permit(1_100.0, prompt=1_000.0) as permit:
                permit.stated((Limit("ITPM", 50_000.0, 49_000.0), Limit("TPM", 1.0, 0.0)))
        return governor.s.granted[PLACE["ITPM"]], governor.s.stated[PLACE["OTPM"]]

    assert run_virtual(main()) == (50_000.0, 0.0)


def test_what_never_fits_is_refused_with_the_dimension() -> None:
    async def main() -> None:
        with pytest.raises(PacelineError, match="is limited in OTPM, of which it takes 6,500, to 6,000"):
            Governor(POLICY).permit(7_500.0, prompt=1_000.0)

    run_virtual(main())


def test_a_clock_of_a_profile_is_the_time_of_day() -> None:
    async def main() -> tuple[float, float]:
        daily = POLICY.with_quota(quota_of(read_profile("gemini"), {"RPD": 5.0}))
        governor = Governor(daily)
        return governor.s.zero_s, governor.zero_epoch

    zero_s, zero_epoch = run_virtual(main())
    assert zero_s == zero_epoch > 1.7e9
