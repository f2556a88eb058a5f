"""Faults files: what they may say, what is said of a mistake, and which attempts an event strikes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from governor.model.errors import BadInput, BadSetting
from sim.model.faults import AFTER_ADMISSION, AT_THE_DOOR, EVENT, EVENTS_MAX, Event, Faults, FaultState, read_faults
from sim.model.provider_config import ProviderConfig

EXAMPLE = """
provider:
  limit_changes: [{at_s: 120, factor: 0.5}]
  cotenant: {share: 0.25, burst_s: 15, period_s: 60}
  quota_requests: 40
events:
  - {kind: server_error, at_s: 30, for_s: 5, status: 503}
  - {kind: stall, ratio: 0.02, stall_s: 30}
  - {kind: throttled, attempts: 2}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "faults.yaml"
    path.write_text(text)
    return path


def test_reads_provider_and_events(tmp_path: Path) -> None:
    faults = read_faults(written(tmp_path, EXAMPLE))
    assert [event.kind for event in faults.events] == ["server_error", "stall", "throttled"]
    assert (faults.events[0].status, faults.events[1].stall_s, faults.events[2].attempts) == (503, 30.0, 2)
    config = faults.applied(ProviderConfig.of("gpt-4o-tier2"))
    assert (config.quota_requests, config.cotenant.share, config.limit_changes[0].factor) == (40, 0.25, 0.5)
    assert (config.tpm, config.rpm) == (450_000, 5_000), "what the file does not name stays"


def test_an_empty_mapping_is_no_trouble(tmp_path: Path) -> None:
    assert read_faults(written(tmp_path, "{}")) == Faults()


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("", BadInput, "empty"),
        ("- kind: drop", BadInput, "a list"),
        ("events: [", BadInput, ":1:"),
        ("events: 5", BadSetting, "events=5"),
        ("events: [{kind: flood}]", BadSetting, "events.0.kind='flood'"),
        ("events: [{kind: drop, ration: 0.5}]", BadSetting, "did you mean ratio?"),
        ("events: [{kind: drop, ratio: 1.5}]", BadSetting, "events.0.ratio=1.5: must be at most 1"),
        ("events: [{kind: drop, stall_s: 5}]", BadSetting, "stall_s belongs to stall, not to drop"),
        ("events: [{kind: server_error, status: 429}]", BadSetting, "status=429"),
        ("events: [{kind: quota, code: broke}]", BadSetting, "insufficient_quota"),
        ("provider: {tmp: 5}", BadSetting, "did you mean tpm?"),
        ("provider: {limit_changes: [{at_s: 5, factor: 0}]}", BadSetting, "factor=0"),
        ("provider: {tpm: 1}\nprovider: {tpm: 2}", BadInput, "twice"),
        (f"events: [{', '.join(['{kind: drop}'] * 25)}]", BadSetting, "at most 24"),
    ],
)
def test_complaints_name_file_place_and_value(tmp_path: Path, text: str, kind: type[Exception], words: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(kind) as caught:
        read_faults(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert words in message
    assert "\n" not in message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_faults(tmp_path / "none.yaml")


# ---------------------------------------------------------------- who is struck


def struck(trouble: FaultState, attempts: list[tuple[float, int, int]], door: bool = True) -> list[bool]:
    """Whether each (now, request, arrivals) is struck; requests are counted as they come."""
    found = []
    for seen, (now, request, arrivals) in enumerate(attempts, 1):
        found.append(trouble.strikes(door, now, request, arrivals, arrivals, seen) is not None)
    return found


def event(**fields: Any) -> Event:
    return Event(**{"kind": "throttled", **fields})


def test_a_span_of_time_is_half_open() -> None:
    trouble = FaultState([event(at_s=10.0, for_s=5.0)], 0)
    times = [0.0, 9.999, 10.0, 14.999, 15.0, 99.0]
    assert struck(trouble, [(now, i, 1) for i, now in enumerate(times)]) == [False, False, True, True, False, False]


def test_times_attempts_and_the_count_of_requests() -> None:
    many = [(0.0, i, 1) for i in range(6)]
    assert struck(FaultState([event(times=2)], 0), many) == [True] * 2 + [False] * 4
    assert struck(FaultState([event(after_requests=4)], 0), many) == [False] * 4 + [True] * 2
    again = [(0.0, 7, arrivals) for arrivals in range(1, 6)]
    assert struck(FaultState([event(attempts=3)], 0), again) == [True] * 3 + [False] * 2


def test_the_ratio_is_a_keyed_chance(seed: int) -> None:
    count, ratio = 5_000, 0.2
    attempts = [(0.0, i, 1) for i in range(count)]
    found = struck(FaultState([event(ratio=ratio)], seed), attempts)
    assert abs(sum(found) - count * ratio) < 5 * math.sqrt(count * ratio * (1 - ratio)), seed
    backwards = struck(FaultState([event(ratio=ratio)], seed), attempts[::-1])
    assert found == backwards[::-1], "the order of arrival changes nothing"
    both = FaultState([event(ratio=ratio, kind="drop"), event(ratio=ratio, kind="stall")], seed)
    first = [both.strikes(False, 0.0, i, 1, 1, 1) for i in range(count)]
    share = sum(e is not None and e.kind == "stall" for e in first) / count
    # Events draw independently: the second is met where the first is not.
    assert share == pytest.approx((1 - ratio) * ratio, abs=5 * math.sqrt(0.16 * 0.84 / count)), seed


def test_the_first_that_strikes_counts_and_doors_are_apart() -> None:
    trouble = FaultState([event(kind="drop"), event(kind="quota", times=1), event(kind="throttled")], 0)
    door = [trouble.strikes(True, 0.0, i, 1, 1, i + 1) for i in range(3)]
    assert [e.kind if e else "" for e in door] == ["quota", "throttled", "throttled"]
    inside = trouble.strikes(False, 0.0, 0, 1, 1, 1)
    assert inside is not None
    assert inside.kind == "drop"
    assert trouble.struck == [1, 1, 2]


def test_every_kind_is_on_one_side_of_the_door_and_every_purpose_fits() -> None:
    kinds = Event.model_fields["kind"].annotation.__args__
    assert sorted(AT_THE_DOOR + AFTER_ADMISSION) == sorted(kinds)
    # Purposes share a number with the attempt: attempt * 64 + purpose.
    assert EVENT + EVENTS_MAX <= 64
