"""Bad input: one clear line on stderr, exit code 2, nothing on stdout, no file left."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from governor.model import files
from governor.model.policy import KNOBS
from sim.app.cli import main

Run = Callable[..., tuple[int, str, str]]
COMMANDS = {
    "simulate": ["--attempts", "new/a.csv"],
    "plan": ["--out", "new/out", "--effort", "quick", "--workers", "1"],
    "capacity": ["--finish-by", "6h"],
}


def line(number: int = 0, **changes: object) -> str:
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "word " * 50}], "max_tokens": 20}
    request = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body | changes}
    return json.dumps(request) + "\n"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
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


def refused(result: tuple[int, str, str]) -> str:
    """The one line of a refusal."""
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err.rstrip()


# ---------------------------------------------------------------- workloads

FILES = {
    "empty.jsonl": ("", "empty.jsonl: the file is empty"),
    "blank.csv": ("\n\n", "blank.csv: nothing but blank lines in it"),
    "broken.jsonl": (line(0) + '{"custom_id": "r1", "body"\n' + line(2), "broken.jsonl:2: not JSON"),
    "twice.jsonl": (line(0) + line(1) + line(0), "twice.jsonl:3: "),
    "bare.csv": ("2023-11-16 18:17:03.97,100,200\n", "bare.csv:1: values where a header line with the columns' names"),
    "minus.csv": ("ContextTokens,GeneratedTokens\n5,5\n-7,5\n", "minus.csv:3: "),
    "words.csv": ("ContextTokens,GeneratedTokens\n5,five\n", "words.csv:2: "),
    "columns.csv": (
        "a,b\n1,2\n",
        "columns.csv:1: no column of prompt and output tokens: found 'a', 'b'; name it: --columns",
    ),
    "minus.jsonl": (line(0) + line(1, max_tokens=-5), "minus.jsonl:2: "),
    "large.jsonl": (
        line(0) + line(1, messages=[{"role": "user", "content": "x" * 400_000}]),
        "request 1 ('r1') needs 100,163 tokens, the limit is 30,000",
    ),
    "scenario.yaml": ("workload: {path: none.jsonl}\n", "none.jsonl: there is no such file"),
    "slip.yaml": ("worklod: {path: none.jsonl}\n", "slip.yaml: "),
    "broken.yaml": ("workload: {path: x\nprovider: [\n", "broken.yaml:"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", FILES)
def test_a_workload_that_cannot_be_read(run: Run, tmp_path: Path, command: str, name: str) -> None:
    text, message = FILES[name]
    (tmp_path / name).write_text(text)
    (tmp_path / "new").mkdir()
    if (command, name) == ("capacity", "large.jsonl"):
        # There the limit is what is asked for.
        assert run("capacity", name, "--finish-by", "6h", "--replications", 2, "--workers", 1)[0] == 0
        return
    assert refused(run(command, name, *COMMANDS[command])).startswith(message)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_that_is_not_there(run: Run, tmp_path: Path) -> None:
    assert refused(run("simulate", "none.jsonl")) == "none.jsonl: there is no such file"
    assert refused(run("simulate", ".")) == ".: this is a folder: name a file in it"
    assert refused(run("plan", "none.jsonl")) == "none.jsonl: there is no such file"
    assert list(tmp_path.iterdir()) == []


def test_a_duplicate_names_both_lines_and_the_id(run: Run, tmp_path: Path) -> None:
    (tmp_path / "twice.jsonl").write_text(FILES["twice.jsonl"][0])
    message = refused(run("simulate", "twice.jsonl"))
    assert "'r0'" in message
    assert "line 1" in message


def test_a_control_character_stays_on_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text("ContextTokens,GeneratedTokens\n5,5\n")
    refused(run("simulate", "w.csv", "--set", "OPENAI_TPM_LIMIT=3\n4"))
    refused(run("simulate", "no\nsuch\nfile"))


def test_skip_oversized_goes_on_and_says_so(run: Run, tmp_path: Path) -> None:
    (tmp_path / "large.jsonl").write_text(FILES["large.jsonl"][0])
    code, out, err = run("simulate", "large.jsonl", "--skip-oversized", "--json")
    assert code == 0
    assert json.loads(out)["requests"] == 1
    assert err == "note: 1 of 2 requests left out: charged more than 30,000 tokens\n"
    # In the table, too, where the inputs stand.
    assert "1 left out: charged more than the limit of 30,000" in run("simulate", "large.jsonl", "--skip-oversized")[1]


# ---------------------------------------------------------------- settings and options

OPTIONS = {
    ("--set", "OPENAI_TPM_HEADROOM=1.5"): "OPENAI_TPM_HEADROOM='1.5' is not allowed: a number from 0 to below 1",
    (
        "--set",
        "OPENAI_STAGER_SECONDS=1",
    ): "there is no setting 'OPENAI_STAGER_SECONDS': did you mean OPENAI_STAGGER_SECONDS?",
    ("--set", "OPENAI_TPM_LIMIT"): "OPENAI_TPM_LIMIT was given no value",
    ("--set", "OPENAI_API_KEY=x"): "there is no setting 'OPENAI_API_KEY'",
    ("--env-file", "none.env"): "none.env: there is no such file",
    ("--env-file", "slip.env"): "slip.env:2: there is no setting 'OPENAI_TMP_LIMIT': did you mean OPENAI_TPM_LIMIT?",
    ("--env-file", "range.env"): "range.env:1: OPENAI_MAX_CONCURRENCY='0' is not allowed: a whole number from 1",
    ("--provider", "gpt-4o-tier9"): "there is no provider preset 'gpt-4o-tier9': did you mean gpt-4o-tier",
    ("--provider", "none.yaml"): "none.yaml: there is no such file",
    ("--latency", "gpt-9"): "there is no latency preset 'gpt-9'",
    ("--arrivals", "trace"): "the workload has no arrival times",
    ("--output-tokens", "900,250"): "--output-tokens '900,250'",
    ("--outputs-from", "none.jsonl"): "none.jsonl: there is no such file",
    ("--columns", "prompt"): "--columns 'prompt': write ROLE=NAME",
    ("--tpm", "lots"): "Invalid value for '--tpm': 'lots' is not a whole number",
    ("--tpm", "10"): "request 0 ('r0') needs",
    ("--first", "-1"): "Invalid value for '--first'",
    ("--replications", "0"): "Invalid value for '--replications'",
    ("--seed", "-3"): "Invalid value for '--seed'",
    ("--provider-charge", "free"): "Invalid value for '--provider-charge'",
    ("--no-such-option", "1"): "No such option: --no-such-option",
}


@pytest.mark.parametrize("words", OPTIONS, ids=" ".join)
def test_an_option_that_cannot_be_meant(run: Run, tmp_path: Path, words: tuple[str, str]) -> None:
    (tmp_path / "batch.jsonl").write_text(line(0) + line(1))
    (tmp_path / "slip.env").write_text("A=1\nOPENAI_TMP_LIMIT=1\n")
    (tmp_path / "range.env").write_text("OPENAI_MAX_CONCURRENCY=0\n")
    assert refused(run("simulate", "batch.jsonl", *words)).startswith(OPTIONS[words])


def test_a_slip_in_the_environment(run: Run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "batch.jsonl").write_text(line(0))
    monkeypatch.setenv("OPENAI_MAX_CONCURENCY", "5")
    assert refused(run("simulate", "batch.jsonl")).endswith("did you mean OPENAI_MAX_CONCURRENCY?")
    # An env file stands in place of the environment.
    (tmp_path / "today.env").write_text("OPENAI_MAX_CONCURRENCY=5\n")
    assert run("simulate", "batch.jsonl", "--env-file", "today.env")[0] == 0


@pytest.mark.parametrize(
    "args",
    [
        ("simulate",),
        ("sumilate", "batch.jsonl"),
        ("capacity", "batch.jsonl"),
        ("capacity", "batch.jsonl", "--finish-by", "soon"),
        ("capacity", "batch.jsonl", "--finish-by", "6h", "--tiers", "gpt-1"),
        ("capacity", "batch.jsonl", "--finish-by", "6h", "--confidence", "2"),
        ("plan", "batch.jsonl", "--effort", "none"),
        ("sensitivity", "batch.jsonl", "--size", "1"),
        ("plan", "batch.jsonl", "--objective", "cost"),
        ("plan", "batch.jsonl", "--max-lost", "2"),
        ("plan", "batch.jsonl", "--max-throttled-per-100", "-1"),
        ("plan", "batch.jsonl", "--finish-by", "25:00"),
    ],
    ids=" ".join,
)
def test_commands_that_cannot_be_meant(run: Run, tmp_path: Path, args: tuple[str, ...]) -> None:
    (tmp_path / "batch.jsonl").write_text(line(0))
    refused(run(*args))
    assert [path.name for path in tmp_path.iterdir()] == ["batch.jsonl"]


# ---------------------------------------------------------------- outputs that cannot be written


def test_a_reader_that_has_gone_and_a_full_disk_are_no_tracebacks(capsys, monkeypatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    full = "the output cannot be written: No space left on device: what was done stays done\n"
    for descriptor, code, said in ((writer, 141, ""), (os.open("/dev/full", os.O_WRONLY), 2, full)):
        stream = os.fdopen(descriptor, "w")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert main(["settings"]) == code
        with contextlib.suppress(OSError):
            stream.close()
        assert capsys.readouterr().err == said


def test_targets_are_checked_before_the_work(run: Run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "batch.jsonl").write_text(line(0))
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("sim.app.inputs.read_inputs", lambda *a, **k: pytest.fail("the work had begun"))
    for option in ("--attempts", "--timeline", "--chrome-trace"):
        ending = {"--attempts": "csv", "--timeline": "png", "--chrome-trace": "json"}[option]
        assert "name a file with that ending" in refused(run("simulate", "batch.jsonl", option, "a.txt"))
        assert "create it first" in refused(run("simulate", "batch.jsonl", option, f"none/a.{ending}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batch.jsonl", "file"]


def test_a_folder_that_cannot_be_written_into(run: Run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "batch.jsonl").write_text(line(0))
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("sim.selection.planner.plan", lambda *a, **k: pytest.fail("the work had begun"))
    assert refused(run("plan", "batch.jsonl", "--out", "file")).startswith("file: cannot be written into: ")
    assert refused(run("plan", "batch.jsonl", "--out", "file/deeper")).startswith(
        "file/deeper: cannot be written into: "
    )
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batch.jsonl", "file"]


def test_a_full_disk_leaves_the_older_attempts(run: Run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "batch.jsonl").write_text(line(0))
    (tmp_path / "a.csv").write_text("older\n")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    message = refused(run("simulate", "batch.jsonl", "--attempts", "a.csv"))
    assert message == "a.csv: cannot be written: the disk is full: make room, or name another folder"
    assert (tmp_path / "a.csv").read_text() == "older\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "batch.jsonl"]


def test_our_own_faults_are_not_hidden(run: Run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "batch.jsonl").write_text(line(0))

    def fault(*args: object, **how: object) -> None:
        raise AssertionError("a fault of ours")

    monkeypatch.setattr("sim.app.inputs.read_inputs", fault)
    with pytest.raises(AssertionError, match="a fault of ours"):
        run("simulate", "batch.jsonl")
