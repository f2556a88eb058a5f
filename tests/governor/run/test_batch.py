"""The parts around a live run, one by one: exit codes, the run's own time, merged figures, progress and its ETA."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from governor import law
from governor.forecast.pooled import merged
from governor.forecast.summary import Summary
from governor.journal.journal import Journal
from governor.journal.rows import ResultRow
from governor.model.errors import BadInput, Oversized
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.prices import Price, Prices, Spending
from governor.model.requests import CAUSES, Answer, Outcome, Request, read_requests
from governor.model.work import Job, Work, reserve_of, work_of
from governor.run.account import (
    ATTEMPT_COLUMNS,
    WorkingTime,
    attempt_rows,
    exit_code,
    grant_of,
    line_of,
    lines_of,
    spent_before,
    tally_of,
    worked,
)
from governor.run.intake import disk_needed, prepare, read_demands
from governor.run.steer import changes_text, split_words
from governor.scheduler.driver import Governor
from governor.telemetry.eventlog import EventLog
from governor.telemetry.progress import Bar, Display, Lines, ProgressLane, Snapshot, eta_s, shown, snapshot
from governor.telemetry.watch import Meter
from sim.app.cli import main
from tests.live import batch, line, write_batch

FREE = Policy(stagger_seconds=0.0, max_concurrency=50, tpm_limit=10**9, charge_rule="auto", tpm_window="bucket")
PRICES = Prices({"gpt-4o-mini": (Price(date(2026, 1, 1), 1.0, 1.0, 2.0),)})


def request(index: int = 0) -> Request:
    (found,) = read_requests([json.dumps(line(f"q-{index}"))], "x")
    return Request(index, found.custom_id, found.url, found.model, found.body, found.sizes)


# ---------------------------------------------------------------- how it ended


@pytest.mark.parametrize(
    ("failed", "pending", "stopped", "signals", "code"),
    [
        (0, 0, {}, (), 0),
        (3, 0, {}, (), 1),
        (0, 5, {"a": "INSUFFICIENT_QUOTA"}, (), 4),
        (9, 5, {"a": "UNAUTHORIZED"}, (), 4),
        (0, 5, {"a": "MAX_COST"}, (), 5),
        (0, 5, {"a": "STOP_AFTER", "b": "INSUFFICIENT_QUOTA"}, (), 5),
        (0, 5, {"a": "REFUSED"}, (), 3),
        (0, 5, {"a": "CANARY"}, (), 3),
        (0, 5, {"a": "SIGINT"}, ("SIGINT",), 130),
        (0, 5, {"a": "SIGTERM"}, ("SIGTERM", "SIGINT"), 143),
        # All had ended when the signal came: still a signal, as a shell expects.
        (0, 0, {}, ("SIGINT",), 130),
        # Stopped in the moment in which the last one ended: it is done.
        (0, 0, {"a": "MAX_COST"}, (), 0),
        (0, 5, {}, (), 3),
    ],
)
def test_exit_codes(failed: int, pending: int, stopped: dict[str, str], signals: tuple[str, ...], code: int) -> None:
    assert exit_code(failed, pending, stopped, signals) == code


def test_lines_of_the_errors_file_name_the_reason_in_words() -> None:
    answer = Answer(Outcome.SERVER_ERROR, 500, message="The server had an error", body={"error": {}})
    good, text = line_of(ResultRow(request(), "OPENAI_SERVER_ERROR", answer, 1.0, 0))
    assert not good
    assert '"message":"every attempt failed on the provider\'s side: The server had an error"' in text
    _, text = line_of(ResultRow(request(), "REQUEST_TOO_LARGE", None, 1.0, 0))
    assert "was never sent" in text
    assert '"response":null' in text
    _, text = line_of(ResultRow(request(), "REQUEST_TOO_LARGE", Answer(Outcome.TOO_LARGE, 413), 1.0, 0))
    assert "never sent" not in text


# ---------------------------------------------------------------- the run's own time


def test_time_without_the_nights_between_legs() -> None:
    time = WorkingTime(((0.0, 10.0), (100.0, 105.0), (200.0, 230.0)))
    moments = {
        -1.0: 0.0,
        0.0: 0.0,
        4.0: 4.0,
        10.0: 10.0,
        50.0: 10.0,
        100.0: 10.0,
        103.0: 13.0,
        199.0: 15.0,
        999.0: 45.0,
    }
    assert {at: time.own(at) for at in moments} == moments


def summary(**changes: object) -> Summary:
    values: dict[str, object] = dict.fromkeys(Summary.__slots__, 0)
    values |= {"waits_s": dict.fromkeys(CAUSES[1:], 1.0), "failures": {}, "efficiency": None, "cost_usd": None}
    return Summary(**(values | changes))  # type: ignore[arg-type]


def test_pools_together_add_up_but_for_time() -> None:
    a = summary(requests=3, completed=2, failed=1, makespan_s=10.0, bound_s=4.0, failures={"X": 1})
    b = summary(requests=5, completed=5, makespan_s=7.0, bound_s=6.0, failures={})
    both = merged([a, b], 6.0, 1.5)
    assert (both.requests, both.completed, both.failed, both.cost_usd) == (8, 7, 1, 1.5)
    assert (both.makespan_s, both.bound_s, both.efficiency) == (10.0, 6.0, None)
    assert both.waits_s["tpm"] == 2.0
    assert both.failures == {"X": 1}
    assert merged([b], 6.0, 2.0).cost_usd == 2.0


def test_the_grant_is_what_headers_said_where_they_said_it() -> None:
    grant = grant_of(Policy(rpm_limit=100), {"TPM": 5.0})
    assert (grant.tpm_limit, grant.rpm_limit, grant.tpd_limit) == (5.0, 100.0, 0.0)


# ---------------------------------------------------------------- intake


def test_work_of_a_request_reserves_by_the_policy_s_rule() -> None:
    each = request()
    fixed = work_of(each, Policy())
    assert (fixed.reserve, fixed.finalize_reserve, fixed.expected) == (7_000, 7_000, 100.0)
    # What the provider charges is then believed to be as measured: 0.2504 x 12 characters + 1 message + 1.7.
    assert fixed.charge == 6
    whole = work_of(each, Policy(charge_rule="prompt_plus_max"))
    # 12 characters and 4 of the role, 16 / 4, plus the cap of 100; 6,000 in a finalize pass.
    assert (whole.reserve, whole.charge, whole.finalize_reserve) == (104, 104, 6_004)


def test_demands_of_a_file_by_pool(tmp_path: Path) -> None:
    path = write_batch(tmp_path / "r.jsonl", [line(f"q-{i}", model="a" if i % 3 else "b") for i in range(10)])
    pools = (Pool("x", FREE, ("a",)), Pool("y", FREE, ("*",)))
    found = read_demands(path, pools)
    assert (found["x"].requests, found["y"].requests) == (6, 4)
    assert found["x"].total == 6 * reserve_of(FREE, request().sizes)
    with pytest.raises(BadInput, match=r"request 0 \('q-0'\) asks for model 'b', which no pool takes"):
        read_demands(path, pools[:1])


def test_preflight_says_what_requests_only_point_to(tmp_path: Path, capsys) -> None:
    path = tmp_path / "files.jsonl"
    part = {"type": "input_file", "file_id": "file-abc"}
    body = {"model": "gpt-4o", "input": [{"role": "user", "content": [part]}], "max_output_tokens": 300}
    path.write_text(json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": body}) + "\n")
    projected = []
    for assumed, option in (("5,000", []), ("12,000", ["--file-tokens", "12k"])):
        assert main(["preflight", str(path), "--set", "OPENAI_CHARGE_RULE=prompt_plus_max", "--json", *option]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["ok"] is True
        projected.append(json.loads(printed.out)["projected_tokens"])
        said = f"note: 1 request with files whose tokens are unknown: {assumed} are assumed for each (--file-tokens)\n"
        assert printed.err == said
    assert projected[1] - projected[0] == 7_000
    pools = (Pool(policy=Policy(charge_rule="prompt_plus_max")),)
    made = prepare(path, tmp_path / "o.jsonl", tmp_path / "j.db", pools, seed=1, file_tokens=12_000)
    with made.journal:
        assert made.demands["default"].total == projected[1]


def prepared(tmp_path: Path, pool: Pool | None = None, **how: object) -> object:
    where = tmp_path / "j.db"
    return prepare(tmp_path / "r.jsonl", tmp_path / "o.jsonl", where, (pool or Pool(policy=FREE),), seed=1, **how)  # type: ignore[arg-type]


def test_what_can_never_run_leaves_no_journal_behind(tmp_path: Path) -> None:
    batch(tmp_path / "r.jsonl", 5)
    with pytest.raises(Oversized):
        prepared(tmp_path, Pool(policy=Policy(tpm_limit=100)))
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]
    begun = prepared(tmp_path, Pool(policy=Policy(tpm_limit=100)), skip_oversized=True)
    assert begun.oversized == 5  # type: ignore[attr-defined]
    begun.journal.close()  # type: ignore[attr-defined]


def test_a_journal_that_was_never_filled_is_filled_again(tmp_path: Path) -> None:
    batch(tmp_path / "r.jsonl", 5)
    with (tmp_path / "r.jsonl").open("rb") as file:
        from governor.journal.journal import fingerprint_of

        mark = fingerprint_of(file)
    Journal.create(tmp_path / "j.db", fingerprint=mark, seed=1, epoch_s=0.0).close()
    begun = prepared(tmp_path)
    assert begun.journal.counts().pending == 5  # type: ignore[attr-defined]
    begun.journal.close()  # type: ignore[attr-defined]


def test_disk_needed_grows_with_the_input() -> None:
    assert disk_needed(0, 0) == 0
    assert disk_needed(10**6, 1_000) > disk_needed(10**6, 10) > 10**6


# ---------------------------------------------------------------- a whole leg, with a provider that is a function


def test_figures_of_two_legs_from_the_journal_alone(tmp_path: Path) -> None:
    batch(tmp_path / "r.jsonl", 6)
    begun = prepared(tmp_path)
    journal = begun.journal  # type: ignore[attr-defined]
    ok = {"usage": {"prompt_tokens": 10, "completion_tokens": 5}, "choices": [{"message": {"content": "yes"}}]}
    answer = Answer(Outcome.OK, 200, used_prompt_tokens=10, used_output_tokens=5, has_text=True, body=ok)

    async def leg(at_s: float, count: int) -> float:
        async def send(job: Job, timeout_s: float) -> Answer:
            return answer

        recorder = journal.begin({"default": FREE}, at_s).recorders["default"]
        governor = Governor(FREE.params(), observer=recorder, state=recorder.state, start_s=at_s)
        works: Iterator[Work] = (pending.work for pending, _ in zip(journal.pending(), range(count), strict=False))
        await governor.run(works, send)
        await journal.flushed()
        return governor.now()

    journal.finish(asyncio.run(leg(0.0, 2)), "stopped")
    journal.finish(asyncio.run(leg(5_000.0, 9)), "finished")
    time = worked(journal)
    assert len(time.stretches) == 2
    found = tally_of(journal, "default").summary(grant_of(FREE))
    assert (found.requests, found.completed, found.attempts, found.used_tokens) == (6, 6, 6, 90)
    # The night between the legs is no time of the run.
    assert found.makespan_s < 100.0
    assert spent_before(journal, PRICES, date(2026, 6, 1)).total_usd() == pytest.approx(6 * (10 + 5 * 2) / 1e6)
    assert sum(good for good, _ in lines_of(journal)) == 6
    journal.close()


# ---------------------------------------------------------------- progress


def lane(policy: Policy, left: int, tokens: float, service_s: float = 2.0) -> ProgressLane:
    meter = Meter(Pool(policy=policy), Spending(PRICES, date(2026, 6, 1)), left=left, left_tokens=tokens)
    return ProgressLane(Governor(policy.params()), meter, service_s)


def test_the_eta_is_the_law_s_and_not_the_average_so_far() -> None:
    async def check() -> None:
        stagger = Policy(stagger_seconds=10.0, charge_rule="auto", jitter_ratio=0.0)
        # 31 requests, one each 10 s, and the last one's answer.
        assert eta_s(lane(stagger, 31, 31.0)) == pytest.approx(302.0)
        # 60,000 tokens of 30,000 per minute, the first 30,000 at once.
        bucket = FREE.with_(tpm_limit=30_000, tpm_headroom=0.0, max_concurrency=1_000)
        assert eta_s(lane(bucket, 60, 60_000.0)) == pytest.approx(62.0)
        # 100 answers of 2 s, 10 at a time.
        assert eta_s(lane(FREE.with_(max_concurrency=10), 100, 100.0)) == pytest.approx(20.0)
        paused = lane(FREE, 10, 10.0)
        paused.governor.pause()
        assert eta_s(paused) == float("inf")
        assert eta_s(lane(FREE, 0, 0.0)) == 0.0

    asyncio.run(check())


def test_a_snapshot_over_pools_and_its_line() -> None:
    async def check() -> None:
        lanes = [lane(FREE, 10, 10.0), lane(FREE.with_(stagger_seconds=5.0), 10, 10.0)]
        found = snapshot(lanes, 100, 80, 3)
        assert (found.total, found.ended, found.failed, found.in_flight) == (100, 80, 3, 0)
        assert found.limit == 2e9
        assert found.eta_s == pytest.approx(47.0)
        assert found.line() == (
            "80 of 100 done (80 %), 3 failed, 0 in flight, 0 429s, 0 of 2,000,000,000 tokens/min, about 47 s left"
        )

    asyncio.run(check())


def snap(**changes: object) -> Snapshot:
    values: dict[str, object] = {
        "total": 10,
        "ended": 4,
        "failed": 0,
        "in_flight": 2,
        "throttled": 1,
        "tokens_per_minute": 900.0,
        "limit": 0.0,
        "waiting": "tpm",
        "eta_s": 61.0,
    }
    return Snapshot(**(values | changes))  # type: ignore[arg-type]


def test_lines_say_what_is_waited_for() -> None:
    assert snap().line().endswith("900 tokens/min, waits for tokens of the budget per minute, about 1 min 1 s left")
    assert snap(waiting="paused", eta_s=float("inf")).line().endswith(", paused")
    assert snap(stopped="SIGINT").line().endswith("stopping: waiting for requests in flight")
    assert snap(failed=1).short() == (
        "4/10 (40 %, 1 failed), 1 min 1 s left, 2 in flight, 1 429s, waits for tpm, 900 tokens/min"
    )
    assert snap(waiting="paused").short().startswith("4/10 (40 %), paused, ")


def test_what_is_shown_where() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert type(shown(quiet=True, stream=Terminal())) is Display
    assert isinstance(shown(quiet=False, stream=Terminal()), Bar)
    assert isinstance(shown(quiet=False, logs="text", stream=Terminal()), Lines)
    assert isinstance(shown(quiet=False, stream=io.StringIO()), Lines)


@pytest.mark.parametrize("quiet", [True, False])
def test_beside_a_log_in_json_everything_is_json(quiet: bool) -> None:
    both = shown(quiet=quiet, logs="json", stream=(stream := io.StringIO()))
    both.start()
    both.say("a warning")
    both.inform("a forecast")
    texts = [json.loads(text)["text"] for text in stream.getvalue().splitlines()]
    assert texts == (["a warning"] if quiet else ["a warning", "a forecast"])


def test_a_reader_that_has_gone_ends_no_run() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    for each in (shown(quiet=True, stream=Gone()), shown(quiet=False, stream=Gone()), Lines(Gone(), every_s=0.0)):
        each.say("a warning")
        each.show(snap())
    EventLog("text", "default", Gone()).deferred(law.STAGGER)


def test_off_a_terminal_there_is_a_line_now_and_then() -> None:
    stream = io.StringIO()
    lines = Lines(stream, every_s=0.0)
    lines.start()
    lines.show(snap())
    assert "4 of 10 done (40 %)" in stream.getvalue()
    rare = Lines(stream := io.StringIO(), every_s=3_600.0)
    rare.start()
    rare.show(snap())
    rare.say("a warning")
    assert stream.getvalue() == "a warning\n"


def test_on_a_terminal_warnings_stand_above_the_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    bar = Bar(stream)
    bar.start()
    bar.show(snap())
    bar.say("[a] warning with brackets")
    bar.stop()
    assert "[a] warning with brackets" in stream.getvalue()


# ---------------------------------------------------------------- steering


def test_commands_name_pools_and_settings() -> None:
    pools = {"a": 1, "b": 2}
    assert split_words(("X=1",), pools) == (["a", "b"], ["X=1"])
    assert split_words(("pool=b", "X=1"), pools) == (["b"], ["X=1"])
    from governor.model.errors import BadSetting

    with pytest.raises(BadSetting, match="there is no pool 'c': a, b"):
        split_words(("pool=c",), pools)


def test_changes_in_words() -> None:
    assert changes_text(Policy(), Policy(stagger_seconds=25.0, settle=True)) == (
        "OPENAI_STAGGER_SECONDS 15 -> 25, OPENAI_SETTLE false -> true"
    )
    assert changes_text(Policy(), Policy()) == ""


# ---------------------------------------------------------------- bills


def test_attempts_carry_cached_and_reasoning_tokens_and_their_cost(tmp_path: Path) -> None:
    batch(tmp_path / "r.jsonl", 2)
    begun = prepared(tmp_path)
    journal = begun.journal  # type: ignore[attr-defined]
    usage = {
        "prompt_tokens": 1_000_000,
        "completion_tokens": 500_000,
        "prompt_tokens_details": {"cached_tokens": 400_000},
        "completion_tokens_details": {"reasoning_tokens": 300_000},
    }
    ok = {"usage": usage, "choices": [{"message": {"content": "yes"}}], "service_tier": "flex"}
    answer = Answer(
        Outcome.OK, 200, used_prompt_tokens=1_000_000, used_output_tokens=500_000, body=ok, request_id="req_7"
    )
    answers = [Answer(Outcome.THROTTLED, 429, error_code="rate_limit_exceeded"), answer, answer]

    async def leg() -> None:
        async def send(job: Job, timeout_s: float) -> Answer:
            return answers.pop(0)

        quick = FREE.with_(backoff_base_seconds=0.001, max_concurrency=1)
        recorder = journal.begin({"default": quick}, 0.0).recorders["default"]
        governor = Governor(quick.params(), observer=recorder)
        await governor.run((pending.work for pending in journal.pending()), send)

    asyncio.run(leg())
    journal.finish(1.0, "finished")
    prices = Prices({"gpt-4o-mini": (Price(date(2026, 1, 1), 4.0, 1.0, 16.0, flex=0.5),)})
    rows = [dict(zip(ATTEMPT_COLUMNS, row, strict=True)) for row in attempt_rows(journal, prices, date(2026, 6, 1))]
    # By flex: 600,000 x $2 + 400,000 x $0.50 + 500,000 x $8, per million; a refusal costs nothing.
    assert [row["cost_usd"] for row in rows] == [0.0, pytest.approx(5.4), pytest.approx(5.4)]
    assert [row["cached_tokens"] for row in rows] == [0, 400_000, 400_000]
    assert [row["service_tier"] for row in rows] == ["", "flex", "flex"]
    assert [row["reasoning_tokens"] for row in rows] == [0, 300_000, 300_000]
    assert (rows[1]["request_id"], rows[0]["prompt_tokens"]) == ("req_7", "")
    assert spent_before(journal, prices, date(2026, 6, 1)).total_usd() == pytest.approx(10.8)
    unknown = next(attempt_rows(journal, Prices({}), date(2026, 6, 1)))
    assert unknown[-1] == 0.0
    journal.close()
