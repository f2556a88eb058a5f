"""`paceline run --via batch` as a command against the synthetic provider over HTTP: killed, stopped, refused, resumed.

What happens at every other moment is tested in virtual time, in tests/governor/batchapi.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from governor.journal.journal import Journal
from tests.live import WAIT_S, Cli, batch, check_whole, line, provider, run_args, shared_cli, write_batch

REQUESTS = 40
SCALE = 200.0
# Waves of about a quarter of the requests; a batch takes half a second of the machine's time.
QUEUE = 1_000
API = {"queue_tokens": QUEUE, "turnaround_s": [100.0, 120.0]}
VIA = ("--via", "batch", "--batch-queue", QUEUE, "--time-scale", SCALE, "--quiet")


@pytest.fixture(scope="module")
def cli() -> Cli:
    return shared_cli()


def test_kill_9_at_random_moments_loses_nothing_and_submits_nothing_twice(cli: Cli, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    batch(tmp_path / "requests.jsonl", REQUESTS, seed=rng.randrange(10**6))
    kills = 0
    with provider(time_scale=SCALE, batch_api=API) as served:
        args = run_args(tmp_path, served.base_url, *VIA, "--json")
        for _ in range(6):
            # Right after a commit, the first of which fill the journal.
            ran = cli.start(*args, dies_after=rng.randint(3, 12)).wait()
            assert "Traceback" not in ran.err, ran.err
            if ran.code != 128 + signal.SIGKILL:
                break
            kills += 1
        ran = cli.run(*args)
        assert ran.code == 0, ran.err
        seen = served.stats()
    assert kills >= 2
    check_whole(tmp_path, REQUESTS)
    assert (ran.json["completed"], ran.json["failed"], seen["files"]) == (REQUESTS, 0, 0)
    with Journal.open(tmp_path / "results.journal.db") as journal:
        assert sum(seen["batches"].values()) == len(journal.waves())
        assert sum(1 for _ in journal.attempts()) == REQUESTS
        assert journal.counts().resent == 0


def test_ctrl_c_leaves_the_batches_to_the_provider_and_the_same_command_collects_them(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", REQUESTS)
    journal = tmp_path / "results.journal.db"
    slow = {"queue_tokens": 0, "turnaround_s": [3_000.0, 3_001.0]}
    with provider(time_scale=1_000.0, batch_api=slow) as served:
        args = run_args(tmp_path, served.base_url, "--via", "batch", "--time-scale", "1000")
        process = cli.start(*args)
        end = time.monotonic() + WAIT_S
        while not served.stats()["batches"]:
            assert time.monotonic() < end
            time.sleep(0.05)
        process.signal(signal.SIGINT)
        ran = process.wait()
        assert ran.code == 130
        assert "SIGINT: nothing more is submitted; 1 wave left with the provider" in ran.err
        status = cli.run("status", journal).out
        assert "wave 1     40 requests to gpt-4o-mini: submitted, batch batch_" in status
        assert "assumed turnaround" in status
        ran = cli.run(*run_args(tmp_path, served.base_url))
        assert ran.code == 2
        assert "1 batch with 40 requests of it went to the Batch API and are not collected: add --via batch" in ran.err
        ran = cli.run(*args)
        assert ran.code == 0, ran.err
        assert "40 in flight when the last process ended: looked for at the provider first" in ran.err
        assert served.stats()["batches"] == {"completed": 1}
    check_whole(tmp_path, REQUESTS)


@pytest.mark.parametrize(
    ("change", "options", "code", "said"),
    [
        ({"model": None}, (), 2, "request 1 ('q-1') names no model in its body: a Batch file is for one model"),
        ({"url": "/v1/moderations"}, (), 2, "url '/v1/moderations' is not supported"),
        ({"text": "x" * 9_000}, (), 2, "the limit is 850: shorten it, raise OPENAI_BATCH_QUEUE_TOKENS"),
        ({}, ("--finalize",), 2, "--finalize is for live runs: leave it out with --via batch"),
        ({}, ("--canary", "3"), 2, "--canary is for live runs"),
        ({}, ("--finish-by", "30m"), 3, "held back by the Batch API's queue and turnaround"),
        ({}, ("--max-cost", "0.0000001"), 5, "--max-cost $1e-07: $0.00 spent: nothing more is submitted"),
    ],
)
def test_what_cannot_go_there_is_said_in_one_line(
    cli: Cli, tmp_path: Path, change: dict[str, str], options: tuple[str, ...], code: int, said: str
) -> None:
    lines = [line(f"q-{i}") for i in range(3)]
    lines[1]["url"] = change.get("url", lines[1]["url"])
    lines[1]["body"]["messages"][0]["content"] = change.get("text", "short")
    if "model" in change:
        del lines[1]["body"]["model"]
    write_batch(tmp_path / "requests.jsonl", lines)
    with provider(time_scale=SCALE, batch_api=API) as served:
        ran = cli.run(*run_args(tmp_path, served.base_url, *VIA, *options))
        assert (ran.code, served.stats()["batches"]) == (code, {})
    assert said in ran.err
    assert len(ran.err.splitlines()) == 1


def test_two_models_and_endpoints_share_no_file(cli: Cli, tmp_path: Path) -> None:
    lines = [line(f"q-{i}", model=("gpt-4o", "gpt-4o-mini")[i % 2]) for i in range(6)]
    lines.append({"custom_id": "q-6", "url": "/v1/embeddings", "body": {"model": "gpt-4o", "input": ["a", "b"]}})
    write_batch(tmp_path / "requests.jsonl", lines)
    with provider(time_scale=1_000.0, batch_api={"turnaround_s": [100.0, 120.0]}) as served:
        ran = cli.run(*run_args(tmp_path, served.base_url, "--via", "batch", "--time-scale", "1000", "--keep-files"))
        assert ran.code == 0, ran.err
        # An input and an output file of each.
        assert (served.stats()["batches"], served.stats()["files"]) == ({"completed": 3}, 6)
    check_whole(tmp_path, 7)


# ---------------------------------------------------------------- a Batch API of others


@pytest.mark.long
def test_our_client_works_against_an_independent_mock(cli: Cli, tmp_path: Path) -> None:
    """aimock, from npm: its batches advance with each poll."""
    npx = shutil.which("npx")
    assert npx is not None, "this proof needs node"
    (tmp_path / "fixtures.json").write_text(json.dumps({"fixtures": []}))
    command = [npx, "--yes", "--package", "@copilotkit/aimock@1.43.0", "llmock"]
    command += ["--port", "0", "--fixtures", "fixtures.json"]
    # In a group of its own: npx does not pass on that it is ended.
    mock = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert mock.stdout is not None
        url = next(text.split()[-1] for text in mock.stdout if "listening on" in text)
        batch(tmp_path / "requests.jsonl", REQUESTS)
        ran = cli.run(*run_args(tmp_path, f"{url}/v1", *VIA))
        assert ran.code == 0, ran.err
        check_whole(tmp_path, REQUESTS)
    finally:
        os.killpg(mock.pid, signal.SIGKILL)
        mock.wait()
        mock.stdout.close()
