"""The live step of `make demo`: the planned batch over real HTTP, and what the simulation says of it. No key is needed.

Runs the three commands that it prints, which anybody may type: a synthetic provider on loopback, the batch through it
under the recommended settings, predicted against measured. Clocks of both sides run ten times as fast. The provider is
stopped however this ends; Ctrl-C stops the run in order. Needs what `make demo` has written to the folder.

    python examples/live.py [--out out] [--time-scale 10]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from governor.model.words import duration

ROOT = Path(__file__).resolve().parent.parent
BATCH = ROOT / "examples" / "batch.jsonl"
STOPS_WITHIN_S = 10.0
PACELINE = (sys.executable, "-m", "sim.app.cli")


def shown(words: list[str]) -> str:
    """A command as somebody would type it."""
    return "$ paceline " + shlex.join([os.path.relpath(word) if os.path.isabs(word) else word for word in words])


def run(words: list[str], environment: dict[str, str]) -> int:
    """A command in the foreground, to its end; its exit code. Ctrl-C is the command's business."""
    print(f"\n{shown(words)}", flush=True)
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return subprocess.run([*PACELINE, *words], env=environment, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def provider(words: list[str]) -> Iterator[str]:
    """A provider in the background, out of reach of the terminal's Ctrl-C; its base URL, "" if it did not start."""
    print(f"\n{shown(words)} &", flush=True)
    process = subprocess.Popen([*PACELINE, *words], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        name, _, url = process.stdout.readline().strip().partition("=")
        if name == "OPENAI_BASE_URL":
            print(f"{name}={url}\n{process.stdout.readline().strip()}", flush=True)
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # as Ctrl-C would: it ends without a word
        try:
            process.wait(STOPS_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def planned(path: Path) -> str:
    """What the plan had said of these settings, for people."""
    figure = json.loads(path.read_text(encoding="utf-8"))["recommended"]["figures"]["makespan_s"]
    return f"The plan had said {duration(figure['p50'])}, before anything was sent."


def rehearsed(live: Path, settings: Path, options: list[str], environment: dict[str, str]) -> int:
    """The run and its backtest; the exit code of the first that fails."""
    code = run(
        ["run", str(BATCH), "--out", str(live / "results.jsonl"), "--env-file", str(settings), *options], environment
    )
    if code:
        return code
    code = run(["backtest", str(live / "results.journal.db")], environment)
    print(f"\n{planned(live.parent / 'plan.json')}")
    return code


def main(words: list[str]) -> int:
    """The three steps; the exit code of the first that fails."""
    parser = argparse.ArgumentParser(description="The planned example batch, live against a synthetic provider.")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder of the plan")
    parser.add_argument("--time-scale", default="10", help="how many times as fast all clocks run")
    given = parser.parse_args(words)
    settings, scenario, live = given.out / "recommended.env", given.out / "scenario.yaml", given.out / "live"
    for path in (settings, scenario, given.out / "plan.json"):
        if not path.exists():
            print(f"{path} is not there: let `make demo` plan the batch first", file=sys.stderr)
            return 2
    live.mkdir(exist_ok=True)
    for path in live.iterdir():
        path.unlink()  # a run finds nothing left to do where it has ended before
    # What is set outside, a proxy or a key, has no business on loopback.
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"OPENAI_API_KEY": "no-key-is-needed"}
    scale = ["--time-scale", given.time_scale]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with provider(["provider", "--provider", str(scenario), *scale, "--stated-time", "provider"]) as url:
            if not url:
                return 1  # it has said why
            return rehearsed(live, settings, [*scale, "--base-url", url], environment)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
