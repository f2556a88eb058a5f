"""Calibrate a scenario from logs of real requests: fitted figures with intervals, and what the data cannot determine.

The workload is empirical: whole rows as recorded, prompts and answers together, with their arrivals. Answer times are
drawn anew in every run, from the fitted line and the noise that predicts best (`fits.noise`): a run that repeated the
recorded times would show no spread at all. The rest of the provider is the fitted figures, each with its interval;
figures that the log cannot determine keep the default and are marked so. Plans draw from the ranges that the log has
narrowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy import stats

from governor.forecast.mixes import fitted
from governor.model.errors import BadInput, BadSetting
from governor.model.policy import Policy
from sim.calibration import fits
from sim.calibration.fits import ArrivalFit, Family, Figure, LatencyFit, unknown
from sim.calibration.fits_quota import QuotaFit, quota
from sim.calibration.logs import of_log
from sim.calibration.observed import Observed, of_journal, pooled, workload_of
from sim.des.engines import simulated
from sim.experiment.experiment import case_of
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import cap_classes, redrawn
from sim.model.windows import MINUTE_S
from sim.model.workload import Real, Workload
from sim.scenario.readers import BATCH, SCENARIO, Source, is_journal
from sim.scenario.scenario import Scenario, following
from sim.scenario.scenario_file import FileSource
from sim.scenario.unknowns import Unknowns

# Runs of the forecast; its ends are quantiles of this many draws.
DRAWS = 40
NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibrated scenario and the source of each figure. `scenario.source` is standard input until it is written.

    `prompts`, `outputs`: parametric families fitted to the empirical lengths, best first. `correlation`: Spearman's, of
    prompt and answer lengths. `unknowns`: ranges from which plans should still draw.
    """

    scenario: Scenario
    observed: Observed
    figures: tuple[Figure, ...]
    latency: LatencyFit | None
    arrivals: ArrivalFit | None
    quota: QuotaFit
    prompts: list[Family]
    outputs: list[Family]
    unknowns: Unknowns
    notes: tuple[str, ...]

    def __getitem__(self, name: str) -> Figure:
        return next(figure for figure in self.figures if figure.name == name)

    def write(self, path: str | Path) -> Scenario:
        """Write scenario.yaml, with the ranges that plans should draw from, and its rows as scenario.workload.csv."""
        draws = {"plan": {"unknowns": self.unknowns.model_dump(mode="json", exclude_defaults=True)}}
        return self.scenario.write(path, more=yaml.safe_dump(draws, sort_keys=False))

    def to_json_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        names = ("name", "value", "low", "high", "unit", "how", "default")
        return {
            "attempts": len(self.observed),
            "requests": len(self.scenario.workload),
            "confidence_each": fits.EACH,
            "figures": [{name: getattr(figure, name) for name in names} for figure in self.figures],
            "prompt_families": [{"name": f.name, "ks": f.ks, "aic": f.aic} for f in self.prompts],
            "output_families": [{"name": f.name, "ks": f.ks, "aic": f.aic} for f in self.outputs],
            "noise": None
            if self.latency is None
            else {"shape": self.latency.noise.name, "log_scores": self.latency.noise.scores},
            "unknowns": self.unknowns.model_dump(mode="json"),
            "notes": list(self.notes),
        }


def read_sources(paths: Sequence[str], columns: Mapping[str, str], pool: str = "") -> Observed:
    """Return the attempts in all the sources. Raise BadInput, in one line, for the first error.

    `pool`: the one whose attempts are read from journals, "" = the only one.
    """
    return pooled([_read(path, columns, pool) for path in paths])


def _read(path: str, columns: Mapping[str, str], pool: str) -> Observed:
    if is_journal(path):
        return of_journal(path, pool)
    if pool:
        raise BadSetting(f"--pool is for journals: {path} is a log", "--pool")
    source = Source.open(path)
    kind = source.kind()
    if kind in (BATCH, SCENARIO):
        what = "scenario" if kind == SCENARIO else "batch file: its requests have no answers"
        raise BadInput(f"this is a {what}, not a log of requests", source.name)
    return of_log(source, columns)


def calibrate(observed: Observed, *, base: ProviderConfig | None = None, policy: Policy | None = None) -> Calibration:
    """Calibrate a scenario from the attempts.

    `base`: the provider whose values are kept if the data cannot determine them. `policy`: the scenario's policy; by
    default the journal's, else the guardrails' defaults under the fitted limits.
    """
    base = base or _believed(observed.policy)
    rows = observed.rows()
    # Finalize passes are answers too; a request answered twice provides two times.
    done = observed.answered
    times = fits.latency(
        observed.tries.output_tokens[done].astype(np.float64), observed.took_s[done], observed.first_s[done]
    )
    workload = workload_of(observed)
    come = fits.arrivals(workload.arrival_s) if workload.has_arrivals else None
    found = quota(observed, base)
    figures = (
        *_lengths(observed, rows),
        *_times(times, base),
        *_arrivals(come, observed),
        *found.figures,
        *_turnaround(observed, base),
    )
    provider = _provider(base, found, times, observed)
    notes = (*observed.notes, *_notes(observed, found))
    policy = policy or observed.policy or following(Policy(), provider)
    scenario = Scenario(
        source=FileSource(path="-", provenance=dict(workload.provenance)),
        workload=workload,
        provider=provider,
        policy=policy,
        arrivals="trace" if workload.has_arrivals else "batch",
        skip_oversized=True,
    ).fitted(skip_oversized=True)
    answers = observed.tries.output_tokens[rows[done[rows]]]
    return Calibration(
        scenario=scenario,
        observed=observed,
        figures=figures,
        latency=times,
        arrivals=come,
        quota=found,
        prompts=fits.families(observed.tries.prompt_tokens[rows]),
        outputs=fits.families(answers),
        unknowns=_unknowns(observed, answers, times, found),
        notes=notes,
    )


# ---------------------------------------------------------------- parts


def _believed(policy: Policy | None) -> ProviderConfig:
    """Return the provider assumed if neither log nor user states it: limits and charge rule of the run's settings."""
    if policy is None:
        return ProviderConfig()
    rule = "auto" if policy.charge_rule in ("fixed", "learned") else policy.charge_rule
    limits = {name: getattr(policy, f"{name}_limit") for name in ("tpm", "rpm", "tpd", "rpd")}
    return ProviderConfig().with_(**limits, charge_rule=rule, settles=policy.settle)


def _lengths(observed: Observed, rows: NDArray[np.int64]) -> tuple[Figure, ...]:
    found = []
    answered = rows[observed.answered[rows]]
    for name, which, values in (
        ("prompt tokens", rows, observed.tries.prompt_tokens[rows]),
        ("output tokens", answered, observed.tries.output_tokens[answered]),
    ):
        for q in (0.5, 0.95):
            how = f"{len(which):,} requests; the scenario has the rows themselves"
            found.append(fits.quantile(f"{name} P{100 * q:.0f}", values.astype(np.float64), q, "tokens", how))
    rows = answered
    prompt, output = (getattr(observed.tries, name)[rows] for name in ("prompt_tokens", "output_tokens"))
    name = "prompt-output correlation"
    if len(rows) < 10 or np.ptp(prompt) == 0 or np.ptp(output) == 0:
        few = len(rows) < 10
        return (*found, unknown(name, None, "fewer than 10 answers" if few else "one of the two does not vary"))
    rho = float(stats.spearmanr(prompt, output).statistic)
    # Fisher's transform, with Bonett and Wright's (2000) variance for Spearman's rho.
    half = float(stats.norm.ppf(0.5 + fits.EACH / 2.0)) * np.sqrt((1.0 + rho**2 / 2.0) / (len(rows) - 3))
    z = np.arctanh(min(0.999999, max(-0.999999, rho)))
    how = "Spearman's rank correlation; rows are kept whole"
    return (*found, Figure(name, rho, float(np.tanh(z - half)), float(np.tanh(z + half)), "", how))


def _times(times: LatencyFit | None, base: ProviderConfig) -> tuple[Figure, ...]:
    late = base.latency
    if times is None:
        why = f"fewer than {fits.LEAST_ANSWERS} answers have a time"
        return (
            unknown("first token", late.first_token_s, why, "s"),
            unknown("per output token", late.per_token_s, why, "s"),
            unknown("noise (sigma)", late.sigma, why),
            unknown("stalls", late.stall_ratio, why),
        )
    return times.first_token_s, times.per_token_s, times.sigma, times.stall_ratio


def _arrivals(come: ArrivalFit | None, observed: Observed) -> tuple[Figure, ...]:
    if come is not None:
        return come.rate_per_s, come.cv
    why = "a batch: all requests are there at the start" if observed.batch else "the log has no times of arrival"
    if not observed.batch and (observed.arrived_s >= 0.0).any():
        why = f"fewer than {fits.LEAST_ANSWERS} requests with a time of arrival, or all at one moment"
    return (unknown("arrivals", None, why, "per s"),)


def _turnaround(observed: Observed, base: ProviderConfig) -> tuple[Figure, ...]:
    """Return how long the Batch API takes, if any batch was seen."""
    times = observed.turnarounds_s
    if not times:
        return ()
    names = ("batch turnaround P50", "batch turnaround P95")
    found = fitted(times)
    if found is None:
        why = f"{len(times)} batches were completed, fewer than three"
        assumed = base.batch_api.turnaround_s
        return unknown(names[0], assumed[0], why, "s"), unknown(names[1], assumed[1], why, "s")
    p50, p95, factor = found
    how = f"log-normal through {len(times)} completed batches"
    middle = Figure(names[0], p50, p50 / factor**2, p50 * factor**2, "s", how)
    return middle, Figure(names[1], p95, None, None, "s", how)


# The provider's inputs, as its `provenance` names them, by the figures from which they are learnt.
LEARNT = {
    "limits": "tokens per minute",
    "charge rule": "charge rule",
    "settling": "settles",
    "refused requests": "refusals count",
    "Retry-After": "Retry-After",
    "window": "window",
    "other users of the quota": "share of others",
    "faults": "server errors",
}


def _counts(observed: Observed) -> str:
    """Return which answers state counts in headers: `none` or `refusals`; "" = others too, or no header was kept."""
    stated = (observed.stated[:, [1, 3]] >= 0.0).any(axis=1)
    if (stated & observed.answered).any():
        return ""
    # A journal keeps every header that it receives.
    return "refusals" if stated.any() else "none" if observed.policy is not None else ""


def _provider(base: ProviderConfig, found: QuotaFit, times: LatencyFit | None, observed: Observed) -> ProviderConfig:
    changes: dict[str, Any] = {
        "preset": "",
        "tpm": int(found["tokens per minute"].used),
        "rpm": int(found["requests per minute"].used),
        "charge_rule": found["charge rule"].used,
        "settles": found["settles"].used,
        "failed_requests_count": found["refusals count"].used,
        "retry_after": found["Retry-After"].used,
        "window": found["window"].used,
        "phase_s": found["phase"].used if found["window"].used == "clock" else 0.0,
        "burst_s": found["burst"].used if found["window"].used == "bucket" else MINUTE_S,
        "charged": found["gate"].used,
        "counts": _counts(observed) or base.counts,
        "limit_changes": tuple({"at_s": at_s, "factor": factor} for at_s, factor in found.changes),
        "cotenant": {"share": found["share of others"].used, "burst_s": 0.0, "period_s": 0.0},
        "faults": {
            **base.faults.model_dump(),
            "error_ratio": found["server errors"].used,
            "drop_ratio": found["dropped"].used,
            "refusal_s": found["refusal"].used,
        },
    }
    if times is not None:
        changes["latency"] = {
            "first_token_s": times.first_token_s.used,
            "per_token_s": times.per_token_s.used,
            "sigma": min(3.0, times.sigma.used),
            "stall_ratio": times.stall_ratio.used,
            "stall_min_s": times.stall_min_s,
            "stall_max_s": times.stall_max_s,
            "noise": [
                {"from_tokens": begin, "log_ratios": [round(float(value), 5) for value in shape]}
                for begin, shape in times.noise.groups
            ],
        }
    changes["latency"] = {**changes.get("latency", base.latency.model_dump()), "recorded": False}
    turnaround = fitted(observed.turnarounds_s)
    if turnaround is not None:
        p50, p95, factor = turnaround
        measured = {"known_within": factor, "measured": len(observed.turnarounds_s)}
        changes["batch_api"] = {**base.batch_api.model_dump(), "turnaround_s": (p50, p95), **measured}
    learnt = [name for name, figure in LEARNT.items() if found[figure].known]
    learnt += ["latency"] if times is not None else []
    learnt += ["counts in headers"] if _counts(observed) else []
    return base.with_(**changes, learnt=tuple(learnt), learnt_from=observed.label)


def _unknowns(observed: Observed, answers: NDArray[np.int64], times: LatencyFit | None, found: QuotaFit) -> Unknowns:
    """Return what is still unknown of another stretch like this one; default ranges if the log cannot narrow them."""
    told: dict[str, Any] = {}
    if found["charge rule"].known:
        told["charge_rules"] = False
    if found["settles"].known:
        told["settles"] = float(found["settles"].used)
    if _shows_no_window(observed, found):
        told["windows"] = True
    others = found["share of others"]
    if others.low is not None and others.high is not None:
        told["cotenant_share"] = (min(0.95, round(others.low, 4)), min(0.95, round(others.high, 4)))
    if times is not None:
        done = observed.answered
        took_s = observed.took_s[done]
        usable = (took_s > 0.0) & (times.stall < 0.5)
        expected_s = times.line(observed.tries.output_tokens[done].astype(np.float64))
        told["latency_factor"] = fits.factor(took_s[usable] / expected_s[usable])
    if len(answers) >= fits.LEAST_ANSWERS:
        told["output_factor"] = fits.factor(_by_expected(observed, answers))
    return Unknowns(**told)


def _by_expected(observed: Observed, answers: NDArray[np.int64]) -> Real:
    """Return answer lengths as shares of what requests with such caps get, in order of time (a batch: its own order).

    The order of launches would reflect the settings: long answers come first if they are launched first.
    """
    rows = observed.rows()
    rows = rows[observed.answered[rows]]
    of = cap_classes(observed.tries.max_tokens[rows], np.arange(len(rows)))
    expected = np.bincount(of, answers) / np.maximum(1, np.bincount(of))
    found = answers / np.maximum(expected[of], 1e-9)
    return found[np.argsort(observed.request[rows], kind="stable")] if observed.batch else found


def _shows_no_window(observed: Observed, found: QuotaFit) -> bool:
    """Return whether neither counts in headers nor refusals show anything of how minutes are counted."""
    return not found["window"].known and not (observed.stated[:, [1, 3]] >= 0.0).any()


def _notes(observed: Observed, found: QuotaFit) -> tuple[str, ...]:
    notes = []
    if _shows_no_window(observed, found):
        notes.append(
            "learnt nothing about the window, nor when tokens count: no header states counts, and too few refusals "
            "came; forecasts and plans draw both: ask by `paceline probe`"
        )
    if found["share of others"].known and found["share of others"].used > 0.0:
        notes.append("others are assumed to use their share evenly: bursts are not fitted")
    if (observed.tries.max_tokens < 0).all():
        notes.append("the log states no output caps: none is declared")
    notes.append(
        "not fitted, left at the defaults: daily limits, slices of a minute, ramp limits, cut answers without text"
    )
    return tuple(notes)


# ---------------------------------------------------------------- another stretch of the same kind


@dataclass(frozen=True, slots=True)
class CalibratedForecast:
    """A forecast of another log with this many requests: (median, low, high), with 95 % of draws between low and high.

    `tokens_per_min`: prompt and output, over the log's whole length; None without arrivals. `makespan_s`: the
    scenario's.
    """

    requests: int
    tokens_per_min: tuple[float, float, float] | None
    makespan_s: tuple[float, float, float]


def outlook(
    scenario: Scenario, requests: int = 0, *, draws: int = DRAWS, unknowns: Unknowns | None = None
) -> CalibratedForecast:
    """Return the forecast for another `requests` requests of the same kind (0 = as many as the scenario has).

    Each draw has other rows (`redrawn`, in stretches by `fits.block_s`), another seed, and another provider, within
    what the log left open of its times, stalls and faults. `unknowns`: those of the calibration.
    """
    workload = scenario.workload
    requests = requests or len(workload)
    tokens = (workload.prompt_tokens + workload.output_tokens).astype(np.float64)
    at_s = workload.arrival_s if workload.has_arrivals else np.arange(len(workload), dtype=np.float64)
    length = fits.block_s(at_s, tokens) if len(workload) > 1 else 1.0
    rates, ends = [], []
    for seed in range(draws):
        drawn = redrawn(workload, requests, length, seed)
        rates.append(tokens_per_min(drawn))
        case = case_of(scenario.with_(workload=drawn, provider=_refitted(scenario, unknowns, seed)))
        ends.append(simulated(case, scenario.seed + seed).summary(case.grant).makespan_s)
    stretches = max(2, round((float(np.ptp(at_s)) or 1.0) / length)) if workload.has_arrivals else 16
    rate = _spread(rates, stretches) if workload.has_arrivals else None
    return CalibratedForecast(requests, rate, _spread(ends, stretches))


def _refitted(scenario: Scenario, unknowns: Unknowns | None, seed: int) -> ProviderConfig:
    """Return the provider as another log of the same kind might have shown it."""
    provider, n = scenario.provider, len(scenario.workload)
    rng = np.random.default_rng(seed)

    def share(ratio: float) -> float:
        return float(rng.beta(ratio * n + 0.5, (1.0 - ratio) * n + 0.5)) if ratio > 0.0 else 0.0

    # The range covers the error of this log and of the next; the simulation already includes the latter.
    spread = 0.0 if unknowns is None else float(np.log(unknowns.latency_factor[1])) / NORMAL_95 / 2.0**0.5
    late, faults = provider.latency, provider.faults
    return provider.with_(
        latency={
            **late.model_dump(),
            "scale": late.scale * float(np.exp(spread * rng.standard_normal())),
            "stall_ratio": share(late.stall_ratio),
        },
        faults={
            **faults.model_dump(),
            "error_ratio": share(faults.error_ratio),
            "drop_ratio": share(faults.drop_ratio) * (1.0 - faults.error_ratio),
        },
    )


def tokens_per_min(workload: Workload) -> float:
    """Return prompt and output tokens per minute of a workload with arrivals, over its whole length."""
    span_s = float(np.ptp(workload.arrival_s))
    total = float((workload.prompt_tokens + workload.output_tokens).sum())
    return 60.0 * total / span_s if span_s > 0.0 else 0.0


def _spread(values: Sequence[float], stretches: int) -> tuple[float, float, float]:
    """Return the median and the 95 % interval for another log, normal in logarithms because draws lack the tails.

    The number of draws is arbitrary, but their variance is known only from the log's `stretches`, and is biased low by
    one degree of freedom: hence Student's t with that many, and the bootstrap's correction factor.
    """
    logs = np.log(np.maximum(values, 1e-9))
    factor = float(stats.t.ppf(0.975, stretches - 1)) * float(np.sqrt(stretches / (stretches - 1.0)))
    half = factor * float(logs.std(ddof=1)) * float(np.sqrt(1.0 + 1.0 / len(logs)))
    middle = float(logs.mean())
    return float(np.median(values)), float(np.exp(middle - half)), float(np.exp(middle + half))
