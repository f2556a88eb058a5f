"""The report: a sound page that needs nothing else, says what the plan found, and never more."""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from governor.model.errors import BadInput
from sim.base.words import duration, percent
from sim.experiment.results import Plan, Recommendation, estimate, forecast_of, paired_difference
from sim.reporting import report, report_text
from sim.scenario.scenario import Scenario
from sim.selection.batch_api import Terms, Way

COMMAND = "paceline plan 'my <batch> & co.jsonl' --finish-by 6 h --out out"
VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}
INLINE = {"wbr", "code", "strong", "span", "a"}


class Page(HTMLParser):
    """A strict reading: every element is closed in order; ids, references, attributes and visible text are kept."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._element(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._element(tag, attrs)

    def _element(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.words.append("" if tag in INLINE else " ")
        self.elements.append((tag, found))
        if "id" in found:
            self.ids.append(found["id"])
        for name in ("href", "xlink:href", "aria-labelledby"):
            if name in found:
                self.references.append(found[name].removeprefix("#"))
        self.references += re.findall(r"url\(#([^)]*)\)", " ".join(found.values()))

    def handle_endtag(self, tag: str) -> None:
        self.words.append("" if tag in INLINE else " ")
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> crosses another"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    def text(self) -> str:
        """What is read, with ordinary blanks."""
        return re.sub(r"\s+", " ", "".join(self.words))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def page_of(plan: Plan, scenario: Scenario, **more: Any) -> str:
    options = {
        "title": "Plan for <b>our</b> batch & others",
        "command": COMMAND,
        "grant": scenario.grant(),
        "provenance": scenario.provenance(),
        "version": "0.1.0",
    }
    return report.render(plan, **(options | more))


@pytest.fixture(scope="module")
def sample(sample_plan: Plan, sample_scenario: Scenario) -> str:
    return page_of(sample_plan, sample_scenario)


@pytest.fixture(scope="module")
def reckless(reckless_plan: Plan, sample_scenario: Scenario) -> str:
    return page_of(reckless_plan, sample_scenario)


def text_of(page: str) -> str:
    return Page(page).text()


# ---------------------------------------------------------------- a sound page


def test_the_page_is_well_formed_with_unique_ids_and_nothing_dangling(sample: str, reckless: str) -> None:
    for text in (sample, reckless):
        page = Page(text)
        repeated = [name for name, count in Counter(page.ids).items() if count > 1]
        assert not repeated
        missing = [name for name in page.references if name not in page.ids]
        assert not missing


def test_live_batch_and_mixes_stand_in_the_page_if_they_were_compared(
    sample_plan: Plan, sample_scenario: Scenario, sample: str
) -> None:
    ways = (
        Way("live", None, 1.0, 1.0, 120.0, 125.0, 0.41, 60, True),
        Way("batch", None, 0.0, 0.4, 40_000.0, math.inf, 0.2, 60),
        Way("auto", 43_200.0, 0.06, 1.0, 43_000.0, 43_100.0, 0.21, 60, True),
        Way("auto", 130.0, 1.0, 1.0, 120.0, 125.0, 0.41, 60, True),
    )
    page = page_of(sample_plan, sample_scenario, ways=report.ways_part(ways, Terms(0), 43_200.0, 0.95))
    read = Page(page)
    assert len(set(read.ids)) == len(read.ids)
    assert set(read.references) <= set(read.ids)
    assert "auto (6 % live) for $0.21" in read.text()
    drawn = page[page.index('id="ways"') : page.index('id="tried"')]
    assert drawn.count("<tr>") == 5
    # What is never done has no place on the axis, and of two ways at one place one is named.
    figure = drawn[: drawn.index("</svg>")]
    names = ("live", "batch", "auto, 12 h", "auto, 2 min 10 s")
    assert [name for name in names if f">{name}<" in figure] == ["live", "auto, 12 h"]
    assert 'id="ways"' not in sample


def test_the_page_needs_no_network(sample: str) -> None:
    page = Page(sample)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        for name in ("src", "href", "xlink:href", "srcset", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    css = re.sub(r'xmlns(:\w+)?="[^"]*"', "", sample)
    assert not re.search(r"@import|https?://", css)
    assert set(re.findall(r"url\((.)", css)) <= {"#"}


def test_the_page_is_small(sample: str, reckless: str) -> None:
    assert max(len(text.encode()) for text in (sample, reckless)) < 3_000_000


def test_the_same_plan_gives_the_same_page(sample_plan: Plan, sample_scenario: Scenario, sample: str) -> None:
    assert page_of(sample_plan, sample_scenario) == sample
    assert "2026-01-31" not in sample
    assert "2026-01-31" in page_of(sample_plan, sample_scenario, generated="2026-01-31")


def test_those_who_cannot_see_are_told(sample: str) -> None:
    page = Page(sample)
    assert page.elements[0] == ("html", {"lang": "en"})
    drawings = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(drawings) == 5
    assert all(a["role"] == "img" and len(a["aria-label"]) > 40 for a in drawings)
    assert page.count("figcaption") == page.count("figure") == len(drawings)
    heads = [attributes.get("scope") for tag, attributes in page.elements if tag == "th"]
    assert set(heads) == {"col", "row"}
    assert page.count("h1") == 1


def test_figures_follow_the_readers_theme(sample: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", sample, re.DOTALL))
    assert "var(--ink)" in drawings
    assert "#1b1e23" not in drawings
    # What is drawn on a coloured cell keeps its own ink.
    assert "fill: #ffffff" in drawings
    assert "prefers-color-scheme: dark" in sample
    assert "@media print" in sample


def test_what_users_typed_stays_text(sample: str) -> None:
    page = Page(sample)
    assert page.count("b") == 0
    assert "Plan for <b>our</b> batch & others" in page.text()
    # Character by character, so that it can be copied: no blank is exchanged.
    assert f"<code>{html.escape(COMMAND)}</code>" in sample.replace("&#39;", "&#x27;")
    assert "because time between two launches < & > matters" in page.text()


# ---------------------------------------------------------------- what it says


def test_the_headline_states_quantiles_intervals_and_the_paired_gain(sample_plan: Plan, sample: str) -> None:
    text = text_of(sample)
    for f in (sample_plan.now, sample_plan.guardrails.forecast, sample_plan.full.forecast):
        times = np.array([run["makespan_s"] for run in f.runs])
        assert f"{duration(np.quantile(times, 0.5, method='weibull'))} " in text
        assert f"{duration(np.quantile(times, 0.95, method='weibull'))} " in text
        efficiency = np.mean([run["efficiency"] for run in f.runs])
        assert percent(float(efficiency)) in text
    now, best = (np.array([run["makespan_s"] for run in f.runs]) for f in (sample_plan.now, sample_plan.full.forecast))
    gain = float((now - best).mean())
    assert f"{duration(gain)} ({percent(gain / now.mean())})" in text
    assert f"{percent(gain / now.mean())} sooner" in text


def test_no_loss_seen_has_its_upper_limit(sample_plan: Plan, sample: str) -> None:
    """Clopper and Pearson by hand: 1 - 0.05^(1/n), rounded up to two digits."""
    n = sample_plan.full.forecast.trials
    limit = 100.0 * (1.0 - 0.05 ** (1.0 / n))
    shown = re.search(rf"0 of {n:,} below ([\d.]+) % at 95 % confidence", text_of(sample))
    assert shown is not None
    assert limit <= float(shown[1]) < 1.03 * limit


def test_a_policy_that_loses_requests_quotes_no_efficiency(reckless_plan: Plan, reckless: str) -> None:
    text = text_of(reckless)
    assert "not quoted because requests were lost" in text
    assert f"✕ {reckless_plan.now.lost:,} of {reckless_plan.now.trials:,}" in text
    assert f"▲ {round(reckless_plan.now['throttled_per_100'].mean)}" in text
    assert "requests lost" in text


def test_the_price_of_keeping_the_limits_is_said(reckless_plan: Plan, reckless: str) -> None:
    assert reckless_plan.full.gain_s.mean < 0.0
    assert "later, the price of keeping the limits, which today's settings break" in text_of(reckless)


def test_inputs_are_labelled_in_the_headline_and_below(
    sample_plan: Plan, sample_scenario: Scenario, sample: str
) -> None:
    text = text_of(sample)
    head = text[: text.index("What to change")]
    for name, (_, source) in sample_scenario.provenance().items():
        assert name in head
        assert source in text
    more = page_of(
        sample_plan, sample_scenario, provider_text=[("weather", "sunny", "assumed"), ("clock", "UTC", "measured")]
    )
    assert "weather assumed sunny" in text_of(more)
    assert "clock measured UTC" in text_of(more)
    assert report._inputs({}, {"weather": ("assumed", "sunny")}) == report._inputs(
        {}, [("weather", "sunny", "assumed")]
    )


def test_noise_and_ignorance_are_shown_apart(sample_plan: Plan, sample: str) -> None:
    text = text_of(sample)
    noise = text[text.index("Simulation noise") : text.index("What is not known")]
    unknown = text[text.index("What is not known") : text.index("From where, or how")]
    assert "narrows with replications" in noise
    assert "does not narrow" in unknown
    e = sample_plan.full.forecast["makespan_s"]
    assert f"mean finish time {duration(e.mean)} ± {duration((e.high - e.low) / 2)}" in noise
    worst = max(sample_plan.stress, key=lambda row: row.forecasts["recommended"]["makespan_s"].mean)
    assert f"{duration(worst.forecasts['recommended']['makespan_s'].mean)} ({worst.name})" in unknown
    assert "output tokens" in unknown


def test_the_number_of_validations_is_stated(sample_plan: Plan, sample_scenario: Scenario, sample: str) -> None:
    assert "Validated against live runs: never yet." in text_of(sample)
    twice = page_of(sample_plan, sample_scenario, validated="2 times, error 3 %")
    assert "Validated against live runs: 2 times, error 3 %." in text_of(twice)


def test_every_change_stands_with_old_new_gain_and_reason(sample_plan: Plan, sample: str) -> None:
    text = text_of(sample)
    for found in (sample_plan.full, sample_plan.guardrails):
        for step in found.steps:
            assert step.reason in text
            assert step.env in text
    assert "OPENAI_CHARGE_RULE fixed → auto" in text
    assert "OPENAI_STAGGER_SECONDS 15 → 0 s" in text
    assert "under 'x' it draws 9 per 100" in text


def test_what_to_find_out_first_and_the_price_of_robustness(sample_plan: Plan, sample: str) -> None:
    text = text_of(sample)
    assert (
        "Knowing the charge rule is worth 3 min 40 s (3 min to 4 min 20 s) and brings the promise down by 1 min 30 s "
        "(1 min 10 s to 1 min 50 s); paceline probe costs up to $0.02 and takes 4 to 7 min."
    ) in text
    assert (
        "Knowing how long the answers are brings the promise down by 40 s (20 s to 1 min); --outputs-from reads it "
        "from the results of earlier requests at no cost, or from the first 100 of these in about 1 min 20 s, for "
        "$0.31 of what the batch costs anyway."
    ) in text
    assert "<code>paceline probe</code>" in sample
    (passed,) = sample_plan.full.passed_over
    assert f"Robustness costs {duration(passed.price_s.mean)} (" in text
    assert "but under 'x' it draws 9 per 100." in text
    nothing = page_of(dataclasses.replace(sample_plan, find_out=()), _scenario(sample_plan))
    assert "What to find out first" not in nothing


def test_the_stress_table_marks_broken_limits_by_symbol_and_class(reckless_plan: Plan, reckless: str) -> None:
    text = text_of(reckless)
    table = text[text.index("the published estimate, ") : text.index("How sure this is")]
    rows = len(reckless_plan.stress) + 1
    lost = sum(f.lost > 0 for row in reckless_plan.stress for f in row.forecasts.values())
    over = sum(
        f.lost == 0 and f["throttled_per_100"].mean > 1.0
        for row in reckless_plan.stress
        for f in row.forecasts.values()
    )
    assert table.count("✕") == lost + 1  # and today's settings as assumed
    assert table.count("▲") == over
    assert table.count("limits kept") == table.count("✓") == 4 * rows - lost - 1 - over
    assert reckless.count('<td class="lost"') >= lost
    notes = [("charge rule max_of", "left out: too large")]
    assert "charge rule max_of: left out: too large." in text_of(
        page_of(reckless_plan, _scenario(reckless_plan), stress_notes=notes)
    )


def _scenario(plan: Plan) -> Any:
    """What `page_of` needs of a scenario, without one."""
    from governor.forecast.summary import Grant

    class Bare:
        def grant(self) -> Grant:
            return Grant(tpm_limit=30_000.0)

        def provenance(self) -> dict[str, tuple[str, str]]:
            return {}

    assert plan.seed >= 0
    return Bare()


# ---------------------------------------------------------------- other outcomes


def test_settings_that_are_good_already(sample_plan: Plan) -> None:
    now = sample_plan.now
    same = Recommendation(now, (), paired_difference(now, now, "makespan_s"))
    plan = dataclasses.replace(sample_plan, guardrails=same, full=same, already_good=True, find_out=())
    text = text_of(page_of(plan, _scenario(plan)))
    assert "Nothing needs to change" in text
    assert "sooner" not in text
    assert text.count("These are today's settings: nothing that was tried is better.") == 2


def test_limits_that_cannot_be_kept_and_a_wish_that_is_missed(sample_plan: Plan) -> None:
    limits = {**sample_plan.limits, "finish_by_s": 60.0}
    plan = dataclasses.replace(sample_plan, broken=("3 of 720 requests are lost, allowed: 0",), limits=limits)
    text = text_of(page_of(plan, _scenario(plan)))
    assert "Limits that these recommendations do not keep" in text
    assert "3 of 720 requests are lost, allowed: 0" in text
    # What decides is the upper limit of the 95th percentile, and six runs have none.
    assert "6 runs cannot say whether 19 of 20 are done within the wanted 1 min" in text
    f = plan.full.forecast
    several = dataclasses.replace(plan.full, forecast=forecast_of(f.policy, f.runs * 20))
    plan = dataclasses.replace(plan, full=several)
    assert "which misses the wanted 1 min" in report_text.answer(plan)[-1]
    kept = dataclasses.replace(plan, limits={**limits, "finish_by_s": 3_600.0})
    assert "which keeps the wanted 1 h" in report_text.answer(kept)[-1]


def test_latency_as_the_objective(sample_plan: Plan) -> None:
    now, best = sample_plan.now, sample_plan.full.forecast
    full = dataclasses.replace(sample_plan.full, gain_s=paired_difference(now, best, "latency_p95_s"))
    plan = dataclasses.replace(sample_plan, objective="p95_latency", full=full)
    text = text_of(page_of(plan, _scenario(plan)))
    assert "Latency, P95" in text
    assert f"19 of 20 are answered within {duration(best['latency_p95_s'].mean)}" in text
    assert "faster" in text


def test_a_single_run_claims_no_interval(sample_plan: Plan) -> None:
    def one(found: Recommendation) -> Recommendation:
        f = forecast_of(found.policy, found.forecast.runs[:1])
        return dataclasses.replace(found, forecast=f, gain_s=estimate([found.gain_s.mean]))

    now = forecast_of(sample_plan.now.policy, sample_plan.now.runs[:1])
    plan = dataclasses.replace(sample_plan, now=now, guardrails=one(sample_plan.guardrails), full=one(sample_plan.full))
    text = text_of(page_of(plan, _scenario(plan)))
    assert "one run: no interval" in text
    assert "±" not in text


def test_a_plan_with_little_evidence_still_makes_a_page(sample_plan: Plan) -> None:
    now = sample_plan.now
    nothing = dataclasses.replace(now, waits_s=dict.fromkeys(now.waits_s, 0.0))
    plan = dataclasses.replace(sample_plan, now=nothing, points=(), stress=(), heats=(), timelines={})
    page = Page(page_of(plan, _scenario(plan)))
    assert "Today no request waits." in page.text()
    assert "No other conditions were simulated." in page.text()
    assert page.count("svg") == 3


def test_a_run_that_completes_nothing_is_not_known_rather_than_nan(reckless_plan: Plan) -> None:
    def hopeless(run: Any) -> Any:
        values = {**run.values, "efficiency": math.nan, "latency_p95_s": math.nan, "failed": float(run.requests)}
        return dataclasses.replace(run, completed=0, values=values)

    now = forecast_of(reckless_plan.now.policy, [hopeless(run) for run in reckless_plan.now.runs])
    plan = dataclasses.replace(reckless_plan, now=now, objective="p95_latency")
    text = text_of(page_of(plan, _scenario(plan)))
    assert not re.search(r"\b(nan|inf|None)\b", text)
    assert "a gain that cannot be stated" in text
    assert f"✕ {now.trials:,} of {now.trials:,}" in text


def test_writing_is_whole_or_not_at_all(sample_plan: Plan, sample_scenario: Scenario, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **{"title": "t", "command": "c", "grant": sample_scenario.grant(), "provenance": {}, "version": "1"},
    }
    report.write(tmp_path / "report.html", sample_plan, **options)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.render(sample_plan, **options)
    with pytest.raises(BadInput, match="there is no folder"):
        report.write(tmp_path / "none" / "report.html", sample_plan, **options)
    with pytest.raises(KeyError):
        report.write(tmp_path / "other.html", dataclasses.replace(sample_plan, objective="fame"), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
