"""Several `paceline run` side by side on one quota, as tests and the benchmark of shared quotas start them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from governor.model.pools import REDIS_URL
from sim.model.provider_config import ProviderConfig
from sim.serving.server import ProviderProcess, spawn
from tests.live import WAIT_S, Cli, batch, check_whole, run_args

SCALE = 20.0
TPM = 30_000
# Charged at admission, the whole cap; about 950 tokens a request.
ENV = {
    "OPENAI_MAX_CONCURRENCY": "60",
    "OPENAI_TPM_LIMIT": str(TPM),
    "OPENAI_TPM_HEADROOM": "0.05",
    "OPENAI_CHARGE_RULE": "prompt_plus_max",
}


def provider(scale: float = SCALE) -> ProviderProcess:
    latency = {"first_token_s": 1.0, "per_token_s": 0.005, "sigma": 0.2, "stall_ratio": 0.0}
    config = ProviderConfig().with_(tpm=TPM, rpm=0, charge_rule="prompt_plus_max", latency=latency)
    return spawn(config, time_scale=scale, stated_time="provider")


class Runs:
    """Several `paceline run` side by side, each with a batch and a journal of its own."""

    def __init__(
        self, cli: Cli, folder: Path, served: ProviderProcess, url: str, count: int, requests: int, scale: float = SCALE
    ) -> None:
        self.cli = cli
        self.url = url
        self.served = served
        self.scale = scale
        self.requests = requests
        self.folders = [folder / str(i) for i in range(count)]
        for i, each in enumerate(self.folders):
            each.mkdir()
            batch(each / "requests.jsonl", requests, i, cap=900)
        self.processes = [self.start(i) for i in range(count)]

    def start(self, i: int) -> Any:
        args = run_args(self.folders[i], self.served.base_url, "--json", "--yes", "--time-scale", self.scale)
        args.append("--record")
        return self.cli.start(*args, env=ENV | {REDIS_URL: self.url})

    def until_seen(self, requests: int) -> None:
        """Until the provider has seen so many."""
        until = time.monotonic() + WAIT_S
        while self.served.stats()["requests"] < requests:
            assert time.monotonic() < until, [process.err.read_text()[-500:] for process in self.processes]
            time.sleep(0.05)

    def done(self) -> list[Any]:
        """All have ended well: each request has one result, and each decision comes out the same again."""
        found = [process.wait() for process in self.processes]
        for ran, folder in zip(found, self.folders, strict=True):
            assert ran.code == 0, ran.err
            assert "Traceback" not in ran.err
            check_whole(folder, self.requests)
            assert ran.json["completed"] == self.requests
            verified = self.cli.run("verify", folder / "results.journal.db")
            assert verified.code == 0, verified.out
            assert "all equal" in verified.out
        return found


def never_above_the_limit(served: ProviderProcess) -> int:
    """Nobody was let in above the limit; how many were refused."""
    stats = served.stats()
    assert stats["windows"]["TPM"]["used_ratio_max"] <= 1.0
    return int(stats["outcomes"].get("throttled", 0))
