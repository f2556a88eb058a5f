"""`paceline run` from end to end on loopback, with the official SDK: results, exit codes, what is refused and why."""

from __future__ import annotations

import itertools
import json
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from governor.forecast.summary import Summary
from governor.journal.journal import Journal
from governor.model.policy import KNOBS
from governor.model.requests import Outcome
from sim.model.provider_config import ProviderConfig
from sim.serving.server import serve
from tests.live import KEY, Cli, batch, check_whole, line, lines_of, provider, run_args, shared_cli, write_batch


@pytest.fixture(scope="module")
def cli() -> Cli:
    return shared_cli()


def test_a_batch_becomes_results_in_the_batch_format_and_order(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 40)
    with provider() as served:
        ran = cli.run(*run_args(tmp_path, served.base_url))
        stats = served.stats()
    assert ran.code == 0, ran.err
    check_whole(tmp_path, 40)
    results = lines_of(tmp_path / "results.jsonl")
    assert [each["custom_id"] for each in results] == [f"q-{i}" for i in range(40)]
    first = results[0]
    assert set(first) == {"id", "custom_id", "response", "error"}
    assert set(first["response"]) == {"status_code", "request_id", "body"}
    assert first["response"]["body"]["choices"][0]["message"]["content"]
    assert (tmp_path / "results.errors.jsonl").read_text() == ""
    assert (stats["requests"], stats["retry_counts"]) == (40, {"0": 40})
    assert (tmp_path / "results.journal.db").stat().st_mode & 0o777 == 0o600
    assert "done                40 of 40" in ran.out


def test_json_has_the_summary_s_keys_and_nothing_else_on_stdout(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 10)
    with provider() as served:
        ran = cli.run(*run_args(tmp_path, served.base_url, "--json"))
    found = ran.json
    assert list(found) == list(Summary.__slots__)
    assert (found["requests"], found["completed"], found["attempts"]) == (10, 10, 10)
    bodies = [each["response"]["body"]["usage"] for each in lines_of(tmp_path / "results.jsonl")]
    # gpt-4o-mini: $0.15 and $0.60 per million tokens in the list that comes with Paceline.
    bill = sum(usage["prompt_tokens"] * 0.15 + usage["completion_tokens"] * 0.60 for usage in bodies) / 1e6
    assert found["cost_usd"] == pytest.approx(bill, rel=1e-9)
    assert found["used_tokens"] == sum(usage["total_tokens"] for usage in bodies)


def test_the_same_command_again_sends_nothing(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 8)
    with provider() as served:
        args = run_args(tmp_path, served.base_url, "--json")
        first = cli.run(*args)
        (tmp_path / "results.jsonl").unlink()
        again = cli.run(*args)
        assert served.stats()["requests"] == 8
    assert again.code == 0
    assert "nothing is left to send" in again.err
    assert again.json == first.json
    check_whole(tmp_path, 8)


def test_failures_go_into_the_errors_file_and_can_be_tried_again(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 12)
    faults = {"kind": "throttled", "times": 9}  # an answer, so no outage
    env = {"OPENAI_RETRY_MAX_ATTEMPTS": "1"}
    with provider(events=[faults]) as served:
        args = run_args(tmp_path, served.base_url, "--json")
        ran = cli.run(*args, env=env)
        assert ran.code == 1
        assert ran.json["failures"] == {"OPENAI_RATE_LIMIT_EXHAUSTED": 9}
        check_whole(tmp_path, 12)
        errors = lines_of(tmp_path / "results.errors.jsonl")
        assert {each["error"]["code"] for each in errors} == {"OPENAI_RATE_LIMIT_EXHAUSTED"}
        assert all(each["response"]["status_code"] == 429 for each in errors)
        # Another code: nothing is sent again.
        unknown = cli.run(*args, "--retry-failed=BAD", env=env)
        assert (unknown.code, "'BAD' is not a failure code: use one of OPENAI_RATE" in unknown.err) == (2, True)
        other = cli.run(*args, "--retry-failed=BAD_REQUEST", env=env)
        assert (other.code, served.stats()["requests"]) == (1, 12)
        mended = cli.run(*args, "--retry-failed", env=env)
        assert served.stats()["requests"] == 21
    assert mended.code == 0
    assert mended.json["completed"] == 12
    check_whole(tmp_path, 12)
    assert (tmp_path / "results.errors.jsonl").read_text() == ""


def test_forced_429s_are_retried_and_five_of_them_end_a_request(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 6)
    with provider(events=[{"kind": "throttled", "attempts": 2}]) as served:
        ran = cli.run(*run_args(tmp_path, served.base_url, "--json"))
        assert served.stats()["requests"] == 18
    assert ran.code == 0
    assert (ran.json["throttled"], ran.json["attempts"]) == (12, 18)
    write_batch(tmp_path / "two.jsonl", [line("q-0"), line("q-1")])
    # Where nothing says when to come back, the last attempt comes a minute after the first: here within a second.
    with provider(events=[{"kind": "throttled"}], time_scale=60.0) as served:
        args = ("--out", tmp_path / "two", "--base-url", served.base_url, "--json", "--time-scale", "60")
        ran = cli.run("run", tmp_path / "two.jsonl", *args)
        assert served.stats()["requests"] == 10
    assert ran.code == 1
    assert ran.json["failures"] == {"OPENAI_RATE_LIMIT_EXHAUSTED": 2}


def test_the_guardrails_hold_live(cli: Cli, tmp_path: Path) -> None:
    """Their own checklist, at a clock 100 times as fast: three in flight, a stagger of 15 s +- 3 s, retries counted."""
    batch(tmp_path / "requests.jsonl", 10)
    guardrails = {knob.env: knob.text(knob.guardrails) for knob in KNOBS}
    slow = {"first_token_s": 40.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0}
    with provider(latency=slow, time_scale=100.0, events=[{"kind": "throttled", "times": 2}]) as served:
        args = run_args(tmp_path, served.base_url, "--json", "--time-scale", "100")
        ran = cli.run(*args, env=guardrails)
        assert served.stats()["in_flight_max"] <= 3
    assert ran.code == 0, ran.err
    found = ran.json
    assert (found["peak_in_flight"] <= 3, found["throttled"], found["attempts"]) == (True, 2, 12)
    assert found["stagger_delays"] > 0
    with Journal.open(tmp_path / "results.journal.db") as journal:
        launches = sorted(a.launched_s for a in journal.attempts() if a.attempt == 1)
    gaps = [later - earlier for earlier, later in itertools.pairwise(launches)]
    assert min(gaps) >= 12.0
    assert found["makespan_s"] >= 9 * 12.0


@pytest.mark.parametrize(("deadline_s", "code", "requests"), [("0", 0, 6), ("0.5", 1, 5)])
def test_a_stated_wait_is_obeyed_or_ended_by_the_deadline_and_never_hammered(
    cli: Cli, tmp_path: Path, deadline_s: str, code: int, requests: int
) -> None:
    batch(tmp_path / "requests.jsonl", 5)
    with provider(events=[{"kind": "throttled", "retry_after_s": 1.0, "times": 1}]) as served:
        env = {"OPENAI_HOLD_ON_THROTTLE": "true", "OPENAI_MAX_CONCURRENCY": "1", "OPENAI_DEADLINE_SECONDS": deadline_s}
        ran = cli.run(*run_args(tmp_path, served.base_url, "--json"), env=env)
        assert served.stats()["requests"] == requests
    assert ran.code == code
    found = ran.json
    if code == 0:
        assert (found["waits_s"]["backoff"] >= 1.0, found["makespan_s"] >= 1.0) == (True, True)
    else:
        # Nobody launches in the half second in which the request might still have been tried again.
        assert found["failures"] == {"OPENAI_DEADLINE_EXCEEDED": 1}
        assert found["makespan_s"] >= 0.5


def test_a_daily_limit_that_nobody_configured_is_obeyed(cli: Cli, tmp_path: Path) -> None:
    """200 requests per day, 197 of them used: three at once, then one in 432 s, and a 429 for each wait at the most."""
    batch(tmp_path / "requests.jsonl", 6)
    scale = 400.0
    daily = ProviderConfig().with_(
        tpm=0,
        rpd=200,
        day_requests_used=197,
        retry_after="seconds",
        failed_requests_count=False,
        latency={"first_token_s": 2.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0},
    )
    env = {"OPENAI_MAX_CONCURRENCY": "1", "OPENAI_HOLD_ON_THROTTLE": "true", "OPENAI_BACKOFF_BASE_SECONDS": "2"}
    with serve(daily, time_scale=scale, stated_time="provider") as served:
        ran = cli.run(*run_args(tmp_path, served.base_url, "--json", "--time-scale", f"{scale:g}"), env=env)
        outcomes = served.stats()["outcomes"]
    assert ran.code == 0, ran.err
    assert outcomes["ok"] == 6
    assert 1 <= outcomes["throttled"] <= 3
    with Journal.open(tmp_path / "results.journal.db") as journal:
        attempts = sorted(journal.attempts(), key=lambda a: a.launched_s)
    for before, after in itertools.pairwise(attempts):
        if before.outcome is Outcome.THROTTLED:
            assert before.retry_after_s > 300.0
            assert after.launched_s >= before.finished_s + before.retry_after_s
    # The last of three waits began when the second request of the day came back.
    assert ran.json["makespan_s"] >= 2 * 432.0


# ---------------------------------------------------------------- the account refuses


@pytest.mark.parametrize("kind", ["quota", "unauthorized"])
def test_a_refused_account_stops_the_run_after_those_in_flight(cli: Cli, tmp_path: Path, kind: str) -> None:
    batch(tmp_path / "requests.jsonl", 60)
    env = {"OPENAI_MAX_CONCURRENCY": "5"}
    with provider(events=[{"kind": kind, "after_requests": 20}]) as served:
        args = run_args(tmp_path, served.base_url, "--json")
        ran = cli.run(*args, env=env)
        stats = served.stats()
    assert ran.code == 4
    assert not (tmp_path / "results.jsonl").exists()
    # One attempt each for those then in flight, none after.
    assert stats["requests"] <= 20 + 5
    assert stats["came_again"] == 0
    found = ran.json
    assert found["failed"] == 0
    assert 15 <= found["completed"] <= 20
    assert ("quota is used up" if kind == "quota" else "the key or the model was rejected") in ran.err
    with provider() as served:
        mended = cli.run(*run_args(tmp_path, served.base_url, "--json"), env=env)
        assert served.stats()["requests"] == 60 - found["completed"]
    assert mended.code == 0
    check_whole(tmp_path, 60)


# ---------------------------------------------------------------- before anything is sent


def test_a_missing_key_says_which_variable(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 3)
    args = ["run", tmp_path / "requests.jsonl", "--out", tmp_path / "results.jsonl"]
    ran = cli.run(*args, env={"OPENAI_API_KEY": ""})
    assert ran.code == 2
    assert ran.err.startswith("OPENAI_API_KEY is not set")
    assert list(tmp_path.iterdir()) == [tmp_path / "requests.jsonl"]


def test_a_key_may_stand_in_the_env_file_and_goes_nowhere(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 3)
    (tmp_path / "my.env").write_text(f"OPENAI_API_KEY={KEY}\nOPENAI_STAGGER_SECONDS=0\nOTHER_SECRET=hunter2\n")
    with provider() as served:
        args = run_args(tmp_path, served.base_url, "--env-file", tmp_path / "my.env", "--log-format", "json")
        ran = cli.run(*args, env={"OPENAI_API_KEY": ""})
    assert ran.code == 0
    for path in tmp_path.iterdir():
        if path.name != "my.env":
            assert KEY.encode() not in path.read_bytes()
            assert b"hunter2" not in path.read_bytes()


def test_an_oversized_request_refuses_the_run_or_is_left_out(cli: Cli, tmp_path: Path) -> None:
    lines = [line("q-0"), line("q-1", text="x" * 200_000), line("q-2")]
    write_batch(tmp_path / "requests.jsonl", lines)
    env = {"OPENAI_TPM_LIMIT": "30000"}
    with provider(tpm=30_000) as served:
        args = run_args(tmp_path, served.base_url, "--json")
        ran = cli.run(*args, env=env)
        assert ran.code == 2
        assert "request 1 ('q-1') needs 50,0" in ran.err
        assert "the limit is 30,000" in ran.err
        assert [path.name for path in tmp_path.iterdir()] == ["requests.jsonl"]
        ran = cli.run(*args, "--skip-oversized", env=env)
        assert served.stats()["requests"] == 2
    assert ran.code == 1
    assert ran.json["failures"] == {"REQUEST_TOO_LARGE": 1}
    check_whole(tmp_path, 3)
    (error,) = lines_of(tmp_path / "results.errors.jsonl")
    assert (error["custom_id"], error["response"]) == ("q-1", None)
    # What is refused before the start leaves the record of the failure as it is.
    assert cli.run(*args, "--retry-failed", env=env).code == 2
    with Journal.open(tmp_path / "results.journal.db") as journal:
        assert journal.counts().failures == {"REQUEST_TOO_LARGE": 1}


def test_a_forecast_past_a_day_or_finish_by_refuses(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 300)
    env = {"OPENAI_STAGGER_SECONDS": "600"}
    with provider() as served:
        args = run_args(tmp_path, served.base_url)
        ran = cli.run(*args, env=env)
        assert ran.code == 3
        assert "held back by OPENAI_STAGGER_SECONDS=600" in ran.err
        assert "more than a day" in ran.err
        assert [path.name for path in tmp_path.iterdir()] == ["requests.jsonl"]
        ran = cli.run(*args, "--finish-by", "30s", env={"OPENAI_STAGGER_SECONDS": "1"})
        assert ran.code == 3
        assert "--finish-by allows 30 s" in ran.err
        ran = cli.run(*args, "--finish-by", "soon")
        assert ran.code == 2
        assert "--finish-by 'soon' is not a duration" in ran.err


def test_a_journal_of_another_input_and_results_of_another_run_are_refused(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 3)
    with provider() as served:
        args = run_args(tmp_path, served.base_url)
        assert cli.run(*args).code == 0
        (tmp_path / "precious.jsonl").write_text("somebody's\n")
        elsewhere = [*args, "--journal", tmp_path / "results.journal.db", "--out", tmp_path / "precious.jsonl"]
        ran = cli.run(*elsewhere)
        assert (ran.code, "is not what" in ran.err) == (2, True)
        assert (tmp_path / "precious.jsonl").read_text() == "somebody's\n"
        assert cli.run(*elsewhere, "--overwrite").code == 0
        (tmp_path / "precious.jsonl").write_bytes((tmp_path / "results.jsonl").read_bytes()[:30])  # cut by a crash
        assert cli.run(*elsewhere).code == 0
        assert (tmp_path / "precious.jsonl").read_bytes() == (tmp_path / "results.jsonl").read_bytes()
        # With a line in common it would be the same batch, corrected.
        write_batch(tmp_path / "requests.jsonl", [line(f"other-{i}") for i in range(4)])
        ran = cli.run(*args)
        assert ran.code == 2
        assert "it belongs to another input" in ran.err
        (tmp_path / "results.journal.db").unlink()
        ran = cli.run(*args)
        assert ran.code == 2
        assert "add --overwrite" in ran.err
        assert cli.run(*args, "--overwrite").code == 0
    assert [each["custom_id"] for each in lines_of(tmp_path / "results.jsonl")] == [f"other-{i}" for i in range(4)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no requests in it"),
        ('{"custom_id": "a"}\n', ":1: url is missing"),
        (json.dumps(line("a")) + "\n" + json.dumps(line("a")) + "\n", ":2: custom_id 'a' stands on line 1 already"),
        (json.dumps(line("a") | {"body": {"stream": True}}) + "\n", "cannot stream"),
        (json.dumps(line("a") | {"body": {"background": True}}) + "\n", ":1: body.background is True"),
        ("{\n", ":1: not JSON"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_left_behind(cli: Cli, tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "requests.jsonl").write_text(text)
    ran = cli.run(*run_args(tmp_path, "http://127.0.0.1:9/v1"))
    assert ran.code == 2
    assert complaint in ran.err
    assert ran.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["requests.jsonl"]


def test_other_slips_of_the_command_line(cli: Cli, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    batch(tmp_path / "requests.jsonl", 3)
    taken = socket.create_server(("127.0.0.1", 0))
    request.addfinalizer(taken.close)
    url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    for more, complaint in (
        (["--set", "OPENAI_TPM_LIMT=1"], "did you mean OPENAI_TPM_LIMIT?"),
        (["--tpm", "many"], "--tpm 'many' is not a whole number"),
        (["--prices", tmp_path / "none.yaml"], "there is no such file"),
        (["--pools", tmp_path / "none.yaml"], "--base-url is for a run without --pools"),
        (["--notify", "nowhere"], "--notify is not an address"),
        (["--journal", tmp_path / "no" / "j.db"], "there is no folder"),
        (["--max-cost", "1", "--prices", _prices(tmp_path)], "--max-cost needs a price for model 'gpt-4o-mini'"),
        (["--base-url", ""], "--base-url is empty"),
        (["--base-url", "http://127.0.0.1:99999/v1"], "'http://127.0.0.1:99999/v1' is not an address"),
        # One file for two purposes: what is written last would take the place of the other.
        (["--journal", tmp_path / "results.jsonl"], "results.jsonl: --out and --journal are one file: name another"),
        (
            ["--metrics-textfile", tmp_path / "requests.jsonl"],
            "requests.jsonl: the input and --metrics-textfile are one",
        ),
        (["--overwrite", "--out", tmp_path / "requests.jsonl"], "the input and --out are one file"),
        (["--metrics-textfile", tmp_path / "no" / "m.prom"], "cannot be written: there is no folder"),
        # Found when the run begins: nothing was sent, so nothing is left.
        (["--metrics-port", urlsplit(url).port], "--metrics-port"),
    ):
        ran = cli.run(*run_args(tmp_path, url, *more))
        assert ran.code == 2, (more, ran.err)
        assert complaint in ran.err, (more, ran.err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prices.yaml", "requests.jsonl"]
    named = batch(tmp_path / "r.errors.jsonl", 3)
    ran = cli.run("run", named, "--out", tmp_path / "r.jsonl", "--base-url", url, "--overwrite")
    assert (ran.code, "r.errors.jsonl: the input and the errors file are one" in ran.err) == (2, True)
    ran = cli.run("run", tmp_path / "none.jsonl", "--out", tmp_path / "results.jsonl", "--base-url", url)
    assert (ran.code, "there is no such file" in ran.err) == (2, True)


def _prices(folder: Path) -> Path:
    path = folder / "prices.yaml"
    path.write_text("models: {other: {input: 1, output: 1}}\n")
    return path


# ---------------------------------------------------------------- bad weather


def test_an_unreachable_base_url_fails_after_its_retries_with_a_line_each(cli: Cli, tmp_path: Path) -> None:
    """One request alone is no outage. (Of several, none of which is answered, see `test_live_outage`.)"""
    batch(tmp_path / "requests.jsonl", 1)
    args = run_args(tmp_path, "http://127.0.0.1:9/v1", "--json")
    ran = cli.run(*args, env={"OPENAI_RETRY_MAX_ATTEMPTS": "3", "OPENAI_BACKOFF_BASE_SECONDS": "0.01"})
    assert ran.code == 1
    assert (ran.json["attempts"], ran.json["failures"]) == (3, {"OPENAI_CONNECTION_DROPPED": 1})
    check_whole(tmp_path, 1)
    for each in lines_of(tmp_path / "results.errors.jsonl"):
        assert each["response"] is None
        assert "127.0.0.1:9" in each["error"]["message"]


@pytest.mark.parametrize(("kind", "attempts"), [("malformed", 1), ("truncate", 2), ("drop", 2), ("overloaded", 2)])
def test_broken_answers_are_failures_and_never_a_traceback(cli: Cli, tmp_path: Path, kind: str, attempts: int) -> None:
    """What did not arrive is asked for again; what did, and cannot be read, is paid for and never bought again.

    It is one request, since several that are not answered are an outage.
    """
    batch(tmp_path / "requests.jsonl", 1)
    with provider(events=[{"kind": kind}]) as served:
        ran = cli.run(*run_args(tmp_path, served.base_url, "--json"), env={"OPENAI_RETRY_MAX_ATTEMPTS": "2"})
    assert ran.code == 1
    assert (ran.json["failed"], ran.json["attempts"]) == (1, attempts)
    check_whole(tmp_path, 1)


@pytest.mark.parametrize(
    ("wait_s", "failure", "told"),
    [
        (114 * 3600, "OPENAI_RATE_LIMIT_EXHAUSTED", ("asks to wait 4 d 18 h, until ", "CAP_SECONDS=600")),
        (300, "OPENAI_DEADLINE_EXCEEDED", ("asks to wait 5 min, until ", "OPENAI_DEADLINE_SECONDS=1")),
    ],
)
def test_a_wait_that_no_request_outlives_ends_it_and_is_reported(
    cli: Cli, tmp_path: Path, wait_s: float, failure: str, told: tuple[str, ...]
) -> None:
    batch(tmp_path / "requests.jsonl", 3)
    with provider(events=[{"kind": "throttled", "retry_after_s": wait_s, "times": 1}]) as served:
        env = {"OPENAI_DEADLINE_SECONDS": "1", "OPENAI_HOLD_ON_THROTTLE": "true", "OPENAI_MAX_CONCURRENCY": "1"}
        ran = cli.run(*run_args(tmp_path, served.base_url, "--json"), env=env)
        assert served.stats()["requests"] == 3
    assert ran.code == 1
    assert ran.json["failures"] == {failure: 1}
    assert all(words in ran.err for words in told), ran.err
    assert ran.err.count("asks to wait") == 1


def test_limits_that_are_not_as_the_settings_say_are_told_once(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 20)
    with provider(tpm=5_000_000, rpm=100_000) as served:
        env = {"OPENAI_TPM_LIMIT": "10000000", "OPENAI_RPM_LIMIT": "100000"}
        ran = cli.run(*run_args(tmp_path, served.base_url), env=env)
    assert ran.code == 0
    assert ran.err.count("the account grants 5,000,000 tokens per minute, OPENAI_TPM_LIMIT=10000000 is higher") == 1
    assert "OPENAI_RPM_LIMIT" not in ran.err
