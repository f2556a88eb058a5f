"""The page in a real browser, end to end: a batch is started, watched, asked "what if" about, and its pace changed.

The service is a process of its own in front of the synthetic provider; the browser is the system's Chromium. Pictures
are left under `out/page/`. Where there is no Chromium these tests skip, but on CI, which installs it, they fail.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from tests.conftest import ROOT
from tests.live import WAIT_S, provider, shared_cli
from tests.services import Served, lines, serving, until

WAIT_MS = 1_000.0 * WAIT_S
ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# A loaded machine may take its time.
expect.set_options(timeout=WAIT_MS)
PICTURES = ROOT / "out" / "page"
PACE = {"OPENAI_STAGGER_SECONDS": "1.5", "OPENAI_TPM_LIMIT": "30000", "OPENAI_MAX_CONCURRENCY": "3"}
COUNT = 60
# With 1.5 s and more between two launches the batch cannot be over before this.
SLOW_S = 1.2 * (COUNT - 1)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    latency = {"first_token_s": 0.4, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0}
    folder = tmp_path_factory.mktemp("page")
    with provider(latency=latency) as llm, serving(shared_cli(), folder, llm.base_url, env=PACE) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        reason = "no Chromium on the path: apt-get install chromium"
        pytest.fail(reason, pytrace=False) if os.environ.get("CI") else pytest.skip(reason)
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=path, args=list(ARGS))
        yield made
        made.close()


class Watched:
    """A page that must say nothing on the console, break no policy, and ask nobody but the service."""

    def __init__(self, browser: Browser, served: Served, **context: Any) -> None:
        self.url = str(served.client.base_url).rstrip("/")
        self.context = browser.new_context(viewport={"width": 1200, "height": 900}, **context)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.faults: list[str] = []
        self.asked: list[str] = []
        self.page.on(
            "console", lambda said: self.faults.append(said.text) if said.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def picture(self, name: str) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=PICTURES / f"{name}.png", full_page=True)

    def close(self) -> None:
        self.context.close()
        assert not self.faults, self.faults
        elsewhere = [url for url in self.asked if not url.startswith(f"{self.url}/")]
        assert not elsewhere, elsewhere


@pytest.fixture
def watched(browser: Browser, served: Served) -> Iterator[Watched]:
    made = Watched(browser, served)
    yield made
    made.close()


def set_slider(page: Page, label: str, value: str) -> None:
    """Moves a slider as a keyboard or a mouse does: a value and an input event."""
    page.get_by_label(label, exact=True).fill(value)


def wide(page: Page) -> float:
    """By how many pixels the page is wider than its window."""
    return float(page.evaluate("document.documentElement.scrollWidth - innerWidth"))


def test_a_batch_is_started_watched_asked_about_and_its_pace_changed(
    served: Served, watched: Watched, tmp_path: Path
) -> None:
    page = watched.page
    file = tmp_path / "batch.jsonl"
    file.write_bytes(lines(COUNT))
    page.goto(f"{watched.url}/")
    expect(page.locator("#connection")).to_have_text("Connected")
    page.get_by_label("Start a batch from a JSONL file").set_input_files(file)
    page.get_by_label("Name").fill("Monday's <greetings>")
    page.get_by_role("button", name="Start it").click()
    expect(page.locator("#batch-said")).to_contain_text(f"Started: {COUNT} requests")
    (batch,) = served.get("/batches")["batches"]
    batch_id = batch["batch_id"]
    row = page.locator("#batches tbody tr")
    expect(row).to_have_count(1)
    assert batch["name"] == "Monday's <greetings>"
    expect(row.locator("th")).to_have_text(f"Monday's <greetings>…{batch_id[-6:]}")
    assert served.client.get(f"/batches/{batch_id}").json()["name"] == batch["name"]

    # Watched: what the page says is what the service says.
    expect(page.locator("#queue")).to_contain_text("wait for the stagger")
    until("an answer", lambda: served.get(f"/batches/{batch_id}")["done"] >= 2)
    expect(row.locator("[data-is=done]")).to_have_text(re.compile(rf"^([2-9]|\d\d) of {COUNT}$"))
    expect(row.locator("[data-is=eta]")).to_have_text(re.compile(r"\d+ (s|min)"))
    expect(page.locator("#tokens-gauge")).to_have_attribute("aria-valuemax", "30000")
    expect(page.locator("#slots")).to_have_text(re.compile(r"^\d of 3$"))
    expect(page.locator("#pace canvas")).to_be_visible()

    # Steered, by keyboard alone.
    row.get_by_role("button", name=f"Pause {batch_id}").press("Enter")
    expect(row.locator("[data-is=state]")).to_have_text("paused")
    assert served.get(f"/batches/{batch_id}")["state"] == "paused"
    row.get_by_role("button", name=f"Resume {batch_id}").press("Enter")
    expect(row.locator("[data-is=state]")).to_have_text("running")
    watched.picture("live-light")

    # What if: figures and headline follow, today's beside them.
    row.get_by_role("link", name=f"What if, for {batch_id}").click()
    headline = page.locator("#headline")
    expect(headline).to_contain_text("as with today’s settings")
    expect(page.get_by_role("button", name="Apply…")).to_be_disabled()
    set_slider(page, "Stagger, s", "0")
    set_slider(page, "Concurrency, requests", "12")
    page.get_by_label("Charge rule").select_option("fixed")
    set_slider(page, "Estimate, tokens a request", "200")
    expect(headline).to_contain_text("times as fast as today’s")
    changed = {"OPENAI_STAGGER_SECONDS": 0, "OPENAI_MAX_CONCURRENCY": 12}
    changed |= {"OPENAI_CHARGE_RULE": "fixed", "OPENAI_EST_TOKENS_PER_RUN": 200}
    asked = {"batch_id": batch_id, "settings": changed}
    told = served.post("/what-if", asked)
    assert told["proposed"]["finish_s"]["p50"] < told["today"]["finish_s"]["p50"] / 3
    watched.picture("what-if-light")

    # The link shows the same again.
    link = page.url
    other = watched.context.new_page()
    other.goto(link)
    expect(other.locator("#headline")).to_contain_text("times as fast as today’s")
    expect(other.get_by_label("Stagger, s", exact=True)).to_have_value("0")
    expect(other.get_by_label("Concurrency, requests", exact=True)).to_have_value("12")
    other.close()

    # Applied, after the difference was shown; Escape leaves everything as it is.
    page.get_by_role("button", name="Apply…").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("tbody tr")).to_have_text(
        ["Charge ruleautofixed", "Estimate, tokens a request7000200", "Stagger, s1.50", "Concurrency, requests312"]
    )
    watched.picture("apply")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert served.get("/settings")["settings"]["OPENAI_STAGGER_SECONDS"] == 1.5
    page.get_by_role("button", name="Apply…").click()
    dialog.get_by_role("button", name="Apply", exact=True).click()
    expect(page.locator("#what-if-said")).to_contain_text(
        "Applied: charge rule fixed, estimate 200, stagger 0, concurrency 12"
    )
    found = served.get("/settings")
    assert (found["settings"]["OPENAI_STAGGER_SECONDS"], found["settings"]["OPENAI_MAX_CONCURRENCY"]) == (0, 12)
    assert set(found["changes"][0]["changes"]) == set(changed)

    # The pace has changed: at the old one the batch could not be over yet.
    page.get_by_role("link", name="Live", exact=True).click()
    assert served.over(batch_id)["done"] == COUNT
    ended = until("the time of its end", lambda: (found := served.get(f"/batches/{batch_id}"))["ended_at"] and found)
    assert ended["ended_at"] - ended["created_at"] < SLOW_S
    expect(row.locator("[data-is=state]")).to_have_text("completed")
    expect(row.get_by_role("button")).to_have_count(0)
    with page.expect_download() as loaded:
        row.get_by_role("link", name=f"results of {batch_id}").click()
    assert len(loaded.value.path().read_text().splitlines()) == COUNT
    expect(row.get_by_role("link", name="errors of")).to_be_hidden()


def test_a_batch_is_cancelled_after_a_question_alone(served: Served, watched: Watched) -> None:
    page = watched.page
    batch_id = served.batch(10 * COUNT, prefix="cancelled")
    page.goto(f"{watched.url}/")
    button = page.get_by_role("button", name=f"Cancel {batch_id}")
    button.click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("button", name="Leave it as it is")).to_be_focused()
    page.keyboard.press("Escape")
    expect(button).to_be_focused()
    assert served.get(f"/batches/{batch_id}")["state"] == "running"
    button.click()
    dialog.get_by_role("button", name="Cancel the batch").click()
    assert served.over(batch_id)["state"] == "cancelled"
    expect(page.locator("#batches tbody tr").first.locator("[data-is=state]")).to_have_text("cancelled")


def test_the_latest_settings_have_the_last_word(served: Served, watched: Watched) -> None:
    page = watched.page
    asked: list[float] = []

    def late(route: Route) -> None:
        asked.append(route.request.post_data_json["settings"]["OPENAI_STAGGER_SECONDS"])
        if len(asked) == 1:
            # While the first question is held, the slider moves on.
            for value in ("3", "5", "7"):
                page.evaluate(
                    "([id, value]) => { const it = document.getElementById(id); it.value = value;"
                    " it.dispatchEvent(new Event('input', { bubbles: true })); }",
                    ["knob-stagger", value],
                )
            page.wait_for_timeout(200)
        route.continue_()

    page.route("**/what-if", late)
    page.goto(f"{watched.url}/#what-if?shape=20x100x100&stagger=2")
    expect(page).to_have_url(re.compile("stagger=7"))
    until("the last question", lambda: asked[-1] == 7.0 or page.wait_for_timeout(20))
    assert asked == [2.0, 7.0]
    told = served.post(
        "/what-if",
        {
            "shape": {"requests": 20, "prompt_tokens": 100, "max_output_tokens": 100},
            "settings": {"OPENAI_STAGGER_SECONDS": 7.0},
        },
    )
    least_s = told["proposed"]["finish_s"]["p50"]
    assert least_s > 0.7 * 19 * 7.0
    expect(page.locator("#headline")).to_contain_text(re.compile(r"Done in [12] min"))


def test_dark_and_at_phone_width_nothing_overflows(browser: Browser, served: Served) -> None:
    served.over(served.batch(5, prefix="done"))
    watched = Watched(browser, served, color_scheme="dark")
    page = watched.page
    for name, width in (("dark", 1200), ("phone", 375)):
        page.set_viewport_size({"width": width, "height": 800})
        page.goto(f"{watched.url}/#live")
        expect(page.locator("#batches tbody tr").first).to_be_visible()
        expect(page.locator("#pace canvas")).to_be_visible()
        assert wide(page) <= 0.0
        watched.picture(f"live-{name}")
        page.goto(f"{watched.url}/#what-if?shape=200x1000x500&stagger=2&headroom=5&concurrency=8&window=bucket")
        expect(page.locator("#headline")).to_contain_text("Done in")
        assert page.locator("#knob-window").input_value() == "bucket"
        assert wide(page) <= 0.0
        watched.picture(f"what-if-{name}")
    watched.close()


def test_a_chart_that_is_not_drawn_anew_yet_widens_nothing(served: Served, watched: Watched) -> None:
    """Between a turn of the phone and the next drawing the canvas is as wide as before."""
    served.over(served.batch(5, prefix="done"))
    page = watched.page
    page.goto(f"{watched.url}/#live")
    expect(page.locator("#pace canvas")).to_be_visible()
    page.evaluate("requestAnimationFrame = () => 0")
    page.set_viewport_size({"width": 375, "height": 800})
    box = page.locator("#pace canvas").bounding_box()
    assert box
    assert box["width"] > 375.0
    assert wide(page) <= 0.0


def test_errors_are_said_in_words(served: Served, watched: Watched, tmp_path: Path) -> None:
    page = watched.page
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("{not json}\n")
    page.goto(f"{watched.url}/")
    page.get_by_label("Start a batch from a JSONL file").set_input_files(wrong)
    page.get_by_role("button", name="Start it").click()
    expect(page.locator("#batch-said")).to_contain_text("Not started: batch:1: not JSON")
    page.goto(f"{watched.url}/#what-if?batch=batch_0000")
    expect(page.locator("#what-if-trouble")).to_have_text("there is no batch 'batch_0000'")
    page.get_by_label("Batch", exact=True).select_option("file")
    page.locator("#what-if-file").set_input_files(wrong)
    expect(page.locator("#what-if-trouble")).to_have_text("Line 1 of the file is not JSON.")
    right = tmp_path / "right.jsonl"
    right.write_bytes(lines(20))
    page.locator("#what-if-file").set_input_files(right)
    expect(page.locator("#what-if-note")).to_contain_text("20 requests")
    expect(page.locator("#what-if-trouble")).to_be_hidden()
    # The browser itself reports each answer from 400 on.
    watched.faults = [each for each in watched.faults if "Failed to load resource" not in each]


def test_a_batch_goes_by_the_batch_api_and_its_waves_are_shown(browser: Browser, tmp_path: Path) -> None:
    slow = {"queue_tokens": 0, "turnaround_s": [80_000.0, 80_001.0]}
    file = tmp_path / "batch.jsonl"
    file.write_bytes(lines(COUNT))
    env = {"OPENAI_BATCH_QUEUE_TOKENS": "1000"}
    with (
        provider(time_scale=200.0, batch_api=slow, stated_time="provider") as llm,
        serving(shared_cli(), tmp_path, llm.base_url, "--time-scale", 200, env=env) as served,
    ):
        watched = Watched(browser, served)
        page = watched.page
        page.goto(f"{watched.url}/")
        page.get_by_label("Start a batch from a JSONL file").set_input_files(file)
        expect(page.get_by_label("Done by")).to_be_hidden()
        page.get_by_label("Sent by", exact=True).select_option("auto")
        expect(page.get_by_label("Done by")).to_be_visible()
        page.get_by_label("Sent by", exact=True).select_option("batch")
        page.get_by_role("button", name="Start it").click()
        expect(page.locator("#batch-said")).to_contain_text(f"Started: {COUNT} requests, forecast to take")
        row = page.locator("#batches tbody tr")
        expect(row.locator("th")).to_contain_text("Batch API")
        expect(row.locator("summary")).to_have_text(re.compile(r"^\d+ waves?, \d+ open$"))
        row.locator("summary").click()
        expect(row.locator("li").last).to_have_text(re.compile(r"^1: \d+ requests to gpt-4o-mini, in progress: 0 of"))
        watched.picture("waves-light")
        page.set_viewport_size({"width": 375, "height": 800})
        assert wide(page) <= 0
        watched.picture("waves-phone")
        page.emulate_media(color_scheme="dark")
        row.get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("dialog")).to_contain_text("Waves at the provider are cancelled")
        page.get_by_role("dialog").get_by_role("button", name="Cancel the batch").click()
        expect(row.locator("[data-is=state]")).to_have_text("cancelled")
        expect(row.locator("li").last).to_contain_text("cancelled")
        watched.picture("waves-phone-dark")
        watched.close()


def test_the_page_comes_with_a_strict_policy_and_names_nobody_else(served: Served) -> None:
    for path in ("/", "/static/page.js", "/static/page.css", "/static/vendor/uPlot.iife.min.js"):
        answer = served.client.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy
        assert "http" not in policy
    for name, words in (("uPlot", "The MIT License"), ("swagger-ui", "Apache License")):
        assert words in served.client.get(f"/static/vendor/{name}-LICENSE.txt").text
    assert served.client.get("/static/../app.py").status_code == 404


def test_the_interface_is_described_without_anybody_else(served: Served, watched: Watched) -> None:
    page = watched.page
    page.goto(f"{watched.url}/docs")
    posting = page.locator("#operations-batches-post_batch_batches_post")
    posting.get_by_role("button").first.click()
    expect(posting).to_contain_text("Run a batch of raw lines")
    expect(posting).to_contain_text("Idempotency-Key")
    watched.picture("docs")
    assert served.client.get("/redoc").status_code == 404


def test_a_token_is_asked_for_and_kept_for_the_tab_alone(browser: Browser, tmp_path: Path) -> None:
    cli = shared_cli()
    made = cli.run("token", "add", "page", "--scope", "read", "--database", tmp_path / "service.db")
    secret = re.search(r"pcl_\S+", made.out)
    assert secret is not None, made
    headers = {"Authorization": f"Bearer {secret[0]}"}
    with provider() as llm, serving(cli, tmp_path, llm.base_url, "--require-token", headers=headers) as served:
        watched = Watched(browser, served)
        page = watched.page
        page.goto(f"{watched.url}/")
        expect(page.locator("#trouble")).to_contain_text("a bearer token is needed")
        page.get_by_label("Bearer token").fill(secret[0])
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#connection")).to_have_text("Connected")
        assert json.loads(page.evaluate("JSON.stringify([Object.keys(localStorage), document.cookie])")) == [[], ""]
        # It may read alone, and is told so.
        page.get_by_role("link", name="What if", exact=True).click()
        page.get_by_label("Batch", exact=True).select_option("shape")
        expect(page.locator("#headline")).to_contain_text("Done in")
        set_slider(page, "Stagger, s", "3")
        page.get_by_role("button", name="Apply…").click()
        page.get_by_role("dialog").get_by_role("button", name="Apply", exact=True).click()
        expect(page.locator("#what-if-said")).to_contain_text("has scope read, this needs admin")
        watched.faults = [each for each in watched.faults if "Failed to load resource" not in each]
        watched.close()
