"""`run_batch` from Python: every form of rows, the same durable run, and what a stop or a kill leaves."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from governor.journal.journal import Journal
from governor.model.errors import BadInput, BadSetting, BudgetExhausted, PacelineError
from governor.model.estimate import CHAT, sizes_of
from governor.model.policy import Policy
from governor.run.rows import _Lines
from paceline import run_batch, run_batch_sync
from sim.serving.server import ProviderThread
from tests.live import FREE, KEY, ROOT, WAIT_S, provider

ROWS = [{"custom_id": f"q{i}", "messages": [{"role": "user", "content": f"Hello {i}"}]} for i in range(12)]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**FREE, "OPENAI_API_KEY": KEY}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PACELINE_REDIS_URL", raising=False)


@pytest.fixture
def server() -> Iterator[ProviderThread]:
    with provider() as running:
        yield running


def options(server: ProviderThread, folder: Path, **more: Any) -> dict[str, Any]:
    return {"journal": folder / "x.db", "base_url": server.base_url, "model": "gpt-4o", "progress": False, **more}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "rows" in path.name]


def test_dicts_are_answered_once_and_read_again(server: ProviderThread, tmp_path: Path) -> None:
    with_options = options(server, tmp_path, body={"max_tokens": 40})
    results = run_batch_sync(ROWS, **with_options)
    assert [result.custom_id for result in results] == [row["custom_id"] for row in ROWS]
    assert all(result.ok and result.body and 0 < result.output_tokens <= 40 for result in results)
    assert results.summary.completed == 12
    assert not hidden(tmp_path)
    again = list(run_batch(ROWS, **with_options))
    assert sorted(result.row for result in again) == list(range(12))
    assert server.stats()["requests"] == 12
    # A row more: it alone is sent.
    more = [*ROWS, {"custom_id": "new", "messages": ROWS[0]["messages"]}]
    assert len(list(run_batch_sync(more, **with_options))) == 13
    assert server.stats()["requests"] == 13
    with Journal.open(tmp_path / "x.db") as journal:
        assert journal.counts().done == 13


def test_an_async_iterator_with_a_template_leaves_the_loop_free(server: ProviderThread, tmp_path: Path) -> None:
    async def rows() -> AsyncIterator[dict[str, Any]]:
        for i in range(6):
            yield {"text": f"text {i}", "custom_id": i}

    async def main() -> tuple[list[str], int]:
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(turn())
        asked = run_batch(rows(), prompt="Say {text}", url="/responses", **options(server, tmp_path))
        found = [result.custom_id async for result in asked]
        other.cancel()
        return found, turns

    found, turns = asyncio.run(main())
    assert sorted(found) == [str(i) for i in range(6)]
    assert turns > 6
    assert server.stats()["endpoints"] == {"/v1/responses": 6}


def test_a_frame_keeps_its_index(server: ProviderThread, tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["a", "b", "c"], "n": np.array([1, 2, 3])}, index=["x", "y", "z"])
    results = run_batch_sync(frame, prompt="Say {text} {n} times", **options(server, tmp_path))
    answers = results.to_frame()
    assert list(answers.index) == ["x", "y", "z"]
    assert (frame.join(answers)["output_tokens"] > 0).all()
    assert (answers["error"] == "").all()
    prompt_tokens = [sizes_of(CHAT, {"messages": [{"role": "user", "content": "Say a 1 times"}]}).prompt_tokens] * 3
    assert list(answers["prompt_tokens"]) == prompt_tokens
    # Columns as the body's fields: numpy's numbers are numbers, and what is missing is left out.
    columns = pd.DataFrame({"input": ["a", "b"], "max_output_tokens": np.array([30, np.nan])})
    results = run_batch_sync(columns, url="/v1/responses", **options(server, tmp_path, journal=tmp_path / "y.db"))
    assert [result.ok for result in results] == [True, True]
    assert list(results.to_frame().index) == [0, 1]


def test_a_function_makes_the_prompt(server: ProviderThread, tmp_path: Path) -> None:
    rows = ({"text": f"{i}"} for i in range(3))
    found = run_batch_sync(
        rows, prompt=lambda row: [{"role": "user", "content": row["text"]}], **options(server, tmp_path)
    )
    assert [result.custom_id for result in found] == ["0", "1", "2"]
    assert list(found.to_frame().index.names) == ["custom_id"]


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        (["text"], {}, "row 0 is a str"),
        ("text", {}, "rows are str"),
        ([{"text": "a"}, {"title": "b"}], {"prompt": "{text}"}, "row 1 has no 'text', which the prompt names: it has"),
        ([{"text": "a"}], {"prompt": "{text"}, "the prompt is no template"),
        ([{"input": {1, 2}}], {"url": "/v1/responses"}, "row 0 ('0') is no JSON: set cannot be sent"),
        ([ROWS[0], ROWS[0]], {}, "row 1 has the name of row 0, 'q0': make custom_id unique"),
        ([ROWS[0], {"custom_id": "a"}], {}, "row 1: body has no 'messages'"),
        ([], {}, "rows: no requests in it"),
        ([{"text": "a"}], {"prompt": lambda row: 5}, "row 0: the prompt returned 5: it must be text or a list"),
    ],
)
def test_what_is_wrong_with_rows_is_one_line(
    server: ProviderThread, tmp_path: Path, rows: Any, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput) as caught:
        run_batch_sync(rows, **options(server, tmp_path, **more))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing is left"
    assert server.stats()["requests"] == 0


def test_an_async_iterator_needs_a_loop_and_a_url_must_be_one(server: ProviderThread, tmp_path: Path) -> None:
    async def rows() -> AsyncIterator[dict[str, Any]]:
        yield ROWS[0]

    with pytest.raises(BadInput, match="needs run_batch"):
        run_batch_sync(rows(), **options(server, tmp_path))
    wrong = {"url": "/v1/audio", "file_tokens": -1, "policy": {}, "max_cost": -1, "body": "x", "prompt": 7}
    for name, value in wrong.items():
        with pytest.raises(BadSetting, match=f"{name} {value!r}"):
            run_batch_sync(ROWS, **options(server, tmp_path, **{name: value}))
    # More than any limit: refused with the figure before anything is sent.
    file = {"type": "input_file", "file_id": "file-abc"}
    row = {"input": [{"role": "user", "content": [file]}], "model": "gpt-4o-mini"}
    with pytest.raises(PacelineError, match=r"2,000,0\d\d,\d\d\d tokens"):
        run_batch_sync([row], **options(server, tmp_path, url="/responses", file_tokens=2_000_000_000))
    assert server.stats()["requests"] == 0


def test_a_full_disk_is_one_line_and_an_empty_cell_is_no_name(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # SIGXFSZ is ignored by Python
    try:
        with pytest.raises(BadInput, match=r"x\.db: the rows cannot be written beside it: .*; nothing was sent"):
            run_batch_sync(({"input": "x" * 1_000} for _ in range(100)), journal=tmp_path / "x.db")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not hidden(tmp_path)
    lines = _Lines([], None, {}, "/v1/responses")
    for name in (None, float("nan"), "a"):
        lines.line({"input": "x", "custom_id": name})
    assert list(lines.numbers) == ["0", "1", "a"]


def test_failures_are_results_and_a_budget_is_an_error(tmp_path: Path) -> None:
    with provider(events=[{"kind": "model_not_found", "after_requests": 3, "times": 1}]) as server:
        results = run_batch_sync(ROWS, **options(server, tmp_path))
        (failed,) = [result for result in results if not result.ok]
        assert "gpt-4o" in failed.message
        assert (failed.answer, failed.error) == ("", "BAD_REQUEST")
        seen = []
        budgeted = run_batch(ROWS, **options(server, tmp_path, journal=tmp_path / "y.db", max_cost=1e-6))
        with pytest.raises(BudgetExhausted, match="the same call goes on"):
            seen += [result for result in budgeted]  # noqa: C416  (each is kept that comes before the error)


SLOW = {"latency": {"first_token_s": 0.1, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0}}


def test_a_loop_that_is_left_stops_the_run_and_nothing_is_paid_twice(tmp_path: Path) -> None:
    one = Policy.from_env({**FREE, "OPENAI_MAX_CONCURRENCY": "2"})
    with provider(**SLOW) as server:
        with_options = options(server, tmp_path, policy=one)

        async def first() -> None:
            async for result in run_batch(ROWS, **with_options):
                assert result.ok
                break

        async def cancelled(before: int) -> None:
            async def read() -> None:
                async for _ in run_batch(ROWS, **with_options):
                    pass

            task = asyncio.create_task(read())
            while server.provider.desk.count.requests == before and not task.done():
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(first())
        requests = server.stats()["requests"]
        assert 0 < requests < 12
        asyncio.run(cancelled(requests))
        assert requests < server.stats()["requests"] < 12
        assert len(list(run_batch_sync(ROWS, **with_options))) == 12
        stats = server.stats()
    assert stats["outcomes"] == {"ok": 12}
    assert not hidden(tmp_path)


def test_a_ctrl_c_lets_what_is_in_flight_end(tmp_path: Path) -> None:
    with provider(**SLOW) as server:
        with_options = options(server, tmp_path, policy=Policy.from_env({**FREE, "OPENAI_MAX_CONCURRENCY": "2"}))

        def interrupt() -> None:
            while server.provider.desk.count.requests < 4 and main.is_alive():
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGINT)

        main = threading.main_thread()
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run_batch_sync(ROWS, **with_options)
        thread.join()
        assert server.stats()["requests"] < 12
        assert len(list(run_batch_sync(ROWS, **with_options))) == 12
        assert server.stats()["outcomes"] == {"ok": 12}


def test_a_second_ctrl_c_cancels_and_the_journal_is_free_at_once(server: ProviderThread, tmp_path: Path) -> None:
    with provider(latency={**SLOW["latency"], "first_token_s": WAIT_S}) as slow:
        results = run_batch(ROWS, **options(slow, tmp_path))

        def interrupt() -> None:
            until = time.monotonic() + WAIT_S
            for is_time in (lambda: slow.provider.desk.count.requests >= 2, lambda: results._stopper.pressed):
                while not is_time() and time.monotonic() < until:
                    time.sleep(0.005)
                os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            list(results)
        assert results._run.ended.is_set()
        thread.join()
        assert len(list(run_batch_sync(ROWS, **options(server, tmp_path)))) == 12


PROGRAM = """
import sys
import threading
import time
from paceline import run_batch_sync
rows = [{"custom_id": f"q{i}", "messages": [{"role": "user", "content": f"Hello {i}"}]} for i in range(12)]
run_batch_sync(rows, journal="x.db", model="gpt-4o", base_url=sys.argv[1], progress=False)
"""


def test_the_same_rows_go_on_after_a_kill(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENAI_MAX_CONCURRENCY": "2"}
    with provider(**SLOW) as server:
        started = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, server.base_url], cwd=tmp_path, env=environment, stderr=subprocess.PIPE
        )
        try:
            while server.provider.desk.count.outcomes["ok"] < 3:
                assert started.poll() is None
                time.sleep(0.005)
        finally:
            started.kill()
            started.communicate(timeout=WAIT_S)
        before = server.stats()["requests"]
        assert len(list(run_batch_sync(ROWS, **options(server, tmp_path)))) == 12
        # Only what was in flight when the process was killed is sent again.
        assert 0 <= server.stats()["requests"] - 12 <= 2
    assert 3 <= before < 12
    assert not hidden(tmp_path)


def test_a_second_run_of_a_journal_is_refused(tmp_path: Path) -> None:
    with provider(**SLOW) as server:
        first = iter(run_batch(ROWS, **options(server, tmp_path)))
        next(first)
        with pytest.raises(PacelineError, match="another run has this journal"):
            run_batch_sync(ROWS, **options(server, tmp_path))
        assert len(list(first)) == 11
