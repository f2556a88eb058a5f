"""The suite's own promises: one seed for all chance, and real data that cannot be missing unnoticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import random
from hypothesis import given, strategies as st

def test_fails_with_the_seed(seed):
    assert random.Random(seed).random() < 0, seed

def test_reads_real_data(data_file):
    assert data_file("trace.csv").read_text() == "rows"

drawn = []

@given(st.integers())
def test_hypothesis(number):
    drawn.append(number)

def test_prints_what_hypothesis_drew():
    print("drawn", drawn[:50])
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of its own beside a `shared` that is not there yet, with this suite's conftest."""
    tests = tmp_path / "project" / "tests"
    tests.mkdir(parents=True)
    (tests / "conftest.py").write_bytes((Path(__file__).parent / "conftest.py").read_bytes())
    (tests / "test_it.py").write_text(SUITE, encoding="utf-8")
    return tests.parent


def run(project: Path, **environment: str) -> str:
    # Of all plugins only the one that it is about: the others take seconds to load.
    plugins = ["-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin"]
    command = [sys.executable, "-m", "pytest", *plugins, "-rs", "-s", "tests"]
    env = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environment}
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=False, timeout=120)
    return done.stdout + done.stderr


def test_absent_data_skips_with_the_remedy(project: Path) -> None:
    out = run(project, PACELINE_TEST_SEED="5")
    assert "1 failed, 2 passed, 1 skipped" in out
    assert "no real data at ../shared/data: put it there, or name its folder in PACELINE_DATA" in out
    # Without `shared` even a CI machine may skip: a plain clone has no traces.
    assert "1 failed, 2 passed, 1 skipped" in run(project, PACELINE_TEST_SEED="5", CI="1")


def test_absent_data_fails_on_a_ci_machine_that_has_the_shared_folder(project: Path) -> None:
    data = project.parent / "shared" / "data"
    data.mkdir(parents=True)
    out = run(project, PACELINE_TEST_SEED="5", CI="1")
    assert "2 failed, 2 passed" in out
    assert "no real data at ../shared/data/trace.csv" in out
    (data / "trace.csv").write_text("rows", encoding="utf-8")
    assert "1 failed, 3 passed" in run(project, PACELINE_TEST_SEED="5", CI="1")


def test_another_folder_may_hold_the_data(project: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "trace.csv").write_text("rows", encoding="utf-8")
    assert "1 failed, 3 passed" in run(project, PACELINE_TEST_SEED="5", PACELINE_DATA=str(elsewhere))


def test_the_seed_is_printed_above_and_under_a_failure_and_repeats_hypothesis(project: Path) -> None:
    def drawn(out: str) -> list[str]:
        return [line for line in out.splitlines() if "drawn" in line]

    first, again, other = (run(project, PACELINE_TEST_SEED=text) for text in ("5", "5", "6"))
    assert first.count("PACELINE_TEST_SEED=5 repeats") == 2
    assert drawn(first) == drawn(again) != drawn(other)


@pytest.mark.parametrize("text", ["-1", "4294967296", "abc"])
def test_a_bad_seed_is_one_line(project: Path, text: str) -> None:
    out = run(project, PACELINE_TEST_SEED=text)
    assert f"PACELINE_TEST_SEED={text!r} is not a whole number from 0 to 4294967295" in out
    assert "Traceback" not in out
