"""`paceline provider` serves on loopback until a signal ends it, and says where in its first line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request

import pytest

from sim.app.cli import main
from tests.live import WAIT_S


def test_serves_what_the_options_say_until_interrupted() -> None:
    words = ["--port", "0", "--tpm", "45000", "--charge", "max_of", "--settles", "--time-scale", "5"]
    with subprocess.Popen(
        [sys.executable, "-m", "sim.app.cli", "provider", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            name, _, url = process.stdout.readline().strip().partition("=")
            described = process.stdout.readline()
            with urllib.request.urlopen(url.removesuffix("/v1") + "/_stats", timeout=WAIT_S) as answer:
                stats = json.load(answer)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(WAIT_S)
    assert name == "OPENAI_BASE_URL"
    assert url.startswith("http://127.0.0.1:")
    assert "45,000 TPM" in described
    assert "charge max_of" in described
    assert isinstance(stats, dict)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--charge", "nope"], "provider.charge_rule='nope'"),
        (["--provider", "no-such-tier"], "no-such-tier"),
        (["--faults", "absent.yaml"], "absent.yaml"),
        (["--time-scale", "0"], "--time-scale"),
    ],
)
def test_bad_words_are_one_line_and_exit_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["provider", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
