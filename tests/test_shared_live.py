"""One quota over many processes, live: real processes, a real redis-server, a provider on loopback.

Clocks are sped up (`--time-scale`), the store's alike. Nothing here is skipped: a server that cannot be started is an
error. `benchmarks/bench_shared.py` has the figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import pytest

from governor.journal.journal import Journal
from governor.model.errors import BadSetting
from governor.model.policy import Policy
from governor.model.pools import REDIS_URL, checked_redis_url
from governor.model.requests import Answer, Outcome
from governor.model.work import Job
from governor.run.scaledloop import ScaledLoop
from governor.scheduler.driver import Governor
from governor.sharedquota import redis_store as store
from governor.sharedquota.redis_store import in_redis
from governor.sharedquota.shared import SharedGovernor
from governor.sharedquota.sharing import governor_from_env
from sim.serving.server import ProviderProcess
from tests.governor.desks import OK, Log, works
from tests.live import WAIT_S, Cli, batch, check_whole, run_args, shared_cli
from tests.servers import TLS, Dropper, RedisServer, TlsRelay, free_port, redis_server
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


class GroupedRuns(Runs):
    """Runs over two pools of one group. `served` is the first one's provider, `others` the second one's."""

    others: ProviderProcess

    def start(self, i: int) -> Any:
        pools = [
            f"  - {{name: p{k}, group: all, models: ['*'], base_url: '{each.base_url}'}}"
            for k, each in enumerate((self.served, self.others))
        ]
        (self.folders[i] / "pools.yaml").write_text("\n".join(["pools:", *pools]))
        args: list[object] = ["run", self.folders[i] / "requests.jsonl", "--out", self.folders[i] / "results.jsonl"]
        args += ["--pools", self.folders[i] / "pools.yaml", "--json", "--yes", "--time-scale", self.scale, "--record"]
        return self.cli.start(*args, env=ENV | {REDIS_URL: self.url})


@pytest.mark.parametrize("dies", [False, True])
def test_pools_of_a_group_are_shared_by_two_processes(
    cli: Cli, tmp_path: Path, redis: RedisServer, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    """Neither quota is used above its limit; a provider that ends in mid-run leaves its requests to the other."""
    with provider() as first, provider() as second:
        monkeypatch.setattr(GroupedRuns, "others", second, raising=False)
        runs = GroupedRuns(cli, tmp_path, first, redis.url, 2, 45)
        runs.until_seen(12)
        if dies:
            second.stop()
        runs.done()
        never_above_the_limit(first)
        answers: Counter[str] = Counter()
        for folder in runs.folders:
            with Journal.open(folder / "results.journal.db") as journal:
                attempts = list(journal.attempts())
            answers.update(a.pool for a in attempts if a.outcome is Outcome.OK)
            # (A busy machine may send later than was booked, which a 429 can follow.)
            failed = Counter(a.request for a in attempts if a.outcome not in (Outcome.OK, Outcome.THROTTLED))
            assert max(failed.values(), default=0) <= 1
        assert answers.total() == 90
        if dies:
            # One quota holds about 30 of them at first: the other has the rest.
            assert answers["p0"] > answers["p1"]
        else:
            assert min(answers.values()) > 20
            never_above_the_limit(second)


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
        assert "is not a Redis address: write redis://HOST:6379/0" in ran.err
        assert "secret" not in ran.err
        with pytest.raises(BadSetting):
            checked_redis_url(url)


# ---------------------------------------------------------------- TLS, and a Redis that hangs

PARAMS = Policy(max_concurrency=3, stagger_seconds=0.0).params()


async def granted(governor: Governor) -> None:
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


def test_closing_that_was_cancelled_is_finished_by_the_next(redis: RedisServer) -> None:
    """A run may end in the middle of a reconnection, which begins by closing."""

    async def main(steps: int) -> None:
        connections = in_redis(redis.url, "default:closed")("owner")
        await connections.connect()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(connections.news(0), 0.05)  # opens the other connection
        closing = asyncio.create_task(connections.close())
        for _ in range(steps):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        await connections.close()

    for steps in range(6):
        asyncio.run(main(steps))
        gc.collect()  # what was left open is a warning here, and warnings are errors


# ---------------------------------------------------------------- embedding


def test_a_program_of_ones_own_shares_its_quota_or_refuses_to_start(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = {"OPENAI_MAX_CONCURRENCY": "1", "OPENAI_STAGGER_SECONDS": "0"}

    async def story(environment: dict[str, str]) -> None:
        with pytest.raises(BadSetting, match=r"PACELINE_REDIS_URL is set, but Governor\(\) keeps its quota to itself"):
            Governor(Policy.from_env(environment))
        assert Governor(Policy.from_env(environment), own_quota=True).p.max_concurrency == 1
        one, two = (governor_from_env(environment) for _ in range(2))
        async with one.permit(10.0):
            other = asyncio.create_task(granted(two))
            await asyncio.sleep(0.3)
            assert not other.done()
        await other
        await asyncio.gather(one.aclose(), two.aclose())

    monkeypatch.setenv(REDIS_URL, redis.url)
    asyncio.run(story(policy | {REDIS_URL: redis.url}))
    monkeypatch.delenv(REDIS_URL)

    async def alone() -> None:
        governor = governor_from_env(policy)
        assert type(governor) is Governor
        await granted(governor)
        await governor.aclose()

    asyncio.run(alone())


# ---------------------------------------------------------------- faults of connections and of the server

FAST = 10.0
BINDING = {
    "max_concurrency": 20, "stagger_seconds": 0.0, "tpm_limit": 6_000, "tpm_headroom": 0.05, "tpm_window": "bucket",
    "charge_rule": "prompt_plus_max",
}  # fmt: skip


def survives(
    processes: int,
    requests: int,
    urls: Callable[[int], str],
    *,
    spoil: Callable[[], None] = lambda: None,
    every_s: float = 0.05,
    said: list[str] | None = None,
) -> list[str]:
    """Governors on one pool, on a clock ten times as fast: all is answered once, and the quota never exceeded.

    `spoil` happens every so many seconds. Returns what was said.
    """
    said = [] if said is None else said
    logs = [Log() for _ in range(processes)]
    times: list[float] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        store = [in_redis(urls(i), "default:faults", scale=FAST) for i in range(processes)]
        governors = [
            SharedGovernor(
                Policy(**BINDING).params(), store=store[i], time_scale=FAST, observer=logs[i], say=said.append, seed=i
            )
            for i in range(processes)
        ]

        async def send(job: Job, timeout_s: float) -> Answer:
            times.append(loop.time())
            await asyncio.sleep(0.5)
            return OK

        async def spoils() -> None:
            while True:
                await asyncio.sleep(every_s * FAST)
                await loop.run_in_executor(None, spoil)

        async def ran(governor: SharedGovernor) -> str:
            why = await governor.run(works(requests, 300.0), send)
            await governor.aclose()
            return why

        spoiling = asyncio.create_task(spoils())
        try:
            async with asyncio.timeout(WAIT_S * FAST):
                assert await asyncio.gather(*map(ran, governors)) == [""] * processes
        finally:
            # Connections that are left open would be the next test's warning.
            spoiling.cancel()
            await asyncio.gather(spoiling, *(governor.aclose() for governor in governors), return_exceptions=True)

    with asyncio.Runner(loop_factory=lambda: ScaledLoop(FAST)) as runner:
        runner.run(main())
    for log in logs:
        assert sorted(index for index, failure, _ in log.ends if not failure) == list(range(requests)), said
        assert len(log.launches) == requests
    times.sort()
    # Half a second of leeway: what the event loop of a busy machine may put between two grants and their sends.
    for first, since in enumerate(times):
        for last in range(first, len(times)):
            assert (last - first + 1) * 300.0 <= 6_000 * (1.0 + (times[last] - since + 0.5) / 60.0), said
    return said


def dropped(processes: int, requests: int, **how: Any) -> Counter[str]:
    """The first of these goes through a relay that drops."""
    with redis_server() as server:
        relay = Dropper(server.port, **how)
        try:
            survives(processes, requests, lambda i: relay.url if i == 0 else server.url)
        finally:
            relay.stop()
        return relay.seen


@pytest.mark.parametrize("answers", [False, True], ids=["command", "answer"])
@pytest.mark.parametrize("n", [1, 3, 4, 9])
def test_a_dropped_message_hangs_nothing(n: int, answers: bool) -> None:
    dropped(1, 3, n=n, answers=answers)


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 8])
def test_any_dropped_message_of_any_kind_hangs_nothing(processes: int) -> None:
    kinds = dropped(processes, 8)
    for kind, count in kinds.items():
        for n in {1, 2, 3, 5, 8, 13, count} - {n for n in range(20) if n > count}:
            for answers in (False, True):
                dropped(processes, 8, n=n, kind=kind, answers=answers)


@pytest.mark.parametrize(
    ("processes", "rounds"),
    [(8, 1), pytest.param(1, 10, marks=pytest.mark.long), pytest.param(8, 10, marks=pytest.mark.long)],
)
def test_clients_are_killed_twenty_times(redis: RedisServer, processes: int, rounds: int) -> None:
    for _ in range(rounds):
        asked(redis.port, "FLUSHALL")
        left = iter(range(20))

        def kill() -> None:
            if next(left, None) is not None:  # noqa: B023 - used within the round
                asked(redis.port, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

        said = survives(processes, 40 // processes, lambda i: redis.url, spoil=kill)
        assert any("cannot be reached" in line for line in said)


@pytest.mark.parametrize("processes", [1, pytest.param(8, marks=pytest.mark.long)])
def test_flushed_twice_a_second(redis: RedisServer, processes: int) -> None:
    said = survives(processes, 32 // processes, lambda i: redis.url, spoil=lambda: asked(redis.port, "FLUSHALL"))
    assert any("has lost the state" in line for line in said)


REFUSALS = {
    "NOREPLICAS": ("min-replicas-to-write", "1", "0"),
    "OOM": ("maxmemory", "1", "0"),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("processes", [1, pytest.param(8, marks=pytest.mark.long)])
def test_a_server_that_refuses_to_write_is_away(redis: RedisServer, processes: int, name: str) -> None:
    setting, bad, good = REFUSALS[name]
    states = cycle([bad, bad, bad, good, good, good, good, good])
    asked(redis.port, "FLUSHALL")
    try:
        said = survives(
            processes,
            32 // processes,
            lambda i: redis.url,
            spoil=lambda: asked(redis.port, "CONFIG", "SET", setting, next(states)),
            every_s=0.1,
        )
    finally:
        asked(redis.port, "CONFIG", "SET", setting, good)
    assert any(name in line or "not enough" in line.lower() or "memory" in line for line in said), said


@pytest.mark.parametrize(
    ("processes", "every_s"),
    [(4, 0.15), pytest.param(8, 0.02, marks=[pytest.mark.long])],
)
def test_other_things_under_our_keys_end_nothing(redis: RedisServer, processes: int, every_s: float) -> None:
    pool = "paceline:{default:faults:x10}:"
    rng = random.Random(1)

    def spoil() -> None:
        key = pool + rng.choice(["image", "inbox", "leases", "recovery", "bell"])
        value = rng.choice(["", "garbage", "x" * 500])
        asked(redis.port, *rng.choice([("SET", key, value), ("DEL", key), ("RPUSH", key, value)]))

    survives(processes, 6, lambda i: redis.url, spoil=spoil, every_s=every_s)


def test_a_password_that_is_changed_in_mid_run_is_waited_for() -> None:
    with redis_server(password=PASSWORD) as server:
        states = chain([PASSWORD] * 2, cycle(["another", PASSWORD, PASSWORD]))

        said: list[str] = []

        def spoil() -> None:
            if server.password != PASSWORD and not any("refuses us" in line for line in said):
                return  # until it has been noticed
            new = next(states)
            asked_as(server, "CONFIG", "SET", "requirepass", new)
            server.password = new
            asked_as(server, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

        url = server.url
        survives(1, 1, lambda i: url)  # what is refused from the start ends a run
        survives(2, 12, lambda i: url, spoil=spoil, every_s=0.3, said=said)
    assert any("refuses us" in line for line in said), said
    assert PASSWORD not in "".join(said)


def asked_as(server: RedisServer, *words: object) -> None:
    """One command with the server's password."""
    lines = [("AUTH", server.password), words]
    with socket.create_connection(("127.0.0.1", server.port), 5.0) as connection:
        for line in lines:
            parts = [str(word).encode() for word in line]
            connection.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts))
            assert connection.recv(100)[:1] in b"+:"


def test_a_black_hole_is_left_again() -> None:
    with redis_server() as server:
        relay = Dropper(server.port)
        # A member that has left needs seconds to enter again, which the pauses must leave it, or chance decides.
        states = cycle([True] * 4 + [False] * 12)

        def spoil() -> None:
            relay.is_black_hole = next(states)

        try:
            survives(3, 8, lambda i: relay.url if i == 0 else server.url, spoil=spoil, every_s=0.4)
        finally:
            relay.stop()


def test_a_failover_back_to_a_stale_master_is_not_believed() -> None:
    """Two servers behind one address: to the replica, which becomes a master, and back to the old one."""
    with redis_server() as old, redis_server() as new:
        asked(new.port, "REPLICAOF", "127.0.0.1", old.port)
        relay = Dropper(old.port)
        turns = iter([new, old])

        def fail_over() -> None:
            to = next(turns, None)
            if to is None:
                return
            if to is new:
                asked(new.port, "REPLICAOF", "NO", "ONE")
            relay.to = to.port
            for each in (old, new):
                asked(each.port, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

        try:
            said = survives(8, 5, lambda i: relay.url, spoil=fail_over, every_s=2.0)
        finally:
            relay.stop()
    assert sum("has lost the state" in line or "cannot be reached" in line for line in said) >= 8
