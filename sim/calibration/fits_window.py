"""How a quota counts over time, learnt from which attempts were admitted: window, phase, burst, gate, refusals.

Theory of operation. Each combination of properties is a synthetic provider (`sim/model/provider.py`). It processes the
attempts at their moments and predicts each outcome; it then books what really happened regardless, so that one surprise
causes no others. The residual of a hypothesis is the number of attempts whose outcome it mispredicts, including
refusals with a different stated wait. A value is determined if every rival with another value misses clearly more; if
even the best hypothesis misses too many, none explains the log, and the result says so.

Moments are only known to some tenths of a second, so an attempt is no surprise if the predicted outcome `SLACK_S`
earlier or later agrees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from governor.provider.probe import ProbeAnswer, WindowProbe
from sim.calibration.fits import Figure, unknown
from sim.calibration.others import Count, began_s
from sim.model import provider as prov
from sim.model import windows as win
from sim.model.provider_config import ProviderConfig
from sim.model.workload import Real

_SLACK_S = 0.4
# Tolerance of a stated wait, in seconds: whole seconds are rounded, and some providers add one.
WAIT_SLACK_S = 1.6
ATTEMPTS_MOST = 600
CONSTANT_LEAST_S = 20.0
LEAST_REFUSALS = 2
# The best hypothesis may miss this many attempts, as a share of the refusals; a rival must miss this many more.
_UNEXPLAINED_MOST = 0.2
MORE_MISSES = 3
BURSTS_S = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0)
PHASE_STEP_S = 2.0
# Figures by their names in a provider file.
PROBED = {"window": "window", "burst": "burst_s", "gate": "charged", "refusals count": "failed_requests_count"}
GATES = ("admission", "answer")
REFUSALS: tuple[bool | str, ...] = (False, True, "tokens", "requests")


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One set of provider properties, and the number of attempts that it does not explain."""

    habits: dict[str, Any]
    misses: int

    @property
    def kind(self) -> tuple[str, bool]:
        """Return the window, and whether its bursts are shorter than a minute."""
        return self.habits["window"], "burst_s" in self.habits


@dataclass(frozen=True, slots=True)
class WindowFit:
    """The fitted figures; `tried`: all hypotheses, the best first, none if there are too few refusals.

    `form`: how refusals state their waits (`retry_after`); None = undetermined.
    """

    figures: tuple[Figure, ...]
    tried: tuple[Hypothesis, ...] = ()
    refusals: int = 0
    attempts: int = 0
    form: str | float | None = None

    @property
    def explains(self) -> bool:
        """Return whether the best hypothesis explains the refusals."""
        return bool(self.tried) and self.tried[0].misses <= max(1.0, _UNEXPLAINED_MOST * self.refusals)


def retry_after(waits_s: Real) -> str | float:
    """Return how refusals state their waits, -1 = no wait stated: `absent`, `ms`, `seconds`, or a constant."""
    said = waits_s[waits_s >= 0.0]
    if len(said) < len(waits_s) / 2.0:
        return "absent"
    # A bucket that is asked at a steady rate also states one short wait.
    if len(said) >= 4 and float(np.ptp(said)) < 1e-6 and said[0] >= CONSTANT_LEAST_S:
        return float(said[0])
    return "seconds" if bool((np.abs(said - np.rint(said)) < 1e-6).all()) else "ms"


def windows(counts: Sequence[Count], charges: Real, waits_s: Real, granted: ProviderConfig) -> WindowFit:
    """Return the properties of the provider that admits what was admitted. `granted`: its limits and charge rule.

    `charges`, `waits_s`: of each attempt by its place, shape (attempts,); a wait of -1 = none was stated.
    """
    counts = counts[:ATTEMPTS_MOST]
    refused = [count for count in counts if not count.let_in]
    names = ("window", "phase", "burst", "gate", "refusals count")
    defaults = (granted.window, granted.phase_s, granted.burst_s, granted.charged, granted.failed_requests_count)
    if len(refused) < LEAST_REFUSALS:
        why = f"{len(refused)} refusals with a time are in the log"
        return WindowFit(tuple(unknown(name, value, why) for name, value in zip(names, defaults, strict=True)))
    stated = np.array([waits_s[count.place] for count in refused])
    said = waits_s if retry_after(stated) in ("ms", "seconds") else np.full(len(waits_s), -1.0)

    def tried(habits: Iterable[dict[str, Any]]) -> list[Hypothesis]:
        return [Hypothesis(each, misses(granted.with_(**each), counts, charges, said)) for each in habits]

    base = {"phase_s": 0.0, "burst_s": win.MINUTE_S}
    coarse = tried({**base, **each, **rest} for each in _windows() for rest in _rest(False, True))
    best = min(coarse, key=_order).habits
    # Finer phases around the best, then every way in which refusals count, and the gate.
    near_s = best["phase_s"] if best["window"] == "clock" else None
    fine = tried({**best, **base, **each} for each in _windows(near_s))
    best = min([*coarse, *fine], key=_order).habits
    every = sorted([*coarse, *fine, *tried({**best, **rest} for rest in _rest(*REFUSALS))], key=_order)
    fit = _told(tuple(every), len(refused), len(counts), defaults)
    return replace(fit, form=_form(granted.with_(**every[0].habits), counts, charges, waits_s, stated))


def _form(
    provider: ProviderConfig, counts: Sequence[Count], charges: Real, waits_s: Real, stated: Real
) -> str | float | None:
    """Return how refusals state their waits; None where a sliding log may mean either of two by its whole seconds."""
    form = retry_after(stated)
    if form != "seconds" or provider.window != "sliding":
        return form
    fits, oldest = (misses(provider, counts, charges, waits_s, states=each) for each in ("seconds", "oldest"))
    return None if abs(fits - oldest) < MORE_MISSES else "seconds" if fits < oldest else "oldest"


def judged(knocks: Sequence[WindowProbe], tpm: float, rpm: float) -> list[ProbeAnswer]:
    """Return what the calls of `paceline probe` show: properties by their names in a provider file; see `probe.Judge`.

    Every charge rule is tried; a property is determined if all rules that explain the calls agree on it.
    """
    counts = [Count(i, False, k.at_s, k.ended_s, 0.0, 0.0, k.let_in, -1.0, k.used, ()) for i, k in enumerate(knocks)]
    waits_s = np.array([knock.wait_s for knock in knocks])
    fits = {}
    for rule in knocks[0].charges:
        granted = ProviderConfig(tpm=int(tpm), rpm=int(rpm), charge_rule=rule)  # type: ignore[arg-type]
        fits[rule] = windows(counts, np.array([knock.charges[rule] for knock in knocks]), waits_s, granted)
    fewest = min(fit.tried[0].misses for fit in fits.values()) if all(fit.tried for fit in fits.values()) else 0
    near = {rule: fit for rule, fit in fits.items() if fit.tried and fit.tried[0].misses < fewest + MORE_MISSES}
    found = []
    for name, key in PROBED.items():
        figures = [next(figure for figure in fit.figures if figure.name == name) for fit in near.values()]
        values = {figure.value for figure in figures}
        agreed = len(values) == 1 and bool(figures) and figures[0].known
        why = figures[0].how if len(values) == 1 else "it depends on the charge rule, which the refusals leave open"
        found.append(
            ProbeAnswer(key, figures[0].value if agreed else None, why if figures else "too few refusals came")
        )
    refused = waits_s[[not knock.let_in for knock in knocks]]
    forms = {fit.form for fit in near.values()}
    form = forms.pop() if len(forms) == 1 else None
    return [*found, ProbeAnswer("retry_after", form, f"stated by {(refused >= 0.0).sum()} of {len(refused)} refusals")]


def _order(hypothesis: Hypothesis) -> tuple[float, ...]:
    """Return the sort key: misses, then among equals the simpler: whole bursts, charged at admission."""
    habits = hypothesis.habits
    return (
        hypothesis.misses,
        habits["burst_s"] < win.MINUTE_S,
        habits["charged"] == "answer",
        habits["window"] == "clock",
    )


def _windows(near_s: float | None = None) -> list[dict[str, Any]]:
    phases = np.arange(0.0, win.MINUTE_S, PHASE_STEP_S)
    if near_s is not None:
        phases = np.concatenate([phases, near_s + np.arange(-2.0, 2.01, 0.25)]) % win.MINUTE_S
    found: list[dict[str, Any]] = [{"window": name} for name in ("bucket", "anchored", "sliding")]
    found += [{"window": "bucket", "burst_s": burst_s} for burst_s in BURSTS_S]
    found += [{"window": "clock", "phase_s": float(phase_s)} for phase_s in sorted(set(phases.tolist()))]
    return found


def _rest(*refusals: bool | str) -> list[dict[str, Any]]:
    return [{"charged": gate, "failed_requests_count": each} for gate in GATES for each in refusals]


def misses(provider: ProviderConfig, counts: Sequence[Count], charges: Real, waits_s: Real, states: str = "") -> int:
    """Return the number of attempts that the provider would have treated differently; see the module's docstring.

    `states`: what the stated waits are, `seconds` until the attempt fits or until a sliding log's `oldest` entry
    expires; "" = either.
    """
    pp = provider.with_(cotenant={"share": 0.0, "burst_s": 0.0, "period_s": 0.0}).params()
    ps = prov.ProviderState()
    zero_s = began_s(counts)
    events = [(c.launched_s + max(c.there_s, _unsure_s(c)) - zero_s, 1, c) for c in counts]
    if any(pp.at_answer) or pp.settles:
        events += [
            (max(c.launched_s, c.ended_s - max(0.0, c.round_s - c.there_s)) - zero_s, 0, c)
            for c in counts
            if c.used >= 0.0
        ]
    wrong = 0
    for at_s, is_attempt, count in sorted(events, key=lambda event: event[:2]):
        charge = count.charge if count.charge >= 0.0 else float(charges[count.place])
        at_s = max(ps.at, at_s)
        if not is_attempt:
            prov.settled(pp, ps, 0, charge, count.used, at_s)
            continue
        asked, booked = (1.0, 0.0) if any(pp.at_answer) else (charge, charge)
        slack_s = _SLACK_S + _unsure_s(count)
        prov.advanced(pp, ps, 0, max(ps.at, at_s - slack_s))
        earlier = _wait_ms(pp, ps, asked)[0]
        prov.advanced(pp, ps, 0, at_s)
        win.opened(pp, ps)
        wait_ms, oldest_ms = _wait_ms(pp, ps, asked)
        if count.let_in:
            wrong += wait_ms > 1_000.0 * _SLACK_S
            win.taken(pp, ps, booked, 1.0, False)
            continue
        stated_s = float(waits_s[count.place])
        if wait_ms < 0.0 and earlier < 0.0:
            wrong += 1
        elif stated_s >= 0.0 and wait_ms >= 0.0:
            waits_ms = {"seconds": (wait_ms,), "oldest": (oldest_ms,)}.get(states, (wait_ms, oldest_ms))
            wrong += min(abs(stated_s - ms / 1_000.0) for ms in waits_ms) > WAIT_SLACK_S + _unsure_s(count)
        if pp.failed_count:
            tokens = booked if pp.failed_count & prov.REFUSAL_TOKENS else 0.0
            win.taken(pp, ps, tokens, 1.0 if pp.failed_count & prov.REFUSAL_REQUESTS else 0.0, True)
    return wrong


def _unsure_s(count: Count) -> float:
    """Return the time that a refusal took: it was decided before its answer, perhaps after attempts launched later."""
    return 0.0 if count.let_in else max(0.0, count.ended_s - count.launched_s)


def _wait_ms(pp: Any, ps: Any, asked: float) -> tuple[float, float]:
    """Return how long one more attempt must wait, -1 = not at all; and the time until the window's first entry expires.

    Some limiters with a sliding log state the second, which may be too short.
    """
    wait_ms = oldest_ms = -1.0
    for d, requested in ((win.TPM, asked), (win.RPM, 1.0)):
        limit = win.limit_now(pp, ps, d)
        excess = ps.used[d] + requested - win.capacity_of(pp, d, limit)
        if limit > 0.0 and excess > win.ROUNDING:
            wait_ms = max(wait_ms, win.room_in_ms(pp, ps, d, excess, limit))
            first_ms = win.room_in_ms(pp, ps, d, min(excess, 1.0), limit) if pp.window[d] == win.SLIDING else wait_ms
            oldest_ms = max(oldest_ms, first_ms)
    return wait_ms, oldest_ms


def _told(tried: tuple[Hypothesis, ...], refusals: int, attempts: int, defaults: tuple[Any, ...]) -> WindowFit:
    """Return each property, determined if every hypothesis with another value of it misses clearly more."""
    best, fit = tried[0], WindowFit((), tried, refusals, attempts)
    names = ("window", "phase", "burst", "gate", "refusals count")
    if not fit.explains:
        why = f"none of the known windows explains the refusals: the best misses {best.misses} of {attempts} attempts"
        return WindowFit(
            tuple(unknown(name, value, why) for name, value in zip(names, defaults, strict=True)),
            tried,
            refusals,
            attempts,
        )
    readers: tuple[tuple[str, Callable[[dict[str, Any]], Any]], ...] = (
        ("window", lambda h: (h["window"], h["burst_s"] < win.MINUTE_S)),
        ("phase", lambda h: None),
        ("burst", lambda h: h["burst_s"]),
        ("gate", lambda h: h["charged"]),
        ("refusals count", lambda h: h["failed_requests_count"]),
    )
    found = []
    hits = f"{attempts - best.misses:,} of {attempts:,} attempts come out as it says"
    settled = _rival(tried, readers[0][1]) is None
    for (name, read), default in zip(readers, defaults, strict=True):
        rival = _rival(tried, read)
        value = {"window": best.habits["window"], "phase": best.habits["phase_s"]}.get(name, read(best.habits))
        if name == "phase":
            found.append(_phase(tried, hits, settled))
        elif rival is None and (settled or name == "gate"):
            found.append(Figure(name, value, None, None, "s" if name == "burst" else "", hits, default))
        else:
            # A default that the refusals rule out is not kept: a value that explains them is taken.
            other = "another window" if rival is None else _text(rival.habits)
            why = f"{other} explains the refusals as well as {_text(best.habits)}, which is taken"
            found.append(unknown(name, value, why))
    return WindowFit(tuple(found), tried, refusals, attempts)


def _rival(tried: Sequence[Hypothesis], read: Callable[[dict[str, Any]], Any]) -> Hypothesis | None:
    best = tried[0]
    return next(
        (h for h in tried if read(h.habits) != read(best.habits) and h.misses < best.misses + MORE_MISSES), None
    )


def _phase(tried: Sequence[Hypothesis], hits: str, settled: bool) -> Figure:
    best = tried[0]
    if best.habits["window"] != "clock":
        return unknown("phase", 0.0, "only minutes of the clock have one")
    alike = [h.habits["phase_s"] for h in tried if h.habits["window"] == "clock" and h.misses == best.misses]
    middle = middle_phase(alike)
    apart = [(phase_s - middle + 30.0) % win.MINUTE_S - 30.0 for phase_s in alike]
    # The next values, beyond those that miss equally few, were tried one step away.
    low, high = middle + min(apart) - PHASE_STEP_S, middle + max(apart) + PHASE_STEP_S
    value = round(middle, 2) % win.MINUTE_S
    if not settled:
        return unknown("phase", value, "another window explains the refusals as well", "s")
    return Figure("phase", value, low, high, "s", hits)


def middle_phase(phases_s: Sequence[float]) -> float:
    """Return the middle of phases on the circle of a minute, seconds."""
    angles = np.exp(2j * math.pi * np.array(phases_s) / win.MINUTE_S)
    return float(np.angle(angles.mean()) / (2.0 * math.pi) * win.MINUTE_S) % win.MINUTE_S


def _text(habits: dict[str, Any]) -> str:
    burst_s, failed = habits["burst_s"], habits["failed_requests_count"]
    words = [f"{habits['window']} window" if burst_s == win.MINUTE_S else f"bucket of {burst_s:g} s"]
    words.append("charged at the answer" if habits["charged"] == "answer" else "")
    words.append({True: "refusals counted", False: "refusals not counted"}.get(failed, f"refusals counted as {failed}"))
    return ", ".join(filter(None, words))
