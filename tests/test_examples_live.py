"""The examples run as they stand, each against the synthetic provider, and fit on one screen."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import pytest
import yaml

from tests.live import FREE, KEY, ROOT, WAIT_S, provider
from tests.servers import RedisServer, free_port

EXAMPLES = ROOT / "examples"
SCREEN = 72


def ran(name: str, *words: str, cwd: Path = ROOT, **settings: str) -> list[str]:
    """The lines that an example prints."""
    ours = ("OPENAI_", "AZURE_", "FINALIZE_", "PREFLIGHT_", "PACELINE_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    environment = {**kept, **FREE, "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY, **settings}
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *words]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert cwd != ROOT or not done.stderr, done.stderr  # a batch shows its progress there
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["asyncio_program.py", "any_callable.py"])
def test_refused_at_first_and_answered_all_the_same(name: str) -> None:
    # The first three attempts are turned away.
    with provider(events=[{"kind": "throttled", "times": 3, "retry_after_s": 0.05}]) as server:
        lines = ran(name, OPENAI_BASE_URL=server.base_url)
        seen = server.stats()
    assert len(lines) == 10
    assert all(line and line != "None" for line in lines)
    # Ten answers and three refusals: nothing is sent twice for any other reason.
    assert seen["requests"] == 13
    assert seen["outcomes"]["ok"] == 10


def test_each_model_goes_to_its_own_quota(tmp_path: Path) -> None:
    with provider() as azure, provider() as gateway:
        stated = yaml.safe_load((EXAMPLES / "azure_pools.yaml").read_text())
        stated["pools"][0]["azure"]["endpoint"] = azure.url
        stated["pools"][1]["base_url"] = gateway.base_url
        path = tmp_path / "pools.yaml"
        path.write_text(yaml.safe_dump(stated))
        lines = ran("azure_or_compatible.py", str(path), AZURE_OPENAI_API_KEY=KEY, GATEWAY_API_KEY=KEY)
    assert [line.split()[0] for line in lines] == ["ok", "ok", "ok"]


def test_without_a_pools_file_all_go_to_the_base_url() -> None:
    with provider() as server:
        lines = ran("azure_or_compatible.py", OPENAI_BASE_URL=server.base_url)
    assert [line.split()[0] for line in lines] == ["ok", "ok", "ok"]


def test_a_frame_is_answered_and_answered_from_the_journal(tmp_path: Path) -> None:
    with provider() as server:
        for _ in range(2):
            lines = ran("batch_of_a_frame.py", cwd=tmp_path, OPENAI_BASE_URL=server.base_url)
            assert [line.split()[0] for line in lines[-3:]] == ["r1", "r2", "r3"]
        assert server.stats()["requests"] == 3


@contextmanager
def served(folder: Path, **settings: str) -> Iterator[str]:
    """The address of the backend under two workers, each a process."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "examples.fastapi_app:app", "--workers", "2", "--port", str(port)]
    metrics = folder / "metrics"
    metrics.mkdir()
    environment = {**os.environ, **FREE, "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY, **settings}
    environment["PROMETHEUS_MULTIPROC_DIR"] = str(metrics)
    with (folder / "said.txt").open("wb") as said:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=said, stderr=said)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(int(WAIT_S / 0.1)):
            with suppress(httpx2.TransportError):
                httpx2.get(f"{address}/openapi.json")
                break
            assert process.poll() is None, (folder / "said.txt").read_text()
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(WAIT_S)


def figures(address: str) -> dict[str, float]:
    """The five metrics of the guardrails, over all workers."""
    text = httpx2.get(f"{address}/metrics/").text
    samples = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("contestra_")]
    return {name.removeprefix("contestra_").partition("{")[0]: float(value) for name, value in samples}


@pytest.mark.slow
def test_a_backend_under_two_workers_shares_one_quota_and_shows_its_metrics(tmp_path: Path) -> None:
    redis = RedisServer()
    # Until the first answer tells of the limit, half of it is kept free: some wait for tokens, none for long.
    slow = {"first_token_s": 0.3, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0}
    refusals = [{"kind": "throttled", "times": 2, "retry_after_s": 0.05}]
    paths = [f"/{kind}?prompt=n{n}" for kind in ("ask", "stream", "tools", "blocking") for n in range(3)]
    settings = {"OPENAI_STAGGER_SECONDS": "0.01", "OPENAI_CHARGE_RULE": "prompt_plus_max", "MODEL": "gpt-4o+tools"}
    settings |= {
        "OPENAI_SYNC_HEADERS": "true",
        "OPENAI_TPM_LIMIT": "4500",
        "OPENAI_TPM_HEADROOM": "0",
        "PACELINE_REDIS_URL": redis.url,
    }
    with (
        provider(latency=slow, events=refusals, tpm=100_000) as server,
        served(tmp_path, OPENAI_BASE_URL=server.base_url, **settings) as address,
        ThreadPoolExecutor(len(paths) + 1) as pool,
    ):
        calls = [pool.submit(httpx2.get, f"{address}{path}", timeout=WAIT_S) for path in [*paths, "/embed?text=a"]]
        most = 0.0
        while not all(call.done() for call in calls):
            most = max(most, figures(address).get("openai_active_concurrency", 0.0))
        answers = [call.result() for call in calls]
        idle = figures(address)
        requests = server.stats()["requests"]
    redis.stop()
    assert [answer.status_code for answer in answers] == [200] * len(answers), answers[0].text
    assert all(len(answer.text) > 2 for answer in answers)
    assert requests == len(paths) + 1 + 3 + 2, "each tool loop asks twice, and two calls were refused at first"
    assert most > 0.0
    assert idle["openai_active_concurrency"] == 0.0
    assert idle["openai_next_slot_epoch"] > 1e9
    assert idle["llm_rate_limit_events_total"] == 2.0
    assert min(idle["openai_stagger_delays_total"], idle["openai_tpm_window_deferrals_total"]) >= 1.0


def test_four_lines_of_a_backend_govern_it() -> None:
    source = (EXAMPLES / "fastapi_app.py").read_text()
    assert 0 < source.count("  # governed") <= 4


@pytest.mark.parametrize("name", ["asyncio_program.py", "any_callable.py", "azure_or_compatible.py"])
def test_fits_on_one_screen(name: str) -> None:
    lines = (EXAMPLES / name).read_text().splitlines()
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= 120
