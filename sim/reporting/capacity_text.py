"""The limit that is needed, and the number of requests that fit, as text for a terminal or a pipe."""

from __future__ import annotations

import math
from collections.abc import Sequence

from governor.batchapi.limits import QUEUE_HEADROOM
from governor.model.phrases import plural
from governor.model.policy import KNOB_BY_NAME, Policy
from governor.model.prices import dollars_text
from sim.base import words
from sim.base.layout import table, wrapped
from sim.des.mixed import FLEX
from sim.reporting.terminal import headline, held_back, inputs_text
from sim.scenario.scenario import Scenario
from sim.selection.batch_api import AUTO, Terms, Way, cheapest
from sim.selection.capacity_results import BOUND, LARGEST, SETTINGS, TAIL, Capacity, HowMany, LimitProbe
from sim.selection.reserved import ReservedComparison
from sim.selection.space import changed_knobs
from sim.selection.split import LIVE, Split


def capacity_text(scenario: Scenario, found: Capacity, width: int) -> str:
    """Return readable text on which limit is needed."""
    steady = found.wait_p95_s >= 0.0
    probes = _telling(found)
    rows = [["tokens/min", "requests/min", *_measures(steady), "in time", "429s/100", "lost", ""]]
    rows += [[*_limits(p), *_figures(p, steady), p.name or _role(found, p)] for p in probes]
    parts = [
        wrapped(headline(scenario), width),
        wrapped(_answer(scenario, found), width),
        table(rows, width=width),
        *_settings(scenario, found.smallest, found.tuned, width),
        inputs_text({k: v for k, v in scenario.provenance().items() if k != "limits"}, width),
    ]
    if steady:
        parts.insert(2, wrapped(_warm_up(scenario, found), width))
    return "\n\n".join(parts)


def how_many_text(scenario: Scenario, found: HowMany, width: int) -> str:
    """Return readable text on how many requests fit."""
    wish = f"within {words.duration(found.finish_by_s)}"
    provider = scenario.provider
    limits = [f"{provider.tpm:,} tokens"] if provider.tpm else []
    limits += [f"{provider.rpm:,} requests"] if provider.rpm else []
    under = f"at {' and '.join(limits)} per minute" if limits else "without a limit"
    if found.most is None:
        said = f"Not even one request like these is done {wish} {under}."
    else:
        beyond = "" if found.above else " (the largest batch that was tried)"
        said = (
            f"{found.requests:,} requests like these are done {wish} {under}{beyond}. "
            f"{_share(found.most, found.confidence)}"
        )
    rows = [["requests", *_measures(False), "in time", "429s/100", "lost", ""]]
    for probe, role in ((found.most, "most that fit"), (found.above, "too many")):
        if probe is not None:
            rows.append([f"{probe.forecast.requests:,}", *_figures(probe, False), role])
    parts = [
        wrapped(headline(scenario), width),
        wrapped(said, width),
        table(rows, width=width),
        *_settings(scenario, found.most, found.tuned, width),
        inputs_text(scenario.provenance(), width),
    ]
    return "\n\n".join(parts)


def reserved_text(found: ReservedComparison, width: int) -> str:
    """Return readable text on paying per token beside reserving."""
    unit, best = found.unit, found.best
    load = f"{found.tpm:,.0f} tokens per minute on average, {found.peak_tpm:,.0f} in the largest minute"
    if best is None:
        said = f"Paying per token is the cheapest way for {found.model} at {load}."
    else:
        said = (
            f"Reserving {best.units:,} {unit} of {found.provider} ({best.term}) is the cheapest way for {found.model} "
            f"at {load}: {dollars_text(best.usd_per_hour)} per hour, not {dollars_text(found.tokens_usd_per_hour)}."
        )
    rows = [["", f"{unit}", "$/hour", "spilled", "used", "cheaper from, tokens/min", "tier for the spill"]]
    rows.append(["per token", "", dollars_text(found.tokens_usd_per_hour), "", "", "", found.tier or "none published"])
    for each in found.choices:
        pays = "at no load" if each.pays_from_tpm is None else f"{each.pays_from_tpm:,.0f}"
        tier = each.spill_tier or ("none published" if each.spilled > 0.0 else "no spill")
        shares = words.percent(each.spilled), words.percent(each.used)
        rows.append([each.term, f"{each.units:,}", dollars_text(each.usd_per_hour), *shares, pays, tier])
    note = (
        f"Units and prices: {found.source}. Minutes are counted whole: bursts within one, and the time that spilled "
        "requests take, are not in it."
    )
    return "\n\n".join([wrapped(said, width), table(rows, width=width), wrapped(note, width)])


# ---------------------------------------------------------------- parts


def _measures(steady: bool) -> list[str]:
    return ["P95 wait", "up to"] if steady else ["P50", "P95"]


def _limits(probe: LimitProbe) -> list[str]:
    return [f"{probe.tpm:,}", f"{probe.rpm:,}" if probe.rpm else "no limit"]


def _figures(probe: LimitProbe, steady: bool) -> list[str]:
    e = probe.forecast["wait_p95_s" if steady else "makespan_s"]
    answered = probe.forecast.lost < probe.forecast.trials
    return [
        words.duration(e.p50) if answered else "-",
        words.duration(e.p95) if answered else "-",
        f"{probe.on_time:,} of {probe.runs:,}",
        words.number(probe.forecast["throttled_per_100"].mean),
        f"{probe.forecast.lost:,}",
    ]


def _telling(found: Capacity) -> list[LimitProbe]:
    """Return the probes worth showing: the largest that misses, the smallest that meets, no binding limit, tiers."""
    limits = (found.below, found.smallest, found.unlimited)
    return [*(probe for probe in limits if probe is not None), *found.tiers]


def _role(found: Capacity, probe: LimitProbe) -> str:
    if probe is found.smallest:
        return "smallest that meets it"
    return "misses it" if probe is found.below else "tokens never bind"


def _wish(found: Capacity) -> str:
    if found.wait_p95_s >= 0.0:
        return f"keep the 95th percentile of waits within {words.duration(found.wait_p95_s)}"
    return f"finish within {words.duration(found.finish_by_s)}"


def _share(probe: LimitProbe, confidence: float) -> str:
    return (
        f"{probe.on_time:,} of {probe.runs:,} runs on fresh seeds were in time: at least "
        f"{words.percent(probe.on_time_at_least)} of all are, with 95 % confidence ({words.percent(confidence)} asked)."
    )


def _decided(found: Capacity) -> str:
    """Return which constraint decides the answer, and how far from binding the others are."""
    d = found.decided
    if d is None:
        return ""
    steady = found.wait_p95_s >= 0.0
    what = "waits" if steady else "finish times"
    bound = "the traffic's own average" if steady else "the bound of any schedule"
    others = f"{bound} is {d.bound_tpm:,.0f}, the largest request needs {d.largest_tpm:,.0f}"
    return {
        LARGEST: f"The largest request decides: it needs {d.largest_tpm:,.0f}; {bound} is {d.bound_tpm:,.0f}.",
        BOUND: f"{bound.capitalize()} decides: {d.bound_tpm:,.0f}; the largest request needs {d.largest_tpm:,.0f}.",
        TAIL: f"The tail decides: {what} are {words.duration(d.p50_s)} in the median and {words.duration(d.p95_s)} at "
        f"P95; {others}.",
        SETTINGS: f"The settings decide, not the provider: {others}.",
    }[d.by]


def _answer(scenario: Scenario, found: Capacity) -> str:
    """Return the answer in a few sentences."""
    wish = _wish(found)
    settings = "with settings tuned to it" if found.tuned else "with these settings"
    sentences = []
    if found.smallest is None:
        free = found.unlimited
        waits = held_back(free.forecast.waits_s, free.forecast.policy, 0.0, 0.0)
        after = words.duration(free.forecast["makespan_s"].p50)
        better = "" if found.tuned else " Without --keep-settings better ones are looked for."
        sentences.append(
            f"No limit of tokens per minute is enough to {wish} {settings}: even where it never binds, "
            f"the batch finishes after {after} (P50). {waits}{better}"
        )
    else:
        sentences.append(f"To {wish}: {found.smallest.tpm:,} tokens per minute, {settings}.")
        sentences.append(_share(found.smallest, found.confidence))
        sentences.append(_decided(found))
    if found.tier is not None:
        sentences.append(f"Smallest published tier: {found.tier.name} ({found.tier.tpm:,} tokens per minute).")
    else:
        sentences.append(f"No published tier of {found.model} is enough.")
    if found.too_small_tiers:
        sentences.append(f"Too small for the largest request: {', '.join(found.too_small_tiers)}.")
    return " ".join(sentences)


def _warm_up(scenario: Scenario, found: Capacity) -> str:
    """Return a note on the warm-up that was left out, and on the share of the limit that the traffic takes."""
    load = f"The trace offers {found.steady_load_tpm:,.0f} tokens per minute on average"
    if found.smallest:
        load += f", {words.percent(found.steady_load_tpm / found.smallest.tpm)} of that limit"
    return (
        f"{load}; below that waits would grow without end. Wait: from arrival to the launch that was answered. Left "
        f"out as warm-up: the first {found.warm_up_requests:,.0f} of {len(scenario.workload):,} requests (MSER-5, "
        f"median over runs). The trace lasts {words.duration(float(scenario.workload.arrival_s.max()))}, and "
        "a minute's worth of tokens is available at its start: for a trace of a few minutes the answer is optimistic."
    )


def _settings(scenario: Scenario, probe: LimitProbe | None, tuned: bool, width: int) -> list[str]:
    """Return the settings that suit the answer, as env lines; empty if they are today's."""
    if not tuned or probe is None:
        return []
    policy: Policy = probe.forecast.policy
    names = [name for name in changed_knobs(scenario.policy, policy) if name not in ("tpm_limit", "rpm_limit")]
    if not names:
        return [wrapped("No setting needs to change but the limits.", width)]
    knobs = [KNOB_BY_NAME[name] for name in names]
    said = ", ".join(f"{knob.env}={knob.text(getattr(policy, knob.name))}" for knob in knobs)
    return [
        wrapped(
            f"Settings tuned to it: {said}. Found by a short search; `paceline plan` goes further, and under stress.",
            width,
        )
    ]


# ---------------------------------------------------------------- the Batch API


def split_text(found: Split, width: int) -> str:
    """Return readable text on which files were written."""
    rows = [["file", "model", "requests", "MB", "input tokens"]]
    for part in found.parts:
        size = f"{part.bytes / 1e6:,.1f}"
        rows.append([part.name, part.model, f"{part.requests:,}", size, f"{part.input_tokens:,}"])
    files = plural(len(found.parts), "file")
    said = [f"{plural(found.requests, 'request')} in {files} in {found.folder}, each in exactly one."]
    if found.waves > 1:
        said.append(f"Hand in a wave when the one before it has ended: {found.waves:,} waves, one fills the queue.")
    if found.queue_tokens:
        said.append(
            f"Input tokens are estimated from the text, so {QUEUE_HEADROOM:.0%} of the queue of "
            f"{found.queue_tokens:,} per model is left free."
        )
    if found.note:
        said.append(f"{found.note}.")
    if any(part.name == LIVE for part in found.parts):
        said.append(f"`paceline run {found.folder}/{LIVE}` sends the rest live.")
    return "\n\n".join((table(rows, width=width), wrapped(" ".join(said), width)))


def ways_text(ways: Sequence[Way], terms: Terms, deadline_s: float, confidence: float, width: int) -> str:
    """Return a readable comparison of live, flex, Batch and mixes, with its assumptions."""
    choice = ways_choice(ways, terms, deadline_s, confidence)
    return "\n\n".join(
        (wrapped(choice, width), table(ways_rows(ways), width=width), wrapped(ways_note(ways, terms), width))
    )


def ways_rows(ways: Sequence[Way]) -> list[list[str]]:
    """Return the comparison as a table, its header first."""
    rows = [["", "for", "live", "cost", "done by then", "P50", "95 of 100", ""]]
    for way in ways:
        told = words.duration(way.deadline_s) if way.deadline_s is not None else ""
        front = "front" if way.on_front else ""
        done = words.percent(way.done_probability)
        share = words.percent(way.live_share)
        rows.append([way.name, told, share, dollars_text(way.cost_usd), done, *map(_after, _times(way)), front])
    return rows


def ways_note(ways: Sequence[Way], terms: Terms) -> str:
    """Return what the comparison rests on, in sentences."""
    p50, p95 = terms.turnaround_s
    queue = (
        f"a queue of {terms.queue_tokens:,} input tokens per model" if terms.queue_tokens else "a queue without limit"
    )
    how = f"measured (batches: {terms.measured:,})" if terms.measured else "assumed, not measured"
    discount = f"; {terms.discount:.0%} off the price" if terms.discount is not None else ""
    said = (
        f"Live and flex are at the present limits and settings. The Batch API's turnaround is {how}: "
        f"{words.duration(p50)} (P50, known within a factor of {terms.factor:g}) to {words.duration(p95)} (P95), "
        f"log-normal, and a batch expires after 24 h; {queue}{discount}. auto: `paceline run --via auto --finish-by`, "
        f"told the time under 'for'; {plural(ways[0].runs, 'simulated run')} of each."
    )
    if any(way.name == FLEX for way in ways):
        said += " Flex is taken to answer at a third of the speed (assumed)."
    if terms.cached_share is not None:
        said += f" {terms.cached_share:.0%} of the prompt tokens are cached live, none in the Batch API."
    return said


def _times(way: Way) -> tuple[float, float]:
    return way.finish_s, way.promise_s


def _after(at_s: float) -> str:
    return words.duration(at_s) if math.isfinite(at_s) else "never"


def ways_choice(ways: Sequence[Way], terms: Terms, deadline_s: float, confidence: float) -> str:
    """Return which way to choose, in a sentence."""
    assumed = "" if terms.measured else ", if the Batch API's turnaround is as assumed"
    wish = f"within {words.duration(deadline_s)} with {words.percent(confidence)} probability"
    best = cheapest(ways, confidence)
    if best is None:
        best = max(ways, key=lambda way: way.done_probability)
        return f"Live, Batch API or both? None is done {wish}{assumed}; {best.name} comes nearest."
    cost = f" for {dollars_text(best.cost_usd)}" if best.cost_usd is not None else ""
    live = f" ({words.percent(best.live_share)} live)" if best.name == AUTO else ""
    return f"Live, Batch API or both? The cheapest way that is done {wish}{assumed}: {best.name}{live}{cost}."
