"""A run under way and its journal: commands, follow, canary, budgets, pools, logs, metrics, messages; the doctor."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from governor.journal.journal import Journal
from tests.live import (
    WAIT_S,
    Cli,
    Process,
    batch,
    check_whole,
    line,
    lines_of,
    provider,
    run_args,
    shared_cli,
    write_batch,
)

SLOW = {"first_token_s": 0.1, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0}


@pytest.fixture(scope="module")
def cli() -> Cli:
    return shared_cli()


def until(what: str, true: Any) -> None:
    """Until `true()`, in bounded time."""
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, f"never came: {what}"
        time.sleep(0.02)


def status(cli: Cli, journal: Path) -> dict[str, Any]:
    return cli.run("status", journal, "--json").json


def started(cli: Cli, folder: Path, *args: object, **how: Any) -> tuple[Process, Path]:
    """A run whose first request has ended."""
    process = cli.start(*args, **how)
    journal = folder / "results.journal.db"

    def ended() -> bool:
        ran = cli.run("status", journal, "--json")
        return ran.code == 0 and ran.json["done"] > 0

    until("the first result", ended)
    return process, journal


# ---------------------------------------------------------------- commands


def test_pause_set_and_resume_a_running_batch(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 60)
    env = {"OPENAI_MAX_CONCURRENCY": "1"}
    with provider(latency=SLOW) as served:
        process, journal = started(cli, tmp_path, *run_args(tmp_path, served.base_url, "--json", "--record"), env=env)
        assert cli.run("pause", journal).out == "paused\n"
        until("the end of what flies", lambda: status(cli, journal)["in_flight"] == 0)
        before = served.stats()["requests"]
        time.sleep(0.5)
        assert served.stats()["requests"] == before < 60
        found = status(cli, journal)
        assert (found["running"], found["paused"]) == (True, ["default"])
        assert "working on it, paused: `paceline resume` goes on" in cli.run("status", journal).out
        wrong = cli.run("set", journal, "OPENAI_MAX_CONCURENCY=9")
        assert (wrong.code, "did you mean OPENAI_MAX_CONCURRENCY?" in wrong.err) == (2, True)
        small = cli.run("set", journal, "OPENAI_TPM_LIMIT=10")
        assert (small.code, "which is still to be sent, needs" in small.err) == (2, True), small.err
        assert cli.run("set", journal, "OPENAI_MAX_CONCURRENCY=20").out == "changed\n"
        purge = cli.run("purge", journal, "--yes")
        assert purge.code == 2
        assert "another process is running this journal" in purge.err
        assert cli.run("resume", journal).out == "resumed\n"
        ran = process.wait()
    assert ran.code == 0
    assert ran.json["peak_in_flight"] > 10
    assert ran.json["waits_s"]["paused"] > 0.5
    assert "changed by `paceline set`: OPENAI_MAX_CONCURRENCY 1 -> 20" in ran.err
    check_whole(tmp_path, 60)
    found = status(cli, journal)
    assert found["settings"]["default"]["OPENAI_MAX_CONCURRENCY"] == 20
    assert any("OPENAI_MAX_CONCURRENCY 1 -> 20" in text for text in found["changes"])
    assert "all equal" in cli.run("verify", journal).out
    idle = cli.run("pause", journal)
    assert (idle.code, "no process is working on it" in idle.err) == (2, True)


def test_settings_that_were_set_hold_until_they_are_unset(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 100)
    env = {"OPENAI_MAX_CONCURRENCY": "1"}
    with provider(latency=SLOW) as served:
        args = run_args(tmp_path, served.base_url)
        process, journal = started(cli, tmp_path, *args, env=env)
        words = ("OPENAI_TPM_HEADROOM=0.2", "OPENAI_DEADLINE_SECONDS=900")
        assert cli.run("set", journal, *words).out == "changed\n"
        process.signal(9)
        process.wait()
        found = cli.run("status", journal)
        assert f"{', '.join(words)}: until changed, or withdrawn by `paceline unset`" in found.out
        assert cli.run("status", journal, "--json").json["held"] == {"default": dict(word.split("=") for word in words)}
        # Nobody runs it: one of them is withdrawn for the next process, which keeps the other one.
        slip = cli.run("unset", journal, "OPENAI_TPM_HEADROM")
        assert (slip.code, "did you mean OPENAI_TPM_HEADROOM?" in slip.err) == (2, True)
        other = cli.run("unset", journal, "OPENAI_RPM_LIMIT")
        assert (other.code, "changed are OPENAI_TPM_HEADROOM, OPENAI_DEADLINE_SECONDS" in other.err) == (2, True)
        assert "the next one applies it" in cli.run("unset", journal, "OPENAI_TPM_HEADROOM").out
        process = cli.start(*args, env=env)
        done = status(cli, journal)["done"]
        until("a result", lambda: status(cli, journal)["done"] > done)
        found = status(cli, journal)
        assert found["held"] == {"default": {"OPENAI_DEADLINE_SECONDS": "900"}}
        assert found["settings"]["default"]["OPENAI_DEADLINE_SECONDS"] == 900.0
        assert "OPENAI_TPM_HEADROOM" not in found["settings"]["default"]
        assert cli.run("unset", journal).out == "withdrawn\n"
        assert cli.run("set", journal, "OPENAI_MAX_CONCURRENCY=20").out == "changed\n"
        ran = process.wait()
    assert ran.code == 0
    assert "settings held since `paceline set`: OPENAI_DEADLINE_SECONDS=900 (`paceline unset`" in ran.err
    assert "changed by `paceline unset`: OPENAI_DEADLINE_SECONDS 900 -> 0" in ran.err
    found = status(cli, journal)
    assert found["held"] == {"default": {"OPENAI_MAX_CONCURRENCY": "20"}}
    assert "OPENAI_DEADLINE_SECONDS" not in found["settings"]["default"]
    check_whole(tmp_path, 100)


def test_a_held_setting_that_no_longer_fits_is_refused_with_the_remedy(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 6)
    with provider(events=[{"kind": "quota", "after_requests": 3}]) as served:
        args = run_args(tmp_path, served.base_url)
        assert cli.run(*args, env={"OPENAI_MAX_CONCURRENCY": "1"}).code == 4
    journal = tmp_path / "results.journal.db"
    with Journal.open(journal) as opened:
        opened.ask("set", ["OPENAI_MAX_CONCURRENCY=0"])
    with provider() as served:
        args = run_args(tmp_path, served.base_url)
        ran = cli.run(*args)
        assert ran.code == 2
        assert f"`paceline unset {journal}` withdraws what `paceline set` changed" in ran.err
        assert cli.run("unset", journal).code == 0
        assert cli.run(*args).code == 0


def test_what_is_set_while_nobody_runs_counts_from_the_next_leg(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 10)
    with provider(events=[{"kind": "quota", "after_requests": 4}]) as served:
        assert cli.run(*run_args(tmp_path, served.base_url), env={"OPENAI_MAX_CONCURRENCY": "1"}).code == 4
    journal = tmp_path / "results.journal.db"
    assert "the next one applies it" in cli.run("set", journal, "OPENAI_TPM_HEADROOM=0.2").out
    with provider() as served:
        ran = cli.run(*run_args(tmp_path, served.base_url))
    assert ran.code == 0
    assert "settings held since `paceline set`: OPENAI_TPM_HEADROOM=0.2" in ran.err
    # Settings that differ from the first leg's are told, wherever they come from.
    assert "OPENAI_MAX_CONCURRENCY 1 -> 20" in ran.err
    assert "OPENAI_TPM_HEADROOM 0.15 -> 0.2" in ran.err


@contextlib.contextmanager
def held(cli: Cli, journal: Path) -> Iterator[None]:
    """A run that is paused for as long as the block lasts, so that a busy machine cannot end it first; then quick."""
    assert cli.run("pause", journal).code == 0
    yield
    assert cli.run("set", journal, "OPENAI_MAX_CONCURRENCY=20").code == 0
    assert cli.run("resume", journal).code == 0


def test_export_while_it_runs_and_what_follows_grows(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 100)
    with provider(latency=SLOW) as served:
        args = run_args(tmp_path, served.base_url, "--follow")
        process, journal = started(cli, tmp_path, *args, env={"OPENAI_MAX_CONCURRENCY": "2"})
        until("a followed line", lambda: len((tmp_path / "results.jsonl").read_text().splitlines()) >= 2)
        with held(cli, journal):
            ran = cli.run("export", journal, "--out", tmp_path / "part.jsonl")
            assert ran.code == 0
            assert 0 < len(lines_of(tmp_path / "part.jsonl")) < 100
            again = cli.run("export", journal, "--out", tmp_path / "part.jsonl")
            assert (again.code, "add --overwrite" in again.err) == (2, True)
        assert process.wait().code == 0
    check_whole(tmp_path, 100)


def test_purge_removes_prompts_and_answers_for_good(cli: Cli, tmp_path: Path) -> None:
    write_batch(tmp_path / "requests.jsonl", [line("q-0", text="a very private question")])
    with provider() as served:
        assert cli.run(*run_args(tmp_path, served.base_url)).code == 0
    journal = tmp_path / "results.journal.db"
    assert b"private question" in journal.read_bytes()
    refused = cli.run("purge", journal)
    assert (refused.code, "add --yes" in refused.err) == (2, True)
    assert cli.run("purge", journal, "--yes").code == 0
    for path in tmp_path.glob("results.journal.db*"):
        assert b"private question" not in path.read_bytes()
    gone = cli.run("export", journal, "--out", tmp_path / "part.jsonl")
    assert (gone.code, "purged" in gone.err) == (2, True)
    assert "purged" in cli.run("status", journal).out


def test_verify_finds_a_decision_that_was_tampered_with(cli: Cli, tmp_path: Path) -> None:
    import sqlite3

    batch(tmp_path / "requests.jsonl", 5)
    with provider() as served:
        assert cli.run(*run_args(tmp_path, served.base_url)).code == 0
        journal = tmp_path / "results.journal.db"
        bare = cli.run("verify", journal)
        assert (bare.code, bare.err.count("\n")) == (2, 1)
        assert "`paceline run --record` records them" in bare.err
        journal.unlink()
        assert cli.run(*run_args(tmp_path, served.base_url, "--record", "--overwrite")).code == 0
    good = cli.run("verify", journal, "--json")
    assert (good.code, good.json["difference"], good.json["database"]) == (0, None, [])
    assert good.json["checked"] >= 10
    database = sqlite3.connect(journal)
    with database:
        (calls,) = database.execute("SELECT calls FROM decisions").fetchone()
        middle = len(calls) // 2
        changed = calls[:middle] + bytes([calls[middle] ^ 0x40]) + calls[middle + 1 :]
        database.execute("UPDATE decisions SET calls=?", (changed,))
    database.close()
    ran = cli.run("verify", journal)
    assert ran.code in (1, 2)
    assert "are equal, then one is not" in ran.out or "damaged" in ran.err


def test_journals_that_are_none(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is not a database, and it is long enough to look like one " * 20)
    for command in (["status"], ["verify"], ["export", "--out", tmp_path / "x.jsonl"], ["pause"]):
        for name, complaint in (("none.db", "there is no such journal"), ("text.db", "not a Paceline journal")):
            ran = cli.run(command[0], tmp_path / name, *command[1:])
            assert (ran.code, complaint in ran.err, ran.err.count("\n")) == (2, True, 1), ran.err


def test_an_export_never_takes_the_journal_s_place(cli: Cli, tmp_path: Path) -> None:
    journal = tmp_path / "j.db"
    journal.write_text("what was paid for")
    for more in (["--out", journal], ["--out", tmp_path / "x.jsonl", "--attempts", journal]):
        ran = cli.run("export", journal, *more, "--overwrite")
        assert (ran.code, "j.db: the journal and " in ran.err) == (2, True)
    assert journal.read_text() == "what was paid for"


# ---------------------------------------------------------------- canary and budgets


def test_a_canary_that_fails_stops_before_the_rest(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 30)
    env = {"OPENAI_RETRY_MAX_ATTEMPTS": "1"}
    with provider(events=[{"kind": "server_error", "times": 2}]) as served:
        args = run_args(tmp_path, served.base_url, "--canary", "5", "--json")
        ran = cli.run(*args, env=env)
        assert ran.code == 3
        assert served.stats()["requests"] == 5
        assert "canary: 2 of 5 failed (40 %)" in ran.err
        assert ran.json["requests"] == 5
        going = cli.run(*args, "--yes", env=env)
        assert going.code == 1
        assert served.stats()["requests"] == 30
    check_whole(tmp_path, 30)


def test_a_canary_as_forecast_goes_on_by_itself(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 30)
    with provider() as served:
        ran = cli.run(*run_args(tmp_path, served.base_url, "--canary", "5"))
    assert ran.code == 0
    assert "canary: 5 requests in" in ran.err
    check_whole(tmp_path, 30)


def test_max_cost_stops_launching_and_a_larger_one_goes_on(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 40)
    prices = tmp_path / "prices.yaml"
    prices.write_text("models: {gpt-4o-mini: {input: 0, output: 1000}}\n")
    with provider(latency=SLOW) as served:
        args = run_args(tmp_path, served.base_url, "--json", "--prices", prices)
        env = {"OPENAI_MAX_CONCURRENCY": "4"}
        ran = cli.run(*args, "--max-cost", "0.5", env=env)
        assert ran.code == 5
        found = ran.json
        # Answers of some 50 tokens at $0.001 each: about ten, give or take those in flight.
        assert 0.3 <= found["cost_usd"] <= 0.8
        assert 0 < found["completed"] < 40
        assert "--max-cost $0.50" in ran.err
        # Already spent: the same command launches nothing, not even what fits beside each other in flight.
        seen = served.stats()["requests"]
        assert cli.run(*args, "--max-cost", "0.3", env=env).code == 5
        assert served.stats()["requests"] == seen
        ran = cli.run(*args, "--max-cost", "50", env=env)
    assert ran.code == 0
    usages = [each["response"]["body"]["usage"]["completion_tokens"] for each in lines_of(tmp_path / "results.jsonl")]
    assert ran.json["cost_usd"] == pytest.approx(sum(usages) / 1000.0, rel=1e-9)


def test_max_cost_holds_where_answers_state_no_usage(cli: Cli, tmp_path: Path) -> None:
    """Each is taken for the most that it can cost: half of what all 8 cost at most is spent after 4."""
    batch(tmp_path / "requests.jsonl", 8, cap=1_000)
    with silent() as url:
        args = run_args(tmp_path, url, "--json")
        refused = cli.run(*args, "--max-cost", "0", env={"OPENAI_MAX_CONCURRENCY": "1"})
        most = float(refused.err.partition(", at most $")[2].partition(" ")[0])
        ran = cli.run(*args, "--max-cost", most / 2.0, env={"OPENAI_MAX_CONCURRENCY": "1"})
    assert (ran.code, ran.json["completed"]) == (5, 4), ran.err
    assert ran.json["cost_usd"] == pytest.approx(most / 2.0, rel=0.1)
    assert "of it assumed for answers without usage" in ran.err


@contextmanager
def silent() -> Iterator[str]:
    """A provider whose answers state no usage: its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = b'{"choices": [{"message": {"content": "yes"}}]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def test_stop_after_is_a_budget_of_time(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 40)
    with provider(latency=SLOW) as served:
        args = run_args(tmp_path, served.base_url, "--json")
        ran = cli.run(*args, "--stop-after", "1s", env={"OPENAI_MAX_CONCURRENCY": "2"})
        assert ran.code == 5
        assert 10 <= ran.json["completed"] < 40
        assert cli.run(*args).code == 0
    check_whole(tmp_path, 40)


def test_finalize_is_one_more_paid_call_for_answers_without_text(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 20, cap=2)
    cut = {"faults": {"refusal_s": 0.0, "empty_cut_ratio": 1.0}}
    empty = []
    for more in ([], ["--finalize"]):
        with provider(**cut) as served:
            ran = cli.run(*run_args(tmp_path, served.base_url, "--json", "--overwrite", *more))
        assert ran.code == 0, ran.err
        check_whole(tmp_path, 20)
        results = lines_of(tmp_path / "results.jsonl")
        texts = [each["response"]["body"]["choices"][0]["message"]["content"] for each in results]
        empty.append(texts.count("") + texts.count(None))
        # The provider keys its answers by request: both runs meet the same ones.
        assert ran.json["attempts"] == 20 + (empty[0] if more else 0)
        (tmp_path / "results.journal.db").unlink()
    assert empty[0] > 0
    assert empty[1] == 0


# ---------------------------------------------------------------- pools


def test_pools_run_side_by_side_each_with_its_key_and_settings(cli: Cli, tmp_path: Path) -> None:
    lines = [line(f"q-{i}", model="gpt-4o" if i % 3 else "gpt-4.1") for i in range(30)]
    write_batch(tmp_path / "requests.jsonl", lines)
    with provider(latency=SLOW) as one, provider(latency=SLOW, events=[{"kind": "quota", "after_requests": 4}]) as two:
        pools = {
            "pools": [
                {"name": "main", "models": ["gpt-4o*"], "key": "MAIN_KEY", "base_url": one.base_url},
                {
                    "name": "small",
                    "models": ["gpt-4.1"],
                    "base_url": two.base_url,
                    "settings": {"OPENAI_MAX_CONCURRENCY": 1},
                },
            ]
        }
        (tmp_path / "pools.yaml").write_text(json.dumps(pools))
        args = ["run", tmp_path / "requests.jsonl", "--out", tmp_path / "results.jsonl"]
        args += ["--pools", tmp_path / "pools.yaml", "--json"]
        ran = cli.run(*args, env={"MAIN_KEY": "sk-main-key-0123456789"})
        assert (one.stats()["requests"], two.stats()["requests"]) == (20, 5)
    # One quota is used up: the other pool still ends its work.
    assert ran.code == 4
    assert "sk-main-key" not in ran.err + (tmp_path / "results.journal.db").read_bytes().decode("latin-1")
    found = ran.json
    assert (found["completed"], found["pools"]["main"]["completed"], found["pools"]["small"]["completed"]) == (
        24,
        20,
        4,
    )
    assert found["pools"]["small"]["peak_in_flight"] == 1
    assert status(cli, tmp_path / "results.journal.db")["pools"]["small"]["pending"] == 6
    with Journal.open(tmp_path / "results.journal.db") as journal:
        assert {attempt.pool for attempt in journal.attempts()} == {"main", "small"}
    missing = [line("q-0", model="claude")]
    write_batch(tmp_path / "other.jsonl", missing)
    ran = cli.run(
        "run",
        tmp_path / "other.jsonl",
        "--out",
        tmp_path / "o.jsonl",
        "--pools",
        tmp_path / "pools.yaml",
        env={"MAIN_KEY": "k"},
    )
    assert ran.code == 2
    assert "which no pool takes" in ran.err


# ---------------------------------------------------------------- what others see of it


class Hook(BaseHTTPRequestHandler):
    """A webhook that keeps what it is told."""

    told: list[dict[str, Any]]

    def do_POST(self) -> None:
        self.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    told: list[dict[str, Any]] = []
    server = HTTPServer(("127.0.0.1", 0), type("OneHook", (Hook,), {"told": told}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/secret-path", told
    server.shutdown()
    server.server_close()
    thread.join()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_metrics_textfile_and_messages(cli: Cli, tmp_path: Path, hook: tuple[str, list[dict[str, Any]]]) -> None:
    batch(tmp_path / "requests.jsonl", 100)
    url, told = hook
    port = free_port()
    with provider(latency=SLOW, events=[{"kind": "throttled", "attempts": 1, "times": 3}]) as served:
        args = run_args(tmp_path, served.base_url, "--metrics-port", port, "--notify", url)
        args += ["--metrics-textfile", tmp_path / "m.prom"]
        process, journal = started(cli, tmp_path, *args, env={"OPENAI_MAX_CONCURRENCY": "2"})
        with held(cli, journal), urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT_S) as response:
            text = response.read().decode()
        ran = process.wait()
    assert ran.code == 0, ran.err
    names = ("active_concurrency", "next_slot_epoch", "stagger_delays_total", "tpm_window_deferrals_total")
    for name in names:
        assert f"contestra_openai_{name} " in text
    final = (tmp_path / "m.prom").read_text()
    assert "contestra_openai_active_concurrency 0.0" in final
    assert 'contestra_llm_rate_limit_events_total{vendor="openai"} 3.0' in final
    assert [each["event"] for each in told] == ["finished"]
    assert told[0]["text"].startswith("paceline: 100 of 100 done")
    assert "secret-path" not in ran.err


def test_metrics_that_cannot_be_written_any_more_end_no_run(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 4)
    (tmp_path / "prom").mkdir()
    with provider(latency=SLOW | {"first_token_s": 1.0}) as served:
        process = cli.start(*run_args(tmp_path, served.base_url, "--metrics-textfile", tmp_path / "prom" / "m.prom"))
        until("the first request", lambda: served.stats()["requests"] > 0)
        # Before the first answer, so before the last writing of the metrics.
        shutil.rmtree(tmp_path / "prom")
        ran = process.wait()
    assert (ran.code, ran.err.count("the metrics cannot be written")) == (0, 1), ran.err
    check_whole(tmp_path, 4)


def test_a_run_that_falls_behind_says_so_with_the_reason(
    cli: Cli, tmp_path: Path, hook: tuple[str, list[dict[str, Any]]]
) -> None:
    batch(tmp_path / "requests.jsonl", 20)
    url, told = hook
    # 20 answers, one at a time, are forecast at about 1 s each; a stall holds them up for longer than all of that. At a
    # clock 100 times as fast this is over in seconds.
    quick = SLOW | {"first_token_s": 0.01}
    with provider(latency=quick, events=[{"kind": "stall", "stall_s": 2.5, "after_requests": 5, "times": 1}]) as served:
        args = run_args(tmp_path, served.base_url, "--notify", url, "--time-scale", "100")
        env = {"OPENAI_MAX_CONCURRENCY": "1", "OPENAI_REQUEST_TIMEOUT_SECONDS": "3600"}
        ran = cli.run(*args, env=env)
    assert ran.code == 0, ran.err
    assert "later than forecast since" in ran.err
    assert told[0]["event"] == "late"


def test_logs_in_json_hold_no_prompt(cli: Cli, tmp_path: Path) -> None:
    write_batch(tmp_path / "requests.jsonl", [line(f"q-{i}", text="a very private question") for i in range(4)])
    with provider(events=[{"kind": "throttled", "attempts": 1, "retry_after_s": 0.01}]) as served:
        ran = cli.run(*run_args(tmp_path, served.base_url, "--log-format", "json"))
    assert ran.code == 0
    assert "private question" not in ran.err
    events = [json.loads(text) for text in ran.err.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "note"
    assert {kind: kinds.count(kind) for kind in ("launch", "throttled", "answer", "done")} == {
        "launch": 8,
        "throttled": 4,
        "answer": 4,
        "done": 4,
    }
    assert all(event["request_id"].startswith("req_") for event in events if event["event"] == "answer")


def test_quiet_says_nothing_when_all_is_well(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 4)
    with provider() as served:
        ran = cli.run(*run_args(tmp_path, served.base_url, "--quiet", "--json"))
    assert (ran.code, ran.err) == (0, "")


# ---------------------------------------------------------------- preflight and doctor


def test_preflight_strict_and_paced(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 10)
    guardrails = {"OPENAI_TPM_LIMIT": "30000", "OPENAI_CHARGE_RULE": "fixed", "OPENAI_TPM_WINDOW": "fixed"}
    path = tmp_path / "requests.jsonl"
    env = {**guardrails, "OPENAI_API_KEY": ""}
    ran = cli.run("preflight", path, "--json", env=env)
    assert (ran.code, ran.json["ok"], ran.json["projected_tokens"], ran.json["budget_tokens"]) == (
        0,
        True,
        70_000,
        25_500,
    )
    assert ran.json["forecast_by"] == "simulation"
    strict = cli.run("preflight", path, "--mode", "strict", "--json", env=env)
    assert (strict.code, strict.json["code"], strict.json["max_runs_now"]) == (3, "BATCH_RATE_LIMITED", 3)
    late = cli.run("preflight", path, "--deadline", "10s", env=env)
    assert late.code == 3
    assert "the deadline is 10.0 s" in late.out
    refused = cli.run(*run_args(tmp_path, "http://127.0.0.1:9/v1"), env={**guardrails, "PREFLIGHT_MODE": "strict"})
    assert refused.code == 3
    assert "503 BATCH_RATE_LIMITED" in refused.err


def test_the_doctor_names_key_model_limits_and_what_disagrees(cli: Cli, tmp_path: Path) -> None:
    with provider(tpm=30_000, rpm=500) as served:
        ran = cli.run("doctor", "--base-url", served.base_url, env={"OPENAI_TPM_LIMIT": "90000"})
        assert ran.code == 0
        assert "key and model are good" in ran.out
        assert "TPM 30,000" in ran.out
        assert "OPENAI_TPM_LIMIT=90000 is higher: expect 429s, or set OPENAI_TPM_LIMIT=30000" in ran.out
        assert served.stats()["requests"] == 1
        found = cli.run("doctor", "--base-url", served.base_url, "--json").json["default"]
        assert (found["outcome"], found["limits"]["RPM"]["limit"]) == ("ok", 500.0)
    with provider(events=[{"kind": "unauthorized"}]) as served:
        ran = cli.run("doctor", "--base-url", served.base_url)
        assert ran.code == 4
        assert "does not answer: 401" in ran.out
    ran = cli.run("doctor", "--base-url", "http://127.0.0.1:9/v1")
    assert ran.code == 1
    ran = cli.run("doctor", env={"OPENAI_API_KEY": ""})
    assert (ran.code, "OPENAI_API_KEY is not set" in ran.err) == (2, True)
