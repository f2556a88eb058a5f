"""Long waits and resumed histories, live: a run says what it waits for, ends rather than sleeps, and goes on."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from governor.journal.journal import Journal
from tests.live import WAIT_S, Cli, Process, batch, check_whole, provider, run_args, shared_cli

HOURS = 114 * 3_600.0
# Two in flight, of which whoever waits for a retry keeps its place no longer; waits of any length are obeyed.
ENV = {"OPENAI_MAX_CONCURRENCY": "2", "OPENAI_RETRY_AFTER_CAP_SECONDS": "1000000"}
HELD = {**ENV, "OPENAI_HOLD_ON_THROTTLE": "true"}


@pytest.fixture(scope="module")
def cli() -> Cli:
    return shared_cli()


def until_said(process: Process, words: str) -> None:
    """Until the run has said that on standard error."""
    end = time.monotonic() + WAIT_S
    said = ""
    while words not in said:
        assert time.monotonic() < end, said
        time.sleep(0.02)
        said = process.err.read_text() if process.err.exists() else ""


def asks(wait_s: float, times: int = 1) -> list[dict[str, object]]:
    return [{"kind": "throttled", "retry_after_s": wait_s, "times": times, "after_requests": 3}]


def test_an_absurd_wait_is_told_at_once_and_ends_a_run_that_may_not_sleep_so_long(cli: Cli, tmp_path: Path) -> None:
    """Off a terminal and without --yes nobody waits for days; the same command goes on, and knows of the hold."""
    batch(tmp_path / "requests.jsonl", 8)
    with provider(events=asks(HOURS)) as served:
        args = run_args(tmp_path, served.base_url, "--json")
        ran = cli.run(*args, env=HELD)
        assert ran.code == 5, ran.err
        assert "asks to wait 4 d 18 h, until " in ran.err
        assert "nothing is launched until then; Ctrl-C and the same command later go on" in ran.err
        assert "4 d 18 h away" in ran.err
        assert "more than a day (--yes sits it out): stopped; the same command then goes on" in ran.err
        sent = served.stats()["requests"]
        assert sent < 8
        again = cli.run(*args, env=HELD)
        assert again.code == 5
        assert "an earlier 429 asked to wait until " in again.err
        assert served.stats()["requests"] == sent, "the hold counts over legs"
        # A deadline ends the hold, and the request that was first launched long ago as it counts.
        ran = cli.run(*args, "--set", "OPENAI_DEADLINE_SECONDS=0.5", env=HELD)
        assert ran.code in (0, 1), ran.err
    check_whole(tmp_path, 8)


@pytest.mark.parametrize("option", ["--stop-after", "--finish-by"])
def test_a_run_that_would_sleep_past_its_budget_ends_at_once(cli: Cli, tmp_path: Path, option: str) -> None:
    batch(tmp_path / "requests.jsonl", 8)
    with provider(events=asks(3_600.0)) as served:
        ran = cli.run(*run_args(tmp_path, served.base_url, "--json"), option, "30m", env=HELD)  # within WAIT_S
    assert ran.code == 5, ran.err
    assert f"past {option} 30 min: stopped; the same command then goes on" in ran.err
    with Journal.open(tmp_path / "results.journal.db") as journal:
        assert journal.legs()[-1].ending == option.removeprefix("--").replace("-", "_").upper()
        assert journal.counts().pending > 0


def test_a_deadline_set_on_a_running_batch_ends_an_absurd_wait(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 8)
    journal = tmp_path / "results.journal.db"
    with provider(events=asks(HOURS)) as served:
        process = cli.start(*run_args(tmp_path, served.base_url, "--json", "--record"), "--yes", env=HELD)
        until_said(process, "asks to wait 4 d 18 h")
        assert cli.run("set", journal, "OPENAI_DEADLINE_SECONDS=2").code == 0
        ran = process.wait()
        assert ran.code == 1, ran.err
        assert ran.json["failures"] == {"OPENAI_DEADLINE_EXCEEDED": 1}
    check_whole(tmp_path, 8)
    assert cli.run("verify", journal).code == 0


# The deadline is one that no slow machine reaches, and with the hold nothing would be launched for as long.
@pytest.mark.parametrize(("hold", "limit"), [("false", "DEADLINE_SECONDS=60"), ("true", "RETRY_AFTER_CAP_SECONDS=1")])
def test_a_daily_limit_is_never_hammered(cli: Cli, tmp_path: Path, hold: str, limit: str) -> None:
    """Retry-After 432 s and a deadline or a cap below it: the run stops, and the rest is not lost."""
    batch(tmp_path / "requests.jsonl", 200)
    env = {**ENV, "OPENAI_HOLD_ON_THROTTLE": hold}
    with provider(events=asks(432.0, 10**6)) as served:
        ran = cli.run(*run_args(tmp_path, served.base_url, "--json"), "--set", f"OPENAI_{limit}", env=env)
        # Three in a row, and those that were in flight meanwhile; of 200 with five attempts each.
        assert served.stats()["requests"] <= 40
    assert ran.code == 5, ran.err
    assert "asks to wait 7 min 12 s, until " in ran.err
    assert "and 3 in a row met that: stopped; the same command goes on then" in ran.err
    # Not even those are lost that were refused while another's answer was under way.
    assert (ran.json["completed"], ran.json["failed"]) == (3, 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_attempts_go_on_counting_after_a_stop(cli: Cli, tmp_path: Path, number: int) -> None:
    """A provider that refuses always: five attempts of each request in all, whatever happens in between."""
    batch(tmp_path / "requests.jsonl", 4)
    journal = tmp_path / "results.journal.db"
    env = {"OPENAI_JITTER_RATIO": "0"}
    # It says when to come back: without that the last attempt would come a minute after the first.
    with provider(events=[{"kind": "throttled", "retry_after_s": 0.4}]) as served:
        args = run_args(tmp_path, served.base_url, "--json", "--record")
        for _ in range(2):
            process = cli.start(*args, env=env)
            seen = served.stats()["requests"]
            end = time.monotonic() + WAIT_S
            while served.stats()["requests"] < seen + 5 and time.monotonic() < end and not process.over.is_set():
                time.sleep(0.02)
            time.sleep(0.1)
            process.signal(number)
            process.wait()
        ran = cli.run(*args, env=env)
        assert ran.code == 1, ran.err
        assert ran.json["failures"] == {"OPENAI_RATE_LIMIT_EXHAUSTED": 4}
        with Journal.open(journal) as opened:
            rows = sorted((row.request, row.attempt) for row in opened.attempts())
            resent = opened.counts().resent
        assert rows == [(request, attempt) for request in range(4) for attempt in range(1, 6)]
        assert 20 <= served.stats()["requests"] <= 20 + resent
        # Tried again on purpose, they begin anew.
        ran = cli.run(*args, "--retry-failed=OPENAI_RATE_LIMIT_EXHAUSTED", env=env)
        assert ran.code == 1
        with Journal.open(journal) as opened:
            assert sum(1 for _ in opened.attempts()) == 40
    assert cli.run("verify", journal).code == 0


def test_a_deadline_that_passed_while_no_process_ran_is_told(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 4)
    with provider(events=[{"kind": "throttled", "times": 4, "retry_after_s": 1.0}]) as served:
        args = run_args(tmp_path, served.base_url, "--json")
        process = cli.start(*args, env={"OPENAI_DEADLINE_SECONDS": "2"})
        end = time.monotonic() + WAIT_S
        while served.stats()["requests"] < 4 and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.2)
        process.signal(signal.SIGINT)
        assert process.wait().code == 130
        time.sleep(2.0)
        ran = cli.run(*args, env={"OPENAI_DEADLINE_SECONDS": "2"})
        assert ran.code == 1
        assert "4 requests launched more than OPENAI_DEADLINE_SECONDS=2 ago: given up" in ran.err
        assert served.stats()["requests"] == 4
        ran = cli.run(*args, "--retry-failed=OPENAI_DEADLINE_EXCEEDED", env={"OPENAI_DEADLINE_SECONDS": "2"})
        assert ran.code == 0, ran.err
    check_whole(tmp_path, 4)
