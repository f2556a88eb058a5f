"""Work over many workers: the same results on any number of them, on either backend, and whoever dies on the way.

One Ray cluster of two nodes, each with one worker, serves the whole module; it listens on loopback alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest

from governor.model.errors import BadSetting
from sim.app.cli import main
from sim.experiment import experiment, parallel, ray_side
from sim.experiment.experiment import Pool, case_of
from sim.experiment.parallel import Local, OnRay, WorkersLost
from sim.model.synthetic import parametric
from sim.scenario.scenario import Scenario

BATCH = "examples/batch.jsonl"


def scenario(root: Path, monkeypatch: pytest.MonkeyPatch, seed: int = 3) -> Scenario:
    monkeypatch.chdir(root)
    workload = parametric(60, prompt_tokens=(600, 1_500), output_tokens=(80, 300), max_tokens=400, seed=seed)
    return Scenario.of(BATCH).with_(workload=workload, seed=seed % 1_000)


# What runs on the workers.


def squared(shared: object, own: int) -> int:
    return own * own


def total(shared: np.ndarray, own: int) -> tuple[float, bool]:
    return float(shared[own:].sum()), bool(shared.flags.writeable)


def resting(shared: object, own: int) -> int:
    time.sleep(0.05)
    return own


def meeting(folder: Path, own: int) -> int:
    """Waits until two tasks are under way, of two parents (a node's processes have one); says how many there were."""
    (folder / str(os.getppid())).touch()
    for _ in range(1_200):
        if len(list(folder.iterdir())) >= 2:
            break
        time.sleep(0.1)
    return len(list(folder.iterdir()))


def failing(shared: object, own: int) -> int:
    if own == 5:
        raise BadSetting("task 5 cannot be done", "X")
    return own


def dying(folder: Path, own: int) -> int:
    """Task 7 kills its worker as often as there are files in the folder, taking one away each time."""
    if own == 7:
        left = sorted(folder.iterdir())
        if left:
            left[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
    return own


def deaths(tmp_path: Path, count: int) -> Path:
    for i in range(count):
        (tmp_path / str(i)).touch()
    return tmp_path


class Losing(Local):
    """Loses everything after five results."""

    def map(self, function, tasks):
        with contextlib.closing(super().map(function, tasks)) as results:
            for i, result in enumerate(results):
                if i == 5:
                    raise WorkersLost("a worker was lost")
                yield result


# ---------------------------------------------------------------- this machine


def test_results_come_in_the_order_of_the_tasks() -> None:
    tasks = [(None, i) for i in range(200)]
    for workers in (1, 2, 3):
        assert list(Local(workers).map(squared, tasks)) == [i * i for i in range(200)]
    assert list(Local(2).map(squared, [])) == []


def test_what_a_task_raises_is_raised_here() -> None:
    for workers in (1, 2):
        with pytest.raises(BadSetting, match="task 5 cannot be done") as caught:
            list(Local(workers).map(failing, [(None, i) for i in range(9)]))
        assert caught.value.name == "X"


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    found = list(Local(2).map(dying, [(deaths(tmp_path, 1), i) for i in range(20)]))
    assert found == list(range(20))
    assert not list(tmp_path.iterdir())


def test_workers_lost_for_good_are_one_clear_line(tmp_path: Path) -> None:
    folder, found = deaths(tmp_path, 99), []
    with pytest.raises(
        WorkersLost, match=r"^a worker process died twice at the same task, with \d+ of 20 done"
    ) as lost:
        found.extend(Local(2).map(dying, [(folder, i) for i in range(20)]))
    assert found == list(range(len(found)))
    assert len(found) <= 7
    assert "\n" not in str(lost.value)
    assert lost.value.exit_code == 1


def test_runs_are_the_same_for_any_number_of_workers(root: Path, monkeypatch, seed: int) -> None:
    monkeypatch.setattr(experiment, "TASK_REQUESTS", {"simpy": 120, "compiled": 120})
    case = case_of(scenario(root, monkeypatch, seed))
    tasks = [(case, range(30)), (case, range(7))]
    alone, two, three = (Pool(workers, engine="simpy").run(tasks) for workers in (1, 2, 3))
    assert alone == two == three == Pool(2).run(tasks)
    assert [[run.seed for run in runs] for runs in alone] == [list(range(30)), list(range(7))]


def test_what_was_found_before_a_loss_is_kept(root: Path, monkeypatch) -> None:
    case = case_of(scenario(root, monkeypatch))
    monkeypatch.setattr(experiment, "TASK_REQUESTS", {"simpy": 120, "compiled": 120})
    pool = Pool(1, engine="simpy")
    whole = pool.run([(case, range(8)), (case, range(8))])

    pool.crew = Losing(2)
    with pytest.raises(WorkersLost) as lost:
        pool.run([(case, range(8)), (case, range(8))])
    # Two runs per piece: four pieces of the first task, one of the second.
    assert lost.value.found == [whole[0], whole[1][:2]]


def test_simulate_shows_the_runs_that_there_are(root: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr(experiment, "TASK_REQUESTS", {"simpy": 60, "compiled": 60})
    monkeypatch.setattr(experiment, "crew_of", lambda backend, workers: Losing(2))
    words = ["simulate", BATCH, "--first", "60", "--replications", "20", "--engine", "simpy", "--json"]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["replications"] == 5
    assert captured.err == "a worker was lost; the figures are of 5 runs in place of 20\n"


# ---------------------------------------------------------------- addresses


def refusal(monkeypatch, capsys, address: str) -> str:
    monkeypatch.setenv("RAY_ADDRESS", address)
    code = main(["simulate", BATCH, "--first", "5", "--replications", "2", "--backend", "ray"])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_bad_address_is_one_line(root: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(root)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        silent = f"127.0.0.1:{free.getsockname()[1]}"
        # Nothing listens there.
        assert f"RAY_ADDRESS='{silent}': no Ray cluster answers there" in refusal(monkeypatch, capsys, silent)
        free.listen()
        monkeypatch.setattr(ray_side, "ANSWER_S", 0.2)
        # Something listens and says nothing.
        with pytest.raises(BadSetting, match="no Ray cluster answers there"):
            ray_side.check_address(silent)
    for address in ("nonsense", "ray://127.0.0.1:10001", "127.0.0.1:0", "127.0.0.1:70000"):
        with pytest.raises(BadSetting, match="write the head node's HOST:PORT"):
            ray_side.check_address(address)


def test_another_kind_of_server_is_no_cluster() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reply() -> None:
            talk, _ = server.accept()
            with talk:
                talk.recv(100)
                talk.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=reply)
        thread.start()
        assert not ray_side.answers(f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()


def test_loopback_is_told_from_the_rest() -> None:
    assert all(map(ray_side.is_loopback, ("127.0.0.1:6379", "localhost:6379", "[::1]:6379", "127.3.2.1:1")))
    assert not any(map(ray_side.is_loopback, ("10.0.0.1:6379", "head:6379", "auto", "")))


def test_a_child_that_does_not_end_is_ended(monkeypatch) -> None:
    deaf = (
        "import pickle, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "pickle.dump(('ready', 3), sys.stdout.buffer); sys.stdout.flush(); time.sleep(60)"
    )
    start = subprocess.Popen
    monkeypatch.setattr(parallel, "ENDS_S", 0.1)
    with monkeypatch.context() as m:
        m.setattr(parallel.subprocess, "Popen", lambda words, **how: start([sys.executable, "-c", deaf], **how))
        side = parallel._Side()
    assert side.size == 3
    side.end()
    assert side.child.returncode == -signal.SIGKILL
    side.end()


def test_without_ray_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadSetting, match=r"--backend ray needs paceline\[ray\]"):
        ray_side.connected()


# ---------------------------------------------------------------- a real cluster of two nodes

# Whatever Ray notices first.
LOST = r"^(the Ray cluster .*is gone|a task was lost on the Ray cluster \(.*\)); \d+ of 400 tasks are done"


class Cluster:
    """The cluster's process."""

    def __init__(self, root: Path, nodes: int) -> None:
        self.log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  (closed by `close`)
        self.process = subprocess.Popen(
            [sys.executable, str(root / "tests" / "sim" / "ray_cluster.py"), str(nodes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        self.address = ""

    def wait(self) -> None:
        """Until it is up."""
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        if not self.address.startswith("127.0.0.1:"):
            self.log.seek(0)
            pytest.fail(f"no Ray cluster came up:\n{self.log.read()[-4_000:]}", pytrace=False)

    def drop(self) -> None:
        """Kills one node."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("drop\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "dropped\n"

    def close(self) -> None:
        """Ends all nodes, whatever state they are in."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        processes = []
        if self.process.poll() is None:
            processes = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


@pytest.fixture(scope="module", autouse=True)
def coming(root: Path, request: pytest.FixtureRequest) -> Iterator[Cluster | None]:
    """The cluster, begun before the first test of the module: it comes up beside those that do without."""
    users = [item for item in request.session.items if "cluster" in getattr(item, "fixturenames", ())]
    if find_spec("ray") is None or not any(item.path == request.path for item in users):
        yield None
        return
    found = Cluster(root, 2)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def cluster(coming: Cluster | None) -> Iterator[Cluster]:
    if coming is None:
        pytest.skip("the extra `ray` is not installed")
    coming.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", coming.address)
        try:
            yield coming
        finally:
            parallel.disconnect()


@pytest.mark.slow
def test_ray_gives_the_same_runs_to_the_bit(
    cluster: Cluster, root: Path, tmp_path: Path, monkeypatch, seed: int
) -> None:
    crew = OnRay()
    assert crew.size == 2
    # Each node has one worker: two tasks at a time are on both.
    assert list(crew.map(meeting, [(tmp_path, i) for i in range(2)])) == [2, 2]
    assert list(crew.map(squared, [(None, i) for i in range(40)])) == [i * i for i in range(40)]
    # What is shared arrives whole and cannot be changed by a task.
    numbers = np.arange(200_000.0)
    assert list(crew.map(total, [(numbers, 199_998), (numbers, 0)])) == [(399_997.0, False), (numbers.sum(), False)]
    monkeypatch.setattr(experiment, "TASK_REQUESTS", {"simpy": 120, "compiled": 120})
    case = case_of(scenario(root, monkeypatch, seed))
    tasks = [(case, range(30)), (case, range(7))]
    here = Pool(1, engine="simpy").run(tasks)
    for workers in (0, 1):
        assert Pool(workers, engine="simpy", backend="ray").run(tasks) == here


@pytest.mark.slow
def test_on_ray_errors_and_deaths_are_as_here(cluster: Cluster, tmp_path: Path, monkeypatch) -> None:
    crew = OnRay()
    with monkeypatch.context() as m:
        m.setattr(parallel, "fingerprint", lambda: "another")
        with pytest.raises(BadSetting, match="has another version of paceline"):
            list(crew.map(squared, [(None, 1)]))
    with pytest.raises(BadSetting, match="task 5 cannot be done") as caught:
        list(crew.map(failing, [(None, i) for i in range(9)]))
    assert caught.value.name == "X"
    assert list(crew.map(dying, [(deaths(tmp_path, 1), i) for i in range(20)])) == list(range(20))
    found: list[int] = []
    with pytest.raises(
        WorkersLost, match=r"^a Ray worker was lost 3 times at one task; 7 of 20 tasks are done"
    ) as lost:
        found.extend(crew.map(dying, [(deaths(tmp_path, 3), i) for i in range(20)]))
    assert found == list(range(7))
    assert "\n" not in str(lost.value)


@pytest.mark.slow
def test_a_node_and_then_the_cluster_are_lost(cluster: Cluster) -> None:
    """Half of the cluster dies in mid-work: the other does the rest. All of it dies: one line, and no abort."""
    crew = OnRay()
    found = []
    for own in crew.map(resting, [(None, i) for i in range(60)]):
        found.append(own)
        if own == 10:
            cluster.drop()
    assert found == list(range(60))
    found.clear()
    results = crew.map(resting, [(None, i) for i in range(400)])
    found += [next(results) for _ in range(5)]
    cluster.close()
    with pytest.raises(WorkersLost, match=LOST) as lost:
        found += results
    assert found[:5] == list(range(5))
    assert "\n" not in str(lost.value)
