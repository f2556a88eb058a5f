"""The simulator in a process of its own answers as it does in this one, and may end at any moment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor
from pathlib import Path

import pytest

from governor.forecast.forecast import Demand, Outlook
from governor.model.errors import PacelineError
from governor.model.estimate import CHAT, Sizes
from governor.model.policy import Policy
from governor.model.pools import Pool
from sim.app import side_process as beside
from sim.app.side_process import EndedError, SideProcess
from sim.app.whatif import quick_forecast
from tests.conftest import ROOT
from tests.live import WAIT_S


def outlook(count: int) -> Outlook:
    demand = Demand()
    for i in range(count):
        demand.add("gpt-4o-mini", Sizes(CHAT, 100 + i, 400, 10, 1, 0, 0, 1, 50), 150 + i)
    return Outlook(pool=Pool(policy=Policy(stagger_seconds=0.5)), demand=demand)


def pid_of(simulator: SideProcess) -> int:
    found: int = simulator.submit(os.getpid).result(WAIT_S)
    return found


def killed(simulator: SideProcess, pid: int) -> None:
    """Ends the process while a question is open; the pool then knows."""
    question = simulator.submit(time.sleep, 60)
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(BrokenExecutor):
        question.result(WAIT_S)


def until_logged(caplog: pytest.LogCaptureFixture, words: str) -> None:
    """The pool's own thread may still be about to say it."""
    until = time.monotonic() + WAIT_S
    while words not in caplog.text:
        assert time.monotonic() < until, caplog.text
        time.sleep(0.01)


def test_it_answers_as_this_process_does_and_is_replaced_when_it_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The first question may wait for machine code to be compiled, on a busy machine for longer than a service waits.
    monkeypatch.setattr(beside, "ANSWER_S", 10.0 * WAIT_S)
    simulator = SideProcess()
    asked = outlook(7)
    assert simulator.forecast(asked) == quick_forecast(asked)
    assert simulator.forecast(outlook(0)) is None
    assert simulator.forecast(outlook(beside.REQUESTS_MOST + 1)) is None
    # What is wrong with a question is told as it would be here; the process goes on.
    first = pid_of(simulator)
    with pytest.raises(RuntimeError, match="KeyError in the simulator's process"):
        simulator.what_if({})
    assert pid_of(simulator) == first

    # One that answers nobody any more holds up nobody for ever, and may end while a question is still open that its
    # caller has given up.
    monkeypatch.setattr(beside, "ANSWER_S", 0.2)
    os.kill(first, signal.SIGSTOP)
    assert simulator.forecast(asked) is None
    with pytest.raises(EndedError, match="not answered for"):
        simulator.what_if({})
    os.kill(first, signal.SIGCONT)
    monkeypatch.setattr(beside, "ANSWER_S", 10.0 * WAIT_S)
    assert simulator.forecast(asked) == quick_forecast(asked)

    # One that ended soon after its start is not replaced at once: nobody forecasts, and nobody waits.
    monkeypatch.setattr(beside, "REST_S", 1_000.0)
    killed(simulator, first)
    assert simulator.forecast(asked) is None
    with pytest.raises(EndedError, match="ask again") as raised:
        simulator.what_if({})
    assert isinstance(raised.value, PacelineError)
    assert raised.value.retryable
    until_logged(caplog, "another is started in 1000 s")

    simulator.rests_until = 0.0
    assert simulator.forecast(asked) == quick_forecast(asked)
    # And one that ends later is replaced for the question that meets its end.
    monkeypatch.setattr(beside, "REST_S", 0.0)
    os.kill(pid_of(simulator), signal.SIGKILL)
    assert simulator.forecast(asked) == quick_forecast(asked)
    until_logged(caplog, "the next question starts another")
    killed(simulator, pid_of(simulator))


def test_it_ends_with_its_parent() -> None:
    code = (
        "import os, signal; from sim.app.side_process import SideProcess;"
        "from tests.sim.app.test_beside import outlook, pid_of;"
        "b = SideProcess(); print(b.forecast(outlook(7)), pid_of(b), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=WAIT_S)
    forecast, pid = ran.stdout.split()
    assert float(forecast) == quick_forecast(outlook(7)), ran.stderr
    until = time.monotonic() + WAIT_S
    while os.path.exists(f"/proc/{pid}") and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < until, "the child lives on"
        time.sleep(0.01)
