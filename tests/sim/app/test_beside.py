"""The simulator in a process of its own answers as it does in this one, and may end at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from governor.forecast.forecast import Demand, Outlook
from governor.model.errors import PacelineError
from governor.model.estimate import CHAT, Sizes
from governor.model.policy import Policy
from governor.model.pools import Pool
from sim.app import side_process as beside
from sim.app.side_process import Beside, EndedError
from sim.app.whatif import quick_forecast
from tests.conftest import ROOT
from tests.live import WAIT_S


def outlook(count: int) -> Outlook:
    demand = Demand()
    for i in range(count):
        demand.add("gpt-4o-mini", Sizes(CHAT, 100 + i, 400, 10, 1, 0, 0, 1, 50), 150 + i)
    return Outlook(pool=Pool(policy=Policy(stagger_seconds=0.5)), demand=demand)


def ended(child: beside.Child) -> None:
    os.kill(child.pid, signal.SIGKILL)
    until = time.monotonic() + WAIT_S
    while not child.has_ended:
        assert time.monotonic() < until, "nobody noticed"
        time.sleep(0.01)


def test_it_answers_as_this_process_does_and_is_replaced_when_it_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    simulator = Beside()
    asked = outlook(7)
    assert simulator.forecast(asked) == quick_forecast(asked)
    assert simulator.forecast(outlook(0)) is None
    assert simulator.forecast(outlook(beside.REQUESTS_MOST + 1)) is None
    # What is wrong with a question is told as it would be here; the process goes on.
    first = simulator.child()
    with pytest.raises(RuntimeError, match="KeyError in the simulator's process"):
        simulator.what_if({})
    assert simulator.child() is first

    # One that answers nobody any more holds up nobody for ever.
    monkeypatch.setattr(beside, "ANSWER_S", 0.2)
    os.kill(first.pid, signal.SIGSTOP)
    assert simulator.forecast(asked) is None
    with pytest.raises(EndedError, match="not answered for"):
        simulator.what_if({})
    os.kill(first.pid, signal.SIGCONT)
    monkeypatch.undo()
    assert simulator.forecast(asked) == quick_forecast(asked)

    # It may end while a question is still open that its caller has given up.
    monkeypatch.setattr(beside, "ANSWER_S", 0.05)
    os.kill(first.pid, signal.SIGSTOP)
    assert simulator.forecast(asked) is None
    monkeypatch.undo()

    # One that ended soon after its start is not replaced at once: nobody forecasts, and nobody waits.
    monkeypatch.setattr(beside, "REST_S", 1_000.0)
    ended(first)
    assert simulator.forecast(asked) is None
    with pytest.raises(EndedError, match="ask again") as raised:
        simulator.what_if({})
    assert isinstance(raised.value, PacelineError)
    assert raised.value.retryable
    assert simulator.child() is first
    until = time.monotonic() + WAIT_S
    while "SIGKILL" not in caplog.text:
        assert time.monotonic() < until, caplog.text
        time.sleep(0.01)

    first.rests_until = 0.0
    assert simulator.forecast(asked) == quick_forecast(asked)
    assert simulator.child() is not first
    ended(simulator.child())


def test_a_process_of_one_thread_forks_and_takes_its_child_along() -> None:
    """As `paceline serve` starts it; however the parent ends, the child does too."""
    code = (
        "import os, signal, sys; from sim.app.side_process import Beside;"
        "from tests.sim.app.test_beside import outlook;"
        "b = Beside(); b.forecast(outlook(0)); assert b.child()._end.__name__ == '<lambda>';"
        "print(b.forecast(outlook(7)), b.child().pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=WAIT_S)
    forecast, pid = ran.stdout.split()
    assert float(forecast) == quick_forecast(outlook(7)), ran.stderr
    until = time.monotonic() + WAIT_S
    while os.path.exists(f"/proc/{pid}") and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < until, "the child lives on"
        time.sleep(0.01)
