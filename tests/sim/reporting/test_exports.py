"""What a run leaves for other tools reads back as it was, and a trace is one that viewers accept."""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow.parquet
import pytest

from governor.model.errors import BadInput
from governor.model.requests import Attempt
from sim.experiment.results import Plan
from sim.reporting import exports, series
from sim.scenario.scenario import Scenario


@pytest.fixture
def rows(reckless_plan: Plan) -> Sequence[Attempt]:
    """A run with retries and lost requests."""
    return reckless_plan.timelines["now"]


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return found


# ---------------------------------------------------------------- tables


def test_csv_reads_back_exactly(rows: Sequence[Attempt], tmp_path: Path) -> None:
    exports.write_attempts(tmp_path / "a.csv", rows)
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as stream:
        header, *lines = csv.reader(stream)
    assert tuple(header) == Attempt.columns()
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        for text, value in zip(line, row.row(), strict=True):
            assert type(value)(text) == value


def test_parquet_reads_back_exactly_with_types(
    rows: Sequence[Attempt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several row groups, the last one not full.
    monkeypatch.setattr(exports, "GROUP_ROWS", 100)
    exports.write_attempts(tmp_path / "a.parquet", rows)
    stored = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert tuple(stored.column_names) == Attempt.columns()
    assert [tuple(line.values()) for line in stored.to_pylist()] == [row.row() for row in rows]
    assert str(stored.schema.field("launched_s").type) == "double"
    assert str(stored.schema.field("reserved_tokens").type) == "int64"
    assert str(stored.schema.field("outcome").type) == "string"
    assert pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == -(-len(rows) // 100)


def test_both_tables_are_one_for_pandas(rows: Sequence[Attempt], tmp_path: Path) -> None:
    for name in ("a.csv", "a.PARQUET"):
        exports.write_attempts(tmp_path / name, rows)
    flat = pandas.read_csv(tmp_path / "a.csv", keep_default_na=False)
    stored = pandas.read_parquet(tmp_path / "a.PARQUET")
    assert (flat.to_numpy() == stored.to_numpy()).all()


def test_tables_without_rows_have_their_columns(tmp_path: Path) -> None:
    for name in ("a.csv", "a.parquet"):
        exports.write_attempts(tmp_path / name, [])
    assert (tmp_path / "a.csv").read_text().strip().split(",") == list(Attempt.columns())
    assert pyarrow.parquet.read_table(tmp_path / "a.parquet").num_rows == 0


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.json", "a.png"])
def test_a_run_that_fails_leaves_no_file(
    sample_scenario: Scenario, rows: Sequence[Attempt], tmp_path: Path, name: str
) -> None:
    def failing() -> Sequence[Attempt]:
        raise RuntimeError("the run")

    class Broken(list[Attempt]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            yield rows[0]
            failing()

    write = {
        ".csv": exports.write_attempts,
        ".parquet": exports.write_attempts,
        ".json": exports.write_chrome_trace,
        ".png": lambda path, attempts: exports.write_timeline(path, attempts, sample_scenario.grant()),
    }[Path(name).suffix]
    with pytest.raises(RuntimeError, match="the run"):
        write(tmp_path / name, Broken(rows))  # type: ignore[operator]
    assert not list(tmp_path.iterdir())


def test_a_name_says_what_is_written(rows: Sequence[Attempt], sample_scenario: Scenario, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"a\.xlsx: .*\.csv or \.parquet"):
        exports.write_attempts(tmp_path / "a.xlsx", rows)
    with pytest.raises(BadInput, match=r"a\.svg: .*\.png"):
        exports.write_timeline(tmp_path / "a.svg", rows, sample_scenario.grant())
    with pytest.raises(BadInput, match="there is no folder"):
        exports.write_chrome_trace(tmp_path / "none" / "a.json", rows)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the trace


def test_a_trace_has_one_slice_per_attempt_and_as_many_lanes_as_were_in_flight(
    rows: Sequence[Attempt], tmp_path: Path
) -> None:
    exports.write_chrome_trace(tmp_path / "a.json", rows)
    slices = [e for e in events(tmp_path / "a.json") if e["ph"] == "X" and e["cat"] == "attempt"]
    assert len(slices) == len(rows)
    assert len({e["tid"] for e in slices}) == series.in_flight(rows)[1].max()
    seconds = sum(e["dur"] for e in slices) / 1e6
    assert seconds == pytest.approx(sum(a.finished_s - a.launched_s for a in rows), abs=1e-6 * len(rows))
    assert Counter(e["name"].split()[0] for e in slices) == Counter(str(a.outcome) for a in rows)
    named = {(e["args"]["custom_id"], e["args"]["attempt"]) for e in slices}
    assert named == {(a.custom_id, a.attempt) for a in rows}


def test_slices_of_a_lane_never_overlap(rows: Sequence[Attempt], tmp_path: Path) -> None:
    """Viewers nest or drop slices that cross."""
    exports.write_chrome_trace(tmp_path / "a.json", rows)
    lanes = defaultdict(list)
    for e in events(tmp_path / "a.json"):
        if e["ph"] == "X":
            assert isinstance(e["ts"], int)
            assert e["dur"] >= 0
            lanes[e["pid"], e["tid"]].append((e["ts"], e["ts"] + e["dur"]))
    for spans in lanes.values():
        assert all(before[1] <= after[0] for before, after in pairwise(sorted(spans)))


def test_waits_have_a_lane_per_cause(sample_plan: Plan, tmp_path: Path) -> None:
    rows = sample_plan.timelines["now"]
    exports.write_chrome_trace(tmp_path / "a.json", rows)
    found = events(tmp_path / "a.json")
    waits = [e for e in found if e["ph"] == "X" and e["cat"] == "wait"]
    lanes = {(e["pid"], e["tid"]): e["name"] for e in waits}
    assert len(set(lanes.values())) == len(lanes) == 2
    assert len({e["cname"] for e in waits}) == 2
    # The last launch of a batch has stood in line from the beginning: its waits are all that the head waited.
    last = max(rows, key=lambda a: a.launched_s)
    for cause in ("stagger", "tpm"):
        seconds = sum(e["dur"] for e in waits if e["name"] == cause) / 1e6
        assert seconds == pytest.approx(getattr(last, f"waited_{cause}_s"), abs=1e-6 * len(waits))
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in found if e["name"] == "thread_name"}
    assert all(threads[lane] == cause for lane, cause in lanes.items())
    assert {e["pid"] for e in found if e["name"] == "process_name"} == {e["pid"] for e in found}


def test_counters_follow_the_run(rows: Sequence[Attempt], tmp_path: Path) -> None:
    exports.write_chrome_trace(tmp_path / "a.json", rows)
    counts = defaultdict(list)
    for e in events(tmp_path / "a.json"):
        if e["ph"] == "C":
            counts[e["name"]].append((e["ts"], *e["args"].values()))
    flying, charged = counts["in flight"], counts["charged in the last minute"]
    assert max(value for _, value in flying) == series.in_flight(rows)[1].max()
    assert max(value for _, value in charged) == series.charged_per_minute(rows)[1].max()
    assert flying[-1][1] == charged[-1][1] == 0
    assert [ts for ts, _ in flying] == sorted(ts for ts, _ in flying)


def test_a_trace_of_nothing_is_still_one(tmp_path: Path) -> None:
    exports.write_chrome_trace(tmp_path / "a.json", [])
    assert {e["ph"] for e in events(tmp_path / "a.json")} == {"M"}


# ---------------------------------------------------------------- the picture


def test_the_timeline_is_a_picture_and_the_same_one_each_time(
    rows: Sequence[Attempt], sample_scenario: Scenario, tmp_path: Path
) -> None:
    from matplotlib import image

    for name in ("a.png", "b.png"):
        exports.write_timeline(tmp_path / name, rows, sample_scenario.grant(), title="a run")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = image.imread(tmp_path / "a.png")
    assert min(pixels.shape[:2]) > 1_000
    # Not a white page: curves, marks and text take their part.
    assert 0.05 < np.mean(pixels[:, :, :3].min(axis=2) < 0.9) < 0.7
