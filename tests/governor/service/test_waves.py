"""Batches by the Batch API through the service, on loopback: to the end, killed, taken over, steered, refused."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sim.serving.server import ProviderThread
from tests.live import Cli, provider, shared_cli
from tests.postgres import PostgresServer
from tests.services import Served, error_of, good, lines, ready, serving, started, until

SCALE = 200.0
REQUESTS = 40
# Waves of about a quarter of the requests; a batch takes some half a second of the machine's time.
QUICK = {"queue_tokens": 1_000, "turnaround_s": [100.0, 120.0]}
SLOW = {"queue_tokens": 0, "turnaround_s": [80_000.0, 80_001.0]}
TIME = ("--time-scale", SCALE)
ENV = {"OPENAI_BATCH_QUEUE_TOKENS": "1000"}
MOVED = "paceline_wave_moved_epoch"


@pytest.fixture(scope="module")
def cli() -> Cli:
    return shared_cli()


@pytest.fixture(scope="module")
def llm() -> Iterator[ProviderThread]:
    with provider(time_scale=SCALE, batch_api=QUICK, stated_time="provider") as served:
        yield served


@pytest.fixture(scope="module")
def served(cli: Cli, llm: ProviderThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(cli, tmp_path_factory.mktemp("service"), llm.base_url, *TIME, env=ENV) as found:
        yield found


def gauges(served: Served) -> dict[str, float]:
    """The service's metrics."""
    texts = (text for text in served.client.get("/metrics").text.splitlines() if text[0] != "#")
    return {name: float(value) for name, value in (text.rsplit(" ", 1) for text in texts)}


def at_the_provider(served: Served, batch_id: str) -> list[dict[str, Any]]:
    """The batch's waves, once one of them is at the provider."""

    def found() -> Any:
        waves = served.get(f"/batches/{batch_id}")["waves"]
        return waves if any(wave["provider_id"] for wave in waves) else None

    shown: list[dict[str, Any]] = until(f"a wave of {batch_id}", found)
    return shown


def check_whole(served: Served, batch_id: str, prefix: str = "q-") -> dict[str, Any]:
    """Every line has its answer, by waves that are over."""
    row = served.over(batch_id)
    assert (row["state"], row["done"], row["failed"], row["in_flight"]) == ("completed", REQUESTS, 0, 0), row
    assert [each["custom_id"] for each in served.lines(batch_id)] == [f"{prefix}{i}" for i in range(REQUESTS)]
    waves = row["waves"]
    assert [wave["wave"] for wave in waves] == list(range(1, len(waves) + 1))
    assert sum(wave["completed"] for wave in waves) == REQUESTS
    assert {(wave["stage"], wave["status"]) for wave in waves} == {("closed", "completed")}
    return row


def check_provider(llm: ProviderThread, *rows: dict[str, Any]) -> None:
    """Each wave became one batch, none was refused, nothing went live, and no file is left."""
    seen = llm.stats()
    assert seen["batches"] == {"completed": sum(len(row["waves"]) for row in rows)}
    assert seen["files"] == 0
    assert set(seen["billed"]) == {"gpt-4o-mini batch"}


def test_two_batches_share_the_queue_and_each_is_whole(served: Served, llm: ProviderThread) -> None:
    first = served.batch(REQUESTS, via="batch")
    template = served.template()
    accepted = good(served.run(template, REQUESTS, via="batch"))
    assert (accepted["forecast_by"], accepted["forecast_finish_s"] > 3_600.0) == ("turnaround", True)
    at_the_provider(served, first)
    assert gauges(served)['paceline_waves_open{pool="default"}'] >= 1.0
    assert gauges(served)[f'{MOVED}{{pool="default"}}'] > 0.0
    assert served.get("/live")["pools"][0]["committed_usd"] > 0.0
    rows = [check_whole(served, first), check_whole(served, accepted["batch_id"], "i0-r")]
    assert [(row["via"], row["attempts"]) for row in rows] == [("batch", REQUESTS)] * 2
    check_provider(llm, *rows)
    (pool,) = served.get("/live")["pools"]
    sums = llm.stats()["billed"]["gpt-4o-mini batch"]
    # Half of $0.15 and $0.60 for a million tokens.
    usd = 0.5e-6 * (0.15 * sums["prompt"] + 0.60 * sums["output"])
    assert (pool["cost_usd"], pool["committed_usd"]) == (pytest.approx(usd), 0.0)
    until("no open wave", lambda: gauges(served)[f'{MOVED}{{pool="default"}}'] == 0.0)
    heard = served.client.get(f"/batches/{first}/events").text
    assert json.loads(heard.split("data: ")[1])["waves"] == rows[0]["waves"]


@pytest.mark.parametrize(
    ("params", "text", "says"),
    [
        ({"via": "post"}, "short", "query.via: Input should be 'live', 'batch' or 'auto'"),
        ({"via": "batch", "finalize": True}, "short", "finalize is for live calls: leave it out with via=batch"),
        ({"via": "batch", "finish_by": "6h"}, "short", "finish_by is for via=auto"),
        ({"via": "batch"}, "x" * 9_000, "the limit is 850: shorten it, raise OPENAI_BATCH_QUEUE_TOKENS"),
    ],
)
def test_what_cannot_go_there_is_refused_in_one_line(
    served: Served, params: dict[str, Any], text: str, says: str
) -> None:
    answer = served.client.post("/batches", content=lines(3, text=text), params=params)
    assert answer.status_code == 422, answer.text
    message = answer.json()["error"]["message"]
    assert says in message
    assert "\n" not in message


def test_a_deadline_before_the_turnaround_is_refused(served: Served) -> None:
    answer = served.client.post("/batches", content=lines(3), params={"via": "batch", "deadline_s": 60.0})
    error_of(answer, 503, "BATCH_RATE_LIMITED")
    assert "allow more time, or send it with via=live" in answer.json()["error"]["message"]


def test_kill_9_in_the_middle_loses_nothing_and_submits_nothing_twice(cli: Cli, tmp_path: Path) -> None:
    with provider(time_scale=SCALE, batch_api=QUICK, stated_time="provider") as llm:
        first = ready(started(cli, tmp_path, llm.base_url, *TIME, env=ENV))
        batch_id = first.batch(REQUESTS, via="batch")
        at_the_provider(first, batch_id)
        first.stop(signal.SIGKILL)
        with serving(cli, tmp_path, llm.base_url, *TIME, env=ENV) as second:
            row = check_whole(second, batch_id)
        assert row["resent"] == 0
        check_provider(llm, row)


def test_another_replica_takes_the_waves_over(cli: Cli, tmp_path: Path) -> None:
    with PostgresServer() as postgres, provider(time_scale=SCALE, batch_api=QUICK) as llm:
        args = (*TIME, "--lease", "1s")
        first = ready(started(cli, tmp_path, llm.base_url, *args, env=ENV, database=postgres.url))
        batch_id = first.batch(REQUESTS, via="batch")
        at_the_provider(first, batch_id)
        with serving(cli, tmp_path, llm.base_url, *args, env=ENV, database=postgres.url) as second:
            first.stop(signal.SIGKILL)
            row = check_whole(second, batch_id)
        check_provider(llm, row)


def test_paused_resumed_and_cancelled(cli: Cli, tmp_path: Path) -> None:
    with (
        provider(time_scale=SCALE, batch_api=SLOW) as llm,
        serving(cli, tmp_path, llm.base_url, *TIME, env=ENV) as served,
    ):
        batch_id = served.batch(REQUESTS, via="batch")
        before = at_the_provider(served, batch_id)
        assert served.post(f"/batches/{batch_id}/pause")["state"] == "paused"
        assert served.post(f"/batches/{batch_id}/resume")["state"] in ("queued", "running")
        assert served.get(f"/batches/{batch_id}")["waves"] == before
        served.post(f"/batches/{batch_id}/cancel")
        row = served.over(batch_id)
        assert (row["state"], row["done"] + row["failed"], row["in_flight"]) == ("cancelled", REQUESTS, 0)
        seen = llm.stats()
        assert (seen["batches"], seen["files"]) == ({"cancelled": len(before)}, 0)
        codes = {each["error"]["code"] for each in served.lines(batch_id, "errors")}
        assert codes == {"BATCH_CANCELLED"}


def ok_lanes(served: Served, batch_id: str) -> Counter[str]:
    """The answers of a batch by the way that they went, once each is known to be the only one of its request."""
    with sqlite3.connect(served.database) as connection:
        found = connection.execute("SELECT request, lane FROM attempts WHERE outcome = 'ok'").fetchall()
    assert len({request for request, _ in found}) == len(found) == REQUESTS
    return Counter(lane for _, lane in found)


def test_auto_goes_by_the_batch_api_while_there_is_time(cli: Cli, tmp_path: Path) -> None:
    with (
        provider(time_scale=SCALE, batch_api=QUICK, stated_time="provider") as llm,
        serving(cli, tmp_path, llm.base_url, *TIME) as served,
    ):
        batch_id = served.batch(REQUESTS, via="auto", finish_by="6h")
        row = check_whole(served, batch_id)
        check_provider(llm, row)
    assert row["via"] == "auto"
    assert 0.0 < row["finish_by"] - row["created_at"] < 6 * 3_600.0
    assert ok_lanes(served, batch_id) == {"batch": REQUESTS}


def test_auto_goes_live_when_the_slack_is_gone_also_after_a_kill_and_a_pause(cli: Cli, tmp_path: Path) -> None:
    # The deadline, in the provider's time, is minutes away on the machine's.
    with provider(time_scale=SCALE, batch_api=SLOW) as llm:
        first = ready(started(cli, tmp_path, llm.base_url, *TIME))
        batch_id = first.batch(REQUESTS, via="auto", finish_by="60m")
        at_the_provider(first, batch_id)
        first.stop(signal.SIGKILL)
        with serving(cli, tmp_path, llm.base_url, *TIME) as second:
            assert second.post(f"/batches/{batch_id}/pause")["state"] == "paused"
            assert second.post(f"/batches/{batch_id}/resume")["state"] in ("queued", "running")
            row = second.over(batch_id)
            assert (row["state"], row["done"], row["failed"]) == ("completed", REQUESTS, 0)
            assert "the slack is gone" in first.log + second.log
            found = ok_lanes(second, batch_id)
        seen = llm.stats()
    assert found["main"] >= REQUESTS / 2
    assert (set(seen["batches"]), sum(seen["batches"].values()), seen["files"]) == ({"cancelled"}, len(row["waves"]), 0)
    assert seen["outcomes"]["ok"] == found["main"]
