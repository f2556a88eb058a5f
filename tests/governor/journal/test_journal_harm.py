"""The journal when things go wrong: killed processes, full disks, read-only folders, damaged and foreign files.

Whatever happens, what was committed is intact and the run can go on; and whoever looks gets one line with the remedy.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from governor.journal import schema
from governor.journal.database import JournalError
from governor.journal.journal import PAUSE, Journal
from governor.journal.rows import Counts
from governor.journal.verify import verify
from tests.disks import mount, read_only
from tests.governor.journals import EPOCH_S, FREE, answer, begun, created, ends, job, recorded, refusal, work
from tests.live import WAIT_S
from tests.postgres import PostgresServer

HERE = Path(__file__).resolve().parents[1]
CONCURRENCY = 12  # as in mortal.py


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


def committed(journal: Journal) -> None:
    writer = journal._writer
    assert writer is not None
    writer.commit()


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Another process, at the project's root, that runs these lines."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, check=False)


def integrity(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    try:
        return [row[0] for row in connection.execute("PRAGMA integrity_check")]
    finally:
        connection.close()


# ---------------------------------------------------------------- kill -9


class Story:
    """One run of a journal by processes that are killed, one after the other, until one of them finishes it."""

    def __init__(self, folder: Path, requests: int, seed: int) -> None:
        self.path, self.ledger = folder / "run.db", folder / "ledger"
        self.requests = requests
        self.life = 0
        self.resent = 0
        self.legs = 0
        self.kills = 0
        arguments = [sys.executable, HERE / "mortal.py", self.path, self.ledger, str(requests), str(seed)]
        self.nursery = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def close(self) -> None:
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        self.nursery.stdin.close()
        self.nursery.stdout.close()
        assert self.nursery.wait(WAIT_S) == 0

    def lives(self, seconds: float = -1.0) -> bool:
        """Another process runs the journal, for so long at most. Whether it came to the end before it was killed."""
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        self.life += 1
        done_before = self.states("done") | self.states("failed")
        self.nursery.stdin.write(f"{self.life}\n")
        child = int(self.nursery.stdout.readline())
        if seconds >= 0.0:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        self.nursery.stdin.write("\n")
        status = int(self.nursery.stdout.readline())
        assert status in (0, -signal.SIGKILL), f"the process failed by itself: status {status}"
        sent = self.sent(self.life)
        again = sorted(index for index, _ in sent if index in done_before)
        assert not again, f"done, and sent again: {again}"
        self.check(sent)
        self.kills += status != 0
        return status == 0

    def sent(self, life: int) -> list[tuple[int, int]]:
        lines = [tuple(map(int, line.split())) for line in self.ledger.read_text().splitlines()]
        return [(index, attempt) for number, index, attempt in lines if number == life]

    def states(self, state: str) -> set[int]:
        if not Journal.exists(self.path):
            return set()
        with Journal.open(self.path) as journal:
            query = schema.requests.select().where(schema.requests.c.state == state)
            return {row.request for row in journal._all(query)}

    def check(self, sent: list[tuple[int, int]]) -> None:
        """What must hold whenever a process has gone."""
        if not Journal.exists(self.path):
            assert not sent
            return
        assert integrity(self.path) == ["ok"]
        with Journal.open(self.path) as journal:
            rows = {row.request: row for row in journal._all(schema.requests.select())}
            assert not sent or len(rows) == self.requests, "sent before all requests were in"
            unmarked = [index for index, _ in sent if rows[index].first_launched_s < 0.0]
            assert not unmarked, f"sent without being marked first: {unmarked}"
            in_flight = [row for row in rows.values() if row.state == "in_flight"]
            assert len(in_flight) <= CONCURRENCY
            counts = journal.counts()
            # The process that has gone took stock of its predecessor's, unless it was killed before it could.
            legs = len(journal.legs())
            assert counts.resent + (len(in_flight) if legs == self.legs else 0) == self.resent
            self.resent, self.legs = counts.resent + len(in_flight), legs
            answered = {row.request for row in journal._all(schema.results.select())}
            assert answered == {row.request for row in rows.values() if row.state == "done"}

    def check_end(self) -> None:
        with Journal.open(self.path) as journal:
            assert journal.counts() == Counts(self.requests, 0, 0, self.requests, 0, self.resent, {})
            found = verify(journal.decisions())
            assert found.difference is None, str(found)
            results = list(journal.results())
            assert [result.request.custom_id for result in results] == [f"q-{i}" for i in range(self.requests)]
            assert [r.answer.body for r in results if r.answer] == [answer(i).body for i in range(self.requests)]
            oks = [a.request for a in journal.attempts() if a.outcome == "ok"]
            assert sorted(oks) == list(range(self.requests)), "an answer was recorded twice, or never"


def killed_often(folder: Path, kills: int, seed: int) -> int:
    """Kills processes at random moments until there were so many; returns how many requests were sent again."""
    r = random.Random(seed)
    left, resent, number = kills, 0, 0
    while left > 0:
        number += 1
        place = folder / str(number)
        place.mkdir()
        story = Story(place, requests=r.choice([30, 400]), seed=seed + number)
        try:
            # Some at once, while the journal is being made, most in the middle.
            while left > story.kills and not story.lives(r.random() * r.choice([0.03, 0.15, 0.5])):
                pass
            story.lives()
            story.check_end()
        finally:
            story.close()
        left -= story.kills
        resent += story.resent
    return resent


def test_killed_at_any_moment_it_loses_nothing_and_repeats_nothing(tmp_path: Path, seed: int) -> None:
    killed_often(tmp_path, 15, seed)


@pytest.mark.long
def test_killed_a_hundred_times(tmp_path: Path, seed: int) -> None:
    assert killed_often(tmp_path, 100, seed) > 0, "no process was ever killed with a request in flight"


# ---------------------------------------------------------------- no room on the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB; skips where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or mount("-t", "tmpfs", "-o", "size=3m", "tmpfs", folder):
        pytest.skip("only root can mount a small file system (another test limits the size of files instead)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill_up(journal: Journal, recorder: Any, limit: int) -> tuple[list[int], JournalError | None]:
    """Ends requests with 20 kB answers until the disk has no room: which ends are durable as far as told, the error."""
    durable: list[int] = []

    async def main() -> JournalError | None:
        for index in range(limit):
            recorder.launched(job(work(index), launched_s=float(index)), float(index))
            ends(recorder, job(work(index), launched_s=float(index)), answer(index, "x" * 20_000), index + 0.5)
            try:
                await recorder.flushed()
            except JournalError as error:
                return error
            durable.append(index)
        return None

    error = asyncio.run(main())
    assert recorder.trouble is error
    return durable, error


def test_a_full_disk_is_told_and_what_was_recorded_stays(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 1_000_000)
    path = small_disk / "run.db"
    journal, recorder = begun(path, 200)
    with journal:
        durable, error = fill_up(journal, recorder, 200)
        assert error is not None
        assert str(error).startswith(f"{path}: the disk is full (")
        assert str(error).endswith("make room and run the same command again; what was recorded is intact")
        assert (error.exit_code, error.retryable) == (2, True)
        failed = len(durable)
        assert failed > 20
        assert journal.counts() == Counts(200, 200 - failed, 0, failed, 0, 0, {})
        assert journal.complaints() == []
        # Room is made: the run goes on in the same process, and what could not be written then is written now.
        ballast.unlink()
        asyncio.run(recorder.flushed())
        assert recorder.trouble is None
        assert journal.counts().done == failed + 1
        assert [result.request.index for result in journal.results()] == [*durable, failed]
    assert integrity(path) == ["ok"]


def test_after_a_full_disk_another_process_resumes(small_disk: Path) -> None:
    path = small_disk / "run.db"
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 1_000_000)
    journal, recorder = begun(path, 200)
    durable, error = fill_up(journal, recorder, 200)
    assert error is not None
    with pytest.raises(JournalError, match="the disk is full"):
        journal.close()
    ballast.unlink()
    with Journal.open(path, to_run=True) as journal:
        assert journal.begin({"default": FREE}, 999.0).resent == 0, "its launch was in the transaction that failed"
        assert journal.counts() == Counts(200, 200 - len(durable), 0, len(durable), 0, 0, {})
        assert [each.work.request.index for each in journal.pending()] == list(range(len(durable), 200))
        assert verify(journal.decisions()).difference is None


def test_a_journal_that_may_not_grow_any_more_is_told_and_intact(tmp_path: Path) -> None:
    """As with a quota: the file may not become larger, for whatever reason."""
    script = """if True:
        import resource, sys
        from pathlib import Path
        from tests.governor.journals import begun
        from tests.governor.journal.test_journal_harm import fill_up
        journal, recorder = begun(Path(sys.argv[1]), 200)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
        durable, error = fill_up(journal, recorder, 200)
        print(len(durable), error.exit_code, str(error), sep="\\n")
        """
    path = tmp_path / "run.db"
    done = python(script, path)
    count, exit_code, message = done.stdout.splitlines()
    assert message.startswith(f"{path}: the disk takes no more (full, or a quota) (")
    assert exit_code == "2"
    assert int(count) > 10
    assert integrity(path) == ["ok"]
    with Journal.open(path, to_run=True) as journal:
        assert journal.begin({"default": FREE}, 999.0).resent == 0
        assert journal.counts().done == int(count)


def test_a_disk_that_fails_is_not_written_to_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync nobody knows what the disk holds: a second one may succeed without having written it."""
    journal, recorder = begun(path, 2)
    writer = journal._writer
    assert writer is not None
    tries = []

    def broken(batch: Any) -> None:
        tries.append(batch)
        with journal._database.explaining():
            failure = sqlite3.OperationalError("disk I/O error")
            failure.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise failure

    monkeypatch.setattr(writer, "_write", broken)

    async def main() -> None:
        recorder.launched(job(work(0)), 1.0)
        for _ in range(3):
            with pytest.raises(JournalError, match="reading or writing failed: check the disk") as caught:
                await recorder.flushed()
            assert not caught.value.retryable

    asyncio.run(main())
    assert len(tries) == 1
    with pytest.raises(JournalError, match="reading or writing failed"):
        journal.close()
    with Journal.open(path) as journal:
        assert journal.counts().pending == 2


# ---------------------------------------------------------------- folders that cannot be written


def test_a_read_only_folder_is_one_clear_line_and_can_still_be_looked_into(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    path = folder / "run.db"
    journal, recorder = begun(path, 3)
    with journal:
        ends(recorder, job(work(0)), answer(0), 1.0)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with read_only(folder):
        with pytest.raises(JournalError, match=r"cannot be made: .*: name another file with --journal") as caught:
            Journal.create(folder / "other.db", fingerprint="x", seed=1, epoch_s=EPOCH_S)
        assert str(caught.value).startswith(f"{folder / 'other.db'}: ")
        with pytest.raises(JournalError, match="cannot be written: its folder or file is read-only, or not yours"):
            Journal.open(path, to_run=True)
        with Journal.open(path) as journal:
            assert journal.counts().done == 1
            assert [result.answer is not None for result in journal.results()] == [True]
            assert not journal.is_running()
            with pytest.raises(JournalError, match="cannot be written"):
                journal.ask(PAUSE)
            with pytest.raises(JournalError, match="cannot be written"):
                journal.purge()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    with Journal.open(path, to_run=True) as journal:
        assert journal.begin({"default": FREE}, 5.0).leg == 2


# ---------------------------------------------------------------- files that are no journal, or not ours to read


def overwritten(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        file.write(content)


def with_sql(statement: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        connection = sqlite3.connect(path)
        connection.execute(statement)
        connection.commit()
        connection.close()

    return change


OTHER = "not a Paceline journal: name another file (`paceline run`: with --journal)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_text("custom_id\n" * 500), OTHER),
        (lambda path: path.write_bytes(bytes(8192)), OTHER),
        (lambda path: overwritten(path, 0, b"X"), OTHER),
        (with_sql("PRAGMA application_id = 7"), OTHER),
        (lambda path: (path.unlink(), with_sql("CREATE TABLE run (x)")(path)), OTHER),
        (lambda path: path.write_bytes(b""), "it is empty, no run was started in it: remove it, or run again"),
        (lambda path: (path.unlink(), path.mkdir()), "this is a folder: name a file with --journal"),
        (lambda path: path.unlink(), "there is no such journal: `paceline run` creates one"),
        (
            with_sql("UPDATE run SET schema = 99, version = '7.8.9'"),
            "made by Paceline 7.8.9 with schema 99, this is {version} and knows {schema}: upgrade it",
        ),
        (
            with_sql("UPDATE run SET schema = 0, version = '0.0.1'"),
            "made by Paceline 0.0.1 with schema 0, this is {version} with {schema}: use that version",
        ),
        (with_sql("DELETE FROM run"), "the journal is damaged (0 runs in it where one should be): restore a copy, or"),
        (with_sql("DROP TABLE run"), "this database holds no Paceline journal: name another"),
        (
            lambda path: overwritten(path, 100, b"\xff" * 400),
            "the journal is damaged (database disk image is malformed)",
        ),
        (lambda path: os.truncate(path, 4096), "the journal is damaged (database disk image is malformed)"),
    ],
)
@pytest.mark.parametrize("to_run", [False, True])
def test_what_cannot_be_opened_is_one_line_with_the_remedy(
    path: Path, change: Callable[[Path], Any], message: str, to_run: bool
) -> None:
    from governor import __version__

    created(path, 3).close()
    change(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(JournalError) as caught:
        Journal.open(path, to_run=to_run)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message.format(version=__version__, schema=schema.SCHEMA) in text
    assert "\n" not in text
    assert caught.value.exit_code == 2
    assert (path.read_bytes() if path.is_file() else b"") == before, "it was changed"


@pytest.mark.parametrize("place", ["there", "text", "foreign", "folder", "device", "nowhere"])
def test_nothing_that_is_there_is_overwritten(path: Path, place: str) -> None:
    expected = {
        "there": "there is a database already: continue its run, or name another file",
        "text": OTHER,
        "foreign": "there is a database already: continue its run, or name another file",
        "folder": "this is a folder: name a file with --journal",
        "device": "this is not a file: name a file with --journal",
        "nowhere": "there is no folder",
    }
    if place == "there":
        created(path, 3).close()
    elif place == "text":
        path.write_text("precious\n" * 1000)
    elif place == "foreign":
        with_sql("CREATE TABLE precious (x)")(path)
    elif place == "folder":
        path.mkdir()
    elif place == "device":
        os.mkfifo(path, 0o644)  # as /dev/null is one, and without its dangers
    else:
        path = path / "deeper.db"
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(JournalError) as caught:
        Journal.create(path, fingerprint="x", seed=1, epoch_s=EPOCH_S)
    assert expected[place] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (path.read_bytes() if path.is_file() else b"") == before
    assert place != "device" or stat.S_IMODE(path.stat().st_mode) == 0o644
    assert Journal.exists(path) == (place != "nowhere")


def test_damage_inside_is_found_by_whoever_reads_it(path: Path, seed: int) -> None:
    """Pages overwritten at random: each reader gets what was written, or a JournalError, and never anything else."""
    journal, recorder = begun(path, 300)
    for index in range(200):
        ends(recorder, job(work(index)), answer(index), float(index))
    journal.close()
    whole = path.read_bytes()
    r = random.Random(seed)
    told, complaints = [], []
    for _ in range(25):
        damaged = bytearray(whole)
        page = r.randrange(1, len(whole) // 4096)
        damaged[page * 4096 : (page + 1) * 4096] = r.randbytes(4096)
        path.write_bytes(damaged)
        try:
            with Journal.open(path) as journal:
                complaints += journal.complaints()[:1]
                for stream in (journal.pending(), journal.results(), journal.attempts(), journal.decisions()):
                    for _ in stream:
                        pass
        except JournalError as error:
            told.append(str(error))
    assert all("damaged" in text and "restore a copy" in text for text in told)
    assert told, "no reader ever came across the damage"
    assert len(complaints) + len(told) >= 25, "damage went unnoticed"


@pytest.mark.parametrize(
    ("statement", "reader"),
    [
        ("UPDATE bodies SET body = '{\"model\"' WHERE request = 2", "pending"),
        ("UPDATE bodies SET body = '[1]' WHERE request = 2", "pending"),
        ("UPDATE results SET body = 'x' WHERE request = 0", "results"),
        ("UPDATE results SET outcome = 'fine' WHERE request = 0", "results"),
        ("UPDATE attempts SET outcome = 'fine'", "attempts"),
        ("UPDATE policies SET settings = '{}'", "settings"),
        (
            "UPDATE policies SET settings = replace(settings, '\"tpm_limit\":1000000000', '\"tpm_limit\":-1')",
            "settings",
        ),
        ('UPDATE policies SET settings = \'{"values": [1], "named": []}\'', "decisions"),
        ("UPDATE decisions SET calls = substr(calls, 1, length(calls) - 1)", "decisions"),
        ("UPDATE decisions SET calls = x'05000000ffffffffff'", "decisions"),
        ("UPDATE attempts SET outcome = 'x'", "outcomes"),
        ("UPDATE commands SET words = 'x'", "commands"),
        ("UPDATE forecasts SET json = 'x'", "forecasts"),
    ],
)
def test_a_row_that_makes_no_sense_is_damage(path: Path, statement: str, reader: str) -> None:
    journal, recorder = recorded(path, 3)
    with journal:
        recorder.decided("paused", (), None)
        ends(recorder, job(work(0)), answer(0), 1.0)
        journal.ask(PAUSE)
        journal.forecast({"makespan_s": 3.0}, 0.0)
    with_sql(statement)(path)
    with (
        Journal.open(path) as journal,
        pytest.raises(JournalError, match=r"damaged \(.* cannot be read\): restore a copy"),
    ):
        list(getattr(journal, reader)())


# ---------------------------------------------------------------- two at once


def test_only_one_process_runs_a_journal(path: Path) -> None:
    journal = created(path, 3)
    text = "another process is running this journal: wait for it, or steer it with `paceline pause` or `set`"
    with journal, Journal.open(path) as other:
        with pytest.raises(JournalError, match=text):
            Journal.open(path, to_run=True)
        script = "import sys; from governor.journal.journal import Journal; Journal.open(sys.argv[1], to_run=True)"
        done = python(script, path)
        assert text in done.stderr.splitlines()[-1]
        assert other.is_running()
        # The lock is still there after others have looked: closing their files must not drop it (POSIX locks do).
        assert other.is_running()
        with pytest.raises(JournalError, match=text):
            Journal.open(path, to_run=True)
    with Journal.open(path) as other:
        assert not other.is_running()
    Journal.open(path, to_run=True).close()


def test_only_one_process_runs_a_journal_on_postgresql(postgres: PostgresServer) -> None:
    url = postgres.database("two_runners").replace("postgresql://", "postgresql+psycopg://")
    refused = "another process is running this journal: wait for it"
    with created(url, 3) as journal:
        with Journal.open(url) as other:
            assert other.is_running()
        with pytest.raises(JournalError, match=refused):
            Journal.open(url, to_run=True)
        script = "import sys; from governor.journal.journal import Journal; Journal.open(sys.argv[1], to_run=True)"
        assert refused in python(script, url).stderr.splitlines()[-1]
        # The server ends the session that holds the lock: the next write takes it anew.
        ended = "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE locktype = 'advisory'"
        postgres.execute(ended)
        assert not journal.is_running()
        journal.begin({"default": FREE}, 0.0)
        assert journal.is_running()
        # Unless another process was quicker.
        postgres.execute(ended)
        with Journal.open(url, to_run=True), pytest.raises(JournalError, match=refused):
            journal.finish(1.0, "stopped")
    with Journal.open(url) as other:
        assert not other.is_running()
    # However its process ends, the lock is given back.
    script = f"import os; {script}; os._exit(9)"
    assert python(script, url).returncode == 9
    Journal.open(url, to_run=True).close()


def test_a_reader_sees_whole_events_while_the_run_goes_on(path: Path) -> None:
    """Whatever it reads at one moment fits together, and the run never waits for it."""
    count = 300
    journal, recorder = begun(path, count)
    over = threading.Event()
    looks: list[tuple[int, int]] = []
    faults: list[str] = []
    query = """SELECT
        (SELECT count(*) FROM requests WHERE state IN ('done', 'failed')),
        (SELECT count(*) FROM results),
        (SELECT count(DISTINCT request) FROM attempts),
        (SELECT count(*) FROM requests WHERE first_launched_s >= 0),
        (SELECT count(*) FROM requests r WHERE r.state IN ('done', 'failed')
            AND NOT EXISTS (SELECT 1 FROM results x WHERE x.request = r.request))"""

    def look() -> None:
        connection = sqlite3.connect(path, timeout=0.0)
        with Journal.open(path) as other:
            while not over.is_set():
                ended, results, attempted, launched, lacking = connection.execute(query).fetchone()
                if not (ended == results == attempted <= launched and lacking == 0):
                    faults.append(f"{ended} ended, {results} results, {attempted} attempted, {launched} launched")
                streamed = sum(1 for _ in other.results())
                if streamed < ended:
                    faults.append(f"{streamed} results streamed after {ended} had ended")
                looks.append((ended, streamed))
        connection.close()

    async def main() -> None:
        for start in range(0, count, 6):
            for index in range(start, start + 6):
                recorder.launched(job(work(index)), float(index))
            await recorder.flushed()
            for index in range(start, start + 6):
                lost = index % 5 == 0
                came, code = (refusal(), "OPENAI_RATE_LIMIT_EXHAUSTED") if lost else (answer(index, "x" * 3_000), "")
                ends(recorder, job(work(index)), came, index + 0.5, code)
            await recorder.flushed()

    reader = threading.Thread(target=look)
    reader.start()
    try:
        with journal:
            asyncio.run(main())
    finally:
        over.set()
        reader.join()
    assert not faults, faults[:3]
    assert len({ended for ended, _ in looks}) > 3, "the reader saw nothing in between"


# ---------------------------------------------------------------- memory and speed

MEASURED = """if True:
    import asyncio, sys, time
    from tests.governor.journals import *
    from tests.memory import peak_mib
    from governor.model.requests import Answer

    count, policy = int(sys.argv[2]), FREE.with_(max_concurrency=100, launch_order=sys.argv[3])
    text = "a prompt of some length " * 40

    async def send(job, timeout_s):
        await asyncio.sleep(0.0)
        return answer(job.index, text)

    def measured(count, path):
        begin = time.perf_counter()
        journal = created(path, works(count, text=text))
        ingested = time.perf_counter()
        recorder = journal.begin({"default": policy}, 0.0).recorders["default"]
        run_through(journal, recorder, send, policy=policy)
        ended = time.perf_counter()
        journal.finish(1e6, "finished")
        assert sum(1 for result in journal.results() if result.answer) == count
        journal.close()
        return count / (ingested - begin), count / (ended - ingested)

    measured(2_000, sys.argv[1] + ".small")
    small_mib = peak_mib()
    ingest, run = measured(count, sys.argv[1])
    print(f"{count:,} requests: {ingest:,.0f} ingested and {run:,.0f} run per second")
    print(peak_mib() - small_mib)
    """


@pytest.mark.parametrize(
    ("count", "order"),
    [(5_000, "longest_first"), pytest.param(100_000, "fifo", marks=pytest.mark.long)],
)
def test_memory_stays_flat(path: Path, count: int, order: str) -> None:
    """A whole run holds no more after many requests than after 2,000, whose bodies and answers alone are 4 MB."""
    done = python(MEASURED, path, count, order)
    assert done.returncode == 0, done.stderr
    figures, grown_mib = done.stdout.splitlines()
    print(figures)  # shown with -s or -rP; speed is the machine's, so nothing is asserted of it
    assert float(grown_mib) < 8.0, figures
