"""What stands around the compiled event loop: its cache, the choice of the engine, threads, chunks and buffers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from governor.model.errors import BadInput
from governor.model.requests import Attempt
from sim.app import cli
from sim.des import compiled, engines, machine
from sim.des.engines import chosen, simulated
from sim.des.machine import BESIDE, SOURCES, array_of
from sim.experiment.experiment import Pool, attempt_rows, case_of
from sim.model.synthetic import parametric
from tests.scenarios import drawn, scenario_of

# A process of its own: compiles two functions of a law that is written beside it, as the engine is compiled.
SMALL = """
import sys
from pathlib import Path
import numpy as np
from sim.des.machine import function_of
root = Path(sys.argv[1])
sources = [root / "law.py", root / "loop.py"]
record = np.zeros(1, [("n", np.int64), ("x", np.float64)])
record[0]["n"] = 3
proceed, kept = function_of(sources, root, "proceed", [record.dtype])
answer = proceed(record)
assert record[0]["x"] == np.ldexp(0.75, 3), record
print(answer, int(kept))
"""
LAW = "from math import ldexp\n\n\ndef rule(a):\n    a.x = ldexp(0.75, a.n)\n    return a.n + {}\n"
LOOP = "import law\n\n\ndef proceed(a):\n    return law.rule(a[0])\n"


def small(folder: Path, **environment: str) -> tuple[int, int]:
    """What the small engine answers, and whether it was loaded instead of compiled."""
    root = Path(__file__).resolve().parents[3]
    paths = os.pathsep.join([str(root), str(folder)])
    command = [sys.executable, "-c", SMALL, str(folder)]
    variables = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=300)
    answer, kept = done.stdout.split()
    return int(answer), int(kept)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "law.py").write_text(LAW.format(1))
    (folder / "loop.py").write_text(LOOP)
    return folder


# ---------------------------------------------------------------- the cache


def test_an_edited_rule_never_runs_stale(sources: Path, tmp_path: Path) -> None:
    """The edited file is called by the one whose machine code is kept, and keeps its size and its time of change."""
    kept = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert small(sources, **kept) == (4, 0)
    assert small(sources, **kept) == (4, 1)
    before = (sources / "law.py").stat()
    (sources / "law.py").write_text(LAW.format(2))
    os.utime(sources / "law.py", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert small(sources, **kept) == (5, 0)


def test_every_source_of_the_engine_names_its_folder(tmp_path: Path) -> None:
    copies = []
    for path in (*SOURCES, *BESIDE):
        copies.append(tmp_path / "_".join(path.parts[-2:]))
        copies[-1].write_bytes(path.read_bytes())
    names = {machine.folder_name(copies)}
    for path in copies:
        path.write_bytes(path.read_bytes() + b"\n")
        names.add(machine.folder_name(copies))
    assert len(names) == len(copies) + 1
    # Whatever the event loop imports of ours is among them: nothing else could be compiled in.
    imported = {line.split()[1] for line in SOURCES[-1].read_text().splitlines() if line.startswith("from sim")}
    assert imported == {"sim.model", "sim.des.run"}


def test_code_of_the_same_file_in_another_place_is_none(sources: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """numba does not find it: whoever counted on it would compile for a minute where a moment was promised."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    kept = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert small(sources, **kept) == (4, 0)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in sources.iterdir():
        if path.is_file():
            (elsewhere / path.name).write_bytes(path.read_bytes())
    assert machine.has_code([sources / "law.py", sources / "loop.py"])
    assert not machine.has_code([elsewhere / "law.py", elsewhere / "loop.py"])
    assert small(elsewhere, **kept) == (4, 0)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners and modes are POSIX")
def test_where_a_home_cannot_be_written_the_temporary_folder_serves(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(machine, "parents", lambda: iter([Path("/proc/none"), tmp_path / "tmp"]))
    folder = machine.cache_folder(SOURCES)
    assert folder is not None
    assert folder.parent == tmp_path / "tmp"
    # Somebody else could have put code into a folder that all may write to.
    folder.chmod(0o777)
    assert machine.cache_folder(SOURCES) is None
    monkeypatch.setattr(machine, "parents", lambda: iter([Path("/proc/none")]))
    assert machine.cache_folder(SOURCES) is None
    assert not machine.has_code(SOURCES)


def test_old_folders_go(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(machine, "parents", lambda: iter([tmp_path]))
    for n in range(9):
        (tmp_path / f"engine-{n}").mkdir()
        os.utime(tmp_path / f"engine-{n}", (n, n))
    (tmp_path / "something else").mkdir()
    mine = machine.cache_folder(SOURCES)
    assert mine is not None
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {mine.name, "something else", "engine-5", "engine-6", "engine-7", "engine-8"}


def test_processes_may_compile_at_once(sources: Path, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    variables = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    variables["PYTHONPATH"] = os.pathsep.join([str(root), str(sources)])
    command = [sys.executable, "-c", SMALL, str(sources)]
    running = [
        subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (0, "")
        assert out.split()[0] == "4"
    assert small(sources, NUMBA_CACHE_DIR=str(tmp_path / "cache")) == (4, 1)


def test_damaged_machine_code_is_made_anew(sources: Path, tmp_path: Path) -> None:
    kept = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert small(sources, **kept) == (4, 0)
    for ending in ("nbc", "nbi"):
        (file,) = (tmp_path / "cache").glob(f"*/*/*.{ending}")
        file.write_bytes(file.read_bytes()[:-9])
        assert small(sources, **kept) == (4, 0)
        assert small(sources, **kept) == (4, 1)


# ---------------------------------------------------------------- the choice


def test_auto_begins_with_simpy_and_changes_over(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "sim.des.compiled", None)
    monkeypatch.setattr(engines._Simulated, "requests", 0.0)
    few, many, very_many = 1_000, 2 * engines.LOADS_S / engines.SIMPY_S, 2 * engines.COMPILES_S / engines.SIMPY_S
    monkeypatch.setattr(engines, "is_kept", lambda: True)
    assert [chosen("auto", n) for n in (few, many, very_many)] == ["simpy", "compiled", "compiled"]
    monkeypatch.setattr(engines, "is_kept", lambda: False)
    assert [chosen("auto", n) for n in (few, many, very_many)] == ["simpy", "simpy", "compiled"]
    # What SimPy has done already counts.
    monkeypatch.setattr(engines._Simulated, "requests", very_many)
    assert chosen("auto", few) == "compiled"
    monkeypatch.setattr(engines, "is_available", lambda: False)
    assert chosen("auto", very_many) == chosen("simpy", very_many) == "simpy"


def test_without_numba_one_line_says_so(monkeypatch: Any, capsys: Any, root: Path) -> None:
    monkeypatch.setattr(engines, "is_available", lambda: False)
    with pytest.raises(BadInput, match="numba is not installed"):
        Pool(1, engine="compiled")
    batch = str(root / "examples" / "batch.jsonl")
    assert cli.main(["simulate", batch, "--first", "20", "--engine", "compiled"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("--engine compiled: numba is not installed: pip install 'paceline[sim]'")
    assert cli.main(["simulate", batch, "--first", "20"]) == 0
    out, err = capsys.readouterr()
    assert "simulated with SimPy" in err


def test_the_command_prints_the_same_with_either_engine(capsys: Any, root: Path) -> None:
    batch = str(root / "examples" / "batch.jsonl")
    printed = []
    for engine in ("simpy", "compiled"):
        for runs in ("1", "5"):
            command = ["simulate", batch, "--replications", runs, "--json", "--engine", engine, "--tpm", "60k"]
            assert cli.main(command) == 0
            printed.append(capsys.readouterr().out)
    assert printed[:2] == printed[2:]


# ---------------------------------------------------------------- threads, chunks and buffers


def test_figures_are_the_same_for_any_number_of_workers(seed: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("sim.experiment.experiment.THREAD_REQUESTS", 50)
    cases = [case_of(drawn(seed + n)) for n in range(12)]
    tasks = [(case, range(seed, seed + 7)) for case in cases]
    found = [repr(Pool(workers, engine="compiled").run(tasks)) for workers in (1, 2, 3, 7)]
    assert len(set(found)) == 1
    assert found[0] == repr(Pool(1, engine="simpy").run(tasks))


def test_small_chunks_and_buffers_make_no_difference(seed: int, monkeypatch: Any) -> None:
    """Whatever runs full on the way, the run goes on as if nothing had been."""
    wanted = [whole(seed + n) for n in range(60)]
    for name, size in (("CHUNK", 3), ("BUFFER", 2), ("SLOTS", 4)):
        monkeypatch.setattr(compiled, name, size)
    monkeypatch.setattr(compiled, "_idle", [])
    assert [whole(seed + n) for n in range(60)] == wanted


def test_runs_made_by_one_call_equal_runs_made_alone(seed: int, monkeypatch: Any) -> None:
    cases, seeds = [case_of(drawn(seed + n)) for n in range(30)], range(seed, seed + 6)
    alone = [[repr(compiled.simulated(case, each)) for each in seeds] for case in cases]
    at_once = set()
    for name, size in (("SLOTS", compiled.SLOTS), ("SLOTS", 6), ("CHUNK", 3)):
        monkeypatch.setattr(compiled, name, size)
        monkeypatch.setattr(compiled, "_idle", [])
        assert [[repr(tally) for tally in compiled.simulations(case, seeds)] for case in cases] == alone
        at_once |= {len(compiled.Runner().simulate_several(compiled.Batch(case), seeds)) for case in cases}
    # All of them in one call, and none for want of room.
    assert {0, len(seeds)} <= at_once


def whole(seed: int) -> tuple[list[Attempt], str]:
    scenario = drawn(seed)
    rows: list[Attempt] = []
    tally = simulated(case_of(scenario), scenario.seed, attempt_rows(scenario, rows.append), engine="compiled")
    return rows, repr(tally)


def test_a_long_run_keeps_nothing_per_request() -> None:
    """Arrays stay as large as what is in flight at once asks for."""
    work = parametric(60_000, prompt_tokens=(300, 900), output_tokens=(100, 300), seed=5)
    scenario = scenario_of(work, provider={"tpm": 0})
    policy = scenario.policy.with_(
        max_concurrency=20, stagger_seconds=0.0, tpm_limit=10**9, charge_rule="prompt_plus_max"
    )
    runner, batch = compiled.Runner(), compiled.Batch(case_of(scenario, policy))
    tally = runner.simulate(batch, 3)
    assert tally.completed == 60_000
    arrays = (batch.first, runner.jobs, runner.calendar, runner.queue, runner.answers, runner.attempts)
    assert sum(array.nbytes for array in arrays) < 2_000_000


def test_a_record_holds_what_the_dataclass_holds() -> None:
    run = compiled.engine.Run(seed=7, timer_at=2.5)
    record = array_of(run)[0]
    assert (record["seed"], record["timer_at"], record["head"]) == (7, 2.5, -1)
    assert np.array_equal(record["waits_s"], np.zeros(9))
