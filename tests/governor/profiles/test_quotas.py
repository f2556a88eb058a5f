"""Dimensions of profiles in the law: windows, weights and places, each against its closed form."""

from __future__ import annotations

from datetime import UTC, date, datetime
from zoneinfo import ZoneInfo

import pytest

from governor import law
from governor.model.errors import BadSetting
from governor.model.needs import Limited
from governor.model.policy import Policy
from governor.model.prices import Price
from governor.profiles.loader import all_profiles, read_profile
from governor.profiles.quotas import STANDARD, quota_of

PACIFIC = ZoneInfo("America/Los_Angeles")
FREE = Policy.preset("paceline").with_(max_concurrency=1_000, stagger_seconds=0.0, tpm_headroom=0.0, sync_headers=False)


def over(name: str, price: Price | None = None, now_epoch: float = 0.0, **limits: float) -> Policy:
    return FREE.with_quota(quota_of(read_profile(name), limits, price=price, now_epoch=now_epoch))


def place(policy: Policy, name: str) -> int:
    return next(each.place for each in policy.quota if each.name == name)


def test_every_shipped_profile_has_a_place_for_each_of_its_dimensions() -> None:
    for profile in all_profiles():
        found = quota_of(profile, dict.fromkeys(profile.dimensions, 1_000.0))
        assert len({each.place for each in found}) == len(found) >= len(profile.dimensions)
        assert all(STANDARD.get(each.name, each.place) == each.place for each in found)
        assert FREE.with_quota(found).params().dimensions <= law.DIMENSIONS


def test_a_wrong_name_of_a_limit_is_told_with_the_right_ones() -> None:
    with pytest.raises(BadSetting, match="profile anthropic has no dimension TPM: it has RPM, ITPM, OTPM"):
        quota_of(read_profile("anthropic"), {"TPM": 1.0})


@pytest.mark.parametrize("day", [date(2026, 1, 15), date(2026, 7, 15)])
def test_a_calendar_day_ends_at_midnight_pacific(day: date) -> None:
    """Three requests a day: the fourth goes a second after the next midnight, in winter and in summer time."""
    evening = datetime(day.year, day.month, day.day, 20, tzinfo=PACIFIC).timestamp()
    p = over("gemini", now_epoch=evening, RPD=3.0).params()
    s = law.State(zero_s=evening)
    need = FREE.weights.of(100.0, 50.0)
    for now in (0.0, 10.0, 20.0):
        assert law.admission(p, s, need, law.FIRST, now) == (now, law.NOTHING)
        law.launched(p, s, need, law.FIRST, now, 0.5)
    midnight = datetime.fromtimestamp(evening, UTC).astimezone(PACIFIC).replace(hour=23, minute=59, second=59)
    left_s = midnight.timestamp() + 1.0 - evening
    assert left_s == 4 * 3_600
    at, cause = law.admission(p, s, need, law.FIRST, 30.0)
    assert (at, cause) == (pytest.approx(left_s + law.SLACK_S, abs=0.01), law.BY_DAY)
    assert law.admission(p, s, need, law.FIRST, at) == (at, law.NOTHING)


def test_what_is_sent_just_before_midnight_may_count_on_either_day() -> None:
    p = over("gemini", RPD=3.0).params()
    s = law.State()
    day_s, need = 86_400.0 + 8 * 3_600.0, FREE.weights.of(100.0, 50.0)  # midnight in winter is 8 o'clock UTC
    for now in (day_s - 100.0, day_s - 0.5, day_s + 0.5):
        assert law.admit_at(p, s, need, law.FIRST, now) == now
        law.launched(p, s, need, law.FIRST, now, 0.5)
    at = law.admit_at(p, s, need, law.FIRST, day_s + 0.6)
    assert at == pytest.approx(day_s + law.SLACK_S, abs=0.01)
    law.launched(p, s, need, law.FIRST, at, 0.5)
    # Two of the old day's may have counted on the new one: with the third, it is full.
    assert law.admit_at(p, s, need, law.FIRST, at) == pytest.approx(day_s + 86_400.0 + law.SLACK_S, abs=0.01)


def test_a_limit_of_money_per_ten_minutes() -> None:
    """A request of 100,000 input tokens at $10 a million costs $1: after ten, the next waits."""
    policy = over("gemini", price=Price(date.min, 10.0, 2.5, 40.0), SPEND=10.0)
    p, s = policy.params(), law.State()
    need = policy.weights.of(100_000.0, 100_000.0)
    assert need[place(policy, "SPEND")] == pytest.approx(1.0)
    for _ in range(10):
        assert law.admit_at(p, s, need, law.FIRST, 2.0) == 2.0
        law.launched(p, s, need, law.FIRST, 2.0, 0.5)
    # Cells of 5 s, of which 123 count: a booking counts for 610 to 615 s.
    assert law.admit_at(p, s, need, law.FIRST, 3.0) == 615.0
    # Output costs four times as much.
    assert policy.weights.of(200_000.0, 100_000.0)[place(policy, "SPEND")] == pytest.approx(5.0)


def test_output_burns_five_times_as_much() -> None:
    """60,000 tokens a minute refill 1,000 a second: 500 of input and 100 of output take 500 + 5 x 100 = 1 s."""
    policy = over("bedrock", TPM=60_000.0)
    p, s = policy.params(), law.State()
    need = policy.weights.of(600.0, 500.0)
    assert need[law.TPM] == 500.0 + 5.0 * 100.0
    for _ in range(60):
        assert law.admit_at(p, s, need, law.FIRST, 0.0) == 0.0
        law.launched(p, s, need, law.FIRST, 0.0, 0.5)
    assert law.admit_at(p, s, need, law.FIRST, 0.0) == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "dimension"), [("anthropic", "ITPM"), ("groq", "TPM"), ("bedrock", "TPM")])
def test_input_read_from_a_cache_is_exempt(name: str, dimension: str) -> None:
    """Of 6,000 input tokens 5,000 came from the cache: once that is known, 1,000 are in use."""
    policy = over(name, **{dimension: 10_000.0})
    d = place(policy, dimension)
    used = policy.weights.used(6_000.0, 0.0, 5_000.0, 0.0)
    assert used[d] == 1_000.0
    p, s = policy.params(), law.State()
    p.settles[d] = 1.0
    need = policy.weights.of(6_000.0, 6_000.0)
    law.launched(p, s, need, law.FIRST, 0.0, 0.5)
    assert law.used_in(p, s, d, 0.0) == pytest.approx(6_000.0)
    law.settled(p, s, need, used, 0.0, 0.0)
    assert law.used_in(p, s, d, 0.0) == pytest.approx(1_000.0)


def test_cached_input_counts_where_the_profile_says_so() -> None:
    policy = over("openai", TPM=10_000.0)
    assert policy.weights.used(6_000.0, 100.0, 5_000.0, 0.0)[law.TPM] == 6_100.0


def test_requests_per_slice_have_a_dimension_of_their_own() -> None:
    """180 requests a minute are 30 per 10 s: the 31st waits a third of a second."""
    policy = over("azure-openai", TPM=1e6, RPM=180.0)
    sliced = next(each for each in policy.quota if each.name == "RPM_SLICE")
    assert (sliced.limit, sliced.length_s, sliced.window) == (30.0, 10.0, law.BUCKET)
    p, s, need = policy.params(), law.State(), policy.weights.of(10.0, 10.0)
    for _ in range(30):
        law.launched(p, s, need, law.FIRST, 1.0, 0.5)
    assert law.admit_at(p, s, need, law.FIRST, 1.0) == pytest.approx(1.0 + 1.0 / 3.0)


def test_knobs_hold_where_the_profile_has_their_dimension() -> None:
    quota = quota_of(read_profile("anthropic"), {"RPM": 50.0, "ITPM": 30_000.0, "OTPM": 8_000.0})
    p = Policy(tpm_headroom=0.1, rpm_limit=20, tpm_limit=999).with_quota(quota).params()
    by_name = {each.name: p.limit[each.place] for each in quota}
    assert by_name == {"RPM": 20.0, "ITPM": 30_000.0, "OTPM": 8_000.0}
    assert p.limit[law.TPM] == 0.0
    assert p.budget[law.RPM] == 18.0
    assert Policy(tpm_headroom=0.1).with_quota(quota).with_(rpm_limit=20).params().limit == p.limit


def test_a_policy_without_a_profile_is_the_guardrails_alone() -> None:
    assert Policy().with_quota(()) == Policy()
    quota = (Limited("TPM", law.TPM, 30_000.0, 60.0, law.FIXED, per_input=1.0, per_output=1.0),)
    p, q = Policy(tpm_limit=30_000).params(), Policy(tpm_limit=30_000).with_quota(quota).params()
    assert (q.limit, q.budget, q.window[0], q.dimensions) == (p.limit, p.budget, p.window[0], 1)
