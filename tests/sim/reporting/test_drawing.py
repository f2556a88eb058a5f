"""Figures drawn by a second process: the same as here, and no loss where that process is none."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import pytest

from sim.experiment.results import Plan
from sim.reporting import figure_process as drawing
from sim.reporting import report_figures
from sim.reporting.figure_process import PARTS, Drawing
from sim.scenario.scenario import Scenario


def test_the_figures_are_those_that_would_be_drawn_here(sample_plan: Plan, sample_scenario: Scenario) -> None:
    grant = sample_scenario.grant()
    assert list(PARTS) == list(report_figures.FIGURES)
    with Drawing(grant) as under_way:
        for name in PARTS:
            under_way.begin(name, sample_plan)
        found = under_way.figures(sample_plan)
        child = under_way._child
    assert found == report_figures.drawn(sample_plan, grant)
    assert child is not None
    assert child.returncode == -signal.SIGKILL


def test_what_the_child_owes_is_drawn_here(
    sample_plan: Plan, sample_scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    grant = sample_scenario.grant()
    monkeypatch.setattr(report_figures, "FIGURES", {name: lambda plan, grant, own=name: own for name in PARTS})
    wanted = {name: name for name in PARTS}
    with Drawing(grant) as under_way:
        # Nobody begins anything: all is drawn here.
        assert under_way.figures(sample_plan) == wanted
        assert under_way._child is not None
        os.kill(under_way._child.pid, signal.SIGKILL)
        under_way.begin("waits", sample_plan)
        assert under_way.figures(sample_plan) == wanted

    def none(*words: Any, **how: Any) -> Any:
        raise OSError

    monkeypatch.setattr(drawing.subprocess, "Popen", none)
    with Drawing(grant) as under_way:
        under_way.begin("waits", sample_plan)
        assert under_way.figures(sample_plan) == wanted


def test_a_figure_that_cannot_be_drawn_says_why(sample_plan: Plan, sample_scenario: Scenario) -> None:
    wrong = replace(sample_plan, objective="no such")
    with Drawing(sample_scenario.grant()) as under_way:
        under_way.begin("waits", sample_plan)
        under_way.begin("stress", wrong)
        with pytest.raises(KeyError, match="no such"):
            under_way.figures(wrong)


def test_closing_does_not_wait_for_a_figure(sample_plan: Plan, sample_scenario: Scenario) -> None:
    with Drawing(sample_scenario.grant()) as under_way:
        child = under_way._child
        assert child is not None
        os.kill(child.pid, signal.SIGSTOP)
        under_way.begin("waits", sample_plan)
    assert child.returncode == -signal.SIGKILL
