"""`paceline plan` as a user meets it: the table, the folder of files, the same plan again, and what never gets out."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from governor.forecast.forecast import Expectation, promise_text
from governor.model import files
from governor.model.env_files import policy_of
from governor.model.policy import GUARDRAIL_KNOBS, KNOBS, Policy
from sim.app.cli import main
from sim.app.inputs import read_inputs
from sim.app.options import Options
from sim.base.words import duration
from sim.experiment.experiment import Pool
from sim.reporting import report
from sim.scenario.scenario import Scenario
from sim.selection import planner as planning
from sim.validation import run_forecast
from tests.live import WAIT_S

Run = Callable[..., tuple[int, str, str]]
NAMES = [
    "plan.json",
    "recommended-guardrails.env",
    "recommended.env",
    "report.html",
    "rollback.env",
    "scenario.yaml",
]
SECRET = "sk-do-not-copy-me-anywhere"
ENV = f"""\
APP_ENV=production
DATABASE_URL=postgresql://user:{SECRET}@db/x
OPENAI_API_KEY={SECRET}
OPENAI_MODEL=gpt-4o-{SECRET}
OPENAI_MAX_CONCURRENCY=3
OPENAI_STAGGER_SECONDS=15
OPENAI_TPM_LIMIT=30000
OPENAI_TPM_HEADROOM=0.15
"""


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> None:
    """A search of a second, a page without figures, and nothing from the environment."""
    monkeypatch.setitem(planning.EFFORTS, "quick", 15_000)
    monkeypatch.setattr(planning, "LEAST_RUNS", 1)
    monkeypatch.setattr(report, "render", lambda plan, **told: f"<!doctype html><code>{told['command']}</code>")
    for knob in KNOBS:
        monkeypatch.delenv(knob.env, raising=False)


@pytest.fixture
def run(capsys) -> Run:
    """Runs one command in this process: exit code, stdout, stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def work(tmp_path: Path, root: Path, monkeypatch) -> Path:
    """A folder with a small batch and today's settings, as the current one."""
    lines = (root / "examples" / "batch.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "batch.jsonl").write_text("".join(lines[:20]))
    (tmp_path / "today.env").write_text(ENV)
    monkeypatch.chdir(tmp_path)
    return tmp_path


RENDER = report.render
QUICK = ("--effort", "quick", "--workers", "1")
PLAN = ("plan", "batch.jsonl", "--env-file", "today.env", *QUICK)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def noted(err: str) -> set[str]:
    """What the notes are about."""
    return {note.split(":")[0] for note in err.split("note: ")[1:]}


def test_the_files_and_the_table(run: Run, work: Path, monkeypatch) -> None:
    monkeypatch.setattr(report, "render", RENDER)
    code, out, err = run(*PLAN)
    assert code == 0
    assert noted(err) <= {"a limit is not kept"}
    assert sorted(contents(work / "out")) == NAMES
    assert out.rstrip().endswith(f"report: {Path('out', 'report.html')}")
    assert "again: paceline plan out/scenario.yaml\n" in out
    assert {"now", "guardrails", "recommended"} <= set(out.split())
    found = json.loads((work / "out" / "plan.json").read_text())
    for figure in ("makespan_s", "throttled_per_100", "efficiency"):
        assert found["now"]["figures"][figure]["n"] == found["recommended"]["figures"][figure]["n"] > 1
    # The table's last word on each change is the plan's.
    for change in found["recommended"]["changes"]:
        assert change["env"] in out
    page = (work / "out" / "report.html").read_text()
    assert "paceline plan out/scenario.yaml" in page
    assert "data:image/png;base64," in page or "<svg" in page


def test_a_plan_from_its_own_recommendation_keeps_the_way_back(run: Run, work: Path) -> None:
    run(*PLAN)
    before = contents(work / "out")
    today = policy_of("today.env")
    assert run("plan", "batch.jsonl", "--env-file", "out/recommended.env", *QUICK)[0] == 0
    after = contents(work / "out")
    assert after["rollback.env"] == before["rollback.env"]
    assert policy_of("out/rollback.env") == today
    # From other settings it is written anew.
    assert run(*PLAN, "--set", "OPENAI_STAGGER_SECONDS=9")[0] == 0
    assert policy_of("out/rollback.env").stagger_seconds == 9.0


def test_run_and_plan_say_the_same_of_the_same_batch(run: Run, work: Path) -> None:
    """The settings reserve by another rule than the provider charges by: only the scenario tells the forecast so."""
    # So slow that the length of single answers, which is drawn, hardly matters.
    limits = ("--tpm", 6_000, "--set", "OPENAI_TPM_LIMIT=6000")
    assert run(*PLAN, *limits, "--provider-charge", "prompt_chars4")[0] == 0
    planned = json.loads((work / "out" / "plan.json").read_text())["recommended"]["figures"]["makespan_s"]["p50"]
    code, out, err = run("preflight", "batch.jsonl", "--env-file", "out/recommended.env", "--json")
    assert (code, err) == (0, "")
    assert abs(json.loads(out)["forecast_finish_s"] - planned) <= 0.03 * planned
    # The same scenario by an option, and a plan that has gone: said, and no reason to stop.
    other = run("preflight", "batch.jsonl", "--env-file", "out/recommended.env", "--scenario", "out/scenario.yaml")
    assert other[0] == 0
    (work / "out" / "scenario.yaml").rename(work / "moved.yaml")
    code, _, err = run("preflight", "batch.jsonl", "--env-file", "out/recommended.env")
    assert (code, err.count("\n")) == (0, 1)
    assert "PACELINE_SCENARIO" in err
    code, _, err = run("preflight", "batch.jsonl", "--env-file", "out/recommended.env", "--scenario", "none.yaml")
    assert (code, err) == (2, "none.yaml: there is no such file\n")


def test_a_forecast_of_the_planned_batch_makes_the_plans_promise(run: Run, work: Path, monkeypatch) -> None:
    assert run(*PLAN)[0] == 0
    promised = json.loads((work / "out" / "plan.json").read_text())["promise"]["in_95_of_100_conditions_s"]["value"]
    made: list[Expectation] = []
    forecast = run_forecast.foresee
    monkeypatch.setattr(run_forecast, "foresee", lambda outlook: made.append(forecast(outlook)) or made[-1])
    assert run("preflight", "batch.jsonl", "--env-file", "out/recommended.env")[0] == 0
    assert made[-1].promise_s == pytest.approx(promised)
    assert f"by {duration(promised)} in 95 of 100" in promise_text(made[-1])
    # Without a plan nothing says what is not known.
    assert run("preflight", "batch.jsonl")[0] == 0
    assert made[-1].promise_s is None


def test_json_is_plan_json_and_nothing_else(run: Run, work: Path) -> None:
    code, out, err = run(*PLAN, "--json")
    assert code == 0
    assert noted(err) <= {"a limit is not kept"}
    assert out == (work / "out" / "plan.json").read_text()
    found = json.loads(out)
    assert found["asked"]["effort"] == "quick"
    assert found["command"] == "paceline plan out/scenario.yaml"
    assert {"measured", "assumed"} == {each["label"] for each in found["inputs"].values()}


def test_the_env_files_are_policies(run: Run, work: Path) -> None:
    run(*PLAN)
    found = json.loads((work / "out" / "plan.json").read_text())
    today = policy_of("today.env")
    new = policy_of("out/recommended.env")
    assert {knob.env: getattr(new, knob.name) for knob in KNOBS} == found["recommended"]["settings"]
    few = policy_of("out/recommended-guardrails.env")
    assert {knob.env: getattr(few, knob.name) for knob in KNOBS} == found["guardrails_only"]["settings"]
    changed = {knob for knob in KNOBS if getattr(few, knob.name) != getattr(today, knob.name)}
    assert changed <= set(GUARDRAIL_KNOBS)
    # The way back: applied on top of the recommended settings, every value is today's again.
    assert policy_of("out/rollback.env") == today
    assert policy_of("out/rollback.env", base=new).model_dump() == today.model_dump()
    # Old values as comments, one for each change.
    text = (work / "out" / "recommended.env").read_text()
    differing = [knob for knob in KNOBS if getattr(new, knob.name) != getattr(today, knob.name)]
    assert differing
    assert text.count("# was: ") == len(differing)
    for knob in differing:
        was, now = knob.text(getattr(today, knob.name)), knob.text(getattr(new, knob.name))
        assert f"# was: {was}\n{knob.env}={now}\n" in text


def test_foreign_names_and_secrets_are_never_copied(run: Run, work: Path, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    code, out, err = run(*PLAN, "--json")
    assert code == 0
    for text in (out, err, *(data.decode() for data in contents(work / "out").values())):
        assert SECRET not in text
        for foreign in ("DATABASE_URL", "APP_ENV", "OPENAI_API_KEY", "OPENAI_MODEL"):
            assert foreign not in text


def test_the_scenario_makes_the_same_plan_again(run: Run, work: Path) -> None:
    plan_options = ("--max-throttled-per-100", "0.5", "--finish-by", "2h", "--seed", "3", "--provider-charge", "max_of")
    assert run(*PLAN, *plan_options)[0] == 0
    before = contents(work / "out")
    asked = json.loads(before["plan.json"])["asked"]
    assert asked == {
        "objective": "makespan",
        "max_throttled_per_100": 0.5,
        "max_lost": 0.0,
        "finish_by_s": 7_200.0,
        "effort": "quick",
        "prices": "",
        "unknowns": {
            "charge_rules": True,
            "windows": False,
            "counts_at_answer": 0.5,
            "settles": 0.5,
            "cotenant_share": [0.0, 0.3],
            "latency_factor": [0.7, 2.5],
            "output_factor": [0.6, 2.0],
        },
    }
    (work / "today.env").unlink()
    assert run("plan", "out/scenario.yaml", "--workers", "1")[0] == 0
    assert contents(work / "out") == before
    # From another folder too: paths are relative to the file.
    os.chdir(work.parent)
    assert run("plan", work / "out" / "scenario.yaml", "--workers", "1", "--out", work / "again")[0] == 0
    again = contents(work / "again")
    assert again["recommended.env"] == before["recommended.env"]
    first, second = (json.loads(files["plan.json"]) for files in (before, again))
    assert {**second, "command": first["command"]} == first


def test_rows_from_standard_input_are_kept_beside_the_scenario(run: Run, work: Path, monkeypatch) -> None:
    class Stdin:
        buffer = open(work / "batch.jsonl", "rb")  # noqa: SIM115  (closed below)

    monkeypatch.setattr(sys, "stdin", Stdin)
    assert run("plan", "-", *QUICK)[0] == 0
    Stdin.buffer.close()
    assert sorted(contents(work / "out")) == sorted([*NAMES, "scenario.workload.csv"])
    before = contents(work / "out")
    assert run("plan", "out/scenario.yaml", "--workers", "1")[0] == 0
    assert contents(work / "out") == before


def test_a_scenario_of_default_wishes_is_one_for_everybody(run: Run, work: Path, monkeypatch) -> None:
    monkeypatch.setitem(planning.EFFORTS, "normal", 15_000)
    assert run("plan", "batch.jsonl", "--workers", "1")[0] == 0
    assert Scenario.read(work / "out" / "scenario.yaml").policy.model_dump() == Policy().model_dump()


def test_wishes_that_cannot_be_kept_are_said(run: Run, work: Path) -> None:
    code, out, err = run(*PLAN, "--finish-by", "1s")
    assert code == 0
    assert err.startswith("note: a limit is not kept: 19 of 20 runs finish after ")
    assert "note:" not in out


# ---------------------------------------------------------------- all files or none


def test_a_failure_while_writing_leaves_the_older_plan(run: Run, work: Path, monkeypatch) -> None:
    assert run(*PLAN)[0] == 0
    before = contents(work / "out")
    # The search itself is not what fails: its result is found once.
    inputs = read_inputs(Options(workload="batch.jsonl", seed=9), {})
    other = planning.plan(inputs.scenario, effort="quick", pool=Pool(1))
    monkeypatch.setattr(planning, "plan", lambda *args, **how: other)
    # Each file is forced to the disk twice: when it is filled, and just before it takes its name.
    for allowed in range(2 * len(NAMES)):
        left = [allowed]

        def full(number: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", full)
            code, out, err = run(*PLAN, "--seed", "9")
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert "the disk is full" in err
        assert contents(work / "out") == before


def test_a_failure_in_the_search_or_the_report_leaves_no_folder(run: Run, work: Path, monkeypatch) -> None:
    def stop(*args: object, **how: object) -> None:
        raise KeyboardInterrupt

    for place in ("sim.reporting.report.render", "sim.selection.planner.plan"):
        with monkeypatch.context() as patch:
            patch.setattr(place, stop)
            assert run(*PLAN, "--out", "deep/new") == (130, "", "interrupted: no file was left unfinished\n")
        assert sorted(contents_names(work)) == ["batch.jsonl", "today.env"]


def contents_names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_an_interruption_while_files_take_their_names_waits(run: Run, work: Path, monkeypatch) -> None:
    """Ctrl-C between two renames: all files are renamed first, then it is obeyed."""
    assert run(*PLAN)[0] == 0
    before = contents(work / "out")
    renamed = []
    replace = os.replace

    def interrupted(source: object, target: object) -> None:
        replace(source, target)  # type: ignore[arg-type]
        renamed.append(target)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", interrupted)
        code, _, err = run(*PLAN, "--seed", "9")
    assert (code, err) == (130, "interrupted: no file was left unfinished\n")
    assert len(renamed) == len(NAMES)
    after = contents(work / "out")
    assert sorted(after) == NAMES
    assert json.loads(after["plan.json"])["seed"] == 9 != json.loads(before["plan.json"])["seed"]


def test_ctrl_c_in_the_middle_of_the_search(root: Path, work: Path) -> None:
    """A real process with workers: one line with the best so far, exit code 130, and no file."""
    # Slow enough that the search is not over before Ctrl-C; says on standard output when it has begun.
    code = """
import sys, time
from sim.app import cli
from sim.experiment import experiment
run = experiment.Pool.run
def slowly(pool, tasks):
    found = run(pool, tasks)
    print("ran", flush=True)
    time.sleep(0.2)
    return found
experiment.Pool.run = slowly
sys.exit(cli.main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, "plan", "batch.jsonl", "--effort", "thorough", "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    for _ in range(6):
        assert process.stdout.readline() == "ran\n"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, err.count("\n")) == (130, 1)
    assert err.startswith("interrupted while ")
    assert "no file was written" in err
    assert not (work / "out").exists() or not contents(work / "out")


class Impatient(Pool):
    """A pool in which Ctrl-C is pressed after so many of its runs."""

    left = 1 << 62

    def run(self, tasks: Any) -> Any:
        found = super().run(tasks)
        Impatient.left -= sum(len(each) for each in found)
        if Impatient.left < 0:
            raise KeyboardInterrupt
        return found


def test_an_interruption_prints_the_best_so_far_and_leaves_an_older_plan(run: Run, work: Path, monkeypatch) -> None:
    assert run(*PLAN)[0] == 0
    before = contents(work / "out")
    with monkeypatch.context() as patch:
        patch.setattr("sim.app.inputs.Pool", Impatient)
        patch.setattr(Impatient, "left", 500)
        code, out, err = run(*PLAN, "--seed", "9")
    assert (code, out, err.count("\n")) == (130, "", 1)
    assert err.startswith("interrupted while ")
    assert "OPENAI_STAGGER_SECONDS=" in err
    assert contents(work / "out") == before


def test_a_plan_is_the_same_for_any_number_of_workers(run: Run, work: Path) -> None:
    assert run(*PLAN)[0] == 0
    before = contents(work / "out")
    assert run("plan", "batch.jsonl", "--env-file", "today.env", "--effort", "quick", "--workers", "2")[0] == 0
    assert contents(work / "out") == before
