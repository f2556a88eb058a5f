"""`paceline simulate` as a user meets it: what stands on stdout, in the files, and how it ends."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t
from typer.main import get_command

import sim
from governor import __version__
from governor.forecast.summary import Summary
from governor.model.policy import KNOBS, knob_table
from governor.model.requests import Attempt
from sim.app import cli
from sim.app.cli import main
from tests.live import WAIT_S

SUMMARY_KEYS = [column.name for column in fields(Summary)]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch) -> None:
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
def batch(root: Path) -> Path:
    return root / "examples" / "batch.jsonl"


def started(root: Path, *args: object, **how: Any) -> subprocess.Popen[str]:
    """The command as its own process, in its own process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "sim.app.cli", *map(str, args)],
        stdout=how.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        **how,
    )


# ---------------------------------------------------------------- one run


def test_json_is_the_summary_and_nothing_else(run: Run, batch: Path) -> None:
    code, out, err = run("simulate", batch, "--first", 30, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert list(found) == SUMMARY_KEYS
    assert (found["requests"], found["completed"], found["failed"], found["cost_usd"]) == (30, 30, 0, None)
    assert found["efficiency"] == found["bound_s"] / found["makespan_s"]
    # Guardrails: a flat reservation of 7,000 per attempt.
    assert found["reserved_tokens"] == 7_000 * found["attempts"]


def test_the_summary_agrees_with_the_attempts(run: Run, batch: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    settings = ("OPENAI_STAGGER_SECONDS=0", "OPENAI_MAX_CONCURRENCY=40", "OPENAI_EST_TOKENS_PER_RUN=100")
    options = [word for setting in settings for word in ("--set", setting)]
    code, out, _ = run("simulate", batch, "--json", "--attempts", path, *options)
    assert code == 0
    found = json.loads(out)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found["attempts"]
    assert sum(row["outcome"] == "throttled" for row in rows) == found["throttled"] > 0
    assert max(float(row["finished_s"]) for row in rows) == found["makespan_s"]
    assert sum(int(row["reserved_tokens"]) for row in rows) == found["reserved_tokens"]
    answered = {row["request"] for row in rows if row["outcome"] == "ok"}
    assert len(answered) == found["completed"]
    waited = sum(float(row["waited_tpm_s"]) for row in rows)
    assert waited == pytest.approx(found["waits_s"]["tpm"])


def test_the_table_names_what_matters(run: Run, batch: Path) -> None:
    code, out, err = run("simulate", batch)
    assert (code, err) == (0, "")
    assert "lost                0 of 200, below 1.5 % at 95 % confidence" in out
    # The sum of the first 199 staggers, without jitter, is a floor of what it takes.
    assert "OPENAI_STAGGER_SECONDS=15" in out
    assert "OPENAI_EST_TOKENS_PER_RUN=7000 reserves" in out
    for label in ("measured", "assumed", "finishes after", "efficiency"):
        assert label in out
    assert max(map(len, out.splitlines())) <= 110


def test_a_lossy_run_says_what_was_lost_and_quotes_no_efficiency(run: Run, batch: Path) -> None:
    settings = ("OPENAI_STAGGER_SECONDS=0", "OPENAI_MAX_CONCURRENCY=200", "OPENAI_EST_TOKENS_PER_RUN=1")
    options = [word for setting in (*settings, "OPENAI_RETRY_MAX_ATTEMPTS=1") for word in ("--set", setting)]
    code, out, _ = run("simulate", batch, *options)
    assert code == 0
    assert "OPENAI_RATE_LIMIT_EXHAUSTED" in out
    assert "not quoted: requests were lost" in out
    found = json.loads(run("simulate", batch, "--json", *options)[1])
    assert found["efficiency"] is None
    assert found["failed"] == found["failures"]["OPENAI_RATE_LIMIT_EXHAUSTED"] > 0


# ---------------------------------------------------------------- many runs


def test_means_are_those_of_the_single_runs(run: Run, batch: Path) -> None:
    singles = [json.loads(run("simulate", batch, "--first", 40, "--json", "--seed", seed)[1]) for seed in (5, 6, 7, 8)]
    code, out, err = run("simulate", batch, "--first", 40, "--json", "--seed", 5, "--replications", 4, "--workers", 1)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert list(found) == [*SUMMARY_KEYS, "replications", "seed", "lost", "estimates"]
    for name in ("makespan_s", "efficiency", "throttled", "used_tokens", "peak_in_flight"):
        values = [single[name] for single in singles]
        mean = sum(values) / 4
        assert found[name] == pytest.approx(mean)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 3)
        half = float(t.ppf(0.975, 3)) * spread / math.sqrt(4)
        e = found["estimates"][name]
        assert (e["low"], e["high"]) == pytest.approx((mean - half, mean + half))
        assert min(values) <= e["p5"] <= e["p50"] <= e["p95"] <= max(values)
    assert found["waits_s"]["stagger"] == pytest.approx(sum(s["waits_s"]["stagger"] for s in singles) / 4)
    # Clopper and Pearson, nothing seen in 160 trials.
    assert found["lost"] == {"seen": 0, "of": 160, "probability_at_most": pytest.approx(1.0 - 0.05 ** (1.0 / 160.0))}


def test_the_table_of_many_runs_has_every_figure(run: Run, batch: Path) -> None:
    from sim.experiment.results import FIGURES
    from sim.reporting.terminal import FORMS

    assert tuple(FORMS) == FIGURES
    code, out, _ = run("simulate", batch, "--first", 20, "--replications", 2, "--workers", 1)
    assert code == 0
    for title, _ in FORMS.values():
        assert title in out
    assert "2 runs (seeds 0 to 1)" in out


# ---------------------------------------------------------------- files


def test_csv_and_parquet_hold_the_same_rows_with_the_columns_of_attempt(run: Run, batch: Path, tmp_path: Path) -> None:
    import pandas

    for name in ("a.csv", "a.parquet"):
        assert run("simulate", batch, "--first", 25, "--attempts", tmp_path / name, "--json")[0] == 0
    # Text columns stay text where they are empty throughout.
    from_csv = pandas.read_csv(tmp_path / "a.csv", keep_default_na=False)
    from_parquet = pandas.read_parquet(tmp_path / "a.parquet")
    assert tuple(from_csv.columns) == tuple(from_parquet.columns) == Attempt.columns()
    assert len(from_csv) == 25
    assert from_csv.astype(str).equals(from_parquet.astype(str))


def test_the_files_are_those_of_the_first_run(run: Run, batch: Path, tmp_path: Path) -> None:
    run("simulate", batch, "--first", 25, "--attempts", tmp_path / "one.csv")
    run("simulate", batch, "--first", 25, "--attempts", tmp_path / "many.csv", "--replications", 3, "--workers", 1)
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "many.csv").read_bytes()


def test_picture_and_trace(run: Run, batch: Path, tmp_path: Path) -> None:
    picture, trace = tmp_path / "t.png", tmp_path / "c.json"
    code, out, _ = run("simulate", batch, "--first", 25, "--timeline", picture, "--chrome-trace", trace, "--json")
    assert code == 0
    assert list(json.loads(out)) == SUMMARY_KEYS
    assert picture.read_bytes().startswith(b"\x89PNG")
    slices = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X" and e.get("cat") == "attempt"]
    assert len(slices) == 25


# ---------------------------------------------------------------- pipes and signals


def test_standard_input_gives_the_same(run: Run, batch: Path, monkeypatch) -> None:
    class Stdin:
        buffer = io.BytesIO(batch.read_bytes())

    expected = run("simulate", batch, "--json")[1]
    monkeypatch.setattr(sys, "stdin", Stdin)
    assert run("simulate", "-", "--json") == (0, expected, "")


def test_the_reader_of_a_pipe_may_leave(root: Path, batch: Path) -> None:
    with started(root, "simulate", batch, "--json", "--first", 10) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (141, "")


def test_a_real_pipe(root: Path, batch: Path) -> None:
    command = f"cat '{batch}' | '{sys.executable}' -m sim.app.cli simulate - | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=root, timeout=WAIT_S)
    assert done.stderr == ""
    assert done.stdout == "200 requests to gpt-4o (all 200 rows of stdin)\n"


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "interrupted: no file was left unfinished\n"),
        (signal.SIGTERM, 143, "terminated: no file was left unfinished\n"),
        (signal.SIGHUP, 129, "terminated: no file was left unfinished\n"),
    ],
)
def test_a_signal_ends_it_with_one_line_and_no_file(
    root: Path, batch: Path, tmp_path: Path, number: int, code: int, line: str
) -> None:
    process = started(
        root, "simulate", batch, "--replications", 100_000, "--attempts", tmp_path / "a.csv", cwd=tmp_path
    )
    # It is in the middle of its runs once the first run's attempts have appeared.
    until = time.monotonic() + WAIT_S
    while not (tmp_path / "a.csv").exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out) == (code, "")
    # A worker process that is just being started may say something of its own when the signal reaches it.
    assert line in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


# ---------------------------------------------------------------- the command itself


def test_starting_loads_nothing_heavy(root: Path, batch: Path) -> None:
    """By what is imported, not by the clock: 0.5 s hold on any machine as long as these stay out."""
    watch = (
        "import sys; from sim.app.cli import main; code = main(sys.argv[1:]); "
        "print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr); sys.exit(code)"
    )

    def loaded(*args: object) -> set[str]:
        command = [sys.executable, "-c", watch, *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=WAIT_S)
        assert done.returncode == 0, done.stderr
        return set(done.stderr.rpartition("LOADED")[2].split())

    for command in (["--help"], ["plan", "--help"], ["--version"], ["settings"]):
        assert loaded(*command).isdisjoint({"numpy", "scipy", "pandas", "matplotlib", "joblib", "simpy", "openai"})
    assert loaded("simulate", batch, "--json").isdisjoint({"pandas", "matplotlib", "joblib", "openai", "jinja2"})


# The modules of the command line itself, which need no extra.
KEPT = ("sim.app.cli", "sim.app.options", "sim.app.planning_commands")


def test_without_the_extra_one_line_says_what_to_install(run: Run, batch: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    for name in [name for name in sys.modules if name.startswith("sim.") and name not in KEPT]:
        monkeypatch.delitem(sys.modules, name)
        if name.count(".") == 1:
            # What is imported again in its place becomes the package's attribute, which must be the old one afterwards.
            monkeypatch.setattr(sim, name.split(".")[1], getattr(sim, name.split(".")[1]))
    code, out, err = run("simulate", batch)
    assert (code, out, err) == (2, "", "planning needs paceline[sim]: pip install 'paceline[sim]'\n")


def test_help_lists_every_option_of_the_issue(run: Run, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shared = (
        "env-file set tpm rpm provider provider-charge provider-settles latency arrivals first seed replications json"
    )
    shared += " columns outputs-from output-tokens max-tokens skip-oversized finalize"
    own = {
        "simulate": "attempts timeline chrome-trace",
        "plan": "out objective max-throttled-per-100 max-lost finish-by effort workers",
        "capacity": "finish-by",
    }
    for command, options in own.items():
        code, out, _ = run(command, "--help")
        assert code == 0
        for option in (*shared.split(), *options.split()):
            assert f"--{option} " in out, (command, option)


def test_help_names_each_command_once_in_its_group_at_80_columns(run: Run, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("-h")
    assert code == 0
    assert "Other:" not in out
    assert sorted(name for names in cli.GROUPS.values() for name in names) == sorted(get_command(cli.app).commands)
    rows = out.splitlines()[1:]
    assert not [row for row in rows if len(row) > 80 or row.endswith("...")]


def test_version_and_settings(run: Run) -> None:
    assert run("--version") == (0, f"paceline {__version__}\n", "")
    assert run("settings", "--markdown") == (0, knob_table(), "")


def test_settings_say_what_is_in_force_and_where_it_comes_from(run: Run, tmp_path: Path, monkeypatch) -> None:
    for knob in KNOBS:
        monkeypatch.delenv(knob.env, raising=False)
    monkeypatch.setenv("OPENAI_STAGGER_SECONDS", "4")

    def shown(*options: str) -> dict[str, str]:
        code, out, err = run("settings", *options)
        assert (code, err) == (0, "")
        return dict(line.split("=", 1) for line in out.splitlines() if not line.startswith(" "))

    found = shown()
    assert list(found) == [knob.env for knob in KNOBS]
    assert found["OPENAI_STAGGER_SECONDS"] == "4  (environment)"
    assert found["OPENAI_MAX_CONCURRENCY"] == "3  (default)"
    below, above = tmp_path / "below.env", tmp_path / "above.env"
    below.write_text("# ours\nOPENAI_MAX_CONCURRENCY=7\nOPENAI_TPM_HEADROOM=0.1\nTOKEN=sk-secret\n")
    above.write_text("OPENAI_TPM_HEADROOM=0.2\nOPENAI_MAX_CONCURRENCY=\n")
    files = ("--env-file", str(below), "--env-file", str(above))
    found = shown(*files, "--preset", "paceline", "--set", "OPENAI_TPM_LIMIT=9000")
    assert found["OPENAI_MAX_CONCURRENCY"] == f"7  ({below}:2)"
    assert found["OPENAI_TPM_HEADROOM"] == f"0.2  ({above}:1)"
    assert found["OPENAI_TPM_LIMIT"] == "9000  (--set)"
    assert found["OPENAI_TPM_WINDOW"] == "bucket  (preset paceline)"
    assert found["OPENAI_STAGGER_SECONDS"] == "0.2  (preset paceline)", "files replace the environment"
    told = json.loads(run("settings", *files, "--json")[1])
    assert told["OPENAI_TPM_HEADROOM"] == {"value": "0.2", "from": f"{above}:1"}


def test_no_command_shows_the_help_and_is_a_mistake(run: Run) -> None:
    code, out, _ = run()
    assert code == 2
    assert "simulate" in out
