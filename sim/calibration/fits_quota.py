"""The quota, learnt from the headers and refusals of a log: charge rule, settling, limits, co-tenants, refusals.

Theory of operation. Each charge rule, settling or not, is a provider. From one count to the next each predicts what
remains; the rule with the smallest errors explains the log. Rules that charge every request of a log alike cannot be
distinguished, and the result says so. Others on the quota take at a rate: a share of the limit times the time between
two counts, never negative; it is fitted with each rule and not counted against the rule. A bucket that ran empty
between two counts hides what was taken before, so only gaps in which it cannot have run empty are fitted. Each window
is tried with each rule: a counter, of which nothing drains, looks like a bucket of which others take what it refills.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from governor.law import RPM, TPM
from governor.model.estimate import RULES
from sim.calibration.fits import EACH, Figure, quantile, share, unknown
from sim.calibration.fits_window import PHASE_STEP_S, WindowFit, middle_phase, retry_after, windows
from sim.calibration.observed import Observed
from sim.calibration.others import NOBODY_RATIO, Count, CountGap, gaps
from sim.model.provider_config import ProviderConfig
from sim.model.windows import MINUTE_S
from sim.model.workload import Real, charges
from sim.scenario.columns import LOST, REFUSED, SERVER_FAULT

# Counts that a rule is tried on: more would take long without changing the answer.
COUNTS_MOST = 3_000
# Those that a window is tried on, of which there are over thirty.
COUNTS_SCANNED = 240
# Others take a smaller share of the limit than this.
OTHERS_MOST = 0.9
LEAST_GAPS = 10
_RESAMPLES = 400
BLOCKS = 20
# A count off by this share of the median charge is unexplained; a rule that misses this many does not explain a log.
REACH_RATIO = 0.1
_UNEXPLAINED_MOST = 0.5
# A bucket that leaves no more than this unexplained needs no comparison with minutes of the clock.
CLEAR_LOSS = 0.1
# Of windows that leave more than this unexplained, none but a determined one shows what others took.
EXPLAINED_LOSS = 0.2
# Busy periods of the bucket: the shortest used, the total needed, and how they are cut.
BUSY_LEAST_S = 8.0
BUSY_TOTAL_S = 60.0
_PIECE_S = 20.0
# Rounding error of two stated counts.
_ROUNDING = 1.0
_TICK_S = 1.0


@dataclass(frozen=True, slots=True)
class Rule:
    """One provider and its prediction errors. `loss`: per gap, 0 to 1. `alike`: the rules that charge the same."""

    rule: str
    settles: bool
    loss: Real
    found: list[CountGap]
    refused: list[CountGap]
    alike: tuple[str, ...] = ()

    @property
    def mean_loss(self) -> float:
        """Return the share of the counts that the rule does not explain."""
        return float(self.loss.mean())


@dataclass(frozen=True, slots=True)
class QuotaFit:
    """The fitted quota. `changes`: (when, factor) of the minute limit. `rules`: those tried, best first.

    `window`: how the quota counts over time, learnt from which attempts were admitted.
    """

    figures: tuple[Figure, ...]
    changes: tuple[tuple[float, float], ...]
    rules: tuple[Rule, ...]
    window: WindowFit

    def __getitem__(self, name: str) -> Figure:
        return next(figure for figure in self.figures if figure.name == name)


def quota(found: Observed, base: ProviderConfig) -> QuotaFit:
    """Return the quota's figures; those that the log cannot determine keep the values of `base`."""
    counts = found.counts()
    stated = [count for count in counts if any(d == TPM for d, _, _ in count.stated)]
    limit, changes = _limit("tokens per minute", TPM, counts, base.tpm)
    requests, _ = _limit("requests per minute", RPM, counts, base.rpm)
    granted = base.with_(tpm=int(limit.used), rpm=int(requests.used))
    rules: tuple[Rule, ...] = ()
    why = "no header states what remains of the tokens"
    if (found.stated[:, 1] >= 0.0).any():
        why = "headers state what remains, but the log has no times, or no limit beside it"
    rule: Figure = unknown("charge rule", base.charge_rule, why)
    settles = unknown("settles", base.settles, why)
    others = unknown("share of others", base.cotenant.share, why)
    counting = unknown("refusals count", base.failed_requests_count, "no refusal states what remains")
    by_counts: list[Figure] = []
    if len(stated) >= LEAST_GAPS and not changes:
        near, by_counts = _window(found, counts[:COUNTS_SCANNED], granted)
        granted = near[0]
        rules = _rules(found, counts[:COUNTS_MOST], granted)
        rule, settles = _told(rules, base)
        best = rules[0]
        others = unknown("share of others", base.cotenant.share, rule.how)
        if rule.known:
            others = _others(best, base)
            for form in near[1:]:
                rival = _rules(found, counts[:COUNTS_MOST], form)[0]
                is_clear = max(best.mean_loss, rival.mean_loss) <= EXPLAINED_LOSS
                others = _either(others, _others(rival, base)) if is_clear else _none_of(others)
        counting = _counting(best, charges(found.tries, best.rule, 0, base.as_of), base)
    elif stated:
        why = "the limit changed in mid-run" if changes else f"only {len(stated)} headers state what remains"
        rule, settles = unknown("charge rule", base.charge_rule, why), unknown("settles", base.settles, why)
        others = unknown("share of others", base.cotenant.share, why)
    granted = granted.with_(charge_rule=rule.used, settles=settles.used)
    window = windows(counts, charges(found.tries, granted.charge_rule, 0, base.as_of), found.retry_after_s, granted)
    if not limit.known and not window.explains:
        limit = _limit_from_refusals(found, counts, base, limit)
    *habits, by_refusals = window.figures
    known = {figure.name: figure for figure in by_counts if figure.known}
    habits = [figure if figure.known else known.get(figure.name, figure) for figure in habits]
    figures = (
        *(limit, requests, rule, settles, others),
        *(counting if counting.known else by_refusals, *habits),
        *_refusals(found, base, window),
        *_faults(found, base),
    )
    return QuotaFit(figures, changes, rules, window)


# ---------------------------------------------------------------- limits


def _limit(name: str, d: int, counts: Sequence[Count], default: int) -> tuple[Figure, tuple[tuple[float, float], ...]]:
    """Return the limit that headers state, and its changes.

    The first value is the limit; later ones are factors of it.
    """
    said = [(count.launched_s, limit) for count in counts for dim, limit, _ in count.stated if dim == d]
    if not said:
        return unknown(name, default, "no header states it"), ()
    first = said[0][1]
    changes: list[tuple[float, float]] = []
    current = first
    for at_s, limit in said:
        if limit != current:
            changes.append((at_s, limit / first))
            current = limit
    how = f"stated in {len(said):,} headers"
    if changes:
        how += f"; it changed {len(changes)} times"
    return Figure(name, first, first, first, "", how), tuple(changes[:8])


def _limit_from_refusals(found: Observed, counts: Sequence[Count], base: ProviderConfig, nothing: Figure) -> Figure:
    """Return the limit, without headers, of the bucket that would have admitted and refused the same attempts.

    A bucket of limit L processes the attempts for each L of a grid; the L with the fewest different outcomes is the
    limit. The result states which limits explain the log nearly as well; that is no interval of known coverage. Needs
    refusals.
    """
    refused = sum(not count.let_in for count in counts)
    if refused < 5 or len(counts) < 20:
        return Figure(nothing.name, None, None, None, "", "no header states it, and too few refusals show it", base.tpm)
    charged = charges(found.tries, base.charge_rule, base.tpm, base.as_of)
    times = np.array([count.launched_s for count in counts])
    amount = np.array([charged[count.place] for count in counts])
    let_in = np.array([count.let_in for count in counts])
    span = max(60.0, float(np.ptp(times)))
    rate = float(amount[let_in].sum()) / span * 60.0
    grid = np.geomspace(max(float(amount.max()), rate / 4.0), 8.0 * max(rate, float(amount.max())), 120)
    wrong = np.array([_surprises(limit, times, amount, let_in) for limit in grid])
    least = int(wrong.min())
    near = grid[wrong <= least + max(2.0, 2.0 * math.sqrt(least))]
    best = float(np.median(grid[wrong == least]))
    # The true limit lies between the points of the grid: the neighbours of those that fit bound it.
    step = float(grid[1] / grid[0])
    low, high = float(near.min()) / step, float(near.max()) * step
    how = (
        f"{refused:,} refusals, charged by {base.charge_rule}: {least:,} attempts came out otherwise, hardly more at "
        f"{low:,.0f} to {high:,.0f}"
    )
    if len(near) > 60:
        return Figure(nothing.name, None, None, None, "", "the refusals fit any limit alike", base.tpm)
    return Figure(nothing.name, round(best), None, None, "", how)


def _surprises(limit: float, times: Real, amount: Real, let_in: NDArray[np.bool_]) -> int:
    """Return the number of attempts that a plain bucket of that limit would have treated differently."""
    used, at, wrong = 0.0, float(times[0]), 0
    for t, charge, inside in zip(times.tolist(), amount.tolist(), let_in.tolist(), strict=True):
        used = max(0.0, used - (t - at) * limit / 60.0)
        at = t
        wrong += (used + charge <= limit) != inside
        if inside:
            used = min(limit, used + charge)
    return wrong


# ---------------------------------------------------------------- window


def _window(
    found: Observed, counts: Sequence[Count], granted: ProviderConfig
) -> tuple[list[ProviderConfig], list[Figure]]:
    """Return the provider with the windows that explain the counts in headers, best first; window and phase if known.

    A bucket drains between two counts, a counter drops to nothing at once, a log gives back what is a minute old. Each
    window is tried with every charge rule; it is determined if all others explain the counts clearly worse.
    """
    if granted.burst_s < MINUTE_S:
        return [granted], []
    forms = [granted.with_(window=name, phase_s=0.0) for name in ("bucket", "anchored", "sliding")]
    tried = [(form, _rules(found, counts, form)[0]) for form in forms]
    if min(tried, key=lambda each: each[1].mean_loss)[0].window != "bucket" or tried[0][1].mean_loss > CLEAR_LOSS:
        phases = np.arange(0.0, MINUTE_S, PHASE_STEP_S).tolist()
        forms = [granted.with_(window="clock", phase_s=phase_s) for phase_s in phases]
        tried += [(form, _rules(found, counts, form)[0]) for form in forms]
    # The first of equals: a bucket, then what has no phase.
    form, best = min(tried, key=lambda each: each[1].mean_loss)
    best_of = [min(group, key=lambda each: each[1].mean_loss) for group in _by_window(tried)]
    rivals = [(other, rule) for other, rule in best_of if other.window != form.window]
    if best.mean_loss > _UNEXPLAINED_MOST:
        return [granted], []
    near = [other for other, rule in rivals if not _wins(best, rule)]
    if near:
        return [form, *near], []
    hits = f"it explains {1.0 - best.mean_loss:.0%} of {len(best.loss):,} counts"
    other, rival = min(rivals, key=lambda each: each[1].mean_loss)
    how = f"{hits}; next {other.window}: {1.0 - rival.mean_loss:.0%}"
    figures = [Figure("window", form.window, None, None, "", how, granted.window)]
    if form.window == "clock":
        clocks = [(each, rule) for each, rule in tried if each.window == "clock"]
        alike = [each.phase_s for each, rule in clocks if rule.mean_loss < best.mean_loss + 1e-9]
        middle = middle_phase(alike)
        apart = [(phase_s - middle + 30.0) % MINUTE_S - 30.0 for phase_s in alike]
        low, high = middle + min(apart) - PHASE_STEP_S, middle + max(apart) + PHASE_STEP_S
        form = form.with_(phase_s=round(middle, 2) % MINUTE_S)
        figures.append(Figure("phase", form.phase_s, low, high, "s", hits))
    return [form], figures


def _by_window(tried: list[tuple[ProviderConfig, Rule]]) -> list[list[tuple[ProviderConfig, Rule]]]:
    return [[each for each in tried if each[0].window == name] for name in dict.fromkeys(f.window for f, _ in tried)]


# ---------------------------------------------------------------- rules


def _rules(found: Observed, counts: Sequence[Count], granted: ProviderConfig) -> tuple[Rule, ...]:
    """Return every charge rule, settling and not, ordered by how well it explains the counts; the best first."""
    groups: list[tuple[list[str], Real]] = []
    for name in RULES:
        if name == "fixed":
            continue
        charged = charges(found.tries, name, 0, granted.as_of)
        same = next((names for names, known in groups if np.array_equal(known, charged)), None)
        if same is not None:
            same.append(name)
        else:
            groups.append(([name], charged))
    tried = []
    for names, charged in groups:
        name = "auto" if "auto" in names else names[0]
        for settles in (False, True):
            seen = [gap for gap in gaps(counts, charged, granted.with_(settles=settles)) if gap.d == TPM]
            let_in = [gap for gap in seen if gap.said.let_in]
            refused = [gap for gap in seen if not gap.said.let_in]
            tried.append(Rule(name, settles, _loss(let_in), let_in, refused, tuple(names)))
    return tuple(sorted(tried, key=lambda rule: rule.mean_loss))


def _loss(found: Sequence[CountGap]) -> Real:
    """Return each count's distance from the prediction, 0 to 1: 1 = by a tenth of the median charge, or more.

    In a gap, others either take nothing or take at one rate. The distance is capped, so that a burst of others, which
    no rule explains, counts alike for all: rules differ in how many counts they hit.
    """
    more = np.array([gap.more for gap in found])
    room = np.array([gap.limit * (gap.at_s - gap.since_s) / 60.0 for gap in found])
    busy = np.array([gap.shows_all for gap in found], np.bool_)
    rate = 0.0
    if busy.sum() >= LEAST_GAPS:
        rate = max(0.0, float(np.median(more[busy] / room[busy])))
        # Others who take as much as a bucket refills leave nothing: it is a counter, and nobody takes anything.
        rate = rate if rate < OTHERS_MOST else 0.0
    off = np.where(busy, np.minimum(np.abs(more), np.abs(more - rate * room)), np.abs(more))
    reach = max(4.0 * _ROUNDING, REACH_RATIO * float(np.median([gap.own for gap in found])))
    loss: Real = np.minimum(1.0, np.maximum(0.0, off - _ROUNDING) / reach)
    return loss


def _told(rules: Sequence[Rule], base: ProviderConfig) -> tuple[Figure, Figure]:
    """Return rule and settling, determined only if the best wins in nearly all block resamples of the counts."""
    best = rules[0]
    others = [rule for rule in rules[1:] if rule.rule != best.rule]
    opposite = next((rule for rule in rules if rule.rule == best.rule and rule.settles != best.settles), None)
    hits = f"it explains {1.0 - best.mean_loss:.0%} of {len(best.loss):,} counts"
    if best.mean_loss > _UNEXPLAINED_MOST:
        why = f"no rule explains the headers: the best, {best.rule}, only {1.0 - best.mean_loss:.0%} of the counts"
        return unknown("charge rule", base.charge_rule, why), unknown("settles", base.settles, why)
    rival = others[0] if others else None
    alike = f"; charged alike by {', '.join(best.alike)}" if len(best.alike) > 1 else ""
    if rival is not None and not _wins(best, rival):
        why = f"{best.rule} and {rival.rule} explain the headers equally well"
        return unknown("charge rule", base.charge_rule, why), unknown("settles", base.settles, why)
    next_one = f"; next {rival.rule}: {1.0 - rival.mean_loss:.0%}" if rival is not None else ""
    rule = Figure("charge rule", best.rule, None, None, "", f"{hits}{next_one}{alike}", base.charge_rule)
    if opposite is None or not _wins(best, opposite):
        return rule, unknown("settles", base.settles, "both explain the headers equally well")
    words = f"{hits}; otherwise {1.0 - opposite.mean_loss:.0%}"
    return rule, Figure("settles", best.settles, None, None, "", words, base.settles)


def _wins(best: Rule, rival: Rule) -> bool:
    n = min(len(best.loss), len(rival.loss))
    difference = rival.loss[:n] - best.loss[:n]
    if not difference.any():
        return False
    blocks = np.array_split(difference, min(BLOCKS, n))
    sums = np.array([block.sum() for block in blocks])
    drawn = np.random.default_rng(0).choice(sums, (_RESAMPLES, len(sums))).sum(axis=1)
    return bool((drawn > 0.0).mean() >= 0.5 + EACH / 2.0)


# ---------------------------------------------------------------- others, refusals, faults


def _none_of(one: Figure) -> Figure:
    why = "several windows explain the counts, each with others of its own"
    return unknown(one.name, one.default, why) if one.known else one


def _either(one: Figure, other: Figure) -> Figure:
    """Return a figure that holds whichever of two windows is right: unknown if they contradict each other."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return _none_of(one)
    if max(one.low, other.low) > min(one.high, other.high):
        return _none_of(one)
    return replace(one, low=min(one.low, other.low), high=max(one.high, other.high))


def _others(best: Rule, base: ProviderConfig) -> Figure:
    """Return the share of the limit that others take, as a ratio of sums with a jackknife over busy periods.

    A busy period is a run of counts between which the bucket can have been neither empty nor full. A share that is
    compatible with zero, and no larger than inexact moments produce without others, is 0.
    """
    name, default = "share of others", base.cotenant.share
    periods = [period for period in _busy(best.found) if period[1] >= BUSY_LEAST_S * period[2]]
    if len(periods) < 3 or sum(period[1] / period[2] for period in periods) < BUSY_TOTAL_S:
        return unknown(name, default, "too few counts in a row between which the bucket was neither empty nor full")
    more, room, a_second = np.array(periods).T
    n = len(periods)
    value = float(more.sum() / room.sum())
    left_out = (more.sum() - more) / (room.sum() - room)
    error = math.sqrt((n - 1) / n * float(((left_out - left_out.mean()) ** 2).sum()))
    half = float(stats.t.ppf(0.5 + EACH / 2.0, n - 1)) * error
    if abs(value) <= NOBODY_RATIO:
        value, half = 0.0, max(half, NOBODY_RATIO)
    how = f"{n:,} busy periods, {room.sum() / a_second.mean():,.0f} s in all"
    low, high = (min(1.0, max(0.0, value + sign * half)) for sign in (-1.0, 1.0))
    return Figure(name, min(1.0, max(0.0, value)), low, high, "", how, default)


def _busy(found: Sequence[CountGap]) -> list[tuple[float, float, float]]:
    """Return (taken by others, bucket refill, refill per second) of each busy period; long ones are split."""
    periods: list[tuple[float, float, float]] = []
    more, room, a_second = 0.0, 0.0, 0.0
    for gap in found:
        refill = gap.limit * (gap.at_s - gap.since_s) / 60.0
        # A full bucket refuses others: what they would have taken cannot be observed.
        is_open = gap.shows_all and gap.before + gap.own < 0.9 * gap.limit
        if is_open:
            more, room, a_second = more + gap.more, room + refill, gap.limit / 60.0
        if room > 0.0 and (not is_open or room > _PIECE_S * a_second):
            periods.append((more, room, a_second))
            more, room = 0.0, 0.0
    if room > 0.0:
        periods.append((more, room, a_second))
    return periods


def _counting(best: Rule, charged: Real, base: ProviderConfig) -> Figure:
    """Return whether a refusal takes its charge, from its own header compared with the count before."""
    name, default = "refusals count", base.failed_requests_count
    votes: list[bool] = []
    for gap in best.refused:
        base_used = gap.limit - next(left for d, _, left in gap.said.stated if d == TPM) - gap.more
        would = max(0.0, min(gap.limit - base_used, float(charged[gap.said.place])))
        if would > 4.0 * _ROUNDING + gap.limit * _TICK_S / 60.0:
            votes.append(abs(gap.more - would) < abs(gap.more))
    if len(votes) < 3:
        return unknown(name, default, "too few refusals state what remains, or it was nothing anyway")
    ratio = sum(votes) / len(votes)
    if 0.25 < ratio < 0.75:
        return unknown(name, default, f"{sum(votes)} of {len(votes)} refusals were charged, the others were not")
    how = f"{sum(votes)} of {len(votes)} refusals were charged"
    return Figure(name, ratio > 0.5, None, None, "", how, default)


def _refusals(found: Observed, base: ProviderConfig, window: WindowFit) -> tuple[Figure, Figure]:
    """Return how refusals state waits, and how long a refusal takes to arrive."""
    refused = found.kind == REFUSED
    count = int(refused.sum())
    if count < 3:
        why = f"{count} refusals are in the log"
        return unknown("Retry-After", base.retry_after, why), unknown("refusal", base.faults.refusal_s, why, "s")
    waits = found.retry_after_s[refused]
    said = waits[waits >= 0.0]
    word = window.form or retry_after(waits)
    how = f"{len(said):,} of {count:,} refusals state a wait"
    took = found.took_s[refused & (found.took_s >= 0.0)]
    late: Any = unknown("refusal", base.faults.refusal_s, "no refusal has a time", "s")
    if len(took) >= 3:
        late = quantile("refusal", took, 0.5, "s", f"{len(took):,} refusals, median")
    if window.explains and window.form is None:
        how = f"{how}, whether until the attempt fits or until the oldest entry expires"
        return unknown("Retry-After", word, how), late
    return Figure("Retry-After", word, None, None, "", how, base.retry_after), late


def _faults(found: Observed, base: ProviderConfig) -> tuple[Figure, Figure]:
    """Return the shares of server errors and dropped connections among admitted attempts."""
    if not found.outcomes:
        why = "the log does not say what became of its requests"
        return (
            unknown("server errors", base.faults.error_ratio, why),
            unknown("dropped", base.faults.drop_ratio, why),
        )
    let_in = int((found.kind != REFUSED).sum())
    how = f"of {let_in:,} attempts that were let in"
    return (
        share("server errors", int((found.kind == SERVER_FAULT).sum()), let_in, how),
        share("dropped", int((found.kind == LOST).sum()), let_in, how),
    )
