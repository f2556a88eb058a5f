"""The service end to end, on loopback: batches, verdicts, steering, settings, tokens, events.

Everything here goes through HTTP to a real process in front of the synthetic provider. What happens when processes die
is `test_service_crash`'s matter.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from governor.law import FIXED_S
from governor.service.store.base import ServiceDatabase
from governor.service.store.store import RUN, Store
from governor.service.worker.worker import Worker
from sim.serving.server import ProviderThread
from tests.live import KEY, Cli, provider, shared_cli
from tests.services import Served, error_of, good, lines, serving, until

SLOW = {"first_token_s": 0.15, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0}
MINUTE_S = 60.0
# The guardrails' checklist: 25,500 usable tokens per minute, a flat estimate per run.
STRICT = {
    "PREFLIGHT_MODE": "strict",
    "OPENAI_CHARGE_RULE": "fixed",
    "OPENAI_TPM_LIMIT": "30000",
    "OPENAI_TPM_HEADROOM": "0.15",
    "OPENAI_TPM_WINDOW": "fixed",
}
BUDGET = 25_500
TEMPLATE_TEXT = '{"name": "a", "model": "m", "prompt": "p", "parameters": %s}'


@pytest.fixture(scope="module")
def cli() -> Cli:
    return shared_cli()


@pytest.fixture(scope="module")
def llm() -> Iterator[ProviderThread]:
    with provider(latency=SLOW) as served:
        yield served


@pytest.fixture(scope="module")
def served(cli: Cli, llm: ProviderThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service without limits, for all tests that do not need one of their own."""
    with serving(cli, tmp_path_factory.mktemp("service"), llm.base_url) as found:
        yield found


# ---------------------------------------------------------------- batches


def test_the_guardrails_smoke_test(served: Served) -> None:
    answer = served.run(served.template(), 10)
    accepted = good(answer)
    assert answer.status_code == 202
    assert accepted["requests"] == 10
    assert accepted["forecast_finish_s"] > 0.0
    row = served.over(accepted["batch_id"])
    assert (row["state"], row["done"], row["failed"], row["pending"], row["in_flight"]) == ("completed", 10, 0, 0, 0)
    metrics = dict(text.rsplit(" ", 1) for text in served.client.get("/metrics").text.splitlines() if text[0] != "#")
    names = ("active_concurrency", "next_slot_epoch", "stagger_delays_total", "tpm_window_deferrals_total")
    assert {f"contestra_openai_{name}" for name in names} <= set(metrics)
    assert float(metrics["contestra_openai_active_concurrency"]) == 0.0
    found = served.lines(accepted["batch_id"])
    assert [each["custom_id"] for each in found] == [f"i0-r{i}" for i in range(10)]
    assert served.lines(accepted["batch_id"], "errors") == []


def test_a_raw_batch_has_one_result_for_each_line_in_its_order(served: Served) -> None:
    before = served.batch(1)
    batch_id = served.batch(30)
    assert served.over(batch_id)["done"] == 30
    assert [each["custom_id"] for each in served.lines(batch_id)] == [f"q-{i}" for i in range(30)]
    listed = served.get("/batches", params={"limit": 1})
    assert listed["batches"][0]["batch_id"] == batch_id
    older = served.get("/batches", params={"limit": 1, "before": listed["next"]})["batches"]
    assert older[0]["batch_id"] == before


def test_inputs_come_as_csv_and_as_jsonl_too(served: Served) -> None:
    template = served.template(prompt="{{ name }} likes {{ what }}")
    for name, content in (
        ("in.csv", 'name,what\nAda,engines\nAlan,"games, of chess"\n'),
        ("in.jsonl", '{"name":"Ada","what":"engines"}\n\n{"name":"Alan","what":"games, of chess"}\n'),
    ):
        files = {"file": (name, content.encode())}
        answer = served.client.post(f"/templates/{template}/batch-run", files=files, data={"runs": "2"})
        batch_id = good(answer)["batch_id"]
        assert served.over(batch_id)["done"] == 4
        assert [each["custom_id"] for each in served.lines(batch_id)] == ["i0-r0", "i0-r1", "i1-r0", "i1-r1"]
    for content, line in (
        (b"name,what\nAda\n", 2),
        (b"name,name,what\nAda,Alan,x\n", 1),
        (b'name,what\nAda,"x"y\n', 2),
    ):
        answer = served.client.post(f"/templates/{template}/batch-run", files={"file": ("in.csv", content)})
        assert error_of(answer, 422, "BAD_INPUT") == {"line": line}
    long = {"file": ("in.csv", f"name,what\nAda,{'x' * 200_000}\n".encode())}
    good(served.client.post(f"/templates/{template}/preflight", files=long))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no requests in it"),
        (b"{not json}\n", "batch:1: not JSON"),
        (lines(2) + lines(1), "stands on line 1 already"),
    ],
)
def test_a_batch_that_is_wrong_is_refused_with_its_line(served: Served, content: bytes, says: str) -> None:
    before = served.get("/batches", params={"limit": 500})["batches"]
    answer = served.client.post("/batches", content=content)
    error_of(answer, 422, "BAD_INPUT")
    assert says in answer.json()["error"]["message"]
    assert served.get("/batches", params={"limit": 500})["batches"] == before


def test_a_large_batch_that_is_wrong_at_its_end_leaves_nothing(served: Served) -> None:
    # More than is kept in memory.
    answer = served.client.post("/batches", content=lines(1_200) + b"{}\n")
    error_of(answer, 422, "BAD_INPUT")
    assert answer.json()["error"]["details"]["line"] == 1_201
    with sqlite3.connect(served.database) as connection:
        for table in ("requests", "bodies"):
            (last,) = connection.execute(f"SELECT max(request & 0xffffff) FROM {table}").fetchone()
            assert (last or 0) < 1_000
        assert connection.execute("SELECT count(*) FROM service_batches WHERE state = 'receiving'").fetchone() == (0,)


def test_a_key_makes_a_post_happen_once(served: Served) -> None:
    template = served.template()
    body = {"inputs": [{"name": "Ada"}], "runs": 2}
    headers = {"Idempotency-Key": "the-same"}
    path = f"/templates/{template}/batch-run"
    answers = [served.client.post(path, json=body, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json() == answers[1].json()
    assert answers[1].headers["idempotency-replayed"] == "true"
    error_of(served.client.post(path, json=body | {"runs": 3}, headers=headers), 409, "IDEMPOTENCY_KEY_REUSED")
    raw = [served.client.post("/batches", content=lines(3), headers=headers) for _ in range(2)]
    assert raw[0].json()["batch_id"] == raw[1].json()["batch_id"] != answers[0].json()["batch_id"]
    made = [served.client.post("/templates", json={"name": "a", "model": "m", "prompt": "p"}, headers=headers)] * 2
    assert made[0].json() == made[1].json()


def test_templates_keep_their_versions(served: Served) -> None:
    template = served.template()
    first = served.get(f"/templates/{template}")
    assert first["version"] == 1
    changed = {name: first[name] for name in ("name", "model", "endpoint", "parameters")}
    changed |= {"prompt": "Goodbye, {{ name }}", "max_output_tokens": 7}
    assert good(served.client.put(f"/templates/{template}", json=changed))["version"] == 2
    assert served.get(f"/templates/{template}", params={"version": 1})["prompt"] == first["prompt"]
    assert [each["version"] for each in served.get(f"/templates/{template}/versions")["versions"]] == [1, 2]
    accepted = good(served.run(template))
    row = served.over(accepted["batch_id"])
    assert (row["template_id"], row["template_version"]) == (template, 2)
    assert served.client.delete(f"/templates/{template}").status_code == 204
    error_of(served.client.get(f"/templates/{template}"), 404, "NOT_FOUND")
    error_of(served.run(template), 404, "NOT_FOUND")
    assert template not in [
        each["template_id"] for each in served.get("/templates", params={"limit": 500})["templates"]
    ]


def test_events_tell_each_state_and_end(served: Served) -> None:
    batch_id = served.batch(40)
    names, states = [], []
    with served.client.stream("GET", f"/batches/{batch_id}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for text in stream.iter_lines():
            if text.startswith("event: "):
                names.append(text.removeprefix("event: "))
            if text.startswith("data: "):
                states.append(json.loads(text.removeprefix("data: ")))
    assert names == ["progress"] * (len(names) - 1) + ["end"]
    assert states[-1]["done"] == 40
    ended = [state["done"] for state in states]
    assert ended == sorted(ended)
    again = served.client.get(f"/batches/{batch_id}/events")
    assert again.text.startswith("event: end\nid: end\n")
    # An EventSource comes back after the end with what it heard last, until it is told that there is no more.
    assert served.client.get(f"/batches/{batch_id}/events", headers={"Last-Event-ID": "end"}).status_code == 204


# ---------------------------------------------------------------- verdicts


def estimated(tokens: int) -> dict[str, Any]:
    return {"settings": {"OPENAI_EST_TOKENS_PER_RUN": tokens}}


def test_strict_refuses_what_no_minute_holds_to_the_token(cli: Cli, llm: ProviderThread, tmp_path: Path) -> None:
    with serving(cli, tmp_path, llm.base_url, env=STRICT) as served:
        template = served.template()
        path = f"/templates/{template}/preflight"
        body = {"inputs": [{"name": "Ada"}], "runs": 3}
        fits = served.post(path, body | estimated(BUDGET // 3))
        assert (fits["ok"], fits["projected_tokens"], fits["budget_tokens"]) == (True, BUDGET, BUDGET)
        answer = served.run(template, 3, **estimated(BUDGET // 3 + 1))
        details = error_of(answer, 503, "BATCH_RATE_LIMITED")
        assert details["projected_tokens"] == BUDGET + 3
        assert (details["budget_tokens"], details["in_use_tokens"]) == (BUDGET, 0)
        assert (details["retryable"], details["max_runs_now"], details["suggested_wait_s"]) == (False, 2, None)
        assert "retry-after" not in answer.headers
        assert good(served.run(template, details["max_runs_now"], **estimated(BUDGET // 3 + 1)))
        assert served.get("/batches")["batches"][0]["requests"] == 2


@pytest.mark.parametrize("mode", ["strict", "paced"])
def test_the_suggested_wait_is_enough_and_not_a_second_too_long(
    cli: Cli, llm: ProviderThread, tmp_path: Path, mode: str
) -> None:
    scale = 20.0
    env = STRICT | {"PREFLIGHT_MODE": mode}
    with serving(cli, tmp_path, llm.base_url, "--time-scale", scale, env=env) as served:
        template = served.template()
        first = good(served.run(template, 2, **estimated(8_500)))["batch_id"]
        served.over(first)
        # To the token: what is left of the minute is let in by both, one more by neither.
        path = f"/templates/{template}/preflight"
        body = {"inputs": [{"name": "Ada"}], "runs": 1}
        assert served.post(path, body | estimated(BUDGET - 17_000))["ok"] is True
        answer = served.run(template, 1, **estimated(BUDGET - 17_000 + 1))
        asked_by = time.time()
        details = error_of(answer, 503, "BATCH_RATE_LIMITED")
        assert (details["in_use_tokens"], details["retryable"]) == (17_000, True)
        wait_s = details["suggested_wait_s"]
        assert answer.headers["retry-after"] == str(wait_s)
        # The minute was anchored by the first launch; the clock of the service runs `scale` times as fast.
        with sqlite3.connect(tmp_path / "service.db") as connection:
            (anchor_s,) = connection.execute("SELECT min(launched_s) FROM attempts").fetchone()
            (epoch_s,) = connection.execute("SELECT epoch_s FROM run").fetchone()
        left_then_s = anchor_s + MINUTE_S - (asked_by - epoch_s) * scale
        assert wait_s >= left_then_s - 1e-3
        assert wait_s - 1 < left_then_s + scale * answer.elapsed.total_seconds() + 0.5 * scale
        time.sleep(wait_s / scale)
        accepted = served.run(template, 1, **estimated(BUDGET - 17_000 + 1))
        assert accepted.status_code == 202, accepted.text


def test_paced_takes_any_size_and_refuses_what_can_never_run(cli: Cli, llm: ProviderThread, tmp_path: Path) -> None:
    with serving(cli, tmp_path, llm.base_url, env=STRICT | {"PREFLIGHT_MODE": "paced"}) as served:
        template = served.template()
        late = served.run(template, 50, deadline_s=60.0, **estimated(7_000))
        details = error_of(late, 503, "BATCH_RATE_LIMITED")
        # Three a minute: in time are those of the first minute.
        assert (details["retryable"], details["max_runs_now"]) == (False, 3)
        assert "retry-after" not in late.headers
        details = error_of(served.run(template, 1, **estimated(30_001)), 503, "BATCH_RATE_LIMITED")
        assert (details["retryable"], details["max_runs_now"]) == (False, 0)
        accepted = good(served.run(template, 50, **estimated(7_000)))
        # ... and the 50th goes in the 17th minute.
        assert accepted["forecast_finish_s"] == pytest.approx(16 * FIXED_S, abs=5.0)


def test_runs_for_other_vendors_do_not_count(cli: Cli, llm: ProviderThread, tmp_path: Path) -> None:
    (tmp_path / "pools.yaml").write_text(
        f"""pools:
  - {{name: openai, models: ["gpt-*"], base_url: "{llm.base_url}"}}
  - {{name: other, models: ["*"], base_url: "{llm.base_url}", settings: {{PREFLIGHT_MODE: paced}}}}
"""
    )
    env = STRICT | {"OPENAI_EST_TOKENS_PER_RUN": "8500"}
    with serving(cli, tmp_path, llm.base_url, "--pools", tmp_path / "pools.yaml", env=env) as served:
        both = lines(3) + b"".join(
            text.replace(b"gpt-4o-mini", b"claude-4").replace(b"q-", b"c-") + b"\n" for text in lines(3).splitlines()
        )
        answer = served.client.post("/batches", content=both)
        assert good(answer)["requests"] == 6
        refused = served.client.post("/batches", content=both + lines(1, "more"))
        details = error_of(refused, 503, "BATCH_RATE_LIMITED")
        assert details["pool"] == "openai"
        # Four runs of ours are projected: none of the three others.
        assert details["projected_tokens"] == 4 * 8_500


# ---------------------------------------------------------------- steering


def test_a_held_batch_launches_nothing_and_others_go_on(cli: Cli, tmp_path: Path) -> None:
    with (
        provider(latency=SLOW) as llm,
        serving(cli, tmp_path, llm.base_url, env={"OPENAI_MAX_CONCURRENCY": "2"}) as served,
    ):
        first = served.batch(40, prefix="a")
        until("its first result", lambda: served.get(f"/batches/{first}")["done"])
        key = {"Idempotency-Key": "pause-it"}
        assert good(served.client.post(f"/batches/{first}/pause", headers=key))["state"] == "paused"
        until("the end of what flies", lambda: served.get(f"/batches/{first}")["in_flight"] == 0)
        before = served.get(f"/batches/{first}")["attempts"]
        other = served.batch(10, prefix="b")
        assert served.over(other)["done"] == 10
        held = served.get(f"/batches/{first}")
        assert (held["attempts"], held["state"], held["eta_s"]) == (before, "paused", None)
        assert before < 40
        live = served.get("/live")["pools"][0]
        assert live["queue"] == {"paused": 40 - held["done"]}
        assert good(served.client.post(f"/batches/{first}/resume"))["state"] == "running"
        # The pause of then, sent once more, pauses nothing.
        again = served.client.post(f"/batches/{first}/pause", headers=key)
        assert (good(again)["state"], again.headers["idempotency-replayed"]) == ("paused", "true")
        assert served.get(f"/batches/{first}")["state"] == "running"
        row = served.over(first)
        assert (row["done"], row["attempts"], llm.stats()["requests"]) == (40, 40, 50)
        assert [each["custom_id"] for each in served.lines(first)] == [f"a-{i}" for i in range(40)]


def test_a_cancelled_batch_ends_and_accounts_for_every_line(cli: Cli, tmp_path: Path) -> None:
    with (
        provider(latency=SLOW) as llm,
        serving(cli, tmp_path, llm.base_url, env={"OPENAI_MAX_CONCURRENCY": "2"}) as served,
    ):
        batch_id = served.batch(40)
        until("its first result", lambda: served.get(f"/batches/{batch_id}")["done"])
        assert good(served.client.post(f"/batches/{batch_id}/cancel"))["state"] in ("cancelling", "cancelled")
        row = served.over(batch_id)
        assert row["state"] == "cancelled"
        assert row["done"] + row["failed"] == 40
        assert 0 < row["done"] < 40
        results, errors = served.lines(batch_id), served.lines(batch_id, "errors")
        ids = [each["custom_id"] for each in results + errors]
        assert sorted(ids) == sorted(f"q-{i}" for i in range(40))
        assert {each["error"]["code"] for each in errors} == {"BATCH_CANCELLED"}
        # What was sent was answered and kept.
        assert len(results) == row["attempts"] == llm.stats()["requests"]
        error_of(served.client.post(f"/batches/{batch_id}/resume"), 409, "CONFLICT")
        assert served.get("/live")["pools"][0]["in_flight"] == 0


def test_what_backs_off_is_held_and_cancelled_too(cli: Cli, tmp_path: Path) -> None:
    env = {"OPENAI_MAX_CONCURRENCY": "4", "OPENAI_BACKOFF_BASE_SECONDS": "0.3", "OPENAI_RETRY_MAX_ATTEMPTS": "50"}
    events = [{"kind": "throttled", "ratio": 1.0}]
    with provider(latency=SLOW, events=events) as llm, serving(cli, tmp_path, llm.base_url, env=env) as served:
        batch_id = served.batch(8)
        until("429s", lambda: served.get(f"/batches/{batch_id}")["throttled"] >= 4)
        good(served.client.post(f"/batches/{batch_id}/pause"))
        until("the end of what flies", lambda: served.get(f"/batches/{batch_id}")["in_flight"] == 0)
        before = llm.stats()["requests"]
        time.sleep(0.8)
        assert llm.stats()["requests"] == before
        good(served.client.post(f"/batches/{batch_id}/resume"))
        until("more attempts", lambda: llm.stats()["requests"] > before)
        good(served.client.post(f"/batches/{batch_id}/cancel"))
        row = served.over(batch_id)
        assert (row["state"], row["failed"]) == ("cancelled", 8)
        assert served.get("/live")["pools"][0]["in_flight"] == 0


def test_batches_share_the_pool_alike(cli: Cli, tmp_path: Path) -> None:
    with (
        provider(latency=SLOW) as llm,
        serving(cli, tmp_path, llm.base_url, env={"OPENAI_MAX_CONCURRENCY": "1"}) as served,
    ):
        long = served.batch(60, prefix="a")
        until("its first result", lambda: served.get(f"/batches/{long}")["done"])
        short = served.batch(5, prefix="b")
        before = served.get(f"/batches/{long}")["done"]
        assert served.over(short)["done"] == 5
        # Turn and turn about, so while 5 of one ended, about 5 of the other did; one is pulled ahead, one in flight.
        assert served.get(f"/batches/{long}")["done"] - before <= 8
        good(served.client.post(f"/batches/{long}/cancel"))


def test_a_refused_account_stops_batches_until_they_are_resumed(cli: Cli, tmp_path: Path) -> None:
    events = [{"kind": "quota", "after_requests": 3, "times": 1}]
    env = {"OPENAI_MAX_CONCURRENCY": "1"}
    with provider(latency=SLOW, events=events) as llm, serving(cli, tmp_path, llm.base_url, env=env) as served:
        batch_id = served.batch(8)
        row = until("a stop", lambda: (r := served.get(f"/batches/{batch_id}"))["state"] == "stopped" and r)
        assert row["reason"] == "INSUFFICIENT_QUOTA"
        assert (row["done"], row["failed"]) == (3, 0)
        assert "INSUFFICIENT_QUOTA" in served.client.get("/readyz").text
        # As through another replica, which can but write it down.
        other = ServiceDatabase(served.database)
        store = Store(other)
        stopped = store.batch(batch_id)
        assert stopped is not None
        elsewhere: Any = SimpleNamespace(store=store, batches={})
        asyncio.run(Worker.ask(elsewhere, stopped, RUN))
        other.closed()
        assert served.over(batch_id)["done"] == 8
        assert served.get("/readyz")["detail"] == ""


# ---------------------------------------------------------------- settings


def test_settings_change_without_a_restart_and_outlive_one(cli: Cli, llm: ProviderThread, tmp_path: Path) -> None:
    with serving(cli, tmp_path, llm.base_url, env={"OPENAI_STAGGER_SECONDS": "600"}) as served:
        batch_id = served.batch(12)
        until("the first", lambda: served.get(f"/batches/{batch_id}")["attempts"] == 1)
        wrong = served.client.put("/settings", json={"settings": {"OPENAI_STAGER_SECONDS": 1}})
        error_of(wrong, 422, "BAD_SETTING")
        assert "did you mean OPENAI_STAGGER_SECONDS" in wrong.json()["error"]["message"]
        error_of(served.client.put("/settings", json={"settings": {"OPENAI_MAX_CONCURRENCY": 0}}), 422, "BAD_SETTING")
        found = good(served.client.put("/settings", json={"settings": {"OPENAI_STAGGER_SECONDS": 0}}))
        assert found["settings"]["OPENAI_STAGGER_SECONDS"] == 0.0
        change = found["changes"][0]
        assert (change["who"], change["pool"]) == ("local", "default")
        assert change["changes"] == {"OPENAI_STAGGER_SECONDS": ["600", "0"]}
        assert abs(change["at"] - time.time()) < 60.0
        assert served.over(batch_id)["done"] == 12
    with serving(cli, tmp_path, llm.base_url, env={"OPENAI_STAGGER_SECONDS": "600"}) as served:
        assert served.get("/settings")["settings"]["OPENAI_STAGGER_SECONDS"] == 0.0
        back = good(served.client.put("/settings", json={"settings": {"OPENAI_STAGGER_SECONDS": None}}))
        assert back["settings"]["OPENAI_STAGGER_SECONDS"] == 600.0
        shared = served.run(served.template(), settings={"OPENAI_MAX_CONCURRENCY": 5})
        error_of(shared, 422, "BAD_SETTING")


def test_what_if_answers_beside_today(served: Served) -> None:
    shape = {"requests": 200, "prompt_tokens": 300, "max_output_tokens": 100}
    body = {"shape": shape, "settings": {"OPENAI_STAGGER_SECONDS": 1, "OPENAI_MAX_CONCURRENCY": 50}, "runs": 3}
    found = served.post("/what-if", body)
    assert (found["requests"], found["runs"]) == (200, 3)
    # One launch a second, +-20 %, for each of the 199 after the first.
    assert found["proposed"]["finish_s"]["p50"] == pytest.approx(199.0, rel=0.05)
    assert found["today"]["finish_s"]["p50"] < 60.0
    assert found["changes"]["OPENAI_STAGGER_SECONDS"] == ["0", "1"]
    shares = [each["share"] for each in found["proposed"]["milestones"]]
    assert shares == sorted(shares)
    batch_id = served.batch(10)
    served.over(batch_id)
    of_batch = served.post("/what-if", {"batch_id": batch_id, "settings": {"OPENAI_MAX_CONCURRENCY": 1}})
    # Answers of a batch that is over are known: ten, one after the other.
    with sqlite3.connect(served.database) as connection:
        batch = "SELECT number FROM service_batches WHERE batch_id = ?"
        query = f"SELECT sum(finished_s - launched_s) FROM attempts WHERE request >> 24 = ({batch})"
        (sum_s,) = connection.execute(query, (batch_id,)).fetchone()
    assert of_batch["proposed"]["finish_s"]["p50"] == pytest.approx(sum_s, rel=0.02)
    error_of(served.client.post("/what-if", json={"shape": shape, "batch_id": batch_id}), 422, "INVALID_REQUEST")


# ---------------------------------------------------------------- who may come in


def test_elsewhere_than_on_loopback_nobody_comes_in_without_a_token(
    cli: Cli, llm: ProviderThread, tmp_path: Path
) -> None:
    where = ("--database", tmp_path / "service.db")
    ran = cli.run("serve", "--host", "0.0.0.0", "--port", "0", *where)
    assert (ran.code, "there is no token" in ran.err) == (2, True)
    tokens = {}
    for scope in ("read", "run", "admin"):
        tokens[scope] = cli.run("token", "add", f"{scope}er", "--scope", scope, *where).out.strip()
    assert tokens["run"] not in (tmp_path / "service.db").read_bytes().decode("latin-1")
    with serving(cli, tmp_path, llm.base_url, "--host", "0.0.0.0") as served:
        error_of(served.client.get("/batches"), 401, "UNAUTHENTICATED")
        for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": "Basic abc"}):
            answer = served.client.get("/batches", headers=headers)
            error_of(answer, 401, "UNAUTHENTICATED")
            assert answer.headers["www-authenticate"] == "Bearer"

        def status(scope: str, method: str, path: str, **rest: Any) -> int:
            headers = {"Authorization": f"Bearer {tokens[scope]}"}
            return served.client.request(method, path, headers=headers, **rest).status_code

        template = {"json": {"name": "a", "model": "m", "prompt": "p"}}
        change = {"json": {"settings": {"OPENAI_STAGGER_SECONDS": 1}}}
        assert [status(scope, "GET", "/batches") for scope in tokens] == [200, 200, 200]
        assert [status(scope, "POST", "/templates", **template) for scope in tokens] == [403, 201, 201]
        assert [status(scope, "PUT", "/settings", **change) for scope in tokens] == [403, 403, 200]
        assert served.client.get("/healthz").status_code == 200
        # Nobody reads what a stranger sends.
        error_of(served.client.post("/templates", content="{"), 401, "UNAUTHENTICATED")
        who = served.client.get("/settings", headers={"Authorization": f"Bearer {tokens['read']}"}).json()
        assert who["changes"][0]["who"] == "adminer"
        assert cli.run("token", "list", *where).out.split() == ["adminer", "admin", "reader", "read", "runer", "run"]
        assert cli.run("token", "remove", "reader", *where).out == "removed\n"
        until("the token's end", lambda: status("read", "GET", "/batches") == 401)
        for token in tokens.values():
            assert token not in served.log


def test_a_browser_is_no_way_in_from_elsewhere(served: Served) -> None:
    error_of(served.client.get("/batches", headers={"Host": "evil.example"}), 403, "FORBIDDEN")
    answer = served.client.post("/batches", content=lines(1), headers={"Origin": "http://evil.example"})
    error_of(answer, 403, "FORBIDDEN")
    own = str(served.client.base_url)
    assert served.client.post("/what-if", json={}, headers={"Origin": own}).status_code == 422


def test_what_is_too_large_is_refused(cli: Cli, llm: ProviderThread, tmp_path: Path) -> None:
    with serving(cli, tmp_path, llm.base_url, "--max-upload-mb", 1) as served:
        long = lines(1, text="x" * 2**20)
        error_of(served.client.post("/batches", content=long), 413, "BODY_TOO_LARGE")
        # Without a length: it is counted as it comes.
        error_of(served.client.post("/batches", content=iter([long[: 2**19], long[2**19 :]])), 413, "BODY_TOO_LARGE")
        good(served.client.post("/batches", content=lines(3)))


@pytest.mark.parametrize(
    ("path", "content", "headers", "status", "code"),
    [
        # What is stored could never be shown again.
        ("/templates", TEMPLATE_TEXT % '{"x": NaN}', {}, 422, "INVALID_REQUEST"),
        ("/templates", TEMPLATE_TEXT % '{"x": 1e999}', {}, 422, "INVALID_REQUEST"),
        ("/templates", TEMPLATE_TEXT % '{"x": "\\ud800"}', {}, 422, "INVALID_REQUEST"),
        ("/templates", TEMPLATE_TEXT % f'{{"x": {"[" * 940}{"]" * 940}}}', {}, 422, "INVALID_REQUEST"),
        ("/templates", TEMPLATE_TEXT % "{}", {"Content-Type": "text/plain"}, 415, "UNSUPPORTED_MEDIA_TYPE"),
        ("/templates?runs=3", TEMPLATE_TEXT % "{}", {}, 422, "INVALID_REQUEST"),
        ("/batches?deadline=3", "{}", {}, 422, "INVALID_REQUEST"),
        ("/batches", "{}", {"Content-Type": "multipart/form-data; boundary=x"}, 415, "UNSUPPORTED_MEDIA_TYPE"),
        ("/batches", "{}", {"Content-Encoding": "gzip"}, 415, "UNSUPPORTED_MEDIA_TYPE"),
        ("/what-if", iter([b" " * 2**20] * 9), {}, 413, "BODY_TOO_LARGE"),
        ("/nowhere", "", {}, 404, "NOT_FOUND"),
        ("/healthz", "", {}, 405, "METHOD_NOT_ALLOWED"),
    ],
)
def test_what_cannot_be_taken_is_refused_in_one_shape(
    served: Served, path: str, content: Any, headers: dict[str, str], status: int, code: str
) -> None:
    headers = {"Content-Type": "application/json", **headers}
    error_of(served.client.post(path, content=content, headers=headers), status, code)


def test_an_answer_that_forbids_a_method_names_all_that_are_allowed(served: Served) -> None:
    assert served.client.delete("/settings").headers["allow"] == "GET, PUT"


def test_neither_key_nor_prompt_is_ever_logged(cli: Cli, tmp_path: Path) -> None:
    secret = "a-very-private-question"
    events = [{"kind": "unauthorized", "after_requests": 2, "times": 1}, {"kind": "drop", "ratio": 0.3}]
    with provider(events=events) as llm, serving(cli, tmp_path, llm.base_url) as served:
        template = served.template(prompt=secret + " {{ name }}")
        first = good(served.run(template, 3))["batch_id"]
        until("the stop of the first", lambda: served.get(f"/batches/{first}")["state"] == "stopped")
        served.client.post("/templates", json={"name": secret, "prompt": 3})
        bad = served.client.post(f"/templates/{template}/batch-run", json={"inputs": [{"nam": secret}]})
        assert secret not in bad.text
        error_of(bad, 422, "BAD_INPUT")
        batch_id = good(served.client.post("/batches", content=lines(5, text=secret)))["batch_id"]
        served.over(batch_id)
        assert secret not in served.log
        assert KEY not in served.log
