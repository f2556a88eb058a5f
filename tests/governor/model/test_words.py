"""What people write: times of day with their zone, and settings by their short names."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import typer

from governor.model.errors import BadSetting
from governor.model.policy import Policy
from governor.model.words import until_s
from sim.app.options import finish_by_s

NOW = datetime(2026, 11, 30, 5, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "hours"),
    [
        ("06:00Z", 1.0),
        ("06:00 UTC", 1.0),
        ("6:30+02:00", 23.5),
        ("07:30-0100", 3.5),
        ("07:00 Europe/Berlin", 1.0),
        ("04:59Z", 24.0 - 1.0 / 60.0),
        ("90m", 1.5),
    ],
)
def test_a_time_of_day_may_state_its_zone(text: str, hours: float) -> None:
    assert until_s(text, "--finish-by", NOW) == pytest.approx(3_600.0 * hours)
    assert finish_by_s(text, NOW) == pytest.approx(3_600.0 * hours)


def test_the_night_in_which_clocks_change_has_its_own_length() -> None:
    # On 2027-03-28 Berlin goes from 02:00 to 03:00.
    evening = datetime(2027, 3, 27, 22, 0, tzinfo=UTC)
    assert until_s("06:00 Europe/Berlin", "--finish-by", evening) == 6 * 3_600.0


@pytest.mark.parametrize("text", ["06:00 Mars/Olympus", "06:00+99:00", "25:00", "06:60Z", "soon", "06:00 ../x"])
def test_what_is_no_time_is_one_line(text: str) -> None:
    with pytest.raises(BadSetting, match="--finish-by") as refused:
        until_s(text, "--finish-by", NOW)
    assert "\n" not in str(refused.value)
    with pytest.raises(typer.BadParameter):
        finish_by_s(text, NOW)


def test_a_setting_goes_by_its_short_name_on_the_command_line() -> None:
    assert Policy().set_values(["stagger_s=5", "max_concurrency=7"]) == Policy(stagger_seconds=5.0, max_concurrency=7)
