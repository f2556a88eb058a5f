"""Windows, gates and refusals learnt from which attempts were let in: right or silent, on every kind of provider."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from sim.calibration.fits_window import retry_after, windows
from sim.calibration.others import Count
from sim.model import provider as prov
from sim.model.provider_config import ProviderConfig

ATTEMPTS = 150


def logged(provider: ProviderConfig, seed: int) -> tuple[list[Count], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Attempts in bursts at random moments, retried after the stated wait or some seconds: their log."""
    rng, pp, ps = random.Random(seed), provider.params(), prov.ProviderState()
    counts: list[Count] = []
    charges, waits, answers = [], [], []
    now = 0.0
    for place in range(ATTEMPTS):
        # The phase is that of the first attempt.
        step_s = rng.choice([0.05, 0.3, rng.uniform(0.0, 3.0)]) if rng.random() < 0.97 else rng.uniform(5.0, 25.0)
        now += step_s if place else 0.0
        for ended_s, charge, used in sorted(answers):
            if ended_s <= now:
                prov.settled(pp, ps, 0, charge, used, max(ps.at, ended_s))
        answers = [answer for answer in answers if answer[0] > now]
        charge = float(rng.randint(200, 1_500))
        used = charge * rng.uniform(0.3, 1.0)
        outcome, _, wait_ms = prov.admitted(pp, ps, 0, charge, now)
        let_in = outcome == prov.OK
        if let_in:
            answers.append((now + 2.0, charge, used))
        jitter = rng.uniform(0.0, 0.02)
        counts.append(
            Count(
                place,
                False,
                now + jitter,
                now + (2.0 if let_in else 0.05),
                0.0,
                0.0,
                let_in,
                -1.0,
                used if let_in else -1.0,
                (),
            )
        )
        charges.append(charge)
        waits.append(-1.0 if let_in else prov.stated_wait_s(pp, wait_ms))
        if not let_in and rng.random() < 0.5:
            now += rng.uniform(1.0, 20.0)
    return counts, np.array(charges), np.array(waits)


HABITS: dict[str, dict[str, Any]] = {
    "bucket": {},
    "GCRA": {"burst_s": 6.0},
    "clock": {"window": "clock", "phase_s": 37.0},
    "anchored": {"window": "anchored"},
    "sliding": {"window": "sliding"},
    "level gate": {"window": "anchored", "charged": "answer"},
}


@pytest.mark.parametrize("form", ["seconds", "absent", "ms"])
@pytest.mark.parametrize("name", HABITS)
def test_windows_are_told_rightly_or_not_at_all(name: str, form: str, seed: int) -> None:
    told = 0
    for number in range(2):
        failed = random.Random(seed + number).choice([True, False, "requests"])
        base = ProviderConfig(tpm=20_000, rpm=60, charge_rule="prompt_plus_max")
        truth = base.with_(**HABITS[name], failed_requests_count=failed, retry_after=form)
        found = windows(*logged(truth, seed + number), base)
        figures = {figure.name: figure.value for figure in found.figures}
        assert found.explains, (seed, number, found.tried[0])
        told += figures["window"] is not None
        assert figures["window"] in (None, truth.window), (seed, number)
        assert figures["gate"] in (None, truth.charged), (seed, number)
        assert figures["refusals count"] in (None, truth.failed_requests_count), (seed, number)
        if figures["burst"] is not None:
            assert math.isclose(figures["burst"], truth.burst_s, abs_tol=1.0), (seed, number)
        phase = next(figure for figure in found.figures if figure.name == "phase")
        if phase.low is not None and phase.high is not None:
            # On a circle of a minute.
            assert (truth.phase_s - phase.low) % 60.0 <= phase.high - phase.low + 0.5, (seed, number)
    # Without waits, or where only the oldest entry's age tells a log from a counter, a window may stay untold.
    assert told or form != "seconds" or name not in ("bucket", "GCRA", "clock"), seed


def test_what_no_window_explains_is_said(seed: int) -> None:
    counts, charges, waits = logged(ProviderConfig(tpm=20_000, rpm=60), seed)
    rng = random.Random(seed)
    for count in counts:
        count.let_in = rng.random() < 0.5
    found = windows(counts, charges, waits, ProviderConfig(tpm=20_000, rpm=60))
    assert not found.explains
    assert all(figure.value is None for figure in found.figures)
    assert "none of the known windows" in found.figures[0].how


def test_few_refusals_tell_nothing() -> None:
    found = windows([], np.zeros(0), np.zeros(0), ProviderConfig())
    assert not found.tried
    assert all(not figure.known for figure in found.figures)


@pytest.mark.parametrize(
    ("waits", "form"),
    [([-1.0, -1.0, 3.0], "absent"), ([60.0] * 5, 60.0), ([1.0, 2.0, 5.0, 7.0], "seconds"), ([0.25, 1.0, 2.5], "ms")],
)
def test_the_form_of_stated_waits(waits: list[float], form: str | float) -> None:
    assert retry_after(np.array(waits)) == form
