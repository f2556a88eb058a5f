"""The shipped batch is what its script makes, and it is what the demo's readers are told it is."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median
from types import ModuleType
from typing import Any

import psutil
import pytest
from dotenv import dotenv_values

from governor.model.policy import Policy
from tests.live import WAIT_S

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CHARS_PER_TOKEN = 4

# Today's eight guardrails.
GUARDRAILS = {
    "OPENAI_MAX_CONCURRENCY": "3",
    "OPENAI_STAGGER_SECONDS": "15",
    "OPENAI_TPM_LIMIT": "30000",
    "OPENAI_TPM_HEADROOM": "0.15",
    "OPENAI_EST_TOKENS_PER_RUN": "7000",
    "OPENAI_RETRY_MAX_ATTEMPTS": "5",
    "OPENAI_BACKOFF_BASE_SECONDS": "2",
    "FINALIZE_LOWERS_CONCURRENCY": "true",
}


@pytest.fixture(scope="module")
def make_batch() -> ModuleType:
    # Loaded from its file: `examples` is a folder of scripts, not a package.
    spec = importlib.util.spec_from_file_location("make_batch", EXAMPLES / "make_batch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_batch"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shipped() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLES / "batch.jsonl").read_text(encoding="utf-8").splitlines()]


def prompt_tokens(line: dict[str, Any]) -> float:
    return sum(len(message["content"]) for message in line["body"]["messages"]) / CHARS_PER_TOKEN


def test_the_script_reproduces_the_shipped_batch_to_the_byte(tmp_path: Path) -> None:
    made = tmp_path / "batch.jsonl"
    command = [sys.executable, str(EXAMPLES / "make_batch.py"), "--out", str(made)]
    # A foreign hash seed and locale: neither may show in the bytes.
    run = subprocess.run(
        command, env={"PYTHONHASHSEED": "7", "LC_ALL": "C"}, capture_output=True, text=True, check=False, timeout=WAIT_S
    )
    assert run.returncode == 0, run.stderr
    assert made.read_bytes() == (EXAMPLES / "batch.jsonl").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["batch.jsonl"]


def test_every_line_is_in_the_batch_input_format(shipped: list[dict[str, Any]]) -> None:
    assert len(shipped) == 200
    assert len({line["custom_id"] for line in shipped}) == 200
    for line in shipped:
        assert set(line) == {"custom_id", "method", "url", "body"}
        assert (line["method"], line["url"], line["body"]["model"]) == ("POST", "/v1/chat/completions", "gpt-4o")
        assert [message["role"] for message in line["body"]["messages"]] == ["system", "user"]


def test_lengths_and_caps_vary_as_a_real_night_does(shipped: list[dict[str, Any]], make_batch: ModuleType) -> None:
    tokens = [prompt_tokens(line) for line in shipped]
    assert min(tokens) >= 240
    assert max(tokens) <= 3_000
    assert max(tokens) >= 2_500
    # A log-normal mixture leans to the right: the mean lies above the median.
    assert fmean(tokens) > 1.1 * median(tokens)
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in shipped:
        by_kind["-".join(line["custom_id"].split("-")[:2])].append(line)
    assert {name: len(lines) for name, lines in by_kind.items()} == {k.name: 2 * k.share for k in make_batch.KINDS}
    for kind in make_batch.KINDS:
        assert {line["body"]["max_tokens"] for line in by_kind[kind.name]} == {kind.max_tokens}
        assert len({line["body"]["messages"][1]["content"] for line in by_kind[kind.name]}) == len(by_kind[kind.name])


def test_no_template_slot_is_left_unfilled(shipped: list[dict[str, Any]], make_batch: ModuleType) -> None:
    words = json.loads((EXAMPLES / "phrases.json").read_text(encoding="utf-8"))["words"]
    for line in shipped:
        text = " ".join(message["content"] for message in line["body"]["messages"])
        assert ".." not in text.replace("[...]", "")
        assert not [word for word in words if f"{{{word}}}" in text]


def test_another_seed_makes_another_batch_of_the_same_make_up(make_batch: ModuleType, seed: int) -> None:
    other = make_batch.batch(count=50, seed=seed)
    assert other == make_batch.batch(count=50, seed=seed)
    assert other != make_batch.batch(count=50, seed=seed + 1)
    assert len(other.splitlines()) == 50


def test_it_is_small_enough_to_ship() -> None:
    assert (EXAMPLES / "batch.jsonl").stat().st_size < 1_500_000


def test_todays_settings_are_the_guardrails_among_foreign_names() -> None:
    values = dotenv_values(EXAMPLES / "today.env")
    assert {name: values.get(name) for name in GUARDRAILS} == GUARDRAILS
    assert {"DATABASE_URL", "SESSION_SECRET", "OPENAI_API_KEY"} <= set(values) - set(GUARDRAILS)


def test_the_policy_reads_todays_settings_and_nothing_else() -> None:
    read = Policy.from_env(dotenv_values(EXAMPLES / "today.env"))
    assert read == Policy.preset("guardrails")
    assert "change-me" not in repr(read.to_env())


# ---------------------------------------------------------------- the demo's live step


LIVE = [sys.executable, str(EXAMPLES / "live.py")]


def test_the_live_step_wants_a_plan(tmp_path: Path) -> None:
    done = subprocess.run([*LIVE, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path / 'recommended.env'} is not there: let `make demo` plan the batch first\n"


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    """A folder as a plan leaves it; the provider has no limits and answers at once."""
    free = {"OPENAI_MAX_CONCURRENCY": "50", "OPENAI_STAGGER_SECONDS": "0", "OPENAI_TPM_LIMIT": "10000000"}
    (tmp_path / "recommended.env").write_text("".join(f"{name}={value}\n" for name, value in free.items()))
    latency = {"first_token_s": 0.5, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0}
    scenario = {
        "workload": {"path": str(EXAMPLES / "batch.jsonl")},
        "provider": {"tpm": 10_000_000, "latency": latency},
    }
    (tmp_path / "scenario.yaml").write_text(json.dumps(scenario))
    figures = {"recommended": {"figures": {"makespan_s": {"p50": 90.0}}}}
    (tmp_path / "plan.json").write_text(json.dumps(figures))
    return tmp_path


@pytest.mark.slow
def test_the_live_step_runs_the_batch_and_compares(planned: Path) -> None:
    done = subprocess.run([*LIVE, "--out", str(planned)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$")] == [
        "provider",
        "run",
        "backtest",
    ]
    assert "done                200 of 200" in done.stdout
    assert "The plan had said 1 min 30 s" in done.stdout
    assert len((planned / "live" / "results.jsonl").read_text().splitlines()) == 200


@pytest.mark.slow
def test_ctrl_c_ends_the_live_step_and_its_provider(planned: Path) -> None:
    slow = (planned / "scenario.yaml").read_text().replace('"first_token_s": 0.5', '"first_token_s": 600.0')
    (planned / "scenario.yaml").write_text(slow)
    with subprocess.Popen([*LIVE, "--out", str(planned)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("$ paceline run"):
                break
        step = psutil.Process(process.pid)
        # As a terminal does: to everybody in the foreground. The provider is not.
        waited_until = time.monotonic() + WAIT_S
        while not (journal := planned / "live" / "results.journal.db").exists():
            assert time.monotonic() < waited_until, journal
            time.sleep(0.05)
        (provider,) = [child for child in step.children() if "provider" in child.cmdline()]
        for child in (*step.children(), step):
            if child != provider:
                child.send_signal(signal.SIGINT)
                child.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) != 0
    assert not provider.is_running()
