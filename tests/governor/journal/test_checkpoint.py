"""What was used outlives its process: checkpoints read by name, dated by clocks that survive, written with the rest."""

from __future__ import annotations

import json
import math
import random
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from governor import law
from governor.journal import checkpoint, schema
from governor.journal.checkpoint import Checkpoint, Moment, read_back, taken_from
from governor.journal.facts import deadline_of, tiers_of
from governor.journal.journal import Journal
from governor.journal.schema import TIER_COLUMNS
from governor.law import State
from governor.model.needs import of_tokens
from governor.model.policy import Policy
from tests.governor.journals import answer, attempt, created, ends, job, pool_of, work

HOUR_S = 3_600.0
POLICY = Policy(
    stagger_seconds=15.0,
    tpm_window="sliding",
    tpm_headroom=0.0,
    rpm_limit=100,
    tpd_limit=10**6,
    rpd_limit=1_000,
    max_concurrency=3,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


class Clocks:
    """The machine's clocks, to be set at will. The boot clock goes with `passes`, the wall clock is also `set`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.epoch_s, self.boot, self.boot_s = 1_700_000_000.0, "boot-1", 5_000.0
        monkeypatch.setattr(checkpoint, "this_moment", lambda: Moment(self.epoch_s, self.boot, self.boot_s))
        monkeypatch.setattr(time, "time", lambda: self.epoch_s)

    def passes(self, seconds: float) -> None:
        self.epoch_s += seconds
        self.boot_s += seconds

    def restarts(self) -> None:
        self.boot, self.boot_s = self.boot + "'", 20.0


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


def used(s: State, now: float) -> list[float]:
    """Of the minute and the day, in tokens and requests."""
    return [law.used_in(POLICY.params(), s, d, now) for d in (law.TPM, law.RPM, law.TPD, law.RPD)]


# ---------------------------------------------------------------- by name


def test_a_state_comes_back_in_every_number(seed: int) -> None:
    r = random.Random(seed)
    state, params = State(), POLICY.params()
    for name in State.__slots__:
        value = getattr(state, name)
        if isinstance(value, list):
            value[:] = [r.choice([0.0, r.uniform(-1e9, 1e9), -math.inf, math.inf, 0.1]) for _ in value]
        else:
            setattr(state, name, type(value)(r.choice([3, 7])))
    taken = taken_from(params, state, 12.5)
    found = read_back(taken.text(), 12.5, taken.moment)
    assert (found.params, found.state, found.unlike) == (params, state, ())
    assert read_back(taken_from(params, State(), 0.0).text(), 0.0, taken.moment).state == State()
    # It is a copy: what the governor does afterwards does not show.
    state.full_at[0] = 1.0
    assert taken.state.full_at[0] != 1.0


def test_another_version_s_state_is_taken_over_by_name() -> None:
    state = State(next_slot_at=77.0)
    state.full_at[law.TPD] = 4_000.0
    stored = json.loads(taken_from(POLICY.params(), state, 9.0).text())
    del stored["state"]["hold_until"], stored["params"]["stagger_s"]
    stored["state"] |= {"half_open": 1, "cells": [1.0, 2.0], "in_flight": "three"}
    found = read_back(json.dumps(stored), 9.0, Moment(0.0, "", 0.0))
    assert sorted(found.unlike) == ["cells", "half_open", "hold_until", "in_flight", "stagger_s"]
    assert (found.state.next_slot_at, found.state.full_at[law.TPD]) == (77.0, 4_000.0)
    assert (found.state.hold_until, found.state.cells, found.state.in_flight) == (-math.inf, State().cells, 0)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"params": {}, "state": []}', "nonsense"])
def test_what_is_no_checkpoint_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"Expecting value|without"):
        read_back(text, 0.0, Moment(0.0, "", 0.0))


@pytest.mark.parametrize("window", ["fixed", "sliding", "bucket"])
def test_a_new_leg_inherits_what_was_used_and_nothing_else(window: Any) -> None:
    policy = Policy(stagger_seconds=15.0, tpm_window=window, tpd_limit=10**6, max_concurrency=2)
    p, s = policy.params(), State()
    law.launched(p, s, of_tokens(20_000.0), law.FIRST, 100.0, 0.5)
    law.launched(p, s, of_tokens(5_000.0), law.RETRY, 101.0, 0.5)
    law.finalize_opened(p, s)
    law.paused(p, s)
    before = [law.used_in(p, s, d, 110.0) for d in (law.TPM, law.TPD)]
    for settings in (policy, policy.with_(tpm_limit=40_000)):
        params = settings.params()
        found = Checkpoint(p, s, 105.0, Moment(0.0, "", 0.0)).carried_over(params, 110.0)
        assert (found.in_flight, found.finalize_open, found.alone, found.paused) == (0, 0, 0, 0)
        assert [law.used_in(params, found, d, 110.0) for d in (law.TPM, law.TPD)] == pytest.approx(before, rel=1e-12)
        assert found.next_slot_at == 115.0
    assert s.paused == 1


# ---------------------------------------------------------------- by which clock


@pytest.mark.parametrize(
    ("later", "elapsed_s"),
    [
        (Moment(1_010.0, "a", 60.0), 10.0),
        (Moment(1_010.0 - HOUR_S, "a", 60.0), 10.0),  # the wall clock was set back
        (Moment(1_010.0 + HOUR_S, "a", 60.0), 10.0),  # or forward
        (Moment(1_300.0, "b", 5.0), 300.0),  # after a reboot the wall clock counts
        (Moment(1_000.0 - HOUR_S, "b", 5.0), 0.0),  # but never backwards
        (Moment(1_300.0, "", 0.0), 300.0),
        (Moment(1_300.0, "a", 40.0), 300.0),  # a boot clock that ran backwards is none
    ],
)
def test_time_that_has_passed(later: Moment, elapsed_s: float) -> None:
    assert Moment(1_000.0, "a", 50.0).elapsed_s(later) == elapsed_s


def test_this_machine_has_such_clocks() -> None:
    before = checkpoint.this_moment()
    after = checkpoint.this_moment()
    assert abs(before.epoch_s - time.time()) < 5.0
    assert before.boot == after.boot
    assert 0.0 <= before.elapsed_s(after) < 5.0


def a_leg(journal: Journal, at_s: float) -> None:
    """A leg that launches one request of 20,000 tokens 10 s after its beginning, and dies."""
    recorder = journal.begin({"default": POLICY}, at_s).recorders["default"]
    pool = pool_of(POLICY, at_s + 10.0)
    pool.s = recorder.state or State()
    recorder.began(pool)
    law.launched(pool.p, pool.s, of_tokens(20_000.0), law.FIRST, pool.at_s, 0.5)
    recorder.launched(job(work(0), launched_s=pool.at_s), pool.at_s)
    journal._running().commit()


@pytest.mark.parametrize("set_s", [0.0, -HOUR_S, HOUR_S])
def test_a_wall_clock_that_is_set_between_two_legs_changes_nothing(path: Path, clocks: Clocks, set_s: float) -> None:
    with created(path, 1) as journal:
        assert journal.now_s() == 0.0
        a_leg(journal, 0.0)
    clocks.passes(20.0)
    clocks.epoch_s += set_s
    with Journal.open(path, to_run=True) as journal:
        assert journal.now_s() == 30.0
        assert journal.now_s(scale=5.0) == 110.0
        state = journal.begin({"default": POLICY}, 30.0).recorders["default"].state
        assert state is not None
        assert used(state, 30.0) == pytest.approx([20_000.0, 1.0, 20_000.0 - 20.0 * 1e6 / 86_400, 1.0 - 20 / 86.4])
        # 10 s after the launch began the next slot; its minute ends 61 s after it, plus a cell.
        assert law.admission(POLICY.params(), state, of_tokens(1.0), law.FIRST, 30.0)[0] == pytest.approx(30.0, abs=4.0)
        assert law.admission(POLICY.params(), state, of_tokens(15_000.0), law.FIRST, 30.0)[0] == 10.0 + law.SLIDING_S


@pytest.mark.parametrize(("set_s", "at_s"), [(0.0, 310.0), (-HOUR_S, 10.0), (HOUR_S, 3_910.0)])
def test_after_a_reboot_the_wall_clock_is_assumed_right_and_never_runs_backwards(
    path: Path, clocks: Clocks, set_s: float, at_s: float
) -> None:
    with created(path, 1) as journal:
        a_leg(journal, 0.0)
    clocks.passes(300.0)
    clocks.restarts()
    clocks.epoch_s += set_s
    with Journal.open(path, to_run=True) as journal:
        assert journal.now_s() == at_s
        state = journal.begin({"default": POLICY}, at_s).recorders["default"].state
        assert state is not None
        # Never in the future: at the latest a minute from now there is room.
        at, _ = law.admission(POLICY.params(), state, of_tokens(25_000.0), law.FIRST, at_s)
        assert at <= at_s + law.SLIDING_S


# ---------------------------------------------------------------- in the journal


def test_a_kill_right_after_the_beginning_of_a_leg_forgets_nothing(path: Path, clocks: Clocks) -> None:
    with created(path, 1) as journal:
        a_leg(journal, 0.0)
    for at_s in (12.0, 13.0, 14.0):
        with Journal.open(path, to_run=True) as journal:
            state = journal.begin({"default": POLICY}, at_s).recorders["default"].state
            assert state is not None
            assert used(state, at_s)[:2] == [20_000.0, 1.0]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT leg FROM checkpoints").fetchall() == [(4,)]


def test_each_pool_has_its_own(path: Path, clocks: Clocks) -> None:
    with created(path, 1) as journal:
        recorders = journal.begin({"a": POLICY, "b": POLICY}, 0.0).recorders
        for name, tokens in (("a", 1_000.0), ("b", 2_000.0)):
            pool = pool_of(POLICY, 5.0)
            recorders[name].began(pool)
            law.launched(pool.p, pool.s, of_tokens(tokens), law.FIRST, 5.0, 0.5)
            recorders[name].launched(job(work(0), launched_s=5.0), 5.0)
        journal.finish(6.0, "stopped")
        again = journal.begin({"a": POLICY, "b": POLICY}, 7.0)
        assert again.notes == ()
        for name, tokens in (("a", 1_000.0), ("b", 2_000.0)):
            state = again.recorders[name].state
            assert state is not None
            assert used(state, 7.0)[0] == tokens


def with_attempts(path: Path) -> None:
    """A journal with one answered request (its answer used 17 tokens) and one in flight, both launched at 10 s."""
    with created(path, 2) as journal:
        recorder = journal.begin({"default": POLICY}, 0.0).recorders["default"]
        for index in (0, 1):
            recorder.launched(job(work(index), launched_s=10.0), 10.0)
        ends(recorder, job(work(0), launched_s=10.0), answer(0), 12.0)
        journal._running().commit()


def made_by_an_older_one(path: Path) -> None:
    """As the version before checkpoints left it: schema 2 lacked these tables and columns."""
    with closing(sqlite3.connect(path)) as connection:
        for table in ("checkpoints", "timers", "deadlines"):
            connection.execute(f"DROP TABLE {table}")
        for column in TIER_COLUMNS:
            connection.execute(f"ALTER TABLE attempts DROP COLUMN {column}")
        connection.execute("UPDATE run SET schema = 2, version = '1.0'")
        connection.commit()


def test_the_same_words_mean_the_same_deadline_after_a_resume(path: Path) -> None:
    with created(path, 1) as journal:
        assert deadline_of(journal, "6h", 21_600.0) == 21_600.0
    with Journal.open(path, to_run=True) as journal:
        assert deadline_of(journal, "6h", 30_000.0) == 21_600.0
        assert deadline_of(journal, "2h", 7_300.0) == 7_300.0, "other words count from now"
        assert deadline_of(journal, "2h", 9_000.0) == 7_300.0


def test_an_older_journal_can_be_read_and_goes_on(path: Path) -> None:
    with_attempts(path)
    made_by_an_older_one(path)
    with Journal.open(path) as journal:
        assert (journal.run().schema, journal.counts().in_flight) == (2, 1)
        assert (journal.lateness("default"), journal.checkpoint("default")) == ([], None)
        assert len(list(journal.results())) == 1
        assert (len(list(journal.attempts())), tiers_of(journal)) == (1, {})
        assert [billed.usage.tier for billed in journal.billed()] == [""]
    with Journal.open(path, to_run=True) as journal:
        assert (tiers_of(journal), next(journal.billed()).usage.written) == ({"": 1}, 0)
        begun = journal.begin({"default": POLICY}, 20.0)
        assert begun.resent == 1
        assert begun.notes == (
            "it was written by an older Paceline: what was used is counted from the attempts on record, holds are "
            "forgotten",
        )
        state = begun.recorders["default"].state
        assert state is not None
        # What was reserved for the one that was answered and for the one in flight.
        assert used(state, 20.0)[:2] == [501.0 + 501.0, 2.0]
        assert (state.in_flight, state.next_slot_at) == (0, 25.0)
        assert journal.run().schema == schema.SCHEMA
    with Journal.open(path, to_run=True) as journal:
        assert journal.begin({"default": POLICY}, 21.0).notes == ()


def test_a_checkpoint_that_cannot_be_read_is_counted_anew_and_said(path: Path) -> None:
    with_attempts(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE checkpoints SET state = 'x'")
        connection.commit()
    with Journal.open(path, to_run=True) as journal:
        begun = journal.begin({"default": POLICY}, 20.0)
        assert len(begun.notes) == 1
        assert begun.notes[0].startswith("its checkpoint cannot be read: what was used is counted from the attempts")
        state = begun.recorders["default"].state
        assert state is not None
        assert used(state, 20.0)[:2] == [1_002.0, 2.0]


def test_fields_of_another_version_are_said(path: Path) -> None:
    with_attempts(path)
    with closing(sqlite3.connect(path)) as connection:
        (text,) = connection.execute("SELECT state FROM checkpoints").fetchone()
        stored = json.loads(text)
        stored["state"]["half_open"] = 1
        connection.execute("UPDATE checkpoints SET state = ?", (json.dumps(stored),))
        connection.commit()
    with Journal.open(path, to_run=True) as journal:
        notes = journal.begin({"default": POLICY}, 20.0).notes
    assert notes == ("the checkpoint is from another version of Paceline, half_open not carried over",)


def test_lateness_is_kept_where_a_timer_let_the_launch_out(path: Path) -> None:
    with created(path, 3) as journal:
        recorder = journal.begin({"default": POLICY}, 0.0).recorders["default"]
        pool = pool_of(POLICY, 1.0)
        recorder.began(pool)
        for index, late_s in enumerate((-1.0, 0.002, 0.0)):
            pool.late_s = late_s
            recorder.launched(job(work(index)), 1.0)
        journal._running().commit()
        assert journal.lateness("default") == [0.002, 0.0]
        assert journal.lateness("other") == []


def test_attempts_of_other_pools_are_not_counted(path: Path) -> None:
    with created(path, [work(0), work(1, pool="other")]) as journal:
        recorders = journal.begin({"default": POLICY, "other": POLICY}, 0.0).recorders
        done = job(work(0), launched_s=3.0)
        recorders["default"].launched(done, 3.0)
        recorders["default"].attempted(attempt(done, answer(0), 4.0), answer(0), "")
        recorders["default"].ended(work(0).request, "", answer(0), 4.0)
        recorders["other"].launched(job(work(1, pool="other"), launched_s=5.0), 5.0)
        journal._running().commit()
        assert [tuple(each) for each in journal.launches("default", 0.0)] == [(3.0, 501.0, True)]
        # The answer used 10 + 7 tokens.
        assert [tuple(each) for each in journal.launches("default", 0.0, settled=True)] == [(3.0, 17.0, True)]
        assert [tuple(each) for each in journal.launches("other", 0.0)] == [(5.0, 501.0, True)]
        assert journal.launches("default", 3.5) == []
