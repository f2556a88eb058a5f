"""Figures show what they are given, the same way each time, readably, and touch no global state."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations

import matplotlib
import numpy as np
import pytest
from matplotlib.backend_bases import RendererBase
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from governor.forecast.summary import Grant
from governor.model.requests import CAUSES, Attempt, Outcome
from sim.base import palette, style
from sim.base.words import duration
from sim.experiment.results import Heat, Plan, Point
from sim.reporting import figures, figures_time
from sim.reporting.report_text import policies_of
from sim.reporting.series import HEAD_CAUSES

Draw = Callable[[Plan], Figure]
GRANT = Grant(tpm_limit=30_000.0, rpm_limit=500.0)

DRAWN: dict[str, Draw] = {
    "waits": lambda plan: figures.waits(policies_of(plan)),
    "heat": lambda plan: figures.heat(plan.heats[0]),
    "front": lambda plan: figures.front(plan.points, policies_of(plan)),
    "stress": lambda plan: figures.stress(plan.stress, policies_of(plan)),
    "over_time": lambda plan: figures_time.over_time(plan.timelines, GRANT),
    "timeline": lambda plan: figures_time.timeline(plan.timelines["now"], GRANT, title="one run"),
}


def texts(figure: Figure) -> list[str]:
    """What the reader can read, in no order."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", style.svg_of(figure))


@pytest.fixture(scope="module", params=["sample_plan", "reckless_plan"])
def plan(request: pytest.FixtureRequest) -> Plan:
    found: Plan = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module", params=DRAWN)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def drawn(plan: Plan, name: str) -> Figure:
    """Each figure of each plan, drawn once."""
    return DRAWN[name](plan)


def test_the_same_values_give_the_same_bytes_whatever_a_users_matplotlibrc_says(
    plan: Plan, name: str, drawn: Figure
) -> None:
    with matplotlib.rc_context({"font.size": 30.0, "axes.facecolor": "red", "savefig.dpi": 40, "axes.grid": True}):
        before = dict(matplotlib.rcParams)
        again = DRAWN[name](plan)
        svg = style.svg_of(again)
        assert dict(matplotlib.rcParams) == before
    assert svg == style.svg_of(drawn)


def test_a_picture_is_the_same_bytes_each_time(sample_plan: Plan) -> None:
    assert style.png_of(DRAWN["waits"](sample_plan)) == style.png_of(DRAWN["waits"](sample_plan))


def test_pyplot_and_its_global_figures_are_never_loaded() -> None:
    code = (
        "import sys, sim.reporting.figures, sim.reporting.figures_time, sim.reporting.report\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_no_text_covers_another_or_leaves_the_figure(drawn: Figure, monkeypatch: pytest.MonkeyPatch) -> None:
    no_overlaps(drawn, monkeypatch)


def no_overlaps(drawn: Figure, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tick labels beyond the limits of an axis exist as well; only what is drawn can be in the way.
    seen: dict[int, tuple[str, Bbox]] = {}
    draw = Text.draw

    def noted(self: Text, renderer: RendererBase) -> None:
        draw(self, renderer)
        if self.get_text().strip() and self.get_visible():
            seen[id(self)] = self.get_text(), self.get_window_extent(renderer)

    monkeypatch.setattr(Text, "draw", noted)
    drawn.draw_without_rendering()
    boxes = list(seen.values())
    assert len(boxes) > 5
    width, height = drawn.bbox.size
    for text, box in boxes:
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -1.0, f"{text!r} leaves the figure"
    for (a, left), (b, right) in combinations(boxes, 2):
        across = min(left.x1, right.x1) - max(left.x0, right.x0)
        along = min(left.y1, right.y1) - max(left.y0, right.y0)
        assert across <= 1.0 or along <= 2.0, f"{a!r} covers {b!r}"


def test_the_palette_can_be_told_apart_by_the_colour_blind() -> None:
    """In lightness alone (CIE L*), the policies that are drawn together differ; markers and hatches do too."""

    def lightness(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        y = float(np.dot((0.2126, 0.7152, 0.0722), linear))
        return 116.0 * float(np.cbrt(y)) - 16.0

    three = [palette.STYLES[who] for who in ("now", "recommended")]
    assert abs(lightness(three[0].colour) - lightness(three[1].colour)) > 15.0
    for field in ("colour", "marker", "hatch", "label"):
        assert len({getattr(s, field) for s in palette.STYLES.values()}) == len(palette.STYLES)
    # The theme's neutral colours occur nowhere else: the report exchanges them by value.
    used = {to_hex(colour) for colour in [*(s.colour for s in palette.STYLES.values())]}
    assert not used & {palette.INK, palette.MUTED, palette.GRID, palette.SURFACE}


def test_a_timeline_with_every_cause_has_room_for_all_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    known = dict.fromkeys(("custom_id", "pool", "model", "url", "error_code"), "") | {"lane": "main", "attempt": 1}
    known |= {"reserved_tokens": 9, "charged_tokens": 9, "prompt_tokens": 5, "output_tokens": 4, "status": 200}
    rows = []
    for i, cause in enumerate(HEAD_CAUSES):
        waits = {f"waited_{each}_s": 10.0 for each in HEAD_CAUSES[: i + 1]}
        times = {"submitted_s": 0.0, "eligible_s": 0.0, "launched_s": 10.0 * (i + 1), "finished_s": 10.0 * (i + 1) + 5}
        rows.append(Attempt(request=i, outcome=Outcome.OK, retry_after_s=-1.0, **known, **times, **waits))  # type: ignore[arg-type]
        assert cause in palette.CAUSE_LABELS
    figure = figures_time.timeline(rows, GRANT)
    assert {palette.CAUSE_LABELS[cause][0] for cause in HEAD_CAUSES} <= set(texts(figure))
    no_overlaps(figure, monkeypatch)


def test_every_cause_has_a_name_and_a_look() -> None:
    assert set(palette.CAUSE_LABELS) == set(CAUSES[1:])
    assert set(HEAD_CAUSES) <= set(figures_time._HATCHES)


# ---------------------------------------------------------------- what is in them


def test_waits_show_each_cause_that_occurs_with_its_mean(sample_plan: Plan) -> None:
    found = texts(DRAWN["waits"](sample_plan))
    for f in (sample_plan.now, sample_plan.full.forecast):
        for cause in ("stagger", "tpm"):
            mean_s = f.waits_s[cause] / f.requests
            assert (duration(mean_s) if mean_s > 0.05 else "0 s") in found
    assert "the next launch slot" in found
    assert "the budget of the day" not in found


def test_no_waits_at_all_are_said_in_words(sample_plan: Plan) -> None:
    still = dataclasses.replace(sample_plan.now, waits_s=dict.fromkeys(sample_plan.now.waits_s, 0.0))
    assert "No request waited for anything." in texts(figures.waits({"now": still}))


def test_a_map_has_a_number_per_cell_and_marks_what_breaks_limits() -> None:
    objective = np.array([[60.0, 120.0, math.nan], [6_000.0, 90.0, 70.0]])
    throttled = np.array([[0.0, 1.0, 0.0], [0.0, 3.0, 3.0]])
    lost = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    map_ = Heat(
        *("OPENAI_STAGGER_SECONDS", "OPENAI_TPM_HEADROOM", (0.0, 1.0, 2.0), (0.0, 0.1)),
        *(objective, throttled, lost, (15.0, 0.15), (0.0, 0.0)),
    )
    found = texts(figures.heat(map_, throttled_limit=1.0))
    # In minutes: the unit suits the largest part of the span. One throttle per 100 is still allowed.
    for cell in ("1.00", "2.00", "–", "100", "1.50▲", "1.17✕"):
        assert found.count(cell) == 1
    assert "finish time, min" in found
    assert "OPENAI_STAGGER_SECONDS, s" in found
    assert any("more than 1 per 100" in text for text in found)


def test_a_map_marks_places_between_and_beyond_the_cells() -> None:
    assert [figures._index((0.0, 1.0, 3.0), at) for at in (0.0, 0.5, 2.0, 3.0)] == [0.5, 1.0, 2.0, 2.5]
    assert [figures._index((1.0, 3.0), at) for at in (0.5, 9.0)] == [0.0, 2.0]


def test_maps_of_one_value_or_of_nothing_known_are_drawn() -> None:
    for value in (100.0, math.nan, math.inf):
        same = np.full((2, 2), value)
        zero = np.zeros((2, 2))
        map_ = Heat("A", "B", (0.0, 1.0), (0.0, 1.0), same, zero, zero, (0.0, 0.0), (0.0, 0.0))
        assert texts(figures.heat(map_)).count("–") == (0 if math.isfinite(value) else 4)


def test_the_front_labels_what_matters_and_counts_what_is_shown(reckless_plan: Plan) -> None:
    found = texts(DRAWN["front"](reckless_plan))
    now, best = reckless_plan.now["makespan_s"].mean, reckless_plan.full.forecast["makespan_s"].mean
    assert f"now: {duration(now)}, loses requests" in found
    assert f"recommended: {duration(best)}" in found
    lossy = sum(p.lost > 0 for p in reckless_plan.points)
    assert f"loses requests ({lossy})" in found


def test_a_front_of_thousands_of_points_stays_small(sample_plan: Plan) -> None:
    policy = sample_plan.now.policy
    rng = np.random.default_rng(7)
    many = [Point(policy, "paceline", 200.0 + 99.0 * x, 3.0 * y, 0.0, 1, False) for x, y in rng.random((5_000, 2))]
    drawn = style.svg_of(figures.front(many, policies_of(sample_plan)))
    assert "<image" in drawn
    assert len(drawn) < 300_000


def test_a_front_without_points_or_with_endless_ones_is_drawn(sample_plan: Plan) -> None:
    endless = Point(sample_plan.now.policy, "paceline", math.inf, 0.0, 120.0, 1, False)
    for points in ((), (endless,)):
        assert any("recommended" in text for text in texts(figures.front(points, policies_of(sample_plan))))


def test_the_objective_can_be_latency(sample_plan: Plan) -> None:
    found = texts(figures.front(sample_plan.points, policies_of(sample_plan), objective="p95_latency"))
    assert f"now: {duration(sample_plan.now['latency_p95_s'].mean)}" in found
    assert any(text.startswith("P95 latency, ") for text in found)
    assert any(
        text.startswith("P95 latency, ")
        for text in texts(figures.stress(sample_plan.stress, policies_of(sample_plan), objective="p95_latency"))
    )


def test_the_stress_set_has_a_line_per_condition(sample_plan: Plan) -> None:
    found = texts(DRAWN["stress"](sample_plan))
    assert found.count("as assumed") == 1
    assert all(found.count(row.name) == 1 for row in sample_plan.stress)
    assert len(texts(figures.stress((), policies_of(sample_plan)))) > 5


# ---------------------------------------------------------------- over time


def test_a_timeline_names_limit_refusals_and_causes(reckless_plan: Plan) -> None:
    found = texts(figures_time.timeline(reckless_plan.timelines["now"], GRANT))
    for text in (
        "limit: 30,000 per minute",
        "429: refused, tried again",
        "request lost",
        "tokens of the budget per minute",
        "time since the start, min",
    ):
        assert text in found


def test_without_a_token_limit_no_limit_is_drawn(sample_plan: Plan) -> None:
    found = texts(figures_time.timeline(sample_plan.timelines["now"], Grant(rpm_limit=500.0)))
    assert not any("limit:" in text for text in found)


def test_a_limit_that_changes_is_drawn_as_it_changes(sample_plan: Plan) -> None:
    grant = Grant(tpm_limit=30_000.0, changes=((600.0, 0.5), (1_200.0, 1.0), (9e9, 3.0)))
    figure = figures_time.timeline(sample_plan.timelines["now"], grant)
    (line,) = [line for line in figure.axes[0].lines if str(line.get_label()).startswith("limit")]
    assert list(line.get_ydata())[:3] == [30_000.0, 15_000.0, 30_000.0]
    assert list(line.get_xdata())[:3] == [0.0, 10.0, 20.0]


def test_scales_begin_at_zero_and_hold_the_highest_curve(reckless_plan: Plan) -> None:
    figure = figures_time.over_time(reckless_plan.timelines, GRANT)
    for ax in figure.axes:
        low, high = ax.get_ylim()
        assert low == 0.0
        assert all(line.get_ydata().max() <= high for line in ax.lines if len(line.get_ydata()))


def test_runs_of_nothing_are_drawn() -> None:
    nothing: list[Attempt] = []
    assert figures_time.timeline(nothing, GRANT).axes
    assert figures_time.over_time({"now": nothing}, GRANT).axes


def test_a_run_of_many_attempts_makes_a_small_picture(sample_plan: Plan) -> None:
    rows = sample_plan.timelines["recommended"]
    end_s = max(a.finished_s for a in rows)

    def later(row: Attempt, i: int) -> Attempt:
        times = {name: getattr(row, name) + i * end_s for name in ("eligible_s", "launched_s", "finished_s")}
        return row._replace(**times)

    many = [later(row, i) for i in range(100) for row in rows]
    assert len(many) == 12_000
    assert len(style.svg_of(figures_time.over_time({"now": many, "recommended": many}, GRANT))) < 600_000
