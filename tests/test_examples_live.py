"""The examples run as they stand, each against the synthetic provider, and fit on one screen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.live import FREE, KEY, ROOT, provider

EXAMPLES = ROOT / "examples"
SCREEN = 72


def ran(name: str, *words: str, cwd: Path = ROOT, **settings: str) -> list[str]:
    """The lines that an example prints."""
    ours = ("OPENAI_", "AZURE_", "FINALIZE_", "PREFLIGHT_", "PACELINE_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    environment = {**kept, **FREE, "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY, **settings}
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)
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


@pytest.mark.parametrize("name", ["asyncio_program.py", "any_callable.py", "azure_or_compatible.py"])
def test_fits_on_one_screen(name: str) -> None:
    lines = (EXAMPLES / name).read_text().splitlines()
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= 120
