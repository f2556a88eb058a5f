"""What every test shares: one printed seed, hypothesis' profile, and the folder of real traces.

One number repeats a whole run: PACELINE_TEST_SEED, drawn where it is not given, feeds the fixture `seed` and hypothesis
alike. It stands in the header of the run and again under each failed test that used it.

Real data lies beside the project in `../shared/data` (PACELINE_DATA names another folder). A test that wants it skips,
with the reason, where it is absent; on a CI machine that has `../shared` a missing file is a failure, because a suite
that quietly skips its evidence proves nothing.
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hypothesis
import pytest

from tests.postgres import PostgresServer

ROOT = Path(__file__).resolve().parent.parent
SEED_NAME = "PACELINE_TEST_SEED"
DATA_NAME = "PACELINE_DATA"

# No deadline: a shared CI machine may pause for longer than any example takes.
hypothesis.settings.register_profile("paceline", deadline=None, print_blob=True)
hypothesis.settings.register_profile("thorough", deadline=None, print_blob=True, max_examples=2_000)
hypothesis.settings.load_profile("paceline")


def run_seed() -> int:
    """The seed of this run, 0 to 2**32 - 1; drawn once and left in the environment for pytest-xdist's workers."""
    text = os.environ.get(SEED_NAME) or str(secrets.randbits(32))
    os.environ[SEED_NAME] = text
    if not text.isdecimal() or int(text) >= 2**32:
        raise pytest.UsageError(f"{SEED_NAME}={text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def data_folder(environment: Mapping[str, str], root: Path) -> Path:
    """Where the real traces lie, or would lie: PACELINE_DATA, else `../shared/data` beside the project's root."""
    return Path(environment.get(DATA_NAME) or root.parent / "shared" / "data")


def absence_fails(environment: Mapping[str, str], root: Path) -> bool:
    """Whether missing data is a failure: on CI, where the shared folder is there and so the data should be."""
    return bool(environment.get("CI")) and (root.parent / "shared").is_dir()


def require(path: Path) -> Path:
    """`path` where it exists; otherwise the running test skips, or fails where the data ought to be there."""
    if path.exists():
        return path
    reason = f"no real data at {os.path.relpath(path, ROOT)}: put it there, or name its folder in {DATA_NAME}"
    if absence_fails(os.environ, ROOT):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


# First in line, because hypothesis' own hook reads the option that is set here.
@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # A suite started in the background of a script ignores SIGINT, and one under nohup SIGHUP: so would every process
    # to which a test sends that signal.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    seed = run_seed()
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(seed)


# The files that take longest begin first, so that none of them is left alone at the end (see `--dist loadfile`). The
# first one compiles the engine; the next two, which start with it, do not wait for that.
LONGEST = (
    "sim/des/test_driver_properties.py",
    "test_shared_live.py",
    "governor/service/test_service.py",
    "sim/app/test_cli_plan.py",
    "test_notebooks.py",
    "test_compiles.py",
    "test_two_worlds.py",
    "sim/app/test_cli_simulate.py",
    "test_live_run.py",
    "test_live_crash.py",
    "governor/service/test_service_crash.py",
    "sim/experiment/test_parallel.py",
    "sim/calibration/test_calibrate.py",
    "sim/des/test_compiled.py",
    "sim/selection/test_planner.py",
    "test_theory.py",
    "test_engines.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = ROOT / "tests"
    place = {tests / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_report_header() -> str:
    return f"random tests: {SEED_NAME}={run_seed()} repeats this run"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.failed and "seed" in getattr(item, "fixturenames", ()):
        report.sections.append(("seed", f"{SEED_NAME}={run_seed()} repeats this test"))
    return report


@pytest.fixture(scope="session")
def seed() -> int:
    """The run's seed: a test makes its own generator from it, so the order of tests does not matter."""
    return run_seed()


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real traces; see this module's docstring for what happens where it is absent."""
    return require(data_folder(os.environ, ROOT))


@pytest.fixture(scope="session")
def data_file(data_dir: Path) -> Callable[[str], Path]:
    """A function: the path of one real file, named relative to `data_dir`."""
    return lambda name: require(data_dir / name)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server of the tests' own, started when first wanted; `database(name)` makes an empty one."""
    with PostgresServer() as server:
        yield server
