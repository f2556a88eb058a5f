"""A live run of a scenario against a synthetic provider on loopback: `paceline run` as a user would type it.

It needs no key and no network: requests go to 127.0.0.1 only. The clocks of both sides run `time_scale` times as fast.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

from governor.model.errors import BadInput, PacelineError
from sim.scenario.readers import BATCH, Source
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import FileSource

_TIMEOUT_S = 600.0


def rehearsed(scenario: Scenario, folder: str | Path, *, requests: int = 0, time_scale: float = 10.0) -> Path:
    """Run the scenario's batch (its first `requests`; 0 = all) live against its provider; return the journal's path.

    The folder, created if necessary, receives the files of `paceline run`; a finished run in it is replaced. Raise
    Raise BadInput if the scenario's requests are not a batch file, since only bodies can be sent; PacelineError if the
    run fails.
    """
    from sim.serving.server import spawn

    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    batch = _batch_of(scenario, place, requests)
    for path in place.glob("results.*"):
        path.unlink()
    settings = place / "settings.env"
    settings.write_text(scenario.policy.to_env(everything=True), encoding="utf-8")
    # Settings of the outer environment, such as a proxy or a key, must not apply on loopback.
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"OPENAI_API_KEY": "no-key-is-needed"}
    results = place / "results.jsonl"
    words = ["run", str(batch), "--out", str(results), "--env-file", str(settings)]
    words += ["--record", "--time-scale", f"{time_scale:g}"]
    with spawn(scenario.provider, seed=scenario.seed, time_scale=time_scale, stated_time="provider") as provider:
        words += ["--base-url", provider.base_url]
        command = [sys.executable, "-m", "sim.app.cli", *words]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if ran.returncode:
        raise PacelineError(f"the live run failed: {(ran.stderr.strip() or 'without a word').splitlines()[-1]}")
    return place / "results.journal.db"


def _batch_of(scenario: Scenario, folder: Path, requests: int) -> Path:
    """Return the batch file, or a copy of its first lines in the folder."""
    source = scenario.source
    if not isinstance(source, FileSource) or source.path == "-" or Source.open(source.path).kind() != BATCH:
        raise BadInput("only requests in a batch file can be sent: token counts have no bodies", "requests")
    count = requests or source.first
    if not count:
        return Path(source.path)
    batch = folder / "batch.jsonl"
    with open(source.path, "rb") as file:
        batch.write_bytes(b"".join(islice((line for line in file if line.strip()), count)))
    return batch
