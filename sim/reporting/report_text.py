"""The sentences of the report: the answer, what holds the batch back, what is noise and what is unknown.

A sentence states only what the adjacent figures show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from governor.forecast.summary import Grant
from governor.model.policy import KNOB_BY_ENV
from governor.model.prices import dollars_text
from sim.base.palette import CAUSE_LABELS, OBJECTIVES, STYLES
from sim.base.words import below, between, duration, number, percent
from sim.experiment.information import Finding, Gain
from sim.experiment.results import (
    Estimate,
    Forecast,
    Percentile,
    Plan,
    Recommendation,
    Step,
    at_most,
    percentile,
)

# A gain below this share of the objective is not mentioned.
SAME = 0.005
# A gain below this share of the objective reads as "none": the search cannot distinguish it from zero.
_NOTHING = 0.001
# From this efficiency on, the provider's limit holds the batch back, regardless of what the queue's head waits for.
SATURATED = 0.9


def interval(estimate: Estimate, form: str = "duration") -> str:
    """Return the 95 % interval of the mean, "from to", or a note for a single run.

    `form`: duration, number or percent.
    """
    if estimate.n < 2:
        return "one run: no interval"
    return between(estimate.low, estimate.high, form)


def lost_text(forecast: Forecast) -> str:
    """Return the requests lost in all runs together: "0 of 12,000, below 0.025 % at 95 % confidence"."""
    seen = f"{forecast.lost:,} of {forecast.trials:,}"
    return f"{seen}, {below(forecast.lost_at_most)}"


def limits_text(found: Percentile) -> str:
    """Return the 95 % limits of a percentile, "from to", or a note if the runs cannot bound it."""
    if found.bounded and math.isfinite(found.low):
        return between(found.low, found.high)
    runs = f"{found.n} run{'s' if found.n != 1 else ''}"
    return f"above {duration(found.low)}: {runs} cannot bound it" if math.isfinite(found.low) else f"{runs}: no limits"


def policies_of(plan: Plan) -> dict[str, Forecast]:
    """Return the three columns of the headline, by a name of STYLES."""
    return {"now": plan.now, "guardrails": plan.guardrails.forecast, "recommended": plan.full.forecast}


def throttled_limit(plan: Plan) -> float:
    """Return the 429s allowed per 100 requests."""
    return plan.limits.get("max_throttled_per_100", 1.0)


def stress_limits(plan: Plan) -> dict[str, float]:
    """Return the limits under stress: in a small batch a refusal or two does not break a limit."""
    return {**plan.limits, "max_throttled_per_100": plan.limits.get("max_throttled_per_100_under_stress", 1.0)}


def broken_in(f: Forecast, limits: Mapping[str, float]) -> str:
    """Return which of the plan's limits a forecast breaks: "lost", "over" (too many 429s) or "" for none."""
    if f.lost / max(1, f.trials) > limits.get("max_lost", 0.0):
        return "lost"
    return "over" if f["throttled_per_100"].mean > limits.get("max_throttled_per_100", math.inf) else ""


def promise(plan: Plan) -> str:
    """Return when the recommendation finishes: under the assumptions, and over the drawn conditions."""
    best = plan.full.forecast
    said = f"{duration(best['makespan_s'].p50)} if the provider is as assumed"
    held = plan.promise
    if held is None:
        return f"{said}; what is not known was not drawn"
    if held.n < 19:
        longest = duration(max(plan.drawn.outcomes["recommended"].makespan_s)) if plan.drawn else ""
        return f"{said}; at the longest {longest} in the {held.n} conditions that were drawn from what is not known"
    return f"{said}; by {duration(held.value)} in 95 of 100 of the conditions that cannot be ruled out"


def promise_note(plan: Plan) -> str:
    """Return the basis of the promise; "" if no conditions were drawn."""
    held, found = plan.promise, plan.drawn
    if held is None or found is None:
        return ""
    lossy = int((found.outcomes["recommended"].lost_per_100 > 0.0).sum())
    lost = f"requests are lost in {lossy} of them" if lossy else "no request is lost in any of them"
    today = duration(percentile(found.outcomes["now"].makespan_s, 0.95).value)
    return (
        f"{found.draws} conditions were drawn: {found.ranges}. 95 % limits of the second time: "
        f"{limits_text(held)}; {lost}. "
        f"Today's settings: {duration(plan.now['makespan_s'].p50)}, and by {today}."
    )


def about(grant: Grant) -> str:
    """Return what the provider grants, in one line."""
    limits = [
        f"{limit:,.0f} {unit}"
        for limit, unit in (
            (grant.tpm_limit, "tokens per minute"),
            (grant.rpm_limit, "requests per minute"),
            (grant.tpd_limit, "tokens per day"),
            (grant.rpd_limit, "requests per day"),
        )
        if limit > 0.0
    ]
    return f"The quota: {_listed(limits) or 'no limit is stated'}."


def answer(plan: Plan) -> list[str]:
    """Return the answer in a few sentences, the most important first."""
    now, few, best = plan.now, plan.guardrails, plan.full
    said = f"With today's settings the {now.requests:,} requests {_fares(now, plan)}."
    if plan.already_good:
        first = "Nothing needs to change: today's settings are as good as any of the "
        found = [f"{first}{plan.settings_tried:,} that were tried.", said]
        if best.steps and best.gain_s.mean > 0.0:
            found.append(f"The best that was found would gain {_gain(best, plan)}.")
        return [*found, *_deadline(plan)]
    said += f" With the recommended settings they {_fares(best.forecast, plan)}: {_change(best, plan)}."
    if few.steps:
        alone = f"Changing only the eight guardrail settings, with the code as it is, they {_fares(few.forecast, plan)}"
        return [said, f"{alone}: {_change(few, plan)}.", *_deadline(plan)]
    return [said, "Changing only the eight guardrail settings, nothing better was found.", *_deadline(plan)]


def _fares(f: Forecast, plan: Plan) -> str:
    """Return a policy's outcome: "finish after about 3 min 13 s, with no 429 and no request lost"."""
    when = f"finish after about {duration(f['makespan_s'].p50)}"
    if plan.objective == "p95_latency":
        when += f" and 19 of 20 are answered within {duration(f['latency_p95_s'].mean)}"
    throttled, lost = f["throttled"].mean, f["failed"].mean
    refused = (
        "no refusal (429)" if not throttled else f"{number(throttled)} refusal{'s' if throttled != 1 else ''} (429)"
    )
    gone = "no request lost" if not lost else f"{number(lost)} request{'s' if lost != 1 else ''} lost"
    return f"{when}, with {refused} and {gone}"


def _gain(found: Recommendation, plan: Plan) -> str:
    return f"{duration(found.gain_s.mean)} ({percent(gain_share(found, plan))})"


def gain_share(found: Recommendation, plan: Plan) -> float:
    """Return a recommendation's gain as a share of today's objective; nan if today's is unknown."""
    today = plan.now[OBJECTIVES[plan.objective][1]].mean
    return found.gain_s.mean / today if today > 0.0 else math.nan


def _change(found: Recommendation, plan: Plan) -> str:
    share = gain_share(found, plan)
    sooner, later = ("sooner", "later") if plan.objective == "makespan" else ("faster", "slower")
    if math.isnan(share):
        return "a gain that cannot be stated, because today's settings complete nothing"
    if abs(share) < SAME:
        return "as fast as today" if broken_in(plan.now, plan.limits) == "" else "as fast, but within the limits"
    text = f"{percent(abs(share))} {sooner if share > 0.0 else later}"
    if share < -0.5:
        text = f"{1.0 - share:.2g} times as long"
    if share < 0.0 and broken_in(plan.now, plan.limits):
        text += ", the price of keeping the limits, which today's settings break"
    return text


def _deadline(plan: Plan) -> list[str]:
    wish = plan.limits.get("finish_by_s")
    if wish is None:
        return []
    late = plan.full.forecast.percentile("makespan_s", 0.95)
    if not late.bounded:
        return [f"{late.n} runs cannot say whether 19 of 20 are done within the wanted {duration(wish)}."]
    kept = "which keeps" if late.high <= wish else "which misses"
    return [
        f"At 95 % confidence 19 of 20 runs are done after {duration(late.high)}, {kept} the wanted {duration(wish)}."
    ]


def held_back(plan: Plan) -> str:
    """Return the causes of waiting, today and with the recommendation."""
    today, then = _causes(plan.now), _causes(plan.full.forecast)
    said = f"Today {today}." if today else "Today no request waits."
    said += f" With the recommended settings {then}." if then else " With the recommended settings none waits."
    efficiency = plan.full.forecast["efficiency"].mean
    if efficiency >= SATURATED:
        said += (
            f" Then {percent(efficiency)} of what any scheduler could reach with this quota is reached: beyond that, "
            "only a higher limit or fewer tokens help."
        )
    return said


def _causes(f: Forecast) -> str:
    total = sum(f.waits_s.values())
    if total < 0.05 * f.requests:
        return ""
    ranked = sorted(f.waits_s.items(), key=lambda item: -item[1])
    parts = [f"{percent(s / total)} of all waiting is for {CAUSE_LABELS[cause][0]}" for cause, s in ranked[:1]]
    parts += [f"{percent(s / total)} for {CAUSE_LABELS[cause][0]}" for cause, s in ranked[1:3] if s > 0.02 * total]
    return _listed(parts)


def tried(plan: Plan) -> str:
    """Return how much was searched, and how to read the front."""
    return (
        f"{plan.settings_tried:,} settings were tried in {plan.runs_simulated:,} simulated runs "
        f"({plan.requests_simulated:,} requests in all), each judged by its {OBJECTIVES[plan.objective][0]} and by how "
        "often the provider refuses. Those that lose requests never win over those that lose none."
    )


def robustness(found: Recommendation, plan: Plan) -> list[str]:
    """Return the cost of safety: each faster setting that was passed over, and the condition that rules it out."""
    name, figure = OBJECTIVES[plan.objective]
    return [
        f"Robustness costs {duration(each.price_s.mean)} ({interval(each.price_s)}): {each.name} has a {name} of "
        f"{duration(each.forecast[figure].mean)} as assumed, but {each.reason}."
        for each in found.passed_over
    ]


def find_out(plan: Plan) -> list[str]:
    """Return what is worth finding out before the batch starts: a sentence for each, the best first."""
    return [f"{_value_of(each, plan)}; {_settled_by(each)}." for each in plan.find_out]


def _value_of(found: Finding, plan: Plan) -> str:
    known = f"Knowing {found.unknown}"
    promise = "" if found.narrower is None else f"brings the promise down by {_gain_text(found.narrower)}"
    if_so = ", if it is so" if found.if_so else ""
    if found.sooner is None:
        return f"{known} {promise}{if_so}"
    latency = " of latency P95" if plan.objective == "p95_latency" else ""
    return f"{known} is worth {_gain_text(found.sooner)}{latency}{f' and {promise}' if promise else ''}{if_so}"


def _gain_text(gain: Gain) -> str:
    return f"{duration(gain.mean_s)} ({between(gain.low_s, gain.high_s)})"


def _settled_by(found: Finding) -> str:
    """Return the command that settles a finding, and its cost."""
    usd = found.cost_usd
    if not found.requests:
        cost = "makes a few calls" if usd is None else f"costs up to {dollars_text(usd)}"
        low_s, high_s = found.takes_s or (0.0, 0.0)
        return f"`{found.command}` {cost} and takes {low_s / 60.0:.0f} to {high_s / 60.0:.0f} min"
    source = "the results" if found.command == "--outputs-from" else "a log"
    older = f"`{found.command}` reads it from {source} of earlier requests"
    first = f"the first {found.requests:,} of these in about {duration((found.takes_s or (0.0, 0.0))[1])}"
    cost = "" if usd is None else f", for {dollars_text(usd)} of what the batch costs anyway"
    return f"{older} at no cost, or from {first}{cost}"


def worth(step: Step, plan: Plan) -> str:
    """Return a change's gain with all others as recommended: "35 min", "none as assumed", "costs 12 s"."""
    today = plan.full.forecast[OBJECTIVES[plan.objective][1]].mean
    if abs(step.worth_s.mean) < _NOTHING * today:
        return "none as assumed"
    text = duration(abs(step.worth_s.mean))
    return text if step.worth_s.mean > 0.0 else f"costs {text}"


def why(step: Step, plan: Plan) -> str:
    """Return why a setting changes; if it gains nothing under the assumptions, also what it protects from."""
    if step.worth_s.mean >= _NOTHING * plan.full.forecast[OBJECTIVES[plan.objective][1]].mean:
        return step.reason
    if step.breaks:
        return f"{step.reason}; with {KNOB_BY_ENV[step.env].text(step.old)}, {step.breaks}"
    if step.stress_worth_s > 0.0:
        return f"{step.reason}; under the stress set worth {duration(step.stress_worth_s)} on average"
    return step.reason


def kept_counts(plan: Plan) -> str:
    """Return in how many conditions of the stress set each policy keeps the limits."""
    if not plan.stress:
        return "No other conditions were simulated."
    parts = []
    for who in ("recommended", "guardrails", "now"):
        known = [row.forecasts[who] for row in plan.stress if who in row.forecasts]
        kept = sum(not broken_in(f, stress_limits(plan)) for f in known)
        parts.append(f"{STYLES[who].label} in {kept}")
    return (
        f"The plan was tested under {len(plan.stress)} other conditions, one thing changed in each. "
        f"The limits are kept: {_listed(parts)} of them."
    )


def drawn_text(plan: Plan) -> str:
    """Return what was drawn, and in how many draws each policy keeps the limits; "" if nothing was drawn."""
    found = plan.drawn
    if found is None:
        return ""
    allowed = stress_limits(plan)["max_throttled_per_100"], plan.limits.get("max_lost", 0.0)
    kept = [f"{STYLES[who].label} in {found.kept(who, *allowed)}" for who in ("recommended", "guardrails", "now")]
    return (
        f"All that is not known at once, drawn {found.draws} times from these ranges: {found.ranges}. The limits are "
        f"kept: {_listed(kept)} of {found.draws} draws."
    )


def drawn_line(plan: Plan) -> str:
    """Return the recommendation's outcome over the draws, in one line; "" if nothing was drawn."""
    if plan.drawn is None or "recommended" not in plan.drawn.outcomes:
        return ""
    found = plan.drawn.outcomes["recommended"]
    times = [duration(value) for value in (found.median("objective_s"), found.bad("objective_s"))]
    worst = duration(found.worst("objective_s"))
    throttled, lost = found.worst("throttled_per_100"), found.worst("lost_per_100")
    return (
        f"{OBJECTIVES[plan.objective][0]} over {plan.drawn.draws} drawn conditions: median {times[0]}, one in 20 above "
        f"{times[1]}, worst {worst}; at worst {number(throttled)} 429s and {number(lost)} lost per 100 requests"
    )


def sensitivity_text(plan: Plan) -> str:
    """Return how to read the sensitivities."""
    found = plan.sensitivity
    if found is None:
        return ""
    return (
        "Each quantity is moved alone by two thirds of the range around the recommendation (two steps of the search's "
        "values to either side), from many places: the bar is the mean change, up or down (Morris' elementary "
        "effects). Each other value of a rule or switch takes the recommended one's place alone: the bar is the "
        "change, run by run under the same chance. The line is the 95 % interval "
        f"({found.runs:,} runs). A setting with a short bar can stay at any convenient value."
    )


# ---------------------------------------------------------------- how sure


def noise(plan: Plan) -> list[str]:
    """Return how far the figures would move with other seeds, which more replications narrow."""
    name, figure = OBJECTIVES[plan.objective]
    found = []
    for who, f in policies_of(plan).items():
        e = f[figure]
        width = f"± {duration(e.half_width)}" if e.n > 1 else "(one run: no interval)"
        spread = f"; 9 of 10 runs: {between(e.p5, e.p95)}" if e.n > 1 else ""
        found.append(f"{STYLES[who].label}: mean {name} {duration(e.mean)} {width}{spread}")
    gain = plan.full.gain_s
    if gain.n > 1:
        found.append(f"gain: {duration(gain.mean)} ± {duration(gain.half_width)}, run by run under the same chance")
    found.append(f"requests lost with the recommended settings: {lost_text(plan.full.forecast)}")
    return found


def unknown(plan: Plan, assumed: Sequence[str]) -> list[str]:
    """Return the recommendation's spread over the stress set, and the names of the assumed inputs."""
    name, figure = OBJECTIVES[plan.objective]
    under = [(row.forecasts["recommended"], row.name) for row in plan.stress if "recommended" in row.forecasts]
    found = []
    timed = sorted((f[figure].mean, at) for f, at in under if math.isfinite(f[figure].mean))
    if timed:
        (low, at_low), (high, at_high) = timed[0], timed[-1]
        here = plan.full.forecast[figure].mean
        spread = f"{duration(low)} ({at_low}) to {duration(high)} ({at_high})"
        found.append(f"{name} with the recommended settings: {spread}; as assumed {duration(here)}")
    if under:
        refused, at = max((f["throttled_per_100"].mean, at) for f, at in under)
        found.append(f"429s per 100 requests: up to {number(refused)} ({at})" if refused else "429s: none")
        gone, at = max((f.lost / max(1, f.trials), at) for f, at in under)
        trials = sum(f.trials for f, _ in under)
        none = f"requests lost: 0 of {trials:,}, {below(at_most(0, trials))}"
        found.append(f"requests lost: up to {percent(gone)} ({at})" if gone else none)
    line = drawn_line(plan)
    if line:
        found.append(line)
    return [*found, f"assumed, not measured: {_listed(assumed) or 'nothing'} (described below)"]


def over_time_caption(grant: Grant) -> str:
    """Return how to read the curves over time."""
    text = "One run of each, under the same chance. Tokens count from the moment at which the provider admits them."
    if grant.tpm_limit > 0.0 and not grant.minute_reset:
        text += (
            " The limit is a bucket that refills continuously: at the start, when it is full, and after a quiet spell "
            "one minute may carry up to twice the limit."
        )
    return text + " The lower panel has one time axis for all: steeper is faster, and each curve ends with its run."


def _listed(parts: Iterable[str]) -> str:
    """Return the parts as a list in words: "a", "a and b", "a, b and c"."""
    words = list(parts)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def front_caption(plan: Plan) -> str:
    """Return how to read the front."""
    return (
        "Every mark is a setting; further down is faster, further left is refused less often. Large marks are the "
        "published estimates, on fresh seeds; small ones are from the search, with fewer runs each. Right of the "
        f"dashed line the provider refuses more than {throttled_limit(plan):g} per 100 requests."
    )
