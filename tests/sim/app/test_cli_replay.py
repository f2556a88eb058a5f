"""`paceline replay JOURNAL`, and a journal where a workload is: on a run of the real driver."""

from __future__ import annotations

import asyncio
import csv
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml

from governor.model.policy import Policy
from governor.model.requests import Answer, Outcome
from governor.model.work import Job
from sim.app.cli import main
from sim.calibration.logs import write_log
from sim.des.engines import simulated
from sim.experiment.experiment import case_of
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import from_tokens
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import FileSource
from tests.governor.journals import FREE, answer, created, refusal, run_through

REQUESTS, REFUSED, FAILED = 16, 4, 6
POLICY = FREE.with_(max_concurrency=2)


async def sent(job: Job, timeout_s: float) -> Answer:
    """Every so many requests are refused once, or fail once; the others are answered in some hundredths of a second."""
    await asyncio.sleep(0.01 + 0.01 * (job.index % 5))
    if job.attempt == 1 and job.index % REFUSED == 1:
        return refusal(retry_after_s=0.03)
    if job.attempt == 1 and job.index % FAILED == 2:
        return refusal(Outcome.SERVER_ERROR, 500)
    return answer(job.index)


@pytest.fixture
def journal(tmp_path: Path) -> str:
    with created(tmp_path / "run.db", REQUESTS) as written:
        recorder = written.begin({"default": POLICY}, 0.0).recorders["default"]
        run_through(written, recorder, sent, policy=POLICY)
        written.finish(10.0, "done")
    return str(tmp_path / "run.db")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_without_settings_the_run_is_reproduced(journal: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "replay", journal)
    attempts = REQUESTS + 4 + 3
    assert found["requests"] == REQUESTS
    assert found["settings"] == {}
    for name, count in (("launches", attempts), ("throttled", 4)):
        assert found[name]["was"] == found["own_settings"][name] == count
        assert found[name]["low"] == found[name]["high"] == 0
    assert found["parted_s"] is None
    assert found["own_settings"]["makespan_s"] == pytest.approx(found["makespan_s"]["was"], rel=0.005)
    assert [found["makespan_s"][name] for name in ("low", "high")] == pytest.approx([0.0, 0.0], abs=0.005)


def test_other_settings_are_named_and_change_the_run(journal: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "replay", journal, "--set", "OPENAI_MAX_CONCURRENCY=1")
    assert found["settings"] == {"OPENAI_MAX_CONCURRENCY": {"was": "2", "is": "1"}}
    assert found["makespan_s"]["difference"] > 0.0
    assert found["ends"]["later_ratio"] > 0.5


def test_the_table_fits_a_terminal_and_ends_with_the_answer(journal: str, capsys: pytest.CaptureFixture[str]) -> None:
    from sim.app.options import ReplayOptions
    from sim.app.replay_command import replayed

    _, text = replayed(journal, ReplayOptions(assignments=["OPENAI_MAX_CONCURRENCY=1"]), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "With these settings the run would have taken" in text.rsplit("\n\n", 1)[1]
    assert capsys.readouterr().out == ""


def test_pairs_are_written_for_each_request(journal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pairs.csv"
    found = printed(capsys, "replay", journal, "--set", "OPENAI_MAX_CONCURRENCY=1", "--pairs", str(path))
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["custom_id"] for row in rows] == [f"q-{i}" for i in range(REQUESTS)]
    assert max(float(row["ended_s"]) for row in rows) == pytest.approx(found["makespan_s"]["was"], abs=2e-3)
    for row in rows:
        later_s = float(row["would_end_s"]) - float(row["ended_s"])
        assert float(row["later_s"]) == pytest.approx(later_s, abs=2e-3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nothing.db",), "nothing.db"),
        (("JOURNAL", "--set", "OPENAI_TPM_LIMITS=5"), "OPENAI_TPM_LIMIT"),
        (("JOURNAL", "--set", "OPENAI_TPM_LIMIT=-5"), "OPENAI_TPM_LIMIT"),
        (("JOURNAL", "--env-file", "gone.env"), "gone.env"),
        (("JOURNAL", "--pairs", "pairs.txt"), ".csv"),
        (("JOURNAL", "--provider", "gpt-9-tier7"), "gpt-9-tier7"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words: tuple[str, ...], said: str, journal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", *(journal if word == "JOURNAL" else word for word in words)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_journal_stands_where_a_workload_does(
    journal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = printed(capsys, "simulate", journal)
    assert found["requests"] == REQUESTS
    out = tmp_path / "out"
    printed(capsys, "plan", journal, "--effort", "quick", "--workers", "1", "--out", str(out))
    again = printed(capsys, "simulate", str(out / "scenario.yaml"))
    assert again["makespan_s"] == pytest.approx(found["makespan_s"])
    assert main(["simulate", journal, "--first", "3"]) == 2
    assert "journal" in capsys.readouterr().err


# ---------------------------------------------------------------- logs of other clients

PROVIDER = ProviderConfig(
    tpm=20_000,
    rpm=100,
    charge_rule="prompt_plus_max",
    latency={"first_token_s": 1.0, "per_token_s": 0.02, "sigma": 0.0, "stall_ratio": 0.0},
)


def policy(**changes: Any) -> Policy:
    base = {"tpm_limit": 20_000, "rpm_limit": 100, "charge_rule": "prompt_plus_max", "stagger_seconds": 0.0}
    return Policy().with_(**{**base, "tpm_window": "bucket", **changes})


@pytest.mark.parametrize("arrivals", ["batch", "trace"])
def test_a_log_is_replayed_as_a_second_run_would_be(
    arrivals: Literal["batch", "trace"], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(3)
    n = 60
    arrival_s = np.sort(rng.uniform(0.0, 120.0, n)) if arrivals == "trace" else None
    if arrival_s is not None:
        arrival_s[0] = 0.0
    workload = from_tokens(rng.integers(50, 400, n), rng.integers(20, 500, n), max_tokens=500, arrival_s=arrival_s)
    first = Scenario(
        source=FileSource(path="-"),
        workload=workload,
        provider=PROVIDER,
        policy=policy(max_concurrency=20),
        arrivals=arrivals,
    )
    write_log(first, tmp_path / "log.csv")
    (tmp_path / "provider.yaml").write_text(yaml.safe_dump(PROVIDER.model_dump(mode="json")))
    second = policy(max_concurrency=2)
    (tmp_path / "second.env").write_text(second.to_env(everything=True))
    words = [str(tmp_path / "log.csv"), "--env-file", str(tmp_path / "second.env")]
    found = printed(capsys, "replay", *words, "--provider", str(tmp_path / "provider.yaml"))
    case = case_of(first.with_(policy=second))
    other = simulated(case, 0)
    assert found["own_settings"] is None
    assert found["provider_alone"]["throttled"] == found["throttled"]["was"]
    assert found["makespan_s"]["would"] == pytest.approx(float(other.last_s), rel=1e-3)
    assert found["throttled"]["would"] == other.throttled
    learnt = printed(capsys, "replay", *words)
    assert learnt["makespan_s"]["would"] == pytest.approx(float(other.last_s), rel=0.05)


def test_a_log_without_moments_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.csv"
    path.write_text("prompt_tokens,output_tokens\n" + "100,50\n" * 20)
    assert main(["replay", str(path)]) == 2
    assert "launched" in capsys.readouterr().err
