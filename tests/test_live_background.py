"""Background responses in a run: created once, polled, resumed after a kill, cancelled on Ctrl-C when asked."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from governor.journal.journal import Journal
from sim.serving.server import ProviderThread
from tests.live import WAIT_S, Cli, lines_of, provider, run_args, shared_cli, write_batch

# Provider's seconds at a clock 20 times as fast.
SLOW = {"first_token_s": 60.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0}
ENV = {"OPENAI_MAX_CONCURRENCY": "10"}


@pytest.fixture(scope="module")
def cli() -> Cli:
    return shared_cli()


def jobs(count: int, **body: Any) -> list[dict[str, Any]]:
    given = {"model": "gpt-4o-mini", "input": "Think.", "background": True, "max_output_tokens": 50, **body}
    return [{"custom_id": f"b-{i}", "url": "/v1/responses", "body": given} for i in range(count)]


def created(served: ProviderThread, count: int) -> None:
    """Until the provider has so many background responses."""
    end = time.monotonic() + WAIT_S
    while len(served.provider.backgrounds.kept) < count:
        assert time.monotonic() < end, "never created"
        time.sleep(0.02)


def check(folder: Path, served: ProviderThread, count: int) -> None:
    """Each was answered, and by a response of its own that was created once."""
    found = lines_of(folder / "results.jsonl")
    ids = {each["response"]["body"]["id"] for each in found}
    assert len(found) == count
    assert ids <= set(served.provider.backgrounds.kept)
    assert {each["response"]["body"]["status"] for each in found} == {"completed"}


def test_they_are_created_once_and_polled_until_they_end(cli: Cli, tmp_path: Path) -> None:
    write_batch(tmp_path / "requests.jsonl", jobs(3))
    with provider(time_scale=20.0, latency=SLOW) as served:
        # A time-out goes by: an attempt that polls in vain creates nothing anew.
        args = run_args(tmp_path, served.base_url, "--quiet", "--time-scale", 20)
        ran = cli.run(*args, env=ENV | {"OPENAI_REQUEST_TIMEOUT_SECONDS": "40"})
        assert ran.code == 0, ran.err
        assert len(served.provider.backgrounds.kept) == 3
        check(tmp_path, served, 3)


def test_a_killed_run_asks_for_the_responses_that_it_had_created(cli: Cli, tmp_path: Path) -> None:
    write_batch(tmp_path / "requests.jsonl", jobs(4))
    with provider(time_scale=20.0, latency=SLOW) as served:
        args = run_args(tmp_path, served.base_url, "--quiet", "--time-scale", 20)
        process = cli.start(*args, env=ENV)
        created(served, 4)
        time.sleep(0.2)  # their ids are on the disk before they are asked for, a second of that clock later
        process.signal(signal.SIGKILL)
        process.wait()
        ran = cli.run(*args, env=ENV)
        assert ran.code == 0, ran.err
        assert len(served.provider.backgrounds.kept) == 4
        check(tmp_path, served, 4)


@pytest.mark.parametrize("cancels", [False, True])
def test_ctrl_c_leaves_them_or_cancels_them_as_asked(cli: Cli, tmp_path: Path, cancels: bool) -> None:
    write_batch(tmp_path / "requests.jsonl", jobs(2))
    with provider(time_scale=20.0, latency=SLOW) as served:
        more = ("--cancel-background",) if cancels else ()
        args = run_args(tmp_path, served.base_url, "--quiet", "--time-scale", 20, "--grace", "0.01s", *more)
        process = cli.start(*args, env=ENV)
        created(served, 2)
        time.sleep(0.2)
        process.signal(signal.SIGINT)
        ran = process.wait()
        assert ran.code == 130
        said = "2 background responses cancelled" if cancels else "2 background responses left with the provider"
        assert said in ran.err
        assert cli.run(*args, env=ENV).code == 0
        # Cancelled ones are created anew.
        assert len(served.provider.backgrounds.kept) == (4 if cancels else 2)
        check(tmp_path, served, 2)


def test_a_response_that_fails_goes_again_and_one_that_is_gone_does_not(cli: Cli, tmp_path: Path) -> None:
    write_batch(tmp_path / "requests.jsonl", jobs(2))
    with provider(time_scale=20.0, latency=SLOW) as served:
        process = cli.start(*run_args(tmp_path, served.base_url, "--quiet", "--time-scale", 20), env=ENV)
        created(served, 2)
        kept = served.provider.backgrounds.kept
        first, second = list(kept)
        kept[first].status, kept[first].body = 500, b'{"error": {"message": "broken", "code": "server_error"}}'
        del kept[second]
        assert process.wait().code == 1
    assert len(lines_of(tmp_path / "results.jsonl")) == 1
    (lost,) = lines_of(tmp_path / "results.errors.jsonl")
    assert lost["error"]["code"] == "UNREADABLE_ANSWER"
    with Journal.open(tmp_path / "results.journal.db") as journal:
        assert sorted(attempt.attempt for attempt in journal.attempts()) == [1, 1, 2]


def test_only_responses_may_be_in_the_background(cli: Cli, tmp_path: Path) -> None:
    lines = jobs(1, messages=[{"role": "user", "content": "Hi."}])
    lines[0]["url"] = "/v1/chat/completions"
    write_batch(tmp_path / "requests.jsonl", lines)
    ran = cli.run(*run_args(tmp_path, "http://127.0.0.1:9/v1"))
    assert ran.code == 2
    assert "only `paceline run` and /v1/responses know jobs in the background" in ran.err
