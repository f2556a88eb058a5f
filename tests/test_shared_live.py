"""One quota over many processes, live: real processes, a real redis-server, a provider on loopback.

Clocks are sped up (`--time-scale`), the store's alike. Nothing here is skipped: a server that cannot be started is an
error. `benchmarks/bench_shared.py` has the figures.
"""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from governor.errors import BadSetting
from governor.sharing import REDIS_URL, checked_redis_url
from sim.provider_config import ProviderConfig
from sim.server import Spawned, spawn
from tests.live import WAIT_S, Cli, batch, check_whole, run_args, shared_cli
from tests.servers import RedisServer, free_port, redis_server
from tests.sharing import Crew, Order, shares

SCALE = 20.0
TPM = 30_000
# Charged at admission, the whole cap; about 950 tokens a request.
ENV = {
    "OPENAI_MAX_CONCURRENCY": "60",
    "OPENAI_TPM_LIMIT": str(TPM),
    "OPENAI_TPM_HEADROOM": "0.05",
    "OPENAI_CHARGE_RULE": "prompt_plus_max",
}
PASSWORD = "a-password-that-nobody-may-see"


@pytest.fixture(scope="module")
def cli() -> Cli:
    return shared_cli()


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


def provider(scale: float = SCALE) -> Spawned:
    latency = {"first_token_s": 1.0, "per_token_s": 0.005, "sigma": 0.2, "stall_ratio": 0.0}
    config = ProviderConfig().with_(tpm=TPM, rpm=0, charge_rule="prompt_plus_max", latency=latency)
    return spawn(config, time_scale=scale, stated_time="provider")


class Runs:
    """Several `paceline run` side by side, each with a batch and a journal of its own."""

    def __init__(self, cli: Cli, folder: Path, served: Spawned, url: str, count: int, requests: int) -> None:
        self.cli = cli
        self.url = url
        self.served = served
        self.requests = requests
        self.folders = [folder / str(i) for i in range(count)]
        for i, each in enumerate(self.folders):
            each.mkdir()
            batch(each / "requests.jsonl", requests, i, cap=900)
        self.processes = [self.start(i) for i in range(count)]

    def start(self, i: int) -> Any:
        args = run_args(self.folders[i], self.served.base_url, "--json", "--yes", "--time-scale", SCALE)
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


def never_above_the_limit(served: Spawned) -> int:
    """Nobody was let in above the limit; how many were refused."""
    stats = served.stats()
    assert stats["windows"]["TPM"]["used_ratio_max"] <= 1.0
    return int(stats["outcomes"].get("throttled", 0))


def test_three_processes_share_one_quota(redis: RedisServer) -> None:
    settings = {
        "max_concurrency": 100,
        "stagger_seconds": 0.0,
        "tpm_limit": TPM,
        "tpm_headroom": 0.05,
        "tpm_window": "bucket",
        "charge_rule": "prompt_plus_max",
        "backoff_keeps_permit": False,
        "hold_on_throttle": True,
    }
    with provider(15.0) as served:
        order = Order(settings, url=redis.url, base_url=served.base_url, requests=15, tokens=1_500, scale=15.0)
        with Crew(3, order) as crew:
            found = crew.done()
        throttled = never_above_the_limit(served)
    assert [(did.why, did.failed, sorted(did.answered)) for did in found] == [("", 0, list(range(15)))] * 3
    assert throttled == sum(did.throttled for did in found) <= 2
    # No launch is doubled: what is sent twice was refused before.
    assert sum(len(did.launches) for did in found) == 45 + throttled
    assert all(0.8 <= share <= 1.2 for share in shares(found)), shares(found)


def test_a_process_killed_in_the_middle_loses_nothing(cli: Cli, tmp_path: Path, redis: RedisServer) -> None:
    with provider() as served:
        runs = Runs(cli, tmp_path, served, redis.url, 3, 24)
        runs.until_seen(35)
        runs.processes[0].signal(signal.SIGKILL)
        runs.processes[0].wait()
        runs.processes[0] = runs.start(0)
        found = runs.done()
        never_above_the_limit(served)
        resent = served.stats()["outcomes"]["ok"] - 3 * 24
    assert resent <= 24
    assert REDIS_URL not in "".join(ran.err for ran in found)


def test_redis_killed_and_restarted_without_its_memory_loses_nothing(cli: Cli, tmp_path: Path) -> None:
    with provider() as served, redis_server() as server:
        runs = Runs(cli, tmp_path, served, server.url, 3, 24)
        runs.until_seen(35)
        server.kill()
        time.sleep(0.3)
        seen = served.stats()["requests"]
        time.sleep(1.0)
        assert served.stats()["requests"] == seen  # nothing is launched
        server.start()
        found = runs.done()
        never_above_the_limit(served)
        assert served.stats()["outcomes"]["ok"] == 3 * 24  # and none is sent twice
    for ran in found:
        assert f"Redis at 127.0.0.1:{server.port} cannot be reached" in ran.err
        assert "nothing is launched until it is back" in ran.err
        assert "is back" in ran.err


def test_a_run_waits_for_a_redis_that_comes_later_and_never_prints_its_password(cli: Cli, tmp_path: Path) -> None:
    port = free_port()
    batch(tmp_path / "requests.jsonl", 5)
    with provider() as served:
        args = run_args(tmp_path, served.base_url, "--json", "--time-scale", SCALE)
        process = cli.start(*args, env=ENV | {REDIS_URL: f"redis://:{PASSWORD}@127.0.0.1:{port}/0"})
        until = time.monotonic() + WAIT_S
        while not process.err.exists() or "cannot be reached" not in process.err.read_text():
            assert time.monotonic() < until, "it does not say that Redis is away"
            time.sleep(0.05)
        assert served.stats()["requests"] == 0
        server = RedisServer(password=PASSWORD, port=port)
        try:
            ran = process.wait()
        finally:
            server.stop()
        assert ran.code == 0, ran.err
        assert PASSWORD not in ran.out + ran.err
        check_whole(tmp_path, 5)


def test_a_wrong_password_and_a_wrong_address_are_one_line(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", 2)
    args = run_args(tmp_path, "http://127.0.0.1:9/v1", "--yes")
    with redis_server(password=PASSWORD) as server:
        ran = cli.run(*args, env={REDIS_URL: server.url.replace(PASSWORD, "another-secret")})
    assert ran.code == 2
    assert "refuses us" in ran.err
    assert "another-secret" not in ran.err
    for url in ("http://:secret@h/0", "redis://", "redis://h:port", "redis://:secret@h/zero", "h:6379"):
        ran = cli.run(*args, env={REDIS_URL: url})
        assert (ran.code, ran.out) == (2, "")
        assert "is no address of Redis: write redis://HOST:6379/0" in ran.err
        assert "secret" not in ran.err
        with pytest.raises(BadSetting):
            checked_redis_url(url)


# ---------------------------------------------------------------- a cluster


def asked(port: int, *words: object) -> str:
    """One command, in Redis' own inline-free protocol; the answer's first line."""
    parts = [str(word).encode() for word in words]
    message = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
    with socket.create_connection(("127.0.0.1", port), 5.0) as connection, connection.makefile("rb") as answers:
        connection.sendall(message)
        line = answers.readline().decode().strip()
        return answers.read(int(line[1:])).decode() if line.startswith("$") else line


def test_the_node_of_a_cluster_that_keeps_the_pool_is_found() -> None:
    """All keys of a pool lie in one slot; asked at another node, the client goes where that is."""
    options = ("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no", "--cluster-node-timeout", "2000")
    with redis_server(*options) as here, redis_server(*options) as there:
        slot = int(asked(here.port, "CLUSTER", "KEYSLOT", "paceline:{default:test}:image").lstrip(":"))
        assert asked(here.port, "CLUSTER", "ADDSLOTS", *(i for i in range(16_384) if i != slot)) == "+OK"
        assert asked(there.port, "CLUSTER", "ADDSLOTS", slot) == "+OK"
        assert asked(here.port, "CLUSTER", "MEET", "127.0.0.1", there.port) == "+OK"
        until = time.monotonic() + WAIT_S
        while not asked(here.port, "GET", "paceline:{default:test}:image").startswith("-MOVED"):
            assert time.monotonic() < until, "the nodes do not meet"
            time.sleep(0.05)
        order = Order({"max_concurrency": 3, "stagger_seconds": 0.0}, url=here.url, for_s=0.5, service_s=0.05)
        with Crew(2, order) as crew:
            found = crew.done()
        kept = asked(there.port, "EXISTS", "paceline:{default:test}:image")
    assert kept == ":1"
    for did in found:
        assert (did.why, did.answered) == ("", list(range(len(did.launches))))
        assert len(did.launches) > 5
    assert json.dumps([did.said for did in found]).count("another node") <= 2
