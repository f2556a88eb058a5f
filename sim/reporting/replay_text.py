"""A counterfactual replay as text for the terminal, and as the object that `--json` prints."""

from __future__ import annotations

import math
import os
from typing import Any

from governor.model.phrases import WAITED_FOR
from sim.base.layout import facts, table, wrapped
from sim.base.words import between, duration, number, percent
from sim.validation.counterfactual import SAME_S, Counterfactual, PairedFigure

CARRIED = (
    "the requests, their order and their pools; the length of each answer; what each attempt met that was let in (an "
    "answer, an error, a time-out) and how long it took; its way to the provider; what others used, by the counts in "
    "the headers; how late each launch was; when launching was paused"
)


def replay_text(name: str, found: Counterfactual, width: int) -> str:
    """Return the two runs side by side, the basis of the comparison, and last the answer."""
    rows = [["", "as it ran", "replayed", "difference (95 % of runs)"]]
    rows.append(_row("makespan", found.makespan_s, duration))
    rows.append(_row("429s", found.throttled, number))
    rows.append(_row("launches", found.launches, number))
    rows.append(_row("requests lost", found.lost, number))
    rows += [_row(f"waits: {WAITED_FOR[cause][1]}", each, duration) for cause, each in found.waits_s.items()]
    pairs = [("requests", _ends_text(found)), ("settings", _settings_text(found)), ("carried over", CARRIED)]
    pairs.append(("provider", f"{found.provider_from}: {_provider_text(found)}"))
    pairs += [("not told", text) for text in found.untold]
    pairs.append(("check", check_text(found)))
    title = wrapped(
        f"{os.path.basename(name)}: {found.requests:,} requests, simulated {found.replications} times", width
    )
    return "\n\n".join(
        [wrapped(title, width), table(rows, width=width), facts(pairs, width), wrapped(answer_text(found), width)]
    )


def _row(name: str, each: PairedFigure, write: Any) -> list[str]:
    if math.isnan(each.was):
        return [name, "not known", write(each.would), "-"]
    low, high = _signed(each.low, write), _signed(each.high, write)
    interval = "" if low == high == _signed(each.difference, write) else f" ({low} to {high})"
    return [name, write(each.was), write(each.would), _signed(each.difference, write) + interval]


def _signed(value: float, write: Any) -> str:
    text: str = write(value)
    return f"+{text}" if (value > 0.0 and text[0] != "0") or text.startswith("0.") else text


def _ends_text(found: Counterfactual) -> str:
    ends = found.ends
    median = ends.median_s
    moved = f"half of them end {_later(median.difference)}" if abs(median.difference) > SAME_S else "as soon as before"
    interval = f" ({_signed(median.low, duration)} to {_signed(median.high, duration)})"
    return (
        f"{percent(ends.sooner_ratio)} end sooner, {percent(ends.later_ratio)} later, the rest within {SAME_S:g} s; "
        f"in the median {moved if abs(median.difference) <= SAME_S else _later(median.difference)}{interval}"
    )


def _later(seconds: float) -> str:
    return f"{duration(abs(seconds))} {'later' if seconds > 0.0 else 'sooner'}"


def _settings_text(found: Counterfactual) -> str:
    if found.is_log:
        told = ", ".join(f"{env}={after}" for env, (_, after) in found.changed.items())
        return f"guardrails' defaults under the limits found{', with ' + told if told else ''}"
    if not found.changed:
        return "the run's own"
    return ", ".join(f"{env}={after} (was {before})" for env, (before, after) in found.changed.items())


def _provider_text(found: Counterfactual) -> str:
    p = found.provider
    settles = "settles to real use" if p.settles else "does not settle"
    minutes = "" if p.window == "bucket" else f", minutes: {p.window}"
    text = f"{p.tpm:,} tokens and {p.rpm:,} requests per minute (0 = no limit), charge rule {p.charge_rule}, {settles}"
    assumed = [name for name in ("limits", "charge rule", "settling") if p.learnt and name not in p.learnt]
    return text + minutes + (f"; it does not tell, so assumed: {', '.join(assumed)}" if assumed else "")


def check_text(found: Counterfactual) -> str:
    """Return how well the run itself is reproduced."""
    was_s, own, alone = found.makespan_s.was, found.own, found.alone
    if own is None:
        return (
            f"of the log's own launches the provider's model refuses {number(alone.throttled)}, where "
            f"{number(found.throttled.was)} were refused; the client's own settings are not known"
        )
    return (
        f"under its own settings {number(own.launches)} launches of {number(found.launches.was)}, "
        f"{number(own.throttled)} 429s of {number(found.throttled.was)}, makespan {_off(own.makespan_s, was_s)}; "
        f"with the provider's model deciding alone {number(alone.launches)}, {number(alone.throttled)}, "
        f"{_off(alone.makespan_s, was_s)}"
    )


def _off(value: float, was: float) -> str:
    return f"{100.0 * (value - was) / was:+.2f} %".replace("-", "−") if was > 0.0 else duration(value)


def answer_text(found: Counterfactual) -> str:
    """Return the answer to the user's question, in one sentence."""
    m = found.makespan_s
    if found.parted_s is None and not found.is_log:
        return f"With these settings the run would have been the same: {duration(m.would)}."
    sooner = "sooner" if m.difference < 0.0 else "later"
    ends = sorted((abs(m.low), abs(m.high))) if m.low * m.high > 0.0 else None
    surely = f"95 %: {between(ends[0], ends[1])} {sooner}" if ends else "which may be chance: the interval holds 0"
    return (
        f"With these settings the run would have taken {duration(m.would)} instead of {duration(m.was)}: "
        f"{_later(m.difference)} ({surely}), with {number(found.throttled.would)} 429s instead of "
        f"{number(found.throttled.was)}."
    )


def replay_json(name: str, found: Counterfactual) -> dict[str, Any]:
    """Return the object that `--json` prints."""

    def pair(each: PairedFigure) -> dict[str, float | None]:
        return {key: None if math.isnan(value) else value for key, value in each._asdict().items()}

    def run(each: Any) -> dict[str, float]:
        return {"makespan_s": each.makespan_s, "throttled": each.throttled, "launches": each.launches}

    ends = found.ends
    return {
        "source": name,
        "requests": found.requests,
        "replications": found.replications,
        "settings": {env: {"was": was, "is": now} for env, (was, now) in found.changed.items()},
        "makespan_s": pair(found.makespan_s),
        "throttled": pair(found.throttled),
        "launches": pair(found.launches),
        "lost": pair(found.lost),
        "waits_s": {cause: pair(each) for cause, each in found.waits_s.items()},
        "ends": {
            "requests": ends.requests,
            "median_later_s": {key: getattr(ends.median_s, key) for key in ("difference", "low", "high")},
            "sooner_ratio": ends.sooner_ratio,
            "later_ratio": ends.later_ratio,
        },
        "parted_s": found.parted_s,
        "provider": found.provider.model_dump(mode="json"),
        "provider_from": found.provider_from,
        "carried_over": CARRIED.split("; "),
        "not_told": list(found.untold),
        "own_settings": None if found.own is None else run(found.own),
        "provider_alone": run(found.alone),
    }
