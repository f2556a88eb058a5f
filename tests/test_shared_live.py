"""One quota over many processes, live: real processes, a real redis-server, a provider on loopback.

Clocks are sped up (`--time-scale`), the store's alike. Nothing here is skipped: a server that cannot be started is an
error. `benchmarks/bench_shared.py` has the figures.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from governor.model.errors import BadSetting
from governor.model.policy import Policy
from governor.sharedquota import redis_store as store
from governor.sharedquota.redis_store import in_redis
from governor.sharedquota.shared import SharedGovernor
from governor.sharedquota.sharing import REDIS_URL, checked_redis_url
from tests.live import WAIT_S, Cli, batch, check_whole, run_args, shared_cli
from tests.servers import TLS, RedisServer, TlsRelay, free_port, redis_server
from tests.shared_runs import ENV, SCALE, TPM, Runs, never_above_the_limit, provider
from tests.sharing import Crew, Order, shares

PASSWORD = "a-password-that-nobody-may-see"


@pytest.fixture(scope="module")
def cli() -> Cli:
    return shared_cli()


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


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
        # On a loaded machine one may have been done before the last had begun.
        under_way = [not process.over.is_set() for process in runs.processes]
        time.sleep(0.3)
        seen = served.stats()["requests"]
        time.sleep(1.0)
        assert served.stats()["requests"] == seen  # nothing is launched
        server.start()
        found = runs.done()
        never_above_the_limit(served)
        assert served.stats()["outcomes"]["ok"] == 3 * 24  # and none is sent twice
    assert any(under_way)
    for ran, was in zip(found, under_way, strict=True):
        if not was:
            continue
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


# ---------------------------------------------------------------- TLS, and a Redis that hangs

PARAMS = Policy(max_concurrency=3, stagger_seconds=0.0).params()


async def granted(governor: SharedGovernor) -> None:
    async with asyncio.timeout(WAIT_S), governor.permit(100.0):
        pass


def test_tls_is_spoken_where_the_url_says_so(redis: RedisServer) -> None:
    said: list[str] = []

    async def story(url: str) -> bool:
        governor = SharedGovernor(PARAMS, store=in_redis(url, "default:tls"), say=said.append)
        try:
            permit = asyncio.create_task(granted(governor))
            while not permit.done() and not said:
                await asyncio.sleep(0.01)
            permit.cancel()
            await asyncio.gather(permit, return_exceptions=True)
            return permit.done() and not permit.cancelled()
        finally:
            await governor.aclose()

    relay = TlsRelay(redis.port)
    try:
        url = f"rediss://:{PASSWORD}@127.0.0.1:{relay.port}/0"
        assert not asyncio.run(story(url))
        assert "certificate" in said.pop().lower()
        assert asyncio.run(story(f"rediss://127.0.0.1:{relay.port}/0?ssl_ca_certs={TLS / 'certificate.pem'}"))
        assert not said
    finally:
        relay.stop()


def test_a_redis_that_hangs_is_as_one_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts connections and never answers: the process is stopped, its port is open."""
    monkeypatch.setattr(store, "ANSWER_S", 0.3)
    said: list[str] = []

    async def story(server: RedisServer) -> None:
        governor = SharedGovernor(PARAMS, store=in_redis(server.url, "default:hung"), say=said.append, lease_s=1.0)
        other = SharedGovernor(PARAMS, store=in_redis(server.url, "default:hung"), lease_s=1.0)
        try:
            await asyncio.gather(granted(governor), granted(other))
            server.suspend(True)
            permit = asyncio.create_task(granted(governor))
            while not said:
                await asyncio.sleep(0.01)
            assert not permit.done()
            # A process that comes meanwhile hears nothing either.
            late = SharedGovernor(PARAMS, store=in_redis(server.url, "default:hung"), say=said.append, lease_s=1.0)
            while len(said) < 2:
                await asyncio.sleep(0.01)
            assert not permit.done()
            server.suspend(False)
            await permit
            await asyncio.gather(granted(late), granted(other))
            await late.aclose()
        finally:
            server.suspend(False)
            await governor.aclose()
            await other.aclose()

    with redis_server() as server:
        asyncio.run(story(server))
    assert all("cannot be reached (Timeout" in line for line in said[:2]), said
    assert said[2:] == ["the store of shared quotas is back"] * 2


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
        assert (did.why, sorted(did.answered)) == ("", list(range(len(did.launches))))
        assert len(did.launches) > 5
    assert json.dumps([did.said for did in found]).count("another node") <= 2
