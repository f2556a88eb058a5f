"""What a notebook shows of a result: well-formed HTML that says what the tables say, with a figure in it."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest

from governor.forecast.summary import Summary
from governor.forecast.summary_html import SMALLEST, shares_of, summary_html
from sim import PlanResult, Scenario, SimulationResult, simulate
from sim.app.inputs import PlanOptions
from sim.experiment.results import Plan


class Page(HTMLParser):
    """Text and attributes of a page; every element that is opened is closed, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def widths(self) -> list[float]:
        return [float(a["width"] or 0) for tag, a in self.elements if tag == "rect" and a["fill"] != "none"]


@pytest.fixture(scope="module")
def result(sample_scenario: Scenario) -> SimulationResult:
    return simulate(sample_scenario)


def colours(png: bytes) -> int:
    pixels = matplotlib.image.imread(io.BytesIO(png))[::3, ::3, :3]
    return len(np.unique(pixels.reshape(-1, 3), axis=0))


def test_a_summary_shows_its_figures_and_its_waiting(result: SimulationResult) -> None:
    page = Page(result.summary._repr_html_())
    text = " ".join(page.texts)
    for figure in (f"{result.summary.attempts:,} attempts", f"{result.summary.charged_tokens:,} charged"):
        assert figure in text
    # The bars' lengths are the shares: of the time, and of the waiting.
    room = max(page.widths()) / max(share for _, share in shares_of(result.summary.waits_s))
    needed, *waited = page.widths()
    assert needed == pytest.approx(room * result.summary.bound_s / result.summary.makespan_s, abs=0.1)
    assert waited == pytest.approx([room * share for _, share in shares_of(result.summary.waits_s)], abs=0.2)


def test_shares_are_of_all_waiting_largest_first() -> None:
    shares = shares_of({"stagger": 30.0, "tpm": 60.0, "rpm": 0.0, "hold": 0.9 * SMALLEST * 90.0})
    assert [cause for cause, _ in shares] == ["tpm", "stagger"]
    assert shares[0][1] == pytest.approx(60.0 / (90.0 + 0.9 * SMALLEST * 90.0))
    assert shares_of({"stagger": 0.0}) == []


def test_a_summary_of_nothing_and_of_losses_is_shown_too(result: SimulationResult) -> None:
    nothing: Summary = dataclasses.replace(result.summary, makespan_s=0.0, bound_s=0.0, waits_s={}, failures={})
    assert "requests waited for nothing" in " ".join(Page(summary_html(nothing)).texts)
    lost = dataclasses.replace(result.summary, failed=3, efficiency=None, failures={"SOME_CODE": 3}, cost_usd=1.5)
    text = " ".join(Page(summary_html(lost)).texts)
    assert "SOME_CODE 3" in text
    assert "not quoted: requests were lost" in text
    assert "$1.50" in text
    assert len(repr(lost)) < 150


def test_results_show_their_tables_and_a_figure(
    result: SimulationResult, sample_plan: Plan, sample_scenario: Scenario
) -> None:
    several = simulate(sample_scenario, replications=2)
    found = PlanResult(sample_scenario, PlanOptions(), sample_plan)
    for shown, words in (
        (result, "shortest possible"),
        (several, "95 % interval of it"),
        (found, "guardrails only"),
    ):
        html = shown._repr_html_()
        page = Page(html)
        assert any(words in text for text in page.texts), words
        source = next(a["src"] for tag, a in page.elements if tag == "img")
        assert source is not None
        assert colours(base64.b64decode(source.removeprefix("data:image/png;base64,"))) > 20
    # What a reason says is text, whatever is in it.
    assert "&lt; &amp; &gt; matters" in found._repr_html_()


def test_a_scenario_says_where_it_comes_from(sample_scenario: Scenario) -> None:
    text = " ".join(Page(sample_scenario._repr_html_()).texts)
    assert re.search(r"assumed .*measured|measured .*assumed", text)
    assert "charge rule" in text


def test_a_figure_shows_itself_at_its_own_size(result: SimulationResult) -> None:
    png, size = result.figure("title")._repr_png_()  # type: ignore[attr-defined]
    assert size == {"width": 864.0, "height": 864.0}
    assert matplotlib.image.imread(io.BytesIO(png)).shape[1] > 864
