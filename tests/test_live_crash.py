"""A run survives: killed at any moment, stopped by signals, without room on the disk or the right to write.

The suite kills at 8 random moments, the slow form (`-m slow`) at 100.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from governor import law
from governor.journal.database import JournalError
from governor.journal.journal import Journal
from tests.live import WAIT_S, Cli, Process, batch, check_whole, provider, run_args, shared_cli

REQUESTS = 40
IN_FLIGHT = 6
# Slow enough that a run lasts about a second, and most moments fall into it.
ENV = {"OPENAI_MAX_CONCURRENCY": str(IN_FLIGHT)}
LATENCY = {"first_token_s": 0.1, "per_token_s": 0.0, "sigma": 0.3, "stall_ratio": 0.0}


@pytest.fixture(scope="module")
def cli() -> Cli:
    return shared_cli()


# ---------------------------------------------------------------- kill -9


def in_flight(folder: Path) -> int:
    """How many requests a dead process had left in flight; 0 where its journal was not yet whole."""
    with contextlib.suppress(JournalError), Journal.open(folder / "results.journal.db") as journal:
        return journal.counts().in_flight
    return 0


def whole_run_s(cli: Cli, folder: Path) -> float:
    """How long a run takes here and now, from the start of its process to its end: kills fall into all of it."""
    folder.mkdir()
    batch(folder / "requests.jsonl", REQUESTS)
    with provider(latency=LATENCY) as served:
        began = time.monotonic()
        assert cli.run(*run_args(folder, served.base_url, "--quiet"), env=ENV).code == 0
        return time.monotonic() - began


def killed_and_resumed(cli: Cli, folder: Path, rng: random.Random, run_s: float) -> tuple[int, int, int]:
    """One run, killed up to three times and resumed to its end; (kills that hit, resent, most in flight at one)."""
    batch(folder / "requests.jsonl", REQUESTS, rng.randrange(10**6))
    kills = 0
    flying: list[int] = []
    # Some 429s and drops on the way, so that retries are killed too.
    events = [{"kind": "throttled", "ratio": 0.05, "retry_after_s": 0.05}, {"kind": "drop", "ratio": 0.03}]
    with provider(events=events, latency=LATENCY, seed=rng.randrange(10**6)) as served:
        args = run_args(folder, served.base_url, "--quiet", "--json", "--record")
        for _ in range(rng.randint(1, 3)):
            process = cli.start(*args, env=ENV)
            time.sleep(rng.uniform(0.0, run_s))
            process.signal(signal.SIGKILL)
            ran = process.wait()
            assert "Traceback" not in ran.err, ran.err
            if ran.code != 128 + signal.SIGKILL:
                break
            kills += 1
            flying.append(in_flight(folder))
        ran = cli.run(*args, env=ENV)
        assert ran.code == 0, ran.err
        seen = served.stats()["requests"]
    check_whole(folder, REQUESTS)
    assert (ran.json["requests"], ran.json["completed"], ran.json["failed"]) == (REQUESTS, REQUESTS, 0)
    with Journal.open(folder / "results.journal.db") as journal:
        resent = journal.counts().resent
        recorded = sum(1 for _ in journal.attempts())
    # Each kill loses at most what was in flight then; everything else that the provider saw is on record.
    # Fewer where a kill came before the next leg had taken stock of the one before.
    assert resent <= sum(flying)
    assert max(flying, default=0) <= IN_FLIGHT
    assert recorded <= seen + resent
    assert seen <= recorded + resent
    assert cli.run("verify", folder / "results.journal.db").code == 0
    return kills, resent, max(flying, default=0)


def check_kills(cli: Cli, folder: Path, seed: int, wanted: int) -> None:
    """Runs until so many kills have hit a run that was under way."""
    rng = random.Random(seed)
    kills = resent = most = 0
    run_s = whole_run_s(cli, folder / "whole")
    for i in range(2 * wanted):
        (folder / str(i)).mkdir()
        found = killed_and_resumed(cli, folder / str(i), rng, run_s)
        kills += found[0]
        resent += found[1]
        most = max(most, found[2])
        if kills >= wanted:
            break
    assert kills >= wanted, "the moments fell before or after the runs: nothing was tested"
    assert resent > 0, "no kill hit a request in flight"
    runs = f"{kills} kills in {i + 1} runs of {REQUESTS} requests"
    print(f"\n{runs}: none lost, none doubled, {resent} re-sent, at most {most} at once ({IN_FLIGHT} may be in flight)")


def test_kill_9_at_random_moments_loses_nothing_and_doubles_nothing(cli: Cli, tmp_path: Path, seed: int) -> None:
    check_kills(cli, tmp_path, seed, 8)


@pytest.mark.long
def test_kill_9_at_a_hundred_moments(cli: Cli, tmp_path: Path, seed: int) -> None:
    check_kills(cli, tmp_path, seed, 100)


# ---------------------------------------------------------------- killed between commits


FEW = 12
FEW_IN_FLIGHT = 3
TPD, RPD = 100_000, 1_000
# All that outlives a process is looked at: the minute's window, the day's counts, a setting that was changed.
COUNTED = {
    "OPENAI_MAX_CONCURRENCY": str(FEW_IN_FLIGHT),
    "OPENAI_TPM_WINDOW": "sliding",
    "OPENAI_RPM_LIMIT": "1000000",
    "OPENAI_TPD_LIMIT": str(TPD),
    "OPENAI_RPD_LIMIT": str(RPD),
}
HELD = "OPENAI_DEADLINE_SECONDS=900"


def check_used(journal: Journal, path: Path) -> None:
    """The checkpoint says that used is what the other tables say was launched, no more and no less."""
    found = journal.checkpoint("default")
    assert found is not None
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT state, reserve, resent FROM requests").fetchall()
    flying = [reserve for state, reserve, _ in rows if state == "in_flight"]
    lost = [reserve for _, reserve, resent in rows for _ in range(resent)]
    launched = [*(attempt.reserved_tokens for attempt in journal.attempts()), *flying, *lost]
    assert len(flying) == found.state.in_flight <= FEW_IN_FLIGHT
    now = found.at_s
    assert 0.0 <= now < 55.0, "the machine is too slow for what is asserted below"
    used = [law.used_in(found.params, found.state, d, now) for d in (law.TPM, law.RPM, law.TPD, law.RPD)]
    assert used[:2] == pytest.approx([sum(launched), len(launched)])
    # A day's bucket refills meanwhile, by so much at the most.
    days = now / law.DAY_S
    assert sum(launched) - days * TPD - 1e-6 <= used[2] <= sum(launched) + 1e-6
    assert len(launched) - days * RPD - 1e-6 <= used[3] <= len(launched) + 1e-6


def killed_after(cli: Cli, folder: Path, commits: int) -> bool:
    """A run that is killed after so many commits, twice, and then taken to its end; whether it lived so long.

    The setting is changed before anything is sent, since a `set` that nobody has taken up waits for the next process.
    """
    folder.mkdir()
    batch(folder / "requests.jsonl", FEW)
    journal_path = folder / "results.journal.db"
    with provider(latency=LATENCY | {"first_token_s": 0.02}) as served:
        args = run_args(folder, served.base_url, "--json", "--quiet")
        flying = 0
        for kill in range(2):
            ran = cli.start(*args, env=COUNTED, dies_after=commits).wait()
            assert "Traceback" not in ran.err, ran.err
            if ran.code == 0:
                assert kill == 1 or commits > FEW, f"over before commit {commits}"
                break
            assert ran.code == 128 + signal.SIGKILL, ran.err
            if not Journal.exists(journal_path):
                continue
            with contextlib.suppress(JournalError), Journal.open(journal_path) as journal:
                if not journal.legs():
                    continue
                check_used(journal, journal_path)
                flying += journal.counts().in_flight
                done = {result.request.index for result in journal.results() if result.answer is not None}
                assert len(done) == journal.counts().done
                if kill == 0:
                    journal.ask("set", [HELD])
        lived = ran.code == 0 and kill == 0
        ran = cli.run(*args, env=COUNTED)
        assert ran.code == 0, ran.err
        seen = served.stats()["requests"]
    check_whole(folder, FEW)
    with Journal.open(journal_path) as journal:
        check_used(journal, journal_path)
        counts = journal.counts()
        held = [command for command in journal.commands() if command.name == "set"]
        # What was set after the first kill is in force in every leg since, whichever commit the second one followed.
        if held and len(journal.legs()) > 1:
            assert journal.settings()[-1].policy.deadline_seconds == 900.0
    # No answer was bought twice but those that no process lived to record.
    assert counts.resent <= flying
    assert FEW <= seen <= FEW + flying
    return lived


def check_every_commit(cli: Cli, tmp_path: Path, every: int) -> None:
    for commits in range(1, 200, every):
        if killed_after(cli, tmp_path / str(commits), commits):
            print(
                f"\nkilled after each {every}. of {commits} commits: window, days, settings and results right each time"
            )
            return
    raise AssertionError("it never lived to its end: too many commits")


def test_kill_9_between_commits_misplaces_nothing(cli: Cli, tmp_path: Path) -> None:
    check_every_commit(cli, tmp_path, 5)


@pytest.mark.long
def test_kill_9_between_every_two_commits(cli: Cli, tmp_path: Path) -> None:
    check_every_commit(cli, tmp_path, 1)


def test_kill_9_with_3_in_flight_re_sends_at_most_3(cli: Cli, tmp_path: Path) -> None:
    """As reported of another client (hermes-agent#86523): 30 requests, 3 in flight, killed in the midst of them."""
    for commits in (15, 20, 25):
        folder = tmp_path / str(commits)
        folder.mkdir()
        batch(folder / "requests.jsonl", 30)
        with provider(latency=LATENCY) as served:
            args = run_args(folder, served.base_url, "--quiet")
            killed = cli.start(*args, env=COUNTED, dies_after=commits).wait()
            assert killed.code == 128 + signal.SIGKILL
            with Journal.open(folder / "results.journal.db") as journal:
                assert 1 <= journal.counts().in_flight <= 3
            assert cli.run(*args, env=COUNTED).code == 0
            assert served.stats()["requests"] <= 33
        with Journal.open(folder / "results.journal.db") as journal:
            assert journal.counts().resent <= 3
        check_whole(folder, 30)


# ---------------------------------------------------------------- signals


def until_done(folder: Path, process: Process, least: int = 3) -> None:
    """Until the run has ended that many requests."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        # A journal that is just being made cannot be opened yet.
        with contextlib.suppress(JournalError), Journal.open(folder / "results.journal.db") as journal:
            if journal.counts().done >= least:
                return
        time.sleep(0.01)
    raise AssertionError(f"nothing has ended: {process.err.read_text()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_those_in_flight_end_and_the_run_resumes(cli: Cli, tmp_path: Path, number: int) -> None:
    batch(tmp_path / "requests.jsonl", REQUESTS)
    with provider(latency=LATENCY | {"first_token_s": 0.3}) as served:
        args = run_args(tmp_path, served.base_url, "--json")
        process = cli.start(*args, env=ENV)
        until_done(tmp_path, process)
        process.signal(number)
        ran = process.wait()
        assert ran.code == 128 + number
        assert "nothing more is launched" in ran.err
        found = ran.json
        assert 3 <= found["completed"] < REQUESTS
        # Nobody was cut off: all that was sent was answered and is on record.
        assert served.stats()["requests"] == found["attempts"] == found["completed"]
        assert not (tmp_path / "results.jsonl").exists()
        with Journal.open(tmp_path / "results.journal.db") as journal:
            assert journal.counts().resent == 0
            assert journal.legs()[-1].ending == signal.Signals(number).name
        assert cli.run(*args, env=ENV).code == 0
        assert served.stats()["requests"] == REQUESTS
    check_whole(tmp_path, REQUESTS)


def test_a_second_signal_cancels_what_is_in_flight(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 20)
    with provider(
        latency=LATENCY | {"first_token_s": 0.1}, events=[{"kind": "stall", "stall_s": 60, "after_requests": 5}]
    ) as served:
        args = run_args(tmp_path, served.base_url, "--json")
        process = cli.start(*args, env=ENV)
        until_done(tmp_path, process)
        time.sleep(0.5)
        began = time.monotonic()
        process.signal(signal.SIGINT)
        time.sleep(0.2)
        process.signal(signal.SIGINT)
        ran = process.wait()
        assert time.monotonic() - began < 60.0
    assert ran.code == 130
    assert "in flight cancelled" in ran.err
    assert ran.err.count("nothing more is launched") == 1
    with Journal.open(tmp_path / "results.journal.db") as journal:
        counts = journal.counts()
        # What was cancelled in flight is not counted: no figure differs from what `status` and `resume` read.
        assert ran.json["attempts"] == len(list(journal.attempts()))
    assert 1 <= counts.resent <= IN_FLIGHT
    assert counts.in_flight == 0
    with provider() as served:
        assert cli.run(*run_args(tmp_path, served.base_url), env=ENV).code == 0
    check_whole(tmp_path, 20)


def test_the_grace_period_ends(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 10)
    with provider(events=[{"kind": "stall", "stall_s": 60, "after_requests": 3}]) as served:
        process = cli.start(*run_args(tmp_path, served.base_url, "--grace", "0.3s"), env=ENV)
        until_done(tmp_path, process)
        process.signal(signal.SIGTERM)
        began = time.monotonic()
        ran = process.wait()
    assert ran.code == 143
    assert time.monotonic() - began < 60.0
    assert "cancelled" in ran.err


# ---------------------------------------------------------------- the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for little, where this machine lets us make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("a small file system cannot be mounted here (not root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def filled(folder: Path) -> Path:
    """A file that takes all that is left of its disk."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


def said(process: Process, text: str) -> None:
    until = time.monotonic() + WAIT_S
    while text not in process.err.read_text():
        assert time.monotonic() < until, f"never said {text!r}: {process.err.read_text()}"
        time.sleep(0.02)


@pytest.mark.parametrize("gives_up", [False, True])
def test_with_a_full_disk_answers_wait_in_memory_and_none_is_bought_twice(
    cli: Cli, tmp_path: Path, small_disk: Path, gives_up: bool
) -> None:
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    batch(tmp_path / "requests.jsonl", 60, cap=3000)
    journal = small_disk / "run.db"
    with provider(latency=LATENCY) as served:
        args = ["run", tmp_path / "requests.jsonl", "--out", tmp_path / "results.jsonl", "--base-url", served.base_url]
        args += ["--journal", journal, "--yes", "--grace", "0.5s"]
        process = cli.start(*args, env=ENV)
        while served.stats()["requests"] < 5:
            time.sleep(0.01)
        ballast = filled(small_disk)
        said(
            process, "the disk is full (0.0 MiB free): nothing more is sent, and answers are kept in memory until there"
        )
        time.sleep(0.5)
        seen = served.stats()["requests"]
        assert seen < 60
        time.sleep(1.0)
        assert served.stats()["requests"] == seen, "something was sent that nobody can record"
        if gives_up:
            process.signal(signal.SIGINT)
            said(process, "nothing more is launched")
            time.sleep(0.3)  # two at once count as one
            process.signal(signal.SIGINT)
            ran = process.wait()
            assert ran.code == 2, ran.err
            assert "make room and run the same command again" in ran.err
        ballast.unlink()
        if gives_up:
            assert cli.run(*args, env=ENV).code == 0
            # Somebody insisted: what was in memory alone was lost, and no more than that.
            assert served.stats()["requests"] <= 60 + IN_FLIGHT
        else:
            ran = process.wait()
            assert ran.code == 0, ran.err
            assert "there is room again: the run continues" in ran.err
            assert served.stats()["requests"] == 60
    with Journal.open(journal) as opened:
        assert opened.complaints() == []
        assert opened.counts().done == 60
        assert gives_up or opened.counts().resent == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 60


def test_a_disk_that_is_too_small_is_refused_before_the_start(cli: Cli, tmp_path: Path, small_disk: Path) -> None:
    batch(tmp_path / "requests.jsonl", 2_000)
    args = ["run", tmp_path / "requests.jsonl", "--out", small_disk / "r.jsonl", "--base-url", "http://127.0.0.1:9/v1"]
    ran = cli.run(*args)
    assert ran.code == 3
    assert "MiB are free: make room" in ran.err
    assert list(small_disk.iterdir()) == []


def test_the_disk_is_looked_at_before_a_resume_too(cli: Cli, tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    batch(tmp_path / "requests.jsonl", 60)
    with provider(events=[{"kind": "quota", "after_requests": 5}]) as served:
        args = [*run_args(tmp_path, served.base_url), "--journal", small_disk / "run.db"]
        assert cli.run(*args, env=ENV).code == 4
        seen = served.stats()["requests"]
        ballast = filled(small_disk)
        os.truncate(ballast, ballast.stat().st_size - 400 * 1024)  # to open it there is room enough
        ran = cli.run(*args, env=ENV)
        assert (ran.code, served.stats()["requests"]) == (3, seen), ran.err
        assert "0 MiB are free: make room" in ran.err
        ballast.unlink()
    with provider() as served:
        args = [*run_args(tmp_path, served.base_url), "--journal", small_disk / "run.db"]
        assert cli.run(*args, env=ENV).code == 0


def test_a_read_only_output_folder_is_refused_before_anything_is_sent(
    cli: Cli, tmp_path: Path, small_disk: Path
) -> None:
    batch(tmp_path / "requests.jsonl", 3)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with provider() as served:
        args = ["run", tmp_path / "requests.jsonl", "--base-url", served.base_url]
        ran = cli.run(*args, "--out", small_disk / "r.jsonl")
        assert ran.code == 2
        assert "that file system is read-only: name another folder" in ran.err
        ran = cli.run(*args, "--out", tmp_path / "r.jsonl", "--journal", small_disk / "j.db")
        assert ran.code == 2
        assert "name another" in ran.err
        assert served.stats()["requests"] == 0


def test_a_folder_that_becomes_read_only_keeps_everything_in_the_journal(
    cli: Cli, tmp_path: Path, small_disk: Path
) -> None:
    batch(tmp_path / "requests.jsonl", 12)
    with provider(latency=LATENCY) as served:
        args = ["run", tmp_path / "requests.jsonl", "--out", small_disk / "r.jsonl", "--base-url", served.base_url]
        process = cli.start(*args, "--journal", tmp_path / "results.journal.db", env=ENV)
        until_done(tmp_path, process)
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        ran = process.wait()
    assert ran.code == 2
    assert "read-only" in ran.err
    out = tmp_path / "elsewhere.jsonl"
    assert cli.run("export", tmp_path / "results.journal.db", "--out", out).code == 0
    assert len(out.read_text().splitlines()) == 12


@contextlib.contextmanager
def frozen(process: Process) -> Iterator[None]:
    """A run that stands still, so that it cannot be over before a second one has started."""
    process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.signal(signal.SIGCONT)


def test_two_processes_cannot_run_one_journal(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", REQUESTS)
    with provider(latency=LATENCY) as served:
        args = run_args(tmp_path, served.base_url)
        process = cli.start(*args, env=ENV)
        until_done(tmp_path, process, 1)
        with frozen(process):
            second = cli.run(*args, env=ENV)
        assert second.code == 2
        assert "another process is running this journal" in second.err
        assert process.wait().code == 0
        assert served.stats()["requests"] == REQUESTS
    check_whole(tmp_path, REQUESTS)


def test_two_journals_cannot_write_the_same_results(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", REQUESTS)
    with provider(latency=LATENCY) as served:
        args = run_args(tmp_path, served.base_url)
        process = cli.start(*args, env=ENV)
        until_done(tmp_path, process, 1)
        with frozen(process):
            second = cli.run(*args, "--journal", tmp_path / "another.db", env=ENV)
        assert (second.code, second.err.count("\n")) == (2, 1)
        assert "results.jsonl: another run writes its results there" in second.err
        assert not (tmp_path / "another.db").exists()
        assert process.wait().code == 0
        assert served.stats()["requests"] == REQUESTS
    check_whole(tmp_path, REQUESTS)


def test_a_followed_run_that_is_ended_early_can_be_begun_again(cli: Cli, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    batch(tmp_path / "requests.jsonl", 8)
    with provider(latency=LATENCY) as served:
        args = run_args(tmp_path, served.base_url, "--follow")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            process = cli.start(*args, env=ENV)
            time.sleep(rng.uniform(0.0, 0.3))
            process.signal(number)
            # Before Python has taken over, a signal ends a process as it ends any.
            assert process.wait().code in (0, 128 + number, -number)
        # As an earlier version left it: empty files, and no journal.
        for path in tmp_path.glob("results*"):
            path.unlink()
        (tmp_path / "results.jsonl").touch()
        (tmp_path / "results.errors.jsonl").touch()
        ran = cli.run(*args, env=ENV)
        assert ran.code == 0, ran.err
    check_whole(tmp_path, 8)
