"""Metrics: the exact names, what each event counts, the port, the textfile and the webhook.

The events are those of real runs of the asyncio driver on virtual time; expected counts come from the runs' own rows.
"""

from __future__ import annotations

import asyncio
import http.server
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from governor import law
from governor.model.errors import BadInput, BadSetting
from governor.model.policy import Policy
from governor.model.requests import Answer, Attempt, Outcome, Request, Sizes
from governor.model.work import Job, Work
from governor.profiles.loader import read_profile
from governor.profiles.quotas import quota_of
from governor.scheduler.driver import Governor
from governor.telemetry.metrics import Metrics, Notice, PoolMetrics, checked_hook
from tests.governor.costs import lines_run
from tests.live import WAIT_S
from tests.virtual_loop import run_virtual

DASHBOARD = {
    "contestra_openai_active_concurrency",
    "contestra_openai_next_slot_epoch",
    "contestra_openai_stagger_delays_total",
    "contestra_openai_tpm_window_deferrals_total",
    "contestra_llm_rate_limit_events_total",
}


def samples(text: str) -> dict[tuple[str, ...], float]:
    """(name, label values in order of their names) -> value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[(sample.name, *(value for _, value in sorted(sample.labels.items())))] = sample.value
    return found


def request(index: int) -> Request:
    sizes = Sizes(0, 100, 400, 4, 1, 0, 0, 1, 100)
    return Request(index, f"q{index}", "/v1/chat/completions", "gpt-4o", {}, sizes)


class Rows(PoolMetrics):
    """The metrics' observer, which also keeps the rows that it was told of."""

    def __init__(self, metrics: Metrics, pool: str = "default", vendor: str = "openai") -> None:
        super().__init__(metrics, pool, vendor)
        self.rows: list[Attempt] = []
        self.asked: Counter[int] = Counter()

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        self.rows.append(attempt)
        super().attempted(attempt, answer, failure)

    def deferred(self, cause: int) -> None:
        self.asked[cause] += 1
        super().deferred(cause)


def run(
    metrics: Metrics, count: int, *, pool: str = "default", throttles: int = 0, **settings: Any
) -> tuple[Rows, list[tuple[float, float]]]:
    """A batch on virtual time; the first `throttles` attempts draw a 429. Gauges are read while it runs."""
    observer = Rows(metrics, pool)
    seen: list[tuple[float, float]] = []
    left = [throttles]

    async def send(job: Job, timeout_s: float) -> Answer:
        found = samples(metrics.text())
        seen.append((found["contestra_openai_active_concurrency",], found["paceline_in_flight", pool]))
        await asyncio.sleep(2.0)
        if left[0] > 0:
            left[0] -= 1
            return Answer(Outcome.THROTTLED, 429, "rate_limit_exceeded", retry_after_s=1.0)
        return Answer(Outcome.OK, 200, used_prompt_tokens=100, used_output_tokens=50, has_text=True)

    async def main() -> None:
        governor = Governor(Policy().with_(**settings).params(), observer=observer, pool=pool)
        metrics.watch(pool, governor)
        try:
            await governor.run((Work(request(i), 1_000.0, charge=900) for i in range(count)), send)
            assert samples(metrics.text())["contestra_openai_active_concurrency",] == 0.0, "idle before unwatch, too"
        finally:
            metrics.unwatch(pool)

    run_virtual(main())
    return observer, seen


def test_the_names_of_the_dashboards_stand_from_the_start() -> None:
    text = Metrics().text()
    shown = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    assert {name for name in shown if name.startswith("contestra_")} == DASHBOARD
    assert samples(text)["contestra_llm_rate_limit_events_total", "openai"] == 0.0
    assert "_created" not in text
    types = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE contestra_"))
    gauges = {"contestra_openai_active_concurrency", "contestra_openai_next_slot_epoch"}
    # The classic text format calls a counter by its full name.
    assert types == {name: "gauge" if name in gauges else "counter" for name in DASHBOARD}


def test_every_event_is_counted_once() -> None:
    metrics = Metrics()
    settings = {"max_concurrency": 4, "stagger_seconds": 1.0, "tpm_limit": 10_000, "tpm_headroom": 0.0}
    observer, seen = run(metrics, 12, throttles=3, **settings)
    found = samples(metrics.text())
    rows = observer.rows
    assert len(rows) == 15

    assert found["contestra_llm_rate_limit_events_total", "openai"] == 3
    assert found["paceline_attempts_total", "throttled", "default"] == 3
    assert found["paceline_attempts_total", "ok", "default"] == 12
    assert found["paceline_requests_total", "default", "ok"] == 12
    for kind, count in (
        ("reserved", 15 * 1_000),
        ("charged", sum(max(0, row.charged_tokens) for row in rows)),
        ("prompt", 12 * 100),
        ("output", 12 * 50),
    ):
        assert found["paceline_tokens_total", kind, "default"] == count
    assert found["paceline_answer_seconds_count", "default"] == 15
    assert found["paceline_answer_seconds_sum", "default"] == pytest.approx(15 * 2.0)

    assert observer.asked[law.STAGGER] > 0
    assert observer.asked[law.BY_TPM] > 0
    assert found["contestra_openai_stagger_delays_total",] == observer.asked[law.STAGGER]
    assert found["contestra_openai_tpm_window_deferrals_total",] == observer.asked[law.BY_TPM]
    for cause, name in ((law.STAGGER, "stagger"), (law.BY_TPM, "tpm"), (law.CONCURRENCY, "concurrency")):
        assert found["paceline_deferrals_total", name, "default"] == observer.asked[cause]
        waits = [getattr(row, f"waited_{name}_s") for row in rows]
        assert found["paceline_wait_seconds_sum", name, "default"] == pytest.approx(sum(waits))
        assert found["paceline_wait_seconds_count", name, "default"] == sum(wait > 0 for wait in waits)
    below = sum(0 < row.waited_backoff_s <= 2.5 for row in rows)
    assert found["paceline_wait_seconds_bucket", "backoff", "2.5", "default"] == below > 0

    assert max(active for active, _ in seen) == 4
    assert all(active == in_pool for active, in_pool in seen)
    assert found["contestra_openai_active_concurrency",] == 0.0
    assert found["paceline_in_flight", "default"] == 0.0
    assert found["contestra_openai_next_slot_epoch",] == 0.0


def test_lost_requests_show_why() -> None:
    metrics = Metrics()
    run(metrics, 2, throttles=99, retry_max_attempts=3, max_concurrency=2, stagger_seconds=0.0)
    found = samples(metrics.text())
    assert found["paceline_requests_total", "default", "OPENAI_RATE_LIMIT_EXHAUSTED"] == 2
    assert found["contestra_llm_rate_limit_events_total", "openai"] == 6


KINDS = ("granted", "budget", "used")


class Slot:
    def __init__(self, in_flight: int, next_slot_epoch: float) -> None:
        self.in_flight = in_flight
        self.next_slot_epoch = next_slot_epoch

    def limits(self) -> dict[str, tuple[float, float, float]]:
        return {}


def test_dashboards_see_totals_over_pools() -> None:
    metrics = Metrics()
    first, second = metrics.observer("main"), metrics.observer("europe", vendor="azure")
    live = {"main": Slot(3, 1_000.0), "europe": Slot(4, 900.0), "fresh": Slot(0, 0.0)}
    for pool, slot in live.items():
        metrics.watch(pool, slot)
    for observer in (first, second, second):
        observer.deferred(law.STAGGER)
        throttled = Attempt(
            0, "q", "p", "m", "u", "main", 1, 0, 0, 0, 1, 10, -1, -1, -1, Outcome.SLOW_DOWN, 429, "", -1
        )
        observer.attempted(throttled, Answer(Outcome.SLOW_DOWN), "")
    found = samples(metrics.text())
    assert found["contestra_openai_active_concurrency",] == 7
    assert found["contestra_openai_next_slot_epoch",] == 900.0, "the next launch anywhere"
    assert found["contestra_openai_stagger_delays_total",] == 3
    assert found["paceline_in_flight", "main"] == 3
    assert found["paceline_in_flight", "europe"] == 4
    assert found["paceline_deferrals_total", "stagger", "europe"] == 2
    assert found["contestra_llm_rate_limit_events_total", "openai"] == 1
    assert found["contestra_llm_rate_limit_events_total", "azure"] == 2
    assert found["paceline_tokens_total", "prompt", "main"] == 0, "unknown (-1) is not subtracted"


def test_the_next_slot_is_the_law_s() -> None:
    metrics = Metrics()

    async def main() -> None:
        governor = Governor(Policy().with_(stagger_seconds=10.0, jitter_ratio=0.0).params())
        metrics.watch("default", governor)
        async with governor.permit(1_000.0):
            expected = governor.zero_epoch + governor.s.last_launch_at + 10.0
            found = samples(metrics.text())
            assert found["contestra_openai_next_slot_epoch",] == pytest.approx(expected)
            assert found["contestra_openai_active_concurrency",] == 1.0
        assert samples(metrics.text())["contestra_openai_active_concurrency",] == 0.0

    run_virtual(main())


def limits_of(metrics: Metrics) -> dict[str, tuple[float, ...]]:
    found = samples(metrics.text())
    names = [key[1] for key in found if key[0] == "paceline_limit_used"]
    return {name: tuple(found[f"paceline_limit_{kind}", name, "default"] for kind in KINDS) for name in names}


def test_each_limited_dimension_has_its_gauges() -> None:
    """The guardrails' dimensions, those of a profile, and a limit that is sought."""
    shown: list[dict[str, tuple[float, ...]]] = []
    anthropic = quota_of(read_profile("anthropic"), {"ITPM": 30_000, "OTPM": 8_000})
    settings: dict[str, Any] = {"stagger_seconds": 0.0, "tpm_headroom": 0.15}

    async def main(policy: Policy) -> None:
        metrics = Metrics()
        governor = Governor(policy)
        metrics.watch("default", governor)
        async with governor.permit(1_000.0, prompt=600.0):
            shown.append(limits_of(metrics))

    run_virtual(main(Policy().with_(tpm_limit=30_000, **settings)))
    run_virtual(main(Policy().with_(**settings).with_quota(anthropic)))
    run_virtual(main(Policy().with_(find_limits="tokens", **settings)))
    assert shown[0] == {"TPM": (30_000.0, 25_500.0, 1_000.0)}
    assert shown[1]["ITPM"] == (30_000.0, 25_500.0, 600.0)
    assert shown[1]["OTPM"] == (8_000.0, 6_800.0, 400.0)
    limit, budget, used = shown[2]["TPM"]
    assert (limit, used) == (0.0, 1_000.0), "not found yet"
    assert budget > 0.0


def test_an_event_costs_the_same_however_many_went_before() -> None:
    observer = Metrics().observer()
    row = Attempt(0, "q", "p", "m", "u", "main", 1, 0, 0, 1, 2, 10, 9, 8, 7, Outcome.OK, 200, "", -1, waited_tpm_s=1.0)
    answer = Answer(Outcome.OK)

    def event() -> None:
        observer.attempted(row, answer, "")
        observer.ended(request, "", answer, 1.0)  # type: ignore[arg-type]

    event()
    second = lines_run(event)
    for _ in range(2_000):
        event()
    assert 0 < lines_run(event) <= second


def test_the_registry_is_our_own() -> None:
    before = set(REGISTRY._names_to_collectors)
    Metrics()
    Metrics()
    assert set(REGISTRY._names_to_collectors) == before


# ---------------------------------------------------------------- port and textfile


def test_serves_what_it_counts() -> None:
    metrics = Metrics()
    metrics.observer().deferred(law.STAGGER)
    with metrics.serve(0) as endpoint:
        with urlopen(endpoint.url, timeout=WAIT_S) as response:
            assert response.headers["content-type"].startswith("text/plain")
            text = response.read().decode()
        assert endpoint.url.startswith("http://127.0.0.1:")
        with pytest.raises(
            BadSetting, match=f"--metrics-port {endpoint.port} cannot be used on 127.0.0.1: .*name another"
        ):
            metrics.serve(endpoint.port)
    assert {name for name, *_ in samples(text)} >= DASHBOARD
    assert samples(text)["contestra_openai_stagger_delays_total",] == 1
    assert samples(text) == samples(metrics.text())
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", endpoint.port)) != 0, "closed"
    with pytest.raises(BadSetting, match="--metrics-port 99999"):
        metrics.serve(99_999)


def test_the_textfile_appears_whole(tmp_path: Path) -> None:
    metrics = Metrics()
    path = tmp_path / "paceline.prom"
    path.write_text("old")
    metrics.write_textfile(path)
    assert samples(path.read_text()) == samples(metrics.text())
    assert [each.name for each in tmp_path.iterdir()] == ["paceline.prom"], "nothing is left beside it"


def test_a_textfile_that_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "x.prom", tmp_path):
        with pytest.raises(BadInput, match="the metrics cannot be written") as caught:
            Metrics().write_textfile(path)
        assert str(caught.value).startswith(str(path))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the webhook


class Hook(http.server.BaseHTTPRequestHandler):
    """Keeps what is posted; the path says what to answer."""

    posts: list[tuple[str, dict[str, str], Any]]
    over: threading.Event  # the test, and so the patience of the slow one

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.posts.append((self.path, dict(self.headers.items()), json.loads(body)))
        if self.path == "/slow/secret":
            self.over.wait(WAIT_S)
        status = {"/fails/secret": 500, "/moved/secret": 302}.get(self.path, 200)
        self.send_response(status)
        if status == 302:
            self.send_header("location", "/elsewhere")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[tuple[str, list[Any]]]:
    posts: list[Any] = []
    over = threading.Event()
    handler = type("OneHook", (Hook,), {"posts": posts, "over": over})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", posts
        over.set()
        server.shutdown()
        thread.join()


def test_a_notice_arrives_as_json(hook: tuple[str, list[Any]]) -> None:
    url, posts = hook
    event = {"event": "finished", "failed": 3, "makespan_s": 61.5, "journal": Path("a.db")}
    notice = Notice(f"{url}/services/T0/secret", event)
    assert notice.wait()
    assert notice.error == ""
    ((path, headers, body),) = posts
    assert path == "/services/T0/secret"
    assert headers["Content-Type"] == "application/json"
    assert body == {**event, "journal": "a.db"}


@pytest.mark.parametrize(("path", "error"), [("fails", "status 500"), ("moved", "status 302")])
def test_a_refused_notice_says_so_to_whoever_waits_and_to_nobody_else(
    hook: tuple[str, list[Any]], caplog: pytest.LogCaptureFixture, path: str, error: str
) -> None:
    url, posts = hook
    notice = Notice(f"{url}/{path}/secret", {"event": "late"})
    assert not notice.wait()
    assert notice.error == error
    assert len(posts) == 1, "sent once, and not on to where it points"
    assert not caplog.records, "beside a log in JSON a line of another form would be in the way"


def test_a_slow_hook_keeps_nobody(hook: tuple[str, list[Any]]) -> None:
    """It answers when this test is over: neither the call nor the wait for it may last as long."""
    url, _ = hook
    notice = Notice(f"{url}/slow/secret", {"event": "stopped"}, timeout_s=0.2)
    assert not notice.wait()
    assert notice.error


def test_nobody_at_the_hook(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        notice = Notice(f"http://127.0.0.1:{taken.getsockname()[1]}/secret", {"event": "late"})
        assert not notice.wait()
    assert notice.error == "ConnectionRefusedError"
    assert "secret" not in caplog.text


@pytest.mark.parametrize("url", ["", "file:///etc/passwd", "hooks.example.com/secret", "http://", "http://[secret"])
def test_an_address_that_is_none_is_not_repeated(url: str) -> None:
    with pytest.raises(BadSetting, match="--notify is not an address: write https") as caught:
        checked_hook(url)
    assert "secret" not in str(caught.value)


def test_a_good_address() -> None:
    assert checked_hook("https://hooks.example.com/T0/B1") == "https://hooks.example.com/T0/B1"
