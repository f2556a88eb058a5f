"""Compare what the twin would have predicted for a live run with what happened: `paceline backtest`.

The run is replayed under its own settings (`replay.Stage.predictions`): each admitted attempt meets what it met in the
run, and the provider's model decides which attempts are refused.

Statistics. Replications differ in the lateness of timers (drawn from the run's own), network delays, and
requests that were never answered. The interval is the one in which one more run would lie, Student's
mean +- t x sd x sqrt(1 + 1/n), widened by the error of the model that no replication varies (`model_error`).

Where the interval fails: one refusal more or less moves the end of a run by seconds, and whether it happens can depend
on tens of milliseconds, for example when a provider that counts by the minute begins a new one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from governor.journal.journal import Journal
from sim.base.arguments import checked
from sim.base.layout import facts, table, wrapped
from sim.base.words import between, duration, number
from sim.experiment.results import CONFIDENCE
from sim.model.provider_config import ProviderConfig
from sim.scenario.scenario_file import named_provider
from sim.validation.model_error import measured, widened
from sim.validation.replay import Stage
from sim.validation.run_forecast import REQUESTS_SIMULATED
from sim.validation.twin import Lesson, believed, lessons

RUNS_LEAST, RUNS_MOST = 5, 40
TAKEN = (
    "the answer, the time and the fault of each attempt that was let in",
    "the ways to the provider",
    "what others used of the quota, by the counts in the headers",
    "the time of each refusal",
    "how late the loop's timers rang",
    "when settings were changed and launching was paused",
)


class ComparedFigure(NamedTuple):
    """One figure: the prediction with its 95 % interval of one run, and what was measured."""

    predicted: float
    low: float
    high: float
    measured: float

    @property
    def error_ratio(self) -> float | None:
        """Return (measured - predicted) / measured; None if a positive value was predicted and 0 was measured."""
        if self.measured == 0.0:
            return 0.0 if self.predicted == 0.0 else None
        return (self.measured - self.predicted) / self.measured

    @property
    def covered(self) -> bool:
        """Return whether the measured figure lies in the interval, within rounding."""
        margin = 1e-9 * max(1.0, abs(self.measured))
        return self.low - margin <= self.measured <= self.high + margin

    @property
    def half_width_ratio(self) -> float:
        """Return half the interval as a share of the prediction; 0 if both are 0."""
        return (self.high - self.low) / 2.0 / self.predicted if self.predicted > 0.0 else 0.0


@dataclass(frozen=True, slots=True)
class Backtest:
    """The comparison of one run. `forecast`: the journal's forecast from before the first launch, None = none."""

    makespan_s: ComparedFigure
    throttled: ComparedFigure
    launches: ComparedFigure
    requests: int
    replications: int
    forecast: ComparedFigure | None
    forecast_throttled: ComparedFigure | None
    assumed: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json_dict(self) -> dict[str, Any]:
        """Return plain values; the makespan's keys have no prefix, unlike those of the other figures."""
        m = self.makespan_s
        found: dict[str, Any] = {
            "predicted_makespan_s": m.predicted,
            "predicted_low_s": m.low,
            "predicted_high_s": m.high,
            "measured_makespan_s": m.measured,
            "error_ratio": m.error_ratio,
            "covered": m.covered,
        }
        for name, c in (("throttled", self.throttled), ("launches", self.launches)):
            found |= {
                f"predicted_{name}": c.predicted,
                f"predicted_{name}_low": c.low,
                f"predicted_{name}_high": c.high,
                f"measured_{name}": int(c.measured),
                f"{name}_error_ratio": c.error_ratio,
                f"{name}_covered": c.covered,
            }
        f = self.forecast
        found["forecast"] = None if f is None else {**f._asdict(), "error_ratio": f.error_ratio, "covered": f.covered}
        rest = {"requests": self.requests, "replications": self.replications, "taken_from_journal": list(TAKEN)}
        return found | rest | {"assumed": list(self.assumed), "notes": list(self.notes)}

    def text(self, width: int = 110) -> str:
        """Return the comparison as readable text."""
        rows = [["", "measured", "predicted", "95 % interval", "error", ""]]
        rows.append(_row("makespan", self.makespan_s, "duration"))
        rows.append(_row("429s", self.throttled, "number"))
        rows.append(_row("launches", self.launches, "number"))
        if self.forecast is not None:
            rows.append(_row("forecast makespan", self.forecast, "duration"))
        if self.forecast_throttled is not None:
            rows.append(_row("forecast 429s", self.forecast_throttled, "number"))
        told = [
            (f"{self.requests:,} requests", f"simulated {self.replications} times"),
            ("taken from the journal", "; ".join(TAKEN)),
            ("assumed", "; ".join(self.assumed)),
        ]
        notes = [wrapped(f"note: {note}", width, "  ") for note in self.notes]
        return "\n".join([table(rows), "", facts(told, width), *notes])


def _row(name: str, c: ComparedFigure, form: str) -> list[str]:
    write = duration if form == "duration" else number
    error = "-" if c.error_ratio is None else f"{100.0 * c.error_ratio:+.1f} %".replace("-", "−")
    within = "within" if c.covered else "outside"
    return [name, write(c.measured), write(c.predicted), between(c.low, c.high, form), error, within]


# ---------------------------------------------------------------- the comparison


def backtest(
    journal: Journal,
    *,
    provider: ProviderConfig | None = None,
    runs: int = 0,
    model_error_ratio: float | None = None,
    pool: str = "",
) -> Backtest:
    """Compare the run in a journal with its twin.

    `provider`: the assumed provider, None = that of the run's own forecast, or of its settings without a scenario.
    `runs`: replications, 0 = as many as about 60,000 requests make, at least 5 and at most 40.
    `model_error_ratio`: of the makespan, None = as measured. `pool`: compare this one alone, without the run's
    forecast, which is of all; "" = all. Raise BadInput if no request of the journal has ended.
    """
    found = [lesson for lesson in lessons(journal) if pool in ("", lesson.pool)]
    requests = sum(len(lesson.workload) for lesson in found)
    runs = runs or max(RUNS_LEAST, min(RUNS_MOST, REQUESTS_SIMULATED // max(1, requests)))
    predicted = np.zeros((runs, 3))
    recorded = {} if provider is not None else _recorded(journal)
    for lesson in found:
        # Pools work side by side: the last one ends the run, counts add up.
        stage = Stage(lesson, provider or recorded.get(lesson.pool) or believed(lesson))
        values = np.array([each[:3] for each in stage.predictions(runs)])
        predicted[:, 0] = np.maximum(predicted[:, 0], values[:, 0])
        predicted[:, 1:] += values[:, 1:]
    measured_s = max(lesson.makespan_s for lesson in found)
    throttled = _counts(predicted[:, 1])
    ratio = measured().rehearsal[throttled[2] > 0.0] if model_error_ratio is None else model_error_ratio
    forecast, forecast_throttled = (None, None) if pool else _forecast(journal, found)
    return Backtest(
        makespan_s=ComparedFigure(*_interval(predicted[:, 0], ratio), measured_s),
        throttled=ComparedFigure(*throttled, float(sum(lesson.throttled for lesson in found))),
        launches=ComparedFigure(*_counts(predicted[:, 2]), float(sum(lesson.launches for lesson in found))),
        requests=requests,
        replications=runs,
        forecast=forecast,
        forecast_throttled=forecast_throttled,
        assumed=_assumed(provider or (recorded.get(found[0].pool) if len(found) == 1 else None), found),
        notes=_notes(journal, found),
    )


def _recorded(journal: Journal) -> dict[str, ProviderConfig]:
    """Return the provider that each pool's forecast assumed, if a scenario stated it."""
    return {
        pool: checked(ProviderConfig, content["assumed"]["provider"], f"the forecast of pool {pool}")
        for written in journal.forecasts()
        for pool, content in written.content.items()
        if isinstance(content, dict) and content.get("assumed")
    }


def _interval(values: np.ndarray[Any, Any], model_error_ratio: float = 0.0) -> tuple[float, float, float]:
    """Return (mean, low, high), the interval in which one more run lies with 95 %; not below 0."""
    from scipy.stats import t

    n, mean = len(values), float(values.mean())
    own = float(values.std(ddof=1)) * math.sqrt(1.0 + 1.0 / n) if n > 1 else 0.0
    half = float(t.ppf(0.5 + CONFIDENCE / 2.0, max(1, n - 1))) * own
    low, _, high = widened(mean - half, mean, mean + half, model_error_ratio)
    return mean, low, high


def _counts(values: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """Return (mean, low, high) for a count: the interval's ends are rounded outwards to whole numbers."""
    mean, low, high = _interval(values)
    return mean, math.floor(low + 1e-9), math.ceil(high - 1e-9)


def _forecast(journal: Journal, found: Sequence[Lesson]) -> tuple[ComparedFigure | None, ComparedFigure | None]:
    """Compare the forecast written before the first launch with what happened: makespan and 429s."""
    written = next((each for each in journal.forecasts() if each.launched_before == 0), None)
    if written is None:
        return None, None
    pools = [content for content in written.content.values() if isinstance(content, dict) and content.get("requests")]
    if not pools or any("finish_s" not in content for content in pools):
        return None, None
    # A forecast counts from the start of the leg, slightly before the first launch.
    measured_s = max(lesson.makespan_s for lesson in found) - min(lesson.began_s for lesson in found)
    finish = [max(float(content[name]) for content in pools) for name in ("finish_s", "low_s", "high_s")]
    names = ("throttled", "throttled_low", "throttled_high")
    counts = [sum(float(content.get(name, 0.0)) for content in pools) for name in names]
    seen = float(sum(lesson.throttled for lesson in found))
    return ComparedFigure(finish[0], finish[1], finish[2], measured_s), ComparedFigure(
        counts[0], counts[1], counts[2], seen
    )


def _assumed(provider: ProviderConfig | None, found: Sequence[Lesson]) -> tuple[str, ...]:
    if provider is None:
        limits = "; ".join(f"{lesson.policy.tpm_limit:,} tokens per minute" for lesson in found)
        return (f"a provider that grants and charges as the settings believe: {limits}",)
    settles = "settles to real use" if provider.settles else "does not settle"
    text = (
        f"a provider of {provider.tpm:,} tokens and {provider.rpm:,} requests per minute (0 = no limit) that {settles}"
    )
    others = (
        f"others on the quota take {provider.cotenant.share:.0%}" if provider.cotenant.share else "nobody else on it"
    )
    return text, f"charge rule {provider.charge_rule}", others


def _notes(journal: Journal, found: Sequence[Lesson]) -> tuple[str, ...]:
    notes = []
    unfinished = sum(lesson.unfinished for lesson in found)
    if unfinished:
        notes.append(f"{unfinished:,} requests have not ended: only those that have are compared")
    legs = len(journal.legs())
    if legs > 1:
        notes.append(f"the run had {legs} legs: the time between them is left out, but for what refilled in it")
    unanswered = sum(lesson.unanswered for lesson in found)
    if unanswered:
        notes.append(
            f"{unanswered:,} requests were never answered: their answers are drawn from those of similar prompts"
        )
    return tuple(notes)


# ---------------------------------------------------------------- the command


def provider_of(journal: Journal, name: str | None, tpm: int | None) -> ProviderConfig | None:
    """Return the provider that a command names: a tier or YAML file, and a limit; None = as the settings state."""
    if name is None and tpm is None:
        return None
    base = believed(lessons(journal)[0]) if name is None else named_provider(name)
    return base if tpm is None else base.with_(tpm=tpm)


def backtest_command(
    journal_path: str,
    as_json: bool = False,
    out: str | None = None,
    *,
    provider: str | None = None,
    tpm: int | None = None,
    replications: int = 0,
    width: int = 110,
) -> None:
    """Print the comparison, as `paceline backtest`; `out`: a folder for backtest.json and backtest.txt.

    `provider`: a tier's name or a YAML file. Raise PacelineError for errors that a user can fix.
    """
    from governor.model.files import prepared_folder

    with Journal.open(journal_path) as journal:
        found = backtest(journal, provider=provider_of(journal, provider, tpm), runs=replications)
    content = json.dumps(found.to_json_dict(), indent=2, allow_nan=False)
    text = found.text(width)
    if out is not None:
        with prepared_folder(out) as folder:
            (folder / "backtest.json").write_text(content + "\n", encoding="utf-8")
            (folder / "backtest.txt").write_text(text + "\n", encoding="utf-8")
    print(content if as_json else text, flush=True)
